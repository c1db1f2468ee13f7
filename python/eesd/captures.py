"""The captured rounds of a model: which there are, who may use them, what they may hold."""

import contextlib
import gc
import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from eesd.cache import CacheTooLarge, KVCache
from eesd.controller import Controller
from eesd.exit_head import ExitHead
from eesd.graphs import FixedRounds, RoundGraphs, key_of
from eesd.models import Llama
from eesd.round import Engine
from eesd.sampling import Sampling

MOST = 4
"""Captures kept a model: plain and speculative decoding at two batch sizes, say. The one that was
used longest ago goes first; those of one batch size share a cache."""
MIN_CAPACITY = 1024
MAX_DRAFT = 64
"""Longer drafts run round by round."""
LARGEST_HEAD = 256
"""Larger heads run through the attention's reference, which reads lengths on the host."""
CAPTURES_ON_CPU = False
"""For tests: `FixedRounds` take the place of graphs on a CPU."""

Rules = Callable[[], tuple[Sampling, Controller]]

_log = logging.getLogger("eesd")


def captured_capacity(needed: int, most: int) -> int:
    """Cache slots to capture for: powers of two, so that calls of other lengths fit as well."""
    return max(needed, min(most, max(MIN_CAPACITY, 1 << (needed - 1).bit_length())))


def why_not(backbone: Llama) -> str | None:
    """What keeps rounds of this model from being captured; None: nothing."""
    if backbone.device.type != "cuda":
        return None if CAPTURES_ON_CPU else f"the device is {backbone.device}"
    if backbone.dtype is torch.float64:
        return "float64 runs through the references"
    if backbone.config.head_size > LARGEST_HEAD:
        return f"head size {backbone.config.head_size} is above {LARGEST_HEAD}"
    return None


class Captures:
    """Captured rounds by what is baked into them, one of a kind, each over its own buffers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, FixedRounds] = OrderedDict()
        self._caches: WeakValueDictionary[Hashable, KVCache] = WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Captures, ()  # a copy of a model captures anew

    def __len__(self) -> int:
        return len(self._kept)

    def kept(self) -> list[FixedRounds]:
        """Those that there are, the one used last at the end."""
        return list(self._kept.values())

    def clear(self) -> None:
        """Free all captures and their caches; they are made again when needed."""
        with self._lock:
            self._drop()

    @contextlib.contextmanager
    def lend(
        self, backbone: Llama, head: ExitHead | None, rules: Rules, eos: Tensor, needed: int
    ) -> Iterator[FixedRounds | None]:
        """Rounds for a call that needs so many cache slots a sequence.

        rules: makes the call's sampling and controller, new ones each time. None is lent while
        another call has this model's: of another thread, or the one that a streamer belongs to.
        """
        if not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            rounds = self._of(backbone, head, rules, eos, needed)
            try:
                yield rounds
            finally:
                rounds.finish()
        finally:
            self._lock.release()

    def _of(
        self, backbone: Llama, head: ExitHead | None, rules: Rules, eos: Tensor, needed: int
    ) -> FixedRounds:
        sampling, controller = rules()
        key = (backbone, head, key_of(sampling, controller, eos))
        kept = self._kept.get(key)
        if kept is not None and kept.capacity >= needed:
            self._kept.move_to_end(key)
            return kept
        del kept
        self._kept.pop(key, None)  # outgrown
        while len(self._kept) >= MOST:
            self._kept.popitem(last=False)
        batch, most = len(sampling.seed), backbone.config.max_position
        wanted = captured_capacity(needed, most)
        # Short of memory the others go, then the room for longer calls.
        least = max(needed, controller.max_draft + 2)
        for capacity, alone in ((wanted, False), (wanted, True), (least, True)):
            if alone:
                self._drop()
            try:
                made = self._capture(backbone, head, sampling, controller, eos, batch, capacity)
            except (CacheTooLarge, torch.OutOfMemoryError) as error:
                # Without its traceback, which holds what was allocated.
                failed: RuntimeError = error.with_traceback(None)
                continue
            self._kept[key] = made
            return made
        if isinstance(failed, CacheTooLarge):
            raise failed
        raise RuntimeError(
            f"out of memory while capturing rounds of {batch} sequences of {needed} tokens on "
            f"{backbone.device}: lower the batch, max_new_tokens or num_assistant_tokens ({failed})"
        )

    def _capture(
        self,
        backbone: Llama,
        head: ExitHead | None,
        sampling: Sampling,
        controller: Controller,
        eos: Tensor,
        batch: int,
        capacity: int,
    ) -> FixedRounds:
        cache = self._caches.get((backbone, batch, capacity))
        if cache is None:  # with the exit's layer, so that plain decoding shares it
            cache = backbone.new_cache(batch, capacity, exit_layers=1)
            self._caches[backbone, batch, capacity] = cache
        engine = Engine(backbone, head, cache)
        if backbone.device.type != "cuda":
            return FixedRounds(engine, sampling, controller, eos.clone())
        bar = _Bar()
        try:
            made = RoundGraphs(engine, sampling, controller, eos.clone(), bar.show)
        finally:
            bar.close()
        _log.info(
            "captured rounds of up to %d draft tokens for %d sequences of %d tokens in %.1f s: "
            "%.0f MiB besides a cache of %.0f MiB",
            controller.max_draft, batch, capacity, made.capture_s, made.capture_bytes / 2**20,
            cache.nbytes / 2**20,
        )  # fmt: skip
        return made

    def _drop(self) -> None:
        self._kept.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Bar:
    """Progress on a terminal's stderr, gone when done; elsewhere nothing."""

    WIDTH = 24

    def __init__(self) -> None:
        self._shown = sys.stderr is not None and sys.stderr.isatty()

    def show(self, done: int, count: int) -> None:
        if self._shown:
            full = self.WIDTH * done // count
            bar = "#" * full + "." * (self.WIDTH - full)
            print(f"\rcapturing rounds [{bar}] {done}/{count}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
