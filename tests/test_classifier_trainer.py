import pytest
import torch
from conftest import TinyCNN
from torch.utils.data import TensorDataset

from hf_noisekd.training.classifier_trainer import ClassifierTrainer
from hf_noisekd.training.config import ClassifierConfig


def test_learns_real_digits(digits, digits_teacher, tmp_path):
    # The fixture trained it.
    trainer = ClassifierTrainer(digits_teacher, ClassifierConfig(tmp_path, disable_tqdm=True), eval_dataset=digits[1])
    metrics = trainer.evaluate()
    assert metrics["eval_running_accuracy"] > 90
    assert metrics["eval_batch_accuracy"] > 90
    assert metrics["eval_batch_top5_accuracy"] > metrics["eval_batch_accuracy"]


def test_evaluation_needs_a_data_set(tiny_cnn, tmp_path):
    trainer = ClassifierTrainer(tiny_cnn, ClassifierConfig(tmp_path, disable_tqdm=True))
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()


def test_what_cannot_be_trained_is_refused(tmp_path):
    data = TensorDataset(torch.randn(33, 1, 8, 8), torch.arange(33) % 3)
    args = ClassifierConfig(tmp_path / "out", per_device_train_batch_size=16, disable_tqdm=True)
    for model, message in (
        (TinyCNN(), "dataloader_drop_last"),
        (TinyCNN().requires_grad_(False), "requires_grad_"),
        (torch.compile(TinyCNN()), "torch_compile"),
    ):
        with pytest.raises(ValueError, match=message):
            ClassifierTrainer(model, args, train_dataset=data)
    assert not (tmp_path / "out").exists()


def test_pairs_train_too(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (64,), generator=generator)
    pixels = torch.randn(64, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    data = TensorDataset(pixels, labels)
    args = ClassifierConfig(tmp_path, max_steps=60, learning_rate=1e-2, save_strategy="no", disable_tqdm=True)
    trainer = ClassifierTrainer(TinyCNN(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_batch_accuracy"] > 90
