"""The controller's ops: the law of each rule's lengths, cases worked by hand, edges, refusals."""

import numpy as np
import pytest
import torch
from scipy import stats

from eesd_kernels import (
    Rule,
    implementations,
    thompson_draft_length,
    thompson_look,
    thompson_update,
)

FLAT = torch.tensor([1.1, 1.32, 1.54, 1.76, 1.98])  # prefix 0.1, exit 0.1, rest 1 + 0.02 a row
SURE = 1e9  # pseudo-counts of a posterior without spread


def sure(*chances: float) -> tuple[torch.Tensor, torch.Tensor]:
    theta = torch.tensor(chances)
    return theta * SURE, (1 - theta) * SURE


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def keys(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(batch), torch.arange(batch, dtype=torch.int32) % 97


def best_length(theta: float, costs: torch.Tensor) -> int:
    expected = np.cumsum(theta ** np.arange(len(costs)))
    return int(np.argmax(expected / costs.double().numpy()))


def chi_square_pvalue(lengths: torch.Tensor, law: np.ndarray) -> float:
    counts = np.bincount(lengths.numpy(), minlength=len(law))
    rare = law * len(lengths) < 5
    assert counts[rare].sum() <= 5 * law[rare].sum() * len(lengths) + 10
    law, counts = law[~rare], counts[~rare]
    return stats.chisquare(counts, law / law.sum() * counts.sum()).pvalue


def test_names_what_runs():
    for op in ("thompson_draft_length", "thompson_look", "thompson_update", "sample_beta"):
        named = implementations()[op]
        assert named["cpu"] == "C++"
        assert named["cuda"] in ("CUDA", "PyTorch reference")


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (0.5, 0.7), (30.0, 10.0)])
def test_bernoulli_lengths_are_geometric(alpha: float, beta: float):
    """theta is fresh at each step, so every step goes on with the posterior's mean."""
    batch, cap = 100_000, 6
    lengths = thompson_draft_length(
        torch.full((batch,), alpha), torch.full((batch,), beta),
        torch.full((batch,), cap, dtype=torch.int32), Rule.BERNOULLI, torch.ones(cap + 1),
        *keys(batch),
    )  # fmt: skip
    mean = alpha / (alpha + beta)
    law = np.array([mean**n * (1 - mean) for n in range(cap)] + [mean**cap])
    assert chi_square_pvalue(lengths, law) > 1e-4


@pytest.mark.parametrize("rule", [Rule.COST, Rule.CALIBRATED])
def test_cost_is_thompson_sampling(rule: Rule):
    """Length l comes as often as the posterior holds it to be the best."""
    alpha, beta, draws = 3.0, 2.0, 6_000
    shape = (1, 3) if rule == Rule.CALIBRATED else (1,)
    share = shape[-1]
    seed, position = keys(draws)
    lengths = torch.cat(
        [
            thompson_draft_length(
                torch.full(shape, alpha / share), torch.full(shape, beta / share), i32(4), rule,
                FLAT, seed[n : n + 1], position[n : n + 1],
            )
            for n in range(draws)
        ]
    )  # fmt: skip
    grid = (np.arange(20_000) + 0.5) / 20_000
    best = np.array([best_length(t, FLAT) for t in grid])
    law = np.bincount(best, stats.beta(alpha, beta).pdf(grid) / 20_000, minlength=5)
    assert chi_square_pvalue(lengths, law / law.sum()) > 1e-4


def test_a_batch_has_one_length():
    theta, caps, costs = (0.9, 0.05, 0.8, 0.7), (4, 4, 2, -1), FLAT.double()
    lengths = thompson_draft_length(*sure(*theta), i32(*caps), Rule.COST, FLAT, *keys(4))
    rates = [
        sum(
            sum(t**i for i in range(min(n, c) + 1))
            for t, c in zip(theta, caps, strict=True)
            if c >= 0
        )
        / costs[n]
        for n in range(5)
    ]
    chosen = int(np.argmax(rates))
    assert 0 < chosen < 4  # a compromise: alone, the first row would draft 4 and the second 0
    assert lengths.tolist() == [min(chosen, max(c, 0)) for c in caps]


