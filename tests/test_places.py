"""Where people run it: clusters, containers, quotas, file systems, paths, accounts."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
import yaml
from conftest import ROOT, files_of_at_most
from transformers import PreTrainedTokenizerBase

import run
import utils
from engine import checkpoint, loop, preflight
from engine.checkpoint import find_checkpoints, is_no_room
from engine.distributed import World, open_processes
from engine.files import cache_dir
from engine.launch import (
    LAUNCH_VARIABLES,
    Launch,
    count_gpus,
    is_main_process,
    read_launch,
    unused_gpu,
)
from engine.stop import STOPPING, Stop
from loader import load_config
from rules import make_config
from utils import UserError

SMALL = dict(num_epochs=2, batch_size_training=24, eval_subset_size=1, max_new_tokens=1)

# ------------------------------------------------------------------------------- the launcher


@pytest.fixture
def environment(monkeypatch):
    for name in (*LAUNCH_VARIABLES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(WORLD_SIZE="1"),
        dict(WORLD_SIZE="1", RANK="0"),
        dict(WORLD_SIZE="", RANK="", LOCAL_RANK="", MASTER_ADDR="", MASTER_PORT=""),
        dict(LOCAL_RANK=""),
        dict(MASTER_ADDR="node-0", MASTER_PORT="29500"),
        dict(WORLD_SIZE="1", MASTER_ADDR="node-0"),
    ],
    ids=str,
)
def test_one_process_where_that_is_meant(environment, values):
    environment(**values)
    world = open_processes()
    assert (world.rank, world.world_size) == (0, 1) and is_main_process()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(RANK="1"), "RANK=1"),
        (dict(WORLD_SIZE="2"), "without RANK, MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="a"), "without MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="2", MASTER_ADDR="a", MASTER_PORT="1"), "RANK=2"),
        (dict(WORLD_SIZE="two"), "must be numbers"),
        (dict(WORLD_SIZE="2", RANK="-1"), "must be numbers"),
        (dict(LOCAL_RANK="1.0"), "must be numbers"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE=0"),
    ],
    ids=str,
)
def test_half_a_description_is_one_line(environment, workspace, capsys, values, words):
    """Each was a traceback, of a missing variable or of int()."""
    environment(**values)
    assert run.main([str(workspace.yaml())]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "torchrun" in line


def test_torchrun_describes_all(environment):
    environment(WORLD_SIZE="4", RANK="3", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="29500")
    assert read_launch() == Launch(3, 0, alone=False) and not is_main_process()


def torchrun(node: int = 1, nodes: int = 2, tasks: int | str = "") -> dict[str, str]:
    """What torchrun sets in the first process of a node of eight, in one of several SLURM tasks."""
    values = dict(WORLD_SIZE=8 * nodes, RANK=8 * node, LOCAL_RANK=0, GROUP_RANK=node)
    values |= dict(GROUP_WORLD_SIZE=nodes, MASTER_ADDR="node-0", MASTER_PORT=29500)
    return {name: str(value) for name, value in (*values.items(), ("SLURM_STEP_NUM_TASKS", tasks))}


@pytest.mark.parametrize("tasks", ["", 1, 2])
def test_torchrun_describes_nodes(environment, tasks):
    """SLURM has started one torchrun on each node, or somebody by hand."""
    environment(**torchrun(tasks=tasks))
    assert read_launch() == Launch(rank=8, local_rank=0, alone=False, node=1, num_nodes=2)


@pytest.mark.parametrize(
    "processes, nodes, shards", [(1, 1, 1), (8, 1, 8), (16, 2, 8), (2, 2, 2), (4, 4, 4)]
)
def test_a_model_is_divided_within_a_node(processes, nodes, shards):
    """Or among the nodes where each has one process: it would hold all of it twice."""
    assert World(0, processes, torch.device("cpu"), nodes).num_shards == shards


@pytest.mark.parametrize("tasks, nodes", [(16, 2), (8, 1), (2, 1)])
def test_a_training_in_every_slurm_task_is_one_line(environment, workspace, capsys, tasks, nodes):
    """All of them wrote to one run folder."""
    environment(**torchrun(node=0, nodes=nodes, tasks=tasks))
    assert run.main([str(workspace.yaml())]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"SLURM_STEP_NUM_TASKS={tasks}" in line and f"{nodes} node(s)" in line
    assert "--ntasks-per-node 1" in line


def test_slurm_without_torchrun_is_no_matter(environment):
    """A shell that was given eight tasks and starts one process; tasks with runs of their own."""
    environment(SLURM_STEP_NUM_TASKS="8")
    assert read_launch() == Launch()


@pytest.mark.parametrize("own, shared, wanted", [(0, 0, 1), (4, 0, None), (4, 1, 1)])
def test_a_tiny_model_has_one_thread(monkeypatch, own, shared, wanted):
    """But where the user wants more. With a share of the cores it once had all of that."""
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for name, value in (("OMP_NUM_THREADS", own), (utils.SHARED_CORES, shared)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, str(value))
    run.limit_threads(torch.nn.Linear(2, 2))
    assert chosen == ([] if wanted is None else [wanted])


# ------------------------------------------------------------------------------- disks, locks


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_while_saving_leaves_what_was_there(workspace, monkeypatch, number):
    """A quota: the file system shows room, the write says no."""
    original = checkpoint.save_base

    def full(base, tensors, folder):
        if "checkpoint_2" in str(folder):
            raise OSError(number, os.strerror(number), str(folder))
        original(base, tensors, folder)

    monkeypatch.setattr(checkpoint, "save_base", full)
    assert run.main([str(workspace.yaml(**SMALL))]) == 1
    log = (workspace.run_dir / "training.log").read_text()
    assert "disk full: " in log and "checkpoints before it are intact" in log
    assert [actual.path.name for actual in find_checkpoints(workspace.run_dir)] == ["checkpoint_1"]
    assert not list(workspace.run_dir.glob("*writing*"))
    monkeypatch.undo()
    assert run.main([str(workspace.yaml(**SMALL))]) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_full_disks_of_libraries_are_known():
    """safetensors is written in Rust; its errors are no OSError."""
    with pytest.raises(OSError) as error, open("/dev/full", "w") as file:
        file.write("x" * 10**5)
    assert is_no_room(error.value)
    from_rust = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert is_no_room(checkpoint.SafetensorError(from_rust))
    assert not is_no_room(checkpoint.SafetensorError("header too large"))
    assert not is_no_room(OSError(errno.EIO, "broken"))
    wrapped = checkpoint.CheckpointException("", {0: (OSError(errno.EDQUOT, ""), None)})
    assert is_no_room(wrapped)


def test_a_full_disk_while_the_tokenizer_is_written(workspace, monkeypatch):
    """tokenizers is written in Rust too; its error is a bare Exception. A limit of the files' size
    stands for the full disk."""
    original = PreTrainedTokenizerBase.save_pretrained

    def full(tokenizer, folder, **options):
        with files_of_at_most(2000) if "checkpoint_2" in str(folder) else nullcontext():
            return original(tokenizer, folder, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert run.main([str(workspace.yaml(**SMALL))]) == 1
    assert "disk full: " in (workspace.run_dir / "training.log").read_text()
    assert [actual.path.name for actual in find_checkpoints(workspace.run_dir)] == ["checkpoint_1"]


def test_a_full_disk_while_writing_metrics(workspace, monkeypatch, capsys):
    def full(self, **record):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(loop.Metrics, "write", full)
    assert run.main([str(workspace.yaml(**SMALL))]) == 1
    assert "disk full" in (workspace.run_dir / "training.log").read_text()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(workspace, monkeypatch, caplog, number):
    """NFS without lockd, Lustre without -o flock: the run goes on, unguarded."""

    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert run.main([str(workspace.yaml(**SMALL))]) == 0
    assert "this file system has no locks" in caplog.text


# ------------------------------------------------------------------------------- signals, memory


def test_a_hang_up_saves_and_nohup_ignores_it(monkeypatch):
    """As a closed ssh session sends it."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = Stop()
        stop.all_saved = False
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = Stop()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_shared_memory_is_no_reason_to_stop(monkeypatch, caplog, tmp_path):
    loop.usable_workers.cache_clear()
    monkeypatch.setattr(loop, "SHARED_BYTES", 2**62)
    monkeypatch.setattr(loop, "SHARED_MEMORY", tmp_path)
    assert loop.usable_workers(2) == 0 and loop.usable_workers(2) == 0
    assert caplog.text.count("num_workers: 0") == 1
    loop.usable_workers.cache_clear()

    def refuse(self):
        raise RuntimeError("unable to open shared memory object\nand more")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    assert loop.usable_workers(1) == 0 and "unable to open shared memory" in caplog.text
    assert loop.usable_workers(0) == 0
    loop.usable_workers.cache_clear()


