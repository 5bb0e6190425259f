"""engine/optimizer.py: updates that arrive in bfloat16 weights, optimizers, schedules."""

import logging
import math

import optimi
import pytest
import torch
from torch import nn

from engine.optimizer import build_optimizer, build_scheduler
from utils import Config, make_config

STEPS = 100


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
    return (torch.randn(4096, generator=generator) * 0.02).bfloat16().float()


def train(config: Config) -> torch.Tensor:
    """The way (4096,) that the weights go in some steps, each with a direction and noise."""
    weights = start_weights()
    layer = nn.Linear(4096, 1, bias=False, dtype=config.dtype)
    layer.weight.data.copy_(weights)
    optimizer = build_optimizer(config, layer)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(4096, generator=generator)
    for _ in range(STEPS):
        noise = torch.randn(4096, generator=generator)
        layer.weight.grad = (direction + noise)[None].to(config.dtype)
        optimizer.step()
    return layer.weight.detach()[0].float() - weights


def share_that_arrives(way: torch.Tensor, intended: torch.Tensor) -> float:
    """Length of the way along the intended one, as a part of that."""
    return (way @ intended / (intended @ intended)).item()


# ------------------------------------------------------------------------------- updates


def test_plain_adamw_loses_most_bfloat16_updates():
    """What the ancestor does: at lr 1e-5 most updates are below half a bfloat16 step."""
    intended, way = train(make()), train(make(bf16=True, optimizer="adamw"))
    assert (intended != 0).all()
    assert (way == 0).float().mean() > 0.8
    assert share_that_arrives(way, intended) < 0.2


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_kahan_summation_keeps_every_bfloat16_update(weight_decay):
    intended = train(make(weight_decay=weight_decay))
    way = train(make(bf16=True, weight_decay=weight_decay))
    assert 0.99 < share_that_arrives(way, intended) < 1.01
    # no weight is further off than its last rounding
    steps = torch.finfo(torch.bfloat16).eps * start_weights().abs().clamp(min=1e-4)
    assert ((way - intended).abs() <= steps).float().mean() > 0.99


def test_float32_master_weights_are_plain_float32():
    config = make(bf16=True, float32_master_weights=True)
    assert torch.equal(train(config), train(make()))


def test_weight_decay_is_decoupled():
    """Without gradients only the decay is left: lr x weight_decay of the weight, each step."""
    for bf16 in (False, True):
        config = make(lr=0.1, weight_decay=0.5, bf16=bf16)
        layer = nn.Linear(8, 1, bias=False, dtype=config.dtype)
        wanted = layer.weight.detach().float() * (1 - 0.1 * 0.5)
        layer.weight.grad = torch.zeros_like(layer.weight)
        build_optimizer(config, layer).step()
        torch.testing.assert_close(layer.weight.detach().float(), wanted, rtol=4e-3, atol=0)


# ------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    "changes, kind, warns",
    [
        (dict(), torch.optim.AdamW, False),
        (dict(optimizer="adamw"), torch.optim.AdamW, False),
        (dict(bf16=True), optimi.AdamW, False),
        (dict(bf16=True, optimizer="adamw_kahan"), optimi.AdamW, False),
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
    assert ("rounds most updates away" in caplog.text) == warns
    assert ("adamw_kahan" in caplog.text) == warns  # what to do


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
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


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
