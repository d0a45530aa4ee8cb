"""Joint refinement against float64 particles written out here: no interpolation, no library."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from cryoalign.images.ctf import Optics
from cryoalign.images.fourier import shell_count, shell_index
from cryoalign.pose import Pose
from cryoalign.search.joint_refinement import Refined, refine_jointly

APIX = 3.0
ALL = ("angle", "shift", "magnification", "defocus")


@dataclass(frozen=True)
class Truth:
    """One particle: its pose, magnification and defocus."""

    angle: float
    x: float
    y: float
    mirror: bool
    growth: float = 1.0
    offset: float = 0.0  # Å, on top of u and v
    u: float = 12000.0
    v: float = 11400.0
    astigmatism: float = 35.0


def reference(size: int) -> np.ndarray:
    """Blobs of both signs, zero by the edge of the box, band-limited and without symmetry."""
    rng = np.random.default_rng(4)
    axis = np.arange(size) - size // 2
    x, y = np.meshgrid(axis, axis)
    image = np.zeros((size, size))
    for _ in range(14):
        at, width = rng.uniform(-0.14 * size, 0.14 * size, 2), rng.uniform(1.4, 2.0)
        image += rng.normal() * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * width**2))
    return image


def ctf(truth: Truth, size: int) -> np.ndarray:
    """sin(chi + asin(amplitude contrast)): 300 kV, 2.7 mm, 0.1."""
    wavelength = 12.2643247 / math.sqrt(3e5 * (1 + 3e5 * 0.978466e-6))
    ky, kx = np.fft.fftfreq(size, APIX)[:, None], np.fft.rfftfreq(size, APIX)[None]
    square, theta = kx**2 + ky**2, np.arctan2(ky, kx)
    u, v = truth.u + truth.offset, truth.v + truth.offset
    defocus = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (theta - math.radians(truth.astigmatism)))
    chi = np.pi * wavelength * defocus * square - np.pi / 2 * 2.7e7 * wavelength**3 * square**2
    return np.sin(chi + math.asin(0.1))


def particle(image: np.ndarray, truth: Truth, optics: bool = True) -> np.ndarray:
    """CTF * image(L (v + shift) / growth), the image's Fourier series summed at every v."""
    size = len(image)
    axis = np.arange(size) - size // 2
    x, y = np.meshgrid(axis + truth.x, axis + truth.y)
    c, s = math.cos(math.radians(truth.angle)), math.sin(math.radians(truth.angle))
    across, down = c * x - s * y, s * x + c * y
    across = -across if truth.mirror else across
    k = np.fft.fftfreq(size) * 2j * np.pi
    series = np.fft.fft2(np.fft.ifftshift(image)) / size**2
    by_x = np.exp(across.reshape(-1, 1) / truth.growth * k)
    by_y = np.exp(down.reshape(-1, 1) / truth.growth * k)
    moved = ((by_x @ series.T) * by_y).sum(1).real.reshape(size, size)
    return np.fft.irfft2(np.fft.rfft2(moved) * ctf(truth, size), s=moved.shape) if optics else moved


def bound(image: np.ndarray, truth: Truth, optics: bool) -> np.ndarray:
    """(p, p) inverse Fisher information for noise of deviation 1, by central differences."""
    steps = {"angle": 0.05, "x": 0.01, "y": 0.01, "growth": 1e-3, "offset": 5.0}
    names = list(steps)[: 5 if optics else 4]
    columns = [
        (
            particle(image, replace(truth, **{name: getattr(truth, name) + steps[name]}), optics)
            - particle(image, replace(truth, **{name: getattr(truth, name) - steps[name]}), optics)
        )
        / (2 * steps[name])
        for name in names
    ]
    columns += [particle(image, truth, optics), np.ones_like(image)]
    jacobian = np.stack(columns).reshape(len(columns), -1)
    return np.linalg.inv(jacobian @ jacobian.T)[:-2, :-2]


def truths(n: int, seed: int = 0, spread: float = 1.0) -> list[Truth]:
    rng = np.random.default_rng(seed)
    return [
        Truth(
            rng.uniform(-180, 180), *rng.uniform(-2, 2, 2), i % 2 == 1,
            1 + spread * rng.normal(0, 0.01), spread * rng.normal(0, 200),
            *(rng.uniform(9e3, 1.5e4) + np.array([600.0, 0.0])), rng.uniform(0, 180),
        )
        for i in range(n)
    ]  # fmt: skip


def optics_of(several: list[Truth]) -> Optics:
    given = [[t.u, t.v, t.astigmatism, 300.0, 2.7, 0.1, 0.0, APIX] for t in several]
    return Optics(*torch.tensor(given, dtype=torch.float64).T)


