"""One HTML file that shows runs: curves, tables, and every row that was evaluated.

report.html beside this file is the page; this module puts the data into it. The result needs no
network and no other file.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from analysis.compare import RESULT_FIELDS, read_results
from analysis.output import check_output
from engine.curve import COLOURS, names_of, read_curve, smooth
from engine.files import write_whole
from engine.logs import read_metrics
from engine.results import find_results, of_evaluations
from loader import read_yaml
from preprocessing.textfiles import read_text
from utils import FIELDS, UserError

PAGE, PLACE = Path(__file__).with_name("report.html"), "__REPORT__"
CHECKPOINT = re.compile(r"checkpoint_(\d+)")
# what the page reads of a line of results
ROW_FIELDS = RESULT_FIELDS | {
    "epoch": int,
    "stage": int,
    "num_latents": int,
    "gold_steps": list,
    "output": str,
    "new_tokens": int,
}
FIGURES = (
    "eval_set",
    "epoch",
    "stage",
    "forced_latents",
    "latents",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "rows",
    "cot_match",
    "new_tokens",
    "loss",
)
NO_SETTING = ("name", "save_path")  # where a run stands, not what it does


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    command.add_argument(
        "--output", type=Path, help="default: report.html, of one run in its folder"
    )


def run(args: argparse.Namespace) -> None:
    """Curves, tables and all rows of run folders, in one HTML file."""
    path = args.output or Path(
        "report.html" if len(args.runs) > 1 else args.runs[0] / "report.html"
    )
    check_output(path.parent, path.name)
    text = page(gather(args.runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    print(f"written: {path}, {len(text) / 1e6:.1f} MB")


def page(report: dict) -> str:
    """The page with its data. In them no character ends a script or is of another alphabet."""
    data = json.dumps(report, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace(PLACE, data)


def gather(run_dirs: list[Path]) -> dict:
    """All that the page shows. Raises UserError."""
    runs = [describe_run(folder, name) for folder, name in zip(run_dirs, names_of(run_dirs))]
    for number, described in enumerate(runs):
        described["colour"] = COLOURS[number % len(COLOURS)]
    questions: dict[tuple, int] = {}  # told once, however many evaluations ask them
    evaluations = [
        {"run": number, **evaluation}
        for number, folder in enumerate(run_dirs)
        for evaluation in read_evaluations(folder, questions)
    ]
    return {
        "runs": runs,
        "config": compare_configs([read_yaml(folder / "config.yaml") for folder in run_dirs]),
        "questions": list(questions),
        "evaluations": evaluations,
    }


def describe_run(run_dir: Path, name: str) -> dict:
    """Its curves, and the figures of its evaluations, of which a later one replaces an earlier."""
    curve = read_curve(run_dir, name)
    figures = {
        tuple(record.get(key) for key in FIGURES[:4]): {key: record.get(key) for key in FIGURES}
        for record in of_evaluations(read_metrics(run_dir / "metrics.jsonl"))
    }
    losses = [*zip(*(axis.tolist() for axis in smooth(curve.losses)))]
    validation = [pair for pair in sorted(curve.validation_loss.items()) if math.isfinite(pair[1])]
    return {
        "name": name,
        "losses": [[round(x, 4), round(y, 5)] for x, y in losses],
        "validation": validation,
        "accuracy": [[epoch, *rates] for epoch, rates in sorted(curve.accuracy.items())],
        "without": sorted(curve.without_latents.items()),
        "spans": curve.spans(),
        "latents": curve.latents,
        "best": curve.best_epoch,
        "figures": sorted(figures.values(), key=in_order),
    }


def in_order(figures: dict) -> tuple[str, int, int]:
    """By set and epoch, the stage's own number of latents first."""
    forced = figures["forced_latents"]
    return figures["eval_set"] or "", figures["epoch"], -1 if forced is None else forced


def compare_configs(configs: list[dict]) -> dict:
    """Keys that differ between the runs, and what is not the default in all of them alike."""
    names = dict.fromkeys([*FIELDS, *(name for config in configs for name in config)])
    defaults: dict[str, Any] = {**names, **{name: f.default for name, f in FIELDS.items()}}
    different, alike = [], []
    for name in names:
        if name in NO_SETTING:
            continue
        values = [{**defaults, **config}[name] for config in configs]
        texts = ["null" if value is None else str(value) for value in values]
        if len(set(texts)) > 1:
            different.append([name, texts])
        elif values[0] != defaults[name]:
            alike.append([name, texts[:1]])
    return {"different": different, "alike": alike}


# ------------------------------------------------------------------------------- rows


def read_evaluations(run_dir: Path, questions: dict[tuple, int]) -> list[dict]:
    """What the results files of a run hold, by epoch. questions: (row, question, gold answer, gold
    steps) and their numbers; those that are new are added. Raises UserError."""
    thoughts, evaluations = read_thoughts(run_dir), []
    for name, file in find_results(run_dir):
        results = read_results(file, ROW_FIELDS)
        evaluation = {
            "epoch": results[0]["epoch"],
            "stage": results[0]["stage"],
            "eval_set": name["eval_set"],
            "forced_latents": None if name["latents"] is None else int(name["latents"]),
            "rows": [],
        }
        for result in results:
            known = result["row"], result["question"], result["gold_answer"]
            asked = *known, tuple(map(str, result["gold_steps"]))
            latents = thoughts.get((result["epoch"], *known, result.get("answer")), [])
            evaluation["rows"].append(
                [
                    questions.setdefault(asked, len(questions)),
                    result["num_latents"],
                    result.get("answer"),
                    int(result["correct"]),
                    result["new_tokens"],
                    result["output"].removeprefix(result["question"]).removeprefix("\n"),
                    *([latents] if latents and len(latents) == result["num_latents"] else []),
                ]
            )
        evaluations.append(evaluation)
    return sorted(evaluations, key=in_order)


def read_thoughts(run_dir: Path) -> dict[tuple, list[dict]]:
    """The latents of a run's rows that `analysis look` has saved, by epoch, row and answer: another
    run's, which stood under this name before, answered otherwise. Raises UserError."""
    run_dir, found = run_dir.resolve(), {}
    for folder in (run_dir, run_dir.with_name(f"{run_dir.name}-analysis")):
        path = folder / "thoughts.json"
        if not path.exists():
            continue
        try:
            report = json.loads(read_text(path), parse_constant=lambda nan: None)
            checkpoint = CHECKPOINT.fullmatch(Path(report["checkpoint"]).name)
            if checkpoint is None:  # within an epoch, or of others: no results are of it
                continue
            for row in report["rows"]:
                known = int(checkpoint[1]), row["row"], row["question"], row["gold_answer"]
                found[*known, row["answer"]] = [
                    {key: latent[key] for key in ("norm", "top", "answer_without")}
                    for latent in row["latents"]
                ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not as `analysis look` writes it: {error!r}") from None
    return found
