"""The memory forecast against the peak of a real training, and for the main config.

    python benchmarks/peak.py CONFIG.yaml      # trains under the profiler, prints the peak in bytes

The truth is torch's own allocator on the CPU, as its profiler reports every block that is taken
and given back, by whatever part of the program.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from memory import GIB, forecast, peak
from parts import QWEN3_4B, small_config, table, word_tokenizer
from transformers import AutoModelForCausalLM

import run
from loader import load_config

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
LENGTH = 64  # short: products in bf16 are slow on a CPU that has none
VARIANTS = {
    "float32": {},
    "float32, checkpointing": dict(gradient_checkpointing=True),
    "bf16 (adamw_split)": dict(bf16=True),
    "bf16 (adamw_split), checkpointing": dict(bf16=True, gradient_checkpointing=True),
    "float32_master_weights": dict(bf16=True, float32_master_weights=True),
    "bf16, adapters": dict(bf16=True, lora_r=32),
}
LONGEST = 305  # tokens of GSM8K's longest row


def real_peak(arguments: list[str]) -> int:
    """Most bytes alive at once while run.py trains."""
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        code = run.main(arguments)
        assert code == 0, f"run.py ended with {code}"
        profiler.stop()
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")


def write_training(
    folder: Path, length: int, vocab_size: int, layers: int, hidden: int, rows: int, **keys: Any
) -> Path:
    """A config, a model (adapters need its weights) and rows of `length` tokens, 60% of them before
    six latents as in the forecast, for a step as long as the rest: two optimizer steps of two
    micro-batches."""
    hf_config, adapted = small_config(vocab_size, layers, hidden), "lora_r" in keys
    model = AutoModelForCausalLM.from_config(hf_config) if adapted else hf_config
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    prefix = int(0.6 * (length - 6))
    suffix = length - 6 - prefix
    # beside the words: start of latents, line end; end of latents, line end, ### and eos
    row = {
        "question": " ".join(["word"] * (prefix - 2)),
        "steps": [" ".join(["word"] * (count - 1)) for count in (suffix, suffix - 4)],
        "answer": "5",
    }
    (folder / "rows.json").write_text(json.dumps([row] * (4 * rows)))
    values = dict(
        name="run",
        save_path=str(folder / "out"),
        model_id=str(folder / "model"),
        coconut=True,
        from_scratch=not adapted,
        train_path=str(folder / "rows.json"),
        skip_validation=True,
        debug=True,
        epochs_per_stage=1,
        max_latent_stage=1,
        c_thought=6,
        num_epochs=1,
        max_seq_length=length,
        batch_size_training=rows,
        gradient_accumulation_steps=2,
        num_workers=0,
        lr=1e-4,
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, **keys}))
    return path


def compare(
    length: int, vocab_size: int, layers: int, hidden: int, rows: int, **keys: Any
) -> tuple[float, int]:
    """(forecast, real peak) in bytes; the training runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_training(Path(folder), length, vocab_size, layers, hidden, rows, **keys)
        return compare_run([str(path)], length)


def compare_run(arguments: list[str], length: int) -> tuple[float, int]:
    """(forecast, real peak) in bytes of a training by run.py on rows of `length` tokens at most."""
    parts = forecast(load_config(*arguments), length)
    shown = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return peak(parts), int(shown.split()[-1])


def measure_peak() -> None:
    """The forecast of a small model's training against the training."""
    rows = []
    for name, keys in VARIANTS.items():
        wanted, real = compare(LENGTH, 8192, 4, 256, 16, **keys)
        rows.append([name, round(wanted / MIB, 1), round(real / MIB, 1), f"{wanted / real:.3f}"])
    table(
        "Memory forecast against run.py's real peak on the CPU: 4 layers, hidden 256, 8k "
        f"vocabulary, 2 x 16 rows of {LENGTH} tokens, six latents; MiB",
        ["weights", "forecast", "torch's allocator", "ratio"],
        rows,
    )


def measure_memory() -> None:
    """The forecast for the main config, from the shape of Qwen3-4B alone."""
    rows = []
    main = ROOT / "args" / "gsm8k_coconut_qwen3_a100_fresh_start.yaml"
    config = load_config(main, f"model_id={QWEN3_4B}")
    for share in (config.gradient_checkpointing, 1.0, 0.0):
        parts = forecast(dataclasses.replace(config, gradient_checkpointing=share), LONGEST)
        static = ("parameters", "gradients", "optimizer state")
        names = (
            "activations, caches, temporaries",
            "peak of forward and backward",
            "peak of the optimizer step",
        )
        sizes = [sum(parts[n] for n in static), *(parts[n] for n in names)]
        rows.append([share, *(f"{s / GIB:.1f}" for s in sizes)])
    table(
        f"Memory forecast: Qwen3-4B, micro-batches of {config.tokens_per_micro_batch:,} positions "
        f"in rows of {LONGEST}, six latents, bf16 with adamw_split, one GPU; GiB",
        [
            "gradient_checkpointing",
            "parameters, gradients, optimizer",
            "activations, caches, temporaries",
            "peak of forward and backward",
            "peak of the optimizer step",
        ],
        rows,
    )


if __name__ == "__main__":
    print(real_peak(sys.argv[1:]))
