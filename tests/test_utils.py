"""utils.py and loader.py: the config schema, its rules, YAML files, seeds."""

import dataclasses

import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.overview import describe_keys
from loader import load_config, read_yaml
from rules import make_config
from utils import FIELDS, Config, Method, UserError, derive_seed

# the ancestor's keys, in its order and its spelling of values
ANCESTOR = """
# need 4 gpus
project: coconut
save_path: YOUR_PATH_TO_SAVE_THE_MODEL
name: gsm-coconut

only_eval: False

coconut: {coconut}
cot: {cot}
no_thoughts: False
no_cot: False

c_thought: 2
epochs_per_stage: {per_stage}
max_latent_stage: {last}
pad_latent_to_max: {pad}

save_only_improve: {improve}
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: {start}
seed: 0
resume: {resume}
bf16: False
train_path: data/gsm_train.json
val_path: data/gsm_valid.json
reset_optimizer: {reset}
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: {epochs}
lr: !!float "1e-4"
weight_decay: 0.01
"""
ANCESTOR_FILES = {
    "gsm_cot": dict(
        coconut=False,
        cot=True,
        per_stage=1,
        last=0,
        pad=False,
        improve=True,
        start="None",
        resume=0,
        reset=False,
        epochs=25,
        method=Method.COT,
        weights=None,
    ),
    "gsm_coconut": dict(
        coconut=True,
        cot=False,
        per_stage=3,
        last=3,
        pad=True,
        improve=False,
        start="YOUR_COT_CHECKPOINT",
        resume=3,
        reset=True,
        epochs=25,
        method=Method.COCONUT,
        weights="/cot/checkpoint_6",
    ),
    "prosqa_coconut": dict(
        coconut=True,
        cot=False,
        per_stage=5,
        last=6,
        pad=True,
        improve=False,
        start="None",
        resume=0,
        reset=True,
        epochs=50,
        method=Method.COCONUT,
        weights=None,
    ),
}
GOOD = dict(
    name="run",
    save_path="out",
    coconut=True,
    model_id="some/model",
    train_path="train.json",
    val_path="val.json",
)


def good(**changes) -> Config:
    return make_config({**GOOD, **changes}, "test.yaml")


def problems(**changes) -> str:
    with pytest.raises(UserError) as caught:
        good(**changes)
    return str(caught.value)


def load_text(folder, text: str, *overrides: str) -> Config:
    path = folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, *overrides)


# ------------------------------------------------------------------------------- the ancestor's


@pytest.mark.parametrize("name", ANCESTOR_FILES)
def test_ancestor_yaml_loads_unchanged(name, tmp_path):
    """Its files hold "None" as a word, `!!float "1e-4"` and placeholders; all 28 keys load once
    the placeholders are replaced."""
    facts = ANCESTOR_FILES[name]
    text = ANCESTOR.format(**facts)
    assert len(yaml.safe_load(text)) == 28
    overrides = ["save_path=/models"]
    if facts["weights"]:
        overrides.append(f"load_model_path={facts['weights']}")
    config = load_text(tmp_path, text, *overrides)
    assert config.method is facts["method"]
    assert config.load_model_path == facts["weights"]
    assert (config.lr, config.weight_decay, config.uniform_prob) == (1e-4, 0.01, 0.0)
    assert (config.resume, config.num_epochs) == (facts["resume"], facts["epochs"])
    assert (config.epochs_per_stage, config.max_latent_stage) == (facts["per_stage"], facts["last"])
    assert config.pad_latent_to_max is facts["pad"]
    assert config.save_only_improve is facts["improve"]
    assert config.reset_optimizer is facts["reset"]
    assert config.schedule == "capped"  # it names none
    assert load_text(tmp_path, text, *overrides, "schedule=paper").schedule == "paper"


def test_untouched_placeholders_are_named(tmp_path):
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, ANCESTOR.format(**ANCESTOR_FILES["gsm_coconut"]))
    save_path, weights = caught.value.problems
    assert "save_path: 'YOUR_PATH_TO_SAVE_THE_MODEL' is a placeholder" in save_path
    assert "load_model_path: 'YOUR_COT_CHECKPOINT' is a placeholder" in weights


def test_shipped_configs_load():
    """Every YAML in args/; the path of a user's own checkpoint is the only placeholder."""
    files = sorted((ROOT / "args").glob("*.yaml"))
    assert files
    for file in files:
        own = ["load_model_path=/x"] if "YOUR_" in file.read_text() else []
        load_config(file, *own)


