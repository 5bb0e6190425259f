"""Generation by the library's hook against coconut.py, and the model card that shows it."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, VOCAB, Workspace, family_config
from tokenizers import normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

import run
from analysis.probe import load_probe, read_config
from coconut import LATENT, Coconut
from engine.card import model_card
from engine.custom_generate import GREEDY, USED, generate
from engine.support import LATENT_ID, WINDOW, make_batch, make_rows, small_config
from loader import load_config

FAMILIES = {
    "llama": family_config("llama"),
    "qwen3": family_config("qwen3"),  # tied
    "gpt2": family_config("gpt2"),
    "mistral": MistralConfig(sliding_window=64, initializer_range=0.2),
    "gemma3": Gemma3TextConfig(head_dim=16, initializer_range=0.2),  # tied, some with a window
}
PAD_ID, NEW = 1, 12


def tiny(family: str, **generation):
    """A small model of random weights that never ends by itself, with a generation config."""
    hf_config = small_config(FAMILIES[family])
    hf_config.vocab_size = VOCAB
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(hf_config).eval()
    options = dict(latent_token_id=LATENT_ID, max_new_tokens=NEW, pad_token_id=PAD_ID)
    base.generation_config = GenerationConfig(**{**options, **generation})
    return base


def prompts(latents: bool = True) -> dict[str, torch.Tensor]:
    """Rows of several lengths, padded on the left, with latents in other columns each."""
    rows = [(ids[labels == -100], labels[labels == -100]) for ids, labels in make_rows()]
    batch = make_batch(rows, left_only=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    columns = inputs["input_ids"] == LATENT_ID
    assert (columns.sum(1) > 0).tolist() == [True, True, False, True]
    if not latents:
        inputs["input_ids"] = inputs["input_ids"].masked_fill(columns, 50)
    return inputs


def by_coconut(base, inputs: dict, eos_id: int = -1) -> list[list[int]]:
    model = Coconut(copy.deepcopy(base), LATENT_ID, eos_token_id=eos_id)
    return [new.tolist() for new in model.generate(**inputs, max_new_tokens=NEW)]


def new_tokens(output: torch.Tensor, inputs: dict) -> list[list[int]]:
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    return output[:, length:].tolist()


# ------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("latents", [True, False], ids=["latents", "no latents"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_coconut(family, latents):
    base, inputs = tiny(family), prompts(latents)
    assert inputs["input_ids"].shape[1] + NEW > 4 * WINDOW
    wanted = by_coconut(base, inputs)
    assert len({token for row in wanted for token in row}) >= 10  # else any bug could hide
    assert new_tokens(generate(base, **inputs), inputs) == wanted
    if latents:  # and are lost on the library's own search, in the rows that have some
        plain = new_tokens(base.generate(**inputs, do_sample=False), inputs)
        assert [a == b for a, b in zip(plain, wanted)] == [False, False, True, False]


@pytest.mark.parametrize("pad_id", [PAD_ID, None])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_without_latents_it_is_the_librarys_greedy_search(family, pad_id):
    """Every token as eos in turn, alone and with another one: the same tensor, padding and all."""
    base, inputs = tiny(family, pad_token_id=pad_id), prompts(latents=False)
    free = new_tokens(generate(base, **inputs), inputs)
    for eos_id in {token for row in free for token in row}:
        for eos in (eos_id, [eos_id, free[0][2]]):
            base.generation_config.eos_token_id = eos
            output = generate(base, **inputs)
            assert torch.equal(output, base.generate(**inputs, do_sample=False))


def test_rows_end_at_eos_and_go_on_with_padding():
    base, inputs = tiny("llama"), prompts()
    for eos_id in {token for row in by_coconut(base, inputs) for token in row}:
        wanted = by_coconut(base, inputs, eos_id)
        length = max(map(len, wanted))
        output = new_tokens(generate(base, **inputs, eos_token_id=eos_id), inputs)
        assert output == [row + [PAD_ID] * (length - len(row)) for row in wanted]


def test_it_ends_where_all_rows_have():
    base, inputs = tiny("llama"), prompts()
    first = [row[0] for row in by_coconut(base, inputs)]
    assert generate(base, **inputs, eos_token_id=first).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("latents", [True, False])
def test_every_column_is_run_once(latents):
    base, inputs, widths = tiny("qwen3"), prompts(latents), []
    base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    output = generate(base, **inputs)
    assert sum(widths) == output.shape[1] - 1
    columns = (inputs["input_ids"] == LATENT_ID).any(0).sum()
    assert len(widths) == columns + NEW and (columns > 0) == latents


# ------------------------------------------------------------------------------- options


def test_the_callers_options_win_over_the_models():
    base, inputs = tiny("qwen3", max_new_tokens=3), prompts()
    lengths = [
        generate(base, **inputs, **options).shape[1] - inputs["input_ids"].shape[1]
        for options in (
            {},
            dict(max_new_tokens=5),
            dict(generation_config=GenerationConfig(max_new_tokens=4)),
            dict(generation_config=GenerationConfig(max_new_tokens=4), max_new_tokens=2),
            dict(generation_config=GenerationConfig(bos_token_id=7)),
        )
    ]
    assert lengths == [3, 5, 4, 2, 3]
    assert base.generation_config.max_new_tokens == 3


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True),
        dict(num_beams=2),
        dict(temperature=0.7),
        dict(length_penalty=0.5),
        dict(repetition_penalty=1.1),
        dict(max_length=30),
        dict(use_cache=False),
        dict(return_dict_in_generate=True),
        dict(streamer=object()),
        dict(stopping_criteria=[]),
        dict(position_ids=torch.arange(3)),
        dict(no_such_option=1),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_supported_is_refused_wherever_it_is_asked_for(options):
    base, inputs = tiny("qwen3"), prompts()
    (name,) = options
    with pytest.raises(ValueError, match=f"^generate: no support for this {name}: .*greedy"):
        generate(base, **inputs, **options)
    if not hasattr(base.generation_config, name):
        return
    with pytest.raises(ValueError, match=f"no support for this {name}: "):
        generate(base, **inputs, generation_config=GenerationConfig(**options))
    setattr(base.generation_config, name, options[name])
    with pytest.raises(ValueError, match=f"no support for this {name}: "):
        generate(base, **inputs)


def test_a_config_that_the_library_made_of_the_models_asks_for_nothing():
    """Of a folder without generation_config.json: False is nothing, nor is where it comes from."""
    base, inputs = tiny("qwen3"), prompts()
    wanted = generate(base, **inputs)
    ids = {name: getattr(base.generation_config, name, None) for name in USED}
    base.generation_config = GenerationConfig.from_model_config(base.config)
    assert base.generation_config.output_attentions is False
    assert torch.equal(generate(base, **inputs, **ids), wanted)


def test_greedy_search_may_be_asked_for_by_name():
    base, inputs = tiny("qwen3"), prompts()
    output = generate(base, **inputs, **GREEDY, streamer=None)
    assert torch.equal(output, generate(base, **inputs))


@pytest.mark.parametrize("name", ["latent_token_id", "max_new_tokens"])
def test_a_model_that_does_not_name_what_is_needed_is_refused(name):
    """That of another folder, say: without the latent's id nothing would be fed back."""
    base, inputs = tiny("qwen3"), prompts()
    delattr(base.generation_config, name)
    with pytest.raises(ValueError, match=f"^generate: no {name}"):
        generate(base, **inputs)
    with pytest.raises(ValueError, match=f"^generate: no {name}"):
        generate(base, **inputs, **{name: None})


