"""Many continuations of the same prompts, computed together over one cache of what they share.

A branch goes on from a prompt by columns that it is given (tokens, vectors, its own last hidden
state) and then writes greedily. The branches of a prompt are columns of its row: a pass runs the
next columns of every branch that still goes on, and the mask lets each see the prompt and itself.
So nothing that branches share is computed, or kept, twice.

Shapes: B prompts, C columns of a prefix, M branches of each prompt, G given columns, V of them
that may read other things than a token, D hidden size, Q columns of a pass, L columns of branches
so far.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from coconut import NO_TOKEN, Coconut
from engine.support import small_config, small_model
from layers import PastKeysValues
from utils import UserError

TOKEN, VECTOR, STATE = 0, 1, 2  # what a given column reads: its token, a vector, the last state
NOBODY = -1  # owns the columns that fill up a pass


@dataclass(frozen=True)
class Prefix:
    """Prompts that have been run, padded on the left, with room for what branches add."""

    cache: PastKeysValues
    hidden: Tensor  # (B, C, D) outputs of all columns
    masks: dict[str, Tensor]  # (B, 1, T, T) of all columns, those of one branch to come included
    position_ids: Tensor  # (B, T)


@torch.no_grad()
def run_prefix(
    model: Coconut,
    input_ids: Tensor,  # (B, T), left-padded
    attention_mask: Tensor,  # (B, T)
    room: int,
    vectors: Tensor | None = None,
) -> Prefix:
    """Run prompts in one pass, and behind them columns that read vectors (B, columns, D).

    room: how many columns a branch may add, wherever it starts."""
    embeds = model.base_causallm.get_input_embeddings()(input_ids)
    if vectors is not None:
        embeds = torch.cat([embeds, vectors.to(embeds.dtype)], dim=1)
    columns = embeds.shape[1]
    more = columns - input_ids.shape[1] + room
    attention_mask = F.pad(attention_mask, (0, more), value=1)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    masks = model.attention_masks(attention_mask, position_ids)
    at = slice(0, columns)
    hidden, cache = model.run_pass(embeds, position_ids[:, at], masks, at, PastKeysValues())
    return Prefix(cache, hidden, masks, position_ids)


@dataclass(frozen=True)
class Branches:
    """What the branches of B prompts are given: of ids, `length` columns each; what the first V
    columns read is said by `reads`, the others read their tokens. They go on from the prefix
    without its last `without` columns."""

    ids: Tensor  # (B, M, G)
    length: Tensor  # (B, M) at most G
    reads: Tensor  # (B, M, V) TOKEN, VECTOR or STATE
    vectors: Tensor  # (B, M, V, D) read where reads is VECTOR
    without: Tensor  # (M,)


def make_branch(
    ids: list[list[int]], reads: list[int], vectors: Tensor, without: int = 0
) -> Branches:
    """One branch of each prompt. ids: of each prompt. reads: of the first V columns, as far as a
    prompt has them. vectors: (B, V, D)."""
    device = vectors.device
    length = torch.tensor([len(row) for row in ids], device=device)
    width = max(int(length.max()), 1)
    padded = [row + [0] * (width - len(row)) for row in ids]
    has_column = torch.arange(len(reads), device=device) < length[:, None]  # (B, V)
    of_columns = torch.tensor(reads, dtype=torch.long, device=device)
    return Branches(
        ids=torch.tensor(padded, device=device)[:, None],
        length=length[:, None],
        reads=of_columns.where(has_column, TOKEN)[:, None],  # what it writes, it reads
        vectors=vectors[:, None],
        without=torch.tensor([without], device=device),
    )


def join(several: list[Branches]) -> Branches:
    """All branches of the same prompts."""
    width = max(branches.ids.shape[2] for branches in several)
    known = max(branches.reads.shape[2] for branches in several)
    wider = lambda x, size: F.pad(x, (0, size - x.shape[2]))  # with zeros: TOKEN, where it is read
    more = lambda x: F.pad(x, (0, 0, 0, known - x.shape[2]))
    return Branches(
        ids=torch.cat([wider(branches.ids, width) for branches in several], dim=1),
        length=torch.cat([branches.length for branches in several], dim=1),
        reads=torch.cat([wider(branches.reads, known) for branches in several], dim=1),
        vectors=torch.cat([more(branches.vectors) for branches in several], dim=1),
        without=torch.cat([branches.without for branches in several]),
    )


@torch.no_grad()
def run_branches(
    model: Coconut, prefix: Prefix, branches: Branches, max_new_tokens: int | Tensor
) -> tuple[list[list[list[int]]], Tensor]:
    """What each of the M branches of each of the B prompts writes, eos included where it came, and
    the states (B, M, V, D) behind which the first V columns stand: what a latent there would be
    fed. Of columns that a branch does not have they mean nothing.

    max_new_tokens: of every branch, or of each (B, M); with 0 it writes nothing. Given columns run
    in as few passes as the states that they read allow. A branch that ended takes part in no
    further pass, and its prompt leaves with the last one.
    """
    length, known = branches.length, branches.reads.shape[2]
    running = _Running(prefix, branches.without)
    states = _run_given(model, running, branches)
    eos = NO_TOKEN if model.eos_token_id is None else model.eos_token_id
    limits = torch.as_tensor(max_new_tokens, device=length.device).expand_as(length)
    new = branches.ids.new_zeros(*length.shape, int(limits.max()))
    ends = limits.clone()
    running.end(limits == 0)
    for step in range(new.shape[2]):
        alive = running.alive
        token = alive.long()  # (rows, M)
        token[alive] = model.head(running.last[alive]).argmax(-1)
        new[running.rows, :, step] = token
        done = alive & ((token == eos) | (step + 1 == limits[running.rows]))
        ends[running.rows] = ends[running.rows].where(~done, step + 1)
        token = token[running.end(done)]
        rows = running.rows
        if len(rows) == 0:
            break
        branch, at = _pack(running.alive)  # (rows, Q)
        embeds = model.base_causallm.get_input_embeddings()(token.gather(1, branch))
        place = length[rows].gather(1, branch) + step
        hidden = running.run_columns(model, embeds, branch, place, at)
        running.last[at.nonzero()[:, 0], branch[at]] = hidden[at]
    written = [
        [tokens[:end] for tokens, end in zip(*of_prompt)]
        for of_prompt in zip(new.tolist(), ends.tolist())
    ]
    return written, states[:, :, :known]


def check_branches(hf_config: PreTrainedConfig) -> None:
    """Raise UserError where a branch depends on those beside it, as in families whose attention
    goes by the place of a key in the cache and not by its position: found out on a small model."""
    model = Coconut(small_model(small_config(hf_config)))
    ids = torch.arange(10, 22).view(1, 2, 6)
    prefix = run_prefix(model, ids[:, 0], torch.ones_like(ids[:, 0]), room=7)
    alone = make_branch(ids[:, 1].tolist(), [TOKEN] * 6, torch.zeros(1, 6, prefix.hidden.shape[2]))
    _, wanted = run_branches(model, prefix, alone, 1)
    _, actual = run_branches(model, prefix, join([alone, alone]), 1)
    if not torch.allclose(actual, wanted.expand_as(actual), rtol=1e-3, atol=1e-3):
        raise UserError(
            f"faithful: the attention of {hf_config.model_type} goes by the place of a key in the "
            "cache, where here several continuations of a prompt stand side by side"
        )


def _run_given(model: Coconut, running: "_Running", branches: Branches) -> Tensor:
    """Run what branches are given; the states (B, M, G + 1, D) before each column and behind the
    last one. A pass ends before a column that reads a state."""
    ids, length = branches.ids, branches.length
    given, known = ids.shape[2], branches.reads.shape[2]
    prompt = torch.arange(len(ids), device=ids.device)[:, None]
    reads = F.pad(branches.reads, (0, given - known))  # TOKEN
    number = (reads == STATE).cumsum(-1)  # (B, M, G) of the pass that runs a column
    number -= number[..., :1].clone()
    exists = torch.arange(given, device=ids.device) < length[..., None]
    states = running.last[:, :, None].repeat(1, 1, given + 1, 1)
    number = number.where(exists, NOBODY)
    for now in range(int(number.max()) + 1):
        order, at = _pack((number == now).flatten(1))  # (B, Q)
        branch, place = order // given, order % given
        embeds = model.base_causallm.get_input_embeddings()(ids.flatten(1).gather(1, order))
        if known:
            vectors = branches.vectors[prompt, branch, place.clamp(max=known - 1)]
            last = states[prompt, branch, place]
            embeds = _read(embeds, reads.flatten(1).gather(1, order), vectors, last)
        hidden = running.run_columns(model, embeds, branch, place, at)
        states[at.nonzero()[:, 0], branch[at], place[at] + 1] = hidden[at]
    running.last = states[prompt, torch.arange(ids.shape[1], device=ids.device), length]
    return states


def _pack(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen ones of each row (rows, N) side by side: their numbers (rows, Q), and where these
    are some, as a row may have fewer than another."""
    size = int(chosen.sum(1).max())
    order = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :size]
    return order, chosen.gather(1, order)


