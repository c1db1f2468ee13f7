"""The loop over rounds: checked arguments in, each sequence's transcript out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eesd.captures import MAX_DRAFT, why_not
from eesd.controller import PRIOR_WEIGHT, SCHEDULES, Controller, CostTable
from eesd.costs import measured_costs
from eesd.exit_head import ExitHead
from eesd.generation_config import GenerationConfig
from eesd.graphs import FixedRounds, Rows
from eesd.loading import Model
from eesd.processors import Processors
from eesd.round import Engine, RoundResult, State
from eesd.sampling import CANDIDATES, Sampling
from eesd.scores import warped
from eesd.stats import EngineStats
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
    """A call's rules and books; `run` decodes.

    Rounds run captured, as CUDA graphs over buffers that the model keeps, where their draft lengths
    are planned before them and nobody wants to see their logits: no processors, no scores, neither
    the calibrated schedule nor a threshold of confidence. Else they run op by op, on the same
    kernels, and each draft step asks the device.

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
        config = self.config
        self.device = self.model.backbone.device
        self.capacity = max(map(len, self.prompts)) + config.max_new_tokens
        self.rule = SCHEDULES[config.num_assistant_tokens_schedule]
        self.processors = self._processors(self.capacity)
        self.eos = torch.tensor(sorted(self.stops.eos_ids), dtype=torch.int32, device=self.device)
        # More than max_new_tokens - 1 drafts never fit; measuring them would leave the positions.
        self.max_draft = min(config.num_assistant_tokens, config.max_new_tokens - 1)
        self.sampling = self._sampling()
        self.captures = self._captures()
        self.costs: CostTable | None = config.assistant_costs
        if self.captures:
            self.max_draft = self._captured_draft()
        elif self._weighs_costs and self.costs is None:
            self._measure()
        self.controller = self._controller()
        self.engine_stats = EngineStats(False, 0, None, 0.0, 0, 0)

    @property
    def _weighs_costs(self) -> bool:
        return self.head is not None and self.rule in (Rule.COST, Rule.CALIBRATED)

    def _measure(self) -> None:
        assert self.head is not None
        self.costs = measured_costs(
            self.model, self.head, len(self.prompts), self.max_draft, self.sampling
        )

    def _captures(self) -> bool:
        """Whether rounds may run captured."""
        config = self.config
        return (
            why_not(self.model.backbone) is None
            and self.processors is None
            and not (config.output_scores or config.output_logits)
            and (self.head is None or self.rule is not Rule.CALIBRATED)
            and (self.head is None or config.assistant_confidence_threshold == 0)
            and config.num_assistant_tokens <= MAX_DRAFT
        )

    def _captured_draft(self) -> int:
        """Largest draft length to capture: that of longer calls too, where there are costs."""
        most = min(self.config.num_assistant_tokens, self.model.config.max_position - 2)
        given = self.config.assistant_costs
        return max(0, self.max_draft if given and len(given.rest) <= most else most)

    def _sampling(self) -> Sampling:
        config = self.config
        return Sampling.uniform(
            self.seeds,
            self.device,
            temperature=config.temperature if config.do_sample else 0.0,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            # Plain decoding tests no draft, and its noise is the one that `coupled` promises.
            law=LAWS[config.assistant_sampling] if self.head else Law.COUPLED,
            draft_candidates=CANDIDATES if self.processors else None,
        )

    def _controller(self) -> Controller:
        config, costs = self.config, self.costs
        max_draft = self.max_draft if self.head else 0
        if costs is None and self.captures and self._weighs_costs:
            # They are measured on the captured rounds, which need some to be captured.
            costs = CostTable(prefix=1.0, exit=0.0, rest=(0.0,) * (max_draft + 1))
        return Controller(
            len(self.prompts),
            self.device,
            rule=self.rule,
            max_draft=max_draft,
            prior=config.assistant_prior or _prior(self.head),
            costs=costs.rounds(max_draft, self.device) if costs else None,
            exit_cost=costs.exit if costs else 0.0,
            discount=config.assistant_discount,
            posterior=config.assistant_posterior,
            shared=config.assistant_share_posterior,
            threshold=config.assistant_confidence_threshold,
            max_slowdown=config.assistant_max_slowdown,
        )

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
            return self._decode(None)
        streamer.put(self.prompts[0].cpu())
        try:
            return self._decode(streamer)
        finally:
            streamer.end()

    def _decode(self, streamer: Streamer | None) -> list[Transcript]:
        config = self.config
        transcripts = [
            Transcript(
                prompt, self.stops,
                scores=[] if config.output_scores else None,
                logits=[] if config.output_logits else None,
            )
            for prompt in self.prompts
        ]  # fmt: skip
        if self.captures:
            lent = self.model.captures.lend(
                self.model.backbone, self.head, lambda: (self._sampling(), self._controller()),
                self.eos, self.capacity,
            )  # fmt: skip
            with lent as rounds:
                if rounds is not None:
                    self._replay(rounds, transcripts, streamer)
                    return transcripts
            self.captures = False  # another call has them
            if self._weighs_costs and self.costs is None:
                self._measure()
            self.controller = self._controller()
        self._run(transcripts, streamer)
        return transcripts

    def _state(self, engine: Engine) -> State:
        state = engine.prefill(self.prompts)
        state.remaining.fill_(self.config.max_new_tokens)
        return state

    def _replay(
        self, rounds: FixedRounds, transcripts: list[Transcript], streamer: Streamer | None
    ) -> None:
        """Captured rounds. While one is written down the next one runs, where nothing but the
        device's own ends (an id, the length) can end a sequence."""
        if self._weighs_costs and self.costs is None:
            self.costs = rounds.costs()
            self.controller = self._controller()
        rounds.start(self._state(rounds.engine), self.sampling, self.controller, self.eos)
        ahead = not self.stops.read_text
        rounds.launch()
        while rounds.in_flight:
            rows = rounds.wait()
            if ahead and rounds.steps is not None:
                rounds.launch()
            ended = self._note(rows, transcripts, streamer)
            if not ahead and not all(ended):
                if any(end and alive for end, alive in zip(ended, rounds.alive, strict=True)):
                    rounds.leave_out(ended)
                rounds.launch()
        for mine, theirs in (
            (self.controller.alpha, rounds.controller.alpha),
            (self.controller.beta, rounds.controller.beta),
        ):
            mine.copy_(theirs)
        self.engine_stats = EngineStats(
            captured=True,
            rounds=rounds.rounds,
            synchronisations=rounds.synchronisations,
            capture_s=rounds.seconds_to_report(),
            capture_bytes=rounds.capture_bytes,
            cache_bytes=rounds.engine.cache.nbytes,
        )

    def _run(self, transcripts: list[Transcript], streamer: Streamer | None) -> None:
        """Rounds op by op."""
        config, backbone = self.config, self.model.backbone
        cache = backbone.new_cache(len(self.prompts), self.capacity, exit_layers=bool(self.head))
        engine, rounds = Engine(backbone, self.head, cache), 0
        state = self._state(engine)
        while True:
            drafted = engine.plan(state, self.sampling, self.controller)
            result = engine.run_round(
                state, drafted, self.sampling, self.controller, self.eos, self.processors
            )
            rounds += 1
            packed = (result.num_accepted, result.drafted, result.status)
            rows = torch.cat((result.token_ids, torch.stack(packed, 1)), 1).tolist()
            scores = self._scores(result) if config.output_scores else None
            logits = result.logits if config.output_logits else None
            ended = self._note(rows, transcripts, streamer, scores, logits)
            if all(ended):
                break
            state.alive = torch.tensor(ended, device=self.device).logical_not_()
        self.engine_stats = EngineStats(False, rounds, None, 0.0, 0, cache.nbytes)

    def _note(
        self,
        rows: Rows,
        transcripts: list[Transcript],
        streamer: Streamer | None,
        scores: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> list[bool]:
        """Write down a round, rows as of `FixedRounds.wait`; which sequences have ended."""
        for b, (*tokens, accepted, drafted, status) in enumerate(rows):
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
        return [transcript.finish_reason is not None for transcript in transcripts]

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
