"""The chat-template contract: one object turns messages into tokens for training, sampling and serving alike.

Which tokens are trained follows from the structure: the conversation is rendered up to each assistant turn with the
generation prompt, and what stands after that text up to the end token is the turn. Nothing is searched for in text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from temper.core.errors import DataError, TemplateError
from temper.core.hashing import hash_text, hash_value
from temper.core.records import Message, ToolCall, ToolSpec
from temper.core.reports import Finding
from temper.data.contract import Traits, findings, learn
from temper.data.encoding import Encoded, Encoder
from temper.data.guards import check_control, check_kept, check_supported
from temper.data.parts import Turn
from temper.data.reading import TurnReader
from temper.data.render import Chat, compiled, special_roles, to_chat, to_tools
from temper.data.syntax import split_calls, split_thinking
from temper.data.turns import REMEDY, Starts

FOLD = "fold_system"  # the key in tokenizer_config.json that says: put the system text into the first user turn


@dataclass(frozen=True)
class Supervised:
    """One conversation as tokens. `mask` is true where a token is trained.

    `message_of` gives the index of the assistant message a token belongs to (its end token included), −1 elsewhere.
    """

    tokens: list[int]
    mask: list[bool]
    message_of: list[int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text and tokens. `turns` holds each assistant message's index, first token and first character."""

    chat: Chat
    tools: list[dict[str, Any]] | None
    folded: int
    text: str
    encoded: Encoded
    turns: list[tuple[int, int, int]]


