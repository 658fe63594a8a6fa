"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``python scripts/sanitize.py [for pytest]``.

Builds ``_C`` with them in a copy of the tree, build/sanitized, which leaves the installed library alone, and runs there
the tests that call the kernels: conformance, random calls, ops on many tensors and on one. A report ends the run. No
clones for other instruction sets are made, so that it is this machine's code that is judged.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "sanitized"
COPIED = ("csrc", "fastqat", "tests", "setup.py", "pyproject.toml", "README.md")
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
FLAGS = f"{SANITIZERS} -fno-omit-frame-pointer -march=native -DFASTQAT_NO_CLONES"
TESTS = (
    "test_conformance.py",
    "test_properties.py",
    "test_multi_tensor.py",
    "test_multi_tensor_gradients.py",
    "test_frozen_codes.py",
    "test_nan_grids.py",
    "test_accuracy.py",
    "test_one_tensor.py",
    "test_one_tensor_edges.py",
    "test_range_search.py",
    "test_range_steps.py",
    "test_two_widths.py",
    "test_estimators.py",
    "test_dorefa.py",
)
# The other backends have no code of csrc/cpu, but for the definition, which tests need beside it.
CHOSEN = "not triton and not host and not cuda and not compile"


def runtime(compiler: str, name: str) -> str:
    """Path of a sanitizer's runtime library.

    Raises:
        SystemExit: the compiler has none.
    """
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    if not Path(path.stdout.strip()).is_absolute():
        sys.exit(f"sanitize: wanted {name} beside {compiler}; got none (install g++'s sanitizers)")
    return path.stdout.strip()


def copy_tree() -> None:
    """Bring the copy up to date; what was built for it stays."""
    for name in COPIED:
        source, target = ROOT / name, TREE / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.not-built.txt"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def main() -> int:
    """Build, test, and return pytest's exit status."""
    compiler = os.environ.get("CXX", "g++")
    preloaded = " ".join(runtime(compiler, name) for name in ("libasan.so", "libubsan.so"))
    copy_tree()
    environment = {**os.environ, "CFLAGS": FLAGS, "LDFLAGS": SANITIZERS, "FASTQAT_CUDA_ARCHS": "none"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=TREE, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode or not list((TREE / "fastqat").glob("_C.*.so")):
        sys.exit("sanitize: the library was not built")
    environment = {
        **os.environ,
        "PYTHONPATH": str(TREE),
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python itself
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    tests = sys.argv[1:] or [*(f"tests/{name}" for name in TESTS), "-k", CHOSEN]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-x", "--capture=no", *tests]
    return subprocess.run(command, cwd=TREE, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
