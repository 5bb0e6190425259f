"""Config (the schema), errors, seeds. Imports nothing of this project.

The schema is one frozen dataclass; loader.py makes one of YAML files. Key names and meanings follow
the ancestor's YAML files (facebookresearch/coconut, args/*.yaml), which load unchanged.
"""

import dataclasses
import hashlib
import logging
import os
import sys
import types
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml

log = logging.getLogger("coconut")


EXIT_WRONG_INPUT = 2


class UserError(ValueError):
    """Wrong input: one line per problem, reported once by main(), which then exits with code 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def report(self) -> int:
        """Print the problems, a line each, to stderr; the exit code."""
        print(*(f"error: {problem}" for problem in self.problems), sep="\n", file=sys.stderr)
        return EXIT_WRONG_INPUT


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
    choices: tuple[bool | str, ...] | None = None,
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
    tensorboard: bool = key("TensorBoard's event files in the run folder", False)
    seed: int = key(
        "seed of all that is drawn: new weights, data order, dropout, the rows of gate_rows, the "
        "stages of uniform_prob and stage_mixing, samples",
        0,
        low=0,
    )
    debug: bool = key("small subsets of the data, no wandb, no checkpoints", False)
    only_eval: bool = key("evaluate load_model_path on val_path or eval_sets; no training", False)

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
    gate_rows: int = key(
        "training rows set aside by seed for advance_at, each with another question; no row with "
        "one of these questions is trained on",
        200,
        low=1,
    )
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
        "epochs that are done: they say the stage, with advance_at a checkpoint of this program "
        "does; null: 0, in evaluation what the checkpoint says",
        None,
        low=0,
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
        "keeping them (but for latents' own columns, which are few); True: all",
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
    reset_optimizer: bool | str = key(
        "new optimizer state whenever the stage changes; epoch: in every epoch, as the ancestor",
        False,
        choices=(False, True, "epoch"),
    )

    # evaluation
    skip_validation: bool = key("no validation at all during training", False)
    eval_sets: dict | None = key(
        "{name: path, ...}: only_eval on several sets in place of val_path, each like it", None
    )
    eval_subset_size: int | None = key(
        "first rows of val_path, or of each set, only; null: all", None, low=1
    )
    batch_size_eval: int = key("rows generated together, per process", 1, low=1)
    max_new_tokens: int = key("limit of a completion; eos ends it earlier", 256, low=1)
    eval_num_latents: int | list | str | None = key(
        "only_eval with this number of latents, each of a list of numbers, or `all`: from 0 to "
        "c_thought x max_latent_stage by c_thought (latent_growth one: by 1); null: the stage's",
        None,
    )
    num_samples: int = key(
        "only_eval: completions drawn of each row, beside the greedy one", 1, low=1, high=10_000
    )
    temperature: float = key("of the samples; 0: none are drawn", 0.0, low=0, high=100)
    top_p: float = key(
        "samples are drawn among the most probable tokens that have this share of the mass",
        1.0,
        low=1e-3,
        high=1,
    )

    # checkpoints
    save_only_improve: bool = key(
        "keep two checkpoints, the best by validation accuracy and the newest; keep_checkpoints "
        "has no say",
        False,
    )
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

    def rows_of(self, eval_set: str | None) -> str:
        """The file or Hub data set of an evaluation: val_path, or that of one of eval_sets."""
        return str(self.val_path) if eval_set is None else (self.eval_sets or {})[eval_set]

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


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
REQUIRED = tuple(name for name, f in FIELDS.items() if f.default is dataclasses.MISSING)
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


def types_of(name: str) -> tuple[type, ...]:
    """Those that the value of a key may have."""
    return typing.get_args(TYPES[name]) or (TYPES[name],)


def holds_text(name: str) -> bool:
    """Whether the value of a key is a text, or a text or null."""
    return {*types_of(name)} <= {str, types.NoneType}


def kinds(name: str) -> str:
    """The types of a key in YAML's words."""
    allowed = types_of(name)
    return " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)


# ------------------------------------------------------------------------------- machine


# beside OMP_NUM_THREADS where that is a share of the cores and no wish of the user's
SHARED_CORES = "COCONUT_SHARED_CORES"


def count_cores() -> int:
    """Those that this process may use, where the system tells (macOS does not)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ------------------------------------------------------------------------------- seeds


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, e.g. (seed, "epoch", 3): no draw depends on
    the number of workers or processes, nor on what was drawn before."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
