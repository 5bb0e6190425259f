"""Files are whole or not there."""

import os

import pytest

from engine.files import WRITING, write_whole


def test_write_whole_replaces_a_file(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one", "two, ünï"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_whole_keeps_the_old_file_when_it_fails(tmp_path):
    """A text that cannot be written (half a surrogate pair) fails in the middle of the write."""
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, order):
    write_whole(tmp_path / "a.json", "one")
    synced = ("sync", "a.json" + WRITING + "file")
    assert order == [synced, ("rename", "a.json"), ("sync", tmp_path.name)]
