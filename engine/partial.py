"""Results of an evaluation that is not done yet, on the disk: a killed one goes on from them."""

import hashlib
import json
import os
from pathlib import Path

from engine.distributed import World, barrier, broadcast_object
from engine.files import write_whole
from utils import log

NAME = "partial_results_{}_{}.jsonl"  # by evaluation and rank
WEIGHTS = (".safetensors", ".bin")
Results = dict[str, dict[int, dict]]  # by part of the evaluation and row


class PartialResults:
    """The results of the rows done so far, by part of the evaluation (a set, a number of latents).

    Every process appends to a file of its own, a line for each batch. When the evaluation goes on,
    on any number of processes, the files are joined, and rows that they hold are not run again.
    """

    def __init__(
        self, run_dir: Path, world: World, evaluation: dict, growing: tuple[str, ...] = ()
    ):
        """evaluation: all that the results depend on, fit for JSON; those of another one are left
        alone. growing: files of the run folder that it appends to. Where no other evaluation has
        begun since, they are cut to what they were before it: it records all its results again."""
        joined = _join(run_dir, evaluation, growing) if world.is_main else None
        self.header, self.results = broadcast_object(joined)
        self.path = _path(run_dir, self.header["evaluation"], world.rank)

    def known(self, part: str) -> dict[int, dict]:
        """The results of a part that a former process left, by row; on all processes."""
        return self.results.get(part, {})

    def add(self, part: str, results: list[dict]) -> None:
        """Keep the results of a batch."""
        with open(self.path, "a", encoding="utf-8") as file:
            header = "" if file.tell() else _line(self.header)
            file.write(header + _line({"part": part, "results": results}))

    def remove(self) -> None:
        """All processes call it when everything is written."""
        barrier()
        self.path.unlink(missing_ok=True)


def state_of_weights(source: Path) -> dict[str, list[int]]:
    """What tells weights that were written anew from those that results were computed with."""
    single = source.is_file()
    files = [source] if single else [file for file in source.iterdir() if file.suffix in WEIGHTS]
    stats = {str(file.resolve()): file.stat() for file in sorted(files)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def _path(run_dir: Path, evaluation: dict, rank: int | str) -> Path:
    text = json.dumps(evaluation, sort_keys=True)
    return run_dir / NAME.format(hashlib.sha256(text.encode()).hexdigest()[:12], rank)


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _read(path: Path) -> list[dict]:
    """The records of a file, up to a line that a kill or a power cut has torn."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _leave_alone(path: Path) -> None:
    """Keep the results of another evaluation that was interrupted. What it recorded stays too, when
    it goes on: cut to what they were then, the files would lose what is recorded from here on."""
    header, *records = _read(path) or [{}]
    if header.get("sizes"):
        log.info(f"{path}: is of another evaluation that was interrupted; its command goes on")
        write_whole(path, "".join(map(_line, [{**header, "sizes": {}}, *records])))


def _join(run_dir: Path, evaluation: dict, growing: tuple[str, ...]) -> tuple[dict, Results]:
    """Put one file in the place of those of all processes: its header and its results."""
    files = [run_dir / name for name in growing]
    sizes = {file.name: file.stat().st_size if file.exists() else 0 for file in files}
    header = {"evaluation": evaluation, "sizes": sizes}
    results: Results = {}
    main = _path(run_dir, evaluation, 0)
    paths = sorted(run_dir.glob(_path(run_dir, evaluation, "*").name))
    for path in {*run_dir.glob(NAME.format("*", "*"))} - {*paths}:
        _leave_alone(path)
    for path in paths:
        first, *records = _read(path) or [{}]
        if first.get("evaluation") != evaluation:
            continue
        header = first
        for record in records:
            of_part = results.setdefault(record["part"], {})
            of_part.update((result["row"], result) for result in record["results"])
    if results:
        count = sum(map(len, results.values()))
        log.info(f"goes on with an evaluation that was interrupted, {count} results are there")
        for name, size in header["sizes"].items():
            if (file := run_dir / name).exists():
                os.truncate(file, min(file.stat().st_size, size))
    text = _line(header)
    for part, of_part in results.items():
        text += _line({"part": part, "results": [*of_part.values()]})
    write_whole(main, text)
    for path in paths:
        if path != main:
            path.unlink()
    return header, results
