"""``fastqat report``: what a run has recorded, as one HTML file that needs nothing beside it."""

from fastqat.html_report.write import write_report

__all__ = ["write_report"]
