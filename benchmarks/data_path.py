"""Padding of the batches, and the way of the rows from a file to the model."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from parts import benchmark_tokenizer, made_up_rows, small_model, table
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from coconut import Coconut, add_latent_tokens
from curriculum import Curriculum
from dataset import LatentTokens, StageDataset, load_rows
from engine.batches import MicroBatches, plan_steps, split_by_length
from engine.encoding import encode_rows
from engine.loop import Step, fetch_step

ROOT = Path(__file__).resolve().parents[1]
PER_STEP, BATCH, LONGEST = 96, 16, 512  # the main config's
ALL_ROWS = 385_620  # of GSM8K-Aug
WAITED_STEPS = 4


def tokenizer_and_markers() -> tuple[PreTrainedTokenizerBase, LatentTokens]:
    tokenizer = benchmark_tokenizer()
    return tokenizer, LatentTokens(*add_latent_tokens(tokenizer))


# ------------------------------------------------------------------------------- padding


def positions_per_token(
    dataset: StageDataset, steps: list[np.ndarray], split: Callable[[np.ndarray], list[np.ndarray]]
) -> float:
    """Computed positions for each real one, where `split` makes a step's micro-batches."""
    positions = real = 0
    for rows in steps:
        for part in split(rows):
            suffix = dataset.total_length[part] - dataset.prefix_length[part]
            positions += (dataset.prefix_length[part].max() + suffix.max()) * len(part)
            real += dataset.total_length[part].sum()
    return float(positions / real)


def measure_padding() -> None:
    path = ROOT / "data" / "gsm8k_train.json"
    rows = load_rows(path)[:50_000] if path.exists() else made_up_rows(7000)
    tokenizer, tokens = tokenizer_and_markers()
    as_they_come = lambda rows: [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    by_length = lambda rows: sum(split_by_length(rows, dataset, 1, BATCH), [])
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        encoded = encode_rows(rows, tokenizer, list(tokens), folder, "rows")
        for stage in (1, 2, 3):
            dataset = StageDataset(encoded, Curriculum(), tokens, stage)
            steps, _ = plan_steps(dataset, PER_STEP, LONGEST, 0, 1)
            grouped, _ = plan_steps(dataset, PER_STEP, LONGEST, 0, 1, group_by_length=True)
            figures.append(
                [
                    stage,
                    positions_per_token(dataset, steps, as_they_come),
                    positions_per_token(dataset, steps, by_length),
                    positions_per_token(dataset, grouped, by_length),
                ]
            )
    name = f"of data/{path.name}" if path.exists() else "made up"
    table(
        f"Positions per real token: steps of 6 x 16 rows, {len(rows)} rows {name}",
        ["stage", "as they come", "split by length", "group_by_length"],
        figures,
    )


# ------------------------------------------------------------------------------- the data path


def measure_data(count: int = ALL_ROWS) -> None:
    """From the file to batches, at GSM8K-Aug's size, and how long the model waits for them."""
    tokenizer, tokens = tokenizer_and_markers()
    seconds: Counter[str] = Counter()

    def timed(name: str, action: Callable, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = action(*args, **kwargs)
        seconds[name] += time.perf_counter() - start
        return result

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.json"
        path.write_text(json.dumps(made_up_rows(count)))
        for run in ("first start", "second start"):  # the second finds the cache
            rows = timed(run, load_rows, path)
            encoded = timed(run, encode_rows, rows, tokenizer, list(tokens), folder, "rows")
        del rows
        name = "another stage and epoch"
        dataset = timed(name, StageDataset, encoded, Curriculum(), tokens, 3)
        steps, _ = timed(name, plan_steps, dataset, PER_STEP, LONGEST, 0, 1)
        ranks = dict(num_ranks=1, rank=0, batch_size=BATCH, pad_id=0)
        batches = timed(name, MicroBatches, dataset, steps, **ranks)
        timed(
            "a micro-batch of 16 rows, made by a worker",
            lambda: [batches[i % len(batches)] for i in range(200)],
        )
        seconds["a micro-batch of 16 rows, made by a worker"] /= 200
        figures = [[k, v] for k, v in seconds.items()]
        first, share, step = waiting(batches, len(tokenizer), tokens.latent)
    figures += [
        ["until the first micro-batch of an epoch", first],
        [f"waiting per micro-batch of {step:.2f} s after that", share * step],
    ]
    table(
        f"Data path: {count} rows made up, {path.name} as GSM8K-Aug's; seconds",
        ["what", "seconds"],
        figures,
    )
    print(f"\nThe loop waits {share:.2%} of its time for one worker.")


def waiting(batches: MicroBatches, vocab_size: int, latent: int) -> tuple[float, float, float]:
    """Seconds until the first micro-batch, then the share of the time that training waits for
    one worker, and the seconds of a micro-batch."""
    model = Coconut(small_model(vocab_size, 4, 128), latent_token_id=latent, eos_token_id=0).train()
    loader = iter(DataLoader(batches, batch_size=None, num_workers=1))
    step, start = Step(np.arange(PER_STEP)), time.perf_counter()
    first, count = None, 0
    for _ in range(WAITED_STEPS):
        for batch in fetch_step(loader, step):
            if first is None:  # the worker's start is counted by itself
                first, step.waiting = step.waiting, 0.0
                start = time.perf_counter()
            model(**batch.inputs()).loss.backward()
            model.zero_grad()
            count += 1
    passed = time.perf_counter() - start
    return first, step.waiting / passed, passed / count
