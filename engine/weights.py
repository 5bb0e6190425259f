"""Weights of a base model: found and read in whatever form they come, checked, loaded.

There is one rule, that of the library's from_pretrained: which files of a folder are read, how
their names become the model's, what is tied. Files of other programs come under it when what
they wrap around the weights is taken off. Loading is strict.
"""

import copy
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import KeysView
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from loader import own_config
from preprocessing.textfiles import how_to_make
from utils import Method, UserError, log

# the files that from_pretrained looks for in a folder, in its order
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf)")
SHARD = re.compile(r".*-\d+-of-\d+\..*")
CHECKPOINT = re.compile(r"checkpoint[-_](\d+)(?:_step_(\d+))?")
# what torch.compile, FSDP and activation checkpointing put anywhere into names
WRAPPED = re.compile(r"(?:^|(?<=\.))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
# what DDP, DeepSpeed and the ancestor's Coconut put before them
PREFIXES = re.compile(r"^(?:(?:module|_forward_module|base_causallm)\.)+")
# what SIM-CoT's class holds beside its Coconut: the decoder that writes the steps in training
DECODER = re.compile(r"^(?:(?:module|_forward_module)\.)*expainable_llm\.")
# a text tower's weights: how files of a model with several towers name them, and its own names
TEXT_TOWER_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}
STATE_DICTS = ("model", "state_dict", "model_state_dict", "module")
# buffers that old versions of the library saved, and new ones compute
OLD_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.\w+|(attn|attention)\.(masked_)?bias|position_ids)")
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
)


class Weights(NamedTuple):
    """Tensors of a checkpoint under the base model's names, mapped from the disk where its format
    allows that. is_coconut: whether they are known to be a Coconut's. as_saved: whether this is a
    folder that from_pretrained reads as it is. num_left_out: tensors of the files that
    are no part of the model."""

    tensors: dict[str, Tensor]
    is_coconut: bool
    as_saved: bool
    num_left_out: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of most of the numbers."""
        numbers: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            numbers[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
        return max(numbers, key=lambda dtype: numbers[dtype])


# ------------------------------------------------------------------------------- read


def read_weights(path: Path, hf_config: PreTrainedConfig) -> Weights:
    """The weights at a path: a folder, or a single file (safetensors, or torch.save of a state
    dict). Nothing but tensors is ever unpickled. Raises UserError."""
    saved: dict[str, Tensor] = {}  # under the names in the files
    for file in _files(path):
        saved |= _read_file(file)
    tensors = {WRAPPED.sub("", name): tensor for name, tensor in saved.items()}
    is_coconut = any("base_causallm." in name for name in tensors)
    num_left_out = 0
    if is_coconut:  # the ancestor's second name of the embeddings
        tensors = {n: t for n, t in tensors.items() if PREFIXES.sub("", n) != "embedding.weight"}
        coconut = {name: tensor for name, tensor in tensors.items() if not DECODER.match(name)}
        num_left_out, tensors = len(tensors) - len(coconut), coconut
    tensors = {PREFIXES.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    expected = empty_model(hf_config).state_dict().keys()
    tensors = _without_attribute(_text_tower(tensors, expected), expected)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or (folder / "state.json").is_file():  # ours, under whatever name?
        config = own_config(folder)
        is_coconut = is_coconut if config is None else config.method is Method.COCONUT
    # the library looks for generation_config.json too, and fails where there is no config at all
    as_saved = (path / "config.json").is_file() and tensors.keys() == saved.keys()
    return Weights(tensors, is_coconut, as_saved, num_left_out)


def _text_tower(tensors: dict[str, Tensor], expected: KeysView[str]) -> dict[str, Tensor]:
    """The text tower's tensors alone, under its own names, of a model with several towers."""
    tower = {tower_name(n): tensor for n, tensor in tensors.items() if tower_name(n) != n}
    return tower if len(expected & tower.keys()) > len(expected & tensors.keys()) else tensors


def _without_attribute(tensors: dict[str, Tensor], expected: KeysView[str]) -> dict[str, Tensor]:
    """The tensors without the name of the attribute that held the model in somebody's class."""
    inner = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    fits_better = len(expected & inner.keys()) > len(expected & tensors.keys())
    return inner if len({n.split(".")[0] for n in tensors}) == 1 and fits_better else tensors


