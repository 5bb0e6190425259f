"""The curriculum: which stage an epoch has, and what a stage makes of a row."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from utils import Config, Method


class Plan(NamedTuple):
    """What a stage makes of a row."""

    num_latents: int
    num_skipped: int  # leading steps that the row is trained without


@dataclass(frozen=True)
class Curriculum:
    """Which stage an epoch has, and what a stage does to a row (paper, section 3)."""

    method: Method = Method.COCONUT
    schedule: str = "capped"
    epochs_per_stage: int = 2
    max_latent_stage: int = 3
    c_thought: int = 2
    pad_latent_to_max: bool = True
    latent_input: str = "hidden_state"

    @classmethod
    def from_config(cls, config: Config) -> "Curriculum":
        names = [f.name for f in fields(cls)]
        return cls(**{name: getattr(config, name) for name in names})

    def stage(self, epoch: int) -> int:
        """Stage of an epoch; epochs count from 1, stages from 0 (epoch 0: nothing is trained).

        Stage max_latent_stage + 1 (schedule `paper`) keeps the latents of the stage before and
        drops every remaining step; schedule `last_stage` has no other.
        """
        if self.method in (Method.COT, Method.NO_COT):
            return 0
        if self.schedule == "last_stage":
            return self.max_latent_stage + 1
        if self.schedule == "paper":
            return min(max(epoch - 1, 0) // self.epochs_per_stage, self.max_latent_stage + 1)
        return min(epoch // self.epochs_per_stage, self.max_latent_stage)

    def plan(self, stage: int, num_steps: int) -> Plan:
        """What a stage makes of a row with num_steps steps: the only place that decides it, in
        training and evaluation."""
        if self.method is Method.NO_COT:
            return Plan(num_latents=0, num_skipped=num_steps)
        drops_all = stage > self.max_latent_stage
        num_skipped = num_steps if drops_all else min(stage, num_steps)
        if self.method is not Method.COCONUT:
            return Plan(0, num_skipped)
        thoughts = min(stage, self.max_latent_stage)
        if not self.pad_latent_to_max:
            thoughts = min(thoughts, num_steps)
        return Plan(thoughts * self.c_thought, num_skipped)

    def plans(self, stages: np.ndarray, num_steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """plan() of many rows, (rows,) int64 each: looked up in a table of all that can occur."""
        table = [
            [self.plan(stage, count) for count in range(num_steps.max() + 1)]
            for stage in range(stages.max() + 1)
        ]
        plans = np.array(table, dtype=np.int64)[stages, num_steps]  # (rows, 2)
        return plans[:, 0], plans[:, 1]

    def summary(self, stage: int) -> tuple[int, str]:
        """The latents of a stage and how many steps it skips, of chains that have enough."""
        enough = self.max_latent_stage + 1
        num_latents, num_skipped = self.plan(stage, enough)
        return num_latents, "all" if num_skipped == enough else str(num_skipped)

    def table(self, num_epochs: int) -> str:
        """The stages of epochs 1 to num_epochs, as text."""
        lines = ["epochs    stage  latent tokens  steps skipped"]
        first = 1
        for epoch in range(1, num_epochs + 1):
            stage = self.stage(epoch)
            if epoch < num_epochs and self.stage(epoch + 1) == stage:
                continue
            span = f"{first}" if first == epoch else f"{first}-{epoch}"
            if epoch == num_epochs and self.stage(epoch + 1) == stage:
                span = f"{first}+"
            latents, steps = self.summary(stage)
            lines.append(f"{span:<9} {stage:<6} {latents:<14} {steps}")
            first = epoch + 1
        if self.schedule == "capped" and self.stage(1) > 0:
            lines.append(
                f"no epoch has stage 0: with epochs_per_stage {self.epochs_per_stage} epoch e has "
                "stage e // epochs_per_stage; schedule paper begins at stage 0"
            )
        return "\n".join(lines)
