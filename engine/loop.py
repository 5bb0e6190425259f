"""The training loop: epochs, optimizer steps, validation, checkpoints."""

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from coconut import Coconut
from dataset import Curriculum, Encoded, MicroBatches, StageDataset, plan_steps
from engine.checkpoint import find_checkpoints, prune_checkpoints, save_checkpoint
from engine.distributed import Processes, backward, end_of_backward, gradient_norm, sum_over_ranks
from engine.evaluation import Evaluation, evaluate, table, validation_loss, write_results
from engine.logs import Metrics
from engine.optimizer import build_optimizer, build_scheduler
from engine.preflight import Inputs
from utils import Config, Method, derive_seed, log, write_whole

EXIT_STOPPED = 3
TENSORS = ("input_ids", "attention_mask", "position_ids", "labels", "label_index")
GROWING_FILES = ("metrics.jsonl", "validation_examples.txt")


class Stopped(Exception):
    """A signal asked to stop, and all is saved."""


class Stop:
    """A request to stop (Ctrl-C, SIGTERM): the optimizer step ends, all is saved, the process
    exits with EXIT_STOPPED. A second one, or one while nothing is unsaved, exits at once."""

    def __init__(self):
        self.requested, self.all_saved = False, True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.requested or self.all_saved:
            os._exit(EXIT_STOPPED)
        self.requested = True

    def saved(self) -> None:
        """All is saved now: exit where a request came meanwhile."""
        self.all_saved = True
        if self.requested:
            raise Stopped


@dataclass
class Run:
    """What a run holds together. state: its place in the training, as checkpoints save it."""

    config: Config
    processes: Processes
    inputs: Inputs
    curriculum: Curriculum
    train: Encoded | None  # None where only_eval
    val: Encoded | None  # None where skip_validation
    state: dict
    model: Coconut | None = None
    metrics: Metrics | None = None  # on the main process
    stop: Stop | None = None
    optimizer: torch.optim.Optimizer | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None


def new_state() -> dict:
    return {
        "global_step": 0,
        "samples_seen": 0,
        "bad_steps": 0,
        "bad_steps_in_a_row": 0,
        "best_accuracy": None,
        "best_epoch": None,
        "evaluated": False,
    }


# ------------------------------------------------------------------------------- training


def train(run: Run) -> None:
    """All epochs that are left. Raises Stopped after a signal and a save."""
    config, resumed = run.config, run.inputs.start.resume
    if resumed and resumed.step is None and not run.state["evaluated"]:
        validate(run, resumed.epoch)
    for epoch in range(run.inputs.start.epochs_done + 1, config.num_epochs + 1):
        first_step = resumed.step if resumed and resumed.epoch == epoch else 0
        changed = run.curriculum.stage(epoch) != run.curriculum.stage(epoch - 1)
        if config.reset_optimizer and changed and first_step == 0:
            reset_optimizer(run)
        run.stop.all_saved = False
        train_epoch(run, epoch, first_step)
        save(run, epoch)
        run.stop.saved()
        validate(run, epoch)


def train_epoch(run: Run, epoch: int, first_step: int) -> None:
    """One epoch from an optimizer step on."""
    config, curriculum = run.config, run.curriculum
    dataset = stage_dataset(run, run.train, epoch, config.uniform_prob)
    steps, dropped = plan_epoch(run, dataset, epoch)
    log.info(
        f"epoch {epoch}: {describe_stage(curriculum, epoch)}, {len(steps)} steps, "
        f"{dropped} rows longer than max_seq_length dropped"
    )
    bar = tqdm(
        total=len(steps),
        initial=first_step,
        desc=f"epoch {epoch}",
        unit="step",
        disable=not run.processes.is_main,
        leave=False,
        dynamic_ncols=True,
        mininterval=1,
    )
    run.model.train()
    batches = micro_batches(run, dataset, steps, first_step)
    for step, rows in enumerate(steps[first_step:], start=first_step + 1):
        began = time.perf_counter()
        seed = derive_seed(config.seed, "step", run.state["global_step"], run.processes.rank)
        torch.manual_seed(seed)  # of dropout: depends on nothing that ran before
        sums = Counter()
        for batch in fetch_step(batches, sums):
            forward_backward(run, batch, sums)
        record = optimizer_step(run, dataset, rows, sums)
        stopping = record.pop("stop")
        seconds = time.perf_counter() - began
        if run.metrics:
            run.metrics.write(
                kind="train",
                epoch=epoch,
                stage=curriculum.stage(epoch),
                step=step,
                **record,
                seconds=seconds,
                waiting=sums["waiting"] / seconds,
            )
        bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        bar.update()
        if step < len(steps):  # at the end of the epoch train() saves
            if stopping or (config.save_every_steps and step % config.save_every_steps == 0):
                save(run, epoch, step)
            if stopping:  # on all ranks, whichever got the signal
                raise Stopped
    bar.close()


def fetch_step(batches: Iterator[dict], sums: Counter) -> Iterator[dict]:
    """The micro-batches of one optimizer step; counts the seconds waited for them."""
    last = False
    while not last:
        start = time.perf_counter()
        batch = next(batches)
        sums["waiting"] += time.perf_counter() - start
        last = batch["last"]
        yield batch


