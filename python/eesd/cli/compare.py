"""Speculative and plain decoding of one prompt, timed in turn."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eesd.cache import Block
from eesd.generation import GenerateOutput, generate
from eesd.generation_config import GenerationConfig
from eesd.loading import Model
from eesd.round import Engine

_WARM_UP_TOKENS = 4


@dataclass
class Difference:
    """The first new token, counted from 0, at which greedy texts part.

    logit_gap is what plain decoding's logits at that position hold between the two tokens: about 0
    where rounding decided.
    """

    position: int
    logit_gap: float | None


@dataclass
class Comparison:
    """Medians over `repeats` runs of each kind; `plain` is the plain output."""

    plain: GenerateOutput
    repeats: int
    tokens_per_s: float
    plain_tokens_per_s: float
    ids_equal: bool
    difference: Difference | None

    @property
    def speedup(self) -> float:
        """Tokens a second over plain decoding's."""
        return self.tokens_per_s / self.plain_tokens_per_s


def run_timed(
    model: Model, ids: Tensor, config: GenerationConfig, seed: int, streamer: Any = None
) -> tuple[GenerateOutput, float]:
    """The output and its tokens a second, the prompt's prefill included."""
    _synchronise(model)
    start = time.perf_counter()
    output = generate(
        model, ids, generation_config=config, seed=seed, streamer=streamer,
        return_dict_in_generate=True,
    )  # fmt: skip
    _synchronise(model)
    seconds = time.perf_counter() - start
    assert isinstance(output, GenerateOutput)
    if output.finish_reasons[0].startswith("error"):
        raise RuntimeError(output.finish_reasons[0].removeprefix("error: "))
    return output, (output.sequences.shape[1] - ids.shape[1]) / seconds


def warm_up(model: Model, ids: Tensor, config: GenerationConfig) -> None:
    """A few tokens, untimed: allocations, threads, and the round costs that are measured once."""
    few = config.updated(
        {"max_new_tokens": min(_WARM_UP_TOKENS, config.max_new_tokens), "min_new_tokens": 0}
    )
    run_timed(model, ids[:, -_WARM_UP_TOKENS:], few, 0)


def plain_config(config: GenerationConfig) -> GenerationConfig:
    """The same text without drafting."""
    return config.updated({"num_assistant_tokens": 0})


def compare(
    model: Model,
    ids: Tensor,
    config: GenerationConfig,
    seed: int,
    repeats: int,
    speculative: GenerateOutput,
) -> Comparison:
    """Time both kinds `repeats` times, alternating; `speculative` is an earlier run's output."""
    plain = plain_config(config)
    warm_up(model, ids, plain)
    speeds: list[float] = []
    plain_speeds: list[float] = []
    for _ in range(repeats):
        reference, speed = run_timed(model, ids, plain, seed)
        plain_speeds.append(speed)
        speeds.append(run_timed(model, ids, config, seed)[1])
    equal = torch.equal(speculative.sequences, reference.sequences)
    return Comparison(
        reference,
        repeats,
        statistics.median(speeds),
        statistics.median(plain_speeds),
        equal,
        None if equal else _first_difference(model, ids, speculative, reference, config),
    )


def _first_difference(
    model: Model,
    ids: Tensor,
    speculative: GenerateOutput,
    plain: GenerateOutput,
    config: GenerationConfig,
) -> Difference:
    got, want = speculative.sequences[0].tolist(), plain.sequences[0].tolist()
    pairs = list(zip(got, want, strict=False))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    if config.do_sample or at == len(pairs):
        return Difference(at - ids.shape[1], None)
    logits = plain_logits(model, plain.sequences[0, :at])
    return Difference(at - ids.shape[1], float(logits[want[at]] - logits[got[at]]))


@torch.inference_mode()
def plain_logits(model: Model, prefix: Tensor) -> Tensor:
    """Logits `[V]` behind a prefix, its last token run alone as plain decoding runs it."""
    cache = model.backbone.new_cache(1, len(prefix) + 1, exit_layers=0)
    engine = Engine(model.backbone, None, cache)
    state = engine.prefill([prefix])
    block = Block(state.length, torch.ones_like(state.length))
    hidden = engine.rest(engine.prefix(state.pending[:, None], block), block)
    return model.backbone.logits(hidden)[0, 0].float()


def _synchronise(model: Model) -> None:
    if model.backbone.device.type == "cuda":
        torch.cuda.synchronize(model.backbone.device)
