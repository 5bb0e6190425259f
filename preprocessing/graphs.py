"""Directed graphs as lists of edges: drawn, searched, checked and compared."""

import graphlib
import hashlib
import math
import random
from collections.abc import Sequence

Edges = Sequence[Sequence[int]]  # pairs of nodes, from parent to child
# Fitted to the ancestor's file: the share of new nodes that one root may reach, for each of two.
ONE_ROOT_SHARE = 0.4


def distances(edges: Edges, root: int) -> dict[int, tuple[int, int]]:
    """{node: (hops from root, number of shortest paths)} of the nodes that can be reached."""
    children: dict[int, list[int]] = {}
    for a, b in edges:
        children.setdefault(a, []).append(b)
    hops, paths, queue = {root: 0}, {root: 1}, [root]
    for a in queue:
        for b in children.get(a, []):
            if b not in hops:
                hops[b], paths[b] = hops[a] + 1, 0
                queue.append(b)
            if hops[b] == hops[a] + 1:
                paths[b] += paths[a]
    return {node: (hops[node], paths[node]) for node in queue}


def random_shortest_path(rng: random.Random, edges: Edges, root: int, target: int) -> list[int]:
    """The nodes of one shortest path from root to target, both included."""
    reached, path = distances(edges, root), [target]
    while path[-1] != root:
        before = reached[path[-1]][0] - 1
        path.append(
            rng.choice(
                [a for a, b in edges if b == path[-1] and a in reached and reached[a][0] == before]
            )
        )
    return path[::-1]


def has_cycle(edges: Edges) -> bool:
    order: graphlib.TopologicalSorter = graphlib.TopologicalSorter()
    for a, b in edges:
        order.add(b, a)
    try:
        order.prepare()
    except graphlib.CycleError:
        return True
    return False


def canonical_hash(row: dict) -> str:
    """A hash of graph and question that does not depend on names, node numbers or fact order.

    Colour refinement (Weisfeiler and Lehman): a node's colour is the rank of its own colour and its
    neighbours'. Rows equal up to renaming have equal hashes. The reverse can fail only for graphs
    that refinement cannot tell apart; the generator then drops a good row.
    """
    num_nodes = len(row["idx_to_symbol"])
    parents: list[list[int]] = [[] for _ in range(num_nodes)]
    children: list[list[int]] = [[] for _ in range(num_nodes)]
    for a, b in row["edges"]:
        parents[b].append(a)
        children[a].append(b)
    special = [row["root"], row["target"], row["neg_target"]]
    colours = [special.index(node) if node in special else 3 for node in range(num_nodes)]
    num_colours = 0
    while num_colours < len(set(colours)):
        num_colours = len(set(colours))
        views = [
            (
                colours[node],
                tuple(sorted([colours[a] for a in parents[node]])),
                tuple(sorted([colours[b] for b in children[node]])),
            )
            for node in range(num_nodes)
        ]
        rank = {view: k for k, view in enumerate(sorted(views))}
        colours = [rank[view] for view in views]
    form = (
        sorted(colours),
        sorted((colours[a], colours[b]) for a, b in row["edges"]),
        [colours[node] for node in special],
    )
    return hashlib.sha256(repr(form).encode()).hexdigest()


def poisson(rng: random.Random, mean: float) -> int:
    """A Poisson draw (Knuth): how many uniform factors keep a product above exp(-mean)."""
    k, product = 0, rng.random()
    while product > math.exp(-mean):
        k, product = k + 1, product * rng.random()
    return k


def random_edges(
    rng: random.Random, num_nodes: int, mean_parents: float, depth_weight: float
) -> list[tuple[int, int]]:
    """Edges (parent, child) of a random graph without cycles, grown from the two roots 0 and 1.

    Each new node takes a Poisson number of older nodes as parents, deep ones rather than shallow
    ones: all from below root 0, all from below root 1, or any. A node without parents is one more
    root.
    """
    below, depth = [{0}, {1}], [0, 0]
    edges: list[tuple[int, int]] = []
    for node in range(2, num_nodes):
        u = rng.random()
        side = {0} if u < ONE_ROOT_SHARE else {1} if u < 2 * ONE_ROOT_SHARE else None
        older = [a for a in range(node) if side is None or below[a] == side]
        # The k largest u ** (1 / weight) are a weighted sample of k without replacement.
        older.sort(key=lambda a: rng.random() ** (1 / (1 + depth_weight * depth[a])))
        parents = older[len(older) - min(poisson(rng, mean_parents), len(older)) :]
        edges += [(a, node) for a in sorted(parents)]
        below.append(set().union(*(below[a] for a in parents)))
        depth.append(1 + min(depth[a] for a in parents) if parents else 0)
    return edges
