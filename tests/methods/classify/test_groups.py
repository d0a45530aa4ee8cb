"""E-steps of groups together are those of each group alone."""

import pytest
import torch

from cryoalign.methods.classify import groups as module
from cryoalign.methods.classify import resolution_level as levels
from cryoalign.methods.classify.em_step import Sums, expect
from cryoalign.methods.classify.fourier_rings import FourierRings, half_circle
from cryoalign.methods.classify.groups import Groups, tiles_of
from cryoalign.methods.classify.resolution_level import ResolutionLevel
from cryoalign.methods.classify.whitening import Observations
from cryoalign.search.settings import shift_grid

RINGS = FourierRings(40, 5, 16.0)
MEMBERS = [torch.arange(0, 11), torch.tensor([30, 12, 39]), torch.arange(13, 30)]


def level_on(device: str, mirror: bool) -> ResolutionLevel:
    generator = torch.Generator().manual_seed(0)
    polar = half_circle(torch.randn(40, 40, 40, generator=generator), RINGS)
    weight = 0.5 + torch.rand(40, 5, generator=generator)
    seen = Observations(polar.to(device), weight.to(device), RINGS)
    return ResolutionLevel(seen, 0, torch.zeros(40, 2), shift_grid(2, 2, device), RINGS, mirror)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("signal", [0.2, 3.0])  # most poses have weight; few have
def test_groups_have_the_sums_of_their_members_alone(
    mirror: bool, device: str, signal: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    # Three parts, and several batches of tiles in a part.
    monkeypatch.setattr(levels, "length_of", lambda n, device: 16)
    monkeypatch.setitem(module.CHUNK, device, 8)
    monkeypatch.setitem(module.WIDTH, device, 4)
    level, plain = level_on(device, mirror), level_on("cpu", mirror)
    seeds = [torch.tensor([2, 5]), torch.tensor([12]), torch.tensor([14, 20, 25])]
    classes = [signal * plain.single_particles(each, torch.ones(5)) for each in seeds]
    together = Groups(level, MEMBERS).expect([each.to(device) for each in classes])
    together = Sums(*(each.cpu() for each in together))
    start = 0
    for members, own in zip(MEMBERS, classes, strict=True):
        half = torch.arange(len(members)) % 2
        _, alone = expect(plain.of(members), own, half=half, mirror=mirror)
        part = slice(start, start + len(own))
        for one, other in zip(together, alone, strict=True):
            scale = float(other.abs().max())
            torch.testing.assert_close(one[:, part], other, rtol=1e-4, atol=1e-4 * scale)
        start += len(own)
    assert together.size.shape == (2, 6)
    assert float(together.size.sum()) == pytest.approx(sum(map(len, MEMBERS)), rel=1e-4)


def test_tiles_hold_every_particle_once() -> None:
    generator = torch.Generator().manual_seed(1)
    group, half = torch.randint(5, (50,), generator=generator), torch.arange(50) % 2
    tiles = tiles_of(group, half, 4)
    assert sorted(tiles.members[tiles.here].tolist()) == list(range(50))
    assert (group[tiles.members] == tiles.group[:, None]).all()
    assert (half[tiles.members] == tiles.half[:, None]).all()
    assert tiles.here[:, 0].all()
    again = tiles.split(3)
    assert torch.equal(torch.cat([each.members for each in again]), tiles.members)
