"""The curriculum: which stage an epoch has, and what a stage makes of a row."""

from collections.abc import Sequence
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
    """Which stage an epoch has, and what a stage does to a row (paper, section 3).

    With c = c_thought, M = max_latent_stage, stage k has, of chains with enough steps,

    latent_growth   last stage   latents        steps skipped
    step            M            k * c          k
    one             M * c        k              k / c, rounded up: a step goes with its first latent
    all             M            M * c          k

    and schedule `paper` one more, with the latents of the last one and no step at all. `one` is
    thus a curriculum of finer stages; epochs_per_stage and advance_at hold for each of them.

    With advance_at the stages of a run's epochs depend on what it learns: they are a part of the
    run, kept in its checkpoints (TrainState.stages), and `stage` is told them.
    """

    method: Method = Method.COCONUT
    schedule: str = "capped"
    epochs_per_stage: int = 2
    max_latent_stage: int = 3
    c_thought: int = 2
    pad_latent_to_max: bool = True
    latent_input: str = "hidden_state"
    latent_growth: str = "step"
    advance_at: float | None = None
    gate_rows: int = 200
    max_epochs_per_stage: int | None = None

    @classmethod
    def from_config(cls, config: Config) -> "Curriculum":
        names = [f.name for f in fields(cls)]
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def last_stage(self) -> int:
        """Schedule `paper` has a stage that keeps the latents of the one before and drops every
        remaining step; schedule `last_stage` has no other."""
        if self.method in (Method.COT, Method.NO_COT):
            return 0
        return self.max_latent_stage * self.stages_per_step + (self.schedule != "capped")

    @property
    def stages_per_step(self) -> int:
        """How many stages it takes to replace a step."""
        return self.c_thought if self.latent_growth == "one" else 1

    def stage(self, epoch: int, stages: Sequence[int] = ()) -> int:
        """Stage of an epoch; epochs count from 1, stages from 0 (epoch 0: nothing is trained).

        stages: those of a run with advance_at, from epoch 1 on as far as they are known; later
        epochs have at least the last of them. Without any, advance_at begins at stage 0 and
        counts each stage as epochs_per_stage epochs, the fewest that it can have.
        """
        if stages and epoch > 0:
            return stages[min(epoch, len(stages)) - 1]
        if self.schedule == "last_stage":
            return self.last_stage
        if self.schedule == "paper" or self.advance_at is not None:
            epoch = max(epoch - 1, 0)
        return min(epoch // self.epochs_per_stage, self.last_stage)

    def next_stage(self, stages: Sequence[int], accuracy: float) -> int:
        """With advance_at: the stage after these of epochs 1, 2, ..., the last of which ended with
        this accuracy on the rows set aside."""
        assert self.advance_at is not None
        stage, spent = stages[-1], stages.count(stages[-1])
        reached = accuracy >= self.advance_at and spent >= self.epochs_per_stage
        at_most = self.max_epochs_per_stage
        forced = at_most is not None and spent >= at_most
        return min(stage + 1, self.last_stage) if reached or forced else stage

    def plan(self, stage: int, num_steps: int) -> Plan:
        """What a stage makes of a row with num_steps steps: the only place that decides it, in
        training and evaluation."""
        if self.method is Method.NO_COT:
            return Plan(num_latents=0, num_skipped=num_steps)
        per_step = self.stages_per_step
        replaced = -(-stage // per_step)  # steps, rounded up
        drops_all = replaced > self.max_latent_stage
        num_skipped = num_steps if drops_all else min(replaced, num_steps)
        if self.method is not Method.COCONUT:
            return Plan(0, num_skipped)
        thoughts = self.max_latent_stage if self.pad_latent_to_max else num_steps
        num_latents = min(thoughts, self.max_latent_stage) * self.c_thought
        if self.latent_growth != "all":
            num_latents = min(num_latents, stage * self.c_thought // per_step)
        return Plan(num_latents, num_skipped)

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

    def describe(self, stage: int) -> str:
        latents, steps = self.summary(stage)
        return f"stage {stage}, {latents} latents, {steps} steps skipped"

    # --------------------------------------------------------------------------- the table

    def table(self, num_epochs: int, stages: Sequence[int] = ()) -> str:
        """The stages of epochs 1 to num_epochs, as text. stages: as of `stage`."""
        lines = ["epochs    stage  latent tokens  steps skipped"]
        if self.advance_at is not None:
            return "\n".join(lines + self._gated_lines(num_epochs, stages))
        first = 1
        for epoch in range(1, num_epochs + 1):
            stage = self.stage(epoch)
            if epoch < num_epochs and self.stage(epoch + 1) == stage:
                continue
            span = f"{first}" if first == epoch else f"{first}-{epoch}"
            if epoch == num_epochs and self.stage(epoch + 1) == stage:
                span = f"{first}+"
            lines.append(self._line(span, stage))
            first = epoch + 1
        if self.schedule == "capped" and self.stage(1) > 0:
            lines.append(
                f"no epoch has stage 0: with epochs_per_stage {self.epochs_per_stage} epoch e has "
                "stage e // epochs_per_stage; schedule paper begins at stage 0"
            )
        return "\n".join(lines)

    def _line(self, span: str, stage: int) -> str:
        latents, steps = self.summary(stage)
        return f"{span:<9} {stage:<6} {latents:<14} {steps}"

    def _gated_lines(self, num_epochs: int, stages: Sequence[int]) -> list[str]:
        """How many epochs each stage has at least and at most, and when the next one begins."""
        least, most = self.epochs_per_stage, self.max_epochs_per_stage
        span = f"{least}+" if most is None else f"{least}" if least == most else f"{least}-{most}"
        lines = [self._line(span, stage) for stage in range(self.last_stage)]
        lines.append(self._line("the rest", self.last_stage))
        known = [f"{stage} from epoch {stages.index(stage) + 1}" for stage in sorted({*stages})]
        if known:
            lines.append(f"so far the run has stage {', '.join(known)} on")
        more = "" if most is None else f", or after {most} epochs"
        lines.append(
            f"epochs counts those of a stage, {num_epochs} in all; the next stage begins at "
            f"{self.advance_at:.1%} on {self.gate_rows} training rows set aside, with the stage's "
            f"own latents{more}"
        )
        stage = max(stages, default=0)
        if most is not None and stage < self.last_stage:
            before = stages.index(stage) if stages else 0  # epochs of the stages before it
            end = max(before + most, len(stages))  # its last epoch; it may have had more than most
            latest = end + most * (self.last_stage - stage - 1) + 1
            late = f": of {num_epochs} epochs the run may not come to it"
            lines.append(
                f"the last stage begins with epoch {latest} at the latest"
                f"{late if latest > num_epochs else ''}"
            )
        return lines
