"""The controller on the GPU gives the CPU's bits: words, Beta draws, lengths, their state."""

import controller_cases as cases
import numpy as np
import pytest
import torch
from op_samples import SAMPLES

import eesd_kernels as ek
from eesd_kernels import Purpose, Rule, _cpu, _cuda
from tests.csrc.test_beta import LARGEST, SHAPES, SMALLEST, ks_pvalue

pytestmark = pytest.mark.gpu

OPS = ("sample_beta", "thompson_draft_length", "thompson_look", "thompson_update")


@pytest.fixture(autouse=True)
def _built_with_cuda():
    assert ek.implementations()["sample_beta"]["cuda"] == "CUDA", "built without CUDA"


def on_gpu(value):
    if isinstance(value, dict):
        return {k: on_gpu(v) for k, v in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) else value


def copied(arguments):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def bits(x: torch.Tensor) -> torch.Tensor:
    """Floats as integers, so that NaN equals itself (whatever its payload) and 0 is not -0."""
    x = x.cpu()
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32) if x.is_floating_point() else x


def assert_same_bits(gpu, cpu):
    for name, value in cpu.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(bits(gpu[name]), bits(value)), name


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 32_003), (1000, 257), (1, 1_000_000)])
def test_words_have_the_same_bits(rows, n):
    g = cases.generator(rows, n)
    seed, position = cases.keys(g, rows)
    base, parent = cases.keys(g, rows)[1], torch.arange(rows, dtype=torch.int32) % 7
    ids = torch.randint(-1, 151_936, (rows, n), generator=g)
    purpose = int(Purpose.ACCEPT) + 256 * 3
    for which in (n, ids):
        mine = _cuda.philox_words_cuda(
            seed.cuda(), position.cuda(), base.cuda(), purpose, on_gpu(which), parent.cuda()
        )
        want = _cpu.philox_words_cpu(seed, position, base, purpose, which, parent)
        assert torch.equal(mine.cpu(), want)


@pytest.mark.parametrize("buckets", [1, 7, 64, 1000])
@pytest.mark.parametrize("draws", [0, 1, 511, 513, 100_000, 1_000_000])
def test_draws_have_the_same_bits(draws, buckets):
    rows = -(-draws // buckets)
    g = cases.generator(draws, buckets)
    shape = (rows,) if buckets == 1 else (rows, buckets)
    arguments = cases.posterior(g, *shape), cases.posterior(g, *shape), *cases.keys(g, rows)
    want = _cpu.sample_beta_cpu(*arguments)
    got = ek.sample_beta(*(x.cuda() for x in arguments))
    assert torch.equal(bits(got), bits(want))
    if want.numel() > 1000:
        assert want.isnan().any()
        assert want.isfinite().any()


def test_extreme_shapes_have_the_same_bits():
    ends = torch.tensor([1e-45, 1e-38, 1e-30, 1e-3, 0.999999, 1.0, 3.0, 1e7, 1e30, 3e38])
    alpha, beta = ends.repeat_interleave(10).repeat(500), ends.repeat(10).repeat(500)
    seed, position = cases.keys(cases.generator(1), alpha.numel())
    want = _cpu.sample_beta_cpu(alpha, beta, seed, position)
    assert torch.equal(bits(ek.sample_beta(*on_gpu_all(alpha, beta, seed, position))), bits(want))


def on_gpu_all(*values):
    return tuple(on_gpu(v) for v in values)


@pytest.mark.parametrize("beta", SHAPES)
@pytest.mark.parametrize("alpha", SHAPES)
def test_law(alpha, beta):
    """Kolmogorov-Smirnov, mean and variance at 10^6 draws."""
    from scipy import stats

    rows, buckets = 125_000, 8
    row = torch.arange(rows, device="cuda")
    shape = torch.ones(rows, buckets, device="cuda")
    drawn = ek.sample_beta(shape * alpha, shape * beta, row // 64, (row % 64).int())
    drawn = drawn.flatten().cpu().numpy()
    assert SMALLEST <= drawn.min() <= drawn.max() <= LARGEST
    assert ks_pvalue(drawn, alpha, beta) > 1e-4
    mean, variance, kurtosis = stats.beta(alpha, beta).stats("mvk")
    x, grid = drawn.astype(np.float64), 2.0**-24  # the float grid near 1, and its clamped end
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / len(x)) + grid
    spread = variance * np.sqrt((kurtosis + 2) / len(x))
    assert abs(x.var() - variance) < 4 * spread + 2 * grid * np.sqrt(variance)


@pytest.mark.parametrize("drafts", cases.DRAFTS)
@pytest.mark.parametrize("batch", [*cases.BATCHES, 64, 256, 257, 1000])
@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name)
def test_lengths_are_equal(rule, batch, drafts):
    for seed in range(6):
        buckets = cases.BUCKETS[seed % 4] if rule == Rule.CALIBRATED else 0
        cpu = {**cases.plan(batch, drafts, buckets, seed), "rule": int(rule)}
        gpu = on_gpu(cpu)
        want = _cpu.thompson_draft_length_cpu(**cpu)
        assert torch.equal(ek.thompson_draft_length(**gpu).cpu(), want)
        assert_same_bits(gpu, cpu)


