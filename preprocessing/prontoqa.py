"""ProntoQA: from the official generator's file to the rows this program trains on.

With a copy of github.com/asaparov/prontoqa at f0145b867b3c106285ec9ea1941a3f6eb7c6162d, in it:

    python run_experiment.py --model-name json --model-size dummy --ordering random \\
        --num-trials 10000 --few-shot-examples 0 --ontology fictional \\
        --min-hops 5 --max-hops 5 --hops-skip 1

and here, with the file that makes:

    python preprocessing/prontoqa.py --input 5hop_0shot_random.json --output_dir data

writes prontoqa_train.json, prontoqa_validation.json and prontoqa_test.json, lists of

    {"question": "Tumpuses are gorpuses. ... Alex is a tumpus. True or false: Alex is happy.",
     "steps": ["Alex is a tumpus. Tumpuses are gorpuses.", ..., "Alex is happy."],
     "answer": "True"}

A step is a fact about the person and the rule applied to it; the last one is the conclusion alone.
The rows go to train, valid and test in the file's order, as in the ancestor (facebookresearch/
coconut, preprocessing/prontoqa.py), so that its checkpoints are never tested on rows they were
trained on; --seed shuffles them first. A problem that occurs again (the same sentences in any
order) is left out and counted: the three files share none.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

# The scripts also run by path: the repository is then not on the module path.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from preprocessing.common import count, read_json, run_script, write_json_files

PREFIX = "True or false: "
FIELDS = {"question": str, "query": str, "chain_of_thought": list, "answer": str}


def convert(example: Any) -> dict:
    """A row from a value {"test_example": {...}} of the official file. ValueError says what is bad.

    The chain alternates facts and rules and ends in the conclusion: one step per hop, and one more.
    """
    example = example.get("test_example") if isinstance(example, dict) else None
    if not isinstance(example, dict):
        raise ValueError("test_example: missing")
    for name, kind in FIELDS.items():
        if not isinstance(example.get(name), kind) or not example[name]:
            raise ValueError(f"{name}: missing, empty or not a value of type {kind.__name__}")
    query, chain, answer = example["query"], example["chain_of_thought"], example["answer"]
    if not all(isinstance(sentence, str) and sentence for sentence in chain):
        raise ValueError("chain_of_thought: holds something that is not a sentence")
    if len(chain) % 2 == 0:
        raise ValueError(
            f"chain_of_thought: {len(chain)} sentences, but facts and rules in turn "
            "and a conclusion are an odd number"
        )
    if not query.startswith(PREFIX):
        raise ValueError(f"query: {query!r} does not start with {PREFIX!r}")
    if chain[-1].replace(" not ", " ") != query[len(PREFIX) :].replace(" not ", " "):
        raise ValueError(f"chain_of_thought: its end {chain[-1]!r} does not settle {query!r}")
    if answer != str(chain[-1] == query[len(PREFIX) :]):
        raise ValueError(f"answer: {answer!r}, but {chain[-1]!r} is shown of {query!r}")
    return {
        "question": f"{example['question']} {query}",
        "steps": [" ".join(chain[k : k + 2]) for k in range(0, len(chain), 2)],
        "answer": answer,
    }


def read_official(path: str | Path) -> tuple[list[dict], int]:
    """(rows in file order, number of repeated problems left out). ValueError names the example."""
    examples = read_json(path)
    if not isinstance(examples, dict) or not examples:
        raise ValueError(f'{path}: not {{"example1": {{"test_example": ...}}, ...}}')
    rows: dict[tuple[str, ...], dict] = {}
    for name, example in examples.items():
        try:
            row = convert(example)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        facts, query = row["question"].rsplit(PREFIX, 1)
        rows.setdefault((query, *sorted(facts.split(". "))), row)
    return list(rows.values()), len(examples) - len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", required=True, help="5hop_0shot_random.json")
    parser.add_argument("--output_dir", default="data")
    for name, size in (("train", 9000), ("validation", 200), ("test", 800)):
        parser.add_argument(f"--{name}", type=count, default=size, help=f"rows (default {size})")
    parser.add_argument("--seed", type=count, help="shuffle before splitting (default: file order)")
    args = parser.parse_args()
    rows, repeated = read_official(args.input)
    sizes = {"train": args.train, "validation": args.validation, "test": args.test}
    needed = sum(sizes.values())
    if len(rows) < needed:
        raise ValueError(
            f"{args.input}: {len(rows)} different problems, but {needed} are needed; "
            "generate more (--num-trials) or ask for fewer rows"
        )
    if args.seed is not None:
        random.Random(args.seed).shuffle(rows)
    remaining = iter(rows)
    splits = {name: [next(remaining) for _ in range(size)] for name, size in sizes.items()}
    write_json_files(
        {Path(args.output_dir, f"prontoqa_{name}.json"): split for name, split in splits.items()},
        read=[Path(args.input)],
    )
    used = ", ".join(f"{size} {name}" for name, size in sizes.items())
    print(f"{used}; not used: {len(rows) - needed}, repeated: {repeated}")


if __name__ == "__main__":
    run_script(main)
