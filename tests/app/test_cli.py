"""The command: what it says, on which stream, with which exit code."""

import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

import cryoalign
from cryoalign.app import run as running
from cryoalign.app.cli import main


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def star(tmp_path, capsys):
    words = ["n=40", "n_classes=2", "size=32", "max_shift=1", "snr=1"]
    assert main(["simulate", str(tmp_path / "sim dir"), *words]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "sim dir" / "truth.csv").exists()
    return said.strip().splitlines()[-1].strip()


def test_what_simulate_says_to_run_next_runs(star, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(star)
    assert program == "cryoalign"
    more = [
        "likelihood.cycles=1",
        "particle.max_shift=1px",
        "embedding=false",
        "device=cpu",
        "threads=1",
    ]
    assert main([*words, *more]) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    lines = said.splitlines()
    assert any(line.startswith("step ") for line in lines)
    assert "CTF: not used, because particles.star has no defocus" in lines
    folder = tmp_path / "runs" / "particles-classify"
    assert f"report    {folder / 'report.html'}" in lines
    assert f"picture   {folder / 'class_averages.png'}" in lines
    assert "resolution (Å)" in said
    assert len(pd.read_csv(folder / "particles.csv")) == 40


def test_users_errors_are_one_message_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CRYOALIGN_DEBUG", raising=False)
    for words, message in (
        (["run", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["run", "particles=nowhere.star", "n_classes=2"], "nowhere.star: no such file"),
        (["run", "particle=nowhere.star", "n_classes=2"], "particle: should be a section"),
        (["run", "particlse=nowhere.star", "n_classes=2"], "did you mean particles?"),
        (["check", str(tmp_path / "nowhere.star")], "no such file"),
        (["simulate", str(tmp_path / "x"), "n=-4"], "n: should be greater than or equal to 1"),
        (["simulate", str(tmp_path / "x"), "size=20", "max_shift=9"], "raise size or lower"),
    ):
        assert main(words) == 2
        said, errors = capsys.readouterr()
        assert said == ""
        assert errors.startswith("cryoalign: error: ")
        assert message in errors
        assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_came_from(capsys, monkeypatch):
    monkeypatch.setenv("CRYOALIGN_DEBUG", "1")
    assert main(["run", "nowhere.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_check_tells_all_problems_by_exit_code_1(star, capsys):
    stack = shlex.split(star)[2].removeprefix("particles=")
    assert main(["check", stack]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["check", stack, "particle.radius=13 px", "method=mra"]) == 1
    assert "at most 12 px" in capsys.readouterr().out
    assert main(["check", stack, "images.box=64"]) == 1


def test_help_lists_every_key_and_version_is_told(capsys):
    for words, expected in (
        (["run", "--help"], ["particle.radius", "averaging.centre", "overwrite"]),
        (["simulate", "--help"], ["pixel_size", "snr"]),
        (["--version"], [f"cryoalign {cryoalign.__version__}"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert all(text in said for text in expected)


def test_help_and_version_do_not_wait_for_pytorch():
    """They import neither PyTorch nor scikit-learn nor matplotlib, which take seconds."""
    program = (
        "import sys; from cryoalign.app.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'sklearn', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    for word in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", program, word], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_interruption_has_its_exit_code(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt("stopped after iteration 2")

    monkeypatch.setattr(running, "run", interrupted)
    assert main(["run", "particles=x.star", "n_classes=2"]) == 130
    assert capsys.readouterr().err == "cryoalign: stopped after iteration 2\n"


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_keeps_what_was_done(tmp_path):
    # So many that it is far from settled when the first iteration is done.
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).normal(size=(2000, 32, 32)))
    words = [f"particles={tmp_path / 'noise.npy'}", f"output={tmp_path / 'out'}", "n_classes=8"]
    words += ["method=mra", "iterations=100000", "settle=0", "device=cpu", "threads=1"]
    command = [sys.executable, "-m", "cryoalign", "run", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint, patience = tmp_path / "out" / "checkpoint.npz", time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.startswith("cryoalign: stopped after iteration ")
    assert f"cryoalign run {tmp_path / 'out' / 'config.yaml'} resume=true" in errors
    assert "Traceback" not in errors
