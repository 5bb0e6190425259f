"""All input of a run, checked together before anything expensive."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from coconut import LATENT, MARKERS, add_latent_tokens, single_token_id
from dataset import Encoded, LatentTokens, StageDataset, set_aside
from engine.adapters import Adapters, find_adapters
from engine.checkpoint import as_checkpoint
from engine.distributed import all_gather, on_all, one_of_each_node_first, this_node
from engine.encoding import encode_rows
from engine.files import cache_dir
from engine.inputs import Inputs, barred_tokens, text_format
from engine.launch import is_main_process, unused_gpu
from engine.logs import check_tensorboard
from engine.pretrained import check_has_weights, load_hf_config, load_tokenizer
from engine.start import Start, find_start
from engine.support import check_support, max_positions
from engine.weights import empty_model, fit_config, read_weights
from rows import load_rows, rows_with_questions
from step_loss import longest_sequence
from utils import Config, Method, UserError

# more than this many parameters are not trained on a CPU in anybody's lifetime
MAX_CPU_PARAMETERS = 1_000_000_000
DEBUG_TRAIN_ROWS, DEBUG_VAL_ROWS = 512, 32


class _Problems(list):
    """Collects the problems of several checks, so that they are reported together."""

    def attempt(self, check: Callable[..., Any], *args: Any) -> Any:
        try:
            return check(*args)
        except UserError as error:
            self.extend(error.problems)
        except OSError as error:  # a path that no file system takes
            self.append(f"{error.filename}: {error.strerror}")
        return None

    def report(self) -> None:
        """Raise UserError where there are any."""
        if self:  # a key that several checks need is named once
            raise UserError(*dict.fromkeys(self))


def gather_inputs(
    config: Config, expect: str | None = None, val_rows: list[dict] | None = None
) -> Inputs:
    """Read and check everything a run needs, in phases: what can be read independently, then what
    depends on several parts. Raises UserError with every problem of a phase, on all processes.

    expect: "fresh" (no checkpoints yet) or "continue" (some), as the training scripts demand.
    val_rows: checked rows to take in place of those of val_path.
    """
    read = on_all(lambda: _read(config, expect, val_rows))
    start, train_rows, val_rows, sets, hf_config, tokenizer, init_id = read
    fitted = on_all(lambda: _fit_parts(config, start, hf_config, tokenizer))
    barred = barred_tokens(tokenizer, fitted[1], hf_config)
    hf_config, latent_tokens, has_markers, adapters = fitted

    def encode_all() -> tuple[Encoded, Encoded, dict[str, Encoded]]:
        with one_of_each_node_first():  # the others find its cache
            return (
                encode(config, tokenizer, barred, train_rows, config.train_path),
                encode(config, tokenizer, barred, val_rows, config.val_path),
                _encode_sets(config, tokenizer, barred, sets),
            )

    rows, validation, eval_sets = on_all(encode_all)
    train, gate, copies = on_all(lambda: set_aside(rows, start.curriculum, latent_tokens, config))
    inputs = Inputs(
        config=config,
        start=start,
        hf_config=hf_config,
        tokenizer=tokenizer,
        latent_tokens=latent_tokens,
        barred=barred,
        marker_init_id=None if has_markers else init_id,
        adapters=adapters,
        curriculum=start.curriculum,
        train=train,
        gate=gate,
        copies=copies,
        too_long=len(rows) - len(train) - len(gate) - copies,
        validation=validation,
        eval_sets=eval_sets,
    )
    on_all(lambda: _check_lengths(inputs))
    _check_same_on_all_nodes(inputs)
    return inputs


def _fit_parts(
    config: Config, start: Start, hf_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedConfig, LatentTokens | None, bool, Adapters | None]:
    """The model's config as the weights have it, the latent tokens, which the tokenizer gets too,
    whether the whole weights know them, and the adapters. Raises UserError where the parts do not
    belong together."""
    problems, added = _Problems(), tokenizer.added_tokens_decoder.items()
    # special tokens without a row (Gemma's for images) are known to no text; see barred_tokens
    special = {token for token, known in added if known.special} - {tokenizer.eos_token_id}
    num_known = max({*range(len(tokenizer))} - special) + 1
    if num_known > hf_config.vocab_size:
        problems.append(
            f"model_id: the tokenizer of {config.model_id} has {num_known} tokens, its model rows "
            f"for {hf_config.vocab_size}; they do not belong together"
        )
    has_markers = LATENT in tokenizer.get_vocab()
    latent_tokens = None
    if config.method is Method.COCONUT:
        latent_tokens = LatentTokens(*add_latent_tokens(tokenizer))
    before, ids = len(problems), tuple(latent_tokens or ())
    adapters = problems.attempt(find_adapters, config, start.source, hf_config, ids)
    if len(problems) > before:  # what is below such adapters is not known
        problems.report()
    source = start.source if adapters is None else adapters.base_path
    if source is not None:
        fit = problems.attempt(_check_fit, source, config, hf_config, len(tokenizer))
        hf_config, has_markers = fit or (hf_config, has_markers)
    elif Path(config.model_id).is_dir() and not config.from_scratch:
        problems.attempt(_check_model_folder, Path(config.model_id), hf_config)
    problems.report()
    return hf_config, latent_tokens, has_markers, adapters


def _check_same_on_all_nodes(inputs: Inputs) -> None:
    """Raise UserError, on all processes, where a node has another run folder or other rows than
    the main process: nodes must share their files, the cache excepted."""
    config, start = inputs.config, inputs.start
    done = (start.epochs_done, start.first_epoch, start.resume and start.resume[1:])
    mine = [
        (f"save_path: {config.run_dir}", done),
        (f"train_path: {config.train_path}", inputs.train.fingerprint),
        (f"val_path: {config.val_path}", inputs.validation.fingerprint),
        *((_set_source(config, name), s.fingerprint) for name, s in inputs.eval_sets.items()),
    ]
    (main_node, wanted), *others = all_gather((this_node(), mine))
    problems = [
        f"{what} holds something else on {node} than on {main_node}; all nodes need the same"
        for node, theirs in others
        for (what, content), (_, main_content) in zip(theirs, wanted)
        if content != main_content
    ]
    if problems:
        raise UserError(*dict.fromkeys(problems))


def _read(config: Config, expect: str | None, val_rows: list[dict] | None) -> tuple[Any, ...]:
    """All that can be read independently: where to start, rows (none where they are not needed),
    those of eval_sets, the model's config, the tokenizer, the token that new markers start from."""
    problems, train_rows, init_id = _Problems(), [], None
    if not is_main_process():  # of a download, and of encoding
        datasets.disable_progress_bars()
    problems.attempt(check_tensorboard, config)
    start = problems.attempt(find_start, config, expect)
    if not config.only_eval:
        train_rows = problems.attempt(load_rows, config.train_path, config.data_columns)
    if val_rows is None:
        val_rows = []
        if not config.skip_validation and config.eval_sets is None:
            val_rows = problems.attempt(load_rows, config.val_path, config.data_columns)
    sets = {name: problems.attempt(_load_set, config, name) for name in config.eval_sets or {}}
    hf_config = problems.attempt(load_hf_config, config)
    if hf_config is not None:
        problems.attempt(check_has_weights, config)
        problems.attempt(_check_model, config, hf_config)
    tokenizer = problems.attempt(load_tokenizer, config)
    if tokenizer is not None and start is not None and start.weights is not None:
        problems.attempt(_check_tokens_of, start.weights, tokenizer, config)
    if tokenizer is not None and config.method is Method.COCONUT:
        init_id = problems.attempt(_marker_init_id, tokenizer, config)
    problems.report()
    limit = config.eval_subset_size
    if config.debug:
        beside = (
            0 if config.advance_at is None else rows_with_questions(train_rows, config.gate_rows)
        )
        train_rows = train_rows[: DEBUG_TRAIN_ROWS + beside]
        limit = min(DEBUG_VAL_ROWS, limit or DEBUG_VAL_ROWS)
    sets = {name: rows[:limit] for name, rows in sets.items()}
    return start, train_rows, val_rows[:limit], sets, hf_config, tokenizer, init_id


