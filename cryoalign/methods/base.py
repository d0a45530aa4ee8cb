"""What every method is, and the one loop that runs them all.

A method is an object: its fields are its settings, and it starts from prepared particles, makes a
step at a time, and finishes with an `Alignment`. `align` does the rest: it checks a checkpoint,
goes on from it, and calls back after every step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Any, ClassVar, Self, TypeVar

import pandas as pd
from torch import Tensor

from cryoalign.images.ctf import Optics
from cryoalign.methods.state import State
from cryoalign.particles.prepare import PreparedParticles, Progress, prepare
from cryoalign.particles.settings import Box, Images, Particle
from cryoalign.particles.stack import Stack, as_stack
from cryoalign.results.alignment import Alignment
from cryoalign.results.quality import Quality
from cryoalign.runtime.arrays import Array
from cryoalign.runtime.processes import world_size

Function = TypeVar("Function", bound=Callable[..., Any])
OnStep = Callable[[State], None]
"""Called with the state after every step."""


@dataclass(frozen=True)
class Method(ABC):
    """A method and its settings. Its fields are arguments, YAML keys and sections of one name.

    Attributes:
        particle: what is known of the particle.
        quality: what becomes of junk.
        seed: seed of every random choice; the same seed gives the same result on the same device.
        name: as ``method`` in the settings.
        purpose: one line for lists of the methods.
        unused: dotted keys of its sections that it does not use.
        instead: what to set for a key that the method does not use, where its own key has
            another name.
        in_order: whether its averages are shown in the order of the column ``order`` of its
            classes rather than by size.
        in_processes: whether several processes may share its work.
    """

    particle: Particle = field(default_factory=Particle)
    quality: Quality = field(default_factory=Quality)
    seed: int = 0

    name: ClassVar[str]
    purpose: ClassVar[str]
    unused: ClassVar[frozenset[str]] = frozenset()
    instead: ClassVar[dict[str, str]] = {}
    in_order: ClassVar[bool] = False
    in_processes: ClassVar[bool] = True

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """The method with the settings that an object has under the fields' names."""
        return cls(**{each.name: getattr(settings, each.name) for each in fields(cls)})

    @classmethod
    def uses(cls, key: str) -> bool:
        """Whether the method uses a setting, given by its dotted key."""
        return key not in cls.unused and key.partition(".")[0] in {e.name for e in fields(cls)}

    @classmethod
    def needs_classes(cls, chosen: bool) -> bool:
        """Whether ``n_classes`` must be given.

        Args:
            chosen: whether first references are chosen from the particles rather than given.
        """
        return False

    @abstractmethod
    def check(self, box: Box, n: int | None = None) -> None:
        """Refuse settings that do not fit each other or the prepared images.

        Args:
            box: of the prepared images.
            n: usable particles; None where they are not counted yet.

        Raises:
            ValueError: they do not fit.
        """

    @abstractmethod
    def radius(self, box: Box) -> float:
        """Radius of what is compared, in pixels of the prepared images."""

    @abstractmethod
    def max_shift(self, box: Box) -> float:
        """The largest shift that is looked for, in pixels of the prepared images."""

    @property
    def shift_key(self) -> str:
        """The setting that allows larger shifts."""
        return "particle.max_shift"

    @property
    def most_steps(self) -> int | None:
        """Steps that there can be at most; None is not known."""
        return None

    @abstractmethod
    def start(self, particles: PreparedParticles) -> State:
        """The state before the first step, or after it where starting is one."""

    @abstractmethod
    def step(self, particles: PreparedParticles, state: State) -> State:
        """The state after one step more."""

    def is_done(self, state: State) -> bool:
        """Whether nothing is left to do."""
        return state.done

    @abstractmethod
    def finish(self, particles: PreparedParticles, state: State) -> Alignment:
        """The result."""

    @abstractmethod
    def line(self, row: Mapping[str, Any]) -> str:
        """What a log says of a step, from its row of the history."""

    def step_files(
        self, state: State, box: Box
    ) -> tuple[dict[str, Tensor], dict[str, pd.DataFrame]]:
        """Stacks of images and tables, by file name, that a run writes after every step."""
        return {}, {}


