"""verify_linear: its law by chi-square on narrow vocabularies, and its edges."""

from typing import Any

import pytest
import torch
from scipy import stats

import eesd_kernels as ek
from eesd_kernels import Law

VOCAB = 5


def _i32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(logits: torch.Tensor, draft: list[int], **changes: Any) -> dict[str, Any]:
    """One sequence; q uniform over the vocabulary unless given."""
    drafts, vocab = len(draft), logits.shape[-1]
    base = {
        "target_logits": logits[None],
        "draft_ids": _i32([draft]).view(1, drafts),
        "draft_length": _i32([drafts]),
        "q_ids": torch.arange(vocab, dtype=torch.int32).expand(1, drafts, vocab).contiguous(),
        "q_probs": torch.full((1, drafts, vocab), 1 / vocab),
        "law": _i32([Law.SAMPLED]),
        "temperature": torch.ones(1),
        "top_k": _i32([0]),
        "top_p": torch.ones(1),
        "min_p": torch.zeros(1),
        "seed": torch.tensor([7]),
        "position": _i32([10]),
        "base": _i32([10]),
    }
    return {**base, **changes}


def one_hot(*tokens: int, vocab: int = VOCAB) -> torch.Tensor:
    logits = torch.full((len(tokens), vocab), -torch.inf)
    for row, token in enumerate(tokens):
        logits[row, token] = 0.0
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)
def test_one_hot_targets(temperature: float, law: Law):
    """All accepted, some, none: where p is one-hot the outcome has no randomness left."""
    common = {"temperature": torch.tensor([temperature]), "law": _i32([law])}
    for draft, accepted, tokens in (
        ([1, 2, 3], 3, [1, 2, 3, 4]),
        ([1, 2, 0], 2, [1, 2, 3, -1]),
        ([0, 2, 3], 0, [1, -1, -1, -1]),
    ):
        got, ids, status = ek.verify_linear(**arguments(one_hot(1, 2, 3, 4), draft, **common))
        assert (got.tolist(), ids.tolist(), status.tolist()) == ([accepted], [tokens], [0])


def test_no_draft_is_a_plain_draw():
    got, ids, status = ek.verify_linear(**arguments(one_hot(3), []))
    assert (got.tolist(), ids.tolist(), status.tolist()) == ([0], [[3]], [0])


def test_empty_batch():
    full = arguments(one_hot(1, 2), [1])
    empty = {name: value[:0] for name, value in full.items()}
    assert [t.shape[0] for t in ek.verify_linear(**empty)] == [0, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "all-inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_row_sets_its_own_status(bad: float, temperature: float):
    good = arguments(one_hot(1, 2), [1], temperature=torch.tensor([temperature]))
    batch = {name: torch.cat([value] * 3) for name, value in good.items()}
    batch["target_logits"][1, 1] = bad
    got, ids, status = ek.verify_linear(**batch)
    assert status.tolist() == [0, 1, 0]
    assert got.tolist() == [1, 0, 1]
    assert ids.tolist() == [[1, 2], [-1, -1], [1, 2]]


def test_a_bad_row_behind_the_walk_is_never_met():
    logits = one_hot(1, 2, 3)
    logits[1:] = torch.nan
    got, ids, status = ek.verify_linear(**arguments(logits, [0, 0]))
    assert (got.tolist(), ids.tolist(), status.tolist()) == ([0], [[1, -1, -1]], [0])


def test_draft_beyond_its_length_is_ignored():
    changes = {"draft_length": _i32([1])}
    got, ids, _ = ek.verify_linear(**arguments(one_hot(1, 2, 3), [1, 2], **changes))
    assert (got.tolist(), ids.tolist()) == ([1], [[1, 2, -1]])


def test_ties_go_to_the_lower_id():
    changes = {"temperature": torch.zeros(1)}
    _, ids, _ = ek.verify_linear(**arguments(torch.zeros(1, VOCAB), [], **changes))
    assert ids.tolist() == [[0]]


def test_equal_laws_accept_nearly_everything():
    """With p = q only the rounding of q to float32 can reject: u is below 1 and the test strict."""
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    q = logits[:2].double().softmax(-1).float()[None]
    accepted = 0
    for seed in range(200):
        changes = {"q_probs": q, "seed": torch.tensor([seed])}
        got, _, _ = ek.verify_linear(**arguments(logits, [seed % VOCAB, 2], **changes))
        accepted += got.item()
    assert accepted >= 399


def test_filters_keep_ties_and_follow_their_order():
    """A uniform law has nothing but ties, so no threshold may take anything from it."""
    seen = set()
    for seed in range(60):
        changes = {
            "seed": torch.tensor([seed]),
            "top_k": _i32([1]),
            "top_p": torch.tensor([0.1]),
            "min_p": torch.tensor([0.9]),
        }
        _, ids, _ = ek.verify_linear(**arguments(torch.zeros(1, VOCAB), [], **changes))
        seen.add(ids.item())
    assert seen == set(range(VOCAB))


def test_filtered_ids_never_come():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])
    for changes, allowed in (
        ({"top_k": _i32([2])}, {0, 1}),
        ({"top_p": torch.tensor([0.7])}, {0, 1}),  # 0.64, 0.24, ...
        ({"min_p": torch.tensor([0.3])}, {0, 1}),  # 1, 0.37, 0.14, ...
    ):
        seen = {
            ek.verify_linear(**arguments(logits, [], seed=torch.tensor([s]), **changes))[1].item()
            for s in range(80)
        }
        assert seen == allowed


