"""LoRA: low-rank adapters trained over frozen weights (Hu et al. 2021, arXiv 2106.09685), by peft.

Every linear layer W of the decoder blocks computes W x + (alpha / r) B A x, of which A (r, in) and
B (out, r) are trained. Of the embeddings, and of a head that is not tied to them, the rows of the
latent markers are trained. All of them have the type of the other weights, so that the optimizer's
rule is the same: bfloat16 is updated as float32 (engine/optimizer.py).

A checkpoint holds them in peft's files, which name the base: model_id, or the checkpoint that the
training began with.
"""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.weights import empty_model
from layers import decoder_blocks
from loader import own_config
from utils import Config, UserError, derive_seed

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX, NAME = "base_model.model.", "default"  # what peft puts before names, and into them
ROWS, SAVED_ROWS = "marker_rows", "token_adapter.trainable_tokens_delta"
# what is read of peft's config
READ = {"r": int, "lora_alpha": int | float, "target_modules": list, "base_model_name_or_path": str}
# what peft's adapters may also be and these are not
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run, and where the weights below them come from."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # endings of the names of the layers that have one
    token_ids: tuple[int, ...]  # rows of the vocabulary that are trained
    base: str  # a model's name, or a path
    revision: str | None  # of a model of the Hub
    base_path: Path | None  # the checkpoint that is the base; None: model_id
    folder: Path | None = None  # that holds their weights; None: they are new
    knows_markers: bool = False  # whether the markers' rows are among these weights


class MarkerRows(nn.Module):
    """An embedding or a head of which some rows are trained while the others are frozen."""

    ids: Tensor

    def __init__(self, base_layer: nn.Module, ids: Tensor, rows: nn.Parameter):
        super().__init__()
        self.base_layer = base_layer
        self.marker_rows = rows  # (rows, D)
        self.register_buffer("ids", ids, persistent=False)

    @property
    def weight(self) -> Tensor:
        """(V, D), with the trained rows in their places."""
        frozen: Any = self.base_layer.weight
        return frozen.index_copy(0, self.ids, self.marker_rows.to(frozen.dtype))

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base_layer, nn.Linear):
            return F.linear(x, self.weight, self.base_layer.bias)
        found = x.unsqueeze(-1) == self.ids  # (..., rows)
        rows = F.embedding(found.int().argmax(-1), self.marker_rows)
        if hasattr(self.base_layer, "embed_scale"):  # Gemma's
            rows = rows * torch.as_tensor(self.base_layer.embed_scale).to(rows.dtype)
        return torch.where(found.any(-1, keepdim=True), rows, self.base_layer(x))


# ------------------------------------------------------------------------------- find and check


def find_adapters(
    config: Config, source: Path | None, hf_config: PreTrainedConfig, token_ids: tuple[int, ...]
) -> Adapters | None:
    """The adapters of a run, None where all weights are trained or the evaluated ones are whole.

    source: the checkpoint that the run starts from. Raises UserError where its adapters are not
    those of the config, or not for this model, and where the config's match no layer.
    """
    saved = None if source is None else _read_config(source)
    if saved is not None:
        assert source is not None
        return _saved_adapters(config, source, saved, hf_config, token_ids)
    if config.lora_r is None or config.only_eval:
        return None
    model: Any = empty_model(hf_config)
    adapters = new_adapters(config, model, token_ids, source)
    with warnings.catch_warnings(action="ignore"):
        try:  # peft takes names of parts for those of experts' weights that are in one piece
            add_adapters(model, adapters, seed=0)
        except ValueError as error:
            raise UserError(f"lora_targets: {str(error).splitlines()[0]}") from None
    if model.peft_config[NAME].target_parameters:
        raise UserError(
            f"lora_targets: {', '.join(adapters.targets)}: some are of {hf_config.model_type}'s "
            "experts, whose weights are in one piece; name layers of attention only"
        )
    return adapters


def new_adapters(
    config: Config, model: PreTrainedModel, token_ids: tuple[int, ...], source: Path | None = None
) -> Adapters:
    """Those of the config over the weights of model_id, or of a checkpoint. Raises UserError."""
    assert config.lora_r is not None
    return Adapters(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=target_endings(model, config.lora_targets),
        token_ids=token_ids,
        base=_absolute(config.model_id if source is None else str(source)),
        revision=config.model_revision if source is None else None,
        base_path=source,
    )


