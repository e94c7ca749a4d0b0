"""What is logged of teacher and student while the student trains: their agreement, and how the classes are balanced."""

import math
from collections.abc import Callable

import torch


class AgreementLog:
    """The teacher's mean prediction and the agreement, since the last log and in all; no step waits for the sums."""

    def __init__(self, num_classes: int, device: torch.device):
        self._sums = torch.zeros(num_classes + 1, device=device)  # of each class's probability, and of the agreement
        self._steps = 0
        self.forget()

    def forget(self) -> None:
        """Start anew, as for another training."""
        self._sums.zero_()
        self._totals = [0.0] * (len(self._sums) - 1)
        self._steps = self._logged_steps = 0

    @torch.no_grad()
    def add(self, teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> None:
        """Count in the logits `[B, num_classes]` of a step."""
        self._sums[:-1].add_(teacher_logits.softmax(-1).mean(0))
        self._sums[-1].add_((student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean())
        self._steps += 1

    def entry(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor], world_size: int) -> dict[str, float]:
        """Return what [`NoiseKDTrainer`] logs of the steps since the last entry, if there are any."""
        if not self._steps:
            return {}
        *probs, agreement = (sum_over_processes(self._sums) / (world_size * self._steps)).tolist()
        self._totals = [total + p * self._steps for total, p in zip(self._totals, probs, strict=True)]
        self._logged_steps += self._steps
        self._sums.zero_()
        self._steps = 0
        balance = -sum(p * math.log(p) for p in probs if p != 0) / math.log(len(probs))
        return {"agreement": 100 * agreement, "class_balance": balance}

    @property
    def class_frequencies(self) -> list[float] | None:
        """The teacher's mean prediction over all logged steps, a probability for each class; None without a step."""
        return [round(total / self._logged_steps, 6) for total in self._totals] if self._logged_steps else None