def _read(embeds: Tensor, reads: Tensor, vectors: Tensor, last: Tensor) -> Tensor:
    """What columns read, all (B, Q, D)."""
    vectors, last = vectors.to(embeds.dtype), last.to(embeds.dtype)
    embeds = torch.where((reads == VECTOR)[..., None], vectors, embeds)
    return torch.where((reads == STATE)[..., None], last, embeds)


class _Growing(PastKeysValues):
    """Writes new columns behind the old ones, in buffers with room for more: nothing runs an
    earlier pass again here, and to copy all columns in every pass would cost as much as the pass.
    """

    def __init__(self, previous: PastKeysValues):
        super().__init__(previous)
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        if isinstance(previous, _Growing):
            self.buffers = previous.buffers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of PastKeysValues."""
        (old,) = self.past[layer_idx]
        used, total = old[0].shape[-2], old[0].shape[-2] + key_states.shape[-2]
        buffers = self.buffers.get(layer_idx)
        if buffers is None or buffers[0].shape[-2] < total:
            self.buffers[layer_idx] = buffers = _with_room(old[0], total), _with_room(old[1], total)
        for buffer, new in zip(buffers, (key_states, value_states)):
            buffer[:, :, used:total] = new
        keys, values = (buffer[:, :, :total] for buffer in buffers)
        self.present[layer_idx] = [(keys, values)]
        return keys, values

    def keep_rows(self, rows: Tensor) -> None:
        super().keep_rows(rows)
        self.buffers.clear()  # of rows that are gone


def _with_room(columns: Tensor, total: int) -> Tensor:
    """Columns (B, heads, columns, head size) in front of a buffer for twice as many as `total`."""
    buffer = columns.new_empty(*columns.shape[:2], 2 * total, columns.shape[3])
    buffer[:, :, : columns.shape[2]] = columns
    return buffer


class _Running:
    """The branches that still go on, by the rows of the prompts that have any."""

    def __init__(self, prefix: Prefix, without: Tensor):
        num_prompts, columns, _ = prefix.hidden.shape
        self.prefix = prefix
        self.start = columns - without  # (M,)
        self.cache: PastKeysValues = _Growing(PastKeysValues())
        self.cache.present = prefix.cache.present
        device = prefix.hidden.device
        self.rows = torch.arange(num_prompts, device=device)  # numbers of prompts
        self.last = prefix.hidden[:, self.start - 1]  # (rows, M, D)
        self.alive = torch.ones(num_prompts, len(without), dtype=torch.bool, device=device)
        # (rows, L) whose a column is, and where it would stand in a sequence of its own
        self.owner = self.column = torch.zeros(num_prompts, 0, dtype=torch.long, device=device)

    def end(self, done: Tensor) -> Tensor:
        """Branches (rows, M) that have ended; the rows that stay."""
        self.alive = self.alive & ~done
        kept = self.alive.any(1).nonzero().squeeze(1)
        if len(kept) < len(self.rows):
            self.rows, self.last, self.alive = self.rows[kept], self.last[kept], self.alive[kept]
            self.owner, self.column = self.owner[kept], self.column[kept]
            self.cache.keep_rows(kept)
        return kept

    def run_columns(
        self, model: Coconut, embeds: Tensor, branch: Tensor, place: Tensor, at: Tensor
    ) -> Tensor:
        """The next columns (rows, Q, D) of branches, `place` columns of a branch's own stand before
        each: their last states. Where `at` is false, a column only fills up the pass."""
        start = self.start[branch]  # (rows, Q)
        column, owner = start + place.where(at, 0), branch.where(at, NOBODY)
        self.owner = torch.cat([self.owner, owner], dim=1)
        self.column = torch.cat([self.column, column], dim=1)
        masks = self.prefix.masks.items()
        hidden, self.cache = model.run_pass(
            embeds,
            self.prefix.position_ids[self.rows[:, None], column],
            {name: self._mask(mask, owner, start, column) for name, mask in masks},
            slice(None),
            self.cache,
        )
        return hidden

    def _mask(self, mask: Tensor, owner: Tensor, start: Tensor, column: Tensor) -> Tensor:
        """What the columns of a pass see, (rows, 1, Q, C + L): of the prompt, up to the branch's
        start, what any sequence sees from there, and so of their own columns; nothing of other
        branches."""
        seen = mask[self.rows[:, None], 0, column]  # (rows, Q, T)
        columns = torch.arange(self.prefix.hidden.shape[1], device=seen.device)  # (C,)
        shared = seen[..., : len(columns)].masked_fill(columns >= start[..., None], -torch.inf)
        other = self.owner[:, None] != owner[..., None]  # (rows, Q, L)
        own = seen.gather(2, self.column[:, None].expand_as(other)).masked_fill(other, -torch.inf)
        return torch.cat([shared, own], dim=-1)[:, None]
