"""What is about to run, in words: printed at the start, by --check and by --help."""

import shlex
from typing import NamedTuple

import torch
from torch import nn

from coconut import Coconut
from engine.adapters import Adapters
from engine.batches import split_by_length
from engine.distributed import World, unsharded_bytes
from engine.inputs import Inputs
from engine.launch import unused_gpu
from engine.optimizer import state_bytes, trained_parameters
from engine.start import describe_start
from utils import FIELDS, REQUIRED, TOPICS, Config, kinds

MIB, GIB = 2**20, 2**30
LOOKED_AT = 10  # optimizer steps whose micro-batches are counted


def describe_keys() -> str:
    """One line for every key, by topic: name, type or choices, limits, default, meaning (for
    --help)."""
    lines = []
    for name, f in FIELDS.items():
        if name in TOPICS:
            lines.append(f"\n  {TOPICS[name]}")
        default = "required" if name in REQUIRED else f"default {f.default}"
        default = "default: the YAML files' names" if name == "name" else default
        lines.append(f"    {name} ({allowed(name)}, {default}): {f.metadata['meaning']}")
    return "\n".join(lines)


def allowed(name: str) -> str:
    """The values that a key may have, in words."""
    rule = FIELDS[name].metadata
    choices, low, high = rule["choices"], rule["low"], rule["high"]
    if choices:
        return " or ".join(map(str, choices))
    limits = "" if low is None else f" from {low:,}"
    return kinds(name) + limits + ("" if high is None else f" to {high:,}")


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in trained_parameters(model))


def overview(inputs: Inputs, model: Coconut, world: World) -> str:
    """What is about to run, as text."""
    config, start = inputs.config, inputs.start
    count = count_parameters(model.base_causallm)
    beside = count_parameters(model) - count
    kind = f"{world.world_size} x {world.device.type}, {str(config.dtype).split('.')[1]}"
    lines = [
        "",
        f"run       {config.run_dir}",
        f"model     {config.model_id}, {count / 1e6:,.1f} million parameters, {kind}",
        f"method    {config.method.value}, schedule {config.schedule}",
    ]
    if inputs.adapters is not None:
        lines.append(describe_adapters(inputs.adapters, model))
    if beside:
        goes_on = start.resume is not None and start.resume.has_optimizer
        new = "" if goes_on else ", a new copy of the model's"
        lines.append(
            f"decoder   {beside / 1e6:,.1f} million parameters more, for training only{new}"
        )
    if len(inputs.validation):
        lines.append(f"val rows  {len(inputs.validation)} of {config.val_path}")
    for name, rows in inputs.eval_sets.items():
        lines.append(f"rows      {len(rows)} of {name}, {config.rows_of(name)}")
    if config.only_eval:
        lines.append(f"evaluates {start.weights}, {start.epochs_done} epochs done")
    else:
        plan = plan_next_epoch(inputs, world.world_size)
        lines.append(f"memory    {static_memory(config, model, world, plan)}")
        lines += plan_overview(inputs, plan)
    if inputs.new_markers:
        lines.append(
            f"latent markers: new, made from the embedding of {config.marker_init_token!r}"
        )
    if reason := unused_gpu():
        lines.append(f"the GPU is not used: {reason}")
    if torch.backends.mps.is_available():
        lines.append("Apple MPS is not used: this run is on the CPU")
    return "\n".join(lines)


def describe_adapters(adapters: Adapters, model: Coconut) -> str:
    trained = count_trained(model.base_causallm)
    frozen = count_parameters(model.base_causallm) - trained
    return (
        f"adapters  rank {adapters.r}, alpha {adapters.alpha:g}, on {', '.join(adapters.targets)}; "
        f"{trained:,} parameters trained, {frozen:,} frozen, those of {adapters.base}"
    )


class NextEpoch(NamedTuple):
    """The epoch that comes next, as a run of so many processes plans it."""

    epoch: int
    num_processes: int
    num_steps: int
    dropped: int  # rows that are left out
    micro_batches: int  # the most of each process in the first optimizer steps


