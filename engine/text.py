"""The text format: how a row is written for the model, and how a completion is read and judged.

    question, line break, each step with a line break, the answer's marker, blank, answer, eos

The answer is the first line after the first marker. data/README.md states how answers are compared.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal

from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def decode_completion(tokenizer: PreTrainedTokenizerBase, tokens: list[int] | Tensor) -> str:
    """The text that is judged: without special tokens, and with every blank as it was written."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list is for several sequences
    return text


def end_of_text(encoding: Encoding) -> int:
    """Its tokens without those that the tokenizer puts behind a text (eos, sep)."""
    end, special = len(encoding), encoding.special_tokens_mask
    while end and special[end - 1]:
        end -= 1
    return end


# full-width digits and signs (letters stay as they are), and what stands for a minus sign
PLAIN: dict[int, int | str]
PLAIN = {full: full - 0xFEE0 for full in range(0xFF01, 0xFF5F) if not chr(full).isalpha()}
PLAIN |= {0xFFE1: "£", 0xFFE5: "¥"}
PLAIN |= {ord(minus): "-" for minus in "\u2010\u2011\u2012\u2013\u2212\ufe63"}
CURRENCY = "$€£¥"
# the only commas in a number are those that group its digits by three
NUMBER = re.compile(
    rf"([+-]?)[{CURRENCY}]?"
    r"((?:\d+|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d*)?|\.\d+)((?:[eE][+-]?\d{1,4})?)"
)
BOXED = re.compile(r"^\\boxed\{(.*)\}$")


def plain(text: str) -> str:
    """Composed accents, plain digits and signs, inner blanks folded to one, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).translate(PLAIN).split())


def _number(text: str) -> Decimal | None:
    match = NUMBER.fullmatch(text.strip(CURRENCY + " "))
    return Decimal("".join(match.groups()).replace(",", "")) if match else None


@functools.cache
def _label_pattern() -> re.Pattern[str]:
    """A number with its sign, or a word with the signs that end it, as in A+ and C++."""
    # letters of some scripts are a letter and marks, which \w does not know
    marks = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "M")
    word = rf"\w[\w{marks}]*(?:[+-]+(?![\w+-]))?"
    return re.compile(rf"\W*?([+-]?\d+(?:[.,]\d+)*\b(?![+-])|{word})")


def _label(text: str) -> str:
    """The first word without what stands around it: of "(b) because ..." the b, of "(-1)." -1."""
    match = _label_pattern().match(text)
    return match[1].casefold().lstrip("+") if match else text


def same_steps(given: list[str], gold: list[str]) -> bool:
    """Equal as texts, step by step."""
    return [plain(step) for step in given] == [plain(step) for step in gold]


@dataclass(frozen=True)
class TextFormat:
    """What a run's texts look like: the config's answer_marker and answer_kind."""

    marker: str = "###"
    kind: str = "number"

    def segments(self, row: dict) -> list[str]:
        """A row as text, in segments: the question, each step, the answer. An eos token follows."""
        steps = [step + "\n" for step in row["steps"]]
        return [row["question"] + "\n", *steps, f"{self.marker} {row['answer']}"]

    def answer(self, completion: str) -> str | None:
        """The first line after the first marker; None where there is no marker, or nothing."""
        _, _, rest = completion.partition(self.marker)
        return rest.strip().partition("\n")[0].rstrip() or None

    def steps(self, completion: str) -> list[str]:
        """The lines before the first marker."""
        lines = completion.partition(self.marker)[0].split("\n")
        return [line.strip() for line in lines if line.strip()]

    def same_answer(self, given: str | None, gold: str) -> bool:
        """Whether both have the same value; no answer has none."""
        return given is not None and self.value(given) == self.value(gold)

    def value(self, answer: str) -> Decimal | str:
        """What answers are compared by. number: the number, the text where it is none. text: the
        text. choice: the label, its first word without regard to case."""
        text = BOXED.sub(r"\1", plain(answer)).strip()
        if self.kind == "choice":
            return _label(text)
        number = _number(text) if self.kind == "number" else None
        return text if number is None else number


DEFAULT = TextFormat()
