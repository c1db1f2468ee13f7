"""linear's kernel against its reference: dtypes, epilogues, strides; every row's bits, on a GPU."""

from typing import Any

import pytest
import torch

import eesd_kernels as ek
from eesd_kernels import reference
from eesd_kernels.triton.linear import ROW_TILES, linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Roundings to the dtype: of the result and, after a norm, of what goes in. The interpreter
# truncates bfloat16. float32 differs from float64 by its sums.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FORMS = ("plain", "residual", "swiglu", "norm", "norm and swiglu", "norm and residual")

# Every product of LLaMA-2 7B, 13B, 70B and Llama-3 8B: q k v, output, gate and up, down, head.
REAL = {
    "7b": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)],
    "13b": [(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824), (32000, 5120)],
    "70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (32000, 8192)],
    "3-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
}
SHAPES = sorted({shape for shapes in REAL.values() for shape in shapes})


def arguments(
    rows: int, outs: int, columns: int, dtype: torch.dtype, form: str, weight_dtype: Any = None
) -> dict[str, Any]:
    """Inputs whose results are about one in size, made on the device; `outs` of the weight."""
    g = torch.Generator(DEVICE).manual_seed(rows + outs + columns)

    def normal(*shape: int, kind: torch.dtype = dtype, std: float = 1.0) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device=DEVICE).normal_(0, std, generator=g)

    given = {
        "x": normal(rows, columns),
        "weight": normal(outs, columns, kind=weight_dtype or dtype, std=columns**-0.5),
    }
    if "residual" in form:
        given["residual"] = normal(rows, outs)
    if "norm" in form:
        given["norm_weight"] = 1 + 0.3 * normal(columns)
    return {**given, "eps": 1e-3, "swiglu": "swiglu" in form}


def in_double(given: dict[str, Any]) -> torch.Tensor:
    return reference.linear(
        **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    )


def close(got: torch.Tensor | None, want: torch.Tensor, dtype: torch.dtype, form: str = "") -> None:
    """A norm rounds once more, and a gate multiplies what came of it."""
    assert got is not None
    assert got.dtype is dtype
    bound = TOLERANCE[dtype] * (2 if "norm" in form and "swiglu" in form else 1)
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 131), (16, 128), (70, 257)])
def test_equals_the_reference(rows: int, columns: int, dtype: torch.dtype, form: str) -> None:
    given = arguments(rows, 74, columns, dtype, form)
    want = in_double(given)
    out = torch.empty_like(want, dtype=dtype)
    got = linear(**given, out=(out,))
    assert got is out
    close(got, want, dtype)


@pytest.mark.parametrize("outs", [1, 64, 131])
def test_float32_over_a_bfloat16_weight(outs: int) -> None:
    given = arguments(17, outs, 97, torch.float32, "residual", torch.bfloat16)
    close(linear(**given), in_double(given), torch.float32)


@pytest.mark.parametrize(("rows", "outs"), [(0, 5), (3, 0)])
def test_nothing_to_do(rows: int, outs: int) -> None:
    got = linear(torch.ones(rows, 4, device=DEVICE), torch.ones(outs, 4, device=DEVICE))
    assert got is not None
    assert got.shape == (rows, outs)


def test_strided_and_more_dimensions() -> None:
    wide = torch.randn(6, 80, device=DEVICE)
    frame = torch.randn(30, 100, device=DEVICE)
    for weight in (frame[:, 10:50], frame[:20, ::2][:, :40], frame[:, :30].t()[:, :24]):
        width = weight.shape[1]
        residual = wide[:, : weight.shape[0]]
        for x in (wide[:, 20 : 20 + width], wide[:, ::2][:, :width], wide[::2, :width]):
            added = residual[: x.shape[0]]
            want = linear(x.contiguous(), weight.contiguous(), added.contiguous())
            assert want is not None
            got = linear(x, weight, added)
            assert got is not None
            assert torch.equal(got, want)
    x = wide.view(2, 3, 80)[..., :40]
    got = linear(x, frame[:, :40], torch.zeros(2, 3, 30, device=DEVICE))
    assert got is not None
    assert got.shape == (2, 3, 30)
    torch.testing.assert_close(got, linear(x.reshape(6, 40), frame[:, :40]).view(2, 3, 30))


@pytest.mark.parametrize("form", ["residual", "norm and swiglu"])
def test_a_bad_row_does_not_spread(form: str) -> None:
    given = arguments(20, 74, 257, torch.bfloat16, form)
    clean = linear(**given)
    assert clean is not None
    given["x"][3, 100] = torch.nan
    given["x"][17, 0] = torch.inf
    spoilt = linear(**given)
    assert spoilt is not None
    assert spoilt[3].isnan().all()
    assert not spoilt[17].isfinite().any()
    keep = [r for r in range(20) if r not in (3, 17)]
    assert torch.equal(spoilt[keep], clean[keep])


def test_leaves_float64_and_empty_sums_to_the_reference() -> None:
    x = torch.randn(2, 4, dtype=torch.float64, device=DEVICE)
    assert linear(x, x) is None
    assert linear(torch.ones(2, 0, device=DEVICE), torch.ones(3, 0, device=DEVICE)) is None


