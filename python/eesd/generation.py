"""`generate`: checked arguments in, token ids out; the loop over rounds."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eesd.controller import PRIOR_WEIGHT, SCHEDULES, Controller, CostTable
from eesd.costs import measured_costs
from eesd.exit_head import ExitHead
from eesd.generation_config import GenerationConfig
from eesd.loading import Model
from eesd.prompts import check_prompts, sequence_seeds
from eesd.round import Engine, Sampling
from eesd.stats import SpeculativeStats
from eesd_kernels import Law, Rule

LAWS = {"rejection": Law.SAMPLED, "coupled": Law.COUPLED}
HOPELESS, ENOUGH = 0.05, 64
"""Acceptance below which, after so many drafts, a call says that its exit head does not fit."""


class Streamer(Protocol):
    """The streamers of transformers: prompt and tokens come through `put`, then `end`."""

    def put(self, value: Tensor) -> None:
        """Take token ids `[n]` on the CPU."""

    def end(self) -> None:
        """The text is complete."""


@dataclass
class GenerateOutput:
    """sequences `[B, P + n]` int64 with the prompt; finish_reasons: eos, length, or error."""

    sequences: Tensor
    finish_reasons: list[str]
    speculative: SpeculativeStats


class _Transcript:
    """The emitted tokens of one sequence, cut at its end."""

    def __init__(self, limit: int, eos: frozenset[int]) -> None:
        self.tokens: list[int] = []
        self.drafted: list[int] = []
        self.accepted: list[int] = []
        self.finish_reason: str | None = None
        self._limit, self._eos = limit, eos

    def take(self, run: list[int], drafted: int) -> list[int]:
        """Add a round's accepted tokens and the one behind them; returns what was kept."""
        accepted = len(run) - 1
        end = next((i for i, token in enumerate(run) if token in self._eos), None)
        if end is not None:
            run, self.finish_reason = run[: end + 1], "eos"
        self.tokens += run
        self.drafted.append(drafted)
        self.accepted.append(min(accepted, len(run)))
        if self.finish_reason is None and len(self.tokens) >= self._limit:
            self.finish_reason = "length"
        return run


