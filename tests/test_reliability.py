"""benchmarks/reliability.sh: what is trained, how falls are counted, a whole table in minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from reliability import (
    CHANGES,
    RECIPES,
    Run,
    Transition,
    describe_falls,
    markdown,
    plan,
    plan_cell,
    transitions,
)

from analysis.runs import Outcome, run_all
from curriculum import Curriculum
from engine.logs import read_metrics
from loader import load_config


def outcome(*epochs: tuple[int, float], by_latents: dict[str, float] | None = None) -> Outcome:
    """A run of epochs with these (stage, accuracy)."""
    numbered = [(epoch, stage, accuracy) for epoch, (stage, accuracy) in enumerate(epochs, start=1)]
    return Outcome([], epochs[-1][1], by_latents or {}, 9.0, 1.0, 4, numbered, "results.jsonl")


def test_a_fall_is_counted_from_the_last_epoch_of_the_stage_before():
    found = transitions(outcome((0, 0.7), (0, 0.9), (1, 0.5), (1, 0.8), (1, 0.89), (2, 0.6)))
    assert list(found) == [
        Transition(1, pytest.approx(0.4), recovered=3),
        Transition(2, pytest.approx(0.29), recovered=None),
    ]


def test_the_table_names_every_seed():
    seeds = [
        outcome((0, 0.9), (1, 0.5), (1, 0.95), by_latents={"0": 0.1, "2": 0.95}),
        outcome((0, 0.9), (1, 0.7), (1, 0.75), by_latents={"0": 0.3, "2": 0.75}),
    ]
    text = markdown({Run("stories", "faithful", seed): o for seed, o in enumerate(seeds)})
    assert text.splitlines()[-2] == (
        "| faithful | 2 | 85.0 ± 14.1 | 75.0 | 3: 1 | 0: 20.0, 2: 85.0 | 1: 30 (2/-) |"
    )


def test_a_seed_that_never_came_to_a_stage_keeps_its_place():
    held = outcome((0, 0.9), (0, 0.9), (0, 0.9))
    came = outcome((0, 0.9), (1, 0.5), (1, 0.95))
    late = outcome((0, 0.9), (0, 0.8), (1, 0.5))
    assert describe_falls([held, came, late]) == "1: 35 (./2/-)"
    assert describe_falls([held]) == "-"


def test_a_change_that_changes_nothing_is_no_run():
    """ProsQA has one latent for each step, the stories two; the optimizer of ProsQA is never reset,
    that of the stories in each stage."""
    left_out = {
        "prosqa": {"one latent for each step", "latents one by one", "optimizer never reset"},
        "stories": {
            "two latents for each step",
            "optimizer reset in each stage",
            "step loss, head",  # that is the recommended recipe
        },
    }
    for task, missing in left_out.items():
        planned = {run.setting for run in plan(["changes"], [task], 1)}
        assert {*CHANGES} - planned == missing


def test_a_change_that_is_the_recommended_recipe_is_run_once():
    """On the stories the step loss is all of it; its seeds are the recipe's."""
    runs = plan(["recipes", "changes"], ["stories"], 5)
    assert sum(run.setting == "recommended" for run in runs) == 5
    assert Run("stories", "recommended", 0) in plan(["changes"], ["stories"], 1)
    assert not any(run.setting == "step loss, head" for run in runs)
    prosqa = {run.setting for run in plan(["changes"], ["prosqa"], 1)}
    assert {"faithful", "step loss, head"} < prosqa and "recommended" not in prosqa


@pytest.mark.parametrize("quick", [False, True])
def test_every_run_has_a_config_and_a_name_of_its_own(quick, tmp_path):
    runs = plan(["recipes", "changes"], ["prosqa", "stories"], 5)
    configs = [load_config(*plan_cell(run, tmp_path, tmp_path, quick).arguments) for run in runs]
    assert len({config.name for config in configs}) == len(runs) == len({*runs})
    assert {run.setting for run in runs} == {*RECIPES, *CHANGES}
    seeds = {(r.task, r.setting): 5 if r.setting in {*RECIPES, "faithful"} else 3 for r in runs}
    assert {key: sum((r.task, r.setting) == key for r in runs) for key in seeds} == seeds


def test_the_fixed_schedule_has_as_many_epochs_as_the_gate(tmp_path):
    """And reaches its last stage with as many of them left as it gives the others."""
    for task in ("prosqa", "stories"):
        fixed, gate = (
            load_config(*plan_cell(Run(task, setting, 0), tmp_path, tmp_path, False).arguments)
            for setting in ("as many epochs as with the gate", "gate")
        )
        assert fixed.num_epochs == gate.num_epochs and gate.advance_at is not None
        curriculum = Curriculum.from_config(fixed)
        stages = [curriculum.stage(epoch) for epoch in range(1, fixed.num_epochs + 1)]
        assert stages.count(curriculum.last_stage) >= fixed.epochs_per_stage


@pytest.mark.slow
def test_a_quick_study_is_whole(tmp_path: Path):
    command = ["bash", str(ROOT / "benchmarks/reliability.sh"), "--quick", "--seeds", "1"]
    command += ["--tasks", "stories", "--parts", "recipes", "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert {run["setting"] for run in runs} == {"faithful", *RECIPES}
    assert all(
        run["by_latents"].keys() == {"0", "2"}
        for run in runs
        if run["setting"] != "CoT" and "no thoughts" not in run["setting"]
    )
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert table.count("| 1 |") == len(runs)
    assert table.startswith("arithmetic stories (recommended: step loss, head)\n")
    change, gated = Run("prosqa", "step loss, decoder", 0), Run("prosqa", "recommended", 0)
    cell, other = (
        plan_cell(run, tmp_path / "data_quick", tmp_path, quick=True) for run in (change, gated)
    )
    outcome, with_gate = run_all([cell, other], "the other task", jobs=2)
    assert with_gate.by_latents.keys() == {"0", "2"}
    gates = read_metrics(load_config(*other.arguments).run_dir / "metrics.jsonl")
    assert [r["next_stage"] for r in gates if r["kind"] == "gate"] == [1, 2]
    assert outcome.by_latents.keys() == {"0", "1"}
    records = read_metrics(load_config(*cell.arguments).run_dir / "metrics.jsonl")
    losses = [r["step_loss"] for r in records if r["kind"] == "train"]
    assert losses[0] == 0 < losses[-1]  # at stage 0 no step is taught
    assert "| step loss, decoder | 1 |" in markdown({change: outcome})
