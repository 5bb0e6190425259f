"""Convert GSM8K to the JSON files this program trains on. Standard library only, Python 3.10+.

    python preprocessing/gsm8k_icot.py --train train.txt --valid valid.txt --test test.txt

writes data/gsm8k_train.json, gsm8k_validation.json and gsm8k_test.json, lists of

    {"question": "... How much is left?", "steps": ["<<2*3=6>>", "<<9-6=3>>"], "answer": "3"}

from files in either of two forms, told apart by their extension:

    .txt    iCoT (da03/Internalize_CoT_Step_by_Step, data/gsm8k), a row per line:
            question||<<2*3=6>> <<9-6=3>> #### 3
    .jsonl  the original (openai/grade-school-math), a row per line or a JSON list of rows (.json
            is read alike):
            {"question": "...", "answer": "text with <<2*3=6>>6 in it.\\n... #### 3"}

Both give the same row: the original's <<...>> in order are iCoT's chain. A row without a chain has
steps = []. Blanks around a question or an answer are removed, nothing else is changed.

A training row whose question stands in validation or test is dropped; questions are compared by
their letters and numbers, without regard to case, white space, punctuation and the Unicode form of
a character. A question that occurs several times within the training file is kept (GSM8K-Aug may
give it another chain) and counted. --target_size N keeps N of the rows left: the indices are
random.Random(seed).sample(range(rows), N), sorted, so the rows are the same on every machine and
stay in file order.

A byte-order mark, CRLF and blank lines do not matter. A line that cannot be read is an error,
unless the file has the published sha256: such a file is intact, so there the line is dropped,
counted and shown. Outputs replace older ones only when all of them are complete. Exit code 2 and a
message on stderr: bad input, nothing was written.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# The scripts also run by path: the repository is then not on the module path.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from preprocessing.common import count, run_script, write_json_files
from preprocessing.textfiles import UTF_8_MARK, without_mark

PUBLISHED = {  # sha256 of the iCoT files at the commit named in gsm8k_icot.bash
    "train": "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c",
    "valid": "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87",
    "test": "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8",
}
OUTPUTS = {"train": "gsm8k_train.json", "valid": "gsm8k_validation.json", "test": "gsm8k_test.json"}
STEP = re.compile(r"<<[^<>]+>>")
# what makes two questions different, see question_key
FRACTION = re.compile(
    "[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u215e\u2189]"
)  # or raised
DASHES = {0x2044: "/", 0x2212: "-", **dict.fromkeys(range(0x2010, 0x2016), "-")}
KEY_PART = re.compile(
    r"[^\W\d_]+"  # letters
    r"|\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|(?<!\w)\.\d+"  # 7, 1,200, 0.5, .5
    r"|(?<=\d)\s*[-+*/\u00d7\u00f7]\s*(?=\.?\d)"  # 5 - 3
    r"|(?<![^\s($])-(?=\.?\d)|(?<=\d)\s*%"  # -5, 20%
)
MAX_SHOWN = 10  # unreadable lines shown of each file


class Source(NamedTuple):
    """What one input file holds: its rows, and a message for every line that is none."""

    rows: list[dict]
    unreadable: list[str]


def quoted(text: str) -> str:
    """The text as an error shows it: ASCII, one line, at most 60 characters of it."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def make_row(question: str, chain: str, answer: str) -> dict:
    """One output row. ValueError if question or answer is empty, or a text cannot be UTF-8."""
    row = {"question": question.strip(), "steps": STEP.findall(chain), "answer": answer.strip()}
    if not row["question"] or not row["answer"]:
        raise ValueError(f"the {'answer' if row['question'] else 'question'} is empty")
    json.dumps(row, ensure_ascii=False).encode()  # JSON input can hold half a surrogate pair
    return row


def parse_icot(line: str) -> dict:
    """`question||<<..>> <<..>> #### answer`, from the right: a question may hold || or ####."""
    question, bars, rest = line.rpartition("||")
    chain, hashes, answer = rest.rpartition("####")
    if not bars or not hashes:
        raise ValueError(f"no {'####' if bars else '||'} in {quoted(line)}")
    if STEP.sub("", chain).strip():
        raise ValueError(f"the chain is not a list of <<...>>: {quoted(chain)}")
    return make_row(question, chain, answer)


def parse_original(line: str) -> dict:
    """A JSON object whose answer is prose with <<...>> in it, then `#### answer`."""
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError(f"JSON nested too deeply: {quoted(line)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {quoted(line)}")
    question, solution = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str):
        raise ValueError(f'"question" and "answer" are not both text: {quoted(line)}')
    chain, hashes, answer = solution.rpartition("####")
    if not hashes:
        raise ValueError(f"no #### in the answer {quoted(solution)}")
    prose = STEP.sub("", chain)
    if "<<" in prose or ">>" in prose:
        raise ValueError(f"a << or >> without its partner in the answer {quoted(solution)}")
    return make_row(question, chain, answer)


