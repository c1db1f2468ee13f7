"""Exit heads of each family: trained, saved, loaded, drafting; the parts that a family adds."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eesd
from eesd import load
from eesd.cache import Block
from eesd.cli import main
from eesd.distill import distill
from eesd.distill.reporter import Reporter
from eesd.distill.student import Student
from eesd.exit_head import ExitHead
from eesd.layer import INFERENCE

pytest.importorskip("transformers")

from families import ids_of, write

SMALL: dict[str, Any] = {
    "batch": 8, "seq_len": 40, "eval_sequences": 4, "device": "cpu",
    "reporter": Reporter(quiet=True),
}  # fmt: skip
LAYER = {
    "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight",
    "mlp.up_proj.weight", "mlp.down_proj.weight",
    *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
}  # fmt: skip
ADDED: dict[str, set[str]] = {
    "Llama": set(),
    "Mistral": set(),
    "Qwen2": {f"self_attn.{x}_proj.bias" for x in "qkv"},
    "Qwen3": {f"self_attn.{x}_proj.bias" for x in "qkvo"}
    | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
}
WINDOWS = {"Llama": None, "Mistral": 20, "Qwen2": 20, "Qwen3": 20}


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family with the tokenizer of the tiny Llama."""
    made = {}
    for family in ADDED:
        changes = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
        if family == "Qwen3":
            changes["attention_bias"] = True
        made[family] = write(tmp_path_factory.mktemp(family), family, changes, shrink=0.3)
        shutil.copy(tiny_llama / "tokenizer.json", made[family])
    return made


@pytest.fixture(params=ADDED)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(folder: Path, data: Path, out: Path, steps: int, **changes: Any) -> Any:
    """Exit layer 1."""
    return distill(folder, 1, [data], out, **{**SMALL, "steps": steps, **changes})


def test_training_runs_what_drafting_runs(folders: dict[str, Path], family: str) -> None:
    """The two passes of a step against the layers over the cache, window and all."""
    backbone = load(folders[family], device="cpu").backbone
    student, ids = Student(backbone, 1, own_lm_head=False), ids_of(2, 45) % 64
    assert student.layer.window == WINDOWS[family]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # no longer the last layer
        for weight in student.parameters().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        at_exit, final = student.teach(ids)
        out = student.exit(at_exit)
    config = ExitHead.bare(backbone, 1, "").config
    head = ExitHead(backbone, config, student.layer, student.norm, backbone.lm_head)
    with torch.inference_mode():
        cache = backbone.new_cache(2, 45, exit_layers=1)
        full = torch.full((2,), 45, dtype=torch.int32)
        block = Block(torch.zeros_like(full), full)
        hidden = backbone.run_layers(backbone.embed(ids), 0, 1, cache, block)
        torch.testing.assert_close(hidden, at_exit, rtol=1e-4, atol=1e-4)
        drafted = INFERENCE.rms_norm(
            head.run(hidden, cache, block), student.norm, backbone.config.rms_eps
        )
        torch.testing.assert_close(drafted, out, rtol=1e-4, atol=1e-4)
        written = cache.data[-1].clone()
        cache.data[-1].zero_()
        head.write(hidden, cache, block)
        assert torch.equal(cache.data[-1], written)
        hidden = backbone.run_layers(hidden, 1, backbone.config.num_layers, cache, block)
        target = torch.nn.functional.linear(final, backbone.lm_head)
        torch.testing.assert_close(backbone.logits(hidden), target, rtol=1e-4, atol=1e-4)


def test_every_part_is_trained(folders: dict[str, Path], family: str) -> None:
    student = Student(load(folders[family], device="cpu").backbone, 1, own_lm_head=False)
    student.loss(ids_of(2, 45) % 64, "kl", 1.0).backward()
    parameters = student.parameters()
    assert len(parameters) == 7 + {"Llama": 0, "Mistral": 0, "Qwen2": 1, "Qwen3": 4}[family]
    for name, weight in parameters.items():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_starts_from_the_last_layer(
    folders: dict[str, Path], family: str, tiny_text: Path, tmp_path: Path
) -> None:
    run(folders[family], tiny_text, tmp_path / "head", 1, lr=1e-30)
    backbone = load_file(folders[family] / "model.safetensors")
    head = load_file(tmp_path / "head" / "model.safetensors")
    assert head.keys() == {f"exit_layer.{name}" for name in LAYER | ADDED[family]} | {"norm.weight"}
    for name, weight in head.items():
        source = name.replace("exit_layer.", "model.layers.3.")
        source = "model.norm.weight" if name == "norm.weight" else source
        assert torch.equal(weight, backbone[source]), name


def test_a_trained_head_drafts(
    folders: dict[str, Path],
    family: str,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Distilled, saved, found by the model, shown, and its drafts change no token."""
    folder = Path(shutil.copytree(folders[family], tmp_path / "model"))
    result = run(folder, tiny_text, folder / "exit_head", 30)
    assert result.agreement > result.agreement_before
    model = load(folder, device="cpu")
    head = model.exit_head
    assert head is not None
    assert head.layer is not None
    assert head.layer.window == WINDOWS[family]
    assert head.config.backbone_architecture == f"{family}ForCausalLM"

    saved = load_file(folder / "exit_head" / "model.safetensors")
    head.save(tmp_path / "again", model.backbone)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)

    ids = ids_of(2, 30) % 63 + 1
    given = {"max_new_tokens": 30, "eos_token_id": ()}
    plain = eesd.generate(model, ids, num_assistant_tokens=0, **given)
    out = eesd.generate(
        model, ids, num_assistant_tokens=4, num_assistant_tokens_schedule="constant",
        return_dict_in_generate=True, **given,
    )  # fmt: skip
    assert torch.equal(out.sequences, plain)
    assert 0 < out.speculative.draft_acceptance_rate < 1

    assert main(["info", "--model", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{family}ForCausalLM: 4 layers" in shown
    windows = {"Mistral": "4 of 4", "Qwen2": "3 of 4", "Qwen3": "3 of 4"}.get(family)
    line = f"sliding window of 20 positions in {windows} layers"
    assert (line in shown) if windows else ("sliding" not in shown)


def test_a_head_of_another_family_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of one with the same sizes; the weights are other ones too, but this says more."""
    mistral, llama = load(folders["Mistral"]).backbone, load(folders["Llama"])
    config = ExitHead.bare(mistral, 1, llama.fingerprint).config
    head = ExitHead(mistral, config, mistral.layers[-1], mistral.norm, mistral.lm_head)
    head.save(tmp_path / "head", mistral)
    with pytest.raises(ValueError, match="with architecture MistralForCausalLM, the model has Ll"):
        load(folders["Llama"], tmp_path / "head")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("self_attn.k_norm.weight", "no tensor 'exit_layer.self_attn.k_norm.weight'"),
        ("self_attn.o_proj.bias", "no tensor 'exit_layer.self_attn.o_proj.bias'"),
    ],
)
def test_a_head_without_a_part(
    folders: dict[str, Path], tmp_path: Path, name: str, message: str
) -> None:
    model = load(folders["Qwen3"])
    backbone = model.backbone
    config = ExitHead.bare(backbone, 1, model.fingerprint).config
    head = ExitHead(backbone, config, backbone.layers[-1], backbone.norm, backbone.lm_head)
    head.save(tmp_path / "head", backbone)
    assert load(folders["Qwen3"], tmp_path / "head").exit_head is not None
    path = tmp_path / "head" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"exit_layer.{name}"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        load(folders["Qwen3"], tmp_path / "head")
