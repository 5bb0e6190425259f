"""run.py in the process: all stages, exact resume from any instant, guards, evaluation."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Workspace, family_config, free_port, tiny_model, tiny_rows
from numerics import assert_as_exact_as, in_float64
from safetensors.torch import load_file, save_file
from soak import differences, history, newest_weights
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import run
from coconut import Coconut
from engine import checkpoint, curve, evaluation, loop, overview
from engine.checkpoint import find_checkpoints
from engine.distributed import World
from engine.evaluation import Evaluator
from engine.logs import Metrics, read_metrics
from engine.loop import check_rows_per_step
from engine.preflight import gather_inputs
from engine.stop import EXIT_STOPPED, STOPPING, Stop, Stopped
from loader import load_config, own_config
from utils import UserError

# three optimizer steps of two micro-batches an epoch
THREE_STEPS = dict(
    batch_size_training=2,
    gradient_accumulation_steps=2,
    eval_subset_size=3,
    batch_size_eval=3,
    max_new_tokens=4,
)
ONE_STEP = dict(
    batch_size_training=12, gradient_accumulation_steps=1, eval_subset_size=1, max_new_tokens=1
)


class Killed(BaseException):
    """Imitates SIGKILL: nothing in the program catches it."""


@pytest.fixture
def workspace(model_folder, tmp_path) -> Workspace:
    """The common one with twelve training rows."""
    return small_workspace(model_folder, tmp_path)


def small_workspace(model_folder: Path, folder: Path) -> Workspace:
    workspace = Workspace(model_folder, folder)
    path = Path(workspace.values["train_path"])
    path.write_text(json.dumps(json.loads(path.read_text())[:12]))
    return workspace


@pytest.fixture(scope="module")
def undisturbed(model_folder, tmp_path_factory) -> Path:
    """The run folder of a training that nothing happened to; save_every_steps not even set."""
    workspace = small_workspace(model_folder, tmp_path_factory.mktemp("undisturbed"))
    assert train(workspace, **THREE_STEPS) == 0
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
    return [actual.path.name for actual in find_checkpoints(run_dir)]


# ------------------------------------------------------------------------------- all stages


def test_all_stages_then_evaluation(undisturbed):
    """Three epochs of three steps in stages 1, 2, 2; every epoch saved and evaluated, the last
    one without latents too."""
    records = history(undisturbed)
    assert [r["kind"] for r in records] == (["train"] * 3 + ["eval"]) * 3 + ["eval"]
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["global_step"] for r in steps] == list(range(1, 10))
    assert [(r["epoch"], r["stage"], r["step"]) for r in steps] == [
        (epoch, min(epoch, 2), step) for epoch in (1, 2, 3) for step in (1, 2, 3)
    ]
    assert [r["samples_seen"] for r in steps] == list(range(4, 37, 4))
    assert all(r["grad_norm"] > 0 and r["loss"] > 0 for r in steps)
    assert all(1 <= r["positions_per_token"] < 2 for r in steps)
    waiting = [
        r["waiting"] for r in read_metrics(undisturbed / "metrics.jsonl") if r["kind"] == "train"
    ]
    assert len(waiting) == 9 and all(0 < share < 1 for share in waiting)
    of_epoch = [sum(r["labelled_tokens"] for r in steps if r["epoch"] == e) for e in (1, 2, 3)]
    inputs = gather_inputs(load_config(undisturbed / "config.yaml"))
    assert of_epoch == [int(inputs.train_dataset(e).num_labels.sum()) for e in (1, 2, 3)]
    assert names(undisturbed) == ["checkpoint_1", "checkpoint_2", "checkpoint_3"]
    for file, latents in (("1", 2), ("2", 4), ("3", 4), ("3_latents_0", 0)):
        text = (undisturbed / f"results_epoch_{file}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["row"] for row in rows] == [0, 1, 2]
        assert {row["num_latents"] for row in rows} == {latents}
    examples = (undisturbed / "validation_examples.txt").read_text()
    assert examples.count("row 0: ") == 4 and "epoch 3, stage 2, 4 latents\n" in examples
    log = (undisturbed / "training.log").read_text()
    assert "epoch 1: stage 1, 2 latents, 1 steps skipped, 3 steps, 0 rows longer" in log
    assert "4 rows per optimizer step (processes: 1, micro-batches: 2 each, of" in log
    assert log.count("latent markers: new, made from the embedding of '<<'") == 1


@pytest.mark.parametrize("schedule", ["paper", "last_stage"])
def test_pauses_take_one_pass(workspace, monkeypatch, schedule):
    """Pause token (last_stage) and pause as thought (paper): every position in one pass, and the
    rows hold their latents all the same."""
    passes, forward = [], Coconut._run_passes

    def count(self, *args):
        result = forward(self, *args)
        passes.append(len(result[0]))
        return result

    monkeypatch.setattr(Coconut, "_run_passes", count)
    keys = dict(latent_input="pause", schedule=schedule, num_epochs=2, **ONE_STEP)
    assert train(workspace, **keys) == 0
    assert set(passes) == {1}
    stage, latents = (1, 2) if schedule == "paper" else (3, 4)
    text = (workspace.run_dir / "results_epoch_2.jsonl").read_text()
    assert {json.loads(line)["num_latents"] for line in text.splitlines()} == {latents}
    assert {r["stage"] for r in history(workspace.run_dir) if r["epoch"] == 2} == {stage}


def test_training_learns(workspace):
    assert train(workspace, num_epochs=6, max_latent_stage=1, lr=3e-3, **ONE_STEP) == 0
    losses = [r["loss"] for r in history(workspace.run_dir) if r["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]


def test_finished_epochs_are_not_repeated(workspace):
    def files():
        paths = [*workspace.run_dir.glob("*.*"), *workspace.run_dir.glob("checkpoint_1/*.*")]
        return {
            path: (path.stat().st_ino, path.read_bytes())
            for path in paths
            if path.suffix not in (".log", ".yaml")
        }

    assert train(workspace, num_epochs=1, **ONE_STEP) == 0
    before = files()
    assert len(before) > 8
    assert train(workspace, num_epochs=1, **ONE_STEP) == 0
    assert files() == before


@pytest.mark.parametrize("method", ["cot", "no_cot", "no_thoughts"])
def test_other_methods_train_and_resume(workspace, method):
    keys = {"coconut": None, method: True, **ONE_STEP}
    assert train(workspace, num_epochs=1, **keys) == 0
    assert train(workspace, num_epochs=2, **keys) == 0
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2"]


def test_no_thoughts_wins_over_coconut_and_resumes(workspace):
    """The checkpoint's config says coconut: True as well, but its model has no markers."""
    assert train(workspace, no_thoughts=True, num_epochs=1, **ONE_STEP) == 0
    assert train(workspace, no_thoughts=True, num_epochs=2, **ONE_STEP) == 0


