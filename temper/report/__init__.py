"""report: one self-contained HTML page that shows what changed, what it cost, and what may be concluded."""

from temper.report.data import Diagnosis, Judgement, Manifested, Phase, ReportData, Run, Served, Shift, StageLog
from temper.report.page import build

__all__ = ["Diagnosis", "Judgement", "Manifested", "Phase", "ReportData", "Run", "Served", "Shift", "StageLog", "build"]
