"""engine/evaluation.py: intervals, the rows of a rank, figures, the validation loss, the files."""

import json

import pytest
import torch
from conftest import tiny_model, tiny_rows
from numerics import assert_same, exact

from coconut import Coconut, add_latent_tokens
from curriculum import Curriculum
from dataset import LatentTokens, StageDataset
from engine.distributed import World
from engine.encoding import encode_rows
from engine.evaluation import (
    Evaluation,
    Evaluator,
    _judge,
    batches_of_rank,
    summarise,
    table,
    wilson_interval,
)
from engine.results import NUM_EXAMPLES, RESULTS, results_name, write_results
from utils import Method

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    "successes, total, low, high",
    [
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (1, 1, 0.206549, 1.0),
        (81, 263, 0.255248, 0.366197),  # Newcombe 1998, table I: 0.2553 to 0.3662
        (15, 148, 0.062386, 0.160541),  # 0.0624 to 0.1605
        (1, 29, 0.006113, 0.171755),  # 0.0061 to 0.1718
    ],
)
def test_wilson_interval(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=6e-5)


def test_a_rate_never_lies_outside_its_interval():
    """All of 4 rows right: rounding put the upper end below 1, and a picture with error bars of
    such figures ended in a traceback."""
    for total in range(1, 60):
        for successes in range(total + 1):
            low, high = wilson_interval(successes, total)
            assert 0 <= low <= successes / total <= high <= 1


# ------------------------------------------------------------------------------- parts


@pytest.fixture
def parts(tokenizer, tmp_path):
    """The markers, eleven rows, and a function that makes their dataset at a stage."""
    tokens = LatentTokens(*add_latent_tokens(tokenizer))
    rows = tiny_rows(11, seed=5)
    encoded = encode_rows(rows, tokenizer, list(tokens), tmp_path / "cache", "rows")

    def dataset(stage=1, method=Method.COCONUT, **keys):
        curriculum = Curriculum(method=method, pad_latent_to_max=True)
        markers = tokens if method is Method.COCONUT else None
        return StageDataset(encoded, curriculum, markers, stage, **keys)

    return tokens, rows, dataset


@pytest.fixture
def model(parts, tokenizer):
    """In float64: what it writes depends on no rounding, and thus not on the batch."""
    tokens = parts[0]
    ids = (tokens.latent, tokens.start, tokens.end)
    return Coconut(exact(tiny_model("qwen3")), *ids, tokenizer.eos_token_id)


def make_evaluator(tokenizer, world=ALONE, batch_size=4) -> Evaluator:
    return Evaluator(
        tokenizer=tokenizer,
        world=world,
        pad_id=tokenizer.pad_token_id,
        batch_size=batch_size,
        max_new_tokens=6,
        compute_dtype=torch.float64,
    )


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 13])
def test_each_row_is_on_exactly_one_rank(parts, world_size, batch_size):
    """The ancestor's padded sampler evaluated some rows twice."""
    dataset = parts[2]()
    batches = [
        batch
        for rank in range(world_size)
        for batch in batches_of_rank(dataset, World(rank, world_size, ALONE.device), batch_size)
    ]
    assert sorted(row for batch in batches for row in batch) == list(range(11))
    assert all(0 < len(batch) <= batch_size for batch in batches)


def test_the_ranks_together_give_what_one_process_gives(parts, model, tokenizer):
    """Every rank's share by itself, put together by hand."""
    dataset = parts[2]()
    _, expected = make_evaluator(tokenizer, batch_size=1).evaluate(model, dataset)
    together = []
    for rank in range(3):
        evaluator = make_evaluator(tokenizer, World(rank, 3, ALONE.device))
        together += evaluator.evaluate(model, dataset)[1]
    assert sorted(together, key=lambda result: result["row"]) == expected


# ------------------------------------------------------------------------------- figures


def judged(tokenizer, text: str, skipped=0, eos=True, steps=("<<1+1=2>>", "<<2+1=3>>")):
    row = {"question": "How many?", "steps": list(steps), "answer": "3"}
    new = tokenizer.encode(text) + [tokenizer.eos_token_id] * eos
    return _judge(row, tokenizer.encode("How many?\n"), new, tokenizer, skipped)


