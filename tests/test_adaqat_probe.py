"""The passes of AdaQAT: they compute what a network at these bit-widths computes, and leave no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adaqat_networks import Small, batches, bits_on, prepared, train
from torch import Tensor, nn
from torch.nn import functional as F

import fastqat
from fastqat import QSpec, quantizers
from fastqat.adaqat.grids import at_bits
from fastqat.adaqat.probe import Probe

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS: dict[str, tuple[QSpec, QSpec]] = {
    "LSQ per channel": (quantizers.lsq(4, axis=0), quantizers.lsq(4)),
    "LSQ+": (quantizers.lsq(4), quantizers.lsq_plus(4)),
    "PACT": (quantizers.lsq(4, axis=0, group_size=2), quantizers.pact(4, alpha=1.0)),
    "DoReFa and CG-PACT": (quantizers.dorefa_weight(4), quantizers.cg_pact(4, alpha=1.0)),
    "SAT and DoReFa": (quantizers.dorefa_weight(4, rescale="constant"), quantizers.dorefa_activation(4)),
    "LBT": (quantizers.lbt_weight(4), quantizers.lbt_activation(4)),
    "TRS": (quantizers.trs_weight(4), quantizers.trs_activation(4)),
    "in hindsight": (QSpec(4, range="minmax"), QSpec(4, range="in_hindsight", symmetric=False)),
    "running": (QSpec(4, 0, range="running_minmax", symmetric=False), QSpec(4, range="running_minmax")),
    "stochastic": (quantizers.lsq(4, estimator="stochastic"), QSpec(4, range="minmax", symmetric=False)),
    "tracked": (quantizers.lsq(4, oscillation=fastqat.Oscillation(0.3, 0.6)), quantizers.lsq(4)),
}


def kept(model: nn.Module) -> dict[str, Tensor]:
    """All that a model has, also what it does not save."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def middle(model: nn.Module, part: str) -> list[fastqat.FakeQuant]:
    return [getattr(layer, f"{part}_fake_quant") for layer in model.middle]


@pytest.mark.parametrize("case", GRIDS)
def test_a_pass_leaves_no_trace(case: str) -> None:
    """With widths that do not move, all that there is is what it would be without AdaQAT, bit for bit."""
    lr, steps = (0.5, 12) if case == "tracked" else (0.05, 4)
    data, models = batches(steps), [prepared(*GRIDS[case], dropout=0.3) for _ in range(2)]
    if case not in ("SAT and DoReFa", "stochastic"):
        fastqat.quantize_weights_together(models[1])
    found = []
    for model in models:
        torch.manual_seed(5)
        widths = fastqat.AdaQAT(model, lam=0.0, lr_weight=0.0, lr_activation=0.0) if model is models[1] else None
        train(model, data, widths, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5))
        found.append((kept(model), torch.get_rng_state(), [q.initialized for q in middle(model, "weight")]))
    assert widths is not None and all(None not in update.differences for update in widths.history)
    assert any(update.differences[0] for update in widths.history), "one bit less says something"
    assert_same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1]) and found[0][2] == found[1][2]
    if case == "tracked":
        assert any(q.tracker.frozen().any() for q in middle(models[1], "weight")), "a case that says nothing else"


def test_the_difference_is_that_of_the_losses_of_a_network_at_these_bits() -> None:
    """Bit for bit: a copy whose grid is set by hand computes the same losses."""
    model, data = prepared(), batches(4)
    train(model, data[:3])
    lower = {part: copy.deepcopy(model) for part in ("weight", "activation")}
    for part, copied in lower.items():
        for q in middle(copied, part):
            q.bits = 3
            with torch.no_grad():
                q.scale.mul_(15 / 7)
    with torch.no_grad():
        here = loss_of(copy.deepcopy(model), data[3])
        there = [loss_of(lower[part], data[3]) for part in ("weight", "activation")]
    widths = fastqat.AdaQAT(model, lam=0.0)
    loss = loss_of(model, data[3])
    loss.backward()
    update = widths.step(loss, lambda: loss_of(model, data[3]))
    assert update is not None
    assert update.loss == here.item()
    assert update.differences == tuple(here.item() - other.item() for other in there)
    assert there[0] != there[1] != here


