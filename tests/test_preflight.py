"""Bad input: exit code 2, a line that names the key, file or row, nothing on the disk changed.

CASES is the table. Each case starts from a workspace that works, with a finished run of two epochs
in out/run, and breaks one thing. It is tried with --check and without.
"""

import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from conftest import ROOT, VOCAB, Workspace, family_config, tiny_model, tiny_rows
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
)

import run
from engine import preflight
from engine.pretrained import load_tokenizer
from engine.stop import STOPPING
from loader import load_config

MANY_LETTERS = "x" * 300  # longer than a file name may be


class Bench(Workspace):
    """A workspace with a finished run in out/run, and what the cases break it with."""

    def __init__(self, model_folder: Path, folder: Path, trained: Path):
        super().__init__(model_folder, folder)
        self.values |= dict(num_epochs=2)
        self.model = model_folder
        shutil.copytree(trained, self.folder / "out")

    def write(self, name: str, content) -> str:
        """A file of text, bytes or JSON; its path."""
        path = self.folder / name
        if isinstance(content, list | dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def train(self, content) -> dict:
        return dict(name="new", train_path=self.write("bad.json", content))

    def val(self, content) -> dict:
        return dict(name="new", val_path=self.write("bad.json", content))

    def row(self, row) -> dict:
        return self.train([*tiny_rows(3), row])

    def model_copy(self, *without: str) -> Path:
        """A copy of the model folder, without some of its files."""
        folder = self.folder / "bad_model"
        shutil.copytree(self.model, folder)
        for name in without:
            (folder / name).unlink()
        return folder

    def model_with(self, name: str, content, **changes) -> dict:
        """The model folder with one file replaced."""
        folder = self.model_copy()
        self.write(f"bad_model/{name}", content)
        return dict(name="new", model_id=str(folder), **changes)

    def model_of(self, hf_config) -> dict:
        """A folder with another config and the same tokenizer, to be trained from scratch."""
        folder = self.model_copy("model.safetensors")
        hf_config.save_pretrained(folder)
        return dict(name="new", model_id=str(folder), from_scratch=True)

    def tokenizer_with(self, **changes) -> dict:
        folder = self.model_copy()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        return dict(name="new", model_id=str(folder))

    def tokenizer_with_tokens(self, *tokens: str) -> dict:
        """The model with tokens that it has no row for."""
        changes = self.tokenizer_with()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(changes["model_id"])
        tokenizer.add_tokens([*tokens])
        tokenizer.save_pretrained(changes["model_id"])
        return changes

    def evaluated(self, name: str) -> dict:
        """The run folder of an evaluation, as far as a training sees it."""
        (self.folder / "out" / name).mkdir()
        self.write(f"out/{name}/metrics.jsonl", '{"kind": "eval_set"}\n')
        return {}

    def without_checkpoints(self) -> dict:
        for path in self.run_dir.glob("checkpoint_*"):
            path.rename(self.folder / path.name)
        return {}

    def weights(self, edit, name="bad.safetensors") -> dict:
        """The model's own tensors after an edit, as a checkpoint to start from."""
        tensors = load_file(self.model / "model.safetensors")
        edit(tensors)
        if name.endswith(".safetensors"):
            save_file(tensors, self.folder / name)
        else:
            torch.save(tensors, self.folder / name)
        return dict(name="new", load_model_path=str(self.folder / name))

    def other_weights(self, **changes) -> dict:
        """A new run from the first checkpoint of the finished one."""
        path = str(self.run_dir / "checkpoint_1")
        return dict(name="new", load_model_path=path) | changes

    def stray_file(self, **changes) -> dict:
        """A single file of weights in the run folder itself, where it was downloaded to."""
        path = self.folder / "out/new/checkpoint_1"
        path.parent.mkdir()
        torch.save(load_file(self.model / "model.safetensors"), path)
        return dict(name="new", load_model_path=str(path), num_epochs=3) | changes

    def weights_of(self, model) -> dict:
        model.save_pretrained(self.folder / "other")
        return dict(name="new", load_model_path=str(self.folder / "other"))

    def text(self, text: str) -> dict:
        """Text in place of the YAML that the values would give."""
        return dict(_text=text)

    def append(self, text: str) -> dict:
        return dict(_text=yaml.safe_dump(self.values) + text)

    def without(self, *names: str) -> dict:
        return dict.fromkeys(names)

    def evaluation(self, **changes) -> dict:
        path = str(self.run_dir / "checkpoint_2")
        return dict(name="new", only_eval=True, load_model_path=path, **changes)

    def command(self, changes: dict) -> list[str]:
        """Write the config; the arguments of run.main."""
        changes = dict(changes)
        text, argv = changes.pop("_text", None), changes.pop("_argv", [])
        path = changes.pop("_config", None) or str(self.yaml(**changes))
        if text is not None:
            Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
        return [path, *argv]


class Case(NamedTuple):
    name: str
    change: object  # of the config: a dict, or a function of the bench that returns one
    fragments: tuple[str, ...]  # each is in the message; {folder}: the bench's
    check_finds_it: bool = True


# it has tokens for nothing but the added ones, and none for what is unknown
NO_VOCABULARY = (
    '{"version": "1.0", "added_tokens": [{"id": 0, "content": "<|endoftext|>", "single_word": '
    'false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}], "model": '
    '{"type": "WordLevel", "vocab": {}, "unk_token": "?"}}'
)
# what tokenizers reads up to the kind of its model, and says so in a bare Exception
OTHER_TOKENIZER = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "Another", "vocab": {}}}
)


