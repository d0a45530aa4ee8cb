"""Alignment inside an autoencoder: latents that know the view, not how the particle lies.

An autoencoder of particles spends its latents on angle, shift and hand, which say nothing about the
molecule. Here two steps of the forward pass look for the pose instead, so that no latent need hold
it:

- the encoder's first layer is linear, a row of templates, but each response is the largest over all
  poses (`PosePool`): turned, shifted or mirrored particles get the same responses;
- the decoder draws one canonical image, which is aligned with the particle before the two are
  compared (`align_pairs`).

The operator chooses poses without a gradient, PyTorch scores and moves at the chosen ones: all
of it trains by ``loss.backward()``. With ``align`` off the same network, as many parameters, is an
ordinary autoencoder: the baseline.

python examples/autoencoder.py [SETTINGS.yaml] [key=value ...]    writes autoencoder.png; --help
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from pydantic import Field
from pydantic.dataclasses import dataclass
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cryoalign.app.schema import settings_from_words
from cryoalign.images.fourier import filter_shells, low_pass_curve
from cryoalign.images.geometry import transform
from cryoalign.images.masks import soft_mask
from cryoalign.images.polar import Rings
from cryoalign.learn.dataset import Normalise, ParticleDataset, RandomPose
from cryoalign.learn.layers import RingSpectra
from cryoalign.operators.correlation import (
    correlation_peaks,
    correlation_table,
    turned_correlation,
    unravel_place,
)
from cryoalign.particles.simulate import Simulation, simulate
from cryoalign.particles.stack import TensorStack
from cryoalign.pose import Pose
from cryoalign.report import figures as plot
from cryoalign.report.embedding import embed, neighbour_purity
from cryoalign.runtime.settings import FORBID
from cryoalign.search.refine import refine

YAML = Path(__file__).with_suffix(".yaml")
NAMES = {False: "without alignment", True: "alignment inside"}
COLORS = colormaps["tab10"]


@dataclass(frozen=True, config=FORBID)
class Settings:
    """The particles, the network, its training."""

    n_train: int = Field(default=2000, ge=1, description="particles to train with")
    n_test: int = Field(default=600, ge=10, description="particles held out")
    n_views: int = Field(default=6, ge=2, description="views of one phantom")
    size: int = Field(default=40, ge=32, description="box, px")
    snr: float = Field(default=0.1, gt=0, description="signal-to-noise ratio")
    max_shift: float = Field(default=1.0, ge=0, description="of particles; again as augmentation")
    ring_step: int = Field(default=2, ge=1, description="distance between rings, px")
    angles: int = Field(default=64, ge=8, description="in-plane angles tried")
    templates: int = Field(default=32, ge=1, description="of the encoder's first layer")
    latent: int = Field(default=8, ge=1, description="dimensions of the latent space")
    hidden: int = Field(default=64, ge=1, description="units of the encoder; twice in the decoder")
    epochs: int = Field(default=15, ge=1, description="passes over the particles")
    batch_size: int = Field(default=64, ge=2, description="particles of a step")
    learning_rate: float = Field(default=0.012, gt=0, description="the highest, of one cycle")
    workers: int = Field(default=0, ge=0, description="processes that read particles")
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="runs; each with particles of its own"
    )
    output: Path = Field(default=Path("autoencoder.png"), description="the picture")

    def __post_init__(self) -> None:
        if self.n_train < self.batch_size:
            raise ValueError(
                f"n_train {self.n_train} should be at least batch_size {self.batch_size}: "
                "only whole batches are trained with"
            )
        if (self.size - 1) // 2 - round(2 * self.max_shift) < 1:
            raise ValueError(f"max_shift {self.max_shift} leaves no ring in {self.size} px")

    @property
    def shifts(self) -> Tensor:
        """(s, 2) trial shifts: particles are simulated with one shift and augmented by another."""
        axis = torch.arange(-round(2 * self.max_shift), round(2 * self.max_shift) + 1.0)
        return torch.cartesian_prod(axis, axis)

    @property
    def rings(self) -> Rings:
        """The rings that stay in the box whatever the shift."""
        last = (self.size - 1) // 2 - round(2 * self.max_shift)
        return Rings(1, last, self.ring_step, self.angles)


def align_pairs(
    spectra: Tensor, images: Tensor, references: Tensor, rings: Rings, shifts: Tensor, fine: bool
) -> Pose:
    """(n,) the pose of every particle on a reference of its own, without a gradient.

    Args:
        spectra: (n, s, r, m) ring spectra of the particles about every trial shift.
        images, references: (n, size, size).
        rings, shifts: as ``spectra`` were made with.
        fine: refine below the grid.
    """
    with torch.no_grad():
        own = RingSpectra(rings)(references)  # (n, 1, r, m)
        table = torch.vmap(correlation_table)(spectra[:, None], own)  # (n, 1, 1, s, hands, a)
        place = unravel_place(table.flatten(1).argmax(1), rings.n_angles, mirror=True)
        angle = place.angle * (360 / rings.n_angles)
        pose = Pose(angle, shifts[place.shift], place.mirror.bool())
        if fine:
            pose, _ = refine(images, references, torch.arange(len(images)), pose, rings)
    return pose


class PosePool(nn.Module):
    """A linear layer whose responses are the largest over shifts, angles and hands."""

    def __init__(self, templates: Tensor, rings: Rings, align: bool) -> None:
        """Start from templates (k, size, size)."""
        super().__init__()
        self.templates = nn.Parameter(templates)
        self.spectra, self.angles, self.align = RingSpectra(rings), rings.n_angles, align

    def forward(self, spectra: Tensor) -> Tensor:
        """(n, k) correlation coefficients of spectra (n, s, r, m), or (n, 1, r, m) without
        alignment, where the pose is the particle's own."""
        templates = self.spectra(self.templates)[:, 0]  # (k, r, m)
        n, k = len(spectra), len(templates)
        if self.align:
            _, best = correlation_peaks(spectra, templates.detach())
            place = unravel_place(best.flatten(), self.angles, mirror=True)
        else:
            place = unravel_place(torch.zeros(n * k, dtype=torch.int64), self.angles, mirror=True)
        particles = spectra[torch.arange(n).repeat_interleave(k), place.shift]  # (n k, r, m)
        turned = place.angle * (360 / self.angles)
        own = templates.repeat(n, 1, 1)
        return turned_correlation(particles, own, turned, place.mirror.bool()).view(n, k)


