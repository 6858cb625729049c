"""Parts of a turn trained apart, turns read token by token, and the card that pins a template beside its weights."""

from __future__ import annotations

import json
import random

import pytest
from pydantic import ValidationError

from temper.core.errors import TemplateError
from temper.core.records import Message, Record, ToolCall
from temper.data.golden import PIN, card, pinned, read_card, require_card, write_card
from temper.data.inspect import counts
from temper.data.sequence import to_sequence
from temper.data.template import Template
from tests.checkpoints import tiny_tokenizer
from tests.data.conversations import (
    AGAIN,
    ANSWER,
    ASK,
    CALL,
    CASES,
    GOLDEN,
    HERE,
    KINDS,
    RESULT,
    SECOND_RESULT,
    SYSTEM,
    TOOLS,
    TWO_CALLS,
    peer,
    record,
    template,
    trained_text,
    with_text,
)  # fmt: skip

SAID = "The Marketing budget for Q3 is 120000."
BESIDE = CALL.model_copy(update={"content": "I will look it up."})
THOUGHT = ANSWER.model_copy(update={"reasoning": "A lookup.\nEasy."})
END = {"llama": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}


def only(message: Message, *parts: str) -> Message:
    return message.model_copy(update={"train": parts})


# --- parts ---


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_parts_change_the_mask_and_never_a_token(kind, name):
    """Thinking, text and calls together are the whole turn; each alone is a part of it, and the tokens stay."""
    made, (messages, tools) = template(kind), GOLDEN[name]
    whole = made.supervise(messages, tools)
    number = max(at for at, message in enumerate(messages) if message.role == "assistant" and (message.tool_calls or not tools))
    message = messages[number]
    has = {"thinking": message.reasoning, "text": message.content, "calls": message.tool_calls}
    masks = []
    for part in (part for part, value in has.items() if value):
        found = made.supervise([*messages[:number], only(message, part), *messages[number + 1 :]], tools)
        assert found.tokens == whole.tokens
        assert found.message_of == whole.message_of
        masks.append([bool(flag) for flag, owner in zip(found.mask, found.message_of, strict=True) if owner == number])
    turn = whole.message_of.count(number)
    assert [sum(flags) for flags in zip(*masks, strict=True)] == [1] * turn  # every token of the turn is in one part, and in one only
    assert masks[-1][-1]  # the end token goes with the last part


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "chatml"])
def test_arguments_are_trained_and_the_prose_is_not(kind):
    found = trained_text(template(kind), [ASK, only(CALL, "arguments"), RESULT, ANSWER.model_copy(update={"train": False})], TOOLS)
    before, arguments, after = found.partition('{"department": "Marketing", "quarter": "Q3"}')
    assert arguments
    assert len(before) <= 3  # a token that holds the first brace or the last holds a little more
    assert len(after) <= 3
    assert "query_budget" not in found
    assert END.get(kind, "<|im_end|>") not in found


def test_text_beside_a_call_and_thinking_are_told_apart():
    for kind, gap, think in (("qwen3", "\n", "<think>\nA lookup.\nEasy.\n</think>\n\n"), ("chatml", "", "<think>A lookup.\nEasy.</think>")):
        made = template(kind)
        silent = ANSWER.model_copy(update={"train": False})
        assert trained_text(made, [ASK, only(BESIDE, "text"), RESULT, silent], TOOLS) == "I will look it up."
        calls = trained_text(made, [ASK, only(BESIDE, "calls"), RESULT, silent], TOOLS)
        assert calls.startswith(gap + "<tool_call>")
        assert calls.endswith("</tool_call><|im_end|>")
        assert trained_text(made, [ASK, only(THOUGHT, "text")]) == SAID + "<|im_end|>"
        assert trained_text(made, [ASK, only(THOUGHT, "thinking")]) == think
        both = CALL.model_copy(update={"reasoning": "Look."})  # thinking, then a call with no text between
        assert trained_text(made, [ASK, only(both, "calls"), RESULT, silent], TOOLS).startswith("<tool_call>")
        assert trained_text(made, [ASK, only(both, "thinking"), RESULT, silent], TOOLS).endswith("</think>" + "\n\n" * (kind == "qwen3"))


