"""Seeds of a batch, cost tables, and what the controller makes of a posterior."""

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from eesd.allowance import DEFAULT_MAX_SLOWDOWN, SETTLED, Allowance
from eesd.config import ModelConfig
from eesd.controller import SCHEDULES, Controller, CostTable
from eesd.prompts import check_prompts, sequence_seeds
from eesd_kernels import Rule

CPU = torch.device("cpu")


# --- seeds


def test_the_first_sequence_takes_the_seed_itself() -> None:
    for seed in (0, 7, -1, 2**63 - 1, -(2**63)):
        assert sequence_seeds(seed, 1) == [seed]
        assert sequence_seeds(seed, 5)[0] == seed


def test_derived_seeds_are_distinct_and_stay() -> None:
    """Also across neighbouring seeds; a longer batch begins like a shorter one."""
    drawn = [value for seed in range(50) for value in sequence_seeds(seed, 100)]
    assert len(set(drawn)) == 5_000
    assert all(-(2**63) <= value < 2**63 for value in drawn)
    assert sequence_seeds(3, 100)[:9] == sequence_seeds(3, 9)


def test_derived_seeds_are_splitmix() -> None:
    """The published first outputs of SplitMix64 from state 1234567."""
    want = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    got = [value % 2**64 for value in sequence_seeds(1234567, 4)[1:]]
    assert got == list(want)


def test_given_seeds_are_taken() -> None:
    assert sequence_seeds([4, 4, -9], 3) == [4, 4, -9]
    assert sequence_seeds((1,), 1) == [1]


def test_no_seed_draws_one_from_torch() -> None:
    torch.manual_seed(0)
    first, second = sequence_seeds(None, 3), sequence_seeds(None, 3)
    torch.manual_seed(0)
    assert sequence_seeds(None, 3) == first != second
    assert len(set(first)) == 3


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        ([1], ValueError, "expected 2 seeds, one a sequence, got 1"),
        (1.0, TypeError, r"got 1\.0"),
        ("ab", TypeError, "got 'ab'"),
        (False, TypeError, "got False"),
        ([1, True], TypeError, "expected integers, got True"),
        (2**63, ValueError, "64-bit integer, got 9223372036854775808"),
        ([0, -(2**63) - 1], ValueError, "64-bit integer, got -9223372036854775809"),
    ],
    ids=str,
)
def test_bad_seeds(seed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"seed: .*{message}"):
        sequence_seeds(seed, 2)


def test_prompts_lose_their_padding() -> None:
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8,
            "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "max_position_embeddings": 6,
        }
    )  # fmt: skip
    ids = torch.tensor([[0, 0, 3], [4, 5, 6]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert [p.tolist() for p in check_prompts(config, ids, mask, 3)] == [[3], [4, 5, 6]]
    assert [p.tolist() for p in check_prompts(config, ids, None, 3)] == ids.tolist()
    with pytest.raises(ValueError, match=r"prompt 1 has 3 tokens, .*max_new_tokens = 4"):
        check_prompts(config, ids, mask, 4)


# --- costs


def test_cost_of_a_round() -> None:
    """(l + 1) prefix + l exit + rest[l], with sums that binary numbers hold."""
    table = CostTable(prefix=0.5, exit=0.25, rest=(4.0, 4.5, 5.5, 7.0))
    assert table.rounds(3, CPU).tolist() == [4.5, 5.75, 7.5, 9.75]
    assert table.rounds(1, CPU).tolist() == [4.5, 5.75]
    assert table.rounds(0, CPU).tolist() == [4.5]
    assert table.rounds(3, CPU).dtype is torch.float32


def test_cost_table_too_short() -> None:
    with pytest.raises(ValueError, match=r"rest: expected at least 3 entries .* got 2"):
        CostTable(1.0, 1.0, (1.0, 1.0)).rounds(2, CPU)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ((-1.0, 1.0, (1.0,)), ValueError, "finite and not negative"),
        ((1.0, float("nan"), (1.0,)), ValueError, "finite and not negative"),
        ((1.0, float("inf"), (1.0,)), ValueError, "finite and not negative"),
        ((1.0, 1.0, (1.0, -2.0)), ValueError, "finite and not negative"),
        ((1.0, 1.0, ()), ValueError, "rest not empty"),
        ((0.0, 1.0, (0.0, 1.0)), ValueError, "must cost something"),
        (("a", 1.0, (1.0,)), TypeError, "expected numbers, got 'a'"),
    ],
    ids=str,
)
def test_bad_cost_table(values: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"assistant_costs: .*{message}"):
        CostTable(*values)


