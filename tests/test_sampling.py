"""engine/sampling.py, engine/partial.py: draws, what they depend on, pass@k and majorities; an
evaluation that goes on after a kill."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, tiny_model, tiny_rows
from numerics import assert_same, exact
from scipy.stats import chi2
from test_coconut import left_padded, naive_forward, never, prompts, tiny
from transformers import PreTrainedTokenizerFast

from coconut import Coconut, add_latent_tokens
from curriculum import Curriculum
from dataset import LatentTokens, StageDataset
from engine.distributed import World, close_processes
from engine.encoding import encode_rows
from engine.evaluation import Evaluator, summarise, table
from engine.partial import PartialResults
from engine.sampling import (
    Sampled,
    Sampling,
    draw,
    equal_answers,
    majority_at_k,
    pass_at_k,
    summarise_samples,
)
from engine.text import DEFAULT, TextFormat
from utils import derive_seed

sys.path.append(str(ROOT / "benchmarks"))
from collectives import open_pair

ALONE = World(0, 1, torch.device("cpu"))
EOS = 7  # of the random models, as likely as other tokens
DRAWS = [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.5), (1.0, 1e-3)]
settings = pytest.mark.parametrize("temperature, top_p", DRAWS)


def naive_probabilities(logits, temperature: float, top_p: float) -> dict[int, float]:
    """The definition of nucleus sampling: by token, the most probable first."""
    p = (logits.double() / temperature).exp()
    ranked = sorted(enumerate((p / p.sum()).tolist()), key=lambda pair: -pair[1])
    kept, mass = {}, 0.0
    for token, share in ranked:
        if mass >= top_p:
            break
        kept[token], mass = share, mass + share
    return {token: share / mass for token, share in kept.items()}


def naive_draw(logits, place: float, temperature: float, top_p: float) -> int:
    """The token whose share of [0, 1), in that order, holds the place."""
    shares = naive_probabilities(logits, temperature, top_p)
    upto = itertools.accumulate(shares.values())
    return next(token for token, end in zip(shares, upto) if place < end)


# ------------------------------------------------------------------------------- draws


@settings
def test_draws_have_the_definitions_distribution(temperature, top_p):
    """At 20,001 places of [0, 1), evenly spaced, every token comes as often as it is probable."""
    count, generator = 20_001, torch.Generator().manual_seed(0)
    logits = torch.randn(30, generator=generator)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(logits.expand(count, -1), places, temperature, top_p)
    wanted = naive_probabilities(logits, temperature, top_p)
    assert len(wanted) == 1 if top_p == 1e-3 else len(wanted) > 3
    found = Counter(drawn.tolist())
    assert found.keys() <= wanted.keys()
    assert all(abs(found[token] / count - share) <= 1 / count for token, share in wanted.items())


def test_the_lowest_temperature_is_greedy_and_what_is_no_number_ends_no_run():
    """Both ended in a traceback: the share of every token was none."""
    logits, places = torch.tensor([[0.5, 3.0, 2.9]] * 3), torch.tensor([0.0, 0.5, 1 - 1e-12])
    assert draw(logits, places.double(), 1e-308, 1.0).tolist() == [1, 1, 1]
    diverged = torch.full((2, 5), torch.nan)
    assert set(draw(diverged, torch.tensor([0.0, 0.9]).double(), 0.7, 0.9).tolist()) <= set(
        range(5)
    )


def test_ties_and_tokens_that_cannot_come():
    logits = torch.tensor([[0.0, 1.0, 1.0, -torch.inf]]).expand(4, -1)
    places = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, places, 1.0, 0.5).tolist() == [1, 1, 2, 2]
    assert draw(logits, places, 1.0, 1.0).tolist() == [1, 2, 2, 0]


@torch.no_grad()
def naive_sample(base, ids, seed: tuple, limit: int, temperature: float, top_p: float) -> list[int]:
    """One sample of one row, everything run again for every token."""
    places = np.random.default_rng(derive_seed(*seed)).random(limit)
    new: list[int] = []
    while len(new) < limit and EOS not in new:
        sequence = torch.cat([ids, torch.tensor(new, dtype=torch.long)])
        logits = naive_forward(base, sequence, len(ids))[0][-1]
        new.append(naive_draw(logits, places[len(new)], temperature, top_p))
    return new


@settings
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_samples_are_the_definitions(family, temperature, top_p):
    """With latents, beside rows of other lengths, over the prompt's expanded cache, up to eos."""
    base, sampling = tiny(family), Sampling(3, temperature, top_p, seed=5)
    model = Coconut(base, *(never(base).latent_token_id, None, None), EOS)
    rows = [4, 0, 9, 2, 7]  # what their data set calls them
    choose = sampling.chooser(rows, range(1, 3), 6, ALONE.device)
    actual = model.generate(
        **left_padded(prompts()), max_new_tokens=6, num_samples=2, choose=choose
    )
    wanted = [
        naive_sample(base, ids, (5, "sample", row, sample), 6, temperature, top_p)
        for row, ids in zip(rows, prompts())
        for sample in (1, 2)
    ]
    assert [new.tolist() for new in actual] == wanted
    if top_p > 0.1:
        assert len({tuple(new) for new in wanted}) == len(wanted)


