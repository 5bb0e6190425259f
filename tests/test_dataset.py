"""dataset.py: samples, batches, how a step is split."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import naive_segments, tiny_rows

from curriculum import Curriculum
from dataset import IGNORED, StageDataset, collate
from utils import Method


def naive_sample(row, tokenizer, tokens, latents, skipped):
    """The ids and labels of a row, written down as the paper's figure 2 shows them."""
    question, *steps, answer = naive_segments(row, tokenizer)
    if tokens:
        question = [*question, tokens.start, *[tokens.latent] * latents, tokens.end]
    rest = [token for step in steps[skipped:] for token in step] + answer
    return question + rest, [IGNORED] * len(question) + rest


# ------------------------------------------------------------------------------- samples


STAGED = [(m, s) for m in (Method.COCONUT, Method.NO_THOUGHTS) for s in range(5)]
STAGED += [(Method.COT, 0), (Method.NO_COT, 0)]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(("method", "stage"), STAGED)
def test_samples_are_the_definition(tokenizer, tokens, encoded, method, stage, pad):
    markers = tokens if method is Method.COCONUT else None
    curriculum = Curriculum(method, pad_latent_to_max=pad)
    data = StageDataset(encoded, curriculum, markers, stage)
    for number, row in enumerate(tiny_rows(40)):
        latents, skipped = map(int, curriculum.plan(stage, len(row["steps"])))
        ids, labels = naive_sample(row, tokenizer, markers, latents, skipped)
        sample = data[number]
        assert (sample.row, sample.num_fed_back) == (number, latents)
        assert sample.input_ids.tolist() == ids and sample.labels.tolist() == labels
        # the lengths that the split trusts are the real ones
        assert data.total_length[number] == len(ids)
        assert data.num_labels[number] == sum(label != IGNORED for label in labels)
        assert data.prefix_length[number] == sample.first_latent
        assert ids[: sample.first_latent].count(tokens.latent) == 0
        at = slice(sample.first_latent, sample.first_latent + latents)
        assert ids[at] == [tokens.latent] * latents


@pytest.mark.parametrize("method", Method)
def test_question_is_the_sample_up_to_its_first_label(tokens, encoded, method):
    markers = tokens if method is Method.COCONUT else None
    data = StageDataset(encoded, Curriculum(method), markers, 2)
    for number in range(40):
        sample, question = data[number], data.question(number)
        length = len(question.input_ids)
        assert question.input_ids.tolist() == sample.input_ids[:length].tolist()
        assert length == np.flatnonzero(sample.labels != IGNORED)[0]
        assert (question.labels == IGNORED).all()
        assert question.num_fed_back == sample.num_fed_back


@pytest.mark.parametrize("forced", [0, 1, 7])
def test_forced_latents_change_nothing_but_their_number(tokenizer, tokens, encoded, forced):
    """The baseline of every evaluation: another number of latents, 0 included."""
    data = StageDataset(encoded, Curriculum(), tokens, 2, num_latents=forced)
    for number, row in enumerate(tiny_rows(40)):
        ids, labels = naive_sample(row, tokenizer, tokens, forced, min(2, len(row["steps"])))
        assert data[number].input_ids.tolist() == ids and data[number].labels.tolist() == labels
        assert data.total_length[number] == len(ids)


def test_pauses_differ_from_thoughts_by_what_is_fed_back_only(tokens, encoded):
    """Nothing is fed back, so a batch of pauses has no latent columns: it is one pass, and its
    rows need not be aligned."""
    thoughts = StageDataset(encoded, Curriculum(), tokens, 2)
    pauses = StageDataset(encoded, Curriculum(latent_input="pause"), tokens, 2)
    for number in range(40):
        assert pauses[number].num_fed_back == pauses.question(number).num_fed_back == 0
        assert pauses[number].input_ids.tolist() == thoughts[number].input_ids.tolist()
        assert pauses[number].labels.tolist() == thoughts[number].labels.tolist()
    batch = collate([pauses[number] for number in range(8)], 0)
    assert batch.latent_columns == (0, 0) and batch.attention_mask[:, 0].all()