def test_a_text_that_quotes_markup_moves_no_part():
    quoted = BESIDE.model_copy(update={"content": 'Not a call: {"name": "query_budget", "arguments": {}} assistant\n'})
    found = trained_text(template("chatml"), [ASK, only(quoted, "text"), RESULT, ANSWER.model_copy(update={"train": False})], TOOLS)
    assert found == quoted.content
    twice = Message(role="assistant", tool_calls=(TWO_CALLS.tool_calls[0], TWO_CALLS.tool_calls[0]))  # equal calls are two
    results = [RESULT.model_copy(update={"tool_call_id": None}), RESULT.model_copy(update={"tool_call_id": None})]
    row = template("qwen3").supervise([ASK, only(twice, "arguments"), *results, ANSWER], TOOLS)
    assert sum(row.mask[at] and not row.mask[at - 1] for at in range(1, len(row.mask))) == 3  # two calls, and the answer


def test_parts_of_letters_that_are_several_tokens():
    odd = Message(role="assistant", content="日本é", reasoning="ß日")
    assert trained_text(template("chatml"), [ASK, only(odd, "text")]) == "日本é<|im_end|>"


def test_parts_that_are_not_there_or_not_shown_are_refused():
    with pytest.raises(TemplateError, match="trains only its arguments, and has none") as caught:
        template("chatml").supervise([ASK, only(ANSWER, "arguments")])
    assert "text" in caught.value.why
    with pytest.raises(ValidationError):
        Message(role="assistant", content="x", train=())
    with pytest.raises(ValidationError):
        Message(role="assistant", content="x", train=("prose",))
    shouting = with_text(template("qwen3").text.replace("message.content", "(message.content | upper)"))
    with pytest.raises(TemplateError):
        shouting.supervise([ASK, only(ANSWER, "text")])


def test_parts_survive_a_file_and_are_counted():
    made = record(SYSTEM, ASK, only(ANSWER, "text"), AGAIN, ANSWER)
    again = Record.model_validate_json(made.model_dump_json())
    assert again.messages[2].train == ("text",)
    assert again.id == made.id != record(SYSTEM, ASK, ANSWER, AGAIN, ANSWER).id
    rows = [to_sequence(record(ASK, BESIDE, RESULT, ANSWER, tools=TOOLS), template("chatml"), 512), to_sequence(record(ASK, only(BESIDE, "arguments"), RESULT, ANSWER, tools=TOOLS), template("chatml"), 512)]  # fmt: skip
    found = counts(rows)
    assert found.supervised == sum(row.supervised for row in rows)
    assert found.fewest_supervised == rows[1].supervised < rows[0].supervised


# --- what model libraries got wrong ---


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "chatml", "llama"])
def test_every_cut_of_a_tool_row_keeps_mask_and_tokens_aligned(kind):
    """TRL #5144, #4976: a mask longer than its tokens, and a cut that was not made in the mask."""
    made = record(SYSTEM, ASK, CALL, RESULT, ANSWER, tools=TOOLS)
    whole = template(kind).supervise(made.messages, TOOLS)
    first = whole.mask.index(True)
    for length in range(first + 1, len(whole.tokens) + 1):
        row = to_sequence(made, template(kind), length)
        assert row.tokens == whole.tokens[:length]
        assert [weight != 0 for weight in row.weights] == whole.mask[:length]
    results = [token for token, owner in zip(whole.tokens, whole.message_of, strict=True) if owner == -1]
    assert "120000" in template(kind).tokenizer.decode(results)  # TRL #4975: a result is context, never trained


