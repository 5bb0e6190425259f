"""A training step against one plain pass, and generation against transformers' generate()."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from memory import Storages, bytes_of
from operators import Kernels, is_view
from parts import ratio_of_times, small_model, table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from coconut import Coconut

LATENT = 5  # the token that stands for a latent in random batches
VOCAB, HIDDEN = 32_000, 512


def random_batch(rows: int, prefix: int, latents: int, suffix: int, vocab_size: int) -> dict:
    """Rows with latents in the same columns, uneven padding at both ends."""
    length = prefix + latents + suffix
    ids = torch.randint(10, vocab_size, (rows, length))
    ids[:, prefix : prefix + latents] = LATENT
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
        mask[row, length - row % 5 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : prefix + latents] = -100
    index = F.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero().squeeze(1)
    return dict(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        labels=labels,
        label_index=index,
        latent_columns=(prefix, prefix + latents) if latents else (0, 0),
    )


def plain_loss(base: Any, batch: dict) -> torch.Tensor:
    """The limit: one pass over the same tokens, logits on the labelled positions only."""
    names = ("input_ids", "attention_mask", "position_ids")
    hidden = base.model(**{n: batch[n] for n in names}, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch["label_index"])
    labels = batch["labels"].flatten().index_select(0, batch["label_index"] + 1)
    return F.cross_entropy(base.lm_head(hidden), labels)


# ------------------------------------------------------------------------------- counts


class Calls(TorchDispatchMode):
    """Counts operator calls, by whether they only make another view of a tensor."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # prim.device is a question that only fake tensors ask
        if func is not torch.ops.prim.device.default:
            self.counts["view" if is_view(func) else "kernel"] += 1
        return func(*args, **(kwargs or {}))


def counted(mode: Any, step: Callable[[], torch.Tensor]) -> Any:
    """Forward and backward under a counting mode."""
    with mode:
        step().backward()
    return mode


def counted_steps(batch: dict, layers: int = 8, recompute: bool = False) -> list[float]:
    """Our floating-point operations, kernels, all operator calls and peak memory over those of
    the plain pass. On fake tensors, which give (nearly) the counts of real ones, uncomputed."""
    figures = []
    Coconut(small_model(layers=1))  # layers.py tells norms by their numbers, which fake ones lack
    with FakeTensorMode() as fake:
        batch = {k: fake.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}
        # of attention as matrix products, forward and backward alike
        eager = lambda: small_model(layers=layers, attention="eager")
        steps = pair_of_steps(eager, batch, recompute)
        kernels = [counted(Kernels(), step).kernels for step in steps]
        flops = [sum(kernel.products for kernel in of_step) for of_step in kernels]
        figures.append(flops[0] / flops[1])
        steps = pair_of_steps(lambda: small_model(layers=layers), batch, recompute)
        calls = [counted(Calls(), step).counts for step in steps]
        figures.append(calls[0]["kernel"] / calls[1]["kernel"])
        figures.append(calls[0].total() / calls[1].total())
        peaks, tensors = [], [v for v in batch.values() if torch.is_tensor(v)]
        for step in steps:
            parameters = list(step.model.parameters())
            storages = Storages([*parameters, *step.model.buffers(), *tensors])
            # what a training also holds: parameters and AdamW's two moments
            static = 3 * bytes_of(parameters)
            peaks.append(counted(storages, step).peak + static)
        figures.append(peaks[0] / peaks[1])
    return figures


class Step:
    """A forward to the loss; calling it drops the gradients of the step before."""

    def __init__(self, model: nn.Module, loss: Callable[[], torch.Tensor]):
        self.model, self.loss = model, loss

    def __call__(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        return self.loss()


def pair_of_steps(
    make: Callable[[], PreTrainedModel], batch: dict, recompute: bool = False
) -> tuple[Step, Step]:
    """Ours, and the limit: the library's model as it is. make: builds the model, always alike.
    recompute: ours keeps no activations within blocks and computes them in the backward."""
    model, plain = Coconut(make(), latent_token_id=LATENT, eos_token_id=0).train(), make().train()
    if recompute:
        model.checkpoint_activations()
    return Step(model, lambda: model(**batch).loss), Step(plain, lambda: plain_loss(plain, batch))


def measure_step() -> None:
    """Coconut's forward and backward against one plain pass over the same tokens."""
    rows = []
    for latents, recompute in ((0, False), (2, False), (6, False), (12, False), (6, True)):
        batch = random_batch(16, 60, latents, 40, VOCAB)
        figures = counted_steps(batch, recompute=recompute)
        steps = pair_of_steps(small_model, batch, recompute)
        ratio, (seconds, _) = ratio_of_times(*(lambda s=s: s().backward() for s in steps), 3)
        name = f"{latents}, activation checkpointing" if recompute else latents
        rows.append([name, *figures, ratio, seconds])
    table(
        "Training step over one plain pass: 8 layers, hidden 512, 32k vocabulary, batch 16",
        [
            "latents",
            "floating-point operations",
            "kernels",
            "operator calls, views too",
            "peak memory with weights and AdamW's state",
            "CPU time",
            "CPU seconds",
        ],
        rows,
    )


# ------------------------------------------------------------------------------- generation


@torch.no_grad()
def measure_generation(new: int = 64) -> None:
    """Coconut.generate against transformers' generate() on the same model and prompts."""
    base, rows = small_model().eval(), []
    model = Coconut(base, latent_token_id=LATENT, eos_token_id=-1).eval()
    for batch_size, repeats in ((1, 9), (32, 5)):
        ids = torch.randint(10, VOCAB, (batch_size, 80))
        mask = torch.ones_like(ids)
        for row in range(batch_size):
            mask[row, : row % 20] = 0

        def ours() -> torch.Tensor:
            return torch.stack(model.generate(ids, mask, new, latent_columns=(0, 0)))

        def library() -> torch.Tensor:
            return base.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
            )[:, 80:]

        same = torch.equal(ours(), library())
        alone = [
            torch.stack(model.generate(ids[i : i + 1], mask[i : i + 1], new))[0]
            for i in range(min(batch_size, 4))
        ]
        same = same and torch.equal(torch.stack(alone), ours()[: len(alone)])
        ratio, (seconds, _) = ratio_of_times(ours, library, repeats)
        rows.append([batch_size, ratio, seconds / batch_size, "yes" if same else "NO"])
    table(
        f"Generation against transformers' generate(): {new} new tokens, no latents",
        [
            "batch",
            "CPU time per token and row",
            "CPU seconds per row",
            "same tokens (library, batch 1)",
        ],
        rows,
    )