def test_frozen_weights_are_rounded_as_others_at_another_width() -> None:
    """The frozen code is one of the grid that the weight has; a pass over activations alone goes on with it."""
    model, data = prepared(*GRIDS["tracked"], dropout=0.3), batches(13)
    torch.manual_seed(5)
    train(model, data[:12], None, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5))
    assert any(q.tracker.frozen().any() for q in middle(model, "weight"))
    probe, model.drop.p, model.dropout = Probe(model), 0.0, 0.0
    with torch.no_grad():
        for layer in model.middle:
            layer.weight += 0.3 * torch.randn_like(layer.weight)
    here = loss_of(model, data[12])
    lower, free = (copy.deepcopy(model) for _ in range(2))
    for q in middle(lower, "weight"):
        q.tracker = None
        q.bits = 3
        with torch.no_grad():
            q.scale.mul_(15 / 7)
    for q in middle(free, "weight"):
        q.tracker = None
    settings = [dict.fromkeys(middle(model, "weight"), 3), dict.fromkeys(middle(model, "activation"), 4)]
    assert probe.losses(lambda: loss_of(model, data[12]), settings) == [loss_of(lower, data[12]), here]
    assert loss_of(free, data[12]) != here, "frozen codes are not those of rounding"


@pytest.mark.parametrize("case", GRIDS)
def test_equal_widths_give_the_loss_again(case: str) -> None:
    """So does Dropout, as a layer and as a function: it drops the same in all passes of a step."""
    model, data = prepared(*GRIDS[case], dropout=0.4), batches(3)
    probe = Probe(model)
    train(model, data[:2], None, torch.optim.SGD(model.parameters(), lr=1e-3))
    loss = loss_of(model, data[2])
    quantizers_ = [*middle(model, "weight"), *middle(model, "activation")]
    if case == "tracked":  # at its own bit-width a frozen weight has its frozen code: no grid is written
        quantizers_ = middle(model, "activation")
    for passed in probe.losses(lambda: loss_of(model, data[2]), [{q: q.bits for q in quantizers_}, {}]):
        assert passed == loss
    assert probe.losses(lambda: loss_of(model, data[2]), [{q: 3 for q in quantizers_}])[0] != loss


