"""Ask a checkpoint, look inside its thoughts, compare runs, and share them.

    python -m analysis ask CONFIG --question "..." | --file FILE [--latents K]
    python -m analysis look CONFIG [--rows 0,1,2 | --question "..."] [--top 5]
    python -m analysis faithful CONFIG [--cot CONFIG] [--edits] [--rows_of FILE]
    python -m analysis prosqa CONFIG [--latents 0,1,2] [--rows 0,1,2]
    python -m analysis edits CONFIG [--latents 0,1,2] [--seed 0]
    python -m analysis compare A.jsonl B.jsonl
    python -m analysis curve RUN [RUN ...] [--output FILE]
    python -m analysis report RUN [RUN ...] [--output FILE]
    python -m analysis seeds YAML seed=0,1,2 [KEY=A,B ...] [--jobs N] [--sweep]
    python -m analysis export CONFIG OUTPUT [--format hf|coconut] [--upload OWNER/NAME [--dry-run]]

CONFIG: a checkpoint or run folder, or YAML files with load_model_path=CHECKPOINT, and KEY=VALUE as
of run.py; eval_num_latents=K forces a number of latents. FILE holds one question a line, or rows
where its name ends in .json, .jsonl, .csv or .parquet. A.jsonl: results of an evaluation, or the
run folder with them (the newest).

look      the nearest tokens of every latent, its norm, and what changes without it
faithful  is it reasoning? latents left out, replaced and exchanged on all rows, beside the same on
          a written chain (of the CoT run --cot), and a linear probe
prosqa    classes of the written paths (paper, section 5), the next concept's probabilities
edits     rewrites the edge that decides each answer of ProsQA, counts the answers that follow
compare   paired comparison of two results
report    one HTML file of curves, tables and all evaluated rows
seeds     trains every combination of seeds and values (run_seeds.sh)
export    a folder that from_pretrained opens, with a model card, or the original code's single
          file; sent to the Hub only where --upload says so

Tables are printed; JSON and pictures go to --output_dir, else to <save_path>/<name>-analysis. Exit
codes: 0 done, 1 disk full, 2 wrong input; of seeds also those of run.py.
"""

import argparse
import sys

from datasets import disable_progress_bars
from transformers.utils import logging as hf_logging

from analysis import ask, compare, curve, edits, export, faithful, look, prosqa, report, seeds
from engine.checkpoint import is_no_room
from engine.stop import EXIT_STOPPED, close_output
from utils import UserError

COMMANDS = {
    "ask": ask,
    "look": look,
    "prosqa": prosqa,
    "edits": edits,
    "faithful": faithful,
    "compare": compare,
    "curve": curve,
    "report": report,
    "seeds": seeds,
    "export": export,
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.run.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args, more = parser.parse_known_args(argv)  # KEY=VALUE may stand behind the options too
    if "config" not in args or any(text.startswith("-") for text in more):
        return parser.parse_args(argv)
    args.config += more
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        args.run(args)
        sys.stdout.flush()
    except UserError as error:
        return error.report()
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if args.command == "faithful" else ""
        print(f"stopped by a signal{goes_on}", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        return close_output()
    except Exception as error:  # of a full disk each library has another one
        if not is_no_room(error):
            raise
        print("error: the disk or a quota is full; make room, then type the same", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
