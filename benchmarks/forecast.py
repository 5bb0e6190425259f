"""Forecast the time of a training by its parts, its memory and its disk, before a GPU is rented.

    python benchmarks/forecast.py args/X.yaml [KEY=VALUE ...] [--gpu a100-80gb] [--gpus N]

Nothing is measured on the card. A micro-batch of each stage runs on fake tensors of the model's
real widths, and every kernel takes the time of what binds it: its launch, its products, or the
bytes that it reads and writes. Blocks are alike, so models of one and two blocks are counted. The
rows are those of the config or, without its data (--made-up N), as many of GSM8K's lengths.
"""

import argparse
import copy
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kernels import Kernel, counted_kernels, fused_norms
from memory import GIB, forecast, make_gradients, peak, zero_batch
from parts import made_up_rows, row_tokenizer, table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))
from coconut import Coconut, add_latent_tokens
from dataset import Curriculum, Encoded, LatentTokens, StageDataset, load_rows
from engine.batches import plan_steps, split_by_length
from engine.checkpoint import checkpoint_bytes, run_bytes
from engine.optimizer import build_optimizer
from engine.preflight import encode
from engine.weights import empty_model
from utils import Config, Method, UserError, load_config

SAMPLED_STEPS = 20  # optimizer steps of a stage whose micro-batches are looked at
FITS = 0.95  # of the memory; CUDA itself and the allocator take some


class Machine(NamedTuple):
    """What a card does in a second, and which share of that a program like this one gets."""

    name: str
    products: float  # floating-point operations of dense matrix products in bfloat16
    bandwidth: float  # bytes from and to its memory
    memory: float  # bytes
    link: float  # bytes to and from the other cards
    products_share: float = 0.65  # large products of cuBLAS in PyTorch's own benchmarks: 0.6 to 0.8
    bandwidth_share: float = 0.8  # of a copy on the card
    # seconds of the host for a kernel and the Python around it, measured on a CPU with a tiny
    # model (forecast_check.py)
    launch: float = 13e-6
    is_gpu: bool = True  # which computes while the host launches
    disk: float = 1e9  # bytes per second; a local NVMe disk


# the makers' data sheets; SXM forms, links as NVLink gives them to one card in one direction
MACHINES = {
    "a100-80gb": Machine("A100 80 GB", 312e12, 2.039e12, 80e9, 300e9),
    "h100-80gb": Machine("H100 80 GB", 989e12, 3.35e12, 80e9, 450e9),
    "h200": Machine("H200 141 GB", 989e12, 4.8e12, 141e9, 450e9),
    "rtx4090": Machine("RTX 4090 24 GB", 165e12, 1.008e12, 24e9, 32e9),
}

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
) -> Iterator[Coconut]:
    """A model without numbers. share: of the blocks that compute their activations again."""
    with FakeTensorMode() as mode:
        small = with_blocks(hf_config, blocks)
        base = AutoModelForCausalLM.from_config(small, dtype=config.compute_dtype)
    model = Coconut(base, hf_config.vocab_size - 1, fast_layers=config.fast_layers)
    with mode, fused_norms() if on_gpu else nullcontext():
        model.checkpoint_activations(share)
        yield model


def time_of_micro_batch(
    config: Config, hf_config: PreTrainedConfig, shape: Shape, machine: Machine
) -> Seconds:
    """Forward and backward, where gradients of an earlier micro-batch are there already."""

    def count(blocks: int, share: float) -> list[Kernel]:
        with fake_model(config, hf_config, blocks, share, machine.is_gpu) as model:
            make_gradients(model)
            batch = zero_batch(*shape)
            return counted_kernels(lambda: model(**batch).loss.backward())

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
        with fake as model, torch.no_grad():
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
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(
                with_blocks(hf_config, blocks), dtype=config.dtype
            )
            make_gradients(model)
            optimizer = build_optimizer(config, model)
            optimizer.step()  # makes the state
            return counted_kernels(optimizer.step)

    return by_blocks(count, machine, hf_config.num_hidden_layers)


# ------------------------------------------------------------------------------- the rows


class Rows(NamedTuple):
    """Encoded rows and what is needed to make samples of them."""

    train: Encoded
    validation: Encoded
    tokens: LatentTokens | None


