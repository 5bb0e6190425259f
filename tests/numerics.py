"""One rule for numbers that two computations round differently: no tolerance is a machine's.

Rounding depends on the processor, the library and the shapes. A float32 (or bfloat16) result is
therefore measured against the truth, which is computed in float64 from the same weights, and may
be off by a small multiple of what the naive computation in the same type is off by, on the same
machine. Where both sides are float64, rounding is ten thousand times below LIMIT, and a mistake far
above it. Greedy tokens are compared in float64, where no two logits tie.

pytest --margins shows how much of what is allowed was found.
"""

import copy
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import layers
from layers import computes_llamas_norm
from utils import Config

FACTOR = 8  # times the naive computation's own error
NAIVE_RUNS = 3
FLOOR = 4  # roundings of the largest value; what is naive may be exact by chance
LIMIT = 1e-10  # in float64

Figures = Tensor | float | list | dict
MARGINS: dict[str, list[float]] = defaultdict(list)  # by test: found / allowed of each comparison


# ------------------------------------------------------------------------------- models


class ExactNorm(nn.Module):
    """LlamaRMSNorm without its rounding to float32; no layer of ours takes its place."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def plain(model: nn.Module) -> nn.Module:
    """A copy with the library's own layers."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        vars(module).pop("forward", None)
    return twin


def exact(model: nn.Module) -> nn.Module:
    """A copy in float64, the norms that the library computes in float32 included."""
    twin = plain(model).double()
    for name, module in list(twin.named_modules()):
        if computes_llamas_norm(type(module)):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, ExactNorm(module))
    return twin


def roundings(model: nn.Module) -> Iterator[nn.Module]:
    """The naive computation in the model's type, as it is and with each weight moved by one
    rounding of float32 at most: where a model amplifies one early rounding, a single error may be
    small by chance. Weights in bfloat16 stay: a rounding of theirs moves the result by as much as a
    mistake would."""
    coarse = any(p.dtype == torch.bfloat16 for p in model.parameters())
    for seed in range(1 if coarse else NAIVE_RUNS):
        twin, generator = plain(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in twin.parameters():
                moves = torch.randint(-1, 2, p.shape, generator=generator).to(p.dtype)
                p += p * moves * (torch.finfo(torch.float32).eps if seed else 0)
        yield twin


@contextmanager
def in_float64():
    """Everything that is loaded and run from a config meanwhile computes in float64."""
    ours = layers.rms_norm
    norm_of = lambda norm, x: ExactNorm(norm)(x) if x.dtype == torch.float64 else ours(norm, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "rms_norm", norm_of)
        for name in ("dtype", "compute_dtype"):
            patch.setattr(Config, name, torch.float64)
        yield


# ------------------------------------------------------------------------------- the rule


def assert_as_exact_as(actual: dict, naive: list[dict], truth: dict) -> None:
    """Named figures of one computation. Its largest relative error may be FACTOR times that of
    naive ones, taken over all figures, since a single number may be right by chance."""
    assert all(figures.keys() == truth.keys() for figures in (actual, *naive))
    yardstick = max(_off(figures[name], truth[name]) for name in truth for figures in naive)
    for name in truth:
        allowed = FACTOR * yardstick + FLOOR * _rounding(actual[name])
        _judge(name, _off(actual[name], truth[name]), allowed)


def assert_same(actual: Figures, wanted: Figures, name: str = "") -> None:
    """Figures that were both computed in float64."""
    assert _rounding(actual, lowest=0) < 1e-15, "not float64"
    _judge(name, _off(actual, wanted), LIMIT)


def _judge(name: str, off: float, allowed: float) -> None:
    test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0]
    MARGINS[test.partition("[")[0]].append(off / allowed)
    assert off <= allowed, f"{name}: off by {off:.2g}, {allowed:.2g} is allowed"


def _off(actual: Figures, truth: Figures) -> float:
    """Largest difference as a part of the largest value."""
    if isinstance(truth, dict):
        assert actual.keys() == truth.keys()
        pairs = [(actual[name], truth[name]) for name in truth]
    else:
        pairs = [(actual, truth)]
    pairs = [
        tuple(torch.as_tensor(side, dtype=torch.float64).detach() for side in pair)
        for pair in pairs
    ]
    assert all(one.shape == other.shape for one, other in pairs)
    difference = torch.stack([(one - other).abs().max() for one, other in pairs]).max()
    largest = torch.stack([other.abs().max() for _, other in pairs]).max()
    return (difference / torch.where(largest > 0, largest, 1)).item()


def _rounding(actual: Figures, lowest: float = torch.finfo(torch.float32).eps) -> float:
    """Of the type that the figures have; Python's own numbers may come from float32."""
    values = actual.values() if isinstance(actual, dict) else [actual]
    sizes = [torch.finfo(v.dtype).eps if torch.is_tensor(v) else 0.0 for v in values]
    return max(lowest, *sizes)
