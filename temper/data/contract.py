"""What a chat template does, found by rendering probes; and what it must do before anything is trained or served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from temper.core.errors import TemplateError
from temper.core.records import Message, ToolCall, ToolSpec
from temper.core.reports import Finding
from temper.data.syntax import CallSyntax, ThinkSyntax, learn_calls, learn_thinking

Raw = Callable[..., str]  # raw(messages, tools, generation, short_ids) -> text; raises TemplateError

ARGUMENTS = {"alpha": "probe-argument"}
TOOL = ToolSpec(name="probe_tool", description="A probe.", parameters={"type": "object", "properties": {"alpha": {"type": "string"}}, "required": ["alpha"]})
SYSTEM = Message(role="system", content="Probe system.")
ASK = Message(role="user", content="Probe question one?")
ASK_AGAIN = Message(role="user", content="Probe question two?")
ANSWER = Message(role="assistant", content="Probe answer one.")
ANSWER_AGAIN = Message(role="assistant", content="Probe answer two.")
CALL = Message(role="assistant", tool_calls=(ToolCall(name="probe_tool", arguments=ARGUMENTS, id="call_probe_number_one"),))
RESULT = Message(role="tool", content="Probe result.", tool_call_id="call_probe_number_one", name="probe_tool")
TWO_CALLS = Message(role="assistant", tool_calls=(CALL.tool_calls[0], ToolCall(name="other_tool", arguments={"beta": "more"}, id="call_probe_number_two")))
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

    def end_of(self, body: str) -> str | None:
        """The last special token of a turn's text: what ends it."""
        places = [(body.rfind(text) + len(text), text) for text in self.special if text in body]
        return max(places)[1] if places else None


def learn(raw: Raw, added: dict[str, int], special: dict[str, int]) -> Traits:
    """Find out what a template does. `raw` renders; `added` and `special` map token texts to ids."""
    probe = Prober(raw, special)
    calls = probe.holds("calls", [ASK, CALL], "probe_tool", "probe-argument", tools=[TOOL])
    if not calls:  # Mistral's templates refuse ids that have not nine letters
        first = probe.faults.pop("calls", "")
        probe.short_ids = True
        calls = probe.holds("calls", [ASK, CALL], "probe_tool", "probe-argument", tools=[TOOL])
        probe.short_ids = calls
        probe.faults |= {} if calls else {"calls": first}
    tools = probe.holds("tools", [ASK], "probe_tool", tools=[TOOL])
    results = calls and probe.holds("results", [ASK, CALL, RESULT], "Probe result.", tools=[TOOL])
    beside = calls and probe.holds("text beside a call", [ASK, CALL_WITH_TEXT], "Probe text beside.", "probe_tool", tools=[TOOL])
    thinking = probe.holds("thinking", [ASK, THOUGHT], "Probe thinking.", "Probe answer one.")
    system = probe.holds("system", [SYSTEM, ASK], "Probe system.")
    parallel = calls and probe.holds("parallel calls", [ASK, TWO_CALLS], "probe_tool", "other_tool", tools=[TOOL])
    question = [ASK, CALL, RESULT, FINAL] if results else [ASK, ANSWER]
    offered = [TOOL] if tools else []
    prompt, answered = probe.text("generation", [ASK], generation=True), probe.text("generation", [ASK, ANSWER])
    generation = prompt is not None and answered is not None and answered.startswith(prompt)
    appends = probe.appends("appends", question, offered) and probe.appends("appends", [ASK, ANSWER])
    conversations = [[ASK, ANSWER, ASK_AGAIN, ANSWER_AGAIN], [*question, ASK_AGAIN, ANSWER_AGAIN]]
    conversations += [[SYSTEM, *conversations[-1]]] if system else []
    conversations += [[ASK, THOUGHT, ASK_AGAIN, ANSWER_AGAIN]] if thinking else []
    keeps = appends and all([probe.appends("history", each, offered) for each in conversations])
    turns = [ANSWER, *([CALL] if calls else []), *([TWO_CALLS] if parallel else []), *([CALL_WITH_TEXT] if beside else []), *([THOUGHT] if thinking else [])]
    bodies = [probe.body("end", turn, [TOOL] if turn.tool_calls else []) for turn in turns]
    ends = [probe.end_of(body) for body in bodies]
    found = {end for end in ends if end}
    if None in ends:
        probe.faults["end"] = "an assistant turn is rendered without a special token at its end"
    elif any(sum(body.count(end) for end in found) != 1 for body in bodies):
        probe.faults["end"] = f"{sorted(found)} stand more than once in one assistant turn"
    plain = bodies[0].partition("Probe answer one.")
    call_body, call_end = probe.body("calls", CALL, [TOOL]), ends[1] if calls else None
    call_syntax = learn_calls(call_body.rpartition(call_end)[0], "probe_tool", ARGUMENTS, added) if call_end else None
    if call_syntax and call_syntax.mark and beside:
        between = probe.body("text beside a call", CALL_WITH_TEXT, [TOOL]).partition("Probe text beside.")[2]
        call_syntax = CallSyntax(call_syntax.mark, call_syntax.close, call_syntax.arguments_key, between.partition(call_syntax.mark)[0])
    return Traits(
        end_ids=frozenset(special[end] for end in found), appends=appends, keeps_history=keeps, generation=generation, system=system, tools=tools,
        calls=calls, results=results, parallel=parallel, text_beside_call=beside, thinking=thinking, short_ids=probe.short_ids, call_syntax=call_syntax,
        think_syntax=learn_thinking(probe.body("thinking", THOUGHT), "Probe thinking.", "Probe answer one.") if thinking else None,
        lead=plain[0] if plain[1] else "", faults=probe.faults,
    )  # fmt: skip


