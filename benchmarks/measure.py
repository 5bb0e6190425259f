"""Measure what is fast against its limit, by ratio in one run or by counts; prints Markdown.

    python benchmarks/measure.py [step] [generation] [padding] [data] [updates]

All of them take under 20 minutes on two cores. benchmarks/README.md holds a run's figures.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing"), str(ROOT / "benchmarks")]

import numpy as np
import torch
import torch.nn.functional as F
from memory import Storages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from coconut import Coconut, add_latent_tokens
from dataset import (
    Curriculum, LatentTokens, MicroBatches, StageDataset, deal, encode_rows, load_rows, plan_steps,
)
from optimizer import build_optimizer
from utils import Config

LATENT = 5  # the token that stands for a latent in random batches


def table(title: str, head: list[str], rows: list[list]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row) + " |")
    sys.stdout.flush()


def small_model(vocab_size=32_000, layers=8, hidden=512, attention="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    hf_config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=3 * hidden, head_dim=64,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(
        hf_config, dtype=dtype, attn_implementation=attention
    )


def random_batch(rows: int, prefix: int, latents: int, suffix: int, vocab_size: int) -> dict:
    """Rows with latents in the same columns, uneven padding at both ends."""
    length = prefix + latents + suffix
    ids = torch.randint(10, vocab_size, (rows, length))
    ids[:, prefix : prefix + latents] = LATENT
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 4] = 0
        mask[row, length - row % 5 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : prefix + latents] = -100
    index = F.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero().squeeze(1)
    return dict(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        labels=labels, label_index=index,
        latent_columns=(prefix, prefix + latents) if latents else (0, 0),
    )


def plain_loss(base, batch: dict) -> torch.Tensor:
    """The limit: one pass over the same tokens, logits on the labelled positions only."""
    names = ("input_ids", "attention_mask", "position_ids")
    hidden = base.model(**{n: batch[n] for n in names}, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch["label_index"])
    labels = batch["labels"].flatten().index_select(0, batch["label_index"] + 1)
    return F.cross_entropy(base.lm_head(hidden), labels)


class Calls(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def counted(mode, step) -> object:
    with mode:
        step().backward()
    return mode


def ratio_of_times(first, second, repeats=5) -> float:
    """Median of first's time over second's, measured in turn."""
    ratios = []
    for _ in range(repeats + 1):
        times = []
        for action in (first, second):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])  # the first warms up


# ------------------------------------------------------------------------------- the step


def measure_step() -> None:
    """Coconut's forward and backward against one plain pass over the same tokens."""
    rows = []
    for latents in (0, 2, 6, 12):
        batch = random_batch(16, 60, latents, 40, 32_000)
        figures = []
        for attention in ("eager", "sdpa"):  # the flop counter sees no fused CPU attention
            base = small_model(attention=attention)
            model = Coconut(base, LATENT, None, None, 0).train()
            steps = (lambda: model(**batch).loss), (lambda: plain_loss(base, batch))
            if attention == "eager":
                ours, plain = (
                    counted(FlopCounterMode(display=False), s).get_total_flops() for s in steps
                )
                # the fused loss is one operator to the counter: logits and both gradients
                ours += 6 * len(batch["label_index"]) * 512 * 32_000
                figures.append(ours / plain)
                continue
            calls = [counted(Calls(), step).count for step in steps]
            figures.append(calls[0] / calls[1])
            peaks = []
            for step in steps:
                model.zero_grad(set_to_none=True)
                given = [*model.parameters(), *model.buffers()]
                given += [v for v in batch.values() if isinstance(v, torch.Tensor)]
                peaks.append(counted(Storages(given), step).peak)
            static = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
            figures.append((peaks[0] + static) / (peaks[1] + static))
            figures.append(ratio_of_times(*(lambda s=s: s().backward() for s in steps)))
        rows.append([latents, *figures])
    table(
        "Training step against one plain pass (8 layers, hidden 512, 32k vocabulary, batch 16, "
        "1 thread)",
        ["latents", "operations", "operator calls", "peak memory", "time"], rows,
    )


# ------------------------------------------------------------------------------- generation


@torch.no_grad()
def measure_generation() -> None:
    """Coconut.generate against transformers' generate() on the same model and prompts."""
    base = small_model().eval()
    model, rows, new = Coconut(base, LATENT, None, None, -1).eval(), [], 64
    speeds = {}
    for batch_size in (1, 32):
        ids = torch.randint(10, 32_000, (batch_size, 80))
        mask = torch.ones_like(ids)
        for row in range(batch_size):
            mask[row, : row % 20] = 0

        def ours():
            return model.generate(ids, mask, new, latent_columns=(0, 0))

        def library():
            return base.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
            )

        same = torch.equal(torch.stack(ours()), library()[:, 80:])
        ratio = ratio_of_times(ours, library)
        start = time.perf_counter()
        ours()
        speeds[batch_size] = (time.perf_counter() - start) / batch_size
        rows.append([batch_size, ratio, speeds[batch_size], "yes" if same else "NO"])
    table(
        f"Generation against transformers' generate() ({new} new tokens, no latents)",
        ["batch", "time per token and row", "seconds per row", "same tokens"], rows,
    )


# ------------------------------------------------------------------------------- padding, data


