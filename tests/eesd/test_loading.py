"""`eesd.load` and exit heads on disk: what is damaged or does not fit is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eesd.exit_head
from eesd import Model, load
from eesd.config import ExitHeadConfig, ModelConfig
from eesd.exit_head import ExitHead
from eesd.loading import target_device

MakeLlama = Callable[..., Path]
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Read, change and write the folder's tensors."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path, parts: int) -> None:
    """Spread the folder's tensors over files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {}
    for part in range(parts):
        name = f"model-{part}.safetensors"
        mine = dict(list(sorted(tensors.items()))[part::parts])
        save_file(mine, folder / name)
        index.update(dict.fromkeys(mine, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def new_head(model: Model, *, own_lm_head: bool = False, seed: int = 0) -> ExitHead:
    """A head with random weights after layer 2."""
    backbone, shape = model.backbone, model.config
    generator = torch.Generator().manual_seed(seed)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    config = ExitHeadConfig(
        exit_layer=2,
        backbone_architecture=shape.architecture,
        backbone_fingerprint=model.fingerprint,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        own_lm_head=own_lm_head,
        prior_alpha=3.5,
        prior_beta=1.25,
        recipe={"steps": 7},
    )
    layer = backbone.layers[0].map(like)
    lm_head = like(backbone.lm_head) if own_lm_head else backbone.lm_head
    return ExitHead(backbone, config, layer, like(backbone.norm), lm_head)


@pytest.fixture
def with_head(folder: Path) -> Path:
    """The copy with a head of its own."""
    model = load(folder)
    new_head(model, own_lm_head=True).save(folder / "exit_head", model.backbone)
    return folder


# --- a folder that is not whole


def test_the_folder_as_it_is_loads(with_head: Path) -> None:
    """What every test below damages is in order before."""
    model = load(str(with_head))
    assert model.name == str(with_head)
    assert model.exit_head is not None
    assert model.exit_head.config.exit_layer == 2
    assert model.encode("a cat").shape == (1, 5)
    assert model.decode(model.encode("a cat")[0]) == "a cat"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such model folder"):
        load(tmp_path / "nowhere")


def test_a_file_is_no_folder(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such model folder"):
        load(tiny_llama / CONFIG)


def test_missing_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"vocab_size": 64,', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
    ],
    ids=["cut", "empty", "not-utf8", "list"],
)
@pytest.mark.parametrize("name", [CONFIG, "model.safetensors.index.json", "exit_head/config.json"])
def test_broken_json(with_head: Path, name: str, text: bytes, message: str) -> None:
    (with_head / name).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        load(with_head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "foo"}, "rope_scaling: expected an object or null, got 'foo'"),
        ({"rope_parameters": [1]}, r"rope_parameters: expected an object or null, got \[1\]"),
        ({"rope_scaling": {"factor": "a"}}, "rope_scaling: factor: expected a number, got 'a'"),
        ({"rope_theta": None}, "rope_theta: expected a number, got None"),
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a number, got None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number above 0, got nan"),
        ({"eos_token_id": "x"}, "eos_token_id: expected an integer, a list .*, got 'x'"),
        ({"eos_token_id": [0, 1.5]}, r"eos_token_id: expected an integer, .*, got \[0, 1\.5\]"),
        ({"bos_token_id": [1]}, r"bos_token_id: expected an integer or null, got \[1\]"),
        ({"pad_token_id": True}, "pad_token_id: expected an integer or null, got True"),
        ({"architectures": 5}, "architectures: expected a list of names, got 5"),
        ({"architectures": "GPT2LMHeadModel"}, "architecture 'GPT2LMHeadModel' is not supported"),
        ({"head_dim": "a"}, "head_dim: expected a positive integer, got 'a'"),
        ({"head_dim": 15}, "head size 15 is not supported"),
        ({"max_position_embeddings": 2**24 + 1}, "max_position_embeddings: expected at most 16777"),
        ({"max_position_embeddings": 64.5}, "max_position_embeddings: expected .*, got 64.5"),
    ],
    ids=str,
)
def test_config_fields_of_the_wrong_kind(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        load(folder)


def test_config_fields_that_may_be_null_or_plain(folder: Path) -> None:
    edit_config(
        folder, architectures="LlamaForCausalLM", num_key_value_heads=None, head_dim=None,
        rope_scaling=None, eos_token_id=None, bos_token_id=None, max_position_embeddings=2**24,
    )  # fmt: skip
    config = ModelConfig.from_folder(folder)
    assert (config.num_kv_heads, config.head_size) == (2, 16)
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)


