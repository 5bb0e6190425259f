"""A checkpoint for others: a folder of the library's with its model card, or the ancestor's file.

Whatever evaluation loads is exported as it is loaded, so a checkpoint of another program becomes a
folder too.
"""

import argparse
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from analysis.output import MARK, add_config, check_output
from analysis.probe import read_config
from analysis.upload import check_upload, list_files, upload
from curriculum import Curriculum
from engine.adapters import merge_adapters
from engine.card import describe_checkpoint
from engine.checkpoint import Checkpoint, as_checkpoint, free_bytes
from engine.curve import read_records
from engine.evaluation import Evaluation, table
from engine.files import WRITING, nearest
from engine.inputs import Inputs
from engine.model import build_model
from engine.partial import state_of_weights
from engine.preflight import gather_inputs
from engine.results import of_evaluations
from engine.weights import empty_model, read_weights, save_base
from rows import hub_name, load_rows
from utils import FIELDS, Config, Method, UserError

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# the settings that the card shows; config.yaml has all
SHOWN = (
    "num_epochs",
    "batch_size_training",
    "gradient_accumulation_steps",
    "rows_per_step",
    "lr",
    "lr_schedule",
    "warmup_steps",
    "weight_decay",
    "optimizer",
    "bf16",
    "float32_master_weights",
    "max_seq_length",
    "stage_mixing",
    "step_loss",
    "seed",
)


