"""Divergence of the statistics of BN at the end of a run, from its newest checkpoint and its training images."""

from __future__ import annotations

from pathlib import Path

from fastqat import models
from fastqat.bn_divergence import Divergence, bn_divergence
from fastqat.html_report.recorded import Recorded
from fastqat.nn.state import take_bits_as_data
from fastqat.train import data
from fastqat.train.checkpoint import Checkpoints
from fastqat.train.quantization import prepare_as, quantizers
from fastqat.train.run import choose_device
from fastqat.train.run_state import PHASES


def measured(run: Recorded, root: Path | None = None) -> list[Divergence]:
    """Measure the divergence with the weights and running statistics that training has ended with.

    They come from the newest checkpoint: the weights beside it may have been saved with re-estimated statistics.

    Args:
        run: its folder.
        root: of the data files; None is where the run had them.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: something is missing; the message says what.
    """
    config = run.config
    snapshot = Checkpoints(run.path / "checkpoints").latest(lambda _: None)
    if snapshot is None:
        raise ValueError(f"{run.path / 'checkpoints'}: wanted a checkpoint; got none")
    phase = snapshot.facts["position"]["phase"]
    if PHASES.index(phase) <= PHASES.index("PTQ"):
        raise ValueError(f"wanted the checkpoint of a quantized network; got one of phase {phase}")
    device = choose_device("auto")
    dataset = data.load(config.data, root or config.root, image_size=config.image_size)
    dataset = dataset.limit_train(config.limit_train or len(dataset.train)).to(device)
    model = models.build(config.model, dataset.num_classes, dataset.image_shape, **config.model_options)
    steps = config.epochs * dataset.train_batch_count(config.batch_size)
    prepare_as(config, model, quantizers(config, steps))
    prefix = "model/"
    state = {name[len(prefix) :]: value for name, value in snapshot.tensors.items() if name.startswith(prefix)}
    take_bits_as_data(model)  # they may have been learned
    model.load_state_dict(state)
    # An order of the images that no training had.
    order = config.fp32_epochs + 1 + config.epochs
    batches = dataset.train_batches(config.batch_size, seed=config.seed, epoch=order, workers=config.workers)
    return bn_divergence(model.to(device), batches, config.bn_batches)
