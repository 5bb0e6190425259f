"""Train or evaluate with Coconut and its baselines: python run.py args/X.yaml [KEY=VALUE ...]

One process runs by itself; several (one for each GPU) are started by torchrun. Exit codes: 0 done,
2 wrong input (nothing was changed), 3 stopped by a signal after saving, 1 anything else.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from transformers.utils import logging as hf_logging

from dataset import Curriculum, encode_rows
from engine.checkpoint import (
    DiskFull,
    checkpoint_bytes,
    free_bytes,
    load_training_state,
    lock_run_dir,
)
from engine.distributed import (
    Processes,
    barrier,
    close_processes,
    is_main_process,
    main_process_first,
    open_processes,
    shard,
)
from engine.logs import Metrics, start_logging, start_wandb
from engine.loop import (
    EXIT_STOPPED,
    GROWING_FILES,
    Run,
    Stop,
    Stopped,
    evaluate_epoch,
    make_optimizer,
    new_state,
    plan_epoch,
    rows_per_step,
    stage_dataset,
    train,
)
from engine.preflight import Inputs, build_model, check_prompts, gather_inputs
from engine.start import describe_start
from utils import Config, UserError, describe_keys, load_config, log, write_whole

EXIT_WRONG_INPUT = 2
TINY_MODEL = 20_000_000  # parameters
MIB, GIB = 2**20, 2**30
CACHE = Path(__file__).resolve().parent / ".cache"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="keys:\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, see args/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replaces a key")
    parser.add_argument("--check", action="store_true", help="check all input, then stop")
    parser.add_argument(
        "--expect",
        choices=("fresh", "continue"),
        help="refuse a run folder that holds checkpoints, or one without",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        inputs = gather_inputs(config, args.expect)
        if args.check:
            prepare(config, inputs, Processes(0, 1, torch.device("cpu")))
            begins = "" if config.only_eval else f"; starts {describe_start(inputs.start)}"
            print(f"{args.config}: all input is well{begins}")
            return 0
        run(prepare(config, inputs, open_processes()))
        close_processes()
        return 0
    except Stopped:
        log.info("stopped by a signal; all is saved: the same command goes on from here")
        return EXIT_STOPPED
    except DiskFull as error:
        if is_main_process():
            log.error(f"disk full: {error}")
        return 1
    except UserError as error:
        if is_main_process():
            print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        else:  # torchrun ends all processes when one ends: let the main one speak first
            time.sleep(3)
        return EXIT_WRONG_INPUT


def prepare(config: Config, inputs: Inputs, processes: Processes) -> Run:
    """Encode the rows and check what only that tells."""
    this = Run(
        config=config,
        processes=processes,
        inputs=inputs,
        curriculum=Curriculum.from_config(config),
        train=None if config.only_eval else encode(inputs.train_rows, config.train_path, inputs),
        val=None if config.skip_validation else encode(inputs.val_rows, config.val_path, inputs),
        state=new_state(),
    )
    check_encoded(this)
    return this


def run(this: Run) -> None:
    """Build the rest, then train or evaluate."""
    config, inputs, processes = this.config, this.inputs, this.processes
    check_rows_per_step(this)
    this.model = build_model(config, inputs).to(processes.device)
    lock = open_run_dir(config, processes)
    start_logging(config, processes)
    this.stop = Stop()
    count = sum(p.numel() for p in this.model.parameters())
    if count < TINY_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on kernels this small a second thread only waits, and spins
    if not config.only_eval:
        if config.gradient_checkpointing:
            this.model.checkpoint_activations()
        shard(this.model, config.compute_dtype)
        make_optimizer(this)
        restore(this)
        warn_of_space(this)
    if processes.is_main:
        write_whole(config.run_dir / "config.yaml", config.to_yaml())
        wandb_run = None if config.only_eval else start_wandb(config)
        this.metrics = Metrics(config.run_dir / "metrics.jsonl", wandb_run)
        log.info(overview(this))
        if inputs.tokens and not inputs.has_markers:
            log.info(
                f"latent markers: new, made from the embedding of {config.marker_init_token!r}"
            )
        if torch.backends.mps.is_available():
            log.info("Apple MPS is not used: this run is on the CPU")
    if config.only_eval:
        evaluate_epoch(this, inputs.start.epochs_done, config.forced_latents)
    else:
        train(this)
    if processes.is_main:
        this.metrics.close()
        lock.close()


def open_run_dir(config: Config, processes: Processes):
    """Make the run folder and hold its lock, on the main process."""
    lock = None
    if processes.is_main:
        try:
            lock = lock_run_dir(config.run_dir)
        except OSError as error:
            raise UserError(f"save_path: cannot write to {config.run_dir}: {error}") from None
    barrier()
    return lock


def encode(rows: list[dict], path: str, inputs: Inputs):
    with main_process_first():  # the others find its cache
        return encode_rows(rows, inputs.tokenizer, list(inputs.tokens or ()), CACHE, path)


def check_encoded(this: Run) -> None:
    """Check what only the encoded rows tell. Raises UserError."""
    config, limit = this.config, this.inputs.hf_config.max_position_embeddings
    problems = []
    if this.val is not None:
        last = this.inputs.start.epochs_done if config.only_eval else config.num_epochs
        datasets = [
            stage_dataset(this, this.val, last, num_latents=number)
            for number in config.forced_latents
        ]
        try:
            check_prompts(datasets, config, this.inputs.hf_config)
        except UserError as error:
            problems += error.problems
    if this.train is not None:
        if config.max_seq_length > limit:
            problems.append(
                f"max_seq_length: {config.max_seq_length} is above the {limit} "
                f"positions of {config.model_id}"
            )
        for epoch in {1, config.num_epochs}:
            if not plan_epoch(this, stage_dataset(this, this.train, epoch), epoch)[0]:
                problems.append(
                    f"max_seq_length: all rows of {config.train_path} are longer than "
                    f"{config.max_seq_length} tokens in epoch {epoch}"
                )
        this.state["data"] = this.train.fingerprint
        resume = this.inputs.start.resume
        if resume and resume.state()["data"] != this.train.fingerprint:
            problems.append(
                f"train_path: the rows of {config.train_path} or their encoding are "
                f"not those that {resume.path} was trained on; start another run "
                "(name=...)"
            )
    if problems:
        raise UserError(*problems)


def check_rows_per_step(this: Run) -> None:
    """Raise UserError where the run goes on with another number of rows per optimizer step."""
    resume, config = this.inputs.start.resume, this.config
    mine = this.state["rows_per_step"] = rows_per_step(config, this.processes.world_size)
    if resume and resume.state()["rows_per_step"] != mine:
        raise UserError(
            f"{resume.path} was trained with {resume.state()['rows_per_step']} rows per step, this "
            f"run has batch_size_training {config.batch_size_training} x "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} x "
            f"{this.processes.world_size} processes = {mine}; change one of these"
        )


def restore(this: Run) -> None:
    """Go back to the place of the checkpoint that the run goes on from."""
    resume, sizes = this.inputs.start.resume, {}
    if resume is not None:
        this.state = resume.state()
        schedule, sizes = this.state.pop("scheduler"), this.state.pop("files")
        if resume.has_optimizer:
            load_training_state(resume, this.model, this.optimizer)
            this.scheduler.load_state_dict(schedule)
    this.state["first_epoch"] = this.inputs.start.first_epoch
    if this.processes.is_main:  # what was written after the checkpoint is written again
        for path in (this.config.run_dir / name for name in GROWING_FILES):
            if path.exists():
                os.truncate(path, min(path.stat().st_size, sizes.get(path.name, 0)))


def warn_of_space(this: Run) -> None:
    """Say so where the disk has no room for the checkpoints of the run."""
    config, have = this.config, free_bytes(this.config.run_dir)
    weights, training = checkpoint_bytes(this.model)
    epochs = config.num_epochs - this.inputs.start.epochs_done
    kept = min(epochs, config.keep_checkpoints or epochs) if not config.save_only_improve else 2
    need = weights * (kept + 1) + 2 * training
    if this.processes.is_main and not config.debug and have < need:
        log.warning(
            f"{config.run_dir}: {have / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed for "
            f"{kept} checkpoints; keep_checkpoints bounds them"
        )


def overview(this: Run) -> str:
    """What is about to run, as text."""
    config, processes = this.config, this.processes
    count = sum(p.numel() for p in this.model.parameters())
    kind = f"{processes.world_size} x {processes.device.type}, {str(config.dtype).split('.')[1]}"
    lines = [
        f"run       {config.run_dir}",
        f"model     {config.model_id}, {count / 1e6:,.1f} million parameters, {kind}",
        f"method    {config.method.value}, schedule {config.schedule}",
    ]
    if this.val is not None:
        lines.append(f"val rows  {len(this.val)} of {config.val_path}")
    start = this.inputs.start
    if config.only_eval:
        lines.append(f"evaluates {start.weights}, {start.epochs_done} epochs done")
        return "\n".join(["", *lines])
    first = start.epochs_done + 1
    dataset = stage_dataset(this, this.train, min(first, config.num_epochs))
    steps, dropped = plan_epoch(this, dataset, first)
    total = rows_per_step(config, processes.world_size)
    lines += [
        f"rows      {len(this.train)} of {config.train_path}, {dropped} longer than max_seq_length "
        f"({config.max_seq_length}) dropped",
        f"batch     {config.batch_size_training} x {config.gradient_accumulation_steps} "
        f"accumulated x {processes.world_size} processes = {total} rows per optimizer step",
        f"steps     {len(steps)} per epoch, {config.num_epochs} epochs",
        f"memory    {static_memory(this)}",
        f"starts    {describe_start(start)}",
        "",
        this.curriculum.table(config.num_epochs),
        "",
    ]
    return "\n".join(["", *lines])


def static_memory(this: Run) -> str:
    """What parameters, gradients and optimizer state take in each process all the time."""
    # two moments in the parameters' type; Kahan's rounding error beside those that round
    kahan = this.config.dtype is torch.bfloat16 and this.optimizer.defaults.get("kahan_sum")
    states = 3 if kahan else 2
    size = sum(p.numel() * p.element_size() for p in this.model.parameters())
    size /= this.processes.world_size
    unit, name = (GIB, "GiB") if (2 + states) * size >= GIB else (MIB, "MiB")
    return (
        f"{(2 + states) * size / unit:.1f} {name} per process: parameters {size / unit:.1f}, "
        f"gradients {size / unit:.1f}, optimizer {states * size / unit:.1f}; activations come on "
        "top (benchmarks/memory.py)"
    )


if __name__ == "__main__":
    sys.exit(record(main)())
