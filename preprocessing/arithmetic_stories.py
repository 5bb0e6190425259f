"""Seeded generator of arithmetic stories: GSM8K in miniature, for runs that take minutes on a CPU.

    python preprocessing/arithmetic_stories.py --output_dir data --prefix quickstart

writes data/quickstart_train.json and data/quickstart_validation.json, JSON lists of

    {"question": "Mia has 6 plums. She doubles them. She gives 5 to Ben. ... How many ...?",
     "steps": ["<<6*2=12>>", "<<12-5=7>>", ...], "answer": "7"}

A story is a counter that starts at a number and is changed one to five times: something is added or
taken away, the amount is doubled or halved. Each change is one step, and each step starts from the
result of the one before. All numbers are integers from 0 to --max_number.
Why this task: one step is a small lookup that a tiny model learns in seconds, but the operations do
not commute, so the answer needs the steps one after the other. Most stories have three steps or
more: a model with three stages of latents has to hold the whole chain of most rows in its latents.

Train and validation share no question. Every pair of (arguments, seed) gives the same files.
"""
import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

NAMES = {"Tom": "He", "Ben": "He", "Sam": "He", "Leo": "He",
         "Mia": "She", "Ann": "She", "Eva": "She", "Zoe": "She"}
THINGS = ("apples", "plums", "shells", "coins", "books", "cards", "beads", "stamps")
OPENING = ("{name} has {n} {things}.", "{name} starts with {n} {things}.")
CHANGES = {
    "+": ("{He} buys {k} more.", "{He} finds {k} more.", "{friend} brings {k} more."),
    "-": ("{He} loses {k}.", "{He} sells {k}.", "{He} gives {k} to {friend}."),
    "*": ("{He} doubles them.", "{friend} doubles them."),
    "/": ("{He} sells half.", "{He} gives half to {friend}."),
}
CLOSING = ("How many {things} does {name} have now?", "How many {things} are left?")
NUM_STEPS = (1, 2, 3, 4, 5)
STEP_WEIGHTS = (5, 10, 70, 10, 5)


def choices(value, max_number, max_change):
    """{operation: operands} that keep a counter at `value` an integer from 0 to max_number."""
    allowed = {
        "+": range(1, min(max_change, max_number - value) + 1),
        "-": range(1, min(max_change, value) + 1),
        "*": [2] if 0 < 2 * value <= max_number else [],
        "/": [2] if value > 0 and value % 2 == 0 else [],
    }
    return {op: operands for op, operands in allowed.items() if operands}
def apply(value, op, k):
    return {"+": value + k, "-": value - k, "*": value * k, "/": value // k}[op]

def story(rng, max_number, max_change):
    name, friend = rng.sample(sorted(NAMES), 2)
    words = {"name": name, "friend": friend, "He": NAMES[name], "things": rng.choice(THINGS)}
    value = rng.randint(1, max_number)
    sentences, steps = [rng.choice(OPENING).format(n=value, **words)], []
    for _ in range(rng.choices(NUM_STEPS, STEP_WEIGHTS)[0]):
        options = choices(value, max_number, max_change)
        op = rng.choice(sorted(options))
        k = rng.choice(options[op])
        sentences.append(rng.choice(CHANGES[op]).format(k=k, **words))
        result = apply(value, op, k)
        steps.append(f"<<{value}{op}{k}={result}>>")
        value = result
    sentences.append(rng.choice(CLOSING).format(**words))
    return {"question": " ".join(sentences), "steps": steps, "answer": str(value)}


def stories(n, seed, max_number=20, max_change=9):
    rng = random.Random(seed)
    rows = {}
    while len(rows) < n:
        row = story(rng, max_number, max_change)
        rows[row["question"]] = row
    return list(rows.values())
