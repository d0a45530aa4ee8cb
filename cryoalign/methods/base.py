"""The base class of all methods, and the loop that runs them.

The fields of a method are its settings. A method starts from prepared particles, does one step at a
time, and finishes with an `Alignment`. `align` runs these parts: it checks the settings and the
checkpoint from which it continues, if there is one, and calls a function after every step.
"""

import difflib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Any, ClassVar, Self, TypeVar

import pandas as pd
from torch import Tensor

from cryoalign.images.ctf import Optics, implausible
from cryoalign.methods.state import State
from cryoalign.particles.ctf_use import CtfUse
from cryoalign.particles.prepare import PreparedParticles, Progress, prepare
from cryoalign.particles.settings import Box, Ctf, Images, Particle
from cryoalign.particles.stack import Stack, as_stack
from cryoalign.results.alignment import Alignment
from cryoalign.results.quality import Quality
from cryoalign.runtime.arrays import Array
from cryoalign.runtime.processes import rank

MOVED = {
    "batch_size": "give it to `prepare`, and the particles that it makes to the method",
    "max_rejected": "give it to `prepare`, and the particles that it makes to the method",
    "on_iteration": "it is called on_step now",
}
"""Arguments of earlier versions, and where they went."""
Function = TypeVar("Function", bound=Callable[..., Any])
OnStep = Callable[[State], None]
"""Called with the state after every step."""


