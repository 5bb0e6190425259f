"""benchmarks/table1_small.sh --quick: every method trains, the table is whole, it resumes."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import reliability
import table1_small
from table1_small import (
    METHODS,
    TITLES,
    WITH_THOUGHTS,
    Reliance,
    bars_of,
    describe_ends,
    exit_code,
    markdown,
    rely,
)

from analysis.runs import OUTCOME, Outcome, RunFailed
from utils import UserError


def outcome(accuracy: float = 0.5, without: float | None = None) -> Outcome:
    by_latents = {} if without is None else {"0": without}
    return Outcome([], accuracy, by_latents, 2.0, 10.0, 4, [(1, 0, accuracy)], "results.jsonl")


def test_markdown_has_means_and_deviations():
    table = {(task, m, 0): outcome() for m in METHODS for task in TITLES if m != "Coconut"}
    for seed, accuracy in enumerate((0.7, 0.8, 0.9)):
        table["prosqa", "Coconut", seed] = outcome(accuracy, 0.25)
    table["stories", "Coconut", 0] = outcome(0.875, 0.1)
    reliance = {
        ("prosqa", "Coconut", 0): Reliance(0.5, 0.75),
        ("prosqa", "Coconut", 1): Reliance(0.5, 0.25),
        ("stories", "Coconut", 0): Reliance(0.9, None),
        ("prosqa", "CoT", 0): Reliance(0.8, 0.125),
    }
    lines = markdown(table, reliance).splitlines()
    assert len(lines) == 2 + len(METHODS)
    (line,) = [line for line in lines if line.startswith("| Coconut |")]
    assert line == (
        "| Coconut | 80.0 ± 10.0 | 1: 0 | 25.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 35.4 | 2.0 ± 0.0 "
        "| 10 ± 0 | 87.5 | 1: 0 | 10.0 | 90.0 | - | 2.0 | 10 |"
    )
    line = "| CoT | 50.0 | 1: 0 | - | 80.0 | 12.5 | 2.0 | 10 | 50.0 | 1: 0 | - | - | - | 2.0 | 10 |"
    assert line in lines


def test_a_seed_that_a_gate_held_back_is_seen():
    ends = [[(11, 3, 0.7), (12, 3, 0.8)], [(12, 2, 0.9)]]
    outcomes = [Outcome([], 0.8, {}, 2.0, 1.0, 4, epochs, "results.jsonl") for epochs in ends]
    assert describe_ends(outcomes) == "12: 3, 12: 2"
    assert describe_ends([outcomes[0]] * 3) == "12: 3"


def test_coconut_is_asked_beside_its_control_and_the_edges_of_prosqa(monkeypatch):
    """Each report says whose it is; CoT's figures are those of the control."""
    asked = []

    def analyse(folder, *options):
        asked.append((str(folder), options))
        edits = lambda rate: {"latents": {"4": {"followed": {"rate": rate}}, "0": {}}}
        report = {"all": {"other": {"flips": 0.5}}, "edits": edits(0.75)}
        if "--cot" in options:
            report["control"] = {"rates": {"other": {"flips": 0.9}}, "edits": edits(0.25)}
        return report

    monkeypatch.setattr(table1_small, "analyse", analyse)
    runs = {m: Outcome([], 0.5, {}, 2.0, 1.0, 4, [(1, 0, 0.5)], f"{m}/r.jsonl") for m in METHODS}
    found = rely({("prosqa", method, 7): outcome for method, outcome in runs.items()})
    assert asked == [
        ("Coconut", ("--edits", "--cot", "CoT")),
        ("Coconut, recommended", ("--edits",)),
        ("- pause as thought", ("--edits",)),
    ]
    wanted = {("prosqa", method, 7): Reliance(0.5, 0.75) for method in WITH_THOUGHTS}
    assert found == wanted | {("prosqa", "CoT", 7): Reliance(0.9, 0.25)}


@pytest.mark.parametrize(
    "error, code, line",
    [
        (RunFailed("cell", 75, "stopped"), 75, "error: cell ended with exit code 75:"),
        (UserError("a folder was made with other arguments"), 2, "error: a folder was made with"),
    ],
)
def test_what_a_study_cannot_do_is_said_and_its_exit_code(capsys, error, code, line):
    def study():
        raise error

    assert exit_code(study) == code and exit_code(lambda: None) == 0
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("study", [table1_small, reliability])
@pytest.mark.parametrize("option", ["--jobs", "--seeds"])
def test_numbers_below_one_are_refused_before_anything_is_made(
    tmp_path, monkeypatch, capsys, study, option
):
    monkeypatch.setattr(sys, "argv", ["study", "--output_dir", str(tmp_path / "out"), option, "0"])
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 2 and f"{option}: 0 is below 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bars_are_what_the_table_says():
    table = {("prosqa", method, 0): outcome() for method in METHODS if method != "Coconut"}
    for seed, (accuracy, without) in enumerate(((0.7, 0.2), (0.8, 0.3), (0.9, 0.4))):
        table["prosqa", "Coconut", seed] = outcome(accuracy, without)
    bars = bars_of(table)
    assert bars["prosqa", "CoT"] == [(50.0, 0.0)]
    assert bars["prosqa", "Coconut"] == [pytest.approx((80, 10)), pytest.approx((30, 10))]
    assert {task for task, _ in bars} == {"prosqa"}


@pytest.mark.slow
def test_quick_table_is_whole_and_goes_on_where_it_stopped(tmp_path):
    command = [
        "bash",
        str(ROOT / "benchmarks/table1_small.sh"),
        "--quick",
        "--tasks",
        "stories",
        "--seeds",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True)
    cells = json.loads((tmp_path / "table.json").read_text())
    assert {(c["task"], c["method"]) for c in cells} == {("stories", m) for m in METHODS}
    assert all(0 <= c["accuracy"] <= 1 and c["seconds"] > 0 for c in cells)
    for c in cells:
        assert ("0" not in c["by_latents"]) == (c["method"] in ("CoT", "No-CoT", "- w/o thought"))
        relied = c["method"] in ("CoT", *WITH_THOUGHTS)
        assert (0 <= c["swapped"] <= 1 and c["followed"] is None) if relied else "swapped" not in c
        assert c["method"] != "- pause as thought" or c["swapped"] == 0  # they think nothing
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "table.md").read_text()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    assert len(written) == len(cells)
    (tmp_path / "stories-coconut-0" / OUTCOME).unlink()  # as if stopped before its last word
    again = subprocess.run([*command, "--jobs", "1"], check=True, capture_output=True, text=True)
    assert text in again.stdout
    changed = {
        path.parent.name for path, time in written.items() if path.stat().st_mtime_ns != time
    }
    assert changed <= {"stories-coconut-0"}
