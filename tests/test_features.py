import copy

import pytest
import timm
import torch

from hf_noisekd.training.features import PooledFeatures


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return timm.create_model("resnet10_cifar", width=8, stem_stride=2, num_classes=3).eval()


def test_the_same_features_cost_nothing_and_others_do(teacher):
    student = copy.deepcopy(teacher)
    images = torch.randn(4, 3, 32, 32)
    with PooledFeatures(student, teacher, {}) as features:
        student(images), teacher(images)
        assert features.loss(torch.tensor(1.0)).item() == pytest.approx(0.1)
        with torch.no_grad():
            student.conv1.weight.mul_(-1)
        student(images), teacher(images)
        assert features.loss(torch.tensor(1.0)) > 0.2
        assert features.loss(torch.tensor(1.0)) == 1.0  # nothing is left of a pass that was used
    student(images), teacher(images)
    assert features.loss(torch.tensor(1.0)) == 1.0


def test_channels_that_were_kept_are_compared_with_themselves(teacher):
    student = copy.deepcopy(teacher)
    kept = [0, 3, 5, 6]
    student.layer4.register_forward_hook(lambda _, args, output: output[:, kept])
    student.fc = torch.nn.Linear(4, 3)
    images = torch.randn(4, 3, 32, 32)
    for channels, expected in (({"other": [1, 2, 3, 4], "last": kept}, 0.1), ({"other": [1, 2]}, 1.0)):
        with PooledFeatures(student, teacher, channels) as features:
            student(images), teacher(images)
            assert features.loss(torch.tensor(1.0)).item() == pytest.approx(expected)