def test_input_that_cannot_be_right_is_refused():
    base, inputs = tiny("qwen3"), prompts()
    with pytest.raises(ValueError, match="padded on the left"):
        generate(base, inputs["input_ids"], inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="need their attention_mask"):
        generate(base, inputs["input_ids"])
    with pytest.raises(ValueError, match="input_ids are missing"):
        generate(base)
    inputs["input_ids"][2, inputs["attention_mask"][2].argmax()] = LATENT_ID
    with pytest.raises(ValueError, match="no hidden state before it"):
        generate(base, **inputs)


# ------------------------------------------------------------------------------- checkpoints

METHODS = {
    "coconut": {},
    "pause": dict(latent_input="pause"),
    "no_thoughts": dict(coconut=False, no_thoughts=True),
    "cot": dict(coconut=False, cot=True),
    "no_cot": dict(coconut=False, no_cot=True),
}
SHORT = dict(num_epochs=2, skip_validation=True, batch_size_training=12, num_workers=0)


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """Workspaces with a run of two epochs, by method; each is made when it is asked for."""
    spaces: dict[str, Workspace] = {}

    def space(method: str) -> Workspace:
        if method not in spaces:
            spaces[method] = Workspace(model_folder, tmp_path_factory.mktemp(method))
            spaces[method].values |= {**SHORT, **METHODS[method]}
            assert run.main([str(spaces[method].yaml())]) == 0
        return spaces[method]

    return space


