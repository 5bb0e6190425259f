"""Forecast the peak memory of a training from its config alone: no GPU, no weights.

    python benchmarks/memory.py args/X.yaml [KEY=VALUE ...] [--gpus N] [--length L]

Runs one micro-batch and one optimizer step on fake tensors and adds up the storages that are alive,
those of step_loss and its decoder among them.
With several GPUs parameters, gradients and optimizer state are divided among them, and each also
holds the gathered parameters and the unreduced gradients of a step (distributed.shard), which FSDP
adds up in float32 over several micro-batches.
"""

import argparse
import copy
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))
from coconut import Coconut
from engine.adapters import add_adapters, new_adapters
from engine.distributed import unsharded_bytes
from engine.optimizer import build_optimizer, trained_parameters
from engine.pretrained import load_hf_config
from engine.weights import empty_model
from loader import load_config
from preprocessing.common import positive
from step_loss import StepLoss, StepTargets, add_step_loss
from utils import Config, Method, UserError

GIB = 2**30


class Storages(TorchDispatchMode):
    """Bytes of all storages that operators made and that are still alive, and their peak.

    given: tensors that were there before; views of them cost nothing.
    """

    def __init__(self, given: Iterable[torch.Tensor]):
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive or key in self.given:
            return
        self.alive[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def restart_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


def rows_at_once(config: Config, length: int) -> int:
    """Rows of `length` tokens in a full micro-batch."""
    if config.tokens_per_micro_batch is None:
        return config.batch_size_training
    return max(config.tokens_per_micro_batch // length, 1)


def full_batch(config: Config, length: int) -> tuple[dict, StepTargets | None]:
    """Rows of `length` tokens with the latents of the last stage, 60% of the others before them;
    what step_loss has their thoughts say, all of a row together as many tokens as follow them."""
    latents = config.c_thought * config.max_latent_stage if config.coconut else 0
    prefix = int(0.6 * (length - latents))
    rows, suffix = rows_at_once(config, length), length - latents - prefix
    batch = zero_batch(rows, prefix, latents, suffix)
    if config.step_loss == "none":
        return batch, None
    thoughts = rows * config.max_latent_stage
    said = max(suffix // config.max_latent_stage, 1)  # by each
    if config.step_loss == "head":
        return batch, zero_targets(thoughts * min(said, config.c_thought))
    width = config.c_thought + said
    return batch, zero_targets(thoughts * (said + 1), thoughts * said, thoughts, width)


def zero_batch(rows: int, prefix: int, latents: int, suffix: int) -> dict:
    """A batch of zeros without padding, all of the suffix with labels."""
    tensor = torch.zeros((rows, prefix + latents + suffix), dtype=torch.long)
    return dict(
        input_ids=tensor,
        attention_mask=torch.ones_like(tensor),
        position_ids=torch.zeros_like(tensor),
        labels=torch.zeros_like(tensor),
        latent_columns=(prefix, prefix + latents) if latents else (0, 0),
        label_index=torch.zeros(rows * suffix, dtype=torch.long),
    )


def zero_targets(labels: int, tokens: int = 0, sequences: int = 0, width: int = 0) -> StepTargets:
    """Targets of step_loss; the last three are the sizes of what a decoder reads."""
    return StepTargets(
        index=torch.zeros(labels, dtype=torch.long),
        labels=torch.zeros(labels, dtype=torch.long),
        weights=torch.zeros(labels, dtype=torch.float64),
        tokens=torch.zeros(tokens, dtype=torch.long),
        sequences=torch.zeros((sequences, width), dtype=torch.long),
    )


def training_config(*arguments: str) -> Config:
    """The config of a training. Raises UserError."""
    config = load_config(*arguments)
    if config.only_eval:
        raise UserError("only_eval: forecasts are of trainings; give the config of one")
    return config


def forecast(config: Config, length: int, gpus: int = 1) -> dict[str, float]:
    """Bytes by part, and the peaks of forward and backward and of the optimizer step."""
    hf_config = load_hf_config(config)
    several = gpus > 1
    accumulates = config.step_rows(gpus) > gpus * rows_at_once(config, length)
    width = config.compute_dtype.itemsize
    # FSDP adds up gradients of narrow types in float32 and not in .grad
    apart = several and accumulates and width < 4
    with_gradients = accumulates and not apart
    # FSDP gathers the parameters in the type to compute in, and the optimizer works on the shards
    dtype = config.compute_dtype if several else config.dtype
    mode, share = FakeTensorMode(), float(config.gradient_checkpointing)
    model, step_loss = trained_model(config, hf_config, dtype, mode, share)
    shards, _ = trained_model(config, hf_config, config.dtype, mode)
    with mode:
        model.train()
        batch, targets = full_batch(config, length)
        autocast = config.float32_master_weights and not several
        forward, backward = peaks_of_micro_batch(
            model, lambda: training_loss(model, step_loss, batch, targets), autocast, with_gradients
        )
        made = bytes_of(p.grad for p in trained_parameters(model))
        made = 0 if with_gradients or apart else made
        given = [*shards.parameters(), *make_gradients(shards)]
        parameters, gradients = (
            bytes_of(p) for p in (shards.parameters(), trained_parameters(shards))
        )
        optimizer = build_optimizer(config, shards)
        with Storages(given) as storages:
            optimizer.step()  # makes the state, one parameter after the other
            optimizer_state = storages.now
            storages.restart_peak()
            optimizer.step()
        temporaries = storages.peak - optimizer_state
    frozen = (parameters - gradients) // config.dtype.itemsize * width
    beside = gradients // config.dtype.itemsize * unsharded_bytes(config.compute_dtype, accumulates)
    unsharded = frozen + beside if several else 0
    static = (parameters + gradients + optimizer_state) / gpus + unsharded
    working = max(forward, backward) - made
    return {
        "parameters": parameters / gpus,
        "gradients": gradients / gpus,
        "optimizer state": optimizer_state / gpus,
        "gathered parameters, unreduced gradients": unsharded,
        "activations, caches, temporaries": working,
        "peak of forward and backward": static + working,
        "peak of the optimizer step": static - unsharded + temporaries / gpus,
    }


def peak(parts: dict[str, float]) -> float:
    """The most bytes at once of a forecast."""
    return max(parts["peak of forward and backward"], parts["peak of the optimizer step"])


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trained_model(
    config: Config,
    hf_config: PreTrainedConfig,
    dtype: torch.dtype,
    mode: FakeTensorMode,
    share: float = 0.0,
) -> tuple[Coconut, StepLoss | None]:
    """The model of a training and its step loss, whose decoder is a part of the model, as
    start_training makes them, of fake tensors. share: of the blocks that compute their
    activations again."""
    # on the meta device, as copies and peft's casts do not take fake tensors
    base = empty_model(hf_config, dtype)
    last = hf_config.vocab_size - 1
    if config.lora_r is not None:
        markers = (last - 2, last - 1, last) if config.method is Method.COCONUT else ()
        add_adapters(base, new_adapters(config, base, markers), config.seed)
    model = Coconut(base, last, fast_layers=config.fast_layers)
    if share:
        model.checkpoint_activations(share)
    step_loss = add_step_loss(config, model)
    with mode:
        made: dict[int, Any] = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
        for p in model.parameters():
            made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
    return copy.deepcopy((model, step_loss), made)


def make_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Give every trained parameter a gradient, as after a backward."""
    gradients = []
    for parameter in trained_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def training_loss(
    model: Coconut, step_loss: StepLoss | None, batch: dict, targets: StepTargets | None
) -> torch.Tensor:
    """What is trained on."""
    output = model(**batch)
    assert output.loss is not None
    if step_loss is None:
        return output.loss
    return output.loss + step_loss.weight * step_loss(model, output.latents, targets)


def peaks_of_micro_batch(
    model: Coconut, forward: Callable[[], torch.Tensor], autocast: bool, with_gradients: bool
) -> tuple[int, int]:
    """Most bytes alive in the forward and in the backward beside what was there before: the
    parameters and, with_gradients, the gradients of earlier micro-batches."""
    given = [*model.parameters(), *model.buffers()]
    if with_gradients:
        given += make_gradients(model)
    with Storages(given) as storages:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward()
        peak_of_forward = storages.restart_peak()
        loss.backward()
        return peak_of_forward, storages.restart_peak()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="+", metavar="YAML|KEY=VALUE")
    parser.add_argument("--gpus", type=positive, default=1)
    parser.add_argument("--length", type=positive, help="tokens per row; default: max_seq_length")
    args = parser.parse_args()
    try:
        config = training_config(*args.config)
        length = args.length or config.max_seq_length
        parts = forecast(config, length, args.gpus)
    except UserError as error:
        return error.report()
    print(
        f"{config.model_id}, {rows_at_once(config, length)} rows of {length} tokens per GPU, "
        f"{args.gpus} GPU(s), GiB per GPU:"
    )
    for name, size in parts.items():
        print(f"  {name:<42} {size / GIB:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
