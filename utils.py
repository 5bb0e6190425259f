"""Config (the schema and its rules), errors, seeds. Imports nothing of this project.

The schema is one frozen dataclass; loader.py makes one of YAML files. Key names and meanings follow
the ancestor's YAML files (facebookresearch/coconut, args/*.yaml), which load unchanged.
"""

import dataclasses
import difflib
import hashlib
import logging
import math
import os
import re
import types
import typing
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml

log = logging.getLogger("coconut")


class UserError(ValueError):
    """Wrong input: one line per problem, reported once by main(), which then exits with code 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Method(Enum):
    """The training methods of the paper's section 4 that differ in their data."""

    COCONUT = "coconut"
    COT = "cot"
    NO_THOUGHTS = "no_thoughts"  # the paper's "w/o thought": the curriculum without latents
    NO_COT = "no_cot"


# ------------------------------------------------------------------------------- the schema


def key(
    meaning: str,
    default: Any = dataclasses.MISSING,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A config key: its one line of meaning, its default (none: required) and allowed values."""
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every key of a YAML file. Nothing is written to it after loading."""

    # the run
    name: str = key("name of the run; its folder is <save_path>/<name>")
    save_path: str = key("folder that holds the run folders")
    project: str = key("project name on wandb", "coconut")
    seed: int = key("seed of initialisation, data order, dropout and uniform_prob", 0, low=0)
    debug: bool = key("small subsets of the data, no wandb, no checkpoints", False)
    only_eval: bool = key("evaluate load_model_path on val_path; no training", False)

    # method: exactly one results
    coconut: bool = key("continuous thoughts with the multi-stage curriculum", False)
    cot: bool = key("ordinary chain of thought", False)
    no_thoughts: bool = key("the curriculum without latents (wins over coconut)", False)
    no_cot: bool = key("answer directly: no chain, no latents", False)

    # curriculum
    latent_input: str = key(
        "what a latent position reads: the last hidden state, or an embedding of its own, "
        "the same at all of them (pause)",
        "hidden_state",
        choices=("hidden_state", "pause"),
    )
    schedule: str = key(
        "stage of an epoch; last_stage: no curriculum, all latents and no step from the "
        "first epoch on",
        "capped",
        choices=("capped", "paper", "last_stage"),
    )
    c_thought: int = key("latent tokens for each replaced reasoning step", 2, low=0, high=1000)
    epochs_per_stage: int = key("epochs for each stage, or the fewest", 2, low=1, high=10**6)
    max_latent_stage: int = key(
        "steps that latents replace in the last stage (M)", 3, low=0, high=1000
    )
    advance_at: float | None = key(
        "accuracy on gate_rows that begins the next stage; null: epochs do", None, low=1e-3, high=1
    )
    gate_rows: int = key("training rows set aside by seed for advance_at", 200, low=1)
    max_epochs_per_stage: int | None = key("the most, with advance_at; null: no limit", None, low=1)
    pad_latent_to_max: bool = key("same number of latents for chains shorter than the stage", True)
    latent_growth: str = key(
        "step: each stage brings c_thought latents; one: one, and a step goes with its first; "
        "all: every stage has all of them, from stage 0 on",
        "step",
        choices=("step", "one", "all"),
    )
    stage_mixing: str = key(
        "at stage k a training row has a random stage i <= k: all alike, or by weight i + 1",
        "none",
        choices=("none", "uniform", "linear"),
    )
    uniform_prob: float = key("probability to train a row at a random stage", 0.0, low=0, high=1)
    step_loss: str = key(
        "thoughts are trained on the steps that they replace: the head reads their tokens in "
        "them, or a decoder, which is dropped afterwards, writes them (step_loss.py)",
        "none",
        choices=("none", "head", "decoder"),
    )
    step_loss_weight: float | None = key(
        "its weight in the loss; null: 0.05 for head, 1 for decoder", None, low=1e-6
    )

    # model
    model_id: str = key("Hugging Face model: a Hub name or a local folder")
    model_revision: str | None = key("branch, tag or commit of a Hub model", None)
    from_scratch: bool = key("random weights from the config of model_id", False)
    marker_init_token: str = key("token whose embedding starts the latent markers", "<<")
    load_model_path: str | None = key("checkpoint to evaluate, or to start from", None)
    resume: int | None = key(
        "epochs that are done; null: 0, in evaluation what the checkpoint says", None, low=0
    )
    bf16: bool = key("parameters and computation in bfloat16", False)
    float32_master_weights: bool = key(
        "with bf16: parameters and optimizer in float32, computation in bfloat16", False
    )
    fast_layers: bool = key(
        "RMSNorm and linear layers made for many short passes (layers.py); False: the library's",
        True,
    )
    gradient_checkpointing: bool | float = key(
        "share of the blocks that compute their activations again in the backward instead of "
        "keeping them; True: all",
        False,
        low=0,
        high=1,
    )

    # adapters (LoRA, engine/adapters.py)
    lora_r: int | None = key(
        "rank of adapters that are trained over frozen weights; null: all weights are", None, low=1
    )
    lora_alpha: float = key("adapters are scaled by lora_alpha / lora_r", 32.0, low=1e-6)
    lora_dropout: float = key("of the adapters' inputs, in training", 0.0, low=0, high=0.99)
    lora_targets: list | None = key(
        "[q_proj, v_proj, ...]: endings of the names of the linear layers that get one; null, all: "
        "all of the blocks",
        None,
    )

    # data
    train_path: str | None = key(  # see rows.py
        "training rows: a JSON, parquet or CSV file, or owner/name[/config]:split of the Hub", None
    )
    val_path: str | None = key("validation or test rows, like train_path", None)
    data_columns: dict | None = key(
        "{question: x, steps: y, answer: z}: their columns; steps null: none; see data/README.md",
        None,
    )
    group_by_length: bool = key(
        "rows of like length share a step: less padding, another order", False
    )
    answer_marker: str = key(
        "what the program writes before an answer, and looks for in completions", "###"
    )
    answer_kind: str = key(
        "answers are equal as numbers (else as texts), as texts, or by their first word",
        "number",
        choices=("number", "text", "choice"),
    )
    max_seq_length: int = key("longer training rows are dropped and counted", 512, low=2)
    num_workers: int = key("processes that collate batches; 0: the main one", 1, low=0, high=1000)

    # optimisation
    batch_size_training: int = key("rows per process and micro-batch", 16, low=1)
    tokens_per_micro_batch: int | None = key(
        "token positions per process and micro-batch at most, padding included: rows of like "
        "length share one; null: batch_size_training rows",
        None,
        low=1,
    )
    gradient_accumulation_steps: int = key("micro-batches per optimizer step", 1, low=1)
    rows_per_step: int | None = key(
        "rows of an optimizer step on all processes together; null: batch_size_training x "
        "gradient_accumulation_steps x processes",
        None,
        low=1,
    )
    num_epochs: int = key("last epoch; epochs count from 1", 20, low=1, high=10**6)
    lr: float = key("learning rate", 1e-4, low=0)
    weight_decay: float = key("AdamW's decoupled weight decay", 0.01, low=0, high=100)
    optimizer: str = key(
        "auto: adamw_split where the weights are bf16, else adamw",
        "auto",
        choices=("auto", "adamw", "adamw_split"),
    )
    lr_schedule: str = key(
        "learning rate after the warm-up", "constant", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = key("optimizer steps of linear warm-up", 0, low=0)
    max_grad_norm: float | None = key("clip the global gradient norm; null, 0: never", None, low=0)
    max_bad_steps: int = key("stop after this many non-finite steps in a row", 5, low=1)
    reset_optimizer: bool = key("new optimizer state whenever the stage changes", False)

    # evaluation
    skip_validation: bool = key("no validation at all during training", False)
    eval_subset_size: int | None = key("first rows of val_path only; null: all", None, low=1)
    batch_size_eval: int = key("rows generated together, per process", 1, low=1)
    max_new_tokens: int = key("limit of a completion; eos ends it earlier", 256, low=1)
    eval_num_latents: int | list | str | None = key(
        "only_eval with this number of latents, each of a list of numbers, or `all` numbers "
        "of the stages; null: the stage's own",
        None,
    )

    # checkpoints
    save_only_improve: bool = key("keep only checkpoints that improve validation accuracy", False)
    save_every_steps: int | None = key("save within an epoch too; null: never", None, low=1)
    keep_checkpoints: int | None = key(
        "newest epochs to keep, and the best; null: all", None, low=1
    )

    @property
    def method(self) -> Method:
        if self.no_thoughts:  # wins over coconut, as in the ancestor's run.py
            return Method.NO_THOUGHTS
        return next(m for m in Method if getattr(self, m.value))

    @property
    def feeds_back(self) -> bool:
        """Whether latents read hidden states; a pause is an ordinary token with an embedding."""
        return self.method is Method.COCONUT and self.latent_input == "hidden_state"

    @property
    def forced_latents(self) -> list[int | None]:
        """The numbers of latents to evaluate with; None: the stage's own."""
        if self.eval_num_latents == "all":
            last, at_once = self.c_thought * self.max_latent_stage, max(self.c_thought, 1)
            return list(range(0, last + 1, 1 if self.latent_growth == "one" else at_once))
        numbers: Any = self.eval_num_latents
        return numbers if isinstance(numbers, list) else [numbers]

    @property
    def run_dir(self) -> Path:
        return Path(self.save_path) / self.name

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        pure = self.bf16 and not self.float32_master_weights
        return torch.bfloat16 if pure else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def step_rows(self, num_processes: int) -> int:
        """Training rows of one optimizer step."""
        if self.rows_per_step is not None:
            return self.rows_per_step
        return self.batch_size_training * self.gradient_accumulation_steps * num_processes

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


PATHS = {"save_path", "model_id", "load_model_path", "train_path", "val_path"}
MAX_NAME = 200  # bytes; what is written beside it has longer names
CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # Unicode: control, half characters, line ends
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)
TOPICS = {  # by their first key, for --help
    "name": "the run",
    "coconut": "method: exactly one",
    "latent_input": "curriculum",
    "model_id": "model",
    "lora_r": "adapters (LoRA)",
    "train_path": "data",
    "batch_size_training": "optimisation",
    "skip_validation": "evaluation",
    "save_only_improve": "checkpoints",
}

# ------------------------------------------------------------------------------- checks


def _closest(name: str) -> str:
    matches = difflib.get_close_matches(name, FIELDS, n=1)
    return f"; did you mean {matches[0]}?" if matches else "; `run.py --help` lists the keys"


def _coerce(name: str, value: Any) -> Any:
    """The value in the key's type. Raises ValueError with what was seen and what is allowed."""
    allowed = typing.get_args(TYPES[name]) or (TYPES[name],)
    if value == "None" and types.NoneType in allowed:  # the ancestor's null, to YAML a word
        return None
    if name == "lora_targets" and value == "all":
        return None
    if float in allowed and not isinstance(value, bool) and isinstance(value, int | str):
        try:  # YAML reads 1e-4 (no dot) as a word
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) not in allowed:
        raise ValueError(f"{name}: {value!r} is not {kinds(name)}")
    if name == "max_grad_norm" and value == 0:  # "no clipping" in the libraries people come from
        return None
    if name in PATHS and isinstance(value, str):
        return _expand(name, value)
    return value


