"""Ask a checkpoint, look inside its thoughts, compare two runs.

    python -m analysis ask CONFIG --question "..." | --file FILE [--latents K]
    python -m analysis look CONFIG [--rows 0,1,2 | --question "..."] [--top 5]
    python -m analysis prosqa CONFIG [--latents 0,1,2] [--rows 0,1,2]
    python -m analysis compare A.jsonl B.jsonl
    python -m analysis curve RUN [RUN ...] [--output FILE]

CONFIG: a checkpoint or run folder, or YAML files with load_model_path=CHECKPOINT, and KEY=VALUE as
of run.py; eval_num_latents=K forces a number of latents. FILE holds one question a line, or rows
where its name ends in .json or .jsonl. A.jsonl: results of an evaluation, or the run folder with
them (the newest). `look` shows for every latent the nearest tokens, the norm of the state, and what
changes without it; `prosqa` classifies the written paths (paper, section 5) and shows the next
concept's probabilities after k latents. Tables are printed; JSON and pictures go to --output_dir,
else to <save_path>/<name>-analysis. Exit codes: 0 done, 2 wrong input.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from datasets import disable_progress_bars
from transformers.utils import logging as hf_logging

from analysis import pictures
from analysis.compare import compare_files
from analysis.probe import (
    NO_ANSWER,
    Probe,
    check_num_latents,
    load_probe,
    question_rows,
    read_config,
)
from analysis.prosqa import describe_paths, describe_tree, judge_paths, search_tree
from analysis.thoughts import look_into
from engine.curve import MARK, draw_curves
from engine.files import write_whole
from preprocessing.prosqa import read_prosqa
from preprocessing.textfiles import read_text
from rows import load_rows
from utils import Method, UserError

EXIT_WRONG_INPUT = 2
LOOK_ROWS, TREE_ROWS = 4, 3  # shown where --rows is not given
MAX_REPORTED = 10  # bad rows named in one message


def chosen_rows(text: str | None, default: int, probe: Probe) -> list[int]:
    """Row numbers of a comma-separated list. Raises UserError."""
    total = len(probe.rows)
    numbers = range(min(default, total)) if text is None else whole_numbers(text, "--rows")
    for number in numbers:
        if number >= total:
            raise UserError(
                f"--rows: there is no row {number} among the {total} of "
                f"{probe.config.val_path} (they count from 0)"
            )
    return list(numbers)


def whole_numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"{option}: {text!r} is not a list of numbers from 0 up, such as 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def check_output(folder: Path, *names: str) -> None:
    """Raise UserError, before anything is computed, where the folder cannot be made, or one of
    these files in it is not ours to replace."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"output: {folder} cannot be written, {existing} is not a folder that one may write to"
        )
    for path in (folder / name for name in names):
        if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()):
            raise UserError(f"output: {path} is not of analysis; move it, or give another name")


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {"made_by": MARK, **value}
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------- ask


def ask(args: argparse.Namespace) -> None:
    """Print question, full output and extracted answer of each question."""
    if args.latents is not None:
        args.config.append(f"eval_num_latents={args.latents}")
    probe = load_questions(args)
    warn_of_words(probe)
    for number in probe.config.forced_latents:
        warn_of_latents(probe, number)
        dataset = probe.dataset(number)
        completions = probe.complete(dataset, list(range(len(dataset))))
        for row, (example, new) in enumerate(zip(probe.rows, completions)):
            print(f"{dataset.num_latents[row]} latents")
            prompt = dataset.question(row).input_ids.tolist()
            print(probe.inputs.tokenizer.decode(prompt + new.tolist()))
            answer, gold = probe.text_format.answer(probe.text(new)), example["answer"]
            right = probe.text_format.same_answer(answer, gold)
            verdict = "right" if right else f"wrong, it is {gold}"
            graded = "" if gold == NO_ANSWER else f" ({verdict})"
            print(f"answer: {'(none)' if answer is None else answer}{graded}\n")


def warn_of_words(probe: Probe) -> None:
    """Say which parts of the questions the tokenizer does not know."""
    tokenizer = probe.inputs.tokenizer
    unknown: dict[str, None] = {}
    for row in probe.rows:
        question = row["question"] + "\n"  # as the model reads it: words may differ at an end
        encoding = tokenizer(question).encodings[0]
        for (start, stop), token in zip(encoding.offsets, encoding.ids):
            if token == tokenizer.unk_token_id:
                unknown[question[start:stop].strip()] = None
    if unknown:
        print(f"note: this model's tokenizer does not know {', '.join(unknown)}\n")


def warn_of_latents(probe: Probe, number: int | None) -> None:
    """Say so where more latents are asked for than the checkpoint was trained with."""
    inputs = probe.inputs
    trained, _ = inputs.curriculum.summary(inputs.stage(inputs.start.epochs_done))
    if number is not None and number > trained:
        print(f"note: {number} latents, but this checkpoint was trained with {trained} at most\n")


def load_questions(args: argparse.Namespace) -> Probe:
    """A probe with the questions of the command line as its rows. Raises UserError."""
    source = args.file or "--question"
    more = [f"val_path={json.dumps(source)}", "eval_subset_size=null", "debug=False"]
    config = read_config(*args.config, *more)
    rows = read_questions(args.question, args.file)
    if rows[0]["answer"] == NO_ANSWER:
        for number in config.forced_latents:
            check_num_latents(config, number)
    return load_probe(config, rows)


