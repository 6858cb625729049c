"""The HTML report: whole, escaped, self-contained; counts and intervals beside every rate; absent is not zero."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from temper.core.reports import Finding, Measure, Report, Verdict
from temper.core.stats import rate_interval
from temper.report import Diagnosis, Judgement, Manifested, Phase, ReportData, Run, Served, Shift, StageLog, build, plots, talks, view
from temper.report.glossary import METRICS, label
from temper.report.probes import probes
from temper.report.words import ABSENT, duration, gain_text, interval_text, number, step_of, value_text, whole_text

HOSTILE = "<script>alert('x')</script><img src=x onerror=y> & $\\frac{1}{2}$ {{ 7*7 }}"
CASES = [f"task {number}" for number in range(40)]
CLUSTERS = {case: f"company {number % 10}" for number, case in enumerate(CASES)}


def rate(share: float | None, better: str = "higher", count: int = 40) -> Measure:
    """A rate over the first `count` cases, the first share of them 1."""
    if share is None:
        return Measure(value=None, count=0, better=better)
    cases = {case: float(place < round(share * count)) for place, case in enumerate(CASES[:count])}
    interval = rate_interval(cases, CLUSTERS)
    value = sum(cases.values()) / count
    return Measure(value=value, count=count, low=interval.low, high=interval.high, better=better, cases=cases, clusters={c: CLUSTERS[c] for c in cases})


def conversation(case: str, answer: str, reward: float | None, slice_name: str = "lookup") -> dict:
    return {
        "case": case, "slice": slice_name, "tenant": "bank_a", "cluster": "Acme", "reward": reward, "error": None, "expected": {"number": 5},
        "messages": [{"role": "user", "content": "How much is left? " + HOSTILE}, {"role": "assistant", "content": answer}],
        "checks": {"refused": False, "task_success": bool(reward), "policy_violation": None},
    }  # fmt: skip


def report(name: str, share: float, *, suite: str = "cd", split: str = "dev", answer: str = "About five. " + HOSTILE) -> Report:
    dimensions = {
        "instruction": {"schema_validity": rate(share), "task_success": rate(share)},
        "grounding": {"supported_claim_rate": rate(None), "citation_correctness": rate(None)},
        "safety": {"over_refusal": rate(1 - share, "lower")},
        "runtime": {"latency_p95": Measure(value=0.41, count=12, low=0.3, unit="seconds", better="lower")},
    }
    slices = {"lookup": {"success": rate(share)}, "tenant:bank_a": {"success": rate(share)}, HOSTILE: {"success": rate(share)}}
    return Report(
        name=name, model="m", model_hash="ab" * 32, split=split, suite_hash=suite * 32, dimensions=dimensions, slices=slices,
        conversations=(conversation("task 1", answer, float(share > 0.5)),),
    )  # fmt: skip


def verdict(decision: str) -> Verdict:
    finding = Finding(rule="target: tools.precision", status="unknown", observed="not measured", required="at least 0.9", reason=HOSTILE)
    return Verdict(decision=decision, findings=(finding,), evidence={"candidate": "ef" * 32})


def whole() -> ReportData:
    log = tuple({"step": step, "loss": 2 / step, "lr": 1e-3, "dev_loss": 1.0} for step in range(1, 31))
    stage = StageLog(name="sft", kind="sft", seconds=75.0, config={"optim": {"lr": 0.001}}, result={"rows": 2400, "steps": 30, "hash": "12" * 32}, metrics=log)
    shifts = (
        Shift(metric="instruction.schema_validity", status="better", gain=0.5, low=0.3, high=0.7, count=40),
        Shift(metric="safety.over_refusal", status="unknown"),
    )
    diagnosis = Diagnosis(against="base", targets=shifts[:1], guardrails=shifts[1:], outcome="cannot tell")
    lineage = {
        "id": "9f" * 32, "registered": True, "model_id": HOSTILE, "artifact_hash": "77" * 32, "adapters": {"bank_a": "a1" * 32}, "decision": "promote",
        "manifests": [{"role": "training_data", "name": "sft", "hash": "10" * 32, "kept": True}], "report_hash": None,
        "created": "2026-11-21T08:00:00.000000Z", "parents": [{"id": "elsewhere", "registered": False}],
    }  # fmt: skip
    return ReportData(
        title="A title " + HOSTILE,
        phases=(
            Phase(name="base", title="Base model", report=report("base", 0.1)),
            Phase(name="sft", title="Phase 1", fixes=HOSTILE, report=report("sft", 0.9), constrained=report("grammar", 1.0), stages=(stage,), diagnosis=diagnosis),
            Phase(name="student", title="Phase 6", report=report("student", 0.8)),
        ),
        limits={"instruction.schema_validity": 0.97}, student="student", teacher="sft", release="9f" * 32, lineage=lineage,
        gate=Judgement(title="Release", verdict=verdict("cannot_tell"), candidate="sft", baseline="base"),
        judgements=(Judgement(title="Student", verdict=verdict("hold"), candidate="student", teacher="sft"),),
        sealed={"sft": report("sft", 0.85, split="test")},
        manifests=(Manifested(name="sft", hash="aa" * 32, counts={"seen": 9, "admitted": 8, "refused": 1, "refused_overlap": 1}),),
        served=Served(
            conversation=({"role": "user", "content": HOSTILE},), routing={"requests": 1000, "through_another_tenant": 0},
            rollback={"worked": True, "check": {"status": "pass"}},
        ),
        environment={"name": "finops", "note": HOSTILE}, notes=(HOSTILE,),
        run=Run(command="temper run configs/finops.yaml", config={"a": HOSTILE}, seconds=533.0, started="2026-11-21T08:00:00Z"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return build(whole())


class Tags(HTMLParser):
    """Open tags in balance, every attribute seen, every id once, the text outside style."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def tags(page) -> Tags:
    parser = Tags()
    parser.feed(page)
    return parser


