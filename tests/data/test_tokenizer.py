"""The tokenizer of a small model of one's own."""

from __future__ import annotations

from transformers import AutoTokenizer

from temper.core.records import Message, ToolSpec
from temper.data.template import Template
from temper.data.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = ['{"name": "query_budget", "arguments": {"department": "Marketing", "quarter": "Q3"}}', "The Marketing budget is 120000."] * 20


def test_digits_stand_alone_and_names_are_the_same_in_text_and_json():
    tokenizer = train_tokenizer(TEXTS, 400)
    assert tokenizer.tokenize("120000") == ["1", "2", "0", "0", "0", "0"]
    assert "Marketing" in tokenizer.tokenize("The Marketing budget")
    assert "Marketing" in tokenizer.tokenize('{"department": "Marketing"}')
    assert '":Ġ"' in tokenizer.tokenize('{"department": "Marketing"}')  # punctuation merges


def test_special_tokens_are_distinct_and_turns_end_with_the_chat_stop():
    tokenizer = train_tokenizer(TEXTS, 400)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    made = Template.of(tokenizer)
    made.require(tools=True)
    assert made.stop_ids == {tokenizer.eos_token_id}


def test_any_text_comes_back_whole_also_after_saving(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("é 日本 \n\n\t x  ", "<tool_call>{}</tool_call>", "a's 12,5%"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert again(text).input_ids == tokenizer(text).input_ids
    assert Template.of(again).fingerprint == Template.of(tokenizer).fingerprint


def test_tools_are_signatures_one_a_line():
    made = Template.of(train_tokenizer(TEXTS, 400))
    properties = {
        "account": {"type": "string"},
        "quarter": {"type": "string", "enum": ["Q1", "Q2"]},
        "lines": {"type": "array", "items": {"type": "number"}},
        "note": {"type": ["string", "null"]},
    }
    tools = [
        ToolSpec(name="post", parameters={"type": "object", "properties": properties, "required": ["account", "quarter"]}),
        ToolSpec(name="ping", parameters={"type": "object"}),
    ]
    text = made.render([Message(role="system", content="Be brief."), Message(role="user", content="Hi")], tools, generation=True)
    assert text == (
        "<|im_start|>system\nBe brief.\nTools:\n"
        'post(account: str, quarter: "Q1"|"Q2", lines?: list[float], note?: any)\nping()<|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
