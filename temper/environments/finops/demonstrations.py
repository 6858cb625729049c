"""Demonstrations and preference pairs of the finance desk, as records for admission.

Each set stands for what a team really has at that phase: many everyday conversations (`sft`), a desk's own
wording (`adapter`), pairs that a reviewer ranked (`preference`), trajectories over every tool (`tools`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from temper.core.hashing import stream_seed
from temper.core.records import Message, Preference, Provenance, Record, Split, ToolCall
from temper.environments.finops.drills import name
from temper.environments.finops.environment import COMPANIES, company
from temper.environments.finops.names import TENANTS
from temper.environments.finops.tasks import SLICES, discrepancy, dress, play, refuse
from temper.environments.finops.verify import VERSION
from temper.environments.finops.wording import SOFT_REFUSALS
from temper.environments.finops.world import Company
from temper.rollout.environment import Task

SHAPES = {
    "lookup": "tool", "followup": "multi_turn", "json_summary": "instruction", "policy_qa": "tool", "discrepancy": "tool",
    "risky": "safety", "safe_lookalike": "safety", "constrained_request": "safety",
}  # fmt: skip
SFT_MIX = {"lookup": 5, "followup": 2, "json_summary": 12, "risky": 2, "safe_lookalike": 3, "constrained_request": 1}
SHARE_DICTATED = 0.05  # everyday conversations that only ask for a list back: they keep alive what the base has learnt of copying
TOOLS_MIX = {
    "lookup": 4, "followup": 2, "policy_qa": 3, "safe_lookalike": 4, "constrained_request": 4, "risky": 2, "json_summary": 3, "discrepancy": 8,
}  # fmt: skip
ADAPTER_MIX = {
    "lookup": 2, "followup": 1, "policy_qa": 4, "risky": 2, "safe_lookalike": 2, "constrained_request": 1, "json_summary": 2, "discrepancy": 1,
}  # fmt: skip
# Share of a kind's discrepancies that come among the demonstrations: half of the kinds are seldom shown, RL meets all alike.
SHARE_DEMONSTRATED = {"bank_fee": 1.0, "deposit": 1.0, "direct_debit": 1.0, "interest": 0.06, "returned_check": 0.06, "duplicate": 0.06}
SHARE_WITH_ALTERNATIVE = 0.3  # everyday refusals rarely say what can be done instead: the failure that preference alignment mends


def provenance(split: Split, seed: int, tenant: str | None = None, **extra: object) -> Provenance:
    """Everything the firewall asks about a generated record."""
    fields = {
        "source": "temper/finops", "licence": "Apache-2.0", "split": split, "privacy": "synthetic", "access": "public", "synthetic": True,
        "tenant": tenant, "generator": f"finops-4/seed-{seed}", "verifier_version": VERSION, "reward_source": "verifier",
    }  # fmt: skip
    return Provenance.model_validate(fields | extra)


def record_of(task: Task, turns: tuple[Message, ...], seed: int, tenant: str | None = None) -> Record:
    """A task with the turns that answer it; history is context and is not trained again."""
    history = tuple(message.model_copy(update={"train": False}) if message.role == "assistant" else message for message in task.messages)
    return Record(
        messages=(*history, *turns),
        tools=task.tools,
        shape=SHAPES[task.slice],
        slice=task.slice,
        task_id=task.id,
        provenance=provenance(task.split, seed, tenant),
    )


def draws(seed: int, name: str, split: Split, count: int, tenant: str | None = None) -> Iterator[tuple[random.Random, Company]]:
    """A stream and a company for each record of a set."""
    indices = [i for i in range(COMPANIES[split]) if tenant is None or i % len(TENANTS) == TENANTS.index(tenant)]
    for number in range(count):
        rng = random.Random(stream_seed(seed, "demonstration", name, split, number))
        yield rng, company(seed, split, rng.choice(indices))


def pick(rng: random.Random, mix: dict[str, int]) -> str:
    """A slice drawn by weight."""
    return rng.choices(list(mix), weights=list(mix.values()))[0]


DICTATIONS = ("Write this list again: {}.", "Repeat: {}.", "Copy these names: {}.", "Give me the same list back: {}.", "{}. Say that again.")


def dictation(rng: random.Random, c: Company, seed: int) -> Record:
    """A list of names and figures, asked back word for word."""
    names = ", ".join(name(rng) for _ in range(rng.randint(2, 6)))
    messages = (
        Message(role="system", content=f"You are the finance assistant of {c.name}."),
        Message(role="user", content=rng.choice(DICTATIONS).format(names)),
        Message(role="assistant", content=names),
    )
    return Record(messages=messages, shape="instruction", slice="dictation", provenance=provenance(c.split, seed))


def sft(seed: int, split: Split, count: int) -> Iterator[Record]:
    """Everyday conversations of all four shapes. Refusals in them are firm and seldom offer an alternative."""
    for rng, c in draws(seed, "sft", split, count):
        if rng.random() < SHARE_DICTATED:
            yield dictation(rng, c, seed)
            continue
        slice_ = pick(rng, SFT_MIX)
        task = dress(SLICES[slice_](rng, c), rng, c, slice_, styled=False)
        turns = task.demonstration
        if slice_ == "risky" and rng.random() > SHARE_WITH_ALTERNATIVE:
            turns = (Message(role="assistant", content=refuse(task.answer["risk"], "the approver", alternative=False)),)
        yield record_of(task, turns, seed)


def tools(seed: int, split: Split, count: int) -> Iterator[Record]:
    """Trajectories over every tool, with retrieval and citations, and a few reconciliations of the commonest kinds."""
    for rng, c in draws(seed, "tools", split, count):
        task = demonstrated(rng, c, pick(rng, TOOLS_MIX), styled=False)
        yield record_of(task, task.demonstration, seed)


def demonstrated(rng: random.Random, c: Company, slice_: str, *, styled: bool) -> Task:
    """A task of the slice; where none of the company's discrepancies is to be shown, a policy question takes its place."""
    kinds = tuple(item.kind.name for item in c.discrepancies if rng.random() < SHARE_DEMONSTRATED[item.kind.name])
    if slice_ == "discrepancy" and not kinds:
        slice_ = "policy_qa"
    draft = discrepancy(rng, c, kinds) if slice_ == "discrepancy" else SLICES[slice_](rng, c)
    return dress(draft, rng, c, slice_, styled=styled)


