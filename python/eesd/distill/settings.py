"""What a distillation run is asked for and what it gives back; free of torch, for quick help."""

import math
from dataclasses import dataclass
from pathlib import Path

LOSSES = ("kl", "tv", "mixed")
DEFAULT_STEPS = 2000  # where neither steps nor seconds are given
DEFAULT_SEQ_LEN = 1024
# 2e-3 at a width of 192, falling as 1 / width: 9.4e-5 at 4,096.
LR_TIMES_HIDDEN = 0.384
DRAFT_LENGTH = 5  # of the greedy drafts that an evaluation simulates
# An agreement that is less than this share of the way from guessing the backbone's most frequent
# token to perfect is called near chance.
CHANCE_MARGIN = 0.1


@dataclass(frozen=True)
class DistillSettings:
    """How to train. Everything here decides the weights, so a resumed run must repeat it.

    loss: `kl` forward KL(backbone || exit); `tv` total variation, which is 1 - the chance that
        rejection sampling accepts a draft; `mixed` their mean.
    temperature: both distributions are softmax(logits / temperature) in the loss.
    steps, seconds: the run ends at the first of both to be reached; 2,000 steps where neither is
        given. seconds count from the start of the call, loading and evaluation included.
    batch: sequences a step. micro_batch: so many of them at a time (default: all).
    seq_len: tokens a sequence; default 1,024 or the backbone's max_position, if that is less.
    lr: peak learning rate; default 0.384 / hidden size. It warms up for `warmup` steps (a tenth
        of the run at most) and falls to 0 along a cosine of the progress.
    clip: largest gradient norm. weight_decay: on matrices.
    own_lm_head: train a copy of the backbone's LM head too.
    eval_sequences: most held-out sequences of an evaluation.
    """

    loss: str = "kl"
    temperature: float = 1.0
    steps: int | None = None
    seconds: float | None = None
    batch: int = 32
    micro_batch: int | None = None
    seq_len: int | None = None
    lr: float | None = None
    warmup: int = 100
    clip: float = 1.0
    weight_decay: float = 0.01
    own_lm_head: bool = False
    eval_sequences: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        for name in ("steps", "batch", "micro_batch", "seq_len", "eval_sequences"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("temperature", "seconds", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        for name in ("warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(
                f"micro_batch: expected a divisor of batch = {self.batch}, got {self.micro_batch}"
            )


@dataclass(frozen=True)
class DistillResult:
    """What was measured of a finished head on held-out text.

    agreement: share of positions where the exit's best token is the backbone's.
    agreement_before: the same before training (the backbone's last layer on `h_N`).
    sampled_acceptance: mean of sum(min(p, q)), the chance to accept at temperature 1.
    mean_acceptance_length: tokens a round of greedy drafts of 5, with the bonus token.
    most_frequent: the agreement that always guessing one token would have.
    near_chance: the agreement is not well above that; the head is of little use.
    """

    out: Path
    steps: int
    tokens: int
    seconds: float
    loss: float
    agreement: float
    agreement_before: float
    sampled_acceptance: float
    mean_acceptance_length: float
    most_frequent: float
    near_chance: bool
    prior_alpha: float
    prior_beta: float
