"""preprocessing/math_sets.py: both public forms of each set, counts, what is wrong."""

import gzip
import json
import subprocess
import sys

import datasets
import pytest
from conftest import ROOT

from preprocessing import math_sets
from preprocessing.textfiles import how_to_make
from rows import load_rows


def gsm8k(n):
    chain = f"Ann has 2*{n} = <<2*{n}={2 * n}>>{2 * n} figs.\n#### {2 * n}"
    return {"question": f"Ann doubles {n} figs. How many?", "answer": chain}


# set -> how many rows, what makes a record in each of its forms, the row
SETS = {
    "gsm8k": (
        1319,
        [gsm8k],
        lambda n: (f"Ann doubles {n} figs. How many?", [f"<<2*{n}={2 * n}>>"], str(2 * n)),
    ),
    "gsm_hard": (
        1319,
        [
            lambda n: {"input": f"Is it {n}?", "code": "def solution():", "target": n + 0.0},
            lambda n: {"instruction": f"Is it {n}?", "response": f"{n}.0"},
        ],
        lambda n: (f"Is it {n}?", [], str(n)),
    ),
    "multiarith": (
        600,
        [
            lambda n: {"question": f"Is it {n}?", "final_ans": str(n)},
            lambda n: {
                "iIndex": n,
                "lEquations": [f"X={n}.0"],
                "lSolutions": [n + 0.0],
                "sQuestion": f" Is it {n}? ",
            },
        ],
        lambda n: (f"Is it {n}?", [], str(n)),
    ),
    "svamp": (
        1000,
        [
            lambda n: {
                "Body": f"There are {n}.",
                "Question": "How many ?",
                "Answer": str(n),
                "question_concat": f"There are {n}. How many ?",
            },
            lambda n: {
                "Body": f"There are {n}.",
                "Question": "How many ?",
                "Equation": f"( {n}.0 )",
                "Answer": n + 0.0,
            },
        ],
        lambda n: (f"There are {n}. How many ?", [], str(n)),
    ),
}
FORMS = [(name, form) for name, (_, makers, _) in SETS.items() for form in range(len(makers))]


def put(path, records):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def convert(folder, *arguments):
    """Run main(): the exit code."""
    try:
        math_sets.run_script(
            lambda: math_sets.main([*map(str, arguments), f"--output_dir={folder / 'out'}"])
        )
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
@pytest.mark.parametrize(("which", "form"), FORMS)
def test_every_public_form_gives_the_same_rows(tmp_path, capsys, which, form, name):
    count, makers, expected = SETS[which]
    path = put(tmp_path / name, [makers[form](n) for n in range(count)])
    assert convert(tmp_path, f"--{which}", path) == 0
    output = tmp_path / "out" / f"test_{which}.json"
    rows = [dict(zip(("question", "steps", "answer"), expected(n))) for n in range(count)]
    assert load_rows(output) == rows
    what = "the test split" if which == "gsm8k" else "all"
    assert capsys.readouterr().out == (
        f"{which}: {count} rows ({what}), 0 repeat a question: {output}\n"
    )
    assert "math_sets.py" in how_to_make(output)


def test_splits_are_told_apart_by_their_counts_and_joined_in_order(tmp_path, capsys):
    _, (maker, _), _ = SETS["svamp"]
    train = put(tmp_path / "train.json", [maker(n) for n in range(700)])
    test = put(tmp_path / "test.json", [maker(n) for n in range(700, 999)] + [maker(0)])
    assert convert(tmp_path, "--svamp", test) == 0
    assert "svamp: 300 rows (the test split), 0 repeat" in capsys.readouterr().out
    assert convert(tmp_path, "--svamp", train, test) == 0
    assert "svamp: 1000 rows (all), 1 repeat a question" in capsys.readouterr().out
    rows = load_rows(tmp_path / "out/test_svamp.json")
    assert [row["answer"] for row in rows] == [*map(str, range(999)), "0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (18, "18"),
        (18.0, "18"),
        (-2.50, "-2.5"),
        (1e20, "1e+20"),
        ([8.0], "8"),
        (" 1,800 ", "1,800"),
        ("3.00", "3"),
    ],
)
def test_answers(value, text):
    assert math_sets.answer_text(value) == text


def records(count=1319, **last):
    good = [{"input": f"Is it {n}?", "target": n} for n in range(count)]
    return [*good[:-1], {**good[-1], **last}]


WRONG = {
    "cut short": (records(1318), "1318 rows, but the set has 1319 (all)"),
    "no answer": (records(target=None), "row 1318: the answer None is neither a number"),
    "a boolean": (records(target=True), "row 1318: the answer True is neither a number"),
    "not finite": (records(target=float("nan")), "row 1318: the answer nan is neither a number"),
    "empty answer": (records(target=" "), "row 1318: the answer is empty"),
    "no question": (records(input=""), "row 1318: the question is empty"),
    "question a number": (records(input=5), "row 1318: input: not a text"),
    "other fields": (
        [{"q": "a"}] * 12,
        "12 rows cannot be read:\n  {path}: row 0: its fields are q; expected input, target; or "
        "instruction, response\n",
    ),
    "no objects": (["a"], "{path}: expected a list of objects"),
    "an object": ({"a": 1}, "{path}: expected a list of objects"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, capsys, kind):
    content, message = WRONG[kind]
    path = put(tmp_path / "rows.json", content)
    good = put(tmp_path / "good.jsonl", [gsm8k(n) for n in range(1319)])
    assert convert(tmp_path, "--gsm_hard", path, "--gsm8k", good) == 2
    assert message.replace("{path}", str(path)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_are_none_are_named(tmp_path, capsys):
    for name, words in (("rows.json", "not a JSON file"), ("rows.parquet", "Git LFS pointer")):
        assert convert(tmp_path, "--svamp", tmp_path / name) == 2
        assert name in capsys.readouterr().err
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        assert convert(tmp_path, "--svamp", tmp_path / name) == 2
        error = capsys.readouterr().err
        assert f"{name}: " in error and words in error


def test_gsm8k_rows_without_the_mark_are_named(tmp_path, capsys):
    rows = [gsm8k(n) for n in range(1318)] + [{"question": "How many?", "answer": "18"}]
    assert convert(tmp_path, "--gsm8k", put(tmp_path / "rows.jsonl", rows)) == 2
    assert "row 1318: no #### in the answer '18'" in capsys.readouterr().err


def test_a_file_is_not_replaced_by_its_own_rows(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    path = put(tmp_path / "out" / "test_gsm8k.json", [gsm8k(n) for n in range(1319)])
    before = path.read_bytes()
    assert convert(tmp_path, "--gsm8k", path) == 2
    assert f"{path} would be replaced by its own rows" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_script_runs_by_its_path(tmp_path):
    script = ROOT / "preprocessing" / "math_sets.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "give at least one of --gsm8k, --gsm_hard" in done.stderr
