"""rows.py: the files and data sets that people bring, their columns, how they write a chain."""

import csv
import gzip
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from datetime import datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import run
from loader import load_config
from preprocessing.gsm8k_icot import read_source
from rows import load_rows, parse_rows, rows_with_questions, split_steps
from utils import UserError

# ------------------------------------------------------------------------------- our own rows

ENCODABLE = st.characters(exclude_categories=("Cs",))
WORDS = st.text(ENCODABLE, min_size=1, max_size=20).filter(str.strip)
STEPS = st.lists(WORDS.filter(lambda text: "\n" not in text), max_size=4)
ANSWERS = WORDS.filter(lambda text: "\n" not in text.strip())
ROW = st.fixed_dictionaries(
    {"question": WORDS, "steps": STEPS, "answer": ANSWERS}, optional={"note": st.integers()}
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(st.sampled_from(["question", "steps", "answer", "x"]), v, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5), st.booleans())
def test_valid_rows_come_through_unchanged(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.getbasetemp() / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=ascii_only), encoding="utf-8", newline="")
    assert load_rows(path) == rows


def understood(record, has_marks: bool) -> dict:
    """What may be written in two ways."""
    answer, steps = record["answer"], record["steps"]
    answer = answer[0] if isinstance(answer, list) else answer
    steps = split_steps(steps, has_marks) if type(steps) is str else steps
    return {"answer": str(answer), "steps": steps}


@settings(max_examples=200, deadline=None)
@given(ANY_JSON | st.lists(ANY_JSON, max_size=4))
def test_any_json_is_rows_or_named(value):
    """The same value back, numbers and one text as what they mean, or UserError whose lines name
    the source; never another exception."""
    try:
        rows = parse_rows(json.dumps(value), "rows.json")
        records = value if isinstance(value, list) else [value]  # JSON Lines of one line
        has_marks = "<<" in json.dumps(value)  # ANY_JSON has none
        assert rows == [{**record, **understood(record, has_marks)} for record in records]
    except UserError as error:
        assert all(line.startswith("rows.json: ") for line in error.problems)
    else:
        assert all(isinstance(row["steps"], list) for row in rows)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | st.text(alphabet='[]{}":,\\u0nt1e', max_size=40))
def test_any_text_is_rows_or_named(text):
    with pytest.raises(UserError, match="^rows.json: "):
        parse_rows(text, "rows.json")


GOOD = {"question": "How many?", "steps": ["<<1+1=2>>"], "answer": "2"}
BAD_ROWS = [
    ({"question": "q", "steps": []}, "answer: expected a text, found None"),
    ({"steps": [], "answer": "2"}, "question: expected a text, found None"),
    ({"question": "q", "answer": "2"}, "steps: expected a list of texts, or one text, found None"),
    ({**GOOD, "question": "  "}, "question: expected a text, found '  '"),
    ({**GOOD, "question": 5}, "question: expected a text, found 5"),
    ({**GOOD, "answer": True}, "answer: expected a text, found True"),
    ({**GOOD, "answer": float("nan")}, "answer: expected a text, found nan"),
    ({**GOOD, "answer": float("inf")}, "answer: expected a text, found inf"),
    ({**GOOD, "answer": [1, 2]}, "answer: expected a text, found [1, 2]"),
    ({**GOOD, "answer": ""}, "answer: expected a text, found ''"),
    ({**GOOD, "steps": 7}, "steps: expected a list of texts, or one text, found 7"),
    ({**GOOD, "steps": [1]}, "steps: expected texts, found 1"),
    # "".split(" ") is [""], which the ancestor's preprocessing wrote for rows without a chain
    ({**GOOD, "steps": [""]}, "found '' (a row without a chain has steps [])"),
    ({**GOOD, "steps": ["a", None]}, "steps: expected texts, found None"),
    ({**GOOD, "steps": ["a\nb"]}, "holds a line break"),
    ({**GOOD, "answer": "2\nor 3"}, "answer: '2\\nor 3' holds a line break"),
    ("How many?", "expected an object with question, steps and answer, found str"),
    (None, "found NoneType"),
    ([], "found list"),
    # json.dumps(ensure_ascii) writes it, no tokenizer and no UTF-8 file takes it
    ({**GOOD, "question": "half \ud800"}, "question"),
    ({**GOOD, "steps": ["\udfff"]}, "steps"),
    ({**GOOD, "answer": "\ud800"}, "answer"),
]


