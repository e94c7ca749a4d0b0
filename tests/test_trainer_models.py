"""Which models and data a training takes, and which it refuses."""

import copy
from contextlib import nullcontext

import pytest
import timm
import torch
from conftest import SizedStream, TinyCNN, config, digest, images, student
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torch.fx import symbolic_trace
from torch.utils.data import TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification

from hf_noisekd import NoiseDataset, NoiseKDConfig, NoiseKDTrainer, batch_statistics
from hf_noisekd.training.teacher import Teacher


def test_transformers_models_on_both_sides(tmp_path):
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4, "layer_type": "basic"}
    teacher = ResNetForImageClassification(ResNetConfig(**shape))
    model = ResNetForImageClassification(ResNetConfig(**shape))
    args = config(tmp_path, input_size=[3, 32, 32], max_steps=2, save_strategy="steps", save_steps=2)
    trainer = NoiseKDTrainer(model, teacher, args)
    assert trainer.train().global_step == 2
    again = ResNetForImageClassification.from_pretrained(tmp_path / "out" / "checkpoint-2").eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(pixels).logits, model.eval()(pixels).logits)


# Teachers that do not answer by the statistics of the batch.


class NoBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(self.norm(x.flatten(1)))


def traced():
    """A network with the statistics of two of its three BatchNorm layers in its code."""
    layers = [nn.Conv2d(1, 8, 3), BatchNormAct2d(8), BatchNormAct2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return symbolic_trace(nn.Sequential(*layers, nn.Linear(8, 3), nn.BatchNorm1d(3)).eval())


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (NoBatchNorm, {}, 0.0),
        (TinyCNN, {"teacher_statistics": 0.0}, 0.0),
        (traced, {"teacher_statistics": 0.0}, 0.0),
        (TinyCNN, {"teacher_statistics": 0.5}, 0.5),
        (TinyCNN, {}, 1.0),
    ],
)
def test_logits_for_noise_have_the_statistics_of_the_options(make, options, expected, tmp_path, caplog):
    torch.manual_seed(0)
    teacher = make().eval()
    for name, buffer in teacher.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    before = digest(teacher)
    trainer = NoiseKDTrainer(student(), teacher, config(tmp_path, noise="white", bf16=False, **options))
    assert ("White noise" in caplog.text) == (expected == 0)
    pixels = torch.randn(16, 1, 8, 8)
    has_layers = any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    with torch.no_grad(), batch_statistics(teacher, weight=expected) if has_layers else nullcontext():
        torch.testing.assert_close(trainer.teacher.training_logits(pixels), teacher(pixels))
    trainer.train()
    assert digest(teacher) == before
    made = trainer.provenance()
    assert (made.teacher_statistics, made.batch_norm) == (expected, "batch" if expected else "running")


@pytest.mark.parametrize(("fraction", "expected"), [(0.95, 1.0), (0.6, 2 / 3), (0.1, 0.0)])
def test_what_hangs_on_the_batch_are_whole_layers(fraction, expected):
    assert Teacher(TinyCNN(), batch_norm_fraction=fraction, statistics=0.5).weight_of_batch == expected / 2


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_a_traced_teacher_as_it_is(tmp_path):
    teacher = torch.jit.trace(TinyCNN().eval(), torch.randn(2, 1, 8, 8))
    options = {"teacher_statistics": 0.0, "input_size": [1, 32, 32], "model_init_kwargs": {"width": 4}, "max_steps": 1}
    trainer = NoiseKDTrainer("resnet10_cifar", teacher, config(tmp_path, **options))
    trainer.train()
    assert trainer.start is None


def test_the_student_of_a_teacher_without_statistics_keeps_those_of_its_training(tmp_path, caplog):
    torch.manual_seed(0)
    trainer = NoiseKDTrainer(student(), NoBatchNorm(), config(tmp_path, num_calibration_images=8))
    assert trainer.train_dataset.resolutions == {1: 1}
    trainer.train()
    assert trainer.model.bn1.num_batches_tracked == 6
    assert (trainer.calibration_images, trainer.provenance().batch_norm) == (None, "running")
    assert "statistics" not in caplog.text


