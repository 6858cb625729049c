"""Where each assistant turn starts in the rendered text: right behind the text of its prompt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from temper.core.errors import TemplateError
from temper.data.render import Chat

REMEDY = "use a template that keeps every turn as it was sampled (temper/data/chatml.jinja; for Qwen3, temper/data/qwen3.jinja)"


class Render(Protocol):
    """Renders a conversation. Raises TemplateError where the template refuses it."""

    def __call__(self, chat: Chat, tools: list[dict[str, Any]] | None, generation: bool) -> str:
        """The text of `chat`, with the prompt to answer where `generation` is true."""


@dataclass
class Starts:
    """Finds the turns of one conversation, rendered as `text`. `keeps_history` says that later turns change no earlier one."""

    template: str
    render: Render
    chat: Chat
    tools: list[dict[str, Any]] | None
    generation: bool
    text: str
    keeps_history: bool
    why: str
    prompts: dict[int, str] = field(default_factory=dict)

    def find(self, numbers: Collection[int], strict: Collection[int]) -> dict[int, int]:
        """The first character of each turn in `numbers`. Raises TemplateError for one in `strict` that is not rendered as it would be sampled."""
        if not numbers:
            return {}
        text, tools = self.text, self.tools
        if tools and self.keeps_history and (bare := self._without_tools(min(numbers))) is not None:
            text, tools = bare, None
        starts = {}
        for number in numbers:
            prompt = self.prompts.get(number) or self.render(self.chat[:number], tools, True)
            kept = text.startswith(prompt)
            asked_again = [item["role"] for item in self.chat[number + 1 : number + 2]] == ["user"]
            if kept and number in strict and not self.keeps_history and asked_again:
                kept = text.startswith(self.render(self.chat[: number + 1], tools, False))
            if kept:
                starts[number] = len(prompt) + len(self.text) - len(text)
            elif number in strict:
                raise TemplateError(
                    f"the chat template of {self.template} renders assistant message {number} otherwise once later turns follow",
                    why=self.why,
                    do="train only the turns after the last question (train: false on earlier answers), or " + REMEDY,
                )
        return starts

    def _without_tools(self, first: int) -> str | None:
        """The text without tools, where they change nothing from turn `first` on: turns are found in it without rendering tools again."""
        try:
            bare, prompt = self.render(self.chat, None, self.generation), self.render(self.chat[:first], None, True)
        except TemplateError:
            return None
        if not bare.startswith(prompt) or not self.text.endswith(bare[len(prompt) :]):
            return None
        self.prompts[first] = prompt
        return bare
