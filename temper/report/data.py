"""`ReportData`: everything the HTML report shows. It is gathered by the caller; the report itself reads no file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from temper.core.records import Noun
from temper.core.reports import Report, Verdict

HEADLINE = (
    "instruction.schema_validity",
    "tools.precision",
    "tools.recall",
    "grounding.supported_claim_rate",
    "safety.refusal_recall",
    "safety.over_refusal",
    "reasoning.discrepancy_solved",
    "instruction.task_success",
)


class Shift(Noun):
    """How one metric moved against the phase that a phase is compared with: the fields of `gate.Change`."""

    metric: str
    status: Literal["better", "unchanged", "worse", "unknown"]
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    tolerance: float = 0.0
    count: int = 0


class Diagnosis(Noun):
    """What a phase did: its targets and guardrails apart, and the outcome that `gate.diagnose` named.

    `proxies` are what a reward model says, and `judge` how far its word goes.
    """

    against: str
    targets: tuple[Shift, ...]
    guardrails: tuple[Shift, ...]
    proxies: tuple[Shift, ...] = ()
    judge: str = ""
    outcome: str


class StageLog(Noun):
    """One stage that ran: its log lines, its config as resolved, what it recorded, and the seconds it took."""

    name: str
    kind: str
    seconds: float | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    result: dict[str, Any] = Field(default_factory=dict)
    metrics: tuple[dict[str, Any], ...] = ()


class Phase(Noun):
    """One phase: which failure it `fixes`, the stages behind it, and what was measured after it.

    `constrained` is the same model decoded under grammars, where that was measured too.
    """

    name: str
    title: str = ""
    kind: str = ""
    fixes: str = ""
    report: Report
    constrained: Report | None = None
    stages: tuple[StageLog, ...] = ()
    diagnosis: Diagnosis | None = None


class Judgement(Noun):
    """A verdict with what it judged: the names of the candidate, the baseline and the teacher, and the split."""

    title: str
    verdict: Verdict
    candidate: str
    baseline: str | None = None
    teacher: str | None = None
    split: str = "dev"


class Manifested(Noun):
    """One manifest that training read: its counts (seen, admitted, refused by rule) and its hash."""

    name: str
    hash: str
    counts: dict[str, int]


class Served(Noun):
    """What was tried on the running server.

    `conversation` are OpenAI messages. `routing` and `rollback` are shown key by key; `history` are the alias moves.
    """

    conversation: tuple[dict[str, Any], ...] = ()
    routing: dict[str, Any] = Field(default_factory=dict)
    rollback: dict[str, Any] = Field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()


class Run(Noun):
    """How it was made: the command, the config as resolved, seeds, code, libraries, machine, time.

    `seconds` is what this command took, `worked` what all stages and evaluations took when they were done.
    """

    path: str = ""
    command: str = ""
    config: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    code: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: str = ""
    started: str = ""
    seconds: float | None = None
    worked: float | None = None


class ReportData(Noun):
    """The whole report.

    `before` and `after` name the phases whose conversations stand side by side (default: the first phase and the
    last one that is not the student). `student` and `teacher` name phases. `limits` are the figures a rule asks
    for, drawn as lines. `sealed` are reports on the sealed split, by phase. `lineage` is `registry.lineage`.
    """

    title: str
    subtitle: str = ""
    phases: tuple[Phase, ...] = Field(min_length=1)
    headline: tuple[str, ...] = HEADLINE
    limits: dict[str, float] = Field(default_factory=dict)
    before: str | None = None
    after: str | None = None
    student: str | None = None
    teacher: str | None = None
    gate: Judgement | None = None
    judgements: tuple[Judgement, ...] = ()
    sealed: dict[str, Report] = Field(default_factory=dict)
    manifests: tuple[Manifested, ...] = ()
    lineage: dict[str, Any] | None = None
    release: str | None = None
    served: Served | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    run: Run = Run()
    notes: tuple[str, ...] = ()

    def phase(self, name: str | None) -> Phase | None:
        """The phase of that name; None where there is none."""
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def first(self) -> Phase:
        """The phase that stands for `before`."""
        return self.phase(self.before) or self.phases[0]

    @property
    def last(self) -> Phase:
        """The phase that stands for `after`: what would be released."""
        others = [phase for phase in self.phases if phase.name != self.student]
        return self.phase(self.after) or (others or list(self.phases))[-1]
