"""All that is known before a run, as one frozen object."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from curriculum import Curriculum
from dataset import Encoded, LatentTokens, StageDataset
from engine.adapters import Adapters
from engine.batches import plan_steps
from engine.start import Start
from engine.text import TextFormat
from utils import Config


def text_format(config: Config) -> TextFormat:
    return TextFormat(config.answer_marker, config.answer_kind)


def barred_tokens(
    tokenizer: PreTrainedTokenizerBase, markers: LatentTokens | None, hf_config: PreTrainedConfig
) -> list[int]:
    """Tokens that no text may hold: the markers, and those that the model has no row for.
    hf_config: the model's own, as the table of a checkpoint may have grown."""
    known = list(markers or ())
    return known + [n for n in range(hf_config.vocab_size, len(tokenizer)) if n not in known]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that is known before anything runs: read, checked and complete."""

    config: Config
    start: Start
    hf_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    latent_tokens: LatentTokens | None  # None for the methods without markers
    barred: list[int]  # barred_tokens()
    marker_init_id: int | None  # the token that new markers start from; None: none are new
    adapters: Adapters | None  # None: whole weights
    curriculum: Curriculum
    train: Encoded  # no rows where only_eval
    gate: Encoded  # rows of train_path that are not trained on; none without advance_at
    copies: int  # rows of train_path in neither, as their question is one of the gate's
    too_long: int  # rows of train_path in neither, as they are longer than max_seq_length
    validation: Encoded  # no rows where skip_validation, or eval_sets
    eval_sets: dict[str, Encoded] = field(default_factory=dict)  # by name

    @property
    def pad_id(self) -> int:
        # masked everywhere, so any token serves where a tokenizer names none (GPT-2), or one that
        # the model has no row for
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return eos if pad is None or pad in self.barred else pad

    @property
    def whole_source(self) -> Path | None:
        """The checkpoint of whole weights, adapters apart; None: those of model_id."""
        return self.start.source if self.adapters is None else self.adapters.base_path

    @property
    def new_markers(self) -> bool:
        known = self.adapters is not None and self.adapters.knows_markers
        return self.marker_init_id is not None and not known

    @property
    def text_format(self) -> TextFormat:
        return text_format(self.config)

    def stage(self, epoch: int) -> int:
        """Of an epoch, as far as it is known before the run."""
        return self.curriculum.stage(epoch, self.start.stages)

    @property
    def first_stages(self) -> list[int]:
        """Those of epochs 1 to the first that the run ever runs: with advance_at a new training
        has them in its state."""
        return [self.stage(epoch) for epoch in range(1, self.start.first_epoch + 1)]

    def train_dataset(self, epoch: int, stage: int | None = None) -> StageDataset:
        """stage: of the epoch; None: as it is known before the run."""
        draws = dict(uniform_prob=self.config.uniform_prob, stage_mixing=self.config.stage_mixing)
        return self._stage_dataset(self.train, epoch, stage, **draws)

    def gate_dataset(self, epoch: int, stage: int) -> StageDataset:
        return self._stage_dataset(self.gate, epoch, stage)

    def validation_dataset(
        self,
        epoch: int,
        num_latents: int | None = None,
        stage: int | None = None,
        eval_set: str | None = None,
    ) -> StageDataset:
        """eval_set: the name of one of eval_sets; None: the rows of val_path."""
        rows = self.validation if eval_set is None else self.eval_sets[eval_set]
        return self._stage_dataset(rows, epoch, stage, num_latents=num_latents)

    def _stage_dataset(
        self, encoded: Encoded, epoch: int, stage: int | None, **more: Any
    ) -> StageDataset:
        stage, seed = self.stage(epoch) if stage is None else stage, self.config.seed
        return StageDataset(
            encoded, self.curriculum, self.latent_tokens, stage, seed=seed, epoch=epoch, **more
        )

    def plan_epoch(
        self, dataset: StageDataset, epoch: int, num_processes: int
    ) -> tuple[list[np.ndarray], int]:
        """The rows of every optimizer step of an epoch, and the number of rows left out."""
        config = self.config
        steps, dropped = plan_steps(
            dataset,
            rows_per_step=config.step_rows(num_processes),
            max_length=config.max_seq_length,
            seed=config.seed,
            epoch=epoch,
            group_by_length=config.group_by_length,
        )
        return steps, dropped + self.too_long
