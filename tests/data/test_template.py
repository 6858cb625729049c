"""The contract: tokens equal transformers', masks come from structure, prompts are prefixes, nothing is lost unseen."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from temper.core.errors import DataError, TemplateError
from temper.core.records import Message, ToolCall
from temper.data.template import Template
from tests.checkpoints import FAMILIES, tiny_checkpoint, tiny_tokenizer
from tests.data.conversations import (
    AGAIN,
    ANSWER,
    ASK,
    CALL,
    CASES,
    GOLDEN,
    HERE,
    KINDS,
    LACKING,
    RESULT,
    SECOND_RESULT,
    SYSTEM,
    TOOLS,
    TWO_CALLS,
    peer,
    template,
    trained_text,
    with_text,
)

PINNED = json.loads((HERE / "golden.json").read_text())
WITH_TOOLS = [kind for kind in KINDS if kind != "gemma"]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_golden_conversations_are_pinned_and_equal_to_transformers(kind, name):
    messages, tools = GOLDEN[name]
    text, ids = peer(template(kind), messages, tools)
    assert template(kind).supervise(messages, tools).tokens == ids
    assert template(kind).render(messages, tools) == text
    assert PINNED[kind][name] == {"text": text, "ids": ids}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in LACKING for name in sorted(LACKING[kind])])
def test_what_a_template_would_lose_is_refused(kind, name):
    messages, tools = GOLDEN[name]
    with pytest.raises(TemplateError, match=r"drops a part of|has no|refuses a conversation"):
        template(kind).supervise(messages, tools)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_prompt_is_the_training_prefix(kind, name):
    """The prompt of each assistant turn, as the engine is fed it, is what stands before that turn in training."""
    messages, tools = GOLDEN[name]
    found = template(kind).supervise(messages, tools)
    for number, message in enumerate(messages):
        if message.role == "assistant":
            prompt = template(kind).prompt_ids(messages[:number], tools)
            assert prompt == peer(template(kind), messages[:number], tools, generation=True)[1]
            assert found.tokens[: len(prompt)] == prompt
            assert found.message_of.index(number) == len(prompt)
            assert found.mask[len(prompt)]
            assert not found.mask[len(prompt) - 1]


def test_the_mask_holds_answers_calls_and_end_tokens_only():
    messages, tools = GOLDEN["tool call"]
    call = '{"department": "Marketing", "quarter": "Q3"}'
    said = "The Marketing budget for Q3 is 120000."
    expected = {
        "llama": f'{{"name": "query_budget", "parameters": {call}}}<|eot_id|>{said}<|eot_id|>',
        "qwen3": f'<tool_call>\n{{"name": "query_budget", "arguments": {call}}}\n</tool_call><|im_end|>{said}<|im_end|>',
        "mistral": f'[TOOL_CALLS] [{{"name": "query_budget", "arguments": {call}, "id": "76c75faa4"}}]</s> {said}</s>',  # nine letters of SHA-256("call_0001")
        "chatml": f'<tool_call>{{"name": "query_budget", "arguments": {call}}}</tool_call><|im_end|>{said}<|im_end|>',
    }
    for kind, text in expected.items():
        assert trained_text(template(kind), messages, tools) == text
    assert trained_text(template("gemma"), [ASK, ANSWER]) == f"{said}<end_of_turn>"


def test_a_message_can_be_left_out_of_training():
    silent = ANSWER.model_copy(update={"train": False})
    made = template("chatml")
    assert trained_text(made, [ASK, silent, AGAIN, ANSWER]) == "The Marketing budget for Q3 is 120000.<|im_end|>"
    assert made.supervise([ASK, silent, AGAIN, ANSWER]).tokens == made.supervise([ASK, ANSWER, AGAIN, ANSWER]).tokens


def test_a_marker_inside_a_text_does_not_move_the_mask():
    """Text that looks like the markup of another family, or quotes a role header, is text."""
    quoted = Message(role="user", content="Write: assistant\nThe answer is [/INST] <start_of_turn>model\nYes.")
    assert trained_text(template("chatml"), [quoted, ANSWER]) == "The Marketing budget for Q3 is 120000.<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_as_text_are_refused(kind):
    end = next(iter(template(kind)._ends()))
    for messages in ([Message(role="user", content=f"hi{end}"), ANSWER], [ASK, Message(role="assistant", content=f"a{end}b")]):
        with pytest.raises(TemplateError, match="control token"):
            template(kind).supervise(messages)
    with pytest.raises(TemplateError, match="control token"):
        template(kind).prompt_ids([Message(role="user", content=f"{end}\n")])


@pytest.mark.parametrize("kind", WITH_TOOLS)
def test_append_equals_the_full_rendering(kind):
    made = template(kind)
    conversation, tools = GOLDEN["tool call"]
    found = made.supervise(conversation, tools)
    call_ids = [token for token, owner in zip(found.tokens, found.message_of, strict=True) if owner == 2]
    episode = made.prompt_ids(conversation[:2], tools) + call_ids
    assert made.append(episode, [conversation[3]], tools) == made.prompt_ids(conversation[:4], tools)


def test_append_takes_parallel_results_and_new_questions():
    made = template("qwen3")
    found = made.supervise([ASK, TWO_CALLS], TOOLS)
    end = len(found.tokens) - found.mask[::-1].index(True)
    whole = made.prompt_ids([ASK, TWO_CALLS, RESULT, SECOND_RESULT], TOOLS)
    assert made.append(found.tokens[:end], [RESULT, SECOND_RESULT], TOOLS) == whole
    found = made.supervise([ASK, ANSWER])
    end = len(found.tokens) - found.mask[::-1].index(True)
    assert made.append(found.tokens[:end], [AGAIN]) == made.prompt_ids([ASK, ANSWER, AGAIN])


@pytest.mark.parametrize("kind", WITH_TOOLS)
def test_append_never_changes_what_was_sampled(kind):
    """A sampled turn in tokens that the tokenizer would not choose stays so; a turn cut short gets its end token as context."""
    made = template(kind)
    prompt = made.prompt_ids([ASK], TOOLS)
    odd = [token for letter in "Hello" for token in made.tokenizer(letter, add_special_tokens=False).input_ids]
    end = min(made.traits.end_ids)
    finished, cut = made.append([*prompt, *odd, end], [RESULT], TOOLS), made.append([*prompt, *odd], [RESULT], TOOLS)
    assert finished[: len(prompt) + len(odd) + 1] == [*prompt, *odd, end]
    assert cut == finished
    with pytest.raises(DataError, match="never encoded again"):
        made.append(prompt, [ANSWER])


@pytest.mark.parametrize("kind", ["chatml", "qwen3"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_prompts_are_prefixes_for_any_text(kind, data):
    """Whatever the texts hold (line ends, spaces, other scripts), a prompt's tokens are those of the whole row before the turn."""
    made = template(kind)
    words = st.text(alphabet=st.sampled_from("ab \n\t.1é日{\"'<|>"), max_size=12)
    messages = [Message(role=role, content=data.draw(words)) for role in ("user", "assistant", "user", "assistant")]
    found = made.supervise(messages)
    for number in (1, 3):
        prompt = made.prompt_ids(messages[:number])
        assert found.tokens[: len(prompt)] == prompt
    assert made.tokenizer.decode(found.tokens, skip_special_tokens=False) == made.render(messages)
    end = len(found.tokens) - found.message_of[::-1].index(1)
    assert made.append(found.tokens[:end], [messages[2]]) == made.prompt_ids(messages[:3])


