"""distributed.py with two real processes (gloo) against one.

Starting processes is slow: one pair runs all of `worker`, and the tests look at what it returns.
"""

import json
import socket
import sys
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZES, VOCAB, Workspace, family_config, free_port, tiny_model, tiny_rows
from numerics import assert_as_exact_as, assert_same, exact, roundings
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from coconut import Coconut, add_latent_tokens
from curriculum import Curriculum
from dataset import IGNORED, Encoded, LatentTokens, Sample, StageDataset, collate
from engine import distributed
from engine.adapters import Adapters, add_adapters
from engine.checkpoint import TrainState
from engine.distributed import (
    World,
    backward,
    broadcast_object,
    close_processes,
    end_of_backward,
    full_tensor,
    gather_objects,
    gathered,
    gradient_norm,
    on_all,
    on_main,
    one_of_each_node_first,
    open_processes,
    replicate,
    shard,
    sum_over_ranks,
    unsharded_bytes,
)
from engine.encoding import encode_rows
from engine.evaluation import Evaluator
from engine.gate import decide_next_stage
from engine.health import Thoughts
from engine.logs import Metrics
from engine.loop import Step, Training, fetch, forward_backward, micro_batches, optimizer_step
from engine.model import build_model
from engine.optimizer import build_optimizer, build_scheduler, join, trained_parameters
from engine.preflight import gather_inputs
from engine.weights import empty_model
from loader import load_config
from rules import make_config
from utils import Config, UserError

sys.path.append(str(ROOT / "benchmarks"))
from collectives import count_collectives, open_pair

pytestmark = pytest.mark.slow  # two processes import and run everything

ALONE = World(0, 1, torch.device("cpu"))
# Qwen3 as the library has it, with the layers that layers.py replaces; the others are exact
FAMILIES = {"qwen3": torch.float32, "llama": torch.float64, "gpt2": torch.float64}
UNITS = 3  # the two blocks and the root
ONCE = {"all_gather_single": UNITS, "reduce_scatter_single": UNITS}
LATENT_ID, PAD_ID, NEVER = 380, 1, -1

# optimizer steps: [rank][micro-batch] -> rows as numbers of (question, latent, answer) tokens
CASES = {
    "one micro-batch": [[[(5, 2, 4), (3, 1, 6)]], [[(6, 2, 3)]]],
    "no latents": [[[(5, 0, 4)]], [[(6, 0, 3), (4, 0, 2)]]],
    "accumulation": [[[(5, 2, 4)], [(3, 2, 6)]], [[(6, 2, 3)], [(9, 2, 5), (2, 2, 2)]]],
    "6 latents and 2": [[[(5, 6, 4)], [(3, 6, 6)]], [[(6, 2, 3)], [(9, 2, 5)]]],
    "none on one rank": [[[(5, 3, 4)], [(3, 2, 6)]], [[(6, 0, 3)], [(9, 0, 5)]]],
    "none at last on one rank": [[[(5, 0, 4)], [(3, 2, 6)]], [[(6, 2, 3)], [(9, 0, 5)]]],
    "an empty micro-batch": [[[(5, 3, 4)], [(3, 2, 6)]], [[(6, 2, 3)], [(9, 2, 0)]]],
    "an empty one without latents": [[[(5, 3, 4)], [(3, 2, 6)]], [[(6, 2, 3)], [(9, 0, 0)]]],
}
SPLITS = {1: (12, 4), 2: (6, 3)}  # rows of a micro-batch, by number of processes
WINDOWS = (12, 7, 1)  # rows of an optimizer step, the uneven last ones of an epoch included


# ------------------------------------------------------------------------------- parts


def tiny_coconut(
    family: str, processes: World, eos_id=NEVER, dtype=None, compute_dtype=None, again=False
) -> Coconut:
    """again: activations are computed again in the backward."""
    dtype = dtype or FAMILIES[family]
    base = exact(tiny_model(family)) if dtype == torch.float64 else tiny_model(family, dtype)
    model = Coconut(base, latent_token_id=LATENT_ID, eos_token_id=eos_id)
    if again:
        model.checkpoint_activations()
    if processes.world_size > 1:
        shard(model, compute_dtype or dtype, processes)
    return model


def make_sample(shape: tuple[int, int, int]) -> Sample:
    question, latents, answer = shape
    tokens = np.random.default_rng(shape).integers(2, LATENT_ID, sum(shape))
    tokens[question : question + latents] = LATENT_ID
    labels = np.where(np.arange(len(tokens)) < question + latents, IGNORED, tokens)
    return Sample(0, tokens, labels, question, latents)