# ------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("lr", "1e-4", 1e-4),  # no dot: YAML reads a word
        ("lr", "1.0e-4", 1e-4),
        ("lr", "1", 1.0),
        ("lr", "'1e-5'", 1e-5),
        ("max_grad_norm", "null", None),
        ("max_grad_norm", "None", None),
        ("max_grad_norm", "1", 1.0),
        ("resume", "None", None),
        ("resume", "3", 3),
        ("load_model_path", "None", None),
        ("load_model_path", "", None),
        ("bf16", "yes", True),
        ("c_thought", "0", 0),
        ("seed", "0x10", 16),
        ("name", "ünï", "ünï"),
        ("marker_init_token", "'<<'", "<<"),
        ("uniform_prob", "1", 1.0),
    ],
)
def test_value_and_override_are_read_alike(tmp_path, key, written, value):
    base = yaml.safe_dump({k: v for k, v in GOOD.items() if k != key})
    from_file = load_text(tmp_path, f"{base}\n{key}: {written}\n")
    overridden = load_text(
        tmp_path, base + ("name: other\n" if key == "name" else ""), f"{key}={written}"
    )
    for config in (from_file, overridden):
        actual = getattr(config, key)
        assert actual == value and type(actual) is type(value)


def test_override_wins_and_may_hold_an_equals_sign(tmp_path):
    text = yaml.safe_dump({**GOOD, "num_epochs": 3})
    config = load_text(tmp_path, text, "num_epochs=7", "num_epochs=8", "train_path=a=b.json")
    assert (config.num_epochs, config.train_path) == (8, "a=b.json")


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("num_epochs", "expected KEY=VALUE"),
        ("--num_epochs=3", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("num_epoch=3", "the command line: unknown key num_epoch; did you mean num_epochs?"),
        ("num_epochs=three", "the command line: num_epochs: 'three' is not int"),
        ("lr=[1", "lr= on the command line: not valid YAML"),
        ("seed={a: 1, a: 2}", "key a stands there twice"),
    ],
)
def test_bad_override_is_named(tmp_path, override, fragment):
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, yaml.safe_dump(GOOD), override)
    assert fragment in str(caught.value)


WRONG_VALUES = [
    ("seed", "5", "seed: '5' is not int"),
    ("seed", 1.0, "seed: 1.0 is not int"),
    ("seed", True, "seed: True is not int"),
    ("seed", None, "seed: None is not int"),
    ("seed", "None", "seed: 'None' is not int"),
    ("seed", -1, "seed: -1 is below 0"),
    ("bf16", 1, "bf16: 1 is not bool"),
    ("bf16", "true", "bf16: 'true' is not bool"),
    ("bf16", None, "bf16: None is not bool"),
    ("lr", True, "lr: True is not float"),
    ("lr", "fast", "lr: 'fast' is not float"),
    ("lr", [1e-4], "lr: [0.0001] is not float"),
    ("lr", -1e-4, "lr: -0.0001 is below 0"),
    ("lr", float("inf"), "lr: inf is not finite"),
    ("lr", "nan", "lr: nan is not finite"),
    ("lr", 10**400, "is not float"),
    ("uniform_prob", 1.5, "uniform_prob: 1.5 is above 1"),
    ("name", 12, "name: 12 is not str"),
    ("name", "", "name: '' is a placeholder"),
    ("name", "a/b", "name: 'a/b' is not a plain folder name"),
    ("name", "..", "name: '..' is not a plain folder name"),
    ("train_path", ["a"], "train_path: ['a'] is not str or null"),
    ("data_columns", "cot", "data_columns: 'cot' is not dict or null"),
    ("data_columns", ["cot"], "data_columns: ['cot'] is not dict or null"),
    ("resume", 1.5, "resume: 1.5 is not int or null"),
    ("resume", -1, "resume: -1 is below 0"),
    ("resume", 21, "resume: 21 epochs done is beyond num_epochs: 20"),
    ("epochs_per_stage", 0, "epochs_per_stage: 0 is below 1"),
    ("advance_at", 90, "advance_at: 90.0 is above 1"),
    ("advance_at", 0, "advance_at: 0.0 is below 0.001"),
    ("stage_mixing", "even", "stage_mixing: 'even' is not one of none, uniform, linear"),
    ("step_loss", "both", "step_loss: 'both' is not one of none, head, decoder"),
    ("step_loss_weight", 0, "step_loss_weight: 0.0 is below 1e-06"),
    ("gate_rows", 0, "gate_rows: 0 is below 1"),
    ("batch_size_training", 0, "batch_size_training: 0 is below 1"),
    ("max_seq_length", 1, "max_seq_length: 1 is below 2"),
    ("schedule", "cyclic", "schedule: 'cyclic' is not one of capped, paper"),
    ("optimizer", "sgd", "optimizer: 'sgd' is not one of auto, adamw, adamw_split"),
    ("lr_schedule", "poly", "lr_schedule: 'poly' is not one of constant, linear, cosine"),
    ("save_path", "YOUR_PATH", "save_path: 'YOUR_PATH' is a placeholder"),
    ("num_epoch", 3, "unknown key num_epoch; did you mean num_epochs?"),
    ("zzz", 3, "unknown key zzz; `run.py --help` lists the keys"),
    # a path with such characters reaches the system as ValueError, not as OSError
    ("train_path", "a\0b", "train_path"),
    ("save_path", "\ud800", "save_path"),
    ("name", "a\nb", "name"),
]


