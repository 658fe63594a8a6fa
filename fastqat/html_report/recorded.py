"""What a run has left in its folder, read back."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastqat.nn.coverage import percent
from fastqat.train import bit_width_search, quantizer_recorder, transition_recorder
from fastqat.train.config import Config
from fastqat.train.recipe import parse_options, read_text
from fastqat.train.recorder import BINS, END, EPOCHS, FOLDER, MARGIN, START, STEPS, TRACES
from fastqat.train.run_folder import CONFIG, Row

METRICS = "metrics.jsonl"
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """The files of a run.

    Attributes:
        path: of its folder.
        config: its options.
        rows: of ``metrics.jsonl``.
        steps, epochs: what :class:`fastqat.train.recorder.Recorder` has written of steps and epochs; may be empty.
        start, end, traces: the arrays that it has written, or None.
        gradients, activations: what :class:`fastqat.train.quantizer_recorder.QuantizerRecorder` has; may be empty.
        bit_widths: what :class:`fastqat.train.bit_width_search.BitWidthSearch` has; may be empty.
        transitions: what :class:`fastqat.train.transition_recorder.TransitionRecorder` has; may be empty.
    """

    path: Path
    config: Config
    rows: list[Row]
    steps: list[Row]
    epochs: list[Row]
    start: Arrays | None
    end: Arrays | None
    traces: Arrays | None
    gradients: list[Row]
    activations: list[Row]
    bit_widths: list[Row]
    transitions: list[Row]

    @property
    def title(self) -> str:
        """Data, network, and bit-widths, with the share of the multiplications that has them where it is known."""
        config, shares = self.config, [row["coverage"] for row in self.rows if "coverage" in row]
        of_share = f" of {percent(shares[-1])} of the multiplications" if shares else ""
        return f"{config.data}, model {config.model}, {config.bit_widths}{of_share}"

    def of_phase(self, phase: str) -> list[Row]:
        """The rows of a phase."""
        return [row for row in self.rows if row["phase"] == phase]


def read_run(path: Path) -> Recorded:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: it is no folder of a run, or the run has no results yet.
        ValueError: a file is damaged; the message names it.
        ImportError: a package of the ``train`` extra is missing.
    """
    for name, what in ((CONFIG, "the folder of a run"), (METRICS, "a run with results")):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: wanted {what}; got no {name} there")
    config = Config(**parse_options(read_text(path / CONFIG), str(path / CONFIG)))
    rows, folder = _read_rows(path / METRICS, "test_accuracy"), path / FOLDER
    if not rows:
        raise ValueError(f"{path / METRICS}: wanted a row for each epoch; got none yet")
    steps, epochs = (_read_rows(folder / name, "step") for name in (STEPS, EPOCHS))
    start, end, traces = (_read_arrays(folder / name) for name in (START, END, TRACES))
    names = (quantizer_recorder.GRADIENTS, quantizer_recorder.ACTIVATIONS)
    gradients, activations = (_read_rows(path / quantizer_recorder.FOLDER / name, "step") for name in names)
    bit_widths = _read_rows(path / bit_width_search.FOLDER / bit_width_search.STEPS, "step")
    transitions = _read_rows(path / transition_recorder.FOLDER / transition_recorder.STEPS, "step")
    of_quantizers = (gradients, activations, bit_widths, transitions)
    return Recorded(path, config, rows, steps, epochs, start, end, traces, *of_quantizers)


def _read_rows(path: Path, key: str) -> list[Row]:
    """The rows of a file of JSON lines, each with a key; none if there is no file."""
    rows: list[Row] = []
    if not path.is_file():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or key not in row:
            raise ValueError(f"{path}, line {number}: wanted a JSON object with {key}; got {line[:40]!r}")
        rows.append(row)
    return rows


def _read_arrays(path: Path) -> Arrays | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: wanted arrays that a run has recorded; got a damaged file ({error})") from None


@dataclass(frozen=True)
class Histogram:
    """Where the latent weights of a layer lie on the axis of its codes.

    Attributes:
        name, kind: of the layer.
        qmin, qmax: the codes at the ends of the grid.
        counts: int64, as :func:`fastqat.train.recorder.histogram` returns them.
    """

    name: str
    kind: str
    qmin: int
    qmax: int
    counts: Any

    @property
    def edges(self) -> Any:
        """Borders of the bins on the axis of the codes: one more than there are bins in :attr:`shares`."""
        return np.arange(len(self.counts) - 1) / BINS + self.qmin - MARGIN

    @property
    def shares(self) -> Any:
        """Share of all weights of the layer in each bin; those beyond the shown range are in none."""
        return self.counts[1:-1] / max(self.counts.sum(), 1)

    @property
    def between_codes(self) -> Any:
        """Counts [:data:`BINS`] from a code to the next one, summed over the grid; the threshold is in the middle."""
        first = 1 + round(MARGIN * BINS)
        inside = self.counts[first : first + (self.qmax - self.qmin) * BINS]
        return inside.reshape(-1, BINS).sum(0)


def histograms(arrays: Arrays) -> dict[str, Histogram]:
    """The histograms of a file, by name of layer."""
    found = {}
    for index, (name, kind, codes) in enumerate(zip(arrays["names"], arrays["kinds"], arrays["codes"], strict=True)):
        qmin, qmax = map(int, codes)
        found[str(name)] = Histogram(str(name), str(kind), qmin, qmax, arrays[f"histogram{index}"])
    return found
