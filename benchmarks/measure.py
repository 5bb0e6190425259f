"""Measure what is fast against its limit, by ratio in one run or by counts; prints Markdown.

    python benchmarks/measure.py [NAME ...]

without names runs everything, in under 20 minutes on two cores. benchmarks/README.md holds the
figures of a run. COCONUT_TEST_TOKENIZER names the folder of a real tokenizer for the data path.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ratios of one thread's time are steady
os.environ.setdefault("WANDB_DISABLED", "true")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import torch
from collectives import measure_collectives
from data_path import measure_data, measure_padding
from datasets.utils.logging import disable_progress_bar
from faithful import measure_faithful
from forecast_check import measure_forecast
from learning import measure_learning, measure_updates
from peak import measure_memory, measure_peak
from speed import measure_generation, measure_step

from utils import log

MEASURES = {
    "step": measure_step,
    "generation": measure_generation,
    "faithful": measure_faithful,
    "padding": measure_padding,
    "data": measure_data,
    "collectives": measure_collectives,
    "memory": measure_memory,
    "peak": measure_peak,
    "forecast": measure_forecast,
    "updates": measure_updates,
    "learning": measure_learning,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", choices=[*MEASURES, []], metavar="NAME", help=", ".join(MEASURES)
    )
    names = parser.parse_args().names or list(MEASURES)
    torch.set_num_threads(1)
    log.setLevel(logging.ERROR)  # that bf16 with adamw loses updates is what is measured
    disable_progress_bar()
    for name in names:
        start = time.perf_counter()
        MEASURES[name]()
        print(f"\n({name}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
