"""Kill a training at random instants, start it again, and compare it with one left alone:

    python tests/soak.py 50

Two processes under torchrun; launcher and workers die by SIGKILL, also while they write a
checkpoint. The training goes on until it is done, then another one starts, until all kills have
happened. The weights must be bit-identical to those of the undisturbed run, metrics and examples
without gap or duplicate. The short form is test_end_to_end.py's.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT  # first: it makes our modules importable
from safetensors.torch import load_file

from engine.checkpoint import find_checkpoints
from engine.files import WRITING

CLOCKS = {"time", "seconds", "waiting", "seconds_per_row"}  # differ between equal runs
PATIENCE = 300  # seconds after which a launch counts as hanging
# a longer and richer training than the other tests': 24 steps an epoch, all draws in use
TRAINING = dict(
    batch_size_training=2,
    gradient_accumulation_steps=None,
    rows_per_step=4,  # on any number of processes
    lr_schedule="cosine",
    warmup_steps=5,
    uniform_prob=0.3,
    num_workers=1,
    batch_size_eval=2,
)

# ------------------------------------------------------------------------------- comparing


def history(run_dir: Path) -> list[dict]:
    """The records of metrics.jsonl without their clocks."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def newest_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The whole model's or, with lora_r, those of the adapters."""
    (path,) = find_checkpoints(run_dir)[-1].path.glob("*model.safetensors")
    return load_file(path)


def differences(run_dir: Path, undisturbed: Path) -> list[str]:
    """One line for everything in which a run differs from the one left alone."""
    problems = []
    ours, theirs = newest_weights(run_dir), newest_weights(undisturbed)
    if ours.keys() != theirs.keys():
        problems.append(f"names of the weights: {ours.keys() ^ theirs.keys()}")
    else:
        problems += [
            f"weights: {name}" for name in ours if not torch.equal(ours[name], theirs[name])
        ]
    records, expected = history(run_dir), history(undisturbed)
    if len(records) != len(expected):
        problems.append(f"metrics.jsonl: {len(records)} records instead of {len(expected)}")
    different = [f"{a} instead of {b}" for a, b in zip(records, expected) if a != b]
    problems += [f"metrics.jsonl: {line}" for line in different[:1]]
    names = {path.name for folder in (run_dir, undisturbed) for path in folder.glob("results_*")}
    for name in sorted(names | {"validation_examples.txt"}):
        texts = [
            (folder / name).read_text()
            for folder in (run_dir, undisturbed)
            if (folder / name).exists()
        ]
        if len(texts) != 2 or texts[0] != texts[1]:
            problems.append(f"{name} differs")
    return problems


# ------------------------------------------------------------------------------- processes


def launch(script: Path, *args, num_processes: int = 2, log: Path) -> subprocess.Popen:
    """A script under torchrun, its output in a log file."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
        str(script),
        *map(str, args),
    ]
    with open(log, "w") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def family(pid: int) -> list[int]:
    """A process and all its descendants; workers have sessions of their own."""
    pids = [pid]
    for member in pids:
        for children in Path("/proc").glob(f"{member}/task/*/children"):
            pids += map(int, children.read_text().split())
    return pids


def kill_family(process: subprocess.Popen) -> None:
    """SIGKILL for launcher, workers and their helpers, at one instant: stopped first, so that
    nobody starts another one in between."""
    stopped = set()
    while new := set(family(process.pid)) - stopped:
        for pid in new:
            send(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        send(pid, signal.SIGKILL)
    process.wait()


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended by itself


def wait_until(condition, process: subprocess.Popen, interval: float = 0.02) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None:
        if condition():
            return True
        if time.monotonic() > deadline:
            kill_family(process)
            raise TimeoutError(f"a launch hangs: {PATIENCE} s")
        time.sleep(interval)
    return False


# ------------------------------------------------------------------------------- killing


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_writing(run_dir: Path) -> bool:
    return any(WRITING in path.name for path in run_dir.glob("*")) if run_dir.exists() else False


def wait_for_instant(process, run_dir: Path, rng: random.Random) -> str | None:
    """Let a random time pass; the kind of instant then, None when the run ended before."""
    kind = rng.choice(("starting", "training", "writing", "writing"))
    metrics = run_dir / "metrics.jsonl"
    before = _size(metrics)
    if kind == "starting":
        pause = rng.uniform(0, 12)
    elif kind == "training":
        if not wait_until(lambda: _size(metrics) > before, process):
            return None
        pause = rng.uniform(0, 2)
    else:
        wait_until(lambda: _size(metrics) != before, process)
        for _ in range(rng.randint(1, 3)):
            if not wait_until(lambda: _is_writing(run_dir), process, interval=0.0005):
                return None
        pause = rng.uniform(0, 0.05)
    end = time.monotonic() + pause
    return None if not wait_until(lambda: time.monotonic() > end, process, 0.001) else kind


def train_with_kills(yaml: Path, run_dir: Path, limit: int, rng: random.Random) -> list[str]:
    """Run to the end with at most so many kills; what was killed in what state."""
    kills, log = [], yaml.with_suffix(".log")
    while True:
        process = launch(ROOT / "run.py", yaml, log=log)
        if len(kills) < limit:
            kind = wait_for_instant(process, run_dir, rng)
        else:
            kind = wait_until(lambda: False, process) or None
        if kind:
            left = "a half-written checkpoint" if _is_writing(run_dir) else "nothing half written"
            kill_family(process)
            kills.append(f"{kind}, {left}")
        elif process.returncode:
            raise RuntimeError(f"a launch failed:\n{log.read_text()[-4000:]}")
        else:
            return kills


def soak(workspace, undisturbed: Path, kills: int, seed: int = 0) -> list[str]:
    """Kill trainings so many times in all; everything in which one differs from undisturbed."""
    rng, survived, problems, number = random.Random(seed), 0, [], 0
    while survived < kills and not problems:
        number += 1
        name = f"soak_{number}"
        yaml = workspace.yaml(name=name, save_every_steps=rng.randint(3, 9), **TRAINING)
        run_dir = workspace.run_dir.with_name(name)
        happened = train_with_kills(yaml, run_dir, kills - survived, rng)
        survived += len(happened)
        problems = [f"{name}: {line}" for line in differences(run_dir, undisturbed)]
        print(f"{name}: {len(happened)} kills ({'; '.join(happened)})", flush=True)
    verdict = "bit-identical to the undisturbed run" if not problems else "DIFFERENT"
    print(f"{survived} kills survived in {number} trainings: {verdict}", flush=True)
    return problems


if __name__ == "__main__":
    os.environ["SOAK_KILLS"] = sys.argv[1]
    test = f"{ROOT}/tests/test_end_to_end.py::test_killed_at_random_instants"
    sys.exit(pytest.main(["-q", "-s", "--tb=short", test]))
