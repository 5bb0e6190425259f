"""Generation by the library's hook against coconut.py."""

import copy

import pytest
import torch
from conftest import VOCAB, family_config
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GenerationConfig, MistralConfig

from coconut import Coconut
from engine.custom_generate import GREEDY, generate
from engine.support import LATENT_ID, WINDOW, make_batch, make_rows, small_config

FAMILIES = {
    "llama": family_config("llama"),
    "qwen3": family_config("qwen3"),  # tied
    "gpt2": family_config("gpt2"),
    "mistral": MistralConfig(sliding_window=64, initializer_range=0.2),
    "gemma3": Gemma3TextConfig(head_dim=16, initializer_range=0.2),  # tied, some with a window
}
PAD_ID, NEW = 1, 12


def tiny(family: str, **generation):
    """A small model of random weights that never ends by itself, with a generation config."""
    hf_config = small_config(FAMILIES[family])
    hf_config.vocab_size = VOCAB
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(hf_config).eval()
    options = dict(latent_token_id=LATENT_ID, max_new_tokens=NEW, pad_token_id=PAD_ID)
    base.generation_config = GenerationConfig(**{**options, **generation})
    return base


def prompts(latents: bool = True) -> dict[str, torch.Tensor]:
    """Rows of several lengths, padded on the left, with latents in other columns each."""
    rows = [(ids[labels == -100], labels[labels == -100]) for ids, labels in make_rows()]
    batch = make_batch(rows, left_only=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    columns = inputs["input_ids"] == LATENT_ID
    assert (columns.sum(1) > 0).tolist() == [True, True, False, True]
    if not latents:
        inputs["input_ids"] = inputs["input_ids"].masked_fill(columns, 50)
    return inputs


def by_coconut(base, inputs: dict, eos_id: int = -1) -> list[list[int]]:
    model = Coconut(copy.deepcopy(base), LATENT_ID, eos_token_id=eos_id)
    return [new.tolist() for new in model.generate(**inputs, max_new_tokens=NEW)]


def new_tokens(output: torch.Tensor, inputs: dict) -> list[list[int]]:
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    return output[:, length:].tolist()


# ------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("latents", [True, False], ids=["latents", "no latents"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_coconut(family, latents):
    base, inputs = tiny(family), prompts(latents)
    assert inputs["input_ids"].shape[1] + NEW > 4 * WINDOW
    wanted = by_coconut(base, inputs)
    assert len({token for row in wanted for token in row}) >= 10  # else any bug could hide
    assert new_tokens(generate(base, **inputs), inputs) == wanted
    if latents:  # and are lost on the library's own search, in the rows that have some
        plain = new_tokens(base.generate(**inputs, do_sample=False), inputs)
        assert [a == b for a, b in zip(plain, wanted)] == [False, False, True, False]


@pytest.mark.parametrize("pad_id", [PAD_ID, None])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_without_latents_it_is_the_librarys_greedy_search(family, pad_id):
    """Every token as eos in turn, alone and with another one: the same tensor, padding and all."""
    base, inputs = tiny(family, pad_token_id=pad_id), prompts(latents=False)
    free = new_tokens(generate(base, **inputs), inputs)
    for eos_id in {token for row in free for token in row}:
        for eos in (eos_id, [eos_id, free[0][2]]):
            base.generation_config.eos_token_id = eos
            output = generate(base, **inputs)
            assert torch.equal(output, base.generate(**inputs, do_sample=False))


def test_rows_end_at_eos_and_go_on_with_padding():
    base, inputs = tiny("llama"), prompts()
    for eos_id in {token for row in by_coconut(base, inputs) for token in row}:
        wanted = by_coconut(base, inputs, eos_id)
        length = max(map(len, wanted))
        output = new_tokens(generate(base, **inputs, eos_token_id=eos_id), inputs)
        assert output == [row + [PAD_ID] * (length - len(row)) for row in wanted]


def test_it_ends_where_all_rows_have():
    base, inputs = tiny("llama"), prompts()
    first = [row[0] for row in by_coconut(base, inputs)]
    assert generate(base, **inputs, eos_token_id=first).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("latents", [True, False])
def test_every_column_is_run_once(latents):
    base, inputs, widths = tiny("qwen3"), prompts(latents), []
    base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    output = generate(base, **inputs)
    assert sum(widths) == output.shape[1] - 1
    columns = (inputs["input_ids"] == LATENT_ID).any(0).sum()
    assert len(widths) == columns + NEW and (columns > 0) == latents


# ------------------------------------------------------------------------------- options


def test_the_callers_options_win_over_the_models():
    base, inputs = tiny("qwen3", max_new_tokens=3), prompts()
    lengths = [
        generate(base, **inputs, **options).shape[1] - inputs["input_ids"].shape[1]
        for options in (
            {},
            dict(max_new_tokens=5),
            dict(generation_config=GenerationConfig(max_new_tokens=4)),
            dict(generation_config=GenerationConfig(max_new_tokens=4), max_new_tokens=2),
            dict(generation_config=GenerationConfig(bos_token_id=7)),
        )
    ]
    assert lengths == [3, 5, 4, 2, 3]
    assert base.generation_config.max_new_tokens == 3


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True),
        dict(num_beams=2),
        dict(temperature=0.7),
        dict(length_penalty=0.5),
        dict(repetition_penalty=1.1),
        dict(max_length=30),
        dict(use_cache=False),
        dict(return_dict_in_generate=True),
        dict(streamer=object()),
        dict(stopping_criteria=[]),
        dict(position_ids=torch.arange(3)),
        dict(no_such_option=1),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_supported_is_refused_wherever_it_is_asked_for(options):
    base, inputs = tiny("qwen3"), prompts()
    (name,) = options
    with pytest.raises(ValueError, match=f"^generate: no support for this {name}: .*greedy"):
        generate(base, **inputs, **options)
    if not hasattr(base.generation_config, name):
        return
    with pytest.raises(ValueError, match=f"no support for this {name}: "):
        generate(base, **inputs, generation_config=GenerationConfig(**options))
    setattr(base.generation_config, name, options[name])
    with pytest.raises(ValueError, match=f"no support for this {name}: "):
        generate(base, **inputs)


def test_greedy_search_may_be_asked_for_by_name():
    base, inputs = tiny("qwen3"), prompts()
    output = generate(base, **inputs, **GREEDY, streamer=None)
    assert torch.equal(output, generate(base, **inputs))


@pytest.mark.parametrize("name", ["latent_token_id", "max_new_tokens"])
def test_a_model_that_does_not_name_what_is_needed_is_refused(name):
    """That of another folder, say: without the latent's id nothing would be fed back."""
    base, inputs = tiny("qwen3"), prompts()
    delattr(base.generation_config, name)
    with pytest.raises(ValueError, match=f"^generate: no {name}"):
        generate(base, **inputs)
    with pytest.raises(ValueError, match=f"^generate: no {name}"):
        generate(base, **inputs, **{name: None})


def test_input_that_cannot_be_right_is_refused():
    base, inputs = tiny("qwen3"), prompts()
    with pytest.raises(ValueError, match="padded on the left"):
        generate(base, inputs["input_ids"], inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="need their attention_mask"):
        generate(base, inputs["input_ids"])
    with pytest.raises(ValueError, match="input_ids are missing"):
        generate(base)
    inputs["input_ids"][2, inputs["attention_mask"][2].argmax()] = LATENT_ID
    with pytest.raises(ValueError, match="no hidden state before it"):
        generate(base, **inputs)
