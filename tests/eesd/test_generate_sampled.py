"""Sampled speculative text has plain sampling's law, jointly; coupled, its very tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_law import LEAST, PROMPT, VOCAB, exact_law, p_value
from tiny_models import narrow_model
from torch import Tensor

import eesd.round
from eesd import GenerateOutput, Model, generate, load
from eesd.controller import SCHEDULES
from eesd_kernels import Law

DRAWS = 20_000
# Under a flat posterior lengths 0, 1 and 2 are equally good, so the length is the draw's.
COSTS = {"prefix": 0.1, "exit": 0.2, "rest": (1.0, 1.25, 1.32)}


# --- texts


@pytest.fixture(scope="module")
def narrow(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Vocabulary 7, and drafts that are right about half the time."""
    return narrow_model(make_llama, tmp_path_factory.mktemp("narrow") / "llama", VOCAB)


def sample(model: Model, draws: int, first_seed: int = 0, **changes: Any) -> GenerateOutput:
    """Texts of three tokens, one a seed."""
    options = {
        "do_sample": True, "max_new_tokens": 3, "eos_token_id": (), "num_assistant_tokens": 2,
        "assistant_costs": COSTS, "return_dict_in_generate": True, **changes,
    }  # fmt: skip
    seeds = list(range(first_seed, first_seed + draws))
    return generate(model, torch.full((draws, 1), PROMPT), seed=seeds, **options)


def new_tokens(out: GenerateOutput) -> Tensor:
    texts = out.sequences[:, 1:]
    assert texts.shape[1] == 3
    return texts


# --- rejection sampling


# The cost rule plans one length for a whole call: small batches, many lengths.
BATCH = {"thompson": 16, "calibrated": 16, "cost": 16, "bernoulli": 5_000, "constant": 5_000}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_joint_law_of_three_tokens(narrow: Model, schedule: str) -> None:
    """Half of them with an end of text in the vocabulary, which stops drafting."""
    eos = 2 if schedule in ("bernoulli", "thompson") else None
    law = exact_law(narrow, 3, eos)
    texts, drafted, accepted = [], set(), 0
    for first in range(0, DRAWS, BATCH[schedule]):
        out = sample(
            narrow, BATCH[schedule], first, eos_token_id=() if eos is None else eos,
            num_assistant_tokens_schedule=schedule,
        )  # fmt: skip
        new = out.sequences[:, 1:]
        assert new.shape[1] == 3 or eos is not None
        texts.append(torch.nn.functional.pad(new, (0, 3 - new.shape[1]), value=eos or 0))
        drafted |= {steps[0] for steps in out.speculative.per_step_drafted}
        accepted += out.speculative.num_accepted_draft_tokens
    assert drafted == ({2} if schedule == "constant" else {0, 1, 2}) | ({1} if eos else set())
    assert 0.2 * DRAWS < accepted < 1.8 * DRAWS
    assert p_value(torch.cat(texts), law) > LEAST


