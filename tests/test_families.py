"""Every causal family of the library: accepted, agreeing with the definition and coming back whole
from its own checkpoints; or refused in one line that says why."""

import copy

import pytest
import torch
from conftest import ROOT  # noqa: F401 sets the import path
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)
from transformers.utils import logging

from coconut import Coconut
from engine import support
from engine.model import build_model
from engine.preflight import gather_inputs
from engine.weights import fit_config, load_base, read_weights, save_base
from loader import load_config
from utils import UserError

RECURRENT = "recurrent state"
KEPT = "other things than keys and values"
HEAD = "its head changes the logits"
POSITIONS = "not given the tokens' positions"
NO_TOWER = "no causal class for its text model"
DIFFER = "differ from a plain forward"
TOKENS = "look up every token"

ACCEPTED = """
    afmoe apertus arcee aria_text axk1 biogpt bitnet codegen
    cohere_compass_text cwm dbrx deepseek_v2 deepseek_v3
    diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo flint fuyu gemma
    gemma3 gemma3_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite got_ocr2
    gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lfm2 llama longcat_flash mellum
    mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
    moss_transcribe_diarize mpt nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3
    phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm
    starcoder2 whisper xglm youtu
""".split()
REFUSED = {
    RECURRENT: """
        bailing_hybrid bamba deepseek_v4 falcon_h1 falcon_mamba granitemoehybrid inkling2_text
        inkling_text jamba kimi_linear lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid
        qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text
        recurrent_gemma rwkv xlstm zamba zamba2 zaya""",
    KEPT: "axk2 deepseek_v32 dots3_note dots3_note_text glm_moe_dsa hy_v4",
    HEAD: "beam cohere cohere2 cohere2_moe gemma2 minicpm3 nanochat vaultgemma",
    POSITIONS: """
        bigbird_pegasus blenderbot blenderbot-small bloom marian pegasus plbart prophetnet trocr""",
    "not given a cache": "openai-gpt xlnet",
    "not given embeddings": "cpmant",
    NO_TOWER: "blt emu3 mllama musicgen musicgen_melody",
    DIFFER: "bert-generation modernbert-decoder moshi",
    TOKENS: "gemma3n gemma3n_text gemma4 gemma4_text",
    "does not name the decoder": "llama4 llama4_text",
    "modified inplace": "ctrl git",
    "": "gemma4_assistant gemma4_unified_assistant",  # they draft for another model
}
REFUSED = {name: reason for reason, names in REFUSED.items() for name in names.split()}
# what the default configs of some classes lack
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOWER = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
LACKING = {
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}
    ),
    "dbrx": dict(attn_config=dict(rope_theta=10000.0, kv_n_heads=4, clip_qkv=8.0)),
    "deepseek_v2": dict(num_experts_per_tok=2, n_group=1, topk_group=1),
    "dots1": dict(n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 16),
    "phi4_multimodal": dict(  # its other towers stay as large as they are
        vision_config=dict(num_hidden_layers=2, **TOWER),
        audio_config=dict(num_blocks=2, nemo_conv_channels=32, **TOWER),
    ),
}
FAST = (
    "qwen3 llama gpt2 gpt_neox gemma3 mistral mixtral phi3 opt gpt_oss bloom gemma2 qwen3_5 mamba"
)
KINDS = {
    kind.model_type: kind
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING
    if kind not in MODEL_FOR_MASKED_LM_MAPPING  # refused by their kind, see test_preflight
}


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)


def obstacle(hf_config) -> str | None:
    """The line of a refusal; None where the family is accepted."""
    try:
        support.check_support(hf_config, "some/model")
    except UserError as error:
        (line,) = error.problems
        return line
    return None


def save(base, folder) -> None:
    """As engine.checkpoint.save_checkpoint does."""
    save_base(base, base.state_dict(), folder)


def load(folder, hf_config):
    """As the program checks and loads a checkpoint of its own."""
    fit_config(read_weights(folder, hf_config), hf_config, hf_config.vocab_size, str(folder))
    return load_base(folder, hf_config, torch.float32, str(folder)).eval()


def logits(base):
    ids = torch.arange(20, 32)[None]
    base = copy.deepcopy(base)  # weights in a mapped file lie at addresses that kernels round by
    with torch.no_grad():
        return base(ids, use_cache=False).logits


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in FAST.split() else pytest.mark.slow) for f in sorted(KINDS)],
)
def test_accepted_and_round_trips_or_refused(family, tmp_path):
    expected = REFUSED.get(family)
    try:
        hf_config = support.causal_config(KINDS[family](**LACKING.get(family, {})))
    except StrictDataclassError:  # its defaults contradict each other
        assert expected == ""
        return
    line = obstacle(hf_config)
    if line is not None:
        assert family not in ACCEPTED, line
        assert expected is None or expected in line, line
        assert "\n" not in line and len(line) < 400
        return
    assert expected is None, "accepted now: move it in the table"
    heads = 4 if family == "codegen" else 2
    base = support.small_model(support.small_config(hf_config, heads))
    wanted = logits(base)
    save(base, tmp_path)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(opened.eval()), wanted)
    assert torch.equal(logits(load(tmp_path, copy.deepcopy(base.config))), wanted)


# ------------------------------------------------------------------------------- kinds of layers


def config_of(kind, **changes):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4)
    return kind(**{**sizes, "num_key_value_heads": 2, "vocab_size": 384, **changes})


def test_the_small_model_has_every_kind_of_layer():
    """The first sliding layer of this config is the sixth."""
    config = config_of(Qwen2Config, use_sliding_window=True, max_window_layers=5, sliding_window=64)
    small = support.small_config(config)
    assert set(small.layer_types) == {"full_attention", "sliding_attention"}
    assert small.num_hidden_layers == len(small.layer_types) == 6
    assert small.sliding_window < min(len(row) for row in support.ROWS)
    assert config.num_hidden_layers == 8 and config.sliding_window == 64  # as it was


