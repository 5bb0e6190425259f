"""engine/optimizer.py: updates that arrive in bfloat16 weights, optimizers, schedules."""

import io
import logging
import math

import pytest
import torch
from numerics import assert_as_exact_as
from torch import nn

from engine.optimizer import (
    SplitAdamW,
    build_optimizer,
    build_scheduler,
    join,
    reset_moments,
    split,
)
from rules import make_config
from utils import Config, UserError

HORIZON = 10_000  # optimizer steps, as of 20 epochs of 50,000 rows
WIDTH = 512
# by step: the size of the gradients
GRADIENTS = {
    "constant": lambda step: 1.0,
    "halving": lambda step: 1.0 if step <= HORIZON / 10 else 0.5,
    "falling a hundredfold": lambda step: 10 ** (-2 * step / HORIZON),
}


def make(**changes) -> Config:
    values = dict(
        name="x",
        save_path="x",
        coconut=True,
        model_id="x",
        train_path="x",
        skip_validation=True,
        lr=1e-5,
    )
    return make_config({**values, **changes}, "test")


def start_weights() -> torch.Tensor:
    """Of the usual size, and exact in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(WIDTH, generator=generator) * 0.02).bfloat16().float()


class Run:
    """A layer that is trained on gradients with a direction and noise."""

    def __init__(self, config: Config, size=GRADIENTS["constant"]):
        self.config, self.size, self.step = config, size, 0
        self.layer = nn.Linear(WIDTH, 1, bias=False, dtype=config.dtype)
        self.layer.weight.data.copy_(start_weights())
        self.optimizer = build_optimizer(config, self.layer)

    def train(self, steps: int) -> "Run":
        direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)) / 2
        for _ in range(steps):
            self.step += 1
            noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(100 + self.step))
            grad = (direction + noise)[None] * self.size(self.step) * 1e-3
            self.layer.weight.grad = grad.bfloat16().to(self.config.dtype)
            self.optimizer.step()
        return self

    def resumed(self) -> "Run":
        """Another one that goes on from what this one saves."""
        other = Run(self.config, self.size)
        other.step = self.step
        other.layer.load_state_dict(self.layer.state_dict())
        state = io.BytesIO()
        torch.save(self.optimizer.state_dict(), state)
        other.optimizer.load_state_dict(torch.load(io.BytesIO(state.getvalue())))
        return other

    @property
    def way(self) -> torch.Tensor:
        """The way (WIDTH,) that the weights went, as the model sees them."""
        return self.layer.weight.detach()[0].float() - start_weights()

    @property
    def exact_way(self) -> torch.Tensor:
        """The same with the bits that bfloat16 has no room for."""
        weight = self.layer.weight.detach()
        state = self.optimizer.state[self.layer.weight]
        return join(weight, state["low_bits"])[0] - start_weights()

    @property
    def second_moment(self) -> torch.Tensor:
        return self.optimizer.state[self.layer.weight]["exp_avg_sq"]


def share_that_arrives(way: torch.Tensor, intended: torch.Tensor) -> float:
    """Length of the way along the intended one, as a part of that."""
    return (way @ intended / (intended @ intended)).item()


# ------------------------------------------------------------------------------- updates


def test_plain_adamw_loses_most_bfloat16_updates():
    """What the ancestor does: at lr 1e-5 most updates are below half a bfloat16 step."""
    intended = Run(make()).train(100).way
    way = Run(make(bf16=True, optimizer="adamw")).train(100).way
    assert (intended != 0).all()
    assert (way == 0).float().mean() > 0.8
    assert share_that_arrives(way, intended) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("size", GRADIENTS.values(), ids=GRADIENTS)
def test_bfloat16_weights_go_the_way_of_float32_over_a_whole_run(size):
    """Measured after 100 steps alone, an optimizer with a second moment in bfloat16 looked right:
    after 10,000 it had gone 0.68, 0.48 and 0.39 of these ways. Saved and resumed in the middle."""
    exact = Run(make(), size).train(HORIZON)
    run = Run(make(bf16=True), size).train(HORIZON // 2).resumed().train(HORIZON // 2)
    for way in (run.way, run.exact_way):
        assert 0.99 < share_that_arrives(way, exact.way) < 1.01
    assert (run.exact_way - exact.way).norm() < 0.01 * exact.way.norm()
    # no weight is further off than its last rounding
    rounding = torch.finfo(torch.bfloat16).eps * (start_weights() + exact.way).abs().clamp(min=1e-4)
    assert ((run.way - exact.way).abs() <= rounding).float().mean() > 0.99
    ratio = run.second_moment.sum() / exact.second_moment.sum()
    assert 0.99 < ratio < 1.01


def test_weight_decay_arrives_in_bfloat16():
    """2,000 steps of lr 1e-5 and weight decay 0.01 are less than a bfloat16 step of any weight;
    without gradients only the decay is left."""
    runs = [Run(make(bf16=bf16), lambda step: 0.0).train(2000) for bf16 in (False, True)]
    exact, actual = runs[0].way, runs[1].exact_way
    assert (exact * start_weights()).sum() < 0
    assert 0.99 < share_that_arrives(actual, exact) < 1.01


def test_resumed_is_as_never_stopped():
    whole, half = Run(make(bf16=True)).train(60), Run(make(bf16=True)).train(30)
    rest = half.resumed().train(30)
    assert torch.equal(rest.layer.weight, whole.layer.weight)
    ours, theirs = (run.optimizer.state_dict()["state"][0] for run in (rest, whole))
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])


def test_the_halves_of_a_weight_are_all_of_it():
    """Any float32 number: large, tiny, negative, half-way between two bfloat16 numbers."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    whole = bits.view(torch.float32)
    whole = whole[whole.abs() < 1e38]
    weight, low_bits = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty(len(whole))
    low_bits = low_bits.to(torch.int16)
    split(whole, weight, low_bits)
    assert torch.equal(weight, whole.bfloat16())
    off = (join(weight, low_bits).view(torch.int32) - whole.view(torch.int32)).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3


