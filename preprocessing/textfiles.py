"""Reading the text files that people bring. Standard library only: preprocessing/ reads by it too.

A byte-order mark, CRLF, gzip and JSON Lines are read as what they mean. What is no UTF-8 text, and
a file of ours that is not there yet, is named with the remedy. No message names the file: callers
do.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

UTF_8_MARK = b"\xef\xbb\xbf"
GZIP_MARK = b"\x1f\x8b"
OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16, the first of UTF-32 too

# what a script of ours makes (a pattern of its path) -> the command
MADE_BY = {
    r"table1_small/data/\w+(\.json)?": "`bash benchmarks/table1_small.sh` makes it first of all",
    r"\bquickstart_(\w+\.json|model)": "`bash preprocessing/quickstart.sh` makes "
    "quickstart_train.json, quickstart_validation.json and quickstart_model in data/",
    r"\bgsm(8k)?_\w+\.json": "`TARGET_SIZE=50000 bash preprocessing/gsm8k_icot.bash` makes "
    "gsm8k_train.json, gsm8k_validation.json and gsm8k_test.json in data/ (without TARGET_SIZE: "
    "of all 385,620 rows)",
    r"\bprosqa_\w+\.json": "`python preprocessing/prosqa.py --output_dir data` makes "
    "prosqa_train.json, prosqa_validation.json and prosqa_test.json in data/",
    r"\bprontoqa_\w+\.json": "`python preprocessing/prontoqa.py --input 5hop_0shot_random.json "
    "--output_dir data` makes prontoqa_train.json, prontoqa_validation.json and prontoqa_test.json "
    "in data/ (its first lines say how the input is made)",
    r"\btest_(gsm8k|gsm_hard|multiarith|svamp)\.json": "`python preprocessing/math_sets.py` makes "
    "it of the public files (data/README.md says which)",
    r"\bgsm8k-coconut-qwen3/checkpoint_\w+": "`bash train_fresh_start.sh` trains it",
    r"\bgsm8k_gpt2-cot/checkpoint_\w+": "`bash train_fresh_start.sh args/gsm8k_gpt2.yaml "
    "args/rows/cot.yaml save_only_improve=True` trains it; give the path of its best checkpoint",
}


def how_to_make(path: str | Path) -> str:
    """The end of a message about a missing file: the command of ours that makes it, or nothing."""
    for pattern, made in MADE_BY.items():
        if re.search(pattern + "$", Path(path).as_posix()):
            return f"; {made}"
    return ""


def without_mark(content: bytes) -> bytes:
    """A file's content without the byte-order mark of UTF-8. Raises ValueError where it is UTF-16
    or UTF-32, marked as such or not: NUL is the second or the first byte of its ASCII letters."""
    if content.startswith(OTHER_MARKS) or b"\0" in content[:2]:
        raise ValueError("it is UTF-16 or UTF-32; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return content.removeprefix(UTF_8_MARK)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, also a gzip'd one, its lines ended by \\n. Raises OSError,
    ValueError."""
    content = Path(path).read_bytes()
    if content.startswith(GZIP_MARK):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(f"damaged gzip: {error}; get it again") from None
    content = without_mark(content)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, parse_float: Callable[[str], float] = float) -> Any:
    """The value of a JSON text or, of JSON Lines, the list of its objects. Raises ValueError."""
    try:
        return json.loads(text, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if text.startswith("version https://git-lfs"):
        problem += " (a Git LFS pointer, not the file: see data/README.md)"
    elif text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        problem += " (an HTML page, not the file: download the raw file)"
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line, parse_float=parse_float))
        except (ValueError, RecursionError) as error:
            if rows:
                problem = f"line {number} of these JSON Lines: {error}"
            raise ValueError(f"not valid JSON: {problem}") from None
        if not isinstance(rows[0], dict):
            break
    if not rows or not isinstance(rows[0], dict):
        raise ValueError(f"not valid JSON: {problem}")
    return rows
