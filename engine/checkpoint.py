"""Checkpoints: save, find, load. Nothing is ever half written under its final name.

<run folder>/checkpoint_<epoch>/            after an epoch
<run folder>/checkpoint_<epoch>_step_<n>/   within it, after n optimizer steps
    model.safetensors, config.json, tokenizer files   what from_pretrained loads; with lora_r
                                                      adapter_{model.safetensors,config.json}
    README.md, custom_generate/                       how to generate with it, see engine/card.py
    config.yaml, state.json                           resolved config, place in the training
    training_state/                                   optimizer and the weights of what is trained
                                                      beside the model, to resume (newest only)
    evaluation.json                                   the place after this epoch's evaluation
"""

import errno
import fcntl
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerBase

from engine.adapters import save_adapters
from engine.card import describe_checkpoint
from engine.distributed import barrier, broadcast_object, on_all, on_main, several_processes
from engine.files import WRITING, sync, sync_folder
from engine.launch import is_main_process
from engine.optimizer import state_bytes, trained_parameters
from engine.weights import save_base
from loader import read_yaml
from rules import make_config
from utils import Config, UserError, log

NAME = re.compile(r"checkpoint_([0-9]+)(?:_step_([0-9]+))?")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # NFS or Lustre without them
VISIBLE_SECONDS = 60  # until NFS shows a new file everywhere
MOVE = "move this checkpoint away to go on from the one before"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

# ------------------------------------------------------------------------------- find


@dataclass
class TrainState:
    """The place in the training: what state.json and evaluation.json of a checkpoint hold."""

    data: str  # fingerprint of the training rows and their encoding
    rows_per_step: int  # of one optimizer step, on all ranks
    first_epoch: int = 1  # the first epoch that the run ever ran
    global_step: int = 0  # optimizer steps done
    samples_seen: int = 0
    bad_steps: int = 0  # optimizer steps that were skipped because they were not finite
    bad_steps_in_a_row: int = 0
    best_accuracy: float | None = None  # None: nothing was evaluated yet
    best_epoch: int | None = None
    best_latent_distance: float = 0.0  # largest mean distance of two latents of a row
    evaluated: bool = False  # whether the newest epoch's gate and evaluation are done
    # with advance_at: of the epochs from 1 on, once it is decided the next one's too
    stages: list[int] = field(default_factory=list)
    scheduler: dict = field(default_factory=dict)  # its state when the checkpoint was written
    files: dict[str, int] = field(default_factory=dict)  # bytes of the files that grow by then

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