@pytest.mark.parametrize(("key", "value", "fragment"), WRONG_VALUES)
def test_wrong_value_is_named(key, value, fragment):
    actual = problems(**{key: value})
    assert fragment in actual and actual.startswith("test.yaml: ")


CONTRADICTIONS = [
    (dict(coconut=False), "method: none set to True; set exactly one of coconut, cot,"),
    (dict(cot=True), "method: coconut and cot set to True"),
    (dict(no_cot=True), "method: coconut and no_cot set to True"),
    (dict(no_thoughts=True, cot=True), "method: cot and no_thoughts set to True"),
    (dict(coconut=False, cot=True, no_cot=True), "method: cot and no_cot set to True"),
    (dict(only_eval=True), "load_model_path: only_eval needs the checkpoint"),
    (dict(train_path=None), "train_path: training needs"),
    (dict(val_path=None), "val_path: validation needs"),
    (dict(only_eval=True, load_model_path="x", val_path=None), "val_path: validation needs"),
    (dict(only_eval=True, load_model_path="x", skip_validation=True), "skip_validation: only_eval"),
    (dict(skip_validation=True, save_only_improve=True), "save_only_improve: needs validation"),
    (dict(from_scratch=True, model_revision="main"), "model_revision: from_scratch loads no"),
    (dict(float32_master_weights=True), "float32_master_weights: without bf16"),
    (dict(advance_at=0.9, coconut=False, cot=True), "advance_at: 0.9, but cot, no_cot and"),
    (dict(advance_at=0.9, coconut=False, no_cot=True), "no stages; set it to null"),
    (dict(advance_at=0.9, schedule="last_stage"), "no stages; set it to null"),
    (dict(stage_mixing="linear", coconut=False, cot=True), "no stages; set it to none"),
    (dict(stage_mixing="uniform", schedule="last_stage"), "stage_mixing: uniform, but cot, no_cot"),
    (dict(latent_growth="one", coconut=False, no_cot=True), "no stages; set it to step"),
    (dict(uniform_prob=0.5, coconut=False, cot=True), "no stages; set it to 0.0"),
    (dict(uniform_prob=0.5, schedule="last_stage"), "uniform_prob: 0.5, but cot, no_cot"),
    (dict(latent_growth="all", schedule="last_stage"), "latent_growth: all, but cot, no_cot and"),
    (dict(latent_growth="all", c_thought=0), "latent_growth: c_thought: 0 has no latents"),
    (dict(stage_mixing="linear", uniform_prob=0.1), "uniform_prob: stage_mixing draws"),
    (dict(advance_at=0.9, max_latent_stage=0), "advance_at: with max_latent_stage: 0 there is one"),
    (dict(stage_mixing="linear", max_latent_stage=0), "stage_mixing: with max_latent_stage: 0"),
    (dict(latent_growth="all", max_latent_stage=0), "latent_growth: with max_latent_stage: 0"),
    (dict(step_loss="head", latent_input="pause"), "step_loss: needs thoughts: coconut, hidden"),
    (dict(step_loss="head", coconut=False, cot=True), "step_loss: needs thoughts"),
    (dict(step_loss="decoder", coconut=False, no_cot=True), "step_loss: needs thoughts"),
    (dict(step_loss="decoder", no_thoughts=True), "step_loss: needs thoughts"),
    (dict(step_loss="head", c_thought=0), "c_thought and max_latent_stage > 0"),
    (dict(step_loss="head", max_latent_stage=0), "c_thought and max_latent_stage > 0"),
    (dict(step_loss_weight=0.1), "step_loss_weight: weighs step_loss, which is none"),
    (dict(max_epochs_per_stage=3), "max_epochs_per_stage: needs advance_at"),
    (dict(advance_at=0.9, max_epochs_per_stage=1), "no less than epochs_per_stage"),
    (dict(tokens_per_micro_batch=511), "tokens_per_micro_batch: 511 has no room for a row of"),
    (dict(name="ü" * 101), "has more than 200 bytes, too long for a folder"),
]


