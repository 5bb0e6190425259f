"""The training loop: epochs, optimizer steps, validation, checkpoints."""

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from coconut import Coconut
from dataset import StageDataset
from engine.batches import MicroBatch, MicroBatches
from engine.checkpoint import (
    TrainState,
    find_checkpoints,
    load_optimizer,
    prune_checkpoints,
    save_checkpoint,
)
from engine.curve import LiveCurve
from engine.distributed import (
    World,
    autocast,
    backward,
    end_of_backward,
    gradient_norm,
    shard,
    sum_over_ranks,
)
from engine.evaluation import Evaluator, evaluate_epoch
from engine.files import write_whole
from engine.gate import decide_next_stage
from engine.health import Thoughts, warn_of_collapse
from engine.inputs import Inputs
from engine.logs import Metrics, step_bar
from engine.optimizer import build_optimizer, build_scheduler, reset_moments, set_rate
from engine.start import forget_best
from engine.stop import Stop, Stopped, serve_until_the_end
from step_loss import StepLoss, add_step_loss
from utils import Config, UserError, derive_seed, log

SHARED_MEMORY, SHARED_BYTES = Path("/dev/shm"), 32 * 2**20  # of the batches that workers hand over
GROWING_FILES = ("metrics.jsonl", "validation_examples.txt")


@dataclass
class Training:
    """What changes while training."""

    model: Coconut
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    state: TrainState
    step_loss: StepLoss | None = None


@dataclass
class Step:
    """The rows of an optimizer step, and what its micro-batches add up to: on this rank, and after
    optimizer_step on all of them."""

    rows: np.ndarray  # on all ranks, as train_path numbers them
    loss: torch.Tensor | float = 0.0  # stays on the device, as the next one
    step_loss: torch.Tensor | float = 0.0  # without its weight
    positions: float = 0  # padding included
    waiting: float = 0.0  # seconds for the micro-batches, on this rank


def start_training(inputs: Inputs, model: Coconut, world: World) -> Training:
    """A new training, or the one that a checkpoint holds. Moves the model to the device, sharded
    over the processes."""
    config, resume = inputs.config, inputs.start.resume
    if config.gradient_checkpointing:
        model.checkpoint_activations(config.gradient_checkpointing)
    step_loss = add_step_loss(config, model)
    shard(model, config.compute_dtype, world)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, count_steps(inputs, world))
    if resume is None:
        step_rows = config.step_rows(world.world_size)
        state = TrainState(inputs.train.fingerprint, step_rows, inputs.start.first_epoch)
        if config.advance_at is not None:
            state.stages = inputs.first_stages
    else:
        state = resume.state()
        state.first_epoch = inputs.start.first_epoch
        if resume.has_optimizer:
            load_optimizer(resume, model, optimizer)
            scheduler.load_state_dict(state.scheduler)
            set_rate(scheduler)
        saved = resume.config()
        if saved.num_epochs != config.num_epochs and config.lr_schedule != "constant":
            log.warning(
                f"num_epochs: {config.num_epochs}, but {resume.path} was trained with "
                f"{saved.num_epochs}: the {config.lr_schedule} rate goes on as for the new number"
            )
        forget_best(state, config, saved)
    return Training(model, optimizer, scheduler, state, step_loss)


def count_steps(inputs: Inputs, world: World) -> int:
    """Optimizer steps of the whole run, from the first epoch that it ever ran."""
    total = 0
    for epoch in range(inputs.start.first_epoch, inputs.config.num_epochs + 1):
        dataset = inputs.train_dataset(epoch)
        total += len(inputs.plan_epoch(dataset, epoch, world.world_size)[0])
    return total


def check_rows_per_step(inputs: Inputs, world: World) -> None:
    """Raise UserError where an optimizer step cannot be divided among the processes, or the run
    goes on with another number of rows in it."""
    resume, config, count = inputs.start.resume, inputs.config, world.world_size
    ours = config.step_rows(count)
    if not config.only_eval and ours % count:
        good = [number for number in range(1, 65) if ours % number == 0]
        raise UserError(
            f"rows_per_step: {ours} rows cannot be divided among {count} processes; start "
            f"{', '.join(map(str, good))} processes, or change it"
        )
    if resume and resume.state().rows_per_step != ours:
        product = (
            f" (batch_size_training {config.batch_size_training} x gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} x {count} processes)"
        )
        raise UserError(
            f"{resume.path} was trained with {resume.state().rows_per_step} rows per step, this "
            f"run has {ours}{product if config.rows_per_step is None else ''}; set "
            f"rows_per_step={resume.state().rows_per_step}"
        )


