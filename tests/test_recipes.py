"""The recipes of the package: each of them runs, those of methods differ, those of a paper are what it says."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch

from fastqat import models
from fastqat.train.config import Config
from fastqat.train.extras import import_extra
from fastqat.train.recipe import make_config, read_recipe, recipes
from fastqat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def of_recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each recipe of the package: a few steps of a small network on a few digits."""
    small = {
        "data": "digits",
        "model": "resume_networks:Dropped",
        "model_options": {},
        "image_size": None,
        "device": "cpu",
        "threads": 1,
    }
    small |= {"limit_train": 64, "batch_size": 16, "calibration_batches": 1, "bn_batches": 2, "range": "minmax"}
    small |= {"epochs": 2, "save_seconds": 1000.0}
    folders = {name: tmp_path_factory.mktemp("recipes") / name for name in recipes()}
    for name, folder in folders.items():
        trainer = Trainer(make_config({"recipe": [name], **small, "out": folder}))
        trainer.quantize()
        trainer.train_quantized()
    return folders


def test_recipes_run(of_recipes: dict[str, Path]) -> None:
    for name, folder in of_recipes.items():
        tested = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
        recipe = read_recipe(name)
        assert len(tested) == 2
        assert all(("oscillating" in row) == recipe.get("track_oscillations", False) for row in tested), name
        always = recipe.get("reestimate_bn") == "always"
        assert ["bn_test_loss" in row for row in tested] == [always, True], name


def test_methods_differ(of_recipes: dict[str, Path]) -> None:
    """Each method does something else to the weights than plain LSQ, but for freezing, which has no time here."""
    methods = ("lsq", "dampen", "ewgs", "dsq", "psg", "stochastic", "bin-regularization", "pact")
    load = import_extra("safetensors.torch").load_file
    found = {name: load(of_recipes[name] / "model.safetensors")["depthwise.weight"] for name in methods}
    for one, other in itertools.combinations(methods, 2):
        assert not torch.equal(found[one], found[other]), (one, other)


def test_networks_of_recipes() -> None:
    """They take the images that their recipe names; those of other packages only where these are installed."""
    for name in recipes():
        recipe = read_recipe(name)
        network = recipe.get("model", "")
        if "image_size" in recipe and (network in models.MODELS or importlib.util.find_spec(network.split(":")[0])):
            edge = recipe["image_size"]
            models.build(recipe["model"], 1000, (3, edge, edge), **recipe.get("model_options", {}))


def test_paper_settings() -> None:
    """Literals of the scripts that could be read; all eight agree but for these."""
    decay = {"mobilenetv2-imagenet-w3-freeze": 2.5e-5, "mobilenetv2-imagenet-w4-freeze": 5e-5}
    decay |= {"mobilenetv2-imagenet-w3-dampen": 2.5e-5, "mobilenetv2-imagenet-w4-dampen": 2.5e-5}
    decay |= {f"efficientnet-lite0-imagenet-w3-{method}": 5e-5 for method in ("freeze", "dampen")}
    decay |= {f"efficientnet-lite0-imagenet-w4-{method}": 1e-4 for method in ("freeze", "dampen")}
    ends = {"mobilenetv2-imagenet-w3": 0.011, "mobilenetv2-imagenet-w4": 0.01}
    ends |= {"efficientnet-lite0-imagenet-w3": 0.005, "efficientnet-lite0-imagenet-w4": 0.015}
    assert set(decay) == {name for name in recipes() if "imagenet" in name}
    for name, wanted in decay.items():
        config = Config(**read_recipe(name))
        bits = 3 if "w3" in name else 4
        assert (config.bits_weight, config.bits_activation, config.per_channel) == (bits, bits, False)
        assert (config.epochs, config.lr) == (90 if "mobile" in name else 50, 0.01 if bits == 3 else 0.0033)
        assert (config.weight_decay, config.batch_size, config.quantizer_lr) == (wanted, 128, 1e-5)
        end = ends[name.rpartition("-")[0]] if name.endswith("freeze") else 0.0
        assert (config.freeze_threshold, config.dampening) == (end, 0.0 if end else 0.1)
        assert config.freeze_threshold_start == (0.1 if end else None) and config.oscillation_momentum == 0.001