# --- plans


def controller(
    batch: int,
    rule: Rule,
    *,
    max_draft: int = 8,
    prior: tuple[float, float] = (1.0, 1.0),
    costs: Tensor | None = None,
    discount: float = 0.98,
    **options: Any,
) -> Controller:
    return Controller(
        batch, CPU, rule=rule, max_draft=max_draft, prior=prior, costs=costs, discount=discount,
        **options,
    )  # fmt: skip


def plan(of: Controller, caps: list[int], seed: int = 0) -> list[int]:
    batch = len(caps)
    seeds = torch.arange(seed, seed + batch)
    place = torch.full((batch,), 10, dtype=torch.int32)
    return of.plan(torch.tensor(caps, dtype=torch.int32), seeds, place).tolist()


def certain(theta: float) -> tuple[float, float]:
    """A posterior so narrow that every draw is theta to four digits."""
    return 1e10 * theta, 1e10 * (1 - theta)


def gains(thetas: list[float], caps: list[int], costs: list[float]) -> list[float]:
    """Expected tokens of the batch over the cost of the round, for each common length."""
    return [
        sum(
            sum(theta**i for i in range(min(length, cap) + 1))
            for theta, cap in zip(thetas, caps, strict=True)
        )
        / costs[length]
        for length in range(max(caps) + 1)
    ]


TABLES = {
    "cheap drafts": CostTable(0.05, 0.05, tuple(1.0 + 0.02 * n for n in range(9))),
    "dear drafts": CostTable(0.2, 0.6, tuple(1.0 + 0.1 * n for n in range(9))),
    "a step at five rows": CostTable(0.05, 0.1, (1.0,) * 5 + (2.5,) * 4),
}


@pytest.mark.parametrize("table", TABLES)
def test_cost_rule_picks_the_arithmetic_optimum(table: str) -> None:
    chosen = set()
    costs = TABLES[table].rounds(8, CPU)
    for theta in (0.02, 0.15, 0.3, 0.45, 0.65, 0.77, 0.85, 0.93, 0.99):
        ranked = gains([theta], [8], costs.tolist())
        best, second = sorted(ranked, reverse=True)[:2]
        assert best > second * 1.0004  # else the draw decides
        want = ranked.index(best)
        of = controller(1, Rule.COST, prior=certain(theta), costs=costs, max_slowdown=None)
        assert plan(of, [8]) == [want]
        chosen.add(want)
    assert len(chosen) > 2


def test_cost_rule_serves_a_batch_with_one_length() -> None:
    """It maximises the sum; rows draft up to their caps, and finished rows do not count."""
    costs = TABLES["cheap drafts"].rounds(8, CPU)
    thetas, caps = [0.85, 0.8, 0.05, 0.8], [8, 8, 8, 2]

    def best(rows: list[int]) -> int:
        ranked = gains([thetas[b] for b in rows], [caps[b] for b in rows], costs.tolist())
        top, second = sorted(ranked, reverse=True)[:2]
        assert top > second * 1.0005
        return ranked.index(top)

    of = controller(4, Rule.COST, costs=costs)
    for b, theta in enumerate(thetas):
        of.alpha[b], of.beta[b] = certain(theta)
    everyone, without = best([0, 1, 2, 3]), best([0, 1, 3])
    assert 2 < everyone < without  # the hopeless row makes rounds shorter
    assert plan(of, caps) == [min(everyone, cap) for cap in caps]
    got = plan(of, [8, 8, -1, 2])
    assert [got[b] for b in (0, 1, 3)] == [without, without, 2]
    assert got[2] == 0


