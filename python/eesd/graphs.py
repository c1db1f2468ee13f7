"""Rounds as CUDA graphs: captured once for each draft length, replayed with one synchronisation.

Whatever a round reads or writes stays where it is: cache, lengths, posteriors, seeds, counters. A
round of L draft steps ends with the plan of the next, and one small copy tells the host what was
emitted and how many steps come next.
"""

import bisect
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eesd.controller import Controller, CostTable
from eesd.round import Engine, State
from eesd.sampling import Sampling

WARM_UPS = 2
"""Rounds before a capture: kernels are compiled and loaded in the first."""
TIMED = 4
"""Replays of which the fastest is a round's cost."""
CONTEXT = 64
"""Cached tokens in the rounds that are timed."""
LENGTHS = (*range(9), 10, 12, 16, 20, 24, 32, 48)
"""Draft steps that get a graph of their own; between two of them the longer serves, masked."""

Rows = list[list[int]]


def captured_lengths(most: int) -> list[int]:
    """Numbers of draft steps to capture where drafts have up to `most` tokens."""
    return sorted({n for n in LENGTHS if n < most} | {most})


class FixedRounds:
    """Rounds of 0 to K draft steps over static buffers; here they run as they are called.

    `start`, then `launch` and `wait` in turn until `steps` is None: nobody is left.
    """

    capture_s = 0.0
    capture_bytes = 0
    _told = False

    def __init__(
        self, engine: Engine, sampling: Sampling, controller: Controller, eos: Tensor
    ) -> None:
        device, batch = engine.backbone.device, len(sampling.seed)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.engine, self.sampling, self.controller, self.eos = engine, sampling, controller, eos
        self.state = State(zeros(batch), zeros(batch), zeros(batch), zeros(batch, dtype=torch.bool))
        self.lengths = captured_lengths(controller.max_draft)
        self.drafted = zeros(batch)
        # tokens, num_accepted, drafted, status, draft length of the next round: -1 once ended
        self.packed = zeros(batch, controller.max_draft + 5)
        self.host = torch.zeros(
            self.packed.shape, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
        )
        self._view = self.host.numpy()
        self.steps: int | None = None  # of the next round
        self.alive = [False] * batch  # by what the device knows
        self.in_flight, self.rounds, self.synchronisations = False, 0, 0

    @property
    def capacity(self) -> int:
        """Cache slots of a sequence."""
        return self.engine.cache.capacity

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
        self.host.copy_(self.packed)
        self.rounds = self.synchronisations = 0
        self._read()

    def launch(self) -> None:
        """Enqueue the planned round."""
        assert self.steps is not None
        assert not self.in_flight
        self._replay(self.steps)
        self.in_flight, self.rounds = True, self.rounds + 1

    def wait(self) -> Rows:
        """The launched round, a row a sequence: K + 1 tokens, num_accepted, drafted, status."""
        self._synchronise()
        self.in_flight, self.synchronisations = False, self.synchronisations + 1
        return self._read()

    def finish(self) -> None:
        """Leave nothing running."""
        if self.in_flight:
            self._synchronise()
            self.in_flight = False

    def leave_out(self, ended: list[bool]) -> None:
        """End sequences that the device does not know to have ended, between two rounds.

        The next round was planned with them.
        """
        ends = torch.tensor(ended, device="cpu")
        if self.state.alive.device.type == "cuda":
            ends = ends.pin_memory()
        self.state.alive.logical_and_(~ends.to(self.state.alive.device, non_blocking=True))

    def seconds_to_report(self) -> float:
        """What capturing took, to the call that captured; 0 to later ones."""
        told, self._told = self._told, True
        return 0.0 if told else self.capture_s

    def costs(self) -> CostTable:
        """What rounds cost, as wholes; those of graphs are measured."""
        return CostTable(0.0, 0.0, tuple(1 + n / 10 for n in range(self.lengths[-1] + 1)))

    def _read(self) -> Rows:
        rows: Rows = self._view.tolist()
        planned = [row.pop() for row in rows]
        self.alive = [length >= 0 for length in planned]
        at = bisect.bisect_left(self.lengths, max(planned))
        self.steps = self.lengths[at] if any(self.alive) else None
        return rows

    def _replay(self, steps: int) -> None:
        self._round(steps)
        self.host.copy_(self.packed)

    def _synchronise(self) -> None:
        """Wait for what `_replay` enqueued."""

    def _round(self, steps: int) -> None:
        state = dataclasses.replace(self.state)
        result = self.engine.run_round(
            state, self.drafted, self.sampling, self.controller, self.eos, steps=steps
        )
        for name, value in vars(self.state).items():
            value.copy_(getattr(state, name))
        self.packed[:, : steps + 1] = result.token_ids
        self.packed[:, -4] = result.num_accepted
        self.packed[:, -3] = result.drafted
        self.packed[:, -2] = result.status
        self._plan()

    def _plan(self) -> None:
        self.drafted.copy_(self.engine.plan(self.state, self.sampling, self.controller))
        self.packed[:, -1] = torch.where(self.state.alive, self.drafted, -1)


class RoundGraphs(FixedRounds):
    """The same as CUDA graphs, one for each number of draft steps.

    capture_s: seconds that capturing and timing took. capture_bytes: device memory that graphs,
    kernels and buffers took besides the cache. round_ms: milliseconds of a round by its draft
    steps, `CONTEXT` tokens cached.
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
        self._done = torch.cuda.Event()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        count, pool = len(self.lengths), torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before, start = torch.cuda.mem_get_info(device)[0], time.perf_counter()
        side = torch.cuda.Stream(device)
        if progress is not None:
            progress(0, count)
        # The longest first: the shorter ones then fit into its memory.
        for at, steps in enumerate(reversed(self.lengths)):
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._rest_state(steps)
                    self._round(steps)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with their own work on the device.
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                self._round(steps)
                self.host.copy_(self.packed, non_blocking=True)
            self._graphs[steps] = graph
            if progress is not None:
                progress(at + 1, count)
        self.round_ms = {steps: self._fastest_ms(steps) for steps in self.lengths}
        self.capture_s = time.perf_counter() - start
        torch.cuda.empty_cache()
        self.capture_bytes = max(0, before - torch.cuda.mem_get_info(device)[0])

    def costs(self) -> CostTable:
        times = [self.round_ms[steps] for steps in self.lengths]
        # More steps never cost less: what is above a longer one's is another program's doing.
        for n in range(len(times) - 2, -1, -1):
            times[n] = min(times[n], times[n + 1])
        of = {steps: ms for steps, ms in zip(self.lengths, times, strict=True)}
        served = (
            self.lengths[bisect.bisect_left(self.lengths, n)] for n in range(self.lengths[-1] + 1)
        )
        return CostTable(prefix=0.0, exit=0.0, rest=tuple(of[steps] for steps in served))

    def _replay(self, steps: int) -> None:
        self._graphs[steps].replay()
        self._done.record()

    def _synchronise(self) -> None:
        self._done.synchronize()  # the one of the round

    def _rest_state(self, steps: int) -> None:
        """A state in which a round may run: some context, room, nobody ended."""
        room = self.capacity - self.controller.max_draft - 2
        self.state.length.fill_(max(0, min(CONTEXT, room)))
        self.state.remaining.fill_(2**30)
        self.state.pending.zero_()
        self.state.alive.fill_(True)
        self.drafted.fill_(steps)

    def _fastest_ms(self, steps: int) -> float:
        fastest = float("inf")
        for _ in range(TIMED):
            self._rest_state(steps)
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