def _set_source(config: Config, name: str) -> str:
    """What messages call one of eval_sets."""
    return f"eval_sets: {name}: {config.rows_of(name)}"


def _load_set(config: Config, name: str) -> list[dict]:
    """The rows of one of eval_sets. Raises UserError naming it."""
    try:
        return load_rows(config.rows_of(name), config.data_columns)
    except UserError as error:
        raise UserError(*(f"eval_sets: {name}: {problem}" for problem in error.problems)) from None


def _encode_sets(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    barred: list[int],
    sets: dict[str, list[dict]],
) -> dict[str, Encoded]:
    """Raises UserError with the problems of all sets."""
    problems = _Problems()
    encoded = {
        name: problems.attempt(encode, config, tokenizer, barred, rows, _set_source(config, name))
        for name, rows in sets.items()
    }
    problems.report()
    return encoded


def encode(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    barred: list[int],
    rows: list[dict],
    source: str | None,
    cached: bool = True,
) -> Encoded:
    """Checked rows, ready for a data set. barred: tokens that no text may hold. source: what
    messages call them."""
    if not rows:
        return Encoded.nothing()
    folder = cache_dir() if cached else None
    return encode_rows(rows, tokenizer, barred, folder, str(source), text_format(config))


def _check_lengths(inputs: Inputs) -> None:
    """Check what only the encoded rows tell. Raises UserError."""
    config, done, problems = inputs.config, inputs.start.epochs_done, _Problems()
    if config.only_eval:
        numbers = config.forced_latents
        for name in [*inputs.eval_sets, *([None] if len(inputs.validation) else [])]:
            datasets = [inputs.validation_dataset(done, n, eval_set=name) for n in numbers]
            problems.attempt(check_prompts, datasets, config, inputs.hf_config, name)
    elif len(inputs.validation):
        problems.attempt(_check_validation_rows, inputs)
    if len(inputs.gate):
        datasets = [inputs.gate_dataset(1, stage) for stage in _stages_to_come(inputs)]
        problems.attempt(check_prompts, datasets, config, inputs.hf_config)
    if len(inputs.train):
        problems.attempt(_check_training_rows, inputs)
    problems.report()


