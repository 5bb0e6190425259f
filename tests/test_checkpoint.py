"""Save, find, load: our folders, stray files, the lock, pruning, the ancestor's formats."""

import contextlib
import copy
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from coconut import Coconut, add_latent_tokens, init_latent_rows
from engine.checkpoint import (
    TrainState,
    find_checkpoints,
    load_optimizer,
    lock_run_dir,
    prune_checkpoints,
    save_checkpoint,
)
from engine.model import build_model
from engine.optimizer import build_optimizer
from engine.preflight import gather_inputs
from loader import load_config
from utils import UserError

FAMILIES = ("qwen3", "llama", "gpt2")
STATE = TrainState(data="rows", rows_per_step=4, global_step=5)


def full(model) -> torch.Tensor:
    """Logits over a fixed input that holds the highest token ids too. Those of a copy: weights in a
    mapped file lie at other addresses, and CPU kernels round by alignment."""
    model = copy.deepcopy(model)
    rows = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, rows, (2, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 3:6] = torch.arange(rows - 3, rows)
    with torch.no_grad():
        return model.eval()(tokens).logits


def same_logits(one, other) -> bool:
    return torch.equal(full(one), full(other))


def marked_model(family: str, tokenizer, vocab_size: int = VOCAB, dtype=torch.float32):
    """A model that knows the markers, with rows of its own for them, and the ids."""
    base = tiny_model(family, dtype, vocab_size=vocab_size)
    ids = add_latent_tokens(tokenizer)
    init_latent_rows(base, ids, tokenizer.convert_tokens_to_ids("<<"))
    with torch.no_grad():  # as if trained
        base.get_input_embeddings().weight[list(ids)] += torch.randn(3, 32, dtype=dtype)
    return base, ids


@pytest.fixture
def config(workspace):
    return load_config(workspace.yaml(weight_decay=0.1))


def saved(path: Path, base, ids, tokenizer, config, train_steps: int = 0):
    """Save a Coconut over the base model; the Coconut and its optimizer."""
    model = Coconut(base, ids[1], ids[0], ids[2], tokenizer.eos_token_id)
    optimizer = build_optimizer(config, model)
    for step in range(train_steps):
        train_step(model, optimizer, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model, tokenizer, optimizer, config, STATE)
    return model, optimizer