@pytest.mark.parametrize(("row", "fragment"), BAD_ROWS)
def test_bad_row_is_named(row, fragment):
    with pytest.raises(UserError) as caught:
        parse_rows(json.dumps([GOOD, GOOD, row]), "rows.json")
    (line,) = caught.value.problems
    assert line.startswith("rows.json: row 2: ") and fragment in line


def test_many_bad_rows_are_counted():
    rows = [GOOD] + [{"question": "q"}] * 14
    with pytest.raises(UserError) as caught:
        parse_rows(json.dumps(rows), "rows.json")
    assert len(caught.value.problems) == 11
    assert "row 1:" in caught.value.problems[0] and "4 more rows" in caught.value.problems[-1]


# ------------------------------------------------------------------------------- public forms

NATALIA = "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?"
WENG = "Weng earns $12 an hour. She babysat 50 minutes. How much did she earn?"
NATALIA_CHAIN = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "She sold 48+24 = <<48+24=72>>72 clips altogether."
)
WENG_CHAIN = "A minute is 12/60 = $<<12/60=0.2>>0.2.\nSo she earned 0.2 x 50 = $<<0.2*50=10>>10."
STEPS = [["<<48/2=24>>", "<<48+24=72>>"], ["<<12/60=0.2>>", "<<0.2*50=10>>"]]
BODY, ASKED = "Each pack of dvds costs 76 dollars.", "How much are 2 packs ?"


def rows_of(questions, steps, answers) -> list[dict]:
    each = zip(questions, steps, answers)
    return [{"question": q, "steps": s, "answer": a} for q, s, a in each]


TWO = rows_of([NATALIA, WENG], STEPS, ["72", "10"])
EMPTY = rows_of([NATALIA, WENG], [[], []], ["72.0", "1e+20"])
# what is public -> its records, the one line of config (None: none is needed), the rows
PUBLIC = {
    "GSM8K-Aug, steps in a list": (TWO, None, TWO),
    "GSM8K-Aug, one text": (
        [
            {"question": row["question"], "cot": " ".join(row["steps"]), "answer": row["answer"]}
            for row in TWO
        ],
        "{steps: cot}",
        TWO,
    ),
    "GSM8K's original": (
        [
            {"question": NATALIA, "answer": f"{NATALIA_CHAIN}\n#### 72"},
            {"question": WENG, "answer": f"{WENG_CHAIN}\n#### 10"},
        ],
        "{question: question, steps: answer, answer: answer}",
        TWO,
    ),
    "reasoning chains": (
        [{"question": NATALIA, "reasoning_chain": ["48/2=24", "48+24=72"], "answer": 72}],
        "{steps: reasoning_chain}",
        rows_of([NATALIA], [["48/2=24", "48+24=72"]], ["72"]),
    ),
    "GSM-Hard": (
        [{"input": NATALIA, "target": 72.0}, {"input": WENG, "target": 1e20}],
        "{question: input, steps: null, answer: target}",
        EMPTY,
    ),
    "GSM-Hard, instructions": (
        [{"instruction": NATALIA, "response": "72.0"}, {"instruction": WENG, "response": "1e+20"}],
        "{question: instruction, steps: null, answer: response}",
        EMPTY,
    ),
    "MultiArith": (
        [{"question": WENG, "final_ans": "10"}],
        "{steps: null, answer: final_ans}",
        rows_of([WENG], [[]], ["10"]),
    ),
    "MultiArith, equations": (
        [{"iIndex": 2, "sQuestion": WENG, "lEquations": ["X=12*50/60"], "lSolutions": [10.0]}],
        "{question: sQuestion, steps: lEquations, answer: lSolutions}",
        rows_of([WENG], [["X=12*50/60"]], ["10.0"]),
    ),
    "SVAMP": (
        [{"question_concat": f"{BODY} {ASKED}", "Answer": "152"}],
        "{question: question_concat, steps: null, answer: Answer}",
        rows_of([f"{BODY} {ASKED}"], [[]], ["152"]),
    ),
    "SVAMP, two parts": (
        [{"Body": BODY, "Question": ASKED, "Equation": "( 76.0 * 2.0 )", "Answer": 152.0}],
        "{question: [Body, Question], steps: Equation, answer: Answer}",
        rows_of([f"{BODY} {ASKED}"], [["( 76.0 * 2.0 )"]], ["152.0"]),
    ),
    "ASDiv-Aug": (
        [{"question": WENG, "answer": "<<12/60=0.2>>\n<<0.2*50=10>>\n####10"}],
        "{steps: answer}",
        TWO[1:],
    ),
}


