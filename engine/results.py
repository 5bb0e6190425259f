"""The files of an evaluation: results_*.jsonl with all rows, validation_examples.txt to read."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

from engine.files import write_whole
from engine.logs import read_metrics
from utils import log

NUM_EXAMPLES = 10  # rows shown in full in validation_examples.txt
KINDS = ("eval", "eval_set")  # of an evaluation's records in metrics.jsonl: of a run, of a set
# the files of results_name; eval_set and latents are None where its arguments are
RESULTS = re.compile(
    r"results(?:_(?P<eval_set>.+))?_epoch_(?P<epoch>\d+)(?:_latents_(?P<latents>\d+))?\.jsonl"
)
# of a row, in a table and in its JSON
SECONDS = re.compile(r'(?<=\| )\d+\.\d{3}(?= \|)|(?<="seconds_per_row": )[^,\n]+')


def results_name(epoch: int, num_latents: int | None, eval_set: str | None) -> str:
    """Of a results file, without .jsonl. num_latents: None where it is the stage's own."""
    name = "results" if eval_set is None else f"results_{eval_set}"
    return f"{name}_epoch_{epoch}" + ("" if num_latents is None else f"_latents_{num_latents}")


def of_evaluations(records: list[dict]) -> list[dict]:
    """Those of a run's metrics that are of its evaluations, in order."""
    return [record for record in records if record["kind"] in KINDS]


def find_results(run_dir: Path) -> list[tuple[re.Match[str], Path]]:
    """The results files of a run folder that its metrics.jsonl names, all of them where it has
    none, with what RESULTS makes of the names. Others are of a rehearsal, or of epochs after the
    checkpoint that the run went on from. Raises OSError, ValueError, KeyError."""
    found = [(match, p) for p in run_dir.iterdir() if (match := RESULTS.fullmatch(p.name))]
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return found
    known = {
        results_name(record["epoch"], record.get("forced_latents"), record.get("eval_set"))
        for record in of_evaluations(read_metrics(path))
    }
    return [(match, file) for match, file in found if file.stem in known]


def write_results(run_dir: Path, title: str, file_name: str, results: list[dict]) -> None:
    """Append the examples to validation_examples.txt, write all rows to <file_name>.jsonl; other
    ones that it holds are kept beside it."""
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    _replace(run_dir / f"{file_name}.jsonl", lines, str)
    with open(run_dir / "validation_examples.txt", "a", encoding="utf-8") as file:
        file.write(format_examples(title, results))


def write_table(path: Path, text: str) -> None:
    """Write the figures of an evaluation, as Markdown or JSON; others, but for the seconds that
    they took, are kept beside it."""
    _replace(path, text, lambda text: SECONDS.sub("", text))


def _replace(path: Path, text: str, figures: Callable[[str], str]) -> None:
    """Write a file; one of other figures, by what tells them in its text, is kept beside it."""
    if path.exists() and figures(path.read_bytes().decode(errors="surrogateescape")) != figures(
        text
    ):
        log.info(f"{path}: there were other results, now {keep(path).name}")
    write_whole(path, text)


def keep(path: Path) -> Path:
    """Give results that are about to be replaced by other ones (of another checkpoint, of other
    rows) a name of their own, and return it."""
    names = (path.with_suffix(f".before_{n}{path.suffix}") for n in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def format_examples(title: str, results: list[dict]) -> str:
    """The first results in full, for reading."""
    blocks = [f"{'=' * 100}\n{title}\n{'=' * 100}"]
    for r in results[:NUM_EXAMPLES]:
        blocks.append(
            f"row {r['row']}: {'RIGHT' if r['correct'] else 'WRONG'}, "
            f"{r['num_latents']} latents, {r['new_tokens']} new tokens with them\n"
            f"question:         {r['question']}\n"
            f"gold steps:       {' '.join(r['gold_steps']) or '(none)'}\n"
            f"gold answer:      {r['gold_answer']}\n"
            f"full output:\n{r['output']}\n"
            f"extracted steps:  {' '.join(r['steps']) or '(none)'}\n"
            f"extracted answer: {'(none)' if r['answer'] is None else r['answer']}\n"
            f"{'-' * 100}"
        )
    return "\n".join(blocks) + "\n"
