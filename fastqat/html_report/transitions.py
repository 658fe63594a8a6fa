"""The section on scheduled transition rates: what was wanted, what came, and the learning rates that made it so."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastqat.html_report.page import Section, folded, table
from fastqat.html_report.pictures import INK, decorate, new_figure
from fastqat.html_report.recorded import Recorded
from fastqat.html_report.sections import LeftOut, pictured
from fastqat.train.extras import import_extra
from fastqat.train.run_folder import Row

LOWEST = 1e-3  # of what is drawn, times the largest target: a log axis would go on to 0


def transition_rates(run: Recorded) -> Section:
    """Target, running rate and learning rate of every layer over the steps."""
    rows = run.transitions
    if not rows:
        raise LeftOut("the run has recorded no rates yet")
    config = run.config
    text = (
        "A transition is a weight whose code changes in a step. Their rate, the part of the weights of a layer that "
        f"does so, has a target that begins at {config.transition_rate:g} * sqrt(bits) and follows the schedule "
        f"{config.transition_schedule!r}; the learning rate of each layer goes up where its running rate is below the "
        f"target, and down where it is above (rule {config.transition_rule!r}). One line per layer, from the first "
        "(dark) to the last (light). A running rate begins at the target and forgets that only after "
        f"{1 / (1 - config.transition_momentum):.0f} steps or more."
    )
    section = pictured("Transition rates", text, transition_rates=draw_transitions(rows, config.lr))
    section.body += folded("Each layer", _ends(rows[-1], config.lr))
    return section


def _ends(row: Row, lr: float) -> str:
    """A table of where each layer is in the end."""
    columns = zip(row["layers"], row["target"], row["running"], row["rate"], row["factor"], strict=True)
    cells = [[name, *(f"{value:.3g}" for value in (*rates, lr * factor, factor))] for name, *rates, factor in columns]
    heading = ("layer", "target", "running rate", "rate of the step", "learning rate", "times the given one")
    return table(heading, cells, texts=1, caption=f"at step {row['step']}")


def draw_transitions(rows: list[Row], lr: float) -> Any:
    """Running rates beside their target, and learning rates, of every layer, over the steps; both on log axes.

    Args:
        rows: of ``steps.jsonl``, at least one.
        lr: the learning rate that the factors multiply.
    """
    figure, (rates, learning) = new_figure(1, 2, 3.6)
    names = rows[-1]["layers"]
    steps = [row["step"] for row in rows]
    values = {key: np.array([row[key] for row in rows], dtype=float) for key in ("running", "target", "factor")}
    colors = import_extra("matplotlib").colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    for layer, (name, color) in enumerate(zip(names, colors, strict=True)):
        rates.plot(steps, values["running"][:, layer], color=color, linewidth=1.1, label=name)
        learning.plot(steps, lr * values["factor"][:, layer], color=color, linewidth=1.1)
    for target in np.unique(values["target"], axis=1).T:  # layers of equal bit-widths have one
        rates.plot(steps, target, color=INK, linestyle="--", linewidth=1.6, label="target")
    learning.axhline(lr, color=INK, linestyle="--", linewidth=1.2)
    for panel in (rates, learning):
        panel.set_yscale("log")
        panel.tick_params(which="minor", labelsize=7, labelcolor=INK)
    highest = values["target"].max()
    if highest > 0 and values["target"].min() < LOWEST * highest:
        rates.set_ylim(bottom=LOWEST * highest)
    decorate(rates, "running rate of transitions, and its target", "step")
    decorate(learning, "learning rate, and the given one", "step")
    handles, labels = rates.get_legend_handles_labels()
    shown = [*sorted({0, len(names) // 2, len(names) - 1}), len(names)]
    chosen = [[each[i] for i in shown] for each in (handles, labels)]
    figure.legend(*chosen, frameon=False, fontsize=9, loc="outside upper left", ncols=len(shown))
    return figure
