"""The pictures of python -m analysis, and the table of thoughts. Knows matplotlib and the plain
values to show, nothing else."""

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

from analysis.output import percent
from engine.curve import save_picture

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

KINDS = {"zero": "#b5533c", "mean": "#d9a441", "other": "#5b7fa6"}
LEGEND = {"zero": "zeros", "mean": "the mean embedding", "other": "another question's"}
CLASS_COLOURS = ("#3a7d44", "#8fbf7f", "#b5533c", "#d9a441", "#5b7fa6", "#9a9a9a")
COLUMNS = 3  # panels side by side; more go below


def _save(figure: Figure, path: Path) -> None:
    save_picture(figure, path, dpi=150, bbox_inches="tight")
    plt.close(figure)


# ------------------------------------------------------------------------------- thoughts


def describe_thoughts(report: dict) -> str:
    lines = []
    for row in report["rows"]:
        gold = "" if row["gold_answer"] is None else f", gold {row['gold_answer']}"
        lines += [f"row {row['row']}: {row['question']}", f"answer {row['answer']}{gold}"]
        for k, latent in enumerate(row["latents"], start=1):
            top = "  ".join(f"{t['token']!r} {t['probability']:.2f}" for t in latent["top"])
            without = ", ".join(f"{n}: {a}" for n, a in latent["answer_without"].items())
            lines.append(
                f"  latent {k}  norm {latent['norm']:7.2f}  {top}\n"
                f"            answer with it replaced by {without}"
            )
    lines.append(
        f"\n{len(report['rows'])} rows, accuracy {percent(report['accuracy'])}, mean "
        f"embedding norm {report['embedding_norm']:.2f}; one latent replaced at a time:"
    )
    kinds = list(report["latents"][0]["changed"])
    lines.append(
        f"{'latent':8}{'norm':>7}"
        + "".join(f"{n + ': changed':>17}{'accuracy':>10}" for n in kinds)
    )
    for k, entry in enumerate(report["latents"], start=1):
        cells = "".join(
            f"{percent(entry['changed'][n]):>17}{percent(entry['accuracy'][n]):>10}" for n in kinds
        )
        lines.append(f"{k:<8}{entry['norm']:>7.2f}{cells}")
    return "\n".join(lines)


