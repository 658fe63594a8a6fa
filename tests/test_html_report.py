"""``fastqat report``: one file that needs nothing else, the numbers of the run, and mistakes that leave no trace."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import TINY

from fastqat import cli
from fastqat.html_report import pictures, sections, write
from fastqat.html_report.page import Cell, Section, bullets, folded, page, paragraph, table
from fastqat.html_report.recorded import histograms, read_run
from fastqat.train.recorder import BINS, npz

RUN = [*TINY.split(), "--track-oscillations", "--oscillation-momentum", "0.2", "--lr", "0.2", "--epochs", "3"]
TRACKED = [*RUN, "--reestimate-bn", "always", "--bn-batches", "2"]
PICTURES = {"accuracy", "shares", "between_codes", "latent_weights", "traces", "bn_divergence"}
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Reads a report: its texts by tag, its pictures, the rows of its tables; and that each tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self.open[-1] if self.open else ""
        self.texts.append((tag, data))
        if tag in ("td", "th"):
            self.rows[-1].append(data)

    def of(self, tag: str) -> list[str]:
        return [text for each, text in self.texts if each == tag]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tracked run in the current folder, from which its network can be imported; the tests copy it."""
    folder, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(Path(__file__).resolve().parent))
        assert cli.main(["train", *TRACKED, "--out", "run"]) == 0
        yield folder / "run"
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reported(trained: Path) -> Path:
    """The report of that run, which the tests only read."""
    assert cli.main(["report", str(trained)]) == 0
    return trained / "report/index.html"


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "DPI", 20)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("report")))


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Report something that cannot be; return the one line that says why."""
    capsys.readouterr()
    assert cli.main(["report", *argv]) == code
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    return output.err


def test_one_file_that_needs_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in run.iterdir())
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"the report is in {run}/report/index.html"
    assert sorted(path.name for path in run.iterdir()) == sorted([*before, "report"])
    assert {path.name for path in (run / "report").iterdir()} == {"index.html", *(f"{name}.png" for name in PICTURES)}
    found = Page(run / "report/index.html")
    shown = set()
    for tag, name, value in found.attributes:
        assert name not in ("href", "srcset", "onclick") and tag not in ("script", "link", "iframe")
        if name == "src":
            kind, _, data = value.partition(",")
            assert tag == "img" and kind == "data:image/png;base64"
            shown.add(base64.b64decode(data))
    assert shown == {path.read_bytes() for path in (run / "report").glob("*.png")}
    assert "url(" not in "".join(found.of("style")) and "@import" not in "".join(found.of("style"))
    for png in shown:
        with Image.open(BytesIO(png)) as picture:
            assert picture.width == 9 * 20 and len(picture.convert("RGB").getcolors(2**24) or []) > 50
    titles = ["Results", "Accuracy", "Oscillating and frozen weights", "Layers, after epoch 3", "Latent weights"]
    assert found.of("h2") == [*titles, "Weights that oscillate", "Statistics of batch normalisation"]
    title = "digits, model resume_networks:Dropped, W3A3 of 100.0 % of the multiplications"
    assert found.of("h1") == found.of("title") == [title]


def test_tables_say_what_was_recorded(reported: Path) -> None:
    found, run = Page(reported), reported.parent.parent
    last = json.loads((run / "oscillations/epochs.jsonl").read_text().splitlines()[-1])
    layer = last["layers"]["depthwise"]
    numbers = [f"{layer['weights']}", f"{layer['oscillating']:.2%}", f"{layer['frozen']:.2%}"]
    rate = layer["transitions_per_step"]
    numbers += [f"{rate:.2f}", f"{1000 * rate / layer['weights']:.3f}", f"{layer['oscillations']}"]
    assert layer["weights"] == 72 and layer["oscillations"] > 0
    for name in (["depthwise", "depthwise"], ["depthwise (1)"], ["all tracked layers (1)"]):
        assert [*name, *numbers] in found.rows
    assert ["stem", "8 bits, and no more than 4 are tracked"] in found.rows
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    qat = rows[-1]
    assert [
        "QAT",
        f"{qat['test_accuracy']:.2%}",
        f"{qat['bn_test_accuracy']:.2%}",
        f"{qat['test_loss']:.4f}",
    ] in found.rows
    assert ["FP32", f"{rows[1]['test_accuracy']:.2%}", f"{rows[1]['test_loss']:.4f}"] == [
        cell for row in found.rows if row[:1] == ["FP32"] for cell in row
    ]
    assert ["norm", "stem", "convolution", "8"] in [row[:4] for row in found.rows]


def test_numbers_are_aligned_at_the_right(reported: Path) -> None:
    text = reported.read_text()
    assert '<tr><td>depthwise (1)</td><td class="number">72</td>' in text
    assert ".number { text-align: right;" in text and "prefers-color-scheme: dark" in text


@pytest.mark.usefixtures("in_empty_folder")
def test_an_untracked_run_says_what_is_left_out() -> None:
    options = [*TINY.split(), "--model", "resume_networks:without_batch_norm"]
    assert cli.main(["train", *options, "--out", "run"]) == 0
    assert cli.main(["report", "run"]) == 0
    found = Page(Path("run/report/index.html"))
    assert found.of("h2") == ["Results", "Accuracy", "Left out"]
    untracked = "the run did not track the oscillations of its weights (option track_oscillations)."
    titles = ("Oscillating and frozen weights", "Layers", "Latent weights", "Weights that oscillate")
    bn = "Statistics of batch normalisation: the network has no batch normalisation with running statistics."
    assert [text for text in found.of("li") if text.strip()] == [*(f"{title}: {untracked}" for title in titles), bn]
    assert {path.name for path in Path("run/report").iterdir()} == {"index.html", "accuracy.png"}


@pytest.mark.parametrize(
    ("missing", "reason"),
    (("checkpoints", "checkpoints: wanted a checkpoint; got none."), ("data", "data cifar10: wanted --root DIR")),
)
def test_why_statistics_are_left_out(run: Path, missing: str, reason: str) -> None:
    if missing == "data":
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("data: digits", "data: cifar10"))
    else:
        shutil.rmtree(run / missing)
    assert cli.main(["report", str(run)]) == 0
    (text,) = [text for text in Page(run / "report/index.html").of("li") if text.strip()]
    assert text.startswith("Statistics of batch normalisation: ") and reason in text


def test_a_run_that_has_not_come_far(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    shutil.rmtree(run / "oscillations")
    assert cli.main(["report", str(run)]) == 0
    found = Page(run / "report/index.html")
    assert found.of("h2") == ["Results", "Left out"]
    assert any("no epoch of quantization-aware training yet" in text for text in found.of("li"))


def test_names_are_text(tmp_path: Path) -> None:
    name = "<b>&amp;"
    body = table((name, "n"), [(name, Cell(name, 0.5))], caption=name) + paragraph(name) + folded(name, bullets([name]))
    (tmp_path / "page.html").write_text(page(name, name, [Section(name, body)]))
    found = Page(tmp_path / "page.html")
    for tag, times in {
        "title": 1,
        "h1": 1,
        "h2": 1,
        "p": 2,
        "caption": 1,
        "th": 1,
        "td": 2,
        "summary": 1,
        "li": 1,
    }.items():
        assert found.of(tag).count(name) == times, tag
    assert (
        "td",
        "style",
        "background: linear-gradient(to right, var(--bar) 50.0%, transparent 50.0%)",
    ) in found.attributes


def test_no_folder_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"{tmp_path}: wanted the folder of a run; got no config.yaml there" in refused(capsys, str(tmp_path))
    assert "nowhere: wanted the folder of a run" in refused(capsys, "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    (
        ("metrics.jsonl", None, "wanted a run with results; got no metrics.jsonl there"),
        ("metrics.jsonl", b"", "metrics.jsonl: wanted a row for each epoch; got none yet"),
        (
            "metrics.jsonl",
            b'{"phase": "FP32", "test_a',
            "metrics.jsonl, line 1: wanted a JSON object with test_accuracy",
        ),
        ("metrics.jsonl", b"\xff\xfe", "metrics.jsonl, line 1: wanted a JSON object"),
        ("config.yaml", b"speed: 3", "config.yaml: unknown option 'speed'"),
        ("oscillations/steps.jsonl", b"[1]\n", "steps.jsonl, line 1: wanted a JSON object with step; got '[1]'"),
        (
            "oscillations/traces.npz",
            b"PK\x03\x04 cut",
            "traces.npz: wanted arrays that a run has recorded; got a damaged file",
        ),
        ("oscillations/end.npz", b"", "end.npz: wanted arrays that a run has recorded; got a damaged file"),
    ),
)
def test_damaged_runs(run: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes, message: str) -> None:
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
    before = sorted(run.iterdir())
    assert message in refused(capsys, str(run))
    assert sorted(run.iterdir()) == before


def test_a_report_replaces_an_older_one_as_a_whole(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full disk the older one is still there."""
    shutil.rmtree(run / "oscillations")
    shutil.rmtree(run / "checkpoints")
    (run / "report").mkdir()
    (run / "report/old.png").write_bytes(b"old")
    (run / ".report.unfinished").mkdir()  # of a report that was killed
    original = write.write_file

    def full(path: Path, content: bytes) -> None:
        if path.name == "index.html":
            raise OSError(28, "No space left on device", str(path))
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_file", full)
        assert "No space left on device" in refused(capsys, str(run), code=1)
    assert [path.name for path in (run / "report").iterdir()] == ["old.png"]
    assert cli.main(["report", str(run)]) == 0
    assert {path.name for path in (run / "report").iterdir()} == {"accuracy.png", "index.html"}
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_histograms_between_codes() -> None:
    """Weights on a threshold are in the middle, those on a code at the ends; those beyond the grid are in none."""
    counts = np.zeros((4 + 2) * BINS + 2, dtype=np.int64)  # codes -2..1
    first = 1 + 3 * BINS // 2
    counts[first + BINS // 2] = 5  # from -1.5 on
    counts[first + BINS + BINS // 2] = 7  # from -0.5 on
    counts[first + 3 * BINS] = 11  # from 1 on: there is no next code
    counts[first - 1] = counts[0] = counts[-1] = 13
    content = npz({"names": ["a"], "kinds": ["linear"], "codes": [[-2, 1]], "histogram0": counts})
    with np.load(BytesIO(content)) as file:
        found = histograms(dict(file))["a"]
    assert found.between_codes.sum() == found.between_codes[BINS // 2] == 12
    assert (found.edges[0], found.edges[-1], found.edges[first - 1]) == (-3.5, 2.5, -2.0)
    assert len(found.edges) == len(found.shares) + 1 and found.shares.sum() == pytest.approx(1 - 26 / counts.sum())


def test_pictures_show_the_rates_of_the_run() -> None:
    """Counts become shares, and totals of changes become changes per step."""
    rows = [
        {"step": 10, "depthwise": [50, 5, 0, 100, 9]},
        {"step": 20, "depthwise": [50, 10, 25, 200, 9], "pointwise": [100, 1, 0, 30, 3]},
    ]
    figure = pictures.draw_shares(rows)
    drawn = {axes.get_title(loc="left"): {line.get_label(): line for line in axes.lines} for axes in figure.axes}
    assert drawn["oscillating weights"]["depthwise"].get_ydata().tolist() == [0.1, 0.2]
    assert drawn["frozen weights"]["depthwise"].get_ydata().tolist() == [0.0, 0.5]
    assert drawn["codes that change per step"]["depthwise"].get_ydata().tolist() == [0.2, 0.2]
    assert drawn["oscillating weights"]["pointwise"].get_xdata().tolist() == [20]
    unfrozen = pictures.draw_shares(rows[:1])
    assert [axes.get_title(loc="left") for axes in unfrozen.axes] == [
        "oscillating weights",
        "codes that change per step",
    ]


def test_a_run_reads_back(run: Path) -> None:
    recorded = read_run(run)
    assert recorded.traces is not None and recorded.start is not None
    assert [row["epoch"] for row in recorded.of_phase("QAT")] == [1, 2, 3]
    assert recorded.config.plain()["track_oscillations"] is True
