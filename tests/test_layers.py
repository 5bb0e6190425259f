"""layers.py against the library's layers; the weights' gradients against autograd's own."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from numerics import ExactNorm, assert_as_exact_as, assert_same, exact, roundings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from coconut import Coconut
from layers import Passes, computes_llamas_norm, rms_norm, summed_cross_entropy

LATENT_ID = 380


def biased_model():
    """A Qwen2: biases on queries, keys and values."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    base = AutoModelForCausalLM.from_config(config)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return base


def mixture_model():
    """A Qwen3 with experts: some of its layers see rows (N, D)."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=4,  # all: rounding chooses none
            initializer_range=0.2,
        )
    )
    base.set_experts_implementation("eager")  # the grouped product has no float64
    return base


def exact_qwen3():
    return exact(tiny_model("qwen3"))


MODELS = {
    "qwen3": lambda: tiny_model("qwen3"),
    "llama": lambda: tiny_model("llama"),
    "biases": biased_model,
    "mixture": mixture_model,
    "qwen3 in float64": exact_qwen3,
    "biases in float64": lambda: exact(biased_model()),
}


def batch_of(latents: int, rows: int = 3) -> dict:
    """Rows of 4 tokens, latents, 4 labelled tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, LATENT_ID, (rows, 8 + latents), generator=generator)
    ids[:, 4 : 4 + latents] = LATENT_ID
    labels = ids.clone()
    labels[:, : 4 + latents] = -100
    mask = torch.ones_like(ids)
    return dict(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(-1) - 1, labels=labels)


def wrap(base, again: bool = False) -> Coconut:
    """again: its activations are computed again in the backward."""
    model = Coconut(base, LATENT_ID, 381, 382, 0)
    if again:
        model.checkpoint_activations()
    return model


def gradients(model, **more) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch_of(5), **more).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_autograds(actual, model, **more) -> None:
    """The gradients that the model has with the library's layers, where each pass adds one of its
    own to each weight."""
    truth = gradients(exact(model), **more)
    if model.base_causallm.dtype == torch.float64:
        assert_same(actual, truth)
    else:
        naive = [{"gradients": gradients(twin, **more)} for twin in roundings(model)]
        assert_as_exact_as({"gradients": actual}, naive, {"gradients": truth})


# ------------------------------------------------------------------------------- RMSNorm


def outcome(function, x, weight):
    """Output, and the gradients of x and weight, of a function of x."""
    x, weight.grad = x.detach().requires_grad_(), None
    output = function(x)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape))
    return output.detach(), x.grad, weight.grad


def assert_norms(norm, x, view=lambda output: output) -> None:
    """Outcomes of our function against the library's module and its exact twin."""
    names, wide = ("output", "of x", "of weight"), ExactNorm(copy.deepcopy(norm).double())
    actual = outcome(lambda x: view(rms_norm(norm, x)), x, norm.weight)
    naive = outcome(lambda x: view(norm(x)), x, norm.weight)
    truth = outcome(lambda x: view(wide(x)), x.double(), wide.weight)
    assert [value.dtype for value in actual] == [value.dtype for value in naive]
    actual, naive, truth = (dict(zip(names, values)) for values in (actual, naive, truth))
    assert_as_exact_as(actual, [naive], truth)


@pytest.mark.parametrize(
    "of_x, of_weight",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),  # the library computes in float32 all the same
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),  # float32 master weights
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 3, 16), (5, 16), (2, 3, 4, 16)], ids=str)
def test_rms_norm_is_the_librarys(shape, of_x, of_weight):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(16, eps=1e-3).to(of_weight)
    nn.init.normal_(norm.weight)
    x = torch.randn(shape).to(of_x) * torch.logspace(-3, 2, 16).to(of_x)
    assert_norms(norm, x)


def test_rms_norm_of_transposed_heads():
    """Qwen3's norms of queries and keys; their gradients come back transposed."""
    torch.manual_seed(0)
    norm, x = LlamaRMSNorm(8), torch.randn(2, 5, 4, 8)
    assert_norms(norm, x, lambda output: output.transpose(1, 2))


def test_norms_that_compute_something_else_stay():
    """Gemma's multiplies by one plus the weight."""
    assert computes_llamas_norm(LlamaRMSNorm) and computes_llamas_norm(Qwen3RMSNorm)
    assert not computes_llamas_norm(Gemma2RMSNorm) and not computes_llamas_norm(nn.LayerNorm)


@pytest.mark.parametrize("family, count", [("qwen3", 2 * 4 + 1), ("llama", 2 * 2 + 1), ("gpt2", 0)])
def test_every_llama_norm_of_a_model_is_replaced(family, count):
    base = wrap(tiny_model(family)).base_causallm
    others = [m for m in base.modules() if not isinstance(m, nn.Linear)]
    assert sum("forward" in vars(module) for module in others) == count


# ------------------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", MODELS)
def test_weight_gradients_are_autograds(kind, again):
    model = wrap(MODELS[kind](), again)
    assert_autograds(gradients(model), model)


def test_weight_gradients_where_latents_are_replaced():
    """The passes are then joined by their keys and values only, and autograd's order is another."""
    constant = lambda k, state: torch.full_like(state, 0.1 * k)
    model = wrap(exact_qwen3())
    assert_autograds(gradients(model, edit_latent=constant), model, edit_latent=constant)


