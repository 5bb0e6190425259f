"""Examples -> samples -> batches. Knows nothing of ranks, wandb or YAML.

Data flow: rows.py (files) -> engine/encoding.py (tokens, cached) -> StageDataset (samples of one
epoch, as curriculum.py has them) -> engine/batches.py (rows of a step) -> collate (tensors).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import datasets
import numpy as np
import torch
from torch import Tensor

from curriculum import Curriculum
from utils import Config, UserError, derive_seed

IGNORED = -100  # label of a position without loss


class LatentTokens(NamedTuple):
    """Ids of the markers, in the order of coconut.add_latent_tokens."""

    start: int
    latent: int
    end: int


@dataclass
class Encoded:
    """Encoded rows: tokens memory-mapped, lengths in memory.

    tokens: of all rows of the file. num_steps, question_length, answer_length: (rows,) int64.
    steps_from: (rows, most steps + 1) int64, tokens of the steps from the k-th on. numbers: (rows,)
    int64, of the rows in their file. fingerprint: of the file's rows and the tokenizer.
    """

    rows: list[dict]
    fingerprint: str
    tokens: datasets.Dataset
    num_steps: np.ndarray
    question_length: np.ndarray
    answer_length: np.ndarray
    steps_from: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.num_steps)

    @classmethod
    def nothing(cls) -> "Encoded":
        """No rows, where a run needs none."""
        none = np.zeros(0, dtype=np.int64)
        tokens = datasets.Dataset.from_dict({"tokens": []})
        return cls([], "", tokens, none, none, none, none.reshape(0, 1), none)

    def select(self, rows: np.ndarray) -> "Encoded":
        """Some of the rows, in this order."""
        return Encoded(
            rows=[self.rows[row] for row in rows],
            fingerprint=self.fingerprint,
            tokens=self.tokens,
            num_steps=self.num_steps[rows],
            question_length=self.question_length[rows],
            answer_length=self.answer_length[rows],
            steps_from=self.steps_from[rows],
            numbers=self.numbers[rows],
        )

    def row_tokens(self, row: int) -> np.ndarray:
        """The whole row, (length,) int64: question, all steps, answer, eos. Read from the Arrow
        table, as Dataset's own indexing takes over ten times as long for a single row."""
        column = self.tokens.data.column("tokens")
        return column[int(self.numbers[row])].values.to_numpy().astype(np.int64)


# ------------------------------------------------------------------------------- samples


class Sample(NamedTuple):
    row: int
    input_ids: np.ndarray  # (length,) int64
    labels: np.ndarray  # (length,) int64
    first_latent: int  # position of the first latent, or where it would be
    num_fed_back: int  # latents from there on that take the hidden state; pauses do not


class StageDataset:
    """The samples of all rows at one stage, made when asked for.

    Arrays over all rows, (rows,) int64: stages, num_latents, num_skipped, prefix_length (all
    before the first latent), total_length, num_labels.
    """

    def __init__(
        self,
        encoded: Encoded,
        curriculum: Curriculum,
        tokens: LatentTokens | None,
        stage: int,
        *,
        num_latents: int | None = None,
        uniform_prob: float = 0.0,
        stage_mixing: str = "none",
        seed: int = 0,
        epoch: int = 0,
    ):
        """tokens: the markers (coconut only). num_latents: force this number on every row.

        With probability uniform_prob a row is put at a random stage of its own chain. stage_mixing
        puts every row at a stage from 0 to this one, all of them alike (uniform) or stage i with a
        probability that goes by i + 1 (linear). The draws depend on (seed, epoch, row) only.
        """
        self.encoded, self.tokens = encoded, tokens
        self.pauses, self.c_thought = curriculum.latent_input == "pause", curriculum.c_thought
        num_steps = encoded.num_steps
        self.stages = np.full(len(encoded), stage, dtype=np.int64)
        if uniform_prob:
            rng = np.random.default_rng(derive_seed(seed, "stage", epoch))
            draws = rng.random((len(encoded), 2))
            count = num_steps * curriculum.stages_per_step + 1
            random_stage = (draws[:, 1] * count).astype(np.int64)
            self.stages = np.where(draws[:, 0] < uniform_prob, random_stage, self.stages)
        if stage_mixing != "none":
            weights = np.ones(stage + 1) if stage_mixing == "uniform" else np.arange(1, stage + 2)
            rng = np.random.default_rng(derive_seed(seed, "mixing", epoch))
            upto = np.cumsum(weights)  # of stage i the draws below upto[i]
            draws = rng.random(len(encoded)) * upto[-1]
            self.stages = np.searchsorted(upto, draws, side="right").astype(np.int64)
        self.num_latents, self.num_skipped = curriculum.plans(self.stages, num_steps)
        if num_latents is not None:
            self.num_latents = np.full(len(encoded), num_latents, dtype=np.int64)
        markers = 0 if tokens is None else 2
        rest = encoded.steps_from[np.arange(len(encoded)), self.num_skipped]
        self.num_labels = rest + encoded.answer_length
        self.prefix_length = encoded.question_length + markers // 2
        self.total_length = encoded.question_length + markers + self.num_latents + self.num_labels

    def __len__(self) -> int:
        return len(self.encoded)

    def _prompt(self, row: int, tokens: np.ndarray) -> np.ndarray:
        question = tokens[: self.encoded.question_length[row]]
        if self.tokens is None:
            return question
        start, latent, end = self.tokens
        middle = [start] + [latent] * int(self.num_latents[row]) + [end]
        return np.concatenate([question, np.array(middle, dtype=np.int64)])

    def __getitem__(self, row: int) -> Sample:
        """question, latents between their markers, remaining steps, answer, eos."""
        tokens = self.encoded.row_tokens(row)
        prompt = self._prompt(row, tokens)
        written = tokens[len(tokens) - self.num_labels[row] :]
        labels = np.concatenate([np.full(len(prompt), IGNORED), written])
        return self._sample(row, np.concatenate([prompt, written]), labels)

    def question(self, row: int) -> Sample:
        """What the model sees before it writes: question and latents."""
        prompt = self._prompt(row, self.encoded.row_tokens(row))
        return self._sample(row, prompt, np.full(len(prompt), IGNORED))

    def _sample(self, row: int, input_ids: np.ndarray, labels: np.ndarray) -> Sample:
        fed_back = 0 if self.pauses else int(self.num_latents[row])
        return Sample(int(row), input_ids, labels, int(self.prefix_length[row]), fed_back)


