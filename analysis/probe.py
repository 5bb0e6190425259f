"""A loaded model to ask: one class for a user's Python and for the commands of analysis.

    from analysis import load
    model = load("outputs/quickstart/checkpoint_10")
    model.answer(["Mia has 5 of 10 plums, ..."], num_latents=6, thoughts=True)

Shapes: B rows, T tokens, K latents, D hidden size, V vocabulary.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coconut import Coconut, CoconutOutput, EditLatent, token_embeddings
from dataset import Batch, StageDataset, collate
from engine.adapters import CONFIG_FILE
from engine.checkpoint import as_checkpoint, find_checkpoints
from engine.distributed import autocast, choose_device
from engine.inputs import Inputs
from engine.model import build_model
from engine.preflight import check_prompts, encode, gather_inputs
from engine.text import TextFormat, decode_completion
from loader import as_override, load_config
from rows import parse_rows
from rules import make_config
from utils import Config, Method, UserError

Replacement = tuple[int, Tensor]  # latent k, and the states (rows, D) to feed back there
NO_ANSWER = "?"  # stands for the gold answer of a question that was typed


@dataclass(frozen=True)
class Answer:
    """What a model writes after a question and its latents."""

    text: str  # all of it, as it is judged
    answer: str | None  # None: it wrote no marker of an answer
    steps: list[str]
    num_tokens: int  # written; eos counts, latents do not
    num_latents: int
    thoughts: Tensor | None  # (K, D) states fed back, where they are asked for


@dataclass(frozen=True)
class Probe:
    """A model with its tokenizer, its stage and the rows to show it (inputs.validation)."""

    inputs: Inputs
    model: Coconut
    device: torch.device

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def rows(self) -> list[dict]:
        return self.inputs.validation.rows

    @property
    def text_format(self) -> TextFormat:
        return self.inputs.text_format

    def answer(
        self,
        questions: Sequence[str],
        num_latents: int | None = None,
        thoughts: bool = False,
        replaced: Replacement | None = None,
    ) -> list[Answer]:
        """Greedy answers, batch_size_eval questions together.

        num_latents: K for every question; None: of the checkpoint's stage. thoughts: with the
        states fed back, as they are without a replacement. replaced: (k, states (B, D)), what
        latent k, from 0, feeds back instead. Raises UserError.
        """
        if num_latents is None:
            num_latents = self.config.forced_latents[0]
        check_num_latents(self.config, num_latents)
        probe = self.with_rows(question_rows(questions))
        dataset, rows = probe.dataset(num_latents), list(range(len(questions)))
        fed_back = int(dataset.num_latents.min()) if self.config.feeds_back else 0
        if replaced is not None and not 0 <= replaced[0] < fed_back:
            raise UserError(
                f"replaced: latent {replaced[0]}, but {fed_back} are fed back, counted from 0"
            )
        states = probe.thoughts(dataset, rows) if thoughts else [None] * len(rows)
        completions = probe.complete(dataset, rows, replaced)
        return [
            Answer(
                text=text,
                answer=self.text_format.answer(text),
                steps=self.text_format.steps(text),
                num_tokens=len(new),
                num_latents=int(dataset.num_latents[row]),
                thoughts=states[row],
            )
            for row, new, text in zip(rows, completions, map(self.text, completions))
        ]

    def with_rows(self, rows: list[dict], source: str = "questions") -> "Probe":
        """The same model with other rows to show it. Raises UserError where they are not well."""
        known = self.inputs
        validation = encode(known.config, known.tokenizer, known.barred, rows, source, cached=False)
        return dataclasses.replace(self, inputs=dataclasses.replace(known, validation=validation))

    def dataset(self, num_latents: int | None) -> StageDataset:
        """As of rows_to_ask."""
        return rows_to_ask(self.inputs, num_latents)

    def prompts(self, dataset: StageDataset, rows: list[int]) -> Batch:
        samples = [dataset.question(row) for row in rows]
        return collate(samples, self.inputs.pad_id, align_end=True)

    @torch.no_grad()
    def complete(
        self, dataset: StageDataset, rows: list[int], replaced: Replacement | None = None
    ) -> list[Tensor]:
        """New tokens of each row, batch_size_eval rows together. With a replacement all rows must
        have the same number of latents."""
        completions = []
        for start, part in self._batches(rows):
            batch = self.prompts(dataset, part).to(self.device)
            with autocast(self.model, self.config.compute_dtype):
                completions += self.model.generate(
                    batch.input_ids,
                    batch.attention_mask,
                    self.config.max_new_tokens,
                    latent_columns=batch.latent_columns,
                    edit_latent=_edit(replaced, start, start + len(part)),
                )
        return completions

    def thoughts(self, dataset: StageDataset, rows: list[int]) -> Tensor:
        """The states fed back (rows, K, D); all rows have the same number K of latents."""
        parts = [self.prompts(dataset, part) for _, part in self._batches(rows)]
        return torch.cat([self.forward(part).latents for part in parts])

    def _batches(self, rows: list[int]) -> list[tuple[int, list[int]]]:
        size = self.config.batch_size_eval
        return [(start, rows[start : start + size]) for start in range(0, len(rows), size)]

    @torch.no_grad()
    def forward(self, batch: Batch, return_logits: bool = False) -> CoconutOutput:
        """All passes, without a loss."""
        arguments = {**batch.to(self.device).inputs(), "labels": None}
        with autocast(self.model, self.config.compute_dtype):
            return self.model(**arguments, return_logits=return_logits)

    def logits(self, batch: Batch) -> Tensor:
        """Of all positions, (B, T, V)."""
        logits = self.forward(batch, return_logits=True).logits
        assert logits is not None
        return logits

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), in float32."""
        with autocast(self.model, self.config.compute_dtype):
            return self.model.base_causallm.get_output_embeddings()(hidden).float()

    def nearest_tokens(self, state: Tensor, count: int = 5) -> list[dict]:
        """The tokens that the head finds most probable for a state (D,), with their probability."""
        best = self.head(state).softmax(-1).topk(count)
        return [
            {"token": self.inputs.tokenizer.decode([token]), "probability": p}
            for token, p in zip(best.indices.tolist(), best.values.tolist())
        ]

    def embeddings(self) -> Tensor:
        """What the tokenizer's tokens that a text may hold read, (tokens, D), in float32."""
        barred = set(self.inputs.barred)
        ids = [token for token in range(len(self.inputs.tokenizer)) if token not in barred]
        return token_embeddings(self.model.base_causallm, ids).float()

    def text(self, tokens: list[int] | Tensor) -> str:
        return decode_completion(self.inputs.tokenizer, tokens)

    def answers(
        self, dataset: StageDataset, rows: list[int], replaced: Replacement | None = None
    ) -> list[str | None]:
        return self.read_answers(self.complete(dataset, rows, replaced))

    def read_answers(self, completions: Sequence[list[int] | Tensor]) -> list[str | None]:
        """The answers of completions; None where there is none."""
        return [self.text_format.answer(self.text(new)) for new in completions]


