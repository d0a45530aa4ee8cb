"""Learn a filter and a mask through alignment, and classify better than with hand-made ones.

Particles are searched against reference views after a radial filter and a mask. By hand one whitens
by the measured noise and takes a disc a little larger than the molecule. Here the same few numbers
(gains of particles and of references at 9 frequencies each, the power of the CTF that particles
are multiplied by, a mask at 9 radii) are learnt from simulated particles whose class is known:

    logit of class k = scale * T log sum_poses exp(score_k(pose) / T) / T,

the score being the search's own normalised correlation (`layers.RingSpectra`, `PoseMarginal`), and
the loss is the cross-entropy. What was learnt is then a filter like any other: it is judged by the
ordinary search (`best_poses`) on new particles, on views and on a molecule that training never saw.

python examples/learn_filter.py [SETTINGS.yaml] [key=value ...]    writes learn-filter.png; --help
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas.api.typing import SeriesGroupBy
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from cryoalign.app.schema import settings_from_words
from cryoalign.images.ctf import Optics, ctf_2d
from cryoalign.images.fourier import filter_shells, low_pass_curve, shell_index
from cryoalign.images.geometry import radius_grid
from cryoalign.images.masks import normalise, soft_mask
from cryoalign.images.polar import Rings
from cryoalign.learn.layers import PoseMarginal, RingSpectra
from cryoalign.methods.classify.whitening import noise_spectrum
from cryoalign.particles.simulate import Phantom, phantom, project, spread_views
from cryoalign.pose import Pose
from cryoalign.report import figures as plot
from cryoalign.report.montage import BLUE, GREY, INK, ORANGE
from cryoalign.runtime.settings import FORBID
from cryoalign.search.match import best_poses, prepare_target
from cryoalign.search.settings import Search

YAML = Path(__file__).with_suffix(".yaml")
KNOTS = 9
EDGE = 4.0  # px, soft edge of hand-made masks
TESTS = ("new particles", "new views", "another molecule")
BY_HAND = ("defaults", "whitened", "tuned")
STYLES = {
    "defaults": (GREY, ":", "by hand: defaults"),
    "whitened": (BLUE, "-.", "by hand: whitened"),
    "tuned": ("#2f855a", "--", "by hand: tuned"),
    "learnt": (ORANGE, "-", "learnt"),
    "matched": (INK, ":", "matched filter: |CTF| / true noise"),
}


@dataclass(frozen=True, config=FORBID)
class Settings:
    """All that the example can be told."""

    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="one experiment each"
    )
    n_classes: int = Field(default=12, ge=2, description="views in training, and as many new ones")
    n_train: int = Field(default=1500, ge=50, description="particles whose class is known")
    n_test: int = Field(default=2000, ge=50, description="particles of each of the three tests")
    size: int = Field(default=48, ge=32, description="box, px")
    radius: float = Field(default=14.0, ge=6, description="of the molecule, px")
    pixel_size: float = Field(default=4.0, gt=0, description="Å")
    snr: float = Field(default=0.08, gt=0, description="before the CTF, over the whole box")
    jitter: float = Field(default=6.0, ge=0, description="degrees, a particle off its class's view")
    neighbours: float = Field(default=2.0, ge=0, description="others that reach into a box, mean")
    max_shift: float = Field(default=2.0, ge=0, description="px, simulated and searched")
    epochs: int = Field(default=3, ge=1, description="passes over the training particles")
    batch_size: int = Field(default=50, ge=1, description="particles a step")
    learning_rate: float = Field(default=0.1, gt=0, description="of Adam, at its height")
    temperature: float = Field(default=0.01, gt=0, description="T of the soft maximum over poses")
    output: Path | None = Field(default=Path("learn-filter.png"), description="picture; null: none")

    def __post_init__(self) -> None:
        Search(max_shift=self.max_shift).rings(self.size)  # refuses shifts that leave no ring


@plain_dataclass(frozen=True)
class Particles:
    """Simulated particles: images (n, size, size) with background 0 and deviation 1, their CTFs in
    rfft2's layout, and the truth."""

    images: Tensor
    ctf: Tensor
    label: Tensor
    mirror: Tensor


