"""The arguments of `generate`, checked: names and meanings of `transformers` where it has them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eesd.allowance import DEFAULT_MAX_SLOWDOWN
from eesd.controller import DEFAULT_DISCOUNT, SCHEDULES, CostTable
from eesd.posterior import Posterior, check_prior

_INT32 = 2**31 - 1
_FLOAT32 = 2.0**127
_SLOW = 1e6


@dataclass(frozen=True)
class GenerationConfig:
    """What `generate` does besides the model and the prompt.

    max_new_tokens: tokens to emit at most, exact also inside an accepted draft.
    min_new_tokens: no end of text before so many new tokens; at most max_new_tokens.
    do_sample, temperature, top_k (0: off), top_p (1: off), min_p (0: off): the target's law;
        without do_sample decoding is greedy. Ties at a threshold are kept.
    repetition_penalty: 2**-149 to 2**127; divides positive and multiplies negative logits of the
        ids that stand in the prompt or text. 1 is off.
    no_repeat_ngram_size: n-grams of so many ids, the prompt's too, come once. 0 is off.
    eos_token_id: one id, several, or None for the model's own; () for none.
    pad_token_id: fills finished rows; None: the model's, else its first eos, else 0.
    stop_strings: a string or several; the text ends with the token in which one of them ends. It
        may begin in the prompt or within a token.
    num_return_sequences: texts a prompt, beside one another in the output; above 1 with do_sample.
    output_scores, output_logits: with return_dict_in_generate, return the scores that each token
        was chosen by, and the logits before processors, temperature and filters.
    num_assistant_tokens: largest draft length; 0 is plain autoregressive decoding.
    num_assistant_tokens_schedule: thompson (the default rule), cost, calibrated, bernoulli or
        constant.
    draft: linear.
    assistant_confidence_threshold: 0 to 1; a draft ends before a token for which the exit head's
        largest probability, at temperature 1 and before processors, is below it. 0 is off.
    assistant_sampling: rejection (Leviathan et al. 2023); block (Sun et al. 2024), which accepts no
        less; or coupled, where sampled text equals plain sampling's with the same seed token for
        token.
    assistant_costs: milliseconds of a round's parts (`prefix`, `exit`, `rest`) to use instead of
        measuring them, so that a run can be repeated; see `CostTable`.
    assistant_posterior: a `Posterior` to start from, such as an earlier call's
        `speculative.posterior`: of the schedule's form, for each sequence or for one.
    assistant_prior: alpha and beta of the Beta prior, where the posterior starts and to which it
        returns; None: the exit head's own, measured when it was trained, at half its weight.
    assistant_discount: 0 to 1, what a round leaves of what was learned before it.
    assistant_share_posterior: one posterior for all sequences of the call, which all of their
        rounds update; the discount counts once a round.
    assistant_max_slowdown: how much longer than plain decoding drafts may make a sequence of 256
        tokens or more, whatever becomes of them, by the costs of a round: 0.02 is 1.02 times. It
        binds the schedules that weigh costs (thompson, cost, calibrated). None: no bound.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    stop_strings: str | tuple[str, ...] | None = None
    num_return_sequences: int = 1
    output_scores: bool = False
    output_logits: bool = False
    num_assistant_tokens: int = 8
    num_assistant_tokens_schedule: str = "thompson"
    draft: str = "linear"
    assistant_confidence_threshold: float = 0.0
    assistant_sampling: str = "rejection"
    assistant_costs: CostTable | None = None
    assistant_posterior: Posterior | None = None
    assistant_prior: tuple[float, float] | None = None
    assistant_discount: float = DEFAULT_DISCOUNT
    assistant_share_posterior: bool = False
    assistant_max_slowdown: float | None = DEFAULT_MAX_SLOWDOWN

    def __post_init__(self) -> None:
        for name, low in (
            ("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0), ("num_return_sequences", 1),
            ("no_repeat_ngram_size", 0), ("num_assistant_tokens", 0),
        ):  # fmt: skip
            self._integer(name, low)
        for name in ("do_sample", "output_scores", "output_logits", "assistant_share_posterior"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        self._number("temperature", 0.0, _FLOAT32, "above 0 and finite", low_open=True)
        self._number("repetition_penalty", 2.0**-149, _FLOAT32, "2**-149 to 2**127")
        self._number("top_p", 0.0, 1.0, "above 0, at most 1", low_open=True)
        for name in ("min_p", "assistant_confidence_threshold", "assistant_discount"):
            self._number(name, 0.0, 1.0, "0 to 1")
        if self.assistant_max_slowdown is not None:
            self._number("assistant_max_slowdown", 0.0, _SLOW, f"0 to {_SLOW:.0f}, or None")
        self._one_of("num_assistant_tokens_schedule", tuple(SCHEDULES))
        self._one_of("draft", ("linear",))
        self._one_of("assistant_sampling", ("rejection", "coupled", "block"))
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: expected at most max_new_tokens = {self.max_new_tokens}, "
                f"got {self.min_new_tokens}"
            )
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                "num_return_sequences: greedy decoding gives each prompt one text; expected 1 "
                f"without do_sample, got {self.num_return_sequences}"
            )
        self._check_ends()
        self._check_costs()
        if not isinstance(self.assistant_posterior, Posterior | None):
            raise TypeError(
                "assistant_posterior: expected a Posterior, "
                f"got {type(self.assistant_posterior).__name__}"
            )
        if self.assistant_prior is not None:
            object.__setattr__(self, "assistant_prior", check_prior(self.assistant_prior))

    def _check_ends(self) -> None:
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
        strings = self.stop_strings
        if strings is None:
            return
        if not isinstance(strings, (str, list, tuple)):
            raise TypeError(f"stop_strings: expected a string or several, got {strings!r}")
        strings = (strings,) if isinstance(strings, str) else tuple(strings)
        for string in strings:
            if not isinstance(string, str):
                raise TypeError(f"stop_strings: expected strings, got {string!r}")
            if not string:
                raise ValueError("stop_strings: expected no empty string, which any text contains")
        object.__setattr__(self, "stop_strings", strings)

    def _check_costs(self) -> None:
        if isinstance(self.assistant_costs, Mapping):
            try:
                given = dict(self.assistant_costs)
                prefix, exit_, rest = (given.pop(name) for name in ("prefix", "exit", "rest"))
            except KeyError as error:
                raise ValueError(f"assistant_costs: {error} is missing") from None
            if given:
                raise ValueError(f"assistant_costs: unknown: {', '.join(sorted(map(str, given)))}")
            if not isinstance(rest, (list, tuple)):
                raise TypeError(f"assistant_costs: rest: expected numbers, got {rest!r}")
            object.__setattr__(self, "assistant_costs", CostTable(prefix, exit_, tuple(rest)))
        elif not isinstance(self.assistant_costs, CostTable | None):
            raise TypeError(
                "assistant_costs: expected a CostTable or a mapping with prefix, exit and rest, "
                f"got {type(self.assistant_costs).__name__}"
            )

    def updated(self, changes: Mapping[str, Any]) -> "GenerationConfig":
        """A copy with the given fields; unknown names raise."""
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
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