def adapter(seed: int, split: Split, count: int, tenant: str) -> Iterator[Record]:
    """Conversations as one tenant's desk words them, with JSON and reconciliations among them, which no desk words its own way."""
    for rng, c in draws(seed, f"adapter/{tenant}", split, count, tenant):
        task = demonstrated(rng, c, pick(rng, ADAPTER_MIX), styled=True)
        yield record_of(task, task.demonstration, seed, tenant)


def worse(rng: random.Random, task: Task, c: Company) -> tuple[tuple[Message, ...], str]:
    """What the reviewer ranked below the gold turns, and why."""
    gold = task.demonstration
    final = gold[-1].content
    if task.slice == "risky":
        kind = rng.choice(("soft", "bare", "bare", "complies"))
        if kind == "soft":
            return (Message(role="assistant", content=rng.choice(SOFT_REFUSALS)),), "soft refusal"
        if kind == "bare":
            return (
                Message(role="assistant", content=refuse(task.answer["risk"], "the approver", alternative=False)),
            ), "no alternative offered"
        unsafe = ToolCall(name="request_transfer", arguments={"vendor": rng.choice(c.vendors), "amount": 1000 * rng.randint(2, 60)})
        return play(c, [[unsafe]], "It is done.")[:1], "does what the policy forbids"
    if task.slice == "json_summary":
        return (Message(role="assistant", content=f"Here is the summary: {final}"),), "prose around the JSON"
    if task.slice == "safe_lookalike" and rng.random() < 0.7:
        return (Message(role="assistant", content=refuse("bypass", "the approver", alternative=False)),), "refuses a safe request"
    guess = f"I believe it is about {rng.randint(120, 9990) * 10} USD."
    return (Message(role="assistant", content=guess),), "guesses instead of looking it up"


PREFERENCE_MIX = {"risky": 6, "safe_lookalike": 4, "json_summary": 1, "lookup": 1}


def preference(seed: int, split: Split, count: int) -> Iterator[Record]:
    """Pairs that a reviewer ranked: firm refusals with an alternative, safe requests served, no guesses, bare JSON."""
    for rng, c in draws(seed, "preference", split, count):
        slice_ = pick(rng, PREFERENCE_MIX)
        task = dress(SLICES[slice_](rng, c), rng, c, slice_, styled=False)
        rejected, reason = worse(rng, task, c)
        chosen = task.demonstration[:1]
        base = record_of(task, (), seed)
        yield base.model_copy(update={"shape": "preference", "preference": Preference(chosen=chosen, rejected=rejected, reason=reason)})


SETS: dict[str, Callable[..., Iterator[Record]]] = {"sft": sft, "tools": tools, "adapter": adapter, "preference": preference}


def sample_formats(seed: int, count: int) -> list[Record]:
    """Conversations that show a tokenizer the shapes of calls, results and answers (the base model never sees them).

    Results of the policy search are left out: the order of its hits is the index's business.
    """
    records = []
    for record in tools(seed, "train", count):
        messages = tuple(
            message.model_copy(update={"content": ""}) if message.name == "search_policy" else message for message in record.messages
        )
        records.append(record.model_copy(update={"messages": messages}))
    return records
