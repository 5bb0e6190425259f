"""engine/logs.py: metric records, wandb with and without an account."""

import dataclasses
import json
import logging
import os
import pty
import subprocess
import sys

import pytest
import wandb
from conftest import ROOT

from engine.logs import Metrics, start_wandb
from utils import Config, make_config


def good(**changes) -> Config:
    values = dict(name="a", save_path="out", model_id="m", train_path="t", val_path="v")
    return make_config({**values, "coconut": True, **changes}, "test")


# ------------------------------------------------------------------------------- metrics


class Recorder:
    """What Metrics needs of a wandb run."""

    def __init__(self):
        self.records, self.finished = [], False

    def log(self, record):
        self.records.append(record)

    def finish(self):
        self.finished = True


def test_metrics_are_one_json_object_a_line_and_mirrored(tmp_path):
    mirror = Recorder()
    metrics = Metrics(tmp_path / "metrics.jsonl", mirror)
    metrics.write(kind="train", step=1, loss=2.5, note="text")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # on disk before close
    metrics.close()
    (record,) = map(json.loads, lines)
    assert record.pop("time") > 1.6e9
    assert record == {"kind": "train", "step": 1, "loss": 2.5, "note": "text"}
    assert mirror.records == [{"train/step": 1, "train/loss": 2.5}] and mirror.finished


def test_metrics_append(tmp_path):
    for step in (1, 2):
        metrics = Metrics(tmp_path / "m.jsonl")
        metrics.write(kind="train", step=step)
        metrics.close()
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_metrics_hold_no_token_that_is_not_json(tmp_path):
    """A loss that is not finite must not make a line that strict readers refuse (NaN)."""
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write(kind="train", loss=float("nan"), grad_norm=float("inf"))
    metrics.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)


# ------------------------------------------------------------------------------- wandb


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """A home without a wandb login, nothing about wandb in the environment."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return monkeypatch


def wandb_config(tmp_path) -> Config:
    config = good(save_path=str(tmp_path), project="tests")
    config.run_dir.mkdir(parents=True)
    return config


@pytest.mark.parametrize(
    "name, value", [("WANDB_DISABLED", "true"), ("WANDB_DISABLED", "1"), ("WANDB_MODE", "disabled")]
)
def test_wandb_switched_off(no_account, tmp_path, name, value):
    """wandb 0.31 no longer reads WANDB_DISABLED by itself."""
    no_account.setenv(name, value)
    no_account.setenv("WANDB_API_KEY", "0" * 40)  # it would talk to the network
    assert start_wandb(wandb_config(tmp_path)) is None


def test_wandb_offline(no_account, tmp_path):
    no_account.setenv("WANDB_MODE", "offline")
    config = wandb_config(tmp_path)
    try:
        metrics = Metrics(config.run_dir / "metrics.jsonl", start_wandb(config))
        metrics.write(kind="train", loss=1.0)
        metrics.close()
    finally:
        wandb.teardown()
    assert list(config.run_dir.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "name, value",
    [("WANDB_INIT_TIMEOUT", "abc"), ("WANDB_MODE", "sideways"), ("WANDB_RESUME", "perhaps")],
)
def test_settings_that_wandb_rejects_are_a_line(no_account, tmp_path, caplog, name, value):
    no_account.setenv("WANDB_MODE", "offline")
    no_account.setenv(name, value)
    try:
        assert start_wandb(wandb_config(tmp_path)) is None
    finally:
        wandb.teardown()
    (record,) = [r for r in caplog.records if "training goes on without it" in r.message]
    assert "no account found" not in record.message and "\n" not in record.message


def test_a_project_that_wandb_rejects_is_told_as_that(no_account, tmp_path, caplog):
    no_account.setenv("WANDB_MODE", "Offline")  # in any case
    config = dataclasses.replace(wandb_config(tmp_path), project="a/b")
    try:
        assert start_wandb(config) is None
    finally:
        wandb.teardown()
    assert "a/b" in caplog.text and "no account found" not in caplog.text


def test_wandb_without_account_goes_on_without_it(no_account, tmp_path, caplog):
    """`wandb.Api()` raises UsageError where no key is known, which once ended the training."""
    caplog.set_level(logging.INFO)
    try:
        assert start_wandb(wandb_config(tmp_path)) is None
    finally:
        wandb.teardown()
    assert "wandb: no account found" in caplog.text


def test_wandb_never_prompts_at_a_terminal(no_account, tmp_path):
    """At a real terminal wandb asks for a key and waits; a training must not."""
    config = wandb_config(tmp_path)
    (tmp_path / "x.yaml").write_text(config.to_yaml())
    program = (
        "import sys; from engine.logs import start_wandb; from loader import load_config;"
        "print(start_wandb(load_config(sys.argv[1])))"
    )
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", program, str(tmp_path / "x.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    try:
        assert process.wait(timeout=60) == 0
        assert "None" in os.read(master, 10_000).decode()
    finally:
        process.kill()
        os.close(master)
