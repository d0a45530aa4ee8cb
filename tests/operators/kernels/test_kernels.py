"""The CUDA kernels against float64 on the same spectra; and that they build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cryoalign.images.polar import Rings, ring_spectra
from cryoalign.operators import kernels
from cryoalign.operators.correlation import (
    correlation_logsumexp,
    correlation_peaks,
    correlation_table,
    unravel_place,
)
from cryoalign.operators.kernels import build, peaks
from cryoalign.operators.kernels.peaks import Layout
from cryoalign.particles.simulate import simulate


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    found = kernels.load()
    if not found.loaded:
        pytest.skip(f"{found.message}; {found.advice}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["fused", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel that suits the card, then the one for every card."""
    monkeypatch.setenv("CRYOALIGN_PORTABLE", "1" if request.param == "portable" else "0")
    return request.param


def spectra(
    n: int, k: int, s: int, last_ring: int, angles: int, snr: float = 0.05, device: str = "cuda"
) -> tuple[Tensor, Tensor]:
    """Noisy particles' (n, s, r, m) and views' (k, r, m) spectra, complex64."""
    data = simulate(n, k, size=max(32, 2 * last_ring + 9), snr=snr, max_shift=2.0, seed=n + 17 * k)
    rings = Rings(1, last_ring, angles=angles)
    side = int(s**0.5 + 0.999)
    axis = torch.linspace(-2, 2, side, dtype=torch.float64) if side > 1 else torch.zeros(1)
    shifts = torch.cartesian_prod(axis, axis)[:s].float()
    x = ring_spectra(data.images.float().to(device), rings, shifts.to(device))
    return x, ring_spectra(data.views.float().to(device), rings)[:, 0]


def table64(x: Tensor, y: Tensor, mirror: bool) -> Tensor:
    """(n, k, s hands a) in float64."""
    wide = (x.to(torch.complex128), y.to(torch.complex128))
    return correlation_table(*wide, mirror).flatten(2)


# n, k, s, last ring, angles
SIZES = [
    (1, 1, 1, 1, 8),
    (9, 3, 5, 7, 30),
    (17, 13, 49, 36, 256),
    (5, 11, 49, 40, 256),
    (8, 8, 70, 20, 200),
    (3, 9, 130, 36, 256),
    (7, 5, 4, 47, 320),
    (5, 9, 3, 60, 384),
    (2, 3, 441, 12, 128),
    (4, 5, 2, 80, 512),
    (3, 2, 2, 100, 640),
]


@pytest.mark.gpu
@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_peaks_against_float64(gpu, kernel, size, mirror) -> None:
    x, y = spectra(*size)
    table = table64(x, y, mirror)
    best, _ = table.max(2)
    score, place = correlation_peaks(x, y, mirror)
    at_place = table.gather(2, place.unsqueeze(2)).squeeze(2)
    # What is said of a place is exact to fp32's rounding ...
    torch.testing.assert_close(score.double(), at_place, rtol=1e-5, atol=2e-6)
    # ... and no other place is better by more than fp16 may confuse: a thousandth of the spread.
    regret = (best - at_place) / table.std(2)
    assert regret.max() < 1e-2
    assert (regret < 1e-6).double().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(17, 13, 49, 36, 256), (5, 9, 3, 60, 384)], ids=str)
def test_candidates_hold_the_best_and_the_rest_stays_below(gpu, kernel, size) -> None:
    x, y = spectra(*size)
    score, place = correlation_peaks(x, y)
    few, where = correlation_peaks(x, y, True, 4)
    assert torch.equal(few.argmax(1), score.argmax(1))
    known = where >= 0
    assert (known.sum(1) == 4).all()
    assert torch.equal(few[known], score[known])
    assert torch.equal(where[known], place[known])
    lowest = few.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    assert (few.masked_fill(known, -torch.inf) < lowest).all()
    torch.testing.assert_close(few, score, rtol=5e-3, atol=5e-4)


@pytest.mark.gpu
def test_spectra_of_any_kind(gpu, kernel) -> None:
    """White spectra fill every ring and frequency; large, tiny, absent and undefined ones."""
    generator = torch.Generator(gpu).manual_seed(2)

    def white(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=gpu, dtype=torch.complex64)

    x, y = white(9, 5, 21, 129), white(10, 21, 129)
    scales = 10.0 ** torch.arange(-12, 15, 3, device=gpu)
    x *= scales[:, None, None, None]
    y *= 10.0 ** torch.arange(-15, 15, 3, device=gpu)[:, None, None]
    x[0, 0] = 0  # one shift without spectra
    x[4] = 0
    y[3] = 0
    table = table64(x, y, True)
    best = table.max(2).values
    score, place = correlation_peaks(x, y)
    at_place = table.gather(2, place.unsqueeze(2)).squeeze(2)
    spread = table.std(2).clamp_min(1e-300)
    assert (((score - at_place).abs() / spread) < 1e-3).all()
    assert (((best - at_place) / spread) < 2e-2).all()
    x[2, 1, 3, 4] = torch.nan
    score, place = correlation_peaks(x, y)
    good = torch.arange(9, device=gpu) != 2
    assert score[good].isfinite().all()
    assert (place >= 0).all()
    assert (place < 5 * 2 * 256).all()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(17, 13, 49, 36, 256), (9, 9, 70, 60, 384)], ids=str)
