"""Optimizers and learning rate schedules, all from libraries."""

import optimi
import torch
from torch import nn
from transformers import get_scheduler

from utils import Config, log

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults, which the ancestor uses


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay on all parameters.

    adamw_kahan keeps the rounding error of every bf16 update and adds it to the next one. Plain
    adamw on bf16 parameters loses most updates: at lr 1e-5 they are below half a bf16 step.
    """
    settings = dict(lr=config.lr, betas=BETAS, eps=EPS, weight_decay=config.weight_decay)
    if optimizer_kind(config) == "adamw_kahan":
        # the plain loop: the others do not take sharded parameters, or need room for temporaries
        return optimi.AdamW(
            model.parameters(), kahan_sum=True, foreach=False, triton=False, **settings
        )
    if config.dtype is torch.bfloat16:
        log.warning(
            "optimizer: adamw on bfloat16 parameters rounds most updates away at this kind of "
            "learning rate (benchmarks/README.md); adamw_kahan keeps them for 2 more bytes each"
        )
    # foreach would need room for temporaries of all parameters at once
    return torch.optim.AdamW(model.parameters(), foreach=False, **settings)


def optimizer_kind(config: Config) -> str:
    if config.optimizer == "auto":
        return "adamw_kahan" if config.dtype is torch.bfloat16 else "adamw"
    return config.optimizer


def states_per_parameter(config: Config) -> int:
    """Tensors like the parameters that the optimizer keeps: two moments, and the rounding errors
    of parameters that have them."""
    keeps_errors = optimizer_kind(config) == "adamw_kahan" and config.dtype is torch.bfloat16
    return 3 if keeps_errors else 2


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer, num_steps: int):
    """Learning rate over the num_steps optimizer steps of the whole run."""
    name = {"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule)
    return get_scheduler(name, optimizer, config.warmup_steps, num_steps)
