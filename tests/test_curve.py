"""engine/curve.py: what curve.png is drawn from, and that it is drawn."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import run
from analysis import __main__ as analysis
from engine import loop
from engine.curve import draw_curves, names_of, read_curve, smooth
from utils import UserError


def training(epoch: int, step: int, loss: float | str, stage: int = 0) -> dict:
    return dict(kind="train", epoch=epoch, step=step, loss=loss, stage=stage)


def evaluation(epoch: int, rate: float, stage: int = 0, forced: int | None = None, **more) -> dict:
    interval = dict(accuracy_low=rate - 0.1, accuracy=rate, accuracy_high=rate + 0.1)
    latents = str(2 * stage if forced is None else forced)
    figures = dict(kind="eval", epoch=epoch, stage=stage, forced_latents=forced, latents=latents)
    return figures | interval | more


RECORDS = [
    training(1, 1, 4.0),
    training(1, 2, 3.0),
    evaluation(1, 0.5, loss=2.5),
    training(2, 1, "nan", stage=1),
    training(2, 2, 2.0, stage=1),
    evaluation(2, 0.75, stage=1, loss=1.5),
    training(3, 1, 1.0, stage=1),
    training(3, 2, 1.0, stage=1),
    evaluation(3, 0.75, stage=1, loss=1.25),
    evaluation(3, 0.25, stage=1, forced=0),
]


def thoughts(norm: float, digits: float, distance: float | None = 3.0) -> dict:
    """What engine/health.py adds to the record of an evaluation."""
    figures = dict(latent_norms=[norm, norm + 2], latent_from_centre=7.0)
    figures |= dict(latent_digits=digits, latent_operators=0.25)
    return figures | ({} if distance is None else {"latent_distance": distance})


WITH_THOUGHTS = [
    *RECORDS[:3],
    evaluation(2, 0.75, stage=1, **thoughts(10.0, 0.5, None)),
    evaluation(3, 0.75, stage=1, **thoughts(12.0, 0.75)),
]


def write(folder, records) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_curve_is_what_the_records_say(tmp_path):
    write(tmp_path / "run", RECORDS)
    curve = read_curve(tmp_path / "run")
    assert [done for done, _ in curve.losses] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert curve.accuracy == {1: (0.4, 0.5, 0.6), 2: (0.65, 0.75, 0.85), 3: (0.65, 0.75, 0.85)}
    assert curve.validation_loss == {1: 2.5, 2: 1.5, 3: 1.25}
    assert curve.without_latents == {3: 0.25}
    assert curve.spans() == [(0, 1, 1), (1, 2, 3)] and curve.latents == {0: "0", 1: "2"}
    assert curve.best_epoch == 2  # the first of the best, whose checkpoint is kept


def test_the_health_of_the_thoughts_is_drawn_too(tmp_path):
    """Where a run has some: of one latent there is no distance, at stage 0 nothing."""
    write(tmp_path / "run", WITH_THOUGHTS)
    curve = read_curve(tmp_path / "run")
    assert curve.lengths == {
        "norm": {2: 11.0, 3: 13.0},
        "distance of two": {3: 3.0},
        "distance to centre": {2: 7.0, 3: 7.0},
    }
    assert curve.shares == {"digits": {2: 0.5, 3: 0.75}, "operators": {2: 0.25, 3: 0.25}}
    write(tmp_path / "other", RECORDS)
    heights = {}
    for runs in (["run"], ["other"], ["run", "other"]):
        draw_curves([tmp_path / name for name in runs], tmp_path / "curve.png")
        heights["+".join(runs)] = plt.imread(tmp_path / "curve.png").shape[0]
    assert heights["run"] == heights["run+other"] == heights["other"] + 130 * (3.5 + 0.2)


@pytest.mark.parametrize("low, high", [(1.1, 3.4), (0.2, 1.5), (0.02, 0.09), (0.05, 3), (2, 9e5)])
def test_nothing_is_cut_off_at_the_left(tmp_path, low, high):
    """Of less than a decade the library also names the numbers between: 4 x 10^-1."""
    records = [training(1, 1, high), training(1, 2, low), evaluation(1, 0.5, loss=high)]
    write(tmp_path / "run", records)
    draw_curves([tmp_path / "run"], tmp_path / "curve.png")
    assert plt.imread(tmp_path / "curve.png")[:, :5, :3].min() == 1  # white


def test_what_is_not_finite_is_not_drawn(tmp_path):
    """Of a run that diverged: metrics.jsonl has words where JSON has no number."""
    broken = {**thoughts(10.0, 0.5), "latent_distance": "nan", "latent_norms": [1.0, "inf"]}
    write(
        tmp_path / "run", [evaluation(1, 0.5, **thoughts(12.0, 0.75)), evaluation(2, 0, **broken)]
    )
    curve = read_curve(tmp_path / "run")
    assert curve.lengths["norm"] == {1: 13.0} and curve.lengths["distance of two"] == {1: 3.0}
    assert curve.lengths["distance to centre"] == {1: 7.0, 2: 7.0}
    draw_curves([tmp_path / "run"], tmp_path / "curve.png")


def test_an_epoch_that_runs_still_is_as_long_as_the_one_before(tmp_path):
    write(tmp_path / "run", [*RECORDS[:3], training(2, 1, 2.0, stage=1)])
    assert [done for done, _ in read_curve(tmp_path / "run").losses] == [0.5, 1, 1.5]


def test_the_line_is_of_means_over_finite_steps():
    epochs, losses = smooth([(k / 1000, float(k % 2)) for k in range(1, 1001)])
    assert len(epochs) == 100 and losses.tolist() == [0.5] * 100
    epochs, losses = smooth([(0.5, float("nan")), (1.0, 3.0), (1.5, float("inf"))])
    assert (epochs.tolist(), losses.tolist()) == ([1.0], [3.0])
    assert smooth([])[0].size == 0


def test_a_torn_line_is_left_out(tmp_path):
    write(tmp_path / "run", RECORDS[:2])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra\n' + json.dumps(RECORDS[2]) + "\n")
    curve = read_curve(tmp_path / "run")
    assert len(curve.losses) == 2 and set(curve.accuracy) == {1}


@pytest.mark.parametrize(
    "records", [RECORDS, RECORDS[:2], RECORDS[2:3], RECORDS[-1:], RECORDS[3:4]]
)
def test_a_picture_is_drawn_of_whatever_there_is(tmp_path, records):
    """No validation at all; an evaluation alone, with a loss or without; a loss that is no number;
    a run beside another."""
    write(tmp_path / "a", records)
    write(tmp_path / "b", RECORDS)
    for runs in ([tmp_path / "a"], [tmp_path / "a", tmp_path / "b"]):
        draw_curves(runs, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "curve.png").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    "text", [None, "", "{", '{"kind": "train"}', '{"kind": "eval", "epoch": 1}']
)
def test_a_folder_that_is_no_run_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="metrics.jsonl: "):
        read_curve(tmp_path)
    assert analysis.main(["curve", str(tmp_path / "typo")]) == 2
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("seconds, pictures", [(0, 3), (600, 1)])
def test_a_run_draws_its_curve_after_an_epoch_but_not_all_the_time(
    workspace, monkeypatch, seconds, pictures
):
    """And at its end in any case."""
    epochs = []
    monkeypatch.setattr("engine.curve.SECONDS_BETWEEN", seconds)
    monkeypatch.setattr(
        "engine.curve.draw_curve", lambda run_dir: epochs.append(read_curve(run_dir))
    )
    assert run.main([str(workspace.yaml(num_epochs=3))]) == 0
    assert [max(drawn.accuracy) for drawn in epochs] == [1, 2, 3][-pictures:]


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert names_of([Path(".")]) == ["run"]
    assert names_of([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
    assert names_of([Path("a/one"), Path("b/two")]) == ["one", "two"]


def test_a_picture_is_a_png(tmp_path, capsys):
    """Under another name it was one all the same."""
    write(tmp_path / "run", [training(1, 1, 2.0)])
    output = tmp_path / "curve.pdf"
    assert analysis.main(["curve", str(tmp_path / "run"), "--output", str(output)]) == 2
    assert "curve.pdf is no .png" in capsys.readouterr().err and not output.exists()


def test_a_finished_run_has_its_curve(workspace, capsys):
    """Written anew by a run that goes on, and by the command, which replaces pictures of ours."""
    picture = workspace.run_dir / "curve.png"
    assert run.main([str(workspace.yaml(num_epochs=1))]) == 0
    first = picture.read_bytes()
    assert run.main([str(workspace.yaml(num_epochs=2))]) == 0
    assert first.startswith(b"\x89PNG") and picture.read_bytes() != first
    assert analysis.main(["curve", str(workspace.run_dir)]) == 0
    assert f"written: {picture}" in capsys.readouterr().out
    picture.write_text("somebody's own")
    assert analysis.main(["curve", str(workspace.run_dir)]) == 2
    assert "is not of analysis" in capsys.readouterr().err
    assert picture.read_text() == "somebody's own"


def test_a_picture_that_cannot_be_drawn_ends_no_training(workspace, monkeypatch):
    """Somebody moved metrics.jsonl: one process would stop, and the others wait for it."""
    original = loop.validate

    def moved(*args) -> None:
        original(*args)
        (workspace.run_dir / "metrics.jsonl").unlink(missing_ok=True)

    monkeypatch.setattr(loop, "validate", moved)
    assert run.main([str(workspace.yaml(num_epochs=2))]) == 0
    assert (workspace.run_dir / "checkpoint_2").exists()
    assert "curve.png is not drawn: " in (workspace.run_dir / "training.log").read_text()


def test_no_picture_where_nothing_is_kept(workspace):
    assert run.main([str(workspace.yaml(num_epochs=1, debug=True))]) == 0
    assert not (workspace.run_dir / "curve.png").exists()
