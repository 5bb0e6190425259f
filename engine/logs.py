"""Logging to the terminal and training.log, metrics.jsonl, wandb."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.distributed import World
from utils import Config, log


@contextmanager
def logging_to(run_dir: Path, world: World) -> Iterator[None]:
    """To the terminal and training.log on the main process; warnings only on the others."""
    log.setLevel(logging.INFO if world.is_main else logging.WARNING)
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
        id=hashlib.sha256(str(config.run_dir.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=config.run_dir,
    )


INFINITIES = (math.inf, -math.inf)


class Metrics:
    """Metric records, one JSON object a line, mirrored to wandb where there is a run."""

    def __init__(self, path: Path | str, wandb_run: Any = None):
        self.file = open(path, "a", encoding="utf-8")
        self.wandb_run = wandb_run

    def write(self, **record: Any) -> None:
        # JSON has no word for nan and infinity
        record = {k: str(v) if v != v or v in INFINITIES else v for k, v in record.items()}
        self.file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            self.wandb_run.log({f"{record['kind']}/{k}": v for k, v in numbers.items()})

    def close(self) -> None:
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
