"""What holds for every method: it goes on from any step, refuses what is not its own, and ends
with classes sorted by size, error bars and evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import ctf_average, some_optics

from bench.agreement import pose_errors
from cryoalign.app.schema import known_keys
from cryoalign.app.settings import RUN_KEYS, RunConfig, load_config
from cryoalign.images.ctf import Optics
from cryoalign.images.masks import normalise
from cryoalign.methods import METHODS
from cryoalign.methods.assignment import Assignment
from cryoalign.methods.base import Method, align
from cryoalign.methods.classify.classify import Classification
from cryoalign.methods.classify.settings import Likelihood
from cryoalign.methods.isac.isac import StableClassification
from cryoalign.methods.isac.settings import Isac
from cryoalign.methods.mra import MultiReference
from cryoalign.methods.rfa import ReferenceFree
from cryoalign.methods.state import State
from cryoalign.particles.prepare import PreparedParticles, prepare
from cryoalign.particles.settings import Box, Images, Particle
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.results.alignment import Alignment
from cryoalign.results.evidence import LEAST_EVIDENCE
from cryoalign.results.quality import Quality
from cryoalign.search.settings import Schedule

SIZE, WITHIN = 32, Particle(max_shift="2 px")
SEED = 1  # with it, classify and isac too have their classes in another order than by size
NAMES = ("mra", "rfa", "classify", "isac")


@cache
def data() -> tuple[Simulation, torch.Tensor]:
    """Three views of 15, 30 and 45 particles and 30 images of noise; a particle is NaN."""
    made = simulate(n=400, n_classes=3, size=SIZE, snr=0.5, max_shift=2.0, seed=5)
    rows = [(made.class_number == c + 1).nonzero().squeeze(1)[: 15 * (c + 1)] for c in range(3)]
    chosen = torch.cat(rows)[torch.randperm(90, generator=torch.Generator().manual_seed(1))]
    noise = torch.randn(30, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    images = torch.cat([made.images[chosen], noise * made.images.std()])
    images[4] = torch.nan
    part = Simulation(
        made.images[chosen], made.views, made.pose[chosen], made.class_number[chosen],
        made.pixel_size, made.sigma,
    )  # fmt: skip
    return part, images


def particles() -> PreparedParticles:
    """With CTFs."""
    return prepare(data()[1], optics=some_optics(120, pixel_size=4.0), device="cpu")


def method(name: str) -> Method:
    """Settings with which every method takes several steps."""
    made = {
        "mra": lambda: MultiReference(
            particle=WITHIN, references=data()[0].views, iterations=4, settle=0.0,
            assign=Assignment("soft", anneal_iterations=2),
        ),
        "rfa": lambda: ReferenceFree(
            particle=WITHIN, iterations=3,
            schedule=Schedule(
                max_shift=(2.0, 1.0), shift_step=(1.0, 0.5), settle=0.0, kicks=1, kick_every=2,
                starts=2,
            ),
        ),
        "classify": lambda: Classification(
            particle=WITHIN, seed=SEED, n_classes=3, likelihood=Likelihood(cycles=2, surplus=1.0),
        ),
        "isac": lambda: StableClassification(
            particle=WITHIN, isac=Isac(images_per_group=13, runs=3, passes=1, repeats=2),
        ),
    }  # fmt: skip
    return made[name]()


@dataclass
class Finished:
    """A whole run: what `align` gave, and every state on the way, the first one too."""

    result: Alignment
    states: list[State]
    told: list[State]


@cache
def finished(name: str) -> Finished:
    made, own, told = method(name), particles(), []
    result = align(made, own, on_step=told.append)
    start = method(name).start(particles().phase_flipped())
    return Finished(result, told if start.iteration else [start, *told], told)


def assert_same_state(one: State, other: State) -> None:
    """Everything that a file keeps, bit for bit; NaN is NaN."""
    for field in ("method", "fingerprint", "iteration", "done"):
        assert getattr(one, field) == getattr(other, field)
        assert type(getattr(one, field)) is type(getattr(other, field))
    assert list(one.tensors) == list(other.tensors)
    for key, tensor in one.tensors.items():
        assert other[key].dtype == tensor.dtype
        np.testing.assert_array_equal(other[key].numpy(), tensor.cpu().numpy(), err_msg=key)
    pd.testing.assert_frame_equal(
        pd.DataFrame(one.history), pd.DataFrame(other.history), check_exact=True
    )


def assert_same_result(one: Alignment, other: Alignment) -> None:
    """Bit for bit, but for the seconds that steps took."""
    pairs = [
        (one.to_frame(), other.to_frame()),
        (one.class_frame(), other.class_frame()),
        (one.rejected, other.rejected),
        (one.history.drop(columns="seconds"), other.history.drop(columns="seconds")),
        *zip(one.tables.values(), other.tables.values(), strict=True),
    ]
    for a, b in pairs:
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert one.figures == other.figures
    assert list(one.tables) == list(other.tables)
    assert torch.equal(one.averages, other.averages)
    assert torch.equal(one.frc, other.frc)


@pytest.mark.parametrize("name", NAMES)
def test_every_state_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    states = finished(name).states
    assert len(states) > 2
    for state in states:
        state.save(tmp_path / "state.npz")
        again = State.load(tmp_path / "state.npz")
        assert_same_state(state, again)
        assert not again.unsaved
        shift = "shrunk_shift" if name == "isac" else "shift"
        assert {"label", "angle", shift, "mirror"} <= set(again.tensors)
        assert len(again[shift]) == len(again["label"]) == 119


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_told_in_order_and_the_last_one_is_done(name: str) -> None:
    done, made = finished(name), method(name)
    numbers = [state.iteration for state in done.told]
    assert numbers == sorted(set(numbers))
    assert [made.is_done(state) for state in done.told] == [False] * (len(numbers) - 1) + [True]
    assert made.most_steps is None or numbers[-1] <= made.most_steps
    for state in done.told:
        assert state.iteration == len(state.history)
        assert made.line(state.history[-1])
    assert len(done.result.history) == numbers[-1]


@pytest.mark.parametrize("name", NAMES)
def test_gone_on_from_any_step_the_result_is_the_same(name: str, tmp_path: Path) -> None:
    """Bit for bit, from the state before the first step to that after the last."""
    done = finished(name)
    for i, state in enumerate(done.states):
        state.save(tmp_path / "state.npz")
        told: list[State] = []
        again = align(
            method(name), particles(), resume=State.load(tmp_path / "state.npz"),
            on_step=told.append,
        )  # fmt: skip
        assert_same_result(again, done.result)
        assert [each.iteration for each in told] == [s.iteration for s in done.states[i + 1 :]]


@pytest.mark.parametrize("name", NAMES)
def test_gone_on_from_a_state_in_memory_the_settings_are_those_given(name: str) -> None:
    """What a run leaves in its states for the next step is not taken over: it may be of other
    settings."""
    state, tried = finished(name).states[1], replace(method(name), particle=Particle(mirror=False))
    one = align(tried, particles(), resume=state)
    bare = replace(state, unsaved={})
    other = align(tried, particles(), resume=bare)
    assert_same_result(one, other)


def test_a_classification_of_another_number_of_classes_is_refused() -> None:
    for state in finished("classify").states:
        for k in (2, 4):
            with pytest.raises(ValueError, match=f"checkpoint is of 3 classes, not {k}"):
                align(replace(method("classify"), n_classes=k), particles(), resume=state)


def test_a_classification_that_lost_classes_is_gone_on_with(tmp_path: Path) -> None:
    """Of few particles: where a class has none left to be split, it is gone."""
    made = prepare(simulate(n=6, n_classes=1, size=SIZE, snr=1.0, seed=3).images, device="cpu")
    few, states = Classification(particle=WITHIN, n_classes=3), []
    whole = align(few, made, on_step=states.append)
    assert min(len(state["classes"]) for state in states) < 3
    for state in states:
        state.save(tmp_path / "state.npz")
        assert_same_result(align(few, made, resume=State.load(tmp_path / "state.npz")), whole)


def test_a_state_of_another_method_is_refused() -> None:
    for one, other in permutations(NAMES, 2):
        message = f"checkpoint is of method={one}, not {other}: resume with the settings of that"
        with pytest.raises(ValueError, match=message):
            align(method(other), particles(), resume=finished(one).states[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_other_particles_is_refused(name: str) -> None:
    """Of another number, of other pixels, in another box: before any step."""
    state, images = finished(name).states[1], data()[1]
    seen: list[State] = []
    for others in (
        prepare(images[:-1], device="cpu"),
        prepare(-images, device="cpu"),
        prepare(images, Images(box=28), device="cpu"),
    ):
        with pytest.raises(ValueError, match="checkpoint is of 119 other particles: the stack's"):
            align(method(name), others, resume=state, on_step=seen.append)
    assert not seen


def test_settings_that_do_not_fit_are_refused_before_any_image_is_read() -> None:
    class Unread:
        shape, pixel_size = (SIZE, SIZE), None

        def __len__(self) -> int:
            return 50

        def read(self, rows: torch.Tensor) -> torch.Tensor:
            raise AssertionError("was read")

    for name in NAMES:
        wide = type(method(name))(particle=Particle(radius="15.8 px"), **needed(name))
        with pytest.raises(ValueError, match=r"15\.8|16 px"):
            align(wide, Unread(), device="cpu")


def needed(name: str) -> dict[str, int]:
    return {"n_classes": 2} if name in ("mra", "classify") else {}


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_sorted_by_size(name: str) -> None:
    """With all that is said of them, whatever order the method had them in."""
    result, state = finished(name).result, finished(name).states[-1]
    sizes = result.class_sizes.tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert torch.equal(
        result.class_sizes, torch.bincount(result.class_number, minlength=len(sizes) + 1)[1:]
    )
    assert len(result.averages) == len(result.frc) == len(result.class_quality) == len(sizes)
    used = particles().rows
    label, number = state["label"], result.class_number[used]
    own = torch.bincount(label[label >= 0]).tolist()
    assert (len(sizes) > 1) == (name != "rfa")
    if name == "mra":  # of views of 15, 30 and 45 particles
        assert own == sorted(own)
    # A class is one of the method's, whole.
    assert len({(a, b) for a, b in zip(label.tolist(), number.tolist(), strict=True) if b}) == len(
        sizes
    )
    optics = some_optics(120, pixel_size=4.0)
    assert result.ctf.endswith("averages weighted by CTF^2 (the input has CTFs)")
    quality = result.class_quality
    for c in range(len(sizes)):
        members = (number == c + 1).nonzero().squeeze(1)
        own = used[members]
        again = ctf_average(data()[1][own], optics[own], result.pose[own])
        likeness = np.corrcoef(again.flatten(), result.averages[c].flatten())[0, 1]
        assert likeness > 0.999
        if name == "mra":
            assert set(label[members].tolist()) == {quality["reference"][c] - 1}
        if name == "isac":
            error = state["pixel_error"][members].mean()
            assert quality["pixel_error"][c] == pytest.approx(float(error))
    if name == "isac":
        assert sorted(quality["order"]) == list(range(1, len(sizes) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_every_result_has_error_bars_and_evidence(name: str) -> None:
    """The particles' are smaller and larger than those of noise that got into classes."""
    result = finished(name).result
    table = result.to_frame()
    used = table["class_number"] > 0
    assert used.sum() > 40
    bars = ["angle_sd", "shift_x_sd", "shift_y_sd"]
    assert np.isfinite(table.loc[used, bars]).all(axis=None)
    assert (table.loc[used, bars] > 0).all(axis=None)
    assert table.loc[~used, [*bars, "evidence", "oddness", "junk_score"]].isna().all(axis=None)
    assert table.loc[used, ["oddness", "junk_score"]].notna().all(axis=None)
    assert {"compactness", "junk_share", "rank"} <= set(result.class_quality)
    if name != "rfa":  # an average of three views says little of any
        real = used & (table["index"] < 90)
        known = table.loc[real, "evidence"].dropna()
        assert len(known) > 30
        assert (known > LEAST_EVIDENCE).mean() > 0.9


