"""run_seeds.sh: combinations of values, runs side by side, one table; it goes on when stopped."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from analysis import __main__ as analysis
from analysis import runs, seeds
from analysis.runs import OUTCOME, Cell, Outcome, RunFailed, run_all
from utils import UserError


@pytest.mark.parametrize(
    "value, expected",
    [
        ("1", ["1"]),
        ("0,1, 2", ["0", "1", "2"]),
        ("[0, 2],all", ["[0, 2]", "all"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("{a: 1, b: 2}", ["{a: 1, b: 2}"]),
        ("", [""]),
        ("owner/name:split,b c.json", ["owner/name:split", "b c.json"]),
        ("/home/o'brien/rows.json", ["/home/o'brien/rows.json"]),
        ("[[0, 1], [2, 3]]", ["[[0, 1], [2, 3]]"]),
        ("a[b,c", ["a[b,c"]),
        ("x{", ["x{"]),
        ("a]b", ["a]b"]),
    ],
)
def test_commas_part_values_outside_brackets(value, expected):
    assert seeds.pieces(value) == expected


def test_combinations_are_all_of_them_seed_by_seed(workspace):
    files = [str(workspace.yaml())]
    plan = seeds.combinations(files, {"lr": "1e-3,1e-4", "seed": "3,4", "bf16": "False"}, "run")
    assert [(setting, seed) for setting, seed, _ in plan] == [
        ("lr=1e-3", 3),
        ("lr=1e-4", 3),
        ("lr=1e-3", 4),
        ("lr=1e-4", 4),
    ]
    *_, (_, _, arguments) = plan
    assert arguments[-1] == "name=run-lr-1e-4-seed-4"
    assert {"lr=1e-4", "seed=4", "bf16=False", *files} < {*arguments}


def test_two_runs_of_one_name_are_refused(workspace):
    with pytest.raises(UserError, match="two runs have this name"):
        seeds.combinations([str(workspace.yaml())], {"lr": "1e-3,1e-3", "seed": "0"}, "run")


def outcome_of(folder: Path, seed: int, right: list[bool], **more) -> Outcome:
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    rows = [
        dict(row=row, question=f"q{row}", gold_answer="1", correct=correct)
        for row, correct in enumerate(right)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy = sum(right) / len(right)
    return Outcome([], accuracy, more.get("by_latents", {}), 2.0, 1.0, 4, [(1, 0, 0.5)], str(path))


def test_the_table_pairs_questions_of_all_seeds(tmp_path):
    """The second setting has row 1 right and row 0 wrong where the first has the opposite, of two
    seeds alike; row 3 it alone has right: by hand, one question against two, p 1."""
    settings = {
        "a=1": {s: outcome_of(tmp_path, s, [True, False, True, False]) for s in (0, 1)},
        "a=2": {
            s: outcome_of(tmp_path, s, [False, True, True, True], by_latents={"0": 0.25})
            for s in (0, 1, 2)
        },
    }
    first, second = seeds.markdown(settings).splitlines()[2:]
    assert first == "| a=1 | 2 | 50.0 ± 0.0 | 50.0 | - | 2.0 ± 0.0 | - | - |"
    assert second.startswith("| a=2 | 3 | 75.0 ± 0.0 | 75.0 | 25.0 ± 0.0 | 2.0 ± 0.0 | +25.0% [")
    assert second.endswith("| 1 |")


def test_settings_that_were_asked_different_rows_are_not_paired(tmp_path):
    """val_path=a.json,b.json: after the last run there was an error instead of a table."""
    settings = {
        "val_path=a.json": {0: outcome_of(tmp_path, 0, [True, False])},
        "val_path=b.json": {0: outcome_of(tmp_path, 0, [True, False, True, True])},
    }
    _, second = seeds.markdown(settings).splitlines()[2:]
    assert second == "| val_path=b.json | 1 | 75.0 | 75.0 | - | 2.0 | - | - |"


def small(workspace, **changes) -> str:
    return str(workspace.yaml(num_epochs=2, max_latent_stage=1, **changes))


@pytest.mark.slow
def test_runs_side_by_side_end_in_one_table_and_are_not_done_again(workspace, capsys):
    path = small(workspace)
    command = ["seeds", path, "lr=1e-3,1e-2", "--jobs", "2", "--sweep"]
    assert analysis.main(command) == 0
    folder = workspace.folder / "out" / "run-lr-seeds"  # of other keys: another table
    text = (folder / "table.md").read_text()
    assert text.count("| lr=1e-") == 2 and text.splitlines()[2] in capsys.readouterr().out
    table = json.loads((folder / "table.json").read_text())["settings"]
    assert set(table) == {"lr=1e-3", "lr=1e-2"} and set(table["lr=1e-3"]) == {"0"}
    outcome = table["lr=1e-2"]["0"]
    assert set(outcome["by_latents"]) == {"0", "2"} and outcome["steps"] == 6
    assert [stage for _, stage, _ in outcome["epochs"]] == [1, 1]
    written = {file: file.stat().st_mtime_ns for file in folder.parent.glob("*/metrics.jsonl")}
    assert len(written) == 4
    assert analysis.main(command) == 0
    assert " 0/2 " not in (shown := capsys.readouterr().err) and " 2/2 " in shown
    assert all(file.stat().st_mtime_ns == at for file, at in written.items())
    assert analysis.main([*command, "weight_decay=0.1"]) == 2
    assert "was made with other settings (weight_decay: 0.01)" in capsys.readouterr().err
    rows = Path(workspace.values["train_path"])
    rows.write_text(json.dumps(json.loads(rows.read_text())[1:]))  # the same command, other rows
    assert analysis.main(command) == 2
    assert "train.json or " in (error := capsys.readouterr().err) and "changed since" in error
    small(workspace, lr_schedule="cosine")  # and another file
    assert analysis.main(command) == 2
    assert "was made with other settings (lr_schedule: constant)" in capsys.readouterr().err


def test_a_sweep_over_another_key_has_another_table(workspace, monkeypatch):
    """It replaced the one before."""
    outcome = Outcome([], 0.5, {}, 1.0, 1.0, 1, [(1, 0, 0.5)], "")
    monkeypatch.setattr(seeds, "run_all", lambda cells, *_: [outcome] * len(cells))
    monkeypatch.setattr(seeds, "compare_seeds", lambda *_: None)
    for key in ("lr=1e-3,1e-2", "weight_decay=0.1,0.2", "seed=0,1"):
        assert analysis.main(["seeds", small(workspace), key]) == 0
    tables = (workspace.folder / "out").glob("*/table.md")
    assert sorted(path.parent.name for path in tables) == [
        "run-lr-seeds",
        "run-seeds",
        "run-weight_decay-seeds",
    ]


@pytest.mark.slow
def test_a_sweep_that_is_asked_for_later_is_made(workspace, capsys):
    command = ["seeds", small(workspace), "seed=0"]
    path = workspace.folder / "out/run-seeds/table.json"
    swept = []
    for more in ([], ["--sweep"]):
        assert analysis.main([*command, *more]) == 0
        table = json.loads(path.read_text())["settings"]
        swept.append((table["all"]["0"]["swept"], set(table["all"]["0"]["by_latents"])))
    assert swept == [(False, {"0"}), (True, {"0", "2"})]


@pytest.mark.parametrize(
    "keys",
    [
        ["skip_validation=True"],
        ["only_eval=True", "load_model_path=x"],
        ["save_only_improve=True", "--sweep"],
    ],
)
def test_runs_without_an_accuracy_or_a_checkpoint_to_sweep_are_not_begun(workspace, capsys, keys):
    assert analysis.main(["seeds", small(workspace), "seed=0,1", *keys]) == 2
    assert keys[0].partition("=")[0] in capsys.readouterr().err
    assert not (workspace.folder / "out").exists()


def test_nothing_starts_after_a_failure(workspace, monkeypatch):
    """The place of a run that fails is free before all others know of it."""
    script = workspace.folder / "fails.py"
    script.write_text(
        "import pathlib, sys\n"
        f"pathlib.Path({str(workspace.folder)!r}, sys.argv[2] + '.began').touch()\n"
        "sys.exit(1)\n"
    )
    monkeypatch.setattr(runs, "RUN", script)
    path = small(workspace)
    for trial in range(5):
        cells = [Cell((path, f"name={trial}-{number}")) for number in range(4)]
        with pytest.raises(RunFailed, match=f"{trial}-0 ended with exit code 1"):
            run_all(cells, "runs", jobs=1)
    began = {file.name for file in workspace.folder.glob("*.began")}
    assert began == {f"name={trial}-0.began" for trial in range(5)}


def test_a_signal_that_nohup_ignores_stays_ignored(workspace, monkeypatch, request):
    """A study in the background ended with the terminal that it was started from."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    meanwhile, outcome = [], Outcome([], 0.5, {}, 1.0, 1.0, 1, [(1, 0, 0.5)], "")

    def run_cell(cell, processes):
        meanwhile.extend(signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM))
        return outcome

    monkeypatch.setattr(runs, "_run_cell", run_cell)
    assert run_all([Cell((small(workspace),))], "runs", jobs=1) == [outcome]
    assert meanwhile[0] is signal.SIG_IGN and callable(meanwhile[1])
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_wrong_value_is_found_before_anything_runs(workspace, capsys):
    assert analysis.main(["seeds", small(workspace), "lr=1e-3,-1", "seed=0,1"]) == 2
    assert "lr: -1.0 is below 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        analysis.main(["seeds", small(workspace), "--jobs", "0"])
    assert ended.value.code == 2 and "--jobs: 0 is below 1" in capsys.readouterr().err
    assert not (workspace.folder / "out").exists()


