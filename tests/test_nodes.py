"""Two nodes of two processes each: two launchers on this machine, over its loopback.

The nodes differ in their environment: a path with a variable in it is not the same on both, and
each has a cache of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Workspace, free_port, tiny_rows
from numerics import assert_same
from soak import TRAINING, differences, history, kill_family, wait_until
from test_distributed import (
    ALONE,
    UNITS,
    all_rows,
    gradients,
    num_labels,
    run_step,
    steps,
    tiny_coconut,
)

from engine import distributed
from engine.distributed import gradient_norm, process_group

pytestmark = pytest.mark.slow

# as test_distributed.CASES, of four ranks
CASES = {
    "one micro-batch": [[[(5, 2, 4)]], [[(3, 1, 6)]], [[(6, 2, 3)]], [[(9, 0, 5), (2, 2, 2)]]],
    "accumulation": [
        [[(5, 2, 4)], [(3, 2, 6)]],
        [[(6, 6, 3)], [(9, 2, 5)]],
        [[(4, 3, 3)], [(9, 0, 0)]],
        [[(7, 0, 3)], [(2, 0, 5)]],
    ],
}
ONCE = dict.fromkeys(("all_gather_single", "reduce_scatter_single", "all_reduce"), UNITS)
IMPATIENT = """
import sys
sys.path.insert(0, {root!r})
import run
from engine import checkpoint

