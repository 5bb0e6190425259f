"""What the commands share: rows and numbers of the command line, and what they write."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.probe import Probe
from engine.curve import MARK
from engine.evaluation import wilson_interval
from engine.files import check_writable, nearest, write_whole
from engine.results import keep
from utils import UserError


def add_config(command: argparse.ArgumentParser) -> None:
    """The argument that names a checkpoint or a run, as of run.py."""
    command.add_argument("config", nargs="+", metavar="YAML|KEY=VALUE", help="as of run.py")


def chosen_rows(text: str | None, default: int, probe: Probe) -> list[int]:
    """Row numbers of a comma-separated list. Raises UserError."""
    total = len(probe.rows)
    numbers = range(min(default, total)) if text is None else whole_numbers(text, "--rows")
    for number in numbers:
        if number >= total:
            raise UserError(
                f"--rows: there is no row {number} among the {total} of "
                f"{probe.config.val_path} (they count from 0)"
            )
    return list(numbers)


def whole_numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
        raise UserError(f"{option}: {text!r} is not a list of numbers from 0 up, such as 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def check_output(folder: Path, *names: str) -> None:
    """Raise UserError, before anything is computed, where the folder cannot be made, or one of
    these files in it is not ours to replace."""
    existing = nearest(folder)
    try:
        check_writable(existing)
    except OSError:
        raise UserError(
            f"output: {folder} cannot be written, {existing} is not a folder that one may write to"
        ) from None
    for path in (folder / name for name in names):
        if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()):
            raise UserError(f"output: {path} is not of analysis; move it, or give another name")


def share(successes: int, total: int) -> dict:
    """A rate of rows with its 95% interval, as reports have it."""
    return {
        "rows": successes,
        "rate": successes / total,
        "interval": list(wilson_interval(successes, total)),
    }


def percent(rate: float | None, interval: Sequence[float] | None = None) -> str:
    """A rate as text, with the ends of its interval; None: nobody knows it."""
    if rate is None:
        return "-"
    ends = "" if interval is None else f" [{interval[0]:.1%}, {interval[1]:.1%}]"
    return f"{rate:.1%}{ends}"


def write_json(path: Path, value: dict) -> None:
    """What is no number, as of a model that diverged, becomes null: JSON has no word for it. What
    was found of another checkpoint, where both name one, stays beside it under another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and "checkpoint" in value:
        before = json.loads(path.read_text(encoding="utf-8")).get("checkpoint")
        if before not in (None, value["checkpoint"]):
            print(f"{path}: was of {before}, now {keep(path).name}")
    value = {"made_by": MARK, **value}
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(_finite, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
