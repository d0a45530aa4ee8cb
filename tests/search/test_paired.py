import torch

from cryoalign.images.polar import Rings, ring_spectra
from cryoalign.operators.correlation import correlation_table
from cryoalign.particles.simulate import simulate
from cryoalign.pose import pixel_error
from cryoalign.search.paired import best_pairs, pair_table
from cryoalign.search.settings import Search


def test_scores_are_the_tables() -> None:
    generator = torch.Generator().manual_seed(0)
    images, references = torch.randn(2, 3, 15, 15, generator=generator, dtype=torch.float64)
    images[1] = 2.0  # flat: its scores are 0
    shifts = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    rings = Rings(1, 4, angles=16)
    hand = torch.tensor([[False, True], [True, False], [True, True]])
    table = correlation_table(
        ring_spectra(images, rings, shifts), ring_spectra(references, rings)[:, 0]
    )
    expected = torch.stack([table[i, i][:, row.long()] for i, row in enumerate(hand)])
    got = pair_table(images, references, hand, shifts, rings)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_true_poses_are_found_whatever_the_chunk(monkeypatch) -> None:
    made = simulate(40, 4, size=48, snr=1.0, max_shift=2.0, seed=1)
    own = made.views[made.class_number - 1]
    search = Search(max_shift=2, last_ring=18)
    pose, score = best_pairs(made.images, own, search)
    assert pixel_error(pose, made.pose.to(torch.float32), 18).median() < 0.15
    monkeypatch.setattr("cryoalign.search.paired.CPU_CHUNK", 1)
    again, same = best_pairs(made.images, own, search)
    assert torch.equal(again.mirror, pose.mirror)
    torch.testing.assert_close(same, score)
    torch.testing.assert_close(again.angle, pose.angle)
