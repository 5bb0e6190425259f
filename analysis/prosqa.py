"""ProsQA's graphs against what a model writes and expects: classes of paths, the search tree.

The paper's section 5 (arXiv 2412.06769). A graph is a row of preprocessing/prosqa.py.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from analysis import pictures
from analysis.output import add_config, check_output, chosen_rows, whole_numbers, write_json
from analysis.probe import Probe, load_probe, read_config
from dataset import IGNORED, Sample, StageDataset, collate
from engine.text import DEFAULT, TextFormat
from preprocessing.graphs import distances
from preprocessing.prosqa import fact, read_prosqa
from utils import Config, Method, UserError

PATH_CLASSES = (
    "correct path",
    "longer path",
    "hallucinated edge",
    "wrong target",
    "correct label only",
    "incorrect label only",
)
TREE_ROWS = 3  # shown where --rows is not given


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument("--rows", help="of val_path, such as 0,1,2")
    command.add_argument("--output_dir", type=Path)
    command.add_argument("--latents", help="numbers, default: all up to the last stage's")


def run(args: argparse.Namespace) -> None:
    """Classes of the outputs and the search tree, for each number of latents."""
    config = read_config(*args.config)
    folder = args.output_dir or config.run_dir
    check_output(folder, "prosqa.json", "prosqa_paths.png")
    graphs, numbers = read_graphs(config), latent_numbers(config, args.latents)
    probe = load_probe(config)
    graphs = graphs[: len(probe.rows)]
    rows = chosen_rows(args.rows, TREE_ROWS, probe)
    names = {row: f"prosqa_tree_row_{row}.png" for row in rows}
    check_output(folder, *names.values())
    datasets = {number: probe.dataset(number) for number in numbers}
    shares, right = {}, {}
    for number, dataset in datasets.items():
        shares[number], right[number] = judge_paths(probe, dataset, graphs)
    trees = [search_tree(probe, datasets, row, graphs[row]) for row in rows]
    print(describe_paths(shares, right, len(graphs)))
    print("\n".join(describe_tree(tree) for tree in trees))
    found = {"checkpoint": str(probe.inputs.start.source), "shares": shares, "accuracy": right}
    write_json(folder / "prosqa.json", {**found, "trees": trees})
    pictures.draw_paths(shares, right, len(graphs), folder / "prosqa_paths.png")
    for row, tree in zip(rows, trees):
        pictures.draw_trees(tree, folder / names[row])
    print(f"written: {folder}/" + ", ".join(["prosqa.json", "prosqa_paths.png", *names.values()]))


def read_graphs(config: Config) -> list[dict]:
    """The rows of val_path with their graphs. Raises UserError, a file of another task included."""
    if config.val_path is None:
        raise UserError("val_path: there are no rows to ask; give a file of ProsQA's rows")
    try:
        return read_prosqa(config.val_path)
    except (OSError, ValueError) as error:
        first, *more = str(error).splitlines()
    others = f" (and {len(more)} more rows)" if more else ""
    raise UserError(
        f"{first}{others}; val_path needs rows of ProsQA with their graphs, as "
        "preprocessing/prosqa.py writes and checks them"
    )


def latent_numbers(config: Config, latents: str | None) -> list[int]:
    """Those of --latents, else of eval_num_latents, else all up to the last stage's. Raises
    UserError."""
    numbers = [number for number in config.forced_latents if number is not None]
    if latents is not None:
        numbers = whole_numbers(latents, "--latents")
    elif not numbers:
        numbers = list(range(config.max_latent_stage * config.c_thought + 1))
        numbers = numbers if config.method is Method.COCONUT else [0]
    if config.method is not Method.COCONUT and numbers != [0]:
        raise UserError(f"--latents: {numbers}, but this method has no latents; give --latents 0")
    return numbers


# ------------------------------------------------------------------------------- paths


def judge_paths(
    probe: Probe, dataset: StageDataset, graphs: list[dict]
) -> tuple[dict[str, float], float]:
    """The share of each class of outputs over all rows, and the accuracy."""
    counts: Counter[str] = Counter()
    right = 0
    thinks = probe.config.method is Method.COCONUT and probe.inputs.curriculum.c_thought > 0
    # without thoughts nothing stands for the steps that are left out
    replaced = dataset.num_latents if thinks else dataset.num_skipped
    everything = probe.complete(dataset, list(range(len(graphs))))
    for row, (graph, new) in enumerate(zip(graphs, everything)):
        text = probe.text(new)
        counts[classify(graph, text, int(replaced[row]), probe.text_format)] += 1
        answer = probe.text_format.answer(text)
        right += probe.text_format.same_answer(answer, graph["answer"])
    return {name: counts[name] / len(graphs) for name in PATH_CLASSES}, right / len(graphs)


def classify(graph: dict, completion: str, replaced: int, text_format: TextFormat = DEFAULT) -> str:
    """The class of an output (paper, section 5).

    replaced: the latents, which stand for the first edges, or the steps that a model without any
    was trained to leave out; after some, a path may start anywhere that the root reaches, after
    none at the root itself.
    """
    symbols, edges, target = graph["idx_to_symbol"], graph["edges"], graph["target"]
    written = text_format.steps(completion)
    if not written:
        right = text_format.same_answer(text_format.answer(completion), graph["answer"])
        return "correct label only" if right else "incorrect label only"
    edge_of = {fact(symbols, a, b): (a, b) for a, b in edges}
    path = [edge_of[text] for text in written if text in edge_of]
    reached = distances(edges, graph["root"])
    starts = reached if replaced else [graph["root"]]
    if (
        len(path) < len(written)
        or path[0][0] not in starts
        or any(before[1] != after[0] for before, after in zip(path, path[1:]))
    ):
        return "hallucinated edge"
    if path[-1][1] != target:
        return "wrong target"
    shortest = reached[path[0][0]][0] + len(path) == reached[target][0]
    return "correct path" if shortest else "longer path"


def describe_paths(
    shares: dict[int, dict[str, float]], accuracy: dict[int, float], rows: int
) -> str:
    lines = [f"{rows} rows", "  ".join([f"{'latents':7}", f"{'accuracy':>8}", *PATH_CLASSES])]
    for number, of_class in shares.items():
        cells = [f"{of_class[name]:>{len(name)}.1%}" for name in PATH_CLASSES]
        lines.append("  ".join([f"{number:<7}", f"{accuracy[number]:>8.1%}", *cells]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------- search tree


def search_tree(probe: Probe, datasets: dict[int, StageDataset], row: int, graph: dict) -> dict:
    """P(concept) as the one that the next written step starts from, after k latents and the
    marker that ends them: the frontier of the search. Nodes: all that the root reaches."""
    symbols, edges, root = graph["idx_to_symbol"], graph["edges"], graph["root"]
    reached = distances(edges, root)
    nodes = [
        {
            "name": symbols[n],
            "depth": depth,
            "height": heights(edges, n),
            "to_target": distances(edges, n).get(graph["target"], (None,))[0],
        }
        for n, (depth, _) in reached.items()
    ]
    after, not_reached, no_concept = {}, {}, {}
    for k, dataset in datasets.items():
        probabilities = next_concept(probe, dataset, row, symbols)
        after[str(k)] = {symbols[n]: probabilities[symbols[n]] for n in reached}
        not_reached[str(k)] = sum(probabilities.values()) - sum(after[str(k)].values())
        no_concept[str(k)] = 1 - sum(probabilities.values())
    return {
        "row": row,
        "root": symbols[root],
        "target": symbols[graph["target"]],
        "nodes": nodes,
        "edges": [[symbols[a], symbols[b]] for a, b in edges if a in reached],
        "after": after,
        "not_reached": not_reached,
        "no_concept": no_concept,
    }


def heights(edges: list, node: int) -> int:
    """Hops to the nearest leaf."""
    inner = {a for a, _ in edges}
    return min(hops for n, (hops, _) in distances(edges, node).items() if n not in inner)


def next_concept(
    probe: Probe, dataset: StageDataset, row: int, names: list[str]
) -> dict[str, float]:
    """The probability that the next text is the beginning of a step from each concept, "Every
    lempus" or a bare name or symbol: the product over its tokens. The sum is at most 1."""
    tokens = {name: _tokens_after_a_line(probe.inputs.tokenizer, name) for name in names}
    prompt, size = dataset.question(row), probe.config.batch_size_eval
    probabilities: dict[str, float] = {}
    first = len(prompt.input_ids) - 1  # the position that predicts what follows the prompt
    for start in range(0, len(names), size):
        part = names[start : start + size]
        samples = [_continued(prompt, tokens[name]) for name in part]
        for logits, name in zip(probe.logits(collate(samples, probe.inputs.pad_id)), part):
            ids = tokens[name]
            logs = logits[first : first + len(ids)].float().log_softmax(-1)
            probabilities[name] = logs[range(len(ids)), ids].sum().exp().item()
    # a tokenizer of digits: what goes on to 12 is not 1
    for name in sorted(names, key=lambda name: -len(tokens[name])):
        longer = [
            other
            for other in names
            if len(tokens[other]) > len(tokens[name])
            and tokens[other][: len(tokens[name])] == tokens[name]
        ]
        among_longer = sum(probabilities[other] for other in longer)
        probabilities[name] = max(probabilities[name] - among_longer, 0.0)
    return probabilities