# ------------------------------------------------------------------------------- paths


def test_paths_as_a_shell_user_writes_them(workspace, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "/data/runs")
    config = load_config(workspace.yaml(save_path="~/out", train_path="$RUNS/a.json"))
    assert config.save_path == str(tmp_path / "out") and config.train_path == "/data/runs/a.json"
    assert load_config(workspace.yaml(model_id="Qwen/Qwen3-4B")).model_id == "Qwen/Qwen3-4B"
    for path in ("$NOT_SET/x", "${NOT_SET}/x", "~nobody_of_that_name/x"):
        with pytest.raises(UserError, match="not known here"):
            load_config(workspace.yaml(val_path=path))


def test_the_cache_is_the_users(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache" / "coconut"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "coconut"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = cache_dir()
    assert folder.is_dir() and cache_dir() == folder and caplog.text.count("cannot be written") == 1
    folder.rmdir()


@pytest.mark.slow
def test_an_installation_that_cannot_be_written(workspace, tmp_path):
    """In an image, or a folder shared by many: nothing is written into it."""
    project = tmp_path / "project"
    for name in ("engine", "preprocessing"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, project)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    command = [sys.executable, "-B", str(project / "run.py"), str(workspace.yaml()), "--check"]
    before = sorted(project.rglob("*"))
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert sorted(project.rglob("*")) == before


def test_scripts_source_their_own_file(tmp_path):
    """Not one of this name in PATH, nor in a folder that CDPATH names."""
    (tmp_path / "benchmarks").mkdir()
    for folder in (tmp_path, tmp_path / "benchmarks"):
        (folder / "setup.sh").write_text("echo somebody else\n")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"CDPATH": f".:{tmp_path}", "NPROC_PER_NODE": "none"}
    for script in sorted({*ROOT.glob("*.sh"), *ROOT.glob("*/*.sh")} - {ROOT / "setup.sh"}):
        text = script.read_text()
        assert "source ./setup.sh" in text and "unset CDPATH" in text, script
    command = ["bash", "train_fresh_start.sh", "no-such.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "NPROC_PER_NODE is 'none'" in done.stderr


@pytest.mark.slow
def test_a_yaml_is_looked_up_where_the_user_stands(workspace, tmp_path):
    shutil.copy(workspace.yaml(name="mine", **SMALL, debug=True), tmp_path / "mine.yaml")
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "train_fresh_start.sh"), "num_epochs=1", "mine.yaml"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # the script's own YAML is for those who give none, wherever theirs stands
    written = yaml.safe_load((workspace.folder / "out/mine/config.yaml").read_text())
    assert written["num_epochs"] == 1 and written["bf16"] is False