class Template:
    """A chat template as versioned data, with its tokenizer. Made by `Template.of`."""

    def __init__(self, tokenizer: Any, text: str, *, fold_system: bool = False) -> None:
        self.tokenizer, self.text, self.fold_system = tokenizer, text, fold_system
        self.name = str(getattr(tokenizer, "name_or_path", "") or "chat").rstrip("/").rpartition("/")[2]
        self.encoder = Encoder(tokenizer)
        self._compiled = compiled(text)
        self.special_roles = special_roles(tokenizer)
        self._special = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special and token.content
        }
        self._control = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))) if self._special else None

    @classmethod
    def of(cls, tokenizer: Any, *, fold_system: bool | None = None) -> Template:
        """The template a tokenizer carries. Raises TemplateError where it carries none.

        `fold_system` puts the system text into the first user turn of a template without a system role; the choice is
        kept in the tokenizer's config, so that a saved checkpoint is served as it was trained.
        """
        text = getattr(tokenizer, "chat_template", None)
        if isinstance(text, dict):
            text = text.get("tool_use") or text.get("default")
        if not text:
            raise TemplateError(
                "the tokenizer has no chat template",
                why="conversations cannot become tokens without one",
                do="save the checkpoint with a chat_template.jinja; temper/data/chatml.jinja is one",
            )
        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError(
                "the tokenizer has no fast (Rust) form",
                why="turns are cut at exact places, which needs its added tokens",
                do="convert it to a tokenizer.json",
            )
        if fold_system is not None:
            tokenizer.init_kwargs[FOLD] = fold_system
        return cls(tokenizer, text, fold_system=bool(tokenizer.init_kwargs.get(FOLD, False)))

    # --- what it is ---

    @cached_property
    def fingerprint(self) -> str:
        """A hash of template text, special tokens, and the tokenizer's vocabulary, merges and pre-tokenisation."""
        text, roles = hash_text(self.text), self.special_roles
        return hash_value({"text": text, "roles": roles, "fold_system": self.fold_system, "tokenizer": self._tokenizer_parts})

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """A hash of the tokenizer alone: equal ones give equal texts equal ids."""
        return hash_value(self._tokenizer_parts)

    @cached_property
    def _tokenizer_parts(self) -> dict[str, Any]:
        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return {name: described[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")}

    @cached_property
    def traits(self) -> Traits:
        """What the template can do, found by rendering probes."""
        return learn(self._raw, self.encoder.added_ids, self._special)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end sampling: what ends an assistant turn, and the tokenizer's end token."""
        eos = self.tokenizer.eos_token_id
        return self.traits.end_ids | ({eos} if eos is not None else frozenset())

    @cached_property
    def pad_id(self) -> int:
        """The padding token; where the tokenizer names none, another special token that ends no turn."""
        if self.tokenizer.pad_token_id is not None:
            return int(self.tokenizer.pad_token_id)
        others = [self.tokenizer.unk_token_id, self.tokenizer.bos_token_id, *sorted(self._special.values())]
        return next((int(number) for number in others if number is not None and number not in self.stop_ids), 0)

    def check(self) -> list[Finding]:
        """The contract, line by line: `fail` breaks it; `unknown` is what only some rows need."""
        ends = self._ends()
        pad = self.tokenizer.convert_ids_to_tokens(self.pad_id)
        clock = "strftime_now" in self.text
        return findings(
            self.traits,
            ends=ends,
            pad=str(pad),
            pad_is_end=self.pad_id in self.traits.end_ids,
            reads_clock=clock,
            folds_system=self.fold_system,
        )

    def require(self, *, tools: bool = False) -> None:
        """Raise TemplateError with every line of the contract that fails; with `tools`, also where tools are not supported."""
        needed = ("tools", "tool calls", "tool results", "call syntax") if tools else ()
        broken = [line for line in self.check() if line.status == "fail" or (line.rule in needed and line.status != "pass")]
        if broken:
            rules = {line.rule for line in broken}
            do = "give the tokenizer a pad token of its own" if rules == {"padding"} else REMEDY
            raise TemplateError(
                f"the chat template of {self.name} breaks the contract: {', '.join(line.rule for line in broken)}",
                why="; ".join(f"{line.rule}: {line.reason or 'not so'} (required: {line.required})" for line in broken),
                do=do,
            )

    # --- messages to tokens ---

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), generation: bool = False) -> str:
        """The conversation as text. Raises TemplateError where the template would refuse or drop a part of it."""
        chat, _ = self._admit(messages, tools)
        text = self._raw(chat, tools, generation)
        check_kept(self.name, chat, text)
        return text

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """The tokens that an engine is fed: the conversation and the generation prompt. Raises TemplateError."""
        if tools and self.traits.calls and self.traits.call_syntax is None:
            raise TemplateError(
                f"the calls that the template of {self.name} asks for cannot be read back", why=self.traits.faults["syntax"], do=REMEDY
            )
        return self._encode(messages, tools, generation=True).encoded.ids

    def supervise(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> Supervised:
        """Tokens and mask: text, calls and end token of assistant turns are trained, all else never.

        `Message.train` overrides it turn by turn, or names the parts of a turn that are trained; a token that holds
        any of such a part is. Raises TemplateError where a trained turn is not rendered as it would be sampled, or is
        not rendered whole, or has none of the parts it names.
        """
        row = self._encode(messages, tools, generation=False)
        tokens = row.encoded.ids
        mask, message_of = [False] * len(tokens), [-1] * len(tokens)
        ends = self.traits.end_ids
        for number, start, _ in row.turns:
            stop = next((at + 1 for at in range(start, len(tokens)) if tokens[at] in ends), None)
            if stop is None:
                raise TemplateError(
                    f"assistant message {number} has no end token", why="the template renders the turn without one", do=REMEDY
                )
            message_of[start:stop] = [number] * (stop - start)
            train = messages[number].train
            mask[start:stop] = (
                self._parts(row, number, start, stop, train) if isinstance(train, tuple) else [train is not False] * (stop - start)
            )
        return Supervised(tokens, mask, message_of)

    def append(self, ids: Sequence[int], new_messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
        """`ids` (a prompt and a sampled turn) with `new_messages` and the generation prompt after it. `ids` stay as they are.

        What is added is the difference between a conversation rendered with the new messages and without. A turn cut
        short gets its end token here, as context: it is not part of what was sampled.
        """
        if not new_messages or any(message.role == "assistant" for message in new_messages):
            raise DataError("append takes tool results and user turns", why="an assistant turn is sampled, never encoded again",
                            do="give at least one, and no assistant turn")  # fmt: skip
        calls = tuple(
            ToolCall(name=m.name or "tool", arguments={}, id=m.tool_call_id or f"call-1-{n}")
            for n, m in enumerate(new_messages)
            if m.role == "tool"
        )
        if not self.traits.keeps_history and any(message.role == "user" for message in new_messages):
            raise TemplateError(
                f"the chat template of {self.name} rewrites earlier turns once a new question follows",
                why=self.traits.faults.get("history", ""),
                do=REMEDY,
            )
        check_control(self._control, new_messages)
        asked = [Message(role="user", content="?")]
        spoken = Message(role="assistant", content="" if calls else "Yes.", tool_calls=calls)
        prompt, text = self._raw(asked, tools, True), self._raw([*asked, spoken, *new_messages], tools, True)
        check_kept(self.name, new_messages, text)
        ends = [(place, end) for end in self._ends() if (place := text.find(end, len(prompt))) >= 0]
        if not text.startswith(prompt) or not ends:
            raise TemplateError(
                f"the chat template of {self.name} rewrites the prompt of a turn once its results follow",
                why=self.traits.faults.get("appends", ""),
                do=REMEDY,
            )
        place, end = min(ends)
        cut_short = not ids or ids[-1] not in self.traits.end_ids
        added = self.encoder.encode(text[place if cut_short else place + len(end) :], before=ids[-1] if ids else None)
        return [*ids, *added.ids]

    # --- tokens to a message ---

    def parse(self, token_ids: Sequence[int], *, calls: bool = True) -> Message:
        """A sampled assistant turn as a message: text, thinking and calls in the template's own syntax.

        Arguments that are no JSON object stay text. Control tokens that are no part of the syntax are left out.
        Where no tools were offered (`calls` false) an answer that looks like a call is text.
        """
        syntax = self.traits.call_syntax if calls else None
        reasoning, text = split_thinking(
            self.decode([number for number in token_ids if number not in self._dropped[calls]]), self.traits.think_syntax
        )
        reasoning = reasoning if reasoning and reasoning.strip() else None  # Qwen3 marks "no thinking" by an empty block
        content, found = split_calls(text.removeprefix(self.traits.lead), syntax)
        return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=found)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text, control tokens and all."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def reader(self, *, calls: bool = True, stops: Sequence[str] = ()) -> TurnReader:
        """What reads a turn token by token, as it is sampled, up to the first of `stops`; nothing it gives is ever taken back."""
        traits = self.traits
        syntax = traits.call_syntax if calls else None
        return TurnReader(self.decode, self._dropped[calls], self.encoder.bytewise, traits.think_syntax, traits.lead, syntax, stops)

    @cached_property
    def _dropped(self) -> dict[bool, frozenset[int]]:
        """By whether calls are read: the control tokens that mark neither thinking nor a call, and are no text."""
        think, call = self.traits.think_syntax, self.traits.call_syntax
        marks = {False: [think.open, think.close] if think else []}
        marks[True] = marks[False] + ([call.mark, call.close] if call else [])
        return {
            calls: frozenset(number for text, number in self._special.items() if not any(text in mark for mark in found))
            | self.stop_ids
            | {self.pad_id}
            for calls, found in marks.items()
        }

    # --- inside ---

    def _ends(self) -> list[str]:
        return [self.encoder.added_texts[number] for number in sorted(self.traits.end_ids)]

    def _raw(self, messages: Sequence[Message], tools: Sequence[ToolSpec], generation: bool, short_ids: bool | None = None) -> str:
        chat = to_chat(messages, short_ids=self.traits.short_ids if short_ids is None else short_ids)
        return self._render(chat, to_tools(tools), generation)

    def _render(self, chat: Chat, tools: list[dict[str, Any]] | None, generation: bool) -> str:
        try:
            return self._compiled.render(messages=chat, tools=tools, documents=None, add_generation_prompt=generation, **self.special_roles)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            roles = " ".join(item["role"] for item in chat)
            raise TemplateError(
                "the chat template refuses a conversation",
                why=f"{error} (roles: {roles})",
                do="bring the conversation into a form that the template takes",
            ) from error

    def _admit(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> tuple[list[Message], int]:
        """The messages to render and how many of the first were folded away. Raises TemplateError for what would be lost."""
        traits, chat, folded = self.traits, list(messages), 0
        if not chat:
            raise DataError("a conversation has no messages", do="give at least one")
        check_control(self._control, chat)
        if chat[0].role == "system" and not traits.system:
            if not self.fold_system or len(chat) < 2 or chat[1].role != "user":
                raise TemplateError(
                    f"the chat template of {self.name} has no system role",
                    why=traits.faults.get("system", ""),
                    do=f'remove it, or set "{FOLD}": true in tokenizer_config.json (Template.of(tokenizer, fold_system=True)): then it opens the first user turn',
                )
            chat[1], folded = chat[1].model_copy(update={"content": chat[0].content + "\n\n" + chat[1].content}), 1
            chat = chat[1:]
        check_supported(self.name, traits, chat, tools)
        return chat, folded

    def _encode(self, messages: Sequence[Message], tools: Sequence[ToolSpec], *, generation: bool) -> Rendered:
        """The conversation as text and tokens, and where each assistant turn starts."""
        chat, folded = self._admit(messages, tools)
        short, offered = self.traits.short_ids, to_tools(tools)
        dicts = to_chat(chat, short_ids=short)
        text = self._render(dicts, offered, generation)
        check_kept(self.name, chat, text, thinking=not generation)
        numbers = [number for number, message in enumerate(chat) if message.role == "assistant"]
        strict = {number for number in numbers if chat[number].train is not False} if not generation else set()
        why = self.traits.faults.get("history", "what is trained would not be what is sampled")
        starts = Starts(self.name, self._render, dicts, offered, generation, text, self.traits.keeps_history, why).find(numbers, strict)
        encoded = self.encoder.encode(text, list(starts.values()))
        turns = [(number + folded, place, at) for (number, at), place in zip(starts.items(), encoded.places, strict=True)]
        return Rendered(dicts, offered, folded, text, encoded, turns)

    def _parts(self, row: Rendered, number: int, start: int, stop: int, parts: tuple[str, ...]) -> list[bool]:
        """Which of the tokens start … stop−1, the turn of message `number`, hold any of `parts`."""
        spans = self.encoder.spans(row.encoded)[start:stop]
        at = next(at for index, _, at in row.turns if index == number)
        turn = Turn(row.chat, number - row.folded, lambda chat: self._render(chat, row.tools, False), row.text, (at, spans[-1][1]))
        trained = turn.spans_of(parts, self.traits.think_syntax)
        return [any(first < end and begin < last for begin, end in trained) for first, last in spans]
