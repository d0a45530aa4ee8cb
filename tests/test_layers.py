import pytest
import torch

from cryoalign.correlate import correlation_table
from cryoalign.layers import (
    AlignLayer,
    FourierShift,
    PolarTransform,
    PoseMarginal,
    RigidWarp,
    RingSpectra,
    RotationalCorrelation,
)
from cryoalign.polar import Rings, ring_spectra
from cryoalign.pose import Pose, pixel_error
from cryoalign.search import Search
from cryoalign.synthetic import simulate

RINGS = Rings(1, 3, angles=8)
SEARCH = Search(max_shift=1, last_ring=4, refine=False)


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def spectra(n: int, s: int, seed: int) -> torch.Tensor:
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


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="use score, implicit or soft"):
        AlignLayer(SEARCH, "hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive"):
        AlignLayer(SEARCH, "soft", 0.0)