def test_thompson_is_the_cost_rule() -> None:
    assert SCHEDULES["thompson"] is SCHEDULES["cost"] is Rule.COST


def test_thompson_explores() -> None:
    """Under a flat posterior the draw decides: hopeless and hopeful thetas both come."""
    costs = TABLES["cheap drafts"].rounds(8, CPU)
    of = controller(1, Rule.COST, costs=costs, max_slowdown=None)
    lengths = [plan(of, [8], seed)[0] for seed in range(300)]
    assert set(lengths) >= {0, 8}
    assert lengths == [plan(of, [8], seed)[0] for seed in range(300)]


@pytest.mark.parametrize("rule", [Rule.COST, Rule.BERNOULLI, Rule.CONSTANT])
def test_caps_are_kept(rule: Rule) -> None:
    costs = TABLES["cheap drafts"].rounds(8, CPU)
    of = controller(5, rule, prior=certain(0.9999), costs=costs)
    assert plan(of, [8, 3, 0, 1, -1]) == [8, 3, 0, 1, 0]


@pytest.mark.parametrize("rule", [Rule.COST, Rule.BERNOULLI])
def test_a_hopeless_draft_is_not_made(rule: Rule) -> None:
    costs = TABLES["cheap drafts"].rounds(8, CPU)
    assert plan(controller(3, rule, prior=certain(1e-5), costs=costs), [8, 8, 8]) == [0, 0, 0]


def test_bernoulli_lengths_have_their_law() -> None:
    """Theta anew for each token: P(l >= n) = mean^n, here 0.75^n, the last cell at the cap."""
    rows = 20_000
    got = plan(controller(rows, Rule.BERNOULLI, prior=(3.0, 1.0)), [4] * rows)
    observed = torch.bincount(torch.tensor(got), minlength=5).numpy()
    law = [0.25 * 0.75**n for n in range(4)] + [0.75**4]
    assert len(observed) == 5
    assert stats.chisquare(observed, [rows * p for p in law]).pvalue > 1e-3


def test_plain_decoding_plans_nothing() -> None:
    of = controller(2, Rule.CONSTANT, max_draft=0)
    assert plan(of, [5, 5]) == [0, 0]
    of.update(torch.tensor([0, 0]).int(), torch.tensor([0, 0]).int())
    assert (of.alpha.tolist(), of.beta.tolist()) == ([1.0, 1.0], [1.0, 1.0])


# --- the posterior


def test_update_by_hand() -> None:
    """All accepted, some, none, nothing drafted, and a sequence that took no part."""
    of = controller(5, Rule.COST, prior=(3.0, 2.0), discount=0.5)
    of.alpha += 4.0  # 7: four over the prior
    of.beta += 2.0  # 4: two over the prior
    drafted = torch.tensor([5, 5, 5, 0, -1], dtype=torch.int32)
    accepted = torch.tensor([5, 2, 0, 0, 0], dtype=torch.int32)
    of.update(drafted, accepted)
    assert of.alpha.tolist() == [3 + 2 + 5, 3 + 2 + 2, 3 + 2, 3 + 2, 7]
    assert of.beta.tolist() == [2 + 1, 2 + 1 + 1, 2 + 1 + 1, 2 + 1, 4]


def test_dead_rows_stay_as_they_are() -> None:
    """Round after round, whatever the accepted count says."""
    of = controller(2, Rule.COST, prior=(1.5, 2.5))
    of.alpha[0], of.beta[0] = 6.0, 7.0
    for accepted in (0, 3, 1):
        of.update(torch.tensor([-1, 4]).int(), torch.tensor([accepted, accepted]).int())
    assert (of.alpha[0].item(), of.beta[0].item()) == (6.0, 7.0)
    assert of.alpha[1].item() > 1.5
    assert of.prior_alpha.tolist() == [1.5, 1.5]


