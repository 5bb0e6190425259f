"""analysis faithful: interventions against their definition, and the battery on models whose
dependence on latents is known by construction."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Workspace, family_config, tiny_rows
from numerics import assert_same, exact, in_float64
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    Qwen3Config,
)

import run
from analysis import __main__ as analysis
from analysis import verdict
from analysis.branches import (
    STATE,
    TOKEN,
    VECTOR,
    check_branches,
    join,
    make_branch,
    run_branches,
    run_prefix,
)
from analysis.chains import KINDS, Chains, Written
from analysis.compare import Paired
from analysis.faithful import LEAST_ROWS, Partial, computed_from, merge_changes
from analysis.interventions import (
    ALL,
    EACH,
    MISSING,
    SUPPLIED,
    Latents,
    another_order,
    choose_donors,
    counted,
    noise,
    replaced,
)
from analysis.linear_probe import facts_of, probe_accuracy, probe_latents, usable_rows
from analysis.probe import load_probe, read_config
from coconut import Coconut, add_latent_tokens
from engine.preflight import gather_inputs
from engine.text import DEFAULT
from preprocessing.small_model import stories_tokenizer
from utils import UserError

SIGMA = 3.0


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory) -> Workspace:
    """Coconut runs of two epochs (stage 2, four latents) and a CoT run, on the same rows."""
    workspace = Workspace(model_folder, tmp_path_factory.mktemp("trained"))
    rows = [row for row in tiny_rows(60, seed=2) if row["steps"]][: LEAST_ROWS + 4]
    (workspace.folder / "val.json").write_text(json.dumps(rows))
    common = dict(num_epochs=2, skip_validation=True, batch_size_eval=9, max_new_tokens=6)
    kinds = {
        "run": {},
        "pause": dict(latent_input="pause"),
        "cot": dict(coconut=None, cot=True, num_epochs=1),
    }
    for name, changes in kinds.items():
        assert run.main([str(workspace.yaml(**{**common, "name": name, **changes}))]) == 0
    return workspace


def folder_of(workspace, name: str) -> str:
    return str(workspace.folder / "out" / name)


def probe_of(workspace, name: str, *more: str):
    return load_probe(read_config(folder_of(workspace, name), *more))


@pytest.fixture
def float64():
    with in_float64():
        yield


# ------------------------------------------------------------------------------- the definition


def naive_completion(base, inputs, read, limit: int, eos: int) -> list[int]:
    """Run (C, D) inputs, then what `read` gives, each column by running the whole sequence again,
    then write greedily. read: per column a token, a vector (D,), or None: the last state."""
    embeds = base.get_input_embeddings()
    last = lambda: base.base_model(inputs_embeds=inputs[None], use_cache=False)[0][0, -1]
    for column in read:
        new = last() if column is None else column
        new = embeds(torch.tensor(new)) if isinstance(new, int) else new
        inputs = torch.cat([inputs, new[None]])
    written = []
    for _ in range(limit):
        written.append(int(base.get_output_embeddings()(last()).argmax()))
        if written[-1] == eos:
            break
        inputs = torch.cat([inputs, embeds(torch.tensor(written[-1:]))])
    return written


def sliding_config():
    return Qwen3Config(
        **family_config("qwen3").to_dict()
        | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, layer_types=None)
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "sliding"])
def test_branches_are_the_definition(family):
    """Scripts of different lengths, of tokens, vectors and states, behind prompts of different
    lengths or their beginnings; branches end at different times, one of them at once."""
    config = sliding_config() if family == "sliding" else family_config(family)
    torch.manual_seed(0)
    base = exact(AutoModelForCausalLM.from_config(config).eval())
    model = Coconut(base, latent_token_id=5, eos_token_id=7, fast_layers=False)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, 300, (n,), generator=generator) for n in (3, 7, 6)]
    ids, mask = torch.full((2, 3, 7), 1)
    for row, prompt in enumerate(prompts):
        ids[row, 7 - len(prompt) :], mask[row, : 7 - len(prompt)] = prompt, 0
    vectors = torch.randn(3, 4, 32, generator=generator, dtype=torch.float64)
    scripts = [
        ([[5, 5, 6]] * 3, [VECTOR, STATE], 0),
        ([[5, 9], [5, 9, 11, 12], [5]], [STATE, TOKEN], 2),
        ([[8, 9, 10, 11], [8], []], [VECTOR] * 4, 1),
    ]
    several = [
        make_branch(of, reads, vectors[:, : len(reads)], without) for of, reads, without in scripts
    ]
    for limit in (1, 9):
        prefix = run_prefix(model, ids, mask, room=4 + limit)
        for again in range(2):  # a prefix may be used again
            written, states = run_branches(model, prefix, join(several), limit)
            for row, prompt in enumerate(prompts):
                for number, (of, reads, without) in enumerate(scripts):
                    read = list(of[row])
                    for k, what in enumerate(reads[: len(read)]):
                        read[k] = {VECTOR: vectors[row, k], STATE: None, TOKEN: read[k]}[what]
                    inputs = base.get_input_embeddings()(prompt[: len(prompt) - without])
                    wanted = naive_completion(base, inputs, read, limit, eos=7)
                    assert written[row][number] == wanted, (again, row, number)
    hidden = base.base_model(input_ids=prompts[0][None])[0][0]
    assert_same(states[0, :, 0], hidden[[-1, -3, -2]])
    last = scripts[-1][0]  # the same where all columns of all branches are tokens
    alone = make_branch(last, [], vectors[:, :0])
    tokens = make_branch(last, [TOKEN] * 4, vectors)
    assert run_branches(model, prefix, alone, 9)[0] == run_branches(model, prefix, tokens, 9)[0]
    nothing = make_branch([[], [], []], [], vectors[:, :0])  # the model goes on by itself
    for prompt, (written,) in zip(prompts, run_branches(model, prefix, nothing, 9)[0]):
        inputs = base.get_input_embeddings()(prompt)
        assert written == naive_completion(base, inputs, [], 9, eos=7)


def naive_answers(probe, row: int, plain, donors, number: int) -> dict[str, str | None]:
    """Every intervention of one row by its definition."""
    base, tokens = probe.model.base_causallm, probe.inputs.latent_tokens
    embeds, c = base.get_input_embeddings(), probe.config.c_thought
    example = probe.rows[row]
    encode = lambda text: probe.inputs.tokenizer(text)["input_ids"]
    question = [*encode(example["question"] + "\n"), tokens.start]

    def answer(latents: list, steps: list[str]) -> str | None:
        given = [token for step in steps for token in encode(step + "\n")]
        read = [*latents, tokens.end, *given]
        new = naive_completion(
            base,
            embeds(torch.tensor(question)),
            read,
            probe.config.max_new_tokens,
            probe.inputs.tokenizer.eos_token_id,
        )
        return probe.text_format.answer(probe.text(new))

    own, other = plain.states[row], plain.states[donors[row]]
    drawn = noise(probe.config.seed, row, 2, *own.shape).double()
    unit = drawn[0] / drawn[0].norm(dim=-1, keepdim=True)
    values = {
        "same": own,
        "zero": 0 * own,
        "mean": sum(plain.states) / len(plain.states),
        "noise": unit * own.norm(dim=-1, keepdim=True),
        "added noise": own + SIGMA * drawn[1],
        "other": other,
        "marker": embeds(torch.tensor([tokens.latent] * number)),
        "order": own[another_order(probe.config.seed, row, number)],
    }
    found = {replaced(None, kind): answer(list(values[kind]), []) for kind in ALL}
    for k in range(number):
        for kind in EACH:
            latents = [None] * k + [values[kind][k]] + [None] * (number - k - 1)
            found[replaced(k, kind)] = answer(latents, [])
    steps = example["steps"][: number // c]  # the stage skips as many
    for n in range(number):
        found[counted(n, MISSING)] = answer([None] * n, [])
        if -(-n // c) < number // c:
            found[counted(n, SUPPLIED)] = answer([None] * n, steps[-(-n // c) :])
    found[counted(number, SUPPLIED)] = answer([None] * number, steps)
    return found


@torch.no_grad()
def test_interventions_are_the_definition(trained, float64):
    """Answers are texts of a random model: the completions are judged as if all were answers."""
    probe = probe_of(trained, "run")
    probe = with_whole_texts(probe)
    scale_embeddings(probe)
    latents = Latents(probe, probe.dataset(None), SIGMA)
    plain = latents.plain()
    rows = list(range(len(latents.dataset)))
    assert plain.answers == probe.answers(latents.dataset, rows)
    assert_same(plain.states, probe.thoughts(latents.dataset, rows))
    donors = choose_donors(plain.answers, DEFAULT, seed=0)
    chosen = [3, 0, 11]
    actual = latents.intervene(plain, donors, chosen)
    for number, row in enumerate(chosen):
        wanted = naive_answers(probe, row, plain, donors, 4)
        assert {name: of[number] for name, of in actual["answers"].items()} == wanted
    assert len({*actual["answers"][replaced(None, "other")], *plain.answers}) > 3
    assert actual["changes"].keys() == set(EACH)


def scale_embeddings(probe) -> None:
    """As Gemma does: what a token reads is not its row of the table."""
    embeddings = probe.model.base_causallm.get_input_embeddings()
    forward = embeddings.forward
    embeddings.forward = lambda ids: 3 * forward(ids)


class WholeTexts(type(DEFAULT)):
    """Everything that is written is the answer."""

    def answer(self, completion: str) -> str:
        return completion


def with_whole_texts(probe):
    """A probe whose answers are all that it writes."""
    known = type(probe)
    patched = type("WholeProbe", (known,), {"text_format": property(lambda self: WholeTexts())})
    return patched(**{f.name: getattr(probe, f.name) for f in dataclasses.fields(probe)})


@torch.no_grad()
def test_later_latents_change_as_they_do(trained, float64):
    """Cosine, distance and norm of latents 3 and 4 with the second replaced by zeros."""
    probe = probe_of(trained, "run")
    latents = Latents(probe, probe.dataset(None), SIGMA)
    plain = latents.plain()
    rows = [4, 5]
    donors = choose_donors(plain.answers, DEFAULT, 0)
    actual = latents.intervene(plain, donors, rows)["changes"]["zero"][1]
    base, tokens = probe.model.base_causallm, probe.inputs.latent_tokens
    wanted = torch.zeros(2, 3, dtype=torch.float64)
    for row in rows:
        ids = probe.inputs.tokenizer(probe.rows[row]["question"] + "\n")["input_ids"]
        inputs = base.get_input_embeddings()(torch.tensor([*ids, tokens.start]))
        inputs = torch.cat([inputs, plain.states[row, :1], 0 * plain.states[row, :1]])
        for number, k in enumerate((2, 3)):
            new = base.base_model(inputs_embeds=inputs[None])[0][0, -1]
            old = plain.states[row, k]
            wanted[number, 0] += new @ old / new.norm() / old.norm()
            wanted[number, 1] += (new - old).norm() / old.norm()
            wanted[number, 2] += new.norm() / old.norm()
            inputs = torch.cat([inputs, new[None]])
    assert_same(torch.tensor(actual, dtype=torch.float64), wanted)


@torch.no_grad()
def test_chains_are_replaced_by_definition(trained, float64):
    probe = with_whole_texts(probe_of(trained, "cot"))
    scale_embeddings(probe)
    chains = Chains(probe, probe.dataset(None), SIGMA)
    written = chains.plain()
    # the random model writes no marker: cut its chains somewhere, one of them to nothing
    cut = [chain[: row % 5] for row, chain in enumerate(written.chains)]
    written = dataclasses.replace(written, chains=cut)
    donors = choose_donors(written.answers, DEFAULT, 0)
    rows = [1, 5, 8, 14]
    actual = chains.intervene(written, donors, rows)["answers"]
    base, tokenizer = probe.model.base_causallm, probe.inputs.tokenizer
    embeds = base.get_input_embeddings()
    for number, row in enumerate(rows):
        question = tokenizer(probe.rows[row]["question"] + "\n")["input_ids"]
        table = embeds(torch.tensor(cut[row], dtype=torch.long))
        drawn = noise(probe.config.seed, row, 2, *table.shape).double()
        unit = drawn[0] / drawn[0].norm(dim=-1, keepdim=True)
        given = {
            "same": cut[row],
            "noise": list(unit * table.norm(dim=-1, keepdim=True)),
            "added noise": list(table + SIGMA * drawn[1]),
            "other": cut[donors[row]],
        }
        assert given.keys() == set(KINDS)
        for kind, read in given.items():
            new = naive_completion(
                base,
                embeds(torch.tensor(question)),
                read,
                probe.config.max_new_tokens - len(read),
                tokenizer.eos_token_id,
            )
            assert actual[kind][number] == probe.text(new), kind


@torch.no_grad()
@pytest.mark.parametrize("limit", [1, 2, 3, 6])
def test_a_chain_given_back_changes_no_answer(trained, float64, limit):
    """Wherever the model's own answer was cut off: what it is given counts as written."""
    probe = with_whole_texts(probe_of(trained, "cot", f"max_new_tokens={limit}"))
    chains = Chains(probe, probe.dataset(None), SIGMA)
    rows, eos = list(range(len(chains.dataset))), probe.inputs.tokenizer.eos_token_id
    whole = [tokens.tolist() for tokens in probe.complete(chains.dataset, rows)]
    for cut in (0, 1, limit):
        given = [[token for token in tokens[:cut] if token != eos] for tokens in whole]
        results = chains.intervene(Written([], given), rows[::-1], rows[:9])["answers"]
        for tokens, own, rest in zip(whole, given, results["same"]):
            assert probe.text(own) + rest == probe.text(tokens)