def test_no_draft_where_none_pays():
    dear = torch.tensor([1.0, 2.5, 4.0])
    assert thompson_draft_length(*sure(0.99), i32(2), Rule.COST, dear, *keys(1)).tolist() == [0]
    assert thompson_draft_length(*sure(1e-6), i32(4), Rule.COST, FLAT, *keys(1)).tolist() == [0]


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name)
def test_edges(rule: Rule):
    def plan(alpha, beta, cap, costs=FLAT):
        if rule == Rule.CALIBRATED:
            alpha, beta = alpha[:, None], beta[:, None]
        return thompson_draft_length(alpha, beta, cap, rule, costs, *keys(len(cap))).tolist()

    one, nan, inf = torch.ones(1), float("nan"), float("inf")
    assert plan(one[:0], one[:0], i32()) == []
    assert plan(one, one, i32(0)) == [0]
    assert plan(one, one, i32(-1)) == [0]
    assert plan(one, one, i32(0), FLAT[:1]) == [0]
    assert plan(one * 3e38, one, i32(4)) == [4]
    if rule == Rule.CONSTANT:
        return
    assert plan(one, one * 3e38, i32(4)) == [0]
    # Bad posteriors draft nothing and leave the others alone.
    good = plan(torch.full((2,), SURE), torch.ones(2), i32(4, 4))
    assert good == [4, 4]
    for bad in (nan, inf, 0.0, -1.0):
        mixed = torch.tensor([bad, SURE, SURE, SURE]), torch.tensor([1.0, 1.0, 1.0, bad])
        assert plan(*mixed, i32(4, 4, 4, 4)) == [0, *good, 0]


def look_all(alpha, beta, cap, top_prob, exit_cost=0.1, costs=FLAT):
    """Every step of a round; top_prob `[K][B]`. Returns length, bucket and what was looked at."""
    batch, drafts = len(cap), len(costs) - 1
    length, looking = (torch.full((batch,), 9, dtype=torch.int32) for _ in range(2))
    bucket = torch.full((batch, drafts), 9, dtype=torch.int32)
    run, seen = torch.full((batch, 3), torch.nan), []
    for step in range(drafts + 1):
        probs = torch.tensor(top_prob[step - 1]) if step else torch.zeros(batch)
        thompson_look(
            alpha, beta, cap, costs, exit_cost, *keys(batch), step, probs, length, bucket, run,
            looking,
        )  # fmt: skip
        seen.append(looking.tolist())
    return length.tolist(), bucket.tolist(), seen


def test_calibrated_by_hand():
    """theta 0.2 below one half and 0.9 above it, 9.2 / 11 over both."""
    alpha, beta = torch.tensor([[0.2, 9.0]]) * SURE, torch.tensor([[0.8, 1.0]]) * SURE
    cap = i32(4, 4, 4, 1, 0, -1)
    top_prob = [
        [0.7, 0.3, torch.nan, 1.0, 1.0, 1.0],
        # Row 0: (1 + 0.9 + 0.9 * 0.836) 1.32 = 3.50 > 1.9 * 1.54 = 2.93, so look;
        # row 1: 1.2 + 0.167 + 0.140 + .. never reaches C(l) / C(1) times 1.2, so stop at 1.
        [0.3, 1.0, 1.0, 1.0, 1.0, 1.0],
        # 0.18 (1.32 + 0.1) = 0.256 > 1.9 (0.22 - 0.1) = 0.228: included; then no further look.
        [1.0] * 6,
        [1.0] * 6,
    ]
    length, bucket, seen = look_all(alpha.repeat(6, 1), beta.repeat(6, 1), cap, top_prob)
    assert length == [2, 1, 0, 1, 0, 0]
    assert bucket[0] == [1, 0, -1, -1]
    assert bucket[1] == [0, -1, -1, -1]
    assert bucket[2] == [-1, -1, -1, -1]
    assert bucket[3] == [1, -1, -1, -1]
    assert seen == [
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0] * 6,
        [0] * 6,
        [0] * 6,
    ]


def test_a_hopeless_draft_is_not_looked_at():
    alpha, beta = torch.full((1, 4), 0.05 * SURE), torch.full((1, 4), 0.95 * SURE)
    length, _, seen = look_all(alpha, beta, i32(4), [[1.0]] * 4)
    assert length == [0]
    assert seen[0] == [0]


def test_a_look_that_shows_doubt_ends_the_draft():
    """A free token would be worth including; one that costs a row of verification is not."""
    alpha = torch.tensor([[0.02, 9.0]]) * SURE
    beta = torch.tensor([[0.98, 1.0]]) * SURE
    assert look_all(alpha, beta, i32(4), [[0.1]] * 4)[0] == [0]
    free = torch.full((5,), 1.1) + 0.1 * torch.arange(5)
    assert look_all(alpha, beta, i32(4), [[0.1]] * 4, costs=free)[0] == [1]


