"""torchrun with two processes: all stages, signals, kills, a failing rank, evaluation."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import soak
import torch
from conftest import ROOT, Workspace
from numerics import assert_as_exact_as, in_float64
from safetensors import safe_open
from safetensors.torch import load_file
from soak import TRAINING, differences, history, kill_family, launch, wait_until

import run
from engine.checkpoint import lock_run_dir
from utils import UserError

pytestmark = pytest.mark.slow
FAILING_RANK = """
import sys
sys.path.insert(0, {root!r})
import os, run
from engine import loop

def optimizer_step(training, *args):
    if training.state.global_step == 2 and os.environ["RANK"] == "1":
        raise RuntimeError("rank 1 feels ill")
    return healthy(training, *args)

healthy, loop.optimizer_step = loop.optimizer_step, optimizer_step
sys.exit(run.record(run.main)())
"""

FULL_DISK = """
import sys
sys.path.insert(0, {root!r})
import errno, os, run
from engine import partial

def add(self, part, results):
    if os.environ["RANK"] == "1":
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
    return healthy(self, part, results)

healthy, partial.PartialResults.add = partial.PartialResults.add, add
sys.exit(run.record(run.main)())
"""

DAMAGED = """
import sys
sys.path.insert(0, {root!r})
import os, run
from engine import model
from utils import UserError

def load_base(*args):
    assert os.environ["RANK"] == "0"
    raise UserError("checkpoint: the disk has lost it")

model.load_base = load_base
sys.exit(run.record(run.main)())
"""

IN_FLOAT64 = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import numerics, run

with numerics.in_float64():
    sys.exit(run.record(run.main)())
"""


@pytest.fixture(scope="module")
def space(model_folder, tmp_path_factory) -> Workspace:
    """One workspace for all tests here: 96 rows, 24 steps an epoch with two processes."""
    space = Workspace(model_folder, tmp_path_factory.mktemp("end_to_end"))
    path = Path(space.values["train_path"])
    path.write_text(json.dumps(json.loads(path.read_text()) * 4))
    return space


@pytest.fixture(scope="module")
def undisturbed(space) -> Path:
    """The run folder of a two-process training that nothing happened to."""
    log = space.folder / "undisturbed.log"
    process = launch(ROOT / "run.py", space.yaml(name="undisturbed", **TRAINING), log=log)
    assert not wait_until(lambda: False, process) and process.returncode == 0, log.read_text()
    return space.run_dir.with_name("undisturbed")


# the same training in one process, in two divisions into micro-batches
ALONE = [{**TRAINING, "batch_size_training": size, "num_workers": 0} for size in (2, 4)]


@pytest.fixture(scope="module")
def alone(space) -> list[Path]:
    """Their run folders."""
    for number, keys in enumerate(ALONE):
        assert run.main([str(space.yaml(name=f"alone_{number}", **keys))]) == 0
    return [space.run_dir.with_name(f"alone_{number}") for number in range(len(ALONE))]


@pytest.fixture(scope="module")
def truth(space) -> Path:
    """The run folder of the same training in float64."""
    with in_float64():
        assert run.main([str(space.yaml(name="truth", **ALONE[0]))]) == 0
    return space.run_dir.with_name("truth")


def figures(run_dir: Path) -> dict[str, torch.Tensor]:
    """Losses and norms of all records."""
    records = history(run_dir)
    return {
        name: torch.tensor([r[name] for r in records if name in r], dtype=torch.float64)
        for name in ("loss", "grad_norm")
    }


def test_two_processes_through_all_stages(space, undisturbed):
    records = history(undisturbed)
    assert [r["kind"] for r in records] == (["train"] * 24 + ["eval"]) * 3 + ["eval"]
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["global_step"] for r in steps] == list(range(1, 73))
    assert [r["stage"] for r in steps[::24]] == [1, 2, 2]
    log = (undisturbed / "training.log").read_text()
    assert "4 rows per optimizer step (processes: 2, micro-batches: 1 each, of" in log
    assert log.count("epoch 2: stage 2") == 1  # the other rank is silent
    assert "Traceback" not in (space.folder / "undisturbed.log").read_text()
    for epoch in (1, 2, 3):
        text = (undisturbed / f"results_epoch_{epoch}.jsonl").read_text()
        assert [json.loads(line)["row"] for line in text.splitlines()] == list(range(6))


