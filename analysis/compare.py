"""Paired comparison of two runs on the same rows, from their results_epoch_N.jsonl."""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocessing.textfiles import read_text
from utils import UserError

NUM_RESAMPLES = 10_000  # of the bootstrap
MAX_NAMES = 10  # of files in one message
RESULTS = re.compile(r"results_epoch_(\d+)\.jsonl")
# what a comparison reads of a line of results
RESULT_FIELDS: dict[str, type] = {"row": int, "question": str, "gold_answer": str, "correct": bool}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("first")
    command.add_argument("second")


def run(args: argparse.Namespace) -> None:
    """Paired comparison of two results files."""
    print(compare_files(args.first, args.second))


class DifferentRows(UserError):
    """Two runs that were not evaluated on the same rows."""


@dataclass
class Comparison:
    """Two runs on the same rows. first_only: rows that only the first has right; and so on."""

    rows: int
    both: int
    first_only: int
    second_only: int
    neither: int
    p_value: float  # McNemar's exact test, two-sided
    difference: float  # accuracy of the first minus the second's, in [-1, 1]
    difference_low: float  # 95% interval: percentiles of paired bootstrap resamples
    difference_high: float

    def line(self) -> str:
        return (
            f"{self.rows} rows: both right {self.both}, only the first {self.first_only}, only the "
            f"second {self.second_only}, neither {self.neither}; difference {self.difference:+.1%} "
            f"[{self.difference_low:+.1%}, {self.difference_high:+.1%}], "
            f"McNemar p = {self.p_value:.2g}"
        )


def read_results(path: str | Path, fields: dict[str, type] = RESULT_FIELDS) -> list[dict]:
    """The rows of a results file of ours, which have at least these fields. Raises UserError."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read these results: {error}") from None
    results = []
    # not splitlines(): JSON texts may hold line separators of other alphabets as they are
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            result = None
        good = isinstance(result, dict) and fields.keys() <= result.keys()
        if not good or any(type(result[k]) is not kind for k, kind in fields.items()):
            raise UserError(
                f"{path}: line {number}: not a result of an evaluation (results_epoch_*.jsonl): "
                f"expected an object with {', '.join(sorted(fields))}"
            )
        results.append(result)
    return results


def compare_files(first: str, second: str) -> str:
    """What compare() says of two results files, or of the newest ones of run folders. Raises
    UserError."""
    paths = [newest_results(Path(path)) for path in (first, second)]
    try:
        comparison = compare(*map(read_results, paths))
    except DifferentRows as error:
        raise UserError(f"{paths[0]} and {paths[1]}: {error}") from None
    return f"first {paths[0]}, second {paths[1]}\n{comparison.line()}"


def newest_results(path: Path) -> Path:
    """The path, or where it is a run folder the results with the latents of its newest stage."""
    if not path.is_dir():
        return path
    named = [(RESULTS.fullmatch(file.name), file) for file in path.iterdir()]
    epochs = {int(match[1]): file for match, file in named if match}
    if not epochs:
        others = ", ".join(sorted(file.name for file in path.glob("results_*.jsonl"))[:MAX_NAMES])
        hint = f" ({others})" if others else ", or a run folder"
        raise UserError(f"{path}: holds no results_epoch_*.jsonl; give the file{hint}")
    return epochs[max(epochs)]


def compare(first: list[dict], second: list[dict]) -> Comparison:
    """Paired comparison of the results of two runs. Raises DifferentRows."""
    if len(first) != len(second):
        raise DifferentRows(
            f"the runs have {len(first)} and {len(second)} rows; a paired comparison "
            "needs the same ones"
        )
    for ours, theirs in zip(first, second):
        for key in ("row", "question", "gold_answer"):
            if ours[key] != theirs[key]:
                raise DifferentRows(
                    f"row {ours['row']}: {key} is {ours[key]!r} in the first run and "
                    f"{theirs[key]!r} in the second; compare runs on the same rows"
                )
    right = np.array([[a["correct"], b["correct"]] for a, b in zip(first, second)], dtype=int)
    total, (a, b) = len(right), right.T
    first_only, second_only = int((a > b).sum()), int((a < b).sum())
    rng = np.random.default_rng(0)  # one resample at a time: all of them would be gigabytes
    means = [(a - b)[rng.integers(0, total, total)].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Comparison(
        total,
        int((a & b).sum()),
        first_only,
        second_only,
        int((1 - (a | b)).sum()),
        mcnemar(first_only, second_only),
        float((a - b).mean()),
        float(low),
        float(high),
    )


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p-value (McNemar 1947): a fair coin for each row that tells them apart."""
    different, fewer = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(different, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**different)
