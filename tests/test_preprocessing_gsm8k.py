"""preprocessing/gsm8k_icot.bash and .py: reading, dropping, drawing, writing, downloading.

Set COCONUT_TEST_DATA to a folder with gsm8k_train.jsonl (GSM8K's original training set) and
icot_valid.txt (iCoT's valid.txt) to run the tests on real data too.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from preprocessing import gsm8k_icot  # noqa: E402

TRAIN = "".join(
    f"Ann has {n} figs and gets {n} more. How many?||<<{n}+{n}={2 * n}>> #### {2 * n}\n"
    for n in range(20)
)
VALID = "What is left of 3?||<<5-2=3>> <<3-3=0>> #### 0\nHow warm is it?|| #### -7\n"
TEST = "Is it #1 of 2,000?||<<2*1000=2000>> #### 2,000\n"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 87805358\n"


def put(folder, train=TRAIN, valid=VALID, test=TEST):
    """A folder with iCoT files; None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("train", train), ("valid", valid), ("test", test)):
        if text is not None:
            (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def run_main(folder, *arguments):
    """main() on the folder's files, output into folder/out; returns the exit code."""
    files = [f"--{name}={folder / name}.txt" for name in ("train", "valid", "test")]
    try:
        gsm8k_icot.run_script(
            lambda: gsm8k_icot.main([*files, f"--output_dir={folder / 'out'}", *arguments])
        )
    except SystemExit as end:
        return end.code
    return 0


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


# Reading ---------------------------------------------------------------------------------------


def test_rows_come_out_as_they_are(tmp_path, capsys):
    assert run_main(put(tmp_path)) == 0
    assert load(tmp_path / "out/gsm8k_validation.json") == [
        {"question": "What is left of 3?", "steps": ["<<5-2=3>>", "<<3-3=0>>"], "answer": "0"},
        {"question": "How warm is it?", "steps": [], "answer": "-7"},  # not [""]
    ]
    assert load(tmp_path / "out/gsm8k_test.json")[0]["answer"] == "2,000"
    assert len(load(tmp_path / "out/gsm8k_train.json")) == 20
    assert "2 written, 1 without a chain" in capsys.readouterr().out


@pytest.mark.parametrize("question", ["Is #1 a || b?", "Is it #### or ||####", "a\u2028b\x85c"])
def test_marks_and_line_separators_inside_a_question(question):
    row = gsm8k_icot.parse_icot(f"{question}||<<1+1=2>> #### 2")
    assert row == {"question": question, "steps": ["<<1+1=2>>"], "answer": "2"}


def test_unicode_line_separator_does_not_end_a_row(tmp_path):
    assert run_main(put(tmp_path, valid="a\u2028b?|| #### 1\n")) == 0
    assert load(tmp_path / "out/gsm8k_validation.json")[0]["question"] == "a\u2028b?"


def test_original_jsonl(tmp_path):
    put(tmp_path)
    rows = [
        {"question": " Why? ", "answer": "5-2 = $<<5-2=3>>3 and\n3*2=<<3*2=6>>6.\n#### 6"},
        {"question": "Prose?", "answer": "It is as it is.\n#### 1,200"},
    ]
    original = tmp_path / "train.jsonl"
    original.write_text("\n".join(map(json.dumps, rows)))  # no line end: complete JSON all the same
    assert run_main(tmp_path, "--train", str(original)) == 0
    assert load(tmp_path / "out/gsm8k_train.json") == [
        {"question": "Why?", "steps": ["<<5-2=3>>", "<<3*2=6>>"], "answer": "6"},
        {"question": "Prose?", "steps": [], "answer": "1,200"},
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        (LFS_POINTER, "Git LFS pointer"),
        ("\n<!DOCTYPE html>\n<html></html>\n", "HTML page"),
        ("", "empty"),
        (TRAIN[:-1], "line 20 has no line end, the file seems cut short"),
        (TRAIN + "A question, cut\n", "line 21: no || in 'A question, cut'"),
        (TRAIN + "q||<<1+1=2>> 2\n", "line 21: no ####"),
        (TRAIN + "q||<<1+1=2>> #### \n", "line 21: the answer is empty"),
        (TRAIN + "||<<1+1=2>> #### 2\n", "line 21: the question is empty"),
        (TRAIN + "q||<<1+1=2> #### 2\n", "line 21: the chain is not a list of <<...>>"),
    ],
)
def test_bad_training_file_is_named_and_nothing_is_written(tmp_path, capsys, text, message):
    assert run_main(put(tmp_path, train=text)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path / 'train.txt'}: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "q", "answer": "<<1+1=2>>', "line 1: Unterminated string"),
        ('["q", "#### 1"]', "line 1: not a JSON object"),
        ('{"question": "q"}', 'line 1: "question" and "answer" are not both text'),
        ('{"question": "q", "answer": "2"}', "line 1: no #### in the answer"),
        (
            '{"question": "q", "answer": "<<1+1=2>2 #### 2"}',
            "line 1: a << or >> without its partner",
        ),
        ('{"question": "\\ud800", "answer": "#### 2"}', "line 1: 'utf-8' codec can't encode"),
        ("[" * 100_000, "line 1: JSON nested too deeply"),
    ],
)
def test_bad_original_line(tmp_path, capsys, line, message):
    bad = put(tmp_path) / "bad.jsonl"
    bad.write_text(line)
    assert run_main(tmp_path, "--valid", str(bad)) == 2
    assert message in capsys.readouterr().err


