"""The rows of optimizer steps, dealt to ranks and micro-batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum import Curriculum
from dataset import IGNORED, StageDataset
from engine.batches import MicroBatches, plan_steps, split_by_length


def of_lengths(prefix, rest) -> StageDataset:
    """A stage dataset that knows the lengths of its rows and nothing else."""
    data = StageDataset.__new__(StageDataset)
    data.prefix_length, data.num_labels = np.array(prefix), np.array(rest)
    data.total_length = data.prefix_length + data.num_labels
    data.encoded = range(len(data.prefix_length))
    return data


def test_steps_hold_each_row_once_and_count_the_dropped(encoded, tokens):
    data = StageDataset(encoded, Curriculum(), tokens, 1)
    limit = int(np.sort(data.total_length)[30])
    for grouped in (False, True):
        steps, dropped = plan_steps(data, 8, limit, 0, 1, grouped)
        rows = np.concatenate(steps)
        kept = np.flatnonzero(data.total_length <= limit)
        assert sorted(rows.tolist()) == kept.tolist() and dropped == 40 - len(kept) > 0
        assert sorted(map(len, steps))[1:] == [8] * (len(steps) - 1)


@pytest.mark.parametrize("grouped", [False, True])
def test_order_depends_on_seed_and_epoch(encoded, tokens, grouped):
    data = StageDataset(encoded, Curriculum(), tokens, 1)
    order = lambda *at: np.concatenate(plan_steps(data, 8, 512, *at, grouped)[0]).tolist()
    first = order(0, 1)
    torch.manual_seed(1), np.random.seed(1)
    assert order(0, 1) == first
    others = [first, order(1, 1), order(0, 2), order(0, 3), list(range(40))]
    assert len({tuple(rows) for rows in others}) == 5


def test_no_row_short_enough_gives_no_step(encoded, tokens):
    data = StageDataset(encoded, Curriculum(), tokens, 1)
    assert plan_steps(data, 8, 2, 0, 1) == ([], 40)


def test_grouped_steps_hold_rows_of_like_length():
    rng = np.random.default_rng(0)
    data = of_lengths(rng.integers(20, 200, 500), rng.integers(5, 60, 500))
    spread = lambda grouped, lengths: np.mean(
        [np.ptp(lengths[rows]) for rows in plan_steps(data, 20, 512, 0, 1, grouped)[0]]
    )
    for lengths in (data.prefix_length, data.num_labels):
        assert spread(True, lengths) < 0.35 * spread(False, lengths)
    # the steps are shuffled, or every epoch would begin with the short rows
    firsts = [data.prefix_length[rows].mean() for rows in plan_steps(data, 20, 512, 0, 1, True)[0]]
    assert abs(np.corrcoef(np.arange(len(firsts)), firsts)[0, 1]) < 0.7


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 70),
    num_ranks=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_split_gives_every_row_once(count, num_ranks, batch_size, seed):
    """Any uneven step, fewer rows than ranks included. Unequal counts of micro-batches would
    hang the ranks' collectives."""
    rng = np.random.default_rng(seed)
    data = of_lengths(rng.integers(5, 90, 100), rng.integers(1, 40, 100))
    rows = rng.permutation(100)[:count]
    parts = split_by_length(rows, data, num_ranks, batch_size)
    assert len(parts) == num_ranks and len({len(batches) for batches in parts}) == 1
    assert all(len(batch) <= batch_size for batches in parts for batch in batches)
    split = np.concatenate([batch for batches in parts for batch in batches])
    assert sorted(split.tolist()) == sorted(rows.tolist())
    assert len(parts[0]) == -(-count // (num_ranks * batch_size))  # no more than it needs
    again = split_by_length(rng.permutation(rows), data, num_ranks, batch_size)
    assert [[b.tolist() for b in p] for p in again] == [[b.tolist() for b in p] for p in parts]


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 70),
    num_ranks=st.integers(1, 5),
    max_positions=st.integers(130, 1500),  # from the longest row on
    seed=st.integers(0, 1000),
)
def test_split_by_positions_gives_every_row_once_and_fits(count, num_ranks, max_positions, seed):
    rng = np.random.default_rng(seed)
    data = of_lengths(rng.integers(5, 90, 100), rng.integers(1, 40, 100))
    rows = rng.permutation(100)[:count]
    parts = split_by_length(rows, data, num_ranks, 16, max_positions)
    assert len(parts) == num_ranks and len({len(batches) for batches in parts}) == 1
    split = [batch for batches in parts for batch in batches]
    assert sorted(np.concatenate(split).tolist()) == sorted(rows.tolist())
    assert all(positions(data, batch) <= max_positions for batch in split)
    assert sum(len(batch) == 0 for batch in split) < num_ranks  # no more than rounding up makes
    again = split_by_length(rng.permutation(rows), data, num_ranks, 16, max_positions)
    assert [[b.tolist() for b in p] for p in again] == [[b.tolist() for b in p] for p in parts]


def positions(data, batch) -> int:
    """Computed for a micro-batch, first latents aligned."""
    width = data.prefix_length[batch].max(initial=0) + data.num_labels[batch].max(initial=0)
    return len(batch) * int(width)


