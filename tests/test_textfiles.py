"""What people's editors and downloads make of text files: read as what it means, or named; and the
command that makes a missing file."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_rows
from test_preprocessing_prontoqa import example
from test_preprocessing_prosqa import GOOD_ROW

from analysis.ask import read_questions
from analysis.compare import read_results
from loader import load_config
from preprocessing import gsm8k_icot
from preprocessing.prontoqa import read_official
from preprocessing.prosqa import read_prosqa
from preprocessing.textfiles import MADE_BY, how_to_make
from rows import load_rows

ROWS = tiny_rows(3)
ORIGINAL = [
    {"question": f"Why {n}?\u2028So?", "answer": f"<<1+{n}={n + 1}>>\n#### {n}"} for n in (1, 2)
]
RESULT = {"row": 0, "question": "How many?", "gold_answer": "1", "correct": True}


def as_list(rows) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def as_lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_gsm8k(path):
    return gsm8k_icot.read_source("train", path).rows


# file name, its text, who reads it
FILES = {
    "data": ("rows.json", as_list(ROWS), load_rows),
    "data, JSON Lines": ("rows.jsonl", as_lines(ROWS), load_rows),
    "data, one JSON line": ("rows.jsonl", as_lines(ROWS[:1]), load_rows),
    "config": ("c.yaml", (ROOT / "args/quickstart.yaml").read_text(), load_config),
    "questions": (
        "q.txt",
        "Why\u2028?\n\nHow \u00e9?\n",
        lambda path: read_questions(None, str(path)),
    ),
    "questions as rows": ("q.json", as_list(ROWS), lambda path: read_questions(None, str(path))),
    "questions as lines": ("q.jsonl", as_lines(ROWS), lambda path: read_questions(None, str(path))),
    "iCoT": ("t.txt", "a\u2028b?||<<1+1=2>> #### 2\nb?|| #### 3\n", read_gsm8k),
    "GSM8K": ("t.jsonl", as_lines(ORIGINAL), read_gsm8k),
    "ProsQA": ("prosqa.json", as_list([GOOD_ROW]), read_prosqa),
    "ProsQA, JSON Lines": ("prosqa.json", as_lines([GOOD_ROW] * 2), read_prosqa),
    "ProntoQA": ("p.json", as_list({"example1": example()}), read_official),
    "results": ("results.jsonl", as_lines([RESULT] * 2), read_results),
}
FORMS = {
    "byte-order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "blank last lines": lambda text: text.encode() + b"\n\n",
    "all of them": lambda text: b"\xef\xbb\xbf" + (text + "\n").replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", FILES)
def test_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, kind, form):
    name, text, read = FILES[kind]
    path = tmp_path / name
    path.write_bytes(text.encode())
    plain = read(path)
    path.write_bytes(FORMS[form](text))
    assert read(path) == plain and plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", FILES)
def test_other_encodings_are_named_with_the_remedy(tmp_path, kind, encoding):
    name, text, read = FILES[kind]
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=f"{name}.*save it as UTF-8"):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", FILES)
def test_bytes_that_are_no_utf_8_are_named(tmp_path, kind):
    name, text, read = FILES[kind]
    path = tmp_path / name
    path.write_bytes(text.replace("?", "\u00e9", 1).encode("latin-1", "replace") + b"\xe9\n")
    with pytest.raises(ValueError, match=f"{name}(.|\n)*(utf-8|UTF-8)"):
        read(path)


def test_json_lines_and_a_json_list_are_the_same_rows(tmp_path):
    """Whatever the name says."""
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(as_lines(ROWS))
        assert load_rows(tmp_path / name) == ROWS
        (tmp_path / name).write_text(as_list(ROWS))
        assert load_rows(tmp_path / name) == ROWS
        (tmp_path / name).write_text(as_lines(ORIGINAL))
        rows = read_gsm8k(tmp_path / name)
        (tmp_path / name).write_text(as_list(ORIGINAL))
        assert read_gsm8k(tmp_path / name) == rows and len(rows) == 2


def test_the_broken_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n" + as_lines(ROWS)[:-9])
    with pytest.raises(ValueError, match="a.jsonl: not valid JSON: line 4 of these JSON Lines"):
        load_rows(tmp_path / "a.jsonl")
    broken = [ORIGINAL[0], {"question": "q"}]
    (tmp_path / "b.json").write_text(as_list(broken))
    with pytest.raises(ValueError, match='b.json: 1 of 2(.|\n)*row 1: "question" and "answer"'):
        read_gsm8k(tmp_path / "b.json")


# ------------------------------------------------------------------------------- what is missing

PLACES = re.findall(
    r"^(?:train_path|val_path|model_id|load_model_path): (\S+)$",
    "\n".join(path.read_text() for path in sorted((ROOT / "args").glob("*.yaml"))),
    re.MULTILINE,
)
FROM_THE_HUB = {
    "openai-community/gpt2",
    "Qwen/Qwen3-4B-Instruct-2507",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "null",
}


@pytest.mark.parametrize("place", sorted(set(PLACES) - FROM_THE_HUB))
def test_whatever_the_configs_need_is_named_with_a_command_that_is_there(place):
    hint = how_to_make(place)
    (command,) = re.findall("`(.*?)`", hint)
    scripts = [word for word in command.split() if word.endswith((".sh", ".bash", ".py", ".yaml"))]
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    made = re.findall(r"[\w-]+\.json|quickstart_model", hint)
    if place.startswith("data/"):
        assert place.removeprefix("data/") in made


def test_the_scripts_make_what_the_hints_say(tmp_path):
    """The names in the table and those in the scripts are the same."""
    hints = " ".join(MADE_BY.values())
    named = {name for name in re.findall(r"\w+\.json", hints) if "random" not in name}
    small = {"train": 2, "validation": 2, "test": 2}
    sizes = [f"--{name}={size}" for name, size in small.items()]
    run = lambda script, *more: subprocess.run(
        [sys.executable, ROOT / "preprocessing" / script, "--output_dir", tmp_path, *more],
        check=True,
    )
    run("prosqa.py", *sizes)
    run("arithmetic_stories.py", *sizes[:2])
    (tmp_path / "in.json").write_text(json.dumps({f"e{n}": example(n) for n in range(6)}))
    run("prontoqa.py", "--input", tmp_path / "in.json", *sizes)
    (tmp_path / "in.json").unlink()
    made = {path.name for path in tmp_path.glob("*.json")}
    assert made | set(gsm8k_icot.OUTPUTS.values()) == named


def test_nobody_else_gets_a_command():
    for path in ("train.json", "data/mine.json", "/home/gsm/rows.json", "my_prosqa_train.jsonl"):
        assert how_to_make(path) == ""


def test_a_missing_file_is_named_with_its_command(tmp_path):
    with pytest.raises(ValueError, match="no such file; `TARGET_SIZE=50000 bash preprocessing/gs"):
        load_rows(tmp_path / "data/gsm_train.json")  # the original's name


# ------------------------------------------------------------------------------- the scripts

SCRIPTS = [
    *ROOT.glob("*.sh"),
    *ROOT.glob("preprocessing/*.*sh"),
    *ROOT.glob("benchmarks/*.sh"),
    ROOT / ".ci/run",
]


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_checkout_on_windows_keeps_the_line_ends(tmp_path):
    """bash takes the CR of `set -euo pipefail` for a part of an option's name."""
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=b", "-c", "core.autocrlf=true", *words],
        cwd=tmp_path / "there",
        env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        check=True,
        capture_output=True,
    )
    for path in [ROOT / ".gitattributes", *SCRIPTS]:
        target = tmp_path / "there" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    git("clone", "-q", ".", "../clone")
    for path in SCRIPTS:
        assert b"\r" not in (tmp_path / "clone" / path.relative_to(ROOT)).read_bytes(), path.name


def test_sh_hands_the_scripts_to_bash():
    done = subprocess.run(
        ["sh", ROOT / "preprocessing/gsm8k_icot.bash"],
        env={"PATH": "/usr/bin:/bin", "TARGET_SIZE": "x"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "TARGET_SIZE is 'x'" in done.stderr
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        if path.name not in ("setup.sh", "run"):
            guard = '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh'
            assert lines.index(guard) < lines.index("set -euo pipefail")