# Bad input. Each is refused before the first step and before anything is written.


def frozen():
    model = TinyCNN()
    model.bn3 = nn.Identity()
    return freeze_batch_norm_2d(model)


def nan_teacher():
    model = TinyCNN()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    return model


class NanAnswers(TinyCNN):
    def forward(self, x):
        return super().forward(x) * torch.nan


class NoLogits(TinyCNN):
    def forward(self, x):
        return self.conv1(x)


def timm_model(**cfg):
    return timm.create_model("resnet10_cifar", width=4, pretrained_cfg_overlay=cfg)


def with_another_head():
    model = timm.create_model("resnet10_cifar", width=4, num_classes=100)
    model.fc = nn.Linear(model.fc.in_features, 10)
    return model


def one_parameter(model, teacher):
    model.fc.weight = teacher.fc.weight


def one_buffer(model, teacher):
    model.bn1.running_mean = teacher.bn1.running_mean


def one_module(model, teacher):
    model.bn2 = teacher.bn2


def a_view(model, teacher):
    model.fc.bias = nn.Parameter(teacher.fc.bias.data.view(-1))


@pytest.mark.parametrize("share", [one_parameter, one_buffer, one_module, a_view])
def test_a_student_that_shares_weights_with_its_teacher_is_refused(tiny_cnn, tmp_path, share):
    model = student()
    share(model, tiny_cnn)
    with pytest.raises(ValueError, match=r"'.*' .*teacher.*deepcopy"):
        NoiseKDTrainer(model, tiny_cnn, config(tmp_path))
    with pytest.raises(ValueError, match=r"'conv1\.weight' .*deepcopy"):
        NoiseKDTrainer(tiny_cnn, tiny_cnn, config(tmp_path))
    NoiseKDTrainer(copy.deepcopy(tiny_cnn), tiny_cnn, config(tmp_path))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_sync_batch_norm_is_refused_where_there_are_several_processes(tiny_cnn, tmp_path, monkeypatch, which):
    monkeypatch.setattr(NoiseKDConfig, "world_size", property(lambda self: 2))
    models = {"student": student(), "teacher": tiny_cnn}
    models[which] = nn.SyncBatchNorm.convert_sync_batchnorm(models[which])
    with pytest.raises(ValueError, match=r"TinyCNN .*SyncBatchNorm .*2 processes"):
        NoiseKDTrainer(*models.values(), config(tmp_path))


