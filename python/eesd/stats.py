"""What speculation did in a call: counts under the names that vLLM uses, and the posterior."""

from dataclasses import dataclass

from eesd.controller import CostTable
from eesd.posterior import Posterior


@dataclass(frozen=True)
class EngineStats:
    """How a call's rounds ran.

    captured: over static buffers, as CUDA graphs; else op by op. rounds: of the whole batch.
    synchronisations: times the host waited for the device in these rounds; None op by op, where
    each draft step asks. capture_s: seconds that this call took to capture and time its rounds, 0
    where an earlier call had. capture_bytes, cache_bytes: device memory that these rounds and their
    cache hold.
    """

    captured: bool
    rounds: int
    synchronisations: int | None
    capture_s: float
    capture_bytes: int
    cache_bytes: int


@dataclass
class SpeculativeStats:
    """Counts over all sequences of a call, of the text as returned (cut at its end).

    per_step_drafted and per_step_accepted hold one list a sequence. posterior is the controller's
    as it left it (it sees rounds uncut), for `assistant_posterior` of a later call. costs is the
    table used; None: no rule asked for one. Measured on captured rounds it has their times in
    `rest`, prefix and exit 0.
    """

    per_step_drafted: list[list[int]]
    per_step_accepted: list[list[int]]
    posterior: Posterior
    costs: CostTable | None = None
    engine: EngineStats | None = None

    @property
    def num_spec_steps(self) -> int:
        """Rounds, summed over sequences."""
        return sum(len(steps) for steps in self.per_step_drafted)

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens verified."""
        return sum(map(sum, self.per_step_drafted))

    @property
    def num_accepted_draft_tokens(self) -> int:
        """Draft tokens accepted."""
        return sum(map(sum, self.per_step_accepted))

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens a round with the bonus or correction; 1 is plain decoding's."""
        return 1.0 + self.num_accepted_draft_tokens / max(1, self.num_spec_steps)

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of draft tokens accepted; 0 where none was drafted."""
        return self.num_accepted_draft_tokens / max(1, self.num_draft_tokens)

    @property
    def acceptance_histogram(self) -> list[int]:
        """Rounds by number of accepted draft tokens, from 0 on."""
        counts: dict[int, int] = {}
        for steps in self.per_step_accepted:
            for accepted in steps:
                counts[accepted] = counts.get(accepted, 0) + 1
        return [counts.get(n, 0) for n in range(max(counts, default=-1) + 1)]
