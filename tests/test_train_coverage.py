"""Coverage in a run: in its title, rows and report, and refused where too little is quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastqat import cli
from fastqat.html_report.recorded import read_run
from fastqat.nn.coverage import Coverage, FloatKind
from fastqat.train.coverage import check_share

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
OPTIONS = "train --model coverage_networks:mostly_float --limit-train 64 --batch-size 32 --fp32-epochs 1 --epochs 1"
OPTIONS = f"{OPTIONS} --device cpu --threads 1 --range minmax --calibration-batches 1 --first-last-bits 0 --out run"
SHARE = 640 / 4736
TITLE = "digits, model coverage_networks:mostly_float, W3A3 of 13.5 % of the multiplications"


def test_too_little_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    """A network of which 13.5 % is quantized is no network of 3 bits."""
    assert cli.main(OPTIONS.split()) == cli.USER_ERROR
    output = capsys.readouterr()
    assert "coverage: wanted at least 95.0 % of the multiplications quantized" in output.err
    assert "got 13.5 %; in float: 1 x Mixing (" in output.err and "4,096 multiplications" in output.err
    assert "W3A3" not in output.out + output.err and not Path("run").exists()


def test_share_goes_with_the_bits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a run that was wanted all the same prints its bits: first line, table, curves, metrics, report."""
    monkeypatch.setenv("COLUMNS", "200")  # of the table
    assert cli.main([*OPTIONS.split(), "--coverage", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{TITLE}, on cpu")
    assert all(TITLE in line for line in lines if "W3A3" in line) and sum(TITLE in line for line in lines) == 2
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row.get("coverage") for row in rows] == [None, pytest.approx(SHARE), pytest.approx(SHARE)]
    assert read_run(Path("run")).title == TITLE
    assert cli.main(["report", "run"]) == 0
    assert f"<h1>{TITLE}</h1>" in Path("run/report/index.html").read_text()


def test_run_that_is_there_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Also one of before there was such an option."""
    assert cli.main([*OPTIONS.split(), "--coverage", "0"]) == 0
    config = Path("run/config.yaml")
    config.write_text("".join(line for line in config.open() if not line.startswith("coverage:")))
    capsys.readouterr()
    assert cli.main(["train", "--resume", "run"]) == 0
    assert capsys.readouterr().out.startswith(TITLE)


def coverage(share: float, *left: tuple[str, int, bool]) -> Coverage:
    kinds = tuple(FloatKind(kind, "a reason", 1, 10, number, chosen) for kind, number, chosen in left)
    return Coverage(0.5, share, kinds)


def test_what_the_options_leave_in_float_is_not_held_against_it() -> None:
    """Of 1,000 multiplications 600 are quantized, and 400 of an override: all that was to be."""
    check_share(coverage(0.6, ("Linear", 400, True)), 0.95)
    check_share(coverage(0.6, ("Linear", 380, True), ("Conv2d", 20, False)), 0.95)  # 600 of 620
    check_share(coverage(1.0), 1.0)
    with pytest.raises(ValueError, match=r"got 90\.9 %; in float: 1 x Conv2d \(10 parameters, 60 multip"):
        check_share(coverage(0.6, ("Linear", 340, True), ("Conv2d", 60, False)), 0.95)  # 600 of 660
    check_share(coverage(0.6, ("Linear", 340, True), ("Conv2d", 60, False)), 0.9)
    check_share(coverage(0.0, ("Conv2d", 60, False)), 0.0)
