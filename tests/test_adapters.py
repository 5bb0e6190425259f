"""engine/adapters.py: LoRA against the definition, its checkpoints, its guards, merged weights."""

import copy
import json
import re
import shutil

import pytest
import torch
from conftest import Workspace, tiny_model
from numerics import assert_as_exact_as, assert_same, exact, roundings
from peft import PeftModel
from safetensors.torch import load_file, save_file
from soak import differences
from test_coconut import (
    BATCHES,
    END_ID,
    LATENT_ID,
    START_ID,
    make_batch,
    make_rows,
    naive_loss,
    wrap,
)
from test_custom_generate import code_of
from test_loop import THREE_STEPS, killed, small_workspace
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import analysis
import run
from analysis import __main__ as commands
from engine import loop
from engine.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapters,
    add_adapters,
    find_adapters,
    merge_adapters,
    new_adapters,
    target_endings,
    trained_names,
)
from engine.model import build_model
from engine.preflight import gather_inputs
from engine.weights import save_base
from loader import load_config
from rules import make_config
from utils import UserError

TOKENS = (START_ID, LATENT_ID, END_ID)
R, ALPHA = 3, 12.0
LORA = dict(lora_r=R, lora_alpha=ALPHA, bf16=True, num_epochs=2, **THREE_STEPS)


def adapted(family: str, dtype=torch.float32, dropout=0.0, targets=None):
    """A tiny model with adapters that compute something."""
    base = tiny_model(family, dtype)
    endings = target_endings(base, targets)
    add_adapters(base, Adapters(R, ALPHA, dropout, endings, TOKENS, "x", None, None), seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return base


# ------------------------------------------------------------------------------- the definition


class LowRank(nn.Module):
    def __init__(self, low, high, transposed: bool):
        super().__init__()
        self.low, self.high, self.transposed = low, high, transposed

    def forward(self, weight):
        change = ALPHA / R * self.high @ self.low
        return weight + (change.T if self.transposed else change)


class OwnRows(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, table):
        return table.index_put((torch.tensor(TOKENS),), self.rows)


def naive_model(family: str, base):
    """The library's model without peft, its weights written as what adapters make of them, and the
    trained parameters by their names in base. Computes in base's type."""
    model = tiny_model(family, base.dtype)
    trained = {n: p.detach().clone() for n, p in base.named_parameters() if p.requires_grad}
    trained = {name: nn.Parameter(value) for name, value in trained.items()}
    for name, low in trained.items():
        layer, marker_rows, _ = name.partition(".marker_rows")
        if marker_rows:
            parametrize.register_parametrization(model.get_submodule(layer), "weight", OwnRows(low))
            if model.config.tie_word_embeddings:
                head = model.get_output_embeddings()
                parametrize.register_parametrization(head, "weight", OwnRows(low))
            continue
        layer, is_low, _ = name.partition(".lora_A.default")
        if is_low:
            high = trained[f"{layer}.lora_B.default.weight"]
            change = LowRank(low, high, transposed=family == "gpt2")
            parametrize.register_parametrization(model.get_submodule(layer), "weight", change)
    return model, trained


def naive_outcome(family: str, base, rows) -> dict:
    model, trained = naive_model(family, base)
    if base.dtype == torch.float64:
        model = exact_in_place(model)
    loss = naive_loss(model, rows)
    loss.backward()
    return {"loss": loss.detach(), "gradients": {name: p.grad for name, p in trained.items()}}


def exact_in_place(model):
    """numerics.exact copies, and the trained parameters are to be these ones."""
    twin = exact(tiny_model_like(model))
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, twin.get_submodule(name))
    return model


