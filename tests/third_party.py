"""Networks that nobody here wrote, with random weights, and what must hold for each of them once it is prepared.

A network comes in two sizes: a small one for every run of the tests, and the one that people use for the slow run. Run
as a script, this file prints the table of docs/third-party-models.md: ``python tests/third_party.py``.
"""

from __future__ import annotations

import copy
import importlib
import io
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing is downloaded
CONFIG = QConfig(QSpec(4, 0, learn="scale"), QSpec(8, learn="scale"))


@dataclass(frozen=True)
class Model:
    """A network by name: the package it is from, how it is built, and a batch of arguments for its forward."""

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    overrides: dict[str, Any] | None = None


def of_transformers(name: str, inputs: Callable[[], dict[str, Any]], **options: Any) -> Model:
    """A model of transformers, from a configuration: no weights, no downloads."""
    family, _, task = name.partition("For")

    def build() -> nn.Module:
        package = importlib.import_module("transformers")
        return getattr(package, name)(getattr(package, f"{family}Config")(**options))

    return Model(f"{family} ({task})", "transformers", build, inputs)


def of_torchvision(name: str, size: int, overrides: dict[str, Any] | None = None, **options: Any) -> Model:
    """A classifier of torchvision."""

    def build() -> nn.Module:
        return getattr(importlib.import_module("torchvision.models"), name)(**options)

    return Model(name, "torchvision", build, images(size), overrides)


def of_timm(name: str, size: int) -> Model:
    """A classifier of timm."""
    return Model(name, "timm", lambda: importlib.import_module("timm").create_model(name), images(size))


def gpt2(**options: Any) -> nn.Module:
    """A GPT-2, whose layers are no subclasses of torch's."""
    package = importlib.import_module("transformers")
    return package.GPT2LMHeadModel(package.GPT2Config(**options))


def efficientnet_lite() -> nn.Module:
    """EfficientNet-Lite0 of its package, whose convolutions pad by themselves."""
    return importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")


def images(size: int, name: str = "x") -> Callable[[], dict[str, Any]]:
    """Two square images."""
    return lambda: {name: torch.randn(2, 3, size, size)}


def words(vocabulary: int, length: int) -> Callable[[], dict[str, Any]]:
    """Two sentences, one of them padded."""

    def inputs() -> dict[str, Any]:
        ids = torch.randint(0, vocabulary, (2, length))
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return inputs


BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TIED_LLAMA = {"tie_word_embeddings": True, "use_cache": False}
SMALL = (
    of_transformers(
        "MobileNetV2ForImageClassification", images(32, "pixel_values"), image_size=32, depth_multiplier=0.35
    ),
    of_transformers(
        "ResNetForImageClassification",
        images(32, "pixel_values"),
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 2, 1, 1],
    ),
    of_transformers("ViTForImageClassification", images(32, "pixel_values"), **BLOCKS, image_size=32, patch_size=8),
    of_transformers(
        "MobileViTForImageClassification",
        images(64, "pixel_values"),
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
        num_attention_heads=2,
    ),
    of_transformers("BertForMaskedLM", words(50, 10), **BLOCKS, vocab_size=50),
    of_transformers("LlamaForCausalLM", words(50, 10), **BLOCKS, **TIED_LLAMA, vocab_size=50, num_key_value_heads=2),
    of_torchvision("resnet18", 32),
    of_torchvision(
        "VisionTransformer",
        32,
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=48,
    ),
    of_timm("mobilenetv2_050", 32),
    of_timm("test_vit", 160),
)
FULL = (
    of_transformers("MobileNetV2ForImageClassification", images(224, "pixel_values")),
    of_transformers("ResNetForImageClassification", images(224, "pixel_values")),
    of_transformers("ViTForImageClassification", images(224, "pixel_values")),
    of_transformers("MobileViTForImageClassification", images(256, "pixel_values")),
    of_transformers("BertForMaskedLM", words(30000, 64)),
    of_transformers(
        "LlamaForCausalLM",
        words(32000, 64),
        **TIED_LLAMA,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        vocab_size=32000,
    ),
    of_torchvision("resnet50", 224),
    of_torchvision("mobilenet_v3_large", 224),
    of_torchvision("vit_b_16", 224),
    of_torchvision("swin_t", 224, overrides={"*.attn.*": None}),  # a function takes the weights of these layers
    of_timm("efficientnet_b0", 224),
    of_timm("convnext_tiny", 224),
    of_timm("vit_small_patch16_224", 224),
    Model("GPT2 (LMHead)", "transformers", gpt2, words(50257, 64)),
    of_timm("tf_efficientnet_b0", 224),
    of_timm("nf_resnet50", 224),
    Model("EfficientNet-Lite0", "efficientnet_lite_pytorch", efficientnet_lite, images(224, "inputs")),
)


def why_not(package: str) -> str | None:
    """Why a package does not import here, or None."""
    try:
        importlib.import_module(package)
    except Exception as error:  # not ImportError alone: torchvision's C++ part may not fit this build of torch
        return f"{package} does not import: {error}"
    return None


def output(model: nn.Module, inputs: dict[str, Any], *, training: bool = False) -> Tensor:
    """What the model gives, with the same random numbers each time."""
    torch.manual_seed(1)
    y = model.train(training)(**inputs)
    return y if isinstance(y, Tensor) else y.logits


