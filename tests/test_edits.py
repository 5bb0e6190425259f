"""analysis/edits.py: ProsQA rows with one edge rewritten, and answers that follow or do not.

The truth of a row is found here from its question's words alone, by another search.
"""

import json
import re

import pytest
from conftest import Workspace
from numerics import in_float64

from analysis import __main__ as analysis
from analysis.edits import (
    OUTCOMES,
    balance,
    describe_edits,
    edit_rows,
    follow_the_edit,
    judge_pairs,
    truth_is_first,
)
from analysis.faithful import LEAST_ROWS
from analysis.probe import Probe, load_probe, read_config
from analysis.row_files import describe_files
from engine.evaluation import wilson_interval
from engine.text import DEFAULT
from preprocessing.prosqa import check_row, generate, read_prosqa
from utils import UserError

SMALL = dict(num_nodes=9, min_hops=2, max_hops=4, symbolic=True)
KINDS = {
    "words": {},
    "symbols": dict(symbolic=True),
    "small": SMALL,
    "long": dict(symbolic=True, num_nodes=40, min_hops=6, max_hops=9),
}


def read(question: str) -> tuple[list[tuple[str, str]], str, list[str]]:
    """Edges, root and candidates of a question in words or symbols, as words."""
    if "@" in question:
        facts, candidates, root = re.split(r" [?@] ", question)
        return [tuple(fact.split()) for fact in facts.split(" | ")], root, candidates.split()
    *facts, asked = question.split(". ")
    edges = [tuple(fact.removeprefix("Every ").split(" is a ")) for fact in facts]
    root, first, second = re.fullmatch(r"Is (\w+) a (\w+) or (\w+)\?", asked).groups()
    return edges, root, [first, second]


def reached_from(edges, root) -> set[str]:
    """All words that a root leads to: more and more, until no edge adds one."""
    reached, before = {root}, set()
    while reached != before:
        before = set(reached)
        reached |= {b for a, b in edges if a in reached}
    return reached


def true_answer(question: str) -> str:
    edges, root, candidates = read(question)
    (truth,) = set(candidates) & reached_from(edges, root)
    return truth if root.isdigit() else f"{root} is a {truth}."


def first_answer(question: str) -> str:
    _, root, candidates = read(question)
    return candidates[0] if root.isdigit() else f"{root} is a {candidates[0]}."


def one_edge_flips(row: dict) -> bool:
    """By the definition, tried with every edge and every concept."""
    edges, root, candidates = read(row["question"])
    (old,) = set(candidates) & reached_from(edges, root)
    (new,) = set(candidates) - {old}
    concepts = {b for _, b in edges}
    for place, (u, _) in enumerate(edges):
        for w in concepts:
            changed = [*edges[:place], (u, w), *edges[place + 1 :]]
            reached = reached_from(changed, root)
            if (
                new in reached
                and old not in reached
                and u not in reached_from(changed, w)
                and any(b == old for _, b in changed)
            ):
                return True
    return False


def check_edits(rows: list[dict], seed: int) -> None:
    """What every edit must be, whatever the rows."""
    edits = edit_rows(rows, seed)
    assert edits and [number for number, _ in edits] == sorted({n for n, _ in edits})
    for number, row in edits:
        old = rows[number]
        assert check_row(row) == []
        assert true_answer(old["question"]) == old["answer"]
        assert true_answer(row["question"]) == row["answer"] != old["answer"]
        assert (row["target"], row["neg_target"]) == (old["neg_target"], old["target"])
        words, changed = old["question"].split(" "), row["question"].split(" ")
        (place,) = [k for k, (a, b) in enumerate(zip(words, changed, strict=True)) if a != b]
        assert changed[place - 1] == words[place - 1]  # one word, the object of a fact
        edges, root, candidates = read(row["question"])
        assert set(candidates) <= {b for _, b in edges} - {root}
        assert changed[place].rstrip(".") not in {a for a, _ in edges} - {b for _, b in edges}
        assert {b for _, b in edges} <= {b for _, b in read(old["question"])[0]}


# ------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_is_a_good_row_whose_truth_is_the_other_candidate(kind, seed):
    check_edits(generate([25], seed=seed + 5, **KINDS[kind])[0], seed)


@pytest.mark.parametrize("seed", [0, 7])
def test_every_edit_of_the_ancestors_file_is_good(test_data, seed):
    rows = read_prosqa(test_data / "prosqa_valid.json")
    check_edits(rows, seed)
    assert len(edit_rows(rows, seed)) == 194  # of 300


