"""curriculum.py: the stage of an epoch, what a stage makes of a row, the printed table."""

import numpy as np
import pytest

from curriculum import Curriculum
from utils import Method

PAPER = dict(schedule="paper", epochs_per_stage=2, max_latent_stage=3, c_thought=2)
HEADER = ["epochs", "stage", "latent", "tokens", "steps", "skipped"]

# ------------------------------------------------------------------------------- stages


def test_capped_schedule_is_the_design_table():
    curriculum = Curriculum(epochs_per_stage=2, max_latent_stage=3, c_thought=2)
    seen = [
        (epoch, curriculum.stage(epoch), *map(int, curriculum.plan(curriculum.stage(epoch), 100)))
        for epoch in range(1, 9)
    ]
    assert seen == [
        (1, 0, 0, 0),
        (2, 1, 2, 1),
        (3, 1, 2, 1),
        (4, 2, 4, 2),
        (5, 2, 4, 2),
        (6, 3, 6, 3),
        (7, 3, 6, 3),
        (8, 3, 6, 3),
    ]


def test_paper_schedule_adds_a_stage_without_steps():
    """Stage M + 1 keeps the latents of stage M and drops what is left of the chain."""
    curriculum = Curriculum(**PAPER)
    seen = [
        (curriculum.stage(epoch), *map(int, curriculum.plan(curriculum.stage(epoch), 100)))
        for epoch in range(1, 12)
    ]
    assert (
        seen
        == [(0, 0, 0)] * 2 + [(1, 2, 1)] * 2 + [(2, 4, 2)] * 2 + [(3, 6, 3)] * 2 + [(4, 6, 100)] * 3
    )


def test_last_stage_schedule_has_no_curriculum():
    """The paper's rows without curriculum: question, all latents, answer, from the start."""
    curriculum = Curriculum(schedule="last_stage", epochs_per_stage=2, max_latent_stage=3)
    stages = {curriculum.stage(epoch) for epoch in range(9)}
    assert stages == {4} and [int(n) for n in curriculum.plan(4, 100)] == [6, 100]


@pytest.mark.parametrize("schedule", ["capped", "paper"])
def test_epoch_0_is_stage_0(schedule):
    """Nothing trained yet: what an untrained model, or resume: 0, is evaluated at."""
    assert Curriculum(schedule=schedule, epochs_per_stage=1).stage(0) == 0
    assert Curriculum(schedule=schedule, epochs_per_stage=3).stage(0) == 0


@pytest.mark.parametrize("schedule", ["capped", "paper"])
@pytest.mark.parametrize("method", [Method.COT, Method.NO_COT])
def test_methods_without_curriculum_have_one_stage(method, schedule):
    curriculum = Curriculum(method, schedule, epochs_per_stage=1)
    assert {curriculum.stage(epoch) for epoch in range(20)} == {0}


# ------------------------------------------------------------------------------- stages by a gate

GATED = dict(advance_at=0.9, epochs_per_stage=2, max_latent_stage=2)
# stages so far, accuracy -> the next stage; at least 2 epochs each, then at most 3 or 4, or no end
NEXT = [
    (None, [0], 1.0, 0),
    (None, [0, 0], 0.9, 1),
    (None, [0, 0], 0.89, 0),
    (None, [0] * 50, 0.89, 0),
    (None, [0] * 50, 0.9, 1),
    (None, [0, 0, 1], 1.0, 1),
    (None, [0, 0, 1, 1], 1.0, 2),
    (3, [0, 0], 0.0, 0),
    (3, [0, 0, 0], 0.0, 1),
    (3, [0, 0, 0, 1], 0.0, 1),
    (3, [0, 0, 0, 1, 1], 0.0, 1),
    (3, [0, 0, 0, 1, 1, 1], 0.0, 2),
    (2, [0, 0, 1, 1], 0.0, 2),
]


@pytest.mark.parametrize("at_most, stages, accuracy, expected", NEXT)
@pytest.mark.parametrize("method", [Method.COCONUT, Method.NO_THOUGHTS])
def test_the_next_stage_is_earned_or_comes_in_the_end(method, at_most, stages, accuracy, expected):
    curriculum = Curriculum(method, **GATED, max_epochs_per_stage=at_most)
    assert curriculum.next_stage(stages, accuracy) == expected


@pytest.mark.parametrize("schedule, last", [("capped", 2), ("paper", 3)])
def test_a_gate_leads_to_the_schedules_last_stage_and_no_further(schedule, last):
    """The paper's extra stage, without any step, too."""
    curriculum, stages = Curriculum(schedule=schedule, **GATED), [0]
    for _ in range(12):
        stages.append(curriculum.next_stage(stages, 1.0))
    assert stages == [stage for stage in range(last) for _ in range(2)] + [last] * (13 - 2 * last)
    assert curriculum.last_stage == last


