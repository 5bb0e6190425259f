"""The README: short, its commands run, its files and figures are there."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT

import run
from analysis.__main__ import parse_args as parse_analysis
from analysis.seeds import combinations
from curriculum import Curriculum
from loader import load_config
from utils import FIELDS

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("   #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
SCRIPTS = {
    "train_fresh_start.sh": "gsm8k_coconut_qwen3_a100_fresh_start",
    "train_continue_fresh.sh": "gsm8k_coconut_qwen3_a100_fresh_continue",
}


def test_the_readme_is_short():
    assert len(TEXT.split()) <= 1900


def check_run(arguments: list[str]) -> None:
    """The arguments of run.py name files of ours and keys that go together."""
    load_config(*run.parse_args(arguments).config)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    if words[0] == "git":
        return
    if words[0] == "torchrun" or words[:2] == ["python", "run.py"]:
        check_run(words[words.index("run.py") + 1 :])
    elif words[:3] == ["python", "-m", "analysis"]:
        args = parse_analysis(words[3:])  # a checkpoint or run folder brings its config
        assert args.command in ("compare", "curve", "report") or "/" in args.config[0]
    elif words[:2] == ["bash", "run_seeds.sh"]:
        args = parse_analysis(["seeds", *words[2:]])
        files, values = args.config[:1], dict(text.split("=", 1) for text in args.config[1:])
        assert len(combinations(files, values, "run")) > 1
    elif words[0] == "bash" and words[1] in SCRIPTS:
        given = [word for word in words[2:] if word.endswith(".yaml")]
        check_run([*([] if given else [f"args/{SCRIPTS[words[1]]}.yaml"]), *words[2:]])
    else:
        assert words[0] == "bash" and len(words) == 2, command
        assert subprocess.run(["bash", "-n", words[1]]).returncode == 0


def test_commands_between_the_lines_are_there_too():
    for path in re.findall(r"python (\S+\.py)", TEXT):
        assert (ROOT / path).exists(), path


def test_links_and_files_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    tree = re.search(r"## Files\n\n```text\n(.*?)```", TEXT, re.DOTALL)[1]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line
    engine = re.search(r"^engine/ +(.*)$", tree, re.MULTILINE)[1]
    files = {path.stem for path in (ROOT / "engine").glob("*.py")} - {"__init__"}
    assert set(engine.split(", ")) == files


def test_keys_are_keys():
    for name in re.findall(r"`(\w+)(?:=\w+|: \w+)`", TEXT):
        assert name in FIELDS or name.isupper(), name


def test_the_table_of_stages_is_the_programs():
    rows = re.findall(r"^\| (1|2-3|4-5|6\+) \| (\d) \| (\d) \| (\d) \|$", TEXT, re.MULTILINE)
    printed = [line.split() for line in Curriculum().table(20).splitlines()[1:]]
    assert [list(row) for row in rows] == printed