def test_error_bars_of_stable_classes_cover_the_truth() -> None:
    """ISAC's poses, about each class's own frame, are as far off as its error bars say."""
    made = simulate(n=300, n_classes=2, size=48, snr=0.2, max_shift=1.0, mirror=False, seed=7)
    found = align(
        StableClassification(
            particle=Particle(max_shift="1 px", mirror=False),
            isac=Isac(images_per_group=150, runs=3, passes=1),
        ),
        made.images,
        device="cpu",
    )
    used = (found.class_number > 0).nonzero().squeeze(1)
    assert len(used) > 200
    right, error = pose_errors(
        found.class_number[used] - 1, found.pose[used], made.class_number[used] - 1,
        made.pose[used],
    )  # fmt: skip
    assert right.double().mean() > 0.95
    table = found.to_frame().loc[used.numpy(), ["angle_sd", "shift_x_sd", "shift_y_sd"]]
    bars = torch.tensor(table.to_numpy("float64"))[right]
    ratio = error[right].square().mean(0).sqrt() / bars.median(0).values
    assert ((ratio > 0.75) & (ratio < 1.33)).all(), ratio


def test_junk_of_stable_classes_is_set_aside_with_its_reason() -> None:
    made = finished("isac").result
    other = StableClassification(
        particle=WITHIN, isac=Isac(images_per_group=13, runs=3, passes=1),
        quality=Quality(junk="set_aside"),
    )  # fmt: skip
    found = align(other, particles())
    junk = made.to_frame()["junk_score"] > 0
    assert torch.equal(found.class_number > 0, (made.class_number > 0) & ~torch.tensor(junk.values))
    assert int(found.class_sizes.sum()) + len(found.rejected) == 120
    assert found.class_sizes.tolist() == sorted(found.class_sizes.tolist(), reverse=True)