@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.parametrize("together", [False, True])
def test_weights_at_both_widths_from_one_read(case: str, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of two passes are those of each by itself, bit for bit; layers find weights done, where it fits."""
    model, data = prepared(*GRIDS[case], more=1), batches(2)
    dorefa = case in ("SAT and DoReFa", "DoReFa and CG-PACT")
    if together and dorefa:  # one layer of another kind, whose call forgets what was there before it
        model.last.weight_fake_quant = fastqat.FakeQuant(8)
    if together:
        fastqat.quantize_weights_together(model)
    widths = fastqat.AdaQAT(model, lam=0.0)
    train(model, data[:1], None, torch.optim.SGD(model.parameters(), lr=1e-3))
    settings = [dict.fromkeys(width.quantizers, 3) for width in widths.widths]

    def closure() -> Tensor:
        return loss_of(model, data[1])

    closure().backward()
    one_by_one = [widths.probe.losses(closure, [setting])[0] for setting in settings]
    calls = []
    forward = fastqat.FakeQuant.forward
    weights = [*middle(model, "weight"), model.first.weight_fake_quant]
    monkeypatch.setattr(fastqat.FakeQuant, "forward", lambda q, *a, **k: calls.append(q) or forward(q, *a, **k))
    assert widths.probe.losses(closure, settings) == one_by_one and one_by_one[0] != one_by_one[1]
    seen = [sum(call is q for call in calls) for q in weights]
    if dorefa:
        assert seen == [0, 0, 2], "the first layer has one bit-width in both"
    elif not together:
        assert seen == [2, 2, 2]
    assert all(q.together.value is None or together for q in weights), "nothing is kept"
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        loss = closure()
        loss.backward()
        assert widths.probe.losses(closure, [{}, settings[0]])[0] == loss


def test_each_pass_begins_with_the_same_buffers() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model, (images, labels) = prepared(), batches(1)[0]
    model.drop = Counting()
    loss_of(model, (images, labels))
    losses = Probe(model).losses(lambda: loss_of(model, (images, labels)), [{}, {}])
    assert losses[0] == losses[1] and model.drop.calls == 1


@pytest.mark.parametrize("case", GRIDS)
def test_grids_for_a_while_are_those_of_change_bits(case: str) -> None:
    model = prepared(*GRIDS[case], more=1)
    train(model, batches(2))
    changed = [*middle(model, "weight"), *middle(model, "activation")]
    before = kept(model)
    for bits in (2, 3, 5, 8):
        expected = [copy.deepcopy(q) for q in changed]
        for q in expected:
            q.tracker = None
            q.change_bits(bits)
        with at_bits(dict.fromkeys(changed, bits)):
            for q, wanted in zip(changed, expected, strict=True):
                assert bits_on(q) == bits
                assert all(
                    torch.equal(mine, its) for mine, its in zip(q.parameters(), wanted.parameters(), strict=True)
                )
        assert_same(kept(model), before)


def test_a_quantizer_without_a_range_is_left_alone() -> None:
    q = fastqat.FakeQuant(4, axis=0)
    with at_bits({q: 3}):
        assert not q.initialized
    assert q.codes == (-8, 7) and q.bits == 4


def test_where_the_closure_fails_all_is_put_back() -> None:
    model, data = prepared(quantizers.lsq(4, oscillation=fastqat.Oscillation()), QSpec(4, range="minmax")), batches(2)
    train(model, data[:1])
    loss_of(model, data[1])
    before, random = kept(model), torch.get_rng_state()

    def closure() -> Tensor:
        torch.rand(1)
        loss_of(model, data[1])
        raise KeyError("mine")

    bits = dict.fromkeys([*middle(model, "weight"), *middle(model, "activation")], 3)
    with pytest.raises(KeyError, match="mine"):
        Probe(model).losses(closure, [bits])
    assert_same(kept(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(q.observer_enabled and q.tracker is not None for q in middle(model, "weight"))
    assert all(q.observer_enabled for q in middle(model, "activation"))


def test_memory_stays_where_it_is() -> None:
    model, data = prepared(), batches(1)
    train(model, data)
    changed = [*middle(model, "weight"), *middle(model, "activation")]
    places = [(q.qrange.data_ptr(), q.scale.data_ptr(), id(q.scale)) for q in changed]
    widths = fastqat.AdaQAT(model, lam=1.0, lr_weight=0.2, lr_activation=0.1, freeze_after=0)
    train(model, data * 10, widths)
    assert len({update.hardware for update in widths.history}) > 2, "bits change"
    assert [(q.qrange.data_ptr(), q.scale.data_ptr(), id(q.scale)) for q in changed] == places


def test_a_copy_of_the_model_is_not_tied_to_the_first() -> None:
    model = prepared(dropout=0.2)
    fastqat.AdaQAT(model, lam=0.1)
    copied = copy.deepcopy(model)
    train(copied, batches(1))
    assert isinstance(copied, Small)


def test_nothing_is_compiled_anew_over_200_changes_of_bits() -> None:
    compilations: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        compilations.append(graph)
        return graph.forward

    model, data = prepared(), batches(1)
    train(model, data)
    written = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    widths = fastqat.AdaQAT(model, lam=0.0, lr_weight=1.0, lr_activation=1.0, freeze_after=0)
    images, labels = data[0]
    for step in range(35):
        loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        model.zero_grad()
        before = [width.number.bits for width in widths.widths]
        widths.step(loss, lambda: F.cross_entropy(compiled(images), labels))
        for k, width in enumerate(widths.widths):
            width.number.value = 3.5 + (step + k) % 3
        widths.load_state_dict(widths.state_dict())
        written += 4 + sum(width.number.bits != old for width, old in zip(widths.widths, before, strict=True))
        if step == 1:
            first = len(compilations)
    assert written > 200 and first == len(compilations) <= 3
    torch._dynamo.reset()
