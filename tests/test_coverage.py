"""Coverage: shares by hand, what prepare says of them, and reads of a weight past its quantizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastqat
from fastqat import QConfig, QSpec, prepare, report
from fastqat.nn import past_reads

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = QConfig(QSpec(4, 0), QSpec(8))
IDS = torch.arange(10).reshape(2, 5)


class Tied(nn.Module):
    """A language model whose head reads the table of its embedding: 10 tokens, 640 multiplications and 1,600."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.norm = nn.Embedding(20, 8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(self.fc(self.emb(x))), self.emb.weight)


class Experts(nn.Module):
    """Two experts in one Parameter of three dimensions."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 4, 4))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "bmm":
            return torch.bmm(x.expand(2, *x.shape), self.up).sum(0)
        if self.way == "einsum":
            return torch.einsum("ni,eij->enj", x, self.up).sum(0)
        return sum((F.linear(x, w) for w in self.up), torch.zeros(()))


def with_experts(way: str = "linear") -> nn.Sequential:
    """A layer of 16 weights, and experts with 32: 48 and 96 multiplications for three rows."""
    return nn.Sequential(nn.Linear(4, 4, bias=False), Experts(way))


def silently(*args: Any, **options: Any) -> nn.Module:
    """Prepare, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prepare(*args, **options)


def test_shares_by_hand() -> None:
    net = prepare(Tied(), CONFIG, coverage=None)
    without, found = report(net).coverage, report(net, IDS).coverage
    assert without.multiplications is None and str(without) == "93.3 % of the parameters"
    assert found.parameters == without.parameters == (160 + 64) / (160 + 64 + 16)
    assert found.multiplications == 640 / (640 + 1600) and str(found) == "28.5 % of the multiplications"
    assert [(row.kind, row.modules, row.parameters, row.multiplications, row.reason) for row in found.left] == [
        ("Tied", 1, 0, 1600, "parameter emb.weight that it uses directly"),
        ("LayerNorm", 1, 16, 0, "parameters weight, bias that it uses directly"),
    ]
    assert "; W4A8 of 28.5 % of the multiplications\n" in str(report(net, IDS))
    mixed = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), CONFIG, overrides={"0": {"bits": 3}})
    assert "parameters; 80.0 % of the parameters\n" in str(report(mixed))


@pytest.mark.parametrize("way", ("linear", "bmm", "einsum"))
def test_experts_are_left_by_name(way: str) -> None:
    found = report(prepare(with_experts(way), CONFIG, coverage=None), torch.randn(3, 4)).coverage
    assert found.multiplications == pytest.approx(1 / 3)
    assert [(row.kind, row.parameters, row.multiplications, row.reason) for row in found.left] == [
        ("Experts", 32, 96, "parameter up that it uses directly")
    ]


def test_products_of_two_activations_are_float() -> None:
    """5 tokens of 16: projections 5 * 16 * 64, feed-forward 2 * 5 * 16 * 32, attention 2 * 5 * 5 * 16."""
    net = prepare(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), CONFIG, coverage=None)
    for batch in (1, 3):
        found = report(net, torch.zeros(batch, 5, 16)).coverage
        assert found.multiplications == 10240 / (10240 + 800)
        assert [(row.kind, row.multiplications, row.reason) for row in found.left if row.multiplications] == [
            ("MultiheadAttention", batch * 800, "products of two activations")
        ]


