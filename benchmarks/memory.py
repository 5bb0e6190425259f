"""Forecast the peak memory of a training from its config alone: no GPU, no weights.

    python benchmarks/memory.py args/X.yaml [KEY=VALUE ...] [--gpus N] [--length L]

Runs one micro-batch and one optimizer step on fake tensors and adds up the storages that are alive.
With several GPUs parameters, gradients and optimizer state are divided among them, and each also
holds the gathered parameters and the unreduced gradients of a step (distributed.shard), which FSDP
adds up in float32 over several micro-batches.
"""

import argparse
import copy
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

sys.path.append(str(Path(__file__).resolve().parents[1]))
from coconut import Coconut
from engine.adapters import add_adapters, new_adapters
from engine.distributed import unsharded_bytes
from engine.optimizer import build_optimizer, trained_parameters
from engine.pretrained import load_hf_config
from engine.weights import empty_model
from loader import load_config
from preprocessing.common import positive
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


def full_batch(config: Config, length: int) -> dict:
    """Rows of `length` tokens with the latents of the last stage, 60% of the others before them."""
    latents = config.c_thought * config.max_latent_stage if config.coconut else 0
    prefix = int(0.6 * (length - latents))
    return zero_batch(rows_at_once(config, length), prefix, latents, length - latents - prefix)


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
    with FakeTensorMode() as mode:
        # FSDP gathers the parameters in the type to compute in
        dtype = config.compute_dtype if several else config.dtype
        base = trained_model(config, hf_config, dtype)
    model = Coconut(base, hf_config.vocab_size - 1, fast_layers=config.fast_layers)
    with mode:
        if config.gradient_checkpointing:
            model.checkpoint_activations(config.gradient_checkpointing)
        model.train()
        batch = full_batch(config, length)
        autocast = config.float32_master_weights and not several
        forward, backward = peaks_of_micro_batch(model, batch, autocast, with_gradients)
        made = bytes_of(p.grad for p in trained_parameters(model))
        made = 0 if with_gradients or apart else made
        # and the optimizer works on the shards, in theirs
        shards = trained_model(config, hf_config, config.dtype)
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
    config: Config, hf_config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of a training, with its adapters where it has some; in the mode of the caller."""
    if config.lora_r is None:
        return AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    with unset_fake_temporarily():  # peft casts in a way that fake tensors do not take
        base = empty_model(hf_config, dtype)
        last = hf_config.vocab_size - 1
        markers = (last - 2, last - 1, last) if config.method is Method.COCONUT else ()
        add_adapters(base, new_adapters(config, base, markers), config.seed)
    made: dict[int, Any] = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in base.buffers()}
    for p in base.parameters():
        made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
    return copy.deepcopy(base, made)


def make_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Give every trained parameter a gradient, as after a backward."""
    gradients = []
    for parameter in trained_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def peaks_of_micro_batch(
    model: Coconut, batch: dict, autocast: bool, with_gradients: bool
) -> tuple[int, int]:
    """Most bytes alive in the forward and in the backward beside what was there before: the
    parameters and, with_gradients, the gradients of earlier micro-batches."""
    given = [*model.parameters(), *model.buffers()]
    if with_gradients:
        given += make_gradients(model)
    with Storages(given) as storages:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        forward = storages.restart_peak()
        loss.backward()
        return forward, storages.restart_peak()


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