def align(
    method: Method,
    particles: Stack | Array | PreparedParticles,
    *,
    images: Images | None = None,
    optics: Optics | None = None,
    device: str = "auto",
    resume: State | None = None,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Run a method to its end.

    Args:
        method: with its settings.
        particles: a stack (`io.read_particles`), an array (n, size, size) of any library, or
            particles that `prepare` made ready.
        images: how particles are prepared, unless they are.
        optics: CTFs of the particles of an array; those of a stack come from its STAR file.
        device: auto, cpu or cuda, where particles are not prepared yet.
        resume: go on from this state, of the same method, particles and settings.
        on_step: called with the state after every step.
        progress: called now and then; None leaves the prepared particles' own.

    Returns:
        The `Alignment`, of the whole input on every process.

    Raises:
        ValueError: settings that do not fit the particles or each other, before work starts; a
            state of another method or of other particles.
    """
    if world_size() > 1 and not method.in_processes:
        raise ValueError(f"method={method.name} runs in one process: start it without torchrun")
    if not isinstance(particles, PreparedParticles):
        stack, images = as_stack(particles), images or Images()
        if stack.shape[0] == stack.shape[1]:  # other images are refused by `prepare`
            method.check(images.box_of(stack.shape[0], stack.pixel_size))
        particles = prepare(stack, images, optics=optics, device=device, progress=progress)
    elif progress is not None:
        particles = particles.reporting_to(progress)
    method.check(particles.box, len(particles))
    if resume is None:
        state = method.start(particles)
        if state.iteration and on_step is not None:
            on_step(state)
    else:
        state = replace(resume, unsaved={})  # what other settings may have made
        _refuse_other_particles(state, method, particles)
    while not method.is_done(state):
        state = method.step(particles, state)
        if on_step is not None:
            on_step(state)
    return method.finish(particles, state)


def align_with(
    method: type[Method], particles: Stack | Array | PreparedParticles, **settings: Any
) -> Alignment:
    """`align` with a method that is made here of those settings which are its fields.

    Args:
        method: its class.
        particles: as in `align`.
        settings: fields of the method (None: the default), and arguments of `align`.
    """
    own = {each.name for each in fields(method)} & set(settings)
    made = {name: settings[name] for name in own if settings[name] is not None}
    rest = {name: value for name, value in settings.items() if name not in own}
    return align(method(**made), particles, **rest)


def shows_settings(method: type[Method]) -> Callable[[Function], Function]:
    """Decorator: help and notebooks list a function's settings, the fields of a method and the
    arguments of `align`, in place of ``**settings``."""

    def decorate(function: Function) -> Function:
        own = signature(function)
        given = [each for each in own.parameters.values() if each.kind != each.VAR_KEYWORD]
        names = {each.name for each in given} | {"method"}
        more = [*signature(method).parameters.values(), *signature(align).parameters.values()]
        more = [each.replace(kind=each.KEYWORD_ONLY) for each in more if each.name not in names]
        function.__signature__ = own.replace(parameters=[*given, *more])  # type: ignore[attr-defined]
        return function

    return decorate


def _refuse_other_particles(state: State, method: Method, particles: PreparedParticles) -> None:
    """Make sure that a checkpoint is of this method and of these particles."""
    if state.method != method.name:
        raise ValueError(
            f"the checkpoint is of method={state.method}, not {method.name}: resume with the "
            "settings of that run, or start another one"
        )
    n = len(state["label"])
    if n != len(particles) or state.fingerprint != particles.fingerprint:
        raise ValueError(
            f"the checkpoint is of {n} other particles: the stack's pixels or images.box have "
            "changed since; resume with the same input and settings, or start another run"
        )
