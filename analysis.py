"""Ask a checkpoint, look inside its thoughts, compare two runs.

    python analysis.py ask CONFIG [KEY=VALUE ...] --question "..." | --file FILE
    python analysis.py look CONFIG [KEY=VALUE ...] [--rows 0,1,2] [--top 5]
    python analysis.py prosqa CONFIG [KEY=VALUE ...] [--latents 0,1,2] [--rows 0]
    python analysis.py compare A.jsonl B.jsonl

CONFIG is a YAML of run.py whose load_model_path names the checkpoint; eval_num_latents=K forces a
number of latents. FILE holds one question a line, or rows in JSON. `look` shows for every latent
the tokens under the head, the norm of the state, and what changes without it; `prosqa` classifies
the written paths (paper, section 5) and shows the next concept's probabilities after k latents.
Tables are printed; JSON and pictures go to --output_dir, else to <save_path>/<name>-analysis.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging as hf_logging

import pictures
from coconut import Coconut, EditLatent
from dataset import Curriculum, StageDataset, collate, encode_rows, load_rows
from distributed import Processes, open_processes
from evaluation import compare, extract_answer, read_results, same_answer
from graphs import describe_paths, describe_tree, judge_paths, search_tree
from inputs import Inputs, build_model, check_prompts, gather_inputs
from preprocessing.prosqa import read_prosqa
from utils import Config, UserError, load_config, write_whole

EXIT_WRONG_INPUT = 2
NOTHING = "?"  # gold answer of a question that was only asked
KINDS = ("zero", "mean", "other")



class Subject(NamedTuple):
    """A checkpoint with the rows to show it."""

    config: Config
    inputs: Inputs
    model: Coconut
    encoded: object
    device: torch.device

    def dataset(self, num_latents: int | None) -> StageDataset:
        """The rows at the checkpoint's stage. Raises UserError where they exceed the positions."""
        curriculum = Curriculum.from_config(self.config)
        stage = curriculum.stage(self.inputs.start.epochs_done)
        dataset = StageDataset(self.encoded, curriculum, self.inputs.tokens, stage, num_latents)
        check_prompts([dataset], self.config, self.inputs.hf_config)
        return dataset

    @torch.no_grad()
    def complete(self, dataset, rows: list[int], edit: EditLatent | None = None) -> list[Tensor]:
        """New tokens of each row."""
        batch = self.prompts(dataset, rows)
        return self.model.generate(
            batch["input_ids"], batch["attention_mask"], self.config.max_new_tokens,
            latent_columns=batch["latent_columns"], edit_latent=edit,
        )

    def prompts(self, dataset, rows: list[int]) -> dict:
        samples = [dataset.question(row) for row in rows]
        return self.on_device(collate(samples, self.inputs.pad_id, align_end=True))

    def on_device(self, batch: dict) -> dict:
        return {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def text(self, tokens) -> str:
        return self.inputs.tokenizer.decode(tokens, skip_special_tokens=True)


def load_subject(path: str, overrides: list[str], cache: str) -> Subject:
    config = load_config(path, [*overrides, "only_eval=True"])
    # the run folder of a training is no place for anything else
    config = dataclasses.replace(config, name=f"{config.name}-analysis")
    inputs = gather_inputs(config)
    markers = list(inputs.tokens or ())
    encoded = encode_rows(inputs.val_rows, inputs.tokenizer, markers, cache, config.val_path)
    processes: Processes = open_processes()
    model = build_model(config, inputs).to(processes.device).eval()
    return Subject(config, inputs, model, encoded, processes.device)


def chosen_rows(text: str, subject: Subject) -> list[int]:
    """Row numbers of a comma-separated list. Raises UserError."""
    numbers, total = whole_numbers(text, "--rows"), len(subject.inputs.val_rows)
    for number in numbers:
        if number >= total:
            raise UserError(f"--rows: there is no row {number} among the {total} of "
                            f"{subject.config.val_path} (they count from 0)")
    return numbers


def whole_numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"{option}: {text!r} is not a list of numbers from 0 up, such as 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------- ask


def ask(args, cache: str) -> None:
    """Print question, full output and extracted answer of each question."""
    rows = question_rows(args)
    path = Path(cache) / "questions.json"
    path.write_text(json.dumps(rows))
    overrides = [*args.overrides, f"val_path={json.dumps(str(path))}", "eval_subset_size=null"]
    subject = load_subject(args.config, overrides, cache)
    for number in subject.config.forced_latents:
        dataset = subject.dataset(number)
        for row in range(len(rows)):
            (new,) = subject.complete(dataset, [row])
            prompt = dataset.question(row).input_ids.tolist()
            print(subject.inputs.tokenizer.decode(prompt + new.tolist()))
            answer = extract_answer(subject.text(new))
            print(f"answer: {'(no ###)' if answer is None else answer}\n")


def question_rows(args) -> list[dict]:
    """The questions as rows of a data file; JSON rows as they are. Raises UserError."""
    if args.file and args.file.endswith(".json"):
        return load_rows(args.file)
    questions = args.question
    if args.file:
        try:
            questions = Path(args.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file: cannot read {args.file}: {error}") from None
    questions = [question.strip() for question in questions or [] if question.strip()]
    if not questions:
        raise UserError("ask: no question; give --question \"...\" or --file FILE")
    return [{"question": question, "steps": [], "answer": NOTHING} for question in questions]


# ------------------------------------------------------------------------------- look


def look(args, cache: str) -> None:
    """What the latents hold, and what the answers lose without each."""
    subject = load_subject(args.config, args.overrides, cache)
    if subject.model.latent_token_id is None:
        raise UserError("look: nothing is fed back here (latent_input: pause, or a method without "
                        "latents); there are no thoughts to look into")
    (number, *more) = subject.config.forced_latents
    if more:
        raise UserError("look: give one number of latents in eval_num_latents, not several")
    dataset, rows = subject.dataset(number), chosen_rows(args.rows, subject)
    counts = sorted({int(dataset.num_latents[row]) for row in rows})
    if len(counts) > 1 or counts[0] == 0:
        raise UserError(f"look: the rows have {counts} latents; set eval_num_latents to one number "
                        "above 0")
    found = look_into(subject, dataset, rows, args.top)
    print(describe_thoughts(found))
    folder = args.output_dir or subject.config.run_dir
    write_json(folder / "thoughts.json", found)
    pictures.draw_thoughts(found["rows"][0], found["latents"], found["embedding_norm"],
                           folder / "thoughts.png")
    print(f"written: {folder}/thoughts.json and thoughts.png")


@torch.no_grad()
def look_into(subject: Subject, dataset: StageDataset, rows: list[int], top: int) -> dict:
    """Per row and latent: top tokens, norm, answers without it; per latent: means over the rows."""
    batch = subject.prompts(dataset, rows)
    names = ("input_ids", "attention_mask", "position_ids", "latent_columns")
    states = subject.model(**{name: batch[name] for name in names}).latents  # (B, K, D)
    base, tokenizer = subject.model.base_causallm, subject.inputs.tokenizer
    probabilities = base.get_output_embeddings()(states).float().softmax(-1)  # (B, K, V)
    best = probabilities.topk(min(top, probabilities.shape[-1]))
    embeddings = base.get_input_embeddings().weight[: len(tokenizer)].float()
    norms = states.float().norm(dim=-1)  # (B, K)
    plain = answers_of(subject, dataset, rows, None)
    gold = [subject.inputs.val_rows[row]["answer"] for row in rows]
    found = {
        "embedding_norm": float(embeddings.norm(dim=-1).mean()),
        "accuracy": share(same_answer(a, g) for a, g in zip(plain, gold)),
        "rows": [{"row": row, "question": subject.inputs.val_rows[row]["question"],
                  "gold_answer": gold[i], "answer": plain[i], "latents": []}
                 for i, row in enumerate(rows)],
        "latents": [],
    }
    for k in range(states.shape[1]):
        without = {kind: answers_of(subject, dataset, rows, edit)
                   for kind, edit in edits(states, k, embeddings.mean(0)).items()}
        found["latents"].append({
            "norm": float(norms[:, k].mean()),
            "changed": {n: share(a != p for a, p in zip(w, plain)) for n, w in without.items()},
            "accuracy": {n: share(same_answer(a, g) for a, g in zip(w, gold))
                         for n, w in without.items()},
        })
        for i, entry in enumerate(found["rows"]):
            entry["latents"].append({
                "norm": float(norms[i, k]),
                "top": [{"token": tokenizer.decode([token]), "probability": p} for token, p in
                        zip(best.indices[i, k].tolist(), best.values[i, k].tolist())],
                "answer_without": {kind: answers[i] for kind, answers in without.items()},
            })
    return found


def edits(states: Tensor, k: int, mean: Tensor) -> dict[str, EditLatent]:
    """Replacements of latent k: zeros, the mean embedding, the next row's (of several rows)."""
    values = {"zero": torch.zeros_like(states[:, k]),
              "mean": mean.to(states.dtype).expand_as(states[:, k])}
    if len(states) > 1:
        values["other"] = states[:, k].roll(-1, 0)
    return {kind: (lambda column, state, value=value: value if column == k else state)
            for kind, value in values.items()}


def answers_of(subject, dataset, rows, edit) -> list[str | None]:
    return [extract_answer(subject.text(new)) for new in subject.complete(dataset, rows, edit)]


def share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


def describe_thoughts(found: dict) -> str:
    lines = []
    for row in found["rows"]:
        lines += [f"row {row['row']}: {row['question']}",
                  f"answer {row['answer']}, gold {row['gold_answer']}"]
        for k, latent in enumerate(row["latents"], start=1):
            top = "  ".join(f"{t['token']!r} {t['probability']:.2f}" for t in latent["top"])
            without = ", ".join(f"{n}: {a}" for n, a in latent["answer_without"].items())
            lines.append(f"  latent {k}  norm {latent['norm']:7.2f}  {top}\n"
                         f"            answer with it replaced by {without}")
    lines.append(f"\n{len(found['rows'])} rows, accuracy {found['accuracy']:.1%}, mean embedding "
                 f"norm {found['embedding_norm']:.2f}; one latent replaced at a time:")
    lines.append("latent  norm     " + "".join(f"{n:>8}: changed, accuracy" for n in KINDS))
    for k, entry in enumerate(found["latents"], start=1):
        cells = "".join(f"{entry['changed'][n]:>17.1%}, {entry['accuracy'][n]:>8.1%}"
                        for n in KINDS if n in entry["changed"])
        lines.append(f"{k:<7} {entry['norm']:<8.2f} {cells}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- ProsQA


def prosqa(args, cache: str) -> None:
    """Classes of the outputs and the search tree, for each number of latents."""
    subject = load_subject(args.config, args.overrides, cache)
    try:
        graphs = read_prosqa(subject.config.val_path)[: len(subject.inputs.val_rows)]
    except ValueError as error:
        raise UserError(*str(error).splitlines()) from None
    numbers = subject.config.forced_latents
    if args.latents is not None:
        numbers = whole_numbers(args.latents, "--latents")
    elif numbers == [None]:
        numbers = list(range(subject.config.max_latent_stage * subject.config.c_thought + 1))
    if subject.inputs.tokens is None and numbers != [0]:
        raise UserError(f"--latents: {numbers}, but this method has no latents; give --latents 0")
    datasets = {number: subject.dataset(number) for number in numbers}
    shares, accuracy = {}, {}
    for number, dataset in datasets.items():
        shares[number], accuracy[number] = judge_paths(subject, dataset, graphs)
    trees = [search_tree(subject, datasets, row, graphs[row])
             for row in chosen_rows(args.rows, subject)]
    print(describe_paths(shares, accuracy, len(graphs)))
    print("\n".join(describe_tree(tree) for tree in trees))
    folder = args.output_dir or subject.config.run_dir
    write_json(folder / "prosqa.json", {"shares": shares, "accuracy": accuracy, "trees": trees})
    pictures.draw_paths(shares, accuracy, folder / "prosqa_paths.png")
    pictures.draw_trees(trees[0], folder / "prosqa_tree.png")
    print(f"written: {folder}/prosqa.json, prosqa_paths.png and prosqa_tree.png")


# ------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("ask", ask), ("look", look), ("prosqa", prosqa)):
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("config", help="YAML file, see args/")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
        if name == "ask":
            command.add_argument("--question", action="append")
            command.add_argument("--file")
            continue
        command.add_argument("--rows", default="0,1,2,3" if name == "look" else "0")
        command.add_argument("--output_dir", type=Path)
        if name == "look":
            command.add_argument("--top", type=int, default=5, choices=range(1, 11))
        else:
            command.add_argument("--latents", help="numbers, default: all up to the last stage's")
    command = commands.add_parser("compare", help="paired comparison of two results files")
    command.add_argument("first")
    command.add_argument("second")
    args, more = parser.parse_known_args(argv)  # KEY=VALUE may stand behind the options too
    if args.command == "compare" or any(text.startswith("-") for text in more):
        return parser.parse_args(argv)
    args.overrides += more
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        if args.command == "compare":
            print(compare(read_results(args.first), read_results(args.second)).line())
        else:
            with tempfile.TemporaryDirectory() as cache:
                args.function(args, cache)
    except UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return EXIT_WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
