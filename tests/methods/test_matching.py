"""All particles with all classes: sums and similarities against float64 loops; annealing."""

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from cryoalign.images.geometry import transform
from cryoalign.images.masks import masked, soft_mask
from cryoalign.methods import mra
from cryoalign.methods.assignment import Assignment, assign_robust
from cryoalign.methods.matching import (
    LEAST_WEIGHT,
    Matched,
    assign_particles,
    match_particles,
    soft_sums,
)
from cryoalign.methods.mra import align_multi_reference
from cryoalign.methods.references import AlignAndAverage
from cryoalign.methods.state import State
from cryoalign.particles.prepare import prepare
from cryoalign.particles.settings import Particle
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.pose import Pose
from cryoalign.results.averages import Averaging
from cryoalign.search.match import Target, prepare_target
from cryoalign.search.settings import Search, SearchSettings

N, K, SIZE = 40, 3, 32
SEARCH = Search(max_shift=1, mode="exhaustive")
HOW = {"particle": Particle(max_shift="1 px"), "search": SearchSettings(mode="exhaustive")}


@pytest.fixture(scope="module")
def data() -> Simulation:
    return simulate(n=N, n_classes=K, size=SIZE, snr=0.1, max_shift=1.0, seed=3)


@pytest.fixture(scope="module")
def matched(data: Simulation) -> tuple[AlignAndAverage, Target, Matched]:
    images = data.images.clone()
    images[4] = torch.nan  # halves go by the row of the input
    prepared = prepare(images, device="cpu", batch_size=7)
    work = AlignAndAverage(prepared, Averaging(), SEARCH, SEARCH.rings(SIZE))
    target = prepare_target(data.views, SEARCH)
    return work, target, match_particles(work, target)


def test_soft_sums_are_weighted_means(matched: tuple[AlignAndAverage, Target, Matched]) -> None:
    work, _, found = matched
    generator = torch.Generator().manual_seed(0)
    n, k = N - 1, K + 1  # one class is new
    weights = torch.softmax(3 * torch.randn(n, K, generator=generator), 1)
    label = weights.argmax(1)
    label[::9] = K  # moved there
    label[1::9] = (label[1::9] + 1) % K  # or to another of the old ones
    fine = Pose(
        360 * torch.rand(n, generator=generator), torch.randn(n, 2, generator=generator),
        torch.rand(n, generator=generator) < 0.5,
    )  # fmt: skip
    sums = soft_sums(work, found, weights, label, fine, k)
    images = work.particles.read(torch.arange(n)).double()
    total = torch.zeros(2, k, SIZE, SIZE, dtype=torch.float64)
    weight, count = torch.zeros(2, k, dtype=torch.float64), torch.zeros(2, k, dtype=torch.int64)
    for i in range(n):
        half = int(work.particles.rows[i]) % 2
        moved = int(label[i]) != int(weights[i].argmax())
        for c in range(k):
            own = c == int(label[i])
            share = float(own) if moved else float(weights[i, c]) if c < K else 0.0
            if share <= LEAST_WEIGHT:
                continue
            pose = fine if own else found.pose[:, c]
            total[half, c] += share * transform(images[i : i + 1], pose[i : i + 1])[0]
            weight[half, c] += share
            count[half, c] += 1
    assert torch.equal(sums.count, count)
    expected = total / weight.clamp(min=1e-12)[..., None, None]
    torch.testing.assert_close(sums.half_averages().double(), expected, rtol=1e-4, atol=1e-4)


def correntropies(work: AlignAndAverage, references: Tensor, found: Matched) -> Tensor:
    """exp(-d^2 / 2 s^2), s^2 = 2 of a background of variance 1, pixel by pixel."""
    mask = work.mask().double()
    out = torch.zeros(found.scores.shape, dtype=torch.float64)
    for i in range(len(out)):
        image = work.particles.read(torch.tensor([i])).double()
        for c, reference in enumerate(references.double().tolist()):
            aligned = transform(image, found.pose[i : i + 1, c], "bilinear")[0]
            aligned = (aligned - (aligned * mask).sum() / mask.sum()) * mask
            values = [
                math.exp(-((x - y) ** 2) / (2 * 2.0))
                for line, other, inside in zip(
                    aligned.tolist(), reference, mask.tolist(), strict=True
                )
                for x, y, m in zip(line, other, inside, strict=True)
                if m > 0.5
            ]
            out[i, c] = sum(values) / len(values)
    return out


def test_robust_ranks_the_correntropies(
    data: Simulation, matched: tuple[AlignAndAverage, Target, Matched]
) -> None:
    work, target, found = matched
    label = found.scores.argmax(1)
    expected = correntropies(work, data.views, found)
    how = Assignment("robust", similarity="correntropy")
    ranked = assign_particles(work, target, how, label, 0).label
    assert torch.equal(ranked, assign_robust(expected.float(), label))
    plain = assign_particles(work, target, Assignment("robust"), label, 0).label
    assert torch.equal(plain, assign_robust(found.scores, label))
    assert not torch.equal(plain, ranked)


