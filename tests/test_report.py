"""``report`` and the choice of quantizers by name: what they say of a model, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_prepare import CONFIG, Net, X, quantizers
from torch import Tensor, nn

import fastqat
from fastqat import QConfig, QSpec, prepare, report
from fastqat.nn.table import collapsed, table

pytestmark = pytest.mark.usefixtures("one_thread")


def bits(net: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    """(weight, activation) of every layer by name."""
    found: dict[str, Any] = {}
    for row in report(net).quantizers:
        found.setdefault(row.layer, {})[row.tensor] = row.bits
    return {name: (each.get("weight"), each.get("input", each.get("output"))) for name, each in found.items()}


def chain() -> nn.Sequential:
    """Six layers in two blocks."""
    return nn.Sequential(*(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))) for _ in range(2)))


def test_overrides() -> None:
    """A QConfig replaces, a dict changes both quantizers, None leaves in float; the last match decides."""
    overrides: dict[str, Any] = {
        "1.*": {"bits": 3},
        "*.1": QConfig(QSpec(5, 0), None),
        "1.2": None,
        "0.0": {"range": "minmax"},
    }
    net = prepare(chain(), CONFIG, first_last_bits=8, overrides=overrides)
    assert bits(net) == {"0.0": (8, 8), "0.1": (5, None), "0.2": (4, 4), "1.0": (3, 3), "1.1": (5, None)}
    rows = report(net).quantizers
    assert [row.range for row in rows if row.layer == "0.0"] == ["minmax"] * 2
    assert [row.note for row in rows if row.tensor == "weight"][:3] == ["override '0.0'", "override '*.1'", ""]
    assert [(row.layer, row.reason) for row in report(net).left_in_float] == [("1.2", "override '1.2'")]
    net = prepare(chain(), CONFIG, overrides={"1.2": None, "1.*": {"bits": 3}})
    assert bits(net)["1.2"] == (3, 3)


def test_a_module_that_is_registered_twice_has_two_names() -> None:
    net = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    net["two"] = net["one"]
    prepare(net, CONFIG, overrides={"two": {"bits": 7}})
    assert bits(net) == {"one": (7, 7), "other": (4, 4)}
    assert {row.note for row in report(net).quantizers if row.layer == "one"} == {"override 'two'; also two"}


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    (
        ({"0.7": None}, ValueError, r"overrides: wanted .*that can be quantized, nearest '0\.\d', .*; got '0\.7'$"),
        ({"1": None}, ValueError, r"overrides: wanted a pattern .*; 1\.\* matches 3; got '1'$"),
        (
            {"0.0": {"bit": 3}},
            ValueError,
            r"overrides\['0\.0'\]: wanted options of QSpec, nearest 'bits'",
        ),
        ({"0.0": {"bits": 9}}, ValueError, "bits: wanted 1 to 8; got 9"),
        ({"0.0": 8}, TypeError, r"overrides\['0\.0'\]: wanted a QConfig, a dict of QSpec options, or None; got 8$"),
        (
            {"0.*": {"group_size": 3}},
            ValueError,
            "group_size: wanted an axis beside it",
        ),
    ),
)
def test_wrong_overrides(overrides: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Named, with what comes nearest, and nothing is changed."""
    net = chain()
    with pytest.raises(kind, match=message):
        prepare(net, CONFIG, overrides=overrides)
    assert not quantizers(net) and set(net[0][0].__dict__) == set(nn.Linear(1, 1).__dict__)


