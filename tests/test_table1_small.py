"""benchmarks/table1_small.sh --quick: every method trains, the table is whole, it resumes."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from table1_small import METHODS, TITLES, WITH_THOUGHTS, Reliance, bars_of, markdown

from analysis.runs import OUTCOME, Outcome


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
        "| Coconut | 80.0 ± 10.0 | 25.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 35.4 | 2.0 ± 0.0 | 10 ± 0 "
        "| 87.5 | 10.0 | 90.0 | - | 2.0 | 10 |"
    )
    assert "| CoT | 50.0 | - | 80.0 | 12.5 | 2.0 | 10 | 50.0 | - | - | - | 2.0 | 10 |" in lines


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
