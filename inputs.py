"""All input of a run, checked together before anything expensive, and the model built from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase,
)

from checkpoint import (
    Checkpoint, as_checkpoint, build_from, check_weights, empty_model, find_checkpoints,
    fit_vocabulary, read_weights,
)
from coconut import Coconut, add_latent_tokens, init_latent_rows, single_token_id
from dataset import Curriculum, LatentTokens, load_rows
from utils import Config, Method, UserError, derive_seed, log

# more than this many parameters are not trained on a CPU in anybody's lifetime
MAX_CPU_PARAMETERS = 1_000_000_000
DEBUG_TRAIN_ROWS, DEBUG_VAL_ROWS = 512, 32
# a run keeps these, or its epochs would not be one training
FIXED_KEYS = (
    "model_id", "method", "seed", "schedule", "c_thought", "epochs_per_stage",
    "max_latent_stage", "pad_latent_to_max", "uniform_prob", "bf16",
)


class Start(NamedTuple):
    """Where a run starts. resume: checkpoint of this very run to go on from. weights: other
    checkpoint to take the weights from. epochs_done: epochs before the first one to run."""

    resume: Checkpoint | None
    weights: Path | None
    epochs_done: int


@dataclass
class Inputs:
    start: Start
    train_rows: list[dict]  # [] where only_eval
    val_rows: list[dict]  # [] where skip_validation
    tokenizer: PreTrainedTokenizerBase
    tokens: LatentTokens | None  # the markers; None for the methods without them
    marker_init_id: int | None
    hf_config: PreTrainedConfig
    tensors: dict[str, Tensor] | None  # weights to start from; None: those of model_id
    has_markers: bool  # whether the weights know the markers already

    @property
    def pad_id(self) -> int:
        # masked everywhere, so any token serves where a tokenizer names none (GPT-2)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return eos if pad is None else pad


class _Problems(list):
    """Collects the problems of several checks, so that they are reported together."""

    def attempt(self, check, *args):
        try:
            return check(*args)
        except UserError as error:
            self.extend(error.problems)
            return None


def gather_inputs(config: Config, expect: str | None = None) -> Inputs:
    """Read and check everything a run needs. Raises UserError with every problem found.

    expect: "fresh" (no checkpoints yet) or "continue" (some), as the training scripts demand.
    """
    problems = _Problems()
    start = problems.attempt(find_start, config, expect)
    train_rows = [] if config.only_eval else problems.attempt(load_rows, config.train_path)
    val_rows = [] if config.skip_validation else problems.attempt(load_rows, config.val_path)
    hf_config = problems.attempt(_load_hf_config, config)
    tokenizer = problems.attempt(_load_tokenizer, config)
    tokens = init_id = tensors = None
    has_markers = False
    if tokenizer is not None and config.method is Method.COCONUT:
        tokens = LatentTokens(*add_latent_tokens(tokenizer))
        init_id = problems.attempt(_marker_init_id, tokenizer, config)
    source = start and (start.resume.path if start.resume else start.weights)
    if source and hf_config and tokenizer:
        found = problems.attempt(_load_weights, source, config, hf_config, len(tokenizer))
        tensors, has_markers = found or (None, False)
    if hf_config:
        problems.attempt(_check_device, config, hf_config)
    if problems:
        if not torch.cuda.is_available():
            problems.append(
                "this machine has no CUDA GPU; `bash train_fresh_start.sh args/quickstart.yaml` "
                "brings its own data and model and runs on any CPU"
            )
        raise UserError(*problems)
    if config.debug:
        train_rows = train_rows[:DEBUG_TRAIN_ROWS]
    return Inputs(
        start, train_rows, val_rows[: DEBUG_VAL_ROWS if config.debug else config.eval_subset_size],
        tokenizer, tokens, init_id, hf_config, tensors, has_markers,
    )


# ------------------------------------------------------------------------------- checks


def find_start(config: Config, expect: str | None) -> Start:
    """Where to start: an interrupted run goes on by itself. Raises UserError where the config
    and the run folder say different things."""
    if config.only_eval:
        return _evaluation_start(config)
    if config.save_path and Path(config.save_path).exists() and not Path(config.save_path).is_dir():
        raise UserError(f"save_path: {config.save_path} is a file; name a folder")
    checkpoints = find_checkpoints(config.run_dir)
    if expect == "fresh" and checkpoints:
        raise UserError(
            f"{config.run_dir} already holds {checkpoints[-1].path.name}; go on from it with "
            "train_continue_fresh.sh, or start another run with name=..."
        )
    if expect == "continue" and not checkpoints:
        raise UserError(
            f"{config.run_dir} holds no checkpoint to go on from; start with train_fresh_start.sh"
        )
    if not checkpoints:
        weights = Path(config.load_model_path) if config.load_model_path else None
        return Start(None, weights, config.resume or 0)
    newest = checkpoints[-1]
    _check_same_run(config, newest)
    return Start(newest, None, newest.epochs_done)


def _check_same_run(config: Config, newest: Checkpoint) -> None:
    """Raise UserError where the config contradicts the run that its run folder holds."""
    saved = newest.config()
    problems = []
    for name in FIXED_KEYS:
        ours, theirs = getattr(config, name), getattr(saved, name)
        if ours != theirs:
            problems.append(f"{name}: {ours}, but {newest.path} was trained with {theirs}")
    for name, place in (("load_model_path", str(newest.path)), ("resume", newest.epochs_done)):
        value = getattr(config, name)
        if value not in (None, getattr(saved, name), place):
            problems.append(f"{name}: {value}, but the run goes on from {newest.path}")
    if problems:
        hint = f"choose another name than {config.name}, or the settings of that run"
        raise UserError(*(f"{problem}; {hint}" for problem in problems))
    if newest.epochs_done > config.num_epochs:
        raise UserError(f"num_epochs: {config.num_epochs}, but {newest.path} is beyond it")


def _evaluation_start(config: Config) -> Start:
    path = Path(config.load_model_path)
    own = as_checkpoint(path.resolve())
    if own is None:
        return Start(None, path, config.resume or 0)
    epoch = own.epoch if config.resume is None else config.resume
    saved, mine = Curriculum.from_config(own.config()), Curriculum.from_config(config)
    many = 10**6  # a chain longer than any stage
    trained = saved.plan(saved.stage(own.epoch), many)
    asked = mine.plan(mine.stage(epoch), many)
    if config.eval_num_latents is None and tuple(trained) != tuple(asked):
        raise UserError(
            f"{path} was trained with {trained[0]} latents and {trained[1]} steps skipped, this "
            f"config evaluates it with {asked[0]} and {asked[1]} (resume: {epoch}); leave resume "
            "out and use the settings of its config.yaml, or force a number by eval_num_latents"
        )
    return Start(None, path, epoch)


def _load_hf_config(config: Config) -> PreTrainedConfig:
    try:
        hf_config = AutoConfig.from_pretrained(config.model_id, revision=config.model_revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_id: {config.model_id}: {_first_line(error)}") from None
    if type(hf_config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model_id: {config.model_id} is not a causal language model")
    return hf_config


def _load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    folder = Path(config.model_id)
    if folder.is_dir() and not list(folder.glob("*token*")) + list(folder.glob("vocab*")):
        raise UserError(f"model_id: {folder} holds no tokenizer (tokenizer.json); add its files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_id, revision=config.model_revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model_id: tokenizer of {config.model_id}: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_id: the tokenizer of {config.model_id} names no eos token")
    return tokenizer


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _marker_init_id(tokenizer: PreTrainedTokenizerBase, config: Config) -> int:
    try:
        return single_token_id(tokenizer, config.marker_init_token)
    except ValueError as error:
        raise UserError(str(error)) from None


def _load_weights(path: Path, config: Config, hf_config: PreTrainedConfig, num_tokens: int):
    """Checked tensors of a checkpoint, and whether they know the markers."""
    tensors, is_coconut = read_weights(path)
    if is_coconut and config.method is not Method.COCONUT:
        raise UserError(
            f"{path}: a coconut checkpoint cannot start a {config.method.value} run; "
            "give a checkpoint of the base model"
        )
    fit_vocabulary(tensors, hf_config, num_tokens, path)
    check_weights(tensors, empty_model(hf_config), path)
    return tensors, is_coconut


def _check_device(config: Config, hf_config: PreTrainedConfig) -> None:
    count = sum(p.numel() for p in empty_model(hf_config).parameters())
    if count > MAX_CPU_PARAMETERS and not config.only_eval and not torch.cuda.is_available():
        raise UserError(
            f"model_id: {config.model_id} has {count / 1e9:.1f} billion parameters; training it "
            "needs a CUDA GPU, and this machine shows none"
        )


# ------------------------------------------------------------------------------- model


def build_model(config: Config, inputs: Inputs) -> Coconut:
    """The model on the CPU in the config's dtype, with the weights that the inputs name."""
    if inputs.tensors is not None:
        base = build_from(inputs.tensors, inputs.hf_config, config.dtype)
        inputs.tensors = None  # a second copy of the weights
    elif config.from_scratch:
        torch.manual_seed(derive_seed(config.seed, "weights"))
        base = AutoModelForCausalLM.from_config(inputs.hf_config, dtype=config.dtype)
    else:
        base = AutoModelForCausalLM.from_pretrained(
            config.model_id, revision=config.model_revision, dtype=config.dtype
        )
    tokens = inputs.tokens
    if tokens is not None and not inputs.has_markers:
        init_latent_rows(base, tokens, inputs.marker_init_id)
        log.info(f"latent markers: new, made from the embedding of {config.marker_init_token!r}")
    ids = (None, None, None) if tokens is None else (tokens.latent, tokens.start, tokens.end)
    return Coconut(base, *ids, inputs.tokenizer.eos_token_id)