def plan_next_epoch(inputs: Inputs, num_processes: int) -> NextEpoch:
    config = inputs.config
    epoch = min(inputs.start.epochs_done + 1, config.num_epochs)
    dataset = inputs.train_dataset(epoch)
    steps, dropped = inputs.plan_epoch(dataset, epoch, num_processes)
    limits = config.batch_size_training, config.tokens_per_micro_batch
    splits = [split_by_length(s, dataset, num_processes, *limits) for s in steps[:LOOKED_AT]]
    micro_batches = max(len(split[0]) for split in splits)
    return NextEpoch(epoch, num_processes, len(steps), dropped, micro_batches)


def plan_overview(inputs: Inputs, plan: NextEpoch) -> list[str]:
    """What a training will do, known before there is a model."""
    config, start = inputs.config, inputs.start
    size, positions = config.batch_size_training, config.tokens_per_micro_batch
    limit = f"{size} rows" if positions is None else f"{positions} token positions"
    aside = f", {len(inputs.gate)} set aside for advance_at" if len(inputs.gate) else ""
    aside += f", {inputs.copies} with the same questions left out" if inputs.copies else ""
    # of other weights, which may have no record, those that the run takes them to have
    known = inputs.first_stages if start.resume is None and start.epochs_done else start.stages
    total = len(inputs.train) + len(inputs.gate) + inputs.copies + inputs.too_long
    return [
        f"rows      {total} of {config.train_path}, {plan.dropped} longer than "
        f"max_seq_length ({config.max_seq_length}) in epoch {plan.epoch} dropped{aside}",
        f"batch     {config.step_rows(plan.num_processes)} rows per optimizer step (processes: "
        f"{plan.num_processes}, micro-batches: {plan.micro_batches} each, of at most {limit})",
        f"steps     {plan.num_steps} in epoch {plan.epoch}, {config.num_epochs} epochs",
        f"starts    {describe_start(start)}",
        f"stage     epoch {plan.epoch}: {describe_stage(inputs, plan.epoch)}",
        "",
        inputs.curriculum.table(config.num_epochs, known),
        "",
    ]


def describe_stage(inputs: Inputs, epoch: int) -> str:
    """That of the next epoch; a run that was stopped before its gate leaves it to the gate."""
    stage, known = inputs.stage(epoch), inputs.start.stages
    text = inputs.curriculum.describe(stage)
    if inputs.start.resume and 0 < len(known) < epoch and stage < inputs.curriculum.last_stage:
        return f"{text}, or the one after it, as the gate decides first"
    return text


def describe_check(inputs: Inputs, arguments: list[str]) -> str:
    """What --check prints of input that is well."""
    config = inputs.config
    verdict = f"{shlex.join(arguments)}: all input is well"
    if config.only_eval:
        return verdict
    plan = "\n".join(plan_overview(inputs, plan_next_epoch(inputs, num_processes=1)))
    return f"{plan}\n{verdict}; starts {describe_start(inputs.start)}"


def static_memory(config: Config, model: nn.Module, world: World, plan: NextEpoch) -> str:
    """What parameters, gradients and optimizer state take in each process all the time."""
    count, trained = count_parameters(model), count_trained(model)
    width = config.dtype.itemsize
    parts = {
        "parameters": count / world.num_shards * width,
        "gradients": trained / world.num_shards * width,
        "optimizer": trained / world.num_shards * state_bytes(config),
    }
    if world.world_size > 1:
        beside = unsharded_bytes(config.compute_dtype, accumulates=plan.micro_batches > 1)
        frozen = (count - trained) * config.compute_dtype.itemsize
        parts["gathered parameters and unreduced gradients"] = frozen + trained * beside
    total = sum(parts.values())
    unit, name = (GIB, "GiB") if total >= GIB else (MIB, "MiB")
    told = ", ".join(f"{part} {size / unit:.1f}" for part, size in parts.items())
    return (
        f"{total / unit:.1f} {name} per process: {told}; activations come on top "
        "(benchmarks/memory.py)"
    )