def test_split_by_positions_is_the_cheapest_of_all_partitions_of_a_few_rows():
    """In two groups, by trying all: where the local search stops is seldom much dearer."""
    rng, dearer = np.random.default_rng(0), []
    for _ in range(40):
        data = of_lengths(rng.integers(5, 90, 9), rng.integers(1, 40, 9))
        of_all = positions(data, np.arange(9))
        masks = [np.array(list(f"{number:09b}")) == "1" for number in range(1, 256)]
        groups = [(np.flatnonzero(mask), np.flatnonzero(~mask)) for mask in masks]
        squares = lambda parts: sum(positions(data, part) ** 2 for part in parts)
        (parts,) = split_by_length(np.arange(9), data, 1, 9, of_all - 1)
        assert len(parts) == 2
        dearer.append(squares(parts) / min(map(squares, groups)))
    assert max(dearer) < 1.3 and np.mean(dearer) < 1.02


def test_groups_of_any_size_are_padded_less_and_equally_large():
    rng = np.random.default_rng(0)
    data = of_lengths(*(rng.lognormal(mean, 0.45, 960).astype(int) + 1 for mean in (4, 3)))
    for rows in plan_steps(data, 96, 10_000, 0, 1)[0]:
        (equal,) = split_by_length(rows, data, 1, 16)
        largest = max(positions(data, part) for part in equal)
        (parts,) = split_by_length(rows, data, 1, 16, largest)
        assert len(parts) < len(equal)  # no memory more, fewer launches
        largest = max(positions(data, part) for part in parts)
        (parts,) = split_by_length(rows, data, 1, 16, int(0.6 * largest))
        assert padded(data, parts) < 0.92 * padded(data, equal)
        sizes = [positions(data, part) for part in parts]
        assert max(sizes) < 1.35 * np.mean(sizes)


def padded(data, batches) -> float:
    """Positions computed for each real token, first latents aligned."""
    real = sum(data.total_length[b].sum() for b in batches)
    return sum(positions(data, b) for b in batches) / real


def test_split_batches_are_padded_less_than_random_ones():
    rng = np.random.default_rng(0)
    lengths = [rng.lognormal(mean, 0.45, 960).astype(int) + 1 for mean in (4, 3)]
    data = of_lengths(*lengths)
    steps, _ = plan_steps(data, 96, 10_000, 0, 1)
    split = [batch for rows in steps for batch in split_by_length(rows, data, 1, 16)[0]]
    chance = [rows[i : i + 16] for rows in steps for i in range(0, 96, 16)]
    assert padded(data, split) < 0.85 * padded(data, chance)


def test_neighbours_in_length_go_to_different_ranks():
    """Ranks wait for each other, so each should get its share of long rows."""
    data = of_lengths(np.arange(100, 196), np.full(96, 10))
    work = [
        data.total_length[np.concatenate(p)].sum()
        for p in split_by_length(np.arange(96), data, 4, 4)
    ]
    assert max(work) / min(work) < 1.1


@pytest.mark.parametrize("max_positions", [None, 200])
@pytest.mark.parametrize(
    ("num_ranks", "batch_size", "per_step"),
    [(1, 4, 8), (2, 4, 16), (3, 2, 12), (2, 3, 7), (5, 2, 3)],
)
def test_micro_batches(encoded, tokens, num_ranks, batch_size, per_step, max_positions):
    """All ranks together: each row once, the same places, the whole step's number of labels."""
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    steps, _ = plan_steps(data, per_step, 512, 0, 1)
    sizes = dict(num_ranks=num_ranks, batch_size=batch_size, max_positions=max_positions)
    ranks = [MicroBatches(data, steps, rank=rank, pad_id=1, **sizes) for rank in range(num_ranks)]
    for number, rows in enumerate(steps):
        together = [of_rank[number] for of_rank in ranks]
        assert len({len(batches) for batches in together}) == 1
        batches = sum(together, [])
        assert sorted(row for b in batches for row in b.rows) == sorted(rows.tolist())
        assert {b.num_items_in_batch for b in batches} == {sum(len(b.label_index) for b in batches)}
        assert [b.last for b in together[0]] == [False] * (len(together[0]) - 1) + [True]


def test_empty_micro_batch_runs_but_counts_for_nothing(encoded, tokens):
    """Three rows on five ranks: two ranks run the same passes over a row without labels."""
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    steps = [np.array([4, 9, 2])]
    batches = [
        MicroBatches(data, steps, num_ranks=5, rank=rank, batch_size=2, pad_id=1)[0][0]
        for rank in range(5)
    ]
    empty = [batch for batch in batches if not batch.rows]
    assert len(empty) == 2
    for batch in empty:
        assert len(batch.label_index) == 0 and (batch.labels == IGNORED).all()
        assert batch.latent_columns[1] - batch.latent_columns[0] == 4
        assert batch.last and batch.num_items_in_batch > 0


def test_steps_left_after_a_resume_are_the_undisturbed_ones(encoded, tokens):
    data = StageDataset(encoded, Curriculum(), tokens, 1)
    steps, _ = plan_steps(data, 8, 512, 0, 3)
    alone = dict(num_ranks=1, rank=0, batch_size=4, pad_id=1)
    whole, rest = (MicroBatches(data, part, **alone) for part in (steps, steps[2:]))
    rows = lambda of_steps: [[batch.rows for batch in of_step] for of_step in of_steps]
    assert rows(list(whole)[2:]) == rows(list(rest)) and len(rest) > 0
