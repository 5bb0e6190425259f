"""analysis/report.py: the data of the page, and the page in a real browser."""

import json
import re
import statistics

import pytest
from browser import Browser, find_browser
from test_curve import RECORDS, evaluation, training

import run
from analysis import __main__ as analysis
from analysis.report import PAGE, PLACE, gather, page, read_thoughts
from engine.curve import MARK
from utils import UserError

HOSTILE = (
    '<script>window.x=1</script><img src=x onerror="window.x=1"></script><!--\u2028\u2029\ud800'
)


def result(row: int, correct: bool, *, epoch: int = 3, stage: int = 1, latents: int = 2, **more):
    """A line of results; its output begins with the question, as engine/evaluation.py has it."""
    question = more.pop("question", f"How many plums are {row} plums?")
    said = more.pop("said", f"<|start-latent|>{'<|latent|>' * latents}<|end-latent|>### {row}")
    return {
        "epoch": epoch,
        "stage": stage,
        "row": row,
        "num_latents": latents,
        "question": question,
        "gold_steps": [f"<<{row}+0={row}>>"],
        "gold_answer": f"{row}",
        "output": f"{question}\n{said}",
        "steps": [],
        "answer": f"{row}" if correct else None,
        "correct": correct,
        "cot_match": None,
        "new_tokens": latents + 2,
        **more,
    }


def write_run(folder, results: dict[str, list[dict]], records=RECORDS, **config):
    """A run folder with these results files."""
    folder.mkdir(parents=True)
    lines = lambda objects: "".join(json.dumps(o) + "\n" for o in objects)
    (folder / "metrics.jsonl").write_text(lines(records))
    config = {"name": "x", "save_path": "out", "model_id": "m", "coconut": True, **config}
    (folder / "config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in config.items()))
    for name, rows in results.items():
        (folder / f"results_epoch_{name}.jsonl").write_text(lines(rows))
    return folder


def verdicts(text: str, **more) -> list[dict]:
    """Results with a right row for every 1."""
    return [result(row, mark == "1", **more) for row, mark in enumerate(text)]


@pytest.fixture
def runs(tmp_path):
    """Two runs of six rows that disagree on three of them."""
    first = {
        "1": verdicts("111100", epoch=1, stage=0, latents=0),
        "3": verdicts("111000"),
        "3_latents_0": verdicts("100000", latents=0),
    }
    a = write_run(tmp_path / "a", first, lr=0.001)
    b = write_run(tmp_path / "b", {"3": verdicts("110110")}, RECORDS[:-1], lr=0.002)
    return [a, b]


# ------------------------------------------------------------------------------- the data


def test_the_report_holds_what_the_folders_hold(runs):
    report = gather(runs)
    a, b = report["runs"]
    assert (a["name"], b["name"]) == ("a", "b") and a["colour"] != b["colour"]
    assert a["accuracy"] == [[1, 0.4, 0.5, 0.6], [2, 0.65, 0.75, 0.85], [3, 0.65, 0.75, 0.85]]
    assert a["validation"] == [(1, 2.5), (2, 1.5), (3, 1.25)] and len(a["losses"]) == 5
    assert a["spans"] == [(0, 1, 1), (1, 2, 3)] and a["without"] == [(3, 0.25)] and a["best"] == 2
    forced = [(f["epoch"], f["forced_latents"], f["accuracy"]) for f in a["figures"]]
    assert forced == [(1, None, 0.5), (2, None, 0.75), (3, None, 0.75), (3, 0, 0.25)]
    assert report["config"] == {
        "different": [["lr", ["0.001", "0.002"]]],
        "alike": [["coconut", ["True"]], ["model_id", ["m"]]],
    }
    names = ("run", "epoch", "stage", "eval_set", "forced_latents")
    named = [tuple(e[name] for name in names) for e in report["evaluations"]]
    assert named == [
        (0, 1, 0, None, None),
        (0, 3, 1, None, None),
        (0, 3, 1, None, 0),
        (1, 3, 1, None, None),
    ]
    assert len(report["questions"]) == 6  # told once
    assert report["questions"][2] == (2, "How many plums are 2 plums?", "2", ("<<2+0=2>>",))
    said = "<|start-latent|><|latent|><|latent|><|end-latent|>### 2"
    assert report["evaluations"][1]["rows"][2] == [2, 2, "2", 1, 4, said]


def test_rows_that_the_run_has_no_record_of_are_left_out(tmp_path):
    """Of a rehearsal, or of epochs after the checkpoint that the run went on from."""
    results = {str(epoch): verdicts("10", epoch=epoch) for epoch in (2, 3, 20)}
    results["2_latents_0"] = verdicts("00")
    folder = write_run(tmp_path / "run", results, [evaluation(2, 0.5), evaluation(3, 0.5)])
    found = gather([folder])["evaluations"]
    assert [(e["epoch"], e["forced_latents"]) for e in found] == [(2, None), (3, None)]


def test_of_two_evaluations_of_an_epoch_the_later_counts(tmp_path):
    """An evaluation that is repeated appends to metrics.jsonl and replaces its rows."""
    records = [evaluation(2, 0.5, loss="nan"), evaluation(2, 0.75, loss=1.0), evaluation(1, 0.25)]
    folder = write_run(tmp_path / "run", {}, records)
    (described,) = gather([folder])["runs"]
    assert [(f["epoch"], f["accuracy"]) for f in described["figures"]] == [(1, 0.25), (2, 0.75)]


def test_a_loss_that_is_not_finite_is_left_out(tmp_path):
    records = [training(1, 1, "inf"), training(1, 2, 2.0), evaluation(1, 0.5, loss="nan")]
    report = gather([write_run(tmp_path / "run", {}, records)])
    assert report["runs"][0]["losses"] == [[1.0, 2.0]] and report["runs"][0]["validation"] == []
    page(report)  # which takes no nan


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / side / "run", {}) for side in ("x", "y")]
    assert [r["name"] for r in gather(folders)["runs"]] == [str(folder) for folder in folders]


