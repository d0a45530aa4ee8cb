from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cryoalign.app.schema import load_settings
from cryoalign.images.fourier import fourier_shrink
from cryoalign.particles.simulate import simulate
from examples.pose_encoder import (
    YAML,
    Aligner,
    PoseEncoder,
    Settings,
    main,
    pixel_errors,
    train,
)

TINY = Settings(
    n_train=1000, n_test=64, n_views=6, size=48, snr=0.3, max_shift=4.0, box=24, hidden=128,
    epochs=6, batch_size=50, more_views=(), low_snr=None, seeds=(0,),
)  # fmt: skip


def test_the_file_beside_the_example_has_its_defaults() -> None:
    assert load_settings(Settings, YAML) == Settings()


def test_turned_and_mirrored_particles_have_their_scores_moved_along() -> None:
    """The exact symmetries: a quarter turn and a mirror of an odd box move pixels, not values."""
    settings = replace(TINY, size=33, box=33, max_shift=2.0)
    images = torch.randn(3, 33, 33, generator=torch.Generator().manual_seed(0))
    encoder = PoseEncoder(images[:2], settings)
    centre = torch.zeros(1, 1, 2)
    table = encoder(images, centre)  # (n, k, s, hands, a)
    quarter = settings.angles // 4
    # rot90 turns +y towards +x, so the pose that takes it back turns a quarter more.
    turned = encoder(images.rot90(1, (1, 2)), centre)
    torch.testing.assert_close(turned, table.roll(quarter, -1), rtol=0, atol=1e-5)
    # Mirrored first, then turned by a: the same as turned by -a, then mirrored.
    back = -torch.arange(settings.angles) % settings.angles
    mirrored = encoder(images.flip(2), centre)
    torch.testing.assert_close(mirrored, table.flip(3)[..., back], rtol=0, atol=1e-5)


def test_the_loss_is_expected_score_and_entropy() -> None:
    data = simulate(4, 3, size=48, snr=0.3, max_shift=4.0, seed=1)
    encoder, small = PoseEncoder(data.views, TINY), fourier_shrink(data.images, TINY.box)
    scores = encoder(small, encoder.centres(small)).double().flatten(1)
    q = torch.distributions.Categorical(logits=scores / TINY.temperature)
    expected = (q.probs * scores).sum(1) + TINY.temperature * q.entropy()
    torch.testing.assert_close(encoder.loss(small).double(), -expected.mean(), rtol=1e-5, atol=0)


def test_it_learns_where_particles_are_without_being_told() -> None:
    data = simulate(TINY.n_test + TINY.n_train, 6, size=48, snr=0.3, max_shift=4.0, seed=0)
    held_out, truth = data.images[: TINY.n_test], data.pose[: TINY.n_test]
    torch.manual_seed(0)
    encoder = PoseEncoder(data.views, TINY)
    aligner = Aligner(encoder, data.views)

    def offset() -> float:
        """Median distance, px, of the nearest of the predicted centres from the true one."""
        with torch.no_grad():
            centres = encoder.centres(fourier_shrink(held_out, TINY.box)) * encoder.scale
        return float((centres - truth.shift[:, None]).norm(dim=2).amin(1).median())

    def right() -> float:
        label, pose, _ = aligner.align(held_out)
        found = (label == data.class_number[: TINY.n_test] - 1) & (pose.mirror == truth.mirror)
        return float((found & (pixel_errors(pose, truth) < 1)).double().mean())

    before = offset(), right()
    curve, _ = train(encoder, data.images[TINY.n_test :], seed=0)
    assert curve[-1] < curve[0]
    assert offset() < 0.6 * before[0]
    assert right() > max(0.9, before[1] + 0.1)


def test_the_example_draws_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["seeds=[0]", "n_train=100", "n_test=20", "n_views=4", "size=48", "max_shift=2"]
    words += ["epochs=1", "batch_size=50", "more_views=[3]", f"output={tmp_path / 'picture.png'}"]
    table = main(words)
    assert {"encoder", "encoder, refined", "search"} <= set(table.method)
    searched = table[table.method == "search"]
    assert (searched["right %"] > 60).all()
    printed = capsys.readouterr().out
    assert "training takes" in printed
    assert "trial shifts, 3 px / this" in printed
    assert (tmp_path / "picture.png").stat().st_size > 10_000
