"""python -m analysis export: folders, the ancestor's file, the card, the upload."""

import base64
import contextlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Workspace, files_of_at_most, tiny_model, tiny_rows
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import run
from analysis import __main__ as analysis
from analysis.export import _short_names
from analysis.probe import load_probe, read_config
from coconut import Coconut, add_latent_tokens, init_latent_rows
from engine.checkpoint import TrainState, save_checkpoint
from engine.model import build_model
from engine.optimizer import build_optimizer
from engine.preflight import gather_inputs
from loader import load_config

SHORT = dict(num_epochs=2, max_latent_stage=1, batch_size_training=12, max_new_tokens=2)


@pytest.fixture(scope="module")
def space(model_folder, tmp_path_factory) -> Workspace:
    """A coconut run of two epochs, and the folder that its newest checkpoint is exported to."""
    space = Workspace(model_folder, tmp_path_factory.mktemp("export"))
    space.values |= SHORT
    assert run.main([str(space.yaml())]) == 0
    assert analysis.main(["export", str(space.run_dir), str(space.folder / "exported")]) == 0
    return space


@pytest.fixture(scope="module")
def checkpoint(space) -> Path:
    return space.run_dir / "checkpoint_2"


@pytest.fixture(scope="module")
def exported(space) -> Path:
    return space.folder / "exported"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def error_of(capsys, *arguments) -> str:
    """The one line that a refused export says."""
    capsys.readouterr()
    assert analysis.main(["export", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ------------------------------------------------------------------------------- hf


def test_the_folder_holds_the_model_and_nothing_of_the_training(space, checkpoint, exported):
    assert not list(space.folder.glob("*.writing-*"))
    training = {name for name in files(checkpoint) if name.startswith("training_state")}
    training |= {"state.json", "evaluation.json"}
    assert files(exported) == files(checkpoint) - training and len(training) > 3
    ours, theirs = (load_file(f / "model.safetensors") for f in (exported, checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in files(exported) - {"README.md", "model.safetensors"}:
        assert (exported / name).read_bytes() == (checkpoint / name).read_bytes(), name


def test_the_folder_generates_with_the_library_as_the_checkpoint_here(space, checkpoint, exported):
    probe = load_probe(read_config(str(space.yaml(load_model_path=str(checkpoint)))))
    dataset, rows = probe.dataset(None), list(range(len(probe.rows)))
    wanted = [new.tolist() for new in probe.complete(dataset, rows)]
    batch = probe.prompts(dataset, rows)
    assert batch.latent_columns != (0, 0)
    model = AutoModelForCausalLM.from_pretrained(exported)
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        custom_generate=str(exported),
        trust_remote_code=True,
    )
    new = output[:, batch.input_ids.shape[1] :].tolist()
    assert [row[: len(w)] for row, w in zip(new, wanted)] == wanted


@pytest.mark.parametrize("only_eval", [True, False], ids=["evaluated", "started from"])
def test_the_folder_is_loaded_here_with_its_markers(space, exported, only_eval):
    keys = ["name=again", "resume=1", f"only_eval={only_eval}", f"load_model_path={exported}"]
    inputs = gather_inputs(load_config(space.yaml(), *keys))
    assert inputs.marker_init_id is None
    state = build_model(inputs).base_causallm.state_dict()
    saved = load_file(exported / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())


# ------------------------------------------------------------------------------- coconut


class Ancestor(nn.Module):
    """The modules of facebookresearch/coconut's Coconut, by its names."""

    def __init__(self, base_causallm):
        super().__init__()
        self.base_causallm = base_causallm
        self.embedding = base_causallm.get_input_embeddings()


def made_checkpoint(space, family: str, dtype: torch.dtype, folder: Path) -> Path:
    """A checkpoint of a family, saved as a run saves it, in a model folder of its own."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(space.values["model_id"])
    base = tiny_model(family, dtype, seed=5)
    base.save_pretrained(folder / "hub")
    tokenizer.save_pretrained(folder / "hub")
    ids = add_latent_tokens(tokenizer)
    init_latent_rows(base, ids, tokenizer.convert_tokens_to_ids("<<"))
    with torch.no_grad():
        base.get_input_embeddings().weight[list(ids)] += torch.randn(3, 32, dtype=dtype)
    config = load_config(space.yaml(model_id=str(folder / "hub"), bf16=dtype is torch.bfloat16))
    model = Coconut(base, ids[1], ids[0], ids[2], tokenizer.eos_token_id)
    path = folder / "run" / "checkpoint_2"
    path.parent.mkdir()
    state = TrainState(data="rows", rows_per_step=4, global_step=5, samples_seen=20)
    save_checkpoint(path, model, tokenizer, build_optimizer(config, model), config, state)
    return path


@pytest.mark.parametrize(
    "family, dtype", [("qwen3", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)]
)
def test_the_ancestors_class_loads_its_file_strictly(space, tmp_path, family, dtype):
    """Its model is that of model_id with the vocabulary cut, or grown, to the tokenizer's."""
    path, file = made_checkpoint(space, family, dtype, tmp_path), tmp_path / "out" / "checkpoint_2"
    assert analysis.main(["export", str(path), str(file), "--format", "coconut"]) == 0
    state = torch.load(file, weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    tokenizer.add_tokens("<|start-latent|>")
    tokenizer.add_tokens("<|end-latent|>")
    tokenizer.add_tokens("<|latent|>")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    base.resize_token_embeddings(len(tokenizer))
    ancestor = Ancestor(base)
    assert len(state) == len(ancestor.state_dict())
    ancestor.load_state_dict(state, strict=True)

    ours = AutoModelForCausalLM.from_pretrained(path)
    for name, tensor in ours.state_dict().items():
        theirs = state[f"base_causallm.{name}"]
        assert torch.equal(theirs, tensor[: len(theirs)]), name
    assert len(state["embedding.weight"]) == len(tokenizer)
    tokens = torch.randint(0, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [model.eval()(tokens).logits for model in (ours, ancestor.base_causallm)]
    torch.testing.assert_close(logits[0][..., : len(tokenizer)], logits[1])
    # tensors with two names are in the file once
    distinct = {(t.data_ptr(), t.numel()): t.nbytes for t in state.values()}
    assert file.stat().st_size < sum(distinct.values()) + 60_000


def test_our_own_loader_reads_the_file_back_bit_for_bit(space, checkpoint, tmp_path):
    file = tmp_path / "checkpoint_2"
    assert analysis.main(["export", str(checkpoint), str(file), "--format", "coconut"]) == 0
    keys = ["name=again", "resume=2", "only_eval=True", f"load_model_path={file}"]
    inputs = gather_inputs(load_config(space.yaml(), *keys))
    assert inputs.marker_init_id is None
    state = build_model(inputs).base_causallm.state_dict()
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(state[name], tensor[: len(state[name])]), name


def test_a_cot_model_has_no_prefix_and_all_its_rows(space, tmp_path):
    """As the ancestor saves it: it adds no markers, and resizes nothing."""
    yaml_path = space.yaml(coconut=None, cot=True, name="cot", skip_validation=True)
    assert run.main([str(yaml_path), "num_epochs=1"]) == 0
    path, file = space.folder / "out" / "cot", tmp_path / "file"
    assert analysis.main(["export", str(path), str(file), "--format", "coconut"]) == 0
    base = AutoModelForCausalLM.from_pretrained(space.values["model_id"])
    base.load_state_dict(torch.load(file, weights_only=True), strict=True)
    saved = load_file(path / "checkpoint_1" / "model.safetensors")
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in saved.items())


def test_a_file_of_others_becomes_a_folder(space, checkpoint, tmp_path, caplog):
    """SIM-CoT's: half precision, a decoder beside it, the vocabulary of the tokenizer. The folder
    keeps the dtype."""
    file, folder = tmp_path / "checkpoint_28", tmp_path / "folder"
    assert analysis.main(["export", str(checkpoint), str(file), "--format", "coconut"]) == 0
    state = {name: tensor.half() for name, tensor in torch.load(file).items()}
    decoder = tiny_model("qwen3", torch.float16, seed=8).state_dict()
    torch.save(state | {f"expainable_llm.{n}": t for n, t in decoder.items()}, file)
    arguments = [str(space.yaml()), f"load_model_path={file}", "resume=2", str(folder)]
    assert analysis.main(["export", *arguments]) == 0
    words = f"{file}: {len(decoder)} tensors of an auxiliary decoder (expainable_llm.*) are left"
    assert words in caplog.text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"base_causallm.{name}"]), name
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    card = (folder / "README.md").read_text()
    assert "- epochs done: 2\n- stage: 1, with 2 latents\n" in card and "## Training" not in card
    assert "No evaluation was found" in card


# ------------------------------------------------------------------------------- the card


def front_matter(folder: Path) -> dict:
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_the_card_tells_method_data_and_figures(space, checkpoint, exported):
    card = (exported / "README.md").read_text()
    assert front_matter(exported) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["coconut"],
    }
    assert card.count("# exported\n") == 1 and 'folder = "exported"' in card
    assert "- training data: `train.json`, 24 rows\n- seen: 48 rows in " in card
    assert "`lr: 0.001`" in card and "epochs    stage  latent tokens  steps skipped\n1+ " in card
    assert str(space.folder) not in card.replace(space.values["model_id"], "")
    records = map(json.loads, (space.run_dir / "metrics.jsonl").read_text().splitlines())
    evaluations = {r["latents"]: r for r in records if r["kind"] == "eval" and r["epoch"] == 2}
    assert evaluations.keys() == {"0", "2"}
    assert "\n`val.json`, 6 rows:\n" in card and "The row with 0 latents is the control" in card
    for latents, r in evaluations.items():
        interval = f"{r['accuracy_low']:.1%} to {r['accuracy_high']:.1%}"
        assert f"\n| {latents} | {r['accuracy']:.1%} | {interval} | " in card


def test_a_model_of_the_hub_and_its_data_are_linked(space, checkpoint, tmp_path):
    """Also where the data cannot be counted."""
    copy = shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint_2")
    text = (copy / "config.yaml").read_text()
    text = text.replace(space.values["model_id"], "openai-community/gpt2")
    text = text.replace(space.values["train_path"], "whynlp/gsm8k-aug:train")
    (copy / "config.yaml").write_text(text)
    assert analysis.main(["export", str(copy), str(tmp_path / "out")]) == 0
    found = front_matter(tmp_path / "out")
    assert found["base_model"] == "openai-community/gpt2"
    assert found["datasets"] == ["whynlp/gsm8k-aug"]
    assert "- training data: `whynlp/gsm8k-aug:train`\n" in (tmp_path / "out/README.md").read_text()


def test_evaluations_of_the_checkpoint_are_added(space, checkpoint, tmp_path, capsys):
    """Those of another run are refused."""
    keys = [f"load_model_path={checkpoint}", "only_eval=True", "eval_num_latents=[1,3]"]
    assert run.main([str(space.yaml(name="sweep")), *keys, "train_path=null"]) == 0
    sweep = space.folder / "out" / "sweep"
    arguments = [str(checkpoint), str(tmp_path / "out"), "--evaluation", str(sweep)]
    assert analysis.main(["export", *arguments]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("| ")]
    assert rows == ["latents", "0", "1", "2", "3"]
    other, out = space.run_dir / "checkpoint_1", tmp_path / "other"
    line = error_of(capsys, other, out, "--evaluation", sweep)
    assert f"{sweep} holds no evaluation of {other}, but of {checkpoint.resolve()}" in line
    line = error_of(capsys, other, out, "--evaluation", tmp_path)
    assert "metrics.jsonl: cannot read" in line
    line = error_of(capsys, other, out, "--evaluation", space.run_dir)
    assert "only_eval makes one" in line
    weights = checkpoint / "model.safetensors"
    was = weights.stat().st_mtime_ns
    try:  # trained again, under the same name: the card had the figures of those before
        os.utime(weights, ns=(was, was + 10**12))
        line = error_of(capsys, checkpoint, out, "--evaluation", sweep)
    finally:
        os.utime(weights, ns=(was, was))
    assert f"the files of {checkpoint} are newer than its evaluation in {sweep}; evaluate" in line
    assert not out.exists()


def results_of(card: Path) -> dict[str, dict[str, str]]:
    """The tables of a card, by heading: accuracy by latents."""
    tables: dict[str, dict[str, str]] = {}
    for line in card.read_text().partition("## Results")[2].splitlines():
        if line.startswith("`"):
            tables[line.rstrip(":")] = found = {}
        elif line.startswith("| ") and not line.startswith("| latents"):
            cells = [cell.strip() for cell in line.split("|")]
            found[cells[1]] = cells[2]
    return tables


def test_a_card_has_the_figures_of_its_own_weights_on_each_data_set_apart(
    space, checkpoint, tmp_path
):
    """Another checkpoint, files of one name, a part of the rows and several sets, all evaluated
    in one run folder after the other."""
    for side, rows in (("x", tiny_rows(5, seed=8)), ("y", tiny_rows(4, seed=9))):
        (tmp_path / side).mkdir()
        (tmp_path / side / "test.json").write_text(json.dumps(rows))
    x, y = tmp_path / "x/test.json", tmp_path / "y/test.json"
    evaluation = ["only_eval=True", "train_path=null", "eval_num_latents=[0,2]"]
    start = [str(space.yaml(name="e")), *evaluation]
    other = space.run_dir / "checkpoint_1"
    one, two = "eval_num_latents=3", "eval_subset_size=2"
    assert run.main([*start, f"load_model_path={other}", f"val_path={x}", one]) == 0
    assert run.main([*start, f"load_model_path={checkpoint}", f"val_path={x}"]) == 0
    assert run.main([*start, f"load_model_path={checkpoint}", f"val_path={x}", two]) == 0
    sets = f"eval_sets={{hard: {y}}}"
    assert run.main([*start, f"load_model_path={checkpoint}", "val_path=null", sets]) == 0
    out = tmp_path / "out"
    arguments = ["export", str(checkpoint), str(out), "--evaluation", str(space.folder / "out/e")]
    assert analysis.main(arguments) == 0
    found = results_of(out / "README.md")
    own = "`val.json`, 6 rows"
    assert {name: set(rows) for name, rows in found.items() if name != own} == {
        "`x/test.json`, 5 rows": {"0", "2"},
        "`x/test.json`, 2 rows": {"0", "2"},
        "`y/test.json`, 4 rows": {"0", "2"},
    }
    assert own in found


def test_data_sets_are_called_by_what_tells_them_apart():
    names = ["a/x/test.json", "a/y/test.json", "x/test.json", "val.json", "./val.json", "o/n:test"]
    assert list(_short_names(names).values()) == [
        "a/x/test.json",
        "y/test.json",
        "x/test.json",
        "val.json",
        "val.json",
        "o/n:test",
    ]


# ------------------------------------------------------------------------------- output


def test_an_export_replaces_an_export_and_nothing_else(space, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    first = space.run_dir / "checkpoint_1"
    assert analysis.main(["export", str(first), str(out)]) == 0
    (out / "model-00002-of-00002.safetensors").write_bytes(b"of a larger model")
    assert analysis.main(["export", str(checkpoint), str(out)]) == 0
    assert "- epochs done: 2\n" in (out / "README.md").read_text()
    assert not (out / "model-00002-of-00002.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    assert f"{out} holds notes.txt" in error_of(capsys, first, out)
    assert "- epochs done: 2\n" in (out / "README.md").read_text()
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_a_link_leads_to_is_replaced_where_it_is(space, checkpoint, tmp_path):
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / "shared")
    for source, epochs in ((space.run_dir / "checkpoint_1", 1), (checkpoint, 2)):
        assert analysis.main(["export", str(source), str(out)]) == 0
        assert out.is_symlink() and f"- epochs done: {epochs}\n" in (out / "README.md").read_text()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["shared"]


def test_what_is_there_is_never_overwritten(space, checkpoint, tmp_path, capsys):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    before = files(space.run_dir)
    for output in (file, folder, space.run_dir, checkpoint, "."):
        assert f"{output} is there" in error_of(capsys, checkpoint, output)
        assert "is there" in error_of(capsys, checkpoint, output, "--format", "coconut")
    assert "not a folder" in error_of(capsys, checkpoint, file / "below")
    assert file.read_text() == "mine" and not list(folder.iterdir())
    assert files(space.run_dir) == before


def test_what_cannot_be_exported_is_one_line(space, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    copy = shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint_2")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("hidden_state", "pause"))
    line = error_of(capsys, copy, out, "--format", "coconut")
    assert "latent_input: pause" in line
    file = shutil.copy(checkpoint / "model.safetensors", tmp_path)
    forced = [space.yaml(), f"load_model_path={file}", "eval_num_latents=2"]
    assert "resume: " in (line := error_of(capsys, *forced, out)) and "set resume" in line
    (copy / "model.safetensors").unlink()
    assert "holds no weights" in error_of(capsys, copy, out)
    line = error_of(capsys, tmp_path / "nothing", out)
    assert f"{tmp_path / 'nothing'}: no such checkpoint" in line
    out.write_bytes(b"")
    line = error_of(capsys, checkpoint, out, "--format", "coconut")
    assert f"{out} is there; move it" in line
    out.unlink()
    assert not out.exists()


def test_a_full_disk_is_found_before_anything_is_written(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("analysis.export.free_bytes", lambda folder: 1000)
    assert "1,000 are free" in error_of(capsys, checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [200, 3000, 20_000])  # config.json, the tokenizer, the weights
@pytest.mark.parametrize("form", ["hf", "coconut"])
def test_a_disk_that_fills_meanwhile_is_one_line(checkpoint, tmp_path, capfd, form, most):
    """A limit of the files' size stands for it."""
    with files_of_at_most(most):
        code = analysis.main(["export", str(checkpoint), str(tmp_path / "out"), "--format", form])
    (line,) = capfd.readouterr().err.splitlines()
    assert code == 1 and "disk or a quota is full" in line
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- upload


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files talks to."""

    def answer(self, value: dict, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.headers["Authorization"] != "Bearer hf_right":
            self.answer({"error": "Invalid user token."}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "owner"})
        else:
            self.answer({"id": "owner/name", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer({"url": f"{constants.ENDPOINT}/owner/name"})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.received[line["value"]["path"]] = content
            url, commit = f"{constants.ENDPOINT}/owner/name/commit/{'1' * 40}", "1" * 40
            self.answer({"commitUrl": url, "commitOid": commit, "success": True})
        else:
            self.answer({"warnings": [], "errors": []})

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, and a token for it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.received, server.created = [], {}, None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with contextlib.closing(server.socket):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)  # the library's second choice
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        yield server
        server.shutdown()


def test_a_dry_run_lists_what_an_upload_then_sends(checkpoint, tmp_path, capsys, hub):
    out = tmp_path / "out"
    arguments = ["export", str(checkpoint), str(out), "--upload", "owner/name"]
    assert analysis.main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert hub.asked == [] and printed[-1].endswith("for owner/name; nothing is sent")
    listed = {}
    for line in printed[1:-1]:
        size, name = line.split()
        listed[name] = int(size.replace(",", ""))
    assert listed.keys() == files(out) and "custom_generate/generate.py" in listed

    assert analysis.main(arguments) == 0
    assert f"sent: {constants.ENDPOINT}/owner/name" in capsys.readouterr().out
    assert hub.created["name"] == "name" and hub.created["visibility"] == "private"
    assert {name: len(content) for name, content in hub.received.items()} == listed
    assert all((out / name).read_bytes() == content for name, content in hub.received.items())
    assert 'folder = "owner/name"' in hub.received["README.md"].decode()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--upload", "name"], "give OWNER/NAME"),
        (["--upload", "a/b/c"], "a/b/c"),
        (["--dry-run"], "give --upload OWNER/NAME"),
        (["--upload", "a/b", "--format", "coconut"], "sends a folder"),
    ],
)
def test_an_upload_that_makes_no_sense_is_refused(
    checkpoint, tmp_path, capsys, hub, arguments, words
):
    assert words in error_of(capsys, checkpoint, tmp_path / "out", *arguments)
    assert hub.asked == [] and not list(tmp_path.iterdir())


def test_without_token_network_or_leave_nothing_is_made(
    checkpoint, tmp_path, capsys, monkeypatch, hub
):
    arguments = [checkpoint, tmp_path / "out", "--upload", "owner/name"]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert constants.ENDPOINT in error_of(capsys, *arguments)
    assert hub.asked == ["/api/whoami-v2"]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert "no token" in error_of(capsys, *arguments)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in error_of(capsys, *arguments)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(capsys, *arguments)
    assert not (tmp_path / "out").exists()