def pose_of(several: list[Truth], grid: bool = False) -> Pose:
    angle, x, y = torch.tensor([[t.angle, t.x, t.y] for t in several], dtype=torch.float64).T
    pose = Pose(angle, torch.stack([x, y], 1), torch.tensor([t.mirror for t in several]))
    return Pose((angle / 1.4).round() * 1.4, pose.shift.round(), pose.mirror) if grid else pose


def errors(found: Refined, several: list[Truth]) -> np.ndarray:
    """(n, 5) by angle, shift x, shift y, magnification, defocus."""
    true = np.array([[t.angle, t.x, t.y, t.growth, t.offset] for t in several])
    columns = [
        found.pose.angle, *found.pose.shift.T, found.magnification, found.defocus_offset
    ]  # fmt: skip
    error = torch.stack(columns, 1).double().numpy() - true
    error[:, 0] = (error[:, 0] + 180) % 360 - 180
    return error


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("optics", [True, False])
def test_information_is_that_of_differences(size: int, optics: bool) -> None:
    """Model and all derivatives: with known noise the covariance at the truth has nothing else."""
    image, several = reference(size), truths(4, spread=0)
    images = torch.tensor(np.stack([particle(image, t, optics) for t in several]))
    shells = shell_count(size)
    found = refine_jointly(
        images, torch.tensor(image)[None], torch.zeros(4, dtype=torch.int64), pose_of(several),
        parameters=ALL if optics else ALL[:3], optics=optics_of(several) if optics else None,
        noise=torch.ones(shells), steps=0,
    )  # fmt: skip
    assert found.columns[:4] == ("angle", "shift_x", "shift_y", "magnification")
    assert len(found.columns) == 5 if optics else 4
    # Templates are sampled bilinearly, twice oversampled: which errs by up to 0.5 % here.
    assert (found.score > 1 - 1e-4).all()
    torch.testing.assert_close(found.amplitude, torch.ones(4).double(), atol=2e-3, rtol=0)
    for mine, truth in zip(found.covariance.numpy(), several, strict=True):
        exact = bound(image, truth, optics)
        scale = np.sqrt(exact.diagonal())
        np.testing.assert_allclose(mine / np.outer(scale, scale), exact / np.outer(scale, scale),
                                   atol=0.02)  # fmt: skip


@pytest.mark.parametrize(("size", "dtype"), [(32, torch.float32), (33, torch.float64)])
def test_errors_meet_the_bound(size: int, dtype: torch.dtype) -> None:
    image, kinds, each, level = reference(size), truths(20, seed=size), 30, 0.15
    rng = np.random.default_rng(1)
    several = [t for t in kinds for _ in range(each)]
    clean = np.repeat(np.stack([particle(image, t) for t in kinds]), each, 0)
    exact = np.repeat(np.stack([bound(image, t, True) for t in kinds]), each, 0) * level**2
    images = torch.tensor(1.7 * (clean + level * rng.standard_normal(clean.shape)) + 3.0).to(dtype)
    references = torch.tensor(np.stack([np.zeros_like(image), image])).to(dtype)
    label = torch.ones(len(several), dtype=torch.int64)
    found = refine_jointly(
        images, references, label, pose_of(several, grid=True).to(dtype),
        parameters=ALL, optics=optics_of(several),
    )  # fmt: skip
    assert found.score.dtype == found.covariance.dtype == found.pose.angle.dtype == dtype
    assert float(found.amplitude.mean()) == pytest.approx(1.7, rel=0.01)
    error = errors(found, several)
    ratio = np.sqrt((error**2 / np.diagonal(exact, axis1=1, axis2=2)).mean(0))
    # 600 draws of a normal: a relative error of 2.9 %; three of those, and 3 % for second order.
    np.testing.assert_allclose(ratio, 1, atol=0.12)
    # Each particle's own covariance says how wrong it is, all parameters together.
    own = found.covariance.double().numpy()
    z = error / np.sqrt(np.diagonal(own, axis1=1, axis2=2))
    np.testing.assert_allclose(np.sqrt((z**2).mean(0)), 1, atol=0.12)
    distance = (error[:, None] @ np.linalg.solve(own, error[:, :, None]))[:, 0, 0]
    # Chi-squared with 5 degrees of freedom: three times sqrt(10 / 600) is 0.39, and second order.
    assert distance.mean() == pytest.approx(5, abs=0.6)


def small_set(n: int = 12, size: int = 32, level: float = 0.2) -> dict:
    """Noisy float64 arguments of `refine_jointly`."""
    image, several = reference(size), truths(n, seed=7)
    noise = level * np.random.default_rng(2).standard_normal((n, size, size))
    images = np.stack([particle(image, t) for t in several]) + noise
    return {
        "particles": torch.tensor(images),
        "references": torch.tensor(image)[None],
        "label": torch.zeros(n, dtype=torch.int64),
        "pose": pose_of(several, grid=True),
        "parameters": ALL,
        "optics": optics_of(several),
    }


