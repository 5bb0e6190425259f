"""engine/encoding.py: segments, tokenizers of all families, rows that no model could get right."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import datasets
import pytest
from conftest import ROOT, naive_segments, tiny_rows
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
from curriculum import Curriculum
from dataset import LatentTokens, StageDataset
from engine import encoding
from engine.batches import plan_steps
from engine.encoding import encode_rows
from engine.evaluation import _judge
from engine.text import DEFAULT, TextFormat
from rows import parse_rows
from utils import Method, UserError

sys.path.append(str(ROOT))
from preprocessing import gsm8k_icot

GOOD = {"question": "How many?", "steps": ["<<1+1=2>>"], "answer": "2"}


# ------------------------------------------------------------------------------- encoding


def test_segments_equal_the_whole_text_on_every_row(tokenizer, tmp_path):
    rows = tiny_rows(60)
    encoded = encode_rows(rows, tokenizer, [], tmp_path, "rows.json")
    assert len(encoded) == 60
    for number, row in enumerate(rows):
        segments = naive_segments(row, tokenizer)
        tokens = encoded.row_tokens(number)
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
    text = tokenizer.decode(encoded.row_tokens(0))
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
        assert (encoded.row_tokens(number) == bos).nonzero()[0].tolist() == [0]


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
        ids = encoded.row_tokens(number).tolist()
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
    step = encoded.row_tokens(0)[encoded.question_length[0] :].tolist()
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


def test_row_of_characters_without_a_token_is_named(tmp_path):
    """A traceback, where the tokenizer has no token for what is unknown either."""
    rows = tiny_rows(6)
    known = sorted({*"".join(text for r in rows for text in DEFAULT.segments(r))}) + ["<|end|>"]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(known)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    judge_own_text(rows, tokenizer, tmp_path)
    rows[4] = {**GOOD, "answer": "\U0001f600"}
    with pytest.raises(UserError) as caught:
        encode_rows(rows, tokenizer, [], tmp_path / "new", "rows.json")
    (line,) = caught.value.problems
    assert line.startswith("rows.json: row 4: this tokenizer cannot read it (WordLevel error: ")


def test_answers_that_a_choice_takes_for_one_are_named_once(tokenizer, caplog):
    answers = ["U.S.", "u.s.", "U.K.", "U.N."]
    rows = [{**GOOD, "answer": answer} for answer in answers]
    choice = TextFormat(kind="choice")
    encode_rows(rows[:2], tokenizer, [], None, "rows.json", choice)
    encode_rows(rows, tokenizer, [], None, "rows.json")
    assert not caplog.messages
    encode_rows(rows, tokenizer, [], None, "rows.json", choice)
    (line,) = caplog.messages
    assert line.startswith("rows.json: answer_kind: choice takes 'U.S.' and 'U.K.' for the same")


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_ends_the_encoding_processes_too(workspace, number, to_all):
    """They waited for work for ever, and with them whoever read what the run printed."""
    path = workspace.folder / "train.json"
    path.write_text(json.dumps(tiny_rows(40) * 1000))
    environment = {**os.environ, "XDG_CACHE_HOME": str(workspace.folder / "cache")}
    process = subprocess.Popen(
        [sys.executable, ROOT / "run.py", workspace.yaml()],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen = ""
    while "1000/" not in seen:
        character = process.stdout.read(1)
        assert character, seen
        seen += character
    if to_all:  # as a terminal and torchrun do
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    seen += process.stdout.read()  # to the end: nobody holds the pipe
    assert process.wait() == 3
    line = seen.splitlines()[-1]
    assert line.startswith("stopped by a signal, no checkpoint was saved yet; go on with: bash ")
    assert not list((workspace.folder / "cache").glob("coconut/*"))
    assert not workspace.run_dir.exists()


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
        assert again.row_tokens(row).tolist() == first.row_tokens(row).tolist()
    assert len(os.listdir(tmp_path)) == 1


def test_cache_knows_rows_tokenizer_and_markers(tokenizer, tokens, tmp_path):
    rows = tiny_rows(8)
    encode_rows(rows, tokenizer, list(tokens), tmp_path, "a.json")
    encode_rows(rows[:7], tokenizer, list(tokens), tmp_path, "a.json")
    encode_rows(rows, tokenizer, [], tmp_path, "a.json")
    tokenizer.add_tokens(["plums"])
    changed = encode_rows(rows, tokenizer, list(tokens), tmp_path, "a.json")
    assert len(os.listdir(tmp_path)) == 4
    assert tokenizer.convert_tokens_to_ids("plums") in changed.row_tokens(0)


def test_killed_save_leaves_no_cache(tokenizer, tmp_path, monkeypatch):
    """A process that dies while it saves: what it leaves is not taken for the cache."""
    save = datasets.Dataset.save_to_disk

    def die(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        os.truncate(next(p.path for p in os.scandir(path) if p.name.endswith(".arrow")), 10)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datasets.Dataset, "save_to_disk", die)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill removes nothing
        encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    assert os.listdir(tmp_path)  # the torn folder
    encoded = encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    assert len(encoded) == 8 and len(encoded.row_tokens(7)) > 0


@pytest.mark.parametrize("lost", ["*.arrow", "state.json", "dataset_info.json"])
def test_a_damaged_cache_is_made_anew(tokenizer, tmp_path, lost, caplog):
    """As by a power cut: a file is there and empty."""
    first = encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    (folder,) = tmp_path.iterdir()
    file = next(folder.glob(lost))
    file.unlink()  # mapped by this process: cut in place, it would end it
    file.touch()
    again = encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    assert again.row_tokens(7).tolist() == first.row_tokens(7).tolist()
    assert f"{folder}: cannot be read" in caplog.text and [*tmp_path.iterdir()] == [folder]


def test_a_full_disk_leaves_nothing_in_the_cache(tokenizer, tmp_path, monkeypatch):
    save = datasets.Dataset.save_to_disk

    def full(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    assert not list(tmp_path.iterdir())


def test_two_processes_may_write_the_same_cache(tokenizer, tmp_path):
    """The slower one finds the folder there when it publishes; nothing is left over."""
    encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")
    (folder,) = tmp_path.iterdir()
    encoding._publish(datasets.load_from_disk(str(folder)), folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    shutil.rmtree(folder)
    assert len(encode_rows(tiny_rows(8), tokenizer, [], tmp_path, "a.json")) == 8


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
        lengths = [len(encoded.row_tokens(row)) for row in range(len(encoded))]
        assert (cot.total_length == lengths).all()