def test_workers_do_not_change_the_weights(workspace, undisturbed):
    assert train(workspace, num_workers=2, **THREE_STEPS) == 0
    assert differences(workspace.run_dir, undisturbed) == []


def test_saving_does_not_change_the_weights(workspace, undisturbed):
    assert train(workspace, save_every_steps=1, keep_checkpoints=1, **THREE_STEPS) == 0
    assert differences(workspace.run_dir, undisturbed) == []


# ------------------------------------------------------------------------------- exact resume


def test_more_epochs_than_at_first(workspace, undisturbed):
    """One epoch, then three: the same but for the evaluation without latents of epoch 1."""
    assert train(workspace, num_epochs=1, **THREE_STEPS) == 0
    assert train(workspace, num_epochs=3, **THREE_STEPS) == 0
    records = [
        r for r in history(workspace.run_dir) if r["epoch"] == 3 or r.get("forced_latents") is None
    ]
    assert records == history(undisturbed)
    ours, theirs = newest_weights(workspace.run_dir), newest_weights(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# where the training dies: owner, function, call, after its work. An epoch does step 1, step 2, a
# save, step 3, a save, the evaluation; the last one has two evaluations
DEATHS = {
    "after the first record, nothing saved": (Metrics, "write", 1, True),
    "in the second micro-batch": (loop, "forward_backward", 2, False),
    "between step and record": (loop, "optimizer_step", 5, True),
    "before the first save": (loop, "save_checkpoint", 1, False),
    "in the first save": (checkpoint, "get_model_state_dict", 1, True),
    "after the first save, before pruning": (loop, "prune", 1, False),
    "before the save of an epoch": (loop, "save_checkpoint", 2, False),
    "after the save of an epoch": (loop, "save", 4, True),
    "before its evaluation": (loop, "validate", 2, False),
    "in the evaluation": (Evaluator, "evaluate", 1, False),
    "before the examples": (evaluation, "write_results", 1, False),
    "after the examples": (evaluation, "write_results", 2, True),
    "after the evaluation's record": (loop, "evaluate_epoch", 2, True),
    "before the end of the evaluation is kept": (loop, "write_whole", 2, False),
    "after the evaluation": (loop, "write_whole", 2, True),
    "before a pruning that deletes": (loop, "prune", 5, False),
    "within a pruning": (checkpoint.shutil, "rmtree", 3, False),
    "after the last save": (loop, "save", 6, True),
    "between the last two evaluations": (Evaluator, "evaluate", 4, False),
    "after the last evaluations' records": (loop, "evaluate_epoch", 3, True),
}


@pytest.mark.parametrize("death", DEATHS)
def test_killed_and_continued_is_as_never_killed(workspace, undisturbed, monkeypatch, death):
    """Weights bit-identical, every record and every example there exactly once. At the very
    first death there is no checkpoint: what it wrote to metrics.jsonl must go all the same."""
    settings = dict(save_every_steps=2, **THREE_STEPS)
    killed(monkeypatch, workspace, *DEATHS[death], **settings)
    records, expected = history(workspace.run_dir), history(undisturbed)
    assert records == expected[: len(records)]
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, undisturbed) == []


@pytest.mark.parametrize("death", [(Evaluator, "evaluate"), (curve, "draw_curve")])
def test_the_curve_of_a_run_killed_at_its_end_is_drawn(workspace, monkeypatch, death):
    killed(monkeypatch, workspace, *death, 1, num_epochs=1, **ONE_STEP)
    assert not (workspace.run_dir / "curve.png").exists()
    assert train(workspace, num_epochs=1, **ONE_STEP) == 0
    assert (workspace.run_dir / "curve.png").exists()


def test_killed_again_and_again_is_as_never_killed(workspace, undisturbed, monkeypatch):
    """Each start dies at a place that it comes to before it is done."""
    settings = dict(save_every_steps=2, **THREE_STEPS)
    for death in list(DEATHS)[:8]:
        owner, function, _, after = DEATHS[death]
        killed(monkeypatch, workspace, owner, function, 1, after, **settings)
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
    "schedule and reset": dict(lr_schedule="cosine", warmup_steps=3, reset_optimizer=True),
    "random stages": dict(uniform_prob=0.5, pad_latent_to_max=False, lr_schedule="linear"),
    "bf16": dict(bf16=True),
    "bf16, plain adamw": dict(bf16=True, optimizer="adamw", max_grad_norm=0.5, weight_decay=0.1),
    "master weights": dict(bf16=True, float32_master_weights=True),
    "from_scratch": dict(from_scratch=True, seed=7, schedule="paper", group_by_length=True),
    "uneven steps": dict(batch_size_training=5, gradient_accumulation_steps=1),
    "dropout": dict(gradient_checkpointing=True),
    "mixed stages": dict(stage_mixing="linear", schedule="paper"),
    "one latent at a time": dict(latent_growth="one", uniform_prob=0.5, reset_optimizer=True),
    "a gate": dict(advance_at=1.0, gate_rows=4, max_epochs_per_stage=1, uniform_prob=0.5),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact_with(workspace, gpt2_folder, monkeypatch, variant):
    """Killed within epoch 2 and between save and evaluation at its end."""
    settings = {**THREE_STEPS, "save_every_steps": 1, **VARIANTS[variant]}
    if variant == "dropout":
        settings["model_id"] = str(gpt2_folder)
    assert train(workspace, name="whole", **settings) == 0
    killed(monkeypatch, workspace, loop, "optimizer_step", 5, after=True, **settings)
    killed(monkeypatch, workspace, loop, "validate", 1, **settings)
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, workspace.run_dir.with_name("whole")) == []


def test_resume_of_a_later_start(workspace, monkeypatch):
    """`resume: 1` in a fresh run folder: one epoch counts as done, here and after a kill; the
    length of the learning rate schedule is that of the epochs that are really trained."""
    settings = dict(resume=1, lr_schedule="linear", save_every_steps=2, **THREE_STEPS)
    assert train(workspace, name="whole", **settings) == 0
    whole = workspace.run_dir.with_name("whole")
    assert [r["epoch"] for r in history(whole)] == [2] * 4 + [3] * 5
    killed(monkeypatch, workspace, loop, "optimizer_step", 3, **settings)
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, whole) == []


def test_each_step_and_each_seed_draw_dropout_of_their_own(workspace, monkeypatch):
    """With one seed for all of them the same features would be left out in every step."""
    drawn: list[int] = []
    monkeypatch.setattr(loop.torch, "manual_seed", drawn.append)
    for seed in (0, 1):
        assert train(workspace, name=f"{seed}", seed=seed, num_epochs=1, **THREE_STEPS) == 0
    assert len(drawn) == len(set(drawn)) == 6


