"""engine/eval_sets.py, run by run.py: several sets in one evaluation, samples, a real kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Workspace, tiny_rows
from soak import CLOCKS, history
from test_loop import train

from analysis.compare import compare_files
from engine import evaluation
from engine.evaluation import Evaluation
from engine.sampling import Sampled
from loader import load_config
from rules import make_config
from utils import UserError

SETS = {"gsm8k": 3, "svamp-1000": 4}  # rows
SAMPLED = dict(num_samples=3, temperature=1.0, top_p=0.9, seed=3)
HUB = "own/set/main:test"


@pytest.fixture(scope="module")
def space(model_folder, tmp_path_factory) -> Workspace:
    """A trained checkpoint of two epochs (two latents), two sets, and the keys to evaluate it."""
    space = Workspace(model_folder, tmp_path_factory.mktemp("sets"))
    one_step = dict(num_epochs=2, batch_size_training=12, skip_validation=True)
    assert train(space, **one_step, gradient_accumulation_steps=None, epochs_per_stage=2) == 0
    for name, count in SETS.items():
        (space.folder / f"{name}.json").write_text(json.dumps(tiny_rows(count, seed=count)))
    space.values |= dict(
        only_eval=True,
        train_path=None,
        val_path=None,
        load_model_path=str(space.run_dir / "checkpoint_2"),
        epochs_per_stage=2,
        eval_sets={name: str(space.folder / f"{name}.json") for name in SETS},
        eval_num_latents=[0, 2],
        max_new_tokens=6,
        batch_size_eval=2,
    )
    return space


@pytest.fixture(scope="module")
def evaluated(space) -> Path:
    """The run folder of the evaluation of both sets, with samples."""
    assert train(space, name="whole", **SAMPLED) == 0
    return space.run_dir.with_name("whole")


def results(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_results_of_another_evaluation_are_kept(space):
    """Of fewer rows, then the same again, then of other rows: nothing is lost, nothing doubled."""
    folder, name = space.run_dir.with_name("again"), "results_gsm8k_epoch_2"
    found = []
    for changes in (dict(eval_subset_size=2), {}, {}, dict(temperature=1.0, num_samples=2)):
        assert train(space, name="again", eval_num_latents=2, **changes) == 0
        found.append(results(folder, f"{name}_latents_2"))
    assert [len(rows) for rows in found] == [2, 3, 3, 3] and "samples" in found[3][0]
    kept = sorted(path.stem for path in folder.glob(f"{name}*.jsonl"))
    befores = [f"{name}_latents_2.before_{n}" for n in (1, 2)]
    assert kept == [f"{name}_latents_2", *befores]
    assert [results(folder, before) for before in befores] == found[:2]
    log = (folder / "training.log").read_text()
    assert f"there were other results, now {befores[1]}.jsonl" in log
    for kind in ("md", "json"):  # of two rows, of three (twice the same), of the samples
        assert len(list(folder.glob(f"eval_sets_epoch_2*.{kind}"))) == 3
    drawn = [record.get("temperature") for record in history(folder)]
    assert drawn == [None] * 6 + [1.0] * 2


def test_another_evaluation_leaves_an_interrupted_one_alone(space, monkeypatch):
    """It ends after its first set; one of other rows comes, one with another limit, and then the
    first goes on: what each has recorded is there."""
    folder, write = space.run_dir.with_name("between"), evaluation.write_results
    between = dict(name="between", eval_num_latents=2)

    def stop(run_dir, title, *args):
        if title.startswith("svamp"):
            raise KeyboardInterrupt
        write(run_dir, title, *args)

    monkeypatch.setattr(evaluation, "write_results", stop)
    with pytest.raises(KeyboardInterrupt):
        train(space, **between)
    monkeypatch.undo()
    (partial,) = folder.glob("partial_results_*")
    one = {"gsm8k": space.values["eval_sets"]["gsm8k"]}
    assert train(space, **between, eval_sets=one, eval_subset_size=2) == 0
    assert train(space, **between, max_new_tokens=3) == 0
    assert partial.exists() and len(history(folder)) == 4
    assert train(space, **between) == 0
    records = [(r["eval_set"], r["rows"], r["max_new_tokens"]) for r in history(folder)]
    whole = [(name, rows, 6) for name, rows in SETS.items()]
    assert records == [whole[0], ("gsm8k", 2, 6), *((*r[:2], 3) for r in whole), *whole]
    assert not list(folder.glob("partial_results_*"))
    log = (folder / "training.log").read_text()
    assert log.count("is of another evaluation that was interrupted") == 1
    assert f"{sum(SETS.values())} results are there" in log


def test_one_table_and_one_json_of_all(evaluated, space):
    head, _, *lines = (evaluated / "eval_sets_epoch_2.md").read_text().splitlines()
    assert head.startswith("| set | latents | accuracy | 95% interval | CoT match | new tokens |")
    assert head.endswith("| rows | pass@1 | pass@2 | pass@3 | majority@2 | majority@3 |")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    wanted = [[name, latents] for name in SETS for latents in ("0", "2")]
    assert [row[:2] for row in cells] == wanted
    assert [row[7] for row in cells] == [str(SETS[name]) for name, _ in wanted]
    figures = json.loads((evaluated / "eval_sets_epoch_2.json").read_text())
    assert figures["checkpoint"] == space.values["load_model_path"]
    assert (figures["temperature"], figures["top_p"], figures["seed"]) == (1.0, 0.9, 3)
    for record, row in zip(figures["evaluations"], cells, strict=True):
        name = record.pop("eval_set")
        assert record.pop("path") == space.values["eval_sets"][name]
        assert str(record.pop("forced_latents")) == row[1] == record["latents"]
        rows = results(evaluated, record.pop("results").removesuffix(".jsonl"))
        assert record["rows"] == len(rows) == SETS[name]
        assert record["accuracy"] == sum(r["correct"] for r in rows) / len(rows)
        assert row[2] == f"{record['accuracy']:.1%}" and row[5] == f"{record['new_tokens']:.1f}"
        sampled = Sampled(**record.pop("sampled"))
        assert Evaluation(**record).rows and sampled.pass_at.keys() == {"1", "2", "3"}
    log = (evaluated / "training.log").read_text()
    assert "svamp-1000: epoch 2, stage 1, 0 latents (forced): accuracy" in log and head in log


def test_every_set_is_evaluated_as_by_itself(evaluated, space):
    """By val_path, without samples: the same rows, the same completions."""
    for name, path in space.values["eval_sets"].items():
        alone = dict(eval_sets=None, val_path=path, eval_num_latents=2)
        assert train(space, name=f"alone-{name}", **alone) == 0
        folder = space.run_dir.with_name(f"alone-{name}")
        rows = results(evaluated, f"results_{name}_epoch_2_latents_2")
        assert {len(row.pop("samples")) for row in rows} == {3}
        assert rows == results(folder, "results_epoch_2_latents_2")
        assert not list(folder.glob("*.md")) and not list(folder.glob("partial*"))
        ours, theirs = (
            f / f"results{n}_epoch_2_latents_2.jsonl"
            for f, n in ((evaluated, f"_{name}"), (folder, ""))
        )
        line = compare_files(str(ours), str(theirs))
        assert f"{SETS[name]} rows:" in line and "McNemar p = 1" in line


def test_records_are_not_taken_for_a_runs_validations(evaluated):
    records = history(evaluated)
    assert [(r["kind"], r["eval_set"], r["forced_latents"]) for r in records] == [
        ("eval_set", name, number) for name in SETS for number in (0, 2)
    ]
    assert all(record["sampled"]["num_samples"] == 3 for record in records)


def test_a_folder_with_results_of_sets_only_is_named_as_such(evaluated):
    with pytest.raises(UserError, match="results_gsm8k_epoch_2_latents_0.jsonl"):
        compare_files(str(evaluated), str(evaluated))


def test_samples_of_val_path(space):
    """One set under its old names; as many rows as eval_subset_size says."""
    alone = dict(eval_sets=None, val_path=space.values["eval_sets"]["gsm8k"], eval_num_latents=None)
    assert train(space, name="val", **alone, **SAMPLED, eval_subset_size=2) == 0
    folder = space.run_dir.with_name("val")
    assert [len(row["samples"]) for row in results(folder, "results_epoch_2")] == [3, 3]
    (record,) = history(folder)
    assert record["kind"] == "eval" and record["sampled"]["pass_at"].keys() == {"1", "2", "3"}
    assert "3 samples a row: pass@1" in (folder / "training.log").read_text()


# ------------------------------------------------------------------------------- a kill

KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import run
from engine import evaluation
from engine.partial import PartialResults
calls, add, write = {calls}, PartialResults.add, evaluation.write_results

def die(*args):
    global calls
    calls -= 1
    if calls == 0:
        if {torn}:
            add(*args)
            with open(args[0].path, "r+b") as file:
                file.truncate(os.path.getsize(file.name) - 5)
        os.kill(os.getpid(), signal.SIGKILL)
    return (add if {torn} else write)(*args)

if {torn}:
    PartialResults.add = die
else:
    evaluation.write_results = die
run.main([{config!r}])
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(space, evaluated):
    """SIGKILL in the middle of a line of the samples of the second set, then once more with the
    first of its results complete: what is there is not done again, and all files are those of an
    evaluation that nothing happened to."""
    config = space.yaml(name="killed", **SAMPLED)
    folder = space.run_dir.with_name("killed")
    kept = []
    for calls, torn in ((17, True), (4, False)):
        script = KILL.format(root=str(ROOT), config=str(config), calls=calls, torn=torn)
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ, capture_output=True, timeout=300
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        (path,) = folder.glob("partial_results_*_0.jsonl")
        kept.append(path.read_text().count('"row": '))
        assert not (folder / "eval_sets_epoch_2.json").exists()
    # both numbers of gsm8k, greedy and samples, the greedy ones of svamp-1000 and a row
    assert kept[0] >= 2 * 2 * SETS["gsm8k"] + SETS["svamp-1000"]
    assert kept[1] == 2 * 2 * (SETS["gsm8k"] + SETS["svamp-1000"])
    assert train(space, name="killed", **SAMPLED) == 0
    assert f"{kept[1]} results are there" in (folder / "training.log").read_text()
    assert history_of_samples(folder) == history_of_samples(evaluated)
    names = {path.name for path in evaluated.iterdir()} - {"training.log", "config.yaml"}
    assert names == {path.name for path in folder.iterdir()} - {"training.log", "config.yaml"}
    for name in names - {"metrics.jsonl"}:
        ours, theirs = ((f / name).read_text() for f in (folder, evaluated))
        assert ours == theirs or name.startswith("eval_sets"), name  # which has seconds
    ours, theirs = (without_clocks(f / "eval_sets_epoch_2.json") for f in (folder, evaluated))
    assert ours == theirs


def history_of_samples(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in history(folder)]


def without_clocks(path: Path) -> dict:
    figures = json.loads(path.read_text())
    for record in figures["evaluations"]:
        record.pop("seconds_per_row")
    return figures


# ------------------------------------------------------------------------------- bad input

COMMON = dict(name="x", save_path="x", coconut=True, model_id="x", load_model_path="x")
EVALUATION = dict(COMMON, only_eval=True, eval_sets={"gsm8k": "x"})
TRAINING = dict(COMMON, load_model_path=None, train_path="x", val_path="x")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(EVALUATION, val_path="x"), "eval_sets: stands in place of val_path; set one"),
        (dict(EVALUATION, eval_sets=None), "val_path: validation needs a file with rows"),
        (dict(EVALUATION, eval_sets={}), "eval_sets: {} has no set; give {name: path, ...}"),
        (dict(EVALUATION, eval_sets=["a.json"]), "eval_sets: ['a.json'] is not dict or null"),
        (dict(EVALUATION, eval_sets={"a/b": "x"}), "eval_sets: 'a/b' cannot be a part of file"),
        (dict(EVALUATION, eval_sets={8: "x"}), "eval_sets: 8 cannot be a part of file names"),
        (dict(EVALUATION, eval_sets={"x" * 51: "x"}), "take up to 50 letters, digits, _ and -"),
        (dict(EVALUATION, eval_sets={"a": None}), "eval_sets: a: None is not the path of a file"),
        (dict(EVALUATION, eval_sets={"a": " "}), "eval_sets: a: ' ' is not the path of a file"),
        (dict(EVALUATION, eval_sets={"a": "$NO_SUCH/x"}), "eval_sets: a: '$NO_SUCH/x' names a var"),
        (dict(TRAINING, eval_sets={"a": "x"}), "eval_sets: is for only_eval; training is"),
        (dict(TRAINING, temperature=0.7), "temperature: is for only_eval; training evaluates"),
        (dict(EVALUATION, num_samples=8), "num_samples: 8, but no sample is drawn at temperature"),
        (dict(EVALUATION, top_p=0.9), "top_p: 0.9, but no sample is drawn at temperature: 0; set"),
        (dict(EVALUATION, temperature=1, top_p=0), "top_p: 0.0 is below 0.001"),
        (dict(EVALUATION, temperature=1, top_p=1.1), "top_p: 1.1 is above 1"),
        (dict(EVALUATION, temperature=-1), "temperature: -1.0 is below 0"),
        (dict(EVALUATION, temperature=1, num_samples=0), "num_samples: 0 is below 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_keys_that_could_not_be_meant(values, message):
    with pytest.raises(UserError) as error:
        make_config(values, "test")
    (line,) = error.value.problems
    assert line.startswith("test: ") and message in line


def test_paths_of_sets_are_expanded(monkeypatch, space):
    monkeypatch.setenv("DATA", "/data")
    line = "eval_sets={gsm8k: $DATA/a.json, svamp: ~/b.json}"
    config = load_config(space.yaml(), line)
    assert config.eval_sets == {"gsm8k": "/data/a.json", "svamp": str(Path.home() / "b.json")}


def test_each_bad_set_is_named_before_a_model_is_built(space, capsys, monkeypatch):
    """One line each, all of them together (the file has them by name); no run folder is made."""
    monkeypatch.setattr("run.build_model", lambda inputs: pytest.fail("the model was built"))
    empty, long = space.folder / "empty.json", space.folder / "long.json"
    empty.write_text(json.dumps([{"question": "x", "steps": [], "answer": " "}] * 2))
    long.write_text(json.dumps([{"question": "a b " * 300, "steps": [], "answer": "1"}]))
    good = space.values["eval_sets"]["gsm8k"]
    sets = {"good": good, "gone": "/no/rows.json", "empty": str(empty), "hub": HUB}
    assert train(space, name="bad", eval_sets=sets) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("; ")[0] for line in lines] == [
        f"error: eval_sets: empty: {empty}: all 2 answers (column answer) are empty",
        "error: eval_sets: gone: /no/rows.json: no such file",
        f"error: eval_sets: hub: {HUB}: Couldn't reach 'own/set' on the Hub (OfflineModeIsEnabled)",
    ]
    marker = space.folder / "marker.json"
    marker.write_text(json.dumps([{"question": "<|latent|>", "steps": [], "answer": "1"}]))
    assert train(space, name="bad", eval_sets={"good": good, "odd": str(marker)}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: eval_sets: odd: {marker}: row 0: the text holds a latent")
    assert train(space, name="bad", eval_sets={"good": good, "long": str(long)}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: max_new_tokens: 6 after a prompt of")
    assert line.endswith("(eval_sets: long)")
    assert not space.run_dir.with_name("bad").exists()