def test_tied_weights_are_saved_once(undisturbed):
    """Gathered from shards, the two names of tied embeddings no longer share memory: the head
    was once saved a second time."""
    with safe_open(undisturbed / "checkpoint_3" / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_one_process_trains_the_same(undisturbed, alone, truth):
    """The same rows per step: losses and norms are as exact with two processes as with one."""
    assert_as_exact_as(figures(undisturbed), [*map(figures, alone)], figures(truth))


def test_sigterm_saves_and_any_number_of_processes_goes_on(space, undisturbed, alone, truth):
    """torchrun hands SIGTERM on; the same command then ends bit-identical. A copy of the
    interrupted run goes on with one process: same rows, losses that are as exact."""
    name, run_dir = "interrupted", space.run_dir.with_name("interrupted")
    log = space.folder / f"{name}.log"
    process = launch(ROOT / "run.py", space.yaml(name=name, **TRAINING), log=log)
    metrics = run_dir / "metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 26, process)
    os.kill(process.pid, signal.SIGTERM)
    assert not wait_until(lambda: False, process) and process.returncode != 0
    assert "all is saved" in log.read_text(), log.read_text()
    newest = soak.find_checkpoints(run_dir)[-1]
    assert newest.epoch == 2 and newest.step is not None
    shutil.copytree(run_dir, space.run_dir.with_name("alone_on"))

    process = launch(ROOT / "run.py", space.yaml(name=name, **TRAINING), log=log)
    assert not wait_until(lambda: False, process) and process.returncode == 0, log.read_text()
    assert differences(run_dir, undisturbed) == []

    assert run.main([str(space.yaml(name="alone_on", **ALONE[0]))]) == 0
    ours, theirs = history(space.run_dir.with_name("alone_on")), history(undisturbed)
    assert [(r["epoch"], r.get("samples_seen")) for r in ours] == [
        (r["epoch"], r.get("samples_seen")) for r in theirs
    ]
    naive = [figures(folder) for folder in (undisturbed, *alone)]
    assert_as_exact_as(figures(space.run_dir.with_name("alone_on")), naive, figures(truth))


def test_adapters_are_killed_and_go_on(space):
    """As whole weights: SIGKILL within the second epoch, then bit-identical. The first epoch is
    without latents; a warning of a library in it was the first that a reader of the log saw."""
    keys = {**TRAINING, "lora_r": 4, "bf16": True, "num_epochs": 2, "eval_subset_size": 2}
    keys |= {"schedule": "paper"}
    keys |= {"max_new_tokens": 2, "save_every_steps": 5, "num_workers": 0}
    run_dirs = [space.run_dir.with_name(f"adapters_{number}") for number in range(2)]
    for run_dir in run_dirs:
        log = space.folder / f"{run_dir.name}.log"
        start = lambda: launch(ROOT / "run.py", space.yaml(name=run_dir.name, **keys), log=log)
        process = start()
        if run_dir is run_dirs[1]:
            newest = run_dir / "checkpoint_2_step_5"
            assert wait_until(newest.exists, process), log.read_text()
            kill_family(process)
            process = start()
        assert not wait_until(lambda: False, process) and process.returncode == 0, log.read_text()
    assert [r["stage"] for r in history(run_dirs[0]) if r["kind"] == "eval"][:2] == [0, 1]
    assert "Warning" not in (space.folder / f"{run_dirs[0].name}.log").read_text()
    assert differences(*run_dirs) == []
    assert not list((run_dirs[0] / "checkpoint_2").glob("model*"))


def test_killed_at_random_instants(space, undisturbed):
    """SIGKILL for launcher and workers; tests/soak.py runs this with more kills."""
    kills = int(os.environ.get("SOAK_KILLS", "2"))
    assert soak.soak(space, undisturbed, kills, int(os.environ.get("SOAK_SEED", "0"))) == []


def test_orphans_of_a_killed_launcher_keep_others_out(space, capsys):
    """SIGKILL of torchrun leaves its workers running: a second start must not write between
    them. When they are gone too, the run goes on."""
    name, run_dir = "orphans", space.run_dir.with_name("orphans")
    keys = {**TRAINING, "num_workers": 0, "num_epochs": 9, "lr_schedule": "constant"}
    config = space.yaml(name=name, **keys)
    process = launch(ROOT / "run.py", config, log=space.folder / f"{name}.log")
    assert wait_until(lambda: (run_dir / "metrics.jsonl").exists(), process)
    workers = soak.family(process.pid)[1:]
    process.kill()
    process.wait()
    before = (run_dir / "config.yaml").read_bytes()
    try:
        assert run.main([str(config)]) == 2
        assert "is writing to this run folder" in capsys.readouterr().err
        assert (run_dir / "config.yaml").read_bytes() == before
    finally:
        for pid in workers:
            soak.send(pid, signal.SIGKILL)
    deadline = time.monotonic() + soak.PATIENCE
    while time.monotonic() < deadline:  # a killed process lets go of the lock a moment later
        with contextlib.suppress(UserError):
            lock_run_dir(run_dir).close()
            break
        time.sleep(0.05)
    following = max((record["epoch"] for record in history(run_dir)), default=0) + 1
    assert run.main([str(config), f"num_epochs={following}"]) == 0
    assert history(run_dir)[-1]["epoch"] == following


def test_an_exception_on_one_rank_ends_all(space):
    """Within a minute, not after the two hours that a collective call may wait; the message of
    that rank is shown."""
    script = space.folder / "failing_rank.py"
    script.write_text(FAILING_RANK.format(root=str(ROOT)))
    log = space.folder / "failing.log"
    process = launch(script, space.yaml(name="failing", **TRAINING), log=log)
    failed = wait_until(lambda: "rank 1 feels ill" in log.read_text(), process)
    try:
        process.wait(60)
    finally:
        kill_family(process)
    assert failed and process.returncode == 1
    assert len(history(space.run_dir.with_name("failing"))) == 2


def test_a_disk_that_is_full_on_one_rank_ends_all(space, undisturbed):
    """And is told, though it is not the main one."""
    script, log = space.folder / "full_disk.py", space.folder / "full_disk.log"
    script.write_text(FULL_DISK.format(root=str(ROOT)))
    keys = dict(load_model_path=str(undisturbed / "checkpoint_3"), only_eval=True)
    process = launch(script, space.yaml(name="full", **{**TRAINING, **keys}), log=log)
    try:
        process.wait(120)
    finally:
        kill_family(process)
    assert process.returncode == 1 and "No space left on device" in log.read_text()


@pytest.mark.parametrize("only_eval", [False, True])
def test_weights_that_the_main_process_cannot_read(space, undisturbed, only_eval):
    """One line and exit code 2; the other process, which reads none, waits for no weights."""
    script, log = space.folder / "damaged.py", space.folder / "damaged.log"
    script.write_text(DAMAGED.format(root=str(ROOT)))
    keys = dict(load_model_path=str(undisturbed / "checkpoint_3")) if only_eval else {}
    config = space.yaml(name="damaged", **{**TRAINING, **keys, "only_eval": only_eval})
    process = launch(script, config, log=log)
    try:
        process.wait(120)
    finally:
        kill_family(process)
    lines = log.read_text().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        "error: checkpoint: the disk has lost it"
    ]
    assert any("exitcode  : 2" in line for line in lines), log.read_text()
    assert not space.run_dir.with_name("damaged").exists()


