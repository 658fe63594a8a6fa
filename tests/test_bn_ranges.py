"""Ranges from the parameters of batch normalisation, against its equation by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, bn_ranges

pytestmark = pytest.mark.usefixtures("one_thread")
GAMMA, BETA = [0.5, -2.0, 1.0], [0.0, 1.0, -1.0]  # with a = 6: -3..3, -11..13, -7..5


def norm(kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """Of three channels, with these parameters."""
    layer = kind(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(GAMMA))
        layer.bias.copy_(torch.tensor(BETA))
    return layer


class Behind(nn.Module):
    """A batch normalisation, something behind it, and a quantizer."""

    def __init__(self, between: object, **options: object) -> None:
        super().__init__()
        self.norm, self.between = norm(), between
        self.fq = FakeQuant(8, **{"range": "minmax", **options})

    def forward(self, x: Tensor) -> Tensor:
        return self.fq(self.between(self.norm(x)))


def extremes(fq: FakeQuant) -> tuple[list[float], list[float]]:
    """Lowest and highest value of its grid."""
    qmin, qmax = fq.codes
    zero = torch.zeros_like(fq.scale) if fq.zero_point is None else fq.zero_point
    return tuple((fq.scale * (q - zero)).flatten().tolist() for q in (qmin, qmax))


ZEROS = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("between", "low", "high"),
    (
        (nn.Identity(), -11, 13),
        (nn.ReLU(), 0, 13),
        (nn.ReLU(inplace=True), 0, 13),
        (nn.ReLU6(), 0, 6),
        (nn.Hardtanh(-2, 3), -2, 3),
        (lambda x: x.clamp(max=4), -11, 4),
        (lambda x: torch.clamp(x, -1), -1, 13),
        (lambda x: F.max_pool2d(x.relu_(), 2).mean((2, 3)).flatten(1), 0, 13),
        (lambda x: torch.cat([x.relu(), x.clamp(-5, 1)], 1), -5, 13),
        (nn.Sequential(nn.Dropout(), nn.AdaptiveAvgPool2d(1)), -11, 13),
    ),
    ids=("nothing", "relu", "in_place", "relu6", "hardtanh", "max", "min", "pooled", "joined", "modules"),
)
def test_range(between: object, low: float, high: float) -> None:
    """beta -+ 6 |gamma| over the channels, clipped as the function clips; the codes are signed where it is negative."""
    net = Behind(between, symmetric=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bn_ranges(net, ZEROS) == {}
    assert [bound[0] for bound in extremes(net.fq)] == pytest.approx([low, high], abs=1e-4)
    plain = Behind(between)
    bn_ranges(plain, ZEROS)
    assert plain.fq.codes == ((-128, 127) if low < 0 else (0, 255))


def test_range_of_channels() -> None:
    """Each with its own; a quantizer of rows has no bounds."""
    net = Behind(nn.ReLU(), axis=1, symmetric=False)
    assert bn_ranges(net, ZEROS, deviations=3.0) == {}
    assert extremes(net.fq)[1] == pytest.approx([1.5, 7.0, 2.0]) and extremes(net.fq)[0] == pytest.approx([0, 0, 0])
    net = Behind(nn.ReLU(), axis=2)
    with pytest.warns(UserWarning, match="fq: axis=2, group_size=None: bounds are known of axis 1"):
        assert list(bn_ranges(net, ZEROS)) == ["fq"]


def test_without_parameters_and_in_one_dimension() -> None:
    """gamma is 1 and beta 0 where batch normalisation learns none; two-dimensional inputs have channels, too."""
    net = nn.Sequential(nn.BatchNorm1d(3, affine=False), FakeQuant(8, range="minmax"))
    bn_ranges(net, torch.zeros(2, 3))
    assert net[1].scale.item() == pytest.approx(6 / 127)


class Residual(nn.Module):
    """What a quantized layer may get: a batch normalisation, a sum, the image, one of two, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = norm()
        for name in ("image", "behind", "sum", "changed", "written", "both", "late", "twice", "never"):
            setattr(self, name, nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.image(x)
        y = self.norm(x)
        self.both(y)
        self.twice(y.clamp(-1, 1))
        z = y.relu()
        self.behind(z)
        self.twice(z)
        self.sum(z + x)
        self.both(z + x)
        self.late(z + x)
        self.late(y)
        z[0] = 7
        self.written(z)
        z += 1
        return self.changed(z)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN too, which is the scale of a quantizer without a range."""
    return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) and torch.equal(a.isnan(), b.isnan())


def test_what_is_not_behind_batch_normalisation_is_named() -> None:
    """With the function that made it; nothing but the ranges that are known changes."""
    net = fastqat.prepare(Residual(), QConfig(QSpec(4, 0), QSpec(8, symmetric=False)))
    before = {key: value.clone() for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    message = r"got image\.activation_fake_quant: the input of the model.*; sum\.act.*: add, which is no batch norm"
    with pytest.warns(UserWarning, match=message):
        left = bn_ranges(net, ZEROS)
    names = {name.partition(".")[0]: why for name, why in left.items()}
    assert set(names) == {"image", "sum", "changed", "written", "both", "late", "never"}
    assert names["changed"].startswith("add,") and names["written"].startswith("setitem,")
    assert "does not call it" in names["never"]
    assert [bound[0] for bound in extremes(net.behind.activation_fake_quant)] == pytest.approx([0, 13], abs=1e-4)
    assert [bound[0] for bound in extremes(net.twice.activation_fake_quant)] == pytest.approx([-1, 13], abs=1e-4)
    ours = ("behind.activation_fake_quant", "twice.activation_fake_quant")
    after = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    changed = {key for key in after if key not in before or not same(before[key], after[key])}
    assert changed and all(key.startswith(ours) for key in changed)
    fastqat.calibrate(net, [torch.randn(2, 3, 4, 4)], forward=lambda net, x: (net(x), net.never(x)), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # those that have a range keep it, and need no warning
        assert set(bn_ranges(net, ZEROS)) == set(left)


def test_fused_activation() -> None:
    """A quantizer that clamps first has bounds that are clamped, and fits on what torch's module would give."""
    net = nn.Sequential(norm(), FakeQuant(8, range="minmax", activation="relu6"))
    bn_ranges(net, ZEROS)
    assert net[1].codes == (0, 255) and net[1].scale.item() == pytest.approx(6 / 255)


def test_ranges_of_statistics_are_wide_enough() -> None:
    """Six deviations hold what a batch of the population gives."""
    net = Behind(nn.Identity(), axis=1, symmetric=False)
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = net.train().norm(x)
    bn_ranges(net, x)
    low, high = (torch.tensor(bound) for bound in extremes(net.fq))
    assert (y.amin((0, 2, 3)) > low).all() and (y.amax((0, 2, 3)) < high).all()
    assert net.training and not net.fq.scale.requires_grad


def test_errors() -> None:
    with pytest.raises(ValueError, match="model: wanted a model with quantizers of activations; got Linear"):
        bn_ranges(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="deviations: wanted a positive number; got 0"):
        bn_ranges(Behind(nn.ReLU()), ZEROS, deviations=0)