def test_a_tokenizer_that_merges_across_the_prompt_is_cut_there():
    """GPT-2's pre-tokeniser splits the line ends before a letter; the prompt alone ends in one token, so training has it too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<e>", "<p>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=300, show_progress=False
    )
    inner.train_from_iterator(["a\n\n", "b\n\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", pad_token="<p>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + '\n\n' + m.content + '<e>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n\n' }}{% endif %}"
    made = Template.of(tokenizer)
    question = [Message(role="user", content="q")]
    found, prompt = made.supervise([*question, Message(role="assistant", content="yes")]), made.prompt_ids(question)
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "ĊĊ"
    assert tokenizer.convert_ids_to_tokens(tokenizer("assistant\n\nyes").input_ids)[-5:-3] == ["Ċ", "Ċ"]
    assert found.tokens[: len(prompt)] == prompt
    assert tokenizer.decode(found.tokens) == made.render([*question, Message(role="assistant", content="yes")])


# --- the contract ---


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_hub"])
def test_families_keep_the_contract(kind):
    template(kind).require(tools=kind != "gemma")
    by_rule = {line.rule: line.status for line in template(kind).check()}
    assert by_rule["history is kept"] == ("unknown" if kind in ("mistral", "qwen3_hub") else "pass")
    assert by_rule["system role"] == ("unknown" if kind == "gemma" else "pass")


def test_a_template_without_tools_is_refused_where_tools_are_needed():
    with pytest.raises(TemplateError, match="tools, tool calls, tool results, call syntax"):
        template("gemma").require(tools=True)


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
BROKEN = {
    "turns only append": "{{ messages | length }} messages\n" + CHATML + PROMPT,
    "generation prompt": CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>answer\n' }}{% endif %}",
    "end token": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "tool calls": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML + PROMPT,
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_template_is_refused_by_name(rule):
    made = with_text(BROKEN[rule])
    assert rule in [line.rule for line in made.check() if line.status == "fail"]
    with pytest.raises(TemplateError, match=rule) as caught:
        made.require()
    assert caught.value.do


def test_calls_that_cannot_be_read_back_are_trained_but_not_sampled():
    made = with_text(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}call {{ c.function.name }} with {{ c.function.arguments.values() | list }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
    )
    made.require()
    assert "call query_budget with ['Marketing', 'Q3']<|im_end|>" in trained_text(made, *GOLDEN["tool call"])
    with pytest.raises(TemplateError, match="call syntax"):
        made.require(tools=True)
    with pytest.raises(TemplateError, match="cannot be read back"):
        made.prompt_ids([ASK], TOOLS)


def test_a_pad_token_that_ends_turns_is_refused():
    made = with_text(template("qwen3").text, pad_token="<|im_end|>")
    with pytest.raises(TemplateError, match="padding"):
        made.require()
    # <|endoftext|> as pad and as the base's end token is harmless: turns end with <|im_end|>
    with_text(template("qwen3").text, eos_token="<|endoftext|>").require()
    assert with_text(template("qwen3").text, eos_token="<|endoftext|>").stop_ids == {0, 2}


def test_a_tokenizer_without_pad_token_gets_one_that_ends_no_turn():
    tokenizer = tiny_tokenizer("llama")
    tokenizer.pad_token = None
    made = Template.of(tokenizer)
    assert made.pad_id == tokenizer.bos_token_id
    made.require()


def test_no_template_bad_jinja_and_unknown_features_are_told():
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        Template.of(tokenizer)
    with pytest.raises(TemplateError, match=r"not valid Jinja \(line 1\)"):
        with_text("{% for m in messages %}")
    with pytest.raises(TemplateError, match="has no system role") as caught:
        template("gemma").supervise([SYSTEM, ASK, ANSWER])
    assert "System role not supported" in caught.value.why
    assert "fold_system" in caught.value.do


def test_the_system_text_is_folded_only_where_configured(tmp_path):
    made = Template.of(tiny_tokenizer("gemma"), fold_system=True)
    both = Message(role="user", content=f"{SYSTEM.content}\n\n{ASK.content}")
    found = made.supervise([SYSTEM, ASK, ANSWER])
    assert found.tokens == template("gemma").supervise([both, ANSWER]).tokens
    assert set(found.message_of) == {-1, 2}  # the answer is message 2 of what was given
    made.tokenizer.save_pretrained(tmp_path)
    again = Template.of(AutoTokenizer.from_pretrained(tmp_path))
    assert again.fold_system
    assert again.fingerprint == made.fingerprint
    assert made.fingerprint != template("gemma").fingerprint


def test_a_template_that_rewrites_history_trains_the_last_question_only():
    """Qwen3's own template drops the thinking of earlier answers: training them would train what is never sampled."""
    made = template("qwen3_hub")
    thinking = ANSWER.model_copy(update={"reasoning": "Easy."})
    assert sampled("qwen3_hub", "<think>\n\n</think>\n\nNo.<|im_end|>") == Message(role="assistant", content="No.")
    with pytest.raises(TemplateError, match=r"otherwise once later turns follow|drops a part") as caught:
        made.supervise([ASK, thinking, AGAIN, ANSWER])
    assert "qwen3.jinja" in caught.value.do or "template" in caught.value.do
    with pytest.raises(TemplateError, match="assistant message 1 otherwise"):
        made.supervise([ASK, ANSWER, AGAIN, ANSWER])  # the empty think block of a last turn is gone from an earlier one
    silent = ANSWER.model_copy(update={"train": False})
    assert trained_text(made, [ASK, silent, AGAIN, thinking]) == f"<think>\nEasy.\n</think>\n\n{ANSWER.content}<|im_end|>"
    messages = [ASK, CALL.model_copy(update={"reasoning": "Look it up."}), RESULT, thinking]
    assert made.supervise(messages, TOOLS).tokens == peer(made, messages, TOOLS)[1]
    with pytest.raises(TemplateError, match="rewrites earlier turns once a new question follows"):
        made.append(made.prompt_ids([ASK]), [AGAIN])


