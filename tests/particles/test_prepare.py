"""Particles as alignment gets them: what is set aside, and what preparation does to the rest."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import some_optics

from cryoalign.images.ctf import Optics
from cryoalign.images.fourier import fourier_resize
from cryoalign.images.geometry import transform
from cryoalign.images.masks import normalise
from cryoalign.io.formats import write_images
from cryoalign.io.stack import read_particles
from cryoalign.methods.references import over_batches, seed_references
from cryoalign.particles import cache, reading
from cryoalign.particles.prepare import PreparedParticles, prepare
from cryoalign.particles.settings import Images
from cryoalign.particles.simulate import simulate
from cryoalign.particles.stack import TensorStack
from cryoalign.pose import Pose
from cryoalign.runtime.processes import choose_device
from cryoalign.runtime.threads import map_in_order

SEED = 55
CPU = torch.device("cpu")
N, SIZE = 30, 32


def noise() -> torch.Tensor:
    return torch.randn(N, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED)) + 5


def prepared(images: torch.Tensor, settings: Images | None = None, **more) -> PreparedParticles:
    return PreparedParticles(TensorStack(images, 1.5), settings or Images(), CPU, **more)


def everything(particles: PreparedParticles) -> torch.Tensor:
    return torch.cat([particles.read(part) for part in particles.parts()])


def test_unusable_images_are_set_aside_with_their_rows():
    images = noise()
    images[4, 3, 3] = torch.nan
    images[11] = 2.5
    images[29, 0, 0] = -torch.inf
    particles = prepared(images)
    assert particles.rejected["index"].tolist() == [4, 11, 29]
    for word, reason in zip(
        ("NaN", "constant", "infinite"), particles.rejected["reason"], strict=True
    ):
        assert word in reason
    good = [i for i in range(N) if i not in (4, 11, 29)]
    assert particles.rows.tolist() == good
    assert len(particles) == N - 3
    # Members count the usable ones: the fifth usable image is row 5.
    found = particles.read(torch.tensor([4, 9, 26]))
    expected = normalise(images[[5, 10, 28]], SIZE / 2)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert torch.isfinite(everything(particles)).all()


def test_too_many_unusable_are_refused():
    images = noise()
    images[:4] = torch.nan
    with pytest.raises(ValueError, match=r"4 of 30 particles are unusable.*max_rejected"):
        prepared(images)
    assert len(prepared(images, max_rejected=0.2)) == N - 4
    images[:] = 1.0
    with pytest.raises(ValueError, match="none of the 30 particles is usable"):
        prepared(images, max_rejected=1.0)


def test_the_input_is_not_written_to():
    images = noise()
    images[3] = torch.nan
    before = images.clone()
    everything(prepared(images, Images(invert=True, box=16)))
    np.testing.assert_array_equal(images.numpy(), before.numpy())


@pytest.mark.parametrize("box", [20, 24])
@pytest.mark.parametrize("batch", [1, 4, 7, N])
def test_batches_are_all_particles_in_order_bit_for_bit(batch: int, box: int):
    """Also a batch of one, which an FFT of 24 pixels computes differently by itself."""
    images = noise()
    images[2] = 0.0
    settings = Images(box=box, cache="none")
    particles = prepared(images, settings, batch_size=batch)
    parts = list(particles.parts())
    assert torch.cat(parts).tolist() == list(range(N - 1))
    assert max(map(len, parts)) == min(batch, N - 1)
    alone = torch.cat([particles.read(torch.tensor([i])) for i in range(N - 1)])
    again = prepared(images, Images(box=box), batch_size=batch)  # in memory
    assert torch.equal(everything(again), alone)
    some = torch.tensor([20, 3, 3, 7])
    for each in (particles, again):
        assert torch.equal(each.read(some), alone[some])


def test_invert_and_background_radius():
    images = noise()
    plain = everything(prepared(images))
    assert torch.equal(everything(prepared(images, Images(invert=True))), -plain)
    near = everything(prepared(images, Images(background_radius=10.0)))
    np.testing.assert_array_equal(near.numpy(), normalise(images, 10.0).numpy())
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    ground = near[:, torch.from_numpy(np.hypot(x, y) > 10)]
    np.testing.assert_allclose(ground.mean(1).numpy(), 0, atol=1e-5)
    np.testing.assert_allclose(ground.std(1).numpy(), 1, atol=1e-5)


@pytest.mark.parametrize("subtract", ["ramp", "constant", "none"])
def test_what_is_subtracted_is_a_setting(subtract: str):
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    images = noise() + torch.from_numpy(5 + 0.2 * x + 0.1 * y).float()
    made = everything(prepared(images, Images(background=subtract)))
    good = np.stack([normalise(each[None], SIZE / 2, subtract)[0].numpy() for each in images])
    np.testing.assert_array_equal(made.numpy(), good[prepared(images).rows])


@pytest.mark.parametrize("box", [16, 21, 24, 32])
def test_box_scales_pixels_and_shifts(box: int):
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    blob = np.exp(-((x - 4) ** 2 + (y + 3) ** 2) / (2 * 3.0**2))
    images = torch.from_numpy(blob).float().expand(2, -1, -1)
    particles = prepared(images, Images(box=box, background_radius=14.0))
    assert particles.size == box
    assert particles.scale == pytest.approx(SIZE / box)
    assert particles.pixel_size == pytest.approx(1.5 * SIZE / box)
    small = particles.read(torch.tensor([0]))
    np.testing.assert_allclose(
        small.numpy(), fourier_resize(normalise(images, 14.0), box)[:1].numpy(), atol=1e-6
    )
    # A shift of the small image is ``scale`` times as many pixels of the input: this one, from
    # the input's place of the blob, brings it to the small image's centre.
    shift = torch.tensor([[-4.0, 3.0]]) / particles.scale
    centred = transform(small, Pose(torch.zeros(1), shift, torch.zeros(1, dtype=torch.bool)))
    weight = (centred[0] - 0.3 * centred.max()).clamp(min=0).double().numpy()
    y, x = np.mgrid[:box, :box] - box // 2
    centroid = np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
    np.testing.assert_allclose(centroid, 0, atol=0.05)


def test_errors_say_what_and_why():
    with pytest.raises(ValueError, match="32 x 30 px: alignment needs square"):
        prepared(torch.randn(4, 32, 30))
    with pytest.raises(
        ValueError, match=r"images.box 40 px is larger than the particles \(32 px\)"
    ):
        prepared(noise(), Images(box=40))
    with pytest.raises(ValueError, match="n, h, w"):
        TensorStack(torch.zeros(8, 8))
    with pytest.raises(ValueError, match="background_raduis"):
        Images(background_raduis=3.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="greater than or equal to 8"):
        Images(box=4)
    with pytest.raises(ValueError, match="leaves no background in a box of 32"):
        prepared(noise(), Images(background_radius=25.0))


@pytest.mark.parametrize("changed", [0, -1])
def test_the_fingerprint_sees_the_first_and_the_last_image(changed: int):
    images = noise()
    before = prepared(images).fingerprint
    assert prepared(images.clone()).fingerprint == before
    images[changed, 3, 3] += 1
    assert prepared(images).fingerprint != before
    assert prepared(images[1:]).fingerprint != before


def test_choose_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="no CUDA GPU here"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"


def test_seeds_are_low_passed_particles_chosen_by_the_seed():
    images = noise()
    images[0] = torch.nan
    particles = prepared(images)
    first = seed_references(particles, "random", 5, seed=1)
    assert torch.equal(first, seed_references(particles, "random", 5, seed=1))
    assert not torch.equal(first, seed_references(particles, "random", 5, seed=2))
    # Each is one particle below 0.1 / px: find it by its lowest frequencies.
    k = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None])
    low, high = k < 0.05, k > 0.15
    spectra = np.fft.rfft2(everything(particles).numpy())
    chosen = set()
    for spectrum in np.fft.rfft2(first.numpy()):
        gap = np.abs(spectra[:, low] - spectrum[low]).max(1)
        assert gap.min() < 1e-2
        assert np.abs(spectrum[high]).max() < 1e-2
        chosen.add(int(gap.argmin()))
    assert len(chosen) == 5


class Counted(TensorStack):
    """A stack that remembers which rows are read of it, and fails at one of them if told so."""

    def __init__(self, images: torch.Tensor, bad: int = -1) -> None:
        super().__init__(images, 1.5)
        self.rows: list[int] = []
        self.bad = bad

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows += rows.tolist()
        if self.bad in rows.tolist():
            raise OSError(f"row {self.bad} is gone")
        return super().read(rows)


def kinds(images: torch.Tensor) -> dict[str, PreparedParticles]:
    """The particles as the methods use them: all, some, flipped, and some of what is left."""
    stack = Counted(images)
    whole = prepare(stack, Images(box=20), optics=some_optics(N), device="cpu", batch_size=4)
    some = torch.tensor([0, 3, 4, 5, 6, 11, 20])
    part = whole.only(some, "left out")
    return {
        "whole": whole,
        "flipped": whole.phase_flipped(),
        "part": part,
        "flipped part": part.phase_flipped(),
        "part of the flipped": whole.phase_flipped().only(some, "left out"),
        "part of a part": part.only(torch.tensor([1, 2, 5]), "left out too").phase_flipped(),
        "reporting": whole.reporting_to(lambda *_: None),
    }


def test_what_is_kept_in_memory_is_what_would_be_made_again(monkeypatch: pytest.MonkeyPatch):
    """Bit for bit: read first by threads, all at once and again, in any order, one by one."""
    images = noise()
    images[2] = torch.nan
    kept = kinds(images)
    monkeypatch.setattr(cache, "SHARE", 0.0)
    made = kinds(images)
    for name, particles in kept.items():
        n, stack = len(particles), particles.stack
        assert isinstance(stack, Counted)
        overlapping = [particles.read(torch.tensor([i, i + 1])) for i in (0, 1)]
        parts = list(torch.arange(n).split(3))
        first = torch.cat(list(map_in_order(particles.read, parts * 2, 4)))
        stack.rows.clear()
        again = torch.cat([particles.read(part) for part in particles.parts()])
        order = torch.tensor([n - 1, 0, 1, 1, 0])
        mixed = particles.read(order)
        turned = particles.read(torch.tensor([0, 2, 1, 3]) % n)
        assert not stack.rows, name  # all is in memory by now
        expected = torch.cat([made[name].read(torch.tensor([i])) for i in range(n)])
        other = made[name].stack
        assert isinstance(other, Counted)
        before = len(other.rows)
        assert torch.equal(made[name].read(order), expected[order])
        assert len(other.rows) == before + len(order)  # nothing is
        assert torch.equal(first, expected.repeat(2, 1, 1)), name
        assert torch.equal(again, expected), name
        assert torch.equal(mixed, expected[order]), name
        assert torch.equal(turned, expected[torch.tensor([0, 2, 1, 3]) % n]), name
        assert torch.equal(torch.cat(overlapping), expected[[0, 1, 1, 2]]), name
    for name in ("flipped part", "part of the flipped"):
        members = torch.tensor([0, 3, 4, 5, 6, 11, 20])
        all_of_it = torch.arange(len(members))
        assert torch.equal(kept[name].read(all_of_it), kept["flipped"].read(members))
        assert not torch.equal(kept[name].read(all_of_it), kept["whole"].read(members))
        assert kept[name].rows.tolist() == [0, 4, 5, 6, 7, 12, 21]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_all_images_are_read_once(threads: int):
    """To find the unusable ones and to prepare the others; 16 more are read for the fingerprint."""
    images = noise()
    images[2], images[17] = torch.nan, 3.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stack = Counted(images)
        seen: list[tuple[str, int, int]] = []
        particles = prepare(stack, device="cpu", progress=lambda *done: seen.append(done))
        found = everything(particles)
    finally:
        torch.set_num_threads(before)
    assert len(stack.rows) == N + 16
    assert sorted(stack.rows[:N]) == list(range(N))
    assert seen[-1] == ("read", N, N)
    good = [i for i in range(N) if i not in (2, 17)]
    assert torch.equal(found, normalise(images[good], SIZE / 2))
    assert particles.rejected["index"].tolist() == [2, 17]


def test_with_room_for_some_the_others_are_read_again(monkeypatch: pytest.MonkeyPatch):
    images = noise()
    expected = everything(prepared(images))
    monkeypatch.setattr(cache, "BLOCK_BYTES", 5 * 4 * SIZE**2)
    monkeypatch.setattr(cache, "BLOCKS", 1)
    monkeypatch.setattr(cache, "available_memory", lambda device: 4 * 12 * 4 * SIZE**2)
    stack = Counted(images)
    particles = prepare(stack, device="cpu", batch_size=5)
    for _ in range(2):
        stack.rows.clear()
        assert torch.equal(everything(particles), expected)
        assert sorted(stack.rows) == list(
            range(10, N)
        )  # two blocks of five fit into the room for 12
    words = particles.kept()
    assert "41 kB" in words
    assert "kept in memory" in words
    assert f"{N - 10} of {N} images are read again" in words
    stack.rows.clear()
    none = prepare(stack, Images(cache="none"), device="cpu", batch_size=5)
    stack.rows.clear()
    assert torch.equal(everything(none), expected)
    assert sorted(stack.rows) == list(range(N))
    assert f"{N} of {N} images are read again" in none.kept()
    assert "kept in" not in none.kept()


class Slow(Counted):
    """A stack that says when a read begins and ends."""

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        self.begun.set()
        assert self.go_on.wait(10)
        return super().read(rows)

    begun, go_on = threading.Event(), threading.Event()


def test_the_next_batch_is_read_while_this_one_is_used(one_thread: None):
    images = noise()
    stack = Slow(images)
    stack.go_on.set()
    particles = prepare(stack, Images(cache="none"), device="cpu", batch_size=10)
    expected = everything(prepared(images))
    stack.rows.clear()
    parts = particles.parts()
    for start in (0, 10, 20):
        stack.begun.clear()
        stack.go_on.clear()
        part = next(parts)
        if start < 20:
            assert stack.begun.wait(10)  # the next batch, while this one is not yet used
        stack.go_on.set()
        assert torch.equal(particles.read(part), expected[start : start + 10])
    assert next(parts, None) is None
    assert sorted(stack.rows) == list(range(N))  # each once, by whichever thread


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [3, 12, 29])
def test_an_error_of_a_reading_thread_reaches_the_caller_and_ends_all_threads(
    threads: int, bad: int
):
    before, running = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(OSError, match=f"row {bad} is gone"):
            prepare(Counted(noise(), bad), device="cpu")
        assert threading.active_count() == running
        stack = Counted(noise())
        particles = prepare(stack, Images(cache="none"), device="cpu", batch_size=5)
        stack.bad = bad
        with pytest.raises(OSError, match=f"row {bad} is gone"):
            over_batches(particles, particles.read)
        assert threading.active_count() == running
        with pytest.raises(KeyboardInterrupt):  # Ctrl-C while a batch is worked on
            over_batches(particles, _interrupted)
        assert threading.active_count() == running
        stack.bad = -1
        assert len(over_batches(particles, particles.read)) == 6  # and it goes on
    finally:
        torch.set_num_threads(before)


def _interrupted(members: torch.Tensor) -> None:
    raise KeyboardInterrupt


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["auto", "none"])
def test_a_gpu_gets_what_a_cpu_gets(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch):
    """From a file, in many chunks, read ahead by threads; unusable images in several of them."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    images = torch.randn(1000, 32, 32, generator=torch.Generator().manual_seed(3)) * 9 + 4
    images[5], images[700, 3, 3] = 1.0, torch.nan
    write_images(tmp_path / "x.mrcs", images, 2.0)
    stack = read_particles(tmp_path / "x.mrcs")
    settings = Images(box=24, cache=how)
    expected = prepare(stack, settings, device="cpu", optics=some_optics(1000))
    monkeypatch.setattr(reading, "CUDA_CHUNK_BYTES", 37 * 4 * 32**2)
    found = prepare(stack, settings, device="cuda", optics=some_optics(1000), batch_size=101)
    assert found.rejected.equals(expected.rejected)
    assert ("kept in GPU memory" in found.kept()) == (how == "auto")
    for ours, theirs in (
        (found, expected),
        (found.phase_flipped(), expected.phase_flipped()),
        (found.only(torch.arange(3, 900, 7), "x"), expected.only(torch.arange(3, 900, 7), "x")),
    ):
        for _ in range(2):  # as made, and as kept
            difference = (everything(ours).cpu() - everything(theirs)).abs()
            # float16 rounds by 2^-12 of up to 8 standard deviations, when kept and when flipped.
            close = difference < (4e-3 if how == "auto" else 1e-4)
            if ours.flipped:  # where the CTF is zero to rounding, its sign may be another
                assert close.double().mean() > 0.99
            else:
                assert close.all()


