"""preprocessing/prosqa.py: generated rows are right, different, reproducible; wrong ones are named.

COCONUT_TEST_DATA names a folder with the ancestor's prosqa_valid.json; without it those tests skip.
"""

import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from preprocessing.common import write_json_files  # noqa: E402
from preprocessing.graphs import canonical_hash, distances  # noqa: E402
from preprocessing.prosqa import (  # noqa: E402
    NAMES,
    check_row,
    generate,
    read_prosqa,
    split_question,
    statistics,
    symbolic_vocabulary,
)

GOOD_ROW = {
    "question": "Tom is a wumpus. Every wumpus is a yumpus. Every wumpus is a zumpus. "
    "Max is a rompus. Is Tom a rompus or zumpus?",
    "steps": ["Tom is a wumpus.", "Every wumpus is a zumpus."],
    "answer": "Tom is a zumpus.",
    "idx_to_symbol": ["Tom", "Max", "wumpus", "yumpus", "zumpus", "rompus"],
    "edges": [[0, 2], [2, 3], [2, 4], [1, 5]],
    "root": 0,
    "target": 4,
    "neg_target": 5,
}


@pytest.fixture(scope="module")
def ancestor_file():
    folder = os.environ.get("COCONUT_TEST_DATA")
    if not folder:
        pytest.skip("COCONUT_TEST_DATA is not set")
    return Path(folder, "prosqa_valid.json")


@pytest.fixture(scope="module")
def rows():
    return generate([400], seed=5)[0]


def test_depth_weight_and_mean_parents_shape_the_graphs(rows):
    """Thin and long: fewer edges for the nodes, more hops than the paper's graphs."""
    thin = statistics(
        generate([100], seed=5, min_hops=1, max_hops=20, mean_parents=0.9, depth_weight=50)[0]
    )
    usual = statistics(generate([100], seed=5, min_hops=1, max_hops=20)[0])
    assert thin["edges"] / thin["nodes"] < 0.8 * usual["edges"] / usual["nodes"]
    assert thin["hops"] > usual["hops"] + 0.5


def test_generation_shows_its_progress(monkeypatch, capsys):
    monkeypatch.setattr("preprocessing.prosqa.PROGRESS", 5)
    generate([4, 8])
    assert capsys.readouterr().err == "5 of 12 rows\n10 of 12 rows\n"


@pytest.fixture(scope="module")
def symbolic_rows():
    return generate([100], seed=5, symbolic=True)[0]


def run(*arguments):
    command = [sys.executable, str(ROOT / "preprocessing" / "prosqa.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def renamed(row, seed):
    """The same problem: other node numbers, other words, facts and edges in another order."""
    rng, row = random.Random(seed), copy.deepcopy(row)
    order = list(range(len(row["idx_to_symbol"])))
    rng.shuffle(order)
    row["edges"] = [[order[a], order[b]] for a, b in row["edges"]]
    rng.shuffle(row["edges"])
    for name in ("root", "target", "neg_target"):
        row[name] = order[row[name]]
    row["idx_to_symbol"] = [f"x{k}" for k in range(len(order))]
    return row


# --------------------------------------------------------------------------- generated rows


def test_generated_rows_pass_the_checker(rows, symbolic_rows):
    assert [check_row(row) for row in rows + symbolic_rows] == [[]] * 500


def test_statistics_are_near_the_papers(rows):
    """Paper: 23.0 nodes, 36.0 edges, shortest path 3.8, 1.6 shortest paths."""
    actual = statistics(rows)
    assert actual["nodes"] == pytest.approx(23.0, abs=0.6)
    assert actual["edges"] == pytest.approx(36.0, abs=1.5)
    assert actual["hops"] == pytest.approx(3.8, abs=0.2)
    assert actual["paths"] == pytest.approx(1.6, abs=0.25)


def test_statistics_of_a_known_row():
    assert statistics([GOOD_ROW]) == {"nodes": 6, "edges": 4, "hops": 2, "paths": 1}
    diamond = [[0, 1], [0, 2], [1, 3], [2, 3], [0, 4], [4, 5], [5, 3]]
    assert distances(diamond, 0)[3] == (2, 2)


def test_candidates_come_in_either_order_and_facts_are_shuffled(rows):
    first = sum(
        row["question"].endswith(f" or {row['idx_to_symbol'][row['neg_target']]}?") for row in rows
    )
    assert 0.4 < first / len(rows) < 0.6
    in_order = [
        row["question"].startswith(f"{row['idx_to_symbol'][row['edges'][0][0]]} is ")
        for row in rows
    ]
    assert sum(in_order) < len(rows) / 2


def test_nodes_without_parents_are_people(rows):
    for row in rows:
        children = {b for _, b in row["edges"]}
        people = {k for k, word in enumerate(row["idx_to_symbol"]) if word in NAMES}
        assert people == set(range(len(row["idx_to_symbol"]))) - children


@pytest.mark.parametrize("low, high, num_nodes", [(1, 2, 10), (3, 3, 20), (5, 6, 28), (7, 9, 40)])
def test_hops_and_size_are_as_asked(low, high, num_nodes):
    for row in generate([20], num_nodes=num_nodes, min_hops=low, max_hops=high)[0]:
        assert low <= len(row["steps"]) <= high
        assert distances(row["edges"], row["root"])[row["target"]][0] == len(row["steps"])
        assert len(row["idx_to_symbol"]) <= num_nodes
        assert check_row(row) == []


def test_the_seed_decides():
    assert generate([5, 3], seed=1) == generate([5, 3], seed=1)
    assert generate([5], seed=1) != generate([5], seed=2)


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, "2c9b16c4f86116d1"),
        (dict(symbolic=True, num_nodes=20), "b35f13a820d92e99"),
        (dict(symbolic=True, num_nodes=20, num_symbols=20), "b35f13a820d92e99"),
    ],
)
def test_rows_are_those_of_earlier_versions(options, wanted):
    """Published figures name a seed: another option leaves the rows of the old ones as they are."""
    text = json.dumps(generate([5, 20], **options))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == wanted


