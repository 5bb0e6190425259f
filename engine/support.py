"""Whether a family of models can be used: tried on a small model of it, before any weights.

"Any causal language model" is more than the library promises: some keep a recurrent state instead
of keys and values, some are not told the positions, some change the logits behind the head. So a
model of the same class with the same kinds of layers, but few and narrow ones, is run in both
ways: by the definition (the whole sequence again for every latent, no cache) and by coconut.py.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import copy
import inspect
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from coconut import Coconut
from utils import UserError

VOCABULARY, LATENT_ID, EOS_ID = 128, 100, 0
WINDOW = 4  # shorter than the rows below, so that a window of attention matters
NEW_TOKENS = 4
MAX_PARAMETERS = 300_000_000
TOLERANCE = 1e-3  # float32 rounds to about 1e-6 here, and a wrong mask or position shows as 0.1
INPUTS = {
    "inputs_embeds": "embeddings, which latents are",
    "past_key_values": "a cache of keys and values",
    "position_ids": "the tokens' positions, which padding moves",
}
# rows of a batch: q a token without a label, L a latent, r a token with a label
ROWS = ("qqqqqLLLrrrr", "qqqqqqqLrrrrrr", "qqqrr", "qqLLrrr")

# ------------------------------------------------------------------------------- configs


def causal_config(hf_config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the causal language model: that of the text tower where a model has several
    and the library has a causal class for it."""
    if not hf_config.sub_configs:
        return hf_config
    text = hf_config.get_text_config(decoder=True)
    if type(text) is type(hf_config) or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return hf_config
    text = copy.deepcopy(text)
    text.tie_word_embeddings = hf_config.tie_word_embeddings  # the whole model's rule
    return text


def causal_class(hf_config: PreTrainedConfig) -> type[PreTrainedModel]:
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return classes[type(hf_config)]


def max_positions(hf_config: PreTrainedConfig) -> float:
    """How many tokens a sequence may have; infinity where the config names no limit."""
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    limits = [getattr(hf_config, name, None) for name in names]
    return next((limit for limit in limits if limit), math.inf)


def _overrides(config: PreTrainedConfig) -> dict[int, dict]:
    """What single layers have otherwise than the config says for all of them."""
    if not config.is_heterogeneous:
        return {}
    return {int(layer): values for layer, values in config.to_dict()["per_layer_config"].items()}


def _num_layers(config: PreTrainedConfig, overrides: dict[int, dict]) -> int:
    """As many of the first layers as it takes to meet every kind of them, two at least."""
    total = config.num_hidden_layers
    lists = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == total]
    lists = [values for values in lists if list(values) != list(range(total))]  # names all layers
    kinds = [str([overrides.get(i)] + [values[i] for values in lists]) for i in range(total)]
    needed = max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))
    for name, value in vars(config).items():  # kinds of layers that are told by their numbers
        counts = re.search(r"first_k_dense|dense_layers$|every_n|layers?_(interval|step)$", name)
        if counts and isinstance(value, int) and 1 < value < total:
            needed = max(needed, value + 1)
    return min(total, needed)


