"""ProsQA: a seeded generator, a reader and a checker (Hao et al. 2024, arXiv 2412.06769, appendix).

    python preprocessing/prosqa.py --output_dir data              # the paper's sizes
    python preprocessing/prosqa.py --output_dir data --prefix symbolic --symbolic
    python preprocessing/prosqa.py --check data/prosqa_validation.json

writes <prefix>_train.json, <prefix>_validation.json and <prefix>_test.json, lists of rows with the
ancestor's fields (facebookresearch/coconut, data/prosqa_*.json):

    question       "Every yumpus is a rompus. Tom is a yumpus. ... Is Tom a lempus or scrompus?"
    steps          a shortest path as edges: ["Tom is a yumpus.", "Every yumpus is a rompus.", ...]
    answer         "Tom is a lempus."
    idx_to_symbol  the word of each node
    edges          [[a, b], ...]: node a is a node b; a graph without cycles
    root, target, neg_target    the person asked about; the reached, the unreached candidate

--symbolic writes the same graphs with one single-space-separated token per concept, for small
word-level models trained from scratch (after "Reasoning by Superposition", arXiv 2505.12514):

    question "3 7 | 7 12 | 5 9 ? 12 9 @ 3"    steps ["3 7", "7 12"]    answer "12"

that is: edges 3->7, 7->12, 5->9; which of 12 and 9 is reached from 3? No two rows of one call, in
the same file or in different ones, are equal up to the names of the concepts.

Larger graphs and longer chains than a model was trained on are other files:

    python preprocessing/prosqa.py --prefix long_prosqa --train 0 --num_nodes 40 --min_hops 7 \\
        --max_hops 9

A small symbolic model knows a concept only if its training rows name it: --num_symbols 40 draws the
names of smaller training graphs from 40, for a vocabulary of 40 (small_model.py --num_nodes 40).
"""

import argparse
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The scripts also run by path: the repository is then not on the module path.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from preprocessing.common import count, read_json, run_script, write_json_files
from preprocessing.graphs import (
    Edges,
    canonical_hash,
    distances,
    has_cycle,
    random_edges,
    random_shortest_path,
)

# the ancestor's words, so that its models and ours read each other's files
NAMES = (
    "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
).split()
CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus "
    "hilpus impus jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus "
    "scrompus shumpus sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus "
    "yimpus yumpus zhorpus zumpus"
).split()
SEPARATOR, QUERY, ROOT = "|", "?", "@"

# Of the paper: the mean number of parents, and the weight 1 + 1.5 * depth that favours long chains.
MEAN_PARENTS, DEPTH_WEIGHT = 1.5, 1.5
MAX_FAILURES = 10_000  # draws in a row without a new row, before the generator gives up
PROGRESS = 2000  # rows from one line of progress to the next

PAPER = {"nodes": 23.0, "edges": 36.0, "hops": 3.8, "paths": 1.6}
FIELDS = {
    "question": str,
    "steps": list,
    "answer": str,
    "idx_to_symbol": list,
    "edges": list,
    "root": int,
    "target": int,
    "neg_target": int,
}


# --------------------------------------------------------------------------------- generator


def random_question(rng: random.Random, edges: Edges) -> tuple[int, int, int] | None:
    """(root, target, neg_target), or None: one leaf below each of the roots 0 and 1 only.

    The target is a deepest such leaf; so in every row of the ancestor's file.
    """
    reached = distances(edges, 0), distances(edges, 1)
    inner = {a for a, _ in edges} | {0, 1}
    leaves = [sorted(reached[k].keys() - reached[1 - k].keys() - inner) for k in (0, 1)]
    if not all(leaves):
        return None
    deepest = [max(reached[k][leaf][0] for leaf in leaves[k]) for k in (0, 1)]
    root = rng.choice([k for k in (0, 1) if deepest[k] == max(deepest)])
    target = rng.choice([leaf for leaf in leaves[root] if reached[root][leaf][0] == deepest[root]])
    return root, target, rng.choice(leaves[1 - root])


def random_symbols(
    rng: random.Random, edges: Edges, nodes: list[int], num_symbols: int | None
) -> list[str]:
    """One word per node: a number below num_symbols; None: a name for a node without parents."""
    if num_symbols is not None:
        return [str(k) for k in rng.sample(range(num_symbols), len(nodes))]
    has_parents = {b for _, b in edges}
    concepts = iter(rng.sample(CONCEPTS, len(has_parents)))
    names = iter(rng.sample(NAMES, len(nodes) - len(has_parents)))
    return [next(concepts) if node in has_parents else next(names) for node in nodes]


