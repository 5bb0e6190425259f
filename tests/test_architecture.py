"""The shape of the house: which file may import what, and the style that can be counted."""

import ast
import re
import sys

import pytest
from conftest import ROOT

TEXTFILES = "preprocessing.textfiles"  # standard library only; both sides read files by it
TABLES = "preprocessing.tables"  # and parquet by this
# room -> the rooms it imports, no more and no fewer; the arrows point one way
ARROWS = {
    "utils": set(),
    "loader": {TEXTFILES, "rules", "utils"},
    "layers": set(),
    "coconut": {"layers"},
    "curriculum": {"utils"},
    "rows": {TABLES, TEXTFILES, "utils"},
    "dataset": {"curriculum", "utils"},
    "step_loss": {"coconut", "dataset", "utils"},
    "engine.launch": {"utils"},
    "engine.distributed": {"engine.launch", "utils"},
    "engine.files": {"utils"},
    "engine.results": {"engine.files", "engine.logs", "utils"},
    "engine.curve": {"engine.files", "engine.logs", "utils"},
    "engine.logs": {"engine.distributed", "engine.files", TEXTFILES, "utils"},
    "engine.optimizer": {"engine.distributed", "utils"},
    "engine.custom_generate": set(),  # its copy in a checkpoint stands alone
    "engine.card": {
        "coconut",
        "curriculum",
        "engine.custom_generate",
        "engine.text",
        "rows",
        "utils",
    },
    "engine.checkpoint": {
        "engine.adapters",
        "engine.card",
        "engine.distributed",
        "engine.files",
        "engine.launch",
        "engine.optimizer",
        "engine.weights",
        "loader",
        "rules",
        "utils",
    },
    "engine.stop": set(),
    "engine.support": {"coconut", "utils"},
    "engine.text": set(),
    "engine.weights": {"loader", TEXTFILES, "utils"},
    "engine.pretrained": {"engine.adapters", "engine.support", TEXTFILES, "utils"},
    "engine.encoding": {"dataset", "engine.files", "engine.text", "rows", "utils"},
    "engine.batches": {"dataset", "step_loss", "utils"},
    "engine.evaluation": {
        "coconut",
        "dataset",
        "engine.distributed",
        "engine.health",
        "engine.logs",
        "engine.partial",
        "engine.results",
        "engine.sampling",
        "engine.text",
        "utils",
    },
    "engine.sampling": {"coconut", "engine.text", "utils"},
    "engine.partial": {"engine.distributed", "engine.files", "utils"},
    "engine.eval_sets": {
        "coconut",
        "engine.evaluation",
        "engine.inputs",
        "engine.logs",
        "engine.partial",
        "engine.results",
        "engine.sampling",
        "utils",
    },
    "engine.start": {
        "curriculum",
        "engine.checkpoint",
        "engine.files",
        "engine.logs",
        TEXTFILES,
        "loader",
        "utils",
    },
    "engine.inputs": {
        "curriculum",
        "dataset",
        "engine.adapters",
        "engine.batches",
        "engine.start",
        "engine.text",
        "utils",
    },
    "engine.preflight": {
        "coconut",
        "dataset",
        "engine.adapters",
        "engine.checkpoint",
        "engine.distributed",
        "engine.encoding",
        "engine.files",
        "engine.inputs",
        "engine.launch",
        "engine.logs",
        "engine.pretrained",
        "engine.start",
        "engine.support",
        "engine.weights",
        "rows",
        "step_loss",
        "utils",
    },
    "engine.overview": {
        "coconut",
        "engine.adapters",
        "engine.batches",
        "engine.distributed",
        "engine.inputs",
        "engine.launch",
        "engine.optimizer",
        "engine.start",
        "utils",
    },
    "engine.gate": {
        "coconut",
        "curriculum",
        "dataset",
        "engine.checkpoint",
        "engine.distributed",
        "engine.evaluation",
        "engine.logs",
        "utils",
    },
    "engine.health": {"coconut", "engine.checkpoint", "engine.distributed", "engine.text", "utils"},
    "engine.model": {
        "coconut",
        "engine.adapters",
        "engine.distributed",
        "engine.inputs",
        "engine.weights",
        "utils",
    },
    "engine.loop": {
        "coconut",
        "dataset",
        "engine.batches",
        "engine.checkpoint",
        "engine.curve",
        "engine.distributed",
        "engine.evaluation",
        "engine.files",
        "engine.gate",
        "engine.health",
        "engine.inputs",
        "engine.logs",
        "engine.optimizer",
        "engine.start",
        "engine.stop",
        "step_loss",
        "utils",
    },
    "run": {
        "coconut",
        "engine.checkpoint",
        "engine.distributed",
        "engine.eval_sets",
        "engine.files",
        "engine.inputs",
        "engine.launch",
        "engine.logs",
        "engine.loop",
        "engine.model",
        "engine.overview",
        "engine.preflight",
        "engine.start",
        "engine.stop",
        "loader",
        "utils",
    },
    "analysis.compare": {"engine.results", TEXTFILES, "utils"},
    "analysis.pictures": {"analysis.output", "engine.curve"},
    "analysis.probe": {
        "coconut",
        "dataset",
        "engine.adapters",
        "engine.checkpoint",
        "engine.distributed",
        "engine.inputs",
        "engine.model",
        "engine.preflight",
        "engine.text",
        "loader",
        "rows",
        "rules",
        "utils",
    },
    "analysis.look": {
        "analysis.ask",
        "analysis.output",
        "analysis.pictures",
        "analysis.probe",
        "dataset",
        "engine.evaluation",
        "engine.text",
        "utils",
    },
    "analysis.prosqa": {
        "analysis.output",
        "analysis.pictures",
        "analysis.probe",
        "dataset",
        "engine.text",
        "utils",
    },
    "analysis.branches": {"coconut", "engine.support", "layers", "utils"},
    "analysis.interventions": {
        "analysis.branches",
        "analysis.probe",
        "coconut",
        "dataset",
        "engine.distributed",
        "engine.evaluation",
        "engine.text",
        "utils",
    },
    "analysis.chains": {
        "analysis.branches",
        "analysis.interventions",
        "analysis.probe",
        "coconut",
        "dataset",
        "engine.distributed",
    },
    "analysis.linear_probe": {"engine.evaluation"},
    "analysis.verdict": {
        "analysis.compare",
        "analysis.interventions",
        "analysis.look",
        "analysis.output",
        "engine.evaluation",
        "engine.text",
    },
    "analysis.faithful": {
        "analysis.branches",
        "analysis.chains",
        "analysis.edits",
        "analysis.interventions",
        "analysis.linear_probe",
        "analysis.output",
        "analysis.pictures",
        "analysis.probe",
        "analysis.prosqa",
        "analysis.row_files",
        "analysis.verdict",
        "engine.inputs",
        "engine.partial",
        "engine.preflight",
        "engine.support",
        "utils",
    },
    "analysis.__main__": {
        "analysis.ask",
        "analysis.compare",
        "analysis.curve",
        "analysis.edits",
        "analysis.export",
        "analysis.faithful",
        "analysis.look",
        "analysis.prosqa",
        "analysis.report",
        "analysis.seeds",
        "engine.checkpoint",
        "engine.stop",
        "utils",
    },
    "analysis.ask": {"analysis.output", "analysis.probe", TEXTFILES, "loader", "rows", "utils"},
    "analysis.curve": {"analysis.output", "engine.curve", "utils"},
    "analysis.output": {
        "analysis.probe",
        "engine.curve",
        "engine.evaluation",
        "engine.files",
        "engine.results",
        "utils",
    },
    "analysis.runs": {
        "engine.files",
        "engine.launch",
        "engine.logs",
        "engine.results",
        "engine.stop",
        "loader",
        "utils",
    },
    "analysis.seeds": {
        "analysis.compare",
        "analysis.output",
        "analysis.runs",
        "engine.curve",
        "engine.files",
        "loader",
        "utils",
    },
    "analysis.edits": {
        "analysis.output",
        "analysis.probe",
        "analysis.prosqa",
        "analysis.row_files",
        "dataset",
        "engine.text",
        "utils",
    },
    "analysis.row_files": {
        "analysis.ask",
        "analysis.output",
        "analysis.probe",
        "dataset",
        "rows",
        "utils",
    },
    "analysis.report": {
        "analysis.compare",
        "analysis.output",
        "engine.curve",
        "engine.files",
        "engine.logs",
        "engine.results",
        "loader",
        TEXTFILES,
        "utils",
    },
    "analysis.export": {
        "analysis.output",
        "analysis.probe",
        "analysis.upload",
        "curriculum",
        "engine.adapters",
        "engine.card",
        "engine.checkpoint",
        "engine.curve",
        "engine.evaluation",
        "engine.files",
        "engine.inputs",
        "engine.model",
        "engine.partial",
        "engine.preflight",
        "engine.results",
        "engine.weights",
        "rows",
        "utils",
    },
    "analysis.upload": {"utils"},
    "engine.adapters": {"engine.weights", "layers", "loader", "utils"},
    "rules": {"utils"},
}
PACKAGES = ("engine", "analysis")
ROOMS = sorted(path.stem for path in ROOT.glob("*.py"))
ROOMS += sorted(
    f"{package}.{path.stem}"
    for package in PACKAGES
    for path in (ROOT / package).glob("*.py")
    if path.stem != "__init__"
)


