import pytest
import timm
import torch
from conftest import TinyCNN
from timm.layers import freeze_batch_norm_2d
from transformers import ResNetConfig, ResNetForImageClassification

from hf_noisekd import NoiseDataset, NoiseKDConfig, NoiseKDTrainer, batch_statistics
from hf_noisekd.workflows.teacher_report import describe_teacher


def test_measures_what_the_teacher_predicts_with_either_statistics(digits_teacher):
    facts = describe_teacher(digits_teacher, num_images=64)
    noise = [NoiseDataset((1, 32, 32), 32, distribution="dead_leaves").draw(step) for step in range(2)]
    with torch.no_grad():
        expected = {"running": torch.cat([digits_teacher(batch) for batch in noise]).softmax(1)}
        with batch_statistics(digits_teacher):
            expected["batch"] = torch.cat([digits_teacher(batch) for batch in noise]).softmax(1)
    for statistics, probs in expected.items():
        answers = facts["predictions"][statistics]
        mean, most = probs.mean(0), torch.tensor(10.0).log()
        assert answers["class_balance"] == pytest.approx((-(mean * mean.log()).sum() / most).item(), rel=1e-3)
        assert answers["flatness"] == pytest.approx((-(probs * probs.log()).sum(1).mean() / most).item(), rel=1e-3)
        counts = probs.argmax(1).bincount()
        assert answers["top_class_share"] == pytest.approx(100 * counts.max().item() / 64)
        assert answers["classes_predicted"] == (counts > 0).sum()
    assert facts["predictions"]["batch"] != facts["predictions"]["running"]


def test_large_images_are_read_in_small_batches(monkeypatch):
    drawn = []
    draw = NoiseDataset.draw
    monkeypatch.setattr(NoiseDataset, "draw", lambda self, step: drawn.append(self.batch_size) or draw(self, step))
    monkeypatch.setattr("hf_noisekd.workflows.teacher_report.BATCH_PIXELS", 2**16)
    assert describe_teacher(timm.create_model("test_resnet", num_classes=7), num_images=256)["noise_images"] == 256
    assert drawn == [64] * 4


def test_a_teacher_without_batch_norm_is_used_as_it_is():
    facts = describe_teacher(timm.create_model("test_vit", num_classes=7), num_images=8)
    assert facts["can_teach"]
    assert (facts["batch_norm"], list(facts["predictions"])) == ({}, ["running"])
    assert "without BatchNorm" in facts["verdict"]


def test_says_what_stands_in_the_way(tiny_cnn):
    frozen = describe_teacher(freeze_batch_norm_2d(timm.create_model("test_resnet", num_classes=7)), num_images=8)
    assert not frozen["can_teach"]
    assert "nn.BatchNorm2d" in frozen["verdict"]
    damaged = TinyCNN()
    damaged.fc.bias.data[0] = torch.nan
    facts = describe_teacher(damaged, (1, 8, 8), num_images=8)
    assert (facts["can_teach"], facts["predictions"]) == (False, {})
    assert "'fc.bias' holds a NaN" in facts["verdict"]
    assert "one class" in describe_teacher(TinyCNN(num_classes=1), (1, 8, 8), num_images=8)["verdict"]


def test_a_teacher_whose_logits_are_nan_cannot_teach(tiny_cnn):
    class Roots(TinyCNN):
        def forward(self, x):
            return super().forward(x).sqrt()

    model = Roots()
    model.load_state_dict(tiny_cnn.state_dict())
    facts = describe_teacher(model.eval(), (1, 8, 8), num_images=32)
    assert not facts["can_teach"]
    assert "NaN" in facts["verdict"]


@pytest.mark.parametrize("task", ["multi_label_classification", "regression"])
def test_a_teacher_of_another_task_cannot_teach(task, tmp_path):
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 3}
    teacher = ResNetForImageClassification(ResNetConfig(**shape, problem_type=task)).eval()
    facts = describe_teacher(teacher, (3, 32, 32), num_images=8)
    assert not facts["can_teach"]
    assert task in facts["verdict"]
    with pytest.raises(ValueError, match=rf"{task}, .*single_label_classification"):
        NoiseKDTrainer("resnet10_cifar", teacher, NoiseKDConfig(str(tmp_path), input_size=[3, 32, 32]))
