"""The settings of a run and of a simulation, from files and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cryoalign.app import yaml12
from cryoalign.app.schema import known_keys, load_settings
from cryoalign.methods.assignment import Assignment
from cryoalign.methods.classify.split_and_merge import Likelihood
from cryoalign.methods.isac.generations import Isac, scale_of
from cryoalign.methods.references import SEEDINGS
from cryoalign.particles.prepare import Images
from cryoalign.results.averages import Averaging
from cryoalign.results.quality import Quality
from cryoalign.runtime.files import replacing
from cryoalign.runtime.settings import FORBID
from cryoalign.search.settings import Schedule, Search

EVERY_METHOD = {
    "particles", "method", "output", "seed", "device", "images", "batch_size", "max_rejected",
    "root", "allow_outside", "overwrite", "resume", "threads", "embedding",
}  # fmt: skip
USED = {
    "mra": {
        "references", "n_classes", "iterations", "search", "averaging", "assign", "quality",
        "min_class_share", "settle",
    },
    "rfa": {
        "references", "n_classes", "iterations", "search.first_ring", "search.last_ring",
        "search.ring_step", "search.mirror", "search.refine", "search.mode", "schedule",
        "averaging", "quality",
    },
    "classify": {
        "n_classes", "likelihood", "averaging.mask_radius", "averaging.mask_edge",
        "averaging.filter", "quality",
    },
    "isac": {"iterations", "isac", "averaging"},
}  # fmt: skip
"""Sections and keys that a method uses, beside those that all do."""
INSTEAD = {
    ("isac", "n_classes"): ["isac.images_per_group"],
    ("classify", "iterations"): ["likelihood.cycles"],
}
"""What to set for a key that a method does not use, where its own has another name."""
ASSIGN_NEEDS = {
    "slack": "strategy=equal",
    "similarity": "strategy=robust",
    "anneal": "strategy=soft",
    "anneal_iterations": "strategy=soft",
    "start_resolution": "strategy=soft",
    "level_iterations": "start_classes",
}
"""What other settings of ``assign`` must be for one to have an effect."""
HEADER = "# Resolved settings of a cryoalign run; `cryoalign run` takes this file again."


@dataclass(frozen=True, config=FORBID)
class RunConfig:
    """All that ``cryoalign run`` can be told; `align_multi_reference`, `align_reference_free`,
    `classify` and `classify_stable` have most arguments alike.

    Raises ValueError (pydantic's) for wrong types, ranges and combinations.
    """

    particles: Path = Field(description="STAR file, .mrcs, .mrc or .npy of the particles")
    method: Literal["mra", "rfa", "classify", "isac"] = Field(
        default="mra",
        description="mra: multi-reference alignment; rfa: reference-free alignment, of one view; "
        "classify: classes from nothing, by likelihood; isac: stable classes of equal size",
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
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="of all random choices")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: the GPU if there is one"
    )
    search: Search = Field(default_factory=Search)
    images: Images = Field(default_factory=Images)
    averaging: Averaging = Field(default_factory=Averaging)
    assign: Assignment = Field(default_factory=Assignment)
    schedule: Schedule = Field(default_factory=Schedule)
    likelihood: Likelihood = Field(default_factory=Likelihood)
    quality: Quality = Field(default_factory=Quality)
    isac: Isac = Field(default_factory=Isac)
    min_class_share: float = Field(
        default=0.2, ge=0, le=1, description="re-seed classes below this share of the mean size"
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

    def widest_search(self) -> Search:
        """The search with the largest shifts that the method tries."""
        return self.schedule.widest(self.search) if self.method == "rfa" else self.search

    def particle_radius(self, size: int) -> float:
        """Of what the method compares, in pixels of prepared images of ``size``."""
        if self.searches:
            return self.widest_search().rings(size).last_ring
        section = self.likelihood if self.method == "classify" else self.isac
        return section.mask_radius or 0.4 * size

    @property
    def searches(self) -> bool:
        """Whether the method tries the poses that ``search`` tells."""
        return self.method in ("mra", "rfa")

    def _conflicts(self) -> Iterator[str]:
        """What does not go together, as far as that shows without a file."""
        chosen = self.references in SEEDINGS
        yield from self._unused()
        if self.method == "rfa" and self.n_classes not in (None, 1):
            yield "method=rfa makes one average: leave n_classes out, or use method=mra"
        if self.method in ("mra", "classify") and chosen and self.n_classes is None:
            yield f"n_classes is missing: references={self.references} needs it, e.g. n_classes=10"
        if self.overwrite and self.resume:
            yield "overwrite and resume exclude each other: choose one"
        if self.resume and self.output is None:
            yield "resume needs output, the folder of the run to go on with"
        if self.method == "mra":
            yield from self._wrong_assignment()
        if self.searches:
            yield from self._wrong_search()
        if self.method == "isac" and self.images.box is not None:
            try:
                scale_of(self.isac, self.images.box)
            except ValueError as error:
                yield f"images.box: {error}"

    def _unused(self) -> Iterator[str]:
        """Settings that were changed though the method does not use them."""
        for key, field in known_keys(RunConfig):
            if is_used(key, self.method) or attrgetter(key)(self) == field.default:
                continue
            told = f"method={self.method} does not use {key}"
            others = [method for method in USED if is_used(key, method)]
            if own := _own(key, self.method):
                yield f"{told}: leave it out; {' or '.join(own)} is its own"
            else:
                yield f"{told}: leave it out, or use method={' or '.join(others)}"

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
                yield f"assign.{name} is of assign.{needed}: set that, or leave it out"

    def _wrong_search(self) -> Iterator[str]:
        search, last = self.widest_search(), self.search.last_ring
        if 0 < search.max_shift < search.shift_step:
            yield (
                f"search.shift_step {search.shift_step:g} px is larger than search.max_shift "
                f"{search.max_shift:g} px, so that no shift would be tried: make it smaller, or "
                "search.max_shift 0"
            )
        if last is not None and last < search.first_ring:
            yield (
                f"search.last_ring {last} px lies inside search.first_ring {search.first_ring} px: "
                "make it larger"
            )
        elif self.images.box is not None:
            try:
                search.rings(self.images.box)
            except ValueError as error:
                yield f"images.box: {error}"


def is_used(key: str, method: str) -> bool:
    """Whether a method uses a setting, given by its dotted key."""
    return not {key, key.partition(".")[0]}.isdisjoint(EVERY_METHOD | USED[method])


def _own(key: str, method: str) -> list[str]:
    """Keys of a method that are named as one which it does not use."""
    leaf = key.rpartition(".")[2]
    own = [k for k, _ in known_keys(RunConfig) if k.rpartition(".")[2] == leaf]
    return INSTEAD.get((method, key), [k for k in own if is_used(k, method)])


@dataclass(frozen=True, config=FORBID)
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
        if not is_used(key, config.method):
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
