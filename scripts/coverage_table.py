"""Table of docs/coverage.md: the share of many architectures, with random weights, that ``prepare`` quantizes.

Run as a script, this file writes that page: ``python scripts/coverage_table.py``. Words name the models to look at, and
print their rows alone. A package that does not import has no rows.

timm imports torchvision. Where torchvision's compiled operators were built for another torch and do not load, its
import fails at the operators that it registers in Python; :func:`declare_operators` declares them first, by name alone.
None of the networks here calls one.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from third_party import Model, images, of_timm, of_transformers, why_not  # noqa: E402

import fastqat  # noqa: E402
from fastqat import QConfig, QSpec  # noqa: E402
from fastqat.nn.coverage import coverage_of, percent  # noqa: E402

CONFIG = QConfig(QSpec(4, 0, range="minmax"), QSpec(8))
PAGE = ROOT / "docs" / "coverage.md"
ENOUGH = 0.98  # a row below it has a reason

TIMM = (
    "resnet18 resnet50 resnet26d resnext50_32x4d seresnet50 nf_resnet50 nf_regnet_b0 dm_nfnet_f0 densenet121 vgg11_bn "
    "mobilenetv2_100 mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv4_conv_small ghostnet_100 ghostnetv2_100 "
    "efficientnet_b0 efficientnet_lite0 tf_efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_b0 mixnet_s "
    "mnasnet_100 fbnetc_100 lcnet_100 tinynet_e hardcorenas_a regnetx_002 regnety_002 rexnet_100 repvgg_a0 "
    "mobileone_s0 convnext_atto convnextv2_atto edgenext_xx_small mobilevit_xxs mobilevitv2_050 fastvit_t8 "
    "efficientformer_l1 poolformer_s12 vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 "
    "xcit_nano_12_p16_224 levit_128s mixer_s32_224 resmlp_12_224 pvt_v2_b0 coat_lite_tiny cait_xxs24_224 "
    "beit_base_patch16_224 crossvit_tiny_240 gmlp_ti16_224 dla34 hrnet_w18_small res2net50_26w_4s"
).split()

SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
WIDE = {**SHAPE, "intermediate_size": 512}
GROUPED = {**WIDE, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 200}
PAIRS = {
    "vocab_size": 200,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
}
T5 = {"vocab_size": 200, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4}
IMAGE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
IMAGE |= {"image_size": 32, "patch_size": 8}
CLIP = {"text_config": {**WIDE, "max_position_embeddings": 16}, "vision_config": IMAGE, "projection_dim": 128}


def tokens(*names: str, length: int = 8) -> Callable[[], dict[str, Any]]:
    """One sentence, under each of these names."""
    return lambda: {name: torch.arange(2, 2 + length)[None] for name in names or ("input_ids",)}


def picture(size: int = 32) -> Callable[[], dict[str, Any]]:
    """One image."""
    return lambda: {"pixel_values": torch.zeros(1, 3, size, size)}


def both() -> dict[str, Any]:
    """A sentence and an image."""
    return {**tokens()(), **picture()()}


def sound(*, mels: int, frames: int) -> Callable[[], dict[str, Any]]:
    """A spectrogram, and a sentence."""
    return lambda: {"input_features": torch.zeros(1, mels, frames), "decoder_input_ids": torch.arange(8)[None]}


TRANSFORMERS = (
    of_transformers("GPT2LMHeadModel", tokens(), **GPT),
    of_transformers("GPTNeoXForCausalLM", tokens(), **WIDE),
    of_transformers("GPTJForCausalLM", tokens(), **GPT, rotary_dim=16),
    of_transformers("BloomForCausalLM", tokens(), hidden_size=128, n_layer=2, n_head=4, vocab_size=200),
    of_transformers("FalconForCausalLM", tokens(), **SHAPE),
    of_transformers("OPTForCausalLM", tokens(), **SHAPE, ffn_dim=512, word_embed_proj_dim=128),
    of_transformers("LlamaForCausalLM", tokens(), **GROUPED),
    of_transformers("MistralForCausalLM", tokens(), **GROUPED),
    of_transformers("Qwen2ForCausalLM", tokens(), **GROUPED),
    of_transformers("Qwen3ForCausalLM", tokens(), **GROUPED, head_dim=32),
    of_transformers("GemmaForCausalLM", tokens(), **GROUPED, head_dim=32),
    of_transformers("Gemma2ForCausalLM", tokens(), **GROUPED, head_dim=32),
    of_transformers("Phi3ForCausalLM", tokens(), **GROUPED, pad_token_id=0),
    of_transformers("PhiForCausalLM", tokens(), **WIDE),
    of_transformers("StableLmForCausalLM", tokens(), **GROUPED),
    of_transformers("OlmoForCausalLM", tokens(), **GROUPED),
    of_transformers("CohereForCausalLM", tokens(), **GROUPED),
    of_transformers("GraniteForCausalLM", tokens(), **GROUPED),
    of_transformers("MixtralForCausalLM", tokens(), **EXPERTS),
    of_transformers("GptOssForCausalLM", tokens(), **EXPERTS, head_dim=32),
    of_transformers(
        "Qwen3MoeForCausalLM", tokens(), **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256
    ),
    of_transformers("MambaForCausalLM", tokens(), hidden_size=128, num_hidden_layers=2, vocab_size=200),
    of_transformers("BertForMaskedLM", tokens(), **WIDE),
    of_transformers("RobertaForMaskedLM", tokens(), **WIDE),
    of_transformers("DistilBertForMaskedLM", tokens(), dim=128, hidden_dim=512, n_layers=2, n_heads=4, vocab_size=200),
    of_transformers("AlbertForMaskedLM", tokens(), **WIDE, embedding_size=64),
    of_transformers("ElectraForMaskedLM", tokens(), **WIDE, embedding_size=64),
    of_transformers("DebertaV2ForMaskedLM", tokens(), **WIDE),
    of_transformers("ModernBertForMaskedLM", tokens(), **WIDE, pad_token_id=0),
    of_transformers("T5ForConditionalGeneration", tokens("input_ids", "decoder_input_ids"), **T5),
    of_transformers("MT5ForConditionalGeneration", tokens("input_ids", "decoder_input_ids"), **T5),
    of_transformers("BartForConditionalGeneration", tokens("input_ids", "decoder_input_ids"), **PAIRS),
    of_transformers("MarianMTModel", tokens("input_ids", "decoder_input_ids"), **PAIRS, pad_token_id=1),
    of_transformers(
        "WhisperForConditionalGeneration",
        sound(mels=80, frames=32),
        **PAIRS,
        max_source_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    of_transformers(
        "Wav2Vec2ForCTC",
        lambda: {"input_values": torch.zeros(1, 4000)},
        **WIDE,
        conv_dim=[64] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    of_transformers("CLIPModel", both, **CLIP),
    of_transformers("ViTForImageClassification", picture(), **IMAGE),
    of_transformers("DeiTForImageClassification", picture(), **IMAGE),
    of_transformers("BeitForImageClassification", picture(), **IMAGE),
    of_transformers("Dinov2ForImageClassification", picture(), **IMAGE),
    of_transformers(
        "SwinForImageClassification",
        picture(64),
        image_size=64,
        patch_size=4,
        embed_dim=64,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    of_transformers("ConvNextForImageClassification", picture(64), hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1]),
    of_transformers("SegformerForImageClassification", picture(64)),
    of_transformers(
        "DetrForObjectDetection",
        picture(64),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config={"model_type": "resnet", "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]},
        **{key: value for key, value in PAIRS.items() if key != "vocab_size"},
    ),
)


def declare_operators() -> None:
    """Declare torchvision's compiled operators where they do not load, so that it imports; it cannot call them."""
    try:
        importlib.import_module("torchvision")
        return
    except ImportError:
        return  # not installed
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    for name in ("roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(f"{name}(Tensor input) -> Tensor")
        library.define(f"_{name}_backward(Tensor grad) -> Tensor")
    library.define("_roi_align_backward(Tensor grad) -> Tensor")
    globals()["_library"] = library  # the operators live as long as it does


def efficientnet_lite() -> Model:
    """The network of the package efficientnet-lite-pytorch."""

    def build() -> nn.Module:
        return importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")

    return Model("efficientnet-lite0", "efficientnet_lite_pytorch", build, images(224, "inputs"))


def models() -> list[Model]:
    """All architectures; those of packages that do not import too."""
    found = [of_timm(name, 0) for name in TIMM]
    return [*found, efficientnet_lite(), *TRANSFORMERS]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    package: str
    model: str
    coverage: fastqat.Coverage

    @property
    def reasons(self) -> str:
        """The kinds that make it less than enough, the largest three."""
        c = self.coverage
        if min(c.parameters, 1.0 if c.multiplications is None else c.multiplications) >= ENOUGH:
            return ""
        return "; ".join(f"{row.modules} {row.kind}: {row.reason}" for row in c.left[:3])

    def __str__(self) -> str:
        shares = [self.coverage.parameters, self.coverage.multiplications or 0.0]
        return f"| {self.package} | {self.model} | {' | '.join(map(percent, shares))} | {self.reasons} |"


def row_of(model: Model) -> Row:
    """Build a model, prepare it, and count."""
    torch.manual_seed(0)
    net = model.build().eval()
    inputs = model.inputs()
    if model.package == "timm":
        inputs = {"x": torch.zeros(1, *net.default_cfg["input_size"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastqat.prepare(net, CONFIG, coverage=None)
        return Row(model.package, model.name, coverage_of(net, inputs))


def rows(wanted: list[str]) -> Iterator[Row]:
    """The rows of the models that are wanted, or of all."""
    declare_operators()
    missing = {package for package in {m.package for m in models()} if why_not(package)}
    for model in models():
        if model.package not in missing and (not wanted or model.name in wanted):
            yield row_of(model)


HEADING = """# Coverage

A bit-width says little where most of a network stays in float. So the share that is quantized is said with it:

    report = fastqat.report(model, example)
    print(report.coverage)                  # 99.2 % of the multiplications
    print(report.coverage.parameters)       # 0.998: weights with a quantizer, of all parameters
    for kind in report.coverage.left:       # what stays in float, the largest first, and why
        print(kind.kind, kind.modules, kind.parameters, kind.multiplications, kind.reason)

`fastqat.prepare(model, config, example_inputs=example)` warns below 95 % of the multiplications, or of the parameters
of two dimensions or more (norms and biases are never quantized); without example inputs it looks at the parameters
alone. Layers that your own `overrides` leave in float are not held against it. `coverage="error"` raises and leaves the
model as it was, a number is another least share, and `coverage=None` is silent.

A function may also read a weight that is quantized, and not see its quantizer: a head that calls
`F.linear(h, emb.weight)`, or a layer in float that was tied to a quantized one. The report lists each under "READ PAST
ITS QUANTIZER" (`report.past`). Without example inputs it can only list the modules that hold such a weight too.

## Architectures

The share of the parameters and of the multiplications of {count} architectures that `fastqat.prepare` quantizes with
`QConfig(QSpec(4, 0), QSpec(8))`: random weights; timm's at their input size with one image; those of transformers in
small configurations with 8 tokens or small images, so that layers have the share here that they have in short texts.
Products of two activations, those of attention, count as float. A row below 98 % names the three largest kinds that
stay in float, and why. `python scripts/coverage_table.py` wrote this page.

| package | model | parameters | multiplications | left in float |
|---|---|---|---|---|
"""


def main() -> None:
    """Write the page, or print the rows of the models that the command line names."""
    torch.set_num_threads(1)
    found = []
    for row in rows(sys.argv[1:]):
        found.append(row)
        print(row, f"{time.process_time():.0f} s", flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(HEADING.format(count=len(found)) + "".join(f"{row}\n" for row in found))


if __name__ == "__main__":
    main()