def joint_pvalue(drawn: Law, rule: Law, *, round_base: bool = True) -> float:
    """Chi-square of (first, second) token against p(x1) p(x2 | x1), over many seeds.

    Rounds that emit one token are continued by a second round at the new base, so noise that a
    round used beyond its accepted part would show here if it came again.
    """
    torch.manual_seed(5)
    draws, first = 30_000, 2
    p_logits = torch.randn(VOCAB, VOCAB) * 1.5  # row: previous token
    q_logits = p_logits + torch.randn(VOCAB, VOCAB)

    def full(n: int, value: int) -> torch.Tensor:
        return torch.full((n,), value, dtype=torch.int32)

    def one_round(previous: torch.Tensor, at: int, drafts: int, seeds: torch.Tensor):
        n, base = len(previous), at if round_base else 0
        token, ids, q_ids, q_probs, rows = previous, [], [], [], [p_logits[previous]]
        for j in range(drafts):
            values, order = q_logits[token].topk(3)
            child, q = ek.sample_draft(
                values, order.int(), torch.ones(n), full(n, drawn), 1, seeds,
                full(n, at + j + 1), full(n, base),
            )  # fmt: skip
            token = child[:, 0].long()
            ids.append(token.int())
            q_ids.append(order.int())
            q_probs.append(q)
            rows.append(p_logits[token])
        return ek.verify_linear(
            torch.stack(rows, 1), torch.stack(ids, 1), full(n, drafts), torch.stack(q_ids, 1),
            torch.stack(q_probs, 1), full(n, rule), torch.ones(n), full(n, 0), torch.ones(n),
            torch.zeros(n), seeds, full(n, at), full(n, base),
        )  # fmt: skip

    seed = torch.arange(draws)
    accepted, tokens, _ = one_round(torch.full((draws,), first), 10, 2, seed)
    one, two = tokens[:, 0].long(), tokens[:, 1].long()
    short = accepted == 0
    assert 0.1 < short.float().mean() < 0.9
    _, again, _ = one_round(one[short], 11, 1, seed[short])
    two[short] = again[:, 0].long()
    counts = torch.bincount(one * VOCAB + two, minlength=VOCAB * VOCAB)
    p = p_logits.double().softmax(-1)
    expected = (p[first][:, None] * p).flatten() * draws
    return float(stats.chisquare(counts.numpy(), expected.numpy()).pvalue)


@pytest.mark.parametrize("law", [Law.SAMPLED, Law.DETERMINISTIC, Law.COUPLED])
def test_joint_law_of_two_tokens(law: Law):
    assert joint_pvalue(law, law) > 1e-3


def test_noise_shared_by_draft_and_target_would_show():
    """The twin: drafts that raced with the target's own noise, under the sampled rule."""
    assert joint_pvalue(Law.COUPLED, Law.SAMPLED, round_base=False) < 1e-3


def test_a_law_under_another_laws_rule_would_show():
    """A fixed choice is not a draw from q."""
    assert joint_pvalue(Law.DETERMINISTIC, Law.SAMPLED) < 1e-3
