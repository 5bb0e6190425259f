"""Real weights on real rows, on a CPU: SmolLM2-135M-Instruct learns Coconut on GSM8K.

    python benchmarks/smollm2.py --model MODEL --data FOLDER [--output_dir DIR]

trains args/gsm8k_coconut_smollm2.yaml through stages 0, 1 and 2, an epoch each, all weights and by
LoRA, each run killed in the middle and continued; evaluates 200 rows with the chain written (after
stage 0), with latents and with none (after stage 2), and before any training; compares the memory
forecast with torch's allocator; and writes table.md and loss.png. What is finished is kept.
MODEL: a Hub name or a folder. FOLDER: gsm8k_train.json and gsm8k_validation.json of
preprocessing/gsm8k_icot.py; 200 training rows make the 300 steps of benchmarks/smollm2.md.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter
from parts import markdown
from peak import MIB, compare_run

sys.path.append(str(Path(__file__).resolve().parents[1]))
from analysis.output import percent
from engine.curve import read_curve, smooth
from engine.logs import read_metrics
from engine.preflight import gather_inputs
from loader import load_config
from rows import load_rows
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "args" / "gsm8k_coconut_smollm2.yaml"
EPOCHS = 3  # stages 0, 1 and 2
LATENTS = 4  # of stage 2
SHORT = dict(
    num_epochs=EPOCHS,
    max_latent_stage=EPOCHS - 1,
    batch_size_training=2,
    rows_per_step=2,
    num_workers=0,
    eval_subset_size=200,
    max_new_tokens=96,
)
RUNS = {"full": {}, "lora": dict(lora_r=128, lora_alpha=32, lr=8e-4)}


def arguments(args: argparse.Namespace, name: str, **keys: object) -> list[str]:
    """Those of run.py after the YAML files."""
    data = dict(train="gsm8k_train.json", val="gsm8k_validation.json")
    paths = {f"{split}_path": args.data / file for split, file in data.items()}
    values = {**SHORT, **paths, "model_id": args.model, "save_path": args.output_dir, **keys}
    return [f"name={name}", *(f"{key}={value}" for key, value in values.items())]


def run(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "run.py", *map(str, arguments)])


def wait(process: subprocess.Popen) -> None:
    if process.wait():
        sys.exit(process.returncode)


# ------------------------------------------------------------------------------- the runs


def train(args: argparse.Namespace, name: str) -> None:
    """A new run is killed in the middle of its steps; then it goes on."""
    keys = dict(skip_validation=True, save_every_steps=20)
    command = [CONFIG, *arguments(args, name, **keys, **RUNS[name])]
    run_dir, rows = args.output_dir / name, load_rows(args.data / "gsm8k_train.json")
    middle = EPOCHS * len(rows) // SHORT["rows_per_step"] // 2
    if not run_dir.exists():
        process, metrics = run(*command), run_dir / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= middle:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.2)
    wait(run(*command))


def evaluate(args: argparse.Namespace, name: str) -> list[dict]:
    """Records of the written chain, after stage 0, and of latents and none, after the last."""
    records = []
    for way, epoch, numbers in (("chain", 1, [0]), ("latents", EPOCHS, [LATENTS, 0])):
        metrics = args.output_dir / f"{name}-{way}" / "metrics.jsonl"
        source = args.output_dir / name / f"checkpoint_{epoch}" if name in RUNS else args.model
        keys = dict(only_eval=True, resume=epoch, load_model_path=source, eval_num_latents=numbers)
        if not metrics.exists() or len(read_metrics(metrics)) < len(numbers):
            wait(run(CONFIG, *arguments(args, metrics.parent.name, **keys)))
        records += read_metrics(metrics)
    return records


def measure_memory(args: argparse.Namespace, name: str) -> list:
    """[name, forecast and real peak of run.py in MiB, ratio], with the longest rows."""
    rows = load_rows(args.data / "gsm8k_train.json")
    rows.sort(key=lambda row: len(row["question"] + "".join(row["steps"])))
    path = args.output_dir / "longest.json"
    path.write_text(json.dumps(rows[-2 * SHORT["rows_per_step"] :]))
    keys = dict(train_path=path, skip_validation=True, debug=True, **RUNS[name])
    command = [str(CONFIG), *arguments(args, f"memory-{name}", **keys)]
    length = max(gather_inputs(load_config(*command)).train_dataset(epoch=1).total_length)
    wanted, real = compare_run(command, int(length))
    return [name, round(wanted / MIB), round(real / MIB), f"{wanted / real:.3f}"]


# ------------------------------------------------------------------------------- writing


def rates(name: str, records: list[dict]) -> list:
    """A line of the table: accuracy, its interval and the tokens of an answer, of each way."""
    cells = [
        f"{percent(r['accuracy'], (r['accuracy_low'], r['accuracy_high']))}, "
        f"{r['new_tokens']:.0f} tokens"
        for r in records
    ]
    return [name, *cells]


def draw(run_dirs: list[Path], path: Path) -> None:
    """The loss of each run, means over three steps; an epoch is a stage."""
    figure, panel = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for run_dir in run_dirs:
        panel.plot(*smooth(read_curve(run_dir).losses), label=run_dir.name)
    for stage in range(1, EPOCHS):
        panel.axvline(stage, color="black", linestyle=":", linewidth=1)
    panel.set(xlabel="epoch (stages 0, 1, 2)", ylabel="training loss, nats per token", yscale="log")
    panel.set_xticks(range(EPOCHS + 1))
    panel.set_yticks([0.5, 1, 2], ["0.5", "1", "2"])
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "smollm2")
    args = parser.parse_args()
    try:
        load_rows(args.data / "gsm8k_train.json")
    except UserError as error:
        return error.report()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        train(args, name)
    lines = [rates(name, evaluate(args, name)) for name in ("before", *RUNS)]
    text = markdown(
        f"{SHORT['eval_subset_size']} rows at most: accuracy, 95% interval",
        ["weights", "chain written (stage 0)", f"{LATENTS} latents (stage 2)", "forced to 0"],
        lines,
    )
    text += markdown(
        "Memory, MiB",
        ["run", "forecast", "torch's allocator", "ratio"],
        [measure_memory(args, name) for name in RUNS],
    )
    (args.output_dir / "table.md").write_text(text.lstrip())
    draw([args.output_dir / name for name in RUNS], args.output_dir / "loss.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