class Checkpoint(NamedTuple):
    """A complete checkpoint folder of ours. step: optimizer steps done in a running epoch."""

    path: Path
    epoch: int
    step: int | None

    @property
    def epochs_done(self) -> int:
        return self.epoch if self.step is None else self.epoch - 1

    @property
    def has_optimizer(self) -> bool:
        return (self.path / "training_state").is_dir()

    def state(self) -> TrainState:
        """The place in the training, after the evaluation where that is done too."""
        evaluated = self.path / "evaluation.json"
        path = evaluated if evaluated.exists() else self.path / "state.json"
        try:
            return TrainState(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:  # no JSON; other keys than these
            raise UserError(f"{path}: damaged ({error}); {MOVE}") from None

    def config(self) -> Config:
        path = self.path / "config.yaml"
        return make_config(read_yaml(path), str(path))

    def use_weights(self) -> str:
        """How a run goes on from the weights alone, as a part of a line."""
        keys = f"load_model_path={self.path} resume={self.epochs_done}"
        return f"set {keys} to go on from the weights with a new optimizer state"


def as_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at a path, None where there is none of ours."""
    match = NAME.fullmatch(path.name)
    if not match or not (path / "state.json").is_file():
        return None
    return Checkpoint(path, int(match[1]), int(match[2]) if match[2] else None)


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, oldest first; stray files do not matter."""
    checkpoints = map(as_checkpoint, run_dir.glob("checkpoint_*"))
    return sorted(
        (c for c in checkpoints if c is not None),
        key=lambda c: (c.epoch, float("inf") if c.step is None else c.step),
    )


def lock_run_dir(run_dir: Path) -> TextIO:
    """Hold the run folder for this process; the lock ends with it, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / ".lock", "a+")
    try:
        # not flock: workers, which outlive a killed process for seconds, would inherit it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise UserError(
            f"{run_dir}: process {lock.read().strip()} is writing to this run folder; "
            "stop it, or choose another name"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            f"{run_dir}: this file system has no locks ({error.strerror}); see to it yourself that "
            "no two runs write to one run folder"
        )
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    for leftover in run_dir.glob(f"*{WRITING}*"):  # of a process that died while saving
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


def check_shared(run_dir: Path) -> None:
    """Raise UserError, on all processes, where a node does not see the main one's run folder, in
    which all of them write a checkpoint. All ranks call this."""
    mark = run_dir / ".seen-by-all-nodes"
    token = broadcast_object(str(uuid.uuid4()))
    on_main(lambda: mark.write_text(token))

    def look() -> None:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not mark.exists() or mark.read_text() != token:
            if time.monotonic() > deadline:
                raise UserError(
                    f"save_path: {run_dir} is not the folder that the main process writes to; "
                    "name one on a file system that all nodes share"
                )
            time.sleep(0.5)

    on_all(look)
    on_main(mark.unlink)


# ------------------------------------------------------------------------------- save


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit of the shell


class DiskFull(Exception):
    """No room for a file: what is known of it."""


def is_no_room(error: BaseException) -> bool:
    """Whether an error is that of a disk that takes no more. DCP wraps it, torch.save raises
    another after it; what is written in Rust says it in words: safetensors in an error of its own,
    tokenizers in a bare Exception."""
    if error.__context__ is not None and is_no_room(error.__context__):
        return True
    if isinstance(error, CheckpointException):
        return any(is_no_room(failure[0]) for failure in error.failures.values())
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    number = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return (
        type(error) in (SafetensorError, Exception)
        and number is not None
        and (int(number[1] or number[2]) in NO_ROOM)
    )


def _write_parts(
    folder: Path,
    model: Any,  # a Coconut
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    config: Config,
    state: TrainState,
) -> None:
    """Write all parts of a checkpoint and wait until they are on the disk."""
    with _no_group_is_fine():
        dcp.save(
            _training_state(model, optimizer),
            checkpoint_id=folder / "training_state",
            no_dist=not several_processes(),
        )
    adapted = config.lora_r is not None
    weights = get_model_state_dict(model.base_causallm, options=TRAINED if adapted else FULL)
    if is_main_process():
        (save_adapters if adapted else save_base)(model.base_causallm, weights, folder)
        tokenizer.save_pretrained(folder)
        name = NAME.match(folder.name)
        assert name is not None
        step = int(name[2]) if name[2] else None
        describe_checkpoint(folder, name[0], config, tokenizer, int(name[1]), step, state.stages)
        (folder / "config.yaml").write_text(config.to_yaml())
        (folder / "state.json").write_text(state.to_json())
        sync_folder(folder)


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What training_state/ holds: the optimizer's state, and what is trained with the model but is
    no part of what from_pretrained opens (the decoder of step_loss)."""
    state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    named = model.named_parameters()
    beside = {name: p.detach() for name, p in named if not name.startswith("base_causallm.")}
    return state | ({"beside": beside} if beside else {})


@contextmanager
def _no_group_is_fine() -> Iterator[None]:
    """DCP warns where there is no process group, even where no_dist tells it so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def checkpoint_bytes(num_parameters: int, config: Config) -> tuple[int, int]:
    """Bytes of the weights and of the optimizer state of a checkpoint."""
    return num_parameters * config.dtype.itemsize, num_parameters * state_bytes(config)


def run_bytes(num_parameters: int, config: Config, epochs: int, beside: int = 0) -> tuple[int, int]:
    """The most bytes that the checkpoints of so many epochs take at once, and their number: the one
    that is being written stands beside all that it will make useless, of which the newest has an
    optimizer state too. beside: parameters of which only these two hold the weights."""
    weights, optimizer = checkpoint_bytes(num_parameters, config)
    within = int(config.save_every_steps is not None)  # the newest place in the last epoch
    if config.save_only_improve:
        older = min(epochs - 1 + within, 2)  # the best and the newest
    else:
        best = int(not config.skip_validation)  # stays beside the newest ones
        older = min(epochs - 1, (config.keep_checkpoints or epochs) + best) + within
    newest = optimizer + sum(checkpoint_bytes(beside, config))
    return weights * (older + 1) + min(older + 1, 2) * newest, older + 1


def save_checkpoint(
    path: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    config: Config,
    state: TrainState,
) -> None:
    """Write a checkpoint under a temporary name, sync it, rename it. All ranks call this.

    Raises DiskFull where there is no room for it; the checkpoints before stay as they are.
    """
    writing = path.with_name(path.name + WRITING + "tmp")
    count = sum(p.numel() for p in trained_parameters(model))
    need, have = sum(checkpoint_bytes(count, config)), broadcast_object(free_bytes(path.parent))
    if have < need:  # on all ranks, as the main one sees it
        raise DiskFull(f"{path}: {need} bytes needed, {have} free")
    if is_main_process():
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
    barrier()
    problem = None
    try:
        _write_parts(writing, model, tokenizer, optimizer, config, state)
    except (Exception, CheckpointException) as error:  # tokenizers raises a bare one
        if not is_no_room(error):
            raise
        problem = f"{path}: the disk or a quota is full"
    if problem := broadcast_object(problem):  # on all ranks; DCP's error is theirs anyway
        shutil.rmtree(writing, ignore_errors=True)
        raise DiskFull(problem)
    if is_main_process():
        writing.rename(path)
        sync(path.parent)
    barrier()


def prune_checkpoints(run_dir: Path, keep: set[int | None] | None) -> None:
    """Delete what the newest checkpoint makes useless: older places within an epoch, older
    optimizer states and, where keep names the epochs to keep, all other epochs."""
    *older, newest = find_checkpoints(run_dir)
    for checkpoint in older:
        if checkpoint.step is not None or (keep is not None and checkpoint.epoch not in keep):
            # renamed first: a deletion that is cut short must not leave half a checkpoint
            dead = checkpoint.path.with_name(checkpoint.path.name + WRITING + "deleted")
            checkpoint.path.rename(dead)
            shutil.rmtree(dead)
        else:
            shutil.rmtree(checkpoint.path / "training_state", ignore_errors=True)


# ------------------------------------------------------------------------------- load


class _LeaveOutStateless(DefaultLoadPlanner):
    """Leaves out the parameters without an optimizer state in the checkpoint: those that had no
    gradient before it, as towers that text does not reach."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        stored = {key.rpartition(".")[0] for key in metadata.state_dict_metadata}
        states = state_dict["optimizer"]["state"]
        for name in [name for name in states if f"optimizer.state.{name}" not in stored]:
            del states[name]
        super().set_up_planner(state_dict, metadata, is_coordinator)


def load_optimizer(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore the optimizer, and what is trained beside the model, in place, resharded where the
    number of processes has changed."""
    folder = checkpoint.path / "training_state"
    state = _training_state(model, optimizer)
    try:
        with _no_group_is_fine():
            dcp.load(
                state,
                checkpoint_id=folder,
                planner=_LeaveOutStateless(),
                no_dist=not several_processes(),
            )
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if not isinstance(cause, Exception):  # a request to stop is no damage
                raise cause from None
        reason = " ".join(str(causes[0]).split())[:200] or type(causes[0]).__name__
        raise UserError(
            f"{folder}: the optimizer state cannot be read ({reason}); if it is damaged, delete "
            f"it, and {checkpoint.use_weights()}"
        ) from None
    options = StateDictOptions(strict=False)  # what is left out has no state afterwards
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