@pytest.mark.parametrize(
    "text, skipped, match, correct",
    [
        ("<<1+1=2>>\n<<2+1=3>>\n### 3", 0, True, True),
        ("<<2+1=3>>\n### 3", 1, True, True),
        ("<<1+1=2>>\n<<2+1=3>>\n### 3", 1, False, True),
        ("<<2+1=3>>\n### 4", 1, True, False),
        ("<<2+1=3>>", 1, True, False),
        ("### 3", 1, False, True),
        ("### 3", 2, None, True),
        ("<<1+1=2>>\n <<2+1=3>> \n### 3\n### 4", 0, True, True),
        ("<<2+1=3>>\n### 3", 2, None, True),
    ],
)
def test_written_steps_are_compared_with_the_ones_left_to_write(
    tokenizer, text, skipped, match, correct
):
    result = judged(tokenizer, text, skipped)
    assert (result["cot_match"], result["correct"]) == (match, correct)


def test_the_end_token_is_not_counted_and_not_seen(tokenizer):
    count = len(tokenizer.encode("### 3"))
    assert judged(tokenizer, "### 3")["new_tokens"] == count
    assert judged(tokenizer, "### 3", eos=False)["new_tokens"] == count
    assert judged(tokenizer, "### 3")["answer"] == "3"
    assert judged(tokenizer, "", eos=True)["new_tokens"] == 0


def test_markers_vanish_from_what_is_judged_and_stay_in_what_is_shown(tokenizer):
    """As ordinary tokens, the ancestor's markers polluted the extracted text."""
    add_latent_tokens(tokenizer)
    result = judged(tokenizer, "<|end-latent|>### <|latent|>3")
    assert result["answer"] == "3" and result["correct"]
    assert result["output"] == "How many?\n<|end-latent|>### <|latent|>3<|end|>"


def result(correct, match, new_tokens, latents=2):
    return {
        "correct": correct,
        "cot_match": match,
        "new_tokens": new_tokens,
        "num_latents": latents,
    }


def test_summarise():
    results = [
        result(True, True, 3),
        result(False, False, 5),
        result(True, None, 10, latents=6),
        result(False, False, 6),
    ]
    actual = summarise(results, seconds=8.0)
    low, high = wilson_interval(2, 4)
    assert actual == Evaluation(
        latents="2-6",
        accuracy=0.5,
        accuracy_low=low,
        accuracy_high=high,
        cot_match=1 / 3,
        cot_rows=3,
        rows=4,
        new_tokens=6.0,
        seconds_per_row=2.0,
    )
    assert "CoT match 33.3% of 3 rows" in actual.line() and "of 4 rows" in actual.line()
    assert "| 2-6 | 50.0% | 15.0% to 85.0% | 33.3% of 3 | 6.0 | 2.000 |" in table([actual])


def test_no_row_has_steps_left():
    actual = summarise([result(True, None, 3)], seconds=1.0)
    assert (actual.cot_match, actual.cot_rows, actual.latents) == (None, 0, "2")
    assert "CoT match -," in actual.line() and "| - |" in table([actual])


@pytest.mark.parametrize("stage, forced, latents", [(0, None, 0), (2, None, 4), (2, 3, 3)])
def test_new_tokens_count_the_latents(parts, model, tokenizer, stage, forced, latents):
    _, rows, dataset = parts
    data = dataset(stage, num_latents=forced)
    figures, results = make_evaluator(tokenizer).evaluate(model, data)
    assert {r["num_latents"] for r in results} == {latents} and figures.rows == len(rows)
    for r in results:
        prompt = torch.tensor(data.question(r["row"]).input_ids)[None]
        (new,) = model.generate(prompt, torch.ones_like(prompt), 6)
        assert r["output"] == tokenizer.decode([*prompt[0], *new])
        assert r["new_tokens"] == latents + int((new != tokenizer.eos_token_id).sum())
        written = int((new == model.latent_token_id).sum())
        assert r["output"].count("<|latent|>") == latents + written
    left = sum(len(row["steps"]) > stage for row in rows)
    assert figures.cot_rows == left
    assert figures.new_tokens == sum(r["new_tokens"] for r in results) / len(rows)


def test_results_do_not_depend_on_the_batch_size(parts, model, tokenizer):
    _, rows, dataset = parts
    evaluators = [make_evaluator(tokenizer, batch_size=number) for number in (1, 4, 99)]
    runs = [evaluator.evaluate(model, dataset(2))[1] for evaluator in evaluators]
    assert runs[0] == runs[1] == runs[2]
    assert [r["question"] for r in runs[0]] == [row["question"] for row in rows]


