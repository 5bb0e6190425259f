"""Small real parts for all tests: model families, a tokenizer, rows, a model folder, configs."""

import itertools
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

# tiny kernels: a second thread costs more than it gives, and spins while others work
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_DISABLED"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
# encoded rows of an earlier run would hide what encoding them does now
CACHE = tempfile.TemporaryDirectory(prefix="coconut-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
os.environ["MPLCONFIGDIR"] = str(ROOT / ".cache" / "matplotlib")  # its list of fonts takes seconds
sys.path.insert(0, str(ROOT))

import datasets
import numerics
import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from coconut import add_latent_tokens
from dataset import LatentTokens
from engine.encoding import encode_rows
from engine.stop import STOPPING

# whoever starts the tests may ignore some, as nohup and the background of a script do
for number in STOPPING:
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
VOCAB = 384  # rows of the embedding; the tokenizer below has fewer tokens
SIZES = dict(  # of most families' configs
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
)


def family_config(family: str, vocab_size: int = VOCAB):
    """A two-layer config of a model family, large initial weights so that outputs differ."""
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=0,
        )
    common = SIZES | dict(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=family == "qwen3",
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen3Config(head_dim=8, **common) if family == "qwen3" else LlamaConfig(**common)


@contextmanager
def files_of_at_most(size: int):
    """A limit in bytes, which stands for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_model(family: str, dtype=torch.float32, seed: int = 0, vocab_size: int = VOCAB):
    """A random causal language model of a family: qwen3, llama or gpt2."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(family_config(family, vocab_size), dtype=dtype).eval()


def tiny_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows in GSM8K's form with 0 to 4 steps."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        value, steps = rng.randint(1, 9), []
        start = value
        changes = [rng.randint(1, 9) for _ in range(rng.randint(0, 4))]
        for change in changes:
            steps.append(f"<<{value}+{change}={value + change}>>")
            value += change
        told = "".join(f" He finds {change} more." for change in changes)
        rows.append(
            {
                "question": f"Tom has {start} plums.{told} How many plums does Tom have?",
                "steps": steps,
                "answer": str(value),
            }
        )
    return rows


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def naive_segments(row, tokenizer) -> list[list[int]]:
    """Question, each step, answer: the tokens of each, by one encoding of the whole text."""
    texts = [row["question"] + "\n", *(s + "\n" for s in row["steps"]), "### " + row["answer"]]
    whole = tokenizer("".join(texts), return_offsets_mapping=True)
    ends = np.cumsum([len(text) for text in texts])
    segments = [[] for _ in texts]
    for token, (start, _) in zip(whole["input_ids"], whole["offset_mapping"]):
        segments[int(np.searchsorted(ends, start, side="right"))].append(token)
    return [*segments[:-1], segments[-1] + [tokenizer.eos_token_id]]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of about 320 tokens; eos <|end|>, pad <|pad|>, << a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|end|>", "<|pad|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [row["question"] + "\n" for row in tiny_rows(200)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.add_tokens(["<<", ">>", "###"])
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture
def order(monkeypatch) -> list[tuple[str, str]]:
    """Grows by what is waited for until it is on the disk, and by what gets its name, in order."""
    seen: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    open_, fsync, rename = os.open, os.fsync, Path.rename

    def seen_open(path, *args, **kwargs):
        descriptor = open_(path, *args, **kwargs)
        names[descriptor] = os.path.basename(path)
        return descriptor

    def seen_fsync(descriptor):
        fsync(descriptor)
        if descriptor in names:
            seen.append(("sync", names[descriptor]))

    def seen_rename(path, target):
        seen.append(("rename", Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(os, "open", seen_open)
    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "rename", seen_rename)
    return seen


@pytest.fixture
def tokens(tokenizer) -> LatentTokens:
    return LatentTokens(*add_latent_tokens(tokenizer))


@pytest.fixture
def encoded(tokenizer, tokens, tmp_path):
    return encode_rows(tiny_rows(40), tokenizer, list(tokens), tmp_path, "rows.json")


@pytest.fixture(scope="session")
def model_folder(tokenizer_folder, tmp_path_factory) -> Path:
    """A folder that from_pretrained loads: a tiny Qwen3 and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3").save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def workspace(model_folder, tmp_path) -> "Workspace":
    return Workspace(model_folder, tmp_path)


class Workspace:
    """A folder with data files and a config to run with; keys can be replaced."""

    def __init__(self, model_folder: Path, folder: Path):
        self.folder = folder
        (folder / "train.json").write_text(json.dumps(tiny_rows(24, seed=1)))
        (folder / "val.json").write_text(json.dumps(tiny_rows(6, seed=2)))
        self.values = dict(
            name="run",
            save_path=str(folder / "out"),
            coconut=True,
            model_id=str(model_folder),
            train_path=str(folder / "train.json"),
            val_path=str(folder / "val.json"),
            c_thought=2,
            epochs_per_stage=1,
            max_latent_stage=2,
            num_epochs=3,
            batch_size_training=4,
            gradient_accumulation_steps=2,
            lr=1e-3,
            max_new_tokens=8,
            num_workers=0,
        )

    @property
    def run_dir(self) -> Path:
        return self.folder / "out" / "run"

    def yaml(self, **changes) -> Path:
        """Write the config with some keys replaced (None: left out); the path of the file."""
        values = {k: v for k, v in {**self.values, **changes}.items() if v is not None}
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path


def pytest_addoption(parser):
    parser.addoption(
        "--margins", action="store_true", help="show what was found of what is allowed"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Hand the margins of a test to its report, which reaches the terminal from any worker."""
    if call.when == "call":
        item.user_properties += [("margins", dict(numerics.MARGINS))]
        numerics.MARGINS.clear()


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("margins"):
        return
    by_test = defaultdict(list)
    for report in itertools.chain(*terminalreporter.stats.values()):
        if getattr(report, "when", None) == "call":
            for test, margins in dict(report.user_properties).get("margins", {}).items():
                by_test[test] += margins
    terminalreporter.section("comparisons, worst found / allowed")
    for test, margins in sorted(by_test.items()):
        terminalreporter.line(f"{len(margins):6} {max(margins):8.1e}  {test}")


@pytest.fixture(autouse=True, scope="session")
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run takes the signals that stop it for itself; give them back."""
    kept = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def test_data() -> Path:
    """The folder with real data (COCONUT_TEST_DATA); skips where there is none."""
    folder = os.environ.get("COCONUT_TEST_DATA")
    if not folder:
        pytest.skip("COCONUT_TEST_DATA is not set")
    return Path(folder)
