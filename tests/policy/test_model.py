from __future__ import annotations

import pytest
import torch
from policy_doubles import CONFIGS, SIZES, make_batch, stock_logprobs, tiny_checkpoint, tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM

from temper.core.errors import DataError, DeviceError, IntegrityError, ShapeError
from temper.core.storage import whole_folder
from temper.policy.losses import sft_cross_entropy
from temper.policy.model import Policy

LENGTHS = [19, 5, 12, 2]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_logprobs_and_entropy_equal_those_of_the_full_logits(family, temperature):
    policy, batch = tiny_policy(family), make_batch(LENGTHS)
    scores = policy.token_logprobs(batch, temperature=temperature, entropy=True)
    logprobs_B_T, entropy_B_T = stock_logprobs(policy, batch, temperature)
    torch.testing.assert_close(scores.logprobs_B_T.double(), logprobs_B_T.where(batch.mask_B_T, 0.0), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy_B_T.double(), entropy_B_T.where(batch.mask_B_T, 0.0), atol=2e-5, rtol=1e-5)
    assert scores.logprobs_B_T.dtype is torch.float32


@pytest.mark.parametrize("family", CONFIGS)
def test_fused_cross_entropy_gives_the_loss_and_gradients_of_the_plain_one(family):
    policy, batch = tiny_policy(family), make_batch(LENGTHS)
    batch.weights_B_T *= torch.linspace(0.5, 2.0, 4)[:, None]

    def gradients(total):
        policy.model.zero_grad()
        (total / 7).backward()
        return {name: weight.grad.clone() for name, weight in policy.model.named_parameters()}

    fused = policy.cross_entropy(batch, z_loss=0.01)
    found = gradients(fused.total)
    scores = policy.token_logprobs(batch)
    plain = sft_cross_entropy(scores.logprobs_B_T, batch.weights_B_T, batch.mask_B_T, logz_B_T=scores.logz_B_T, z_loss=0.01)
    torch.testing.assert_close(fused.total, plain.total)
    logprobs_B_T, _ = stock_logprobs(policy, batch)
    expected_nll = -logprobs_B_T.where(batch.mask_B_T, 0.0).sum().float()
    torch.testing.assert_close(fused.sums["nll"], expected_nll, rtol=1e-5, atol=1e-4)
    for name, expected in gradients(plain.total).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-9, msg=name)


def test_padding_width_and_garbage_in_the_padding_change_nothing():
    policy = tiny_policy()
    narrow, wide = make_batch(LENGTHS), make_batch(LENGTHS, width=40)
    wide.tokens_B_T[~wide.attention_B_T] = 37
    narrow_B_T, wide_B_T = policy.token_logprobs(narrow).logprobs_B_T, policy.token_logprobs(wide).logprobs_B_T
    torch.testing.assert_close(wide_B_T[:, :19], narrow_B_T, atol=1e-5, rtol=1e-5)
    assert (wide_B_T[:, 19:] == 0).all()


