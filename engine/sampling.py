"""Sampled completions: how their tokens are drawn, and what is reported of them.

Shapes: R completions that run together, V vocabulary.
"""

import math
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from coconut import ChooseToken
from engine.text import TextFormat
from utils import Config, derive_seed


@dataclass(frozen=True)
class Sampling:
    """How many completions of each row are drawn, and how: the config's keys of these names.

    A draw depends on (seed, row, sample, tokens so far) and the logits only: not on the rows of its
    batch or their order, nor on processes or what ran before.
    """

    num_samples: int
    temperature: float
    top_p: float
    seed: int

    @classmethod
    def from_config(cls, config: Config) -> "Sampling | None":
        """None: no samples are drawn."""
        if config.temperature == 0:
            return None
        return cls(config.num_samples, config.temperature, config.top_p, config.seed)

    def chooser(
        self, rows: list[int], samples: range, max_new_tokens: int, device: torch.device
    ) -> ChooseToken:
        """For Coconut.generate with these samples of each of these rows."""
        seeds = [
            derive_seed(self.seed, "sample", row, sample) for row in rows for sample in samples
        ]
        drawn = [np.random.default_rng(seed).random(max_new_tokens) for seed in seeds]
        uniform = torch.from_numpy(np.stack(drawn)).to(device)  # float64, (completions, tokens)
        return lambda logits, completions, step: draw(
            logits, uniform[completions, step], self.temperature, self.top_p
        )


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens (R,) of softmax(logits / temperature), logits (R, V), among the fewest most probable
    ones whose mass reaches top_p (Holtzman et al. 2020): the inverse of their distribution function
    at uniform (R,), in [0, 1).

    In float64: the sum over a large vocabulary has to keep its tail. Equally probable tokens are in
    the order of their ids.
    """
    below = logits.double() - logits.amax(-1, keepdim=True)  # however low the temperature, finite
    p, tokens = (below / temperature).softmax(-1).sort(descending=True, stable=True)
    upto = p.cumsum(-1)  # (R, V)
    # of the tokens that are kept; where logits are no numbers, as of a model that diverged, one is
    last = ((upto - p < top_p).sum(-1, keepdim=True) - 1).clamp(min=0)
    at = torch.searchsorted(upto, uniform[:, None] * upto.gather(-1, last), right=True)
    return tokens.gather(-1, at.minimum(last)).squeeze(-1)


# ------------------------------------------------------------------------------- figures


@dataclass
class Sampled:
    """Figures of the samples of all rows; rates in [0, 1], by k."""

    num_samples: int
    pass_at: dict[int, float]  # one of k samples is right
    majority_at: dict[int, float]  # the most frequent answer of the first k samples is right
    new_tokens: float  # mean of a sample, latents counted, eos not

    def columns(self) -> dict[str, float]:
        """The figures of a table, by what stands above them. A majority of one is a pass@1."""
        return {f"pass@{k}": rate for k, rate in self.pass_at.items()} | {
            f"majority@{k}": rate for k, rate in self.majority_at.items() if k > 1
        }

    def line(self) -> str:
        told = ", ".join(f"{name} {rate:.1%}" for name, rate in self.columns().items())
        return f"{self.num_samples} samples a row: {told}, {self.new_tokens:.1f} new tokens"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that one of k samples is right, estimated without bias from num_samples of
    which num_correct are (Chen et al. 2021)."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def equal_answers(answers: list[str | None], text_format: TextFormat) -> list[int | None]:
    """For each answer the place of the first one that is the same; None where there is none."""
    first: dict[Decimal | str, int] = {}  # by value
    return [
        None if answer is None else first.setdefault(text_format.value(answer), place)
        for place, answer in enumerate(answers)
    ]


def majority_at_k(places: list[int | None], correct: list[bool], k: int) -> bool:
    """Whether the most frequent answer of the first k samples is right; of equally frequent ones
    the one that came first. A sample without an answer has no vote.

    places: as equal_answers says.
    """
    votes = Counter(place for place in places[:k] if place is not None)
    return bool(votes) and correct[max(votes, key=votes.__getitem__)]


def summarise_samples(rows: list[list[dict]], text_format: TextFormat) -> Sampled:
    """rows: the samples of each row, as an evaluation keeps them."""
    count = len(rows[0])
    ks = [2**i for i in range(count.bit_length()) if 2**i < count] + [count]
    right = [[sample["correct"] for sample in samples] for samples in rows]
    places = [equal_answers([s["answer"] for s in samples], text_format) for samples in rows]
    mean = lambda values: sum(values) / len(rows)
    return Sampled(
        num_samples=count,
        pass_at={k: mean(pass_at_k(count, sum(of_row), k) for of_row in right) for k in ks},
        majority_at={k: mean(map(majority_at_k, places, right, [k] * len(rows))) for k in ks},
        new_tokens=mean(sum(s["new_tokens"] for s in samples) / count for samples in rows),
    )
