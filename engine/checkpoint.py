"""Checkpoints: save, find, load. Nothing is ever half written under its final name.

<run folder>/checkpoint_<epoch>/            after an epoch
<run folder>/checkpoint_<epoch>_step_<n>/   within it, after n optimizer steps
    model.safetensors, config.json, tokenizer files   what from_pretrained loads
    config.yaml, state.json                           resolved config, place in the training
    training_state/                                   optimizer, for resuming (newest only)
    evaluation.json                                   the place after this epoch's evaluation
"""

import fcntl
import json
import os
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from engine.distributed import barrier, broadcast_object, is_main_process, several_processes
from engine.optimizer import state_bytes
from utils import WRITING, Config, Method, UserError, make_config, read_yaml, sync

NAME = re.compile(r"checkpoint_([0-9]+)(?:_step_([0-9]+))?")
DELETE = "delete this checkpoint to go on from the one before"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)

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
    evaluated: bool = False  # whether the newest epoch's evaluation is done
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

    def state(self) -> TrainState:
        """The place in the training, after the evaluation where that is done too."""
        evaluated = self.path / "evaluation.json"
        path = evaluated if evaluated.exists() else self.path / "state.json"
        try:
            return TrainState(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:  # no JSON; other keys than these
            raise UserError(f"{path}: damaged ({error}); {DELETE}") from None

    def config(self) -> Config:
        path = self.path / "config.yaml"
        return make_config(read_yaml(path), str(path))


def as_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at a path, None where there is none of ours."""
    match = NAME.fullmatch(path.name)
    if not match or not (path / "state.json").is_file():
        return None
    return Checkpoint(path, int(match[1]), int(match[2]) if match[2] else None)


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, oldest first; stray files do not matter."""
    found = [as_checkpoint(path) for path in run_dir.glob("checkpoint_*")]
    return sorted(
        (c for c in found if c is not None),
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
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    for leftover in run_dir.glob(f"*{WRITING}*"):  # of a process that died while saving
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


# ------------------------------------------------------------------------------- save


class DiskFull(Exception):
    """No room for a checkpoint: how much is needed and free."""


@contextmanager
def alone_in_peace():
    """Whether there is no process group; DCP warns of that even where it is told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not several_processes()


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def checkpoint_bytes(model: nn.Module, config: Config) -> tuple[int, int]:
    """Bytes of the weights and of the optimizer state of a checkpoint."""
    count = sum(p.numel() for p in model.parameters())
    return count * config.dtype.itemsize, count * state_bytes(config)


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
    need, have = sum(checkpoint_bytes(model, config)), broadcast_object(free_bytes(path.parent))
    if have < need:  # on all ranks, as the main one sees it
        raise DiskFull(
            f"{path}: {need} bytes needed, {have} free; the checkpoints before it are "
            "intact: make room, then go on with the same command"
        )
    if is_main_process():
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
    barrier()
    optimizer_state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    with alone_in_peace() as alone:
        dcp.save(optimizer_state, checkpoint_id=writing / "training_state", no_dist=alone)
    weights = get_model_state_dict(model, options=FULL)
    if is_main_process():
        weights = {k.removeprefix("base_causallm."): v for k, v in weights.items()}
        for name in tied_names(model.base_causallm):  # gathered, they no longer share memory
            weights.pop(name, None)
        model.base_causallm.save_pretrained(writing, state_dict=weights)
        tokenizer.save_pretrained(writing)
        (writing / "config.yaml").write_text(config.to_yaml())
        (writing / "state.json").write_text(state.to_json())
        for item in sorted(writing.rglob("*"), reverse=True):
            sync(item)
        sync(writing)
    barrier()
    if is_main_process():
        writing.rename(path)
        sync(path.parent)
    barrier()


def prune_checkpoints(run_dir: Path, keep: set[int] | None) -> None:
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


def load_optimizer(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore the optimizer in place, resharded where the number of processes has changed."""
    folder = checkpoint.path / "training_state"
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    try:
        with alone_in_peace() as alone:
            dcp.load(state, checkpoint_id=folder, no_dist=alone)
    except CheckpointException:
        raise UserError(f"{folder}: the optimizer state is damaged; {DELETE}") from None
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def read_weights(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint under the base model's names, and whether it is known to be
    a Coconut's.

    Reads folders (safetensors) and single files: safetensors, or the ancestor's torch.save of a
    state dict. Nothing but tensors is ever unpickled. Raises UserError.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path}: holds no .safetensors file; give a checkpoint folder")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"{path}: no such checkpoint")
    tensors = {}
    for file in files:
        tensors.update(_read_tensors(file))
    is_coconut = any(name.startswith("base_causallm.") for name in tensors)
    tensors.pop("embedding.weight", None)  # the ancestor's second name of the embeddings
    tensors = {name.removeprefix("base_causallm."): tensor for name, tensor in tensors.items()}
    saved = path / "config.yaml"  # ours, under whatever name
    if saved.is_file():
        is_coconut = make_config(read_yaml(saved), str(saved)).method is Method.COCONUT
    return tensors, is_coconut


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 torch and safetensors raise many types here
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{file}: not a file of weights: {first}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file}: expected a state dict, names to tensors")
    clean = lambda name: name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
    return {clean(name): tensor for name, tensor in tensors.items()}


def vocabulary_rows(
    tensors: dict[str, Tensor], hf_config: PreTrainedConfig, num_tokens: int
) -> int:
    """The vocabulary rows of the model: the checkpoint's where those are the ancestor's doing (it
    resized to len(tokenizer), growing GPT-2's table and shrinking Qwen's), else the config's."""
    model = empty_model(hf_config)
    name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    rows = tensors[name].shape[0] if name in tensors else hf_config.vocab_size
    return rows if rows == num_tokens else hf_config.vocab_size


def empty_model(hf_config: PreTrainedConfig) -> nn.Module:
    """The model without memory for its weights: names, shapes, sizes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def tied_names(model: nn.Module) -> set[str]:
    """Names of weights that are another one's second name."""
    return set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()


def check_weights(tensors: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Raise UserError with every missing and unexpected name and every differing shape."""
    expected = model.state_dict()
    tied = tied_names(model)
    missing = [name for name in expected if name not in tensors and name not in tied]
    unexpected = [name for name in tensors if name not in expected]
    differing = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if not (missing or unexpected or differing):
        return
    if len(missing) > len(expected) / 2:
        reason = "another family of models?"
    elif len(differing) <= 2 and not missing and not unexpected:
        reason = "a vocabulary of another size?"
    else:
        reason = "another size of this model?"
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", differing),
        )
        if names
    ]
    raise UserError(f"{path}: does not fit {model.config.model_type}: {'; '.join(parts)}. {reason}")


def build_from(tensors: dict[str, Tensor], hf_config: PreTrainedConfig, dtype) -> nn.Module:
    """A causal language model with these weights, already checked."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    model.tie_weights()
    model.load_state_dict(tensors, strict=False)  # strictness is check_weights'
    return model
