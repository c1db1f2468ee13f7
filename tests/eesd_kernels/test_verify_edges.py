"""verify_linear at its edges, in C++ and in the reference alike, and what block adds to them."""

from typing import Any

import pytest
import torch
from drafted import i32, largest, linear_drafts, one_hot, settings

import eesd_kernels as ek
from eesd_kernels import Law, reference

VOCAB = 6
EVERY = pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)


def arguments(logits: torch.Tensor, draft: list[int], law: Law, **changes: Any) -> dict[str, Any]:
    """One sequence; q uniform over the vocabulary unless given."""
    return {
        "target_logits": logits[None],
        "draft_ids": i32([draft]).view(1, len(draft)),
        "draft_length": i32([len(draft)]),
        **settings(len(draft), logits.shape[-1], law),
        **changes,
    }


def both(values: dict[str, Any]) -> list[Any]:
    """num_accepted, ids and status of one sequence, by the op and by its reference."""
    got, want = ek.verify_linear(**values), reference.verify_linear(**values)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    return [t.tolist()[0] for t in got]


@EVERY
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
def test_one_finite_logit(law: Law, temperature: float):
    logits = one_hot(1, 4, 2)
    logits[logits == 0] = -3e38  # far from everything but minus infinity
    changes = {"temperature": torch.tensor([temperature]), "top_p": torch.tensor([0.3])}
    assert both(arguments(logits, [1, 4], law, **changes)) == [2, [1, 4, 2], 0]
    assert both(arguments(logits, [1, 5], law, **changes)) == [1, [1, 4, -1], 0]


@EVERY
def test_no_draft(law: Law):
    assert both(arguments(one_hot(3), [], law)) == [0, [3], 0]
    changes = {"draft_length": i32([0])}
    assert both(arguments(one_hot(3, 1), [2], law, **changes)) == [0, [3, -1], 0]


@EVERY
def test_a_padded_draft_token_is_rejected(law: Law):
    """-1, as `sample_draft` writes where it has no candidate."""
    assert both(arguments(one_hot(3, 1), [-1], law)) == [0, [3, -1], 0]


@pytest.mark.parametrize("law", [Law.SAMPLED, Law.BLOCK], ids=lambda law: law.name)
def test_a_token_outside_its_law_takes_nothing_from_p(law: Law):
    """p is drawn from whole; below it stands alone on token 1, and q on token 0."""
    q_ids = torch.full((1, 2, VOCAB), -1, dtype=torch.int32)
    q_ids[..., 0] = 0
    assert both(arguments(one_hot(1, 2, 3), [1, 2], law, q_ids=q_ids)) == [0, [1, -1, -1], 0]


@pytest.mark.parametrize("law", [Law.SAMPLED, Law.BLOCK], ids=lambda law: law.name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0], ids=str)
def test_a_law_without_sense_leaves_the_target_its_own(law: Law, value: float):
    q = torch.full((1, 1, VOCAB), value)
    assert both(arguments(one_hot(3, 1), [2], law, q_probs=q)) == [0, [3, -1], 0]


@pytest.mark.parametrize("law", [Law.SAMPLED, Law.DETERMINISTIC, Law.BLOCK])
def test_no_residual_mass(law: Law):
    """p on one token, that token drafted: accepted under the largest uniform; nothing is left."""
    q = torch.zeros(1, 2, VOCAB)
    q[0, 0, 1] = q[0, 1, 4] = 1.0
    values = arguments(one_hot(1, 4, 2), [1, 4], law, q_probs=q)
    assert both(values) == [2, [1, 4, 2], 0]
    assert reference.verify_linear(**values, words=largest)[0].tolist() == [2]


def test_equal_laws_leave_no_residual_but_rounding():
    """q is p rounded to float32: whatever the noise, the token is one that p has."""
    torch.manual_seed(2)
    for law in (Law.SAMPLED, Law.BLOCK):
        for _ in range(50):
            logits = torch.randn(3, VOCAB)
            logits[:, 4:] = -torch.inf
            q = logits[:2].double().softmax(-1).float()[None]
            values = arguments(logits, [0, 3], law, q_probs=q)
            _, tokens, status = reference.verify_linear(**values, words=largest)
            assert status.item() == 0
            live = tokens[tokens >= 0]
            assert len(live) >= 1
            assert (live < 4).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "all-inf"])
def test_a_block_meets_the_rows_that_it_reads(bad: float):
    """All draft rows, since the last one may overrule the first; the bonus row if all stand."""
    for row, draft, expected in (
        (0, [1, 4], [0, [-1] * 3, 1]),
        (1, [1, 4], [0, [-1] * 3, 1]),
        (2, [1, 4], [0, [-1] * 3, 1]),
        (2, [1, 5], [1, [1, 4, -1], 0]),  # row 2 is the bonus of a draft that fell
        (1, [2, 4], [0, [1, -1, -1], 0]),  # nothing stands behind a token of no mass
    ):
        logits = one_hot(1, 4, 2)
        logits[row] = bad
        assert both(arguments(logits, draft, Law.BLOCK)) == expected


def test_a_bad_row_touches_no_other():
    values = linear_drafts(60, 3, 31, 5, list(Law))
    clean = ek.verify_linear(**values)
    values["target_logits"][::3, 0] = torch.nan
    spoilt = ek.verify_linear(**values)
    assert spoilt[2].tolist() == [1, 0, 0] * 20
    assert (spoilt[1][::3] == -1).all()
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a[1::3], b[1::3])
        assert torch.equal(a[2::3], b[2::3])


def test_a_wide_odd_vocabulary():
    values = linear_drafts(8, 2, 32_003, 64, list(Law))
    got, want = ek.verify_linear(**values), reference.verify_linear(**values)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert (got[1] < 32_003).all()


def test_empty_batch():
    values = {k: v[:0] for k, v in linear_drafts(4, 3, 31, 5, [Law.BLOCK]).items()}
    assert [tuple(t.shape) for t in ek.verify_linear(**values)] == [(0,), (0, 4), (0,)]
