"""analysis.py, graphs.py, pictures.py: questions, thoughts, ProsQA's paths, comparisons."""

import json

import pytest
import torch
from conftest import Workspace, tiny_rows

import analysis
import run
from dataset import IGNORED
from graphs import PATH_CLASSES, classify, heights, next_concept
from preprocessing.prosqa import generate

# 0 -> 1 -> 2 -> 4, 1 -> 3 -> 2 (longer), 0 -> 5 (a leaf); 6 -> 7 is another root's
GRAPH = {
    "idx_to_symbol": list("01234567"), "root": 0, "target": 4, "neg_target": 7, "answer": "4",
    "edges": [[0, 1], [1, 2], [2, 4], [1, 3], [3, 2], [0, 5], [6, 7]],
}


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory) -> Workspace:
    """A coconut run of one epoch in stage 1: two latents."""
    workspace = Workspace(model_folder, tmp_path_factory.mktemp("trained"))
    path = workspace.yaml(num_epochs=1, skip_validation=True, batch_size_training=12)
    assert run.main([str(path)]) == 0
    rows = generate([6], num_nodes=8, min_hops=2, max_hops=3, symbolic=True)[0]
    (workspace.folder / "graphs.json").write_text(json.dumps(rows))
    workspace.values |= dict(load_model_path=str(workspace.run_dir / "checkpoint_1"),
                             num_epochs=1, batch_size_eval=4)
    return workspace


def call(workspace, command: str, *options, **changes) -> int:
    return analysis.main([command, str(workspace.yaml(**changes)), *map(str, options)])


