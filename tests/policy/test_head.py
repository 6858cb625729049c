"""The tiled head against whole logits: values, gradients by finite differences, supports, and what it keeps in memory."""

from __future__ import annotations

import math
import time

import pytest
import torch
from policy_doubles import make_batch, tiny_policy
from torch.autograd import gradcheck

from temper.core.errors import DataError, ShapeError
from temper.policy import head as head_module
from temper.policy import losses
from temper.policy.head import GRADIENTS, Head, by_autograd, cross_entropy, divergence, token_values
from temper.policy.support import Support
from temper.policy.tiles import TILE_LOGITS, TILE_ROWS, blocks, softmax_

ROWS, WIDTH, VOCAB = 37, 6, 11
ALLOWED = [None if row % 3 else (row % VOCAB, (row + 4) % VOCAB, (row + 5) % VOCAB) for row in range(ROWS)]
TARGETS = torch.arange(ROWS) % VOCAB


def setting(*, softcap=None, bias=True, grad=True):
    """Hidden states, a head of three tiles, as leaves that take gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, b = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)
        for shape in ((ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    return hidden, weight, b if bias else None, lambda h, w, b: Head(w, b, softcap, torch.float64, rows=16)


def whole(hidden, weight, bias, *, softcap=None, temperature=1.0, support=False):
    """(log-prob, entropy, log Z) by the definition, over whole rows of logits."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = (softcap * (logits / softcap).tanh() if softcap else logits) / temperature
    if support:
        allowed = torch.stack([torch.zeros(VOCAB).index_fill(0, torch.tensor(ids or range(VOCAB)), 1.0) for ids in ALLOWED]).bool()
        logits = logits.masked_fill(~allowed, -1e30)
    logp = logits.log_softmax(-1)
    return logp.gather(1, TARGETS[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1), logits.logsumexp(-1)


CASES = [{}, {"softcap": 2.0}, {"temperature": 0.5}, {"support": True}, {"softcap": 1.5, "temperature": 2.0, "support": True}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_whole_rows(case):
    hidden, weight, bias, make = setting(softcap=case.get("softcap"))
    support = Support.of(ALLOWED, TARGETS) if case.get("support") else None

    def tiled(hidden, weight, bias):
        return token_values(
            hidden, make(hidden, weight, bias), TARGETS, temperature=case.get("temperature", 1.0), entropy=True, support=support
        )

    mixed = torch.randn(3, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = tiled(hidden, weight, bias), whole(hidden, weight, bias, **case)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for chosen in ([0], [1], [2], [0, 1, 2]):  # each output alone, and together
        gradients = [
            torch.autograd.grad(sum((mixed[at] * values[at]).sum() for at in chosen), (hidden, weight, bias), retain_graph=True)
            for values in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_gradients_agree_with_finite_differences():
    hidden, weight, bias, make = setting(softcap=3.0)
    rows = slice(0, 5)
    assert gradcheck(
        lambda h, w, b: token_values(h[rows], make(h, w, b), TARGETS[rows], temperature=0.7, entropy=True)[:3], (hidden, weight, bias)
    )
    weights = torch.linspace(0.5, 2.0, 5).double()
    assert gradcheck(lambda h, w, b: cross_entropy(h[rows], make(h, w, b), TARGETS[rows], weights, z_loss=0.1)[0], (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_gives_the_same_gradient_to_what_is_below(frozen):
    hidden, weight, bias, make = setting()
    scale = torch.linspace(-1, 1, ROWS).double()
    head = make(hidden, weight.detach(), bias.detach()) if frozen else make(hidden, weight, bias)
    values = token_values(hidden, head, TARGETS)
    (found,) = torch.autograd.grad((values.logprobs_N * scale).sum(), hidden, retain_graph=True)
    (expected,) = torch.autograd.grad((whole(hidden, weight, bias)[0] * scale).sum(), hidden)
    torch.testing.assert_close(found, expected)
    (through_logz,) = torch.autograd.grad(values.logz_N.sum(), hidden)
    torch.testing.assert_close(through_logz, torch.autograd.grad(whole(hidden, weight, bias)[2].sum(), hidden)[0])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "measure", [losses.forward_kl, losses.reverse_kl, lambda s, t: losses.jsd(s, t, beta=0.3)], ids=["forward", "reverse", "jsd"]
)
def test_divergence_by_tiles_is_that_of_the_whole_rows(measure, softcap):
    hidden, weight, bias, make = setting(softcap=softcap)
    teacher = torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = torch.linspace(0, 2, ROWS).double()
    total, values = divergence(hidden, make(hidden, weight, bias), lambda rows: teacher[rows], weights, measure, temperature=1.7)
    logits = hidden @ weight.T + bias
    logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) / 1.7
    expected = (measure(logits.log_softmax(-1), (teacher / 1.7).log_softmax(-1)) * weights).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close((values * weights).sum(), expected.detach())
    for one, other in zip(*[torch.autograd.grad(3 * item, (hidden, weight, bias)) for item in (total, expected)], strict=True):
        torch.testing.assert_close(one, other)


def test_the_size_of_the_tile_changes_nothing_but_rounding():
    hidden, weight, _, _ = setting(bias=False)
    hidden, weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    found = []
    for rows in (1, 16, None):
        total, _, _ = cross_entropy(hidden, Head(weight, rows=rows), TARGETS, torch.ones(ROWS))
        found.append((total.detach(), *torch.autograd.grad(total, (hidden, weight))))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_logits_become_probabilities_in_place_block_by_block(device):
    logits = 30 * torch.randn(7, 1 << 17, generator=torch.Generator().manual_seed(3)).to(device)
    logits[0, 5:] = -1e30  # a support of five tokens
    logits[1] = logits[1, 0]  # all equal: the entropy is the largest there is
    assert device != "cpu" or len(list(blocks(logits))) > 1
    exact = logits.double()
    for entropy in (False, True):
        p = logits.clone()
        logz, found = softmax_(p, entropy=entropy)
        torch.testing.assert_close(p.double(), exact.softmax(-1), atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(logz.double(), exact.logsumexp(-1), atol=1e-5, rtol=1e-6)
    expected = -(exact.softmax(-1) * exact.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_tiles_cover_every_row_once_and_are_never_higher_than_one_buffer(monkeypatch):
    head, seen = Head(torch.randn(50, 4), rows=8), []
    inner = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, hidden, *rest: seen.append(len(hidden)) or inner(self, hidden, *rest))
    cross_entropy(torch.randn(21, 4), head, torch.arange(21), torch.ones(21))
    assert seen == [7, 7, 7]
    wide = Head(torch.empty(150_000, 1), dtype=torch.float32)
    assert (Head(torch.empty(100, 1)).tile_rows, wide.tile_rows) == (TILE_ROWS["cpu"], 128)
    assert Head(torch.empty(32_768, 1)).tile_rows * 32_768 <= TILE_LOGITS["cpu"]
    assert [list(range(21))[rows] for rows in head.tiles(21)] == [list(range(at, at + 7)) for at in (0, 7, 14)]


def test_a_z_loss_that_cancels_a_row_leaves_a_finite_gradient():
    hidden, weight, _, _ = setting(bias=False)
    z = -0.5 / float((hidden @ weight.T).logsumexp(-1)[0].detach())  # 1 + 2 z logZ is zero in the first row
    total, _, _ = cross_entropy(hidden, Head(weight, dtype=torch.float64), TARGETS, torch.ones(ROWS), z_loss=z)
    logits = hidden @ weight.T
    expected = (-logits.log_softmax(-1).gather(1, TARGETS[:, None]).squeeze(1) + z * logits.logsumexp(-1).square()).sum()
    for one, other in zip(*[torch.autograd.grad(item, (hidden, weight)) for item in (total, expected)], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("measure", [losses.forward_kl, losses.reverse_kl], ids=["forward", "reverse"])
def test_a_written_gradient_is_autograds_and_takes_a_teacher_that_excludes_tokens(measure):
    student, teacher = (torch.randn(5, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for one, other in zip(*[function(student.log_softmax(-1), teacher.log_softmax(-1)) for function in (GRADIENTS[measure], by_autograd(measure))], strict=True):
        torch.testing.assert_close(one, other)
    teacher[:, 3] = -math.inf
    values, gradient = GRADIENTS[losses.forward_kl](student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(values, losses.forward_kl(student.log_softmax(-1), teacher.log_softmax(-1)))
    assert bool(gradient.isfinite().all())


def test_bfloat16_products_leave_the_forward_in_float32():
    hidden, weight, _, _ = setting(bias=False)
    hidden, weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    exact, rounded = (token_values(hidden, Head(weight, dtype=dtype), TARGETS) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.logprobs_N, rounded.logprobs_N)
    gradients = [torch.autograd.grad(values.logprobs_N.sum(), (hidden, weight)) for values in (exact, rounded)]
    for one, other in zip(*gradients, strict=True):
        assert other.dtype is torch.float32
        assert float((one - other).abs().max()) < 0.02 * float(one.abs().max())


def test_forced_tokens_have_log_prob_zero_and_no_gradient():
    hidden, weight, _, make = setting(bias=False)
    support = Support.of([(target,) for target in TARGETS.tolist()], TARGETS)
    values = token_values(hidden, make(hidden, weight, None), TARGETS, entropy=True, support=support)
    torch.testing.assert_close(values.logprobs_N, torch.zeros(ROWS).double())
    torch.testing.assert_close(values.entropy_N, torch.zeros(ROWS).double())
    torch.testing.assert_close(torch.autograd.grad(values.logprobs_N.sum(), hidden)[0], torch.zeros(ROWS, WIDTH).double())


def test_a_target_outside_its_support_is_refused():
    with pytest.raises(DataError, match="token 1 is 5, which its support does not allow"):
        Support.of([None, (1, 2)], torch.tensor([3, 5]))
    with pytest.raises(DataError, match="token 0 is 3, which its support does not allow") as told:
        Support.of([(-1 - 2, -1 - 3), (5,)], torch.tensor([3, 5]))
    assert "all tokens but 2 are allowed there" in told.value.why
    assert Support.of([None, None], torch.tensor([3, 5])) is None


def test_all_but_a_few_is_as_good_as_the_list_of_the_rest():
    hidden, weight, bias, make = setting()
    left_out = [ids and tuple(-1 - token for token in range(VOCAB) if token not in ids) for ids in ALLOWED]
    mixed = [one if row % 2 else other for row, (one, other) in enumerate(zip(ALLOWED, left_out, strict=True))]
    expected = token_values(hidden, make(hidden, weight, bias), TARGETS, entropy=True, support=Support.of(ALLOWED, TARGETS))
    for written in (left_out, mixed):
        found = token_values(hidden, make(hidden, weight, bias), TARGETS, entropy=True, support=Support.of(written, TARGETS))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_a_support_of_a_real_vocabulary_takes_as_long_as_what_it_leaves_out():
    """200 tokens of a JSON string, 149,000 of 150,000 ids allowed at each: in under a second, where lists of them took nine."""
    positions, vocabulary, forbidden = 200, 150_000, 1000
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(vocabulary, 4, generator=generator), torch.randn(positions, 4, generator=generator)
    targets = torch.arange(positions) + forbidden
    started = time.perf_counter()
    support = Support.of([tuple(-1 - token for token in range(forbidden))] * positions, targets)
    assert time.perf_counter() - started < 1
    assert support is not None
    assert support.id_M.numel() == positions * forbidden
    found = token_values(hidden, Head(weight), targets, support=support).logprobs_N
    logits = hidden @ weight.T
    torch.testing.assert_close(found, logits.gather(1, targets[:, None])[:, 0] - logits[:, forbidden:].logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_no_rows_give_a_loss_of_zero_that_can_be_taken_backwards():
    hidden, weight, _, _ = setting(bias=False)
    total, logprobs, _ = cross_entropy(hidden[:0], Head(weight), TARGETS[:0], torch.ones(0))
    total.backward()
    assert (float(total.detach()), len(logprobs)) == (0.0, 0)
    values = token_values(hidden[:0], Head(weight), TARGETS[:0], entropy=True)
    assert len(values.logprobs_N) == 0


def test_what_does_not_fit_the_head_is_refused():
    hidden, weight, _, _ = setting(bias=False)
    with pytest.raises(ShapeError, match="outside the vocabulary of 11"):
        token_values(hidden, Head(weight), TARGETS + 5)
    with pytest.raises(ShapeError, match="do not fit"):
        token_values(hidden[:, :4], Head(weight), TARGETS)


def test_a_policy_renormalises_over_the_support_of_its_batch():
    policy, batch = tiny_policy(), make_batch([6, 4], supervised=1.0)
    full = policy.token_logprobs(batch).logprobs_B_T
    allowed = [[None] * 6, [None] * 6]
    row, at = 0, 3
    target = int(batch.tokens_B_T[row, at])
    others = [token for token in (10, 20) if token != target]
    allowed[row][at] = (target, *others)
    restricted = replace_support(batch, allowed)
    found = policy.token_logprobs(restricted).logprobs_B_T
    with torch.no_grad():
        logits = policy.model(batch.tokens_B_T).logits[row, at - 1, [target, *others]]
    torch.testing.assert_close(found[row, at], logits.log_softmax(-1)[0], atol=1e-5, rtol=1e-5)
    found, full = found.detach().clone(), full.detach().clone()
    found[row, at] = full[row, at] = 0.0
    torch.testing.assert_close(found, full)


def replace_support(batch, support):
    made = make_batch([6, 4], supervised=1.0)
    made.support = support
    assert torch.equal(made.tokens_B_T, batch.tokens_B_T)
    return made


def test_a_student_learns_its_teacher_and_not_across_tokenizers():
    teacher, student, batch = tiny_policy(), tiny_policy(seed=1), make_batch([9, 5])
    same = teacher.divergence(batch, teacher.clone_reference(), losses.reverse_kl)
    assert abs(float(same.total.detach())) < 1e-4
    out = student.divergence(batch, teacher, losses.forward_kl)
    out.total.backward()
    assert float(out.total.detach()) == pytest.approx(float(out.sums["divergence"]), rel=1e-5)
    assert all(weight.grad is None for weight in teacher.model.parameters())
    assert any(float(weight.grad.abs().max()) > 0 for weight in student.model.parameters())
    student.tokenizer.add_tokens(["new"])
    with pytest.raises(DataError, match="different tokenizers"):
        student.divergence(batch, teacher, losses.forward_kl)


def test_without_gradients_no_gradient_of_the_head_is_formed(monkeypatch):
    """A trained head in evaluation: its gradient would be as large as the head, and nobody would take it."""
    asked = []

    class Watched(head_module.Gradients):
        def __init__(self, hidden_N_D, head, *needs):
            asked.append(needs)
            super().__init__(hidden_N_D, head, *needs)

    monkeypatch.setattr(head_module, "Gradients", Watched)
    policy, batch = tiny_policy(), make_batch([9, 5])
    with torch.no_grad():
        quiet = [policy.cross_entropy(batch).total, policy.divergence(batch, policy, losses.reverse_kl).total]
    assert asked == [(False, False, False)] * 2
    assert float(policy.cross_entropy(batch).total.detach()) == float(quiet[0])
    assert asked[-1] == (True, True, False)


def test_heads_with_other_padding_behind_one_vocabulary_are_compared_over_what_they_share():
    """Qwen2.5's 7B has 152,064 rows, its 0.5B 151,936, for the same tokens."""
    batch, checks = make_batch([9, 5]), []
    for wider in ("teacher", "student"):
        teacher, student = tiny_policy(), tiny_policy(seed=1)
        expected = student.divergence(batch, teacher, losses.reverse_kl).total.detach()
        chosen = teacher if wider == "teacher" else student
        chosen.model.resize_token_embeddings(len(chosen.head.weight_V_D) + 8)
        found = student.divergence(batch, teacher, losses.reverse_kl).total
        found.backward()
        checks.append(float(student.head.weight_V_D.grad[len(teacher.tokenizer) :].abs().sum()) if wider == "student" else 0.0)
        torch.testing.assert_close(found.detach(), expected)
    assert checks == [0.0, 0.0]