def run_step(model: Coconut, batches: list[list], num_items: int, world_size: int) -> float:
    """Forward and backward of this rank's micro-batches as engine/loop.py does; the loss."""
    total = 0.0
    model.train()
    for number, shapes in enumerate(batches, start=1):
        batch = collate([make_sample(shape) for shape in shapes], PAD_ID)
        output = model(**batch.inputs(), num_items_in_batch=num_items)
        last = number == len(batches)
        backward(model, output.loss * world_size, output.prefix_hidden, last)
        total += output.loss.item()
    end_of_backward(model)
    return total


def gradients(model) -> dict[str, torch.Tensor]:
    """Of all parameters that are trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: full_tensor(p.grad).clone() for name, p in trained.items()}


def all_rows(case) -> list[tuple]:
    return [shape for rank in case for batch in rank for shape in batch]


def num_labels(case) -> int:
    return sum(answer for _, _, answer in all_rows(case))


# ------------------------------------------------------------------------------- two processes


def worker(rank: int, port: int, tokenizer_folder: Path, folder: Path) -> None:
    """One of the two processes: everything in turn, the results to a file."""
    processes = open_pair(rank, port, patience=60)
    results = {
        "processes": tuple(processes[:2]),
        "units": units(processes),
        "steps": {f: steps(f, processes) for f in FAMILIES},
        "adapters": steps_of(adapted_coconut(processes), processes),
        "clipped": clipped_step(processes),
        "again": counted_step(tiny_coconut("qwen3", processes, again=True), processes),
        "master": counted_step(
            tiny_coconut("qwen3", processes, compute_dtype=torch.bfloat16), processes
        ),
        "generation": generation(processes),
        "reductions": reductions(processes, folder),
        "split adamw": split_adamw_steps(processes),
        "split": split_steps(processes, tokenizer_folder, folder),
        "unsharded": {dtype: unsharded(processes, dtype) for dtype in UNSHARDED},
        "meta": {family: from_main(family, processes) for family in META_FAMILIES},
        "problems": told_problems(processes),
        "built": {name: built(folder / name, processes) for name in BUILT},
        "bad step": bad_step(processes, tokenizer_folder, folder),
        "evaluation": evaluations(processes, tokenizer_folder, folder),
        "gate": decided_stages(processes, tokenizer_folder, folder),
    }
    torch.save(results, folder / f"{rank}.pt")
    close_processes()


@pytest.fixture(scope="module")
def folder(model_folder, tokenizer_folder, tmp_path_factory) -> Path:
    """Where the two processes work: the configs of BUILT, and their results."""
    folder = tmp_path_factory.mktemp("processes")
    for name in BUILT:
        (folder / name).mkdir()
        write_built(name, Workspace(model_folder, folder / name), tokenizer_folder)
    return folder


@pytest.fixture(scope="module")
def results(tokenizer_folder, folder) -> list[dict]:
    """What the two processes return, by rank."""
    port = free_port()
    torch.multiprocessing.spawn(worker, (port, tokenizer_folder, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def units(processes) -> dict:
    """What is sharded, family by family."""
    actual = {}
    for family in FAMILIES:
        model = tiny_coconut(family, processes)
        actual[family] = {
            "sharded": [name for name, m in model.named_modules() if isinstance(m, FSDPModule)],
            "whole": [n for n, p in model.named_parameters() if not isinstance(p, DTensor)],
        }
    return actual


def adapted_coconut(processes: World) -> Coconut:
    """Low-rank adapters and marker rows over frozen weights, of which only rank 0 has numbers."""
    base = tiny_model("qwen3") if processes.is_main else empty_model(family_config("qwen3"))
    targets, markers = ("q_proj", "down_proj"), (379, LATENT_ID, 381)
    add_adapters(base, Adapters(3, 12.0, 0.0, targets, markers, "x", None, None), seed=0)
    with torch.no_grad():
        for parameter in trained_parameters(base):
            parameter += 0.1 * torch.randn_like(parameter)
    model = Coconut(exact(base), latent_token_id=LATENT_ID, eos_token_id=NEVER)
    if processes.world_size > 1:
        shard(model, torch.float64, processes)
    return model


def steps(family: str, processes, cases=CASES) -> dict:
    return steps_of(tiny_coconut(family, processes), processes, cases)


def steps_of(model: Coconut, processes, cases=CASES) -> dict:
    """Every case in turn on one model: one step must not disturb the next."""
    actual = {}
    for name, case in cases.items():
        model.zero_grad()
        with count_collectives() as counts:
            mine = case[processes.rank]
            loss = run_step(model, mine, num_labels(case), processes.world_size)
        actual[name] = {
            "loss": sum_over_ranks([loss], processes.device)[0],
            "counts": dict(counts),
            "norm": gradient_norm(model, None),
            "gradients": gradients(model),
        }
    return actual


def counted_step(model: Coconut, processes) -> dict:
    case = CASES["6 latents and 2"]
    with count_collectives() as counts:
        run_step(model, case[processes.rank], num_labels(case), 2)
    return {"counts": dict(counts), "gradients": gradients(model)}


def clipped_step(processes) -> dict:
    model, case = tiny_coconut("qwen3", processes), CASES["accumulation"]
    run_step(model, case[processes.rank], num_labels(case), 2)
    return {"norm": gradient_norm(model, 0.5), "gradients": gradients(model)}


# of rank 0: ends with the first token; of rank 1: goes on, then more batches of other sizes
PROMPTS = [[[(5, 2, 0)]], [[(7, 3, 0), (4, 0, 0)], [(3, 1, 0)], [(6, 4, 0)]]]


def complete(model: Coconut, rank: int) -> list[list[int]]:
    completions = []
    for shapes in PROMPTS[rank]:
        batch = collate([make_sample(shape) for shape in shapes], PAD_ID, align_end=True)
        completions += model.generate(
            batch.input_ids, batch.attention_mask, 6, latent_columns=batch.latent_columns
        )
    return [tokens.tolist() for tokens in completions]


@cache
def first_token() -> int:
    return complete(tiny_coconut("llama", ALONE), 0)[0][0]


def generation(processes) -> list[dict]:
    """Before any training, and between two steps."""
    model, actual = tiny_coconut("llama", processes, first_token()), []
    for _ in range(2):
        with count_collectives() as counts, gathered(model):
            text = complete(model.eval(), processes.rank)
        model.zero_grad()
        actual.append(
            {"text": text, "counts": dict(counts), "step": counted_step(model, processes)}
        )
    return actual


UNSHARDED = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def unsharded(processes, dtype: str) -> dict:
    """Numbers and bytes beside the shards after the first of two micro-batches, by block, and the
    forecast bytes for each number."""
    model, case = tiny_coconut("qwen3", processes, dtype=UNSHARDED[dtype]), CASES["accumulation"]
    shapes, held = case[processes.rank][0], []
    inputs = collate([make_sample(shape) for shape in shapes], PAD_ID).inputs()
    output = model.train()(**inputs, num_items_in_batch=num_labels(case))
    backward(model, output.loss, output.prefix_hidden, last=False)
    for block in [m for m in model.modules() if isinstance(m, FSDPModule)]:
        parts = block._get_fsdp_state()._fsdp_param_group.fsdp_params
        tensors = [p._unsharded_param for p in parts]
        tensors += [p._unsharded_param.grad for p in parts]
        tensors += [p.unsharded_accumulated_grad for p in parts]
        numbers = sum(p._unsharded_param.numel() for p in parts)
        held.append((numbers, sum(t.nbytes for t in tensors if t is not None)))
    end_of_backward(model)
    return {"held": held, "forecast": unsharded_bytes(UNSHARDED[dtype], accumulates=True)}


# families with tied and untied heads, learned positions, rotary buffers, a scale that is a buffer
META_FAMILIES = ("qwen3", "llama", "gpt2", "gpt_neox", "gemma3_text")


def meta_config(family: str) -> PreTrainedConfig:
    if family in ("gpt_neox", "gemma3_text"):
        more = dict(num_key_value_heads=2, head_dim=8) if family == "gemma3_text" else {}
        return AutoConfig.for_model(family, **SIZES, **more)
    return family_config(family)


def meta_twin(family: str, on_meta: bool) -> Coconut:
    torch.manual_seed(0)
    config = meta_config(family)
    base = empty_model(config) if on_meta else AutoModelForCausalLM.from_config(config)
    return Coconut(base, latent_token_id=LATENT_ID, eos_token_id=NEVER)


def from_main(family: str, processes) -> dict:
    """Models of which only rank 0 had weights, sharded and whole: all their tensors, whether they
    are tied, what is left on the meta device, and a step."""
    actual, case = {}, CASES["accumulation"]
    for way in ("sharded", "whole"):
        model = meta_twin(family, on_meta=not processes.is_main)
        if way == "sharded":
            shard(model, torch.float32, processes)
        else:
            replicate(model, processes)
        actual[way] = described(model)
        loss = run_step(model, case[processes.rank], num_labels(case), 2)
        actual[way]["loss"] = sum_over_ranks([loss], processes.device)[0]
    return actual


def described(model: Coconut) -> dict:
    base = model.base_causallm
    head, table = base.get_output_embeddings(), base.get_input_embeddings()
    attributes = [value for module in model.modules() for value in vars(module).values()]
    return {
        "weights": {n: full_tensor(p.detach()).clone() for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "persistent": sorted(model.state_dict()),
        "tied": head.weight is table.weight,
        "meta": sum(isinstance(value, torch.Tensor) and value.is_meta for value in attributes),
    }


BUILT = ("loaded", "bf16", "master weights", "from scratch", "more rows", "a head of its own")


def write_built(name: str, space: Workspace, tokenizer_folder: Path) -> None:
    """A config whose model is not just what its config.json says."""
    if name in ("more rows", "a head of its own"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
        rows = len(tokenizer) if name == "more rows" else VOCAB  # the markers need more
        base = tiny_model("qwen3" if name == "more rows" else "llama", vocab_size=rows)
        folder = space.folder / "model"
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if name == "a head of its own":
            text = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
            (folder / "config.json").write_text(json.dumps(text))
        space.values["model_id"] = str(folder)
    space.yaml(
        from_scratch=name == "from scratch",
        bf16=name in ("bf16", "master weights"),
        float32_master_weights=name == "master weights",
    )


def built(folder: Path, processes: World) -> dict:
    """The model of a run, as run.py makes it to train and to evaluate, and what part of its
    parameters was built empty."""
    inputs = gather_inputs(load_config(folder / "config.yaml"))
    sharded, whole = build_model(inputs), build_model(inputs)
    empty = [tensor.is_meta for tensor in sharded.parameters()]
    shard(sharded, inputs.config.compute_dtype, processes)
    replicate(whole, processes)
    return {
        "sharded": described(sharded),
        "whole": described(whole),
        "empty": sum(empty) / len(empty),
    }


def told_problems(processes) -> dict:
    """What each process raises where one, or every one, has found something wrong."""

    def fail(*ranks: int) -> None:
        if processes.rank in ranks:
            raise UserError("one", "two")

    calls = {
        "main": lambda: on_main(lambda: fail(0)),
        "one": lambda: on_all(lambda: fail(1)),
        "all": lambda: on_all(lambda: fail(0, 1)),
        "none": lambda: on_all(lambda: fail()),
    }
    actual: dict = {"value": on_all(lambda: processes.rank)}
    for name, call in calls.items():
        try:
            actual[name] = call()
        except UserError as error:
            actual[name] = error.problems
    return actual


def reductions(processes, folder: Path) -> dict:
    rank, order = processes.rank, folder / "order"
    with one_of_each_node_first():
        with open(order, "a") as file:
            file.write(str(rank))
        seen = order.read_text()
    return {
        "sum": sum_over_ranks([rank + 1, 0.1, True], processes.device),
        "objects": gather_objects({"rank": rank, "rows": list(range(rank))}),
        "broadcast": broadcast_object(["from", rank]),
        "order": seen,
    }


def bf16_config(**changes):
    values = dict(
        name="x",
        save_path="x",
        coconut=True,
        model_id="x",
        train_path="x",
        skip_validation=True,
        bf16=True,
        lr=1e-5,
    )
    return make_config({**values, **changes}, "test")


def split_adamw_steps(processes, dtype=torch.bfloat16) -> dict:
    """Weights, all their bits, after three steps of given gradients; the weights start alike."""
    model = tiny_coconut("qwen3", processes, dtype=torch.bfloat16).to(dtype)
    optimizer = build_optimizer(bf16_config(lr=1e-3, bf16=dtype == torch.bfloat16), model)
    given = {p: p.detach().clone() for p in model.parameters()}
    for factor in (0.5, 2.0, -1.0):
        for p in model.parameters():
            p.grad = given[p] * factor
        optimizer.step()
    actual = {}
    for name, p in model.named_parameters():
        whole = full_tensor(p.detach())
        if dtype == torch.bfloat16:
            low_bits = optimizer.state[p]["low_bits"].int()  # gloo gathers no int16
            whole = join(whole, full_tensor(low_bits).short())
        actual[name] = whole.clone()
    return actual


# ------------------------------------------------------------------------------- real steps


@dataclass
class Case:
    """A training on rows of uneven lengths and numbers of latents."""

    training: Training
    config: Config
    world: World
    encoded: Encoded
    tokenizer: PreTrainedTokenizerFast
    latent_tokens: LatentTokens

    def dataset(self, encoded: Encoded | None = None, **settings) -> StageDataset:
        curriculum = Curriculum(pad_latent_to_max=False)
        return StageDataset(encoded or self.encoded, curriculum, self.latent_tokens, 2, **settings)

    def weights(self) -> torch.Tensor:
        parameters = self.training.model.parameters()
        return torch.cat([full_tensor(p.detach()).double().flatten() for p in parameters])


def make_case(family, world, tokenizer_folder, folder, batch_size: int) -> Case:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokens = LatentTokens(*add_latent_tokens(tokenizer))
    with one_of_each_node_first():
        encoded = encode_rows(tiny_rows(12, seed=3), tokenizer, list(tokens), folder, "rows")
    base = exact(tiny_model(family))
    model = Coconut(base, tokens.latent, tokens.start, tokens.end, tokenizer.eos_token_id)
    shard(model, base.dtype, world)
    config = bf16_config(
        bf16=False, lr=1e-3, batch_size_training=batch_size, num_workers=0, optimizer="adamw"
    )
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, 1)
    training = Training(model, optimizer, scheduler, TrainState(encoded.fingerprint, 12))
    return Case(training, config, world, encoded, tokenizer, tokens)


def one_step(case: Case, window: int, spoil=lambda case, step, stop: None) -> dict:
    """An optimizer step on the first rows, as train_epoch makes it, and its figures."""
    dataset, rows = case.dataset(uniform_prob=0.5), np.arange(window)
    step, stop, before = Step(rows), SimpleNamespace(requested=False), case.weights()
    model, world, dtype = (
        case.training.model.train(),
        case.world,
        case.training.model.base_causallm.dtype,
    )
    pad_id = case.tokenizer.pad_token_id
    for batch in fetch(micro_batches(dataset, [rows], world, case.config, pad_id), step):
        forward_backward(model, batch, world, dtype, step)
    spoil(case, step, stop)
    figures = optimizer_step(case.training, case.config, world, stop, step)
    return {
        **figures,
        "labelled_tokens": int(dataset.num_labels[rows].sum()),
        "stop": stop.agreed,
        "update_norm": (case.weights() - before).norm().item(),
    }


def split_steps(world, tokenizer_folder, folder) -> dict:
    actual = {}
    for family, window in product(FAMILIES, WINDOWS):
        for size in SPLITS[world.world_size]:
            case = make_case(family, world, tokenizer_folder, folder, size)
            actual[f"{family} {window} rows, {size} at a time"] = one_step(case, window)
    return actual


def spoil_loss(case, step, stop) -> None:
    step.loss = torch.tensor(float("nan"))


def spoil_gradient(case, step, stop) -> None:
    end_of_backward(case.training.model)  # the gradients are the shards'
    last = list(case.training.model.parameters())[-1]
    last.grad.to_local().fill_(float("inf"))


def ask_to_stop(case, step, stop) -> None:
    stop.requested = True


def bad_step(world, tokenizer_folder, folder) -> dict:
    """Steps in which rank 1 alone has something to say."""
    actual = {}
    for spoil in (spoil_loss, spoil_gradient, ask_to_stop):
        case = make_case("qwen3", world, tokenizer_folder, folder, 6)
        figures = one_step(case, 12, spoil) if world.rank == 1 else one_step(case, 12)
        actual[spoil.__name__] = {k: figures[k] for k in ("stop", "bad_steps", "update_norm")}
    return actual


def evaluations(world, tokenizer_folder, folder) -> dict:
    """Before and after a training step, with one row for two processes and with three."""
    case = make_case("gpt2", world, tokenizer_folder, folder, 6)
    actual = {}
    for when in ("before", "after"):
        for count in (1, 3):
            actual[f"{when} {count}"] = evaluate_some(case, folder, count)
        actual[f"step {when}"] = one_step(case, 12)["grad_norm"]
    return actual


def make_evaluator(case: Case) -> Evaluator:
    return Evaluator(
        tokenizer=case.tokenizer,
        world=case.world,
        pad_id=case.tokenizer.pad_token_id,
        batch_size=1,
        max_new_tokens=5,
        compute_dtype=case.training.model.base_causallm.dtype,
    )


def decided_stages(world, tokenizer_folder, folder) -> dict:
    """What each rank knows after the gates of three epochs that no row passes."""
    case = make_case("gpt2", world, tokenizer_folder, folder, 6)
    curriculum = Curriculum(advance_at=0.5, epochs_per_stage=1, max_epochs_per_stage=2)
    state, metrics = TrainState("rows", 12, stages=[0]), folder / f"gate_{world.rank}.jsonl"
    for _ in range(3):
        dataset, evaluator = case.dataset(), make_evaluator(case)
        model, records = case.training.model, Metrics(metrics)
        decide_next_stage(model, dataset, curriculum, evaluator, state, records)
        records.close()
    return {"stages": state.stages, "records": metrics.read_text().count("gate")}


def evaluate_some(case: Case, folder: Path, count: int) -> tuple[float, list | None, dict]:
    """Validation loss, all completions and the figures of the thoughts of the first rows."""
    rows, model = tiny_rows(12, seed=3)[:count], case.training.model
    with one_of_each_node_first():
        few = encode_rows(rows, case.tokenizer, list(case.latent_tokens), folder, "few")
    evaluator, dataset = make_evaluator(case), case.dataset(few)
    thoughts = Thoughts(case.tokenizer, int(dataset.num_latents.max()))
    loss, judged = evaluator.loss(model, dataset, thoughts), evaluator.evaluate(model, dataset)
    return loss, judged and [row["output"] for row in judged[1]], thoughts.figures(case.world)


# ------------------------------------------------------------------------------- one process


def run_alone(model: Coconut, name: str) -> dict:
    """All rows of a case in one batch of one process."""
    loss = run_step(model, [all_rows(CASES[name])], num_labels(CASES[name]), 1)
    return {"loss": loss, "norm": gradient_norm(model, None), "gradients": gradients(model)}


@cache
def whole_step(family: str, name: str) -> dict:
    """In float64."""
    return run_alone(tiny_coconut(family, ALONE, dtype=torch.float64), name)


@cache
def naive_steps(family: str, name: str) -> list[dict]:
    return [run_alone(twin, name) for twin in roundings(tiny_coconut(family, ALONE))]


def assert_one_process_step(actual: dict, family: str, name: str) -> None:
    """Those figures of a step that are given."""
    of_found = lambda figures: {figure: figures[figure] for figure in actual}
    truth = of_found(whole_step(family, name))
    if FAMILIES[family] == torch.float64:
        for figure in actual:
            assert_same(actual[figure], truth[figure], figure)
    else:
        assert_as_exact_as(actual, [*map(of_found, naive_steps(family, name))], truth)


# ------------------------------------------------------------------------------- tests


def test_two_processes(results):
    assert [r["processes"] for r in results] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_and_the_root_are_sharded(results, family):
    layers = "transformer.h" if family == "gpt2" else "model.layers"
    actual = results[0]["units"][family]
    assert actual["sharded"] == ["", *(f"base_causallm.{layers}.{i}" for i in range(2))]
    assert actual["whole"] == []


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_two_processes_is_that_of_one(results, family, name):
    """Mean losses of ranks or micro-batches, weighted alike, were off by some percent."""
    for rank in range(2):
        actual = {k: v for k, v in results[rank]["steps"][family][name].items() if k != "counts"}
        assert_one_process_step(actual, family, name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_gather_and_one_reduction_for_each_unit_and_step(results, family, name):
    """FSDP2's defaults make 14 + 1 at 6 latents, and hang where ranks have different numbers."""
    for rank in range(2):
        assert results[rank]["steps"][family][name]["counts"] == ONCE


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_two_processes_are_those_of_one(results, name):
    """Loss, norm and every trained gradient, at one reduction for each unit."""
    alone, case = adapted_coconut(ALONE), CASES[name]
    loss = run_step(alone, [all_rows(case)], num_labels(case), 1)
    wanted = {"loss": loss, "norm": gradient_norm(alone, None), "gradients": gradients(alone)}
    assert len(wanted["gradients"]) == 1 + 2 * 2 * 2
    for rank in range(2):
        actual = results[rank]["adapters"][name]
        assert actual["counts"] == ONCE
        for figure in wanted:
            assert_same(actual[figure], wanted[figure], figure)


