"""analysis/row_files.py: the same model on other files, longer chains say."""

import dataclasses
import json

import pytest
from conftest import Workspace, tiny_rows

from analysis.probe import Probe, load_probe, read_config
from analysis.row_files import accuracy_by_file, describe_files, read_row_files
from engine.evaluation import wilson_interval
from preprocessing.arithmetic_stories import make_stories
from preprocessing.small_model import prosqa_tokenizer, stories_tokenizer
from utils import UserError


class Knower(Probe):
    """Right in the stories that begin with an even number, where it has two latents."""

    def answers(self, dataset, rows, replaced=None):
        rows = [(dataset.encoded.rows[row], dataset.num_latents[row]) for row in rows]
        return [row["answer"] if knows(row) and latents == 2 else None for row, latents in rows]


def knows(row: dict) -> bool:
    return int(row["question"].split()[2]) % 2 == 0


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory) -> Workspace:
    """A random model to evaluate with latents."""
    workspace = Workspace(model_folder, tmp_path_factory.mktemp("files"))
    workspace.values |= dict(load_model_path=str(model_folder), resume=1, max_new_tokens=60)
    return workspace


@pytest.fixture
def probe(folder) -> Probe:
    return load_probe(read_config(str(folder.yaml())))


def test_each_file_has_the_accuracy_of_its_own_rows(probe, folder, tmp_path):
    rows = tiny_rows(30, seed=4)
    files = {
        "short.json": [row for row in rows if len(row["steps"]) < 3],
        "long.json": [row for row in rows if len(row["steps"]) >= 3],
    }
    for name, part in files.items():
        (tmp_path / name).write_text(json.dumps(part))
    read = read_row_files(probe.config, [str(tmp_path / name) for name in files])
    assert list(read.values()) == list(files.values())
    knower = Knower(probe.inputs, probe.model, probe.device)
    report = accuracy_by_file(knower, read, [0, 2])
    for (path, entry), part, steps in zip(report.items(), files.values(), ([0, 2], [3, 4])):
        right = sum(map(knows, part))
        assert 0 < right < len(part) and path in read
        assert (entry["rows"], entry["steps"]) == (len(part), steps)
        for latents, count in (("0", 0), ("2", right)):
            wanted = dict(rows=count, rate=count / len(part))
            wanted["interval"] = list(wilson_interval(count, len(part)))
            assert entry["accuracy"][latents] == wanted
    assert describe_files(report).count("long.json") == 2


def test_files_that_cannot_be_read_are_named_together(folder, tmp_path):
    config = read_config(str(folder.yaml()))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError) as error:
        read_row_files(config, ["nowhere.json", str(tmp_path / "bad.json")])
    assert "nowhere.json" in error.value.problems[0] and "bad.json" in error.value.problems[1]


def with_tokenizer(probe, tokenizer):
    return dataclasses.replace(probe, inputs=dataclasses.replace(probe.inputs, tokenizer=tokenizer))


@pytest.mark.parametrize(
    "rows, tokenizer, words",
    [
        (tiny_rows(3), None, "far.json: a chain with its answer has "),
        (make_stories([3], seed=0, steps=[60])[0], None, r"far.json: max_new_tokens: .* positions"),
        (
            [{"question": "3 12 | 12 5 ? 5 7 @ 3", "steps": [], "answer": "5"}],
            prosqa_tokenizer(9, 64),
            "far.json: this model's tokenizer does not know 12;",
        ),
        (
            make_stories([3], seed=0, max_number=40)[0],
            stories_tokenizer(10, 64),
            "far.json: row 0: this tokenizer gives .*27/3",
        ),
    ],
    ids=["chains cut off", "beyond the positions", "unknown concepts", "unknown numbers"],
)
def test_rows_that_the_model_could_not_do_are_one_line(probe, rows, tokenizer, words):
    if rows[0]["question"].startswith("Tom has"):
        config = dataclasses.replace(probe.config, max_new_tokens=3)
        probe = dataclasses.replace(probe, inputs=dataclasses.replace(probe.inputs, config=config))
    probe = with_tokenizer(probe, tokenizer) if tokenizer else probe
    with pytest.raises(UserError, match=words):
        accuracy_by_file(probe, {"far.json": rows}, [0])
