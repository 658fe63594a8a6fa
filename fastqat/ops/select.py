"""Which backend runs the ops: registration with the dispatcher, :func:`use_backend` and :func:`status`.

Every op is one dispatcher op, so that compiled and exported graphs name no backend. The reference implementation stands
behind all devices; the compiled libraries lay themselves over it when they are imported, ``_C`` for the CPU and
``_C_cuda`` for CUDA, where Triton takes its place if it cannot run. A Python backend asked for by name covers them all.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch

from fastqat.ops import multi_tensor, native, one_tensor, reference, schema, triton, two_widths

DEVICE_KEYS = ("CPU", "CUDA")

_definitions = torch.library.Library(schema.NAMESPACE, "DEF")
_automatic = torch.library.Library(schema.NAMESPACE, "IMPL")
_override: torch.library.Library | None = None
_chosen = "auto"


def _functional(op: schema.Op, into: Callable[..., None]) -> Callable[..., object]:
    """Turn a function that writes into given results into one that returns new ones."""

    def run(*arguments: object) -> object:
        results = op.allocate(*arguments)
        into(*arguments, *results)
        return results if len(results) > 1 else results[0]

    return run


def _fake(op: schema.Op) -> Callable[..., object]:
    return _functional(op, lambda *_: None)


def _define() -> None:
    """Define every op with its fake kernel and the reference behind all devices."""
    for op in schema.OPS.values():
        for text in (op.schema, op.out_schema):
            _definitions.define(text, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{schema.NAMESPACE}::{op.name}", _fake(op), lib=_definitions)
        torch.library.register_fake(f"{schema.NAMESPACE}::{op.name}_out", lambda *_: None, lib=_definitions)
    for name, text in schema.IN_PLACE_OPS.items():
        _definitions.define(text, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{schema.NAMESPACE}::{name}", lambda *_: None, lib=_definitions)
    _register(_definitions, reference, "CompositeExplicitAutograd")


def _in_place(backend: object, name: str) -> Callable[..., None]:
    """Kernel of an op in :data:`schema.IN_PLACE_OPS`; those of the reference have modules of their own."""
    if backend is reference:
        backend = next(module for module in (multi_tensor, one_tensor, two_widths) if hasattr(module, name))
    return getattr(backend, name)


def _register(library: torch.library.Library, backend: object, key: str) -> None:
    """Register the functions of a Python backend module under a dispatch key."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "overriding a previously registered kernel" is what is wanted
        for op in schema.OPS.values():
            into = getattr(backend, op.name)
            library.impl(op.name, _functional(op, into), key)
            library.impl(f"{op.name}_out", into, key)
        for name in schema.IN_PLACE_OPS:
            library.impl(name, _in_place(backend, name), key)


REASONS: dict[str, Callable[[], str | None]] = {
    "cuda": native.cuda.why_not,
    "triton": triton.why_not,
    "cpu": native.cpu.why_not,
    "reference": lambda: None,
}
# Those that run on tensors of every device.
PYTHON_BACKENDS: dict[str, object] = {"reference": reference, "triton": triton}
# What may run on a device of a type, the best first.
PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def status() -> dict[str, str]:
    """State of each backend: ``"available"``, or the reason why it cannot run."""
    return {name: why() or "available" for name, why in REASONS.items()}


def current_backend(device: str = "cpu") -> str:
    """Name of the backend that runs ops on tensors of a device type ("cpu" or "cuda")."""
    if _chosen in PYTHON_BACKENDS:
        return _chosen
    return next(name for name in PREFERRED.get(device, ("reference",)) if REASONS[name]() is None)


def _choose(name: str) -> None:
    global _override, _chosen
    if name != "auto" and name not in REASONS:
        raise ValueError(f"backend: wanted one of {', '.join(['auto', *REASONS])}; got {name!r}")
    if name != "auto" and (reason := REASONS[name]()):
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    if _override is not None:
        _override._destroy()
        _override = None
    if name in PYTHON_BACKENDS:
        _override = torch.library.Library(schema.NAMESPACE, "IMPL")
        for key in DEVICE_KEYS:
            _register(_override, PYTHON_BACKENDS[name], key)
    _chosen = name


class use_backend(contextlib.ContextDecorator):
    """Choose the backend of all ops, process-wide: ``use_backend("reference")``, or for a while with ``with``.

    Args:
        name: "auto" (the best one for each device), "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot run here; the message says why.
    """

    def __init__(self, name: str) -> None:
        self.previous = _chosen
        _choose(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        _choose(self.previous)


_define()
native.cpu.load()
native.cuda.load()
if (_best := current_backend("cuda")) in PYTHON_BACKENDS:
    _register(_automatic, PYTHON_BACKENDS[_best], "CUDA")  # over _C_cuda, which may be loaded, without code for the GPU