def test_first_tokens_of_many_samples_pass_a_chi_square_test():
    """With the seeds that a run has, not with places chosen here."""
    base, count, ids = tiny("qwen3"), 4000, prompts()[0]
    sampling = Sampling(count, 1.5, 0.8, seed=0)
    choose = sampling.chooser([3], range(count), 1, ALONE.device)
    new = never(base).generate(
        **left_padded([ids]), max_new_tokens=1, num_samples=count, choose=choose
    )
    with torch.no_grad():
        wanted = naive_probabilities(naive_forward(base, ids)[0][-1], 1.5, 0.8)
    found = Counter(torch.stack(new).flatten().tolist())
    assert found.keys() <= wanted.keys() and len(wanted) > 20
    expected = {token: share * count for token, share in wanted.items()}
    statistic = sum((found[token] - n) ** 2 / n for token, n in expected.items())
    assert statistic < chi2.ppf(0.999, len(wanted) - 1)


def test_a_greedy_completion_is_what_it_was():
    """Samples at hardly any temperature are the greedy completion, each of them."""
    model, generate = never(tiny("qwen3")), dict(**left_padded(prompts()), max_new_tokens=5)
    greedy = [new.tolist() for new in model.generate(**generate)]
    choose = Sampling(2, 1e-4, 1.0, 0).chooser([*range(5)], range(2), 5, ALONE.device)
    sampled = [new.tolist() for new in model.generate(**generate, num_samples=2, choose=choose)]
    assert sampled == [new for new in greedy for _ in range(2)]


# ------------------------------------------------------------------------------- evaluations


def make_parts(tokenizer, folder: Path, world=ALONE, batch_size=4, num_samples=3):
    """An evaluator, a model in float64 and seven rows at stage 1."""
    tokens = LatentTokens(*add_latent_tokens(tokenizer))
    rows = encode_rows(tiny_rows(7, seed=5), tokenizer, list(tokens), folder / "cache", "rows")
    ids = (tokens.latent, tokens.start, tokens.end)
    model = Coconut(exact(tiny_model("qwen3")), *ids, tokenizer.eos_token_id)
    evaluator = Evaluator(
        tokenizer=tokenizer,
        world=world,
        pad_id=tokenizer.pad_token_id,
        batch_size=batch_size,
        max_new_tokens=5,
        compute_dtype=torch.float64,
        sampling=Sampling(num_samples, 1.0, 0.9, seed=1) if num_samples else None,
    )
    return evaluator, model, StageDataset(rows, Curriculum(), tokens, 1)


@pytest.fixture
def parts(tokenizer, tmp_path):
    return lambda **keys: make_parts(tokenizer, tmp_path, **keys)


@pytest.fixture
def results(parts) -> list[dict]:
    evaluator, model, dataset = parts()
    return evaluator.evaluate(model, dataset)[1]


def test_greedy_results_are_those_without_samples(parts, results):
    evaluator, model, dataset = parts(num_samples=0)
    figures, greedy = evaluator.evaluate(model, dataset)
    assert [{k: v for k, v in r.items() if k != "samples"} for r in results] == greedy
    assert figures.sampled is None and "sampled" not in figures.record()


def test_a_sample_has_what_is_judged(results, parts):
    """Its text, its answer, its length with the latents."""
    evaluator, model, dataset = parts()
    assert len({s["completion"] for r in results for s in r["samples"]}) == 7 * 3
    choose = evaluator.sampling.chooser([2], range(3), 5, ALONE.device)
    prompt = torch.tensor(dataset.question(2).input_ids)[None]
    new = model.generate(prompt, torch.ones_like(prompt), 5, num_samples=3, choose=choose)
    for sample, tokens in zip(results[2]["samples"], new):
        assert sample["completion"] == evaluator.tokenizer.decode(tokens, skip_special_tokens=True)
        written = int((tokens != evaluator.tokenizer.eos_token_id).sum())
        assert sample["new_tokens"] == dataset.num_latents[2] + written
        assert (sample["answer"], sample["correct"]) == (None, False)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_samples_do_not_depend_on_the_batch(parts, results, batch_size):
    """Fewer rows together than samples of a row, more, and all at once."""
    evaluator, model, dataset = parts(batch_size=batch_size)
    assert evaluator.evaluate(model, dataset)[1] == results


