import numpy as np
import pandas as pd
import pytest
import torch
from oracle import reference_number
from sklearn.metrics import adjusted_rand_score

from cryoalign.images.fourier import fourier_resize
from cryoalign.images.frc import ring_correlation
from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked, normalise, soft_mask
from cryoalign.io.formats import write_images
from cryoalign.methods.mra import align_multi_reference, split_largest
from cryoalign.methods.state import State
from cryoalign.particles.prepare import prepare
from cryoalign.particles.settings import Images, Particle
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.particles.stack import TensorStack
from cryoalign.pose import Pose, compose, wrap_degrees
from cryoalign.results.averages import Averaging, displacement
from cryoalign.search.settings import Search

PARTICLE = Particle(max_shift="2 px")


@pytest.fixture(scope="module")
def data() -> Simulation:
    return simulate(n=160, n_classes=4, size=40, snr=0.3, max_shift=1.5, seed=11)


def test_true_views_as_references(data: Simulation) -> None:
    found = align_multi_reference(data.images, data.views, iterations=1, particle=PARTICLE)
    assert torch.equal(reference_number(found), data.class_number)
    assert torch.equal(found.pose.mirror, data.pose.mirror)
    assert wrap_degrees(found.pose.angle - data.pose.angle).abs().median() < 0.7
    assert (found.pose.shift - data.pose.shift).norm(dim=-1).median() < 0.12
    sizes = torch.bincount(data.class_number)[found.class_quality["reference"].to_list()]
    assert found.class_sizes.tolist() == sizes.tolist()
    # The averages are what the poses say: recomputed from the table alone.
    for k in range(4):
        members = (found.class_number == k + 1).nonzero().squeeze(1)
        again = transform(data.images[members], found.pose[members]).mean(0)
        correlation = np.corrcoef(again.flatten(), found.averages[k].flatten())[0, 1]
        assert correlation > 0.999


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blind_finds_the_views(data: Simulation, seed: int) -> None:
    """Whatever particles it starts from, where classes below half of the mean are re-seeded: of
    seeds 0 to 15 each ends with an index of 0.98 or more."""
    found = align_multi_reference(
        data.images, "random", n_classes=4, iterations=12, particle=PARTICLE, min_class_share=0.5,
        seed=seed,
    )  # fmt: skip
    agreement = adjusted_rand_score(data.class_number, found.class_number)
    assert agreement > 0.95
    assert (found.class_sizes > 0).all()
    # Poses agree with the truth up to one pose per class: that of its average on the view.
    gauge = compose(data.pose.inverse(), found.pose)  # view -> average
    for k in range(1, 5):
        own = gauge[found.class_number == k]
        hand = own.mirror.double().mean()
        assert hand in (0.0, 1.0) or min(hand, 1 - hand) < 0.06
        same = own[own.mirror == own.mirror.double().median().bool()]
        turn = torch.deg2rad(same.angle)
        centre = torch.rad2deg(torch.atan2(turn.sin().mean(), turn.cos().mean()))
        assert wrap_degrees(same.angle - centre).abs().median() < 2
    assert set(found.history.columns) >= {"iteration", "mean_score", "reassigned"}
    assert found.history["mean_score"].is_monotonic_increasing  # of seeds 0 to 9


def test_batch_size_changes_nothing(data: Simulation) -> None:
    def run(batch_size: int):
        prepared = prepare(data.images[:60], batch_size=batch_size)
        return align_multi_reference(
            prepared, "random", n_classes=3, iterations=2, particle=PARTICLE
        )

    one, other = run(64), run(7)
    threads = torch.get_num_threads()
    try:  # nor does the number of threads
        torch.set_num_threads(1 if threads > 1 else 2)
        again = run(64)
    finally:
        torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(one.to_frame(), again.to_frame(), check_exact=True)
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), check_exact=True)
    assert torch.equal(one.averages, other.averages)


