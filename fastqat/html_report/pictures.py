"""The pictures of a report. Each function returns a ``matplotlib.figure.Figure``."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastqat.bn_divergence import Divergence
from fastqat.html_report.recorded import Arrays, Histogram
from fastqat.oscillation import COUNTS, KINDS
from fastqat.train.extras import import_extra
from fastqat.train.run_folder import Row

WIDTH = 9.0  # inches
INK, FAINT = "#1f2937", "#9ca3af"
BEFORE, AFTER = "#9ca3af", "#2563eb"
KIND_COLORS = dict(zip(KINDS, ("#ea580c", "#2563eb", "#0d9488", "#7c3aed", "#db2777", "#6b7280"), strict=True))


def draw_accuracy(fp32: list[Row], qat: list[Row]) -> Any:
    """Test accuracy over the epochs of quantization-aware training, before and after re-estimation of BN statistics.

    Args:
        fp32, qat: the rows of these phases; at least one of ``qat``.
    """
    figure, (axes,) = new_figure(1, 1, 3.4)
    lines = (
        ("test_accuracy", AFTER, "o-", "running statistics"),
        ("bn_test_accuracy", "#ea580c", "s-", "re-estimated statistics"),
    )
    for key, color, style, label in lines:
        rows = [row for row in qat if key in row]
        if rows:
            values = [row[key] for row in rows]
            marks = {"markersize": 4, "linewidth": 1.6}
            axes.plot([row["epoch"] for row in rows], values, style, color=color, label=label, **marks)
    if fp32:
        level = fp32[-1]["test_accuracy"]
        axes.axhline(level, color=INK, linestyle="--", linewidth=1, label=f"float32, {level:.2%}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _percent(axes)
    decorate(axes, "test accuracy", "epoch of quantization-aware training")
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_shares(rows: list[Row]) -> Any:
    """Oscillating and frozen share of the weights, and changes of codes per step, over the steps.

    Args:
        rows: of ``steps.jsonl``, at least one.
    """
    freezes = any(row[kind][COUNTS.index("frozen")] for row in rows for kind in KINDS if kind in row)
    panels = {"oscillating": "oscillating weights", "frozen": "frozen weights", "changes": "codes that change per step"}
    if not freezes:
        del panels["frozen"]
    figure, axes = new_figure(1, len(panels), 3.2)
    for kind in [kind for kind in KINDS if kind in rows[-1]]:
        tracked = [row for row in rows if kind in row]
        steps = np.array([row["step"] for row in tracked])
        counts = dict(zip(COUNTS, np.array([row[kind] for row in tracked]).T, strict=True))
        weights = np.maximum(counts["weights"], 1)
        counts["changes"] = np.diff(counts["transitions"], prepend=0) / np.diff(steps, prepend=0)
        for panel, name in zip(axes, panels, strict=True):
            panel.plot(steps, counts[name] / weights, color=KIND_COLORS[kind], linewidth=1.4, label=kind)
    for panel, title in zip(axes, panels.values(), strict=True):
        _percent(panel)
        panel.set_ylim(bottom=0)
        decorate(panel, title, "step")
    axes[0].legend(frameon=False)
    return figure


def draw_histograms(pairs: list[tuple[Histogram, Histogram]]) -> Any:
    """Where the latent weights of some layers lie between the codes, before and after.

    Args:
        pairs: of each layer, before and after.
    """
    figure, axes = new_figure(len(pairs), 2, 2.3 * len(pairs))
    for row, pair in enumerate(pairs):
        top = 1.08 * max(each.shares.max() for each in pair)
        for column, (each, color, when) in enumerate(zip(pair, (BEFORE, AFTER), ("before", "after"), strict=True)):
            panel = axes[2 * row + column]
            panel.stairs(each.shares, each.edges, fill=True, color=color)
            _thresholds(panel.axvline, each.qmin, each.qmax)
            panel.set_xlim(each.edges[0], each.edges[-1])
            panel.set_ylim(0, max(top, 1e-9))
            panel.set_xticks(range(each.qmin, each.qmax + 1))
            _percent(panel)
            decorate(panel, f"{each.name or 'layer'} ({each.kind}), {when}", "latent weight / scale, in codes")
    return figure


def draw_between_codes(start: list[Histogram], end: list[Histogram]) -> Any:
    """Where the latent weights of each kind of layer lie between two neighbouring codes, before and after.

    Args:
        start, end: of all layers.
    """
    kinds = [kind for kind in KINDS if any(each.kind == kind for each in end)]
    figure, axes = new_figure(1, len(kinds), 3.0)
    for panel, kind in zip(axes, kinds, strict=True):
        for found, color, label in ((start, BEFORE, "before"), (end, AFTER, "after")):
            counts = sum(each.between_codes for each in found if each.kind == kind)
            shares = counts / max(np.sum(counts), 1)
            panel.stairs(
                shares, np.linspace(0, 1, len(shares) + 1), color=color, linewidth=1.6, label=label, baseline=None
            )
        panel.axvline(0.5, color=FAINT, linestyle=":", linewidth=1)
        panel.set_xlim(0, 1)
        panel.set_ylim(bottom=0)
        panel.set_xticks([0, 0.5, 1], ["code", "threshold", "next code"])
        for label, side in zip(panel.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set_horizontalalignment(side)
        _percent(panel)
        decorate(panel, kind, "")
    axes[0].legend(frameon=False)
    return figure


def draw_traces(traces: Arrays) -> Any:
    """Latent value, code and averaged code of single weights over the last recorded steps.

    Args:
        traces: as :meth:`fastqat.train.traces.Traces.arrays` returns them.
    """
    count = sum(key.startswith("name") for key in traces)
    columns = max(len(traces[f"index{i}"]) for i in range(count))
    figure, axes = new_figure(count, columns, 2.1 * count)
    for i in range(count):
        steps, index = traces[f"steps{i}"], traces[f"index{i}"]
        for column in range(columns):
            panel = axes[i * columns + column]
            if column >= len(index):
                panel.set_visible(False)
                continue
            latent, code, average = (traces[f"{name}{i}"][column] for name in ("latent", "code", "average"))
            panel.plot(steps, code, color=FAINT, linewidth=0.8, drawstyle="steps-post", label="code")
            panel.plot(steps, latent, color=AFTER, linewidth=1.2, label="latent weight / scale")
            panel.plot(steps, average, color="#ea580c", linewidth=1.4, label="average of the codes")
            seen = np.concatenate([latent, code])
            lowest, highest = int(np.floor(seen.min())), int(np.ceil(seen.max()))
            _thresholds(panel.axhline, lowest, highest)
            panel.set_ylim(lowest - 0.15, highest + 0.15)
            panel.yaxis.get_major_locator().set_params(integer=True)
            decorate(panel, f"{traces[f'name{i}']} ({traces[f'kind{i}']}), weight {index[column]}", "step", 8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper left", ncols=3)
    return figure


def draw_divergence(rows: list[Divergence]) -> Any:
    """Divergence of the running statistics of BN of each layer, in the order of the network.

    Args:
        rows: one per layer.
    """
    figure, (axes,) = new_figure(1, 1, 3.2)
    for kind in [kind for kind in KINDS if any(row.kind == kind for row in rows)]:
        places = [place for place, row in enumerate(rows, 1) if row.kind == kind]
        values = [row.mean for row in rows if row.kind == kind]
        axes.bar(places, values, color=KIND_COLORS[kind], width=0.75, label=f"after a {kind} layer")
    if any(row.mean > 0 for row in rows):
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(0.3, len(rows) + 0.7)
    decorate(axes, "KL divergence, mean over the channels", "layer of batch normalisation, from input to output")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=len(KINDS))
    return figure


def draw_gradients(rows: list[Row]) -> Any:
    """Grid, share beyond it and error of large gradients of each layer, over the steps.

    Args:
        rows: of ``gradients.jsonl``, at least one.
    """
    first = next(iter(rows[-1]["layers"].values()))
    panels: dict[str, tuple[str, ...]] = {"range of the gradient": ("high", "low")}
    if first["gamma"] is not None:
        panels = {"gamma: part of the largest": ("gamma",)}
    panels |= {"share beyond the grid": ("beyond",), "error of large gradients": ("large_error",)}
    figure = _draw_layers(rows, panels, "step")
    if first["gamma"] is not None:
        figure.axes[0].set_ylim(0, 1.03)
    return figure


def draw_activations(rows: list[Row]) -> Any:
    """Range, clipped share and signal-to-noise ratio of the activations of each layer, over the epochs.

    Args:
        rows: of ``activations.jsonl``, at least one.
    """
    panels = {"range of the grid": ("high", "low"), "clipped share": ("clipped",), "SQNR in dB": ("sqnr",)}
    figure = _draw_layers(rows, panels, "epoch")
    for axes in figure.axes:
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_layers(rows: list[Row], panels: dict[str, tuple[str, ...]], time: str) -> Any:
    """A panel with a line per layer, from the first one (dark) to the last one (light), for numbers of layers."""
    figure, axes = new_figure(1, len(panels), 3.4)
    names = list(rows[-1]["layers"])
    colors = import_extra("matplotlib").colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    for panel, (title, keys) in zip(axes, panels.items(), strict=True):
        for name, color in zip(names, colors, strict=True):
            for key in keys:
                found = [(row[time], row["layers"].get(name, {}).get(key)) for row in rows]
                points = [(when, np.nan if value is None else value) for when, value in found]
                marker = "o" if len(points) == 1 else None
                panel.plot(*zip(*points, strict=True), color=color, linewidth=1.1, marker=marker, label=name)
        if keys in (("beyond",), ("clipped",)):
            _percent(panel)
        decorate(panel, title, time)
    handles, labels = axes[-1].get_legend_handles_labels()
    shown = sorted({0, len(names) // 2, len(names) - 1})
    chosen = [[each[i] for i in shown] for each in (handles, labels)]
    figure.legend(*chosen, frameon=False, loc="outside upper left", ncols=3, fontsize=9)
    return figure


def new_figure(rows: int, columns: int, height: float, sharey: bool = False) -> tuple[Any, Any]:
    """Return a figure of panels, and the panels, row by row."""
    # Not pyplot: it would choose a window system and keep every figure alive.
    figure = import_extra("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=sharey, squeeze=False).ravel()


def decorate(axes: Any, title: str, below: str, size: int = 10) -> None:
    """Give a panel its title, the name of its horizontal axis, and the look of all."""
    axes.set_title(title, loc="left", fontsize=size, color=INK)
    axes.set_xlabel(below, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter(import_extra("matplotlib.ticker").PercentFormatter(1.0))


def _thresholds(line: Any, lowest: int, highest: int) -> None:
    """Draw the values half-way between codes."""
    for code in range(lowest, highest):
        line(code + 0.5, color="#dc2626", linestyle=":", linewidth=0.8)