def case(name: str, change, *fragments: str, check_finds_it: bool = True) -> Case:
    return Case(name, change, fragments, check_finds_it)


# ------------------------------------------------------------------------------- the table

CONFIG = [
    case("misspelt key", dict(num_epoch=3), "config.yaml", "num_epoch", "did you mean num_epochs?"),
    case("unknown key", dict(zzz=3), "unknown key zzz"),
    case("number for a bool", dict(bf16=1), "bf16: 1 is not bool"),
    case("word for a bool", dict(debug="maybe"), "debug: 'maybe' is not bool"),
    case("word for an int", dict(num_epochs="three"), "num_epochs: 'three' is not int"),
    case("fraction for an int", dict(c_thought=1.5), "c_thought: 1.5 is not int"),
    case("bool for an int", dict(seed=True), "seed: True is not int"),
    case("list for a text", dict(train_path=["a"]), "train_path: ['a'] is not str"),
    case("number for a text", dict(name=5), "name: 5 is not str"),
    case("mapping for a text", dict(model_id={"a": 1}), "model_id: {'a': 1} is not str"),
    case("word for a float", dict(lr="fast"), "lr: 'fast' is not float"),
    case("bool for a float", dict(weight_decay=False), "weight_decay: False is not float"),
    case("null for a required key", dict(_argv=["save_path=null"]), "save_path: None is not str"),
    case("empty text", dict(name=" "), "name: ' '"),
    case("two methods", dict(cot=True), "coconut and cot", "set exactly one"),
    case("no method", dict(coconut=False), "none set to True", "set exactly one"),
    case("missing model_id", dict(model_id=None), "model_id is missing"),
    case(
        "several missing",
        lambda b: b.without("model_id", "save_path"),
        "model_id is",
        "save_path is",
    ),
    case("batch of none", dict(batch_size_training=0), "batch_size_training: 0 is below 1"),
    case("negative lr", dict(lr=-1.0), "lr: -1.0 is below 0"),
    case("lr not a number", dict(lr=float("nan")), "lr: nan is not finite"),
    case("probability over 1", dict(uniform_prob=2.0), "uniform_prob: 2.0 is above 1"),
    case("negative latents", dict(c_thought=-2), "c_thought: -2 is below 0"),
    case("unknown schedule", dict(schedule="slow"), "schedule: 'slow'", "capped, paper"),
    case(
        "pauses without latents",
        dict(coconut=False, cot=True, latent_input="pause"),
        "latent_input: pause is for coconut",
    ),
    case(
        "pauses without a method",
        dict(coconut=False, latent_input="pause"),
        "method: none set to True",
    ),
    case("unknown latent input", dict(latent_input="noise"), "latent_input: 'noise'", "pause"),
    case("unknown kind of answer", dict(answer_kind="code"), "answer_kind: 'code'", "number, text"),
    case(
        "two ways to accumulate",
        dict(rows_per_step=8, gradient_accumulation_steps=2),
        "rows_per_step: says how much is accumulated",
    ),
    case(
        "a micro-batch without room for a row",
        dict(tokens_per_micro_batch=100, max_seq_length=128),
        "tokens_per_micro_batch: 100 has no room for a row of max_seq_length (128)",
    ),
    case(
        "more than all blocks",
        dict(gradient_checkpointing=2),
        "gradient_checkpointing: 2.0 is above 1",
    ),
    case("blank marker", dict(answer_marker=" "), "answer_marker: ' '"),
    case("unknown optimizer", dict(optimizer="sgd"), "optimizer: 'sgd'", "auto, adamw"),
    case("placeholder", dict(save_path="YOUR_PATH"), "save_path: 'YOUR_PATH' is a placeholder"),
    case("resume beyond num_epochs", dict(resume=3), "resume: 3", "num_epochs: 2"),
    case("evaluation of nothing", dict(only_eval=True), "load_model_path: only_eval needs"),
    case("no training rows", dict(train_path=None), "train_path: training needs"),
    case("no validation rows", dict(val_path=None), "val_path: validation needs"),
    case(
        "best of nothing",
        dict(skip_validation=True, save_only_improve=True),
        "save_only_improve: needs validation",
    ),
    case("name with a slash", dict(name="a/b"), "name: 'a/b' is not a plain folder name"),
    case("name of the folder above", dict(name=".."), "name: '..' is not a plain folder name"),
    case("name too long", dict(name=MANY_LETTERS), "name", MANY_LETTERS[:50]),
    case("save_path too long", dict(save_path=f"/tmp/{MANY_LETTERS}"), "save_path"),
    case("NUL in a path", dict(train_path="a\0b"), "train_path"),
    case(
        "forced latents without coconut",
        lambda b: b.evaluation(coconut=False, cot=True, eval_num_latents=2),
        "eval_num_latents: only coconut",
    ),
    case("forced latents in training", dict(eval_num_latents=2), "eval_num_latents"),
    case("forced latents below 0", lambda b: b.evaluation(eval_num_latents=-1), "eval_num_latents"),
    case(
        "more forced latents than any model takes",
        lambda b: b.evaluation(eval_num_latents=[2, 10**20]),
        "eval_num_latents: [2, 100000000000000000000] is not a number from 0 to 100000",
    ),
    case(
        "forced latents of words",
        lambda b: b.evaluation(eval_num_latents=["x"]),
        "eval_num_latents: ['x']",
    ),
    case(
        "master weights without bf16", dict(float32_master_weights=True), "float32_master_weights"
    ),
    case("key twice", lambda b: b.append("seed: 1\nseed: 2\n"), "key seed stands there twice"),
    case("not YAML", lambda b: b.text("name: [run\n"), "config.yaml", "not valid YAML"),
    case("tabs in the YAML", lambda b: b.text("name:\n\tx: 1\n"), "not valid YAML"),
    case("a list for a config", lambda b: b.text("- name\n"), "config.yaml", "found list"),
    case("empty config", lambda b: b.text(""), "config.yaml", "found NoneType"),
    case("config not UTF-8", lambda b: b.text(b"name: \xff\n"), "config.yaml", "cannot read"),
    case("config missing", dict(_config="/no/such.yaml"), "/no/such.yaml", "cannot read"),
    case("config a folder", dict(_config="/"), "/: is a folder; give a YAML file"),
    case("override without =", dict(_argv=["num_epochs"]), "'num_epochs' on the command line"),
    case("override of an unknown key", dict(_argv=["sed=1"]), "sed", "did you mean seed?"),
    case("override of a wrong type", dict(_argv=["seed=one"]), "seed: 'one' is not int"),
]

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 87805358\n"
BORDER = {"question": "How many?", "steps": ["<<1+1=2>>"], "answer": "2"}
PLAIN = [{**BORDER, "question": "How many figs"}] * 3
DATA = [
    case("training file missing", dict(name="new", train_path="/no/rows.json"), "/no/rows.json"),
    case("validation file missing", dict(name="new", val_path="/no/rows.json"), "/no/rows.json"),
    case("both missing", dict(name="new", train_path="/no/a", val_path="/no/b"), "/no/a", "/no/b"),
    case("data path a folder", dict(name="new", train_path="/"), "/: cannot read this data file"),
    case("data path too long", dict(name="new", val_path=MANY_LETTERS), MANY_LETTERS[:50]),
    case("empty list", lambda b: b.train([]), "bad.json: expected a non-empty JSON list"),
    case("empty validation list", lambda b: b.val([]), "bad.json: expected a non-empty JSON list"),
    case("empty file", lambda b: b.train(""), "bad.json: not valid JSON"),
    case("a dict of columns", lambda b: b.train({"question": ["q"]}), "bad.json: expected a non-e"),
    case("a number", lambda b: b.train("5"), "bad.json: expected a non-empty JSON list"),
    case("torn JSON", lambda b: b.train(json.dumps(tiny_rows(3))[:-9]), "bad.json: not valid JSON"),
    case(
        "JSON Lines without rows",
        lambda b: b.train('{"a": 1}\n{"a": 2}\n'),
        "bad.json: no column question, steps, answer; there are a;",
    ),
    case(
        "JSON Lines, torn",
        lambda b: b.train('{"a": 1}\n\n{"a": 2'),
        "bad.json: not valid",
        "line 3",
    ),
    case("UTF-16", lambda b: b.train("[]".encode("utf-16")), "bad.json", "save it as UTF-8"),
    case("config in UTF-16", lambda b: b.text("a: 1".encode("utf-16")), "config.yaml", "UTF-8"),
    case(
        "data that a script makes",
        lambda b: dict(name="new", train_path=f"{b.folder}/data/gsm8k_train.json"),
        "gsm8k_train.json: no such file; `TARGET_SIZE=50000 bash preprocessing/gsm8k_icot.bash`",
    ),
    case(
        "a model that a script makes",
        lambda b: dict(name="new", model_id=f"{b.folder}/data/quickstart_model"),
        "model_id: {folder}/data/quickstart_model",
        "`bash preprocessing/quickstart.sh`",
    ),
    case(
        "a checkpoint that a script makes",
        lambda b: b.other_weights(load_model_path=f"{b.folder}/gsm8k-coconut-qwen3/checkpoint_6"),
        "checkpoint_6: no such checkpoint; `bash train_fresh_start.sh`",
    ),
    case("iCoT text", lambda b: b.train("q||<<1+1=2>> #### 2\n"), "bad.json: not valid JSON"),
    case("a Git LFS pointer", lambda b: b.train(LFS), "bad.json", "Git LFS pointer"),
    case("an HTML page", lambda b: b.train("<!DOCTYPE html>\n<html>"), "bad.json: not valid JSON"),
    case("data not UTF-8", lambda b: b.train(b'["\xff"]'), "bad.json: cannot read this data file"),
    case("data nested too deep", lambda b: b.train("[" * 100_000), "bad.json: not valid JSON"),
    case("row without answer", lambda b: b.row({"question": "q", "steps": []}), "row 3: answer"),
    case("row without question", lambda b: b.row({"steps": [], "answer": "1"}), "row 3: question"),
    case("row without steps", lambda b: b.row({"question": "q", "answer": "1"}), "row 3: steps"),
    case("answer a boolean", lambda b: b.row({**BORDER, "answer": True}), "row 3: answer", "True"),
    case("empty question", lambda b: b.row({**BORDER, "question": ""}), "row 3: question"),
    case("steps a number", lambda b: b.row({**BORDER, "steps": 7}), "row 3: steps", "found 7"),
    case("steps of numbers", lambda b: b.row({**BORDER, "steps": [1]}), "row 3: steps", "found 1"),
    case("empty step", lambda b: b.row({**BORDER, "steps": [""]}), "row 3: steps", "steps []"),
    case("line break in a step", lambda b: b.row({**BORDER, "steps": ["a\nb"]}), "row 3: steps"),
    case("row a text", lambda b: b.row("q"), "row 3: expected an object", "found str"),
    case("row a list", lambda b: b.row([1]), "row 3: expected an object", "found list"),
    case("half a surrogate pair", lambda b: b.row({**BORDER, "question": "\ud800"}), "row 3"),
    case(
        "marker in a text",
        lambda b: b.row({**BORDER, "question": "<|latent|>"}),
        "bad.json: row 3",
        "latent marker",
    ),
    case(
        "validation row without answer",
        lambda b: b.val([{"question": "q", "steps": []}]),
        "bad.json: no column answer; there are question, steps;",
    ),
    case(
        "border that merges",
        lambda b: merging_tokenizer(b) | b.train([*PLAIN, BORDER]),
        "bad.json: row 3",
        "merges tokens across",
    ),
    case(
        "border that merges in validation",
        lambda b: merging_tokenizer(b) | b.val([BORDER]),
        "bad.json: row 0",
        "merges tokens across",
    ),
    case("no answers", lambda b: b.train([{**BORDER, "answer": ""}] * 3), "all 3 answers (column"),
    case(
        "a column that is not there", dict(name="new", data_columns={"steps": "cot"}), "column cot"
    ),
    case("wrong data_columns", dict(name="new", data_columns={"a": "b"}), "data_columns: a is not"),
    case(
        "a Hub data set without a network",
        dict(name="new", train_path="own/set/main:train"),
        "own/set/main:train: Couldn't reach 'own/set' on the Hub",
    ),
    case("every row too long", dict(name="new", max_seq_length=8), "max_seq_length", "train.json"),
    case(
        "longer than the positions",
        dict(name="new", max_seq_length=513),
        "max_seq_length: 513",
        "512 positions",
    ),
    case(
        "completion beyond the positions",
        dict(name="new", max_new_tokens=500),
        "max_new_tokens: 500",
        "512 positions",
    ),
    case(
        "a chain of the validation beyond the positions",
        lambda b: dict(name="new", val_path=b.write("val.json", [chain_of(1), chain_of(100)])),
        "val.json: row 1 has",
        "512 positions",
        "leave it out",
    ),
    case(
        "latents beyond the positions",
        lambda b: b.evaluation(eval_num_latents=600),
        "max_new_tokens: 8 after a prompt of",
        "512 positions",
    ),
]