def test_a_chain_ends_before_the_marker(trained):
    probe = probe_of(trained, "cot")
    chains = Chains(probe, probe.dataset(None), SIGMA)
    encode = lambda text: probe.inputs.tokenizer(text)["input_ids"]
    for text, chain in (("<<1+2=3>>\n### 3", "<<1+2=3>>\n"), ("1 2", "1 2"), ("### 3", "")):
        new = [*encode(text), probe.inputs.tokenizer.eos_token_id]
        assert probe.text(chains._chain(new)) == chain


def test_donors_give_once_and_have_other_answers():
    answers = ["1", "2", "1", None, "3", "1", "2", "3"]
    donors = choose_donors(answers, DEFAULT, seed=0)
    assert sorted(donors) == list(range(8))
    assert all(answers[donor] != answer for donor, answer in zip(donors, answers))
    values = ["5", "5.0"] * 3 + ["1,000", "1000"] * 3
    donors = choose_donors(values, DEFAULT, seed=0)  # by value, not by text
    assert all((donor < 6) != (row < 6) for row, donor in enumerate(donors))
    alike = choose_donors(["1"] * 5, DEFAULT, seed=0)
    assert sorted(alike) == list(range(5)) and all(d != i for i, d in enumerate(alike))
    for count in (2, 3, 6):
        order = another_order(0, 7, count)
        assert sorted(order) == list(range(count)) and all(k != o for k, o in enumerate(order))