def _expand(name: str, path: str) -> str:
    """A path as a shell user writes it, with ~ and variables. Raises ValueError."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~") or re.search(r"\$([A-Za-z_]|\{)", expanded):
        raise ValueError(f"{name}: {path!r} names a variable or a user that is not known here")
    return expanded


def kinds(name: str) -> str:
    """The types of a key in YAML's words."""
    allowed = typing.get_args(TYPES[name]) or (TYPES[name],)
    return " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)


def _check_value(name: str, value: Any) -> None:
    """Placeholders, choices and limits of one key. Raises ValueError."""
    rule = FIELDS[name].metadata
    if isinstance(value, str) and ("YOUR_" in value or not value.strip()):
        raise ValueError(f"{name}: {value!r} is a placeholder; put your own value there")
    if isinstance(value, str) and any(unicodedata.category(c) in CONTROL for c in value):
        raise ValueError(f"{name}: {value!r} holds characters that no name or path has")
    if rule["choices"] and value not in rule["choices"]:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(rule['choices'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not finite")
    if value is not None and rule["low"] is not None and value < rule["low"]:
        raise ValueError(f"{name}: {value} is below {rule['low']}")
    if value is not None and rule["high"] is not None and value > rule["high"]:
        raise ValueError(f"{name}: {value} is above {rule['high']}")


def _contradictions(config: Config) -> Iterator[str]:
    """Yield one line for every pair of keys that exclude each other."""
    methods = [m.value for m in Method if getattr(config, m.value)]
    if config.no_thoughts and config.coconut:
        methods.remove("coconut")
    if len(methods) != 1:
        seen = " and ".join(methods) if methods else "none"
        yield f"method: {seen} set to True; set exactly one of coconut, cot, no_thoughts, no_cot"
    elif config.latent_input == "pause" and config.method is not Method.COCONUT:
        yield "latent_input: pause is for coconut; the other methods have no latent positions"
    if config.only_eval and config.load_model_path is None:
        yield "load_model_path: only_eval needs the checkpoint to evaluate"
    if not config.only_eval and config.train_path is None:
        yield "train_path: training needs the file with the training rows"
    if config.val_path is None and (config.only_eval or not config.skip_validation):
        yield "val_path: validation needs a file with rows (or set skip_validation: True)"
    if config.skip_validation and config.only_eval:
        yield "skip_validation: only_eval does nothing else; set one of them to False"
    if config.skip_validation and config.save_only_improve:
        yield "save_only_improve: needs validation; set skip_validation to False"
    if config.resume is not None and config.resume > config.num_epochs:
        yield f"resume: {config.resume} epochs done is beyond num_epochs: {config.num_epochs}"
    if config.rows_per_step is not None and config.gradient_accumulation_steps > 1:
        yield "rows_per_step: says how much is accumulated; leave gradient_accumulation_steps out"
    if (budget := config.tokens_per_micro_batch) and budget < config.max_seq_length:
        longest = f"max_seq_length ({config.max_seq_length})"
        yield f"tokens_per_micro_batch: {budget} has no room for a row of {longest}"
    if config.float32_master_weights and not config.bf16:
        yield "float32_master_weights: without bf16 all is float32; set one of them"
    if config.optimizer == "adamw_split" and config.dtype is not torch.bfloat16:
        yield "optimizer: adamw_split is for bfloat16 weights (bf16, no float32_master_weights)"
    if config.from_scratch and config.model_revision is not None:
        yield "model_revision: from_scratch loads no weights; set one of them only"
    yield from _stage_problems(config)
    yield from _latent_problems(config)
    yield from _adapter_problems(config)
    if "/" in config.name or config.name.startswith("~") or config.name in (".", ".."):
        yield f"name: {config.name!r} is not a plain folder name"
    if len(config.name.encode()) > MAX_NAME:
        yield f"name: {config.name[:50]!r}... has more than {MAX_NAME} bytes, too long for a folder"
    if config.lr == 0 and not config.only_eval:
        yield "lr: 0 trains nothing; set a rate above 0"


def _stage_problems(config: Config) -> Iterator[str]:
    if config.cot or config.no_cot or config.schedule == "last_stage":
        for name in ("advance_at", "stage_mixing", "latent_growth"):
            if (value := getattr(config, name)) != (default := FIELDS[name].default):
                yield (
                    f"{name}: {value}, but cot, no_cot and schedule last_stage have no stages; set "
                    f"it to {'null' if default is None else default}"
                )
    if config.stage_mixing != "none" and config.uniform_prob:
        yield "uniform_prob: stage_mixing draws the stage of every row; set one of them"
    if config.latent_growth != "step" and config.c_thought == 0:
        yield "latent_growth: c_thought: 0 has no latents to grow; set it to step"
    thinks = config.coconut and not config.no_thoughts and config.latent_input != "pause"
    if config.step_loss != "none" and not (thinks and config.c_thought and config.max_latent_stage):
        yield "step_loss: needs thoughts: coconut, hidden_state, c_thought and max_latent_stage > 0"
    if config.step_loss_weight is not None and config.step_loss == "none":
        yield "step_loss_weight: weighs step_loss, which is none; set it to null"
    most = config.max_epochs_per_stage
    if most is not None and (config.advance_at is None or most < config.epochs_per_stage):
        yield "max_epochs_per_stage: needs advance_at, and no less than epochs_per_stage"


def _latent_problems(config: Config) -> Iterator[str]:
    value = config.eval_num_latents
    if value is None:
        return
    if not config.coconut or config.no_thoughts:
        yield "eval_num_latents: only coconut models take latents; set it to null"
    if not config.only_eval:
        yield "eval_num_latents: is for only_eval; training evaluates its stages, and 0 at the end"
    numbers = value if isinstance(value, list) else [value]
    good = all(type(number) is int and number >= 0 for number in numbers)
    if value != "all" and (not numbers or not good):
        yield f"eval_num_latents: {value!r} is not a number from 0 up, a list of them, or all"


def _adapter_problems(config: Config) -> Iterator[str]:
    targets = config.lora_targets
    if targets is not None and not (targets and all(isinstance(t, str) and t for t in targets)):
        yield f"lora_targets: {targets!r} is not a list of names, [q_proj, v_proj] say, or all"
    if config.lora_r is None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if getattr(config, name) != FIELDS[name].default:
                yield f"{name}: is for adapters, and lora_r is null; set lora_r, or leave it out"
        return
    if config.from_scratch:
        yield "lora_r: adapters need trained weights below them; leave from_scratch out"
    if config.step_loss == "decoder":
        yield "step_loss: decoder trains a copy of the blocks; with lora_r take head or none"


def make_config(values: dict, source: str, origins: dict[str, str] | None = None) -> Config:
    """Check every key, collect all problems, and build the Config. Raises UserError.

    source: where the values come from, for messages. origins: by key, where that is another one.
    """
    problems, good = [], {}
    for name, value in values.items():
        where = (origins or {}).get(name, source)
        if name not in FIELDS:
            problems.append(f"{where}: unknown key {name}{_closest(name)}")
            continue
        try:
            good[name] = _coerce(name, value)
            _check_value(name, good[name])
        except ValueError as error:
            problems.append(f"{where}: {error}")
    for name, f in FIELDS.items():
        if f.default is dataclasses.MISSING and name not in values:
            problems.append(f"{source}: {name} is missing: {f.metadata['meaning']}")
    if not problems:
        config = Config(**good)
        problems = [f"{source}: {line}" for line in _contradictions(config)]
    if problems:
        raise UserError(*problems)
    return config


# ------------------------------------------------------------------------------- seeds


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, e.g. (seed, "epoch", 3): no draw depends on
    the number of workers or processes, nor on what was drawn before."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
