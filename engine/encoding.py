"""Rows -> tokens and the lengths of their segments, checked and cached on disk.

The curriculum cuts between question, steps and answer, so a row is encoded as its whole text and
cut by the tokenizer's offsets; and what the model is to write must be read as the row says, or no
model could get it right.
"""

import hashlib
import json
import os
import shutil
import socket
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import multiprocess
import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from dataset import Encoded
from engine.files import sync_folder
from engine.text import DEFAULT, TextFormat, decode_completion, end_of_text, plain, same_steps
from rows import refuse_rows
from utils import UserError, count_cores, log

ROWS = datasets.Features(
    question=datasets.Value("string"),
    steps=datasets.List(datasets.Value("string")),
    answer=datasets.Value("string"),
)
ENCODED = datasets.Features(
    tokens=datasets.List(datasets.Value("int32")),
    lengths=datasets.List(datasets.Value("int32")),
    problem=datasets.Value("string"),
)
OTHER_TOKENIZER = "take a model with another tokenizer"  # the remedy where no row is to blame


def _segment_lengths(encoding: Encoding, segments: list[str]) -> list[int] | None:
    """Tokens of each segment of an encoded text; None where a token spans two segments.

    What the tokenizer puts before a text (bos) counts for the first segment, what it puts behind
    (eos, sep) for none.
    """
    end = end_of_text(encoding)
    first, border, total = [0], 0, sum(map(len, segments))
    for segment in segments[:-1]:
        border += len(segment)
        behind = (encoding.char_to_token(at) for at in range(border, total))
        token = next((token for token in behind if token is not None), end)
        span = encoding.token_to_chars(token) if token < end else None
        if span is not None and span[0] < border:
            return None
        first.append(token)
    return np.diff([*first, end]).tolist()


def _misread(
    row: dict, completions: list[str], tokenizer: PreTrainedTokenizerBase, text_format: TextFormat
) -> str:
    """What the judge reads wrongly where a model writes just the row's own text ("": nothing).

    completions: that text as it is decoded, without the first 0, 1, ... steps.
    """
    for skipped, text in enumerate(completions):
        gold, steps = row["steps"][skipped:], text_format.steps(text)
        answer = text_format.answer(text)
        if same_steps(steps, gold) and text_format.same_answer(answer, row["answer"]):
            continue
        lines = zip_longest(gold, steps, fillvalue="")
        wrong = (pair for pair in lines if plain(pair[0]) != plain(pair[1]))
        wanted, read = next(wrong, (row["answer"], answer or ""))
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        marker = text_format.marker
        if any(token in wanted for token in (*special, marker)):
            return f"{wanted!r} is read as {read!r}; remove special tokens and {marker} from it"
        return f"this tokenizer gives {wanted!r} back as {read!r}; change it, or {OTHER_TOKENIZER}"
    return ""


def _encodings(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoding | str]:
    """Of each text, or why there is none."""
    try:
        return list(tokenizer(texts).encodings)
    except Exception as error:  # noqa: BLE001 without a token for what is unknown: a bare one
        if len(texts) == 1:
            return [f"this tokenizer cannot read it ({error}); {OTHER_TOKENIZER}"]
        return [encoding for text in texts for encoding in _encodings([text], tokenizer)]


def _encode_row(
    row: dict,
    encoding: Encoding | str,
    tokenizer: PreTrainedTokenizerBase,
    barred: list[int],
    text_format: TextFormat,
) -> tuple[list[int], list[int], str]:
    """Tokens, lengths of the segments (eos is in the last) and what is wrong ("": nothing).

    encoding: of the row's text, or what is wrong with it.
    """
    if isinstance(encoding, str):
        return [], [], encoding
    lengths = _segment_lengths(encoding, text_format.segments(row))
    if lengths is None:
        loose = any(text != text.strip() for text in (row["question"], *row["steps"]))
        remedy = "remove white space at their ends" if loose else OTHER_TOKENIZER
        merges = "this tokenizer merges tokens across the borders of question, steps and answer"
        return [], [], f"{merges}; {remedy}"
    eos = tokenizer.eos_token_id
    tokens = [*encoding.ids[: sum(lengths)], eos]
    lengths[-1] += 1
    if not set(barred).isdisjoint(tokens):
        return [], [], "the text holds a latent marker, or a token that has no row; remove it"
    starts = np.cumsum(lengths)[:-1]  # of each step and of the answer
    # up to the first eos, as generation ends
    completions = [tokens[at : tokens.index(eos, at) + 1] for at in starts]
    texts = [decode_completion(tokenizer, completion) for completion in completions]
    return tokens, lengths, _misread(row, texts, tokenizer, text_format)


def _encode_batch(
    batch: dict, tokenizer: PreTrainedTokenizerBase, barred: list[int], text_format: TextFormat
) -> dict[str, list]:
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    encodings = _encodings(["".join(text_format.segments(row)) for row in rows], tokenizer)
    more = tokenizer, barred, text_format
    encoded = [_encode_row(row, encoding, *more) for row, encoding in zip(rows, encodings)]
    return dict(zip(("tokens", "lengths", "problem"), map(list, zip(*encoded))))


