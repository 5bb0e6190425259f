"""Whether the answers come from the latents: every intervention on all rows, controls, a verdict.

What is done to latents is defined in interventions.py, the positive control in chains.py, the probe
in linear_probe.py, what the figures mean and the rules of the verdict in verdict.py.
"""

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from analysis import pictures, verdict
from analysis.branches import check_branches
from analysis.chains import Chains, same_rows
from analysis.edits import describe_edits, follow_the_edit, show_edits
from analysis.interventions import (
    EACH,
    MISSING,
    SUPPLIED,
    Answers,
    Latents,
    choose_donors,
    counted,
    progress,
)
from analysis.linear_probe import FOLDS, LEAST_OF_LABEL, probe_latents
from analysis.output import add_config, check_output, write_json
from analysis.probe import Probe, build_probe, read_config, rows_to_ask
from analysis.prosqa import read_graphs
from analysis.row_files import accuracy_by_file, describe_files, read_row_files, show_rows
from engine.inputs import Inputs
from engine.partial import state_of_weights
from engine.preflight import gather_inputs
from engine.support import max_positions
from utils import Config, Method, UserError, derive_seed

NAMES = ("faithful.json", "faithful.png")
PARTIAL = "faithful-partial.json"
LEAST_ROWS = FOLDS * LEAST_OF_LABEL // 2  # two labels that can be probed
SIGMA = 100.0  # as in the published studies of noise in latents
MOST_SIGMA = 1e18  # its square is a number in float32, as norms need it


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument(
        "--cot",
        action="append",
        metavar="CONFIG|KEY=VALUE",
        help="a CoT run on the same rows, the positive control; more of them: KEY=VALUE of it",
    )
    command.add_argument(
        "--rows_of",
        action="append",
        default=[],
        metavar="FILE",
        help="longer chains, say: accuracy",
    )
    command.add_argument(
        "--edits", action="store_true", help="of ProsQA: rewrite the edge that decides an answer"
    )
    command.add_argument("--sigma", type=float, default=SIGMA, help="of the added noise")
    command.add_argument("--output_dir", type=Path)


def run(args: argparse.Namespace) -> None:
    """Whether the answers come from the latents: all interventions, controls, a verdict."""
    config = read_config(*args.config)
    folder = args.output_dir or config.run_dir
    check_output(folder, *NAMES, PARTIAL)
    if not 0 <= args.sigma <= MOST_SIGMA:
        raise UserError(
            f"--sigma: {args.sigma} is no size of a noise; give a number from 0 to {MOST_SIGMA:g}"
        )
    check_method(config)
    files = read_row_files(config, args.rows_of)
    graphs = read_graphs(config) if args.edits else []
    with of_control():
        control = read_config(*args.cot) if args.cot else None
        if control is not None and control.method is not Method.COT:
            raise UserError(f"a run of method cot is needed, this one is {control.method.value}")
    inputs = gather_inputs(config)
    check_branches(inputs.hf_config)
    check_rows(inputs)
    with of_control():
        control_inputs = None if control is None else gather_inputs(control)
        if control_inputs is not None:
            check_same_rows(inputs, control_inputs)
    partial = Partial(folder / PARTIAL)
    probe = build_probe(inputs)
    check_other_rows(probe, files, graphs)
    if control_inputs is not None:
        with of_control():  # with the run's model, as no model is asked here
            check_other_rows(dataclasses.replace(probe, inputs=control_inputs), files, graphs)
    found, falls, sections = examine_latents(probe, args.sigma, partial)
    found |= examine_other_rows(probe, files, graphs)
    del probe  # before the control's model is loaded
    chains, found["control"] = None, None
    if control_inputs is not None:
        probe = build_probe(control_inputs)
        found["control"], section = examine_chains(probe, args.sigma, partial)
        found["control"] |= examine_other_rows(probe, files, graphs)
        chains = found["control"]["rates"]
        sections.insert(3, section)
    lines = verdict.verdict(found, falls, chains, config.feeds_back)
    print("\n".join([*lines, *(section.text() for section in sections)]))
    print_other_rows(found, "")
    print_other_rows(found["control"] or {}, "the control:\n")
    found = {"checkpoint": str(inputs.start.source), "sigma": args.sigma, "verdict": lines, **found}
    found["sections"] = [vars(section) for section in sections]
    write_json(folder / NAMES[0], found)
    pictures.draw_faithful(found, folder / NAMES[1])
    partial.path.unlink()
    print(f"\nwritten: {folder}/{NAMES[0]} and {NAMES[1]}")


