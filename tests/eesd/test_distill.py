"""Distillation: it learns, it resumes exactly, its head loads, and it says what is wrong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eesd.cli import main
from eesd.distill import DistillResult, DistillSettings, distill
from eesd.distill import data as distill_data
from eesd.distill.evaluate import beta_prior, draft_acceptance
from eesd.distill.losses import chunk_loss, chunks, head_loss
from eesd.distill.reporter import Reporter
from eesd.distill.trainer import Trainer
from eesd.loading import load

# A step takes 20 ms on a CPU at these sizes.
SMALL: dict[str, Any] = {
    "steps": 20, "batch": 4, "seq_len": 32, "eval_sequences": 4, "device": "cpu",
    "reporter": Reporter(quiet=True),
}  # fmt: skip
LOSSES = ("kl", "tv", "mixed")


class Killed(BaseException):
    """Nothing catches it, as with SIGKILL."""


class KillAfter(Reporter):
    """Raises at the first report after a share of the run."""

    def __init__(self, progress: float) -> None:
        super().__init__(quiet=True)
        self.progress = progress

    def show(self, progress: float, line: str) -> None:
        if progress >= self.progress:
            raise Killed


def small(model: Path, data: Path, out: Path, **changes: Any) -> DistillResult:
    """Exit layer 2 after few steps."""
    return distill(model, 2, [data], out, **{**SMALL, **changes})


def head_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a head's folder."""
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(
    tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> DistillResult:
    """A head after 400 steps."""
    out = tmp_path_factory.mktemp("trained") / "head"
    return distill(tiny_llama, 2, [tiny_text], out, **{**SMALL, "steps": 400, "batch": 16})


# --- learning


def test_agreement_rises(trained: DistillResult) -> None:
    assert trained.agreement > trained.agreement_before + 0.1
    assert trained.mean_acceptance_length > 1 + trained.agreement
    assert trained.sampled_acceptance > 0.5
    assert not trained.near_chance
    assert trained.steps == 400
    assert trained.tokens == 400 * 16 * 32


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("own_lm_head", [False, True])
def test_loss_falls(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, loss: str, own_lm_head: bool
) -> None:
    runs = [
        small(tiny_llama, tiny_text, tmp_path / str(steps), steps=steps, loss=loss,
              own_lm_head=own_lm_head, temperature=0.8)
        for steps in (1, 40)
    ]  # fmt: skip
    assert runs[1].loss < 0.9 * runs[0].loss


def test_head_loads_and_holds_the_prior(tiny_llama: Path, trained: DistillResult) -> None:
    model = load(tiny_llama, exit_head=trained.out, device="cpu")
    assert model.exit_head is not None
    config = model.exit_head.config
    assert config.exit_layer == 2
    assert (config.prior_alpha, config.prior_beta) == (trained.prior_alpha, trained.prior_beta)
    assert 2 <= config.prior_alpha + config.prior_beta <= 32.001
    mean = config.prior_alpha / (config.prior_alpha + config.prior_beta)
    assert abs(mean - trained.agreement) < 0.15
    recipe = config.recipe
    assert recipe["loss"] == "kl"
    assert recipe["steps"] == 400
    assert recipe["data"] == ["text.jsonl"]
    assert os.sep not in json.dumps(recipe)
    assert model.exit_head.lm_head is model.backbone.lm_head


def test_own_lm_head_is_saved(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    small(tiny_llama, tiny_text, tmp_path / "head", own_lm_head=True)
    head = load(tiny_llama, exit_head=tmp_path / "head", device="cpu").exit_head
    assert head is not None
    assert head.config.own_lm_head
    assert not torch.equal(head.lm_head, load(tiny_llama, device="cpu").backbone.lm_head)


def test_starts_from_the_last_layer(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    small(tiny_llama, tiny_text, tmp_path / "head", steps=1, lr=1e-30)
    backbone, head = load_file(tiny_llama / "model.safetensors"), head_weights(tmp_path / "head")
    for name, weight in head.items():
        source = name.replace("exit_layer.", "model.layers.3.")
        source = "model.norm.weight" if name == "norm.weight" else source
        assert torch.equal(weight, backbone[source]), name


def test_micro_batches_give_the_same_step(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    for micro in (4, 1):
        small(tiny_llama, tiny_text, tmp_path / str(micro), steps=2, micro_batch=micro)
    one, four = head_weights(tmp_path / "1"), head_weights(tmp_path / "4")
    # Adam divides by the gradient's size, so rounding shows where a gradient is near 0.
    assert all(torch.allclose(one[name], four[name], atol=2e-3) for name in one)


def test_seconds_end_a_run(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    result = small(tiny_llama, tiny_text, tmp_path / "head", steps=None, seconds=2.0)
    assert 1 <= result.steps < 10_000
    assert result.seconds < 4


# --- the loss and the measures


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient(kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eesd.distill.losses.CHUNK_ELEMENTS", 16)
    torch.manual_seed(0)
    hidden = torch.randn(35, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    teacher, teacher_head = torch.randn(35, 5).double(), torch.randn(11, 5).double()
    assert len(chunks(35, 11)) == 3
    loss = head_loss(hidden, head, teacher, teacher_head, kind=kind, temperature=temperature)
    grads = torch.autograd.grad(loss, (hidden, head))
    p = (teacher @ teacher_head.T / temperature).softmax(-1)
    q = (hidden @ head.T / temperature).softmax(-1)
    kl, tv = (p * (p / q).log()).sum(-1).mean(), (p - q).abs().sum(-1).mean() / 2
    expected = {"kl": kl, "tv": tv, "mixed": (kl + tv) / 2}[kind]
    assert torch.isclose(loss.double(), expected, rtol=1e-6)
    for ours, autograd in zip(grads, torch.autograd.grad(expected, (hidden, head)), strict=True):
        assert torch.allclose(ours, autograd, atol=1e-8)


def test_equal_distributions_cost_nothing() -> None:
    logits = torch.randn(4, 9)
    for kind in LOSSES:
        loss, grad = chunk_loss(logits, logits, kind, 1.0)
        assert abs(float(loss)) < 1e-6
        assert float(grad.abs().max()) < 1e-6


def test_draft_acceptance_by_hand() -> None:
    agreed = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    # Drafts of 3 from positions 0..5 accept 2, 1, 0, 3, 2, 1 of 3, 2, 1, 3, 3, 2 observed.
    rates, length = draft_acceptance(agreed, 3)
    assert length == 1 + 9 / 6
    assert rates.tolist() == [9 / 14]
    assert draft_acceptance(torch.ones(2, 9, dtype=torch.bool), 5)[1] == 6


def test_beta_prior_finds_its_parameters() -> None:
    rng = np.random.default_rng(0)
    rates = torch.from_numpy(rng.binomial(256, rng.beta(6.0, 3.0, 20_000)) / 256)
    alpha, beta = beta_prior(rates, 256)
    assert abs(alpha - 6) < 0.3
    assert abs(beta - 3) < 0.2
    assert sum(beta_prior(torch.full((9,), 0.5), 256)) == 32
    assert min(beta_prior(torch.zeros(9), 256)) > 0


# --- interruption


@pytest.mark.parametrize("when", [0.3, 0.8])
def test_resumes_to_the_same_weights(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, when: float
) -> None:
    small(tiny_llama, tiny_text, tmp_path / "whole")
    out = tmp_path / "cut"
    with pytest.raises(Killed):
        small(tiny_llama, tiny_text, out, checkpoint_steps=5, reporter=KillAfter(when))
    assert not out.exists()
    assert (tmp_path / "cut.partial" / "checkpoint.pt").exists()
    small(tiny_llama, tiny_text, out, checkpoint_steps=5)
    assert not (tmp_path / "cut.partial").exists()
    whole, cut = head_weights(tmp_path / "whole"), head_weights(out)
    assert whole.keys() == cut.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, cut[name]), name


def test_checkpoints_by_the_clock(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eesd.distill.trainer.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        small(tiny_llama, tiny_text, tmp_path / "head", reporter=KillAfter(0.5))
    saved = torch.load(tmp_path / "head.partial" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 9


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, whoever started us."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_backward(trainer: Trainer, step: int) -> None:
    """While gradients are made of step 7."""
    if step == 7:
        raise KeyboardInterrupt


def interrupt_update(optimizer: torch.optim.Optimizer) -> None:
    """Once the weights are of step 7's end, and the count of steps is not."""
    if next(iter(optimizer.state.values()))["step"] == 8:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("place", "interrupt", "step"),
    [
        ((Trainer, "_backward"), interrupt_backward, 7),
        ((torch.optim.AdamW, "step"), interrupt_update, 8),
    ],
    ids=["backward", "update"],
)
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_loses_nothing(
    tiny_llama: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: tuple[type, str],
    interrupt: Callable[..., None],
    step: int,
) -> None:
    small(tiny_llama, tiny_text, tmp_path / "whole")
    out, inner = tmp_path / "cut", getattr(*place)

    def interrupted(self: Any, *args: Any) -> Any:
        result = inner(self, *args)
        interrupt(self, *args)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            small(tiny_llama, tiny_text, out)
    path = tmp_path / "cut.partial" / "checkpoint.pt"
    said = f"stopped after step {step}, saved in {path}: give the same arguments to go on"
    assert said in capsys.readouterr().err
    small(tiny_llama, tiny_text, out)
    whole, cut = head_weights(tmp_path / "whole"), head_weights(out)
    for name, weight in whole.items():
        assert torch.equal(weight, cut[name]), name


def test_ctrl_c_while_finishing(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    small(tiny_llama, tiny_text, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("eesd.exit_head.ExitHead.save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small(tiny_llama, tiny_text, tmp_path / "cut")
    saved = torch.load(tmp_path / "cut.partial" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 20
    assert small(tiny_llama, tiny_text, tmp_path / "cut").steps == 20
    whole, cut = head_weights(tmp_path / "whole"), head_weights(tmp_path / "cut")
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())


def test_ctrl_c_before_the_first_new_step(
    tiny_llama: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out, path = tmp_path / "head", tmp_path / "head.partial" / "checkpoint.pt"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_backward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small(tiny_llama, tiny_text, out)
    assert "stopped; nothing was saved" in capsys.readouterr().err
    assert not path.exists()
    with pytest.raises(Killed):
        small(tiny_llama, tiny_text, out, checkpoint_steps=5, reporter=KillAfter(0.5))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small(tiny_llama, tiny_text, out)
    assert f"stopped; {path} is of an earlier step" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_refuses_to_go_on_with_other_arguments(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "head"
    with pytest.raises(Killed):
        small(tiny_llama, tiny_text, out, checkpoint_steps=2, reporter=KillAfter(0.5))
    with pytest.raises(ValueError, match=r"loss was 'kl', now 'tv'.*restart"):
        small(tiny_llama, tiny_text, out, loss="tv")
    (tmp_path / "head.partial" / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        small(tiny_llama, tiny_text, out)
    assert small(tiny_llama, tiny_text, out, loss="tv", restart=True).steps == 20


# --- data


def write(path: Path, *rows: object) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fields_of_jsonl(tiny_llama: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"question": "a ", "answer": "b"},
        {"prompt": "c ", "completion": "d"},
        {"text": "e", "prompt": "no"},
        {"prompt": "f"},
        {"other": "g"},
    )
    model = load(tiny_llama, device="cpu")
    tokens, starts, skipped = distill_data._read(path, model)
    assert model.decode([t for t in tokens.tolist() if t]) == "a\nbc def"
    assert starts.tolist() == [0, 4, 8, 10]
    assert skipped == 1


def test_held_out_is_never_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    documents = [[0, *([2 + i % 60] * 9)] for i in range(200)]
    np.asarray(documents, np.uint16).tofile(tmp_path / "t.bin")
    data = distill_data.read_data([tmp_path / "t.bin"], load(tiny_llama, device="cpu"), 20)
    held_out = [token for i in (49, 99, 149, 199) for token in documents[i]]
    assert data.held_out.tolist() == held_out
    assert len(data.train) == 2000 - 40
    kept = [d for i, d in enumerate(documents) if i % 50 != 49]
    assert data.train.tolist() == [token for d in kept for token in d]
    assert data.starts.tolist() == list(range(0, 1941, 10))
    assert torch.equal(data.batch(7, 3, 8, 20), data.batch(7, 3, 8, 20))
    assert not torch.equal(data.batch(7, 3, 8, 20), data.batch(7, 4, 8, 20))
    assert data.held_out_windows(9, 20).shape == (2, 20)


def test_few_documents_hold_out_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the cat sees the dog. " * 200)
    data = distill_data.read_data([tmp_path / "book.txt"], load(tiny_llama, device="cpu"), 32)
    total = 1 + 22 * 200
    assert len(data.held_out) == total // 50
    assert len(data.train) == total - total // 50


def test_rows_of_generated_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    np.tile(np.arange(2, 22, dtype=np.uint16), 100).tofile(tmp_path / "self.bin")
    (tmp_path / "self.json").write_text('{"row_length": 20}')
    data = distill_data.read_data([tmp_path / "self.bin"], load(tiny_llama, device="cpu"), 32)
    assert len(data.held_out) == 2 * 20
    assert data.starts.tolist()[:3] == [0, 20, 40]


def test_long_text_is_cut_at_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_data, "_PIECE_CHARS", 10)
    text = "one two\nthree four\n" + "x" * 25 + "\nend"
    pieces = list(distill_data._pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 10
    assert pieces[0] == "one two"


# --- what is wrong, said


def test_warns_near_chance(
    make_llama: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    deep = make_llama(tmp_path / "deep", num_hidden_layers=12)
    result = distill(deep, 1, [tiny_text], tmp_path / "head", **{**SMALL, "lr": 1e-9})
    assert result.near_chance
    assert "near chance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "mse"}, "loss: expected one of kl, tv, mixed, got 'mse'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"seconds": -1.0}, "seconds: expected a finite number above 0"),
        ({"batch": 4, "micro_batch": 3}, "micro_batch: expected a divisor of batch = 4, got 3"),
        ({"seq_len": 65}, "seq_len: expected at most the model's 64, got 65"),
        ({"checkpoint_steps": 0}, "checkpoint_steps: expected at least 1"),
        ({"warm_up": 3}, "unknown option.*warm_up"),
        ({"device": "tpu"}, "device: expected cpu or cuda"),
        ({"dtype": "float16"}, "dtype: float16 gradients underflow"),
    ],
)
def test_bad_options(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small(tiny_llama, tiny_text, tmp_path / "head", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exit_layer", [-1, 0, 4])
def test_exit_layer_out_of_range(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, exit_layer: int
) -> None:
    with pytest.raises(ValueError, match=f"exit_layer: expected 1 to 3, got {exit_layer}"):
        distill(tiny_llama, exit_layer, [tiny_text], tmp_path / "head", **SMALL)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("a.csv", b"a,b", r"expected .txt, .jsonl or .bin, got '.csv'"),
        ("a.txt", b" \n", "no usable text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"too short", "too little text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "no usable text .1 objects have none of the fields text"),
        ("a.bin", b"abc", "an odd number of bytes"),
        ("a.bin", b"\x40\x00" * 99, "token id 64 is outside the model's vocabulary of 64"),
    ],
)
def test_bad_data(
    tiny_llama: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        small(tiny_llama, tmp_path / name, tmp_path / "head")


def test_missing_tokenizer(
    make_llama: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    model = make_llama(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer.json, which text.jsonl needs"):
        small(model, tiny_text, tmp_path / "head")


def test_out_is_not_replaced_unasked(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    small(tiny_llama, tiny_text, out, steps=1)
    before = head_weights(out)
    with pytest.raises(ValueError, match="exists already; overwrite"):
        small(tiny_llama, tiny_text, out, steps=1)
    small(tiny_llama, tiny_text, out, steps=3, overwrite=True)
    assert not torch.equal(before["norm.weight"], head_weights(out)["norm.weight"])
    with pytest.raises(ValueError, match="not an exit head's folder, not replacing it"):
        small(tiny_llama, tiny_text, tiny_llama, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder to write"):
        small(tiny_llama, tiny_text, tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="is not a folder that can be written to"):
        small(tiny_llama, tiny_text, tmp_path / "file" / "head")


def test_settings_refuse_wrong_kinds() -> None:
    with pytest.raises(ValueError, match=r"batch: expected an integer, got 2.5"):
        DistillSettings(batch=2.5)  # type: ignore[arg-type]


# --- the command


def test_command(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"distill --model {tiny_llama} --exit-layer 2 --data {tiny_text} --out {tmp_path}/head"
    line += " --steps 3 --batch 2 --seq-len 16 --device cpu"
    assert main(line.split()) == 0
    printed = capsys.readouterr()
    assert "mean acceptance length" in printed.out
    assert "step 3" in printed.err
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("eesd: error: out: ")
    assert len(printed.err.splitlines()) == 1
    assert main([*line.split(), "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_command_interrupted(
    tiny_llama: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eesd.distill.run.read_data", interrupt)
    line = f"distill --model {tiny_llama} --exit-layer 2 --data {tiny_text} --out {tmp_path}/head"
    assert main(line.split()) == 130
    assert capsys.readouterr().err == "warning: stopped; nothing was saved\neesd: interrupted\n"


def test_command_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (["--help"], "distill"), (["distill", "--help"], "example:"):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


def test_command_into_a_closed_pipe() -> None:
    code = "import sys; from eesd.cli import main; sys.exit(main(['--version']))"
    read, write_end = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert process.returncode == 141
    assert process.stderr == b""
