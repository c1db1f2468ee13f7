"""The posterior: what it is after a call, carried over to the next, shared, kept in a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import half_agreeing_folder, left_pad, tiny_prompts
from torch import Tensor

from eesd import GenerateOutput, Model, Posterior, generate, load
from eesd.controller import BUCKETS, DEFAULT_DISCOUNT

COSTS = {"prefix": 0.1, "exit": 0.1, "rest": tuple(1.0 + 0.1 * n for n in range(9))}
PLANNED = ["thompson", "bernoulli", "constant"]


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = half_agreeing_folder(make_llama, tmp_path_factory.mktemp("half") / "llama", 0.3)
    return load(folder, assistant_early_exit=1, device="cpu", dtype="float32")


def run(model: Model, ids: Tensor, *args: Any, **changes: Any) -> GenerateOutput:
    options = {
        "max_new_tokens": 24, "assistant_costs": COSTS, "eos_token_id": (), "do_sample": True,
        "num_assistant_tokens": 4, "seed": 3, "return_dict_in_generate": True, **changes,
    }  # fmt: skip
    out = generate(model, ids, *args, **options)
    assert isinstance(out, GenerateOutput)
    return out


def some_prompts() -> tuple[Tensor, Tensor]:
    return left_pad(tiny_prompts(4, seed=2))


Rounds = list[tuple[int, int]]


def rounds_of(out: GenerateOutput) -> list[Rounds]:
    stats = out.speculative
    pairs = zip(stats.per_step_drafted, stats.per_step_accepted, strict=True)
    return [list(zip(drafted, accepted, strict=True)) for drafted, accepted in pairs]


def replayed(rounds: Rounds, prior: tuple[float, float], discount: float) -> tuple[float, float]:
    """alpha and beta from the prior on, as documented."""
    alpha, beta = prior
    for drafted, accepted in rounds:
        alpha = prior[0] + discount * (alpha - prior[0]) + accepted
        beta = prior[1] + discount * (beta - prior[1]) + (accepted < drafted)
    return alpha, beta


@pytest.mark.parametrize("schedule", PLANNED)
@pytest.mark.parametrize("given", [{}, {"assistant_prior": (2.0, 3.0), "assistant_discount": 0.9}])
def test_carried_over_it_is_that_of_one_long_call(
    model: Model, schedule: str, given: dict[str, Any]
) -> None:
    """Two calls' rounds, replayed by hand without a break; half the bare head's flat prior."""
    ids, mask = some_prompts()
    options = {"num_assistant_tokens_schedule": schedule, **given}
    first = run(model, ids, mask, **options)
    learned = first.speculative.posterior
    before = learned.to_dict()
    second = run(
        model, ids, mask, assistant_posterior=learned, seed=4, **options
    ).speculative.posterior
    assert learned.to_dict() == before  # what was given is not written to
    again = run(model, ids, mask, assistant_posterior=learned, seed=4, **options)
    assert again.speculative.posterior.to_dict() == second.to_dict()
    prior = given.get("assistant_prior", (0.5, 0.5))
    discount = given.get("assistant_discount", DEFAULT_DISCOUNT)
    both = zip(rounds_of(first), rounds_of(again), strict=True)
    for b, (one, two) in enumerate(both):
        assert learned.marginal()[b] == pytest.approx(replayed(one, prior, discount), rel=1e-5)
        want = replayed(one + two, prior, discount)
        assert second.marginal()[b] == pytest.approx(want, rel=1e-5)
    fresh = run(model, ids, mask, seed=4, **options).speculative.posterior
    assert fresh.to_dict() != second.to_dict()


def test_carried_over_under_the_calibrated_schedule(model: Model) -> None:
    """In buckets; nothing discounted, so that the counts of both calls add up."""
    ids, mask = some_prompts()
    options = {
        "num_assistant_tokens_schedule": "calibrated", "assistant_discount": 1.0,
        "assistant_prior": (3.0, 1.0),
    }  # fmt: skip
    first = run(model, ids, mask, **options)
    learned = first.speculative.posterior
    assert learned.buckets == BUCKETS
    assert learned.alpha.shape == (4, BUCKETS)
    second = run(model, ids, mask, assistant_posterior=learned, seed=4, **options)
    both = zip(rounds_of(first), rounds_of(second), strict=True)
    for b, (one, two) in enumerate(both):
        want = 3.0 + sum(m for _, m in one + two), 1.0 + sum(m < n for n, m in one + two)
        assert second.speculative.posterior.marginal()[b] == pytest.approx(want, rel=1e-5)
    assert sum(n for rounds in rounds_of(first) for n, _ in rounds) > 0


@pytest.mark.parametrize("schedule", [*PLANNED, "calibrated"])
def test_shared_by_a_batch(model: Model, schedule: str) -> None:
    """All rounds of all sequences, discounted once a round; rows stay equal."""
    ids, mask = some_prompts()
    options = {
        "num_assistant_tokens_schedule": schedule, "assistant_share_posterior": True,
        "assistant_prior": (2.0, 1.0), "assistant_discount": 0.9, "eos_token_id": [7, 30, 44],
    }  # fmt: skip
    out = run(model, ids, mask, **options)
    rounds = rounds_of(out)
    assert len(set(map(len, rounds))) > 1  # some sequences end before others
    alpha, beta = 2.0, 1.0
    for step in range(max(map(len, rounds))):
        live = [r[step] for r in rounds if step < len(r)]
        alpha = 2.0 + 0.9 * (alpha - 2.0) + sum(m for _, m in live)
        beta = 1.0 + 0.9 * (beta - 1.0) + sum(m < n for n, m in live)
    posterior = out.speculative.posterior
    assert len(posterior) == 4
    # An end of text among drafts that were accepted cuts the statistics, not the posterior.
    for got in posterior.marginal():
        assert got == posterior.marginal()[0]
        assert got[1] == pytest.approx(beta, rel=1e-5)
        assert alpha - 1e-4 <= got[0] <= alpha + 1 + 1e-4
    again = run(model, ids, mask, assistant_posterior=posterior, **options)
    assert len(set(again.speculative.posterior.marginal())) == 1


def test_shared_by_one_is_its_own(model: Model) -> None:
    ids = torch.tensor([[5, 9, 17]])
    for schedule in (*PLANNED, "calibrated"):
        own, shared = (
            run(
                model, ids, num_assistant_tokens_schedule=schedule, assistant_share_posterior=share
            ).speculative
            for share in (False, True)
        )
        assert own.per_step_drafted == shared.per_step_drafted
        for a, b in zip(own.posterior.marginal(), shared.posterior.marginal(), strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_one_sequences_posterior_serves_a_batch(model: Model) -> None:
    ids, mask = some_prompts()
    one = Posterior(torch.tensor([7.0]), torch.tensor([2.0]))
    each = Posterior(torch.full((4,), 7.0), torch.full((4,), 2.0))
    outs = [run(model, ids, mask, assistant_posterior=given) for given in (one, each)]
    assert outs[0].speculative.per_step_drafted == outs[1].speculative.per_step_drafted
    assert outs[0].speculative.posterior.to_dict() == outs[1].speculative.posterior.to_dict()
    picked = outs[0].speculative.posterior.sequence(-1)
    assert picked.marginal() == outs[0].speculative.posterior.marginal()[-1:]
    with pytest.raises(IndexError):
        picked.sequence(1)


def test_a_small_posterior_under_a_large_prior(model: Model) -> None:
    """Rounded away in float32; what comes back is a posterior still."""
    for given in (1e-6, 1e-30):
        out = run(
            model, torch.tensor([[5, 9]]), assistant_prior=(1e6, 1e6), assistant_discount=1.0,
            assistant_posterior=Posterior(torch.tensor([given]), torch.tensor([given])),
        )  # fmt: skip
        again = out.speculative.posterior
        assert run(model, torch.tensor([[5, 9]]), assistant_posterior=again).sequences.shape[1] > 2


def ones(*shape: int) -> Posterior:
    return Posterior(torch.ones(shape), torch.ones(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_posterior": ones(2)}, "expected one of 4 sequences, or of one, got 2"),
        (
            {"assistant_posterior": ones(4, BUCKETS)},
            f"expected one Beta law a sequence for the schedule cost, got {BUCKETS} buckets",
        ),
        (
            {"assistant_posterior": ones(4), "num_assistant_tokens_schedule": "calibrated"},
            f"expected {BUCKETS} buckets a sequence for the schedule calibrated, got one Beta",
        ),
        (
            {"assistant_posterior": ones(4, 3), "num_assistant_tokens_schedule": "calibrated"},
            f"expected {BUCKETS} buckets a sequence .* got 3 buckets a sequence",
        ),
        (
            {
                "assistant_posterior": Posterior(torch.arange(1.0, 5.0), torch.ones(4)),
                "assistant_share_posterior": True,
            },
            "expected equal rows to share, got different ones",
        ),
    ],
    ids=["batch", "buckets", "no buckets", "other buckets", "rows to share"],
)
def test_a_posterior_that_does_not_fit(model: Model, options: dict[str, Any], message: str) -> None:
    ids, mask = some_prompts()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^assistant_posterior: {message}"):
        run(model, ids, mask, seed=None, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("assistant_posterior", (1.0, 1.0), TypeError),
        ("assistant_posterior", {"alpha": [1.0], "beta": [1.0]}, TypeError),
        ("assistant_prior", 1.0, TypeError),
        ("assistant_prior", (1.0,), TypeError),
        ("assistant_prior", (1.0, "a"), TypeError),
        ("assistant_prior", (True, 1.0), TypeError),
        ("assistant_prior", (0.0, 1.0), ValueError),
        ("assistant_prior", (1.0, float("nan")), ValueError),
        ("assistant_prior", (float("inf"), 1.0), ValueError),
        ("assistant_prior", (1e-44, 1.0), ValueError),
        ("assistant_discount", 1.01, ValueError),
        ("assistant_discount", -0.1, ValueError),
        ("assistant_discount", "a", TypeError),
        ("assistant_max_slowdown", -0.01, ValueError),
        ("assistant_max_slowdown", float("inf"), ValueError),
        ("assistant_max_slowdown", "a", TypeError),
        ("assistant_share_posterior", 1, TypeError),
        ("assistant_confidence_threshold", 1.5, ValueError),
        ("assistant_confidence_threshold", float("nan"), ValueError),
        ("assistant_confidence_threshold", None, TypeError),
    ],
    ids=str,
)
def test_bad_options(model: Model, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        run(model, torch.tensor([[5, 9]]), **{name: value})


# --- the object itself


@pytest.mark.parametrize(
    ("alpha", "beta", "error"),
    [
        ([1.0], torch.ones(1), TypeError),
        (torch.ones(1).double(), torch.ones(1), TypeError),
        (torch.ones(1), torch.ones(2), ValueError),
        (torch.ones(1), torch.ones(1, device="meta"), None),
        (torch.ones(()), torch.ones(()), ValueError),
        (torch.ones(0), torch.ones(0), ValueError),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3), ValueError),
        (torch.zeros(1), torch.ones(1), ValueError),
        (torch.ones(1), torch.tensor([torch.nan]), ValueError),
        (torch.ones(1), torch.tensor([torch.inf]), ValueError),
    ],
    ids=str,
)
def test_no_posterior(alpha: Any, beta: Any, error: type[Exception] | None) -> None:
    with pytest.raises(error or (ValueError, NotImplementedError, RuntimeError)):
        Posterior(alpha, beta)


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 8), (3, 8)])
def test_saved_and_loaded_it_is_the_same(shape: tuple[int, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    one = Posterior(*(torch.rand(shape, generator=generator) * 300 + 1e-6 for _ in range(2)))
    path = tmp_path / "new" / "posterior.json"
    for _ in range(2):  # a second time over the first
        one.save(path)
        two = Posterior.load(path)
        assert torch.equal(one.alpha, two.alpha)
        assert torch.equal(one.beta, two.beta)
        assert two.buckets == one.buckets == (shape[1] if len(shape) == 2 else None)
    assert os.listdir(path.parent) == ["posterior.json"]
    assert Posterior.from_dict(one.to_dict()).to_dict() == one.to_dict()
    assert len(one) == shape[0]
    assert one.to("cpu").alpha.data_ptr() != one.alpha.data_ptr()


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "posterior.json"
    ones(2).save(path)
    before = path.read_text()

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        ones(3).save(path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["posterior.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a saved posterior"),
        ("[1, 2]", "expected an object, got list"),
        ('{"alpha": [1.0]}', "beta is missing"),
        ('{"alpha": [1.0], "beta": [1.0], "gamma": 1}', "unknown field 'gamma'"),
        ('{"alpha": ["a"], "beta": [1.0]}', "alpha: expected numbers"),
        ('{"alpha": [[1.0], [1.0, 2.0]], "beta": [1.0]}', "alpha: expected numbers"),
        ('{"alpha": null, "beta": [1.0]}', "alpha: expected numbers"),
        ('{"alpha": [1.0], "beta": [0.0]}', "beta: expected values above 0"),
        ('{"alpha": [NaN], "beta": [1.0]}', "alpha: expected values above 0"),
        (json.dumps({"alpha": [1e39], "beta": [1.0]}), "alpha: expected "),
        ('{"alpha": [1.0], "beta": [1.0, 1.0]}', r"beta: expected \[1\] on cpu as alpha"),
    ],
    ids=str,
)
def test_a_damaged_file(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "posterior.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"posterior.json: .*{message}"):
        Posterior.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.json: no such file"):
        Posterior.load(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="not a saved posterior"):
        Posterior.load(tmp_path)
