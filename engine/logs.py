"""Logging to the terminal and training.log, metrics.jsonl, wandb, TensorBoard."""

import dataclasses
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.distributed import World
from engine.files import write_whole
from preprocessing.textfiles import read_text
from utils import Config, UserError, log


@contextmanager
def logging_to(run_dir: Path, world: World) -> Iterator[None]:
    """To the terminal and training.log on the main process. On the first of every other node only
    warnings, and nothing below errors on the rest, which would repeat those of their node."""
    per_node = world.world_size // world.num_nodes  # torchrun numbers the ranks node by node
    others = logging.ERROR if world.rank % per_node else logging.WARNING
    log.setLevel(logging.INFO if world.is_main else others)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    if world.is_main:
        log.addHandler(logging.FileHandler(run_dir / "training.log"))
    form = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in log.handlers:
        handler.setFormatter(form)
    try:
        yield
    finally:
        for handler in log.handlers:
            handler.close()


def start_wandb(config: Config) -> Any:
    """A wandb run, or None: never a prompt, never a reason to stop training."""
    # wandb 0.31 no longer reads WANDB_DISABLED by itself; users of the ancestor rely on it
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    mode = os.environ.get("WANDB_MODE", "").strip().lower() or "online"
    if config.debug or disabled or mode == "disabled":
        return None
    if "WANDB_MODE" in os.environ:  # the library takes lower case only
        os.environ["WANDB_MODE"] = mode
    try:
        return _open_wandb(config, mode)
    except Exception as error:  # noqa: BLE001 settings that it rejects raise errors of many kinds
        reason = " ".join(str(error).split())[:300]
        log.warning(f"wandb: {reason}; training goes on without it")
    return None


def _open_wandb(config: Config, mode: str) -> Any:
    import wandb  # noqa: PLC0415 takes a second: only the process that logs pays it

    if mode == "online":
        try:
            wandb.Api()  # raises where no key is known; init() would ask for one
        except wandb.errors.UsageError:
            log.info(
                "wandb: no account found (`wandb login` adds one); training goes on without it"
            )
            return None
    return wandb.init(
        project=config.project,
        name=config.name,
        config=dataclasses.asdict(config),
        id=_wandb_id(config.run_dir),
        resume="allow",
        dir=config.run_dir,
    )


def _wandb_id(run_dir: Path) -> str:
    """The name of the run folder's run at wandb, kept in it: drawn, as another folder may have had
    this path, here or on another machine."""
    path = run_dir / "wandb_id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:16])
    return path.read_text()


def check_tensorboard(config: Config) -> None:
    """Raise UserError where event files are asked for and nothing here can write them."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard: the package is not installed; install it (pip install tensorboard), or "
            "set it to False"
        )


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, but for lines that a power cut tore. Raises OSError,
    ValueError."""
    records = []
    for line in read_text(path).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def curves(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by the curve that they belong to, in wandb and TensorBoard alike:
    every set of rows and every forced number of latents has its own."""
    eval_set, forced = record.get("eval_set"), record.get("forced_latents")
    group = record["kind"] + ("" if eval_set is None else f"_{eval_set}")
    group += "" if forced is None else f"_latents_{forced}"
    named = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return {f"{group}/{name}": value for name, value in named.items()}


class TensorBoard:
    """Event files with the numbers of a metrics.jsonl, by global step.

    A run that was stopped may have written steps that it makes again. What metrics.jsonl has kept
    is the truth: readers drop all events from its last step on (purge_step), and that one is
    written once more.
    """

    def __init__(self, path: Path):
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 takes a second or two

        records = read_metrics(path) if path.exists() else []
        last = max((record["global_step"] for record in records), default=0)
        self.writer = SummaryWriter(str(path.parent), purge_step=last)
        for record in records:
            if record["global_step"] == last:
                self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in curves(record).items():
            self.writer.add_scalar(name, value, record["global_step"], walltime=record["time"])
        self.writer.flush()  # a kill loses no step that metrics.jsonl has

    def close(self) -> None:
        self.writer.close()


def _for_json(value: Any) -> Any:
    """JSON has no word for nan and infinity."""
    if isinstance(value, list):
        return [_for_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """Metric records, one JSON object a line, mirrored to wandb and TensorBoard where they are."""

    def __init__(
        self, path: Path | str, wandb_run: Any = None, tensorboard: TensorBoard | None = None
    ):
        self.file = open(path, "a", encoding="utf-8")
        self.wandb_run = wandb_run
        self.tensorboard = tensorboard

    def write(self, **record: Any) -> None:
        record = {name: _for_json(value) for name, value in record.items()}
        timed = {"time": round(time.time(), 3), **record}
        self.file.write(json.dumps(timed) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log(curves(record))
        if self.tensorboard is not None:
            self.tensorboard.write(timed)

    def close(self) -> None:
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


class Bar(tqdm):
    """A progress bar that ends where its terminal does: a Ctrl-C ends the `tee` behind a run too,
    and the run still has to save."""

    def display(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().display(*args, **kwargs)
        except OSError:
            self.disable = True


def step_bar(epoch: int, first_step: int, num_steps: int, world: World) -> Bar:
    """Of the optimizer steps of an epoch, on the main process's terminal."""
    return Bar(
        total=num_steps,
        initial=first_step,
        desc=f"epoch {epoch}",
        unit="step",
        disable=not world.is_main,
        leave=False,
        dynamic_ncols=True,
        mininterval=1,
    )
