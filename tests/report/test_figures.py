"""Pictures, judged by what they say: their texts, their levels, and that they can be drawn."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from cryoalign.particles.simulate import simulate, truth_table
from cryoalign.report import figures as plot
from cryoalign.report.montage import grey_range, montage, thumbnail


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def drawn(figure):
    """(h, w, 3) what is on the paper."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize("k", [1, 7, 60])
def test_montage_tells_number_size_and_resolution_in_order_of_size(k):
    rng = np.random.default_rng(k)
    averages = torch.as_tensor(rng.normal(size=(k, 20, 20)))
    sizes = torch.as_tensor(rng.permutation(np.arange(1, k + 1)) * 1000)
    resolutions = torch.linspace(5, 12, k)
    if k > 1:
        sizes[3], resolutions[3] = 0, torch.nan  # empty
        averages[3] = 0
        resolutions[2] = torch.nan  # too small to halve
        resolutions[1] = torch.inf
        averages[5] = 7.0  # flat
    figure = montage(averages, sizes, resolutions, pixel_size=2.0)
    order = np.argsort(-sizes.numpy(), kind="stable")
    found = texts(figure)
    assert [text for text in found if text.isdigit()] == [str(i + 1) for i in order]
    expected = [
        f"{sizes[i]:,} · " + (f"{resolutions[i]:.1f} Å" if resolutions[i].isfinite() else "–")
        for i in order
        if sizes[i] > 0
    ]
    assert [text for text in found if "· " in text and not text.startswith(" ")] == expected
    assert found.count("empty") == (k > 1)
    assert len(figure.axes[0].images) == k - (k > 1)
    assert any(text.endswith(f"{int(sizes.sum()):,} particles") for text in found)
    picture = drawn(figure)
    assert picture.std() > 20
    height, width = picture.shape[:2]
    assert max(height, width) < 2500


def test_montage_levels_are_robust_and_each_its_own():
    rng = np.random.default_rng(0)
    averages = rng.normal(size=(2, 64, 64))
    averages[1] = 50 + 10 * averages[1]
    averages[0, 32, 32] = 1e6  # a hot pixel
    averages[0, 0, 0] = -1e6  # outside the disc
    averages[1, 30, 30] = np.nan
    for image, (centre, spread) in zip(averages, [(0, 1), (50, 10)], strict=True):
        low, high = grey_range(image)
        assert low == pytest.approx(centre - 2.33 * spread, abs=0.3 * spread)
        assert high == pytest.approx(centre + 2.88 * spread, abs=0.5 * spread)


def test_scale_bar_is_as_long_as_it_says():
    """A tile of 50 px of 4 Å is 200 Å: a bar of 50 Å is a quarter of the image's width."""
    figure = montage(np.zeros((1, 50, 50)), [3], [np.nan], pixel_size=4.0)
    axes = figure.axes[0]
    left, right, _, _ = axes.images[0].get_extent()
    bar = np.ptp(axes.lines[0].get_xdata())
    assert "50 Å" in texts(figure)
    assert bar / (right - left) == pytest.approx(0.25)


def test_pose_histograms_count_every_used_particle_once():
    frame = truth_table(simulate(500, 7, size=32, seed=1)).astype({"angle": float})
    frame.loc[:9, "class_number"] = 0
    frame.loc[:9, ["angle", "shift_x", "shift_y"]] = np.nan
    figure = plot.pose_histograms(frame, max_shift=3.0, n_classes=9)
    x, y, angle, sizes = figure.axes
    for axes in (x, y, angle):
        assert sum(bar.get_height() for bar in axes.patches) == 490
    assert [bar.get_height() for bar in sizes.patches][-2:] == [0, 0]  # classes 8 and 9
    assert sum(bar.get_height() for bar in sizes.patches) == 490
    marks = [line.get_xdata()[0] for line in x.lines if len(line.get_xdata())]
    assert marks == [-3, 3]
    edges = [bar.get_x() for bar in x.patches]
    assert np.abs(np.asarray(edges) - 3).min() < 1e-9  # no bar astride the limit
    assert "490 particles, 10 set aside" in figure.get_suptitle()
    drawn(figure)


@pytest.mark.parametrize("limit", [None, 0.0, 0.01, 3.0])
def test_pose_histograms_of_nothing_and_of_odd_limits(limit):
    columns = {"class_number": [0], "shift_x": [np.nan], "shift_y": [np.nan], "angle": [np.nan]}
    drawn(plot.pose_histograms(pd.DataFrame(columns | {"mirror": [0]}), limit))
    one = {"class_number": [1], "shift_x": [0.5], "shift_y": [-9.0], "angle": [-170.0]}
    figure = plot.pose_histograms(pd.DataFrame(one | {"mirror": [1]}), limit)
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 1
    drawn(figure)