def probe_of(space: Workspace, question: str | None = None):
    """The checkpoint as this program evaluates it, on its own rows or on a single question."""
    path = space.run_dir / "checkpoint_2"
    config = read_config(str(space.yaml(load_model_path=str(path), skip_validation=None)))
    row = {"question": question, "steps": [], "answer": "1"}
    return load_probe(config, None if question is None else [row])


def files(checkpoint: Path) -> set[str]:
    """All but the weights and the training state."""
    names = (str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())
    return {name for name in names if not re.match(r"training_state|.*\.safetensors$", name)}


OWN = {"README.md", "generation_config.json", "config.json", "config.yaml", "state.json"}
OWN |= {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("method", METHODS)
def test_every_checkpoint_has_its_card_and_only_thoughts_their_code(trained, method):
    for checkpoint in (trained(method).run_dir / f"checkpoint_{epoch}" for epoch in (1, 2)):
        code = {"custom_generate/generate.py"} if method == "coconut" else set()
        assert files(checkpoint) == OWN | code
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        greedy = json.loads((checkpoint / "generation_config.json").read_text())
        del greedy["transformers_version"]
        latent = {"latent_token_id": tokenizer.convert_tokens_to_ids(LATENT)} if code else {}
        assert greedy == {
            "do_sample": False,
            "max_new_tokens": 8,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **latent,
        }


def test_the_code_of_a_checkpoint_needs_nothing_of_ours(trained):
    text = (trained("coconut").run_dir / "checkpoint_2/custom_generate/generate.py").read_text()
    assert text == (ROOT / "engine" / "custom_generate.py").read_text()
    roots = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
    assert set(roots) == {"typing", "torch", "transformers"}


@pytest.mark.parametrize("trusted", [False, True], ids=["in the call", "when it was opened"])
def test_a_checkpoint_that_the_library_opened_generates_as_here(trained, trusted):
    space = trained("coconut")
    folder = str(space.run_dir / "checkpoint_2")
    probe = probe_of(space)
    rows = list(range(len(probe.rows)))
    batch = probe.prompts(probe.dataset(None), rows)
    assert batch.attention_mask.min() == 0 and batch.latent_columns != (0, 0)
    wanted = [new.tolist() for new in probe.complete(probe.dataset(None), rows)]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    hook = dict(custom_generate=folder, trust_remote_code=True)
    for arguments in (hook, {}) if trusted else (hook,):
        output = new_tokens(model.generate(**inputs, **arguments), inputs)
        assert [new[: len(w)] for new, w in zip(output, wanted)] == wanted
    alone = {name: tensor[:1, batch.attention_mask[0] == 1] for name, tensor in inputs.items()}
    if not trusted:  # the library passes what has no name on as inputs
        output = model.generate(alone["input_ids"], **hook)
        assert new_tokens(output, alone)[0] == wanted[0]
    with pytest.raises(ValueError, match="no support for this do_sample: "):
        model.generate(**alone, **hook, do_sample=True)


def code_of(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    return code


@pytest.mark.parametrize("method", METHODS)
def test_the_code_of_the_card_answers_as_here(trained, method, monkeypatch, capsys):
    check_code_of_the_card(trained(method), monkeypatch, capsys)


def test_the_code_of_the_card_cuts_what_a_tokenizer_puts_behind(
    model_folder, tmp_path, monkeypatch, capsys
):
    """It asked with an eos behind the prompt, and the answer was another."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    template = processors.TemplateProcessing(f"$A {eos[0]}", special_tokens=[eos])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    (tmp_path / "space").mkdir()
    space = Workspace(folder, tmp_path / "space")
    space.values |= SHORT
    assert run.main([str(space.yaml())]) == 0
    check_code_of_the_card(space, monkeypatch, capsys)


@pytest.mark.parametrize("template, cut", [("{} $A", 0), ("{} $A {}", 1), ("$A {}", 1)])
def test_what_the_code_of_the_card_cuts_where_line_breaks_are_no_tokens(
    model_folder, workspace, template, cut
):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        template.format(eos[0], eos[0]), special_tokens=[eos]
    )
    card = model_card("run", load_config(workspace.yaml()), tokenizer, 1, None, [])
    assert (f"[:, :-{cut}]" in card) == (cut > 0) and ("[:, :-" in card) == (cut > 0)


def check_code_of_the_card(space: Workspace, monkeypatch, capsys) -> None:
    code = code_of((space.run_dir / "checkpoint_2" / "README.md").read_text())
    question = re.search(r'prompt = "(.*)\\n"', code)[1]
    probe = probe_of(space, question)
    dataset = probe.dataset(None)
    (wanted,) = probe.complete(dataset, [0])
    monkeypatch.chdir(space.run_dir)
    capsys.readouterr()
    variables: dict = {}
    exec(code, variables)
    prompt = dataset.question(0).input_ids.tolist()
    assert variables["inputs"]["input_ids"][0].tolist() == prompt
    assert variables["output"][0].tolist() == prompt + wanted.tolist()
    assert capsys.readouterr().out == probe.text(wanted) + "\n"


def words(card: str) -> str:
    """The card's text, without the front matter that the Hub reads."""
    opening, _, text = card.partition("\n---\n")
    assert opening.startswith("---\nlibrary_name: transformers\n")
    return " ".join(text.split())


def test_the_card_names_what_the_reader_has_to_know(trained, model_folder):
    cards = {
        method: words((trained(method).run_dir / "checkpoint_2" / "README.md").read_text())
        for method in METHODS
    }
    for method, card in cards.items():
        assert card.startswith(f"# checkpoint_2 - base model: `{model_folder}` - method: ")
        assert "- epochs done: 2 - stage: " in card and "the question, a line break" in card
        assert ("silently ignores the thoughts" in card) == (method == "coconut")
        assert ("custom_generate" in card) == (method == "coconut")
        has_markers = method in ("coconut", "pause")
        markers = ", `<|start-latent|>`, 4 times `<|latent|>`, `<|end-latent|>`."
        assert (markers in card) == has_markers
        assert f"with {4 if has_markers else 0} latents" in card
    assert "The model then writes `###` and the answer" in cards["no_cot"]
    assert "then writes the steps of its reasoning, a line each, `###`" in cards["cot"]
    assert "then writes the remaining steps of its reasoning, a line each" in cards["coconut"]


def test_a_checkpoint_within_an_epoch_says_so_and_how_latents_are_counted(workspace, monkeypatch):
    path = workspace.yaml(**SHORT, save_every_steps=1, pad_latent_to_max=False)
    monkeypatch.setattr("engine.loop.prune", lambda *args: None)
    assert run.main([str(path), "num_epochs=1", "gradient_accumulation_steps=1"]) == 0
    card = words((workspace.run_dir / "checkpoint_1_step_1" / "README.md").read_text())
    assert "- epochs done: 0, and 1 optimizer steps of the next - stage: 1, with 2 latents" in card
    assert "2 times for each step that it takes, at most 2 times, `<|latent|>`" in card
    assert 'folder = "checkpoint_1_step_1"' in card


def test_a_base_model_that_samples_makes_a_checkpoint_that_does_not(workspace, tmp_path):
    """Qwen3's own generation config samples."""
    folder = tmp_path / "sampling"
    model = AutoModelForCausalLM.from_pretrained(workspace.values["model_id"])
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_k=20)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(workspace.values["model_id"]).save_pretrained(folder)
    path = workspace.yaml(**{**SHORT, "num_epochs": 1}, model_id=str(folder))
    assert run.main([str(path)]) == 0
    saved = GenerationConfig.from_pretrained(workspace.run_dir / "checkpoint_1")
    assert (saved.do_sample, saved.temperature, saved.top_k) == (False, None, None)


def test_the_run_goes_on_and_is_pruned_with_the_code_in_its_folders(workspace):
    keys = {**SHORT, "keep_checkpoints": 1}
    assert run.main([str(workspace.yaml(**{**keys, "num_epochs": 1}))]) == 0
    assert run.main([str(workspace.yaml(**keys))]) == 0
    names = sorted(path.name for path in workspace.run_dir.glob("checkpoint_*"))
    assert names == ["checkpoint_2"]
    source = workspace.run_dir / "checkpoint_2"
    again = {**keys, "load_model_path": str(source), "resume": 2, "num_epochs": 3}
    assert run.main([str(workspace.yaml(**again, name="other"))]) == 0
    assert files(workspace.run_dir.with_name("other") / "checkpoint_3") == files(source)
