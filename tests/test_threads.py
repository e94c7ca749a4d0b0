import psutil
import pytest
import torch
from harness.threads import use_idle_cores


@pytest.fixture
def cores(monkeypatch):
    """A machine of four cores, and what other programs take of them in percent."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4), raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield lambda *shares: monkeypatch.setattr(psutil, "cpu_percent", lambda **_: list(shares))
    torch.set_num_threads(before)


@pytest.mark.parametrize(("shares", "threads"), [((0, 3, 20, 1), 4), ((0, 99, 0, 60), 2), ((99, 99, 99, 99), 1)])
def test_threads_are_as_many_as_idle_cores(cores, capsys, shares, threads):
    cores(*shares)
    use_idle_cores()
    assert torch.get_num_threads() == threads
    assert ("busy" in capsys.readouterr().out) == (threads < 4)


def test_what_the_user_says_counts(cores, monkeypatch):
    cores(99, 99, 99, 99)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    use_idle_cores()
    assert torch.get_num_threads() == 4
