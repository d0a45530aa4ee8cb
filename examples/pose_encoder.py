"""An encoder that predicts poses in one pass, trained through the alignment loss, then refined.

A search pays for every trial shift with all references, hands and angles. Here a small network
looks at the particle and says where its centre may be: a few guesses (`PoseEncoder.centres`).
About a centre, turning is a cyclic shift along the rings and mirroring a conjugation, so a last
layer that commutes with both (`RotationalCorrelation`, whose weights are the references) gives the
scores of every class, hand and angle in one pass.

No pose is told to it: the loss is the alignment itself. With scores c and q = softmax(c / T),

    loss = -T log sum exp(c / T) = -(sum q c + T entropy(q)),

minus the expected score of the poses that the encoder believes in. Its gradient reaches the network
through the rings, which move with the predicted centre. The best few predictions are refined as the
search refines its own, by Gauss-Newton.

python examples/pose_encoder.py [SETTINGS.yaml] [key=value ...]    writes pose-encoder.png; --help
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cryoalign.app.schema import settings_from_words
from cryoalign.images.fourier import fourier_shrink
from cryoalign.images.polar import Rings, reference_spectra
from cryoalign.images.templates import templates_of
from cryoalign.learn.dataset import ParticleDataset, RandomPose
from cryoalign.learn.layers import RingSpectra, RotationalCorrelation
from cryoalign.operators.kernels import CRYOALIGN_NO_KERNELS, cpu
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.particles.stack import TensorStack
from cryoalign.pose import Pose, wrap_degrees
from cryoalign.report import figures as plot
from cryoalign.runtime.settings import FORBID
from cryoalign.runtime.threads import keep_freed_memory
from cryoalign.search.match import best_poses, prepare_target
from cryoalign.search.refine import refine_on
from cryoalign.search.settings import Search

YAML = Path(__file__).with_suffix(".yaml")
TRIAL_STEPS = (2.0, 3.0, 4.0)  # px between shifts that are tried in place of the network's
DOUBT_STEP = 2.0  # of the trial shifts for doubtful particles
CHUNK = 96  # shifts whose scores are made at a time: they stay in the cache
LOW_STEPS, FINE_STEPS = 2, 1  # of Gauss-Newton, at the network's resolution and at full
WORSE = 1.0  # per cent: with so many fewer right than the search, training does not pay
FINAL, FINAL_MARGIN = 2, 1.0  # of the refined, how many are refined at full resolution too


@dataclass(frozen=True, config=FORBID)
class Settings:
    """The particles, the encoder, its training."""

    n_train: int = Field(default=7000, ge=1, description="particles to train with")
    n_test: int = Field(default=400, ge=10, description="particles held out")
    n_views: int = Field(default=100, ge=2, description="views of one phantom: the references")
    size: int = Field(default=64, ge=32, description="box, px")
    snr: float = Field(default=0.1, gt=0, description="signal-to-noise ratio")
    low_snr: float | None = Field(default=0.03, gt=0, description="a second one, below; null: none")
    max_shift: float = Field(default=6.0, gt=0, description="of particles, px")
    box: int = Field(default=28, ge=16, description="box that the network sees, px")
    angles: int = Field(default=32, ge=16, description="in-plane angles of the encoder")
    heads: int = Field(default=3, ge=1, description="centres predicted for a particle")
    hidden: int = Field(default=512, ge=1, description="units of the network's first layer")
    temperature: float = Field(default=0.003, gt=0, description="of the loss, units of the score")
    epochs: int = Field(default=6, ge=1, description="passes over the particles")
    batch_size: int = Field(default=128, ge=2, description="particles of a step")
    learning_rate: float = Field(default=0.004, gt=0, description="the highest, of one cycle")
    candidates: int = Field(default=12, ge=1, description="predictions refined, at most")
    margin: float = Field(
        default=1.0, ge=0, description="below the best, in deviations of a score of noise"
    )
    doubtful: float = Field(
        default=0.1, ge=0, le=1, description="share of the lowest scores, searched after all"
    )
    more_views: tuple[float, ...] = Field(
        default=(25, 50, 200), description="numbers of references to take the time with"
    )
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="runs, each with a molecule of its own"
    )
    output: Path = Field(default=Path("pose-encoder.png"), description="the picture")

    def __post_init__(self) -> None:
        if self.low_snr is not None and self.low_snr >= self.snr:
            raise ValueError(f"low_snr {self.low_snr} must be below snr {self.snr}, or null")
        if self.n_train < self.batch_size:
            raise ValueError(
                f"n_train {self.n_train} should be at least batch_size {self.batch_size}: "
                "only whole batches are trained with"
            )
        if (self.box - 1) // 2 - self.max_shift * self.box / self.size < 1:
            raise ValueError(f"max_shift {self.max_shift} leaves no ring in {self.size} px")

    @property
    def rings(self) -> Rings:
        """Rings of the network's box that stay in it whatever the shift."""
        reach = self.max_shift * self.box / self.size
        return Rings(1, int((self.box - 1) // 2 - reach), angles=self.angles)


Answer = tuple[Tensor, Pose, Tensor]
"""Class index (n,), pose (n,) and score (n,), as `best_poses` gives them."""
Method = Callable[[Tensor], Answer]


class Found(NamedTuple):
    """Hypotheses for n particles, h for each.

    Attributes:
        label: (n, h) class index; pose: (n, h); score: (n, h), -inf where there is none.
    """

    label: Tensor
    pose: Pose
    score: Tensor

    def best(self, merit: Tensor | None = None) -> Answer:
        """The best of every particle by merit (n, h), by default the score."""
        column = (self.score if merit is None else merit).argmax(1)
        at = (torch.arange(len(column)), column)
        return self.label[at], self.pose[at], self.score[at]

    def few(self, most: int, margin: float) -> Found:
        """The best ``most``, but for those that score less than the best by over ``margin``."""
        score, column = self.score.topk(min(most, self.score.shape[1]), 1)
        row = torch.arange(len(score))[:, None]
        near = score >= score[:, :1] - margin
        score = score.where(near, -torch.inf)
        return Found(self.label[row, column], self.pose[row, column], score)

    def scaled(self, scale: float) -> Found:
        """Shifts in pixels of another size."""
        shift = self.pose.shift * scale
        return self._replace(pose=Pose(self.pose.angle, shift, self.pose.mirror))


class PoseEncoder(nn.Module):
    """Particles in one pass to the scores of all classes, hands and angles about a centre."""

    references: Tensor

    def __init__(self, references: Tensor, settings: Settings) -> None:
        """References are (k, size, size), of the particles' box."""
        super().__init__()
        self.settings = settings
        self.scale = settings.size / settings.box  # pixels of the particles to one of the network's
        self.deviation = 1 / (torch.pi**0.5 * settings.rings.last_ring)  # of a score of noise
        self.spectra, self.correlate = RingSpectra(settings.rings), RotationalCorrelation()
        small = fourier_shrink(references, settings.box)
        self.register_buffer("references", reference_spectra(small, settings.rings), False)
        centres = nn.Linear(settings.hidden // 2, 2 * settings.heads)
        nn.init.normal_(centres.bias, std=0.3)  # guesses that start alike would stay alike
        self.network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(settings.box**2, settings.hidden),
            nn.ReLU(),
            nn.Linear(settings.hidden, settings.hidden // 2),
            nn.ReLU(),
            centres,
            nn.Tanh(),
        )

    def centres(self, small: Tensor) -> Tensor:
        """(n, heads, 2) shifts of particles (n, box, box), in their pixels."""
        reach = 1.2 * self.settings.max_shift / self.scale
        return reach * self.network(small).unflatten(1, (-1, 2))

    def forward(self, small: Tensor, shifts: Tensor) -> Tensor:
        """Scores (n, k, s, hands, a) of particles (n, box, box) about shifts (n, s, 2)."""
        return self.correlate(self.spectra(small, shifts), self.references)

    def loss(self, small: Tensor) -> Tensor:
        """Minus the expected score and T times the entropy; see the top of this file."""
        t = self.settings.temperature
        return -t * (self(small, self.centres(small)).flatten(1) / t).logsumexp(1).mean()

    @torch.no_grad()
    def predict(self, small: Tensor, shifts: Tensor | None = None) -> Found:
        """The best few (class, hand) of every particle (n, box, box), in its full pixels.

        The angle is the mean over q of its class, hand and centre, which is finer than the grid.
        Trial shifts (1, s, 2) may take the place of the predicted ones.
        """
        each = self.settings.heads if shifts is None else shifts.shape[1]
        parts = [self._predict(part, shifts) for part in small.split(max(1, CHUNK // each))]
        labels, poses, scores = zip(*parts, strict=True)
        return Found(torch.cat(labels), Pose.cat(poses), torch.cat(scores))

    def _predict(self, small: Tensor, shifts: Tensor | None) -> Found:
        shifts = self.centres(small) if shifts is None else shifts.expand(len(small), -1, -1)
        table = self(small, shifts)  # (n, k, s, hands, a)
        peak, nearest = table.amax(4).max(2)  # (n, k, hands)
        count = min(self.settings.candidates, peak[0].numel())
        score, which = peak.flatten(1).topk(count, 1)  # (n, h)
        row, label, hand = torch.arange(len(small))[:, None], which // 2, which % 2
        place = nearest.flatten(1).gather(1, which)
        around = table[row, label, place, hand]  # (n, h, a)
        angle = mean_angle((around / self.settings.temperature).softmax(2))
        pose = Pose(angle, shifts[row, place] * self.scale, hand.bool())
        return Found(label, pose, score).few(count, self.settings.margin * self.deviation)


def mean_angle(weight: Tensor) -> Tensor:
    """Circular means in degrees of weights (..., a) over equally spaced angles."""
    angle = torch.arange(weight.shape[-1]) * (2 * torch.pi / weight.shape[-1])
    return torch.rad2deg(torch.atan2(weight @ angle.sin(), weight @ angle.cos()))


def refine_each(images: Tensor, templates: Tensor, found: Found, rings: Rings, steps: int) -> Found:
    """Refine every hypothesis for images (n, h, w) that is still there."""
    row, column = found.score.isfinite().nonzero(as_tuple=True)
    pose, score = refine_on(
        images[row], templates, found.label[row, column], found.pose[row, column], rings, steps
    )
    at = (row, column)
    angle = found.pose.angle.index_put(at, pose.angle)
    shift = found.pose.shift.index_put(at, pose.shift)
    refined = torch.full_like(found.score, -torch.inf).index_put(at, score)
    return Found(found.label, Pose(angle, shift, found.pose.mirror), refined)


class Aligner:
    """Encoder and references made ready: particles in, classes and poses out."""

    def __init__(self, encoder: PoseEncoder, references: Tensor) -> None:
        settings = encoder.settings
        self.encoder, self.scale = encoder, encoder.scale
        self.low = templates_of(fourier_shrink(references, settings.box))
        self.fine = templates_of(references)
        self.rings = Search(max_shift=settings.max_shift).rings(settings.size)

    def predict(self, images: Tensor) -> Answer:
        """The encoder alone."""
        return self.encoder.predict(fourier_shrink(images, self.encoder.settings.box)).best()

    def align(self, images: Tensor, shifts: Tensor | None = None) -> Answer:
        """The best few predictions refined at the network's resolution, the best of all at full."""
        small = fourier_shrink(images, self.encoder.settings.box)
        found = self.encoder.predict(small, shifts).scaled(1 / self.scale)
        found = refine_each(small, self.low, found, self.encoder.settings.rings, LOW_STEPS)
        found = found.few(FINAL, FINAL_MARGIN * self.encoder.deviation).scaled(self.scale)
        fine = refine_each(images, self.fine, found, self.rings, FINE_STEPS)
        return fine.best(fine.score + found.score)

    def align_with(self, search: Method, images: Tensor) -> Answer:
        """`align`; the share ``doubtful`` of the particles, of the lowest scores, is searched."""
        label, pose, score = self.align(images)
        count = round(self.encoder.settings.doubtful * len(score))
        if not count:
            return label, pose, score
        rows = (score.topk(count, largest=False).indices,)
        named, other, scored = search(images[rows])
        angle = pose.angle.index_put(rows, other.angle)
        shift = pose.shift.index_put(rows, other.shift)
        mirror = pose.mirror.index_put(rows, other.mirror)
        label, score = label.index_put(rows, named), score.index_put(rows, scored)
        return label, Pose(angle, shift, mirror), score


def train(encoder: PoseEncoder, particles: Tensor, seed: int) -> tuple[list[float], float]:
    """Train with particles (n, size, size): the loss of every epoch, and seconds."""
    settings = encoder.settings
    torch.manual_seed(seed)
    keep_freed_memory()
    start = time.perf_counter()
    small = TensorStack(fourier_shrink(particles, settings.box))
    batches = DataLoader(
        ParticleDataset(small, RandomPose()), settings.batch_size, shuffle=True, drop_last=True
    )
    optimizer = torch.optim.AdamW(encoder.parameters(), settings.learning_rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * len(batches)
    )
    curve = []
    for _ in range(settings.epochs):
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = encoder.loss(batch["image"])
            loss.backward()
            optimizer.step()
            cycle.step()
            losses.append(loss.item())
        curve.append(sum(losses) / len(losses))
    return curve, time.perf_counter() - start


@contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """With or without the compiled search, where there is one."""
    before = os.environ.get(CRYOALIGN_NO_KERNELS)
    os.environ[CRYOALIGN_NO_KERNELS] = "0" if wanted else "1"
    try:
        yield
    finally:
        del os.environ[CRYOALIGN_NO_KERNELS]
        if before is not None:
            os.environ[CRYOALIGN_NO_KERNELS] = before


def searches(references: Tensor, settings: Settings, exhaustive: bool) -> dict[str, Method]:
    """What the encoder is compared with."""

    def searched(mode: Literal["adaptive", "exhaustive"], compiled: bool) -> Method:
        target = prepare_target(references, Search(max_shift=settings.max_shift, mode=mode))

        def method(images: Tensor) -> Answer:
            with kernels(compiled):
                return best_poses(images, target)

        return method

    found = {"search": searched("adaptive", False)}
    if cpu.usable():
        found["search, compiled"] = searched("adaptive", True)
    if exhaustive:
        name = "exhaustive, compiled" if cpu.usable() else "exhaustive search"
        found[name] = searched("exhaustive", cpu.usable())
    return found


def trial_shifts(settings: Settings, step: float) -> Tensor:
    """(1, s, 2) shifts of a search in place of the network's, ``step`` px apart, in its pixels."""
    count = max(1, round(2 * settings.max_shift / step))
    axis = (torch.arange(count) - (count - 1) / 2) * (2 * settings.max_shift / count)
    return torch.cartesian_prod(axis, axis)[None] * (settings.box / settings.size)


def judge(methods: dict[str, Method], data: Simulation, n: int, timed: int = 128) -> pd.DataFrame:
    """A row per method: how right its poses of the first n particles are, and ms a particle.

    Times are medians of three, taken in turn, with one thread.
    """
    images, truth, view = data.images[:n], data.pose[:n], data.class_number[:n] - 1
    rows = {}
    for name, method in methods.items():
        label, pose, _ = method(images)
        right = (label == view) & (pose.mirror == truth.mirror)
        turn = wrap_degrees(pose.angle - truth.angle).abs()
        move = (pose.shift - truth.shift).norm(dim=1)
        rows[name] = {
            "class, hand %": 100 * float(right.float().mean()),
            "angle °": float(turn[right].median()),
            "shift px": float(move[right].median()),
            "right %": 100 * float((right & (turn < 10) & (move < 2)).float().mean()),
            "error": torch.where(right, pixel_errors(pose, truth), torch.inf),
        }
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(3):
        for name, method in methods.items():
            start = time.perf_counter()
            method(images[:timed])
            taken[name].append(1e3 * (time.perf_counter() - start) / len(images[:timed]))
    for name, times in taken.items():
        rows[name]["ms"] = sorted(times)[1]
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").reset_index()


def pixel_errors(pose: Pose, truth: Pose, radius: float = 20.0) -> Tensor:
    """(n,) px: how far off a point of the particle is, root mean square of the disc."""
    turn = torch.deg2rad(pose.angle - truth.angle) / 2
    return ((pose.shift - truth.shift).square().sum(1) + 2 * (radius * turn.sin()) ** 2).sqrt()


class Run(NamedTuple):
    """One seed at one SNR.

    Attributes:
        table: `judge`'s, with seed and snr; curve: loss of every epoch; seconds: of training.
    """

    table: pd.DataFrame
    curve: list[float]
    seconds: float


def run(
    settings: Settings, data: Simulation, seed: int, snr: float, other: PoseEncoder | None
) -> tuple[Run, PoseEncoder]:
    """Train on the last particles, judge on the first; ``other`` is of another molecule."""
    torch.manual_seed(seed)
    encoder = PoseEncoder(data.views, settings)
    curve, seconds = train(encoder, data.images[settings.n_test :], seed)
    aligner = Aligner(encoder, data.views)
    found = searches(data.views, settings, exhaustive=True)
    methods: dict[str, Method] = {"encoder": aligner.predict, "encoder, refined": aligner.align}
    for name in [each for each in found if each.startswith("search")]:
        methods[f"encoder, then {name}"] = partial(aligner.align_with, found[name])
    tried = partial(aligner.align, shifts=trial_shifts(settings, DOUBT_STEP))
    methods["encoder, then trials"] = partial(aligner.align_with, tried)
    methods |= found
    for step in TRIAL_STEPS:
        shifts = trial_shifts(settings, step)
        methods[f"trial shifts, {step:g} px"] = partial(aligner.align, shifts=shifts)
    methods["no shift instead"] = partial(aligner.align, shifts=torch.zeros(1, 1, 2))
    if other is not None:
        stranger = PoseEncoder(data.views, settings)
        stranger.network.load_state_dict(other.network.state_dict())
        methods["encoder of another"] = Aligner(stranger, data.views).align
    table = judge(methods, data, settings.n_test).assign(seed=seed, snr=snr)
    return Run(table, curve, seconds), encoder


def times_by_views(settings: Settings, encoder: PoseEncoder, seed: int) -> pd.DataFrame:
    """ms a particle with other numbers of views of the encoder's molecule, without training."""
    tables = []
    for k in map(int, settings.more_views):
        data = simulate(
            128, k, size=settings.size, snr=settings.snr, max_shift=settings.max_shift, seed=seed
        )
        same = PoseEncoder(data.views, settings)
        same.network.load_state_dict(encoder.network.state_dict())
        methods = searches(data.views, settings, exhaustive=False)
        aligner = Aligner(same, data.views)
        methods["encoder, then search"] = partial(aligner.align_with, methods["search"])
        methods["encoder, refined"] = aligner.align
        tables.append(judge(methods, data, 128).assign(k=k))
    return pd.concat(tables) if tables else pd.DataFrame()


def noisier(data: Simulation, snr: float, low: float, seed: int) -> Simulation:
    """The same particles with more noise."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randn(data.images.shape, generator=generator) * (snr / low - 1) ** 0.5
    return replace(data, images=data.images + more, sigma=(snr / low) ** 0.5)


def main(words: Sequence[str] = ()) -> pd.DataFrame:
    """Run all seeds; print the tables, draw; the table of all runs."""
    settings = settings_from_words(Settings, YAML, words, __doc__)
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # times of one core
    try:
        runs, by_views = all_runs(settings)
    finally:
        torch.set_num_threads(threads)
    table = pd.concat([each.table for each in runs])
    report(settings, runs, table, by_views)
    plot.save(draw(settings, runs, table, by_views), settings.output, dpi=85)
    print(f"{settings.output} is written; {time.perf_counter() - start:.0f} s in all")
    return table.drop(columns="error")


def all_runs(settings: Settings) -> tuple[list[Run], pd.DataFrame]:
    """Every seed at every SNR, and times by numbers of views for the first."""
    runs, by_views, other = [], pd.DataFrame(), None
    n = settings.n_test + settings.n_train
    for seed in settings.seeds:
        data = simulate(
            n,
            settings.n_views,
            size=settings.size,
            snr=settings.snr,
            max_shift=settings.max_shift,
            seed=seed,
        )
        done, other = run(settings, data, seed, settings.snr, other)
        runs.append(done)
        if seed == settings.seeds[0]:
            by_views = times_by_views(settings, other, seed)
        if settings.low_snr is not None:
            data = noisier(data, settings.snr, settings.low_snr, seed)
            runs.append(run(settings, data, seed, settings.low_snr, None)[0])
    return runs, by_views


def report(
    settings: Settings, runs: list[Run], table: pd.DataFrame, by_views: pd.DataFrame
) -> None:
    """Print every seed, then mean ± standard deviation over seeds."""
    columns = ["class, hand %", "angle °", "shift px", "right %", "ms"]
    plain = table.drop(columns="error")
    print(plain[["snr", "seed", "method", *columns]].round(3).to_string(index=False))
    grouped = plain.groupby(["snr", "method"], sort=False)[columns]
    words, several = grouped.mean().round(2).astype(str), len(settings.seeds) > 1
    if several:
        words += " ± " + grouped.std().round(2).astype(str)
    over = f"mean ± standard deviation of {len(settings.seeds)} seeds" if several else "one seed"
    print(f"\n{over}, K = {settings.n_views}")
    print(words.to_string())
    high = plain[plain.snr == settings.snr]
    cost = high.pivot(index="seed", columns="method", values="ms")
    right = high.groupby("method")["right %"].mean()
    seconds = sum(each.seconds for each in runs) / len(runs)
    print(f"training takes {seconds:.0f} s; at SNR {settings.snr:g}:")
    names = [str(each) for each in cost]
    for mine in [each for each in names if each.startswith("encoder, ")]:
        for name in [each for each in names if each.startswith(("search", "exhaust", "trial"))]:
            ratio, saved = cost[name] / cost[mine], float((cost[name] - cost[mine]).mean())
            if (less := right[name] - right[mine]) > WORSE:
                pays = f"but {less:.1f} points fewer are right"
            else:
                pays = (
                    f"pays after {1e3 * seconds / saved:,.0f} particles" if saved > 0 else "no gain"
                )
            spread = f" ± {ratio.std():.1f}" if several else ""
            print(f"{mine}: {name} / this = {ratio.mean():.1f}{spread}; {pays}")
    if len(by_views):
        print("\nother numbers of views of the first molecule, the encoder as it is")
        print(by_views.pivot(index="k", columns="method", values="ms").round(2).to_string())
        print(by_views.pivot(index="k", columns="method", values="right %").round(1).to_string())


COLOURS = {
    "search": plot.INK,
    "search, compiled": plot.GREY,
    "encoder": "#f6ad55",
    "encoder, refined": plot.ORANGE,
    "encoder, then search": "#9c4221",
    "encoder, then trials": "#2f855a",
    "trial shifts, 3 px": plot.BLUE,
}


def draw(
    settings: Settings, runs: list[Run], table: pd.DataFrame, by_views: pd.DataFrame
) -> Figure:
    """Training, errors, accuracy against time, time against the number of references."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_training(axes[0, 0], runs)
    draw_errors(axes[0, 1], table[table.snr == settings.snr], settings.snr)
    draw_accuracy(axes[1, 0], table, settings)
    draw_times(axes[1, 1], table[table.snr == settings.snr], by_views, settings)
    for each in axes.flat:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure


def draw_training(axes: Axes, runs: list[Run]) -> None:
    """Minus the loss of every epoch."""
    for each in runs:
        snr = each.table.snr.iloc[0]
        first = each.table.seed.iloc[0] == runs[0].table.seed.iloc[0]
        colour = plot.ORANGE if snr == runs[0].table.snr.iloc[0] else plot.BLUE
        label = f"SNR {snr:g}" if first else None
        epochs = range(1, len(each.curve) + 1)
        axes.plot(epochs, [-x for x in each.curve], "o-", ms=3, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="expected score + T entropy", title="training, every seed")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def draw_errors(axes: Axes, table: pd.DataFrame, snr: float) -> None:
    """Share of particles whose error is below x; those of the wrong class or hand never are."""
    for name in ("search", "encoder, then search", "encoder, refined", "encoder"):
        error = torch.cat(list(table[table.method == name].error)).sort().values
        share = 100 * torch.arange(1, len(error) + 1) / len(error)
        there = error.isfinite()
        style = "--" if name == "search" else "-"
        axes.plot(error[there], share[there], style, color=COLOURS[name], label=name, lw=2)
    axes.set(
        xscale="log",
        xlim=(0.05, 10),
        ylim=(0, 101),
        xlabel="error of the pose on the particle (px)",
        ylabel="particles within (%)",
        title=f"errors at SNR {snr:g}, all seeds",
    )
    axes.legend(frameon=False, loc="lower right")


def draw_accuracy(axes: Axes, table: pd.DataFrame, settings: Settings) -> None:
    """Share right against time, a point a seed."""
    for (snr, name), rows in table.groupby(["snr", "method"], sort=False):
        if name in COLOURS:
            high = snr == settings.snr
            axes.scatter(
                rows.ms,
                rows["right %"],
                s=44,
                marker="o" if high else "v",
                color=COLOURS[name],
                edgecolors="white",
                linewidths=0.6,
                label=name if high else None,
                zorder=3,
            )
    low = "" if settings.low_snr is None else f", triangles {settings.low_snr:g}"
    axes.set(
        xscale="log",
        xlabel="time (ms a particle, one core)",
        ylabel="view, hand, 10° and 2 px right (%)",
        title=f"circles: SNR {settings.snr:g}{low}; every seed",
    )
    axes.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize="small", loc="lower right")


def draw_times(axes: Axes, table: pd.DataFrame, by_views: pd.DataFrame, settings: Settings) -> None:
    """Time against the number of references."""
    own = table.assign(k=settings.n_views)
    everything = pd.concat([own[own.seed == settings.seeds[0]], by_views])
    for name in ("search", "search, compiled", "encoder, then search", "encoder, refined"):
        rows = everything[everything.method == name].sort_values("k")
        if len(rows):
            axes.plot(rows.k, rows.ms, "o-", color=COLOURS[name], label=name, lw=2)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="references",
        ylabel="time (ms a particle, one core)",
        title="cost of more references",
    )
    ticks = sorted(set(everything.k))
    axes.set_xticks(ticks, [str(int(k)) for k in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.legend(frameon=False)


if __name__ == "__main__":
    main(sys.argv[1:])