def write_json(path: Path, records) -> None:
    path.write_text(json.dumps(records), encoding="utf-8")


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_parquet(path: Path, records) -> None:
    datasets.Dataset.from_list(records).to_parquet(str(path))


def write_csv(path: Path, records) -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


WRITERS = {"json": write_json, "jsonl": write_lines, "parquet": write_parquet, "csv": write_csv}


def columns_of(folder: Path, line: str | None) -> dict | None:
    """The value of data_columns as a config and the command line have it: one line."""
    path = folder / "c.yaml"
    path.write_text((ROOT / "args" / "quickstart.yaml").read_text())
    if line is None:
        return load_config(path).data_columns
    override = load_config(path, f"data_columns={line}")
    path.write_text(f"{path.read_text()}\ndata_columns: {line}\n")
    config = load_config(path)
    path.write_text(config.to_yaml())
    assert load_config(path) == config == override
    return config.data_columns


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("form", PUBLIC)
def test_public_forms_load_with_one_line_of_config(tmp_path, form, kind):
    records, line, expected = PUBLIC[form]
    if kind == "csv" and any(isinstance(value, list) for value in records[0].values()):
        pytest.skip("CSV has no lists")
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, records)
    rows = load_rows(path, columns_of(tmp_path, line))
    assert [{part: row[part] for part in expected[0]} for row in rows] == expected


# ------------------------------------------------------------------------------- ways to write


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("<<1+1=2>> <<2+2=4>>", ["<<1+1=2>>", "<<2+2=4>>"]),
        ("He has 1+1=<<1+1=2>>2.\nSo 4.", ["<<1+1=2>>"]),  # as GSM8K-Aug was made of GSM8K
        ("He has two. \r\n\n So four.\r\n", ["He has two.", "So four."]),
        ("One line. Two sentences.", ["One line. Two sentences."]),
        ("a << b", ["a << b"]),
        ("<<>> <<a<b>>", ["<<>> <<a<b>>"]),
        ("", []),
        (" \n", []),
        ("He has two.\n#### 2", ["He has two."]),
        ("Item #### 3?\nYes.\n#### 2", ["Item #### 3?", "Yes."]),
        ("#### 2", []),
    ],
)
def test_a_chain_of_one_text_is_split(text, steps):
    row = {"question": "q", "steps": text, "answer": "2"}
    assert parse_rows(json.dumps([row]), "rows.json") == [{**row, "steps": steps}]


def test_prose_among_marked_chains_has_no_steps():
    """As in GSM8K-Aug: a chain of prose would be a step of another kind than all others."""
    records = [{"question": "q", "answer": "Let it be p.\n2p = 4\n#### 2"}]
    lines = parse_rows(json.dumps(records), "rows.json", {"steps": "answer"})
    assert [row["steps"] for row in lines] == [["Let it be p.", "2p = 4"]]
    records.append({"question": "q", "answer": "So 1+1=<<1+1=2>>2.\n#### 2"})
    marked = parse_rows(json.dumps(records), "rows.json", {"steps": "answer"})
    assert [row["steps"] for row in marked] == [[], ["<<1+1=2>>"]]


