"""evaluate: suites, metrics by slice, comparisons, probes. It measures; it holds no threshold and trains nothing."""

from temper.evaluate.cases import Case, pair_up
from temper.evaluate.compare import compare, win_rate, win_rate_by, with_win_rate
from temper.evaluate.metrics import Price, by_slice, measure
from temper.evaluate.run import Config, read_report, run
from temper.evaluate.suite import Options, run_suite

__all__ = [
    "Case", "Config", "Options", "Price", "by_slice", "compare", "measure", "pair_up", "read_report", "run", "run_suite",
    "win_rate", "win_rate_by", "with_win_rate",
]  # fmt: skip
