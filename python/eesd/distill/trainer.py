"""The training loop: AdamW on the exit head alone, budgeted by steps, by seconds, or by both.

Progress is the larger of step / steps and the share of the seconds that were left when the first
step began (loading and compiling take from them), and the learning rate follows it. The windows of
a step come from (seed, step), so a run that is bounded by steps alone and resumed from a checkpoint
ends with the weights of an uninterrupted one, bit for bit on a CPU.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from eesd.distill.checkpoint import Checkpoint
from eesd.distill.data import Data
from eesd.distill.evaluate import Evaluation, evaluate
from eesd.distill.reporter import Reporter
from eesd.distill.settings import DEFAULT_STEPS, LR_TIMES_HIDDEN, DistillSettings
from eesd.distill.student import Student

REPORTS = 50  # lines of loss a run
EVALUATIONS = 10  # on held-out text a run, fewer where they would take
EVALUATION_SHARE = 0.1  # more than this of the time
SYNC_EVERY = 8  # steps: keeps the clock honest, and the launch queue full
# Between two checkpoints: what a kill may cost at most, whatever a step takes, and yet so long that
# the seconds which a large head takes to write are a small share.
CHECKPOINT_SECONDS = 60.0
BETAS = (0.9, 0.95)
# Of the seconds: saving, and a margin for a slow disk. The last evaluation's time is added.
FINISH_SECONDS = 2.0
FINISH_SHARE = 0.25  # at most so much of a small budget


class Trainer:
    """Student, optimiser and clock. `began` is the `time.monotonic()` seconds count from."""

    def __init__(
        self,
        student: Student,
        data: Data,
        settings: DistillSettings,
        *,
        seq_len: int,
        checkpoint: Checkpoint,
        checkpoint_steps: int,
        reporter: Reporter,
        began: float,
    ) -> None:
        self.student, self.data, self.settings = student, data, settings
        self.seq_len = seq_len
        self.checkpoint, self.checkpoint_steps = checkpoint, checkpoint_steps
        self.reporter, self.began = reporter, began
        self.device = student.backbone.device
        self.steps = settings.steps
        if settings.steps is None and settings.seconds is None:
            self.steps = DEFAULT_STEPS
        self.peak_lr = settings.lr or LR_TIMES_HIDDEN / student.backbone.config.hidden_size
        self.parameters = list(student.parameters().values())
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in self.parameters if p.dim() >= 2],
                    "weight_decay": settings.weight_decay,
                },
                {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=self.peak_lr,
            betas=BETAS,
            fused=self.device.type == "cuda",
        )
        self.micro_batch = settings.micro_batch or settings.batch
        self.windows = data.held_out_windows(settings.eval_sequences, seq_len)
        self.step = 0
        self.progress = 0.0
        self.seconds_before = 0.0  # spent by the interrupted runs that this one goes on from
        self.evaluation_seconds = 0.0
        self._start = (0.0, 0.0)  # progress and seconds when `run` began
        self.loss = math.nan
        self._loss_sum = torch.zeros((), device=self.device)

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one."""
        state = self.checkpoint.load()
        if state is None:
            return False
        with torch.no_grad():
            for name, weight in self.student.parameters().items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.progress = state["step"], state["progress"]
        self.seconds_before, self.loss = state["seconds"], state["loss"]
        return True

    def save(self) -> None:
        """Write the checkpoint."""
        self.checkpoint.save(
            {
                "weights": {k: w.detach() for k, w in self.student.parameters().items()},
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "progress": self.progress,
                "seconds": self.seconds(),
                "loss": self.loss,
            }
        )

    def seconds(self) -> float:
        """Wall-clock time so far, that of interrupted runs included."""
        return self.seconds_before + time.monotonic() - self.began

    def compile(self) -> str:
        """Compile and try one forward and backward; a failure costs speed, never the run."""
        try:
            self.student.compile()
            self._backward(self.step)
        except Exception as error:  # whatever a compiler raises, train on
            self.student = self.student.eager()
            first = str(error).splitlines()[0] if str(error) else ""
            self.reporter.warn(f"compiling failed, going on without: {first[:200]}")
            return "eager"
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self._loss_sum.zero_()
        return "compiled"

    def evaluate(self) -> Evaluation:
        """Measure on the held-out text."""
        began = time.monotonic()
        result = evaluate(
            self.student,
            self.windows,
            batch=self.micro_batch,
            kind=self.settings.loss,
            temperature=self.settings.temperature,
        )
        self.evaluation_seconds = time.monotonic() - began
        return result

    def run(self, measured: Evaluation) -> Evaluation:
        """Train to the end of the budget; `measured` is shown until there is a newer one."""
        reported, evaluated = _part(self.progress, REPORTS), _part(self.progress, EVALUATIONS)
        since, clock, clock_step = 0, time.monotonic(), self.step
        evaluated_at = saved_at = clock
        self._start = (self.progress, self.seconds())
        while self.progress < 1.0:
            self._train_step()
            since += 1
            done = self.progress >= 1.0
            if done or _part(self.progress, REPORTS) > reported:
                reported = _part(self.progress, REPORTS)
                self._take_loss(since)
                now = time.monotonic()
                rate = (self.step - clock_step) / max(now - clock, 1e-9)
                due = _part(self.progress, EVALUATIONS) > evaluated
                patient = (now - evaluated_at) * EVALUATION_SHARE >= self.evaluation_seconds
                if due and patient and not done:
                    evaluated = _part(self.progress, EVALUATIONS)
                    measured = self.evaluate()
                    evaluated_at = time.monotonic()
                self.reporter.show(min(self.progress, 1.0), self._line(measured, rate))
                since, clock, clock_step = 0, time.monotonic(), self.step
            aged = time.monotonic() - saved_at >= CHECKPOINT_SECONDS
            if not done and (aged or self.step % self.checkpoint_steps == 0):
                self.save()
                saved_at = time.monotonic()
        return measured

    def _train_step(self) -> None:
        settings = self.settings
        warmup = min(settings.warmup, max(1, (self.steps or 10**9) // 10))
        warm = min(1.0, (self.step + 1) / max(warmup, 1))
        lr = self.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * min(self.progress, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(self.step)
        torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        with _uninterrupted():  # so that whenever Ctrl-C comes, `save` saves a whole step
            self.optimizer.step()
            self.step += 1
            if self.device.type == "cuda" and self.step % SYNC_EVERY == 0:
                torch.cuda.synchronize(self.device)
            self.progress = self._progress()

    def _backward(self, step: int) -> None:
        settings = self.settings
        ids = self.data.batch(settings.seed, step, settings.batch, self.seq_len)
        for part in ids.split(self.micro_batch):
            loss = self.student.loss(part, settings.loss, settings.temperature)
            loss = loss * (len(part) / len(ids))
            loss.backward()
            self._loss_sum += loss.detach()

    def _progress(self) -> float:
        progress = self.step / self.steps if self.steps else 0.0
        if self.settings.seconds is not None:
            finish = FINISH_SECONDS + self.evaluation_seconds
            budget = self.settings.seconds - min(finish, FINISH_SHARE * self.settings.seconds)
            done, spent = self._start
            share = (self.seconds() - spent) / max(budget - spent, 1e-9)
            progress = max(progress, done + (1 - done) * share)
        return max(progress, self.progress)

    def _take_loss(self, since: int) -> None:
        self.loss = self._loss_sum.item() / since
        self._loss_sum.zero_()
        if not math.isfinite(self.loss):
            raise RuntimeError(f"the loss is {self.loss} at step {self.step}: lower lr")

    def _line(self, measured: Evaluation, rate: float) -> str:
        tokens = rate * self.settings.batch * self.seq_len
        return (
            f"step {self.step}  loss {self.loss:.4f}  agreement {measured.agreement:.3f}  "
            f"acceptance length {measured.mean_acceptance_length:.2f}  {tokens / 1e3:,.0f} ktok/s"
        )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: heard.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        before(signal.SIGINT, heard[-1])


def _part(progress: float, parts: int) -> int:
    return min(int(progress * parts), parts)


def versions() -> dict[str, Any]:
    """What made a head, for its recipe."""
    from eesd_kernels import __version__

    return {"eesd_kernels": __version__, "torch": torch.__version__}
