"""args/: every file loads, and the rows of one table differ in their method only."""

import dataclasses

import pytest
from conftest import ROOT

from dataset import Curriculum
from utils import Method, load_config

FILES = sorted((ROOT / "args").glob("*.yaml"))
DEFAULT_OF = {
    "gsm8k_coconut_qwen3_a100_fresh_start": "train_fresh_start.sh",
    "gsm8k_coconut_qwen3_a100_fresh_continue": "train_continue_fresh.sh",
}
PLACEHOLDERS = ["load_model_path=somewhere"]
# the paper's Table 1: the words in a file's name -> method, latent_input, whether it has stages
ROWS = {
    "cot": (Method.COT, "hidden_state", False),
    "no_cot": (Method.NO_COT, "hidden_state", False),
    "pause": (Method.COCONUT, "pause", False),
    "coconut": (Method.COCONUT, "hidden_state", True),
    "coconut_no_curriculum": (Method.COCONUT, "hidden_state", False),
    "no_thoughts": (Method.NO_THOUGHTS, "hidden_state", True),
    "pause_as_thought": (Method.COCONUT, "pause", True),
}
# what a row of the table may have of its own
OF_THE_METHOD = {
    "name",
    "coconut",
    "cot",
    "no_cot",
    "no_thoughts",
    "latent_input",
    "schedule",
    "c_thought",
    "epochs_per_stage",
    "max_latent_stage",
    "reset_optimizer",
    "load_model_path",
    "resume",
    "save_only_improve",
}


def load(path):
    text = path.read_text()
    return load_config(path, PLACEHOLDERS if "YOUR_PATH_TO" in text else [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_loads_and_its_header_names_its_command(path):
    config, text = load(path), path.read_text()
    header = text[: text.index("\nname:")]
    assert f"args/{path.name}" in header or f"bash {DEFAULT_OF.get(path.stem)}" in header
    assert "Hardware" in header
    assert all(len(line) <= 100 for line in text.splitlines())
    assert (
        path.stem.startswith(config.name.replace("-", "_"))
        or "small" in path.stem
        or "eval" in path.stem
    )


def test_no_two_configs_write_into_one_folder():
    """But for the continuation of a run."""
    names = [load(path).name for path in FILES if "continue" not in path.name]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "family", ["gsm8k_{}_gpt2", "prosqa_{}_gpt2", "prontoqa_{}_gpt2", "gsm8k_{}_qwen3"]
)
def test_table_1_has_all_rows_and_they_differ_in_method_only(family):
    configs = {}
    for row in ROWS:
        name = family.format(row)
        if name == "gsm8k_coconut_qwen3":
            name += "_a100_fresh_start"
        configs[row] = load(ROOT / "args" / f"{name}.yaml")
    common = dataclasses.asdict(configs["coconut"])
    for row, config in configs.items():
        method, latent_input, has_stages = ROWS[row]
        assert (config.method, config.latent_input) == (method, latent_input)
        own = {k for k, v in dataclasses.asdict(config).items() if v != common[k]}
        assert own <= OF_THE_METHOD
        curriculum = Curriculum.from_config(config)
        stages = {curriculum.stage(epoch) for epoch in range(1, config.num_epochs + 1)}
        assert (len(stages) > 1) == has_stages
        latents, skipped = curriculum.summary(max(stages))
        thinks = method is Method.COCONUT
        wanted = configs["coconut"].c_thought * configs["coconut"].max_latent_stage if thinks else 0
        assert latents == wanted
        if method is not Method.COT and "qwen3" not in family:  # capped keeps steps beyond M
            assert skipped == "all"