TOP = {"token": "7", "probability": 0.5}  # as Probe.nearest_tokens has it


def thoughts(path: str, rows: list[dict]) -> str:
    """What `analysis look` writes of these rows."""
    latent = {"norm": 1.5, "top": [TOP], "answer_without": {"zero": "1", "mean": None}}
    keys = ("row", "question", "gold_answer", "answer")
    told = [{**{key: row[key] for key in keys}, "latents": [latent] * 2} for row in rows]
    return json.dumps({"checkpoint": path, "rows": told})


def test_thoughts_belong_to_an_epoch_and_a_number_of_latents(runs, tmp_path):
    (tmp_path / "a-analysis").mkdir()
    text = thoughts("out/a/checkpoint_3", verdicts("11"))
    (tmp_path / "a-analysis" / "thoughts.json").write_text(text)
    names = ("run", "epoch", "forced_latents")
    by_name = {tuple(e[n] for n in names): e["rows"] for e in gather(runs)["evaluations"]}
    having = {name: [len(row) > 6 for row in rows] for name, rows in by_name.items()}
    none = [False] * 6
    assert having.pop((0, 3, None)) == [True, True, False, False, False, False]
    assert all(seen == none for seen in having.values())
    assert by_name[0, 3, None][0][6][1]["top"] == [TOP]
    retrained = thoughts("out/a/checkpoint_3", verdicts("01"))  # of a run that answered otherwise
    (tmp_path / "a-analysis" / "thoughts.json").write_text(retrained)
    rows = next(e["rows"] for e in gather(runs)["evaluations"] if e["epoch"] == 3)
    assert [len(row) > 6 for row in rows] == [False, True, False, False, False, False]
    (runs[0] / "thoughts.json").write_text(text.replace("checkpoint_3", "checkpoint_3_step_7"))
    (tmp_path / "a-analysis" / "thoughts.json").unlink()
    assert all(len(row) == 6 for e in gather(runs)["evaluations"] for row in e["rows"])


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])


