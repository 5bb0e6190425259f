"""engine/logs.py: metric records, wandb with and without an account, TensorBoard."""

import dataclasses
import json
import logging
import os
import pty
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
import wandb
from conftest import ROOT

import run
from engine import logs, loop
from engine.distributed import World
from engine.logs import Metrics, TensorBoard, start_wandb
from rules import make_config
from utils import Config, log


def good(**changes) -> Config:
    values = dict(name="a", save_path="out", model_id="m", train_path="t", val_path="v")
    return make_config({**values, "coconut": True, **changes}, "test")


# ------------------------------------------------------------------------------- the log


@pytest.mark.parametrize(
    "rank, num_nodes, level", [(0, 1, "INFO"), (1, 1, "ERROR"), (2, 2, "WARNING"), (3, 2, "ERROR")]
)
def test_a_node_warns_once(tmp_path, request, rank, num_nodes, level):
    """All processes come to most warnings; the one of a collapse stood there for each of them."""
    request.addfinalizer(lambda: log.setLevel(logging.INFO))  # of the tests that follow
    world = World(rank, 2 * num_nodes, torch.device("cpu"), num_nodes)
    with logs.logging_to(tmp_path, world):
        assert logging.getLevelName(log.level) == level


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


def test_every_set_and_every_forced_number_has_curves_of_its_own(tmp_path):
    """Else the last accuracy of a run is the one without latents, in wandb's summary too."""
    pytest.importorskip("tensorboard")
    mirror, path = Recorder(), tmp_path / "metrics.jsonl"
    metrics = Metrics(path, mirror, TensorBoard(path))
    named = {}
    for kind, eval_set in (("eval", None), ("eval_set", "svamp"), ("eval_set", "gsm_hard")):
        for forced in (None, 0, 2):
            group = "eval" if eval_set is None else f"eval_set_{eval_set}"
            group += "" if forced is None else f"_latents_{forced}"
            named[f"{group}/accuracy"] = accuracy = len(named) / 16
            about = {} if eval_set is None else {"eval_set": eval_set}
            metrics.write(
                kind=kind, forced_latents=forced, global_step=7, accuracy=accuracy, **about
            )
    metrics.close()
    logged = {name: value for record in mirror.records for name, value in record.items()}
    assert {name: v for name, v in logged.items() if name.endswith("/accuracy")} == named
    events = {k: v for k, v in read_events(tmp_path).items() if k.endswith("/accuracy")}
    assert events == {name: {7: [value]} for name, value in named.items()}


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
    broken = dict(loss=float("nan"), grad_norm=float("inf"), latent_norms=[1.5, float("nan")])
    metrics.write(kind="train", **broken)
    metrics.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert (record["loss"], record["grad_norm"]) == ("nan", "inf")
    assert record["latent_norms"] == [1.5, "nan"]


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


def test_a_run_folder_is_one_run_at_wandb(no_account, tmp_path):
    """Over restarts; but not the next folder of that path."""
    no_account.setenv("WANDB_MODE", "offline")
    config, ids = wandb_config(tmp_path), []
    try:
        for delete in (False, False, True):
            if delete:
                shutil.rmtree(config.run_dir)
                config.run_dir.mkdir()
            ids.append(start_wandb(config).id)
            wandb.finish()
    finally:
        wandb.teardown()
    assert ids[0] == ids[1] != ids[2]


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


# ------------------------------------------------------------------------------- TensorBoard


def read_events(folder) -> dict[str, dict[int, list[float]]]:
    """What TensorBoard shows of the event files of a folder: values by tag and step."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    values = defaultdict(lambda: defaultdict(list))
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            values[tag][event.step].append(event.value)
    return {tag: dict(steps) for tag, steps in values.items()}


def expected_events(path) -> dict[str, dict[int, list[float]]]:
    """The same of metrics.jsonl: each number once."""
    values = defaultdict(lambda: defaultdict(list))
    for record in map(json.loads, path.read_text().splitlines()):
        forced = record.get("forced_latents")
        group = record["kind"] if forced is None else f"{record['kind']}_latents_{forced}"
        for name, value in record.items():
            if isinstance(value, int | float):
                values[f"{group}/{name}"][record["global_step"]].append(pytest.approx(value))
    return {tag: dict(steps) for tag, steps in values.items()}


def test_event_files_hold_each_step_once_after_an_interruption(tmp_path):
    """The run wrote up to step 4, was killed and goes on from a checkpoint after step 2, whose
    evaluation was not recorded."""
    pytest.importorskip("tensorboard")
    path = tmp_path / "metrics.jsonl"

    def write(steps, evaluated) -> None:
        metrics = Metrics(path, None, TensorBoard(path))
        for step in steps:
            metrics.write(kind="train", global_step=step, loss=1 / step, note="text")
            if step in evaluated:
                for forced in (None, 0):
                    figures = dict(global_step=step, forced_latents=forced, accuracy=0.5)
                    metrics.write(kind="eval", **figures)
        # on disk before it is closed, as a kill leaves it
        assert read_events(tmp_path)["train/loss"][steps[-1]] == [pytest.approx(1 / steps[-1])]
        metrics.close()

    write([1, 2, 3, 4], evaluated=[2])
    kept = path.read_text().splitlines()[:2]
    path.write_text("\n".join(kept) + "\n")
    assert len(read_events(tmp_path)["train/loss"]) == 4
    write([3, 4, 5], evaluated=[4])
    events = read_events(tmp_path)
    assert events == expected_events(path)
    assert sorted(events["train/loss"]) == [1, 2, 3, 4, 5] and "train/note" not in events
    assert sorted(events["eval/accuracy"]) == sorted(events["eval_latents_0/accuracy"]) == [4]


def test_a_run_that_goes_on_has_event_files_of_its_metrics(workspace, monkeypatch):
    """Epoch 2 is trained twice, the first time in vain."""
    pytest.importorskip("tensorboard")
    path = workspace.yaml(num_epochs=2, tensorboard=True, eval_subset_size=1, max_new_tokens=1)
    save = loop.save

    def save_once(*args) -> None:
        if args[3] == 2:
            raise RuntimeError("killed")
        save(*args)

    monkeypatch.setattr(loop, "save", save_once)
    with pytest.raises(RuntimeError, match="killed"):
        run.main([str(path)])
    monkeypatch.undo()
    assert run.main([str(path)]) == 0
    assert len(list(workspace.run_dir.glob("events.out.tfevents.*"))) == 2
    events = read_events(workspace.run_dir)
    assert events == expected_events(workspace.run_dir / "metrics.jsonl")
    assert sorted(events["train/lr"]) == [1, 2, 3, 4, 5, 6] and len(events["eval/loss"]) == 2


def test_tensorboard_that_is_not_installed_is_a_line(workspace, monkeypatch, capsys):
    """Named with what else is wrong, before anything is written."""
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    path = workspace.yaml(tensorboard=True, train_path="missing.json")
    assert run.main([str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and errors[0].startswith("error: tensorboard: the package is not")
    assert not workspace.run_dir.exists()
