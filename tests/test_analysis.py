"""analysis/: questions, thoughts, paths, comparisons."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Workspace, tiny_rows
from numerics import assert_same, in_float64

import run
from analysis import __main__ as analysis
from analysis import ask, pictures, prosqa
from analysis.look import alike, look_into, replacements, thoughts
from analysis.output import write_json
from analysis.probe import Probe, load_probe, question_rows, read_config
from analysis.prosqa import PATH_CLASSES, classify, heights, next_concept
from dataset import IGNORED
from engine.stop import EXIT_STOPPED
from engine.text import DEFAULT
from preprocessing.prosqa import generate
from preprocessing.small_model import stories_tokenizer

# 0 -> 1 -> 2 -> 4, 1 -> 3 -> 2 (longer), 0 -> 5 (a leaf); 6 -> 7 is another root's
GRAPH = {
    "idx_to_symbol": list("01234567"),
    "root": 0,
    "target": 4,
    "neg_target": 7,
    "answer": "4",
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
    workspace.values |= dict(
        load_model_path=str(workspace.run_dir / "checkpoint_1"), num_epochs=1, batch_size_eval=4
    )
    return workspace


def call(workspace, command: str, *options, **changes) -> int:
    return analysis.main([command, str(workspace.yaml(**changes)), *map(str, options)])


@pytest.fixture
def float64():
    """What is compared token by token depends on no rounding."""
    with in_float64():
        yield


@pytest.fixture
def probe(trained, float64):
    return probe_of(trained)


def probe_of(trained, **changes) -> Probe:
    return load_probe(read_config(str(trained.yaml(**changes))))


# ------------------------------------------------------------------------------- ask


def test_typed_questions_are_answered(trained, capsys):
    assert call(trained, "ask", "--question", "How many plums?", "--question", "Tom has 2?") == 0
    out = capsys.readouterr().out
    assert out.count("<|start-latent|><|latent|><|latent|><|end-latent|>") == 2
    assert out.count("answer: ") == 2 and "How many plums?" in out and "Tom has 2?" in out


@pytest.mark.parametrize(
    "name, text, verdicts",
    [
        ("q.txt", "\ufeffHow many plums?\r\n\r\nTom has 2?\r\n", 0),
        ("q.json", json.dumps(tiny_rows(2)), 2),
        ("q.jsonl", "\n".join(map(json.dumps, tiny_rows(2))), 2),
    ],
)
def test_questions_of_a_file_are_answered(trained, tmp_path, capsys, name, text, verdicts):
    (tmp_path / name).write_bytes(text.encode())
    assert call(trained, "ask", "--latents", "3", "--file", tmp_path / name, "debug=True") == 0
    out = capsys.readouterr().out
    assert "\ufeff" not in out and "\r" not in out
    assert out.count("answer: ") == 2 and out.count("<|latent|>" * 3) == 2
    assert out.count("right)") + out.count("wrong, it is ") == verdicts


def test_rows_of_a_file_have_the_columns_of_the_config(trained, tmp_path, capsys):
    """The message named data_columns, which stood there; and of a config for several sets it was
    said that val_path stood beside them."""
    (tmp_path / "q.jsonl").write_text('{"q": "1 + 1?", "a": "2", "steps": []}\n')
    columns = "data_columns={question: q, answer: a}"
    sets = dict(val_path=None, eval_sets={"a": trained.values["val_path"]})
    assert call(trained, "ask", columns, "--file", tmp_path / "q.jsonl", **sets) == 0
    assert "(wrong, it is 2)" in (said := capsys.readouterr().out) or "(right)" in said


# ------------------------------------------------------------------------------- look


def naive_answer(probe, row: int, replaced: dict[int, torch.Tensor]) -> str | None:
    """Greedy, the whole sequence again for every latent and token, latents replaced."""
    base = probe.model.base_causallm
    embeds = base.get_input_embeddings()
    ids = probe.dataset(None).question(row).input_ids.tolist()
    inputs = embeds(torch.tensor(ids))
    latent = probe.inputs.latent_tokens.latent
    for k, at in enumerate(i for i, token in enumerate(ids) if token == latent):
        state = base.model(inputs_embeds=inputs[None, :at]).last_hidden_state[0, -1]
        inputs = torch.cat([inputs[:at], replaced.get(k, state)[None], inputs[at + 1 :]])
    new = []
    for _ in range(probe.config.max_new_tokens):
        token = int(base(inputs_embeds=inputs[None]).logits[0, -1].argmax())
        new.append(token)
        if token == probe.inputs.tokenizer.eos_token_id:
            break
        inputs = torch.cat([inputs, embeds(torch.tensor([token]))])
    return probe.text(new)


@torch.no_grad()
def test_replaced_latents_are_those_that_the_model_reads(probe):
    """Outputs with a latent replaced equal a re-run without cache and batch; in batches of two,
    the values of the second batch are its own."""
    config = dataclasses.replace(probe.config, batch_size_eval=2)
    probe = dataclasses.replace(probe, inputs=dataclasses.replace(probe.inputs, config=config))
    dataset, rows = probe.dataset(None), [0, 1, 2]
    states = thoughts(probe, dataset, rows)
    mean = probe.model.base_causallm.get_input_embeddings().weight.mean(0)
    plain = [probe.text(new) for new in probe.complete(dataset, rows)]
    assert plain == [naive_answer(probe, row, {}) for row in rows]
    wild = 10 * torch.randn(3, len(mean), generator=torch.Generator().manual_seed(0))
    for k in (0, 1):
        actual = replacements(states, k, mean)
        assert list(actual) == list(pictures.KINDS)
        actual["wild"] = k, wild  # the model hardly tells its own thoughts apart
        values = {
            "zero": [torch.zeros_like(mean)] * 3,
            "mean": [mean] * 3,
            "other": [states[1, k], states[2, k], states[0, k]],
            "wild": wild,
        }
        for kind, replaced in actual.items():
            texts = [probe.text(new) for new in probe.complete(dataset, rows, replaced)]
            assert texts == [naive_answer(probe, row, {k: values[kind][row]}) for row in rows]


@torch.no_grad()
def test_thoughts_are_the_definitions(probe):
    actual = look_into(probe, probe.dataset(None), [0, 3], top=3)
    base, tokenizer = probe.model.base_causallm, probe.inputs.tokenizer
    markers = set(probe.inputs.latent_tokens)
    embeddings = [
        row
        for token, row in enumerate(base.get_input_embeddings().weight)
        if token < len(tokenizer) and token not in markers
    ]
    norms = [float(row.norm()) for row in embeddings]
    assert actual["embedding_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    for entry in actual["rows"]:
        ids = probe.dataset(None).question(entry["row"]).input_ids.tolist()
        first = ids.index(probe.inputs.latent_tokens.latent)
        state = base.model(torch.tensor([ids[:first]])).last_hidden_state[0, -1]
        latent = entry["latents"][0]
        assert latent["norm"] == pytest.approx(float(state.norm()), rel=1e-4)
        best = base.lm_head(state).softmax(-1).sort(descending=True)
        assert [t["probability"] for t in latent["top"]] == pytest.approx(
            best.values[:3].tolist(), rel=1e-4
        )
        assert [t["token"] for t in latent["top"]] == [
            tokenizer.decode([token]) for token in best.indices[:3].tolist()
        ]
    for kind in pictures.KINDS:
        changed = [
            entry["latents"][1]["answer_without"][kind] != entry["answer"]
            for entry in actual["rows"]
        ]
        assert actual["latents"][1]["changed"][kind] == sum(changed) / 2


def test_look_writes_table_json_and_picture(trained, tmp_path, capsys):
    options = ("--rows", "0,2,4", "--top", "2", "--output_dir", tmp_path / "new" / "folder")
    assert call(trained, "look", *options) == 0
    assert "3 rows, accuracy" in (out := capsys.readouterr().out) and "latent 2" in out
    folder = tmp_path / "new" / "folder"
    assert len(json.loads((folder / "thoughts.json").read_text())["latents"]) == 2
    assert (folder / "thoughts.png").read_bytes().startswith(b"\x89PNG")
    assert call(trained, "look", "--rows", "1") == 0
    assert (trained.folder / "out" / "run-analysis" / "thoughts.json").exists()


@torch.no_grad()
def test_a_single_row_takes_thoughts_from_the_next_of_its_file(probe):
    dataset = probe.dataset(None)
    one, two = thoughts(probe, dataset, [5]), thoughts(probe, dataset, [5, 0])
    assert_same(one, two)
    k, values = replacements(one, 1, one[0, 0])["other"]
    (new,) = probe.complete(dataset, [5], (k, values))
    assert probe.text(new) == naive_answer(probe, 5, {1: two[1, 1]})


def test_look_takes_typed_questions(trained, tmp_path, capsys):
    """Nobody knows their answers: no accuracy."""
    questions = ("--question", "How many $ plums?", "--question", "Tom has 猫?")
    assert call(trained, "look", *questions, "--output_dir", tmp_path) == 0
    assert "2 rows, accuracy -," in (out := capsys.readouterr().out) and "gold" not in out
    actual = json.loads((tmp_path / "thoughts.json").read_text())
    assert [row["question"] for row in actual["rows"]] == ["How many $ plums?", "Tom has 猫?"]
    assert actual["accuracy"] is None and set(actual["latents"][0]["changed"]) == set(
        pictures.KINDS
    )


def test_answers_are_alike_as_numbers():
    assert (
        alike(DEFAULT, "1,800", "1800.0")
        and alike(DEFAULT, None, None)
        and alike(DEFAULT, "a", "a")
    )
    assert (
        not alike(DEFAULT, None, "1")
        and not alike(DEFAULT, "1", None)
        and not alike(DEFAULT, "1", "2")
    )


def test_bfloat16_computes_as_the_evaluation_does(trained, tmp_path):
    """float32 masters are cast for the computation, in run.py and here."""
    mixed = probe_of(trained, bf16=True, float32_master_weights=True)
    batch = mixed.prompts(mixed.dataset(None), [0])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted = mixed.model(
            batch.input_ids, batch.attention_mask, batch.position_ids, return_logits=True
        )
    actual = mixed.forward(batch, return_logits=True)
    assert actual.logits.dtype == torch.bfloat16 and torch.equal(actual.logits, wanted.logits)
    assert len(look_into(mixed, mixed.dataset(None), [0, 1], top=2)["rows"]) == 2


@pytest.mark.parametrize("command", ["look", "prosqa"])
def test_files_of_others_are_not_replaced(trained, tmp_path, capsys, command):
    name = {"look": "thoughts.png", "prosqa": "prosqa_tree_row_2.png"}[command]
    options = ["--top", "1"] if command == "look" else ["--latents", "0"]
    changes = {} if command == "look" else dict(val_path=str(trained.folder / "graphs.json"))
    call_again = lambda: call(trained, command, *options, "--output_dir", tmp_path, **changes)
    assert call_again() == 0 and call_again() == 0  # our own are
    (tmp_path / name).write_text("my thesis")
    capsys.readouterr()
    assert call_again() == 2
    assert f"{name} is not of analysis" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "my thesis"


# ------------------------------------------------------------------------------- ProsQA


def test_without_latents_a_path_starts_at_the_root():
    assert classify(GRAPH, "0 1\n1 2\n2 4\n### 4", 0) == "correct path"
    assert classify(GRAPH, "1 2\n2 4\n### 4", 0) == "hallucinated edge"


@pytest.mark.parametrize(
    "completion, wanted",
    [
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
    ],
)
def test_classes_of_outputs(completion, wanted):
    assert classify(GRAPH, completion, 1) == wanted


def test_every_class_is_tested():
    (mark,) = test_classes_of_outputs.pytestmark
    assert {wanted for _, wanted in mark.args[1]} == set(PATH_CLASSES)


def test_height_is_the_nearest_leaf():
    assert [heights(GRAPH["edges"], node) for node in range(8)] == [1, 2, 1, 2, 0, 0, 1, 0]


def naive_probability(probe, dataset, tokens: list[int]) -> float:
    """One more token at a time."""
    prompt, p = dataset.question(0), 1.0
    for t, token in enumerate(tokens):
        ids = torch.tensor([[*prompt.input_ids, *tokens[:t]]])
        output = probe.model(
            ids,
            torch.ones_like(ids),
            torch.arange(ids.shape[1])[None],
            torch.full_like(ids, IGNORED),
            return_logits=True,
        )
        p *= float(output.logits[0, -1].softmax(-1)[token])
    return p


@torch.no_grad()
@pytest.mark.parametrize("symbolic", [True, False])
def test_candidates_have_the_models_probabilities(trained, float64, tmp_path, symbolic):
    """The product over the tokens of the beginning of a step, each after the ones before."""
    graph = generate([1], seed=1, num_nodes=14, symbolic=symbolic)[0][0]
    (tmp_path / "graph.json").write_text(json.dumps([graph]))
    probe = probe_of(trained, val_path=str(tmp_path / "graph.json"))
    dataset, symbols, root = probe.dataset(1), graph["idx_to_symbol"], graph["root"]
    actual = next_concept(probe, dataset, 0, symbols)
    assert list(actual) == symbols and 0 < sum(actual.values()) <= 1
    tokens = {}
    for name in symbols:
        text = name if symbolic or name[0].isupper() else f"Every {name}"
        tokens[name] = probe.inputs.tokenizer(text, add_special_tokens=False)["input_ids"]
    for name in (symbols[root], *sorted(symbols)[-2:]):  # lower case stands last
        longer = [t for t in tokens.values() if t[: len(tokens[name])] == tokens[name]]
        p = naive_probability(probe, dataset, tokens[name])
        p -= sum(naive_probability(probe, dataset, t) for t in longer if t != tokens[name])
        assert actual[name] == pytest.approx(p, rel=1e-3, abs=0)
    tree = prosqa.search_tree(probe, {1: dataset}, 0, graph)
    target = next(node for node in tree["nodes"] if node["name"] == tree["target"])
    assert target["to_target"] == 0 and tree["root"] == symbols[root]
    total = sum(tree["after"]["1"].values()) + tree["not_reached"]["1"] + tree["no_concept"]["1"]
    assert total == pytest.approx(1)


@torch.no_grad()
def test_what_goes_on_to_a_longer_name_counts_once(probe):
    """A tokenizer of digits: 1 begins 12, which begins 123; their probabilities once summed up to
    more than what the model gives to the first digit."""
    dataset, encode = probe.dataset(1), probe.inputs.tokenizer.encode
    names = ["1", "12", "123", "7"]
    ids = [encode(name, add_special_tokens=False) for name in names]
    assert ids[2][: len(ids[1])] == ids[1] and ids[1][: len(ids[0])] == ids[0]
    actual = next_concept(probe, dataset, 0, names)
    total = sum(naive_probability(probe, dataset, ids[place]) for place in (0, 3))
    assert sum(actual.values()) == pytest.approx(total, rel=1e-3)


def test_prosqa_writes_tables_json_and_pictures(trained, tmp_path, capsys):
    keys = dict(val_path=str(trained.folder / "graphs.json"))
    options = ("--latents", "0,3", "--rows", "1", "--output_dir", tmp_path)
    assert call(trained, "prosqa", *options, **keys) == 0
    out = capsys.readouterr().out
    assert "6 rows" in out and "k=3" in out and "row 1: root" in out
    actual = json.loads((tmp_path / "prosqa.json").read_text())
    assert list(actual["shares"]) == ["0", "3"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in actual["shares"].values())
    for name in ("prosqa_paths.png", "prosqa_tree_row_1.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_model_without_latents_may_leave_out_the_steps_that_it_was_trained_without(
    model_folder, tmp_path
):
    """Every path of such a model was taken to be made up, as none begins at the root."""
    workspace = Workspace(model_folder, tmp_path)
    rows = generate([4], num_nodes=8, min_hops=2, max_hops=3, symbolic=True)[0]
    (tmp_path / "graphs.json").write_text(json.dumps(rows))
    workspace.values |= dict(val_path=str(tmp_path / "graphs.json"))
    keys = dict(no_thoughts=True, num_epochs=1, skip_validation=True, batch_size_training=12)
    assert run.main([str(workspace.yaml(**keys))]) == 0
    probe = load_probe(read_config(str(workspace.run_dir), f"val_path={tmp_path}/graphs.json"))
    dataset = probe.dataset(0)
    assert set(dataset.num_skipped) == {1} and not dataset.num_latents.any()
    gold = lambda row: "\n".join([*row["steps"][1:], f"### {row['answer']}"])
    written = [probe.inputs.tokenizer(gold(row))["input_ids"] for row in rows]
    spoken = SimpleNamespace(
        config=probe.config,
        complete=lambda dataset, rows: [written[row] for row in rows],
        text=probe.text,
        text_format=probe.text_format,
    )
    shares, accuracy = prosqa.judge_paths(spoken, dataset, rows)
    assert shares["correct path"] == 1 == accuracy


def test_what_was_found_of_another_checkpoint_is_kept(tmp_path, capsys):
    path = tmp_path / "faithful.json"
    for checkpoint in ("a", "a", "b", "c"):
        write_json(path, {"checkpoint": checkpoint})
    found = {p.name: json.loads(p.read_text())["checkpoint"] for p in tmp_path.iterdir()}
    assert found == {
        "faithful.json": "c",
        "faithful.before_1.json": "a",
        "faithful.before_2.json": "b",
    }
    assert "faithful.json: was of a, now faithful.before_1.json" in capsys.readouterr().out


# ------------------------------------------------------------------------------- compare, errors


def test_compare_prints_one_line(tmp_path, capsys):
    for name, right in (("a", "1110"), ("b", "1000")):
        lines = [
            json.dumps({"row": i, "question": "q", "gold_answer": "1", "correct": c == "1"})
            for i, c in enumerate(right)
        ]
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
    "marker in a question": ("ask", ["--question", "a <|latent|>"], {}, "--question: row 0: "),
    "negative force": ("ask", ["--question", "x", "--latents", "-1"], {}, "eval_num_latents: -1"),
    "latents by the chain": (
        "ask",
        ["--question", "x"],
        dict(pad_latent_to_max=False),
        "pad_latent_to_max: False",
    ),
    "blank question": ("look", ["--question", " "], {}, "no question"),
    "output on a file": ("look", ["--output_dir", analysis.__file__], {}, "is not a folder"),
    "output in a file": (
        "prosqa",
        ["--output_dir", analysis.__file__ + "/x"],
        "graphs",
        "is not a folder",
    ),
    "no rows": (
        "look",
        [],
        lambda trained: dict(val_path=None, eval_sets={"a": trained.values["val_path"]}),
        "val_path: there are no rows",
    ),
    "no such graphs": ("prosqa", [], dict(val_path="nowhere.json"), "nowhere.json"),
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
    assert (
        run.main(
            [
                str(
                    trained.yaml(
                        name="pauses",
                        latent_input="pause",
                        load_model_path=None,
                        skip_validation=True,
                    )
                )
            ]
        )
        == 0
    )
    path = trained.folder / "out" / "pauses" / "checkpoint_1"
    assert call(trained, "look", latent_input="pause", load_model_path=str(path)) == 2
    assert "look: nothing is fed back here" in capsys.readouterr().err


# ------------------------------------------------------------------------------- command line


def test_a_checkpoint_or_a_run_folder_alone_will_do(trained, capsys):
    """Its config.yaml says the rest; so no YAML of the training is needed."""
    for folder in (trained.run_dir, trained.run_dir / "checkpoint_1"):
        assert analysis.main(["ask", str(folder), "--question", "Why?", "max_new_tokens=2"]) == 0
        assert capsys.readouterr().out.startswith("2 latents\nWhy?\n<|start-latent|><|latent|>")
    assert analysis.main(["look", str(trained.run_dir), "--rows", "0"]) == 0
    assert "run-analysis/thoughts.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("out/run/checkpoint_9", "checkpoint_9: no such checkpoint, run folder or YAML file"),
        (".", "holds no checkpoint_N, and is none"),
        ("out/run/checkpoint_1/model.safetensors", "is a file of weights; give the folder"),
    ],
)
def test_a_path_that_names_no_checkpoint_is_said_to(trained, capsys, argument, words):
    """It was said to be no KEY=VALUE, a directory, or no UTF-8."""
    path = trained.folder / argument
    assert analysis.main(["ask", str(path), "--question", "Why?"]) == 2
    assert words in capsys.readouterr().err


def test_a_reader_that_has_enough_and_a_signal_are_no_tracebacks(trained):
    """As `| head -1` and Ctrl-C: another command reads on, or the same is typed again."""
    arguments = ["ask", str(trained.run_dir), "--question", "Why?", "max_new_tokens=2"]
    command = [sys.executable, "-m", "analysis", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.ask, "run", interrupted)
        assert analysis.main(arguments) == EXIT_STOPPED


def test_ask_tells_what_the_model_never_saw(trained, capsys):
    """More latents than it was trained with, and words that its tokenizer does not know."""
    probe = probe_of(trained)
    ask.warn_of_latents(probe, 2)
    ask.warn_of_latents(probe, None)
    assert capsys.readouterr().out == ""
    ask.warn_of_latents(probe, 3)
    assert "3 latents, but this checkpoint was trained with 2 at most" in capsys.readouterr().out
    ask.warn_of_words(probe.with_rows(question_rows(["Tom has 猫 and 2 figs?"])))
    assert capsys.readouterr().out == ""  # it knows all bytes
    inputs = dataclasses.replace(probe.inputs, tokenizer=stories_tokenizer(10, 64))
    known = "Mia has 5 of 10 plums, Ben the rest. She wins 3. How many has she?"
    for question, note in ((known, ""), (known.replace("plums", "pears"), "know pears\n\n")):
        asked = dataclasses.replace(probe, inputs=inputs).with_rows(question_rows([question]))
        ask.warn_of_words(asked)
        out = capsys.readouterr().out
        assert out == (note and f"note: this model's tokenizer does not {note}")
