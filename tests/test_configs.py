"""args/: every file loads, and the rows of one table differ in their method only."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import ROOT

from curriculum import Curriculum
from loader import load_config, read_yaml
from rules import make_config
from utils import Method, UserError

FILES = sorted((ROOT / "args").glob("*.yaml"))
DEFAULT_OF = {
    "gsm8k_coconut_qwen3_a100_fresh_start": "train_fresh_start.sh",
    "gsm8k_coconut_qwen3_a100_fresh_continue": "train_continue_fresh.sh",
}
ROWS = sorted((ROOT / "args" / "rows").glob("*.yaml"))
OLD = json.loads((ROOT / "tests" / "old_configs.json").read_text())
# keys that mean nothing to a method, or to one without a curriculum
OF_LATENTS = {"c_thought", "pad_latent_to_max", "latent_input"}
OF_STAGES = {"schedule", "epochs_per_stage", "max_latent_stage", "reset_optimizer"}
# the paper's Table 1: method, latent_input, whether it has stages
TABLE_1 = {
    "cot": (Method.COT, "hidden_state", False),
    "no_cot": (Method.NO_COT, "hidden_state", False),
    "pause": (Method.COCONUT, "pause", False),
    "no_curriculum": (Method.COCONUT, "hidden_state", False),
    "no_thoughts": (Method.NO_THOUGHTS, "hidden_state", True),
    "pause_as_thought": (Method.COCONUT, "pause", True),
}
GSM8K_QWEN3 = "gsm8k_coconut_qwen3_a100_fresh_start"


def load(*arguments):
    """The config; a placeholder for a path gets one."""
    paths = [Path(text) for text in arguments if "=" not in str(text)]
    wants_path = "YOUR_PATH_TO" in paths[0].read_text() and len(paths) == 1
    return load_config(*arguments, *(["load_model_path=somewhere"] if wants_path else []))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_loads_and_its_header_names_its_command(path):
    load(path)
    text = path.read_text()
    header = text[: text.index("\nsave_path:")]
    assert f"args/{path.name}" in header or f"bash {DEFAULT_OF.get(path.stem)}" in header
    assert "Hardware" in header
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_a_row_is_two_to_four_keys(path):
    assert path.stem in TABLE_1 and 2 <= len(read_yaml(path)) <= 4
    assert f"args/rows/{path.name}" in path.read_text()


def test_a_copy_of_the_quickstart_has_a_name_of_its_own(tmp_path):
    """The README says to copy it: the copy must not go on in the quickstart's run folder."""
    copy = tmp_path / "my.yaml"
    copy.write_text((ROOT / "args" / "quickstart.yaml").read_text())
    assert load_config(copy).name == "my"
    assert load_config(ROOT / "args" / "quickstart.yaml").name == "quickstart"


def test_no_two_configs_write_into_one_folder():
    """But for the continuation of a run."""
    names = [load(path).name for path in FILES if "continue" not in path.name]
    more = ("only_eval=False", "train_path=x", "load_model_path=x")
    names += [load_config(path, row, *more).name for path in FILES for row in ROWS]
    assert len(names) == len(set(names))


def resolved(config) -> dict:
    """All values that mean something to the config's method."""
    values = dataclasses.asdict(config)
    values["method"] = config.method
    without = {"name", *(method.value for method in Method)}
    if config.method is not Method.COCONUT:
        without |= OF_LATENTS
    if config.method in (Method.COT, Method.NO_COT):
        without |= OF_STAGES
    if config.schedule == "last_stage":
        without |= {"epochs_per_stage", "reset_optimizer"}
    return {name: value for name, value in values.items() if name not in without}


@pytest.mark.parametrize("name", OLD)
def test_every_former_file_is_a_composition_with_the_same_values(name):
    """Thirty complete files, before args/rows/ was made of what they differed in."""
    arguments, values = OLD[name]["now"], OLD[name]["values"]
    arguments = [text if "=" in text else ROOT / text for text in arguments]
    if "YOUR_PATH_TO" in (values.get("load_model_path") or ""):
        values, arguments = {**values, "load_model_path": "x"}, [*arguments, "load_model_path=x"]
    before = make_config({"name": "x", **values}, "before")
    assert resolved(load_config(*arguments)) == resolved(before)