@pytest.fixture(scope="module")
def subject(trained, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return analysis.load_subject(str(trained.yaml()), [], str(cache))


# ------------------------------------------------------------------------------- ask


def test_typed_questions_are_answered(trained, capsys):
    assert call(trained, "ask", "--question", "How many plums?", "--question", "Tom has 2?") == 0
    out = capsys.readouterr().out
    assert out.count("<|start-latent|><|latent|><|latent|><|end-latent|>") == 2
    assert out.count("answer: ") == 2 and "How many plums?" in out and "Tom has 2?" in out


@pytest.mark.parametrize("name, text", [
    ("q.txt", "How many plums?\n\nTom has 2?\n"), ("q.json", json.dumps(tiny_rows(2))),
])
def test_questions_of_a_file_are_answered(trained, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    assert call(trained, "ask", "eval_num_latents=3", "--file", tmp_path / name) == 0
    out = capsys.readouterr().out
    assert out.count("answer: ") == 2 and out.count("<|latent|>" * 3) == 2


# ------------------------------------------------------------------------------- look


def naive_answer(subject, row: int, replaced: dict[int, torch.Tensor]) -> str | None:
    """Greedy, the whole sequence again for every latent and token, latents replaced."""
    base = subject.model.base_causallm
    embeds = base.get_input_embeddings()
    ids = subject.dataset(None).question(row).input_ids.tolist()
    inputs = embeds(torch.tensor(ids))
    latent = subject.inputs.tokens.latent
    for k, at in enumerate(i for i, token in enumerate(ids) if token == latent):
        state = base.model(inputs_embeds=inputs[None, :at]).last_hidden_state[0, -1]
        inputs = torch.cat([inputs[:at], replaced.get(k, state)[None], inputs[at + 1 :]])
    new = []
    for _ in range(subject.config.max_new_tokens):
        token = int(base(inputs_embeds=inputs[None]).logits[0, -1].argmax())
        new.append(token)
        if token == subject.inputs.tokenizer.eos_token_id:
            break
        inputs = torch.cat([inputs, embeds(torch.tensor([token]))])
    return subject.text(new)


@torch.no_grad()
def test_replaced_latents_are_those_that_the_model_reads(subject):
    """Outputs with a latent replaced equal a re-run without cache and batch."""
    dataset, rows = subject.dataset(None), [0, 1, 2]
    batch = subject.prompts(dataset, rows)
    states = subject.model(batch["input_ids"], batch["attention_mask"], batch["position_ids"],
                           latent_columns=batch["latent_columns"]).latents
    mean = subject.model.base_causallm.get_input_embeddings().weight.mean(0)
    plain = [subject.text(new) for new in subject.complete(dataset, rows)]
    assert plain == [naive_answer(subject, row, {}) for row in rows]
    for k in (0, 1):
        found = analysis.edits(states, k, mean)
        assert list(found) == list(analysis.KINDS)
        values = {"zero": [torch.zeros_like(mean)] * 3, "mean": [mean] * 3,
                  "other": [states[1, k], states[2, k], states[0, k]]}
        for kind, edit in found.items():
            texts = [subject.text(new) for new in subject.complete(dataset, rows, edit)]
            assert texts == [naive_answer(subject, row, {k: values[kind][row]}) for row in rows]


@torch.no_grad()
def test_thoughts_are_the_definitions(subject):
    found = analysis.look_into(subject, subject.dataset(None), [0, 3], top=3)
    base, tokenizer = subject.model.base_causallm, subject.inputs.tokenizer
    embeddings = base.get_input_embeddings().weight[: len(tokenizer)]
    norms = [float(row.norm()) for row in embeddings]
    assert found["embedding_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    for entry in found["rows"]:
        ids = subject.dataset(None).question(entry["row"]).input_ids.tolist()
        first = ids.index(subject.inputs.tokens.latent)
        state = base.model(torch.tensor([ids[:first]])).last_hidden_state[0, -1]
        latent = entry["latents"][0]
        assert latent["norm"] == pytest.approx(float(state.norm()), rel=1e-4)
        best = base.lm_head(state).softmax(-1).sort(descending=True)
        assert [t["probability"] for t in latent["top"]] == pytest.approx(
            best.values[:3].tolist(), rel=1e-4)
        assert [t["token"] for t in latent["top"]] == [
            tokenizer.decode([token]) for token in best.indices[:3].tolist()]
    for kind in analysis.KINDS:
        changed = [entry["latents"][1]["answer_without"][kind] != entry["answer"]
                   for entry in found["rows"]]
        assert found["latents"][1]["changed"][kind] == sum(changed) / 2


def test_look_writes_table_json_and_picture(trained, tmp_path, capsys):
    options = ("--rows", "0,2,4", "--top", "2", "--output_dir", tmp_path / "new" / "folder")
    assert call(trained, "look", *options) == 0
    assert "3 rows, accuracy" in (out := capsys.readouterr().out) and "latent 2" in out
    folder = tmp_path / "new" / "folder"
    assert len(json.loads((folder / "thoughts.json").read_text())["latents"]) == 2
    assert (folder / "thoughts.png").read_bytes().startswith(b"\x89PNG")
    assert call(trained, "look", "--rows", "1") == 0  # alone: nothing to take from another row
    assert (trained.folder / "out" / "run-analysis" / "thoughts.json").exists()


# ------------------------------------------------------------------------------- ProsQA


@pytest.mark.parametrize("completion, wanted", [
    ("0 1\n1 2\n2 4\n### 4", "correct path"),
    ("1 2\n2 4\n### 4", "correct path"),
    ("0 1\n1 3\n3 2\n2 4\n### 4", "longer path"),
    ("3 2\n2 4\n### 4", "longer path"),
    ("0 1\n1 4\n### 4", "hallucinated edge"),
    ("0 1\n2 4\n### 4", "hallucinated edge"),
    ("6 7\n### 7", "hallucinated edge"),
    ("0 5\n### 4", "wrong target"),
    ("0 1\n1 2\n### 4", "wrong target"),
    ("### 4", "correct label only"),
    ("### 7", "incorrect label only"),
    ("", "incorrect label only"),
])
def test_classes_of_outputs(completion, wanted):
    assert classify(GRAPH, completion) == wanted


def test_every_class_is_tested():
    (mark,) = test_classes_of_outputs.pytestmark
    assert {wanted for _, wanted in mark.args[1]} == set(PATH_CLASSES)


def test_height_is_the_nearest_leaf():
    assert [heights(GRAPH["edges"], node) for node in range(8)] == [1, 2, 1, 2, 0, 0, 1, 0]


@torch.no_grad()
def test_candidates_have_the_models_probabilities(trained, tmp_path):
    """A name of several tokens: the product, each token after the ones before."""
    subject = analysis.load_subject(
        str(trained.yaml(val_path=str(trained.folder / "graphs.json"))), [], str(tmp_path))
    dataset = subject.dataset(1)
    found = analysis.search_tree(subject, {1: dataset}, 0, subject.inputs.val_rows[0])
    encode = lambda text: subject.inputs.tokenizer(text, add_special_tokens=False)["input_ids"]
    names = [node["name"] for node in found["nodes"]]
    assert set(found["after"]["1"]) == set(names) and found["root"] in names
    for name in (names[0], "7 1", "plums"):
        lead = encode("Every") if name == "plums" else []
        tokens = encode("Every plums") if lead else encode(name)
        p = 1.0
        prompt = dataset.question(0)
        for t in range(len(lead), len(tokens)):
            ids = torch.tensor([[*prompt.input_ids, *tokens[:t]]])
            output = subject.model(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None],
                                   torch.full_like(ids, IGNORED), return_logits=True)
            p *= float(output.logits[0, -1].softmax(-1)[tokens[t]])
        given = next_concept(subject, dataset, 0, [name])[name]
        assert given == pytest.approx(p, rel=1e-3)


def test_prosqa_writes_tables_json_and_pictures(trained, tmp_path, capsys):
    keys = dict(val_path=str(trained.folder / "graphs.json"))
    options = ("--latents", "0,3", "--rows", "1", "--output_dir", tmp_path)
    assert call(trained, "prosqa", *options, **keys) == 0
    out = capsys.readouterr().out
    assert "6 rows" in out and "k=3" in out and "row 1: root" in out
    found = json.loads((tmp_path / "prosqa.json").read_text())
    assert list(found["shares"]) == ["0", "3"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found["shares"].values())
    for name in ("prosqa_paths.png", "prosqa_tree.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------- compare, errors


def test_compare_prints_one_line(tmp_path, capsys):
    for name, right in (("a", "1110"), ("b", "1000")):
        lines = [json.dumps({"row": i, "question": "q", "gold_answer": "1", "correct": c == "1"})
                 for i, c in enumerate(right)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    assert analysis.main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    assert "4 rows: both right 1, only the first 2, only the second 0" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text(lines[0] + "\n")
    assert analysis.main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 2
    assert "4 and 1 rows" in capsys.readouterr().err


def contradictory(trained) -> dict:
    rows = json.loads((trained.folder / "graphs.json").read_text())
    rows[2]["target"], rows[2]["neg_target"] = rows[2]["neg_target"], rows[2]["target"]
    path = trained.folder / "bad_graphs.json"
    path.write_text(json.dumps(rows))
    return dict(val_path=str(path))


BAD_INPUT = {
    "no question": ("ask", [], {}, "no question"),
    "no such file": ("ask", ["--file", "nowhere.txt"], {}, "cannot read nowhere.txt"),
    "no checkpoint": ("look", [], dict(load_model_path=None), "load_model_path"),
    "rows beyond": ("look", ["--rows", "0,6"], {}, "no row 6 among the 6"),
    "rows of words": ("look", ["--rows", "a"], {}, "--rows: 'a' is not a list"),
    "no latents": ("look", ["eval_num_latents=0"], {}, "look: the rows have [0] latents"),
    "several numbers": ("look", ["eval_num_latents=all"], {}, "one number of latents"),
    "latents below 0": ("prosqa", ["--latents=-1"], "graphs", "--latents: '-1' is not a list"),
    "latents beyond": ("prosqa", ["--latents", "600"], "graphs", "above the 512 positions"),
    "forced beyond": ("ask", ["--question", "x", "eval_num_latents=600"], {}, "512 positions"),
    "rows without graphs": ("prosqa", [], {}, "row 0: idx_to_symbol"),
    "contradictory row": ("prosqa", [], contradictory, "row 2: target: "),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(trained, capsys, name):
    command, options, changes, wanted = BAD_INPUT[name]
    if changes == "graphs":
        changes = dict(val_path=str(trained.folder / "graphs.json"))
    changes = changes(trained) if callable(changes) else changes
    before = set(trained.folder.rglob("*"))
    assert call(trained, command, *options, **changes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("error: ") and wanted in line for line in lines)
    assert set(trained.folder.rglob("*")) == before


def test_pauses_hold_no_thoughts(trained, tmp_path, capsys):
    assert run.main([str(trained.yaml(name="pauses", latent_input="pause", load_model_path=None,
                                      skip_validation=True))]) == 0
    path = trained.folder / "out" / "pauses" / "checkpoint_1"
    assert call(trained, "look", latent_input="pause", load_model_path=str(path)) == 2
    assert "look: nothing is fed back here" in capsys.readouterr().err
