"""What a block runs, for passes of a single column: fewer kernels, less memory traffic.

At a latent a block sees one column of the batch, and its time goes into launching kernels and into
moving weights. Two things help there, for any model that has the library's usual parts:

RMSNorm     The library's takes about 20 kernels in forward and backward, half of a whole block's.
            CUDA has a fused one in torch; elsewhere the backward is written out below.
nn.Linear   Each pass would make a gradient as large as the weight and add it to the others'. The
            passes of one column keep their inputs and gradients instead, which are small, and the
            weight's gradient is computed once from all of them.

Shapes: B rows, D features of the input.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# ------------------------------------------------------------------------------- RMSNorm


class _RMSNorm(torch.autograd.Function):
    """The normalised input is kept, rounded as the library rounds it, and nothing else that big."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        normed, inverse, weight = ctx.saved_tensors
        dtype = torch.float64 if grad.dtype is torch.float64 else torch.float32
        grad, wide, scale = grad.to(dtype), normed.to(dtype), weight.to(dtype)
        product = wide * grad
        total = (product @ scale).unsqueeze(-1)
        grad_x = (grad * scale).addcmul_(wide, total, value=-1 / len(weight)).mul_(inverse)
        grad_weight = product.sum(tuple(range(product.ndim - 1)))
        return grad_x.to(normed.dtype), grad_weight.to(weight.dtype), None


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """LlamaRMSNorm's forward: (..., D) of any type, computed in float32, times the weight."""
    weight, eps = norm.weight, norm.variance_epsilon
    if x.is_cuda:
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def is_llamas(norm: nn.Module) -> bool:
    """Whether its forward is LlamaRMSNorm's to the letter, as that of most models is."""
    code, llama = (kind.forward.__code__ for kind in (type(norm), LlamaRMSNorm))
    parts = ("co_code", "co_consts", "co_names")
    return all(getattr(code, part) == getattr(llama, part) for part in parts)


# ------------------------------------------------------------------------------- linear layers


class _WeightGradient(torch.autograd.Function):
    """A node that autograd reaches when all passes of one column have left their share."""

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor | None, shares: list) -> Tensor:
        ctx.shares, ctx.has_bias = shares, bias is not None
        ctx.set_materialize_grads(False)
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        inputs, grads = (torch.cat(every) for every in zip(*ctx.shares))
        ctx.shares.clear()
        return grads.T @ inputs, grads.sum(0) if ctx.has_bias else None, None


class _ColumnLinear(torch.autograd.Function):
    """F.linear whose backward leaves its share of the weight's gradient to a _WeightGradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight, bias, turn: Tensor, shares: list) -> Tensor:
        ctx.shares = shares
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        ctx.shares.append((x.flatten(0, -2), grad.flatten(0, -2)))
        return grad @ weight, None, None, None, None


class Columns:
    """The linear layers' shares of the passes of one forward; start() begins the next one."""

    def __init__(self):
        self.turns: dict[nn.Linear, tuple[Tensor, list]] = {}

    def __getstate__(self):
        return {"turns": {}}  # a copy of the model starts anew: no graph can be copied

    def start(self) -> None:
        self.turns = {}

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The forward of a linear layer: (B, columns, D)."""
        weight, bias = layer.weight, layer.bias
        one_column = x.ndim == 3 and x.shape[1] == 1
        # under autocast the weight's type is not the one to compute in
        autocast = torch.is_autocast_enabled(x.device.type)
        if not (one_column and torch.is_grad_enabled() and weight.requires_grad) or autocast:
            return F.linear(x, weight, bias)
        if layer not in self.turns:
            shares = []
            self.turns[layer] = _WeightGradient.apply(weight, bias, shares), shares
        return _ColumnLinear.apply(x, weight, bias, *self.turns[layer])


def replace_layers(model: nn.Module) -> Columns:
    """Replace the forward of the parts above in a model; its other parts stay."""
    columns = Columns()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(columns.linear, module)
        elif type(module).__name__.endswith("RMSNorm") and is_llamas(module):
            module.forward = partial(rms_norm, module)
    return columns
