"""The time forecast: what it counts, and that its report runs."""

import json
import string
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import forecast
import memory
import roofline
from memory import GIB, full_batch, peak
from memory import forecast as memory_forecast
from operators import Kernel, counted_kernels, fused_norms
from parts import QWEN3_4B, small_config, word_tokenizer
from peak import write_training
from roofline import (
    MACHINES,
    Machine,
    Said,
    Shape,
    by_blocks,
    machine_of,
    seconds_of,
    time_of_micro_batch,
    with_blocks,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import layers
from engine.checkpoint import checkpoint_bytes, run_bytes
from engine.pretrained import load_hf_config
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


SAID = Said(labels=30, tokens=24, sequences=6, width=7)


@pytest.mark.slow
@pytest.mark.parametrize("step_loss, said", [("none", None), ("decoder", SAID)])
def test_more_blocks_take_what_one_more_takes(step_loss, said):
    """Three, counted, are what models of one and two say; of a decoder's too."""
    hf_config, shape = small_config(500, 3, 128), Shape(4, 10, 3, 8)
    keys = (f"step_loss={step_loss}",)
    config = load_config(CONFIG, *keys, "gradient_checkpointing=0.5")

    def count(blocks: int) -> list[Kernel]:
        fake = roofline.fake_model(config, hf_config, blocks, 0.0, on_gpu=True)
        with fake as (model, of_thoughts):
            batch, targets = roofline.zero_batch(*shape), said and roofline.zero_targets(*said)
            loss = lambda: memory.training_loss(model, of_thoughts, batch, targets)
            return counted_kernels(lambda: loss().backward())

    assert by_blocks(count, GPU, 3) == pytest.approx(seconds_of(count(3), GPU))
    kept, half, again = (
        time_of_micro_batch(
            load_config(CONFIG, *keys, f"gradient_checkpointing={s}"), hf_config, shape, GPU, said
        )
        for s in (0.0, 0.5, 1.0)
    )
    assert kept.total < half.total == pytest.approx((kept.total + again.total) / 2)
    assert again.kernels < 1.6 * kept.kernels


@pytest.mark.parametrize("step_loss", ["head", "decoder"])
def test_thoughts_say_what_those_of_the_rows_say(tmp_path, step_loss):
    """In the time forecast what the rows' do; in the memory forecast, whose rows are made up, as
    much where a row's thoughts stand for as many tokens as follow them."""
    length = 40
    path = write_training(tmp_path, length, 1024, 2, 128, rows=8, step_loss=step_loss)
    config = load_config(path)
    said = forecast.look_at_stage(config, forecast.read_rows(config, None), 1, gpus=1).said
    _, targets = full_batch(config, length)
    sizes = (targets.index, targets.tokens, targets.sequences)
    assert said == (*map(len, sizes), targets.sequences.shape[1])
    assert len(targets.index) == len(targets.labels) == len(targets.weights) == said.labels
    suffix = length - 6 - int(0.6 * (length - 6))
    eight_rows = {
        "head": (8 * 6, 0, 0, 0),  # a token for each latent
        "decoder": (8 * (suffix + 1), 8 * suffix, 8, 6 + suffix),  # and eos; after the latents
    }
    assert said == eight_rows[step_loss]


@pytest.mark.parametrize("draws", ["stage_mixing=linear", "uniform_prob=0.9"])
def test_rows_at_other_stages_are_as_long_as_they_are_trained(tmp_path, draws):
    """They keep steps that the stage of the epoch skips."""
    path = write_training(tmp_path, 40, 1024, 2, 128, rows=8, max_seq_length=100)
    plain, drawn = load_config(path), load_config(path, draws)
    suffixes = [
        forecast.look_at_stage(config, forecast.read_rows(config, None), 1, gpus=1).shape.suffix
        for config in (plain, drawn)
    ]
    assert suffixes[0] < suffixes[1]


@pytest.mark.slow
def test_a_run_with_a_decoder_and_a_gate(tmp_path, capsys):
    """The decoder's passes, update and bytes on the disk; what the gate answers after an epoch,
    as long as validation's rows. Neither was counted."""
    path = write_training(tmp_path, 40, 1024, 2, 128, rows=8, max_seq_length=100)
    rows_path = tmp_path / "rows.json"  # the gate's questions are not trained on: no two are equal
    rows = [
        {**row, "question": row["question"].replace("word", letter, 1)}
        for letter, row in zip(string.ascii_letters, json.loads(rows_path.read_text()))
    ]
    rows_path.write_text(json.dumps(rows))
    keys = "skip_validation=False", f"val_path={rows_path}", "num_epochs=2"
    plain = load_config(path, *keys)
    config = load_config(path, *keys, "step_loss=decoder", "advance_at=0.9", "gate_rows=8")
    hf_config, count = load_hf_config(config), lambda model: sum(p.numel() for p in model)
    rows = forecast.read_rows(config, None)
    assert (len(rows.train), len(rows.gate), len(rows.validation)) == (24, 8, 32)
    settings = [forecast.make_setting(c, hf_config, rows, GPU, 1) for c in (plain, config)]
    base = AutoModelForCausalLM.from_config(hf_config)
    beside = count([*base.model.layers.parameters(), *base.model.norm.parameters()])
    numbers = count(base.parameters())
    assert [s.numbers for s in settings] == [numbers, numbers + beside]
    assert [s.beside for s in settings] == [0, beside]
    assert settings[1].update > settings[0].update
    first, last = (forecast.forecast_epoch(config, settings[1], stage) for stage in (0, 1))
    without = forecast.forecast_epoch(plain, settings[0], 1)
    assert last.step.passes.kernels > without.step.passes.kernels
    assert first.gate == pytest.approx(first.validation / 4) and first.gate > 0
    assert last.gate == without.gate == 0 and last.validation == without.validation
    written = sum(checkpoint_bytes(numbers + beside, config))
    assert last.checkpoint == written / GPU.disk
    forecast.print_run(config, {0: first, 1: last}, Counter({0: 1, 1: 1}), settings[1])
    size, _ = run_bytes(numbers, config, 2, beside)
    report = capsys.readouterr().out
    assert f"| disk, 2 checkpoints at once, GB | {size / 1e9:.3g} |" in report
    assert f"| gate, hours | {first.gate / 3600:.3g} |" in report
    forecast.print_run(plain, {1: without}, Counter({1: 2}), settings[0])
    assert "gate" not in capsys.readouterr().out


@pytest.mark.parametrize("keys", [(), ("rows_per_step=12", "gradient_accumulation_steps=1")])
def test_what_would_change_a_step_leaves_its_rows(tmp_path, monkeypatch, capsys, keys):
    """Of smaller micro-batches the step had half the rows, and looked twice as fast."""
    text = {"batch_size_training": 8, "gradient_accumulation_steps": 3, "coconut": True}
    text |= dict(name="a", save_path="out", model_id="m", train_path="t", val_path="v")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(text))
    config, seen = load_config(tmp_path / "a.yaml", *keys), []

    def look(changed, setting, number):
        seen.append((changed.batch_size_training, changed.step_rows(setting.gpus)))
        return SimpleNamespace(total=1.0, stage=SimpleNamespace(micro_batches=1))

    monkeypatch.setattr(forecast, "forecast_step", look)
    monkeypatch.setattr(forecast, "longest_row", lambda *_: 100)
    monkeypatch.setattr(forecast, "forecast", lambda *_: {})
    monkeypatch.setattr(forecast, "peak", lambda _: 1.0)
    forecast.print_changes(config, SimpleNamespace(rows=None, gpus=2, machine=GPU), 0)
    assert {size for size, _ in seen} == {4, 8, 16}
    assert {rows for _, rows in seen} == {config.step_rows(2)}


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
    others = ["CPU, a rehearsal", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB"]
    others += ["NVIDIA RTX A1000 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU"]
    assert not any(machine_of(card) for card in others)


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