def test_resumed_is_uninterrupted(data: Simulation, tmp_path) -> None:
    saved = []

    def keep(state: State) -> None:
        state.save(tmp_path / f"{state.iteration}.npz")
        saved.append(state.iteration)

    def run(**more):
        return align_multi_reference(
            data.images, "random", n_classes=4, iterations=4, settle=0, particle=PARTICLE, **more
        )

    whole = run(on_step=keep)
    again = run(resume=State.load(tmp_path / "2.npz"))
    pd.testing.assert_frame_equal(whole.to_frame(), again.to_frame(), check_exact=True)
    assert torch.equal(whole.averages, again.averages)
    exact = ["mean_score", "reassigned", "pose_change_px", "hand_changed"]
    pd.testing.assert_frame_equal(whole.history[exact], again.history[exact], check_exact=True)
    with pytest.raises(ValueError, match="other particles"):
        align_multi_reference(
            -data.images, n_classes=4, particle=PARTICLE, resume=State.load(tmp_path / "2.npz")
        )
    last = run(resume=State.load(tmp_path / f"{saved[-1]}.npz"))  # nothing left to do
    assert torch.equal(whole.averages, last.averages)
    (tmp_path / "bad.npz").write_bytes((tmp_path / "2.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"bad\.npz"):
        State.load(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="checkpoint is of 160 other"):
        align_multi_reference(data.images[:100], n_classes=4, resume=State.load(tmp_path / "2.npz"))


def test_unusable_particles_are_set_aside(data: Simulation) -> None:
    images = data.images[:60].clone()
    images[3, 5, 5] = torch.nan
    images[7] = 2.5
    images[9, 0, 0] = torch.inf
    found = align_multi_reference(images, data.views, iterations=1, particle=PARTICLE)
    assert found.rejected["index"].tolist() == [3, 7, 9]
    frame = found.to_frame()
    assert frame.loc[[3, 7, 9], "class_number"].tolist() == [0, 0, 0]
    assert frame.loc[[3, 7, 9], ["angle", "shift_x", "score"]].isna().all(axis=None)
    assert int(found.class_sizes.sum()) == 57
    alone = align_multi_reference(data.images[:60], data.views, iterations=1, particle=PARTICLE)
    # All but what is judged by averages that these three are now missing from.
    kept, others = (
        each.to_frame().assign(class_number=reference_number(each).numpy()).drop([3, 7, 9])
        for each in (found, alone)
    )
    kept, others = kept.loc[:, :"score"], others.loc[:, :"score"]
    pd.testing.assert_frame_equal(kept, others, check_exact=True)
    with pytest.raises(ValueError, match="max_rejected"):
        prepare(images, max_rejected=0.01)


def test_given_references_of_rare_views_keep_their_particles() -> None:
    data = simulate(n=400, n_classes=5, size=40, snr=0.3, max_shift=1.5, seed=3)
    members = [(data.class_number == k + 1).nonzero().squeeze(1) for k in range(5)]
    rows = torch.cat([members[0], members[1], members[2][:3], members[3][:4], members[4][:5]])
    found = align_multi_reference(
        data.images[rows], data.views, iterations=6, particle=PARTICLE, settle=0
    )
    assert torch.equal(reference_number(found), data.class_number[rows])


def test_more_classes_than_views_and_empty_classes(data: Simulation) -> None:
    found = align_multi_reference(
        data.images[:40], "random", n_classes=12, iterations=3, particle=PARTICLE, settle=0
    )
    assert int(found.class_sizes.sum()) == 40
    # Two references alike: one of them stays empty when nothing is split.
    twins = torch.cat([data.views, data.views[:1]])
    found = align_multi_reference(
        data.images, twins, iterations=1, particle=PARTICLE, min_class_share=0
    )
    assert found.class_quality["reference"].iloc[4] == 5
    assert found.class_sizes[4] == 0
    assert torch.equal(found.averages[4], torch.zeros(40, 40))
    assert torch.isinf(found.resolution[4])
    assert torch.isfinite(found.filtered_averages()).all()


def test_split_largest() -> None:
    label = torch.tensor([0] * 10 + [1] * 5 + [2])
    score = torch.arange(16.0)
    new, count = split_largest(label, score, 4, least=2)
    assert count == 2
    # The empty class gets the worse half of the largest, then the one with a single member
    # half of what is then the largest.
    assert new.tolist() == [3] * 5 + [2] * 2 + [0] * 3 + [1] * 5 + [2]
    assert len(new) == 16
    assert label.tolist() == [0] * 10 + [1] * 5 + [2]
    same, none = split_largest(label, score, 3, least=0)
    assert none == 0
    assert torch.equal(same, label)


def test_down_sampled_poses_are_in_input_pixels() -> None:
    data = simulate(n=60, n_classes=2, size=64, snr=1.0, max_shift=3.0, seed=5)
    found = align_multi_reference(
        data.images, data.views, iterations=1, particle=PARTICLE, images=Images(box=32)
    )
    assert found.averages.shape == (2, 32, 32)
    assert found.scale == 2
    assert torch.equal(reference_number(found), data.class_number)
    assert (found.pose.shift - data.pose.shift).norm(dim=-1).median() < 0.15


def test_references_from_a_file(data: Simulation, tmp_path) -> None:
    write_images(tmp_path / "views.mrcs", data.views, None)
    found = align_multi_reference(
        data.images[:20], tmp_path / "views.mrcs", iterations=1, particle=PARTICLE
    )
    assert torch.equal(reference_number(found), data.class_number[:20])


def test_centring_moves_references_and_their_members_poses_alike(data: Simulation) -> None:
    """Off-centre references come to the middle, and the poses still make those very averages."""
    away = Pose.identity(len(data.views))
    away = Pose(away.angle, away.shift + torch.tensor([2.0, -1.0]), away.mirror)
    off = transform(data.views, away)
    states: list[State] = []
    align_multi_reference(
        data.images, off, iterations=2, settle=0, particle=Particle(max_shift="4 px"), seed=0,
        averaging=Averaging(filter="none", centre="members"), min_class_share=0,
        on_step=states.append,
    )  # fmt: skip
    first = states[0]
    expected = torch.stack(
        [
            transform(normalise(data.images, 20), first.pose)[first["label"] == k].mean(0)
            for k in range(4)
        ]
    )
    mask = soft_mask(40, Search(max_shift=4).rings(40).last_ring)
    for found, again in zip(first["references"], masked(expected, mask), strict=True):
        assert np.corrcoef(found.flatten(), again.flatten())[0, 1] > 0.98
    for k in range(4):  # the boxes' centres lie about the middle of their average
        assert displacement(first.pose[first["label"] == k]).mean(0).norm() < 0.05
    uncentred: list[State] = []
    align_multi_reference(
        data.images, off, iterations=2, settle=0, particle=Particle(max_shift="4 px"),
        averaging=Averaging(centre="none"), on_step=uncentred.append,
    )  # fmt: skip
    pose, label = uncentred[0].pose, uncentred[0]["label"]
    assert all(displacement(pose[label == k]).mean(0).norm() > 1.5 for k in range(4))


def test_half_sets_follow_the_rows_of_the_input(data: Simulation) -> None:
    """Setting a particle aside moves no other into the other half."""
    images = data.images[:80].clone()
    images[0] = torch.nan
    found = align_multi_reference(images, data.views, iterations=1, particle=PARTICLE)
    used = (found.class_number > 0).nonzero().squeeze(1)
    moved = transform(normalise(data.images[used], 20), found.pose[used])
    halves = torch.stack(
        [
            torch.stack(
                [
                    moved[(found.class_number[used] == k + 1) & (used % 2 == half)].mean(0)
                    for k in range(4)
                ]
            )
            for half in (0, 1)
        ]
    )
    mask = soft_mask(40, Search(max_shift=2).rings(40).last_ring)
    expected = ring_correlation(*(masked(half, mask) for half in halves))
    torch.testing.assert_close(found.frc, expected, atol=2e-3, rtol=0)


def test_a_class_that_dies_is_re_seeded(data: Simulation) -> None:
    twins = torch.cat([data.views, data.views[:1]])
    found = align_multi_reference(
        data.images, twins, iterations=3, settle=0, particle=PARTICLE, min_class_share=0.2
    )
    assert found.history["split_classes"].iloc[0] == 1
    assert (found.class_sizes > 0).all()


def test_reversed_contrast_is_told(data: Simulation) -> None:
    with pytest.warns(UserWarning, match="contrast"):
        align_multi_reference(-data.images[:30], data.views, iterations=1, particle=PARTICLE)


def test_references_of_another_pixel_size_are_refused(data: Simulation, tmp_path) -> None:
    stack = TensorStack(data.images[:20], pixel_size=3.0)
    write_images(tmp_path / "views.mrcs", data.views, 4.0)
    with pytest.raises(ValueError, match=r"4 Å per pixel.*3 Å"):
        align_multi_reference(stack, tmp_path / "views.mrcs", iterations=1, particle=PARTICLE)
    # Averages of a down-sampled run, in its own box and pixel size, are references again.
    write_images(tmp_path / "small.mrcs", fourier_resize(data.views, 32), 3.0 * 40 / 32)
    found = align_multi_reference(
        stack, tmp_path / "small.mrcs", iterations=1, images=Images(box=32), particle=PARTICLE
    )
    assert torch.equal(reference_number(found), data.class_number[:20])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"references": "random"}, "n_classes"),
        ({"references": "random", "n_classes": 161}, "n_classes"),
        ({"references": torch.zeros(2, 38, 38)}, "do not fit"),
        ({"references": torch.full((2, 40, 40), torch.nan)}, "NaN"),
        ({"references": torch.zeros(2, 40, 40), "n_classes": 3}, "n_classes is 3"),
        ({"references": "random", "n_classes": 2, "iterations": 0}, "iterations"),
        (
            {"references": "random", "n_classes": 2, "particle": Particle(radius="19 px")},
            "last_ring",
        ),
        ({"references": "random", "n_classes": 2, "device": "abacus"}, "abacus"),
    ],
)
def test_bad_input_is_refused_first(data: Simulation, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        align_multi_reference(data.images, **{"particle": PARTICLE, **kwargs})


def test_settings_that_would_be_ignored_are_refused() -> None:
    """Of particles prepared already, of names that no method has, of another checkpoint."""
    made = simulate(40, 2, size=32, snr=1.0, max_shift=1.0, seed=1)
    particles = prepare(made.images)
    for more in ({"images": Images(box=16)}, {"device": "cpu"}):
        with pytest.raises(ValueError, match="prepared already"):
            align_multi_reference(particles, n_classes=2, iterations=1, **more)
    with pytest.raises(TypeError, match="did you mean n_classes"):
        align_multi_reference(particles, n_clases=2)
    with pytest.raises(TypeError, match="give it to `prepare`"):
        align_multi_reference(particles, n_classes=2, batch_size=3)
    states: list[State] = []
    align_multi_reference(particles, n_classes=2, iterations=1, on_step=states.append)
    with pytest.raises(ValueError, match="checkpoint is of 2 classes, not 3"):
        align_multi_reference(particles, n_classes=3, iterations=2, resume=states[-1])
