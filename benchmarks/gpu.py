"""What this program does on a GPU, in one table: accuracy, memory, time.

    python benchmarks/gpu.py [--output outputs/gpu] [--save]

in under ten minutes on one A100 or H100, without network:

- the quickstart, against its result on a CPU;
- the main config with random weights of Qwen3-4B's shape on made-up rows of GSM8K's lengths: memory
  against the forecast, seconds per step against one pass of the library's model, host syncs;
- rows per second in evaluation, one by one and 32 together;
- a save and what goes on from it, with a small model or (--save: 40 GB of disk) at 4B.

Writes gpu.json and gpu.md. Without CUDA it rehearses all this with a tiny model on the CPU: that
shows that it runs, and its figures mean nothing.
"""

import argparse
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from gpu_report import describe_machine, report
from memory import forecast, peak
from parts import QWEN3_4B, made_up_rows, repeatable, row_tokenizer, small_config
from roofline import Machine, Shape, machine_of, time_of_micro_batch, time_of_update
from speed import plain_loss
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as hf_logging

from coconut import Coconut
from engine.batches import MicroBatch
from engine.distributed import World, process_group
from engine.evaluation import Evaluator
from engine.inputs import Inputs
from engine.logs import Metrics
from engine.loop import (
    Step,
    Training,
    forward_backward,
    make_evaluator,
    micro_batches,
    save,
    start_training,
    train_epoch,
)
from engine.model import build_model
from engine.preflight import gather_inputs
from engine.stop import Stop
from engine.weights import empty_model
from loader import load_config
from utils import Config

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "args" / "gsm8k_coconut_qwen3_a100_fresh_start.yaml"
QUICKSTART = ROOT / "args" / "quickstart.yaml"
EPOCH = 6  # of the main config: the first with six latents
STEPS = 2  # optimizer steps of an epoch
SYNC = "called a synchronizing CUDA operation"  # what torch says of each


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    large: Path | None  # folder with the config of the model to measure; None: a small one
    keys: tuple[str, ...]  # of the main config, to replace
    quickstart: tuple[str, ...]  # of the quickstart's
    evaluated: dict[int, int]  # rows by batch size


ON_GPU = Sizes(QWEN3_4B, ("max_new_tokens=40",), (), {1: 16, 32: 64})
REHEARSAL = Sizes(
    None,
    ("tokens_per_micro_batch=512", "rows_per_step=8", "max_new_tokens=4"),
    ("debug=True", "epochs_per_stage=1", "num_epochs=2", "max_new_tokens=4", "rows_per_step=128"),
    {1: 2, 4: 8},
)

# ------------------------------------------------------------------------------- the quickstart


def run_quickstart(folder: Path, keys: Iterable[str]) -> dict:
    """The whole of args/quickstart.yaml, in a process of its own; what it evaluated last."""
    script = ROOT / "preprocessing" / "quickstart.sh"
    subprocess.run(["bash", script, sys.executable], check=True)
    command = [sys.executable, ROOT / "run.py", QUICKSTART, f"save_path={folder}", *keys]
    began = time.perf_counter()
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    seconds = time.perf_counter() - began
    lines = (folder / "quickstart" / "metrics.jsonl").read_text().splitlines()
    own, forced = [json.loads(line) for line in lines][-2:]
    assert own["kind"] == forced["kind"] == "eval" and forced["forced_latents"] == 0
    return {
        "accuracy": own["accuracy"],
        "accuracy without latents": forced["accuracy"],
        "rows": own["rows"],
        "minutes": seconds / 60,
    }


# ------------------------------------------------------------------------------- the main config