def test_left_padded_rows_score_like_right_padded_ones():
    policy, batch = tiny_policy("llama"), make_batch([9, 4])
    expected = policy.token_logprobs(batch).logprobs_B_T
    for stream in ("tokens_B_T", "weights_B_T", "attention_B_T", "positions_B_T", "mask_B_T"):
        getattr(batch, stream)[1] = getattr(batch, stream)[1].roll(5)
    torch.testing.assert_close(policy.token_logprobs(batch).logprobs_B_T[1].roll(-5), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_rows_packed_into_one_do_not_see_each_other(family):
    policy, apart = tiny_policy(family), make_batch([9, 6])
    packed = make_batch([15])
    for stream in ("tokens_B_T", "weights_B_T", "positions_B_T", "mask_B_T"):
        parts = getattr(apart, stream)
        setattr(packed, stream, torch.cat([parts[0, :9], parts[1, :6]])[None])
    expected = policy.token_logprobs(apart).logprobs_B_T
    found = policy.token_logprobs(packed).logprobs_B_T[0]
    torch.testing.assert_close(found, torch.cat([expected[0, :9], expected[1, :6]]), atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_batch_is_the_sum_of_its_halves():
    policy, batch = tiny_policy(), make_batch([7, 7, 7, 7])
    policy.cross_entropy(batch).total.backward()
    whole = {name: weight.grad.clone() for name, weight in policy.model.named_parameters()}
    policy.model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        half = make_batch([7, 7])
        for stream in ("tokens_B_T", "weights_B_T", "mask_B_T"):
            setattr(half, stream, getattr(batch, stream)[rows])
        policy.cross_entropy(half).total.backward()
    for name, weight in policy.model.named_parameters():
        torch.testing.assert_close(weight.grad, whole[name], rtol=1e-4, atol=1e-5)


def test_same_inputs_same_bytes():
    policy, batch = tiny_policy(compute_dtype=torch.bfloat16), make_batch(LENGTHS)
    runs = []
    for _ in range(2):
        policy.model.zero_grad()
        policy.cross_entropy(batch).total.backward()
        runs.append([weight.grad.clone() for weight in policy.model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_bfloat16_scores_stay_close_to_float32_and_master_weights_stay_float32():
    policy, batch = tiny_policy(), make_batch(LENGTHS)
    exact = policy.token_logprobs(batch).logprobs_B_T
    policy.compute_dtype = torch.bfloat16
    rounded = policy.token_logprobs(batch).logprobs_B_T
    assert rounded.dtype is torch.float32
    assert 0 < float((rounded - exact).detach().abs().max()) < 0.5
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_policy_is_a_plain_checkpoint_and_loads_with_the_same_hash(tmp_path, family):
    folder = tiny_checkpoint(tmp_path / "model", family)
    policy, plain = Policy.load(folder, precision="float32"), AutoModelForCausalLM.from_pretrained(folder)
    tokens_B_T = make_batch(LENGTHS).tokens_B_T
    torch.testing.assert_close(plain(tokens_B_T).logits, policy.model(tokens_B_T).logits)
    assert policy.weights_hash() == tiny_policy(family).weights_hash()
    assert AutoTokenizer.from_pretrained(folder).chat_template == policy.tokenizer.chat_template
    assert not policy.model.training


def test_save_fills_the_scratch_of_a_whole_folder_and_is_whole_by_itself(tmp_path):
    policy = tiny_policy()
    with whole_folder(tmp_path / "run" / "model") as scratch:
        policy.save(scratch)
    policy.save(tmp_path / "alone")
    policy.save(tmp_path / "alone")
    for folder in (tmp_path / "run" / "model", tmp_path / "alone"):
        assert Policy.load(folder).weights_hash() == policy.weights_hash()


def test_changed_weights_are_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match=r"model\.safetensors differs"):
        Policy.load(folder)
    (folder / "FILES.json").unlink()
    with pytest.raises(IntegrityError, match="are not the ones that were saved"):
        Policy.load(folder)
    assert Policy.load(folder, verify=False).weights_hash() != tiny_policy().weights_hash()


def test_a_checkpoint_without_hashes_is_accepted_and_one_without_weights_is_not(tmp_path):
    folder = tiny_checkpoint(tmp_path / "plain")
    for name in ("FILES.json", "temper.json"):
        (folder / name).unlink()
    assert Policy.load(folder).weights_hash() == tiny_policy().weights_hash()
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="not a checkpoint that transformers can load"):
        Policy.load(folder)
    with pytest.raises(DataError, match="give a folder"):
        Policy.load(tmp_path / "absent")


def test_a_missing_gpu_and_an_unknown_device_are_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="there is no GPU here"):
            Policy.load(folder, device="cuda")
    with pytest.raises(DeviceError, match="there is no device 'abacus'"):
        Policy.load(folder, device="abacus")


def test_a_model_with_scaled_logits_is_refused_rather_than_scored_wrongly():
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    with pytest.raises(ShapeError, match="in a way temper does not know"):
        Policy(CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.0625)), tiny_tokenizer())


def test_a_supervised_first_position_is_refused():
    batch = make_batch([4])
    batch.mask_B_T[0, 0] = True
    with pytest.raises(ShapeError, match="first position"):
        tiny_policy().token_logprobs(batch)


def test_a_reference_keeps_what_the_policy_was():
    policy, batch = tiny_policy(), make_batch(LENGTHS)
    policy.version = 3
    reference, before = policy.clone_reference(), policy.token_logprobs(batch).logprobs_B_T
    assert reference.version == 0  # it stands still, however often the policy moved before
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.1)
    assert torch.equal(reference.token_logprobs(batch).logprobs_B_T, before)
    assert not reference.trainable_parameters()
    assert policy.trainable_parameters()