def tiny_model_like(model):
    return tiny_model({"gpt2": "gpt2", "llama": "llama"}.get(model.config.model_type, "qwen3"))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_loss_and_every_trained_gradient_are_the_definitions(family, again):
    """Of an optimizer step of two micro-batches with several latents; llama's head is not tied."""
    base, rows = adapted(family), make_rows(BATCHES["uneven latents"])
    wanted = naive_outcome(family, adapted(family).double(), rows)
    naive = [naive_outcome(family, twin, rows) for twin in roundings(base)]
    model = wrap(base).train()
    if again:
        model.checkpoint_activations(0.5)
    num_items, loss = sum((labels != -100).sum().item() for _, labels in rows), 0.0
    for part in (rows[:2], rows[2:]):
        output = model(**make_batch(part, "collator"), num_items_in_batch=num_items)
        output.loss.backward()
        loss += output.loss.detach()
    frozen = {n: p.grad for n, p in base.named_parameters() if not p.requires_grad}
    assert set(frozen.values()) == {None}
    gradients = {n: p.grad for n, p in base.named_parameters() if p.requires_grad}
    assert len(gradients) == 1 + (family == "llama") + 2 * 2 * (4 if family == "gpt2" else 7)
    assert_as_exact_as({"loss": loss, "gradients": gradients}, naive, wanted)


def test_new_adapters_compute_nothing_and_depend_on_the_seed_alone():
    base, whole = tiny_model("qwen3"), tiny_model("qwen3")
    ids = make_rows(["qqqqrrr"])[0][0][None]
    made = []
    for seed in (1, 1, 2):
        base = tiny_model("qwen3")
        torch.rand(seed)
        add_adapters(base, Adapters(R, ALPHA, 0.0, ("q_proj",), TOKENS, "x", None, None), seed)
        assert torch.equal(base(ids).logits, whole(ids).logits)
        made.append(base.model.layers[1].self_attn.q_proj.lora_A["default"].weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].abs().max() > 0 and not made[0].dtype.is_complex


def test_dropout_is_the_same_when_activations_are_computed_again():
    gradients = []
    for again in (False, True):
        base = adapted("qwen3", dropout=0.5)
        model = wrap(base).train()
        if again:
            model.checkpoint_activations()
        torch.manual_seed(3)
        model(**make_batch(make_rows(BATCHES["one latent"]), "collator")).loss.backward()
        gradients.append([p.grad for p in base.parameters() if p.requires_grad])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_merged_weights_are_the_same_model_without_adapters(family):
    base, ids = exact(adapted(family)), make_rows(["qqqLrrr"])[0][0][None]
    wanted = base(ids).logits
    merge_adapters(base)
    assert base.state_dict().keys() == tiny_model(family).state_dict().keys()
    assert all(parameter.requires_grad for parameter in base.parameters())
    table = base.get_input_embeddings().weight
    assert (base.get_output_embeddings().weight is table) == (family != "llama")
    assert_same(base(ids).logits, wanted)


# ------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory) -> Workspace:
    """A training with adapters that nothing happened to."""
    workspace = small_workspace(model_folder, tmp_path_factory.mktemp("adapters"))
    assert run.main([str(workspace.yaml(**LORA, lora_dropout=0.1))]) == 0
    return workspace


@pytest.fixture
def checkpoint(trained):
    return trained.run_dir / "checkpoint_2"


def inputs_of(workspace, **keys):
    return gather_inputs(load_config(workspace.yaml(**keys)))


def evaluation(checkpoint, **keys) -> dict:
    own = dict(name="evaluation", only_eval=True, train_path=None, load_model_path=str(checkpoint))
    return {**own, "bf16": True, **keys}


def test_a_checkpoint_holds_adapters_and_marker_rows_only(trained, checkpoint):
    tensors = load_file(checkpoint / WEIGHTS_FILE)
    kinds = {name.split(".")[-2 if name.endswith("weight") else -1] for name in tensors}
    assert kinds == {"lora_A", "lora_B", "trainable_tokens_delta"}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert not list(checkpoint.glob("model*"))
    saved = json.loads((checkpoint / CONFIG_FILE).read_text())
    assert saved["base_model_name_or_path"] == trained.values["model_id"]
    log = (trained.run_dir / "training.log").read_text()
    numbers = sum(t.numel() for t in tensors.values())
    frozen = sum(p.numel() for p in tiny_model("qwen3").parameters())
    assert f"adapters  rank {R}, alpha {ALPHA:g}" in log
    assert f"{numbers:,} parameters trained, {frozen:,} frozen" in log