def _small(name: str, value: int, old: PreTrainedConfig, new: dict[str, int]) -> int:
    """What a number of the config becomes in the small model."""
    upto = lambda limit: min(value, limit)
    rules = (
        (r"^(num_hidden_layers|n_layers?|num_layers)$", new["layers"]),
        (r"^((en|de)coder_layers|num_(en|de)coder_layers|num_layers_per_stack)$", new["layers"]),
        (r"^num_kv_shared_layers$", new["layers"] // 2),
        (r"(kv|key_value).*heads$", upto(new["kv_heads"])),
        (r"(^|_)heads?(_per_layer)?$", upto(new["heads"])),
        (r"vocab", VOCABULARY),
        (r"_token_id$", value % VOCABULARY),
        (r"experts?_per_tok(en)?$|top_?k$|moe_k$", upto(2)),
        (r"index_topk", upto(WINDOW)),
        (r"topk_group$", 1),
        (r"n_group$", upto(2)),
        (r"(?<!shared_)experts$|expert_num$", upto(4)),
        (r"window(_size)?$|chunk_size$|^local_attention$", upto(WINDOW)),
        (r"intermediate_size|ffn|_inner$|^dff$|^dim_ff$", upto(64)),
    )
    for pattern, small in rules:
        if re.search(pattern, name):
            return small
    is_width = re.search(r"(dim|width|size|model|embd)$", name)
    return new["hidden"] if is_width and value == old.hidden_size else value


def _shrink(name: str, value: Any, old: PreTrainedConfig, new: dict[str, int]) -> Any:
    """A value of the config in the small model, with all that is in it."""
    if isinstance(value, PreTrainedConfig):
        for inner, part in list(vars(value).items()):
            setattr(value, inner, _shrink(inner, part, old, new))
    elif isinstance(value, dict):
        return {key: _shrink(str(key), part, old, new) for key, part in value.items()}
    elif isinstance(value, list | tuple):
        value = value[: new["layers"]] if len(value) == old.num_hidden_layers else value
        return [_shrink(name, part, old, new) for part in value]
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return _small(name, value, old, new)
    return value


def small_config(hf_config: PreTrainedConfig, heads: int = 2) -> PreTrainedConfig:
    """A config of the same class and the same kinds of layers with few layers, heads, experts and
    tokens. The size of a head stays: rotations and their scaling are made for it."""
    small = copy.deepcopy(hf_config)
    overrides = _overrides(small)
    small.per_layer_config = None
    old = copy.deepcopy(small)
    kv_heads = getattr(old, "num_key_value_heads", None) or old.num_attention_heads
    head_size = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    shared = getattr(old, "num_kv_shared_layers", 0)  # at the end, of layers like those before
    new = {
        "layers": min(_num_layers(old, overrides) * (2 if shared else 1), old.num_hidden_layers),
        "heads": heads,
        "kv_heads": heads if kv_heads == old.num_attention_heads else heads // 2,
        "hidden": heads * head_size,
    }
    for name, value in list(vars(small).items()):
        setattr(small, name, _shrink(name, value, old, new))
    for name, value in (("head_dim", head_size), ("num_key_value_heads", new["kv_heads"])):
        if getattr(small, name, value) is None:  # some classes want it in so many words
            setattr(small, name, value)
    if overrides:
        kept = {layer: over for layer, over in overrides.items() if layer < new["layers"]}
        small.per_layer_config = {
            layer: _shrink("", over, old, new) for layer, over in kept.items()
        }
    return small


# ------------------------------------------------------------------------------- the definition


def small_model(hf_config: PreTrainedConfig) -> PreTrainedModel:
    """A causal language model of a small config with random weights, the same ones every time,
    spread so widely that whatever goes wrong shows in the logits."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(hf_config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its smallest model has {size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            if weight.ndim < 2:  # norms stay near 1, or 0 where the library adds the 1
                weight += 0.2 * noise
            else:
                weight.copy_(noise if id(weight) in tables else noise / weight.shape[-1] ** 0.5)
    return model


def make_rows() -> list[tuple[Tensor, Tensor]]:
    """The token ids and labels (T,) of ROWS."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for pattern in ROWS:
        ids = torch.randint(10, LATENT_ID, (len(pattern),), generator=generator)
        ids[[kind == "L" for kind in pattern]] = LATENT_ID
        rows.append((ids, torch.where(torch.tensor([k == "r" for k in pattern]), ids, -100)))
    return rows


def naive_logits(base: PreTrainedModel, ids: Tensor, num_prompt: int) -> Tensor:
    """The definition for one row (T,): its logits (T, V). Latents are in the first num_prompt."""
    embeds = list(base.get_input_embeddings()(ids))
    for position in (ids[:num_prompt] == LATENT_ID).nonzero().flatten().tolist():
        sequence = torch.stack(embeds[:position])[None]
        hidden = base.base_model(inputs_embeds=sequence, use_cache=False).last_hidden_state
        embeds[position] = hidden[0, -1]
    return base(inputs_embeds=torch.stack(embeds)[None], use_cache=False).logits[0]


def make_batch(rows: list[tuple[Tensor, Tensor]], left_only: bool) -> dict[str, Tensor]:
    """The rows (B, T) with their first latents in one column, or with their ends in one."""
    first = [(ids == LATENT_ID).nonzero()[:1].sum().item() or 1 for ids, _ in rows]
    left = [max(first) - at for at in first]
    width = max(at + len(ids) for at, (ids, _) in zip(left, rows))
    if left_only:
        width = max(len(ids) for ids, _ in rows)
        left = [width - len(ids) for ids, _ in rows]
    pad = lambda x, at, value: F.pad(x, (at, width - at - len(x)), value=value)
    mask = torch.stack([pad(torch.ones_like(ids), at, 0) for at, (ids, _) in zip(left, rows)])
    return {
        "input_ids": torch.stack([pad(ids, at, 1) for at, (ids, _) in zip(left, rows)]),
        "labels": torch.stack([pad(labels, at, -100) for at, (_, labels) in zip(left, rows)]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def _difference(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference against the largest value; nan counts as infinite."""
    error = ((actual - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()
    return error if error == error else float("inf")


def _gradients(base: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    base.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}


def differences(base: PreTrainedModel) -> dict[str, float]:
    """How far coconut.py is from the definition on a small model, relative to the largest value."""
    rows = make_rows()
    wanted = [naive_logits(base, ids, len(ids)) for ids, _ in rows]
    losses = [F.cross_entropy(w[:-1], r[1][1:], reduction="sum") for w, r in zip(wanted, rows)]
    num_labels = sum((labels != -100).sum() for _, labels in rows)
    loss = torch.stack(losses).sum() / num_labels
    wanted_grads = _gradients(base, loss)
    model = Coconut(base, latent_token_id=LATENT_ID, eos_token_id=EOS_ID)
    batch = make_batch(rows, left_only=False)
    output = model(**batch, return_logits=True)
    logits = torch.cat([row[mask] for row, mask in zip(output.logits, batch["attention_mask"] > 0)])
    grads = _gradients(base, output.loss)
    largest = max(grad.abs().max() for grad in wanted_grads.values())
    apart = [
        (grads.get(name, torch.zeros(())) - grad).abs().max() / largest
        for name, grad in wanted_grads.items()
    ]
    return {
        "logits": _difference(logits.detach(), torch.cat(wanted).detach()),
        "loss": _difference(output.loss.detach(), loss.detach()),
        "gradients": torch.stack(apart).max().nan_to_num(float("inf")).item(),
        "generation": _generation_difference(model, rows),
    }


@torch.no_grad()
def _generation_difference(model: Coconut, rows: list[tuple[Tensor, Tensor]]) -> float:
    """How far below the best logit of the definition a generated token is, at most."""
    prompts = [(ids[labels == -100], labels[labels == -100]) for ids, labels in rows]
    batch = make_batch(prompts, left_only=True)
    new = model.generate(batch["input_ids"], batch["attention_mask"], NEW_TOKENS)
    gaps = []
    for (ids, _), tokens in zip(prompts, new):
        logits = naive_logits(model.base_causallm, torch.cat([ids, tokens]), len(ids))
        logits = logits[len(ids) - 1 : -1]
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        gaps.append(_difference(chosen, logits.max(1).values))
    return max(gaps)


# ------------------------------------------------------------------------------- the check


def _what_layers_keep(hf_config: PreTrainedConfig) -> str | None:
    """Why a cache of keys and values is not all that the layers need, None where it is."""
    recurrent = causal_class(hf_config)._is_stateful
    kinds = set()
    if not recurrent:
        kinds = {type(layer).__name__ for layer in DynamicCache(config=hf_config).layers}
    if recurrent or any(kind.startswith("Linear") for kind in kinds):
        return (
            "its layers keep a recurrent state (linear attention, state space, convolution) "
            "instead of keys and values"
        )
    more = sorted(kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"})
    return (
        f"its layers keep other things than keys and values ({', '.join(more)})" if more else None
    )


def _find_obstacle(hf_config: PreTrainedConfig) -> str | None:
    """Why Coconut cannot be had on models of this config, in words; None where it can."""
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is not a causal language model"
    if not hasattr(hf_config, "vocab_size") or not hasattr(hf_config, "num_hidden_layers"):
        return "the library has no causal class for its text model alone"
    if getattr(hf_config, "hidden_size_per_layer_input", 0):
        return "its layers look up every token, and a latent is none (hidden_size_per_layer_input)"
    told = None
    for heads in (2, 4):  # some classes take multiples of four only
        try:
            if kept := _what_layers_keep(hf_config):
                return kept
            base = small_model(small_config(hf_config, heads))
            if base.base_model is base:
                return "its class does not name the decoder below the head (base_model)"
            apart = differences(base)
        except Exception as error:  # noqa: BLE001 whatever may be wrong in a model's code
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            told = kind + " ".join(str(error).split())[:160]
            continue
        wrong = [f"{name} by {value:.1%}" for name, value in apart.items() if value > TOLERANCE]
        if not wrong:
            return None
        told = f"passes over a cache differ from a plain forward in {', '.join(wrong)}"
        break
    taken = inspect.signature(causal_class(hf_config).forward).parameters
    missing = [meaning for name, meaning in INPUTS.items() if name not in taken]
    missing += ["the tokens' positions (ALiBi)"] if getattr(hf_config, "alibi", False) else []
    return f"its class is not given {missing[0]}; {told}" if missing else told


_obstacles: dict[str, str | None] = {}  # of the configs seen so far


def check_support(hf_config: PreTrainedConfig, model_id: str) -> None:
    """Raise UserError, with the reason, where Coconut cannot be had on models of this config."""
    key = f"{type(hf_config).__name__} {hf_config.to_json_string()}"
    if key not in _obstacles:
        _obstacles[key] = _find_obstacle(hf_config)
    if _obstacles[key] is not None:
        raise UserError(
            f"model_id: {model_id} ({hf_config.model_type}) cannot be used: {_obstacles[key]}"
        )
