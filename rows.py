"""Data files and Hub data sets -> checked rows {question, steps, answer}.

What people bring differs in three ways, and each has one place here: where the records stand (JSON,
JSON Lines, parquet, CSV, a data set of the Hub), what their columns are called (data_columns), and
how a chain is written (a list, one text, GSM8K's solution with its #### answer).
"""

import ast
import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from preprocessing.tables import parquet_records, records_of
from preprocessing.textfiles import how_to_make, parse_json, read_text
from utils import UserError

MAX_REPORTED = 10  # bad rows named in one message
PARTS = ("question", "steps", "answer")
OURS: dict[str, Any] = {part: part for part in PARTS}  # the columns of our own files
STEP = re.compile(r"<<[^<>]+>>")
# what is left of one that was not written well: no prose as "5 >> 3" or "1<<3"
LOST_STEP = re.compile(r"<<[^\n]*?=|=[^\n<]*?>>|<<[^\n]+?>>")
SOLVED = "####"  # GSM8K writes its answers behind it
# owner/name:split or owner/name/config:split, the split as the library slices it: train[:1000]
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?:(\w+(?:\[[\w:%-]+\])?)")
MAX_COLUMNS = 20  # named in one message


# ------------------------------------------------------------------------------- records


class Written(float):
    """A number of a JSON text that knows how it is written there: 3.10, 1e3."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text


def _read_csv(path: Path) -> list[dict]:
    """The records of a CSV file, all values as texts: `datasets` guesses types, and where one
    answer of a column is missing it makes 18.0 of every 18."""
    try:
        lines = io.StringIO(read_text(path), newline="")
        reader = csv.DictReader(lines, strict=True)
        records = list(reader)
    except csv.Error as error:
        raise ValueError(f"not valid CSV: {error}") from None
    twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
    if twice:
        raise ValueError(f"the first line has {twice[0]!r} twice")
    long = [number for number, record in enumerate(records) if None in record]
    if long:
        raise ValueError(f"row {long[0]} has more values than the first line has columns")
    return records


def _read_hub(source: str, name: str, config: str | None, split: str) -> list[dict]:
    """The records of a data set of the Hub, from the library's cache where they are there."""
    if Path(name).is_dir():  # which the library would take, and go on with an older state of it
        raise UserError(f"{source}: {name} is a folder here; give the path of a file in it")
    try:
        return records_of(datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError, DatasetsError) as error:
        problem = " ".join(str(error).split())[:300]
    if "Config name is missing" in problem:
        problem = problem.partition(" Example of usage")[0] + f", as in {name}/CONFIG:{split}"
    elif "reach" in problem:
        problem += "; without a network, give the path of a file (JSON, parquet, CSV)"
    raise UserError(f"{source}: {problem}")


# ------------------------------------------------------------------------------- columns


def _columns(data_columns: dict | None) -> dict[str, Any]:
    """The column of each part: a name; of the question a list of names too, whose texts are
    joined; of the steps None too, where there is no chain. Raises UserError."""
    problems = []
    for part, column in (data_columns or {}).items():
        several = part == "question" and isinstance(column, list) and column
        names = column if several else [column]
        if part not in PARTS:
            problems.append(f"data_columns: {part} is not one of {', '.join(PARTS)}")
        elif not all(isinstance(name, str) for name in names) and (part, column) != ("steps", None):
            problems.append(f"data_columns: {part}: {column!r} is not the name of a column")
    if problems:
        raise UserError(*problems)
    return OURS | (data_columns or {})


