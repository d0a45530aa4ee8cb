"""Reference-free alignment against known poses; its schedule, step by step."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from cryoalign.images.geometry import transform, translate
from cryoalign.methods.rfa import align_reference_free
from cryoalign.methods.state import State
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.pose import Pose, compose, wrap_degrees
from cryoalign.results.averages import Averaging
from cryoalign.search.settings import Schedule, SearchSettings

SCHEDULE = Schedule(max_shift=(3.0, 1.0), shift_step=(1.0, 0.5))


@pytest.fixture(scope="module")
def data() -> Simulation:
    return simulate(n=100, n_classes=1, size=48, snr=0.1, max_shift=3.0, seed=2)


def errors(truth: Pose, found: Pose) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the hand, and how far angle and shift are off, but for one pose common to all."""
    gauge = compose(truth.inverse(), found)  # view -> average
    same = gauge.mirror == gauge.mirror.double().median().bool()
    turn = torch.deg2rad(gauge.angle[same])
    middle = torch.rad2deg(torch.atan2(turn.sin().median(), turn.cos().median()))
    place = (gauge.linear() @ gauge.shift.unsqueeze(-1)).squeeze(-1)[same]
    away = (place - place.median(0)[0]).norm(dim=1)
    return same, wrap_degrees(gauge.angle[same] - middle).abs(), away


@pytest.mark.parametrize("mode", ["adaptive", "exhaustive"])
def test_poses_are_found_from_nothing(data: Simulation, mode: str) -> None:
    found = align_reference_free(data.images, schedule=SCHEDULE, search=SearchSettings(mode=mode))
    hand, angle, shift = errors(data.pose, found.pose)
    assert hand.all()
    assert angle.median() < 1.5
    assert (angle < 10).all()
    assert shift.median() < 0.4
    assert found.class_sizes.tolist() == [100]
    table = found.history
    # Every step was run, the first until its poses rested.
    assert table["step"].unique().tolist() == [1, 2]
    ends = table.groupby("step").tail(1)
    assert (ends["pose_change_px"] <= SCHEDULE.settle).all()
    assert table["pose_change_px"].iloc[1] > SCHEDULE.settle
    assert math.isnan(table["hand_changed"].iloc[0])
    assert table["resolution"].iloc[-1] == pytest.approx(float(found.resolution[0]))