def generate(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    exit_head: ExitHead | None = None,
    streamer: Streamer | None = None,
    seed: int | Sequence[int] | None = None,
    return_dict_in_generate: bool = False,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """Continue prompts by early-exit speculative decoding.

    The text has exactly the distribution of plain autoregressive decoding of the same model
    (greedy: exactly its tokens); the exit head only makes it faster.

    Args:
        model: from `eesd.load`.
        input_ids: `[B, P]` int64 or int32 token ids, left-padded where lengths differ.
        attention_mask: `[B, P]`, 0 for left padding and 1 for the prompt. None: no padding.
        generation_config: defaults for the fields of `GenerationConfig`; keyword arguments of
            the same names go before it.
        exit_head: another exit head for this model.
        streamer: `put()` gets the prompt, then each round's tokens; `end()`. One sequence only.
        seed: of sampling: one integer (sequence 0 takes it, the others are derived), or one a
            sequence. None draws from torch's default generator.
        return_dict_in_generate: return a `GenerateOutput` with statistics instead of ids.

    Returns:
        `[B, P + n]` int64 ids, prompts included, padded on the right after a sequence's end.

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range, by name.
        RuntimeError: the model gave NaN or infinite logits. With `return_dict_in_generate` the
            sequence's finish reason says so instead, and the others are complete.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a model of eesd.load, got {type(model).__name__}")
    for name, given, kind in (
        ("generation_config", generation_config, GenerationConfig),
        ("exit_head", exit_head, ExitHead),
    ):
        if not isinstance(given, kind | None):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(given).__name__}")
    config = (generation_config or GenerationConfig()).updated(kwargs)
    if isinstance(input_ids, Tensor) and input_ids.device != model.backbone.device:
        raise ValueError(
            f"input_ids: expected device {model.backbone.device} as the model's, "
            f"got {input_ids.device}"
        )
    prompts = check_prompts(model.config, input_ids, attention_mask, config.max_new_tokens)
    if streamer is not None and len(prompts) != 1:
        raise ValueError(f"streamer: expected one sequence, got {len(prompts)}")
    head = _head(model, exit_head, config)
    seeds = sequence_seeds(seed, len(prompts))
    eos = config.eos_token_id
    eos_ids = model.config.eos_token_ids if eos is None else (eos,) if isinstance(eos, int) else eos
    with torch.inference_mode(), _one_runtime(model):
        transcripts, controller, costs = _decode(
            model, head, prompts, config, seeds, frozenset(eos_ids), streamer
        )
    pad = config.pad_token_id
    if pad is None:
        own = model.config.pad_token_id
        pad = own if own is not None else eos_ids[0] if eos_ids else 0
    longest = max(len(t.tokens) for t in transcripts)
    rows = [t.tokens + [pad] * (longest - len(t.tokens)) for t in transcripts]
    new = torch.tensor(rows, dtype=torch.int64, device=input_ids.device).view(len(rows), longest)
    sequences = torch.cat((input_ids.to(torch.int64), new), 1)
    reasons = [t.finish_reason or "length" for t in transcripts]
    stats = SpeculativeStats(
        [t.drafted for t in transcripts],
        [t.accepted for t in transcripts],
        controller.marginal(),
        costs,
    )
    if stats.num_draft_tokens >= ENOUGH and stats.draft_acceptance_rate < HOPELESS:
        warnings.warn(
            f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} draft tokens were "
            "accepted: the exit head does not fit this text or this model, and drafting costs "
            "more than it brings",
            stacklevel=2,
        )
    if return_dict_in_generate:
        return GenerateOutput(sequences, reasons, stats)
    for b, reason in enumerate(reasons):
        if reason.startswith("error"):
            raise RuntimeError(f"sequence {b}: {reason}")
    return sequences


@contextmanager
def _one_runtime(model: Model) -> Iterator[None]:
    """Keep torch's threads out of the way of the C++ library's during a float32 CPU call.

    What torch does there is small; its pool and ours on the same cores delay each other.
    """
    threads = torch.get_num_threads()
    ours = model.backbone.device.type == "cpu" and model.backbone.dtype is torch.float32
    if ours:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if ours:
            torch.set_num_threads(threads)


def _head(model: Model, given: ExitHead | None, config: GenerationConfig) -> ExitHead | None:
    """The head to draft with; None for plain decoding."""
    if config.num_assistant_tokens == 0:
        return None
    head = given or model.exit_head
    if head is None:
        raise ValueError(
            f"{model.name}: has no exit head; give exit_head, load the model with "
            "assistant_early_exit, train one (eesd distill), or decode plainly with "
            "num_assistant_tokens=0"
        )
    if head.config.backbone_fingerprint != model.fingerprint:
        raise ValueError("exit_head: belongs to a backbone with other weights than the model's")
    return head


def _prior(head: ExitHead | None) -> tuple[float, float]:
    if head is None:
        return 1.0, 1.0
    return PRIOR_WEIGHT * head.config.prior_alpha, PRIOR_WEIGHT * head.config.prior_beta


def _decode(
    model: Model,
    head: ExitHead | None,
    prompts: list[Tensor],
    config: GenerationConfig,
    seeds: list[int],
    eos_ids: frozenset[int],
    streamer: Streamer | None,
) -> tuple[list[_Transcript], Controller, CostTable | None]:
    backbone, batch = model.backbone, len(prompts)
    # More than max_new_tokens - 1 drafts never fit; measuring them would leave the positions.
    max_draft = min(config.num_assistant_tokens, config.max_new_tokens - 1) if head else 0
    sampling = Sampling.uniform(
        seeds,
        backbone.device,
        temperature=config.temperature if config.do_sample else 0.0,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        # Plain decoding tests no draft, and its noise is the one that `coupled` promises.
        law=LAWS[config.assistant_sampling] if head else Law.COUPLED,
    )
    rule = SCHEDULES[config.num_assistant_tokens_schedule]
    costs = config.assistant_costs
    if head and costs is None and rule in (Rule.COST, Rule.CALIBRATED):
        costs = measured_costs(model, head, batch, max_draft, sampling)
    controller = Controller(
        batch,
        backbone.device,
        rule=rule,
        max_draft=max_draft,
        prior=_prior(head),
        costs=costs.rounds(max_draft, backbone.device) if costs else None,
        exit_cost=costs.exit if costs else 0.0,
    )
    capacity = max(map(len, prompts)) + config.max_new_tokens
    engine = Engine(backbone, head, backbone.new_cache(batch, capacity, exit_layers=bool(head)))
    state = engine.prefill(prompts)
    state.remaining.fill_(config.max_new_tokens)
    eos = torch.tensor(sorted(eos_ids), dtype=torch.int32, device=backbone.device)
    transcripts = [_Transcript(config.max_new_tokens, eos_ids) for _ in prompts]
    if streamer is not None:
        streamer.put(prompts[0].cpu())
    while True:
        result = engine.run_round(state, sampling, controller, eos)
        host = torch.cat(
            (
                result.token_ids,
                torch.stack((result.num_accepted, result.drafted, result.status), 1),
            ),
            1,
        ).tolist()
        for transcript, (*tokens, accepted, drafted, status) in zip(transcripts, host, strict=True):
            if transcript.finish_reason is not None:
                continue
            if status:
                where = len(transcript.tokens)
                transcript.finish_reason = f"error: NaN or infinite logits at new token {where}"
                continue
            kept = transcript.take(tokens[: accepted + 1], drafted)
            if streamer is not None:
                streamer.put(torch.tensor(kept))
        alive = [transcript.finish_reason is None for transcript in transcripts]
        if not any(alive):
            break
        state.alive = torch.tensor(alive, device=backbone.device)
    if streamer is not None:
        streamer.end()
    return transcripts, controller, costs
