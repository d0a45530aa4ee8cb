import pytest
import torch

from cryoalign.images.polar import reference_spectra, ring_spectra
from cryoalign.operators import image_search
from cryoalign.operators.correlation import correlation_table
from cryoalign.operators.image_search import image_peaks
from cryoalign.particles.simulate import simulate
from cryoalign.pose import wrap_degrees
from cryoalign.search.match import best_poses, match, prepare_target
from cryoalign.search.settings import Search

pytestmark = pytest.mark.usefixtures("in_pytorch")  # test_kernels_cpu has the other voice


def test_match_is_the_best_of_the_table() -> None:
    data = simulate(n=6, n_classes=3, size=41, snr=1.0, max_shift=2.0, seed=2)
    search = Search(max_shift=2, shift_step=1, last_ring=15)
    rings = search.rings(41)
    shifts = search.shifts()
    table = correlation_table(
        ring_spectra(data.images, rings, shifts), reference_spectra(data.views, rings)
    )
    found = match(data.images, data.views, search)
    torch.testing.assert_close(found.score, table.flatten(2).amax(-1), rtol=1e-5, atol=1e-6)
    label, pose, score = found.best()
    torch.testing.assert_close(score, table.flatten(1).amax(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(label, data.class_number - 1)
    assert torch.equal(pose.mirror, data.pose.mirror)
    error = wrap_degrees(pose.angle - data.pose.angle)
    assert error.abs().max() < 5
    assert (pose.shift - data.pose.shift).abs().max() < 1.0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = simulate(n=9, n_classes=2, size=32, snr=0.3, seed=4)
    search = Search(max_shift=1)
    whole = match(data.images, data.views, search)
    for budget in (1, 2**20):
        monkeypatch.setattr(image_search, "CPU_CHUNK", budget)
        again = match(data.images, data.views, search)
        assert torch.equal(again.score, whole.score)
        assert torch.equal(again.pose.angle, whole.pose.angle)
        assert torch.equal(again.pose.shift, whole.pose.shift)
    one = match(data.images[4:5], data.views, search)
    assert torch.equal(one.score, whole.score[4:5])


def test_no_mirror_means_none() -> None:
    data = simulate(n=8, n_classes=1, size=32, snr=5.0, seed=1)
    assert data.pose.mirror.any()
    found = match(data.images, data.views, Search(max_shift=1, mirror=False))
    assert not found.pose.mirror.any()


@pytest.mark.parametrize(("max_shift", "step", "count"), [(3, 1, 49), (1, 0.5, 25), (0, 1, 1)])
def test_trial_shifts(max_shift: float, step: float, count: int) -> None:
    shifts = Search(max_shift=max_shift, shift_step=step).shifts()
    assert len(shifts) == count
    assert shifts.abs().max() == max_shift
    assert torch.equal(shifts.flip(0), -shifts)


@pytest.mark.parametrize("size", [32, 33])
def test_rings_stay_in_the_box(size: int) -> None:
    """The default last ring is the largest whose samples have all their neighbours inside."""
    search = Search(max_shift=3)
    rings = search.rings(size)
    assert rings.last_ring + 3 == (size - 1) // 2
    with pytest.raises(ValueError, match=rf"radius\) of at most {rings.last_ring} px"):
        Search(max_shift=3, last_ring=rings.last_ring + 1).rings(size)
    with pytest.raises(ValueError, match="leaves no ring"):
        Search(max_shift=15).rings(size)


@pytest.mark.parametrize(
    "wrong", [{"max_shift": -1}, {"shift_step": 0}, {"last_rings": 3}, {"first_ring": 0}]
)
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Search(**wrong)


@pytest.mark.parametrize("mode", ["adaptive", "exhaustive"])
def test_input_that_does_not_fit_is_refused(mode: str) -> None:
    search, views = Search(max_shift=2, mode=mode), torch.randn(3, 32, 32)
    target = prepare_target(views, search)
    for wrong, words in (
        (torch.randn(0, 32, 32), "no images"),
        (torch.randn(2, 30, 30), "box of 32 px"),
        (torch.randn(2, 30, 32), "box of 32 px"),
        (torch.randn(32, 32), "box of 32 px"),
        (torch.randn(2, 32, 32, dtype=torch.float64), "float64"),
    ):
        with pytest.raises(ValueError, match=words):
            best_poses(wrong, target)
        with pytest.raises(ValueError, match=words):
            match(wrong, views, search)
    for wrong, words in (
        (torch.randn(0, 32, 32), "no references"),
        (torch.randn(2, 30, 32), "size, size"),
        (torch.ones(2, 32, 32, dtype=torch.int32), "float"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare_target(wrong, search)
        with pytest.raises(ValueError, match=words):
            match(torch.randn(2, 32, 32), wrong, search)


def test_image_peaks_refuses_what_would_be_wrong_in_silence() -> None:
    search = Search(max_shift=2)
    rings = search.rings(32)
    spectra = reference_spectra(torch.randn(3, 32, 32), rings)

    def peaks(images=None, references=spectra, shifts=None, candidates=None, last=rings.last_ring):
        return image_peaks(
            torch.randn(2, 32, 32) if images is None else images,
            references,
            search.shifts() if shifts is None else shifts,
            rings.first_ring,
            rings.ring_step,
            last,
            rings.n_angles,
            True,
            candidates,
        )

    assert peaks()[0].shape == (2, 3)
    for wrong, words in (
        ({"last": rings.last_ring - 1}, "reference spectra"),
        ({"references": spectra[:, 1:]}, "reference spectra"),
        ({"references": spectra.to(torch.complex128)}, "complex128"),
        ({"images": torch.randn(32, 32)}, "images"),
        ({"shifts": torch.zeros(0, 2)}, "at least one"),
        ({"shifts": torch.zeros(4)}, "at least one"),
        ({"candidates": 0}, "candidates"),
    ):
        with pytest.raises(ValueError, match=words):
            peaks(**wrong)
