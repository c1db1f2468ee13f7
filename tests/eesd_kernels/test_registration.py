"""Every op: registered whole, equal to its reference, deterministic, and strict about input."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_samples import SAMPLES

import eesd_kernels as ek
from eesd_kernels import _library, reference

# float32 sums in another order; integers must be equal.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def _copy(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def _positional(op: str, arguments: dict[str, Any]) -> list[Any]:
    schema = getattr(torch.ops.eesd, op).default._schema.arguments
    defaults = {"eps": 1e-5, "scale": 6**-0.5, "swiglu": False}
    values = [arguments.get(a.name, defaults.get(a.name)) for a in schema]
    return [int(v) if a.name == "rule" else v for a, v in zip(schema, values, strict=True)]


def _outputs(result: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    results = [] if result is None else [result] if isinstance(result, torch.Tensor) else result
    return [*results, *(v for v in arguments.values() if isinstance(v, torch.Tensor))]


@pytest.mark.parametrize("op", SAMPLES)
def test_opcheck(op: str):
    torch.manual_seed(1)
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    torch.library.opcheck(getattr(torch.ops.eesd, op).default, _positional(op, SAMPLES[op]()))


@pytest.mark.parametrize("op", SAMPLES)
def test_equals_its_reference(op: str):
    torch.manual_seed(2)
    mine, theirs = SAMPLES[op](), None
    theirs = _copy(mine)
    got = _outputs(getattr(ek, op)(**mine), mine)
    want = _outputs(getattr(reference, op)(*_positional(op, theirs)), theirs)
    for a, b in zip(got, want, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, **TOLERANCE)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", SAMPLES)
def test_same_signature_as_its_reference(op: str):
    public = [p for p in inspect.signature(getattr(ek, op)).parameters if p != "out"]
    spec = [
        p
        for p in inspect.signature(getattr(reference, op)).parameters
        if p not in ("words", "draw")
    ]
    assert sorted(public) == sorted(spec)


@pytest.mark.parametrize("op", SAMPLES)
def test_says_which_tensor_is_wrong(op: str):
    """A missing dimension, another dtype, and no tensor at all: each names op and argument."""
    torch.manual_seed(3)
    good = SAMPLES[op]()
    for name, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        with pytest.raises(ValueError, match=rf"{op}: {name}: expected shape"):
            getattr(ek, op)(**{**good, name: value[None]})
        with pytest.raises(TypeError, match=rf"{op}: {name}: expected a tensor, got list"):
            getattr(ek, op)(**{**good, name: value.tolist()})
        with pytest.raises((TypeError, ValueError), match=rf"{op}: \w+: expected dtype"):
            getattr(ek, op)(**{**good, name: value.to(torch.int16)})


@pytest.mark.parametrize("op", SAMPLES)
def test_says_which_size_differs(op: str):
    torch.manual_seed(4)
    good = SAMPLES[op]()
    tensors = [k for k, v in good.items() if isinstance(v, torch.Tensor)]
    if len(tensors) < 2:
        pytest.skip("one tensor agrees with itself")
    first = good[tensors[0]]
    shorter = first[:-1] if op not in ("linear", "exit_topk", "rms_norm") else first[:, :-1]
    with pytest.raises(ValueError, match=rf"{op}: .*expected shape.*got"):
        getattr(ek, op)(**{**good, tensors[0]: shorter.contiguous()})


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("exit_topk", {"k": 0}, "k: expected 1 to 64, got 0"),
        ("exit_topk", {"k": 65}, "k: expected 1 to 64, got 65"),
        ("exit_topk", {"k": 2.5}, "k: expected an integer, got 2.5"),
        ("sample_draft", {"n": 8}, "n: expected 1 to 7, got 8"),
        ("thompson_update", {"discount": 1.5}, "discount: expected 0.0 to 1.0, got 1.5"),
        ("thompson_update", {"token_credit": -1.0}, "token_credit: expected 0.0 to inf, got -1.0"),
        (
            "thompson_update",
            {"credit_limit": torch.nan},
            "credit_limit: expected 0.0 to inf, got nan",
        ),
        ("thompson_draft_length", {"rule": 9}, "rule: expected 0 .bernoulli., 1 .cost."),
        (
            "thompson_draft_length",
            {"costs": torch.ones(3)},
            "costs: expected at least 6 entries .largest cap 5., got 3",
        ),
        ("sample_beta", {"alpha": torch.zeros(4, 3)}, "alpha: expected finite values above 0"),
        (
            "verify_linear",
            {"draft_length": torch.tensor([4, 0, 0, 0], dtype=torch.int32)},
            "draft_length: expected 0 to 3",
        ),
        (
            "verify_linear",
            {"draft_ids": torch.full((4, 3), 101, dtype=torch.int32)},
            "expected ids below V = 101",
        ),
        ("verify_linear", {"top_p": torch.zeros(4)}, "top_p: expected above 0, at most 1"),
        ("verify_linear", {"min_p": torch.full((4,), 2.0)}, "min_p: expected 0 to 1"),
        ("verify_linear", {"temperature": torch.full((4,), torch.nan)}, "temperature: expected 0"),
        ("verify_linear", {"law": torch.full((4,), 7).int()}, "law: expected 0 to 3"),
        (
            "tree_attention",
            {"q": torch.randn(3, 4, 3, 6)},
            "q: expected Hq a multiple of Hkv = 2, got Hq = 3",
        ),
        ("rope_cache_write", {"qkv": torch.randn(3, 4, 50)}, "qkv: expected .Hq . 2 Hkv. D"),
    ],
)
def test_values_out_of_range(op: str, changes: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(ek, op)(**{**SAMPLES[op](), **changes})


def test_implementations_names_every_op():
    assert sorted(ek.implementations()) == sorted(SAMPLES)
    assert ek.implementations()["linear"] == {"cpu": "C++", "cuda": "Triton"}


def test_triton_has_the_device_of_its_tensors_as_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(str(of))
        yield
        current.append("left")

    def kernel(scale: float, x: torch.Tensor, out: object) -> torch.Tensor:
        assert current == ["cpu"]
        return x * scale

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(_library, "import_module", lambda name: SimpleNamespace(scaled=kernel))
    op = _library.triton_op("scaled", lambda *_: None)
    assert torch.equal(op(2.0, torch.ones(3)), torch.full((3,), 2.0))
    assert current == ["cpu", "left"]
