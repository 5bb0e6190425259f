"""benchmarks/gpu.py: its whole flow on the CPU, and what only a GPU fills in."""

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT
from test_cuda import CUDA

sys.path.append(str(ROOT / "benchmarks"))
import gpu
from gpu_report import MINUTES_ON_CPU, ON_CPU, report
from parts import QWEN3_4B
from roofline import MACHINES, time_of_update
from transformers import AutoConfig

from engine import loop
from engine.distributed import World
from engine.preflight import gather_inputs
from engine.weights import empty_model


@pytest.fixture(autouse=True)
def own_tokenizer(monkeypatch):
    """The same rows on every machine, and no vocabulary of which a tiny model is slow."""
    monkeypatch.delenv("COCONUT_TEST_TOKENIZER", raising=False)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder that the script writes on a machine without CUDA."""
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--output", folder]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("COCONUT_TEST_TOKENIZER", None)  # the same rows on every machine
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith((folder / "gpu.md").read_text() + "\n")
    return folder


@pytest.mark.slow
def test_the_whole_flow_is_rehearsed_on_a_cpu(rehearsal):
    """And says that it is a rehearsal; nothing is left but the two files."""
    assert sorted(path.name for path in rehearsal.iterdir()) == ["gpu.json", "gpu.md"]
    figures = json.loads((rehearsal / "gpu.json").read_text())
    assert figures["machine"]["card"] == "CPU, a rehearsal"
    assert set(ON_CPU) < set(figures["quickstart"])
    main = figures["main config"]
    assert main["rows per step"] == 8 and main["micro-batches per step"] == 2
    assert min(main[n] for n in ("seconds per step", "forward and backward", "plain pass")) > 0
    assert len(main["loss"]) == 2 and all(5 < loss < 10 for loss in main["loss"])  # of 3,600 tokens
    assert {size: found["new tokens per row"] for size, found in main["evaluation"].items()} == {
        "1": 4 + 6,
        "4": 4 + 6,
    }
    assert figures["resume"]["exact"] is True
    assert "### CPU, a rehearsal" in (rehearsal / "gpu.md").read_text()


def test_the_table_shows_what_a_gpu_fills_in():
    figures = {
        "machine": {"card": "NVIDIA X", "memory": 80 * 2**30, "driver": "580.1", "torch": "2.13.0"},
        "quickstart": {"accuracy": 0.84, "accuracy without latents": 0.17, "minutes": 2.0},
        "main config": {
            "parameters": 4_022_000_000,
            "rows per step": 96,
            "tokens per row": 79.4,
            "micro-batches per step": 6.0,
            "largest micro-batch": [16, 163],
            "forecast": {"peak bytes": 47 * 2**30, "seconds per step": None},
            "seconds per step": 5.5,
            "peak bytes": 46 * 2**30,
            "peak bytes reserved": 48 * 2**30,
            "host syncs per step": 2.0,
            "forward and backward": 5.0,
            "plain pass": 2.5,
            "evaluation": {1: {"rows per second": 0.5, "new tokens per row": 46.0}},
        },
        "resume": {"bytes": 4e10, "seconds to save": 30.0, "seconds to load": 40.0, "exact": False},
    }
    text = report(figures)
    for wanted in (
        "NVIDIA X, 80.0 GiB; driver 580.1, PyTorch 2.13.0; 4,022 million parameters, steps of 96 "
        "rows of 79 tokens in 6 micro-batches, the largest 16 x 163",
        "| quickstart: accuracy | 100.0% on a CPU | 84.0% |",
        "| peak memory of a step | 47.0 GiB forecast | 46.0 GiB |",
        "| seconds per step | - forecast | 5.5 |",
        "| 2.5 in one pass of the library's model | 5 (2.00x) |",
        "| host syncs per step | - | 2 |",
        "46 tokens each, batch 1 | - | 0.5 |",
        "| NO; 40 |",
    ):
        assert wanted in text
    known = copy.deepcopy(figures)
    known["main config"]["forecast"]["seconds per step"] = 5.0
    assert "| seconds per step | 5 forecast | 5.5 |" in report(known)


def test_the_quickstart_is_held_against_the_readmes_result():
    text = (ROOT / "README.md").read_text()
    assert f"6 latents: accuracy {ON_CPU['accuracy']:.1%}" in text
    assert f"0 latents (forced): accuracy {ON_CPU['accuracy without latents']:.1%}" in text
    assert f"in {MINUTES_ON_CPU} minutes on one slow core" in text


def test_the_large_model_has_the_size_of_qwen3_4b():
    config = AutoConfig.from_pretrained(QWEN3_4B)
    assert sum(p.numel() for p in empty_model(config).parameters()) == 4_022_468_096


def test_made_up_rows_are_as_long_as_with_qwen3s_tokenizer(tmp_path):
    """83 tokens at the last stage, counted with that."""
    config = gpu.write_config(tmp_path, None, ["rows_per_step=200"])
    lengths = gather_inputs(config).train_dataset(gpu.EPOCH).total_length
    assert len(lengths) == 400 and 75 < lengths.mean() < 90


@pytest.mark.slow
def test_the_forecast_of_a_step_is_that_of_its_micro_batches(tmp_path):
    """On a known card; twice as many micro-batches take twice the time but for the update."""
    inputs = gather_inputs(gpu.write_config(tmp_path, None, gpu.REHEARSAL.keys))
    batches = gpu.batches_of(inputs, World(0, 1, torch.device("cpu")))
    settings = inputs.config, inputs.hf_config
    card = MACHINES["a100-80gb"]
    update = time_of_update(*settings, card).total
    once, twice = (gpu.forecast_step(*settings, batches * n, card) for n in (1, 2))
    assert twice - update == pytest.approx(2 * (once - update)) and once > 2 * update > 0
    assert gpu.forecasts(inputs, batches)["seconds per step"] is None  # of this machine


@pytest.mark.parametrize("broken", [False, True])
def test_a_resume_that_is_not_exact_is_seen(tmp_path, monkeypatch, broken):
    """Broken: the optimizer's state is not loaded."""
    if broken:
        monkeypatch.setattr(loop, "load_optimizer", lambda *args: None)
    world = World(0, 1, torch.device("cpu"))
    figures = gpu.measure_resume(tmp_path / "resume", world, None, gpu.REHEARSAL.keys)
    assert figures["exact"] is not broken and figures["bytes"] > 5e6


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_host_syncs_are_counted(device, monkeypatch):
    """On the CPU by what torch would say; other warnings do not count."""

    def work() -> None:
        warnings.warn("something else", stacklevel=1)
        for _ in range(3):
            if device == "cpu":
                warnings.warn(f"{gpu.SYNC} (Triggered internally)", stacklevel=1)
            else:
                torch.ones(2, device=device).sum().item()

    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    else:
        torch.ones(2, device=device).sum().item()  # sets up the device
    assert gpu.count_syncs(work) == 3