def test_another_marker_goes_through_the_whole_run(workspace):
    """It is written before the answers, looked for in completions, and kept in the checkpoint."""
    changes = dict(answer_marker="So:", answer_kind="text", num_epochs=1, **ONE_STEP)
    assert train(workspace, **changes) == 0
    inputs = gather_inputs(load_config(workspace.yaml(name="new", **changes)))
    row = inputs.validation_dataset(1)[0]
    assert "So: " in inputs.tokenizer.decode(row.input_ids)
    assert "###" not in inputs.tokenizer.decode(row.input_ids)
    plain = gather_inputs(load_config(workspace.yaml(name="new")))
    assert plain.train.fingerprint != inputs.train.fingerprint
    saved = find_checkpoints(workspace.run_dir)[-1].config()
    assert (saved.answer_marker, saved.answer_kind) == ("So:", "text")


def test_without_latents_the_last_epoch_is_evaluated_once(workspace):
    """Stage 0 has no latents: to force none would be the same evaluation again."""
    changes = dict(schedule="paper", num_epochs=1, **ONE_STEP)
    assert train(workspace, **changes) == 0
    records = [r for r in history(workspace.run_dir) if r["kind"] == "eval"]
    assert [(r["forced_latents"], r["latents"]) for r in records] == [(None, "0")]
    assert not list(workspace.run_dir.glob("latents_epoch_*"))


def test_sigterm_ends_the_step_saves_and_says_so(workspace, undisturbed, monkeypatch):
    """Exit code 3, a checkpoint of the very step, and a command that goes on."""
    interrupt(monkeypatch, after_step=4)
    assert train(workspace, **THREE_STEPS) == 3
    monkeypatch.undo()
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2_step_2"]
    assert len(history(workspace.run_dir)) == 3 + 1 + 2
    go_on = f"go on with: bash train_continue_fresh.sh {workspace.folder}/config.yaml\n"
    assert f"all is saved; {go_on}" in log_text(workspace)
    assert train(workspace, **THREE_STEPS) == 0
    assert differences(workspace.run_dir, undisturbed) == []


def test_ranks_that_no_signal_reached_stop_with_the_others():
    """After the last step of an epoch too, where all save before they look."""
    stop = Stop()
    stop.agreed = True
    with pytest.raises(Stopped):
        stop.saved()


def test_a_request_to_stop_that_comes_twice_is_one(monkeypatch):
    """As where a scheduler sends it to all processes and torchrun sends it on; a later one ends
    the process."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = Stop()
    stop.all_saved = False
    for _ in range(2):
        stop._handle(signal.SIGTERM, None)
    assert stop.requested and ended == []
    stop.since -= 5  # seconds
    stop._handle(signal.SIGTERM, None)
    assert ended == [1]


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("all_saved", [True, False])
def test_a_signal_ends_a_fork_that_no_training_waits_for(number, all_saved):
    """Those that encode rows end, whenever it comes; a data worker gives the step its rows."""
    Stop().all_saved = all_saved
    for _ in range(20):
        child = os.fork()
        if child == 0:
            time.sleep(0.05)
            os._exit(0)
        os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-number if all_saved else 0)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_waits_for_the_others_ends_at_a_signal(workspace, rank):
    port = free_port()
    group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    group |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    lines = f"import sys; sys.path.append({str(ROOT)!r}); import run; print('begun', flush=True); "
    command = [sys.executable, "-c", lines + "run.main(sys.argv[1:])", str(workspace.yaml())]
    process = subprocess.Popen(command, env=os.environ | group, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_signal_to_the_data_workers_too_costs_no_step(workspace):
    """A terminal sends Ctrl-C to all processes of a run; the step that is running needs its
    worker."""
    path = workspace.yaml(num_epochs=1000, num_workers=1, skip_validation=True, **THREE_STEPS)
    command = [sys.executable, str(ROOT / "run.py"), str(path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    metrics, end = workspace.run_dir / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 4):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=300) == EXIT_STOPPED
    state = find_checkpoints(workspace.run_dir)[-1].state()
    assert state.global_step == history(workspace.run_dir)[-1]["global_step"]


def test_a_signal_while_the_optimizer_state_is_read_is_no_damage(workspace, monkeypatch, capsys):
    assert train(workspace, num_epochs=1, **ONE_STEP) == 0
    read = FileSystemReader.read_data

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*args)

    monkeypatch.setattr(FileSystemReader, "read_data", interrupted)
    assert train(workspace, num_epochs=2, **ONE_STEP) == 3
    assert "all is saved; go on with" in log_text(workspace)
    assert "damaged" not in capsys.readouterr().err
    monkeypatch.undo()
    assert train(workspace, num_epochs=2, **ONE_STEP) == 0


@pytest.mark.parametrize("expect, before", [("continue", 1), ("fresh", 0)])
def test_a_run_that_went_on_meanwhile_is_left_as_it_is(
    workspace, monkeypatch, capsys, expect, before
):
    """While this process built its model, another one trained on and let go of the lock."""
    if before:
        assert train(workspace, num_epochs=before, **ONE_STEP) == 0
    build = run.build_model

    def meanwhile(inputs):
        monkeypatch.undo()
        assert train(workspace, num_epochs=before + 1, **ONE_STEP) == 0
        return build(inputs)

    monkeypatch.setattr(run, "build_model", meanwhile)
    assert train(workspace, "--expect", expect, num_epochs=2, **ONE_STEP) == 2
    error = capsys.readouterr().err
    assert ("start again" if before else "already holds checkpoint_1") in error
    assert names(workspace.run_dir)[-1] == f"checkpoint_{before + 1}"
    assert [r["epoch"] for r in history(workspace.run_dir) if r["kind"] == "train"][-1:] == [
        before + 1
    ]


def test_what_a_stopped_run_says_where_nothing_is_saved(workspace, monkeypatch):
    """debug saves nothing, and there is no checkpoint to go on from."""
    interrupt(monkeypatch, after_step=1)
    assert train(workspace, debug=True, **THREE_STEPS) == 3
    command = f"bash train_fresh_start.sh {workspace.folder}/config.yaml\n"
    assert f"no checkpoint was saved yet; go on with: {command}" in log_text(workspace)


@pytest.mark.parametrize("become", ["lrr: 1\n", None])
def test_a_stopped_run_has_the_config_that_it_began_with(workspace, monkeypatch, become):
    """Its YAML is another one by then, or gone."""
    original, path = loop.optimizer_step, workspace.folder / "config.yaml"

    def edited(*args):
        path.unlink() if become is None else path.write_text(become)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(loop, "optimizer_step", edited)
    assert train(workspace, **THREE_STEPS) == 3
    assert names(workspace.run_dir) == ["checkpoint_1_step_1"]
    assert f"go on with: bash train_continue_fresh.sh {path}\n" in log_text(workspace)


def test_a_run_outlives_its_terminal(workspace):
    """What reads its output ends first, as the `tee` behind a run does at Ctrl-C."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(ROOT / "run.py"), str(workspace.yaml(**THREE_STEPS))]
    done = subprocess.run(command, stdout=writing, stderr=writing, timeout=300)
    os.close(writing)
    assert done.returncode in (0, 120)  # 120: Python could not flush what was left
    assert (workspace.run_dir / "results_epoch_1.jsonl").exists()
    assert names(workspace.run_dir)[-1].startswith("checkpoint_")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_with_another_number_of_epochs_the_rate_is_that_of_the_new_one(workspace, schedule):
    """From the first step on, which would have the old one's, 0."""
    keys = dict(lr_schedule=schedule, **THREE_STEPS)
    assert train(workspace, num_epochs=1, **keys) == 0
    assert "the linear rate goes on" not in log_text(workspace)
    assert train(workspace, num_epochs=3, **keys) == 0
    assert f"num_epochs: 3, but {workspace.run_dir}/checkpoint_1 was trained" in log_text(workspace)
    assert train(workspace, name="at once", num_epochs=3, **keys) == 0
    whole = history(workspace.run_dir.with_name("at once"))
    ours, theirs = (
        [r["lr"] for r in records if r["kind"] == "train" and r["epoch"] > 1]
        for records in (history(workspace.run_dir), whole)
    )
    assert ours == theirs and len(ours) == 6


