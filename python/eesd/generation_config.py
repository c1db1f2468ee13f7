"""The arguments of `generate`, checked: names and meanings of `transformers` where it has them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eesd.controller import SCHEDULES, CostTable

NOT_YET = (
    "min_new_tokens",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "stop_strings",
    "num_return_sequences",
    "output_scores",
    "stopping_criteria",
    "logits_processor",
    "tokenizer",
    "assistant_confidence_threshold",
)
"""Arguments that users of transformers know and that are refused by name until they work."""


_INT32 = 2**31 - 1
_FLOAT32 = 2.0**127


@dataclass(frozen=True)
class GenerationConfig:
    """What `generate` does besides the model and the prompt.

    max_new_tokens: tokens to emit at most, exact also inside an accepted draft.
    do_sample, temperature, top_k (0: off), top_p (1: off), min_p (0: off): the target's law;
        without do_sample decoding is greedy. Ties at a threshold are kept.
    eos_token_id: one id, several, or None for the model's own; () for none.
    pad_token_id: fills finished rows; None: the model's, else its first eos, else 0.
    num_assistant_tokens: largest draft length; 0 is plain autoregressive decoding.
    num_assistant_tokens_schedule: thompson (the default rule), cost, calibrated, bernoulli or
        constant.
    draft: linear.
    assistant_sampling: rejection (Leviathan et al. 2023), or coupled, where sampled text equals
        plain sampling's with the same seed token for token.
    assistant_costs: milliseconds of a round's parts (`prefix`, `exit`, `rest`) to use instead of
        measuring them, so that a run can be repeated; see `CostTable`.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    num_assistant_tokens: int = 8
    num_assistant_tokens_schedule: str = "thompson"
    draft: str = "linear"
    assistant_sampling: str = "rejection"
    assistant_costs: CostTable | None = None

    def __post_init__(self) -> None:
        self._integer("max_new_tokens", 1)
        self._integer("top_k", 0)
        self._integer("num_assistant_tokens", 0)
        self._number("temperature", 0.0, _FLOAT32, "above 0 and finite", low_open=True)
        self._number("top_p", 0.0, 1.0, "above 0, at most 1", low_open=True)
        self._number("min_p", 0.0, 1.0, "0 to 1")
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"do_sample: expected True or False, got {self.do_sample!r}")
        self._one_of("num_assistant_tokens_schedule", tuple(SCHEDULES))
        self._one_of("draft", ("linear",))
        self._one_of("assistant_sampling", ("rejection", "coupled"))
        eos = self.eos_token_id
        if isinstance(eos, (list, tuple)):
            object.__setattr__(self, "eos_token_id", tuple(eos))
        elif eos is not None:
            self._integer("eos_token_id", 0)
        for token in eos if isinstance(eos, (list, tuple)) else ():
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _INT32:
                raise ValueError(f"eos_token_id: expected ids of 0 to {_INT32}, got {token!r}")
        if self.pad_token_id is not None:
            self._integer("pad_token_id", 0)
        if isinstance(self.assistant_costs, Mapping):
            try:
                given = dict(self.assistant_costs)
                prefix, exit_, rest = (given.pop(name) for name in ("prefix", "exit", "rest"))
            except KeyError as error:
                raise ValueError(f"assistant_costs: {error} is missing") from None
            if given:
                raise ValueError(f"assistant_costs: unknown: {', '.join(sorted(given))}")
            if not isinstance(rest, (list, tuple)):
                raise TypeError(f"assistant_costs: rest: expected numbers, got {rest!r}")
            object.__setattr__(self, "assistant_costs", CostTable(prefix, exit_, tuple(rest)))
        elif not isinstance(self.assistant_costs, CostTable | None):
            raise TypeError(
                "assistant_costs: expected a CostTable or a mapping with prefix, exit and rest, "
                f"got {type(self.assistant_costs).__name__}"
            )

    def updated(self, changes: Mapping[str, Any]) -> "GenerationConfig":
        """A copy with the given fields; unknown and not yet supported names raise."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name in NOT_YET:
                raise ValueError(f"generate: {name} is not supported yet")
            if name == "assistant_early_exit":
                raise ValueError(f"generate: {name}: give it to eesd.load")
            if name not in known:
                raise TypeError(
                    f"generate: unknown argument {name!r}; known: {', '.join(sorted(known))}"
                )
        return dataclasses.replace(self, **changes)

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < low:
            raise ValueError(f"{name}: expected {low} or more, got {value}")
        if value > _INT32:
            raise ValueError(f"{name}: expected {_INT32} or less, got {value}")

    def _number(
        self, name: str, low: float, high: float, text: str, *, low_open: bool = False
    ) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number {text}, got {value!r}")
        if not low <= value <= high or (low_open and value == low):
            raise ValueError(f"{name}: expected {text}, got {value}")

    def _one_of(self, name: str, values: tuple[str, ...]) -> None:
        if getattr(self, name) not in values:
            raise ValueError(
                f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}"
            )
