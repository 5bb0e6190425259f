"""What a block runs, for passes of a single column: fewer kernels, less memory traffic.

At a latent a block sees one column of the batch, and its time goes into launching kernels and into
moving weights. Two things help there, for any model that has the library's usual parts:

RMSNorm     The library's takes about 20 kernels in forward and backward, half of a whole block's.
            CUDA has a fused one in torch; elsewhere the backward is written out below.
nn.Linear   Each pass would make a gradient as large as the weight and add it to the others'. The
            passes of one column keep their inputs and gradients instead, which are small, and the
            weight's gradient is computed once from all of them; and what earlier micro-batches
            have left in .grad is added to in place.

So a graph of several passes is for one whole backward(): torch.autograd.grad() on a part of it
would add to .grad, or leave shares behind.
Shapes: B rows, D features of the input, N rows and columns together.
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
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
    return _RMSNorm.apply(x, weight, eps)


def is_llamas(norm: nn.Module) -> bool:
    """Whether its forward is LlamaRMSNorm's to the letter, as that of most models is."""
    code, llama = (kind.forward.__code__ for kind in (type(norm), LlamaRMSNorm))
    parts = ("co_code", "co_consts", "co_names")
    return all(getattr(code, part) == getattr(llama, part) for part in parts)


# ------------------------------------------------------------------------------- linear layers


def _weight_gradient(layer: nn.Linear, inputs: Tensor, grads: Tensor):
    """The gradients of weight and bias from all rows of inputs (N, D) and outputs' gradients.

    Where the weight has one already, of earlier micro-batches, this one is added in place and
    None returned: autograd would first sum those of all passes beside it, which takes as much
    memory again.
    """
    weight, bias, of_weight, of_bias = layer.weight, layer.bias, None, None
    if weight.grad is None:
        of_weight = grads.T @ inputs
    else:
        weight.grad.addmm_(grads.T, inputs)
    if bias is not None and bias.requires_grad:
        of_bias = grads.sum(0)  # small: autograd adds it up
    return of_weight, of_bias


class _AllColumns(torch.autograd.Function):
    """A node that autograd reaches when all passes of one column have left their share."""

    @staticmethod
    def forward(ctx, weight, bias, layer: nn.Linear, shares: list, columns: dict) -> Tensor:
        ctx.layer, ctx.shares, ctx.columns = layer, shares, columns
        ctx.set_materialize_grads(False)
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        inputs, grads = (torch.cat(every) for every in zip(*ctx.shares))
        ctx.shares.clear()
        ctx.columns.pop(ctx.layer, None)  # the graph has done its work: let it go
        return *_weight_gradient(ctx.layer, inputs, grads), None, None, None


class _PassLinear(torch.autograd.Function):
    """F.linear; its backward leaves a share of the weight's gradient where there is a list."""

    @staticmethod
    def forward(ctx, x: Tensor, weight, bias, layer: nn.Linear, node: Tensor | None, shares):
        ctx.layer, ctx.shares = layer, shares
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        inputs, grads = x.flatten(0, -2), grad.flatten(0, -2)
        found = None, None
        if ctx.shares is None:
            found = _weight_gradient(ctx.layer, inputs, grads)
        else:
            ctx.shares.append((inputs, grads))
        return grad @ weight, *found, None, None, None


class Passes:
    """What the linear layers share over the passes of one forward; start() begins the next."""

    def __init__(self):
        self.several = False
        self.columns: dict[nn.Linear, tuple[Tensor, list]] = {}  # by layer: its node and shares

    def __getstate__(self):
        return {"several": False, "columns": {}}  # a copied model starts anew: no graph is copied

    def start(self, several: bool) -> None:
        self.several = several
        self.columns.clear()

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The forward of a linear layer: (B, columns, D), or rows of any kind (N, D)."""
        weight, bias = layer.weight, layer.bias
        learns = self.several and torch.is_grad_enabled() and weight.requires_grad
        # under autocast the weight's type is not the one to compute in
        if not learns or x.ndim == 1 or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, bias)
        if x.ndim != 3 or x.shape[1] > 1:
            return _PassLinear.apply(x, weight, bias, layer, None, None)
        if layer not in self.columns:
            shares = []
            node = _AllColumns.apply(weight, bias, layer, shares, self.columns)
            self.columns[layer] = node, shares
        return _PassLinear.apply(x, weight, bias, layer, *self.columns[layer])


def replace_layers(model: nn.Module) -> Passes:
    """Replace the forward of the parts above in a model; its other parts stay."""
    passes = Passes()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(passes.linear, module)
        elif type(module).__name__.endswith("RMSNorm") and is_llamas(module):
            module.forward = partial(rms_norm, module)
    return passes
