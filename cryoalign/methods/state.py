"""Where a run stands, kept between iterations."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryoalign.methods.classify.band import Found
from cryoalign.pose import Pose
from cryoalign.results.averages import ClassSums
from cryoalign.runtime.files import replacing


@dataclass(frozen=True, eq=False)
class MraState:
    """Where an alignment stands after an iteration: enough to go on from.

    Attributes:
        iteration: iterations done.
        references: (k, size, size) for the next one.
        label: (n,) class index of the usable particles; pose (n,); score (n,).
        history: a row per iteration.
        settled: whether the assignment has come to rest.
        fingerprint: of the particles' pixels (`PreparedParticles.fingerprint`).
        sums: of the classes, as the iteration left them, and frc: (k, shells) of their halves,
            where the method tells; not kept in the file.
    """

    iteration: int
    references: Tensor
    label: Tensor
    pose: Pose
    score: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)
    settled: bool = False
    fingerprint: str = ""
    sums: ClassSums | None = None
    frc: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing left to iterate."""
        return self.settled

    def save(self, path: str | Path) -> None:
        """Write to one ``.npz`` file (no pickles), all or nothing."""
        with replacing(path) as beside:
            np.savez(
                beside,
                allow_pickle=False,
                iteration=self.iteration,
                references=self.references.cpu().numpy(),
                label=self.label.numpy(),
                angle=self.pose.angle.numpy(),
                shift=self.pose.shift.numpy(),
                mirror=self.pose.mirror.numpy(),
                score=self.score.numpy(),
                history=json.dumps(self.history),
                settled=self.settled,
                fingerprint=self.fingerprint,
            )

    @classmethod
    def load(cls, path: str | Path) -> MraState:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not such a state.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                data = {name: archive[name] for name in archive.files}
            return cls(
                int(data["iteration"]),
                torch.from_numpy(data["references"]),
                torch.from_numpy(data["label"]),
                Pose(*(torch.from_numpy(data[name]) for name in ("angle", "shift", "mirror"))),
                torch.from_numpy(data["score"]),
                json.loads(str(data["history"])),
                bool(data["settled"]),
                str(data["fingerprint"]),
            )
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a checkpoint of cryoalign ({error})") from error


@dataclass(frozen=True, eq=False)
class ClimbState:
    """Where a classification stands (`climb`): enough to go on from.

    Attributes:
        level: of resolution; cycle: cycles of splitting and merging done there.
        done: whether it has arrived.
        evidence: mean log-evidence of a particle.
        classes: (k, r, m) complex features of the class images.
        own: (n, 2) pixels, the shifts about which the level tries shifts.
        found: what the last E-step found.
        history: a row per step.
        generator: state of the random numbers.
        fingerprint: of the particles' pixels (`PreparedParticles.fingerprint`).
    """

    level: int
    cycle: int
    done: bool
    evidence: float
    classes: Tensor
    own: Tensor
    found: Found
    history: list[dict[str, Any]]
    generator: Tensor
    fingerprint: str = ""

    @property
    def iteration(self) -> int:
        """Steps done."""
        return len(self.history)

    def save(self, path: str | Path) -> None:
        """Write to one ``.npz`` file (no pickles), all or nothing."""
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                level=self.level,
                cycle=self.cycle,
                done=self.done,
                evidence=self.evidence,
                classes=self.classes.numpy(),
                own=self.own.numpy(),
                history=json.dumps(self.history),
                generator=self.generator.numpy(),
                fingerprint=self.fingerprint,
                **{f"found.{name}": value.numpy() for name, value in self.found._asdict().items()},
            )

    @classmethod
    def load(cls, path: str | Path) -> ClimbState:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not such a state.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                data = {name: archive[name] for name in archive.files}
            tensor = {
                name: torch.from_numpy(data[name]) for name in ("classes", "own", "generator")
            }
            found = Found(*(torch.from_numpy(data[f"found.{name}"]) for name in Found._fields))
            return cls(
                level=int(data["level"]),
                cycle=int(data["cycle"]),
                done=bool(data["done"]),
                evidence=float(data["evidence"]),
                found=found,
                history=json.loads(str(data["history"])),
                fingerprint=str(data["fingerprint"]),
                **tensor,
            )
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a checkpoint of a classification ({error})") from error
