"""The settings of a run and of a simulation, read from YAML files and the command line."""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from cryoalign.app import yaml12
from cryoalign.app.schema import known_keys, load_settings, nest
from cryoalign.methods import METHODS
from cryoalign.methods.assignment import Assignment
from cryoalign.methods.base import Method
from cryoalign.methods.classify.settings import Likelihood
from cryoalign.methods.isac.settings import Isac
from cryoalign.methods.references import SEEDINGS
from cryoalign.particles.settings import Box, Images, Particle
from cryoalign.results.averages import Averaging
from cryoalign.results.quality import Quality
from cryoalign.runtime.files import replacing
from cryoalign.runtime.settings import settings
from cryoalign.search.settings import Schedule, SearchSettings

RUN_KEYS = {
    "particles", "method", "output", "device", "images", "batch_size", "max_rejected", "root",
    "allow_outside", "overwrite", "resume", "threads", "embedding",
}  # fmt: skip
"""Settings that every run uses; all others belong to methods."""
MOVED = {
    "search.max_shift": "particle.max_shift",
    "search.last_ring": "particle.radius",
    "search.mirror": "particle.mirror",
    "averaging.mask_radius": "particle.radius",
    **{
        f"{section}.{old}": f"particle.{new}"
        for section in ("likelihood", "isac")
        for old, new in {
            "mask_radius": "radius", "max_shift": "max_shift", "mirror": "mirror", "ctf": "ctf",
        }.items()
    },
}  # fmt: skip
"""Keys of earlier versions, and their present names."""
ASSIGN_NEEDS = {
    "slack": "strategy=equal",
    "similarity": "strategy=robust",
    "anneal": "strategy=soft",
    "anneal_iterations": "strategy=soft",
    "start_resolution": "strategy=soft",
    "level_iterations": "start_classes",
}
"""The setting of ``assign`` that each of these needs in order to have an effect."""
HEADER = "# Resolved settings of a cryoalign run; `cryoalign run` takes this file again."


@settings
class RunConfig:
    """All settings of ``cryoalign run``. A method uses those that are fields of its `Method`.

    Raises ValueError (pydantic's) for wrong types, ranges and combinations.
    """

    MOVED: ClassVar[dict[str, str]] = MOVED

    particles: Path = Field(description="STAR file, .mrcs, .mrc or .npy of the particles")
    method: Literal[tuple(METHODS)] | None = Field(  # type: ignore[valid-type]
        default=None,
        description="; ".join(f"{name}: {each.purpose}" for name, each in METHODS.items())
        + "; null: classify, or mra if references are given",
    )
    references: str = Field(
        default="random",
        description="file with a stack of references, or how to choose them from the particles: "
        f"{', '.join(SEEDINGS)}; rfa: a template, or else the average of the particles",
    )
    n_classes: int | None = Field(
        default=None, ge=1, description="number of classes; null: that of the references' stack"
    )
    iterations: int = Field(
        default=20,
        ge=1,
        description="largest number of iterations (rfa: of each step; isac: of generations); a "
        "run that settles stops earlier",
    )
    output: Path | None = Field(
        default=None,
        description="run folder; null: runs/<particles>-<method> in the current folder",
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of every random choice")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: the GPU if there is one"
    )
    particle: Particle = Field(default_factory=Particle)
    search: SearchSettings = Field(default_factory=SearchSettings)
    images: Images = Field(default_factory=Images)
    averaging: Averaging = Field(default_factory=Averaging)
    assign: Assignment = Field(default_factory=Assignment)
    schedule: Schedule = Field(default_factory=Schedule)
    likelihood: Likelihood = Field(default_factory=Likelihood)
    quality: Quality = Field(default_factory=Quality)
    isac: Isac = Field(default_factory=Isac)
    min_class_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="classes smaller than this share of the mean size are given new members; null: "
        "0.2, or 0 if references are given, so that rare views keep theirs",
    )
    settle: float = Field(
        default=0.002, ge=0, le=1, description="stop when at most this share changes class"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="particles per batch; null: chosen for the device"
    )
    max_rejected: float = Field(
        default=0.1, ge=0, le=1, description="largest share of unusable particles to set aside"
    )
    root: Path | None = Field(
        default=None, description="folder to which the stack names in a STAR file are relative"
    )
    allow_outside: bool = Field(
        default=False, description="accept stacks outside the STAR file's folder and root"
    )
    overwrite: bool = Field(default=False, description="replace the results of an earlier run")
    resume: bool = Field(default=False, description="continue from the last checkpoint in output")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a process; null: PyTorch's choice"
    )
    embedding: bool = Field(
        default=True,
        description="draw t-SNE maps before and after alignment (up to 1000 particles)",
    )

    def __post_init__(self) -> None:
        if self.method is None:  # frozen, so not by assignment
            given = self.references not in SEEDINGS
            object.__setattr__(self, "method", "mra" if given else "classify")
        problems = list(self._conflicts())
        if problems:
            raise ValueError("\n  ".join(problems))

    def made(self) -> Method:
        """Make the method with these settings."""
        return METHODS[str(self.method)].from_settings(self)

    def uses(self, key: str) -> bool:
        """Whether the run or its method uses a setting, given by its dotted key."""
        return key.partition(".")[0] in RUN_KEYS or METHODS[str(self.method)].uses(key)

    def _conflicts(self) -> Iterator[str]:
        """Settings that contradict each other, as far as that can be seen without the input."""
        yield from self._unused()
        chosen = self.references in SEEDINGS
        if self.n_classes is None and METHODS[str(self.method)].needs_classes(chosen):
            yield f"n_classes is missing: method={self.method} needs it, e.g. n_classes=10"
        try:
            METHODS[str(self.method)].ctf_use(self.particle.ctf)
        except ValueError as error:
            yield str(error)
        if self.overwrite and self.resume:
            yield "overwrite and resume exclude each other: choose one"
        if self.resume and self.output is None:
            yield "resume needs output, the folder of the run to continue: add output=FOLDER"
        if METHODS[str(self.method)].uses("assign"):
            yield from self._wrong_assignment()
        lengths = [self.particle.max_shift, self.particle.radius or ""]
        if self.images.box is not None and not any(each.endswith("A") for each in lengths):
            try:
                self.made().check(Box(self.images.box, None))
            except ValueError as error:
                yield f"images.box: {error}"

    def _unused(self) -> Iterator[str]:
        """Settings that were changed although the method does not use them."""
        method = METHODS[str(self.method)]
        for key, setting in known_keys(RunConfig):
            if self.uses(key) or attrgetter(key)(self) == setting.default:
                continue
            found = f"method={self.method} does not use {key}: leave it out"
            if key in method.instead:
                yield f"{found}; this method has {method.instead[key]} instead"
            elif others := [name for name, each in METHODS.items() if each.uses(key)]:
                yield f"{found}, or use method={' or '.join(others)}"

    def _wrong_assignment(self) -> Iterator[str]:
        try:
            self.assign.refuse_few(self.iterations, self.n_classes)
        except ValueError as error:
            yield str(error)
        defaults = Assignment()
        for name, needed in ASSIGN_NEEDS.items():
            setting, _, value = needed.partition("=")
            given = getattr(self.assign, setting)
            if getattr(self.assign, name) != getattr(defaults, name) and not (
                given == value if value else given
            ):
                yield f"assign.{name} has an effect only with assign.{needed}: set that too"


