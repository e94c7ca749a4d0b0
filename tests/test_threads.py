from types import SimpleNamespace

import psutil
import pytest
import torch
from harness import threads
from harness.threads import IdleCores


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores that trains with four threads; gives what is used in percent, by all and by this one."""
    used = SimpleNamespace(by_all=0.0, by_this=0.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_percent", lambda percpu: [used.by_all / 4] * 4)
    monkeypatch.setattr(psutil.Process, "cpu_percent", lambda self: used.by_this)
    monkeypatch.setattr(threads, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield used
    torch.set_num_threads(before)


def test_threads_are_as_many_as_idle_cores_at_any_time(machine, capsys):
    callback = IdleCores()
    callback.on_train_begin(None, None, None)
    assert torch.get_num_threads() == 4
    for by_all, by_this, expected in ((400, 390, 4), (400, 240, 2), (180, 80, 3), (400, 5, 1), (130, 100, 4)):
        machine.by_all, machine.by_this = by_all, by_this
        callback.on_step_end(None, None, None)
        assert torch.get_num_threads() == expected
    assert capsys.readouterr().out.count("Threads to train with") == 4
    machine.by_all = 400
    callback.on_step_end(None, None, None)
    callback.on_train_end(None, None, None)
    assert torch.get_num_threads() == 4


def test_what_keeps_cores_busy_at_the_start_counts(machine):
    machine.by_all = 200
    IdleCores().on_train_begin(None, None, None)
    assert torch.get_num_threads() == 2


def test_what_the_user_says_counts(machine, monkeypatch):
    machine.by_all = 400
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    IdleCores().on_train_begin(None, None, None)
    assert torch.get_num_threads() == 4
