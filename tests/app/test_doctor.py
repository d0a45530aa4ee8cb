import pytest
import torch

from cryoalign.app import cli, doctor
from cryoalign.operators import kernels


def test_the_doctor_speaks_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert torch.__version__ in told
    assert kernels.status().message.split(":")[0] in told


def test_too_few_threads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (processor,) = (f for f in doctor.examine() if f.what == "processor")
    assert "threads=16" in processor.advice
