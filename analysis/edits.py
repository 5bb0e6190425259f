"""ProsQA with its evidence changed: one edge that decides the answer is rewritten, and a model that
reads the graph answers otherwise.

The edit changes one word. Of an edge u -> v on every path from the root to the target, the fact's
object becomes another: "Every u is a v." reads "Every u is a w.", in the same place, where w leads
to the other candidate (or is that) and neither to the target nor back to u. So the root reaches the
other candidate and no more the target, and the graph has no cycle. Nothing else of the question
changes, neither its facts nor the order in which the candidates are named; the truth is searched
for in the new graph, and the steps are a shortest path to it.

What would betray the edit without a search is kept out: w is the object of another fact (a concept,
never a person), and both candidates stay named in facts. Of all edits of a row those whose chain is
nearest in length to the old one are taken, and of them one by the seed. Rows without any, such as
those with two disjoint paths, are left out.
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from analysis.output import add_config, check_output, percent, share, write_json
from analysis.probe import Probe, load_probe, read_config
from analysis.prosqa import latent_numbers, read_graphs
from analysis.row_files import show_rows
from dataset import StageDataset
from engine.text import TextFormat
from preprocessing.graphs import distances, random_shortest_path
from preprocessing.prosqa import fact, make_row, split_question
from utils import UserError

Edit = tuple[int, dict]  # the number of a row, and the row as it is rewritten
SEED = 0  # of the edits, whatever a model's seed is: all are asked the same
OUTCOMES = {
    "original": "right before the edit",
    "edited": "right after it",
    "followed": "both: the answer went from the old truth to the new one",
    "kept": "the old truth before and after the edit",
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument("--output_dir", type=Path)
    command.add_argument("--latents", help="numbers, default: all up to the last stage's")
    command.add_argument("--seed", type=int, default=SEED, help=f"of the edits (default {SEED})")


def run(args: argparse.Namespace) -> None:
    """Accuracy on ProsQA with a deciding edge rewritten, and how often the answer follows."""
    config = read_config(*args.config)
    folder = args.output_dir or config.run_dir
    check_output(folder, "edits.json")
    graphs, numbers = read_graphs(config), latent_numbers(config, args.latents)
    probe = load_probe(config)
    report = follow_the_edit(probe, graphs[: len(probe.rows)], numbers, args.seed)
    print(describe_edits(report))
    write_json(folder / "edits.json", {"checkpoint": str(probe.inputs.start.source), **report})
    print(f"written: {folder}/edits.json")


# ------------------------------------------------------------------------------- editing


def edit_rows(rows: Sequence[dict], seed: int) -> list[Edit]:
    """Every row that one edge can flip, rewritten. A row's edit depends on the seed and its number.

    rows: of preprocessing/prosqa.py, checked.
    """
    edited = []
    for number, row in enumerate(rows):
        rng = random.Random(f"{seed} {number}")
        choices = _flips(row)
        if choices:
            length = len(row["steps"])
            nearest = min(abs(hops - length) for *_, hops in choices)
            place, node, _ = rng.choice([c for c in choices if abs(c[2] - length) == nearest])
            edited.append((number, _rewritten(rng, row, place, node)))
    return edited


def _flips(row: dict) -> list[tuple[int, int, int]]:
    """All edits of a row: the edge's place, its new end, hops to the new target."""
    edges, root, target, other = (row[k] for k in ("edges", "root", "target", "neg_target"))
    num_parents = Counter(b for _, b in edges)
    from_root = distances(edges, root)
    ahead = {node: distances(edges, node) for node in num_parents}
    new_ends = [w for w in ahead if other in ahead[w] and target not in ahead[w]]
    flips = []
    for place, (u, v) in enumerate(edges):
        without = [*edges[:place], *edges[place + 1 :]]
        unnamed = v == target and num_parents[target] == 1
        if u in from_root and not unnamed and target not in distances(without, root):
            hops = from_root[u][0] + 1
            flips += [(place, w, hops + ahead[w][other][0]) for w in new_ends if u not in ahead[w]]
    return flips


def _rewritten(rng: random.Random, row: dict, place: int, node: int) -> dict:
    """The row with another end of the edge at a place of its edges; the search finds its truth."""
    symbols, root, (u, v) = row["idx_to_symbol"], row["root"], row["edges"][place]
    edges = [list(edge) for edge in row["edges"]]
    edges[place] = [u, node]
    question = split_question(row)
    assert question is not None  # the row is checked
    facts, candidates = question
    facts[facts.index(fact(symbols, u, v))] = fact(symbols, u, node)
    reached = distances(edges, root)
    target, neg_target = sorted(candidates, key=lambda candidate: candidate not in reached)
    path = random_shortest_path(rng, edges, root, target)
    return make_row(facts, [symbols[c] for c in candidates], symbols, edges, path, neg_target)


def truth_is_first(row: dict) -> bool:
    """Whether the question names the target before the other candidate."""
    question = split_question(row)
    assert question is not None
    return question[1][0] == row["target"]


