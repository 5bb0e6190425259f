"""Forecast the time of a training by its parts, its memory and its disk, before a GPU is rented.

    python benchmarks/forecast.py args/X.yaml [KEY=VALUE ...] [--gpu a100-80gb] [--gpus N]

Nothing is measured on the card: see roofline.py. The rows are those of the config or, without its
data (--made-up N), as many of GSM8K's lengths.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from memory import GIB, forecast, peak, trained_model, training_config
from parts import made_up_rows, row_tokenizer, table
from roofline import (
    MACHINES,
    Machine,
    Said,
    Seconds,
    Shape,
    time_of_generation,
    time_of_micro_batch,
    time_of_update,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))
from coconut import add_latent_tokens
from curriculum import Curriculum
from dataset import Encoded, LatentTokens, StageDataset, set_aside
from engine.batches import plan_steps, split_by_length
from engine.checkpoint import checkpoint_bytes, run_bytes
from engine.overview import count_parameters, count_trained
from engine.preflight import encode
from engine.pretrained import load_hf_config, load_tokenizer
from preprocessing.common import positive
from rows import load_rows
from step_loss import step_targets
from utils import Config, Method, UserError

SAMPLED_STEPS = 20  # optimizer steps of a stage whose micro-batches are looked at
FITS = 0.95  # of the memory; CUDA itself and the allocator take some


# ------------------------------------------------------------------------------- the rows


class Rows(NamedTuple):
    """Encoded rows and what is needed to make samples of them."""

    train: Encoded
    gate: Encoded  # set aside for advance_at; none without it
    validation: Encoded
    tokens: LatentTokens | None


def read_rows(config: Config, made_up: int | None) -> Rows:
    """The rows of the config, or made-up ones. Raises UserError."""
    tokenizer = row_tokenizer() if made_up else load_tokenizer(config)
    thinks = config.method is Method.COCONUT
    tokens = LatentTokens(*add_latent_tokens(tokenizer)) if thinks else None

    def read(path: str | None, count: int | None) -> Encoded:
        data = lambda path: load_rows(path, config.data_columns)
        rows = made_up_rows(count) if count else data(path) if path else []
        return encode(config, tokenizer, list(tokens or ()), rows, path, cached=not made_up)

    with_validation = not config.skip_validation
    validation = read(config.val_path, made_up and min(made_up, 500)) if with_validation else None
    rows, curriculum = read(config.train_path, made_up), Curriculum.from_config(config)
    train, gate, _ = set_aside(rows, curriculum, tokens, config)
    return Rows(train, gate, validation or Encoded.nothing(), tokens)


class Stage(NamedTuple):
    """The optimizer steps of an epoch at a stage: micro-batches of one process and their mean."""

    steps: int
    micro_batches: float  # of a step
    shape: Shape
    padding: float  # positions per token
    said: Said | None  # None: no step_loss


def look_at_stage(config: Config, rows: Rows, stage: int, gpus: int) -> Stage:
    curriculum = Curriculum.from_config(config)
    data = StageDataset(
        rows.train,
        curriculum,
        rows.tokens,
        stage,
        uniform_prob=config.uniform_prob,
        stage_mixing=config.stage_mixing,
        seed=config.seed,
        epoch=1,
    )
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
    said = None if config.step_loss == "none" else look_at_said(config, data, parts, latents)
    padding = float(positions.sum()) / real
    return Stage(len(steps), len(parts) / len(sampled), shape, padding, said)


def look_at_said(config: Config, data: StageDataset, parts: list[np.ndarray], latents: int) -> Said:
    """What step_loss has the thoughts of these micro-batches say: their mean."""
    labels, tokens, sequences, positions = [], [], [], []
    for part in parts:
        targets = step_targets(config.step_loss, data, part, part, latents)
        labels.append(len(targets.index))
        if targets.tokens is not None and targets.sequences is not None:
            tokens.append(len(targets.tokens))
            sequences.append(len(targets.sequences))
            positions.append(targets.sequences.numel())
    mean = lambda counts: round(sum(counts) / len(parts))
    width = round(sum(positions) / max(sum(sequences), 1))
    return Said(mean(labels), mean(tokens), mean(sequences), width)


# ------------------------------------------------------------------------------- the run


class Setting(NamedTuple):
    """What stays when keys change."""

    hf_config: PreTrainedConfig
    rows: Rows
    machine: Machine
    gpus: int
    numbers: int  # parameters
    trained: int  # of them
    beside: int  # of those, the decoder's of step_loss
    update: float  # seconds of an optimizer step


class Step(NamedTuple):
    """Seconds of an optimizer step at a stage."""

    stage: Stage
    passes: Seconds  # forward and backward
    update: float
    exchange: float  # between the cards

    @property
    def total(self) -> float:
        return self.passes.total + self.update + self.exchange


class Epoch(NamedTuple):
    """Seconds of an epoch at a stage."""

    step: Step
    validation: float
    gate: float
    checkpoint: float

    @property
    def training(self) -> float:
        return self.step.stage.steps * self.step.total

    @property
    def total(self) -> float:
        return self.training + self.validation + self.gate + self.checkpoint


def make_setting(
    config: Config, hf_config: PreTrainedConfig, rows: Rows, machine: Machine, gpus: int
) -> Setting:
    model, _ = trained_model(config, hf_config, config.dtype, FakeTensorMode())
    numbers, trained = count_parameters(model), count_trained(model)
    beside = trained - count_trained(model.base_causallm)
    update = time_of_update(config, hf_config, machine).total / gpus
    return Setting(hf_config, rows, machine, gpus, numbers, trained, beside, update)


def forecast_step(config: Config, setting: Setting, number: int) -> Step:
    """An optimizer step at a stage."""
    hf_config, rows, machine, gpus, numbers, trained, _, update = setting
    stage = look_at_stage(config, rows, number, gpus)
    one = time_of_micro_batch(config, hf_config, stage.shape, machine, stage.said)
    # gathered once in the type to compute in, reduced once in float32 (distributed.shard)
    exchanged = (numbers * config.compute_dtype.itemsize + trained * 4) * (gpus - 1) / gpus
    passes = Seconds().plus(one, stage.micro_batches)
    return Step(stage, passes, update, exchange=exchanged / machine.link)


def forecast_epoch(config: Config, setting: Setting, number: int) -> Epoch:
    """An epoch at a stage; at the last one the gate has nothing to decide."""
    step, rows = forecast_step(config, setting, number), setting.rows
    latents = step.stage.shape.latents
    validation = seconds_of_answers(config, setting, rows.validation, number, latents)
    gate = 0.0
    if number < Curriculum.from_config(config).last_stage:
        gate = seconds_of_answers(config, setting, rows.gate, number, latents)
    written = sum(checkpoint_bytes(setting.trained, config))
    return Epoch(step, validation, gate, written / setting.machine.disk)


def seconds_of_answers(
    config: Config, setting: Setting, rows: Encoded, number: int, latents: int
) -> float:
    """The time that all processes together take to answer these rows at a stage."""
    if not len(rows):
        return 0.0
    data = StageDataset(rows, Curriculum.from_config(config), setting.rows.tokens, number)
    new, prefix = int(data.num_labels.mean()), int(data.prefix_length.mean())
    shape = Shape(config.batch_size_eval, prefix, latents, new)
    seconds = time_of_generation(config, setting.hf_config, shape, setting.machine)
    return len(rows) / (setting.gpus * config.batch_size_eval) * seconds


def stages_of(config: Config) -> Counter[int]:
    """Epochs of each stage that the run has; with advance_at as few as may be before the last."""
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


def print_report(config: Config, setting: Setting) -> None:
    """Everything, as Markdown, each table when it is there."""
    machine = setting.machine
    decoder = f", of them {setting.beside / 1e6:,.0f} the decoder's" if setting.beside else ""
    print(
        f"Forecast, not measured: {config.model_id}, {setting.numbers / 1e6:,.0f} million "
        f"parameters ({setting.trained / 1e6:,.0f} trained{decoder}), {setting.gpus} x "
        f"{machine.name}; {machine.products_share:.0%} of the peak of products, "
        f"{machine.bandwidth_share:.0%} of the memory's, {machine.launch * 1e6:.0f} us per launch "
        f"({machine.launch_alone * 1e6:.0f} in the update)",
        flush=True,
    )
    epochs = stages_of(config)
    if config.advance_at is not None:
        print("\nStages before the last have as few epochs as the gate may take.")
    by_stage = {number: forecast_epoch(config, setting, number) for number in epochs}
    print_stages(by_stage, epochs)
    print_run(config, by_stage, epochs, setting)
    print_changes(config, setting, max(epochs))


def print_stages(by_stage: dict[int, Epoch], epochs: Counter[int]) -> None:
    head = ["stage", "epochs", "latents", "micro-batches per step", "positions per token"]
    head += ["seconds per step", "products", "bytes", "launches", "update", "exchange"]
    head += ["minutes per epoch"]
    lines = []
    for number, epoch in by_stage.items():
        stage, passes, update, exchange = epoch.step
        line = [number, epochs[number], stage.shape.latents, stage.micro_batches, stage.padding]
        line += [epoch.step.total, passes.products, passes.bytes, passes.launches]
        lines.append([*line, update, exchange, epoch.total / 60])
    table("Seconds of an optimizer step, by what binds its kernels", head, lines)


def print_run(
    config: Config, by_stage: dict[int, Epoch], epochs: Counter[int], setting: Setting
) -> None:
    hours = lambda part: sum(epochs[n] * part(e) for n, e in by_stage.items()) / 3600
    parts = {
        "training, hours": hours(lambda e: e.training),
        "validation, hours": hours(lambda e: e.validation),
        **({} if config.advance_at is None else {"gate, hours": hours(lambda e: e.gate)}),
        "checkpoints, hours": hours(lambda e: e.checkpoint),
    }
    opened, beside = setting.trained - setting.beside, setting.beside
    disk, at_once = run_bytes(opened, config, config.num_epochs, beside)
    lines = [[name, part] for name, part in parts.items()]
    lines += [["all, hours", sum(parts.values())]]
    lines += [[f"disk, {at_once} checkpoints at once, GB", disk / 1e9]]
    table("The run", ["what", "forecast"], lines)


def print_changes(config: Config, setting: Setting, number: int) -> None:
    """The last stage's step, the peak at the longest row, and what other keys make of them."""
    lines, length = [], longest_row(config, setting.rows)
    step = dict(rows_per_step=config.step_rows(setting.gpus), gradient_accumulation_steps=1)
    for keys in changes(config):
        changed = dataclasses.replace(config, **step, **keys)  # the step has the same rows in all
        of_step = forecast_step(changed, setting, number)
        size = peak(forecast(changed, length, setting.gpus))
        fits = "yes" if size < FITS * setting.machine.memory else "NO"
        name = ", ".join(f"{key}: {value}" for key, value in keys.items()) or "as it is"
        lines.append([name, of_step.total, of_step.stage.micro_batches, size / GIB, fits])
    head = ["keys", "seconds per step", "micro-batches", f"peak GiB, rows of {length}", "fits"]
    table(f"Stage {number}, and what would change it", head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="+", metavar="YAML|KEY=VALUE")
    parser.add_argument("--gpu", choices=MACHINES, default="a100-80gb")
    parser.add_argument("--gpus", type=positive, default=1)
    parser.add_argument("--made-up", type=positive, metavar="N", help="rows of GSM8K's lengths")
    args = parser.parse_args()
    try:
        config = training_config(*args.config)
        hf_config = load_hf_config(config)  # before the rows, which take longer
        rows = read_rows(config, args.made_up)
    except UserError as error:
        return error.report()
    print_report(config, make_setting(config, hf_config, rows, MACHINES[args.gpu], args.gpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
