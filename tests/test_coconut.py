"""coconut.py against the definition: the whole sequence run again for every latent, no cache."""

import pytest
import torch
import torch.nn.functional as F
from conftest import family_config, tiny_model
from numerics import assert_as_exact_as, assert_same, exact, plain, roundings
from tokenizers import Tokenizer, models, normalizers
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, PhiConfig, PreTrainedTokenizerFast

from coconut import (
    END_LATENT,
    LATENT,
    START_LATENT,
    Coconut,
    add_latent_tokens,
    init_latent_rows,
    single_token_id,
)
from dataset import Sample, collate
from layers import PastKeysValues

FAMILIES = ("qwen3", "llama", "gpt2")
LATENT_ID, START_ID, END_ID, EOS_ID, PAD_ID = 380, 381, 382, 0, 1

# rows of a batch: q a token without a label, L a latent, r a token with a label
BATCHES = {
    "one latent": ["qqqqLrrr"],
    "uneven latents": ["qqqqqLLLrrrr", "qqLrrrrrr", "qqqqqqqLLrrr"],
    "rows without any": ["qqqqLLrrr", "qqqqqqrrrrr", "qqqLrrr"],
    "no latents at all": ["qqqqrrr", "qqqqqqrr"],
    "twelve latents": ["qqqqqLLLLLLLLLLLLrrrr", "qqqLLLLLLLrr"],
    "labels in latent columns": ["qqqLLLLLLrr", "qqLrrrrrrrr"],
    "a row shorter than the others' prefix": ["qqqqqqqqqLLLrrrrrr", "qqrr", "qLrr"],
    "text between latents": ["qqqLqqLLrrr", "qqqLLqrr"],
    "a row without labels": ["qqqLLrrr", "qqqqLLq"],
}
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
LAYOUTS = ("collator", "left", "right", "scattered")


def wrap(base) -> Coconut:
    return Coconut(base, LATENT_ID, START_ID, END_ID, EOS_ID)


