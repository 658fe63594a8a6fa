"""Groups of the parameters of a network for any optimizer: weights decay, biases, norms and quantizers do not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.ops import checks


def parameter_groups(
    model: nn.Module, *, lr: float | Tensor, weight_decay: float = 0.0, quantizer_lr: float | Tensor | None = None
) -> list[dict[str, Any]]:
    """Group the parameters that are trained, for any optimizer of torch.

    ::

        optimizer = torch.optim.AdamW(fastqat.parameter_groups(model, lr=1e-3, weight_decay=0.05, quantizer_lr=1e-5))

    Weights decay. Biases, parameters of normalisation layers, and others of at most one dimension do not, which is
    the usual practice. Nor do scales and offsets of quantizers: decay would shrink the range of what they quantize,
    however small its error already is. Every parameter with ``requires_grad`` is in one group, and a shared one once.

    Call it when the parameters are those that will be trained: after ``prepare``, and after ``fully_shard`` or what
    else replaces them; scales that a later ``calibrate`` sets are in it already.

    Args:
        model: any module, prepared or not, also within DistributedDataParallel, FSDP, torch.compile or LoRA.
        lr: learning rate of all but the quantizers.
        weight_decay: of the weights.
        quantizer_lr: learning rate of the quantizers' parameters; None is ``lr``.

    Returns:
        One dictionary with ``params``, ``lr``, ``weight_decay`` and ``name`` for each of "weights", "biases and norms"
        and "quantizers", in this order, and in each the order of ``model.named_parameters()``; empty ones are left out.

    Raises:
        TypeError: a rate is no number.
        ValueError: a rate is negative or not finite; nothing in the model is trained; a parameter has no shape yet; a
            parameter is a flat one of FSDP, in which weights and scales are one. The message names the argument.
    """
    quantizer_rate = lr if quantizer_lr is None else quantizer_lr
    for name, value in {"lr": lr, "weight_decay": weight_decay, "quantizer_lr": quantizer_rate}.items():
        _check_rate(name, value)
    groups: dict[str, dict[str, Any]] = {
        "weights": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "biases and norms": {"params": [], "lr": lr, "weight_decay": 0.0},
        "quantizers": {"params": [], "lr": quantizer_rate, "weight_decay": 0.0},
    }
    for group, parameter in _grouped(model):
        groups[group]["params"].append(parameter)
    found = [{**group, "name": name} for name, group in groups.items() if group["params"]]
    if not found:
        checks.fail(ValueError, "model", "a module with parameters that are trained", f"{type(model).__name__} without")
    return found


def _grouped(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter that is trained, once, and the name of its group."""
    quantizers = [m for m in model.modules() if isinstance(m, (FakeQuant, GradientFakeQuant))]
    learned = {id(p) for quantizer in quantizers for p in quantizer.parameters(recurse=False)}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            if id(parameter) in learned:
                yield "quantizers", parameter
            else:
                _check_whole(f"{path}.{name}" if path else name, parameter)
                yield ("weights" if _decays(module, name, parameter) else "biases and norms"), parameter


def _decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """True for a weight: what is multiplied by, and neither shifts nor normalises."""
    if name.endswith("bias") or isinstance(module, _NormBase) or "norm" in type(module).__name__.lower():
        return False
    # FSDP with original parameters shows each one as a piece of a flat tensor: its dimensions say nothing.
    return parameter.dim() > 1 or getattr(parameter, "_fsdp_flattened", False)


def _check_whole(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        checks.fail(ValueError, "model", "parameters of known shape", f"none yet for {name}: run the model once")
    if getattr(parameter, "_is_flat_param", False):
        got = f"the flat {name}, in which weights and scales are one"
        checks.fail(ValueError, "model", "parameters of their own, as FSDP has with use_orig_params=True", got)


def _check_rate(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        return  # on a device, for graphs; reading it back would wait for the device
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        checks.fail(TypeError, name, "a number", repr(value))
    if not (math.isfinite(value) and value >= 0):
        checks.fail(ValueError, name, "a finite number of at least 0", value)
