"""What a config may hold: each key's type and limits, and keys that exclude each other."""

import difflib
import math
import os
import re
import types
import unicodedata
from collections.abc import Iterator
from typing import Any

import torch

from utils import FIELDS, REQUIRED, Config, Method, UserError, holds_text, kinds, types_of

PATHS = {"save_path", "model_id", "load_model_path", "train_path", "val_path"}
MAX_LATENTS = 100_000  # to force; more than any model here has positions
MAX_NAME = 200  # bytes; what is written beside it has longer names
SET_NAME = re.compile(r"[A-Za-z0-9_-]{1,50}")  # a part of the names of files
CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # Unicode: control, half characters, line ends

# ------------------------------------------------------------------------------- one key


def _closest(name: str) -> str:
    matches = difflib.get_close_matches(name, FIELDS, n=1)
    return f"; did you mean {matches[0]}?" if matches else "; `run.py --help` lists the keys"


def _coerce(name: str, value: Any) -> Any:
    """The value in the key's type. Raises ValueError with what was seen and what is allowed."""
    allowed = types_of(name)
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
        quoted = holds_text(name) and value is not None
        quotes = "; put the text in quotes" if quoted else ""
        raise ValueError(f"{name}: {value!r} is not {kinds(name)}{quotes}")
    if name == "max_grad_norm" and value == 0:  # "no clipping" in the libraries people come from
        return None
    if name in PATHS and isinstance(value, str):
        return _expand(name, value)
    if name == "eval_sets" and isinstance(value, dict):
        texts = {key: path for key, path in value.items() if isinstance(path, str)}
        return value | {key: _expand(f"{name}: {key}", path) for key, path in texts.items()}
    return value


def _expand(name: str, path: str) -> str:
    """A path as a shell user writes it, with ~ and variables. Raises ValueError."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~") or re.search(r"\$([A-Za-z_]|\{)", expanded):
        raise ValueError(f"{name}: {path!r} names a variable or a user that is not known here")
    return expanded


def _check_value(name: str, value: Any) -> None:
    """Placeholders, choices and limits of one key. Raises ValueError."""
    rule = FIELDS[name].metadata
    if isinstance(value, str) and ("YOUR_" in value or not value.strip()):
        raise ValueError(f"{name}: {value!r} is a placeholder; put your own value there")
    if isinstance(value, str) and any(unicodedata.category(c) in CONTROL for c in value):
        raise ValueError(f"{name}: {value!r} holds characters that no name or path has")
    if rule["choices"] and value not in rule["choices"]:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(str, rule['choices']))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not finite")
    if value is not None and rule["low"] is not None and value < rule["low"]:
        raise ValueError(f"{name}: {value} is below {rule['low']}")
    if value is not None and rule["high"] is not None and value > rule["high"]:
        raise ValueError(f"{name}: {value} is above {rule['high']}")


# ------------------------------------------------------------------------------- keys together


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
    wants_rows = config.eval_sets is None if config.only_eval else not config.skip_validation
    if config.val_path is None and wants_rows:
        yield "val_path: validation needs a file with rows (or set skip_validation: True)"
    if config.skip_validation and config.only_eval:
        yield "skip_validation: only_eval does nothing else; set one of them to False"
    if config.skip_validation and config.save_only_improve:
        yield "save_only_improve: needs validation; set skip_validation to False"
    beyond = config.resume is not None and config.resume > config.num_epochs
    if beyond and not config.only_eval:
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
    yield from _evaluation_problems(config)
    yield from _adapter_problems(config)
    if "/" in config.name or config.name.startswith("~") or config.name in (".", ".."):
        yield f"name: {config.name!r} is not a plain folder name"
    if len(config.name.encode()) > MAX_NAME:
        yield f"name: {config.name[:50]!r}... has more than {MAX_NAME} bytes, too long for a folder"
    if config.lr == 0 and not config.only_eval:
        yield "lr: 0 trains nothing; set a rate above 0"


OF_STAGES = ("advance_at", "stage_mixing", "latent_growth", "uniform_prob")
OF_THOUGHTS = ("step_loss", "step_loss_weight")


def not_for(method: dict[str, Any]) -> set[str]:
    """The keys that mean nothing to the method that these keys of a YAML file set; they are
    refused where they stand beside it."""
    no_stages = method.get("cot") or method.get("no_cot") or method.get("schedule") == "last_stage"
    no_thoughts = any(method.get(name) for name in ("cot", "no_cot", "no_thoughts"))
    no_thoughts = no_thoughts or method.get("latent_input") == "pause"
    return {
        *((*OF_STAGES, "max_epochs_per_stage") if no_stages else ()),
        *(OF_THOUGHTS if no_thoughts else ()),
    }


def _stage_problems(config: Config) -> Iterator[str]:
    nothing = not_for(vars(config))
    for name in OF_STAGES:
        value, default = getattr(config, name), FIELDS[name].default
        if name in nothing and value != default:
            yield (
                f"{name}: {value}, but cot, no_cot and schedule last_stage have no stages; set "
                f"it to {'null' if default is None else default}"
            )
    single = config.schedule == "capped" and config.max_latent_stage == 0
    for name in ("advance_at", "stage_mixing", "latent_growth"):
        if single and getattr(config, name) != FIELDS[name].default:
            yield f"{name}: with max_latent_stage: 0 there is one stage only; leave it out"
    if config.stage_mixing != "none" and config.uniform_prob:
        yield "uniform_prob: stage_mixing draws the stage of every row; set one of them"
    if config.latent_growth != "step" and config.c_thought == 0:
        yield "latent_growth: c_thought: 0 has no latents to grow; set it to step"
    thinks = config.coconut and "step_loss" not in nothing
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
    good = all(type(number) is int and 0 <= number <= MAX_LATENTS for number in numbers)
    if value != "all" and (not numbers or not good):
        allowed = f"a number from 0 to {MAX_LATENTS}, a list of them, or all"
        yield f"eval_num_latents: {value!r} is not {allowed}"


def _evaluation_problems(config: Config) -> Iterator[str]:
    """Of the keys of an evaluation on several sets, and with samples."""
    sets = config.eval_sets
    if sets is not None and not config.only_eval:
        yield "eval_sets: is for only_eval; training is validated on val_path"
    elif sets is not None and config.val_path is not None:
        yield "eval_sets: stands in place of val_path; set one of them to null"
    if sets == {}:
        yield "eval_sets: {} has no set; give {name: path, ...}"
    for name, path in (sets or {}).items():
        if not isinstance(name, str) or not SET_NAME.fullmatch(name):
            yield (
                f"eval_sets: {name!r} cannot be a part of file names; take up to 50 letters, "
                "digits, _ and -"
            )
        if not isinstance(path, str) or not path.strip() or "YOUR_" in path:
            yield f"eval_sets: {name}: {path!r} is not the path of a file or Hub data set"
    if config.temperature > 0 and not config.only_eval:
        yield "temperature: is for only_eval; training evaluates greedily; set it to 0"
    for name, none in (("num_samples", 1), ("top_p", 1)):
        if (value := getattr(config, name)) != none and config.temperature == 0:
            yield f"{name}: {value}, but no sample is drawn at temperature: 0; set one above 0"


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
    for name in REQUIRED:
        if name not in values:
            problems.append(f"{source}: {name} is missing: {FIELDS[name].metadata['meaning']}")
    if not problems:
        config = Config(**good)
        problems = [f"{source}: {line}" for line in _contradictions(config)]
    if problems:
        raise UserError(*problems)
    return config