def _stages_to_come(inputs: Inputs) -> list[int]:
    """Those that a training may have; of one at its end the last."""
    if inputs.config.advance_at is not None:
        return list(range(inputs.curriculum.last_stage + 1))
    return sorted(_first_epochs(inputs))


def _first_epochs(inputs: Inputs) -> dict[int, int]:
    """By stage, the first epoch still to come that has it, as far as that is known; of a training
    at its end the last epoch."""
    last, done = inputs.config.num_epochs, inputs.start.epochs_done
    return {inputs.stage(epoch): epoch for epoch in range(last, min(done, last - 1), -1)}


def _check_validation_rows(inputs: Inputs) -> None:
    """Raise UserError where a row with its chain, which the validation loss is taken of, has more
    tokens than positions, or a prompt leaves no room for an answer, at a stage of the run."""
    config, limit = inputs.config, max_positions(inputs.hf_config)
    datasets = [inputs.validation_dataset(1, stage=stage) for stage in _stages_to_come(inputs)]
    check_prompts(datasets, config, inputs.hf_config)
    for dataset in datasets:
        row = int(dataset.total_length.argmax())
        if (longest := int(dataset.total_length[row])) > limit:
            raise UserError(
                f"{config.val_path}: row {row} has {longest} tokens (latents included), above the "
                f"{limit} positions of {config.model_id}; leave it out"
            )


def _check_training_rows(inputs: Inputs) -> None:
    config, limit = inputs.config, max_positions(inputs.hf_config)
    problems = _Problems()
    if config.max_seq_length > limit:
        problems.append(
            f"max_seq_length: {config.max_seq_length} is above the {limit} positions of "
            f"{config.model_id}"
        )
    for epoch in sorted(_first_epochs(inputs).values()):
        if not inputs.plan_epoch(inputs.train_dataset(epoch), epoch, 1)[0]:
            problems.append(
                f"max_seq_length: all rows of {config.train_path} are longer than "
                f"{config.max_seq_length} tokens in epoch {epoch}"
            )
    if config.step_loss == "decoder":
        last = inputs.curriculum.last_stage
        if config.uniform_prob:  # draws stages of a row's own chain, which may be longer
            last = max(last, inputs.train.num_steps.max() * inputs.curriculum.stages_per_step)
        data = StageDataset(inputs.train, inputs.curriculum, inputs.latent_tokens, last)
        if (longest := longest_sequence(data)) > limit:
            problems.append(
                f"step_loss: decoder has a step of {longest} tokens (latents included) to write, "
                f"above the {limit} positions of {config.model_id}; take head, or other rows"
            )
    resume = inputs.start.resume
    if resume and resume.state().data != inputs.train.fingerprint:
        problems.append(
            f"train_path: the rows of {config.train_path} or their encoding are not those that "
            f"{resume.path} was trained on; start another run (name=...)"
        )
    problems.report()


