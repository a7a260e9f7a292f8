"""Reports: one page to look at and one screen to read, both made from an `Evidence` value and nothing else.

``report.json`` is ``evidence.model_dump_json()``; `render_html` and `render_terminal` show the same value to people.
"""

from __future__ import annotations

from narrowcast.report.html import render_html
from narrowcast.report.summary import SummaryRow, summary_rows
from narrowcast.report.terminal import measurement_table, render_terminal

__all__ = ["SummaryRow", "measurement_table", "render_html", "render_terminal", "summary_rows"]
