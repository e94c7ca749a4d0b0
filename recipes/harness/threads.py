"""How many threads a recipe trains with."""

import os
import time

import psutil
import torch
from accelerate import PartialState
from transformers import TrainerCallback

SECONDS_BETWEEN_LOOKS = 5.0


class IdleCores(TrainerCallback):
    """Has torch use only the cores that no other program keeps busy, at the start and every few seconds.

    Threads wait for each other at every layer. On a core that is shared they wait for the other program too, and a
    training takes many times as long. Nothing is changed where `OMP_NUM_THREADS` says how many there are to be, on
    accelerators, and where several processes train.
    """

    def __init__(self):
        state = PartialState()
        self.is_on = "OMP_NUM_THREADS" not in os.environ and state.device.type == "cpu" and state.num_processes == 1
        self.threads = torch.get_num_threads()
        self.process = psutil.Process()
        self.next_look = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Look for a second before the first step."""
        if self.is_on:
            self._busy_cores()  # from here on
            time.sleep(1)
            self._look()

    def on_step_end(self, args, state, control, **kwargs):
        """Look again, at what happened since the last time."""
        if self.is_on and time.monotonic() > self.next_look:
            self._look()

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the number of threads as it was found."""
        torch.set_num_threads(self.threads)

    def _look(self) -> None:
        threads = min(self.threads, max(1, psutil.cpu_count() - round(self._busy_cores())))
        if threads != torch.get_num_threads():
            print(f"Threads to train with, as other programs use cores: {threads} of {self.threads}.")
            torch.set_num_threads(threads)
        self.next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS

    def _busy_cores(self) -> float:
        """Return how many cores others than this process kept busy since the last call."""
        return (sum(psutil.cpu_percent(percpu=True)) - self.process.cpu_percent()) / 100
