"""benchmarks/: the memory forecast against a real training, and what the other figures rest on."""

import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.append(str(ROOT / "benchmarks"))
import measure
import peak
from data_path import positions_per_token
from learning import KINDS, moved_by
from memory import forecast, full_batch, peaks_of_micro_batch
from parts import made_up_rows, ratio_of_times, small_model, table, word_tokenizer
from speed import Calls, counted, counted_steps, plain_loss, random_batch

from coconut import Coconut, add_latent_tokens
from curriculum import Curriculum
from dataset import LatentTokens, StageDataset
from engine.distributed import World
from engine.encoding import encode_rows
from engine.loop import Step, forward_backward, micro_batches, start_training
from engine.model import build_model
from engine.optimizer import build_optimizer
from engine.preflight import gather_inputs
from loader import load_config
from rows import parse_rows

SMALL = dict(length=40, vocab_size=1024, layers=2, hidden=128, rows=8)


# ------------------------------------------------------------------------------- memory


@pytest.mark.slow  # a process of its own for each
@pytest.mark.parametrize(
    "keys",
    [
        dict(gradient_checkpointing=True, bf16=True),
        dict(gradient_accumulation_steps=1),
        dict(bf16=True, lora_r=32),
        dict(step_loss="decoder"),
    ],
)
def test_forecast_is_what_a_training_takes(keys):
    """Within 15% of the peak that torch's allocator saw, of a real run of run.py."""
    wanted, real = peak.compare(**SMALL, **keys)
    assert wanted == pytest.approx(real, rel=0.15)