def interrupt(monkeypatch, after_step: int) -> None:
    """SIGTERM to this process between the gradients of the next step and its update."""
    original = loop.optimizer_step

    def interrupted(training, *args):
        if training.state.global_step == after_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(training, *args)

    monkeypatch.setattr(loop, "optimizer_step", interrupted)


def test_fewer_epochs_than_one_that_has_begun_are_refused(workspace, monkeypatch, capsys):
    interrupt(monkeypatch, after_step=4)
    assert train(workspace, **THREE_STEPS) == 3
    monkeypatch.undo()
    assert train(workspace, **{**THREE_STEPS, "num_epochs": 1}) == 2
    assert "num_epochs: 1, but" in capsys.readouterr().err


def test_sigterm_in_the_last_step_of_an_epoch(workspace, undisturbed, monkeypatch):
    interrupt(monkeypatch, after_step=5)
    assert train(workspace, **THREE_STEPS) == 3
    monkeypatch.undo()
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2"]
    assert train(workspace, **THREE_STEPS) == 0
    assert differences(workspace.run_dir, undisturbed) == []


def test_training_rows_are_mixed_and_validation_rows_are_not(workspace):
    inputs = gather_inputs(load_config(workspace.yaml(stage_mixing="uniform")))
    assert {0, 2} <= set(inputs.train_dataset(3).stages.tolist())
    assert set(inputs.validation_dataset(3).stages.tolist()) == {2}


def test_a_file_of_metrics_that_lost_its_end_gets_no_zeros(workspace):
    """After a power cut metrics.jsonl may be shorter than the checkpoint remembers; truncating
    it to that size would fill it with zero bytes."""
    assert train(workspace, num_epochs=1, **THREE_STEPS) == 0
    path = workspace.run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert train(workspace, num_epochs=2, **THREE_STEPS) == 0
    assert b"\0" not in path.read_bytes()


def test_a_stray_folder_in_the_way_does_not_cost_the_epoch(workspace):
    """A folder checkpoint_1 that is no checkpoint, an unfinished copy, say: either an error
    before the training or out of the way, but no crash after an epoch's work."""
    (workspace.run_dir / "checkpoint_1").mkdir(parents=True)
    (workspace.run_dir / "checkpoint_1" / "model.safetensors").write_bytes(b"half")
    code = train(workspace, num_epochs=1, **THREE_STEPS)
    assert code in (0, 2)
    if code == 0:
        assert names(workspace.run_dir) == ["checkpoint_1"]
    else:
        assert not (workspace.run_dir / "metrics.jsonl").exists()


def test_check_says_so_where_epochs_are_done_by_no_checkpoint(workspace, capsys):
    """A wrong name beside resume began a run at its last stage, and no line said so."""
    assert train(workspace, "--check", resume=2, **THREE_STEPS) == 0
    said = "at epoch 3 from the weights of model_id (resume is set, and load_model_path is not)"
    assert said in capsys.readouterr().out


def test_an_epoch_between_whose_rows_are_all_too_long_is_found(workspace, capsys):
    """With the first step gone and its latents there, the rows are longest at stage 1; the check
    looked at the first and the last epoch only, and a start from epoch 1 was a traceback."""
    row = dict(question="1 + 1?", steps=["<<1+1=2>>", "<<1+1=2>> " * 9], answer="2")
    Path(workspace.values["train_path"]).write_text(json.dumps([row] * 24))
    keys = dict(c_thought=16, schedule="paper", num_epochs=4)
    whole = gather_inputs(load_config(workspace.yaml(**keys, max_seq_length=500)))
    lengths = [int(whole.train_dataset(epoch).total_length[0]) for epoch in range(1, 5)]
    limit = max(lengths[0], *lengths[2:])
    assert limit < lengths[1]
    assert train(workspace, "--check", **keys, max_seq_length=limit) == 2
    assert f"longer than {limit} tokens in epoch 2" in capsys.readouterr().err


def test_check_refuses_other_rows_per_step_too(workspace, capsys):
    """Where they are given, they are the same on any number of processes."""
    settings = THREE_STEPS | dict(num_epochs=1)
    assert train(workspace, **settings) == 0
    capsys.readouterr()
    others = settings | dict(rows_per_step=8, gradient_accumulation_steps=None, num_epochs=2)
    assert train(workspace, "--check", **others) == 2
    said = "checkpoint_1 was trained with 4 rows per step, this run has 8; set rows_per_step=4"
    assert said in capsys.readouterr().err
    assert train(workspace, "--check", **others | dict(rows_per_step=4)) == 0


@pytest.mark.parametrize(
    "change",
    [dict(batch_size_training=3), dict(gradient_accumulation_steps=1), dict(max_seq_length=70)],
)
def test_another_division_of_the_epoch_is_refused(workspace, monkeypatch, capsys, change):
    """Rows of the steps already done would be seen twice, others never."""
    settings = dict(save_every_steps=2, **THREE_STEPS)
    killed(monkeypatch, workspace, loop, "optimizer_step", 3, **settings)
    assert train(workspace, **{**settings, **change}) == 2
    assert next(iter(change)) in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_recipe_is_the_same_on_any_number_of_processes(workspace, count):
    """96 rows a step whatever divides them; what cannot be divided evenly is named."""
    Path(workspace.values["train_path"]).write_text(json.dumps(tiny_rows(200, seed=1)))
    keys = dict(rows_per_step=96, gradient_accumulation_steps=None, batch_size_training=16)
    inputs = gather_inputs(load_config(workspace.yaml(**keys)))
    check_rows_per_step(inputs, World(0, count, torch.device("cpu")))
    one, several = (inputs.plan_epoch(inputs.train_dataset(1), 1, n)[0] for n in (1, count))
    assert [len(rows) for rows in several] == [96, 96, 8]
    assert [rows.tolist() for rows in several] == [rows.tolist() for rows in one]
    words = "rows_per_step: 96 rows cannot be divided among 5 processes; start 1, 2, 3, 4, 6, 8, "
    with pytest.raises(UserError, match=words):
        check_rows_per_step(inputs, World(0, 5, torch.device("cpu")))


