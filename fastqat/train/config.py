"""What one training run is made of: the options of ``fastqat train``, which a YAML recipe names the same way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastqat.train.data import DATASETS
from fastqat.train.option_checks import check
from fastqat.train.options import Option, option, options_of
from fastqat.train.quantization_options import BitWidths, Gradients, Oscillations, Quantization, Transitions

TASK, MACHINE = "what to train", "machine"


@dataclass(frozen=True)
class Task:
    """Data and network."""

    data: str = option("digits", "images", choices=tuple(DATASETS), group=TASK)
    root: Path | None = option(None, "folder of the data files; digits need none", group=TASK, movable=True)
    image_size: int | None = option(None, "edge of the images in pixels, for --data folder", low=1, group=TASK)
    model: str = option("digits", "network by its name, or package.module:callable", group=TASK)
    model_options: dict[str, Any] = option({}, "arguments of the network", group=TASK)
    checkpoint: Path | None = option(None, "FP32 weights to start from, instead of FP32 training", group=TASK)
    limit_train: int | None = option(None, "use only so many training images", low=1, group=TASK)
    out: Path | None = option(None, "folder of the run (default: a new one in runs)", group=TASK)


@dataclass(frozen=True)
class Config(Transitions, Oscillations, Gradients, BitWidths, Quantization, Task):  # fields of the last base come first
    """One run: FP32 training or a checkpoint, quantization and calibration (PTQ), quantization-aware training (QAT).

    Every field says itself what it is for. The defaults are those for the digits; recipes hold what differs for other
    data.

    Raises:
        ValueError: a value is wrong; the message names the field, what was wanted, and what came.
    """

    epochs: int = option(10, "epochs of quantization-aware training", low=0)
    fp32_epochs: int = option(15, "epochs of FP32 training before it", low=0)
    batch_size: int = option(64, "images per step, of all processes together", low=1)
    accumulate: int = option(1, "pieces that a batch is computed in, one after the other, to save memory", low=1)
    optimizer: str = option("sgd", "of the network's weights", choices=("sgd", "adam", "adamw"))
    lr: float = option(0.02, "learning rate of quantization-aware training", low=0)
    fp32_lr: float = option(0.1, "learning rate of FP32 training", low=0)
    quantizer_lr: float = option(1e-5, "learning rate of Adam for the scales", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(1e-4, "weight decay; the scales have none", low=0)
    schedule: str = option("cosine", "of all learning rates", choices=("cosine", "step", "constant"))
    step_at: tuple[float, ...] = option((0.5, 0.75), "parts of a phase after which steps go down", low=0, high=1)
    step_factor: float = option(0.1, "factor of such a step", low=0)
    warmup_epochs: float = option(0.0, "epochs in which the rates rise, of quantization-aware training", low=0)
    fp32_warmup_epochs: float = option(0.0, "the same of FP32 training", low=0)
    label_smoothing: float = option(0.0, "part of each label that is spread over all classes", low=0, high=1)
    clip_norm: float = option(0.0, "largest norm of the gradient of the network's weights; 0 clips none", low=0)
    ema: float = option(0.0, "decay per step of averaged weights, which are tested too; 0 averages none", low=0, high=1)
    seed: int = option(0, "of weights, order and augmentation", low=0, high=2**63 - 1)

    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"), group=MACHINE, movable=True)
    threads: int | None = option(None, "CPU threads (default: torch's choice)", low=1, group=MACHINE, movable=True)
    workers: int = option(0, "processes that read and decode images", low=0, group=MACHINE, movable=True)
    bf16: bool = option(False, "compute in bfloat16 where autocast says so", group=MACHINE)
    compile: bool = option(False, "compile the training step with torch.compile", group=MACHINE)
    save_seconds: float = option(
        300.0, "seconds between checkpoints within an epoch", low=0, group=MACHINE, movable=True
    )
    save_steps: int | None = option(None, "steps between them, besides", low=1, group=MACHINE, movable=True)
    tensorboard: bool = option(False, "write the metrics for TensorBoard too", group=MACHINE, movable=True)

    def __post_init__(self) -> None:
        for name, each in OPTIONS.items():
            try:
                object.__setattr__(self, name, each.accept(getattr(self, name)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        check(self)

    @property
    def bit_widths(self) -> str:
        """Bits of weights, activations and gradients in short, such as W4A4G4, W3, or W4A4-mixed."""
        others = {"A": self.bits_activation, "G": self.bits_gradient}
        of_all = f"W{self.bits_weight}" + "".join(f"{name}{bits}" for name, bits in others.items() if bits)
        return of_all + ("-mixed" if self.bits else "")

    def plain(self) -> dict[str, Any]:
        """Return the options as YAML and JSON can hold them."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: _plain(value) for key, value in kept.items()}


OPTIONS: dict[str, Option] = options_of(Config)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
