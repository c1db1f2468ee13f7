"""The arguments of `generate`: what is wrong is named, what is right is kept to."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eesd import GenerateOutput, GenerationConfig, Model, generate, load
from eesd.controller import SCHEDULES, CostTable

IDS = torch.tensor([[5, 9, 17]])
COSTS = {"prefix": 0.1, "exit": 0.1, "rest": tuple(1.0 + 0.1 * n for n in range(9))}


def scale_rest(model: Model, factor: float) -> Model:
    """Shrink what layers N.. add, so that the bare exit agrees more often."""
    backbone, head = model.backbone, model.exit_head
    assert head is not None
    first = head.config.exit_layer
    backbone.layers = backbone.layers[:first] + tuple(
        layer._replace(output=layer.output * factor, down=layer.down * factor)
        for layer in backbone.layers[first:]
    )
    return model


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Model:
    """64 positions, a vocabulary of 64, end of text 0; about half the drafts are accepted."""
    return scale_rest(load(tiny_llama, assistant_early_exit=1, device="cpu"), 0.3)


def run(model: Model, ids: Tensor = IDS, *args: Any, **changes: Any) -> Any:
    """A short call that measures nothing."""
    return generate(model, ids, *args, **{"max_new_tokens": 5, "assistant_costs": COSTS, **changes})


def test_the_call_that_all_others_spoil(model: Model) -> None:
    assert run(model).shape == (1, 8)


# --- prompts


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 2]], TypeError, "input_ids: expected .*got list"),
        (None, TypeError, "input_ids: expected .*got NoneType"),
        (torch.ones(1, 3), TypeError, "input_ids: expected int64 or int32, got torch.float32"),
        (IDS.to(torch.int16), TypeError, "input_ids: expected int64 or int32, got torch.int16"),
        (IDS.bool(), TypeError, "input_ids: expected int64 or int32, got torch.bool"),
        (IDS[0], ValueError, r"input_ids: expected shape \[B, P\], got \[3\]"),
        (IDS[None], ValueError, r"input_ids: expected shape \[B, P\], got \[1, 1, 3\]"),
        (IDS[:0], ValueError, r"input_ids: expected shape \[B, P\], got \[0, 3\]"),
        (IDS[:, :0], ValueError, "input_ids: prompt 0 is empty"),
        (torch.tensor([[1, 2], [3, 64]]), ValueError, "prompt 1 has id 64, outside the .* of 64"),
        (torch.tensor([[1, -1]]), ValueError, "prompt 0 has id -1, outside the vocabulary of 64"),
        (torch.ones(1, 60).long(), ValueError, "60 tokens, .*max_new_tokens = 5 .* 64 positions"),
        (torch.ones(1, 99).long(), ValueError, "99 tokens, .* more than the model's 64 positions"),
        (IDS.to("meta"), ValueError, "input_ids: expected device cpu .*, got meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_ids(model: Model, ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(model, ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1], [1, 1, 1]], "left padding"),
        ([[1, 1, 1], [1, 1, 0]], "left padding"),
        ([[1, 1, 1], [0, 0, 0]], "input_ids: prompt 1 is empty"),
        ([[1, 1], [1, 1]], r"attention_mask: expected shape \[2, 3\], got \[2, 2\]"),
        ([[1, 1, 1]], r"attention_mask: expected shape \[2, 3\], got \[1, 3\]"),
        ([1, 1, 1], r"attention_mask: expected shape \[2, 3\], got \[3\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_attention_mask(model: Model, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, IDS.repeat(2, 1), torch.tensor(mask))


def test_attention_mask_that_is_no_tensor(model: Model) -> None:
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[1, 3\], got no tensor"):
        run(model, IDS, [[1, 1, 1]])


def test_ids_under_the_mask_may_be_anything(model: Model) -> None:
    mask = torch.tensor([[0, 1, 1]])
    got = run(model, torch.tensor([[-7, 9, 17]]), mask)
    assert torch.equal(got[:, 3:], run(model, torch.tensor([[9, 17]]))[:, 2:])
    assert got[0, :3].tolist() == [-7, 9, 17]


# --- who and with what


@pytest.mark.parametrize("wrong", [None, "demo", torch.nn.Linear(2, 2)], ids=str)
def test_model_of_the_wrong_type(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a model of eesd\.load, got"):
        run(wrong)


def test_no_exit_head(tiny_llama: Path) -> None:
    """Named with its remedies, of which one is decoding plainly."""
    headless = load(tiny_llama)
    with pytest.raises(ValueError, match=r"no exit head; give exit_head.*num_assistant_tokens=0"):
        run(headless)
    assert run(headless, num_assistant_tokens=0).shape == (1, 8)


def test_exit_head_of_another_model(
    model: Model, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    other = load(make_llama(tmp_path, seed=5), assistant_early_exit=1)
    with pytest.raises(ValueError, match="exit_head: belongs to a backbone with other weights"):
        run(model, exit_head=other.exit_head)


@pytest.mark.parametrize(
    ("name", "value"), [("exit_head", "folder"), ("generation_config", {"max_new_tokens": 3})]
)
def test_objects_of_the_wrong_type(model: Model, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected .*, got {type(value).__name__}"):
        run(model, **{name: value})


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        ([1, 2, 3], ValueError, "seed: expected 2 seeds, one a sequence, got 3"),
        ([], ValueError, "seed: expected 2 seeds, one a sequence, got 0"),
        ([1, 2.0], TypeError, r"seed: expected integers, got 2\.0"),
        ([1, 2**63], ValueError, "seed: expected a 64-bit integer, got 9223372036854775808"),
        (-(2**63) - 1, ValueError, "seed: expected a 64-bit integer"),
        (1.5, TypeError, r"seed: expected an integer or one a sequence, got 1\.5"),
        ("12", TypeError, "seed: expected an integer or one a sequence, got '12'"),
        (True, TypeError, "seed: expected an integer or one a sequence, got True"),
    ],
    ids=str,
)
def test_bad_seed(model: Model, seed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(model, IDS.repeat(2, 1), seed=seed)


# --- options


def test_unknown_option(model: Model) -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'max_tokens'; known: .*max_new_tokens"):
        run(model, max_tokens=3)


def test_an_option_of_load_is_sent_there(model: Model) -> None:
    with pytest.raises(ValueError, match=r"assistant_early_exit: give it to eesd\.load"):
        run(model, assistant_early_exit=1)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_new_tokens", 0, ValueError),
        ("max_new_tokens", -1, ValueError),
        ("max_new_tokens", 2.0, TypeError),
        ("max_new_tokens", True, TypeError),
        ("max_new_tokens", None, TypeError),
        ("do_sample", 1, TypeError),
        ("do_sample", "yes", TypeError),
        ("temperature", 0.0, ValueError),
        ("temperature", -1.0, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", 1e308, ValueError),
        ("temperature", "hot", TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 2**40, ValueError),
        ("top_k", 2.5, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.01, ValueError),
        ("top_p", None, TypeError),
        ("min_p", -0.1, ValueError),
        ("min_p", 1.1, ValueError),
        ("min_p", float("nan"), ValueError),
        ("eos_token_id", -1, ValueError),
        ("eos_token_id", [3, -1], ValueError),
        ("eos_token_id", [3, "a"], ValueError),
        ("eos_token_id", 2**40, ValueError),
        ("eos_token_id", [2**40], ValueError),
        ("eos_token_id", "a", TypeError),
        ("eos_token_id", {3}, TypeError),
        ("pad_token_id", -1, ValueError),
        ("pad_token_id", 2**70, ValueError),
        ("pad_token_id", 1.0, TypeError),
        ("num_assistant_tokens", -1, ValueError),
        ("num_assistant_tokens", "many", TypeError),
        ("num_assistant_tokens_schedule", "heuristic", ValueError),
        ("num_assistant_tokens_schedule", None, ValueError),
        ("draft", "tree", ValueError),
        ("assistant_sampling", "blocks", ValueError),
        ("assistant_costs", 3, TypeError),
        ("assistant_costs", {"prefix": 1, "exit": 1}, ValueError),
        ("assistant_costs", {**COSTS, "tail": 1}, ValueError),
        ("assistant_costs", {**COSTS, "exit": -1}, ValueError),
        ("assistant_costs", {**COSTS, "exit": float("nan")}, ValueError),
        ("assistant_costs", {**COSTS, "exit": "a"}, TypeError),
        ("assistant_costs", {**COSTS, "rest": ()}, ValueError),
        ("assistant_costs", {**COSTS, "rest": 5}, TypeError),
        ("assistant_costs", {**COSTS, "rest": (1.0, 2.0)}, ValueError),
    ],
    ids=str,
)
def test_option_out_of_range(model: Model, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        run(model, **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"do_sample": True, "temperature": 1e-3},
        {"do_sample": True, "temperature": 50},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_k": 10**6},
        {"do_sample": True, "top_p": 1e-9},
        {"do_sample": True, "min_p": 1.0},
        {"eos_token_id": (), "pad_token_id": 0},
        {"num_assistant_tokens": 1000, "assistant_costs": None},
        {"num_assistant_tokens": 0, "assistant_costs": None},
        {"assistant_costs": CostTable(1.0, 1.0, (1.0,) * 9)},
        {"seed": -(2**63)},
        {"seed": (2**63 - 1,)},
    ],
    ids=str,
)
def test_option_at_the_edge_of_its_range(model: Model, options: dict[str, Any]) -> None:
    got = run(model, **options)
    assert torch.equal(got[:, :3], IDS)
    assert 3 < got.shape[1] <= 3 + options.get("max_new_tokens", 5)
    if {"top_k": 1}.items() <= options.items() or options.get("min_p") == 1.0:
        assert torch.equal(got, run(model))  # nothing but the best is left


def test_generation_config_refuses_unknown_fields() -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        GenerationConfig(max_tokens=3)  # type: ignore[call-arg]


def test_generation_config_is_frozen() -> None:
    config = GenerationConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_new_tokens = 3  # type: ignore[misc]


def test_generation_config_checks_itself() -> None:
    with pytest.raises(ValueError, match=r"^top_p: expected above 0, at most 1, got 2\.0"):
        GenerationConfig(top_p=2.0)
    assert GenerationConfig(eos_token_id=[3, 4]).eos_token_id == (3, 4)  # type: ignore[arg-type]


def test_keywords_go_before_the_config_object(model: Model) -> None:
    config = GenerationConfig(max_new_tokens=2, eos_token_id=(), num_assistant_tokens=0)
    assert generate(model, IDS, generation_config=config).shape == (1, 5)
    assert generate(model, IDS, generation_config=config, max_new_tokens=4).shape == (1, 7)
    assert config.max_new_tokens == 2
    out = generate(
        model, IDS, generation_config=config, max_new_tokens=9, num_assistant_tokens=3,
        num_assistant_tokens_schedule="constant", return_dict_in_generate=True,
    )  # fmt: skip
    assert out.speculative.num_draft_tokens > 0  # the object's 0 is overruled


# --- streaming


class Listener:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        assert not self.ended
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("at", [None, 4, 7])
def test_streamer_hears_what_is_emitted(model: Model, drafts: int, at: int | None) -> None:
    """The prompt, then each round's tokens as cut at their end, then the end."""
    whole = run(model, max_new_tokens=11, num_assistant_tokens=0, eos_token_id=())[0].tolist()
    eos = () if at is None else whole[3 + at]
    listener = Listener()
    out = run(
        model, max_new_tokens=11, num_assistant_tokens=drafts, eos_token_id=eos, streamer=listener,
        num_assistant_tokens_schedule="constant", return_dict_in_generate=True,
    )  # fmt: skip
    prompt, *rounds = listener.heard
    assert prompt == IDS[0].tolist()
    assert [t for tokens in rounds for t in tokens] == out.sequences[0, 3:].tolist()
    assert listener.ended == 1
    (accepted,) = out.speculative.per_step_accepted
    assert len(rounds) == len(accepted)
    assert [len(tokens) for tokens in rounds[:-1]] == [m + 1 for m in accepted[:-1]]
    assert len(rounds[-1]) in (accepted[-1], accepted[-1] + 1)
    assert (max(map(len, rounds)) > 1) == (drafts > 0)


