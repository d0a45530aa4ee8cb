from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import ctf, some_optics

from cryoalign.images.ctf import (
    complex_ctf,
    ctf_2d,
    implausible,
    matched_filter,
    optics_from_relion,
    phase_flip,
    transfer_2d,
)
from cryoalign.images.masks import normalise
from cryoalign.io.star import read_star


@pytest.mark.parametrize("size", [64, 45])
def test_ctf_is_the_formula(size: int) -> None:
    optics = some_optics()
    before = optics.defocus_u.clone()
    made = ctf_2d(optics, size)
    torch.testing.assert_close(made.double(), ctf(optics, size), atol=2e-3, rtol=0)
    assert torch.equal(optics.defocus_u, before)  # the library writes into its argument


def test_flipping_makes_the_transfer_positive() -> None:
    optics = some_optics(1)
    point = torch.zeros(1, 64, 64)
    point[:, 0, 0] = 1.0
    blurred = torch.fft.irfft2(torch.fft.rfft2(point) * ctf_2d(optics, 64), s=(64, 64))
    transfer = torch.fft.rfft2(phase_flip(blurred, optics))
    assert transfer.imag.abs().max() < 1e-5
    assert transfer.real.min() > -1e-5


def test_columns_join_their_optics_group() -> None:
    particles = {
        "rlnDefocusU": [1e4, 2e4], "rlnDefocusV": [9e3, 1.9e4], "rlnDefocusAngle": [10.0, 20.0],
        "rlnOpticsGroup": [7, 3],
    }  # fmt: skip
    groups = {
        "rlnOpticsGroup": [3, 7], "rlnVoltage": [200.0, 300.0],
        "rlnSphericalAberration": [2.0, 2.7], "rlnAmplitudeContrast": [0.07, 0.1],
    }  # fmt: skip
    optics = optics_from_relion(particles, groups, 1.5)
    assert optics is not None
    assert optics.voltage.tolist() == [300.0, 200.0]
    assert optics.phase_shift.tolist() == [0.0, 0.0]
    assert optics.pixel_size.tolist() == [1.5, 1.5]
    assert optics[1:].defocus_u.tolist() == [2e4]
    assert optics.scaled(2.0).pixel_size.tolist() == [3.0, 3.0]
    assert optics_from_relion({"rlnImageName": ["1@a.mrcs"]}, groups, 1.5) is None
    with pytest.raises(ValueError, match=r"no rlnVoltage.*particle\.ctf=none"):
        optics_from_relion(particles, {"rlnOpticsGroup": [3, 7]}, 1.5)


def test_the_axes_of_defocus_may_come_in_either_order() -> None:
    """U < V at an angle is V > U at that angle plus 90 degrees (both ASPIRE samples have it)."""
    optics = some_optics()
    other = replace(
        optics,
        defocus_u=optics.defocus_v, defocus_v=optics.defocus_u,
        defocus_angle=optics.defocus_angle + 90,
    )  # fmt: skip
    assert (other.defocus_u < other.defocus_v).all()
    for size in (64, 45):
        expected = ctf(other, size)  # the formula does not mind the order
        torch.testing.assert_close(ctf_2d(other, size).double(), expected, atol=2e-3, rtol=0)
    assert bool(torch.isfinite(complex_ctf(other, 32)).all())


@pytest.mark.parametrize("done", ["nothing", "flipped", "multiplied"])
def test_what_was_done_before_is_not_done_again(done: str) -> None:
    """Whatever was done to the images: flipped and multiplied, they are the same."""
    optics = some_optics(4)
    spectra = torch.fft.rfft2(torch.randn(4, 48, 48, generator=torch.Generator().manual_seed(0)))
    transfer = ctf(optics, 48).float()
    factor = {"nothing": 1.0, "flipped": transfer.sign(), "multiplied": transfer}[done]
    given = torch.fft.irfft2(spectra * factor, s=(48, 48))
    known = replace(
        optics,
        phase_flipped=torch.full((4,), done == "flipped"),
        premultiplied=torch.full((4,), done == "multiplied"),
    )
    multiply, square = matched_filter(known, 48)
    found = torch.fft.irfft2(torch.fft.rfft2(given) * multiply, s=(48, 48))
    expected = torch.fft.irfft2(spectra * transfer, s=(48, 48))
    # Signs beside zeros of the CTF are uncertain.
    assert float((found - expected).norm() / expected.norm()) < 0.05
    torch.testing.assert_close(square, transfer.square(), atol=4e-3, rtol=0)
    signal = {"nothing": transfer, "flipped": transfer.abs(), "multiplied": transfer.square()}
    torch.testing.assert_close(transfer_2d(known, 48), signal[done], atol=4e-3, rtol=0)
    flipped = phase_flip(given, known)
    if done == "nothing":
        turned = torch.fft.irfft2(spectra * transfer.sign(), s=(48, 48))
        assert float((flipped - turned).norm() / turned.norm()) < 0.05
        assert known.flipped().phase_flipped.all()
    else:
        torch.testing.assert_close(flipped, given, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="joint refinement needs them as they were recorded"):
            complex_ctf(known, 48)
    torch.testing.assert_close(
        transfer_2d(known.flipped(), 48), transfer_2d(known, 48).abs(), atol=1e-6, rtol=0
    )


