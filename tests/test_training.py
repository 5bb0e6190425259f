"""run.py in the process: all stages, exact resume from any instant, guards, evaluation."""

import gc
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import run
import training
from checkpoint import find_checkpoints
from conftest import Workspace, family_config
from soak import differences, history, newest_weights
from utils import Metrics

SIX_STEPS = dict(batch_size_training=2, gradient_accumulation_steps=2)  # an epoch


class Killed(BaseException):
    """Imitates SIGKILL: nothing in the program catches it."""


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run takes Ctrl-C and SIGTERM for itself; give them back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def undisturbed(model_folder, tmp_path_factory) -> Path:
    """The run folder of a training that nothing happened to; save_every_steps not even set."""
    workspace = Workspace(model_folder, tmp_path_factory.mktemp("undisturbed"))
    assert train(workspace, **SIX_STEPS) == 0
    return workspace.run_dir


def train(workspace, *args, name="run", **changes) -> int:
    return run.main([str(workspace.yaml(name=name, **changes)), *args])


def killed(monkeypatch, workspace, owner, function: str, call: int, after=False, **changes):
    """Train until the call-th call of a function, and die there: before or after its work."""
    original, calls = getattr(owner, function), 0

    def deadly(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if after or calls < call else None
        if calls == call:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, deadly)
        try:
            train(workspace, **changes)
        except Killed:
            gc.collect()  # a killed process lets go of the lock
            return
    pytest.fail(f"{function} was called {calls} times only")


def log_text(workspace) -> str:
    return (workspace.run_dir / "training.log").read_text()


def names(run_dir: Path) -> list[str]:
    return [checkpoint.path.name for checkpoint in find_checkpoints(run_dir)]


# ------------------------------------------------------------------------------- all stages