# ------------------------------------------------------------------------------- checks


def _marker_init_id(tokenizer: PreTrainedTokenizerBase, config: Config) -> int:
    try:
        return single_token_id(tokenizer, config.marker_init_token)
    except Exception as error:  # noqa: BLE001 without a token for what is unknown: a bare one
        whose = "" if isinstance(error, ValueError) else "marker_init_token: this tokenizer: "
        raise UserError(f"{whose}{error}") from None


def _check_tokens_of(path: Path, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raise UserError where a checkpoint of ours was trained with other tokens, the markers apart,
    or with another end of the text than model_id has: it would never come to that end."""
    own = as_checkpoint(path.resolve())
    if own is None or own.path == Path(config.model_id).resolve():
        return
    theirs = load_tokenizer(replace(config, model_id=str(own.path), model_revision=None))
    ids, own_ids = ({**t.get_vocab(), **dict.fromkeys(MARKERS)} for t in (tokenizer, theirs))
    if ids != own_ids or tokenizer.eos_token != theirs.eos_token:
        raise UserError(
            f"model_id: the tokenizer of {config.model_id} is not that of {own.path} (other "
            "tokens, or another eos); take the model_id of its config.yaml"
        )


def _check_fit(
    path: Path, config: Config, hf_config: PreTrainedConfig, num_tokens: int
) -> tuple[PreTrainedConfig, bool]:
    """The model's config with the vocabulary rows of a checkpoint, and whether it knows the
    markers. Raises UserError where it does not hold the weights of this model and method."""
    weights = read_weights(path, hf_config)
    if weights.is_coconut and config.method is not Method.COCONUT:
        raise UserError(
            f"{path}: a coconut checkpoint cannot start a {config.method.value} run; "
            "give a checkpoint of the base model"
        )
    fitted = fit_config(weights, hf_config, num_tokens, str(path))
    return fitted, weights.is_coconut or fitted.vocab_size != hf_config.vocab_size


def _check_model_folder(folder: Path, hf_config: PreTrainedConfig) -> None:
    """Raise UserError where the weights in the folder of model_id are not those of its config."""
    name = f"model_id: {folder}"
    try:
        fit_config(read_weights(folder, hf_config), hf_config, hf_config.vocab_size, name)
    except UserError as error:
        raise UserError(f"model_id: {str(error).removeprefix('model_id: ')}") from None


def _check_model(config: Config, hf_config: PreTrainedConfig) -> None:
    """Raise UserError where latents cannot be had on this family, or training it here."""
    check_support(hf_config, config.model_id)
    model = empty_model(hf_config)
    if config.gradient_checkpointing and not model._no_split_modules:
        raise UserError(
            f"gradient_checkpointing: {config.model_id} does not name its blocks (the library's "
            f"{type(model).__name__}); set it to False"
        )
    count = sum(p.numel() for p in model.parameters())
    if count > MAX_CPU_PARAMETERS and not config.only_eval and not torch.cuda.is_available():
        raise UserError(
            f"model_id: {config.model_id} has {count / 1e9:.1f} billion parameters; training it "
            f"needs a CUDA GPU, and {unused_gpu() or 'this machine shows none'}; `bash "
            "train_fresh_start.sh args/quickstart.yaml` brings its own data and model and runs on "
            "any CPU"
        )


def check_prompts(
    datasets: list[StageDataset],
    config: Config,
    hf_config: PreTrainedConfig,
    eval_set: str | None = None,
) -> None:
    """Raise UserError, naming the set, where a prompt and its completion have more tokens than
    positions."""
    longest = max(int((d.total_length - d.num_labels).max()) for d in datasets)
    limit = max_positions(hf_config)
    if longest + config.max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens: {config.max_new_tokens} after a prompt of {longest} tokens (latents "
            f"included) is above the {limit} positions of {config.model_id}"
            + ("" if eval_set is None else f" (eval_sets: {eval_set})")
        )
