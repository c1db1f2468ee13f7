"""Rounds as CUDA graphs: plain decoding's ids, one synchronisation a round, captures that last."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import eesd
import eesd.captures
from eesd import GenerateOutput, Model
from eesd.graphs import RoundGraphs

pytestmark = pytest.mark.gpu

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1003,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}
LENGTHS = (5, 1, 300, 17, 64, 2, 129, 33)
COSTS = {"prefix": 0.0, "exit": 0.0, "rest": [1 + n / 10 for n in range(9)]}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"do_sample": True, "temperature": 0.8, "assistant_sampling": "coupled"},
    "coupled, filtered": {
        "do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01,
        "assistant_sampling": "coupled",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def model(request: pytest.FixtureRequest) -> Model:
    return eesd.synthetic(CONFIG, agreement=0.7, exit_layer=2, device="cuda", dtype=request.param)


@pytest.fixture(scope="module")
def halves() -> Model:
    return eesd.synthetic(CONFIG, agreement=0.7, exit_layer=2, device="cuda", dtype="bfloat16")


def batch_of(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    generator, width = torch.Generator().manual_seed(3), max(lengths)
    ids = torch.randint(3, 1003, (len(LENGTHS), max(LENGTHS)), generator=generator)
    ids = ids[: len(lengths), -width:]  # the same prompt whatever the batch
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths])
    return {"input_ids": ids.cuda(), "attention_mask": mask.long().cuda()}


def call(model: Model, batch: int = 1, count: int = 48, **options: Any) -> GenerateOutput:
    defaults: dict[str, Any] = {"eos_token_id": (), "seed": list(range(50, 50 + batch))}
    out = eesd.generate(
        model, **batch_of(LENGTHS[:batch]), max_new_tokens=count, return_dict_in_generate=True,
        **(defaults | options),
    )  # fmt: skip
    assert isinstance(out, GenerateOutput)
    assert out.speculative.engine is not None
    return out


def new_ids(out: GenerateOutput, count: int = 48) -> Tensor:
    return out.sequences[:, -count:]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_ids_are_plain_decoding_s(model: Model, batch: int, mode: dict[str, Any]) -> None:
    plain = call(model, batch, num_assistant_tokens=0, **mode)
    assert plain.speculative.engine.captured
    for schedule in ("thompson", "constant", "bernoulli"):
        out = call(model, batch, num_assistant_tokens_schedule=schedule, **mode)
        assert out.speculative.engine.captured
        assert torch.equal(out.sequences, plain.sequences), schedule
        if schedule == "constant":
            assert out.speculative.num_accepted_draft_tokens > 0
    for b in range(batch):
        single = eesd.generate(
            model, batch_of(LENGTHS[:batch])["input_ids"][b : b + 1, -LENGTHS[b] :],
            max_new_tokens=48, num_assistant_tokens=0, eos_token_id=(), seed=[50 + b], **mode,
        )  # fmt: skip
        assert torch.equal(single[0, -48:], new_ids(plain)[b]), b


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_assistant_tokens": 0},
        {"num_assistant_tokens_schedule": "constant", "eos_token_id": tuple(range(3, 40))},
        {"do_sample": True, "num_assistant_tokens_schedule": "constant"},
        {"do_sample": True, "top_p": 0.9, "assistant_sampling": "block"},
        {"assistant_share_posterior": True},
    ],
    ids=["greedy", "plain", "ends", "sampled", "block", "shared"],
)
def test_graphs_write_what_ops_write(
    halves: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    options = {"assistant_costs": COSTS, **options}
    got = call(halves, 3, **options)
    again = call(halves, 3, **options)
    monkeypatch.setattr(eesd.decoding, "why_not", lambda _: "a test")
    want = call(halves, 3, **options)
    assert got.speculative.engine.captured
    assert not want.speculative.engine.captured
    for out in (got, again):
        assert torch.equal(out.sequences, want.sequences)
        assert out.speculative.per_step_drafted == want.speculative.per_step_drafted
        torch.testing.assert_close(
            out.speculative.posterior.alpha, want.speculative.posterior.alpha
        )


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Waits of the rounds; any other in a call's rounds raises."""
    counted = [0]
    start, wait, finish = RoundGraphs.start, RoundGraphs._synchronise, RoundGraphs.finish

    def starts(self: RoundGraphs, *args: Any) -> None:
        start(self, *args)
        counted[0] = 0
        torch.cuda.set_sync_debug_mode("error")

    def counts(self: RoundGraphs) -> None:
        counted[0] += 1
        wait(self)

    def finishes(self: RoundGraphs) -> None:
        torch.cuda.set_sync_debug_mode("default")
        finish(self)

    for name, function in (("start", starts), ("_synchronise", counts), ("finish", finishes)):
        monkeypatch.setattr(RoundGraphs, name, function)
    yield counted
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_assistant_tokens": 0},
        {"num_assistant_tokens_schedule": "constant"},
        {"do_sample": True, "top_p": 0.9},
        {"stopping_criteria": [lambda ids, scores: ids.shape[1] % 40 == 0]},  # reads nothing there
    ],
    ids=["greedy", "plain", "constant", "sampled", "criteria"],
)
def test_one_synchronisation_a_round(
    halves: Model, waits: list[int], batch: int, options: dict[str, Any]
) -> None:
    engine = call(halves, batch, **options).speculative.engine
    assert engine.captured
    assert waits[0] == engine.synchronisations == engine.rounds > 0