def read_rows(config: Config, made_up: int | None) -> Rows:
    """The rows of the config, or made-up ones. Raises UserError."""
    tokenizer = row_tokenizer() if made_up else AutoTokenizer.from_pretrained(config.model_id)
    thinks = config.method is Method.COCONUT
    tokens = LatentTokens(*add_latent_tokens(tokenizer)) if thinks else None

    def read(path: str | None, count: int | None) -> Encoded:
        rows = made_up_rows(count) if count else load_rows(path) if path else []
        return encode(config, tokenizer, tokens, rows, path, cached=not made_up)

    with_validation = not config.skip_validation
    validation = read(config.val_path, made_up and min(made_up, 500)) if with_validation else None
    return Rows(read(config.train_path, made_up), validation or Encoded.nothing(), tokens)


class Stage(NamedTuple):
    """The optimizer steps of an epoch at a stage: micro-batches of one process and their mean."""

    steps: int
    micro_batches: float  # of a step
    shape: Shape
    padding: float  # positions per token


def look_at_stage(config: Config, rows: Rows, stage: int, gpus: int) -> Stage:
    curriculum = Curriculum.from_config(config)
    data = StageDataset(rows.train, curriculum, rows.tokens, stage)
    steps, _ = plan_steps(
        data,
        config.step_rows(gpus),
        config.max_seq_length,
        config.seed,
        epoch=1,
        group_by_length=config.group_by_length,
    )
    limits = config.batch_size_training, config.tokens_per_micro_batch
    sampled = steps[: len(steps) - 1][:SAMPLED_STEPS] or steps  # the last may be smaller
    parts = [part for step in sampled for part in split_by_length(step, data, gpus, *limits)[0]]
    latents = int(data.num_latents.max())
    prefix = [data.prefix_length[part].max() for part in parts]
    suffix = [(data.total_length - data.prefix_length)[part].max() - latents for part in parts]
    sizes = np.array([len(part) for part in parts])
    positions = sizes * (np.array(prefix) + np.array(suffix) + latents)
    real = sum(int(data.total_length[part].sum()) for part in parts)
    mean = lambda lengths: round(float(np.average(lengths, weights=sizes)))
    shape = Shape(round(sizes.mean()), mean(prefix), latents, mean(suffix))
    return Stage(len(steps), len(parts) / len(sampled), shape, float(positions.sum()) / real)


# ------------------------------------------------------------------------------- the run


class Setting(NamedTuple):
    """What stays when keys change."""

    hf_config: PreTrainedConfig
    rows: Rows
    machine: Machine
    gpus: int
    numbers: int  # parameters
    update: float  # seconds of an optimizer step


class Epoch(NamedTuple):
    """Seconds of an epoch at a stage."""

    stage: Stage
    passes: Seconds  # forward and backward of a step
    update: float  # of a step
    exchange: float  # between the cards, of a step
    validation: float
    checkpoint: float

    @property
    def step(self) -> float:
        return self.passes.total + self.update + self.exchange

    @property
    def training(self) -> float:
        return self.stage.steps * self.step


def make_setting(config: Config, rows: Rows, machine: Machine, gpus: int) -> Setting:
    hf_config = AutoConfig.from_pretrained(config.model_id, revision=config.model_revision)
    numbers = sum(p.numel() for p in empty_model(hf_config).parameters())
    update = time_of_update(config, hf_config, machine).total / gpus
    return Setting(hf_config, rows, machine, gpus, numbers, update)


def forecast_epoch(config: Config, setting: Setting, number: int) -> Epoch:
    """An epoch at a stage."""
    hf_config, rows, machine, gpus, numbers, update = setting
    stage = look_at_stage(config, rows, number, gpus)
    one = time_of_micro_batch(config, hf_config, stage.shape, machine)
    # gathered once in the type to compute in, reduced once in float32 (distributed.shard)
    exchanged = numbers * (config.compute_dtype.itemsize + 4) * (gpus - 1) / gpus
    validation = 0.0
    if len(rows.validation):
        data = StageDataset(rows.validation, Curriculum.from_config(config), rows.tokens, number)
        new, prefix = int(data.num_labels.mean()), int(data.prefix_length.mean())
        shape = Shape(config.batch_size_eval, prefix, stage.shape.latents, new)
        seconds = time_of_generation(config, hf_config, shape, machine)
        validation = len(rows.validation) / (gpus * config.batch_size_eval) * seconds
    return Epoch(
        stage,
        passes=Seconds().plus(one, stage.micro_batches),
        update=update,
        exchange=exchanged / machine.link,
        validation=validation,
        checkpoint=sum(checkpoint_bytes(numbers, config)) / machine.disk,
    )