def random_row(
    rng: random.Random,
    num_nodes: int,
    min_hops: int,
    max_hops: int,
    num_symbols: int | None,
    mean_parents: float,
    depth_weight: float,
) -> dict | None:
    """One row, or None if the drawn graph has no question of min_hops to max_hops."""
    drawn = random_edges(rng, num_nodes, mean_parents, depth_weight)
    question = random_question(rng, drawn)
    if question is None:
        return None
    path = random_shortest_path(rng, drawn, *question[:2])
    if not min_hops <= len(path) - 1 <= max_hops:
        return None
    nodes = sorted({node for edge in drawn for node in edge})  # the others take part in no fact
    index = {node: k for k, node in enumerate(nodes)}
    symbols = random_symbols(rng, drawn, nodes, num_symbols)
    edges, path = [[index[a], index[b]] for a, b in drawn], [index[node] for node in path]
    root, target, neg_target = (index[node] for node in question)
    facts = [fact(symbols, a, b) for a, b in edges]
    candidates = [symbols[target], symbols[neg_target]]
    rng.shuffle(facts)
    rng.shuffle(candidates)
    return make_row(facts, candidates, symbols, edges, path, neg_target)


def make_row(
    facts: list[str],
    candidates: list[str],
    symbols: list[str],
    edges: list[list[int]],
    path: list[int],
    neg_target: int,
) -> dict:
    """The row of a graph: path leads from its root to its target; facts and candidates stand in
    the question in this order."""
    root, target = path[0], path[-1]
    return {
        "question": question_text(facts, symbols[root], candidates),
        "steps": [fact(symbols, a, b) for a, b in zip(path, path[1:])],
        "answer": answer_text(symbols[root], symbols[target]),
        "idx_to_symbol": symbols,
        "edges": edges,
        "root": root,
        "target": target,
        "neg_target": neg_target,
    }


def symbols_to_draw(num_nodes: int, symbolic: bool, num_symbols: int | None) -> int | None:
    """How many numbers the concepts of symbolic rows are drawn from; None: words name them.

    ValueError if there are too few of either.
    """
    if num_nodes > len(CONCEPTS) + 2 and not symbolic:
        raise ValueError(
            f"num_nodes {num_nodes}: there are words for at most {len(CONCEPTS) + 2}; "
            "ask for fewer nodes or for symbolic rows"
        )
    if num_symbols is not None and not (symbolic and num_symbols >= num_nodes):
        raise ValueError(
            f"num_symbols {num_symbols}: it is for symbolic rows, and at least their "
            f"num_nodes, which is {num_nodes}"
        )
    return (num_symbols or num_nodes) if symbolic else None


def generate(
    sizes: list[int],
    seed: int = 0,
    num_nodes: int = 28,
    min_hops: int = 3,
    max_hops: int = 6,
    symbolic: bool = False,
    mean_parents: float = MEAN_PARENTS,
    depth_weight: float = DEPTH_WEIGHT,
    num_symbols: int | None = None,
) -> list[list[dict]]:
    """One list of rows per size, no two rows of them equal up to renaming.

    ValueError if the arguments contradict each other or leave too few different rows.
    """
    if not (0 < mean_parents < math.inf and 0 <= depth_weight < math.inf):
        raise ValueError(
            f"mean_parents {mean_parents}, depth_weight {depth_weight}: need a number "
            "above 0 and one from 0 up"
        )
    if not 1 <= min_hops <= max_hops:
        raise ValueError(f"hops from {min_hops} to {max_hops}: need 1 <= min_hops <= max_hops")
    rng, failures = random.Random(seed), 0
    symbols = symbols_to_draw(num_nodes, symbolic, num_symbols)
    seen: set[str] = set()
    splits: list[list[dict]] = [[] for _ in sizes]
    for split, size in zip(splits, sizes):
        while len(split) < size:
            row = random_row(
                rng, num_nodes, min_hops, max_hops, symbols, mean_parents, depth_weight
            )
            key = "" if row is None else canonical_hash(row)
            if row is None or key in seen:
                failures += 1
                if failures == MAX_FAILURES:
                    raise ValueError(
                        f"found {len(seen)} different rows of {sum(sizes)}, then none in "
                        f"{MAX_FAILURES} graphs of up to {num_nodes} nodes with {min_hops} to "
                        f"{max_hops} hops: ask for fewer rows, more nodes or other hops"
                    )
                continue
            failures = 0
            seen.add(key)
            split.append(row)
            if len(seen) % PROGRESS == 0:
                print(f"{len(seen):,} of {sum(sizes):,} rows", file=sys.stderr)
    return splits


# -------------------------------------------------------------------------------------- text


