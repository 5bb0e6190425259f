"""step_loss.py against its definition: one row, one thought, one token after the other."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, free_port, naive_segments, tiny_model, tiny_rows
from numerics import assert_same, exact, plain
from safetensors.torch import load_file
from soak import differences, history, newest_weights
from test_coconut import END_ID, LATENT_ID, START_ID, NoHostSync, naive_forward, naive_loss
from test_loop import THREE_STEPS, gpt2_folder, killed, log_text, train, workspace  # noqa: F401
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import run
from coconut import Coconut, add_latent_tokens
from curriculum import Curriculum
from dataset import Encoded, LatentTokens, StageDataset
from engine import loop
from engine.batches import MicroBatches
from engine.checkpoint import (
    Checkpoint,
    TrainState,
    find_checkpoints,
    load_optimizer,
    run_bytes,
    save_checkpoint,
)
from engine.distributed import (
    World,
    close_processes,
    end_of_backward,
    full_tensor,
    shard,
    sum_over_ranks,
)
from engine.encoding import encode_rows
from engine.loop import Step, forward_backward
from engine.preflight import gather_inputs
from loader import load_config
from rules import make_config
from step_loss import DECODER, StepLoss, add_step_loss
from utils import UserError

sys.path.append(str(ROOT / "benchmarks"))
from collectives import count_collectives, open_pair

ALONE = World(0, 1, torch.device("cpu"))
KINDS = pytest.mark.parametrize("kind", ["head", "decoder"])
ROWS = tiny_rows(12, seed=3)  # with 0 to 4 steps
# what a stage makes of the thoughts: curriculum, stage
STAGES = {
    "two thoughts": (Curriculum(), 2),
    "as many latents as the chain has": (Curriculum(pad_latent_to_max=False), 3),
    "no step is left": (Curriculum(schedule="paper", max_latent_stage=2), 3),
    "no latents": (Curriculum(), 0),
    "half a thought": (Curriculum(latent_growth="one", c_thought=3), 4),
    "latents before their steps": (Curriculum(latent_growth="all"), 1),
    "one latent": (Curriculum(c_thought=1), 3),
    "more latents than tokens": (Curriculum(c_thought=16, max_latent_stage=1), 1),
}


# ------------------------------------------------------------------------------- the definition


def naive_thoughts(row: dict, tokenizer, curriculum: Curriculum, stage: int) -> list:
    """(number, its latents' numbers, the tokens that it stands for) of those with a label."""
    _, *steps, answer = naive_segments(row, tokenizer)
    latents, skipped = curriculum.plan(stage, len(steps))
    numbers, c, thoughts = list(range(latents)), curriculum.c_thought, []
    while numbers:
        thoughts.append(numbers[:c])
        numbers = numbers[c:]
    labelled = []
    for k, own in enumerate(thoughts):
        if k >= len(steps):
            labelled.append((k, own, answer))
        elif k < skipped:
            stop = skipped if k + 1 == len(thoughts) else k + 1
            labelled.append((k, own, sum(steps[k:stop], [])))
    return labelled


def naive_step_loss(base, decoder, data: StageDataset, rows, kind, case, tokenizer):
    """Of the rows of one optimizer step, in the model's type."""
    curriculum, stage = case
    losses, labels, by_thought = [], 0, {}
    for row in rows:
        latents = naive_forward(base, torch.from_numpy(data[row].input_ids))[1]
        for k, own, tokens in naive_thoughts(data.encoded.rows[row], tokenizer, curriculum, stage):
            if kind == "head":
                for j, token in zip(own, tokens):
                    losses.append(-base.lm_head(latents[j]).log_softmax(-1)[token])
                    labels += 1
                continue
            eos = tokenizer.eos_token_id
            said = torch.tensor(tokens if tokens[-1] == eos else [*tokens, eos])
            embeds = base.get_input_embeddings()(said[:-1])
            inputs = torch.cat([torch.stack([latents[j] for j in own]), embeds])[None]
            hidden = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
            logits = base.lm_head(hidden[len(own) - 1 :])
            by_thought.setdefault(k, []).append(F.cross_entropy(logits, said, reduction="sum"))
    if kind == "head":
        return sum(losses) / max(labels, 1)
    return sum(sum(of_k) / len(of_k) for of_k in by_thought.values()) / max(len(by_thought), 1)


# ------------------------------------------------------------------------------- parts


@pytest.fixture
def tokens() -> LatentTokens:
    """The ids that naive_forward knows."""
    return LatentTokens(START_ID, LATENT_ID, END_ID)


@pytest.fixture
def encoded(tokenizer, tokens, tmp_path) -> Encoded:
    return encode_rows(ROWS, tokenizer, list(tokens), tmp_path, "rows.json")


def make_model(family: str, kind: str, tokens, weight: float | None = None):
    """In float64. The decoder is moved away from the model that it is a copy of."""
    model = Coconut(exact(tiny_model(family)), tokens.latent)
    step_loss = add_step_loss(SimpleNamespace(step_loss=kind, step_loss_weight=weight), model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(DECODER):
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model.train(), step_loss


def micro_batches(data, rows, kind, num_ranks=1, rank=0, batch_size=16, pad_id=1):
    batches = MicroBatches(
        data,
        [np.asarray(rows)],
        num_ranks=num_ranks,
        rank=rank,
        batch_size=batch_size,
        pad_id=pad_id,
        step_loss=kind,
    )
    return batches[0]


def run_step(model, step_loss: StepLoss, batches, world: World = ALONE) -> dict:
    """As engine/loop.py does it: the losses and all gradients of this rank's micro-batches."""
    model.zero_grad()
    step = Step(np.zeros(0))
    for batch in batches:
        forward_backward(model, batch, world, torch.float64, step, step_loss)
    end_of_backward(model)
    losses = sum_over_ranks([float(step.loss), float(step.step_loss)], world.device)
    return {"loss": torch.tensor(losses, dtype=torch.float64), "gradients": gradients(model)}


def gradients(model) -> dict:
    named = model.named_parameters()
    return {name: full_tensor(p.grad).clone() for name, p in named if p.grad is not None}


# ------------------------------------------------------------------------------- the definition


@KINDS
@pytest.mark.parametrize(
    "family, stage",
    [("llama", name) for name in STAGES] + [("gpt2", "two thoughts"), ("qwen3", "no step is left")],
)
def test_loss_and_gradients_are_the_definitions(encoded, tokenizer, tokens, kind, family, stage):
    """Of the whole loss, with the tokens that are written; rows with 0 to 4 steps."""
    case, rows = STAGES[stage], range(7)
    data = StageDataset(encoded, case[0], tokens, case[1])
    model, step_loss = make_model(family, kind, tokens, weight=0.3)
    base = plain(model.base_causallm)
    decoder, own = None, {}
    if kind == "decoder":
        decoder = plain(step_loss.decoder)
        table = decoder.get_input_embeddings().weight  # the model's
        own = {f"{DECODER}.{n}": p for n, p in decoder.named_parameters() if p is not table}
    actual = run_step(model, step_loss, micro_batches(data, rows, kind))

    samples = [data[row] for row in rows]
    pairs = [(torch.from_numpy(s.input_ids), torch.from_numpy(s.labels)) for s in samples]
    of_thoughts = naive_step_loss(base, decoder, data, rows, kind, case, tokenizer)
    written = naive_loss(base, pairs)
    (written + 0.3 * of_thoughts).backward()
    wanted = torch.stack([written, torch.as_tensor(of_thoughts, dtype=torch.float64)])
    assert_same(actual["loss"], wanted, "loss")
    assert (actual["loss"][1] == 0) == (stage == "no latents")
    if stage == "no latents":  # the decoder has run, or ranks would wait for each other
        naive = {name: torch.zeros_like(p) for name, p in own.items()}
    else:
        naive = {name: p.grad for name, p in own.items()}
    naive |= {f"base_causallm.{n}": p.grad for n, p in base.named_parameters()}
    assert_same(actual["gradients"], naive, "gradients")


@KINDS
def test_a_loss_in_chunks_is_the_same(encoded, tokens, kind, monkeypatch):
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    model, step_loss = make_model("llama", kind, tokens)
    batches = micro_batches(data, range(12), kind)
    whole = run_step(model, step_loss, batches)
    monkeypatch.setattr("layers.LOSS_CHUNK", 5)
    chunks = run_step(model, step_loss, batches)
    assert whole["loss"][1] > 1
    for name in whole:
        assert_same(chunks[name], whole[name], name)


@KINDS
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_activations_computed_again_change_nothing(encoded, tokens, kind, share):
    """The decoder's blocks too, as many of them as of the model's."""
    data, rows = StageDataset(encoded, Curriculum(), tokens, 2), range(12)
    outcomes, runs = [], []
    for again in (False, True):
        model = Coconut(exact(tiny_model("llama")), tokens.latent)
        if again:
            model.checkpoint_activations(share)
        config = SimpleNamespace(step_loss=kind, step_loss_weight=None)
        step_loss = add_step_loss(config, model.train())
        if again and kind == "decoder":
            for layer in step_loss.decoder.layers:
                layer.mlp.register_forward_pre_hook(lambda *_, layer=layer: runs.append(layer))
            first, second = step_loss.decoder.layers
        outcomes.append(run_step(model, step_loss, micro_batches(data, rows, kind)))
    for name in outcomes[0]:
        assert_same(outcomes[1][name], outcomes[0][name], name)
    if kind == "decoder":
        assert (runs.count(first), runs.count(second)) == (2, 2 if share == 1 else 1)


@KINDS
@pytest.mark.parametrize("split", [(1, 5), (1, 1), (2, 4), (3, 1), (5, 8)])
def test_how_a_step_is_split_changes_nothing(encoded, tokens, kind, split):
    """Into micro-batches and ranks, of rows at stages of their own, some without a thought and
    some micro-batches without a row."""
    num_ranks, batch_size = split
    curriculum = Curriculum(pad_latent_to_max=False)
    data = StageDataset(encoded, curriculum, tokens, 3, stage_mixing="linear", seed=1)
    rows = np.arange(7)
    assert {0, 2} <= set(data.num_latents[rows].tolist())
    model, step_loss = make_model("llama", kind, tokens)
    wanted = run_step(model, step_loss, micro_batches(data, rows, kind))
    batches = [micro_batches(data, rows, kind, num_ranks, r, batch_size) for r in range(num_ranks)]
    empty = [batch for of_rank in batches for batch in of_rank if not batch.rows]
    assert empty or split != (3, 1)
    actual = run_step(model, step_loss, sum(batches, []))
    for name in wanted:
        assert_same(actual[name], wanted[name], name)


@KINDS
@pytest.mark.parametrize("column", range(4))
def test_the_gradient_of_a_thought_is_that_of_finite_differences(encoded, tokens, kind, column):
    """Of each latent, moved while the passes run: its own label and all that comes after it. By
    size: (f(x + h v) - f(x - h v)) / 2h against the gradient along v, in float64."""
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    model, step_loss = make_model("llama", kind, tokens)
    (batch,) = micro_batches(data, range(4), kind)
    width = model.base_causallm.config.hidden_size
    generator = torch.Generator().manual_seed(column)
    direction = torch.randn(4, width, generator=generator, dtype=torch.float64)

    def loss(move: torch.Tensor) -> torch.Tensor:
        edit = lambda k, state: state + move if k == column else state
        output = model(**batch.inputs(), edit_latent=edit)
        return step_loss(model, output.latents, batch.targets)

    move = torch.zeros(4, width, dtype=torch.float64, requires_grad=True)
    loss(move).backward()
    along, h = (move.grad * direction).sum().item(), 1e-6
    with torch.no_grad():
        difference = (loss(h * direction) - loss(-h * direction)).item() / (2 * h)
    assert abs(along) > 1e-3
    assert along == pytest.approx(difference, rel=1e-6)


@KINDS
def test_training_steps_need_no_value_on_the_host(encoded, tokens, kind):
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    model, step_loss = make_model("llama", kind, tokens)
    (batch,) = micro_batches(data, range(4), kind)
    with NoHostSync():
        output = model(**batch.inputs(), num_items_in_batch=9)
        (output.loss + step_loss(model, output.latents, batch.targets)).backward()


def test_the_decoder_has_weights_and_passes_of_its_own(tokens):
    """Beside the embeddings, and the head: a copy of all blocks that shares no kept inputs."""
    model, step_loss = make_model("qwen3", "decoder", tokens)
    base = model.base_causallm
    assert step_loss.decoder.embed_tokens is base.get_input_embeddings()
    own = {id(p) for p in step_loss.decoder.parameters()} & {id(p) for p in base.parameters()}
    assert own == {id(base.get_input_embeddings().weight)}
    passes = {id(model.passes)}
    for module in step_loss.decoder.modules():
        if isinstance(module, torch.nn.Linear):
            assert id(module.forward.func.__self__) not in passes
    assert len(model.blocks()) == 2 * len(base.model.layers)


def test_without_the_key_batches_hold_no_targets(encoded, tokens):
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    assert [batch.targets for batch in micro_batches(data, range(4), "none")] == [None]
    model = Coconut(tiny_model("llama"), tokens.latent)
    config = SimpleNamespace(step_loss="none", step_loss_weight=None)
    assert add_step_loss(config, model) is None


@KINDS
def test_targets_move_with_their_batch(encoded, tokens, kind):
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    (batch,) = micro_batches(data, range(4), kind)
    moved = batch.to(torch.device("meta")).targets
    tensors = [value for value in vars(moved).values() if value is not None]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(tensors) == (5 if kind == "decoder" else 3)


# ------------------------------------------------------------------------------- two processes

# several latents on both ranks, none, some rows only, fewer rows than ranks
STEPS = {
    "mixed": (dict(stage_mixing="linear", seed=1), range(12), 2),
    "all": ({}, range(12), 3),
    "none": (dict(num_latents=0), range(4), 1),
    "one row": ({}, range(1), 4),
}


def sharded_steps(world: World, tokenizer_folder, folder) -> dict:
    """Every step in turn on one model, and the collective calls of each."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokens = LatentTokens(START_ID, LATENT_ID, END_ID)
    encoded = encode_rows(ROWS, tokenizer, list(tokens), folder / str(world.rank), "rows")
    actual = {}
    for kind in ("head", "decoder"):
        for family in ("llama", "gpt2"):
            model, step_loss = make_model(family, kind, tokens)
            shard(model, torch.float64, world)
            for name, (more, rows, batch_size) in STEPS.items():
                data = StageDataset(encoded, Curriculum(), tokens, 3, **more)
                split = dict(num_ranks=world.world_size, rank=world.rank, batch_size=batch_size)
                with count_collectives() as counts:
                    outcome = run_step(
                        model, step_loss, micro_batches(data, rows, kind, **split), world
                    )
                outcome["counts"] = dict(counts)
                outcome["units"] = sum(isinstance(m, FSDPModule) for m in model.modules())
                actual[f"{kind}, {family}, {name}"] = outcome
    return actual


def training_state(world: World, tokenizer_folder) -> tuple:
    """A model with a decoder, its optimizer, and a batch for it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokens = LatentTokens(*add_latent_tokens(tokenizer))
    encoded = encode_rows(ROWS, tokenizer, list(tokens), None, "rows")
    model, step_loss = make_model("qwen3", "decoder", tokens)
    shard(model, torch.float64, world)
    data = StageDataset(encoded, Curriculum(), tokens, 3)
    split = dict(num_ranks=world.world_size, rank=world.rank, batch_size=2)
    batches = micro_batches(data, range(12), "decoder", **split)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, step_loss, optimizer, batches, tokenizer


def save_sharded(world: World, tokenizer_folder, folder) -> None:
    """A checkpoint after a step of all processes."""
    parts = training_state(world, tokenizer_folder)
    model, step_loss, optimizer, batches, tokenizer = parts
    run_step(model, step_loss, batches, world)
    optimizer.step()
    keys = dict(name="x", save_path="x", coconut=True, model_id="x", train_path="x", val_path="x")
    config = make_config(keys | {"step_loss": "decoder"}, "test")
    state = TrainState("rows", 12)
    save_checkpoint(folder / "checkpoint_1", model, tokenizer, optimizer, config, state)


def resumed(world: World, tokenizer_folder, folder) -> dict:
    """The decoder and its moments as they are loaded, into one that was something else."""
    model, _, optimizer, _, _ = training_state(world, tokenizer_folder)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    load_optimizer(Checkpoint(folder / "checkpoint_1", 1, None), model, optimizer)
    own = {n: p for n, p in model.named_parameters() if n.startswith(DECODER)}
    moments = {n: full_tensor(optimizer.state[p]["exp_avg"]) for n, p in own.items()}
    return {"weights": {n: full_tensor(p).detach() for n, p in own.items()}, "moments": moments}


def worker(rank: int, port: int, tokenizer_folder, folder) -> None:
    world = open_pair(rank, port, patience=60)
    results = {"steps": sharded_steps(world, tokenizer_folder, folder)}
    save_sharded(world, tokenizer_folder, folder)
    results["resumed"] = resumed(world, tokenizer_folder, folder)
    torch.save(results, folder / f"{rank}.pt")
    close_processes()


@pytest.mark.slow
def test_two_processes_make_the_same_step(tokenizer_folder, tmp_path):
    """Losses and all gradients, the decoder's too; each of its blocks is gathered and reduced once
    a step, however many passes and micro-batches there are. One or two go on from what they saved.
    """
    port = free_port()
    torch.multiprocessing.spawn(worker, (port, tokenizer_folder, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    wanted = sharded_steps(ALONE, tokenizer_folder, tmp_path)
    for name, outcome in wanted.items():
        for actual in (rank["steps"][name] for rank in ranks):
            units = 5 if name.startswith("decoder") else 3
            assert actual["units"] == units
            once = {"all_gather_single": units, "reduce_scatter_single": units}
            assert {k: actual["counts"][k] for k in once} == once, name
            assert_same(actual["loss"], outcome["loss"], name)
            assert_same(actual["gradients"], outcome["gradients"], name)

    model, step_loss, optimizer, batches, _ = training_state(ALONE, tokenizer_folder)
    run_step(model, step_loss, batches)
    optimizer.step()
    own = {n: p for n, p in model.named_parameters() if n.startswith(DECODER)}
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in own.items()}
    for actual in (
        *(rank["resumed"] for rank in ranks),
        resumed(ALONE, tokenizer_folder, tmp_path),
    ):
        assert_same(actual["weights"], own)
        assert_same(actual["moments"], moments)


# ------------------------------------------------------------------------------- runs

VARIANTS = {
    "head": dict(step_loss="head", schedule="paper"),
    "decoder": dict(step_loss="decoder", schedule="paper", reset_optimizer=True),
    "decoder, bf16, dropout": dict(step_loss="decoder", bf16=True, gradient_checkpointing=True),
    "master weights": dict(
        step_loss="decoder", bf16=True, float32_master_weights=True, latent_growth="one"
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact_with(workspace, gpt2_folder, monkeypatch, variant):  # noqa: F811
    """Killed within epoch 2 and between save and evaluation at its end; schedule paper begins
    without latents, so the decoder has had no label by then."""
    settings = {**THREE_STEPS, "save_every_steps": 1, **VARIANTS[variant]}
    if "dropout" in variant:
        settings["model_id"] = str(gpt2_folder)
    assert train(workspace, name="whole", **settings) == 0
    killed(monkeypatch, workspace, loop, "optimizer_step", 2, after=True, **settings)
    killed(monkeypatch, workspace, loop, "optimizer_step", 4, after=True, **settings)
    killed(monkeypatch, workspace, loop, "validate", 1, **settings)
    assert train(workspace, **settings) == 0
    assert differences(workspace.run_dir, workspace.run_dir.with_name("whole")) == []


@KINDS
def test_a_run_logs_it_apart_and_learns_it(workspace, kind):  # noqa: F811
    run = dict(lr=3e-3, num_epochs=8, schedule="paper", max_latent_stage=1, skip_validation=True)
    more = dict(step_loss=kind, step_loss_weight=1.0, keep_checkpoints=1)
    assert train(workspace, **THREE_STEPS, **run, **more) == 0
    records = [r for r in history(workspace.run_dir) if r["kind"] == "train"]
    by_stage = {stage: [r for r in records if r["stage"] == stage] for stage in (0, 1, 2)}
    assert all(r["step_loss"] == 0 for r in by_stage[0])
    losses = [r["step_loss"] for r in by_stage[2]]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert all(np.isfinite(r["loss"]) for r in records)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_decoder_begins_with_its_first_label(workspace, monkeypatch, bf16):  # noqa: F811
    """Gradients of zeros in stage 0 decayed its weights, and AdamW counted them as steps."""
    seen, step = [], loop.optimizer_step

    def watched(training, *args):
        own = [p for name, p in training.model.named_parameters() if name.startswith(DECODER)]
        before = [p.detach().clone() for p in own]
        figures = step(training, *args)
        states = [training.optimizer.state.get(p, {}) for p in own]
        counts = {int(state["step"]) for state in states if state}
        moved = any(not torch.equal(p, b) for p, b in zip(own, before))
        seen.append((figures["step_loss"] > 0, counts, moved))
        return figures

    monkeypatch.setattr(loop, "optimizer_step", watched)
    keys = dict(step_loss="decoder", schedule="paper", num_epochs=2, bf16=bf16, lr=1e-2)
    assert train(workspace, **THREE_STEPS, weight_decay=0.3, skip_validation=True, **keys) == 0
    assert seen == [(False, set(), False)] * 3 + [(True, {n}, True) for n in (1, 2, 3)]


@KINDS
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "llama"])
def test_without_labels_a_run_is_the_one_without_it(
    workspace,  # noqa: F811
    tokenizer,
    tmp_path,
    family,
    kind,
):
    """As in stage 0. What was to leave the decoder alone once took the gradient of the embeddings,
    which it shares, away from the model too."""
    folder = tmp_path / family
    tiny_model(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keys = dict(model_id=str(folder), schedule="paper", num_epochs=1, weight_decay=0.3)
    for name in ("none", kind):
        assert train(workspace, name=name, step_loss=name, **THREE_STEPS, **keys) == 0
    without, ours = (workspace.run_dir.with_name(name) for name in ("none", kind))
    weights, expected = newest_weights(ours), newest_weights(without)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    losses = [[r["loss"] for r in history(run)] for run in (ours, without)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_run_without_it_logs_none(workspace):  # noqa: F811
    assert train(workspace, **THREE_STEPS, num_epochs=1) == 0
    assert not any("step_loss" in r for r in history(workspace.run_dir))


def test_checkpoints_hold_the_model_alone_and_evaluation_builds_no_decoder(
    workspace,  # noqa: F811
    monkeypatch,
):
    """They open as before, and with the same weights say the same, whatever step_loss is."""
    assert train(workspace, **THREE_STEPS, step_loss="decoder", num_epochs=1) == 0
    folder = find_checkpoints(workspace.run_dir)[-1].path
    base = AutoModelForCausalLM.from_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() <= base.state_dict().keys()
    assert not [name for name in saved if DECODER in name]
    count = sum(p.numel() for p in base.parameters())
    beside = sum(p.numel() for p in base.model.layers.parameters()) + len(base.model.norm.weight)
    assert f"decoder   {beside / 1e6:,.1f} million parameters more" in log_text(workspace)
    parts = FileSystemReader(folder / "training_state").read_metadata().state_dict_metadata
    tensors = [part for part in parts.values() if isinstance(part, TensorStorageMetadata)]
    numbers = sum(part.size.numel() for part in tensors if len(part.size))
    config = find_checkpoints(workspace.run_dir)[-1].config()
    assert run_bytes(count, config, 1, beside) == (4 * (numbers + count), 1)
    assert run_bytes(count, config, 2, beside) == (2 * 4 * (numbers + count), 2)
    monkeypatch.setattr(loop, "add_step_loss", None)  # nothing calls it
    monkeypatch.setattr("step_loss.add_step_loss", None)
    texts = []
    for kind in ("decoder", "none"):
        name, keys = f"eval-{kind}", dict(only_eval=True, load_model_path=str(folder))
        assert train(workspace, name=name, **{**THREE_STEPS, "step_loss": kind, **keys}) == 0
        lines = (workspace.run_dir.with_name(name) / "results_epoch_1.jsonl").read_text()
        texts.append([json.loads(line) for line in lines.splitlines()])
    assert texts[0] == texts[1] and len(texts[0]) == 3


@KINDS
def test_it_changes_what_is_learned(workspace, kind):  # noqa: F811
    weights = []
    for name in ("none", kind):
        assert train(workspace, name=name, **THREE_STEPS, num_epochs=1, step_loss=name) == 0
        folder = workspace.run_dir.with_name(name) / "checkpoint_1"
        weights.append(load_file(folder / "model.safetensors"))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_keeps_its_step_loss(workspace, capsys):  # noqa: F811
    assert train(workspace, **THREE_STEPS, step_loss="head", num_epochs=1) == 0
    assert train(workspace, **THREE_STEPS, step_loss="decoder", num_epochs=2) == 2
    assert "step_loss: decoder, but" in capsys.readouterr().err


def test_a_step_too_long_for_the_decoder_is_refused(workspace):  # noqa: F811
    """It is no part of the row that is trained on, so max_seq_length does not see it."""
    path = workspace.values["train_path"]
    rows = [*tiny_rows(12), {"question": "Q?", "steps": ["1 2 3 " * 200 + "4"], "answer": "1"}]
    Path(path).write_text(json.dumps(rows))
    with pytest.raises(UserError, match="step_loss: decoder has a step of .* the 512 positions"):
        gather_inputs(load_config(workspace.yaml(step_loss="decoder")))
    gather_inputs(load_config(workspace.yaml(step_loss="head")))


def test_steps_too_long_together_for_the_decoder_are_refused(workspace):  # noqa: F811
    """uniform_prob draws a stage of the row's own chain, beyond the curriculum's last: the last
    thought then stands for all steps that are left, and the row itself is short."""
    path = workspace.values["train_path"]
    rows = [*tiny_rows(12), {"question": "Q?", "steps": ["1 2 3 " * 40] * 6, "answer": "1"}]
    Path(path).write_text(json.dumps(rows))
    keys = dict(step_loss="decoder", schedule="capped", max_seq_length=512)
    gather_inputs(load_config(workspace.yaml(**keys)))
    with pytest.raises(UserError, match="step_loss: decoder has a step of .* the 512 positions"):
        gather_inputs(load_config(workspace.yaml(**keys, uniform_prob=0.5)))


def test_help_tells_of_both_keys(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = capsys.readouterr().out
    assert "    step_loss (none or head or decoder, default none): " in text
    meaning = "its weight in the loss; null: 0.05 for head, 1 for decoder\n"
    assert f"    step_loss_weight (float or null from 1e-06, default None): {meaning}" in text


@pytest.mark.parametrize("kind, weight", [("head", 0.05), ("decoder", 1.0)])
def test_the_weight_is_the_published_one_where_none_is_given(workspace, kind, weight):  # noqa: F811
    config = load_config(workspace.yaml(step_loss=kind))
    step_loss = add_step_loss(config, Coconut(tiny_model("qwen3")))
    assert step_loss is not None and step_loss.weight == weight
