"""GSM8K (Cobbe et al. 2021): grade-school maths, judged by the number after `####`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from temper.core.errors import DataError
from temper.core.hashing import hash_text, stream_seed
from temper.core.records import Message, Outcome, Split
from temper.rollout.environment import PlainSession, Task
from temper.rollout.verifiers import numeric, stated_answer, verifier

SYSTEM = "Solve the problem step by step. End with a line '#### ' and the answer as a number."
CALCULATION = re.compile(r"<<[^<>]*>>")
DEV_SHARE = 20  # one train problem in so many is kept back as dev
MAX_TOKENS = 300


class MathEnvironment:
    """The problems of a GSM8K folder (train.jsonl, test.jsonl). `dev` is a seeded twentieth of train, left out of `train`.

    Reward 1 where the answer marked with `####` or \\boxed{} equals the gold. `checks` tells the marked answer from the
    last number in the text, so that format and arithmetic are not folded into one.
    """

    name = "gsm8k"
    licence = "MIT"
    privacy = "public"
    access = "public"

    def __init__(self, folder: str | Path = "../shared/data/gsm8k", seed: int = 0, max_tokens: int = MAX_TOKENS) -> None:
        self.folder, self.seed, self.max_tokens = Path(folder), seed, max_tokens
        self.verifier = verifier("numeric")
        self.version = f"gsm8k-1/{self.verifier.id}/seed-{seed}"

    def tasks(self, split: Split, limit: int | None = None) -> list[Task]:
        """The problems of a split in the file's order. Raises DataError naming file and line where one is malformed."""
        rows = self._rows("test.jsonl" if split == "test" else "train.jsonl")
        tasks: list[Task] = []
        for line, question, solution in rows:
            kept_back = stream_seed(self.seed, "dev", hash_text(question)) % DEV_SHARE == 0
            if split != "test" and kept_back != (split == "dev"):
                continue
            if limit is not None and len(tasks) >= limit:
                break
            tasks.append(self._task(split, line, question, solution))
        return tasks

    def open(self, task: Task) -> PlainSession:
        """There is nothing to act on."""
        return PlainSession()

    def verify(self, task: Task, turns: tuple[Message, ...], session: Any) -> Outcome:
        """Whether the final turn marks the right number; reward None where it could not be compared in time."""
        text = turns[-1].content if turns else ""
        gold = task.answer["number"]
        strict, lenient = numeric(text, gold), numeric(text, gold, lenient=True)
        checks = {"answer_marked": stated_answer(text) is not None, "answer_correct": strict.passed, "last_number_correct": lenient.passed}
        checks["task_success"] = strict.passed
        reward = None if strict.passed is None else float(strict.passed)
        return Outcome(reward=reward, checks=checks, detail={"reason": strict.reason, "gold": gold, "final": text})

    def _task(self, split: Split, line: int, question: str, solution: str) -> Task:
        gold = stated_answer(solution)
        if gold is None:
            raise DataError(f"{self.folder}: line {line} has a solution without '####'", do="give each problem its answer after '####'")
        worked = CALCULATION.sub("", solution)
        return Task(
            id=f"gsm8k/{split}/{line}", messages=(Message(role="system", content=SYSTEM), Message(role="user", content=question)),
            slice="gsm8k", split=split, cluster=f"line {line}", answer={"number": gold},
            demonstration=(Message(role="assistant", content=worked),), max_turns=1, max_tokens=self.max_tokens,
        )  # fmt: skip

    def _rows(self, name: str) -> list[tuple[int, str, str]]:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path} does not exist", do="give the folder that holds GSM8K's train.jsonl and test.jsonl as option `folder`")
        rows = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                row = json.loads(line)
                rows.append((number, str(row["question"]), str(row["answer"])))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number} is no GSM8K problem", why=str(error), do="each line needs question and answer") from error
        return rows


def environment(folder: str = "../shared/data/gsm8k", seed: int = 0, max_tokens: int = MAX_TOKENS) -> MathEnvironment:
    """The environment's factory, as `environment: gsm8k` in a config calls it."""
    return MathEnvironment(folder, seed, max_tokens)
