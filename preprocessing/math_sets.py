"""Convert the four test sets that papers on latent reasoning report to this program's rows.

    python preprocessing/math_sets.py --gsm_hard gsmhardv2.jsonl --svamp train.parquet test.parquet

writes data/test_gsm_hard.json and data/test_svamp.json, lists of

    {"question": "...", "steps": [], "answer": "18"}

from files in any of their public forms (JSON, JSON Lines, parquet; gzip'd JSON too), told apart by
their fields:

    --gsm8k       question, answer "text with <<2*3=6>>6 in it.\\n... #### 6"     1,319 rows
    --gsm_hard    input, target; or instruction, response                       1,319 rows
    --multiarith  question, final_ans; or sQuestion, lSolutions                 180 or 600 rows
    --svamp       question_concat, Answer; or Body, Question, Answer            300 or 1,000 rows

Several files of one set are joined in their order. 180 rows of MultiArith and 300 of SVAMP are the
test split, 600 and 1,000 all there are: say which with every figure. Another number of rows is an
error: a file was cut short, or is another split. Both forms give the same rows: blanks at the ends
are removed, 18.0 becomes 18, and GSM8K alone keeps a chain. Outputs replace older ones only when
all of them are complete. Exit code 2 and a message on stderr: bad input, nothing was written.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

# The scripts also run by path: the repository is then not on the module path.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from preprocessing.common import read_json, run_script, write_json_files
from preprocessing.gsm8k_icot import make_row, parse_original, show
from preprocessing.tables import parquet_records

COUNTS = {  # rows that a set has -> what they are
    "gsm8k": {1319: "the test split"},
    "gsm_hard": {1319: "all"},
    "multiarith": {180: "the test split", 600: "all"},
    "svamp": {300: "the test split", 1000: "all"},
}
# the fields of the question, which are joined, and the field of the answer
FORMS: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "gsm_hard": [(("input",), "target"), (("instruction",), "response")],
    "multiarith": [(("question",), "final_ans"), (("sQuestion",), "lSolutions")],
    "svamp": [(("question_concat",), "Answer"), (("Body", "Question"), "Answer")],
}
WHOLE = re.compile(r"(-?\d+)\.0+")


def answer_text(value: object) -> str:
    """A number, the only one of a list, or a text, with 18.0 as 18. ValueError if it is none."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        good = math.isfinite(value)
    else:
        good = isinstance(value, str)
    if not good:
        raise ValueError(f"the answer {value!r} is neither a number nor a text")
    text = str(value).strip()
    whole = WHOLE.fullmatch(text)
    return whole[1] if whole else text


def parse_plain(name: str, record: dict) -> dict:
    """A record of a set in one of its forms as a row. ValueError says what is wrong."""
    for fields, answer in FORMS[name]:
        if answer in record and all(field in record for field in fields):
            texts = [record[field] for field in fields]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{' and '.join(fields)}: not a text")
            question = " ".join(text.strip() for text in texts)
            return make_row(question, "", answer_text(record[answer]))
    forms = "; or ".join(", ".join((*fields, answer)) for fields, answer in FORMS[name])
    raise ValueError(f"its fields are {', '.join(record)}; expected {forms}")


def parser_of(name: str) -> Callable[[dict], dict]:
    if name == "gsm8k":
        return lambda record: parse_original(json.dumps(record))
    return lambda record: parse_plain(name, record)


def read_records(path: Path) -> list[dict]:
    """The records of a JSON or parquet file. ValueError, OSError."""
    if path.suffix != ".parquet":
        records = read_json(path)
    elif not path.is_file():
        raise ValueError(f"{path}: no such file")
    else:
        try:
            records = parquet_records(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected a list of objects")
    return records


def read_set(name: str, paths: list[Path]) -> list[dict]:
    """The rows of a set from its files. ValueError names rows that cannot be read, and a number of
    rows that the set does not have."""
    rows, problems, parse = [], [], parser_of(name)
    for path in paths:
        for number, record in enumerate(read_records(path)):
            try:
                rows.append(parse(record))
            except ValueError as error:
                problems.append(f"{path}: row {number}: {error}")
    if problems:
        raise ValueError(f"{name}: {len(problems)} rows cannot be read:{show(problems)}")
    if len(rows) not in COUNTS[name]:
        counts = " or ".join(f"{count} ({what})" for count, what in COUNTS[name].items())
        files = ", ".join(map(str, paths))
        raise ValueError(f"{name}: {files}: {len(rows)} rows, but the set has {counts}")
    return rows


def output_of(name: str) -> str:
    return f"test_{name}.json"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Public test sets of arithmetic to JSON.")
    for name in COUNTS:
        parser.add_argument(f"--{name}", type=Path, nargs="+", metavar="FILE")
    default = Path(__file__).resolve().parents[1] / "data"
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", default=default, help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    if not any(vars(args)[name] for name in COUNTS):
        parser.error(f"give at least one of {', '.join(f'--{name}' for name in COUNTS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sets = {name: read_set(name, vars(args)[name]) for name in COUNTS if vars(args)[name]}
    read = [path for name in sets for path in vars(args)[name]]
    write_json_files({args.output_dir / output_of(name): rows for name, rows in sets.items()}, read)
    for name, rows in sets.items():
        repeats = len(rows) - len({row["question"] for row in rows})
        print(
            f"{name}: {len(rows)} rows ({COUNTS[name][len(rows)]}), {repeats} repeat a question: "
            f"{args.output_dir / output_of(name)}"
        )


if __name__ == "__main__":
    run_script(main)
