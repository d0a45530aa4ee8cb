"""Classification of particles without references, by likelihood.

The classes are found on Fourier rings (`split_and_merge`); then poses are refined against the class
averages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from cryoalign.images.masks import soft_mask
from cryoalign.images.polar import Rings
from cryoalign.methods.base import Method, align_with, shows_settings
from cryoalign.methods.classify.settings import Likelihood, Plan
from cryoalign.methods.classify.split_and_merge import SplitAndMerge
from cryoalign.methods.classify.whitening import observer
from cryoalign.methods.references import refine_on_averages
from cryoalign.methods.state import State
from cryoalign.particles.prepare import PreparedParticles
from cryoalign.particles.settings import Box
from cryoalign.particles.stack import Stack
from cryoalign.results.alignment import Alignment
from cryoalign.results.averages import Averaging, class_sums
from cryoalign.results.evidence import Scope, trials_of
from cryoalign.results.quality import conclude, posterior_and_margin
from cryoalign.runtime.arrays import Array


@dataclass(frozen=True)
class Classification(Method):
    """Classification by likelihood, with CTF and noise in the model.

    Attributes:
        n_classes: number of classes.
        likelihood: how classes are found.
        averaging: how averages become the references of the last refinement.
    """

    name = "classify"
    purpose = "classes from nothing, by likelihood"
    unused = frozenset({"averaging.centre"})
    ctf_uses = ("model", "flip", "none")
    instead = {"iterations": "likelihood.cycles"}  # noqa: RUF012

    n_classes: int | None = None
    likelihood: Likelihood = field(default_factory=Likelihood)
    averaging: Averaging = field(default_factory=Averaging)

    @classmethod
    def needs_classes(cls, chosen: bool) -> bool:
        return True

    def check(self, box: Box, n: int | None = None) -> None:
        self._plan(box)
        if n is None:
            return
        if not isinstance(self.n_classes, Integral) or not 1 <= self.n_classes <= n // 2:
            raise ValueError(
                f"n_classes must be a whole number from 1 to half of the {n} usable particles, "
                f"not {self.n_classes}: use at most {n // 2}"
            )

    def start(self, particles: PreparedParticles) -> State:
        return self._work(particles).begin()

    def step(self, particles: PreparedParticles, state: State) -> State:
        work = state.unsaved.get("work") or self._work(particles)
        return work.advance(state)

    def finish(self, particles: PreparedParticles, state: State) -> Alignment:
        plan, size, device = self._plan(particles.box), particles.size, particles.device
        k, label = plan.n_classes, state["label"]
        mask = soft_mask(size, plan.radius, self.averaging.mask_edge, device)
        rings = Rings(last_ring=min(round(plan.radius), (size - 1) // 2))
        found, _ = refine_on_averages(particles, label, state.pose, k, self.averaging, mask, rings)
        trials = trials_of(k, plan.max_shift, rings.last_ring, plan.mirror)
        sums = class_sums(particles, found.pose, label, k)
        known = posterior_and_margin(state["posterior"], state["runner_up"])
        scope = Scope(mask, rings, trials)
        return conclude(particles, found, sums, scope, state.history, self.quality, known=known)

    def line(self, row: Mapping[str, Any]) -> str:
        return (
            f"step {row['iteration']:3d} ({row['step']}): {row['rings']} Fourier rings, "
            f"log-likelihood {row['log_evidence']:.3f} a particle, certainty "
            f"{row['certainty']:.0%}, classes of {row['smallest_class']} to {row['largest_class']}"
        )

    def _plan(self, box: Box) -> Plan:
        particle = self.particle
        return Plan(
            self.likelihood, self.n_classes or 1, particle.radius_or_part(box),
            particle.max_shift_in(box), particle.mirror, box.size,
        )  # fmt: skip

    def _work(self, particles: PreparedParticles) -> SplitAndMerge:
        plan, n = self._plan(particles.box), len(particles)
        optics = particles.optics if self.ctf_use(self.particle.ctf) == "model" else None
        observe = observer(
            particles.read, n, particles.size, optics, plan.ring(self.likelihood.end_detail),
            plan.radius, plan.max_shift, particles.read_shared,
        )  # fmt: skip
        return SplitAndMerge(plan, observe, particles, self.seed)


@shows_settings(Classification)
def classify(
    particles: Stack | Array | PreparedParticles, n_classes: int, **settings: Any
) -> Alignment:
    """Classify particles without references.

    Args:
        particles: as for `align_multi_reference`.
        n_classes: number of classes.
        settings: those of `Classification`, and the arguments of `base.align`. A step is the
            start, a cycle of splitting and merging, or a change to a higher resolution.

    Returns:
        The `Alignment` of the whole input, on every process. With CTFs, its averages are made of
        phase-flipped particles.

    Raises:
        ValueError: settings that do not fit, before the work starts.
    """
    return align_with(Classification, particles, n_classes=n_classes, **settings)
