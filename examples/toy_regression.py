"""Why weights oscillate, and what stops them, on the smallest example: ``python examples/toy_regression.py``.

A weight w is fitted through its quantizer q, with the straight-through estimator::

    min_w  E[(x * w_star - x * q(w))^2] / 2          gradient: E[x^2] * (q(w) - w_star)

The gradient is never 0 unless w_star is on the grid: w is driven to the threshold between two codes and then flips for
good. With the distance d from w_star to the nearest grid point and the step s of the grid, a fraction 2d/s of the
iterations reverse the last change, whatever the learning rate. The script measures this against the closed form for
several gradient estimators, dampening and freezing, prints the table, and draws what the weight does.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 2.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastqat
from fastqat import schedules

DISTANCES = (0.05, 0.1, 0.2, 0.3, 0.4)  # d / s


@dataclass(frozen=True)
class Method:
    """What a row of the table trains with.

    Attributes:
        name: in the table.
        options: of the quantizer.
        lr: learning rate.
        dampening: lambda of the dampening loss, for the closed form.
        freezes: the weight comes to rest.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.01
    dampening: float = 0.0
    freezes: bool = False


class History(NamedTuple):
    """What each weight did: latent weights and codes, [steps, weights]."""

    latent: Tensor
    code: Tensor


def dampened(weight: float) -> dict[str, Any]:
    """Options of a quantizer with dampening."""
    return {"dampening": fastqat.Dampening(weight, aggregate="sum")}


def freezing(steps: int, momentum: float = 0.01) -> dict[str, Any]:
    """Options of a quantizer that freezes: first what oscillates most, with time all that oscillates at all."""
    return {"oscillation": fastqat.Oscillation(momentum, schedules.cosine(1.0, 5 * momentum, steps=steps))}


def methods(steps: int) -> list[Method]:
    """The rows of the table."""
    return [
        Method("STE, lr 0.01"),
        Method("STE, lr 0.001", lr=0.001),
        Method("EWGS", {"estimator": "ewgs"}),
        Method("PSG", {"estimator": "psg"}),
        Method("sigmoid", {"estimator": "sigmoid"}),
        Method("DSQ", {"estimator": "dsq"}),
        Method("dampening 0.05", dampened(0.05), lr=0.001, dampening=0.05),
        Method("dampening 0.25", dampened(0.25), lr=0.001, dampening=0.25),
        Method("freezing", freezing(steps // 2), freezes=True),
    ]


def train(
    target: Tensor, steps: int, options: dict[str, Any], *, lr: float, scale: float = 1.0, power: float = 1.0
) -> tuple[History, fastqat.FakeQuant]:
    """Fit weights to their targets with SGD, all at once.

    Args:
        target: w_star, float32 [weights], within the range of a signed grid of 4 bits.
        steps: of the optimizer.
        options: of the quantizer.
        lr: learning rate.
        scale: s, the step of the grid.
        power: E[x^2].

    Returns:
        What happened, and the quantizer.
    """
    quantize = fastqat.FakeQuant(4, range="fixed", scale=torch.tensor([scale]), **options)
    # Beside the threshold, where training would lead: by a part of a step, so that no weight ever lies on it.
    weight = torch.nn.Parameter(scale * (torch.floor(target / scale) + 0.5) - 0.037 * lr * power * scale)
    optimizer = torch.optim.SGD([weight], lr=lr)
    history = History(torch.empty(steps, len(target)), torch.empty(steps, len(target)))
    for step in range(steps):
        quantized = quantize(weight)
        history.latent[step], history.code[step] = weight.detach(), quantized.detach() / scale
        loss = 0.5 * power * (quantized - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return History(history.latent, history.code.round()), quantize


def oscillations(code: Tensor) -> Tensor:
    """Where the code changes against its last change: bool [steps - 1, weights] of codes [steps, weights]."""
    change = code.diff(dim=0).sign()
    found, last = torch.zeros_like(change, dtype=torch.bool), torch.zeros_like(change[0])
    for step, now in enumerate(change):
        found[step] = now * last == -1
        last = torch.where(now != 0, now, last)
    return found


def closed_form(distance: float, dampening: float = 0.0, scale: float = 1.0, power: float = 1.0) -> float:
    """Oscillations per iteration in the limit of a small learning rate.

    The weight moves towards the threshold by d * E[x^2] from the near side, by (s - d) * E[x^2] from the far one;
    dampening takes lambda * s from both. An estimator that is symmetric about the threshold scales both alike.
    """
    near = distance * power - dampening * scale
    far = (scale - distance) * power - dampening * scale
    return 2 * near / (near + far) if near > 0 else 0.0


def table(steps: int) -> str:
    """Measured rates of all methods, with the closed form in brackets."""
    lines = ["oscillations per iteration, measured (closed form)"]
    lines.append(f"{'d/s':16}" + "".join(f"{d:>16}" for d in DISTANCES))
    for method in methods(steps):
        history, _ = train(torch.tensor(DISTANCES), steps, method.options, lr=method.lr)
        rates = oscillations(history.code[-steps // 4 if method.freezes else 0 :]).float().mean(0).tolist()
        wants = [0.0 if method.freezes else closed_form(d, method.dampening) for d in DISTANCES]
        lines.append(f"{method.name:16}" + "".join(f"{r:9.4f} ({w:.3f})" for r, w in zip(rates, wants, strict=True)))
    return "\n".join(lines)


def draw(distance: float = 0.1, steps: int = 200) -> Any:
    """Draw latent weight and code over time for six methods; returns a ``matplotlib.figure.Figure``."""
    from matplotlib.figure import Figure

    shown = {
        "STE: flips for ever": {},
        "EWGS: as often": {"estimator": "ewgs"},
        "PSG: as often, half as far": {"estimator": "psg"},
        "dampening, λs < d: slower": dampened(0.05),
        "dampening, λs > d: at rest within the bin": dampened(0.2),
        "freezing: at rest on the nearest code": freezing(steps, momentum=0.02),
    }
    figure = Figure(figsize=(12, 6), layout="constrained")
    figure.suptitle(f"A weight whose optimum lies {distance:g} steps of the grid from the nearest code")
    for axes, (title, options) in zip(figure.subplots(2, 3).flat, shown.items(), strict=True):
        history, _ = train(torch.tensor([distance]), steps, options, lr=0.01)
        axes.plot(history.latent, color="#2563eb", linewidth=1.4, label="latent weight / s")
        axes.axhline(0.5, color="#6b7280", linestyle="--", linewidth=1, label="threshold between codes 0 and 1")
        low, high = min(history.latent.min().item(), 0.491), 0.502
        axes.set_ylim(low - 0.5 * (high - low), high)  # room for the code below
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("iteration")
        code_axes = axes.twinx()
        code_axes.step(range(steps), history.code, color="#ea580c", linewidth=1, where="mid", label="code")
        code_axes.set_ylim(-0.2, 4.5)
        code_axes.set_yticks([0, 1])
    lines = [axes.get_legend_handles_labels() for axes in figure.axes[:1] + figure.axes[-1:]]
    handles, labels = (sum((part[k] for part in lines), []) for k in range(2))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="iterations of each row of the table")
    parser.add_argument("--picture", default="toy_regression.png", help="where to draw it")
    options = parser.parse_args()
    print(table(options.steps))
    draw().savefig(options.picture, dpi=120)
    print(f"\npicture: {options.picture}")


if __name__ == "__main__":
    main()
