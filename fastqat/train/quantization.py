"""The quantizers that the options of a run describe."""

from __future__ import annotations

import fastqat
from fastqat.train.config import Config


def quantizers(config: Config) -> fastqat.QConfig:
    """Return the quantizers of a layer, which learn their scales.

    Args:
        config: the options.
    """
    axis = 0 if config.per_channel else None
    weight = fastqat.QSpec(bits=config.bits_weight, axis=axis, range=config.range, learn="scale")
    if not config.bits_activation:
        return fastqat.QConfig(weight, None)
    return fastqat.QConfig(weight, fastqat.QSpec(bits=config.bits_activation, range=config.range, learn="scale"))