@dataclass(frozen=True)
class Method(ABC):
    """A method and its settings. A field has the name of the argument and of the YAML key.

    Attributes:
        particle: radius, largest shift, hand and CTF of the particle.
        quality: what happens to junk particles.
        seed: seed of every random choice; the same seed gives the same result on the same device.
        name: value of ``method`` in the settings.
        purpose: one line for lists of the methods.
        unused: dotted keys of its sections that the method does not use.
        instead: for some keys that the method does not use, the key that it has instead.
        in_order: whether averages are shown in the order of the column ``order`` of the class
            table, not by size.
        ctf_uses: values of ``particle.ctf`` that the method has; ``auto`` is the first.

    Raises:
        ValueError: a value of ``particle.ctf`` that the method does not have.
    """

    particle: Particle = field(default_factory=Particle)
    quality: Quality = field(default_factory=Quality)
    seed: int = 0

    name: ClassVar[str]
    purpose: ClassVar[str]
    unused: ClassVar[frozenset[str]] = frozenset()
    instead: ClassVar[dict[str, str]] = {}
    in_order: ClassVar[bool] = False
    ctf_uses: ClassVar[tuple[CtfUse, ...]] = ("flip", "none")

    def __post_init__(self) -> None:
        self.ctf_use(self.particle.ctf)

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Make the method from an object that has attributes with the names of the fields."""
        return cls(**{each.name: getattr(settings, each.name) for each in fields(cls)})

    @classmethod
    def uses(cls, key: str) -> bool:
        """Whether the method uses a setting, given by its dotted key."""
        return key not in cls.unused and key.partition(".")[0] in {e.name for e in fields(cls)}

    @classmethod
    def ctf_use(cls, wanted: Ctf) -> CtfUse:
        """What the method does with CTFs if ``particle.ctf`` is ``wanted``.

        Raises:
            ValueError: the method cannot do that.
        """
        for use in cls.ctf_uses:
            if wanted in (use, "auto"):
                return use
        raise ValueError(
            f"method={cls.name} has no CTF in a model: leave out particle.ctf={wanted}, or use "
            "method=classify"
        )

    @classmethod
    def needs_classes(cls, chosen: bool) -> bool:
        """Whether ``n_classes`` must be given.

        Args:
            chosen: whether first references are chosen from the particles, not given.
        """
        return False

    @abstractmethod
    def check(self, box: Box, n: int | None = None) -> None:
        """Refuse settings that do not fit each other or the prepared images.

        Args:
            box: size and pixel size of the prepared images.
            n: number of usable particles; None if not yet known.

        Raises:
            ValueError: settings that do not fit.
        """

    def radius(self, box: Box) -> float:
        """Radius of the disc that is compared, in pixels of the prepared images."""
        return self.particle.radius_or_part(box)

    def max_shift(self, box: Box) -> float:
        """Largest shift that is searched, in pixels of the prepared images."""
        return self.particle.max_shift_in(box)

    @property
    def shift_key(self) -> str:
        """Dotted key of the setting that limits shifts."""
        return "particle.max_shift"

    @property
    def most_steps(self) -> int | None:
        """Largest possible number of steps; None if not known."""
        return None

    @abstractmethod
    def start(self, particles: PreparedParticles) -> State:
        """Make the first state; its number of steps is above 0 if starting counts as a step."""

    @abstractmethod
    def step(self, particles: PreparedParticles, state: State) -> State:
        """Do one step and return the new state."""

    def is_done(self, state: State) -> bool:
        """Whether no step is left."""
        return state.done

    @abstractmethod
    def finish(self, particles: PreparedParticles, state: State) -> Alignment:
        """Make the result from the last state."""

    @abstractmethod
    def line(self, row: Mapping[str, Any]) -> str:
        """Line of the log for a step, from its row of the history."""

    def step_files(
        self, state: State, box: Box
    ) -> tuple[dict[str, Tensor], dict[str, pd.DataFrame]]:
        """Image stacks and tables, by file name, that a run writes after every step."""
        return {}, {}


def align(
    method: Method, particles: Stack | Array | PreparedParticles, *, images: Images | None = None,
    optics: Optics | None = None, device: str = "auto", resume: State | None = None,
    on_step: OnStep | None = None, progress: Progress | None = None,
) -> Alignment:  # fmt: skip
    """Run a method to its end.

    Args:
        method: the method with its settings.
        particles: a stack (`io.read_particles`), an array (n, size, size) of any library, or
            particles from `prepare`.
        images: how particles are prepared, if they are not yet prepared.
        optics: CTFs of the particles of an array; those of a stack come from its STAR file.
        device: auto, cpu or cuda, if particles are not yet prepared.
        resume: state to continue from, of the same method, particles and settings.
        on_step: called with the state after every step.
        progress: see `particles.prepare.Progress`; None keeps that of the prepared particles.

    Returns:
        The `Alignment` of the whole input, on every process.

    Raises:
        ValueError: settings that do not fit the particles or each other, before the work starts; a
            state of another method or of other particles.
    """
    if not isinstance(particles, PreparedParticles):
        stack, images = as_stack(particles), images or Images()
        if stack.shape[0] == stack.shape[1]:  # `prepare` refuses images that are not square
            method.check(images.box_of(stack.shape[0], stack.pixel_size))
        particles = prepare(stack, images, optics=optics, device=device, progress=progress)
    elif images is not None or optics is not None or device != "auto":
        raise ValueError(
            "the particles are prepared already: give images, optics and device to `prepare`"
        )
    elif progress is not None:
        particles = particles.reporting_to(progress)
    method.check(particles.box, len(particles))
    use = method.ctf_use(method.particle.ctf)
    if use != "none":
        particles = particles.phase_flipped()
        _warn_of_unusual(particles)
    if resume is None:
        state = method.start(particles)
        if state.iteration and on_step is not None:
            on_step(state)
    else:
        state = replace(resume, unsaved={})  # may have been made with other settings
        _refuse_other_particles(state, method, particles)
    while not method.is_done(state):
        state = method.step(particles, state)
        _refuse_not_finite(state)
        if on_step is not None:
            on_step(state)
    return replace(method.finish(particles, state), ctf=particles.ctf_line(use))


def align_with(
    method: type[Method], particles: Stack | Array | PreparedParticles, **settings: Any
) -> Alignment:
    """Make a method from its settings and run it with `align`.

    Args:
        method: the class of the method.
        particles: as in `align`.
        settings: fields of the method (None: the default), and arguments of `align`.
    """
    accepted = [*(each.name for each in fields(method)), *list(signature(align).parameters)[2:]]
    for name in set(settings) - set(accepted):
        close = difflib.get_close_matches(name, accepted, 1)
        hint = MOVED.get(name) or (f"did you mean {close[0]}?" if close else "see its help")
        raise TypeError(f"{method.name} has no setting {name!r}; {hint}")
    own = {each.name for each in fields(method)} & set(settings)
    made = {name: settings[name] for name in own if settings[name] is not None}
    rest = {name: value for name, value in settings.items() if name not in own}
    return align(method(**made), particles, **rest)


def shows_settings(method: type[Method]) -> Callable[[Function], Function]:
    """Decorator of a function with ``**settings``: its signature, which help and notebooks show,
    lists the fields of the method and the arguments of `align` instead."""

    def decorate(function: Function) -> Function:
        own = signature(function)
        given = [each for each in own.parameters.values() if each.kind != each.VAR_KEYWORD]
        names = {each.name for each in given} | {"method"}
        more = [*signature(method).parameters.values(), *signature(align).parameters.values()]
        more = [each.replace(kind=each.KEYWORD_ONLY) for each in more if each.name not in names]
        function.__signature__ = own.replace(parameters=[*given, *more])  # type: ignore[attr-defined]
        return function

    return decorate


def _warn_of_unusual(particles: PreparedParticles) -> None:
    """Warn, once in all processes, of CTFs that are in another unit, for example."""
    if particles.optics is not None and rank() == 0:
        for each in implausible(particles.optics):
            warnings.warn(str(each), stacklevel=3)


def _refuse_not_finite(state: State) -> None:
    """Make sure that scores are finite numbers."""
    row = state.history[-1] if state.history else {}
    for name in ("mean_score", "log_evidence"):
        if not math.isfinite(row.get(name, 0.0)):
            raise ValueError(
                f"{name} is {row[name]} in iteration {state.iteration}: pixels or CTFs of some "
                "particles are far from all others; `cryoalign check` lists what it finds"
            )


def _refuse_other_particles(state: State, method: Method, particles: PreparedParticles) -> None:
    """Make sure that a checkpoint is of this method and of these particles."""
    if state.method != method.name:
        raise ValueError(
            f"the checkpoint is of method={state.method}, not {method.name}: resume with the "
            "settings of that run, or start another run"
        )
    wanted = getattr(method, "n_classes", None)
    if "n_classes" in state.tensors and wanted not in (None, int(state["n_classes"])):
        raise ValueError(
            f"the checkpoint is of {int(state['n_classes'])} classes, not {wanted}: resume with "
            "the same settings, or start another run"
        )
    n = len(state["label"])
    if n != len(particles) or state.fingerprint != particles.fingerprint:
        raise ValueError(
            f"the checkpoint is of {n} other particles: the stack's pixels or images.box have "
            "changed since; resume with the same input and settings, or start another run"
        )