def balance(edits: list[Edit], seed: int) -> list[Edit]:
    """As many edits whose truth is named first as second, in their order; the surplus, drawn by
    the seed, is left out.

    An edit does not change the order of the candidates, so their original rows are balanced too,
    and to name the same candidate always, the first say, is right in exactly half of either.
    """
    by_place: dict[bool, list[int]] = {True: [], False: []}
    for number, row in edits:
        by_place[truth_is_first(row)].append(number)
    fewest = min(map(len, by_place.values()))
    rng = random.Random(f"{seed}")
    kept = {number for numbers in by_place.values() for number in rng.sample(numbers, fewest)}
    return [edit for edit in edits if edit[0] in kept]


# ------------------------------------------------------------------------------- asking


def follow_the_edit(
    probe: Probe, graphs: Sequence[dict], numbers: Sequence[int], seed: int = SEED
) -> dict:
    """Ask for the originals and their edits, with each number of latents.

    graphs: the probe's rows, with their graphs. Returns counts of rows, for each number of latents
    the share of pairs with each of OUTCOMES (rate in [0, 1], 95% interval), and each pair with its
    answers. Raises UserError as show_edits does.
    """
    surplus, edits, shown, datasets = show_edits(probe, graphs, numbers, seed)
    chosen = [number for number, _ in edits]
    pairs, by_latents = _pairs(graphs, edits), {}
    for number, dataset in datasets.items():
        before = probe.answers(probe.dataset(number), chosen)
        after = shown.answers(dataset, list(range(len(edits))))
        by_latents[str(number)] = judge_pairs(probe.text_format, pairs, before, after)
        for pair, *answers in zip(pairs, before, after):
            pair["answers"][str(number)] = answers
    return {
        "rows": len(graphs),
        "no_edge_flips": len(graphs) - len(edits) - surplus,
        "left_out_for_balance": surplus,
        "pairs": len(edits),
        "seed": seed,
        "latents": by_latents,
        "edits": pairs,
    }


def show_edits(
    probe: Probe, graphs: Sequence[dict], numbers: Sequence[int], seed: int = SEED
) -> tuple[int, list[Edit], Probe, dict[int | None, StageDataset]]:
    """How many edits are left out for balanced labels, the others, and the probe with these,
    nothing computed yet. Raises UserError where there are none, and as show_rows does."""
    every = edit_rows(graphs, seed)
    edits = balance(every, seed)
    if not edits:
        raise UserError(
            f"edits: of {len(graphs)} rows, one edge can flip the answer of {len(every)}, and the "
            "truth is not named first in some of them and second in others; give more rows"
        )
    rewritten = [{k: row[k] for k in ("question", "steps", "answer")} for _, row in edits]
    return len(every) - len(edits), edits, *show_rows(probe, rewritten, "edited rows", numbers)


def _pairs(graphs: Sequence[dict], edits: list[Edit]) -> list[dict]:
    """What each edit is: the fact that changes, as it was and as it is, and the answers."""
    pairs = []
    for number, row in edits:
        old, symbols = graphs[number], row["idx_to_symbol"]
        ((was, becomes),) = [(a, b) for a, b in zip(old["edges"], row["edges"]) if a != b]
        pair = {
            "row": number,
            "fact": fact(symbols, *was),
            "becomes": fact(symbols, *becomes),
            "gold_answer": old["answer"],
            "new_gold_answer": row["answer"],
            "answers": {},  # number of latents: [before, after]
        }
        pairs.append(pair)
    return pairs


def judge_pairs(
    text_format: TextFormat,
    pairs: Sequence[dict],
    before: Sequence[str | None],
    after: Sequence[str | None],
) -> dict[str, dict]:
    """The share of pairs with each of OUTCOMES. before, after: an answer for each pair."""
    same, counts = text_format.same_answer, Counter[str]()
    for pair, first, second in zip(pairs, before, after, strict=True):
        was_right = same(first, pair["gold_answer"])
        is_right = same(second, pair["new_gold_answer"])
        counts["original"] += was_right
        counts["edited"] += is_right
        counts["followed"] += was_right and is_right
        counts["kept"] += was_right and same(second, pair["gold_answer"])
    return {outcome: share(counts[outcome], len(pairs)) for outcome in OUTCOMES}


def describe_edits(report: dict) -> str:
    """A table with a line for each number of latents, and what its columns are."""
    lines = [
        f"one edge rewritten: {report['pairs']} pairs of {report['rows']} rows; in "
        f"{report['no_edge_flips']} rows no edge can flip the answer, "
        f"{report['left_out_for_balance']} are left out so that the truth is named first in half",
        f"{'latents':7}" + "".join(f"  {outcome:<21}" for outcome in OUTCOMES),
    ]
    for number, outcomes in report["latents"].items():
        cells = [percent(outcomes[name]["rate"], outcomes[name]["interval"]) for name in OUTCOMES]
        lines.append(f"{number:<7}" + "".join(f"  {cell:<21}" for cell in cells))
    lines += [f"{name}: {meaning}" for name, meaning in OUTCOMES.items()]
    lines.append("guessing follows in 25%, always the candidate named first in 0%")
    return "\n".join(line.rstrip() for line in lines)
