"""analysis/compare.py: paired comparison of two runs."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest

import analysis.compare
from analysis.compare import compare, compare_answers, compare_files, read_results, sign_flip_test
from engine.results import write_results
from utils import UserError


def verdicts(text: str) -> list[dict]:
    """Results with a right row for every 1."""
    return [
        {"row": i, "question": f"q{i}", "gold_answer": "1", "correct": c == "1"}
        for i, c in enumerate(text)
    ]


def write(path, text: str) -> None:
    path.write_text("".join(json.dumps(result) + "\n" for result in verdicts(text)))


def test_paired_comparison_by_hand():
    """10 rows tell the runs apart, 9 to 1: p = 2 (1 + 10) / 2 ** 10."""
    actual = compare(verdicts("1" * 9 + "0" + "11100"), verdicts("0" * 9 + "1" + "11100"))
    assert (actual.rows, actual.both, actual.first_only, actual.second_only, actual.neither) == (
        15,
        3,
        9,
        1,
        2,
    )
    assert actual.p_value == pytest.approx(22 / 1024)
    assert actual.difference == pytest.approx(8 / 15)
    # sum of 15 draws of +1 (9), -1 (1), 0 (5): mean 8, variance 15 (10/15 - (8/15) ** 2)
    spread = 1.96 * (15 * (10 / 15 - (8 / 15) ** 2)) ** 0.5 / 15
    assert actual.difference_low == pytest.approx(8 / 15 - spread, abs=0.07)
    assert actual.difference_high == pytest.approx(8 / 15 + spread, abs=0.07)
    assert compare(verdicts("10"), verdicts("10")).p_value == 1.0


@pytest.mark.parametrize("values", [[], [0], [1] * 6, [1] * 5 + [-1] * 5, [2, -1, 0, 3, 3, -2, 1]])
def test_the_sign_flip_test_counts_all_flips(values):
    """Of every choice of signs, the share whose sum is as far from 0."""
    signs = itertools.product((-1, 1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(chosen, values))) for chosen in signs]
    expected = np.mean([total >= abs(sum(values)) for total in sums])
    assert sign_flip_test(np.array(values, dtype=int)) == pytest.approx(expected)


def test_paired_intervals_cover_as_stated(monkeypatch):
    """The true difference of simulated pairs lies in 95% of the intervals of 200 rows."""
    monkeypatch.setattr(analysis.compare, "NUM_RESAMPLES", 300)
    rng, covered = np.random.default_rng(0), []
    for only_first, only_second in ((0.25, 0.05), (0.05, 0.04), (0.4, 0.1)):
        for _ in range(150):
            draws = rng.random(200)
            first = draws < only_first
            second = draws > 1 - only_second
            paired = compare_answers(first[None].astype(int), second[None].astype(int))
            truth = only_first - only_second
            covered.append(paired.difference_low <= truth <= paired.difference_high)
    assert 0.92 < np.mean(covered) < 0.98


def test_seeds_that_answer_alike_are_no_evidence():
    """The same answers of five seeds say what those of one say."""
    first, second = (np.array([[int(c) for c in text]]) for text in ("1111100010", "1000001010"))
    one = compare_answers(first, second)
    assert one.p_value == compare(verdicts("1111100010"), verdicts("1000001010")).p_value
    assert compare_answers(first.repeat(5, 0), second.repeat(5, 0)) == one


def test_comparison_is_seeded_and_turns_its_sign():
    a, b = verdicts("1101001011" * 5), verdicts("0101101000" * 5)
    one, other = compare(a, b), compare(b, a)
    assert one == compare(a, b) and one.difference == -other.difference
    assert one.difference_low == pytest.approx(-other.difference_high)


@pytest.mark.parametrize("key, value", [("row", 7), ("question", "other"), ("gold_answer", "2")])
def test_runs_with_different_rows_are_not_compared(key, value):
    other = verdicts("110")
    other[1][key] = value
    with pytest.raises(UserError, match=f"row 1: {key} is .* compare runs on the same rows"):
        compare(verdicts("110"), other)
    with pytest.raises(UserError, match="3 and 2 rows"):
        compare(verdicts("110"), verdicts("11"))


@pytest.mark.parametrize(
    "wrong",
    [
        "{",
        " ",
        "[1]",
        '{"row": 1}',
        "[" * 100_000,
        '{"row": 1, "question": "q", "gold_answer": "1", "correct": "yes"}',
    ],
)
def test_the_first_wrong_line_of_results_is_named(tmp_path, wrong):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(verdicts("1")[0]) + f"\n{wrong}\n{wrong}\n")
    with pytest.raises(UserError, match="x.jsonl: line 2: not a result") as caught:
        read_results(path)
    assert len(caught.value.problems) == 1


def test_a_blank_last_line_of_results_does_not_matter(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(verdicts("1")[0]) + "\n\n")
    assert len(read_results(path)) == 1


def test_results_may_hold_line_separators(tmp_path):
    """U+2028 and U+0085 stand in JSON as they are, and once cut a line in two."""
    result = {**verdicts("1")[0], "question": "a\u2028b\x85c\x0bd"}
    write_results(
        tmp_path,
        "title",
        "r",
        [
            {
                **result,
                "num_latents": 0,
                "new_tokens": 1,
                "gold_steps": [],
                "output": "",
                "steps": [],
                "answer": "1",
            }
        ],
    )
    (actual,) = read_results(tmp_path / "r.jsonl")
    assert actual["question"] == result["question"]


def test_a_bootstrap_of_many_rows_needs_little_memory():
    """All resamples at once were 3 GB for ProsQA's training rows."""
    results = verdicts("10" * 2_500)
    tracemalloc.start()
    compare(results, results)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("text", ["", "{", "[1]\n", '{"row": 1}\n', "\x00"])