def path_of(room: str):
    return ROOT / (room.replace(".", "/") + ".py")


SOURCES = [path_of(room) for room in ROOMS]
SOURCES += sorted(ROOT.glob("preprocessing/*.py")) + sorted(ROOT.glob("benchmarks/*.py"))
# libraries that a room may know and others may not
DISTRIBUTED = re.compile(r"torch\.distributed(?!\.elastic)(\.|$)")
ONLY_HERE = {
    "wandb": {"engine.logs"},
    "peft": {"engine.adapters"},
    "yaml": {"loader", "utils"},  # read, written
    "huggingface_hub": {"analysis.upload", "engine.card", "engine.pretrained"},
}
# except Exception: what torch and safetensors raise on a torn file, or any of the library's models
# on a pass that it was not made for, or wandb on its settings, or tokenizers on a full disk or on
# a file of another version, has no common type
BROAD_EXCEPT = {
    "weights": 1,
    "support": 1,
    "pretrained": 1,
    "logs": 1,
    "checkpoint": 1,
    "encoding": 1,
    "preflight": 1,
    "__main__": 1,
}


def tree(path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path) -> set[str]:
    """The dotted names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def uses(path) -> set[str]:
    """Imports, and dotted uses like torch.distributed.x, which need no import of their own."""
    dotted = {ast.unparse(n) for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)}
    return imports(path) | dotted


def rooms_of(path) -> set[str]:
    return imports(path) & {*ROOMS, TABLES, TEXTFILES}


def test_every_room_has_its_arrows():
    """A new file states here what it knows."""
    assert set(ROOMS) == set(ARROWS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_arrows(room):
    assert rooms_of(path_of(room)) == ARROWS[room]


def test_arrows_have_no_cycle():
    left = {room: set(arrows) for room, arrows in ARROWS.items()}
    while left:
        free = {room for room, arrows in left.items() if not arrows & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {room: arrows for room, arrows in left.items() if room not in free}


@pytest.mark.parametrize("room", ROOMS)
def test_torch_distributed_stays_in_its_room(room):
    """checkpoint.py takes its .checkpoint part; run.py marks the worker's errors for torchrun
    (.elastic knows nothing of groups)."""
    actual = {name for name in uses(path_of(room)) if DISTRIBUTED.match(name)}
    if room == "engine.checkpoint":
        actual = {name for name in actual if not name.startswith("torch.distributed.checkpoint")}
    if room != "engine.distributed":
        assert actual == set()


@pytest.mark.parametrize("room", ROOMS)
def test_elastic_is_for_the_entry_point(room):
    actual = [n for n in imports(path_of(room)) if n.startswith("torch.distributed.elastic")]
    assert not actual or room in ("run", "engine.distributed")


@pytest.mark.parametrize("library", ONLY_HERE)
def test_library_stays_in_its_room(library):
    users = {
        room
        for room in ROOMS
        if any(name.split(".")[0] == library for name in imports(path_of(room)))
    }
    assert users - ONLY_HERE[library] == set()


@pytest.mark.parametrize("room", ["coconut", "curriculum", "dataset", "rows"])
def test_model_and_data_know_nothing_of_ranks(room):
    """Ranks reach them as numbers, never as the environment."""
    assert not re.search(r"environ|getenv|local_rank", (path_of(room)).read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_preprocessing_and_tests_are_not_imported(path):
    """preprocessing/ prepares data on a machine without torch, and no room leans on it; the two
    share how text files are read."""
    names = imports(path)
    roots = {name.split(".")[0] for name in names}
    assert not roots & {"tests", "conftest", "pytest"}
    if path.parent.name not in ("preprocessing", "benchmarks", "analysis"):  # reads ProsQA files
        ours = {name for name in names if name.startswith("preprocessing.")}
        assert not {name for name in ours if not name.startswith((TABLES, TEXTFILES))}
    if path.parent.name == "preprocessing" and path.name != "small_model.py":
        assert not roots & {"torch", "transformers", *ROOMS}
    if path.name == "textfiles.py":
        assert roots <= sys.stdlib_module_names


# ------------------------------------------------------------------------------- errors


def is_broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(k is None or ast.unparse(k) in ("Exception", "BaseException") for k in kinds)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_broad_except_only_where_it_is_explained(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    broad = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and is_broad(node)
    ]
    assert len(broad) <= BROAD_EXCEPT.get(path.stem, 0), f"lines {broad}"
    assert all("#" in lines[number - 1] for number in broad)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_optional_import(path):
    """A library that is missing is an error at once, not another behaviour later."""
    tries = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Try)]
    inside = [n for t in tries for part in t.body for n in ast.walk(part)]
    assert not [n.lineno for n in inside if isinstance(n, ast.Import | ast.ImportFrom)]


def guesses_of_config(path) -> list[str]:
    """Calls that read a config key with a default, or ask whether it exists; for getattr with
    three arguments on a model's config (the library's, of many kinds) see the one in coconut.py."""
    actual = []
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        call, arguments = ast.unparse(node.func), [ast.unparse(a) for a in node.args]
        ours = re.compile(r"(\w+\.)*(config|args)$")
        if call == "hasattr" or (call == "getattr" and len(arguments) == 3):
            actual += [ast.unparse(node)] if ours.match(arguments[0]) else []
        if call.endswith(".get") and ours.match(call.removesuffix(".get")):
            actual.append(ast.unparse(node))
    return [text for text in actual if "base_causallm.config" not in text]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_default_beside_the_schema(path):
    """A key's default stands in utils.Config and nowhere else."""
    assert guesses_of_config(path) == []


def test_nothing_is_written_to_the_config():
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            written = [ast.unparse(t) for t in targets]
            assert not [t for t in written if re.match(r"(\w+\.)*(?<!hf_)config\.\w+$", t)]


# ------------------------------------------------------------------------------- sizes


LONGER = {
    "loop": 450,  # the loop with everything that happens at its borders
    "prosqa": 460,  # a generator, a reader and a checker of the same graphs
}


def functions(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_functions_are_at_most_50_lines(path):
    long = [
        f"{f.name}: {f.end_lineno - f.lineno + 1}"
        for f in functions(path)
        if f.end_lineno - f.lineno + 1 > 50
    ]
    assert long == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_are_at_most_400_lines(path):
    """Or stand in LONGER with a reason."""
    limit = LONGER.get(path.stem, 400)
    assert len(path.read_text(encoding="utf-8").split("\n")) - 1 <= limit


def test_main_is_at_most_40_lines():
    (main,) = [f for f in functions(ROOT / "run.py") if f.name == "main"]
    assert main.end_lineno - main.lineno + 1 <= 40


def test_scripts_stop_at_the_first_error():
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("preprocessing/*.bash"), ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        assert "set -euo pipefail" in text or path.name == "setup.sh", path.name
