"""`build`: ReportData in, one HTML page out; nothing is read and nothing is fetched."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import yaml
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from temper.report import plots, talks, view
from temper.report.data import ReportData
from temper.report.glossary import METRICS, TERMS, label
from temper.report.probes import probes
from temper.report.words import duration, gain_text, whole_text

TEMPLATES = ("page.html.j2", "parts.html.j2", "style.css.j2")


def build(data: ReportData) -> str:
    """The report as one self-contained HTML page. All text that came from a model or a user is escaped."""
    found = {name: resources.files("temper.report").joinpath(name).read_text(encoding="utf-8") for name in TEMPLATES}
    environment = Environment(loader=DictLoader(found), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "whole": whole_text, "label": label, "yaml": as_yaml, "gain": gain_text, "short": short}
    return environment.get_template("page.html.j2").render(context(data))


def short(value: Any) -> Any:
    """A content hash as its first digits, anywhere in a text; any other value as it is."""
    return re.sub(r"\b([0-9a-f]{16})[0-9a-f]{24,48}\b", r"\1…", value) if isinstance(value, str) else value


def as_yaml(value: Any) -> str:
    """A mapping as YAML text."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def context(data: ReportData) -> dict[str, Any]:
    """Everything the template names."""
    made = view.columns(data)
    groups, nowhere = view.table(made)
    by_name = {column.heading: column for column in made}
    phases = [
        {
            "phase": phase, "account": view.account(phase, by_name[phase.name]), "seconds": view.seconds(phase),
            "facts": view.facts(phase.stages), "probes": probes(phase, by_name[phase.name].before), "forest": Markup(plots.forest(phase)),
            "curves": [(stages, Markup(svg)) for stages in view.alike(phase.stages) if (svg := plots.curves(stages))],
        }
        for phase in data.phases
    ]  # fmt: skip
    student, teacher = data.phase(data.student), data.phase(data.teacher)
    compared = {phase.name: phase.report for phase in (teacher, student) if phase is not None}
    shown = [metric for column in made for dimension, items in column.report.dimensions.items() for metric in (f"{dimension}.{name}" for name in items)]
    return {
        "data": data, "cards": view.cards(data), "phases": phases, "columns": made, "groups": groups, "nowhere": nowhere,
        "progress": Markup(plots.progress(data)), "slices": Markup(plots.slices({data.first.name: data.first.report, data.last.name: data.last.report})),
        "pairs": talks.pairs(data.first.report, data.last.report), "gate": view.judged(data.gate) if data.gate else None,
        "judgements": [view.judged(item) for item in data.judgements], "student_rows": view.student_rows(data),
        "student_plot": Markup(plots.slices(compared)) if len(compared) == 2 else "",
        "talk": [talks.turn(message) for message in data.served.conversation] if data.served else [],
        "glossary": [(label(metric), METRICS[metric][1]) for metric in dict.fromkeys(shown) if metric in METRICS], "terms": TERMS,
        "constrained": any(phase.constrained for phase in data.phases),
    }  # fmt: skip