def test_every_step_is_run_with_its_own_shifts() -> None:
    """A narrow step searches about what a wide one found."""
    data = simulate(n=60, n_classes=1, size=48, snr=0.5, max_shift=4.0, seed=3)
    search = SearchSettings(mode="exhaustive", refine=False)
    averaging = Averaging(centre="none")

    def run(reach: tuple[float, ...], step: tuple[float, ...]) -> pd.DataFrame:
        states: list[State] = []
        align_reference_free(
            data.images, data.views, schedule=Schedule(max_shift=reach, shift_step=step, settle=0),
            iterations=2, particle=Particle(radius="16 px"), search=search, averaging=averaging,
            on_step=states.append,
        )  # fmt: skip
        table = states[-1].history
        assert [row["step"] for row in table] == [1 + i // 2 for i in range(2 * len(reach))]
        assert [row["max_shift"] for row in table] == [r for r in reach for _ in range(2)]
        assert [row["shift_step"] for row in table] == [s for s in step for _ in range(2)]
        steps = [states[2 * i + 1].pose.shift for i in range(len(reach))]
        for shift, size in zip(steps, step, strict=True):
            grid = min(size, 1.0)  # about own shifts, which are whole
            assert torch.equal(shift / grid, (shift / grid).round())
        return pd.DataFrame(
            {i: (s - data.pose.shift).norm(dim=1).numpy() for i, s in enumerate(steps)}
        )

    fine = run((4.0, 1.0, 0.5), (2.0, 1.0, 0.25))
    assert fine[1].median() < 0.5
    assert fine[2].median() < 0.25
    assert (fine[2] < 1).mean() > 0.95
    assert data.pose.shift.abs().max() > 3.5  # far beyond the reach of the last two steps


def test_kicks_try_a_few_angles_only(data: Simulation) -> None:
    states: list[State] = []
    schedule = Schedule(
        max_shift=(3.0, 1.0), shift_step=(1.0, 1.0), settle=0, kicks=2, kick_every=2, kick_angle=60
    )
    align_reference_free(
        data.images, schedule=schedule, iterations=5, averaging=Averaging(centre="none"),
        on_step=states.append,
    )  # fmt: skip
    kicked = [row["kicked"] for row in states[-1].history]
    assert kicked == [False, True, False, True, *[False] * 6]
    turns = states[1].pose.angle / 60
    assert torch.allclose(turns, turns.round(), atol=1e-5)
    assert len(turns.round().remainder(6).unique()) == 6
    assert states[1].pose.mirror.double().mean() not in (0, 1)
    assert torch.equal(states[1].pose.shift, states[0].pose.shift)
    # What a kick chose is the best of what it tried, judged by hand.
    hand, angle, _ = errors(data.pose, states[-1].pose)
    assert hand.all()
    assert (angle < 10).all()


def test_starts_are_judged_by_their_scores(data: Simulation) -> None:
    told: list[State] = []
    best = align_reference_free(
        data.images, schedule=Schedule(max_shift=(3.0, 1.0), shift_step=(1.0, 1.0), starts=3),
        iterations=2, on_step=told.append,
    )  # fmt: skip
    single = [
        align_reference_free(
            data.images, schedule=Schedule(max_shift=(3.0,), shift_step=(1.0,), starts=starts),
            iterations=2,
        )
        for starts in (1, 3)
    ]  # fmt: skip
    assert single[1].score.mean() >= single[0].score.mean()
    assert [state.iteration for state in told] == [2, 3, 4]
    assert told[0]["score"].mean() == pytest.approx(float(single[1].score.mean()))
    assert len(best.history) == 4


def test_no_mirror(data: Simulation) -> None:
    schedule = Schedule(
        max_shift=(2.0, 1.0), shift_step=(1.0, 1.0), kicks=1, kick_every=2, starts=2
    )
    found = align_reference_free(
        data.images[:40], schedule=schedule, iterations=3, particle=Particle(mirror=False)
    )
    assert not found.pose.mirror.any()
    assert (found.history["hand_changed"].dropna() == 0).all()


def test_resumed_is_uninterrupted(data: Simulation, tmp_path) -> None:
    def run(**more):
        return align_reference_free(
            data.images, schedule=Schedule(max_shift=(3.0, 1.0), shift_step=(1.0, 0.5), kicks=1),
            iterations=6, **more,
        )  # fmt: skip

    whole = run(on_step=lambda state: state.save(tmp_path / f"{state.iteration}.npz"))
    for iteration in (3, len(whole.history)):
        again = run(resume=State.load(tmp_path / f"{iteration}.npz"))
        pd.testing.assert_frame_equal(whole.to_frame(), again.to_frame(), check_exact=True)
        assert torch.equal(whole.averages, again.averages)
        drop = whole.history.drop(columns="seconds")
        pd.testing.assert_frame_equal(drop, again.history.drop(columns="seconds"))
    third = State.load(tmp_path / "3.npz")
    with pytest.raises(ValueError, match="other particles"):
        align_reference_free(-data.images, schedule=SCHEDULE, resume=third)


def test_the_averages_poses_make_are_the_result(data: Simulation) -> None:
    found = align_reference_free(data.images, data.views, schedule=SCHEDULE)
    again = transform(data.images, found.pose).mean(0)
    assert np.corrcoef(again.flatten(), found.averages[0].flatten())[0, 1] > 0.999


def test_translate_moves_whole_pixels_and_brings_in_zeros() -> None:
    image = torch.arange(1.0, 13.0).reshape(1, 3, 4)
    moved = translate(image.repeat(3, 1, 1), torch.tensor([[1.0, 0.0], [0.0, -1.0], [9.0, 9.0]]))
    assert moved[0, 0].tolist() == [0, 1, 2, 3]
    assert moved[1, :2].tolist() == image[0, 1:].tolist()
    assert not moved[1, 2].any()
    assert not moved[2].any()
    still = Pose(torch.zeros(1), torch.tensor([[1.0, 2.0]]), torch.zeros(1, dtype=torch.bool))
    torch.testing.assert_close(translate(image, still.shift), transform(image, still))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"references": torch.ones(2, 48, 48)}, "takes one template"),
        ({"references": torch.ones(1, 40, 40)}, "do not fit"),
        ({"iterations": 0}, "iterations"),
        ({"particle": Particle(radius="22 px")}, "last_ring 22"),
    ],
)
def test_bad_input_is_refused_first(data: Simulation, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        align_reference_free(data.images, **{"schedule": SCHEDULE, **kwargs})


@pytest.mark.parametrize(
    ("reach", "step", "message"),
    [
        ((4.0, 2.0), (1.0,), "has 2 steps"),
        ((), (), "has 0 steps"),
        ((4.0,), (0.0,), "above 0"),
        ((-1.0,), (1.0,), "0 or more"),
        ((1.0,), (2.0,), "no shift would be tried"),
    ],
)
def test_a_schedule_that_says_nothing_is_refused(reach, step, message) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(max_shift=reach, shift_step=step)