def test_no_text_ends_the_script_that_holds_it(tmp_path):
    rows = [result(0, True, question=HOSTILE, said=HOSTILE, answer=HOSTILE)]
    report = gather([write_run(tmp_path / "<img src=x>", {"3": rows})])
    text = page(report)
    assert data_of(text) == json.loads(json.dumps(report))
    assert data_of(text)["questions"][0][1] == HOSTILE
    template = PAGE.read_text(encoding="utf-8")
    for end in ("</script", "<!--", "<script", "<img"):
        assert text.count(end) == template.count(end)
    before, after = template.split(PLACE)  # stands there once
    assert text[len(before) : len(text) - len(after)].isascii()


def test_the_page_asks_nobody_for_anything():
    template = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"\w+://[^\"'\s]*", template) == ["http://www.w3.org/2000/svg"]  # a name
    assert "default-src 'none'" in template and "innerHTML" not in template
    assert max(map(len, template.splitlines())) <= 140


# ------------------------------------------------------------------------------- the command


def test_the_report_of_a_run_stands_in_its_folder(workspace, capsys):
    """Trained and evaluated for real; written again, but never over somebody's own file."""
    assert run.main([str(workspace.yaml(num_epochs=2, max_new_tokens=1))]) == 0
    path = workspace.run_dir / "report.html"
    for _ in range(2):
        assert analysis.main(["report", str(workspace.run_dir)]) == 0
        assert f"written: {path}" in capsys.readouterr().out
    data = data_of(path.read_text(encoding="utf-8"))
    numbers = [(e["epoch"], e["forced_latents"], len(e["rows"])) for e in data["evaluations"]]
    assert numbers == [(1, None, 6), (2, None, 6), (2, 0, 6)]
    assert len(data["runs"][0]["figures"]) == 3 and MARK in path.read_text(encoding="utf-8")
    assert not list(workspace.run_dir.glob("events.*"))  # which nobody asked for
    path.write_text("somebody's own")
    assert analysis.main(["report", str(workspace.run_dir)]) == 2
    assert "is not of analysis" in capsys.readouterr().err
    assert path.read_text() == "somebody's own"


def test_an_evaluation_on_several_sets_is_shown_by_set(workspace):
    assert run.main([str(workspace.yaml(num_epochs=2, max_new_tokens=1))]) == 0
    sets = {"b_set": workspace.values["val_path"], "a": workspace.values["train_path"]}
    changes = dict(only_eval=True, val_path=None, eval_sets=sets, eval_num_latents=[0, 4])
    path = str(workspace.run_dir / "checkpoint_2")
    config = workspace.yaml(name="sets", load_model_path=path, eval_subset_size=3, **changes)
    assert run.main([str(config), "max_new_tokens=1"]) == 0
    report = gather([workspace.run_dir.with_name("sets")])
    expected = [("a", 2, 0), ("a", 2, 4), ("b_set", 2, 0), ("b_set", 2, 4)]
    names = ("eval_set", "epoch", "forced_latents")
    assert [tuple(f[name] for name in names) for f in report["runs"][0]["figures"]] == expected
    assert [tuple(e[name] for name in names) for e in report["evaluations"]] == expected
    assert [len(e["rows"]) for e in report["evaluations"]] == [3] * 4
    page(report)


def test_what_is_no_run_is_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (runs[1] / "results_epoch_3.jsonl").write_text(json.dumps({"row": 1}) + "\n")
    (tmp_path / "c").mkdir()
    bad = write_run(tmp_path / "d", {})
    (bad / "thoughts.json").write_text('{"checkpoint": "checkpoint_1", "rows": [{}]}')
    for folder, problem in (
        ("b", "results_epoch_3.jsonl: line 1: not a result"),
        ("c", "metrics.jsonl: cannot read"),
        ("d", "thoughts.json: not as `analysis look` writes it"),
    ):
        assert analysis.main(["report", "a", folder]) == 2
        assert problem in (err := capsys.readouterr().err) and err.count("\n") == 1
    of_nan = (
        thoughts("checkpoint_3", verdicts("1")).replace("0.5", "NaN").replace("1.5", "Infinity")
    )
    (bad / "thoughts.json").write_text(of_nan)  # of a model that diverged
    assert [*read_thoughts(bad).values()][0][0]["norm"] is None and page(gather([bad]))
    (bad / "thoughts.json").unlink()
    (bad / "config.yaml").unlink()
    with pytest.raises(UserError, match="config.yaml: cannot read"):
        gather([bad])
    assert not list(tmp_path.rglob("report.html"))