def test_killed_and_resumed_training_is_the_same(trained, model_folder, tmp_path, monkeypatch):
    workspace = small_workspace(model_folder, tmp_path)
    keys = dict(LORA, lora_dropout=0.1, save_every_steps=1)
    killed(monkeypatch, workspace, loop, "optimizer_step", 5, **keys)  # the second of epoch 2
    assert [c.name for c in workspace.run_dir.glob("checkpoint_2*")] == ["checkpoint_2_step_1"]
    assert run.main([str(workspace.yaml(**keys))]) == 0
    assert differences(workspace.run_dir, trained.run_dir) == []


def test_evaluation_of_adapters_is_that_of_their_training(trained, checkpoint):
    keys = dict(eval_subset_size=3, batch_size_eval=3, max_new_tokens=4)
    assert run.main([str(trained.yaml(**evaluation(checkpoint, **keys)))]) == 0
    results = [
        [json.loads(line) for line in (folder / "results_epoch_2.jsonl").read_text().splitlines()]
        for folder in (trained.run_dir, trained.folder / "out" / "evaluation")
    ]
    assert results[0] == results[1]


def test_peft_and_the_library_open_a_checkpoint(trained, checkpoint, model_folder):
    ours = analysis.load(checkpoint, device="cpu").model.base_causallm
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    peft_model = PeftModel.from_pretrained(plain, checkpoint)
    opened = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 9, 303, 305, 304, 7]])  # markers included
    wanted = exact(ours)(ids).logits
    for theirs in (peft_model.get_base_model(), opened):
        assert_same(exact(theirs)(ids).logits, wanted)


def test_the_code_of_the_card_answers_as_here(trained, checkpoint, monkeypatch, capsys):
    code = code_of((checkpoint / "README.md").read_text())
    question = re.search(r'prompt = "(.*)\\n"', code)[1]
    (wanted,) = analysis.load(checkpoint, device="cpu", bf16=False).answer([question])
    assert wanted.num_latents == 4
    monkeypatch.chdir(trained.run_dir)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out == wanted.text + "\n"


def test_a_merged_folder_is_opened_and_trained_whole(trained, checkpoint, tmp_path):
    probe = analysis.load(checkpoint, device="cpu")
    base = probe.model.base_causallm
    merge_adapters(base)
    save_base(base, base.state_dict(), tmp_path)
    probe.inputs.tokenizer.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 9, 303, 305, 304, 7]])
    opened = copy.deepcopy(opened)  # mapped files lie at other addresses, by which kernels round
    assert torch.equal(opened(ids).logits, base(ids).logits)
    assert "<|latent|>" in AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    inputs = inputs_of(trained, name="whole", model_id=str(tmp_path), bf16=True)
    assert inputs.adapters is None and inputs.marker_init_id is None
    assert torch.equal(build_model(inputs).base_causallm.lm_head.weight, base.lm_head.weight)


def test_an_export_is_the_merged_model(trained, checkpoint, tmp_path):
    """A whole model, which is evaluated as any other."""
    folder = tmp_path / "whole"
    assert commands.main(["export", str(checkpoint), str(folder)]) == 0
    probe = analysis.load(checkpoint, device="cpu")
    merge_adapters(probe.model.base_causallm)
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(opened[k], v) for k, v in probe.model.base_causallm.state_dict().items())
    assert not list(folder.glob("adapter*"))
    assert load_config(folder / "config.yaml").lora_r is None
    keys = {key: None for key in trained.values if key.startswith("lora_")}
    inputs = inputs_of(trained, **evaluation(folder, resume=2, **keys))
    assert inputs.adapters is None and inputs.start.epochs_done == 2


def test_training_goes_on_from_adapters_of_another_run(trained, checkpoint):
    """Of one without latents too: then the markers are new."""
    inputs = inputs_of(trained, **LORA, name="next", load_model_path=str(checkpoint))
    base = build_model(inputs).base_causallm
    saved = load_file(checkpoint / WEIGHTS_FILE)
    names = trained_names(base)
    assert names.keys() == saved.keys() and not inputs.new_markers
    assert all(torch.equal(base.get_parameter(names[name]), saved[name]) for name in saved)