def test_clipping(results):
    norm = whole_step("qwen3", "accumulation")["norm"]
    assert norm > 0.5
    for rank in range(2):
        actual = results[rank]["clipped"]
        actual["gradients"] = {n: g * norm / 0.5 for n, g in actual["gradients"].items()}
        assert_one_process_step(actual, "qwen3", "accumulation")


def test_generation_stops_on_each_rank_by_itself(results):
    """Parameters are gathered on entry: no token costs a collective, no rank waits for another."""
    alone = tiny_coconut("llama", ALONE, first_token())
    wanted = [complete(alone, rank) for rank in range(2)]
    assert wanted[0] == [[first_token()]] and len(wanted[1][0]) == 6  # else nothing is tested
    for rank in range(2):
        for actual in results[rank]["generation"]:
            assert actual["text"] == wanted[rank]
            assert actual["counts"] == {"all_gather_single": UNITS}


def test_training_goes_on_exactly_after_generation(results):
    for rank in range(2):
        for actual in results[rank]["generation"]:
            step = actual["step"]
            assert step["counts"] == ONCE
            step = {"gradients": step["gradients"]}
            assert_one_process_step(step, "llama", "6 latents and 2")


def test_activations_computed_again_gather_nothing_again(results):
    for rank in range(2):
        actual = results[rank]["again"]
        assert actual["counts"] == ONCE
        step = {"gradients": actual["gradients"]}
        assert_one_process_step(step, "qwen3", "6 latents and 2")


