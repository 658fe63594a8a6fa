"""Checkpoints that an earlier version wrote: they load as they did, and give the outputs that it gave.

``data/checkpoints_before.pt`` has, for each kind of quantizer, its state_dict, its bit-width and what it made of ``x``;
and the same of a network whose bit-widths AdaQAT had changed, with the state of AdaQAT.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastqat
from fastqat import FakeQuant, Oscillation, QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")
BEFORE = torch.load(Path(__file__).parent / "data" / "checkpoints_before.pt", weights_only=True)
X = BEFORE["x"]
KINDS: dict[str, dict[str, Any]] = {
    "per_tensor": {"bits": 4},
    "per_channel": {"bits": 3, "axis": 0, "learn": "scale", "grad_scale": "lsq"},
    "groups_affine": {"bits": 4, "axis": 0, "group_size": 3, "symmetric": False, "learn": "scale+zero_point"},
    "learned_offset": {"bits": 2, "axis": 1, "learn": "scale+offset"},
    "running_minmax": {"bits": 8, "range": "running_minmax"},
    "in_hindsight": {"bits": 4, "range": "in_hindsight"},
    "restricted": {"bits": 3, "restricted": True, "range": "percentile"},
    "dorefa": vars(fastqat.quantizers.dorefa_weight(3)),
    "tracked": {"bits": 3, "axis": 0, "oscillation": Oscillation(momentum=0.3, freeze_threshold=0.7)},
}


@pytest.mark.parametrize("name", BEFORE["quantizers"])
def test_quantizers(name: str) -> None:
    """Without a word, to the bit; and the state is in the one that is saved again."""
    saved, fq = BEFORE["quantizers"][name], FakeQuant(**KINDS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fq.load_state_dict(saved["state"])
    assert fq.bits == saved["bits"] and fq.initialized and torch.equal(fq.eval()(X), saved["y"])
    state = fq.state_dict()
    assert state.keys() == saved["state"].keys()
    for key in ("scale", "zero_point", "offset", "range_low", "qrange", "step", "eps"):
        if key in state:
            assert torch.equal(state[key], saved["state"][key])
    if fq.tracker is not None:
        assert fq.tracker.frozen().any() and torch.equal(fq.tracker.counts[:4], saved["state"]["tracker.counts"][:4])
    fq.train()(2 * X)


def test_a_network_of_adaqat() -> None:
    """Its bit-widths, its weights, and the way it goes on."""
    saved = BEFORE["adaqat"]
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    fastqat.prepare(net, QConfig(weight=QSpec(bits=4, axis=0), activation=QSpec(bits=4)))
    widths = fastqat.AdaQAT(net, lam=0.5, lr_weight=0.9, lr_activation=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.load_state_dict(saved["state"])
        widths.load_state_dict(saved["widths"])
    assert {name: tuple(bits) for name, bits in fastqat.bit_widths(net).items()} == saved["bits"]
    assert torch.equal(net.eval()(X), saved["y"]) and widths.state_dict() == saved["widths"]
