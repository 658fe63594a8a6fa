"""``nn.MultiheadAttention`` and what is built on it: every quantizer runs, fused kernels or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_prepare import CONFIG, quantizers
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, prepare

pytestmark = pytest.mark.usefixtures("one_thread")
L, S, N, E, HEADS = 5, 7, 2, 8, 2
HIDDEN = torch.tensor([[False] * S, [False] * (S - 2) + [True] * 2])  # [N, S]: padding of the second sequence
CAUSAL = torch.triu(torch.ones(L, S, dtype=torch.bool), 1)
ADDED = torch.randn(N * HEADS, L, S, generator=torch.Generator().manual_seed(3))

ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal with weights": {"attn_mask": CAUSAL, "is_causal": True},
    "padding": {"key_padding_mask": HIDDEN},
    "padding without weights": {"key_padding_mask": HIDDEN, "need_weights": False},
    "both masks": {"key_padding_mask": HIDDEN, "attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "float mask": {"attn_mask": ADDED},
    "float mask without weights": {"attn_mask": ADDED, "need_weights": False},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 4},
    "dropout": {"dropout": 0.5},
}


# What is one tensor: all three, key and value, none. Tensors of different widths cannot be one.
CALLS = [
    (kind, which)
    for kind in OPTIONS
    for which in ("self", "cross", "three")
    if which != "self" or kind != "other widths"
]


def attention(options: dict[str, Any]) -> nn.MultiheadAttention:
    """With a bias that is not 0."""
    torch.manual_seed(1)
    module = nn.MultiheadAttention(E, HEADS, **options)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
    return module


def tensors(options: dict[str, Any], which: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; [S, N, E] each where they are one."""
    torch.manual_seed(2)
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    q, k, v = (torch.randn(n, N, width) for n, width in zip((L, S, S), widths, strict=True))
    if which == "cross":
        k = v = k if "kdim" not in options else k
        v = v if "kdim" not in options else torch.randn(S, N, 4)
    if which == "self":
        q = k = v = torch.randn(S, N, E)
    if options.get("batch_first"):
        found: dict[int, Tensor] = {}
        q, k, v = (found.setdefault(id(x), x.transpose(0, 1).contiguous()) for x in (q, k, v))
    return q, k, v


def rectangular(arguments: dict[str, Any], which: str) -> dict[str, Any]:
    """The arguments, with masks for as many queries as there are."""
    if which != "self" or "attn_mask" not in arguments:
        return arguments
    mask = arguments["attn_mask"]
    grown = torch.zeros(*mask.shape[:-2], S, S, dtype=mask.dtype)
    grown[..., :L, :] = mask
    return {**arguments, "attn_mask": grown}


def same_results(a: Any, b: Any) -> bool:
    """Both of (output, weights), bit for bit."""
    return torch.equal(a[0], b[0]) and (b[1] is None if a[1] is None else torch.equal(a[1], b[1]))


