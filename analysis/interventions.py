"""What becomes of the answers when latents are left out, replaced, exchanged or reordered.

Number of latents. The model is shown n = 0 to K latents. A latent stands for a part of a step
(c_thought of them for one), so a question with fewer latents also has less of a chain: neither as
latents nor, as the model was trained to leave these steps out, in words. Two series tell the two
apart:

    steps missing    question <start> n latents <end>, and the model goes on
    steps supplied   question <start> n latents <end> and the gold steps that the removed latents
                     stood for, ceil(n / c_thought) to ceil(K / c_thought) of those that the stage
                     skips, and the model goes on

The model decides what it writes, so the steps cannot be asked of it: they are given, as in
training. With n = K nothing is removed; `all steps supplied` there gives them beside all latents.

Replacements, of each latent k alone (later ones are computed from it) and of all at once:

    same         the state itself: what two runs of the same thing differ in, by rounding
    zero         zeros
    mean         the mean of the states of this position over all rows
    noise        a random direction with the norm of the state
    added noise  the state plus Gaussian noise of a given sigma in every dimension
    other        the state of another row
    order        the row's own states in a random order that leaves none in its place (all only)
    marker       the embedding of the latent token

A pause reads no state, so nothing that replaces a state reaches the model.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.branches import (
    STATE,
    TOKEN,
    VECTOR,
    Branches,
    Prefix,
    join,
    make_branch,
    run_branches,
    run_prefix,
)
from analysis.probe import Probe
from coconut import embedding_table, token_embeddings
from dataset import LatentTokens, StageDataset, collate
from engine.distributed import World, autocast
from engine.evaluation import batches_of_rank
from engine.text import TextFormat
from utils import derive_seed

EACH = ("zero", "mean", "noise", "added noise", "other", "marker")
ALL = ("same", *EACH, "order")
MISSING, SUPPLIED = "steps missing", "steps supplied"

Answers = list[str | None]


def counted(num_latents: int, steps: str) -> str:
    """The name of a number of latents, in the results."""
    return f"{num_latents} latents, {steps}"


def replaced(k: int | None, kind: str) -> str:
    """The name of a replacement, in the results; k: the latent, from 0, None: all of them."""
    return f"all latents: {kind}" if k is None else f"latent {k + 1}: {kind}"


def batches_of(probe: Probe, dataset: StageDataset) -> list[list[int]]:
    """All rows, those of like length together."""
    return batches_of_rank(dataset, World(0, 1, probe.device), probe.config.batch_size_eval)


def progress(batches: list[list[int]], name: str, done: int = 0) -> tqdm:
    """A bar of the rows of all batches, the first `done` of which are finished."""
    total, initial = sum(map(len, batches)), sum(map(len, batches[:done]))
    return tqdm(
        total=total, initial=initial, desc=name, unit="row", leave=False, dynamic_ncols=True
    )


def choose_donors(answers: Answers, text: TextFormat, seed: int) -> list[int]:
    """For each row the one whose states it gets: another, with another answer wherever no answer
    is that of more than half of the rows. Each row gives once."""
    rng = np.random.default_rng(derive_seed(seed, "donors"))
    values = [None if answer is None else text.value(answer) for answer in answers]
    distinct = sorted(set(values), key=str)
    place = dict(zip(distinct, rng.permutation(len(distinct)).tolist()))
    groups = np.array([place[value] for value in values])
    order = rng.permutation(len(answers))
    order = order[np.argsort(groups[order], kind="stable")]  # equal answers stand together
    shift = max(1, min(int(np.bincount(groups).max()), len(order) // 2))
    donors = np.empty_like(order)
    donors[order] = np.roll(order, -shift)
    return donors.tolist()


def noise(seed: int, row: int, *shape: int) -> Tensor:
    """Standard normal numbers that depend on seed and row only, on no batch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise", row))
    return torch.randn(shape, generator=generator)


def with_norm_of(directions: Tensor, states: Tensor) -> Tensor:
    """Directions (..., D) made as long as states."""
    return directions * (states.norm(dim=-1) / directions.norm(dim=-1))[..., None]


# ------------------------------------------------------------------------------- as it is


@dataclass(frozen=True)
class Plain:
    """All N rows as the model answers them. A latent's state: the last hidden state before its
    position, which it is fed (a pause is not)."""

    answers: Answers
    states: Tensor  # (N, K, D)
    question: Tensor  # (N, D) the state at the question's last token