def test_no_step_lowers_the_score() -> None:
    """Of noise alone, where Gauss-Newton's model of the loss is worst."""
    given = small_set()
    generator = torch.Generator().manual_seed(3)
    given["particles"] = torch.randn(12, 32, 32, generator=generator, dtype=torch.float64)
    scores = [refine_jointly(**given, steps=steps).score for steps in range(8)]
    rise = torch.stack(scores).diff(dim=0)
    assert (rise >= -1e-12).all()
    assert (scores[0] < 0).any()  # from there too
    assert (rise.sum(0) > 0.01).all()


def test_a_step_is_no_longer_than_the_peak_is_wide() -> None:
    """Of noise, where the model of the loss would lead anywhere."""
    given = small_set()
    generator = torch.Generator().manual_seed(3)
    given["particles"] = torch.randn(12, 32, 32, generator=generator, dtype=torch.float64)
    found, start = refine_jointly(**given, steps=1), given["pose"]
    turn = (found.pose.angle - start.angle + 180) % 360 - 180
    moves = [turn, *(found.pose.shift - start.shift).T, found.magnification - 1]
    longest = (2.0, 0.7, 0.7, 0.02)
    for move, most in zip([*moves, found.defocus_offset], (*longest, 500.0), strict=True):
        assert move.abs().max() <= most * (1 + 1e-6)
    # A step is shortened as a whole: each of these meets one of its limits.
    assert any(move.abs().max() > 0.999 * most for move, most in zip(moves, longest, strict=True))


def test_another_start_ends_at_the_same_optimum() -> None:
    given = small_set()
    one = refine_jointly(**given)
    pose = given["pose"]
    other = refine_jointly(**given | {"pose": Pose(pose.angle + 1, pose.shift - 0.3, pose.mirror)})
    sd = one.covariance.diagonal(dim1=1, dim2=2).sqrt()
    apart = torch.tensor(errors(one, truths(12, 7)) - errors(other, truths(12, 7)))
    # Each stops where its next step is expected to be below 0.045 deviations.
    assert (apart.abs() / sd).max() < 0.15
    assert (one.score - other.score).abs().max() < 1e-4
    start = refine_jointly(**given, steps=0)
    assert (one.score > start.score).all()


def test_no_particle_knows_of_the_others() -> None:
    given = small_set()
    given["particles"][3] = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).double()
    together = refine_jointly(**given)
    for row in (0, 3, 11):
        rows = torch.tensor([row])
        alone = {
            name: value[rows] if name in ("particles", "label", "pose", "optics") else value
            for name, value in given.items()
        }
        single = refine_jointly(**alone)
        for name in ("magnification", "defocus_offset", "score", "covariance"):
            torch.testing.assert_close(
                getattr(single, name), getattr(together, name)[rows], rtol=1e-6, atol=1e-9
            )
    none = {k: v[:0] if k in ("particles", "label", "pose", "optics") else v
            for k, v in given.items()}  # fmt: skip
    assert refine_jointly(**none).covariance.shape == (0, 5, 5)


def test_priors_add_their_precision_and_hold() -> None:
    given = small_set()
    free = refine_jointly(**given, steps=0, noise=torch.full((24,), 0.04))
    held = refine_jointly(
        **given, steps=0, noise=torch.full((24,), 0.04), magnification_sd=0.01, defocus_sd=300.0
    )
    precision = torch.diag(torch.tensor([0, 0, 0, 0.01**-2, 300.0**-2]).double())
    expected = torch.linalg.inv(torch.linalg.inv(free.covariance) + precision)
    torch.testing.assert_close(held.covariance, expected, rtol=1e-6, atol=1e-12)
    tight = refine_jointly(**given, magnification_sd=1e-6, defocus_sd=0.1)
    assert (tight.magnification - 1).abs().max() < 1e-5
    assert tight.defocus_offset.abs().max() < 1


def test_noise_is_a_weight_of_shells() -> None:
    given = small_set()
    power = torch.full((24,), 0.04)
    once, four = (refine_jointly(**given, noise=p) for p in (power, 4 * power))
    torch.testing.assert_close(four.covariance, 4 * once.covariance, rtol=0.02, atol=1e-12)
    without = power.clone()
    without[5:] = torch.inf
    clean = refine_jointly(**given, noise=without)
    spectra = torch.fft.rfft2(given["particles"])
    spectra[:, shell_index(32) >= 5] += 50
    spoilt = given | {"particles": torch.fft.irfft2(spectra, s=(32, 32))}
    again = refine_jointly(**spoilt, noise=without)
    torch.testing.assert_close(again.pose.angle, clean.pose.angle, rtol=0, atol=1e-6)
    assert (clean.covariance[:, 0, 0] > once.covariance[:, 0, 0]).all()