def story_rows(count: int) -> list[dict]:
    """Synthetic rows of GSM8K's lengths: 20 to 120 words, 1 to 8 steps."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        words = int(np.clip(rng.normal(45, 18), 15, 140))
        numbers = rng.integers(1, 99, size=(int(np.clip(rng.normal(3.3, 1.7), 1, 8)), 2)).tolist()
        rows.append({
            "question": " ".join(f"plums{number}" for number in range(words)) + "?",
            "steps": [f"<<{a}+{b}={a + b}>>" for a, b in numbers], "answer": str(sum(numbers[-1])),
        })
    return rows


def tokenizer_for_benchmarks():
    """The real tokenizer where its folder is named, else the quickstart's."""
    folder = os.environ.get("COCONUT_TEST_TOKENIZER", str(ROOT / "data" / "quickstart_model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, LatentTokens(*add_latent_tokens(tokenizer))


def positions_per_token(dataset: StageDataset, steps, how) -> float:
    """Computed positions for each real one, if `how` splits every step into micro-batches."""
    positions = real = 0
    for rows in steps:
        for part in how(rows):
            suffix = dataset.total_length[part] - dataset.prefix_length[part]
            positions += (dataset.prefix_length[part].max() + suffix.max()) * len(part)
            real += dataset.total_length[part].sum()
    return float(positions / real)


def measure_padding() -> None:
    path = ROOT / "data" / "gsm8k_train.json"
    rows = load_rows(path) if path.exists() else story_rows(7000)
    tokenizer, tokens = tokenizer_for_benchmarks()
    with tempfile.TemporaryDirectory() as folder:
        encoded = encode_rows(rows, tokenizer, list(tokens), folder, "rows")
        figures = []
        for stage in (1, 2, 3):
            dataset = StageDataset(encoded, Curriculum(), tokens, stage)
            steps, _ = plan_steps(dataset, 96, 512, 0, 1)
            grouped, _ = plan_steps(dataset, 96, 512, 0, 1, group_by_length=True)
            as_they_come = lambda rows: [rows[i : i + 16] for i in range(0, len(rows), 16)]
            dealt = lambda rows: sum(deal(rows, dataset, 1, 16), [])
            figures.append([
                stage, positions_per_token(dataset, steps, as_they_come),
                positions_per_token(dataset, steps, dealt),
                positions_per_token(dataset, grouped, dealt),
            ])
    name = path.name if path.exists() else "synthetic rows"
    table(f"Positions per real token, steps of 6 x 16 rows ({len(rows)} rows, {name})",
          ["stage", "as they come", "dealt by length", "group_by_length"], figures)


def measure_data() -> None:
    """The data path at GSM8K-Aug's size."""
    count = 385_620
    tokenizer, tokens = tokenizer_for_benchmarks()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.json"
        path.write_text(json.dumps(story_rows(count)))
        seconds = {}

        def timed(name, action, *args, **kwargs):
            start = time.perf_counter()
            result = action(*args, **kwargs)
            seconds[name] = time.perf_counter() - start
            return result

        for run in ("first start", "second start"):
            rows = timed(f"{run}: read and check", load_rows, path)
            name = f"{run}: encode"
            encoded = timed(name, encode_rows, rows, tokenizer, list(tokens), folder, "x")
        dataset = timed("another stage", StageDataset, encoded, Curriculum(), tokens, 3)
        steps, _ = timed("another epoch's order", plan_steps, dataset, 96, 512, 0, 1)
        batches = MicroBatches(dataset, steps, 1, 0, 16, 0)
        timed("100 micro-batches of 16", lambda: [batches[i] for i in range(100)])
    table(f"Data path, {count} rows", ["what", "seconds"], [[k, v] for k, v in seconds.items()])


# ------------------------------------------------------------------------------- updates


def measure_updates() -> None:
    """How much of the intended float32 update arrives, lr 1e-5, weights of size 0.02, 100 steps."""
    figures = []
    kinds = {
        "float32, adamw": dict(optimizer="adamw"),
        "bf16, adamw": dict(bf16=True, optimizer="adamw"),
        "bf16, adamw_kahan": dict(bf16=True, optimizer="adamw_kahan"),
        "bf16, float32_master_weights": dict(bf16=True, float32_master_weights=True),
    }
    for name, keys in kinds.items():
        config = Config(name="x", save_path="x", model_id="x", lr=1e-5, weight_decay=0.0, **keys)
        torch.manual_seed(0)
        start = (torch.randn(1 << 20) * 0.02).bfloat16().float()
        model = torch.nn.ParameterList([start.clone().to(config.dtype)])
        optimizer = build_optimizer(config, model)
        for _ in range(100):
            model[0].grad = (torch.randn(1 << 20) + 0.5).to(config.dtype)
            optimizer.step()
        moved = model[0].detach().float() - start
        if name == "float32, adamw":
            intended = moved
        share = float((moved * intended).sum() / (intended * intended).sum())
        state = sum(t.numel() * t.element_size() for t in optimizer.state[model[0]].values()
                    if torch.is_tensor(t) and t.numel() > 1)
        size = 2 * model[0].element_size() + state / model[0].numel()
        figures.append([name, f"{share:.1%}", f"{float((moved == 0).float().mean()):.1%}",
                        round(size, 1)])
    table("Updates that arrive", ["weights", "of the intended displacement", "weights unmoved",
                                  "bytes per parameter"], figures)


MEASURES = {
    "step": measure_step, "generation": measure_generation, "padding": measure_padding,
    "data": measure_data, "updates": measure_updates,
}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or MEASURES:
        MEASURES[chosen]()
