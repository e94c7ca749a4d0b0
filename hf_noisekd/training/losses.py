"""Distillation losses: the mean over a batch of a function of logits `[B, num_classes]`, computed in float32.

No gradient flows into the teacher's logits from outside: detach them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def soft_cross_entropy(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of the student's softmax under the teacher's: `-sum_c p_T(c) log p_S(c)`.

    The loss of Raikwar & Mishra (2022), Algorithm 1, there with temperature 1. In nats, >= the teacher's entropy.
    """
    teacher_probs = F.softmax(teacher_logits.float() / temperature, dim=-1)
    return F.cross_entropy(student_logits.float() / temperature, teacher_probs)


def kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence `KL(teacher || student)` of the softened predictions, times `temperature ** 2`.

    The factor keeps the size of the gradients independent of the temperature (Hinton, Vinyals & Dean, 2015,
    section 2). In nats, >= 0, and 0 where both are the same.
    """
    student_log_probs = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True) * temperature**2


LOSSES: dict[str, Callable[..., torch.Tensor]] = {"soft_cross_entropy": soft_cross_entropy, "kl": kl_divergence}
