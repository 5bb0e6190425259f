"""From answers under interventions to figures, sections of a report, and a verdict by rules.

    flips      answers that differ from the model's own, of all rows
    apart      the rows whose donor, the other row, has an answer and another one: where a swap
               can show
    follows    the other row's answer appears, of the rows apart
    intervals  95%, Wilson's; of differences between paired accuracies by bootstrap (compare.py)

The verdict has three lines. Their rules:

1. Accuracy without latents against the model's own, row by row. It falls where the interval of the
   difference lies above 0 and McNemar's exact p below 0.05 (of few rows that differ, all one way,
   resampling alone is too sure). Of the fall, what returns when the steps that the latents stood
   for are supplied in words belongs to the missing steps (at most all, at least nothing). The rest
   belongs to the latents where accuracy falls by the same rule from the model's own to that with
   the steps supplied. Steps that are a whole chain end with the answer: of how many rows, is said.
   Without stage mixing a model has not seen such inputs, so its own mistakes count to the latents.
2. Flips when all latents are another row's, of the rows apart. The answers depend on the latents
   where the interval lies above LITTLE, and hardly where it lies below; else neither is shown. The
   control, another row's written chain, says how much there is to flip (of two candidates a guess
   is the same one in half of the rows): they depend only partly where the interval lies below half
   of its flips, and at least partly where it holds that half. Where the control's own interval does
   not lie above LITTLE, nothing is concluded. Nor is anything where the model or the control writes
   an answer to less than half of the rows, as none are alike, or no two that differ; nor of pauses:
   they read no state.
3. A latent holds a fact of its step where the probe's interval lies above that of the same probe
   on the question's last state, on latent 1, which is fed a state that no latent has touched, and
   on shuffled labels. So latent 1 itself never does.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.compare import Paired, compare_answers
from analysis.interventions import ALL, EACH, MISSING, SUPPLIED, Answers, counted, replaced
from analysis.look import alike
from analysis.output import percent
from engine.evaluation import wilson_interval
from engine.text import TextFormat

LITTLE = 0.05  # flips that are little, whatever they come from
SIGNIFICANT = 0.05  # p of a fall
NOTHING = "nothing is concluded"
PAUSES = "2. Pauses read no state, so no replacement can reach an answer: line 1 is what there is."


@dataclass(frozen=True)
class Section:
    """A table of the report."""

    title: str
    note: str  # how to read it
    head: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        table = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(self.head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)) for line in table]
        return "\n".join([f"\n{self.title}", *([self.note] if self.note else []), *lines])


@dataclass(frozen=True)
class Judge:
    """How answers are counted: the rows' gold answers, the model's own, and those of the rows that
    give their states or chains."""

    text_format: TextFormat
    gold: list[str]
    plain: Answers
    donors: list[int]

    def correct(self, answers: Answers) -> list[bool]:
        return [self.text_format.same_answer(a, g) for a, g in zip(answers, self.gold)]

    def rates(self, answers: Answers) -> dict:
        """Counts and rates of the answers to one intervention."""
        text, total = self.text_format, len(self.gold)
        right = sum(self.correct(answers))
        flipped = [not alike(text, a, p) for a, p in zip(answers, self.plain)]
        flips, other = sum(flipped), [self.plain[donor] for donor in self.donors]
        apart = [
            i for i, o in enumerate(other) if o is not None and not alike(text, o, self.plain[i])
        ]
        apart_flips, apart_flips_interval = _rate([flipped[i] for i in apart])
        follows, follows_interval = _rate([alike(text, answers[i], other[i]) for i in apart])
        return {
            "accuracy": right / total,
            "accuracy_interval": wilson_interval(right, total),
            "answered": sum(answer is not None for answer in answers) / total,
            "flips": flips / total,
            "flips_interval": wilson_interval(flips, total),
            "apart": len(apart),
            "apart_flips": apart_flips,
            "apart_flips_interval": apart_flips_interval,
            "follows": follows,
            "follows_interval": follows_interval,
        }

    def difference(self, answers: Answers) -> Paired:
        """Accuracy of the model's own answers minus that of others."""
        own, others = np.array([self.correct(self.plain), self.correct(answers)], dtype=int)
        return compare_answers(own[None], others[None])


def _rate(of_rows: list[bool]) -> tuple[float, tuple[float, float]] | tuple[None, None]:
    """The share of rows, with its interval; None for both where there are no rows."""
    if not of_rows:
        return None, None
    return sum(of_rows) / len(of_rows), wilson_interval(sum(of_rows), len(of_rows))