def test_adapters_without_marker_rows_start_a_coconut_run(trained, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "cot")
    tensors = load_file(folder / WEIGHTS_FILE)
    kept = {n: t for n, t in tensors.items() if "lora" in n}
    save_file(kept, folder / WEIGHTS_FILE)
    edit(folder, trainable_token_indices=None)
    inputs = inputs_of(trained, **LORA, name="next", load_model_path=str(folder))
    base = build_model(inputs).base_causallm
    assert inputs.new_markers
    rows = base.model.embed_tokens.marker_rows
    assert torch.equal(rows, base.model.embed_tokens.base_layer.weight[[inputs.marker_init_id] * 3])


@pytest.fixture(scope="module")
def on_whole(trained, tmp_path_factory):
    """Adapters over a checkpoint of whole weights: the workspace, that checkpoint, theirs."""
    whole = dict(bf16=True, num_epochs=1, skip_validation=True, max_latent_stage=1)
    assert run.main([str(trained.yaml(name="whole", **whole))]) == 0
    base = trained.folder / "out" / "whole" / "checkpoint_1"
    keys = dict(whole, lora_r=2, num_epochs=2, resume=1, load_model_path=str(base))
    assert run.main([str(trained.yaml(name="on-whole", **keys))]) == 0
    return trained, base, trained.folder / "out" / "on-whole" / "checkpoint_2"


def test_adapters_over_a_whole_checkpoint_find_it_again(on_whole, tmp_path):
    workspace, base, adapters = on_whole
    assert json.loads((adapters / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(base)
    inputs = inputs_of(workspace, **evaluation(adapters, max_latent_stage=1))
    assert inputs.whole_source == base and not inputs.new_markers
    model = build_model(inputs).base_causallm
    frozen, saved = model.model.norm.weight, load_file(base / "model.safetensors")
    assert torch.equal(frozen, saved["model.norm.weight"])
    table = saved["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.base_layer.weight, table)
    moved = shutil.copytree(adapters, tmp_path / "moved")
    edit(moved, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="are for the weights in .*gone, which are not there"):
        inputs_of(workspace, **evaluation(moved, max_latent_stage=1, resume=1))


# ------------------------------------------------------------------------------- bad input


def edit(folder, **values) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_KEYS = {
    "alpha": (dict(lora_alpha=16), "lora_alpha: is for adapters, and lora_r is null"),
    "targets alone": (dict(lora_targets=["q_proj"]), "lora_targets: is for adapters"),
    "no list": (dict(lora_r=4, lora_targets=[]), "lora_targets: .. is not a list of names"),
    "a word": (dict(lora_r=4, lora_targets="q_proj"), "lora_targets: 'q_proj' is not list or null"),
    "rank": (dict(lora_r=0), "lora_r: 0 is below 1"),
    "scratch": (dict(lora_r=4, from_scratch=True), "lora_r: adapters need trained weights"),
    "decoder": (dict(lora_r=4, step_loss="decoder"), "step_loss: decoder trains a copy"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_are_one_line(workspace, name):
    keys, message = BAD_KEYS[name]
    with pytest.raises(UserError, match=message) as caught:
        load_config(workspace.yaml(**keys))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("targets", [None, ["up_proj", "down_proj"], ["q_b_proj", "o_proj"]])
def test_experts_in_one_piece_have_no_adapters(workspace, targets):
    """peft took names of the dense layers for theirs; the checkpoints could not be read back."""
    sizes = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=8, vocab_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=1)
    ranks = dict(q_lora_rank=4, kv_lora_rank=4, moe_intermediate_size=4, topk_group=1)
    hf_config = AutoConfig.for_model(
        "deepseek_v3", **sizes, **heads, **ranks, first_k_dense_replace=1
    )
    config = load_config(workspace.yaml(lora_r=2, lora_targets=targets))
    if targets == ["q_b_proj", "o_proj"]:
        assert find_adapters(config, None, hf_config, TOKENS).targets == ("o_proj", "q_b_proj")
        return
    with pytest.raises(UserError, match="lora_targets: "):
        find_adapters(config, None, hf_config, TOKENS)


def test_a_router_that_is_a_linear_layer_has_no_adapters(workspace):
    """phimoe's returns a choice of experts: peft's wrapper of it failed in the first pass."""
    sizes = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=8, vocab_size=384)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **sizes, **heads))
    adapters = new_adapters(load_config(workspace.yaml(lora_r=2)), model, TOKENS)
    assert adapters.targets == ("k_proj", "o_proj", "q_proj", "v_proj")
    add_adapters(model, adapters, seed=0)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 384)