def fact(symbols: list[str], a: int, b: int) -> str:
    """The text of edge a -> b; the word of a tells which kind of text it is."""
    if symbols[a].isdigit():
        return f"{symbols[a]} {symbols[b]}"
    return f"{'' if symbols[a][0].isupper() else 'Every '}{symbols[a]} is a {symbols[b]}."


def question_text(facts: list[str], root: str, candidates: Sequence[str]) -> str:
    """Facts and the question which of two candidates the root is. All arguments are words."""
    first, second = candidates
    if root.isdigit():
        return f"{f' {SEPARATOR} '.join(facts)} {QUERY} {first} {second} {ROOT} {root}"
    return f"{' '.join(facts)} Is {root} a {first} or {second}?"


def answer_text(root: str, target: str) -> str:
    """The answer; both arguments are words."""
    return target if root.isdigit() else f"{root} is a {target}."


def symbolic_vocabulary(num_concepts: int) -> list[str]:
    """All tokens of symbolic rows over num_concepts concepts (the generator's num_symbols)."""
    return [SEPARATOR, QUERY, ROOT] + [str(k) for k in range(num_concepts)]


# ----------------------------------------------------------------------------------- reading


def check_fields(row: Any) -> list[str]:
    """Problems that keep the other checks from looking at the row: fields, types, ranges."""
    if not isinstance(row, dict):
        return ["not an object with fields"]
    wrong = [name for name, kind in FIELDS.items() if type(row.get(name)) is not kind]
    if wrong:
        return [f"{name}: missing or not a value of type {FIELDS[name].__name__}" for name in wrong]
    problems, symbols = [], row["idx_to_symbol"]
    if not all(isinstance(word, str) and re.fullmatch(r"\w+", word) for word in symbols):
        problems.append("idx_to_symbol: holds something that is not a word")
    elif len(set(symbols)) < len(symbols):
        problems.append("idx_to_symbol: names two nodes alike")
    if not all(isinstance(text, str) for text in row["steps"]):
        problems.append("steps: holds something that is not a text")
    nodes = range(len(symbols))
    for edge in row["edges"]:
        if type(edge) is not list or [type(x) for x in edge] != [int, int]:
            problems.append(f"edges: {edge!r} is not a pair of node numbers")
        elif not set(edge) <= set(nodes):
            problems.append(f"edges: {edge} names a node outside 0..{len(nodes) - 1}")
    for name in ("root", "target", "neg_target"):
        if row[name] not in nodes:
            problems.append(f"{name}: {row[name]} is outside 0..{len(nodes) - 1}")
    return problems


def check_graph(row: dict) -> list[str]:
    """Problems of edges, root, target and neg_target among themselves."""
    symbols, edges, root = row["idx_to_symbol"], row["edges"], row["root"]
    problems, reached = [], distances(edges, root)
    if root == row["target"]:
        problems.append(f"target: {symbols[root]} is the root itself")
    if has_cycle(edges):
        problems.append("edges: the graph has a cycle")
    if row["target"] not in reached:
        problems.append(f"target: {symbols[row['target']]} is not reached from {symbols[root]}")
    if row["neg_target"] in reached:
        problems.append(f"neg_target: {symbols[row['neg_target']]} is reached from {symbols[root]}")
    return problems


def split_question(row: dict) -> tuple[list[str], list[int]] | None:
    """The facts of a question as they stand there, and its candidates, two nodes in the order in
    which they are named; None where the question does not ask for them."""
    symbols, root = row["idx_to_symbol"], row["idx_to_symbol"][row["root"]]
    for nodes in (["target", "neg_target"], ["neg_target", "target"]):
        candidates = [row[name] for name in nodes]
        ending = question_text([], root, [symbols[node] for node in candidates]).lstrip()
        if row["question"].endswith(" " + ending):
            facts = row["question"][: -len(ending) - 1]
            return re.split(r" \| |(?<=\.) ", facts), candidates
    return None


def check_text(row: dict) -> list[str]:
    """Problems of question, steps and answer, given edges, root, target and neg_target."""
    symbols, steps = row["idx_to_symbol"], row["steps"]
    root, target, neg_target = (symbols[row[name]] for name in ("root", "target", "neg_target"))
    edge_of = {fact(symbols, a, b): (a, b) for a, b in row["edges"]}
    problems: list[str] = []
    split = split_question(row)
    if split is None:
        ending = question_text([], root, [target, neg_target]).lstrip()
        problems.append(f"question: does not end in {ending!r}, in either order")
    else:
        stated, edges = Counter(split[0]), Counter(fact(symbols, a, b) for a, b in row["edges"])
        problems += [f"question: {text!r} is not in edges" for text in stated - edges]
        problems += [f"question: lacks {text!r}, which is in edges" for text in edges - stated]
    node = row["root"]
    for text in steps:
        start, end = edge_of.get(text, (None, None))
        if start != node:
            problems.append(f"steps: {text!r} is not an edge from {symbols[node]}")
            break
        node = end
    else:
        if node != row["target"]:
            problems.append(f"steps: end at {symbols[node]}, not at the target {target}")
    if row["answer"] != answer_text(root, target):
        problems.append(f"answer: {row['answer']!r}, but the target is {target}")
    return problems