@dataclass(frozen=True)
class Latents:
    """A model's latents on all rows of a data set, K on every row."""

    probe: Probe
    dataset: StageDataset
    sigma: float

    @property
    def num_latents(self) -> int:
        return int(self.dataset.num_latents[0])

    def batches(self) -> list[list[int]]:
        return batches_of(self.probe, self.dataset)

    def plain(self) -> Plain:
        """Run every row once."""
        answers: dict[int, str | None] = {}
        states: dict[int, Tensor] = {}
        questions: dict[int, Tensor] = {}
        with progress(self.batches(), "plain") as bar:
            for rows in self.batches():
                bar.update(len(rows))
                prefix = self._prefix(rows, None)
                own = self._branches(rows, [STATE] * self.num_latents, None)
                (written,), latents = self._run(prefix, [own])
                answers |= zip(rows, written)
                states |= zip(rows, latents[:, 0])
                questions |= zip(rows, prefix.hidden[:, -2])  # before the marker of the latents
        every = range(len(self.dataset))
        return Plain(
            [answers[row] for row in every],
            torch.stack([states[row] for row in every]),
            torch.stack([questions[row] for row in every]),
        )

    # --------------------------------------------------------------------------- interventions

    def intervene(self, plain: Plain, donors: list[int], rows: list[int]) -> dict:
        """Some rows under every intervention: their answers by its name, and how later latents
        change, {kind: [of latent k: [of each later one: [cosine, distance, norm]]]}, sums over the
        rows as of compare_states."""
        values = self._values(plain, donors, rows)
        prefix = self._prefix(rows, plain.states[rows, :-1])
        known = self._counted(rows, values["same"])  # nothing in them waits for a state
        known |= {
            replaced(None, kind): self._replacing(rows, None, of) for kind, of in values.items()
        }
        written, _ = self._run(prefix, list(known.values()))
        answers = dict(zip(known, written))
        changes: dict[str, list] = {kind: [] for kind in EACH}
        for k in range(self.num_latents):
            several = [self._replacing(rows, k, values[kind]) for kind in EACH]
            written, states = self._run(prefix, several)
            answers |= dict(zip((replaced(k, kind) for kind in EACH), written))
            for kind, of_kind in zip(EACH, states.unbind(1)):  # (B, K - k, D)
                before = plain.states[rows, k + 1 :]
                changes[kind].append(compare_states(before, of_kind[:, 1:]))
        return {"rows": rows, "answers": answers, "changes": changes}

    def _values(self, plain: Plain, donors: list[int], rows: list[int]) -> dict[str, Tensor]:
        """What replaces the states of some rows, (B, K, D) each, by kind."""
        states, seed = plain.states[rows], self.probe.config.seed
        shape = states.shape[1:]
        drawn = torch.stack([noise(seed, row, 2, *shape) for row in rows], dim=1).to(states)
        values = {
            "same": states,
            "zero": torch.zeros_like(states),
            "mean": plain.states.mean(0).expand_as(states),
            "noise": with_norm_of(drawn[0], states),
            "added noise": states + self.sigma * drawn[1],
            "other": plain.states[[donors[row] for row in rows]],
            "marker": self._marker().to(states).expand_as(states),
        }
        if self.num_latents > 1:
            order = torch.tensor([another_order(seed, row, self.num_latents) for row in rows])
            values["order"] = states[torch.arange(len(rows))[:, None], order]
        return values

    def _marker(self) -> Tensor:
        """The embedding of the latent token, (D,)."""
        return token_embeddings(self.probe.model.base_causallm, [self._tokens.latent])[0]

    @property
    def _tokens(self) -> LatentTokens:
        tokens = self.probe.inputs.latent_tokens
        assert tokens is not None  # the method has latents
        return tokens

    def _replacing(self, rows: list[int], k: int | None, values: Tensor) -> Branches:
        """Branches with latent k replaced, that start there; None: all of them, from the first."""
        first, last = k or 0, self.num_latents - 1
        reads = [VECTOR] + [VECTOR if k is None else STATE] * (last - first)
        return self._branches(rows, reads, values[:, first:], without=last - first)

    def _counted(self, rows: list[int], states: Tensor) -> dict[str, Branches]:
        """Fewer latents, and the same with the steps that the removed ones stood for."""
        several = {}
        for n in range(self.num_latents + 1):
            there = min(n, self.num_latents - 1)  # in the prefix
            reads, steps = [VECTOR] * (n - there), self.supplied_steps(n)
            with_steps = bool(steps) or n == 0  # the verdict compares these two, if they are one
            for name in [MISSING] * (n < self.num_latents) + [SUPPLIED] * with_steps:
                supplied = steps if name == SUPPLIED else range(0)
                tokens = [self._step_tokens(row, supplied) for row in rows]
                several[counted(n, name)] = self._branches(
                    rows, reads, states[:, there:n], tokens, self.num_latents - 1 - there
                )
        return several

    def supplied_steps(self, n: int) -> range:
        """The steps, from 0, that are given in words beside n latents: those of the latents that
        are removed, of the steps that the stage skips on any row. Beside all latents, where none is
        removed: all of them."""
        c = max(self.probe.inputs.curriculum.c_thought, 1)
        all_steps = min(-(-self.num_latents // c), int(self.dataset.num_skipped.max()))
        return range(0 if n == self.num_latents else -(-n // c), all_steps)

    def whole_chains(self) -> float:
        """The share of rows whose supplied steps, beside no latents, are all of their chain: the
        last one holds the answer."""
        num_steps = self.dataset.encoded.num_steps
        given = np.minimum(self.supplied_steps(0).stop, self.dataset.num_skipped)
        return float(np.mean((given >= num_steps) & (num_steps > 0)))

    def _step_tokens(self, row: int, steps: range) -> list[int]:
        """Of those of the steps that the stage skips."""
        encoded, skipped = self.dataset.encoded, int(self.dataset.num_skipped[row])
        tokens = encoded.row_tokens(row)
        behind = encoded.steps_from[row, [min(steps.start, skipped), min(steps.stop, skipped)]]
        start, stop = len(tokens) - int(encoded.answer_length[row]) - behind
        return tokens[start:stop].tolist()

    # --------------------------------------------------------------------------- running

    def _prefix(self, rows: list[int], states: Tensor | None) -> Prefix:
        """Questions and the marker that begins the latents, and behind it latents with states."""
        samples = []
        for row in rows:
            prompt = self.dataset.question(row)
            ids = prompt.input_ids[: prompt.first_latent]
            samples.append(prompt._replace(input_ids=ids, labels=ids, num_fed_back=0))
        batch = collate(samples, self.probe.inputs.pad_id, align_end=True).to(self.probe.device)
        given = max(len(self._step_tokens(row, self.supplied_steps(0))) for row in rows)
        room = self.num_latents + 1 + given + self.probe.config.max_new_tokens
        model = self.probe.model
        if states is not None and model.latent_token_id is None:
            states = self._marker().expand_as(states)
        with autocast(model, self.probe.config.compute_dtype):
            return run_prefix(model, batch.input_ids, batch.attention_mask, room, states)

    def _branches(
        self,
        rows: list[int],
        reads: list[int],
        vectors: Tensor | None,
        steps: list[list[int]] | None = None,
        without: int = 0,
    ) -> Branches:
        """Of each row: as many latents as `reads` has, the marker that ends them, the steps.
        without: how many latents of the prefix they do not see."""
        model = self.probe.model
        latents = [self._tokens.latent] * len(reads)
        ids = [[*latents, self._tokens.end, *more] for more in steps or [[]] * len(rows)]
        if model.latent_token_id is None:  # nothing is fed back: the token's own embedding is read
            reads = [TOKEN] * len(reads)
        if vectors is None:
            width = embedding_table(model.base_causallm).shape[1]
            vectors = torch.zeros(len(rows), len(reads), width, device=self.probe.device)
        return make_branch(ids, reads, vectors, without)

    def _run(self, prefix: Prefix, several: list[Branches]) -> tuple[list[Answers], Tensor]:
        """The answers of each branch, and the states (B, M, V, D) before its first columns."""
        probe, limit = self.probe, self.probe.config.max_new_tokens
        with autocast(probe.model, probe.config.compute_dtype):
            written, states = run_branches(probe.model, prefix, join(several), limit)
        return [probe.read_answers(of_branch) for of_branch in zip(*written)], states


def another_order(seed: int, row: int, count: int) -> list[int]:
    """A random permutation that is one cycle: nothing stays in its place."""
    cycle = np.random.default_rng(derive_seed(seed, "order", row)).permutation(count)
    order = np.empty_like(cycle)
    order[cycle] = np.roll(cycle, 1)
    return order.tolist()


def compare_states(before: Tensor, after: Tensor) -> list[list[float]]:
    """Of each latent, sums over the rows of (B, K, D) states: their cosine, the length of the
    difference and the length of the new one, both as parts of the old one's length."""
    before, after = before.double(), after.double()
    length = before.norm(dim=-1)
    figures = torch.stack(
        [
            torch.cosine_similarity(before, after, dim=-1),
            (after - before).norm(dim=-1) / length,
            after.norm(dim=-1) / length,
        ],
        dim=-1,
    )  # (B, K, 3)
    return figures.sum(0).tolist()
