"""A run folder: what it holds, what it refuses, and that an interruption costs nothing."""

import html
import io
from contextlib import chdir
from dataclasses import replace
from io import StringIO
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from rich.console import Console
from sklearn.metrics import adjusted_rand_score

from cryoalign.app.check import check_stack
from cryoalign.app.run import Interrupted, run
from cryoalign.app.run_folder import RUN_FILES, write_csv
from cryoalign.app.settings import load_config
from cryoalign.io.formats import read_images
from cryoalign.methods.state import State
from cryoalign.particles.simulate import simulate, write_simulation
from cryoalign.results.alignment import Alignment

SPOILT = 7  # the row that is NaN


@pytest.fixture(scope="module", autouse=True)
def own_threads():
    """``threads`` is of the whole process: leave it as it was for other tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    simulation = simulate(90, 3, size=32, snr=0.5, max_shift=1.0, seed=3)
    simulation.images[SPOILT] = torch.nan
    return write_simulation(tmp_path_factory.mktemp("stack"), simulation)


def settings(star, output, *more):
    words = ("method=mra", "n_classes=3", "iterations=3", "settle=0", "particle.max_shift=1 px")
    more = (
        "device=cpu",
        "threads=1",
        *more,
    )  # small work, perhaps on a busy machine: threads would wait
    return load_config(None, [f"particles={star}", f"output={output}", *words, *more])


@pytest.fixture(scope="module")
def finished(star):
    """A run whose paths were given relative to the current folder."""
    with chdir(star.parent):
        return run(settings(star.name, "runs/full"))


def test_a_run_writes_all_its_files_and_no_others(finished):
    others = {  # of other methods
        "average_iterations.mrcs",
        "frc_iterations.csv",
        "stability.csv",
        "reproducibility.csv",
    }
    expected = set(RUN_FILES) - others
    assert {path.name for path in finished.iterdir()} == expected
    for picture in finished.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG"), picture
        assert picture.stat().st_size > 5000, picture
    assert "<html" in (finished / "report.html").read_text()[:200]


def test_what_was_done_with_the_ctf_is_said_everywhere(tmp_path):
    made = simulate(60, 2, size=32, snr=2.0, max_shift=1.0, defocus=(1.0, 2.0), seed=3)
    star = write_simulation(tmp_path / "data", made)
    line = "CTF: phases flipped, averages weighted by CTF^2 (particles.star has defocus)"
    shown = io.StringIO()
    config = settings(star, tmp_path / "run", "n_classes=2", "iterations=2", "embedding=false")
    folder = run(config, console=Console(file=shown, width=200))
    assert line in shown.getvalue().splitlines()
    assert f"# {line}" in (folder / "class_averages.star").read_text().splitlines()
    assert html.escape(line.removeprefix("CTF: ")) in (folder / "report.html").read_text()
    assert Alignment.load(folder / "alignment.npz").ctf == line
    assert check_stack(star, config.made()).ctf == line
    plain = write_simulation(tmp_path / "plain", simulate(60, 2, size=32, seed=3, max_shift=1.0))
    expected = "CTF: not used, because particles.star has no defocus"
    assert check_stack(plain, config.made()).ctf == expected


def test_particles_csv_keeps_its_contract(finished):
    text = (finished / "particles.csv").read_text().splitlines()
    assert text[0] == (
        "index,class_number,angle,shift_x,shift_y,mirror,score,"
        "evidence,oddness,junk_score,angle_sd,shift_x_sd,shift_y_sd"
    )
    assert text[1 + SPOILT] == f"{SPOILT},0{',' * 11}"
    table = pd.read_csv(finished / "particles.csv")
    assert table["index"].tolist() == list(range(90))
    used = table.drop(index=SPOILT)
    assert used["class_number"].between(1, 3).all()
    assert used["mirror"].isin([0, 1]).all()
    assert np.isfinite(used).all(axis=None)
    alignment = Alignment.load(finished / "alignment.npz")
    np.testing.assert_array_equal(table["class_number"], alignment.class_number)
    np.testing.assert_allclose(table["angle"], alignment.pose.angle, rtol=1e-6)
    np.testing.assert_allclose(table[["shift_x", "shift_y"]], alignment.pose.shift, rtol=1e-5)
    parquet = pd.read_parquet(finished / "particles.parquet")
    pd.testing.assert_frame_equal(parquet, table, check_dtype=False)


def test_star_file_is_the_table_in_relions_columns(finished, star):
    blocks = starfile.read(finished / "particles.star", always_dict=True)
    written, given = blocks["particles"], starfile.read(star)["particles"]
    table = pd.read_csv(finished / "particles.csv").drop(index=SPOILT)
    names = given["rlnImageName"].drop(index=SPOILT)
    assert written["rlnImageName"].tolist() == names.tolist()
    np.testing.assert_array_equal(written["rlnClassNumber"], table["class_number"])
    np.testing.assert_allclose(written["rlnAnglePsi"], table["angle"], atol=1e-4)
    np.testing.assert_allclose(written["rlnOriginXAngst"], 3.0 * table["shift_x"], atol=1e-4)
    np.testing.assert_array_equal(written["rlnIsFlip"], table["mirror"])


def test_averages_and_tables_agree(finished):
    table = pd.read_csv(finished / "particles.csv")
    classes = pd.read_csv(finished / "classes.csv")
    sizes = table["class_number"].value_counts().reindex([1, 2, 3], fill_value=0)
    assert classes["size"].tolist() == sizes.tolist()
    statistics = starfile.read(finished / "class_averages.star", always_dict=True)
    assert statistics["model_classes"]["cryoalignClassSize"].tolist() == sizes.tolist()
    for name in ("class_averages.mrcs", "class_averages_unfiltered.mrcs"):
        with mrcfile.open(finished / name) as averages:
            assert averages.data.shape == (3, 32, 32)
            assert averages.voxel_size.x == pytest.approx(3.0)
            assert (averages.data.std(axis=(1, 2)) > 0).all()
    history = pd.read_csv(finished / "history.csv")
    assert history["iteration"].tolist() == [1, 2, 3]
    rejected = pd.read_csv(finished / "rejected.csv")
    assert rejected["index"].tolist() == [SPOILT]
    assert "NaN" in rejected["reason"][0]


def without_seconds(folder):
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def assert_same_results(one, other):
    for name in ("particles.csv", "classes.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    averages = [read_images(folder / "class_averages.mrcs") for folder in (one, other)]
    assert torch.equal(*averages)
    # atol: the checkpoint keeps ten digits of the history.
    pd.testing.assert_frame_equal(without_seconds(one), without_seconds(other), atol=1e-9)


def test_the_resolved_settings_give_the_same_run_from_another_folder(
    finished, star, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = load_config(finished / "config.yaml", ["embedding=false"])
    assert (config.particles, config.output) == (star, finished)
    again = run(replace(config, output=Path("again")))
    assert again == tmp_path / "again"
    assert not (again / "tsne.png").exists()
    assert_same_results(again, finished)


def test_resuming_gives_what_an_uninterrupted_run_gives(finished, star, tmp_path):
    def stop(state):
        if state.iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="after iteration 2") as stopped:
        run(settings(star, tmp_path / "cut", "embedding=false"), on_step=stop)
    assert f"cryoalign run {tmp_path / 'cut' / 'config.yaml'} resume=true" in str(stopped.value)
    assert without_seconds(tmp_path / "cut")["iteration"].tolist() == [1, 2]
    assert not (tmp_path / "cut" / "particles.csv").exists()
    done = []
    resumed = run(
        load_config(tmp_path / "cut" / "config.yaml", ["resume=true"]),
        on_step=lambda state: done.append(state.iteration),
    )
    assert done == [3]
    assert_same_results(resumed, finished)


def test_an_interruption_between_checkpoint_and_log_counts_the_step(star, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cryoalign.app.progress.Watch.step", interrupted)
    with pytest.raises(Interrupted, match="stopped after iteration 1;"):
        run(settings(star, tmp_path / "cut", "embedding=false"))


def test_resuming_refuses_other_settings_and_goes_further_on_request(star, tmp_path):
    config = settings(star, tmp_path / "run", "iterations=1", "embedding=false")
    run(config)
    wider = replace(config.particle, max_shift="2 px")
    with pytest.raises(ValueError, match=r"particle\.max_shift was 1 px, now 2 px") as error:
        run(replace(config, resume=True, seed=5, particle=wider))
    assert "seed was 0, now 5" in str(error.value)
    run(replace(config, resume=True, iterations=2))
    assert without_seconds(tmp_path / "run")["iteration"].tolist() == [1, 2]
    assert load_config(tmp_path / "run" / "config.yaml").iterations == 2


def test_a_run_that_fails_gives_back_what_it_was_to_replace(star, tmp_path):
    config = settings(star, tmp_path / "run", "iterations=1", "embedding=false")
    folder = run(config)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for wrong, message in (
        ({"n_classes": 5000}, "n_classes"),  # found out after the folder was claimed
        ({"references": str(folder / "class_averages.mrcs")}, "is an input of this run"),
        ({"particles": folder / "class_averages.mrcs"}, "is an input of this run"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(config, overwrite=True, **wrong))
        assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_run_in_the_way_is_kept_unless_told(star, tmp_path):
    config = settings(star, tmp_path / "run", "iterations=1", "embedding=false")
    run(config)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=true"):
        run(replace(config, seed=1))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    run(replace(config, seed=1, overwrite=True))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert load_config(tmp_path / "run" / "config.yaml").seed == 1


@pytest.mark.parametrize("name", ["particles.csv", "config.yaml"])
def test_a_folder_that_no_run_wrote_is_never_overwritten(star, tmp_path, name):
    (tmp_path / name).write_text("precious: 1\n")
    for more in ("overwrite=true", "overwrite=false"):
        with pytest.raises(FileExistsError, match="not of a cryoalign run"):
            run(settings(star, tmp_path, more))
    with pytest.raises(FileNotFoundError, match="start a run without resume"):
        run(settings(star, tmp_path, "resume=true"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious: 1\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("particles=nowhere.star", "nowhere.star: no such file"),
        ("references=randm", "references: randm is neither a file nor one of random"),
        ("particle.radius=15px", r"particle\.radius\) of at most 14 px"),
        ("max_rejected=0", "1 of 90 particles are unusable"),
        ("n_classes=90", "89 usable particles"),
    ],
)
def test_what_does_not_fit_leaves_no_folder_behind(star, tmp_path, words, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(settings(star, tmp_path / "run", *words.split()))
    assert list(tmp_path.iterdir()) == []


def test_runs_without_an_output_are_numbered(star, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(settings(star, "x", "iterations=1", "embedding=false"), output=None)
    names = [run(config).relative_to(tmp_path) for _ in range(2)]
    assert names == [Path("runs/particles-mra"), Path("runs/particles-mra-2")]


def test_classes_say_which_reference_they_came_from(star, tmp_path):
    """With the true views as references, classes are the true ones, numbered by size."""
    words = (f"references={star.parent / 'views.mrcs'}", "n_classes=null", "embedding=false")
    folder = run(settings(star, tmp_path / "run", *words))
    truth = pd.read_csv(star.parent / "truth.csv").drop(index=SPOILT)
    found = pd.read_csv(folder / "particles.csv").drop(index=SPOILT)
    classes = pd.read_csv(folder / "classes.csv").set_index("class_number")
    assert classes["size"].is_monotonic_decreasing
    reference = found["class_number"].map(classes["reference"])
    assert (truth["class_number"] == reference).mean() > 0.95
    assert len(read_images(folder / "class_averages.mrcs")) == 3


def test_classes_from_nothing_by_one_command(tmp_path):
    made = simulate(150, 3, size=32, snr=0.5, max_shift=1.0, seed=4)
    star = write_simulation(tmp_path / "stack", made)
    words = [f"particles={star}", "n_classes=3", "method=classify", "particle.max_shift=1px"]
    more = [f"output={tmp_path / 'run'}", "device=cpu", "embedding=false", "seed=1"]
    folder = run(load_config(None, [*words, *more]))
    table = pd.read_csv(folder / "particles.csv")
    assert adjusted_rand_score(made.class_number, table["class_number"]) > 0.9
    assert (folder / "report.html").exists()
    assert pd.read_csv(folder / "history.csv")["log_evidence"].notna().all()


def test_a_classification_goes_on_where_it_stopped(star, tmp_path):
    words = [f"particles={star}", "n_classes=3", "method=classify", "particle.max_shift=1px"]
    words += ["device=cpu", "embedding=false", "threads=1"]
    whole = run(load_config(None, [*words, f"output={tmp_path / 'whole'}"]))
    steps = []

    def stop(state):
        steps.append(state.iteration)
        if len(steps) == 2:
            raise KeyboardInterrupt

    broken = f"output={tmp_path / 'broken'}"
    with pytest.raises(Interrupted, match="resume=true"):
        run(load_config(None, [*words, broken]), on_step=stop)
    assert not (tmp_path / "broken" / "particles.csv").exists()
    resumed = run(load_config(None, [*words, broken, "resume=true"]), on_step=stop)
    assert steps[2] > steps[1]  # what was done is not done again
    one, two = (pd.read_csv(folder / "particles.csv") for folder in (whole, resumed))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    history = [pd.read_csv(folder / "history.csv") for folder in (whole, resumed)]
    pd.testing.assert_frame_equal(*(table.drop(columns="seconds") for table in history))


def test_a_classification_refuses_the_checkpoint_of_others(star, tmp_path):
    words = [f"particles={star}", "n_classes=3", "method=classify", "particle.max_shift=1px"]
    words += ["device=cpu", "embedding=false", f"output={tmp_path / 'run'}"]
    folder = run(load_config(None, words))
    state = State.load(folder / "checkpoint.npz")
    replace(state, fingerprint="another").save(folder / "checkpoint.npz")
    with pytest.raises(ValueError, match="other particles"):
        run(load_config(None, [*words, "resume=true"]))
    (folder / "checkpoint.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"checkpoint\.npz: not a checkpoint"):
        run(load_config(None, [*words, "resume=true"]))


def test_reference_free_alignment_by_one_command_and_resumed(tmp_path):
    made = simulate(60, 1, size=32, snr=0.5, max_shift=2.0, seed=4)
    star = write_simulation(tmp_path / "stack", made)
    words = [f"particles={star}", "method=rfa", "schedule.max_shift=2 1", "iterations=3"]
    more = ["schedule.shift_step=1 0.5", "device=cpu", "embedding=false", "threads=1"]

    def stop(state):
        if state.iteration == 3:
            raise KeyboardInterrupt

    whole = run(load_config(None, [*words, *more, f"output={tmp_path / 'whole'}"]))
    with pytest.raises(Interrupted, match="after iteration 3"):
        run(load_config(None, [*words, *more, f"output={tmp_path / 'cut'}"]), on_step=stop)
    cut = run(load_config(tmp_path / "cut" / "config.yaml", ["resume=true"]))
    assert_same_results(cut, whole)
    history = pd.read_csv(whole / "history.csv")
    assert history["step"].unique().tolist() == [1, 2]
    for folder in (whole, cut):
        averages = read_images(folder / "average_iterations.mrcs")
        assert averages.shape == (len(history), 32, 32)
        assert torch.equal(averages[-1], Alignment.load(folder / "alignment.npz").averages[0])
        curves = pd.read_csv(folder / "frc_iterations.csv")
        assert curves.groupby("iteration").size().tolist() == [17] * len(history)
        assert curves["frequency"].max() == 0.5
    with mrcfile.open(whole / "average_iterations.mrcs") as stack:
        assert stack.voxel_size.x == pytest.approx(3.0)
    assert (whole / "report.html").exists()


def test_a_crash_brings_the_earlier_results_back(star, tmp_path, monkeypatch):
    folder = run(settings(star, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def crash(*_, **__):
        raise RuntimeError("as from a library")

    with monkeypatch.context() as patch:
        patch.setattr("cryoalign.app.run.align", crash)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="as from a library"):
                run(settings(star, tmp_path / "run", "overwrite=true", "seed=5"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_end_of_a_run_is_told_line_by_line(star, tmp_path):
    text = StringIO()
    console = Console(file=text, width=200)
    run(settings(star, tmp_path / "run", "iterations=1"), console=console)
    lines = text.getvalue().splitlines()
    after = lines[next(i for i, line in enumerate(lines) if line.startswith("iteration")) + 1 :]
    wanted = ("judging 89 particles", "writing tables of 90", "mapping 89 particles", "the report")
    assert len(after) == len(wanted)
    for words, line in zip(wanted, after, strict=True):
        assert words in line


def test_a_table_of_numbers_is_written_as_pandas_writes_it(tmp_path):
    """The same cells by both, also those that are not known, bit by bit."""
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"index": np.arange(500), "mirror": rng.integers(0, 2, 500)})
    table["mirror"] = table["mirror"].astype("Int64").mask(table["index"] % 7 == 0)
    for name, kind in (("single", np.float32), ("double", np.float64)):
        table[name] = (rng.normal(0, 1, 500) * 10.0 ** rng.integers(-9, 9, 500)).astype(kind)
        table.loc[::50, name] = np.nan
    write_csv(tmp_path / "ours.csv", table)
    table.to_csv(tmp_path / "pandas.csv", index=False)
    ours, theirs = ((tmp_path / f"{name}.csv").read_text() for name in ("ours", "pandas"))
    assert ours.splitlines()[0] == theirs.splitlines()[0]
    for one, other in zip(ours.splitlines()[1:], theirs.splitlines()[1:], strict=True):
        cells = list(zip(one.split(","), other.split(","), strict=True))
        assert all(a == b or float(a) == float(b) for a, b in cells), (one, other)


def test_floats_stay_floats_when_they_are_whole(tmp_path):
    table = pd.DataFrame({"class_number": [1, 2], "junk_share": [0.0, 0.0]})
    write_csv(tmp_path / "classes.csv", table)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "classes.csv"), table)


def test_texts_in_a_table_keep_commas(tmp_path):
    table = pd.DataFrame({"index": [1, 2], "reason": ['NaN, or "inf"', "constant"]})
    write_csv(tmp_path / "rejected.csv", table)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "rejected.csv"), table)
