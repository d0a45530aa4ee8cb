import pytest
import torch
from oracle import ctf, some_optics

from cryoalign.images.ctf import ctf_2d, optics_from_relion, phase_flip


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
