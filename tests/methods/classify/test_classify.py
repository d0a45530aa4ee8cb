from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from oracle import ctf as ctf_formula
from oracle import ctf_average, some_optics
from sklearn.metrics import adjusted_rand_score

from bench.agreement import agreement
from cryoalign.images.ctf import ctf_2d
from cryoalign.methods.classify import classify as classification
from cryoalign.methods.classify import resolution_level as module
from cryoalign.methods.classify import split_and_merge, whitening
from cryoalign.methods.classify.classify import classify
from cryoalign.methods.classify.settings import Likelihood, Plan
from cryoalign.methods.classify.split_and_merge import SplitAndMerge, sample_of
from cryoalign.methods.classify.whitening import Observations, observer
from cryoalign.methods.state import State
from cryoalign.particles.prepare import PreparedParticles, prepare
from cryoalign.particles.settings import Images, Particle
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import TensorStack, optics_of
from cryoalign.search.settings import shift_grid

QUICK = Likelihood(cycles=1)
NEAR, FAR = Particle(max_shift="1 px"), Particle(max_shift="2 px")


@pytest.mark.parametrize("start", ["singles", "stochastic", "invariants"])
def test_all_views_are_found_from_nothing(
    start: Literal["singles", "stochastic", "invariants"],
) -> None:
    """Of every start seeds 0 to 4 find them: an index of 0.99 or more, 98 % right or more."""
    made = simulate(n=300, n_classes=6, size=40, snr=0.2, max_shift=2.0, seed=1)
    likelihood = Likelihood(cycles=1, start=start)
    found = classify(made.images, 6, particle=FAR, likelihood=likelihood, seed=0, device="cpu")
    score = agreement(found.class_number - 1, found.pose, made.class_number - 1, made.pose, 6)
    assert score.rand_index > 0.97
    assert score.views_found == 6
    assert score.right > 0.97
    assert score.angle < 2.5
    assert score.shift < 0.4
    assert int(found.class_sizes.sum()) == 300
    assert found.class_sizes.tolist() == sorted(found.class_sizes.tolist(), reverse=True)
    assert {"log_evidence", "classes", "rings", "empty_classes"} <= set(found.history)


def test_with_a_ctf_and_particles_set_aside() -> None:
    """Without the particle of NaN, seeds 0 to 5 have all classes and 99 % of the poses right."""
    made = simulate(n=300, n_classes=4, size=40, snr=2.0, max_shift=2.0, mirror=False, seed=2)
    optics = some_optics(300, pixel_size=4.0)
    spectra = torch.fft.rfft2(made.images) * ctf_2d(optics, 40)
    noise = torch.randn(300, 40, 40, generator=torch.Generator().manual_seed(0))
    images = torch.fft.irfft2(spectra, s=(40, 40)) + 1.5 * noise
    images[7] = torch.nan
    found = classify(images, 4, optics=optics, particle=FAR, likelihood=QUICK, seed=0, device="cpu")
    assert int(found.class_number[7]) == 0
    used = torch.arange(300) != 7
    score = agreement(
        found.class_number[used] - 1, found.pose[used], made.class_number[used] - 1,
        made.pose[used], 4,
    )  # fmt: skip
    assert score.rand_index > 0.95
    assert score.right > 0.9


def test_the_same_seed_gives_the_same_classes_however_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = simulate(n=120, n_classes=3, size=32, snr=0.5, max_shift=1.0, seed=3)
    settings = {"particle": NEAR, "likelihood": Likelihood(cycles=1)}
    one = classify(made.images, 3, **settings, seed=5, device="cpu")
    monkeypatch.setattr(module, "KEPT_SHARE", 0.0)
    two = classify(made.images, 3, **settings, seed=5, device="cpu")
    assert torch.equal(one.class_number, two.class_number)
    torch.testing.assert_close(one.pose.angle, two.pose.angle, rtol=0, atol=1e-2)
    # Particles that are made again have other rounding errors, with which classes may be turned.
    monkeypatch.setattr(whitening, "KEPT_SHARE", 0.0)
    three = classify(made.images, 3, **settings, seed=5, device="cpu")
    assert adjusted_rand_score(one.class_number, three.class_number) > 0.97


