"""The settings of a run and of a simulation, from files and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cryoalign import yaml12
from cryoalign.assign import Assignment
from cryoalign.average import Averaging
from cryoalign.climb import Likelihood
from cryoalign.files import replacing
from cryoalign.generations import Isac, scale_of
from cryoalign.particles import Images
from cryoalign.quality import Quality
from cryoalign.schedule import Schedule
from cryoalign.schema import known_keys, load_settings
from cryoalign.search import Search
from cryoalign.seeding import SEEDINGS
from cryoalign.settings import FORBID

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

    def _conflicts(self) -> Iterator[str]:
        """What does not go together, as far as that shows without a file."""
        chosen = self.references in SEEDINGS
        if self.method == "rfa" and self.n_classes not in (None, 1):
            yield "method=rfa makes one average: leave n_classes out, or use method=mra"
        if self.method == "isac" and self.n_classes is not None:
            yield "method=isac makes classes of isac.images_per_group: leave n_classes out"
        if self.method in ("mra", "classify") and chosen and self.n_classes is None:
            yield f"n_classes is missing: references={self.references} needs it, e.g. n_classes=10"
        if self.method in ("classify", "isac") and not chosen:
            yield (
                f"method={self.method} starts from nothing: leave references out, or use method=mra"
            )
        if self.overwrite and self.resume:
            yield "overwrite and resume exclude each other: choose one"
        if self.resume and self.output is None:
            yield "resume needs output, the folder of the run to go on with"
        if self.assign.start_classes and self.n_classes is None:
            yield "assign.start_classes needs n_classes, how many to end with"
        if self.assign != Assignment() and self.method != "mra":
            yield f"assign is of method=mra: leave it out with method={self.method}"
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
                if self.method == "isac":
                    scale_of(self.isac, self.images.box)
            except ValueError as error:
                yield f"images.box: {error}"


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
    return load_settings(RunConfig, path, overrides)


def save_config(path: str | Path, config: RunConfig) -> None:
    """Write settings as YAML, all or nothing; `load_config` reads the same back."""
    with replacing(path) as beside:
        beside.write_text(HEADER + "\n" + yaml12.dump(as_mapping(config)), encoding="utf-8")


def as_mapping(config: RunConfig) -> dict[str, Any]:
    """Settings nested as in the YAML file, paths as texts."""
    mapping: dict[str, Any] = _plain(asdict(config))
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