ORIGINAL = (parse_original, '{"question": "...", "answer": "... <<a*b=c>>c ... #### answer"}')
FORMS = {
    ".txt": (parse_icot, "question||<<a*b=c>> <<d-e=f>> #### answer"),
    ".jsonl": ORIGINAL,
    ".json": ORIGINAL,
}


def load_bytes(path: Path) -> bytes:
    """The file's content. ValueError if it is missing, or is not data at all, naming what it is."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of an iCoT .txt or original .jsonl")
    content = path.read_bytes()
    start = content[:1024].removeprefix(UTF_8_MARK).lstrip().lower()
    if not content.removeprefix(UTF_8_MARK).strip():
        raise ValueError(f"{path}: the file is empty; get it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a Git LFS pointer of {len(content)} bytes, not the data; run "
            "`git lfs pull` where it came from, or let gsm8k_icot.bash download it"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path}: an HTML page, not the data; download the raw file instead")
    return content


def require_published(split: str, path: Path, content: bytes) -> None:
    """ValueError if the content is not the published file of this split."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != PUBLISHED[split]:
        raise ValueError(
            f"{path}: sha256 is {digest} ({len(content):,} bytes), published is "
            f"{PUBLISHED[split]}; damaged, or another file: remove it and download "
            "it again"
        )


def show(messages: list[str]) -> str:
    """Indented lines for the first MAX_SHOWN messages and a count of the others."""
    more = [f"and {len(messages) - MAX_SHOWN} more"] if len(messages) > MAX_SHOWN else []
    return "".join(f"\n  {message}" for message in messages[:MAX_SHOWN] + more)


def split_rows(path: Path, content: bytes, intact: bool) -> list[tuple[str, bytes]]:
    """[(where in the file, its bytes)] of all rows: the lines that are not blank or, in a JSON
    list, the elements. ValueError if the file is not UTF-8, or an iCoT file that was cut short."""
    try:
        content = without_mark(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    lines = content.split(b"\n")  # not splitlines(): two GSM8K questions hold U+2028
    last = lines[-1].strip()
    if last and path.suffix == ".txt" and not intact:  # "#### 18" cut to "#### 1" would still parse
        raise ValueError(
            f"{path}: line {len(lines)} has no line end, the file seems cut short: "
            f"{quoted(last[-60:].decode(errors='replace'))}; get it again, or end the "
            "line if it is complete"
        )
    if path.suffix != ".txt" and content.lstrip().startswith(b"["):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = []  # its lines will say what is wrong
        if value and isinstance(value[0], dict):
            return [(f"row {n}", json.dumps(row).encode()) for n, row in enumerate(value)]
    return [(f"line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]


def read_source(split: str, path: Path, must_be_published: bool = False) -> Source:
    """Read and check one input file. ValueError names what is wrong, with line numbers."""
    if path.suffix not in FORMS:
        raise ValueError(f"{path}: extension {path.suffix!r}; allowed: {', '.join(FORMS)}")
    parse, form = FORMS[path.suffix]
    content = load_bytes(path)
    if must_be_published:
        require_published(split, path, content)
    intact = hashlib.sha256(content).hexdigest() == PUBLISHED[split]
    rows, unreadable = [], []
    texts = split_rows(path, content, intact)
    for where, text in texts:
        try:
            rows.append(parse(text.decode()))
        except ValueError as error:
            unreadable.append(f"{where}: {error}")
    if unreadable and not intact:
        raise ValueError(
            f"{path}: {len(unreadable)} of {len(texts)} lines cannot be read; allowed "
            f"is {form}; correct or remove them:{show(unreadable)}"
        )
    if path.suffix == ".txt" and not intact:
        print(f"NOTE: {path} is not the published {split}.txt (another sha256); used as it is")
    return Source(rows, unreadable)


def question_key(row: dict) -> str:
    """What two questions must share to count as the same: their letters, and their numbers, each
    with its sign and its decimals, and with what stands between two of them (5-3, 1/2).

    So a mark, a blank, a capital or another Unicode form makes no other question, but 1.5 and 15,
    2 3 and 23, 20% and $20 do.
    """
    text = FRACTION.sub(r" \g<0>", row["question"])  # 2\u00bd is two and a half: NFKC has 21/2
    text = unicodedata.normalize("NFKC", text).casefold().translate(DASHES)
    parts = [re.sub(r"[\s,]", "", part) for part in KEY_PART.findall(text)]
    key = "".join(part if part.isalpha() else f" {part} " for part in parts)
    return key or row["question"]  # a question of marks only


def drop_held_out(
    rows: list[dict], held_out: dict[str, set[str]]
) -> tuple[list[dict], Counter[str | None]]:
    """Training rows without those whose question is in held_out: {split: keys}. Also the counts."""
    kept: list[dict] = []
    dropped: Counter[str | None] = Counter()  # by split; None: kept
    for row in rows:
        key = question_key(row)
        holder = next((split for split, keys in held_out.items() if key in keys), None)
        if holder is None:
            kept.append(row)
        dropped[holder] += 1
    return kept, dropped


def draw(rows: list[dict], target_size: str | None, seed: int) -> list[dict]:
    """target_size (text; None: all) of the rows, in their order, as the top of this file says."""
    if not rows:
        raise ValueError("no training row is left; check that --train is not a held-out file")
    if target_size is None:
        return rows
    if not (target_size.isascii() and target_size.isdigit() and 1 <= int(target_size) <= len(rows)):
        raise ValueError(
            f"target size is {target_size!r}; allowed: 1 to {len(rows)}, the training "
            "rows available, or none for all of them"
        )
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), int(target_size)))]