def rows_to_ask(inputs: Inputs, num_latents: int | None) -> StageDataset:
    """The rows at the checkpoint's stage. Raises UserError where there are none, or they exceed the
    positions."""
    if not len(inputs.validation):
        raise UserError("val_path: there are no rows to ask; give a file with rows")
    dataset = inputs.validation_dataset(inputs.start.epochs_done, num_latents)
    check_prompts([dataset], inputs.config, inputs.hf_config)
    return dataset


def _edit(replaced: Replacement | None, start: int, stop: int) -> EditLatent | None:
    """The replacement of the rows from start to stop."""
    if replaced is None:
        return None
    k, values = replaced
    return lambda column, state: values[start:stop] if column == k else state


# ------------------------------------------------------------------------------- questions


def question_rows(questions: Sequence[str], source: str = "questions") -> list[dict]:
    """Typed questions as rows. Raises UserError."""
    rows = [{"question": q.strip(), "steps": [], "answer": NO_ANSWER} for q in questions]
    return parse_rows(json.dumps(rows), source)


def check_num_latents(config: Config, num_latents: int | None) -> None:
    """Raise UserError where a typed question cannot have this number of latents."""
    if num_latents is not None and num_latents < 0:
        raise UserError(f"num_latents: {num_latents} is below 0")
    if config.method is not Method.COCONUT and num_latents:
        raise UserError(f"num_latents: {num_latents}, but a {config.method.value} model has none")
    by_chain = config.method is Method.COCONUT and not config.pad_latent_to_max
    if by_chain and num_latents is None:
        raise UserError(
            "pad_latent_to_max: False takes the number of latents from the gold chain, and a typed "
            "question has none; set eval_num_latents (in Python: num_latents)"
        )


