"""dataset.py: rows, encoding, the curriculum, samples, batches, the dealing of a step."""

import json
import os
import shutil
import sys
from dataclasses import replace
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from analysis.prosqa import _tokens_after_a_line
from coconut import END_LATENT, LATENT, START_LATENT, add_latent_tokens
from dataset import (
    IGNORED,
    Curriculum,
    LatentTokens,
    MicroBatches,
    StageDataset,
    collate,
    load_rows,
    parse_rows,
    plan_steps,
    split_by_length,
)
from engine import encoding
from engine.encoding import encode_rows
from engine.evaluation import _judge
from utils import Method, UserError

sys.path.append(str(ROOT))
from preprocessing import gsm8k_icot

PAPER = dict(schedule="paper", epochs_per_stage=2, max_latent_stage=3, c_thought=2)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def tokens(tokenizer) -> LatentTokens:
    return LatentTokens(*add_latent_tokens(tokenizer))


@pytest.fixture
def encoded(tokenizer, tokens, tmp_path):
    return encode_rows(tiny_rows(40), tokenizer, list(tokens), tmp_path, "rows.json")


def naive_segments(row, tokenizer) -> list[list[int]]:
    """Question, each step, answer: the tokens of each, by one encoding of the whole text."""
    texts = [row["question"] + "\n", *(s + "\n" for s in row["steps"]), "### " + row["answer"]]
    whole = tokenizer("".join(texts), return_offsets_mapping=True)
    ends = np.cumsum([len(text) for text in texts])
    segments = [[] for _ in texts]
    for token, (start, _) in zip(whole["input_ids"], whole["offset_mapping"]):
        segments[int(np.searchsorted(ends, start, side="right"))].append(token)
    return [*segments[:-1], segments[-1] + [tokenizer.eos_token_id]]


def naive_sample(row, tokenizer, tokens, latents, skipped):
    """The ids and labels of a row, written down as the paper's figure 2 shows them."""
    question, *steps, answer = naive_segments(row, tokenizer)
    if tokens:
        question = [*question, tokens.start, *[tokens.latent] * latents, tokens.end]
    rest = [token for step in steps[skipped:] for token in step] + answer
    return question + rest, [IGNORED] * len(question) + rest


def of_lengths(prefix, rest) -> StageDataset:
    """A stage dataset that knows the lengths of its rows and nothing else."""
    data = StageDataset.__new__(StageDataset)
    data.prefix_length, data.num_labels = np.array(prefix), np.array(rest)
    data.total_length = data.prefix_length + data.num_labels
    data.encoded = range(len(data.prefix_length))
    return data


# ------------------------------------------------------------------------------- rows

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


@settings(max_examples=200, deadline=None)
@given(ANY_JSON | st.lists(ANY_JSON, max_size=4))
def test_any_json_is_rows_or_named(value):
    """The same value back, or UserError whose lines name the source; never another exception."""
    try:
        rows = parse_rows(json.dumps(value), "rows.json")
        assert rows == (value if isinstance(value, list) else [value])  # JSON Lines of one line
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
    ({"question": "q", "answer": "2"}, "steps: expected a list of texts, found None"),
    ({**GOOD, "question": "  "}, "question: expected a text, found '  '"),
    ({**GOOD, "question": 5}, "question: expected a text, found 5"),
    ({**GOOD, "answer": 2}, "answer: expected a text, found 2"),
    ({**GOOD, "answer": ""}, "answer: expected a text, found ''"),
    ({**GOOD, "steps": "a step"}, "steps: expected a list of texts, found 'a step'"),
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


# ------------------------------------------------------------------------------- encoding


def test_segments_equal_the_whole_text_on_every_row(tokenizer, tmp_path):
    rows = tiny_rows(60)
    encoded = encode_rows(rows, tokenizer, [], tmp_path, "rows.json")
    assert len(encoded) == 60
    for number, row in enumerate(rows):
        segments = naive_segments(row, tokenizer)
        tokens = encoded.tokens[number]["tokens"]
        assert tokens.tolist() == [token for segment in segments for token in segment]
        assert encoded.num_steps[number] == len(row["steps"])
        assert encoded.question_length[number] == len(segments[0])
        assert encoded.answer_length[number] == len(segments[-1])
        for k in range(encoded.steps_from.shape[1]):
            assert encoded.steps_from[number, k] == sum(map(len, segments[1:-1][k:]))


def test_rows_without_steps(tokenizer, tmp_path):
    """A file in which no row has a chain: "".split would have made a stray line of each."""
    rows = [{**row, "steps": []} for row in tiny_rows(3)]
    encoded = encode_rows(rows, tokenizer, [], tmp_path, "rows.json")
    assert encoded.num_steps.tolist() == [0, 0, 0] and not encoded.steps_from.any()
    text = tokenizer.decode(encoded.tokens[0]["tokens"])
    assert text == f"{rows[0]['question']}\n### {rows[0]['answer']}<|end|>"


def test_bos_stands_once_in_front(tokenizer, tmp_path):
    """Llama's tokenizers put a bos token before every text they encode: only the question's
    may stay."""
    bos = tokenizer.convert_tokens_to_ids("<|pad|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", bos)]
    )
    encoded = encode_rows(tiny_rows(5), tokenizer, [], tmp_path, "rows.json")
    for number in range(5):
        assert (encoded.tokens[number]["tokens"] == bos).nonzero()[0].tolist() == [0]


# ------------------------------------------------------------------------------- tokenizers


