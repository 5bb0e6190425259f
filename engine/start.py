"""Where a run starts: anew, from other weights, or where it was interrupted."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from curriculum import Curriculum
from engine.checkpoint import NAME, Checkpoint, TrainState, as_checkpoint, find_checkpoints
from engine.files import check_writable, nearest
from engine.logs import read_metrics
from loader import own_config
from preprocessing.textfiles import how_to_make
from utils import Config, Method, UserError, log

# a run keeps these, or its epochs would not be one training
FIXED_KEYS = (
    "model_id",
    "method",
    "latent_input",
    "seed",
    "schedule",
    "c_thought",
    "epochs_per_stage",
    "advance_at",
    "gate_rows",
    "max_epochs_per_stage",
    "max_latent_stage",
    "pad_latent_to_max",
    "latent_growth",
    "stage_mixing",
    "uniform_prob",
    "step_loss",
    "step_loss_weight",
    "bf16",
    "float32_master_weights",
    "max_seq_length",
    "group_by_length",
    "answer_marker",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "optimizer",
    "lr",
    "weight_decay",
    "lr_schedule",
    "warmup_steps",
    "reset_optimizer",
)


# what a validation accuracy depends on beside the model
MEASURE_KEYS = ("val_path", "eval_subset_size", "data_columns", "answer_kind", "max_new_tokens")


class Start(NamedTuple):
    """Where a run starts. resume: checkpoint of this very run to go on from. weights: other
    checkpoint to take the weights from. epochs_done: epochs before the next one to run.
    first_epoch: the first epoch that this run ever ran. curriculum: the config's, but an evaluation
    of a checkpoint of ours has that of its training. stages: with advance_at those of the epochs
    from 1 on, as far as a checkpoint knows them."""

    resume: Checkpoint | None
    weights: Path | None
    epochs_done: int
    first_epoch: int
    curriculum: Curriculum
    stages: tuple[int, ...] = ()

    @property
    def source(self) -> Path | None:
        """The checkpoint that the weights come from; None: those of model_id."""
        return self.resume.path if self.resume else self.weights


def find_start(config: Config, expect: str | None) -> Start:
    """Where to start: an interrupted run goes on by itself. Raises UserError where the config
    and the run folder say different things."""
    if config.only_eval:
        return _evaluation_start(config)
    _check_run_dir(config)
    checkpoints = find_checkpoints(config.run_dir)
    if expect == "fresh" and checkpoints:
        raise UserError(
            f"{config.run_dir} already holds {checkpoints[-1].path.name}; go on from it with "
            "train_continue_fresh.sh, or start another run with name=..."
        )
    if not checkpoints:
        return _first_start(config, expect)
    if config.debug:
        raise UserError(
            f"debug: {config.run_dir} holds a training, and a rehearsal would write among its "
            "results; give the rehearsal another name"
        )
    newest = checkpoints[-1]
    state, done = newest.state(), newest.epochs_done
    what = Curriculum.from_config(config), tuple(state.stages)
    _check_same_run(config, checkpoints)
    if newest.has_optimizer:
        return Start(newest, None, done, state.first_epoch, *what)
    if not _names_weights_of(config, newest):
        raise UserError(f"{newest.path}: holds weights only; {newest.use_weights()}")
    return Start(newest, None, done, done + 1, *what)


def _first_start(config: Config, expect: str | None) -> Start:
    """Where to start in a run folder without checkpoints."""
    weights, done = weights_path(config), config.resume or 0
    if expect == "continue" and (weights is None or config.resume is None):
        raise UserError(
            f"{config.run_dir} holds no checkpoint to go on from; start with train_fresh_start.sh, "
            "or set both load_model_path and resume (the epochs that it is trained for) to go on "
            "from other weights"
        )
    _check_no_results(config)
    if done == config.num_epochs:
        raise UserError(f"resume: all {done} epochs are done; raise num_epochs to train more")
    _check_exists(weights)
    own = as_checkpoint(weights.resolve()) if weights and config.advance_at is not None else None
    stages = _known_stages(config, own)[: done + 1] if own and done else ()
    if own and stages:
        _check_same_stage(config, own, stages[-1])
    return Start(None, weights, done, done + 1, Curriculum.from_config(config), stages)


def _known_stages(config: Config, own: Checkpoint) -> tuple[int, ...]:
    """Those of a checkpoint's epochs from 1 on that Curriculum.stage is to be told: as its gate
    decided them; where it had none and this config has one, as its own schedule has them."""
    stages = tuple(own.state().stages)
    if stages or config.advance_at is None:
        return stages
    saved = Curriculum.from_config(own.config())
    return tuple(saved.stage(epoch) for epoch in range(1, own.epoch + 1))


def _check_no_results(config: Config) -> None:
    """Raise UserError where a run folder without checkpoints has results, which a training that
    begins would drop: of an evaluation, or of a training whose checkpoints were moved. A run that
    was killed before its first checkpoint has none, and a rehearsal's are no loss."""
    path, saved = config.run_dir / "metrics.jsonl", own_config(config.run_dir)
    if not path.exists() or (saved and saved.debug):
        return
    try:
        kinds = {record["kind"] for record in read_metrics(path)}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the records of this run folder: {error}") from None
    if kinds - {"train"}:
        raise UserError(
            f"{path}: holds results, of a run whose checkpoints are not here, and a training would "
            f"replace them; choose another name than {config.name}, or move the folder"
        )


