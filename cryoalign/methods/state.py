"""The state of a method between two steps, which is also its checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cryoalign.pose import Found, Pose
from cryoalign.results.alignment import part_of, read_arrays, write_arrays

TENSOR = "tensor."  # comes before the name of a tensor in the file


@dataclass(frozen=True, eq=False)
class State:
    """All that a method needs in order to continue.

    Attributes:
        method: name of the method.
        fingerprint: identifies the particles (`PreparedParticles.fingerprint`).
        iteration: number of steps done.
        done: whether the method has settled.
        history: a row per step.
        tensors: tensors by name, on the CPU. ``label``, ``angle`` (degrees), ``shift`` (pixels),
            ``mirror`` and ``score`` of the n usable particles mean the same in every method.
        unsaved: values that the next step or the end uses if they are there, and computes again
            otherwise.
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
        self, row: dict[str, Any], *, done: bool = False, pose: Pose | None = None,
        unsaved: dict[str, Any] | None = None, **tensors: Tensor,
    ) -> State:  # fmt: skip
        """The state after one more step.

        Args:
            row: row of the history for this step.
            done: whether this was the last step.
            pose: (n,) new poses; None keeps the old ones.
            unsaved: replaces the present ``unsaved``.
            tensors: tensors that changed, by name.
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
        """Write the state without ``unsaved`` to one ``.npz`` file."""
        scalars = {
            "method": self.method, "fingerprint": self.fingerprint, "iteration": self.iteration,
            "done": self.done, "history": json.dumps(self.history),
        }  # fmt: skip
        tensors = {TENSOR + name: tensor.cpu().numpy() for name, tensor in self.tensors.items()}
        write_arrays(path, scalars | tensors)

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read a state that `save` wrote.

        Raises:
            ValueError: the file is not such a state.
        """
        with read_arrays(path, "a checkpoint of cryoalign") as data:
            return cls(
                str(data["method"]),
                str(data["fingerprint"]),
                int(data["iteration"]),
                bool(data["done"]),
                json.loads(str(data["history"])),
                {name: torch.from_numpy(value) for name, value in part_of(data, TENSOR).items()},
            )


def pose_tensors(pose: Pose) -> dict[str, Tensor]:
    """Poses as tensors with the names that a state uses."""
    return {"angle": pose.angle, "shift": pose.shift, "mirror": pose.mirror}
