"""The table that gpu.py writes, and the machine that it names."""

import platform
import shutil
import subprocess

import torch
from memory import GIB
from parts import markdown

# of the quickstart: README
ON_CPU, MINUTES_ON_CPU = {"accuracy": 1.0, "accuracy without latents": 0.14}, "7"


def describe_machine() -> dict:
    """The card, its driver, the library; without CUDA, that this is a rehearsal."""
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "driver": None}
    if not torch.cuda.is_available():
        return {"card": "CPU, a rehearsal", "memory": None, "cpu": platform.machine(), **versions}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]):  # some containers lack it
        versions["driver"] = subprocess.check_output(query, text=True).split()[0]
    card = torch.cuda.get_device_properties(0)
    return {"card": card.name, "memory": card.total_memory, "cpu": platform.machine(), **versions}


def gib(size: float | None) -> str:
    return "-" if size is None else f"{size / GIB:.1f} GiB"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def report(figures: dict) -> str:
    """The table, in Markdown: what, what it is held against, what was seen."""
    machine, main = figures["machine"], figures["main config"]
    rows, columns = main["largest micro-batch"]
    title = (
        f"{machine['card']}, {gib(machine['memory'])}; driver {machine['driver']}, PyTorch "
        f"{machine['torch']}; {main['parameters'] / 1e6:,.0f} million parameters, steps of "
        f"{main['rows per step']} rows of {main['tokens per row']:.0f} tokens in "
        f"{number(main['micro-batches per step'])} micro-batches, the largest {rows} x {columns}"
    )
    lines = of_quickstart(figures["quickstart"]) + of_main_config(main)
    lines += of_resume(figures["resume"])
    return markdown(title, ["what", "against", "measured"], lines)


def of_quickstart(found: dict) -> list[list]:
    lines: list[list] = [
        [f"quickstart: {name}", f"{wanted:.1%} on a CPU", f"{found[name]:.1%}"]
        for name, wanted in ON_CPU.items()
    ]
    return [*lines, ["quickstart: minutes", f"{MINUTES_ON_CPU} on a CPU", number(found["minutes"])]]


def of_main_config(found: dict) -> list[list]:
    forecast, passes, plain = (found[n] for n in ("forecast", "forward and backward", "plain pass"))
    lines = [
        [
            "peak memory of a step",
            f"{gib(forecast['peak bytes'])} forecast",
            gib(found["peak bytes"]),
        ],
        ["the same, with what the allocator holds", "-", gib(found["peak bytes reserved"])],
        [
            "seconds per step",
            f"{number(forecast['seconds per step'])} forecast",
            number(found["seconds per step"]),
        ],
        [
            "of them forward and backward",
            f"{number(plain)} in one pass of the library's model",
            f"{number(passes)} ({passes / plain:.2f}x)",
        ],
        ["host syncs per step", "-", number(found["host syncs per step"])],
    ]
    for batch_size, evaluated in found["evaluation"].items():
        tokens = evaluated["new tokens per row"]
        what = f"rows per second evaluated, {tokens:.0f} tokens each, batch {batch_size}"
        lines.append([what, "-", number(evaluated["rows per second"])])
    return lines


def of_resume(found: dict) -> list[list]:
    size, name = found["bytes"] / 1e9, "loads, to the same losses, weights and state, bit for bit"
    exact = "yes" if found["exact"] else "NO"
    return [
        [f"a checkpoint of {size:.2g} GB: seconds to save", "-", number(found["seconds to save"])],
        [f"{name}; seconds", "yes", f"{exact}; {number(found['seconds to load'])}"],
    ]
