"""Optimizers and learning rate schedules."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from engine.distributed import local_tensor
from utils import Config, UserError, log

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults, which the ancestor uses
CHUNK = 2**24  # elements that are updated at once: bounds the temporaries in float32


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay on all parameters that are trained."""
    parameters = trained_parameters(model)
    settings: dict[str, Any] = dict(
        lr=config.lr, betas=BETAS, eps=EPS, weight_decay=config.weight_decay
    )
    if optimizer_kind(config) == "adamw_split":
        return SplitAdamW(parameters, **settings)
    if config.dtype is torch.bfloat16:
        log.warning(
            "optimizer: adamw on bfloat16 parameters rounds most updates away at this kind of "
            "learning rate (benchmarks/README.md); adamw_split keeps them for 4 more bytes each"
        )
    # foreach would need room for temporaries of all parameters at once
    return torch.optim.AdamW(parameters, foreach=False, **settings)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All but those that adapters froze."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_kind(config: Config) -> str:
    if config.optimizer == "auto":
        return "adamw_split" if config.dtype is torch.bfloat16 else "adamw"
    return config.optimizer


def state_bytes(config: Config) -> int:
    """Bytes of optimizer state for each parameter."""
    return 8 if optimizer_kind(config) == "adamw_split" else 2 * config.dtype.itemsize


class SplitAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 parameters that updates them as float32.

    A float32 weight is kept as two halves: the parameter, which is the weight rounded to bfloat16,
    and the 16 bits that are missing. So every update and every weight decay arrives as it does in
    float32, for 2 more bytes. The second moment is float32: times 0.999 a bfloat16 number rounds
    back to itself, so it could only grow. The first moment, times 0.9, can do with bfloat16.
    Libraries that we tried keep it narrow: torch-optimi's Kahan summation arrives at 0.68 of
    float32's way after 10,000 steps, and at none of its weight decay (benchmarks/README.md).

    Raises UserError where a parameter is of another type.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            if parameter.dtype is not torch.bfloat16:
                found = str(parameter.dtype).removeprefix("torch.")
                raise UserError(
                    f"bf16: the library keeps some weights in {found}; set "
                    "float32_master_weights: True"
                )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float64)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["low_bits"] = torch.zeros_like(parameter, dtype=torch.int16)
                state["step"] += 1
                names = ("exp_avg", "exp_avg_sq", "low_bits")
                tensors = [parameter, parameter.grad, *(state[name] for name in names)]
                flat = [local_tensor(tensor).view(-1).split(CHUNK) for tensor in tensors]
                for parts in zip(*flat):
                    self._update(*parts, step=state["step"], **_settings(group))

    @staticmethod
    def _update(
        weight: Tensor,  # (N,) bfloat16, as the next three of a flat part of one parameter
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,  # float32
        low_bits: Tensor,  # int16
        *,
        step: Tensor,  # () float64, of this update; on the CPU
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """The update of torch.optim.AdamW, in float32."""
        whole, grad = join(weight, low_bits), grad.float()
        average = exp_avg.float().lerp_(grad, 1 - betas[0])
        exp_avg.copy_(average)
        exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        spread = exp_avg_sq.sqrt().div_((1 - betas[1] ** step).sqrt()).add_(eps)
        whole.mul_(1 - lr * weight_decay)
        whole.addcdiv_(average, spread.mul_(1 - betas[0] ** step), value=-lr)
        split(whole, weight, low_bits)

    def load_state_dict(self, state_dict: dict) -> None:
        """The base class casts all state to the parameters' type; here each keeps its own."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(saved, ours):
            for name, value in state_dict["state"].get(number, {}).items():
                if name in ("exp_avg_sq", "low_bits"):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def reset_moments(optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients so far. What belongs to the weights stays."""
    for state in optimizer.state.values():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            state[name].zero_()


def _settings(group: dict) -> dict:
    return {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}


def join(weight: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 weights of which these are the halves."""
    bits = weight.float().view(torch.int32)
    return bits.add_(low_bits).view(torch.float32)


def split(whole: Tensor, weight: Tensor, low_bits: Tensor) -> None:
    """Write the halves of float32 weights: the nearest bfloat16 and the bits by which it is off."""
    weight.copy_(whole)
    bits = whole.view(torch.int32) - weight.float().view(torch.int32)
    low_bits.copy_(bits.clamp_(max=2**15 - 1))  # half-way between two, one bit is lost


def build_scheduler(
    config: Config, optimizer: torch.optim.Optimizer, num_steps: int
) -> LRScheduler:
    """Learning rate over the num_steps optimizer steps of the whole run."""
    name = {"constant": "constant_with_warmup"}.get(config.lr_schedule, config.lr_schedule)
    return get_scheduler(name, optimizer, config.warmup_steps, num_steps)


def set_rate(scheduler: Any) -> None:
    """Let a scheduler that was loaded, and its optimizer, have the rate that its schedule has now:
    with another num_epochs it is not the one that was saved."""
    schedules = zip(scheduler.base_lrs, scheduler.lr_lambdas)
    rates = [rate * schedule(scheduler.last_epoch) for rate, schedule in schedules]
    for group, rate in zip(scheduler.optimizer.param_groups, rates):
        group["lr"] = rate
    scheduler._last_lr = rates