class WeightSized(TorchDispatchMode):
    """Counts products and sums whose result has a given shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.counts = shape, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.counts[func.overloadpacket.__name__] += 1
        return result


def test_a_loss_without_gradients_makes_none():
    """The head's was made, and thrown away, for every batch of a validation."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(5, 8).double(), torch.randint(11, (5,))
    head = nn.Parameter(torch.randn(11, 8).double())
    bias = nn.Parameter(torch.randn(11).double())
    with WeightSized(head.shape) as counted, torch.no_grad():
        loss = summed_cross_entropy(hidden, head, bias, labels)
    assert not counted.counts["zeros_like"] and not counted.counts["addmm_"]
    expected = F.cross_entropy(F.linear(hidden, head, bias), labels, reduction="sum")
    assert_same(loss, expected)
    with WeightSized(head.shape) as counted:
        summed_cross_entropy(hidden, head, bias, labels).backward()
    assert counted.counts["zeros_like"] == 1 and head.grad is not None


@pytest.mark.parametrize("latents", [3, 9])
def test_a_weights_gradient_is_made_once_for_all_latents(latents):
    """One for the prefix, one for the columns, one for the rest; each pass would make its own."""
    model = wrap(tiny_model("qwen3"))
    shape = model.base_causallm.model.layers[0].mlp.down_proj.weight.shape  # (32, 48): two layers'
    with WeightSized(shape) as mode:
        model(**batch_of(latents)).loss.backward()
    assert mode.counts["mm"] == 2 * 3 and mode.counts["add"] == 2 * 2


def test_two_forwards_before_their_backward():
    model = wrap(exact_qwen3())
    wanted = gradients(model)
    model.zero_grad()
    losses = [model(**batch_of(5)).loss for _ in range(2)]
    sum(losses).backward()
    assert_same({name: p.grad / 2 for name, p in model.named_parameters()}, wanted)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_an_evaluation_between_forward_and_backward(again):
    model = wrap(exact_qwen3(), again)
    wanted = gradients(model)
    model.zero_grad()
    loss = model(**batch_of(5)).loss
    with torch.no_grad():
        model(**batch_of(0))
    loss.backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, wanted)


def test_frozen_weights_get_no_gradient():
    model = wrap(exact_qwen3())
    name = "base_causallm.model.layers.0.mlp.up_proj.weight"
    model.get_parameter(name).requires_grad_(False)
    actual = gradients(model)
    model.get_parameter(name).requires_grad_(True)
    wanted = gradients(model)
    assert actual.keys() == wanted.keys() - {name}
    assert_same(actual, {name: wanted[name] for name in actual})


def test_frozen_biases():
    model = wrap(exact(biased_model()))
    biases = {n: p.requires_grad_(False) for n, p in model.named_parameters() if "bias" in n}
    actual = gradients(model)
    assert not actual.keys() & biases.keys()
    assert_autograds(actual, model)


def test_autocast_computes_in_its_own_type():
    """float32 master weights on one process: the columns' gradients come back in float32."""
    model = wrap(tiny_model("qwen3"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_of(5)).loss
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_no_graph_is_kept_after_the_backward():
    model = wrap(tiny_model("qwen3"))
    loss = model(**batch_of(5)).loss
    assert model.passes.nodes
    loss.backward()
    assert not model.passes.nodes


def test_a_trained_model_can_be_copied():
    model = wrap(exact_qwen3())
    wanted = gradients(model)
    twin = copy.deepcopy(model)
    model.base_causallm.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert_same(gradients(twin), wanted)  # its layers are its own


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", MODELS)
def test_micro_batches_add_up_in_place(kind, again):
    """Of the second on, no gradient of a weight's size is made beside those that are there."""
    model = wrap(MODELS[kind](), again)
    gradients(model)
    places = {name: p.grad.data_ptr() for name, p in model.named_parameters()}
    model(**batch_of(5)).loss.backward()
    actual = {name: p.grad / 2 for name, p in model.named_parameters()}
    assert_autograds(actual, model)
    layers = [name for name in actual if ".layers." in name and "proj" in name]
    assert layers and all(model.get_parameter(n).grad.data_ptr() == places[n] for n in layers)
    model(**batch_of(0)).loss.backward()  # a single pass: the usual way
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_later_micro_batches_make_no_gradient_of_a_weights_size():
    """Autograd's sum over the passes beside the gradients took 6.4 GiB at 4B."""
    model = wrap(tiny_model("qwen3"))
    shape = model.base_causallm.model.layers[0].mlp.down_proj.weight.shape
    gradients(model)
    with WeightSized(shape) as mode:
        model(**batch_of(5)).loss.backward()
    assert mode.counts == {"addmm_": 2 * 3, "t": mode.counts["t"]}


def test_a_single_pass_is_the_usual_linear_layer():
    layer, passes = nn.Linear(4, 3), Passes()
    x = torch.randn(2, 1, 4)
    assert type(passes.linear(layer, x).grad_fn).__name__ != "_PassLinearBackward"
    passes.start(several=True)
    assert type(passes.linear(layer, x).grad_fn).__name__ == "_PassLinearBackward"
    assert torch.equal(passes.linear(layer, x), F.linear(x, layer.weight, layer.bias))
