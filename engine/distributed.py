"""The processes of a run: group, sharding, reductions. The only file that imports torch.distributed
(engine/checkpoint.py: its .checkpoint part).

Everything works with one process too, where nothing is sharded and nothing is reduced: FSDP2
would keep a second, unsharded copy of the parameters there.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from utils import UserError

# a rank may encode the data or save a checkpoint while the others wait for it
TIMEOUT = timedelta(hours=2)
WATCH_SECONDS = 2
_closing = threading.Event()  # ends the threads that _fail_together starts
_watchers: list[threading.Thread] = []
NEEDED_DRIVER = 580  # for CUDA 13, with which torch 2.13 comes
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCH_VARIABLES = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")
BY_TORCHRUN = "unset them for one process, or start by torchrun, which sets all of them"


class World(NamedTuple):
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class Launch(NamedTuple):
    """This process as its launcher describes it in the environment. alone: it has no group."""

    rank: int = 0
    local_rank: int = 0  # on its node; the global rank names no GPU on several nodes
    alone: bool = True


def read_launch() -> Launch:
    """What torchrun, or a cluster, set; an empty variable counts as none. Raises UserError where
    it describes several processes by halves."""
    values = {name: os.environ.get(name, "").strip() for name in LAUNCH_VARIABLES}
    given = {name: value for name, value in values.items() if value}
    seen = ", ".join(f"{name}={value}" for name, value in given.items())
    numbers = {name: given[name] for name in NUMBERS if name in given}
    if not all(value.isascii() and value.isdigit() for value in numbers.values()):
        raise UserError(f"{seen}: RANK, WORLD_SIZE and LOCAL_RANK must be numbers; {BY_TORCHRUN}")
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
    return Launch(rank, local_rank, alone="WORLD_SIZE" not in given or bool(lacking))


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


def choose_device(local_rank: int = 0) -> torch.device:
    """The GPU of this process, set up; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # reported on Hopper and Blackwell: NaN for rows that a mask hides, and for padded lengths
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")  # of float32 training: TF32 products
    return device


def open_processes() -> World:
    """Join the group that torchrun describes; alone without torchrun. NCCL on CUDA, else gloo."""
    launch = read_launch()
    device = choose_device(launch.local_rank)
    if launch.alone:
        return World(0, 1, device)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    _fail_together(dist.PrefixStore("failures", store), rank)
    return World(rank, world_size, device)


def _fail_together(store: dist.Store, rank: int) -> None:
    """An exception on one rank ends all of them within seconds.

    The others may wait for it in a collective call, where no signal handler runs, for as long as
    TIMEOUT; a thread of theirs looks for its message.
    """
    usual_hook = sys.excepthook

    def tell_and_report(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        usual_hook(kind, error, traceback)
        store.set("failed", f"rank {rank}: {kind.__name__}: {error}")

    def watch() -> None:
        try:
            while not store.check(["failed"]):
                if _closing.wait(WATCH_SECONDS):
                    return
        except RuntimeError:  # the process that holds the store has ended
            return
        message = store.get("failed").decode()
        time.sleep(WATCH_SECONDS)  # the failed rank itself ends by its own exception
        print(f"rank {rank} ends because of {message}", file=sys.stderr, flush=True)
        os._exit(1)

    sys.excepthook = tell_and_report
    _watchers.append(threading.Thread(target=watch, daemon=True))
    _watchers[-1].start()


@contextmanager
def process_group(together: tuple[type[BaseException], ...]) -> Iterator[World]:
    """The processes, joined while the body runs.

    together: exceptions that all ranks raise alike. With any other one the group is left as it
    is: its other members wait in a collective call, and to close it would be to wait for them.
    """
    world = open_processes()
    try:
        yield world
    except together:
        close_processes()
        raise
    close_processes()


def close_processes() -> None:
    _closing.set()  # a thread that is within the store when the interpreter ends aborts the process
    while _watchers:
        _watchers.pop().join()
    _closing.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def several_processes() -> bool:
    """Whether a process group is open; torchrun opens one for a single process too."""
    return dist.is_initialized()


# ------------------------------------------------------------------------------- sharding


def shard(model: Any, compute_dtype: torch.dtype) -> None:
    """FSDP2 over every decoder block of a Coconut and its root, where there are several ranks.

    Parameters stay gathered and gradients unreduced over all passes and micro-batches of a step:
    one all-gather and one reduce-scatter for each block and step, at any number of latents.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # gradients of narrow types are summed in float32, of wider ones as they are
    reduce_dtype = torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    for block in model.blocks():
        fully_shard(block, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, reshard_after_forward=False, mp_policy=policy)
    model.set_reshard_after_backward(False)
    register_fsdp_forward_method(model, "generate")


def autocast(model: nn.Module, compute_dtype: torch.dtype) -> torch.autocast:
    """The context that computes in compute_dtype where the parameters are wider and no FSDP casts
    them: FSDP gathers the narrow type already."""
    parameter = next(model.parameters())
    enabled = parameter.dtype != compute_dtype and not isinstance(model, FSDPModule)
    return torch.autocast(parameter.device.type, compute_dtype, enabled=enabled)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def backward(model: nn.Module, loss: Tensor, prefix_hidden: Tensor | None, last: bool) -> None:
    """Backward of one micro-batch; gradients are reduced in the last one of a step, once.

    Every pass of the forward would reduce by itself. The backward meets the passes in reverse,
    so the reduction is switched on when the gradient reaches the output of the first pass.
    """
    if not isinstance(model, FSDPModule):
        loss.backward()
        return
    model.set_requires_gradient_sync(last and prefix_hidden is None)
    if last and prefix_hidden is not None:
        prefix_hidden.register_hook(lambda _: model.set_requires_gradient_sync(True))
    loss.backward()


def end_of_backward(model: nn.Module) -> None:
    """Free the gathered parameters, so that the optimizer works on the shards."""
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All parameters gathered once: ranks may then run and stop at different times."""
    modules = _sharded_modules(model)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (a collective call), any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other tensor unchanged; both share memory."""
    return tensor.to_local() if isinstance(tensor, dist.tensor.DTensor) else tensor


def gradient_norm(model: nn.Module, max_norm: float | None) -> float:
    """Global norm of the gradients on all ranks; clips them where max_norm is given."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return full_tensor(norm).item()


# ------------------------------------------------------------------------------- reductions


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over the ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather_objects(value: Any) -> list | None:
    """The values of all ranks in order on the main process, None on the others."""
    if not dist.is_initialized():
        return [value]
    gathered_values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered_values)
    return gathered_values


def broadcast_object(value: Any) -> Any:
    """The main process's value on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_process_first() -> Iterator[None]:
    """The body runs on the main process first, then on the others (for caches on disk)."""
    if not is_main_process():
        barrier()
    try:
        yield
    finally:  # what is wrong is wrong for all of them: let each find it
        if is_main_process():
            barrier()