def _tokens_after_a_line(tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """The tokens of the beginning of a step: some tokenizers put a blank before a whole text."""
    beginning = f"Every {name}" if fact([name, name], 0, 1).startswith("Every ") else name
    encoding = tokenizer("\n" + beginning, add_special_tokens=False)
    return encoding["input_ids"][encoding.char_to_token(1) :]


def _continued(prompt: Sample, tokens: list[int]) -> Sample:
    input_ids = np.concatenate([prompt.input_ids, np.array(tokens, dtype=np.int64)])
    return prompt._replace(input_ids=input_ids, labels=np.full(len(input_ids), IGNORED))


def describe_tree(tree: dict) -> str:
    """A line for each concept: hops from the root, to the nearest leaf, to the target; P by k."""
    numbers = list(tree["after"])
    lines = [
        f"\nrow {tree['row']}: root {tree['root']}, target {tree['target']}; probability that "
        "the next step starts there, after k latents",
        f"{'concept':14}{'depth':>6}{'height':>8}{'to target':>11}"
        + "".join(f"{'k=' + k:>8}" for k in numbers),
    ]
    for node in sorted(tree["nodes"], key=lambda node: node["depth"]):
        hops = "-" if node["to_target"] is None else node["to_target"]
        lines.append(
            f"{node['name']:14}{node['depth']:>6}{node['height']:>8}{hops:>11}"
            + "".join(f"{tree['after'][k][node['name']]:>8.3f}" for k in numbers)
        )
    for title, key in (("(not reached)", "not_reached"), ("(no concept)", "no_concept")):
        lines.append(f"{title:39}" + "".join(f"{tree[key][k]:>8.3f}" for k in numbers))
    return "\n".join(lines)
