"""Weights in every form that they come in: read, or named; loaded by from_pretrained's rule."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SIZES, VOCAB, family_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPTNeoXConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

import run
from engine.model import build_model
from engine.preflight import gather_inputs
from engine.weights import load_base, read_weights
from loader import load_config
from utils import UserError

QWEN3 = family_config("qwen3")


def logits(model) -> torch.Tensor:
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(model)  # weights in a mapped file lie at addresses that kernels round by
    with torch.no_grad():
        return model.eval()(tokens).logits


def loaded(path, hf_config=QWEN3):
    return load_base(path, hf_config, torch.float32, str(path))


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_config_of_another_program_beside_weights_says_nothing(workspace, tmp_path):
    """Trainers of others write a config.yaml too."""
    folder = shutil.copytree(workspace.values["model_id"], tmp_path / "others")
    (folder / "config.yaml").write_text("base_model: x\nadapter: lora\n")
    assert read_weights(folder, QWEN3).is_coconut is False
    for keys in (dict(model_id=str(folder)), dict(load_model_path=str(folder))):
        gather_inputs(load_config(workspace.yaml(**keys)))


# ------------------------------------------------------------------------------- forms of a file

prefixed = lambda prefix: lambda state: {prefix + name: t for name, t in state.items()}


def with_decoder(state: dict) -> dict:
    """As SIM-CoT's class names its parts: a Coconut, and a second model of the same kind."""
    decoder = {f"expainable_llm.{name}": tensor + 1 for name, tensor in state.items()}
    table = {"embedding.weight": state["model.embed_tokens.weight"]}
    return {f"base_causallm.{name}": tensor for name, tensor in state.items()} | decoder | table


FORMS = {
    "a state dict": lambda state: state,
    "DDP": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "torch.compile in DDP": prefixed("module._orig_mod."),
    "the ancestor's, compiled": prefixed("base_causallm._orig_mod."),
    "another wrapper": prefixed("llm."),
    "FSDP": lambda state: {
        "_fsdp_wrapped_module." + n.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."): t
        for n, t in state.items()
    },
    "FSDP in DDP": prefixed("module._fsdp_wrapped_module."),
    "without the tied head": lambda state: {
        name: tensor for name, tensor in state.items() if name != "lm_head.weight"
    },
    "the ancestor's, without the tied head": lambda state: {
        f"base_causallm.{name}": t for name, t in state.items() if name != "lm_head.weight"
    },
    "SIM-CoT's": lambda state: with_decoder(state),
    "SIM-CoT's in DDP": lambda state: prefixed("module.")(with_decoder(state)),
    "SIM-CoT's in FSDP": lambda state: prefixed("_fsdp_wrapped_module.")(with_decoder(state)),
    "blocks compiled one by one": lambda state: {
        name.replace(".layers.0.", ".layers.0._orig_mod."): t for name, t in state.items()
    },
    "the body's own names": lambda state: {n.removeprefix("model."): t for n, t in state.items()},
    "under model": lambda state: {"model": state, "epoch": 3},
    "under state_dict, with an optimizer": lambda state: {
        "optimizer": {"state": {}},
        "state_dict": prefixed("module.")(state),
    },
    "old buffers": lambda state: {
        **state,
        **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)},
    },
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_in_the_form_that_it_has(tmp_path, form, zipped):
    original = tiny_model("qwen3", seed=3)
    path = tmp_path / "checkpoint_3"
    torch.save(FORMS[form](state_of(original)), path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(logits(loaded(path)), logits(original))


def test_a_decoder_without_a_coconut_is_not_left_out(tmp_path):
    """Only SIM-CoT's own file is read so: anything else is not what it seems."""
    state = prefixed("expainable_llm.")(state_of(tiny_model("qwen3")))
    torch.save(state_of(tiny_model("qwen3")) | state, tmp_path / "weights")
    with pytest.raises(UserError, match="unexpected \\(expainable_llm.lm_head.weight"):
        loaded(tmp_path / "weights")


def test_buffers_that_old_versions_saved_with_gpt2(tmp_path):
    original = tiny_model("gpt2")
    state = state_of(original)
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "weights")
    base = loaded(tmp_path / "weights", family_config("gpt2"))
    assert torch.equal(logits(base), logits(original))


# ------------------------------------------------------------------------------- folders


