"""curve.png: how runs learn, drawn from their metrics.jsonl alone."""

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import WRITING
from engine.logs import read_metrics
from utils import UserError, log

MARK = "coconut/analysis"  # in every picture of ours, which may be replaced by the next one
COLOURS = ("#d9772b", "#5b7fa6", "#3a7d44", "#b5533c", "#7a5ba6", "#9a9a9a")
SECONDS_BETWEEN = 30  # a picture takes half a second: longer than an epoch of a tiny run
SMOOTHED = 100  # points that the line of the training loss has at most
FONT_SIZE = 13
PANEL, LEFT, TOP, BOTTOM, BORDER = (7.0, 3.5), 1.2, 1.0, 0.6, 0.2  # of curve.png, in inches
LENGTHS = {
    "norm": "norm",
    "latent_distance": "distance of two",
    "latent_from_centre": "distance to centre",
}
SHARES = {"latent_digits": "digits", "latent_operators": "operators"}


@dataclass
class Curve:
    """What metrics.jsonl says of a run, by epoch."""

    name: str
    losses: list[tuple[float, float]] = field(default_factory=list)  # (epochs done, loss)
    validation_loss: dict[int, float] = field(default_factory=dict)
    accuracy: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # low, rate, high
    without_latents: dict[int, float] = field(default_factory=dict)  # of the same checkpoint
    # of the thoughts, by what it is and by epoch: lengths, and shares
    lengths: dict[str, dict[int, float]] = field(default_factory=dict)
    shares: dict[str, dict[int, float]] = field(default_factory=dict)
    stages: dict[int, int] = field(default_factory=dict)
    latents: dict[int, str] = field(default_factory=dict)  # by stage

    def all_losses(self) -> list[float]:
        return [*(loss for _, loss in self.losses), *self.validation_loss.values()]

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the best accuracy, as checkpoints are kept."""
        return max(self.accuracy, key=lambda epoch: self.accuracy[epoch][1], default=None)

    def spans(self) -> list[tuple[int, int, int]]:
        """(stage, first epoch, last epoch) of each stretch of epochs of one stage."""
        spans: list[tuple[int, int, int]] = []
        for epoch, stage in sorted(self.stages.items()):
            if spans and spans[-1][0] == stage:
                spans[-1] = (stage, spans[-1][1], epoch)
            else:
                spans.append((stage, epoch, epoch))
        return spans


def read_records(run_dir: Path) -> list[dict]:
    """The metrics of a run folder, in order. Raises UserError."""
    path = run_dir / "metrics.jsonl"
    try:
        records = read_metrics(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the metrics of a run: {error}") from None
    if not records:
        raise UserError(f"{path}: holds no records of a run")
    return records


def names_of(run_dirs: list[Path]) -> list[str]:
    """Those of the folders, or their paths where two have one name."""
    names = [folder.resolve().name for folder in run_dirs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in run_dirs]


def read_curve(run_dir: Path, name: str | None = None) -> Curve:
    """The curve of a run folder, by that name or this one. Raises UserError."""
    records = read_records(run_dir)
    try:
        return _curve_of(records, name or run_dir.name)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run_dir / 'metrics.jsonl'}: not as a run writes it: {error!r}") from None


def _curve_of(records: list[dict], name: str) -> Curve:
    training = [r for r in records if r["kind"] == "train"]
    curve = Curve(name)
    steps = Counter(record["epoch"] for record in training)
    if steps:  # the epoch that is running is taken to be as long as the one before
        last = max(steps)
        steps[last] = max(steps[last], steps[last - 1])
    for record in training:
        done = record["epoch"] - 1 + record["step"] / max(steps[record["epoch"]], record["step"])
        curve.losses.append((done, float(record["loss"])))
    for record in records:
        epoch = record["epoch"]
        curve.stages[epoch] = record["stage"]
        if record["kind"] == "eval" and record["forced_latents"] is None:
            rates = (record["accuracy_low"], record["accuracy"], record["accuracy_high"])
            curve.accuracy[epoch] = rates
            curve.latents[record["stage"]] = record["latents"]
            if "loss" in record:
                curve.validation_loss[epoch] = float(record["loss"])
            _read_thoughts(curve, record)
        elif record["kind"] == "eval" and record["forced_latents"] == 0:
            curve.without_latents[epoch] = record["accuracy"]
    return curve


def _read_thoughts(curve: Curve, record: dict) -> None:
    """What engine/health.py has measured, where there is something and it is finite."""
    norms = [float(norm) for norm in record.get("latent_norms", [])]
    record = {"norm": sum(norms) / len(norms) if norms else math.nan, **record}
    for drawn, labels in ((curve.lengths, LENGTHS), (curve.shares, SHARES)):
        for name, label in labels.items():
            if math.isfinite(value := float(record.get(name, math.nan))):
                drawn.setdefault(label, {})[record["epoch"]] = value


def smooth(losses: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means over stretches of finite steps: epochs done and loss, SMOOTHED points at most."""
    finite = np.array([pair for pair in losses if math.isfinite(pair[1])]).reshape(-1, 2)
    parts = np.array_split(finite, min(SMOOTHED, max(len(finite), 1)))
    points = np.array([part.mean(0) for part in parts if len(part)]).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def draw_curves(run_dirs: list[Path], path: Path) -> None:
    """A picture of one or several runs, written whole or not at all. Raises UserError."""
    import matplotlib  # noqa: PLC0415 takes a second, and only the main process draws

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    curves = [read_curve(folder, name) for folder, name in zip(run_dirs, names_of(run_dirs))]
    with plt.rc_context({"font.size": FONT_SIZE}):
        count = 3 if any(curve.lengths for curve in curves) else 2
        figure, panels = plt.subplots(count, 1, sharex=True)
        _set_size(figure, count, beside=0.0)
        top, bottom, *lengths = panels
        shares = [panel.twinx() for panel in lengths]
        if all(curve.spans() == curves[0].spans() for curve in curves):
            _draw_stages(panels, curves[0])
        for number, curve in enumerate(curves):
            colour, alone = COLOURS[number % len(COLOURS)], len(curves) == 1
            _draw_run(top, bottom, curve, colour, alone)
            for left, right in zip(lengths, shares):
                _draw_thoughts(left, right, curve, colour, alone)
        # the library refuses a logarithm of nothing: an evaluation has no loss
        losses = [loss for curve in curves for loss in curve.all_losses()]
        scale = "log" if any(0 < loss < math.inf for loss in losses) else "linear"
        top.set(ylabel="loss, nats per token", yscale=scale)
        bottom.set(ylabel="accuracy, %", ylim=(0, 104))
        panels[-1].set(xlabel="epoch")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
        for panel in (*panels, *shares):
            panel.spines[["top", "right"]].set_visible(False)
        right = 0.0
        for panel in panels:
            if panel.get_legend_handles_labels()[0]:
                at = 1.14 if panel in lengths else 1.0  # beside the numbers of its right axis
                legend = panel.legend(frameon=False, loc="center left", bbox_to_anchor=(at, 0.5))
                right = max(right, legend.get_window_extent().x1 - panel.get_window_extent().x1)
        _set_size(figure, count, beside=right / figure.dpi)
        figure.suptitle(", ".join(curve.name for curve in curves), parse_math=False)
        save_picture(figure, path, dpi=130)
        plt.close(figure)