def held_by_a_training(config) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state after the first step of a real one."""
    inputs, world = gather_inputs(config), World(0, 1, torch.device("cpu"))
    training = start_training(inputs, build_model(inputs), world)
    dataset = inputs.train_dataset(1)
    steps, _ = inputs.plan_epoch(dataset, 1, 1)
    for batch in next(micro_batches(dataset, steps, world, config, inputs.pad_id)):
        step, dtype = Step(steps[0]), config.compute_dtype
        forward_backward(training.model, batch, world, dtype, step, training.step_loss)
    training.optimizer.step()
    parameters = list(training.model.parameters())
    states = [t for p in parameters for t in training.optimizer.state[p].values()]
    size = lambda tensors: sum(t.untyped_storage().nbytes() for t in tensors)
    return {
        "parameters": size(parameters),
        "gradients": size(p.grad for p in parameters),
        "optimizer state": size(states),
    }


@pytest.mark.parametrize("keys", [{}, dict(bf16=True)])
def test_forecast_counts_the_decoder_of_step_loss(tmp_path, keys):
    """It counted the model alone, and told the same bytes with a decoder as without. Now they are
    those of a real training, to the byte."""
    config = load_config(peak.write_training(tmp_path, **SMALL, **keys))
    parts = forecast(config, SMALL["length"])
    known = {name: parts[name] for name in ("parameters", "gradients", "optimizer state")}
    assert known == held_by_a_training(config)
    config = load_config(tmp_path / "config.yaml", "step_loss=decoder")
    with_decoder = forecast(config, SMALL["length"])
    held = held_by_a_training(config)
    assert {name: with_decoder[name] for name in held} == held
    working = "activations, caches, temporaries"
    assert all(held[name] > known[name] for name in held)
    assert with_decoder[working] > parts[working]
    two = forecast(config, SMALL["length"], gpus=2)
    assert two["parameters"] == held["parameters"] / 2


def test_forecast_without_step_loss_is_that_of_the_plain_model(tmp_path):
    """Its activations are what the model alone takes, built in another way."""
    config = load_config(peak.write_training(tmp_path, **SMALL))
    with FakeTensorMode() as mode:
        base = small_model(SMALL["vocab_size"], SMALL["layers"], SMALL["hidden"])
    model = Coconut(base, SMALL["vocab_size"] - 1)
    with mode:
        batch, targets = full_batch(config, SMALL["length"])
        loss = lambda: model(**batch).loss
        peaks = peaks_of_micro_batch(model.train(), loss, autocast=False, with_gradients=True)
    assert targets is None
    parts = forecast(config, SMALL["length"])
    assert parts["activations, caches, temporaries"] == max(peaks)


def small_forecast(tmp_path, gpus=1, **keys) -> dict:
    path = peak.write_training(tmp_path, **SMALL, **keys)
    return forecast(load_config(path), SMALL["length"], gpus)


def test_forecast_of_two_gpus(tmp_path):
    """Half of the static part each; a step gathers the parameters and holds whole gradients."""
    one, two = (small_forecast(tmp_path, gpus) for gpus in (1, 2))
    for part in ("parameters", "gradients", "optimizer state"):
        assert two[part] == pytest.approx(one[part] / 2)
    gathered = two["gathered parameters, unreduced gradients"]
    assert gathered == one["parameters"] + one["gradients"]


@pytest.mark.parametrize("accumulated, size", [(2, 2 + 4), (1, 2 + 2)])
@pytest.mark.parametrize("master", [False, True])
def test_forecast_of_two_gpus_in_bf16(tmp_path, master, accumulated, size):
    """Gathered in bf16; what micro-batches leave is added up in float32, apart from .grad."""
    two = small_forecast(
        tmp_path,
        2,
        bf16=True,
        float32_master_weights=master,
        gradient_accumulation_steps=accumulated,
    )
    numbers = 2 * two["parameters"] / (4 if master else 2)
    assert two["gathered parameters, unreduced gradients"] == numbers * size


def test_forecast_of_checkpointing_and_accumulation(tmp_path):
    shares = (False, 0.5, True)
    kept, half, recomputed = (small_forecast(tmp_path, gradient_checkpointing=c) for c in shares)
    name = "peak of forward and backward"
    assert recomputed[name] < 0.8 * kept[name]
    assert half[name] == pytest.approx((kept[name] + recomputed[name]) / 2, rel=0.1)
    at_once = small_forecast(tmp_path, gradient_accumulation_steps=1)
    assert kept[name] - kept["gradients"] <= at_once[name] < kept[name]


def test_forecast_of_a_budget_of_positions_is_that_of_as_many_rows(tmp_path):
    by_rows = small_forecast(tmp_path)
    positions = SMALL["rows"] * SMALL["length"] + 1  # no room for another row
    assert small_forecast(tmp_path, tokens_per_micro_batch=positions) == by_rows


def test_the_training_of_the_check_has_the_length_of_its_forecast(tmp_path):
    """The rows that write_training makes, as the model meets them."""
    path = peak.write_training(tmp_path, **SMALL)
    config = load_config(path)
    rows = parse_rows((tmp_path / "rows.json").read_text(), "rows")
    tokenizer = word_tokenizer()
    tokens = LatentTokens(*add_latent_tokens(tokenizer))
    encoded = encode_rows(rows, tokenizer, list(tokens), tmp_path, "rows")
    dataset = StageDataset(encoded, Curriculum.from_config(config), tokens, 1)
    assert set(dataset.total_length) == {SMALL["length"]}
    assert set(dataset.num_latents) == {6}
    assert abs(dataset.prefix_length[0] - 0.6 * (SMALL["length"] - 6)) <= 1


# ------------------------------------------------------------------------------- speed


@pytest.mark.parametrize("latents", [0, 6])
def test_a_step_costs_hardly_more_than_a_plain_pass(latents):
    """At most 1.02 of the operations and 1.15 of the memory; in seven passes at most six times
    the calls."""
    torch.manual_seed(0)
    flops, kernels, calls, memory = counted_steps(random_batch(16, 60, latents, 40, 32_000), 2)
    assert flops <= 1.02 and memory <= 1.15
    assert kernels <= max(latents, 1) and calls <= max(latents, 1)


def test_calls_are_counted_by_kind():
    counts = Calls()
    with counts:
        x = torch.ones(2, 3)
        x.t().view(3, 2).add_(1)
    assert counts.counts == {"kernel": 2, "view": 2}


def test_fake_tensors_give_the_counts_of_real_ones():
    """But for a few: the library makes another mask where it cannot look at the values."""
    batch = random_batch(2, 6, 0, 4, 256)
    base = small_model(256, 2, 128)
    real = counted(Calls(), lambda: plain_loss(base, batch)).counts
    with FakeTensorMode() as fake:
        base = small_model(256, 2, 128)
        batch = {k: fake.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}
        actual = counted(Calls(), lambda: plain_loss(base, batch)).counts
    assert {kind: pytest.approx(count, rel=0.03) for kind, count in real.items()} == actual


def test_ratio_of_times():
    ones = torch.ones(300, 300)
    work = lambda times: lambda: [ones @ ones for _ in range(times)]
    ratio, (first, second) = ratio_of_times(work(60), work(20), 5)
    assert 1.5 < ratio < 6 and first > second > 0


# ------------------------------------------------------------------------------- data, updates


def test_made_up_rows_are_like_those_of_gsm8k(tmp_path):
    rows = made_up_rows(300)
    text = "\n".join(f"{r['question']}||{' '.join(r['steps'])} #### {r['answer']}" for r in rows)
    assert 150 < len(text) / len(rows) < 300  # GSM8K-Aug: 228 bytes
    encode_rows(rows, word_tokenizer(), [], tmp_path, "rows")


def test_positions_per_token(tmp_path):
    """Rows of other prefixes and suffixes: all columns, for all rows, over the real tokens."""
    rows = [
        {"question": "a b c", "steps": [], "answer": "1"},
        {"question": "a", "steps": ["x y", "z"], "answer": "1"},
    ]
    tokenizer = word_tokenizer()
    tokens = LatentTokens(*add_latent_tokens(tokenizer))
    encoded = encode_rows(rows, tokenizer, list(tokens), tmp_path, "rows")
    dataset = StageDataset(encoded, Curriculum(), tokens, 0)
    prefix, total = dataset.prefix_length, dataset.total_length
    wanted = 2 * (prefix[0] + total[1] - prefix[1]) / total.sum()
    steps = [torch.arange(2).numpy()]
    assert positions_per_token(dataset, steps, lambda rows: [rows]) == (pytest.approx(wanted), 1)
    assert positions_per_token(dataset, steps, lambda rows: [rows[:1], rows[1:]]) == (1, 2)


def test_bf16_updates():
    exact, size = moved_by(KINDS["float32, adamw"], build_optimizer)
    assert size == 16
    for name, arrives, size in (("bf16, adamw", 0.1, 8), ("bf16, adamw_split", 1.0, 12)):
        moved, actual = moved_by(KINDS[name], build_optimizer)
        arrived = float((moved * exact).sum() / (exact * exact).sum())
        assert arrived == pytest.approx(arrives, abs=0.02)
        assert actual == size


# ------------------------------------------------------------------------------- the command


def test_one_command_runs_what_is_named(monkeypatch):
    ran = []
    for owner, name in ((measure.log, "setLevel"), (measure, "disable_progress_bar")):
        monkeypatch.setattr(owner, name, lambda *args: None)  # they would outlive the test
    monkeypatch.setattr(measure, "MEASURES", {n: lambda n=n: ran.append(n) for n in "abc"})
    for arguments, wanted in (([], ["a", "b", "c"]), (["c", "a"], ["c", "a"])):
        monkeypatch.setattr(sys, "argv", ["measure.py", *arguments])
        measure.main()
        assert ran == wanted
        ran.clear()
    monkeypatch.setattr(sys, "argv", ["measure.py", "nothing"])
    with pytest.raises(SystemExit):
        measure.main()


def test_table_is_markdown(capsys):
    table("Title", ["what", "ratio"], [["x", 1.23456], ["y", 2]])
    assert capsys.readouterr().out == (
        "\n### Title\n\n| what | ratio |\n|---|---|\n| x | 1.23 |\n| y | 2 |\n"
    )