def _check_columns(records: list, columns: dict[str, Any], source: str) -> None:
    """Raise UserError where no record has a column, or all answers are empty."""
    objects = [record for record in records if isinstance(record, dict)]
    if not objects:
        return  # each row is named
    there = list(dict.fromkeys(name for record in objects for name in record))
    names = [columns["question"], columns["steps"], columns["answer"]]
    names = [name for column in names for name in (column if type(column) is list else [column])]
    missing = [str(name) for name in dict.fromkeys(names) if name not in (*there, None)]
    if missing:
        more = ", ..." if len(there) > MAX_COLUMNS else ""
        raise UserError(
            f"{source}: no column {', '.join(missing)}; there are {', '.join(there[:MAX_COLUMNS])}"
            f"{more}; data_columns: {{question: ..., steps: ..., answer: ...}} says which is "
            "which (steps: null where there is no chain)"
        )
    answers = [record.get(columns["answer"]) for record in objects]
    if all(
        answer is None or (isinstance(answer, str) and not answer.strip()) for answer in answers
    ):
        raise UserError(
            f"{source}: all {len(answers)} answers (column {columns['answer']}) are empty; give "
            "another split or file, or name another column in data_columns"
        )


# ------------------------------------------------------------------------------- rows


def _has_marks(records: list, column: str | None) -> bool:
    """Whether chains that are one text have their steps in <<...>>: in GSM8K all but 95 of 7,473,
    and those 95, prose only, have no steps in GSM8K-Aug either."""
    texts = (record.get(column) for record in records if isinstance(record, dict))
    return any(isinstance(text, str) and STEP.search(text) for text in texts)


def split_steps(text: str, has_marks: bool) -> list[str]:
    """A chain written as one text: its <<...>>, or its lines where these files have no such marks.
    What stands from GSM8K's #### on is no step. ValueError where a mark has no partner, and where
    it is the text of a list, as tables that know no lists hold one."""
    chain = text.rpartition(SOLVED)[0] if SOLVED in text else text
    if has_marks:
        if LOST_STEP.search(STEP.sub("", chain)):
            raise ValueError(
                f"steps: a << or >> without its partner in {chain!r}; mend it, or give a list"
            )
        return STEP.findall(chain)
    if _is_list(chain.strip()):
        raise ValueError(
            f"steps: a list as a text, {chain[:50]!r}; save the rows as JSON or parquet"
        )
    return [line.strip() for line in chain.split("\n") if line.strip()]


def _is_list(chain: str) -> bool:
    """Whether a text is Python's or JSON's for a list of texts."""
    if not (chain.startswith("[") and chain.endswith("]")):
        return False
    try:
        value = ast.literal_eval(chain)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _question(record: dict, column: str | list[str]) -> Any:
    """The text of a column, or of several, one after the other; else what is no text."""
    if isinstance(column, str):
        return record.get(column)
    texts = []
    for name in column:
        value = record.get(name)
        if not isinstance(value, str):
            return value
        texts.append(value.strip())
    return " ".join(texts)


def _answer(value: Any) -> Any:
    """A number as the text that it is written as, also the only one of a list; else the value."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if type(value) is int or (isinstance(value, float | Decimal) and math.isfinite(value)):
        return str(value)
    return value


def _make_row(record: Any, columns: dict[str, Any], has_marks: bool) -> dict:
    """The record with question, steps and answer. Raises ValueError saying what is wrong."""
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"expected an object with question, steps and answer, found {kind}")
    answer = _answer(record.get(columns["answer"]))
    steps = [] if columns["steps"] is None else record.get(columns["steps"])
    if columns["steps"] == columns["answer"] and isinstance(answer, str):
        if SOLVED not in answer:
            raise ValueError(f"answer: expected a chain, {SOLVED} and an answer, found {answer!r}")
        steps, answer = answer, answer.rpartition(SOLVED)[2].strip()
    if isinstance(steps, str):
        steps = split_steps(steps, has_marks)
    question = _question(record, columns["question"])
    row = {**record, "question": question, "steps": steps, "answer": answer}
    if problem := _row_problem(row):
        raise ValueError(problem)
    if columns != OURS:  # files of others: tokenizers merge a blank with the line break behind it
        row |= {"question": question.strip(), "answer": answer.strip()}
        row["steps"] = [step.strip() for step in row["steps"]]
    return row


def _is_unicode(text: str) -> bool:
    """JSON can hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row_problem(row: dict) -> str | None:
    """What is wrong with a row, or None."""
    for key in ("question", "answer"):
        if not isinstance(row[key], str) or not row[key].strip():
            return f"{key}: expected a text, found {row[key]!r}"
    if not isinstance(row["steps"], list):
        return f"steps: expected a list of texts, or one text, found {row['steps']!r}"
    for key in ("question", "answer"):
        if not _is_unicode(row[key]):
            return f"{key}: {row[key]!r} holds half a character (a lone surrogate)"
    for step in row["steps"]:
        if not isinstance(step, str) or not step.strip() or not _is_unicode(step):
            return f"steps: expected texts, found {step!r} (a row without a chain has steps [])"
        if "\n" in step:
            return f"steps: {step!r} holds a line break; a step is one line"
    if "\n" in row["answer"].strip():
        return f"answer: {row['answer']!r} holds a line break; an answer is one line"
    return None