def metaspace(scheme):
    pieces = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return None, pieces, [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]


LLAMA_2 = (
    normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    None,
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ],
)
PIECES = {
    "llama 2": LLAMA_2,
    "always": metaspace("always"),
    "first": metaspace("first"),
    "never": metaspace("never"),
    "byte level, blank": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "byte level": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), None),
}
TEMPLATES = {"": (0, 0), "bos": (1, 0), "eos": (0, 1), "both": (1, 1)}


def family_tokenizer(kind: str, template: str = "", model=models.BPE, added=()):
    """A small tokenizer put together as those of a family of published models."""
    normalizer, pieces, decoder = PIECES[kind]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    lines = [line for row in tiny_rows(200) for line in (row["question"], *row["steps"], "### 12")]
    if model is models.BPE:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False)
    else:
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=520, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    if decoder is None:  # whose pieces are bytes written as characters
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pieces)):
        if part is not None:
            setattr(backend, name, part)
    backend.decoder = decoders.ByteLevel() if decoder is None else decoders.Sequence(decoder)
    backend.train_from_iterator(lines, trainer)
    state = json.loads(backend.to_str())  # what the trainers cannot be told
    state["added_tokens"] = state["added_tokens"][:3]  # or the bytes would be special tokens
    state["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(state))
    before, behind = TEMPLATES[template]
    if before or behind:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' * before}$A{' </s>' * behind}",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_tokens(list(added))
    return tokenizer


def judge_own_text(rows, tokenizer, folder) -> None:
    """At each stage a model that writes a row's own text, up to its first eos, is right."""
    tokens = LatentTokens(*add_latent_tokens(tokenizer))
    encoded = encode_rows(rows, tokenizer, list(tokens), folder, "rows.json")
    for stage in range(int(encoded.num_steps.max()) + 1):
        data = StageDataset(encoded, Curriculum(max_latent_stage=9), tokens, stage)
        for number, row in enumerate(rows):
            ids, prompt = data[number].input_ids.tolist(), data.question(number).input_ids.tolist()
            new = ids[len(prompt) :]
            new = new[: new.index(tokenizer.eos_token_id) + 1]
            result = _judge(row, prompt, new, tokenizer, int(data.num_skipped[number]))
            assert result["correct"] and result["cot_match"] in (True, None), (row, result)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", PIECES)
def test_families_of_tokenizers_encode_and_are_judged_right(kind, template, tmp_path):
    """Llama 2, TinyLlama, Mistral 7B and Phi-3 put a blank before every text they encode, others
    an eos behind it: segments encoded one by one then never add up to the whole text."""
    tokenizer = family_tokenizer(kind, template)
    words = {"question": "Is it?", "steps": ["Every cat is a Tier.", "Ü 猫"], "answer": "It is é."}
    rows = [*tiny_rows(12), words]
    judge_own_text(rows, tokenizer, tmp_path)
    encoded = encode_rows(rows, tokenizer, [], tmp_path, "rows.json")
    before, _ = TEMPLATES[template]
    for number, row in enumerate(rows):
        ids = encoded.tokens[number]["tokens"].tolist()
        question = ids[: encoded.question_length[number]]
        assert [i for i, token in enumerate(ids) if token == 1] == [0] * before  # <s>
        assert [i for i, token in enumerate(ids) if token == 2] == [len(ids) - 1]  # </s>
        texts = [row["question"], *row["steps"], "### " + row["answer"]]
        whole = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
        assert ids[before:-1] == whole
        actual = tokenizer.decode(question, skip_special_tokens=True)
        assert actual.strip(" ") == row["question"] + "\n"


@pytest.mark.parametrize("kind", PIECES)
def test_beginning_of_a_step_has_the_tokens_of_its_row(kind, tmp_path):
    """The search tree of ProsQA asks for the probability of a step's beginning."""
    tokenizer = family_tokenizer(kind, "both")
    row = {"question": "Is it?", "steps": ["Every cat is"], "answer": "It is."}
    encoded = encode_rows([row], tokenizer, [], tmp_path, "rows.json")
    step = encoded.tokens[0]["tokens"][encoded.question_length[0] :].tolist()
    beginning = _tokens_after_a_line(tokenizer, "cat")
    assert beginning == step[: len(beginning)] and tokenizer.decode(beginning) == "Every cat"


def test_unigram_tokenizers_work_too(tmp_path):
    judge_own_text(tiny_rows(12), family_tokenizer("always", "eos", models.Unigram), tmp_path)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, and blanks and line ends are the same to it."""
    words = "tom has plums he finds more how many does in a . ? < > + = # ".split()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, *(str(n) for n in range(60))]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (word_piece, "back as"),  # no line ends, # # # for ###
        # a blank is put behind every added token
        (
            lambda: family_tokenizer("llama 2", added=[AddedToken("<<", normalized=False)]),
            "'<<7+1=8>>' back as '<< 7+1=8>>'",
        ),
        (lambda: family_tokenizer("byte level", added=["?\n<", "?\n#"]), "merges tokens across"),
    ],
)
def test_tokenizer_that_cannot_work_is_refused_once(make, seen, tmp_path):
    rows = [row for row in tiny_rows(40) if row["steps"]]
    with pytest.raises(UserError) as caught:
        encode_rows(rows, make(), [], tmp_path, "rows.json")
    (line,) = caught.value.problems
    assert line.startswith("rows.json: row 0: this tokenizer ") and seen in line
    assert line.endswith(f"of {len(rows)} rows)") and os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------- unreadable rows

CHAIN = ["<<1+1=2>>", "<<2+1=3>>"]
UNREADABLE = [  # a row's steps and answer, what is wanted and what would be read
    (CHAIN, "3<|end|>", "'3<|end|>' is read as '3'"),
    (CHAIN, "<|end|>3", "'<|end|>3' is read as ''"),
    (CHAIN, "3<|pad|>", "'3<|pad|>' is read as '3'"),
    (CHAIN, "3 <|pad|> 4", "'3 <|pad|> 4' is read as '3  4'"),
    ([CHAIN[0] + "<|end|>", CHAIN[1]], "3", "'<<1+1=2>><|end|>' is read as '<<1+1=2>>'"),
    ([CHAIN[0], "<|pad|>" + CHAIN[1]], "3", "'<|pad|><<2+1=3>>' is read as '<<2+1=3>>'"),
    (["<|pad|>", CHAIN[1]], "3", "'<|pad|>' is read as '<<2+1=3>>'"),
    ([CHAIN[0], "so ### 3"], "3", "'so ### 3' is read as 'so'"),
    (["### 3"], "3", "'### 3' is read as ''"),
]


@pytest.mark.parametrize(("steps", "answer", "seen"), UNREADABLE)
def test_row_whose_own_text_would_be_judged_wrong_is_named(
    tokenizer, tmp_path, steps, answer, seen
):
    """Chat-formatted data ended in eos: accepted, and no output could ever be right."""
    rows = tiny_rows(9)
    rows[5] = {"question": "How many?<|pad|>", "steps": steps, "answer": answer}
    with pytest.raises(UserError) as caught:
        encode_rows(rows, tokenizer, [], tmp_path, "rows.json")
    hint = "; remove special tokens and ### from it"
    assert caught.value.problems == [f"rows.json: row 5: {seen}{hint}"]
    assert os.listdir(tmp_path) == []


def test_many_unreadable_rows_are_counted(tokenizer, tmp_path):
    rows = [{**row, "answer": row["answer"] + "<|end|>"} for row in tiny_rows(24)]
    with pytest.raises(UserError) as caught:
        encode_rows(rows, tokenizer, [], tmp_path, "rows.json")
    lines = caught.value.problems
    assert [line.split(":")[1] for line in lines[:-1]] == [f" row {n}" for n in range(10)]
    assert lines[-1] == "rows.json: 14 more rows like these"


READABLE = [
    {"question": "Who?<|end|>", "steps": [], "answer": "the question is not judged"},
    {"question": "Who?", "steps": ["a  b ", "tab\tand\u00a0blank"], "answer": " c\u2003 d\n"},
    {"question": "Cafe\u0301?", "steps": ["cafe\u0301"], "answer": "Cafe\u0301"},
    {"question": "Which?", "steps": ["# a ## b"], "answer": "# 1 ### 2"},
    {"question": "How many?", "steps": ["\U0001f600 <-"], "answer": "−1,234.50 \U0001f600"},
]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.NFD()])
def test_rows_that_differ_in_blanks_and_accents_only_are_right(tokenizer, tmp_path, normalizer):
    """Qwen's tokenizers compose accents: the text that comes back is another string."""
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    judge_own_text(READABLE, tokenizer, tmp_path)


def test_character_that_comes_back_as_another_is_named(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    rows = [*tiny_rows(4), {"question": "Which?", "steps": [], "answer": "\ufb01ve"}]
    with pytest.raises(UserError, match="row 4: this tokenizer gives 'ﬁve' back as 'five'"):
        encode_rows(rows, tokenizer, [], tmp_path, "rows.json")


@pytest.mark.parametrize("number", [0, 7, 11])
def test_row_whose_border_merges_is_named(tokenizer, tmp_path, number):
    """The ancestor looks at row 0 only; a row without a chain in its form ("?" + two line ends)
    merges with the real Qwen tokenizer, somewhere in the file."""
    rows = tiny_rows(12)
    tokenizer.add_tokens(["?\n<"])  # joins what the curriculum cuts
    rows = [{**row, "question": row["question"].rstrip("?")} for row in rows]
    rows[number] = {**rows[number], "question": "How many?", "steps": ["<<1+1=2>>"]}
    with pytest.raises(UserError, match=rf"rows.json: row {number}: .*merges tokens across"):
        encode_rows(rows, tokenizer, [], tmp_path, "rows.json")
    assert os.listdir(tmp_path) == []


def test_white_space_that_merges_is_to_be_removed(tokenizer, tmp_path):
    tokenizer.add_tokens(["\n "])
    rows = [*tiny_rows(4), {**GOOD, "steps": [" <<1+1=2>>"]}]
    with pytest.raises(UserError, match="row 4: .*merges .*; remove white space at their ends"):
        encode_rows(rows, tokenizer, [], tmp_path, "rows.json")


def test_bad_row_is_named_by_encoding_processes_too(tokenizer, tmp_path):
    """10,000 rows and more are encoded by several processes; the error must survive the way."""
    rows = tiny_rows(8) * 1300
    tokenizer.add_tokens(["?\n#"])
    rows[:8] = rows[-8:] = [{**row, "question": row["question"].rstrip("?")} for row in rows[:8]]
    rows = [row if row["steps"] else rows[0] for row in rows]
    rows[10_200] = {**GOOD, "steps": []}
    with pytest.raises(UserError, match="rows.json: row 10200: .*merges tokens across"):
        encode_rows(rows, tokenizer, [], tmp_path, "rows.json")


@pytest.mark.parametrize("marker", [START_LATENT, LATENT, END_LATENT])
@pytest.mark.parametrize("field", ["question", "steps", "answer"])
def test_marker_in_a_text_is_named(tokenizer, tokens, tmp_path, marker, field):
    rows = tiny_rows(6)
    rows[4] = {**rows[4], field: [f"x {marker}"] if field == "steps" else f"x {marker} y"}
    with pytest.raises(UserError, match="rows.json: row 4: .*latent marker"):
        encode_rows(rows, tokenizer, list(tokens), tmp_path, "rows.json")


def test_cache_is_used_again(tokenizer, tokens, tmp_path, monkeypatch):
    first = encode_rows(tiny_rows(8), tokenizer, list(tokens), tmp_path, "a.json")

    def fail(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoding, "_encode_batch", fail)
    again = encode_rows(tiny_rows(8), tokenizer, list(tokens), tmp_path, "b.json")
    for row in range(8):
        assert again.tokens[row]["tokens"].tolist() == first.tokens[row]["tokens"].tolist()
    assert len(os.listdir(tmp_path)) == 1


def test_cache_knows_rows_tokenizer_and_markers(tokenizer, tokens, tmp_path):
    rows = tiny_rows(8)
    encode_rows(rows, tokenizer, list(tokens), tmp_path, "a.json")
    encode_rows(rows[:7], tokenizer, list(tokens), tmp_path, "a.json")
    encode_rows(rows, tokenizer, [], tmp_path, "a.json")
    tokenizer.add_tokens(["plums"])
    changed = encode_rows(rows, tokenizer, list(tokens), tmp_path, "a.json")
    assert len(os.listdir(tmp_path)) == 4
    assert tokenizer.convert_tokens_to_ids("plums") in changed.tokens[0]["tokens"]


def test_killed_save_leaves_no_cache(tokenizer, tmp_path, monkeypatch):
    """A process that dies while it saves: what it leaves is not taken for the cache."""
    save = datasets.Dataset.save_to_disk

    def die(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        os.truncate(next(p.path for p in os.scandir(path) if p.name.endswith(".arrow")), 10)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datasets.Dataset, "save_to_disk", die)
        encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    assert os.listdir(tmp_path)  # the torn folder
    encoded = encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    assert len(encoded) == 8 and len(encoded.tokens[7]["tokens"]) > 0


def test_two_processes_may_write_the_same_cache(tokenizer, tmp_path):
    """The slower one finds the folder there when it publishes; nothing is left over."""
    encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    (folder,) = tmp_path.iterdir()
    encoding._publish(datasets.load_from_disk(str(folder)), folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    shutil.rmtree(folder)
    assert len(encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")) == 8


# ------------------------------------------------------------------------------- curriculum


def test_capped_schedule_is_the_design_table():
    curriculum = Curriculum(epochs_per_stage=2, max_latent_stage=3, c_thought=2)
    seen = [
        (epoch, curriculum.stage(epoch), *map(int, curriculum.plan(curriculum.stage(epoch), 100)))
        for epoch in range(1, 9)
    ]
    assert seen == [
        (1, 0, 0, 0),
        (2, 1, 2, 1),
        (3, 1, 2, 1),
        (4, 2, 4, 2),
        (5, 2, 4, 2),
        (6, 3, 6, 3),
        (7, 3, 6, 3),
        (8, 3, 6, 3),
    ]


def test_paper_schedule_adds_a_stage_without_steps():
    """Stage M + 1 keeps the latents of stage M and drops what is left of the chain."""
    curriculum = Curriculum(**PAPER)
    seen = [
        (curriculum.stage(epoch), *map(int, curriculum.plan(curriculum.stage(epoch), 100)))
        for epoch in range(1, 12)
    ]
    assert (
        seen
        == [(0, 0, 0)] * 2 + [(1, 2, 1)] * 2 + [(2, 4, 2)] * 2 + [(3, 6, 3)] * 2 + [(4, 6, 100)] * 3
    )


def test_last_stage_schedule_has_no_curriculum():
    """The paper's rows without curriculum: question, all latents, answer, from the start."""
    curriculum = Curriculum(schedule="last_stage", epochs_per_stage=2, max_latent_stage=3)
    stages = {curriculum.stage(epoch) for epoch in range(9)}
    assert stages == {4} and [int(n) for n in curriculum.plan(4, 100)] == [6, 100]


@pytest.mark.parametrize("schedule", ["capped", "paper"])
def test_epoch_0_is_stage_0(schedule):
    """Nothing trained yet: what an untrained model, or resume: 0, is evaluated at."""
    assert Curriculum(schedule=schedule, epochs_per_stage=1).stage(0) == 0
    assert Curriculum(schedule=schedule, epochs_per_stage=3).stage(0) == 0


@pytest.mark.parametrize("schedule", ["capped", "paper"])
@pytest.mark.parametrize("method", [Method.COT, Method.NO_COT])
def test_methods_without_curriculum_have_one_stage(method, schedule):
    curriculum = Curriculum(method, schedule, epochs_per_stage=1)
    assert {curriculum.stage(epoch) for epoch in range(20)} == {0}


# method, pad_latent_to_max, stage (M = 3, c = 2), steps of the row -> latents, skipped
PLANS = [
    (Method.COCONUT, True, 0, 4, 0, 0),
    (Method.COCONUT, True, 1, 4, 2, 1),
    (Method.COCONUT, True, 3, 4, 6, 3),
    (Method.COCONUT, True, 3, 1, 6, 1),
    (Method.COCONUT, True, 2, 0, 4, 0),
    (Method.COCONUT, True, 4, 9, 6, 9),
    (Method.COCONUT, True, 4, 0, 6, 0),
    (Method.COCONUT, False, 3, 4, 6, 3),
    (Method.COCONUT, False, 3, 1, 2, 1),
    (Method.COCONUT, False, 2, 0, 0, 0),
    (Method.COCONUT, False, 4, 2, 4, 2),
    (Method.COCONUT, False, 4, 9, 6, 9),
    (Method.NO_THOUGHTS, True, 2, 4, 0, 2),
    (Method.NO_THOUGHTS, False, 2, 1, 0, 1),
    (Method.NO_THOUGHTS, True, 4, 9, 0, 9),
    (Method.COT, True, 0, 4, 0, 0),
    (Method.COT, False, 0, 0, 0, 0),
    (Method.NO_COT, True, 0, 4, 0, 4),
    (Method.NO_COT, False, 0, 0, 0, 0),
]


@pytest.mark.parametrize(("method", "pad", "stage", "steps", "latents", "skipped"), PLANS)
def test_plan(method, pad, stage, steps, latents, skipped):
    """One row, or many at once: evaluation and training read the same function."""
    curriculum = Curriculum(method, pad_latent_to_max=pad)
    assert curriculum.plan(stage, steps) == (latents, skipped)
    actual = curriculum.plans(np.full(3, stage), np.full(3, steps))
    assert [array.tolist() for array in actual] == [[latents] * 3, [skipped] * 3]


def test_plans_of_mixed_rows():
    curriculum = Curriculum(pad_latent_to_max=False)
    actual = curriculum.plans(np.array([0, 1, 3, 4]), np.array([2, 0, 2, 5]))
    assert [array.tolist() for array in actual] == [[0, 0, 4, 6], [0, 0, 2, 5]]


def test_c_thought_zero_gives_no_latents():
    latents, skipped = Curriculum(c_thought=0).plans(np.array([3, 3]), np.array([5, 0]))
    assert (latents.tolist(), skipped.tolist()) == ([0, 0], [3, 0])


HEADER = ["epochs", "stage", "latent", "tokens", "steps", "skipped"]


def test_table_of_the_capped_schedule():
    lines = [line.split() for line in Curriculum().table(8).split("\n")]
    assert lines == [
        HEADER,
        ["1", "0", "0", "0"],
        ["2-3", "1", "2", "1"],
        ["4-5", "2", "4", "2"],
        ["6+", "3", "6", "3"],
    ]


def test_table_of_the_paper_schedule():
    lines = [line.split() for line in Curriculum(**PAPER).table(10).split("\n")]
    assert lines == [
        HEADER,
        ["1-2", "0", "0", "0"],
        ["3-4", "1", "2", "1"],
        ["5-6", "2", "4", "2"],
        ["7-8", "3", "6", "3"],
        ["9+", "4", "6", "all"],
    ]


def test_table_ends_with_the_last_epoch():
    """Epochs beyond num_epochs are not promised; a stage cut short shows its real span."""
    lines = Curriculum().table(4).split("\n")
    assert [line.split()[0] for line in lines[1:]] == ["1", "2-3", "4+"]
    assert Curriculum().table(3).split("\n")[-1].split()[0] == "2-3"
    lines = Curriculum(Method.NO_COT).table(3).split("\n")
    assert [line.split() for line in lines[1:]] == [["1+", "0", "0", "all"]]


# ------------------------------------------------------------------------------- samples


STAGED = [(m, s) for m in (Method.COCONUT, Method.NO_THOUGHTS) for s in range(5)]
STAGED += [(Method.COT, 0), (Method.NO_COT, 0)]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize(("method", "stage"), STAGED)
def test_samples_are_the_definition(tokenizer, tokens, encoded, method, stage, pad):
    markers = tokens if method is Method.COCONUT else None
    curriculum = Curriculum(method, pad_latent_to_max=pad)
    data = StageDataset(encoded, curriculum, markers, stage)
    for number, row in enumerate(tiny_rows(40)):
        latents, skipped = map(int, curriculum.plan(stage, len(row["steps"])))
        ids, labels = naive_sample(row, tokenizer, markers, latents, skipped)
        sample = data[number]
        assert (sample.row, sample.num_fed_back) == (number, latents)
        assert sample.input_ids.tolist() == ids and sample.labels.tolist() == labels
        # the lengths that the dealing trusts are the real ones
        assert data.total_length[number] == len(ids)
        assert data.num_labels[number] == sum(label != IGNORED for label in labels)
        assert data.prefix_length[number] == sample.first_latent
        assert ids[: sample.first_latent].count(tokens.latent) == 0
        at = slice(sample.first_latent, sample.first_latent + latents)
        assert ids[at] == [tokens.latent] * latents


@pytest.mark.parametrize("method", Method)
def test_question_is_the_sample_up_to_its_first_label(tokens, encoded, method):
    markers = tokens if method is Method.COCONUT else None
    data = StageDataset(encoded, Curriculum(method), markers, 2)
    for number in range(40):
        sample, question = data[number], data.question(number)
        length = len(question.input_ids)
        assert question.input_ids.tolist() == sample.input_ids[:length].tolist()
        assert length == np.flatnonzero(sample.labels != IGNORED)[0]
        assert (question.labels == IGNORED).all()
        assert question.num_fed_back == sample.num_fed_back


@pytest.mark.parametrize("forced", [0, 1, 7])
def test_forced_latents_change_nothing_but_their_number(tokenizer, tokens, encoded, forced):
    """The baseline of every evaluation: another number of latents, 0 included."""
    data = StageDataset(encoded, Curriculum(), tokens, 2, num_latents=forced)
    for number, row in enumerate(tiny_rows(40)):
        ids, labels = naive_sample(row, tokenizer, tokens, forced, min(2, len(row["steps"])))
        assert data[number].input_ids.tolist() == ids and data[number].labels.tolist() == labels
        assert data.total_length[number] == len(ids)


def test_pauses_differ_from_thoughts_by_what_is_fed_back_only(tokens, encoded):
    """Nothing is fed back, so a batch of pauses has no latent columns: it is one pass, and its
    rows need not be aligned."""
    thoughts = StageDataset(encoded, Curriculum(), tokens, 2)
    pauses = StageDataset(encoded, Curriculum(latent_input="pause"), tokens, 2)
    for number in range(40):
        assert pauses[number].num_fed_back == pauses.question(number).num_fed_back == 0
        assert pauses[number].input_ids.tolist() == thoughts[number].input_ids.tolist()
        assert pauses[number].labels.tolist() == thoughts[number].labels.tolist()
    batch = collate([pauses[number] for number in range(8)], 0)
    assert batch.latent_columns == (0, 0) and batch.attention_mask[:, 0].all()


def test_pairs_of_stages_differ_by_one_step(encoded, tokens):
    """The next stage replaces exactly one more step by c_thought latents."""
    curriculum = Curriculum(max_latent_stage=4, c_thought=3)
    for before, after in pairwise(StageDataset(encoded, curriculum, tokens, s) for s in range(5)):
        more = after.num_skipped > before.num_skipped
        assert (more == (encoded.num_steps >= after.stages)).all()
        assert (after.num_latents - before.num_latents == 3).all()
        assert (after.num_labels[more] < before.num_labels[more]).all()
        assert (after.num_labels[~more] == before.num_labels[~more]).all()


def uniform(encoded, tokens, prob, **changes):
    arguments = {"seed": 0, "epoch": 1, **changes}
    return StageDataset(encoded, Curriculum(), tokens, 2, uniform_prob=prob, **arguments).stages


def test_uniform_prob_draws_depend_on_seed_and_epoch_and_row_only(encoded, tokens):
    """The ancestor draws from the global random module inside a multi-process map: its seed
    does not control them."""
    first = uniform(encoded, tokens, 0.5)
    torch.manual_seed(5), np.random.seed(5)
    np.random.rand(), torch.rand(1)
    assert (uniform(encoded, tokens, 0.5) == first).all()
    assert (uniform(encoded, tokens, 0.5, seed=1) != first).any()
    assert (uniform(encoded, tokens, 0.5, epoch=2) != first).any()
    part = replace(
        encoded,
        num_steps=encoded.num_steps[:9],
        steps_from=encoded.steps_from[:9],
        question_length=encoded.question_length[:9],
        answer_length=encoded.answer_length[:9],
    )
    assert (uniform(part, tokens, 0.5) == first[:9]).all()


def many_rows(encoded, count, num_steps):
    """Encoded rows repeated, all with the same number of steps."""
    return replace(
        encoded,
        num_steps=np.full(count, num_steps),
        steps_from=np.zeros((count, 9), np.int64),
        question_length=np.ones(count, np.int64),
        answer_length=np.ones(count, np.int64),
    )


def test_uniform_prob_frequencies(encoded, tokens):
    """A fifth of the rows, spread evenly over the stages 0 to 4 of a four-step chain."""
    stages = uniform(many_rows(encoded, 20_000, 4), tokens, 0.2)
    frequency = np.bincount(stages, minlength=5) / 20_000
    assert np.allclose(frequency, [0.04, 0.04, 0.84, 0.04, 0.04], atol=0.008)
    assert (uniform(many_rows(encoded, 100, 4), tokens, 0.0) == 2).all()
    assert (uniform(many_rows(encoded, 100, 0), tokens, 1.0) == 0).all()


# ------------------------------------------------------------------------------- batches


def naive_collate(samples, pad_id, align_end):
    """Row by row on Python lists, the columns found by looking."""
    with_latents = [s.first_latent for s in samples if s.num_fed_back]
    longest = max(len(s.input_ids) for s in samples)
    rows = []
    for s in samples:
        left = max(with_latents) - s.first_latent if with_latents and s.num_fed_back else 0
        left = longest - len(s.input_ids) if align_end else left
        rows.append((left, s))
    width = max(left + len(s.input_ids) for left, s in rows)
    table = {name: [] for name in ("input_ids", "attention_mask", "position_ids", "labels")}
    for left, s in rows:
        n = len(s.input_ids)
        right = width - left - n
        table["input_ids"].append([pad_id] * left + s.input_ids.tolist() + [pad_id] * right)
        table["attention_mask"].append([0] * left + [1] * n + [0] * right)
        table["position_ids"].append([0] * left + list(range(n)) + [n - 1] * right)
        table["labels"].append([IGNORED] * left + s.labels.tolist() + [IGNORED] * right)
    return {name: torch.tensor(rows) for name, rows in table.items()}


def mixed_samples(encoded, tokens, numbers=(0, 3, 6, 0)):
    """Samples whose rows have these numbers of latents."""
    return [
        StageDataset(encoded, Curriculum(), tokens, 2, num_latents=n)[3 * i]
        for i, n in enumerate(numbers)
    ]


NUMBERS = [(0, 3, 6, 0), (2, 2, 2), (0, 0), (1,), (12, 1, 0), (0, 0, 5)]


@pytest.mark.parametrize("align_end", [False, True])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_collate_is_the_naive_one(encoded, tokens, numbers, align_end):
    samples = mixed_samples(encoded, tokens, numbers)
    batch = collate(samples, 1, align_end)
    for name, tensor in naive_collate(samples, 1, align_end).items():
        assert torch.equal(getattr(batch, name), tensor), name
        assert getattr(batch, name).dtype == torch.int64


@pytest.mark.parametrize("numbers", NUMBERS)
def test_first_latents_share_a_column(encoded, tokens, numbers):
    batch = collate(mixed_samples(encoded, tokens, numbers), 1)
    firsts = {row.nonzero()[0].item() for row in batch.input_ids == tokens.latent if row.any()}
    assert len(firsts) <= 1
    columns = (batch.input_ids == tokens.latent).any(0).nonzero().flatten().tolist()
    expected = (columns[0], columns[-1] + 1) if columns else (0, 0)
    assert batch.latent_columns == expected
    assert expected[1] - expected[0] == max(numbers)


def test_rows_without_latents_cost_no_padding_on_the_left(encoded, tokens):
    batch = collate(mixed_samples(encoded, tokens, (0, 3, 6, 0)), 1)
    assert batch.attention_mask[0, 0] == 1 and batch.attention_mask[3, 0] == 1


def test_label_index_are_the_positions_before_labels(encoded, tokens):
    batch = collate(mixed_samples(encoded, tokens), 1)
    rows, columns = (batch.labels != IGNORED).nonzero(as_tuple=True)
    width = batch.labels.shape[1]
    assert batch.label_index.tolist() == (rows * width + columns - 1).tolist()
    # and each of them stands in its own row, on a real token
    assert batch.attention_mask.flatten()[batch.label_index].all()


def test_align_end_ends_in_the_last_column(encoded, tokens):
    batch = collate(mixed_samples(encoded, tokens), 1, align_end=True)
    assert batch.attention_mask[:, -1].all()
    assert (batch.attention_mask.diff() >= 0).all()  # padding on the left only


# ------------------------------------------------------------------------------- steps


def test_steps_hold_each_row_once_and_count_the_dropped(encoded, tokens):
    data = StageDataset(encoded, Curriculum(), tokens, 1)
    limit = int(np.sort(data.total_length)[30])
    for grouped in (False, True):
        steps, dropped = plan_steps(data, 8, limit, 0, 1, grouped)
        rows = np.concatenate(steps)
        kept = np.flatnonzero(data.total_length <= limit)
        assert sorted(rows.tolist()) == kept.tolist() and dropped == 40 - len(kept) > 0
        assert sorted(map(len, steps))[1:] == [8] * (len(steps) - 1)


@pytest.mark.parametrize("grouped", [False, True])
def test_order_depends_on_seed_and_epoch(encoded, tokens, grouped):
    data = StageDataset(encoded, Curriculum(), tokens, 1)
    order = lambda *at: np.concatenate(plan_steps(data, 8, 512, *at, grouped)[0]).tolist()
    first = order(0, 1)
    torch.manual_seed(1), np.random.seed(1)
    assert order(0, 1) == first
    others = [first, order(1, 1), order(0, 2), list(range(40))]
    assert len({tuple(rows) for rows in others}) == 4


def test_no_row_short_enough_gives_no_step(encoded, tokens):
    data = StageDataset(encoded, Curriculum(), tokens, 1)
    assert plan_steps(data, 8, 2, 0, 1) == ([], 40)


def test_grouped_steps_hold_rows_of_like_length():
    rng = np.random.default_rng(0)
    data = of_lengths(rng.integers(20, 200, 500), rng.integers(5, 60, 500))
    spread = lambda grouped: np.mean(
        [np.ptp(data.prefix_length[rows]) for rows in plan_steps(data, 20, 512, 0, 1, grouped)[0]]
    )
    assert spread(True) < 0.1 * spread(False)
    # the steps are shuffled, or every epoch would begin with the short rows
    firsts = [data.prefix_length[rows].mean() for rows in plan_steps(data, 20, 512, 0, 1, True)[0]]
    assert firsts != sorted(firsts)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 70),
    num_ranks=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_deal_gives_every_row_once(count, num_ranks, batch_size, seed):
    """Any uneven step, fewer rows than ranks included. Unequal counts of micro-batches would
    hang the ranks' collectives."""
    rng = np.random.default_rng(seed)
    data = of_lengths(rng.integers(5, 90, 100), rng.integers(1, 40, 100))
    rows = rng.permutation(100)[:count]
    parts = split_by_length(rows, data, num_ranks, batch_size)
    assert len(parts) == num_ranks and len({len(batches) for batches in parts}) == 1
    assert all(len(batch) <= batch_size for batches in parts for batch in batches)
    dealt = np.concatenate([batch for batches in parts for batch in batches])
    assert sorted(dealt.tolist()) == sorted(rows.tolist())
    assert len(parts[0]) == -(-count // (num_ranks * batch_size))  # no more than it needs
    again = split_by_length(rng.permutation(rows), data, num_ranks, batch_size)
    assert [[b.tolist() for b in p] for p in again] == [[b.tolist() for b in p] for p in parts]


def padded(data, batches) -> float:
    """Positions computed for each real token, first latents aligned."""
    width = lambda b: data.prefix_length[b].max() + data.num_labels[b].max()
    positions = sum(len(b) * width(b) for b in batches)
    return positions / sum(data.total_length[b].sum() for b in batches)


def test_dealt_batches_are_padded_less_than_random_ones():
    rng = np.random.default_rng(0)
    lengths = [rng.lognormal(mean, 0.45, 960).astype(int) + 1 for mean in (4, 3)]
    data = of_lengths(*lengths)
    steps, _ = plan_steps(data, 96, 10_000, 0, 1)
    dealt = [batch for rows in steps for batch in split_by_length(rows, data, 1, 16)[0]]
    chance = [rows[i : i + 16] for rows in steps for i in range(0, 96, 16)]
    assert padded(data, dealt) < 0.85 * padded(data, chance)


def test_neighbours_in_length_go_to_different_ranks():
    """Ranks wait for each other, so each should get its share of long rows."""
    data = of_lengths(np.arange(100, 196), np.full(96, 10))
    work = [
        data.total_length[np.concatenate(p)].sum()
        for p in split_by_length(np.arange(96), data, 4, 4)
    ]
    assert max(work) / min(work) < 1.1


@pytest.mark.parametrize(
    ("num_ranks", "batch_size", "per_step"),
    [(1, 4, 8), (2, 4, 16), (3, 2, 12), (2, 3, 7), (5, 2, 3)],
)
def test_micro_batches(encoded, tokens, num_ranks, batch_size, per_step):
    """All ranks together: each row once, the same places, the whole step's number of labels."""
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    steps, _ = plan_steps(data, per_step, 512, 0, 1)
    ranks = [
        list(
            MicroBatches(
                data, steps, num_ranks=num_ranks, rank=rank, batch_size=batch_size, pad_id=1
            )
        )
        for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen, labelled, number = [], 0, 0
    for together in zip(*ranks):
        assert len({(b.last, b.num_items_in_batch) for b in together}) == 1
        seen += [row for b in together for row in b.rows]
        labelled += sum(len(b.label_index) for b in together)
        if together[0].last:
            assert sorted(seen) == sorted(steps[number].tolist())
            assert labelled == together[0].num_items_in_batch
            seen, labelled, number = [], 0, number + 1
    assert number == len(steps)


def test_empty_micro_batch_runs_but_counts_for_nothing(encoded, tokens):
    """Three rows on five ranks: two ranks run the same passes over a row without labels."""
    data = StageDataset(encoded, Curriculum(), tokens, 2)
    steps = [np.array([4, 9, 2])]
    batches = [
        MicroBatches(data, steps, num_ranks=5, rank=rank, batch_size=2, pad_id=1)[0]
        for rank in range(5)
    ]
    empty = [batch for batch in batches if not batch.rows]
    assert len(empty) == 2
    for batch in empty:
        assert len(batch.label_index) == 0 and (batch.labels == IGNORED).all()
        assert batch.latent_columns[1] - batch.latent_columns[0] == 4
        assert batch.last and batch.num_items_in_batch > 0


def test_steps_left_after_a_resume_are_the_undisturbed_ones(encoded, tokens):
    data = StageDataset(encoded, Curriculum(), tokens, 1)
    steps, _ = plan_steps(data, 8, 512, 0, 3)
    whole = [
        batch.rows
        for batch in MicroBatches(data, steps, num_ranks=1, rank=0, batch_size=4, pad_id=1)
    ]
    rest = [
        batch.rows
        for batch in MicroBatches(data, steps[2:], num_ranks=1, rank=0, batch_size=4, pad_id=1)
    ]
    assert whole[4:] == rest and rest


# ------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def qwen():
    folder = os.environ.get("COCONUT_TEST_TOKENIZER")
    if not folder:
        pytest.skip("COCONUT_TEST_TOKENIZER is not set")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("prosqa_valid", 300), ("prontoqa_valid", 200)])
def test_real_rows_of_rules_all_encode(test_data, qwen, tmp_path, name, count):
    rows = parse_rows((test_data / f"{name}.json").read_text(encoding="utf-8"), name)
    assert len(encode_rows(rows, qwen, add_latent_tokens(qwen), tmp_path, name)) == count


@pytest.mark.slow
def test_real_gsm8k_rows_all_encode(test_data, qwen, tmp_path):
    """GSM8K under the real Qwen3 tokenizer: no border merges, no row is lost."""
    train = (test_data / "gsm8k_train.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    valid = (test_data / "icot_valid.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    tokens = LatentTokens(*add_latent_tokens(qwen))
    for lines, parse, count, chainless in (
        (train, gsm8k_icot.parse_original, 7473, 95),
        (valid, gsm8k_icot.parse_icot, 500, 6),
    ):
        rows = parse_rows(json.dumps([parse(line) for line in lines]), "gsm8k")
        encoded = encode_rows(rows, qwen, list(tokens), tmp_path, "gsm8k")
        assert len(encoded) == count and (encoded.num_steps == 0).sum() == chainless
        cot = StageDataset(encoded, Curriculum(Method.COT), None, 0)
        if count == 7473:
            assert cot.total_length.max() == 305
        assert plan_steps(cot, 96, 512, 0, 1)[1] == 0
        lengths = [len(ids) for ids in encoded.tokens[:]["tokens"]]
        assert (cot.total_length == lengths).all()
