"""Which backend runs the ops: registration with the dispatcher, :func:`use_backend` and :func:`status`.

Every op is one dispatcher op, so that compiled and exported graphs name no backend. The reference implementation stands
behind all devices; ``_C`` lays itself over it for the CPU when it is imported, Triton for CUDA. Asking for a backend by
name lays it over both.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch

from fastqat.ops import multi_tensor, native, reference, schema, triton

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
    """Kernel of an op in :data:`schema.IN_PLACE_OPS`; those of the reference have a module of their own."""
    return getattr(multi_tensor if backend is reference else backend, name)


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


def _why_not_cuda() -> str:
    return "this version has no CUDA C++ library; on a GPU Triton runs"


REASONS: dict[str, Callable[[], str | None]] = {
    "cuda": _why_not_cuda,
    "triton": triton.why_not,
    "cpu": native.why_not,
    "reference": lambda: None,
}


def status() -> dict[str, str]:
    """State of each backend: ``"available"``, or the reason why it cannot run."""
    return {name: why() or "available" for name, why in REASONS.items()}


def current_backend(device: str = "cpu") -> str:
    """Name of the backend that runs ops on tensors of a device type ("cpu" or "cuda")."""
    if _chosen != "auto":
        return _chosen
    if device == "cpu":
        return "reference" if native.why_not() else "cpu"
    return "reference" if device != "cuda" or triton.why_not() else "triton"


def _choose(name: str) -> None:
    global _override, _chosen
    if name != "auto" and name not in REASONS:
        raise ValueError(f"backend: wanted one of {', '.join(['auto', *REASONS])}; got {name!r}")
    if name != "auto" and (reason := REASONS[name]()):
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    if _override is not None:
        _override._destroy()
        _override = None
    if name in ("reference", "triton"):
        _override = torch.library.Library(schema.NAMESPACE, "IMPL")
        for key in DEVICE_KEYS:
            _register(_override, reference if name == "reference" else triton, key)
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
native.load()
if triton.why_not() is None:
    _register(_automatic, triton, "CUDA")