@pytest.mark.parametrize("part", ["window", "padding", "positions", "past"])
def test_the_check_sees_what_goes_wrong(part, monkeypatch):
    """Each error of this kind is far above the tolerance, rounding far below it."""
    base = support.small_model(support.small_config(config_of(MistralConfig, sliding_window=64)))
    assert max(support.differences(copy.deepcopy(base)).values()) < support.TOLERANCE / 20
    masks, run_pass = Coconut.attention_masks, Coconut.run_pass

    def wrong_masks(self, attention_mask, position_ids):
        if part == "window":
            monkeypatch.setattr(base.config, "sliding_window", None)
        if part == "padding":
            attention_mask = torch.ones_like(attention_mask)
        return masks(self, attention_mask, position_ids)

    def wrong_pass(self, embeds, position_ids, masks, at, cache):
        if part == "positions":  # the same for all would not matter to rotations
            position_ids = position_ids + (at.start > 0)
        if part == "past":  # that of another row
            rows = torch.arange(len(embeds)).roll(1)
            cache.keep_rows(rows)
        return run_pass(self, embeds, position_ids, masks, at, cache)

    monkeypatch.setattr(Coconut, "attention_masks", wrong_masks)
    monkeypatch.setattr(Coconut, "run_pass", wrong_pass)
    assert max(support.differences(base).values()) > 10 * support.TOLERANCE


@pytest.mark.parametrize(
    "config, reason",
    [
        (FalconConfig(alibi=True), "ALiBi"),
        (config_of(LlamaConfig, sliding_window=64), DIFFER),  # masks are made with it, none used
        (config_of(KINDS["gemma2"]), HEAD),
        (config_of(KINDS["gemma2"], final_logit_softcapping=None), None),
        (config_of(KINDS["lfm2"], layer_types=["conv", "full_attention"] * 4), RECURRENT),
        (config_of(KINDS["lfm2"], layer_types=["full_attention"] * 8), None),
        (config_of(KINDS["granite"], logits_scaling=8.0), HEAD),
        (config_of(KINDS["granite"], logits_scaling=1.0, embedding_multiplier=12.0), None),
    ],
)
def test_the_config_decides_not_the_class(config, reason):
    line = obstacle(config)
    assert line is None if reason is None else reason in line


@pytest.mark.parametrize("family", ["bloom", "mamba", "qwen3_5"])
def test_the_refusal_is_one_of_the_problems(family, workspace, tokenizer):
    """Told before any weights, with all else that is wrong and nothing that is not."""
    KINDS[family]().save_pretrained(workspace.folder / "other")
    tokenizer.save_pretrained(workspace.folder / "other")
    config = load_config(
        workspace.yaml(model_id=str(workspace.folder / "other"), marker_init_token="two tokens"),
        "from_scratch=True",
    )
    with pytest.raises(UserError) as caught:
        gather_inputs(config)
    family_line, marker_line = caught.value.problems
    assert f"{family}" in family_line and REFUSED[family] in family_line
    assert "marker_init_token" in marker_line


def test_blocks_without_names_keep_all_activations(workspace, tokenizer):
    """BioGPT's are found by nobody; a run that needs them is refused, any other is not."""
    small = support.small_config(KINDS["biogpt"]())
    small.vocab_size = 384
    small.save_pretrained(workspace.folder / "nameless")
    tokenizer.save_pretrained(workspace.folder / "nameless")
    path = workspace.yaml(model_id=str(workspace.folder / "nameless"))
    assert gather_inputs(load_config(path, "from_scratch=True")).hf_config.vocab_size == 384
    with pytest.raises(UserError, match="gradient_checkpointing"):
        gather_inputs(load_config(path, "from_scratch=True", "gradient_checkpointing=True"))


def test_the_limit_of_positions():
    """Not every config names it as most do, some name none."""
    assert support.max_positions(config_of(LlamaConfig, max_position_embeddings=512)) == 512
    assert support.max_positions(KINDS["mpt"](max_seq_len=128)) == 128
    assert support.max_positions(KINDS["bloom"]()) == float("inf")


# ------------------------------------------------------------------------------- text towers


VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def tower_model(kind: str):
    """A small model that sees, and the config of its text tower."""
    if kind == "gemma3":
        text = dict(config_of(KINDS["gemma3_text"], head_dim=16).to_dict())
        config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
        return Gemma3ForConditionalGeneration(config)
    text = config_of(LlamaConfig)
    config = LlavaConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", **VISION}
    )
    config.tie_word_embeddings = kind == "llava, tied"
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["gemma3", "llava", "llava, tied"])
def test_the_text_tower_of_a_model_that_sees(kind, workspace, tokenizer):
    """Its sizes stand in text_config, its weights under other names beside those of other towers;
    it comes whole, is checked and trained as a model of its own, and is saved as one."""
    torch.manual_seed(0)
    whole = tower_model(kind).eval()
    folder = workspace.folder / "seeing"
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = load_config(workspace.yaml(model_id=str(folder), coconut=False, cot=True))
    base = build_model(gather_inputs(config)).base_causallm.eval()
    assert "vision" not in str(type(base.config).sub_configs)
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits
    actual = logits(base)
    torch.testing.assert_close(actual, wanted)
    save(base, workspace.folder / "saved")
    opened, report = AutoModelForCausalLM.from_pretrained(
        workspace.folder / "saved", output_loading_info=True
    )
    assert not any(report.values()) and torch.equal(logits(opened.eval()), actual)
