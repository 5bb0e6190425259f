"""The paper's Table 1 in miniature: all its methods, small models from scratch, on a CPU.

    bash benchmarks/table1_small.sh [--quick] [--tasks TASK ...] [--jobs N] [--seeds N]
                                    [--output_dir DIR]

trains each method on symbolic ProsQA and on arithmetic stories, five seeds each, every cell of the
table by run.py, two cells side by side, asks `analysis faithful` what their answers depend on, and
writes table.md, table.json and table.png into the output folder. Finished cells are kept: the same
command goes on where it stopped. --quick: the same in minutes with few rows and epochs; its numbers
mean nothing.
"""

import argparse
import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
from analysis.__main__ import main as analysis
from analysis.runs import Cell, Outcome, RunFailed, run_all
from analysis.seeds import mean_and_deviation
from preprocessing.arithmetic_stories import MAX_NUMBER
from preprocessing.common import positive
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
METHODS = {  # the file in args/rows/; None: the task's own
    "CoT": "cot",
    "No-CoT": "no_cot",
    "Pause token": "pause",
    "Coconut": None,
    "Coconut, recommended": None,
    "- w/o curriculum": "no_curriculum",
    "- w/o thought": "no_thoughts",
    "- pause as thought": "pause_as_thought",
}
WITH_THOUGHTS = ("Coconut", "Coconut, recommended", "- pause as thought")  # for `faithful`
SEEDS = 5
TITLES = {"prosqa": "symbolic ProsQA", "stories": "arithmetic stories"}
# a question of ProsQA names two candidates; an amount is one of the numbers from 0 to MAX_NUMBER
CHANCE = {"prosqa": 1 / 2, "stories": 1 / (MAX_NUMBER + 1)}
# what a task needs -> how it is made; {train} and {validation} are numbers of rows
MADE_BY = {
    "prosqa_train.json": "prosqa.py --prefix prosqa --symbolic --num_nodes 9 --min_hops 2 "
    "--max_hops 3 --mean_parents 1 --depth_weight 50 "
    "--train {train} --validation {validation} --test 0",
    "prosqa_model": "small_model.py --task prosqa --num_nodes 9 --hidden_size 128 --num_layers 3",
    "stories_train.json": "arithmetic_stories.py --prefix stories --train {train} "
    "--validation {validation}",
    "stories_model": "small_model.py --task stories",
}
ROWS = {"prosqa": dict(train=16_000, validation=500), "stories": dict(train=8000, validation=500)}
RECOMMENDED = {  # keys of the recipes of benchmarks/reliability.md, beside the task's own
    "prosqa": dict(
        advance_at=0.85,
        max_epochs_per_stage=4,
        num_epochs=12,
        c_thought=2,
        step_loss="head",
        step_loss_weight=0.5,
        lr=1e-3,
        lr_schedule="linear",
    ),
    "stories": dict(step_loss="head"),
}
QUICK_ROWS = dict(train=200, validation=20)
QUICK = dict(num_epochs=2, epochs_per_stage=1, max_latent_stage=1, gate_rows=20)


def quickly(keys: dict) -> dict:
    """The keys of a quick run: where there is a gate, it opens after an epoch."""
    gate = dict(max_epochs_per_stage=1) if "max_epochs_per_stage" in keys else {}
    return {**keys, **QUICK, **gate}


Key = tuple[str, str, int]  # task, method and seed
Table = dict[Key, Outcome]
Value = TypeVar("Value")


class Reliance(NamedTuple):
    """What the answers of a run depend on, shares in [0, 1]: those that change where another row's
    thoughts (CoT: chain) stand in, and those that follow a rewritten edge (None: no ProsQA)."""

    swapped: float
    followed: float | None


# ------------------------------------------------------------------------------- running


def prepare(output: Path, quick: bool) -> Path:
    """The folder with the tasks' data and models, made where they are missing; that of quick runs
    is another."""
    data = output / ("data_quick" if quick else "data")
    for name, recipe in MADE_BY.items():
        if (data / name).exists():
            continue
        rows = QUICK_ROWS if quick else ROWS[name.split("_")[0]]
        script, *options = shlex.split(recipe.format(**rows))
        target = data / name if name.endswith("_model") else data
        command = [sys.executable, ROOT / "preprocessing" / script, "--output_dir", target]
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    return data