def test_index_without_a_weight_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: .*weight_map"):
        load(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        load(folder)


def test_missing_shard(folder: Path) -> None:
    shard(folder, 3)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors: no such file"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 300, -1], ids=["empty", "size", "header", "data"])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ],
)
def test_missing_tensor(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=63)
    with pytest.raises(ValueError, match=r"mlp.*: expected shape \[63, 32\], got \[64, 32\]"):
        load(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value

    edit_weights(folder, spoil)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: has NaN or infinite"):
        load(folder)


def test_integer_weights(folder: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{name}: expected floating point, got torch.int8"):
        load(folder)


@pytest.mark.parametrize("text", ["{}", '{"version": "1.0", "model": ', "hello"])
def test_damaged_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        load(folder)


def test_no_tokenizer_is_met_when_it_is_needed(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    model = load(folder)
    for use in (lambda: model.encode("a"), lambda: model.decode([3])):
        with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
            use()


@pytest.mark.parametrize("device", ["tpu-7", "meta", "xpu"])
def test_bad_device(tiny_llama: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device: expected cpu or cuda.*, got '{device}'"):
        load(tiny_llama, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="device: 'cuda:1' asked for, but no CUDA device"):
        load(tiny_llama, device="cuda:1")


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", (7, 5)),
        ("get_device_name", "Tesla T4"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    with pytest.raises(ValueError, match=r"capability 8\.0 or later, got Tesla T4 of 7\.5"):
        target_device(None)
    with pytest.raises(ValueError, match="'cuda:3' asked for, but there are 1 CUDA devices"):
        target_device("cuda:3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert target_device(None) == torch.device("cuda")


@pytest.mark.parametrize("dtype", ["int8", "fp32", torch.int64, torch.complex64, 32])
def test_bad_dtype(tiny_llama: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of float16, bfloat16, .*, got"):
        load(tiny_llama, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "want"),
    [(None, torch.float32), ("float64", torch.float64), (torch.float16, torch.float16)],
)
def test_dtype_on_a_cpu(tiny_llama: Path, dtype: Any, want: torch.dtype) -> None:
    backbone = load(tiny_llama, device="cpu", dtype=dtype).backbone
    assert backbone.dtype is want
    assert backbone.embed(torch.tensor([[1]])).dtype is want


# --- exit heads


def test_head_of_other_weights(tiny_llama: Path, make_llama: MakeLlama, tmp_path: Path) -> None:
    other = load(make_llama(tmp_path / "other", seed=1))
    new_head(other).save(tmp_path / "head", other.backbone)
    assert load(tmp_path / "other", tmp_path / "head").exit_head is not None
    with pytest.raises(ValueError, match=r"head: .* trained on a backbone with other weights"):
        load(tiny_llama, tmp_path / "head")


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [("hidden_size", 64, 32), ("vocab_size", 128, 64), ("num_hidden_layers", 5, 4)],
)
def test_head_of_other_sizes(
    tiny_llama: Path, make_llama: MakeLlama, tmp_path: Path, name: str, value: int, want: int
) -> None:
    other = load(make_llama(tmp_path / "other", **{name: value}))
    new_head(other).save(tmp_path / "head", other.backbone)
    field = name.replace("hidden_layers", "layers")
    with pytest.raises(ValueError, match=f"backbone with {field} {value}, the model has {want}"):
        load(tiny_llama, tmp_path / "head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red", "age": 3}, r"unknown field\(s\): age, colour"),
        ({"model_type": "llama"}, "not an exit head: model_type is 'llama'"),
        ({"exit_layer": 0}, "exit_layer: expected an integer, 1 to 3, got 0"),
        ({"exit_layer": 4}, "exit_layer: expected an integer, 1 to 3, got 4"),
        ({"exit_layer": 1.5}, r"exit_layer: expected .*, got 1\.5"),
        ({"exit_layer": "2"}, "exit_layer: expected .*, got '2'"),
        ({"prior_alpha": 0}, "prior_alpha, prior_beta: expected .*above 0"),
        ({"prior_beta": float("nan")}, "prior_alpha, prior_beta: expected .*above 0"),
        ({"prior_alpha": float("inf")}, "prior_alpha, prior_beta: expected .*above 0"),
        ({"backbone_architecture": "GPT2LMHeadModel"}, "with architecture GPT2LMHeadModel"),
    ],
    ids=str,
)
def test_head_config_is_refused(with_head: Path, changes: dict[str, Any], message: str) -> None:
    head = Path(shutil.copytree(with_head / "exit_head", with_head / "elsewhere"))
    edit_config(head, **changes)
    with pytest.raises(ValueError, match=f"elsewhere.*: .*{message}"):
        load(with_head, head)


def test_head_config_without_a_field(with_head: Path) -> None:
    path = with_head / "exit_head" / CONFIG
    content = json.loads(path.read_text())
    del content["exit_layer"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="exit_layer"):
        load(with_head)


def test_missing_head_folder(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nohead/config\.json: no such file"):
        load(tiny_llama, tmp_path / "nohead")


def test_head_without_a_tensor(with_head: Path) -> None:
    head = with_head / "exit_head"
    edit_weights(head, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(ValueError, match=r"exit_head: no tensor 'norm\.weight'"):
        load(with_head)


def test_head_and_bare_exit_together(with_head: Path) -> None:
    with pytest.raises(ValueError, match="exit_head and assistant_early_exit: give one"):
        load(with_head, with_head / "exit_head", assistant_early_exit=2)


@pytest.mark.parametrize("layer", [0, 4, -1, 1.5, "2", True])
def test_bad_early_exit(tiny_llama: Path, layer: Any) -> None:
    with pytest.raises(ValueError, match=r"exit_layer: expected an integer, 1 to 3, got"):
        load(tiny_llama, assistant_early_exit=layer)


def test_which_head_is_taken(with_head: Path) -> None:
    """The folder's own, another one that is named, or a bare exit instead of it."""
    own = load(with_head)
    other = new_head(own, seed=1)
    other.save(with_head / "other", own.backbone)
    assert own.exit_head is not None
    named = load(with_head, with_head / "other").exit_head
    assert named is not None
    assert torch.equal(named.norm, other.norm)
    assert not torch.equal(named.norm, own.exit_head.norm)
    bare = load(with_head, assistant_early_exit=3).exit_head
    assert bare is not None
    assert (bare.layer, bare.config.exit_layer) == (None, 3)
    shutil.rmtree(with_head / "exit_head")
    assert load(with_head).exit_head is None


@pytest.mark.parametrize("own_lm_head", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_head_round_trips(tiny_llama: Path, tmp_path: Path, dtype: str, own_lm_head: bool) -> None:
    model = load(tiny_llama, dtype=dtype)
    head = new_head(model, own_lm_head=own_lm_head)
    head.save(tmp_path / "deep" / "head", model.backbone)
    again = load(tiny_llama, tmp_path / "deep" / "head", dtype=dtype).exit_head
    assert again is not None
    assert again.config == head.config
    assert head.layer is not None
    assert again.layer is not None
    for name, want in head.layer.tensors().items():
        got = getattr(again.layer, name)
        assert got.dtype is want.dtype, name
        assert torch.equal(got, want), name
    assert torch.equal(again.norm, head.norm)
    assert torch.equal(again.lm_head, head.lm_head)
    saved = load_file(tmp_path / "deep" / "head" / WEIGHTS)
    assert ("lm_head.weight" in saved) is own_lm_head
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["head"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o644), (0o077, 0o600)])
def test_head_is_readable_by_whom_the_umask_lets(
    tiny_llama: Path, tmp_path: Path, umask: int, mode: int
) -> None:
    model = load(tiny_llama)
    before = os.umask(umask)
    try:
        new_head(model).save(tmp_path / "head", model.backbone)
    finally:
        os.umask(before)
    assert (tmp_path / "head" / WEIGHTS).stat().st_mode & 0o777 == mode


def _half_written(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
    Path(path).write_bytes(b"\0" * 100)
    raise OSError("No space left on device")


def _no_text(*_: Any, **__: Any) -> str:
    raise OSError("No space left on device")


@pytest.mark.parametrize("there", [False, True], ids=["fresh", "over an old one"])
@pytest.mark.parametrize("where", ["weights", "config"])
def test_head_is_written_whole_or_not_at_all(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, there: bool
) -> None:
    model, place = load(tiny_llama), tmp_path / "out" / "head"
    old = new_head(model, seed=1)
    if there:
        old.save(place, model.backbone)
    new = new_head(model, seed=2)
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(eesd.exit_head, "save_file", _half_written)
        else:
            patch.setattr(eesd.exit_head.json, "dumps", _no_text)
        with pytest.raises(OSError, match="No space left"):
            new.save(place, model.backbone)
    assert [p.name for p in place.parent.iterdir()] == (["head"] if there else [])
    if there:
        kept = load(tiny_llama, place).exit_head
        assert kept is not None
        assert torch.equal(kept.norm, old.norm)


def test_a_later_head_takes_the_place_of_the_former(tiny_llama: Path, tmp_path: Path) -> None:
    model, place = load(tiny_llama), tmp_path / "head"
    new_head(model, own_lm_head=True, seed=1).save(place, model.backbone)
    second = new_head(model, seed=2)
    second.save(place, model.backbone)
    loaded = load(tiny_llama, place).exit_head
    assert loaded is not None
    assert torch.equal(loaded.norm, second.norm)
    assert sorted(p.name for p in place.iterdir()) == [CONFIG, WEIGHTS]


def test_a_bare_exit_has_nothing_to_save(tiny_llama: Path, tmp_path: Path) -> None:
    model = load(tiny_llama, assistant_early_exit=1)
    assert model.exit_head is not None
    with pytest.raises(ValueError, match="bare early exit has no weights"):
        model.exit_head.save(tmp_path / "head", model.backbone)


# --- fingerprint


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_fingerprint_does_not_see_shards(tiny_llama: Path, folder: Path, parts: int) -> None:
    shard(folder, parts)
    assert load(folder).fingerprint == load(tiny_llama).fingerprint


def test_fingerprint_sees_the_first_and_last_weight_of_every_tensor(folder: Path) -> None:
    whole = load_file(folder / WEIGHTS)
    prints = {load(folder).fingerprint}
    for name in whole:
        for place in (0, -1):
            changed = {n: t.clone() for n, t in whole.items()}
            changed[name].view(-1)[place] += 2.0**-10
            save_file(changed, folder / WEIGHTS)
            prints.add(load(folder).fingerprint)
    assert len(prints) == 1 + 2 * len(whole)


def test_fingerprint_sees_names_and_dtypes(folder: Path) -> None:
    before = load(folder).fingerprint

    def swap(tensors: dict[str, Tensor]) -> None:
        a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    def twice(tensors: dict[str, Tensor]) -> None:
        swap(tensors)  # back to what they were
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float64)

    edit_weights(folder, swap)
    swapped = load(folder).fingerprint
    edit_weights(folder, twice)
    assert len({before, swapped, load(folder).fingerprint}) == 3