def _check_same_stage(config: Config, own: Checkpoint, stage: int) -> None:
    """Raise UserError where a stage that a checkpoint was trained at is another one here."""
    saved, mine = Curriculum.from_config(own.config()), Curriculum.from_config(config)
    if stage > mine.last_stage or saved.summary(stage) != mine.summary(stage):
        raise UserError(
            f"{own.path} ends with {saved.describe(stage)}, which is no stage of this config (its "
            f"last: {mine.describe(mine.last_stage)}); use the curriculum of its config.yaml, or "
            "resume=0 to begin at stage 0"
        )


def _check_exists(weights: Path | None) -> None:
    if weights is not None and not weights.exists():
        raise UserError(f"{weights}: no such checkpoint{how_to_make(weights)}")


def weights_path(config: Config) -> Path | None:
    """load_model_path; of a run's folder the checkpoint after `resume` epochs, and of a file in a
    checkpoint of ours the checkpoint, whose config tells whether the weights know the markers."""
    if config.load_model_path is None:
        return None
    path = Path(config.load_model_path)
    if path.is_file() and as_checkpoint(path.parent):
        return path.parent
    by_epoch: dict[int | None, Path] = {
        own.epoch: own.path for own in find_checkpoints(path) if own.step is None
    }
    if by_epoch and config.resume not in by_epoch:
        raise UserError(
            f"load_model_path: {path} is the folder of a run; give one of its checkpoints "
            f"({', '.join(own.name for own in by_epoch.values())})"
        )
    return by_epoch.get(config.resume, path)


def _names_weights_of(config: Config, checkpoint: Checkpoint) -> bool:
    """Whether load_model_path and resume are this checkpoint and its epoch."""
    path = weights_path(config)
    same = path is not None and path.resolve() == checkpoint.path.resolve()
    return same and config.resume == checkpoint.epochs_done


def forget_best(state: TrainState, config: Config, saved: Config) -> None:
    """The best accuracy so far is no bar for epochs that are measured in another way: where the
    config of the checkpoint (saved) says so, the next epoch is the best."""
    changed = [key for key in MEASURE_KEYS if getattr(config, key) != getattr(saved, key)]
    if changed and state.best_epoch is not None:
        log.warning(
            f"{', '.join(changed)}: changed, so the accuracy of epoch {state.best_epoch}, the best "
            "so far, is no measure for the next ones: its checkpoint stays no longer than others"
        )
        state.best_accuracy = state.best_epoch = None


def describe_start(start: Start) -> str:
    """Which epoch comes next, and from what, as a part of a line."""
    text = f"at epoch {start.epochs_done + 1}"
    if start.resume:
        text += f" from {start.resume.path}"
    elif start.weights:
        text += f" from {start.weights}"
        own = as_checkpoint(start.weights)
        if own and own.epochs_done != start.epochs_done:
            text += f" (which is trained for {own.epochs_done} epochs)"
    elif start.epochs_done:
        text += " from the weights of model_id (resume is set, and load_model_path is not)"
    if start.weights or (start.resume and not start.resume.has_optimizer):
        text += ", with a new optimizer state"
    return text


def _check_run_dir(config: Config) -> None:
    """Raise UserError where the run folder cannot be, or something stands in a checkpoint's way."""
    run_dir = config.run_dir
    try:
        existing = nearest(run_dir)
    except OSError as error:
        raise UserError(f"save_path: {run_dir}: {error.strerror}") from None
    link = next((p for p in (run_dir, *run_dir.parents) if p.is_symlink() and not p.exists()), None)
    if link or not existing.is_dir():
        what = f"{link} leads nowhere" if link else f"{existing} is a file"
        raise UserError(f"save_path: {run_dir} cannot be made, {what}")
    try:
        check_writable(existing)
    except OSError as error:
        raise UserError(f"save_path: cannot write to {run_dir}: {error.strerror}") from None
    for path in sorted(run_dir.glob("checkpoint_*")):
        name = NAME.fullmatch(path.name)
        if name is None or as_checkpoint(path) is not None:
            continue
        given = config.load_model_path and path.resolve() == Path(config.load_model_path).resolve()
        if given and int(name[1]) <= (config.resume or 0):
            continue  # the weights to start from, none of whose epochs is trained again
        raise UserError(
            f"{path}: stands in the way and is no complete checkpoint of this program; move it "
            "to another folder"
        )