def test_many_lengths_are_equal():
    """10^6 coins' worth of rows at once, and 10^5 rows under one L."""
    for rule, batch in ((Rule.BERNOULLI, 250_000), (Rule.COST, 100_000), (Rule.CONSTANT, 10_000)):
        cpu = {**cases.plan(batch, 8, 0, 1), "rule": int(rule)}
        gpu = on_gpu(cpu)
        want = _cpu.thompson_draft_length_cpu(**cpu)
        assert torch.equal(ek.thompson_draft_length(**gpu).cpu(), want)
        assert_same_bits(gpu, cpu)


@pytest.mark.parametrize("batch", [*cases.BATCHES, 5000])
@pytest.mark.parametrize("buckets", [0, *cases.BUCKETS])
def test_posteriors_have_the_same_bits(buckets, batch):
    for seed, drafts in enumerate(cases.DRAFTS):
        cpu = {**cases.outcome(batch, drafts, buckets, seed), "discount": 0.98}
        gpu = on_gpu(cpu)
        ek.thompson_update(**gpu)
        _cpu.thompson_update_cpu(**cpu)
        assert_same_bits(gpu, cpu)


@pytest.mark.parametrize("batch", [*cases.BATCHES, 1000])
@pytest.mark.parametrize("drafts", [0, 1, 5, 8, 19])
def test_looks_are_equal(drafts, batch):
    for seed in range(6):
        cpu, top_prob = cases.looks(batch, drafts, cases.BUCKETS[seed % 4], seed)
        gpu = on_gpu(cpu)
        for step in range(drafts + 1):
            now = {"step": step, "exit_cost": 0.02}
            _cpu.thompson_look_cpu(**cpu, **now, top_prob=top_prob[step])
            ek.thompson_look(**gpu, **now, top_prob=top_prob[step].cuda())
            assert_same_bits(gpu, cpu)


def test_caps_above_the_costs_count_as_the_last():
    """The host does not look at device tensors; nothing is read out of range."""
    given = on_gpu({**cases.plan(64, 5, 0, 0), "rule": int(Rule.COST)})
    inside = {**given, "cap": given["cap"].clamp(min=5)}
    beyond = {**given, "cap": torch.full_like(given["cap"], 2**31 - 1)}
    for rule in (Rule.COST, Rule.BERNOULLI, Rule.CONSTANT):
        got = ek.thompson_draft_length(**{**beyond, "rule": rule})
        assert torch.equal(got, ek.thompson_draft_length(**{**inside, "rule": rule}))


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    torch.manual_seed(1)
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    arguments = on_gpu(SAMPLES[op]())
    overload = getattr(torch.ops.eesd, op).default
    values = [arguments.get(a.name) for a in overload._schema.arguments]
    names = [a.name for a in overload._schema.arguments]
    values = [int(v) if n == "rule" else v for n, v in zip(names, values, strict=True)]
    torch.library.opcheck(overload, values)


@pytest.mark.parametrize("op", OPS)
def test_graph_replays_read_fresh_inputs(op):
    """Captured once; replayed over inputs that changed in place, it gives the eager result."""
    torch.manual_seed(2)
    torch.use_deterministic_algorithms(False)
    given = on_gpu(SAMPLES[op]())
    function = getattr(ek, op)
    function(**copied(given))
    torch.cuda.synchronize()
    before = copied(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(**given)
    for round_number in range(3):
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                value.copy_(before[name])
        given.get("position", given.get("accepted")).add_(round_number)
        fresh = copied(given)
        graph.replay()
        want = function(**fresh)
        assert_same_bits(given, fresh)
        if out is not None:
            assert torch.equal(bits(out), bits(want))


def test_the_given_stream_is_used():
    alpha, beta = torch.rand(300_000, 2, device="cuda").add(0.5).unbind(1)
    seed, position = torch.arange(300_000, device="cuda"), torch.zeros(300_000, device="cuda").int()
    want = ek.sample_beta(alpha, beta, seed, position)
    torch.cuda.synchronize()
    late, stream = torch.zeros_like(alpha), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(alpha)  # a launch on any other stream would see zeros: NaN
        got = ek.sample_beta(late, beta, seed, position)
    stream.synchronize()
    assert torch.equal(got, want)


def test_nothing_waits_for_the_device():
    given = on_gpu({**cases.plan(64, 8, 0, 1), "rule": int(Rule.COST)})
    ek.thompson_draft_length(**given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ek.thompson_draft_length(**given)
        ek.sample_beta(given["alpha"], given["beta"], given["seed"], given["position"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_parameters_stay_in_their_element():
    seed, position = (x.cuda() for x in cases.keys(cases.generator(9), 100))
    alpha, beta = torch.full((100,), 2.0, device="cuda"), torch.full((100,), 5.0, device="cuda")
    good = ek.sample_beta(alpha, beta, seed, position)
    alpha[3], alpha[70], beta[5], beta[99] = 0.0, torch.nan, -1.0, torch.inf
    got = ek.sample_beta(alpha, beta, seed, position)
    bad = torch.zeros(100, dtype=torch.bool, device="cuda")
    bad[[3, 70, 5, 99]] = True
    assert got[bad].isnan().all()
    assert torch.equal(got[~bad], good[~bad])
