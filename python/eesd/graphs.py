"""Rounds as CUDA graphs: captured once for each draft length, replayed with one synchronisation.

Whatever a round reads or writes stays where it is: cache, lengths, posteriors, seeds, counters. A
round of L draft steps ends with the plan of the next, and one small copy tells the host what was
emitted and how many steps come next.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eesd.controller import Controller
from eesd.round import Engine, Sampling, State

WARM_UPS = 2
"""Rounds before a capture: kernels are compiled and loaded in the first."""
CONTEXT = 64
"""Cached tokens in the rounds that are timed."""
MIN_CAPACITY = 1024


def captured_capacity(needed: int, most: int) -> int:
    """Cache slots to capture for: powers of two, so that calls of other lengths fit as well."""
    return max(needed, min(most, max(MIN_CAPACITY, 1 << (needed - 1).bit_length())))


class FixedRounds:
    """Rounds of 0 to K draft steps over static buffers; here they run as they are called."""

    def __init__(
        self, engine: Engine, sampling: Sampling, controller: Controller, eos: Tensor
    ) -> None:
        device, batch = engine.backbone.device, len(sampling.seed)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.engine, self.sampling, self.controller, self.eos = engine, sampling, controller, eos
        self.state = State(zeros(batch), zeros(batch), zeros(batch), zeros(batch, dtype=torch.bool))
        self.drafted = zeros(batch)
        # tokens, num_accepted, drafted, status, steps of the next round
        self.packed = zeros(batch, controller.max_draft + 5)
        self.steps, self.synchronisations = 0, 0

    def start(self, state: State, sampling: Sampling, controller: Controller, eos: Tensor) -> None:
        """Take over a call's state and rules, and plan its first round."""
        for mine, given in (
            (self.state, state),
            (self.sampling, sampling),
            (self.controller, controller),
        ):
            for name, value in vars(mine).items():
                if isinstance(value, Tensor):
                    value.copy_(getattr(given, name))
        self.eos.copy_(eos)
        self._plan()
        self.steps = int(self.packed[0, -1])

    def run(self) -> list[list[int]]:
        """One round: a row a sequence of tokens, num_accepted, drafted, status."""
        host = self._replay(self.steps).tolist()
        self.synchronisations += 1
        self.steps = host[0].pop()
        for row in host[1:]:
            row.pop()
        return host

    def leave_out(self, ended: list[bool]) -> None:
        """End sequences that the device does not know to have ended."""
        ends = torch.tensor(ended, device="cpu")
        if self.state.alive.device.type == "cuda":
            ends = ends.pin_memory()
        self.state.alive.logical_and_(~ends.to(self.state.alive.device, non_blocking=True))

    def _replay(self, steps: int) -> Tensor:
        self._round(steps)
        return self.packed.cpu()

    def _round(self, steps: int) -> None:
        state = dataclasses.replace(self.state)
        result = self.engine.run_round(
            state, self.drafted, self.sampling, self.controller, self.eos, steps=steps
        )
        for name, value in vars(self.state).items():
            value.copy_(getattr(state, name))
        self.packed.fill_(-1)
        self.packed[:, : steps + 1] = result.token_ids
        self.packed[:, -4] = result.num_accepted
        self.packed[:, -3] = result.drafted
        self.packed[:, -2] = result.status
        self._plan()

    def _plan(self) -> None:
        self.drafted.copy_(self.engine.plan(self.state, self.sampling, self.controller))
        self.packed[:, -1] = self.drafted.max()


class RoundGraphs(FixedRounds):
    """The same as CUDA graphs, one for each number of draft steps.

    capture_s: seconds that capturing took. capture_bytes: memory that the graphs hold besides the
    cache. round_ms: milliseconds of a round by its draft steps, `CONTEXT` tokens cached.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        controller: Controller,
        eos: Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(engine, sampling, controller, eos)
        device = engine.backbone.device
        self.host = torch.zeros(self.packed.shape, dtype=torch.int32, pin_memory=True)
        self._done = torch.cuda.Event()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        count, pool = controller.max_draft + 1, torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)
        before, start = torch.cuda.memory_allocated(device), time.perf_counter()
        # The longest first: the shorter ones then fit into its memory.
        for at, steps in enumerate(reversed(range(count))):
            self._rest_state()
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._round(steps)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._round(steps)
                self.host.copy_(self.packed, non_blocking=True)
            self._graphs[steps] = graph
            if progress is not None:
                progress(at + 1, count)
        torch.cuda.synchronize(device)
        self.capture_s = time.perf_counter() - start
        self.capture_bytes = torch.cuda.memory_allocated(device) - before
        self.round_ms = [self._fastest_ms(steps) for steps in range(count)]

    def _replay(self, steps: int) -> Tensor:
        self._graphs[steps].replay()
        self._done.record()
        self._done.synchronize()  # the one of the round
        return self.host

    def _rest_state(self) -> None:
        """A state in which any round may run: some context, room, nobody ended."""
        room = self.engine.cache.capacity - self.controller.max_draft - 2
        self.state.length.fill_(max(0, min(CONTEXT, room)))
        self.state.remaining.fill_(2**30)
        self.state.pending.zero_()
        self.state.alive.fill_(True)

    def _fastest_ms(self, steps: int) -> float:
        fastest = float("inf")
        for _ in range(4):
            self._rest_state()
            self.drafted.fill_(steps)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._graphs[steps].replay()
            end.record()
            end.synchronize()
            fastest = min(fastest, start.elapsed_time(end))
        return fastest


def key_of(sampling: Sampling, controller: Controller, eos: Tensor) -> tuple[Any, ...]:
    """What a capture bakes in besides the engine: what is no tensor, and the shapes of tensors."""
    parts: list[Any] = [tuple(eos.shape)]
    for thing in (sampling, controller):
        for name, value in sorted(vars(thing).items()):
            parts.append((name, tuple(value.shape) if isinstance(value, Tensor) else value))
    return tuple(parts)
