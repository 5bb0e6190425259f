"""Questions put to a checkpoint, on the command line or from a file."""

import argparse

from analysis.output import add_config
from analysis.probe import (
    NO_ANSWER,
    Probe,
    check_num_latents,
    load_probe,
    question_rows,
    read_config,
)
from loader import as_override
from preprocessing.textfiles import read_text
from rows import KINDS, kind_of, load_rows
from utils import UserError


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_config(command)
    one_of = command.add_mutually_exclusive_group()
    one_of.add_argument("--question", action="append", help="may be given several times")
    one_of.add_argument(
        "--file", help="one question a line, or rows (.json, .jsonl, .csv, .parquet)"
    )
    command.add_argument("--latents", help="number to force, or a list: [0, 2]")


def run(args: argparse.Namespace) -> None:
    """Print question, full output and extracted answer of each question."""
    if args.latents is not None:
        args.config.append(f"eval_num_latents={args.latents}")
    probe = load_questions(args.config, args.question, args.file)
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
    if unknown := unknown_words(probe):
        print(f"note: this model's tokenizer does not know {', '.join(unknown)}\n")


def unknown_words(probe: Probe) -> list[str]:
    """The parts of the questions that the tokenizer does not know, each once."""
    tokenizer = probe.inputs.tokenizer
    unknown: dict[str, None] = {}
    for row in probe.rows:
        question = row["question"] + "\n"  # as the model reads it: words may differ at an end
        encoding = tokenizer(question).encodings[0]
        for (start, stop), token in zip(encoding.offsets, encoding.ids):
            if token == tokenizer.unk_token_id:
                unknown[question[start:stop].strip()] = None
    return list(unknown)


def warn_of_latents(probe: Probe, number: int | None) -> None:
    """Say so where more latents are asked for than the checkpoint was trained with."""
    inputs = probe.inputs
    trained, _ = inputs.curriculum.summary(inputs.stage(inputs.start.epochs_done))
    if number is not None and number > trained:
        print(f"note: {number} latents, but this checkpoint was trained with {trained} at most\n")


def load_questions(arguments: list[str], questions: list[str] | None, file: str | None) -> Probe:
    """A probe with the questions of the command line as its rows. Raises UserError."""
    source = file or "--question"
    more = ["eval_sets=null", "eval_subset_size=null", "debug=False"]
    config = read_config(*arguments, as_override("val_path", source), *more)
    rows = read_questions(questions, file, config.data_columns)
    if rows[0]["answer"] == NO_ANSWER:
        for number in config.forced_latents:
            check_num_latents(config, number)
    return load_probe(config, rows)


def read_questions(
    questions: list[str] | None, file: str | None, data_columns: dict | None = None
) -> list[dict]:
    """The questions as rows of a data file, rows as they are. Raises UserError."""
    if file and kind_of(file) in KINDS:
        return load_rows(file, data_columns)
    if file:
        try:
            questions = read_text(file).split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"--file: cannot read {file}: {error}") from None
    questions = [question for question in questions or [] if question.strip()]
    if not questions:
        raise UserError('no question; give --question "..." or --file FILE')
    return question_rows(questions, file or "--question")