def noise_power(size: int) -> Tensor:
    """(shells,) power of the simulated noise up to the corner: strong at low frequency (ice)."""
    k = torch.arange(math.ceil(size / math.sqrt(2)) + 1) / size
    return 1 / (1 + (k / 0.06) ** 2) + 0.15


def simulate_particles(
    n: int, molecule: Phantom, views: Tensor, settings: Settings, seed: int
) -> Particles:
    """Particles as a micrograph has them: a view near one of ``views`` (k, 3), neighbours that
    reach into the box, all imaged with a CTF, and noise. Poses are random."""
    generator = torch.Generator().manual_seed(seed)
    size, radius = settings.size, settings.radius

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    label = torch.randint(len(views), (n,), generator=generator)
    reach = settings.max_shift
    pose = Pose(uniform(-180, 180, n), uniform(-reach, reach, n, 2), uniform(0, 1, n) < 0.5)
    off = math.radians(settings.jitter) * torch.randn(n, 3, generator=generator)
    images = project(molecule, F.normalize(views[label] + off, dim=1), pose, size=size)
    others = torch.poisson(torch.full((n,), settings.neighbours), generator=generator).long()
    box = torch.arange(n).repeat_interleave(others)
    if len(box):
        # They touch at 2 radii, here at 1.8: proteins are not balls. Uniform over the area.
        distance = uniform((1.8 * radius) ** 2, (size / 2 + radius) ** 2, len(box)).sqrt()
        angle = uniform(0, 2 * math.pi, len(box))
        place = distance[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        direction = F.normalize(torch.randn(len(box), 3, generator=generator).double(), dim=1)
        elsewhere = Pose(uniform(-180, 180, len(box)), place, uniform(0, 1, len(box)) < 0.5)
        images.index_add_(0, box, project(molecule, direction, elsewhere, size=size))
    zero = torch.zeros(n)
    defocus = uniform(10_000, 25_000, n)
    optics = Optics(
        defocus, defocus, zero, zero + 300, zero + 2.7, zero + 0.1, zero, zero + settings.pixel_size
    )
    ctf = ctf_2d(optics, size)
    power = project(molecule, views, size=size).var((1, 2)).mean()
    images = torch.fft.irfft2(torch.fft.rfft2(images) * ctf, s=(size, size))
    noise = torch.randn(n, size, size, generator=generator)
    noise = filter_shells(noise, noise_power(size).sqrt())
    images = images * (settings.snr / power).sqrt() + noise / noise.std()
    images = normalise(images, min(radius + EDGE, size / 2), "constant")
    return Particles(images, ctf, label, pose.mirror)


@plain_dataclass(frozen=True)
class Filter:
    """What is done to particles and references before the search, by hand or learnt.

    Attributes:
        particle_gain, reference_gain: (shells,) radial factors in Fourier space.
        ctf_power: particles are multiplied by sign(CTF) |CTF|^power: 0 flips phases, 1 is the CTF.
        mask: (size, size), of both.
        last_ring: outermost ring of the search.
    """

    particle_gain: Tensor
    reference_gain: Tensor
    ctf_power: Tensor | float
    mask: Tensor
    last_ring: int

    def particles(self, images: Tensor, ctf: Tensor) -> Tensor:
        """Images (n, size, size) and their CTFs to filtered, masked images."""
        # The power of |CTF| has no gradient at its zeros without the small number.
        weight = ctf.sign() * (ctf.square() + 1e-4) ** (self.ctf_power / 2)
        corrected = torch.fft.irfft2(torch.fft.rfft2(images) * weight, s=images.shape[-2:])
        return filter_shells(corrected, self.particle_gain) * self.mask

    def references(self, views: Tensor) -> Tensor:
        """(k, size, size) filtered, masked views."""
        return filter_shells(views, self.reference_gain) * self.mask


def between_knots(knots: Tensor, n: int) -> Tensor:
    """(n,) values of a smooth curve through evenly spaced knots (K,), cosines between them."""
    place = torch.linspace(0, len(knots) - 1, n)
    low = place.floor().long().clamp(max=len(knots) - 2)
    part = 0.5 - 0.5 * torch.cos(math.pi * (place - low))
    return knots[low] * (1 - part) + knots[low + 1] * part


class LearnedFilter(nn.Module):
    """A `Filter` of few numbers, that starts from whitening, flipped phases and a plain disc."""

    def __init__(self, noise: Tensor, settings: Settings) -> None:
        """
        Args:
            noise: (shells,) measured power.
        """
        super().__init__()
        self.size, search = settings.size, Search(max_shift=settings.max_shift)
        self.last_ring = search.rings(settings.size).last_ring
        shell = torch.linspace(0, settings.size // 2, KNOTS).round().long()
        radii = torch.linspace(0, self.last_ring, KNOTS)
        self.log_gain = nn.Parameter(-0.5 * noise[shell].log())
        self.log_ratio = nn.Parameter(torch.zeros(KNOTS))  # of the references' to the particles'
        self.ctf_power = nn.Parameter(torch.zeros(()))
        self.mask_logit = nn.Parameter(4.0 * (radii < settings.radius + EDGE / 2) - 2.0)
        self.log_scale = nn.Parameter(torch.zeros(()))
        # Two thirds of the angles that resolve a pixel: enough to learn by, and faster.
        rings = Rings(1, self.last_ring, angles=16 * math.ceil(math.pi * self.last_ring / 12))
        self.spectra, self.temperature = RingSpectra(rings), settings.temperature
        self.marginal = PoseMarginal(settings.temperature)
        self.register_buffer("shifts", search.shifts())

    def mask_profile(self) -> Tensor:
        """(last_ring + 1,) the mask at whole radii."""
        return between_knots(self.mask_logit.sigmoid(), self.last_ring + 1)

    def filter(self) -> Filter:
        """What is learnt so far, with gradients."""
        radius = radius_grid(self.size).clamp(max=self.last_ring - 1e-3)
        low = radius.floor().long()
        profile = self.mask_profile()
        mask = profile[low] * (1 - radius + low) + profile[low + 1] * (radius - low)
        shells = self.size // 2 + 1
        gain = between_knots(self.log_gain, shells).exp()
        ratio = between_knots(self.log_ratio, shells).exp()
        return Filter(gain, gain * ratio, self.ctf_power, mask, self.last_ring)

    def forward(self, images: Tensor, ctf: Tensor, views: Tensor) -> Tensor:
        """Class logits (n, k)."""
        chosen = self.filter()
        x = self.spectra(chosen.particles(images, ctf), self.shifts)  # (n, s, r, m)
        y = self.spectra(chosen.references(views))[:, 0]
        return self.marginal(x, y) / self.temperature * self.log_scale.exp()


@torch.no_grad()
def right(chosen: Filter, data: Particles, views: Tensor, settings: Settings) -> Tensor:
    """(n, 2) of every particle: class right; class and hand right, by the ordinary search."""
    search = Search(max_shift=settings.max_shift, last_ring=chosen.last_ring)
    target = prepare_target(chosen.references(views), search)
    label, pose, _ = best_poses(chosen.particles(data.images, data.ctf), target)
    found = label == data.label
    return torch.stack([found, found & (pose.mirror == data.mirror)], 1).double()


def measured_noise(data: Particles, settings: Settings) -> Tensor:
    """(shells,) power of the noise, from the background about the particles."""
    return noise_spectrum(data.images, min(settings.radius + EDGE, settings.size / 2 - 2))


def by_hand(train: Particles, views: Tensor, settings: Settings) -> dict[str, Filter]:
    """Three filters as one would make them; what is free is chosen by accuracy on ``train``.

    "defaults": phases flipped, nothing else. "whitened": by the measured noise, the best of three
    disc radii. "tuned": whitened, and the best of 72: radius, high-pass, low-pass, phases flipped
    or multiplied by the CTF, references as they are or by the particles' mean |CTF|.
    """
    size, radius = settings.size, settings.radius
    largest = Search(max_shift=settings.max_shift).rings(size).last_ring
    white = measured_noise(train, settings).rsqrt()
    flat, shells = torch.ones_like(white), torch.arange(len(white))

    mean = shell_means(train.ctf.abs())
    contrast = torch.cat([mean[:1], mean])[shells.clamp(max=size // 2)]

    def disc(reach: float, high: float, low: float, power: float, seen: bool) -> Filter:
        fall = low_pass_curve(size, low) if low < 0.5 else torch.ones(size // 2 + 1)
        band = fall * (1 - low_pass_curve(size, high)) if high > 0 else fall
        gain = white * band[shells.clamp(max=size // 2)]
        last = min(largest, math.ceil(reach + EDGE))
        others = gain * contrast if seen else gain
        return Filter(gain, others, power, soft_mask(size, reach, EDGE), last)

    reaches = [radius - 2, radius + 1, radius + 4]
    options = itertools.product(reaches, [0, 0.04, 0.08], [0.4, 0.5], [0, 1], [False, True])
    choices = {key: disc(*key) for key in options}
    score = {
        key: float(right(f, train, views, settings)[:, 0].mean()) for key, f in choices.items()
    }
    plain = [key for key in choices if key[1:] == (0, 0.5, 0, False)]
    return {
        "defaults": Filter(flat, flat, 0.0, torch.ones(size, size), largest),
        "whitened": choices[max(plain, key=score.__getitem__)],
        "tuned": choices[max(score, key=score.__getitem__)],
    }


@plain_dataclass(frozen=True)
class Result:
    """One seed's experiment.

    Attributes:
        rows: table of seed, test, filter, class_right, hand_right (class and hand), and the gain in
            class_right over the best filter by hand *in that test* with its paired standard error.
        curve: class_right of new particles before training and after every epoch.
        weights: what particle times reference is weighted by, (size // 2,) at 1, 2 … 1/box.
        ratio: (size // 2,) the references' learnt gain over the particles', mean 1.
        masks: (last_ring + 1,) by radius.
    """

    rows: pd.DataFrame
    curve: list[float]
    weights: dict[str, Tensor]
    ratio: Tensor
    masks: dict[str, Tensor]


def train_filter(
    model: LearnedFilter, train: Particles, views: Tensor, settings: Settings, seed: int
) -> Iterator[float]:
    """Fit the model to training particles; the mean loss after every epoch."""
    generator = torch.Generator().manual_seed(seed)
    n, batch = len(train.label), settings.batch_size
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * math.ceil(n / batch)
    )
    for _ in range(settings.epochs):
        total = 0.0
        for rows in torch.randperm(n, generator=generator).split(batch):
            logits = model(train.images[rows], train.ctf[rows], views)
            loss = F.cross_entropy(logits, train.label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        yield total / n


def experiment(settings: Settings, seed: int) -> Result:
    """Simulate, choose by hand, learn, and judge all on the same test particles."""
    molecule, stranger = (
        phantom(each, n_blobs=300, radius=settings.radius) for each in (seed, seed + 1_000_000)
    )
    order = torch.randperm(2 * settings.n_classes, generator=torch.Generator().manual_seed(seed))
    seen, unseen = spread_views(2 * settings.n_classes, seed)[order].chunk(2)
    shown = [(molecule, seen), (molecule, seen), (molecule, unseen), (stranger, seen)]
    views = [project(*each, size=settings.size) for each in shown]
    sizes = [settings.n_train] + 3 * [settings.n_test]
    train, *tests = (
        simulate_particles(n, *each, settings, 10 * seed + i)
        for i, (n, each) in enumerate(zip(sizes, shown, strict=True))
    )
    filters = by_hand(train, views[0], settings)
    model = LearnedFilter(measured_noise(train, settings), settings)

    def accuracy() -> float:
        found = right(model.filter(), tests[0], views[0], settings)
        return float(found[:, 0].mean())

    first_mask = model.filter().mask.detach()
    curve = [accuracy()]
    for loss in train_filter(model, train, views[0], settings, seed):
        curve.append(accuracy())
        print(f"seed {seed}, loss {loss:.3f}: new particles {100 * curve[-1]:.1f} %", flush=True)
    with torch.no_grad():
        filters["learnt"] = learnt = replace(model.filter(), ctf_power=model.ctf_power.item())
    # What the parts are worth: the mask it started from, and one gain for both sides.
    shared = (learnt.particle_gain * learnt.reference_gain).sqrt()
    filters["learnt, first mask"] = replace(learnt, mask=first_mask)
    filters["learnt, one gain"] = replace(learnt, particle_gain=shared, reference_gain=shared)
    rows = []
    for name, test, references in zip(TESTS, tests, views[1:], strict=True):
        found = {key: right(f, test, references, settings) for key, f in filters.items()}
        share = {key: float(found[key][:, 0].mean()) for key in BY_HAND}
        best = max(share, key=share.__getitem__)
        for key, each in found.items():
            gain = each[:, 0] - found[best][:, 0]
            error = float(gain.std()) / math.sqrt(len(gain))
            rows.append((seed, name, key, *each.mean(0).tolist(), float(gain.mean()), error))
    columns = ["seed", "test", "filter", "class_right", "hand_right", "gain", "error"]
    power = noise_power(settings.size)
    weights = {key: weight(f, train.ctf) for key, f in filters.items()}
    weights["matched"] = shell_means(train.ctf.abs()) / power[1 : settings.size // 2 + 1]
    centre, last = settings.size // 2, model.last_ring
    masks = {key: f.mask[centre, centre : centre + last + 1] for key, f in filters.items()}
    print(f"seed {seed}: particles multiplied by |CTF| to the power {model.ctf_power.item():.2f}")
    ratio = (learnt.reference_gain / learnt.particle_gain)[1:]
    table = pd.DataFrame(rows, columns=columns)
    return Result(table, curve, weights, ratio / ratio.mean(), masks)


def shell_means(values: Tensor) -> Tensor:
    """(size // 2,) means of values (n, size, size // 2 + 1) in rfft2's layout at 1, 2 … 1/box."""
    size = values.shape[-2]
    ring, mean = shell_index(size).flatten(), values.mean(0).flatten()
    return (torch.bincount(ring, mean) / torch.bincount(ring))[1 : size // 2 + 1]


def weight(chosen: Filter, ctf: Tensor) -> Tensor:
    """(size // 2,) mean factor of particle times reference at 1, 2 … 1/box."""
    shells = slice(1, ctf.shape[-2] // 2 + 1)
    gain = chosen.particle_gain[shells] * chosen.reference_gain[shells]
    return gain * shell_means(ctf.abs() ** float(chosen.ctf_power))


def summary(table: pd.DataFrame) -> str:
    """Per cent: mean over seeds ± standard deviation between them, of every test and filter."""

    def words(values: pd.Series) -> str:
        spread = f" ± {100 * values.std():.1f}" if len(values) > 1 else ""
        return f"{100 * values.mean():.1f}{spread}"

    columns = ["class_right", "hand_right", "gain"]
    return table.groupby(["test", "filter"], sort=False)[columns].agg(words).to_string()


def draw(results: list[Result], settings: Settings) -> Figure:
    """Filter, gains, mask; accuracy by epoch and by test; what the parts are worth."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    (by_k, split, by_r), (by_epoch, by_test, parts) = figure.subplots(2, 3)
    frequency = torch.arange(1, settings.size // 2 + 1) / settings.size
    table = pd.concat([result.rows for result in results])
    for i, result in enumerate(results):
        for key, (colour, style, label) in STYLES.items():
            if key != "learnt" and i:
                continue
            label = "_" if i else label
            values = result.weights[key] / result.weights[key].mean()
            by_k.plot(frequency, values, style, color=colour, label=label)
            if key in ("whitened", "tuned", "learnt"):
                by_r.plot(result.masks[key], style, color=colour, label=label)
        split.plot(frequency, result.ratio, color=ORANGE, label="_" if i else "learnt")
        curve = [100 * share for share in result.curve]
        by_epoch.plot(curve, ".-", color=ORANGE, label="_" if i else "learnt")
    split.axhline(1, color=INK, linestyle=":", label="one gain for both")
    by_r.axvspan(0, settings.radius, color=GREY, alpha=0.25, label="the molecule")
    for i, key in enumerate([*BY_HAND, "learnt"]):
        colour, style, label = STYLES[key]
        rows = table[table["filter"] == key].groupby("test", sort=False).class_right
        if key in BY_HAND:
            mean = 100 * float(rows.mean()[TESTS[0]])
            by_epoch.axhline(mean, color=colour, linestyle=style, label=f"{label}, mean")
        _dots(by_test, rows, 0.2 * (i - 1.5), colour, "_")
    colours = {"learnt": ORANGE, "learnt, first mask": BLUE, "learnt, one gain": GREY}
    for i, (key, colour) in enumerate(colours.items()):
        rows = table[table["filter"] == key].groupby("test", sort=False).gain
        _dots(parts, rows, 0.2 * (i - 1), colour, key)
    parts.axhline(0, color=INK, linewidth=1)
    for axes, title, x, y in (
        (by_k, "What a frequency counts (by hand: first seed)", 0, "particle × reference, mean 1"),
        (split, "References' gain over the particles'", 0, "ratio, mean 1"),
        (by_r, "Mask (by hand: first seed)", "radius (px)", "mask"),
        (by_epoch, "New particles while learning", "epoch", "class right (%)"),
        (by_test, "After training (dots: seeds; colours as left)", "", "class right (%)"),
        (parts, "Gain over the best by hand", "", "class right (% points)"),
    ):
        axes.set(title=title, xlabel="spatial frequency (cycles/px)" if x == 0 else x, ylabel=y)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if axes in (by_test, parts):
            axes.set_xticks(range(len(TESTS)), TESTS)
        if axes is not by_test:
            axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    by_r.set(xlim=(0, None), ylim=(0, 1.05))
    for axes, room in ((by_k, 1.5), (split, 1.3)):  # for the legends
        axes.set_ylim(0, room * axes.get_ylim()[1])
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _dots(axes: Axes, rows: SeriesGroupBy, offset: float, colour: str, label: str) -> None:
    """A dot for every seed and a bar at their mean, in per cent, by test."""
    for place, (_, values) in enumerate(rows):
        x, mean = place + offset, 100 * values.mean()
        axes.plot([x] * len(values), 100 * values, "o", color=colour, alpha=0.5, ms=5)
        axes.plot([x - 0.08, x + 0.08], [mean] * 2, color=colour, lw=3, label=label)
        label = "_"


def main(words: Sequence[str] = ()) -> pd.DataFrame:
    """Run all seeds; returns the table of `Result.rows`."""
    settings = settings_from_words(Settings, YAML, words, __doc__)
    results = [experiment(settings, seed) for seed in settings.seeds]
    table = pd.concat([result.rows for result in results], ignore_index=True)
    print("\nper cent; gain: over the best by hand in that test, error: of that, paired")
    percent = table.assign(**{c: (100 * table[c]).round(1) for c in table.columns[3:]})
    print(percent.to_string(index=False))
    print(f"\nmean ± standard deviation of {len(results)} seeds\n{summary(table)}")
    if settings.output is not None:
        plot.save(draw(results, settings), settings.output, dpi=100)
        print(f"{settings.output} is written")
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
