"""analysis.load and Probe.answer: a checkpoint in three lines of Python."""

import json
import shutil

import pytest
import torch
from conftest import Workspace, tiny_rows
from numerics import in_float64
from transformers import AutoModelForCausalLM, AutoTokenizer

import run
from analysis import load
from analysis.probe import read_config
from utils import UserError

QUESTIONS = ["How many plums?", "Tom has 2 and gets 3. How many has he?", "Why?"]
ZEROS = torch.zeros(3, 1)


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory) -> Workspace:
    """A coconut run of two epochs, stages 1 and 2: two latents, then four."""
    workspace = Workspace(model_folder, tmp_path_factory.mktemp("trained"))
    assert run.main([str(workspace.yaml(num_epochs=2))]) == 0
    return workspace


@pytest.fixture
def float64():
    """What is compared token by token depends on no rounding."""
    with in_float64():
        yield


def test_a_checkpoint_brings_all_that_it_needs(trained, monkeypatch, tmp_path):
    """Read from another folder, it names no file outside its own."""
    monkeypatch.chdir(tmp_path)
    model = load(trained.run_dir / "checkpoint_1")
    assert [a.num_latents for a in model.answer(QUESTIONS)] == [2, 2, 2]
    assert model.config.model_id == str(trained.run_dir / "checkpoint_1")
    assert list(tmp_path.iterdir()) == []


def test_a_path_may_have_any_letter(trained, tmp_path):
    name = tmp_path / "run\U0001f600" / "\u00e9" / "checkpoint_1"
    folder = shutil.copytree(trained.run_dir / "checkpoint_1", name)
    config = read_config(str(folder))
    assert (config.load_model_path, config.model_id) == (str(folder), str(folder))


def test_answers_are_those_of_the_evaluation(trained, float64):
    """The rows of the validation file, asked in Python, give what the run wrote of them."""
    results = trained.run_dir / "results_epoch_2.jsonl"
    written = [json.loads(line) for line in results.read_text().splitlines()]
    model = load(trained.run_dir)  # the newest checkpoint
    answers = model.answer([result["question"] for result in written])
    for result, answer in zip(written, answers, strict=True):
        assert answer.num_latents == result["num_latents"] == 4
        assert (answer.answer, answer.steps) == (result["answer"], result["steps"])
        assert answer.text in result["output"]


def test_answers_do_not_depend_on_the_batch(trained, float64):
    together = load(trained.run_dir, batch_size_eval=3).answer(QUESTIONS, num_latents=3)
    alone = [load(trained.run_dir).answer([q], num_latents=3)[0] for q in QUESTIONS]
    assert [(a.text, a.num_tokens) for a in together] == [(a.text, a.num_tokens) for a in alone]


def test_thoughts_are_the_hidden_states_fed_back(trained, float64):
    """The definition: the whole sequence again for each latent, without a cache."""
    model = load(trained.run_dir)
    answer = model.answer(QUESTIONS[:1], num_latents=3, thoughts=True)[0]
    base, tokenizer = model.model.base_causallm, model.inputs.tokenizer
    ids = tokenizer(QUESTIONS[0] + "\n<|start-latent|>")["input_ids"]
    embeds = base.get_input_embeddings()(torch.tensor([ids]))
    for thought in answer.thoughts:
        state = base.base_model(inputs_embeds=embeds).last_hidden_state[:, -1:]
        torch.testing.assert_close(thought, state[0, 0])
        embeds = torch.cat([embeds, state], dim=1)
    assert answer.thoughts.shape == (3, base.config.hidden_size)
    assert model.answer(QUESTIONS[:1], num_latents=3)[0].thoughts is None


def test_number_of_latents_changes_what_is_fed_back(trained):
    model = load(trained.run_dir, eval_num_latents=1)
    assert [a.num_latents for a in model.answer(QUESTIONS)] == [1] * 3
    assert [a.num_latents for a in model.answer(QUESTIONS, num_latents=0)] == [0] * 3