def test_the_robust_strategy_resists_a_reference_that_attracts_all() -> None:
    """One reference is clean, the others noisy: most particles correlate best with the clean one,
    whatever they show."""
    made = simulate(n=120, n_classes=K, size=SIZE, snr=0.3, max_shift=1.0, seed=3)
    found: dict[str, list[float]] = {"robust": [], "best": []}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(made.views.shape, generator=generator)
        noise[0] = 0
        references = made.views + 2 * made.views.std() * noise
        view = made.class_number - 1
        wrong = torch.rand(len(view), generator=generator) < 0.3
        label = torch.where(wrong, (view + 1) % K, view)
        prepared = prepare(made.images, device="cpu")
        work = AlignAndAverage(prepared, Averaging(), SEARCH, SEARCH.rings(SIZE))
        target = prepare_target(references, SEARCH)
        found["best"].append(
            adjusted_rand_score(view, match_particles(work, target).scores.argmax(1))
        )
        for _ in range(3):
            label = assign_particles(work, target, Assignment("robust"), label, 0).label
        found["robust"].append(adjusted_rand_score(view, label))
    assert min(found["robust"]) > 0.7
    assert max(found["best"]) < 0.5


def test_the_stochastic_strategy_climbs_from_the_class_a_particle_is_in(
    matched: tuple[AlignAndAverage, Target, Matched],
) -> None:
    work, target, found = matched
    rows, best = torch.arange(N - 1), found.scores.argmax(1)
    how = Assignment("stochastic")
    ends = []
    for seed in range(3):
        label = found.scores.argmin(1)
        after = assign_particles(work, target, how, label, seed).label
        assert (found.scores[rows, after] > found.scores[rows, label]).all()
        assert 0.25 < (after == best).double().mean() < 0.75  # one of two that are better
        ends.append(after)
    assert not torch.equal(ends[0], ends[1])
    new = assign_particles(work, target, how, torch.full((N - 1,), -1), 0).label
    assert torch.equal(new, best)


def test_a_particle_counts_in_several_classes_while_it_is_hot(data: Simulation) -> None:
    """Soft averages are of more members than there are particles; the last ones are hard."""
    states: list[State] = []
    align_multi_reference(
        data.images, data.views, iterations=4, **HOW, settle=0, min_class_share=0,
        assign=Assignment("soft", anneal=100.0, anneal_iterations=3), on_step=states.append,
    )  # fmt: skip
    members = [int(state.unsaved["sums"].sizes.sum()) for state in states]
    assert members[0] > 2 * N
    assert members[-1] == N


def test_soft_cools_and_sharpens(data: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """References are low-passed from 0.1 to all of the band, the noise's temperature falls from
    4 to 1."""
    searched: list[Tensor] = []
    cooling: list[float] = []
    states: list[State] = []

    def spy_prepare(references: Tensor, *rest: Any) -> Target:
        searched.append(references)
        return prepare_target(references, *rest)

    def spy_weigh(*args: Any) -> Tensor:
        cooling.append(args[3])
        return weigh(*args)

    weigh = mra.weigh
    monkeypatch.setattr(mra, "prepare_target", spy_prepare)
    monkeypatch.setattr(mra, "weigh", spy_weigh)
    align_multi_reference(
        data.images, data.views, iterations=4, **HOW, settle=0, min_class_share=0,
        assign=Assignment("soft", anneal_iterations=2), averaging=Averaging(filter="none"),
        on_step=states.append,
    )  # fmt: skip
    assert cooling == pytest.approx([4.0, 2.0, 1.0, 1.0][: len(states)])
    k = torch.hypot(torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)[None])
    first = masked(data.views, soft_mask(SIZE, SEARCH.rings(SIZE).last_ring))
    given = [first, *(state["references"] for state in states)]
    for cutoff, before, after in zip((0.1, 0.3, 0.5), given, searched, strict=False):
        spectra = torch.fft.rfft2(before.double()), torch.fft.rfft2(after.double())
        kept, gone = k < cutoff - 2 / SIZE, k > cutoff + 2.5 / SIZE
        torch.testing.assert_close(spectra[1][:, kept], spectra[0][:, kept], rtol=1e-4, atol=1e-3)
        assert float(spectra[0][:, gone].abs().sum()) > 1 or cutoff == 0.5
        assert float(spectra[1][:, gone].abs().sum()) < 1e-2 or cutoff == 0.5
    assert torch.equal(given[2], searched[2])


def test_nothing_is_at_rest_before_it_is_annealed_and_split(data: Simulation) -> None:
    at_rest = {**HOW, "settle": 1.0, "iterations": 8, "min_class_share": 0.0}
    soft = align_multi_reference(
        data.images, data.views, assign=Assignment("soft", anneal_iterations=3), **at_rest
    )
    assert len(soft.history) == 4
    split = Assignment(start_classes=1, level_iterations=1)
    grown = align_multi_reference(data.images, "random", n_classes=4, assign=split, **at_rest)
    assert len(grown.history) == 3
    assert (grown.class_sizes > 0).all()
    best = align_multi_reference(data.images, data.views, **at_rest)
    assert len(best.history) == 1