SCRIPT = [
    "bash",
    "-c",
    'set -euo pipefail; source "$0"; for a in "$@"; do where_it_is "$a"; echo; done',
]


def test_only_a_yaml_that_stands_where_the_user_does_is_looked_up(tmp_path):
    """Other arguments stay as they are, whatever they hold; without any there are none."""
    (tmp_path / "my own.yaml").touch()
    given = ["my own.yaml", "args/other.yaml", "name=a b", "--check"]
    environment = {**os.environ, "CALLED_FROM": str(tmp_path)}
    for arguments, wanted in ((given, [f"{tmp_path}/my own.yaml", *given[1:]]), ([], [])):
        command = [*SCRIPT, str(ROOT / "setup.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == wanted


@pytest.mark.parametrize("processes", ["0", "two", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_one_line(processes):
    environment = {**os.environ, "NPROC_PER_NODE": processes}
    script = ["bash", str(ROOT / "train_fresh_start.sh"), "no-such.yaml"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: NPROC_PER_NODE is '{processes}'; give the number of processes, from 1\n"
    )


def test_without_a_python_the_shell_that_asks_goes_on(tmp_path):
    """CONTRIBUTING.md sources setup.sh in the reader's own shell, which an exit would close."""
    shutil.copy(ROOT / "setup.sh", tmp_path)
    script = [shutil.which("bash"), "-c", 'source setup.sh; find_python; echo "still here, $?"']
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "still here, 2"
    assert done.stderr.startswith("error: Python 3.11 or newer is needed")


@pytest.mark.slow
def test_an_environment_that_is_half_made_is_completed(tmp_path):
    """Interrupted before it had pip; what else it holds stays. The package itself is nowhere."""
    shutil.copy(ROOT / "setup.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("no-such-package==1\n")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True
    )
    (tmp_path / ".venv" / "mine").touch()
    script = ["bash", "-c", "source setup.sh; find_python"]
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "No matching distribution found for no-such-package==1" in done.stderr
    assert (tmp_path / ".venv" / "mine").exists()


def can_unshare() -> bool:
    return subprocess.run(["unshare", "-u", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare") or not can_unshare(), reason="needs root")
def test_two_processes_on_a_host_that_no_dns_knows(workspace):
    """Its name was asked for, for more than four minutes."""
    config = workspace.yaml(name="nameless", debug=True, **SMALL)
    inner = f"hostname no-such-host; NPROC_PER_NODE=2 bash {ROOT}/train_fresh_start.sh {config}"
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    start = time.monotonic()
    done = subprocess.run(
        ["unshare", "-u", "bash", "-c", inner], env=environment, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert time.monotonic() - start < 200


# ------------------------------------------------------------------------------- values

COMMON = dict(name="x", save_path="x", coconut=True, model_id="x", train_path="x", val_path="x")


@pytest.mark.parametrize("value", [0, 0.0])
def test_no_clipping_is_said_with_a_zero_too(value):
    """It made every gradient zero."""
    assert make_config({**COMMON, "max_grad_norm": value}, "test").max_grad_norm is None


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(lr=0), "lr: 0 trains nothing"),
        (dict(max_grad_norm=-1), "below 0"),
        (dict(num_workers=10**6), "above 1000"),
        (dict(weight_decay=1000.0), "above 100"),
        (dict(name="x" * 300), "more than 200 bytes"),
        (dict(name="~"), "plain folder name"),
        (dict(seed=True), "seed: True is not int"),
        (dict(lr=True), "lr: True is not float"),
        (dict(keep_checkpoints=0), "below 1"),
        (dict(save_every_steps=0), "below 1"),
        (dict(eval_subset_size=0), "below 1"),
        (dict(only_eval=True, load_model_path="x", eval_num_latents=[]), "not a number from 0 to"),
    ],
    ids=str,
)
def test_values_that_could_not_be_meant(values, words):
    with pytest.raises(UserError, match=words):
        make_config({**COMMON, **values}, "test")


def test_the_schema_is_whole():
    """Every number has a lower limit or takes any value on purpose."""
    numbers = [n for n, kind in utils.TYPES.items() if "int" in str(kind) or "float" in str(kind)]
    free = {n for n in numbers if utils.FIELDS[n].metadata["low"] is None}
    assert free == {"eval_num_latents"}


# ------------------------------------------------------------------------------- drivers


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on PATH that says what the real one would."""

    def put(text: str, code: int = 0) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return put


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that can be used")
@pytest.mark.parametrize(
    "cuda, words",
    [
        ("13.0", "driver is 550.54.14, and PyTorch .* needs 580 or newer.*12.6"),
        (None, "for the CPU"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_said(workspace, nvidia_smi, monkeypatch, capsys, cuda, words):
    """An old driver: torch counts the GPUs all the same, and the script would start as many
    processes on the CPU."""
    nvidia_smi("550.54.14")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert count_gpus() == 0
    assert re.search(words, unused_gpu())
    assert run.main([str(workspace.yaml(**SMALL))]) == 0
    assert re.search(f"the GPU is not used: .*{words}", capsys.readouterr().out)
    monkeypatch.setattr(preflight, "MAX_CPU_PARAMETERS", 10)
    assert run.main([str(workspace.yaml(name="large", **SMALL))]) == 2
    assert re.search(f"needs a CUDA GPU, and .*{words}", capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that can be used")
def test_no_gpu_is_no_problem(nvidia_smi, monkeypatch):
    with monkeypatch.context() as patch:  # there may be one that is hidden, or too new for torch
        patch.setattr("engine.launch.shutil.which", lambda _: None)
        assert unused_gpu() is None
    nvidia_smi("NVIDIA-SMI has failed", code=9)
    assert unused_gpu() is None
