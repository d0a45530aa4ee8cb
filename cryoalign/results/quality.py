"""The quality of a result: of every particle, of every class, and of the run."""

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
from cryoalign.results.averages import ClassSums, class_sums, ctf_weighted_sums
from cryoalign.results.evidence import LEAST_EVIDENCE, Scope, judge
from cryoalign.runtime.settings import settings


@settings
class Quality:
    """What happens to particles that are recognised as junk."""

    junk: Literal["mark", "set_aside"] = Field(
        default="mark",
        description="mark: keep junk in its classes, with a junk score above 0; set_aside: leave "
        "junk out of the classes",
    )


def conclude(
    particles: PreparedParticles, found: Found, sums: ClassSums, scope: Scope,
    history: list[dict[str, Any]], quality: Quality | None = None, *,
    known: dict[str, Tensor] | None = None, by_class: pd.DataFrame | None = None,
    by_row: pd.DataFrame | None = None,
) -> Alignment:  # fmt: skip
    """Make the result of any method: scores for junk, error bars, and classes sorted by size.

    Args:
        particles: the n particles that were aligned.
        found: (n,) their classes, poses and scores.
        sums: sums of their classes. If phases are flipped, the averages of the result are made
            anew, weighted by CTF^2.
        scope: which poses were tried.
        history: a row per step.
        quality: what happens to junk; None marks it.
        known: further columns (n,) about the particles.
        by_class: k rows of further columns about the classes.
        by_row: further columns about all rows of the input.

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
    final = sums
    if particles.flipped:  # then there are CTFs
        final = ctf_weighted_sums(particles, pose, label, len(order))
    n, rows, size, scale = len(particles.stack), particles.rows, particles.size, particles.scale
    curves = final.frc(scope.mask)
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
        averages=final.averages().cpu(),
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
    """The reason why each of the particles marked in ``those`` (n,) is junk."""
    noise = judged["evidence"][those] < LEAST_EVIDENCE
    return ["junk: no more than noise" if n else "junk: unlike the others" for n in noise.tolist()]


def posterior_and_margin(share: Tensor, runner_up: Tensor) -> dict[str, Tensor]:
    """How certain the likeliest class of each particle is.

    Args:
        share: (n,) posterior of the likeliest class.
        runner_up: (n,) posterior of the second likeliest class.

    Returns:
        ``posterior``, that of the likeliest class, and ``margin``, its log-odds against the second
        class in nats; at most 87, the limit of float32.
    """
    return {"posterior": share, "margin": share.log() - runner_up.clamp(min=1e-38).log()}


def compactness(sums: ClassSums, mask: Tensor) -> Tensor:
    """(k,) intraclass correlation (Fisher 1925) of aligned members under a mask (size, size).

    This is the share of a member's variance under the mask that all members have in common: the
    covariance of the half-averages, divided by itself plus the noise variance of one member. It is
    NaN if a half is empty or if there are no more than two members.
    """
    halves = torch.stack([masked(each, mask) for each in sums.half_averages()]).double()
    common = (halves[0] * halves[1]).sum((1, 2)).clamp(min=0)  # (k,)
    noise = (halves.square().sum((2, 3)) - common) * sums.count  # (2, k)
    noise = noise.mean(0).clamp(min=0)
    enough = (sums.count.amin(0) > 0) & (sums.sizes > 2)
    share = common / (common + noise).clamp(min=1e-300)
    return torch.where(enough, share, torch.nan).float()


def judge_classes(compact: Tensor, label: Tensor, junk: Tensor) -> pd.DataFrame:
    """Compactness, share of junk and rank of k classes.

    Args:
        compact: (k,) `compactness`.
        label: (n,) class index.
        junk: (n,) junk score.

    Returns:
        One row per class: compactness; junk_share, the share of members with a junk score above
        zero; rank, 1 for the best class, by compactness times the share of members without junk.
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
    """exp of the entropy of class sizes (k,): k if all sizes are equal, 1 if one class has all
    particles."""
    share = sizes.double() / sizes.sum().clamp(min=1)
    return float(torch.special.entr(share).sum().exp())
