"""Train or evaluate with Coconut and its baselines: python run.py args/X.yaml [KEY=VALUE ...]

One process runs by itself; several (one for each GPU) are started by torchrun. Exit codes: 0 done,
2 wrong input (nothing was changed), 3 stopped by a signal after saving, 1 anything else. Encoded
rows are cached in ~/.cache/coconut (XDG_CACHE_HOME/coconut).

On several nodes, with its own --node_rank on each:

    torchrun --nnodes 2 --node_rank 0 --nproc_per_node 8 --master_addr NODE_0 --master_port 29500 \\
        run.py args/X.yaml

Nodes share the run folder, the data and the model's files; the cache may be each one's own.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from transformers.utils import logging as hf_logging

from coconut import Coconut
from engine.checkpoint import (
    DiskFull,
    check_shared,
    find_checkpoints,
    free_bytes,
    is_no_room,
    lock_run_dir,
    run_bytes,
)
from engine.distributed import World, on_all, on_main, process_group, replicate, several_processes
from engine.eval_sets import evaluate_checkpoint
from engine.files import write_whole
from engine.inputs import Inputs
from engine.launch import is_main_process
from engine.logs import Metrics, TensorBoard, logging_to, start_wandb
from engine.loop import GROWING_FILES, check_rows_per_step, make_evaluator, start_training, train
from engine.model import build_model
from engine.overview import count_parameters, count_trained, describe_check, describe_keys, overview
from engine.preflight import gather_inputs
from engine.start import find_start
from engine.stop import EXIT_STOPPED, Stop, Stopped, close_output
from loader import load_config
from utils import EXIT_WRONG_INPUT, SHARED_CORES, Config, UserError, log

ENDINGS = (UserError, DiskFull, Stopped)  # all ranks come to them together
TINY_MODEL = 20_000_000  # parameters


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="keys:\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config",
        nargs="+",
        metavar="YAML|KEY=VALUE",
        help="YAML files (see args/), of which later ones win, and keys to replace",
    )
    parser.add_argument("--check", action="store_true", help="check all input, then stop")
    parser.add_argument(
        "--expect",
        choices=("fresh", "continue"),
        help="refuse a run folder that holds checkpoints, or one without",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Read the YAML, gather and check all input, build the model, then train or evaluate."""
    args = parse_args(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config: Config | None = None
    try:
        if args.check:
            Stop()
            config = load_config(*args.config)
            inputs = gather_inputs(config, args.expect)
            if inputs.config.rows_per_step is not None:  # else the number of processes decides
                check_rows_per_step(inputs, World(0, 1, torch.device("cpu")))
            try:
                print(describe_check(inputs, args.config), flush=True)
            except BrokenPipeError:
                return close_output()
            return 0
        with process_group(together=ENDINGS) as world:
            stop = Stop()  # not before: no handler runs while a process waits for the others
            config = on_all(lambda: load_config(*args.config))
            inputs = gather_inputs(config, args.expect)
            check_rows_per_step(inputs, world)
            model = build_model(inputs)
            with open_run_dir(inputs, world, args.expect):
                if config.only_eval:
                    run_evaluation(inputs, model, world)
                else:
                    run_training(inputs, model, world, stop)
        return 0
    except ENDINGS as ending:
        return report(ending, None if args.check else config, args.config)
    except OSError as error:  # of the log, the metrics or the results
        if not is_no_room(error):
            raise
        code = report(DiskFull(str(error)), config, args.config)
        if several_processes():  # it came to this one alone: by the traceback all know of it
            raise
        return code


def report(
    ending: UserError | DiskFull | Stopped, config: Config | None, arguments: list[str]
) -> int:
    """Say how the run ended, once, and how it goes on; the exit code. config: what the arguments
    were when it began, None where no run did."""
    if isinstance(ending, Stopped):
        saved = config and go_on("all is saved;", config, arguments)
        line = f"stopped by a signal, {saved or 'nothing was changed'}"
        if log.handlers:
            log.info(line)
        elif is_main_process():  # it came before the run folder and its log were opened
            print(line)
        return EXIT_STOPPED
    if isinstance(ending, DiskFull):
        assert config is not None
        if is_main_process():
            intact = "the checkpoints before it are intact: make room, then"
            log.error(f"disk full: {ending}; {go_on(intact, config, arguments)}")
        return 1
    if is_main_process():
        return ending.report()
    time.sleep(3)  # torchrun ends all processes when one ends: let the main one speak first
    return EXIT_WRONG_INPUT


def go_on(saved: str, config: Config, arguments: list[str]) -> str:
    """The command that goes on from what is saved, or that begins again where nothing is."""
    script = "train_continue_fresh.sh"
    if not config.only_eval and not find_checkpoints(config.run_dir):
        saved, script = "no checkpoint was saved yet;", "train_fresh_start.sh"
    return f"{saved} go on with: bash {script} {shlex.join(arguments)}"


def run_training(inputs: Inputs, model: Coconut, world: World, stop: Stop) -> None:
    limit_threads(model)
    training = start_training(inputs, model, world)
    warn_of_space(inputs, model, world)
    with open_records(inputs, world) as metrics:
        log.info(overview(inputs, model, world))
        train(training, inputs, world, metrics, stop)


def run_evaluation(inputs: Inputs, model: Coconut, world: World) -> None:
    limit_threads(model)
    replicate(model, world)
    with open_records(inputs, world) as metrics:
        log.info(overview(inputs, model, world))
        evaluator = make_evaluator(inputs, world)
        evaluate_checkpoint(model, inputs, evaluator, metrics, GROWING_FILES)


def limit_threads(model: nn.Module) -> None:
    """On kernels as small as a tiny model's a second thread only waits, and spins. A user's own
    number stays; that of runs side by side is none."""
    chosen = "OMP_NUM_THREADS" in os.environ and SHARED_CORES not in os.environ
    if count_parameters(model) < TINY_MODEL and not chosen:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------- the run folder


@contextmanager
def open_run_dir(inputs: Inputs, world: World, expect: str | None) -> Iterator[None]:
    """Make the run folder, hold its lock and log to it. Raises UserError, on all ranks, where
    that cannot be, or where another process went on with the run before it let go of the lock."""
    run_dir = inputs.config.run_dir

    def lock() -> None:
        try:
            stack.enter_context(lock_run_dir(run_dir))
        except OSError as error:
            raise UserError(f"save_path: cannot write to {run_dir}: {error}") from None
        if find_start(inputs.config, expect) != inputs.start:
            raise UserError(
                f"{run_dir}: another process trained on while this one was starting; start again"
            )

    with ExitStack() as stack:
        on_main(lock)
        if world.num_nodes > 1:
            check_shared(run_dir)
        stack.enter_context(logging_to(run_dir, world))
        yield


@contextmanager
def open_records(inputs: Inputs, world: World) -> Iterator[Metrics]:
    """Write the resolved config, and open the metrics; what was written after the checkpoint that
    the run goes on from is dropped: it is written again."""
    config, resume = inputs.config, inputs.start.resume
    if not world.is_main:
        yield Metrics(os.devnull)
        return
    if not config.only_eval:
        sizes = {} if resume is None else resume.state().files
        for path in (config.run_dir / name for name in GROWING_FILES):
            if path.exists():
                os.truncate(path, min(path.stat().st_size, sizes.get(path.name, 0)))
    write_whole(config.run_dir / "config.yaml", config.to_yaml())
    wandb_run = None if config.only_eval else start_wandb(config)
    path = config.run_dir / "metrics.jsonl"
    metrics = Metrics(path, wandb_run, TensorBoard(path) if config.tensorboard else None)
    try:
        yield metrics
    finally:
        metrics.close()


def warn_of_space(inputs: Inputs, model: Coconut, world: World) -> None:
    """Say so where the disk has no room for the checkpoints of the run."""
    config, have = inputs.config, free_bytes(inputs.config.run_dir)
    epochs = config.num_epochs - inputs.start.epochs_done
    count = count_trained(model.base_causallm)
    need, at_once = run_bytes(count, config, epochs, beside=count_trained(model) - count)
    if world.is_main and not config.debug and have < need:
        log.warning(
            f"{config.run_dir}: {have / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed for "
            f"{at_once} checkpoints at once; keep_checkpoints bounds them"
        )


if __name__ == "__main__":
    sys.exit(record(main)())
