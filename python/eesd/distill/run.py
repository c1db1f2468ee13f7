"""`distill`: from a model folder and text to an exit head's folder."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eesd.distill.checkpoint import ADVICE, Checkpoint, check_out
from eesd.distill.data import read_data
from eesd.distill.evaluate import Evaluation
from eesd.distill.reporter import Reporter
from eesd.distill.settings import (
    DEFAULT_SEQ_LEN,
    DRAFT_LENGTH,
    DistillResult,
    DistillSettings,
)
from eesd.distill.student import Student
from eesd.distill.trainer import Trainer, versions
from eesd.exit_head import ExitHead
from eesd.loading import Model, load

_SAVED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def distill(
    model: str | os.PathLike[str],
    exit_layer: int,
    data: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    settings: DistillSettings | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    restart: bool = False,
    compile: bool = False,
    checkpoint_steps: int = 500,
    reporter: Reporter | None = None,
    began: float | None = None,
    **options: Any,
) -> DistillResult:
    """Train an exit head on the backbone's own distributions.

    The backbone stays frozen. An interrupted run leaves `<out>.partial/`; the same call goes on
    from there. The head's folder appears whole at the end.

    Args:
        model: a Hugging Face folder, or `"demo"`.
        exit_layer: N, 1 to layers - 1: the head reads the hidden state after N layers.
        data: `.txt`, `.jsonl` and `.bin` files, see `eesd.distill.data`.
        out: folder to write.
        settings: what decides the weights; or its fields as `options`.
        device: by default a CUDA device where there is one.
        dtype: of the arithmetic; by default bfloat16 on CUDA and float32 on a CPU.
        overwrite: replace an exit head that `out` holds.
        restart: discard the checkpoint of an interrupted run.
        compile: use torch.compile; where that fails, a warning and no harm.
        checkpoint_steps: steps between two checkpoints; there is one every minute besides, and
            one at Ctrl-C.
        began: `time.monotonic()` that the seconds count from; by default that of the call.

    Raises:
        ValueError: whatever is missing, damaged or does not fit, by name.
        RuntimeError: the loss stopped being finite.
    """
    began = time.monotonic() if began is None else began
    if settings is not None and options:
        raise ValueError("settings: give it, or its fields, not both")
    if unknown := set(options) - {f.name for f in dataclasses.fields(DistillSettings)}:
        raise ValueError(f"unknown option(s): {', '.join(sorted(unknown))}")
    settings = settings or DistillSettings(**options)
    if checkpoint_steps < 1:
        raise ValueError(f"checkpoint_steps: expected at least 1, got {checkpoint_steps}")
    target = Path(out)
    check_out(target, overwrite=overwrite)
    trainer: Trainer | None = None
    with reporter or Reporter() as say:
        try:
            loaded = _load(model, device, dtype)
            shape = loaded.config
            if not 1 <= exit_layer < shape.num_layers:
                raise ValueError(
                    f"exit_layer: expected 1 to {shape.num_layers - 1}, got {exit_layer}"
                )
            seq_len = settings.seq_len or min(DEFAULT_SEQ_LEN, shape.max_position)
            if seq_len > shape.max_position:
                raise ValueError(
                    f"seq_len: expected at most the model's {shape.max_position}, got {seq_len}"
                )
            corpus = read_data([Path(path) for path in data], loaded, seq_len)
            if corpus.skipped:
                say.warn(f"{corpus.skipped} .jsonl objects without text were skipped")
            checkpoint = Checkpoint(
                target,
                {
                    **dataclasses.asdict(settings),
                    "exit_layer": exit_layer,
                    "seq_len": seq_len,
                    "dtype": str(loaded.backbone.dtype),
                    "backbone": loaded.fingerprint,
                    "data": [*corpus.names, corpus.digest],
                },
            )
            if restart:
                checkpoint.remove()
            trainer = Trainer(
                Student(loaded.backbone, exit_layer, own_lm_head=settings.own_lm_head),
                corpus,
                settings,
                seq_len=seq_len,
                checkpoint=checkpoint,
                checkpoint_steps=checkpoint_steps,
                reporter=say,
                began=began,
            )
            before = trainer.evaluate()
            count = sum(p.numel() for p in trainer.parameters)
            say.say(
                f"exit layer {exit_layer} of {shape.num_layers}, {count:,} parameters, "
                f"{len(corpus.train):,} tokens, {loaded.backbone.device}; agreement before "
                f"training {before.agreement:.3f}"
            )
            if trainer.resume():
                say.say(f"going on from step {trainer.step}")
            if compile:
                say.say(f"{trainer.compile()} after {trainer.seconds():.0f} s")
            trainer.run(before)
            return _finish(trainer, loaded, before, target, corpus.names, say)
        except KeyboardInterrupt:
            _save_interrupted(trainer, Checkpoint(target, {}).path, say)
            raise


def _save_interrupted(trainer: Trainer | None, path: Path, say: Reporter) -> None:
    """Keep what was trained, and say where."""
    if trainer is not None and trainer.step > 0:
        try:
            trainer.save()
        except (OSError, RuntimeError) as error:  # torch.save raises both
            say.warn(f"step {trainer.step} could not be saved: {error}")
        else:
            say.warn(f"stopped after step {trainer.step}, saved in {path}: {ADVICE}")
            return
    if path.is_file():
        say.warn(f"stopped; {path} is of an earlier step: {ADVICE}")
    else:
        say.warn("stopped; nothing was saved")


def _load(
    model: str | os.PathLike[str],
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> Model:
    if dtype is None:
        on_cuda = torch.cuda.is_available() if device is None else "cuda" in str(device)
        dtype = torch.bfloat16 if on_cuda else torch.float32
    loaded = load(os.fspath(model), device=device, dtype=dtype)
    if loaded.backbone.dtype is torch.float16:
        raise ValueError("dtype: float16 gradients underflow; expected bfloat16 or float32")
    return loaded


def _finish(
    trainer: Trainer, model: Model, before: Evaluation, out: Path, names: list[str], say: Reporter
) -> DistillResult:
    """Judge the weights as they are saved, save them, remove the checkpoint."""
    student, settings = trainer.student, trainer.settings
    saved = _SAVED_DTYPES.get(model.config.dtype, torch.float32)
    student.round_to(saved)
    final = trainer.evaluate()
    tokens = trainer.step * settings.batch * trainer.seq_len
    recipe = {
        **dataclasses.asdict(settings),
        "lr": trainer.peak_lr,
        "steps": trainer.step,
        "seq_len": trainer.seq_len,
        "tokens": tokens,
        "seconds": round(trainer.seconds(), 1),
        "train_loss": round(trainer.loss, 5),
        "held_out_loss": round(final.loss, 5),
        "agreement": round(final.agreement, 4),
        "agreement_before": round(before.agreement, 4),
        "most_frequent": round(final.most_frequent, 4),
        "sampled_acceptance": round(final.sampled_acceptance, 4),
        "mean_acceptance_length": round(final.mean_acceptance_length, 4),
        "draft_length": DRAFT_LENGTH,
        "data": names,
        "versions": versions(),
    }
    config = dataclasses.replace(
        ExitHead.bare(model.backbone, student.exit_layer, model.fingerprint).config,
        own_lm_head=student.own_lm_head,
        prior_alpha=final.prior_alpha,
        prior_beta=final.prior_beta,
        recipe=recipe,
    )
    layer = student.layer.map(lambda weight: weight.detach().to(saved))
    head = ExitHead(
        model.backbone, config, layer, student.norm.to(saved), student.lm_head.to(saved)
    )
    head.save(out, model.backbone)
    trainer.checkpoint.remove()
    if final.near_chance:
        say.warn(
            f"agreement {final.agreement:.3f} is near chance (guessing the most frequent token "
            f"gives {final.most_frequent:.3f}): this head will hardly draft an accepted token; "
            "train longer, on more or other text, or with a later exit layer"
        )
    return DistillResult(
        out=out,
        steps=trainer.step,
        tokens=tokens,
        seconds=trainer.seconds(),
        loss=final.loss,
        agreement=final.agreement,
        agreement_before=before.agreement,
        sampled_acceptance=final.sampled_acceptance,
        mean_acceptance_length=final.mean_acceptance_length,
        most_frequent=final.most_frequent,
        near_chance=final.near_chance,
        prior_alpha=final.prior_alpha,
        prior_beta=final.prior_beta,
    )