def test_a_model_that_was_never_trained_here(model_folder, float64):
    """No latents; the completion is the library's greedy one."""
    model = load(model_folder, max_new_tokens=6)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompt = tokenizer(QUESTIONS[0] + "\n", return_tensors="pt")
    new = base.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt.input_ids.shape[1] :]
    answer = model.answer(QUESTIONS[:1])[0]
    assert answer.text == tokenizer.decode(new, skip_special_tokens=True)
    assert answer.num_latents == 0


def test_a_single_file_takes_what_it_does_not_hold(trained, tmp_path, float64):
    """The ancestor's form: a state dict of a Coconut, names with base_causallm."""
    checkpoint = trained.run_dir / "checkpoint_2"
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    state = {f"base_causallm.{name}": t for name, t in base.state_dict().items()}
    torch.save(state, tmp_path / "checkpoint_2")
    keys = dict(c_thought=2, epochs_per_stage=1, max_latent_stage=2, resume=2, max_new_tokens=8)
    file = load(tmp_path / "checkpoint_2", model_id=trained.values["model_id"], **keys)
    folder = load(checkpoint)
    assert [a.text for a in file.answer(QUESTIONS)] == [a.text for a in folder.answer(QUESTIONS)]
    assert file.answer(QUESTIONS)[0].num_latents == 4


def test_a_path_below_the_home_folder_is_one(trained, monkeypatch):
    monkeypatch.setenv("HOME", str(trained.folder))
    assert load("~/out/run/checkpoint_2").answer(QUESTIONS)[0].num_latents == 4


@pytest.mark.parametrize(
    "path, keys, asked, words",
    [
        ("run/checkpoint_9", {}, {}, "no such checkpoint"),
        ("run", dict(max_new_token=3), {}, "did you mean max_new_tokens"),
        ("run", {}, dict(questions=[" "]), "question: expected a text"),
        ("run", {}, dict(questions=["<|latent|>"]), "holds a latent marker"),
        ("run", dict(pad_latent_to_max=False), {}, "pad_latent_to_max: False, but .* with True"),
        ("model", {}, dict(num_latents=2), "num_latents: 2, but a cot model has none"),
        ("run", {}, dict(num_latents=4000), "positions"),
        ("run", {}, dict(num_latents=-1), "num_latents: -1 is below 0"),
        ("run", {}, dict(num_latents=2, replaced=(2, ZEROS)), "latent 2, but 2 are fed back"),
        ("run", {}, dict(num_latents=0, replaced=(0, ZEROS)), "latent 0, but 0 are fed back"),
        ("run", {}, dict(replaced=(-1, ZEROS)), "replaced: latent -1, but 4"),
        ("model", {}, dict(replaced=(0, ZEROS)), "latent 0, but 0 are fed back"),
    ],
)
def test_what_cannot_be_is_one_line(trained, model_folder, path, keys, asked, words):
    path = model_folder if path == "model" else trained.folder / "out" / path
    with pytest.raises(UserError, match=words):
        load(path, **keys).answer(**dict(questions=QUESTIONS) | asked)


def test_a_typed_question_has_no_chain_that_latents_go_by(trained, tmp_path):
    folder = shutil.copytree(trained.run_dir / "checkpoint_2", tmp_path / "checkpoint_2")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("to_max: true", "to_max: false"))
    model = load(folder)
    with pytest.raises(UserError, match="takes the number of latents from the gold chain"):
        model.answer(QUESTIONS)
    assert model.answer(QUESTIONS, num_latents=2)[0].num_latents == 2


def test_evaluating_rows_with_gold_answers(trained):
    """with_rows: the same model on other rows, for whatever one wants to know of them."""
    model = load(trained.run_dir).with_rows(tiny_rows(5, seed=3))
    dataset = model.dataset(None)
    assert len(model.answers(dataset, [0, 4])) == 2
    assert model.forward(model.prompts(dataset, [0, 1])).latents.shape[:2] == (2, 4)