def test_streamer_gets_the_prompt_without_padding(model: Model) -> None:
    listener = Listener()
    run(model, torch.tensor([[0, 0, 9]]), torch.tensor([[0, 0, 1]]), streamer=listener)
    assert listener.heard[0] == [9]


def test_streamer_with_a_batch(model: Model) -> None:
    listener = Listener()
    with pytest.raises(ValueError, match="streamer: expected one sequence, got 2"):
        run(model, IDS.repeat(2, 1), streamer=listener)
    assert (listener.heard, listener.ended) == ([], 0)


# --- statistics


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_statistics_add_up(model: Model, schedule: str) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (6, 4), generator=generator)
    for eos in ((), 11):
        out: GenerateOutput = run(
            model, ids, max_new_tokens=20, eos_token_id=eos, pad_token_id=0, do_sample=True, seed=2,
            num_assistant_tokens_schedule=schedule, return_dict_in_generate=True,
        )  # fmt: skip
        stats, drafted, accepted = (
            out.speculative, out.speculative.per_step_drafted, out.speculative.per_step_accepted
        )  # fmt: skip
        assert len(drafted) == len(accepted) == len(stats.posterior) == 6
        for b, (one, two) in enumerate(zip(drafted, accepted, strict=True)):
            assert len(one) == len(two)
            assert all(0 <= m <= n <= 8 for n, m in zip(one, two, strict=True))
            new = out.sequences[b, 4:].tolist()
            ended = out.finish_reasons[b] == "eos"
            kept = new.index(eos) + 1 if ended else len(new)
            cut = sum(m + 1 for m in two) - kept
            assert cut in ((0, 1) if ended else (0,))  # at most the bonus behind a drafted end
        assert stats.num_spec_steps == sum(map(len, drafted)) == sum(stats.acceptance_histogram)
        assert stats.num_draft_tokens == sum(map(sum, drafted))
        total = sum(map(sum, accepted))
        assert stats.num_accepted_draft_tokens == total
        assert sum(n * count for n, count in enumerate(stats.acceptance_histogram)) == total
        assert 0 < total < stats.num_draft_tokens
        assert stats.mean_acceptance_length == 1 + total / stats.num_spec_steps
        assert stats.draft_acceptance_rate == total / stats.num_draft_tokens
        assert stats.costs == CostTable(**COSTS)


