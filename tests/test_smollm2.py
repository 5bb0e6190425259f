"""Real weights and real rows: stage 0 of SmolLM2-135M is the library's own forward; the flow of
benchmarks/smollm2.py, with a tiny model.

COCONUT_TEST_SMOLLM2 names a folder with the weights (benchmarks/smollm2.md says how to get one) and
COCONUT_TEST_DATA one with GSM8K's gsm8k_train.jsonl; without both the first test skips.
"""

import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_rows
from numerics import assert_as_exact_as, exact, roundings

sys.path.append(str(ROOT / "benchmarks"))
import smollm2

from dataset import collate
from engine.model import build_model
from engine.preflight import gather_inputs
from loader import load_config

ROWS = 3


def outcome(model, loss) -> dict:
    """The loss and every gradient, by name."""
    loss.backward()
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters()}}


def library_outcome(model, seen, labels) -> dict:
    """The library's forward in the model's type, and its loss in float64: in float32, where the
    library computes it even of a float64 model, 49,152 logits are summed to five digits."""
    logits = model(**seen).logits  # (B, T, V)
    return outcome(model, F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels))


@pytest.mark.slow
def test_stage_0_is_the_librarys_own_forward(test_data, tmp_path):
    folder = os.environ.get("COCONUT_TEST_SMOLLM2")
    if not folder:
        pytest.skip("COCONUT_TEST_SMOLLM2 is not set")
    lines = (test_data / "gsm8k_train.jsonl").read_text().splitlines()[:ROWS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    keys = (f"model_id={folder}", f"train_path={tmp_path / 'train.jsonl'}", f"save_path={tmp_path}")
    columns = "data_columns={steps: answer}"
    config = load_config(
        ROOT / "args/gsm8k_coconut_smollm2.yaml", *keys, columns, "skip_validation=True"
    )
    inputs = gather_inputs(config)
    samples = inputs.train_dataset(epoch=1)
    batch = collate([samples[row] for row in range(ROWS)], inputs.pad_id)

    model = build_model(inputs).train()
    base = model.base_causallm
    assert sum(p.numel() for p in base.parameters()) > 134e6
    # rows without latents are padded on the right alone
    seen = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    labels = batch.labels[:, 1:].flatten()
    with torch.no_grad():
        whole = base(**seen, labels=batch.labels).loss
    naive = [library_outcome(twin, seen, labels) for twin in roundings(base)]
    truth = library_outcome(exact(base), seen, labels)
    assert truth["loss"] > 1 and (labels != -100).sum() > 50
    ours = outcome(base, model(**batch.inputs()).loss)
    assert_as_exact_as(ours, naive, truth)
    assert_as_exact_as({"loss": ours["loss"]}, [{"loss": whole}], {"loss": truth["loss"]})


def test_rows_that_are_missing_are_a_line(tmp_path, monkeypatch, capsys):
    """With the command that makes them, and before anything is written."""
    command = ["smollm2.py", "--model=m", f"--data={tmp_path}", f"--output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", command)
    assert smollm2.main() == 2
    assert "gsm8k_train.json: no such file; `TARGET_SIZE=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_study_is_whole(model_folder, tmp_path, monkeypatch):
    """With adapters alone, to save time."""
    for split, count in {"train": 20, "validation": 4}.items():
        (tmp_path / f"gsm8k_{split}.json").write_text(json.dumps(tiny_rows(count)))
    output = tmp_path / "out"
    monkeypatch.setattr(smollm2, "RUNS", {"lora": smollm2.RUNS["lora"]})
    command = ["smollm2.py", f"--model={model_folder}", f"--data={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*command, f"--output_dir={output}"])
    assert smollm2.main() == 0
    table = (output / "table.md").read_text()
    names = [line.split(" |")[0] for line in table.splitlines() if line.startswith("| ")]
    assert names == ["| weights", "| before", "| lora", "| run", "| lora"]
    assert table.count(" tokens |") == 2 * 3
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
