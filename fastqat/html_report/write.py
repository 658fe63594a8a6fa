"""Puts the sections together and the files in their place."""

from __future__ import annotations

import shutil
from pathlib import Path

from fastqat.html_report import sections
from fastqat.html_report.bit_widths import bit_widths
from fastqat.html_report.page import Section, bullets, page, paragraph
from fastqat.html_report.recorded import Recorded, read_run
from fastqat.html_report.transitions import transition_rates
from fastqat.train.files import write_file

FOLDER = "report"
INDEX = "index.html"


def write_report(path: Path, root: Path | None = None) -> Path:
    """Write ``report/index.html`` into the folder of a run, with its pictures beside it; all of it or nothing.

    The file needs neither a network nor the pictures beside it. A section for which the run has recorded nothing is
    left out, and the end of the page says why. An older report is replaced.

    Args:
        path: folder of the run.
        root: of its data files, for the statistics of batch normalisation; None is where the run had them.

    Returns:
        the path of the HTML file.

    Raises:
        FileNotFoundError: it is no folder of a run, or the run has no results yet.
        ValueError: a file of it is damaged.
        OSError: the report cannot be written; an older one is still there.
        ImportError: a package of the ``train`` extra is missing.
    """
    run = read_run(path)
    parts = _sections(run, root)
    html = page(run.title, f"Quantization-aware training, run {path.resolve().name}", parts)
    unfinished, folder = path / f".{FOLDER}.unfinished", path / FOLDER
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a report that was killed here
    try:
        unfinished.mkdir()
        for part in parts:
            for name, png in part.pictures.items():
                write_file(unfinished / f"{name}.png", png)
        write_file(unfinished / INDEX, html.encode())
        _replace(folder, unfinished)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder / INDEX


def _sections(run: Recorded, root: Path | None) -> list[Section]:
    found, reasons = [sections.results(run)], []
    of_bit_widths = (("Bit-widths", bit_widths),) if run.config.adaqat else ()
    of_transitions = (("Transition rates", transition_rates),) if run.config.transition_rate else ()
    of_quantizers = sections.OF_QUANTIZERS if run.config.record_quantizers else ()
    make = [
        *sections.SECTIONS,
        *of_bit_widths,
        *of_transitions,
        *of_quantizers,
        ("Statistics of batch normalisation", lambda run: sections.divergence(run, root)),
    ]
    for title, section in make:
        try:
            found.append(section(run))
        except sections.LeftOut as reason:
            reasons.append(f"{title}: {reason}.")
    if reasons:
        found.append(Section("Left out", paragraph("This report has no section on") + bullets(reasons)))
    return found


def _replace(folder: Path, new: Path) -> None:
    """Put a folder in the place of another one, which may not be there."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