def test_the_posterior_forgets() -> None:
    """It stands at the prior plus m / (1 - g) in the end."""
    of = controller(1, Rule.COST, prior=(1.0, 1.0), discount=0.9)
    for _ in range(400):
        of.update(torch.tensor([3]).int(), torch.tensor([2]).int())
    assert of.alpha.item() == pytest.approx(1 + 2 / 0.1, rel=1e-4)
    assert of.beta.item() == pytest.approx(1 + 1 / 0.1, rel=1e-4)


# --- what drafts may lose


def test_allowance_by_hand() -> None:
    """Half of 2% of 256 steps at once, half with the tokens: 1.02 of plain from 256 tokens on."""
    start, token, limit = Allowance.of(0.02, 1.8)
    assert (start, token, limit) == pytest.approx((2.56, 1.01, 4 * 2.56 + 1.8))
    for slowdown in (0.0, DEFAULT_MAX_SLOWDOWN, 0.5):
        start, token, _ = Allowance.of(slowdown, 2.0)
        assert start + token * SETTLED == pytest.approx((1 + slowdown) * SETTLED)


def hopeful(rule: Rule, table: str, rounds: int, **options: Any) -> tuple[float, int]:
    """Time of so many rounds over plain decoding's where hope is great and nothing is accepted."""
    costs = TABLES[table].rounds(8, CPU)
    of = controller(
        1, rule, prior=certain(0.9999), costs=costs, exit_cost=TABLES[table].exit, **options
    )
    time, drafts = 0.0, 0
    for n in range(rounds):
        place = torch.full((1,), n, dtype=torch.int32)
        length = of.plan(torch.full((1,), 8, dtype=torch.int32), torch.zeros(1).long(), place)
        step = 1
        while of.looks(length, step):
            length = of.include(length, step, torch.full((1,), 0.95))
            step += 1
        of.update(length, torch.zeros_like(length))
        time, drafts = time + float(costs[length.max()] / costs[0]), drafts + int(length)
    return time / rounds, drafts


@pytest.mark.parametrize("table", ["cheap drafts", "a step at five rows"])
@pytest.mark.parametrize("rule", [Rule.COST, Rule.CALIBRATED])
def test_no_hope_costs_more_than_the_slowdown(rule: Rule, table: str) -> None:
    for rounds in (SETTLED, 1000):
        slower, drafts = hopeful(rule, table, rounds)
        assert slower <= 1 + DEFAULT_MAX_SLOWDOWN + 1e-4
        assert drafts > 0
    assert hopeful(rule, table, SETTLED, max_slowdown=0.2)[0] <= 1.2
    assert hopeful(rule, table, SETTLED, max_slowdown=0.0) == (1.0, 0)
    assert hopeful(rule, table, SETTLED, max_slowdown=None)[0] > 1.2


def test_rules_that_weigh_no_costs_are_not_bound() -> None:
    costs = TABLES["cheap drafts"].rounds(8, CPU)
    for rule in (Rule.CONSTANT, Rule.BERNOULLI):
        assert controller(2, rule, costs=costs).credit is None


def test_a_threshold_pays_for_what_was_drafted() -> None:
    """Planned 8, ended at the look at token 3: two tokens drafted, three looked at."""
    costs = TABLES["cheap drafts"].rounds(8, CPU)
    of = controller(2, Rule.COST, prior=certain(0.9999), costs=costs, threshold=0.5)
    assert of.credit is not None
    before = of.credit.clone()
    length = torch.tensor(plan(of, [8, -1]), dtype=torch.int32)
    assert length.tolist() == [8, 0]
    for step, top in enumerate((0.9, 0.9, 0.1), 1):
        assert of.looks(length, step)
        length = of.include(length, step, torch.full((2,), top))
    assert not of.looks(length, 4)
    of.update(torch.tensor([int(length[0]), -1], dtype=torch.int32), torch.tensor([2, 0]).int())
    price = float(costs[3] / costs[0])
    assert of.credit.tolist() == pytest.approx([float(before[0]) - price + 3 * 1.01, 2.56])
