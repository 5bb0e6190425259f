"""Generate, judge, count; writes validation_examples.txt and per-row results.

The protocol: greedy completions, read and compared as dataset.py says, beside the format in which
rows are written. Each row is evaluated exactly once, on any number of ranks.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset import (
    StageDataset,
    collate,
    decode_completions,
    extract_answer,
    extract_steps,
    same_answer,
    same_steps,
)
from engine.distributed import Processes, gather_objects, gathered, sum_over_ranks
from utils import write_whole

NUM_EXAMPLES = 10  # rows shown in full in validation_examples.txt
Z95 = 1.959964  # 97.5% point of the normal distribution


@dataclass
class Evaluation:
    """Figures of one evaluation; rates in [0, 1], counts in rows or tokens."""

    latents: str  # their number; "0-6" where it differs between rows
    accuracy: float
    accuracy_low: float  # 95% Wilson interval
    accuracy_high: float
    cot_match: float | None  # None: no row has steps left to write
    cot_rows: int
    rows: int
    new_tokens: float  # mean, latents counted, eos not
    seconds_per_row: float

    def line(self) -> str:
        interval = f"[{self.accuracy_low:.1%}, {self.accuracy_high:.1%}]"
        match = "-" if self.cot_match is None else f"{self.cot_match:.1%} of {self.cot_rows} rows"
        return (
            f"accuracy {self.accuracy:.1%} {interval} of {self.rows} rows, CoT match {match}, "
            f"{self.new_tokens:.1f} new tokens, {self.seconds_per_row:.3f} s per row"
        )


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927)."""
    rate, spread = successes / total, Z95 * Z95 / total
    centre = (rate + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(rate * (1 - rate) / total + spread / total / 4) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


# ------------------------------------------------------------------------------- running


def _share(dataset: StageDataset, num_rows: int, processes: Processes, batch_size: int):
    """This rank's rows in batches of like length: every row on exactly one rank."""
    order = sorted(range(num_rows), key=lambda row: (dataset.prefix_length[row], row))
    mine = order[processes.rank :: processes.world_size]
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


def _to(batch: dict, device: torch.device, *names: str) -> dict:
    return {name: batch[name].to(device, non_blocking=True) for name in names}


@torch.no_grad()
def validation_loss(
    model: nn.Module, dataset: StageDataset, processes: Processes, batch_size: int, pad_id: int
) -> float:
    """Mean cross-entropy over all labelled tokens of all rows, in nats."""
    total, tokens = 0.0, 0
    model.eval()
    with gathered(model):
        for rows in _share(dataset, len(dataset), processes, batch_size):
            batch = collate([dataset[row] for row in rows], pad_id)
            names = ("input_ids", "attention_mask", "position_ids", "labels", "label_index")
            output = model(
                **_to(batch, processes.device, *names),
                latent_columns=batch["latent_columns"],
                num_items_in_batch=1,
            )
            total += output.loss.item()
            tokens += len(batch["label_index"])
    total, tokens = sum_over_ranks([total, tokens], processes.device)
    return total / tokens


def _complete(model, dataset, processes, batch_size, max_new_tokens, pad_id) -> Iterator[tuple]:
    """Yield (row, prompt tokens, new tokens, seconds) of this rank's rows."""
    batches = _share(dataset, len(dataset), processes, batch_size)
    bar = tqdm(
        total=sum(len(rows) for rows in batches),
        desc="generating",
        unit="row",
        disable=not processes.is_main,
        leave=False,
        dynamic_ncols=True,
    )
    for rows in batches:
        start = time.perf_counter()
        samples = [dataset.question(row) for row in rows]
        batch = collate(samples, pad_id, align_end=True)
        completions = model.generate(
            **_to(batch, processes.device, "input_ids", "attention_mask"),
            max_new_tokens=max_new_tokens,
            latent_columns=batch["latent_columns"],
        )
        completions = [tokens.tolist() for tokens in completions]  # waits for the device
        seconds = (time.perf_counter() - start) / len(rows)
        for sample, tokens in zip(samples, completions):
            yield sample.row, sample.input_ids.tolist(), tokens, seconds
        bar.update(len(rows))
    bar.close()


def _judge(row: dict, prompt: list[int], new: list[int], tokenizer, skipped: int) -> dict:
    """The result of one row, ready for JSON."""
    (completion,) = decode_completions(tokenizer, [new])
    gold_steps = row["steps"][skipped:]
    answer, steps = extract_answer(completion), extract_steps(completion)
    return {
        "question": row["question"],
        "gold_steps": row["steps"],
        "gold_answer": row["answer"],
        "output": tokenizer.decode(prompt + new, skip_special_tokens=False),
        "steps": steps,
        "answer": answer,
        "correct": same_answer(answer, row["answer"]),
        "cot_match": same_steps(steps, gold_steps) if gold_steps else None,
        "new_tokens": len(new) - (new[-1:] == [tokenizer.eos_token_id]),
    }


def evaluate(
    model: nn.Module,
    dataset: StageDataset,
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
    batch_size: int,
    max_new_tokens: int,
    pad_id: int,
) -> tuple[Evaluation, list[dict]] | None:
    """Generate and judge all rows; the figures and the rows' results on the main process."""
    model.eval()
    results, seconds = [], 0.0
    with gathered(model):
        for row, prompt, new, took in _complete(
            model, dataset, processes, batch_size, max_new_tokens, pad_id
        ):
            latents = int(dataset.num_latents[row])
            result = _judge(rows[row], prompt, new, tokenizer, int(dataset.num_skipped[row]))
            result = {"row": row, "num_latents": latents, **result}
            result["new_tokens"] += latents
            results.append(result)
            seconds += took
    (seconds,) = sum_over_ranks([seconds], processes.device)
    everywhere = gather_objects(results)
    if everywhere is None:
        return None
    results = sorted((r for part in everywhere for r in part), key=lambda r: r["row"])
    return summarise(results, seconds), results


def summarise(results: list[dict], seconds: float) -> Evaluation:
    total = len(results)
    correct = sum(r["correct"] for r in results)
    matches = [r["cot_match"] for r in results if r["cot_match"] is not None]
    low, high = wilson_interval(correct, total)
    fewest, most = min(r["num_latents"] for r in results), max(r["num_latents"] for r in results)
    return Evaluation(
        latents=f"{most}" if fewest == most else f"{fewest}-{most}",
        accuracy=correct / total,
        accuracy_low=low,
        accuracy_high=high,
        cot_match=sum(matches) / len(matches) if matches else None,
        cot_rows=len(matches),
        rows=total,
        new_tokens=sum(r["new_tokens"] for r in results) / total,
        seconds_per_row=seconds / total,
    )


def table(evaluations: list[Evaluation]) -> str:
    """Evaluations of one model with different numbers of latents, as a Markdown table."""
    lines = [
        "| latents | accuracy | 95% interval | CoT match | new tokens | seconds per row |",
        "|---|---|---|---|---|---|",
    ]
    for e in evaluations:
        match = "-" if e.cot_match is None else f"{e.cot_match:.1%} of {e.cot_rows}"
        lines.append(
            f"| {e.latents} | {e.accuracy:.1%} | {e.accuracy_low:.1%} to {e.accuracy_high:.1%} "
            f"| {match} | {e.new_tokens:.1f} | {e.seconds_per_row:.3f} |"
        )
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- files


def format_examples(title: str, results: list[dict]) -> str:
    """The first results in full, for reading."""
    blocks = [f"{'=' * 100}\n{title}\n{'=' * 100}"]
    for r in results[:NUM_EXAMPLES]:
        blocks.append(
            f"row {r['row']}: {'RIGHT' if r['correct'] else 'WRONG'}, "
            f"{r['num_latents']} latents, {r['new_tokens']} new tokens with them\n"
            f"question:         {r['question']}\n"
            f"gold steps:       {' '.join(r['gold_steps']) or '(none)'}\n"
            f"gold answer:      {r['gold_answer']}\n"
            f"full output:\n{r['output']}\n"
            f"extracted steps:  {' '.join(r['steps']) or '(none)'}\n"
            f"extracted answer: {'(no ###)' if r['answer'] is None else r['answer']}\n"
            f"{'-' * 100}"
        )
    return "\n".join(blocks) + "\n"


def write_results(run_dir: Path, title: str, file_name: str, results: list[dict]) -> None:
    """Append the examples to validation_examples.txt, write all rows to <file_name>.jsonl."""
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    write_whole(run_dir / f"{file_name}.jsonl", lines)
    with open(run_dir / "validation_examples.txt", "a", encoding="utf-8") as file:
        file.write(format_examples(title, results))
