"""The loop over rounds: checked arguments in, each sequence's transcript out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eesd.controller import PRIOR_WEIGHT, SCHEDULES, Controller, CostTable
from eesd.costs import measured_costs
from eesd.exit_head import ExitHead
from eesd.generation_config import GenerationConfig
from eesd.loading import Model
from eesd.processors import Processors
from eesd.round import CANDIDATES, Engine, RoundResult, Sampling
from eesd.scores import warped
from eesd.transcript import Stops, Transcript
from eesd_kernels import Law, Rule

LAWS = {"rejection": Law.SAMPLED, "coupled": Law.COUPLED, "block": Law.BLOCK}


class Streamer(Protocol):
    """The streamers of transformers: prompt and tokens come through `put`, then `end`."""

    def put(self, value: Tensor) -> None:
        """Take token ids `[n]` on the CPU."""

    def end(self) -> None:
        """The text is complete."""


@dataclass
class Decoder:
    """A call's engine, rules and books; `run` decodes.

    Raises:
        ValueError: from making one: costs or a posterior that do not fit the call.
    """

    model: Model
    head: ExitHead | None
    prompts: list[Tensor]
    config: GenerationConfig
    seeds: list[int]
    stops: Stops
    custom: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()

    def __post_init__(self) -> None:
        config, head, backbone = self.config, self.head, self.model.backbone
        self.device, batch = backbone.device, len(self.prompts)
        capacity = max(map(len, self.prompts)) + config.max_new_tokens
        # More than max_new_tokens - 1 drafts never fit; measuring them would leave the positions.
        max_draft = min(config.num_assistant_tokens, config.max_new_tokens - 1) if head else 0
        self.processors = self._processors(capacity)
        self.sampling = Sampling.uniform(
            self.seeds,
            self.device,
            temperature=config.temperature if config.do_sample else 0.0,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            # Plain decoding tests no draft, and its noise is the one that `coupled` promises.
            law=LAWS[config.assistant_sampling] if head else Law.COUPLED,
            draft_candidates=CANDIDATES if self.processors else None,
        )
        rule = SCHEDULES[config.num_assistant_tokens_schedule]
        costs = config.assistant_costs
        if head and costs is None and rule in (Rule.COST, Rule.CALIBRATED):
            costs = measured_costs(self.model, head, batch, max_draft, self.sampling)
        self.costs: CostTable | None = costs
        self.controller = Controller(
            batch,
            self.device,
            rule=rule,
            max_draft=max_draft,
            prior=config.assistant_prior or _prior(head),
            costs=costs.rounds(max_draft, self.device) if costs else None,
            exit_cost=costs.exit if costs else 0.0,
            discount=config.assistant_discount,
            posterior=config.assistant_posterior,
            shared=config.assistant_share_posterior,
            threshold=config.assistant_confidence_threshold,
            max_slowdown=config.assistant_max_slowdown,
        )
        cache = backbone.new_cache(batch, capacity, exit_layers=bool(head))
        self.engine = Engine(backbone, head, cache)

    def _processors(self, capacity: int) -> Processors | None:
        config, eos = self.config, self.stops.eos_ids
        least = config.min_new_tokens if eos else 0
        penalty, ngram = config.repetition_penalty, config.no_repeat_ngram_size
        if penalty == 1.0 and not (ngram or least or self.custom):
            return None
        return Processors(
            self.prompts, capacity, sorted(eos), repetition_penalty=penalty,
            no_repeat_ngram_size=ngram, min_new_tokens=least, custom=self.custom,
        )  # fmt: skip

    def run(self, streamer: Streamer | None) -> list[Transcript]:
        """Decode to the end. The streamer ends too where a processor or criterion raises."""
        if streamer is None:
            return self._rounds(None)
        streamer.put(self.prompts[0].cpu())
        try:
            return self._rounds(streamer)
        finally:
            streamer.end()

    def _rounds(self, streamer: Streamer | None) -> list[Transcript]:
        config, state = self.config, self.engine.prefill(self.prompts)
        state.remaining.fill_(config.max_new_tokens)
        eos = torch.tensor(sorted(self.stops.eos_ids), dtype=torch.int32, device=self.device)
        transcripts = [
            Transcript(
                prompt, self.stops,
                scores=[] if config.output_scores else None,
                logits=[] if config.output_logits else None,
            )
            for prompt in self.prompts
        ]  # fmt: skip
        while True:
            drafted = self.engine.plan(state, self.sampling, self.controller)
            result = self.engine.run_round(
                state, drafted, self.sampling, self.controller, eos, self.processors
            )
            packed = (result.num_accepted, result.drafted, result.status)
            host = torch.cat((result.token_ids, torch.stack(packed, 1)), 1).tolist()
            scores = self._scores(result) if config.output_scores else None
            logits = result.logits if config.output_logits else None
            for b, (*tokens, accepted, drafted, status) in enumerate(host):
                transcript = transcripts[b]
                if transcript.finish_reason is not None:
                    continue
                if status:
                    transcript.finish_reason = self._error(len(transcript.tokens))
                    continue
                kept = transcript.take(
                    tokens[: accepted + 1],
                    drafted,
                    scores=None if scores is None else scores[b],
                    logits=None if logits is None else logits[b],
                )
                if streamer is not None:
                    streamer.put(torch.tensor(kept))
            alive = [transcript.finish_reason is None for transcript in transcripts]
            if not any(alive):
                return transcripts
            state.alive = torch.tensor(alive, device=self.device)

    def _scores(self, result: RoundResult) -> Tensor:
        config = self.config
        if not config.do_sample:
            return result.scores
        return warped(result.scores, config.temperature, config.top_k, config.top_p, config.min_p)

    def _error(self, count: int) -> str:
        what = ", or no token left by the processors," if self.processors else ""
        return f"error: NaN or infinite logits{what} at new token {count}"


def _prior(head: ExitHead | None) -> tuple[float, float]:
    if head is None:
        return 1.0, 1.0
    return PRIOR_WEIGHT * head.config.prior_alpha, PRIOR_WEIGHT * head.config.prior_beta
