from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cryoalign.images.polar import Rings, ring_spectra
from cryoalign.learn.layers import (
    AlignLayer,
    FourierShift,
    PolarTransform,
    PoseMarginal,
    RigidWarp,
    RingSpectra,
    RotationalCorrelation,
)
from cryoalign.operators.correlation import correlation_table
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose, pixel_error
from cryoalign.search.settings import Search

RINGS = Rings(1, 3, angles=8)
SOFT = Search(max_shift=1, last_ring=14)
SEARCH = Search(max_shift=1, last_ring=4, refine=False)


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return torch.device("cuda")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def spectra(n: int, s: int, seed: int) -> Tensor:
    return ring_spectra(leaf(n, 9, 9, seed=seed).detach(), RINGS, leaf(n, s, 2).detach())


MIRROR = torch.tensor([False, True])
SPECTRA = (
    spectra(2, 2, 1).requires_grad_(),
    spectra(2, 1, 2)[:, 0].clone().requires_grad_(),
)
CASES = {
    "polar": (PolarTransform(RINGS), (leaf(2, 9, 9), leaf(2, 2, 2, seed=1))),
    "bicubic": (RigidWarp(), (leaf(2, 9, 9), leaf(2), leaf(2, 2), MIRROR)),
    "bilinear": (RigidWarp("bilinear"), (leaf(2, 9, 9), leaf(2), leaf(2, 2), MIRROR)),
    "fourier": (FourierShift(), (leaf(2, 8, 9), leaf(2, 2))),
    "spectra": (RingSpectra(RINGS), (leaf(2, 9, 9), leaf(2, 1, 2, seed=1))),
    "correlation": (RotationalCorrelation(), SPECTRA),
    "marginal": (PoseMarginal(0.1), SPECTRA),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_and_compile(name: str) -> None:
    layer, inputs = CASES[name]
    assert torch.autograd.gradcheck(layer, inputs)
    expected = layer(*inputs)
    assert expected.dtype in (torch.float64, torch.complex128)
    leaves = [x for x in inputs if x.requires_grad]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got = compiled(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.abs().square().sum(), leaves),
        torch.autograd.grad(expected.abs().square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", ["score", "soft", "implicit"])
def test_align_layer_gradcheck(gradient) -> None:
    made = simulate(2, 1, size=24, snr=5.0, max_shift=1.0, seed=0)
    search = Search(max_shift=1, last_ring=7, refine=gradient == "implicit", mode="exhaustive")
    layer = AlignLayer(search, gradient, temperature=0.05)
    inputs = [x.double().requires_grad_() for x in (made.images, made.views)]

    def outputs(particles, references):
        out = layer(particles, references)
        continuous = [out.score, out.images]
        # A grid's pose is a constant, and grad mode knows it.
        return (*continuous, out.angle, out.shift) if gradient != "score" else (out.score,)

    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True, eps=1e-5)


@pytest.mark.parametrize("gradient", ["score", "soft", "implicit"])
def test_align_layer_aligns(gradient) -> None:
    made = simulate(30, 2, size=48, snr=1.0, max_shift=2.0, seed=1)
    layer = AlignLayer(Search(max_shift=2, last_ring=18), gradient, temperature=0.005)
    found = layer(made.images, made.views)
    assert torch.equal(found.label, made.class_number - 1)
    pose = Pose(found.angle, found.shift, found.mirror)
    assert pixel_error(pose, made.pose.to(torch.float32), 18).median() < 0.15
    before = (made.images - made.views[found.label]).square().mean()
    assert (found.images - made.views[found.label]).square().mean() < before


def test_a_batch_is_its_particles_one_by_one() -> None:
    made = simulate(4, 2, size=32, snr=1.0, max_shift=1.0, seed=2)
    layer = AlignLayer(Search(max_shift=1, last_ring=12), "implicit")
    images = made.images.double()
    whole = layer(images, made.views.double())
    for i in range(4):
        alone = layer(images[i : i + 1], made.views.double())
        torch.testing.assert_close(alone.angle[0], whole.angle[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["score", "soft", "implicit"])
def test_pairs_are_aligned_as_if_alone(gradient) -> None:
    made = simulate(6, 3, size=36, snr=1.0, max_shift=1.0, seed=3)
    search = Search(max_shift=1, last_ring=14, mode="exhaustive")
    views = made.views[made.class_number - 1].double()
    images = made.images.double()
    paired = AlignLayer(search, gradient, 0.01, paired=True)
    leaves = images.clone().requires_grad_(), views.clone().requires_grad_()
    found = paired(*leaves)
    slopes = torch.autograd.grad(found.score.sum(), leaves)
    for i in range(6):
        own = images[i : i + 1].requires_grad_(), views[i : i + 1].requires_grad_()
        alone = AlignLayer(search, gradient, 0.01)(*own)
        for name in ("images", "score", "angle", "shift", "mirror"):
            torch.testing.assert_close(getattr(found, name)[i], getattr(alone, name)[0])
        for all_of, one in zip(slopes, torch.autograd.grad(alone.score.sum(), own), strict=True):
            torch.testing.assert_close(all_of[i], one[0])
    assert found.label.tolist() == list(range(6))
    with pytest.raises(ValueError, match="a reference for each image"):
        paired(images, views[:2])


def test_vmap_over_sets_of_references() -> None:
    x, y = SPECTRA[0].detach(), spectra(6, 1, 5)[:, 0].unflatten(0, (3, 2))
    got = torch.vmap(lambda y: correlation_table(x, y))(y)
    torch.testing.assert_close(got, torch.stack([correlation_table(x, each) for each in y]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_and_left_outside(dtype) -> None:
    images = leaf(2, 9, 9).detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = RingSpectra(RINGS)(images)
    assert got.dtype == torch.complex64
    torch.testing.assert_close(got, ring_spectra(images.float(), RINGS))


@pytest.mark.parametrize("gradient", ["score", "soft", "implicit"])
def test_a_spoilt_particle_spoils_no_other(gradient) -> None:
    made = simulate(6, 2, size=36, snr=1.0, max_shift=1.0, seed=2)
    layer = AlignLayer(Search(max_shift=1, last_ring=14), gradient)
    whole = layer(made.images, made.views)
    images = made.images.clone()
    images[2, 18, 20] = torch.nan
    spoilt = layer(particles=images, references=made.views)
    assert spoilt.score[2].isnan()
    for name in ("score", "angle", "shift", "label"):
        torch.testing.assert_close(
            *(torch.cat([getattr(x, name)[:2], getattr(x, name)[3:]]) for x in (spoilt, whole)),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    views = made.views.clone()
    views[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"references \[1\] contain NaN"):
        layer(made.images, views)


@pytest.mark.parametrize("gradient", ["score", "soft", "implicit"])
def test_align_layer_compiles(gradient) -> None:
    made = simulate(4, 2, size=36, snr=1.0, max_shift=1.0, seed=2)
    layer = AlignLayer(Search(max_shift=1, last_ring=14), gradient)
    slopes = []
    for each in (layer, torch.compile(layer, backend="aot_eager")):
        images = made.images.clone().requires_grad_()
        out = each(images, made.views)
        slopes.append(torch.autograd.grad(out.score.sum() + out.images.square().sum(), images)[0])
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


def test_the_soft_score_is_a_log_sum_over_the_grid() -> None:
    made = simulate(3, 2, size=36, snr=1.0, max_shift=1.0, seed=2)
    images, views = made.images.double(), made.views.double()
    found = AlignLayer(SOFT, "soft", 0.05)(images, views)
    rings = SOFT.rings(36)
    x, y = ring_spectra(images, rings, SOFT.shifts().double()), ring_spectra(views, rings)[:, 0]
    table = correlation_table(x, y)
    own = torch.stack(
        [table[i, k, :, int(found.mirror[i])] for i, k in enumerate(found.label.tolist())]
    )
    expected = 0.05 * (own / 0.05).flatten(1).logsumexp(1)
    torch.testing.assert_close(found.score, expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="use bilinear or bicubic"):
        RigidWarp("nearest")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give a Search"):
        AlignLayer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use score, implicit or soft"):
        AlignLayer(SEARCH, "hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive"):
        AlignLayer(SEARCH, "soft", 0.0)


def moved(name: str, device: torch.device) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A case on another device: module, inputs, and those that have a gradient."""
    layer, inputs = CASES[name]
    there = [x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs]
    return layer, there, [x for x in there if x.requires_grad]


def gradients(layer: nn.Module, inputs: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(*inputs).abs().square().sum(), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, gpu: torch.device) -> None:
    """Gradients, values of the CPU, and Inductor's code, in float64."""
    layer, inputs, leaves = moved(name, gpu)
    assert torch.autograd.gradcheck(layer, inputs, nondet_tol=1e-9)
    expected = CASES[name][0](*CASES[name][1]).detach()
    got = layer(*inputs)
    torch.testing.assert_close(got.detach().cpu(), expected, rtol=1e-9, atol=1e-9)
    compiled = torch.compile(layer)
    torch.testing.assert_close(compiled(*inputs), got, rtol=1e-9, atol=1e-9)
    for a, b in zip(
        gradients(compiled, inputs, leaves), gradients(layer, inputs, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_repeats_itself(name: str, gpu: torch.device, deterministic: None) -> None:
    """In PyTorch's deterministic mode every backward gives the same bits."""
    layer, inputs, _ = moved(name, gpu)
    assert torch.autograd.gradcheck(layer, inputs, nondet_tol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", ["score", "soft", "implicit"])
def test_align_layer_on_a_gpu(gradient, gpu: torch.device, deterministic: None) -> None:
    """Repeats its gradients bit for bit, and they are the CPU's."""
    made = simulate(64, 3, size=48, snr=1.0, max_shift=2.0, seed=1)
    search = Search(max_shift=2, last_ring=18, mode="exhaustive")
    layer = AlignLayer(search, gradient, temperature=0.01)

    def run(device: torch.device | str) -> tuple[Tensor, ...]:
        inputs = [x.double().to(device).requires_grad_() for x in (made.images, made.views)]
        out = layer(*inputs)
        loss = out.score.sum() + out.images.square().mean()
        return out.label, out.angle, out.shift, *torch.autograd.grad(loss, inputs)

    once, again = run(gpu), run(gpu)
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(once, run("cpu"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", ["score", "soft", "implicit"])
def test_mixed_precision_on_a_gpu(gradient, gpu: torch.device) -> None:
    """An AlignLayer below a convolution in bf16: it aligns, and the convolution learns."""
    made = simulate(64, 2, size=48, snr=1.0, max_shift=2.0, seed=1)
    torch.manual_seed(0)
    below = nn.Conv2d(1, 1, 3, padding=1, bias=False).to(gpu)
    with torch.no_grad():
        below.weight.zero_()[0, 0, 1, 1] = 1.0
    layer = AlignLayer(Search(max_shift=2, last_ring=18), gradient)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = layer(below(made.images.to(gpu)[:, None])[:, 0], made.views.to(gpu))
        loss = (1 - out.score).mean()
    assert out.score.dtype == out.images.dtype == torch.float32
    assert torch.equal(out.label.cpu(), made.class_number - 1)
    loss.backward()
    assert below.weight.grad.isfinite().all()
    assert below.weight.grad.abs().max() > 0
