from dataclasses import replace

import pytest
import torch
from oracle import some_optics

from cryoalign.images.ctf import ctf_2d
from cryoalign.images.fourier import filter_shells
from cryoalign.methods.classify import whitening as module
from cryoalign.methods.classify.fourier_rings import half_circle
from cryoalign.methods.classify.whitening import noise_spectrum, observe


def coloured(n: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of falling power, and its power per ring."""
    noise = torch.randn(n, size, size, generator=torch.Generator().manual_seed(seed))
    shells = torch.arange(size // 2 + 1)
    power = 1 / (1 + (shells / 8.0) ** 2) + 0.2
    return filter_shells(noise, power.sqrt()), power


def test_the_noise_spectrum_of_the_background_is_found() -> None:
    images, power = coloured(300, 64)
    images[:, 20:44, 20:44] += 3.0  # a particle in the middle says nothing about it
    found = noise_spectrum(images, 20.0)
    ratio = found[2:30] / power[2:30]
    assert float(ratio.min()) > 0.8
    assert float(ratio.max()) < 1.2
    with pytest.raises(ValueError, match="no background"):
        noise_spectrum(images, 60.0)


@pytest.mark.parametrize("size", [64, 51])
def test_observations_are_whitened_and_multiplied_by_the_ctf(size: int) -> None:
    noise, _ = coloured(200, size, 1)
    optics = some_optics(200, pixel_size=4.0)
    seen = observe(lambda rows: noise[rows], 200, size, optics, 10, 0.3 * size, 2.0)
    assert seen.polar.shape == (200, 10, seen.rings.n_angles // 2)
    spectrum = noise_spectrum(noise, 0.3 * size + 4)
    k = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]) * size
    index = k.round().long()
    power = ctf_2d(optics, size).square() / spectrum[index]
    for ring in (1, 5, 10):
        torch.testing.assert_close(
            seen.weight[:, ring - 1], power[:, index == ring].mean(1), rtol=1e-4, atol=1e-5
        )
    # By hand for one particle, without the mask's and the crop's shortcuts.
    filtered = torch.fft.rfft2(torch.fft.ifftshift(noise[:1], dim=(-2, -1)))
    filtered = filtered * ctf_2d(optics[:1], size) / spectrum[index]
    image = torch.fft.fftshift(torch.fft.irfft2(filtered, s=(size, size)), dim=(-2, -1))
    whole = half_circle(image, seen.rings)
    correlation = (whole[0].conj() * seen.polar[0]).sum().abs() / (
        whole[0].norm() * seen.polar[0].norm()
    )
    assert correlation > 0.6  # the mask has taken the corners' noise


@pytest.mark.parametrize("done", ["flipped", "multiplied"])
def test_the_likelihood_is_that_of_the_particles_as_they_were_recorded(done: str) -> None:
    """Flipping phases, or multiplying by the CTF, loses nothing that the likelihood uses."""
    size, n = 64, 400
    noise, _ = coloured(n, size, 2)
    optics = some_optics(n, pixel_size=4.0)
    transfer = ctf_2d(optics, size)
    factor = {"flipped": transfer.sign(), "multiplied": transfer}[done]
    changed = torch.fft.irfft2(torch.fft.rfft2(noise) * factor, s=(size, size))
    known = replace(
        optics,
        phase_flipped=torch.full((n,), done == "flipped"),
        premultiplied=torch.full((n,), done == "multiplied"),
    )
    one, two = (
        observe(images.__getitem__, n, size, own, 12, 0.3 * size, 2.0)
        for images, own in ((noise, optics), (changed, known))
    )
    for ring in range(2, 12):  # the noise is measured on other images, to a few per cent
        assert float((two.weight[:, ring] / one.weight[:, ring]).mean()) == pytest.approx(
            1, abs=0.1
        )
        gain = (one.polar[:, ring].conj() * two.polar[:, ring]).real.sum()
        assert float(gain / one.polar[:, ring].abs().square().sum()) == pytest.approx(1, abs=0.1)


def test_particles_without_room_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, _ = coloured(30, 64, 2)
    optics = some_optics(30, pixel_size=4.0)
    observe = module.observer(lambda rows: noise[rows], 30, 64, optics, 10, 20.0, 2.0)
    rows = torch.arange(3, 28)
    all_of_them = observe(rows)
    assert len(all_of_them.polar) == len(all_of_them) == 25
    bytes_each = 8 * (all_of_them.polar[0].numel() + 10)
    monkeypatch.setattr(module, "KEPT_SHARE", 0.5)
    monkeypatch.setattr(module, "available_memory", lambda _: 2 * 11 * bytes_each)
    some = observe(rows)
    assert len(some.polar) == 11
    assert len(some) == 25
    for index in ([20, 2, 24, 10, 11, 0], [13, 12], [4, 3]):
        for one, other in zip(
            some.take(torch.tensor(index)), all_of_them.take(torch.tensor(index)), strict=True
        ):
            assert torch.equal(one, other)