def in_shards(folder: Path, state: dict, suffix: str, count: int = 4) -> list[Path]:
    """Write a state dict as the library once did: shards, and an index of them."""
    folder.mkdir()
    name = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    files = [f"{name}-{i + 1:05}-of-{count:05}.{suffix}" for i in range(count)]
    parts = [dict(list(state.items())[i::count]) for i in range(count)]
    for file, part in zip(files, parts):
        (save_file if suffix == "safetensors" else torch.save)(part, folder / file)
    weight_map = {key: file for file, part in zip(files, parts) for key in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{name}.{suffix}.index.json").write_text(json.dumps(index))
    return [folder / file for file in files]


SHARDED = {
    "plain": lambda state: state,
    "without the tied head": FORMS["without the tied head"],
    "DDP": FORMS["DDP"],
    "the ancestor's": prefixed("base_causallm."),
    "SIM-CoT's": FORMS["SIM-CoT's"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("form", SHARDED)
def test_shards_of_either_kind_are_put_together(tmp_path, form, suffix, dtype):
    """Of a folder that holds nothing else; half precision is read as what it stands for."""
    original = tiny_model("qwen3", seed=3)
    state = {name: tensor.to(dtype) for name, tensor in state_of(original).items()}
    original.load_state_dict(state)
    state = {name: tensor.clone() for name, tensor in SHARDED[form](state).items()}
    in_shards(tmp_path / "shards", state, suffix)
    assert read_weights(tmp_path / "shards", QWEN3).dtype is dtype
    base = loaded(tmp_path / "shards")
    assert base.dtype is torch.float32
    assert torch.equal(logits(base), logits(original))


@pytest.mark.parametrize("key", ["load_model_path", "model_id"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_half_the_shards_are_named_in_one_line(
    workspace, tmp_path, model_folder, suffix, key, capsys
):
    folder = tmp_path / "shards"
    shards = in_shards(folder, state_of(tiny_model("qwen3")), suffix)
    for file in model_folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    shards[0].unlink()
    shards[2].unlink()
    path = workspace.yaml(**{key: str(folder)}, resume=1 if key == "load_model_path" else None)
    assert run.main([str(path), "--check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"2 of its 4 shards are not in the folder: {shards[0].name}, {shards[2].name}" in line
    assert str(folder) in line and not workspace.run_dir.exists()


def test_shards_by_their_index_and_nothing_beside_them(tmp_path):
    """Mistral's folders hold the same weights once more under other names."""
    original = tiny_model("llama")
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    save_file({"layers.0.w": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    base = loaded(tmp_path, family_config("llama"))
    assert torch.equal(logits(base), logits(original))


def test_a_folder_of_bin_files(tmp_path):
    original = tiny_model("qwen3")
    original.config.save_pretrained(tmp_path)
    torch.save(state_of(original), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(loaded(tmp_path)), logits(original))


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "holds no .safetensors or .bin weights"),
        (["checkpoint_1", "checkpoint_12", "checkpoint_2"], "a run folder.*checkpoint_12$"),
        (["consolidated.safetensors"], "it holds consolidated.safetensors: give the file"),
        (["model-00001-of-00002.safetensors"], "the index of its shards is missing"),
    ],
)
def test_a_folder_that_holds_something_else_says_what_to_give(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=words):
        read_weights(tmp_path, QWEN3)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / sorted(index["weight_map"].values())[0]
    with pytest.raises(UserError, match="one file of several"):
        read_weights(shard, family_config("llama"))
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        read_weights(tmp_path, family_config("llama"))


def test_cut_files_are_named(tmp_path, model_folder):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_weights(tmp_path / "nothing", QWEN3)
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a file of weights"):
        read_weights(copy, QWEN3)


# ------------------------------------------------------------------------------- strictness


def drop_one(tensors):
    return {name: t for name, t in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}


def add_one(tensors):
    return {**tensors, "model.layers.2.mlp.up_proj.weight": torch.zeros(2)}


def other_vocabulary(tensors):
    table = torch.zeros(VOCAB + 50, 32)
    return {n: table if "embed" in n or "lm_head" in n else t for n, t in tensors.items()}


def other_width(tensors):
    return {name: torch.zeros(*(2 * size for size in t.shape)) for name, t in tensors.items()}


def from_file(workspace, folder: Path, path: Path):
    """The base model that an evaluation of this file would use."""
    yaml = workspace.yaml(
        model_id=str(folder), load_model_path=str(path), only_eval=True, train_path=None, resume=3
    )
    return build_model(gather_inputs(load_config(yaml))).base_causallm


@pytest.mark.parametrize(
    "form, words",
    [
        (drop_one, ["1 missing (model.layers.1.mlp.up_proj.weight)"]),
        (add_one, ["1 unexpected (model.layers.2.mlp.up_proj.weight)"]),
        (other_vocabulary, [f"({VOCAB + 50}, 32) instead of ({VOCAB}, 32)", "vocabulary"]),
        (other_width, ["another size of this model?"]),
    ],
)
def test_weights_that_do_not_fit_are_named(workspace, tmp_path, model_folder, form, words):
    path = tmp_path / "weights"
    torch.save(form(state_of(tiny_model("qwen3"))), path)
    with pytest.raises(UserError) as raised:
        from_file(workspace, model_folder, path)
    assert all(word in str(raised.value) for word in words) and str(path) in str(raised.value)


def test_weights_of_another_family_are_named(workspace, tmp_path, model_folder):
    path = tmp_path / "weights"
    torch.save(state_of(tiny_model("gpt2")), path)
    with pytest.raises(UserError, match="another family of models"):
        from_file(workspace, model_folder, path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["bomb", "two state dicts", "text", "empty", "cut"])
def test_nothing_but_tensors_is_read(tmp_path, content):
    """Never an unpickled object; a broken file is one clear line."""
    path, trace = tmp_path / "weights", tmp_path / "exploded"
    state = {"weight": torch.zeros(3)}
    if content == "bomb":
        path.write_bytes(pickle.dumps({"weight": Bomb(trace)}))
    elif content == "two state dicts":
        torch.save({"teacher": state, "student": state}, path)
    elif content == "cut":
        torch.save({"weight": torch.zeros(9999)}, path)
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_text("hello" if content == "text" else "")
    with pytest.raises(UserError, match=str(path)) as raised:
        read_weights(path, QWEN3)
    assert len(raised.value.problems) == 1 and "\n" not in str(raised.value)
    assert not trace.exists()


# ------------------------------------------------------------------------------- own checkpoints

SMALL = dict(**SIZES, eos_token_id=0)
RENAMED = {  # families whose files have other names than their modules
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "deepseek_v3": DeepseekV3Config(
        **SMALL,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
}


def hub_folder(model, tokenizer, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_and_reload(workspace, capsys) -> torch.Tensor:
    """Two epochs, the second in a run that resumes; the checkpoint is evaluated, starts another
    training, and opens with from_pretrained. The logits of all that loads it are the same."""
    keys = dict(max_new_tokens=1, eval_subset_size=1, batch_size_training=24)
    for epochs in (1, 2):
        path = str(workspace.yaml(num_epochs=epochs, max_latent_stage=1, **keys))
        assert run.main([path]) == 0, capsys.readouterr().err
    checkpoint = workspace.run_dir / "checkpoint_2"
    path = str(workspace.yaml(num_epochs=2, max_latent_stage=1, name="other", **keys))
    source = f"load_model_path={checkpoint}"
    assert run.main([path, source, "only_eval=True", "name=eval"]) == 0, capsys.readouterr().err
    theirs = logits(AutoModelForCausalLM.from_pretrained(checkpoint))
    for more in ([source], [f"model_id={checkpoint}"]):
        ours = build_model(gather_inputs(load_config(path, *more))).base_causallm
        torch.testing.assert_close(logits(ours), theirs, rtol=0, atol=0)
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize("family", RENAMED)
def test_what_a_run_saves_it_loads(workspace, tokenizer, tmp_path, capsys, family):
    """A run of GPT-NeoX could neither resume nor evaluate its checkpoints: the file holds the
    library's names on disk, the model has others."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(RENAMED[family])
    workspace.values["model_id"] = hub_folder(base, tokenizer, tmp_path / family)
    train_and_reload(workspace, capsys)


def test_a_tied_flag_over_a_head_of_its_own(workspace, tokenizer, tmp_path, capsys):
    """The flag says tied, the file holds a head: training kept both, and the evaluation of its
    checkpoint tied them."""
    base = tiny_model("llama")
    assert not base.config.tie_word_embeddings
    nn.init.normal_(base.lm_head.weight, std=0.3)
    folder = tmp_path / "untied"
    workspace.values["model_id"] = hub_folder(base, tokenizer, folder)
    text = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(text))
    whole = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(
        logits(loaded(folder, AutoModelForCausalLM.from_pretrained(folder).config)), whole
    )
    train_and_reload(workspace, capsys)
    saved = load_file(workspace.run_dir / "checkpoint_2" / "model.safetensors")
    config = json.loads((workspace.run_dir / "checkpoint_2" / "config.json").read_text())
    assert ("lm_head.weight" in saved) == (not config["tie_word_embeddings"])