def test_files_that_are_no_results_are_named(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="x.jsonl: "):
        read_results(path)
    with pytest.raises(UserError, match="missing.jsonl: cannot read"):
        read_results(tmp_path / "missing.jsonl")


def test_run_folders_stand_for_their_newest_results(tmp_path):
    """With the stage's own latents; what was forced is another file."""
    for name, epochs in (("a", {2: "0011", 10: "1111"}), ("b", {10: "0101"})):
        (tmp_path / name).mkdir()
        for epoch, right in epochs.items():
            write(tmp_path / name / f"results_epoch_{epoch}.jsonl", right)
        write(tmp_path / name / "results_epoch_11_latents_0.jsonl", "0")
    line = compare_files(str(tmp_path / "a"), str(tmp_path / "b"))
    assert "a/results_epoch_10.jsonl" in line and "b/results_epoch_10.jsonl" in line
    assert "4 rows: both right 2, only the first 2, only the second 0" in line


def test_results_that_the_run_has_no_record_of_are_not_its_newest(tmp_path):
    """A rehearsal (debug) leaves results of all epochs, of few rows, and so do epochs after the
    checkpoint that a run went on from."""
    (tmp_path / "a").mkdir()
    for epoch, right in ((7, "0011"), (20, "11")):
        write(tmp_path / "a" / f"results_epoch_{epoch}.jsonl", right)
    write(tmp_path / "b.jsonl", "0111")
    evaluated = {"kind": "eval", "epoch": 7, "forced_latents": None, "global_step": 1}
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_text(json.dumps(evaluated) + "\n")
    line = compare_files(str(tmp_path / "a"), str(tmp_path / "b.jsonl"))
    assert "a/results_epoch_7.jsonl" in line and "4 rows: both right 2" in line
    path.write_text(json.dumps({**evaluated, "kind": "train"}) + "\n")
    with pytest.raises(UserError, match="holds no results_epoch"):
        compare_files(str(tmp_path / "a"), str(tmp_path / "b.jsonl"))
    for broken in (b"\xff", b'{"kind": "eval"}\n'):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="metrics.jsonl: cannot read the records"):
            compare_files(str(tmp_path / "a"), str(tmp_path / "b.jsonl"))


def test_files_with_other_rows_are_both_named(tmp_path):
    for name, count in (("a", 2), ("b", 3)):
        write(tmp_path / f"{name}.jsonl", "1" * count)
    with pytest.raises(UserError, match=r"a\.jsonl and .*b\.jsonl: the runs have 2 and 3 rows"):
        compare_files(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="holds no results_epoch"):
        compare_files(str(tmp_path), str(tmp_path / "b.jsonl"))