def one_block(**changed: object) -> dict[str, object]:
    columns: dict[str, object] = {
        "rlnDefocusU": [1.1e4, 2e4], "rlnDefocusV": [1e4, 1.9e4], "rlnDefocusAngle": [10.0, 20.0],
        "rlnVoltage": [300.0, 300.0], "rlnSphericalAberration": [2.7, 2.7],
        "rlnAmplitudeContrast": [0.1, 0.1],
    }  # fmt: skip
    return columns | changed


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("rlnVoltage", 0, "rlnVoltage = 0 is impossible in 1 of 2 rows"),
        ("rlnVoltage", -300, "rlnVoltage = -300 is impossible"),
        ("rlnAmplitudeContrast", 2, "rlnAmplitudeContrast = 2 is impossible"),
        ("rlnAmplitudeContrast", 10, "divide by 100"),
        ("rlnDefocusU", 1e39, "rlnDefocusU = inf is impossible"),
        ("rlnDefocusV", float("nan"), "rlnDefocusV = nan is impossible"),
        ("rlnDefocusV", -2e6, "it should be from -1e+06 to 1e+06 A"),
        ("rlnPhaseShift", float("inf"), "rlnPhaseShift = inf is impossible"),
        ("rlnCtfDataArePhaseFlipped", 2, "rlnCtfDataArePhaseFlipped = 2 in row 2: write 0 or 1"),
    ],
)
def test_impossible_values_are_refused(column: str, value: float, said: str) -> None:
    columns = one_block()
    columns[column] = [columns.get(column, [0.0])[0], value]
    with pytest.raises(ValueError, match=r"row 2") as caught:
        optics_from_relion(columns, None, 1.5)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("rlnDefocusU", 1.5, "micrometres: multiply the column by 10000"),
        ("rlnDefocusV", 1500, "nanometres"),
        ("rlnDefocusU", -15000, "underfocused"),
        ("rlnVoltage", 300000, "volts: divide by 1000"),
        ("rlnSphericalAberration", 2700, "micrometres: divide by 1000"),
        ("rlnAmplitudeContrast", 0.7, "from 0 to 0.5"),
    ],
)
def test_unusual_values_are_found_with_their_remedy(column: str, value: float, said: str) -> None:
    columns = one_block()
    columns[column] = [columns[column][0], value]
    optics = optics_from_relion(columns, None, 1.5)
    assert optics is not None
    (found,) = implausible(optics)
    assert (found.column, found.row) == (column, 1)
    assert said in str(found)
    usual = optics_from_relion(one_block(), None, 1.5)
    assert usual is not None
    assert implausible(usual) == []


def test_what_was_done_is_read_by_optics_group() -> None:
    particles = one_block(rlnOpticsGroup=[2, 1])
    groups = {
        "rlnOpticsGroup": [1, 2], "rlnCtfDataArePhaseFlipped": [1, 0],
        "rlnCtfDataAreCtfPremultiplied": [0, 1],
    }  # fmt: skip
    optics = optics_from_relion(particles, groups, 1.5)
    assert optics is not None
    assert optics.phase_flipped.tolist() == [False, True]
    assert optics.premultiplied.tolist() == [True, False]
    assert optics[1:].scaled(2.0).phase_flipped.tolist() == [True]


@pytest.mark.parametrize("layout", ["relion30", "relion31"])
def test_other_programs_files_have_finite_ctfs(shared_data: Path, layout: str) -> None:
    """In all rows of these files of ASPIRE, DefocusU is smaller than DefocusV."""
    tables = read_star(shared_data / "formats" / f"aspire_sample_particles_{layout}.star")
    optics = optics_from_relion(tables.particles, tables.optics, 1.4)
    assert optics is not None
    assert (optics.defocus_u < optics.defocus_v).all()
    assert implausible(optics) == []
    made, expected = ctf_2d(optics, 64), ctf(optics, 64)
    torch.testing.assert_close(made.double(), expected, atol=5e-3, rtol=0)


@pytest.mark.gpu
def test_a_gpu_computes_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    optics = some_optics()
    images = torch.randn(5, 64, 64, generator=torch.Generator().manual_seed(0))
    card = optics.to("cuda")
    for here, there in zip(matched_filter(optics, 64), matched_filter(card, 64), strict=True):
        torch.testing.assert_close(there.cpu(), here, atol=1e-3, rtol=0)
    flipped = phase_flip(images.cuda(), optics).cpu()
    expected = phase_flip(images, optics)
    # Signs beside zeros of the CTF are uncertain.
    assert float((flipped - expected).norm() / expected.norm()) < 0.03
    for subtract in ("ramp", "constant", "none"):
        torch.testing.assert_close(
            normalise(images.cuda(), 32.0, subtract).cpu(),
            normalise(images, 32.0, subtract),
            atol=1e-4,
            rtol=0,
        )