# the keys of adapters, as those of a model that they are merged into
WHOLE: dict[str, Any] = {name: FIELDS[name].default for name in FIELDS if name.startswith("lora_")}


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument("output", type=Path, help="folder to write; the file, of format coconut")
    command.add_argument(
        "--format",
        choices=("hf", "coconut"),
        default="hf",
        help="hf: a folder that from_pretrained opens (default); coconut: the original code's file",
    )
    command.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        help="run folder of an evaluation of this checkpoint, for the card; may be given again",
    )
    command.add_argument("--upload", metavar="OWNER/NAME", help="send the folder to the Hub")
    command.add_argument(
        "--dry-run", action="store_true", help="list what --upload would send, and send nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Write a checkpoint for others: a folder with a model card, or the original code's file."""
    config = read_config(*args.config, "val_path=none", "eval_sets=null")
    _check(args, config)
    inputs = gather_inputs(config, val_rows=[])
    source = inputs.start.source
    assert source is not None  # an evaluation has one
    own = as_checkpoint(source.resolve())
    evaluations = _evaluations(source, own, args.evaluation)
    base = _load(inputs, source, args.output)
    if args.format == "coconut":
        _write_file(args.output, ancestor_state(base, inputs))
        print(f"written: {args.output}")
        return
    name = args.upload or args.output.name
    _write_folder(args.output, base, inputs, own, name, evaluations)
    print(f"written: {args.output}")
    if args.dry_run:
        print(list_files(args.output, args.upload))
    elif args.upload:
        print(f"sent: {upload(args.output, args.upload)}")


# ------------------------------------------------------------------------------- checks


def _check(args: argparse.Namespace, config: Config) -> None:
    """Raise UserError where the arguments contradict each other, or the output is not ours."""
    output: Path = args.output
    if args.dry_run and not args.upload:
        raise UserError("--dry-run: lists what --upload would send; give --upload OWNER/NAME")
    if args.format == "coconut":
        if args.upload:
            raise UserError("--upload: sends a folder; leave --format coconut out")
        if config.method is Method.COCONUT and not config.feeds_back:
            raise UserError(
                f"--format coconut: the original code feeds hidden states back, and this model was "
                f"trained with latent_input: {config.latent_input}"
            )
    check_output(output.parent)
    if output.exists() and args.format == "coconut":
        raise UserError(f"output: {output} is there; move it, or give another name")
    if output.exists() and not _is_ours(output):
        raise UserError(f"output: {output} is there, and no export; give another name")
    if args.upload:
        check_upload(args.upload, send=not args.dry_run)


def _is_ours(folder: Path) -> bool:
    """Whether a folder was written by this command."""
    card = folder / "README.md"
    return card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")


def _load(inputs: Inputs, source: Path, output: Path) -> PreTrainedModel:
    """The whole model, as evaluation loads it, in the dtype that its file has; adapters are merged
    into the weights below them. Raises UserError,
    before that, where the output would find no room."""
    if inputs.adapters is None:
        weights = read_weights(source, inputs.hf_config)
        dtype, tensors = weights.dtype, list(weights.tensors.values())
    else:  # merged into the weights below them
        dtype = inputs.config.dtype
        tensors = list(empty_model(inputs.hf_config, dtype).parameters())
    need = sum(tensor.numel() for tensor in tensors) * dtype.itemsize
    have = free_bytes(nearest(output.absolute().parent))
    if have < need:
        raise UserError(f"output: {output} needs {need:,} bytes, and {have:,} are free")
    base = build_model(inputs, dtype).base_causallm
    if inputs.adapters is not None:
        merge_adapters(base)
    return base


# ------------------------------------------------------------------------------- write


def ancestor_state(base: Any, inputs: Inputs) -> dict[str, Tensor]:
    """The state dict that the original code's model of this method has (facebookresearch/coconut,
    coconut.py and run.py): a Coconut's vocabulary ends with the markers, and its embeddings have a
    second name. base is changed."""
    if inputs.config.method is not Method.COCONUT:
        return dict(base.state_dict())
    num_tokens = len(inputs.tokenizer)
    if base.get_input_embeddings().weight.shape[0] != num_tokens:
        base.resize_token_embeddings(num_tokens)
    state = {f"base_causallm.{name}": tensor for name, tensor in base.state_dict().items()}
    return state | {"embedding.weight": base.get_input_embeddings().weight.detach()}


def _write_file(path: Path, state: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(path.name + WRITING + "file")
    try:
        with open(writing, "wb") as file:  # of one that torch opens, the cause is lost
            torch.save(state, file)
        writing.rename(path)
    finally:
        writing.unlink(missing_ok=True)


def _write_folder(
    folder: Path,
    base: PreTrainedModel,
    inputs: Inputs,
    own: Checkpoint | None,
    name: str,
    evaluations: str,
) -> None:
    """Write the folder under another name first; of ours it replaces what stands there."""
    config = own.config() if own else inputs.config
    config = dataclasses.replace(config, **WHOLE)
    epoch = own.epoch if own else inputs.start.epochs_done
    step, stages = (own.step, own.state().stages) if own else (None, ())
    folder = folder.resolve()  # a link to a folder stays one
    writing = folder.with_name(folder.name + WRITING + "tmp")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        save_base(base, base.state_dict(), writing)
        inputs.tokenizer.save_pretrained(writing)
        more = f"{_training(own) if own else ''}{evaluations}\n<!-- {MARK} -->\n"
        describe_checkpoint(writing, name, config, inputs.tokenizer, epoch, step, stages, more)
        (writing / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        _replace(folder, writing)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _replace(folder: Path, writing: Path) -> None:
    """Give a written folder its name. Raises UserError where other files would be lost."""
    old = folder.with_name(folder.name + WRITING + "deleted")
    if folder.exists():
        foreign = sorted(
            str(file)
            for file in _files(folder) - _files(writing)
            if not WEIGHTS.fullmatch(str(file))
        )
        if foreign:
            raise UserError(
                f"output: {folder} holds {', '.join(foreign)}, which is not of an export; move it, "
                "or give another name"
            )
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    writing.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}


# ------------------------------------------------------------------------------- card


def _training(own: Checkpoint) -> str:
    """What the model was trained on and how, in Markdown."""
    config, state = own.config(), own.state()
    data = str(config.train_path)
    curriculum = Curriculum.from_config(config).table(config.num_epochs, state.stages)
    settings = ", ".join(f"`{name}: {getattr(config, name)}`" for name in SHOWN)
    return (
        "## Training\n\n"
        f"- training data: `{_short_names([data])[data]}`{_count_rows(data, config)}\n"
        f"- seen: {state.samples_seen:,} rows in {state.global_step:,} optimizer steps\n"
        f"- settings: {settings}\n\n"
        f"The curriculum:\n\n```text\n{curriculum}\n```\n\n"
    )


def _count_rows(data: str, config: Config) -> str:
    """The rows of a file, where it is still there, as text."""
    try:
        return "" if hub_name(data) else f", {len(load_rows(data, config.data_columns)):,} rows"
    except UserError:  # it was moved or changed since
        return ""


def _evaluations(source: Path, own: Checkpoint | None, run_dirs: list[Path]) -> str:
    """The figures of the checkpoint's own run and of these evaluations, in Markdown."""
    records: list[dict] = []
    if own is not None and own.step is None and (own.path.parent / "metrics.jsonl").is_file():
        data = str(own.config().val_path)
        of_run = of_evaluations(read_records(own.path.parent))
        records += [{**r, "data": data} for r in of_run if r["epoch"] == own.epoch]
    for run_dir in run_dirs:
        records += _evaluations_of(source, run_dir)
    found: dict[tuple[str, int], dict[str, Evaluation]] = {}  # by data, rows and latents: newest
    names = [field.name for field in dataclasses.fields(Evaluation) if field.name != "sampled"]
    for record in records:
        evaluation = Evaluation(**{name: record[name] for name in names})
        found.setdefault((record["data"], record["rows"]), {})[record["latents"]] = evaluation
    if not found:
        return "## Results\n\nNo evaluation was found beside the checkpoint.\n"
    text = "## Results\n\nGreedy decoding; intervals are Wilson's.\n"
    short = _short_names([data for data, _ in found])
    for (data, rows), figures in found.items():
        text += f"\n`{short[data]}`, {rows:,} rows:\n\n"
        text += table([figures[latents] for latents in sorted(figures, key=_most)])
    if own is not None and own.config().method is Method.COCONUT:
        control = any("0" in figures for figures in found.values())
        text += "\n" + (CONTROL if control else NO_CONTROL)
    return text


CONTROL = "The row with 0 latents is the control: the same weights without any thought.\n"
NO_CONTROL = "The control, the same weights with 0 latents, was not evaluated.\n"


def _most(latents: str) -> int:
    """The largest number of latents of an evaluation: 6 of "0-6"."""
    return int(latents.split("-")[-1])


def _evaluations_of(source: Path, run_dir: Path) -> list[dict]:
    """The records that a run folder has of this checkpoint. Raises UserError where it has none."""
    records = of_evaluations(read_records(run_dir))
    of_path = [r for r in records if r.get("checkpoint") == str(source.resolve())]
    written = max(mtime for _, mtime in state_of_weights(source).values())
    of_source = [r for r in of_path if 1e9 * r["time"] >= written]
    if of_path and not of_source:
        raise UserError(
            f"--evaluation: the files of {source} are newer than its evaluation in {run_dir}; "
            "evaluate it again, or give them their old times (cp -p, rsync -t)"
        )
    if not of_source:
        others = sorted({r["checkpoint"] for r in records if "checkpoint" in r})
        raise UserError(
            f"--evaluation: {run_dir} holds no evaluation of {source}"
            + (f", but of {', '.join(others)}" if others else "; only_eval makes one")
        )
    return of_source


def _short_names(data: list[str]) -> dict[str, str]:
    """What a card calls data sets: files by as few last parts of their paths as tell them apart."""
    short = {}
    for name in data:
        parts, length = Path(name).parts, 1
        others = {Path(other).parts for other in data} - {parts}
        while length < len(parts) and any(o[-length:] == parts[-length:] for o in others):
            length += 1
        short[name] = name if hub_name(name) else "/".join(parts[-length:])
    return short
