"""Statistics of batch normalisation of a quantized network: those of training, or re-estimated ones.

Those of training are averages over steps in which weights still changed, or of a network that was not quantized yet. A
quantized network may lose much of its accuracy by that alone.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastqat.train.config import Config
from fastqat.train.run_folder import Row

CAUSES = {
    "PTQ": "were gathered before the network was quantized",
    "QAT": "were gathered while weights still changed",
}


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the running statistics of all layers of batch normalisation, by their state_dict keys."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    return {
        f"{name}.{key}" if name else key: layer.get_buffer(key).clone()
        for name, layer in layers.items()
        for key in ("running_mean", "running_var")
    }


def are_reestimated_in(config: Config, phase: str, epoch: int) -> bool:
    """True if a row of the metrics has results with re-estimated statistics.

    Args:
        config: the options.
        phase, epoch: of the row.
    """
    ends = phase == "PTQ" or (phase, epoch) == ("QAT", config.epochs)
    return phase != "FP32" and (config.reestimate_bn == "always" or (config.reestimate_bn == "end" and ends))


def are_better(reestimated: tuple[float, float], trained: tuple[float, float]) -> bool:
    """True if a network is better with re-estimated statistics: by its accuracy, and by its loss where that is equal.

    Args:
        reestimated, trained: loss and accuracy with these, on the same images.
    """
    return (reestimated[1], -reestimated[0]) > (trained[1], -trained[0])


def explanation(row: Row) -> str:
    """Say why a row has two accuracies, and which statistics are saved; "" where it has one, or equal ones.

    Args:
        row: of ``metrics.jsonl``.
    """
    if row.get("bn_test_accuracy") in (None, row["test_accuracy"]) or "bn_chosen" not in row:  # of an older version
        return ""
    saved = "the re-estimated ones" if row["bn_chosen"] else "those of training"
    return (
        f"{row['phase']}: {row['bn_test_accuracy']:.2%} with re-estimated statistics of batch normalisation, "
        f"{row['test_accuracy']:.2%} with those of training, which {CAUSES[row['phase']]}; saved with {saved}, "
        "which are better on training images"
    )
