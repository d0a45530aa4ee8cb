"""How good a result is: what is known of every particle, every class, and the run."""

from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from cryoalign.images import frc
from cryoalign.images.masks import masked
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.pose import Found
from cryoalign.results.alignment import Alignment, over_all_rows
from cryoalign.results.averages import ClassSums, class_sums
from cryoalign.results.evidence import LEAST_EVIDENCE, Scope, judge
from cryoalign.runtime.settings import settings


@settings
class Quality:
    """What becomes of particles that are judged junk."""

    junk: Literal["mark", "set_aside"] = Field(
        default="mark", description="mark: keep junk, marked, in its classes; set_aside: leave out"
    )


def conclude(
    particles: PreparedParticles,
    found: Found,
    sums: ClassSums,
    scope: Scope,
    history: list[dict[str, Any]],
    quality: Quality | None = None,
    *,
    known: dict[str, Tensor] | None = None,
    by_class: pd.DataFrame | None = None,
    by_row: pd.DataFrame | None = None,
) -> Alignment:
    """The result of every method: judged, with error bars, classes sorted by size.

    Args:
        particles: those that were aligned.
        found: (n,) their classes, poses and scores.
        sums: of the classes that they make.
        scope: which poses were tried.
        history: a row per step.
        quality: what becomes of junk; None marks it.
        known: columns (n,) that the method knows of the particles besides.
        by_class: k rows that it knows of the classes.
        by_row: columns that it knows of all rows of the input.

    Returns:
        The `Alignment`. Class 1 is the largest.
    """
    judged = (known or {}) | judge(particles, found, sums, scope)
    label, pose, score = found
    if quality is not None and quality.junk == "set_aside":
        keep = judged["junk_score"] <= 0
        particles = particles.only(keep.nonzero().squeeze(1), _reasons(judged, ~keep))
        judged = {name: column[keep] for name, column in judged.items()}
        label, pose, score = label[keep], pose[keep], score[keep]
        sums = class_sums(particles, pose, label, len(sums.sizes))
    order = sums.sizes.argsort(descending=True, stable=True)
    sums, order = sums.ordered(order), order.cpu()
    label = order.argsort()[label]
    n, rows, size, scale = len(particles.stack), particles.rows, particles.size, particles.scale
    curves = sums.frc(scope.mask)
    table = pd.DataFrame({name: column.numpy() for name, column in judged.items()}, rows.numpy())
    whole, class_number, scored = over_all_rows(n, rows, label, pose, score, scale)
    compact = compactness(sums, scope.mask).cpu()
    classes = [judge_classes(compact, label, judged["junk_score"])]
    if by_class is not None:
        classes.insert(0, by_class.iloc[order.numpy()].reset_index(drop=True))
    return Alignment(
        pose=whole,
        class_number=class_number,
        score=scored,
        averages=sums.averages().cpu(),
        frc=curves.cpu(),
        resolution=frc.resolution(curves, size, particles.pixel_size or scale).cpu(),
        class_sizes=sums.sizes.cpu(),
        history=pd.DataFrame(history),
        rejected=particles.rejected,
        pixel_size=particles.pixel_size,
        scale=scale,
        particle_quality=pd.concat([by_row, table.reindex(range(n))], axis=1),
        class_quality=pd.concat(classes, axis=1),
    )


def _reasons(judged: dict[str, Tensor], those: Tensor) -> list[str]:
    """Why each of the particles marked in ``those`` (n,) is junk."""
    noise = judged["evidence"][those] < LEAST_EVIDENCE
    return ["junk: no more than noise" if n else "junk: unlike the others" for n in noise.tolist()]


def posterior_and_margin(share: Tensor, runner_up: Tensor) -> dict[str, Tensor]:
    """How sure a soft assignment is.

    Args:
        share: (n,) posterior of the likeliest class; runner_up: (n,) of the second.

    Returns:
        ``posterior`` of the likeliest class and ``margin``, its log-odds against the second, in
        nats; 87 stands for all that float32 has no number for.
    """
    return {"posterior": share, "margin": share.log() - runner_up.clamp(min=1e-38).log()}


def compactness(sums: ClassSums, mask: Tensor) -> Tensor:
    """(k,) intraclass correlation (Fisher 1925) of aligned members under a mask (size, size).

    The share of a member's variance there that all members have in common: the covariance of the
    half-averages over itself plus the noise of one member. NaN with an empty half, or one member
    in each.
    """
    halves = torch.stack([masked(each, mask) for each in sums.half_averages()]).double()
    common = (halves[0] * halves[1]).sum((1, 2)).clamp(min=0)  # (k,)
    noise = (halves.square().sum((2, 3)) - common) * sums.count  # (2, k)
    noise = noise.mean(0).clamp(min=0)
    enough = (sums.count.amin(0) > 0) & (sums.sizes > 2)
    share = common / (common + noise).clamp(min=1e-300)
    return torch.where(enough, share, torch.nan).float()


def judge_classes(compact: Tensor, label: Tensor, junk: Tensor) -> pd.DataFrame:
    """What there is to know of k classes.

    Args:
        compact: (k,) `compactness`; label: (n,) class index; junk: (n,) junk score.

    Returns:
        One row per class: compactness; junk_share, the share of members with a junk score above
        zero; rank, 1 for the best, by compactness times the share that is no junk.
    """
    k = len(compact)
    marked = torch.bincount(label, (junk > 0).double(), minlength=k)
    share = marked / torch.bincount(label, minlength=k)  # NaN for an empty class
    worth = (compact * (1 - share)).nan_to_num(-1.0)
    rank = torch.empty(k, dtype=torch.int64)
    rank[worth.argsort(descending=True, stable=True)] = torch.arange(1, k + 1)
    return pd.DataFrame(
        {"compactness": compact.numpy(), "junk_share": share.numpy(), "rank": rank.numpy()}
    )


def effective_classes(sizes: Tensor) -> float:
    """exp of the entropy of class sizes (k,): k if all are equal, 1 if one has everything."""
    share = sizes.double() / sizes.sum().clamp(min=1)
    return float(torch.special.entr(share).sum().exp())