def make_rows(patterns: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels) of every pattern, random tokens but for the latents."""
    generator = torch.Generator().manual_seed(len(patterns[0]))
    rows = []
    for pattern in patterns:
        ids = torch.randint(2, LATENT_ID, (len(pattern),), generator=generator)
        ids[[c == "L" for c in pattern]] = LATENT_ID
        labels = torch.where(torch.tensor([c == "r" for c in pattern]), ids, -100)
        rows.append((ids, labels))
    return rows


def make_batch(rows, layout: str) -> dict:
    """The rows as Coconut.forward takes them; only the collator knows the latents' columns."""
    if layout == "collator":
        batch = collate(
            [
                Sample(i, ids.numpy(), labels.numpy(), *latent_span(ids))
                for i, (ids, labels) in enumerate(rows)
            ],
            PAD_ID,
        )
        return batch.inputs()
    width = max(len(ids) for ids, _ in rows)
    left = {
        "left": [width - len(ids) for ids, _ in rows],
        "right": [0 for _ in rows],
        "scattered": [(3 * i + 1) % 5 for i in range(len(rows))],
    }[layout]
    width = max(at + len(ids) for at, (ids, _) in zip(left, rows))
    pad = lambda tensor, at, value: F.pad(tensor, (at, width - at - len(tensor)), value=value)
    mask = torch.stack([pad(torch.ones_like(ids), at, 0) for at, (ids, _) in zip(left, rows)])
    return {
        "input_ids": torch.stack([pad(ids, at, PAD_ID) for at, (ids, _) in zip(left, rows)]),
        "labels": torch.stack([pad(labels, at, -100) for at, (_, labels) in zip(left, rows)]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def latent_span(ids) -> tuple[int, int]:
    """Sample's first_latent and num_fed_back: up to the last latent, whatever stands between."""
    at = (ids == LATENT_ID).nonzero().flatten().tolist()
    return (at[0], at[-1] + 1 - at[0]) if at else (1, 0)


def naive_forward(base, ids, num_prompt: int | None = None):
    """The definition for one row (T,): its logits (T, V) and the states fed back.

    Latents are those of the first num_prompt tokens.
    """
    embeds = list(base.get_input_embeddings()(ids))
    latents = []
    for position in (ids[:num_prompt] == LATENT_ID).nonzero().flatten().tolist():
        sequence = torch.stack(embeds)[None]
        hidden = base.base_model(inputs_embeds=sequence, use_cache=False).last_hidden_state
        latents.append(hidden[0, position - 1])
        embeds[position] = latents[-1]
    logits = base(inputs_embeds=torch.stack(embeds)[None], use_cache=False).logits
    return logits[0], latents


def naive_loss(base, rows):
    """Mean cross-entropy over the labelled tokens of all rows."""
    losses = [
        F.cross_entropy(naive_forward(base, ids)[0][:-1], labels[1:], reduction="sum")
        for ids, labels in rows
    ]
    return sum(losses) / sum((labels != -100).sum() for _, labels in rows)


@torch.no_grad()
def naive_generate(base, ids, eos_id: int, max_new_tokens: int) -> list[int]:
    """Greedy completion of one row, everything run again for every token."""
    new = []
    while len(new) < max_new_tokens and eos_id not in new:
        sequence = torch.cat([ids, torch.tensor(new, dtype=torch.long)])
        new.append(naive_forward(base, sequence, len(ids))[0][-1].argmax().item())
    return new


def gradients(base, loss) -> dict[str, torch.Tensor]:
    base.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}


def outcome(base, loss) -> dict:
    return {"loss": loss.detach(), "gradients": gradients(base, loss)}


def assert_same_as_naive(base, rows, batch) -> None:
    """Loss and every parameter's gradient, in the model's type."""
    truth = exact(base)
    actual = outcome(base, wrap(base)(**batch).loss)
    wanted = outcome(truth, naive_loss(truth, rows))
    assert actual["gradients"].keys() == dict(base.named_parameters()).keys()
    if base.dtype == torch.float64:
        for name in wanted:
            assert_same(actual[name], wanted[name], name)
    else:
        naive = [outcome(twin, naive_loss(twin, rows)) for twin in roundings(base)]
        assert_as_exact_as(actual, naive, wanted)


def tiny(family: str, dtype=torch.float64):
    """A model that computes wholly in float64, or the library's."""
    base = tiny_model(family)
    return exact(base) if dtype == torch.float64 else base


# ------------------------------------------------------------------------------- forward


@TYPES
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_are_the_definitions(name, family, dtype):
    base, rows = tiny(family, dtype), make_rows(BATCHES[name])
    assert_same_as_naive(base, rows, make_batch(rows, "collator"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BATCHES)
def test_padding_on_any_side_changes_nothing(name, layout):
    base, rows = tiny("gpt2"), make_rows(BATCHES[name])
    assert_same_as_naive(base, rows, make_batch(rows, layout))


@pytest.mark.parametrize("layout", ["left", "scattered"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@TYPES
def test_rotary_positions_under_left_padding(dtype, family, layout):
    base, rows = tiny(family, dtype), make_rows(BATCHES["uneven latents"])
    assert_same_as_naive(base, rows, make_batch(rows, layout))


def test_layers_with_sliding_windows():
    """Each kind of layer has its own mask, cut by pass like the full one."""
    config = family_config("qwen3")
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 4
    torch.manual_seed(0)
    base = exact(AutoModelForCausalLM.from_config(config).eval())
    rows = make_rows(BATCHES["uneven latents"])
    assert_same_as_naive(base, rows, make_batch(rows, "left"))


def test_head_with_a_bias():
    base, rows = tiny_phi(), make_rows(BATCHES["uneven latents"])
    torch.nn.init.normal_(base.lm_head.bias)
    assert_same_as_naive(exact(base), rows, make_batch(rows, "collator"))


def tiny_phi():
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        resid_pdrop=0.0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_loss_in_several_chunks(monkeypatch):
    monkeypatch.setattr("layers.LOSS_CHUNK", 3)
    base, rows = tiny("gpt2"), make_rows(BATCHES["uneven latents"])
    assert_same_as_naive(base, rows, make_batch(rows, "collator"))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_of_bfloat16_is_a_float32_sum(autocast):
    """Of 900 tokens: rounded to bfloat16 it would be off by up to 0.2%."""
    model = wrap(tiny_model("llama", torch.float32 if autocast else torch.bfloat16))
    batch = make_batch(make_rows(["qqqLL" + "r" * 100] * 9), "collator")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**batch, num_items_in_batch=1, return_logits=True)
    assert output.loss.dtype is torch.float32
    logits, labels = output.logits[:, :-1].double(), batch["labels"][:, 1:]
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert wanted > 4000 and abs(output.loss.item() / wanted.item() - 1) < 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(model(**batch, num_items_in_batch=1).loss, output.loss)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])  # of two blocks: rounded up
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_computed_again_change_nothing(family, share):
    """The library's own switch drops the cache, and with it all passes before, with a warning. A
    pass of a single column is not computed again."""
    base, rows = tiny(family), make_rows(BATCHES["uneven latents"])
    runs: list[int] = []
    for number, layer in enumerate(wrap(base).blocks()):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    wrap(base).checkpoint_activations(share)
    batch = make_batch(rows, "collator")
    gradients(base.train(), wrap(base)(**batch).loss)
    passes, wide = 4, 2  # in the forward and, wide ones of the first blocks, in the backward
    assert runs.count(0) == passes + wide and runs.count(1) == passes + (wide if share == 1 else 0)
    assert_same_as_naive(base, rows, batch)


@pytest.mark.parametrize("name", BATCHES)
def test_inferred_columns_are_the_collators(name):
    base, rows = wrap(tiny("gpt2")), make_rows(BATCHES[name])
    batch = make_batch(rows, "collator")
    given = base(**batch)
    assert base.find_latent_columns(batch["input_ids"]) == batch["latent_columns"]
    del batch["latent_columns"], batch["label_index"]
    inferred = base(**batch)
    assert torch.equal(given.loss, inferred.loss)
    assert torch.equal(given.latents, inferred.latents)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_and_logits_are_the_definitions(layout):
    base, rows = tiny("gpt2"), make_rows(BATCHES["uneven latents"])
    batch = make_batch(rows, layout)
    output = wrap(base)(**batch, return_logits=True)
    first, stop = wrap(base).find_latent_columns(batch["input_ids"])
    assert output.latents.shape[1] == stop - first
    is_latent = batch["input_ids"][:, first:stop] == LATENT_ID
    for i, (ids, _) in enumerate(rows):
        logits, latents = naive_forward(base, ids)
        assert_same(output.latents[i, is_latent[i]], torch.stack(latents))
        assert_same(output.logits[i, batch["attention_mask"][i] == 1], logits)


def test_without_latents_there_are_no_latents_and_no_logits():
    batch = make_batch(make_rows(BATCHES["no latents at all"]), "right")
    output = wrap(tiny_model("qwen3"))(**batch)
    assert output.latents.shape == (2, 0, 32)
    assert output.logits is None and output.prefix_hidden is None


def test_a_method_without_latents_is_plain_training():
    base = tiny("qwen3")
    batch = make_batch(make_rows(BATCHES["no latents at all"]), "right")
    loss = Coconut(base, latent_token_id=None, eos_token_id=EOS_ID)(**batch).loss
    labels = batch.pop("labels")[:, 1:].flatten()  # the library's loss would round to float32
    assert_same(loss, F.cross_entropy(base(**batch).logits[:, :-1].flatten(0, 1), labels))


def test_num_items_in_batch_replaces_the_count():
    model, batch = wrap(tiny("llama")), make_batch(make_rows(["qqLrrr", "qqrr"]), "left")
    mean, summed = model(**batch).loss, model(**batch, num_items_in_batch=1).loss
    assert_same(summed, mean * 5)
    assert_same(model(**batch, num_items_in_batch=96).loss, mean * 5 / 96)


def test_a_batch_without_labels_counts_for_nothing():
    """Its mean would be 0 / 0; a rank may hold only such a filler row in a micro-batch."""
    base = tiny_model("qwen3")
    loss = wrap(base)(**make_batch(make_rows(["qqqLLq"]), "collator")).loss
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(base, loss).values())