def set_aside(
    rows: Encoded, curriculum: Curriculum, tokens: LatentTokens | None, config: Config
) -> tuple[Encoded, Encoded, int]:
    """The rows to train on, with advance_at those that only its gate sees, drawn by the seed, and
    how many others ask the same as these. Raises UserError where none are left to train on.

    The gate has a row of each question that it draws, and the others are in neither: it would
    measure what was learned by heart. Nor are rows longer than max_seq_length at any stage: every
    epoch has the same number of steps, whenever the stages begin, or the learning rate schedule
    would have no end.
    """
    if config.advance_at is None or not len(rows):
        return rows, Encoded.nothing(), 0
    stages = range(curriculum.last_stage + 1)
    lengths = [StageDataset(rows, curriculum, tokens, stage).total_length for stage in stages]
    usable = np.flatnonzero(np.max(lengths, axis=0) <= config.max_seq_length)
    rng = np.random.default_rng(derive_seed(config.seed, "gate"))
    by_question: dict[str, list[int]] = {}
    for row in rng.permutation(usable).tolist():
        by_question.setdefault(rows.rows[row]["question"], []).append(row)
    if not by_question:
        raise UserError(
            f"max_seq_length: all rows of {config.train_path} are longer than "
            f"{config.max_seq_length} tokens at a stage"
        )
    if len(by_question) <= config.gate_rows:
        raise UserError(
            f"gate_rows: {config.gate_rows} set aside leave none of the {len(by_question)} rows of "
            f"{config.train_path} with different questions that are at most max_seq_length "
            f"({config.max_seq_length}) long; set fewer aside"
        )
    questions = list(by_question.values())
    gate = [same[0] for same in questions[: config.gate_rows]]
    train = [row for same in questions[config.gate_rows :] for row in same]
    copies = len(usable) - len(gate) - len(train)
    return rows.select(np.sort(train)), rows.select(np.sort(gate)), copies


# ------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class TensorFields:
    """Tensors that go to the device together, those of fields of this kind included."""

    def to(self, device: torch.device) -> Self:
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """What DataLoader(pin_memory=True) calls."""
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, TensorFields):
                changed[name] = value._each_tensor(change)
        return replace(self, **changed)


@dataclass(frozen=True)
class Batch(TensorFields):
    """Tensors (B, T) of padded samples, and what Coconut.forward would else have to read from
    them on the device."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    label_index: Tensor  # (N,) flat indices of the positions whose next token has a label
    latent_columns: tuple[int, int]  # the first with a latent and the one after the last

    def inputs(self) -> dict:
        """The arguments of Coconut.forward by name."""
        return {f.name: getattr(self, f.name) for f in fields(Batch)}


def collate(samples: list[Sample], pad_id: int, align_end: bool = False) -> Batch:
    """Pad samples to tensors (B, T), first latents in one column:

        question question <latent> <latent> rest
              -- question <latent> rest     ----

    align_end: pad on the left only, so that all rows end in the last column (generation).
    """
    lengths = np.array([len(s.input_ids) for s in samples])
    first = np.array([s.first_latent for s in samples])
    has_latents = np.array([s.num_fed_back > 0 for s in samples])
    if align_end:
        left = lengths.max() - lengths
    elif has_latents.any():  # rows without latents need no room on the left
        left = np.where(has_latents, first[has_latents].max() - first, 0)
    else:
        left = np.zeros_like(lengths)
    shape = (len(samples), (left + lengths).max())
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for i, sample in enumerate(samples):
        at = slice(left[i], left[i] + lengths[i])
        input_ids[i, at], labels[i, at], attention_mask[i, at] = sample.input_ids, sample.labels, 1
    starts = (left + first)[has_latents]
    stops = starts + np.array([s.num_fed_back for s in samples])[has_latents]
    label_index = np.flatnonzero(np.pad(labels[:, 1:] != IGNORED, ((0, 0), (0, 1))))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        position_ids=torch.from_numpy(np.maximum(attention_mask.cumsum(-1) - 1, 0)),
        labels=torch.from_numpy(labels),
        label_index=torch.from_numpy(label_index),
        latent_columns=(int(starts.min()), int(stops.max())) if len(starts) else (0, 0),
    )
