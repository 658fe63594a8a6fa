"""Pictures from files, cut and scaled to one size: the augmentation and the preparation that are usual for ImageNet."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from fastqat.ops.checks import fail
from fastqat.train.extras import import_extra

AREAS, ASPECTS, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
RESIZE = 256 / 224  # a test image is scaled until its shorter edge is so many times the window in its middle


def open_image(file: Path) -> Any:
    """Read a picture as a ``PIL.Image`` in RGB.

    Raises:
        ValueError: it cannot be read, or has more than 8 bits per channel.
    """
    image_module = import_extra("PIL.Image")
    try:
        with image_module.open(file) as image:
            mode = image.mode
            rgb = image.convert("RGB")
    except Exception as error:  # which one depends on the format and on where the damage is
        raise ValueError(
            f"{file}: wanted an image that Pillow can read; got {error or type(error).__name__}"
        ) from error
    if mode.startswith(("I", "F")):  # Pillow would cut them off at 255
        fail(ValueError, str(file), "at most 8 bits per channel", f"an image of mode {mode}")
    return rgb


def random_resized_crop(image: Any, size: int, numbers: random.Random) -> Any:
    """Scale a random window to a square and mirror it with probability 1/2.

    The window has 8 % to 100 % of the area and an aspect ratio of 3/4 to 4/3 (Szegedy et al., "Going Deeper with
    Convolutions", 2015, section 6).

    Args:
        image: a ``PIL.Image``.
        size: edge of the result in pixels.
        numbers: decides everything.
    """
    image_module = import_extra("PIL.Image")
    window = random_window(image.width, image.height, numbers)
    square = image.crop(window).resize((size, size), image_module.Resampling.BILINEAR)
    return square.transpose(image_module.Transpose.FLIP_LEFT_RIGHT) if numbers.random() < 0.5 else square


def random_window(width: int, height: int, numbers: random.Random) -> tuple[int, int, int, int]:
    """Draw the window of :func:`random_resized_crop`: (left, top, right, bottom) in pixels.

    Ten windows that do not fit are followed by the largest one in the middle that keeps to the aspect ratios.
    """
    for _ in range(ATTEMPTS):
        area = width * height * (AREAS[0] + (AREAS[1] - AREAS[0]) * numbers.random())
        low, high = (math.log(aspect) for aspect in ASPECTS)
        aspect = math.exp(low + (high - low) * numbers.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(numbers.random() * (width - w + 1)), int(numbers.random() * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECTS[1])))
    h = min(height, max(1, round(width / ASPECTS[0])))
    return _in_the_middle(width, height, w, h)


def resized_centre(image: Any, size: int) -> Any:
    """Scale a picture until its shorter edge is 256/224 of ``size``, and cut ``size x size`` from its middle."""
    image_module = import_extra("PIL.Image")
    shorter = round(size * RESIZE)
    width, height = (edge * shorter // min(image.size) for edge in image.size)
    scaled = image.resize((width, height), image_module.Resampling.BILINEAR)
    return scaled.crop(_in_the_middle(width, height, size, size))


def _in_the_middle(width: int, height: int, w: int, h: int) -> tuple[int, int, int, int]:
    left, top = round((width - w) / 2), round((height - h) / 2)
    return left, top, left + w, top + h