# ------------------------------------------------------------------------------- loading


def load(path: str | Path, device: str | torch.device | None = None, **keys: Any) -> Probe:
    """The model of a checkpoint, ready to answer questions.

    path: a checkpoint folder of ours or a run folder (its newest one), from which everything is
    known; another model's folder (it has no latents); or a single file, the ancestor's say, with
    model_id, c_thought, max_latent_stage and resume among the keys. keys: config keys that
    replace those of the folder. device: a CUDA GPU where there is one. Raises UserError.
    """
    path = Path(path).expanduser()
    overrides = [as_override(*item) for item in keys.items()]
    overrides.insert(0, "val_path=questions")  # what messages call them
    if path.is_dir() and checkpoint_of(path):
        config = read_config(str(path), *overrides)
    else:
        values = {
            "name": "analysis",
            "save_path": "outputs",
            "only_eval": True,
            "load_model_path": str(path),
            "val_path": "questions",
            "model_id": str(path),
        }
        if not any(method.value in keys for method in Method):
            values["cot" if path.is_dir() else "coconut"] = True
        config = make_config({**values, **keys}, str(path))
    return load_probe(config, rows=[], device=device)


def checkpoint_of(folder: Path) -> Path | None:
    """The folder where it is a checkpoint of ours, its newest one where it is a run's."""
    own = as_checkpoint(folder.resolve())
    checkpoints = find_checkpoints(folder)
    return folder if own else checkpoints[-1].path if checkpoints else None


def read_config(*arguments: str) -> Config:
    """The config of YAML files, a checkpoint or run folder, and KEY=VALUE, for an evaluation.

    A checkpoint brings its own model, tokenizer and settings. Raises UserError."""
    expanded: list[str] = []
    for argument in arguments:
        path = Path(argument).expanduser()
        checkpoint = checkpoint_of(path) if path.is_dir() else None
        if checkpoint is None:
            if path.is_dir():
                raise UserError(f"{argument}: holds no checkpoint_N, and is none")
            if "=" not in argument and not path.exists():
                raise UserError(f"{argument}: no such checkpoint, run folder or YAML file")
            if path.suffix in (".safetensors", ".bin", ".pt") and path.is_file():
                raise UserError(
                    f"{argument}: is a file of weights; give the folder of its checkpoint, or a "
                    "YAML file whose load_model_path it is"
                )
            expanded.append(argument)
            continue
        own: dict[str, Any] = {"load_model_path": str(checkpoint), "resume": None, "debug": False}
        if not (checkpoint / CONFIG_FILE).is_file():  # adapters bring no model
            own |= {"model_id": str(checkpoint), "from_scratch": False, "model_revision": None}
        expanded.append(str(checkpoint / "config.yaml"))
        expanded += [as_override(*item) for item in own.items()]
    config = load_config(*expanded, "skip_validation=False", "only_eval=True")
    # the run folder of a training is no place for anything else
    return dataclasses.replace(config, name=f"{config.name}-analysis")


def load_probe(
    config: Config, rows: list[dict] | None = None, device: str | torch.device | None = None
) -> Probe:
    """The checkpoint of a config. rows: to ask in place of those of val_path."""
    return build_probe(gather_inputs(config, val_rows=rows), device)


def build_probe(inputs: Inputs, device: str | torch.device | None = None) -> Probe:
    """The checkpoint of inputs that were gathered and checked."""
    device = choose_device() if device is None else torch.device(device)
    return Probe(inputs, build_model(inputs).to(device).eval(), device)
