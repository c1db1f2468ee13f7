"""Any valid call of `generate` keeps its promises; any invalid one says so and leaves no trace.

150 calls of each kind by default; EESD_EXAMPLES=2000 in the environment makes it 2,000.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from tiny_models import half_agreeing_folder
from torch import Tensor

from eesd import GenerateOutput, GenerationConfig, Model, Posterior, generate, load
from eesd.controller import BUCKETS, SCHEDULES
from eesd.stop_strings import StopStrings

VOCAB, POSITIONS, LONGEST = 64, 64, 14
COSTS = {"prefix": 0.1, "exit": 0.1, "rest": tuple(1.0 + 0.1 * n for n in range(9))}
MANY = settings(
    max_examples=int(os.environ.get("EESD_EXAMPLES", "150")),
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A token a character, about half the drafts accepted."""
    folder = half_agreeing_folder(make_llama, tmp_path_factory.mktemp("half") / "llama", 0.3)
    return load(folder, assistant_early_exit=1, device="cpu", dtype="float32")


def favour(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A bias on an id that depends on every token before and on their number."""
    places = torch.arange(1, input_ids.shape[1] + 1)
    bias = torch.zeros_like(scores)
    bias[0, int((input_ids[0] * places).sum()) % VOCAB] = 2.0
    return scores + bias


def no_neighbours(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Ids beside the last one are removed."""
    last = int(input_ids[0, -1])
    near = (torch.arange(VOCAB) - last).abs() == 1
    return scores.masked_fill(near, -torch.inf)


def long_enough(input_ids: Tensor, scores: Any) -> bool:
    return input_ids.shape[1] >= 11


def even_pair(input_ids: Tensor, scores: Any) -> Tensor:
    return (input_ids[:, -2:] % 8 == 0).all(1)


class Listener:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.heard += value.tolist()

    def end(self) -> None:
        self.ended += 1


# --- valid calls


def posteriors(batch: int, schedule: str) -> st.SearchStrategy[Posterior | None]:
    shape = (BUCKETS,) if schedule == "calibrated" else ()
    value = st.floats(0.0625, 50, width=32)

    def make(rows: int, alpha: float, beta: float) -> Posterior:
        return Posterior(torch.full((rows, *shape), alpha), torch.full((rows, *shape), beta))

    return st.none() | st.builds(make, st.sampled_from([1, batch]), value, value)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """input_ids, attention_mask and everything else of a valid call."""
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    row = st.lists(st.integers(0, VOCAB - 1), min_size=width, max_size=width)
    ids = torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))
    mask = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, width), min_size=batch, max_size=batch))
        mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    longest = draw(st.integers(1, LONGEST))
    sampled = draw(st.booleans())
    times = draw(st.integers(1, 3)) if sampled else 1
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    texts = st.text("abcdeot .0123456789", min_size=1, max_size=3)
    one_seed = st.integers(-(2**63), 2**63 - 1)
    share = draw(st.booleans())
    ends = draw(st.lists(st.integers(0, VOCAB - 1), max_size=12) | st.integers(0, VOCAB - 1))
    options = {
        "max_new_tokens": longest,
        "min_new_tokens": draw(st.integers(0, longest)),
        "do_sample": sampled,
        "temperature": draw(st.floats(0.05, 20)),
        "top_k": draw(st.integers(0, 70)),
        "top_p": draw(st.floats(0.01, 1.0)),
        "min_p": draw(st.floats(0.0, 1.0)),
        "repetition_penalty": draw(st.just(1.0) | st.floats(0.3, 5.0)),
        "no_repeat_ngram_size": draw(st.sampled_from([0, 0, 1, 2, 3, 50])),
        "eos_token_id": ends,
        "pad_token_id": draw(st.integers(0, VOCAB - 1)),
        "stop_strings": draw(st.none() | texts | st.lists(texts, max_size=3)),
        "num_return_sequences": times,
        "output_scores": draw(st.booleans()),
        "output_logits": draw(st.booleans()),
        "num_assistant_tokens": draw(st.integers(0, 8)),
        "num_assistant_tokens_schedule": schedule,
        "draft": "linear",
        "assistant_confidence_threshold": draw(st.just(0.0) | st.floats(0, 1)),
        "assistant_sampling": draw(st.sampled_from(["rejection", "coupled", "block"])),
        "assistant_costs": COSTS,
        "assistant_posterior": draw(posteriors(batch * times, schedule)),
        "assistant_prior": draw(st.none() | st.tuples(st.floats(0.1, 9), st.floats(0.1, 9))),
        "assistant_discount": draw(st.floats(0, 1)),
        "assistant_share_posterior": share,
        "assistant_max_slowdown": draw(st.none() | st.sampled_from([0.0, 0.02]) | st.floats(0, 9)),
        "logits_processor": draw(
            st.none() | st.lists(st.sampled_from([favour, no_neighbours]), max_size=2)
        ),
        "stopping_criteria": draw(
            st.none() | st.lists(st.sampled_from([long_enough, even_pair]), max_size=2)
        ),
        "seed": draw(one_seed | st.lists(one_seed, min_size=batch * times, max_size=batch * times)),
        "streamer": Listener() if batch * times == 1 and draw(st.booleans()) else None,
    }
    return ids, mask, options