def plan_cell(task: str, method: str, seed: int, data: Path, output: Path, quick: bool) -> Cell:
    name = f"{task}-{re.sub('[^a-z]+', '-', method.lower()).strip('-')}-{seed}"
    keys = RECOMMENDED[task] if method == "Coconut, recommended" else {}
    return Cell(arguments(task, method, {"name": name, "seed": seed, **keys}, data, output, quick))


def arguments(
    task: str, method: str, keys: dict, data: Path, output: Path, quick: bool
) -> tuple[str, ...]:
    """Those of run.py for a method of METHODS on what prepare() has made, with these keys."""
    files = [ROOT / f"args/small_{task}.yaml"]
    files += [ROOT / f"args/rows/{METHODS[method]}.yaml"] if METHODS[method] else []
    keys = {
        "save_path": output,
        "model_id": data / f"{task}_model",
        "train_path": data / f"{task}_train.json",
        "val_path": data / f"{task}_validation.json",
        **(quickly(keys) if quick else keys),
    }
    return (*map(str, files), *(f"{key}={value}" for key, value in keys.items()))


# ------------------------------------------------------------------------------- asking


def rely(table: Table) -> dict[Key, Reliance]:
    """Of each run with thoughts, and of CoT, whose chains are the control of Coconut's."""
    found: dict[Key, Reliance] = {}
    pairs = list(dict.fromkeys((task, seed) for task, _, seed in table))
    for task, seed in tqdm(pairs, desc="faithful", unit="seed"):
        edits = ["--edits"] if task == "prosqa" else []
        folders = {
            method: Path(table[task, method, seed].results).parent
            for method in ("CoT", *WITH_THOUGHTS)
        }
        for method in WITH_THOUGHTS:
            control = ["--cot", str(folders["CoT"])] if method == "Coconut" else []
            report = analyse(folders[method], *edits, *control)
            swapped = report["all"]["other"]
            found[task, method, seed] = Reliance(swapped["flips"], followed(report))
            if control:
                swapped = report["control"]["rates"]["other"]
                found[task, "CoT", seed] = Reliance(swapped["flips"], followed(report["control"]))
    return found


def followed(report: dict[str, Any]) -> float | None:
    """The share with the run's own latents, which stand first; None: no edits."""
    if "edits" not in report:
        return None
    return next(iter(report["edits"]["latents"].values()))["followed"]["rate"]


def analyse(run: Path, *options: str) -> dict[str, Any]:
    """What `faithful` finds out about a run, kept in a folder of its own. Raises RunFailed."""
    folder = run / "table1"
    path = folder / "faithful.json"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with path.with_suffix(".txt").open("w") as text, contextlib.redirect_stdout(text):
            code = analysis(["faithful", str(run), *options, "--output_dir", str(folder)])
        if code:
            raise RunFailed(f"faithful of {run}", code, "what is wrong stands above")
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------- writing


def tasks_of(table: Table) -> list[str]:
    return [task for task in TITLES if any(task == known for known, _, _ in table)]


def seeds_of(values: dict[Key, Value], task: str, method: str) -> list[Value]:
    return [value for (t, m, _), value in values.items() if (t, m) == (task, method)]


def describe_ends(outcomes: list[Outcome]) -> str:
    """The epochs and the stage that each seed ends with: one where all have the same. A gate may
    hold a run back, and an earlier stage is an easier one."""
    ends = [f"{epoch}: {stage}" for epoch, stage, _ in (o.epochs[-1] for o in outcomes)]
    return ", ".join(ends if len(set(ends)) > 1 else ends[:1])