def report(split: str, source: Source, dropped: dict[str, int], available: list[dict]) -> None:
    """Print what became of the rows of one file; available: those left after dropping."""
    print(f"{split}: {len(source.rows) + len(source.unreadable)} rows read")
    if source.unreadable:
        print(f"  {len(source.unreadable)} dropped: unreadable{show(source.unreadable)}")
    for name in dropped:
        print(f"  {dropped[name]} dropped: question is in {name}")
    repeats = len(available) - len({question_key(row) for row in available})
    print(f"  {repeats} repeat a question of an earlier row (kept)")


def convert(args: argparse.Namespace) -> None:
    """Read, check and write all files named by args. ValueError or OSError: nothing was written."""
    paths = {"train": args.train, "valid": args.valid, "test": args.test}
    sources = {
        split: read_source(split, path, args.published)
        for split, path in paths.items()
        if path is not None
    }
    held_out = {
        Path(OUTPUTS[split]).stem: {question_key(row) for row in source.rows}
        for split, source in sources.items()
        if split != "train"
    }
    available, dropped = drop_held_out(sources["train"].rows, held_out)
    rows = {split: source.rows for split, source in sources.items()}
    rows["train"] = draw(available, args.target_size, args.seed)
    outputs = {split: args.output_dir / OUTPUTS[split] for split in rows}
    files = {outputs[split]: rows[split] for split in rows}
    write_json_files(files, read=[path for path in paths.values() if path is not None])
    for split, source in sources.items():
        is_train = split == "train"
        report(
            split,
            source,
            {name: dropped[name] for name in held_out} if is_train else {},
            available if is_train else source.rows,
        )
        if is_train and args.target_size is not None:
            print(f"  {len(rows[split])} of {len(available)} drawn by seed {args.seed}")
        chainless = sum(not row["steps"] for row in rows[split])
        print(f"  {len(rows[split])} written, {chainless} without a chain: {outputs[split]}")
    if "test" not in sources:
        stale = args.output_dir / OUTPUTS["test"]
        print(
            "test: not given, training rows were not compared with test questions; "
            f"{stale} {'is an older one, left as it was' if stale.exists() else 'not written'}"
        )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GSM8K (iCoT .txt or original .jsonl) to JSON.")
    for name in ("train", "valid", "test"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=".txt or .jsonl")
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="default: %(default)s",
        default=Path(__file__).resolve().parents[1] / "data",
    )
    parser.add_argument("--target_size", metavar="N", help="training rows to draw (default: all)")
    parser.add_argument("--seed", type=count, default=0, help="of that draw (default: 0)")
    parser.add_argument(
        "--published", action="store_true", help="accept only files with the published sha256"
    )
    parser.add_argument(
        "--verify",
        nargs=2,
        metavar=("SPLIT", "FILE"),
        help="only check that FILE is the published train, valid or test",
    )
    args = parser.parse_args(argv)
    if args.verify is None and (args.train is None or args.valid is None):
        parser.error("--train and --valid are needed (--test may be left out)")
    if args.verify is not None and args.verify[0] not in PUBLISHED:
        parser.error(f"--verify {args.verify[0]}: allowed are {', '.join(PUBLISHED)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.verify is None:
        convert(args)
    else:
        split, path = args.verify[0], Path(args.verify[1])
        require_published(split, path, load_bytes(path))


if __name__ == "__main__":
    run_script(main)
