"""Coverage in a run: in its title, rows and report, and refused where too little is quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastqat import cli
from fastqat.html_report.recorded import read_run

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
OPTIONS = "train --model coverage_networks:mostly_float --limit-train 64 --batch-size 32 --fp32-epochs 1 --epochs 1"
OPTIONS = f"{OPTIONS} --device cpu --threads 1 --range minmax --calibration-batches 1 --first-last-bits 0 --out run"
SHARE = 640 / 4736
TITLE = "digits, model coverage_networks:mostly_float, W3A3 of 13.5 % of the multiplications"


def test_too_little_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    """A network of which 13.5 % is quantized is no network of 3 bits."""
    assert cli.main(OPTIONS.split()) == cli.USER_ERROR
    output = capsys.readouterr()
    assert "coverage: wanted 95.0 % quantized; got 13.5 % of the multiplications" in output.err
    assert "in float: 1 x Mixing (" in output.err and "4,096 multiplications" in output.err
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


def test_what_the_options_leave_in_float_is_not_held_against_it() -> None:
    """First and last layer in float are what was asked for; the share says so all the same."""
    options = OPTIONS.replace("coverage_networks:mostly_float", "digits") + " --first-last-float --coverage 1"
    assert cli.main(options.split()) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert 0.5 < rows[-1]["coverage"] < 1
