"""examples/first_look.ipynb: its cells run, top to bottom, on a small run."""

import json

import matplotlib
import pytest
from conftest import ROOT

import run

NOTEBOOK = ROOT / "examples" / "first_look.ipynb"


def test_the_notebook_runs(workspace, monkeypatch, capsys):
    """Each code cell in one namespace, as a kernel does; only the run's place is another."""
    matplotlib.use("Agg")
    assert run.main([str(workspace.yaml(num_epochs=1))]) == 0
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    monkeypatch.chdir(NOTEBOOK.parent)
    namespace: dict = {}
    for cell in cells:
        cell = cell.replace('"../outputs/quickstart"', repr(str(workspace.run_dir)))
        exec(cell.replace("checkpoint_10", "checkpoint_1"), namespace)
    out = capsys.readouterr().out
    assert "6 latents: [" in out and "latent 6  norm" in out and "latent 6: zeros [" in out
    assert namespace["accuracy"].lines and namespace["states"].shape[:2] == (2, 6)


@pytest.mark.parametrize("kind", ["text/plain", "image/png"])
def test_the_notebook_shows_what_it_printed(kind):
    """Readers see the outputs without running it."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert [o for o in outputs if kind in o.get("data", {}) or o["output_type"] == "stream"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
