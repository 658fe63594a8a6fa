"""What a run keeps of its oscillations: right, without a trace in the training, and the same after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import TINY, stop_at_step
from torch import Tensor, nn

import fastqat
from fastqat import Oscillation, QConfig, QSpec, cli
from fastqat.oscillation import COUNTS
from fastqat.train.recorder import BINS, EVERY, Recorder, histogram
from fastqat.train.run_folder import RunFolder

ROW = {"phase": "QAT", "epoch": 1}
TRACKED = [*TINY.split(), "--track-oscillations", "--oscillation-momentum", "0.2", "--lr", "0.2", "--epochs", "3"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Training:
    """Steps of a small network with a depth-wise and a point-wise layer, and a recorder where a folder is given."""

    def __init__(self, folder: Path | None, freeze_threshold: float | None = None, writes: bool = True) -> None:
        torch.manual_seed(0)
        layers = (nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(96, 4))
        self.model = nn.Sequential(*layers)
        oscillation = Oscillation(momentum=0.01, freeze_threshold=freeze_threshold)
        spec = QSpec(bits=3, axis=0, learn="scale", oscillation=oscillation)
        fastqat.prepare(self.model, QConfig(spec, None), overrides={"4": None})
        self.x, self.y = torch.randn(16, 2, 6, 6), torch.randint(0, 4, (16,))
        self.model(self.x)  # sets the ranges
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.7, momentum=0.9)
        self.recorder = Recorder(RunFolder(folder, writes), self.model, steps=60) if folder else None
        self.noise = 0.0  # on the depth-wise weights

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            if self.noise:
                with torch.no_grad():
                    self.model[2].weight.add_(torch.randn_like(self.model[2].weight), alpha=self.noise)
            if self.recorder:
                self.recorder.step()


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "oscillations" / name).read_text().splitlines()]


def arrays(folder: Path, name: str) -> dict[str, Any]:
    with np.load(folder / "oscillations" / name) as file:
        return dict(file)


def test_rows_say_what_the_summary_says(tmp_path: Path) -> None:
    training = Training(tmp_path, freeze_threshold=0.02)
    training.run(59)
    training.run(1)
    summary = fastqat.oscillation_summary(training.model)
    training.recorder.epoch(ROW)
    (epoch,) = rows(tmp_path, "epochs.jsonl")
    assert epoch == {"step": 60, **ROW, **summary}
    assert summary["frozen"] > 0 and summary["oscillating"] > 0, "or the test says nothing"
    steps = rows(tmp_path, "steps.jsonl")
    assert [row["step"] for row in steps] == list(range(EVERY, 61, EVERY))
    counts = {kind: dict(zip(COUNTS, steps[-1][kind], strict=True)) for kind in ("depthwise", "pointwise")}
    assert set(steps[-1]) == {"step", *counts}
    for kind, name in (("pointwise", "0"), ("depthwise", "2")):
        layer = summary["layers"][name]
        assert layer["kind"] == kind and counts[kind]["weights"] == layer["weights"]
        assert counts[kind]["oscillating"] == round(layer["oscillating"] * layer["weights"])
        assert counts[kind]["frozen"] == round(layer["frozen"] * layer["weights"])
        assert counts[kind]["oscillations"] == layer["oscillations"]
        assert counts[kind]["transitions"] == round(layer["transitions_per_step"] * 59)


def test_a_long_run_has_some_hundred_points(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.recorder = Recorder(RunFolder(tmp_path), training.model, steps=4000)
    training.run(35)
    training.recorder.save()
    assert [row["step"] for row in rows(tmp_path, "steps.jsonl")] == [10, 20, 30]


def test_training_does_not_notice_it(tmp_path: Path) -> None:
    alone, recorded = Training(None), Training(tmp_path)
    after = []
    for training in (alone, recorded):
        torch.manual_seed(1)
        training.run(40)
        after.append((training.model.state_dict(), torch.get_rng_state()))
    recorded.recorder.epoch(ROW)
    (plain, plain_random), (state, random) = after
    assert list(plain) == list(state) and all(torch.equal(plain[key], state[key]) for key in plain)
    assert torch.equal(plain_random, random)


def test_steps_do_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those that choose the weights to be traced: the first one, and one after sixteen others."""
    training = Training(tmp_path)
    waits: list[int] = []

    def wait(*_: object) -> None:
        waits.append(training.recorder.done)

    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *args, original=original: (wait(), original(*args))[1])
    for _ in range(34):
        training.run(1)
    monkeypatch.undo()
    assert sorted(set(waits)) == [1, 17, 33]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path, writes=False)
    training.run(3)
    training.recorder.save()
    training.recorder.epoch(ROW)
    assert list(tmp_path.iterdir()) == []