def test_surest_drafts_reach_the_cap():
    alpha, beta = torch.full((3, 8), 3e38), torch.full((3, 8), 1e-3)
    # Pooled beyond float32: no marginal posterior, so no look.
    assert look_all(alpha, beta, i32(4, 2, 0), [[0.99] * 3] * 4)[0] == [0, 0, 0]
    alpha, beta = torch.full((3, 8), 1e30), torch.full((3, 8), 1e-3)
    assert look_all(alpha, beta, i32(4, 2, 0), [[0.99] * 3] * 4)[0] == [4, 2, 0]


def test_a_bad_bucket_ends_its_own_row_alone():
    alpha, beta = torch.full((2, 2), SURE), torch.ones(2, 2)
    alpha[0, 1] = torch.nan
    assert look_all(alpha, beta, i32(4, 4), [[0.9, 0.9]] * 4)[0] == [0, 4]


def test_update_by_hand():
    alpha, beta = torch.tensor([4.0, 3.0, 2.0, 5.0]), torch.tensor([2.0, 2.0, 3.0, 1.0])
    thompson_update(
        alpha, beta, torch.full((4,), 2.0), torch.ones(4), i32(3, 2, 0, -1), i32(1, 2, 0, 0),
        discount=0.5,
    )  # fmt: skip
    assert alpha.tolist() == [2 + 1 + 1, 2 + 0.5 + 2, 2 + 0, 5]
    assert beta.tolist() == [1 + 0.5 + 1, 1 + 0.5, 1 + 1, 1]


def test_update_of_buckets_by_hand():
    alpha, beta = torch.ones(3, 3), torch.ones(3, 3)
    bucket = i32(2, 0, 2, 1, 1, 1, 0, -1, 2, 2, 2, 2).view(3, 4)
    thompson_update(
        alpha, beta, torch.zeros(3, 3), torch.zeros(3, 3), i32(4, 3, -1), i32(3, 1, 4),
        discount=1.0, bucket=bucket,
    )  # fmt: skip
    assert alpha.tolist() == [[2, 1, 3], [1, 2, 1], [1, 1, 1]]
    assert beta.tolist() == [[1, 2, 1], [1, 2, 1], [1, 1, 1]]


def test_pooled_buckets_are_the_marginal_posterior():
    """What calibrated plans from is what the other rules would hold."""
    g = torch.Generator().manual_seed(5)
    prior = torch.rand(2, 7, 4, generator=g)
    state, plain_prior = prior.clone(), prior.sum(2)
    plain = plain_prior.clone()
    for _ in range(20):
        drafted = torch.randint(-1, 6, (7,), generator=g, dtype=torch.int32)
        accepted = (torch.rand(7, generator=g) * (drafted.clamp(min=0) + 1)).to(torch.int32)
        bucket = torch.randint(4, (7, 5), generator=g, dtype=torch.int32)
        thompson_update(*state, *prior, drafted, accepted, discount=0.9, bucket=bucket)
        thompson_update(*plain, *plain_prior, drafted, accepted, discount=0.9)
    torch.testing.assert_close(state.sum(2), plain)


def test_says_what_is_wrong():
    one, key = torch.ones(1), keys(1)
    with pytest.raises(ValueError, match=r"alpha: expected shape \[B, buckets\], got \[1\]"):
        thompson_draft_length(one, one, i32(2), Rule.CALIBRATED, FLAT, *key)
    with pytest.raises(ValueError, match=r"alpha: expected shape \[B\], got \[1, 1\]"):
        thompson_draft_length(one[None], one[None], i32(2), Rule.COST, FLAT, *key)
    with pytest.raises(ValueError, match=r"expected buckets at least 1, got 0"):
        thompson_draft_length(
            torch.ones(1, 0), torch.ones(1, 0), i32(2), Rule.CALIBRATED, FLAT, *key
        )
    with pytest.raises(ValueError, match=r"costs: expected K\+1 at least 1, got 0"):
        thompson_draft_length(one, one, i32(-1), Rule.COST, FLAT[:0], *key)
    state = i32(0), torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3), i32(0)
    buckets = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"bucket: expected shape \[B, 4\]"):
        thompson_look(buckets, buckets, i32(2), FLAT, 0.1, *key, 0, one, *state)
    with pytest.raises(ValueError, match=r"step: expected 0 to 3, got 4"):
        thompson_look(buckets, buckets, i32(2), FLAT[:4], 0.1, *key, 4, one, *state)
    with pytest.raises(ValueError, match=r"exit_cost: expected 0.0 to inf, got -1"):
        thompson_look(buckets, buckets, i32(2), FLAT[:4], -1, *key, 0, one, *state)
    with pytest.raises(ValueError, match=r"alpha: expected shape \[B, buckets\]"):
        thompson_update(one, one, one, one, i32(1), i32(1), bucket=i32(1)[None])


