"""What `registration.operator` promises for every operator of the package."""

import inspect

import pytest
import torch

from cryoalign.operators.aligned_sums import sum_aligned
from cryoalign.operators.correlation import correlation_logsumexp, correlation_peaks
from cryoalign.operators.image_search import image_peaks
from cryoalign.operators.pose_refinement import refine_poses

OPERATORS = (correlation_peaks, correlation_logsumexp, image_peaks, refine_poses, sum_aligned)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda each: each.__name__)
def test_an_operator_is_a_function_with_its_own_help_and_schema(operator) -> None:
    assert inspect.isfunction(operator)
    assert "Args:" in operator.__doc__
    schema = getattr(torch.ops.cryoalign, operator.__name__).default._schema
    assert [each.name for each in schema.arguments] == list(inspect.signature(operator).parameters)


@pytest.mark.usefixtures("in_pytorch")
def test_without_kernels_an_operator_runs_the_function_it_was_declared_with() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.complex64, generator=generator)
    y = torch.randn(3, 4, 5, dtype=torch.complex64, generator=generator)
    body = inspect.unwrap(correlation_peaks)
    for found in (correlation_peaks(x, y), correlation_peaks(particles=x, references=y)):
        for ours, theirs in zip(found, body(x, y), strict=True):
            assert torch.equal(ours, theirs)


def test_checks_come_before_every_implementation() -> None:
    x, y = torch.zeros(1, 1, 2, 3, dtype=torch.complex64), torch.zeros(1, 2, 3)
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="one dtype"):
            correlation_peaks(x.to(device), y.to(device))