def write_config(folder: Path, shape: Path | None, keys: Iterable[str]) -> Config:
    """The main config on made-up rows, two optimizer steps an epoch, and a model without weights.
    shape: the folder of its config.json; None: a small one."""
    tokenizer = row_tokenizer()
    if shape is None:
        small_config(len(tokenizer) + 3, layers=2, hidden=128).save_pretrained(folder / "model")
    else:
        shutil.copytree(shape, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = folder / "rows.json"
    more = (f"save_path={folder}", f"model_id={folder / 'model'}", "from_scratch=True")
    config = load_config(MAIN, *more, f"train_path={rows}", f"val_path={rows}", *keys)
    rows.write_text(json.dumps(made_up_rows(STEPS * config.step_rows(1))))
    config.run_dir.mkdir()
    return config


def start(inputs: Inputs, world: World) -> Training:
    # billions of random numbers are made on the GPU; weights of a checkpoint come from the disk
    new = inputs.start.source is None
    with world.device if new else nullcontext():
        model = build_model(inputs).to(world.device)
    return start_training(inputs, model, world)


def run_epoch(training: Training, inputs: Inputs, world: World, epoch: int) -> list[dict]:
    """The optimizer steps of an epoch, by the training loop; what it wrote of each."""
    path = inputs.config.run_dir / "metrics.jsonl"
    metrics = Metrics(path)
    try:
        train_epoch(training, inputs, world, metrics, Stop(), epoch, first_step=0)
    finally:
        metrics.close()
    return [json.loads(line) for line in path.read_text().splitlines()[-STEPS:]]


def batches_of(inputs: Inputs, world: World) -> list[MicroBatch]:
    """The micro-batches of the steps that are measured."""
    config, dataset = inputs.config, inputs.train_dataset(EPOCH)
    steps, _ = inputs.plan_epoch(dataset, EPOCH, world.world_size)
    assert len(steps) == STEPS, f"{len(steps)} steps"
    return sum(micro_batches(dataset, steps, world, config, inputs.pad_id), [])


def timed(world: World, action: Callable[[], Any]) -> float:
    """Seconds until the device is done with it."""
    wait = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - began


def count_syncs(action: Callable[[], Any]) -> int:
    """How often the host waits for the GPU meanwhile."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC in str(warning.message) for warning in caught)


def measure_training(inputs: Inputs, world: World, batches: list[MicroBatch], sizes: Sizes) -> dict:
    """Two optimizer steps after two that set everything up; forward and backward alone; evaluation
    with the same model."""
    training, config, on_gpu = start(inputs, world), inputs.config, world.device.type == "cuda"
    epoch = lambda: run_epoch(training, inputs, world, EPOCH)
    epoch()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    records: list[dict] = []
    seconds = timed(world, lambda: records.extend(epoch())) / STEPS
    figures = {
        "seconds per step": seconds,
        "loss": [record["loss"] for record in records],
        "peak bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak bytes reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
        "host syncs per step": count_syncs(epoch) / STEPS if on_gpu else None,
    }

    def passes() -> None:
        step = Step(np.arange(0))
        for batch in batches:
            forward_backward(training.model, batch, world, config.compute_dtype, step)
        training.model.zero_grad()

    training.model.train()
    figures["forward and backward"] = timed(world, passes) / STEPS
    figures["evaluation"] = measure_evaluation(training, inputs, world, sizes)
    return figures


def measure_evaluation(training: Training, inputs: Inputs, world: World, sizes: Sizes) -> dict:
    """Rows per second by batch size; random weights write no eos, so all rows go to the limit."""
    found = {}
    for batch_size, count in sizes.evaluated.items():
        rows = gather_inputs(inputs.config, val_rows=made_up_rows(count))
        evaluator: Evaluator = dataclasses.replace(
            make_evaluator(rows, world), batch_size=batch_size
        )
        outcome = evaluator.evaluate(training.model, rows.validation_dataset(EPOCH))
        assert outcome is not None
        found[batch_size] = {
            "rows": count,
            "rows per second": 1 / outcome[0].seconds_per_row,
            "new tokens per row": outcome[0].new_tokens,
        }
    return found


def measure_plain(inputs: Inputs, world: World, batches: list[MicroBatch]) -> float:
    """Seconds per step of the library's model as it is: forward and backward of the same rows, in
    one pass each."""
    with world.device:
        base = AutoModelForCausalLM.from_config(inputs.hf_config, dtype=inputs.config.dtype)
    base = base.to(world.device).train()
    if share := inputs.config.gradient_checkpointing:
        Coconut(base, fast_layers=False).checkpoint_activations(share)

    def passes() -> None:
        for batch in batches:
            plain_loss(base, batch.to(world.device).inputs()).backward()
        base.zero_grad()

    passes()
    return timed(world, passes) / STEPS


def forecast_step(
    config: Config, hf_config: PreTrainedConfig, batches: list[MicroBatch], machine: Machine
) -> float:
    """Seconds of an optimizer step, where all micro-batches are as their mean."""
    columns = np.array(
        [[len(b.input_ids), *b.latent_columns, b.input_ids.shape[1]] for b in batches]
    )
    rows, first, stop, length = columns.mean(0).round().astype(int).tolist()
    shape = Shape(rows, first, stop - first, length - stop)
    one = time_of_micro_batch(config, hf_config, shape, machine).total
    return one * len(batches) / STEPS + time_of_update(config, hf_config, machine).total


def forecasts(inputs: Inputs, batches: list[MicroBatch]) -> dict:
    """What was known before: bytes at the longest rows, and seconds per step where the card is
    known."""
    config = inputs.config
    parts = forecast(config, max(batch.input_ids.shape[1] for batch in batches))
    machine = machine_of(describe_machine()["card"])
    seconds = machine and forecast_step(config, inputs.hf_config, batches, machine)
    return {"peak bytes": peak(parts), "seconds per step": seconds}


def measure_main(folder: Path, world: World, sizes: Sizes) -> dict:
    """All that is measured of the main config."""
    folder.mkdir()
    config = write_config(folder, sizes.large, sizes.keys)
    inputs = gather_inputs(config)
    batches = batches_of(inputs, world)
    tokens = int(sum(batch.attention_mask.sum() for batch in batches))
    figures = {
        "parameters": sum(p.numel() for p in empty_model(inputs.hf_config).parameters()),
        "rows per step": config.step_rows(world.world_size),
        "tokens per row": tokens / (STEPS * config.step_rows(world.world_size)),
        "positions per token": sum(batch.input_ids.numel() for batch in batches) / tokens,
        "micro-batches per step": len(batches) / STEPS,
        "largest micro-batch": max((list(b.input_ids.shape) for b in batches), key=np.prod),
        "forecast": forecasts(inputs, batches),
        **measure_training(inputs, world, batches, sizes),
    }
    release()
    figures["plain pass"] = measure_plain(inputs, world, batches)
    release()
    return figures


def release() -> None:
    """Give the GPU's memory back; models stand in circles with their own methods."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------- save and resume


def go_on(training: Training, inputs: Inputs, world: World) -> tuple[list[float], dict[str, int]]:
    """The next epoch: its losses, and for every tensor of the training the sum of its bits, which
    another tensor would hardly have."""
    losses = [record["loss"] for record in run_epoch(training, inputs, world, EPOCH + 1)]
    tensors: dict[str, torch.Tensor] = dict(training.model.named_parameters())
    for number, state in enumerate(training.optimizer.state.values()):
        tensors |= {f"{number} {name}": value for name, value in state.items()}
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = {name: t.detach().view(whole[t.element_size()]) for name, t in tensors.items()}
    return losses, {name: int(tensor.sum(dtype=torch.int64)) for name, tensor in bits.items()}


def train_and_save(inputs: Inputs, world: World) -> tuple[float, Any]:
    """Seconds of a save after an epoch, and how the training goes on after it."""
    training = start(inputs, world)
    run_epoch(training, inputs, world, EPOCH)
    seconds = timed(world, lambda: save(training, inputs, world, EPOCH))
    return seconds, go_on(training, inputs, world)


def load_and_go_on(inputs: Inputs, world: World) -> tuple[float, Any]:
    """Seconds until the checkpoint is loaded, and how the training goes on from it."""
    assert inputs.start.epochs_done == EPOCH
    loaded: list[Training] = []
    seconds = timed(world, lambda: loaded.append(start(inputs, world)))
    return seconds, go_on(loaded[0], inputs, world)


def measure_resume(folder: Path, world: World, shape: Path | None, keys: Iterable[str]) -> dict:
    """Whether a training goes on from its checkpoint as it went on without: the same bits."""
    folder.mkdir()
    config = write_config(folder, shape, keys)
    with repeatable():
        saving, wanted = train_and_save(gather_inputs(config), world)
        release()
        loading, actual = load_and_go_on(gather_inputs(config), world)
        release()
    checkpoint = config.run_dir / f"checkpoint_{EPOCH}"
    return {
        "bytes": sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
        "seconds to save": saving,
        "seconds to load": loading,
        "exact": actual == wanted,
    }


# ------------------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--save", action="store_true", help="save and resume at 4B, not small")
    args = parser.parse_args()
    disable_progress_bar()
    hf_logging.disable_progress_bar()
    sizes = ON_GPU if torch.cuda.is_available() else REHEARSAL
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    figures: dict[str, Any] = {"machine": describe_machine()}

    def keep(name: str, found: dict | float) -> None:
        """At once: a later part may fail, and time on a GPU is dear."""
        figures[name] = found
        (args.output / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=args.output) as name:
        folder = Path(name)
        with process_group(together=()) as world:
            keep("main config", measure_main(folder / "main", world, sizes))
            shape = sizes.large if args.save else None
            keep("resume", measure_resume(folder / "resume", world, shape, sizes.keys))
        keep("quickstart", run_quickstart(folder / "quickstart", sizes.quickstart))
    keep("seconds", time.perf_counter() - began)
    text = report(figures)
    (args.output / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
