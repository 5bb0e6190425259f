"""engine/gate.py: runs whose stages begin when they can do the one before, killed and continued."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Workspace, tiny_rows
from soak import differences, history, launch, newest_weights, wait_until
from test_loop import killed, log_text, train

from analysis import load
from engine import checkpoint, gate, loop
from engine.checkpoint import find_checkpoints
from engine.evaluation import Evaluator
from engine.logs import Metrics
from engine.preflight import gather_inputs
from loader import load_config
from utils import UserError

# three steps an epoch on 12 of 20 rows, whose answers this model knows after two epochs
GATED = dict(
    advance_at=0.5,
    gate_rows=8,
    num_epochs=5,
    lr=1e-2,
    batch_size_training=2,
    gradient_accumulation_steps=2,
    eval_subset_size=3,
    batch_size_eval=8,
    max_new_tokens=24,
)
STAGES = [0, 0, 1, 2, 2]


def gated_workspace(model_folder: Path, folder: Path) -> Workspace:
    workspace = Workspace(model_folder, folder)
    questions = dict.fromkeys(row["question"] for row in tiny_rows(24, seed=1))
    rows = [
        {"question": question, "steps": ["<<1+1=2>>"] * (number % 3), "answer": "7"}
        for number, question in enumerate([*questions][:20])
    ]
    Path(workspace.values["train_path"]).write_text(json.dumps(rows))
    return workspace


@pytest.fixture
def workspace(model_folder, tmp_path) -> Workspace:
    return gated_workspace(model_folder, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(model_folder, tmp_path_factory) -> Path:
    """The run folder of a training that nothing happened to."""
    workspace = gated_workspace(model_folder, tmp_path_factory.mktemp("undisturbed"))
    assert train(workspace, **GATED) == 0
    return workspace.run_dir


def stages(run_dir: Path) -> list[int]:
    """Of the epochs, by the records of their steps."""
    return [r["stage"] for r in history(run_dir) if r["kind"] == "train" and r["step"] == 1]


def gates(run_dir: Path) -> list[dict]:
    return [r for r in history(run_dir) if r["kind"] == "gate"]


# ------------------------------------------------------------------------------- a run


def test_the_next_stage_begins_when_the_rows_set_aside_say_so(undisturbed):
    """Records, checkpoints, cards and log have the stages of the run."""
    assert stages(undisturbed) == STAGES
    actual = [(r["epoch"], r["stage"], r["next_stage"], r["rows"]) for r in gates(undisturbed)]
    assert actual == [(1, 0, 0, 8), (2, 0, 1, 8), (3, 1, 2, 8)]  # at the last stage none
    assert [r["accuracy"] >= 0.5 for r in gates(undisturbed)] == [False, True, True]
    kinds = [r["kind"] for r in history(undisturbed) if r["epoch"] in (2, 4)]
    assert kinds == ["train"] * 3 + ["gate", "eval"] + ["train"] * 3 + ["eval"]
    known = [c.state().stages for c in find_checkpoints(undisturbed)]
    assert known == [[*STAGES, 2][: epoch + 1] for epoch in range(1, 6)]
    for epoch, stage in enumerate(STAGES, start=1):
        card = (undisturbed / f"checkpoint_{epoch}" / "README.md").read_text()
        assert f"- stage: {stage}, with {2 * stage} latents\n" in card
        results = (undisturbed / f"results_epoch_{epoch}.jsonl").read_text().splitlines()
        assert {json.loads(line)["num_latents"] for line in results} == {2 * stage}
    log = (undisturbed / "training.log").read_text()
    assert "rows      20 of " in log and " dropped, 8 set aside for advance_at\n" in log
    assert "epoch 2, stage 0: accuracy 100.0% of the 8 rows set aside (advance_at 50.0%), " in log


def test_check_prints_what_is_known_before(workspace, capsys):
    assert train(workspace, "--check", **GATED, max_epochs_per_stage=3) == 0
    printed = capsys.readouterr().out
    assert " dropped, 8 set aside for advance_at\n" in printed
    assert "\n1-3       1      2              1\nthe rest  2      4 " in printed
    assert "the next stage begins at 50.0% on 8 training rows set aside" in printed


OTHERS = {
    "no_thoughts": (dict(no_thoughts=True), STAGES),
    "pause as thought": (dict(latent_input="pause"), STAGES),
    "without validation": (dict(skip_validation=True, val_path=None), STAGES),
    "one stage more": (dict(schedule="paper", num_epochs=6), [0, 0, 1, 2, 3, 3]),
    "at least two epochs": (dict(epochs_per_stage=2), [0, 0, 1, 1, 2]),
    "never right, at most one": (dict(max_epochs_per_stage=1, max_new_tokens=1), [0, 1, 2, 2, 2]),
    "never right, no limit": (dict(max_new_tokens=1), [0] * 5),
    "debug": (dict(debug=True), STAGES),
}


@pytest.mark.parametrize("other", OTHERS)
def test_every_recipe_with_stages_has_the_gate(workspace, other):
    changes, expected = OTHERS[other]
    assert train(workspace, **{**GATED, **changes}) == 0
    assert stages(workspace.run_dir) == expected


@pytest.mark.parametrize(
    "reset, steps",
    [(True, [{3}, {6}, {3}, {3}, {6}]), ("epoch", [{3}] * 5), (False, [{3}, {6}, {9}, {12}, {15}])],
)
def test_reset_optimizer_goes_by_the_stages_of_the_run(workspace, monkeypatch, reset, steps):
    seen, original = [], loop.save

    def look(training, *args):
        seen.append({int(s["step"]) for s in training.optimizer.state_dict()["state"].values()})
        original(training, *args)

    monkeypatch.setattr(loop, "save", look)
    assert train(workspace, reset_optimizer=reset, **GATED) == 0
    assert seen == steps


# ------------------------------------------------------------------------------- the rows


def inputs_of(workspace, **changes):
    return gather_inputs(load_config(workspace.yaml(**{**GATED, **changes})))


def test_the_gate_asks_with_the_latents_and_steps_of_the_stage(workspace, monkeypatch):
    """All rows at the run's own stage, though those of training are mixed. The accuracy does not
    tell: every row has the same answer, which this model gives with any number of latents."""
    keys = GATED | dict(stage_mixing="linear", schedule="paper", max_epochs_per_stage=1)
    keys |= dict(num_epochs=4, skip_validation=True, val_path=None)
    asked, original = [], Evaluator.evaluate

    def look(self, model, dataset, *args):
        asked.append(dataset)
        return original(self, model, dataset, *args)

    monkeypatch.setattr(Evaluator, "evaluate", look)
    assert train(workspace, **keys) == 0
    assert len(asked) == 3  # at the last stage nothing is asked
    num_steps = inputs_of(workspace, **keys).gate.num_steps
    assert {*num_steps} == {0, 1, 2}
    for stage, data in enumerate(asked):
        assert data.stages.tolist() == [stage] * 8
        assert data.num_latents.tolist() == [2 * stage] * 8
        assert data.num_skipped.tolist() == np.minimum(num_steps, stage).tolist()
    assert len({*inputs_of(workspace, **keys).train_dataset(3, 2).stages}) == 3


def test_rows_set_aside_are_not_trained_on(workspace):
    inputs = inputs_of(workspace)
    train_rows, gate_rows = inputs.train.numbers.tolist(), inputs.gate.numbers.tolist()
    assert len(gate_rows) == 8 and sorted(train_rows + gate_rows) == list(range(20))
    rows = json.loads(Path(workspace.values["train_path"]).read_text())
    for part in (inputs.train, inputs.gate):
        assert part.rows == [rows[number] for number in part.numbers]
        sample = inputs.tokenizer.decode(part.row_tokens(3))
        assert sample.startswith(rows[part.numbers[3]]["question"])
    steps, dropped = inputs.plan_epoch(inputs.train_dataset(1), 1, 1)
    assert sorted(inputs.train.numbers[row] for step in steps for row in step) == train_rows
    assert dropped == 0
    assert inputs_of(workspace).gate.numbers.tolist() == gate_rows
    assert inputs_of(workspace, seed=1).gate.numbers.tolist() != gate_rows
    assert len(inputs_of(workspace, advance_at=None).train) == 20


def test_what_a_seed_sets_aside_stays_the_same(workspace):
    """Of files in which no question comes twice: figures were published of such runs."""
    drawn = {seed: inputs_of(workspace, seed=seed).gate.numbers.tolist() for seed in (0, 1)}
    assert drawn == {0: [1, 6, 9, 10, 12, 14, 17, 18], 1: [0, 1, 2, 4, 5, 7, 11, 15]}
    short = inputs_of(workspace, max_seq_length=44, gate_rows=2)
    assert short.gate.numbers.tolist() == [1, 14] and short.too_long == 6
    assert short.train.numbers.tolist() == [0, 2, 3, 6, 7, 8, 9, 10, 12, 13, 15, 18]


def test_no_question_of_the_gate_is_trained_on(workspace, capsys):
    """With every row listed twice, six of eight rows set aside had their question in the training
    part too: the gate then measured what was learned by heart."""
    path = Path(workspace.values["train_path"])
    rows = json.loads(path.read_text()) * 2
    path.write_text(json.dumps(rows))
    for seed in range(5):
        inputs = inputs_of(workspace, seed=seed)
        asked = {rows[number]["question"] for number in inputs.gate.numbers}
        trained = [rows[number]["question"] for number in inputs.train.numbers]
        assert asked.isdisjoint(trained)
        assert len(inputs.gate) == len(asked) == inputs.copies == 8
        assert len(trained) == 2 * len({*trained}) == 24 and inputs.too_long == 0
    assert train(workspace, "--check", **GATED) == 0
    told = "dropped, 8 set aside for advance_at, 8 with the same questions left out\n"
    printed = capsys.readouterr().out
    assert "rows      40 of " in printed and ", 0 longer than " in printed and told in printed


def test_rows_that_ask_the_same_are_too_few_to_set_some_aside(workspace):
    path = Path(workspace.values["train_path"])
    path.write_text(json.dumps(json.loads(path.read_text())[:8] * 3))
    with pytest.raises(UserError, match="gate_rows: 8 set aside leave none of the 8 rows"):
        inputs_of(workspace)
    assert len(inputs_of(workspace, gate_rows=7).train) == 3


def test_every_epoch_has_the_same_steps_whenever_its_stage_begins(workspace):
    """A row that is too long at any stage is in none: the length of the schedule of learning
    rates is known from the start."""
    whole = inputs_of(workspace, advance_at=None)
    lengths = np.array([whole.train_dataset(1, stage).total_length for stage in range(3)])
    limit = int(np.median(lengths))
    inputs = inputs_of(workspace, max_seq_length=limit, gate_rows=2)
    fitting = np.flatnonzero((lengths <= limit).all(0)).tolist()
    assert 2 < len(fitting) < (lengths <= limit).sum(1).max()  # else nothing is tested
    assert sorted([*inputs.train.numbers, *inputs.gate.numbers]) == fitting
    for stage in range(3):
        steps, dropped = inputs.plan_epoch(inputs.train_dataset(2, stage), 2, 1)
        assert sum(map(len, steps)) == len(fitting) - 2 and dropped == 20 - len(fitting)


def test_too_few_rows_to_set_some_aside(workspace):
    with pytest.raises(UserError, match="gate_rows: 20 set aside leave none of the 20 rows"):
        inputs_of(workspace, gate_rows=20)
    with pytest.raises(UserError, match="max_seq_length: all rows of .* longer than 20 tokens at"):
        inputs_of(workspace, max_seq_length=20)  # no number of rows set aside would do


def test_prompts_of_the_gate_must_have_room(workspace):
    with pytest.raises(UserError, match="max_new_tokens: 500"):
        inputs_of(workspace, max_new_tokens=500, skip_validation=True)


def test_a_bad_step_names_rows_as_the_file_does(workspace, monkeypatch):
    original = loop.optimizer_step

    def ill(training, *args):
        next(training.model.parameters()).grad[0, 0] = float("inf")
        return original(training, *args)

    monkeypatch.setattr(loop, "optimizer_step", ill)
    assert train(workspace, **{**GATED, "num_epochs": 1}) == 0
    inputs = inputs_of(workspace)
    (first, *_), _ = inputs.plan_epoch(inputs.train_dataset(1), 1, 1)
    assert f"rows {sorted(inputs.train.numbers[first].tolist())}" in log_text(workspace)


# ------------------------------------------------------------------------------- resume

# an epoch does three steps with a save after the second, a save, the gate, the validation; the
# stage changes after epochs 2 and 3
DEATHS = {
    "in the generation of the gate": (Evaluator, "evaluate", 3, False),
    "before its record": (gate, "broadcast_object", 1, False),
    "after its record": (gate, "broadcast_object", 2, True),
    "between gate and validation": (loop, "validation_accuracy", 2, False),
    "before the decision is kept": (loop, "write_whole", 2, False),
    "after the decision is kept": (loop, "write_whole", 2, True),
    "in the first step of the new stage": (loop, "optimizer_step", 7, False),
    "within the new stage's first epoch": (loop, "optimizer_step", 9, False),
    "before the save of that epoch": (loop, "save_checkpoint", 6, False),
    "after the save of that epoch": (loop, "save", 6, True),
    "in the save of an epoch": (checkpoint, "get_model_state_dict", 4, True),
    "after the record of the last gate": (Metrics, "write", 14, True),
    "in the epoch after it": (loop, "optimizer_step", 11, True),
}


@pytest.mark.parametrize("death", DEATHS)
def test_killed_and_continued_is_as_never_killed(workspace, undisturbed, monkeypatch, death):
    """Weights bit-identical, every record there once, the stages of the epochs the same."""
    settings = dict(save_every_steps=2, **GATED)
    killed(monkeypatch, workspace, *DEATHS[death], **settings)
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, undisturbed) == []
    assert stages(workspace.run_dir) == STAGES


@pytest.mark.parametrize(
    "owner, function, call", [(Evaluator, "evaluate", 3), (loop, "optimizer_step", 8)]
)
def test_stopped_by_a_signal_and_continued(
    workspace, undisturbed, monkeypatch, capsys, owner, function, call
):
    """In a gate, where all else is saved, and within the first epoch of the new stage."""
    original, calls = getattr(owner, function), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, interrupted)
        assert train(workspace, **GATED) == 3
    capsys.readouterr()
    assert train(workspace, "--check", **GATED) == 0
    before_the_gate = "or the one after it, as the gate decides first" in capsys.readouterr().out
    assert before_the_gate == (owner is Evaluator)
    assert train(workspace, **GATED) == 0
    assert differences(workspace.run_dir, undisturbed) == []


def test_killed_where_nothing_is_validated(workspace, monkeypatch):
    settings = {**GATED, "skip_validation": True, "lr_schedule": "cosine", "num_epochs": 4}
    assert train(workspace, name="whole", **settings) == 0
    killed(monkeypatch, workspace, gate, "broadcast_object", 2, True, **settings)
    killed(monkeypatch, workspace, loop, "optimizer_step", 2, True, **settings)
    killed(monkeypatch, workspace, loop, "write_whole", 2, True, **settings)
    assert train(workspace, **settings) == 0
    whole = workspace.run_dir.with_name("whole")
    assert history(workspace.run_dir) == history(whole)
    ours, theirs = newest_weights(workspace.run_dir), newest_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_more_epochs_than_at_first(workspace, undisturbed):
    """The gate after the last epoch says how a longer run goes on."""
    assert train(workspace, **{**GATED, "num_epochs": 2}) == 0
    assert train(workspace, **{**GATED, "num_epochs": 3}) == 0
    assert train(workspace, **GATED) == 0
    assert "so far the run has stage 0 from epoch 1, 1 from epoch 3 on" in log_text(workspace)
    assert stages(workspace.run_dir) == STAGES
    assert gates(workspace.run_dir) == gates(undisturbed)


def test_another_gate_is_another_run(workspace, capsys):
    assert train(workspace, **{**GATED, "num_epochs": 1}) == 0
    others = [dict(advance_at=0.6), dict(gate_rows=4), dict(max_epochs_per_stage=9)]
    for changes in (*others, dict(stage_mixing="linear"), dict(latent_growth="one")):
        assert train(workspace, **{**GATED, **changes}) == 2
        assert f"{next(iter(changes))}: " in capsys.readouterr().err


# ------------------------------------------------------------------------------- other runs


@pytest.mark.parametrize("epoch", [2, 3, 5])
@pytest.mark.parametrize("gated", [True, False])
def test_an_evaluation_takes_the_stage_from_the_checkpoint(workspace, undisturbed, epoch, gated):
    """Also where its own config knows of no gate."""
    keys = dict(GATED, only_eval=True, load_model_path=str(undisturbed / f"checkpoint_{epoch}"))
    keys |= {} if gated else dict(advance_at=None)
    assert train(workspace, name="eval", **keys) == 0
    name = f"results_epoch_{epoch}.jsonl"
    ours = (workspace.run_dir.with_name("eval") / name).read_text()
    assert ours == (undisturbed / name).read_text()


def test_weights_that_know_no_stage_are_evaluated_by_a_schedule_only(
    workspace, undisturbed, capsys
):
    path = shutil.copy(undisturbed / "checkpoint_3/model.safetensors", workspace.folder)
    keys = dict(GATED, only_eval=True, load_model_path=str(path), resume=3)
    assert train(workspace, name="eval", **keys) == 2
    assert "does not say at which stage it was trained" in capsys.readouterr().err
    assert train(workspace, name="eval", **keys, eval_num_latents=2) == 2  # of which steps are left
    assert train(workspace, name="eval", **{**keys, "advance_at": None}) == 0


def test_a_run_from_a_checkpoint_with_stages_goes_on_with_them(workspace, undisturbed):
    """From the one after epoch 2 at stage 1; where the checkpoint knows none, at the stage of the
    fewest epochs that the schedule allows."""
    path = undisturbed / "checkpoint_2"
    assert train(workspace, **GATED, load_model_path=str(path), resume=2) == 0
    assert stages(workspace.run_dir) == [1, 2, 2]
    assert find_checkpoints(workspace.run_dir)[-1].state().stages == [0, 0, 1, 2, 2, 2]
    file = shutil.copy(path / "model.safetensors", workspace.folder)
    keys = GATED | dict(load_model_path=str(file), resume=2, epochs_per_stage=2, num_epochs=4)
    assert train(workspace, name="file", **keys) == 0
    assert stages(workspace.run_dir.with_name("file")) == [1, 1]
    log = (workspace.run_dir.with_name("file") / "training.log").read_text()
    assert "\nstage     epoch 3: stage 1, 2 latents, 1 steps skipped\n" in log
    assert "\nso far the run has stage 0 from epoch 1, 1 from epoch 3 on\n" in log


PLAIN = GATED | dict(advance_at=None)
COT = dict(coconut=False, cot=True)


@pytest.mark.parametrize("plain", [dict(schedule="paper", epochs_per_stage=2), COT])
def test_a_run_from_a_checkpoint_of_a_schedule_begins_at_its_stage(workspace, plain):
    """It began where its own schedule would be by then: stage 1 never ran, and the first gate
    came after stage 2."""
    assert train(workspace, name="plain", **{**PLAIN, **plain, "num_epochs": 2}) == 0
    path = str(workspace.run_dir.with_name("plain") / "checkpoint_2")
    assert train(workspace, **{**GATED, "num_epochs": 4}, load_model_path=path, resume=2) == 0
    assert stages(workspace.run_dir) == [0, 1]
    assert [(r["epoch"], r["stage"], r["next_stage"]) for r in gates(workspace.run_dir)] == [
        (3, 0, 1),
        (4, 1, 2),
    ]
    assert find_checkpoints(workspace.run_dir)[-1].state().stages == [0, 0, 0, 1, 2]


def test_which_stages_a_checkpoint_of_a_schedule_knows(workspace):
    """Those of its own epochs, however many resume says."""
    plain = dict(schedule="paper", epochs_per_stage=2, num_epochs=3)
    assert train(workspace, name="plain", **PLAIN | plain) == 0
    whole = workspace.run_dir.with_name("plain") / "checkpoint_3"
    part = shutil.copytree(whole, whole.with_name("checkpoint_3_step_1"))  # within epoch 3
    for path, resume, known in [
        (whole, 3, (0, 0, 1)),
        (whole, 7, (0, 0, 1)),
        (whole, 1, (0, 0)),
        (whole, 0, ()),
        (part, 2, (0, 0, 1)),
    ]:
        keys = dict(load_model_path=str(path), resume=resume, num_epochs=9)
        assert inputs_of(workspace, **keys).start.stages == known, (path, resume)


def test_nothing_of_a_checkpoint_counts_where_no_epoch_is_done(workspace, undisturbed):
    """resume=0 was refused with the advice to set resume=0."""
    path = str(undisturbed / "checkpoint_4")
    inputs = inputs_of(workspace, load_model_path=path, resume=0, latent_growth="all")
    assert (inputs.start.stages, inputs.stage(1)) == ((), 0)


@pytest.mark.parametrize(
    "plain, stage",
    [
        (dict(schedule="paper", num_epochs=4), "stage 3, 4 latents, all steps skipped"),
        (dict(no_thoughts=True, num_epochs=1), "stage 1, 0 latents, 1 steps skipped"),
    ],
)
def test_stages_of_another_schedule_are_not_taken_over(workspace, capsys, plain, stage):
    assert train(workspace, name="plain", **PLAIN | plain) == 0
    done = plain["num_epochs"]
    path = str(workspace.run_dir.with_name("plain") / f"checkpoint_{done}")
    assert train(workspace, **GATED, load_model_path=path, resume=done) == 2
    assert f"checkpoint_{done} ends with {stage}, which is no stage of" in capsys.readouterr().err


def test_a_gated_config_evaluates_a_checkpoint_of_a_schedule_at_its_stage(workspace):
    """It was refused, or the stage was guessed from the number of epochs."""
    assert train(workspace, name="plain", **PLAIN | dict(epochs_per_stage=2, num_epochs=3)) == 0
    plain = workspace.run_dir.with_name("plain")
    keys = dict(GATED, only_eval=True, load_model_path=str(plain / "checkpoint_3"))
    assert train(workspace, **keys) == 0
    ours = (workspace.run_dir / "results_epoch_3.jsonl").read_text()
    assert ours == (plain / "results_epoch_3.jsonl").read_text()


@pytest.mark.parametrize("change", [dict(c_thought=1), dict(max_latent_stage=1)])
def test_stages_of_another_curriculum_are_not_taken_over(workspace, undisturbed, capsys, change):
    path = str(undisturbed / "checkpoint_4")
    keys = dict(GATED, load_model_path=path, num_epochs=6) | change
    assert train(workspace, **keys, resume=4) == 2
    assert "checkpoint_4 ends with stage 2, 4 latents" in capsys.readouterr().err
    assert train(workspace, **{**keys, "num_epochs": 1}, resume=0) == 0
    assert stages(workspace.run_dir) == [0]


def test_debug_leaves_rows_beside_the_gate(workspace):
    path = Path(workspace.values["train_path"])
    rows = json.loads(path.read_text()) * 30
    rows = [{**row, "question": f"{n}. {row['question']}"} for n, row in enumerate(rows)]
    path.write_text(json.dumps(rows))
    inputs = inputs_of(workspace, debug=True, gate_rows=512)
    assert (len(inputs.gate), len(inputs.train), len(inputs.validation)) == (512, 88, 3)


def test_debug_leaves_rows_beside_a_gate_whose_questions_come_often(workspace):
    path = Path(workspace.values["train_path"])
    path.write_text(json.dumps([row for row in json.loads(path.read_text()) for _ in range(100)]))
    inputs = inputs_of(workspace, debug=True, gate_rows=12)
    assert (len(inputs.gate), inputs.copies) == (12, 1188)


def test_a_schedule_by_epochs_does_not_take_over_the_stages_of_a_gate(workspace, undisturbed):
    path = str(undisturbed / "checkpoint_2")
    keys = {**GATED, "advance_at": None, "load_model_path": path, "resume": 2, "num_epochs": 3}
    assert train(workspace, **keys) == 0
    assert stages(workspace.run_dir) == [2]
    assert "\nstage     epoch 3: stage 2, 4 latents, 2 steps skipped\n" in log_text(workspace)


@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_a_loaded_model_is_at_the_stage_of_its_checkpoint(undisturbed, epoch):
    model = load(undisturbed / f"checkpoint_{epoch}", device="cpu")
    (answer,) = model.answer(["Tom has 3 plums. How many plums does Tom have?"])
    assert answer.num_latents == 2 * STAGES[epoch - 1]


# ------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_two_processes_have_the_stages_of_one(workspace, undisturbed):
    """The main one decides for all; killed runs of two are test_end_to_end.py's."""
    keys = {**GATED, "gradient_accumulation_steps": 1, "num_epochs": 4}  # as many rows a step
    log = workspace.folder / "two.log"
    process = launch(ROOT / "run.py", workspace.yaml(**keys), log=log)
    assert not wait_until(lambda: False, process) and process.returncode == 0, log.read_text()
    assert stages(workspace.run_dir) == STAGES[:4]
    assert [r["next_stage"] for r in gates(workspace.run_dir)] == [0, 1, 2]
    assert find_checkpoints(workspace.run_dir)[-1].state().stages == [*STAGES[:4], 2]
