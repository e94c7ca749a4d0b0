"""What the answers of teacher and student tell while a student learns."""

import math
from collections.abc import Callable

import torch


class AnswerLog:
    """The teacher's mean answer and the student's agreement with it, since the last log entry and over all of them.

    Sums are kept on the device, so that no step waits for it.

    Args:
        num_classes: Classes of both.
        device: Where they answer.
    """

    def __init__(self, num_classes: int, device: torch.device):
        self._answers = torch.zeros(num_classes, device=device)
        self._agreement = torch.zeros((), device=device)
        self.forget()

    def forget(self) -> None:
        """Begin anew, as for another training."""
        self._logged_answers = [0.0] * len(self._answers)
        self._logged_steps = 0
        self._forget_steps()

    @torch.no_grad()
    def add(self, teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> None:
        """Count in the answers `[B, num_classes]` of a step."""
        self._answers += teacher_logits.softmax(-1).mean(0)
        self._agreement += (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
        self._steps += 1

    def entry(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor], world_size: int) -> dict[str, float]:
        """Return what to log of the steps since the last entry, nothing if there were none; the next begins here.

        Returns:
            `agreement`, the share of equal top-1 answers in percent; and `class_balance`, the entropy of the teacher's
            mean answer relative to that of all classes equally often.
        """
        if not self._steps:
            return {}
        sums = sum_over_processes(torch.cat([self._answers, self._agreement[None]]))
        *answer, agreement = (sums / (world_size * self._steps)).tolist()
        self._logged_answers = [total + p * self._steps for total, p in zip(self._logged_answers, answer, strict=True)]
        self._logged_steps += self._steps
        self._forget_steps()
        balance = -sum(p * math.log(p) for p in answer if p > 0) / math.log(len(answer))
        return {"agreement": 100 * agreement, "class_balance": balance}

    @property
    def class_frequencies(self) -> list[float] | None:
        """The teacher's mean answer over all logged steps, a probability for each class; None if there are none."""
        if not self._logged_steps:
            return None
        return [round(total / self._logged_steps, 6) for total in self._logged_answers]

    def _forget_steps(self) -> None:
        self._answers.zero_()
        self._agreement.zero_()
        self._steps = 0
