"""`generate`: arguments checked, decoded by rounds, and put together as transformers returns it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eesd.arguments import callables, check_streamer, expanded_prompts, head_to_draft_with, stops_of
from eesd.decoding import Decoder, Streamer
from eesd.exit_head import ExitHead
from eesd.generation_config import GenerationConfig
from eesd.loading import Model
from eesd.prompts import sequence_seeds
from eesd.scores import by_step
from eesd.stats import SpeculativeStats
from eesd.transcript import Criterion, Transcript

HOPELESS, ENOUGH = 0.05, 64
"""Acceptance below which, after so many drafts, a call says that its exit head does not fit."""


@dataclass
class GenerateOutput:
    """What `generate` returns with return_dict_in_generate.

    sequences: `[B, P + n]` int64 with the prompt, B = prompts times num_return_sequences.
    finish_reasons: eos, stop_string, stopping_criteria, length, or error and what it was.
    scores: with output_scores, n tensors `[B, V]` float32: what each new token was chosen by, after
        processors, temperature and filters (-inf: removed). Rows past a sequence's end are -inf.
    logits: with output_logits, the same before all of these.
    """

    sequences: Tensor
    finish_reasons: list[str]
    speculative: SpeculativeStats
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


def generate(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    exit_head: ExitHead | None = None,
    streamer: Streamer | None = None,
    stopping_criteria: Sequence[Criterion] | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
    tokenizer: Any = None,
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
        streamer: `put()` gets the prompt, then each round's tokens; `end()`, after an error in a
            processor or criterion too. One sequence only.
        stopping_criteria: callables `(input_ids [1, n] int64, scores) -> bool` or bool tensor of
            one element, each called once for every prefix that the text takes. scores is None, or
            with return_dict_in_generate and output_scores the tuple of scores `[1, V]` so far.
        logits_processor: callables `(input_ids [1, n] int64, scores [1, V] float32) -> scores`,
            after the penalties and before temperature and filters. input_ids is the true history
            without padding. They are called for drafts too, so they may keep no state.
        tokenizer: for stop_strings; a `tokenizers.Tokenizer` or a tokenizer of transformers. None:
            the model's own.
        seed: of sampling: one integer (sequence 0 takes it, the others are derived), or one a
            sequence returned. None draws from torch's default generator.
        return_dict_in_generate: return a `GenerateOutput` with statistics instead of ids.

    Returns:
        `[B, P + n]` int64 ids, prompts included, padded on the right after a sequence's end. B is
        the number of prompts times num_return_sequences, a prompt's texts beside one another.

    Raises:
        TypeError, ValueError: an argument of another type, shape, device or range, by name; a
            processor or criterion that answers something else than it should, or a processor with
            state. What these raise themselves goes through.
        RuntimeError: the model gave NaN or infinite logits, or processors left no token. With
            `return_dict_in_generate` the sequence's finish reason says so instead, and the others
            are complete.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a model of eesd.load, got {type(model).__name__}")
    for name, given, kind in (
        ("generation_config", generation_config, GenerationConfig),
        ("exit_head", exit_head, ExitHead),
    ):
        if not isinstance(given, kind | None):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(given).__name__}")
    if not isinstance(return_dict_in_generate, bool):
        raise TypeError(
            f"return_dict_in_generate: expected True or False, got {return_dict_in_generate!r}"
        )
    config = (generation_config or GenerationConfig()).updated(kwargs)
    if not return_dict_in_generate:  # nobody gets them, as under transformers
        config = config.updated({"output_scores": False, "output_logits": False})
    prompts, input_ids = expanded_prompts(model, input_ids, attention_mask, config)
    if streamer is not None:
        check_streamer(streamer, len(prompts))
    head = head_to_draft_with(model, exit_head, config)
    eos = config.eos_token_id
    eos_ids = model.config.eos_token_ids if eos is None else (eos,) if isinstance(eos, int) else eos
    stops = stops_of(model, config, eos_ids, tokenizer, stopping_criteria)
    custom = callables("logits_processor", logits_processor)
    with _no_draw_on_failure(seed), torch.inference_mode(), _one_runtime(model):
        seeds = sequence_seeds(seed, len(prompts))
        decoder = Decoder(model, head, prompts, config, seeds, stops, custom)
        transcripts = decoder.run(streamer)
    stats = SpeculativeStats(
        [t.drafted for t in transcripts],
        [t.accepted for t in transcripts],
        decoder.controller.posterior(),
        decoder.costs,
        decoder.engine_stats,
    )
    if stats.num_draft_tokens >= ENOUGH and stats.draft_acceptance_rate < HOPELESS:
        warnings.warn(
            f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} draft tokens were "
            "accepted: the exit head does not fit this text or this model, and drafting costs "
            "more than it brings",
            stacklevel=2,
        )
    pad = config.pad_token_id
    if pad is None:
        own = model.config.pad_token_id
        pad = own if own is not None else eos_ids[0] if eos_ids else 0
    output = _output(model, input_ids, transcripts, stats, pad)
    if return_dict_in_generate:
        return output
    for b, reason in enumerate(output.finish_reasons):
        if reason.startswith("error"):
            raise RuntimeError(f"sequence {b}: {reason}")
    return output.sequences


def _output(
    model: Model,
    input_ids: Tensor,
    transcripts: list[Transcript],
    stats: SpeculativeStats,
    pad: int,
) -> GenerateOutput:
    longest = max(len(t.tokens) for t in transcripts)
    rows = [t.tokens + [pad] * (longest - len(t.tokens)) for t in transcripts]
    new = torch.tensor(rows, dtype=torch.int64, device=input_ids.device).view(len(rows), longest)
    return GenerateOutput(
        torch.cat((input_ids.to(torch.int64), new), 1),
        [t.finish_reason or "length" for t in transcripts],
        stats,
        by_step([t.scores for t in transcripts], longest, model.config.vocab_size),
        by_step([t.logits for t in transcripts], longest, model.config.vocab_size),
    )


@contextmanager
def _one_runtime(model: Model) -> Iterator[None]:
    """Keep torch's threads out of the way of the C++ library's during a float32 CPU call.

    What torch does there is small; its pool and ours on the same cores delay each other. On CUDA
    the model's device is made the current one.
    """
    if model.backbone.device.type == "cuda":
        with torch.cuda.device(model.backbone.device):
            yield
        return
    threads = torch.get_num_threads()
    ours = model.backbone.device.type == "cpu" and model.backbone.dtype is torch.float32
    if ours:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if ours:
            torch.set_num_threads(threads)


@contextmanager
def _no_draw_on_failure(seed: object) -> Iterator[None]:
    """Give the seed that was drawn from torch's generator back where the call fails."""
    before = torch.get_rng_state() if seed is None else None
    try:
        yield
    except BaseException:
        if before is not None:
            torch.set_rng_state(before)
        raise
