"""The health of the thoughts: what the states that are fed back look like, at no extra pass.

A run whose latents become alike, or all numbers, is about to lose its accuracy (the collapse that
Coconut's training is known for); the loss alone does not show it before.
"""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coconut import Coconut, token_embeddings
from engine.checkpoint import TrainState
from engine.distributed import World, sum_over_ranks
from engine.text import decode_completion
from utils import log

OPERATORS = set("+-*/=<>")
COLLAPSE = 5  # latents that are this many times closer together than they were at their best


class Thoughts:
    """Sums over the latents of the batches that it is shown, on this rank."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_latents: int):
        """num_latents: the most that a row has."""
        self.tokenizer = tokenizer
        self.rows = torch.zeros(num_latents, dtype=torch.float64)  # that have latent k
        self.norms = torch.zeros(num_latents, dtype=torch.float64)
        self.centre: Tensor | None = None  # (D,) of what the tokens read
        self.pairs = self.distances = self.from_centre = self.digits = self.operators = 0.0

    def add(self, model: Coconut, latents: Tensor, counts: list[int]) -> None:
        """latents: (B, K, D), of which row b has the first counts[b]."""
        states, columns = latents.float(), torch.arange(latents.shape[1], device=latents.device)
        there = columns < torch.tensor(counts, device=latents.device)[:, None]  # (B, K)
        self.rows[: len(columns)] += there.sum(0).cpu()
        self.norms[: len(columns)] += (states.norm(dim=-1) * there).double().sum(0).cpu()
        pairs = (there[:, :, None] & there[:, None]).triu(1)  # (B, K, K)
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(states, states, compute_mode=exact)  # (B, K, K)
        self.pairs += float(pairs.sum())
        self.distances += float(distances[pairs].double().sum())
        if self.centre is None:
            words = token_embeddings(model.base_causallm, list(range(len(self.tokenizer))))
            self.centre = words.mean(0, dtype=torch.float32)
        self.from_centre += float((states[there] - self.centre).norm(dim=-1).double().sum())
        head: Any = model.base_causallm.get_output_embeddings()
        for token, count in Counter(head(latents[there]).argmax(-1).tolist()).items():
            word = decode_completion(self.tokenizer, [token]).strip()
            self.digits += count * word.isdigit()
            self.operators += count * (word != "" and set(word) <= OPERATORS)

    def figures(self, world: World) -> dict[str, Any]:
        """Means over all ranks' rows; {} without latents. Lengths are Euclidean.

        latent_norms: of each latent in its turn, a list. latent_distance: of two latents of a row,
        left out where no row has two. latent_from_centre: to the mean of the tokens' embeddings.
        latent_digits, latent_operators: shares of the latents whose most probable token is one.
        """
        sums = [self.pairs, self.distances, self.from_centre, self.digits, self.operators]
        rows = sum_over_ranks(self.rows.tolist(), world.device)
        norms = sum_over_ranks(self.norms.tolist(), world.device)
        pairs, distances, from_centre, digits, operators = sum_over_ranks(sums, world.device)
        if not (total := sum(rows)):
            return {}
        return {
            "latent_norms": [norm / count for norm, count in zip(norms, rows)],
            **({"latent_distance": distances / pairs} if pairs else {}),
            "latent_from_centre": from_centre / total,
            "latent_digits": digits / total,
            "latent_operators": operators / total,
        }


def warn_of_collapse(state: TrainState, distance: float, epoch: int) -> None:
    """Say so where the latents of an epoch are far closer together than they were in this run."""
    if not math.isfinite(distance):  # of a model that is broken in another way
        return
    best = state.best_latent_distance = max(distance, state.best_latent_distance)
    if distance * COLLAPSE < best:
        log.warning(
            f"epoch {epoch}: the latents of a row are {distance:.3g} apart, they were {best:.3g}: "
            "they collapse, and accuracy may follow; see stage_mixing, advance_at, or a lower lr"
        )
