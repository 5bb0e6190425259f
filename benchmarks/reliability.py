"""Why does accuracy fall as latents grow, and what helps? One change at a time, and recipes.

    bash benchmarks/reliability.sh [--quick] [--parts PART ...] [--tasks TASK ...] [--jobs N]
                                   [--seeds N] [--output_dir DIR]

trains the tasks of benchmarks/table1_small.py with the recipes beside their controls (five seeds),
then with one change of the faithful recipe at a time (three), and writes table.md, runs.json and
accuracy.png into the output folder. Finished runs are kept: the same command goes on where it
stopped. A seed is never left out. --quick: the same in minutes with few rows; its numbers mean
nothing.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).resolve().parents[1]))
from table1_small import RECOMMENDED, ROOT, TITLES, arguments, describe_ends, exit_code, prepare

from analysis.runs import Cell, Outcome, run_all
from analysis.seeds import mean_and_deviation
from loader import read_yaml
from preprocessing.common import positive
from utils import FIELDS

FAITHFUL = "faithful"
# one change of the faithful recipe each: keys
CHANGES: dict[str, dict] = {
    FAITHFUL: {},
    "bf16, plain AdamW": dict(bf16=True, optimizer="adamw"),
    "bf16, mended AdamW": dict(bf16=True),
    "optimizer reset in each epoch": dict(reset_optimizer="epoch"),
    "optimizer reset in each stage": dict(reset_optimizer=True),
    "optimizer never reset": dict(reset_optimizer=False),
    "one latent for each step": dict(c_thought=1),
    "two latents for each step": dict(c_thought=2),
    "as many epochs as with the gate": {},  # EPOCHS
    "gate": dict(epochs_per_stage=1, max_epochs_per_stage=4),
    "mixing, uniform": dict(stage_mixing="uniform"),
    "mixing, linear": dict(stage_mixing="linear"),
    "latents one by one": dict(latent_growth="one"),
    "all latents from the start": dict(latent_growth="all"),
    "step loss, head": dict(step_loss="head"),
    "step loss, decoder": dict(step_loss="decoder"),
}
# epochs, so that the fixed schedule and the gate have equal numbers of them; of steps the gate has
# fewer, as its rows are not trained on: 244 in an epoch against 250 (ProsQA 988 against 1000)
EPOCHS = {
    "stories": {
        "as many epochs as with the gate": dict(num_epochs=16, epochs_per_stage=3),
        "gate": dict(num_epochs=16, advance_at=0.95),
        "latents one by one": dict(epochs_per_stage=1),
    },
    "prosqa": {
        "as many epochs as with the gate": dict(num_epochs=12, epochs_per_stage=3),
        "gate": dict(num_epochs=12, advance_at=0.9),
    },
}
# method of Table 1 and whether it has the recommended recipe; that of the stories is a loss of
# thoughts alone, so there pauses and no thoughts have the faithful one
RECIPES = {
    "recommended": ("Coconut", True),
    "recommended, pause as thought": ("- pause as thought", True),
    "recommended, no thoughts": ("- w/o thought", True),
    "CoT": ("CoT", False),
}
PARTS = {"recipes": (FAITHFUL, *RECIPES), "changes": tuple(CHANGES)}
SEEDS = {"recipes": 5, "changes": 3}


class Run(NamedTuple):
    task: str
    setting: str
    seed: int


Runs = dict[Run, Outcome]

# ------------------------------------------------------------------------------- running


def plan(parts: list[str], tasks: list[str], most: int) -> list[Run]:
    """All runs, seed by seed, so that what is finished first is a whole table. A change that the
    task's own recipe has already is no change: it is left out. One that is the whole recommended
    recipe is run once, under that name."""
    runs: dict[Run, None] = {}
    for part in parts:
        for seed in range(min(SEEDS[part], most)):
            for task in tasks:
                for setting in PARTS[part]:
                    if setting == all_of_recommended(task):
                        setting = "recommended"
                    if setting in RECIPES or setting == FAITHFUL or changes(task, setting):
                        runs[Run(task, setting, seed)] = None
    return list(runs)


def changes(task: str, setting: str) -> dict:
    """The keys of a change that differ from the task's own recipe; none where they change nothing:
    where a step has one latent, it comes alone as it is."""
    own = read_yaml(ROOT / f"args/small_{task}.yaml")
    keys = {**CHANGES[setting], **EPOCHS[task].get(setting, {})}
    if keys.get("latent_growth") == "one" and own["c_thought"] == 1:
        return {}
    return {k: v for k, v in keys.items() if own.get(k, FIELDS[k].default) != v}


@cache
def all_of_recommended(task: str) -> str | None:
    """The change that is the task's whole recommended recipe, if one is."""
    return next((s for s in CHANGES if changes(task, s) == RECOMMENDED[task]), None)


def plan_cell(run: Run, data: Path, output: Path, quick: bool) -> Cell:
    method = "Coconut"
    if run.setting in RECIPES:
        method, recommended = RECIPES[run.setting]
        keys = RECOMMENDED[run.task]
        if not recommended:  # CoT: as many epochs
            keys = {k: v for k, v in keys.items() if k == "num_epochs"}
        if method != "Coconut":  # nothing is thought, or nothing of a thought's own
            keys = {k: v for k, v in keys.items() if not k.startswith("step_loss")}
    else:
        keys = changes(run.task, run.setting)
    name = re.sub("[^a-z0-9]+", "-", f"{run.task}-{run.setting}-{run.seed}".lower())
    keys = {**keys, "name": name, "seed": run.seed}
    return Cell(arguments(run.task, method, keys, data, output, quick), sweep=True)


