"""Many continuations of the same prompts, computed together over one cache of what they share.

A branch goes on from a prompt by columns that it is given (tokens, vectors, its own last hidden
state) and then writes greedily. The branches of a prompt are columns of its row: a pass runs the
next column of every branch that still goes on, and the mask lets each see the prompt and itself. So
nothing that branches share is computed, or kept, twice.

Shapes: B prompts, C columns of a prefix, M branches of each prompt, G given columns, V of them
that may read other things than a token, D hidden size, Q columns of a pass, L columns of branches
so far.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coconut import NO_TOKEN, Coconut
from layers import PastKeysValues

TOKEN, VECTOR, STATE = 0, 1, 2  # what a given column reads: its token, a vector, the last state
NOBODY = -1  # owns the columns that fill up a pass


@dataclass(frozen=True)
class Prefix:
    """Prompts that have been run, padded on the left, with room for what branches add."""

    cache: PastKeysValues
    hidden: Tensor  # (B, C, D) outputs of all columns
    masks: dict[str, Tensor]  # (B, 1, T, T) of all columns, those of one branch to come included
    position_ids: Tensor  # (B, T)

    def upto(self, columns: int) -> "Prefix":
        """The first columns only: branches may start anywhere."""
        cache = PastKeysValues()
        for layer, ((keys, values),) in self.cache.present.items():
            cache.present[layer] = [(keys[:, :, :columns], values[:, :, :columns])]
        return replace(self, cache=cache, hidden=self.hidden[:, :columns])


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
    columns read is said by `reads`, the others read their tokens."""

    ids: Tensor  # (B, M, G)
    length: Tensor  # (B, M) at most G
    reads: Tensor  # (B, M, V) TOKEN, VECTOR or STATE
    vectors: Tensor  # (B, M, V, D) read where reads is VECTOR


def make_branch(ids: list[list[int]], reads: list[int], vectors: Tensor) -> Branches:
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
    )


@torch.no_grad()
def run_branches(
    model: Coconut, prefix: Prefix, branches: Branches, max_new_tokens: int
) -> tuple[list[list[list[int]]], Tensor]:
    """What each of the M branches of each of the B prompts writes, eos included where it came, and
    the states (B, M, V, D) behind which the first V columns stand: what a latent there would be
    fed. Of columns that a branch does not have they mean nothing.

    A branch that ended takes part in no further pass, and its prompt leaves with the last one.
    """
    length, given, known = branches.length, branches.ids.shape[2], branches.reads.shape[2]
    eos = NO_TOKEN if model.eos_token_id is None else model.eos_token_id
    shortest, ends = int(length.min()), length + max_new_tokens
    new = branches.ids.new_zeros(*length.shape, given + max_new_tokens)
    running = _Running(prefix, length.shape[1])
    states = running.last.new_zeros(*length.shape, known, running.last.shape[-1])
    for step in range(given + max_new_tokens):
        rows, last = running.rows, running.last
        if step < known:
            states[rows, :, step] = last
        token = branches.ids[rows, :, min(step, given - 1)]  # (rows, M)
        if step >= shortest:
            writing = running.alive & (step >= length[rows])
            token[writing] = model.head(last[writing]).argmax(-1)
            new[rows, :, step] = token
            done = writing & ((token == eos) | (step + 1 == ends[rows]))
            ends[rows] = ends[rows].where(~done, step + 1)
            kept = running.end(done)
            rows, token = running.rows, token[kept]
        if len(rows) == 0:
            break
        embeds = model.base_causallm.get_input_embeddings()(token)  # (rows, M, D)
        if step < known:
            reads, vectors = branches.reads[rows, :, step], branches.vectors[rows, :, step]
            embeds = _read(embeds, reads, vectors, running.last)
        running.run_column(model, embeds, step)
    written = zip(new.flatten(0, 1).tolist(), length.flatten().tolist(), ends.flatten().tolist())
    flat = [row[first:end] for row, first, end in written]
    count = length.shape[1]
    return [flat[start : start + count] for start in range(0, len(flat), count)], states


def _read(embeds: Tensor, reads: Tensor, vectors: Tensor, last: Tensor) -> Tensor:
    """What branches read at a column, all (rows, M, D)."""
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
            room = lambda x: F.pad(x, (0, 0, 0, 2 * total - used))
            self.buffers[layer_idx] = buffers = room(old[0]), room(old[1])
        for buffer, new in zip(buffers, (key_states, value_states)):
            buffer[:, :, used:total] = new
        keys, values = (buffer[:, :, :total] for buffer in buffers)
        self.present[layer_idx] = [(keys, values)]
        return keys, values

    def keep_rows(self, rows: Tensor) -> None:
        super().keep_rows(rows)
        self.buffers.clear()  # of rows that are gone


class _Running:
    """The branches that still go on, by the rows of the prompts that have any."""

    def __init__(self, prefix: Prefix, count: int):
        num_prompts, self.start, _ = prefix.hidden.shape
        self.prefix = prefix
        self.cache: PastKeysValues = _Growing(PastKeysValues())
        self.cache.present = prefix.upto(self.start).cache.present
        device = prefix.hidden.device
        self.rows = torch.arange(num_prompts, device=device)  # numbers of prompts
        self.last = prefix.hidden[:, -1:].expand(-1, count, -1)  # (rows, M, D)
        self.alive = torch.ones(num_prompts, count, dtype=torch.bool, device=device)
        self.owner = torch.zeros(num_prompts, 0, dtype=torch.long, device=device)  # (rows, L)
        self.columns: list[int] = []  # (L,) where they would stand in a sequence of their own

    def end(self, done: Tensor) -> Tensor:
        """Branches (rows, M) that have ended; the rows that stay."""
        self.alive = self.alive & ~done
        kept = self.alive.any(1).nonzero().squeeze(1)
        if len(kept) < len(self.rows):
            self.rows, self.last = self.rows[kept], self.last[kept]
            self.alive, self.owner = self.alive[kept], self.owner[kept]
            self.cache.keep_rows(kept)
        return kept

    def run_column(self, model: Coconut, embeds: Tensor, step: int) -> None:
        """The next column of each branch, given (rows, M, D): new last states."""
        size = int(self.alive.sum(1).max())
        order = self.alive.long().argsort(dim=1, descending=True, stable=True)[
            :, :size
        ]  # (rows, Q)
        querying = order.where(self.alive.gather(1, order), NOBODY)
        column = self.start + step
        self.owner = torch.cat([self.owner, querying], dim=1)
        self.columns += [column] * size
        wide = order[..., None].expand(-1, -1, embeds.shape[-1])  # (rows, Q, D)
        positions = self.prefix.position_ids[self.rows, column]
        hidden, self.cache = model.run_pass(
            embeds.gather(1, wide),
            positions[:, None].expand_as(order),
            {name: self._mask(mask, column, querying) for name, mask in self.prefix.masks.items()},
            slice(None),
            self.cache,
        )
        self.last = self.last.scatter(1, wide, hidden)

    def _mask(self, mask: Tensor, column: int, querying: Tensor) -> Tensor:
        """What the columns of a pass see, (rows, 1, Q, C + L): of the prompt what any sequence
        sees from there, and so of their own columns; nothing of other branches."""
        seen = mask[:, 0, column][self.rows]  # (rows, T)
        shared = seen[:, None, : self.start].expand(-1, querying.shape[1], -1)
        own = self.owner[:, None] == querying[..., None]  # (rows, Q, L)
        columns = seen[:, self.columns][:, None].expand_as(own)
        return torch.cat([shared, columns.masked_fill(~own, -torch.inf)], dim=-1)[:, None]