@pytest.mark.parametrize("changes", [dict(tokens_per_micro_batch=512), dict(name="ü" * 100)])
def test_as_much_as_a_limit_allows_is_fine(changes):
    good(**changes)


TYPED = {  # for a key that takes a text
    "marker_init_token=<<": "<<",  # both defaults
    "answer_marker=###": "###",
    "answer_marker==": "=",
    "answer_marker=Answer #": "Answer #",
    "answer_marker='Answer #'": "Answer #",
    "answer_marker=|": "|",
    "answer_marker=---": "---",
    "train_path=data/run #2.json": "data/run #2.json",
    "answer_marker=A:": "A:",
    "answer_marker='# x'": "# x",
    "project=2020-01-01": "2020-01-01",
    "project=on": "on",
    "val_path=null": None,
}


@pytest.mark.parametrize("argument", TYPED)
def test_a_text_is_what_is_typed(tmp_path, argument):
    """To YAML some are a comment, a date, a mapping or a truth, and two are nothing it reads."""
    path = tmp_path / "config.yaml"
    path.write_text(good(skip_validation=True).to_yaml())
    config = load_config(path, argument)
    assert getattr(config, argument.partition("=")[0]) == TYPED[argument]


def test_texts_in_a_file_that_are_none_to_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(good().to_yaml() + "\n")
    assert load_config(path, "marker_init_token=x").marker_init_token == "x"
    lines = [line for line in good().to_yaml().splitlines() if "marker_init_token" not in line]
    path.write_text("\n".join([*lines, "marker_init_token: <<", ""]))
    assert load_config(path).marker_init_token == "<<"
    path.write_text("\n".join([*lines, "marker_init_token: 12", ""]))
    with pytest.raises(UserError, match="marker_init_token: 12 is not str; put the text in quotes"):
        load_config(path)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UserError, match="is a folder; give a YAML file"):
        load_config(tmp_path)


def test_an_evaluation_may_be_of_any_epoch():
    """num_epochs is of trainings, and its default stands in no evaluation's file."""
    assert good(only_eval=True, load_model_path="x", num_epochs=20, resume=25).resume == 25


@pytest.mark.parametrize(("changes", "fragment"), CONTRADICTIONS)
def test_contradiction_is_named(changes, fragment):
    assert fragment in problems(**changes)


def test_methods():
    """no_thoughts wins over coconut, as in the ancestor's files for that ablation."""
    assert good().method is Method.COCONUT
    assert good(no_thoughts=True).method is Method.NO_THOUGHTS
    assert good(no_thoughts=True, coconut=False).method is Method.NO_THOUGHTS
    assert good(cot=True, coconut=False).method is Method.COT
    assert good(no_cot=True, coconut=False).method is Method.NO_COT


def test_all_numbers_of_latents_are_those_of_the_stages():
    keys = dict(eval_num_latents="all", only_eval=True, load_model_path="x", max_latent_stage=2)
    assert good(**keys, c_thought=3).forced_latents == [0, 3, 6]
    assert good(**keys, c_thought=3, latent_growth="all").forced_latents == [0, 3, 6]
    assert good(**keys, c_thought=3, latent_growth="one").forced_latents == [0, 1, 2, 3, 4, 5, 6]
    assert good(**keys, c_thought=0).forced_latents == [0]


def test_validation_file_may_be_missing_where_nothing_is_validated():
    assert good(val_path=None, skip_validation=True).val_path is None
    assert good(train_path=None, only_eval=True, load_model_path="x").train_path is None


def test_all_problems_are_reported_together():
    with pytest.raises(UserError) as caught:
        make_config({"name": 1, "lr": "x", "sed": 2}, "a.yaml")
    actual = caught.value.problems
    assert [line for line in actual if not line.startswith("a.yaml: ")] == []
    for name in ("name:", "lr:", "unknown key sed", "save_path is missing", "model_id is missing"):
        assert any(name in line for line in actual), name


