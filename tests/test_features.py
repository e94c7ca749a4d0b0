import copy

import pytest
import timm
import torch

from hf_noisekd.shrinking.blocks import Place, remove_blocks
from hf_noisekd.shrinking.repair import Cut
from hf_noisekd.training.features import StageFeatures

LOSS = torch.tensor(1.0)  # of the logits


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return timm.create_model("resnet18_cifar", width=8, stem_stride=2, num_classes=3).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def test_the_same_features_cost_nothing_and_others_do(teacher, images):
    student = copy.deepcopy(teacher)
    with StageFeatures(student, teacher, Cut([], {})) as features:
        student(images), teacher(images)
        assert features.loss(LOSS).item() == pytest.approx(0.1)
        with torch.no_grad():
            student.conv1.weight.mul_(-1)
        student(images), teacher(images)
        assert features.loss(LOSS) > 0.2
        assert features.loss(LOSS) == LOSS  # nothing is left of a pass that was used
    student(images), teacher(images)
    assert features.loss(LOSS) == LOSS


def test_a_stage_without_its_last_block_is_compared_with_all_of_it(teacher, images):
    removed = [Place("layer1", "1"), Place("layer3", "1")]
    remove_blocks(student := copy.deepcopy(teacher), removed)
    with StageFeatures(student, teacher, Cut(removed, {})) as features:
        losses = []
        for undone in ((), ("layer3",), ("layer1", "layer3")):
            for name in undone:
                setattr(student, name, getattr(teacher, name))
            student(images), teacher(images)
            losses.append(features.loss(LOSS).item())
    assert losses[0] > losses[1] > losses[2] == pytest.approx(0.1)


def test_channels_that_were_kept_are_compared_with_themselves(teacher, images):
    student = copy.deepcopy(teacher)
    kept = [0, 3, 5, 6]
    student.layer4[1].register_forward_hook(lambda _, args, output: output[:, kept])
    student.fc = torch.nn.Linear(4, 3)
    for channels in ({"other": [1, 2, 3, 4], "last": kept}, {"other": [1, 2]}):
        with StageFeatures(student, teacher, Cut([], channels)) as features:
            student(images), teacher(images)
            assert features.loss(LOSS).item() == pytest.approx(0.1)
            with torch.no_grad():
                student.layer4[1].bn2.bias.add_(1.0)
            student(images), teacher(images)
            assert (features.loss(LOSS) > 0.2) == ("last" in channels)