def _files(path: Path) -> list[Path]:
    """The files of weights at a path, those that from_pretrained takes where it is a folder."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint{how_to_make(path)}")
    if path.is_dir():
        named = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if named is None:
            raise UserError(f"{path}: {_what_is_there(path)}")
        return _shards(named) if named.suffix == ".json" else [named]
    if path.name.endswith(".index.json") or SHARD.fullmatch(path.name):
        raise UserError(f"{path}: one file of several; give their folder, {path.parent}")
    return [path]


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of shards ({error!r})") from None
    lacking = sorted(name for name in names if not (index.parent / name).is_file())
    if lacking:
        count = f"{len(lacking)} of its {len(names)} shards"
        raise UserError(f"{index}: {count} are not in the folder: {', '.join(lacking)}")
    return [index.parent / name for name in sorted(names)]


def _what_is_there(folder: Path) -> str:
    """What a folder without files of weights holds in their place, and what to give."""
    names = sorted(item.name for item in folder.iterdir())
    matches = [match for match in map(CHECKPOINT.fullmatch, names) if match]
    if matches:
        newest = max(matches, key=lambda match: [int(n or 10**9) for n in match.groups()])[0]
        runs = _listed([match[0] for match in matches])
        return f"a run folder; give one of its checkpoints ({runs}): {folder / newest}"
    files = [name for name in names if WEIGHT_FILE.fullmatch(name)]
    lacking = "holds no .safetensors or .bin weights under the names that the library reads"
    if any(SHARD.fullmatch(name) for name in files):
        return f"{lacking}: the index of its shards is missing ({FOLDER_FILES[1]})"
    if files:
        return f"{lacking} ({FOLDER_FILES[0]}); it holds {_listed(files)}: give the file"
    return f"{lacking} ({FOLDER_FILES[0]}, {FOLDER_FILES[2]}); give a checkpoint folder"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        mapped = zipfile.is_zipfile(file)  # what torch saved before 1.6 is not
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of old pickles
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # noqa: BLE001 torch and safetensors raise many types here
        raise UserError(f"{file}: not a file of weights: {_reason(error)}") from None
    return _state_dict(content, file)


def _reason(error: Exception) -> str:
    """Why a file could not be read; torch's own words advise to trust it."""
    text = str(error)
    if foreign := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it holds {foreign[1]}, and nothing but tensors is read; save the model's "
            "state_dict() alone"
        )
    if not text.strip() or text.startswith("Weights only load failed"):
        return f"torch finds no state dict in it ({type(error).__name__})"
    return text.strip().splitlines()[0]


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    """The names and tensors of a file, be it a state dict or something that holds one."""
    if _is_state_dict(content):
        return content
    entries = content if isinstance(content, dict) else {}
    inner = {key: value for key, value in entries.items() if _is_state_dict(value)}
    known = [key for key in STATE_DICTS if key in inner]
    if known or len(inner) == 1:
        return inner[known[0] if known else next(iter(inner))]
    seen = f"the entries {_listed([str(key) for key in entries])}" if entries else type(content)
    raise UserError(f"{file}: expected a state dict, names to tensors; found {seen}")


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items())
    )


def tower_name(name: str) -> str:
    """The name that a weight of a file has in the text tower alone."""
    for pattern, own in TEXT_TOWER_NAMES.items():
        name = re.sub(pattern, own, name)
    return name


# ------------------------------------------------------------------------------- check


def empty_model(hf_config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model without memory for its weights: names, shapes, sizes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, dtype=dtype)


def fit_config(
    weights: Weights, hf_config: PreTrainedConfig, num_tokens: int, name: str
) -> PreTrainedConfig:
    """The model's config with the vocabulary rows of the weights, where those are the ancestor's
    doing (it resized to len(tokenizer), growing GPT-2's table and shrinking Qwen's).

    Nothing is loaded. Raises UserError with what is missing, unexpected and of another shape.
    """
    model, report = _load_shapes(weights, hf_config)
    table = model.get_input_embeddings().weight
    shapes = {key: shape for key, shape, _ in report["mismatched_keys"]}
    rows = [shapes[key][0] for key, p in model.named_parameters() if p is table and key in shapes]
    if rows == [num_tokens]:
        hf_config = copy.deepcopy(hf_config)
        hf_config.vocab_size = num_tokens
        model, report = _load_shapes(weights, hf_config)
    _check_report(report, model, name)
    return hf_config


