"""Gradients that no other module's tests check, and the list of all of them in docs/layers.md."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cryoalign.images.ctf import Optics, phase_flip
from cryoalign.images.fourier import filter_shells, fourier_resize
from cryoalign.images.frc import ring_correlation
from cryoalign.images.geometry import gather_sample, sample, translate
from cryoalign.images.masks import normalise
from cryoalign.images.polar import Rings, reference_spectra
from cryoalign.learn.implicit import smooth_score
from cryoalign.methods.classify.invariants import bispectrum
from cryoalign.operators.correlation import correlation_logsumexp
from cryoalign.pose import Pose

RINGS = Rings(1, 3, angles=8)
MIRROR = torch.tensor([False, True])
OPTICS = Optics(*torch.tensor([1.1e4, 1e4, 30, 300, 2.7, 0.1, 0, 3]).double().expand(2, 8).T)


def leaf(*shape: int, seed: int = 0, complex_: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_ else torch.float64
    return torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)


def scored(images: Tensor, references: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    return smooth_score(images, references, Pose(50 * angle, shift, MIRROR), RINGS)


IMAGES, POINTS = leaf(2, 9, 9), leaf(2, 5, 2, seed=1)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "sample": (sample, (IMAGES, POINTS)),
    "translate": (lambda x: translate(x, torch.tensor([[1.0, -2], [0, 3]])), (IMAGES,)),
    "normalise": (lambda x: normalise(x, 3.0), (IMAGES,)),
    "fourier_resize": (lambda x: fourier_resize(x, 6), (IMAGES,)),
    "filter_shells": (filter_shells, (IMAGES, leaf(2, 5, seed=1))),
    "ring_correlation": (ring_correlation, (IMAGES, leaf(2, 9, 9, seed=1))),
    "phase_flip": (lambda x: phase_flip(x, OPTICS), (IMAGES,)),
    "reference_spectra": (lambda x: reference_spectra(x, RINGS), (IMAGES,)),
    "bispectrum": (
        lambda a: bispectrum(a, torch.tensor([[0, 1, 2], [1, 1, 3]])),
        (leaf(2, 4, complex_=True),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    function, inputs = CASES[name]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_gathered_samples_have_two_derivatives(interpolation) -> None:
    def gathered(images: Tensor, points: Tensor) -> Tensor:
        return gather_sample(images, points, interpolation)

    assert torch.autograd.gradcheck(gathered, (IMAGES, POINTS))
    assert torch.autograd.gradgradcheck(gathered, (IMAGES, POINTS))


def test_the_smooth_score_has_two_derivatives() -> None:
    inputs = (IMAGES, leaf(2, 9, 9, seed=1), leaf(2, seed=2), leaf(2, 2, seed=3))
    assert torch.autograd.gradcheck(scored, inputs)
    assert torch.autograd.gradgradcheck(scored, inputs, fast_mode=True)


@pytest.mark.parametrize("mirror", [True, False])
def test_the_gradient_of_logsumexp_keeps_its_contract(mirror) -> None:
    x, y = leaf(2, 2, 3, 5, complex_=True).detach(), leaf(2, 3, 5, complex_=True).detach()
    grad = torch.ones_like(correlation_logsumexp(x, y, 0.5, mirror))
    backward = torch.ops.cryoalign.correlation_logsumexp_backward
    torch.library.opcheck(backward, (grad, x, y, 0.5, mirror))


def test_the_list_in_the_docs_is_complete_and_true() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "layers.md").read_text()
    operators = {
        name.removeprefix("cryoalign::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("cryoalign::")
    }
    assert operators >= {"correlation_peaks", "refine_poses", "sum_aligned", "image_peaks"}
    listed = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `cryoalign::")}
    assert listed == {f"cryoalign::{name}" for name in operators}
    tests = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests, test