def _set_size(figure: Any, count: int, beside: float) -> None:
    """Panels of a known size, and what stands beside them, in inches. A layout engine of the
    library finds that by drawing all of it: as long again as a small run's epoch took."""
    width, height = LEFT + PANEL[0] + beside + BORDER, TOP + count * (PANEL[1] + BORDER) + BOTTOM
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=LEFT / width,
        right=(LEFT + PANEL[0]) / width,
        bottom=BOTTOM / height,
        top=1 - TOP / height,
        hspace=BORDER / PANEL[1],
    )


def save_picture(figure: Any, path: Path, **style: Any) -> None:
    """Write a figure of matplotlib with our mark, whole or not at all; its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}{WRITING}file")
    figure.savefig(writing, format="png", metadata={"Software": MARK}, **style)
    writing.rename(path)


def draw_curve(run_dir: Path) -> None:
    """Draw curve.png anew; somebody may have moved what it is drawn from."""
    try:
        draw_curves([run_dir], run_dir / "curve.png")
    except UserError as error:
        log.warning(f"curve.png is not drawn: {error}")


class LiveCurve:
    """curve.png of a run while it trains. wanted: whether this process draws it at all."""

    def __init__(self, run_dir: Path, wanted: bool):
        self.run_dir, self.wanted = run_dir, wanted
        self._last = time.monotonic()

    def draw(self, at_end: bool) -> None:
        """After an epoch: of all so far, SECONDS_BETWEEN seconds apart; the last one always."""
        if self.wanted and (at_end or time.monotonic() - self._last >= SECONDS_BETWEEN):
            draw_curve(self.run_dir)
            self._last = time.monotonic()

    def draw_unless_newer(self, written: Path) -> None:
        """Where a run goes on: not again where it was drawn since this file was written."""
        picture = self.run_dir / "curve.png"
        drawn = picture.stat().st_mtime_ns if picture.exists() else 0
        if self.wanted and drawn < written.stat().st_mtime_ns:
            draw_curve(self.run_dir)


def _draw_stages(panels: Any, curve: Curve) -> None:
    """Every second stage shaded, all named."""
    for number, (stage, first, last) in enumerate(curve.spans()):
        for panel in panels:
            panel.axvspan(first - 1, last, color="black", alpha=0.05 * (number % 2), linewidth=0)
        latents = curve.latents.get(stage)
        name = f"stage {stage}" + ("" if latents is None else f"\n{latents} latents")
        at = (first - 1 + last) / 2
        transform = panels[0].get_xaxis_transform()
        panels[0].text(at, 1.01, name, transform=transform, ha="center", va="bottom", fontsize=10)


def _draw_run(top: Any, bottom: Any, curve: Curve, colour: str, alone: bool) -> None:
    name = "" if alone else f"{curve.name}: "
    top.plot(*smooth(curve.losses), color=colour, linewidth=2, label=f"{name}training")
    if curve.validation_loss:
        epochs, losses = zip(*sorted(curve.validation_loss.items()))
        top.plot(epochs, losses, "s--", color=colour, markersize=5, label=f"{name}validation")
    if not curve.accuracy:
        return
    epochs, rates = zip(*sorted(curve.accuracy.items()))
    low, middle, high = 100 * np.array(rates).T
    bottom.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
    bottom.plot(epochs, middle, "o-", color=colour, label=f"{name}accuracy, 95% interval")
    if curve.without_latents:
        epochs, without = zip(*sorted(curve.without_latents.items()))
        heights = 100 * np.array(without)
        bottom.plot(epochs, heights, "X", color=colour, markersize=9, label=f"{name}no latents")
    best = curve.best_epoch
    if best is not None:
        rate = 100 * curve.accuracy[best][1]
        style = dict(markersize=16, markeredgecolor="black", zorder=3)
        bottom.plot([best], [rate], "*", color="gold", label=f"{name}best, epoch {best}", **style)


def _draw_thoughts(left: Any, right: Any, curve: Curve, colour: str, alone: bool) -> None:
    """Lengths on the left axis, filled marks; shares on the right one, empty marks."""
    name = "" if alone else f"{curve.name}: "
    for marker, (label, values) in zip("os^", curve.lengths.items()):
        label = f"{name}{label}"
        left.plot(*zip(*sorted(values.items())), f"{marker}-", color=colour, label=label)
    for marker, (label, values) in zip("Dv", curve.shares.items()):
        epochs, heights = zip(*sorted(values.items()))
        style = dict(color=colour, fillstyle="none", label=f"{name}{label}")
        right.plot(epochs, 100 * np.array(heights), f"{marker}:", **style)
        left.plot([], [], f"{marker}:", **style)  # for its legend
    left.set(ylabel="thoughts: length", ylim=(0, None))
    right.set(ylabel="thoughts: share, %", ylim=(0, 104))
