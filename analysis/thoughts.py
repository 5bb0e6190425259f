"""What the latents of a probe's rows hold, and what its answers lose without each."""

import torch
from torch import Tensor

from analysis.probe import Probe, Replacement
from dataset import StageDataset
from engine.evaluation import wilson_interval
from engine.text import TextFormat


@torch.no_grad()
def look_into(
    probe: Probe, dataset: StageDataset, rows: list[int], top: int, graded: bool = True
) -> dict:
    """Per row and latent: top tokens, norm, answers without it; per latent: means over the rows.

    graded: whether the rows have gold answers. All rows have the same number of latents.
    """
    states = thoughts(probe, dataset, rows)  # (rows, K, D), one row more behind a single one
    embeddings = probe.embeddings()  # (tokens, D)
    plain, text = probe.answers(dataset, rows), probe.text_format
    by_row = [answered(probe, row, answer, graded) for row, answer in zip(rows, plain)]
    gold = [entry["gold_answer"] for entry in by_row]
    by_latent = []
    for k in range(states.shape[1]):
        without = {
            kind: probe.answers(dataset, rows, replaced)
            for kind, replaced in replacements(states, k, embeddings.mean(0)).items()
        }
        different = lambda answers: sum(not alike(text, a, p) for a, p in zip(answers, plain))
        changed = {kind: different(answers) for kind, answers in without.items()}
        norms = states[: len(rows), k].float().norm(dim=-1)  # (rows,)
        by_latent.append(
            {
                "norm": float(norms.mean()),
                "changed": {kind: n / len(rows) for kind, n in changed.items()},
                "changed_interval": {k: wilson_interval(n, len(rows)) for k, n in changed.items()},
                "accuracy": {k: accuracy(text, answers, gold) for k, answers in without.items()},
            }
        )
        for i, entry in enumerate(by_row):
            entry["latents"].append(
                {
                    "norm": float(norms[i]),
                    "top": probe.nearest_tokens(states[i, k], top),
                    "answer_without": {kind: answers[i] for kind, answers in without.items()},
                }
            )
    return {
        "checkpoint": str(probe.inputs.start.source),
        "embedding_norm": float(embeddings.norm(dim=-1).mean()),
        "accuracy": accuracy(text, plain, gold),
        "rows": by_row,
        "latents": by_latent,
    }


def answered(probe: Probe, row: int, answer: str | None, graded: bool) -> dict:
    """What is known of a row before anything is replaced."""
    gold = probe.rows[row]["answer"] if graded else None
    return {
        "row": row,
        "question": probe.rows[row]["question"],
        "gold_answer": gold,
        "answer": answer,
        "correct": None if gold is None else probe.text_format.same_answer(answer, gold),
        "latents": [],
    }


def thoughts(probe: Probe, dataset: StageDataset, rows: list[int]) -> Tensor:
    """The states fed back, (rows, K, D). A single row is followed by the file's next one with as
    many latents, where there is one: another question to take thoughts from."""
    if len(rows) == 1:
        after = [*range(rows[0] + 1, len(dataset)), *range(rows[0])]
        same = [row for row in after if dataset.num_latents[row] == dataset.num_latents[rows[0]]]
        rows = [*rows, *same[:1]]
    return probe.thoughts(dataset, rows)


def replacements(states: Tensor, k: int, mean: Tensor) -> dict[str, Replacement]:
    """What to put at latent k: zeros, the mean embedding, the next row's state."""
    values = {
        "zero": torch.zeros_like(states[:, k]),
        "mean": mean.to(states.dtype).expand_as(states[:, k]),
    }
    if len(states) > 1:
        values["other"] = states[:, k].roll(-1, 0)
    return {kind: (k, value) for kind, value in values.items()}


def alike(text: TextFormat, one: str | None, other: str | None) -> bool:
    return one == other or (other is not None and text.same_answer(one, other))


def accuracy(text: TextFormat, answers: list[str | None], gold: list[str | None]) -> float | None:
    """None where nobody knows the answers."""
    known = [answer for answer in gold if answer is not None]
    if len(known) < len(gold):
        return None
    return sum(text.same_answer(a, g) for a, g in zip(answers, known)) / len(known)
