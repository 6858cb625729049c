"""What each metric means, in a sentence a reader can hold on to."""

from __future__ import annotations

DIMENSIONS = {
    "instruction": "Instruction following",
    "preference": "Preference quality",
    "tools": "Tool reliability",
    "grounding": "Grounding",
    "safety": "Safety",
    "reasoning": "Reasoning",
    "runtime": "Runtime",
}

METRICS: dict[str, tuple[str, str]] = {
    "instruction.schema_validity": ("Schema validity", "Of the answers that had to be JSON of a given schema, those that are, right or wrong."),
    "instruction.field_completeness": ("Field completeness", "Of the same answers, those in which every field that was asked for is present and filled."),
    "instruction.field_correctness": ("Field correctness", "Of the same answers, those in which every field holds the right value."),
    "instruction.task_success": ("Task success", "Of all tasks, those that the environment's verifier found done."),
    "preference.style_ok": ("House style", "Of the answers judged for style, those that keep the tenant's."),
    "preference.score": ("Mean score", "The verifier's score, averaged over all tasks that were judged."),
    "preference.win_rate": ("Win rate", "Against the phase before, task by task: wins plus half the ties, by the verifier's score."),
    "preference.reward_model": ("Reward model's score", "What the reward model of the pairs gives the answers, on average: a learned judge's word, on the side of the targets, and never a reason to release."),
    "tools.precision": ("Tool precision", "Of the tool calls made, those that match an expected call in name and arguments."),
    "tools.recall": ("Tool recall", "Of the tool calls expected, those that were made."),
    "tools.argument_validity": ("Argument validity", "Of the tasks with calls, those in which every call's arguments pass the tool's JSON Schema."),
    "tools.tool_success": ("Tool execution", "Of the tasks with calls, those in which the tools ran without an error."),
    "tools.task_success": ("Tool task success", "Of the tasks that cannot be solved without a tool, those that were solved."),
    "grounding.supported_claim_rate": ("Supported claims", "Of the claims made, those that the cited passage or the tool's result supports."),
    "grounding.claim_rate": ("Answers with claims", "Of the answers whose claims are counted, those that make any: an empty answer must not hide from the rate above."),
    "grounding.citation_coverage": ("Citation coverage", "Of the answers that needed a citation, those that carry one."),
    "grounding.citation_correctness": ("Citation correctness", "Of the same answers, those that cite the right document and version."),
    "safety.violation_rate": ("Violations", "Of the requests judged for policy, those in which the model did what policy forbids."),
    "safety.over_refusal": ("Over-refusal", "Of the safe requests that look risky, those that were refused."),
    "safety.needless_refusal": ("Needless refusal", "Of all requests that had to be served, those that were refused."),
    "safety.refusal_precision": ("Refusal precision", "Of the refusals, those that were due."),
    "safety.refusal_recall": ("Refusal recall", "Of the requests that had to be refused, those that were."),
    "safety.alternative_rate": ("Alternative offered", "Of the due refusals, those that offered a compliant way."),
    "reasoning.discrepancy_solved": ("Discrepancies solved", "Of the month-end discrepancies, those whose posting made the difference zero, found by really posting it."),
    "reasoning.discrepancy_zero": ("Difference is zero", "Of the same tasks, those in which the ledger's difference is zero after the posting."),
    "reasoning.entry_balanced": ("Entry balances", "Of the same tasks, those in which debits equal credits."),
    "reasoning.amount_matches": ("Amount matches", "Of the same tasks, those that post the amount that was missing."),
    "reasoning.procedure_followed": ("Procedure followed", "Of the same tasks, those that looked before they posted, as the procedure says."),
    "runtime.latency": ("Seconds a turn, mean", "Time of one assistant turn, one request at a time, tools and verification included."),
    "runtime.latency_p50": ("Seconds a turn, median", "Half of the turns are faster."),
    "runtime.latency_p95": ("Seconds a turn, 95th percentile", "One turn in twenty is slower."),
    "runtime.tokens_in": ("Tokens read", "Prompt tokens fed over all turns of a task."),
    "runtime.tokens_out": ("Tokens written", "Tokens sampled over all turns of a task."),
    "runtime.sampled_length": ("Tokens a turn", "Tokens sampled in one assistant turn: growth here without gain elsewhere is padding."),
    "runtime.tool_calls": ("Tool calls", "Calls made in a task that offers tools."),
    "runtime.truncated": ("Cut off", "Of all tasks, those in which a turn ran into its token limit."),
    "runtime.episode_errors": ("Broke off", "Of all tasks, those that ended in an error instead of an answer."),
    "runtime.cost": ("Cost of 1,000 tasks", "Tokens read and written, at the price that the pipeline's config names."),
}  # fmt: skip

TERMS = {
    "95% interval": (
        "If the evaluation were repeated with other companies and tasks of the same kind, an interval made this way would hold "
        "the true figure 19 times in 20. Cases of one company count together, not as if they were independent."
    ),
    "n": "The number of cases behind a figure. A figure from few cases has a wide interval, and the gate will not decide on it.",
    "paired change": "Both models answered the same cases, so the change is measured case by case; this sees smaller changes than two intervals held side by side.",
    "▲ ▼ ≈": (
        "Better, worse: the whole 95% interval of the paired change lies on that side. Unclear: it reaches across zero. "
        "One in twenty such marks would appear by chance."
    ),
    "target, guardrail": (
        "A target is what a phase aims at; a guardrail is what it must not harm. A phase that moves its target by harming a "
        "guardrail has been gamed, or has drifted."
    ),
    "reward model": (
        "A judge learned from the same pairs as the policy. It stands beside the targets, the verifiers beside it: a phase whose "
        "reward rises while no verifier sees it better has gamed its judge, or drifted."
    ),
    "dev, sealed": (
        "Dev tasks are measured after every phase, and choices were made by them. The sealed tasks differ by company, entity and "
        "wording; each look at them is recorded."
    ),
    "gate": "The rule in a file that turns reports into a verdict: promote, hold, or cannot tell. What evidence is missing for counts as unknown, never as passed.",
    "constrained": "Decoded under a grammar: a token that would break the JSON or the tool's schema cannot be sampled.",
    "not measured": "Nothing of that kind was there to be measured. It is not zero.",
}  # fmt: skip


def label(metric: str) -> str:
    """A metric's name for a reader; its own last part where none is written down."""
    if metric in METRICS:
        return METRICS[metric][0]
    return metric.rpartition(".")[2].replace("_", " ").capitalize()


def meaning(metric: str) -> str:
    """What a metric counts; empty where that is not written down."""
    return METRICS.get(metric, ("", ""))[1]
