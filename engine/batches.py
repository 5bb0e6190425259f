"""The rows of every optimizer step, dealt to ranks and micro-batches."""

from dataclasses import dataclass

import numpy as np
import torch

from dataset import IGNORED, Batch, StageDataset, collate
from utils import derive_seed


@dataclass(frozen=True)
class MicroBatch(Batch):
    """What one rank computes at once of an optimizer step."""

    rows: list[int]
    num_items_in_batch: int  # labelled tokens of the whole optimizer step, on all ranks
    last: bool  # whether it is the last one of its step


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

    group_by_length: rows of like prefix, then suffix length share a step; the steps are shuffled.
    """
    rows = np.flatnonzero(dataset.total_length <= max_length)
    rng = np.random.default_rng(derive_seed(seed, "order", epoch))
    order = rng.permutation(rows)
    if group_by_length:  # the sort is stable, so rows of the same lengths stay shuffled
        suffix = dataset.total_length - dataset.prefix_length
        order = order[np.lexsort((suffix[order], dataset.prefix_length[order]))]
    steps = [order[i : i + rows_per_step] for i in range(0, len(order), rows_per_step)]
    if group_by_length:
        steps = [steps[i] for i in rng.permutation(len(steps))]
    return steps, len(dataset) - len(rows)


def count_micro_batches(num_rows: int, num_ranks: int, batch_size: int) -> int:
    """Micro-batches of each rank in a step of num_rows rows."""
    return -(-num_rows // (num_ranks * batch_size))


def split_by_length(
    rows: np.ndarray, dataset: StageDataset, num_ranks: int, batch_size: int
) -> list[list[np.ndarray]]:
    """Split the rows of one step into micro-batches by length: [rank][micro-batch] arrays of rows.

    The loss is normalised over the step, so the split does not change it. Rows of like length
    share a micro-batch (less padding) and neighbours go to different ranks (equal work).
    Every rank gets the same number of micro-batches; some may be empty in an uneven step.
    """
    order = np.lexsort((rows, dataset.prefix_length[rows], dataset.total_length[rows]))
    per_rank = count_micro_batches(len(rows), num_ranks, batch_size)
    parts = np.array_split(rows[order], num_ranks * per_rank)
    return [parts[rank::num_ranks] for rank in range(num_ranks)]


class MicroBatches(torch.utils.data.Dataset):
    """The collated micro-batches of one rank over the steps of an epoch, in order."""

    def __init__(
        self,
        dataset: StageDataset,
        steps: list[np.ndarray],  # the rows of each
        *,
        num_ranks: int,
        rank: int,
        batch_size: int,
        pad_id: int,
    ):
        self.dataset, self.steps, self.pad_id = dataset, steps, pad_id
        self.num_ranks, self.rank, self.batch_size = num_ranks, rank, batch_size
        self.counts = [count_micro_batches(len(rows), num_ranks, batch_size) for rows in steps]
        # by index: the step, and the micro-batch's number within it
        self.numbers = [(step, i) for step, count in enumerate(self.counts) for i in range(count)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> MicroBatch:
        step, number = self.numbers[index]
        rows = self.steps[step]
        parts = split_by_length(rows, self.dataset, self.num_ranks, self.batch_size)
        mine = parts[self.rank][number]
        samples = [self.dataset[row] for row in mine]
        if not samples:  # all ranks run the same passes: a row that counts for nothing
            filler = self.dataset[rows[0]]
            samples = [filler._replace(labels=np.full_like(filler.labels, IGNORED))]
        return MicroBatch(
            **collate(samples, self.pad_id).inputs(),
            rows=[int(row) for row in mine],
            num_items_in_batch=int(self.dataset.num_labels[rows].sum()),
            last=number == self.counts[step] - 1,
        )
