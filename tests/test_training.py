"""run.py in the process: all stages, resume, evaluation."""

import json

import run


def test_all_stages_then_evaluation(workspace):
    assert run.main([str(workspace.yaml())]) == 0
    log = (workspace.run_dir / "training.log").read_text()
    assert "epoch 3" in log
