"""The operator list and the package structure: both forms of every op, fake kernels, opcheck, backends, imports."""

from __future__ import annotations

import ast
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import torch
from cases import Call, GridCase, grid_call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastqat
from fastqat.ops import schema, select

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGE = Path(fastqat.__file__).resolve().parent
FORMS = ("returning", "out")
of_ops = pytest.mark.parametrize("op", schema.OPS)


def layouts() -> Iterator[GridCase]:
    """Small tensors of every layout: contiguous, transposed, strided, channels-last, expanded, empty."""
    qrange, number = torch.tensor([0, 15], dtype=torch.int32), itertools.count()
    for shape, layout in itertools.product(((2, 3, 4, 5), (6, 7), (2, 0, 3)), cases.LAYOUTS):
        x = cases.with_layout(cases.random(shape, next(number)), layout)
        if x is not None:
            scale, shift = torch.full((shape[1],), 0.3), torch.full((shape[1],), 2.0)
            yield GridCase(f"{shape} {layout}", x, scale, shift, None, qrange, 1, 1e-6)
            yield GridCase(f"{shape} {layout}", x.bfloat16(), scale[:0].new_ones(1), None, None, qrange, None, 0.0)


def calls_of(op: str) -> list[Call]:
    """A few calls of an op."""
    if op in cases.PLAIN_OPS:
        return list(itertools.islice(cases.plain_calls(op, few=True), 0, None, 16))
    return [grid_call(op, case, number) for number, case in enumerate(layouts())]


def results_of(op: str, form: str, arguments: tuple) -> tuple:
    """Results of one form of an op."""
    if form == "returning":
        results = getattr(torch.ops.fastqat, op)(*arguments)
        return results if isinstance(results, (tuple, list)) else (results,)
    results = schema.OPS[op].allocate(*arguments)
    assert getattr(torch.ops.fastqat, f"{op}_out")(*arguments, *results) is None
    return results


@of_ops
def test_both_forms_are_defined(op: str) -> None:
    """fastqat::<op> returns results, fastqat::<op>_out mutates its last arguments and returns nothing."""
    entry = schema.OPS[op]
    returning = getattr(torch.ops.fastqat, op).default._schema
    out = getattr(torch.ops.fastqat, f"{op}_out").default._schema
    assert len(returning.returns) == len(entry.results) and len(out.returns) == 0
    assert [a.name for a in out.arguments] == [a.name for a in returning.arguments] + list(entry.results)
    written = [a.name for a in out.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == list(entry.results)
    assert not any(a.alias_info for a in returning.arguments)
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.fastqat, op).default.tags


