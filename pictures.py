"""The pictures of analysis.py. Knows matplotlib and the plain values to draw, nothing else."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = {"zero": "#b5533c", "mean": "#d9a441", "other": "#5b7fa6"}
LEGEND = {"zero": "set to zero", "mean": "mean embedding", "other": "from another question"}
CLASS_COLOURS = ("#3a7d44", "#8fbf7f", "#b5533c", "#d9a441", "#5b7fa6", "#9a9a9a")


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_thoughts(row: dict, summary: list[dict], embedding_norm: float, path: Path) -> None:
    """Top tokens of one row's latents; norms and changed answers over all rows."""
    figure, (tokens, norms, changes) = plt.subplots(
        1, 3, figsize=(15, 4.5), width_ratios=(1.4, 1, 1.2), layout="constrained"
    )
    latents = row["latents"]
    tokens.imshow([[t["probability"] for t in latent["top"]] for latent in latents],
                  cmap="Oranges", vmin=0, vmax=1, aspect="auto")
    for k, latent in enumerate(latents):
        for place, top in enumerate(latent["top"]):
            tokens.text(place, k, f"{_visible(top['token'])}\n{top['probability']:.2f}",
                        ha="center", va="center", fontsize=9,
                        color="white" if top["probability"] > 0.6 else "black")
    tokens.set(title=f"row {row['row']}: tokens under the head", xlabel="rank", ylabel="latent",
               xticks=range(len(latents[0]["top"])), yticks=range(len(latents)),
               xticklabels=range(1, len(latents[0]["top"]) + 1),
               yticklabels=range(1, len(latents) + 1))
    places = range(1, len(summary) + 1)
    norms.bar(places, [entry["norm"] for entry in summary], color="#d9772b", width=0.6)
    norms.axhline(embedding_norm, color="black", linestyle="--", linewidth=1)
    norms.set(title="norm of the fed-back state\n(dashed: mean of the embeddings)", xlabel="latent",
              xticks=places)
    for number, (kind, colour) in enumerate(KINDS.items()):
        shares = [entry["changed"].get(kind) for entry in summary]
        if None not in shares:
            changes.bar([k + (number - 1) * 0.26 for k in places], [100 * s for s in shares],
                        width=0.24, color=colour, label=LEGEND[kind])
    changes.set(title="answers changed when one latent is", xlabel="latent", xticks=places,
                ylabel="% of the rows", ylim=(0, 118), yticks=range(0, 101, 20))
    changes.legend(frameon=False, ncols=3, loc="upper center", fontsize=8)
    for panel in (norms, changes):
        panel.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _visible(token: str) -> str:
    """The token with its white space seen; a dollar sign would start matplotlib's mathematics."""
    token = token.replace("\n", "⏎").replace(" ", "·")[:12]
    return "".join(c if c.isprintable() else "?" for c in token).replace("$", r"\$")


def draw_paths(shares: dict[int, dict[str, float]], accuracy: dict[int, float], path: Path) -> None:
    """Stacked bars of the classes of outputs by number of latents, the accuracy as dots."""
    figure, panel = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = [str(k) for k in shares]
    bottom = [0.0] * len(names)
    for name, colour in zip(next(iter(shares.values())), CLASS_COLOURS):
        heights = [100 * found[name] for found in shares.values()]
        panel.bar(names, heights, bottom=bottom, color=colour, width=0.65, label=name)
        bottom = [b + h for b, h in zip(bottom, heights)]
    panel.plot(names, [100 * a for a in accuracy.values()], "o--", color="black", label="accuracy")
    panel.set(title="What the model writes, by number of latents", xlabel="latents",
              ylabel="% of the rows", ylim=(0, 100))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def draw_trees(tree: dict, path: Path) -> None:
    """One row's reachable graph, a panel for each number of latents; colour: probability."""
    panels_of = tree["after"]
    figure, panels = plt.subplots(
        1, len(panels_of), figsize=(4.6 * len(panels_of), 4.4), layout="constrained", squeeze=False
    )
    places = _places(tree["nodes"])
    for panel, (k, probabilities) in zip(panels[0], panels_of.items()):
        for a, b in tree["edges"]:
            panel.annotate("", places[b], places[a], arrowprops=dict(
                arrowstyle="-|>", color="#b0b0b0", shrinkA=16, shrinkB=16))
        for node in tree["nodes"]:
            name, p = node["name"], probabilities.get(node["name"])
            edge = "#3a7d44" if name == tree["target"] else "#606060"
            panel.scatter(*places[name], s=900, c=[0 if p is None else p], cmap="Oranges", vmin=0,
                          vmax=1, edgecolors=edge, zorder=2,
                          linewidths=3 if name == tree["target"] else 1)
            label = name if p is None else f"{name}\n{p:.2f}"
            panel.text(*places[name], label, ha="center", va="center", fontsize=8, zorder=3,
                       color="white" if p is not None and p > 0.6 else "black")
        panel.set(title=f"after {k} latent" + ("" if int(k) == 1 else "s"), xticks=[], yticks=[])
        panel.margins(0.18)
        panel.spines[:].set_visible(False)
    figure.suptitle(f"row {tree['row']}: probability of each concept as the next one "
                    f"(root {tree['root']}, target {tree['target']} outlined)")
    _save(figure, path)


def _places(nodes: list[dict]) -> dict[str, tuple[float, float]]:
    """A column for each depth, its nodes evenly spread."""
    columns: dict[int, list[str]] = {}
    for node in nodes:
        columns.setdefault(node["depth"], []).append(node["name"])
    return {name: (depth, (len(names) - 1) / 2 - place)
            for depth, names in columns.items() for place, name in enumerate(names)}
