"""Trains the demo model's backbone from a corpus folder and writes a Hugging Face folder.

The model is transformers' LlamaForCausalLM: 24 layers of width 192, 11.6M parameters. Training
runs its weights through the functional forward below (`embed`, `layer`, `head_loss`; a test holds
it equal to transformers'), because at this width a step is bound by kernel launches: one layer is
compiled once and shared by all, and forward, backward, clipping and AdamW are captured in one CUDA
graph. Matrix products run in bf16, the residual stream, the weights and AdamW in float32.

The learning rate follows progress = max(step / steps, elapsed / seconds), so a run ends in time.
A killed run goes on from its checkpoint with --resume. Writes bf16 weights, tokenizer files and
`training.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WARM_UP_STEPS = 200
FINISH_SECONDS = 6.0  # kept of --seconds for the last evaluation and the writing
# Half of a batch's rows begin at a document, as prompts do: bos is their first token.
DOCUMENT_START_SHARE = 0.5


@dataclass(frozen=True)
class Settings:
    """How a run trains and for how long; each field is an option of the command line."""

    batch: int = 32
    context: int = 1024
    steps: int = 6000
    seconds: float = 0.0  # 0: no wall-clock budget
    lr: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    log_every: int = 100
    eval_every: int = 1500
    checkpoint_every: int = 1500


def make_model(
    vocab: int, layers: int, hidden: int, heads: int, ffn: int, context: int, seed: int
) -> LlamaForCausalLM:
    """A LlamaForCausalLM in float32, initialised for a deep and narrow stack.

    Matrices have std 0.5 / sqrt(fan-in); those that write to the residual stream are scaled by
    1 / sqrt(2 layers) more, so that the stream's variance does not grow with depth.
    """
    if hidden % heads or (hidden // heads) % 2:
        raise ValueError(f"hidden size must be heads x an even head size, got {hidden} and {heads}")
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        # Not 0: it would make token 0, bos and eos too, the embedding's padding row, never trained.
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0)
                continue
            std = 0.03 if "embed_tokens" in name else 0.5 / math.sqrt(weight.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * layers)
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def rope_tables(context: int, head: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head], float32, theta 10,000, transformers' half-split order."""
    frequency = 10000.0 ** (-torch.arange(0, head, 2, device=device, dtype=torch.float32) / head)
    angle = torch.outer(torch.arange(context, device=device, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of the embedding: tokens int64 [B, T] -> float32 [B, T, H]."""
    return F.embedding(tokens, weight)


def layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: Tensor,
    heads: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """One Llama decoder layer on the float32 residual stream [B, T, H], products in `dtype`."""
    batch, length, hidden = x.shape
    h = _norm(x, norms[0], eps).to(dtype)
    packed = F.linear(h, torch.cat(qkv).to(dtype)).view(batch, length, 3, heads, hidden // heads)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, head]
    q = _rotate(q.float(), cos, sin).to(dtype)
    k = _rotate(k.float(), cos, sin).to(dtype)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, hidden), out.to(dtype)).float()
    h = _norm(x, norms[1], eps).to(dtype)
    gate, up = F.linear(h, torch.cat(gate_up).to(dtype)).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down.to(dtype)).float()


def head_loss(
    x: Tensor, norm: Tensor, weight: Tensor, labels: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Cross entropy of each position, float32 [B * T], labels int64 [B, T]."""
    logits = F.linear(_norm(x, norm, eps).to(dtype), weight.to(dtype)).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


class Backbone:
    """Runs a LlamaForCausalLM's weights through the functions above."""

    def __init__(self, model: LlamaForCausalLM, context: int, dtype: torch.dtype) -> None:
        config = model.config
        device = model.model.norm.weight.device
        self.rope = rope_tables(context, config.hidden_size // config.num_attention_heads, device)
        self.embedding = model.model.embed_tokens.weight
        self.norm = model.model.norm.weight
        self.rest = (config.num_attention_heads, config.rms_norm_eps, dtype)
        self.weights = [
            (
                (m.input_layernorm.weight, m.post_attention_layernorm.weight),
                tuple(getattr(m.self_attn, f"{p}_proj").weight for p in "qkv"),
                m.self_attn.o_proj.weight,
                (m.mlp.gate_proj.weight, m.mlp.up_proj.weight),
                m.mlp.down_proj.weight,
            )
            for m in model.model.layers
        ]
        self.functions: tuple[Callable, Callable, Callable] = (embed, layer, head_loss)

    def compile(self, mode: str) -> None:
        """Compiles the three functions; the layer's code is made once for all layers."""
        e, la, h = (torch.compile(f, dynamic=False, mode=mode) for f in (embed, layer, head_loss))
        self.functions = (e, la, h)

    def losses(self, tokens: Tensor, functions: tuple | None = None) -> Tensor:
        """Loss of predicting tokens[:, 1:] from tokens[:, :-1]: [B, T + 1] -> [B * T]."""
        embed_, layer_, head_loss_ = functions or self.functions
        x = embed_(tokens[:, :-1].contiguous(), self.embedding)
        for weights in self.weights:
            x = layer_(x, *self.rope, *weights, *self.rest)
        labels = tokens[:, 1:].contiguous()
        return head_loss_(x, self.norm, self.embedding, labels, *self.rest[1:])


class Corpus:
    """A corpus folder's tokens: the training stream on the device, held-out ones by source."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        if not (folder / "sources.json").is_file():
            raise FileNotFoundError(f"no corpus in {folder}: run eesd.demo.corpus first")
        self.folder = folder
        self.sources = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self._host = np.fromfile(folder / "tokens_train.bin", np.uint16)
        self.heldout = np.fromfile(folder / "tokens_heldout.bin", np.uint16)
        self.train = torch.from_numpy(self._host.astype(np.int32)).to(device)
        self._starts = np.flatnonzero(self._host[:-1] == self.sources["bos"])

    def offsets(self, seed: int, step: int, batch: int, context: int) -> Tensor:
        """Where step `step`'s windows begin, int64 [batch]: the same for every run of one seed."""
        rng = np.random.default_rng((seed, step))
        last = len(self._host) - context - 1
        if last < 1:
            raise ValueError(
                f"corpus of {len(self._host)} tokens is shorter than a {context} window"
            )
        offsets = rng.integers(0, last, batch)
        snap = rng.random(batch) < DOCUMENT_START_SHARE
        before = self._starts[np.searchsorted(self._starts, offsets, side="right") - 1]
        return torch.from_numpy(np.where(snap, before, offsets).astype(np.int64))


@torch.no_grad()
def evaluate(backbone: Backbone, corpus: Corpus, batch: int, context: int) -> dict[str, float]:
    """Held-out loss in nats a token, by source and over `all`; runs uncompiled."""
    device = backbone.embedding.device
    total, count, result = 0.0, 0, {}
    for name, (start, end) in corpus.sources["heldout"].items():
        stream = torch.from_numpy(corpus.heldout[start:end].astype(np.int64)).to(device)
        if len(stream) < 2:
            continue
        # Rows of context + 1 that share their edge token; the rest is a short row of its own.
        rows = (len(stream) - 1) // context
        parts = list(stream[: rows * context + 1].unfold(0, context + 1, context).split(batch))
        parts = parts if rows else []
        if (len(stream) - 1) % context:
            parts.append(stream[rows * context :][None])
        source_sum = sum(_short_losses(backbone, part) for part in parts)
        result[name] = source_sum / (len(stream) - 1)
        total, count = total + source_sum, count + len(stream) - 1
    result["all"] = total / max(count, 1)
    return result


def _short_losses(backbone: Backbone, tokens: Tensor) -> float:
    """Summed loss of rows that may be shorter than the rope tables."""
    cos, sin = backbone.rope
    length = tokens.shape[1] - 1
    short = copy.copy(backbone)
    short.rope = (cos[:length], sin[:length])
    return short.losses(tokens, (embed, layer, head_loss)).double().sum().item()


class Trainer:
    """Model, optimiser and the captured step; `run` is the loop."""

    def __init__(self, model: LlamaForCausalLM, corpus: Corpus, settings: Settings) -> None:
        self.model, self.corpus, self.settings = model, corpus, settings
        self.device = model.model.norm.weight.device
        self.cuda = self.device.type == "cuda"
        dtype = torch.bfloat16 if self.cuda else torch.float32
        self.backbone = Backbone(model, settings.context, dtype)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in self.parameters if p.dim() >= 2]
        plain = [p for p in self.parameters if p.dim() < 2]
        # A tensor on the device, so that a captured step reads each step's learning rate from it.
        self.lr = torch.zeros((), device=self.device) if self.cuda else 0.0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=(0.9, 0.95),
            fused=True,
            capturable=self.cuda,
        )
        self.offsets = torch.zeros(settings.batch, dtype=torch.int64, device=self.device)
        self.window = torch.arange(settings.context + 1, device=self.device)
        self.loss_sum = torch.zeros((), device=self.device)
        self.step_index = 0
        self.progress = 0.0
        self.seconds_before = 0.0
        self.history: list[dict] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.how = "eager"

    def _step(self) -> None:
        tokens = self.corpus.train[self.offsets[:, None] + self.window].long()
        loss = self.backbone.losses(tokens).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.loss_sum.add_(loss.detach())

    def _set_lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def train_step(self) -> None:
        """One step at the current progress: nothing here waits for the device."""
        s = self.settings
        warm = min(1.0, (self.step_index + 1) / min(WARM_UP_STEPS, 1 + s.steps // 10))
        self._set_lr(s.lr * warm * max(0.0, 1.0 - self.progress))
        self.offsets.copy_(self.corpus.offsets(s.seed, self.step_index, s.batch, s.context))
        if self.graph is not None:
            self.graph.replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self._step()
        self.step_index += 1

    def prepare(self, compile_mode: str | None, graph: bool) -> None:
        """Compiles and captures what can be; a failure costs speed, never the run.

        The warm-up steps are real ones. They run on the stream of the capture.
        """
        if compile_mode is not None:
            try:
                self.backbone.compile(compile_mode)
                self._warm_up()
                self.how = f"compiled ({compile_mode})"
            except Exception as error:  # whatever a compiler raises, train on
                print(f"compile failed, going on eagerly: {str(error)[:400]}", flush=True)
                self.backbone.functions = (embed, layer, head_loss)
        if graph and self.cuda and self.how != "eager":
            try:
                captured = torch.cuda.CUDAGraph()
                self.optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
                    self._step()
                self.graph = captured
                before = self.parameters[0].detach().clone()
                self._warm_up()
                if torch.equal(before, self.parameters[0]) or not self.loss_sum.isfinite():
                    raise RuntimeError("the captured step does not train")
                self.how += " in one CUDA graph"
            except Exception as error:  # likewise
                print(f"capture failed, going on without: {str(error)[:400]}", flush=True)
                self.graph = None
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.synchronize()

    def _warm_up(self) -> None:
        for _ in range(min(3, self.settings.steps - self.step_index)):
            self.train_step()
        if self.cuda:
            torch.cuda.synchronize()

    def save_checkpoint(self, path: Path) -> None:
        """Writes the state beside its final name, then renames: never half a file."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_index,
            "progress": self.progress,
            "seconds": self.seconds_before,
            "history": self.history,
            "seed": self.settings.seed,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load_checkpoint(self, path: Path) -> None:
        """Goes back to a checkpoint of the same model and seed; call before `prepare`."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["seed"] != self.settings.seed:
            raise ValueError(f"checkpoint has seed {state['seed']}, not {self.settings.seed}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.step_index, self.progress = state["step"], state["progress"]
        self.seconds_before, self.history = state["seconds"], state["history"]

    def run(self, began: float, checkpoint: Path | None, reporter: Reporter) -> float:
        """Trains to the end of the steps or of the seconds; returns the last logged loss.

        Args:
            began: `time.monotonic()` at the program's start, from which --seconds count.
            checkpoint: where to write the state every `checkpoint_every` steps.
            reporter: prints the lines.
        """
        s, say = self.settings, reporter.say
        loop_began = time.monotonic()
        budget = max(0.1, s.seconds - FINISH_SECONDS - (loop_began - began)) if s.seconds else None
        progress_before, seconds_before = self.progress, self.seconds_before
        last_loss, since, logged_at = math.nan, 0, loop_began
        self.loss_sum.zero_()
        while self.step_index < s.steps and self.progress < 1.0:
            self.train_step()
            since += 1
            if self.cuda and self.step_index % 8 == 0:
                torch.cuda.current_stream().synchronize()  # keeps the clock below honest
            now = time.monotonic()
            self.progress = self.step_index / s.steps
            if budget is not None:
                share = (now - loop_began) / budget
                self.progress = max(self.progress, progress_before + (1 - progress_before) * share)
            if self.step_index % 8 == 0:
                reporter.tick(self.progress)
            last = self.step_index == s.steps or self.progress >= 1.0
            if self.step_index % s.log_every == 0 or last:
                last_loss = self.loss_sum.item() / since
                now = time.monotonic()
                rate = since * s.batch * s.context / (now - logged_at)
                say(
                    f"step {self.step_index:6d}  loss {last_loss:.4f}  progress {self.progress:.3f}"
                    f"  {rate / 1e6:.2f} Mtok/s  {now - began:.0f} s"
                )
                if not math.isfinite(last_loss):
                    raise RuntimeError(f"loss is {last_loss} at step {self.step_index}: lower --lr")
                self.loss_sum.zero_()
                since, logged_at = 0, now
            self.seconds_before = seconds_before + now - loop_began
            if self.step_index % s.eval_every == 0 or last:
                heldout = evaluate(self.backbone, self.corpus, s.batch, s.context)
                self.history.append(
                    {"step": self.step_index, "loss": last_loss, "heldout": heldout}
                )
                say("held out  " + "  ".join(f"{k} {v:.3f}" for k, v in heldout.items()))
                logged_at = time.monotonic()
            if checkpoint is not None and self.step_index % s.checkpoint_every == 0 and not last:
                self.save_checkpoint(checkpoint)
                logged_at = time.monotonic()
        reporter.tick(1.0)
        return last_loss


def write_folder(model: LlamaForCausalLM, corpus: Path, out: Path, report: dict) -> None:
    """Writes the Hugging Face folder: bf16 weights, config, tokenizer, training.json."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    saved = copy.deepcopy(model).cpu().bfloat16()
    saved.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    saved.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    config.setdefault("rope_theta", 10000.0)  # where engines other than transformers 5 look for it
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(corpus / name, partial / name)
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (partial / "training.json").write_text(text, encoding="utf-8")
    previous = out.with_name(out.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        out.rename(previous)
    partial.rename(out)
    shutil.rmtree(previous, ignore_errors=True)


class Reporter:
    """Plain flushed lines; on a terminal also rich's progress bar below them."""

    def __init__(self) -> None:
        self._bar = None
        if sys.stdout.isatty():
            try:
                from rich.progress import Progress
            except ImportError:
                return
            self._bar = Progress()
            self._task = self._bar.add_task("training", total=1.0)

    def say(self, line: str) -> None:
        """Prints a line."""
        print(line, flush=True) if self._bar is None else self._bar.console.print(line)

    def tick(self, progress: float) -> None:
        """Moves the bar to `progress`, 0 to 1; stops it at the end."""
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._task, completed=min(progress, 1.0))
            if progress >= 1.0:
                self._bar.stop()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options; defaults are the shipped model's."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--corpus", type=Path, required=True, help="folder that eesd.demo.corpus wrote")
    p.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    for name, kind in Settings.__annotations__.items():
        number = float if kind == "float" else int
        option = "--" + name.replace("_", "-")
        p.add_argument(option, type=number, default=getattr(Settings, name))
    for name, size in (("layers", 24), ("hidden", 192), ("heads", 3), ("ffn", 528)):
        p.add_argument("--" + name, type=int, default=size)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--no-cuda-graph", action="store_true")
    p.add_argument(
        "--compile-mode", choices=("default", "max-autotune-no-cudagraphs"), default="default"
    )
    p.add_argument("--checkpoint", type=Path, help="default: OUT.checkpoint.pt")
    p.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint, if there is one"
    )
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m eesd.demo.train --corpus DIR --out DIR`."""
    began = time.monotonic()
    args = parse(argv)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__annotations__})
    device, reporter = torch.device(args.device), Reporter()
    say = reporter.say
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # flash attention captures without plan caches
    try:
        corpus = Corpus(args.corpus, device)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = (args.layers, args.hidden, args.heads, args.ffn)
    vocab = corpus.manifest["vocab_size"]
    model = make_model(vocab, *sizes, settings.context, settings.seed)
    torch.nn.Module.to(model, device)
    count = sum(p.numel() for p in model.parameters())
    say(f"{count:,} parameters, {len(corpus.train):,} training tokens, {device}")
    checkpoint = args.checkpoint or args.out.with_name(args.out.name + ".checkpoint.pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    if device.type == "cuda":
        torch.cuda.synchronize()  # the weights were copied on another stream
    with torch.cuda.stream(stream):  # a no-op for None
        trainer = Trainer(model, corpus, settings)
        if args.resume and checkpoint.is_file():
            trainer.load_checkpoint(checkpoint)
            say(f"resumed at step {trainer.step_index}")
        trainer.prepare(None if args.no_compile else args.compile_mode, not args.no_cuda_graph)
        say(f"step runs {trainer.how}; ready after {time.monotonic() - began:.0f} s")
        loss = trainer.run(began, checkpoint, reporter)
    if device.type == "cuda":
        torch.cuda.synchronize()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report = {
        "parameters": count,
        "steps": trainer.step_index,
        "tokens_seen": trainer.step_index * settings.batch * settings.context,
        "seconds": round(trainer.seconds_before, 1),
        "device": name,
        "step": trainer.how,
        "train_loss": loss,
        "heldout_loss": trainer.history[-1]["heldout"] if trainer.history else {},
        "history": trainer.history,
        "settings": {n: getattr(settings, n) for n in Settings.__annotations__},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "corpus": corpus.manifest,
    }
    write_folder(model, args.corpus, args.out, report)
    checkpoint.unlink(missing_ok=True)
    say(f"wrote {args.out} after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
