"""The settings of a run and of a simulation, from files and words."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from cryoalign.app import yaml12
from cryoalign.app.schema import known_keys, load_settings
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
"""Settings of the run, whatever the method; all others belong to methods."""
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
"""Keys of earlier versions, and what they are called now."""
ASSIGN_NEEDS = {
    "slack": "strategy=equal",
    "similarity": "strategy=robust",
    "anneal": "strategy=soft",
    "anneal_iterations": "strategy=soft",
    "start_resolution": "strategy=soft",
    "level_iterations": "start_classes",
}
"""What other settings of ``assign`` must be, for each of these to have an effect."""
HEADER = "# Resolved settings of a cryoalign run; `cryoalign run` takes this file again."


@settings
class RunConfig:
    """All settings of ``cryoalign run``. Those of a method are the fields of its `Method`.

    Raises ValueError (pydantic's) for wrong types, ranges and combinations.
    """

    MOVED: ClassVar[dict[str, str]] = MOVED

    particles: Path = Field(description="STAR file, .mrcs, .mrc or .npy of the particles")
    method: Literal[tuple(METHODS)] = Field(  # type: ignore[valid-type]
        default="mra",
        description="; ".join(f"{name}: {each.purpose}" for name, each in METHODS.items()),
    )
    references: str = Field(
        default="random",
        description=f"a stack of references, or chosen: {', '.join(SEEDINGS)}; rfa: a template, or "
        "else the average of the particles",
    )
    n_classes: int | None = Field(
        default=None, ge=1, description="how many; null: as many as the references' stack holds"
    )
    iterations: int = Field(
        default=20,
        ge=1,
        description="at most so many (rfa: of each step; isac: generations); fewer if it settles",
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
    min_class_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="give new members to classes below this share of the mean size",
    )
    settle: float = Field(
        default=0.002, ge=0, le=1, description="stop when no larger share changes class"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="particles at a time; null chooses for the device"
    )
    max_rejected: float = Field(
        default=0.1, ge=0, le=1, description="largest share of unusable particles to set aside"
    )
    root: Path | None = Field(
        default=None, description="folder that a STAR file's stack names start from"
    )
    allow_outside: bool = Field(
        default=False, description="let a STAR file name stacks outside its folder and root"
    )
    overwrite: bool = Field(default=False, description="replace the results of an earlier run")
    resume: bool = Field(default=False, description="go on from the output's last checkpoint")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a process; null: PyTorch's choice"
    )
    embedding: bool = Field(
        default=True, description="draw t-SNE maps before and after (up to 2000 particles)"
    )

    def __post_init__(self) -> None:
        problems = list(self._conflicts())
        if problems:
            raise ValueError("\n  ".join(problems))

    def made(self) -> Method:
        """The method with its settings."""
        return METHODS[self.method].from_settings(self)

    def uses(self, key: str) -> bool:
        """Whether a setting, given by its dotted key, matters to the run or its method."""
        return key.partition(".")[0] in RUN_KEYS or METHODS[self.method].uses(key)

    def _conflicts(self) -> Iterator[str]:
        """What does not go together, as far as that shows without a file."""
        yield from self._unused()
        chosen = self.references in SEEDINGS
        if self.n_classes is None and METHODS[self.method].needs_classes(chosen):
            yield f"n_classes is missing: method={self.method} needs it, e.g. n_classes=10"
        if self.overwrite and self.resume:
            yield "overwrite and resume exclude each other: choose one"
        if self.resume and self.output is None:
            yield "resume needs output, the folder of the run to go on with"
        if METHODS[self.method].uses("assign"):
            yield from self._wrong_assignment()
        if METHODS[self.method].uses("search.shift_step"):
            yield from self._wrong_shifts()
        if self.images.box is not None:
            try:
                self.made().check(Box(self.images.box, None))
            except ValueError as error:
                yield f"images.box: {error}"

    def _unused(self) -> Iterator[str]:
        """Settings that were changed though the method does not use them."""
        method = METHODS[self.method]
        for key, setting in known_keys(RunConfig):
            if self.uses(key) or attrgetter(key)(self) == setting.default:
                continue
            found = f"method={self.method} does not use {key}: leave it out"
            if key in method.instead:
                yield f"{found}; {method.instead[key]} is its own"
            elif others := [name for name, each in METHODS.items() if each.uses(key)]:
                yield f"{found}, or use method={' or '.join(others)}"

    def _wrong_shifts(self) -> Iterator[str]:
        """Trial shifts further apart than the largest one, as far as both are in pixels."""
        reach, unit = self.particle.max_shift.split()
        if unit == "px" and 0 < float(reach) < self.search.shift_step:
            yield (
                f"search.shift_step {self.search.shift_step:g} px is larger than "
                f"particle.max_shift {reach} px, so that no shift would be tried: make it smaller, "
                "or particle.max_shift 0 px"
            )

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
                yield f"assign.{name} has an effect with assign.{needed} only: set that too"


@settings
class SimulateConfig:
    """All that ``cryoalign simulate`` can be told: the arguments of `synthetic.simulate`."""

    n: int = Field(default=2000, ge=1, description="particles")
    n_classes: int = Field(default=8, ge=1, description="views of the phantom")
    size: int = Field(default=64, ge=16, description="box, px")
    snr: float = Field(default=0.1, gt=0, description="variance of signal over that of noise")
    max_shift: float = Field(default=3.0, ge=0, description="largest shift in x and y, px")
    mirror: bool = Field(default=True, description="mirror half of the particles")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="of all random choices")
    noise: Literal["white", "coloured"] = Field(default="white", description="its spectrum")
    pixel_size: float = Field(default=3.0, gt=0, description="Å")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a YAML file, with words like ``search.max_shift=4`` going before it.

    Args:
        path: the file; None takes the defaults.
        overrides: ``key=value``, the key dotted, the value as in YAML (texts need no quotes). The
            last of several for one key counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or unknown keys, wrong types, ranges or combinations: all of them,
            each with its place.
    """
    return load_settings(RunConfig, path, overrides, "`cryoalign run --help`")


def save_config(path: str | Path, config: RunConfig) -> None:
    """Write settings as YAML, all or nothing; `load_config` reads the same back."""
    with replacing(path) as beside:
        beside.write_text(HEADER + "\n" + yaml12.dump(as_mapping(config)), encoding="utf-8")


def as_mapping(config: RunConfig) -> dict[str, Any]:
    """Settings nested as in the YAML file, paths as texts."""
    mapping: dict[str, Any] = _plain(asdict(config))
    return mapping


def used_mapping(config: RunConfig) -> dict[str, Any]:
    """`as_mapping` of what the method uses."""
    mapping: dict[str, Any] = {}
    for key, value in flat(config).items():
        section, _, leaf = key.partition(".")
        if not config.uses(key):
            continue
        if leaf:
            mapping.setdefault(section, {})[leaf] = value
        else:
            mapping[key] = value
    return mapping


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted key to value, for comparing two configurations."""
    values = as_mapping(config)
    return {
        key: values[section][leaf] if leaf else values[section]
        for key in dict(known_keys(RunConfig))
        for section, _, leaf in [key.partition(".")]
    }


def _plain(value: Any) -> Any:
    """With paths as texts, so that YAML and JSON hold it."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