# ------------------------------------------------------------------------------- known models


def call(workspace, *options) -> int:
    return analysis.main(["faithful", *map(str, options)])


def examine(folder, config: str, *options) -> dict:
    assert call(None, config, "--output_dir", folder, *options) == 0
    assert (folder / "faithful.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "faithful-partial.json").exists()
    return json.loads((folder / "faithful.json").read_text())


def test_steps_have_the_latents_that_they_were_trained_with(trained):
    """Whatever the config says beside a number that it forces."""
    probe = probe_of(trained, "run", "c_thought=1", "eval_num_latents=4")
    latents = Latents(probe, probe.dataset(4), SIGMA)
    assert [latents.supplied_steps(n) for n in (0, 2, 3)] == [range(2), range(1, 2), range(2, 2)]


def test_only_steps_that_the_stage_skips_are_supplied(trained):
    """Six latents are forced where the stage has four for two steps: a third step is written, and
    the column of supplied steps had figures where none was."""
    probe = probe_of(trained, "run", "eval_num_latents=6")
    latents = Latents(probe, probe.dataset(6), SIGMA)
    assert [latents.supplied_steps(n) for n in (0, 3, 4, 6)] == [
        range(2),
        range(2, 2),
        range(2, 2),
        range(2),
    ]
    several = latents._counted([0], latents.plain().states[[0]])
    assert [n for n in range(7) if counted(n, SUPPLIED) in several] == [0, 1, 2, 6]


def test_numbers_that_are_none_make_no_mean():
    """In the file of a run that goes on they are null, which could not be added."""
    of_batches = [{"changes": dict.fromkeys(EACH, [[[x, 1.0, 2.0]]])} for x in (None, 1.0)]
    for changes in merge_changes(of_batches, 2).values():
        ((means,),) = changes
        assert math.isnan(means[0]) and means[1:] == [1.0, 2.0]


def test_pauses_are_read_by_nobody(trained, tmp_path, capsys):
    """Nothing that replaces a state reaches the model: no answer changes, not even its text."""
    probe = with_whole_texts(probe_of(trained, "pause"))
    latents = Latents(probe, probe.dataset(None), SIGMA)
    plain = latents.plain()
    donors = choose_donors(plain.answers, DEFAULT, 0)
    for rows in latents.batches():
        results = latents.intervene(plain, donors, rows)["answers"]
        for name in [replaced(None, kind) for kind in ALL] + [replaced(1, kind) for kind in EACH]:
            assert results[name] == [plain.answers[row] for row in rows]
    found = examine(tmp_path, folder_of(trained, "pause"), "--cot", folder_of(trained, "cot"))
    assert {rates["flips"] for rates in found["all"].values()} == {0}
    assert {rates["flips"] for of_k in found["each"] for rates in of_k.values()} == {0}
    out = capsys.readouterr().out
    assert "1. Accuracy is not shown to fall" in out and "Control: a written chain" in out
    assert verdict.PAUSES in out


DIGITS = [str(digit) for digit in range(2, 10)]


def decoding_model(tokenizer) -> LlamaForCausalLM:
    """A single attention layer whose weights are set by hand: at the marker that begins the
    latents it looks up the question's digit, and at "### " what the latents hold; nothing else
    tells it the answer. The hidden state has a place for every token (T), one for each digit that
    was looked up (M) and one for each digit that is to be written (O).
    """
    ids = tokenizer.convert_tokens_to_ids
    start, _, end = add_latent_tokens(tokenizer)
    size, count = len(tokenizer), len(DIGITS)
    width = size + 2 * count + 4
    width += width % 2
    looked_up, written = size, size + count
    digits = [ids(digit) for digit in DIGITS]
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=width,
        max_position_embeddings=128,
        rope_theta=1e30,  # the last pairs of dimensions hardly turn
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.zero_()
            if "norm" in name:
                weight.fill_(1)
        layer, head = model.model.layers[0], model.lm_head.weight
        attention = layer.self_attn
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        question, thought = width // 2 - 1, width // 2 - 2  # which keys a query looks for
        attention.q_proj.weight[question, start] = 50
        attention.q_proj.weight[thought, ids("### ")] = 50
        attention.o_proj.weight.copy_(torch.eye(width))
        for number, digit in enumerate(digits):
            attention.k_proj.weight[question, digit] = 50
            attention.k_proj.weight[thought, looked_up + number] = 50
            attention.v_proj.weight[looked_up + number, digit] = 1
            attention.v_proj.weight[written + number, looked_up + number] = 1
            head[digit, written + number] = 50
            head[tokenizer.eos_token_id, digit] = 5000
        head[ids("### "), end] = 5000
    return model


@pytest.fixture(scope="module")
def decoding(tmp_path_factory) -> list[str]:
    """The arguments that name a checkpoint of decoding_model and rows for it."""
    folder = tmp_path_factory.mktemp("decoding")
    tokenizer = stories_tokenizer(10, 128)
    model = decoding_model(tokenizer)
    model.save_pretrained(folder / "model")
    state = {f"base_causallm.{name}": weight for name, weight in model.state_dict().items()}
    torch.save(state, folder / "weights")  # in the ancestor's form, which says that it has markers
    tokenizer.save_pretrained(folder / "model")
    names = ["Zoe", "Tom", "Mia", "Ann", "Ben", "Eva"]
    rows = [
        {"question": f"{name} has {digit}?", "steps": [f"<<{digit}-0={digit}>>"], "answer": digit}
        for digit in DIGITS
        for name in names * 2
    ]
    (folder / "val.json").write_text(json.dumps(rows))
    values = dict(name="d", save_path=str(folder), coconut=True, c_thought=1, max_latent_stage=1)
    values |= dict(epochs_per_stage=1, num_epochs=1, resume=1, max_new_tokens=4)
    values |= dict(model_id=str(folder / "model"), load_model_path=str(folder / "weights"))
    values |= dict(val_path=str(folder / "val.json"), batch_size_eval=40, only_eval=True)
    (folder / "config.yaml").write_text(json.dumps(values))
    return [str(folder / "config.yaml")]


def test_a_model_that_decodes_its_latent_flips_and_follows(decoding, tmp_path, capsys):
    found = examine(tmp_path, *decoding)
    assert found["by_number"][MISSING]["1"]["accuracy"] == 1
    assert found["by_number"][MISSING]["0"]["accuracy"] < 0.3
    assert found["all"]["same"]["flips"] == 0
    for rates in (found["all"]["other"], found["each"][0]["other"]):
        assert rates["flips"] == 1 and rates["follows"] == 1
        assert rates["apart"] == len(DIGITS) * 12 and rates["apart_flips"] == 1
    assert found["all"]["zero"]["flips"] > 0.8
    (probe,) = [probe for probe in found["probe"] if probe["fact"] == "result"]
    assert probe["found"]["accuracy"] > 0.99 and probe["shuffled"]["accuracy"] < 0.3
    out = capsys.readouterr().out
    assert "1. Accuracy falls from 100.0%" in out
    assert found["whole_chains"] == 1 and "in 100.0% of the rows they end with the answer" in out
    assert "100.0% into that row's: the answers depend on the latents" in out


# ------------------------------------------------------------------------------- probe


def test_the_probe_finds_what_is_planted():
    """Latents 3 and 4 hold the result of step 2 along a random direction; nothing else is held."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "question": f"q{i // 2}",
            "steps": [f"<<1+{i % 4}={1 + i % 4}>>", f"<<{i % 3}*2={i % 3}>>"],
        }
        for i in range(200)
    ]
    states, question = rng.normal(size=(200, 4, 16)), rng.normal(size=(200, 16))
    directions = 3 * rng.normal(size=(3, 16))
    states[:, 2:] += directions[[i % 3 for i in range(200)]][:, None]
    found = {(p["latent"], p["fact"]): p for p in probe_latents(states, question, rows, 2, 0)}
    assert {fact for _, fact in found} == {"result"}  # a single operator is none to tell apart
    for latent in (3, 4):
        probe = found[latent, "result"]
        assert probe["found"]["accuracy"] > 0.95 and verdict.holds(probe)
        assert probe["question"]["accuracy"] < 0.5 and probe["shuffled"]["accuracy"] < 0.5
        assert probe["first"]["accuracy"] < 0.5
    for latent in (1, 2):
        assert found[latent, "result"]["found"]["accuracy"] < 0.45
        assert not verdict.holds(found[latent, "result"])
    states[:, 0] = states[:, 3]  # known before any thought, if not at the question's end
    known = probe_latents(states, question, rows, 2, 0)
    assert not any(verdict.holds(probe) for probe in known)


def test_latents_that_stand_for_no_step_are_a_step_each():
    """c_thought: 0 has no latents, but a number of them can be forced."""
    rows = [{"question": f"q{i}", "steps": [f"<<1+{i % 4}={1 + i % 4}>>"]} for i in range(40)]
    states = np.random.default_rng(0).normal(size=(40, 2, 4))
    one, none = (probe_latents(states, states[:, 0], rows, c_thought, 0) for c_thought in (1, 0))
    assert one == none and one


def test_a_question_is_never_in_two_folds():
    """States that tell the question, and labels that go with it by chance, give nothing away."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    labels = rng.integers(0, 2, 40)[groups].astype(str)
    states = rng.normal(size=(40, 60))[groups] + 0.01 * rng.normal(size=(200, 60))
    apart = [f"question {group}" for group in groups]
    assert probe_accuracy(states, labels, apart)["accuracy"] < 0.75
    leaking = [str(row) for row in range(200)]
    assert probe_accuracy(states, labels, leaking)["accuracy"] > 0.95


@pytest.mark.parametrize(
    "step, facts",
    [
        ("<<10-7=3>>", {"result": "3", "operator": "-"}),
        ("<<-2*3+4=-2>>", {"result": "-2", "operator": "*+"}),
        ("3 = 3", {"result": "3"}),
        ("Every lempus is a wumpus.", {"node": "wumpus"}),
        ("4 17", {"node": "17"}),
    ],
)
def test_facts_of_a_step(step, facts):
    assert facts_of(step) == facts


def test_rare_labels_are_not_probed():
    """Nor labels that many rows have, but of one question."""
    questions = list(map(str, range(40)))
    assert usable_rows(["a"] * 30 + ["b"] * 3 + [None], questions) is None
    labels = ["a"] * 10 + ["b"] * 9 + [None] + ["c"] * 10
    assert usable_rows(labels, questions).tolist() == [*range(10), *range(20, 30)]
    assert usable_rows(["a"] * 30 + ["b"] * 10, [*questions[:30], *["same"] * 10]) is None


# ------------------------------------------------------------------------------- figures


def test_intervals_cover_as_stated():
    """Of simulated rates 95% lie in their interval, on average over rates and sizes; at none far
    fewer."""
    rng, covered = np.random.default_rng(0), []
    for total in (40, 400):
        for rate in (0.02, 0.1, 0.3, 0.5, 0.9):
            plain, draws = ["1"] * total, rng.random((400, total)) < rate
            judge = verdict.Judge(DEFAULT, plain, plain, list(range(total)))
            by_flips = {}
            for flips in set(draws.sum(1).tolist()):
                answers = ["2"] * flips + ["1"] * (total - flips)
                low, high = judge.rates(answers)["flips_interval"]
                by_flips[flips] = low <= rate <= high
            covered.append(np.mean([by_flips[flips] for flips in draws.sum(1).tolist()]))
    assert min(covered) > 0.89 and 0.93 < np.mean(covered) < 0.97


def test_rates_are_counted():
    judge = verdict.Judge(DEFAULT, ["1", "2", "3", "4"], ["1", "2", "0", None], [1, 2, 3, 0])
    rates = judge.rates(["2", "2.0", None, "1"])
    assert rates["accuracy"] == 0.25 and rates["answered"] == 0.75
    assert rates["flips"] == 0.75  # all but the second
    # row 2's donor has no answer; of rows 0, 1 and 3 the first and the last follow
    assert rates["follows"] == pytest.approx(2 / 3) and rates["apart"] == 3
    assert rates["apart_flips"] == pytest.approx(2 / 3)  # all but row 1


def test_a_swap_is_judged_where_it_can_show():
    """All rows but eight have the same answer, and the model obeys every swap."""
    plain = ["yes"] * 492 + ["no"] * 8
    donors = choose_donors(plain, DEFAULT, 0)
    judge = verdict.Judge(DEFAULT, plain, plain, donors)
    rates = judge.rates([plain[donor] for donor in donors])
    assert rates["flips"] == 0.032 and rates["apart"] == 16 and rates["apart_flips"] == 1
    line = verdict.swap_line({"same": rates, "other": rates}, None)
    assert "100.0% [80.6%, 100.0%] of the answers to 16 rows" in line
    assert "the answers depend on the latents" in line
    rates = verdict.Judge(DEFAULT, plain[:3], plain[:3], [1, 2, 0]).rates(plain[:3])
    line = verdict.swap_line({"same": rates, "other": rates}, None)
    assert line == "2. The model writes no two answers that differ: nothing is concluded."


CLEAR = (0.0, 0.8, 0.7, 0.9)  # a fall: p, difference, its ends


@pytest.mark.parametrize(
    "without, supplied, difference, beyond, words",
    [
        (0.1, 0.7, CLEAR, CLEAR, "these 80.0 points 60.0 belong .* 20.0 to the latents"),
        (0.1, 0.8, CLEAR, (0.3, 0.1, -0.01, 0.2), "70.0 belong .*, none are shown to belong to"),
        (0.1, 0.8, CLEAR, (0.125, 0.1, 0.025, 0.2), "70.0 belong .*, none are shown to belong to"),
        (0.1, 1.0, CLEAR, (1.0, -0.1, -0.2, 0.0), "80.0 belong .* none are shown to belong to"),
        (0.1, 0.0, CLEAR, CLEAR, "these 80.0 points 0.0 belong .* 80.0 to the latents"),
        (0.85, 0.9, (0.3, 0.05, -0.01, 0.1), CLEAR, "is not shown to fall"),
        (0.8, 0.9, (0.125, 0.1, 0.025, 0.2), CLEAR, "is not shown to fall"),  # four rows of forty
    ],
)
def test_what_a_fall_belongs_to(without, supplied, difference, beyond, words):
    """beyond: that to supplied steps. What is left of the fall was given to the latents whatever
    its interval, and noise is never below nothing."""
    of = lambda rate: {"accuracy": rate, "accuracy_interval": (rate, rate)}
    by_number = {MISSING: {0: of(without), 6: of(0.9)}, SUPPLIED: {0: of(supplied)}}
    falls = verdict.Falls(Paired(*difference), Paired(*beyond))
    assert re.search(words, verdict.fall_line(by_number, falls, 0.25))


def swapped(flips: float, reach: float = 0.02, answered: float = 1.0) -> dict:
    """Rates of a swap, and of the same latents."""
    rates = {"answered": answered, "apart": 100, "follows": None, "apart_flips": flips}
    rates["apart_flips_interval"] = flips - reach, flips + reach
    return {"same": rates, "other": rates}


@pytest.mark.parametrize(
    "flips, control, words",
    [
        (0.9, None, "answers depend on the latents .how much, --cot CONFIG can tell"),
        (0.06, None, "answers are not shown to depend on the latents"),
        (0.02, None, "answers hardly depend on the latents"),
        (0.9, 0.9, "answers depend on the latents.$"),
        (0.5, 0.5, "answers depend on the latents.$"),  # of two candidates
        (0.48, 0.9, "answers depend on the latents.$"),
        (0.46, 0.9, "answers depend at least partly on the latents.$"),
        (0.44, 0.9, "answers depend at least partly on the latents.$"),
        (0.42, 0.9, "answers depend only partly on the latents.$"),
        (0.02, 0.9, "answers hardly depend on the latents.$"),
        (0.06, 0.08, "answers are not shown to depend on the latents.$"),
        (0.9, 0.06, "the control itself fails, nothing is concluded.$"),
    ],
)
def test_what_a_swap_says(flips, control, words):
    line = verdict.swap_line(swapped(flips), None if control is None else swapped(control))
    assert re.search(words, line)


@pytest.mark.parametrize("whose, answered", [("model", (0.1, 1.0)), ("control", (1.0, 0.1))])
def test_without_answers_nothing_is_concluded(whose, answered):
    """No answer is like no answer: a swap changes none."""
    run, control = (swapped(0.9, answered=share) for share in answered)
    wanted = f"2. The {whose} writes an answer to 10.0% of the rows: nothing is concluded."
    assert verdict.swap_line(run, control) == wanted


@pytest.mark.parametrize("config", [GPTNeoConfig(), MptConfig()], ids=lambda c: c.model_type)
def test_attention_by_the_place_in_the_cache_is_refused(config):
    with pytest.raises(UserError, match="goes by the place of a key in the cache"):
        check_branches(config)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "sliding"])