def scales(model: nn.Module) -> list[nn.Parameter]:
    """All learned scales."""
    return [q.scale for q in model.modules() if isinstance(q, FakeQuant)]


@dataclass(frozen=True)
class Facts:
    """What the check of a model found: of the report, and the time of ``prepare`` in seconds."""

    report: fastqat.Report
    prepare_seconds: float


def check(model: Model) -> Facts:
    """All that ``prepare`` and its friends promise, on one network; an AssertionError says what does not hold."""
    torch.manual_seed(0)
    net, inputs = model.build(), model.inputs()
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():  # a head of zeros would hide what is before it
                p.normal_(std=0.1)
    twin = copy.deepcopy(net)
    parameters, state, classes = dict(twin.named_parameters()), twin.state_dict(), [type(m) for m in twin.modules()]
    start = time.perf_counter()
    fastqat.prepare(twin, CONFIG, first_last_bits=8, overrides=model.overrides)
    seconds = time.perf_counter() - start
    found = dict(twin.named_parameters())
    assert all(found[name] is p for name, p in parameters.items()), "a Parameter is another one"
    _check_off(net, twin, inputs)
    fastqat.calibrate(twin, [inputs])
    report = fastqat.report(twin, inputs)
    _check_report(twin, report, inputs)
    _check_state(twin, state, inputs)
    twin.zero_grad()
    output(twin, inputs, training=True).float().square().mean().backward()
    learned = scales(twin)
    assert all(s.grad is not None and bool(s.grad.isfinite().all()) for s in learned), "a scale without a gradient"
    kept = net.state_dict()  # training has moved the statistics of both alike but once: take those of the float model
    fastqat.remove(twin).load_state_dict(kept)
    assert [type(m) for m in twin.modules()] == classes and list(twin.state_dict()) == list(kept), "not removed"
    assert torch.equal(output(twin, inputs), output(net, inputs)), "another output after remove"
    return Facts(report, seconds)


def _check_off(net: nn.Module, twin: nn.Module, inputs: dict[str, Any]) -> None:
    """Without quantization it is the float model, in both modes, with and without gradients."""
    with fastqat.fake_quant_enabled(twin, False):
        for training in (False, True):
            expected, y = output(net, inputs, training=training), output(twin, inputs, training=training)
            assert torch.equal(y, expected), f"another output with quantizers off, training={training}"
        results = []
        for m in (net, twin):
            m.zero_grad()
            output(m, inputs, training=True).float().square().mean().backward()
            results.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None and "fake_quant" not in n})
            m.zero_grad()
        assert results[0].keys() == results[1].keys() and len(results[0]) > 0
        assert all(torch.equal(g, results[1][n]) for n, g in results[0].items()), "another gradient with quantizers off"
        with torch.no_grad():
            assert torch.equal(output(twin, inputs), output(net, inputs)), "another output without gradients"


def _check_report(twin: nn.Module, report: fastqat.Report, inputs: dict[str, Any]) -> None:
    """Each quantizer ran, and each Parameter is either quantized or named as left in float."""
    assert not report.never_ran, report.never_ran
    assert len(report.quantizers) >= len(scales(twin)) > 0
    named = {row.layer for row in report.quantizers} | {row.layer for row in report.left_in_float}
    for name, _ in twin.named_parameters():
        assert "fake_quant" in name or name.rpartition(".")[0] in named, f"{name} is not in the report"
    assert report.operations and "Every quantizer ran" in str(report)
    y = output(twin, inputs)
    with fastqat.fake_quant_enabled(twin, False):
        assert not torch.equal(output(twin, inputs), y), "quantization changes nothing"


def _check_state(twin: nn.Module, state: dict[str, Tensor], inputs: dict[str, Any]) -> None:
    """The keys of the float model and more; a copy, a pickle, a checkpoint, and a checkpoint of the float model."""
    assert state.keys() < twin.state_dict().keys(), "a key is missing"
    y = output(twin, inputs)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    for other in (copy.deepcopy(twin), torch.load(file, weights_only=False)):
        assert torch.equal(output(other, inputs), y), "a copy gives another output"
    other.load_state_dict(twin.state_dict())
    assert torch.equal(output(other, inputs), y), "a checkpoint gives another output"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the checkpoint holds no state for the quantizers")
        other.load_state_dict(state)
    assert not any(q.initialized for q in other.modules() if isinstance(q, FakeQuant))


def main() -> None:
    """Check all models in full size, and print a line of the table for each."""
    print(
        "| package | model | layers | quantizers | quantized parameters | left in float | float operations | prepare |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in FULL:
        reason = why_not(model.package)
        if reason:
            print(f"| {model.package} | {model.name} | {reason.splitlines()[0]} |")
            continue
        facts = check(model)
        r = facts.report
        layers, share = len({row.layer for row in r.quantizers}), r.quantized_parameters / r.parameters
        operations = sum(row.calls for row in r.operations or ())
        print(
            f"| {model.package} {version(model.package)} | {model.name} | {layers} "
            f"| {len(r.quantizers)} | {share:.2%} of {r.parameters / 1e6:.1f} M | {len(r.left_in_float)} modules "
            f"| {operations} | {facts.prepare_seconds:.2f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