def test_reset_moments_keeps_the_weights_whole():
    run = Run(make(bf16=True)).train(50)
    before = run.exact_way
    reset_moments(run.optimizer)
    state = run.optimizer.state[run.layer.weight]
    assert torch.equal(run.exact_way, before) and state["low_bits"].any()
    assert not any(state[name].any() for name in ("step", "exp_avg", "exp_avg_sq"))


def test_float32_master_weights_are_plain_float32():
    config = make(bf16=True, float32_master_weights=True)
    assert torch.equal(Run(config).train(20).way, Run(make()).train(20).way)


def test_weight_decay_is_decoupled():
    """Without gradients only the decay is left: lr x weight_decay of the weight, each step."""
    for bf16 in (False, True):
        config = make(lr=0.1, weight_decay=0.5, bf16=bf16)
        layer = nn.Linear(8, 1, bias=False, dtype=config.dtype)
        wanted = layer.weight.detach().double() * (1 - 0.1 * 0.5)
        layer.weight.grad = torch.zeros_like(layer.weight)
        build_optimizer(config, layer).step()
        naive = wanted.to(config.dtype)
        actual, naive, truth = ({"weight": w.detach()} for w in (layer.weight, naive, wanted))
        assert_as_exact_as(actual, [naive], truth)


# ------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    "changes, kind, warns",
    [
        (dict(), torch.optim.AdamW, False),
        (dict(optimizer="adamw"), torch.optim.AdamW, False),
        (dict(bf16=True), SplitAdamW, False),
        (dict(bf16=True, optimizer="adamw_split"), SplitAdamW, False),
        (dict(bf16=True, optimizer="adamw"), torch.optim.AdamW, True),
        (dict(bf16=True, float32_master_weights=True), torch.optim.AdamW, False),
        (dict(bf16=True, float32_master_weights=True, optimizer="adamw"), torch.optim.AdamW, False),
    ],
)
def test_which_optimizer_is_built(changes, kind, warns, caplog):
    config = make(weight_decay=0.05, **changes)
    layer = nn.Linear(2, 1, dtype=config.dtype)
    with caplog.at_level(logging.WARNING, logger="coconut"):
        optimizer = build_optimizer(config, layer)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert group["params"] == list(layer.parameters())
    assert (group["lr"], group["weight_decay"], group["eps"]) == (1e-5, 0.05, 1e-8)
    assert group["betas"] == (0.9, 0.999)
    assert ("rounds most updates away" in caplog.text) == warns
    assert ("adamw_split" in caplog.text) == warns  # what to do


# ------------------------------------------------------------------------------- schedules

WARMUP, TOTAL = 4, 12

AFTER_WARMUP = {  # by the part of the way from the warm-up's end to the last step
    "constant": lambda part: 1.0,
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
}


def make_schedule(name: str, warmup: int):
    config = make(lr=0.5, lr_schedule=name, warmup_steps=warmup)
    optimizer = build_optimizer(config, nn.Linear(2, 1))
    return optimizer, build_scheduler(config, optimizer, TOTAL)


def rates(optimizer, scheduler, count: int) -> list[float]:
    """The learning rates of the next optimizer steps."""
    actual = []
    for _ in range(count):
        actual.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return actual


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_learning_rates(name, warmup):
    after = AFTER_WARMUP[name]
    wanted = [
        0.5 * (step / warmup if step < warmup else after((step - warmup) / (TOTAL - warmup)))
        for step in range(TOTAL)
    ]
    assert rates(*make_schedule(name, warmup), TOTAL) == pytest.approx(wanted)


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_a_schedule_goes_on_where_it_was_saved(name):
    whole = rates(*make_schedule(name, WARMUP), TOTAL)
    for done in (1, WARMUP, 7):
        optimizer, scheduler = make_schedule(name, WARMUP)
        first = rates(optimizer, scheduler, done)
        resumed, again = make_schedule(name, WARMUP)
        again.load_state_dict(scheduler.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        assert first + rates(resumed, again, TOTAL - done) == whole


def test_weights_that_the_library_keeps_wide_are_one_line():
    """ERNIE's routers, with bf16: a traceback after the weights had been read."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 2))
    with pytest.raises(UserError, match="bf16: .* in float32; set float32_master_weights: True"):
        build_optimizer(make(bf16=True), model)
    build_optimizer(make(bf16=True, float32_master_weights=True), model)
