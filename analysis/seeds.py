"""Every combination of seeds and values trained, and one table of what they end with.

A value with commas outside brackets and quotes is several: seed=0,1,2 lr=1e-4,3e-4 is six runs of
two settings. Runs are named after the YAML and the values and stand in its save_path; the table
goes to <save_path>/<name>-seeds, or <save_path>/<name>-lr-seeds where lr has several values, and
takes the place of an earlier one of the same keys.
"""

import argparse
import itertools
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from analysis.compare import DifferentRows, Paired, compare_answers, read_results, right_answers
from analysis.output import add_config, check_output, write_json
from analysis.runs import Cell, Outcome, RunFailed, run_all
from engine.curve import MARK
from engine.files import write_whole
from loader import load_config, pieces
from preprocessing.common import positive
from utils import UserError

Outcomes = dict[int, Outcome]  # by seed


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument("--jobs", type=positive, help="runs side by side; default: GPUs, or cores")
    command.add_argument(
        "--sweep",
        action="store_true",
        help="evaluate each last checkpoint at all its stages' latents",
    )


def run(args: argparse.Namespace) -> None:
    """Train every combination of seeds and values; one table."""
    files = [text for text in args.config if "=" not in text]
    values = dict(text.split("=", 1) for text in args.config if "=" in text)
    config = load_config(*files, *(f"{key}={pieces(value)[0]}" for key, value in values.items()))
    folder = Path(config.save_path) / "-".join([config.name, *several(values), "seeds"])
    check_output(folder, "table.md", "table.json")
    plan = combinations(files, {"seed": str(config.seed), **values}, config.name)
    cells = [Cell(arguments, args.sweep) for _, _, arguments in plan]
    try:
        outcomes = run_all(cells, config.name, args.jobs)
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.code)
    settings: dict[str, Outcomes] = {}
    for (setting, seed, _), outcome in zip(plan, outcomes):
        settings.setdefault(setting, {})[seed] = outcome
    text = markdown(settings)
    table = {s: {seed: asdict(o) for seed, o in by_seed.items()} for s, by_seed in settings.items()}
    write_json(folder / "table.json", {"settings": table})
    write_whole(folder / "table.md", f"{text}\n<!-- {MARK} -->\n")
    print(f"{text}written: {folder}/table.md and table.json")


def several(values: dict[str, str]) -> list[str]:
    """The keys that have several values, without seed: those that tell settings apart."""
    return [key for key in values if key != "seed" and len(pieces(values[key])) > 1]


def combinations(
    files: list[str], values: dict[str, str], name: str
) -> list[tuple[str, int, tuple[str, ...]]]:
    """(setting, seed, arguments of run.py) of every run, seed by seed, so that a table on the way
    has all settings. Raises UserError where two runs would have one name."""
    plan: dict[str, tuple[str, int, tuple[str, ...]]] = {}
    seed_first = sorted(values, key=lambda key: key != "seed")
    differing = several(values)
    for chosen in itertools.product(*(pieces(values[key]) for key in seed_first)):
        one = dict(zip(seed_first, chosen))
        setting = " ".join(f"{key}={one[key]}" for key in differing)
        words = [f"{key}-{Path(one[key]).name}" for key in differing] + [f"seed-{one['seed']}"]
        run_name = "-".join([name, *(re.sub(r"[^\w.+-]+", "-", word) for word in words)])
        if run_name in plan:
            raise UserError(f"{run_name}: two runs have this name; let their values differ")
        keys = (f"{key}={value}" for key, value in one.items() if key != "name")
        arguments = (*files, *keys, f"name={run_name}")
        plan[run_name] = (setting or "all", load_config(*arguments).seed, arguments)
    return list(plan.values())


# ------------------------------------------------------------------------------- table


def markdown(settings: dict[str, Outcomes]) -> str:
    """A line for each setting. The first one's difference from the others is paired, of all seeds
    that both have; the interval and p are those of other questions, not of other seeds. There is
    none where val_path, or another key that chooses the rows, is what differs."""
    lines = [
        "| setting | seeds | accuracy, % | worst | latents forced to 0 | tokens per answer "
        "| difference from the first [95% interval] | p, by questions |",
        "|---" * 8 + "|",
    ]
    first = next(iter(settings.values()))
    for name, outcomes in settings.items():
        accuracies = [outcome.accuracy for outcome in outcomes.values()]
        without = [outcome.without_latents for outcome in outcomes.values()]
        known = [accuracy for accuracy in without if accuracy is not None]
        paired = "- | -"
        if outcomes is not first and (found := compare_seeds(outcomes, first)) is not None:
            paired = f"{found.interval()} | {found.p_value:.2g}"
        lines.append(
            f"| {name} | {len(outcomes)} | {mean_and_deviation(accuracies, 1, 100)} "
            f"| {100 * min(accuracies):.1f} "
            f"| {mean_and_deviation(known, 1, 100) if known else '-'} "
            f"| {mean_and_deviation([o.tokens for o in outcomes.values()], 1)} | {paired} |"
        )
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: list[float], digits: int, scale: float = 1.0) -> str:
    """Mean, and the sample standard deviation where there are several."""
    text = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text


def compare_seeds(outcomes: Outcomes, first: Outcomes) -> Paired | None:
    """Paired comparison of the answers of all seeds that both have; None: they share no seed, or
    were asked different rows. Raises UserError."""
    shared = [seed for seed in outcomes if seed in first]
    if not shared:
        return None
    files = [runs[seed].results for runs in (outcomes, first) for seed in shared]
    try:
        answers = np.array(right_answers([read_results(file) for file in files]), dtype=int)
    except DifferentRows:
        return None
    return compare_answers(answers[: len(shared)], answers[len(shared) :])