def test_more_samples_begin_with_the_same_ones(parts, results):
    evaluator, model, dataset = parts(num_samples=5)
    more = evaluator.evaluate(model, dataset)[1]
    assert [r["samples"][:3] for r in more] == [r["samples"] for r in results]


# ------------------------------------------------------------------------------- after a kill


class Killed(BaseException):
    """Imitates SIGKILL: nothing in the program catches it."""


def evaluate_until(folder: Path, parts, calls: int | None, torn=False, world=ALONE):
    """Evaluate with partial results in the folder; die after so many batches."""
    evaluator, model, dataset = parts
    partial, generate = PartialResults(folder, world, {"of": "this"}), model.generate

    def deadly(*args, **kwargs):
        nonlocal calls
        if calls is not None and (calls := calls - 1) < 0:
            raise Killed
        return generate(*args, **kwargs)

    model.generate = deadly
    try:
        return evaluator.evaluate(model, dataset, partial, "part")
    except Killed:
        if torn:
            (path,) = folder.glob("partial_results_*_0.jsonl")
            path.write_bytes(path.read_bytes()[:-9])
    finally:
        model.generate = generate


@pytest.mark.parametrize("torn", [False, True])
def test_an_evaluation_goes_on_after_every_batch(parts, results, tmp_path, torn):
    """Two batches of greedy completions, seven of samples; each process dies after one more."""
    for _ in range(30):
        outcome = evaluate_until(tmp_path, parts(), 2 if torn else 1, torn)
        if outcome is not None:
            break
    assert outcome[1] == results
    assert outcome[0].sampled == summarise_samples([r["samples"] for r in results], DEFAULT)
    assert evaluate_until(tmp_path, parts(), 0)[1] == results  # nothing is run again
    PartialResults(tmp_path, ALONE, {"of": "this"}).remove()
    assert list(tmp_path.glob("partial_*")) == []


def test_an_evaluation_and_what_another_one_leaves(tmp_path):
    """Going on, it records anew what it has recorded. But where another one has begun since,
    nothing is cut, and the results of both stay."""
    growing = tmp_path / "metrics.jsonl"
    growing.write_text("old\n")
    first = PartialResults(tmp_path, ALONE, {"seed": 0}, ("metrics.jsonl", "not there"))
    first.add("part", [{"row": 3, "correct": True}])
    growing.write_text("old\nnew\n")
    again = PartialResults(tmp_path, ALONE, {"seed": 0}, ("metrics.jsonl",))
    assert again.known("part") == {3: {"row": 3, "correct": True}} and again.known("x") == {}
    assert growing.read_text() == "old\n"
    growing.write_text("old\nnew\n")
    other = PartialResults(tmp_path, ALONE, {"seed": 1}, ("metrics.jsonl",))
    assert other.known("part") == {} and growing.read_text() == "old\nnew\n"
    growing.write_text("old\nnew\nother\n")
    other.remove()
    again = PartialResults(tmp_path, ALONE, {"seed": 0}, ("metrics.jsonl",))
    assert again.known("part").keys() == {3} and growing.read_text() == "old\nnew\nother\n"
    again.remove()
    assert [*tmp_path.iterdir()] == [growing]


@pytest.mark.parametrize("damage", [b"", b'{"part": "pa', b"\0\0\0\n", b"\xff\n"])
def test_what_stands_before_a_damaged_line_is_taken(tmp_path, damage):
    PartialResults(tmp_path, ALONE, {}).add("part", [{"row": 0}])
    (path,) = tmp_path.glob("partial_results_*_0.jsonl")
    path.write_bytes(path.read_bytes() + damage)
    again = PartialResults(tmp_path, ALONE, {})
    assert again.known("part") == {0: {"row": 0}}
    again.add("part", [{"row": 1}])
    assert [*PartialResults(tmp_path, ALONE, {}).known("part")] == [0, 1]
    path.write_bytes(damage)
    assert PartialResults(tmp_path, ALONE, {}).known("part") == {}