def train_step(model, optimizer, seed: int) -> None:
    tokens = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(8).expand(2, 8)
    model(tokens, torch.ones_like(tokens), positions, tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------- save, load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_opens_with_transformers(tmp_path, tokenizer, config, family, dtype):
    base, ids = marked_model(family, tokenizer, len(tokenizer), dtype)  # the vocabulary grows
    path = tmp_path / "run" / "checkpoint_4"
    saved(path, base, ids, tokenizer, config)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.dtype == dtype and loaded.config.vocab_size == len(tokenizer)
    assert same_logits(loaded, base)
    theirs = AutoTokenizer.from_pretrained(path)
    assert theirs.convert_tokens_to_ids(
        ["<|start-latent|>", "<|latent|>", "<|end-latent|>"]
    ) == list(ids)
    assert theirs.decode([ids[0], *theirs.encode("two"), ids[1]], skip_special_tokens=True) == "two"


def test_state_is_the_one_after_the_evaluation_where_there_is_one(tmp_path, tokenizer, config):
    base, ids = marked_model("qwen3", tokenizer)
    path = tmp_path / "checkpoint_1_step_7"
    saved(path, base, ids, tokenizer, config)
    (actual,) = find_checkpoints(tmp_path)
    assert (actual.path, actual.epoch, actual.step, actual.epochs_done) == (path, 1, 7, 0)
    assert actual.state() == STATE and actual.config() == config
    evaluated = replace(STATE, evaluated=True)
    (path / "evaluation.json").write_text(evaluated.to_json())
    assert actual.state() == evaluated


@pytest.mark.parametrize("keys", [{}, {"bf16": True}, {"bf16": True, "optimizer": "adamw"}])
def test_the_optimizer_goes_on_as_if_never_stopped(tmp_path, tokenizer, workspace, keys):
    """Three steps, saved and loaded into fresh objects, then two more: bit-identical."""
    config = load_config(workspace.yaml(weight_decay=0.1, lr=1e-3, **keys))
    base, ids = marked_model("qwen3", tokenizer, dtype=config.dtype)
    path = tmp_path / "checkpoint_1"
    model, optimizer = saved(path, base, ids, tokenizer, config, train_steps=3)
    loaded = copy.deepcopy(AutoModelForCausalLM.from_pretrained(path))  # not in a mapped file
    other = Coconut(loaded, ids[1], ids[0], ids[2], tokenizer.eos_token_id)
    fresh = build_optimizer(config, other)
    load_optimizer(find_checkpoints(tmp_path)[0], other, fresh)
    for step in (3, 4):
        train_step(model, optimizer, step)
        train_step(other, fresh, step)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_parameters_that_had_no_gradient_go_on_without_a_state(tmp_path, tokenizer, config):
    """As the towers of phi4_multimodal, which no text reaches."""

    def with_tower(base):
        base.tower = torch.nn.Linear(2, 2)
        return base

    base, ids = marked_model("qwen3", tokenizer, dtype=config.dtype)
    path = tmp_path / "checkpoint_1"
    saved(path, with_tower(base), ids, tokenizer, config, train_steps=3)
    other = Coconut(with_tower(base), ids[1], ids[0], ids[2], tokenizer.eos_token_id)
    fresh = build_optimizer(config, other)
    load_optimizer(find_checkpoints(tmp_path)[0], other, fresh)
    without = {name for name, p in base.named_parameters() if p not in fresh.state}
    assert without == {"tower.weight", "tower.bias"}


def test_saving_twice_replaces_a_dead_write(tmp_path, tokenizer, config):
    """The leftovers of a write that died do not end up in the checkpoint."""
    base, ids = marked_model("qwen3", tokenizer)
    leftover = tmp_path / "checkpoint_1.writing-tmp"
    leftover.mkdir()
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"half")
    saved(tmp_path / "checkpoint_1", base, ids, tokenizer, config)
    assert sorted(p.name for p in tmp_path.glob("*check*")) == ["checkpoint_1"]
    assert len(list((tmp_path / "checkpoint_1").glob("*.safetensors"))) == 1


# ------------------------------------------------------------------------------- find, prune


def fake(run_dir: Path, name: str, optimizer: bool = True) -> Path:
    path = run_dir / name
    (path / "training_state").mkdir(parents=True) if optimizer else path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    return path


def found_names(run_dir: Path) -> list[str]:
    return [c.path.name for c in find_checkpoints(run_dir)]


def test_stray_files_and_folders_are_no_checkpoints(tmp_path):
    for name in ("checkpoint_2", "checkpoint_10", "checkpoint_10_step_9", "checkpoint_10_step_20"):
        fake(tmp_path, name)
    for name in (
        "checkpoint_3.writing-tmp",
        "checkpoint_11.writing-deleted",
        "checkpoint_x",
        "checkpoint_12 (copy)",
        "my_checkpoint_13",
        "checkpoint_14_step_",
        "checkpoint_",
        "checkpoint_-1",
        "checkpoint_1.5",
        "checkpoint_15_step_2_old",
        "checkpoint_٣",
    ):
        fake(tmp_path, name)
    (tmp_path / "checkpoint_16").mkdir()
    (tmp_path / "checkpoint_17").write_text("the ancestor's single file")
    (tmp_path / "checkpoint_18" / "state.json").mkdir(parents=True)
    (tmp_path / "checkpoint_19").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("checkpoint_20")
    assert found_names(tmp_path) == [
        "checkpoint_2",
        "checkpoint_10_step_9",
        "checkpoint_10_step_20",
        "checkpoint_10",
    ]
    assert find_checkpoints(tmp_path / "no such run") == []


