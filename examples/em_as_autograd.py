"""Expectation maximisation is gradient ascent: ML2D by loss.backward(), optimizer.step().

With unit-vector ring spectra x, references y_k and noise of variance T in every direction,

    log p(x) = log sum_k exp(log_prior_k + (soft maximum over poses of <x, y_k>) / T - |y_k|^2 / 2T)

is `correlation_logsumexp` and a logsumexp over classes. Its gradient by log_prior_k is the number
N_k of particles in class k, by y_k it is N_k / T times (weighted class average - y_k): a step of
plain SGD with learning rate T / N_k is the closed-form update. (Sigworth 1998; Scheres 2005.)

python examples/em_as_autograd.py    writes em-as-autograd.png
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from cryoalign.images.polar import Rings, ring_spectra
from cryoalign.operators.correlation import correlation_logsumexp, correlation_table
from cryoalign.particles.simulate import simulate
from cryoalign.report import figures as plot


def multiplicity(spectra: Tensor) -> Tensor:
    """(m,) how often irfft at the angle zero counts each frequency, over the number of angles."""
    m = spectra.shape[-1]
    count = torch.full((m,), 2.0, dtype=spectra.real.dtype)
    count[0] = count[-1] = 1.0
    return count / (2 * (m - 1))


def log_likelihood(x: Tensor, z: Tensor, log_prior: Tensor, temperature: float) -> Tensor:
    """(n, k) joint of particles x (n, s, r, m) and classes; z (k, r, m) = y sqrt(multiplicity),
    in which a unit is the same length along every frequency."""
    soft = correlation_logsumexp(x, z / multiplicity(x).sqrt(), temperature)
    power = torch.view_as_real(z).square().sum((1, 2, 3))
    return log_prior + (soft - power / 2) / temperature


def closed_form(x: Tensor, z: Tensor, log_prior: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The update in plain words: weights of every class and pose, and the weighted average of the
    particles, each turned and mirrored to every pose. Returns z (k, r, m), N (k,), log p."""
    scale = multiplicity(x).sqrt()
    table = correlation_table(x, z / scale)  # (n, k, s, hands, a)
    power = torch.view_as_real(z).square().sum((1, 2, 3))
    logits = (table - power[:, None, None, None] / 2) / temperature
    logits = logits + log_prior[:, None, None, None]
    evidence = logits.flatten(1).logsumexp(1)
    weight = (logits - evidence[:, None, None, None, None]).exp()
    m, angles = x.shape[-1], table.shape[-1]
    turn = torch.arange(angles, dtype=scale.dtype)[:, None] * torch.arange(m)
    phase = torch.polar(torch.ones_like(turn), -2 * torch.pi / angles * turn)  # (a, m)
    sign = 1 - 2 * (torch.arange(m) % 2)
    total = torch.zeros_like(z)
    for a in range(angles):
        moved = x * phase[a].to(x.dtype)  # (n, s, r, m)
        for hand, image in enumerate((moved, sign * moved.conj())):
            total += torch.einsum("nks,nsrm->krm", weight[:, :, :, hand, a].to(x.dtype), image)
    size = weight.sum((0, 2, 3, 4))
    return total / size[:, None, None] * scale, size, evidence.sum()


def main(
    output: Path | None = Path("em-as-autograd.png"), n: int = 150, steps: int = 12
) -> tuple[float, float]:
    """Run both; return their largest difference and the adjusted Rand index."""
    data = simulate(n, n_classes=3, size=40, snr=0.3, max_shift=1.0, seed=4)
    rings = Rings(1, 15, angles=96)
    axis = torch.arange(-1, 2.0)
    x = ring_spectra(data.images, rings, torch.cartesian_prod(axis, axis))
    temperature = 1 / (torch.pi * rings.last_ring**2)  # unit noise over the disc's pixels
    first = 0.5 * x[[0, 2, 4], 4] * multiplicity(x).sqrt()

    by_hand, prior = first, torch.zeros(3)
    z = [torch.nn.Parameter(each.clone()) for each in first]
    log_prior = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [each], "lr": 0.0} for each in z])
    curves: list[tuple[float, float]] = []
    for _ in range(steps):
        optimizer.zero_grad()
        joint = log_likelihood(x, torch.stack(list(z)), log_prior, temperature)
        loss = -joint.logsumexp(1).sum()
        loss.backward()
        assert log_prior.grad is not None
        size = -log_prior.grad
        for group, members in zip(optimizer.param_groups, size.tolist(), strict=True):
            group["lr"] = temperature / members
        optimizer.step()
        log_prior = (size / n).log().requires_grad_()

        by_hand, size, evidence = closed_form(x, by_hand, prior, temperature)
        prior = (size / n).log()
        curves.append((-loss.item(), evidence.item()))

    trained = torch.stack(list(z)).detach()
    difference = float((trained - by_hand).abs().max() / by_hand.abs().max())
    label = log_likelihood(x, trained, log_prior, temperature).argmax(1)
    rand = adjusted_rand_score(data.class_number, label)
    print(f"largest difference {difference:.1e} of the largest value; ARI {rand:.2f}")
    if output is not None:
        draw(trained, by_hand, curves, rings, output)
        print(f"{output} is written")
    return difference, rand


def draw(
    trained: Tensor, by_hand: Tensor, curves: list[tuple[float, float]], rings: Rings, output: Path
) -> None:
    """References of both, in polar coordinates, and the log-likelihood of both."""
    figure = plt.figure(figsize=(12, 4), layout="constrained")
    discs, right = figure.subfigures(1, 2)
    edge = torch.linspace(0, 2 * torch.pi, rings.n_angles + 1)
    radii = torch.arange(rings.first_ring, rings.last_ring + 2) - 0.5
    for row, (name, z) in enumerate([("autograd", trained), ("closed form", by_hand)]):
        y = z / multiplicity(z).sqrt() / rings.weights().sqrt()[:, None]
        for column, image in enumerate(torch.fft.irfft(y, n=rings.n_angles)):
            axes = discs.add_subplot(2, 3, 3 * row + column + 1, projection="polar")
            axes.pcolormesh(edge.numpy(), radii.numpy(), image.numpy(), cmap="gray")
            axes.set(xticks=[], yticks=[], theta_direction=-1, title=f"{name} {column + 1}")
    axes = right.subplots()
    ours, theirs = zip(*curves, strict=True)
    axes.plot(ours, label="autograd", linewidth=4, alpha=0.4)
    axes.plot(theirs, "--", label="closed form")
    axes.set(xlabel="step", title="log-likelihood")
    axes.yaxis.tick_right()
    axes.legend()
    plot.save(figure, output)


if __name__ == "__main__":
    main()
