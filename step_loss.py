"""step_loss: the thoughts are taught the steps that they replace, in training only.

Thought k of a row is the c_thought latents that stand in the place of its step k. It stands for

    step k                           where the row is trained without it
    all left out steps from k on     the row's last thought, where more steps than thoughts are gone
    the answer                       where the row has no step k (as in SIM-CoT's code)
    nothing, so it has no label      where step k is still written (latent_growth: all)

head      The model's own head reads the state that is fed back as latent j of a thought; it is to
          be token j of the step, as it would be if the step were written. A step's tokens beyond
          the thought's latents have no label, and neither have latents beyond its tokens. Mean
          over all labels of the optimizer step (LOTUS, arXiv 2606.31779, whose weight is 0.05).
decoder   A copy of the model's blocks, trained beside it and dropped afterwards, is given the
          states of a thought as input embeddings, then the step's tokens, and writes these and eos.
          Summed over the tokens, divided by the number of rows where that thought has a label,
          mean over the thoughts that have any; all of it over the whole optimizer step (SIM-CoT,
          arXiv 2509.20317, weight 1). Embeddings and head are the model's own, where SIM-CoT's
          decoder has a copy of them too; its positions count from 0, theirs from 1. It runs in
          every micro-batch, so that no rank waits for another; an optimizer step without labels
          leaves it and its optimizer state as they are.

Shapes: B rows of a micro-batch, K latent columns, D hidden size, N labels, P thoughts with a label,
W the longest sequence of the decoder, Q all tokens of its sequences.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from coconut import Coconut
from dataset import StageDataset, TensorFields
from utils import Config

WEIGHTS = {"head": 0.05, "decoder": 1.0}  # the published ones
DECODER = "step_decoder"  # its name in the model

# ------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class StepTargets(TensorFields):
    """What the thoughts of a micro-batch are to say. The states that say it are the latents (B, K)
    or, with a decoder, its outputs (P, W), counted as if they were flat."""

    index: Tensor  # (N,) the states that predict a label
    labels: Tensor  # (N,)
    weights: Tensor  # (N,) float64: of each label in the loss
    tokens: Tensor | None = None  # (Q,) that the decoder reads
    sequences: Tensor | None = None  # (P, W) its inputs: of the B * K latents, then the Q tokens


@dataclass(frozen=True)
class Spans:
    """Of some rows, (rows, thoughts) int64: the latents of each thought, the tokens that it stands
    for (0: it has no label), and how many tokens before the row's end these begin."""

    latents: np.ndarray
    lengths: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, data: StageDataset, rows: np.ndarray) -> "Spans":
        encoded, per_step = data.encoded, data.c_thought
        latents, skipped = data.num_latents[rows, None], data.num_skipped[rows, None]
        thoughts = -(-latents // per_step)  # (rows, 1)
        thought = np.arange(thoughts.max())  # (thoughts,)
        step = np.broadcast_to(thought, (len(rows), len(thought)))
        until = np.where(step == thoughts - 1, np.maximum(skipped, step + 1), step + 1)
        # beyond a row's last step only its answer is left
        rest = encoded.steps_from[rows] + encoded.answer_length[rows, None]
        begins, ends = (
            np.take_along_axis(rest, np.minimum(at, rest.shape[1] - 1), 1) for at in (step, until)
        )
        is_answer = step >= encoded.num_steps[rows, None]
        has_label = (step < thoughts) & (is_answer | (step < skipped))
        return cls(
            latents=np.clip(latents - step * per_step, 0, per_step),
            lengths=np.where(has_label, np.where(is_answer, begins, begins - ends), 0),
            begins=begins,
        )

    def weights(self, kind: str) -> np.ndarray:
        """(thoughts,): of each label of a thought, where these are the rows of an optimizer
        step."""
        if kind == "head":
            num_labels = np.minimum(self.latents, self.lengths).sum()
            return np.full(self.lengths.shape[1], 1 / max(num_labels, 1))
        num_rows = (self.lengths > 0).sum(0)
        return (num_rows > 0) / np.maximum(num_rows * (num_rows > 0).sum(), 1)


class _Labelled(NamedTuple):
    """A thought with a label."""

    number: int
    states: np.ndarray  # its latents, flat indices into (B, K)
    said: np.ndarray  # the tokens that it stands for
    eos: int


def _labelled(data: StageDataset, rows: np.ndarray, num_columns: int) -> Iterator[_Labelled]:
    spans = Spans.of(data, rows)
    for place, row in enumerate(rows):
        text = data.encoded.row_tokens(row)
        for number in np.flatnonzero(spans.lengths[place]):
            first = place * num_columns + number * data.c_thought
            states = first + np.arange(spans.latents[place, number])
            begin = len(text) - spans.begins[place, number]
            said = text[begin : begin + spans.lengths[place, number]]
            yield _Labelled(int(number), states, said, text[-1])


def step_targets(
    kind: str, data: StageDataset, step: np.ndarray, rows: np.ndarray, num_columns: int
) -> StepTargets:
    """The labels of a micro-batch with these rows (none: a filler) and latent columns.

    step: the rows of the whole optimizer step. The loss is the weighted sum over all its labels,
    so how it is split into micro-batches and ranks does not change it.
    """
    weights = Spans.of(data, step).weights(kind)
    thoughts = list(_labelled(data, rows, num_columns)) if len(rows) else []
    make = _head_targets if kind == "head" else _decoder_targets
    return make(thoughts, weights, max(len(rows), 1) * num_columns)


def _head_targets(thoughts: list[_Labelled], weights: np.ndarray, _: int) -> StepTargets:
    index = [t.states[: len(t.said)] for t in thoughts]
    labels = [t.said[: len(t.states)] for t in thoughts]
    of_label = [np.full(len(some), weights[t.number]) for t, some in zip(thoughts, labels)]
    return StepTargets(_joined(index), _joined(labels), _joined(of_label, np.float64))


def _decoder_targets(
    thoughts: list[_Labelled], weights: np.ndarray, num_latents: int
) -> StepTargets:
    """num_latents: B * K; the tokens' indices follow theirs."""
    labels = [t.said if t.said[-1] == t.eos else np.append(t.said, t.eos) for t in thoughts]
    # without a thought a sequence that counts for nothing: all ranks run the decoder
    read = [some[:-1] for some in labels] or [np.zeros(1, dtype=np.int64)]
    states = [t.states for t in thoughts] or [np.zeros(0, dtype=np.int64)]
    ends = num_latents + np.cumsum([len(some) for some in read])
    inputs = [
        np.concatenate([its, np.arange(end - len(some), end)])
        for its, some, end in zip(states, read, ends)
    ]
    width = max(map(len, inputs))
    # what is on the right of a sequence may be anything: no position of it sees that
    padded = [np.pad(sequence, (0, width - len(sequence))) for sequence in inputs]
    index = [
        place * width + len(its) - 1 + np.arange(len(some))
        for place, (its, some) in enumerate(zip(states, labels))
    ]
    of_label = [np.full(len(some), weights[t.number]) for t, some in zip(thoughts, labels)]
    return StepTargets(
        index=_joined(index),
        labels=_joined(labels),
        weights=_joined(of_label, np.float64),
        tokens=_joined(read),
        sequences=torch.from_numpy(np.stack(padded)),
    )


def _joined(parts: list[np.ndarray], dtype: type = np.int64) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=dtype), *parts]))


