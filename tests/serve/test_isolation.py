"""The real engine behind the real server: no request of a mixed crowd is answered through another tenant's adapter."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from serve_double import verdict_on

from temper.core.storage import folder_hash
from temper.policy.adapters import LoraConfig
from temper.policy.model import Policy
from temper.registry import Registry, artifact_hash_of
from temper.serve import create_app, serving
from temper.serve.audit import read_lines

sys.path.insert(0, str(Path(__file__).parents[2]))
from temper.serve.routing import route
from tests.checkpoints import tiny_checkpoint

TENANTS = ("bank_a", "retail_b", "saas_c")
JSON = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"], "additionalProperties": False}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_balance",
        "parameters": {
            "type": "object",
            "properties": {"account": {"type": "string", "maxLength": 6}},
            "required": ["account"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A release of a tiny random model whose three adapters change what it says."""
    root = tmp_path_factory.mktemp("house")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the adapters' own start is drawn too: others could say the same on a prompt
    policy = Policy.load(tiny_checkpoint("qwen3", root / "plain"), precision="float32", device="cpu")
    policy.save(root / "base")
    adapters = {}
    for number, tenant in enumerate(TENANTS):
        policy.add_lora(tenant, LoraConfig(rank=4, alpha=8))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, weight in policy.model.named_parameters():
                if f".{tenant}." in name and name.endswith("B"):
                    weight.copy_(torch.randn(weight.shape, generator=generator))
        adapters[tenant] = root / f"adapter-{tenant}"
        policy.save_adapter(tenant, adapters[tenant])
    made = Registry(root / "registry")
    release = made.register(
        model_id="finops", base_model_id="tiny", weights=root / "base", adapters=adapters,
        verdict=verdict_on(artifact_hash_of(root / "base", adapters)), template_fingerprint=policy.template.fingerprint,
    )  # fmt: skip
    made.promote(release.id, reason="test")
    assert release.adapters == {tenant: folder_hash(path) for tenant, path in adapters.items()}
    return made


def test_of_200_mixed_requests_none_is_answered_through_another_tenants_adapter(registry, tmp_path):
    found = route(registry, "production", total=200, unique=48, clients=16, max_tokens=12, scratch=tmp_path)
    assert found["requests"] == 200
    assert found["rows_per_batch"] > 2  # the batches were mixed, or nothing was tested
    assert found["requests_where_tenants_differ"] == 200  # and the adapters can be told apart by what they say
    assert found["audit_names_another_adapter"] == 0
    assert found["answers_equal_to_another_tenants"] == 0
    assert found["answers_not_as_alone"] == 0


def test_the_proof_finds_rows_that_go_through_a_neighbours_adapter(registry, tmp_path, monkeypatch):
    """An engine that routed each row as its neighbour would be found out by the comparison with each adapter alone."""
    real = Policy.use
    monkeypatch.setattr(Policy, "use", lambda self, names: real(self, [names[-1], *names[:-1]]))
    found = route(registry, "production", total=24, unique=24, clients=12, max_tokens=12, scratch=tmp_path)
    assert found["answers_equal_to_another_tenants"] > 0
    assert found["answers_not_as_alone"] > 0


def test_json_and_tool_calls_are_valid_even_from_a_random_model(registry, tmp_path):
    import json

    app = create_app(registry, audit=tmp_path / "audit.jsonl", precision="float32", max_rows=8)
    with serving(app) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as ai, ThreadPoolExecutor(6) as pool:

        def ask(number):
            shape = (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": JSON}}}
                if number % 2
                else {"tools": [TOOL]}
            )
            model, messages = f"finops@{TENANTS[number % 3]}", [{"role": "user", "content": "balance?"}]
            return ai.chat.completions.create(model=model, messages=messages, seed=number, max_tokens=48, **shape).choices[0]

        answers = list(pool.map(ask, range(12)))
    finished = [answer for number, answer in enumerate(answers) if number % 2 and answer.finish_reason == "stop"]
    assert all(list(json.loads(answer.message.content)) == ["total"] for answer in finished)
    for answer in answers[::2]:
        for call in answer.message.tool_calls or ():
            assert call.function.name == "get_balance"
    valid = [line["schema_valid"] for line in read_lines(tmp_path / "audit.jsonl")]
    assert False not in valid


def test_a_stream_of_the_real_engine_says_what_the_whole_answer_says(registry, tmp_path):
    app = create_app(registry, audit=tmp_path / "audit.jsonl", precision="float32", max_rows=8)
    with serving(app) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as ai:
        for number in range(12):
            asked = {
                "model": f"finops@{TENANTS[number % 3]}", "messages": [{"role": "user", "content": "balance?"}], "seed": number, "max_tokens": 40,
                "temperature": 1.0 + number / 12, **({"tools": [TOOL]} if number % 4 == 3 else {"stop": ["e", "qu"]} if number % 4 == 2 else {}),
            }  # fmt: skip
            whole = ai.chat.completions.create(**asked).choices[0]
            chunks = [chunk.choices[0] for chunk in ai.chat.completions.create(**asked, stream=True)]
            assert "".join(chunk.delta.content or "" for chunk in chunks) == (whole.message.content or "")
            assert chunks[-1].finish_reason == whole.finish_reason
            calls = [call.function for chunk in chunks for call in chunk.delta.tool_calls or ()]
            assert [(call.name, call.arguments) for call in calls] == [
                (call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()
            ]