def test_many_bad_lines_are_listed_up_to_ten(tmp_path, capsys):
    run_main(put(tmp_path, train=TRAIN + 12 * "bad\n"))
    error = capsys.readouterr().err
    assert "12 of 32 lines" in error and "line 30" in error and "and 2 more" in error
    assert "line 31" not in error


def test_a_file_with_the_published_sha256_is_intact(tmp_path, capsys, monkeypatch):
    """Nobody can repair the published file: a line of it that is no row is dropped, not fatal."""
    text = TRAIN + "no row"
    monkeypatch.setitem(gsm8k_icot.PUBLISHED, "train", hashlib.sha256(text.encode()).hexdigest())
    assert run_main(put(tmp_path, train=text)) == 0
    out = capsys.readouterr().out
    assert "1 dropped: unreadable\n  line 21: no ||" in out and "published train.txt" not in out
    assert "is not the published valid.txt" in out


def test_extension_and_missing_file(tmp_path, capsys):
    put(tmp_path)
    assert run_main(tmp_path, "--valid", str(tmp_path / "valid.csv")) == 2
    assert run_main(tmp_path, "--valid", str(tmp_path / "absent.txt")) == 2
    error = capsys.readouterr().err
    assert "'.csv'; allowed: .txt, .jsonl" in error and "absent.txt: no such file" in error


NUMBERS = st.text(string.digits + "+-*/=.,%() $", min_size=1).filter(str.strip)
ROWS = st.builds(
    lambda question, steps, answer: {"question": question, "steps": steps, "answer": answer},
    st.text(st.characters(blacklist_characters="\n", blacklist_categories=["Cs"]))
    .map(str.strip)
    .filter(bool),
    st.lists(NUMBERS.map("<<{}>>".format), max_size=4),
    NUMBERS.map(str.strip),
)


@settings(deadline=None)
@given(ROWS)
def test_valid_rows_come_through_unchanged(row):
    chain = " ".join(row["steps"])
    assert gsm8k_icot.parse_icot(f"{row['question']}||{chain} #### {row['answer']}") == row
    prose = "".join(f"so {step}it is\n" for step in row["steps"]) + f"#### {row['answer']}"
    original = json.dumps({"question": row["question"], "answer": prose})
    assert gsm8k_icot.parse_original(original) == row


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=40) | st.text("q|<>#1= \n").map(str.encode)).map(b"\n".join),
    st.sampled_from([".txt", ".jsonl"]),
)
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("any") / f"any{suffix}"
    path.write_bytes(content)
    try:
        rows = gsm8k_icot.read_source("train", path).rows
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert rows and all(
            row["question"] and row["answer"] and "" not in row["steps"] for row in rows
        )


# Dropping and drawing --------------------------------------------------------------------------