def refuse_rows(source: str, problems: dict[int, str]) -> None:
    """Raise UserError naming the first of the bad rows, if there are any."""
    lines = [f"{source}: row {number}: {problem}" for number, problem in problems.items()]
    if len(lines) > MAX_REPORTED:
        lines[MAX_REPORTED:] = [f"{source}: {len(lines) - MAX_REPORTED} more rows like these"]
    if lines:
        raise UserError(*lines)


def _check(records: list, columns: dict[str, Any], source: str) -> list[dict]:
    """The records as rows. Raises UserError naming the source, and rows counted from 0."""
    if not records:
        raise UserError(f"{source}: there are no rows")
    _check_columns(records, columns, source)
    has_marks = _has_marks(records, columns["steps"])
    rows, problems = [], {}
    for number, record in enumerate(records):
        try:
            rows.append(_make_row(record, columns, has_marks))
        except ValueError as error:
            problems[number] = str(error)
    refuse_rows(source, problems)
    return rows


def parse_rows(text: str, source: str, data_columns: dict | None = None) -> list[dict]:
    """Check a JSON list, or JSON Lines, of rows; what else they hold is kept. Raises UserError
    naming source and rows."""
    columns = _columns(data_columns)
    try:
        records = parse_json(text, parse_float=Written)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    if isinstance(records, dict) and isinstance(_question(records, columns["question"]), str):
        records = [records]  # JSON Lines of one line
    if not isinstance(records, list) or not records:
        raise UserError(f"{source}: expected a non-empty JSON list of rows")
    return _check(records, columns, source)


READERS: dict[str, Callable[[Path], list[dict]]] = {".parquet": parquet_records, ".csv": _read_csv}
KINDS = (".json", ".jsonl", *READERS)


def kind_of(path: str | Path) -> str:
    """The extension of a file, in lower case, that of compression apart."""
    return Path(Path(path).name.removesuffix(".gz")).suffix.lower()


def hub_name(source: str) -> str | None:
    """The name owner/name of what is a data set of the Hub; None of a file."""
    hub = HUB.fullmatch(source)
    return hub[1] if hub and not Path(source).exists() else None


def load_rows(path: str | Path, data_columns: dict | None = None) -> list[dict]:
    """Read and check a data file, its kind by its extension (.parquet, .csv, else JSON), or a Hub
    data set owner/name:split. Raises UserError; row numbers count from 0."""
    columns, source, path = _columns(data_columns), str(path), Path(path)
    hub, kind = HUB.fullmatch(source), kind_of(path)
    try:
        if hub and not path.exists():
            records: list[dict] | str = _read_hub(source, *hub.groups())
        else:
            records = READERS.get(kind, read_text)(path)
    except UserError:
        raise
    except FileNotFoundError:
        hint = how_to_make(path) or ("" if kind else "; a Hub data set is owner/name:split")
        raise UserError(f"{source}: no such file{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot read this data file: {error}") from None
    if isinstance(records, str):
        return parse_rows(records, source, data_columns)
    return [{part: row[part] for part in PARTS} for row in _check(records, columns, source)]


def rows_with_questions(rows: list[dict], questions: int) -> int:
    """How many of the first rows it takes for so many different questions; all of them where there
    are fewer."""
    asked: set[str] = set()
    for number, row in enumerate(rows, start=1):
        asked.add(row["question"])
        if len(asked) == questions:
            return number
    return len(rows)
