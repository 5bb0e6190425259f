"""The processes of a run: group, sharding, reductions. The only file of the program that imports
torch.distributed (engine/checkpoint.py: its .checkpoint part; run.py: torchrun's error file).

With one process nothing is sharded or reduced: FSDP2 would keep a second copy of the parameters.
On several nodes each has a whole sharded model: gathering stays on a node's own links.
"""

import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import distribute_tensor

from engine.launch import is_main_process, read_launch
from utils import UserError

# a rank may encode the data or save a checkpoint while the others wait for it
TIMEOUT = timedelta(hours=2)
WATCH_SECONDS = 2
_closing = threading.Event()  # ends the threads that _fail_together starts
_watchers: list[threading.Thread] = []
T = TypeVar("T")


class World(NamedTuple):
    rank: int
    world_size: int
    device: torch.device
    num_nodes: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_shards(self) -> int:
        """Into how many parts a sharded model is divided: one for each process of a node, or for
        each node where nodes have one."""
        per_node = self.world_size // self.num_nodes
        return per_node if per_node > 1 else self.world_size


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
    return World(rank, world_size, device, launch.num_nodes)


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
        _check_nodes(world)
        yield world
    except together:
        close_processes()
        raise
    close_processes()


def _check_nodes(world: World) -> None:
    """Raise UserError, on all ranks, where the nodes have different numbers of processes."""
    counts = Counter(all_gather(this_node()))
    if world.num_nodes > 1 and len(set(counts.values())) > 1:
        seen = ", ".join(f"{count} on {node}" for node, count in counts.items())
        raise UserError(f"processes: {seen}; give torchrun the same --nproc_per_node on all nodes")


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


def shard(model: Any, compute_dtype: torch.dtype, world: World) -> None:
    """Move a Coconut to its device; of several processes each keeps a part of it, by FSDP2 over
    every decoder block and the root. The weights are the main process's: the models of the others
    may be on the meta device, so that only one process needs room for all of them.

    Parameters stay gathered and gradients unreduced over all passes and micro-batches of a step:
    one all-gather and one reduce-scatter for each block and step, at any number of latents, and
    with several nodes one all-reduce across them.
    """
    if world.world_size == 1:
        model.to(world.device)
        return
    weights = {name: p.detach() for name, p in model.named_parameters()}
    # gradients of narrow types are summed in float32, of wider ones as they are
    reduce_dtype = torch.promote_types(compute_dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    mesh = _device_mesh(world)
    for block in model.blocks():
        fully_shard(block, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    model.set_reshard_after_backward(False)
    register_fsdp_forward_method(model, "generate")
    if not world.is_main:
        model.to_empty(device=world.device)
    _take_shards(model, weights, world)
    _take_buffers(model, world)


def replicate(model: nn.Module, world: World) -> None:
    """Move a model to its device, whole; of several processes all get the main one's weights."""
    if world.is_main:
        model.to(world.device)
    if world.world_size == 1:
        return
    for parameter in model.parameters():
        if not world.is_main:  # not model.to_empty(), which would make two of a tied one
            empty = nn.Parameter(torch.empty_like(parameter, device=world.device))
            torch.utils.swap_tensors(parameter, empty)
        dist.broadcast(parameter.detach(), src=0)
    _take_buffers(model, world)


def _device_mesh(world: World) -> DeviceMesh:
    if world.num_shards == world.world_size:
        return init_device_mesh(world.device.type, (world.world_size,))
    shape = (world.num_nodes, world.num_shards)  # torchrun numbers the ranks node by node
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _take_shards(model: nn.Module, weights: dict[str, Tensor], world: World) -> None:
    """Fill every process's part of the parameters from the main one's whole ones, which are dropped
    one by one."""
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        if world.is_main:
            whole.copy_(weights.pop(name))
        own: Any = parameter.detach()
        own.to_local().copy_(distribute_tensor(whole, own.device_mesh, own.placements).to_local())


def _take_buffers(model: nn.Module, world: World) -> None:
    """The main process's buffers on all of them. No file holds most of them: models compute them
    when they are built, which makes nothing on the meta device."""
    named = model.named_buffers(remove_duplicate=False)
    buffers = {name: buffer.cpu() for name, buffer in named} if world.is_main else None
    for name, buffer in broadcast_object(buffers).items():
        path, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(path), own_name, buffer.to(world.device))


def unsharded_bytes(compute_dtype: torch.dtype, accumulates: bool) -> int:
    """Bytes for each parameter that a step of several processes holds beside the shards: the
    gathered parameter, and its gradient until it is reduced, which FSDP adds up in float32 over
    several micro-batches."""
    width = compute_dtype.itemsize
    return width + (max(width, torch.float32.itemsize) if accumulates else width)


def autocast(model: nn.Module, compute_dtype: torch.dtype) -> torch.autocast:
    """The context that computes in compute_dtype where the parameters are wider and no FSDP casts
    them: FSDP gathers the narrow type already."""
    parameter = next(model.parameters())
    enabled = parameter.dtype != compute_dtype and not isinstance(model, FSDPModule)
    return torch.autocast(parameter.device.type, compute_dtype, enabled=enabled)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def backward(
    model: nn.Module, loss: Tensor, prefix_hidden: Tensor | None, last: bool, after: Any = None
) -> None:
    """Backward of one micro-batch; gradients are reduced in the last one of a step, once.

    Every pass would reduce by itself. The backward meets them in reverse, so the reduction is
    switched on when the gradient reaches the output of the first. after: what ran once, after them.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last and prefix_hidden is None)
        for module in [] if after is None else _sharded_modules(after):
            module.set_requires_gradient_sync(last)
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


def all_gather(value: Any) -> list:
    """The values of all ranks in order, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def this_node() -> str:
    """What messages call it."""
    return f"node {read_launch().node} ({socket.gethostname()})"


def on_all(action: Callable[[], T]) -> T:
    """Run it on every process. Where it raises UserError on any, all of them raise it, with the
    node's name where not all have seen the same."""
    result: Any = None
    problems: list[str] = []
    try:
        result = action()
    except UserError as error:
        problems = error.problems
    seen = all_gather((this_node(), problems))
    found = []
    for problem in dict.fromkeys(problem for _, theirs in seen for problem in theirs):
        nodes = [node for node, theirs in seen if problem in theirs]
        found.append(problem if len(nodes) == len(seen) else f"{problem} (on {nodes[0]})")
    if found:
        raise UserError(*found)
    return result


def on_main(action: Callable[[], T]) -> T | None:
    """Run it on the main process only: what it returns there, None on the others, and its UserError
    on all of them."""
    result, problems = None, []
    if is_main_process():
        try:
            result = action()
        except UserError as error:
            problems = error.problems
    if problems := broadcast_object(problems):
        raise UserError(*problems)
    return result


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def one_of_each_node_first() -> Iterator[None]:
    """The body runs on one process of each node first, then on the others: for caches on disk,
    which nodes need not share."""
    leads = read_launch().local_rank == 0
    if not leads:
        barrier()
    try:
        yield
    finally:  # what is wrong is wrong for all of them: let each find it
        if leads:
            barrier()
