"""ProsQA's graphs against what a model writes and expects: classes of paths, the search tree.

The paper's section 5 (arXiv 2412.06769). A graph is a row of preprocessing/prosqa.py; a subject is
analysis.Subject.
"""

from collections import Counter

import torch

from dataset import collate
from evaluation import extract_answer, extract_steps, same_answer
from preprocessing.prosqa import distances, fact

PATH_CLASSES = ("correct path", "longer path", "hallucinated edge", "wrong target",
                "correct label only", "incorrect label only")


def judge_paths(subject, dataset, graphs: list[dict]) -> tuple[dict[str, float], float]:
    counts, right, size = Counter(), 0, subject.config.batch_size_eval
    for start in range(0, len(graphs), size):
        rows = list(range(start, min(start + size, len(graphs))))
        for row, new in zip(rows, subject.complete(dataset, rows)):
            text = subject.text(new)
            counts[classify(graphs[row], text)] += 1
            right += same_answer(extract_answer(text), graphs[row]["answer"])
    return {name: counts[name] / len(graphs) for name in PATH_CLASSES}, right / len(graphs)


def classify(graph: dict, completion: str) -> str:
    """The class of an output (paper, section 5). After k latents a path may start anywhere that
    the root reaches: the latents stand for the edges before."""
    symbols, edges, target = graph["idx_to_symbol"], graph["edges"], graph["target"]
    written = extract_steps(completion)
    if not written:
        right = same_answer(extract_answer(completion), graph["answer"])
        return "correct label only" if right else "incorrect label only"
    edge_of = {fact(symbols, a, b): (a, b) for a, b in edges}
    path = [edge_of.get(text) for text in written]
    reached = distances(edges, graph["root"])
    if None in path or path[0][0] not in reached or any(
        before[1] != after[0] for before, after in zip(path, path[1:])
    ):
        return "hallucinated edge"
    if path[-1][1] != target:
        return "wrong target"
    shortest = reached[path[0][0]][0] + len(path) == reached[target][0]
    return "correct path" if shortest else "longer path"


@torch.no_grad()
def search_tree(subject, datasets: dict, row: int, graph: dict) -> dict:
    """P(concept) as the one that the next written step starts from, after k latents and the
    marker that ends them: the frontier of the search. Nodes: all that the root reaches."""
    symbols, edges, root = graph["idx_to_symbol"], graph["edges"], graph["root"]
    depth = {node: hops for node, (hops, _) in distances(edges, root).items()}
    height = {node: heights(edges, node) for node in depth}
    nodes = [{"name": symbols[n], "depth": depth[n], "height": height[n]} for n in depth]
    return {
        "row": row, "root": symbols[root], "target": symbols[graph["target"]], "nodes": nodes,
        "edges": [[symbols[a], symbols[b]] for a, b in edges if a in depth],
        "after": {str(k): next_concept(subject, data, row, [n["name"] for n in nodes])
                  for k, data in datasets.items()},
    }


def heights(edges, node: int) -> int:
    """Hops to the nearest leaf."""
    inner = {a for a, _ in edges}
    return min(hops for n, (hops, _) in distances(edges, node).items() if n not in inner)


def next_concept(subject, dataset, row: int, names: list[str]) -> dict[str, float]:
    """The product of the probabilities of a name's tokens where a step starts."""
    encode = lambda text: subject.inputs.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = dataset.question(row)
    found = {}
    for name in names:
        lead = encode("Every") if name.islower() else []  # people and symbols start a step
        tokens = encode(f"Every {name}" if lead else name)
        ids = torch.tensor(tokens).numpy()
        both = [*prompt.input_ids, *ids]
        sample = prompt._replace(input_ids=torch.tensor(both).numpy(),
                                 labels=torch.full((len(both),), -100).numpy())
        batch = subject.on_device(collate([sample], subject.inputs.pad_id))
        keys = ("input_ids", "attention_mask", "position_ids", "latent_columns")
        output = subject.model(**{key: batch[key] for key in keys}, return_logits=True)
        logs = output.logits[0].float().log_softmax(-1)  # (T, V)
        at = range(len(prompt.input_ids) + len(lead), len(both))
        found[name] = float(sum(logs[t - 1, both[t]] for t in at).exp())
    return found


def describe_paths(shares, accuracy, rows: int) -> str:
    lines = [f"{rows} rows", f"{'latents':8}{'accuracy':>10}" + "".join(
        f"{name:>22}" for name in PATH_CLASSES)]
    for number, found in shares.items():
        lines.append(f"{number:<8}{accuracy[number]:>10.1%}"
                     + "".join(f"{found[name]:>22.1%}" for name in PATH_CLASSES))
    return "\n".join(lines)


def describe_tree(tree: dict) -> str:
    lines = [f"\nrow {tree['row']}: root {tree['root']}, target {tree['target']}; probability as "
             "the next concept after k latents",
             f"{'concept':12}{'depth':>6}{'height':>7}" + "".join(
                 f"{'k=' + k:>8}" for k in tree["after"])]
    for node in sorted(tree["nodes"], key=lambda n: n["depth"]):
        lines.append(f"{node['name']:12}{node['depth']:>6}{node['height']:>7}" + "".join(
            f"{found[node['name']]:>8.3f}" for found in tree["after"].values()))
    return "\n".join(lines)