def test_float32_master_weights(results):
    """Computed in bfloat16 on shards as under autocast in one process; gradients in float32."""
    name = "6 latents and 2"
    with torch.autocast("cpu", torch.bfloat16):
        twins = roundings(tiny_coconut("qwen3", ALONE))
        naive = [{"gradients": run_alone(twin, name)["gradients"]} for twin in twins]
    truth = whole_step("qwen3", "6 latents and 2")["gradients"]
    for actual in (r["master"]["gradients"] for r in results):
        assert all(gradient.dtype == torch.float32 for gradient in actual.values())
        assert_as_exact_as({"gradients": actual}, naive, {"gradients": truth})
        rounded = max((actual[name] - truth[name]).norm() / truth[name].norm() for name in truth)
        assert rounded > torch.finfo(torch.bfloat16).eps / 8  # else it was not bfloat16
    assert results[0]["master"]["counts"] == ONCE


def test_reductions(results):
    first, second = (r["reductions"] for r in results)
    assert first["sum"] == second["sum"] == [3.0, 0.2, 2.0]
    assert first["objects"] == [{"rank": 0, "rows": []}, {"rank": 1, "rows": [0]}]
    assert second["objects"] is None
    assert first["broadcast"] == second["broadcast"] == ["from", 0]
    assert (first["order"], second["order"]) == ("0", "01")


