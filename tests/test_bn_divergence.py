"""Divergence of the statistics of batch normalisation: its equation, what it compares, and that nothing changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import fastqat
from fastqat.bn_divergence import bn_divergence, gaussian_divergence


class Net(nn.Module):
    """BN after a convolution, a depth-wise one, a point-wise one with something between, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.depthwise, self.norm2 = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)
        self.pointwise, self.norm3 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.linear, self.norm4 = nn.Linear(8, 3), nn.BatchNorm1d(3)
        self.without = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.depthwise(self.norm1(self.stem(x)).relu()))
        x = self.norm3(self.pointwise(x) + 1).mean((2, 3))
        return self.without(self.norm4(self.linear(x)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 1, 8, 8, generator=generator) for _ in range(3)]


def test_divergence_of_normal_distributions() -> None:
    p, q = Normal(torch.tensor([0.0, 1.0, -3.0]).double(), torch.tensor([1.0, 0.5, 7.0]).double()), Normal(0.5, 2.0)
    found = gaussian_divergence(p.mean, p.variance, torch.full((3,), 0.5).double(), torch.full((3,), 4.0).double())
    assert torch.allclose(found, kl_divergence(p, q), rtol=1e-12, atol=0)
    assert found[1] != pytest.approx(float(kl_divergence(q, p)[1])), "it has a direction"


def test_rows_and_their_layers(net: Net) -> None:
    rows = bn_divergence(net, batches())
    assert [(row.layer, row.after, row.kind, row.channels) for row in rows] == [
        ("norm1", "stem", "convolution", 4),
        ("norm2", "depthwise", "depthwise", 4),
        ("norm3", "", "other", 8),
        ("norm4", "linear", "linear", 3),
    ]
    assert all(0 < row.mean < row.largest for row in rows)


def test_statistics_of_the_network_as_it_is_do_not_diverge(net: Net) -> None:
    fastqat.reestimate_bn(net, batches())
    assert all(abs(row.largest) < 1e-10 for row in bn_divergence(net, batches()))


def test_shifted_statistics_diverge_as_the_equation_says(net: Net) -> None:
    """From N(m, v) to N(m + sqrt(v), v) it is 1/2; to N(m, 4 v) it is (ln 4 + 1/4 - 1) / 2."""
    fastqat.reestimate_bn(net, batches())
    with torch.no_grad():
        net.norm1.running_mean[0] += (net.norm1.running_var[0] + net.norm1.eps).sqrt()
        net.norm2.running_var[1] = 4 * (net.norm2.running_var[1] + net.norm2.eps) - net.norm2.eps
    first, second, *others = bn_divergence(net, batches())
    wide = (math.log(4) + 1 / 4 - 1) / 2
    assert (first.largest, first.mean) == (pytest.approx(0.5, rel=1e-5), pytest.approx(0.125, rel=1e-5))
    assert (second.largest, second.mean) == (pytest.approx(wide, rel=1e-5), pytest.approx(wide / 4, rel=1e-5))
    assert all(abs(row.largest) < 1e-10 for row in others)


def test_nothing_changes(net: Net) -> None:
    net.train()
    net.norm1.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    bn_divergence(net, batches())
    with pytest.raises(ValueError, match="batches"):
        bn_divergence(net, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert net.training and not net.norm1.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_double_precision(net: Net) -> None:
    net.double()
    fastqat.reestimate_bn(net, [batch.double() for batch in batches()])
    net.norm1.running_mean.zero_()
    assert bn_divergence(net, [batch.double() for batch in batches()])[0].mean > 0


def test_a_model_without_batch_normalisation() -> None:
    assert bn_divergence(nn.Linear(1, 1), batches()) == []