# --- credit: what drafts may lose against plain decoding

FIFTHS = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0])  # a draft token costs a fifth of a plain step
NO_GUESS = {"discount": 1.0, "token_credit": 1.01}


def test_a_credit_limits_the_draft():
    """theta 0.9: the longest is the best of those that the credit can pay."""
    for credit, want in ((0.0, 0), (0.19, 0), (0.2, 1), (0.5, 2), (0.8, 4), (9.0, 4), (-0.1, 0)):
        left = torch.tensor([credit])
        given = (*sure(0.9), i32(4), Rule.COST, FIFTHS, *keys(1))
        assert thompson_draft_length(*given, credit=left).tolist() == [want]
        torch.testing.assert_close(left, torch.tensor([credit - 1 - want / 5]))
        # One token emitted, then three; a draft that failed is paid to the last cent.
        thompson_update(*sure(0.9), *sure(0.9), i32(want), i32(0), credit=left, **NO_GUESS)
        torch.testing.assert_close(left, torch.tensor([credit - want / 5 + 0.01]))
        before = left.clone()
        thompson_update(*sure(0.9), *sure(0.9), i32(4), i32(2), credit=left, **NO_GUESS)
        torch.testing.assert_close(left, before + 3.03)
        thompson_update(
            *sure(0.9), *sure(0.9), i32(4), i32(4), credit=left, credit_limit=5.5, **NO_GUESS
        )
        torch.testing.assert_close(left, (before + 3.03 + 5.05).clamp(max=5.5))


def test_a_round_shares_its_credit():
    """The mean pays; who is not in the round, or has no number for a credit, keeps what he has."""
    nan, inf = float("nan"), float("inf")
    left = torch.tensor([1.5, -0.5, 7.0, nan, 0.5, inf])
    caps = i32(4, 4, -1, 4, 1, 4)
    lengths = thompson_draft_length(
        *sure(*[0.95] * 6), caps, Rule.COST, FIFTHS, *keys(6), credit=left
    )
    assert lengths.tolist() == [2, 2, 0, 0, 1, 0]  # 1.5 / 3 pays for two fifths
    torch.testing.assert_close(
        left, torch.tensor([-0.9, -0.9, 7.0, nan, -0.9, inf]), equal_nan=True
    )
    thompson_update(
        *sure(*[0.5] * 6), *sure(*[0.5] * 6), i32(2, 2, -1, 0, 1, -1), i32(2, 0, 0, 0, 1, 0),
        credit=left, **NO_GUESS,
    )  # fmt: skip
    torch.testing.assert_close(
        left, torch.tensor([2.13, 0.11, 7.0, nan, 1.12, inf]), equal_nan=True
    )


def test_rules_without_costs_leave_the_credit_alone():
    for rule in (Rule.BERNOULLI, Rule.CONSTANT):
        left = torch.zeros(1)
        assert thompson_draft_length(*sure(0.9999), i32(4), rule, FLAT, *keys(1), left) == 4
        assert left == 0