def draw_thoughts(report: dict, path: Path) -> None:
    """A panel of nearest tokens for each row; norms and changed answers over all rows."""
    rows, num_latents = report["rows"], len(report["latents"])
    across = min(COLUMNS, math.ceil(math.sqrt(len(rows))))
    down = math.ceil(len(rows) / across)
    height = 1.6 + 0.5 * num_latents
    figure = plt.figure(figsize=(max(5 * across, 11), down * height + 4.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(down * height, 4))
    top, bottom = halves
    panels = list(top.subplots(down, across, squeeze=False).flat)
    for panel, row in zip(panels, rows):
        _draw_tokens(panel, row)
    for panel in panels[len(rows) :]:
        panel.axis("off")
    norms, changes = bottom.subplots(1, 2, width_ratios=(0.8, 1.4))
    _draw_norms(norms, report)
    _draw_changes(changes, report)
    figure.text(0.995, 0.005, report["checkpoint"], ha="right", fontsize=8, color="#606060")
    _save(figure, path)


def _draw_norms(panel: Axes, report: dict) -> None:
    numbers = range(1, len(report["latents"]) + 1)
    panel.bar(numbers, [entry["norm"] for entry in report["latents"]], color="#d9772b", width=0.6)
    panel.axhline(report["embedding_norm"], color="black", linestyle="--", linewidth=1)
    panel.set_title("Norm of what is fed back\n(dashed: mean of the embeddings)")
    panel.set(xlabel="latent", xticks=numbers)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_changes(panel: Axes, report: dict) -> None:
    """How often answers change, with 95% intervals."""
    summary, count = report["latents"], len(report["rows"])
    kinds = [kind for kind in KINDS if kind in summary[0]["changed"]]
    for number, kind in enumerate(kinds):
        heights = [100 * entry["changed"][kind] for entry in summary]
        ends = [[100 * end for end in entry["changed_interval"][kind]] for entry in summary]
        errors = [[h - low, high - h] for h, (low, high) in zip(heights, ends)]
        shift = (number - (len(kinds) - 1) / 2) * 0.27
        panel.bar(
            [k + shift for k in range(1, len(summary) + 1)],
            heights,
            width=0.25,
            color=KINDS[kind],
            label=LEGEND[kind],
            yerr=list(zip(*errors)) if count > 1 else None,
            error_kw=dict(linewidth=0.8, ecolor="#505050"),
        )
    panel.set(ylabel=f"% of {count} row" + "s" * (count > 1), ylim=(0, 102))
    panel.set(xlabel="latent", xticks=range(1, len(summary) + 1))
    panel.set_title("Answers that change when a latent is replaced by", pad=24)
    panel.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_tokens(panel: Axes, row: dict) -> None:
    latents, ranks = row["latents"], range(len(row["latents"][0]["top"]))
    panel.imshow(
        [[t["probability"] for t in latent["top"]] for latent in latents],
        cmap="Oranges",
        vmin=0,
        vmax=1,
        aspect="auto",
    )
    for k, latent in enumerate(latents):
        for rank, token in enumerate(latent["top"]):
            panel.text(
                rank,
                k,
                f"{visible(token['token'])[:12]}\n{token['probability']:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                parse_math=False,
                color="white" if token["probability"] > 0.6 else "black",
            )
    panel.set(
        xlabel="nearest tokens",
        ylabel="latent",
        xticks=ranks,
        yticks=range(len(latents)),
        xticklabels=[rank + 1 for rank in ranks],
        yticklabels=range(1, len(latents) + 1),
    )
    panel.set_title(_title(row), fontsize=9, parse_math=False)


def _title(row: dict) -> str:
    """The question in short lines, the answer, and whether it is right."""
    question = textwrap.shorten(row["question"], 150, placeholder=" ...")
    lines = textwrap.wrap(f"Row {row['row']}: {question}", 52)
    answer = "no answer" if row["answer"] is None else f"answer {row['answer']}"
    if row["gold_answer"] is not None:
        answer += ", right" if row["correct"] else f", wrong: it is {row['gold_answer']}"
    return "\n".join(visible(line, keep_blanks=True) for line in [*lines, answer])


def visible(text: str, keep_blanks: bool = False) -> str:
    """The text with white space seen, and a box for each character that the font lacks."""
    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    text = text.replace("\n", "⏎")
    if not keep_blanks:
        text = text.replace(" ", "·")
    return "".join(c if ord(c) in known and c.isprintable() else "□" for c in text)


# ------------------------------------------------------------------------------- faithful


def draw_faithful(found: dict, path: Path) -> None:
    """Accuracy by number of latents, flips by what replaces all of them, how later latents move,
    and what a linear probe reads."""
    wide = max(4.5, 0.8 * found["latents"])
    figure, panels = plt.subplots(2, 2, figsize=(2 * wide + 2, 9.5), layout="constrained")
    _draw_numbers(panels[0, 0], found["by_number"])
    _draw_flips(panels[0, 1], found["all"], found["control"]["rates"] if found["control"] else {})
    _draw_triangle(panels[1, 0], found["changes"]["other"])
    _draw_probes(panels[1, 1], found["probe"])
    for panel in (*panels[0], panels[1, 1]):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "\n".join(line for text in found["verdict"] for line in textwrap.wrap(text, 120)),
        fontsize=9,
        x=0.01,
        ha="left",
        parse_math=False,
    )
    figure.text(0.995, 0.005, found["checkpoint"], ha="right", fontsize=7, color="#606060")
    _save(figure, path)