def test_held_out_questions_are_dropped_and_counted(tmp_path, capsys):
    held_out = "\ufeffwhat  is \u201cLEFT\u201d of 3||<<1+1=2>> #### 2\nIs it 1 of 2000?|| #### 3\n"
    first = TRAIN.splitlines(keepends=True)[0]
    assert run_main(put(tmp_path, train=held_out + TRAIN + first)) == 0
    out = capsys.readouterr().out
    assert "23 rows read" in out and "1 repeat a question" in out and "21 written" in out
    assert "1 dropped: question is in gsm8k_validation" in out
    assert "1 dropped: question is in gsm8k_test" in out
    assert "LEFT" not in (tmp_path / "out/gsm8k_train.json").read_text()


ASKED = (
    "Ann's 1,200 figs (half-ripe) cost $0.50 each \u2013 20% off for 2 3-kg bags, or -5; "
    "is 5-3 \u00bd?"
)
SAME_QUESTION = [
    ("Ann's", "Ann\u2019s"),
    ("1,200", "1200"),
    ("1,200", "\uff11,\uff12\uff10\uff10"),
    ("half-ripe", "half ripe"),
    ("half-ripe", "half\u2010ripe"),
    ("half-ripe", "half\u00adripe"),
    ("figs", "\ufeff figs"),
    ("(half-ripe)", "half-ripe,"),
    ("$0.50", "0.50"),
    ("$0.50", "$ 0.50"),
    (" \u2013 ", ", "),
    (" \u2013 ", "\u2014"),
    ("20%", "20 %"),
    ("3-kg", "3 kg"),
    ("3-kg", "3kg"),
    ("-5", "\u22125"),
    ("; is", ". IS"),
    ("5-3", "5 \u2212 3"),
    ("\u00bd?", "1/2"),
    ("each", "e\u0301ach"),
]
OTHER_QUESTION = [
    ("0.50", "050"),
    ("0.50", "50"),
    ("2 3", "23"),
    ("20%", "$20"),
    (" -5", " 5"),
    ("5-3", "5+3"),
    ("5-3", "53"),
    ("\u00bd", "12"),
    ("1,200", "1.200"),
    ("1,200", "1,2"),
    ("figs", "fig"),
]


@pytest.mark.parametrize("part, other", SAME_QUESTION)
def test_a_mark_a_blank_or_a_unicode_form_makes_no_other_question(part, other):
    asked = ASKED.replace("each", "\u00e9ach") if part == "each" else ASKED
    changed = {"question": ASKED.replace(part, other)}
    assert changed["question"] != asked
    assert gsm8k_icot.question_key(changed) == gsm8k_icot.question_key({"question": asked})


@pytest.mark.parametrize("part, other", OTHER_QUESTION)
def test_another_number_or_word_makes_another_question(part, other):
    changed = {"question": ASKED.replace(part, other)}
    assert changed["question"] != ASKED
    assert gsm8k_icot.question_key(changed) != gsm8k_icot.question_key({"question": ASKED})


def test_questions_of_marks_only_are_not_all_the_same():
    first, second = (gsm8k_icot.question_key({"question": text}) for text in ("???", "\u2605"))
    assert first != second


def test_draw_is_the_same_everywhere(tmp_path):
    """The expected numbers are written down: another machine or Python must draw them too."""

    def drawn(*arguments):
        assert run_main(tmp_path, "--target_size", "5", *arguments) == 0
        return [int(row["question"].split()[2]) for row in load(tmp_path / "out/gsm8k_train.json")]

    put(tmp_path)
    assert drawn() == drawn("--seed", "0") == [1, 8, 12, 13, 15]
    assert drawn("--seed", "1") != drawn()


@pytest.mark.parametrize("size", ["0", "-3", "21", "many", "5.0", "\u0665"])
def test_target_size_out_of_range(tmp_path, capsys, size):
    assert run_main(put(tmp_path), f"--target_size={size}") == 2
    assert "allowed: 1 to 20" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_left_to_train_on(tmp_path, capsys):
    assert run_main(put(tmp_path, train=VALID)) == 2
    assert "no training row is left" in capsys.readouterr().err


# Writing ---------------------------------------------------------------------------------------