@pytest.mark.parametrize("kind", ["words", "small"])
def test_only_rows_that_no_edge_can_flip_are_left_out(kind):
    rows = generate([60], seed=3, **KINDS[kind])[0]
    edited = {number for number, _ in edit_rows(rows, 0)}
    assert 0 < len(edited) < 60
    assert edited == {number for number, row in enumerate(rows) if one_edge_flips(row)}


def test_the_seed_and_the_number_of_the_row_decide():
    rows = generate([40], seed=3, symbolic=True)[0]
    assert edit_rows(rows, 0) == edit_rows(rows, 0) != edit_rows(rows, 1)
    some = [edit for edit in edit_rows(rows, 0) if edit[0] < 10]
    assert edit_rows(rows[:10], 0) == some


def test_chains_keep_their_length_where_they_can():
    """0 -> 2 -> 3, beside 1 -> 4 -> 5 -> 6: two edges and two new ends each; one has two hops."""
    row = {
        "question": "0 2 | 2 3 | 7 3 | 1 4 | 4 5 | 5 6 ? 3 6 @ 0",
        "steps": ["0 2", "2 3"],
        "answer": "3",
        "idx_to_symbol": list("01234567"),
        "edges": [[0, 2], [2, 3], [7, 3], [1, 4], [4, 5], [5, 6]],
        "root": 0,
        "target": 3,
        "neg_target": 6,
    }
    assert check_row(row) == []
    edited = {edit_rows([row], seed)[0][1]["question"] for seed in range(20)}
    assert edited == {
        "0 5 | 2 3 | 7 3 | 1 4 | 4 5 | 5 6 ? 3 6 @ 0",
        "0 2 | 2 6 | 7 3 | 1 4 | 4 5 | 5 6 ? 3 6 @ 0",
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_are_balanced_before_and_after(seed):
    """In half of the pairs the old truth is named first, in the other half the new one."""
    rows = generate([90], seed=4, **SMALL)[0]
    every = edit_rows(rows, seed)
    edits = balance(every, seed)
    first = [truth_is_first(row) for _, row in edits]
    assert len(edits) == 2 * sum(first)
    assert [truth_is_first(rows[number]) for number, _ in edits] == [not f for f in first]
    assert all((first_answer(r["question"]) == r["answer"]) == truth_is_first(r) for _, r in edits)
    of_every = sum(truth_is_first(row) for _, row in every)
    assert sum(first) == min(of_every, len(every) - of_every)  # no more than the surplus is lost
    assert [edit for edit in every if edit in edits] == edits


# ------------------------------------------------------------------------------- the report


def test_outcomes_are_counted_by_pairs():
    pairs = [{"gold_answer": "1", "new_gold_answer": "2"}] * 8
    before = ["1", "1", "1", "1.0", "2", "2", None, "7"]
    after = ["2", "2", "1", None, "2", "1", "2", "7"]
    actual = judge_pairs(DEFAULT, pairs, before, after)
    counts = dict(original=4, edited=4, followed=2, kept=1)
    assert {name: actual[name]["rows"] for name in OUTCOMES} == counts
    for name, count in counts.items():
        assert actual[name]["rate"] == count / 8
        assert actual[name]["interval"] == list(wilson_interval(count, 8))


class Reader(Probe):
    """Answers by a search in the question that its data set holds."""

    answer_to = staticmethod(true_answer)

    def answers(self, dataset, rows, replaced=None):
        return [self.answer_to(dataset.encoded.rows[row]["question"]) for row in rows]


class Constant(Reader):
    """The candidate that is named first, whatever the graph."""

    answer_to = staticmethod(first_answer)


class Speaker(Probe):
    """Answers by all that the model writes: a random one hardly writes an answer's marker."""

    def answers(self, dataset, rows, replaced=None):
        return [self.text(new) for new in self.complete(dataset, rows, replaced)]


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory) -> Workspace:
    """A random model to evaluate with latents, and a file of graphs."""
    workspace = Workspace(model_folder, tmp_path_factory.mktemp("edits"))
    graphs = workspace.folder / "graphs.json"
    graphs.write_text(json.dumps(generate([24], seed=1, **SMALL)[0]))
    workspace.values |= dict(
        load_model_path=str(model_folder),
        resume=1,
        batch_size_eval=4,
        max_new_tokens=24,
        val_path=str(graphs),
    )
    return workspace


@pytest.fixture
def probe(folder) -> Probe:
    with in_float64():
        yield load_probe(read_config(str(folder.yaml())))


@pytest.fixture
def graphs(folder) -> list[dict]:
    return read_prosqa(folder.values["val_path"])