def test_calls_are_read_back_under_an_empty_think_block():
    """Qwen3 marks a last turn without thinking by an empty block: that is no part of how a call is written."""
    found = sampled("qwen3_hub", '<think>\n\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>')
    assert found == Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={"x": 1}),))


def test_a_turn_may_close_with_two_tokens():
    """Command R7B writes <|END_RESPONSE|><|END_OF_TURN_TOKEN|>, in history too: the second is where sampling stops."""
    two = CHATML.replace("'<|im_end|>\n'", "('<|im_start|>' if m.role == 'assistant' else '') + '<|im_end|>\n'")
    made = with_text(two + PROMPT)
    assert made._ends() == ["<|im_end|>"]
    assert trained_text(made, [ASK, ANSWER]) == f"{ANSWER.content}<|im_start|><|im_end|>"


def test_the_end_token_is_the_one_that_history_keeps():
    """Phi 3.5 ends the conversation with a second token: a turn still stops at the first, and the second is not trained."""
    made = with_text(
        CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        eos_token="<|endoftext|>",
    )
    assert made._ends() == ["<|im_end|>"]
    assert trained_text(made, [ASK, ANSWER]) == f"{ANSWER.content}<|im_end|>"
    assert made.stop_ids == {0, 2}


def test_mistral_moves_its_tools_to_the_last_question():
    with pytest.raises(TemplateError, match="otherwise once later turns follow"):
        template("mistral").supervise([ASK, ANSWER, AGAIN, ANSWER], TOOLS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_survives_saving_and_sees_a_change(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / family)
    again = Template.of(AutoTokenizer.from_pretrained(folder))
    assert again.fingerprint == template(family).fingerprint
    again.tokenizer.add_tokens(["<extra>"])
    assert Template.of(again.tokenizer).fingerprint != again.fingerprint


def test_two_days_give_the_same_tokens():
    assert "26 Jul 2024" in template("llama").render([ASK, ANSWER])
    assert "clock" in [line.rule for line in template("llama").check()]


# --- reading a turn back ---


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_parse_is_the_inverse_of_rendering(kind, name):
    messages, tools = GOLDEN[name]
    made = template(kind)
    found = made.supervise(messages, tools)
    for number, message in enumerate(messages):
        if message.role == "assistant":
            parsed = made.parse([token for token, owner in zip(found.tokens, found.message_of, strict=True) if owner == number])
            assert (parsed.content, parsed.reasoning) == (message.content, message.reasoning)
            assert [(call.name, call.arguments) for call in parsed.tool_calls] == [
                (call.name, call.arguments) for call in message.tool_calls
            ]


def sampled(kind: str, text: str) -> Message:
    made = template(kind)
    return made.parse(made.tokenizer(text, add_special_tokens=False).input_ids)


def test_malformed_calls_stay_text():
    for text, name, arguments in [
        ('<tool_call>{"name": "calculator", "arguments": {"expression": 2 + }}</tool_call>', "calculator", '{"expression": 2 + }'),
        ('<tool_call>{"name": "calculator", "arguments": {"expr', "calculator", '{"expr'),
        ('<tool_call>{"name": "calculator", "arguments": [1]}</tool_call>', "calculator", "[1]"),
        ('<tool_call>{"name": "calculator"}</tool_call>', "calculator", ""),
        ("<tool_call>calculator(2)</tool_call>", "", "calculator(2)"),
        ('<tool_call>{"name": "calculator", "arguments": "{\\"a\\": 1}"}</tool_call>', "calculator", {"a": 1}),
    ]:
        assert sampled("chatml", text + "<|im_end|>").tool_calls == (ToolCall(name=name, arguments=arguments),)
    good, bad = '{"name": "a", "arguments": {}}', '{"name": "b", "arguments": {'
    found = sampled("chatml", f"Both:<tool_call>{good}</tool_call><tool_call>{bad}</tool_call>").tool_calls
    assert found == (ToolCall(name="a", arguments={}), ToolCall(name="b", arguments="{"))


def test_calls_of_other_families():
    assert sampled("llama", '{"name": "f", "parameters": {"x": 1}}<|eot_id|>').tool_calls == (ToolCall(name="f", arguments={"x": 1}),)
    assert sampled("llama", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}<|eom_id|>').tool_calls == (
        ToolCall(name="f", arguments={"x": 1}),
    )
    assert sampled("llama", '{"budget": 120}<|eot_id|>') == Message(role="assistant", content='{"budget": 120}')
    assert sampled("llama", '{"name": "f", "parameters": {oops<|eot_id|>').tool_calls == (ToolCall(name="f", arguments="{oops"),)
    listed = '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]</s>'
    assert sampled("mistral", listed).tool_calls == (
        ToolCall(name="f", arguments={"x": 1}, id="abcdefghi"),
        ToolCall(name="g", arguments={}),
    )


def test_thinking_that_never_closes_is_all_thinking():
    found = sampled("qwen3", "<think>\nWell, the budget")
    assert (found.content, found.reasoning) == ("", "Well, the budget")
    assert sampled("qwen3", "No <think> here.").reasoning is None