def test_generation_markers_do_not_decide_the_mask():
    """transformers gives a mask of zeros for a template without {% generation %}; here it changes nothing."""
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content + '<|im_end|>' }}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    marked = plain.replace("{{ m.content + '<|im_end|>' }}", "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}")  # fmt: skip
    assert marked != plain
    assert with_text(marked).supervise([ASK, ANSWER]) == with_text(plain).supervise([ASK, ANSWER])
    assert sum(with_text(plain).supervise([ASK, ANSWER]).mask) > 5


@pytest.mark.parametrize("kind", ["qwen3", "chatml", "mistral", "llama"])
def test_no_separator_is_lost_over_several_tool_hops(kind):
    """verl #6921: a line end went missing with each hop. Sampled turns joined by `append` are the whole rendering."""
    made = template(kind)
    hops = [CALL.model_copy(update={"tool_calls": (ToolCall(name="calculator", arguments={"expression": f"{n} + {n}"}, id=f"call_100{n}"),)}) for n in (1, 2, 3)]  # fmt: skip
    results = [SECOND_RESULT.model_copy(update={"tool_call_id": f"call_100{n}", "content": f'{{"result": {2 * n}}}'}) for n in (1, 2, 3)]
    messages: list[Message] = [SYSTEM, ASK]
    episode = made.prompt_ids(messages, TOOLS)
    for call, result in zip(hops, results, strict=True):
        row = made.supervise([*messages, call, result, ANSWER], TOOLS)
        episode += [token for token, owner in zip(row.tokens, row.message_of, strict=True) if owner == len(messages)]
        episode = made.append(episode, [result], TOOLS)
        messages += [call, result]
        assert episode == made.prompt_ids(messages, TOOLS) == peer(made, messages, TOOLS, generation=True)[1]


def test_the_terminator_of_every_family_is_trained_once_a_turn():
    """axolotl #3754 (Gemma's was never trained), TRL #1623 (pad equal to end masked the real one)."""
    for kind in KINDS:
        row = template(kind).supervise([ASK, ANSWER, AGAIN, ANSWER])
        ends = [at for at, token in enumerate(row.tokens) if token in template(kind).traits.end_ids and row.message_of[at] >= 0]
        assert len(ends) == 2
        assert all(row.mask[at] for at in ends)


# --- reading token by token ---


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_hub"])
def test_what_a_reader_gives_is_never_taken_back(kind):
    """Whatever is sampled, at every token the pieces so far are the start of the parsed thinking and content."""
    made, rng = template(kind), random.Random(0)
    pool = ["<think>", "</think>", "\n", "\n\n", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"x": 1}}', "Hello", " ", "é日本", "[TOOL_CALLS]"]
    for _ in range(150):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 14)):
            ids += [rng.randrange(len(made.tokenizer))] if rng.random() < 0.3 else made.tokenizer(rng.choice(pool), add_special_tokens=False).input_ids
        for calls, stops in ((True, ()), (False, ()), (False, ("lo", "H", "\n\n"))):
            reader, thinking, text = made.reader(calls=calls, stops=stops), "", ""
            for at, token in enumerate(ids):
                piece = reader.read(token)
                thinking, text = thinking + piece.thinking, text + piece.text
                parsed = made.parse(ids[: at + 1], calls=calls)
                content = parsed.content[: min((place for stop in stops if (place := parsed.content.find(stop)) >= 0), default=None)]
                assert (parsed.reasoning or "").startswith(thinking)
                assert content.startswith(text)


def test_a_reader_keeps_little_back():
    made = template("qwen3")
    row = made.supervise([ASK, THOUGHT.model_copy(update={"content": "Well then: 120000."})])
    reader = made.reader()
    pieces = [reader.read(token) for token, owner in zip(row.tokens, row.message_of, strict=True) if owner == 1]
    assert "".join(piece.thinking for piece in pieces) == "A lookup.\nEasy."
    assert "".join(piece.text for piece in pieces) == "Well then: 120000."
    assert sum(bool(piece.text) for piece in pieces) > 3  # as it is said, not at the end


