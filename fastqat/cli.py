"""The command line: ``fastqat <command>``, or ``python -m fastqat <command>``.

A mistake of the user ends with one message on stderr and exit code 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fastqat
from fastqat.ops import native
from fastqat.train.config import OPTIONS
from fastqat.train.interrupt import Interrupted
from fastqat.train.options import GROUPS, Option
from fastqat.train.recipe import make_config, nearest, recipes

USER_ERROR = 2
FAILED = 1
KILLED = 128  # plus the number of the signal
FLAGS = [name.replace("_", "-") for name in ("recipe", "resume", *OPTIONS)]
METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH", tuple: "X", dict: "NAME=VALUE"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``fastqat``; None takes those of the process.

    Returns:
        the exit code: 0, 1 when the work failed, 2 when the user has to change something, 128 + number of the signal
        that stopped it.

    Raises:
        SystemExit: with code 2 for an unknown option or a bad value, with 0 after ``--help``.
    """
    parser = _parser()
    known, unknown = parser.parse_known_args(argv)
    options = vars(known)
    command: Callable[[dict[str, Any]], int] = options.pop("command")
    if unknown and command is train and unknown[0].startswith("--"):
        parser.error(nearest(unknown[0].partition("=")[0].lstrip("-"), FLAGS))
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with _warnings_in_one_line():
            return command(options)
    except KeyboardInterrupt:
        print("fastqat: interrupted", file=sys.stderr)
        return KILLED + signal.SIGINT


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show what warns the user without the line of code that did."""
    with warnings.catch_warnings():
        as_ever = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category is UserWarning:
                print(f"fastqat: warning: {' '.join(str(message).split())}", file=sys.stderr)
            else:
                as_ever(message, category, *where, **more)

        warnings.showwarning = show
        yield


def status(options: dict[str, Any]) -> int:
    """Print versions, and for each backend whether it can run here, or why not."""
    versions = {
        "fastqat": fastqat.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none in torch",
        "triton": _version_of("triton"),
        "python": platform.python_version(),
    }
    libraries = {library.name: library.state() for library in (native.cpu, native.cuda)}
    used = {f"on {device}": fastqat.current_backend(device) for device in ("cpu", "cuda")}
    sections = {
        "versions": versions,
        "devices": _devices(),
        "libraries": libraries,
        "backends": fastqat.status(),
        "chosen": used,
    }
    for title, lines in sections.items():
        print(title)
        for name, value in lines.items():
            print(f"  {name:<10} {value}")
    return 0


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    """Name and capability of each GPU, and whether the CUDA library has code for it."""
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        line = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"
        if native.cuda.module is not None:
            line += ", with" if native.cuda.has_code(10 * major + minor) else ", without"
            line += " code in _C_cuda"
        devices[f"cuda:{index}"] = line
    return devices


def train(options: dict[str, Any]) -> int:
    """Train, quantize and train quantized, as the options say; or go on with a run."""
    resume: Path | None = options.pop("resume", None)
    try:
        from fastqat.train.pages import keep_pages
        from fastqat.train.run_folder import read_folder
        from fastqat.train.trainer import Trainer

        keep_pages()
        trainer = Trainer(read_folder(resume, options) if resume else make_config(options), resume)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastqat train: error: {error}", file=sys.stderr)
        return USER_ERROR
    folder = trainer.folder.path
    go_on = f"go on with: fastqat train --resume {shlex.quote(str(folder))}"
    say = print if trainer.processes.main else lambda *_, **__: None
    say(f"{trainer.title}, on {trainer.device}, backend {fastqat.current_backend(trainer.device.type)}", flush=True)
    if resume:
        at = trainer.state.position
        done = f"{at.phase}, after {at.epoch} epochs and {at.batch} batches"
        say(f"goes on with {folder}: {'all is done, but for the curves' if at.phase == 'done' else done}", flush=True)
    try:
        trainer.run()
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        say(f"fastqat train: stopped by {signal.Signals(number).name}; {go_on}", file=sys.stderr)
        if isinstance(stop, Interrupted):
            trainer.processes.meet()  # torchrun ends all of them as soon as one is gone
        return KILLED + number
    except FloatingPointError as error:
        say(f"fastqat train: {error}; what there is so far is in {folder}", file=sys.stderr)
        return FAILED
    except (OSError, ValueError) as error:  # a full disk, a broken image: any process may be the one that meets it
        saved = f"what was saved is in {folder}; when that is put right, {go_on}"
        print(f"fastqat train: {error}; {saved}", file=sys.stderr)
        return FAILED
    finally:
        trainer.close()
    say(f"metrics, curves and weights are in {folder}")
    return 0


def report(options: dict[str, Any]) -> int:
    """Write what a run has recorded as an HTML file."""
    try:
        from fastqat.html_report import write_report

        path = write_report(options["run"], options["root"])
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"fastqat report: error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"fastqat report: {error}", file=sys.stderr)
        return FAILED
    print(f"the report is in {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastqat", description="Quantization-aware training.")
    commands = parser.add_subparsers(metavar="command", required=True)
    status_parser = commands.add_parser("status", help="show which backends can run here, and why others cannot")
    status_parser.set_defaults(command=status)
    train_parser = commands.add_parser(
        "train",
        help="train a network, quantize it, and train it quantized",
        usage="fastqat train [--recipe FILE ... | --resume DIR] [OPTION ...]",
        argument_default=argparse.SUPPRESS,
    )
    train_parser.set_defaults(command=train)
    _add_train_options(train_parser)
    report_parser = commands.add_parser("report", help="show what a run has recorded, as one HTML file with pictures")
    report_parser.set_defaults(command=report)
    report_parser.add_argument("run", help="folder of the run; the report goes into its folder report", type=Path)
    text = "folder of the data files, for the statistics of batch normalisation (default: where the run had them)"
    report_parser.add_argument("--root", help=text, type=Path, metavar="PATH")
    return parser


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of Config. What is not given stays out of the result: its default is the recipe's."""
    sources = parser.add_argument_group("where options come from")
    known = ", ".join(recipes())
    text = f"YAML file of options, or one of {known}; given more than once, the later one wins, and options given here "
    text += "win over all. Those that name no data are laid over the recipe of the data, if there is one"
    sources.add_argument("--recipe", help=text, metavar="FILE", action="append")
    sources.add_argument("--resume", help="go on with the run in this folder", type=Path, metavar="DIR")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, each in OPTIONS.items():
        how: dict[str, Any] = {"help": _help(each)}
        if each.kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": _parse(each), "metavar": METAVARS[each.kind]}
        if each.kind in (tuple, dict):
            how |= {"nargs": "+", "action": _Collect, "collect": each.kind}
        groups[each.group].add_argument(f"--{name.replace('_', '-')}", **how)


class _Collect(argparse.Action):
    """Collects the words of one flag into a tuple, or into a dict, to which the same flag may add more."""

    def __init__(self, *args: Any, collect: type, **how: Any) -> None:
        super().__init__(*args, **how)
        self.collect = collect

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        collected = self.collect(values)
        if isinstance(collected, dict):
            collected = {**getattr(namespace, self.dest, {}), **collected}
        setattr(namespace, self.dest, collected)


def _help(each: Option) -> str:
    text = each.text + (f": {', '.join(each.choices)}" if each.choices else "")
    if each.default in (None, False) or each.default == {} or "default:" in text:
        return text
    default = " ".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
    return f"{text} (default: {default})"


def _parse(each: Option) -> Callable[[str], Any]:
    """Make an argparse type of an option."""

    def parse(text: str) -> Any:
        try:
            return each.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
