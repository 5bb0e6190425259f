"""Generate, judge, count.

The protocol: greedy completions, read and compared as engine/text.py says; where asked for, sampled
ones beside them (engine/sampling.py). Each row is evaluated exactly once, on any number of ranks.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from coconut import Coconut
from dataset import Sample, StageDataset, collate
from engine.distributed import World, autocast, gather_objects, gathered, sum_over_ranks
from engine.health import Thoughts
from engine.logs import Bar, Metrics
from engine.partial import PartialResults
from engine.results import results_name, write_results, write_table
from engine.sampling import Sampled, Sampling, summarise_samples
from engine.text import DEFAULT, TextFormat, decode_completion, same_steps
from utils import log

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
    sampled: Sampled | None = None  # of the samples; all else is of the greedy completions

    def record(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value or name != "sampled"}

    def line(self) -> str:
        interval = f"[{self.accuracy_low:.1%}, {self.accuracy_high:.1%}]"
        match = "-" if self.cot_match is None else f"{self.cot_match:.1%} of {self.cot_rows} rows"
        return (
            f"accuracy {self.accuracy:.1%} {interval} of {self.rows} rows, CoT match {match}, "
            f"{self.new_tokens:.1f} new tokens, {self.seconds_per_row:.3f} s per row"
        ) + ("" if self.sampled is None else f"; {self.sampled.line()}")


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95% interval of a rate (Wilson 1927)."""
    rate, spread = successes / total, Z95 * Z95 / total
    centre = (rate + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(rate * (1 - rate) / total + spread / total / 4) / (1 + spread)
    # rounding must not put a rate of 0 or 1 outside
    return max(min(centre - half, rate), 0.0), min(max(centre + half, rate), 1.0)


# ------------------------------------------------------------------------------- running


def batches_of_rank(dataset: StageDataset, world: World, batch_size: int) -> list[list[int]]:
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
    sampling: Sampling | None = None  # None: greedy completions only

    @torch.no_grad()
    def loss(
        self, model: Coconut, dataset: StageDataset, thoughts: Thoughts | None = None
    ) -> float:
        """Mean cross-entropy over all labelled tokens of all rows, in nats. thoughts: is shown the
        latents."""
        total, tokens = 0.0, 0.0
        model.eval()
        with gathered(model), autocast(model, self.compute_dtype):
            for rows in batches_of_rank(dataset, self.world, self.batch_size):
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
        self,
        model: Coconut,
        dataset: StageDataset,
        partial: PartialResults | None = None,
        part: str = "",
    ) -> tuple[Evaluation, list[dict]] | None:
        """Generate and judge all rows; the figures and the results of the rows on the main
        process, None on the others. partial: keeps the results, and knows those of a former
        process, under the name of this part of an evaluation."""
        model.eval()
        results = self._each_row(self._answer, model, dataset, self.batch_size, partial, part)
        samples = None
        if self.sampling is not None:
            size = max(self.batch_size // self.sampling.num_samples, 1)
            name = f"{part}, samples"
            samples = self._each_row(self._sample, model, dataset, size, partial, name)
        if results is None:
            return None
        seconds = sum(result.pop("seconds") for result in results)
        evaluation = summarise(results, seconds)
        if samples is not None:
            by_row = [of_row["samples"] for of_row in samples]
            evaluation = replace(evaluation, sampled=summarise_samples(by_row, self.text_format))
            results = [{**result, "samples": of_row} for result, of_row in zip(results, by_row)]
        return evaluation, results

    def _each_row(
        self,
        work: Callable[[Coconut, StageDataset, list[int]], list[dict]],
        model: Coconut,
        dataset: StageDataset,
        batch_size: int,
        partial: PartialResults | None,
        part: str,
    ) -> list[dict] | None:
        """What the work on a batch of rows says of each, with the row and the seconds: of all rows
        in order on the main process, None on the others."""
        known = {} if partial is None else partial.known(part)
        batches = batches_of_rank(dataset, self.world, batch_size)
        batches = [rows for rows in batches if not known.keys() >= {*rows}]
        results = []
        bar = Bar(
            total=sum(len(rows) for rows in batches),
            desc="generating",
            unit="row",
            disable=not self.world.is_main,
            leave=False,
            dynamic_ncols=True,
        )
        with gathered(model), autocast(model, self.compute_dtype):
            for rows in batches:
                start = time.perf_counter()
                done = work(model, dataset, rows)
                seconds = (time.perf_counter() - start) / len(rows)
                done = [
                    {"row": row, **of_row, "seconds": seconds} for row, of_row in zip(rows, done)
                ]
                if partial is not None:
                    partial.add(part, done)
                results += done
                bar.update(len(rows))
        bar.close()
        collected = gather_objects(results)
        if collected is None:
            return None
        by_row = known | {result["row"]: result for of_rank in collected for result in of_rank}
        return [by_row[row] for row in sorted(by_row)]

    def _answer(self, model: Coconut, dataset: StageDataset, rows: list[int]) -> list[dict]:
        """The greedy completions of a batch, judged."""
        questions, results = [dataset.question(row) for row in rows], []
        for row, question, new in zip(rows, questions, self._complete(model, questions)):
            latents, skipped = int(dataset.num_latents[row]), int(dataset.num_skipped[row])
            example, prompt = dataset.encoded.rows[row], question.input_ids.tolist()
            result = _judge(example, prompt, new, self.tokenizer, skipped, self.text_format)
            result["new_tokens"] += latents
            results.append({"num_latents": latents, **result})
        return results

    def _sample(self, model: Coconut, dataset: StageDataset, rows: list[int]) -> list[dict]:
        """The samples of the rows of a batch, batch_size of them together, judged."""
        assert self.sampling is not None
        questions, total = [dataset.question(row) for row in rows], self.sampling.num_samples
        samples: list[list[dict]] = [[] for _ in rows]
        for first in range(0, total, self.batch_size):
            some = range(first, min(first + self.batch_size, total))
            choose = self.sampling.chooser(rows, some, self.max_new_tokens, self.world.device)
            completions = self._complete(model, questions, num_samples=len(some), choose=choose)
            for number, new in enumerate(completions):
                at = number // len(some)
                latents, gold = int(dataset.num_latents[rows[at]]), dataset.encoded.rows[rows[at]]
                sample = _read(gold, new, self.tokenizer, self.text_format)
                samples[at].append(sample | {"new_tokens": sample["new_tokens"] + latents})
        return [{"samples": of_row} for of_row in samples]

    def _complete(
        self, model: Coconut, questions: list[Sample], **sampling: Any
    ) -> list[list[int]]:
        """New tokens of each completion; waits for the device."""
        prompts = collate(questions, self.pad_id, align_end=True).to(self.world.device)
        completions = model.generate(
            prompts.input_ids,
            prompts.attention_mask,
            self.max_new_tokens,
            latent_columns=prompts.latent_columns,
            **sampling,
        )
        return [tokens.tolist() for tokens in completions]


def _read(
    row: dict, new: list[int], tokenizer: PreTrainedTokenizerBase, text_format: TextFormat
) -> dict:
    """What a completion says, as text, and whether its answer is the row's."""
    completion = decode_completion(tokenizer, new)
    answer = text_format.answer(completion)
    return {
        "completion": completion,
        "answer": answer,
        "correct": text_format.same_answer(answer, row["answer"]),
        "new_tokens": len(new) - (new[-1:] == [tokenizer.eos_token_id]),
    }


def _judge(
    row: dict,
    prompt: list[int],
    new: list[int],
    tokenizer: PreTrainedTokenizerBase,
    skipped: int,
    text_format: TextFormat = DEFAULT,
) -> dict:
    """The result of one row, ready for JSON."""
    read = _read(row, new, tokenizer, text_format)
    gold_steps, steps = row["steps"][skipped:], text_format.steps(read["completion"])
    return {
        "question": row["question"],
        "gold_steps": row["steps"],
        "gold_answer": row["answer"],
        "output": tokenizer.decode(prompt + new, skip_special_tokens=False),
        "steps": steps,
        "answer": read["answer"],
        "correct": read["correct"],
        "cot_match": same_steps(steps, gold_steps) if gold_steps else None,
        "new_tokens": read["new_tokens"],
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


def table(evaluations: list[Evaluation], sets: list[str] | None = None) -> str:
    """Evaluations of one model with different numbers of latents, on these sets where there are
    several, as a Markdown table."""
    head = ["latents", "accuracy", "95% interval", "CoT match", "new tokens", "seconds per row"]
    first, lines = evaluations[0].sampled, []
    head += ["rows", *(first.columns() if first else ())]
    for e in evaluations:
        match = "-" if e.cot_match is None else f"{e.cot_match:.1%} of {e.cot_rows}"
        interval = f"{e.accuracy_low:.1%} to {e.accuracy_high:.1%}"
        cells = [e.latents, f"{e.accuracy:.1%}", interval, match, f"{e.new_tokens:.1f}"]
        cells += [f"{e.seconds_per_row:.3f}", f"{e.rows}"]
        cells += [f"{rate:.1%}" for rate in (e.sampled.columns().values() if e.sampled else ())]
        lines.append(f"| {' | '.join(cells)} |\n")
    if sets is not None:
        head, lines = ["set", *head], [f"| {name} {line}" for name, line in zip(sets, lines)]
    return f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n{''.join(lines)}"


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
    figures: dict[str, Any] | None = None,
    eval_set: str | None = None,
    about: dict[str, Any] | None = None,
    partial: PartialResults | None = None,
) -> list[Evaluation]:
    """Evaluate with each number of latents (None: the stage's own), write and log all results.

    figures: the loss and more with the stage's own number, to record with it. eval_set: the rows'
    name in the config. about: is recorded with all of them. partial: as in Evaluator.evaluate.
    Returns the evaluations on the main process, [] on the others.
    """
    evaluations = []
    for number, dataset in datasets.items():
        part = part_of_evaluation(eval_set, number, dataset)
        outcome = evaluator.evaluate(model, dataset, partial, part)
        if outcome is None:
            continue
        evaluations.append(evaluation := outcome[0])
        title = _title(epoch, stage, evaluation.latents, number, eval_set)
        more = {} if figures is None or number is not None else figures
        told = f", loss {more['loss']:.4f}" if more else ""
        log.info(f"{title}: {evaluation.line()}{told}")
        results = [{"epoch": epoch, "stage": stage, **result} for result in outcome[1]]
        write_results(run_dir, title, results_name(epoch, number, eval_set), results)
        metrics.write(
            **_kind(eval_set),
            **(about or {}),
            epoch=epoch,
            stage=stage,
            forced_latents=number,
            global_step=global_step,
            **more,
            **evaluation.record(),
        )
    if len(evaluations) > 1 and eval_set is None:
        text = table(evaluations)
        log.info(f"epoch {epoch}, stage {stage}:\n{text}")
        write_table(run_dir / f"latents_epoch_{epoch}.md", text)
    return evaluations


def part_of_evaluation(eval_set: str | None, number: int | None, dataset: StageDataset) -> str:
    """What PartialResults calls the rows of a set with a number of latents."""
    return f"set {eval_set}, rows {dataset.encoded.fingerprint}, latents {number}"


def _title(epoch: int, stage: int, latents: str, forced: int | None, eval_set: str | None) -> str:
    title = "" if eval_set is None else f"{eval_set}: "
    title += f"epoch {epoch}, stage {stage}, {latents} latents"
    return title if forced is None else f"{title} (forced)"


def _kind(eval_set: str | None) -> dict[str, str]:
    """Of a record: a run's validations have one of their own, which its curve draws."""
    return {"kind": "eval"} if eval_set is None else {"kind": "eval_set", "eval_set": eval_set}