def chain_of(steps: int) -> dict:
    """A row whose prompt has room: only the validation loss reads the steps."""
    return {"question": "q", "steps": ["1 + 1 = 2"] * steps, "answer": "2"}


def merging_tokenizer(bench: Bench) -> dict:
    """A model whose tokenizer joins the end of a question ("?") with a first step."""
    folder = bench.model_copy()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["?\n<"])
    tokenizer.save_pretrained(folder)
    return dict(
        name="new",
        model_id=str(folder),
        train_path=bench.write("plain.json", PLAIN),
        val_path=bench.write("plain.json", PLAIN),
    )


def bytes_tokenizer(bench: Bench) -> dict:
    """ByT5's, which is written in Python and has no tokenizer.json."""
    folder = bench.model_copy("tokenizer.json")
    bench.write("bad_model/tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    return dict(name="new", model_id=str(folder), coconut=False, cot=True)


T5 = T5Config(d_model=8, d_kv=2, d_ff=8, num_layers=1, num_heads=2, vocab_size=VOCAB)
BERT = BertConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB
)
MODELS = [
    case("model folder missing", dict(name="new", model_id="/no/model"), "model_id: /no/model"),
    case(
        "Hub name that is not there",
        dict(name="new", model_id="no/such-model"),
        "model_id: no/such-model",
    ),
    case("model_id a file", lambda b: dict(name="new", model_id=b.write("m", "x")), "model_id"),
    case(
        "no config.json",
        lambda b: dict(name="new", model_id=str(b.model_copy("config.json"))),
        "model_id",
        "bad_model",
    ),
    case("broken config.json", lambda b: b.model_with("config.json", "{"), "model_id", "bad_model"),
    case(
        "quantized weights",
        lambda b: b.model_with(
            "config.json",
            {
                **json.loads((Path(b.values["model_id"]) / "config.json").read_text()),
                "quantization_config": {"quant_method": "gptq", "bits": 4},
            },
        ),
        "bad_model",
        "is quantized (gptq)",
    ),
    case("config.json a list", lambda b: b.model_with("config.json", [1]), "model_id", "bad_model"),
    case(
        "config.json without values",
        lambda b: b.model_with("config.json", {"model_type": "qwen3", "hidden_size": "x"}),
        "model_id",
        "bad_model",
    ),
    case(
        "unknown model type",
        lambda b: b.model_with("config.json", {"model_type": "zzz"}),
        "model_id",
        "bad_model",
    ),
    case("T5 is no causal model", lambda b: b.model_of(T5), "bad_model", "not a causal language"),
    case(
        "BERT is no causal model", lambda b: b.model_of(BERT), "bad_model", "not a causal language"
    ),
    case(
        "no tokenizer",
        lambda b: dict(
            name="new", model_id=str(b.model_copy("tokenizer.json", "tokenizer_config.json"))
        ),
        "model_id",
        "bad_model",
        "tokenizer",
    ),
    case(
        "broken tokenizer.json",
        lambda b: b.model_with("tokenizer.json", "{"),
        "tokenizer of",
        "bad_model",
    ),
    case(
        "tokenizer.json of another version",
        lambda b: b.model_with("tokenizer.json", OTHER_TOKENIZER),
        "tokenizer of",
        "bad_model",
    ),
    case(
        "tokenizer that knows no text",
        lambda b: b.model_with("tokenizer.json", NO_VOCABULARY),
        "marker_init_token: this tokenizer: WordLevel error: Missing [UNK] token",
    ),
    case("tokenizer without eos", lambda b: b.tokenizer_with(eos_token=None), "bad_model", "eos"),
    case("tokenizer without a fast form", bytes_tokenizer, "bad_model", "tokenizer"),
    case(
        "marker_init_token of several tokens",
        dict(name="new", marker_init_token="<<<"),
        "marker_init_token",
        "'<<<'",
    ),
    case(
        "more tokens than the model has rows",
        lambda b: b.model_of(family_config("qwen3", 300)) | dict(coconut=False, cot=True),
        "bad_model",
        "300",
    ),
    case(
        "no weights",
        lambda b: dict(name="new", model_id=str(b.model_copy("model.safetensors"))),
        "bad_model",
    ),
    case(
        "torn weights",
        lambda b: b.model_with(
            "model.safetensors", (b.model / "model.safetensors").read_bytes()[:5000]
        ),
        "bad_model",
    ),
    case(
        "weights of another size",
        lambda b: dict(name="new", model_id=str(other_weights(b))),
        "bad_model",
    ),
    case(
        "weights of another family",
        lambda b: dict(name="new", model_id=str(other_weights(b, "gpt2"))),
        "bad_model",
    ),
]