NUMBERS = [
    "1800",
    "3.0",
    "-7",
    "0",
    "1e3",
    "18.50",
    "0.1",
    "-0.0",
    "123456789012345678901234567890",
]
NUMBERS += ["12345678901234567.25", "1E-2"]


@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_in_json_is_the_text_that_it_is_written_as(number, form):
    line = f'{{"question": "q", "steps": [], "answer": {number}, "more": 2.50}}\n'
    text = line * 2 if form == "lines" else f"[{line}, {line}]"
    rows = parse_rows(text, "rows.json")
    assert [row["answer"] for row in rows] == [number] * 2
    assert all(type(row["answer"]) is str for row in rows)
    # what else there is keeps its meaning: checkpoints know their rows by this text
    assert json.dumps(rows) == json.dumps([{**json.loads(line), "answer": number}] * 2)
    assert pickle.loads(pickle.dumps(rows)) == rows


def test_a_number_in_csv_is_the_text_that_it_is_written_as(tmp_path):
    """Typed readers make 18.0 of 18 where a value of the column is missing, and nothing of NA."""
    path = tmp_path / "rows.csv"
    texts = [*NUMBERS, "NA", "1,800", "True", "007"]
    write_csv(path, rows_of(["q"] * len(texts), [""] * len(texts), texts))
    assert [row["answer"] for row in load_rows(path)] == texts


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    """One of the two would be taken."""
    (tmp_path / "rows.csv").write_text("question,question,steps,answer\na,b,,1\n")
    with pytest.raises(UserError, match="the first line has 'question' twice"):
        load_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("values", "texts"), [([1800, 3], ["1800", "3"]), ([3.0, 0.25], ["3.0", "0.25"])]
)
def test_numbers_in_parquet_are_read_by_their_type(tmp_path, values, texts):
    path = tmp_path / "rows.parquet"
    write_parquet(path, rows_of("ab", [[], []], values))
    assert [row["answer"] for row in load_rows(path)] == texts


def test_narrow_numbers_are_the_ones_that_were_written(tmp_path):
    """228.4 in a float32 was read as 228.39999389648438, and no answer equalled it."""
    path = tmp_path / "rows.parquet"
    numbers = datasets.Features(
        question=datasets.Value("string"),
        steps=datasets.List(datasets.Value("string")),
        answer=datasets.List(datasets.Value("float32")),
    )
    rows = rows_of("abcd", [[], ["1"], [], []], [[0.1], [228.4], [-3.0], [7.0]])
    datasets.Dataset.from_list(rows, features=numbers).to_parquet(str(path))
    assert [row["answer"] for row in load_rows(path)] == ["0.1", "228.4", "-3.0", "7.0"]
    numbers["answer"] = datasets.Value("float32")
    rows = rows_of("abcd", [[], ["1"], [], []], [0.1, 228.4, -3.0, 7.0])
    datasets.Dataset.from_list(rows, features=numbers).to_parquet(str(path))
    assert [row["answer"] for row in load_rows(path)] == ["0.1", "228.4", "-3.0", "7.0"]
    for kind in (pa.large_list(pa.float32()), pa.list_(pa.float32(), 1)):
        answers = pa.array([[0.1], [228.4]], kind)
        parquet.write_table(pa.table({"question": ["a", "b"], "answer": answers}), path)
        rows = load_rows(path, {"question": "question", "steps": None, "answer": "answer"})
        assert [row["answer"] for row in rows] == ["0.1", "228.4"]


def test_parquet_of_any_columns_is_read(tmp_path):
    """A map among them was refused, and a decimal is a number as it is written."""
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {
            "question": ["q"],
            "steps": [["a"]],
            "answer": pa.array([Decimal("3.10")]),
            "of": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        }
    )
    parquet.write_table(table, path)
    assert load_rows(path) == [{"question": "q", "steps": ["a"], "answer": "3.10"}]
    parquet.write_table(table.slice(0, 0), path)
    with pytest.raises(UserError, match="rows.parquet: there are no rows"):
        load_rows(path)


