"""Options of a run: flags, YAML and Python name and check them alike. Schedules, optimizers, averages."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastqat import AveragedModel, cli
from fastqat.train import config as config_module
from fastqat.train.config import OPTIONS, Config
from fastqat.train.extras import import_extra
from fastqat.train.optimization import Updates, schedule_factor, weight_optimizer
from fastqat.train.recipe import make_config, parse_options, read_recipe, recipes

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


def flags(*argv: str) -> dict[str, Any]:
    """The options that the command line hands to ``train``."""
    options = vars(cli._parser().parse_args(["train", *argv]))
    del options["command"]
    return options


def test_every_option_is_a_flag_and_a_key() -> None:
    """One value of each kind, through a flag and through YAML, gives the same."""
    given = {
        "--lr": ("1e-3", "lr: 1e-3"),  # a word in YAML 1.1
        "--epochs": ("7", "epochs: 7"),
        "--first-last-bits": ("0", "first_last_bits: 0"),
        "--root": ("some/where", "root: some/where"),
        "--optimizer": ("adamw", "optimizer: adamw"),
        "--step-at": ("0.3 0.9", "step_at: [0.3, 0.9]"),
        "--model-options": ("width=0.5 name=a residual=true depth=3", None),
        "--limit-train": ("5", "limit_train: 5"),
        "--bf16": ("", "bf16: true"),
        "--no-compile": ("", "compile: false"),
    }
    argv = [word for flag, (words, _) in given.items() for word in (flag, *words.split())]
    text = "\n".join(line for _, line in given.values() if line)
    text += "\nmodel_options: {width: 0.5, name: a, residual: true, depth: 3}"
    from_flags, from_yaml = make_config(flags(*argv)), Config(**parse_options(text, "text"))
    assert from_flags == dataclasses.replace(from_yaml, threads=1)  # the recipe of the digits
    assert from_yaml.lr == 1e-3 and from_yaml.root == Path("some/where") and from_yaml.step_at == (0.3, 0.9)
    assert from_yaml.model_options == {"width": 0.5, "name": "a", "residual": True, "depth": 3}
    known = {action.dest for action in cli._parser()._subparsers._group_actions[0].choices["train"]._actions}
    assert set(OPTIONS) <= known


def test_config_survives_yaml() -> None:
    config = Config(root=Path("a"), step_at=(0.25,), model_options={"width": 1.5}, limit_train=3, bf16=True, lr=1e-05)
    text = import_extra("yaml").safe_dump(config.plain())
    assert Config(**parse_options(text, "text")) == config


def test_recipe_gives_way_to_options() -> None:
    assert make_config({}) == Config(threads=1)
    cifar = make_config({"data": "cifar10", "lr": 0.5})
    assert (cifar.model, cifar.bits_weight, cifar.batch_size, cifar.lr) == ("resnet20", 4, 128, 0.5)
    assert make_config({"recipe": ["cifar10"]}) == make_config({"data": "cifar10"})
    Path("mine.yaml").write_text("data: cifar10\nlr: 0.3\nepochs: 2\n")
    mine = make_config(flags("--recipe", "mine.yaml", "--epochs", "5"))
    assert (mine.data, mine.lr, mine.epochs, mine.bits_weight) == ("cifar10", 0.3, 5, Config.bits_weight)
    assert make_config({"data": "fashion-mnist"}) == Config(data="fashion-mnist")


def test_recipes_are_layers() -> None:
    """The later one wins; the recipe of the data lies below, unless one of them names data itself."""
    Path("mine.yaml").write_text("lr: 0.3\nepochs: 2\noscillation_momentum: 0.2\n")
    froze = make_config(flags("--data", "cifar10", "--model", "mobilenetv2", "--recipe", "freeze", "--root", "a"))
    assert (froze.model, froze.bits_weight, froze.fp32_epochs) == ("mobilenetv2", 4, 160)
    assert froze.track_oscillations and froze.freeze_threshold == read_recipe("freeze")["freeze_threshold"] > 0
    assert make_config(flags("--data", "cifar10", "--recipe", "mine.yaml")).lr == 0.3 != read_recipe("cifar10")["lr"]
    mine = make_config(flags("--recipe", "mine.yaml", "--recipe", "freeze", "--epochs", "5"))
    assert (mine.data, mine.threads, mine.lr, mine.epochs) == ("digits", 1, 0.3, 5)
    assert mine.oscillation_momentum == read_recipe("freeze")["oscillation_momentum"]
    assert make_config(flags("--recipe", "freeze", "--recipe", "mine.yaml")).oscillation_momentum == 0.2
    both = make_config(flags("--recipe", "dampen", "--recipe", "cifar10-mobilenetv2"))
    assert (both.data, both.fp32_epochs, both.dampening) == ("cifar10", 12, 0.1)
    assert make_config(flags("--recipe", "lsq", "--data", "fashion-mnist")).threads is None


@pytest.mark.parametrize("name", recipes())
def test_recipes_of_the_package(name: str) -> None:
    assert Config(**read_recipe(name)).data in config_module.DATASETS
    assert name in recipes() and {"digits", "cifar10"} <= set(recipes())


MISTAKES = {
    "unknown": ("learning_rate: 1", "recipe bad.yaml: unknown option 'learning_rate'; all are in fastqat train --help"),
    "nearest": ("batchsize: 1", "recipe bad.yaml: unknown option 'batchsize'; did you mean 'batch_size'?"),
    "capitals": ("LR: 1", "recipe bad.yaml: unknown option 'LR'; did you mean 'lr'?"),
    "dashes": ("weight-decay: 1", "unknown option 'weight-decay'; did you mean 'weight_decay'?"),
    "word": ("lr: fast", "recipe bad.yaml: lr: wanted a number of at least 0; got 'fast'"),
    "truth": ("epochs: true", "epochs: wanted an integer of at least 0; got True"),
    "number as truth": ("compile: 1", "compile: wanted true or false; got 1"),
    "float": ("epochs: 1.5", "epochs: wanted an integer of at least 0; got 1.5"),
    "bits": ("bits_weight: 9", "bits_weight: wanted an integer from 1 to 8; got 9"),
    "infinite": ("lr: .inf", "lr: wanted a number of at least 0; got inf"),
    "null": ("epochs:", "epochs: wanted an integer of at least 0; got None"),
    "choice": ("schedule: cosin", "schedule: wanted one of cosine, step, constant; got 'cosin'"),
    "list": ("step_at: 0.5", "step_at: wanted numbers from 0 to 1; got 0.5"),
    "list of words": ("step_at: [a]", "step_at: wanted numbers from 0 to 1; got ['a']"),
    "no mapping": ("- lr", "recipe bad.yaml: wanted options, as in 'lr: 0.01'; got list"),
    "empty": ("", "wanted options, as in 'lr: 0.01'; got NoneType"),
    "no YAML": ("lr: [", "recipe bad.yaml: wanted YAML; got while parsing"),
    "object": ("lr: !!python/object/apply:os.getcwd []", "recipe bad.yaml: wanted YAML; got could not determine"),
    "across": ("epochs: 1\nwarmup_epochs: 2", "warmup_epochs: wanted at most 1, all of the epochs; got 2.0"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_recipe(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(text)
    assert cli.main(["train", "--recipe", "bad.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and [path.name for path in Path().iterdir()] == ["bad.yaml"]


def test_recipe_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", "absent"]) == 2
    assert f"recipe absent: wanted a file, or one of {', '.join(recipes())}; got neither" in capsys.readouterr().err
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["train", "--recipe", "bytes.yaml"]) == 2
    assert "bytes.yaml: wanted YAML in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"lr": -1}, {"epochs": "3"}, {"schedule": "x"}, {"bf16": 1}])
def test_python_is_checked_too(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: wanted"):
        Config(**change)


def test_schedules() -> None:
    """Literals: the whole of a phase of 8 steps."""

    def factors(warmup: int = 0, **options: Any) -> list[float]:
        return [schedule_factor(Config(**options), step, 8, warmup) for step in range(8)]

    assert factors(schedule="constant") == [1.0] * 8
    assert factors(schedule="constant", warmup=3)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors(schedule="step", step_factor=0.5) == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert factors(schedule="step", step_at=(0.25,)) == pytest.approx([1, 1] + [0.1] * 6)
    cosine = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert factors() == pytest.approx(cosine) and cosine[4] == pytest.approx(0.5)
    assert factors(warmup=4)[4:] == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_rates_reach_the_optimizers() -> None:
    weight, scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD([weight], lr=0.5), torch.optim.Adam([scale], lr=0.25)]
    updates = Updates(Config(schedule="step", step_at=(0.5,), step_factor=0.5), optimizers, steps=4, warmup_steps=0)
    for step in range(4):
        weight.grad, scale.grad = torch.ones(2), torch.ones(1)
        updates.step(step)
    assert weight.tolist() == [-1.5, -1.5]  # 0.5 + 0.5 + 0.25 + 0.25
    assert scale.item() == pytest.approx(-0.75, rel=1e-5)  # Adam moves by its rate
    assert updates.lr(0) == 0.5 and updates.lr(3) == 0.25


def test_optimizers() -> None:
    weight = [nn.Parameter(torch.ones(1))]
    adamw = weight_optimizer(Config(optimizer="adamw", weight_decay=0.3), weight, 0.1)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.param_groups[0]["weight_decay"] == 0.3
    assert isinstance(weight_optimizer(Config(), weight, 0.1), torch.optim.SGD)


def test_clipping_leaves_the_scales_alone() -> None:
    weight, scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD([weight], lr=1.0), torch.optim.Adam([scale], lr=1.0)]
    weight.grad, scale.grad = torch.tensor([3.0, 4.0]), torch.tensor([100.0])
    norm = Updates(Config(clip_norm=1.0), optimizers, 1, 0).clip()
    assert norm is not None and norm.item() == 5.0
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5) and scale.grad.item() == 100.0
    assert Updates(Config(), optimizers, 1, 0).clip() is None


def test_state_of_optimizers_comes_back_in_its_memory() -> None:
    """Moments of a channels-last weight are channels-last again, and the next step gives the same bits."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    second = copy.deepcopy(first)
    updates = [
        Updates(Config(), [torch.optim.AdamW(net.parameters()), torch.optim.SGD(net.parameters(), lr=0.1)], 9, 0)
        for net in (first, second)
    ]
    grads = [torch.randn_like(p) for p in first.parameters()]

    def step(index: int, net: nn.Module) -> None:
        for p, grad in zip(net.parameters(), grads, strict=True):
            p.grad = grad.clone()
        updates[index].step(1)

    step(0, first)
    second.load_state_dict(first.state_dict())
    updates[1].load(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in updates[0].tensors().items()}
    )
    restored = updates[1].optimizers[0].state[second.weight]
    assert restored["exp_avg"].stride() == second.weight.stride() and restored["step"].item() == 1
    step(0, first)
    step(1, second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_average_follows_its_definition() -> None:
    """Against the recurrence in float64; integers are copied, and the network is left alone."""
    model = nn.BatchNorm1d(2)
    average = AveragedModel(model, decay=0.7)
    wanted = torch.ones(2, dtype=torch.float64)
    for update in range(40):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([math.sin(update), update / 10]))
            model.num_batches_tracked.add_(1)
        before = model.weight.clone()
        average.update_parameters(model)
        decay = min(0.7, (1 + update) / (10 + update))
        wanted = decay * wanted + (1 - decay) * model.weight.detach().double()
        assert torch.equal(model.weight, before)
    assert average.module.weight.double().tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert average.module.num_batches_tracked.item() == 40
    assert not any(p.requires_grad for p in average.module.parameters())