@pytest.mark.parametrize(("kind", "which"), CALLS)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_its_own_computation_is_that_of_torch(
    arguments: dict[str, Any], kind: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantizers that pass everything, but are on: outputs, weights and gradients, bit for bit."""
    options = OPTIONS[kind]
    module = attention(options)
    twin = prepare(copy.deepcopy(module), CONFIG)
    for quantizer in quantizers(twin):
        monkeypatch.setattr(quantizer, "forward", lambda x, out_dtype=None: x)
    arguments, results = rectangular(arguments, which), []
    for m in (module, twin):
        torch.manual_seed(4)
        y, weights = m(*tensors(options, which), **arguments)
        (y.square().sum() + (0 if weights is None else weights.square().sum())).backward()
        results.append((y, weights, m.in_proj_bias, m.out_proj.weight.grad, m.bias_k))
    assert same_results(results[0], results[1])
    with torch.enable_grad():  # torch's own layers, not its fused kernel
        evaluated = [m.eval()(*tensors(options, which), **arguments) for m in (module, twin)]
    assert same_results(evaluated[0], evaluated[1])
    grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (module, fastqat.remove(twin))]
    assert len(grads[0]) == len(grads[1]) >= 2
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_without_a_batch() -> None:
    """[L, E] in, [L, E] out."""
    module = attention({}).eval()
    twin = prepare(copy.deepcopy(module), QConfig(QSpec(8, 0), QSpec(8, range="minmax")))
    q, k = torch.randn(L, E), torch.randn(S, E)
    fastqat.calibrate(twin, [(q, k)], forward=lambda net, batch: net(batch[0], batch[1], batch[1]))
    (y, weights), (exact, exact_weights) = twin(q, k, k), module(q, k, k)
    assert y.shape == (L, E) and weights.shape == (L, S)
    torch.testing.assert_close(y, exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(weights, exact_weights, atol=0.05, rtol=0.05)
    padded = twin(q, k, k, key_padding_mask=HIDDEN[1])[1]
    assert bool((padded[:, -2:] == 0).all()) and bool((padded[:, :-2] > 0).all())


@pytest.mark.parametrize("on", ("input", "output"))
@pytest.mark.parametrize("options", (OPTIONS["batch first"], OPTIONS["other widths"]), ids=("one weight", "three"))
def test_every_quantizer_matters(options: dict[str, Any], on: str) -> None:
    """In evaluation without gradients, where torch would take its fused kernel: each runs, and changes the output."""
    net = prepare(attention(options).eval(), QConfig(QSpec(4, 0), QSpec(8), on))
    q, k, v = tensors(options, "three" if "kdim" in options else "self")
    with torch.no_grad():
        net(q, k, v)
        found = quantizers(net)
        assert len(found) == (6 if "kdim" in options else 4)
        assert not fastqat.report(net, (q, k, v)).never_ran
        y = net(q, k, v)[0]
        for quantizer in found:
            quantizer.fake_quant_enabled = False
            assert not torch.equal(net(q, k, v)[0], y)
            quantizer.fake_quant_enabled = True
        assert torch.equal(net(q, k, v)[0], y)


def test_the_grid_of_the_projection() -> None:
    """What the projection gives is a product of a weight and an input on their grids."""
    net = prepare(attention({"bias": False}), QConfig(QSpec(3, 0), QSpec(3)))
    x = torch.randn(S, N, E)
    seen: list[Tensor] = []
    net.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x, x, x)
    weight = net.in_proj_weight_fake_quant(net.in_proj_weight)
    float_net = attention({"bias": False})
    with torch.no_grad():
        float_net.in_proj_weight.copy_(weight)
    float_net.out_proj = nn.Identity()
    float_net.out_proj.weight, float_net.out_proj.bias = torch.eye(E), None
    xq = net.activation_fake_quant(x)
    torch.testing.assert_close(seen[0].view(S, N, E), float_net(xq, xq, xq)[0])


def test_a_subclass_with_a_forward_of_its_own_keeps_its_projection() -> None:
    """It may never call it."""

    class Own(nn.MultiheadAttention):
        def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            return nn.functional.linear(query, self.out_proj.weight), None

    net = prepare(nn.ModuleList([Own(E, HEADS), nn.Linear(E, E)]), CONFIG, coverage=None)
    assert len(quantizers(net)) == 2 and type(net[0].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    reasons = {row.layer: row.reason for row in fastqat.report(net).left_in_float}
    assert reasons["0"] == "Own has a forward of its own" and reasons["0.out_proj"].startswith(
        "Own, which holds it, may"
    )


def test_half_of_it() -> None:
    """The projection behind it alone, or the one before it alone: what is there runs."""
    x = torch.randn(N, S, E)
    for overrides, names in (({"0": None}, ["0.out_proj"] * 2), ({"0.out_proj": None}, ["0"] * 2)):
        net = nn.Sequential(attention(OPTIONS["batch first"])).eval()
        float_output = net[0](x, x, x)[0]
        prepare(net, CONFIG, overrides=overrides)
        found = fastqat.report(net[0], (x, x, x))
        assert not found.never_ran and [row.runs for row in found.quantizers] == [1, 1]
        assert [row.layer for row in fastqat.report(net).quantizers] == names
        assert not torch.equal(net[0](x, x, x)[0], float_output)
        assert prepare(net, CONFIG, overrides=overrides) is net
        assert type(fastqat.remove(net)[0]) is nn.MultiheadAttention
        assert torch.equal(net[0](x, x, x)[0], float_output)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_errors() -> None:
    net = prepare(attention({}), CONFIG)
    q = k = torch.randn(L, N, E)
    with pytest.raises(ValueError, match=r"attn_mask: wanted shape \[5, 5\]; got \[5, 7\]"):
        net(q, k, k, attn_mask=CAUSAL)
    with pytest.raises(ValueError, match=r"key_padding_mask: wanted shape \[2, 5\]; got \[2, 7\]"):
        net(q, k, k, key_padding_mask=HIDDEN)
    with pytest.raises(ValueError, match="attn_mask: wanted a mask beside is_causal=True; got None"):
        net(q, k, k, is_causal=True, need_weights=False)
    nested = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(TypeError, match="query, key, value: wanted strided tensors while quantizing; got nested ones"):
        net(nested, nested, nested)


def encoder() -> nn.TransformerEncoder:
    """Two layers for which torch takes its fused kernel in evaluation."""
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("padded", (False, True))
def test_transformer_encoder(padded: bool) -> None:
    """Every quantizer runs where torch would go past its layers; off, torch does, and gives the same bits."""
    net = encoder()
    arguments = {"src": torch.randn(N, S, E), "src_key_padding_mask": HIDDEN if padded else None}
    twin = prepare(copy.deepcopy(net), CONFIG)
    with torch.no_grad():
        calls = {q: 0 for q in quantizers(twin)}
        assert len(calls) == 2 * 2 * 4
        for q in calls:  # no hooks: torch keeps to layers that have some
            q.forward = lambda x, out_dtype=None, q=q: (calls.update({q: calls[q] + 1}), FakeQuant.forward(q, x))[1]
        quantized = twin(**arguments)
        assert set(calls.values()) == {1}
        expected = net(**arguments)
        with fastqat.fake_quant_enabled(twin, False):
            assert torch.equal(twin(**arguments), expected)
        assert set(calls.values()) == {1}
        assert quantized.shape[0] == N and not torch.equal(quantized, expected)
        for q in calls:
            del q.forward
        removed = fastqat.remove(copy.deepcopy(twin))
        assert torch.equal(removed(**arguments), expected)
    assert [type(m) for m in removed.modules()] == [type(m) for m in net.modules()]


def test_calibrating_an_encoder() -> None:
    """In evaluation, with quantizers that only look: none is gone past."""
    twin = prepare(encoder(), CONFIG)
    fastqat.fake_quant_enabled(twin, False)
    fastqat.calibrate(twin, [torch.randn(N, S, E)])
    assert all(q.initialized for q in quantizers(twin))


def test_compiled() -> None:
    """One graph, the same values."""
    twin = prepare(attention(OPTIONS["batch first"]), CONFIG)
    x = torch.randn(N, S, E)
    expected = twin(x, x, x)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert same_results(compiled(x, x, x), expected)