# ---- settings


def test_fields_of_methods_are_settings_of_one_name() -> None:
    """Every field of every method is a setting, and every setting is the run's or a method's."""
    keys = {each.name for each in fields(RunConfig)}
    assert list(METHODS) == list(NAMES)
    owned = set()
    for name, each in METHODS.items():
        assert each.name == name
        own = {field.name for field in fields(each)}
        assert own <= keys
        assert not own & RUN_KEYS
        owned |= own
    assert owned | RUN_KEYS == keys


def test_defaults_of_methods_are_those_of_the_settings() -> None:
    config = load_config(None, ["particles=a.star", "n_classes=3"])
    for each in METHODS.values():
        own = each()
        for field in fields(each):
            if field.name in ("n_classes", "references"):  # rfa begins with the average anyway
                continue
            assert getattr(own, field.name) == getattr(config, field.name), field.name


def test_a_method_is_made_with_the_settings_of_the_run() -> None:
    for name, words in {
        "mra": ["n_classes=3", "settle=0.1", "search.ring_step=2", "assign.strategy=equal"],
        "rfa": ["iterations=3", "schedule.starts=4", "averaging.centre=mass"],
        "classify": ["n_classes=7", "likelihood.cycles=1", "particle.ctf=none"],
        "isac": ["isac.runs=3", "iterations=9", "particle.radius=9 px", "quality.junk=set_aside"],
    }.items():
        config = load_config(None, ["particles=a.star", f"method={name}", "seed=5", *words])
        made = config.made()
        assert type(made) is METHODS[name]
        for field in fields(made):
            assert getattr(made, field.name) == getattr(config, field.name)
        assert made.seed == 5