def test_without_labels_there_is_no_loss():
    batch = make_batch(make_rows(["qqLr"]), "right")
    del batch["labels"]
    assert wrap(tiny_model("llama"))(**batch).loss is None


def test_every_column_runs_once():
    """The prefix, each latent but the last by itself, the last together with the rest."""
    model, widths = wrap(tiny_model("qwen3")), []
    model.base_causallm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    model(**make_batch(make_rows(["qqqqLLLrrr", "qqLrr"]), "collator"))
    assert widths == [4, 1, 1, 4]


def test_a_latent_in_the_first_column_is_an_error():
    with pytest.raises(ValueError, match="no hidden state before it"):
        wrap(tiny_model("qwen3"))(**make_batch(make_rows(["Lqrr", "qqrr"]), "right"))


def test_parameter_names_are_the_ancestors():
    base = tiny_model("gpt2")
    names = {"base_causallm." + name for name in base.state_dict()}
    assert wrap(base).state_dict().keys() == names


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_decoder_layers(family):
    base = tiny_model(family)
    assert wrap(base).blocks() == list(base.base_model.h if family == "gpt2" else base.model.layers)


def test_dropout_in_training():
    """GPT-2's default is 0.1: random in training, gone in evaluation."""
    config = family_config("gpt2")
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.1
    torch.manual_seed(0)
    model = wrap(AutoModelForCausalLM.from_config(config))
    batch = make_batch(make_rows(BATCHES["uneven latents"]), "collator")
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.train()(**batch).loss)
    assert losses[0] == losses[1] != losses[2]
    assert all(g.isfinite().all() for g in gradients(model, losses[2]).values())
    assert model.eval()(**batch).loss == model(**batch).loss


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_embedding_needs_no_passes(family, width):
    """Pause tokens: what is not fed back can be run at once, a causal decoder sees no more."""
    base = tiny(family)
    model, batch = wrap(base), make_batch(make_rows(["qqqqLLLLrrrr", "qLLLLrrr"]), "left")
    masks = model.attention_masks(batch["attention_mask"], batch["position_ids"])
    embeds = base.get_input_embeddings()(batch["input_ids"])

    def run(width):
        cache, outputs = PastKeysValues(), []
        for start in range(0, embeds.shape[1], width):
            at = slice(start, start + width)
            positions = batch["position_ids"][:, at]
            output, cache = model.run_pass(embeds[:, at], positions, masks, at, cache)
            outputs.append(output)
        return torch.cat(outputs, 1)[batch["attention_mask"] == 1]

    assert_same(run(width), run(embeds.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_masks_are_what_gpu_kernels_want(family, dtype, monkeypatch):
    """No row of a mask hides all columns, which is NaN in some kernels; each begins at a multiple
    of 16 elements, or they would copy it. Left padding, uneven lengths, training and generation."""
    masks, attention = [], F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = wrap(tiny_model(family, dtype))
    model(**make_batch(make_rows(BATCHES["uneven latents"]), "left"))
    seen = len(masks)
    model.generate(**left_padded(prompts()), max_new_tokens=3)
    assert seen > 4 and len(masks) > seen + 3
    for mask in masks:
        assert mask.dtype is dtype and bool((mask == 0).any(-1).all())
        assert mask.stride(-1) == 1
        assert all(mask.stride(d) % 16 == 0 for d in range(3) if mask.shape[d] > 1)
        assert mask.storage_offset() % 16 == 0


# ------------------------------------------------------------------------------- host syncs


class NoHostSync(TorchDispatchMode):
    """Fails on operators that need their input's values on the host."""

    FORBIDDEN = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in self.FORBIDDEN, f"{func.name()} waits for the device"
        if func.name().startswith("aten::index"):
            indices = [i for i in args[1] if i is not None] if isinstance(args[1], list) else []
            assert all(i.dtype != torch.bool for i in indices), "an index of unknown size"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_host_sync_in_a_training_step(family):
    model = wrap(tiny_model(family)).train()
    batch = make_batch(make_rows(BATCHES["uneven latents"]), "collator")
    with NoHostSync():
        model(**batch, num_items_in_batch=9).loss.backward()
    del batch["latent_columns"]
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        model(**batch)


def test_no_value_is_needed_for_a_training_step():
    """Fake tensors have no values: reading one, by whatever call, fails."""
    batch = make_batch(make_rows(BATCHES["uneven latents"]), "collator")
    with FakeTensorMode() as mode:
        base = tiny_model("qwen3")
        fake = lambda value: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        batch = {name: fake(value) for name, value in batch.items()}
    model = wrap(base)
    with mode:
        gradients(base, model(**batch).loss)
        del batch["label_index"]
        with pytest.raises(DynamicOutputShapeException):
            model(**batch)


# ------------------------------------------------------------------------------- generation

PROMPTS = ["qqqqqLLLq", "qqLq", "qqqq", "qqqqqqqLLq", "qLLLLLLq"]


def prompts():
    return [ids for ids, _ in make_rows(PROMPTS)]


def left_padded(rows) -> dict:
    batch = make_batch([(ids, torch.full_like(ids, -100)) for ids in rows], "left")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def never(base) -> Coconut:
    """A model that never writes eos."""
    return Coconut(base, LATENT_ID, START_ID, END_ID, -1)


@torch.no_grad()
def num_clear(base, ids, new: list[int]) -> int:
    """How many tokens come before the first for which rounding might choose another one."""
    if base.dtype == torch.float64:
        return len(new)
    sequence = torch.cat([ids, torch.tensor(new)])
    logits, truth = (
        naive_forward(twin, sequence, len(ids))[0][len(ids) - 1 : -1]
        for twin in (plain(base), exact(base))
    )
    best = truth.topk(2).values  # (tokens, 2)
    clear = best[:, 0] - best[:, 1] > 20 * (logits - truth).abs().max()
    return int(clear.cumprod(0).sum())


@TYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_definitions(family, dtype):
    base = tiny(family, dtype)
    wanted = [naive_generate(exact(base), ids, -1, 10) for ids in prompts()]
    wanted = [new[: num_clear(base, ids, new)] for ids, new in zip(prompts(), wanted)]
    # else any bug could hide
    assert len({token for row in wanted for token in row}) > 10 and sum(map(len, wanted)) > 30
    together = never(base).generate(**left_padded(prompts()), max_new_tokens=10)
    alone = [never(base).generate(**left_padded([ids]), max_new_tokens=10)[0] for ids in prompts()]
    for actual in (together, alone):
        assert [row.tolist()[: len(new)] for row, new in zip(actual, wanted)] == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_ends_at_eos(family):
    """Each token that some row writes as eos in turn, the first tokens included; a row that ends
    leaves the batch and must not disturb the others."""
    base = tiny(family)
    free = [naive_generate(base, ids, -1, 8) for ids in prompts()]
    for eos_id in {token for row in free for token in row}:
        wanted = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free]
        model = Coconut(base, LATENT_ID, START_ID, END_ID, eos_id)
        actual = model.generate(**left_padded(prompts()), max_new_tokens=8)
        assert [row.tolist() for row in actual] == wanted


def test_generation_stops_when_all_rows_have():
    """eos as the first token of every row: one pass for each latent and not one more."""
    base, ids = tiny("qwen3"), prompts()[0]
    (first,) = naive_generate(base, ids, -1, 1)
    model, passes = Coconut(base, LATENT_ID, START_ID, END_ID, first), []
    base.base_model.register_forward_hook(lambda *_: passes.append(1))
    actual = model.generate(**left_padded([ids, ids]), max_new_tokens=50)
    assert [row.tolist() for row in actual] == [[first], [first]]
    assert len(passes) == 4


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_new_tokens(limit):
    base = tiny("llama")
    actual = never(base).generate(**left_padded(prompts()), max_new_tokens=limit)
    assert [row.tolist() for row in actual] == [
        naive_generate(base, ids, -1, limit) for ids in prompts()
    ]


def test_generation_takes_the_collators_batch():
    base = tiny("gpt2")
    none = lambda ids: torch.full_like(ids, -100).numpy()
    samples = [Sample(0, ids.numpy(), none(ids), *latent_span(ids)) for ids in prompts()]
    batch = collate(samples, PAD_ID, align_end=True)
    actual = never(base).generate(
        batch.input_ids, batch.attention_mask, 6, latent_columns=batch.latent_columns
    )
    assert [row.tolist() for row in actual] == [
        naive_generate(base, ids, -1, 6) for ids in prompts()
    ]


def test_generation_leaves_no_graph():
    (new,) = never(tiny("qwen3")).generate(**left_padded(prompts()[:1]), max_new_tokens=2)
    assert not new.requires_grad and not new.is_inference()


def test_generation_refuses_right_padding():
    batch = make_batch(make_rows(["qqqLq", "qq"]), "right")
    with pytest.raises(ValueError, match="padded on the left"):
        wrap(tiny("qwen3")).generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=2)


