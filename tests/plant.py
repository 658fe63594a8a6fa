"""Plant one bug at a time in a copy of the tree and see the tests turn red: ``python tests/plant.py [word in a name]``.

A suite that has never failed proves nothing. Each plant replaces exact text (and stops where that text is gone), builds
the C++ library where csrc changed, and runs the tests that must notice. The same tests must pass on the clean copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from planted import PLANTS, Plant

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "fastqat", "tests", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(tree: Path, *command: str) -> tuple[int, str]:
    """Run Python in the copy, which shadows any installed package; exit status and output."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "FASTQAT_CUDA_ARCHS": "none"}  # builds no _C_cuda
    done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def build(tree: Path) -> None:
    """Build the C++ library in the copy; an older one must not stand in for it."""
    for old in (tree / "fastqat").glob("_C.*.so"):
        old.unlink()
    shutil.rmtree(tree / "build", ignore_errors=True)
    code, output = run(tree, "setup.py", "build_ext", "--inplace")
    if code or not list((tree / "fastqat").glob("_C.*.so")):
        sys.exit(f"the copy does not build:\n{output[-3000:]}")


def test(tree: Path, selection: tuple[str, ...]) -> tuple[bool, str]:
    """True if tests ran and all passed, and pytest's closing line; stops unless tests passed or failed."""
    code, output = run(tree, "-m", "pytest", "-p", "no:cacheprovider", *selection)
    closing = [line for line in output.splitlines() if " in " in line and (" passed" in line or " failed" in line)]
    if code not in (0, 1) or not closing:
        sys.exit(f"pytest could not run {selection} (exit status {code}):\n{output[-3000:]}")
    return code == 0 and " passed" in closing[-1], closing[-1].strip("= ")


def turns_red(clean: Path, bug: Plant) -> tuple[bool, str]:
    """Plant a bug in a copy of the clean copy, and test."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(clean, tree, ignore=shutil.ignore_patterns("__pycache__"))
        for file, old, new in bug.replacements:
            (tree / file).write_text((tree / file).read_text().replace(old, new))
        if bug.rebuilds:
            build(tree)
        green, line = test(tree, bug.tests)
    return not green, line


def main() -> int:
    """Plant all bugs (or those with a word in their names); 0 if each one turned its tests red."""
    bugs = [bug for bug in PLANTS if all(word in bug.name for word in sys.argv[1:])]
    for bug in bugs:
        for file, old, _ in bug.replacements:
            if old not in (ROOT / file).read_text():
                sys.exit(f"{bug.name}: {file} does not contain the text to replace: {old!r}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
            elif source.exists():
                shutil.copy2(source, tree / name)
        if any(bug.rebuilds for bug in bugs):
            build(tree)
        where = run(tree, "-c", "import fastqat; print(fastqat.__file__)")[1].strip()
        if not where.startswith(str(tree)):
            sys.exit(f"the tests would import {where}, not the copy")
        for selection in dict.fromkeys(bug.tests for bug in bugs):
            green, line = test(tree, selection)
            print(f"{'green' if green else 'RED'}  clean copy: {' '.join(selection)}: {line}", flush=True)
            if not green:
                return 1
        missed = 0
        for bug in bugs:
            red, line = turns_red(tree, bug)
            missed += not red
            print(f"{'red  ' if red else 'MISSED'}  {bug.name}: {line}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} planted bugs were noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