def test_what_methods_do_not_use_are_settings() -> None:
    keys = set(dict(known_keys(RunConfig)))
    for each in METHODS.values():
        assert each.unused <= keys
        for key, other in each.instead.items():
            assert key in keys
            assert not each.uses(key)
            assert each.uses(other)
            assert other in keys


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_in_pixels_of_the_prepared_images(name: str) -> None:
    """Of a box of 64 px of 2 Å, a particle of 40 Å radius that is up to 4 Å off centre."""
    particle = Particle(radius="40 A", max_shift="4 A")
    made = type(method(name))(particle=particle, **needed(name))
    box = Box(64, 2.0)
    made.check(box)
    assert made.radius(box) == 20
    reach: Callable[[Box], float] = made.max_shift
    assert reach(box) == (4 if name == "rfa" else 2)  # rfa's shifts are its schedule's
    assert made.radius(Box(32, 4.0)) == 10
    with pytest.raises(
        ValueError, match=r"particle\.(radius|max_shift) is 40? A, but the pixel size of the input"
    ):
        made.check(Box(64, None))


def test_a_prepared_particle_is_normalised_whatever_the_method() -> None:
    """What methods read are the stack's images, normalised: no method changes them."""
    read = particles().read(torch.arange(5))
    rows = particles().rows[:5]
    assert torch.equal(read, normalise(data()[1][rows], SIZE / 2))
    shared = particles()
    before = shared.read(torch.arange(len(shared))).clone()
    for name in NAMES:
        align(method(name), shared)
        assert torch.equal(shared.read(torch.arange(len(shared))), before), name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_done_with_the_ctf_is_a_setting_and_is_said(name: str) -> None:
    images, optics = data()[1], some_optics(120, pixel_size=4.0)
    made = method(name)
    seen: dict[str, bool] = {}

    def start(wanted: str, given: Optics | None) -> str:
        """The line of a run that ends before its first step."""
        own = replace(made, particle=replace(WITHIN, ctf=wanted))
        particles = prepare(images, optics=given, device="cpu")
        use = own.ctf_use(own.particle.ctf)
        seen[wanted] = use != "none"
        return particles.ctf_line(use)

    flip = "CTF: phases flipped, averages weighted by CTF^2 (the input has CTFs)"
    model = flip.replace("CTF: ", "CTF: in the likelihood, ")
    assert start("auto", optics) == (model if name == "classify" else flip)
    assert start("flip", optics) == flip
    assert start("none", optics) == "CTF: not used, because particle.ctf is none"
    assert start("auto", None) == "CTF: not used, because the input has no defocus"
    assert seen == {"auto": True, "flip": True, "none": False}
    done = torch.arange(120) < 30
    some = replace(optics, phase_flipped=done)
    assert "except 30 of 120 particles (flipped before: rlnCtfDataArePhaseFlipped" in start(
        "flip", some
    )
    every = replace(optics, premultiplied=done | True)
    assert "phases not flipped (multiplied by the CTF before: rlnCtfDataAreCtfPre" in start(
        "flip", every
    )
    if name != "classify":
        with pytest.raises(ValueError, match=f"method={name} has no CTF in a model"):
            replace(made, particle=replace(WITHIN, ctf="model"))


