"""The config and the tokenizer of model_id, from the Hub or a folder."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from engine.adapters import CONFIG_FILE
from engine.support import causal_config
from preprocessing.textfiles import how_to_make
from utils import Config, UserError

# what the library raises on damaged or missing config and tokenizer files
MODEL_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)


def load_hf_config(config: Config) -> PreTrainedConfig:
    """That of model_id, of its causal language model. Raises UserError."""
    if (Path(config.model_id) / CONFIG_FILE).is_file():
        raise UserError(
            f"model_id: {config.model_id} holds adapters over another model; give that one, and "
            "the adapters as load_model_path"
        )
    try:
        hf_config = AutoConfig.from_pretrained(config.model_id, revision=config.model_revision)
    except MODEL_ERRORS as error:
        made = "" if Path(config.model_id).exists() else how_to_make(config.model_id)
        raise UserError(f"model_id: {config.model_id}: {_first_line(error)}{made}") from None
    hf_config = causal_config(hf_config)
    kind = type(hf_config)  # BERT and its like have a causal head, but keep no past
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"model_id: {config.model_id} is not a causal language model")
    method = (getattr(hf_config, "quantization_config", None) or {}).get("quant_method", "fp8")
    if method not in ("fp8", "mxfp4"):  # the library can read these as whole weights
        raise UserError(
            f"model_id: {config.model_id} is quantized ({method}); give the model that it was made "
            "from, whose weights can be trained"
        )
    return hf_config


def check_has_weights(config: Config) -> None:
    """Raise UserError where a folder has none, and they are wanted."""
    folder = Path(config.model_id)
    if (
        folder.is_dir()
        and not config.from_scratch
        and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
    ):
        raise UserError(f"model_id: {folder} holds no weights; add them, or set from_scratch: True")


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """That of model_id. Raises UserError."""
    folder = Path(config.model_id)
    if folder.is_dir() and not list(folder.glob("*token*")) + list(folder.glob("vocab*")):
        raise UserError(f"model_id: {folder} holds no tokenizer (tokenizer.json); add its files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_id, revision=config.model_revision)
    except Exception as error:  # noqa: BLE001 of a file that tokenizers cannot read: a bare one
        raise UserError(f"model_id: tokenizer of {config.model_id}: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"model_id: {config.model_id} has no fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_id: the tokenizer of {config.model_id} names no eos token")
    # what it was saved with; the library resets it at the first call, and fingerprints must agree
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