# ------------------------------------------------------------------------------- validation loss


def test_rows_are_answered_without_dropout(parts, model, tokenizer):
    """By the gate too, which comes right after training."""
    model.train()
    assert make_evaluator(tokenizer).evaluate(model, parts[2]()) is not None
    assert not any(module.training for module in model.modules())


@torch.no_grad()
def naive_loss(model, dataset) -> float:
    """The mean over all labelled tokens, row by row, from the whole logits."""
    total, count = 0.0, 0
    for row in range(len(dataset)):
        sample = dataset[row]
        ids, labels = torch.tensor(sample.input_ids)[None], torch.tensor(sample.labels)
        output = model(
            ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None], return_logits=True
        )
        chosen = labels[1:] != -100
        losses = torch.nn.functional.cross_entropy(
            output.logits[0, :-1][chosen].double(), labels[1:][chosen], reduction="none"
        )
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count


@pytest.mark.parametrize("stage", [0, 2])
def test_validation_loss_is_the_mean_over_tokens(parts, model, tokenizer, stage):
    """The ancestor's was a mean of batch means: it depended on the batch size."""
    dataset = parts[2](stage)
    expected = naive_loss(model, dataset)
    for batch_size in (1, 2, 4, 11, 50):
        loss = make_evaluator(tokenizer, batch_size=batch_size).loss(model, dataset)
        assert_same(loss, expected)
    batches = [dataset.num_labels[[0, 1, 2]].sum(), dataset.num_labels[[3, 4]].sum()]
    assert batches[0] / 3 != batches[1] / 2  # or the two kinds of mean could not be told apart


# ------------------------------------------------------------------------------- files


def test_the_examples_file_shows_all_there_is_to_see(parts, model, tokenizer, tmp_path):
    _, rows, dataset = parts
    _, results = make_evaluator(tokenizer).evaluate(model, dataset(1))
    results[1].update(correct=True, answer="7", steps=["a", "b"])
    write_results(tmp_path, "epoch 3, stage 1, 2 latents", "results_epoch_3", results)
    text = (tmp_path / "validation_examples.txt").read_text()
    assert text.count("epoch 3, stage 1, 2 latents\n") == 1
    assert text.count("question:  ") == NUM_EXAMPLES < len(rows)
    blocks = text.split("\nrow ")[1:]
    for number, (block, row) in enumerate(zip(blocks, rows)):
        verdict = "RIGHT" if results[number]["correct"] else "WRONG"
        assert block.startswith(f"{number}: {verdict}, 2 latents, ")
        assert f"question:         {row['question']}\n" in block
        assert f"gold steps:       {' '.join(row['steps']) or '(none)'}\n" in block
        assert f"gold answer:      {row['answer']}\n" in block
        prompt = f"{row['question']}\n<|start-latent|><|latent|><|latent|><|end-latent|>"
        assert f"full output:\n{prompt}" in block
    assert "extracted steps:  a b\nextracted answer: 7\n" in blocks[1]
    unanswered = next(n for n, r in enumerate(results[:NUM_EXAMPLES]) if r["answer"] is None)
    assert "extracted answer: (none)\n" in blocks[unanswered]


def test_all_rows_go_to_the_results_file_and_examples_are_appended(
    tmp_path, parts, model, tokenizer
):
    _, rows, dataset = parts
    _, results = make_evaluator(tokenizer).evaluate(model, dataset())
    for epoch in (1, 2, 2):
        write_results(tmp_path, f"epoch {epoch}", f"results_epoch_{epoch}", results)
    lines = (tmp_path / "results_epoch_2.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == results
    assert (tmp_path / "validation_examples.txt").read_text().count("\nepoch ") == 3


@pytest.mark.parametrize("number", [None, 0, 12])
@pytest.mark.parametrize("eval_set", [None, "gsm_hard", "a_epoch_3"])
def test_the_name_of_a_results_file_says_what_it_holds(number, eval_set):
    read = RESULTS.fullmatch(results_name(6, number, eval_set) + ".jsonl")
    latents = None if number is None else str(number)
    assert read.groupdict() == {"eval_set": eval_set, "epoch": "6", "latents": latents}
