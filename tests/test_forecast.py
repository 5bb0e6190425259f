"""The time forecast: what it counts, and that its report runs."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import forecast
import memory
import roofline
from kernels import Kernel, counted_kernels, fused_norms
from memory import GIB, peak
from memory import forecast as memory_forecast
from parts import QWEN3_4B, small_config, word_tokenizer
from roofline import (
    MACHINES,
    Machine,
    Shape,
    by_blocks,
    machine_of,
    seconds_of,
    time_of_micro_batch,
    with_blocks,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

import layers
from loader import load_config

CONFIG = ROOT / "args" / "quickstart.yaml"
LORA = ROOT / "args" / "gsm8k_coconut_qwen3_lora_24gb.yaml"
GPU = Machine("a card", 1e12, 1e11, 8e9, 1e10, 1.0, 1.0, 1e-6)


def only(action) -> Kernel:
    (kernel,) = counted_kernels(action)
    return kernel


def test_products_and_bytes_of_what_a_training_does():
    with FakeTensorMode():
        left, right = torch.empty(30, 20), torch.empty(20, 10)
        numbers = 30 * 20 + 20 * 10 + 30 * 10
        assert only(lambda: left @ right)[1:] == (2 * 30 * 20 * 10, 4 * numbers)
        total = torch.empty(30, 10)
        assert only(lambda: total.addmm_(left, right))[1:] == (
            2 * 30 * 20 * 10,
            4 * (numbers + 30 * 10),  # read and written
        )
        table = torch.empty(1000, 8)
        words = torch.zeros(5, dtype=torch.long)
        found = only(lambda: torch.nn.functional.embedding(words, table))
        assert found.bytes < 4 * table.numel() / 10  # the rows that are read
        assert counted_kernels(lambda: left.T.view(20, 30)[:5]) == []


def test_attention_is_two_products_and_five():
    with FakeTensorMode():
        shape = (2, 4, 7, 8)
        query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
        mask = torch.zeros(2, 1, 7, 7)
        attend = lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask
        )
        forward = sum(kernel.products for kernel in counted_kernels(attend))
        assert forward == 2 * (2 * 2 * 4 * 7 * 7 * 8)
        both = sum(k.products for k in counted_kernels(lambda: attend().sum().backward()))
        assert both == 3.5 * forward


def test_a_norm_is_one_kernel_each_way_as_on_a_gpu():
    with FakeTensorMode(), fused_norms():
        x, weight = torch.empty(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        normed = []
        forward = counted_kernels(lambda: normed.append(layers._RMSNorm.apply(x, weight, 1e-6)))
        backward = counted_kernels(lambda: normed[0].backward(torch.empty(4, 8)))
    assert ["rms_norm" in kernel.name for kernel in forward] == [True]
    assert sum("rms_norm_backward" in kernel.name for kernel in backward) == 1
    assert layers._RMSNorm.__name__ == "_RMSNorm"


def test_a_kernel_takes_what_binds_it():
    kernels = [Kernel("a", 10**9, 10), Kernel("b", 10, 10**9), Kernel("c", 10, 10)]
    found = seconds_of(kernels, GPU)
    assert found == pytest.approx((1e-3, 1e-2, 1e-6, 3))
    on_cpu = seconds_of(kernels, GPU._replace(is_gpu=False))
    assert on_cpu.launches == pytest.approx(3e-6)


@pytest.mark.slow
def test_more_blocks_take_what_one_more_takes():
    """Three, counted, are what models of one and two say."""
    hf_config, shape = small_config(500, 3, 128), Shape(4, 10, 3, 8)
    config = load_config(CONFIG, "gradient_checkpointing=0.5")

    def count(blocks: int) -> list[Kernel]:
        fake = roofline.fake_model(config, hf_config, blocks, 0.0, on_gpu=True)
        with fake as model:
            batch = roofline.zero_batch(*shape)
            return counted_kernels(lambda: model(**batch).loss.backward())

    assert by_blocks(count, GPU, 3) == pytest.approx(seconds_of(count(3), GPU))
    kept, half, again = (
        time_of_micro_batch(
            load_config(CONFIG, f"gradient_checkpointing={s}"), hf_config, shape, GPU
        )
        for s in (0.0, 0.5, 1.0)
    )
    assert kept.total < half.total == pytest.approx((kept.total + again.total) / 2)
    assert again.kernels < 1.6 * kept.kernels


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_config(500, 2, 128).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_report_has_all_its_tables(model_folder, monkeypatch, capsys):
    main = ROOT / "args" / "gsm8k_coconut_qwen3_a100_fresh_start.yaml"
    keys = [f"model_id={model_folder}", "num_epochs=3", "max_seq_length=512"]
    wanted = [{}, {"group_by_length": True}, {"gradient_checkpointing": 0.0}]
    assert all(keys in forecast.changes(load_config(main)) for keys in wanted)
    monkeypatch.setattr(forecast, "changes", lambda _: wanted)  # as good as all, and quicker
    monkeypatch.setattr(
        sys, "argv", ["forecast.py", str(main), *keys, "--made-up", "300", "--gpus", "2"]
    )
    assert forecast.main() == 0
    text = capsys.readouterr().out
    assert text.startswith("Forecast, not measured") and "2 x A100 80 GB" in text
    for words in ("| 1 | 2 | 2 |", "all, hours", "disk, 3 checkpoints", "group_by_length: True"):
        assert words in text, words
    assert text.count("| yes |") == 3  # nothing of this size fills a card


@pytest.mark.parametrize("program", [forecast, memory])
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["lr=-1"], "lr: -1.0 is below 0"),
        (["model_id=/no/model"], "model_id: /no/model"),
        (["only_eval=True", "load_model_path=x"], "only_eval: forecasts are of trainings"),
    ],
)
def test_a_wrong_config_is_a_line(monkeypatch, capsys, program, keys, words):
    monkeypatch.setattr(sys, "argv", ["program.py", str(CONFIG), *keys])
    assert program.main() == 2
    assert words in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.parametrize("program", [forecast, memory])
def test_a_wrong_number_of_gpus_is_a_line(monkeypatch, capsys, program):
    monkeypatch.setattr(sys, "argv", ["program.py", str(CONFIG), "--gpus", "0"])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2 and "--gpus: 0 is below 1" in capsys.readouterr().err


def test_cards_are_known_by_the_names_that_drivers_give_them():
    names = {"NVIDIA A100-SXM4-80GB": "A100 80 GB", "NVIDIA H100 80GB HBM3": "H100 80 GB"}
    names |= {"NVIDIA H200": "H200 141 GB", "NVIDIA GeForce RTX 4090": "RTX 4090 24 GB"}
    assert {card: machine_of(card).name for card in names} == names
    assert machine_of("CPU, a rehearsal") is None


def test_every_card_has_room_and_speed():
    for machine in MACHINES.values():
        assert 1e14 < machine.products < 1e16 and machine.link < machine.bandwidth < 1e13


@pytest.mark.slow
def test_the_main_config_fits_its_card():
    """With GSM8K's longest rows; and its steps are few micro-batches at every stage."""
    main = ROOT / "args" / "gsm8k_coconut_qwen3_a100_fresh_start.yaml"
    config = load_config(main, f"model_id={QWEN3_4B}")
    assert peak(memory_forecast(config, 305)) < 60 * GIB
    rows = forecast.read_rows(config, made_up=3000)
    for stage in range(4):
        assert forecast.look_at_stage(config, rows, stage, gpus=1).micro_batches <= 3


@pytest.mark.slow
def test_the_config_with_adapters_fits_24_gb(tmp_path):
    """With GSM8K's longest rows. Blocks are alike: by models of two and of four of them."""
    hf_config = AutoConfig.from_pretrained(QWEN3_4B)
    peaks = []
    for blocks in (2, 4):
        folder = tmp_path / str(blocks)
        with_blocks(hf_config, blocks).save_pretrained(folder)
        keys = f"model_id={folder}", "gradient_checkpointing=1.0"
        peaks.append(peak(memory_forecast(load_config(LORA, *keys), 305)))
    assert load_config(LORA).gradient_checkpointing == 1.0 and load_config(LORA).rows_per_step == 96
    per_block = (peaks[1] - peaks[0]) / 2
    assert peaks[0] + per_block * (hf_config.num_hidden_layers - 2) < 22 * GIB
