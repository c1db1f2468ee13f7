"""The text of a sequence as it grows, and what ends it: also in the middle of an accepted run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eesd.stop_strings import StopStrings

Criterion = Callable[[Tensor, tuple[Tensor, ...] | None], Any]


@dataclass(frozen=True)
class Stops:
    """What ends a sequence: an id, a string, a criterion, or its length."""

    max_new_tokens: int
    eos_ids: frozenset[int]
    strings: StopStrings | None = None
    criteria: Sequence[Criterion] = ()

    @property
    def read_text(self) -> bool:
        """Whether the prompt and the text before are needed."""
        return self.strings is not None or bool(self.criteria)

    def reason(
        self, prompt: Tensor, text: list[int], count: int, scores: list[Tensor] | None
    ) -> str | None:
        """Why a sequence of `count` new tokens ends with the last one; None: it goes on.

        text: prompt and new tokens where `read_text`, else the new tokens.
        """
        # Criteria see each token once, whatever else ends the text there.
        met = any([_criterion_met(c, prompt, text, scores) for c in self.criteria])
        if text[-1] in self.eos_ids:
            return "eos"
        if self.strings is not None and self.strings.end_in(text):
            return "stop_string"
        if met:
            return "stopping_criteria"
        return "length" if count >= self.max_new_tokens else None


def _criterion_met(
    criterion: Criterion, prompt: Tensor, text: list[int], scores: list[Tensor] | None
) -> bool:
    with torch.inference_mode(False), torch.no_grad():
        ids = torch.tensor([text], dtype=torch.int64, device="cpu")
        if prompt.device.type == "cuda":  # without a wait for the device
            ids = ids.pin_memory().to(prompt.device, non_blocking=True)
        answer = criterion(ids, None if scores is None else tuple(scores))
    if isinstance(answer, Tensor) and answer.dtype is torch.bool and answer.numel() == 1:
        return bool(answer)
    if isinstance(answer, (bool, np.bool_)):
        return bool(answer)
    name = getattr(criterion, "__qualname__", type(criterion).__name__)
    got = type(answer).__name__
    if isinstance(answer, Tensor):
        got = f"{answer.dtype} {list(answer.shape)}"
    raise TypeError(f"stopping_criteria: {name}: expected a bool or a bool tensor [1], got {got}")


@dataclass
class Transcript:
    """One sequence: its new tokens up to its end, its rounds, and its scores where asked for."""

    prompt: Tensor
    stops: Stops
    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    tokens: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self._text = self.prompt.tolist() if self.stops.read_text else []

    def take(
        self,
        run: list[int],
        drafted: int,
        *,
        scores: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> list[int]:
        """Add a round's accepted tokens and the one behind them; returns what was kept.

        scores, logits: `[T, V]`, a row a token of the run; None where they are not asked for.
        """
        kept: list[int] = []
        for i, token in enumerate(run):
            kept.append(token)
            self._text.append(token)
            for rows, into in ((scores, self.scores), (logits, self.logits)):
                if rows is not None and into is not None:
                    into.append(rows[i : i + 1].to(torch.float32, copy=True))
            count = len(self.tokens) + len(kept)
            self.finish_reason = self.stops.reason(self.prompt, self._text, count, self.scores)
            if self.finish_reason is not None:
                break
        self.tokens += kept
        self.drafted.append(drafted)
        self.accepted.append(min(len(run) - 1, len(kept)))
        return kept