def _reach(rates: list[float], intervals: list) -> list[list[float]]:
    """The distances of the ends of intervals, in percent, as matplotlib wants them."""
    pairs = list(zip(rates, intervals))
    return [
        [100 * (rate - low) for rate, (low, _) in pairs],
        [100 * (high - rate) for rate, (_, high) in pairs],
    ]


def _draw_numbers(panel: Axes, by_number: dict) -> None:
    for (series, of_series), colour in zip(by_number.items(), ("#d9772b", "#5b7fa6")):
        rates = [entry["accuracy"] for entry in of_series.values()]
        reach = _reach(rates, [entry["accuracy_interval"] for entry in of_series.values()])
        heights = [100 * rate for rate in rates]
        panel.errorbar(
            list(of_series), heights, reach, fmt="o-", color=colour, capsize=3, label=series
        )
    panel.set(title="Accuracy by number of latents", xlabel="latents", ylabel="%", ylim=(0, 102))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(frameon=False)


def _draw_flips(panel: Axes, of_all: dict, control: dict) -> None:
    entries = [(kind, rates, "#d9772b") for kind, rates in of_all.items()]
    entries += [(f"chain: {kind}", rates, "#5b7fa6") for kind, rates in control.items()]
    names, rates, colours = zip(*entries)
    flips = [entry["flips"] for entry in rates]
    reach = _reach(flips, [entry["flips_interval"] for entry in rates])
    panel.barh(names, [100 * flip for flip in flips], xerr=reach, color=colours, height=0.65)
    panel.invert_yaxis()
    panel.set(title="Answers that change when all latents are replaced", xlabel="%", xlim=(0, 102))


def _draw_triangle(panel: Axes, changes: list) -> None:
    """The cosine of each later latent to what it was; changes: [of latent k: [of later ones]]."""
    size = len(changes)
    cosines = [[math.nan] * (k + 1) + [c for c, _, _ in later] for k, later in enumerate(changes)]
    panel.imshow(cosines, cmap="Oranges_r", vmin=0, vmax=1)
    for k, later in enumerate(changes):
        for j, (cosine, distance, _) in enumerate(later, start=k + 1):
            panel.text(
                j, k, f"{cosine:.2f}\nd {distance:.2f}", ha="center", va="center", fontsize=8
            )
    numbers = range(size)
    panel.set(xticks=numbers, yticks=numbers, xlabel="later latent", ylabel="replaced latent")
    panel.set(xticklabels=[k + 1 for k in numbers], yticklabels=[k + 1 for k in numbers])
    panel.set_title(
        "Later latents when one is another row's:\ncosine and distance d to what they were"
    )
    panel.spines[:].set_visible(False)


def _draw_probes(panel: Axes, probes: list[dict]) -> None:
    styles = {"found": "o-", "question": "s--", "first": "^-.", "shuffled": "x:"}
    for fact, colour in zip(dict.fromkeys(p["fact"] for p in probes), CLASS_COLOURS[::2]):
        of_fact = [probe for probe in probes if probe["fact"] == fact]
        for source, style in styles.items():
            heights = [100 * probe[source]["accuracy"] for probe in of_fact]
            name = {"found": fact, "first": f"{fact}: latent 1"}.get(source, f"{fact}: {source}")
            panel.plot([p["latent"] for p in of_fact], heights, style, color=colour, label=name)
    panel.set(title="Linear probe: facts of the latent's step", xlabel="latent", ylim=(0, 102))
    if probes:
        panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


# ------------------------------------------------------------------------------- ProsQA