def test_parameters_not_named_stay() -> None:
    given = small_set() | {"parameters": ("shift",)}
    found = refine_jointly(**given)
    assert found.columns == ("shift_x", "shift_y")
    torch.testing.assert_close(found.pose.angle, given["pose"].angle, rtol=0, atol=1e-12)
    assert (found.magnification == 1).all()
    assert (found.defocus_offset == 0).all()
    assert not torch.equal(found.pose.shift, given["pose"].shift)


def test_what_cannot_be_known_is_infinite() -> None:
    """A round blob off the centre: a turn is a shift. And a particle unlike its reference."""
    axis = np.arange(32) - 16
    x, y = np.meshgrid(axis, axis)
    blob = torch.tensor(np.exp(-((x - 4) ** 2 + y**2) / 8))
    noise = 0.05 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).double()
    image = torch.tensor(reference(32))
    found = refine_jointly(
        torch.stack([blob + noise, -image, image + noise]), torch.stack([blob, image]),
        torch.tensor([0, 1, 1]), Pose.identity(3),
    )  # fmt: skip
    infinite = torch.diag(torch.full((3,), math.inf)).double()
    assert torch.equal(found.covariance[0], infinite)
    assert torch.equal(found.covariance[1], infinite)
    assert found.covariance[2].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optics": None}, "defocus cannot be refined without optics"),
        ({"parameters": ("angle", "tilt")}, "give some of 'angle', 'shift', 'magnification'"),
        ({"parameters": ()}, "give some of"),
        ({"parameters": "angle"}, "in a tuple"),
        ({"steps": -1}, "steps >= 0"),
        ({"noise": torch.ones(9)}, "noise must be 24 powers above 0"),
        ({"noise": torch.zeros(24)}, "noise must be 24 powers above 0"),
        ({"defocus_sd": 0.0}, "defocus_sd=0.0"),
        ({"references": torch.randn(1, 30, 30).double()}, "one box"),
        ({"references": torch.randn(1, 32, 32)}, "use .float"),
        ({"label": torch.ones(12, dtype=torch.int64)}, "labels from 1 to 1, 1 references"),
        ({"pose": Pose.identity(3)}, r"counts of particles, labels, poses, optics are \[12, 12, 3"),
    ],
)
def test_input_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine_jointly(**(small_set() | change))


def test_a_spoilt_particle_spoils_no_other() -> None:
    image, several = reference(32), truths(3)
    images = np.stack([particle(image, t) for t in several])
    label, start = np.zeros(3, dtype=np.int64), pose_of(several, grid=True)
    given = {"parameters": ALL, "optics": optics_of(several)}
    whole = refine_jointly(images, image[None], label, start, **given)
    images[1, 5, 5] = np.nan
    found = refine_jointly(images, image[None], label, start, **given)
    assert found.score[1].isnan()
    assert found.covariance[1].diagonal().isinf().all()
    for row in (0, 2):
        torch.testing.assert_close(found.pose.shift[row], whole.pose.shift[row])
        torch.testing.assert_close(found.covariance[row], whole.covariance[row])
    grown = torch.from_numpy(image)[None].requires_grad_()
    assert not refine_jointly(images, grown, label, start, **given).score.requires_grad


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    image, several = reference(32), truths(20)
    noise = np.random.default_rng(1).normal(0, 0.5, (20, 32, 32))
    images = torch.tensor(np.stack([particle(image, t) for t in several]) + noise)
    found = {}
    for device in ("cpu", "cuda"):
        optics = Optics(*(x.to(device) for x in vars(optics_of(several)).values()))
        found[device] = refine_jointly(
            images.to(device),
            torch.tensor(image)[None].to(device),
            torch.zeros(20, dtype=torch.int64, device=device),
            pose_of(several, grid=True).to(device),
            parameters=ALL, optics=optics, magnification_sd=0.01, defocus_sd=200.0,
        )  # fmt: skip
    host, card = found["cpu"], found["cuda"]
    deviation = host.covariance.diagonal(dim1=1, dim2=2).sqrt()
    apart = np.abs(errors(host, several) - errors(_on_host(card), several))
    assert (torch.from_numpy(apart) < 1e-2 * deviation).all()
    torch.testing.assert_close(card.covariance.cpu(), host.covariance, rtol=1e-3, atol=1e-9)


def _on_host(found: Refined) -> Refined:
    values = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in vars(found).items()}
    return Refined(**values | {"pose": found.pose.to("cpu")})
