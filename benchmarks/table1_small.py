"""The paper's Table 1 in miniature: all its methods, small models from scratch, on a CPU.

    bash benchmarks/table1_small.sh [--quick] [--tasks TASK ...] [--jobs N] [--seeds N]
                                    [--output_dir DIR]

trains each method on symbolic ProsQA (three seeds) and on arithmetic stories (one seed), each cell
of the table by run.py on one thread, two cells side by side, and writes table.md, table.json and
table.png into the output folder. Finished cells are kept: the same command goes on where it
stopped. --quick: the same in minutes with few rows and epochs; its numbers mean nothing.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
from preprocessing.arithmetic_stories import MAX_NUMBER

ROOT = Path(__file__).resolve().parents[1]
METHODS = {  # the file in args/rows/; None: the task's own
    "CoT": "cot",
    "No-CoT": "no_cot",
    "Pause token": "pause",
    "Coconut": None,
    "- w/o curriculum": "no_curriculum",
    "- w/o thought": "no_thoughts",
    "- pause as thought": "pause_as_thought",
}
SEEDS = {"prosqa": 3, "stories": 1}  # how many
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
QUICK_ROWS = dict(train=200, validation=20)
QUICK = dict(num_epochs=2, epochs_per_stage=1, max_latent_stage=1)


@dataclass(frozen=True)
class Cell:
    """One training run. accuracy in [0, 1]; tokens per answer, latents counted, eos not."""

    task: str
    method: str
    seed: int
    accuracy: float
    accuracy_without_latents: float | None  # of the same checkpoint; None: it has no latents
    tokens: float
    seconds: float  # of training steps, validation not counted


# ------------------------------------------------------------------------------- running


def prepare(data: Path, quick: bool) -> None:
    """Make the tasks' data and model folders where they are missing."""
    for name, recipe in MADE_BY.items():
        if (data / name).exists():
            continue
        rows = QUICK_ROWS if quick else ROWS[name.split("_")[0]]
        script, *arguments = shlex.split(recipe.format(**rows))
        target = data / name if name.endswith("_model") else data
        command = [sys.executable, ROOT / "preprocessing" / script, "--output_dir", target]
        subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)


def run_cell(task: str, method: str, seed: int, data: Path, output: Path, quick: bool) -> Cell:
    """Train one cell, from its newest checkpoint on, or take the finished one. Raises RuntimeError
    with the end of what run.py said."""
    name = f"{task}-{method.replace('- ', '').replace('/', '').replace(' ', '-').lower()}-{seed}"
    finished = output / name / "cell.json"
    if finished.exists():
        return Cell(**json.loads(finished.read_text()))
    keys = {
        "name": name,
        "save_path": output,
        "seed": seed,
        "model_id": data / f"{task}_model",
        "train_path": data / f"{task}_train.json",
        "val_path": data / f"{task}_validation.json",
        **(QUICK if quick else {}),
    }
    command = [sys.executable, ROOT / "run.py", ROOT / f"args/small_{task}.yaml"]
    command += [ROOT / f"args/rows/{METHODS[method]}.yaml"] if METHODS[method] else []
    command += [f"{key}={value}" for key, value in keys.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_DISABLED": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    cell = read_cell(task, method, seed, output / name / "metrics.jsonl")
    finished.write_text(json.dumps(asdict(cell)) + "\n")
    return cell


def read_cell(task: str, method: str, seed: int, metrics: Path) -> Cell:
    """The figures of a finished run: of its last epoch, never of its best."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = max(r["epoch"] for r in records)
    by_latents = {
        r["forced_latents"]: r for r in records if r["kind"] == "eval" and r["epoch"] == last
    }
    return Cell(
        task,
        method,
        seed,
        by_latents[None]["accuracy"],
        by_latents[0]["accuracy"] if 0 in by_latents else None,
        by_latents[None]["new_tokens"],
        sum(r["seconds"] for r in records if r["kind"] == "train"),
    )


def run_all(
    tasks: list[str], data: Path, output: Path, quick: bool, jobs: int, seeds: int
) -> list[Cell]:
    """All cells, `jobs` of them side by side; the first failure ends all.

    Seed by seed, so that every table on the way is whole.
    """
    runs = [
        (task, method, seed)
        for seed in range(max(SEEDS.values()))
        for task in tasks
        for method in METHODS
        if seed < min(SEEDS[task], seeds)
    ]
    bar = tqdm(total=len(runs), desc="table 1", unit="run")
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_cell, *run, data, output, quick) for run in runs]
        cells = []
        for future in futures:
            try:
                cells.append(future.result())
            except RuntimeError:
                pool.shutdown(cancel_futures=True)
                raise
            bar.write("  ".join(f"{value}" for value in asdict(cells[-1]).values()))
            bar.update()
    bar.close()
    return cells


# ------------------------------------------------------------------------------- writing


def mean_and_deviation(values: list[float], digits: int, scale: float = 1.0) -> str:
    """Mean, and the sample standard deviation where there are several."""
    text = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text


def tasks_of(cells: list[Cell]) -> list[str]:
    return [task for task in SEEDS if any(cell.task == task for cell in cells)]


def markdown(cells: list[Cell]) -> str:
    """One table: a row for each method, four columns for each task."""
    tasks = tasks_of(cells)
    head = "| method |" + "".join(
        f" {TITLES[task]}: accuracy, % | latents forced to 0 | tokens per answer | training, s |"
        for task in tasks
    )
    lines = [head, "|---" * (1 + 4 * len(tasks)) + "|"]
    for method in METHODS:
        line = f"| {method} |"
        for task in tasks:
            mine = [c for c in cells if (c.task, c.method) == (task, method)]
            without = [c.accuracy_without_latents for c in mine]
            line += f" {mean_and_deviation([c.accuracy for c in mine], 1, 100)} |"
            line += " - |" if None in without else f" {mean_and_deviation(without, 1, 100)} |"
            line += f" {mean_and_deviation([c.tokens for c in mine], 1)} |"
            line += f" {mean_and_deviation([c.seconds for c in mine], 0)} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


Bars = dict[tuple[str, str], list[tuple[float, float]]]  # by task and method: mean, deviation


def bars_of(cells: list[Cell]) -> Bars:
    """Of the accuracy in %, then with latents forced to 0 where there are any."""
    bars: Bars = {}
    for task in tasks_of(cells):
        for method in METHODS:
            mine = [c for c in cells if (c.task, c.method) == (task, method)]
            columns = [[c.accuracy for c in mine], [c.accuracy_without_latents for c in mine]]
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
            colour = "#d9772b" if method == "Coconut" else "#5b7fa6"
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes; no meaning")
    parser.add_argument("--tasks", nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many for each task")
    parser.add_argument("--output_dir", type=Path, default=None)
    args = parser.parse_args()
    name = "table1_quick" if args.quick else "table1_small"
    output = args.output_dir or ROOT / "outputs" / name
    prepare(output / "data", args.quick)
    try:
        cells = run_all(args.tasks, output / "data", output, args.quick, args.jobs, args.seeds)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (output / "table.json").write_text(json.dumps([asdict(c) for c in cells], indent=1) + "\n")
    (output / "table.md").write_text(markdown(cells))
    draw(bars_of(cells), output / "table.png")
    print(markdown(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
