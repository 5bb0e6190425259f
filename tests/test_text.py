"""engine/text.py: how a completion is read, and what counts as the same answer."""

import pytest

from engine.text import DEFAULT, TextFormat

extract_answer, extract_steps, same_answer = DEFAULT.answer, DEFAULT.steps, DEFAULT.same_answer


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("### 18", "18"),
        ("<<1+1=2>>\n### 2", "2"),
        ("###18", "18"),
        ("### 1 ### 2", "1 ### 2"),
        ("### 18\n", "18"),
        ("### Tom is a wumpus.", "Tom is a wumpus."),
        ("18", None),
        ("## 18", None),
        ("", None),
        ("###", None),
        ("### \n", None),
        ("#### 18", "# 18"),
        ("### 5\n6", "5"),
        ("### 18\n### 19", "18"),
        ("### 18\r\nQuestion: more", "18"),
        ("### Tom is  a wumpus. \n\nAnd 7", "Tom is  a wumpus."),
        ("<<1+1=2>>\n###\n2\n3", "2"),
    ],
)
def test_extract_answer(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    "completion, steps",
    [
        ("<<1+1=2>>\n<<2+1=3>>\n### 3", ["<<1+1=2>>", "<<2+1=3>>"]),
        ("### 3", []),
        ("", []),
        (" a \n\n b", ["a", "b"]),
        ("a\n### 3\nb\n### 4", ["a"]),
        ("a ### 3", ["a"]),
    ],
)
def test_extract_steps(completion, steps):
    assert extract_steps(completion) == steps


@pytest.mark.parametrize(
    "given, gold, same",
    [
        ("18", "18", True),
        ("18", "18.0", True),
        ("18.", "18", True),
        ("018", "18", True),
        ("1,800", "1800", True),
        ("1,800", "1 800", False),
        ("1,800.", "1800", True),
        ("1,234,567", "1234567", True),
        ("-1,234.5", "-1234.50", True),
        ("$1,234.50", "1234.5", True),
        ("1,2", "12", False),
        ("1,2", "1.2", False),
        ("1,2", "1,2", True),
        ("1,2345", "12345", False),
        ("12,34,567", "1234567", False),
        ("1234,567", "1234567", False),
        ("0,001", "1", False),
        (",800", "800", False),
        ("1,800,", "1800", False),
        ("1.234,567", "1.234567", False),
        ("1 2", "12", False),
        ("1 1/2", "11/2", False),
        ("1\u00a0800", "1800", False),
        ("\u2009 18\u00a0", "18", True),
        ("$18", "18", True),
        ("18 €", "18", True),
        ("-18", "-18.00", True),
        ("- 18", "-18", False),
        ("-$18", "$-18", True),
        ("$ 18", "18", True),
        ("$18$", "18", True),
        ("1$8", "18", False),
        ("$", "€", False),
        ("\u22123", "-3", True),
        ("\uff0d\uff11\uff0c\uff18\uff10\uff10\uff0e\uff15", "-1800.5", True),
        ("\uff0b\uff15", "5", True),
        ("\uff045", "5", True),
        ("room \uff15", "room 5", True),
        ("\u0665", "5", True),  # any script's decimal digits, as ever
        ("5\u00b2", "52", False),
        ("\u2460", "1", False),
        ("--3", "3", False),
        ("+-3", "-3", False),
        ("+5", "5", True),
        ("5.", "5", True),
        (".5", "0.5", True),
        ("-.5", "-0.5", True),
        (".", "0", False),
        ("1_000", "1000", False),
        ("1e3", "1e3", True),
        ("1e99999999999999999999", "1", False),
        ("0x10", "16", False),
        ("0.1", "0.10", True),
        ("0.30000000000000001", "0.3", False),
        ("0", "-0", True),
        ("1e3", "1000", True),
        ("18", "-18", False),
        ("18", "19", False),
        ("18", "180", False),
        ("18 apples", "18", False),
        ("", "18", False),
        ("", "0", False),
        (None, "18", False),
        (None, "None", False),
        ("nan", "18", False),
        ("18", "nan", False),
        ("nan", "nan", True),  # a word like any other
        ("sNaN", "18", False),
        ("Infinity", "18", False),
        ("inf", "Infinity", False),
        ("-nan", "nan", False),
        ("50%", "50", False),
        ("72 dollars", "72", False),
        ("half", "1/2", False),
        ("\\boxed{72}", "72", True),
        ("\\boxed{1,800}", "1800", True),
        ("so \\boxed{72}", "72", False),
        ("1/2", "1/2", True),
        ("1/2", "0.5", False),
        ("Tom is a wumpus.", "Tom is a wumpus.", True),
        ("Tom is a wumpus.", "Tom  is a wumpus. ", True),
        ("Tom is a wumpus.", "Tom is a lempus.", False),
        ("Tom is a\twumpus.", "Tom is\u00a0a wumpus.", True),
        ("Alexis a wumpus", "Alex is a wumpus", False),
        ("Tom, a wumpus", "Tom a wumpus", False),
        ("cafe\u0301", "caf\u00e9", True),
        ("True", "true", False),
    ],
)
def test_same_answer(given, gold, same):
    assert same_answer(given, gold) is same


@pytest.mark.parametrize(
    "kind, given, gold, same",
    [
        ("number", "1.0", "1", True),
        ("text", "1.0", "1", False),
        ("text", "Tom  is a wumpus", "Tom is a wumpus", True),
        ("text", "tom is a wumpus", "Tom is a wumpus", False),
        ("text", None, "1", False),
        ("choice", "B", "B", True),
        ("choice", "(b) because it is", "B", True),
        ("choice", "B.", "(B)", True),
        ("choice", "**B**", "B", True),
        ("choice", "True.", "true", True),
        ("choice", "Because", "B", False),
        ("choice", "A", "B", False),
        ("choice", "-1", "1", False),
        ("choice", "(\u22121), as it falls", "-1", True),
        ("choice", "+1", "1", True),
        ("choice", "1.5", "1.2", False),
        ("choice", "1. Paris", "1", True),
        ("choice", "A+", "A-", False),
        ("choice", "\u0924\u0947\u0930\u0939", "\u0924\u0940\u0928", False),  # 13, 3 in Hindi
        ("choice", "(\u0924\u0940\u0928)", "\u0924\u0940\u0928", True),
        ("text", r"\boxed{ Tom }", "Tom", True),
        ("choice", "(ab-).", "AB-", True),
        ("choice", "yes-because", "yes", True),
        ("choice", "yes - because", "yes", True),
        ("choice", "", "B", False),
        ("choice", None, "B", False),
    ],
)
def test_kinds_of_answers(kind, given, gold, same):
    assert TextFormat(kind=kind).same_answer(given, gold) is same


def test_another_marker_is_written_and_read():
    text_format = TextFormat("The answer is:")
    row = {"question": "How many?", "steps": ["1+1=2"], "answer": "2"}
    assert text_format.segments(row) == ["How many?\n", "1+1=2\n", "The answer is: 2"]
    completion = "1+1=2\n### no marker\nThe answer is: 2\nand more"
    assert text_format.answer(completion) == "2"
    assert text_format.steps(completion) == ["1+1=2", "### no marker"]
    assert text_format.answer("### 2") is None