def test_captures_last_and_grow(halves: Model) -> None:
    halves.captures.clear()
    first = call(halves, 3)
    assert first.speculative.engine.capture_s > 0
    assert first.speculative.engine.cache_bytes > 0
    second = call(halves, 3, count=16)
    assert second.speculative.engine.capture_s == 0
    (rounds,) = halves.captures.kept()
    assert rounds.capacity == 1024
    long = call(halves, 3, count=1200)
    (rounds,) = halves.captures.kept()
    assert rounds.capacity == 2048
    assert torch.equal(new_ids(long, 1200)[:, :48], new_ids(first))
    plain = call(halves, 3, count=1200, num_assistant_tokens=0)
    assert torch.equal(plain.sequences, long.sequences)
    assert len(halves.captures) == 2
    with pytest.raises(ValueError, match="positions"):
        call(halves, 3, count=4096)


def test_memory_is_given_back(halves: Model) -> None:
    halves.captures.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    call(halves, 8)
    held = torch.cuda.memory_reserved() - before
    assert held >= call(halves, 8).speculative.engine.cache_bytes
    halves.captures.clear()
    assert torch.cuda.memory_reserved() - before < held / 4


def test_costs_are_measured_and_repeatable(halves: Model) -> None:
    out = call(halves, 2)
    costs = out.speculative.costs
    assert costs is not None
    assert (costs.prefix, costs.exit, len(costs.rest)) == (0.0, 0.0, 9)
    assert 0 < costs.rest[0] <= costs.rest[8]
    again = call(halves, 2, assistant_costs=costs)
    assert again.speculative.per_step_drafted == out.speculative.per_step_drafted


def test_seeds(halves: Model) -> None:
    options = {"do_sample": True, "assistant_costs": COSTS}
    one, two = (call(halves, 3, **options) for _ in range(2))
    assert torch.equal(one.sequences, two.sequences)
    other = call(halves, 3, seed=[1, 2, 3], **options)
    assert not torch.equal(one.sequences, other.sequences)


def test_stop_strings_end_where_they_end(halves: Model) -> None:
    ends: list[Callable[..., bool]] = [lambda ids, scores: int(ids[0, -1]) % 40 == 0]
    plain = call(halves, 3, num_assistant_tokens=0, stopping_criteria=ends)
    out = call(halves, 3, stopping_criteria=ends)
    assert out.finish_reasons == plain.finish_reasons
    assert torch.equal(out.sequences, plain.sequences)


def test_a_cache_without_memory_is_refused(halves: Model) -> None:
    with pytest.raises(RuntimeError, match="KV cache of 4000000 sequences"):
        halves.backbone.new_cache(4_000_000, 4096, exit_layers=1)


def test_a_capture_without_memory_takes_what_is_needed(
    halves: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves.captures.clear()
    monkeypatch.setattr(eesd.captures, "captured_capacity", lambda *_: 2**33)
    call(halves, 2)
    (rounds,) = halves.captures.kept()
    assert rounds.capacity == 53
    halves.captures.clear()


@pytest.mark.parametrize("head_size", [32, 80, 128, 288])
def test_head_sizes(head_size: int) -> None:
    model = eesd.synthetic(
        {**CONFIG, "head_dim": head_size, "architectures": ["Qwen3ForCausalLM"]},
        agreement=0.8, exit_layer=2, device="cuda", dtype="bfloat16",
    )  # fmt: skip
    plain, out = call(model, 2, 24, num_assistant_tokens=0), call(model, 2, 24)
    assert out.speculative.engine.captured == (head_size <= eesd.captures.LARGEST_HEAD)
    if head_size <= eesd.captures.LARGEST_HEAD:
        assert torch.equal(out.sequences, plain.sequences)