def worker(rank: int, port: int, tokenizer_folder: Path, folder: Path) -> None:
    """One of two processes: a whole evaluation, then one that dies after a batch each."""
    world = open_pair(rank, port, patience=120)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    parts = make_parts(tokenizer, folder / str(rank), world, batch_size=2)
    outcome = parts[0].evaluate(parts[1], parts[2])
    if outcome is not None:
        (folder / "results.json").write_text(json.dumps(outcome[1]))
    assert evaluate_until(folder, parts, 1, world=world) is None
    close_processes()


@pytest.mark.slow
def test_two_processes(results, parts, tokenizer_folder, tmp_path):
    """They give what one gives; where both die after a batch, one process goes on from both."""
    port = free_port()
    torch.multiprocessing.spawn(worker, (port, tokenizer_folder, tmp_path), nprocs=2)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert len(list(tmp_path.glob("partial_results_*"))) == 2
    assert len(PartialResults(tmp_path, ALONE, {"of": "this"}).known("part")) == 4
    assert evaluate_until(tmp_path, parts(batch_size=2), None)[1] == results


# ------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("count", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(count):
    for correct, k in itertools.product(range(count + 1), range(1, count + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (count - correct), k))
        assert_same(pass_at_k(count, correct, k), sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    "answers, gold, right",
    [
        (["3"], "3", [True]),
        ([None], "3", [False]),
        (["4", "3", "3.0"], "3", [False, False, True]),
        (["3", "4"], "3", [True, True]),  # a tie: the first one seen
        (["4", "3"], "3", [False, False]),
        (["4", "3", "$3", "4.0", "+3"], "3", [False, False, True, False, True]),
        ([None, None, "3"], "3", [False, False, True]),  # who says nothing does not vote
        (["x", "X", "x"], "x", [True, True, True]),
        (["1,800", "18", "1800.00"], "1800", [True, True, True]),
    ],
)
def test_majority(answers, gold, right):
    places = equal_answers(answers, DEFAULT)
    correct = [DEFAULT.same_answer(answer, gold) for answer in answers]
    assert [majority_at_k(places, correct, k + 1) for k in range(len(answers))] == right


def test_equal_answers_are_those_that_the_judge_calls_equal():
    choice = TextFormat(kind="choice")
    assert equal_answers(["b", "(B) because", None, "a", "b"], choice) == [0, 0, None, 3, 0]
    assert equal_answers(["b", "(B) because", None, "a", "b"], DEFAULT) == [0, 1, None, 3, 0]


def test_many_answers_are_read_once_each(monkeypatch):
    """Each answer's value, not one for every pair of them."""
    calls, value = [], TextFormat.value
    monkeypatch.setattr(TextFormat, "value", lambda *args: calls.append(args) or value(*args))
    answers = [str(n % 150) for n in range(200)]
    assert equal_answers(answers, DEFAULT) == [n % 150 for n in range(200)]
    assert len(calls) == len(answers)


def test_summarise_samples():
    sample = lambda answer, tokens: dict(answer=answer, correct=answer == "3", new_tokens=tokens)
    first = [sample("3", 1), sample("4", 2), sample("4", 3), sample("3", 4), sample("4", 5)]
    second = [sample(None, 5)] * 5
    actual = summarise_samples([first, second], DEFAULT)
    assert actual == Sampled(
        num_samples=5,
        pass_at={1: 0.2, 2: (1 - 3 / 10) / 2, 4: 0.5, 5: 0.5},
        majority_at={1: 0.5, 2: 0.5, 4: 0.5, 5: 0.0},
        new_tokens=4.0,
    )
    assert actual.line() == (
        "5 samples a row: pass@1 20.0%, pass@2 35.0%, pass@4 50.0%, pass@5 50.0%, "
        "majority@2 50.0%, majority@4 50.0%, majority@5 0.0%, 4.0 new tokens"
    )


def test_the_table_has_a_column_for_every_figure():
    greedy = dict(row=0, correct=True, cot_match=None, new_tokens=3, num_latents=2)
    figures = summarise([greedy], seconds=1.0)
    assert table([figures]).splitlines()[2] == (
        "| 2 | 100.0% | 20.7% to 100.0% | - | 3.0 | 1.000 | 1 |"
    )
    figures.sampled = Sampled(2, {1: 0.5, 2: 1.0}, {1: 1.0, 2: 1.0}, 3.0)
    head, rule, line = table([figures], ["svamp"]).splitlines()
    assert head == (
        "| set | latents | accuracy | 95% interval | CoT match | new tokens | seconds per row "
        "| rows | pass@1 | pass@2 | majority@2 |"
    )
    assert rule == "|---" * 11 + "|"
    assert line.startswith("| svamp | 2 | ") and line.endswith(" | 1 | 50.0% | 100.0% | 100.0% |")
