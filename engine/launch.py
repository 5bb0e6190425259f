"""This process as its launcher describes it, and the GPUs that it may use: known before any group
of processes is open."""

import os
import shutil
import subprocess
from typing import NamedTuple

import torch

from utils import UserError

NEEDED_DRIVER = 580  # for CUDA 13, with which torch 2.13 comes
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE")
LAUNCH_VARIABLES = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")
BY_TORCHRUN = "unset them for one process, or start by torchrun, which sets all of them"


class Launch(NamedTuple):
    """This process as its launcher describes it in the environment. alone: it has no group."""

    rank: int = 0
    local_rank: int = 0  # on its node; the global rank names no GPU on several nodes
    alone: bool = True
    node: int = 0  # torchrun's GROUP_RANK; one node where something else started the processes
    num_nodes: int = 1


def read_launch() -> Launch:
    """What torchrun, or a cluster, set; an empty variable counts as none. Raises UserError where
    it describes several processes by halves."""
    values = {name: os.environ.get(name, "").strip() for name in LAUNCH_VARIABLES}
    given = {name: value for name, value in values.items() if value}
    seen = ", ".join(f"{name}={value}" for name, value in given.items())
    numbers = {name: given[name] for name in NUMBERS if name in given}
    if not all(value.isascii() and value.isdigit() for value in numbers.values()):
        raise UserError(f"{seen}: {', '.join(numbers)} must be numbers; {BY_TORCHRUN}")
    rank, size = int(numbers.get("RANK", 0)), int(numbers.get("WORLD_SIZE", 1))
    local_rank = int(numbers.get("LOCAL_RANK", 0))
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if rank >= size or (size > 1 and lacking):
        lacks = f", without {', '.join(lacking)}" if size > 1 and lacking else ""
        raise UserError(f"{seen}{lacks}: no description of several processes; {BY_TORCHRUN}")
    if 0 < (gpus := count_gpus()) <= local_rank:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but there are {gpus} GPUs here; start as many processes on "
            "each machine"
        )
    node, num_nodes = int(numbers.get("GROUP_RANK", 0)), int(numbers.get("GROUP_WORLD_SIZE", 1))
    if "GROUP_WORLD_SIZE" in given:
        _check_slurm_tasks(num_nodes)
    alone = "WORLD_SIZE" not in given or bool(lacking)
    return Launch(rank, local_rank, alone, node, num_nodes)


def _check_slurm_tasks(num_nodes: int) -> None:
    """Raise UserError where each of several SLURM tasks has started a training of its own."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "").strip()
    if tasks.isdigit() and int(tasks) not in (1, num_nodes):
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={tasks}, but this torchrun knows of {num_nodes} node(s): every "
            "task would train by itself in the same run folder; start one torchrun on each node "
            "(srun --ntasks-per-node 1 torchrun --nnodes N), or unset that variable where only one "
            "task starts it"
        )


def count_gpus() -> int:
    """GPUs that can be used; with a driver too old torch counts them all the same."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def unused_gpu() -> str | None:
    """Why an NVIDIA GPU of this machine cannot be used, in words; None where it can, or where there
    is none."""
    driver = None if torch.cuda.is_available() else _nvidia_driver()
    if driver is None:
        return None
    build = f"PyTorch {torch.__version__.split('+')[0]}"
    if torch.version.cuda is None:
        return (
            f"{build} is a build for the CPU (NVIDIA driver {driver}); install a CUDA build of it"
        )
    return (
        f"the NVIDIA driver is {driver}, and {build} for CUDA {torch.version.cuda} needs "
        f"{NEEDED_DRIVER} or newer: update it, or install the CUDA 12.6 build of the same version"
    )


def _nvidia_driver() -> str | None:
    """The driver's version; None where there is no NVIDIA GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    versions = done.stdout.split()
    return versions[0] if done.returncode == 0 and versions else None


def is_main_process() -> bool:
    """Whether this is the process that speaks; known before the group is open."""
    try:
        return read_launch().rank == 0
    except UserError:  # whoever finds that says so
        return True