def test_a_part_has_its_own_rows_reasons_halves_and_ctfs():
    images = noise()
    images[2] = torch.nan
    optics = some_optics(N)
    whole = prepare(TensorStack(images, 1.5), Images(box=20), optics=optics, device="cpu")
    assert whole.optics is not None  # is kept, and must not be taken for the part's
    part = whole.only(torch.tensor([0, 3, 6]), ["odd"] * 26)
    assert part.rows.tolist() == [0, 4, 7]
    assert part.half.tolist() == [0, 0, 1]
    assert part.optics is not None
    assert torch.equal(part.optics.defocus_u, optics.defocus_u[[0, 4, 7]])
    reasons = dict(zip(part.rejected["index"], part.rejected["reason"], strict=True))
    assert sorted([*reasons, 0, 4, 7]) == list(range(N))
    assert "NaN" in reasons.pop(2)
    assert set(reasons.values()) == {"odd"}
    assert list(part.rejected["index"]) == sorted(part.rejected["index"])
    assert len(whole) == N - 1
    assert whole.rejected["index"].tolist() == [2]


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_hot_pixels_are_mended_and_counted(cache: str) -> None:
    images = simulate(n=30, n_classes=2, size=32, snr=0.1, seed=4).images
    hot = images.clone()
    hot[::3, 20, 9] += 300 * images.std()
    clean, mended = (prepare(each, Images(cache=cache), device="cpu") for each in (images, hot))
    every = torch.arange(30)
    assert (mended.hot_images, mended.hot_pixels) == (10, 10)
    assert "10 in 10 of 30 images" in mended.mended()
    assert clean.mended() == ""
    apart = (mended.read(every) - clean.read(every)).abs()
    assert apart[:, 20, 9].max() < 6  # one pixel of noise for another
    apart[:, 20, 9] = 0
    assert apart.max() < 0.1
    kept = prepare(hot, Images(cache=cache, hot_pixels="keep"), device="cpu")
    assert kept.read(every)[0, 20, 9] > 15
    assert kept.hot_pixels == 0


def test_a_sample_takes_no_room_from_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phase-flipped images replace the others block by block; a sample has some of every block."""
    monkeypatch.setattr(cache, "BLOCK_BYTES", 4 * 16 * 32**2)  # 16 images
    images = simulate(n=320, n_classes=2, size=32, snr=0.1, seed=4).images
    constant = [torch.full((320,), value) for value in (1e4, 9e3, 10.0, 300.0, 2.7, 0.1, 0.0, 3.0)]
    stack = TensorStack(images)
    particles = prepare(stack, device="cpu", optics=Optics(*constant)).phase_flipped()
    particles.read(torch.arange(0, 320, 20))
    read: list[int] = []
    whole = TensorStack.read
    monkeypatch.setattr(
        TensorStack, "read", lambda self, rows: read.append(len(rows)) or whole(self, rows)
    )
    for members in particles.parts():
        particles.read(members)
    assert read == []
