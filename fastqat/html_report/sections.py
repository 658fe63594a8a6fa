"""The sections of a report: each makes its part of the page of what a run has recorded, or says why it cannot."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastqat.bn_divergence import Divergence
from fastqat.html_report import pictures
from fastqat.html_report.divergence import measured
from fastqat.html_report.page import Cell, Section, figure, folded, paragraph, table
from fastqat.html_report.recorded import Histogram, Recorded, histograms
from fastqat.oscillation import KINDS
from fastqat.train.bn_statistics import explanation
from fastqat.train.run_folder import Row

DPI = 150
SHOWN_LAYERS = 3  # of which histograms are drawn


class LeftOut(Exception):
    """A section for which something is missing; the message says what."""


def results(run: Recorded) -> Section:
    """What each phase has reached, and the options of the run."""
    last = list({row["phase"]: row for row in run.rows}.values())
    tests = {"test_accuracy": "top-1", "bn_test_accuracy": "BN re-estimated", "ema_test_accuracy": "averaged weights"}
    tests = {key: name for key, name in tests.items() if any(key in row for row in last)}
    rows = [[row["phase"], *(_share(row.get(key)) for key in tests), f"{row['test_loss']:.4f}"] for row in last]
    qat = run.of_phase("QAT")
    if len(qat) > 1:
        best = max(qat, key=lambda row: row["test_accuracy"])
        title = f"best epoch of QAT ({best['epoch']})"
        rows.append([title, *(_share(best.get(key)) for key in tests), f"{best['test_loss']:.4f}"])
    body = table(("after", *tests.values(), "loss"), rows, caption="on the test images")
    body += "".join(paragraph(f"{text}.") for text in map(explanation, last) if text)
    if at_floor := last[-1].get("scales_at_floor"):
        body += paragraph(f"{at_floor:,} scales are at their floor: what these quantize is 0, or clipped to nothing.")
    options = [(name, "" if value is None else str(value)) for name, value in run.config.plain().items()]
    return Section("Results", body + folded("Options of the run", table(("option", "value"), options, texts=2)))


def accuracy(run: Recorded) -> Section:
    """Accuracy of every epoch of QAT, before and after re-estimation of BN statistics."""
    qat = run.of_phase("QAT")
    if not qat:
        raise LeftOut("the run has no epoch of quantization-aware training yet")
    text = (
        "Where weights oscillate, the running statistics of batch normalisation describe a mixture of networks. "
        "The accuracy with these statistics then jumps from epoch to epoch, and re-estimated statistics add points."
    )
    if not any("bn_test_accuracy" in row for row in qat):
        text += " This run was not tested with re-estimated statistics (option reestimate_bn)."
    return pictured("Accuracy", text, accuracy=pictures.draw_accuracy(run.of_phase("FP32"), qat))


def shares(run: Recorded) -> Section:
    """Oscillating and frozen share of the weights over the steps."""
    if not run.steps:
        raise LeftOut(_why_nothing(run))
    threshold = run.epochs[-1]["threshold"] if run.epochs else 0.005
    text = (
        f"A weight oscillates while the moving average of its reversals per step is above {threshold:g}. Frozen ones "
        "keep their code for good, and count as oscillating no longer."
    )
    return pictured("Oscillating and frozen weights", text, shares=pictures.draw_shares(run.steps))


def layers(run: Recorded) -> Section:
    """Numbers of the last epoch: by kind of layer, and layer by layer."""
    if not run.epochs or not run.epochs[-1]["layers"]:
        raise LeftOut(_why_nothing(run))
    last = run.epochs[-1]
    found: dict[str, Row] = last["layers"]
    heading = ("weights", "oscillating", "frozen", "changes per step", "per 1,000 weights", "oscillations")
    kinds = []
    for kind in [kind for kind in KINDS if any(row["kind"] == kind for row in found.values())]:
        mine = [row for row in found.values() if row["kind"] == kind]
        kinds.append([f"{kind} ({len(mine)})", *_numbers(_joined(mine))])
    body = table(("kind of layer", *heading), [*kinds, [f"all tracked layers ({len(found)})", *_numbers(last)]])
    largest = max((row[name] for row in found.values() for name in ("oscillating", "frozen")), default=0.0)
    rows = [[name or "(model)", row["kind"], *_numbers(row, largest)] for name, row in found.items()]
    body += table(("layer", "kind", *heading), rows, texts=2, caption="each layer, in the order of the network")
    if last["untracked"]:
        untracked = sorted(last["untracked"].items())
        body += table(("not tracked", "why"), [(name or "(model)", why) for name, why in untracked], texts=2)
    return Section(f"Layers, after epoch {last['epoch']}", body)


def latent_weights(run: Recorded) -> Section:
    """Histograms of the latent weights, before and after."""
    if run.start is None:
        raise LeftOut(_why_nothing(run))
    if run.end is None:
        raise LeftOut("no epoch of quantization-aware training has ended yet")
    start, end = histograms(run.start), histograms(run.end)
    if not end:
        raise LeftOut(_why_nothing(run))
    both = [name for name in end if name in start and start[name].counts.shape == end[name].counts.shape]
    if not both:
        raise LeftOut("no layer has the same codes before and after")
    text = (
        "Latent weights, in units of the scale, before quantization-aware training and after its last epoch. Weights "
        "that are pulled to both sides of a threshold (dotted) end up on it: these are the ones that oscillate."
    )
    section = pictured(
        "Latent weights",
        text,
        between_codes=pictures.draw_between_codes([start[n] for n in both], [end[n] for n in both]),
        latent_weights=pictures.draw_histograms([(start[name], end[name]) for name in _shown(run, both, end)]),
    )
    return section


def traces(run: Recorded) -> Section:
    """The last steps of the weights that oscillate most."""
    if run.traces is None:
        raise LeftOut(_why_nothing(run))
    text = (
        "Of each kind of layer that with most oscillating weights, and some of these, in units of the scale: the code "
        "changes whenever the latent weight crosses a threshold (dotted). The average of the codes says for which part "
        "of the time a weight was on either side; freezing rounds it, and from then on the code stays as it is."
    )
    return pictured("Weights that oscillate", text, traces=pictures.draw_traces(run.traces))


def gradients(run: Recorded) -> Section:
    """How the grids of gradients followed them, layer by layer."""
    if not run.gradients or not run.gradients[-1]["layers"]:
        raise LeftOut(_why_no_quantizers("gradients", run.config.bits_gradient))
    alpha = run.config.gradient_alpha
    text = (
        f"Gradients of {run.config.bits_gradient} bits, method {run.config.gradient_method}. Large gradients are the "
        f"top {alpha:.2%} of each layer by magnitude; their error is the mean of |g - Q(g)| over them, divided by the "
        "largest |g|. Beyond the grid, gradients are clipped. One line is one layer, dark ones come first."
    )
    section = pictured("Gradients", text, gradients=pictures.draw_gradients(run.gradients))
    last = run.gradients[-1]
    heading = ("layer", "gamma", "low", "high", "largest", "beyond", "error of large gradients")
    rows = [
        [name, _number(row["gamma"], ".3f"), *(_number(row[key], ".2e") for key in ("low", "high", "largest"))]
        + [_number(row["beyond"], ".4%"), _number(row["large_error"], ".4f")]
        for name, row in last["layers"].items()
    ]
    section.body += folded("Each layer", table(heading, rows, caption=f"at step {last['step']}"))
    return section


def activations(run: Recorded) -> Section:
    """What quantization does to the activations of each layer."""
    if not run.activations:
        raise LeftOut(_why_no_quantizers("activations", run.config.bits_activation))
    text = (
        "Ends of the grid, share of the elements beyond them, and ratio of signal to quantization noise of what each "
        "layer's activation quantizer sees, on a training batch after each epoch. Dark lines come first."
    )
    section = pictured("Activations", text, activations=pictures.draw_activations(run.activations))
    last = run.activations[-1]
    rows = [
        [name, *(_number(row[key], ".3g") for key in ("low", "high")), _number(row["clipped"], ".3%")]
        + [_number(row["sqnr"], ".1f")]
        for name, row in last["layers"].items()
    ]
    heading = ("layer", "low", "high", "clipped", "SQNR in dB")
    section.body += folded("Each layer", table(heading, rows, caption=f"after epoch {last['epoch']}"))
    return section


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _why_no_quantizers(what: str, bits: int) -> str:
    return f"the run has recorded no {what} yet" if bits else f"the {what} of the run stay in float"


def divergence(run: Recorded, root: Path | None) -> Section:
    """Divergence of the statistics of BN, depth-wise against point-wise."""
    if not run.of_phase("QAT"):
        raise LeftOut("the run has no epoch of quantization-aware training yet")
    try:
        rows = measured(run, root)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise LeftOut(" ".join(str(error).split())) from None
    if not rows:
        raise LeftOut("the network has no batch normalisation with running statistics")
    text = (
        "How far the running statistics of batch normalisation are from those of the network as it is: "
        "Kullback-Leibler divergence of normal distributions, in nats, between the statistics re-estimated from "
        f"{run.config.bn_batches} training batches and the running ones that training has ended with."
    )
    section = pictured("Statistics of batch normalisation", text, bn_divergence=pictures.draw_divergence(rows))
    section.body += _divergence_tables(rows)
    return section


def _divergence_tables(rows: list[Divergence]) -> str:
    kinds = []
    for kind in [kind for kind in KINDS if any(row.kind == kind for row in rows)]:
        mine = [row for row in rows if row.kind == kind]
        mean = sum(row.mean for row in mine) / len(mine)
        largest = max(row.largest for row in mine)
        kinds.append([f"after a {kind} layer", str(len(mine)), f"{mean:.2e}", f"{largest:.2e}"])
    body = table(("batch normalisation", "layers", "mean KL", "largest of a channel"), kinds)
    each = [
        [row.layer, row.after or "-", row.kind, str(row.channels), f"{row.mean:.2e}", f"{row.largest:.2e}"]
        for row in rows
    ]
    heading = ("batch normalisation", "after", "kind", "channels", "mean KL", "largest of a channel")
    return body + folded("Each layer", table(heading, each, texts=3))


def _why_nothing(run: Recorded) -> str:
    if not run.config.track_oscillations:
        return "the run did not track the oscillations of its weights (option track_oscillations)"
    return "the run has tracked no weight, or for too few steps"


def pictured(title: str, text: str, **drawn: Any) -> Section:
    """Return a section with a text and pictures.

    Args:
        title: its heading.
        text: plain.
        drawn: matplotlib figures; their names are those of the files, and the texts for those who do not see them.
    """
    files = {name: _png(picture) for name, picture in drawn.items()}
    body = paragraph(text) + "".join(figure(png, name.replace("_", " ")) for name, png in files.items())
    return Section(title, body, files)


def _png(picture: Any) -> bytes:
    content = io.BytesIO()
    picture.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def _shown(run: Recorded, names: list[str], found: dict[str, Histogram]) -> list[str]:
    """The layer of each kind with most weights that oscillate or are frozen, that with most of them first."""
    last: dict[str, Row] = run.epochs[-1]["layers"] if run.epochs else {}

    def moved(name: str) -> float:
        row = last.get(name, {"weights": 0, "oscillating": 0.0, "frozen": 0.0})
        return row["weights"] * (row["oscillating"] + row["frozen"])

    best: dict[str, str] = {}
    for name in sorted(names, key=moved, reverse=True):
        best.setdefault(found[name].kind, name)
    return list(best.values())[:SHOWN_LAYERS]


def _joined(rows: list[Row]) -> Row:
    """The numbers of several layers as those of one."""
    weights = sum(row["weights"] for row in rows)
    joined: Row = {name: sum(row[name] for row in rows) for name in ("transitions_per_step", "oscillations")}
    for name in ("oscillating", "frozen"):
        joined[name] = sum(row[name] * row["weights"] for row in rows) / max(weights, 1)
    return {"weights": weights, **joined}


def _numbers(row: Row, largest: float = 0.0) -> list[Cell | str]:
    """The cells of a layer; with the largest share of all layers, those of shares have bars."""

    def bar(share: float) -> Cell:
        return Cell(f"{share:.2%}", share / largest if largest else None)

    rate = row["transitions_per_step"]
    return [
        f"{row['weights']:,}",
        bar(row["oscillating"]),
        bar(row["frozen"]),
        f"{rate:,.2f}",
        f"{1000 * rate / max(row['weights'], 1):.3f}",
        f"{row['oscillations']:,}",
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


SECTIONS: tuple[tuple[str, Callable[[Recorded], Section]], ...] = (
    ("Accuracy", accuracy),
    ("Oscillating and frozen weights", shares),
    ("Layers", layers),
    ("Latent weights", latent_weights),
    ("Weights that oscillate", traces),
)
# Of runs that record their quantizers.
OF_QUANTIZERS: tuple[tuple[str, Callable[[Recorded], Section]], ...] = (
    ("Gradients", gradients),
    ("Activations", activations),
)