@settings
class SimulateConfig:
    """All settings of ``cryoalign simulate``: the arguments of `particles.simulate.simulate`."""

    n: int = Field(default=2000, ge=1, description="number of particles")
    n_classes: int = Field(default=8, ge=1, description="number of views of the phantom")
    size: int = Field(default=64, ge=16, description="side of the box, px")
    snr: float = Field(default=0.1, gt=0, description="variance of the signal over the noise's")
    max_shift: float = Field(default=3.0, ge=0, description="largest shift in x and y, px")
    mirror: bool = Field(default=True, description="mirror half of the particles")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of all random choices")
    noise: Literal["white", "coloured"] = Field(default="white", description="noise spectrum")
    pixel_size: float = Field(default=3.0, gt=0, description="pixel size, Å")
    defocus: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=2,
        description="smallest and largest defocus, µm, e.g. [1, 3]; null: no CTF",
    )
    astigmatism: float = Field(default=0.02, ge=0, description="largest, µm")
    voltage: float = Field(default=300.0, gt=0, description="kV")
    spherical_aberration: float = Field(default=2.7, description="mm")
    amplitude_contrast: float = Field(default=0.1, ge=0, le=1, description="share")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the settings of a run; see `schema.load_settings`."""
    return load_settings(RunConfig, path, overrides, "`cryoalign run --help`")


def save_config(path: str | Path, config: RunConfig) -> None:
    """Write all settings as a YAML file, completely or not at all; `load_config` reads it back."""
    with replacing(path) as temporary:
        text = yaml12.dump(nest(flat(config)))
        temporary.write_text(f"{HEADER}\n{text}", encoding="utf-8")


def used_mapping(config: RunConfig) -> dict[str, Any]:
    """The settings that the method uses, nested as in the YAML file, with paths as text."""
    return nest({key: value for key, value in flat(config).items() if config.uses(key)})


def flat(config: RunConfig) -> dict[str, Any]:
    """The value of every dotted key."""
    return {key: _plain(attrgetter(key)(config)) for key, _ in known_keys(RunConfig)}


def _plain(value: Any) -> Any:
    """The value of a setting in a type that YAML has: paths as text, tuples as lists."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
