"""gate: (reports, rule) -> verdict. Pure: no file, no model, no threshold that the rule did not spell."""

from temper.gate.decide import decide
from temper.gate.diagnosis import Change, changes, diagnose
from temper.gate.rule import GateRule

__all__ = ["Change", "GateRule", "changes", "decide", "diagnose"]