@pytest.mark.parametrize("form", FORMS)
@of_ops
def test_opcheck(op: str, form: str) -> None:
    """torch.library.opcheck: schema, autograd registration, fake kernel, AOT dispatch with dynamic shapes."""
    calls = calls_of(op)
    for call in calls[:: max(1, len(calls) // 4)]:
        name, arguments = op, call.arguments
        if form == "out":
            name, arguments = f"{op}_out", (*arguments, *schema.OPS[op].allocate(*arguments))
        torch.library.opcheck(getattr(torch.ops.fastqat, name).default, arguments)


@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
@of_ops
def test_fake_kernels_tell_the_truth(op: str, backend: str) -> None:
    """Shapes, strides, dtypes of fake and real results are equal, and those that schema.py allocates."""
    for call in calls_of(op):
        real = results_of(op, "returning", call.arguments)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call.arguments]
            pretended = results_of(op, "returning", tuple(fake))
        declared = schema.OPS[op].allocate(*call.arguments)
        for name, a, b, c in zip(schema.OPS[op].results, real, pretended, declared, strict=True):
            for other in (b, c):
                # torch's own empty_like gives an empty tensor other strides in its fake form
                want, got = ((t.shape, t.stride() if t.numel() else (), t.dtype) for t in (a, other))
                assert want == got, f"{call.label}: {name}: real {want}, fake or declared {got}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ("reference", "cpu", "triton"), indirect=True)
@of_ops
def test_inputs_are_not_written(op: str, backend: str, form: str) -> None:
    """An op changes nothing but its results, and a result is never a view of an input."""
    for call in calls_of(op)[:6]:
        tensors = [a for a in call.arguments if isinstance(a, Tensor)]
        before = [t.clone() for t in tensors]
        results = results_of(op, form, call.arguments)
        for t, kept in zip(tensors, before, strict=True):
            assert torch.equal(t, kept), call.label
            starts = [r.untyped_storage().data_ptr() for r in results if r.numel()]
            assert t.numel() == 0 or t.untyped_storage().data_ptr() not in starts, call.label


@pytest.mark.parametrize("module", ("reference", "triton"))
def test_python_backends_have_every_op(module: str) -> None:
    """A backend module defines each op of the schema as a function of its arguments and results, and no other form."""
    backend = importlib.import_module(f"fastqat.ops.{module}")
    if module == "triton" and select.status()["triton"] != "available":
        pytest.skip(f"triton: {select.status()['triton']}")
    assert [op for op in schema.OPS if not callable(getattr(backend, op, None))] == []


@of_ops
def test_cpu_library_has_every_op(op: str) -> None:
    """_C registers both forms of each op for the CPU."""
    if select.status()["cpu"] != "available":
        pytest.skip(f"cpu: {select.status()['cpu']}")
    for name in (op, f"{op}_out"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastqat::{name}", "CPU")


def test_backends_are_listed() -> None:
    """status() names each backend and says "available" or why not; choosing restores what was chosen before."""
    state = select.status()
    assert list(state) == ["cuda", "triton", "cpu", "reference"] and state["reference"] == "available"
    assert all(state.values())
    before = select.current_backend()
    with select.use_backend("reference"):
        assert select.current_backend() == "reference"
        with pytest.raises(ValueError, match="reference.*got 'tpu'"):
            select.use_backend("tpu")
    assert select.current_backend() == before
    for name, reason in state.items():
        if reason != "available":
            with pytest.raises(RuntimeError) as error:
                select.use_backend(name)
            assert name in str(error.value) and reason in str(error.value)


# Lower may not import higher; modules of one rank may import each other. The root re-exports what is below it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("ops", "_version"),
    ("functional", "arguments", "autograd", "multi_tensor", "one_tensor", "dorefa", "gradients"),
    ("ranges", "schedules"),
    ("nn",),
    ("<method>",),
    ("<root>",),
    ("models", "train", "export", "html_report"),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def rank_of(module: str) -> int:
    """Rank of a dotted module below fastqat; a module with no place of its own is a method."""
    parts = module.split(".")
    return RANK["<root>"] if len(parts) == 1 else RANK.get(parts[1], RANK["<method>"])


def imports_of(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Modules of fastqat that a source imports, wherever in the file; known: the modules that exist."""
    base = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "fastqat")
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            if origin.split(".")[0] == "fastqat":
                inner = [f"{origin}.{a.name}" for a in node.names]
                yield from (name if name in known else origin for name in inner)


def violations(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """Imports against the direction; sources: module -> (text, is it a package)."""
    found = []
    for module, (text, is_package) in sources.items():
        for target in imports_of(text, module, is_package, set(sources)):
            if rank_of(target) > rank_of(module):
                found.append(f"{module} imports {target}")
    return found


def package_sources() -> dict[str, tuple[str, bool]]:
    """Every Python file of the package."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["fastqat", *path.relative_to(PACKAGE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        sources[".".join(parts[:-1] if is_package else parts)] = (path.read_text(), is_package)
    return sources


def test_imports_point_one_way() -> None:
    """ops <- functional <- ranges <- nn <- methods <- models, train, export, html_report <- cli."""
    sources = package_sources()
    assert "fastqat.ops.schema" in sources
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    (
        ("fastqat.ops.x", "from fastqat.functional import f", True),
        ("fastqat.ops.x", "def f():\n    import fastqat.nn", True),
        ("fastqat.ops.x", "from .. import functional", True),
        ("fastqat.ops.x", "import fastqat", True),
        ("fastqat.functional", "from fastqat import nn", True),
        ("fastqat.nn.x", "from ..time import step", True),
        ("fastqat.time", "from fastqat.train import loop", True),
        ("fastqat.train.x", "from fastqat.cli import main", True),
        ("fastqat.ops.x", "from fastqat.ops import schema\nfrom . import schema\nimport torch", False),
        ("fastqat.nn.x", "from .. import functional\nfrom ..ranges import mse", False),
        ("fastqat.time", "from fastqat.nn import FakeQuant", False),
        ("fastqat.train.x", "import fastqat\nfrom fastqat.models import resnet", False),
        ("fastqat.cli", "from fastqat.train import loop", False),
    ),
)
def test_import_rule_finds_what_it_should(module: str, text: str, wrong: bool) -> None:
    """The rule itself, on imports in every spelling."""
    names = ("fastqat.functional", "fastqat.nn", "fastqat.ops.schema", "fastqat.cli", "fastqat.train", "fastqat.time")
    sources = {name: ("", False) for name in names} | {module: (text, False)}
    assert bool(violations(sources)) == wrong
