"""Settings of the allocator hold for a whole process, so they are tried in others."""

import os
import subprocess
import sys

import pytest
import torch

from hf_noisekd.models.memory import free_memory, is_out_of_memory, keep_freed_memory

FAULTS = """
import resource, torch
from hf_noisekd.models.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)  # 64 MiB, above glibc's largest threshold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(2**24)
given_back = faults()
assert keep_freed_memory()
torch.ones(2**24)
print(given_back, faults())
"""
LIMIT = 2**36  # bytes
LIMITED = f"""
import resource, torch
from hf_noisekd.models.memory import free_memory
resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT}))
print(free_memory(torch.device("cpu")))
"""


def run(code: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is for glibc")
def test_freed_memory_is_kept_and_a_limit_of_the_process_counts():
    given_back, kept, free = map(float, run(FAULTS + LIMITED))
    assert kept < given_back / 10
    assert 0 < free < LIMIT


def test_a_choice_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not keep_freed_memory()


def test_errors_of_too_little_memory_are_told_from_others():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_the_processes_of_a_machine_share_its_memory(monkeypatch):
    alone = free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)
