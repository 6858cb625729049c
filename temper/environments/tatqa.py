"""TAT-QA (Zhu et al. 2021): questions over a table and paragraphs of real financial reports."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from temper.core.errors import DataError
from temper.core.hashing import stream_seed
from temper.core.records import Message, Outcome, Split
from temper.core.reports import Finding
from temper.core.storage import read_json
from temper.rollout.environment import PlainSession, Task
from temper.rollout.verifiers import Judged, same_items, same_text, scaled, to_number, verifier

SYSTEM = (
    "Answer the question from the table and the text. End with a line 'Answer: ' and the answer alone. "
    "Give a number with its scale (thousand, million, billion or %), and separate several items with '; '."
)
ANSWER = re.compile(r"^Answer:[ \t]*(.*)$", re.MULTILINE)
SHARES: tuple[tuple[int, Split], ...] = ((70, "train"), (85, "dev"), (100, "test"))  # of a hundred contexts
PERCENT = re.compile(r"(\d+\.?\d*|\.\d+)\s*%")
LONE_BRACKET = re.compile(r"\((\d+\.?\d*)\)")
OPERATIONS: dict[type, Callable[[Decimal, Decimal], Decimal]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
ROUNDING = Decimal("0.005")
MAX_TOKENS = 120


class TatqaEnvironment:
    """The questions of TAT-QA's dev.json, split by context into 70% train, 15% dev and 15% test.

    Reward 1 where the answer is right in value and scale (numbers), as text (spans), or item by item (several spans).
    A label that its own derivation contradicts stays the gold and is reported by `label_findings`.
    """

    name = "tatqa"
    licence = "CC-BY-4.0"
    privacy = "public"
    access = "public"

    def __init__(self, path: str | Path = "../shared/data/tatqa/dev.json", seed: int = 0, max_tokens: int = MAX_TOKENS) -> None:
        self.path, self.seed, self.max_tokens = Path(path), seed, max_tokens
        self.version = f"tatqa-1/{verifier('scaled').id}/{verifier('text').id}/seed-{seed}"

    def tasks(self, split: Split, limit: int | None = None) -> list[Task]:
        """The questions of a split, context by context. Raises DataError naming the context that is malformed."""
        tasks: list[Task] = []
        for number, context in enumerate(self._contexts()):
            try:
                cluster = str(context["table"]["uid"])
                if self._split(cluster) == split:
                    shown = show(context)
                    tasks += [self._task(split, cluster, shown, question) for question in context["questions"]]
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{self.path}: context {number} is no TAT-QA context", why=f"{type(error).__name__}: {error}") from error
        return tasks if limit is None else tasks[:limit]

    def open(self, task: Task) -> PlainSession:
        """There is nothing to act on."""
        return PlainSession()

    def verify(self, task: Task, turns: tuple[Message, ...], session: Any) -> Outcome:
        """Whether the line 'Answer: …' of the final turn is right."""
        text = turns[-1].content if turns else ""
        marked = ANSWER.findall(text)
        judged = judge(marked[-1].strip(), task.answer) if marked and marked[-1].strip() else Judged(False, "no line 'Answer: …'")
        checks = {"answer_marked": bool(marked), "answer_correct": judged.passed, "task_success": judged.passed}
        reward = None if judged.passed is None else float(judged.passed)
        return Outcome(reward=reward, checks=checks, detail={"reason": judged.reason, "gold": task.answer["items"], "final": text})

    def label_findings(self) -> list[Finding]:
        """The arithmetic labels that differ from their own derivation: reported, never overruled."""
        findings = []
        for context in self._contexts():
            for question in context["questions"]:
                fault = label_fault(question)
                if fault:
                    rule = f"label of {question['uid']}"
                    findings.append(Finding(rule=rule, status="fail", observed=fault[0], required=fault[1], reason=question["derivation"]))
        return findings

    def _task(self, split: Split, cluster: str, shown: str, question: dict[str, Any]) -> Task:
        answer, kind, scale = question["answer"], question["answer_type"], question["scale"]
        items = [str(item) for item in (answer if isinstance(answer, list) else [answer]) if str(item).strip()]
        gold = "; ".join(items)
        if to_number(gold) is not None and scale:
            gold = f"{gold}%" if scale == "percent" else f"{gold} {scale}"
        content = f"{shown}\n\nQuestion: {question['question']}"
        return Task(
            id=f"tatqa/{split}/{question['uid']}", messages=(Message(role="system", content=SYSTEM), Message(role="user", content=content)),
            slice=f"tatqa_{kind}", split=split, cluster=cluster, answer={"items": items, "kind": kind, "scale": scale},
            demonstration=(Message(role="assistant", content=f"Answer: {gold}"),), max_turns=1, max_tokens=self.max_tokens,
        )  # fmt: skip

    def _split(self, cluster: str) -> Split:
        place = stream_seed(self.seed, "split", cluster) % 100
        return next(split for bound, split in SHARES if place < bound)

    def _contexts(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist", do="give the path of TAT-QA's dev.json as option `path`")
        contexts = read_json(self.path)
        if not isinstance(contexts, list):
            raise DataError(f"{self.path} holds {type(contexts).__name__}, not a list of contexts")
        return contexts


def show(context: dict[str, Any]) -> str:
    """A context as text: the table row by row, then its paragraphs."""
    rows = [" | ".join(str(cell).strip() for cell in row) for row in context["table"]["table"]]
    paragraphs = [item["text"] for item in sorted(context["paragraphs"], key=lambda item: item["order"])]
    return "\n".join(["Table:", *rows, "", "Text:", *paragraphs])


def judge(given: str, answer: dict[str, Any]) -> Judged:
    """One answer line against the gold items: numbers with their scale, several spans as a set, one span as text."""
    items, scale = answer["items"], answer["scale"]
    if answer["kind"] == "multi-span" and len(items) > 1:
        return same_items([item for item in given.split(";") if item.strip()], items)
    if answer["kind"] in ("arithmetic", "count") or (scale and to_number(items[0]) is not None):
        return scaled(given, items[0], scale)
    return same_text(given, items[0])


def label_fault(question: dict[str, Any]) -> tuple[str, str] | None:
    """(label, what its derivation gives) where no reading of the derivation gives the label; None where one does, or none can be computed.

    Annotators write 53% for 0.53 and for 53, and (71) for 71 and for accountants' −71: each reading is tried.
    """
    if question["answer_type"] != "arithmetic" or not isinstance(question["answer"], (int, float)):
        return None
    plain = re.sub(r"[$€£,]", "", question["derivation"]).replace("[", "(").replace("]", ")").replace("–", "-").replace("−", "-")
    readings = [PERCENT.sub(r"(\1/100)", plain), plain.replace("%", "")]
    texts = [text for reading in readings for text in (reading, LONE_BRACKET.sub(r"(-\1)", reading))]
    values = [value for value in map(arithmetic, texts) if value is not None]
    if not values:
        return None
    label = Decimal(str(question["answer"]))
    step = Decimal(1).scaleb(int(label.as_tuple().exponent))
    results = [value * factor for value in values for factor in ((1, 100) if question["scale"] == "percent" else (1,))]
    if any(abs(item - label) <= max(step, abs(label) * ROUNDING) for item in results):
        return None
    return str(label), f"{results[0]:.6g}"


def arithmetic(text: str) -> Decimal | None:
    """The value of + − * / and brackets over numbers; None for anything else."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, InvalidOperation, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> Decimal:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Decimal(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"not arithmetic: {ast.dump(node)[:60]}")


def environment(path: str = "../shared/data/tatqa/dev.json", seed: int = 0, max_tokens: int = MAX_TOKENS) -> TatqaEnvironment:
    """The environment's factory, as `environment: tatqa` in a config calls it."""
    return TatqaEnvironment(path, seed, max_tokens)
