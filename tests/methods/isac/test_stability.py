"""Stability of alignments, against loops of its formula and poses that are known."""

import math

import pytest
import torch

from cryoalign.methods.isac.stability import (
    common_frame,
    consistent_hands,
    core_members,
    match_classes,
    mean_pose,
    pixel_errors,
    reproducibility,
)
from cryoalign.pose import Pose, compose
from cryoalign.results.averages import displacement

RADIUS, THRESHOLD, RUNS, N, K = 29.0, 0.7, 5, 60, 2


def random_pose(generator: torch.Generator, *shape: int, reach: float = 3.0) -> Pose:
    angle = torch.rand(*shape, generator=generator, dtype=torch.float64) * 360 - 180
    shift = (torch.rand(*shape, 2, generator=generator, dtype=torch.float64) - 0.5) * 2 * reach
    return Pose(angle, shift, torch.rand(*shape, generator=generator) < 0.5)


def jittered_runs() -> tuple[Pose, Pose, torch.Tensor]:
    """Runs (l, n) that differ by a little, the same turned, moved and mirrored as a whole, class by
    class, and the classes; the last three particles are anywhere in every run."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(N) % K
    true = random_pose(generator, N)
    noise = torch.randn(3, RUNS, N, generator=generator, dtype=torch.float64) * 0.3
    still = Pose(noise[0], torch.stack([noise[1], noise[2]], -1), torch.zeros(RUNS, N).bool())
    runs = compose(Pose(true.angle.expand(RUNS, N), true.shift.expand(RUNS, N, 2),
                        true.mirror.expand(RUNS, N)), still)  # fmt: skip
    lost = random_pose(generator, RUNS, 3)
    runs = Pose(
        torch.cat([runs.angle[:, :-3], lost.angle], 1),
        torch.cat([runs.shift[:, :-3], lost.shift], 1),
        torch.cat([runs.mirror[:, :-3], lost.mirror], 1),
    )
    frames = random_pose(generator, RUNS, K)[:, label]
    return runs, compose(runs, frames), label


def formula(runs: Pose, i: int) -> float:
    """The pixel error of particle i as METHODS of ISAC has it, number by number."""
    if len({bool(m) for m in runs.mirror[:, i]}) > 1:
        return math.inf
    angles = [math.radians(float(a)) for a in runs.angle[:, i]]
    count = len(angles)
    length = math.hypot(sum(map(math.cos, angles)), sum(map(math.sin, angles)))
    error = (2 * RADIUS) ** 2 / 4 * (1 - length / count)
    places = displacement(runs)[:, i].tolist()
    for axis in (0, 1):
        mean = sum(p[axis] for p in places) / count
        error += sum((p[axis] - mean) ** 2 for p in places) / count
    return math.sqrt(error)


def test_pixel_error_is_the_formula() -> None:
    runs, _, _ = jittered_runs()
    error = pixel_errors(runs, RADIUS)
    for i in range(N):
        assert float(error[i]) == pytest.approx(formula(runs, i), rel=1e-9), i


def test_frames_of_runs_do_not_matter_and_lost_particles_are_told() -> None:
    runs, elsewhere, label = jittered_runs()
    found = common_frame(elsewhere, label, K, RADIUS, THRESHOLD)
    error, true = pixel_errors(found, RADIUS), pixel_errors(runs, RADIUS)
    # The frame is fitted to the runs: errors are a little below those of the truth.
    torch.testing.assert_close(error[:-3], true[:-3], rtol=0.2, atol=0.1)
    assert float(error[:-3].mean()) <= float(true[:-3].mean()) + 1e-3
    assert (error[-3:] > 5).all()
    assert not consistent_hands(found)[-3:].all()
    middle = mean_pose(found)
    off = Pose(found.angle - middle.angle, found.shift - middle.shift, found.mirror)
    turn = torch.remainder(off.angle[:, :-3] + 180, 360) - 180
    assert float(turn.abs().max()) < 2
    assert float(off.shift[:, :-3].abs().max()) < 2


def test_one_run_of_outliers_does_not_carry_the_frame_away() -> None:
    """A third of the particles anywhere: the others' errors stay what they are."""
    runs, elsewhere, label = jittered_runs()
    lost = random_pose(torch.Generator().manual_seed(1), RUNS, N)
    third = torch.arange(N) % 3 == 0
    mixed = Pose(
        torch.where(third, lost.angle, elsewhere.angle),
        torch.where(third[:, None], lost.shift, elsewhere.shift),
        torch.where(third, lost.mirror, elsewhere.mirror),
    )
    error = pixel_errors(common_frame(mixed, label, K, RADIUS, THRESHOLD), RADIUS)
    good = ~third
    good[-3:] = False
    torch.testing.assert_close(error[good], pixel_errors(runs, RADIUS)[good], rtol=0.3, atol=0.15)
    assert (error[third] > 3).all()


def test_classes_are_matched_whatever_their_numbers() -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(0, 7, (400,), generator=generator)
    new = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(6, generator=generator) + 1])
    b = new[a]
    table = match_classes(a, b)
    assert dict(zip(table["class_a"], table["class_b"], strict=True)) == {
        c: int(new[c]) for c in range(1, 7)
    }
    assert (table["jaccard"] == 1).all()
    assert reproducibility(a, b) == 1
    b[:100] = torch.randint(0, 7, (100,), generator=generator)
    table = match_classes(a, b)
    row = table[table["class_a"] == 3].iloc[0]
    both = int(((a == 3) & (b == int(new[3]))).sum())
    assert row["class_b"] == int(new[3])
    assert row["common"] == both
    assert row["jaccard"] == both / int(((a == 3) | (b == int(new[3]))).sum())
    assert 0.7 < reproducibility(a, b) < 0.95


def test_what_scores_far_below_its_class_is_not_of_its_core() -> None:
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(200) % 2
    score = 0.2 + 0.3 * label + 0.02 * torch.randn(200, generator=generator)
    score[:30] = 0.1 + 0.3 * label[:30]
    members = torch.ones(200, dtype=torch.bool)
    members[190:] = False
    kept = core_members(score, label, members, 3.5)
    assert not kept[:30].any()
    assert kept[30:190].all()
    assert not kept[190:].any()


def test_other_particles_are_refused_and_nothing_is_reproduced_of_nothing() -> None:
    with pytest.raises(ValueError, match="not of the same particles"):
        match_classes(torch.ones(3).long(), torch.ones(4).long())
    assert math.isnan(reproducibility(torch.zeros(3).long(), torch.zeros(3).long()))