def test_all_stages_then_evaluation(undisturbed):
    """Three epochs, three stages, six steps each; every epoch evaluated and saved."""
    records = history(undisturbed)
    assert [r["kind"] for r in records] == (["train"] * 6 + ["eval"]) * 3
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["global_step"] for r in steps] == list(range(1, 19))
    assert [(r["epoch"], r["stage"], r["step"]) for r in steps] == [
        (epoch, min(epoch, 2), step) for epoch in (1, 2, 3) for step in range(1, 7)
    ]
    assert steps[-1]["samples_seen"] == 72 and steps[5]["samples_seen"] == 24
    assert all(r["grad_norm"] > 0 and r["loss"] > 0 for r in steps)
    assert names(undisturbed) == ["checkpoint_1", "checkpoint_2", "checkpoint_3"]
    for epoch, latents in ((1, 2), (2, 4), (3, 4)):
        text = (undisturbed / f"results_epoch_{epoch}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["row"] for row in rows] == list(range(6))
        assert {row["num_latents"] for row in rows} == {latents}
    examples = (undisturbed / "validation_examples.txt").read_text()
    assert examples.count("row 0: ") == 3 and "epoch 3, stage 2" in examples
    log = (undisturbed / "training.log").read_text()
    assert "epoch 1: stage 1, 2 latents, 1 steps skipped, 6 steps, 0 rows longer" in log
    assert "2 x 2 accumulated x 1 processes = 4 rows per optimizer step" in log


def test_training_learns(undisturbed):
    losses = [r["loss"] for r in history(undisturbed) if r["kind"] == "train"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_finished_epochs_are_not_repeated(workspace):
    assert train(workspace, num_epochs=1) == 0
    before = {p.name: p.read_bytes() for p in workspace.run_dir.glob("*.*") if p.suffix != ".log"}
    inode = (workspace.run_dir / "checkpoint_1" / "model.safetensors").stat().st_ino
    assert train(workspace, num_epochs=1) == 0
    after = {p.name: p.read_bytes() for p in workspace.run_dir.glob("*.*") if p.suffix != ".log"}
    assert before == after
    assert inode == (workspace.run_dir / "checkpoint_1" / "model.safetensors").stat().st_ino


@pytest.mark.parametrize("method", ["cot", "no_cot", "no_thoughts"])
def test_other_methods_train_and_resume(workspace, method):
    keys = {"coconut": None, method: True}
    assert train(workspace, num_epochs=1, **keys) == 0
    assert train(workspace, num_epochs=2, **keys) == 0
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2"]


def test_no_thoughts_wins_over_coconut_and_resumes(workspace):
    """The checkpoint's config says coconut: True as well, but its model has no markers."""
    assert train(workspace, no_thoughts=True, num_epochs=1) == 0
    assert train(workspace, no_thoughts=True, num_epochs=2) == 0


def test_workers_do_not_change_the_weights(workspace, undisturbed):
    assert train(workspace, num_workers=2, **SIX_STEPS) == 0
    assert differences(workspace.run_dir, undisturbed) == []


def test_saving_does_not_change_the_weights(workspace, undisturbed):
    assert train(workspace, save_every_steps=1, keep_checkpoints=1, **SIX_STEPS) == 0
    assert differences(workspace.run_dir, undisturbed) == []


# ------------------------------------------------------------------------------- exact resume


def test_more_epochs_than_at_first(workspace, undisturbed):
    for epochs in (1, 2, 3):
        assert train(workspace, num_epochs=epochs, **SIX_STEPS) == 0
    assert differences(workspace.run_dir, undisturbed) == []


INSTANTS = {
    "before the first checkpoint": (training, "optimizer_step", 1, True),
    "in the second micro-batch": (training, "forward_backward", 6, False),
    "between step and record": (training, "optimizer_step", 9, True),
    "after a record": (Metrics, "write", 10, True),
    "before a save": (training, "save_checkpoint", 3, False),
    "after a save, before pruning": (training, "prune", 3, False),
    "after the save of an epoch": (training, "save", 3, True),
    "before an evaluation": (training, "validate", 1, False),
    "in an evaluation": (training, "evaluate", 2, False),
    "before the examples": (training, "write_results", 2, False),
    "after the examples": (training, "write_results", 2, True),
    "after the evaluation's record": (training, "generate_and_judge", 2, True),
    "after the evaluation": (training, "write_whole", 2, True),
    "after the last epoch's save": (training, "save", 9, True),
    "after the last evaluation's record": (training, "generate_and_judge", 3, True),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_and_continued_is_as_never_killed(workspace, undisturbed, monkeypatch, instant):
    """Weights bit-identical, every record and every example there exactly once."""
    settings = dict(save_every_steps=2, **SIX_STEPS)
    killed(monkeypatch, workspace, *INSTANTS[instant], **settings)
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, undisturbed) == []


def test_killed_many_times(workspace, undisturbed, monkeypatch):
    """Five optimizer steps at a time."""
    settings = dict(save_every_steps=1, **SIX_STEPS)
    for _ in range(3):
        killed(monkeypatch, workspace, training, "optimizer_step", 6, **settings)
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, undisturbed) == []


@pytest.fixture(scope="module")
def gpt2_folder(tokenizer_folder, tmp_path_factory) -> Path:
    """GPT-2 with dropout: its training draws random numbers. Its vocabulary must grow."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    config = family_config("gpt2", len(tokenizer))
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


VARIANTS = {
    "reset_optimizer": dict(reset_optimizer=True),
    "cosine": dict(lr_schedule="cosine", warmup_steps=4, reset_optimizer=True),
    "linear": dict(lr_schedule="linear", warmup_steps=2),
    "uniform_prob": dict(uniform_prob=0.5, pad_latent_to_max=False),
    "bf16": dict(bf16=True),
    "bf16, plain adamw": dict(bf16=True, optimizer="adamw"),
    "clipping, decay": dict(max_grad_norm=0.5, weight_decay=0.1),
    "from_scratch": dict(from_scratch=True, seed=7),
    "paper": dict(schedule="paper", num_epochs=4),
    "group of rows uneven": dict(batch_size_training=5, gradient_accumulation_steps=1),
    "dropout": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact_with(workspace, gpt2_folder, monkeypatch, variant):
    """Killed within epoch 2 and at the end of it."""
    settings = {**SIX_STEPS, "save_every_steps": 2, **VARIANTS[variant]}
    if variant == "dropout":
        settings["model_id"] = str(gpt2_folder)
    assert train(workspace, name="whole", **settings) == 0
    killed(monkeypatch, workspace, training, "optimizer_step", 9, after=True, **settings)
    killed(monkeypatch, workspace, training, "save", 2, after=True, **settings)
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, workspace.run_dir.with_name("whole")) == []


def test_resume_of_a_later_start(workspace, monkeypatch):
    """`resume: 1` in a fresh run folder: one epoch counts as done, here and after a kill; the
    length of the learning rate schedule is that of the epochs that are really trained."""
    settings = dict(resume=1, lr_schedule="linear", save_every_steps=2, **SIX_STEPS)
    assert train(workspace, name="whole", **settings) == 0
    whole = workspace.run_dir.with_name("whole")
    assert [r["epoch"] for r in history(whole)] == [2] * 7 + [3] * 7
    killed(monkeypatch, workspace, training, "optimizer_step", 9, **settings)
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, whole) == []


def test_sigterm_ends_the_step_saves_and_says_so(workspace, undisturbed, monkeypatch):
    """Exit code 3, a checkpoint of the very step, and the same command goes on."""
    original = training.forward_backward

    def interrupted(this, *args):
        if this.state["global_step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        original(this, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "forward_backward", interrupted)
        # two signals would end it at once: the second micro-batch must not send another
        assert train(workspace, batch_size_training=4, gradient_accumulation_steps=1) == 3
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2_step_3"]
    assert len(history(workspace.run_dir)) == 6 + 1 + 3
    assert "all is saved" in log_text(workspace)
    assert train(workspace, batch_size_training=4, gradient_accumulation_steps=1) == 0
    whole = dict(name="whole", batch_size_training=4, gradient_accumulation_steps=1)
    assert train(workspace, **whole) == 0
    assert differences(workspace.run_dir, workspace.run_dir.with_name("whole")) == []


def test_sigterm_in_the_last_step_of_an_epoch(workspace, undisturbed, monkeypatch):
    original = training.optimizer_step

    def interrupted(this, *args):
        if this.state["global_step"] == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(this, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "optimizer_step", interrupted)
        assert train(workspace, **SIX_STEPS) == 3
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2"]
    assert train(workspace, **SIX_STEPS) == 0
    assert differences(workspace.run_dir, undisturbed) == []


def test_a_file_of_metrics_that_lost_its_end_gets_no_zeros(workspace):
    """After a power cut metrics.jsonl may be shorter than the checkpoint remembers; truncating
    it to that size would fill it with zero bytes."""
    assert train(workspace, num_epochs=1, **SIX_STEPS) == 0
    path = workspace.run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert train(workspace, num_epochs=2, **SIX_STEPS) == 0
    assert b"\0" not in path.read_bytes()


def test_a_stray_folder_in_the_way_does_not_cost_the_epoch(workspace):
    """A folder checkpoint_1 that is no checkpoint, an unfinished copy, say: either an error
    before the training or out of the way, but no crash after an epoch's work."""
    (workspace.run_dir / "checkpoint_1").mkdir(parents=True)
    (workspace.run_dir / "checkpoint_1" / "model.safetensors").write_bytes(b"half")
    code = train(workspace, num_epochs=1, **SIX_STEPS)
    assert code in (0, 2)
    if code == 0:
        assert names(workspace.run_dir) == ["checkpoint_1"]
    else:
        assert not (workspace.run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("change", [
    dict(batch_size_training=3), dict(gradient_accumulation_steps=1), dict(max_seq_length=70),
])
def test_another_division_of_the_epoch_is_refused(workspace, monkeypatch, capsys, change):
    """Rows of the steps already done would be seen twice, others never."""
    settings = dict(save_every_steps=2, **SIX_STEPS)
    killed(monkeypatch, workspace, training, "optimizer_step", 3, **settings)
    assert train(workspace, **{**settings, **change}) == 2
    assert next(iter(change)) in capsys.readouterr().err


def test_the_same_rows_in_other_micro_batches_go_on(workspace, undisturbed, monkeypatch):
    settings = dict(save_every_steps=2, batch_size_training=2, gradient_accumulation_steps=2)
    killed(monkeypatch, workspace, training, "optimizer_step", 9, **settings)
    settings.update(batch_size_training=4, gradient_accumulation_steps=1)
    assert train(workspace, **settings) == 0
    ours, theirs = history(workspace.run_dir), history(undisturbed)
    assert [r["global_step"] for r in ours] == [r["global_step"] for r in theirs]
    losses = [[r["loss"] for r in records] for records in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_other_training_rows_are_refused(workspace, capsys):
    """Resuming on changed data would be another training under the old one's name."""
    assert train(workspace, num_epochs=1, **SIX_STEPS) == 0
    path = Path(workspace.values["train_path"])
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    assert train(workspace, num_epochs=2, **SIX_STEPS) == 2
    assert "train_path" in capsys.readouterr().err


def test_resume_takes_the_learning_rate_of_the_config_or_refuses(workspace):
    """lr=... on the command line of a continued run must not be ignored in silence."""
    assert train(workspace, num_epochs=1, lr=1e-3, **SIX_STEPS) == 0
    code = train(workspace, num_epochs=2, lr=1e-4, **SIX_STEPS)
    rates = {r["lr"] for r in history(workspace.run_dir) if r["kind"] == "train" and r["epoch"] == 2}
    assert code == 2 or rates == {1e-4}


# ------------------------------------------------------------------------------- schedules


def test_learning_rates(workspace):
    """Two steps of warm-up, then a straight line to zero over all 18 steps."""
    assert train(workspace, lr_schedule="linear", warmup_steps=2, **SIX_STEPS) == 0
    rates = [r["lr"] for r in history(workspace.run_dir) if r["kind"] == "train"]
    expected = [0.0, 0.5e-3] + [1e-3 * (18 - step) / 16 for step in range(2, 18)]
    assert rates == pytest.approx(expected)


def test_reset_optimizer_forgets_at_a_change_of_stage_only(workspace, undisturbed):
    """Stages 1, 2, 2: epoch 1 is the same with and without, epoch 2 is not."""
    assert train(workspace, reset_optimizer=True, **SIX_STEPS) == 0
    ours = [r["loss"] for r in history(workspace.run_dir) if r["kind"] == "train"]
    theirs = [r["loss"] for r in history(undisturbed) if r["kind"] == "train"]
    assert ours[:7] == theirs[:7]  # the first forward of epoch 2 precedes its first update
    assert ours[7] != theirs[7]
    counts = []
    for epoch in (1, 2, 3):
        folder = workspace.run_dir.with_name(f"to_{epoch}")
        code = train(workspace, name=folder.name, reset_optimizer=True, num_epochs=epoch,
                     **SIX_STEPS)
        assert code == 0
        counts.append(adam_steps(folder))
    assert counts == [6, 6, 12]


def adam_steps(run_dir: Path) -> int:
    """The number of updates that the newest optimizer state remembers."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    found = {}
    _load_state_dict(
        found, FileSystemReader(find_checkpoints(run_dir)[-1].path / "training_state"),
        planner=_EmptyStateDictLoadPlanner(), no_dist=True,
    )
    (count,) = {int(s["step"]) for s in found["optimizer"]["state"].values()}
    return count


# ------------------------------------------------------------------------------- guards


def poison(model_folder: Path, folder: Path) -> Path:
    """A model folder with one weight that is not a number."""
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_non_finite_steps_are_skipped_counted_and_end_the_run(workspace, model_folder, tmp_path):
    model_id = str(poison(model_folder, tmp_path / "ill"))
    with pytest.raises(RuntimeError, match="max_bad_steps.*checkpoint is intact"):
        train(workspace, model_id=model_id, max_bad_steps=3, **SIX_STEPS)
    records = history(workspace.run_dir)
    assert [r["bad_steps"] for r in records] == [1, 2]
    assert "optimizer step 3 skipped: loss nan" in log_text(workspace)
    assert "rows [" in log_text(workspace)


def test_one_bad_step_is_skipped_and_the_run_goes_on(workspace, undisturbed, monkeypatch):
    """The weights stay, the count in a row starts anew."""
    original = training.backward

    def ill(model, loss, *args):
        step = run_state["global_step"]
        original(model, loss * float("nan") if step in (2, 3, 8) else loss, *args)

    run_state = {}
    monkeypatch.setattr(training, "backward", ill)
    monkeypatch.setattr(training, "new_state", training.new_state)
    first = training.forward_backward
    monkeypatch.setattr(training, "forward_backward", lambda this, *args: (
        run_state.update(this.state), first(this, *args)
    ))
    assert train(workspace, max_bad_steps=3, **SIX_STEPS) == 0
    steps = [r for r in history(workspace.run_dir) if r["kind"] == "train"]
    assert [r["bad_steps"] for r in steps] == [0, 0, 1, 2, 2, 2, 2, 2] + [3] * 10
    same = [r for r in history(undisturbed) if r["kind"] == "train"]
    assert steps[1]["loss"] == same[1]["loss"]
    assert all(t.isfinite().all() for t in newest_weights(workspace.run_dir).values())


def test_a_run_that_explodes_leaves_the_last_checkpoint_intact(workspace, monkeypatch):
    """Bad steps in a row are counted across a restart too."""
    assert train(workspace, num_epochs=1, **SIX_STEPS) == 0
    before = newest_weights(workspace.run_dir)
    monkeypatch.setattr(training, "backward", lambda model, loss, *_: (loss * 1e39).backward())
    with pytest.raises(RuntimeError, match="in a row"):
        train(workspace, num_epochs=2, max_bad_steps=2, **SIX_STEPS)
    gc.collect()
    monkeypatch.undo()
    after = newest_weights(workspace.run_dir)
    assert names(workspace.run_dir) == ["checkpoint_1"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train(workspace, num_epochs=2, **SIX_STEPS) == 0
    assert [r["kind"] for r in history(workspace.run_dir)] == (["train"] * 6 + ["eval"]) * 2


# ------------------------------------------------------------------------------- keys


def test_skip_validation(workspace):
    assert train(workspace, skip_validation=True, val_path=None, num_epochs=2) == 0
    assert {r["kind"] for r in history(workspace.run_dir)} == {"train"}
    assert not (workspace.run_dir / "validation_examples.txt").exists()
    assert train(workspace, skip_validation=True, val_path=None, num_epochs=3) == 0
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2", "checkpoint_3"]


def test_debug_saves_nothing(workspace):
    for _ in range(2):
        assert train(workspace, debug=True, save_every_steps=1, **SIX_STEPS) == 0
        assert list(workspace.run_dir.glob("checkpoint*")) == []


def accuracies(monkeypatch, values: list[float]) -> None:
    """Let the evaluations find these accuracies."""
    left = iter(values)
    original = training.evaluate

    def found(*args):
        figures, rows = original(*args)
        figures.accuracy = next(left)
        return figures, rows

    monkeypatch.setattr(training, "evaluate", found)


@pytest.mark.parametrize("values, kept", [
    ([0.1, 0.3, 0.2, 0.3], [2, 4]),
    ([0.1, 0.2, 0.3, 0.4], [4]),
    ([0.4, 0.3, 0.2, 0.1], [1, 4]),
    ([0.0, 0.0, 0.0, 0.0], [1, 4]),
])
def test_save_only_improve_keeps_the_best_and_the_newest(workspace, monkeypatch, values, kept):
    accuracies(monkeypatch, values)
    assert train(workspace, save_only_improve=True, num_epochs=4) == 0
    assert names(workspace.run_dir) == [f"checkpoint_{epoch}" for epoch in kept]


def test_save_only_improve_over_a_restart(workspace, monkeypatch):
    """The best accuracy is remembered."""
    accuracies(monkeypatch, [0.3, 0.1, 0.2])
    for epochs in (2, 3):
        assert train(workspace, save_only_improve=True, num_epochs=epochs) == 0
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_3"]


@pytest.mark.parametrize("number, kept", [(1, [2, 5]), (2, [2, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_keep_checkpoints(workspace, monkeypatch, number, kept):
    accuracies(monkeypatch, [0.1, 0.3, 0.2, 0.1, 0.0])
    assert train(workspace, keep_checkpoints=number, num_epochs=5, save_every_steps=1) == 0
    assert names(workspace.run_dir) == [f"checkpoint_{epoch}" for epoch in kept]
    states = [p.parent.name for p in workspace.run_dir.glob("*/training_state")]
    assert states == ["checkpoint_5"]


def test_start_from_other_weights(workspace, undisturbed):
    """load_model_path in a fresh run folder: their weights, a new training."""
    path = undisturbed / "checkpoint_3"
    assert train(workspace, load_model_path=str(path), num_epochs=1, lr=0.0, **SIX_STEPS) == 0
    ours, theirs = newest_weights(workspace.run_dir), newest_weights(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------- only_eval


def results(workspace, file: str, name="eval") -> list[dict]:
    text = (workspace.run_dir.with_name(name) / file).read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("epoch", [1, 3])
def test_evaluation_of_a_checkpoint_finds_what_the_training_found(workspace, undisturbed, epoch):
    """The stage is the checkpoint's own, whatever its number."""
    path = undisturbed / f"checkpoint_{epoch}"
    keys = dict(only_eval=True, train_path=None, load_model_path=str(path), batch_size_eval=4)
    assert train(workspace, name="eval", **keys) == 0
    expected = (undisturbed / f"results_epoch_{epoch}.jsonl").read_text().splitlines()
    assert results(workspace, f"results_epoch_{epoch}.jsonl") == [json.loads(x) for x in expected]
    assert list(workspace.run_dir.with_name("eval").glob("checkpoint*")) == []


def test_evaluation_with_another_number_of_latents(workspace, undisturbed):
    path = str(undisturbed / "checkpoint_3")
    keys = dict(only_eval=True, load_model_path=path, eval_num_latents=0)
    assert train(workspace, name="eval", **keys) == 0
    rows = results(workspace, "results_epoch_3_latents_0.jsonl")
    assert {row["num_latents"] for row in rows} == {0}
    assert all("<|start-latent|><|end-latent|>" in row["output"] for row in rows)
    examples = workspace.run_dir.with_name("eval") / "validation_examples.txt"
    assert "epoch 3, stage 2, 0 latents" in examples.read_text()


def test_evaluation_at_another_stage_is_refused(workspace, undisturbed, capsys):
    """A wrong `resume` would change the number of latents in silence."""
    path = str(undisturbed / "checkpoint_3")
    assert train(workspace, name="eval", only_eval=True, load_model_path=path, resume=1) == 2
    assert "resume" in capsys.readouterr().err
    assert not workspace.run_dir.with_name("eval").exists()


def test_an_evaluation_under_the_name_of_a_training_leaves_the_training_as_it_is(workspace):
    """Evaluating between two legs of a run, under its name: no record is lost, no checkpoint
    touched, and the training goes on."""
    assert train(workspace, num_epochs=1, **SIX_STEPS) == 0
    weights = newest_weights(workspace.run_dir)
    path = str(workspace.run_dir / "checkpoint_1")
    if train(workspace, only_eval=True, load_model_path=path, eval_num_latents=0) == 2:
        return  # refused: as good
    assert all(torch.equal(weights[k], v) for k, v in newest_weights(workspace.run_dir).items())
    records = history(workspace.run_dir)
    assert train(workspace, num_epochs=2, **SIX_STEPS) == 0
    assert history(workspace.run_dir)[: len(records)] == records


def test_resume_needs_the_optimizer_state(workspace, capsys):
    assert train(workspace, num_epochs=1) == 0
    shutil.rmtree(workspace.run_dir / "checkpoint_1" / "training_state")
    assert train(workspace, num_epochs=2) == 2
    assert "weights only" in capsys.readouterr().err
