"""The command line: ``fastqat <command>``, or ``python -m fastqat <command>``.

A mistake of the user ends with one message on stderr and exit code 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastqat
from fastqat.models import MODELS
from fastqat.ranges import ESTIMATORS
from fastqat.train.config import RECIPES, Config, make_config

USER_ERROR = 2
FAILED = 1
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``fastqat``; None takes those of the process.

    Returns:
        the exit code: 0, 1 when the work failed, 2 when the user has to change something.

    Raises:
        SystemExit: with code 2 for an unknown option or a bad value, with 0 after ``--help``.
    """
    options = vars(_parser().parse_args(argv))
    command: Callable[[dict[str, Any]], int] = options.pop("command")
    try:
        return command(options)
    except KeyboardInterrupt:
        print("fastqat: interrupted", file=sys.stderr)
        return INTERRUPTED


def status(options: dict[str, Any]) -> int:
    """Print versions, and for each backend whether it can run here, or why not."""
    versions = {"fastqat": fastqat.__version__, "torch": torch.__version__, "python": platform.python_version()}
    used = {f"on {device}": fastqat.current_backend(device) for device in ("cpu", "cuda")}
    for title, lines in (("versions", versions), ("backends", fastqat.status()), ("chosen", used)):
        print(title)
        for name, value in lines.items():
            print(f"  {name:<10} {value}")
    return 0


def train(options: dict[str, Any]) -> int:
    """Train, quantize and train quantized, as the options say."""
    try:
        from fastqat.train.trainer import Trainer

        trainer = Trainer(make_config(options))
    except (ValueError, OSError, ImportError) as error:
        print(f"fastqat train: error: {error}", file=sys.stderr)
        return USER_ERROR
    print(f"{trainer.title}, on {trainer.device}, backend {fastqat.current_backend(trainer.device.type)}")
    try:
        trainer.run()
    except (FloatingPointError, OSError) as error:
        print(f"fastqat train: {error}; what there is so far is in {trainer.folder.path}", file=sys.stderr)
        return FAILED
    print(f"metrics, curves and weights are in {trainer.folder.path}")
    return 0


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Make an argparse type: an integer from low to high."""
    wanted = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"wanted {wanted}; got {text!r}")
        return number

    return parse


def _number(text: str) -> float:
    """Parse a finite number that is not negative."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number of at least 0; got {text!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastqat", description="Quantization-aware training.")
    commands = parser.add_subparsers(metavar="command", required=True)
    status_parser = commands.add_parser("status", help="show which backends can run here, and why others cannot")
    status_parser.set_defaults(command=status)
    train_parser = commands.add_parser(
        "train", help="train a network, quantize it, and train it quantized", argument_default=argparse.SUPPRESS
    )
    train_parser.set_defaults(command=train)
    _add_train_options(train_parser)
    return parser


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of Config. What is not given stays out of the result: its default is the recipe's."""

    def add(group: argparse._ArgumentGroup, name: str, text: str, absent: str = "none", **how: Any) -> None:
        field = name.replace("-", "_")
        defaults = {data: recipe.get(field, getattr(Config, field)) for data, recipe in RECIPES.items()}
        if len(set(defaults.values())) > 1:
            text += f" (default: {', '.join(f'{value or absent} for {data}' for data, value in defaults.items())})"
        elif defaults["digits"] is not None:
            text += f" (default: {defaults['digits']})"
        group.add_argument(f"--{name}", help=text, **how)

    task = parser.add_argument_group("what to train")
    add(task, "data", "images: %(choices)s", choices=list(RECIPES), metavar="NAME")
    add(task, "root", "folder of the data files; digits need none", type=Path, metavar="DIR")
    add(task, "model", f"network: {', '.join(MODELS)}", metavar="NAME")
    add(task, "checkpoint", "FP32 weights to start from, instead of FP32 training", type=Path, metavar="FILE")
    add(task, "limit-train", "use only the first N training images", type=_integer(1), metavar="N")
    add(task, "out", "folder for metrics, curves and weights (default: a new one in runs)", type=Path, metavar="DIR")

    quantization = parser.add_argument_group("quantization")
    add(quantization, "bits-weight", "bits of weights, 1..8", type=_integer(1, 8), metavar="N")
    add(quantization, "bits-activation", "bits of activations, 1..8", type=_integer(1, 8), metavar="N")
    add(
        quantization,
        "first-last-bits",
        "bits of the first and the last layer, 0: as others",
        type=_integer(0, 8),
        metavar="N",
    )
    add(quantization, "range", "how the first ranges are chosen: %(choices)s", choices=list(ESTIMATORS), metavar="NAME")
    add(quantization, "calibration-batches", "training batches that choose the ranges", type=_integer(1), metavar="N")

    training = parser.add_argument_group("training")
    add(training, "epochs", "epochs of quantization-aware training", type=_integer(0), metavar="N")
    add(training, "fp32-epochs", "epochs of FP32 training before it", type=_integer(0), metavar="N")
    add(training, "batch-size", "images per step", type=_integer(1), metavar="N")
    add(training, "lr", "learning rate of quantization-aware training", type=_number, metavar="X")
    add(training, "fp32-lr", "learning rate of FP32 training", type=_number, metavar="X")
    add(training, "quantizer-lr", "learning rate of the scales", type=_number, metavar="X")
    add(training, "momentum", "momentum of SGD", type=_number, metavar="X")
    add(training, "weight-decay", "weight decay; the scales have none", type=_number, metavar="X")
    add(training, "seed", "of weights, order and augmentation", type=_integer(0, 2**63 - 1), metavar="N")

    machine = parser.add_argument_group("machine")
    add(machine, "device", "%(choices)s", choices=["auto", "cpu", "cuda"], metavar="NAME")
    add(machine, "threads", "CPU threads", absent="torch's choice", type=_integer(1), metavar="N")