class Decoded(NamedTuple):
    """What the autoencoder makes of n particles.

    Attributes:
        latent: (n, d).
        canonical: (n, size, size) the decoder's images.
        images: (n, size, size) the same, moved onto the particles.
        pose: (n,) takes the particles onto the canonical images.
    """

    latent: Tensor
    canonical: Tensor
    images: Tensor
    pose: Pose


class Autoencoder(nn.Module):
    """Particles to latents to canonical images, with alignment inside or without."""

    def __init__(self, settings: Settings, align: bool) -> None:
        super().__init__()
        size, rings = settings.size, settings.rings
        self.align, self.rings = align, rings
        self.shifts = settings.shifts if align else torch.zeros(1, 2)
        self.spectra = RingSpectra(rings)
        self.mask = soft_mask(size, rings.last_ring - 0.5, 3.0)
        # As smooth as a particle's own features: noise of all frequencies would resonate with none.
        smooth = filter_shells(
            torch.randn(settings.templates, size, size), low_pass_curve(size, 0.12)
        )
        self.encoder = nn.Sequential(
            PosePool(10 * smooth * self.mask, rings, align),
            nn.BatchNorm1d(settings.templates, affine=False),
            nn.Linear(settings.templates, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(settings.latent, 2 * settings.hidden),
            nn.GELU(),
            nn.Linear(2 * settings.hidden, size**2),
            nn.Unflatten(1, (size, size)),
        )

    def forward(self, images: Tensor) -> Decoded:
        """Particles (n, size, size), background zero. Poses are refined when not training."""
        spectra = self.spectra(images, self.shifts)  # (n, s, r, m)
        latent = self.encoder(spectra)
        canonical = self.decoder(latent) * self.mask
        if not self.align:
            return Decoded(latent, canonical, canonical, Pose.identity(len(images)))
        pose = align_pairs(
            spectra, images, canonical.detach(), self.rings, self.shifts, not self.training
        )
        # The clean image is moved, not the particle: interpolation would smooth the noise.
        return Decoded(latent, canonical, transform(canonical, pose.inverse()), pose)


class Scores(NamedTuple):
    """Of held-out particles.

    Attributes:
        purity: share of a latent's 10 neighbours that are of its view.
        rand: adjusted Rand index of k-means on the latents and the views.
        spread: distance of a particle's latents in two random poses, over the distance of two
            particles' (root mean squares): 0 is invariant, 1 is nothing but pose and noise.
        error: squared error of the reconstruction against the particle without noise, over the
            latter's square; under the mask.
    """

    purity: float
    rand: float
    spread: float
    error: float


class Data(NamedTuple):
    """Particles to train with and held out, these also moved at random, and the truth."""

    simulation: Simulation
    train: ParticleDataset
    test: ParticleDataset
    moved: ParticleDataset
    clean: Tensor  # (n_test, size, size) the held-out particles without noise
    label: np.ndarray  # (n_test,) their views, from 0


def make_data(settings: Settings, seed: int) -> Data:
    """Simulated particles, read as those of a file would be."""
    n = settings.n_train + settings.n_test
    simulation, silent = (
        simulate(
            n,
            settings.n_views,
            size=settings.size,
            snr=snr,
            max_shift=settings.max_shift,
            seed=seed,
        )
        for snr in (settings.snr, float("inf"))
    )
    stack = TensorStack(simulation.images)
    train, test = torch.arange(n).split([settings.n_train, settings.n_test])
    plain, move = Normalise(0.45 * settings.size), RandomPose(settings.max_shift)
    return Data(
        simulation,
        ParticleDataset(stack, plain, move, rows=train),
        ParticleDataset(stack, plain, rows=test),
        ParticleDataset(stack, plain, move, rows=test),
        silent.images[test] * settings.snr**0.5,
        simulation.class_number[test].numpy() - 1,
    )


def encode(model: Autoencoder, dataset: ParticleDataset) -> Decoded:
    """The model on a whole dataset, poses refined."""
    model.eval()
    with torch.no_grad():
        parts = [model(batch["image"]) for batch in DataLoader(dataset, batch_size=256)]
    model.train()
    latent, canonical, images = (torch.cat([part[i] for part in parts]) for i in range(3))
    return Decoded(latent, canonical, images, Pose.cat([part.pose for part in parts]))


def purity(model: Autoencoder, data: Data) -> float:
    """Share of the 10 nearest latents that are of a particle's own view, held out."""
    return neighbour_purity(encode(model, data.test).latent.numpy(), data.label)


def evaluate(model: Autoencoder, data: Data) -> Scores:
    """Scores of the held-out particles."""
    found = encode(model, data.test)
    one, two = (encode(model, data.moved).latent for _ in range(2))
    others = torch.cdist(one, two).square()
    n = len(others)
    apart = (others.sum() - others.diagonal().sum()) / (n * (n - 1))
    table = found.latent.numpy()
    groups = KMeans(int(data.label.max()) + 1, n_init=10, random_state=0).fit_predict(table)
    inside = model.mask > 0.5
    wrong = (found.images - data.clean)[:, inside].square().sum()
    return Scores(
        neighbour_purity(table, data.label),
        float(adjusted_rand_score(data.label, groups)),
        float((others.diagonal().mean() / apart).sqrt()),
        float(wrong / data.clean[:, inside].square().sum()),
    )


def train(
    settings: Settings, data: Data, align: bool, seed: int
) -> tuple[Autoencoder, list[float]]:
    """A trained autoencoder, and its purity before training and after every epoch."""
    torch.manual_seed(seed)
    model = Autoencoder(settings, align)
    loader = DataLoader(
        data.train, settings.batch_size, shuffle=True, drop_last=True, num_workers=settings.workers
    )
    # Templates are images, whose pixels matter only together: they take larger steps.
    pool = [p for name, p in model.named_parameters() if name.endswith("templates")]
    others = [p for name, p in model.named_parameters() if not name.endswith("templates")]
    rates = [3 * settings.learning_rate, settings.learning_rate]
    optimizer = torch.optim.Adam([{"params": pool}, {"params": others}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=settings.epochs * len(loader)
    )
    curve = [purity(model, data)]
    for _ in range(settings.epochs):
        for batch in loader:
            loss = (model.mask * (batch["image"] - model(batch["image"]).images).square()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        curve.append(purity(model, data))
    return model, curve


def main(words: list[str]) -> dict[bool, list[Scores]]:
    """Train with and without alignment; `Scores` by ``align`` and seed."""
    settings = settings_from_words(Settings, YAML, words, __doc__)
    scores: dict[bool, list[Scores]] = {False: [], True: []}
    curves: dict[bool, list[list[float]]] = {False: [], True: []}
    shown: tuple[Data, dict[bool, Autoencoder]] | None = None
    for seed in settings.seeds:
        data, models = make_data(settings, seed), {}
        for align, name in NAMES.items():
            models[align], curve = train(settings, data, align, seed)
            curves[align].append(curve)
            scores[align].append(evaluate(models[align], data))
            told = ", ".join(f"{k} {v:.3f}" for k, v in scores[align][-1]._asdict().items())
            print(f"seed {seed}, {name:>17}: {told}", flush=True)
        shown = shown or (data, models)
    assert shown is not None
    plot.save(draw(*shown, curves), settings.output, dpi=100)
    print(f"{settings.output} is written")
    return scores


def draw(
    data: Data, models: dict[bool, Autoencoder], curves: dict[bool, list[list[float]]]
) -> Figure:
    """Latents as t-SNE maps, the training, and reconstructions under the true views."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    panels = above.subplots(1, 3)
    decoded = {align: encode(model, data.test) for align, model in models.items()}
    for panel, (align, found) in zip(panels, decoded.items(), strict=False):
        place = embed(found.latent.numpy())
        panel.scatter(*place.T, c=COLORS(data.label % 10), s=9, lw=0)
        panel.set(xticks=[], yticks=[], title=f"t-SNE of latents, {NAMES[align]}")
        panel.set_box_aspect(1)
    for align, color in ((False, plot.ORANGE), (True, plot.BLUE)):
        for seed, curve in enumerate(curves[align]):
            panels[2].plot(curve, color=color, label=None if seed else NAMES[align])
    panels[2].axhline(1 / len(data.simulation.views), color=plot.GREY, ls=":", label="chance")
    panels[2].set(xlabel="epoch", ylim=(0, 1.02), title="latent neighbours of one view, held out")
    panels[2].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panels[2].spines[["top", "right"]].set_visible(False)
    panels[2].legend(frameon=False, loc="best", fontsize=9)
    show_views(below, data, models[True], decoded)
    return figure


def show_views(
    figure: SubFigure, data: Data, model: Autoencoder, decoded: dict[bool, Decoded]
) -> None:
    """A column for each view: a particle, the view, and what was made of that particle."""
    views = data.simulation.views
    chosen = [int((data.label == i).argmax()) for i in range(len(views))]
    rows = {"particle": data.test.read(chosen)["image"], "its true view": views}
    for align in (True, False):
        made = decoded[align].canonical[chosen]
        # It may lie as it likes: for the eye it is put onto the view.
        spectra = model.spectra(made, model.shifts)
        pose = align_pairs(spectra, made, views, model.rings, model.shifts, fine=True)
        rows[f"decoded,\n{NAMES[align]}"] = transform(made, pose)
    axes = figure.subplots(len(rows), len(views), squeeze=False, gridspec_kw={"wspace": 0})
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for i, (panel, image) in enumerate(zip(line, images, strict=True)):
            low, high = (image if name == "particle" else views[i]).aminmax()
            panel.imshow(image.numpy(), cmap="gray", vmin=low, vmax=high)
            panel.set(xticks=[], yticks=[])
            for spine in panel.spines.values():
                spine.set(color=COLORS(i % 10), linewidth=2)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)


if __name__ == "__main__":
    main(sys.argv[1:])
