"""The package builds without a compiler, works without its libraries, and says why it has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# An editable install of the package would lend its library to the copy.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
STATUS = ALONE + "import runpy; sys.argv = ['fastqat', 'status']; runpy.run_module('fastqat', run_name='__main__')\n"
USE = (
    ALONE
    + """
import torch, fastqat
x = torch.tensor([-1.2, 0.04, 0.69, 3.0])
y = fastqat.functional.fake_quantize(x, torch.tensor([0.25]), qmin=-4, qmax=3)
assert y.tolist() == [-1.0, 0.0, 0.75, 0.75], y
assert fastqat.current_backend("cpu") == "reference"
try:
    fastqat.use_backend("cpu")
except RuntimeError as error:
    print(error)
"""
)
MODULE = """
#include <Python.h>
#include "shared.h"
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
PyMODINIT_FUNC PyInit__C() {
  PyObject* made = PyModule_Create(&module);
  PyModule_AddIntConstant(made, "number", NUMBER);
  return made;
}
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, with nothing built."""
    for folder in ("fastqat", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "*.txt", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


@pytest.fixture
def small_tree(tree: Path) -> Path:
    """The same with sources that compile in no time: two files for the CPU, one with a header, and none for CUDA."""
    for path in (*tree.glob("csrc/cpu/*"), *tree.glob("csrc/cuda/*.c*")):
        path.unlink()
    (tree / "csrc/cpu/shared.h").write_text("#define NUMBER 1\n")
    (tree / "csrc/cpu/module.cpp").write_text(MODULE)
    (tree / "csrc/cpu/other.cpp").write_text("int other() { return 0; }\n")
    return tree


def build(tree: Path, **environment: str) -> str:
    """Build in place; returns what was printed."""
    built = run("setup.py", "build_ext", "--inplace", cwd=tree, **environment)
    assert built.returncode == 0, built.stderr
    return built.stdout


def reason(tree: Path, name: str) -> str | None:
    """Why a library was not built, as the build has left it."""
    note = tree / "fastqat" / f"{name}.not-built.txt"
    assert note.exists() != bool([*note.parent.glob(f"{name}.*.so")]), "there is a library, or a reason why not"
    return note.read_text() if note.exists() else None


def test_without_a_compiler_the_reason_is_kept_and_the_reference_runs(tree: Path) -> None:
    # The CUDA library fails for another reason: nvcc would work for a while before it asks for the compiler.
    printed = build(tree, CC="/no/such/cc", CXX="/no/such/c++", FASTQAT_CUDA_ARCHS="fast")
    assert "installing without fastqat._C " in printed and "installing without fastqat._C_cuda " in printed
    assert "/no/such/c" in reason(tree, "_C")
    assert "/no/such/c" not in reason(tree, "_C_cuda")

    used = run("-c", USE, cwd=tree, PYTHONPATH=str(tree))
    assert used.returncode == 0, used.stderr
    assert "backend 'cpu' cannot run here: the C++ library fastqat._C was not built" in used.stdout
    assert "/no/such/c" in used.stdout, "the reason of the failed build is lost"

    status = run("-c", STATUS, cwd=tree, PYTHONPATH=str(tree))
    assert status.returncode == 0, status.stderr
    assert "/no/such/c" in status.stdout
    assert status.stdout.count("not built\n") == 2, "both libraries are missing"


def test_a_library_that_cannot_be_loaded_is_not_fatal(tree: Path) -> None:
    (tree / "fastqat" / "_C.abi3.so").write_bytes(b"not a library")
    used = run("-c", USE, cwd=tree, PYTHONPATH=str(tree))
    assert used.returncode == 0, used.stderr
    assert "cannot be loaded" in used.stdout


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")
def test_only_what_is_new_is_compiled_and_what_fails_leaves_nothing_old(small_tree: Path) -> None:
    """Each library succeeds or fails by itself; a changed header makes the objects anew of those who include it."""

    def compiled() -> set[str]:
        lines = build(small_tree, FASTQAT_CUDA_ARCHS="fast").splitlines()
        return {name for name in ("module", "other") if any(f" -c csrc/cpu/{name}.cpp" in line for line in lines)}

    def number() -> str:
        return run("-c", "import _C; print(_C.number)", cwd=small_tree / "fastqat").stdout.strip()

    (small_tree / "fastqat" / "_C_cuda.abi3.so").write_bytes(b"of an earlier build")
    assert compiled() == {"module", "other"} and number() == "1"
    why = reason(small_tree, "_C_cuda")
    assert "FASTQAT_CUDA_ARCHS: wanted 'all' or numbers such as '80 90', got 'fast'" in why or "no nvcc" in why

    (small_tree / "csrc/cpu/shared.h").write_text("#define NUMBER 2\n")
    assert compiled() == {"module"} and number() == "2"

    (small_tree / "csrc/cpu/other.cpp").write_text("no C++\n")
    assert compiled() == {"other"}
    assert reason(small_tree, "_C").startswith("CompileError")


def test_metadata_asks_for_little() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dependencies = ["torch>=2.10", "numpy"]' in text
    assert 'requires-python = ">=3.10"' in text
