import torch

from cryoalign.images.polar import Rings, ring_spectra
from examples.em_as_autograd import closed_form, log_likelihood, main, multiplicity


def test_the_gradient_is_the_residual_of_the_weighted_class_average() -> None:
    generator = torch.Generator().manual_seed(0)

    def images(n: int) -> torch.Tensor:
        return torch.randn(n, 17, 17, generator=generator, dtype=torch.float64)

    rings, temperature = Rings(1, 6, angles=24), 0.05
    shifts = torch.tensor([[0.0, 0.0], [1.0, -0.5]], dtype=torch.float64)
    x = ring_spectra(images(7), rings, shifts)
    z = 0.5 * ring_spectra(images(3), rings)[:, 0] * multiplicity(x).sqrt()
    z.requires_grad_()
    log_prior = torch.tensor([0.1, -0.3, 0.0], dtype=torch.float64, requires_grad=True)
    total = log_likelihood(x, z, log_prior, temperature).logsumexp(1).sum()
    by_z, by_prior = torch.autograd.grad(total, (z, log_prior))
    average, size, evidence = closed_form(x, z.detach(), log_prior.detach(), temperature)
    torch.testing.assert_close(total.detach(), evidence, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_prior, size, rtol=1e-10, atol=0)
    residual = size[:, None, None] / temperature * (average - z.detach())
    torch.testing.assert_close(by_z, residual, rtol=1e-8, atol=1e-8)


def test_the_example_agrees_with_itself(tmp_path) -> None:
    difference, rand = main(tmp_path / "picture.png", n=90, steps=8)
    assert difference < 1e-4  # float32
    assert rand > 0.5
    assert (tmp_path / "picture.png").stat().st_size > 10_000