def other_weights(bench: Bench, family: str | None = None) -> Path:
    """A model folder whose weights are not those of its config."""
    folder = bench.model_copy()
    if family:
        tensors = dict(tiny_model(family).state_dict())
        tensors.pop("lm_head.weight")
    else:
        tensors = load_file(folder / "model.safetensors")
        name = next(n for n in tensors if n.endswith("down_proj.weight"))
        tensors[name] = tensors[name][:, :40].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Bomb:
    """Unpickled, it writes a file that the comparison of the folder then finds."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def only_file(bench: Bench, content, name="bad.pt") -> dict:
    return dict(name="new", load_model_path=bench.write(name, content))


def first(tensors: dict, end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def larger(tensors: dict) -> None:
    name = first(tensors, "embed_tokens.weight")
    tensors[name] = torch.cat([tensors[name], tensors[name][:50]])


CHECKPOINTS = [
    case("checkpoint missing", dict(name="new", load_model_path="/no/such"), "/no/such"),
    case(
        "checkpoint path too long",
        dict(name="new", load_model_path=MANY_LETTERS),
        MANY_LETTERS[:50],
    ),
    case(
        "folder without weights",
        lambda b: dict(name="new", load_model_path=str(b.folder)),
        "{folder}",
        "no .safetensors",
    ),
    case("text for a checkpoint", lambda b: only_file(b, "hello"), "bad.pt: not a file of weights"),
    case("empty checkpoint", lambda b: only_file(b, ""), "bad.pt: not a file of weights"),
    case(
        "text for safetensors",
        lambda b: only_file(b, "hello", "bad.safetensors"),
        "bad.safetensors: not a file of weights",
    ),
    case(
        "torn safetensors",
        lambda b: only_file(
            b, (b.model / "model.safetensors").read_bytes()[:5000], "bad.safetensors"
        ),
        "bad.safetensors: not a file of weights",
    ),
    case("pickle of a list", lambda b: only_file(b, pickle.dumps([1])), "bad.pt"),
    case(
        "pickle that runs code",
        lambda b: only_file(b, pickle.dumps(Bomb(b.folder / "boom"))),
        "bad.pt: not a file of weights",
    ),
    case(
        "torch.save that runs code",
        lambda b: (
            torch.save({"a": Bomb(b.folder / "boom")}, b.folder / "bad.pt")
            or dict(name="new", load_model_path=str(b.folder / "bad.pt"))
        ),
        "bad.pt: not a file of weights",
    ),
    case(
        "a tensor for a state dict",
        lambda b: (
            torch.save(torch.ones(3), b.folder / "bad.pt")
            or dict(name="new", load_model_path=str(b.folder / "bad.pt"))
        ),
        "bad.pt: expected a state dict",
    ),
    case(
        "checkpoint of another size",
        lambda b: b.weights_of(tiny_model("qwen3", vocab_size=200)),
        "other",
        "embed_tokens",
        "vocabulary of another size",
    ),
    case(
        "checkpoint of more layers",
        lambda b: b.weights_of(deeper()),
        "other",
        "layers.2",
        "another size",
    ),
    case(
        "checkpoint of another family",
        lambda b: b.weights_of(tiny_model("gpt2")),
        "other",
        "another family",
    ),
    case(
        "checkpoint of a larger vocabulary",
        lambda b: b.weights(larger),
        "bad.safetensors",
        "embed_tokens",
        "vocabulary of another size",
    ),
    case(
        "key missing",
        lambda b: b.weights(lambda t: t.pop("model.norm.weight")),
        "bad.safetensors",
        "missing (model.norm.weight)",
    ),
    case(
        "key unexpected",
        lambda b: b.weights(lambda t: t.update(extra=torch.ones(1)), "bad.pt"),
        "bad.pt",
        "unexpected (extra)",
    ),
    case(
        "shape of one tensor",
        lambda b: b.weights(lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        "bad.safetensors",
        "model.norm.weight (7,) instead of (32,)",
    ),
    case(
        "coconut checkpoint into cot",
        lambda b: dict(
            name="new", coconut=False, cot=True, load_model_path=str(b.run_dir / "checkpoint_2")
        ),
        "checkpoint_2",
        "coconut",
        "cot",
    ),
    case(
        "coconut checkpoint evaluated as cot",
        lambda b: b.evaluation(coconut=False, cot=True),
        "checkpoint_2",
    ),
    case(
        "evaluation at another stage",
        lambda b: b.evaluation(resume=1),
        "checkpoint_2",
        "4 latents",
        "resume: 1",
    ),
    case(
        "evaluation with another c_thought",
        lambda b: b.evaluation(c_thought=3),
        "checkpoint_2",
        "4 latents",
        "6",
    ),
    case(
        "evaluation of thoughts as pauses",
        lambda b: b.evaluation(latent_input="pause"),
        "latent_input: pause",
        "checkpoint_2",
        "trained with hidden_state",
    ),
    case(
        "evaluation with another end of the text",
        lambda b: b.evaluation() | b.tokenizer_with(eos_token="<|pad|>"),
        "model_id: the tokenizer of {folder}/bad_model is not that of",
        "checkpoint_2 (other tokens, or another eos)",
    ),
    case(
        "weights of a checkpoint with other tokens",
        lambda b: b.other_weights() | b.tokenizer_with_tokens("<|user|>"),
        "model_id: the tokenizer of {folder}/bad_model is not that of",
    ),
    case(
        "training where an evaluation was",
        lambda b: b.evaluated("other") | dict(name="other"),
        "out/other/metrics.jsonl: holds results",
        "choose another name than other",
    ),
    case(
        "training where the checkpoints were moved away",
        lambda b: b.without_checkpoints() | dict(name="run"),
        "out/run/metrics.jsonl: holds results",
        "choose another name than run",
    ),
    case(
        "evaluation with another marker",
        lambda b: b.evaluation(answer_marker="A:"),
        "answer_marker: A:",
        "checkpoint_2",
        "trained with ###",
    ),
    case(
        "evaluation with latents that go by the chain",
        lambda b: b.evaluation(pad_latent_to_max=False),
        "pad_latent_to_max: False",
        "checkpoint_2",
        "trained with True",
    ),
    case(
        "evaluation of a file at no known epoch",
        lambda b: b.weights(lambda t: None, "bad.pt") | dict(only_eval=True),
        "resume: {folder}/bad.pt does not say for how many epochs",
        "set resume",
    ),
    case(
        "evaluation of a file at no known epoch, with a number of latents that is forced",
        lambda b: b.weights(lambda t: None, "bad.pt") | dict(only_eval=True, eval_num_latents=2),
        "resume: {folder}/bad.pt does not say for how many epochs",
        "the steps that are still written",
    ),
    case(
        "evaluation by another schedule",
        lambda b: b.evaluation(epochs_per_stage=2),
        "checkpoint_2",
        "4 latents",
    ),
    case(
        "config of the checkpoint broken",
        lambda b: b.write("out/run/checkpoint_2/config.yaml", "name: [") and b.evaluation(),
        "checkpoint_2/config.yaml",
        "not valid YAML",
    ),
    case(
        "place of the checkpoint broken",
        lambda b: (
            b.write("out/run/checkpoint_2/state.json", "{")
            and b.write("out/run/checkpoint_2/evaluation.json", "{")
            and dict(num_epochs=3)
        ),
        "checkpoint_2",
    ),
    case(
        "weights of the run torn",
        lambda b: b.write("out/run/checkpoint_2/model.safetensors", b"torn") and dict(num_epochs=3),
        "checkpoint_2/model.safetensors",
    ),
    case(
        "optimizer state deleted",
        lambda b: shutil.rmtree(b.run_dir / "checkpoint_2/training_state") or dict(num_epochs=3),
        "checkpoint_2",
        "weights only",
    ),
    case(
        "optimizer state torn",
        lambda b: (
            b.write("out/run/checkpoint_2/training_state/.metadata", b"torn") and dict(num_epochs=3)
        ),
        "the optimizer state cannot be read (",
        "if it is damaged, delete it, and set",
        "load_model_path={folder}/out/run/checkpoint_2 resume=2",
        check_finds_it=False,
    ),
]


def deeper():
    """The test model with a third layer."""
    settings = family_config("qwen3").to_dict()
    settings.pop("layer_types")
    return Qwen3ForCausalLM(Qwen3Config(**settings | dict(num_hidden_layers=3)))


RUN_FOLDER = [
    case(
        "another checkpoint to start from",
        lambda b: b.weights(lambda t: None) | dict(name="run"),
        "load_model_path",
        "checkpoint_2",
    ),
    case("another place to resume from", dict(resume=1), "resume: 1", "checkpoint_2"),
    case("another c_thought", dict(c_thought=3), "c_thought: 3", "trained with 2"),
    case("another seed", dict(seed=7), "seed: 7", "trained with 0"),
    case("another schedule", dict(schedule="paper"), "schedule: paper", "trained with capped"),
    case("another model", lambda b: dict(model_id=str(b.model_copy())), "model_id", "bad_model"),
    case(
        "another latent input",
        dict(latent_input="pause"),
        "latent_input: pause",
        "trained with hidden_state",
    ),
    case("another method", dict(coconut=False, cot=True), "method: cot", "trained with coconut"),
    case("another marker", dict(answer_marker="A:"), "answer_marker: A:", "trained with ###"),
    case(
        "another reset", dict(reset_optimizer=True), "reset_optimizer: True", "trained with False"
    ),
    case("another precision", dict(bf16=True), "bf16: True", "trained with False"),
    case("several of them", dict(seed=7, c_thought=3), "seed: 7", "c_thought: 3"),
    case("fewer epochs than are done", dict(num_epochs=1), "num_epochs: 1", "checkpoint_2"),
    case(
        "other training rows",
        lambda b: dict(num_epochs=3, train_path=b.write("bad.json", tiny_rows(24, seed=9))),
        "bad.json",
        "checkpoint_2",
    ),
    case(
        "other rows per step",
        dict(num_epochs=3, batch_size_training=3),
        "checkpoint_2",
        "batch_size_training 3",
        check_finds_it=False,
    ),  # it depends on the number of processes
    case(
        "fresh start of a run that is there",
        dict(_argv=["--expect", "fresh"]),
        "{folder}/out/run",
        "checkpoint_2",
        "train_continue_fresh.sh",
        "name=",
    ),
    case(
        "run folder that leads nowhere",
        lambda b: (b.folder / "link").symlink_to(b.folder / "gone") or dict(save_path=b.at("link")),
        "save_path: {folder}/link/run cannot be made, {folder}/link leads nowhere",
    ),
    case(
        "run folder where nothing can be written",
        dict(save_path="/proc", name="new"),
        "save_path: cannot write to /proc/new",
    ),
    case(
        "rehearsal in the folder of a run",
        dict(debug=True),
        "debug: {folder}/out/run holds a training",
        "another name",
    ),
    case(
        "nothing to continue",
        dict(name="new", _argv=["--expect", "continue"]),
        "{folder}/out/new",
        "train_fresh_start.sh",
    ),
    case(
        "continue from weights without their epoch",
        lambda b: b.other_weights(_argv=["--expect", "continue"]),
        "{folder}/out/new holds no checkpoint",
        "both load_model_path and resume",
    ),
    case(
        "continue from an epoch without weights",
        dict(name="new", resume=1, _argv=["--expect", "continue"]),
        "{folder}/out/new holds no checkpoint",
        "both load_model_path and resume",
    ),
    case(
        "continue from weights that are not there",
        dict(name="new", load_model_path="/no", resume=1, _argv=["--expect", "continue"]),
        "/no: no such checkpoint",
    ),
    case(
        "continue after the last epoch",
        lambda b: b.other_weights(resume=2, _argv=["--expect", "continue"]),
        "resume: all 2 epochs are done",
        "num_epochs",
    ),
    case(
        "an older checkpoint of this run",
        lambda b: dict(load_model_path=str(b.run_dir / "checkpoint_1"), resume=1, num_epochs=3),
        "load_model_path: {folder}/out/run/checkpoint_1, resume: 1",
        "would overwrite checkpoint_2",
        "another name than run",
        "move checkpoint_2",
    ),
    case(
        "an older checkpoint of this run, continued",
        lambda b: dict(
            load_model_path=str(b.run_dir / "checkpoint_1"),
            num_epochs=3,
            _argv=["--expect", "continue"],
        ),
        "would overwrite checkpoint_2",
    ),
    case(
        "the folder of a run without the epoch",
        lambda b: b.other_weights(load_model_path=str(b.run_dir), num_epochs=9, resume=7),
        "out/run is the folder of a run",
        "checkpoint_1, checkpoint_2",
    ),
    case(
        "a file in the way of a checkpoint",
        lambda b: b.stray_file(resume=None),
        "out/new/checkpoint_1",
        "stands in the way",
        "move it",
    ),
    case("save_path a file", lambda b: dict(save_path=b.write("file", "x")), "save_path", "file"),
    case(
        "save_path below a file",
        lambda b: dict(save_path=b.write("file", "x") + "/out"),
        "save_path",
        "file/out",
    ),
    case(
        "save_path that cannot be made",
        dict(save_path="/proc/no/such"),
        "save_path",
        "/proc/no",
        check_finds_it=False,
    ),
    case("run folder a file", lambda b: b.write("out/new", "x") and dict(name="new"), "out/new"),
    case(
        "evaluation into a folder that cannot be made",
        lambda b: b.evaluation(save_path="/proc/no/such"),
        "save_path",
        "/proc/no",
        check_finds_it=False,
    ),
]

CASES = [*CONFIG, *DATA, *MODELS, *CHECKPOINTS, *RUN_FOLDER]

# ------------------------------------------------------------------------------- the test


@pytest.fixture(scope="module", autouse=True)
def signals_of_the_module():
    """A run takes the signals that stop it for itself, in fixtures of the module too: give them
    back."""
    kept = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory) -> Path:
    """The save_path of a finished run of two epochs: checkpoint_1 and checkpoint_2."""
    workspace = Workspace(model_folder, tmp_path_factory.mktemp("trained"))
    assert run.main([str(workspace.yaml(num_epochs=2))]) == 0
    return workspace.folder / "out"


@pytest.fixture
def bench(model_folder, tmp_path, trained):
    return Bench(model_folder, tmp_path, trained)


def snapshot(folder: Path) -> dict[str, str | None]:
    """Every file below a folder with its content's hash, every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def test_table_is_large_and_has_no_twins():
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize("name", ["run", "new"])
def test_the_unbroken_bench_passes(bench, name, capsys):
    """So that each case fails for what it breaks: in a run that is there, and in a new one."""
    assert run.main([*bench.command(dict(name=name, num_epochs=3)), "--check"]) == 0
    out = capsys.readouterr().out
    assert "all input is well" in out and "rows per optimizer step" in out
    assert "epochs    stage  latent tokens  steps skipped" in out


