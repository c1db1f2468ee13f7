"""Measure what a round's parts cost, once a model, batch size and head."""

import time
from collections.abc import Callable

import numpy as np
import torch

from eesd.cache import Block
from eesd.controller import CostTable
from eesd.exit_head import ExitHead
from eesd.loading import Model
from eesd.models import Llama
from eesd.round import Draft, Engine
from eesd.sampling import Sampling

_CONTEXT, _REPEATS = 64, 5
_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)


def measured_costs(
    model: Model, head: ExitHead, batch: int, max_draft: int, sampling: Sampling
) -> CostTable:
    """The cost table of this model at this batch size, measured on the first call and kept.

    Logits processors are left out: custom ones may take any time, and are called for each row.
    """
    filters = [x is not None for x in (sampling.top_k, sampling.top_p, sampling.min_p)]
    key = (batch, head, sampling.draft_candidates, *filters, int(sampling.law[0]))
    known = model.measured_costs.get(key)
    if known is None or len(known.rest) <= max_draft:
        known = _measure(model.backbone, head, batch, max_draft, sampling)
        model.measured_costs[key] = known
    return known


def _measure(
    backbone: Llama, head: ExitHead, batch: int, max_draft: int, sampling: Sampling
) -> CostTable:
    device = backbone.device
    capacity = min(backbone.config.max_position, _CONTEXT + max_draft + 1)
    engine = Engine(backbone, head, backbone.new_cache(batch, capacity, exit_layers=1))
    context = torch.full((batch,), capacity - max_draft - 1, dtype=torch.int32, device=device)
    pending = torch.zeros(batch, 1, dtype=torch.int32, device=device)

    def block(rows: int) -> Block:
        return Block(context, torch.full_like(context, rows))

    hidden = engine.prefix(pending, block(1))

    def exit_step() -> Draft:
        return engine.look_and_draw(hidden, block(1), context + 1, sampling, context)[-1]

    draft = exit_step()

    def rest(length: int) -> Callable[[], object]:
        rows, drafted = hidden.repeat(1, length + 1, 1), torch.full_like(context, length)
        at = block(length + 1)
        return lambda: engine.verify(
            engine.target(rows, at), at, [draft] * length, drafted, sampling
        )

    # Between these the cost is taken to be a line: measuring each of many lengths takes seconds.
    lengths = sorted({n for n in _LENGTHS if n < max_draft} | {max_draft})
    steps: list[Callable[[], object]] = [
        lambda: engine.prefix(pending, block(1)),
        exit_step,
        *(rest(n) for n in lengths),
    ]
    prefix, exit_, *rests = _fastest_ms(steps, device)
    # More rows never cost less: what an entry has above a longer one's is another program's doing.
    for n in range(len(rests) - 2, -1, -1):
        rests[n] = min(rests[n], rests[n + 1])
    every = np.interp(range(max_draft + 1), lengths, rests).tolist()
    return CostTable(prefix=prefix, exit=exit_, rest=tuple(every))


def _fastest_ms(steps: list[Callable[[], object]], device: torch.device) -> list[float]:
    """The fastest of some runs of each step, taken in turn so that a busy spell hits all alike."""
    fastest = [float("inf")] * len(steps)
    for repeat in range(_REPEATS + 1):
        for i, step in enumerate(steps):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first warms up
                fastest[i] = min(fastest[i], (time.perf_counter() - start) * 1e3)
    return fastest
