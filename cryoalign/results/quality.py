"""How good a result is: what is known of every particle, every class, and the run."""

from __future__ import annotations

from typing import Literal

import pandas as pd
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from cryoalign.images import frc
from cryoalign.images.masks import masked
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.results.alignment import Alignment, over_all_rows
from cryoalign.results.averages import ClassSums, class_sums
from cryoalign.results.evidence import LEAST_EVIDENCE, Aligned, Scope, judge
from cryoalign.runtime.settings import FORBID


@dataclass(frozen=True, config=FORBID)
class Quality:
    """What becomes of particles that are judged junk.

    Attributes:
        junk: `mark` leaves them in their classes, with a junk score above zero; `set_aside` takes
            them out of classes and averages and lists them among the rejected.
    """

    junk: Literal["mark", "set_aside"] = Field(
        default="mark", description="mark: keep junk, marked, in its classes; set_aside: leave out"
    )


def conclude(
    particles: PreparedParticles,
    found: Aligned,
    sums: ClassSums,
    scope: Scope,
    history: pd.DataFrame,
    settings: Quality | None = None,
) -> Alignment:
    """The result of a method, judged.

    Args:
        particles: those that were aligned.
        found: what was found of them.
        sums: of the classes they make.
        scope: what poses were sought in.
        history: of the run.
        settings: what becomes of junk.
    """
    judged = found.known | judge(particles, found, sums, scope)
    n, rows, rejected = len(particles.stack), particles.rows, particles.rejected
    label, pose, score = found.label, found.pose, found.score
    if settings is not None and settings.junk == "set_aside":
        keep = judged["junk_score"] <= 0
        rejected = pd.concat([rejected, _reasons(rows[~keep], judged, ~keep)], ignore_index=True)
        rejected = rejected.sort_values("index", kind="stable", ignore_index=True)
        parts = (part[keep[part]] for part in particles.parts())
        sums = class_sums(
            (part for part in parts if len(part)), particles.read, pose, label, rows % 2,
            len(sums.sizes), particles.size, particles.device,
        )  # fmt: skip
        judged = {name: column[keep] for name, column in judged.items()}
        rows, label, pose, score = rows[keep], label[keep], pose[keep], score[keep]
    size, scale = particles.size, particles.scale
    curves = sums.frc(scope.mask)
    table = pd.DataFrame({name: column.numpy() for name, column in judged.items()}, rows.numpy())
    whole, class_number, scored = over_all_rows(n, rows, label, pose, score, scale)
    return Alignment(
        pose=whole,
        class_number=class_number,
        score=scored,
        averages=sums.averages().cpu(),
        frc=curves.cpu(),
        resolution=frc.resolution(curves, size, particles.pixel_size or scale).cpu(),
        class_sizes=sums.sizes.cpu(),
        history=history,
        rejected=rejected,
        pixel_size=particles.pixel_size,
        scale=scale,
        particle_quality=table.reindex(range(n)),
        class_quality=judge_classes(
            compactness(sums, scope.mask).cpu(), label, judged["junk_score"]
        ),
    )


def _reasons(rows: Tensor, judged: dict[str, Tensor], those: Tensor) -> pd.DataFrame:
    """Rows (j,) of junk as `Alignment.rejected` lists them."""
    noise = judged["evidence"][those] < LEAST_EVIDENCE
    words = ["junk: no more than noise" if n else "junk: unlike the others" for n in noise.tolist()]
    return pd.DataFrame({"index": rows.numpy(), "reason": pd.array(words, dtype="str")})


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