# ------------------------------------------------------------------------------- the browser

COUNT = "document.getElementById('count').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_browser() is None:
        pytest.skip("no Chromium on PATH")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open the report of run folders; the browser."""

    def open_report(folders, width: int = 1200, scheme: str = "light") -> Browser:
        path = tmp_path / "page.html"
        path.write_text(page(gather(folders)), encoding="utf-8")
        browser.look(width, scheme=scheme)
        browser.open(path)
        return browser

    return open_report


def choose(name: str, value: str) -> str:
    """A script that sets a control as a user does."""
    event = "input" if name == "search" else "change"
    return (
        f"(() => {{ const e = document.getElementById('{name}'); e.value = {json.dumps(value)};"
        f"e.dispatchEvent(new Event('{event}')); return {COUNT}; }})()"
    )


def press(verdict: str) -> str:
    return f"(document.querySelector('[data-verdict={verdict}]').click(), {COUNT})"


def test_the_page_opens_without_errors_and_without_network(show, runs):
    page_ = show(runs)
    assert page_.complaints == []
    assert [url.split("/")[-1] for url in page_.requests] == ["page.html"]
    assert page_.run("document.title") == "a, b \u00b7 report"
    drawn = "document.querySelectorAll('.chart svg path').length"
    assert page_.run(f"new Promise(done => setTimeout(() => done({drawn}), 100))") >= 8
    cells = "[...document.querySelectorAll('#evaluations tbody tr')].map(r => r.cells[3].innerText)"
    assert page_.run(cells) == ["50.0%", "75.0%", "75.0%", "25.0%", "50.0%", "75.0%", "75.0%"]


def test_sets_are_named_on_the_page(show, tmp_path):
    records = [
        {**evaluation(3, rate, forced=forced), "kind": "eval_set", "eval_set": name}
        for name, rate, forced in (("a", 0.5, None), ("a", 0.25, 0), ("b", 0.75, None))
    ]
    folder = write_run(tmp_path / "sets", {}, records)
    for name, text in (("a_epoch_3", "1010"), ("a_epoch_3_latents_0", "1000"), ("b_epoch_3", "11")):
        lines = "".join(json.dumps(row) + "\n" for row in verdicts(text))
        (folder / f"results_{name}.jsonl").write_text(lines)
    page_ = show([folder])
    cells = "[...document.querySelectorAll('#evaluations tbody tr')].map(r => r.cells[0].innerText)"
    assert page_.run(cells) == ["a", "a", "b"]
    assert "a, 0 forced latents: 25.0%" in page_.run("document.getElementById('runs').innerText")
    options = "[...document.getElementById('epoch').options].map(o => o.text)"
    titles = [text.split(" \u00b7 ")[0] for text in page_.run(options)]
    assert titles == ["all", "a", "b"] and page_.complaints == []
    assert page_.run(choose("epoch", "3 b")) == "1\u20132 of 2"


def test_where_all_numbers_of_latents_are_forced_they_are_shown(show, runs, tmp_path):
    """On the card each of them, and rows from the start; another run has its own beside them."""
    records = [evaluation(3, 0.5, forced=0), evaluation(3, 0.75, forced=2)]
    results = {"3_latents_0": verdicts("1000", latents=0), "3_latents_2": verdicts("1110")}
    forced = write_run(tmp_path / "forced", results, records)
    page_ = show([forced])
    card = page_.run("document.getElementById('runs').innerText")
    assert "0 forced latents: 50.0%" in card and "2 forced latents: 75.0%" in card
    assert page_.run(COUNT) == "1\u20138 of 8"
    assert page_.run(choose("latents", "own")) == "no row is like that"
    page_ = show([runs[0], forced])
    assert page_.run(COUNT) == "1\u20136 of 6" and page_.run(choose("run", "1")) == "1\u20138 of 8"
    assert page_.complaints == []


def test_the_accuracy_without_latents_is_that_of_the_same_rows(show, tmp_path):
    """Not of another set, which the same folder may have."""
    other = {**evaluation(3, 0.11, forced=0), "kind": "eval_set", "eval_set": "other"}
    page_ = show([write_run(tmp_path / "run", {}, [*RECORDS, other])])
    card = page_.run("document.getElementById('runs').innerText")
    assert "without latents, epoch 3: 25.0%" in card and "11.0%" not in card


def test_filters_leave_the_rows_that_they_name(show, runs):
    page_ = show(runs)
    assert page_.run(COUNT) == "1\u20136 of 6"  # the newest epoch of the first run
    assert page_.run(press("right")) == "1\u20133 of 3"
    assert page_.run(press("wrong")) == "1\u20133 of 3"
    assert page_.run(choose("epoch", "1 ")) == "1\u20132 of 2"  # still the wrong ones
    assert page_.run(press("all")) == "1\u20136 of 6"
    assert page_.run(choose("epoch", "")) == "1\u201312 of 12"
    assert page_.run(choose("latents", "")) == "1\u201318 of 18"
    assert page_.run(choose("latents", "2")) == "1\u20136 of 6"
    assert page_.run(choose("latents", "0")) == "1\u201312 of 12"
    assert page_.run(choose("search", "are 4 PLUMS")) == "1\u20132 of 2"
    assert page_.run(choose("search", "nowhere")) == "no row is like that"
    assert page_.run(choose("search", "")) == "1\u201312 of 12"
    assert page_.run(choose("run", "")) == "1\u201312 of 12"  # the second has no such latents
    assert page_.run(choose("latents", "own")) == "1\u201318 of 18"
    assert page_.complaints == []


def test_two_runs_stand_side_by_side_where_they_disagree(show, runs, tmp_path):
    (runs[0] / "thoughts.json").write_text(thoughts("checkpoint_3", verdicts("111111")))
    page_ = show(runs)
    assert page_.run(choose("beside", "3")) == "1\u20133 of 3"  # rows 2, 3, 4
    names = "[...document.querySelectorAll('#verdicts button')].map(b => b.textContent)"
    counts = {name.rsplit(" ", 1)[0]: int(name.split()[-1]) for name in page_.run(names)}
    assert counts == {
        "all": 6,
        "they disagree": 3,
        "only the first right": 1,
        "only the second right": 2,
        "both right": 2,
        "both wrong": 1,
    }
    assert page_.run(press("only")) == "1\u20131 of 1"
    opened = "(async () => { const row = document.querySelector('.row'); row.open = true;"
    opened += "await new Promise(done => setTimeout(done, 50)); return row.innerText; })()"
    text = page_.run(opened)
    for shown in ("2 plums?", "<<2+0=2>>", "a \u00b7 epoch 3 \u00b7 stage 1", "b \u00b7 epoch 3"):
        assert shown in text
    for shown in ("latent \u00d7 2", "no answer", "4 tokens, 2 of them latents"):
        assert shown in text
    assert "nearest tokens" in text and "zero: 1, mean: none" in text and "7 0.50" in text
    assert page_.run(choose("beside", "")) == "1\u20136 of 6" and page_.complaints == []


def test_text_from_data_stays_text(show, tmp_path):
    """In every place that a text of the data can stand at."""
    rows = [
        result(0, True, question=HOSTILE, said=HOSTILE, gold_answer=HOSTILE, gold_steps=[HOSTILE]),
        result(1, False, answer=HOSTILE),
    ]
    name = "<img src=x onerror=window.x=1>"
    a = write_run(tmp_path / name, {"3": rows, f"3_{name}": rows}, lr=1.0, train_path=name)
    text = thoughts("checkpoint_3", rows).replace('"7"', json.dumps(HOSTILE))
    (a / "thoughts.json").write_text(text.replace('"zero": "1"', f'"zero": {json.dumps(HOSTILE)}'))
    page_ = show([a, write_run(tmp_path / "b", {"3": rows})])
    for script in (choose("epoch", ""), choose("beside", "2"), press("all")):
        page_.run(script)
    page_.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    text = page_.run("new Promise(done => setTimeout(() => done(document.body.innerText), 100))")
    assert text.count("<script>window.x=1</script><img src=x") > 4 and name in text
    assert page_.run("window.x") is None and page_.complaints == []
    assert page_.run("document.querySelectorAll('img, b, main script').length") == 0
    assert page_.run("document.scripts.length") == 2


def test_ten_thousand_rows_stay_quick(show, tmp_path):
    """The median of several interactions, layout included."""
    files = {f"{e}": verdicts("1101001011" * 250, epoch=e, latents=2) for e in (1, 2, 3, 4)}
    records = [evaluation(epoch, 0.6) for epoch in (1, 2, 3, 4)]
    page_ = show([write_run(tmp_path / "run", files, records)])
    page_.run(choose("epoch", ""))
    assert page_.run(COUNT) == "1\u201350 of 10000"
    assert page_.run("document.querySelectorAll('.row').length") == 50
    scripts = [press("wrong"), choose("search", "plums are 77"), choose("search", "9 plums")]
    scripts += [press("right"), choose("epoch", "2 "), choose("epoch", ""), choose("search", "")]
    scripts += [choose("beside", "1"), press("both"), choose("beside", "")]
    timed = "(() => {{ const start = performance.now(); {}; document.body.offsetHeight;"
    timed += "return performance.now() - start; }})()"
    seconds = [page_.run(timed.format(script)) / 1000 for script in scripts]
    assert statistics.median(seconds) < 0.2, seconds
    page_.run("document.getElementById('on').click()")
    assert page_.run(COUNT) == "51\u2013100 of 10000" and page_.complaints == []


# the lowest contrast of any text with what is behind it (WCAG 2.2, 1.4.3), and that text
CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], back) => [r, g, b].map((c, i) => a * c + (1 - a) * back[i]);
  const behind = (e) => {
    if (!e) return [255, 255, 255];
    const colour = parse(getComputedStyle(e).backgroundColor);
    return colour[3] === 0 ? behind(e.parentElement) : over(colour, behind(e.parentElement));
  };
  const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const c = colour[i] / 255;
    return sum + weight * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  }, 0);
  let worst = [99, ""], seen = 0;
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.matches("option, script, :disabled")) continue;
    const style = getComputedStyle(e), back = behind(e.closest("svg") ?? e);
    const front = over(parse(e.matches("text") ? style.fill : style.color), back);
    const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    seen++;
    if (ratio < worst[0]) worst = [ratio, e.textContent.slice(0, 50)];
  }
  return [...worst, seen, light(behind(document.body))];
})()"""
OPENED = "new Promise(done => { document.querySelectorAll('details').forEach(d => {d.open = true});"
OPENED += "setTimeout(done, 100); })"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(show, runs, scheme):
    page_ = show(runs, scheme=scheme)
    page_.run(choose("beside", "3"))
    page_.run(OPENED)
    ratio, text, seen, background = page_.run(CONTRAST)
    assert ratio >= 4.5, text
    assert seen > 100 and (background > 0.5) == (scheme == "light")


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_the_screen(show, runs, tmp_path, width):
    """With long words, many runs and all rows open; what is wide scrolls by itself."""
    rows = [result(0, True, question="w" * 500, said="0" * 500, answer="9" * 200)]
    wide = write_run(tmp_path / ("long" * 40), {"3": rows + verdicts("1")[1:]}, train_path="p" * 99)
    (runs[0] / "thoughts.json").write_text(thoughts("checkpoint_3", verdicts("111111")))
    page_ = show([*runs, wide], width)
    for script in (choose("run", ""), choose("epoch", ""), choose("latents", "")):
        page_.run(script)
    page_.run(OPENED)
    assert page_.run("innerWidth") == width
    assert page_.run("document.documentElement.scrollWidth") <= width
    past = "[...document.querySelectorAll('main, main > *, .card, .row, .body, select, h1')]"
    past += ".filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.className)"
    assert page_.run(past) == []
