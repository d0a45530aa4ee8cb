import torch

from cryoalign.app.schema import load_settings
from cryoalign.images.geometry import transform
from cryoalign.particles.simulate import simulate
from cryoalign.pose import Pose
from examples.autoencoder import (
    YAML,
    Autoencoder,
    Settings,
    align_pairs,
    encode,
    main,
    make_data,
)

TINY = Settings(n_train=8, n_test=12, n_views=2, size=33, angles=64, templates=5, batch_size=8)


def test_latents_are_those_of_the_turned_and_mirrored_particle() -> None:
    """Quarter turns and mirrors about the centre of an odd box move pixels and make none."""
    torch.manual_seed(0)
    images = torch.randn(4, 33, 33)
    moved = (images, images.rot90(1, (1, 2)), images.flip(2), images.rot90(3, (1, 2)).flip(1))
    for align in (True, False):
        model = Autoencoder(TINY, align).eval()
        with torch.no_grad():
            first, *others = (model(particles).latent for particles in moved)
        change = max(float((first - other).abs().max()) for other in others)
        apart = float(torch.pdist(first).min())
        assert (change < 1e-3 * apart) == align, (align, change, apart)


def test_every_particle_finds_its_own_reference() -> None:
    """Poses against the truth, each particle with another reference than the next."""
    made = simulate(20, 4, size=40, snr=1.0, max_shift=2.0, seed=1)
    settings = Settings(size=40, max_shift=1.0)
    model = Autoencoder(settings, align=True)
    views = made.views[made.class_number - 1]
    spectra = model.spectra(made.images, model.shifts)
    found = align_pairs(spectra, made.images, views, model.rings, model.shifts, fine=True)
    assert torch.equal(found.mirror, made.pose.mirror)
    turn = (found.angle - made.pose.angle + 180) % 360 - 180
    assert turn.abs().median() < 1
    assert (found.shift - made.pose.shift).norm(dim=1).median() < 0.2


def test_the_reconstruction_lies_as_the_particle_does() -> None:
    """A decoder that knows the view: its image comes out in the particle's own pose."""
    made = simulate(10, 1, size=40, snr=1.0, max_shift=2.0, seed=2)
    clean = simulate(10, 1, size=40, snr=float("inf"), max_shift=2.0, seed=2).images
    model = Autoencoder(Settings(size=40), align=True).eval()
    turned = transform(
        made.views, Pose(torch.tensor([50.0]), torch.zeros(1, 2), torch.tensor([True]))
    )
    last = model.decoder[2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(turned.flatten())
        images = model(made.images).images
    inside = model.mask > 0.5
    error = (images - clean)[:, inside].square().sum() / clean[:, inside].square().sum()
    assert error < 0.03


def test_alignment_inside_beats_the_plain_autoencoder(tmp_path) -> None:
    words = [
        *("n_train=400", "n_test=100", "n_views=3", "size=32", "snr=0.5", "epochs=5", "seeds=[0]"),
        *("templates=16", f"output={tmp_path / 'picture.png'}"),
    ]
    (without,), (inside,) = main(words).values()
    assert inside.purity > 0.9 > without.purity + 0.1
    assert inside.spread < 0.5 * without.spread
    assert inside.error < 0.6 * without.error
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_held_out_particles_are_none_of_those_trained_with() -> None:
    data = make_data(TINY, seed=0)
    seen = [{int(sample["index"]) for sample in each} for each in (data.train, data.test)]
    assert seen == [set(range(8)), set(range(8, 20))]
    assert encode(Autoencoder(TINY, align=True), data.test).latent.shape == (12, 8)


def test_the_settings_file_holds_the_defaults() -> None:
    assert load_settings(Settings, YAML) == Settings()
