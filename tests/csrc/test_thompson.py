"""The C++ controller equals its reference, bit for bit: draws, lengths, posteriors, credits."""

import functools

import controller_cases as cases
import pytest
import torch

from eesd_kernels import Rule, _cpu, reference

plan_reference = functools.partial(
    reference.thompson_draft_length, draw=_cpu.sample_beta_cpu, words=_cpu.philox_words_cpu
)
look_reference = functools.partial(reference.thompson_look, draw=_cpu.sample_beta_cpu)
SEEDS = range(4)


def copy(arguments):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def assert_equal(got, want):
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("drafts", cases.DRAFTS)
@pytest.mark.parametrize("batch", cases.BATCHES)
@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name)
def test_lengths_equal_the_reference(rule, batch, drafts):
    for seed in SEEDS if batch * drafts < 5_000 else range(2):
        buckets = cases.BUCKETS[seed % 4] if rule == Rule.CALIBRATED else 0
        mine = {**cases.plan(batch, drafts, buckets, seed), "rule": int(rule)}
        theirs = copy(mine)
        length = _cpu.thompson_draft_length_cpu(**mine)
        assert torch.equal(length, plan_reference(**theirs))
        assert_equal(mine, theirs)
        assert ((length >= 0) & (length <= mine["cap"].clamp(min=0))).all()


@pytest.mark.parametrize("drafts", cases.DRAFTS)
@pytest.mark.parametrize("batch", cases.BATCHES)
@pytest.mark.parametrize("buckets", [0, *cases.BUCKETS])
def test_posteriors_equal_the_reference(buckets, batch, drafts):
    for seed in range(3):
        mine = {**cases.outcome(batch, drafts, buckets, seed), "discount": (1.0, 0.98, 0.0)[seed]}
        theirs = copy(mine)
        _cpu.thompson_update_cpu(**mine)
        reference.thompson_update(**theirs)
        assert_equal(mine, theirs)


@pytest.mark.parametrize("drafts", [0, 1, 5, 8, 19])
@pytest.mark.parametrize("batch", cases.BATCHES)
def test_looks_equal_the_reference(batch, drafts):
    longest = 0
    for seed in range(6):
        mine, top_prob = cases.looks(batch, drafts, cases.BUCKETS[seed % 4], seed)
        theirs = copy(mine)
        for step in range(drafts + 1):
            now = {"step": step, "top_prob": top_prob[step], "exit_cost": 0.02}
            _cpu.thompson_look_cpu(**mine, **now)
            look_reference(**theirs, **now)
            assert_equal(mine, theirs)
        assert (mine["length"] <= mine["cap"].clamp(min=0)).all()
        assert ((mine["bucket"] >= 0).sum(1) == mine["length"]).all()
        longest = max([longest, *mine["length"].tolist()])
    assert longest >= min(drafts, batch, 3)


def test_a_row_of_the_length_alone_rules_is_its_own():
    """bernoulli and constant: whatever rows are beside it."""
    given = cases.plan(64, 8, 0, 0)
    for rule in (Rule.BERNOULLI, Rule.CONSTANT):
        together = _cpu.thompson_draft_length_cpu(**given, rule=int(rule))
        for b in (0, 31, 32, 63):
            row = {k: v if k == "costs" else v[b : b + 1] for k, v in given.items()}
            assert _cpu.thompson_draft_length_cpu(**row, rule=int(rule)) == together[b]


def test_strided_state_is_updated_in_place():
    state = torch.rand(5, 3, 3) + 1
    parts = {"alpha": state[:, 0], "beta": state[:, 1], "credit": state[:, 2, 0]}
    mine = {**cases.outcome(5, 4, 3, 0), **parts}
    theirs = copy(mine)
    _cpu.thompson_update_cpu(**mine, discount=0.9)
    reference.thompson_update(**theirs, discount=0.9)
    assert_equal(parts, {k: theirs[k] for k in parts})
    mine = {**cases.plan(5, 4, 0, 0), "rule": int(Rule.COST), "credit": state[:, 2, 1]}
    theirs = copy(mine)
    assert torch.equal(_cpu.thompson_draft_length_cpu(**mine), plan_reference(**theirs))
    assert_equal(mine, theirs)


def test_refusals():
    from eesd_kernels import _C

    with pytest.raises(ValueError, match="thompson_draft_length: a size is negative"):
        _C.thompson_draft_length(0, 0, 0, 9, 0, 0, 0, 1, 1, 1, 0, 0, None)
    with pytest.raises(ValueError, match="thompson_draft_length: a size is negative"):
        _C.thompson_draft_length(0, 0, 0, int(Rule.COST), 0, 0, 0, 1, 2, 1, 0, 0, None)
    with pytest.raises(ValueError, match="thompson_draft_length: a required pointer is null"):
        _C.thompson_draft_length(0, 0, 0, int(Rule.COST), 0, 0, 0, 1, 1, 1, 0, 0, None)
    with pytest.raises(ValueError, match="thompson_look: a size is negative"):
        _C.thompson_look(0, 0, 0, 0, 0.1, 0, 0, 0, 1, 1, 3, 3, 0, 0, 0, 0, 0, None)
    with pytest.raises(ValueError, match="thompson_update: a required pointer is null"):
        _C.thompson_update(0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1.0, 0, 1.0, 1.0, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_cuda_reports_no_device_cleanly():
    from eesd_kernels import _C

    n = torch.ones(1)
    address = n.data_ptr()
    error = RuntimeError if _C.with_cuda else ValueError
    message = "a CUDA call failed" if _C.with_cuda else "built without CUDA"
    with pytest.raises(error, match=f"sample_beta: .*{message}"):
        _C.sample_beta(address, address, address, address, 1, 1, address, stream=0)
