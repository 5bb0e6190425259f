"""What only a GPU can show, on the first one that runs it: bash run_tests.sh -m cuda

Every body is a function of a device and runs on the CPU too, in the usual suite: what is marked
`cuda` is the same claim on the GPU, which is skipped without one.
"""

import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, family_config, tiny_model
from numerics import assert_as_exact_as, assert_same, exact, roundings
from soak import history, launch, newest_weights, wait_until
from test_coconut import (
    BATCHES,
    FAMILIES,
    PAD_ID,
    left_padded,
    make_batch,
    make_rows,
    naive_generate,
    naive_loss,
    never,
    num_clear,
    outcome,
    wrap,
)
from test_sampling import naive_draw
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

sys.path.append(str(ROOT / "benchmarks"))
from parts import repeatable

import run
from engine.batches import MicroBatch
from engine.distributed import World, choose_device
from engine.loop import Step, forward_backward
from engine.optimizer import SplitAdamW, join
from engine.sampling import draw

ON_CUDA = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that can be used"),
)
CUDA = pytest.param("cuda", marks=ON_CUDA)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
PADDED = ("uneven latents", "a row shorter than the others' prefix", "rows without any")


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products in float32: a run sets TF32 for its process, and other things."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def moved(batch: dict, device: str) -> dict:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def outcome_on(device: str, base, batch: dict, recompute: bool = False) -> dict:
    """Loss and gradients, computed there."""
    model = wrap(base.to(device)).train()
    if recompute:
        model.checkpoint_activations()
    figures = outcome(model.base_causallm, model(**moved(batch, device)).loss)
    return {
        "loss": figures["loss"].cpu(),
        "gradients": {name: gradient.cpu() for name, gradient in figures["gradients"].items()},
    }


def assert_finite(figures: dict) -> None:
    assert figures["loss"].isfinite()
    assert [
        n for n, gradient in figures["gradients"].items() if not gradient.isfinite().all()
    ] == []


# ------------------------------------------------------------------------------- the forward


@DEVICES
@pytest.mark.parametrize("layout", ["collator", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PADDED)
def test_float32_is_as_exact_as_on_the_cpu(name, family, layout, device):
    """Loss and every gradient against the definition in float64; the yardstick is what the
    library's float32 is off by on the CPU."""
    base, rows = tiny_model(family), make_rows(BATCHES[name])
    truth = exact(base)
    wanted = outcome(truth, naive_loss(truth, rows))
    naive = [outcome(twin, naive_loss(twin, rows)) for twin in roundings(base)]
    actual = outcome_on(device, base, make_batch(rows, layout))
    assert_as_exact_as(actual, naive, wanted)


def with_a_masked_row(batch: dict) -> dict:
    """The batch with one more row, of padding alone."""
    fill = {"input_ids": PAD_ID, "attention_mask": 0, "position_ids": 0, "labels": -100}
    more = {name: F.pad(batch[name], (0, 0, 0, 1), value=value) for name, value in fill.items()}
    return {**batch, **more}


def wide_model(dtype: torch.dtype):
    """Heads as wide as those of Qwen3-4B: kernels are chosen by that."""
    config = family_config("qwen3")
    config.head_dim = 128
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def takes_masks(backend: SDPBackend, device: str) -> bool:
    """Whether an attention backend of this machine takes masks as the program makes them."""
    heads = torch.zeros(2, 4, 16, 128, dtype=torch.bfloat16, device=device)
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bfloat16, device=device)
    with warnings.catch_warnings(action="ignore"), sdpa_kernel([backend]):  # each says why not
        try:
            F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        except RuntimeError:
            return False
    return True


REPORTED = pytest.mark.xfail(reason="NaN was reported on Hopper and Blackwell; no run uses it")
BACKENDS = [
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    pytest.param(SDPBackend.CUDNN_ATTENTION, marks=REPORTED),
]


@DEVICES
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("prefix", [7, 25, 56, 121])
def test_padded_and_masked_rows_in_bfloat16(prefix, backend, device):
    """Every kernel that the machine offers, at key lengths of several remainders: all finite, and
    as near to float64 as bfloat16 without padding is on the CPU."""
    if not takes_masks(backend, device):
        pytest.skip(f"{backend.name} takes no mask on this machine")
    base = wide_model(torch.bfloat16)
    rows = make_rows(["q" * prefix + "LLL" + "r" * 9, "qqLLrrrr", "q" * (prefix - 3) + "LLLrr"])
    truth = exact(base)
    wanted = outcome(truth, naive_loss(truth, rows))
    naive = [outcome(twin, naive_loss(twin, rows)) for twin in roundings(base)]
    with sdpa_kernel([backend]):
        actual = outcome_on(device, base, with_a_masked_row(make_batch(rows, "collator")))
    assert_finite(actual)
    assert_as_exact_as(actual, naive, wanted)


