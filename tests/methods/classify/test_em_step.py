import math

import pytest
import torch

from cryoalign.methods.classify import em_step as expectation
from cryoalign.methods.classify.em_step import (
    Features,
    class_power,
    expect,
    extend,
    features,
    maximise,
)
from cryoalign.methods.classify.fourier_rings import FourierRings

SHIFTS = torch.cartesian_prod(torch.tensor([-2.0, 0.0, 2.0]), torch.tensor([-2.0, 0.0, 2.0]))


def made_up(n: int = 12, k: int = 3, seed: int = 0) -> tuple[Features, torch.Tensor]:
    """Random particles and class images."""
    generator = torch.Generator().manual_seed(seed)
    rings = FourierRings(40, 5, 16.0)
    half = torch.randn(2, n + k, 5, 24, generator=generator)
    polar = torch.complex(half[0], half[1])
    weight = 0.5 + torch.rand(n + k, 5, generator=generator)
    data = features(polar, weight, torch.zeros(n + k, 2), SHIFTS, rings)
    classes = 20 * data.spectra[n:, 4].contiguous()
    data = data.take(torch.arange(n))
    return Features(20 * data.rows, data.weight, data.shifts, data.rings), classes


def logits(data: Features, classes: torch.Tensor, mirror: bool) -> torch.Tensor:
    """(n, k, s, h, a) the formula, without blocks."""
    x = data.spectra
    hands = [torch.einsum("nsrm,krm->nksm", x.conj(), classes)]
    if mirror:
        sign = 1 - 2 * (torch.arange(x.shape[-1]) % 2)
        hands.append(sign * torch.einsum("nsrm,krm->nksm", x.conj(), classes.conj()))
    table = torch.fft.irfft(torch.stack(hands, 3), n=data.rings.n_angles)
    penalty = data.weight @ class_power(classes, data.rings).T / 2
    return table - penalty[:, :, None, None, None]


@pytest.mark.parametrize("mirror", [False, True])
def test_posterior_is_the_tables(mirror: bool) -> None:
    data, classes = made_up()
    table = logits(data, classes, mirror)
    found, _ = expect(data, classes, mirror=mirror)
    evidence = table.flatten(1).logsumexp(1)
    torch.testing.assert_close(found.log_evidence, evidence, rtol=1e-4, atol=1e-3)
    share = (table.flatten(2).logsumexp(2) - evidence[:, None]).exp()
    torch.testing.assert_close(found.share, share, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(found.best, table.flatten(2).amax(2), rtol=1e-4, atol=1e-3)
    hands, angles = 1 + mirror, data.rings.n_angles
    place = (found.shift * hands + found.hand) * angles + found.angle
    here = table.flatten(2).gather(2, place[..., None]).squeeze(2)
    torch.testing.assert_close(here, found.best, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mirror", [False, True])
def test_sums_are_the_gradient_of_the_evidence(mirror: bool) -> None:
    data, classes = made_up()
    classes.requires_grad_(True)
    logits(data, classes, mirror).flatten(1).logsumexp(1).sum().backward()
    _, sums = expect(data, classes.detach(), mirror=mirror)
    residual = sums.signal.sum(0) - sums.weight.sum(0)[..., None] * classes.detach()
    twice = torch.full((classes.shape[-1],), 2.0)
    twice[0] = 1.0
    exact = residual * twice / data.rings.n_angles
    assert classes.grad is not None
    torch.testing.assert_close(exact, classes.grad, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
    torch.testing.assert_close(sums.size.sum(), torch.tensor(12.0))


def test_blocks_and_members_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data, classes = made_up()
    whole, sums = expect(data, classes, mirror=True)
    monkeypatch.setitem(expectation.BLOCK, "cpu", 1)
    again, sums_again = expect(data, classes, mirror=True)
    for one, other in zip((*whole, *sums), (*again, *sums_again), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    some = torch.tensor([7, 2, 9])
    part, _ = expect(data.take(some), classes, half=torch.tensor([1, 1, 1]), mirror=True)
    torch.testing.assert_close(part.best, whole.best[some], rtol=1e-4, atol=1e-3)
    assert torch.equal(part.angle, whole.angle[some])


def test_extended_classes_score_alike() -> None:
    _, classes = made_up()
    old, new = FourierRings(40, 5, 16.0), FourierRings(40, 9, 16.0)
    longer = extend(classes, old, new)
    torch.testing.assert_close(
        class_power(longer, new)[:, :5], class_power(classes, old), rtol=1e-5, atol=0
    )
    with pytest.raises(ValueError, match="do not fit"):
        expect(made_up()[0], longer)


def test_noise_makes_no_class_image() -> None:
    """Where the half-sets do not agree there is no image; where they do, there is."""
    rings, n = FourierRings(40, 5, 16.0), 400
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(2, n, 5, 24, generator=generator)
    noise = torch.complex(half[0], half[1])
    signal = noise[:1] * torch.tensor([2.0, 2, 0, 0, 0])[:, None]
    data = features(signal + noise, torch.ones(n, 5), torch.zeros(n, 2), torch.zeros(1, 2), rings)
    x = data.spectra[:, 0]  # (n, r, m)
    sums = expectation.Sums(
        torch.stack([x[::2].sum(0), x[1::2].sum(0)])[:, None],
        torch.full((2, 1, 5), n / 2),
        torch.full((2, 1), n / 2),
    )
    image = maximise(sums, rings)[0]
    power, plain = image.abs().square().sum(1), x.mean(0).abs().square().sum(1)
    assert power[0] > 0.9 * plain[0]
    # Some thirty components: their FRC is within 0.4 of zero by chance.
    assert power[4] < 0.5 * plain[4]
    assert math.isfinite(float(power.sum()))