def test_plain_sampling_has_the_law(narrow: Model) -> None:
    """What the others are measured against is right itself."""
    out = sample(narrow, DRAWS // 2, num_assistant_tokens=0)
    assert p_value(new_tokens(out), exact_law(narrow, 3)) > LEAST


def test_coupled_sampling_has_the_law(narrow: Model) -> None:
    out = sample(
        narrow, DRAWS // 2, assistant_sampling="coupled", num_assistant_tokens_schedule="constant"
    )
    assert out.speculative.num_accepted_draft_tokens > 0.2 * DRAWS / 2
    assert p_value(new_tokens(out), exact_law(narrow, 3)) > LEAST


@pytest.mark.parametrize("schedule", ["constant", "calibrated"])
def test_block_sampling_has_the_law(narrow: Model, schedule: str) -> None:
    """And takes no fewer drafts than rejection on the same ones."""
    size, accepted = BATCH[schedule], {"block": 0, "rejection": 0}
    draws = DRAWS // (4 if schedule == "constant" else 10)
    for sampling in accepted:
        outs = [
            sample(
                narrow, size, first, assistant_sampling=sampling,
                num_assistant_tokens_schedule=schedule,
            )
            for first in range(0, draws, size)
        ]  # fmt: skip
        accepted[sampling] = sum(out.speculative.num_accepted_draft_tokens for out in outs)
        assert p_value(torch.cat([new_tokens(out) for out in outs]), exact_law(narrow, 3)) > LEAST
    assert accepted["block"] > accepted["rejection"] > 0


@pytest.mark.parametrize(
    "rule",
    [
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 4},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.95, "min_p": 0.08},
    ],
    ids=str,
)
def test_temperature_and_filters(narrow: Model, rule: dict[str, Any]) -> None:
    law = exact_law(narrow, 3, **rule)
    out = sample(narrow, DRAWS // 5, num_assistant_tokens_schedule="constant", **rule)
    texts = new_tokens(out)
    assert p_value(texts, law) > LEAST
    if "top_k" in rule or "top_p" in rule:
        assert bool((law == 0).any())  # something was filtered
    with pytest.raises(AssertionError):  # and without the rule the law is another
        assert p_value(texts, exact_law(narrow, 3)) > LEAST


def always_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that believes its drafts: as if q had hardly ever drawn them."""
    real = eesd.round.verify_linear_op

    def verify(logits: Tensor, ids: Tensor, length: Tensor, q_ids: Tensor, q: Tensor, *rest: Any):
        q = q.masked_fill(q_ids == ids[..., None], 1e-30)
        return real(logits, ids, length, q_ids, q, *rest)

    monkeypatch.setattr(eesd.round, "verify_linear_op", verify)


def greedy_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed choices under the rule for sampled ones."""
    real = eesd.round.exit_draft_op

    def draft(*args: Any) -> Any:
        *exit_step, law, n, seed, position, base, parent = args
        fixed = torch.full_like(law, Law.DETERMINISTIC)
        return real(*exit_step, fixed, n, seed, position, base, parent)

    monkeypatch.setattr(eesd.round, "exit_draft_op", draft)


def same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that come twice."""
    real = eesd.round.Sampling.uniform.__func__  # type: ignore[attr-defined]

    def uniform(cls: Any, seeds: list[int], *args: Any, **kwargs: Any) -> Any:
        return real(cls, [seed // 8 for seed in seeds], *args, **kwargs)

    monkeypatch.setattr(eesd.round.Sampling, "uniform", classmethod(uniform))


@pytest.mark.parametrize("fault", [always_accept, greedy_drafts, same_seed])
def test_a_fault_would_show(
    narrow: Model, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None]
) -> None:
    """The twin of the tests above, at a fifth of their draws."""
    fault(monkeypatch)
    out = sample(narrow, DRAWS // 5, num_assistant_tokens_schedule="constant")
    assert p_value(new_tokens(out), exact_law(narrow, 3)) < LEAST


# --- seeds


SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 9, "eos_token_id": ()}


def prompts_of(count: int, longest: int = 9) -> tuple[Tensor, Tensor, list[int]]:
    """Left-padded prompts over the tiny vocabulary, their mask and their lengths."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    ids = torch.randint(1, 64, (count, longest), generator=generator)
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return ids * mask, mask, lengths.tolist()


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Model:
    """Vocabulary 64, float32, with a bare exit after layer 2."""
    return load(tiny_llama, assistant_early_exit=2, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny64(tiny_llama: Path) -> Model:
    """The same in float64."""
    return load(tiny_llama, assistant_early_exit=2, device="cpu", dtype="float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("schedule", ["constant", "bernoulli"])
def test_same_seed_same_text_in_any_batch(tiny_llama: Path, schedule: str, dtype: str) -> None:
    """For the schedules that plan a sequence by itself."""
    model = load(tiny_llama, assistant_early_exit=2, device="cpu", dtype=dtype)
    ids, mask, lengths = prompts_of(7)
    seeds = [5, -1, 2**63 - 1, -(2**63), 77, 5, 0]
    options = {**SAMPLED, "num_assistant_tokens_schedule": schedule, "num_assistant_tokens": 3}
    together = generate(model, ids, mask, seed=seeds, **options)
    assert torch.equal(generate(model, ids, mask, seed=seeds, **options), together)
    for b, length in enumerate(lengths):
        alone = generate(model, ids[b : b + 1, -length:], seed=seeds[b], **options)
        assert torch.equal(alone[0, length:], together[b, ids.shape[1] :]), b


def test_different_seeds_differ(tiny: Model) -> None:
    options = {**SAMPLED, "num_assistant_tokens_schedule": "constant"}
    ids = torch.full((40, 1), 5)
    texts = generate(tiny, ids, seed=3, **options)  # derived, one a sequence
    assert len(set(map(tuple, texts.tolist()))) == 40
    other = generate(tiny, ids, seed=4, **options)
    assert not set(map(tuple, texts.tolist())) & set(map(tuple, other.tolist()))


def test_derived_seeds_are_those_of_sequence_seeds(tiny: Model) -> None:
    """A batch from one seed can be had again as a batch from several."""
    from eesd.prompts import sequence_seeds

    options = {**SAMPLED, "num_assistant_tokens_schedule": "constant"}
    ids, mask, _ = prompts_of(5)
    want = generate(tiny, ids, mask, seed=9, **options)
    got = generate(tiny, ids, mask, seed=sequence_seeds(9, 5), **options)
    assert torch.equal(got, want)


def test_no_seed_follows_torch(tiny: Model) -> None:
    def text() -> list[int]:
        ids = torch.tensor([[5, 6]])
        return generate(tiny, ids, num_assistant_tokens_schedule="constant", **SAMPLED)[0].tolist()

    torch.manual_seed(1)
    first, second = text(), text()
    assert first != second
    torch.manual_seed(1)
    assert [text(), text()] == [first, second]
    torch.manual_seed(2)
    assert text() not in (first, second)


def test_greedy_does_not_draw_from_the_seed(tiny: Model) -> None:
    ids, mask, _ = prompts_of(4)
    options = {"max_new_tokens": 12, "num_assistant_tokens_schedule": "bernoulli"}
    texts = [generate(tiny, ids, mask, seed=seed, **options) for seed in (1, 2, 3)]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


# --- coupled


SEEDS = list(range(100, 150))


@pytest.fixture(scope="module")
def plain_text(tiny64: Model) -> Tensor:
    """Plain sampling's text of fifty prompts; the same whichever law is named."""
    ids, mask, _ = prompts_of(50)
    options = {**SAMPLED, "seed": SEEDS, "num_assistant_tokens": 0}
    text = generate(tiny64, ids, mask, **options)
    assert torch.equal(generate(tiny64, ids, mask, assistant_sampling="coupled", **options), text)
    return text


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("batch", [1, 50])
def test_coupled_text_is_plain_samplings(
    tiny64: Model, plain_text: Tensor, schedule: str, batch: int
) -> None:
    """Token for token, 50 prompts, with rejected drafts among them."""
    ids, mask, lengths = prompts_of(50)
    seeds, want = SEEDS, plain_text
    options = {
        **SAMPLED, "assistant_sampling": "coupled", "num_assistant_tokens_schedule": schedule,
        "num_assistant_tokens": 4, "return_dict_in_generate": True,
        "assistant_costs": {"prefix": 0.1, "exit": 0.1, "rest": (1.0, 1.1, 1.2, 1.3, 1.4)},
    }  # fmt: skip
    accepted = drafted = 0
    for start in range(0, 50, batch):
        some = slice(start, start + batch)
        if batch == 1:
            length = lengths[start]
            out = generate(tiny64, ids[some, -length:], seed=seeds[start], **options)
            assert torch.equal(out.sequences[0, length:], want[start, ids.shape[1] :]), start
        else:
            out = generate(tiny64, ids[some], mask[some], seed=seeds[some], **options)
            assert torch.equal(out.sequences, want[some])
        drafted += out.speculative.num_draft_tokens
        accepted += out.speculative.num_accepted_draft_tokens
    assert 0 < accepted < drafted


@pytest.mark.parametrize(
    "rule", [{"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}], ids=str
)
def test_coupled_text_under_filters(tiny64: Model, rule: dict[str, Any]) -> None:
    ids, mask, _ = prompts_of(20)
    options = {**SAMPLED, **rule, "seed": list(range(20))}
    want = generate(tiny64, ids, mask, num_assistant_tokens=0, **options)
    got = generate(
        tiny64, ids, mask, assistant_sampling="coupled", num_assistant_tokens_schedule="constant",
        **options,
    )  # fmt: skip
    assert torch.equal(got, want)
    unfiltered = {**SAMPLED, "seed": list(range(20))}
    assert not torch.equal(generate(tiny64, ids, mask, num_assistant_tokens=0, **unfiltered), want)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_coupled_text_whatever_is_drafted(tiny64: Model, temperature: float, top_p: float) -> None:
    """Every schedule and draft length, in a batch and, two prompts each time, alone."""
    ids, mask, lengths = prompts_of(20)
    options = {**SAMPLED, "temperature": temperature, "top_p": top_p}
    seeds, turn = SEEDS[:20], 0
    want = generate(tiny64, ids, mask, seed=seeds, num_assistant_tokens=0, **options)
    for schedule in SCHEDULES:
        for drafts in (1, 3, 8):
            options |= {
                "assistant_sampling": "coupled", "num_assistant_tokens_schedule": schedule,
                "num_assistant_tokens": drafts,
                "assistant_costs": {"prefix": 0.1, "exit": 0.1, "rest": (1.0,) * 9},
            }  # fmt: skip
            got = generate(tiny64, ids, mask, seed=seeds, **options)
            assert torch.equal(got, want), (schedule, drafts)
            for b in (turn % 20, (turn + 1) % 20):
                alone = generate(tiny64, ids[b : b + 1, -lengths[b] :], seed=seeds[b], **options)
                assert torch.equal(alone[0, lengths[b] :], want[b, ids.shape[1] :]), (schedule, b)
            turn += 2


def test_rejection_text_is_not_plain_samplings(tiny64: Model, plain_text: Tensor) -> None:
    """The twin: the same test would tell another rule's text from plain sampling's."""
    ids, mask, _ = prompts_of(50)
    options = {**SAMPLED, "seed": SEEDS, "num_assistant_tokens_schedule": "constant"}
    assert not torch.equal(generate(tiny64, ids, mask, **options), plain_text)