def test_a_model_that_reads_the_edges_follows_each_edit(probe, graphs):
    reader = Reader(probe.inputs, probe.model, probe.device)
    report = follow_the_edit(reader, graphs, [0, 2])
    assert report["pairs"] == 2 * (report["pairs"] // 2) > 6
    left_out = report["no_edge_flips"] + report["left_out_for_balance"]
    assert report["rows"] == 24 == report["pairs"] + left_out
    for outcomes in report["latents"].values():
        rates = [outcomes[name]["rate"] for name in ("original", "edited", "followed", "kept")]
        assert rates == [1, 1, 1, 0]


def test_a_model_that_names_a_place_is_right_in_half_and_follows_nothing(probe, graphs):
    constant = Constant(probe.inputs, probe.model, probe.device)
    outcomes = follow_the_edit(constant, graphs, [2])["latents"]["2"]
    rates = [outcomes[name]["rate"] for name in ("original", "edited", "followed", "kept")]
    assert rates == [0.5, 0.5, 0, 0.5]


def test_answers_are_those_of_the_rows_asked_one_by_one(probe, graphs):
    """Real answers of a real model, each pair's own, with each number of latents."""
    speaker, texts = Speaker(probe.inputs, probe.model, probe.device), set()
    graphs = graphs[:12]
    report = follow_the_edit(speaker, graphs, [0, 2], seed=3)
    assert list(report["latents"]) == ["0", "2"]
    for pair, (number, edited) in zip(report["edits"], balance(edit_rows(graphs, 3), 3)):
        old = graphs[number]
        assert pair["row"] == number and pair["fact"] in old["question"]
        assert old["question"].replace(pair["fact"], pair["becomes"], 1) == edited["question"]
        questions = [old["question"], edited["question"]]
        for latents in (0, 2):
            wanted = [answer.text for answer in probe.answer(questions, latents)]
            assert pair["answers"][str(latents)] == wanted
            texts.update(wanted)
    assert len(texts) > report["pairs"]


def test_edits_prints_a_table_and_writes_json(folder, tmp_path, capsys):
    options = ["--latents", "0,2", "--output_dir", str(tmp_path)]
    assert analysis.main(["edits", str(folder.yaml()), *options]) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "edits.json").read_text())
    assert describe_edits(report) in out and f"{report['pairs']} pairs of 24 rows" in out
    assert list(report["latents"]) == ["0", "2"] and len(report["edits"]) == report["pairs"]


def test_rows_of_one_label_are_refused(probe, graphs):
    edits = {number for number, _ in edit_rows(graphs, 0)}
    same = [row for k, row in enumerate(graphs) if k in edits and truth_is_first(row)]
    with pytest.raises(UserError, match="one edge can flip the answer of .* give more rows"):
        follow_the_edit(probe.with_rows(same), same, [0])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(val_path="val.json"), "row 0: idx_to_symbol: missing"),
        (dict(val_path="nowhere.json"), "nowhere.json"),
        (dict(max_new_tokens=3), "edited rows: a chain with its answer has "),
    ],
)
def test_what_cannot_be_is_one_line(folder, capsys, changes, words):
    if changes.get("val_path") == "val.json":
        changes = dict(val_path=str(folder.folder / "val.json"))
    assert analysis.main(["edits", str(folder.yaml(**changes)), "--latents", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.slow
def test_faithful_has_the_edits_and_other_rows_of_the_run_and_of_its_control(
    folder, tmp_path, capsys
):
    graphs = tmp_path / "graphs.json"
    graphs.write_text(json.dumps(generate([LEAST_ROWS], seed=2, **SMALL)[0]))
    others = folder.values["val_path"]
    config = str(folder.yaml(val_path=str(graphs), max_new_tokens=40))
    options = ["--edits", "--rows_of", others, "--output_dir", str(tmp_path)]
    for part in (config, "name=control", "coconut=False", "cot=True"):
        options += ["--cot", part]
    assert analysis.main(["faithful", config, *options]) == 0
    found = json.loads((tmp_path / "faithful.json").read_text())
    out = capsys.readouterr().out
    pairs = [(pair["row"], pair["becomes"]) for pair in found["edits"]["edits"]]
    for part, latents in ((found, ["2", "0"]), (found["control"], ["0"])):
        assert list(part["edits"]["latents"]) == latents
        assert [(pair["row"], pair["becomes"]) for pair in part["edits"]["edits"]] == pairs
        assert part["other_rows"][others]["rows"] == 24
        assert list(part["other_rows"][others]["accuracy"]) == latents
        assert describe_edits(part["edits"]) in out
        assert describe_files(part["other_rows"]) in out
    assert out.count("the control:\n") == 2
