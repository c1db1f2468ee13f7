"""Timing for the benches: CUDA-graph replays on a GPU, alternating calls on a CPU.

A contender is a list of calls, one an input set; they are taken in turn, so that on a GPU inputs
rotate through more than the L2 holds. Contenders are timed in turn too: a busy spell or a change
of clocks meets all of them alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
L2_MULTIPLE = 3  # inputs rotate past three times the L2
WARM_REPLAYS, FEWEST_REPLAYS = 3, 12
SECONDS = 0.5  # of replays, all contenders together, beyond the fewest
LEAD = 400_000  # cycles, 0.2 ms, that the GPU waits first: the host launches a replay meanwhile


@dataclass(frozen=True)
class Times:
    """Microseconds a call: median and the 20th and 80th percentiles."""

    us: float
    us_p20: float
    us_p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Times":
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3])

    def row(self) -> dict[str, float]:
        """The fields of a result row."""
        return {k: round(getattr(self, k), 3) for k in ("us", "us_p20", "us_p80")}


def arguments(description: str) -> argparse.Namespace:
    """What every bench takes: `--device`, `--out`, `--quick`."""
    parser = argparse.ArgumentParser(description=description)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--out", type=Path, help="folder instead of bench/results")
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    return parser.parse_args()


def input_sets(bytes_each: int, device: str) -> int:
    """How many input sets rotate past three times the L2; one on a CPU."""
    if device == "cpu":
        return 1
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(64, -(-L2_MULTIPLE * l2 // max(bytes_each, 1))))


def measure(
    contenders: dict[str, Sequence[Call]], device: str, *, quick: bool, replays: int = 60
) -> dict[str, Times]:
    """Times of each contender on this device; on a GPU so many replays, or fewer of slow ones."""
    if device == "cpu":
        return _on_cpu(contenders, repeats=3 if quick else 25)
    return _on_cuda(contenders, replays=5 if quick else replays)


def graph_time(function: Callable[..., object], inputs: Sequence[tuple]) -> Times:
    """Times of `function(*inputs[i])` in replays of one CUDA graph, the inputs taken in turn.

    Make `input_sets(bytes_each, "cuda")` of them, so that they rotate past three times the L2.
    Contenders that shall be compared are timed in turn by `measure`.
    """
    calls = [lambda x=x: function(*x) for x in inputs]
    return measure({"it": calls}, "cuda", quick=False)["it"]


def _on_cpu(contenders: dict[str, Sequence[Call]], repeats: int) -> dict[str, Times]:
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    inner = {}
    for name, calls in contenders.items():
        start = time.perf_counter()
        for call in calls:
            call()
        # Enough calls a sample that the clock's own cost does not count.
        inner[name] = max(1, min(1000, int(2e-3 / (time.perf_counter() - start + 1e-9))))
    for _ in range(repeats):
        for name, calls in contenders.items():
            start = time.perf_counter()
            for _ in range(inner[name]):
                for call in calls:
                    call()
            elapsed = time.perf_counter() - start
            samples[name].append(elapsed * 1e6 / (inner[name] * len(calls)))
    return {name: Times.of(s) for name, s in samples.items()}


def _on_cuda(contenders: dict[str, Sequence[Call]], replays: int) -> dict[str, Times]:
    graphs, counts = {}, {}
    # Launches a replay: 20 at least, since events tick coarsely, and about as many of each, so that
    # what a replay itself still costs weighs alike on all.
    least = max(20, *(len(calls) for calls in contenders.values()))
    for name, calls in contenders.items():
        for call in calls:
            call()
        torch.cuda.synchronize()
        rounds = -(-least // len(calls))
        graphs[name], counts[name] = torch.cuda.CUDAGraph(), rounds * len(calls)
        with torch.cuda.graph(graphs[name]):
            for _ in range(rounds):
                for call in calls:
                    call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    begun = time.perf_counter()
    for replay in range(replays + WARM_REPLAYS):
        if replay >= WARM_REPLAYS + FEWEST_REPLAYS and time.perf_counter() - begun > SECONDS:
            break
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(LEAD)  # PyTorch has no public name for it
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= WARM_REPLAYS:
                samples[name].append(start.elapsed_time(end) * 1e3 / counts[name])
    return {name: Times.of(s) for name, s in samples.items()}


def read_bandwidth() -> float:
    """Bytes a microsecond that reading 2 GiB once reaches, measured now: a ceiling for any op.

    The better of a sum and of a matrix-vector product in bfloat16 (cuBLAS).
    """
    weight = torch.empty(2**17, 2**13, dtype=torch.bfloat16, device="cuda").normal_()
    x, numbers = weight[:1].clone(), weight.view(torch.float32)
    reads: dict[str, Sequence[Call]] = {
        "sum": [lambda: numbers.sum()],
        "product": [lambda: torch.nn.functional.linear(x, weight)],
    }
    times = _on_cuda(reads, replays=5)
    return 2 * weight.numel() / min(t.us for t in times.values())


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of copying 2 GiB, now: a ceiling for what moves.

    The better of a copy (which in a graph may be the copy engines') and of an elementwise kernel.
    """
    source = torch.empty(2**29, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copies: dict[str, Sequence[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "kernel": [lambda: torch.abs(source, out=target)],
    }
    times = _on_cuda(copies, replays=5)
    return 2 * 4 * source.numel() / min(t.us for t in times.values())


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """All rows, a column a field."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_text(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _text(value: object) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