def test_a_mark_without_its_partner_is_named():
    """A step that holds < or > was no step, and nobody said so."""
    steps = "<<1+1=2>> then <<2>1>> so"
    records = [{"question": "q", "steps": steps, "answer": "2"}]
    with pytest.raises(UserError, match="rows.json: row 0: steps: a << or >> without its partner"):
        parse_rows(json.dumps(records), "rows.json")


@pytest.mark.parametrize("prose", ["so 5 >> 3", "as 1<<3 is 8", "<<>> and on", "x << y"])
def test_marks_in_prose_are_no_steps_and_no_error(prose):
    records = [{"question": "q", "steps": f"<<1+1=2>> {prose} hence 8", "answer": "2"}]
    assert parse_rows(json.dumps(records), "rows.json")[0]["steps"] == ["<<1+1=2>>"]


@pytest.mark.parametrize("lost", ["<<1+1=2 so", "1+1=2>>2", "<<2>1>> so", "<<1+1=2> so"])
def test_a_step_that_lost_a_mark_is_named(lost):
    records = [{"question": "q", "steps": f"<<1+1=2>> then\n{lost}", "answer": "2"}]
    with pytest.raises(UserError, match="row 0: steps: a << or >> without its partner .*; mend it"):
        parse_rows(json.dumps(records), "rows.json")


@pytest.mark.parametrize("chain", ["[1, 2]", "['b', 'a'] is it\nthen ['a', 'b']", '["x"] + ["y"]'])
def test_a_line_about_lists_is_a_step(chain):
    records = [{"question": "q", "steps": chain, "answer": "2"}]
    assert parse_rows(json.dumps(records), "rows.json")[0]["steps"] == chain.split("\n")


@pytest.mark.parametrize(
    "chain", ["[]", " ['a', 'b']\n", "['a', 'b']", '["it\'s", "b"]', "['a' 'b']"]
)
def test_a_list_that_became_a_text_is_named(tmp_path, chain):
    """As tables without lists hold one: its steps were one step."""
    path = tmp_path / "rows.csv"
    write_csv(path, [{"question": "q", "steps": chain, "answer": "1"}])
    with pytest.raises(UserError, match="row 0: steps: a list as a text, .*; save the rows as"):
        load_rows(path)


def test_parquet_of_the_same_name_and_time_is_read_again(tmp_path):
    """The library's cache knows a file by its path and time."""
    path = tmp_path / "rows[1].parquet"  # and no pattern
    for rows in (TWO, TWO[::-1]):
        write_parquet(path, rows)
        os.utime(path, (1, 1))
        assert load_rows(path) == rows


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_gzip_is_read_whatever_the_name_says(tmp_path, kind):
    plain = tmp_path / f"rows.{kind}"
    records, line, expected = PUBLIC["GSM8K's original"]
    WRITERS[kind](plain, records)
    columns = columns_of(tmp_path, line)
    content = plain.read_bytes().replace(b"\n", b"\r\n")
    for name in (f"packed.{kind}.gz", f"packed.{kind}"):
        (tmp_path / name).write_bytes(gzip.compress(b"\xef\xbb\xbf" * (kind != "csv") + content))
        rows = load_rows(tmp_path / name, columns)
        assert [{part: row[part] for part in expected[0]} for row in rows] == expected


def test_a_table_gives_its_three_columns_only(tmp_path):
    """The others may hold what no JSON text can: the fingerprint of the rows is of one."""
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{**row, "made": datetime(2026, 1, 1), "raw": b"\xff"} for row in TWO])
    assert load_rows(path) == TWO


def test_the_last_mark_begins_the_answer():
    records = [{"question": "q", "answer": "Item #### 3 costs <<1+1=2>>2.\n#### 2"}]
    (row,) = parse_rows(json.dumps(records), "rows.json", {"steps": "answer"})
    assert (row["steps"], row["answer"]) == (["<<1+1=2>>"], "2")