def _saved_adapters(
    config: Config,
    folder: Path,
    saved: dict,
    hf_config: PreTrainedConfig,
    token_ids: tuple[int, ...],
) -> Adapters:
    base_path = _check_base(config, folder, saved)
    adapters = Adapters(
        r=saved["r"],
        alpha=saved["lora_alpha"],
        dropout=config.lora_dropout,
        targets=tuple(sorted(saved["target_modules"])),
        token_ids=token_ids,
        base=saved["base_model_name_or_path"],
        revision=saved.get("revision"),
        base_path=base_path,
        folder=folder,
    )
    model = empty_model(hf_config)
    if not config.only_eval:
        _check_same_adapters(config, adapters, model)
    indices = saved.get("trainable_token_indices") or {}  # a list is for the embeddings alone
    known = {tuple(ids) for ids in (indices.values() if isinstance(indices, dict) else [indices])}
    if known and not token_ids:
        raise UserError(
            f"{folder}: the adapters of a coconut model cannot start a {config.method.value} run; "
            "give those of a run without latents"
        )
    if known - {token_ids}:
        raise UserError(
            f"{folder}: trains the rows {sorted(known)[0]} of the vocabulary, but the latent "
            f"markers of this tokenizer are {token_ids}; adapters of another model"
        )
    adapters = Adapters(**{**vars(adapters), "knows_markers": bool(known)})
    add_adapters(model, adapters, seed=0)
    _matching(model, adapters)
    return adapters


def target_endings(model: PreTrainedModel, given: list | None) -> tuple[str, ...]:
    """The endings of the names of all linear layers in the decoder blocks, or the given ones.
    Raises UserError where one of these ends no such name."""
    if not model._no_split_modules:
        raise UserError(f"lora_r: {type(model).__name__} does not name its blocks; train it whole")
    inside = {layer for block in decoder_blocks(model, model) for layer in block.modules()}
    linear = [
        name
        for name, layer in model.named_modules()
        if layer in inside and isinstance(layer, nn.Linear | Conv1D)
        if not type(layer).__name__.endswith("Router")  # phimoe's, llama4's: returns a choice
    ]
    endings = sorted({name.rpartition(".")[2] for name in linear})
    if given is None:
        return tuple(endings)
    wrong = [end for end in given if not any(f".{name}".endswith(f".{end}") for name in linear)]
    if wrong:
        raise UserError(
            f"lora_targets: no linear layer of the blocks has a name that ends with "
            f"{', '.join(wrong)}; they end with {', '.join(endings)}"
        )
    return tuple(sorted(given))


def _read_config(folder: Path) -> dict | None:
    """What the adapters in a folder say of themselves, None where it holds none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text())
        whole = all(isinstance(saved[key], kind) for key, kind in READ.items())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no config of LoRA adapters ({error!r})") from None
    other = [f"{key} {saved[key]}" for key, own in PLAIN.items() if saved.get(key, own) != own]
    if other or not whole:
        raise UserError(
            f"{path}: plain LoRA adapters with a list of target_modules and a base are read, "
            f"these are not ({', '.join(other) or 'a value of another type'}); merge them with peft"
        )
    return saved


def _check_base(config: Config, folder: Path, saved: dict) -> Path | None:
    """The checkpoint that is the adapters' base, None where it is model_id. Raises UserError."""
    base, revision = saved["base_model_name_or_path"], saved.get("revision")
    model_id = _absolute(config.model_id)
    if _absolute(base) == model_id:
        if revision != config.model_revision:
            raise UserError(
                f"{folder}: holds adapters of revision {revision} of {base}, but model_revision "
                f"is {config.model_revision}"
            )
        return None
    own = own_config(folder)
    of_training = base if own is None else own.model_id
    if _absolute(of_training) != model_id:
        raise UserError(
            f"{folder}: holds adapters of {of_training}, but model_id is {config.model_id}; set "
            f"model_id to theirs (where it has moved, in {CONFIG_FILE} and config.yaml too)"
        )
    if not Path(base).exists():
        raise UserError(
            f"{folder}: its adapters are for the weights in {base}, which are not there; bring "
            f"them back, or name their new place in {CONFIG_FILE}"
        )
    return Path(base)