def check_row(row: Any) -> list[str]:
    """What contradicts itself in a row, as a list of "field: problem"; empty for a good row."""
    return check_fields(row) or check_graph(row) + check_text(row)


def read_prosqa(path: str | Path) -> list[dict]:
    """The rows of a ProsQA file, the ancestor's or ours, symbolic or not.

    ValueError has one line per contradictory row: file, row (counted from 0), first three problems.
    """
    rows = read_json(path)
    if type(rows) is not list or not rows:
        raise ValueError(f"{path}: not a JSON list of rows")
    checked = {k: check_row(row) for k, row in enumerate(rows)}
    lines = [f"{path}: row {k}: {'; '.join(bad[:3])}" for k, bad in checked.items() if bad]
    if lines:
        raise ValueError("\n".join(lines))
    return rows


def statistics(rows: list[dict]) -> dict[str, float]:
    """Means over the rows: nodes, edges, hops from root to target, number of shortest paths."""
    ways = [distances(row["edges"], row["root"])[row["target"]] for row in rows]
    return {
        "nodes": sum(len(row["idx_to_symbol"]) for row in rows) / len(rows),
        "edges": sum(len(row["edges"]) for row in rows) / len(rows),
        "hops": sum(hops for hops, _ in ways) / len(rows),
        "paths": sum(paths for _, paths in ways) / len(rows),
    }


def print_statistics(rows_by_name: dict[str, list[dict]]) -> None:
    """A table of the statistics of lists of rows, the paper's above them."""
    print(f"{'means':12}{'rows':>8}" + "".join(f"{key:>8}" for key in PAPER))
    print(f"{'the paper':20}" + "".join(f"{value:8.1f}" for value in PAPER.values()))
    for name, rows in rows_by_name.items():
        print(f"{name:12}{len(rows):8}" + "".join(f"{x:8.2f}" for x in statistics(rows).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", metavar="FILE", help="only check a file, print its statistics")
    parser.add_argument("--output_dir", default="data")
    parser.add_argument("--prefix", default="prosqa", help="start of the files' names")
    for name, size in (("train", 17886), ("validation", 300), ("test", 500)):
        parser.add_argument(f"--{name}", type=count, default=size, help=f"rows (default {size})")
    parser.add_argument("--seed", type=count, default=0)
    for name, number, meaning in (
        ("num_nodes", 28, "drawn per graph; those without a fact are left out (default 28)"),
        ("min_hops", 3, "from root to target (default 3)"),
        ("max_hops", 6, "more of both: longer chains than a model was trained on (default 6)"),
        ("num_symbols", None, "symbolic concepts are drawn from so many (default: num_nodes)"),
    ):
        parser.add_argument(f"--{name}", type=count, default=number, help=meaning)
    parser.add_argument(
        "--mean_parents",
        type=float,
        default=MEAN_PARENTS,
        help=f"of a new node (default {MEAN_PARENTS}, the paper's)",
    )
    parser.add_argument(
        "--depth_weight",
        type=float,
        default=DEPTH_WEIGHT,
        help="how much deep nodes are preferred as parents: longer, thinner graphs "
        f"(default {DEPTH_WEIGHT}, the paper's)",
    )
    parser.add_argument("--symbolic", action="store_true", help="one token per concept")
    args = parser.parse_args()
    if args.check:
        print_statistics({Path(args.check).stem: read_prosqa(args.check)})
        return
    # Training rows are drawn last: the other files stay the same when --train changes.
    valid, test, train = generate(
        [args.validation, args.test, args.train],
        args.seed,
        args.num_nodes,
        args.min_hops,
        args.max_hops,
        args.symbolic,
        args.mean_parents,
        args.depth_weight,
        args.num_symbols,
    )
    splits = {"train": train, "validation": valid, "test": test}
    write_json_files(
        {Path(args.output_dir, f"{args.prefix}_{name}.json"): rows for name, rows in splits.items()}
    )
    print_statistics({name: rows for name, rows in splits.items() if rows})


if __name__ == "__main__":
    run_script(main)