def test_of_many_particles_a_sample_finds_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last level 120 of 400 particles take part; then all have classes and poses."""
    made = simulate(n=400, n_classes=4, size=40, snr=0.3, max_shift=2.0, seed=1)
    monkeypatch.setattr(split_and_merge, "SMALLEST_SAMPLE", 10)
    monkeypatch.setattr(split_and_merge, "SAMPLE_PER_CLASS", 30)
    seen: list[tuple[str, int]] = []
    shares: list[float] = []

    def look(state: State) -> None:
        shares.append(float((state["label"] >= 0).float().mean()))
        seen.extend((row["step"], row["largest_class"]) for row in state.history[len(seen) :])

    begun: list[torch.Tensor] = []  # shifts of all particles before the last level
    find = split_and_merge.SplitAndMerge.find_shifts

    def watched(*given: Any) -> torch.Tensor:
        begun.append(find(*given))
        return begun[-1]

    monkeypatch.setattr(split_and_merge.SplitAndMerge, "find_shifts", watched)
    settings = {"particle": FAR, "likelihood": QUICK, "seed": 0, "device": "cpu"}
    found = classify(made.images, 4, **settings, on_step=look)
    assert shares[-1] == 1
    off = (begun[0] - found.pose.shift).norm(dim=1)
    assert off.median() < 0.5 * found.pose.shift.norm(dim=1).median()
    assert shares[:-1] == pytest.approx([0.3] * (len(shares) - 1))
    whole = [step for step, _ in seen].index("all")
    assert max(size for _, size in seen[:whole]) <= 120
    assert [step for step, _ in seen[whole : whole + 3]] == ["all", "all", "relax"]
    score = agreement(found.class_number - 1, found.pose, made.class_number - 1, made.pose, 4)
    assert score.rand_index > 0.97
    assert score.right > 0.97
    assert score.shift < 0.4


def test_a_sample_is_drawn_of_many_particles_only() -> None:
    assert torch.equal(sample_of(20_000, 50, 0), torch.arange(20_000))
    some = sample_of(10**6, 100, 0)
    assert len(some.unique()) == len(some) == 40_000
    assert torch.equal(some, some.sort().values)
    assert torch.equal(some, sample_of(10**6, 100, 0))
    assert not torch.equal(some, sample_of(10**6, 100, 1))
    assert len(sample_of(10**6, 10_000, 0)) == 200_000


def observed(monkeypatch: pytest.MonkeyPatch, *args: Any, **more: Any) -> Observations:
    """What `classify` lets the likelihood see."""

    class SeenError(Exception):
        pass

    def stop(read: Any, n: int, *args: Any) -> Observations:
        raise SeenError(observer(read, n, *args)(torch.arange(n)))

    with monkeypatch.context() as patch:
        patch.setattr(classification, "observer", stop)
        device = {} if isinstance(args[0], PreparedParticles) else {"device": "cpu"}
        with pytest.raises(SeenError) as caught:
            classify(*args, **device, **more)
    seen: Observations = caught.value.args[0]
    return seen


@pytest.mark.parametrize("box", [None, 32])
def test_the_ctf_is_that_of_the_prepared_pixels(
    box: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(12, 48, 48, generator=torch.Generator().manual_seed(0))
    images[2] = torch.nan
    optics = some_optics(12, pixel_size=3.0)
    used = torch.arange(12) != 2
    size, scale = box or 48, 48 / (box or 48)
    how = {"images": Images(box=box), "max_rejected": 0.2, "device": "cpu"}
    with_ctf = observed(monkeypatch, prepare(images, optics=optics, **how), 2)
    without = observed(monkeypatch, prepare(images, **how), 2)
    wide = replace(optics, pixel_size=optics.pixel_size * scale)
    transfer = ctf_formula(wide, size)[used].square()
    k = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]) * size
    for ring in range(1, with_ctf.rings.last + 1):
        # The noise's power is one number a ring, measured before or after phases are flipped:
        # what is left of the ratio is the CTF's.
        found = with_ctf.weight[:, ring - 1] / without.weight[:, ring - 1]
        expected = transfer[:, k.round() == ring].mean(1).float()
        assert float(found.mean() / expected.mean()) == pytest.approx(1, abs=0.15)
        scaled = found * (expected.mean() / found.mean())
        torch.testing.assert_close(scaled, expected, rtol=2e-3, atol=2e-3)


def test_the_star_files_ctf_is_used_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = TensorStack(torch.randn(12, 32, 32), pixel_size=3.0)
    stack.table = {
        "rlnDefocusU": np.linspace(1e4, 3e4, 12), "rlnDefocusV": np.linspace(1e4, 3e4, 12),
        "rlnDefocusAngle": np.zeros(12), "rlnVoltage": np.full(12, 300.0),
        "rlnSphericalAberration": np.full(12, 2.7), "rlnAmplitudeContrast": np.full(12, 0.1),
    }  # fmt: skip
    with_ctf, without = (
        observed(monkeypatch, stack, 2, particle=Particle(ctf=use)).weight
        for use in ("auto", "none")
    )
    assert (without == without[0]).all()
    assert float((with_ctf / without).std(0).amin()) > 0.01


def test_averages_are_weighted_by_the_square_of_the_ctf() -> None:
    made = simulate(n=80, n_classes=2, size=32, snr=2.0, max_shift=1.0, mirror=False, seed=2)
    optics = some_optics(80, pixel_size=4.0)
    transfer = ctf_formula(optics, 32)
    images = torch.fft.irfft2(torch.fft.rfft2(made.images.double()) * transfer).float()
    found = classify(
        images, 2, optics=optics, particle=NEAR, likelihood=Likelihood(cycles=0), seed=0,
        device="cpu",
    )  # fmt: skip
    assert found.ctf.startswith("CTF: in the likelihood, phases flipped, averages weighted by")
    for c in range(2):
        own = (found.class_number == c + 1).nonzero().squeeze(1)
        expected = ctf_average(images[own], optics[own], found.pose[own]).float()
        assert float((found.averages[c] - expected).norm() / expected.norm()) < 5e-3


def test_the_likeliest_start_goes_on() -> None:
    """It finds the views where many a single start does not; which it is differs."""
    made = simulate(n=60, n_classes=4, size=32, snr=0.2, max_shift=1.0, seed=3)
    plan = Plan(Likelihood(starts=4), 4, 12.8, 1.0, True, 32)
    particles = prepare(made.images, device="cpu")
    seen = observer(lambda rows: made.images[rows], 60, 32, None, 10, 12.8, 1.0)
    places, chosen, single = set(), [], []
    for seed in range(4):
        work = SplitAndMerge(plan, seen, particles, seed)
        level = work.level(0, torch.zeros(60, 2))
        starts = [work.start(level) for _ in range(4)]  # as `begin` draws them
        evidence = [start.evidence for start in starts]
        begun = SplitAndMerge(plan, seen, particles, seed).begin()
        assert float(begun["evidence"]) == max(evidence) > min(evidence)
        places.add(evidence.index(max(evidence)))
        chosen.append(adjusted_rand_score(made.class_number, begun["label"]))
        single += [adjusted_rand_score(made.class_number, each.found.label) for each in starts]
    assert len(places) > 1
    assert min(chosen) > 0.95
    assert np.mean(chosen) > np.mean(single) + 0.05


def test_what_does_not_fit_is_refused() -> None:
    images = torch.randn(20, 32, 32)
    with pytest.raises(ValueError, match="n_classes"):
        classify(images, 11, device="cpu")
    with pytest.raises(ValueError, match="5 CTFs do not fit 20"):
        classify(images, 2, optics=some_optics(5), device="cpu")
    with pytest.raises(ValueError, match="5 CTFs do not fit 20"):
        prepare(images, optics=some_optics(5))


def test_a_stack_without_a_defocus_has_no_optics() -> None:
    assert optics_of(TensorStack(torch.zeros(2, 8, 8))) is None


def test_the_shift_grid_is_symmetric() -> None:
    grid = shift_grid(3.0, 2.0)
    assert grid.tolist() == (-grid.flip(0)).tolist()
    assert shift_grid(0.0, 1.0).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("n", "surplus"), [(2, 1.5), (12, 1.5), (12, 1.0)])
def test_one_class_is_an_alignment(n: int, surplus: float) -> None:
    made = simulate(n=n, n_classes=1, size=32, snr=1.0, max_shift=1.0, seed=3)
    settings = Likelihood(cycles=1, surplus=surplus)
    found = classify(made.images, 1, particle=NEAR, likelihood=settings, device="cpu")
    assert found.class_sizes.tolist() == [n]


@pytest.mark.parametrize(("size", "value"), [(33, 3.7), (40, 0.1)])
def test_a_constant_image_is_constant_however_flipped(size: int, value: float) -> None:
    made = simulate(n=40, n_classes=2, size=size, snr=1.0, max_shift=1.0, seed=3)
    images = made.images.clone()
    images[7] = value
    settings, optics = Likelihood(cycles=0), some_optics(40)
    found = classify(images, 2, optics=optics, particle=NEAR, likelihood=settings, device="cpu")
    assert found.class_number[7] == 0
    assert found.rejected["index"].tolist() == [7]
    prepared = prepare(images, optics=optics, device="cpu")
    flipped, raw = (x.read(torch.arange(39)) for x in (prepared.phase_flipped(), prepared))
    signs = torch.sign(ctf_2d(optics, size))[:7]
    inside = [row for row in range(size) if 2 * row != size]  # Nyquist has no sign of its own
    spectra, raw = (torch.fft.rfft2(x[:7])[:, inside, : size // 2] for x in (flipped, raw))
    torch.testing.assert_close(spectra * signs[:, inside, : size // 2], raw, atol=1e-3, rtol=1e-4)


def test_a_resolution_that_falls_is_refused() -> None:
    with pytest.raises(ValueError, match="end_detail 5 is coarser"):
        Likelihood(end_detail=5)
    with pytest.raises(ValueError, match="leaves no background"):
        classify(torch.randn(20, 32, 32), 2, particle=Particle(radius="30 px"), device="cpu")