def test_split_adamw_on_shards(results):
    naive, truth = split_adamw_steps(ALONE), split_adamw_steps(ALONE, torch.float64)
    for rank in range(2):
        actual = results[rank]["split adamw"]
        assert_as_exact_as({"weights": actual}, [{"weights": naive}], {"weights": truth})


@pytest.mark.parametrize("dtype, size", [("bfloat16", 2 + 4), ("float32", 4 + 4)])
def test_what_is_held_beside_the_shards(results, dtype, size):
    """Gathered parameters, and gradients that FSDP adds up in float32."""
    for rank in range(2):
        actual = results[rank]["unsharded"][dtype]
        assert actual["forecast"] == size and len(actual["held"]) == UNITS
        assert all(held == size * numbers for numbers, held in actual["held"])


@pytest.mark.parametrize("way", ["sharded", "whole"])
@pytest.mark.parametrize("family", META_FAMILIES)
def test_weights_come_from_the_main_process(results, family, way):
    """The others hold their part, or all, of what rank 0 alone has built, and what no state dict
    holds: the rotary frequencies were noise."""
    alone = meta_twin(family, on_meta=False)
    wanted = described(alone)
    loss = run_step(alone, [all_rows(CASES["accumulation"])], num_labels(CASES["accumulation"]), 1)
    for rank in range(2):
        actual = results[rank]["meta"][family][way]
        for kind in ("weights", "buffers"):
            assert actual[kind].keys() == wanted[kind].keys()
            for name, tensor in wanted[kind].items():
                assert torch.equal(actual[kind][name], tensor), name
        assert {k: actual[k] for k in ("persistent", "tied", "meta")} == {
            "persistent": wanted["persistent"],
            "tied": wanted["tied"],
            "meta": 0,
        }
        assert actual["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", BUILT)