# ------------------------------------------------------------------------------- verdict


def figures(judge: Judge, answers: dict[str, Answers], num_latents: int) -> dict:
    """The rates of all interventions: by_number {series: {number of latents: rates}}, all {kind:
    rates}, each [of latent k: {kind: rates}]. All latents with no steps supplied: the model's own.
    """
    every = {name: judge.rates(of_name) for name, of_name in answers.items()}
    every[counted(num_latents, MISSING)] = judge.rates(judge.plain)
    numbers = range(num_latents + 1)
    return {
        "by_number": {
            series: {n: every[counted(n, series)] for n in numbers if counted(n, series) in every}
            for series in (MISSING, SUPPLIED)
        },
        "all": {kind: every[replaced(None, kind)] for kind in ALL if replaced(None, kind) in every},
        "each": [{kind: every[replaced(k, kind)] for kind in EACH} for k in range(num_latents)],
    }


class Falls(NamedTuple):
    """Of the accuracy without latents, Judge.difference()."""

    missing: Paired  # the steps that they stood for are missing too
    supplied: Paired


def verdict(found: dict, falls: Falls, control: dict | None, feeds_back: bool) -> list[str]:
    """The three lines, by the rules above. found: figures(), its `probe`, and `whole_chains`, the
    share of rows of Latents.whole_chains(). control: rates of a written chain, by what replaces it.
    feeds_back: pauses do not."""
    return [
        fall_line(found["by_number"], falls, found["whole_chains"]),
        swap_line(found["all"], control) if feeds_back else PAUSES,
        probe_line(found["probe"]),
    ]


def _is_shown(fall: Paired) -> bool:
    return fall.difference_low > 0 and fall.p_value < SIGNIFICANT


def _ends(fall: Paired) -> str:
    return f"difference [{fall.difference_low:+.1%}, {fall.difference_high:+.1%}]"


def fall_line(by_number: dict, falls: Falls, whole_chains: float) -> str:
    own, without = by_number[MISSING][max(by_number[MISSING])], by_number[MISSING][0]
    fall = falls.missing.difference
    line = (
        f"from {percent(own['accuracy'], own['accuracy_interval'])} to "
        f"{percent(without['accuracy'], without['accuracy_interval'])} without latents "
        f"({_ends(falls.missing)})"
    )
    if not _is_shown(falls.missing):
        return f"1. Accuracy is not shown to fall: {line}."
    supplied = by_number[SUPPLIED][0]["accuracy"]
    of_steps = min(max(supplied - without["accuracy"], 0.0), fall)
    shown = _is_shown(falls.supplied)
    rest = f"{100 * (fall - of_steps):.1f}" if shown else "none are shown to belong"
    return (
        f"1. Accuracy falls {line}; of these {100 * fall:.1f} points {100 * of_steps:.1f} belong "
        f"to the missing written steps (supplied: {percent(supplied)}, {_ends(falls.supplied)}; in "
        f"{whole_chains:.1%} of the rows they end with the answer), {rest} to the latents."
    )


def swap_line(latents: dict[str, dict], chains: dict[str, dict] | None) -> str:
    """latents, chains: rates by what replaces them."""
    for whose, rates in (("model", latents), ("control", chains or {})):
        if rates and rates["same"]["answered"] < 0.5:
            answered = percent(rates["same"]["answered"])
            return f"2. The {whose} writes an answer to {answered} of the rows: {NOTHING}."
        if rates and rates["other"]["apart"] == 0:
            return f"2. The {whose} writes no two answers that differ: {NOTHING}."
    swap = latents["other"]
    low, high = swap["apart_flips_interval"]
    if low > LITTLE:
        how = "depend"
    elif high < LITTLE:
        how = "hardly depend"
    else:
        how = "are not shown to depend"
    line = f"Another row's latents change {_changes(swap)}"
    if not chains:
        return f"2. {line}: the answers {how} on the latents (how much, --cot CONFIG can tell)."
    control = chains["other"]
    line += f"; another row's written chain changes {_changes(control)}"
    if control["apart_flips_interval"][0] <= LITTLE:
        return f"2. {line}: the control itself fails, {NOTHING}."
    half = control["apart_flips"] / 2
    if how == "depend" and low <= half:
        how += " only partly" if high < half else " at least partly"
    return f"2. {line}: the answers {how} on the latents."


def _changes(rates: dict) -> str:
    flips = percent(rates["apart_flips"], rates["apart_flips_interval"])
    return (
        f"{flips} of the answers to {rates['apart']} rows where that row's is another, "
        f"{percent(rates['follows'])} into that row's"
    )