def test_traces_follow_single_weights(tmp_path: Path) -> None:
    """Latent weight, code and average of one step belong together; the weights are those that oscillate most."""
    training = Training(tmp_path)
    training.noise = 0.02
    watched = []
    for step in range(1, 61):
        layer = training.model[2]
        before = layer.weight.detach() / layer.weight_fake_quant.scale.detach().view(-1, 1, 1, 1)
        training.run(1)
        tracker = layer.weight_fake_quant.tracker
        watched.append([t.flatten().clone() for t in (before, tracker.codes(), tracker.average(), tracker.frequency())])
        if step == 48:  # a choice: at 1, 17, 33, and, as half of all steps is more than 16 by now, at 49
            assert training.recorder._traces._left == 0
    training.recorder.epoch(ROW)
    traces = arrays(tmp_path, "traces.npz")
    assert [str(traces[f"kind{i}"]) for i in range(2)] == ["depthwise", "pointwise"] and str(traces["name0"]) == "2"
    index, steps = traces["index0"], traces["steps0"]
    changes = torch.stack([codes for _, codes, _, _ in watched[49:60]]).diff(dim=0).ne(0).sum(0)
    followed = watched[48][3].topk(32).indices
    assert changes[index].tolist() == changes[followed].sort(descending=True).values[:3].tolist() and changes[index[0]]
    assert steps.tolist() == list(range(49, 60)), "of the last choice: what is known of step 60 comes with its forward"
    for column, step in enumerate(steps):  # the number of updates before the forward that the tracker saw
        latent, codes, average, _ = watched[step]
        assert np.abs(traces["latent0"][:, column] - latent[index].numpy()).max() < 1e-5
        assert traces["code0"][:, column].tolist() == codes[index].tolist()
        assert np.abs(traces["average0"][:, column] - average[index].numpy()).max() < 1e-6
    nearest = np.clip(np.rint(traces["latent0"]), -4, 3)
    assert (traces["code0"] == nearest).all() and len(np.unique(traces["code0"])) > 1