def test_more_rows_keep_the_earlier_ones():
    small, large = generate([4, 2, 3], seed=1), generate([4, 2, 9], seed=1)
    assert small[:2] == large[:2] and small[2] == large[2][:3]


def test_no_two_rows_are_equal_up_to_renaming():
    """Graphs this small come again and again: 300 draws hold far fewer than 300 problems."""
    splits = generate([30, 30, 30], num_nodes=9, min_hops=2, max_hops=4)
    hashes = [canonical_hash(row) for split in splits for row in split]
    assert len(set(hashes)) == 90


def test_too_small_graphs_are_refused():
    with pytest.raises(ValueError, match="found 1 different rows of 50"):
        generate([50], num_nodes=4, min_hops=1)


# ------------------------------------------------------------------------------------- hash


def test_hash_ignores_names_and_order(rows):
    for seed, row in enumerate(rows[:100]):
        assert canonical_hash(renamed(row, seed)) == canonical_hash(row)


def test_hash_sees_every_edge_and_the_question(rows):
    for row in rows[:30]:
        hashes = {canonical_hash(row)}
        changed = [
            {**row, "edges": row["edges"][:k] + row["edges"][k + 1 :]}
            for k in range(len(row["edges"]))
        ]
        changed.append({**row, "target": row["neg_target"], "neg_target": row["target"]})
        hashes.update(canonical_hash(other) for other in changed)
        # Not an equality: without either of two edges to twin leaves, the graphs are the same.
        assert canonical_hash(row) not in {canonical_hash(other) for other in changed}
        assert len(hashes) > len(row["edges"]) / 2


# --------------------------------------------------------------------------- symbolic rows


def test_symbolic_text_holds_the_graph(symbolic_rows):
    """Text -> graph -> text: the question alone gives edges, root and candidates back."""
    for row in symbolic_rows:
        symbols = row["idx_to_symbol"]
        facts, query = row["question"].split(" ? ")
        edges = [[symbols.index(word) for word in fact.split(" ")] for fact in facts.split(" | ")]
        candidates, root = query.split(" @ ")
        assert sorted(edges) == sorted(row["edges"])
        assert set(candidates.split(" ")) == {symbols[row["target"]], symbols[row["neg_target"]]}
        assert root == symbols[row["root"]]
        assert row["answer"] == symbols[row["target"]] == row["steps"][-1].split(" ")[1]


def test_every_symbolic_token_is_in_the_vocabulary(symbolic_rows):
    vocabulary = symbolic_vocabulary(28)
    assert len(vocabulary) == len(set(vocabulary)) == 31
    texts = [
        text for row in symbolic_rows for text in [row["question"], row["answer"], *row["steps"]]
    ]
    assert {token for text in texts for token in text.split(" ")} == set(vocabulary)


def test_small_graphs_name_the_concepts_of_larger_ones():
    """A model of 60 concepts knows all of them from rows of at most 20, and then graphs of 60."""
    small = generate([150], seed=2, symbolic=True, num_nodes=20, num_symbols=60)[0]
    assert [check_row(row) for row in small] == [[]] * 150
    assert max(len(row["idx_to_symbol"]) for row in small) <= 20
    assert {word for row in small for word in row["idx_to_symbol"]} == set(map(str, range(60)))
    large = generate([5], symbolic=True, num_nodes=60, min_hops=7, max_hops=12)[0]
    assert statistics(large)["nodes"] > 40 and statistics(large)["hops"] >= 7
    words = {token for row in large for token in row["question"].split(" ")}
    assert words <= set(symbolic_vocabulary(60))