# ------------------------------------------------------------------------------- training


def train(training: Training, inputs: Inputs, world: World, metrics: Metrics, stop: Stop) -> None:
    """All epochs that are left. Raises Stopped after a signal and a save."""
    config, curriculum, resume = inputs.config, inputs.curriculum, inputs.start.resume
    stages = training.state.stages  # grows with every epoch
    curve = LiveCurve(config.run_dir, wanted=world.is_main and not config.debug)
    if resume and resume.step is None:
        if not training.state.evaluated:
            validate(training, inputs, world, metrics, resume.epoch)
        curve.draw_unless_newer(resume.path / "state.json")
    for epoch in range(inputs.start.epochs_done + 1, config.num_epochs + 1):
        first_step = (resume.step or 0) if resume and resume.epoch == epoch else 0
        changed = curriculum.stage(epoch, stages) != curriculum.stage(epoch - 1, stages)
        reset = changed if config.reset_optimizer is True else config.reset_optimizer == "epoch"
        if reset and first_step == 0:
            reset_moments(training.optimizer)  # the learning rate schedule goes on
        stop.all_saved = False
        train_epoch(training, inputs, world, metrics, stop, epoch, first_step)
        save(training, inputs, world, epoch)
        stop.saved()
        validate(training, inputs, world, metrics, epoch)
        curve.draw(at_end=epoch == config.num_epochs)


def train_epoch(
    training: Training,
    inputs: Inputs,
    world: World,
    metrics: Metrics,
    stop: Stop,
    epoch: int,
    first_step: int,
) -> None:
    """One epoch from an optimizer step on."""
    config, state, model = inputs.config, training.state, training.model
    stage = inputs.curriculum.stage(epoch, state.stages)
    dataset = inputs.train_dataset(epoch, stage)
    steps, dropped = inputs.plan_epoch(dataset, epoch, world.world_size)
    log.info(
        f"epoch {epoch}: {inputs.curriculum.describe(stage)}, {len(steps)} steps, "
        f"{dropped} rows longer than max_seq_length dropped"
    )
    model.train()
    batches = micro_batches(dataset, steps[first_step:], world, config, inputs.pad_id)
    bar = step_bar(epoch, first_step, len(steps), world)
    for number, rows in enumerate(steps[first_step:], start=first_step + 1):
        began, step = time.perf_counter(), Step(dataset.encoded.numbers[rows])
        # of dropout: depends on nothing that ran before
        torch.manual_seed(derive_seed(config.seed, "step", state.global_step, world.rank))
        for batch in fetch(batches, step):
            forward_backward(model, batch, world, config.compute_dtype, step, training.step_loss)
        figures = optimizer_step(training, config, world, stop, step)
        seconds = time.perf_counter() - began
        metrics.write(
            kind="train",
            epoch=epoch,
            stage=stage,
            step=number,
            **figures,
            labelled_tokens=int(dataset.num_labels[rows].sum()),
            positions_per_token=step.positions / int(dataset.total_length[rows].sum()),
            seconds=seconds,
            waiting=step.waiting / seconds,
        )
        bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
        bar.update()
        if number == len(steps):  # train() saves at the end of the epoch
            break
        if stop.agreed or (config.save_every_steps and number % config.save_every_steps == 0):
            save(training, inputs, world, epoch, number)
        if stop.agreed:
            raise Stopped
    bar.close()


def fetch(batches: Iterator[list[MicroBatch]], step: Step) -> list[MicroBatch]:
    """The micro-batches of one optimizer step; counts the seconds waited for them."""
    start = time.perf_counter()
    of_step = next(batches)
    step.waiting += time.perf_counter() - start
    return of_step