@pytest.mark.parametrize("schedule", ["capped", "paper"])
def test_the_stages_of_the_run_are_those_of_its_epochs(schedule):
    """Whatever the schedule says; beyond the known ones at least the last of them. What was
    trained elsewhere, without a record, counts as the fewest epochs of each stage."""
    curriculum = Curriculum(schedule=schedule, **GATED)
    assert [curriculum.stage(epoch, [0, 0, 0, 1]) for epoch in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    assert [curriculum.stage(epoch) for epoch in range(6)] == [0, 0, 0, 1, 1, 2]


def test_table_of_a_gate_shows_what_is_known():
    lines = Curriculum(**GATED, max_epochs_per_stage=4).table(9, [0, 0, 0, 1]).split("\n")
    assert [line.split() for line in lines[:3]] == [
        HEADER,
        ["2-4", "0", "0", "0"],
        ["2-4", "1", "2", "1"],
    ]
    assert lines[3].split() == ["the", "rest", "2", "4", "2"]
    assert lines[4] == "so far the run has stage 0 from epoch 1, 1 from epoch 4 on"
    assert "9 in all; the next stage begins at 90.0% on 200 training rows set aside" in lines[5]
    assert lines[5].endswith(", or after 4 epochs")
    assert lines[6:] == ["the last stage begins with epoch 8 at the latest"]  # 3 + 4, and one
    lines = Curriculum(schedule="paper", **GATED).table(9).split("\n")
    assert [line.split()[0] for line in lines[1:]] == ["2+", "2+", "2+", "the", "epochs"]
    assert lines[4].split() == ["the", "rest", "3", "4", "all"]


@pytest.mark.parametrize("stages", [[], [0], [0, 0, 1], [0, 0, 0, 0, 1], [0] * 6])
def test_table_of_a_gate_says_whether_the_last_stage_is_reached(stages):
    """Against a run whose gate never opens by itself: it has as many epochs for each stage as it
    may have, and so comes to the last one as late as it can. Six epochs of one stage, where four
    are the most, are of weights that were trained elsewhere."""
    curriculum = Curriculum(**GATED, max_epochs_per_stage=4)
    run = [*stages] or [0]
    while run[-1] < curriculum.last_stage:
        run.append(curriculum.next_stage(run, 0.0))
    said = f"the last stage begins with epoch {len(run)} at the latest"
    late = f"{said}: of {len(run) - 1} epochs the run may not come to it"
    assert curriculum.table(len(run), stages).split("\n")[-1] == said
    assert curriculum.table(len(run) - 1, stages).split("\n")[-1] == late
    assert "at the latest" not in curriculum.table(len(run), run)  # it has begun
    assert "at the latest" not in Curriculum(**GATED).table(9, stages)  # no most


# ------------------------------------------------------------------------------- rows

# method, pad_latent_to_max, stage (M = 3, c = 2), steps of the row -> latents, skipped
PLANS = [
    (Method.COCONUT, True, 0, 4, 0, 0),
    (Method.COCONUT, True, 1, 4, 2, 1),
    (Method.COCONUT, True, 3, 4, 6, 3),
    (Method.COCONUT, True, 3, 1, 6, 1),
    (Method.COCONUT, True, 2, 0, 4, 0),
    (Method.COCONUT, True, 4, 9, 6, 9),
    (Method.COCONUT, True, 4, 0, 6, 0),
    (Method.COCONUT, False, 3, 4, 6, 3),
    (Method.COCONUT, False, 3, 1, 2, 1),
    (Method.COCONUT, False, 2, 0, 0, 0),
    (Method.COCONUT, False, 4, 2, 4, 2),
    (Method.COCONUT, False, 4, 9, 6, 9),
    (Method.NO_THOUGHTS, True, 2, 4, 0, 2),
    (Method.NO_THOUGHTS, False, 2, 1, 0, 1),
    (Method.NO_THOUGHTS, True, 4, 9, 0, 9),
    (Method.COT, True, 0, 4, 0, 0),
    (Method.COT, False, 0, 0, 0, 0),
    (Method.NO_COT, True, 0, 4, 0, 4),
    (Method.NO_COT, False, 0, 0, 0, 0),
]


@pytest.mark.parametrize(("method", "pad", "stage", "steps", "latents", "skipped"), PLANS)
def test_plan(method, pad, stage, steps, latents, skipped):
    """One row, or many at once: evaluation and training read the same function."""
    curriculum = Curriculum(method, pad_latent_to_max=pad)
    assert curriculum.plan(stage, steps) == (latents, skipped)
    actual = curriculum.plans(np.full(3, stage), np.full(3, steps))
    assert [array.tolist() for array in actual] == [[latents] * 3, [skipped] * 3]


# latent_growth, pad_latent_to_max, steps of the row -> (latents, skipped) of stages 0, 1, ...
# (M = 2, c = 3, schedule paper: one stage more)
GROWTHS = [
    ("step", True, 4, [(0, 0), (3, 1), (6, 2), (6, 4)]),
    ("one", True, 4, [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (6, 4)]),
    ("one", True, 1, [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (6, 1)]),
    ("one", False, 1, [(0, 0), (1, 1), (2, 1), (3, 1), (3, 1), (3, 1), (3, 1), (3, 1)]),
    ("one", False, 0, [(0, 0)] * 8),
    ("all", True, 4, [(6, 0), (6, 1), (6, 2), (6, 4)]),
    ("all", True, 0, [(6, 0), (6, 0), (6, 0), (6, 0)]),
    ("all", False, 1, [(3, 0), (3, 1), (3, 1), (3, 1)]),
    ("all", False, 5, [(6, 0), (6, 1), (6, 2), (6, 5)]),
]


@pytest.mark.parametrize("growth, pad, num_steps, plans", GROWTHS)
def test_latents_grow_by_steps_one_by_one_or_not_at_all(growth, pad, num_steps, plans):
    keys = dict(schedule="paper", max_latent_stage=2, c_thought=3, pad_latent_to_max=pad)
    curriculum = Curriculum(**keys, latent_growth=growth)
    stages = range(curriculum.last_stage + 1)
    assert [curriculum.plan(stage, num_steps) for stage in stages] == plans
    without = Curriculum(Method.NO_THOUGHTS, **keys, latent_growth=growth)
    assert [without.plan(stage, num_steps) for stage in stages] == [(0, n) for _, n in plans]


def test_one_is_step_where_a_thought_is_one_latent():
    one = Curriculum(c_thought=1, latent_growth="one")
    assert one.table(9) == Curriculum(c_thought=1).table(9)


def test_plans_of_mixed_rows():
    curriculum = Curriculum(pad_latent_to_max=False)
    actual = curriculum.plans(np.array([0, 1, 3, 4]), np.array([2, 0, 2, 5]))
    assert [array.tolist() for array in actual] == [[0, 0, 4, 6], [0, 0, 2, 5]]


def test_c_thought_zero_gives_no_latents():
    latents, skipped = Curriculum(c_thought=0).plans(np.array([3, 3]), np.array([5, 0]))
    assert (latents.tolist(), skipped.tolist()) == ([0, 0], [3, 0])


def test_table_of_the_capped_schedule():
    lines = [line.split() for line in Curriculum().table(8).split("\n")]
    assert lines == [
        HEADER,
        ["1", "0", "0", "0"],
        ["2-3", "1", "2", "1"],
        ["4-5", "2", "4", "2"],
        ["6+", "3", "6", "3"],
    ]


def test_tables_of_latents_that_grow_otherwise():
    """epochs_per_stage epochs for each stage of one latent more; and the same latents always."""
    keys = dict(epochs_per_stage=2, max_latent_stage=2, c_thought=2)
    lines = [line.split() for line in Curriculum(**keys, latent_growth="one").table(9).split("\n")]
    assert lines == [
        HEADER,
        ["1", "0", "0", "0"],
        ["2-3", "1", "1", "1"],
        ["4-5", "2", "2", "1"],
        ["6-7", "3", "3", "2"],
        ["8+", "4", "4", "2"],
    ]
    keys |= dict(schedule="paper", latent_growth="all")
    lines = [line.split() for line in Curriculum(**keys).table(7).split("\n")]
    assert lines == [
        HEADER,
        ["1-2", "0", "4", "0"],
        ["3-4", "1", "4", "1"],
        ["5-6", "2", "4", "2"],
        ["7+", "3", "4", "all"],
    ]
    gated = Curriculum(latent_growth="one", **GATED)
    lines = [line.split() for line in gated.table(9).split("\n")]
    assert [line[1:3] for line in lines[1:5]] == [[str(stage)] * 2 for stage in range(4)]
    assert lines[5] == ["the", "rest", "4", "4", "2"]


def test_table_of_the_paper_schedule():
    lines = [line.split() for line in Curriculum(**PAPER).table(10).split("\n")]
    assert lines == [
        HEADER,
        ["1-2", "0", "0", "0"],
        ["3-4", "1", "2", "1"],
        ["5-6", "2", "4", "2"],
        ["7-8", "3", "6", "3"],
        ["9+", "4", "6", "all"],
    ]


def test_table_says_where_no_epoch_has_stage_0():
    """1 // 1 is 1: whoever expects an epoch of plain chains first must know."""
    text = Curriculum(epochs_per_stage=1).table(5)
    assert text.splitlines()[1].split() == ["1", "1", "2", "1"]
    assert text.splitlines()[-1].startswith("no epoch has stage 0: with epochs_per_stage 1 ")
    for curriculum in (Curriculum(), Curriculum(schedule="paper", epochs_per_stage=1)):
        assert "no epoch" not in curriculum.table(5)


def test_table_ends_with_the_last_epoch():
    """Epochs beyond num_epochs are not promised; a stage cut short shows its real span."""
    lines = Curriculum().table(4).split("\n")
    assert [line.split()[0] for line in lines[1:]] == ["1", "2-3", "4+"]
    assert Curriculum().table(3).split("\n")[-1].split()[0] == "2-3"
    lines = Curriculum(Method.NO_COT).table(3).split("\n")
    assert [line.split() for line in lines[1:]] == [["1+", "0", "0", "all"]]