# ------------------------------------------------------------------------------- what happened


class Transition(NamedTuple):
    """The change to another stage: how far accuracy falls in its first epoch, and in which of its
    epochs it is back within a point of what it was; None: in none."""

    stage: int
    fall: float
    recovered: int | None


def transitions(outcome: Outcome) -> Iterator[Transition]:
    for (_, stage, before), (epoch, following, after) in itertools.pairwise(outcome.epochs):
        if following == stage:
            continue
        later = [(e, accuracy) for e, s, accuracy in outcome.epochs if s == following]
        back = next((e for e, accuracy in later if accuracy >= before - 0.01), None)
        yield Transition(following, before - after, None if back is None else back - epoch + 1)


def describe_falls(outcomes: list[Outcome]) -> str:
    """Of each stage: the mean fall in points, and of each seed the epochs to recover ("-": it does
    not; ".": it never comes to that stage)."""
    found = [{t.stage: t for t in transitions(outcome)} for outcome in outcomes]
    parts = []
    for stage in sorted(set().union(*found)):
        seeds = [of_seed.get(stage) for of_seed in found]
        fall = 100 * statistics.mean(t.fall for t in seeds if t)
        epochs = "/".join("." if t is None else str(t.recovered or "-") for t in seeds)
        parts.append(f"{stage}: {fall:.0f} ({epochs})")
    return ", ".join(parts) or "-"


def markdown(runs: Runs) -> str:
    """A table for each task, a line for each setting."""
    text = ""
    for task in dict.fromkeys(run.task for run in runs):
        alone = all_of_recommended(task)
        text += f"{TITLES[task]}{f' (recommended: {alone})' if alone else ''}\n\n"
        text += (
            "| setting | seeds | accuracy, % | worst | epochs: last stage | by number of latents "
            "| stage: fall, points (epochs to recover of each seed) |\n" + "|---" * 7 + "|\n"
        )
        for setting, outcomes in by_setting(runs, task).items():
            accuracies = [outcome.accuracy for outcome in outcomes]
            numbers = sorted({int(n) for outcome in outcomes for n in outcome.by_latents})
            sweep = ", ".join(
                f"{n}: {100 * statistics.mean(o.by_latents[str(n)] for o in outcomes):.1f}"
                for n in numbers
            )
            text += (
                f"| {setting} | {len(outcomes)} | {mean_and_deviation(accuracies, 1, 100)} "
                f"| {100 * min(accuracies):.1f} | {describe_ends(outcomes)} | {sweep or '-'} "
                f"| {describe_falls(outcomes)} |\n"
            )
        text += "\n"
    return text


def by_setting(runs: Runs, task: str) -> dict[str, list[Outcome]]:
    settings: dict[str, list[Outcome]] = {}
    for name in dict.fromkeys([*RECIPES, *CHANGES]):
        found = [
            outcome for run, outcome in runs.items() if (run.task, run.setting) == (task, name)
        ]
        if found:
            settings[name] = found
    return settings


def draw(runs: Runs, path: Path) -> None:
    """The accuracy of every run, and the mean of each setting; a panel for each task."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    rows = max(len(by_setting(runs, task)) for task in tasks)
    figure, (panels,) = plt.subplots(
        1, len(tasks), figsize=(1 + 6 * len(tasks), 1.6 + 0.32 * rows), squeeze=False
    )
    for panel, task in zip(panels, tasks):
        settings = by_setting(runs, task)
        for y, (name, outcomes) in enumerate(settings.items()):
            colour = "#d9772b" if name in RECIPES else "#5b7fa6"
            accuracies = [100 * outcome.accuracy for outcome in outcomes]
            panel.plot(accuracies, [y] * len(outcomes), "o", color=colour, alpha=0.6)
            panel.plot(statistics.mean(accuracies), y, "|", color="black", markersize=14)
        panel.set(title=TITLES[task], xlabel="accuracy of each seed, %", xlim=(0, 101))
        panel.set_yticks(range(len(settings)), list(settings))
        panel.invert_yaxis()
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes; no meaning")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--jobs", type=positive, default=2, help="runs side by side")
    most = max(SEEDS.values())
    parser.add_argument("--seeds", type=positive, default=most, help="at most so many")
    parser.add_argument("--output_dir", type=Path, default=None)
    args = parser.parse_args()
    name = "reliability_quick" if args.quick else "reliability"
    output = args.output_dir or ROOT / "outputs" / name
    data = prepare(output, args.quick)
    runs = plan(args.parts, args.tasks, args.seeds)
    cells = [plan_cell(run, data, output, args.quick) for run in runs]
    done = dict(zip(runs, run_all(cells, "reliability", args.jobs)))
    values = [{**run._asdict(), **asdict(outcome)} for run, outcome in done.items()]
    (output / "runs.json").write_text(json.dumps(values, indent=1) + "\n")
    (output / "table.md").write_text(markdown(done))
    draw(done, output / "accuracy.png")
    print(markdown(done))


if __name__ == "__main__":
    sys.exit(exit_code(main))
