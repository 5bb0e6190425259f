"""Paired comparison of two runs on the same rows, from their results_epoch_N.jsonl."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.results import find_results
from preprocessing.textfiles import read_text
from utils import UserError

NUM_RESAMPLES = 10_000  # of the bootstrap
MAX_NAMES = 10  # of files in one message
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
class Paired:
    """The difference of two settings on the same questions."""

    p_value: float  # of sign_flip_test
    difference: float  # accuracy of the first minus the second's, in [-1, 1]
    difference_low: float  # 95% interval: percentiles of paired bootstrap resamples
    difference_high: float

    def interval(self) -> str:
        return f"{self.difference:+.1%} [{self.difference_low:+.1%}, {self.difference_high:+.1%}]"


@dataclass(kw_only=True)
class Comparison(Paired):
    """Two runs on the same rows. first_only: rows that only the first has right; and so on."""

    rows: int
    both: int
    first_only: int
    second_only: int
    neither: int

    def line(self) -> str:
        return (
            f"{self.rows} rows: both right {self.both}, only the first {self.first_only}, only the "
            f"second {self.second_only}, neither {self.neither}; difference {self.interval()}, "
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
    try:
        found = find_results(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path / 'metrics.jsonl'}: cannot read the records: {error}") from None
    epochs = {
        int(match["epoch"]): file
        for match, file in found
        if match["eval_set"] is None and match["latents"] is None
    }
    if not epochs:
        others = ", ".join(sorted(file.name for file in path.glob("results_*.jsonl"))[:MAX_NAMES])
        hint = f" ({others})" if others else ", or a run folder"
        raise UserError(f"{path}: holds no results_epoch_*.jsonl; give the file{hint}")
    return epochs[max(epochs)]


def compare(first: list[dict], second: list[dict]) -> Comparison:
    """Paired comparison of the results of two runs. Raises DifferentRows."""
    a, b = np.array(right_answers([first, second]), dtype=int)
    paired = compare_answers(a[None], b[None])
    return Comparison(
        rows=len(a),
        both=int((a & b).sum()),
        first_only=int((a > b).sum()),
        second_only=int((a < b).sum()),
        neither=int((1 - (a | b)).sum()),
        **vars(paired),
    )


def right_answers(runs: list[list[dict]]) -> list[list[bool]]:
    """Which rows each run has right. Raises DifferentRows where they were not asked the same."""
    first = runs[0]
    for other in runs[1:]:
        if len(first) != len(other):
            raise DifferentRows(
                f"the runs have {len(first)} and {len(other)} rows; a paired comparison "
                "needs the same ones"
            )
        for ours, theirs in zip(first, other):
            for key in ("row", "question", "gold_answer"):
                if ours[key] != theirs[key]:
                    raise DifferentRows(
                        f"row {ours['row']}: {key} is {ours[key]!r} in the first run and "
                        f"{theirs[key]!r} in the second; compare runs on the same rows"
                    )
    return [[row["correct"] for row in run] for run in runs]


def compare_answers(first: np.ndarray, second: np.ndarray) -> Paired:
    """Two settings on the same questions, (seeds, questions) of 0 and 1 each: right or wrong.

    What is drawn anew, for the interval and for the test, is questions with the answers of all
    seeds to them: a question that is asked once more of another seed is no other question.
    """
    surplus = (first - second).sum(axis=0)  # (questions,) of how many seeds more has the first it
    scale, total = len(first), len(surplus)
    rng = np.random.default_rng(0)  # one resample at a time: all of them would be gigabytes
    means = [surplus[rng.integers(0, total, total)].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5]) / scale
    return Paired(sign_flip_test(surplus), float(surplus.mean() / scale), float(low), float(high))


def sign_flip_test(differences: np.ndarray) -> float:
    """Exact two-sided p-value of integers whose signs are those of fair coins (Fisher 1935): how
    often such coins make a sum as far from 0. Of differences of one row from another, all of
    them -1, 0 or 1, it is McNemar's exact test (1947)."""
    sizes = np.abs(differences[differences != 0])
    middle = sizes.sum()
    shares = np.zeros(2 * middle + 1)  # of the sums from -middle to middle
    shares[middle] = 1.0
    for size in sizes.tolist():  # no sum is beyond the ends before the last coin
        shares = (np.roll(shares, size) + np.roll(shares, -size)) / 2
    far = np.abs(np.arange(-middle, middle + 1)) >= abs(differences.sum())
    return min(1.0, float(shares[far].sum()))
