"""Small networks that the trainer knows by name; the library itself works on any ``nn.Module``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastqat.models.digits import DigitsNet
from fastqat.models.resnet import resnet20


class Entry(NamedTuple):
    """A network in :data:`MODELS`: how to make it from the number of classes, and the (C, H, W) of its images."""

    make: Callable[[int], nn.Module]
    image_shape: tuple[int, int, int]


MODELS = {"digits": Entry(DigitsNet, (1, 8, 8)), "resnet20": Entry(resnet20, (3, 32, 32))}


def build(name: str, num_classes: int = 10) -> nn.Module:
    """Build the network of a name with fresh weights.

    Args:
        name: a key of :data:`MODELS`.
        num_classes: number of logits the network returns.

    Raises:
        ValueError: no network has this name; the message lists those that exist.
    """
    if name not in MODELS:
        raise ValueError(f"model: wanted one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name].make(num_classes)