def test_the_model_of_a_run_is_read_once(results, folder, name):
    """Rank 1 builds it as rank 0 has found it: rows added for the markers, a head that the file
    holds though the config says tied, random weights."""
    alone = built(folder / name, ALONE)
    wanted = alone["whole"]
    assert [alone["empty"], *(r["built"][name]["empty"] for r in results)] == [0, 0, 1]
    for rank, way in product(range(2), ("sharded", "whole")):
        actual = results[rank]["built"][name][way]
        assert [actual[k] for k in ("tied", "meta")] == [wanted["tied"], 0]
        for kind in ("weights", "buffers"):
            assert actual[kind].keys() == wanted[kind].keys()
            for key, tensor in wanted[kind].items():
                assert actual[kind][key].dtype == tensor.dtype
                assert torch.equal(actual[kind][key], tensor), key
    shapes = {tuple(tensor.shape) for tensor in wanted["weights"].values()}
    assert ((VOCAB, 32) in shapes) == (name != "more rows")
    assert wanted["tied"] == (name != "a head of its own")


def test_a_problem_of_one_process_is_one_of_all(results):
    """One that not all see says where."""
    here = f" (on node 0 ({socket.gethostname()}))"
    for rank in range(2):
        actual = results[rank]["problems"]
        assert actual["main"] == actual["all"] == ["one", "two"]
        assert actual["one"] == ["one" + here, "two" + here]
        assert actual["none"] is None and actual["value"] == rank