def test_the_script_continues_from_a_published_checkpoint(space, undisturbed):
    """As its instructions say: the file and its epoch in the YAML, an empty run folder. Started by
    sh, stopped by SIGTERM, and started again it ends as a run that nothing happened to."""
    file = space.folder / "checkpoint_1"
    weights = load_file(undisturbed / "checkpoint_1" / "model.safetensors")
    torch.save({f"base_causallm.{name}": tensor for name, tensor in weights.items()}, file)
    keys = TRAINING | dict(load_model_path=str(file), resume=1, num_epochs=2, num_workers=0)
    assert run.main([str(space.yaml(name="at_once", **keys)), "--expect", "continue"]) == 0
    command = ["sh", "train_continue_fresh.sh", str(space.yaml(name="by_script", **keys))]
    run_dir, log = space.run_dir.with_name("by_script"), space.folder / "by_script.log"
    metrics = run_dir / "metrics.jsonl"
    for interrupted in (True, False):
        with open(log, "w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"NPROC_PER_NODE": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if interrupted:
            assert wait_until(lambda: metrics.exists() and metrics.read_text(), process)
            os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: False, process)
        assert process.returncode == (3 if interrupted else 0), log.read_text()
        begins = f"at epoch 2 from {file}, with a new optimizer state"
        assert (begins in log.read_text()) == interrupted
    assert differences(run_dir, space.run_dir.with_name("at_once")) == []


def test_evaluation_on_more_ranks_than_rows(space, undisturbed):
    """Three processes, two rows: their results are those of one process that takes both at once;
    in float64, where no rounding chooses another token."""
    keys = dict(
        only_eval=True,
        load_model_path=str(undisturbed / "checkpoint_3"),
        eval_subset_size=2,
        batch_size_eval=2,
    )
    with in_float64():
        assert run.main([str(space.yaml(name="eval_alone", **keys))]) == 0
    script, log = space.folder / "exact.py", space.folder / "eval.log"
    script.write_text(IN_FLOAT64.format(root=str(ROOT)))
    process = launch(script, space.yaml(name="eval", **keys), num_processes=3, log=log)
    assert not wait_until(lambda: False, process) and process.returncode == 0, log.read_text()
    ours, theirs = (
        (space.run_dir.with_name(name) / "results_epoch_3.jsonl").read_text().splitlines()
        for name in ("eval", "eval_alone")
    )
    assert len(ours) == 2 and ours == theirs
    (record,) = history(space.run_dir.with_name("eval"))
    assert record["rows"] == 2 and record["kind"] == "eval"