def test_a_file_is_not_replaced_by_its_own_rows(tmp_path, capsys):
    """Whose other fields, and the prose of the original, would be gone."""
    files = [tmp_path / "gsm8k_train.json", tmp_path / "gsm8k_validation.json"]
    for number, file in enumerate(files):
        file.write_text(json.dumps({"question": f"{number}?", "answer": "It is 1.\n#### 1"}) + "\n")
    before = [file.read_bytes() for file in files]
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    arguments = [f"--train={files[0]}", f"--valid={files[1]}", f"--output_dir={link}"]
    with pytest.raises(ValueError, match="gsm8k_train.json would be replaced by its own rows"):
        gsm8k_icot.main(arguments)
    assert [file.read_bytes() for file in files] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f.name for f in files), "link"]


@pytest.mark.parametrize(
    "stop, code", [(OSError(28, "No space left on device"), 2), (SystemExit(143), 143)]
)  # what a signal becomes
def test_interrupted_writing_leaves_the_old_files(tmp_path, monkeypatch, capsys, stop, code):
    put(tmp_path)
    assert run_main(tmp_path) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    synced = []

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise stop

    monkeypatch.setattr(os, "fsync", fsync)
    assert run_main(tmp_path, "--target_size", "3") == code
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert "Traceback" not in capsys.readouterr().err


# The script ------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A tree of its own with the real scripts, so that no test writes into the real data/."""
    (tmp_path / "project/preprocessing").mkdir(parents=True)
    for name in ("gsm8k_icot.bash", "gsm8k_icot.py", "common.py", "textfiles.py"):
        shutil.copy(ROOT / "preprocessing" / name, tmp_path / "project/preprocessing")
    return tmp_path / "project"