def forward_backward(run: Run, batch: dict, sums: Counter) -> None:
    """Add the gradients of a micro-batch, and to sums what the step reports."""
    world_size, device = run.processes.world_size, run.processes.device
    with compute_dtype(run):
        output = run.model(
            **{name: batch[name].to(device, non_blocking=True) for name in TENSORS},
            latent_columns=batch["latent_columns"],
            num_items_in_batch=batch["num_items_in_batch"],
        )
    # FSDP takes the mean over the ranks; the loss is normalised over all of them already
    backward(run.model, output.loss * world_size, output.prefix_hidden, batch["last"])
    sums["loss"] += output.loss.detach()  # stays on the device
    sums["positions"] += batch["input_ids"].numel()


def compute_dtype(run: Run):
    """The context that computes in bf16 with float32 weights, where that is asked for. With
    several processes FSDP casts, and gathers in the narrow type."""
    cast = run.config.float32_master_weights and run.processes.world_size == 1
    return torch.autocast(run.processes.device.type, torch.bfloat16, enabled=cast)


def optimizer_step(run: Run, dataset: StageDataset, rows, sums: Counter) -> dict:
    """Update the weights with the gradients of a whole step; the step's figures.

    A step whose loss or gradient is not finite is skipped, on all ranks alike.
    """
    config, state = run.config, run.state
    end_of_backward(run.model)
    norm = gradient_norm(run.model, config.max_grad_norm)
    loss, positions, stop = sum_over_ranks(
        [float(sums["loss"]), sums["positions"], run.stop.requested], run.processes.device
    )
    lr = run.scheduler.get_last_lr()[0]
    if math.isfinite(loss) and math.isfinite(norm):
        run.optimizer.step()
        state["bad_steps_in_a_row"] = 0
    else:
        skip_bad_step(run, f"loss {loss}, gradient norm {norm}, rows {sorted(rows.tolist())}")
    run.optimizer.zero_grad()
    run.scheduler.step()
    state["global_step"] += 1
    state["samples_seen"] += len(rows)
    return {
        "global_step": state["global_step"],
        "samples_seen": state["samples_seen"],
        "loss": loss,
        "grad_norm": norm,
        "lr": lr,
        "bad_steps": state["bad_steps"],
        "labelled_tokens": int(dataset.num_labels[rows].sum()),
        "positions_per_token": positions / int(dataset.total_length[rows].sum()),
        "stop": bool(stop),
    }


def skip_bad_step(run: Run, what: str) -> None:
    """Count a step that is not finite. Raises RuntimeError after max_bad_steps in a row."""
    state, limit = run.state, run.config.max_bad_steps
    state["bad_steps"] += 1
    state["bad_steps_in_a_row"] += 1
    log.warning(f"optimizer step {state['global_step'] + 1} skipped: {what}")
    if state["bad_steps_in_a_row"] >= limit:
        raise RuntimeError(
            f"{limit} optimizer steps in a row were not finite (max_bad_steps); the last "
            "checkpoint is intact: lower lr, or set max_grad_norm"
        )


def micro_batches(run: Run, dataset: StageDataset, steps, first_step: int) -> Iterator[dict]:
    """This rank's micro-batches of an epoch, from an optimizer step on."""
    batches = MicroBatches(
        dataset,
        steps[first_step:],
        run.processes.world_size,
        run.processes.rank,
        run.config.batch_size_training,
        run.inputs.pad_id,
    )
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            num_workers=run.config.num_workers,
            worker_init_fn=serve_until_the_end,
            pin_memory=run.processes.device.type == "cuda",
        )
    )