def test_the_same_rows_in_other_micro_batches_go_on(workspace, undisturbed, monkeypatch):
    settings = dict(save_every_steps=2, **THREE_STEPS)
    killed(monkeypatch, workspace, loop, "optimizer_step", 3, **settings)
    others = {**settings, "batch_size_training": 4, "gradient_accumulation_steps": 1}
    assert train(workspace, **others) == 0
    with in_float64():
        assert train(workspace, name="truth", **settings) == 0
    runs = [history(f) for f in (workspace.run_dir, undisturbed, workspace.folder / "out/truth")]
    assert [r["global_step"] for r in runs[0]] == [r["global_step"] for r in runs[1]]
    ours, theirs, truth = ({"loss": losses(records)} for records in runs)
    assert_as_exact_as(ours, [theirs], truth)


def losses(records: list[dict]) -> torch.Tensor:
    actual = [r["loss"] for r in records if r["kind"] == "train"]
    return torch.tensor(actual, dtype=torch.float64)


def test_other_training_rows_are_refused(workspace, capsys):
    """Resuming on changed data would be another training under the old one's name."""
    assert train(workspace, num_epochs=1, **THREE_STEPS) == 0
    path = Path(workspace.values["train_path"])
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    assert train(workspace, num_epochs=2, **THREE_STEPS) == 2
    assert "train_path" in capsys.readouterr().err


def test_resume_takes_the_learning_rate_of_the_config_or_refuses(workspace):
    """lr=... on the command line of a continued run must not be ignored in silence."""
    assert train(workspace, num_epochs=1, lr=1e-3, **THREE_STEPS) == 0
    code = train(workspace, num_epochs=2, lr=1e-4, **THREE_STEPS)
    steps = [r for r in history(workspace.run_dir) if r["kind"] == "train" and r["epoch"] == 2]
    assert code == 2 or {r["lr"] for r in steps} == {1e-4}


# ------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "keys",
    [
        {},
        dict(bf16=True),
        dict(bf16=True, optimizer="adamw"),
        dict(bf16=True, float32_master_weights=True),
        dict(bf16=True, optimizer="adamw_split"),
    ],
)
def test_the_memory_told_at_start_is_what_the_training_takes(workspace, monkeypatch, keys):
    """Parameters, gradients and the real optimizer's state after its first step."""
    sizes, original = [], loop.save

    def look(training, *args):
        parameters = list(training.model.parameters())
        state = [t for p in parameters for t in training.optimizer.state[p].values()]
        size = sum(p.numel() * p.element_size() for p in parameters)
        large = [t for t in state if torch.is_tensor(t) and t.numel() > 1]
        sizes.append((size, sum(t.numel() * t.element_size() for t in large)))
        original(training, *args)

    monkeypatch.setattr(loop, "save", look)
    monkeypatch.setattr(overview, "GIB", 1), monkeypatch.setattr(overview, "MIB", 1)
    assert train(workspace, num_epochs=1, skip_validation=True, **ONE_STEP, **keys) == 0
    size, state = sizes[0]
    assert (
        f"memory    {2 * size + state:.1f} GiB per process: parameters {size:.1f}, "
        f"gradients {size:.1f}, optimizer {state:.1f}; "
    ) in log_text(workspace)


@pytest.mark.parametrize("batch_size, beside", [(2, 2 + 2), (1, 2 + 4)])
def test_the_memory_told_to_several_processes(workspace, batch_size, beside):
    """Shards among the processes of a node, and what a step holds beside them, whole: in one
    micro-batch, and over two."""
    keys = dict(bf16=True, rows_per_step=8, gradient_accumulation_steps=None)
    inputs = gather_inputs(load_config(workspace.yaml(batch_size_training=batch_size, **keys)))
    two_nodes = World(0, 4, torch.device("cpu"), num_nodes=2)
    model = tiny_model("qwen3", torch.bfloat16)
    count = sum(p.numel() for p in model.parameters()) / 2**20
    plan = overview.plan_next_epoch(inputs, two_nodes.world_size)
    assert overview.static_memory(inputs.config, model, two_nodes, plan) == (
        f"{count / 2 * (2 + 2 + 8) + count * beside:.1f} MiB per process: parameters {count:.1f}, "
        f"gradients {count:.1f}, optimizer {4 * count:.1f}, gathered parameters and unreduced "
        f"gradients {count * beside:.1f}; activations come on top (benchmarks/memory.py)"
    )


# ------------------------------------------------------------------------------- schedules


