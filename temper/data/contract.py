"""What a chat template does, found by rendering probes; and what it must do before anything is trained or served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from temper.core.errors import TemplateError
from temper.core.records import Message, ToolCall, ToolSpec
from temper.core.reports import Finding
from temper.data.syntax import CallSyntax, ThinkSyntax, learn_calls, learn_thinking

Raw = Callable[..., str]  # raw(messages, tools, generation, short_ids) -> text; raises TemplateError

ARGUMENTS = {"alpha": "probe-argument"}
TOOL = ToolSpec(
    name="probe_tool",
    description="A probe.",
    parameters={"type": "object", "properties": {"alpha": {"type": "string"}}, "required": ["alpha"]},
)
SYSTEM = Message(role="system", content="Probe system.")
ASK = Message(role="user", content="Probe question one?")
ASK_AGAIN = Message(role="user", content="Probe question two?")
ANSWER = Message(role="assistant", content="Probe answer one.")
ANSWER_AGAIN = Message(role="assistant", content="Probe answer two.")
CALL = Message(role="assistant", tool_calls=(ToolCall(name="probe_tool", arguments=ARGUMENTS, id="call_probe_number_one"),))
RESULT = Message(role="tool", content="Probe result.", tool_call_id="call_probe_number_one", name="probe_tool")
TWO_CALLS = Message(
    role="assistant", tool_calls=(CALL.tool_calls[0], ToolCall(name="other_tool", arguments={"beta": "more"}, id="call_probe_number_two"))
)
CALL_WITH_TEXT = Message(role="assistant", content="Probe text beside.", tool_calls=CALL.tool_calls)
THOUGHT = Message(role="assistant", content="Probe answer one.", reasoning="Probe thinking.")
FINAL = Message(role="assistant", content="Probe final.")


@dataclass(frozen=True)
class Traits:
    """What a template can do. `end_ids` are the tokens that end an assistant turn; `faults` say why something cannot be done."""

    end_ids: frozenset[int]
    appends: bool
    keeps_history: bool
    generation: bool
    system: bool
    tools: bool
    calls: bool
    results: bool
    parallel: bool
    text_beside_call: bool
    thinking: bool
    short_ids: bool
    call_syntax: CallSyntax | None
    think_syntax: ThinkSyntax | None
    lead: str = ""
    faults: dict[str, str] = field(default_factory=dict)


class Prober:
    """Renders probe conversations and notes why one failed."""

    def __init__(self, raw: Raw, special: dict[str, int]) -> None:
        self.raw, self.special, self.short_ids = raw, special, False
        self.faults: dict[str, str] = {}

    def text(self, about: str, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), generation: bool = False) -> str | None:
        """The rendered conversation, or None where the template refuses it (noted under `about`)."""
        try:
            return self.raw(messages, tools, generation, short_ids=self.short_ids)
        except TemplateError as error:
            self.faults.setdefault(about, error.why or error.what)
            return None

    def holds(self, about: str, messages: Sequence[Message], *parts: str, tools: Sequence[ToolSpec] = ()) -> bool:
        """Whether the rendered conversation holds every one of `parts`."""
        text = self.text(about, messages, tools)
        missing = [part for part in parts if text is not None and part not in text]
        if missing:
            self.faults.setdefault(about, f"the template drops {missing[0]!r}")
        return text is not None and not missing

    def appends(self, about: str, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> bool:
        """Whether the prompt of each assistant turn, and each answer that a question follows, is a prefix of the whole.

        A call alone at the end is no such prefix of interest: its result always follows before anything is sampled.
        """
        whole = self.text(about, messages, tools)
        if whole is None:
            return False
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            answered = number + 1 < len(messages) and messages[number + 1].role == "user"
            for end, generation in ((number, True), *(((number + 1, False),) if answered else ())):
                text = self.text(about, messages[:end], tools, generation)
                if text is None or not whole.startswith(text):
                    what = "the prompt of" if generation else "the answer in"
                    self.faults.setdefault(about, f"{what} assistant turn {number} is rendered otherwise once later turns follow")
                    return False
        return True

    def body(self, about: str, message: Message, tools: Sequence[ToolSpec] = ()) -> str:
        """What an assistant turn renders after the generation prompt; "" where it is refused or does not follow it."""
        prompt, whole = self.text(about, [ASK], tools, True), self.text(about, [ASK, message], tools)
        return whole[len(prompt) :] if prompt is not None and whole is not None and whole.startswith(prompt) else ""

    def end_of(self, body: str, usual: str | None = None) -> str | None:
        """The special token that ends a turn: `usual` where the turn holds it, else what stands at the end of its text."""
        if usual is not None and usual in body:
            return usual
        return max((text for text in self.special if body.rstrip().endswith(text)), key=len, default=None)

    def usual_end(self, after: str) -> str | None:
        """What ends a turn whose text is followed by `after` in the last place: the last special token that history has there too.

        Phi 3.5 closes a conversation with a token behind the one that ends each turn; sampling stops at the turn's own.
        """
        later = (self.text("end", [ASK, ANSWER, ASK_AGAIN]) or "").partition(ANSWER.content)[2]
        parted = next((at for at, (one, other) in enumerate(zip(after, later, strict=False)) if one != other), min(len(after), len(later)))
        shared = after[:parted]
        return max((each for each in self.special if each in shared), key=lambda each: (shared.rindex(each), len(each)), default=None)


def learn(raw: Raw, added: dict[str, int], special: dict[str, int]) -> Traits:
    """Find out what a template does. `raw` renders; `added` and `special` map token texts to ids."""
    probe = Prober(raw, special)
    can = abilities(probe)
    prompt, answered = probe.text("generation", [ASK], generation=True), probe.text("generation", [ASK, ANSWER])
    generation = prompt is not None and answered is not None and answered.startswith(prompt)
    if not generation:
        probe.faults.setdefault(
            "generation",
            f"the prompt ends in {(prompt or '')[-30:]!r}, which does not stand before the answer in {(answered or '')[-60:]!r}",
        )
    appends, keeps = stability(probe, can)
    turns = [ANSWER] + [
        turn
        for turn, about in ((CALL, "calls"), (TWO_CALLS, "parallel"), (CALL_WITH_TEXT, "text_beside_call"), (THOUGHT, "thinking"))
        if can[about]
    ]
    bodies = [probe.body("end", turn, [TOOL] if turn.tool_calls else []) for turn in turns]
    lead, said, after = bodies[0].partition(ANSWER.content)
    usual = probe.usual_end(after)
    ends = [probe.end_of(body, usual) for body in bodies]
    found = {end for end in ends if end}
    if None in ends:
        probe.faults["end"] = "an assistant turn is rendered without a special token at its end"
    elif any(sum(body.count(end) for end in found) != 1 for body in bodies):
        probe.faults["end"] = f"{sorted(found)} stand more than once in one assistant turn"
    thought = learn_thinking(probe.body("thinking", THOUGHT), "Probe thinking.", THOUGHT.content) if can["thinking"] else None
    calls = (
        call_syntax(probe, bodies[1].removeprefix(lead if said else ""), ends[1], added, beside=can["text_beside_call"])
        if can["calls"]
        else None
    )
    return Traits(
        end_ids=frozenset(special[end] for end in found), appends=appends, keeps_history=keeps, generation=generation, short_ids=probe.short_ids,
        call_syntax=calls, think_syntax=thought, lead=lead if said else "", faults=probe.faults, **can,
    )  # fmt: skip


def abilities(probe: Prober) -> dict[str, bool]:
    """What the template renders, by the names of `Traits`."""
    calls = probe.holds("calls", [ASK, CALL], "probe_tool", "probe-argument", tools=[TOOL])
    if not calls:  # Mistral's templates refuse ids that have not nine letters
        first = probe.faults.pop("calls", "")
        probe.short_ids = True
        calls = probe.short_ids = probe.holds("calls", [ASK, CALL], "probe_tool", "probe-argument", tools=[TOOL])
        probe.faults |= {} if calls else {"calls": first}
    return {
        "system": probe.holds("system", [SYSTEM, ASK], SYSTEM.content),
        "tools": probe.holds("tools", [ASK], "probe_tool", tools=[TOOL]),
        "calls": calls,
        "results": calls and probe.holds("results", [ASK, CALL, RESULT], RESULT.content, tools=[TOOL]),
        "parallel": calls and probe.holds("parallel calls", [ASK, TWO_CALLS], "probe_tool", "other_tool", tools=[TOOL]),
        "text_beside_call": calls
        and probe.holds("text beside a call", [ASK, CALL_WITH_TEXT], CALL_WITH_TEXT.content, "probe_tool", tools=[TOOL]),
        "thinking": probe.holds("thinking", [ASK, THOUGHT], "Probe thinking.", THOUGHT.content),
    }


def stability(probe: Prober, can: dict[str, bool]) -> tuple[bool, bool]:
    """(turns only append within a question, and across questions too)."""
    question = [ASK, CALL, RESULT, FINAL] if can["results"] else [ASK, ANSWER]
    offered = [TOOL] if can["tools"] else []
    appends = probe.appends("appends", question, offered) and probe.appends("appends", [ASK, ANSWER])
    conversations = [[ASK, ANSWER, ASK_AGAIN, ANSWER_AGAIN], [*question, ASK_AGAIN, ANSWER_AGAIN]]
    conversations += [[SYSTEM, *conversations[-1]]] if can["system"] else []
    conversations += [[ASK, THOUGHT, ASK_AGAIN, ANSWER_AGAIN]] if can["thinking"] else []
    return appends, appends and all(probe.appends("history", each, offered) for each in conversations)


def call_syntax(probe: Prober, body: str, end: str | None, added: dict[str, int], *, beside: bool) -> CallSyntax | None:
    """How calls are written, from the text of a turn that holds one; None (and a fault) where it cannot be read back."""
    found = learn_calls(body.rpartition(end)[0] if end else body, "probe_tool", ARGUMENTS, added)
    if found is None:
        probe.faults["syntax"] = "a call is not rendered as a JSON object with a name and arguments"
    elif found.mark and beside:
        between = probe.body("text beside a call", CALL_WITH_TEXT, [TOOL]).partition(CALL_WITH_TEXT.content)[2]
        found = replace(found, gap=between.partition(found.mark)[0])
    return found


def findings(traits: Traits, *, ends: Sequence[str], pad: str, pad_is_end: bool, reads_clock: bool, folds_system: bool) -> list[Finding]:
    """The contract, line by line. `unknown` marks what only matters to rows that need it; such a row is refused."""
    lost = "fail" if traits.tools else "unknown"  # told of tools, a model calls them: what it then writes must not vanish
    table = [  # (rule, kept, status otherwise, where its fault is noted, what is required)
        ("generation prompt", traits.generation, "fail", "generation", "the prompt to answer is what stands before the answer in training"),
        ("turns only append", traits.appends, "fail", "appends", "within a question, nothing before an answer changes once later turns follow"),
        ("history is kept", traits.keeps_history, "unknown", "history",
         "earlier answers never change once a new question follows; else only rows that train nothing before the last question are taken"),
        ("end token", bool(ends) and "end" not in traits.faults, "fail", "end", "each assistant turn ends with one special token, which is trained"),
        ("padding", not pad_is_end, "fail", "padding", "the pad token is not the end token: a mask that hides padding would hide every end"),
        ("system role", traits.system or folds_system, "unknown", "system", "the system text is rendered; else rows that have one are refused"),
        ("tools", traits.tools, "unknown", "tools", "tool definitions are rendered; else rows that have tools are refused"),
        ("tool calls", traits.calls, lost, "calls", "the name and arguments of a call are rendered"),
        ("tool results", traits.results, lost, "results", "the text of a result is rendered"),
        ("call syntax", traits.call_syntax is not None, "unknown", "syntax",
         "a sampled call can be read back: it is a JSON object with a name; else nothing is sampled with tools"),
        ("parallel calls", traits.parallel, "unknown", "parallel calls", "several calls in one turn are rendered; else such rows are refused"),
        ("text beside a call", traits.text_beside_call, "unknown", "text beside a call", "text beside a call is rendered; else such rows are refused"),
        ("thinking", traits.thinking, "unknown", "thinking", "reasoning is rendered; else rows that train it are refused"),
    ]  # fmt: skip
    shown = {"end token": ", ".join(ends) or "none", "padding": pad}
    if folds_system and not traits.system:
        shown["system role"] = "folded into the first user turn, as configured"
    if reads_clock:
        table.append(("clock", True, "fail", "clock", "equal rows have equal tokens"))
        shown["clock"] = "asks for today's date, and is always told 26 Jul 2024"
    return [
        Finding.model_validate({
            "rule": rule, "status": "pass" if kept else otherwise, "observed": shown.get(rule, "yes" if kept else "no"), "required": required,
            "reason": "" if kept else traits.faults.get(about, ""),
        })
        for rule, kept, otherwise, about, required in table
    ]  # fmt: skip