@pytest.mark.parametrize("device", [CUDA])
def test_a_run_computes_without_cudnns_attention(device):
    assert choose_device().type == device
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_change_nothing(family, dtype, device):
    """float64 to its last digits; in bfloat16, whose kernels are others, as near to the truth."""
    rows = make_rows(BATCHES["uneven latents"])
    base = tiny_model(family, dtype)
    truth = exact(base)
    make = lambda: exact(base) if dtype == torch.float64 else tiny_model(family, dtype)
    kept, recomputed = (
        outcome_on(device, make(), make_batch(rows, "collator"), recompute)
        for recompute in (False, True)
    )
    if dtype == torch.float64:
        for name, figures in kept.items():
            assert_same(recomputed[name], figures, name)
        return
    wanted = outcome(truth, naive_loss(truth, rows))
    naive = [outcome(twin, naive_loss(twin, rows)) for twin in roundings(base)]
    assert_as_exact_as(kept, naive, wanted)
    assert_as_exact_as(recomputed, naive, wanted)


@contextmanager
def no_host_sync(device: str):
    """What waits for the GPU raises; on the CPU nothing does (tests/test_coconut.py counts there
    what would)."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DEVICES
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_host_sync_in_forward_and_backward(family, dtype, recompute, device):
    """Of the micro-batches of a step, copied from pinned memory, as the training loop does it."""
    rows = make_rows(BATCHES["uneven latents"])
    batch = MicroBatch(
        **make_batch(rows, "collator"), rows=[0, 1, 2], num_items_in_batch=9, last=True
    )
    world = World(0, 1, torch.device(device))
    model = wrap(tiny_model(family, dtype).to(device)).train()
    if recompute:
        model.checkpoint_activations()
    if device != "cpu":
        batch = batch.pin_memory()
    step = Step(torch.arange(3).numpy())
    forward_backward(model, batch, world, dtype, step)  # the first one sets up the libraries
    with no_host_sync(device):
        forward_backward(model, batch, world, dtype, step)
    assert float(step.loss) > 0 and step.positions == 2 * batch.input_ids.numel()


class OneDevice(TorchDispatchMode):
    """Fails where a tensor of the host takes part: on a GPU it would be copied, and waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not torch.is_tensor(leaf) or leaf.is_meta, f"{func.name()}: a tensor of the host"
        return result


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_stay_on_their_device(family, dtype, recompute, monkeypatch):
    """Seen on the meta device, which computes nothing and knows of no autocast."""
    asked = torch.is_autocast_enabled
    answer = lambda kind=None: kind != "meta" and (asked(kind) if kind else asked())
    monkeypatch.setattr(torch, "is_autocast_enabled", answer)
    model = wrap(tiny_model(family, dtype).to("meta")).train()
    if recompute:
        model.checkpoint_activations()
    batch = moved(make_batch(make_rows(BATCHES["uneven latents"]), "collator"), "meta")
    with OneDevice():
        model(**batch).loss.backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())
    with pytest.raises(AssertionError, match="a tensor of the host"), OneDevice():
        torch.zeros(2, device="meta") + torch.tensor(1.0)


# ------------------------------------------------------------------------------- generation


@DEVICES
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_of_one_and_of_32_rows_is_the_same(family, device):
    """Greedy tokens in float32, compared as far as float64 leaves no doubt about the best one."""
    lengths = [3 + 5 * i % 17 for i in range(32)]
    rows = make_rows(["q" * length + "LL" * (i % 4) + "q" for i, length in enumerate(lengths)])
    prompts, base = [ids for ids, _ in rows], tiny_model(family)
    truth = exact(base)
    wanted = [naive_generate(truth, ids, -1, 6) for ids in prompts]
    wanted = [new[: num_clear(base, ids, new)] for ids, new in zip(prompts, wanted)]
    assert sum(map(len, wanted)) > 150  # of 192
    model = never(base.to(device))
    together = model.generate(**moved(left_padded(prompts), device), max_new_tokens=6)
    alone = [
        model.generate(**moved(left_padded([ids]), device), max_new_tokens=6)[0] for ids in prompts
    ]
    for actual in (together, alone):
        assert [row.tolist()[: len(new)] for row, new in zip(actual, wanted)] == wanted


