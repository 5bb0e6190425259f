"""Layers made for many short passes; the model computes the same without them (fast_layers: False).

What they gain, measured (benchmarks/README.md): a forward and backward with six latents makes 5.7
times the kernels of a plain pass instead of 7.6, and a 4B model takes 6.4 GiB less where
micro-batches are accumulated.

In the pass of a latent a block sees one column of the batch. Its time goes into launching kernels
and into moving weights, and two parts of the library's models can do with less of both:

RMSNorm     The library's takes about 20 kernels in forward and backward, half of a whole block's.
            On CUDA torch has a fused one; elsewhere the backward is written out below.
nn.Linear   Every pass would make a gradient as large as the weight and add it to the others. The
            passes of a single column keep their inputs and output gradients instead, which are
            small; the weight's gradient is computed from all of them at once. Where .grad holds
            the sum of earlier micro-batches already, the new one is added to it in place.

The graph of several passes is therefore for one complete backward(): torch.autograd.grad() on a
part of it would add to .grad, or would leave kept inputs behind.
The cache of several passes stands here too, and the loss: logits of a few labelled tokens at a
time, and their gradients with them.
Shapes: B rows, D features of the input, N rows and columns together, V vocabulary.
"""

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

# ------------------------------------------------------------------------------- RMSNorm


class _RMSNorm(torch.autograd.Function):
    """Keeps the normalised input for the backward, rounded as the library rounds it; nothing else
    that it keeps is as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inverse, weight = ctx.saved_tensors
        dtype = torch.float64 if grad.dtype is torch.float64 else torch.float32
        grad, wide, scale = grad.to(dtype), normed.to(dtype), weight.to(dtype)
        product = wide * grad
        total = (product @ scale).unsqueeze(-1)
        grad_x = (grad * scale).addcmul_(wide, total, value=-1 / len(weight)).mul_(inverse)
        grad_weight = product.sum(tuple(range(product.ndim - 1)))
        return grad_x.to(normed.dtype), grad_weight.to(weight.dtype), None


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """LlamaRMSNorm's forward: (..., D) of any type, computed in float32, times the weight."""
    weight, eps = norm.weight, norm.variance_epsilon
    if x.is_cuda:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
    return _RMSNorm.apply(x, weight, eps)


@cache
def computes_llamas_norm(kind: type[nn.Module]) -> bool:
    """Whether the modules of a class compute what LlamaRMSNorm computes, as those of most models
    do under names of their own: found out on a small one, in float32 and in bfloat16."""
    if not kind.__name__.endswith("RMSNorm") or len(signature(kind.forward).parameters) != 2:
        return False
    norm: Any
    try:
        with torch.device("cpu"):
            norm = kind(8)
    except TypeError:  # its constructor takes something else than a size
        return False
    if not hasattr(norm, "variance_epsilon") or [n for n, _ in norm.named_parameters()] != [
        "weight"
    ]:
        return False
    x = torch.linspace(-2, 3, 48, device="cpu").view(2, 3, 8)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8, device="cpu"))
        for dtype in (torch.float32, torch.bfloat16):
            norm, x = norm.to(dtype), x.to(dtype)
            if not torch.allclose(norm(x), rms_norm(norm, x), rtol=1e-6, atol=0):
                return False
    return True


# ------------------------------------------------------------------------------- linear layers

# of the passes of a single column: inputs (B, D) and the gradients of the outputs
Kept = list[tuple[Tensor, Tensor]]


def _weight_gradient(
    layer: nn.Linear, inputs: Tensor, grads: Tensor
) -> tuple[Tensor | None, Tensor | None]:
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
    """The node of a weight that autograd reaches when every pass of a single column has appended
    its inputs and output gradients; it makes the weight's gradient from all of them."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, layer: nn.Linear, kept: Kept, nodes: dict
    ) -> Tensor:
        ctx.layer, ctx.kept, ctx.nodes = layer, kept, nodes
        ctx.set_materialize_grads(False)
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, ...]:
        inputs, grads = (torch.cat(tensors) for tensors in zip(*ctx.kept))
        ctx.kept.clear()
        ctx.nodes.pop(ctx.layer, None)  # the graph has done its work: let it go
        return *_weight_gradient(ctx.layer, inputs, grads), None, None, None


class _PassLinear(torch.autograd.Function):
    """F.linear. Its backward makes the weight's gradient; where there is a list `kept`, it only
    appends what the gradient is made from."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: nn.Linear,
        node: Tensor | None,  # an input, so that its backward comes after this one
        kept: Kept | None,
    ) -> Tensor:
        ctx.layer, ctx.kept = layer, kept
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        inputs, grads = x.flatten(0, -2), grad.flatten(0, -2)
        of_weight, of_bias = None, None
        if ctx.kept is None:
            of_weight, of_bias = _weight_gradient(ctx.layer, inputs, grads)
        else:
            ctx.kept.append((inputs, grads))
        return grad @ weight, of_weight, of_bias, None, None, None


