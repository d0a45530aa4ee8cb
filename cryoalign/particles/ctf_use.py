"""What was done with the CTFs of particles, in one line for the log, the report and `check`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cryoalign.images.ctf import FLAGS, Optics
from cryoalign.particles.stack import Stack

CtfUse = Literal["flip", "model", "none"]
"""What a method does with CTFs; see `particles.settings.Particle`."""


def ctf_line(use: CtfUse, stack: Stack, optics: Optics | None) -> str:
    """One line that says what is done with the CTFs, and why.

    Args:
        use: what the method does where there is a CTF.
        stack: the particles.
        optics: (n,) their CTFs as they were recorded; None if there are none.
    """
    if use == "none":
        return "CTF: not used, because particle.ctf is none"
    path = getattr(stack, "path", None)
    name = "the input" if path is None else path.name
    if optics is None:
        return f"CTF: not used, because {name} has no defocus"
    model = "in the likelihood, " if use == "model" else ""
    why = f"{name} has {'CTFs' if path is None else 'defocus'}"
    return f"CTF: {model}{_phases(optics)}, averages weighted by CTF^2 ({why})"


def _phases(optics: Optics) -> str:
    """What is done with the phases of particles, some of which may be flipped or multiplied."""
    multiplied = optics.premultiplied
    flipped = optics.phase_flipped & ~multiplied
    done = [
        (flipped, f"flipped before: {FLAGS['phase_flipped']} is 1"),
        (multiplied, f"multiplied by the CTF before: {FLAGS['premultiplied']} is 1"),
    ]
    there = [(which, words) for which, words in done if which.any()]
    if not there:
        return "phases flipped"
    if len(there) == 1 and bool(there[0][0].all()):
        return f"phases not flipped ({there[0][1]})"
    return "phases flipped, except " + " and ".join(
        f"{_share(which)} ({words})" for which, words in there
    )


def _share(which: Tensor) -> str:
    return f"{int(which.sum())} of {len(which)} particles"