checkpoint.VISIBLE_SECONDS = 1
sys.exit(run.record(run.main)())
"""

# ------------------------------------------------------------------------------- nodes


def launch_nodes(
    script: Path, *args, folder: Path, processes: tuple[int, int] = (2, 2)
) -> list[subprocess.Popen]:
    """A script on two nodes, started as a user starts it; their outputs go to node_0.log and
    node_1.log in the folder. $NODE is another folder on each."""
    port = free_port()
    started = []
    for node, count in enumerate(processes):
        own = folder / f"node_{node}"
        own.mkdir(exist_ok=True)
        options = f"--nnodes 2 --node_rank {node} --nproc_per_node {count}".split()
        options += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(script)]
        environment = {**os.environ, "NODE": str(own), "XDG_CACHE_HOME": str(own / "cache")}
        with open(folder / f"node_{node}.log", "w") as output:
            started.append(
                subprocess.Popen(
                    [*command, *map(str, args)],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def wait_for(nodes: list[subprocess.Popen]) -> list[int]:
    """Their exit codes."""
    try:
        for node in nodes:
            wait_until(lambda: False, node)
        return [node.returncode for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                kill_family(node)


def outputs(folder: Path) -> list[str]:
    return [(folder / f"node_{node}.log").read_text() for node in range(2)]


def errors(folder: Path) -> list[str]:
    """The lines that say what is wrong, of both nodes."""
    lines = [line for text in outputs(folder) for line in text.splitlines()]
    return [line for line in lines if line.startswith("error: ")]


# ------------------------------------------------------------------------------- four processes


def worker(folder: Path) -> None:
    """One of the four processes: its results to a file."""
    torch.set_num_threads(1)
    distributed.TIMEOUT = timedelta(seconds=60)
    with process_group(together=()) as world:
        results = {"shards": world.num_shards, **steps("llama", world, CASES)}
        torch.save(results, folder / f"{world.rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("nodes")
    assert wait_for(launch_nodes(Path(__file__), folder, folder=folder)) == [0, 0], outputs(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_two_nodes_is_that_of_one_process(results, name):
    case, alone = CASES[name], tiny_coconut("llama", ALONE)
    loss = run_step(alone, [all_rows(case)], num_labels(case), 1)
    wanted = {"loss": loss, "norm": gradient_norm(alone, None), "gradients": gradients(alone)}
    for rank in range(4):
        assert results[rank]["shards"] == 2
        for figure, value in wanted.items():
            assert_same(results[rank][name][figure], value, figure)


@pytest.mark.parametrize("name", CASES)
def test_gathered_within_a_node_and_reduced_across(results, name):
    """Once for each unit and step; no parameter crosses between nodes."""
    for rank in range(4):
        assert results[rank][name]["counts"] == ONCE


# ------------------------------------------------------------------------------- trainings

SHORT = {**TRAINING, "num_epochs": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def space(model_folder, tmp_path_factory) -> Workspace:
    return Workspace(model_folder, tmp_path_factory.mktemp("trainings"))


def test_two_nodes_train_and_go_on_exactly(space):
    """Interrupted by SIGTERM for both launchers, as a cluster sends it."""
    yaml = space.yaml(name="undisturbed", **SHORT)
    assert wait_for(launch_nodes(ROOT / "run.py", yaml, folder=space.folder)) == [0, 0], outputs(
        space.folder
    )
    undisturbed = space.run_dir.with_name("undisturbed")
    first, second = outputs(space.folder)
    assert "epoch 2, stage 2" in first and "epoch" not in second  # one process speaks
    caches = [[*(space.folder / f"node_{n}" / "cache").rglob("encoded-*")] for n in range(2)]
    assert [len(found) for found in caches] == [2, 2]  # of training and validation, on each node
    assert [r["rows"] for r in history(undisturbed) if r["kind"] == "eval"] == [6, 6, 6]

    run_dir = space.run_dir.with_name("interrupted")
    yaml, metrics = space.yaml(name="interrupted", **SHORT), run_dir / "metrics.jsonl"
    nodes = launch_nodes(ROOT / "run.py", yaml, folder=space.folder)
    assert wait_until(lambda: metrics.exists() and "train" in metrics.read_text(), nodes[0])
    for node in nodes:
        os.kill(node.pid, signal.SIGTERM)
    assert 0 not in wait_for(nodes)
    assert "all is saved" in outputs(space.folder)[0], outputs(space.folder)
    assert wait_for(launch_nodes(ROOT / "run.py", yaml, folder=space.folder)) == [0, 0]
    assert differences(run_dir, undisturbed) == []


def refused(space: Workspace, *, processes: tuple[int, int] = (1, 1), **keys) -> str:
    """The one line of a start on two nodes that cannot be."""
    script = space.folder / "impatient.py"
    script.write_text(IMPATIENT.format(root=str(ROOT)))
    yaml = space.yaml(name="refused", **SHORT, **keys)
    codes = wait_for(launch_nodes(script, yaml, folder=space.folder, processes=processes))
    assert codes == [1, 1], outputs(space.folder)
    assert all("exitcode  : 2" in text for text in outputs(space.folder)), outputs(space.folder)
    (line,) = errors(space.folder)
    return line


def here(node: int) -> str:
    return f"node {node} ({socket.gethostname()})"


def test_nodes_with_different_numbers_of_processes(space):
    line = refused(space, processes=(2, 1))
    assert f"processes: 2 on {here(0)}, 1 on {here(1)}; give torchrun the same" in line


def test_data_that_one_node_lacks(space):
    """It went on without the node, for as long as a collective call may wait."""
    first = space.folder / "node_0" / "train.json"
    first.parent.mkdir(exist_ok=True)
    first.write_text(Path(space.values["train_path"]).read_text())
    line = refused(space, train_path="$NODE/train.json")
    assert str(space.folder / "node_1" / "train.json") in line and f"(on {here(1)})" in line


def test_data_that_differ_between_nodes(space):
    for node in range(2):
        folder = space.folder / f"node_{node}"
        folder.mkdir(exist_ok=True)
        (folder / "rows.json").write_text(json.dumps(tiny_rows(24, seed=node)))
    line = refused(space, train_path="$NODE/rows.json")
    assert f"rows.json holds something else on {here(1)} than on {here(0)}" in line


def test_a_run_folder_that_nodes_do_not_share(space):
    """Each node would have written its part of the optimizer's state to a disk of its own."""
    line = refused(space, save_path="$NODE/out")
    assert f"save_path: {space.folder / 'node_1' / 'out'}" in line and f"(on {here(1)})" in line


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