def findings(traits: Traits, *, ends: Sequence[str], pad: str, pad_is_end: bool, reads_clock: bool, folds_system: bool) -> list[Finding]:
    """The contract, line by line. `unknown` marks what only matters to rows that need it; such a row is refused."""

    def line(rule: str, passed: bool, about: str, required: str, *, otherwise: str = "fail") -> Finding:
        status = "pass" if passed else otherwise
        return Finding.model_validate({"rule": rule, "status": status, "observed": "yes" if passed else "no", "required": required, "reason": "" if passed else traits.faults.get(about, "")})  # fmt: skip

    some_tools = traits.tools or traits.calls or traits.results
    lines = [
        line("generation prompt", traits.generation, "generation", "the prompt to answer is what stands before the answer in training"),
        line("turns only append", traits.appends, "appends", "inside one question, a rendered turn never changes once calls, results or answers follow"),
        line("history is kept", traits.keeps_history, "history", "earlier answers never change once a new question follows; else only rows that train the last question's turns are taken", otherwise="unknown"),
        Finding(rule="end token", status="fail" if "end" in traits.faults or not ends else "pass", observed=", ".join(ends) or "none",
                required="each assistant turn ends with one special token, which is trained", reason=traits.faults.get("end", "")),
        Finding(rule="padding", status="fail" if pad_is_end else "pass", observed=pad, required="the pad token is not the end token",
                reason="a mask that hides padding would hide the end of every turn" if pad_is_end else ""),
        line("system role", traits.system, "system", "the system text is rendered; else rows that have one are refused", otherwise="unknown"),
        line("tools", traits.tools, "tools", "tool definitions are rendered; else rows that have tools are refused", otherwise="fail" if some_tools else "unknown"),
        line("tool calls", traits.calls, "calls", "a call's name and arguments are rendered", otherwise="fail" if some_tools else "unknown"),
        line("tool results", traits.results, "results", "a result's text is rendered", otherwise="fail" if some_tools else "unknown"),
        line("call syntax", traits.call_syntax is not None or not traits.calls, "calls", "a sampled call can be read back: it is a JSON object with a name", otherwise="fail"),
        line("parallel calls", traits.parallel, "parallel calls", "several calls in one turn; else such rows are refused", otherwise="unknown"),
        line("text beside a call", traits.text_beside_call, "text beside a call", "content beside a call is rendered; else such rows are refused", otherwise="unknown"),
        line("thinking", traits.thinking, "thinking", "reasoning is rendered; else rows that train it are refused", otherwise="unknown"),
    ]  # fmt: skip
    if folds_system and not traits.system:
        lines[5] = Finding(rule="system role", status="pass", observed="folded into the first user turn, as configured", required="the system text is rendered", reason="")
    if reads_clock:
        lines.append(Finding(rule="clock", status="pass", observed="asks for today's date", required="equal rows have equal tokens", reason="told 26 Jul 2024 always"))
    return lines
