"""Grammars that sampling may not leave: JSON of a schema, and tool calls as the chat template writes them.

Constrained output is canonical: keys in the schema's order, one form of white space, the template's own call format,
so that what is sampled under a grammar looks like what was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jsonschema
import llguidance
import llguidance.hf
import numpy as np
import torch
from jsonschema.exceptions import SchemaError
from torch import Tensor

from temper.core.errors import ConfigError, MissingDependency, TemplateError
from temper.core.records import Message, ToolCall, ToolSpec
from temper.rollout.verifiers import json_schema as check_schema

if TYPE_CHECKING:
    from temper.policy.model import Policy
    from temper.rollout.rows import Row

SPACED: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
PROBE_NAME, PROBE_ID = "probe_tool", "call0prob"
PROBE_ARGUMENTS = re.compile(r'\{"probe_a"(:\s*)1(,\s*)"probe_b"\1(?:2)\}')
CALL_ID = '/[A-Za-z0-9]{9}/'


@dataclass(frozen=True)
class Grammar:
    """What a turn must be: JSON of `schema`, a call of one of `tools`, or `text`; any of those that are set.

    Make one with `json_schema` or `tool_call`. Both are texts, so that a grammar is hashable and compiled once.
    """

    schema: str | None = None
    tools: tuple[str, ...] = ()
    text: bool = False

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that satisfies `schema`. Raises ConfigError for what is no schema or uses what cannot be enforced."""
        return cls(schema=_usable(json.dumps(schema, ensure_ascii=False)))

    @classmethod
    def tool_call(cls, tools: Sequence[ToolSpec], *, schema: Mapping[str, Any] | None = None, text: bool = True) -> Grammar:
        """Calls of `tools` with arguments that satisfy their schemas; or else free text, or JSON of `schema` where one is given.

        Raises ConfigError as `json_schema` does. `text=False` leaves no way but a call.
        """
        if not tools:
            raise ConfigError("a tool-call grammar needs at least one tool")
        for tool in tools:
            _usable(json.dumps(tool.parameters, ensure_ascii=False))
        answer = None if schema is None else _usable(json.dumps(schema, ensure_ascii=False))
        specs = tuple(json.dumps([tool.name, tool.parameters], ensure_ascii=False) for tool in tools)
        return cls(schema=answer, tools=specs, text=text and schema is None)

    @property
    def specs(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and parameters of each tool."""
        return [(name, parameters) for name, parameters in map(json.loads, self.tools)]

    def fault(self, text: str) -> str | None:
        """What is wrong with a finished turn in the eyes of a JSON Schema validator; None where nothing is, or where tools are offered."""
        if self.schema is None or self.tools:
            return None
        judged = check_schema(text, json.loads(self.schema))
        return None if judged.passed else judged.reason


@lru_cache(maxsize=1024)
def _usable(schema: str) -> str:
    """`schema` itself, where it is one and llguidance can enforce it. Raises ConfigError."""
    parsed = json.loads(schema)
    try:
        jsonschema.Draft202012Validator.check_schema(parsed)
    except SchemaError as error:
        raise ConfigError("the grammar's schema is no JSON Schema", why=error.message, do="write it after draft 2020-12") from error
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=SPACED)
    except ValueError as error:
        raise ConfigError("the grammar's schema cannot be enforced", why=str(error), do="give an object as schema") from error
    _raise_fault(llguidance.LLMatcher.validate_grammar(grammar), schema)
    return schema


def _raise_fault(fault: str, what: str) -> None:
    if fault:
        told = fault.strip().splitlines()[0][:300]
        raise ConfigError(f"a grammar cannot be enforced: {what[:200]}", why=told, do="leave out the keyword, or sample without a grammar")


# --- the template's call format --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallFormat:
    """The text around a tool call: `opening` name `middle` arguments, then `between` name … for each further call, then `closing`.

    `between` is None where the template takes one call only. `options` are the white space of the arguments.
    """

    opening: str
    middle: str
    between: str | None
    closing: str
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, template: Any, stops: Sequence[str]) -> CallFormat:
        """Read off the template by rendering calls of a probe. Raises ConfigError for a format that is not JSON."""
        one = cls._probe(template, stops, 1)
        if one is None:
            why = f"template {template.name} does not write a call as name and JSON arguments"
            raise ConfigError("tool calls cannot be constrained with this chat template", why=why, do="sample without constraint, or use another template")
        opening, middle, closing, options = one[0], one[1], one[2], one[3]
        two = cls._probe(template, stops, 2)
        return cls(opening, middle, None if two is None else two[4], closing, tuple(sorted(options.items())))

    @staticmethod
    def _probe(template: Any, stops: Sequence[str], count: int) -> tuple[str, str, str, dict[str, Any], str] | None:
        calls = tuple(ToolCall(name=PROBE_NAME, arguments={"probe_a": 1, "probe_b": 2}, id=PROBE_ID) for _ in range(count))
        spec = ToolSpec(name=PROBE_NAME, parameters={"type": "object", "properties": {"probe_a": {"type": "integer"}, "probe_b": {"type": "integer"}}})
        user = Message(role="user", content="u")
        try:
            prompt = template.render((user,), (spec,), generation=True)
            whole = template.render((user, Message(role="assistant", tool_calls=calls)), (spec,))
        except TemplateError:
            return None
        body = whole[len(prompt) :] if whole.startswith(prompt) else ""
        body = body[: min((body.index(stop) for stop in stops if stop in body), default=len(body))]
        pieces = body.split(PROBE_NAME)
        found = [PROBE_ARGUMENTS.search(piece) for piece in pieces[1:]]
        if len(found) != count or not all(found):
            return None
        first, last = found[0], found[-1]
        assert first is not None
        assert last is not None
        options = {"whitespace_flexible": False, "key_separator": first.group(1), "item_separator": first.group(2)}
        between = pieces[1][first.end() :] if count > 1 else ""
        return pieces[0], pieces[1][: first.start()], pieces[-1][last.end() :], options, between


class Grammars:
    """Compiles grammars for one policy's tokenizer and template, and keeps the masks of a batch."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._compiled: dict[Grammar, Any] = {}
        self._tokenizer: Any = None
        self._format: CallFormat | None = None
        self._executor: Any = None

    def start(self, grammar: Grammar) -> Any:
        """A matcher at the beginning of `grammar`. Raises ConfigError where it cannot be compiled."""
        if grammar not in self._compiled:
            text = llguidance.LLMatcher.grammar_from_lark(self.lark(grammar))
            _raise_fault(llguidance.LLMatcher.validate_grammar(text, self.tokenizer), str(grammar))
            matcher = llguidance.LLMatcher(self.tokenizer, text, log_level=0)
            _raise_fault(matcher.get_error() if matcher.is_error() else "", str(grammar))
            self._compiled[grammar] = matcher
        return self._compiled[grammar].deep_copy()

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer as llguidance sees it; the template's stop tokens end a grammar."""
        if self._tokenizer is None:
            hf = self.policy.tokenizer
            if not getattr(hf, "is_fast", False):
                raise MissingDependency("grammars need a fast tokenizer", why=f"{type(hf).__name__} is none", do="save the tokenizer as tokenizer.json")
            size = max(len(hf), int(self.policy.model.config.get_text_config().vocab_size))
            self._tokenizer = llguidance.hf.from_tokenizer(hf, n_vocab=size, eos_token=sorted(self.policy.template.stop_ids))  # type: ignore[arg-type]
        return self._tokenizer

    def lark(self, grammar: Grammar) -> str:
        """The grammar in llguidance's Lark dialect."""
        ways, rules = [], []
        if grammar.text:
            ways.append("TEXT")
            rules.append(self._free_text(grammar))
        if grammar.schema is not None:
            ways.append("answer")
            rules.append(f"answer: %json {_with_options(json.loads(grammar.schema), SPACED)}")
        if grammar.tools:
            form = self._call_format()
            ways.append("calls")
            again = "" if form.between is None else f" ({self._literal(form.between)} call)*"
            rules.append(f"calls: {self._literal(form.opening)} call{again} {self._literal(form.closing)}")
            rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(grammar.tools))))
            for number, (name, parameters) in enumerate(grammar.specs):
                rules.append(f"call_{number}: {self._literal(name + form.middle)} arguments_{number}")
                rules.append(f"arguments_{number}: %json {_with_options(parameters, dict(form.options))}")
        return "\n".join(["%llguidance {}", f"start: {' | '.join(ways)}", *rules, ""])

    def allowed(self, rows: Sequence[Row], logits_R_V: Tensor) -> Tensor | None:
        """[rows, vocabulary] bool: what each row's grammar allows next, everything for rows without; None if no row has one."""
        matchers = [(row.matcher, number) for number, row in enumerate(rows) if row.matcher is not None]
        if not matchers:
            return None
        vocabulary = logits_R_V.shape[1]
        words = (self.tokenizer.vocab_size + 31) // 32
        bits_R_W = np.full((len(rows), words), -1, dtype=np.int32)
        if self._executor is None:
            self._executor = llguidance.LLExecutor(num_threads=torch.get_num_threads())
        self._executor.unsafe_compute_mask_ptr(matchers, bits_R_W.ctypes.data, words * 4, len(rows))
        for matcher, number in matchers:
            if matcher.is_error():  # the matcher never raises; a row it gave up on ends as an error
                rows[number].failed = True
                bits_R_W[number] = -1
        allowed_R_V = np.unpackbits(bits_R_W.view(np.uint8), axis=1, bitorder="little", count=min(vocabulary, words * 32)).astype(bool)
        if allowed_R_V.shape[1] < vocabulary:
            allowed_R_V = np.pad(allowed_R_V, ((0, 0), (0, vocabulary - allowed_R_V.shape[1])))
        return torch.from_numpy(allowed_R_V).to(logits_R_V.device)

    def consume(self, row: Row, token: int) -> None:
        """Move a row's grammar on; a finished answer is held against its schema once more by a validator."""
        matcher = row.matcher
        matcher.consume_token(token)
        if matcher.is_error():
            row.failed = True
        elif token in row.stop_ids and row.request.grammar is not None:
            answer = [item for item in row.tokens[len(row.request.prompt_ids) :] if item not in row.stop_ids]
            text = str(self.policy.tokenizer.decode(answer, skip_special_tokens=False)) if row.request.grammar.schema else ""
            row.failed = row.request.grammar.fault(text) is not None

    def _call_format(self) -> CallFormat:
        if self._format is None:
            template = self.policy.template
            stops = [str(self.policy.tokenizer.decode([token])) for token in sorted(template.stop_ids)]
            self._format = CallFormat.of(template, stops)
        return self._format

    def _free_text(self, grammar: Grammar) -> str:
        """Text that does not begin a call: without the token that opens one, or without its first letter at the front."""
        if not grammar.tools:
            return "TEXT: /(?s:.+)/"
        opening = self._call_format().opening.lstrip()
        marker = next((text for text in self._added() if opening.startswith(text)), None)
        if marker is None:
            return f"TEXT: /[^{re.escape(opening[0])}\\s](?s:.*)/" if opening else "TEXT: /(?s:.+)/"
        return f"TEXT: /(?s:.+)/ & ~/(?s:.*){re.escape(marker).replace('/', chr(92) + '/')}(?s:.*)/"

    def _added(self) -> dict[str, int]:
        """The added tokens by text, longest first."""
        added = {token.content: number for number, token in self.policy.tokenizer.added_tokens_decoder.items()}
        return dict(sorted(added.items(), key=lambda item: -len(item[0])))

    def _literal(self, text: str) -> str:
        """Text as Lark terms: added tokens by id, the rest as strings; a call id that the probe left as any id."""
        added = self._added()
        splitter = re.compile("(" + "|".join(map(re.escape, [*added, PROBE_ID])) + ")")
        terms = []
        for piece in splitter.split(text):
            if piece == PROBE_ID:
                terms.append(CALL_ID)
            elif piece in added:
                terms.append(f"<[{added[piece]}]>")
            elif piece:
                terms.append(json.dumps(piece, ensure_ascii=False))
        return " ".join(terms)


def _with_options(schema: Any, options: Mapping[str, Any]) -> str:
    """A schema with llguidance's white-space options in it, as JSON."""
    if not isinstance(schema, dict):
        return json.dumps({"allOf": [schema], "x-guidance": dict(options)}, ensure_ascii=False)
    return json.dumps({**schema, "x-guidance": dict(options)}, ensure_ascii=False)