def test_the_unbroken_bench_trains_and_evaluates(bench):
    assert run.main(bench.command(dict(num_epochs=3))) == 0
    assert run.main(bench.command(bench.evaluation())) == 0


# every case without --check, and with it where it can know
TRIES = [
    pytest.param(case, flags, id=", ".join([case.name, *flags]))
    for case in CASES
    for flags in ([], ["--check"])
    if not flags or case.check_finds_it
]


@pytest.mark.parametrize(("bad", "flags"), TRIES)
def test_bad_input(bench, bad, flags, capsys):
    changes = bad.change(bench) if callable(bad.change) else bad.change
    command = bench.command(changes) + flags
    before = snapshot(bench.folder)
    capsys.readouterr()
    assert run.main(command) == 2
    error = capsys.readouterr().err
    lines = error.strip().split("\n")
    assert all(line.startswith("error: ") for line in lines), error
    for fragment in bad.fragments:
        assert fragment.replace("{folder}", str(bench.folder)) in error
    assert "Traceback" not in error
    assert snapshot(bench.folder) == before


HOLDER = """
import fcntl, os, sys
lock = open(sys.argv[1], "a+")
fcntl.lockf(lock, fcntl.LOCK_EX)
lock.truncate(0)
lock.write(str(os.getpid()))
lock.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_locked_run_folder(bench, capsys):
    """SIGKILL of torchrun leaves its workers running: they hold the folder, and a second run may
    not write to it. A lock belongs to a process, so another one holds it here."""
    holding = [sys.executable, "-c", HOLDER, str(bench.run_dir / ".lock")]
    command = bench.command(dict(num_epochs=3))
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        before = snapshot(bench.folder)
        assert run.main(command) == 2
        assert snapshot(bench.folder) == before
        holder.stdin.close()
    error = capsys.readouterr().err
    assert str(bench.run_dir) in error and f"process {holder.pid} is writing" in error


def test_problems_of_all_kinds_come_together(bench, capsys):
    """One run of the program tells all of them."""
    changes = dict(
        name="new",
        train_path="/no/rows.json",
        val_path=bench.write("bad.json", []),
        model_id="/no/model",
        load_model_path="/no/such",
    )
    assert run.main(bench.command(changes)) == 2
    error = capsys.readouterr().err
    for fragment in ("/no/rows.json", "bad.json", "/no/model", "/no/such"):
        assert fragment in error, fragment


@pytest.mark.parametrize(
    "changes, flags",
    [
        (dict(name="new", model_id="/no/model"), []),
        (dict(name="new", train_path="/no/rows.json"), []),
        (dict(name="new", val_path="/no/rows.json"), []),
        ({}, ["--expect", "fresh"]),
    ],
)
def test_an_error_of_another_kind_says_nothing_of_gpus(bench, capsys, changes, flags):
    assert run.main([*bench.command(changes), *flags]) == 2
    error = capsys.readouterr().err
    assert "GPU" not in error and "quickstart" not in error


@pytest.mark.parametrize("method", ["coconut", "cot"])
def test_tokens_that_the_model_has_no_row_for(bench, capsys, method):
    """Gemma's for images, or a pad token that was added: they may be in no text, and the model
    trains, is saved and evaluated without them."""
    folder = bench.model_copy("model.safetensors")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    family_config("qwen3", len(tokenizer)).save_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|image|>"})
    tokenizer.save_pretrained(folder)
    keys = dict(name="new", model_id=str(folder), from_scratch=True, num_epochs=1)
    keys |= {"coconut": method == "coconut", method: True}
    assert run.main(bench.command(keys)) == 0
    path = str(bench.folder / "out/new/checkpoint_1")
    keys |= dict(name="evaluated", only_eval=True, load_model_path=path)
    assert run.main(bench.command(keys)) == 0
    keys |= bench.val([{**BORDER, "question": "<|image|> 1?"}]) | dict(name="bad")
    assert run.main(bench.command(keys)) == 2
    assert "row 0: the text holds a latent marker, or a token that has no row" in (
        capsys.readouterr().err
    )


def test_a_tokenizer_that_was_saved_with_padding_and_truncation(bench):
    """Its fingerprint is the same before the first text and after it, or processes would differ."""
    folder = bench.model_copy()
    backend = PreTrainedTokenizerFast.from_pretrained(folder).backend_tokenizer
    backend.enable_padding()
    backend.enable_truncation(5)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(load_config(bench.yaml(model_id=str(folder))))
    before = tokenizer.backend_tokenizer.to_str()
    lengths = [len(tokens) for tokens in tokenizer(["1 2 3 4 5 6 7 8 9", "1"])["input_ids"]]
    assert lengths[0] > 5 and lengths[1] == 1
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_model_too_large_for_a_cpu(bench, monkeypatch, capsys):
    """Known from the config alone, before any weight is read. Who lacks a GPU is sent to what runs
    without."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(preflight, "MAX_CPU_PARAMETERS", 1000)
    assert run.main(bench.command(dict(name="new"))) == 2
    error = capsys.readouterr().err
    assert "needs a CUDA GPU" in error and "train_fresh_start.sh args/quickstart.yaml" in error


# ------------------------------------------------------------------------------- the shell

SHELL = [
    c
    for c in CASES
    if c.name
    in ("misspelt key", "row without answer", "key missing", "fresh start of a run that is there")
]


@pytest.mark.slow
@pytest.mark.parametrize("bad", SHELL, ids=lambda c: c.name)
def test_bad_input_through_the_shell(bench, bad):
    changes = bad.change(bench) if callable(bad.change) else bad.change
    command = [sys.executable, str(ROOT / "run.py"), *bench.command(changes), "--check"]
    before = snapshot(bench.folder)
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.folder, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for fragment in bad.fragments:
        assert fragment.replace("{folder}", str(bench.folder)) in done.stderr
    assert snapshot(bench.folder) == before


def test_no_arguments_show_the_usage(capsys):
    with pytest.raises(SystemExit) as end:
        run.main([])
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err
