"""Generate, judge, count; writes validation_examples.txt and per-row results.

The protocol: greedy completions, read and compared as engine/text.py says. Each row is evaluated
exactly once, on any number of ranks.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from coconut import Coconut
from dataset import StageDataset, collate
from engine.distributed import World, autocast, gather_objects, gathered, sum_over_ranks
from engine.files import write_whole
from engine.health import Thoughts
from engine.logs import Metrics
from engine.text import DEFAULT, TextFormat, decode_completion, same_steps
from utils import log

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


def _batches_of_rank(dataset: StageDataset, world: World, batch_size: int) -> list[list[int]]:
    """This rank's rows in batches of like length: every row on exactly one rank."""
    order = sorted(range(len(dataset)), key=lambda row: (dataset.prefix_length[row], row))
    mine = order[world.rank :: world.world_size]
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


@dataclass(frozen=True)
class Evaluator:
    """How a model is evaluated on a data set of one stage."""

    tokenizer: PreTrainedTokenizerBase
    world: World
    pad_id: int
    batch_size: int
    max_new_tokens: int
    compute_dtype: torch.dtype
    text_format: TextFormat = DEFAULT

    @torch.no_grad()
    def loss(
        self, model: Coconut, dataset: StageDataset, thoughts: Thoughts | None = None
    ) -> float:
        """Mean cross-entropy over all labelled tokens of all rows, in nats. thoughts: is shown the
        latents."""
        total, tokens = 0.0, 0.0
        model.eval()
        with gathered(model), autocast(model, self.compute_dtype):
            for rows in _batches_of_rank(dataset, self.world, self.batch_size):
                samples = [dataset[row] for row in rows]
                batch = collate(samples, self.pad_id)
                output = model(**batch.to(self.world.device).inputs(), num_items_in_batch=1)
                total += output.loss.item()
                tokens += len(batch.label_index)
                if thoughts is not None and output.latents.shape[1]:
                    counts = [sample.num_fed_back for sample in samples]
                    thoughts.add(model, output.latents, counts)
        total, tokens = sum_over_ranks([total, tokens], self.world.device)
        return total / tokens

    def evaluate(
        self, model: Coconut, dataset: StageDataset
    ) -> tuple[Evaluation, list[dict]] | None:
        """Generate and judge all rows; the figures and the results of the rows on the main
        process, None on the others."""
        model.eval()
        results, seconds = [], 0.0
        with gathered(model), autocast(model, self.compute_dtype):
            for row, prompt, new, took in self._complete(model, dataset):
                latents, skipped = int(dataset.num_latents[row]), int(dataset.num_skipped[row])
                example, text_format = dataset.encoded.rows[row], self.text_format
                result = _judge(example, prompt, new, self.tokenizer, skipped, text_format)
                result = {"row": row, "num_latents": latents, **result}
                result["new_tokens"] += latents
                results.append(result)
                seconds += took
        collected = gather_objects((results, seconds))
        if collected is None:
            return None
        results = sorted((r for part, _ in collected for r in part), key=lambda r: r["row"])
        return summarise(results, sum(s for _, s in collected)), results

    def _complete(self, model: Coconut, dataset: StageDataset) -> Iterator[tuple]:
        """Yield (row, prompt tokens, new tokens, seconds) of this rank's rows."""
        batches = _batches_of_rank(dataset, self.world, self.batch_size)
        bar = tqdm(
            total=sum(len(rows) for rows in batches),
            desc="generating",
            unit="row",
            disable=not self.world.is_main,
            leave=False,
            dynamic_ncols=True,
        )
        for rows in batches:
            start = time.perf_counter()
            samples = [dataset.question(row) for row in rows]
            batch = collate(samples, self.pad_id, align_end=True).to(self.world.device)
            completions = model.generate(
                batch.input_ids,
                batch.attention_mask,
                self.max_new_tokens,
                latent_columns=batch.latent_columns,
            )
            new_tokens = [tokens.tolist() for tokens in completions]  # waits for the device
            seconds = (time.perf_counter() - start) / len(rows)
            for sample, new in zip(samples, new_tokens):
                yield sample.row, sample.input_ids.tolist(), new, seconds
            bar.update(len(rows))
        bar.close()


def _judge(
    row: dict,
    prompt: list[int],
    new: list[int],
    tokenizer: PreTrainedTokenizerBase,
    skipped: int,
    text_format: TextFormat = DEFAULT,
) -> dict:
    """The result of one row, ready for JSON."""
    completion = decode_completion(tokenizer, new)
    gold_steps = row["steps"][skipped:]
    answer, steps = text_format.answer(completion), text_format.steps(completion)
    return {
        "question": row["question"],
        "gold_steps": row["steps"],
        "gold_answer": row["answer"],
        "output": tokenizer.decode(prompt + new, skip_special_tokens=False),
        "steps": steps,
        "answer": answer,
        "correct": text_format.same_answer(answer, row["answer"]),
        "cot_match": same_steps(steps, gold_steps) if gold_steps else None,
        "new_tokens": len(new) - (new[-1:] == [tokenizer.eos_token_id]),
    }


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


def evaluate_epoch(
    model: Coconut,
    datasets: dict[int | None, StageDataset],
    evaluator: Evaluator,
    run_dir: Path,
    metrics: Metrics,
    *,
    epoch: int,
    stage: int,
    global_step: int = 0,
    loss: float | None = None,
    health: dict[str, Any] | None = None,
) -> list[Evaluation]:
    """Evaluate with each number of latents (None: the stage's own), write and log all results.

    loss: the validation loss with the stage's own number, to report with it. health: figures to
    record with it. Returns the evaluations on the main process, [] on the others.
    """
    evaluations = []
    for number, dataset in datasets.items():
        outcome = evaluator.evaluate(model, dataset)
        if outcome is None:
            continue
        evaluation, results = outcome
        evaluations.append(evaluation)
        title = f"epoch {epoch}, stage {stage}, {evaluation.latents}"
        title += " latents" if number is None else " latents (forced)"
        more = {} if loss is None or number is not None else {"loss": loss}
        log.info(
            f"{title}: {evaluation.line()}" + "".join(f", loss {x:.4f}" for x in more.values())
        )
        name = f"results_epoch_{epoch}" + ("" if number is None else f"_latents_{number}")
        results = [{"epoch": epoch, "stage": stage, **result} for result in results]
        write_results(run_dir, title, name, results)
        metrics.write(
            kind="eval",
            epoch=epoch,
            stage=stage,
            forced_latents=number,
            global_step=global_step,
            **more,
            **asdict(evaluation),
            **(health or {} if number is None else {}),
        )
    if len(evaluations) > 1:
        text = table(evaluations)
        log.info(f"epoch {epoch}, stage {stage}:\n{text}")
        write_whole(run_dir / f"latents_epoch_{epoch}.md", text)
    return evaluations


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
            f"extracted answer: {'(none)' if r['answer'] is None else r['answer']}\n"
            f"{'-' * 100}"
        )
    return "\n".join(blocks) + "\n"


def write_results(run_dir: Path, title: str, file_name: str, results: list[dict]) -> None:
    """Append the examples to validation_examples.txt, write all rows to <file_name>.jsonl."""
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    write_whole(run_dir / f"{file_name}.jsonl", lines)
    with open(run_dir / "validation_examples.txt", "a", encoding="utf-8") as file:
        file.write(format_examples(title, results))