def test_the_cpu_does_it_one_by_one() -> None:
    given = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments(
        5, 34, 65, torch.float32, "norm and swiglu").items()}  # fmt: skip
    x = ek.rms_norm(given["x"], given["norm_weight"], eps=1e-3)
    want = ek.swiglu(ek.linear(x, given["weight"]))
    assert torch.equal(ek.linear(**given), want)
    residual = torch.randn(5, 17)
    assert torch.equal(ek.linear(**given, residual=residual), want + residual)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_out_of_the_public_function(form: str, device: str) -> None:
    given = arguments(5, 34, 65, torch.float32, form)
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    want = ek.linear(**given)
    out = torch.empty_like(want)
    assert ek.linear(**given, out=out) is out
    assert torch.equal(out, want)
    if "residual" in given:
        given["out"] = given["residual"]
        assert torch.equal(ek.linear(**given), want)


def test_says_what_is_wrong() -> None:
    x, weight = torch.ones(2, 4), torch.ones(6, 4)
    with pytest.raises(
        ValueError, match=r"linear: residual: expected shape \[R, 3\], got \[2, 6\]"
    ):
        ek.linear(x, weight, residual=torch.ones(2, 6), swiglu=True)
    with pytest.raises(ValueError, match="linear: weight: expected 2 I rows, got 5"):
        ek.linear(x, weight[:5], swiglu=True)
    with pytest.raises(ValueError, match=r"linear: norm_weight: expected shape \[H\] with H = 4"):
        ek.linear(x, weight, norm_weight=torch.ones(5))
    with pytest.raises(ValueError, match=r"linear: out: expected a contiguous tensor"):
        ek.linear(x, weight, out=torch.ones(2, 12)[:, ::2])
    with pytest.raises(TypeError, match="linear: out: expected dtype"):
        ek.linear(x, weight, out=torch.ones(2, 6).half())


@pytest.mark.gpu
@pytest.mark.parametrize(("outs", "columns"), SHAPES, ids=[f"{o}x{h}" for o, h in SHAPES])
def test_real_shapes(outs: int, columns: int) -> None:
    """Against float64 on some of the outputs; each row's bits alone, in any order, in any tile."""
    given = arguments(200, outs, columns, torch.bfloat16, "plain")
    x, weight = given["x"], given["weight"]
    together = ek.linear(x, weight)
    some = torch.arange(0, outs, max(1, outs // 1000), device=DEVICE)
    close(together[:, some], x.double() @ weight[some].double().T, x.dtype)
    assert_rows_equal(given, together)


FUSED = [(15360, 5120, "norm"), (8192, 28672, "residual"), (27648, 5120, "norm and swiglu")]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("outs", "columns", "form"), FUSED, ids=[f for *_, f in FUSED])
def test_fused_at_real_shapes(outs: int, columns: int, form: str, dtype: torch.dtype) -> None:
    given = arguments(200, outs, columns, dtype, form)
    together = ek.linear(**given)
    close(together, in_double(given), dtype, form)
    assert_rows_equal(given, together)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_at_a_real_shape(weight_dtype: torch.dtype) -> None:
    given = arguments(200, 4096, 4096, torch.float32, "residual", weight_dtype)
    together = ek.linear(**given)
    close(together, in_double(given), torch.float32)
    assert_rows_equal(given, together)


def assert_rows_equal(given: dict[str, Any], together: torch.Tensor) -> None:
    def of(rows: Any) -> dict[str, Any]:
        return {k: v[rows] if k in ("x", "residual") else v for k, v in given.items()}

    for first, count in ((0, 1), (13, 1), (199, 1), (8, 5), (50, 16), (3, 33), (100, 64), (1, 130)):
        rows = slice(first, first + count)
        assert torch.equal(ek.linear(**of(rows)), together[rows]), (first, count)
    order = torch.randperm(together.shape[0], device=together.device)
    assert torch.equal(ek.linear(**of(order)), together[order])
    for row_tile in ROW_TILES:
        got = linear(**given, row_tile=row_tile)
        assert got is not None
        assert torch.equal(got, together), row_tile


@pytest.mark.gpu
def test_many_launches_give_the_same_bits() -> None:
    """A sum over several programs would show here if it depended on who came last."""
    given = arguments(40, 5120, 13824, torch.bfloat16, "residual")
    want = ek.linear(**given)
    other = torch.cuda.Stream()
    for _ in range(100):
        with torch.cuda.stream(other):
            torch.empty(1 << 22, device=DEVICE).random_()  # company on the multiprocessors
        assert torch.equal(ek.linear(**given), want)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_graph_replay(form: str) -> None:
    given = arguments(21, 5120, 4096, torch.bfloat16, form)
    want = ek.linear(**given)
    out, graph = torch.empty_like(want), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ek.linear(**given, out=out)
    for name in ("x", "residual"):
        if name in given:
            given[name].copy_(given[name].flip(0))
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want.flip(0))


@pytest.mark.gpu
def test_compiles_as_one_graph() -> None:
    given = arguments(6, 5120, 4096, torch.bfloat16, "norm and residual")

    def step(x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.eesd.linear(x, given["weight"], given["residual"], given["norm_weight"])
        return torch.ops.eesd.rms_norm(y, given["norm_weight"].repeat(2)[:5120], 1e-5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given["x"]), step(given["x"]))


@pytest.mark.gpu
def test_graph_of_leading_dimensions() -> None:
    x = torch.randn(2, 3, 256, device=DEVICE).half()
    weight = torch.randn(512, 256, device=DEVICE).half()
    got = torch.ops.eesd.linear(x, weight, None, None, 1e-5, True)
    assert got.shape == (2, 3, 256)
    assert torch.equal(got.view(6, 256), ek.linear(x.view(6, 256), weight, swiglu=True))
