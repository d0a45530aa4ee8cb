"""Where an alignment stands, kept between iterations."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryoalign.files import replacing
from cryoalign.pose import Pose


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
    """

    iteration: int
    references: Tensor
    label: Tensor
    pose: Pose
    score: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)
    settled: bool = False
    fingerprint: str = ""

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
