"""Bit-widths by hand from a recipe or the command line, and the quantizers of DoReFa and SAT in a run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_networks import Dropped
from small_runs import TINY, results, stop_at_step
from torch import nn

import fastqat
from fastqat import QSpec, cli
from fastqat.models import build
from fastqat.nn.calibrate import to_calibrate
from fastqat.train.config import Config
from fastqat.train.extras import import_extra
from fastqat.train.interrupt import Interrupted
from fastqat.train.layer_bits import LayerBits, parse
from fastqat.train.quantization import prepare_as, quantizers
from fastqat.train.recipe import make_config
from fastqat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
SHORT: dict[str, Any] = {
    **{"model": "resume_networks:Dropped", "limit_train": 64, "batch_size": 16, "calibration_batches": 1},
    **{"device": "cpu", "threads": 1, "range": "minmax"},
}
IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(model: nn.Module | None = None, **options: Any) -> Any:
    """A network as a run with these options prepares it: that of the tests, stem, depthwise and linear."""
    config = Config(calibration_batches=1, **options)
    model = Dropped(10) if model is None else model
    prepare_as(config, model, quantizers(config, 10))
    return model


def widths(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    return {name: tuple(bits) for name, bits in fastqat.bit_widths(model).items()}  # type: ignore[misc]


def weights(model: nn.Module) -> dict[str, QSpec]:
    """What matters of the quantizers of weights."""
    return {name: layer.weight_fake_quant for name, layer in model.named_modules() if hasattr(layer, "activation_on")}


@pytest.mark.parametrize(
    ("value", "wanted"),
    (
        (4, (4, 4)),
        ("float", ("float", "float")),
        ("4/6", (4, 6)),
        ("1/8", (1, 8)),
        ("3/float", (3, "float")),
        ("float/8", ("float", 8)),
        ({"weight": 4, "activation": 6}, (4, 6)),
        ({"weight": 2}, (2, None)),
        ({"activation": "float"}, (None, "float")),
    ),
)
def test_what_may_be_written(value: Any, wanted: tuple[Any, Any]) -> None:
    assert parse("a", value) == LayerBits(*wanted)


@pytest.mark.parametrize(
    "value",
    (0, 9, -1, 4.0, True, None, "", "4/", "/4", "4/6/8", "4/9", "0/4", "four", [4, 6], {}, {"weights": 4})
    + ({"weight": None}, {"weight": 0}, {"weight": 4, "bias": 8}, "-4/4"),
)
def test_what_may_not(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^bits of 'conv\*': wanted bits from 1 to 8 or 'float': .*; got "):
        Config(bits={"conv*": value})


def test_layers_get_their_bits() -> None:
    """The last pattern that matches decides, of what it names; others have what all have, or the edges."""
    bits: dict[str, Any] = {
        "layer1.*": {"weight": 4, "activation": 6},
        "layer1.1.conv?": "2/3",
        "layer3.2.conv2": {"weight": 2},
        "layer2*": "float",
        "layer2.0.conv1": 5,
        "linear": {"activation": "float"},
    }
    found = widths(prepared(build("resnet20", 10, (3, 32, 32)), bits_weight=3, bits_activation=4, bits=bits))
    assert found["conv1"] == (8, 8) and found["linear"] == (8, None) and found["layer3.2.conv2"] == (2, 4)
    assert [found[f"layer1.{block}.conv1"] for block in range(3)] == [(4, 6), (2, 3), (4, 6)]
    assert {name: pair for name, pair in found.items() if name.startswith("layer2")} == {"layer2.0.conv1": (5, 5)}
    assert found["layer3.1.conv1"] == (3, 4)


def test_what_it_makes_of_other_options() -> None:
    """Bits that are given win over float, and over the bits of the edges; the rest of a quantizer stays."""
    assert widths(prepared(first_last_float=True, bits={"stem": "4/5"})) == {"stem": (4, 5), "depthwise": (3, 3)}
    assert widths(prepared(first_last_float=True, bits={"stem": {"weight": 4}}))["stem"] == (4, None)
    found = widths(prepared(bits_activation=0, bits={"depthwise": "4/6"}))
    assert found == {"stem": (8, None), "depthwise": (4, 6), "linear": (8, None)}
    for quantizer in ("lsq", "lbt", "trs", "range", "dorefa"):
        plain, mixed = prepared(quantizer=quantizer), prepared(quantizer=quantizer, bits={"*": "4/6"})
        assert set(widths(mixed).values()) == {(4, 6)}
        for name in ("stem", "depthwise", "linear"):
            for which in ("weight_fake_quant", "activation_fake_quant"):
                one, other = (getattr(net.get_submodule(name), which) for net in (plain, mixed))
                for option in ("range", "learn", "axis", "normalize", "restricted", "ste_mask", "fixed_range"):
                    assert getattr(one, option) == getattr(other, option), (quantizer, name, which, option)
    gradients = prepared(bits_gradient=4, bits={"depthwise": 5, "linear": "float"})
    assert gradients.depthwise.gradient_fake_quant.bits == 4 and not hasattr(gradients.linear, "gradient_fake_quant")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (
            {"bits": {"conv9": 4}},
            "bits: wanted a pattern that matches the name of a layer that can be quantized.*'conv9'",
        ),
        ({"bits": {"norm": 4}}, "bits: wanted a pattern that matches .*; got 'norm'"),
        ({"quantizer": "lbt", "bits": {"stem": 1}}, "bits of layer 'stem': bits: wanted 2 to 8; got 1"),
        ({"quantizer": "dorefa", "bits": {"lin*": "1/4"}}, "bits of layer 'linear': bits: wanted 2 to 8; got 1"),
    ),
)
def test_layers_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        prepared(**options)


def test_the_command_line_and_recipes() -> None:
    """The same as YAML; wrong ones end before there is a folder."""
    argv = ["train", "--bits", "layer1.*=4/6", "fc=float", "--recipe", "digits", "--bits", "a=5"]
    given = vars(cli._parser().parse_args(argv))
    del given["command"]
    Path("mine.yaml").write_text('bits: {"layer1.*": {weight: 4, activation: 6}, fc: float, a: 5}\n')
    one, other = make_config(given), make_config({"recipe": ["mine.yaml"]})
    assert one.bit_widths == "W3A3-mixed" and Config().bit_widths == "W3A3"
    assert [parse("", b) for b in one.bits.values()] == [parse("", b) for b in other.bits.values()]
    assert list(one.bits) == list(other.bits) == ["layer1.*", "fc", "a"]
    yaml = import_extra("yaml")
    assert Config(**yaml.safe_load(yaml.safe_dump(one.plain()))).bits == one.bits


def test_mistakes_leave_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ("x=4", "bits: wanted a pattern that matches"),
        ("linear=4/12", "bits of 'linear': wanted bits from 1 to 8"),
    ):
        assert cli.main(["train", *TINY.split(), "--bits", words, "--out", "run"]) == 2
        assert message in capsys.readouterr().err and not list(Path().iterdir())


def test_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has the bits; weights go into a model that was prepared at others; it resumes to the same bits."""
    options = ["--bits", "linear=4/6", "depth*=2/5", "--out"]
    assert cli.main(["train", *TINY.split(), *options, "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, 9, lambda: (_ for _ in ()).throw(Interrupted(15)))
        assert cli.main(["train", *TINY.split(), *options, "stopped"]) == 143
    assert cli.main(["train", "--resume", "stopped"]) == 0
    assert results(Path("stopped")) == results(Path("whole"))
    kept = import_extra("yaml").safe_load(Path("whole/config.yaml").read_text())
    assert kept["bits"] == {"linear": "4/6", "depth*": "2/5"}
    state = import_extra("safetensors.torch").load_file("whole/model.safetensors")
    again, other = prepared(bits=kept["bits"], range="minmax"), prepared(bits_weight=7, bits_activation=8)
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="the checkpoint has 2 bits, and the model had 7"):
        other.load_state_dict(state)
    assert widths(again) == widths(other) == {"stem": (8, 8), "depthwise": (2, 5), "linear": (4, 6)}
    assert torch.equal(again.eval()(IMAGE), other.eval()(IMAGE))
    rows = {row.layer: (row.bits_weight, row.bits_activation) for row in fastqat.cost(other, IMAGE).layers}
    assert rows == widths(other)


def test_dorefa_and_sat() -> None:
    """Which weights are rescaled, and which range the inputs have."""
    options: dict[str, Any] = {"quantizer": "dorefa", "bits_weight": 4, "bits_activation": 3}
    for rescale, layers, wanted in (
        ("none", "linear", [None, None, None]),
        ("constant", "linear", [None, None, "constant"]),
        ("std", "all", ["std", "std", "std"]),
    ):
        net = prepared(**options, weight_rescale=rescale, weight_rescale_layers=layers)
        found = weights(net)
        assert [q.rescale for q in found.values()] == wanted and {q.normalize for q in found.values()} == {"tanh"}
        assert [q.bits for q in found.values()] == [8, 4, 8]
    alone: dict[str, Any] = {**options, "bits_activation": 0, "activation_quantizer": "dorefa", "bits": {"*": "4/4"}}
    assert [q.range for q in to_calibrate(prepared(**alone))] == ["mse"], "the input of the first layer"
    mixed = prepared(**options, weight_rescale="std", bits={"linear": "5/6"})
    assert mixed.linear.weight_fake_quant.rescale == "std" and widths(mixed)["linear"] == (5, 6)
    for activation, estimator in (("cg_pact", "ste"), ("pact", "pact"), ("dorefa", None)):
        net = prepared(**options, activation_quantizer=activation)
        fastqat.calibrate(net, [IMAGE], progress=False)
        first, second = net.stem.activation_fake_quant, net.depthwise.activation_fake_quant
        assert first.codes == (-128, 127) and second.codes == (0, 7), "the sign of the input comes from the data"
        assert first.learn == "scale" and second.learn == (None if estimator is None else "scale")
        assert second.estimator == (estimator or "ste")
        assert (second.scale.item() * 7 == pytest.approx(1)) == (activation == "dorefa")


@pytest.mark.parametrize(
    "options",
    (
        {"quantizer": "dorefa", "activation_quantizer": "dorefa", "first_last_float": True},
        {"bits": {"*": "4/float"}},
        {"bits_activation": 0, "bits": {"depthwise": "4/4"}},
    ),
)
def test_ranges_of_few_layers(options: dict[str, Any], tmp_path: Path) -> None:
    """Runs that have nothing to calibrate, or one layer alone, which takes no range from the test images."""
    config = Config(**options, **SHORT, out=tmp_path / "run")
    trainer = Trainer(config)
    assert to_calibrate(trainer.model) == []  # as it was
    trainer.quantize()
    found = [q for q in trainer.model.modules() if isinstance(q, fastqat.FakeQuant)]
    assert all(q.initialized for q in found)
    batches = itertools.islice(trainer.data.train_batches(16, seed=0, epoch=15, augment=False), 1)
    if chosen := to_calibrate(trainer.model):
        scale = chosen[0].scale.detach().clone()
        fastqat.calibrate(trainer.model, batches, progress=False)
        assert len(chosen) == 1 and torch.equal(chosen[0].scale, scale)
    trainer.close()


def test_a_layer_that_nothing_calls(tmp_path: Path) -> None:
    """Found without calibration, too."""
    with pytest.raises(ValueError, match="model: wanted a network that calls all layers .*, which never calls unused$"):
        Trainer(
            Config(**{**SHORT, "model": "test_mixed_precision:WithUnused"}, bits={"*": "4/float"}, out=tmp_path / "a")
        )


class WithUnused(Dropped):
    """A network with a layer that it does not call."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("options", "name"),
    (
        ({"weight_rescale": "std"}, "weight_rescale"),
        ({"activation_quantizer": "pact"}, "activation_quantizer"),
        ({"weight_rescale_layers": "all", "quantizer": "lbt"}, "weight_rescale_layers"),
        ({"quantizer": "dorefa", "estimator": "ewgs"}, "estimator"),
        ({"quantizer": "dorefa", "activation_estimator": "pact"}, "activation_estimator"),
        ({"quantizer": "dorefa", "track_oscillations": True}, "track_oscillations"),
        ({"quantizer": "dorefa", "dampening": 0.1}, "dampening"),
        ({"quantizer": "dorefa", "bin_regularization": 0.1}, "bin_regularization"),
        ({"quantizer": "dorefa", "transition_rate": 0.1}, "transition_rate"),
    ),
)
def test_options_that_do_not_fit(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: wanted (another quantizer than dorefa|quantizer dorefa beside it)"):
        Config(**options)


def test_training_moves_what_it_should() -> None:
    """A few steps of SAT: the loss falls, alpha learns, DoReFa's grid stays; at 4 bits and then at 2."""
    torch.manual_seed(0)
    rescaled = {"weight_rescale": "std", "weight_rescale_layers": "all"}  # there is no batch normalization behind all
    net = prepared(quantizer="dorefa", bits_weight=4, bits_activation=4, **rescaled)
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    fastqat.calibrate(net, [images], progress=False)
    net.train().dropout.p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    alpha = net.linear.activation_fake_quant.scale
    for bits in (4, 2):
        fastqat.set_bit_widths(net, {"*": (bits, bits)})
        before, losses = alpha.item(), []
        for _ in range(15):
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3]) and alpha.item() != before
        scale = net.depthwise.weight_fake_quant.scale.item()
        assert scale == pytest.approx(2 / (2**bits - 1))
