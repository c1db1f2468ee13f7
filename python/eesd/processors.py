"""Logits processors, with the meanings of `transformers`, on every row of a verification.

Row j of a round whose pending token is x[c] holds the logits of the token at c + j + 1, and sees
x[0..c] and the drafts t_1..t_j: the true history of that place, without padding. The order is that
of `transformers`: repetition penalty, no repeated n-gram, least length, then custom processors;
temperature and filters follow in verification. Text is exact whatever drafts look like; the cheap
processors are applied to drafts too, since a draft that the target forbids is never accepted.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eesd.processor_guard import GuardedProcessor

NEVER = -torch.inf


class Processors:
    """The processors of a call and the true tokens of its sequences, on the device."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        capacity: int,
        eos_ids: Sequence[int],
        *,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        min_new_tokens: int = 0,
        custom: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    ) -> None:
        """prompts: `[P_b]` each; capacity: of the cache, in tokens."""
        device = prompts[0].device
        self._penalty, self._ngram, self._least = (
            repetition_penalty,
            no_repeat_ngram_size,
            min_new_tokens,
        )
        self._custom = [GuardedProcessor(processor) for processor in custom]
        # Position by position; the last column takes what a finished sequence would write.
        self._tokens = torch.zeros(len(prompts), capacity + 1, dtype=torch.int64, device=device)
        for row, prompt in zip(self._tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._position = torch.arange(capacity + 1, device=device)
        self._prompt = torch.tensor([len(p) for p in prompts], device=device)
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)

    def write(self, position: Tensor, token: Tensor) -> None:
        """Note the tokens `[B]` at positions `[B]`."""
        place = position.long().clamp(max=self._tokens.shape[1] - 1)
        self._tokens.scatter_(1, place[:, None], token.long()[:, None])

    def rows(self, logits: Tensor, base: Tensor, rows: Tensor) -> Tensor:
        """Processed logits, float32 (float64 of float64).

        Args:
            logits: `[B, T, V]` floating.
            base: `[B]` int32, c of each sequence.
            rows: `[B]` int32, how many of its rows count; the others are of no use.

        Raises:
            TypeError, ValueError: from a custom processor's answer, or that it keeps state.
        """
        scores = logits if logits.dtype is torch.float64 else logits.float()
        seen = base.long()[:, None] + 1 + torch.arange(logits.shape[1], device=base.device)
        if self._penalty != 1.0:
            first = torch.full_like(scores[:, 0], self._tokens.shape[1], dtype=torch.int64)
            where = self._position.expand_as(self._tokens)
            # What lies beyond a row's history comes later than it, old drafts as well as zeros.
            first.scatter_reduce_(1, self._tokens, where, "amin")
            scores = self._penalised(scores, first[:, None] < seen[..., None])
        if self._ngram:
            completed, match = self._completions(seen)
            spare = scores.shape[2]
            banned = torch.zeros(*seen.shape, spare + 1, dtype=torch.bool, device=scores.device)
            banned.scatter_(2, torch.where(match, completed[:, None], spare), True)
            scores = scores.masked_fill(banned[..., :spare], NEVER)
        if self._least:
            ids = torch.arange(logits.shape[2], device=base.device)
            early = self._too_early(seen)[..., None] & torch.isin(ids, self._eos)
            scores = scores.masked_fill(early, NEVER)
        # Behind a drafted end of text there is no text to process: its bonus token is dropped.
        last = self._tokens.gather(1, (seen - 1).clamp(max=self._tokens.shape[1] - 1))
        ended = torch.isin(last, self._eos)
        ended[:, 0] = False  # a prompt may end so
        if self._custom:
            row = torch.arange(logits.shape[1], device=base.device)
            scores = self._run_custom(scores, seen, ~ended & (row < rows[:, None]))
        return torch.where(ended[..., None], logits.to(scores.dtype), scores)

    def candidates(self, values: Tensor, ids: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The draft's k candidates `[B, k]` after the cheap processors, best first again.

        `seen` `[B]`: tokens before the one to draft.
        """
        if self._penalty != 1.0:
            known = self._tokens.masked_fill(self._position >= seen[:, None], -1)
            values = self._penalised(values, (known[:, None] == ids[..., None]).any(2))
        if self._ngram:
            completed, match = self._completions(seen.long()[:, None])
            completed = completed.masked_fill(~match[:, 0], -1)
            banned = (completed[:, None] == ids[..., None]).any(2)
            values = values.masked_fill(banned, NEVER)
        if self._least:
            early = self._too_early(seen)[:, None] & torch.isin(ids, self._eos)
            values = values.masked_fill(early, NEVER)
        by_id = ids.argsort(1)  # of equal values the lower id comes first
        values, ids = values.gather(1, by_id), ids.gather(1, by_id)
        values, order = values.sort(dim=1, descending=True, stable=True)
        return values, ids.gather(1, order)

    def _penalised(self, scores: Tensor, seen: Tensor) -> Tensor:
        changed = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(seen, changed, scores)

    def _completions(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The last ids of all n-grams `[B, W]`, and whether a history `[B, T]` long leads to one.

        An n-gram counts where it lies within the history and its first n - 1 ids are the history's
        last ones.
        """
        n, tokens = self._ngram, self._tokens
        if n > tokens.shape[1]:
            return tokens[:, :0], torch.zeros(*seen.shape, 0, dtype=torch.bool, device=seen.device)
        grams = tokens.unfold(1, n, 1)
        back = torch.arange(1 - n, 0, device=seen.device)
        ending = tokens[:, None].expand(-1, seen.shape[1], -1)
        # Rows that no history reaches, of short texts or finished sequences, match nothing.
        ending = ending.gather(2, (seen[..., None] + back).clamp(0, tokens.shape[1] - 1))
        match = (grams[:, None, :, :-1] == ending[:, :, None]).all(3)
        inside = self._position[: grams.shape[1]] + n <= seen[..., None]
        return grams[..., -1], match & inside

    def _too_early(self, seen: Tensor) -> Tensor:
        prompt = self._prompt if seen.dim() == 1 else self._prompt[:, None]
        return seen - prompt < self._least

    def _run_custom(self, scores: Tensor, seen: Tensor, live: Tensor) -> Tensor:
        """One sequence and prefix after the other: drafts are known on the host here."""
        out, lengths = scores.clone(), seen.tolist()
        for b, j in live.nonzero().tolist():
            row, prefix = scores[b, j : j + 1], self._tokens[b : b + 1, : lengths[b][j]]
            for processor in self._custom:
                row = processor(prefix, row)
            out[b, j] = row[0]
        return out