class Server(ThreadingHTTPServer):
    """Serves `files` ({path: bytes}), records requests; stalls in the middle of `stall_at`."""

    daemon_threads = True
    stall_at = None

    def __init__(self):
        self.files, self.requests, self.stalled = {}, [], threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.path == self.server.stall_at:
            self.wfile.write(content[:100])
            self.wfile.flush()
            self.server.stalled.set()
            time.sleep(20)
        elif content is not None:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(project):
    """Holds three small files, which are made the published ones of the project's copy."""
    with Server() as server:
        server.files = {
            "/train.txt": TRAIN.encode(),
            "/valid.txt": VALID.encode(),
            "/test.txt": TEST.encode(),
        }
        script = project / "preprocessing/gsm8k_icot.py"
        text = script.read_text()
        for path, content in server.files.items():
            text, count = re.subn(
                rf'("{path[1:-4]}": )"[0-9a-f]{{64}}"',
                rf'\1"{hashlib.sha256(content).hexdigest()}"',
                text,
            )
            assert count == 1
        script.write_text(text)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def start(project, *arguments, cwd=None, **environment):
    script = project / "preprocessing/gsm8k_icot.bash"
    cwd = cwd or project
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable} | environment
    return subprocess.Popen(
        ["bash", os.path.relpath(script, cwd), *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(project, *arguments, **options):
    """(exit code, stdout, stderr) of gsm8k_icot.bash."""
    process = start(project, *arguments, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def address(server):
    return f"http://127.0.0.1:{server.server_port}"


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("where", ["", "preprocessing"])
def test_script_with_a_local_folder(project, where):
    put(project / "local", test=None)
    folder = os.path.relpath(project / "local", project / where)
    code, out, err = run(project, cwd=project / where, TARGET_SIZE="7", GSM8K_ICOT_DIR=folder)
    assert (code, err) == (0, "")
    assert f"no test.txt in {folder}: data/gsm8k_test.json not written" in out
    assert files_in(project / "data") == ["gsm8k_train.json", "gsm8k_validation.json"]
    assert len(load(project / "data/gsm8k_train.json")) == 7


def test_script_passes_arguments_on(project, tmp_path):
    put(project / "local")
    elsewhere = tmp_path / "else where"
    code, out, _ = run(
        project,
        "--seed",
        "1",
        "--output_dir",
        str(elsewhere),
        TARGET_SIZE="2",
        GSM8K_ICOT_DIR=str(project / "local"),
    )
    assert code == 0 and "2 of 20 drawn by seed 1" in out
    assert len(files_in(elsewhere)) == 3 and not (project / "data").exists()


def test_script_downloads_once(project, server):
    code, out, err = run(project, GSM8K_ICOT_URL=address(server))
    assert (code, err) == (0, "") and "NOTE" not in out
    assert sorted(server.requests) == ["/test.txt", "/train.txt", "/valid.txt"]
    made = {"gsm8k_test.json", "gsm8k_train.json", "gsm8k_validation.json"}
    assert set(files_in(project / "data")) == made | {f"raw/{path[1:]}" for path in server.files}
    code, _, _ = run(project, GSM8K_ICOT_URL=address(server), TARGET_SIZE="3")
    assert code == 0 and len(server.requests) == 3
    assert len(load(project / "data/gsm8k_train.json")) == 3


@pytest.mark.parametrize(
    "content, message",
    [
        (TRAIN + "One more?|| #### 1\n", "sha256 is "),
        (LFS_POINTER, "Git LFS pointer"),
        ("<html>Sign in</html>", "HTML page"),
    ],
)
def test_script_refuses_a_wrong_download(project, server, content, message):
    server.files["/train.txt"] = content.encode()
    code, _, err = run(project, GSM8K_ICOT_URL=address(server))
    assert code == 2 and message in err and "Traceback" not in err
    assert files_in(project / "data") == []


def test_script_reports_a_failed_download_and_goes_on_from_there(project, server):
    valid = server.files.pop("/valid.txt")
    code, _, err = run(project, GSM8K_ICOT_URL=address(server))
    assert code == 22 and "/valid.txt was not downloaded" in err  # curl's code for an HTTP error
    assert files_in(project / "data") == ["raw/train.txt"]
    server.files["/valid.txt"] = valid
    assert run(project, GSM8K_ICOT_URL=address(server))[0] == 0
    assert server.requests.count("/train.txt") == 1


def test_script_checks_kept_downloads_too(project, server):
    assert run(project, GSM8K_ICOT_URL=address(server))[0] == 0
    put(project / "data/raw", valid=VALID + VALID)
    code, _, err = run(project, GSM8K_ICOT_URL=address(server))
    assert code == 2 and "raw/valid.txt: sha256 is" in err and "remove it" in err


def test_script_interrupted_while_downloading(project, server):
    server.stall_at = "/valid.txt"
    process = start(project, GSM8K_ICOT_URL=address(server))
    assert server.stalled.wait(30)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert files_in(project / "data") == ["raw/train.txt"]


def test_script_checks_target_size_before_it_downloads(project, server):
    code, _, err = run(project, GSM8K_ICOT_URL=address(server), TARGET_SIZE="5e4")
    assert code == 2 and "'5e4'" in err and server.requests == []


# Real data -------------------------------------------------------------------------------------

REAL = os.environ.get("COCONUT_TEST_DATA")


@pytest.mark.skipif(REAL is None, reason="COCONUT_TEST_DATA names no folder with the real files")
def test_questions_of_real_gsm8k_that_are_alike_are_equal():
    """The key drops no row of 7,473 that it should not: all their questions differ by it."""
    rows = gsm8k_icot.read_source("train", Path(REAL, "gsm8k_train.jsonl")).rows
    assert len({gsm8k_icot.question_key(row) for row in rows}) == len(rows) == 7473


@pytest.mark.skipif(REAL is None, reason="COCONUT_TEST_DATA names no folder with the real files")
def test_real_gsm8k(tmp_path, capsys):
    """The original rows give iCoT's form exactly, and iCoT's validation is a part of them."""
    train, valid = Path(REAL, "gsm8k_train.jsonl"), Path(REAL, "icot_valid.txt")
    gsm8k_icot.main([f"--train={train}", f"--valid={valid}", f"--output_dir={tmp_path}"])
    out = capsys.readouterr().out
    assert "500 dropped: question is in gsm8k_validation" in out and "NOTE" not in out
    kept = load(tmp_path / "gsm8k_train.json")
    assert len(kept) == 6973
    validation = load(tmp_path / "gsm8k_validation.json")
    original = gsm8k_icot.read_source("train", train).rows
    by_question = {row["question"]: row for row in original}
    assert len(validation) == 500
    assert [by_question[row["question"]] for row in validation] == validation
    assert sum(not row["steps"] for row in original) == 95
    assert sum(not row["steps"] for row in validation) == 6
    assert sum("," in row["answer"] for row in original) == 79
    assert valid.read_bytes().decode() == "".join(
        f"{row['question']}||{' '.join(row['steps'])} #### {row['answer']}\n" for row in validation
    )