def read_questions(questions: list[str] | None, file: str | None) -> list[dict]:
    """The questions as rows of a data file, JSON rows as they are. Raises UserError."""
    if file and Path(file).suffix in (".json", ".jsonl"):
        return load_rows(file)
    if file:
        try:
            questions = read_text(file).split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"--file: cannot read {file}: {error}") from None
    questions = [question for question in questions or [] if question.strip()]
    if not questions:
        raise UserError('no question; give --question "..." or --file FILE')
    return question_rows(questions, file or "--question")


# ------------------------------------------------------------------------------- look


def look(args: argparse.Namespace) -> None:
    """What the latents hold, and what the answers lose without each."""
    config = read_config(*args.config)
    folder = args.output_dir or config.run_dir
    check_output(folder, "thoughts.json", "thoughts.png")
    if not config.feeds_back:
        raise UserError(
            "look: nothing is fed back here (latent_input: pause, or a method without "
            "latents); there are no thoughts to look into"
        )
    number, *more = config.forced_latents
    if more:
        raise UserError("look: give one number of latents in eval_num_latents, not several")
    probe = load_questions(args) if args.question else load_probe(config)
    default = len(probe.rows) if args.question else LOOK_ROWS
    dataset, rows = probe.dataset(number), chosen_rows(args.rows, default, probe)
    counts = sorted({int(dataset.num_latents[row]) for row in rows})
    if len(counts) > 1 or counts[0] == 0:
        raise UserError(
            f"look: the rows have {counts} latents; set eval_num_latents to one number above 0"
        )
    report = look_into(probe, dataset, rows, args.top, not args.question)
    print(pictures.describe_thoughts(report))
    write_json(folder / "thoughts.json", report)
    pictures.draw_thoughts(report, folder / "thoughts.png")
    print(f"written: {folder}/thoughts.json and thoughts.png")


# ------------------------------------------------------------------------------- ProsQA


def prosqa(args: argparse.Namespace) -> None:
    """Classes of the outputs and the search tree, for each number of latents."""
    config = read_config(*args.config)
    folder = args.output_dir or config.run_dir
    check_output(folder, "prosqa.json", "prosqa_paths.png")
    try:
        graphs = read_prosqa(str(config.val_path))
    except (OSError, ValueError) as error:
        raise UserError(*str(error).splitlines()[:MAX_REPORTED]) from None
    numbers = [number for number in config.forced_latents if number is not None]
    if args.latents is not None:
        numbers = whole_numbers(args.latents, "--latents")
    elif not numbers:
        numbers = list(range(config.max_latent_stage * config.c_thought + 1))
        numbers = numbers if config.method is Method.COCONUT else [0]
    if config.method is not Method.COCONUT and numbers != [0]:
        raise UserError(f"--latents: {numbers}, but this method has no latents; give --latents 0")
    probe = load_probe(config)
    graphs = graphs[: len(probe.rows)]
    rows = chosen_rows(args.rows, TREE_ROWS, probe)
    names = {row: f"prosqa_tree_row_{row}.png" for row in rows}
    check_output(folder, *names.values())
    datasets = {number: probe.dataset(number) for number in numbers}
    shares, right = {}, {}
    for number, dataset in datasets.items():
        shares[number], right[number] = judge_paths(probe, dataset, graphs)
    trees = [search_tree(probe, datasets, row, graphs[row]) for row in rows]
    print(describe_paths(shares, right, len(graphs)))
    print("\n".join(describe_tree(tree) for tree in trees))
    write_json(folder / "prosqa.json", {"shares": shares, "accuracy": right, "trees": trees})
    pictures.draw_paths(shares, right, len(graphs), folder / "prosqa_paths.png")
    for row, tree in zip(rows, trees):
        pictures.draw_trees(tree, folder / names[row])
    print(f"written: {folder}/" + ", ".join(["prosqa.json", "prosqa_paths.png", *names.values()]))


# ------------------------------------------------------------------------------- curve


def curve(args: argparse.Namespace) -> None:
    """Loss and accuracy of run folders by epoch, in one picture."""
    path = args.output or Path("curve.png" if len(args.runs) > 1 else args.runs[0] / "curve.png")
    check_output(path.parent, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(args.runs, path)
    print(f"written: {path}")


# ------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (ask, look, prosqa):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function, file=None, question=None)
        command.add_argument("config", nargs="+", metavar="YAML|KEY=VALUE", help="as of run.py")
        one_of = command.add_mutually_exclusive_group()
        if function is not prosqa:
            one_of.add_argument("--question", action="append", help="may be given several times")
        if function is ask:
            one_of.add_argument("--file", help="one question a line; .json, .jsonl: rows")
            command.add_argument("--latents", help="number to force, or a list: [0, 2]")
            continue
        one_of.add_argument("--rows", help="of val_path, such as 0,1,2")
        command.add_argument("--output_dir", type=Path)
        if function is look:
            command.add_argument("--top", type=int, default=5, choices=range(1, 11))
        else:
            command.add_argument("--latents", help="numbers, default: all up to the last stage's")
    command = commands.add_parser("curve", help=curve.__doc__)
    command.set_defaults(function=curve)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    command.add_argument("--output", type=Path, help="default: curve.png, of one run in its folder")
    command = commands.add_parser("compare", help="paired comparison of two results files")
    command.add_argument("first")
    command.add_argument("second")
    args, more = parser.parse_known_args(argv)  # KEY=VALUE may stand behind the options too
    if args.command in ("compare", "curve") or any(text.startswith("-") for text in more):
        return parser.parse_args(argv)
    args.config += more
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        if args.command == "compare":
            print(compare_files(args.first, args.second))
        else:
            args.function(args)
    except UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