@pytest.mark.parametrize("k", [1, 7, 60])
def test_frc_embedding_and_history_can_be_drawn(k):
    rng = np.random.default_rng(0)
    curves = np.clip(rng.normal(0.5, 0.2, (k, 17)), -1, 1)
    if k > 1:
        curves[3], curves[4] = 0, np.nan
    figure = plot.frc_curves(torch.as_tensor(curves), 2.0, size=33)
    left_out = 2 if k > 1 else 0
    curve_lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 17]
    assert len(curve_lines) == k - left_out + 1
    assert curve_lines[0].get_xdata()[-1] == pytest.approx(16 / (33 * 2.0))
    drawn(figure)
    place = rng.normal(size=(300, 2))
    place[0] = np.nan
    labels = rng.integers(0, k + 1, 300)
    figure = plot.embedding(place, place, labels, (0.25, 0.75))
    assert "75%" in figure.axes[1].get_xlabel()
    shown = (labels > 0) & np.isfinite(place[:, 0])
    assert len(figure.axes[0].collections[0].get_offsets()) == shown.sum()
    drawn(figure)


def curves(figure):
    """The values of each panel's curve by its title, and the labels of the y axes."""
    for axes in figure.axes:
        assert axes.get_xlabel() == "iteration"
    values = {axes.get_title(): axes.lines[0].get_ydata() for axes in figure.axes}
    return values, [axes.get_ylabel() for axes in figure.axes]


def test_history_draws_the_columns_that_are_there():
    table = pd.DataFrame({"iteration": [1, 2], "mean_score": [0.1, np.nan], "reassigned": [1, 0.1]})
    figure = plot.history(table)
    values, labels = curves(figure)
    assert list(values) == ["mean score", "particles that changed class"]
    np.testing.assert_array_equal(values["mean score"], [0.1, np.nan])
    np.testing.assert_array_equal(values["particles that changed class"], [1, 0.1])
    assert labels == ["correlation coefficient", "share of the particles"]
    drawn(figure)
    drawn(plot.history(table.assign(pose_change_px=0.0, empty_classes=0)))
    with pytest.raises(ValueError, match="no column that can be drawn"):
        plot.history(pd.DataFrame({"iteration": [1]}))


def test_history_of_classification_shows_evidence_certainty_resolution_and_steps():
    """A box of 48 px of 3 Å is 144 Å: 10 rings reach 14.4 Å, 12 rings 12 Å."""
    table = pd.DataFrame(
        {
            "iteration": [1, 2, 3, 4],
            "step": ["subset", "start", "cycle", "relax"],
            "rings": [10, 10, 10, 12],
            "classes": [6, 4, 4, 4],
            "log_evidence": [100.0, 120, 110, 150],
            "certainty": [np.nan, 0.7, 0.8, 0.9],
            "empty_classes": 0,
        }
    )
    figure = plot.history(table, box_length=144.0)
    values, labels = curves(figure)
    np.testing.assert_array_equal(values["log-evidence"], table["log_evidence"])
    np.testing.assert_array_equal(values["certainty of the class"], table["certainty"])
    np.testing.assert_allclose(values["resolution used"], [14.4, 14.4, 14.4, 12])
    np.testing.assert_array_equal(values["classes"], table["classes"])
    assert labels[:3] == ["mean per particle (nats)", "mean posterior", "Å"]
    steps = [text.get_text() for text in figure.legends[0].get_texts()]
    assert steps == ["subset", "start", "cycle", "relax"]
    colours = [patch.get_facecolor() for patch in figure.legends[0].get_patches()]
    for axes in figure.axes:
        assert [span.get_facecolor() for span in axes.patches] == colours
        assert [span.get_x() for span in axes.patches] == [0.5, 1.5, 2.5, 3.5]
    drawn(figure)
    values, labels = curves(plot.history(table))
    np.testing.assert_array_equal(values["resolution used"], table["rings"])
    assert labels[2] == "Fourier rings"


def test_history_numbers_the_steps_of_a_schedule():
    table = pd.DataFrame({"iteration": [1, 2, 3], "step": [1, 1, 2], "mean_score": [0.1, 0.2, 0.3]})
    figure = plot.history(table)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["step 1", "step 2"]


def test_saved_whole_and_without_global_state(tmp_path):
    before = dict(matplotlib.rcParams)
    path = plot.save(montage(np.eye(8)[None], [5], [4.0]), tmp_path / "m.png", dpi=50)
    assert imread(path).shape[2] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]
    with pytest.raises(ValueError, match="nonsense"):
        plot.save(montage(np.eye(8)[None], [5], [4.0]), tmp_path / "m.nonsense")
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]
    assert dict(matplotlib.rcParams) == before


def test_thumbnail_is_the_image(tmp_path):
    ramp = np.linspace(0, 1, 30 * 20).reshape(30, 20)
    (tmp_path / "t.png").write_bytes(thumbnail(ramp))
    pixels = imread(tmp_path / "t.png")[..., 0]
    assert pixels.shape == (30, 20)
    assert np.corrcoef(pixels.ravel(), ramp.ravel())[0, 1] > 0.98  # the corners are clipped


def test_montage_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="k sizes"):
        montage(np.zeros((3, 4, 4)), [1, 2], [1, 2, 3])
