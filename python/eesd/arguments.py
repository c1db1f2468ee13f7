"""The arguments of `generate` that are no fields of its config: checked, and put into shape."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eesd.exit_head import ExitHead
from eesd.generation_config import GenerationConfig
from eesd.loading import Model
from eesd.prompts import check_prompts
from eesd.stop_strings import StopStrings, token_bytes
from eesd.transcript import Stops


def expanded_prompts(
    model: Model, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig
) -> tuple[list[Tensor], Tensor]:
    """Unpadded prompts and padded ids `[B, P]`, as many times as texts are asked for."""
    if isinstance(input_ids, Tensor) and input_ids.device != model.backbone.device:
        raise ValueError(
            f"input_ids: expected device {model.backbone.device} as the model's, "
            f"got {input_ids.device}"
        )
    prompts = check_prompts(model.config, input_ids, attention_mask, config.max_new_tokens)
    times = config.num_return_sequences
    return [p for p in prompts for _ in range(times)], input_ids.repeat_interleave(times, 0)


def check_streamer(streamer: object, sequences: int) -> None:
    for name in ("put", "end"):
        if not callable(getattr(streamer, name, None)):
            raise TypeError(f"streamer: expected put() and end(), got {type(streamer).__name__}")
    if sequences != 1:
        raise ValueError(f"streamer: expected one sequence, got {sequences}")


def head_to_draft_with(
    model: Model, given: ExitHead | None, config: GenerationConfig
) -> ExitHead | None:
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


def callables(name: str, given: Any) -> tuple[Any, ...]:
    """The items of a list of callables, such as the lists of transformers."""
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: expected a list of callables, got {type(given).__name__}")
    for item in given:
        if not callable(item):
            raise TypeError(f"{name}: expected callables, got {type(item).__name__}")
    return tuple(given)


def _stop_strings(model: Model, tokenizer: Any, config: GenerationConfig) -> StopStrings | None:
    if tokenizer is not None:
        token_bytes(tokenizer)  # whatever it is for, one of the wrong type is named
    if not config.stop_strings:
        return None
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(
            f"stop_strings: {model.name} has no tokenizer; give one as tokenizer, or ids as "
            "eos_token_id"
        )
    assert not isinstance(config.stop_strings, str)
    return StopStrings(config.stop_strings, tokenizer)


def stops_of(
    model: Model, config: GenerationConfig, eos_ids: Sequence[int], tokenizer: Any, criteria: Any
) -> Stops:
    """What ends a sequence of this call."""
    strings = _stop_strings(model, tokenizer, config)
    listed = callables("stopping_criteria", criteria)
    return Stops(config.max_new_tokens, frozenset(eos_ids), strings, listed)
