"""The section on learned bit-widths: how they moved and where they stayed, and what was weighed against what."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastqat.html_report.page import Section, folded, table
from fastqat.html_report.pictures import AFTER, FAINT, INK, decorate, new_figure
from fastqat.html_report.recorded import Recorded
from fastqat.html_report.sections import LeftOut, pictured
from fastqat.train.extras import import_extra
from fastqat.train.run_folder import Row

COLORS = {"weight": AFTER, "activation": "#ea580c"}
SHOWN = {"weight": "weights", "activation": "activations"}
SMOOTHED = 40  # parts of the time axis that a curve of losses is the mean of


def bit_widths(run: Recorded) -> Section:
    """N and its ceiling over the steps, the two losses, and where each width ended."""
    rows = run.bit_widths
    if not rows:
        raise LeftOut("the run has not updated its bit-widths yet")
    config, names = run.config, list(rows[-1]["widths"])
    text = (
        "AdaQAT moves real-valued bit-widths N against the gradient of the task loss plus lambda times a cost of "
        f"hardware, here lambda = {config.adaqat:g} and the cost {config.adaqat_cost!r}. Quantizers have the ceiling "
        "of N (steps). A width that goes to and fro about an integer is frozen (dots)."
    )
    of_layers = any(_layer(name) for name in names)
    if of_layers:
        drawn = {"bit_widths": draw_means(rows, config.adaqat), "bit_widths_of_layers": draw_layers(rows)}
    else:
        drawn = {"bit_widths": draw_widths(rows, config.adaqat)}
    section = pictured("Bit-widths", text, **drawn)
    ends = _ends(rows, of_layers)
    section.body += folded("Each layer", ends) if of_layers else ends
    return section


def _ends(rows: list[Row], of_layers: bool) -> str:
    """A table of where each width is in the end."""
    last, frozen = rows[-1], _frozen_at(rows)
    cells = [
        [
            *([_layer(name)] if of_layers else []),
            SHOWN[_kind(name)],
            f"{n:.2f}",
            str(math.ceil(n)),
            str(last["oscillations"][name]),
            f"step {frozen[name]}" if name in frozen else "no",
        ]
        for name, n in last["widths"].items()
    ]
    heading = (*(("layer",) if of_layers else ()), "of", "N", "bits", "oscillations", "frozen")
    return table(heading, cells, texts=len(heading) - 4, caption=f"at step {last['step']}")


def draw_widths(rows: list[Row], lam: float) -> Any:
    """N with its ceiling, and the two parts of the loss, over the steps.

    Args:
        rows: of ``steps.jsonl``, at least one; of a whole network.
        lam: lambda.
    """
    figure, (widths, losses) = new_figure(1, 2, 3.4)
    steps, frozen = [row["step"] for row in rows], _frozen_at(rows)
    for name in rows[-1]["widths"]:
        values = np.array([row["widths"][name] for row in rows])
        color = COLORS[_kind(name)]
        widths.plot(steps, np.ceil(values), color=color, alpha=0.4, linewidth=2.5, drawstyle="steps-post")
        widths.plot(steps, values, color=color, linewidth=1.3, label=f"N of {SHOWN[_kind(name)]}")
        if name in frozen:
            end = values[steps.index(frozen[name])]
            widths.plot([frozen[name]], [end], "o", color=color, markersize=6, markeredgecolor=INK, zorder=3)
    widths.yaxis.get_major_locator().set_params(integer=True)
    widths.set_ylim(top=max(8.2, widths.get_ylim()[1]))
    decorate(widths, "bit-widths, and their ceilings", "step")
    widths.legend(frameon=False, fontsize=9)
    _draw_losses(losses, rows, lam)
    return figure


def draw_means(rows: list[Row], lam: float) -> Any:
    """Means of N over the layers, their extremes as bands, and the two parts of the loss, over the steps.

    Args:
        rows, lam: as for :func:`draw_widths`, of layers.
    """
    figure, (widths, losses) = new_figure(1, 2, 3.4)
    steps = [row["step"] for row in rows]
    for kind, color in COLORS.items():
        names = [name for name in rows[-1]["widths"] if _kind(name) == kind]
        if names:
            values = np.array([[row["widths"][name] for name in names] for row in rows])
            widths.fill_between(steps, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
            widths.plot(steps, values.mean(1), color=color, linewidth=1.5, label=f"N of {SHOWN[kind]}")
    decorate(widths, "bit-widths: mean, least and largest of the layers", "step")
    widths.legend(frameon=False, fontsize=9)
    _draw_losses(losses, rows, lam)
    return figure


def draw_layers(rows: list[Row]) -> Any:
    """The bits of each layer over the steps, as a map; a dot where a width was frozen.

    Args:
        rows: of ``steps.jsonl``, at least one; of layers.
    """
    names = list(rows[-1]["widths"])
    kinds = [kind for kind in COLORS if any(_kind(name) == kind for name in names)]
    layers = list(dict.fromkeys(map(_layer, names)))
    figure, axes = new_figure(1, len(kinds), 1.1 + 0.17 * len(layers), sharey=True)
    steps, frozen = [row["step"] for row in rows], _frozen_at(rows)
    borders = np.array([*steps, steps[-1] + 1]) - 0.5
    lowest, highest = (f(math.ceil(row["widths"][n]) for row in rows for n in names) for f in (min, max))
    colors = import_extra("matplotlib").colormaps["viridis"].resampled(highest - lowest + 1)
    for panel, kind in zip(axes, kinds, strict=True):
        bits = np.full((len(layers), len(rows)), np.nan)
        for place, layer in enumerate(layers):
            name = f"{layer}.{kind}"
            if name in names:
                bits[place] = np.ceil([row["widths"][name] for row in rows])
            if name in frozen:
                panel.plot([frozen[name]], [place], ".", color="#ffffff", markeredgecolor=INK, markersize=7)
        places = np.arange(len(layers) + 1) - 0.5
        drawn = panel.pcolormesh(borders, places, bits, cmap=colors, vmin=lowest - 0.5, vmax=highest + 0.5)
        decorate(panel, f"bits of {SHOWN[kind]}", "step")
        panel.grid(visible=False)
        panel.set_yticks(range(len(layers)), layers, fontsize=7)
    axes[0].invert_yaxis()
    bar = figure.colorbar(drawn, ax=list(axes), ticks=range(lowest, highest + 1), pad=0.01, aspect=15)
    bar.ax.tick_params(labelsize=8)
    return figure


def _draw_losses(panel: Any, rows: list[Row], lam: float) -> None:
    found = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    if found:
        steps, values = (np.array(each) for each in zip(*found, strict=True))
        panel.plot(steps, values, color=FAINT, linewidth=0.6, alpha=0.6)
        parts = [each for each in np.array_split(np.arange(len(steps)), min(SMOOTHED, len(steps))) if len(each)]
        smooth = [[array[part].mean() for part in parts] for array in (steps, values)]
        panel.plot(*smooth, color=INK, linewidth=1.6, label="task loss, and its mean")
    cost = [lam * row["hardware"] for row in rows]
    label = "lambda * cost of hardware"
    panel.plot([row["step"] for row in rows], cost, color="#0d9488", linewidth=1.6, drawstyle="steps-post", label=label)
    panel.set_yscale("log")
    decorate(panel, "losses", "step")
    panel.legend(frameon=False, fontsize=9)


def _frozen_at(rows: list[Row]) -> dict[str, int]:
    """The step in which each width was frozen, by its name."""
    frozen: dict[str, int] = {}
    for row in rows:
        for name in row["frozen"]:
            frozen.setdefault(name, row["step"])
    return frozen


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _layer(name: str) -> str:
    """The layer of a width; "" of one that is that of a whole network."""
    return name.rpartition(".")[0]