def _refuse_unreadable(encoded: datasets.Dataset, source: str) -> None:
    """Raise UserError naming the rows that cannot be trained on; the tokenizer, once, where it is
    to blame for most rows."""
    column = encoded.data.column("problem").to_pylist()
    problems = {number: problem for number, problem in enumerate(column) if problem}
    blamed = [number for number in problems if problems[number].endswith(OTHER_TOKENIZER)]
    if 2 * len(blamed) > len(encoded):
        first, count = blamed[0], f"so for {len(blamed)} of {len(encoded)} rows"
        raise UserError(f"{source}: row {first}: {problems[first]} ({count})")
    refuse_rows(source, problems)


def _warn_of_labels(rows: list[dict], source: str, text_format: TextFormat) -> None:
    """Say where two answers are different texts and the same label, which may be meant so."""
    first: dict[Any, str] = {}  # by label
    for answer in (row["answer"] for row in rows):
        other = first.setdefault(text_format.value(answer), answer)
        if plain(other).casefold() != plain(answer).casefold():
            log.warning(
                f"{source}: answer_kind: choice takes {other!r} and {answer!r} for the same, by "
                "their first words; if they are not, set answer_kind: text"
            )
            return


def _measure(rows: list[dict], encoded: datasets.Dataset, fingerprint: str) -> Encoded:
    column = encoded.with_format("arrow")[:]["lengths"].combine_chunks()
    flat = column.values.to_numpy()  # lengths of all segments of all rows
    starts = column.offsets.to_numpy()[:-1].astype(np.int64)
    counts = np.diff(column.offsets.to_numpy())  # question + steps + answer
    num_steps = (counts - 2).astype(np.int64)
    grid = np.arange(max(num_steps.max(), 1))  # (most steps,)
    index = np.minimum(starts[:, None] + 1 + grid, len(flat) - 1)
    steps = np.where(grid < num_steps[:, None], flat[index], 0)
    steps_from = np.zeros((len(counts), steps.shape[1] + 1), dtype=np.int64)
    steps_from[:, :-1] = np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
    return Encoded(
        rows=rows,
        fingerprint=fingerprint,
        tokens=encoded,
        num_steps=num_steps,
        question_length=flat[starts].astype(np.int64),
        answer_length=flat[starts + counts - 1].astype(np.int64),
        steps_from=steps_from,
        numbers=np.arange(len(rows)),
    )


def encode_rows(
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    barred: list[int],
    cache_dir: str | Path | None,
    source: str,
    text_format: TextFormat = DEFAULT,
) -> Encoded:
    """Encode rows once; the result is cached on disk by the rows' and the tokenizer's content
    (cache_dir None: nowhere, for a few).

    barred: tokens that no text may hold (inputs.barred_tokens). Raises UserError naming the
    rows that hold one, whose segments share a token, or whose own text would be judged wrong.
    """
    if text_format.kind == "choice":
        _warn_of_labels(rows, source, text_format)
    digest = hashlib.sha256(json.dumps(rows).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr((tokenizer.eos_token_id, barred, "v1")).encode())
    if text_format.marker != DEFAULT.marker:
        digest.update(text_format.marker.encode())
    fingerprint = digest.hexdigest()[:24]
    more: dict[str, Any] = dict(tokenizer=tokenizer, barred=barred, text_format=text_format)
    columns = {name: [row[name] for row in rows] for name in ROWS}
    if cache_dir is None:
        encoded = datasets.Dataset.from_dict(_encode_batch(columns, **more), features=ENCODED)
        _refuse_unreadable(encoded, source)
        return _measure(rows, encoded, fingerprint)
    # checkpoints know their data by the fingerprint: a new way to check rows changes the folder
    folder = Path(cache_dir) / f"encoded-{text_format.kind}-{fingerprint}"
    known = _load(folder)
    if known is None:
        table = datasets.Dataset.from_dict(columns, features=ROWS)
        try:
            encoded = table.map(
                _encode_batch,
                batched=True,
                fn_kwargs=more,
                remove_columns=table.column_names,
                features=ENCODED,
                num_proc=min(count_cores(), len(rows) // 5000) if len(rows) >= 10_000 else None,
                desc=f"encoding {source}",
            )
        except multiprocess.TimeoutError as error:  # of workers that were asked once more, after
            raise error.__context__ or error from None  # what ended it: a request to stop
        _refuse_unreadable(encoded, source)
        _publish(encoded.remove_columns("problem"), folder)
        known = datasets.load_from_disk(str(folder))
    return _measure(rows, known, fingerprint)


def _load(folder: Path) -> datasets.Dataset | None:
    """What is kept in the cache; None, and it is gone, where a power cut has damaged it."""
    if not folder.exists():
        return None
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        log.warning(f"{folder}: cannot be read ({error}); it is made anew")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _publish(encoded: datasets.Dataset, folder: Path) -> None:
    """Save under a temporary name, then rename: a killed save is never taken for a cache."""
    # of this process: nodes may share the cache and write at once
    writing = folder.with_name(f"{folder.name}.writing-{socket.gethostname()}-{os.getpid()}")
    try:
        encoded.save_to_disk(str(writing))
        sync_folder(writing)
        writing.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster; its content is the same
            raise
    finally:
        shutil.rmtree(writing, ignore_errors=True)
