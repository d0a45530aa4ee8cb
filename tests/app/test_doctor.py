"""What the doctor says of a machine, judged by facts that come from elsewhere."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cryoalign.app import cli, doctor


def told() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.examine()}


def test_the_command_tells_versions_and_cores(capsys: pytest.CaptureFixture[str]) -> None:
    """As package metadata, a new interpreter and the system have them."""
    assert cli.main(["doctor"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    asked = [sys.executable, "-c", "import platform; print(platform.python_version())"]
    python = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    assert f"{importlib.metadata.version('cryoalign')}, Python {python}" in page
    assert importlib.metadata.version("torch") in page
    assert f"{os.cpu_count()} cores" in page


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc")
def test_the_vector_unit_is_one_that_the_processor_has() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().lower().split())
    found = told()["processor"].found
    needs = {"AVX512": "avx512f", "AVX2": "avx2"}
    named = [flag for word, flag in needs.items() if word in found]
    assert set(named) <= flags
    if platform.machine() == "x86_64" and not os.environ.get("ATEN_CPU_CAPABILITY"):
        assert bool(named) == bool({"avx512f", "avx2"} & flags)


def test_a_gpu_is_found_where_there_is_one() -> None:
    smi = shutil.which("nvidia-smi")
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True) if smi else None
    cards = listed.stdout.count("GPU ") if listed is not None and not listed.returncode else 0
    findings = told()
    if not cards or torch.version.cuda is None:
        assert findings["GPU"].found == "none that PyTorch sees"
        assert "CUDA kernels loaded" not in findings["CUDA kernels"].found
    else:
        assert sum(name.startswith("GPU ") for name in findings) <= cards


def test_each_gpu_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [SimpleNamespace(name=f"Card {i}", total_memory=(8 << i) * 2**30) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, i))
    monkeypatch.setattr(doctor.kernels, "status", lambda: SimpleNamespace(message="m", advice="a"))
    findings = told()
    assert findings["GPU 0"].found == "Card 0, 8 GiB, capability 9.0"
    assert findings["GPU 1"].found == "Card 1, 16 GiB, capability 9.1"
    assert "GPU" not in findings


def test_without_a_compiler_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compilers are those of the search path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert told()["C++ compiler"].found == "none"
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert told()["C++ compiler"].found == str(compiler)


@pytest.mark.parametrize(
    ("cores", "threads", "advised"), [(16, 1, True), (16, 7, True), (16, 8, False), (2, 1, False)]
)
def test_too_few_threads_are_noticed(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, advised: bool
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    finding = told()["processor"]
    assert f"{cores} cores, {threads} threads" in finding.found
    assert (f"threads={cores}" in finding.advice) == advised
