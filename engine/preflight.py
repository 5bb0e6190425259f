"""All input of a run, checked together before anything expensive, and the model built from it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from coconut import LATENT, Coconut, add_latent_tokens, init_latent_rows, single_token_id
from dataset import LatentTokens, StageDataset, load_rows
from engine.checkpoint import build_from, check_weights, empty_model, fit_vocabulary, read_weights
from engine.start import Start, find_start
from textfiles import how_to_make
from utils import Config, Method, UserError, derive_seed

# more than this many parameters are not trained on a CPU in anybody's lifetime
MAX_CPU_PARAMETERS = 1_000_000_000
DEBUG_TRAIN_ROWS, DEBUG_VAL_ROWS = 512, 32
# what the library raises on damaged or missing config and tokenizer files
MODEL_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)


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
        except OSError as error:  # a path that no file system takes
            self.append(f"{error.filename}: {error.strerror}")
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
    if hf_config and tokenizer and len(tokenizer) > hf_config.vocab_size:
        problems.append(
            f"model_id: the tokenizer of {config.model_id} has {len(tokenizer)} "
            f"tokens, its model rows for {hf_config.vocab_size}; they do not belong "
            "together"
        )
    tokens = init_id = tensors = None
    has_markers = tokenizer is not None and LATENT in tokenizer.get_vocab()
    if tokenizer is not None and config.method is Method.COCONUT:
        tokens = LatentTokens(*add_latent_tokens(tokenizer))
        init_id = problems.attempt(_marker_init_id, tokenizer, config)
    source = start and (start.resume.path if start.resume else start.weights)
    if source:
        tensors, has_markers = problems.attempt(read_weights, source) or (None, False)
    if tensors and hf_config and tokenizer:
        has_markers = problems.attempt(
            _check_fit, source, tensors, has_markers, config, hf_config, len(tokenizer)
        )
    if hf_config:
        problems.attempt(_check_device, config, hf_config)
    published = not source and not config.from_scratch
    if hf_config and published and Path(config.model_id).is_dir():
        problems.attempt(_check_model_folder, Path(config.model_id), hf_config)
    if problems:
        raise UserError(*problems)
    if config.debug:
        train_rows = train_rows[:DEBUG_TRAIN_ROWS]
    return Inputs(
        start,
        train_rows,
        val_rows[: DEBUG_VAL_ROWS if config.debug else config.eval_subset_size],
        tokenizer,
        tokens,
        init_id,
        hf_config,
        tensors,
        has_markers,
    )


# ------------------------------------------------------------------------------- checks


def _load_hf_config(config: Config) -> PreTrainedConfig:
    try:
        hf_config = AutoConfig.from_pretrained(config.model_id, revision=config.model_revision)
    except MODEL_ERRORS as error:
        made = "" if Path(config.model_id).exists() else how_to_make(config.model_id)
        raise UserError(f"model_id: {config.model_id}: {_first_line(error)}{made}") from None
    kind = type(hf_config)  # BERT and its like have a causal head, but keep no past
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"model_id: {config.model_id} is not a causal language model")
    folder = Path(config.model_id)
    if (
        folder.is_dir()
        and not config.from_scratch
        and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
    ):
        raise UserError(f"model_id: {folder} holds no weights; add them, or set from_scratch: True")
    return hf_config


def _load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    folder = Path(config.model_id)
    if folder.is_dir() and not list(folder.glob("*token*")) + list(folder.glob("vocab*")):
        raise UserError(f"model_id: {folder} holds no tokenizer (tokenizer.json); add its files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_id, revision=config.model_revision)
    except MODEL_ERRORS as error:
        raise UserError(f"model_id: tokenizer of {config.model_id}: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"model_id: {config.model_id} has no fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_id: the tokenizer of {config.model_id} names no eos token")
    return tokenizer


def _first_line(error) -> str:
    return " ".join(str(error).split())[:300]


def _marker_init_id(tokenizer: PreTrainedTokenizerBase, config: Config) -> int:
    try:
        return single_token_id(tokenizer, config.marker_init_token)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_fit(
    path: Path, tensors, is_coconut: bool, config: Config, hf_config, num_tokens: int
) -> bool:
    """Whether the tensors know the markers. Raises UserError where they are not the weights of
    this model and method."""
    if is_coconut and config.method is not Method.COCONUT:
        raise UserError(
            f"{path}: a coconut checkpoint cannot start a {config.method.value} run; "
            "give a checkpoint of the base model"
        )
    resized = fit_vocabulary(tensors, hf_config, num_tokens)
    check_weights(tensors, empty_model(hf_config), path)
    return is_coconut or resized


def _check_model_folder(folder: Path, hf_config: PreTrainedConfig) -> None:
    """Raise UserError where the shapes in a folder's files are not those of its config. The
    library may rename and leave out what it reads; so only what is there is compared."""
    model = empty_model(hf_config)
    short = lambda name: name.removeprefix(f"{model.base_model_prefix}.")
    expected = {short(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {}
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                found |= {short(n): tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}
        except SafetensorError as error:
            raise UserError(f"model_id: {file} is damaged: {_first_line(error)}") from None
    common = [name for name in found if name in expected]
    wrong = [f"{n} is {found[n]}, not {expected[n]}" for n in common if found[n] != expected[n]]
    if found and len(common) < len(expected) / 2:
        wrong.append(f"{len(common)} of its {len(expected)} tensors are there")
    if wrong:
        raise UserError(
            f"model_id: the weights in {folder} do not fit its config: " + "; ".join(wrong[:3])
        )


def _check_device(config: Config, hf_config: PreTrainedConfig) -> None:
    count = sum(p.numel() for p in empty_model(hf_config).parameters())
    if count > MAX_CPU_PARAMETERS and not config.only_eval and not torch.cuda.is_available():
        raise UserError(
            f"model_id: {config.model_id} has {count / 1e9:.1f} billion parameters; training it "
            "needs a CUDA GPU, and this machine shows none; `bash train_fresh_start.sh "
            "args/quickstart.yaml` brings its own data and model and runs on any CPU"
        )


def check_prompts(datasets: list[StageDataset], config: Config, hf_config) -> None:
    """Raise UserError where a prompt and its completion have more tokens than positions."""
    longest = max(int((d.total_length - d.num_labels).max()) for d in datasets)
    if longest + config.max_new_tokens > hf_config.max_position_embeddings:
        raise UserError(
            f"max_new_tokens: {config.max_new_tokens} after a prompt of {longest} tokens (latents "
            f"included) is above the {hf_config.max_position_embeddings} positions of "
            f"{config.model_id}"
        )


# ------------------------------------------------------------------------------- model


def _load_published(config: Config) -> nn.Module:
    """The model of model_id. Raises UserError where its files are not all of it: the library
    would only warn, and fill in noise."""
    try:
        base, report = AutoModelForCausalLM.from_pretrained(
            config.model_id,
            revision=config.model_revision,
            dtype=config.dtype,
            output_loading_info=True,
        )
    except (*MODEL_ERRORS, SafetensorError, RuntimeError) as error:
        raise UserError(f"model_id: {config.model_id}: {_first_line(error)}") from None
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        raise UserError(
            f"model_id: the weights of {config.model_id} do not fit its config: "
            f"{_first_line(problems)}"
        )
    # to the allocator's addresses, as after a resume: CPU kernels round by alignment
    for parameter in base.parameters():
        parameter.data = parameter.data.clone()
    return base


def build_model(config: Config, inputs: Inputs) -> Coconut:
    """The model on the CPU in the config's dtype, with the weights that the inputs name."""
    if inputs.tensors is not None:
        base = build_from(inputs.tensors, inputs.hf_config, config.dtype)
        inputs.tensors = None  # a second copy of the weights
    elif config.from_scratch:
        torch.manual_seed(derive_seed(config.seed, "weights"))
        base = AutoModelForCausalLM.from_config(inputs.hf_config, dtype=config.dtype)
    else:
        base = _load_published(config)
    tokens = inputs.tokens
    if tokens is not None and not inputs.has_markers:
        init_latent_rows(base, tokens, inputs.marker_init_id)
    ids = (None, None, None) if tokens is None else (tokens.latent, tokens.start, tokens.end)
    if config.latent_input == "pause":  # an ordinary token, whose embedding is learned
        ids = (None, *ids[1:])
    return Coconut(base, *ids, inputs.tokenizer.eos_token_id)
