"""What operators cost: counted on fake tensors, nothing is computed.

A file named kernels.py here would be taken for the package of that name by transformers, which asks
for it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.append(str(Path(__file__).resolve().parents[1]))
import layers

aten = torch.ops.aten


class Kernel(NamedTuple):
    """One operator that computes something."""

    name: str
    products: int  # floating-point operations of matrix products
    bytes: int  # read and written


# they read the rows that they are asked for, not the whole of their first argument
GATHERS = (aten.embedding, aten.index_select, aten.gather, aten.index, aten.index_put_)
EMPTY = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided)


def is_view(func: Any) -> bool:
    """Whether an operator only makes another view of a tensor."""
    shared = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return func is aten._unsafe_view.default or (
        bool(shared) and not any(alias.is_write for alias in shared)
    )


def _attention(query: Tensor, key: Tensor) -> int:
    """Operations of the two products of attention, (B, heads, columns, head size) each."""
    return 4 * query.numel() * key.shape[-2]


def _products(func: Any, args: tuple, result: Any) -> int:
    packet = func._overloadpacket
    if packet is aten.addmm_:
        return 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention(args[0], args[1])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(2.5 * _attention(args[1], args[2]))  # five products, as the forward has two
    if packet in flop_registry:
        return flop_registry[packet](*args, out_val=result)
    return 0


class Kernels(TorchDispatchMode):
    """Keeps every operator that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # prim.device is a question that only fake tensors ask
        computes = func is not torch.ops.prim.device.default and not is_view(func)
        if computes and func._overloadpacket not in EMPTY:
            read = [result, args[1:]] if func._overloadpacket in GATHERS else [args, kwargs]
            tensors = [t for t in tree_leaves((read, result)) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.kernels.append(Kernel(str(func), _products(func, args, result), size))
        return result


def counted_kernels(action: Callable[[], object]) -> list[Kernel]:
    with Kernels() as mode:
        action()
    return mode.kernels


# ------------------------------------------------------------------------------- as on CUDA


@torch.library.custom_op("coconut::rms_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("for fake tensors")


@_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("coconut::rms_norm_backward", mutates_args=())
def _norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("for fake tensors")


@_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, inverse: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w)


class _FusedNorm(torch.autograd.Function):
    """As torch's fused RMSNorm on CUDA: one kernel each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse = _norm(x, weight)
        ctx.save_for_backward(x, inverse, weight)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, weight = ctx.saved_tensors
        return *_norm_backward(grad, x, inverse, weight), None


@contextmanager
def fused_norms() -> Iterator[None]:
    """layers.py's RMSNorm counts as it runs on CUDA."""
    usual, layers._RMSNorm = layers._RMSNorm, _FusedNorm  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        layers._RMSNorm = usual  # type: ignore[misc]
