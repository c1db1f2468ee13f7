"""Rounds over static buffers, as CUDA graphs replay them: the text of rounds that run op by op.

Here `FixedRounds` take the place of graphs; tests/gpu/test_engine_cuda.py has the real ones.
"""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eesd.captures
from eesd import GenerateOutput, Model, generate, load
from eesd.cache import CacheTooLarge, KVCache
from eesd.captures import captured_capacity
from eesd.controller import Controller, CostTable
from eesd.graphs import FixedRounds, captured_lengths
from eesd.models import Llama
from eesd.round import Engine
from eesd.sampling import Sampling
from eesd_kernels import Law, Rule

PROMPTS = [torch.tensor([3, 9, 4, 11]), torch.tensor([5]), torch.tensor([7, 8, 30, 2, 1, 40])]
COUNT = 24


@pytest.fixture
def model(tiny_llama: Path) -> Model:
    return load(tiny_llama, assistant_early_exit=2, dtype="float32")


def fixed_texts(model: Model, rule: Rule, temperature: float, eos: Tensor) -> list[list[int]]:
    """New tokens of each prompt, two calls' worth of them over the same buffers; the last one's."""
    head, device = model.exit_head, torch.device("cpu")
    engine = Engine(model.backbone, head, model.backbone.new_cache(3, 40, exit_layers=1))

    def rules(seed: int) -> tuple[Sampling, Controller]:
        law = Law.COUPLED if temperature else Law.SAMPLED
        sampling = Sampling.uniform(
            [seed, seed + 1, seed + 2], device, temperature=temperature, law=law
        )
        costs = torch.linspace(1.0, 1.6, 5)
        return sampling, Controller(3, device, rule=rule, max_draft=4, prior=(2, 1), costs=costs)

    rounds = FixedRounds(engine, *rules(0), eos)
    for seed in (100, 5):
        state = engine.prefill(PROMPTS)
        state.remaining.fill_(COUNT)
        rounds.start(state, *rules(seed), eos)
        texts: list[list[int]] = [[], [], []]
        while bool(rounds.state.alive.any()):
            rounds.launch()
            rows = rounds.wait()
            for text, (*tokens, accepted, drafted, status) in zip(texts, rows, strict=True):
                assert status == 0
                if drafted >= 0:
                    text += tokens[: accepted + 1]
    return texts


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("rule", [Rule.CONSTANT, Rule.COST, Rule.BERNOULLI])
@torch.inference_mode()
def test_texts_are_generate_s(model: Model, rule: Rule, temperature: float) -> None:
    eos = torch.tensor([17, 23], dtype=torch.int32)
    for number, (prompt, got) in enumerate(
        zip(PROMPTS, fixed_texts(model, rule, temperature, eos), strict=True)
    ):
        want = generate(
            model, prompt[None], max_new_tokens=COUNT, num_assistant_tokens=0,
            eos_token_id=(17, 23), do_sample=temperature > 0, temperature=temperature or 1.0,
            seed=5 + number,
        )[0, len(prompt) :].tolist()  # fmt: skip
        end = next((i + 1 for i, t in enumerate(got) if t in (17, 23)), len(got))
        assert got[:end] == want


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have rounds run over static buffers from then on."""
    return lambda: monkeypatch.setattr(eesd.captures, "CAPTURES_ON_CPU", True)


COSTS = {"prefix": 0.2, "exit": 0.1, "rest": [1.0, 1.02, 1.04, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]}
SAMPLED = {"do_sample": True, "temperature": 0.8, "seed": [3, 1, 4]}
CONSTANT = {"num_assistant_tokens_schedule": "constant"}
CALLS: dict[str, dict[str, Any]] = {
    "thompson": {},
    "constant": {**CONSTANT, "num_assistant_tokens": 3},
    "bernoulli": {"num_assistant_tokens_schedule": "bernoulli"},
    "plain": {"num_assistant_tokens": 0},
    "longest": {**CONSTANT, "num_assistant_tokens": 11},
    "shared": {"assistant_share_posterior": True, "assistant_discount": 0.9},
    "ends": {"eos_token_id": (17, 23, 40)},
    "one token": {"max_new_tokens": 1},
    "sampled": SAMPLED,
    "filtered": {**SAMPLED, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "eos_token_id": (17, 23)},
    "coupled": {**SAMPLED, "assistant_sampling": "coupled"},
    "block": {**SAMPLED, "assistant_sampling": "block"},
    "sampled plain": {**SAMPLED, "num_assistant_tokens": 0},
    "strings": {**CONSTANT, "stop_strings": ("a", "e")},
    "sampled, strings": {**CONSTANT, **SAMPLED, "stop_strings": ("a", "e")},
    "criteria": {
        **CONSTANT, "stopping_criteria": [lambda ids, scores: int(ids[0, -1]) % 5 == 0],
    },
}  # fmt: skip


def batch_of(prompts: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask.long()}


def call(model: Model, prompts: list[Tensor] = PROMPTS, **options: Any) -> GenerateOutput:
    defaults: dict[str, Any] = {"max_new_tokens": COUNT, "eos_token_id": (), "seed": 7}
    if options.get("num_assistant_tokens", 8) <= 8:
        defaults["assistant_costs"] = COSTS
    out = generate(model, **batch_of(prompts), return_dict_in_generate=True, **(defaults | options))
    assert isinstance(out, GenerateOutput)
    return out


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_captured_rounds_write_what_others_write(
    model: Model, captured: Callable[[], None], options: dict[str, Any]
) -> None:
    want = call(model, **options)
    captured()
    for _ in range(2):  # the second over used buffers
        got = call(model, **options)
        assert torch.equal(got.sequences, want.sequences)
        assert got.finish_reasons == want.finish_reasons
        mine, theirs = got.speculative, want.speculative
        assert mine.per_step_drafted == theirs.per_step_drafted
        assert mine.per_step_accepted == theirs.per_step_accepted
        assert torch.equal(mine.posterior.alpha, theirs.posterior.alpha)
        assert torch.equal(mine.posterior.beta, theirs.posterior.beta)
        assert mine.costs == theirs.costs
        assert mine.engine is not None
        assert theirs.engine is not None
        assert (mine.engine.captured, theirs.engine.captured) == (True, False)
        assert mine.engine.rounds == theirs.engine.rounds == mine.engine.synchronisations
    assert len(model.captures) == 1


def test_strings_under_the_default_rule(model: Model, captured: Callable[[], None]) -> None:
    """A round is planned before the host has read the one before it: lengths may differ."""
    want = call(model, stop_strings=("a", "e"))
    captured()
    got = call(model, stop_strings=("a", "e"))
    assert torch.equal(got.sequences, want.sequences)
    assert got.finish_reasons == want.finish_reasons


def test_a_posterior_is_carried_on(model: Model, captured: Callable[[], None]) -> None:
    first = call(model).speculative.posterior
    want = call(model, assistant_posterior=first, assistant_prior=(3.0, 2.0))
    captured()
    call(model)
    got = call(model, assistant_posterior=first, assistant_prior=(3.0, 2.0))
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.speculative.posterior.alpha, want.speculative.posterior.alpha)


def test_costs_are_those_of_the_captured_rounds(model: Model, captured: Callable[[], None]) -> None:
    captured()
    out = call(model, assistant_costs=None, max_new_tokens=4)
    assert out.speculative.costs == CostTable(0.0, 0.0, tuple(1 + n / 10 for n in range(9)))


def test_a_streamer_sees_each_round(model: Model, captured: Callable[[], None]) -> None:
    class Keeps:
        def __init__(self) -> None:
            self.runs: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.runs.append(value.tolist())

        def end(self) -> None:
            self.runs.append([])

    want, got = Keeps(), Keeps()
    call(model, PROMPTS[:1], streamer=want)
    captured()
    call(model, PROMPTS[:1], streamer=got)
    assert got.runs == want.runs


@pytest.mark.parametrize(
    "options",
    [
        {"num_assistant_tokens_schedule": "calibrated"},
        {"assistant_confidence_threshold": 0.3},
        {"repetition_penalty": 1.2},
        {"output_scores": True},
        {"num_assistant_tokens": 65, "max_new_tokens": 9, "assistant_costs": None},
    ],
)
def test_what_runs_op_by_op(
    model: Model, captured: Callable[[], None], options: dict[str, Any]
) -> None:
    captured()
    out = call(model, **options)
    assert out.speculative.engine is not None
    assert not out.speculative.engine.captured
    assert not len(model.captures)


def test_captures_are_shared_outgrown_and_dropped(
    model: Model, captured: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eesd.captures, "MIN_CAPACITY", 8)
    captured()
    long, short = PROMPTS, PROMPTS[:1]

    def capacities() -> list[int]:
        return [rounds.capacity for rounds in model.captures.kept()]

    call(model, short, max_new_tokens=4)
    assert capacities() == [8]
    call(model, short, max_new_tokens=30)
    assert capacities() == [64]  # 34 slots needed: the one of 8 is outgrown
    call(model, short, max_new_tokens=5)
    assert capacities() == [64]
    call(model, short, max_new_tokens=33, num_assistant_tokens=0)
    first, second = model.captures.kept()
    assert first.engine.cache is second.engine.cache
    for count in (1, 2, 4):
        call(model, long, num_assistant_tokens=count)
    assert len(model.captures) == eesd.captures.MOST
    model.captures.clear()
    assert not len(model.captures)


def test_a_call_within_a_call_runs_op_by_op(model: Model, captured: Callable[[], None]) -> None:
    want = call(model, PROMPTS[1:2])
    captured()
    inner: list[GenerateOutput] = []

    class Calls:
        def put(self, value: Tensor) -> None:
            if not inner:
                inner.append(call(model, PROMPTS[1:2], assistant_costs=None))

        def end(self) -> None:
            worker = threading.Thread(target=lambda: inner.append(call(model, PROMPTS[1:2])))
            worker.start()
            worker.join()

    def again(ids: Tensor, scores: object) -> bool:
        if len(inner) == 1:
            inner.append(call(model, PROMPTS[1:2]))
        return False

    call(model, PROMPTS[:1], streamer=Calls(), stopping_criteria=[again])
    engines = [out.speculative.engine for out in inner]
    assert [engine is not None and engine.captured for engine in engines] == [True, False, True]
    for out in inner:
        assert torch.equal(out.sequences, want.sequences)


def test_an_error_leaves_the_captures_usable(model: Model, captured: Callable[[], None]) -> None:
    captured()

    def fails(ids: Tensor, scores: object) -> bool:
        raise OverflowError

    with pytest.raises(OverflowError):
        call(model, stopping_criteria=[fails])
    out = call(model)
    assert out.speculative.engine is not None
    assert out.speculative.engine.captured


@pytest.mark.parametrize(
    ("refusal", "named"), [(CacheTooLarge, "KV cache"), (torch.OutOfMemoryError, "out of memory")]
)
def test_short_of_memory(
    refusal: type[RuntimeError], named: str, model: Model, captured: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    captured()
    monkeypatch.setattr(eesd.captures, "MIN_CAPACITY", 8)
    call(model, PROMPTS[:1])
    made: list[int] = []
    limit, real = 40, Llama.new_cache

    def new_cache(self: Llama, batch: int, capacity: int, *, exit_layers: int) -> KVCache:
        made.append(capacity)
        if capacity > limit:
            raise refusal("the KV cache of ... does not fit")
        return real(self, batch, capacity, exit_layers=exit_layers)

    monkeypatch.setattr(Llama, "new_cache", new_cache)
    # 64 slots would be captured; twice refused, then the 36 that are needed.
    out = call(model, max_new_tokens=30)
    assert made == [64, 64, 36]
    assert out.speculative.engine is not None
    assert out.speculative.engine.captured
    assert len(model.captures) == 1
    with pytest.raises(RuntimeError, match=named):
        call(model, max_new_tokens=50)
    assert call(model, max_new_tokens=30).speculative.engine == out.speculative.engine


def test_a_copied_model_has_its_own(model: Model, captured: Callable[[], None]) -> None:
    captured()
    call(model)
    assert not len(copy.copy(model.captures))


def test_capacity_of_a_capture() -> None:
    assert captured_capacity(5, 4096) == 1024
    assert captured_capacity(1025, 4096) == 2048
    assert captured_capacity(3000, 3500) == 3500
    assert captured_capacity(64, 64) == 64


def test_lengths_of_a_capture() -> None:
    assert captured_lengths(0) == [0]
    assert captured_lengths(8) == list(range(9))
    assert captured_lengths(11) == [*range(9), 10, 11]
    assert captured_lengths(64)[-3:] == [32, 48, 64]
