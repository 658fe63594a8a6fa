"""The package builds without a compiler, works without its library, and says why it has none."""

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


def test_without_a_compiler_the_reason_is_kept_and_the_reference_runs(tree: Path) -> None:
    built = run("setup.py", "build_ext", "--inplace", cwd=tree, CC="/no/such/cc", CXX="/no/such/c++")
    assert built.returncode == 0, built.stderr
    assert "installing without the C++ library" in built.stdout
    assert not list((tree / "fastqat").glob("_C*.so"))

    used = run("-c", USE, cwd=tree, PYTHONPATH=str(tree))
    assert used.returncode == 0, used.stderr
    assert "backend 'cpu' cannot run here: the C++ library fastqat._C was not built" in used.stdout
    assert "/no/such/c" in used.stdout, "the reason of the failed build is lost"

    status = run("-c", STATUS, cwd=tree, PYTHONPATH=str(tree))
    assert status.returncode == 0, status.stderr
    assert "/no/such/c" in status.stdout


def test_a_library_that_cannot_be_loaded_is_not_fatal(tree: Path) -> None:
    (tree / "fastqat" / "_C.abi3.so").write_bytes(b"not a library")
    used = run("-c", USE, cwd=tree, PYTHONPATH=str(tree))
    assert used.returncode == 0, used.stderr
    assert "cannot be loaded" in used.stdout


def test_metadata_asks_for_little() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dependencies = ["torch>=2.10", "numpy"]' in text
    assert 'requires-python = ">=3.10"' in text