@MANY
@given(call=calls())
def test_any_valid_call(model: Model, call: tuple[Tensor, Tensor | None, dict[str, Any]]) -> None:
    ids, mask, options = call
    assert {field.name for field in dataclasses.fields(GenerationConfig)} <= set(options)
    before = trace(model)
    out = generate(model, ids, mask, return_dict_in_generate=True, **options)
    assert isinstance(out, GenerateOutput)
    assert trace(model) == before
    rows = ids.shape[0] * options["num_return_sequences"]
    check_text(model, ids, mask, options, out)
    check_statistics(options, out, rows)
    check_scores(options, out, ids.shape[1])
    listener = options.pop("streamer")
    if listener is not None:
        first = 0 if mask is None else int(mask[0].argmax())
        assert listener.heard == out.sequences[0, first:].tolist()
        assert listener.ended == 1
    assert torch.equal(generate(model, ids, mask, **options), out.sequences)
    if not options["do_sample"] or options["assistant_sampling"] == "coupled":
        plain = generate(model, ids, mask, **{**options, "num_assistant_tokens": 0})
        assert torch.equal(plain, out.sequences)
    event(f"finish: {sorted(set(out.finish_reasons))}")


def check_text(
    model: Model, ids: Tensor, mask: Tensor | None, options: dict[str, Any], out: GenerateOutput
) -> None:
    """Prompts kept, each text cut at its first end and not before, padding behind it."""
    text, width = out.sequences, ids.shape[1]
    ids = ids.repeat_interleave(options["num_return_sequences"], 0)
    if mask is not None:
        mask = mask.repeat_interleave(options["num_return_sequences"], 0)
    assert text.dtype is torch.int64
    assert torch.equal(text[:, :width], ids)
    assert bool(((text >= 0) & (text < VOCAB)).all())
    ends, strings = options["eos_token_id"], options["stop_strings"]
    ends = [ends] if isinstance(ends, int) else ends
    strings = [strings] if isinstance(strings, str) else strings
    stops = StopStrings(strings, model.tokenizer) if strings else None
    longest = 0
    for b, (row, reason) in enumerate(zip(text.tolist(), out.finish_reasons, strict=True)):
        start = 0 if mask is None else int(mask[b].argmax())
        for count in range(1, len(row) - width + 1):
            so_far = row[start : width + count]
            met = {
                "eos": so_far[-1] in ends,
                "stop_string": stops is not None and stops.end_in(so_far),
                "stopping_criteria": any(
                    [bool(c(torch.tensor([so_far]), None))
                     for c in options["stopping_criteria"] or []]
                ),
                "length": count == options["max_new_tokens"],
            }  # fmt: skip
            if any(met.values()):
                break
        assert reason == next(name for name, holds in met.items() if holds)
        assert set(row[width + count :]) <= {options["pad_token_id"]}
        longest = max(longest, count)
        new = row[width : width + count]
        assert not set(new[: options["min_new_tokens"]]) & set(ends)
        n = options["no_repeat_ngram_size"]
        grams = [tuple(so_far[i : i + n]) for i in range(len(so_far) - n + 1)] if n else []
        prompt = width - start - n + 1
        assert all(gram not in grams[:i] for i, gram in enumerate(grams) if i >= max(prompt, 0))
        if options["logits_processor"] and no_neighbours in options["logits_processor"]:
            pairs = zip(row[width - 1 : width + count - 1], new, strict=True)
            assert all(abs(a - b) != 1 for a, b in pairs)
    assert text.shape == (len(ids), width + longest)