def test_every_output_is_written_and_runs_agree(gpu, kernel, size) -> None:
    x, y = spectra(*size)
    n, k = size[:2]
    layout = Layout.of_references(y)
    packed = []
    for data, pack, lead in (
        (x, torch.ops.cryoalign_cuda.pack_particles, (-(-n // 8), size[2])),
        (y, torch.ops.cryoalign_cuda.pack_references, (-(-k // 8),)),
    ):
        out = torch.full((*lead, layout.fragments, 32, 8), torch.nan, dtype=torch.half, device=gpu)
        scale = torch.full((8 * lead[0], *lead[1:]), torch.nan, device=gpu)
        pack(data, layout.steps, out, scale)
        assert out.isfinite().all()
        assert scale.isfinite().all()
        packed += [out, scale]
    matrix = peaks.dft_matrix(layout.angles, layout.k_steps, gpu)
    found = []
    for poison in (torch.nan, 7.0):
        score = torch.full((2, n, k, 2), poison, device=gpu)
        shift = torch.full((2, n, k, 2), -7, device=gpu, dtype=torch.int32)
        torch.ops.cryoalign_cuda.fused_peaks(
            *packed, matrix, layout.steps, layout.angles, kernel == "portable", score, shift
        )
        assert (score[0].abs() <= 1.01).all()
        assert (score[1] <= score[0]).all()
        assert (shift[0] >= 0).all()
        assert (shift < size[2]).all()
        # One shift may win at every angle: then there is no runner-up.
        none = score[1] == torch.finfo(torch.float).min
        assert torch.equal(shift[1] < 0, none)
        assert none.double().mean() < 0.1
        assert (shift[0] != shift[1]).all()
        found.append((score, shift))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.gpu
def test_batches_change_nothing(gpu, kernel, monkeypatch) -> None:
    x, y = spectra(41, 11, 49, 36, 256)
    whole = correlation_peaks(x, y)
    for first, second in zip(whole, correlation_peaks(x, y), strict=True):
        assert torch.equal(first, second)
    soft = correlation_logsumexp(x, y, 0.02)
    for n in (1, 7):
        parts = [correlation_peaks(part, y) for part in x.split(n)]
        assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
        assert torch.equal(torch.cat([p[1] for p in parts]), whole[1])
    monkeypatch.setattr(peaks, "MOST_BYTES", 1)
    for first, second in zip(whole, correlation_peaks(x, y), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(correlation_logsumexp(x, y, 0.02), soft)


@pytest.mark.gpu
def test_out_of_memory_halves_the_batch_and_says_so(gpu, monkeypatch) -> None:
    x, y = spectra(41, 11, 9, 20, 256)
    whole = correlation_peaks(x, y)
    pack = peaks.pack_particles

    def short(part: Tensor, layout: Layout) -> peaks.Packed:
        if len(part) > 10:
            raise torch.cuda.OutOfMemoryError("made up")
        return pack(part, layout)

    monkeypatch.setattr(peaks, "pack_particles", short)
    with pytest.warns(UserWarning, match="particles at a time"):
        again = correlation_peaks(x, y)
    for first, second in zip(whole, again, strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_the_choice_is_fp32s(gpu, kernel) -> None:
    """Class, hand, shift and angle of noisy particles: fp32's but for near ties."""
    x, y = spectra(256, 20, 49, 36, 256, snr=0.02)
    score, place = correlation_peaks(x, y, True, 4)
    table = torch.cat([table64(part, y, True).flatten(1) for part in x.split(8)])
    best, where = table.max(1)
    value, label = score.max(1)
    chosen = label * (table.shape[1] // 20) + place.gather(1, label[:, None])[:, 0]
    same = chosen == where
    regret = (best - table.gather(1, chosen[:, None])[:, 0]) / table.std(1)
    assert same.double().mean() > 0.98
    assert regret.max() < 1e-2
    torch.testing.assert_close(value.double(), best, rtol=1e-3, atol=1e-5)
    place_of = unravel_place(place.gather(1, label[:, None])[:, 0], 256, True)
    assert int(place_of.shift.max()) < 49


@pytest.mark.gpu
def test_opcheck(gpu) -> None:
    x, y = spectra(9, 3, 5, 7, 32)
    torch.library.opcheck(torch.ops.cryoalign.correlation_peaks, (x, y, True, 2))
    torch.library.opcheck(
        torch.ops.cryoalign.correlation_peaks, (x.transpose(0, 1).conj(), y.flip(0).conj())
    )
    torch.library.opcheck(torch.ops.cryoalign.correlation_logsumexp, (x, y, 0.1))
    wide = x.to(torch.complex128), y.to(torch.complex128)  # the PyTorch body
    torch.testing.assert_close(
        correlation_peaks(*wide)[0].float(), correlation_peaks(x, y)[0], rtol=1e-3, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logsumexp_against_float64(gpu, size, mirror) -> None:
    x, y = spectra(*size)
    for temperature in (0.3, 0.01):
        expected = temperature * torch.logsumexp(table64(x, y, mirror) / temperature, 2)
        got = correlation_logsumexp(x, y, temperature, mirror)
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=3e-4)


@pytest.mark.gpu
def test_logsumexp_gradients(gpu) -> None:
    x, y = (t.detach().requires_grad_() for t in spectra(9, 3, 5, 12, 96))
    expected = torch.autograd.grad(
        (0.05 * torch.logsumexp(table64(x, y, True) / 0.05, 2)).square().sum(), (x, y)
    )
    got = torch.autograd.grad(correlation_logsumexp(x, y, 0.05).square().sum(), (x, y))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < 2e-3 * b.norm()


# ------------------------------------------------------------------ without a GPU


def test_the_layout_keeps_what_carries_power() -> None:
    assert Layout.of_rings(Rings(1, 36)).steps == (3, 2, 2, 2, 1, 1, 1)
    white = torch.ones(2, 20, 65, dtype=torch.complex64)
    assert Layout.of_references(white) == Layout(20, 128, (2, 2, 2, 2, 2))
    low = white.clone()
    low[:, :, 20:] = 0
    assert Layout.of_references(low).steps == (2, 2)
    low[:, :4, 16:] = 0  # the four innermost rings carry less
    assert Layout.of_references(low).steps == (2, 1)
    assert Layout.of_references(torch.zeros_like(white)).steps == (1,)
    broken = white.clone()
    broken[0, 0, 0] = torch.nan
    assert Layout.of_references(broken).rings == 20


def test_the_transform_matrix_is_the_transform() -> None:
    """Unpacked and folded back, it turns a spectrum into the series at half steps."""
    angles, k_steps = 28, 1
    matrix = peaks.dft_matrix(angles, k_steps, torch.device("cpu")).double()
    rows = matrix.reshape(-1, 4, k_steps, 8, 4, 2, 2, 2).permute(1, 0, 6, 3, 2, 5, 4, 7)
    rows = rows.reshape(4, -1, 16 * k_steps)[:, : angles // 4]
    z = torch.randn(15, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    pad = torch.nn.functional.pad(z, (0, 32 - 15))
    even, odd = pad[0::2], pad[1::2]
    a, b = rows[0] @ even.real, rows[1] @ odd.real
    c, d = rows[2] @ even.imag, rows[3] @ odd.imag
    got = torch.cat([a + b - c - d, a + b + c + d, a - b - c + d, a - b + c - d])
    m = torch.arange(15, dtype=torch.float64)
    weight = torch.full((15,), 2.0, dtype=torch.float64)
    weight[0] = weight[-1] = 1
    phi = (torch.arange(angles, dtype=torch.float64) + 0.5) * 2 * torch.pi / angles
    expected = (weight * z * torch.exp(1j * phi[:, None] * m)).real.sum(1)
    torch.testing.assert_close(got.sort().values, expected.sort().values, rtol=0, atol=2e-2)


def test_it_compiles() -> None:
    """With a compiler the library is built from these sources, and found by their hash."""
    if build.find_nvcc() is None:
        pytest.skip("needs the CUDA toolkit's nvcc")
    library = build.build()
    assert library == build.find_library()
    assert b"fused_peaks" in library.read_bytes()


def test_a_stale_library_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in build.SOURCES.glob("*.cu*"):
        shutil.copy(source, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    library = tmp_path / build.library_name()
    library.touch()
    assert build.find_library() == library
    with (tmp_path / "common.cuh").open("a") as header:
        header.write("\n")
    assert build.find_library() is None


def test_without_a_compiler_the_message_says_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "find_library", lambda: None)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.BuildError, match="CUDA toolkit"):
        build.build()


def test_a_cpu_pytorch_says_why_nothing_is_loaded() -> None:
    found = kernels.status()
    if torch.version.cuda is None:
        assert not found.loaded
        assert "no CUDA" in found.message
        assert found.advice
    assert not kernels.usable(torch.device("cpu"))