def test_a_question_is_its_facts_and_its_candidates(rows, symbolic_rows):
    for row in [GOOD_ROW, *rows, *symbolic_rows]:
        facts, (first, second) = split_question(row)
        assert len(facts) == len(row["edges"])
        last = row["question"].replace("?", " ").replace("@", " ").split()
        words = [row["idx_to_symbol"][node] for node in (first, second)]
        assert [word for word in last if word in words][-2:] == words
    assert split_question({**GOOD_ROW, "neg_target": 3}) is None


# ------------------------------------------------------------------------------ wrong rows


def test_the_good_row_is_good():
    assert check_row(GOOD_ROW) == []


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"answer": "Tom is a rompus."}, "answer: 'Tom is a rompus.', but the target is zumpus"),
        ({"target": 5, "neg_target": 4}, "target: rompus is not reached from Tom"),
        ({"neg_target": 3}, "neg_target: yumpus is reached from Tom"),
        ({"target": 0}, "target: Tom is the root itself"),
        ({"edges": [[0, 2], [2, 3], [1, 5]]}, "target: zumpus is not reached from Tom"),
        (
            {"edges": [[0, 2], [2, 4], [1, 5]]},
            "question: 'Every wumpus is a yumpus.' is not in edges",
        ),
        ({"edges": GOOD_ROW["edges"] + [[4, 2]]}, "edges: the graph has a cycle"),
        ({"edges": GOOD_ROW["edges"] + [[5, 3]]}, "question: lacks 'Every rompus is a yumpus.'"),
        ({"edges": [[0, 6]]}, "edges: [0, 6] names a node outside 0..5"),
        ({"edges": [[0, -1]]}, "edges: [0, -1] names a node outside 0..5"),
        ({"edges": [[0, 1, 2]]}, "edges: [0, 1, 2] is not a pair of node numbers"),
        ({"edges": [[0, True]]}, "edges: [0, True] is not a pair of node numbers"),
        ({"edges": [7]}, "edges: 7 is not a pair of node numbers"),
        ({"root": 1}, "target: zumpus is not reached from Max"),
        ({"root": 6}, "root: 6 is outside 0..5"),
        ({"root": "0"}, "root: missing or not a value of type int"),
        (
            {"idx_to_symbol": ["Tom", "Max", "wumpus", "yumpus", "zumpus", "zumpus"]},
            "idx_to_symbol: names two nodes alike",
        ),
        (
            {"idx_to_symbol": ["Tom", "Max", "wumpus", "yumpus", "zumpus", ""]},
            "idx_to_symbol: holds something that is not a word",
        ),
        (
            {"idx_to_symbol": ["Tom", "Max", "wumpus", "vumpus", "zumpus", "rompus"]},
            "question: lacks 'Every wumpus is a vumpus.'",
        ),
        (
            {"question": GOOD_ROW["question"].replace("Is Tom", "Is Max")},
            "question: does not end in",
        ),
        ({"question": GOOD_ROW["question"].replace(". Every", " and")}, "question: lacks"),
        ({"question": "Is Tom a rompus or zumpus?"}, "question: does not end in"),
        ({"steps": ["Tom is a wumpus."]}, "steps: end at wumpus, not at the target zumpus"),
        ({"steps": []}, "steps: end at Tom, not at the target zumpus"),
        (
            {"steps": GOOD_ROW["steps"][1:]},
            "steps: 'Every wumpus is a zumpus.' is not an edge from Tom",
        ),
        ({"steps": ["Tom is a zumpus."]}, "steps: 'Tom is a zumpus.' is not an edge from Tom"),
        ({"steps": [["Tom"]]}, "steps: holds something that is not a text"),
        ({"steps": None}, "steps: missing or not a value of type list"),
    ],
)
def test_a_wrong_row_is_named(change, problem):
    assert any(actual.startswith(problem) for actual in check_row({**GOOD_ROW, **change}))


def test_a_row_that_is_no_object_is_named():
    assert check_row([GOOD_ROW]) == ["not an object with fields"]


def test_reader_names_file_row_and_field(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD_ROW, {**GOOD_ROW, "answer": "yes"}, {**GOOD_ROW, "root": 6}]))
    with pytest.raises(ValueError) as error:
        read_prosqa(path)
    assert str(error.value).splitlines() == [
        f"{path}: row 1: answer: 'yes', but the target is zumpus",
        f"{path}: row 2: root: 6 is outside 0..5",
    ]


@pytest.mark.parametrize("text", ["[{]", "[]", "{}", "\x00"])
def test_reader_refuses_what_is_no_list_of_rows(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match="rows.json: not a JSON"):
        read_prosqa(tmp_path / "rows.json")