@pytest.mark.parametrize(
    "names, keep, left",
    [
        ([1, 2, 3], None, ["checkpoint_1", "checkpoint_2", "checkpoint_3"]),
        ([1, 2, 3], {1}, ["checkpoint_1", "checkpoint_3"]),
        ([1, 2, 3], set(), ["checkpoint_3"]),
        ([1, 2, 3], {None}, ["checkpoint_3"]),
        ([1, "2_step_5"], {None}, ["checkpoint_2_step_5"]),
        ([1, "2_step_5", "2_step_9"], None, ["checkpoint_1", "checkpoint_2_step_9"]),
        ([1, "2_step_5", 2], {2}, ["checkpoint_2"]),
        (["1_step_5"], None, ["checkpoint_1_step_5"]),
    ],
)
def test_pruning_keeps_the_named_and_the_newest(tmp_path, names, keep, left):
    """Optimizer state stays in the newest only; places within an epoch go when overtaken."""
    for name in names:
        fake(tmp_path, f"checkpoint_{name}")
    (tmp_path / "checkpoint_x").mkdir()
    prune_checkpoints(tmp_path, keep)
    assert found_names(tmp_path) == left
    assert [p.parent.name for p in tmp_path.glob("*/training_state")] == [left[-1]]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*left, "checkpoint_x"])


def test_a_deletion_that_is_cut_short_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    for number in (1, 2):
        (fake(tmp_path, f"checkpoint_{number}") / "model.safetensors").touch()

    def cut_short(path, **_):
        (Path(path) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, set())
    assert found_names(tmp_path) == ["checkpoint_2"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, tokenizer, config, order):
    """All of its files, and then the name: else a power failure can leave a name without them."""
    base, ids = marked_model("qwen3", tokenizer)
    folder = tmp_path / "checkpoint_1"
    saved(folder, base, ids, tokenizer, config)
    written = [path.name for path in folder.rglob("*")]
    named = order.index(("rename", folder.name))
    before = {name for what, name in order[:named] if what == "sync"}
    assert {folder.name + ".writing-tmp", *written} <= before
    assert order[named + 1 :] == [("sync", tmp_path.name)]


# ------------------------------------------------------------------------------- lock


def test_leftovers_of_dead_writes_are_cleaned(tmp_path):
    kept = [fake(tmp_path, "checkpoint_1"), tmp_path / "notes.writing.txt"]
    kept[1].write_text("mine")
    for name in ("checkpoint_2.writing-tmp", "checkpoint_1.writing-deleted"):
        fake(tmp_path, name)
    (tmp_path / "results_epoch_1.jsonl.writing-file").write_text("half")
    lock_run_dir(tmp_path).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [".lock", *(path.name for path in kept)]
    )


def hold(run_dir: Path, ready, with_child: bool) -> None:
    """Hold the lock until killed; with_child: as a training does whose data workers live on."""
    lock = lock_run_dir(run_dir)
    child = os.fork() if with_child else -1
    if child != 0:
        ready.send(child)
    signal.pause()
    lock.close()


@contextlib.contextmanager
def holder(run_dir: Path, with_child: bool = False):
    """A process that holds the lock."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(run_dir, theirs, with_child))
    process.start()
    child = ours.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        if with_child:
            os.kill(child, signal.SIGKILL)


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    (tmp_path / "checkpoint_1.writing-tmp").mkdir()
    with holder(tmp_path) as first:
        (tmp_path / "checkpoint_2.writing-tmp").mkdir()  # the first one is saving
        with pytest.raises(UserError, match=f"process {first.pid} is writing to this run folder"):
            lock_run_dir(tmp_path)
        assert (tmp_path / "checkpoint_2.writing-tmp").exists()
        first.kill()
        first.join()
        lock = lock_run_dir(tmp_path)
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not list(tmp_path.glob("*.writing-*"))
    lock.close()


def test_the_lock_goes_with_a_killed_process_though_its_data_workers_live_on(tmp_path):
    """A DataLoader's workers are forks: they inherit the lock's file, and look for their dead
    parent only every five seconds. Until then a restart was refused."""
    with holder(tmp_path, with_child=True) as first:
        first.kill()
        first.join()
        lock_run_dir(tmp_path).close()


# ------------------------------------------------------------------------------- ancestor's files


def model_folder_of(family: str, folder: Path, tokenizer_folder: Path, spare_rows: bool) -> Path:
    """A Hub-like folder: with spare rows as Qwen's, or one row for every token as GPT-2's."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    rows = VOCAB if spare_rows else len(tokenizer)
    tiny_model(family, seed=9, vocab_size=rows).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def identity(tensors):
    return tensors