def _absolute(name: str) -> str:
    """The whole path of a folder or file; the name of a model of the Hub as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _check_same_adapters(config: Config, adapters: Adapters, model: PreTrainedModel) -> None:
    if config.lora_r is None:
        raise UserError(
            f"{adapters.folder}: holds adapters; set lora_r={adapters.r} to train them, or merge "
            "them to train all weights (python -m analysis export)"
        )
    pairs = {
        "lora_r": (config.lora_r, adapters.r),
        "lora_alpha": (config.lora_alpha, adapters.alpha),
        "lora_targets": (target_endings(model, config.lora_targets), adapters.targets),
    }
    listed = lambda value: ", ".join(value) if isinstance(value, tuple) else value
    problems = [
        f"{key}: {listed(ours)}, but the adapters in {adapters.folder} have {listed(theirs)}"
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if problems:
        raise UserError(*problems)


# ------------------------------------------------------------------------------- add, load, save


def add_adapters(base: PreTrainedModel, adapters: Adapters, seed: int) -> None:
    """Put new adapters into a model, in place, and freeze all of it but them and the markers' rows.
    They compute nothing at first: B is 0."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 slow, and few need it

    dtype, device = base.dtype, base.device
    table: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    endings = tuple(f".{ending}" for ending in adapters.targets)
    targets = [m for name, m in base.named_modules() if f".{name}".endswith(endings)]
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapters.base,
        revision=adapters.revision,
        r=adapters.r,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]
        lora_dropout=adapters.dropout,
        target_modules=list(adapters.targets),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets),
    )
    inject_adapter_in_model(peft_config, base, low_cpu_mem_usage=True)  # without numbers so far
    torch.manual_seed(derive_seed(seed, "adapters"))
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            weight = torch.zeros(layer.weight.shape, dtype=dtype, device=device)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as peft does
            layer.weight = nn.Parameter(weight)
    if adapters.token_ids:
        indices = {}
        ids = torch.tensor(adapters.token_ids, device=device)
        for name, layer in _tables(base):
            tied = layer is head and head.weight is table.weight
            if not tied:
                rows = nn.Parameter(layer.weight.detach()[ids])
                indices[name] = list(adapters.token_ids)
            base.set_submodule(name, MarkerRows(layer, ids, rows))
        peft_config.trainable_token_indices = indices


def _tables(base: PreTrainedModel) -> list[tuple[str, Any]]:
    """The embeddings and the head, by their names."""
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    names = {module: name for name, module in base.named_modules()}
    return [(names[layer], layer) for layer in layers]


def trained_names(base: nn.Module) -> dict[str, str]:
    """What is trained of a model with adapters, by the names in peft's file."""
    names = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    saved = [name.replace(f".{NAME}.", ".").replace(ROWS, SAVED_ROWS) for name in names]
    return {PREFIX + its: name for its, name in zip(saved, names)}


def load_adapters(base: PreTrainedModel, adapters: Adapters) -> None:
    """Fill a model's adapters with those of their folder. Raises UserError."""
    for parameter, tensor in _matching(base, adapters):
        parameter.data.copy_(tensor)


def _matching(base: PreTrainedModel, adapters: Adapters) -> list[tuple[Tensor, Tensor]]:
    """The parameters of a model and their saved tensors. Raises UserError where they differ."""
    assert adapters.folder is not None
    path = adapters.folder / WEIGHTS_FILE
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a file of adapters: {str(error).splitlines()[0]}") from None
    wanted = {name: base.get_parameter(own) for name, own in trained_names(base).items()}
    if not adapters.knows_markers:
        wanted = {name: p for name, p in wanted.items() if not name.endswith(SAVED_ROWS)}
    problems = [f"{name} is missing" for name in wanted.keys() - saved.keys()]
    problems += [f"{name} is unexpected" for name in saved.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(saved[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & saved.keys()
        if saved[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(
            f"{path}: adapters of another model than {base.config.model_type} of this size: "
            f"{min(problems)}{more}"
        )
    return [(wanted[name], saved[name]) for name in wanted]


def save_adapters(base: Any, tensors: dict[str, Any], folder: Path) -> None:
    """Write the trained tensors of a model's state dict, as peft and load_adapters read them. No
    config.json: beside one the library would look for whole weights."""
    named = {name: tensors[own].contiguous() for name, own in trained_names(base).items()}
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    base.peft_config[NAME].save_pretrained(folder)


# ------------------------------------------------------------------------------- merge


@torch.no_grad()
def merge_adapters(base: Any) -> None:
    """Add the adapters to the weights, rounded once, and take them out: base, in place, is then a
    model of its library's class and names, which engine.weights.save_base writes."""
    for name, layer in list(base.named_modules()):
        if isinstance(layer, MarkerRows):
            weight: Any = layer.base_layer.weight
            weight[layer.ids] = layer.marker_rows.to(weight.dtype)
        elif hasattr(layer, "lora_A"):
            weight = layer.base_layer.weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            low, high = (part[NAME].weight.to(wide) for part in (layer.lora_A, layer.lora_B))
            change = layer.scaling[NAME] * (high @ low)
            transposed = isinstance(layer.base_layer, Conv1D)
            weight.copy_(weight.to(wide) + (change.T if transposed else change))
        else:
            continue
        base.set_submodule(name, layer.base_layer)
    base.requires_grad_(True)
    del base.peft_config