class Bets:
    """Rounds that emit one token each or, by luck, more; what they cost is counted beside the op.

    Costs in plain steps; a row starts with `START`, every token brings `1 + GROWTH`, and `LIMIT` is
    what may be saved up.
    """

    START, GROWTH, LIMIT = 2.56, 0.01, 6.0

    def __init__(self, rule: Rule, batch: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.rule, self.g = rule, g
        self.costs = 1 + torch.rand(9, generator=g).cumsum(0) * float(torch.rand(1, generator=g))
        self.exit_cost = 0.4 * float((self.costs[1:] - self.costs[:-1]).min())
        shape = (batch, 4) if rule == Rule.CALIBRATED else (batch,)
        self.alpha, self.beta = torch.full(shape, 50.0), torch.ones(shape)  # too hopeful by far
        self.prior = self.alpha.clone(), self.beta.clone()
        self.credit = torch.full((batch,), self.START)
        self.time, self.tokens = torch.zeros(batch), torch.zeros(batch)
        self.drafts = 0

    def round(self, live: torch.Tensor, luck: float) -> None:
        batch = len(live)
        cap = torch.where(live, 8, -1).int()
        key = torch.randint(2**40, (batch,), generator=self.g), torch.zeros(batch).int()
        length, bucket = torch.zeros(batch).int(), torch.full((batch, 8), -1).int()
        if self.rule == Rule.COST:
            length = thompson_draft_length(
                self.alpha, self.beta, cap, self.rule, self.costs, *key, credit=self.credit
            )
            cost = self.costs[length.max()].expand(batch)
        else:
            run, looking = torch.zeros(batch, 3), torch.zeros(batch).int()
            looks = torch.zeros(batch)
            for step in range(9):
                top = torch.rand(batch, generator=self.g)
                thompson_look(
                    self.alpha, self.beta, cap, self.costs, self.exit_cost, *key, step, top,
                    length, bucket, run, looking, credit=self.credit,
                )  # fmt: skip
                looks += looking
            cost = self.costs[length.long()] + (looks - length) * self.exit_cost
        lucky = torch.rand(batch, generator=self.g) < luck
        accepted = torch.where(lucky, length, 0)
        self.time += torch.where(live, cost / self.costs[0], 0)
        self.tokens += torch.where(live, accepted + 1, 0)
        self.drafts += int(length.sum())
        thompson_update(
            self.alpha, self.beta, *self.prior, torch.where(live, length, -1), accepted,
            bucket=bucket if self.rule == Rule.CALIBRATED else None, credit=self.credit,
            token_credit=1 + self.GROWTH, credit_limit=self.LIMIT, discount=0.9,
        )  # fmt: skip

    def bound(self) -> torch.Tensor:
        return self.START + (1 + self.GROWTH) * self.tokens + 1e-3

    def ahead(self) -> torch.Tensor:
        """Plain steps that the tokens so far were worth, beyond what they took."""
        return (1 + self.GROWTH) * self.tokens - self.time


@pytest.mark.parametrize("luck", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("rule", [Rule.COST, Rule.CALIBRATED])
def test_no_sequence_is_slower_than_its_bound(rule: Rule, luck: float):
    """At every moment, with a posterior that hopes for the best whatever happens."""
    for seed in range(8):
        bets = Bets(rule, 1, seed)
        best = credit = bets.START
        for _ in range(400):
            before = bets.ahead()
            bets.round(torch.ones(1, dtype=torch.bool), luck)
            assert (bets.time <= bets.bound()).all()
            best = max(best, float(bets.ahead()))
            assert best - float(bets.ahead()) <= bets.LIMIT + 1e-3  # from any moment on
            credit = min(bets.LIMIT, credit + float(bets.ahead() - before))
        assert bets.drafts > 0
        torch.testing.assert_close(bets.credit, torch.tensor([credit]), rtol=1e-3, atol=1e-3)


def test_no_batch_is_slower_than_its_bound():
    """The sequences together, also when some come late and others go."""
    for seed in range(8):
        bets = Bets(Rule.COST, 6, seed)
        for moment in range(300):
            here = torch.tensor([moment >= 20 * b and moment < 150 + 25 * b for b in range(6)])
            bets.round(here, 0.1)
            came = bets.tokens > 0
            assert bets.time[came].sum() <= bets.bound()[came].sum()
        assert bets.drafts > 0


def test_a_look_is_paid():
    """A look costs 0.25, a token 0.6: with credit for none, a look alone, two tokens, all."""
    alpha, beta = torch.full((5, 2), SURE), torch.full((5, 2), 1e-3)
    costs = 1 + 0.6 * torch.arange(5)
    credit = torch.tensor([0.0, 0.5, 1.3, float("nan"), 9.0])
    length, looking = torch.zeros(5).int(), torch.zeros(5).int()
    bucket, run = torch.zeros(5, 4).int(), torch.zeros(5, 3)
    want = [[0, 0, 1, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
    for step, looks in enumerate(want):
        top = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0 if step == 2 else 1.0])
        thompson_look(
            alpha, beta, i32(4, 4, 4, 4, 4), costs, 0.25, *keys(5), step, top, length, bucket, run,
            looking, credit,
        )  # fmt: skip
        assert looking.tolist() == looks
    assert length.tolist() == [0, 0, 2, 0, 1]
    # The last row's second look showed no probability: looked at, not drafted.
    torch.testing.assert_close(
        credit, torch.tensor([-1.0, -0.5, -0.9, float("nan"), 7.15]), equal_nan=True
    )