def forward_backward(
    model: Coconut,
    batch: MicroBatch,
    world: World,
    compute_dtype: torch.dtype,
    step: Step,
    step_loss: StepLoss | None = None,
) -> None:
    """Add the gradients of a micro-batch, and to the step what it reports."""
    batch, decoder = batch.to(world.device), None
    with autocast(model, compute_dtype):
        output = model(**batch.inputs(), num_items_in_batch=batch.num_items_in_batch)
        loss = output.loss
        if step_loss is not None:
            of_thoughts = step_loss(model, output.latents, batch.targets)
            step.step_loss += of_thoughts.detach()
            loss, decoder = loss + step_loss.weight * of_thoughts, step_loss.decoder
    # FSDP takes the mean over the ranks; the loss is normalised over all of them already
    backward(model, loss * world.world_size, output.prefix_hidden, batch.last, after=decoder)
    step.loss += output.loss.detach()
    step.positions += batch.input_ids.numel()


def optimizer_step(
    training: Training, config: Config, world: World, stop: Stop, step: Step
) -> dict[str, float]:
    """Update the weights with the gradients of a whole step; the step's figures.

    A step whose loss or gradient is not finite is skipped, on all ranks alike.
    """
    model, optimizer, state = training.model, training.optimizer, training.state
    end_of_backward(model)
    norm = gradient_norm(model, config.max_grad_norm)
    sums = [float(step.loss), float(step.step_loss), step.positions, stop.requested]
    loss, of_thoughts, positions, requests = sum_over_ranks(sums, world.device)
    step.loss, step.positions, stop.agreed = loss, positions, requests > 0
    lr = float(training.scheduler.get_last_lr()[0])
    if math.isfinite(loss) and math.isfinite(of_thoughts) and math.isfinite(norm):
        state.bad_steps_in_a_row = 0
    else:
        rows = sorted(step.rows.tolist())
        skip_bad_step(state, config, f"loss {loss}, gradient norm {norm}, rows {rows}")
        optimizer.zero_grad()  # what has no gradient is not updated; the schedule goes on
    if training.step_loss is not None:
        training.step_loss.keep_decoder(of_thoughts)
    optimizer.step()
    optimizer.zero_grad()
    training.scheduler.step()
    state.global_step += 1
    state.samples_seen += len(step.rows)
    return {
        "global_step": state.global_step,
        "samples_seen": state.samples_seen,
        "loss": loss,
        **({} if training.step_loss is None else {"step_loss": of_thoughts}),
        "grad_norm": norm,
        "lr": lr,
        "bad_steps": state.bad_steps,
    }


def skip_bad_step(state: TrainState, config: Config, what: str) -> None:
    """Count a step that is not finite. Raises RuntimeError after max_bad_steps in a row."""
    state.bad_steps += 1
    state.bad_steps_in_a_row += 1
    log.warning(f"optimizer step {state.global_step + 1} skipped: {what}")
    if state.bad_steps_in_a_row >= config.max_bad_steps:
        raise RuntimeError(
            f"{config.max_bad_steps} optimizer steps in a row were not finite (max_bad_steps); the "
            "last checkpoint is intact: set max_grad_norm, or begin another run with a lower lr"
        )