def test_a_new_choice_waits_until_it_has_something_to_show(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run(18)
    training.recorder.epoch(ROW)
    assert arrays(tmp_path, "traces.npz")["steps0"].tolist() == list(range(1, 16)), "those of the first choice"
    training.run(10)
    training.recorder.epoch(ROW)
    assert arrays(tmp_path, "traces.npz")["steps0"].tolist() == list(range(17, 28))


def test_a_tracker_that_begins_anew_has_new_traces(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run(20)
    with pytest.warns(UserWarning):
        training.model[2].weight_fake_quant.bits = 2
    training.run(8)
    training.recorder.epoch(ROW)
    traces = arrays(tmp_path, "traces.npz")
    assert np.abs(traces["code0"]).max() <= 2 and traces["steps0"][0] >= 20


def test_histogram() -> None:
    """From -1.5 codes below the grid to 1.5 above; what is beyond is in the first and the last bin."""
    values = [-9.0, -3.5, -2.0, -1.999, 0.49, 0.5, 0.51, 1.0, 2.49, 2.51, 9.0, float("nan"), float("inf")]
    found = histogram(torch.tensor(values), -2, 1).numpy()
    finite = np.array([value for value in values if -3.5 <= value < 2.5])
    wanted = np.histogram(finite, bins=6 * BINS, range=(-3.5, 2.5))[0]
    assert found[1:-1].tolist() == wanted.tolist()
    assert (found[0], found[-1]) == (1, 4)


def test_histograms_before_and_after(tmp_path: Path) -> None:
    training = Training(tmp_path)
    layer = training.model[2]
    training.run(5)
    training.recorder.epoch(ROW)
    start, end = (arrays(tmp_path, f"{name}.npz") for name in ("start", "end"))
    assert (int(start["step"]), int(end["step"])) == (0, 5)
    assert end["names"].tolist() == ["0", "2"] and end["kinds"].tolist() == ["pointwise", "depthwise"]
    assert end["codes"].tolist() == [[-4, 3]] * 2
    latent = (layer.weight / layer.weight_fake_quant.scale.view(-1, 1, 1, 1)).detach()
    assert end["histogram1"].tolist() == histogram(latent, -4, 3).tolist()
    assert start["histogram1"].sum() == end["histogram1"].sum() == layer.weight.numel()
    assert start["histogram1"].tolist() != end["histogram1"].tolist()


def test_weights_of_zeros_join_once_they_have_a_range(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    fastqat.prepare(model, QConfig(QSpec(bits=3, oscillation=Oscillation()), None))
    model(torch.ones(1, 4))
    recorder = Recorder(RunFolder(tmp_path), model, steps=60)
    for _ in range(3):
        recorder.step()
    recorder.epoch(ROW)
    assert arrays(tmp_path, "start.npz")["names"].tolist() == arrays(tmp_path, "end.npz")["names"].tolist() == ["0"]
    nn.init.ones_(model[1].weight)
    for _ in range(20):
        fastqat.step(model)
        model(torch.ones(1, 4))
        recorder.step()
    recorder.epoch(ROW)
    assert arrays(tmp_path, "end.npz")["names"].tolist() == ["0", "1"]
    assert list(rows(tmp_path, "epochs.jsonl")[-1]["layers"]) == ["0", "1"]


def test_what_is_done_again_is_recorded_once(tmp_path: Path) -> None:
    """A run killed between the last step of an epoch and its checkpoint ends the epoch twice."""
    training = Training(tmp_path)
    training.run(8)
    training.recorder.save()
    training.run(4)
    training.recorder.epoch(ROW)
    training.recorder = Recorder(RunFolder(tmp_path), training.model, steps=60, step=11)
    assert training.recorder.done == 11
    training.run(1)
    training.recorder.epoch(ROW)
    training.recorder = Recorder(RunFolder(tmp_path), training.model, steps=60, step=12)
    training.recorder.epoch(ROW)
    assert [row["step"] for row in rows(tmp_path, "steps.jsonl")] == [4, 8, 12]
    assert [row["step"] for row in rows(tmp_path, "epochs.jsonl")] == [12]


@pytest.mark.usefixtures("in_empty_folder")
def test_a_killed_run_records_what_a_whole_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    assert cli.main(["train", *TRACKED, "--out", "whole"]) == 0
    for step in (9, 4):  # of both phases together, in the first process; then 4 steps after it
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at_step(patch, step, kill)
            where = ["--resume", "killed"] if Path("killed").exists() else [*TRACKED, "--out", "killed"]
            cli.main(["train", *where])
    assert cli.main(["train", "--resume", "killed"]) == 0
    for name in ("steps.jsonl", "epochs.jsonl"):
        assert rows(Path("killed"), name) == rows(Path("whole"), name)
    assert [row["step"] for row in rows(Path("whole"), "steps.jsonl")] == [4, 8]
    assert [(row["epoch"], row["step"]) for row in rows(Path("whole"), "epochs.jsonl")] == [(1, 3), (2, 6), (3, 9)]
    assert rows(Path("whole"), "epochs.jsonl")[-1]["oscillating"] > 0
    for name in ("start.npz", "end.npz"):
        whole, killed = (arrays(Path(folder), name) for folder in ("whole", "killed"))
        assert whole.keys() == killed.keys() and all((whole[key] == killed[key]).all() for key in whole)
