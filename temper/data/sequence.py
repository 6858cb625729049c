"""`Sequence`, the one row type that reaches the learner, and how records become sequences."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path

from temper.core.errors import DataError, ManifestError, TemplateError
from temper.core.hashing import hash_file
from temper.core.records import Manifest, Message, Record
from temper.core.storage import read_json, read_jsonl
from temper.data.template import Supervised, Template

Support = list["tuple[int, ...] | None"]


@dataclass(frozen=True)
class Sequence:
    """Tokens and streams aligned to them: position i of a stream speaks of predicting `tokens[i]`.

    `weights` are loss weights (0: not trained; the first is always 0). `advantages`, `old_logprobs` and
    `ref_logprobs` hold 0 where nothing is trained; an old log-prob is NaN where nobody sampled the token. `values` are
    what a scalar head said there, `targets` what it should say. `support` holds the tokens that sampling allowed (None: all).
    `group` names rows that belong together: the two of a pair, or the samples of one prompt. `cut` tokens of the record
    stood behind the longest row allowed.
    """

    tokens: list[int]
    weights: list[float]
    advantages: list[float] | None = None
    old_logprobs: list[float] | None = None
    ref_logprobs: list[float] | None = None
    values: list[float] | None = None
    targets: list[float] | None = None
    support: Support | None = None
    adapter: str | None = None
    group: str | None = None
    record: str = ""
    cut: int = 0

    @property
    def supervised(self) -> int:
        """How many tokens are trained."""
        return sum(weight != 0 for weight in self.weights)


def to_sequence(record: Record, template: Template, max_tokens: int) -> Sequence:
    """A record as a row for supervised training: its assistant turns are trained.

    A row longer than `max_tokens` is cut there, without an end token that nobody wrote. Raises DataError, naming the
    record, for turns out of order, and where nothing is trained; TemplateError where the template refuses it.
    """
    check_turns(record, record.messages)
    return _row(record, _supervised(record, record.messages, template), max_tokens)


def preference_sequences(record: Record, template: Template, max_tokens: int) -> tuple[Sequence, Sequence]:
    """(chosen, rejected) of a pair: the shared messages are context, only the answers are trained. Raises DataError."""
    if record.preference is None:
        raise fault(record, "has no preference", why="pairs are needed here", do="give records with chosen and rejected")
    context = [message.model_copy(update={"train": False}) for message in record.messages]
    sides = []
    for side in (record.preference.chosen, record.preference.rejected):
        messages = (*context, *side)
        check_turns(record, messages)
        sides.append(_row(record, _supervised(record, messages, template), max_tokens))
    if sides[0].tokens == sides[1].tokens:
        raise fault(
            record,
            "has the same tokens on both sides",
            why=f"nothing tells them apart within {max_tokens} tokens",
            do="raise max_tokens, or remove the pair",
        )
    return sides[0], sides[1]


def episode_sequence(record: Record, advantage: float) -> Sequence:
    """An episode as a row: the tokens exactly as sampled, each turn credited with `advantage`. Raises DataError."""
    if not record.sampled:
        raise fault(record, "has no sampled tokens", why="only what was sampled can be credited", do="collect episodes with an engine")
    last = record.sampled[-1]
    tokens = [*last.prompt_ids, *last.token_ids]
    weights, old = [0.0] * len(tokens), [0.0] * len(tokens)
    support: Support = [None] * len(tokens)
    for number, turn in enumerate(record.sampled):
        start = len(turn.prompt_ids)
        seen = [*turn.prompt_ids, *turn.token_ids]
        if tokens[: len(seen)] != seen:
            at = next((at for at, (one, other) in enumerate(zip(seen, tokens, strict=False)) if one != other), len(tokens))
            raise fault(
                record,
                f"turn {number} is not a prefix of the whole episode",
                why=f"token {at} differs: its history was written anew",
                do="extend episodes with Template.append",
            )
        if len(turn.logprobs) != len(turn.token_ids) or (turn.support is not None and len(turn.support) != len(turn.token_ids)):
            raise fault(
                record,
                f"turn {number} has {len(turn.token_ids)} tokens and {len(turn.logprobs)} log-probs",
                why="each sampled token needs its own",
                do="collect the episode again with an engine",
            )
        if (turn.temperature, turn.adapter) != (last.temperature, last.adapter):
            raise fault(
                record,
                f"turn {number} was sampled at another temperature or with another adapter than the last",
                why="one row has one of each",
                do="sample a whole episode in one way",
            )
        stop = start + len(turn.token_ids)
        weights[start:stop] = [1.0] * (stop - start)
        old[start:stop] = turn.logprobs
        support[start:stop] = turn.support or [None] * (stop - start)
    if not any(weights):
        raise fault(record, "sampled no token", why="there is nothing to credit", do="leave out empty episodes")
    weights[0] = 0.0
    credit = [advantage if weight else 0.0 for weight in weights]
    return Sequence(
        tokens=tokens,
        weights=weights,
        advantages=credit,
        old_logprobs=old,
        support=support if any(support) else None,
        adapter=last.adapter,
        group=record.task_id,
        record=record.id,
    )


def load_manifest(path: Path) -> tuple[Manifest, list[Record]]:
    """The manifest in a folder (or at a path) and its records, every hash recomputed. Raises ManifestError."""
    path = Path(path)
    listing = path / "manifest.json" if path.is_dir() else path
    if not listing.is_file():
        raise ManifestError(
            f"{listing} does not exist", why="training takes admitted records only", do="let the data through admission: temper data admit"
        )
    manifest = Manifest.model_validate(read_json(listing))
    file = listing.parent / manifest.records_file
    if not file.is_file():
        raise ManifestError(f"{file} does not exist", why=f"{listing} names it", do="restore it, or run the admission again")
    found = hash_file(file)
    if found != manifest.records_sha256:
        raise ManifestError(
            f"{file} is not what was admitted",
            why=f"admitted {manifest.records_sha256[:16]}, found {found[:16]}",
            do="restore it, or run the admission again",
        )
    records = read_jsonl(file, Record)
    if len(records) != len(manifest.admitted):
        raise ManifestError(
            f"{file} has {len(records)} records", why=f"{len(manifest.admitted)} were admitted", do="run the admission again"
        )
    for number, (record, admitted) in enumerate(zip(records, manifest.admitted, strict=True), start=1):
        if record.id != admitted:
            raise ManifestError(
                f"{file}:{number} is not the record that was admitted",
                why=f"admitted {admitted[:16]}, found {record.id[:16]}",
                do="run the admission again",
            )
    return manifest, records


def check_turns(record: Record, messages: Rows[Message]) -> None:
    """Raise DataError for a conversation out of order: who may speak after whom, and a result for every call."""
    waiting: list[str] = []
    unnamed = 0
    for number, message in enumerate(messages):
        before = messages[number - 1].role if number else None
        if message.role == "system" and number:
            raise fault(
                record, f"message {number} is a system message after the start", why="the system text comes first", do="move or remove it"
            )
        if message.role in ("assistant", "tool") and before in (None, "system"):
            raise fault(
                record,
                f"the first turn is of the {message.role}",
                why="a conversation starts with the user",
                do="remove the turn, or add the question it answers",
            )
        if message.role == "tool":
            if not waiting and not unnamed:
                raise fault(
                    record,
                    f"message {number} is a tool result without a call",
                    why="no call before it waits for a result",
                    do="remove it, or add the call",
                )
            if message.tool_call_id and message.tool_call_id in waiting:
                waiting.remove(message.tool_call_id)
            elif message.tool_call_id and not unnamed:
                raise fault(
                    record,
                    f"message {number} answers the call {message.tool_call_id!r}",
                    why=f"waiting are {waiting}",
                    do="give the result the id of its call",
                )
            elif unnamed:
                unnamed -= 1
            else:
                waiting.pop(0)
            continue
        if waiting or unnamed:
            raise fault(
                record,
                f"message {number} ({message.role}) follows a tool call without its result",
                why=f"{len(waiting) + unnamed} results are missing",
                do="add a tool message for each call",
            )
        waiting = [call.id for call in message.tool_calls if call.id]
        unnamed = sum(not call.id for call in message.tool_calls)
    if not any(message.role == "assistant" and message.train is not False for message in messages):
        raise fault(
            record,
            "has no assistant turn to train",
            why=f"roles: {' '.join(message.role for message in messages)}",
            do="add an answer, or remove the row",
        )


def fault(record: Record, what: str, *, why: str = "", do: str = "") -> DataError:
    """A DataError that names the record."""
    return DataError(f"record {record.id[:16]} {what}", why=why, do=do)


def _supervised(record: Record, messages: Rows[Message], template: Template) -> Supervised:
    try:
        return template.supervise(messages, record.tools)
    except TemplateError as error:
        raise TemplateError(f"record {record.id[:16]}: {error.what}", why=error.why, do=error.do) from error


def _row(record: Record, found: Supervised, max_tokens: int) -> Sequence:
    weights = [float(trained) for trained in found.mask[:max_tokens]]
    weights[:1] = [0.0]
    if not any(weights):
        raise fault(
            record,
            f"trains nothing within max_tokens={max_tokens}",
            why=f"it has {len(found.tokens)} tokens, and its first trained one stands beyond the cut",
            do="raise max_tokens, or remove the row",
        )
    cut = max(0, len(found.tokens) - max_tokens)
    return Sequence(tokens=found.tokens[:max_tokens], weights=weights, group=record.id, record=record.id, cut=cut)
