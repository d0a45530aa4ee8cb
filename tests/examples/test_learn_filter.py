from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cryoalign.app.schema import load_settings
from cryoalign.particles.simulate import phantom, project, spread_views
from examples import learn_filter
from examples.learn_filter import (
    LearnedFilter,
    Settings,
    main,
    measured_noise,
    right,
    simulate_particles,
    train_filter,
)

SMALL = ["n_classes=8", "n_train=500", "size=40", "radius=11", "snr=0.1", "epochs=2"]


def test_learning_raises_the_accuracy_on_particles_it_has_not_seen() -> None:
    settings = load_settings(Settings, None, SMALL)
    molecule, directions = phantom(0, n_blobs=300, radius=11), spread_views(8, 0)
    views = project(molecule, directions, size=40)
    train = simulate_particles(settings.n_train, molecule, directions, settings, seed=1)
    test = simulate_particles(800, molecule, directions, settings, seed=2)
    model = LearnedFilter(measured_noise(train, settings), settings)

    def judge() -> tuple[torch.Tensor, float]:
        with torch.no_grad():
            loss = F.cross_entropy(model(test.images, test.ctf, views), test.label)
        return right(model.filter(), test, views, settings)[:, 0], float(loss)

    before, loss_before = judge()
    losses = list(train_filter(model, train, views, settings, seed=0))
    after, loss_after = judge()
    gain = after - before
    assert float(gain.mean()) > 2 * float(gain.std()) / len(gain) ** 0.5
    assert loss_after < 0.9 * loss_before
    assert losses[-1] < losses[0]
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert float(value.grad.abs().max()) > 0, name


def test_the_script_runs_from_its_settings(tmp_path) -> None:
    picture = tmp_path / "picture.png"
    small = ["n_train=60", "n_test=60", "n_classes=3", "epochs=1", "size=32", "radius=8"]
    table = main(["seeds=[0, 1]", *small, f"output={picture}"])
    assert len(table) == 2 * 3 * 6
    assert (table["class_right"] >= table["hand_right"]).all()
    by_hand = (
        table[table["filter"].isin(learn_filter.BY_HAND)].groupby(["seed", "test"])["gain"].max()
    )
    assert (by_hand == 0).all()  # gains are over the best of these
    assert picture.stat().st_size > 10_000


def test_settings_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["n_trian=10"])
    assert "did you mean n_train" in capsys.readouterr().err


def test_the_defaults_stand_in_the_yaml() -> None:
    path = Path(learn_filter.__file__).with_suffix(".yaml")
    assert load_settings(Settings, path) == Settings()