def check_statistics(options: dict[str, Any], out: GenerateOutput, rows: int) -> None:
    """Counts add up to the texts; the posterior is one."""
    stats = out.speculative
    drafted, accepted = stats.per_step_drafted, stats.per_step_accepted
    assert len(drafted) == len(accepted) == len(stats.posterior) == rows
    for one, two in zip(drafted, accepted, strict=True):
        assert len(one) == len(two)
        assert all(0 <= m <= n for n, m in zip(one, two, strict=True))
        assert all(n <= options["num_assistant_tokens"] for n in one)
    emitted = sum(m + 1 for steps in accepted for m in steps)
    assert stats.num_spec_steps == sum(map(len, drafted)) == sum(stats.acceptance_histogram)
    assert stats.num_draft_tokens == sum(map(sum, drafted))
    assert stats.num_accepted_draft_tokens == sum(map(sum, accepted))
    assert 0 <= stats.draft_acceptance_rate <= 1 <= stats.mean_acceptance_length
    assert emitted == stats.num_spec_steps + stats.num_accepted_draft_tokens
    values = [value for pair in stats.posterior.marginal() for value in pair]
    assert all(math.isfinite(value) and value > 0 for value in values)
    if options["assistant_share_posterior"]:
        assert len(set(stats.posterior.marginal())) == 1


def check_scores(options: dict[str, Any], out: GenerateOutput, width: int) -> None:
    """One row a token, which it has not removed; greedy tokens are its best."""
    new = out.sequences[:, width:]
    assert (out.logits is None) != options["output_logits"]
    assert (out.scores is None) != options["output_scores"]
    for step, scores in enumerate(out.scores or ()):
        assert scores.shape == (len(new), VOCAB)
        for row, token in zip(scores, new[:, step].tolist(), strict=True):
            if bool((row > -torch.inf).any()):  # else the text has ended
                assert float(row[token]) > -math.inf
                if not options["do_sample"]:
                    assert float(row[token]) == float(row.max())
    if out.scores is not None:
        assert len(out.scores) == new.shape[1]


# --- invalid calls


def trace(model: Model) -> list[Any]:
    """What a call must leave as it is."""
    backbone = model.backbone
    tensors = [backbone.embedding, backbone.norm, backbone.lm_head, *backbone.rope]
    return [
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        dict(model.measured_costs),
        sorted(vars(model)),
        sorted(vars(backbone)),
        [(id(t), t._version) for t in tensors],
        [id(layer) for layer in backbone.layers],
    ]


NOT_INTEGERS = st.one_of(
    st.none(), st.booleans(), st.text(), st.floats(), st.lists(st.integers()), st.binary()
)
NOT_NUMBERS = st.one_of(st.none(), st.booleans(), st.text(), st.lists(st.floats()), st.binary())
NOT_BOOLEANS = st.one_of(st.none(), st.integers(), st.text(), st.floats())
TOO_LOW = st.integers(max_value=-1)
TOO_HIGH = st.integers(min_value=2**31)


