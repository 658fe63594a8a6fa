"""Learning curves of a run as a picture."""

from __future__ import annotations

from typing import Any

from fastqat.train.extras import import_extra

COLORS = {"FP32": "#2563eb", "PTQ": "#6b7280", "QAT": "#ea580c"}
REESTIMATED = "#16a34a"
MARGIN = 0.25  # of the shown accuracies, left free below them


def draw_curves(rows: list[dict[str, Any]], title: str) -> Any:
    """Draw training loss and test accuracy over the epochs, with the levels of FP32 and PTQ as lines.

    Args:
        rows: the rows of ``metrics.jsonl``; epochs of QAT are drawn behind those of FP32.
        title: above the picture.

    Returns:
        a ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Not pyplot: it would choose a window system and keep every figure alive.
    figure = import_extra("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    loss_axes, accuracy_axes = figure.subplots(1, 2, sharex=True)
    fp32, ptq, qat = ([row for row in rows if row["phase"] == phase] for phase in COLORS)
    fp32_epochs = fp32[-1]["epoch"]  # 0 if the weights came from a checkpoint

    fp32_training = [row for row in fp32 if row["epoch"]]
    quantized = ptq + qat  # QAT starts from what PTQ has reached
    reestimated = [row for row in quantized if "bn_test_accuracy" in row]
    _draw(loss_axes, "train_loss", fp32_training, "FP32 training", COLORS["FP32"])
    _draw(loss_axes, "train_loss", qat, "QAT training", COLORS["QAT"], fp32_epochs)
    _draw(accuracy_axes, "test_accuracy", fp32_training, "FP32 training", COLORS["FP32"])
    _draw(accuracy_axes, "test_accuracy", quantized, "QAT training", COLORS["QAT"], fp32_epochs)
    _draw(accuracy_axes, "bn_test_accuracy", reestimated, "QAT, BN re-estimated", REESTIMATED, fp32_epochs)

    levels = {"FP32": fp32[-1]["test_accuracy"], "PTQ": ptq[-1]["test_accuracy"]}
    for phase, level in levels.items():
        accuracy_axes.axhline(level, color=COLORS[phase], linestyle="--", linewidth=1.2, label=f"{phase} {level:.2%}")
    shown = [*levels.values(), *(row["test_accuracy"] for row in qat)]
    shown += [row["bn_test_accuracy"] for row in reestimated]
    margin = MARGIN * max(max(shown) - min(shown), 0.02)
    # The first epochs of FP32 may lie below what is shown: the differences between the phases are what matters.
    accuracy_axes.set_ylim(min(shown) - margin, min(max(shown) + margin, 1.005))

    loss_axes.set_yscale("log")
    accuracy_axes.yaxis.set_major_formatter(import_extra("matplotlib.ticker").PercentFormatter(1.0))
    for axes, name in ((loss_axes, "training loss"), (accuracy_axes, "test accuracy")):
        _decorate(axes, name)
    return figure


def _draw(axes: Any, column: str, rows: list[dict[str, Any]], label: str, color: str, first_epoch: int = 0) -> None:
    if not rows:
        return
    epochs = [first_epoch + row["epoch"] for row in rows]
    values = [row[column] for row in rows]
    marker = "o" if len(rows) < 40 else ""
    axes.plot(epochs, values, color=color, marker=marker, markersize=3.5, linewidth=1.6, label=label)


def _decorate(axes: Any, name: str) -> None:
    axes.set_title(name, loc="left", fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
