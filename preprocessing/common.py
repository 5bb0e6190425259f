"""What the preprocessing scripts share: reading and writing JSON files, one line per error, exit 2.

Standard library only, so that data can be prepared on a machine without PyTorch.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from preprocessing.textfiles import parse_json, read_text


def read_json(path: str | Path) -> Any:
    """The value stored in a JSON file, of JSON Lines the list. ValueError names a file that is
    neither."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


def write_json_files(rows_by_path: dict[Path, list[dict]], read: Iterable[Path] = ()) -> None:
    """Write each list of rows to its path as a JSON list, one row per line, making missing folders.
    Without rows there is no file, and one that is there stays. Raises ValueError where a path is
    that of a file which these rows were read from.

    All files are on disk under temporary names before the first one is replaced: an error while
    writing leaves every old file, and a reader sees the old or the new one, never a part.
    """
    rows_by_path = {path: rows for path, rows in rows_by_path.items() if rows}
    written = {path.resolve() for path in rows_by_path}
    for source in read:
        if source.resolve() in written:
            raise ValueError(f"{source} would be replaced by its own rows; name another folder")
    temporary: dict[Path, Path] = {}
    try:
        for path, rows in rows_by_path.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with open(temporary[path], "w", encoding="utf-8", newline="\n") as file:
                lines = (json.dumps(row, ensure_ascii=False) for row in rows)
                file.write("[\n" + ",\n".join(lines) + "\n]\n")
                file.flush()
                os.fsync(file.fileno())
        for path, name in temporary.items():
            os.replace(name, path)
    finally:
        for name in temporary.values():
            name.unlink(missing_ok=True)


def count(text: str) -> int:
    """An argparse type: an integer from 0 up."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 up")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: an integer from 1 up."""
    if (number := count(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def run_script(main: Callable[[], None]) -> None:
    """Call main(); a ValueError or OSError, which users can mend, ends in its text and exit 2, a
    signal quietly, with what is half written removed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in a script's background
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