def test_the_page_is_whole(page, tags):
    assert tags.open == []
    ids = [value for _, name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    anchors = {value[1:] for tag, name, value in tags.attributes if tag == "a" and name == "href"}
    assert anchors <= set(ids)
    for section in ("phases", "table", "aims", "curves", "talks", "gate", "student", "release", "made", "words"):
        assert section in ids


def test_it_fetches_nothing_and_runs_nothing(page, tags):
    fetched = [(tag, name, value) for tag, name, value in tags.attributes if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
    assert all(value.startswith("#") or value == "data:," for _, _, value in fetched)
    assert "<script" not in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert not [name for _, name, _ in tags.attributes if name.startswith("on")]
    assert not re.findall(r"https?://", page)


def test_text_of_models_and_users_is_escaped_everywhere(page, tags):
    assert "<img" not in page
    assert "onerror=y>" not in re.sub(r"&lt;img src=x onerror=y&gt;", "", page)
    text = " ".join(tags.text)
    assert text.count("<script>alert('x')</script>") >= 8  # title, question, answers, reason, lineage, note, config, slice …
    assert "{{ 7*7 }}" in text


def test_absent_is_said_and_never_zero(page):
    data = whole()
    groups, nowhere = view.table(view.columns(data))
    assert nowhere == ["Supported claims", "Citation correctness"]
    cards = {card.name: card for card in view.cards(data)}
    assert cards["Supported claims"].value == ABSENT
    assert cards["Tool recall"].value == ABSENT  # not in the report at all
    assert "Not measured in any phase: Supported claims, Citation correctness" in page
    assert [group.name for group in groups] == ["Instruction following", "Safety", "Runtime"]


def test_the_headline_is_of_the_sealed_split_where_it_was_looked_at():
    card = view.cards(whole())[0]
    assert (card.name, card.value, card.split) == ("Schema validity", "85.0%", "test")
    assert card.before == "base, dev: 10.0% (4–23%; n = 40)"  # base was not looked at there, and the card says so


def test_every_rate_in_the_table_has_its_interval_and_count():
    groups, _ = view.table(view.columns(whole()))
    cells = [cell for group in groups for row in group.rows for cell in row.cells if not cell.absent]
    assert len(cells) == 4 * 4
    assert all(re.fullmatch(r"n = \d+", cell.count) for cell in cells)
    assert all(re.fullmatch(r"\d+–\d+%|no interval", cell.interval) for cell in cells)


def test_columns_are_compared_with_what_their_headings_say():
    found = [(column.heading, column.note) for column in view.columns(whole())]
    assert found == [("base", "where it starts"), ("sft", "against base"), ("sft, constrained", "against sft"), ("student", "against sft")]


def test_a_change_is_judged_by_the_paired_interval():
    before, after = report("a", 0.5), report("b", 0.9)
    assert step_of(after, before, "instruction.task_success").words.startswith("better: paired change +40.0 points")
    assert step_of(before, after, "instruction.task_success").direction == "worse"
    assert step_of(after, before, "safety.over_refusal").direction == "better"  # lower is better, and it fell
    assert step_of(after, after, "instruction.task_success").direction == "unclear"
    assert step_of(after, None, "instruction.task_success").words == ""
    assert step_of(after, before, "grounding.supported_claim_rate").direction == "none"


def test_without_pairs_the_intervals_are_compared_and_the_words_say_so():
    before, after = report("a", 0.1, suite="00"), report("b", 0.9, suite="11")
    step = step_of(after, before, "instruction.task_success")
    assert step.direction == "better"
    assert "intervals of the two compared" in step.words
    near = step_of(report("b", 0.2, suite="11"), before, "instruction.task_success")
    assert near.direction == "unclear"


@pytest.mark.parametrize(
    ("measure", "value", "interval"),
    [
        (Measure(value=0.9744, count=39, low=0.86, high=0.995), "97.4%", "86–100%"),
        (Measure(value=1.0, count=60, low=0.94, high=1.0), "100%", "94–100%"),
        (Measure(value=0.0, count=60, low=0.0, high=0.06), "0%", "0–6%"),
        (Measure(value=0.1984, count=12, low=0.15, high=0.22, unit="seconds"), "198 ms", "150–220 ms"),
        (Measure(value=1.5, count=12, unit="seconds"), "1.50 s", "no interval"),
        (Measure(value=0.00004, count=9, low=0.00003, high=0.00005, unit="USD a task"), "0.040 USD", "0.030–0.050"),
        (Measure(value=37.66, count=9, low=35.8, high=112.0, unit="tokens"), "37.7", "35.8–112"),
        (Measure(value=None, count=0), "not measured", ""),
        (None, "not measured", ""),
    ],
)
def test_figures_in_words(measure, value, interval):
    assert (value_text(measure), interval_text(measure)) == (value, interval)


def test_other_words():
    assert whole_text(Measure(value=0.5, count=8, low=0.2, high=0.8)) == "50.0% (20–80%; n = 8)"
    assert gain_text(-0.061, -0.1, -0.02) == "−6.1 points (−10.0 to −2.0)"
    assert gain_text(None, None, None) == "not measured"
    assert gain_text(1.5, None, None, "tokens") == "+1.50 (no interval)"
    assert [duration(value).replace("\u00a0", " ") for value in (None, 4.21, 533.0, 7260.0)] == ["not measured", "4.2 s", "8 min 53 s", "2 h 01 min"]
    assert number(0.128, "score") == "0.13"
    assert label("tools.recall") == "Tool recall"
    assert label("slice:x.some_thing") == "Some thing"


def test_the_verdict_is_said_in_words():
    judged = view.judged(Judgement(title="Release", verdict=verdict("cannot_tell"), candidate="rl"))
    assert (judged["headline"], judged["counts"]) == ("Cannot tell", "1 unknown")
    assert judged["lines"][0]["name"] == "Target · Tool precision"
    assert view.rule_name("non-inferiority: slice:policy_question.success") == "Non-inferiority · policy question, success"


def test_what_the_student_keeps_is_said_slice_by_slice():
    rows = {row["name"]: row["kept"] for row in view.student_rows(whole())}
    assert rows["lookup"] == "89%"  # 0.8 of 0.9
    assert rows["tenant bank a"] == "89%"
    assert view.kept(rate(0.5), rate(0.0)) == ABSENT  # a share of nothing is no share


def test_conversations_are_paired_by_case_and_share_their_question():
    (pair,) = talks.pairs(report("a", 0.1, answer="old"), report("b", 0.9, answer="new"))
    assert [turn.role for turn in pair.prompt] == ["user"]
    assert pair.before is not None
    assert (pair.before.turns[0].parts[0].text, pair.after.turns[0].parts[0].text) == ("old", "new")
    assert [(item.name, item.found, item.tone) for item in pair.after.findings] == [("task success", "yes", "good"), ("refused", "no", "plain")]


def test_a_conversation_without_a_partner_is_still_shown():
    (pair,) = talks.pairs(report("a", 0.1).model_copy(update={"conversations": ()}), report("b", 0.9))
    assert pair.before is None
    assert len(pair.prompt) == 1


def test_an_unjudged_conversation_is_not_scored_zero():
    shown = talks.side(conversation("task 1", "x", None), 1)
    assert shown.reward == "not judged"


def test_calls_and_results_are_read_in_both_spellings():
    ours = talks.turn({"role": "assistant", "content": "", "tool_calls": [{"name": "get_balance", "arguments": {"account": "1000"}}]})
    theirs = talks.turn({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get_balance", "arguments": '{"account": "1000"}'}}]})
    assert ours == theirs
    assert talks.turn({"role": "assistant", "content": ""}).parts[0].text == "(an empty answer)"
    broken = talks.turn({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{not json"}]})
    assert broken.parts[0].text == "{not json"


def test_json_breaks_only_where_a_line_would_be_too_long():
    assert talks.pretty('{"a": [1, 2]}') == '{"a": [1, 2]}'
    rows = [{"region": "East China", "amount": 44000 + step} for step in range(3)]
    assert talks.pretty({"rows": rows}).splitlines()[2] == '    {"region": "East China", "amount": 44000},'
    assert talks.pretty("just words") == "just words"
    assert talks.pretty("5") == "5"


def test_curves_draw_what_moves_and_leave_out_bookkeeping():
    rows = [{"step": step, "lr": step, "tokens": step, "loss": 1 / step, "reward_mean": step, "flat": 3, "word": "x", "nan": float("nan")} for step in (1, 2, 3)]
    assert plots.drawn_series(rows) == ["reward_mean", "loss"]
    assert plots.curves([StageLog(name="a", kind="b")]) == ""


def test_figures_are_the_same_bytes_each_time_and_take_the_page_colours(page):
    assert build(whole()) == page
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(svgs) >= 5
    assert all("aria-label" in svg for svg in svgs)
    assert not [svg for svg in svgs if "#1f4e79" in svg or "DejaVu" in svg]
    assert all("var(--accent)" in svg or "var(--ink)" in svg for svg in svgs)


def test_the_smallest_report_is_a_page_too():
    empty = Report(name="base", model="m", model_hash="ab" * 32, split="dev", suite_hash="cd" * 32, dimensions={})
    page = build(ReportData(title="Only a base model", phases=(Phase(name="base", report=empty),)))
    for said in ("The gate was not run", "Nothing was released", "No conversation was kept", "No stage wrote a log", "not measured"):
        assert said in page


def test_every_metric_of_the_suite_has_its_meaning():
    from temper.evaluate.metrics import QUANTILES, QUANTITIES, RATES

    known = {f"{dimension}.{name}" for dimension, names in RATES.items() for name in names}
    known |= {f"runtime.{name}" for name in (*QUANTITIES, *QUANTILES, "latency", "cost")} | {"preference.score", "preference.win_rate", "preference.reward_model"}
    assert known == set(METRICS)


def rl_stage(**series: list[float]) -> StageLog:
    steps = len(next(iter(series.values())))
    return StageLog(name="rl", kind="rl", metrics=tuple({"step": at + 1} | {name: values[at] for name, values in series.items()} for at in range(steps)))


def test_probes_of_reinforcement_learning_are_a_table_with_words():
    clean = rl_stage(reward=[0.25, 0.5], length=[100, 110], unearned_reward=[0.0, 0.0], probe_empty=[0.0, 0.0], probe_constant=[0.0, 0.0], cut_turns=[0.0, 0.1])
    (found,) = probes(Phase(name="rl", report=report("rl", 0.9), stages=(clean,)), None)
    by_name = {row.name: row for row in found.rows}
    assert (by_name["Reward"].first, by_name["Reward"].last, by_name["Reward"].measured) == ("0.25", "0.50", "2 of 2 steps")
    assert "earned nothing" in found.words[0]
    assert "followed the procedure" in found.words[1]
    assert "100 to 110 tokens (+10%)" in found.words[2]


def test_a_reward_that_can_be_gamed_is_named():
    gamed = rl_stage(reward=[0.5, 1.0], length=[10, 30], unearned_reward=[0.2, 0.6], probe_empty=[0.0, 0.0], probe_constant=[0.4, 0.1])
    (found,) = probes(Phase(name="rl", report=report("rl", 0.9), stages=(gamed,)), None)
    assert "a constant answer up to 0.40" in found.words[0]
    assert "60.0%" in found.words[1]
    assert "+200%" in found.words[2]


def test_no_reward_and_no_probe_are_said_and_not_taken_for_clean():
    (found,) = probes(Phase(name="rl", report=report("rl", 0.9), stages=(rl_stage(reward=[0.0, 0.0], length=[10, 10]),)), None)
    assert found.words[0] == "Reward hacking was not probed."
    assert "No episode earned a reward" in found.words[1]


def test_growth_of_length_on_dev_has_its_interval():
    def lengths(base: float) -> dict:
        cases = {case: base + place % 3 for place, case in enumerate(CASES)}
        return {"runtime": {"sampled_length": Measure(value=base + 1, count=40, unit="tokens", better="lower", cases=cases, clusters=CLUSTERS)}}

    before, after = (report(name, 0.5).model_copy(update={"dimensions": lengths(base)}) for name, base in (("tools", 9.0), ("rl", 19.0)))
    (found,) = probes(Phase(name="rl", report=after, stages=(rl_stage(reward=[1.0], length=[1.0]),)), before)
    assert "against tools, tokens a turn changed by +100" in found.words[-1]
    assert "n = 40" in found.words[-1]


def test_the_reward_model_stands_with_the_targets_on_the_page():
    proxy = Shift(metric="preference.reward_model", status="better", gain=0.8, low=0.5, high=1.1, count=24)
    diagnosis = Diagnosis(against="base", targets=(), guardrails=(), proxies=(proxy,), judge="It ranks 93.0% of 120 rightly.", outcome="reward gaming or drift")
    data, scored = whole(), Measure(value=0.3, count=24, unit="reward")
    judged = data.phases[1].report.model_copy(update={"dimensions": {"preference": {"reward_model": scored}}})
    page = build(data.model_copy(update={"phases": (data.phases[0], data.phases[1].model_copy(update={"diagnosis": diagnosis, "report": judged}))}))
    assert "reward model, beside the targets" in page
    assert "It ranks 93.0% of 120 rightly." in page
    assert "+0.80 (+0.50 to +1.10)" in page


def test_a_series_that_repeats_another_and_bookkeeping_are_not_drawn():
    rows = [{"step": step, "loss": 1 / step, "nll": 1 / step, "positions": 8000 + step, "grad_norm": float(step)} for step in (1, 2, 3)]
    assert plots.drawn_series(rows) == ["loss", "grad_norm"]
