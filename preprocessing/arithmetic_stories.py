"""Seeded generator of arithmetic stories: GSM8K in miniature, for runs that take minutes on a CPU.

    python preprocessing/arithmetic_stories.py --output_dir data --prefix quickstart

writes data/quickstart_train.json and data/quickstart_validation.json, lists of

    {"question": "Mia has 5 of 10 plums, Ben the rest. She wins 3, keeps half and swaps with Ben. "
                 "How many has she?",
     "steps": ["<<5+3=8>>", "<<8/2=4>>", "<<10-4=6>>"], "answer": "6"}

Two people share a fixed number of things; the amount of one of them changes one to five times. It
grows or shrinks by a few, is doubled, tripled, halved or cut to a third, or the two swap. A change
is a step, every step uses the result of the one before, and all results are integers from 0 to
--max_number.

Why this task: one step is a small table that a tiny model learns at once, but the changes do not
commute (a swap turns the sign of all that came before), so there is no short cut from the question
to the answer: the steps must be made one after the other. Stories of numbers that are only added,
subtracted, doubled and halved were too easy: a model of two layers answered them without a chain.
Most stories have three steps or more, so three stages of latents replace most chains entirely.

Train and validation share no question, nor any chain of three steps or more: validation asks for
chains of numbers that training never showed. The same arguments give the same files.

Longer chains than a model was trained on, in the same words and numbers, are another file:

    python preprocessing/arithmetic_stories.py --output_dir data --prefix long_stories --train 0 \\
        --steps 6 7 8
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# The scripts also run by path: the repository is then not on the module path.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from preprocessing.common import count, run_script, write_json_files

Change = tuple[int, str, int]  # left, operator, right

PRONOUNS = {
    "Tom": "he",
    "Ben": "he",
    "Sam": "he",
    "Leo": "he",
    "Mia": "she",
    "Ann": "she",
    "Eva": "she",
    "Zoe": "she",
}
THINGS = ("apples", "plums", "shells", "coins", "books", "cards", "beads", "stamps")
WORDINGS = {
    "add": ("wins {k}", "gets {k}", "takes {k}"),
    "subtract": ("loses {k}", "pays {k}", "returns {k}"),
    "double": ("doubles them",),
    "triple": ("triples them",),
    "halve": ("keeps half", "loses half"),
    "third": ("keeps a third",),
    "swap": ("swaps with {friend}",),
}
NUM_STEPS = {1: 5, 2: 10, 3: 70, 4: 10, 5: 5}  # how often, in percent
MAX_NUMBER = 10  # small enough to learn every step in minutes
MAX_CHANGE = 3
MAX_FAILURES = 10_000  # draws in a row that give no new row


def possible_changes(value: int, max_number: int, max_change: int) -> dict[str, list[Change]]:
    """{kind of change: its possible (left, operator, right)} for someone who has `value`."""
    changes: dict[str, list[Change]] = {
        "add": [(value, "+", k) for k in range(1, min(max_change, max_number - value) + 1)],
        "subtract": [(value, "-", k) for k in range(1, min(max_change, value) + 1)],
        "double": [(value, "*", 2)] if 0 < 2 * value <= max_number else [],
        "triple": [(value, "*", 3)] if 0 < 3 * value <= max_number else [],
        "halve": [(value, "/", 2)] if value > 0 and value % 2 == 0 else [],
        "third": [(value, "/", 3)] if value > 0 and value % 3 == 0 else [],
        "swap": [(max_number, "-", value)],
    }
    return {kind: steps for kind, steps in changes.items() if steps}


def calculate(left: int, operator: str, right: int) -> int:
    results = {"+": left + right, "-": left - right, "*": left * right}
    return left // right if operator == "/" else results[operator]


def tell(
    name: str, friend: str, value: int, max_number: int, things: str, changes: list[str]
) -> str:
    """The text of a story from its parts; `changes` are phrases."""
    pronoun = PRONOUNS[name]
    told = " and ".join(filter(None, [", ".join(changes[:-1]), changes[-1]]))
    return (
        f"{name} has {value} of {max_number} {things}, {friend} the rest. "
        f"{pronoun.capitalize()} {told}. How many has {pronoun}?"
    )


def make_story(
    rng: random.Random, max_number: int, max_change: int, num_steps: dict[int, int]
) -> dict:
    """One row, drawn with the random.Random `rng`. num_steps: {number of steps: its weight}."""
    name, friend = rng.sample(sorted(PRONOUNS), 2)
    start = value = rng.randint(1, max_number)
    phrases, steps = [], []
    for _ in range(rng.choices(list(num_steps), list(num_steps.values()))[0]):
        changes = possible_changes(value, max_number, max_change)
        kind = rng.choice(sorted(changes))
        left, operator, right = rng.choice(changes[kind])
        phrases.append(rng.choice(WORDINGS[kind]).format(k=right, friend=friend))
        value = calculate(left, operator, right)
        steps.append(f"<<{left}{operator}{right}={value}>>")
    question = tell(name, friend, start, max_number, rng.choice(THINGS), phrases)
    return {"question": question, "steps": steps, "answer": str(value)}


def make_stories(
    sizes: list[int],
    seed: int,
    max_number: int = MAX_NUMBER,
    max_change: int = MAX_CHANGE,
    steps: list[int] | None = None,
) -> list[list[dict]]:
    """A list of rows for every size. The same arguments give the same rows, in the same order.

    steps: numbers of steps, each as often; None: as NUM_STEPS says.
    A question occurs once; a chain of three steps or more (all its numbers) in one list only.
    Raises ValueError where the numbers are too small for so many different stories, or a story
    would have no step.
    """
    if max_number < 2:
        raise ValueError(f"max_number: {max_number} things are too few to share; give 2 or more")
    if steps is not None and not (steps and min(steps) >= 1):
        raise ValueError(f"steps: {steps}: a story has at least one; give numbers from 1 up")
    num_steps = NUM_STEPS if steps is None else dict.fromkeys(steps, 1)
    rng = random.Random(seed)
    questions: set[str] = set()
    owners: dict[tuple[str, ...], list[dict]] = {}
    parts: list[list[dict]] = [[] for _ in sizes]
    for part, size in zip(parts, sizes):
        failures = 0
        while len(part) < size:
            if failures == MAX_FAILURES:
                raise ValueError(
                    f"max_number: {max_number}, max_change: {max_change} give too few "
                    f"stories for {' + '.join(map(str, sizes))} different rows"
                )
            row = make_story(rng, max_number, max_change, num_steps)
            chain = tuple(row["steps"])
            taken = len(chain) >= 3 and owners.setdefault(chain, part) is not part
            if row["question"] in questions or taken:
                failures += 1
                continue
            failures = 0
            questions.add(row["question"])
            part.append(row)
    return parts


def all_wordings(max_number: int) -> Iterator[str]:
    """Texts that hold every word and every number, each in every place, that a story can hold."""
    numbers = range(max_number + 1)
    for name in PRONOUNS:
        phrases = [
            wording.format(k=k, friend=name)
            for wordings in WORDINGS.values()
            for wording in wordings
            for k in numbers
        ]
        for things in THINGS:
            yield tell(name, name, 0, max_number, things, phrases) + "\n"
    yield from (f"<<{n}{operator}{n}={n}>>\n### {n}" for n in numbers for operator in "+-*/")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--prefix", default="quickstart", help="how the files' names start")
    parser.add_argument("--train", type=count, default=8000, help="rows")
    parser.add_argument("--validation", type=count, default=400, help="rows")
    parser.add_argument("--max_number", type=count, default=MAX_NUMBER, help="things shared")
    parser.add_argument("--max_change", type=count, default=MAX_CHANGE, help="most won or lost")
    parser.add_argument(
        "--steps",
        type=count,
        nargs="+",
        help="of a story, such as 6 7 8, each as often (default: 1 to 5, mostly 3)",
    )
    parser.add_argument("--seed", type=count, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sizes = {"validation": args.validation, "train": args.train}
    parts = make_stories(
        list(sizes.values()), args.seed, args.max_number, args.max_change, args.steps
    )
    paths = [args.output_dir / f"{args.prefix}_{part}.json" for part in sizes]
    write_json_files(dict(zip(paths, parts)))
    for path, rows in zip(paths, parts):
        print(f"{path}: {len(rows)} rows" + ("" if rows else ", not written"))


if __name__ == "__main__":
    run_script(main)