def _check_same_run(config: Config, checkpoints: list[Checkpoint]) -> None:
    """Raise UserError where the config contradicts the run that its run folder holds."""
    newest = checkpoints[-1]
    saved = newest.config()
    problems = []
    for name in FIXED_KEYS:
        ours, theirs = getattr(config, name), getattr(saved, name)
        if ours != theirs:
            if name == "method":
                ours, theirs = ours.value, theirs.value
            problems.append(f"{name}: {ours}, but {newest.path} was trained with {theirs}")
    if problems:
        hint = f"choose another name than {config.name}, or the settings of that run"
        raise UserError(*(f"{problem}; {hint}" for problem in problems))
    _check_same_place(config, saved, checkpoints)
    if newest.epoch > config.num_epochs:
        raise UserError(f"num_epochs: {config.num_epochs}, but {newest.path} is beyond it")


def _check_same_place(config: Config, saved: Config, checkpoints: list[Checkpoint]) -> None:
    """Raise UserError where load_model_path or resume ask for another place than the newest
    checkpoint: neither as this run was started (saved), nor this checkpoint itself."""
    newest = checkpoints[-1]
    path, first, done = config.load_model_path, saved.load_model_path, config.resume
    same_path = path in (None, first) or Path(path).resolve() == newest.path.resolve()
    as_before = same_path and done in (None, saved.resume, newest.epochs_done)
    if as_before or _names_weights_of(config, newest):
        return
    given = {"load_model_path": path, "resume": done}
    asked = ", ".join(f"{name}: {value}" for name, value in given.items() if value is not None)
    own = as_checkpoint(Path(path)) if path else None
    start = done if done is not None else own.epochs_done if own else 0
    later = ", ".join(c.path.name for c in checkpoints if c.epoch > start)
    lost = f"; a start from there would overwrite {later}" if later else ""
    away = f", or move {later} to another folder first" if later else ""
    raise UserError(
        f"{asked}: but the run goes on from {newest.path}{lost}; leave both keys out, choose "
        f"another name than {config.name}{away}"
    )


def _check_epoch_is_known(config: Config, path: Path) -> None:
    """Raise UserError where nothing says at which stage the weights of others are evaluated. A
    number of latents that is forced does not say which steps are still to be written."""
    if config.advance_at is not None:
        raise UserError(
            f"advance_at: {path} does not say at which stage it was trained; set it to null, "
            "so that schedule and resume say it"
        )
    curriculum = Curriculum.from_config(config)
    has_stages = config.method is Method.COCONUT and curriculum.stage(0) != curriculum.last_stage
    if has_stages and config.resume is None:
        raise UserError(
            f"resume: {path} does not say for how many epochs it was trained, and the latents and "
            "the steps that are still written depend on that; set resume"
        )


def _check_same_numbers(config: Config, training: Config, path: Path) -> None:
    """Raise UserError where `all` numbers of latents are others than those of the training."""
    ours = config.forced_latents
    theirs = replace(training, eval_num_latents="all").forced_latents
    if ours != theirs:
        raise UserError(
            f"eval_num_latents: all is {ours} by this config, and {theirs} by that which {path} "
            "was trained with; take its c_thought, max_latent_stage and latent_growth, or a list"
        )


def _evaluation_start(config: Config) -> Start:
    """Where an evaluation is. Of a checkpoint of ours it is its own stage in its own curriculum,
    which the config may contradict in nothing but a number of latents that it forces."""
    path, mine = weights_path(config), Curriculum.from_config(config)
    assert path is not None  # the config has seen to it
    _check_exists(path)
    if find_checkpoints(config.run_dir):
        raise UserError(f"name: {config.run_dir} holds a training; give the evaluation another")
    own = as_checkpoint(path.resolve())
    if own is None:
        _check_epoch_is_known(config, path)
        return Start(None, path, config.resume or 0, 1, mine)
    epoch = own.epoch if config.resume is None else config.resume
    training, forced = own.config(), config.eval_num_latents is not None
    if config.eval_num_latents == "all":
        _check_same_numbers(config, training, path)
    names = ["latent_input", "answer_marker"]
    if not forced:
        names.append("pad_latent_to_max")
    for name in names:
        ours, theirs = getattr(config, name), getattr(training, name)
        if ours != theirs:
            raise UserError(f"{name}: {ours}, but {path} was trained with {theirs}")
    saved, stages = Curriculum.from_config(training), _known_stages(config, own)
    trained = saved.summary(saved.stage(own.epoch, stages))
    for curriculum in (saved,) if forced else (saved, mine):
        asked = curriculum.summary(curriculum.stage(epoch, stages))
        if asked != trained:
            raise UserError(
                f"{path} was trained with {trained[0]} latents and {trained[1]} steps skipped, "
                f"this config evaluates it with {asked[0]} and {asked[1]} (resume: {epoch}); leave "
                "resume out, and use the settings of its config.yaml or force a number by "
                "eval_num_latents"
            )
    return Start(None, path, epoch, 1, saved, stages)