# ------------------------------------------------------------------------------- checks


@contextmanager
def of_control() -> Iterator[None]:
    """What is wrong meanwhile is said to be of the control."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"--cot: {problem}" for problem in error.problems)) from None


def check_same_rows(inputs: Inputs, control: Inputs) -> None:
    if not same_rows(inputs.validation.rows, control.validation.rows):
        raise UserError(
            f"its rows ({control.config.val_path}) are not those of the run "
            f"({inputs.config.val_path}); give both the same val_path and eval_subset_size"
        )


def check_method(config: Config) -> None:
    if config.method is not Method.COCONUT:
        raise UserError(
            f"faithful: a run of method {config.method.value} has no latents to intervene on"
        )
    if len(config.forced_latents) > 1:
        raise UserError("faithful: give one number of latents in eval_num_latents, not several")


def check_rows(inputs: Inputs) -> None:
    """Raise UserError where the rows are too few, differ in their latents, or leave no room for an
    answer behind the steps that these stand for."""
    dataset = rows_to_ask(inputs, inputs.config.forced_latents[0])
    if len(dataset) < LEAST_ROWS:
        raise UserError(
            f"faithful: {len(dataset)} rows are too few to exchange latents and to probe them, "
            f"it takes {LEAST_ROWS}; give a larger val_path, or eval_subset_size: null"
        )
    counts = sorted(set(dataset.num_latents.tolist()))
    if len(counts) > 1 or counts[0] == 0:
        raise UserError(
            f"faithful: the rows have {counts} latents; set eval_num_latents to one number above 0"
        )
    steps_from, rows = dataset.encoded.steps_from, np.arange(len(dataset))
    steps = steps_from[:, 0] - steps_from[rows, dataset.num_skipped]  # tokens that may be supplied
    longest = int((dataset.total_length - dataset.num_labels + steps).max())
    new, limit = inputs.config.max_new_tokens, max_positions(inputs.hf_config)
    if longest + new > limit:
        raise UserError(
            f"max_new_tokens: {new} behind a question, its latents and the steps that they stand "
            f"for ({longest} tokens) is above the {limit} positions of {inputs.config.model_id}"
        )


# ------------------------------------------------------------------------------- parts


class Partial:
    """The batches that are finished, in a file: a run that was stopped goes on from there."""

    def __init__(self, path: Path):
        self.path = path
        # {part: {"of": what it was computed from, "done": its batches}}
        self.parts: dict[str, Any] = {}
        with suppress(ValueError, FileNotFoundError):  # damaged: as if nothing had been done
            self.parts = json.loads(path.read_text(encoding="utf-8"))

    def collect(
        self, name: str, of: str, batches: list[list[int]], compute: Callable[[list[int]], dict]
    ) -> list[dict]:
        """The results of all batches; those in the file as they are there, where they are `of` the
        same rows, weights and options."""
        if self.parts.get(name, {}).get("of") != of:
            self.parts[name] = {"of": of, "done": []}
        done = self.parts[name]["done"]
        with progress(batches, name, len(done)) as bar:
            for rows in batches[len(done) :]:
                done.append(compute(rows))
                write_json(self.path, self.parts)
                bar.update(len(rows))
        return done


def computed_from(inputs: Inputs, sigma: float, donors: list[int]) -> str:
    """A hash of everything that answers under interventions depend on."""
    told = [
        donors,
        {**vars(inputs.config), "name": None, "save_path": None},
        inputs.validation.fingerprint,
        inputs.start.source and state_of_weights(inputs.start.source),
        sigma,
    ]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def merge_answers(results: list[dict]) -> dict[str, Answers]:
    """The answers of all rows by intervention."""
    merged: dict[str, dict[int, str | None]] = {}
    for result in results:
        for name, answers in result["answers"].items():
            merged.setdefault(name, {}).update(zip(result["rows"], answers))
    return {name: [of_rows[row] for row in sorted(of_rows)] for name, of_rows in merged.items()}


def merge_changes(results: list[dict], num_rows: int) -> dict[str, list]:
    """Means over all rows from the sums of the batches, shaped as they are; None, what is no number
    in the file of a run that goes on, makes none of a mean either."""

    def mean(parts: list) -> Any:
        if isinstance(parts[0], list):
            return [mean(list(of_place)) for of_place in zip(*parts)]
        return sum(math.nan if part is None else part for part in parts) / num_rows

    return {kind: mean([result["changes"][kind] for result in results]) for kind in EACH}


def examine_latents(
    probe: Probe, sigma: float, partial: Partial
) -> tuple[dict, verdict.Falls, list[verdict.Section]]:
    """Everything about the latents: values for JSON; how accuracy falls without them; sections."""
    latents = Latents(probe, probe.dataset(probe.config.forced_latents[0]), sigma)
    plain = latents.plain()
    donors = choose_donors(plain.answers, probe.text_format, probe.config.seed)
    results = partial.collect(
        "latents",
        computed_from(probe.inputs, sigma, donors),
        latents.batches(),
        lambda rows: latents.intervene(plain, donors, rows),
    )
    answers, count = merge_answers(results), latents.num_latents
    judge = verdict.Judge(probe.text_format, gold_answers(probe), plain.answers, donors)
    seed = derive_seed(probe.config.seed, "labels")
    found = {
        "latents": count,
        "rows": len(latents.dataset),
        "whole_chains": latents.whole_chains(),
        **verdict.figures(judge, answers, count),
        "changes": merge_changes(results, len(latents.dataset)),
        "probe": probe_latents(
            plain.states.double().cpu().numpy(),
            plain.question.double().cpu().numpy(),
            probe.rows,
            probe.inputs.curriculum.c_thought,
            seed,
        ),
        "own_answers": plain.answers,
        "donors": donors,
        "answers": answers,
    }
    sections = [
        verdict.count_section(found["by_number"]),
        verdict.all_section(found["all"]),
        verdict.each_section(found["each"]),
        *([verdict.change_section(found["changes"], "other")] if count > 1 else []),
        verdict.probe_section(found["probe"]),
    ]
    falls = (judge.difference(answers[counted(0, steps)]) for steps in (MISSING, SUPPLIED))
    return found, verdict.Falls(*falls), sections


def examine_chains(probe: Probe, sigma: float, partial: Partial) -> tuple[dict, verdict.Section]:
    """The same of the chains that a CoT model writes."""
    chains = Chains(probe, probe.dataset(None), sigma)
    written = chains.plain()
    donors = choose_donors(written.answers, probe.text_format, probe.config.seed)
    results = partial.collect(
        "chains",
        computed_from(probe.inputs, sigma, donors),
        chains.batches(),
        lambda rows: chains.intervene(written, donors, rows),
    )
    answers = merge_answers(results)
    judge = verdict.Judge(probe.text_format, gold_answers(probe), written.answers, donors)
    own = judge.rates(written.answers)
    rates = {name: judge.rates(of_name) for name, of_name in answers.items()}
    found = {
        "checkpoint": str(probe.inputs.start.source),
        "plain": own,
        "rates": rates,
        "own_answers": written.answers,
        "donors": donors,
        "answers": answers,
    }
    return found, verdict.chain_section(own, rates)


def numbers_of_latents(probe: Probe) -> list[int]:
    """Those of the stage, and none; a written chain has none."""
    latents = int(probe.dataset(probe.config.forced_latents[0]).num_latents[0])
    return list(dict.fromkeys([latents, 0]))


def check_other_rows(probe: Probe, files: dict[str, list[dict]], graphs: list[dict]) -> None:
    """Raise UserError where examine_other_rows() would. Only inputs are looked at."""
    numbers = numbers_of_latents(probe)
    for path, rows in files.items():
        show_rows(probe, rows, path, numbers)
    if graphs:
        show_edits(probe, graphs[: len(probe.rows)], numbers)


def examine_other_rows(
    probe: Probe, files: dict[str, list[dict]], graphs: list[dict]
) -> dict[str, dict]:
    """The accuracy on rows of other files, and on graphs with an edge rewritten."""
    numbers = numbers_of_latents(probe)
    found: dict[str, dict] = {}
    if files:
        found["other_rows"] = accuracy_by_file(probe, files, numbers)
    if graphs:
        found["edits"] = follow_the_edit(probe, graphs[: len(probe.rows)], numbers)
    return found


def print_other_rows(found: dict, whose: str) -> None:
    """What examine_other_rows() found. whose: stands before each table."""
    if "edits" in found:
        print(f"\n{whose}{describe_edits(found['edits'])}")
    if "other_rows" in found:
        print(f"\n{whose}{describe_files(found['other_rows'])}")


def gold_answers(probe: Probe) -> list[str]:
    return [row["answer"] for row in probe.rows]