# ------------------------------------------------------------------------------- heads


def tiny_gemma2(softcapping: float | None):
    config = Gemma2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=softcapping,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_head_that_changes_its_logits_is_refused():
    """The loss is computed from hidden states and the head's weight, without softcapping."""
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        wrap(tiny_gemma2(30.0))
    wrap(tiny_gemma2(None))


# ------------------------------------------------------------------------------- markers


def test_markers_have_the_ancestors_ids(tokenizer):
    size = len(tokenizer)
    assert add_latent_tokens(tokenizer) == (size, size + 2, size + 1)  # start, latent, end
    assert tokenizer.convert_ids_to_tokens([size, size + 1, size + 2]) == [
        START_LATENT,
        END_LATENT,
        LATENT,
    ]
    assert add_latent_tokens(tokenizer) == (size, size + 2, size + 1)
    assert len(tokenizer) == size + 3


def test_markers_vanish_from_decoded_text(tokenizer, tmp_path):
    """As ordinary tokens, as the ancestor adds them, they stood in the extracted answer."""
    start, latent, end = add_latent_tokens(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        text = f"plums?\n{START_LATENT}{LATENT}{LATENT}{END_LATENT}### 4"
        ids = reader.encode(text, add_special_tokens=False)
        assert [ids.count(i) for i in (start, latent, end)] == [1, 2, 1]
        assert reader.decode(ids, skip_special_tokens=True) == "plums?\n### 4"
        assert reader.decode(ids) == text


def test_markers_that_are_ordinary_tokens_become_special(tokenizer):
    """The tokenizer of an ancestor's run has them as ordinary tokens: same ids, now special."""
    tokenizer.add_tokens([START_LATENT, END_LATENT, LATENT])
    size = len(tokenizer)
    start, latent, end = add_latent_tokens(tokenizer)
    assert (start, end, latent) == (size - 3, size - 2, size - 1)
    assert tokenizer.decode([start, latent, end], skip_special_tokens=True) == ""


def test_markers_leave_other_special_tokens_alone(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    add_latent_tokens(tokenizer)
    assert {user, tokenizer.eos_token_id} <= set(tokenizer.all_special_ids)
    assert tokenizer.decode([user], skip_special_tokens=True) == ""


def test_single_token_id_where_a_blank_is_put_before_a_text():
    """Llama 2's tokenizer makes a blank and << of <<; rows hold it at a line's start."""
    backend = Tokenizer(models.BPE({"▁": 0, "<<": 1, "\n": 2, "<": 3}, [("<", "<")]))
    backend.normalizer = normalizers.Prepend("▁")
    reader = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert reader.encode("<<") == [0, 1] and single_token_id(reader, "<<") == 1


def test_single_token_id(tokenizer):
    assert tokenizer.convert_ids_to_tokens(single_token_id(tokenizer, "<<")) == "<<"
    with pytest.raises(ValueError, match="marker_init_token: .* 3 tokens of '@@@'"):
        single_token_id(tokenizer, "@@@")


def test_a_token_that_is_not_known_is_no_marker():
    """Of words alone, all others are one token: the unknown one."""
    backend = Tokenizer(models.WordLevel({"plum": 0, "?": 1}, unk_token="?"))
    reader = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    assert [single_token_id(reader, token) for token in ("plum", "?")] == [0, 1]
    with pytest.raises(ValueError, match="marker_init_token: this tokenizer does not know '<<'"):
        single_token_id(reader, "<<")


# ------------------------------------------------------------------------------- marker rows


def tables(base) -> list[torch.Tensor]:
    head = base.get_output_embeddings()
    weights = [base.get_input_embeddings().weight, head.weight]
    return weights if head.bias is None else [*weights, head.bias]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "phi"])
@pytest.mark.parametrize(
    "ids, rows",
    [
        ((380, 382, 381), 384),  # spare rows: used, none is dropped
        ((384, 386, 385), 387),  # none: grown by what is needed
        ((383, 385, 384), 386),  # one of three
    ],
)
def test_marker_rows_are_copies(family, ids, rows):
    """Tied and untied, input and output side, the head's bias too."""
    base = tiny_phi() if family == "phi" else tiny_model(family)
    if family == "phi":
        torch.nn.init.normal_(base.lm_head.bias)
    before = [table.detach().clone() for table in tables(base)]
    init_latent_rows(base, ids, 7)
    old = [row for row in range(384) if row not in ids]
    for table, was in zip(tables(base), before, strict=True):
        assert len(table) == rows
        assert torch.equal(table[old], was[old])
        assert all(torch.equal(table[i], was[7]) for i in ids)
        assert table.requires_grad
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert tied == base.config.tie_word_embeddings == (family in ("qwen3", "gpt2"))
    assert base.config.vocab_size == rows