class Passes:
    """What the linear layers share over the passes of one forward; start() begins the next."""

    def __init__(self) -> None:
        self.several = False
        self.nodes: dict[nn.Linear, tuple[Tensor, Kept]] = {}  # by layer: _AllColumns, what it kept

    def __getstate__(self) -> dict[str, Any]:
        return {"several": False, "nodes": {}}  # a copied model starts anew: no graph is copied

    def start(self, several: bool) -> None:
        self.several = several
        self.nodes.clear()

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The forward of a linear layer: (B, columns, D), or rows of any kind (N, D)."""
        weight, bias = layer.weight, layer.bias
        learns = self.several and torch.is_grad_enabled() and weight.requires_grad
        # under autocast the weight's type is not the one to compute in
        if not learns or x.ndim == 1 or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, bias)
        if x.ndim != 3 or x.shape[1] > 1:
            return _PassLinear.apply(x, weight, bias, layer, None, None)
        if layer not in self.nodes:
            kept: Kept = []
            node = _AllColumns.apply(weight, bias, layer, kept, self.nodes)
            self.nodes[layer] = node, kept
        return _PassLinear.apply(x, weight, bias, layer, *self.nodes[layer])


def replace_layers(model: nn.Module) -> Passes:
    """Replace the forward of the parts above in a model; its other parts stay."""
    passes = Passes()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(passes.linear, module)  # type: ignore[method-assign]
        elif computes_llamas_norm(type(module)):  # type: ignore[arg-type]
            module.forward = partial(rms_norm, module)
    return passes


def decoder_blocks(base_causallm: Any, whole: nn.Module) -> list[nn.Module]:
    """The decoder blocks in a module, by the account of the model that it is or holds."""
    names = set(base_causallm._no_split_modules or ())
    blocks = [module for module in whole.modules() if type(module).__name__ in names]
    if not blocks:
        kind = type(base_causallm).__name__
        raise ValueError(
            f"{kind} does not name its blocks (_no_split_modules); it cannot be sharded"
        )
    return blocks


# ------------------------------------------------------------------------------- checkpointing


def checkpoint_blocks(blocks: list[nn.Module], dropout: bool) -> None:
    """Keep only the inputs of each pass of these blocks; the backward computes the rest again.
    dropout: whether they draw random numbers, which must be the same ones then.

    A pass of a single column keeps all: it is little, and torch's checkpoint takes the host as much
    time as the block itself (benchmarks/README.md).
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout)

    def run(forward: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = hidden.shape[1] > 1  # (B, columns, D)
        return (partial(again, forward) if wide else forward)(hidden, *args, **kwargs)

    for block in blocks:
        block.forward = partial(run, block.forward)


# ------------------------------------------------------------------------------- the cache


class PastKeysValues(Cache):
    """The keys and values of all columns before one pass, and of that pass itself.

    Nothing is written in place and the past is never changed, so a block may run its pass again
    (activation checkpointing): the replay sees the same past and records nothing.
    """

    def __init__(self, previous: "PastKeysValues | None" = None):
        super().__init__(layers=[])
        # by layer: the (keys, values) of each earlier pass, in order
        self.past = {} if previous is None else previous.present
        self.present: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, heads, columns of this pass, head size) each; returns all columns so far."""
        pieces = [*self.past.get(layer_idx, []), (key_states, value_states)]
        keys, values = key_states, value_states
        if len(pieces) > 1:
            keys, values = (torch.cat(passes, dim=-2) for passes in zip(*pieces))
        if not torch.is_grad_enabled():
            pieces = [(keys, values)]  # else a long generation would join ever more pieces
        self.present.setdefault(layer_idx, pieces)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return sum(keys.shape[-2] for keys, _ in self.past.get(layer_idx, []))

    def keep_rows(self, rows: Tensor) -> None:
        """The batch as these rows of it, each as often as it is named."""
        for layer_idx, pieces in self.present.items():
            self.present[layer_idx] = [(keys[rows], values[rows]) for keys, values in pieces]


# ------------------------------------------------------------------------------- the loss

# float32 logits of this many labelled tokens exist at once: 156 MB at Qwen3's 152k vocabulary
LOSS_CHUNK = 256


class _SummedCrossEntropy(torch.autograd.Function):
    """The sum over N labelled tokens in float32, chunk by chunk, its gradients computed with it.

    torch's F.linear_cross_entropy would round the sum to the type of the hidden states: 1560.0 for
    1561.24 in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if of_hidden else None  # (N, D)
        grad_weight = torch.zeros_like(weight) if of_weight else None  # (V, D)
        grad_bias = torch.zeros_like(bias) if of_bias and bias is not None else None  # (V,)
        for start in range(0, len(labels), LOSS_CHUNK):
            at = slice(start, start + LOSS_CHUNK)
            logits = F.linear(hidden[at], weight, bias).to(total.dtype)  # (chunk, V)
            logits -= logits.amax(-1, keepdim=True)
            of_labels = logits.gather(1, labels[at, None])
            normaliser = logits.exp_().sum(-1, keepdim=True)
            losses = normaliser.log() - of_labels  # (chunk, 1)
            share = None if weights is None else weights[at, None].to(total.dtype)
            total += (losses if share is None else losses * share).sum()
            if not (of_hidden or of_weight or of_bias):
                continue
            # the probabilities; minus 1 at the labels they are the gradient
            grad = logits.div_(normaliser)
            grad.scatter_add_(1, labels[at, None], grad.new_full((len(grad), 1), -1))
            if share is not None:
                grad *= share
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[at] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[at])
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(grad) for g in ctx.gradients]
        ctx.gradients = ()  # used up: scaled in place, as they are large
        return *scaled, None, None


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Of labels (N,) against logits of hidden (N, D) by a head (V, D): (), float32 or wider. Its
    backward may run once. weights: (N,), of each label in the sum; None: 1."""
    tensors = [hidden, weight, bias]
    if not torch.is_grad_enabled():  # ctx.needs_input_grad asks the tensors alone
        tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    return _SummedCrossEntropy.apply(*tensors, labels, weights)
