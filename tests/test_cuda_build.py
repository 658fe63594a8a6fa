"""The library ``fastqat._C_cuda``: what it is built for, that it loads and registers, and what runs where it cannot.

No GPU is needed. The library itself is loaded in processes of their own, where torch is told that it has CUDA, and an
empty libtorch_cuda stands in for the real one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastqat import cli
from fastqat.ops import native, schema

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "csrc" / "cuda")]
import cuda_resources  # noqa: E402
import nvcc  # noqa: E402


def has_nvcc() -> bool:
    """Whether this machine builds the library."""
    try:
        return bool(nvcc.find())
    except FileNotFoundError:
        return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="there is no nvcc here")


def program(path: Path, script: str) -> str:
    """Write a shell script; returns its path."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def old_nvcc(tmp_path: Path) -> str:
    """Path of a program that answers like an nvcc from before sm_100."""
    return program(tmp_path / "bin" / "nvcc", "printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\n'")


@pytest.mark.parametrize(
    ("asked", "present", "wanted"),
    (
        ("all", [80], [75, 80, 86, 89, 90, 100, 120]),
        ("90 80", [75], [80, 90]),
        (" 86;89,86 ", [75], [86, 89]),
        ("", [120], [120]),
        (None, [80, 90], [80, 90]),
        (None, [], [90]),
    ),
)
def test_architectures_wanted(
    asked: str | None, present: list[int], wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable, else the GPUs there are, else 90."""
    monkeypatch.delenv("FASTQAT_CUDA_ARCHS", raising=False)
    if asked is not None:
        monkeypatch.setenv("FASTQAT_CUDA_ARCHS", asked)
    monkeypatch.setattr(nvcc, "present", lambda: present)
    assert nvcc.wanted() == wanted


@pytest.mark.parametrize(
    ("script", "found"),
    (
        ("printf '9.0\\n8.6\\n9.0\\n'", [86, 90]),
        ("echo Failed to initialize NVML; exit 9", [120]),
        ("echo [N/A]", [120]),
    ),
)
def test_gpus_present(script: str, found: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nvidia-smi says, else torch."""
    monkeypatch.setenv("PATH", str(Path(program(tmp_path / "bin" / "nvidia-smi", script)).parent), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert nvcc.present() == found


@pytest.mark.parametrize(
    ("asked", "chosen", "unknown"),
    (
        ("all", [75, 80, 86, 90], "sm_89, sm_100, sm_120"),
        ("80", [80], None),
        ("120", [90], "sm_120"),  # whose PTX runs there
        ("70", None, "sm_70"),
    ),
)
def test_an_older_nvcc_leaves_out_what_it_does_not_know(
    asked: str,
    chosen: list[int] | None,
    unknown: str | None,
    old_nvcc: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And says so."""
    monkeypatch.setenv("FASTQAT_CUDA_ARCHS", asked)
    if chosen is None:
        with pytest.raises(ValueError, match="nothing as old as sm_70"):
            nvcc.architectures(old_nvcc)
    else:
        assert nvcc.architectures(old_nvcc) == chosen
    printed = capsys.readouterr().out
    assert printed == (f"fastqat: {old_nvcc} does not know {unknown}\n" if unknown else "")


def test_cuda_home_comes_first(old_nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the PATH, and without any an error that says where it was looked for, or what it lacks."""
    monkeypatch.setenv("NVCC_CCBIN", "/some/compiler")
    monkeypatch.setenv("CUDA_HOME", str(Path(old_nvcc).parent.parent))
    assert nvcc.find() == old_nvcc
    monkeypatch.setenv("CUDA_HOME", "/no/such/folder")
    monkeypatch.setenv("PATH", str(Path(old_nvcc).parent))
    assert nvcc.find() == old_nvcc
    monkeypatch.delenv("NVCC_CCBIN")
    with pytest.raises(FileNotFoundError, match=r"needs a C\+\+ compiler: there is no g\+\+ on the PATH"):
        nvcc.find()
    monkeypatch.setattr(nvcc.os, "access", lambda *_: False)
    with pytest.raises(FileNotFoundError, match="PATH"):
        nvcc.find()


def test_targets_have_code_and_ptx() -> None:
    """PTX is of what the front end compiled the newest architecture as."""
    assert nvcc.targets([90]) == ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    assert nvcc.targets([75, 86, 120]) == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_86]",
        "-gencode=arch=compute_90,code=[sm_120,compute_90]",
    ]


def library_with(
    monkeypatch: pytest.MonkeyPatch, capabilities: object, built: str = "80 86", ptx: int = 80
) -> native.CudaLibrary:
    """A library on a torch with CUDA; capabilities: of the GPUs, or an error."""

    def answer() -> list[int]:
        if isinstance(capabilities, Exception):
            raise capabilities
        return capabilities

    module = SimpleNamespace(architectures=built, ptx=ptx, compiler="12.8.93", capabilities=answer)
    monkeypatch.setitem(sys.modules, "fastqat._C_cuda", module)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    library = native.CudaLibrary("_C_cuda", "CUDA C++")
    library.load()
    return library


@pytest.mark.parametrize(
    ("built", "ptx", "runs", "does_not"),
    (
        ("80 86", 80, (80, 86, 87, 89, 90, 100, 120), (75,)),
        ("90", 90, (90, 100, 103, 120), (75, 80, 89)),
        (
            "75 86 90",
            90,
            (75, 86, 89, 90, 100),
            (80,),
        ),  # code runs on later GPUs of its generation, PTX on all later ones
    ),
)
def test_gpus_that_the_library_runs_on(
    built: str, ptx: int, runs: tuple[int, ...], does_not: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert library_with(monkeypatch, list(runs), built, ptx).why_not() is None
    for capability in does_not:
        assert "no code for cuda:0" in library_with(monkeypatch, [capability], built, ptx).why_not()


def test_a_gpu_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is enough: the ops are registered for all devices."""
    reason = library_with(monkeypatch, [80, 75]).why_not()
    assert "has no code for cuda:1 (7.5), only for capability 8.0, 8.6, and as PTX from 8.0" in reason


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA says is the reason."""
    reason = library_with(monkeypatch, RuntimeError("driver version is insufficient")).why_not()
    assert "cannot run: driver version is insufficient" in reason


def test_the_reason_on_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the library was built, torch is what is missing."""
    monkeypatch.setattr(torch.version, "cuda", None)
    library = native.CudaLibrary("_C_cuda", "CUDA C++")
    library.load()
    assert library.why_not() == f"torch {torch.__version__} has no CUDA" and library.module is None


def test_status_says_what_each_gpu_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Name, capability, and whether the library has code for it."""
    monkeypatch.setattr(native, "cuda", library_with(monkeypatch, [80, 75]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", ("NVIDIA A100", "Tesla T4").__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", ((8, 0), (7, 5)).__getitem__)
    assert cli.main(["status"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "cuda:0 NVIDIA A100, capability 8.0, with code in _C_cuda" in lines
    assert "cuda:1 Tesla T4, capability 7.5, without code in _C_cuda" in lines
    assert "cuda 12.8" in lines
    assert "_C_cuda for capability 8.0, 8.6, and as PTX from 8.0, by nvcc 12.8.93" in lines


# Pretends that torch has CUDA and that there is a GPU of the capability that the environment names, or asks the driver.
PRETEND = """
import importlib, json, os, sys
import torch
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
load = importlib.import_module
def load_and_pretend(name, *arguments):
    module = load(name, *arguments)
    if name == "fastqat._C_cuda" and "CAPABILITY" in os.environ:
        module.capabilities = lambda: [int(os.environ["CAPABILITY"])]
    return module
importlib.import_module = load_and_pretend
from fastqat.ops import select
def kernels():
    dumps = {op: torch._C._dispatch_dump(f"fastqat::{op}") for op in json.loads(os.environ["OPS"])}
    lines = {op: [x for x in dump.splitlines() if x.startswith("CUDA")] for op, dump in dumps.items()}
    return {op: found[0] if found else "none" for op, found in lines.items()}
report = {"status": select.status(), "current": select.current_backend("cuda"), "kernels": kernels()}
with select.use_backend("triton"):
    report["triton"] = select.current_backend("cuda"), kernels()
report["afterwards"] = select.current_backend("cuda"), kernels()
try:
    with select.use_backend("cuda"):
        report["by name"] = select.current_backend("cuda"), select.current_backend("cpu")
except RuntimeError as error:
    report["by name"] = str(error)
print(json.dumps(report))
"""
OPS = [*schema.OPS, *(f"{op}_out" for op in schema.OPS), *schema.IN_PLACE_OPS]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libtorch_cuda that defines what torch's headers declare for CUDA, and does nothing."""
    folder = tmp_path_factory.mktemp("stand_in")
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    texts = [(headers / name).read_text() for name in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h")]
    blocks = [block for text in texts for block in re.findall(r"#ifdef USE_CUDA\n(.*?)#endif // USE_CUDA", text, re.S)]
    names = sorted({name for block in blocks for name in re.findall(r"\b((?:aoti_)?torch_\w+)\(", block)})
    (folder / "empty.c").write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "empty.c", "-o", "libtorch_cuda.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def pretend(stand_in: Path, **environment: str) -> dict:
    """What PRETEND reports. LD_BIND_NOW: every function that the library calls must be found when it is loaded."""
    own = {"LD_BIND_NOW": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OPS": json.dumps(OPS)}
    if torch.version.cuda is None:
        own["LD_LIBRARY_PATH"] = str(stand_in)
    env = {**os.environ, **own, **environment}
    done = subprocess.run([sys.executable, "-c", PRETEND], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_nvcc
def test_the_library_needs_torch_and_keeps_its_runtime_to_itself() -> None:
    """It was built, where nvcc is; names of CUDA's runtime would be mixed up with those of torch's own."""
    path = cuda_resources.library()
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", cuda_resources.ask("readelf", "-d", path))
    assert {"libtorch_cuda.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if "cudart" in name]
    symbols = cuda_resources.ask("nm", "-D", path).splitlines()
    assert [line for line in symbols if re.search(r" cuda[A-Z]", line)] == []
    assert [line for line in symbols if line.endswith(" T PyInit__C_cuda")] != []


@needs_nvcc
def test_the_library_comes_first_where_it_has_code(stand_in: Path) -> None:
    """It registers every op for CUDA; Triton lies over it only while it is asked for."""
    pytest.importorskip("triton", reason="Triton is not installed")
    report = pretend(stand_in, CAPABILITY="90")
    assert report["status"]["cuda"] == "available" and report["current"] == "cuda"
    assert {op: kernel for op, kernel in report["kernels"].items() if "csrc/cuda/register.cpp" not in kernel} == {}
    name, kernels = report["triton"]
    assert name == "triton" and all("select.py" in kernel for kernel in kernels.values())
    assert report["afterwards"] == ["cuda", report["kernels"]]
    assert report["by name"] == ["cuda", "cpu"]


@needs_nvcc
def test_triton_takes_its_place_where_it_has_none(stand_in: Path) -> None:
    """The driver here is none, which the library's own runtime says; asked for by name it is refused with that."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    report = pretend(stand_in)
    assert "CUDA driver version is insufficient" in report["status"]["cuda"]
    assert report["current"] == "triton" and report["afterwards"] == ["triton", report["kernels"]]
    assert all("select.py" in kernel for kernel in report["kernels"].values())
    assert "backend 'cuda' cannot run here: the CUDA C++ library" in report["by name"]