def test_pairs_of_stages_differ_by_one_step(encoded, tokens):
    """The next stage replaces exactly one more step by c_thought latents."""
    curriculum = Curriculum(max_latent_stage=4, c_thought=3)
    for before, after in pairwise(StageDataset(encoded, curriculum, tokens, s) for s in range(5)):
        more = after.num_skipped > before.num_skipped
        assert (more == (encoded.num_steps >= after.stages)).all()
        assert (after.num_latents - before.num_latents == 3).all()
        assert (after.num_labels[more] < before.num_labels[more]).all()
        assert (after.num_labels[~more] == before.num_labels[~more]).all()


def uniform(encoded, tokens, prob, **changes):
    arguments = {"seed": 0, "epoch": 1, **changes}
    return StageDataset(encoded, Curriculum(), tokens, 2, uniform_prob=prob, **arguments).stages


def test_uniform_prob_draws_depend_on_seed_and_epoch_and_row_only(encoded, tokens):
    """The ancestor draws from the global random module inside a multi-process map: its seed
    does not control them."""
    first = uniform(encoded, tokens, 0.5)
    torch.manual_seed(5), np.random.seed(5)
    np.random.rand(), torch.rand(1)
    assert (uniform(encoded, tokens, 0.5) == first).all()
    assert (uniform(encoded, tokens, 0.5, seed=1) != first).any()
    assert (uniform(encoded, tokens, 0.5, epoch=2) != first).any()
    part = replace(
        encoded,
        num_steps=encoded.num_steps[:9],
        steps_from=encoded.steps_from[:9],
        question_length=encoded.question_length[:9],
        answer_length=encoded.answer_length[:9],
    )
    assert (uniform(part, tokens, 0.5) == first[:9]).all()


def many_rows(encoded, count, num_steps):
    """Encoded rows repeated, all with the same number of steps."""
    return replace(
        encoded,
        num_steps=np.full(count, num_steps),
        steps_from=np.zeros((count, 9), np.int64),
        question_length=np.ones(count, np.int64),
        answer_length=np.ones(count, np.int64),
    )


def test_uniform_prob_frequencies(encoded, tokens):
    """A fifth of the rows, spread evenly over the stages 0 to 4 of a four-step chain."""
    stages = uniform(many_rows(encoded, 20_000, 4), tokens, 0.2)
    frequency = np.bincount(stages, minlength=5) / 20_000
    assert np.allclose(frequency, [0.04, 0.04, 0.84, 0.04, 0.04], atol=0.008)
    assert (uniform(many_rows(encoded, 100, 4), tokens, 0.0) == 2).all()
    assert (uniform(many_rows(encoded, 100, 0), tokens, 1.0) == 0).all()


def test_uniform_prob_draws_from_all_stages_of_the_chain_where_latents_come_one_by_one(
    encoded, tokens
):
    curriculum = Curriculum(latent_growth="one", c_thought=2)
    data = StageDataset(many_rows(encoded, 20_000, 2), curriculum, tokens, 6, uniform_prob=1.0)
    assert np.allclose(np.bincount(data.stages) / 20_000, [0.2] * 5, atol=0.012)


def mixed(encoded, tokens, stage_mixing, stage=3, **changes):
    arguments = {"seed": 0, "epoch": 1, "stage_mixing": stage_mixing, **changes}
    return StageDataset(encoded, Curriculum(), tokens, stage, **arguments)


MIXTURES = [
    ("uniform", 3, [0.25, 0.25, 0.25, 0.25]),
    ("linear", 3, [0.1, 0.2, 0.3, 0.4]),
    ("linear", 4, [1 / 15, 2 / 15, 3 / 15, 4 / 15, 5 / 15]),  # the paper's extra stage too
    ("uniform", 0, [1]),
    ("linear", 0, [1]),
    ("none", 3, [0, 0, 0, 1]),
]


@pytest.mark.parametrize("stage_mixing, stage, expected", MIXTURES)
def test_stage_mixing_frequencies(encoded, tokens, stage_mixing, stage, expected):
    """Of every stage up to the epoch's own, whatever the length of the chain."""
    for num_steps in (0, 4):
        data = mixed(many_rows(encoded, 20_000, num_steps), tokens, stage_mixing, stage)
        frequency = np.bincount(data.stages, minlength=stage + 1) / 20_000
        assert np.allclose(frequency, expected, atol=0.012)


def test_mixed_rows_are_those_of_their_stage(encoded, tokens):
    data = mixed(encoded, tokens, "linear")
    assert len(set(data.stages.tolist())) == 4
    alone = [StageDataset(encoded, Curriculum(), tokens, stage) for stage in range(4)]
    for row, stage in enumerate(data.stages):
        for ours, theirs in zip(data[row], alone[stage][row]):
            assert np.array_equal(ours, theirs)
        assert data.total_length[row] == alone[stage].total_length[row]


