"""FSDP's collective calls, counted with two processes on the CPU (gloo)."""

import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parts import small_model, table
from speed import random_batch

from coconut import Coconut
from engine import distributed

LATENT, VOCAB = 5, 256
CASES = [(latents, accumulated) for latents in (0, 6) for accumulated in (1, 4)]
NAMES = ("all_gather_single", "reduce_scatter_single")
ACROSS_NODES = ("all_reduce",)


@contextmanager
def count_collectives() -> Iterator[Counter[str]]:
    """Counts FSDP's collectives (torch 2.13 calls them by these names) while the body runs."""
    counts: Counter[str] = Counter()
    originals = {}
    for name in (*NAMES, *ACROSS_NODES):
        originals[name] = getattr(dist, name)

        def call(*args: Any, name: str = name, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        setattr(dist, name, call)
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def optimizer_step(model: Coconut, latents: int, accumulated: int) -> None:
    """Forward and backward of a step's micro-batches, as engine/loop.py makes them."""
    for number in range(1, accumulated + 1):
        output = model(**random_batch(2, 6, latents, 4, VOCAB))
        distributed.backward(model, output.loss, output.prefix_hidden, last=number == accumulated)
    distributed.end_of_backward(model)


def generate(model: Coconut) -> None:
    prompt = random_batch(2, 6, 2, 0, VOCAB)
    with distributed.gathered(model):
        model.eval().generate(
            prompt["input_ids"],
            torch.ones_like(prompt["input_ids"]),
            20,
            latent_columns=prompt["latent_columns"],
        )


def open_pair(rank: int, port: int, patience: int) -> distributed.World:
    """Join the other of two processes on this machine. patience: seconds until a hang fails."""
    torch.set_num_threads(1)
    distributed.TIMEOUT = timedelta(seconds=patience)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    return distributed.open_processes()


def worker(rank: int, port: int, folder: str) -> None:
    """One of the two processes: counts by case, from rank 0 to a file."""
    world = open_pair(rank, port, patience=120)
    model = Coconut(small_model(VOCAB, 4, 128), latent_token_id=LATENT, eos_token_id=-1)
    units = len(model.blocks()) + 1
    distributed.shard(model, torch.float32, world)
    rows = []
    for latents, accumulated in CASES:
        model.train().zero_grad()
        with count_collectives() as counts:
            optimizer_step(model, latents, accumulated)
        rows.append(
            [
                f"step, {latents} latents, {accumulated} micro-batches",
                *(counts[name] / units for name in NAMES),
            ]
        )
    with count_collectives() as counts:
        generate(model)
    rows.append(["generation, 20 new tokens", *(counts[name] / units for name in NAMES)])
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    distributed.close_processes()


def measure_collectives() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (port, folder), nprocs=2)
        rows = torch.load(Path(folder) / "rows.pt", weights_only=True)
    table(
        "Collectives for each FSDP unit (every block, and the root), two processes",
        ["what", "all-gathers", "reduce-scatters"],
        rows,
    )