def serve_until_the_end(_) -> None:
    """A worker ends with its process; no signal may take it away before the last save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_optimizer(run: Run) -> None:
    """A new optimizer and learning rate schedule, at the start of the training."""
    run.optimizer = build_optimizer(run.config, run.model)
    total = 0
    for epoch in range(run.inputs.start.first_epoch, run.config.num_epochs + 1):
        dataset = stage_dataset(run, run.train, epoch, run.config.uniform_prob)
        total += len(plan_epoch(run, dataset, epoch)[0])
    run.scheduler = build_scheduler(run.config, run.optimizer, total)


def reset_optimizer(run: Run) -> None:
    """New optimizer state; the learning rate schedule goes on."""
    place = run.scheduler.state_dict()
    make_optimizer(run)
    run.scheduler.load_state_dict(place)
    for group, lr in zip(run.optimizer.param_groups, run.scheduler.get_last_lr()):
        group["lr"] = lr


# ------------------------------------------------------------------------------- stages


def stage_dataset(run: Run, encoded: Encoded, epoch: int, uniform_prob=0.0, num_latents=None):
    config, stage = run.config, run.curriculum.stage(epoch)
    return StageDataset(
        encoded,
        run.curriculum,
        run.inputs.tokens,
        stage,
        num_latents,
        uniform_prob,
        config.seed,
        epoch,
    )


def rows_per_step(config: Config, world_size: int) -> int:
    return config.batch_size_training * config.gradient_accumulation_steps * world_size


def plan_epoch(run: Run, dataset: StageDataset, epoch: int):
    config, per_step = run.config, rows_per_step(run.config, run.processes.world_size)
    return plan_steps(
        dataset, per_step, config.max_seq_length, config.seed, epoch, config.group_by_length
    )


def describe_stage(curriculum: Curriculum, epoch: int) -> str:
    stage = curriculum.stage(epoch)
    latents, skipped = curriculum.plan(stage, 10**6)
    steps = "all" if skipped == 10**6 else skipped
    return f"stage {stage}, {latents} latents, {steps} steps skipped"


# ------------------------------------------------------------------------------- validation


def validate(run: Run, epoch: int) -> None:
    """Loss and accuracy after an epoch; records them, and that they are done.

    The last epoch of a coconut run is evaluated without latents too: published studies found
    models that do as well or better so, and then the number alone says little.
    """
    config, state = run.config, run.state
    if config.skip_validation:
        return
    with compute_dtype(run):
        loss = validation_loss(
            run.model,
            stage_dataset(run, run.val, epoch),
            run.processes,
            config.batch_size_training,
            run.inputs.pad_id,
        )
    forced = [None]
    if config.method is Method.COCONUT and epoch == config.num_epochs:
        forced.append(0)
    evaluations = evaluate_epoch(run, epoch, forced, loss=loss)
    state["evaluated"] = True
    if run.processes.is_main:
        accuracy = evaluations[0].accuracy
        if state["best_accuracy"] is None or accuracy > state["best_accuracy"]:
            state["best_accuracy"], state["best_epoch"] = accuracy, epoch
        if not config.debug:
            path = config.run_dir / f"checkpoint_{epoch}" / "evaluation.json"
            write_whole(path, json.dumps(current_state(run), indent=1) + "\n")
            prune(run)


def evaluate_epoch(run: Run, epoch: int, forced: list[int | None], **figures) -> list[Evaluation]:
    """Evaluate with each number of latents (None: the stage's own), write and log all results.

    The evaluations on the main process, [] on the others. figures: more to record of the stage's
    own number.
    """
    config, stage = run.config, run.curriculum.stage(epoch)
    evaluations = []
    for number in forced:
        dataset = stage_dataset(run, run.val, epoch, num_latents=number)
        with compute_dtype(run):
            found = evaluate(
                run.model,
                dataset,
                run.inputs.val_rows,
                run.inputs.tokenizer,
                run.processes,
                config.batch_size_eval,
                config.max_new_tokens,
                run.inputs.pad_id,
            )
        if found is None:
            continue
        evaluation, rows = found
        evaluations.append(evaluation)
        title = f"epoch {epoch}, stage {stage}, {evaluation.latents}"
        title += " latents" if number is None else " latents (forced)"
        more = figures if number is None else {}
        log.info(
            f"{title}: {evaluation.line()}"
            + "".join(f", {key} {value:.4f}" for key, value in more.items())
        )
        name = f"results_epoch_{epoch}" + ("" if number is None else f"_latents_{number}")
        rows = [{"epoch": epoch, "stage": stage, **row} for row in rows]
        write_results(config.run_dir, title, name, rows)
        run.metrics.write(
            kind="eval",
            epoch=epoch,
            stage=stage,
            forced_latents=number,
            global_step=run.state["global_step"],
            **more,
            **asdict(evaluation),
        )
    if len(evaluations) > 1:
        text = table(evaluations)
        log.info(f"epoch {epoch}, stage {stage}:\n{text}")
        write_whole(config.run_dir / f"latents_epoch_{epoch}.md", text)
    return evaluations


# ------------------------------------------------------------------------------- checkpoints


def current_state(run: Run) -> dict:
    """The place in the training, with the sizes of the files that grow with it."""
    files = [run.config.run_dir / name for name in GROWING_FILES]
    sizes = {file.name: file.stat().st_size for file in files if file.exists()}
    return {**run.state, "scheduler": run.scheduler.state_dict(), "files": sizes}


def save(run: Run, epoch: int, step: int | None = None) -> None:
    """Write a checkpoint and drop what it makes useless."""
    config = run.config
    if config.debug:
        return
    run.state["evaluated"] = False
    name = f"checkpoint_{epoch}" + ("" if step is None else f"_step_{step}")
    start = time.perf_counter()
    save_checkpoint(
        config.run_dir / name,
        run.model,
        run.inputs.tokenizer,
        run.optimizer,
        config,
        current_state(run),
    )
    if run.processes.is_main:
        prune(run)
    log.info(f"saved {config.run_dir / name} in {time.perf_counter() - start:.1f} s")


def prune(run: Run) -> None:
    """Apply save_only_improve and keep_checkpoints; the best and the newest always stay."""
    config, best = run.config, run.state["best_epoch"]
    epochs = [c.epoch for c in find_checkpoints(config.run_dir) if c.step is None]
    keep = None
    if config.save_only_improve:
        keep = {best}
    elif config.keep_checkpoints is not None:
        keep = {best, *epochs[-config.keep_checkpoints :]}
    prune_checkpoints(config.run_dir, keep)
