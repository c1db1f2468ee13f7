"""One round of early-exit speculative decoding: plan, draft, verify, accept, commit.

Books (c cached positions, x[c] pending: emitted, not yet run; draft length l):

    row j  | token | slot, position | 0..N-1    | exit layer        | N..L-1 | logits of row j
    0      | x[c]  | c              | K/V, h[0] | K/V; q_1 if l > 0 | K/V    | t_1 (l = 0: bonus)
    1..l-1 | t_j   | c + j          | K/V, h[j] | K/V; q_(j+1)      | K/V    | t_(j+1)
    l      | t_l   | c + l          | K/V, h[l] | K/V only          | K/V    | bonus

Nothing below layer N is computed twice. Rolling back is setting c: nothing at or above c is read
before it is written again.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eesd.cache import Block, KVCache
from eesd.controller import Controller
from eesd.exit_head import ExitHead
from eesd.models import Llama
from eesd.processors import Processors
from eesd_kernels import Law
from eesd_kernels.sample_draft import sample_draft_op
from eesd_kernels.verify_linear import verify_linear_op

PREFILL_CHUNK = 256
"""Rows a prefill step. A constant, so that a prompt is prefilled alike in every batch."""

CANDIDATES = 32
"""Exit logits that a sampled draft, or one that processors reorder, is chosen from."""


@dataclass
class Sampling:
    """How tokens are chosen, one value a sequence, `[B]`."""

    law: Tensor  # int32, see eesd_kernels.Law
    temperature: Tensor  # float32, 0 is greedy
    top_k: Tensor  # int32
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    seed: Tensor  # int64
    draft_candidates: int  # k of the sparse draft law

    @classmethod
    def uniform(
        cls,
        seeds: list[int],
        device: torch.device,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        law: Law = Law.SAMPLED,
        draft_candidates: int | None = None,
    ) -> "Sampling":
        """The same rule for each sequence, a seed each.

        draft_candidates: None for as many as the rule needs: one where it is greedy.
        """
        n = len(seeds)

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((n,), value, dtype=dtype, device=device)

        return cls(
            law=full(int(law), torch.int32),
            temperature=full(temperature, torch.float32),
            top_k=full(top_k, torch.int32),
            top_p=full(top_p, torch.float32),
            min_p=full(min_p, torch.float32),
            seed=torch.tensor(seeds, dtype=torch.int64, device=device),
            draft_candidates=draft_candidates or (CANDIDATES if temperature > 0 else 1),
        )


@dataclass
class State:
    """Where each sequence stands, `[B]` on the device."""

    length: Tensor  # int32, c: cached positions
    pending: Tensor  # int32, x[c]
    remaining: Tensor  # int32, tokens still to emit
    alive: Tensor  # bool


class RoundResult(NamedTuple):
    """What a round emitted: `token_ids[b, : num_accepted[b] + 1]` where alive and status is 0."""

    token_ids: Tensor  # [B, l+1] int32
    num_accepted: Tensor  # [B] int32
    drafted: Tensor  # [B] int32, -1 for a sequence that took no part
    status: Tensor  # [B] int32
    logits: Tensor  # [B, l+1, V], row j: of token j
    scores: Tensor  # the same after the processors


class Engine:
    """A backbone, an exit head (None: plain decoding, no exit-layer work) and a cache."""

    def __init__(self, backbone: Llama, head: ExitHead | None, cache: KVCache) -> None:
        self.backbone, self.head, self.cache = backbone, head, cache
        self.exit_layer = head.config.exit_layer if head else backbone.config.num_layers

    def prefill(self, prompts: list[Tensor]) -> State:
        """Run all but each prompt's last token, one unpadded sequence at a time; no LM head."""
        device = self.backbone.device
        for b, prompt in enumerate(prompts):
            for start in range(0, len(prompt) - 1, PREFILL_CHUNK):
                ids = prompt[start : min(start + PREFILL_CHUNK, len(prompt) - 1)]
                where = torch.tensor([[start], [len(ids)]], dtype=torch.int32, device=device)
                block = Block(where[0], where[1], sequence=b)
                hidden = self.prefix(ids[None], block)
                if self.head:
                    self.head.write(hidden, self.cache, block)
                self.rest(hidden, block)
        return State(
            length=torch.tensor([len(p) - 1 for p in prompts], dtype=torch.int32, device=device),
            pending=torch.stack([p[-1] for p in prompts]).to(torch.int32),
            remaining=torch.zeros(len(prompts), dtype=torch.int32, device=device),
            alive=torch.ones(len(prompts), dtype=torch.bool, device=device),
        )

    def prefix(self, ids: Tensor, block: Block) -> Tensor:
        """Tokens `[B, T]` through layers 0..N-1: `h_N` `[B, T, H]`."""
        return self.backbone.run_layers(
            self.backbone.embed(ids), 0, self.exit_layer, self.cache, block
        )

    def rest(self, hidden: Tensor, block: Block) -> Tensor:
        """`h_N` through layers N..L-1."""
        last = self.backbone.config.num_layers
        return self.backbone.run_layers(hidden, self.exit_layer, last, self.cache, block)

    def look(
        self, hidden: Tensor, block: Block, sampling: Sampling
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exit step on `h_N` `[B, 1, H]`: values and ids `[B, k]`, top probability `[B]`."""
        assert self.head is not None
        out = self.head.run(hidden, self.cache, block)
        k = min(sampling.draft_candidates, self.backbone.config.vocab_size)
        values, candidates, logsumexp = self.head.candidates(out[:, 0], k)
        return values, candidates, torch.exp(values[:, 0] - logsumexp)

    def draw(
        self, values: Tensor, candidates: Tensor, block: Block, sampling: Sampling, base: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One draft token a sequence: ids `[B]`, and q as `[B, k]` ids and probs."""
        child, q = sample_draft_op(
            values, candidates, sampling.temperature, sampling.law, 1,
            sampling.seed, block.lengths + 1, base, None,
        )  # fmt: skip
        return child[:, 0], candidates, q

    def target(self, hidden: Tensor, block: Block) -> Tensor:
        """`h_N` `[B, l+1, H]` through the rest of the model: logits `[B, l+1, V]`."""
        return self.backbone.logits(self.rest(hidden, block))

    def verify(
        self,
        scores: Tensor,
        block: Block,
        drafts: list[tuple[Tensor, Tensor, Tensor]],
        drafted: Tensor,
        sampling: Sampling,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The drafts' verdict under scores `[B, l+1, V]`: accepted, token ids, status."""
        if drafts:
            ids, q_ids, q = (torch.stack(parts, 1) for parts in zip(*drafts, strict=True))
        else:
            ids = drafted.new_empty(len(drafted), 0)
            q_ids, q = ids[..., None], sampling.temperature.new_empty(len(drafted), 0, 1)
        return verify_linear_op(
            scores, ids, drafted, q_ids, q, sampling.law, sampling.temperature, sampling.top_k,
            sampling.top_p, sampling.min_p, sampling.seed, block.lengths, block.lengths,
        )  # fmt: skip

    def plan(self, state: State, sampling: Sampling, controller: Controller) -> Tensor:
        """Draft lengths `[B]` int32 of the next round as far as they are known before it."""
        room = torch.clamp(self.cache.capacity - 1 - state.length, max=controller.max_draft)
        cap = torch.minimum(state.remaining - 1, room).clamp(min=0)
        return controller.plan(torch.where(state.alive, cap, -1), sampling.seed, state.length)

    def run_round(
        self,
        state: State,
        drafted: Tensor,
        sampling: Sampling,
        controller: Controller,
        eos: Tensor,
        processors: Processors | None = None,
        *,
        steps: int | None = None,
    ) -> RoundResult:
        """Draft, verify and commit once for every live sequence; updates state and posterior.

        steps: draft steps to run, known to the host, at least the largest of `drafted`; nothing is
        then read from the device. None: the device is asked after each.
        """
        base = state.length
        token, hiddens, drafts = (
            state.pending,
            list[Tensor](),
            list[tuple[Tensor, Tensor, Tensor]](),
        )
        while True:
            step = len(hiddens)
            block = Block(base + step, (state.alive & (drafted >= step)).to(torch.int32))
            hidden = self.prefix(token[:, None], block)
            hiddens.append(hidden)
            looks = controller.looks(drafted, step + 1) if steps is None else step < steps
            if not looks:
                if self.head:
                    self.head.write(hidden, self.cache, block)
                break
            values, candidates, top_prob = self.look(hidden, block, sampling)
            drafted = controller.include(drafted, step + 1, top_prob)
            if steps is None and int(drafted.max()) <= step:
                break
            if processors is not None:
                values, candidates = processors.candidates(values, candidates, base + step + 1)
            drafts.append(self.draw(values, candidates, block, sampling, base))
            token = drafts[-1][0].clamp(min=0)
            if processors is not None:
                processors.write(base + step + 1, token)
            # Nothing is drafted after an end of text.
            drafted = controller.stop(drafted, torch.isin(token, eos), step + 1)

        rows = torch.where(state.alive, drafted + 1, 0).to(torch.int32)
        block = Block(base, rows)
        logits = self.target(torch.cat(hiddens, 1) if len(hiddens) > 1 else hiddens[0], block)
        scores = logits if processors is None else processors.rows(logits, base, rows)
        num_accepted, token_ids, status = self.verify(scores, block, drafts, drafted, sampling)

        emits = state.alive & (status == 0)
        count = torch.where(emits, num_accepted + 1, 0)
        took_part = torch.where(emits, drafted, -1)
        controller.update(took_part, num_accepted)
        last = token_ids.gather(1, num_accepted[:, None].long())[:, 0]
        state.length = base + count
        state.remaining = state.remaining - count
        state.pending = torch.where(emits, last, state.pending)
        state.alive = emits & ~torch.isin(token_ids, eos).any(1) & (state.remaining > 0)
        if processors is not None:
            processors.write(state.length, state.pending)
        return RoundResult(token_ids, num_accepted, took_part, status, logits, scores)
