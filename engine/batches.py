"""The rows of every optimizer step, dealt to ranks and micro-batches.

A micro-batch computes len(rows) x (longest prefix + longest suffix) positions, as its first latents
share a column. The loss is normalised over the step, so how its rows are split does not change it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dataset import IGNORED, Batch, StageDataset, collate
from step_loss import StepTargets, step_targets
from utils import derive_seed


@dataclass(frozen=True)
class MicroBatch(Batch):
    """What one rank computes at once of an optimizer step."""

    rows: list[int]
    num_items_in_batch: int  # labelled tokens of the whole optimizer step, on all ranks
    last: bool  # whether it is the last one of its step
    targets: StepTargets | None = None  # what its thoughts are to say; None: no step_loss


# ------------------------------------------------------------------------------- steps


def plan_steps(
    dataset: StageDataset,
    rows_per_step: int,
    max_length: int,
    seed: int,
    epoch: int,
    group_by_length: bool = False,
) -> tuple[list[np.ndarray], int]:
    """The rows of every optimizer step of an epoch, shuffled by (seed, epoch), and the number of
    rows left out because they are longer than max_length. The last step may be smaller.

    group_by_length: rows of like prefix and suffix share a step; the steps are shuffled.
    """
    rows = np.flatnonzero(dataset.total_length <= max_length)
    rng = np.random.default_rng(derive_seed(seed, "order", epoch))
    order = rng.permutation(rows)
    if group_by_length:
        order = _by_length(order, dataset, -(-len(order) // rows_per_step))
    steps = [order[i : i + rows_per_step] for i in range(0, len(order), rows_per_step)]
    if group_by_length:
        steps = [steps[i] for i in rng.permutation(len(steps))]
    return steps, len(dataset) - len(rows)


def _by_length(rows: np.ndarray, dataset: StageDataset, num_steps: int) -> np.ndarray:
    """Rows in bands of like prefix, each sorted by suffix, every second one backwards: neighbours
    are alike in both. The sorts are stable, so rows of the same lengths stay shuffled."""
    suffix = dataset.total_length - dataset.prefix_length
    rows = rows[np.argsort(dataset.prefix_length[rows], kind="stable")]
    bands = np.array_split(rows, max(round(num_steps**0.5), 1))
    bands = [band[np.argsort(suffix[band], kind="stable")] for band in bands]
    return np.concatenate([band[:: (-1) ** number] for number, band in enumerate(bands)])


# ------------------------------------------------------------------------------- micro-batches


def split_by_length(
    rows: np.ndarray,
    dataset: StageDataset,
    num_ranks: int,
    batch_size: int,
    max_positions: int | None = None,
) -> list[list[np.ndarray]]:
    """Split the rows of one step into micro-batches by length: [rank][micro-batch] arrays of rows.

    They have at most batch_size rows or, where max_positions is given, any number of rows that
    takes at most as many positions. There are as few as possible, and as many on every rank; some
    may be empty in an uneven step. Neighbours in length go to different ranks (equal work).
    """
    rows = rows[np.lexsort((rows, dataset.prefix_length[rows], dataset.total_length[rows]))]
    if max_positions is None:
        groups = np.array_split(rows, num_ranks * -(-len(rows) // (num_ranks * batch_size)))
    else:
        prefix = dataset.prefix_length[rows]
        lengths = np.stack([prefix, dataset.total_length[rows] - prefix])
        group_of = _group(lengths, num_ranks, max_positions)
        groups = [rows[group_of == group] for group in range(group_of.max() + 1)]
        groups += [rows[:0]] * (-len(groups) % num_ranks)
    return [groups[rank::num_ranks] for rank in range(num_ranks)]


def _group(lengths: np.ndarray, multiple: int, max_positions: int) -> np.ndarray:
    """The group (rows,) of each row, for lengths (2, rows) of sorted rows: the fewest groups, a
    multiple of `multiple`, that fit max_positions. A row by itself is taken to fit."""
    num_rows = lengths.shape[1]
    at_least = -(-int(lengths.sum()) // (multiple * max_positions))
    group_of = np.arange(num_rows)
    for count in range(multiple * at_least, num_rows, multiple):
        candidate = _refine(_cut(lengths, count), lengths, count)
        groups = [lengths[:, candidate == group] for group in range(count)]
        if max(map(_positions, groups)) <= max_positions:
            return candidate
    return group_of


def _positions(lengths: np.ndarray) -> int:
    """Positions that a micro-batch of rows of these lengths (2, rows) computes."""
    return lengths.shape[1] * int(lengths.max(1).sum()) if lengths.size else 0


def _cut(lengths: np.ndarray, count: int) -> np.ndarray:
    """Cut a sorted list of rows into `count` groups whose squared positions sum up to the least
    (a dynamic programme): few in all, and about as many in each. Returns the group of each row."""
    num_rows = lengths.shape[1]
    squares = np.full((num_rows, num_rows + 1), np.inf)  # of a group of rows start to stop - 1
    for start in range(num_rows):
        width = np.maximum.accumulate(lengths[:, start:], axis=1).sum(0)
        squares[start, start + 1 :] = (width * np.arange(1, len(width) + 1)) ** 2.0
    least = np.full(num_rows + 1, np.inf)  # of the first rows, by their number
    least[0] = 0
    starts = []  # by group, then by where it stops: where it starts
    for _ in range(count):
        sums = least[:num_rows, None] + squares
        starts.append(sums.argmin(0))
        least = sums.min(0)
    group_of, stop = np.empty(num_rows, dtype=np.int64), num_rows
    for group in range(count - 1, -1, -1):
        start = starts[group][stop]
        group_of[start:stop] = group
        stop = start
    return group_of


def _refine(group_of: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """Move single rows to other groups while that makes the sum of the squared positions smaller:
    groups need not be neighbours in one order, as rows have two lengths."""
    members = [lengths[:, group_of == group] for group in range(count)]
    sizes = np.array([part.shape[1] for part in members])
    longest = np.array([part.max(1) for part in members]).T  # (2, groups)
    moved = True
    while moved:
        moved = False
        for row, own in enumerate(group_of):
            positions = sizes * longest.sum(0)
            rest = lengths[:, (group_of == own) & (np.arange(len(group_of)) != row)]
            grown = (sizes + 1) * np.maximum(longest, lengths[:, row, None]).sum(0)
            more = grown**2.0 - positions**2.0  # of the other groups
            more[own] = positions[own] ** 2.0 - _positions(rest) ** 2.0  # what leaving saves
            to = int(more.argmin())
            if more[to] >= more[own] or rest.shape[1] == 0:
                continue
            group_of[row], moved = to, True
            sizes[own], sizes[to] = sizes[own] - 1, sizes[to] + 1
            longest[:, own] = rest.max(1)
            longest[:, to] = np.maximum(longest[:, to], lengths[:, row])
    return group_of


class MicroBatches(torch.utils.data.Dataset):
    """The collated micro-batches of one rank, by optimizer step of an epoch."""

    def __init__(
        self,
        dataset: StageDataset,
        steps: list[np.ndarray],  # the rows of each
        *,
        num_ranks: int,
        rank: int,
        batch_size: int,
        max_positions: int | None = None,
        pad_id: int,
        step_loss: str = "none",
    ):
        """batch_size, max_positions: split_by_length's. step_loss: the key of the config."""
        self.dataset, self.steps, self.pad_id = dataset, steps, pad_id
        self.step_loss = step_loss
        self.rank, self.split = rank, (num_ranks, batch_size, max_positions)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        rows = self.steps[step]
        num_items = int(self.dataset.num_labels[rows].sum())
        parts = split_by_length(rows, self.dataset, *self.split)[self.rank]
        batches = []
        for number, part in enumerate(parts, start=1):
            samples = [self.dataset[row] for row in part]
            if not samples:  # all ranks run the same passes: a row that counts for nothing
                filler = self.dataset[rows[0]]
                samples = [filler._replace(labels=np.full_like(filler.labels, IGNORED))]
            batch = collate(samples, self.pad_id)
            targets = None
            if self.step_loss != "none":
                first, stop = batch.latent_columns
                targets = step_targets(self.step_loss, self.dataset, rows, part, stop - first)
            batches.append(
                MicroBatch(
                    **batch.inputs(),
                    rows=[int(row) for row in part],
                    num_items_in_batch=num_items,
                    last=number == len(parts),
                    targets=targets,
                )
            )
        return batches
