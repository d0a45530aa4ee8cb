"""What each way of moving images loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from bench.result import Result, Row
from bench.timing import measure
from cryoalign.images.fourier import fourier_resize
from cryoalign.images.geometry import Interpolation, pixel_grid, sample, transform
from cryoalign.images.masks import soft_mask
from cryoalign.particles.simulate import phantom, project, spread_views
from cryoalign.pose import Pose

SHELLS = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
"""Where the loss is read, in parts of the Nyquist frequency (within ±1/40 of it)."""

Mover = Callable[[Tensor, Pose], Tensor]


def upsampled(factor: int, interpolation: Interpolation) -> Mover:
    """Move by interpolating an image that was padded in Fourier space to ``factor`` its size."""

    def move(images: Tensor, pose: Pose) -> Tensor:
        target = pixel_grid((images.shape[-2], images.shape[-1]), images)
        source = target.flatten(0, 1) @ pose.linear() - pose.shift.unsqueeze(1)
        fine = fourier_resize(images, factor * images.shape[-1])
        return sample(fine, factor * source.reshape(len(images), *target.shape), interpolation)

    return move


WAYS: dict[str, Mover] = {
    "bilinear": lambda images, pose: transform(images, pose, "bilinear"),
    "bicubic": lambda images, pose: transform(images, pose, "bicubic"),
    "x2, bilinear": upsampled(2, "bilinear"),
    "x2, bicubic": upsampled(2, "bicubic"),
}


def run(
    n: Annotated[int, "images"] = 256,
    size: Annotated[int, "box, px"] = 90,
    seed: Annotated[int, "of phantom, poses and noise"] = 0,
    repeats: Annotated[int, "timings, of which the median counts"] = 5,
) -> Result:
    """Signal and noise that rotating and shifting by interpolation lose, by frequency.

    Projections of a Gaussian phantom are evaluated exactly at random poses, moved back by each
    way, and compared with the exact views. Signal: the part of the true amplitudes that is left
    (regression on the truth). Error: rms deviation over rms amplitude. Noise: the power that is
    left of white noise moved alike. SNR: signal squared over noise power, what an average of
    many particles keeps; 1 is no loss. x2: Fourier-padded to twice the box before.
    """
    generator = torch.Generator().manual_seed(seed)
    angle = 360 * torch.rand(n, generator=generator) - 180
    shift = 6 * torch.rand(n, 2, generator=generator) - 3
    pose = Pose(angle, shift, torch.rand(n, generator=generator) < 0.5)
    molecule, directions = phantom(seed, radius=0.25 * size), spread_views(n, seed)
    truth = project(molecule, directions, size=size)
    moved = project(molecule, directions, pose, size=size)
    noise = torch.randn(n, size, size, generator=generator)
    # A disc that no pose brings to the box's edge.
    disc = soft_mask(size, 0.3 * size, 0.1 * size)
    stages = {name: (lambda way=way: way(moved, pose)) for name, way in WAYS.items()}
    times = measure(stages, torch.device("cpu"), repeats)
    rows = []
    for name, way in WAYS.items():
        row: Row = {"way": name, "CPU ms/image": 1e3 * times[name].cpu / n}
        signal = _by_shell(way(moved, pose), truth)
        power = _by_shell(way(noise, pose) * disc, noise * disc)
        for shell in SHELLS:
            row[f"signal {shell}"] = signal[shell][0]
            row[f"error {shell}"] = signal[shell][1]
            row[f"noise {shell}"] = power[shell][2]
            row[f"SNR {shell}"] = signal[shell][0] ** 2 / power[shell][2]
        row["noise, all"] = float((way(noise, pose) * disc).square().sum()) / float(
            (noise * disc).square().sum()
        )
        rows.append(row)
    return Result(rows, [f"{n} images of {size} px; frequencies in parts of Nyquist"])


def _by_shell(images: Tensor, truth: Tensor) -> dict[str, tuple[float, float, float]]:
    """Gain on the truth, relative rms error and ratio of powers, in each shell."""
    found, true = torch.fft.fft2(images.double()), torch.fft.fft2(truth.double())
    k = torch.fft.fftfreq(images.shape[-1])
    radius = 2 * torch.hypot(k[:, None], k)  # 1 is Nyquist
    answers = {}
    for name, centre in SHELLS.items():
        shell = (radius - centre).abs() < 1 / 40
        f, t = found[:, shell], true[:, shell]
        power = t.abs().square().sum()
        gain = (f * t.conj()).real.sum() / power
        error = ((f - t).abs().square().sum() / power).sqrt()
        answers[name] = (float(gain), float(error), float(f.abs().square().sum() / power))
    return answers
