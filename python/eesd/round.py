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
from eesd.sampling import Sampling
from eesd_kernels.exit_draft import exit_draft_op
from eesd_kernels.sample_draft import sample_draft_op
from eesd_kernels.verify_linear import verify_linear_op

PREFILL_CHUNK = 256
"""Rows a prefill step. A constant, so that a prompt is prefilled alike in every batch."""


@dataclass
class State:
    """Where each sequence stands, `[B]` on the device."""

    length: Tensor  # int32, c: cached positions
    pending: Tensor  # int32, x[c]
    remaining: Tensor  # int32, tokens still to emit
    alive: Tensor  # bool


class Draft(NamedTuple):
    """A drafted token a sequence, and the law that it was drawn from."""

    token: Tensor  # [B] int32
    ids: Tensor  # [B, k] int32
    q: Tensor  # [B, k] float32


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

    def look(self, hidden: Tensor, block: Block, sampling: Sampling) -> tuple[Tensor, ...]:
        """Exit step on `h_N` `[B, 1, H]`: values and ids `[B, k]`, logsumexp `[B]`."""
        assert self.head is not None
        out = self.head.run(hidden, self.cache, block)
        return self.head.candidates(out[:, 0], self._candidates(sampling))

    def draw(
        self, values: Tensor, candidates: Tensor, place: Tensor, sampling: Sampling, base: Tensor
    ) -> Draft:
        """One draft token a sequence for the position `place` `[B]`."""
        child, q = sample_draft_op(
            values, candidates, sampling.temperature, sampling.law, 1, sampling.seed, place, base,
            None,
        )  # fmt: skip
        return Draft(child[:, 0], candidates, q)

    def look_and_draw(
        self, hidden: Tensor, block: Block, place: Tensor, sampling: Sampling, base: Tensor
    ) -> tuple[Tensor, Tensor, Draft]:
        """Both in one op: values `[B, k]`, logsumexp `[B]`, and the draft."""
        assert self.head is not None
        out = self.head.run(hidden, self.cache, block)
        values, candidates, logsumexp, child, q = exit_draft_op(
            out[:, 0], self.head.lm_head, self._candidates(sampling), self.head.norm,
            self.backbone.config.rms_eps, sampling.temperature, sampling.law, 1, sampling.seed,
            place, base, None,
        )  # fmt: skip
        return values, logsumexp, Draft(child[:, 0], candidates, q)

    def _candidates(self, sampling: Sampling) -> int:
        """A vocabulary may be narrower than k."""
        return min(sampling.draft_candidates, self.backbone.config.vocab_size)

    def target(self, hidden: Tensor, block: Block) -> Tensor:
        """`h_N` `[B, l+1, H]` through the rest of the model: logits `[B, l+1, V]`."""
        return self.backbone.logits(self.rest(hidden, block))

    def verify(
        self,
        scores: Tensor,
        block: Block,
        drafts: list[Draft],
        drafted: Tensor,
        sampling: Sampling,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The drafts' verdict under scores `[B, l+1, V]`: accepted, token ids, status."""
        q_ids = q = None
        if drafts:
            ids = torch.stack([draft.token for draft in drafts], 1)
            if sampling.tests_law:
                q_ids = torch.stack([draft.ids for draft in drafts], 1)
                q = torch.stack([draft.q for draft in drafts], 1)
        else:
            ids = drafted.new_empty(len(drafted), 0)
            if sampling.tests_law:
                q_ids = ids[..., None]
                q = sampling.temperature.new_empty(len(drafted), 0, 1)
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
        if steps is None:
            hiddens, drafts, drafted = self._draft(
                state, drafted, sampling, controller, eos, processors
            )
        else:
            assert processors is None
            assert not controller.reads_certainty
            hiddens, drafts, drafted = self._draft_planned(state, drafted, sampling, eos, steps)
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
        state.alive = emits & ~is_in(token_ids, eos).any(1) & (state.remaining > 0)
        if processors is not None:
            processors.write(state.length, state.pending)
        return RoundResult(token_ids, num_accepted, took_part, status, logits, scores)

    def _draft(
        self,
        state: State,
        drafted: Tensor,
        sampling: Sampling,
        controller: Controller,
        eos: Tensor,
        processors: Processors | None,
    ) -> tuple[list[Tensor], list[Draft], Tensor]:
        """Drafts as long as any sequence wants one, read from the device after each.

        Returns `h_N` of each row, the drafts, and the draft lengths that became of the planned.
        """
        base, token = state.length, state.pending
        hiddens, drafts = list[Tensor](), list[Draft]()
        while True:
            step = len(hiddens)
            block = Block(base + step, (state.alive & (drafted >= step)).to(torch.int32))
            hidden = self.prefix(token[:, None], block)
            hiddens.append(hidden)
            if not controller.looks(drafted, step + 1):
                if self.head:
                    self.head.write(hidden, self.cache, block)
                break
            place = base + step + 1
            if processors is None:
                values, logsumexp, draft = self.look_and_draw(hidden, block, place, sampling, base)
            else:
                values, candidates, logsumexp = self.look(hidden, block, sampling)
            if controller.reads_certainty:
                certainty = torch.exp(values[:, 0] - logsumexp)
                drafted = controller.include(drafted, step + 1, certainty)
            if int(drafted.max()) <= step:
                break
            if processors is not None:
                values, candidates = processors.candidates(values, candidates, place)
                draft = self.draw(values, candidates, place, sampling, base)
            drafts.append(draft)
            token = draft.token.clamp(min=0)
            if processors is not None:
                processors.write(place, token)
            # Nothing is drafted after an end of text.
            drafted = controller.stop(drafted, is_in(token, eos), step + 1)
        return hiddens, drafts, drafted

    def _draft_planned(
        self, state: State, drafted: Tensor, sampling: Sampling, eos: Tensor, steps: int
    ) -> tuple[list[Tensor], list[Draft], Tensor]:
        """The same for lengths that are known before, `steps` the longest: nothing is read."""
        base, token = state.length, state.pending
        hiddens, drafts = list[Tensor](), list[Draft]()
        step_of = torch.arange(steps + 1, dtype=torch.int32, device=base.device)[:, None]
        # Rows of 16 bytes or a multiple, or Triton compiles each kernel for two alignments.
        batch, pad = len(base), (0, -len(base) % 4)
        place = torch.nn.functional.pad(base, pad) + step_of  # [steps + 1, B and more]
        wanted = torch.where(state.alive, drafted, -1)
        live = (torch.nn.functional.pad(wanted, pad) >= step_of).to(torch.int32)
        place, live = place[:, :batch], live[:, :batch]
        for step in range(steps + 1):
            block = Block(place[step], live[step])
            hidden = self.prefix(token[:, None], block)
            hiddens.append(hidden)
            if step < steps:
                *_, draft = self.look_and_draw(hidden, block, place[step + 1], sampling, base)
                drafts.append(draft)
                token = draft.token.clamp(min=0)
            elif self.head:
                self.head.write(hidden, self.cache, block)
        if drafts and eos.numel():  # nothing is drafted after an end of text
            ended = is_in(torch.stack([draft.token for draft in drafts]), eos)
            first = torch.where(ended, step_of[1:], steps).amin(0)
            drafted = torch.minimum(drafted, first.to(torch.int32))
        return hiddens, drafts, drafted


def is_in(ids: Tensor, some: Tensor) -> Tensor:
    """Whether each of ids is one of `some` `[n]`. `torch.isin` may sort and so wait."""
    return (ids[..., None] == some).any(-1)