def test_all_is_a_word_for_all_layers(workspace):
    given = [load_config(workspace.yaml(lora_r=4, lora_targets=t)) for t in ("all", None)]
    assert given[0] == given[1]
    values = dict(workspace.values, lora_dropout=0.1, lora_alpha=1)
    with pytest.raises(UserError) as caught:
        make_config(values, "x.yaml")
    assert len(caught.value.problems) == 2


BAD_STARTS = {
    "no such layer": (
        dict(lora_r=4, lora_targets=["q_proj", "lm_head", "mlp"]),
        "name that ends with lm_head, mlp; they end with down_proj, gate_proj",
    ),
    "whole training": (dict(lora_r=None, lora_alpha=None), "holds adapters; set lora_r=3"),
    "other rank": (dict(lora_r=4), "lora_r: 4, but the adapters in .* have 3"),
    "other layers": (dict(lora_targets=["q_proj"]), "lora_targets: q_proj, but the adapters in"),
    "cot": (dict(coconut=None, cot=True), "a coconut model cannot start a cot run"),
    "other base": (dict(model_id="OTHER"), "holds adapters of .*model.*, but model_id is .*other"),
}


@pytest.mark.parametrize("name", BAD_STARTS)
def test_adapters_that_do_not_fit_are_one_line(trained, checkpoint, model_folder, tmp_path, name):
    keys, message = BAD_STARTS[name]
    if "model_id" in keys:
        keys = {"model_id": str(shutil.copytree(model_folder, tmp_path / "other"))}
    start = {} if name == "no such layer" else {"load_model_path": str(checkpoint)}
    with pytest.raises(UserError, match=message) as caught:
        inputs_of(trained, **{**LORA, "name": "next", **start, **keys})
    assert len(caught.value.problems) == 1


DAMAGES = {
    "no JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), "no config of LoRA adapters"),
    "no rank": (lambda f: (f / CONFIG_FILE).write_text("{}"), r"no config of .*KeyError\('r'\)"),
    "another kind": (lambda f: edit(f, use_dora=True), "plain LoRA adapters .*use_dora True"),
    "other rows": (
        lambda f: edit(f, trainable_token_indices={"model.embed_tokens": [1, 2, 3]}),
        r"trains the rows \(1, 2, 3\) of the vocabulary",
    ),
    "rows of the embeddings alone": (
        lambda f: edit(f, trainable_token_indices=[1, 2, 3]),
        r"trains the rows \(1, 2, 3\) of the vocabulary",
    ),
    "another size": (lambda f: edit(f, r=5), r"adapters of another model than qwen3 of this size"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "not a file of adapters"),
    "torn": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"torn"), "not a file of adapters"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_adapters_are_one_line(trained, checkpoint, tmp_path, name):
    damage, message = DAMAGES[name]
    folder = shutil.copytree(checkpoint, tmp_path / "adapters")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        inputs_of(trained, **evaluation(folder, resume=2))
    assert len(caught.value.problems) == 1


def test_adapters_are_no_model(trained, checkpoint):
    with pytest.raises(UserError, match="model_id: .* holds adapters over another"):
        inputs_of(trained, name="next", model_id=str(checkpoint))


def test_a_run_keeps_its_adapters(trained):
    with pytest.raises(UserError, match="lora_r: 4, but .*checkpoint_2 was trained with 3"):
        inputs_of(trained, **{**LORA, "lora_dropout": 0.1, "lora_r": 4})
