"""The model of a run, built from its inputs: in memory on one process, however many there are."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from coconut import Coconut, init_latent_rows
from engine.adapters import add_adapters, load_adapters
from engine.distributed import broadcast_object, on_main
from engine.inputs import Inputs
from engine.weights import empty_model, load_base
from utils import derive_seed


def build_model(inputs: Inputs, dtype: torch.dtype | None = None) -> Coconut:
    """The model on the CPU in a dtype, by default the config's, with the weights that the inputs
    name.

    Of several processes the main one alone reads them. The models of the others are on the meta
    device, as it has loaded its own (rows of the vocabulary, ties), until distributed.shard or
    replicate brings them its weights. Raises UserError, on all of them.
    """
    config, tokens = inputs.config, inputs.latent_tokens
    dtype = dtype or config.dtype
    base = on_main(lambda: _load_weights(inputs, dtype))
    hf_config = broadcast_object(None if base is None else base.config)
    if base is None:
        base = empty_model(hf_config, dtype)
    if (adapters := inputs.adapters) is not None:
        add_adapters(base, adapters, config.seed)
        if adapters.folder is not None:
            on_main(lambda: load_adapters(base, adapters))
    return Coconut(
        base,
        latent_token_id=tokens.latent if tokens is not None and config.feeds_back else None,
        eos_token_id=inputs.tokenizer.eos_token_id,
        fast_layers=config.fast_layers,
    )


def _load_weights(inputs: Inputs, dtype: torch.dtype) -> PreTrainedModel:
    config, tokens, source = inputs.config, inputs.latent_tokens, inputs.whole_source
    if source is not None:
        base = load_base(source, inputs.hf_config, dtype, str(source))
    elif config.from_scratch:
        torch.manual_seed(derive_seed(config.seed, "weights"))
        base = AutoModelForCausalLM.from_config(inputs.hf_config, dtype=dtype)
    else:
        name, revision = f"model_id: {config.model_id}", config.model_revision
        base = load_base(config.model_id, inputs.hf_config, dtype, name, revision)
    if tokens is not None and inputs.marker_init_id is not None:
        init_latent_rows(base, tokens, inputs.marker_init_id)
    return base