def test_statistics_of_plain_decoding(model: Model) -> None:
    out = run(model, num_assistant_tokens=0, eos_token_id=(), return_dict_in_generate=True)
    stats = out.speculative
    assert (stats.num_spec_steps, stats.num_draft_tokens, stats.acceptance_histogram) == (5, 0, [5])
    assert (stats.mean_acceptance_length, stats.draft_acceptance_rate) == (1.0, 0.0)


def test_posterior_is_that_of_the_rounds(model: Model) -> None:
    """Replayed by hand from the steps: half the head's prior of 1, 1 and a discount a round."""
    out = run(
        model, IDS.repeat(3, 1), max_new_tokens=20, eos_token_id=(), do_sample=True, seed=5,
        return_dict_in_generate=True, num_assistant_tokens_schedule="bernoulli",
    )  # fmt: skip
    stats = out.speculative
    for b, (drafted, accepted) in enumerate(
        zip(stats.per_step_drafted, stats.per_step_accepted, strict=True)
    ):
        alpha = beta = prior = 0.5
        for n, m in zip(drafted, accepted, strict=True):
            alpha = prior + 0.998 * (alpha - prior) + m
            beta = prior + 0.998 * (beta - prior) + (m < n)
        assert stats.posterior.marginal()[b] == pytest.approx((alpha, beta), rel=1e-5)