@pytest.mark.parametrize(
    ("kwargs", "options", "message"),
    [
        (
            {"teacher_model": NoBatchNorm()},
            {"teacher_statistics": 0.5},
            "NoBatchNorm .*no BatchNorm .*teacher_statistics",
        ),
        (
            {"teacher_model": NoBatchNorm()},
            {"batch_norm_fraction": 0.5},
            "NoBatchNorm .*no BatchNorm .*teacher_statistics",
        ),
        ({"teacher_model": frozen()}, {}, "2 frozen .*teacher_statistics=0"),
        ({"teacher_model": frozen()}, {"teacher_statistics": 0.5}, "no BatchNorm .*teacher_statistics=0"),
        ({"model": TinyCNN(num_classes=4)}, {}, "num_classes=3"),
        ({"model": TinyCNN(in_chans=3)}, {}, "student .*1x8x8"),
        ({"model": timm_model()}, {}, "student .*in_chans=1"),
        ({}, {"input_size": [3, 8, 8]}, "teacher .*3x8x8"),
        ({}, {"input_size": None}, "input_size"),
        (
            {"teacher_model": timm_model(), "model": timm_model(input_size=(3, 64, 64))},
            {"input_size": None},
            "student .*3x64x64 .*3x32x32",
        ),
        ({"model": "resnet19_cifar"}, {}, "'resnet19_cifar'.*resnet18_cifar"),
        ({"teacher_model": "resnet19"}, {}, "'resnet19'"),
        ({"teacher_model": "/no/such/folder"}, {}, "/no/such/folder"),
        ({"teacher_model": 3}, {}, "'3'"),
        ({"teacher_model": nan_teacher()}, {}, "teacher .*'conv2.weight' .*NaN"),
        ({"model": nan_teacher()}, {}, "student .*'conv2.weight' .*NaN"),
        ({"teacher_model": NoLogits()}, {}, r"teacher .*\[2, 8, 8, 8\]"),
        (
            {"train_dataset": NoiseDataset((1, 8, 8), 1)},
            {},
            "has 1, .*per_device_train_batch_size is 16",
        ),
        ({"train_dataset": NoiseDataset((1, 8, 8), 16)}, {"noise": "fractal"}, "has white, .*noise is fractal"),
        ({"train_dataset": NoiseDataset((1, 8, 8), 16)}, {"noise_std": 2.0}, "1.0, .*noise_std is 2.0"),
        ({"train_dataset": NoiseDataset((1, 8, 8), 16)}, {"resolutions": "0.5"}, "resolutions .*0.5"),
        (
            {"train_dataset": NoiseDataset((1, 8, 8), 16, resolutions={0.5: 0.6, 1: 0.4})},
            {"resolutions": "1:0.4,0.5:0.6"},
            "0.5.*resolutions .*1.0",
        ),
        ({"train_dataset": NoiseDataset((1, 9, 9), 16)}, {}, "1x9x9.*1x8x8"),
        (
            {"eval_dataset": NoiseDataset((1, 32, 32), 16, 2, distribution="structured")},
            {"input_size": [1, 32, 32]},
            "total_steps",
        ),
        ({"eval_dataset": NoiseDataset((3, 8, 8), 16, 2)}, {}, "3 channels"),
        ({"train_dataset": SizedStream()}, {"input_size": None}, "input_size"),
        ({"teacher_model": TinyCNN().half()}, {}, r"torch.float16: .*teacher.float\(\)"),
        ({"teacher_model": TinyCNN(num_classes=1), "model": TinyCNN(num_classes=1)}, {}, "one class"),
        (
            {"teacher_model": timm_model(), "model": with_another_head()},
            {"input_size": None},
            "loaded again",
        ),
        (
            {"teacher_model": timm_model(), "model": timm.create_model("resnet18", num_classes=10, act_layer=nn.SiLU)},
            {"input_size": [3, 32, 32]},
            "act_layer.*config.json",
        ),
        ({"teacher_model": NanAnswers()}, {}, "teacher's .*blank images .*NaN"),
        ({"model": NanAnswers()}, {}, "student's .*blank images .*NaN"),
        ({"teacher_model": traced()}, {}, "2 of 3"),
        ({"train_dataset": images(33)}, {}, "33 images .*dataloader_drop_last=True"),
        ({"train_dataset": images(1)}, {}, "dataloader_drop_last=True"),
        ({"model": torch.compile(TinyCNN(), backend="eager")}, {}, "student .*OptimizedModule.*torch_compile"),
        ({"model": nn.DataParallel(TinyCNN())}, {}, "student .*DataParallel"),
        ({"teacher_model": torch.compile(TinyCNN().eval(), backend="eager")}, {}, "teacher .*OptimizedModule"),
        ({"model": TinyCNN().requires_grad_(False)}, {}, "requires_grad_"),
        ({"eval_dataset": images(0)}, {}, "0 images"),
        ({"eval_dataset": {}}, {}, "eval_dataset .*empty"),
        ({"eval_dataset": TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())}, {}, "3 channels"),
        ({"eval_dataset": {"a": images(), "b": images(1)}}, {}, "1 image"),
        ({"eval_dataset": TensorDataset(torch.zeros(4, 1, 8, 8), torch.full((4,), 3))}, {}, "label 3.* 3 classes"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tiny_cnn, tmp_path, kwargs, options, message):
    with pytest.raises(ValueError, match=message):
        NoiseKDTrainer(**{"model": TinyCNN(), "teacher_model": tiny_cnn, "args": config(tmp_path, **options)} | kwargs)
    assert not (tmp_path / "out").exists()