class Mixed(nn.Module):
    """A residual block, products of activations, functions with Parameters, and a layer whose weight alone is used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bypassed = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Parameter(torch.randn(4, 4))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        y = self.first(x) + torch.rand(()) * x
        y += self.twice(self.twice(y))
        y = nn.functional.linear(y, self.bypassed.weight)
        y = nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])[0] @ self.table
        y = torch.add(self.norm(y) * factor, y, alpha=0.5)
        return self.last(self.drop(y))


def test_what_a_run_shows() -> None:
    """Calls of every quantizer, those that none reached, and the operations that stay in float."""
    found = report(prepare(Mixed(), CONFIG, coverage=None), torch.randn(3, 4))
    assert {(row.layer, row.tensor): row.runs for row in found.quantizers} == {
        ("first", "weight"): 1,
        ("first", "input"): 1,
        ("last", "weight"): 1,
        ("last", "input"): 1,
        ("bypassed", "weight"): 0,
        ("bypassed", "input"): 0,
        ("twice", "weight"): 2,
        ("twice", "input"): 2,
    }
    assert [(row.layer, row.tensor) for row in found.never_ran] == [("bypassed", "weight"), ("bypassed", "input")]
    assert found.operations is not None
    assert {(row.layer, row.operation): row.calls for row in found.operations} == {
        ("", "add"): 3,
        ("", "linear"): 1,
        ("", "scaled_dot_product_attention"): 1,
        ("", "matmul"): 1,
    }
    in_float = [(row.layer, row.kind, row.parameters, row.reason) for row in found.left_in_float]
    assert in_float == [
        ("", "Mixed", 16, "no quantized twin: table"),
        ("norm", "LayerNorm", 8, "no quantized twin: weight, bias"),
    ]
    assert (found.quantized_parameters, found.parameters) == (4 * 16, 4 * 20 + 16 + 8)
    text = str(found)
    assert "NEVER RAN with these inputs:\n  bypassed: weight\n  bypassed: input" in text
    assert "Every quantizer ran" in str(report(prepare(Net(), CONFIG), X))


def test_a_run_leaves_no_trace() -> None:
    """State, modes, random numbers, hooks; also where an error ends it, and where quantizers are off."""
    for calibrated in (False, True):
        net = prepare(
            Mixed(), QConfig(QSpec(4, 0, range="running_minmax"), QSpec(4, range="running_minmax")), coverage=None
        )
        net.norm.eval()
        fastqat.fake_quant_enabled(net, False)
        if calibrated:
            net(torch.randn(3, 4)), [q(torch.randn(3, 4)) for q in quantizers(net.bypassed) if q.axis is None]
        state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
        attributes = [{k: str(v) for k, v in m.__dict__.items() if not k.startswith("_")} for m in net.modules()]
        seed = torch.get_rng_state()
        for inputs, fine in ((torch.randn(3, 4), True), ({"x": torch.ones(3, 4), "factor": 1}, True), ([0], False)):
            torch.set_rng_state(seed)
            if fine:
                assert {row.runs for row in report(net, inputs).quantizers} == {0, 1, 2}
            else:
                with pytest.raises((TypeError, AttributeError)):
                    report(net, inputs)
            assert [m.training for m in net.modules()] == modes
            assert torch.equal(torch.get_rng_state(), seed)
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
            assert net.state_dict().keys() == state.keys()
            torch.testing.assert_close(dict(net.state_dict()), dict(state), rtol=0, atol=0, equal_nan=True)
            found = [{k: str(v) for k, v in m.__dict__.items() if not k.startswith("_")} for m in net.modules()]
            assert found == attributes
        with torch.no_grad():
            assert net(torch.ones(2, 4)).shape == (2, 4)


def test_quantizers_of_the_user_are_shown() -> None:
    """One called in a forward, one registered as a parametrization."""
    net = nn.Sequential(fastqat.FakeQuant(bits=3), nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(net[1], "weight", fastqat.FakeQuant(bits=5, axis=0))
    rows = report(net, torch.randn(2, 4)).quantizers
    assert [(row.layer, row.kind, row.bits) for row in rows] == [
        ("0", "FakeQuant", 3),
        ("1.parametrizations.weight.0", "FakeQuant", 5),
    ]
    assert rows[0].runs == 1 and rows[1].runs is not None and rows[1].runs >= 1


def test_rows_say_what_each_quantizer_is() -> None:
    net = prepare(
        nn.Sequential(nn.Conv2d(4, 6, 3)),
        QConfig(
            QSpec(3, 0, group_size=9, range="minmax", learn="scale", restricted=True),
            QSpec(6, symmetric=False),
            "output",
        ),
    )
    weight, output = report(net).quantizers
    assert (weight.bits, weight.qmin, weight.qmax, weight.grid) == (3, -3, 3, "symmetric")
    assert (weight.axis, weight.group_size, weight.scales, weight.range, weight.learn) == (0, 9, 24, "minmax", "scale")
    assert weight.initialized and weight.kind == "Conv2d" and weight.runs is None and not weight.shared_with
    assert (output.tensor, output.bits, output.qmax, output.grid, output.axis) == ("output", 6, 63, "affine", None)
    assert not output.initialized
    unknown = report(prepare(nn.Linear(2, 2), CONFIG)).quantizers[1]
    assert unknown.qmin is None and unknown.qmax is None  # the sign of the first tensor decides


def test_a_model_that_is_not_prepared() -> None:
    """What it would take, and no quantizer."""
    found = report(chain(), torch.randn(1, 4))
    assert not found.quantizers and {row.reason for row in found.left_in_float} == {"not prepared"}
    assert len(found.left_in_float) == 6 and "Quantized: 0 layers" in str(found)


def test_table() -> None:
    """Blocks that differ in a number become one line; columns are aligned, and empty ones left out."""
    rows = [(f"block.{i}.conv1", "Conv", "", 10) for i in range(3)] + [("block.3.conv1", "Linear", "", 1000)]
    assert collapsed(rows) == [("block.*.conv1", "Conv", "", 30), ("block.3.conv1", "Linear", "", 1000)]
    assert collapsed([("v2.x", 1), ("v3.x", 1)]) == [("v2.x", 1), ("v3.x", 1)]
    assert table(("name", "kind", "note", "count"), collapsed(rows)).splitlines() == [
        "  name           kind    count",
        "  block.*.conv1  Conv       30",
        "  block.3.conv1  Linear  1,000",
    ]
    assert table(("name", "count"), []) == ""


def test_a_run_of_a_compiled_model() -> None:
    """It runs eagerly: the same rows, and nothing is compiled anew."""
    net = fastqat.calibrate(prepare(Net(), CONFIG), [X]).eval()
    expected = report(net, X)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(X)
    found = report(compiled, X)
    assert [row.runs for row in found.quantizers] == [row.runs for row in expected.quantizers]
    assert [row.operation for row in found.operations or ()] == [row.operation for row in expected.operations or ()]
    assert not found.never_ran


def test_a_run_of_scripted_modules() -> None:
    """They take no hooks, and count as a part of what holds them."""
    net = prepare(
        nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4))), CONFIG, coverage=None
    )
    net.append(torch.jit.script(nn.Linear(4, 4)))
    found = report(net, torch.randn(2, 4))
    assert [(row.layer, row.runs) for row in found.quantizers] == [("0", 1), ("0", 1)]
    assert [row.layer for row in found.left_in_float] == ["1", "2"]