def outside(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats().filter(lambda x: not low <= x <= high)


def not_up_to(high: float) -> st.SearchStrategy[float]:
    return st.floats().filter(lambda x: not 0 < x <= high)


def bad_answers() -> st.SearchStrategy[Any]:
    """Processors that answer something else than scores, behind one that does well."""
    wrong: list[Callable[[Tensor], Any]] = [
        lambda s: None,
        lambda s: s.tolist(),
        lambda s: s.double(),
        lambda s: s[0],
        lambda s: s[:, :-1],
        lambda s: s * torch.nan,
        lambda s: s + torch.inf,
        lambda s: s + torch.rand(()),
    ]
    return st.sampled_from(wrong).map(lambda answer: [favour, lambda ids, s: answer(s)])


def bad_verdicts() -> st.SearchStrategy[Any]:
    wrong = [None, 1, "yes", torch.tensor([1]), torch.tensor([True, False]), [True]]
    return st.sampled_from(wrong).map(lambda value: [lambda ids, scores: value])


class Unsteady:
    """Remembers how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores


BAD: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": NOT_INTEGERS | TOO_LOW | TOO_HIGH | st.just(0) | st.integers(64, 10**9),
    "min_new_tokens": NOT_INTEGERS | TOO_LOW | st.integers(LONGEST + 1, 10**9),
    "do_sample": NOT_BOOLEANS,
    "temperature": NOT_NUMBERS | not_up_to(2.0**127) | TOO_LOW,
    "top_k": NOT_INTEGERS | TOO_LOW | TOO_HIGH,
    "top_p": NOT_NUMBERS | not_up_to(1.0) | TOO_LOW | st.integers(2),
    "min_p": NOT_NUMBERS | outside(0.0, 1.0) | TOO_LOW | st.integers(2),
    "repetition_penalty": NOT_NUMBERS | not_up_to(2.0**127) | TOO_LOW,
    "no_repeat_ngram_size": NOT_INTEGERS | TOO_LOW | TOO_HIGH,
    "eos_token_id": st.one_of(
        st.text(), st.floats(), TOO_LOW, TOO_HIGH, st.sets(st.integers(0, 9)), st.booleans(),
        st.lists(TOO_LOW | TOO_HIGH | st.text() | st.booleans(), min_size=1),
    ),
    "pad_token_id": NOT_INTEGERS.filter(lambda x: x is not None) | TOO_LOW | TOO_HIGH,
    "stop_strings": st.one_of(
        st.just(""), st.integers(), st.binary(), st.booleans(),
        st.dictionaries(st.text(), st.text()),
        st.lists(st.just("") | st.integers() | st.binary(), min_size=1),
    ),
    "num_return_sequences": NOT_INTEGERS | TOO_LOW | TOO_HIGH | st.just(0),
    "output_scores": NOT_BOOLEANS,
    "output_logits": NOT_BOOLEANS,
    "num_assistant_tokens": NOT_INTEGERS | TOO_LOW | TOO_HIGH,
    "num_assistant_tokens_schedule": st.text() | st.none() | st.integers() | st.just("heuristic"),
    "draft": st.text() | st.none() | st.just("tree"),
    "assistant_confidence_threshold": NOT_NUMBERS | outside(0.0, 1.0) | TOO_LOW | st.integers(2),
    "assistant_sampling": st.text() | st.none() | st.just("deterministic"),
    "assistant_costs": st.one_of(
        st.integers(), st.text(), st.lists(st.floats()), st.just({}),
        st.dictionaries(st.text(), st.floats()),
        st.sampled_from(["prefix", "exit", "rest"]).flatmap(
            lambda name: st.sampled_from([-1.0, math.nan, math.inf, "a", None, (), (-1.0,)]).map(
                lambda value: {**COSTS, name: value}
            )
        ),
    ),
    "assistant_posterior": st.one_of(
        st.integers(), st.text(), st.tuples(st.floats(), st.floats()),
        st.integers(5, 40).map(lambda n: Posterior(torch.ones(13 * n), torch.ones(13 * n))),
        st.just(Posterior(torch.ones(1, 3), torch.ones(1, 3))),
    ),
    "assistant_prior": st.one_of(
        st.floats(), st.text(), st.just(()), st.lists(st.floats(1, 2), min_size=3),
        st.tuples(outside(1e-30, 1e30), st.just(1.0)), st.tuples(st.just(1.0), NOT_NUMBERS),
    ),
    "assistant_discount": NOT_NUMBERS | outside(0.0, 1.0) | TOO_LOW | st.integers(2),
    "assistant_share_posterior": NOT_BOOLEANS,
    "assistant_max_slowdown": st.text() | st.booleans() | outside(0.0, 1e6) | TOO_LOW,
    "logits_processor": st.one_of(
        st.integers(), st.text(), st.just(favour), st.lists(st.integers(), min_size=1),
        bad_answers(), st.builds(lambda: [favour, Unsteady()]),
    ),
    "stopping_criteria": st.one_of(
        st.integers(), st.text(), st.just(long_enough), st.lists(st.text(), min_size=1),
        bad_verdicts(),
    ),
    "seed": st.one_of(
        st.text(), st.floats(), st.booleans(), st.integers(min_value=2**63),
        st.integers(max_value=-(2**63) - 1), st.just([]), st.lists(st.integers(), min_size=13),
    ),
    "streamer": st.one_of(st.integers(), st.text(), st.builds(object)),
    "tokenizer": st.one_of(st.integers(), st.text(), st.builds(object)),
    "generation_config": st.one_of(st.integers(), st.dictionaries(st.text(), st.integers())),
    "exit_head": st.one_of(st.integers(), st.text(min_size=1)),
    "return_dict_in_generate": NOT_BOOLEANS,
    "assistant_early_exit": st.integers(),
    "an unknown name": st.integers(),
}  # fmt: skip

BAD_IDS = st.sampled_from(
    [
        None, [[1, 2]], torch.ones(2, 3), torch.tensor([1, 2]), torch.tensor([[[1]]]),
        torch.zeros(0, 3, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64),
        torch.tensor([[1, VOCAB]]), torch.tensor([[-1]]), torch.tensor([[True]]),
        torch.ones(1, POSITIONS, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int16),
        torch.ones(1, 3, dtype=torch.int64, device="meta"),
    ]
)  # fmt: skip
BAD_MASKS = st.sampled_from(
    [
        [[1]], "mask", torch.ones(9, 9), torch.ones(1), torch.tensor(1),
        lambda ids: torch.zeros_like(ids), lambda ids: torch.full_like(ids, 2),
        lambda ids: torch.full(ids.shape, 0.5), lambda ids: torch.full(ids.shape, math.nan),
        lambda ids: torch.cat((torch.ones_like(ids), torch.zeros_like(ids)), 1),
    ]
)  # fmt: skip


def test_every_option_has_bad_values() -> None:
    missing = {field.name for field in dataclasses.fields(GenerationConfig)} - set(BAD)
    assert missing == set()


@st.composite
def invalid_calls(draw: st.DrawFn) -> tuple[str, Any, Any, dict[str, Any]]:
    """A valid call with one thing wrong, and its name."""
    ids, mask, options = draw(calls())
    options["seed"] = None  # drawn from torch: it must not be missed afterwards
    name = draw(st.sampled_from([*BAD, "input_ids", "attention_mask"]))
    if name == "input_ids":
        return name, draw(BAD_IDS), None, options
    if name == "attention_mask":
        bad = draw(BAD_MASKS)
        return name, ids, bad(ids) if callable(bad) else bad, options
    options[name] = draw(BAD[name])
    return name, ids, mask, options


@MANY
@given(call=invalid_calls())
def test_any_invalid_call(model: Model, call: tuple[str, Any, Any, dict[str, Any]]) -> None:
    name, ids, mask, options = call
    listener = options["streamer"] if isinstance(options["streamer"], Listener) else None
    before = trace(model)
    with pytest.raises((TypeError, ValueError)) as info:
        generate(model, ids, mask, **options)
    assert trace(model) == before
    assert len(str(info.value)) > 10
    if name not in ("input_ids", "attention_mask"):
        assert name in str(info.value) or "max_new_tokens" in (name, *str(info.value).split(": "))
    if listener is not None:  # it was told nothing, or also that the text has ended
        assert listener.ended == bool(listener.heard)
    event(f"wrong: {name}")


def test_after_invalid_calls_texts_are_the_same(model: Model, tmp_path: Path) -> None:
    """What the traces do not show would show in a text: one of a model that saw no call."""
    ids = torch.tensor([[5, 9, 17], [21, 9, 8]])
    options = {"max_new_tokens": 14, "assistant_costs": COSTS, "do_sample": True, "seed": 2}
    fresh = load(model.folder, assistant_early_exit=1, device="cpu", dtype="float32")
    assert torch.equal(generate(model, ids, **options), generate(fresh, ids, **options))
