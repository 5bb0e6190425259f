"""What several measurements need: tables, ratios of times, a small model, a tokenizer, rows, runs
that repeat to the bit."""

import os
import statistics
import string
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

MADE_UP_WORDS = 2000
KNOWN_WORDS = 1200  # to row_tokenizer; it reads others by letters
QWEN3_4B = Path(__file__).parent / "qwen3_4b"  # the config of Qwen/Qwen3-4B-Instruct-2507


def markdown(title: str, head: list[str], rows: list[list]) -> str:
    """A Markdown table under its title."""
    lines = [f"\n### {title}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(title: str, head: list[str], rows: list[list]) -> None:
    """Print a Markdown table."""
    print(markdown(title, head, rows), end="", flush=True)


def ratio_of_times(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[float, list[float]]:
    """Median of first's CPU time over second's, measured in turn, and the medians of both.

    CPU time, as other programs on the machine take part of the time of the clock.
    """
    times = []
    for number in range(repeats + 1):  # the first round warms up
        pair = {}
        for which in ((0, 1), (1, 0))[number % 2]:
            start = time.process_time()
            (first, second)[which]()
            pair[which] = time.process_time() - start
        times.append((pair[0], pair[1]))
    ratio = statistics.median(a / b for a, b in times[1:])
    return ratio, [statistics.median(column) for column in zip(*times[1:])]


def small_config(vocab_size: int, layers: int, hidden: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        head_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def small_model(
    vocab_size: int = 32_000,
    layers: int = 8,
    hidden: int = 512,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A Qwen3 with random weights of size 0.02, the same at every call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        small_config(vocab_size, layers, hidden), dtype=dtype, attn_implementation=attention
    )


def word_tokenizer(
    words: Iterable[str] = ("word", "skipped", "###", "5"),
) -> PreTrainedTokenizerFast:
    """One token for each of the words, the space before it included; others letter by letter."""
    names = ["<|end|>", "<|pad|>", "<|unknown|>", "<<", "\n", *string.printable[:95]]
    names += [before + word for word in words for before in ("", " ")]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    longest_first = models.WordPiece(
        vocabulary, unk_token="<|unknown|>", continuing_subword_prefix=""
    )
    tokenizer = Tokenizer(longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^ \n]+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=names[0], pad_token=names[1], unk_token=names[2]
    )


def benchmark_tokenizer() -> PreTrainedTokenizerFast:
    """The one whose folder COCONUT_TEST_TOKENIZER names, else one that knows the made-up words."""
    folder = os.environ.get("COCONUT_TEST_TOKENIZER")
    if folder:
        return AutoTokenizer.from_pretrained(folder)
    return word_tokenizer(made_up_words(np.random.default_rng(0)))


def row_tokenizer() -> PreTrainedTokenizerFast:
    """One that makes made-up rows as long as Qwen3's does: 79 tokens with six latents; 83."""
    if os.environ.get("COCONUT_TEST_TOKENIZER"):
        return benchmark_tokenizer()
    return word_tokenizer(made_up_words(np.random.default_rng(0))[:KNOWN_WORDS])


def made_up_words(rng: np.random.Generator) -> list[str]:
    letters = np.array(list("aaeeeiiooubcdfghlmnprrssttvw"))
    return ["".join(rng.choice(letters, rng.integers(1, 7))) for _ in range(MADE_UP_WORDS)]


def made_up_rows(count: int) -> list[dict]:
    """Rows of GSM8K's lengths: 15 to 140 words, 1 to 8 steps; 228 bytes each as in GSM8K-Aug."""
    rng, rows = np.random.default_rng(0), []
    words = made_up_words(rng)
    for _ in range(count):
        length = int(np.clip(rng.normal(31, 12), 15, 140))
        numbers = rng.integers(1, 99, size=(int(np.clip(rng.normal(3.3, 1.7), 1, 8)), 2)).tolist()
        question = [words[i] for i in rng.integers(0, MADE_UP_WORDS, length)]
        question[3], question[length // 2] = str(numbers[0][0]), str(numbers[0][1])
        rows.append(
            {
                "question": " ".join(question) + "?",
                "steps": [f"<<{a}+{b}={a + b}>>" for a, b in numbers],
                "answer": str(sum(numbers[-1])),
            }
        )
    return rows


@contextmanager
def repeatable() -> Iterator[None]:
    """Sums in one order. The backward of attention on CUDA takes any, unless this is asked for and
    not with warn_only, and two runs of the same then differ in their last bits."""
    with patch.dict(os.environ, CUBLAS_WORKSPACE_CONFIG=":4096:8"):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
