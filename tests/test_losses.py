import pytest
import torch

from hf_noisekd.training.losses import LOSSES, kl_divergence, soft_cross_entropy


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randn(6, 4)


def entropy(logits, temperature=1.0):
    probs = (logits / temperature).softmax(-1)
    return -(probs * probs.log()).sum(-1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_cross_entropy_is_its_definition(logits, temperature):
    student, teacher = logits
    log_probs = (student / temperature).log_softmax(-1)
    expected = -((teacher / temperature).softmax(-1) * log_probs).sum(-1).mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher, temperature), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_soft_cross_entropy_less_entropy_times_squared_temperature(logits, temperature):
    student, teacher = logits
    expected = (soft_cross_entropy(student, teacher, temperature) - entropy(teacher, temperature)) * temperature**2
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), expected)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_are_lowest_at_the_teacher_and_compute_in_float32(logits, name):
    student, teacher = logits
    loss = LOSSES[name]
    assert loss(student, teacher, 2.0) > loss(teacher, teacher, 2.0)
    assert loss(student.bfloat16(), teacher.bfloat16(), 2.0).dtype == torch.float32
    student.requires_grad_()
    loss(student, teacher, 2.0).backward()
    assert student.grad.abs().sum() > 0