@pytest.mark.parametrize("base", ["gsm8k_gpt2", "prosqa_gpt2", "prontoqa_gpt2", GSM8K_QWEN3])
def test_table_1_has_all_rows(base):
    path = ROOT / "args" / f"{base}.yaml"
    common = load(path)
    for row, (method, latent_input, has_stages) in TABLE_1.items():
        more = ["load_model_path=somewhere"] if base == "gsm8k_gpt2" and has_stages else []
        config = load_config(path, ROOT / "args" / "rows" / f"{row}.yaml", *more)
        assert (config.method, config.latent_input) == (method, latent_input)
        curriculum = Curriculum.from_config(config)
        stages = {curriculum.stage(epoch) for epoch in range(1, config.num_epochs + 1)}
        assert (len(stages) > 1) == has_stages
        latents, skipped = curriculum.summary(max(stages))
        thinks = method is Method.COCONUT
        assert latents == (common.c_thought * common.max_latent_stage if thinks else 0)
        if method is not Method.COT and base != GSM8K_QWEN3:  # capped keeps steps beyond M
            assert skipped == "all"


# ------------------------------------------------------------------------------- composition


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    first = "name: mine\nsave_path: out\ncoconut: True\nmodel_id: m\ntrain_path: t\nval_path: v\n"
    return written(tmp_path, "a.yaml", first), written(tmp_path, "b.yaml", "lr: 1.0\nseed: 3\n")


def test_later_files_win_and_overrides_win_over_all(files):
    config = load_config(*files, "seed=4")
    assert (config.lr, config.seed, config.model_id) == (1.0, 4, "m")
    assert load_config(*files[::-1]).seed == 3


def test_a_run_is_named_by_its_files_unless_the_last_one_or_the_user_does(files, tmp_path):
    """So that what is listed behind a file never writes into that file's folder."""
    first, second = files
    assert load_config(first).name == "mine"
    assert load_config(first, second).name == "a-b"
    assert load_config(first, second, "name=x").name == "x"
    own = written(tmp_path, "c.yaml", "name: own\n")
    assert load_config(first, second, own).name == "own"
    assert load_config(first, own, second).name == "a-c-b"
    unnamed = written(tmp_path, "d.yaml", first.read_text().replace("name: mine\n", ""))
    assert load_config(unnamed).name == "d"


RECIPE = """save_path: out
coconut: True
model_id: m
train_path: t
val_path: v
advance_at: 0.9
max_epochs_per_stage: 4
stage_mixing: linear
step_loss: head
step_loss_weight: 0.1
"""


@pytest.mark.parametrize("row", TABLE_1)
def test_rows_go_with_a_recipe_of_stages_and_thoughts(row, tmp_path):
    """A row leaves out what means nothing to its method; beside it that is refused."""
    recipe = written(tmp_path, "recipe.yaml", RECIPE)
    method, latent_input, has_stages = TABLE_1[row]
    config = load_config(recipe, ROOT / "args" / "rows" / f"{row}.yaml")
    assert (config.method, config.latent_input) == (method, latent_input)
    assert (config.advance_at, config.max_epochs_per_stage, config.stage_mixing) == (
        (0.9, 4, "linear") if has_stages else (None, None, "none")
    )
    thinks = method is Method.COCONUT and latent_input != "pause"
    assert (config.step_loss, config.step_loss_weight) == (
        ("head", 0.1) if thinks else ("none", None)
    )
    with pytest.raises(UserError):
        load_config(recipe, ROOT / "args" / "rows" / "cot.yaml", "advance_at=0.9", "step_loss=head")


def test_the_reliable_recipe_differs_as_it_says():
    """From the faithful one, in one key."""
    names = "gsm8k_coconut_qwen3_reliable.yaml", "gsm8k_coconut_qwen3_a100_fresh_start.yaml"
    ours, faithful = (dataclasses.asdict(load_config(ROOT / "args" / name)) for name in names)
    assert {key for key in ours if ours[key] != faithful[key]} == {"name", "step_loss"}


def test_a_bad_key_names_the_file_that_it_stands_in(files, tmp_path):
    bad = written(tmp_path, "bad.yaml", "sede: 3\nlr: no\n")
    with pytest.raises(UserError) as error:
        load_config(files[0], bad, files[1])
    assert [line.split(": ")[0] for line in error.value.problems] == [str(bad)]
    with pytest.raises(UserError, match="no config"):
        load_config("seed=3")