def probe_line(probes: list[dict]) -> str:
    if not probes:
        return "3. No fact of the gold steps is frequent enough to be probed."
    parts = []
    for fact in dict.fromkeys(probe["fact"] for probe in probes):
        of_fact = [probe for probe in probes if probe["fact"] == fact]
        holding = [str(probe["latent"]) for probe in of_fact if holds(probe)]
        which = f" ({', '.join(holding)})" if holding else ""
        parts.append(f"{fact} of its step {len(holding)} of {len(of_fact)} latents{which}")
    return "3. Read by a linear probe better than before any thought: " + "; ".join(parts) + "."


def holds(probe: dict) -> bool:
    least = probe["found"]["interval"][0]
    return all(least > probe[other]["interval"][1] for other in ("question", "first", "shuffled"))


# ------------------------------------------------------------------------------- sections

RATES = ["accuracy", "flips", "follows the other", "answers written"]


def rate_cells(rates: dict) -> list[str]:
    return [
        percent(rates["accuracy"], rates["accuracy_interval"]),
        percent(rates["flips"], rates["flips_interval"]),
        percent(rates["follows"], rates["follows_interval"]),
        percent(rates["answered"]),
    ]


def count_section(by_number: dict[str, dict[int, dict]]) -> Section:
    """Accuracy by the number of latents, with the removed steps missing and supplied."""
    rows = []
    for n, missing in by_number[MISSING].items():
        cells = rate_cells(missing)
        supplied = by_number[SUPPLIED].get(n)
        beside = ["-"] * 4 if supplied is None else rate_cells(supplied)
        rows.append([str(n), cells[0], cells[3], beside[0], beside[3]])
    note = (
        "steps supplied: the gold steps that the removed latents stood for are given in words "
        "(-: no whole step is removed; last line: all of them beside all latents)"
    )
    head = ["latents", "steps missing: accuracy", "answers written"]
    head += ["steps supplied: accuracy", "answers written"]
    return Section("Number of latents", note, head, rows)


def all_section(of_all: dict[str, dict]) -> Section:
    rows = [[kind, *rate_cells(rates)] for kind, rates in of_all.items()]
    return Section("All latents replaced", "", ["by", *RATES], rows)


def each_section(each: list[dict[str, dict]]) -> Section:
    rows = [
        [
            str(k),
            *(
                f"{percent(r['flips'], r['flips_interval'])} {r['accuracy']:.1%}"
                for r in of_k.values()
            ),
        ]
        for k, of_k in enumerate(each, start=1)
    ]
    note = "flips [interval] and accuracy; later latents are computed from the new one"
    return Section("One latent replaced", note, ["latent", *EACH], rows)


def chain_section(plain: dict, rates: dict[str, dict]) -> Section:
    own = ["(nothing given)", *rate_cells(plain)]
    rows = [[kind, *rate_cells(of_kind)] for kind, of_kind in rates.items()]
    note = "the CoT model's own written chain, given back to it; it goes on from there"
    return Section("Control: a written chain replaced", note, ["by", *RATES], [own, *rows])


def change_section(changes: dict[str, list], kind: str) -> Section:
    """How far each later latent moves."""
    latents = len(changes[kind])
    rows = []
    for k, of_latent in enumerate(changes[kind]):
        cells = [f"{c:.2f} {d:.2f} {n:.2f}" for c, d, n in of_latent]
        rows.append([str(k + 1), *["-"] * k, *cells][:latents])
    note = (
        f"latent k replaced by: {kind}; of each later one cosine to what it was, length of the "
        "difference and of the new state over the old one's"
    )
    return Section("Latent to latent", note, ["k", *map(str, range(2, latents + 1))], rows[:-1])


def probe_section(probes: list[dict]) -> Section:
    rows = [
        [
            str(p["latent"]),
            f"{p['fact']} of step {p['step']}",
            *(
                percent(p[at]["accuracy"], p[at]["interval"])
                for at in ("found", "question", "first")
            ),
            percent(p["shuffled"]["accuracy"]),
            f"{p['most'] / p['rows']:.1%}",
            f"{p['rows']} rows, {p['labels']} labels",
        ]
        for p in probes
    ]
    read_from = ["the latent", "the question's last state", "latent 1", "shuffled labels"]
    head = ["latent", "fact", *read_from, "commonest label", "of"]
    return Section("Linear probe", "", head, rows)