def test_several_columns_make_one_question():
    columns = {"question": ["Body", "Question"], "steps": None, "answer": "Answer"}
    record = {"Body": "There are 3. ", "Question": " How many ?", "Answer": 3.0}
    (row,) = parse_rows(json.dumps([record]), "rows.json", columns)
    assert row["question"] == "There are 3. How many ?"
    with pytest.raises(UserError, match="row 1: question: expected a text, found None"):
        parse_rows(json.dumps([record, {**record, "Question": None}]), "rows.json", columns)


def test_blanks_at_the_ends_are_removed_where_columns_are_named():
    """MultiArith's questions have them, and a tokenizer merges one with the line break behind it;
    our own files stay as they are."""
    loose = {"question": " How many? ", "steps": [" a ", "b"], "answer": " 2\n"}
    renamed = {"q": " How many? ", "steps": [" a ", "b"], "answer": " 2\n"}
    assert parse_rows(json.dumps([loose]), "rows.json") == [loose]
    (row,) = parse_rows(json.dumps([renamed]), "rows.json", {"question": "q"})
    assert (row["question"], row["steps"], row["answer"]) == ("How many?", ["a", "b"], "2")


# ------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("kind", WRITERS)
def test_bad_rows_are_named_in_every_form(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"q": "q", "a": "1"}, *[{"q": "q", "a": " "}] * 13, {"q": "q", "a": "2"}])
    with pytest.raises(UserError) as caught:
        load_rows(path, {"question": "q", "steps": None, "answer": "a"})
    lines = caught.value.problems
    assert len(lines) == 11 and all(line.startswith(f"{path}: ") for line in lines)
    assert "row 1: answer: expected a text, found ' '" in lines[0] and "3 more rows" in lines[-1]


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_that_do_not_exist_are_named_with_those_that_do(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [{"input": "q", "target": "1"}] * 20)
    with pytest.raises(UserError) as caught:
        load_rows(path, {"question": "input", "steps": "chain"})
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: no column chain, answer; there are input, target; data_col")