def draw_paths(shares: dict, accuracy: dict, rows: int, path: Path) -> None:
    """Stacked bars of the classes of outputs by number of latents, the accuracy as dots."""
    figure, panel = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = [str(k) for k in shares]
    bottom = [0.0] * len(names)
    for name, colour in zip(next(iter(shares.values())), CLASS_COLOURS):
        heights = [100 * of_class[name] for of_class in shares.values()]
        panel.bar(names, heights, bottom=bottom, color=colour, width=0.65, label=name)
        for column, (low, height) in enumerate(zip(bottom, heights)):
            if height >= 5:  # beside the middle, where the dots of the accuracy are
                panel.text(
                    column - 0.2,
                    low + height / 2,
                    f"{height:.0f}",
                    color="white",
                    fontsize=8,
                    ha="center",
                    va="center",
                )
        bottom = [b + h for b, h in zip(bottom, heights)]
    panel.plot(
        names,
        [100 * a for a in accuracy.values()],
        "D",
        color="black",
        markerfacecolor="white",
        label="accuracy",
    )
    panel.set(
        title="What the model writes, by number of latents",
        xlabel="latents",
        ylabel=f"% of {rows} rows",
        ylim=(0, 102),
    )
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    _save(figure, path)


def draw_trees(tree: dict, path: Path) -> None:
    """One row's reachable graph, a panel for each number of latents; colour: probability."""
    across, centres = min(COLUMNS, len(tree["after"])), _centres(tree["nodes"])
    down = math.ceil(len(tree["after"]) / across)
    xs, ys = zip(*centres.values())
    wide = 0.55 + 0.09 * max(len(node["name"]) for node in tree["nodes"])  # of a column, in inches
    size = wide * (max(xs) + 1.4), 0.72 * (max(ys) - min(ys) + 1.6)
    figure, panels = plt.subplots(
        down,
        across,
        figsize=(max(across * size[0], 6), down * size[1] + 0.8),
        layout="constrained",
        squeeze=False,
    )
    for panel in panels.flat:
        panel.axis("off")
    for panel, k in zip(panels.flat, tree["after"]):
        _draw_tree(panel, tree, centres, k)
        panel.set_title(f"after {k} latent" + "s" * (k != "1"), fontsize=12)
    figure.suptitle(
        f"Row {tree['row']}: probability that the next written step starts there\n"
        f"root {tree['root']}, target {tree['target']} (green); h: hops to the nearest leaf",
        fontsize=12,
        parse_math=False,
    )
    _save(figure, path)


def _draw_tree(panel: Axes, tree: dict, centres: dict, k: str) -> None:
    colour = matplotlib.colormaps["Oranges"]
    for node in tree["nodes"]:
        name, p = node["name"], tree["after"][k][node["name"]]
        is_target = name == tree["target"]
        x, y = centres[name]
        panel.text(
            x,
            y,
            f"{name}\n{p:.2f}  h{node['height']}",
            fontsize=7.5,
            zorder=2,
            ha="center",
            va="center",
            color="white" if p > 0.6 else "black",
            parse_math=False,
            bbox=dict(
                boxstyle="round,pad=0.35",
                facecolor=colour(p),
                linewidth=1 + is_target,
                edgecolor="#3a7d44" if is_target else "#a0a0a0",
            ),
        )
    for a, b in tree["edges"]:
        # edges that are not to the next column would run through the nodes between: bend them
        columns = centres[b][0] - centres[a][0]
        bend = 0.0 if columns == 1 else 0.2 if columns >= 0 else -0.3
        panel.annotate(
            "",
            centres[b],
            centres[a],
            zorder=1,
            arrowprops=dict(
                arrowstyle="-|>",
                color="#c4c4c4",
                linewidth=0.8,
                shrinkA=12,
                shrinkB=17,
                connectionstyle=f"arc3,rad={bend}",
            ),
        )
    xs, ys = zip(*centres.values())
    panel.set(xlim=(-0.7, max(xs) + 0.7), ylim=(min(ys) - 0.8, max(ys) + 0.8))


def _centres(nodes: list[dict]) -> dict[str, tuple[float, float]]:
    """A column for each depth, its nodes evenly spread."""
    columns: dict[int, list[str]] = {}
    for node in nodes:
        columns.setdefault(node["depth"], []).append(node["name"])
    return {
        name: (depth, (len(names) - 1) / 2 - number)
        for depth, names in columns.items()
        for number, name in enumerate(names)
    }
