"""What the latents of a probe's rows hold, and what its answers lose without each."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from analysis import pictures
from analysis.ask import load_questions
from analysis.output import add_config, check_output, chosen_rows, write_json
from analysis.probe import Probe, Replacement, load_probe, read_config
from dataset import StageDataset
from engine.evaluation import wilson_interval
from engine.text import TextFormat
from utils import UserError

LOOK_ROWS = 4  # shown where --rows is not given


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_config(command)
    one_of = command.add_mutually_exclusive_group()
    one_of.add_argument("--question", action="append", help="may be given several times")
    one_of.add_argument("--rows", help="of val_path, such as 0,1,2")
    command.add_argument("--output_dir", type=Path)
    command.add_argument("--top", type=int, default=5, choices=range(1, 11))


def run(args: argparse.Namespace) -> None:
    """What the latents hold, and what the answers lose without each."""
    config = read_config(*args.config)
    folder = args.output_dir or config.run_dir
    check_output(folder, "thoughts.json", "thoughts.png")
    if not config.feeds_back:
        raise UserError(
            "look: nothing is fed back here (latent_input: pause, or a method without "
            "latents); there are no thoughts to look into"
        )
    number, *more = config.forced_latents
    if more:
        raise UserError("look: give one number of latents in eval_num_latents, not several")
    probe = (
        load_questions(args.config, args.question, None) if args.question else load_probe(config)
    )
    default = len(probe.rows) if args.question else LOOK_ROWS
    dataset, rows = probe.dataset(number), chosen_rows(args.rows, default, probe)
    counts = sorted({int(dataset.num_latents[row]) for row in rows})
    if len(counts) > 1 or counts[0] == 0:
        raise UserError(
            f"look: the rows have {counts} latents; set eval_num_latents to one number above 0"
        )
    report = look_into(probe, dataset, rows, args.top, not args.question)
    print(pictures.describe_thoughts(report))
    write_json(folder / "thoughts.json", report)
    pictures.draw_thoughts(report, folder / "thoughts.png")
    print(f"written: {folder}/thoughts.json and thoughts.png")


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