# ----------------------------------------------------------------------- the ancestor's file


def test_every_row_of_the_ancestor_passes(ancestor_file):
    rows = read_prosqa(ancestor_file)
    assert len(rows) == 300
    assert len({canonical_hash(row) for row in rows}) == 300


def test_statistics_agree_with_the_ancestors_file(ancestor_file, rows):
    real, ours = statistics(read_prosqa(ancestor_file)), statistics(rows)
    for key, tolerance in {"nodes": 0.5, "edges": 1.5, "hops": 0.2, "paths": 0.25}.items():
        assert ours[key] == pytest.approx(real[key], abs=tolerance)


@pytest.mark.parametrize(
    "field, value",
    [
        ("answer", "Tom is a dumpus."),
        ("target", 0),
        ("edges", []),
        ("steps", ["x"]),
        ("question", "Is?"),
    ],
)
def test_every_changed_row_of_the_ancestor_is_named(ancestor_file, field, value):
    rows = json.loads(ancestor_file.read_text())
    assert all(check_row({**row, field: value}) for row in rows)


# -------------------------------------------------------------------------------- the script


def test_script_writes_checks_and_repeats_itself(tmp_path):
    sizes = ["--train", 12, "--validation", 4, "--test", 5, "--seed", 3]
    for folder in ("a", "b"):
        done = run("--output_dir", tmp_path / folder, *sizes)
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["prosqa_test.json", "prosqa_train.json", "prosqa_validation.json"]
    for name, size in zip(names, (5, 12, 4)):
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        assert len(read_prosqa(tmp_path / "a" / name)) == size == len(text.splitlines()) - 2
    done = run("--check", tmp_path / "a" / "prosqa_train.json")
    assert done.returncode == 0 and "the paper" in done.stdout and "prosqa_train" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train", "-1"], "is not an integer from 0 up"),
        (["--nodes", "5"], "unrecognized arguments"),
        (["--min_hops", "4", "--max_hops", "3"], "hops from 4 to 3"),
        (["--min_hops", "0"], "hops from 0 to 6"),
        (["--mean_parents", "0"], "mean_parents 0.0"),
        (["--depth_weight", "-1"], "depth_weight -1.0"),
        (["--depth_weight", "inf"], "depth_weight inf"),
        (["--num_nodes", "41"], "there are words for at most 40"),
        (["--num_symbols", "40"], "num_symbols 40: it is for symbolic rows"),
        (["--symbolic", "--num_symbols", "27"], "at least their num_nodes, which is 28"),
        (["--num_nodes", "1"], "found 0 different rows"),
        (["--check", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_end_in_code_2_and_leave_no_file(tmp_path, arguments, message):
    done = run("--output_dir", tmp_path / "data", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_script_names_a_contradictory_row_in_one_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([GOOD_ROW, {**GOOD_ROW, "answer": "Tom is a rompus."}]))
    done = run("--check", path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (f"{path}: row 1: answer: 'Tom is a rompus.', but the target is zumpus\n")


def test_a_split_of_no_rows_replaces_no_file(tmp_path):
    write_json_files({tmp_path / "a.json": [{}]})
    write_json_files({tmp_path / "a.json": [], tmp_path / "b.json": [], tmp_path / "c.json": [{}]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "c.json"]
    assert (tmp_path / "a.json").read_text() == "[\n{}\n]\n"


def test_an_error_while_writing_keeps_the_old_files(tmp_path):
    """The second file cannot be written: the first one, complete, does not appear either."""
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(TypeError):
        write_json_files({tmp_path / "a.json": [{}], tmp_path / "b.json": [{"no": {"JSON"}}]})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "prosqa_train.json").mkdir()
    done = run("--output_dir", tmp_path, "--train", 1, "--validation", 0, "--test", 0)
    assert done.returncode == 2 and "prosqa_train.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prosqa_train.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_script_quietly(tmp_path, number):
    """And what it was writing is gone."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time; sys.path.append({str(ROOT)!r}); from pathlib import Path\n"
        "from preprocessing.common import run_script, write_json_files\n"
        "def rows():\n"
        "    yield {'question': 'q'}\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(60)\n"
        "run_script(lambda: write_json_files({Path(sys.argv[1]): rows()}))\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "out" / "rows.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 128 + number and not list((tmp_path / "out").iterdir())


def test_a_signal_that_was_ignored_stays_so(tmp_path):
    """As Ctrl-C is in the background of a script."""
    lines = f"import os, signal, sys; sys.path.append({str(ROOT)!r})\n"
    lines += "from preprocessing.common import run_script\n"
    lines += "run_script(lambda: (os.kill(os.getpid(), signal.SIGINT), print('done')))\n"
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", lines]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "done\n"
