"""Many runs of run.py, several side by side, each a process of its own, and what they end with."""

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tqdm import tqdm

from engine.files import write_whole
from engine.launch import count_gpus
from engine.logs import read_metrics
from engine.results import results_name
from engine.stop import EXIT_STOPPED, stopping_signals
from loader import load_config, own_config
from utils import FIELDS, SHARED_CORES, Config, Method, UserError, count_cores

RUN = Path(__file__).resolve().parents[1] / "run.py"
OUTCOME = "outcome.json"  # in the run folder, as soon as the run is at its end
SHOWN = 2000  # characters of what a failed run said


class Cell(NamedTuple):
    """One run: the arguments of run.py. sweep: whether its last checkpoint is evaluated with the
    latents of every stage afterwards."""

    arguments: tuple[str, ...]
    sweep: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run ended with: the figures of its last epoch, never of its best one."""

    arguments: list[str]
    accuracy: float  # in [0, 1], with the latents of the stage
    by_latents: dict[str, float]  # of the same checkpoint, by the number that is forced
    tokens: float  # new ones per answer, latents counted, eos not
    seconds: float  # of training steps, validation not counted
    steps: int  # of the optimizer
    epochs: list[tuple[int, int, float]]  # epoch, stage, accuracy
    results: str  # path of the last epoch's results
    swept: bool = False  # whether by_latents has the latents of every stage
    rows: str | None = None  # hash_of_rows() when it was made; None: by an earlier version

    @property
    def without_latents(self) -> float | None:
        """None: this run has no latents."""
        return self.by_latents.get("0")


class RunFailed(Exception):
    """A run ended with another exit code than 0."""

    def __init__(self, name: str, code: int, said: str):
        super().__init__(f"{name} ended with exit code {code}:\n{said}")
        self.code = code


class Processes:
    """Starts run.py in one of several places: each a GPU of its own, or an equal share of the
    cores, where the user has not said how many threads a run has. A signal that ends this program
    reaches them as SIGTERM: they finish their optimizer step and save."""

    def __init__(self, jobs: int | None, most: int):
        gpus, cores = count_gpus(), count_cores()
        self.jobs = max(min(jobs or gpus or cores, most), 1)
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = self.signalled = False
        self._places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        for job in range(self.jobs):
            place = {}
            if "OMP_NUM_THREADS" not in os.environ:
                place = {"OMP_NUM_THREADS": str(max(cores // self.jobs, 1)), SHARED_CORES: "1"}
            if gpus:
                place["CUDA_VISIBLE_DEVICES"] = visible.split(",")[job % gpus]
            self._places.put(place)

    def run(self, name: str, arguments: list[str]) -> None:
        """Wait for a place and for the end. Raises RunFailed with what it said last;
        CancelledError where all are to stop."""
        place = self._places.get()
        try:
            if self._stopping:
                raise CancelledError
            process = subprocess.Popen(
                [sys.executable, str(RUN), *arguments],
                env={**os.environ, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches it by stop() alone
            )
            self._running.add(process)
            if self._stopping:  # since the line above all others were asked
                process.send_signal(signal.SIGTERM)
            said, _ = process.communicate()
            self._running.discard(process)
            asked = self._stopping
            if process.returncode:
                self.stop()  # before the next one takes this place
        finally:
            self._places.put(place)
        if asked and process.returncode in (EXIT_STOPPED, -signal.SIGTERM):
            raise CancelledError
        if process.returncode:
            raise RunFailed(name, process.returncode, said[-SHOWN:].strip())

    def stop(self, number: int | None = None, frame: FrameType | None = None) -> None:
        """Start no more, and ask those that run to save and end."""
        self._stopping, self.signalled = True, self.signalled or number is not None
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)


# ------------------------------------------------------------------------------- all runs


def run_all(cells: list[Cell], title: str, jobs: int | None = None) -> list[Outcome]:
    """Every run, from its newest checkpoint on, `jobs` of them side by side (None: one for each
    GPU, or for each core); those that are at their end are taken as they are.

    The first failure, or a signal, ends all; the same call goes on where they stopped. Raises
    UserError, before anything runs, where a config is wrong, ends without an accuracy, or has a run
    folder that another one made; RunFailed, with the code EXIT_STOPPED where a signal came.
    """
    known = [find_outcome(cell) for cell in cells]
    left = [at for at, outcome in enumerate(known) if outcome is None]
    processes, failures = Processes(jobs, len(left)), list[RunFailed]()
    handlers = {number: signal.signal(number, processes.stop) for number in stopping_signals()}
    try:
        with (
            tqdm(total=len(cells), initial=len(cells) - len(left), desc=title, unit="run") as bar,
            ThreadPoolExecutor(processes.jobs) as pool,
        ):
            futures = {pool.submit(_run_cell, cells[at], processes): at for at in left}
            for future in as_completed(futures):
                try:
                    outcome = known[futures[future]] = future.result()
                except CancelledError:
                    continue
                except RunFailed as failure:
                    failures.append(failure)
                    continue
                name = load_config(*cells[futures[future]].arguments).name
                bar.write(f"{name}: {outcome.accuracy:.1%}")
                bar.update()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if processes.signalled:
        raise RunFailed(title, EXIT_STOPPED, "stopped by a signal; the same command goes on")
    if failures:
        raise failures[0]
    return [outcome for outcome in known if outcome is not None]


def find_outcome(cell: Cell) -> Outcome | None:
    """That of a run that is at its end. Raises UserError as run_all does."""
    config = load_config(*cell.arguments)
    run_dir = config.run_dir
    if config.only_eval or config.skip_validation:
        raise UserError(f"{config.name}: has no accuracy; leave only_eval and skip_validation out")
    if cell.sweep and config.save_only_improve:
        raise UserError(
            f"{config.name}: the sweep needs the last checkpoint, which save_only_improve may not "
            "keep; take keep_checkpoints instead"
        )
    saved = own_config(run_dir)
    if saved is not None and saved != config:
        names = [name for name in FIELDS if getattr(saved, name) != getattr(config, name)]
        there = ", ".join(f"{name}: {getattr(saved, name)}" for name in names)
        raise UserError(
            f"{run_dir}: was made with other settings ({there}); give another name or save_path, "
            "or move it away"
        )
    if not (run_dir / OUTCOME).exists():
        return None
    outcome = Outcome(**json.loads((run_dir / OUTCOME).read_text(encoding="utf-8")))
    if outcome.rows not in (None, hash_of_rows(config)):
        raise UserError(
            f"{run_dir}: the rows of {config.train_path} or {config.val_path} have changed since; "
            "give another name or save_path, or move it away"
        )
    return outcome if outcome.swept or not _has_sweep(cell, config) else None


def hash_of_rows(config: Config) -> str:
    """Of the bytes of the files that a run trains and validates on; nothing of a Hub data set,
    whose name the config has."""
    known = hashlib.sha256()
    for path in (config.train_path, config.val_path):
        known.update(Path(path).read_bytes() if path and Path(path).is_file() else b"")
    return known.hexdigest()


def _has_sweep(cell: Cell, config: Config) -> bool:
    return cell.sweep and config.method is Method.COCONUT


def _run_cell(cell: Cell, processes: Processes) -> Outcome:
    config = load_config(*cell.arguments)
    rows = hash_of_rows(config)
    processes.run(config.name, list(cell.arguments))
    runs = [config.run_dir]
    if _has_sweep(cell, config):
        last = config.run_dir / f"checkpoint_{config.num_epochs}"
        keys = [f"name={config.name}-latents", "only_eval=True", "eval_num_latents=all"]
        sweep = [*cell.arguments, *keys, f"load_model_path={last}"]
        runs.append(load_config(*sweep).run_dir)
        processes.run(runs[-1].name, sweep)
    outcome = replace(read_outcome(cell.arguments, *runs), rows=rows)
    write_whole(config.run_dir / OUTCOME, json.dumps(asdict(outcome), indent=1) + "\n")
    return outcome


def read_outcome(arguments: Sequence[str], run_dir: Path, *sweeps: Path) -> Outcome:
    """From the metrics of a run that is at its end, and of evaluations of its last checkpoint."""
    records = read_metrics(run_dir / "metrics.jsonl")
    evaluations = [record for record in records if record["kind"] == "eval"]
    own = [record for record in evaluations if record["forced_latents"] is None]
    last, training = own[-1], [record for record in records if record["kind"] == "train"]
    forced = [r for r in evaluations if r["epoch"] == last["epoch"] and r not in own]
    forced += [record for sweep in sweeps for record in read_metrics(sweep / "metrics.jsonl")]
    return Outcome(
        arguments=list(arguments),
        accuracy=last["accuracy"],
        by_latents={str(r["forced_latents"]): r["accuracy"] for r in forced},
        tokens=last["new_tokens"],
        seconds=sum(record["seconds"] for record in training),
        steps=len(training),
        epochs=[(record["epoch"], record["stage"], record["accuracy"]) for record in own],
        results=str(run_dir / f"{results_name(last['epoch'], None, None)}.jsonl"),
        swept=bool(sweeps),
    )