def test_shared_lazy_and_borrowed() -> None:
    """A weight counts once; a layer counts where it runs, whoever calls it, and at each of its calls."""
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    net = prepare(nn.Sequential(first, second), CONFIG)
    assert report(net).coverage.parameters == 1.0 and report(net).coverage.left == ()

    class Borrower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner = nn.Sequential(nn.Linear(4, 4, bias=False))
            self.other = nn.Sequential(nn.Linear(4, 2, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.owner[0](self.owner(x)))

    net, x = Borrower(), torch.zeros(3, 4)
    assert {row.layer: row.macs for row in fastqat.cost(net, x).layers} == {"owner.0": 96, "other.0": 24}
    assert report(prepare(net, CONFIG), x).coverage.multiplications == 1.0


def test_layers_that_multiply_in_batches() -> None:
    """A transposed input makes torch take a batched product with the weight: it is the layer's."""
    x = torch.zeros(2, 5, 3, 4).permute(0, 3, 2, 1)
    net = nn.Sequential(nn.Linear(5, 7, bias=False))
    assert [row.macs for row in fastqat.cost(net, x).layers] == [24 * 35]
    assert report(prepare(net, CONFIG), x).coverage.multiplications == 1.0


def test_prepare_warns_with_the_largest_kinds() -> None:
    with pytest.warns(UserWarning, match="coverage: wanted 95.0 % quantized; got ") as caught:
        prepare(with_experts(), CONFIG, example_inputs=torch.randn(3, 4))
    assert len(caught) == 1 and caught[0].filename == __file__
    text = str(caught[0].message)
    assert "got 33.3 % of the multiplications and 33.3 % of the parameters of two dimensions or more" in text
    assert "1 x Experts (32 parameters, 96 multiplications): parameter up that it uses directly" in text
    with pytest.warns(UserWarning, match="got 28.5 % of the multiplications. Largest"):
        prepare(Tied(), CONFIG, example_inputs=IDS)
    with pytest.warns(UserWarning, match=r"got 33.3 % of the parameters .*\(32 parameters\)"):
        prepare(with_experts(), CONFIG)


def test_what_prepare_does_not_warn_of() -> None:
    """Norms and biases, layers that overrides leave in float, configurations of activations alone, None."""
    small = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    silently(small, CONFIG, example_inputs=torch.zeros(1, 3, 4, 4))
    silently(nn.MultiheadAttention(8, 2, add_bias_kv=True), CONFIG)
    x = torch.zeros(3, 4)
    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    silently(two, CONFIG, overrides={"0": None}, example_inputs=x)
    fastqat.remove(two)
    silently(two, CONFIG, overrides={"0": QConfig(None, QSpec(8))}, example_inputs=x)
    assert report(two, x).coverage.multiplications == 0.5
    fastqat.remove(two)
    silently(two, QConfig(None, QSpec(8)), example_inputs=x)
    assert report(two, x).coverage.multiplications == 1.0
    silently(with_experts(), CONFIG, example_inputs=x, coverage=None)
    silently(with_experts(), CONFIG, example_inputs=x, coverage=0.33)
    with pytest.warns(UserWarning, match="wanted 34.0 %"):
        prepare(with_experts(), CONFIG, example_inputs=x, coverage=0.34)


def test_an_error_leaves_the_model_as_it_was() -> None:
    net = with_experts()
    before = [(type(m), dict(m.__dict__["_modules"])) for m in net.modules()]
    with pytest.raises(ValueError, match="got 33.3 % of the multiplications"):
        prepare(net, CONFIG, example_inputs=torch.randn(3, 4), coverage="error")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        prepare(net, CONFIG, example_inputs=torch.randn(3, 5))
    for kind, option in (
        (TypeError, True),
        (TypeError, [1]),
        (ValueError, "raise"),
        (ValueError, 1.5),
        (ValueError, 0),
    ):
        with pytest.raises(kind, match="^coverage: wanted .*; got "):
            prepare(net, CONFIG, coverage=option)
    assert [(type(m), dict(m.__dict__["_modules"])) for m in net.modules()] == before
    assert set(net[0].__dict__) == set(nn.Linear(1, 1).__dict__)
    prepare(net, CONFIG, coverage=None)
    assert silently(net, CONFIG) is net  # prepared already: it was said
    with pytest.raises(ValueError, match="coverage"):
        prepare(net, CONFIG, coverage="error")


def test_a_run_of_prepare_changes_nothing() -> None:
    """The range of an activation is that of the first batch, not of the example."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    torch.manual_seed(0)
    before, seed = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    prepare(net, CONFIG, example_inputs=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert net.training and torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert [row.initialized for row in report(net).quantizers] == [True, False]


class Reader(nn.Module):
    """Reads the weight of a layer in the ways that count, and in those that do not."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.fc, self.way = nn.Linear(4, 4, bias=False), way

    def forward(self, x: Tensor) -> Tensor:
        w = self.fc.weight
        ways = {
            "view": lambda: x @ w[:2].t().detach().repeat(1, 2),
            "functional": lambda: F.linear(x, weight=w),
            "view of it": lambda: x @ w.t(),
            "shape": lambda: (
                x.to(w.dtype).to(w.device).reshape(-1, w.shape[0], w.size(1) // 4) + torch.zeros_like(w)[0, 0]
            ),
            "view alone": lambda: (w.t(), w.detach(), x)[2],
        }
        return self.fc(x), ways[self.way]()


@pytest.mark.parametrize(
    ("way", "operations"),
    (
        ("view", ["repeat"]),
        ("functional", ["linear"]),
        ("view of it", ["matmul"]),
        ("shape", []),
        ("view alone", []),
    ),
)
def test_reads_past_a_quantizer(way: str, operations: list[str]) -> None:
    net = prepare(Reader(way), CONFIG, coverage=None)
    found = past_reads(net, torch.randn(3, 4))
    assert [(row.parameter, row.module, row.kind, row.calls) for row in found] == [
        ("fc.weight", "", "Reader", 1) for _ in operations
    ]
    assert [row.operation for row in found] == operations
    assert past_reads(net) == () and ("READ PAST ITS QUANTIZER" in str(report(net, torch.randn(3, 4)))) == bool(found)


def test_weights_without_a_range_are_not_read_past_it() -> None:
    """Its quantizer passes a weight of zeros through: what reads that is still its layer."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    for p in net.parameters():
        nn.init.zeros_(p)
    assert past_reads(prepare(net[:1], CONFIG), torch.randn(3, 4)) == ()
    assert past_reads(prepare(nn.MultiheadAttention(8, 2), CONFIG), [torch.randn(3, 1, 8)] * 3) == ()


def test_weights_that_are_tied_later() -> None:
    def two(**options: Any) -> nn.Sequential:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        prepare(net, CONFIG, **options)
        net[1]._parameters["weight"] = net[0].weight  # as code that asks no layer does
        return net

    def rows(*args: Any) -> list[tuple[str, str, str, int]]:
        return [(row.parameter, row.module, row.operation, row.calls) for row in past_reads(*args)]

    assert rows(two()) == [("0.weight", "1", "has another quantizer for it", 0)]
    assert rows(two(overrides={"1": None})) == [("0.weight", "1", "holds it", 0)]
    assert rows(two(overrides={"1": None}), torch.zeros(2, 4)) == [("0.weight", "1", "linear", 1)]
    assert "READ PAST ITS QUANTIZER" in str(report(two()))
