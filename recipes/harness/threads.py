"""How many threads a recipe trains with."""

import os

import psutil
import torch
from accelerate import PartialState


def use_idle_cores() -> None:
    """Have torch use only the cores that no other program keeps busy.

    Threads wait for each other at every layer. On a core that is shared they wait for the other program too, and a
    training takes several times as long. Nothing is changed where `OMP_NUM_THREADS` says how many there are to be, on
    accelerators, and where several processes train.
    """
    state = PartialState()
    if "OMP_NUM_THREADS" in os.environ or state.device.type != "cpu" or state.num_processes > 1:
        return
    shares = psutil.cpu_percent(interval=1.0, percpu=True)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(shares))
    idle = max(1, sum(shares[core] < 50 for core in cores))
    if idle < torch.get_num_threads():
        torch.set_num_threads(idle)
        threads = "1 thread" if idle == 1 else f"{idle} threads"
        print(f"Other programs keep cores busy: this trains with {threads}. OMP_NUM_THREADS sets another number.")
