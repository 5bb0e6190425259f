"""The gate between two stages: with advance_at the next one begins when a run can do this one."""

from coconut import Coconut
from curriculum import Curriculum
from dataset import StageDataset
from engine.checkpoint import TrainState
from engine.distributed import broadcast_object
from engine.evaluation import Evaluator
from engine.logs import Metrics
from utils import log


def decide_next_stage(
    model: Coconut,
    dataset: StageDataset,
    curriculum: Curriculum,
    evaluator: Evaluator,
    state: TrainState,
    metrics: Metrics,
) -> None:
    """Add the stage of the next epoch to the state, on all ranks alike.

    dataset: the rows set aside, at the stage of the newest epoch; the model answers them as those
    of a validation. At the last stage there is nothing to decide, and nothing is run.
    """
    epoch, stage = len(state.stages), state.stages[-1]
    next_stage = stage
    if stage < curriculum.last_stage:
        outcome = evaluator.evaluate(model, dataset)
        if outcome is not None:  # on the main process
            accuracy, rows = outcome[0].accuracy, outcome[0].rows
            next_stage = curriculum.next_stage(state.stages, accuracy)
            metrics.write(
                kind="gate",
                epoch=epoch,
                stage=stage,
                global_step=state.global_step,
                accuracy=accuracy,
                rows=rows,
                next_stage=next_stage,
            )
            log.info(
                f"epoch {epoch}, stage {stage}: accuracy {accuracy:.1%} of the {rows} rows set "
                f"aside (advance_at {curriculum.advance_at:.1%}), epoch {epoch + 1}: stage "
                f"{next_stage}"
            )
    state.stages.append(broadcast_object(next_stage))