def markdown(table: Table, reliance: dict[Key, Reliance]) -> str:
    """A row for each method, seven columns for each task."""
    tasks = tasks_of(table)
    head = "| method |" + "".join(
        f" {TITLES[task]}: accuracy, % | epochs: last stage | latents forced to 0 "
        "| other row's thoughts: changed, % | edge rewritten: followed, % | tokens per answer "
        "| training, s |"
        for task in tasks
    )
    lines = [head, "|---" * (1 + 7 * len(tasks)) + "|"]
    for method in METHODS:
        line = f"| {method} |"
        for task in tasks:
            mine = seeds_of(table, task, method)
            without = [o.without_latents for o in mine if o.without_latents is not None]
            line += f" {mean_and_deviation([o.accuracy for o in mine], 1, 100)} |"
            line += f" {describe_ends(mine)} |"
            relied = seeds_of(reliance, task, method)
            swapped = [r.swapped for r in relied]
            following = [r.followed for r in relied if r.followed is not None]
            for shares in (without, swapped, following):
                line += f" {mean_and_deviation(shares, 1, 100)} |" if shares else " - |"
            line += f" {mean_and_deviation([o.tokens for o in mine], 1)} |"
            line += f" {mean_and_deviation([o.seconds for o in mine], 0)} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


Bars = dict[tuple[str, str], list[tuple[float, float]]]  # by task and method: mean, deviation


def bars_of(table: Table) -> Bars:
    """Of the accuracy in %, then with latents forced to 0 where there are any."""
    bars: Bars = {}
    for task in tasks_of(table):
        for method in METHODS:
            mine = seeds_of(table, task, method)
            columns = [[o.accuracy for o in mine], [o.without_latents for o in mine]]
            bars[task, method] = [
                (100 * statistics.mean(v), 100 * statistics.stdev(v) if len(v) > 1 else 0.0)
                for v in columns
                if None not in v
            ]
    return bars


def draw(bars: Bars, path: Path) -> None:
    """Means and deviations by method, a panel for each task; crosses: latents forced to 0."""
    tasks, methods = list(dict.fromkeys(task for task, _ in bars)), list(METHODS)
    figure, (panels,) = plt.subplots(
        1, len(tasks), figsize=(1 + 5 * len(tasks), 4.4), sharey=True, squeeze=False
    )
    for panel, task in zip(panels, tasks):
        for y, method in enumerate(methods):
            (mean, deviation), *without = bars[task, method]
            colour = "#d9772b" if method.startswith("Coconut") else "#5b7fa6"
            panel.barh(y, mean, color=colour, height=0.65, xerr=deviation or None)
            panel.text(109, y, f"{mean:.0f}", va="center", fontsize=9)
            for forced, _ in without:
                panel.plot(forced, y, "X", color="black", markeredgecolor="white", markersize=9)
        panel.axvline(100 * CHANCE[task], color="black", linestyle="--", linewidth=1)
        panel.set_title(TITLES[task])
        panel.set(
            xlabel="accuracy, %", xlim=(0, 118), yticks=range(len(methods)), yticklabels=methods
        )
        panel.set_xticks(range(0, 101, 20))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(
        "Table 1 in miniature: small models from scratch\n"
        "(lines: deviation of the seeds; crosses: latents forced to 0; dashed: chance)",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def exit_code(study: Callable[[], None]) -> int:
    """That of a study, with what went wrong in a line."""
    try:
        study()
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except UserError as error:
        return error.report()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes; no meaning")
    parser.add_argument("--tasks", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--jobs", type=positive, default=2, help="runs side by side")
    parser.add_argument("--seeds", type=positive, default=SEEDS)
    parser.add_argument("--output_dir", type=Path, default=None)
    args = parser.parse_args()
    name = "table1_quick" if args.quick else "table1_small"
    output = args.output_dir or ROOT / "outputs" / name
    data = prepare(output, args.quick)
    # seed by seed, so that what is finished first is a whole table
    runs = [(t, m, seed) for seed in range(args.seeds) for t in args.tasks for m in METHODS]
    cells = [plan_cell(*run, data, output, args.quick) for run in runs]
    table = dict(zip(runs, run_all(cells, "table 1", args.jobs)))
    reliance = rely(table)
    values = [
        dict(task=key[0], method=key[1], seed=key[2], **asdict(outcome))
        | (reliance[key]._asdict() if key in reliance else {})
        for key, outcome in table.items()
    ]
    (output / "table.json").write_text(json.dumps(values, indent=1) + "\n")
    (output / "table.md").write_text(markdown(table, reliance))
    draw(bars_of(table), output / "table.png")
    print(markdown(table, reliance))


if __name__ == "__main__":
    sys.exit(exit_code(main))