def test_learning_rates(workspace):
    """Two steps of warm-up, then a straight line to zero over all six steps."""
    keys = dict(lr_schedule="linear", warmup_steps=2, num_epochs=6, max_latent_stage=1, **ONE_STEP)
    assert train(workspace, **keys) == 0
    rates = [r["lr"] for r in history(workspace.run_dir) if r["kind"] == "train"]
    assert rates == pytest.approx([0.0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize("reset, counts", [(False, [3, 6, 9]), (True, [3, 3, 6])])
def test_reset_optimizer_forgets_when_the_stage_changes(workspace, monkeypatch, reset, counts):
    """Stages 1, 2, 2: the updates that the optimizer remembers at the end of each epoch."""
    seen, original = [], loop.save

    def look(training, *args):
        seen.append({int(s["step"]) for s in training.optimizer.state_dict()["state"].values()})
        original(training, *args)

    monkeypatch.setattr(loop, "save", look)
    assert train(workspace, reset_optimizer=reset, **THREE_STEPS) == 0
    assert seen == [{count} for count in counts]


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
        train(workspace, model_id=model_id, max_bad_steps=3, **THREE_STEPS)
    records = history(workspace.run_dir)
    assert [r["bad_steps"] for r in records] == [1, 2]
    assert "optimizer step 3 skipped: loss nan" in log_text(workspace)
    assert "rows [" in log_text(workspace)


def test_bad_steps_are_skipped_and_the_run_goes_on(workspace, undisturbed, monkeypatch):
    """Steps 2, 3 and 6 have gradients that are not numbers: the weights stay as they are, and
    the count in a row starts anew after each good step."""
    states, original = [], loop.optimizer_step

    def ill(training, *args):
        if training.state.global_step in (1, 2, 5):
            next(training.model.parameters()).grad[0, 0] = float("inf")
        states.append([p.clone() for p in training.model.parameters()])
        return original(training, *args)

    monkeypatch.setattr(loop, "optimizer_step", ill)
    assert train(workspace, max_bad_steps=3, **THREE_STEPS) == 0
    steps = [r for r in history(workspace.run_dir) if r["kind"] == "train"]
    assert [r["bad_steps"] for r in steps] == [0, 1, 2, 2, 2, 3, 3, 3, 3]
    moved = [not all(map(torch.equal, a, b)) for a, b in zip(states, states[1:])]
    assert moved == [True, False, False, True, True, False, True, True]


def test_a_run_that_explodes_leaves_the_last_checkpoint_intact(workspace, monkeypatch):
    """Bad steps in a row are counted across a restart too."""
    assert train(workspace, num_epochs=1, **THREE_STEPS) == 0
    before = newest_weights(workspace.run_dir)
    monkeypatch.setattr(loop, "backward", lambda model, loss, *_, **__: (loss * 1e39).backward())
    with pytest.raises(RuntimeError, match="in a row"):
        train(workspace, num_epochs=2, max_bad_steps=2, **THREE_STEPS)
    gc.collect()
    monkeypatch.undo()
    after = newest_weights(workspace.run_dir)
    assert names(workspace.run_dir) == ["checkpoint_1"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    remedy = dict(max_grad_norm=1.0)  # that the error names
    assert train(workspace, num_epochs=2, **remedy, **THREE_STEPS) == 0
    steps = [r["step"] for r in history(workspace.run_dir) if r["kind"] == "train"]
    assert steps == [1, 2, 3] * 2


def test_disk_full_leaves_the_checkpoint_before(workspace, monkeypatch):
    """The room is looked for before anything is written; here it is gone from epoch 2 on."""
    room = iter([10**12, 10**12, 100])  # at the start, for checkpoint_1, for checkpoint_2
    monkeypatch.setattr("engine.checkpoint.free_bytes", lambda folder: next(room))
    monkeypatch.setattr("run.free_bytes", lambda folder: next(room))
    assert run.main([str(workspace.yaml())]) == 1
    log = (workspace.run_dir / "training.log").read_text()
    assert "disk full: " in log and "bytes needed, 100 free" in log
    assert [c.path.name for c in find_checkpoints(workspace.run_dir)] == ["checkpoint_1"]
    assert not list(workspace.run_dir.glob("*writing*"))


# ------------------------------------------------------------------------------- keys


def test_skip_validation(workspace):
    assert train(workspace, skip_validation=True, val_path=None, num_epochs=2, **ONE_STEP) == 0
    assert {r["kind"] for r in history(workspace.run_dir)} == {"train"}
    assert not (workspace.run_dir / "validation_examples.txt").exists()
    assert train(workspace, skip_validation=True, val_path=None, num_epochs=3, **ONE_STEP) == 0
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2", "checkpoint_3"]


def test_debug_saves_nothing(workspace):
    """And a second start is a new one: its records are not added to those of the first."""
    for _ in range(2):
        assert train(workspace, debug=True, save_every_steps=1, num_epochs=2, **ONE_STEP) == 0
        assert list(workspace.run_dir.glob("checkpoint*")) == []
    steps = [r["global_step"] for r in history(workspace.run_dir) if r["kind"] == "train"]
    assert steps == [1, 2]


def accuracies(monkeypatch, values: list[float]) -> None:
    """Let the evaluations at the stage's own number of latents find these accuracies."""
    left, original = iter(values), loop.evaluate_epoch

    def actual(*args, **kwargs):
        evaluations = original(*args, **kwargs)
        evaluations[0].accuracy = next(left)
        return evaluations

    monkeypatch.setattr(loop, "evaluate_epoch", actual)


@pytest.mark.parametrize(
    "keys, values, kept",
    [
        (dict(save_only_improve=True), [0.1, 0.3, 0.2, 0.3], [2, 4]),
        (dict(save_only_improve=True), [0.1, 0.2, 0.3, 0.4], [4]),
        (dict(save_only_improve=True), [0.0, 0.0, 0.0, 0.0], [1, 4]),
        (dict(keep_checkpoints=1), [0.1, 0.3, 0.2, 0.1], [2, 4]),
        (dict(keep_checkpoints=2), [0.3, 0.2, 0.2, 0.1], [1, 3, 4]),
        (dict(keep_checkpoints=9), [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]),
        ({}, [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4]),
    ],
)
def test_the_best_and_the_newest_checkpoints_stay(workspace, monkeypatch, keys, values, kept):
    """Over a restart too; only the newest holds the optimizer."""
    accuracies(monkeypatch, values)
    for epochs in (2, 4):
        assert train(workspace, num_epochs=epochs, **keys, **ONE_STEP) == 0
    assert names(workspace.run_dir) == [f"checkpoint_{epoch}" for epoch in kept]
    states = [p.parent.name for p in workspace.run_dir.glob("*/training_state")]
    assert states == ["checkpoint_4"]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        dict(keep_checkpoints=1),
        dict(keep_checkpoints=1, save_every_steps=1),
        dict(keep_checkpoints=2, skip_validation=True, val_path=None),
        dict(save_only_improve=True),
        dict(save_only_improve=True, save_every_steps=1),
    ],
)
def test_the_disk_that_a_run_needs_is_that_of_all_checkpoints_at_once(workspace, monkeypatch, keys):
    """The new one stands beside those that it makes useless, the best one and the newest place
    within the epoch: of keep_checkpoints 1 there were four where two were foreseen."""
    accuracies(monkeypatch, [0.5, 0.1, 0.1, 0.1])
    write, seen, states = checkpoint._write_parts, [], []

    def write_and_count(*args) -> None:
        write(*args)
        seen.append(len(list(workspace.run_dir.glob("checkpoint_*/model.safetensors"))))
        states.append(len(list(workspace.run_dir.glob("checkpoint_*/training_state"))))

    monkeypatch.setattr(checkpoint, "_write_parts", write_and_count)
    assert train(workspace, num_epochs=4, **keys, **THREE_STEPS) == 0
    config = own_config(workspace.run_dir)
    assert config is not None and max(states) == 2
    weights, optimizer = checkpoint.checkpoint_bytes(10, config)
    expected = max(seen) * weights + 2 * optimizer, max(seen)
    assert checkpoint.run_bytes(10, config, config.num_epochs) == expected


def test_the_best_by_another_measure_is_forgotten(workspace, monkeypatch):
    """Else no later epoch could be better than one that a few easy rows were asked."""
    accuracies(monkeypatch, [0.9, 0.2, 0.1])
    keys = dict(ONE_STEP, keep_checkpoints=1)
    assert train(workspace, num_epochs=1, **keys) == 0
    assert train(workspace, num_epochs=3, **{**keys, "eval_subset_size": 2}) == 0
    assert names(workspace.run_dir) == ["checkpoint_2", "checkpoint_3"]
    assert "eval_subset_size: changed, so the accuracy of epoch 1" in log_text(workspace)


def test_start_from_other_weights(workspace, undisturbed):
    """load_model_path in a fresh run folder: their weights, a new training."""
    path = undisturbed / "checkpoint_3"
    assert train(workspace, load_model_path=str(path), num_epochs=1, lr=1e-30, **THREE_STEPS) == 0
    ours, theirs = newest_weights(workspace.run_dir), newest_weights(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------- other weights


def published(checkpoint: Path, file: Path) -> Path:
    """A single file as the original's are: torch.save of its model's state dict, in which the
    embeddings have a second name."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {f"base_causallm.{name}": tensor for name, tensor in tensors.items()}
    tensors["embedding.weight"] = tensors["base_causallm.model.embed_tokens.weight"].clone()
    torch.save(tensors, file)
    return file


def stray(workspace, checkpoint: Path) -> Path:
    """The published file downloaded into the run folder itself, under a checkpoint's name."""
    workspace.run_dir.mkdir(parents=True)
    return published(checkpoint, workspace.run_dir / "checkpoint_1")


def older(workspace, checkpoint: Path) -> Path:
    """The first checkpoint of a run that has newer ones, in the folder beside the new run's."""
    shutil.copytree(checkpoint.parent, workspace.run_dir.with_name("old"))
    return workspace.run_dir.with_name("old") / checkpoint.name


OTHER_WEIGHTS = {
    "a published file": lambda w, c: published(c, w.folder / "checkpoint_1"),
    "a published file in the run folder": stray,
    "a safetensors file": lambda w, c: c / "model.safetensors",
    "a checkpoint of another run": lambda w, c: c,
    "the folder of another run": lambda w, c: c.parent,
    "an older checkpoint, under a new name": older,
}
CONTINUE = dict(resume=1, lr_schedule="linear", save_every_steps=2, **THREE_STEPS)


@pytest.fixture(scope="module")
def continued(model_folder, tmp_path_factory, undisturbed) -> Path:
    """The run folder of a training from the first checkpoint of another, never interrupted."""
    workspace = small_workspace(model_folder, tmp_path_factory.mktemp("continued"))
    path = str(undisturbed / "checkpoint_1")
    assert train(workspace, "--expect", "continue", load_model_path=path, **CONTINUE) == 0
    return workspace.run_dir


def test_continued_weights_are_those_of_the_checkpoint(workspace, undisturbed, continued):
    """With lr 0 they stay; epoch 1 counts as done, the optimizer and its schedule are new."""
    path = str(undisturbed / "checkpoint_1")
    keys = CONTINUE | dict(load_model_path=path, lr=1e-30, num_epochs=2)
    assert train(workspace, "--expect", "continue", **keys) == 0
    ours, theirs = newest_weights(workspace.run_dir), load_file(f"{path}/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert names(workspace.run_dir) == ["checkpoint_2"]
    steps = [r for r in history(continued) if r["kind"] == "train"]
    assert [(r["epoch"], r["stage"]) for r in steps] == [(2, 2)] * 3 + [(3, 2)] * 3
    assert [r["lr"] for r in steps] == pytest.approx([1e-3 * left / 6 for left in range(6, 0, -1)])
    assert [r["global_step"] for r in steps] == list(range(1, 7))


@pytest.mark.parametrize("form", OTHER_WEIGHTS)
def test_continue_from_other_weights(workspace, undisturbed, continued, monkeypatch, capsys, form):
    """--check and the log say so; killed before the first checkpoint and within both epochs, the
    same command goes on by itself, at last without the weights, which are no longer needed."""
    path = OTHER_WEIGHTS[form](workspace, undisturbed / "checkpoint_1")
    command = CONTINUE | dict(load_model_path=str(path))
    named = {"the folder of another run": path / "checkpoint_1", "a safetensors file": path.parent}
    begins = f"at epoch 2 from {named.get(form, path)}"
    assert train(workspace, "--check", "--expect", "continue", **command) == 0
    assert f"starts {begins}, with a new optimizer state" in capsys.readouterr().out
    killed(monkeypatch, workspace, loop, "optimizer_step", 2, **command)
    killed(monkeypatch, workspace, loop, "optimizer_step", 3, **command)
    assert f"starts    {begins}, with a new optimizer state\n" in log_text(workspace)
    assert train(workspace, "--check", "--expect", "continue", **command) == 0
    assert "checkpoint_2_step_2\n" in capsys.readouterr().out
    killed(monkeypatch, workspace, loop, "validate", 1, **command)
    killed(monkeypatch, workspace, loop, "optimizer_step", 2, **command)  # of epoch 3
    if workspace.folder in path.parents:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert train(workspace, "--expect", "continue", **command) == 0
    assert differences(workspace.run_dir, continued) == []


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_continue_from_an_older_checkpoint_of_this_run(workspace, undisturbed, capsys):
    """The newer ones are named and kept. Once they are moved away the run goes on from the older
    one's weights: the records of its epochs stay, and the training is that of a new optimizer."""
    keys = dict(save_every_steps=2, **THREE_STEPS)
    shutil.copytree(undisturbed, workspace.run_dir)
    older = str(workspace.run_dir / "checkpoint_1")
    command = dict(load_model_path=older, resume=1, **keys)
    before = snapshot(workspace.run_dir)
    for flags in (["--expect", "continue"], ["--check"], []):
        assert train(workspace, *flags, **command) == 2
        assert "would overwrite checkpoint_2, checkpoint_3;" in capsys.readouterr().err
        assert snapshot(workspace.run_dir) == before
    for name in ("checkpoint_2", "checkpoint_3"):
        shutil.move(workspace.run_dir / name, workspace.folder)
    assert train(workspace, "--expect", "continue", **keys) == 2
    assert f"set load_model_path={older} resume=1" in capsys.readouterr().err
    assert train(workspace, "--expect", "continue", **command, num_epochs=2) == 0
    assert f"at epoch 2 from {older}, with a new optimizer state" in log_text(workspace)
    assert train(workspace, "--expect", "continue", **command) == 0
    assert names(workspace.run_dir) == ["checkpoint_1", "checkpoint_2", "checkpoint_3"]
    ours, theirs = history(workspace.run_dir), history(undisturbed)
    assert [r for r in ours if r["epoch"] == 1] == [r for r in theirs if r["epoch"] == 1]
    steps = [
        [(r["epoch"], r["global_step"]) for r in h if r["kind"] == "train"] for h in (ours, theirs)
    ]
    assert steps[0] == steps[1]


def test_a_run_from_its_own_weights_that_is_killed_has_the_rate_of_one_that_is_not(
    workspace, monkeypatch
):
    """Its schedule counts the epochs from that start on, and so it does after the kill."""
    keys = dict(lr_schedule="linear", save_every_steps=1, **THREE_STEPS)
    assert train(workspace, **keys) == 0
    for epoch in (2, 3):
        shutil.rmtree(workspace.run_dir / f"checkpoint_{epoch}")
    whole = workspace.run_dir.with_name("whole")
    shutil.copytree(workspace.run_dir, whole)
    own = lambda run_dir: dict(load_model_path=str(run_dir / "checkpoint_1"), resume=1, **keys)
    assert train(workspace, name="whole", **own(whole)) == 0
    killed(monkeypatch, workspace, loop, "optimizer_step", 5, **own(workspace.run_dir))
    assert train(workspace, **keys) == 0
    assert differences(workspace.run_dir, whole) == []
    rates = [r["lr"] for r in history(whole) if r["kind"] == "train" and r["epoch"] > 1]
    assert rates == pytest.approx([1e-3 * left / 6 for left in range(6, 0, -1)])


def test_the_checkpoint_and_its_epoch_in_the_config_of_its_own_run(workspace, undisturbed):
    """As the method's published instructions say: the newest one goes on with its optimizer."""
    assert train(workspace, **THREE_STEPS | dict(num_epochs=1)) == 0
    command = dict(load_model_path=str(workspace.run_dir / "checkpoint_1"), resume=1)
    assert train(workspace, "--expect", "continue", **command, **THREE_STEPS) == 0
    assert "new optimizer state" not in log_text(workspace)
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
    keys = dict(
        only_eval=True,
        train_path=None,
        load_model_path=str(path),
        batch_size_eval=3,  # as there: the same shapes, the same rounding
        eval_subset_size=3,
        max_new_tokens=4,
    )
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
    assert "epoch 3, stage 2, 0 latents (forced)" in examples.read_text()


CURRICULA = {
    "its own": dict(latent_growth="one"),
    "step by step": {},
    "all at once": dict(latent_growth="all"),
    "fewer latents": dict(c_thought=1),
    "fewer stages": dict(max_latent_stage=1),
    "longer stages": dict(epochs_per_stage=3),
    "no curriculum": dict(schedule="last_stage"),
    "by a gate": dict(advance_at=0.9),
}


def test_a_forced_number_is_evaluated_at_the_stage_of_the_checkpoint(workspace):
    """Under another curriculum it recorded that one's stage, and CoT match was compared with the
    steps that this one would have skipped."""
    path = Path(workspace.values["val_path"])
    rows = [{**row, "steps": row["steps"][:3]} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))
    grown = dict(latent_growth="one", max_latent_stage=3, num_epochs=4)
    assert train(workspace, name="grown", **THREE_STEPS | grown) == 0
    expected = results(workspace, "results_epoch_3.jsonl", "grown")
    assert {(row["stage"], row["num_latents"]) for row in expected} == {(3, 3)}
    assert [row["cot_match"] is None for row in expected] == [True, True, False]  # 0, 2, 3 steps
    path = str(workspace.run_dir.with_name("grown") / "checkpoint_3")
    keys = THREE_STEPS | dict(only_eval=True, load_model_path=path, eval_num_latents=3)
    for name, changes in CURRICULA.items():
        assert train(workspace, name=name, **keys | dict(max_latent_stage=3) | changes) == 0
        assert results(workspace, "results_epoch_3_latents_3.jsonl", name) == expected, name


def test_an_evaluation_gives_short_chains_the_latents_of_the_training(workspace):
    """Two thoughts of three latents are as many as three of two, where a chain has three steps."""
    keys = THREE_STEPS | dict(schedule="last_stage", pad_latent_to_max=False)
    whole = keys | dict(num_epochs=1, c_thought=2, max_latent_stage=3)
    assert train(workspace, name="whole", **whole) == 0
    path = str(workspace.run_dir.with_name("whole") / "checkpoint_1")
    keys |= dict(only_eval=True, load_model_path=path, c_thought=3, max_latent_stage=2)
    assert train(workspace, name="eval", **keys) == 0
    file = "results_epoch_1.jsonl"
    assert results(workspace, file) == results(workspace, file, "whole")


def test_a_forced_number_at_an_epoch_of_another_stage_is_refused(workspace, undisturbed, capsys):
    path = str(undisturbed / "checkpoint_3")
    keys = dict(only_eval=True, load_model_path=path, resume=1, eval_num_latents=4)
    assert train(workspace, name="eval", **keys) == 2
    assert "checkpoint_3 was trained with 4 latents and 2 steps skipped" in capsys.readouterr().err
    assert train(workspace, name="eval", **keys | dict(resume=2)) == 0  # the same stage


def test_all_numbers_of_another_curriculum_are_refused(workspace, undisturbed, capsys):
    """Those of the config went to 2, without the 4 that the checkpoint was trained with."""
    path = str(undisturbed / "checkpoint_3")
    keys = dict(only_eval=True, load_model_path=path, eval_num_latents="all", max_latent_stage=1)
    assert train(workspace, name="eval", **keys) == 2
    said = f"all is [0, 2] by this config, and [0, 2, 4] by that which {path} was trained with"
    assert said in capsys.readouterr().err
    assert not workspace.run_dir.with_name("eval").exists()


def test_evaluation_at_another_stage_is_refused(workspace, undisturbed, capsys):
    """A wrong `resume` would change the number of latents in silence."""
    path = str(undisturbed / "checkpoint_3")
    assert train(workspace, name="eval", only_eval=True, load_model_path=path, resume=1) == 2
    assert "resume" in capsys.readouterr().err
    assert not workspace.run_dir.with_name("eval").exists()


def test_an_evaluation_under_the_name_of_a_training_leaves_the_training_as_it_is(workspace, capsys):
    """It is refused, and nothing in the folder changes."""
    assert train(workspace, num_epochs=1, **ONE_STEP) == 0
    whole = lambda: {p: p.read_bytes() for p in workspace.run_dir.rglob("*") if p.is_file()}
    before, path = whole(), str(workspace.run_dir / "checkpoint_1")
    assert train(workspace, only_eval=True, load_model_path=path, eval_num_latents=0) == 2
    assert f"{workspace.run_dir} holds a training; give the eval" in capsys.readouterr().err
    assert whole() == before


def test_resume_needs_the_optimizer_state(workspace, capsys):
    assert train(workspace, num_epochs=1, **ONE_STEP) == 0
    shutil.rmtree(workspace.run_dir / "checkpoint_1" / "training_state")
    assert train(workspace, num_epochs=2, **ONE_STEP) == 2
    assert "weights only" in capsys.readouterr().err