def micro_batches(
    dataset: StageDataset, steps: list[np.ndarray], world: World, config: Config, pad_id: int
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches, step by step."""
    batches = MicroBatches(
        dataset,
        steps,
        num_ranks=world.world_size,
        rank=world.rank,
        batch_size=config.batch_size_training,
        max_positions=config.tokens_per_micro_batch,
        pad_id=pad_id,
        step_loss=config.step_loss,
    )
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=usable_workers(config.num_workers),
        worker_init_fn=serve_until_the_end,
        pin_memory=world.device.type == "cuda",
    )
    return iter(loader)


@cache
def usable_workers(num_workers: int) -> int:
    """num_workers or, with a line that says so, 0 where processes cannot share memory: containers
    have a small /dev/shm, or none."""
    if num_workers == 0:
        return 0
    try:
        torch.zeros(1).share_memory_()
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else SHARED_BYTES
        if free >= SHARED_BYTES:
            return num_workers
        reason = f"{SHARED_MEMORY} has {free} bytes left"
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
    log.warning(f"num_workers: 0, the main process makes the batches ({reason})")
    return 0


# ------------------------------------------------------------------------------- validation


def make_evaluator(inputs: Inputs, world: World) -> Evaluator:
    config = inputs.config
    return Evaluator(
        tokenizer=inputs.tokenizer,
        world=world,
        pad_id=inputs.pad_id,
        batch_size=config.batch_size_eval,
        max_new_tokens=config.max_new_tokens,
        compute_dtype=config.compute_dtype,
        text_format=inputs.text_format,
    )


def validate(
    training: Training, inputs: Inputs, world: World, metrics: Metrics, epoch: int
) -> None:
    """The gate and the validation after an epoch; records what they found, and that they are
    done. Before that is on the disk nothing is trained at the stage that the gate decides on."""
    config, state = inputs.config, training.state
    if config.skip_validation and config.advance_at is None:
        return
    evaluator = make_evaluator(inputs, world)
    if config.advance_at is not None:
        dataset = inputs.gate_dataset(epoch, state.stages[epoch - 1])
        curriculum = inputs.curriculum
        decide_next_stage(training.model, dataset, curriculum, evaluator, state, metrics)
    accuracy = None
    if not config.skip_validation:
        accuracy = validation_accuracy(training, inputs, evaluator, metrics, epoch)
    state.evaluated = True
    if world.is_main:
        if accuracy is not None and (state.best_accuracy is None or accuracy > state.best_accuracy):
            state.best_accuracy, state.best_epoch = accuracy, epoch
        if not config.debug:
            path = config.run_dir / f"checkpoint_{epoch}" / "evaluation.json"
            write_whole(path, current_state(training, config).to_json())
            prune(training, config)


def validation_accuracy(
    training: Training, inputs: Inputs, evaluator: Evaluator, metrics: Metrics, epoch: int
) -> float | None:
    """Loss and accuracy on the validation rows, recorded; returns the accuracy on the main
    process, None on the others.

    The last epoch of a coconut run is evaluated without latents too: published studies found
    models that do as well or better so, and then the number alone says little.
    """
    config, model, state = inputs.config, training.model, training.state
    stage = inputs.curriculum.stage(epoch, state.stages)
    own = inputs.validation_dataset(epoch, None, stage)
    datasets: dict[int | None, StageDataset] = {None: own}
    if epoch == config.num_epochs and own.num_latents.any():
        datasets[0] = inputs.validation_dataset(epoch, 0, stage)
    most = int(own.num_latents.max()) if config.feeds_back else 0
    thoughts = Thoughts(evaluator.tokenizer, most)
    loss = evaluator.loss(model, own, thoughts)
    health = thoughts.figures(evaluator.world)
    if "latent_distance" in health:
        warn_of_collapse(state, health["latent_distance"], epoch)
    evaluations = evaluate_epoch(
        model,
        datasets,
        evaluator,
        config.run_dir,
        metrics,
        epoch=epoch,
        stage=stage,
        global_step=state.global_step,
        figures={"loss": loss, **health},
    )
    return evaluations[0].accuracy if evaluations else None


# ------------------------------------------------------------------------------- checkpoints


def current_state(training: Training, config: Config) -> TrainState:
    """The place in the training, with the sizes of the files that grow with it."""
    files = [config.run_dir / name for name in GROWING_FILES]
    sizes = {file.name: file.stat().st_size for file in files if file.exists()}
    return replace(training.state, scheduler=training.scheduler.state_dict(), files=sizes)


def save(
    training: Training, inputs: Inputs, world: World, epoch: int, step: int | None = None
) -> None:
    """Write a checkpoint and drop what it makes useless."""
    config, start = inputs.config, time.perf_counter()
    if config.debug:
        return
    training.state.evaluated = False
    path = config.run_dir / (f"checkpoint_{epoch}" + ("" if step is None else f"_step_{step}"))
    state = current_state(training, config)
    save_checkpoint(path, training.model, inputs.tokenizer, training.optimizer, config, state)
    if world.is_main:
        prune(training, config)
    log.info(f"saved {path} in {time.perf_counter() - start:.1f} s")


def prune(training: Training, config: Config) -> None:
    """Apply save_only_improve and keep_checkpoints; the best and the newest always stay."""
    best = training.state.best_epoch
    epochs = [c.epoch for c in find_checkpoints(config.run_dir) if c.step is None]
    keep = None
    if config.save_only_improve:
        keep = {best}
    elif config.keep_checkpoints is not None:
        keep = {best, *epochs[-config.keep_checkpoints :]}
    prune_checkpoints(config.run_dir, keep)