# --- the card ---


@pytest.mark.parametrize("name", GOLDEN)
def test_a_template_that_rewrites_history_is_pinned_too(name):
    """Qwen3's own: nothing before the last question is trained, and the tokens are transformers'."""
    known = json.loads((HERE / "golden.json").read_text())["qwen3_hub"][name]
    found = pinned(template("qwen3_hub"), GOLDEN[name])
    assert (found.text, list(found.ids)) == (known["text"], known["ids"]) == peer(template("qwen3_hub"), *GOLDEN[name])
    assert sum(found.trained) > 0


def test_a_card_holds_the_template_as_data(tmp_path):
    write_card(template("llama").tokenizer, tmp_path)
    kept = read_card(tmp_path)
    assert kept == card(template("llama"))
    assert kept.text == template("llama").text
    assert kept.special_tokens["eos_token"] == "<|eot_id|>"
    assert set(kept.golden) == set(GOLDEN)
    messages, tools = GOLDEN["tool call"]
    assert list(kept.golden["tool call"].ids) == template("llama").supervise(messages, tools).tokens
    assert sum(kept.golden["tool call"].trained) > 0
    assert "single tool-calls" in template("llama").traits.faults["parallel calls"]
    assert kept.golden["parallel calls"].refused
    require_card(template("llama").tokenizer, tmp_path)


def test_a_template_that_is_not_the_pinned_one_is_refused(tmp_path):
    write_card(template("qwen3").tokenizer, tmp_path)
    with pytest.raises(TemplateError, match="is not the one that its weights were trained with") as caught:
        require_card(template("qwen3_hub").tokenizer, tmp_path)
    assert "the text differs" in caught.value.why
    other = tiny_tokenizer("qwen3")
    other.add_tokens(["<extra>"])
    with pytest.raises(TemplateError, match="trained with") as caught:
        require_card(other, tmp_path)
    assert "the tokenizer differs" in caught.value.why


def test_equal_files_that_no_longer_render_as_they_did_are_refused(tmp_path):
    """What another version of a library could do: same fingerprint, other tokens."""
    write_card(template("qwen3").tokenizer, tmp_path)
    described = json.loads((tmp_path / PIN).read_text())
    described["golden"]["single turn"]["ids"][-2] += 1
    (tmp_path / PIN).write_text(json.dumps(described))
    with pytest.raises(TemplateError, match="no longer renders the golden conversation 'single turn'") as caught:
        require_card(template("qwen3").tokenizer, tmp_path)
    assert "<|im_end|>" in caught.value.why  # the first tokens that differ are shown
    (tmp_path / PIN).write_text("{}")
    with pytest.raises(TemplateError, match="is no template card"):
        require_card(template("qwen3").tokenizer, tmp_path)
    require_card(template("qwen3").tokenizer, tmp_path / "elsewhere")  # another program's folder has none


def test_what_a_refusal_says_may_change_but_not_that_it_is_one(tmp_path):
    """Another version of temper, or of the template's own words, may put a refusal otherwise: the folder is still a good one."""
    write_card(template("llama").tokenizer, tmp_path)
    described = json.loads((tmp_path / PIN).read_text())
    described["golden"]["parallel calls"]["refused"] = "the same, in other words"
    (tmp_path / PIN).write_text(json.dumps(described))
    require_card(template("llama").tokenizer, tmp_path)
    described["golden"]["single turn"] = {"refused": "it was refused"}
    (tmp_path / PIN).write_text(json.dumps(described))
    with pytest.raises(TemplateError, match="'single turn'"):
        require_card(template("llama").tokenizer, tmp_path)


def test_a_tokenizer_without_template_leaves_no_card(tmp_path):
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = None
    write_card(tokenizer, tmp_path)
    assert read_card(tmp_path) is None
    with pytest.raises(TemplateError):
        Template.of(tokenizer)
