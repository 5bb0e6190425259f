"""Loss and accuracy of runs by epoch, in one picture."""

import argparse
from pathlib import Path

from analysis.output import check_output
from engine.curve import draw_curves
from utils import UserError


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    command.add_argument(
        "--output", type=Path, help="a .png; default: curve.png, of one run in its folder"
    )


def run(args: argparse.Namespace) -> None:
    """Loss and accuracy of run folders by epoch, in one picture."""
    path = args.output or Path("curve.png" if len(args.runs) > 1 else args.runs[0] / "curve.png")
    if path.suffix.lower() != ".png":
        raise UserError(f"--output: {path} is no .png, the only format")
    check_output(path.parent, path.name)
    draw_curves(args.runs, path)
    print(f"written: {path}")
