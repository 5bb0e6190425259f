"""Evaluation of a checkpoint (only_eval), on the rows of val_path or on several sets in one run."""

import dataclasses
import json
from typing import Any

from coconut import Coconut
from engine.evaluation import Evaluation, Evaluator, evaluate_epoch, part_of_evaluation, table
from engine.inputs import Inputs
from engine.logs import Metrics
from engine.partial import PartialResults, state_of_weights
from engine.results import results_name, write_table
from engine.sampling import Sampling
from utils import log

# keys that no result depends on, and those that the parts of the evaluation and the weights tell
FREE_KEYS = (
    "name",
    "save_path",
    "project",
    "num_workers",
    "batch_size_eval",
    "load_model_path",
    "val_path",
    "eval_sets",
    "eval_num_latents",
)


def evaluate_checkpoint(
    model: Coconut, inputs: Inputs, evaluator: Evaluator, metrics: Metrics, growing: tuple[str, ...]
) -> None:
    """Evaluate on every set with each number of latents, with samples where the config asks for
    them; one table of all. A run that was killed goes on where it stopped.

    growing: files of the run folder that are appended to.
    """
    config, epoch, source = inputs.config, inputs.start.epochs_done, inputs.start.source
    assert source is not None  # only_eval has a checkpoint
    stage = inputs.stage(epoch)
    evaluator = dataclasses.replace(evaluator, sampling=Sampling.from_config(config))
    sets = {
        name: {
            number: inputs.validation_dataset(epoch, number, eval_set=name)
            for number in config.forced_latents
        }
        for name in inputs.eval_sets or [None]
    }
    parts = [
        part_of_evaluation(name, *pair)
        for name, by_number in sets.items()
        for pair in by_number.items()
    ]
    partial = PartialResults(config.run_dir, evaluator.world, _identity(inputs, parts), growing)
    about = {"checkpoint": str(source.resolve()), "max_new_tokens": config.max_new_tokens}
    if evaluator.sampling is not None:
        about |= dataclasses.asdict(evaluator.sampling)
    found: list[tuple[str, int | None, Evaluation]] = []
    for name, datasets in sets.items():
        evaluations = evaluate_epoch(
            model,
            datasets,
            evaluator,
            config.run_dir,
            metrics,
            epoch=epoch,
            stage=stage,
            eval_set=name,
            about={**about, "data": config.rows_of(name)},
            partial=partial,
        )
        found += [(str(name), *pair) for pair in zip(datasets, evaluations)]
    if inputs.eval_sets and found:  # on the main process
        _write_tables(inputs, stage, found)
    partial.remove()


def _write_tables(
    inputs: Inputs, stage: int, found: list[tuple[str, int | None, Evaluation]]
) -> None:
    """All figures: eval_sets_epoch_N.md to read, .json to compute with."""
    config, epoch = inputs.config, inputs.start.epochs_done
    text = table([evaluation for _, _, evaluation in found], [name for name, _, _ in found])
    log.info(f"epoch {epoch}, stage {stage}:\n{text}")
    path = config.run_dir / f"eval_sets_epoch_{epoch}.md"
    write_table(path, text)
    figures = {
        "checkpoint": str(inputs.start.source),
        "epoch": epoch,
        "stage": stage,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": config.seed,
        "evaluations": [
            {
                "eval_set": name,
                "path": config.rows_of(name),
                "forced_latents": number,
                "results": f"{results_name(epoch, number, name)}.jsonl",
                **evaluation.record(),
            }
            for name, number, evaluation in found
        ],
    }
    write_table(path.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")


def _identity(inputs: Inputs, parts: list[str]) -> dict[str, Any]:
    """What the results of an evaluation depend on."""
    config = dataclasses.asdict(inputs.config)
    path = inputs.start.source
    assert path is not None  # only_eval has a checkpoint
    return {
        "config": {name: value for name, value in config.items() if name not in FREE_KEYS},
        "epoch": inputs.start.epochs_done,
        "weights": state_of_weights(path),
        "parts": parts,
    }