def stages_of(config: Config) -> Counter[int]:
    """Epochs of each stage that the run has."""
    curriculum = Curriculum.from_config(config)
    return Counter(curriculum.stage(epoch) for epoch in range(1, config.num_epochs + 1))


def longest_row(config: Config, rows: Rows) -> int:
    longest = rows.train.question_length + rows.train.steps_from[:, 0] + rows.train.answer_length
    return min(int(longest.max()), config.max_seq_length)


def changes(config: Config) -> list[dict[str, Any]]:
    """Keys that one might change for speed or memory."""
    budget = config.tokens_per_micro_batch
    if budget is None:
        sizes = [config.batch_size_training // 2, config.batch_size_training * 2]
        others = [{"batch_size_training": max(size, 1)} for size in sizes]
    else:
        sizes = [max(budget // 2, config.max_seq_length), budget * 2]
        others = [{"tokens_per_micro_batch": size} for size in sizes]
    shares = [{"gradient_checkpointing": share} for share in (0.0, 0.5, 1.0)]
    return [{}, {"group_by_length": not config.group_by_length}, *shares, *others]


# ------------------------------------------------------------------------------- the report


def print_report(config: Config, rows: Rows, machine: Machine, gpus: int) -> None:
    """Everything, as Markdown, each table when it is there."""
    setting = make_setting(config, rows, machine, gpus)
    print(
        f"Forecast, not measured: {config.model_id}, {setting.numbers / 1e6:,.0f} million "
        f"parameters, {gpus} x {machine.name}; {machine.products_share:.0%} of the peak of "
        f"products, {machine.bandwidth_share:.0%} of the memory's, "
        f"{machine.launch * 1e6:.0f} us per launch",
        flush=True,
    )
    epochs = stages_of(config)
    by_stage = {number: forecast_epoch(config, setting, number) for number in epochs}
    print_stages(by_stage, epochs)
    print_run(config, by_stage, epochs, setting.numbers)
    print_changes(config, setting, max(epochs))


def print_stages(by_stage: dict[int, Epoch], epochs: Counter[int]) -> None:
    head = ["stage", "epochs", "latents", "micro-batches per step", "positions per token"]
    head += ["seconds per step", "products", "bytes", "launches", "update", "exchange"]
    lines = []
    for number, epoch in by_stage.items():
        stage, passes = epoch.stage, epoch.passes
        line = [number, epochs[number], stage.shape.latents, stage.micro_batches, stage.padding]
        line += [epoch.step, passes.products, passes.bytes, passes.launches]
        lines.append([*line, epoch.update, epoch.exchange])
    table("Seconds of an optimizer step, by what binds its kernels", head, lines)


def print_run(
    config: Config, by_stage: dict[int, Epoch], epochs: Counter[int], numbers: int
) -> None:
    hours = lambda part: sum(epochs[n] * part(e) for n, e in by_stage.items()) / 3600
    parts = {
        "training, hours": hours(lambda e: e.training),
        "validation, hours": hours(lambda e: e.validation),
        "checkpoints, hours": hours(lambda e: e.checkpoint),
    }
    disk, kept = run_bytes(numbers, config, config.num_epochs)
    lines = [[name, part] for name, part in parts.items()]
    lines += [["all, hours", sum(parts.values())]]
    table("The run", ["what", "forecast"], [*lines, [f"disk, {kept} checkpoints, GB", disk / 1e9]])


def print_changes(config: Config, setting: Setting, number: int) -> None:
    """The last stage's step, the peak at the longest row, and what other keys make of them."""
    lines, length = [], longest_row(config, setting.rows)
    for keys in changes(config):
        changed = dataclasses.replace(config, **keys)
        epoch = forecast_epoch(changed, setting, number)
        size = peak(forecast(changed, length, setting.gpus))
        fits = "yes" if size < FITS * setting.machine.memory else "NO"
        name = ", ".join(f"{key}: {value}" for key, value in keys.items()) or "as it is"
        lines.append([name, epoch.step, epoch.stage.micro_batches, size / GIB, fits])
    head = ["keys", "seconds per step", "micro-batches", f"peak GiB, rows of {length}", "fits"]
    table(f"Stage {number}, and what would change it", head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="+", metavar="YAML|KEY=VALUE")
    parser.add_argument("--gpu", choices=MACHINES, default="a100-80gb")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--made-up", type=int, metavar="N", help="rows of GSM8K's lengths")
    args = parser.parse_args()
    try:
        config = load_config(*args.config)
        rows = read_rows(config, args.made_up)
    except UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 2
    print_report(config, rows, MACHINES[args.gpu], args.gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