FIGURES = ("loss", "grad_norm", "update_norm")


@pytest.fixture(scope="module")
def splits(results, tokenizer_folder, tmp_path_factory) -> dict:
    """The figures of all steps, whichever way they were split."""
    alone = split_steps(ALONE, tokenizer_folder, tmp_path_factory.mktemp("cache"))
    return {1: alone, 2: results[0]["split"]}


@pytest.mark.parametrize("processes, batch_size", [(1, 4), (2, 6), (2, 3)])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_does_not_depend_on_its_split(splits, family, window, processes, batch_size):
    """12 rows at once, 3 x 4 accumulated, on 2 processes 6 each, and 2 x 3 each. A step of 7 rows
    or of 1 fills some micro-batches unevenly, or not at all."""
    wanted = splits[1][f"{family} {window} rows, 12 at a time"]
    actual = splits[processes][f"{family} {window} rows, {batch_size} at a time"]
    for figure in FIGURES:
        assert_same(actual[figure], wanted[figure], figure)
    assert actual["labelled_tokens"] == wanted["labelled_tokens"]


def test_both_ranks_report_the_same_step(results):
    assert results[0]["split"] == results[1]["split"]


def test_the_rows_of_the_splits_are_uneven(tokenizer_folder, tmp_path):
    dataset = make_case("qwen3", ALONE, tokenizer_folder, tmp_path, 12).dataset(uniform_prob=0.5)
    assert {0, 2, 4} <= set(dataset.num_latents.tolist())
    assert len(set(dataset.total_length.tolist())) > 6