def test_stage_mixing_draws_depend_on_seed_and_epoch_and_row_only(encoded, tokens):
    first = mixed(encoded, tokens, "linear").stages
    np.random.seed(5)
    assert (mixed(encoded, tokens, "linear").stages == first).all()
    assert (mixed(encoded, tokens, "linear", seed=1).stages != first).any()
    assert (mixed(encoded, tokens, "linear", epoch=2).stages != first).any()
    assert (mixed(encoded.select(np.arange(9)), tokens, "linear").stages == first[:9]).all()


# ------------------------------------------------------------------------------- batches


def naive_collate(samples, pad_id, align_end):
    """Row by row on Python lists, the columns found by looking."""
    with_latents = [s.first_latent for s in samples if s.num_fed_back]
    longest = max(len(s.input_ids) for s in samples)
    rows = []
    for s in samples:
        left = max(with_latents) - s.first_latent if with_latents and s.num_fed_back else 0
        left = longest - len(s.input_ids) if align_end else left
        rows.append((left, s))
    width = max(left + len(s.input_ids) for left, s in rows)
    table = {name: [] for name in ("input_ids", "attention_mask", "position_ids", "labels")}
    for left, s in rows:
        n = len(s.input_ids)
        right = width - left - n
        table["input_ids"].append([pad_id] * left + s.input_ids.tolist() + [pad_id] * right)
        table["attention_mask"].append([0] * left + [1] * n + [0] * right)
        table["position_ids"].append([0] * left + list(range(n)) + [n - 1] * right)
        table["labels"].append([IGNORED] * left + s.labels.tolist() + [IGNORED] * right)
    return {name: torch.tensor(rows) for name, rows in table.items()}


def mixed_samples(encoded, tokens, numbers=(0, 3, 6, 0)):
    """Samples whose rows have these numbers of latents."""
    return [
        StageDataset(encoded, Curriculum(), tokens, 2, num_latents=n)[3 * i]
        for i, n in enumerate(numbers)
    ]


NUMBERS = [(0, 3, 6, 0), (2, 2, 2), (0, 0), (1,), (12, 1, 0), (0, 0, 5)]


@pytest.mark.parametrize("align_end", [False, True])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_collate_is_the_naive_one(encoded, tokens, numbers, align_end):
    samples = mixed_samples(encoded, tokens, numbers)
    batch = collate(samples, 1, align_end)
    for name, tensor in naive_collate(samples, 1, align_end).items():
        assert torch.equal(getattr(batch, name), tensor), name
        assert getattr(batch, name).dtype == torch.int64


@pytest.mark.parametrize("numbers", NUMBERS)
def test_first_latents_share_a_column(encoded, tokens, numbers):
    batch = collate(mixed_samples(encoded, tokens, numbers), 1)
    firsts = {row.nonzero()[0].item() for row in batch.input_ids == tokens.latent if row.any()}
    assert len(firsts) <= 1
    columns = (batch.input_ids == tokens.latent).any(0).nonzero().flatten().tolist()
    expected = (columns[0], columns[-1] + 1) if columns else (0, 0)
    assert batch.latent_columns == expected
    assert expected[1] - expected[0] == max(numbers)


def test_rows_without_latents_cost_no_padding_on_the_left(encoded, tokens):
    batch = collate(mixed_samples(encoded, tokens, (0, 3, 6, 0)), 1)
    assert batch.attention_mask[0, 0] == 1 and batch.attention_mask[3, 0] == 1


def test_label_index_are_the_positions_before_labels(encoded, tokens):
    batch = collate(mixed_samples(encoded, tokens), 1)
    rows, columns = (batch.labels != IGNORED).nonzero(as_tuple=True)
    width = batch.labels.shape[1]
    assert batch.label_index.tolist() == (rows * width + columns - 1).tolist()
    # and each of them stands in its own row, on a real token
    assert batch.attention_mask.flatten()[batch.label_index].all()


def test_align_end_ends_in_the_last_column(encoded, tokens):
    batch = collate(mixed_samples(encoded, tokens), 1, align_end=True)
    assert batch.attention_mask[:, -1].all()
    assert (batch.attention_mask.diff() >= 0).all()  # padding on the left only