# ------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("seed: 1\nseed: 2\n", "key seed stands there twice"),
        ("1: 2\n", "key 1 is not a word"),
        ("[a, b]\n", "expected `key: value` lines, found list"),
        ("", "expected `key: value` lines, found NoneType"),
        ("just text\n", "expected `key: value` lines, found str"),
        ("a: [1\n", "not valid YAML"),
        ("a:\n\tb: 1\n", "not valid YAML"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("[" * 500, "not valid YAML"),
        ("a: 1\n---\na: 2\n", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line_that_names_the_file(tmp_path, text, fragment):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: ") and fragment in line and "\n" not in line


@pytest.mark.parametrize("content", [b"\xff\xfe\x00a", None])
def test_unreadable_config_is_named(tmp_path, content):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read this config"):
        read_yaml(path)
    with pytest.raises(UserError, match="cannot read this config"):
        read_yaml(tmp_path)


# names that exist, names that nearly do, any other; values of every kind YAML knows
NAMES = st.sampled_from([*FIELDS, "num_epoch", "LR"]) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["None", "1e-4", "YOUR_X", "all", "<<"])
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=2),
    max_leaves=4,
)


def config_or_user_error(folder, content: bytes) -> Config | None:
    """Load bytes as a config. Anything raised but UserError fails the test by itself."""
    path = folder / "x.yaml"
    path.write_bytes(content)
    try:
        config = load_config(path)
    except UserError as error:
        assert error.problems and all(str(path) in line for line in error.problems)
        return None
    assert isinstance(config, Config)
    return config


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_fuzz_mappings(tmp_path_factory, changes):
    """Any mapping over a good one: a Config whose values are the ones written, or UserError."""
    content = yaml.safe_dump({**GOOD, **changes}).encode()
    config = config_or_user_error(tmp_path_factory.getbasetemp(), content)
    for name, value in changes.items() if config else ():
        actual = getattr(config, name)
        assert actual == value or value == "None" or float(actual) == float(value)


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60).map(str.encode)
    | st.binary(max_size=60)
    | st.text(alphabet="a:-{}[]!&*#|>%@`'\"\n\t ,?<1.e", max_size=40).map(str.encode)
)
def test_fuzz_text(tmp_path_factory, content):
    """Any bytes: UserError (no text this short holds a whole config), never a traceback."""
    assert config_or_user_error(tmp_path_factory.getbasetemp(), content) is None


# ------------------------------------------------------------------------------- the dataclass


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        good().lr = 1.0


def test_only_the_schema_names_are_keys():
    """Every key has a meaning of one line, and --help lists it."""
    text = describe_keys()
    for name, f in FIELDS.items():
        assert f"  {name} (" in text and f.metadata["meaning"] in text
        assert "\n" not in f.metadata["meaning"]


PRINTABLE = st.text(
    st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=12
).filter(lambda text: text.strip() and text != "None" and "YOUR_" not in text)


@settings(max_examples=60, deadline=None)
@given(
    name=PRINTABLE.filter(
        lambda text: "/" not in text and text not in (".", "..") and text[0] != "~"
    ),
    train_path=PRINTABLE.filter(lambda text: "$" not in text and text[0] != "~"),
    lr=st.floats(0, 1, exclude_min=True),
    resume=st.none() | st.integers(0, 20),
    bf16=st.booleans(),
    max_grad_norm=st.none() | st.floats(0, 1e9),
)
def test_config_survives_its_own_yaml(tmp_path_factory, **changes):
    config = good(**changes)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_dtypes():
    """Parameters and computation; float32 master weights separate the two."""
    bf16, f32 = torch.bfloat16, torch.float32
    assert (good().dtype, good().compute_dtype) == (f32, f32)
    assert (good(bf16=True).dtype, good(bf16=True).compute_dtype) == (bf16, bf16)
    master = good(bf16=True, float32_master_weights=True)
    assert (master.dtype, master.compute_dtype) == (f32, bf16)


# ------------------------------------------------------------------------------- seeds, files


def test_derive_seed_depends_on_every_part():
    """Parts must not run together: (1, 23) and (12, 3) are other draws, "1" is not 1."""
    parts = [
        (0,),
        (1,),
        ("0",),
        (0, 0),
        (1, 23),
        (12, 3),
        (0, "order", 1),
        (0, "order", 2),
        (1, "order", 1),
        (0, "stage", 1),
    ]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
    # a constant: another interpreter, another hash seed, the same draw
    assert derive_seed(0, "order", 1) == 1332101017241992705
