"""Networks that the trainer knows by name, and those of other packages; the library itself works on any Module."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastqat.models.digits import DigitsNet
from fastqat.models.mobilenetv2 import mobilenetv2
from fastqat.models.resnet import resnet20
from fastqat.ops.checks import fail

ImageShape = tuple[int, int, int]  # C, H, W
DECIDED_BY_DATA = ("num_classes", "image_shape")  # arguments of a network that are no options

MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits": DigitsNet,
    "resnet20": resnet20,
    "mobilenetv2": mobilenetv2,
}


def build(name: str, num_classes: int = 10, image_shape: ImageShape | None = None, /, **options: Any) -> nn.Module:
    """Build the network of a name with fresh weights.

    Args:
        name: a key of :data:`MODELS`, or ``package.module:callable``, found as ``python -m`` would, from the current
            directory too. The callable gets ``num_classes`` if it takes that, and the options.
        num_classes: number of logits the network returns.
        image_shape: (C, H, W) of the images it shall take, tried with one of them; None tries nothing.
        options: further keyword arguments of the network, such as ``width``.

    Raises:
        ValueError: there is no such network, an option is unknown or wrong, what the callable returns is no network, or
            it does not turn such images into logits.
    """
    if name not in MODELS and ":" not in name:
        fail(ValueError, "model", f"one of {', '.join(MODELS)}, or package.module:callable", _nearest(name, MODELS))
    make = MODELS[name] if name in MODELS else _imported(name)
    known, takes_any = _keywords(make)
    given: dict[str, Any] = {"num_classes": num_classes} if "num_classes" in known or takes_any else {}
    if name in MODELS and image_shape is not None and "image_shape" in known:
        given["image_shape"] = image_shape
    for option in options:
        if option in DECIDED_BY_DATA or (option not in known and not takes_any):
            names = [key for key in known if key not in DECIDED_BY_DATA]
            wanted = f"one of {', '.join(names)}" if names else "none, as it has no options"
            fail(ValueError, f"options of model {name}", wanted, _nearest(option, names))
    try:
        model = make(**given, **options)
    except Exception as error:  # of any callable
        if name in MODELS:  # which name their argument themselves
            raise
        arguments = ", ".join(f"{key}={value!r}" for key, value in {**given, **options}.items())
        raise ValueError(f"model {name}: wanted a network from ({arguments}); got {_text(error)}") from error
    if not isinstance(model, nn.Module):
        fail(ValueError, f"model {name}", "a callable that returns a torch.nn.Module", type(model).__name__)
    if image_shape is not None:
        check_fits(name, model, num_classes, image_shape)
    return model


def check_fits(name: str, model: nn.Module, num_classes: int, image_shape: ImageShape) -> None:
    """Check that a network turns images of a shape into logits, by one black image in evaluation mode.

    An image on the meta device would cost less, but not every network runs there, and lazy layers get their shape here.

    Args:
        name: of the network, for the message.
        model: its training mode is restored.
        num_classes: number of logits wanted.
        image_shape: (C, H, W).

    Raises:
        ValueError: it fails, or returns something else.
    """
    training = {module: module.training for module in model.modules()}
    wanted = f"a network that turns images of shape {image_shape} into {num_classes} logits"
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *image_shape))
    except Exception as error:  # whatever a network may raise for images that it does not take
        raise ValueError(f"model {name}: wanted {wanted}; got {_text(error)}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
    if not isinstance(logits, torch.Tensor):
        fail(ValueError, f"model {name}", wanted, f"a result of type {type(logits).__name__}")
    elif logits.shape != (1, num_classes):
        fail(ValueError, f"model {name}", wanted, f"a result of shape {list(logits.shape)} for one image")


def _imported(name: str) -> Callable[..., Any]:
    """Import ``package.module:callable``."""
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:  # as under `python -m`; it may import more of its own later
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a missing module, or anything that one does when it is imported
        raise ValueError(f"model {name}: wanted a module {module_name!r} to import; got {_text(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [each for each in dir(found) if not each.startswith("_")]
            fail(ValueError, f"model {name}", f"an attribute {part!r} in {module_name}", _nearest(part, public, "none"))
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        what = f"an object of type {type(found).__name__}"
        fail(ValueError, f"model {name}", "a callable that returns a torch.nn.Module", what)
    return found


def _keywords(make: Callable[..., Any]) -> tuple[list[str], bool]:
    """Return the names that a callable takes as keywords, and whether it takes any others."""
    if getattr(make, "__init__", None) is nn.Module.__init__:  # a class whose signature takes all, and refuses all
        return [], False
    try:
        parameters = inspect.signature(make).parameters.values()
    except (ValueError, TypeError):  # written in C
        return [], False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [parameter.name for parameter in parameters if parameter.kind in by_name]
    return names, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _nearest(word: str, known: Iterable[str], got: str | None = None) -> str:
    """Say what came, and the known word that it may have meant."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return (got or repr(word)) + (f"; did you mean {near[0]!r}?" if near else "")


def _text(error: Exception) -> str:
    """Kind and first line of an error of someone else's."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
