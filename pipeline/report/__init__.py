"""What a comparison shows: a table for the terminal and one self-contained page.

runs, teachers, caches -> Comparison (model) -> rows, findings -> table (rich) | page (html)
"""

from pipeline.report.model import CacheReport, Comparison, RunReport, TeacherReport
from pipeline.report.page import render_page
from pipeline.report.table import print_table

__all__ = [
    "CacheReport",
    "Comparison",
    "RunReport",
    "TeacherReport",
    "print_table",
    "render_page",
]
