"""The time forecast against times on this CPU, with constants that are measured here."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from parts import small_model, table
from roofline import Machine, Shape, time_of_micro_batch
from speed import LATENT, random_batch

from coconut import Coconut
from loader import load_config

CONFIG = Path(__file__).resolve().parents[1] / "args" / "quickstart.yaml"  # float32, nothing twice
# blocks, hidden size, vocabulary, micro-batch
CASES = (
    (8, 512, 32_000, Shape(16, 60, 6, 40)),
    (12, 256, 8000, Shape(4, 30, 12, 20)),
    (4, 384, 32_000, Shape(32, 100, 0, 60)),
    (3, 128, 500, Shape(32, 30, 6, 20)),
)
TINY = (4, 128, 500, Shape(1, 4, 12, 4))  # its step is launches


def usual(action: Callable[[], object], repeats: int) -> float:
    """CPU seconds, the median."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def real_seconds(blocks: int, hidden: int, vocab_size: int, shape: Shape, repeats: int) -> float:
    base = small_model(vocab_size, blocks, hidden)
    model = Coconut(base, LATENT, eos_token_id=0).train()
    batch = random_batch(*shape, vocab_size)
    return usual(lambda: model(**batch).loss.backward(), repeats)


def this_cpu() -> Machine:
    """One thread of it."""
    left, right = torch.randn(1024, 512), torch.randn(512, 1536)
    vector = torch.randn(2**18)
    kept = lambda: [vector + 1 for _ in range(100)]  # in new memory, as activations
    machine = Machine(
        "one thread of this CPU",
        products=2 * 1024 * 512 * 1536 / usual(lambda: left @ right, 20),
        bandwidth=100 * 2 * 4 * 2**18 / usual(kept, 20),
        memory=0,
        link=1,
        products_share=1,
        bandwidth_share=1,
        launch=0,
        is_gpu=False,
    )
    kernels = forecast_of(*TINY, machine)[1]
    return machine._replace(launch=real_seconds(*TINY, repeats=9) / kernels)


def forecast_of(
    blocks: int, hidden: int, vocab_size: int, shape: Shape, machine: Machine
) -> tuple[float, float]:
    """Seconds, and the number of kernels."""
    hf_config = small_model(vocab_size, blocks, hidden).config
    config = load_config(CONFIG, "step_loss=none")
    found = time_of_micro_batch(config, hf_config, shape, machine)
    return found.total, found.kernels


def measure_forecast() -> None:
    machine, rows = this_cpu(), []
    for case in CASES:
        wanted, kernels = forecast_of(*case, machine)
        real = real_seconds(*case, repeats=5)
        blocks, hidden, vocab_size, shape = case
        name = f"{blocks} blocks, hidden {hidden}, vocabulary {vocab_size}: {tuple(shape)}"
        rows.append([name, int(kernels), wanted, real, wanted / real])
    table(
        f"Time forecast against this CPU: {machine.products / 1e9:.0f} Gflop/s, "
        f"{machine.bandwidth / 1e9:.0f} GB/s, {machine.launch * 1e6:.1f} us per kernel; seconds of "
        "forward and backward",
        ["model: rows, prefix, latents, suffix", "kernels", "forecast", "measured", "ratio"],
        rows,
    )