def prefixed(tensors):
    return {f"base_causallm.{name}": tensor for name, tensor in tensors.items()}


def with_embedding(tensors):
    table = next(t for n, t in tensors.items() if "embed_tokens" in n or "wte" in n)
    return {**tensors, "embedding.weight": table}


def data_parallel(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def fully_sharded(tensors):
    inner = {
        n.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."): t for n, t in tensors.items()
    }
    return {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in inner.items()}


def sim_cot(tensors):
    """With SIM-CoT's decoder, which knows no markers."""
    tables = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
    decoder = {n: t[:-3] if n.endswith(tables) else t for n, t in tensors.items()}
    return {
        **tensors,
        **{n.replace("base_causallm", "expainable_llm"): decoder[n] for n in decoder},
    }


COCONUT_FORMS = {
    "prefix": (prefixed,),
    "prefix and embedding": (prefixed, with_embedding),
    "module": (prefixed, with_embedding, data_parallel),
    "fsdp": (prefixed, fully_sharded),
    "fsdp in module": (prefixed, with_embedding, fully_sharded, data_parallel),
    "bare, but with the markers' rows": (),
    "SIM-CoT": (prefixed, sim_cot, with_embedding),
}


def written(path: Path, model, forms) -> Path:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for form in forms:
        tensors = form(tensors)
    torch.save(tensors, path)
    return path


def loaded_base(workspace, folder: Path, path: Path, **keys):
    """The base model that an evaluation of this checkpoint would use, and its inputs."""
    yaml = workspace.yaml(model_id=str(folder), load_model_path=str(path), **keys)
    config = load_config(yaml)
    inputs = gather_inputs(config)
    return build_model(inputs).base_causallm, inputs


@pytest.mark.parametrize("form", COCONUT_FORMS)
@pytest.mark.parametrize("spare_rows", [True, False], ids=["shrunk", "grown"])
@pytest.mark.parametrize("family", FAMILIES)
def test_coconut_files_of_the_ancestor(
    workspace, tmp_path, tokenizer_folder, tokenizer, family, spare_rows, form
):
    """It resized to len(tokenizer) + 3 whatever the model had, with the markers in the order
    start, end, latent; their trained rows must not be made anew."""
    folder = model_folder_of(family, tmp_path / "hub", tokenizer_folder, spare_rows)
    count = len(tokenizer)
    original = tiny_model(family, seed=4, vocab_size=count + 3)
    path = written(tmp_path / "checkpoint_3", original, COCONUT_FORMS[form])
    base, inputs = loaded_base(workspace, folder, path)
    assert (inputs.latent_tokens.start, inputs.latent_tokens.end, inputs.latent_tokens.latent) == (
        count,
        count + 1,
        count + 2,
    )
    assert base.get_input_embeddings().num_embeddings == count + 3
    assert same_logits(base, original)


@pytest.mark.parametrize("only_eval", [True, False], ids=["evaluated", "started from"])
def test_that_a_decoder_is_left_out_is_said_once(
    workspace, tmp_path, tokenizer_folder, tokenizer, caplog, only_eval
):
    folder = model_folder_of("gpt2", tmp_path / "hub", tokenizer_folder, spare_rows=False)
    original = tiny_model("gpt2", seed=4, vocab_size=len(tokenizer) + 3)
    path = written(tmp_path / "checkpoint_28", original, (prefixed, sim_cot, with_embedding))
    keys = dict(only_eval=only_eval, resume=2)
    base, inputs = loaded_base(workspace, folder, path, **keys)
    assert inputs.marker_init_id is None and same_logits(base, original)
    (record,) = caplog.records
    count = len(original.state_dict())
    words = f"{path}: {count} tensors of an auxiliary decoder (expainable_llm.*) are left out"
    assert record.getMessage().startswith(words)


@pytest.mark.parametrize("forms", [(), (data_parallel,), (fully_sharded,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_file_starts_a_coconut_run(
    workspace, tmp_path, tokenizer_folder, tokenizer, family, forms
):
    """The ancestor's recipe: a CoT-tuned model has no markers; they are made from `<<`. All other
    rows stay."""
    folder = model_folder_of(family, tmp_path / "hub", tokenizer_folder, spare_rows=True)
    original = tiny_model(family, seed=4)
    path = written(tmp_path / "checkpoint_3", original, forms)
    base, inputs = loaded_base(workspace, folder, path)
    assert inputs.marker_init_id is not None
    source = tokenizer.convert_tokens_to_ids("<<")
    for mine, theirs in (
        (base.get_input_embeddings(), original.get_input_embeddings()),
        (base.get_output_embeddings(), original.get_output_embeddings()),
    ):
        expected = theirs.weight.detach().clone()
        expected[list(inputs.latent_tokens)] = expected[source].clone()
        assert torch.equal(mine.weight, expected)
    others = dict(original.named_parameters())
    assert all(torch.equal(p, others[n]) for n, p in base.named_parameters() if "mlp" in n)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_file_in_a_cot_run_gives_the_same_logits(
    workspace, tmp_path, tokenizer_folder, family
):
    folder = model_folder_of(family, tmp_path / "hub", tokenizer_folder, spare_rows=True)
    original = tiny_model(family, seed=4)
    path = written(tmp_path / "checkpoint_3", original, ())
    base, inputs = loaded_base(workspace, folder, path, coconut=None, cot=True)
    assert inputs.latent_tokens is None and same_logits(base, original)


def test_a_coconut_checkpoint_into_a_cot_run_is_an_error(
    workspace, tmp_path, model_folder, tokenizer, config
):
    base, ids = marked_model("qwen3", tokenizer)
    saved(tmp_path / "checkpoint_1", base, ids, tokenizer, config)
    file = written(tmp_path / "single", base, (prefixed,))
    for path in (tmp_path / "checkpoint_1", file):
        with pytest.raises(UserError, match="a coconut checkpoint cannot start a cot run"):
            loaded_base(workspace, model_folder, path, coconut=None, cot=True)


@pytest.mark.parametrize("name", ["checkpoint_6", "my_final_model"])
def test_our_own_folder_keeps_its_markers_under_any_name(
    workspace, tmp_path, model_folder, tokenizer, config, name
):
    """A checkpoint that was copied to another name was taken for a bare model: its trained
    marker rows were overwritten with `<<`."""
    base, ids = marked_model("qwen3", tokenizer)
    saved(tmp_path / "checkpoint_6", base, ids, tokenizer, config)
    path = (tmp_path / "checkpoint_6").rename(tmp_path / name)
    loaded, inputs = loaded_base(workspace, model_folder, path)
    assert inputs.marker_init_id is None and same_logits(loaded, base)


def test_our_own_folder_as_model_id_keeps_its_markers(workspace, tmp_path, tokenizer, config):
    base, ids = marked_model("qwen3", tokenizer)
    saved(tmp_path / "checkpoint_6", base, ids, tokenizer, config)
    loaded, inputs = loaded_base(workspace, tmp_path / "checkpoint_6", None)
    assert same_logits(loaded, base) and inputs.latent_tokens == tuple(ids)


def test_a_link_to_a_checkpoint_is_that_checkpoint(
    workspace, tmp_path, model_folder, tokenizer, config
):
    base, ids = marked_model("qwen3", tokenizer)
    saved(tmp_path / "checkpoint_6", base, ids, tokenizer, config)
    (tmp_path / "latest").symlink_to("checkpoint_6")
    loaded, _ = loaded_base(workspace, model_folder, tmp_path / "latest")
    assert same_logits(loaded, base)