def test_the_measured_costs_come_back(model: Model) -> None:
    """A run can be repeated with them."""
    options = {
        "max_new_tokens": 12, "do_sample": True, "seed": 3, "eos_token_id": (),
        "return_dict_in_generate": True,
    }  # fmt: skip
    first = generate(model, IDS, **options)
    costs = first.speculative.costs
    assert costs is not None
    assert min(costs.prefix, costs.exit, *costs.rest) > 0
    again = generate(model, IDS, assistant_costs=costs, **options)
    assert torch.equal(again.sequences, first.sequences)
    assert again.speculative.per_step_drafted == first.speculative.per_step_drafted


# --- models that break while they run


@pytest.fixture
def poisoned(tiny_llama: Path) -> Callable[[int], Model]:
    """A model whose embedding of one token is NaN."""

    def make(token: int) -> Model:
        broken = scale_rest(load(tiny_llama, assistant_early_exit=1, device="cpu"), 0.3)
        broken.backbone.embedding[token] = torch.nan
        return broken

    return make


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("sampled", [False, True])
def test_nan_in_one_sequence(
    model: Model, poisoned: Callable[[int], Model], drafts: int, sampled: bool
) -> None:
    """It is named; the others are what they are without it."""
    ids = torch.tensor([[5, 9, 17], [5, 63, 17], [21, 9, 8]])
    options = {
        "num_assistant_tokens": drafts, "max_new_tokens": 12, "eos_token_id": 0, "pad_token_id": 0,
        "do_sample": sampled, "seed": [4, 5, 6], "num_assistant_tokens_schedule": "constant",
    }  # fmt: skip
    want = run(model, ids, **options)
    assert not (want[::2] == 63).any()
    message = "sequence 1: error: NaN or infinite logits at new token 0"
    with pytest.raises(RuntimeError, match=message):
        run(poisoned(63), ids, **options)
    out = run(poisoned(63), ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences[::2], want[::2, : out.sequences.shape[1]])
    assert bool((want[::2, out.sequences.shape[1] :] == 0).all())
    assert out.sequences[1].tolist() == [5, 63, 17] + [0] * (out.sequences.shape[1] - 3)
    assert f"sequence 1: {out.finish_reasons[1]}" == message
    assert {out.finish_reasons[0], out.finish_reasons[2]} <= {"eos", "length"}
    assert out.speculative.per_step_drafted[1] == []


@pytest.mark.parametrize("drafts", [0, 4])
def test_nan_in_the_middle_of_a_text(
    model: Model, poisoned: Callable[[int], Model], drafts: int
) -> None:
    """What was emitted before stands, and the message counts it."""
    options = {"num_assistant_tokens": drafts, "max_new_tokens": 20, "eos_token_id": ()}
    options["num_assistant_tokens_schedule"] = "constant"
    whole = run(model, **options)[0].tolist()
    new = whole[3:]
    at = next(i for i, token in enumerate(new) if i >= 6 and token not in whole[: 3 + i])
    out = run(poisoned(new[at]), return_dict_in_generate=True, **options)
    got = out.sequences[0, 3:].tolist()
    (found,) = re.findall(r"at new token (\d+)$", out.finish_reasons[0])
    assert got == new[: int(found)]
    assert at + 1 - drafts <= len(got) <= at + 1
    assert len(got) == sum(n + 1 for n in out.speculative.per_step_accepted[0])