def _load_shapes(weights: Weights, hf_config: PreTrainedConfig) -> tuple[PreTrainedModel, dict]:
    """What from_pretrained would report of the weights, found without memory for them."""
    model = empty_model(hf_config)
    conversions: Any = get_model_conversion_mapping(model)
    info, _ = convert_and_load_state_dict_in_model(
        model,
        {name: tensor.to("meta") for name, tensor in weights.tensors.items()},
        LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=conversions, dtype=model.dtype),
    )
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    return model, info.to_dict() | {"conversion_errors": info.conversion_errors}


def _check_report(report: dict, model: PreTrainedModel, name: str) -> None:
    """Raise UserError where the library's report of a loading is not that all is there."""
    missing = sorted(report["missing_keys"])
    unexpected = sorted(k for k in report["unexpected_keys"] if not OLD_BUFFERS.fullmatch(k))
    shapes = {k: f"{tuple(a)} instead of {tuple(b)}" for k, a, b in report["mismatched_keys"]}
    failed = sorted(report.get("conversion_errors", ()))
    if not (missing or unexpected or shapes or failed):
        return
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    named = model.named_parameters(remove_duplicate=False)
    tables = {k for k, p in named if any(p is m.weight for m in heads if m)}
    if len(missing) > len(model.state_dict()) / 2:
        reason = "another family of models?"
    elif shapes and shapes.keys() <= tables and not missing and not unexpected:
        reason = "a vocabulary of another size?"
    else:
        reason = "another size of this model?"
    parts = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", [f"{key} {shape}" for key, shape in sorted(shapes.items())]),
            ("not made of the file's parts", failed),
        )
        if keys
    ]
    raise UserError(f"{name}: does not fit {model.config.model_type}: {'; '.join(parts)}. {reason}")


# ------------------------------------------------------------------------------- save, load


def save_base(base: PreTrainedModel, tensors: dict[str, Any], folder: Path) -> None:
    """Write a model's config and the tensors of its state dict, for from_pretrained to read."""
    tied = base.all_tied_weights_keys  # second names; gathered tensors share no memory to show it
    base.save_pretrained(
        folder, state_dict={name: t for name, t in tensors.items() if name not in tied}
    )


def _keep_text_tower(base: PreTrainedModel, report: dict) -> None:
    """Where base was loaded from the files of a model with several towers: the others' weights
    are not missed in the report of the loading, and base is saved under its own names."""
    conversions: Any = base._weight_conversions
    used = [conversion.source_patterns for conversion in conversions]
    if any(pattern in TEXT_TOWER_NAMES for patterns in used for pattern in patterns):
        report["unexpected_keys"] = set()
        del base._weight_conversions


def load_base(
    source: Path | str,
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    name: str,
    revision: str | None = None,
) -> PreTrainedModel:
    """The causal language model with the weights of a path, or of the Hub's model of that name.
    name: what messages call it. Raises UserError where its files are not all of it: the library
    would only warn, and fill in noise."""
    weights = read_weights(Path(source), hf_config) if Path(source).exists() else None
    where: dict = {"pretrained_model_name_or_path": source, "revision": revision}
    if weights is not None and weights.num_left_out:
        log.warning(
            f"{name}: {weights.num_left_out} tensors of an auxiliary decoder (expainable_llm.*) "
            "are left out: only its training needs them"
        )
    if weights is not None and not weights.as_saved:
        where = {"pretrained_model_name_or_path": None, "state_dict": weights.tensors}
    try:
        loaded: Any = type(empty_model(hf_config)).from_pretrained(
            **where,
            config=hf_config,
            dtype=dtype,
            key_mapping=TEXT_TOWER_NAMES,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise UserError(f"{name}: {' '.join(str(error).split())[:300]}") from None
    base, report = loaded
    _keep_text_tower(base, report)
    _check_report(report, base, name)
    head = base.get_output_embeddings()
    if head is not None and head.weight is not base.get_input_embeddings().weight:
        own_hf_config = base.config
        own_hf_config.tie_word_embeddings = False  # it says otherwise where the file holds both
    # to the allocator's addresses, as after a resume: CPU kernels round by alignment
    for parameter in base.parameters():
        parameter.data = parameter.data.clone()
    return base