@pytest.mark.parametrize("empty", ["", "  ", None])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_data_set_without_answers_is_one_line(tmp_path, kind, empty):
    """A test split whose answers are kept secret, say."""
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, rows_of("abc" * 7, ["s"] * 21, [empty] * 21))
    with pytest.raises(UserError) as caught:
        load_rows(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: all 21 answers (column answer) are empty; give another")


def test_a_row_that_is_not_in_gsm8ks_form_is_named():
    records = [{"question": "q", "answer": "<<1+1=2>>\n#### 2"}, {"question": "q", "answer": "2"}]
    records += [{"question": "q", "answer": "chain\n####"}, {"question": "q", "answer": 3}]
    with pytest.raises(UserError) as caught:
        parse_rows(json.dumps(records), "rows.json", {"steps": "answer"})
    first, second, third = caught.value.problems
    assert "row 1: answer: expected a chain, #### and an answer, found '2'" in first
    assert "row 2: answer: expected a text, found ''" in second and "row 3: answer" in third


WRONG_COLUMNS = [
    ({"answers": "a"}, "data_columns: answers is not one of question, steps, answer"),
    ({"answer": None}, "data_columns: answer: None is not the name of a column"),
    ({"answer": ["a", "b"]}, "data_columns: answer: ['a', 'b'] is not the name of a column"),
    ({"question": []}, "data_columns: question: [] is not the name of a column"),
    ({"question": ["a", 1]}, "data_columns: question: ['a', 1] is not the name of a column"),
    ({"steps": 3}, "data_columns: steps: 3 is not the name of a column"),
]


@pytest.mark.parametrize(("columns", "expected"), WRONG_COLUMNS)
def test_wrong_data_columns_are_named(tmp_path, columns, expected):
    with pytest.raises(UserError) as caught:
        load_rows(tmp_path / "rows.json", columns)
    assert caught.value.problems == [expected]


BROKEN = {
    "rows.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "cut.parquet": (b"PAR1 and nothing more", "cannot read this data file: "),
    "rows.csv": (b"question,steps,answer\na,b\n", "row 0: answer: expected a text, found None"),
    "long.csv": (b"question,steps,answer\na,b,c\na,b,c,d\n", "row 1 has more values than"),
    "quote.csv": (b'question,steps,answer\na,b,"c\n', "not valid CSV: "),
    "utf16.csv": ("question,steps,answer\na,b,c\n".encode("utf-16"), "save it as UTF-8"),
    "head.csv": (b"question,steps,answer\n", "there are no rows"),
    "empty.csv": (b"", "there are no rows"),
    "cut.json.gz": (gzip.compress(b"[" + b"1" * 1000)[:-9], "damaged gzip: "),
    "noise.json.gz": (b"\x1f\x8b\x08\x00" + b"x" * 30, "damaged gzip: "),
}


def assert_refused(source, fragment: str) -> None:
    """In one line, which names the source."""
    with pytest.raises(UserError) as caught:
        load_rows(source)
    (line,) = caught.value.problems
    assert line.startswith(f"{source}: ") and fragment in line and "\n" not in line


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_named(tmp_path, name):
    content, fragment = BROKEN[name]
    path = tmp_path / name
    if name == "rows.csv":
        content += b"a,b,c\n"
    path.write_bytes(content)
    assert_refused(path, fragment)


def test_real_gsm8k_is_read_as_preprocessing_reads_it(test_data):
    path = test_data / "gsm8k_train.jsonl"
    rows = load_rows(path, {"steps": "answer"})
    assert rows == read_source("train", path).rows


@pytest.mark.parametrize("name", ["data/a:b.json", "no/such/folder/set:train", "a/b.jsonl"])
def test_what_is_no_hub_name_is_a_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: no such file"):
        load_rows(name)


def test_a_file_of_that_name_wins_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    write_json(tmp_path / "own/set:train", TWO)
    monkeypatch.chdir(tmp_path)
    assert load_rows("own/set:train") == TWO


HUB_PROBLEMS = [
    ("own/nothing:train", "without a network, give the path of a file"),  # the tests have none
    ("own/nothing/main:train[:90%]", "without a network, give the path of a file"),
    ("own/set/main:train", "own/set is a folder here; give the path of a file in it"),
    ("own/set", "cannot read this data file"),
    ("own/other", "no such file; a Hub data set is owner/name:split"),
]


@pytest.mark.parametrize(("name", "fragment"), HUB_PROBLEMS)
def test_a_hub_data_set_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, name, fragment):
    (tmp_path / "own/set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert_refused(name, fragment)


def test_a_run_reads_all_its_files_by_the_same_columns(workspace):
    """From the config to the answers of an evaluation."""
    records, line, _ = PUBLIC["GSM8K's original"]
    train, val = workspace.folder / "train.parquet", workspace.folder / "val.jsonl.gz"
    write_parquet(train, records * 8)
    write_lines(val, records)
    val.write_bytes(gzip.compress(val.read_bytes()))
    changes = dict(train_path=str(train), val_path=str(val), num_epochs=1)
    assert run.main([str(workspace.yaml(**changes)), f"data_columns={line}"]) == 0
    results = (workspace.run_dir / "results_epoch_1.jsonl").read_text().splitlines()
    assert [json.loads(row)["gold_answer"] for row in results] == ["72", "10"]


@pytest.mark.parametrize("name", ["openai/gsm8k/main:train", "a/b-c.d:train[:90%]"])
def test_a_hub_name_is_a_path_of_the_config(workspace, name):
    """Not expanded, not taken for a mapping by YAML."""
    path = workspace.yaml()
    assert load_config(path, f"train_path={name}").train_path == name
    path.write_text(f"{workspace.yaml(val_path=None).read_text()}\nval_path: {name}\n")
    assert load_config(path).val_path == name


def test_a_run_names_what_is_wrong_once_and_ends_with_2(workspace, capsys):
    path = workspace.yaml(data_columns={"answers": "a"})
    assert run.main([str(path), "--check"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: data_columns: answers is not one of question, steps, answer"]


# ------------------------------------------------------------------------------- the Hub itself

COMMIT = "a" * 40


def hub_folder(folder: Path, records) -> None:
    (folder / "own/set").mkdir(parents=True)
    write_parquet(folder / "own/set/a.parquet", records)
    write_parquet(folder / "own/set/b.parquet", records[:1])
    (folder / "own/set/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: a.parquet\n"
        "  - split: test\n    path: b.parquet\n- config_name: other\n  data_files: b.parquet\n---\n"
    )


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as the library asks for: one data set, own/set, of the files in root."""

    root: Path

    def answer(self):
        path, code, body = self.path.split("?")[0], 404, b""
        headers = {"X-Error-Code": "EntryNotFound"}
        files = sorted(self.root.iterdir())
        if path.startswith("/datasets/own/set/resolve/"):
            file = self.root / path.rpartition("/")[2]
            if file in files:
                code, body = 200, file.read_bytes()
                headers = {"X-Repo-Commit": COMMIT, "ETag": hashlib.sha1(body).hexdigest()}
        elif path.startswith("/api/datasets/own/set/tree/"):
            tree = [
                {"type": "file", "path": file.name, "oid": "b" * 40, "size": file.stat().st_size}
                for file in files
            ]
            code, body = 200, json.dumps(tree).encode()
        elif path.startswith("/api/datasets/own/set"):
            siblings = [{"rfilename": file.name} for file in files]
            info = {"id": "own/set", "_id": "1", "sha": COMMIT, "private": False, "tags": []}
            code, body = 200, json.dumps({**info, "siblings": siblings}).encode()
        else:
            headers = {"X-Error-Code": "RepoNotFound"}
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *_):
        pass


LOAD = """
import json, sys, datasets
from rows import load_rows
from utils import UserError
datasets.disable_progress_bars()
for name in sys.argv[1:]:
    try:
        print(json.dumps(load_rows(name, {"steps": "answer"})))
    except UserError as error:
        print(json.dumps(error.problems))
"""


def load_elsewhere(folder: Path, endpoint: str, *names: str, **env: str) -> list:
    """What load_rows gives of GSM8K's form in a process that knows another Hub."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, **env}
    env |= {"HF_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_read_and_kept(tmp_path):
    """Over the library's own requests; without a network its cache serves."""
    records, _, expected = PUBLIC["GSM8K's original"]
    hub_folder(tmp_path, records)
    handler = type("Handler", (Hub,), {"root": tmp_path / "own/set"})
    home = tmp_path / "home"
    home.mkdir()
    names = ["own/set/main:train", "own/set/main:train[:1]", "own/set/main:test"]
    wrong = ["own/set:train", "own/set/main:valid", "own/nothing:train"]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        *rows, (no_config,), (no_split,), (no_set,) = load_elsewhere(home, endpoint, *names, *wrong)
        server.shutdown()
    assert rows == [expected, expected[:1], expected[:1]]
    assert no_config.endswith("['main', 'other'], as in own/set/CONFIG:train")
    assert no_split == (
        "own/set/main:valid: Unknown split \"valid\". Should be one of ['train', 'test']."
    )
    assert no_set.startswith("own/nothing:train: Dataset 'own/nothing' doesn't exist on the Hub")
    *kept, (unknown,) = load_elsewhere(home, endpoint, *names, wrong[2], HF_HUB_OFFLINE="1")
    assert kept == rows
    assert unknown.startswith("own/nothing:train: Couldn't reach 'own/nothing' on the Hub")
    assert unknown.endswith("; without a network, give the path of a file (JSON, parquet, CSV)")


def test_how_many_rows_it_takes_for_so_many_questions():
    rows = [{"question": question} for question in "aabbc"]
    assert [rows_with_questions(rows, count) for count in (1, 2, 3, 4)] == [1, 3, 5, 5]


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    """A closed port: the library tries again for twenty seconds."""
    ((line,),) = load_elsewhere(tmp_path, "http://127.0.0.1:9", "own/set/main:train")
    assert line.startswith("own/set/main:train: Couldn't reach 'own/set' on the Hub")
    assert "without a network" in line
