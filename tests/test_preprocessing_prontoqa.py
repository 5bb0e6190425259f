"""preprocessing/prontoqa.py: the official generator's file in, the ancestor's rows out.

COCONUT_TEST_DATA names a folder with a prontoqa_valid.json in the ancestor's form; without it those
tests skip.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from preprocessing.prontoqa import convert, read_official  # noqa: E402


def example(k=0, hot="True", **change):
    """A value of the official file, of two hops, whose answer is `hot`."""
    no = "" if hot == "True" else "not "
    return {
        "test_example": {
            "question": f"Wumpuses are rompuses. Every rompus is {no}hot. Each numpus is x{k}. "
            "Max is a wumpus.",
            "query": "True or false: Max is hot.",
            "chain_of_thought": [
                "Max is a wumpus.",
                "Wumpuses are rompuses.",
                "Max is a rompus.",
                f"Every rompus is {no}hot.",
                f"Max is {no}hot.",
            ],
            "answer": hot,
            **change,
        }
    }


def official(tmp_path, examples):
    path = tmp_path / "5hop_0shot_random.json"
    path.write_text(json.dumps({f"example{k}": value for k, value in enumerate(examples, 1)}))
    return path


def run(*arguments):
    command = [sys.executable, str(ROOT / "preprocessing" / "prontoqa.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def read(folder, name):
    return json.loads((folder / f"prontoqa_{name}.json").read_text())


def test_a_row_has_the_ancestors_form():
    assert convert(example(hot="False")) == {
        "question": "Wumpuses are rompuses. Every rompus is not hot. Each numpus is x0. "
        "Max is a wumpus. True or false: Max is hot.",
        "steps": [
            "Max is a wumpus. Wumpuses are rompuses.",
            "Max is a rompus. Every rompus is not hot.",
            "Max is not hot.",
        ],
        "answer": "False",
    }


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"question": None}, "question: missing, empty or not a value of type str"),
        ({"query": ""}, "query: missing"),
        ({"query": "Prove: Max is hot."}, "query: 'Prove: Max is hot.' does not start with"),
        ({"query": "True or false: Max is cold."}, "chain_of_thought: its end 'Max is hot.'"),
        ({"query": "True or false: Max is not hot."}, "answer: 'True', but 'Max is hot.' is shown"),
        ({"chain_of_thought": []}, "chain_of_thought: missing"),
        ({"chain_of_thought": "Max is hot."}, "chain_of_thought: missing"),
        ({"chain_of_thought": ["Max is a wumpus.", 3, "Max is hot."]}, "chain_of_thought: holds"),
        (
            {"chain_of_thought": ["Max is a wumpus.", "Max is hot."]},
            "chain_of_thought: 2 sentences",
        ),
        ({"answer": "False"}, "answer: 'False', but 'Max is hot.' is shown"),
        ({"answer": True}, "answer: missing"),
    ],
)
def test_a_bad_example_is_named(tmp_path, change, problem):
    path = official(tmp_path, [example(), example(1, **change)])
    with pytest.raises(ValueError) as error:
        read_official(path)
    assert str(error.value).startswith(f"{path}: example2: {problem}")


@pytest.mark.parametrize("value", [[], {}, {"in_context_example0": {}}, 3, None])
def test_an_example_without_a_test_example_is_named(tmp_path, value):
    with pytest.raises(ValueError, match="example1: test_example: missing"):
        read_official(official(tmp_path, [value]))


def test_rows_are_split_in_the_files_order(tmp_path):
    """As the ancestor does it: its checkpoints meet no training row of theirs in our test file."""
    examples = [example(k, hot=["True", "False"][k % 2]) for k in range(12)]
    done = run(
        "--input",
        official(tmp_path, examples),
        "--output_dir",
        tmp_path / "data",
        "--train",
        6,
        "--validation",
        2,
        "--test",
        3,
    )
    assert done.returncode == 0, done.stderr
    assert "not used: 1" in done.stdout
    rows = [
        row for name in ("train", "validation", "test") for row in read(tmp_path / "data", name)
    ]
    assert rows == [convert(value) for value in examples[:11]]
    assert len(read(tmp_path / "data", "train")) == 6


def test_the_seed_shuffles(tmp_path):
    path = official(tmp_path, [example(k) for k in range(30)])
    actual = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(
            "--input",
            path,
            "--output_dir",
            tmp_path / folder,
            "--train",
            20,
            "--validation",
            4,
            "--test",
            6,
            "--seed",
            seed,
        )
        actual.append([read(tmp_path / folder, name) for name in ("train", "validation", "test")])
    assert actual[0] == actual[1] != actual[2]
    questions = [row["question"] for split in actual[0] for row in split]
    assert len(questions) == len(set(questions)) == 30


def test_a_repeated_problem_is_left_out(tmp_path):
    """Also with its facts in another order: else the answer of a test row stands in training."""
    again = example(0)
    facts = again["test_example"]["question"].split(". ", 1)
    again["test_example"]["question"] = f"{facts[1][:-1]}. {facts[0]}."
    rows, repeated = read_official(official(tmp_path, [example(0), example(1), again, example(1)]))
    assert [len(rows), repeated] == [2, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--input"),
        (["--input", "nowhere.json"], "nowhere.json"),
        (["--input", "FILE"], "1 different problems, but 10000 are needed"),
        (["--input", "FILE", "--train", "x"], "'x' is not an integer from 0 up"),
        (["--input", "BAD"], "bad.json: not a JSON file"),
    ],
)
def test_bad_input_ends_in_code_2_and_leaves_no_file(tmp_path, arguments, message):
    (tmp_path / "bad.json").write_text("version https://git-lfs.github.com/spec/v1")
    names = {"FILE": str(official(tmp_path, [example()])), "BAD": str(tmp_path / "bad.json")}
    done = run("--output_dir", tmp_path / "data", *(names.get(text, text) for text in arguments))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_published_rows_are_what_the_converter_makes():
    """Undo the conversion of 200 real rows, convert again: the same rows, and nothing else."""
    folder = os.environ.get("COCONUT_TEST_DATA")
    if not folder:
        pytest.skip("COCONUT_TEST_DATA is not set")
    rows = json.loads(Path(folder, "prontoqa_valid.json").read_text())
    assert len(rows) == 200
    for row in rows:
        facts, statement = row["question"].split(" True or false: ")
        chain = re.findall(r"\S[^.]*\.", " ".join(row["steps"]))
        assert (
            convert(
                {
                    "test_example": {
                        "question": facts,
                        "query": f"True or false: {statement}",
                        "chain_of_thought": chain,
                        "answer": row["answer"],
                    }
                }
            )
            == row
        )
        assert len(row["steps"]) == 6  # five hops and the conclusion
