"""What the latents of a probe's rows hold, and what its answers lose without each."""

import torch
from torch import Tensor

from analysis.probe import Probe, Replacement
from dataset import StageDataset
from engine.text import same_answer


@torch.no_grad()
def look_into(
    probe: Probe, dataset: StageDataset, rows: list[int], top: int, graded: bool = True
) -> dict:
    """Per row and latent: top tokens, norm, answers without it; per latent: means over the rows.

    graded: whether the rows have gold answers. All rows have the same number of latents.
    """
    states = thoughts(probe, dataset, rows)  # (rows, K, D), one row more behind a single one
    embeddings = probe.embeddings()  # (tokens, D)
    examples = [probe.rows[row] for row in rows]
    gold = [example["answer"] if graded else None for example in examples]
    plain = probe.answers(dataset, rows)
    by_row = [
        {"row": row, "question": example["question"], "gold_answer": g, "answer": a, "latents": []}
        for row, example, g, a in zip(rows, examples, gold, plain)
    ]
    by_latent = []
    for k in range(states.shape[1]):
        without = {
            kind: probe.answers(dataset, rows, replaced)
            for kind, replaced in replacements(states, k, embeddings.mean(0)).items()
        }
        norms = states[: len(rows), k].float().norm(dim=-1)  # (rows,)
        by_latent.append(
            {
                "norm": float(norms.mean()),
                "changed": {
                    kind: sum(not alike(a, p) for a, p in zip(answers, plain)) / len(rows)
                    for kind, answers in without.items()
                },
                "accuracy": {kind: accuracy(answers, gold) for kind, answers in without.items()},
            }
        )
        for i, entry in enumerate(by_row):
            entry["latents"].append(
                {
                    "norm": float(norms[i]),
                    "top": top_tokens(probe, states[i, k], top),
                    "answer_without": {kind: answers[i] for kind, answers in without.items()},
                }
            )
    return {
        "embedding_norm": float(embeddings.norm(dim=-1).mean()),
        "accuracy": accuracy(plain, gold),
        "rows": by_row,
        "latents": by_latent,
    }


def top_tokens(probe: Probe, state: Tensor, count: int) -> list[dict]:
    """The tokens that the head finds most probable for a state (D,)."""
    best = probe.head(state).softmax(-1).topk(count)
    return [
        {"token": probe.inputs.tokenizer.decode([token]), "probability": p}
        for token, p in zip(best.indices.tolist(), best.values.tolist())
    ]


def thoughts(probe: Probe, dataset: StageDataset, rows: list[int]) -> Tensor:
    """The states fed back, (rows, K, D). A single row is followed by the file's next one with as
    many latents, where there is one: another question to take thoughts from."""
    if len(rows) == 1:
        after = [*range(rows[0] + 1, len(dataset)), *range(rows[0])]
        same = [row for row in after if dataset.num_latents[row] == dataset.num_latents[rows[0]]]
        rows = [*rows, *same[:1]]
    size = probe.config.batch_size_eval
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return torch.cat([probe.forward(probe.prompts(dataset, part)).latents for part in parts])


def replacements(states: Tensor, k: int, mean: Tensor) -> dict[str, Replacement]:
    """What to put at latent k: zeros, the mean embedding, the next row's state."""
    values = {
        "zero": torch.zeros_like(states[:, k]),
        "mean": mean.to(states.dtype).expand_as(states[:, k]),
    }
    if len(states) > 1:
        values["other"] = states[:, k].roll(-1, 0)
    return {kind: (k, value) for kind, value in values.items()}


def alike(one: str | None, other: str | None) -> bool:
    return one == other or (other is not None and same_answer(one, other))


def accuracy(answers: list[str | None], gold: list[str | None]) -> float | None:
    """None where nobody knows the answers."""
    known = [answer for answer in gold if answer is not None]
    if len(known) < len(gold):
        return None
    return sum(same_answer(a, g) for a, g in zip(answers, known)) / len(known)
