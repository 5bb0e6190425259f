"""preprocessing/arithmetic_stories.py and small_model.py: rows, and a tokenizer for them."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from preprocessing import arithmetic_stories  # noqa: E402
from preprocessing.arithmetic_stories import make_stories  # noqa: E402

SIZES = [200, 1500]


@pytest.fixture(scope="module")
def parts():
    return make_stories(SIZES, seed=0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "data" / "model"
    done = run("small_model.py", "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "preprocessing" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def segments(row):
    return [row["question"] + "\n", *(step + "\n" for step in row["steps"]), "### " + row["answer"]]


# ------------------------------------------------------------------------------- the rows


def test_a_seed_gives_the_same_rows_again_and_another_seed_others(parts):
    assert make_stories(SIZES, seed=0) == parts
    assert make_stories(SIZES, seed=1) != parts


def test_rows_are_those_of_earlier_versions():
    """Published figures name a seed: another option leaves the rows of the old ones as they are."""
    text = json.dumps(make_stories([20, 100], seed=0))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e906cd251b05d595"


def test_validation_shares_no_question_and_no_long_chain_with_train(parts):
    rows = [row for part in parts for row in part]
    assert [len(part) for part in parts] == SIZES
    assert len({row["question"] for row in rows}) == sum(SIZES)
    chains = [{tuple(row["steps"]) for row in part if len(row["steps"]) >= 3} for part in parts]
    assert not chains[0] & chains[1]


def test_every_step_is_true_and_goes_on_from_the_one_before(parts):
    for row in (row for part in parts for row in part):
        value, total = map(int, re.match(r"\w+ has (\d+) of (\d+) ", row["question"]).groups())
        for step in row["steps"]:
            left, operator, right, result = re.fullmatch(
                r"<<(\d+)([-+*/])(\d+)=(\d+)>>", step
            ).groups()
            left, right = int(left), int(right)
            assert value == left or (total, operator, value) == (left, "-", right)  # a swap
            results = {"+": left + right, "-": left - right, "*": left * right}
            value = results[operator] if operator != "/" else left / right
            assert value == int(result) and 0 <= value <= total
        assert row["answer"] == str(int(value))


def test_one_to_five_steps_mostly_three_or_more(parts):
    lengths = [len(row["steps"]) for part in parts for row in part]
    assert set(lengths) == {1, 2, 3, 4, 5}
    assert sum(length >= 3 for length in lengths) > 0.8 * len(lengths)


def test_stories_have_the_steps_asked_for_each_as_often():
    lengths = [len(row["steps"]) for row in make_stories([600], seed=1, steps=[2, 7, 9])[0]]
    assert set(lengths) == {2, 7, 9}
    assert all(150 < lengths.count(number) < 250 for number in (2, 7, 9))


def test_the_story_tells_as_many_changes_as_there_are_steps(parts):
    for row in (row for part in parts for row in part):
        told = row["question"].split(". ")[1]
        assert len(re.split(", | and ", told)) == len(row["steps"])


def test_the_script_writes_both_files_the_same_each_time(tmp_path):
    arguments = "--prefix", "tiny", "--train", 60, "--validation", 20, "--seed", 3
    for folder in "a", "b":
        done = run("arithmetic_stories.py", "--output_dir", tmp_path / folder, *arguments)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == ["tiny_train.json", "tiny_validation.json"]
    rows = json.loads((tmp_path / "a" / "tiny_train.json").read_text())
    assert rows == make_stories([20, 60], seed=3)[1]


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--train", "-1"], "--train: '-1' is not an integer from 0 up"),
        (["--max_number", 1], "max_number: 1 things are too few"),
        (["--steps", "4", "five"], "--steps: 'five' is not an integer from 0 up"),
        (["--steps", "4", "0"], "steps: [4, 0]: a story has at least one"),
    ],
)
def test_bad_arguments_end_in_one_line_and_exit_code_2(tmp_path, arguments, problem):
    done = run("arithmetic_stories.py", "--output_dir", tmp_path, *arguments)
    assert done.returncode == 2
    assert problem in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_more_rows_than_stories_is_an_error_not_an_endless_loop(monkeypatch):
    monkeypatch.setattr(arithmetic_stories, "THINGS", ("plums",))
    monkeypatch.setattr(arithmetic_stories, "PRONOUNS", {"Tom": "he", "Mia": "she"})
    monkeypatch.setattr(arithmetic_stories, "NUM_STEPS", {1: 1})
    with pytest.raises(ValueError, match=r"max_number: 2.* too few stories for 10 \+ 90"):
        make_stories([10, 90], seed=0, max_number=2)


# ------------------------------------------------------------------------------- the model folder


def test_texts_come_back_from_their_tokens_and_segments_meet_at_token_borders(parts, tokenizer):
    for row in (row for part in parts for row in part):
        pieces = segments(row)
        ids = tokenizer("".join(pieces))["input_ids"]
        assert tokenizer.decode(ids) == "".join(pieces)
        assert tokenizer.unk_token_id not in ids
        assert sum((tokenizer(piece)["input_ids"] for piece in pieces), []) == ids


@pytest.mark.parametrize("options", [dict(max_change=12), dict(steps=[6, 9, 12])])
def test_the_vocabulary_covers_other_seeds_larger_changes_and_longer_chains(tokenizer, options):
    for row in make_stories([500], seed=7, **options)[0]:
        assert tokenizer.unk_token_id not in tokenizer("".join(segments(row)))["input_ids"]


def test_markers_vanish_from_decoded_text_and_leave_the_rest(tokenizer):
    markers = ["<|start-latent|>", "<|latent|>", "<|end-latent|>"]
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    ids = tokenizer("".join(markers) + "<<3+4=7>>\n### 7" + tokenizer.eos_token)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<<3+4=7>>\n### 7"


def test_the_folder_is_a_config_and_a_tokenizer_with_room_for_the_markers(model_dir, tokenizer):
    config = AutoConfig.from_pretrained(model_dir)
    assert len(tokenizer.encode("<<")) == 1
    assert None not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id == config.eos_token_id != tokenizer.pad_token_id
    assert config.model_type == "qwen3" and config.vocab_size >= len(tokenizer) + 3
    assert AutoModelForCausalLM.from_config(config).num_parameters() < 1_000_000


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--hidden_size", 0], "--hidden_size: 0 is below 1"),
        (["--hidden_size", 40], "--hidden_size: 40 is no multiple of 32"),
        (["--num_layers", 0], "--num_layers: 0 is below 1"),
        (["--positions", 0], "--positions: 0 is below 1"),
    ],
)
def test_a_model_without_a_size_is_refused(tmp_path, arguments, problem):
    done = run("small_model.py", "--output_dir", tmp_path / "model", *arguments)
    assert done.returncode == 2 and problem in done.stderr.splitlines()[-1]
    assert not (tmp_path / "model").exists()


def test_the_folder_can_be_written_again_but_never_over_other_files(model_dir):
    before = contents(model_dir)
    assert run("small_model.py", "--output_dir", model_dir).returncode == 0
    assert contents(model_dir) == before
    assert [path.name for path in model_dir.parent.iterdir()] == [model_dir.name]
    (model_dir / "thesis.txt").write_text("mine")
    done = run("small_model.py", "--output_dir", model_dir)
    assert done.returncode == 2 and "thesis.txt" in done.stderr
    assert contents(model_dir) == {**before, "thesis.txt": b"mine"}