@DEVICES
def test_samples_are_drawn_by_the_definition(device):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 5000, generator=generator)
    places = torch.rand(16, generator=generator, dtype=torch.float64)
    actual = draw(logits.to(device), places.to(device), 0.8, 0.9).tolist()
    assert actual == [naive_draw(row, place, 0.8, 0.9) for row, place in zip(logits, places)]


# ------------------------------------------------------------------------------- the optimizer


@DEVICES
def test_split_adamw_updates_as_float32_does(device):
    """Two hundred steps with noisy gradients: weights and second moment of float64's AdamW."""
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(64, 33, generator=generator) * 0.02).bfloat16()
    settings = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    ours = torch.nn.Parameter(start.to(device, copy=True))
    exact_weight = torch.nn.Parameter(start.double())
    optimizer = SplitAdamW([ours], **settings)
    reference = torch.optim.AdamW([exact_weight], **settings)
    direction = torch.randn(start.shape, generator=generator) / 2
    for _ in range(200):
        noise = torch.randn(start.shape, generator=generator)
        gradient = (1e-3 * (direction + noise)).bfloat16()
        ours.grad, exact_weight.grad = gradient.to(device), gradient.double()
        optimizer.step()
        reference.step()
    state = optimizer.state[ours]
    assert state["exp_avg_sq"].device.type == device
    weight = join(ours.detach(), state["low_bits"]).cpu()
    way, wanted = weight - start.double(), exact_weight.detach() - start.double()
    assert (way - wanted).norm() < 0.01 * wanted.norm()
    moment = reference.state[exact_weight]["exp_avg_sq"]
    assert (state["exp_avg_sq"].cpu() - moment).norm() < 1e-4 * moment.norm()
    # the model sees the nearest bfloat16
    assert torch.equal(ours.detach().cpu(), weight.bfloat16())


# ------------------------------------------------------------------------------- whole runs

SMALL = dict(
    batch_size_training=4,
    gradient_accumulation_steps=None,
    rows_per_step=8,
    gradient_checkpointing=True,
    eval_subset_size=3,
    batch_size_eval=3,
    max_new_tokens=4,
)
TYPES = {
    "float32": {},
    "bf16": dict(bf16=True),
    "float32 master weights": dict(bf16=True, float32_master_weights=True),
}


@pytest.fixture
def on(device, monkeypatch) -> None:
    """A run in this process or in one of its own takes this device."""
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def in_one_order():
    """Sums, wherever the GPU's kernels leave a choice."""
    with repeatable():
        yield


@DEVICES
@pytest.mark.parametrize("keys", TYPES.values(), ids=TYPES)
def test_saved_and_resumed_exactly(workspace, on, in_one_order, device, keys):
    """Two epochs at once, and one after the other: the same bits."""
    train = lambda **more: run.main([str(workspace.yaml(**SMALL, **keys, **more))])
    assert train(name="whole", num_epochs=2) == 0
    assert train(num_epochs=1) == 0 and train(num_epochs=2) == 0
    whole = workspace.run_dir.with_name("whole")
    assert f"1 x {device}, " in (whole / "training.log").read_text()
    ours, theirs = newest_weights(workspace.run_dir), newest_weights(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    steps, wanted = (
        [record for record in history(folder) if record["kind"] == "train"]
        for folder in (workspace.run_dir, whole)
    )
    assert len(wanted) == 6 and steps == wanted


@DEVICES
@pytest.mark.slow
def test_one_process_under_torchrun_trains_as_without(workspace, on, device):
    """NCCL on a GPU, gloo on the CPU."""
    log = workspace.folder / "torchrun.log"
    keys = dict(num_epochs=1, **SMALL)
    process = launch(
        ROOT / "run.py", workspace.yaml(name="group", **keys), num_processes=1, log=log
    )
    assert not wait_until(lambda: False, process) and process.returncode == 0, log.read_text()
    assert run.main([str(workspace.yaml(**keys))]) == 0
    losses = [
        [record["loss"] for record in history(folder) if record["kind"] == "train"]
        for folder in (workspace.run_dir.with_name("group"), workspace.run_dir)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 3
