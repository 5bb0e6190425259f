"""The model of Coconut (Chain of Continuous Thought, Hao et al. 2024, arXiv 2412.06769).

At a latent position the input embedding is the last hidden state (after the final norm) of the
position before it. A batch therefore runs in K + 1 passes: the prefix, then one latent column at
a time over a KV cache, then the last latent together with the rest.

Shapes: B rows, T columns, D hidden size, V vocabulary, K latent columns, N labelled tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_masks_for_generate

from layers import (
    Passes,
    PastKeysValues,
    checkpoint_blocks,
    decoder_blocks,
    replace_layers,
    summed_cross_entropy,
)

START_LATENT, LATENT, END_LATENT = MARKERS = "<|start-latent|>", "<|latent|>", "<|end-latent|>"

MASK_ALIGNMENT = 16  # elements; other strides make the attention kernels of CUDA copy the mask
NO_TOKEN = -1

EditLatent = Callable[[int, Tensor], Tensor]
# of the logits (R, V) of completions (R,) and how many tokens these have: the next ones (R,)
ChooseToken = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class CoconutOutput:
    loss: Tensor | None  # scalar
    latents: Tensor  # (B, K, D) hidden states fed back; rows without a latent there: unused
    prefix_hidden: Tensor | None  # output of the first of several passes; None: a single pass
    logits: Tensor | None  # (B, T, V), only where asked for


class Coconut(nn.Module):
    """Continuous thoughts over any Hugging Face causal language model.

    latent_token_id is None where nothing is fed back (cot, no_cot, no_thoughts, pauses): that is
    the case K = 0, a single pass. Parameters are named base_causallm.*, as in the ancestor's
    coconut.py.
    """

    def __init__(
        self,
        base_causallm: PreTrainedModel,
        latent_token_id: int | None = None,
        start_latent_id: int | None = None,
        end_latent_id: int | None = None,
        eos_token_id: int | None = None,
        *,
        fast_layers: bool = True,
    ):
        """The first five are the ancestor's. eos_token_id: what ends a completion; None: only its
        limit. fast_layers: whether layers.py replaces the forward of the parts that it knows."""
        super().__init__()
        self.base_causallm: PreTrainedModel = base_causallm
        self.passes = replace_layers(base_causallm) if fast_layers else Passes()
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(base_causallm.config, key, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{type(base_causallm).__name__}: its head changes the logits ({key}); "
                    "Coconut computes logits as head(hidden state) and would be wrong"
                )

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T), 1: token, 0: padding
        position_ids: Tensor,  # (B, T)
        labels: Tensor | None = None,  # (B, T), -100: no label; shifted in here
        *,
        latent_columns: tuple[int, int] | None = None,
        label_index: Tensor | None = None,
        num_items_in_batch: int | None = None,
        return_logits: bool = False,
        edit_latent: EditLatent | None = None,
    ) -> CoconutOutput:
        """Run all passes; the loss is the mean cross-entropy over the labelled tokens.

        latent_columns: first column with a latent and the one after the last, of all rows.
        label_index (N,): flat indices of the positions whose next token has a label.
        Both are the collator's; without them they are read from the tensors (two host syncs).
        num_items_in_batch: divide the summed loss by this number instead of N.
        edit_latent: replaces the states (B, D) that latent column k (from 0) feeds back.
        """
        if latent_columns is None:
            latent_columns = self.find_latent_columns(input_ids)
        masks = self.attention_masks(attention_mask, position_ids)
        hidden, latents, _ = self._run_passes(
            input_ids, position_ids, masks, latent_columns, edit_latent
        )
        loss = None
        if labels is not None:
            if label_index is None:
                label_index = F.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero().squeeze(1)
            labels = labels.flatten().index_select(0, label_index + 1)  # (N,)
            flat = _join(hidden).flatten(0, 1)  # (B * T, D)
            loss = self._loss(flat.index_select(0, label_index), labels, num_items_in_batch)
        return CoconutOutput(
            loss=loss,
            latents=latents,
            prefix_hidden=hidden[0] if len(hidden) > 1 else None,
            logits=self.head(_join(hidden)) if return_logits else None,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T), left-padded: every row ends in the last column
        max_new_tokens: int,
        *,
        latent_columns: tuple[int, int] | None = None,
        edit_latent: EditLatent | None = None,
        num_samples: int = 1,
        choose: ChooseToken | None = None,
    ) -> list[Tensor]:
        """Completions, one tensor of new tokens each, eos included where it came: the greedy one of
        every row or, with choose, num_samples of every row, those of a row together.

        A finished one leaves the batch at once, so it costs nothing afterwards.
        """
        if latent_columns is None:
            latent_columns = self.find_latent_columns(input_ids)
        last, position_ids, masks, cache = self._run_prompt(
            input_ids, attention_mask, max_new_tokens, latent_columns, edit_latent
        )
        num_rows, length = input_ids.shape
        rows = torch.arange(num_rows * num_samples, device=input_ids.device)  # still running
        if num_samples > 1:  # the prompt's passes serve all samples of a row
            of_row = rows // num_samples
            last = last[of_row]
            position_ids, masks = _take_rows(of_row, position_ids, masks, cache)
        new = input_ids.new_zeros(len(rows), max_new_tokens)
        lengths = [max_new_tokens] * len(rows)
        for step in range(max_new_tokens):
            logits = self.head(last)  # (rows, V)
            token = logits.argmax(-1) if choose is None else choose(logits, rows, step)
            new[rows, step] = token
            going = token != (NO_TOKEN if self.eos_token_id is None else self.eos_token_id)
            if not bool(going.all()):
                for row in rows[~going].tolist():
                    lengths[row] = step + 1
                keep = going.nonzero().squeeze(1)
                rows, token = rows[keep], token[keep]
                position_ids, masks = _take_rows(keep, position_ids, masks, cache)
            if len(rows) == 0 or step + 1 == max_new_tokens:
                break
            embeds = self.base_causallm.get_input_embeddings()(token)[:, None]
            at = slice(length + step, length + step + 1)
            last, cache = self.run_pass(embeds, position_ids[:, at], masks, at, cache)
            last = last[:, -1]
        return [tokens[:length] for tokens, length in zip(new, lengths)]

    def _run_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        latent_columns: tuple[int, int],
        edit_latent: EditLatent | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], PastKeysValues]:
        """The passes of the prompts: their last states (B, D) and cache; the positions (B, columns)
        and masks of all columns, those to come included."""
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("generate: rows must be padded on the left, up to the last column")
        attention_mask = F.pad(attention_mask, (0, max_new_tokens), value=1)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        masks = self.attention_masks(attention_mask, position_ids)
        own = position_ids[:, : input_ids.shape[1]]
        hidden, _, cache = self._run_passes(input_ids, own, masks, latent_columns, edit_latent)
        return hidden[-1][:, -1], position_ids, masks, cache

    def blocks(self) -> list[nn.Module]:
        """The decoder blocks: the units to shard."""
        return decoder_blocks(self.base_causallm, self)

    def checkpoint_activations(self, share: float = 1.0) -> None:
        """Let the backward compute the first blocks again, this share of all, from their inputs,
        but for passes of a single column. The library's own switch would drop the cache."""
        settings = self.base_causallm.config.to_dict().items()
        dropout = any("drop" in name and value for name, value in settings)
        dropout |= any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules())  # adapters'
        blocks = self.blocks()
        checkpoint_blocks(blocks[: math.ceil(share * len(blocks))], dropout)

    def find_latent_columns(self, input_ids: Tensor) -> tuple[int, int]:
        """First column with a latent token and the one after the last; (0, 0) without any."""
        if self.latent_token_id is None:
            return 0, 0
        columns = (input_ids == self.latent_token_id).any(0).nonzero().flatten().tolist()
        return (columns[0], columns[-1] + 1) if columns else (0, 0)

    def attention_masks(self, attention_mask: Tensor, position_ids: Tensor) -> dict:
        """The causal masks (B, 1, T, T) of all passes, made once, by kind of layer.

        The library would make them anew in every pass, with a host sync each time; and what is
        added to the scores, which attention would make of them, in every layer.
        """
        config, device = self.base_causallm.config, attention_mask.device
        dtype = autocast_dtype(device) or self.base_causallm.dtype
        embeds = torch.empty(*attention_mask.shape, 0, dtype=dtype, device=device)
        arguments = config, embeds, attention_mask, None, position_ids
        # blocks that are none (-1) keep the library from leaving out masks that look trivial now
        blocks = torch.full_like(attention_mask, -1)
        masks = create_masks_for_generate(*arguments, block_sequence_ids=blocks)
        masks = masks if isinstance(masks, dict) else {"all": masks}
        itself = torch.eye(attention_mask.shape[1], dtype=torch.bool, device=device)
        for name, mask in masks.items():
            if mask.dtype is torch.bool:  # padding sees itself: nothing seen is NaN in some kernels
                masks[name] = _added(mask | itself, dtype)
        return masks

    def _run_passes(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        masks: dict[str, Tensor],
        latent_columns: tuple[int, int],
        edit_latent: EditLatent | None,
    ) -> tuple[list[Tensor], Tensor, PastKeysValues]:
        """Every column once, in K + 1 passes: their outputs [(B, columns, D)], the states fed back
        (B, K, D), the cache of all columns."""
        first, stop = latent_columns
        if stop and first == 0:
            raise ValueError("a latent in the first column has no hidden state before it")
        # a pass ends before each latent column; the last one runs the last latent and the rest
        starts = [0, *range(first, stop)]
        ends = [*range(first, stop), input_ids.shape[1]]
        widths = [end - start for start, end in zip(starts, ends)]
        embeds = self.base_causallm.get_input_embeddings()(input_ids)  # (B, T, D)
        parts = embeds.split(widths, dim=1) if stop else [embeds]
        if torch.is_grad_enabled():  # else a forward that still waits for its backward may go on
            self.passes.start(several=stop > 0)
        hidden: list[Tensor] = []
        latents: list[Tensor] = []
        cache = PastKeysValues()
        for start, end, inputs in zip(starts, ends, parts):  # inputs: (B, end - start, D)
            if hidden:
                state = hidden[-1][:, -1]  # (B, D)
                latents.append(state if edit_latent is None else edit_latent(len(latents), state))
                is_latent: Any = input_ids[:, start] == self.latent_token_id  # (B,)
                inputs = _feed_back(inputs, latents[-1], is_latent)
            output, cache = self.run_pass(
                inputs, position_ids[:, start:end], masks, slice(start, end), cache
            )
            hidden.append(output)
        none = len(embeds), 0, embeds.shape[2]  # a tensor of its own: of a view FSDP2 warns
        return hidden, torch.stack(latents, 1) if latents else hidden[0].new_empty(none), cache

    def run_pass(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        masks: dict[str, Tensor],
        at: slice,
        cache: PastKeysValues,
    ) -> tuple[Tensor, PastKeysValues]:
        """The columns `at` over a cache of all before: (B, columns, D) and the grown cache."""
        cache = type(cache)(cache)
        seen = {name: mask[:, :, at, : at.stop] for name, mask in masks.items()}
        output = self.base_causallm.base_model(
            inputs_embeds=embeds,
            attention_mask=seen.get("all", seen),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, cache

    def head(self, hidden: Tensor) -> Tensor:
        return self.base_causallm.get_output_embeddings()(hidden)

    def _loss(self, hidden: Tensor, labels: Tensor, num_items: int | None) -> Tensor:
        """Summed cross-entropy of (N, D) against (N,), divided by num_items or N."""
        total = self.summed_loss(hidden, labels)
        return total / max(len(labels) if num_items is None else num_items, 1)

    def summed_loss(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The cross-entropy of what the head reads in (N, D) against (N,), summed; weights (N,): of
        each label in the sum."""
        head: Any = self.base_causallm.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if dtype := autocast_dtype(hidden.device):  # which sees nothing of a sum over chunks
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return summed_cross_entropy(hidden, weight, bias, labels, weights)


def _take_rows(
    rows: Tensor, position_ids: Tensor, masks: dict[str, Tensor], cache: PastKeysValues
) -> tuple[Tensor, dict[str, Tensor]]:
    """The positions and masks of these rows of the batch, which the cache is cut to as well."""
    cache.keep_rows(rows)
    return position_ids[rows], {name: mask[rows] for name, mask in masks.items()}


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores where a mask (B, 1, T, T) is true, 0, and elsewhere, -inf; its
    rows begin at multiples of MASK_ALIGNMENT in memory."""
    *sizes, columns = mask.shape
    room = (*sizes, columns + -columns % MASK_ALIGNMENT)
    added = torch.full(room, -torch.inf, dtype=dtype, device=mask.device)
    return added[..., :columns].masked_fill_(mask, 0)


def _join(columns: list[Tensor]) -> Tensor:
    """(B, columns, D) of all passes side by side, of a single one without a copy."""
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _feed_back(embeds: Tensor, state: Tensor, is_latent: Tensor) -> Tensor:
    """Put the state (B, D) into the first column of embeds (B, columns, D); rows whose token there
    is no latent (B,) keep its own embedding."""
    column = torch.where(is_latent[:, None], state, embeds[:, 0])[:, None]  # (B, 1, D)
    return column if embeds.shape[1] == 1 else torch.cat([column, embeds[:, 1:]], dim=1)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None where it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


# ------------------------------------------------------------------------------- latent tokens


def embedding_table(base_causallm: PreTrainedModel) -> Tensor:
    """The input embeddings (V, D)."""
    embeddings: Any = base_causallm.get_input_embeddings()
    return embeddings.weight


@torch.no_grad()
def token_embeddings(base_causallm: PreTrainedModel, ids: list[int]) -> Tensor:
    """What tokens read (N, D): their rows of the input embeddings, which some families scale."""
    embeddings: Any = base_causallm.get_input_embeddings()
    return embeddings(torch.tensor(ids, device=embeddings.weight.device))


def add_latent_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Add the three markers as special tokens, so that they vanish from decoded text.

    Returns the ids of (start, latent, end). They are added in the ancestor's order (start, end,
    latent), so that its checkpoints fit.
    """
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [START_LATENT, END_LATENT, LATENT]},
        replace_extra_special_tokens=False,
    )
    ids: Any = tokenizer.convert_tokens_to_ids([START_LATENT, LATENT, END_LATENT])
    return tuple(ids)


def single_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a token. Raises ValueError where the tokenizer splits the text, or does not know
    it."""
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) > 1:  # some tokenizers put a blank before a whole text
        encoding = tokenizer("\n" + token, add_special_tokens=False)
        ids = encoding["input_ids"][encoding.char_to_token(1) :]
    unknown = ids == [tokenizer.unk_token_id] and token != tokenizer.unk_token
    if len(ids) != 1 or unknown:
        seen = f"does not know {token!r}" if unknown else f"makes {len(ids)} tokens of {token!r}"
        raise ValueError(
            f"marker_init_token: this tokenizer {seen}; set marker_init_token to a text that is a "
            "single token"
        )
    return ids[0]


@torch.no_grad()
def init_latent_rows(base_causallm: PreTrainedModel, ids: tuple[int, ...], init_id: int) -> None:
    """Start the rows `ids` as copies of row init_id, on the input and the output side.

    The vocabulary grows where an id has no row, and is never shrunk (Qwen3's spare rows stay).
    """
    if max(ids) >= len(embedding_table(base_causallm)):
        base_causallm.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    head: Any = base_causallm.get_output_embeddings()
    for table in (embedding_table(base_causallm), head.weight, head.bias):
        if table is not None:
            table[list(ids)] = table[init_id].clone()