@pytest.mark.slow
def test_the_first_failure_ends_all(workspace):
    good = (small(workspace), "name=good", "num_epochs=50")
    bad = (good[0], "name=bad", f"train_path={workspace.folder}/none.json")
    with pytest.raises(RunFailed, match="none.json") as failure:
        run_all([Cell(good), Cell(bad)], "runs", jobs=2)
    assert failure.value.code == 2
    assert not (workspace.folder / "out/good" / OUTCOME).exists()


SHARES = [(None, 2, 3, "4 1"), (None, None, 1, "8 1"), (None, 4, 0, "8 1"), ("3", 2, 2, "3 None")]


@pytest.mark.parametrize("own, jobs, left, wanted", SHARES)
def test_runs_side_by_side_share_the_cores(tmp_path, monkeypatch, own, jobs, left, wanted):
    """A single one has all of them; a user's own number of threads stays."""
    script = tmp_path / "threads.py"
    names = ["OMP_NUM_THREADS", runs.SHARED_CORES]
    script.write_text(
        "import os, sys\n"
        f"print(*map(os.environ.get, {names}), file=open(sys.argv[1], 'w'), end='')\n"
    )
    monkeypatch.setattr(runs, "RUN", script)
    monkeypatch.setattr(runs, "count_cores", lambda: 8)
    monkeypatch.setattr(runs, "count_gpus", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    runs.Processes(jobs, left).run("threads", [str(tmp_path / "threads.txt")])
    assert (tmp_path / "threads.txt").read_text() == wanted


@pytest.mark.slow
def test_a_signal_saves_every_run_and_the_same_command_goes_on(workspace):
    path = small(workspace)
    arguments = [path, "seed=0,1", "num_epochs=3", "--jobs", "2"]
    command = [sys.executable, "-m", "analysis", "seeds", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    out = workspace.folder / "out"
    while not all((out / f"run-seed-{seed}/checkpoint_1").exists() for seed in (0, 1)):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == runs.EXIT_STOPPED, process.stderr.read()
    assert not (out / "run-seeds/table.md").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (out / "run-seeds/table.md").read_text().count("| all | 2 |") == 1
