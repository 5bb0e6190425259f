"""engine/health.py: the figures of the thoughts against their definition, and who gets them."""

import logging
import math

import pytest
import torch
from conftest import ROOT, tiny_model
from numerics import exact
from soak import history
from test_loop import THREE_STEPS, train

from coconut import Coconut
from curriculum import Curriculum
from dataset import StageDataset, collate
from engine.checkpoint import TrainState, find_checkpoints
from engine.distributed import World
from engine.evaluation import Evaluator
from engine.health import Thoughts, warn_of_collapse

ALONE = World(0, 1, torch.device("cpu"))
FIGURES = {
    "latent_norms",
    "latent_distance",
    "latent_from_centre",
    "latent_digits",
    "latent_operators",
}


def naive_figures(states: list[torch.Tensor], model, tokenizer) -> dict:
    """Of the thoughts of each row, (latents, D), with loops."""
    base = model.base_causallm
    centre = base.get_input_embeddings().weight[: len(tokenizer)].mean(0)
    thoughts = [h for row in states for h in row]
    most = max(map(len, states))
    norms = [[row[k].norm() for row in states if len(row) > k] for k in range(most)]
    pairs = [(row[i] - row[j]).norm() for row in states for i in range(len(row)) for j in range(i)]
    words = [tokenizer.decode([base.lm_head(h).argmax().item()]).strip() for h in thoughts]
    mean = lambda values: float(sum(values) / len(values))
    return {
        "latent_norms": [mean(values) for values in norms],
        "latent_distance": mean(pairs),
        "latent_from_centre": mean([(h - centre).norm() for h in thoughts]),
        "latent_digits": mean(
            [word != "" and all(c in "0123456789" for c in word) for word in words]
        ),
        "latent_operators": mean(
            [word != "" and all(c in "+-*/=<>" for c in word) for word in words]
        ),
    }


def make_evaluator(tokenizer, batch_size=40) -> Evaluator:
    pad, dtype = tokenizer.pad_token_id, torch.float64
    return Evaluator(tokenizer, ALONE, pad, batch_size, max_new_tokens=2, compute_dtype=dtype)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
@torch.no_grad()
def test_figures_are_the_definition(tokenizer, tokens, encoded, batch_size):
    """On rows with 0 to 4 latents, in any batches, from the passes of the validation loss. The
    head favours digits and operators, or there would be none to count."""
    base = exact(tiny_model("llama"))
    model = Coconut(base, tokens.latent, eos_token_id=tokenizer.eos_token_id)
    favoured = tokenizer.convert_tokens_to_ids(["7", "+", "<<", "T"])
    base.lm_head.weight[favoured] *= 4
    data = StageDataset(encoded, Curriculum(pad_latent_to_max=False), tokens, 2)
    thoughts, evaluator = Thoughts(tokenizer, 4), make_evaluator(tokenizer, batch_size)
    loss = evaluator.loss(model, data, thoughts)
    states = []
    for row in range(len(data)):
        batch = collate([data[row]], tokenizer.pad_token_id)
        states.append(model(**batch.inputs()).latents[0])
    assert {len(row) for row in states} == {0, 2, 4}
    actual, expected = thoughts.figures(ALONE), naive_figures(states, model, tokenizer)
    assert set(actual) == FIGURES
    assert 0 < actual["latent_digits"] < 1 and 0 < actual["latent_operators"] < 1
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-5), name
    assert loss == evaluator.loss(model, data)


def test_without_two_latents_there_is_no_distance(tokenizer, tokens, encoded):
    model = Coconut(exact(tiny_model("llama")), tokens.latent)
    for number, names in ((0, set()), (1, FIGURES - {"latent_distance"})):
        data = StageDataset(encoded, Curriculum(), tokens, 1, num_latents=number)
        thoughts = Thoughts(tokenizer, number)
        make_evaluator(tokenizer).loss(model, data, thoughts)
        assert set(thoughts.figures(ALONE)) == names


def test_the_figures_cost_no_pass(tokenizer, tokens, encoded, monkeypatch):
    passes, original = [], Coconut.run_pass

    def count(self, *args):
        passes.append(1)
        return original(self, *args)

    monkeypatch.setattr(Coconut, "run_pass", count)
    model, evaluator = Coconut(exact(tiny_model("llama")), tokens.latent), make_evaluator(tokenizer)
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    evaluator.loss(model, data)
    assert len(passes) == 1 + 4
    evaluator.loss(model, data, Thoughts(tokenizer, 4))
    assert len(passes) == 2 * (1 + 4)


# ------------------------------------------------------------------------------- runs


def records(run_dir) -> list[dict]:
    return [r for r in history(run_dir) if r["kind"] == "eval"]


def test_every_epoch_with_thoughts_has_their_figures(workspace):
    assert train(workspace, **THREE_STEPS, schedule="paper", num_epochs=2) == 0
    first, second, forced = records(workspace.run_dir)
    assert FIGURES & set(first) == FIGURES & set(forced) == set()  # stage 0; none at all
    assert FIGURES <= set(second) and len(second["latent_norms"]) == 2


@pytest.mark.parametrize("keys", [dict(latent_input="pause"), dict(no_thoughts=True)])
def test_where_nothing_is_fed_back_there_are_none(workspace, keys):
    assert train(workspace, **THREE_STEPS, **keys, num_epochs=1) == 0
    assert FIGURES & set(records(workspace.run_dir)[0]) == set()


def test_the_largest_distance_is_a_part_of_the_run(workspace):
    """A run that goes on compares with what it was before."""
    assert train(workspace, **THREE_STEPS, num_epochs=1) == 0
    assert train(workspace, **THREE_STEPS, num_epochs=3) == 0
    distances = [
        r["latent_distance"] for r in records(workspace.run_dir) if r["forced_latents"] is None
    ]
    assert len(distances) == 3
    best = [c.state().best_latent_distance for c in find_checkpoints(workspace.run_dir)]
    assert best == [max(distances[: epoch + 1]) for epoch in range(3)]


def test_latents_that_collapse_are_told(caplog):
    """SIM-CoT's figures: 28, then 5."""
    state, caplog_text = TrainState("rows", 4), []
    with caplog.at_level(logging.WARNING, logger="coconut"):
        distances = [20.0, 28.0, 5.7, 5.0, 28.1, 5.5, math.nan, 5.4]
        for epoch, distance in enumerate(distances, start=1):
            caplog.clear()
            warn_of_collapse(state, distance, epoch)
            caplog_text.append(caplog.text)
    assert [bool(text) for text in caplog_text] == [False] * 3 + [True, False, True, False, True]
    assert "epoch 4: the latents of a row are 5 apart, they were 28" in caplog_text[3]
    assert state.best_latent_distance == 28.1
    manual = (ROOT / "analysis/README.md").read_text()
    assert caplog_text[3][caplog_text[3].index("epoch 4: ") :].strip() in manual
    assert all(f"| `{name}` |" in manual for name in FIGURES)
