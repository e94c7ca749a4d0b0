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


@pytest.mark.parametrize("several", [False, True])
def test_a_metric_that_will_not_be_there_is_refused(tiny_cnn, tmp_path, several):
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 3)
    evaluated = {"a": data, "b": data} if several else data
    names = [f"{'b_' * several}{name}" for name in ("running_accuracy", "running_loss", "batch_accuracy", "batch_loss")]
    for metric in ("accuracy", "batch_kl", "running_top5_accuracy", "eval_loss"):
        args = ClassifierConfig(tmp_path / "out", metric_for_best_model=metric)
        with pytest.raises(ValueError, match=rf"'{metric}', .*{', '.join(names)}\."):
            ClassifierTrainer(tiny_cnn, args, eval_dataset=evaluated)
    assert not (tmp_path / "out").exists()
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 1}
    for metric in names[1:3]:
        args = ClassifierConfig(
            tmp_path / metric, metric_for_best_model=metric, max_steps=2, disable_tqdm=True, **options
        )
        trainer = ClassifierTrainer(tiny_cnn, args, train_dataset=data, eval_dataset=evaluated)
        trainer.train()
        assert trainer.state.best_metric is not None


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
