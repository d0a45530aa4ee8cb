"""Where a method stands between two steps: one class and one file for every method."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryoalign.pose import Found, Pose
from cryoalign.runtime.files import replacing

TENSOR = "tensor."  # before a tensor's name in the file


@dataclass(frozen=True, eq=False)
class State:
    """Enough to go on from: what a checkpoint holds.

    Attributes:
        method: name of the method.
        fingerprint: of the particles' pixels (`PreparedParticles.fingerprint`).
        iteration: steps done.
        done: whether the method has come to rest.
        history: a row per step.
        tensors: by name, on the CPU. ``label``, ``angle``, ``shift``, ``mirror`` and ``score``
            (n,) of the usable particles mean the same in every method that has them.
        unsaved: what the next step or the end can use, and otherwise makes again.
    """

    method: str
    fingerprint: str
    iteration: int = 0
    done: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unsaved: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def pose(self) -> Pose:
        """(n,) poses of the usable particles."""
        return Pose(self["angle"], self["shift"], self["mirror"])

    @property
    def found(self) -> Found:
        """(n,) class, pose and score of the usable particles."""
        return Found(self["label"], self.pose, self["score"])

    def next(
        self,
        row: dict[str, Any],
        *,
        done: bool = False,
        pose: Pose | None = None,
        unsaved: dict[str, Any] | None = None,
        **tensors: Tensor,
    ) -> State:
        """The state after one step more.

        Args:
            row: of the history.
            done: whether this was the last step.
            pose: (n,) new poses.
            unsaved: replaces what was there.
            tensors: those that changed, by name.
        """
        if pose is not None:
            tensors |= pose_tensors(pose)
        return replace(
            self,
            iteration=self.iteration + 1,
            done=done,
            history=[*self.history, row],
            tensors={**self.tensors, **tensors},
            unsaved=unsaved or {},
        )

    def save(self, path: str | Path) -> None:
        """Write to one ``.npz`` file (no pickles), all or nothing."""
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez(
                file,  # not a name: NumPy would add a suffix of its own to that
                allow_pickle=False,
                method=self.method,
                fingerprint=self.fingerprint,
                iteration=self.iteration,
                done=self.done,
                history=json.dumps(self.history),
                **{TENSOR + name: tensor.cpu().numpy() for name, tensor in self.tensors.items()},
            )

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not such a state.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                data = {name: archive[name] for name in archive.files}
            return cls(
                str(data["method"]),
                str(data["fingerprint"]),
                int(data["iteration"]),
                bool(data["done"]),
                json.loads(str(data["history"])),
                {
                    name.removeprefix(TENSOR): torch.from_numpy(value)
                    for name, value in data.items()
                    if name.startswith(TENSOR)
                },
            )
        except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a checkpoint of cryoalign ({error})") from error


def pose_tensors(pose: Pose) -> dict[str, Tensor]:
    """Poses as a state has them."""
    return {"angle": pose.angle, "shift": pose.shift, "mirror": pose.mirror}