def test_without_the_ctf_particles_stay_as_they_are() -> None:
    """Averages of mra with ctf=none are plain means, those of a run that knows no CTF."""
    made = replace(method("mra"), particle=replace(WITHIN, ctf="none"))
    one, two = (
        align(made, data()[1], optics=optics, device="cpu")
        for optics in (some_optics(120, pixel_size=4.0), None)
    )
    assert torch.equal(one.averages, two.averages)
    torch.testing.assert_close(one.pose.angle, two.pose.angle, atol=0, rtol=0, equal_nan=True)


def test_unusual_ctfs_are_said_and_impossible_ones_refused() -> None:
    optics, images = some_optics(120, pixel_size=4.0), data()[1]
    volts = replace(optics, voltage=optics.voltage * 1000)
    short = replace(method("mra"), iterations=1, assign=Assignment())
    with pytest.warns(UserWarning, match="rlnVoltage = 300000 is unusual.*divide by 1000"):
        align(short, images, optics=volts, device="cpu")
    with pytest.raises(ValueError, match="rlnVoltage = 0 is impossible in 120 of 120 rows"):
        align(short, images, optics=replace(optics, voltage=optics.voltage * 0), device="cpu")


def test_a_score_that_is_not_finite_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    step = MultiReference.step

    def broken(self: MultiReference, *args: Any) -> State:
        state = step(self, *args)
        state.history[-1]["mean_score"] = float("nan")
        return state

    monkeypatch.setattr(MultiReference, "step", broken)
    with pytest.raises(ValueError, match="mean_score is nan in iteration 1"):
        align(method("mra"), particles())
