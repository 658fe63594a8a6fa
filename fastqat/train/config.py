"""What one training run is made of: the options of ``fastqat train``, with their defaults for each data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Config:
    """One run: FP32 training or a checkpoint, quantization and calibration (PTQ), quantization-aware training (QAT).

    The defaults here are those for the digits; :data:`RECIPES` says what differs for other data.

    Args:
        data, root: name of the data set, and the folder of its files if it has files.
        model: name of the network.
        checkpoint: FP32 weights to start from, instead of FP32 training.
        bits_weight, bits_activation: 1 to 8.
        first_last_bits: bits of the first and the last layer; 0 makes them like the others.
        range: how calibration chooses the first scale of each quantizer.
        calibration_batches: training batches used for that.
        epochs, fp32_epochs: epochs of QAT and of FP32 training.
        lr, fp32_lr: learning rates of SGD at their start; a cosine takes them to 0.
        quantizer_lr: learning rate of Adam for the quantizers' parameters; a cosine takes it to 0.
        batch_size: images per step.
        momentum, weight_decay: of SGD, for all parameters of the network; the quantizers' parameters do not decay.
        seed: of the initial weights, the order of the images and their augmentation.
        limit_train: use only so many training images; None is all.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads; None leaves torch's choice. The digits are too small to share: threads only wait there.
        out: folder of the run, which must not exist; None is a new one below ``runs``.
    """

    data: str = "digits"
    root: Path | None = None
    model: str = "digits"
    checkpoint: Path | None = None
    bits_weight: int = 3
    bits_activation: int = 3
    first_last_bits: int = 8
    range: str = "mse"
    calibration_batches: int = 8
    epochs: int = 10
    fp32_epochs: int = 15
    lr: float = 0.02
    fp32_lr: float = 0.1
    quantizer_lr: float = 1e-5
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0
    limit_train: int | None = None
    device: str = "auto"
    threads: int | None = 1
    out: Path | None = None


RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10": {
        "model": "resnet20",
        "bits_weight": 4,
        "bits_activation": 4,
        "epochs": 1,
        "fp32_epochs": 160,
        "lr": 0.01,
        "batch_size": 128,
        "threads": None,
    },
}


def make_config(given: dict[str, Any]) -> Config:
    """Complete the options that were given by the recipe of their data set.

    Args:
        given: fields of :class:`Config`; those left out take the recipe's value.
    """
    recipe = RECIPES.get(given.get("data", Config.data), {})
    return Config(**{**recipe, **given})
