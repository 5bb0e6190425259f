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
from dataset import LatentTokens, StageDataset
from engine.batches import MicroBatches, plan_steps, split_by_length
from engine.encoding import encode_rows
from engine.loop import Step, fetch
from rows import load_rows

ROOT = Path(__file__).resolve().parents[1]
PER_STEP, BATCH, LONGEST = 96, 16, 512
POSITIONS = (2560, 6656)  # the second is the main config's
ALL_ROWS = 385_620  # of GSM8K-Aug
WAITED_STEPS = 4


def tokenizer_and_markers() -> tuple[PreTrainedTokenizerBase, LatentTokens]:
    tokenizer = benchmark_tokenizer()
    return tokenizer, LatentTokens(*add_latent_tokens(tokenizer))


# ------------------------------------------------------------------------------- padding


def positions_per_token(
    dataset: StageDataset, steps: list[np.ndarray], split: Callable[[np.ndarray], list[np.ndarray]]
) -> tuple[float, float]:
    """Computed positions for each real one, where `split` makes a step's micro-batches, and how
    many these are a step."""
    positions = real = count = 0
    for rows in steps:
        parts = split(rows)
        count += len(parts)
        for part in parts:
            suffix = dataset.total_length[part] - dataset.prefix_length[part]
            positions += (dataset.prefix_length[part].max() + suffix.max()) * len(part)
            real += dataset.total_length[part].sum()
    return float(positions / real), count / len(steps)


def measure_padding() -> None:
    path = ROOT / "data" / "gsm8k_train.json"
    rows = load_rows(path)[:50_000] if path.exists() else made_up_rows(7000)
    tokenizer, tokens = tokenizer_and_markers()
    as_they_come = lambda rows: [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    split = lambda *limits: lambda rows: split_by_length(rows, dataset, 1, *limits)[0]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        encoded = encode_rows(rows, tokenizer, list(tokens), folder, "rows")
        for stage in (1, 2, 3):
            dataset = StageDataset(encoded, Curriculum(), tokens, stage)
            steps, _ = plan_steps(dataset, PER_STEP, LONGEST, 0, 1)
            grouped, _ = plan_steps(dataset, PER_STEP, LONGEST, 0, 1, group_by_length=True)
            ways = [(steps, as_they_come), (steps, split(BATCH))]
            ways += [(steps, split(BATCH, positions)) for positions in POSITIONS]
            ways += [(grouped, split(BATCH)), (grouped, split(BATCH, POSITIONS[-1]))]
            pairs = [positions_per_token(dataset, *way) for way in ways]
            figures.append([stage, *(f"{ratio:.2f} ({count:.1f})" for ratio, count in pairs)])
    name = f"of data/{path.name}" if path.exists() else "made up"
    table(
        f"Positions per real token (micro-batches), steps of 96 rows, {len(rows)} rows {name}",
        [
            "stage",
            "16 rows as they come",
            "16 rows of like length",
            *(f"{positions} positions" for positions in POSITIONS),
            "16 rows, group_by_length",
            f"{POSITIONS[-1]} positions, group_by_length",
        ],
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
        ranks = dict(num_ranks=1, rank=0, batch_size=BATCH, max_positions=POSITIONS[-1], pad_id=0)
        batches = timed(name, MicroBatches, dataset, steps, **ranks)
        timed(
            "the micro-batches of a step, made by a worker",
            lambda: [batches[i % len(batches)] for i in range(40)],
        )
        seconds["the micro-batches of a step, made by a worker"] /= 40
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
        for batch in fetch(loader, step):
            if first is None:  # the worker's start is counted by itself
                first, step.waiting = step.waiting, 0.0
                start = time.perf_counter()
            model(**batch.inputs()).loss.backward()
            model.zero_grad()
            count += 1
    passed = time.perf_counter() - start
    return first, step.waiting / passed, passed / count