def test_families_whose_branches_are_on_their_own(family):
    check_branches(sliding_config() if family == "sliding" else family_config(family))


# ------------------------------------------------------------------------------- the command

KILLED = """
import os, signal, sys
from analysis import __main__ as analysis, faithful
write, calls = faithful.write_json, []
def dying(path, value):
    write(path, value)
    calls.append(path)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
faithful.write_json = dying
analysis.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(trained, tmp_path, monkeypatch, capsys):
    """The batches that were finished are not computed again, and nothing tells the difference."""
    config = folder_of(trained, "run")
    whole = examine(tmp_path / "whole", config)
    arguments = ["faithful", config, "--output_dir", str(tmp_path / "killed")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT)
    assert killed.returncode == -9
    assert (tmp_path / "killed" / "faithful-partial.json").exists()
    batches, intervene = [], Latents.intervene
    counting = lambda self, *more: batches.append(more[-1]) or intervene(self, *more)
    monkeypatch.setattr(Latents, "intervene", counting)
    assert examine(tmp_path / "killed", config) == whole
    assert len(batches) == -(-len(whole["own_answers"]) // 9) - 2


def test_a_part_of_other_options_is_computed_again_and_no_other(trained, tmp_path):
    inputs = gather_inputs(read_config(folder_of(trained, "run")))
    longer = gather_inputs(read_config(folder_of(trained, "run"), "max_new_tokens=9"))
    batches, path = [[0, 1], [2]], tmp_path / "partial.json"
    asked = []
    compute = lambda rows: asked.append(rows) or {"rows": rows}
    first, again, other = (inputs, 1.0, [1, 0]), (inputs, 1.0, [1, 0]), (inputs, 2.0, [1, 0])
    more = [(longer, 2.0, [1, 0]), (longer, 2.0, [0, 1])]  # the last: other donors
    cases = [(first, batches), (again, []), *((of, batches) for of in [other, *more])]
    for of, wanted in cases:
        asked.clear()
        results = Partial(path).collect("latents", computed_from(*of), batches, compute)
        assert asked == wanted and [result["rows"] for result in results] == batches
        asked.clear()
        Partial(path).collect("chains", computed_from(*first), batches, compute)
        assert asked == (batches if of is first else [])


@pytest.mark.parametrize("whose, limits", [("", (3, 40)), ("--cot: ", (40, 3))])
def test_other_rows_are_checked_before_anything_is_asked(
    trained, tmp_path, capsys, monkeypatch, whose, limits
):
    monkeypatch.setattr(Latents, "plain", lambda self: pytest.fail("the rows were asked"))
    far = tmp_path / "far.json"
    far.write_text(json.dumps(tiny_rows(3)))
    own, of_control = (f"max_new_tokens={limit}" for limit in limits)
    options = ["--cot", folder_of(trained, "cot"), "--cot", of_control]
    options += ["--rows_of", far, "--output_dir", tmp_path]
    assert call(None, folder_of(trained, "run"), own, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {whose}{far}: a chain with its answer has ")


@pytest.mark.parametrize(
    "options, words",
    [
        (["cot"], "a run of method cot has no latents to intervene on"),
        (["run", "eval_num_latents=0"], "the rows have [0] latents; set eval_num_latents"),
        (["run", "eval_num_latents=all"], "give one number of latents"),
        (["run", "eval_num_latents=0"], "set eval_num_latents to one number above 0"),
        (["run", "max_new_tokens=462"], "max_new_tokens: 462 behind a question"),
        (["run", "--sigma", "nan"], "--sigma: nan is no size of a noise"),
        (["run", "--sigma", "1e39"], "--sigma: 1e+39 is no size of a noise; give a number from 0"),
        (["run", "--output_dir", "/proc/nowhere"], "output: /proc/nowhere cannot be written"),
        (["run", "--cot", "nowhere"], "--cot: nowhere: no such checkpoint"),
        (["run", "val_path=null", "eval_sets={a: val.json}"], "val_path: there are no rows"),
        (["run", "eval_subset_size=6"], "6 rows are too few to exchange latents and to probe"),
        (["run", "--cot", "run"], "--cot: a run of method cot is needed, this one is coconut"),
        (["run", "--cot", "cot", "--cot", "eval_subset_size=21"], "are not those of the run"),
    ],
)
def test_bad_input_is_one_line_before_any_model(trained, capsys, monkeypatch, options, words):
    monkeypatch.setattr("analysis.faithful.build_probe", lambda _: pytest.fail("model loaded"))
    names = ("run", "cot")
    options = [folder_of(trained, text) if text in names else text for text in options]
    options = [text.replace("val.json", trained.values["val_path"]) for text in options]
    assert call(None, *options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