@pytest.mark.parametrize("what", ["spoil_loss", "spoil_gradient"])
def test_a_bad_step_on_one_rank_is_skipped_on_all(results, what):
    skipped = {"stop": False, "bad_steps": 1, "update_norm": 0.0}
    assert [r["bad step"][what] for r in results] == [skipped] * 2


def test_a_request_to_stop_one_rank_stops_all(results):
    assert [r["bad step"]["ask_to_stop"]["stop"] for r in results] == [True, True]
    assert results[0]["bad step"]["ask_to_stop"]["update_norm"] > 0


def test_evaluation_with_fewer_rows_than_processes(results, tokenizer_folder, tmp_path):
    """A rank without rows goes on to the reductions; training afterwards is undisturbed."""
    wanted = evaluations(ALONE, tokenizer_folder, tmp_path)
    for name, value in wanted.items():
        first, second = (r["evaluation"][name] for r in results)
        if name.startswith("step"):
            assert first == second
            assert_same(first, value, name)
            continue
        assert first[0] == second[0]
        assert_same(first[0], value[0], name)
        assert (first[1], second[1]) == (value[1], None)
        assert first[2] == second[2] and first[2].keys() == value[2].keys()
        for figure in value[2]:
            assert first[2][figure] == pytest.approx(value[2][figure], rel=1e-5)
    assert "latent_distance" in wanted["before 3"][2]  # else nothing is tested


def test_all_ranks_know_the_stages_that_the_main_one_decides(results, tokenizer_folder, tmp_path):
    """Only it sees the accuracy of the rows set aside."""
    wanted = {"stages": [0, 0, 1, 1], "records": 3}
    assert decided_stages(ALONE, tokenizer_folder, tmp_path) == wanted
    assert [r["gate"] for r in results] == [wanted, wanted | {"records": 0}]


# ------------------------------------------------------------------------------- one process


def test_one_process_shards_nothing():
    """FSDP2 would keep a second copy of the parameters."""
    model = tiny_coconut("qwen3", ALONE)
    shard(model, torch.float32, ALONE)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    with gathered(model):
        assert complete(model, 0)
    end_of_backward(model)


def test_reductions_of_one_process():
    assert sum_over_ranks([1, 0.5], ALONE.device) == [1.0, 0.5]
    assert gather_objects("value") == ["value"]
    assert broadcast_object("value") == "value"
    with one_of_each_node_first():
        pass


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert open_processes()[:2] == (0, 1)
    assert not distributed.several_processes()
    close_processes()


def test_torchrun_with_one_process(monkeypatch):
    """A group is open, yet nothing is sharded."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back, whoever replaces it
    for name, value in dict(
        RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0
    ).items():
        monkeypatch.setenv(name, str(value))
    try:
        assert open_processes()[:2] == (0, 1)
        test_one_process_shards_nothing()
        test_reductions_of_one_process()
    finally:
        close_processes()
