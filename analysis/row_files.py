"""Other rows than those of val_path, shown to the same model: longer chains, larger graphs."""

from collections.abc import Sequence

from analysis.ask import unknown_words
from analysis.output import percent, share
from analysis.probe import Probe
from dataset import StageDataset
from rows import load_rows
from utils import Config, UserError

MAX_WORDS = 5  # unknown ones named in one message


def read_row_files(config: Config, paths: Sequence[str]) -> dict[str, list[dict]]:
    """{path: its rows}, all of them, read as val_path is. Raises UserError."""
    rows, problems = {}, []
    for path in paths:
        try:
            rows[path] = load_rows(path, config.data_columns)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return rows


def show_rows(
    probe: Probe, rows: list[dict], source: str, numbers: Sequence[int | None]
) -> tuple[Probe, dict[int | None, StageDataset]]:
    """The probe with these rows, and their data sets for each number of latents.

    Raises UserError where the model could not do well, however well it reasons: words that its
    tokenizer does not know, prompts beyond its positions, chains beyond max_new_tokens.
    """
    try:
        shown = probe.with_rows(rows, source)
        datasets = {number: shown.dataset(number) for number in numbers}
    except UserError as error:
        named = [
            text if text.startswith(source) else f"{source}: {text}" for text in error.problems
        ]
        raise UserError(*named) from None
    if unknown := unknown_words(shown):
        words = ", ".join(unknown[:MAX_WORDS]) + (", ..." if len(unknown) > MAX_WORDS else "")
        raise UserError(
            f"{source}: this model's tokenizer does not know {words}; take rows of its own words, "
            "or train a model whose vocabulary has them"
        )
    longest = max(int(dataset.num_labels.max()) for dataset in datasets.values()) - 1  # but for eos
    if longest > probe.config.max_new_tokens:
        raise UserError(
            f"{source}: a chain with its answer has {longest} tokens, and max_new_tokens: "
            f"{probe.config.max_new_tokens} cuts it off; set max_new_tokens={longest} or more"
        )
    return shown, datasets


def accuracy_by_file(
    probe: Probe, files: dict[str, list[dict]], numbers: Sequence[int | None]
) -> dict[str, dict]:
    """For each file of rows: how many they are, the fewest and the most steps of a chain, and for
    each number of latents the share of right answers, with its interval.

    All files are checked before the first row is computed. Raises UserError.
    """
    shown = {path: show_rows(probe, rows, path, numbers) for path, rows in files.items()}
    report = {}
    for path, (other, datasets) in shown.items():
        lengths = [len(row["steps"]) for row in other.rows]
        report[path] = {
            "rows": len(lengths),
            "steps": [min(lengths), max(lengths)],
            "accuracy": {
                str(number): accuracy(other, dataset) for number, dataset in datasets.items()
            },
        }
    return report


def accuracy(probe: Probe, dataset: StageDataset) -> dict:
    """The share of right answers over all rows."""
    answers = probe.answers(dataset, list(range(len(probe.rows))))
    same = probe.text_format.same_answer
    right = sum(same(answer, row["answer"]) for answer, row in zip(answers, probe.rows))
    return share(right, len(answers))


def describe_files(report: dict[str, dict]) -> str:
    """A line for each file and number of latents."""
    width = max(len(path) for path in report)
    lines = [f"{'rows of':{width}}  {'rows':>6}  {'steps':>7}  {'latents':>7}  accuracy"]
    for path, entry in report.items():
        steps = "-".join(map(str, sorted(set(entry["steps"]))))
        for number, right in entry["accuracy"].items():
            lines.append(
                f"{path:{width}}  {entry['rows']:>6}  {steps:>7}  {number:>7}  "
                f"{percent(right['rate'], right['interval'])}"
            )
    return "\n".join(lines)
