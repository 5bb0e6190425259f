"""How long micro-batches, updates and generation take on a machine, by what binds each kernel.

A micro-batch runs on fake tensors of the model's real widths, and every kernel takes the time of
its launch, its matrix products, or the bytes that it reads and writes. Blocks are alike, so models
of one and two blocks are counted.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from memory import make_gradients, trained_model, training_loss, zero_batch, zero_targets
from operators import Kernel, counted_kernels, fused_norms
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))
from coconut import Coconut
from engine.optimizer import build_optimizer
from step_loss import StepLoss
from utils import Config


class Machine(NamedTuple):
    """What a card does in a second, and which share of that a program like this one gets."""

    name: str
    products: float  # floating-point operations of dense matrix products in bfloat16
    bandwidth: float  # bytes from and to its memory
    memory: float  # bytes
    link: float  # bytes to and from the other cards
    # assumptions; reported on NVIDIA's developer forum: 0.88 of an A100's bandwidth by a kernel
    # that only reads
    products_share: float = 0.65
    bandwidth_share: float = 0.8
    # seconds of the host for a kernel and the Python around it, about as on two machines with an
    # H200; hosts differ (benchmarks/README.md)
    launch: float = 40e-6  # in a pass, by layers and autograd
    launch_alone: float = 10e-6  # in the update, one after the other
    is_gpu: bool = True  # which computes while the host launches
    disk: float = 1e9  # bytes per second; a local NVMe disk
    card: str | None = None  # as its driver names it


# the makers' data sheets; SXM forms, links as NVLink gives them to one card in one direction
MACHINES = {
    "a100-80gb": Machine("A100 80 GB", 312e12, 2.039e12, 80e9, 300e9, card="NVIDIA A100-SXM4-80GB"),
    "h100-80gb": Machine("H100 80 GB", 989e12, 3.35e12, 80e9, 450e9, card="NVIDIA H100 80GB HBM3"),
    "h200": Machine("H200 141 GB", 989e12, 4.8e12, 141e9, 450e9, card="NVIDIA H200"),
    "rtx4090": Machine(
        "RTX 4090 24 GB", 165e12, 1.008e12, 24e9, 32e9, card="NVIDIA GeForce RTX 4090"
    ),
}


def machine_of(card: str) -> Machine | None:
    """The machine with this very card; None: an unknown one. Others of its family (PCIe forms,
    laptops, less memory) have other speeds."""
    return next((machine for machine in MACHINES.values() if machine.card == card), None)


# ------------------------------------------------------------------------------- kernels to seconds


class Seconds(NamedTuple):
    """Time by what binds it."""

    products: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    kernels: float = 0.0  # their number

    @property
    def total(self) -> float:
        return self.products + self.bytes + self.launches

    def plus(self, other: "Seconds", times: float = 1.0) -> "Seconds":
        return Seconds(*(mine + times * more for mine, more in zip(self, other)))


def seconds_of(kernels: list[Kernel], machine: Machine) -> Seconds:
    """Each kernel takes the longest of its products, its bytes and, where the host launches while
    the card computes, its launch; elsewhere its launch comes on top."""
    total = Counter(kernels=float(len(kernels)))
    for kernel in kernels:
        times = {
            "products": kernel.products / (machine.products * machine.products_share),
            "bytes": kernel.bytes / (machine.bandwidth * machine.bandwidth_share),
        }
        if machine.is_gpu:
            times["launches"] = machine.launch
        else:
            total["launches"] += machine.launch
        name = max(times, key=lambda name: times[name])
        total[name] += times[name]
    return Seconds(**total)


class Shape(NamedTuple):
    """A micro-batch."""

    rows: int
    prefix: int
    latents: int
    suffix: int


class Said(NamedTuple):
    """What step_loss has the thoughts of a micro-batch say."""

    labels: int
    tokens: int  # that a decoder reads
    sequences: int  # of a decoder
    width: int  # positions of each


def by_blocks(count: Callable[[int], list[Kernel]], machine: Machine, blocks: int) -> Seconds:
    """The time of a model of `blocks` blocks from what models of one and two take."""
    one, two = (seconds_of(count(number), machine) for number in (1, 2))
    return one.plus(two.plus(one, -1), blocks - 1)


def with_blocks(hf_config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    small = copy.deepcopy(hf_config)
    small.num_hidden_layers = number
    if getattr(small, "layer_types", None):  # of each block
        small.layer_types = small.layer_types[:number]
    return small


@contextmanager
def fake_model(
    config: Config, hf_config: PreTrainedConfig, blocks: int, share: float, on_gpu: bool
) -> Iterator[tuple[Coconut, StepLoss | None]]:
    """A model without numbers and its step loss. share: of the blocks that compute their
    activations again."""
    mode, small = FakeTensorMode(), with_blocks(hf_config, blocks)
    model, step_loss = trained_model(config, small, config.compute_dtype, mode, share)
    with mode, fused_norms() if on_gpu else nullcontext():
        yield model, step_loss


def time_of_micro_batch(
    config: Config,
    hf_config: PreTrainedConfig,
    shape: Shape,
    machine: Machine,
    said: Said | None = None,
) -> Seconds:
    """Forward and backward, where gradients of an earlier micro-batch are there already. said:
    needed where the config has a step_loss, whose decoder has as many blocks as the model."""

    def count(blocks: int, share: float) -> list[Kernel]:
        fake = fake_model(config, hf_config, blocks, share, machine.is_gpu)
        with fake as (model, step_loss):
            make_gradients(model)
            batch, targets = zero_batch(*shape), None if said is None else zero_targets(*said)
            return counted_kernels(
                lambda: training_loss(model, step_loss, batch, targets).backward()
            )

    blocks, share = hf_config.num_hidden_layers, float(config.gradient_checkpointing)
    kept = by_blocks(lambda number: count(number, 0.0), machine, blocks)
    if not share:
        return kept
    again = by_blocks(lambda number: count(number, 1.0), machine, blocks)
    return kept.plus(again.plus(kept, -1), share)


def time_of_generation(
    config: Config, hf_config: PreTrainedConfig, shape: Shape, machine: Machine
) -> float:
    """Seconds to generate a batch: prompts, latents, and a suffix of new tokens, which are passes
    of a single column as latents are."""

    def count(blocks: int, latents: int) -> list[Kernel]:
        fake = fake_model(config, hf_config, blocks, 0.0, machine.is_gpu)
        with fake as (model, _), torch.no_grad():
            batch = zero_batch(shape.rows, shape.prefix, latents, 1)
            return counted_kernels(lambda: model(**batch))

    columns, blocks = shape.latents + shape.suffix, hf_config.num_hidden_layers
    few, many = (
        by_blocks(lambda number, n=n: count(number, n), machine, blocks).total for n in (1, 5)
    )
    return few + (columns - 1) * (many - few) / 4


def time_of_update(config: Config, hf_config: PreTrainedConfig, machine: Machine) -> Seconds:
    """An optimizer step."""

    def count(blocks: int) -> list[Kernel]:
        mode, small = FakeTensorMode(), with_blocks(hf_config, blocks)
        model, _ = trained_model(config, small, config.dtype, mode)
        with mode:
            make_gradients(model)
            optimizer = build_optimizer(config, model)
            optimizer.step()  # makes the state
            return counted_kernels(optimizer.step)

    host = machine._replace(launch=machine.launch_alone)
    return by_blocks(count, host, hf_config.num_hidden_layers)
