"""Do the updates arrive, and does a small training end where a float32 one ends?"""

from collections.abc import Callable

import torch
from parts import small_model, table
from torch import nn

from coconut import Coconut
from engine.optimizer import build_optimizer
from utils import Config

Build = Callable[[Config, nn.Module], torch.optim.Optimizer]
Kinds = dict[str, dict]

KINDS: Kinds = {
    "float32, adamw": dict(optimizer="adamw"),
    "bf16, adamw": dict(bf16=True, optimizer="adamw"),
    "bf16, adamw_split": dict(bf16=True, optimizer="adamw_split"),
    "bf16, float32_master_weights": dict(bf16=True, float32_master_weights=True),
}
SIZE, HORIZON = 4096, 10_000  # weights whose updates are counted; steps of 20 epochs of 50,000 rows
GRADIENTS = {  # their size, by the part of the steps that is done
    "constant": lambda part: 1.0,
    "halved after a tenth": lambda part: 1.0 if part <= 0.1 else 0.5,
    "falling a hundredfold": lambda part: 10 ** (-2 * part),
}
# the small training: short, as products in bf16 are slow on a CPU that has none; few steps need a
# larger learning rate than the main config's to get anywhere
STEPS, RATE = 200, 3e-5
VOCAB, PREFIX, LATENTS, SUFFIX, ROWS = 256, 6, 1, 12, 8
LATENT, STATES = 5, range(10, 42)  # the tokens of the chain to learn


def config_of(keys: dict, lr: float) -> Config:
    return Config(name="x", save_path="x", model_id="x", lr=lr, weight_decay=0.0, **keys)


def measure_updates(build: Build = build_optimizer, kinds: Kinds = KINDS) -> None:
    """The share of float32's displacement over a whole run, weights of size 0.02.

    build: makes the optimizer from (config, model), so that others can be measured too.
    """
    rows, sizes = {name: [name] for name in kinds}, {}
    for gradients in GRADIENTS.values():
        intended, _ = moved_by(KINDS["float32, adamw"], build_optimizer, HORIZON, gradients)
        for name, keys in kinds.items():
            moved, size = moved_by(keys, build, HORIZON, gradients)
            share = float((moved * intended).sum() / (intended * intended).sum())
            error = float((moved - intended).norm() / intended.norm())
            rows[name].append(f"{share:.1%} ({error:.1%})")
            sizes[name] = round(size, 1)
    table(
        f"Updates that arrive: lr 1e-5, weights of size 0.02, {HORIZON:,} steps; of float32's "
        "displacement (error)",
        ["weights", *(f"gradients {name}" for name in GRADIENTS), "bytes per parameter"],
        [[*rows[name], sizes[name]] for name in kinds],
    )


def moved_by(
    keys: dict,
    build: Build,
    steps: int = 100,
    gradients: Callable[[float], float] = GRADIENTS["constant"],
) -> tuple[torch.Tensor, float]:
    """The displacement of random weights, and bytes per parameter with gradients and state."""
    config = config_of(keys, 1e-5)
    torch.manual_seed(0)
    start = (torch.randn(SIZE) * 0.02).bfloat16().float()
    model = nn.ParameterList([start.clone().to(config.dtype)])
    optimizer = build(config, model)
    for step in range(1, steps + 1):
        grad = (torch.randn(SIZE) + 0.5) * gradients(step / steps)
        model[0].grad = grad.bfloat16().to(config.dtype)
        optimizer.step()
    state = sum(
        t.numel() * t.element_size()
        for t in optimizer.state[model[0]].values()
        if torch.is_tensor(t) and t.numel() > 1
    )
    return model[0].detach().float() - start, 2 * model[0].element_size() + state / SIZE


# ------------------------------------------------------------------------------- a training


def measure_learning(build: Build = build_optimizer, kinds: Kinds = KINDS) -> None:
    """The loss at the end of a small training, the same rows and start for all."""
    first, exact = losses(KINDS["float32, adamw"], build_optimizer)
    rows = []
    for name, keys in kinds.items():
        last = exact if name == "float32, adamw" else losses(keys, build)[1]
        rows.append([name, f"{last:.3f}", f"{(first - last) / (first - exact):.1%}"])
    table(
        f"A small training: 2 layers, hidden 128, lr {RATE}, {STEPS} steps from loss {first:.3f}",
        ["weights", "loss of the last 20 steps", "of float32's gain"],
        rows,
    )


def chain_batch(generator: torch.Generator, successors: torch.Tensor) -> dict:
    """Rows that follow a chain: every state has four successors, alike in probability."""
    length = PREFIX + LATENTS + SUFFIX
    ids = torch.randint(STATES.start, STATES.stop, (ROWS, length), generator=generator)
    choice = torch.randint(0, successors.shape[1], (ROWS, length), generator=generator)
    for column in range(1, length):
        ids[:, column] = successors[ids[:, column - 1], choice[:, column]]
    labels = ids.clone()
    labels[:, : PREFIX + LATENTS] = -100
    ids[:, PREFIX : PREFIX + LATENTS] = LATENT
    return dict(
        input_ids=ids,
        labels=labels,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(length).expand_as(ids),
        latent_columns=(PREFIX, PREFIX + LATENTS),
    )


def losses(keys: dict, build: Build) -> tuple[float, float]:
    """Mean loss of the first and of the last 20 steps, computed as engine/loop.py does."""
    config = config_of(keys, RATE)
    base = small_model(VOCAB, 2, 128, dtype=torch.bfloat16).to(config.dtype)  # one start for all
    model = Coconut(base, latent_token_id=LATENT, eos_token_id=0).train()
    optimizer = build(config, model)
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(STATES.start, STATES.stop, (VOCAB, 4), generator=generator)
    seen = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.float32_master_weights):
            loss = model(**chain_batch(generator, successors)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return sum(seen[:20]) / 20, sum(seen[-20:]) / 20