def longest_sequence(data: StageDataset) -> int:
    """The most positions that a decoder needs."""
    spans = Spans.of(data, np.arange(len(data)))
    return int((spans.latents + spans.lengths).max(initial=0))


# ------------------------------------------------------------------------------- the loss


@dataclass(frozen=True)
class StepLoss:
    """The loss of a model's thoughts. weight: in the loss that is trained on."""

    weight: float
    decoder: nn.Module | None  # None: the model's own head

    def __call__(self, model: Coconut, latents: Tensor, targets: StepTargets | None) -> Tensor:
        """(), without the weight; of the latents (B, K, D) that the model's forward returned."""
        assert targets is not None  # this run's batches have them
        states = latents.flatten(0, 1)  # (B * K, D)
        if self.decoder is not None:
            assert targets.tokens is not None
            embeds: Tensor = model.base_causallm.get_input_embeddings()(targets.tokens)  # (Q, D)
            inputs = torch.cat([states, embeds])[targets.sequences]  # (P, W, D)
            states = self._write(model, inputs).flatten(0, 1)  # (P * W, D)
        hidden = states.index_select(0, targets.index)  # (N, D)
        return model.summed_loss(hidden, targets.labels, targets.weights)

    def keep_decoder(self, loss: float) -> None:
        """Before an optimizer step whose step loss is this, on all ranks together: without labels,
        as in stage 0, it is 0, and the decoder has no gradient. With one of zeros AdamW would decay
        its weights and count the step, and its first updates that learn would be too large. The
        embeddings are the model's, which learns."""
        if self.decoder is not None and loss == 0:
            decoder: Any = self.decoder
            shared = {*decoder.get_input_embeddings().parameters()}
            for parameter in {*decoder.parameters()} - shared:
                parameter.grad = None

    def _write(self, model: Coconut, inputs: Tensor) -> Tensor:
        """The decoder's output (P, W, D) for input embeddings."""
        assert self.decoder is not None
        num_sequences, width, _ = inputs.shape
        position_ids = torch.arange(width, device=inputs.device).expand(num_sequences, width)
        # the model's masks: the library's own would wait for the device
        masks = model.attention_masks(torch.ones_like(position_ids), position_ids)
        return self.decoder(
            inputs_embeds=inputs,
            attention_mask=masks.get("all", masks),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state


def add_step_loss(config: Config, model: Coconut) -> StepLoss | None:
    """The step loss of a training, None without one. Its decoder becomes a part of the model, as
    it is trained, sharded and resumed with it; its inputs go through layers of its own, so it
    shares no Passes with the model."""
    if config.step_loss == "none":
        return None
    decoder = None
    if config.step_loss == "decoder":
        base = model.base_causallm
        embeddings = base.get_input_embeddings()
        decoder = copy.deepcopy(base.base_model, {id(embeddings): embeddings})
        model.add_module(DECODER, decoder)
    given = config.step_loss_weight
    return StepLoss(WEIGHTS[config.step_loss] if given is None else given, decoder)
