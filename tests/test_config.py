import pytest
import torch
from transformers import TrainingArguments

from hf_noisekd import NoiseKDConfig
from hf_noisekd.training.checks import check_trainer_arguments
from hf_noisekd.training.config import ClassifierConfig, _cpu_has_bf16


def test_paper_preset_is_the_authors_setting(tmp_path):
    args = NoiseKDConfig.paper(tmp_path)
    assert args.learning_rate == 1e-3
    assert args.temperature == 1.0
    assert args.per_device_train_batch_size == 256
    assert args.loss_type == "soft_cross_entropy"
    assert args.weight_decay == 0.0
    assert args.noise == "white"
    assert args.max_grad_norm == 0.0
    assert args.steps_per_epoch * args.num_train_epochs == 39_200
    assert NoiseKDConfig.paper(tmp_path, learning_rate=0.5).learning_rate == 0.5


def test_precision_is_the_devices_unless_asked_for(tmp_path):
    if not torch.accelerator.is_available():
        assert ClassifierConfig(tmp_path).bf16 == _cpu_has_bf16()
    assert ClassifierConfig(tmp_path, bf16=False).bf16 is False
    assert ClassifierConfig(tmp_path, bf16=False).mixed_precision == "no"


@pytest.mark.parametrize("told", ["fp16", "bf16"])
def test_precision_is_what_accelerate_was_told_unless_asked_for(tmp_path, monkeypatch, told):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    args = ClassifierConfig(tmp_path)
    assert (args.mixed_precision, args.bf16, args.fp16) == (told, told == "bf16", told == "fp16")
    args = ClassifierConfig(tmp_path, bf16=False)
    assert (args.mixed_precision, args.bf16, args.fp16) == ("no", False, False)
    assert ClassifierConfig(tmp_path, bf16=True).mixed_precision == "bf16"
    assert ClassifierConfig(tmp_path, fp16=True).mixed_precision == "fp16"


def test_a_process_trains_on_one_gpu(tmp_path, monkeypatch):
    # transformers would split each batch over all of them, and with it what BatchNorm takes its statistics of.
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    args = ClassifierConfig(tmp_path)
    assert (args.n_gpu, args.train_batch_size, args.eval_batch_size) == (1, 256, 256)


def test_best_model_is_chosen_by_accuracy_or_without_images_by_agreement(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    assert ClassifierConfig(tmp_path, **best, save_steps=5).metric_for_best_model == "batch_accuracy"
    args = NoiseKDConfig(tmp_path, **best, save_steps=5)
    assert (args.metric_for_best_model, args.greater_is_better) == ("batch_agreement", True)
    args = NoiseKDConfig(tmp_path, **best, save_steps=5, metric_for_best_model="running_loss")
    assert (args.metric_for_best_model, args.greater_is_better) == ("running_loss", False)


def test_a_lower_divergence_or_loss_is_better(tmp_path):
    assert NoiseKDConfig(tmp_path, metric_for_best_model="batch_kl").greater_is_better is False
    assert NoiseKDConfig(tmp_path, metric_for_best_model="running_loss").greater_is_better is False
    assert NoiseKDConfig(tmp_path, metric_for_best_model="batch_kl", greater_is_better=True).greater_is_better is True
    args = NoiseKDConfig(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=5)
    assert args.metric_for_best_model == "batch_agreement"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size is 1"),
        ({"per_device_eval_batch_size": 1}, "per_device_eval_batch_size is 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps is -1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": -5}, "max_steps is -5"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs is nan"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"logging_steps": -1}, "logging_steps is -1"),
        ({"eval_strategy": "steps", "eval_steps": -2}, "eval_steps is -2"),
        ({"learning_rate": "1e-3"}, "learning_rate is .*'1e-3'"),
        ({"bf16": "false"}, "bf16 is .*'false'"),
        ({"max_steps": "10"}, "max_steps is .*'10'"),
        ({"temperature": "4"}, "temperature is .*'4'"),
        ({"remove_unused_columns": True}, "remove_unused_columns is True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True: .*per_device_train_batch_size"),
        ({"bf16_full_eval": True}, "bf16_full_eval is True"),
        ({"loss_type": "hinge"}, "loss_type is 'hinge': .*kl, soft_cross_entropy"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"batch_norm_fraction": 1.5}, "batch_norm_fraction is 1.5"),
        ({"noise": "wite"}, "'white'"),
        ({"noise": torch.randn}, "noise is <.*NoiseDataset"),
        ({"resolutions": "2:1"}, "resolutions is '2:1'"),
        ({"resolutions": {0.5: 0.6, 1: 0.4}}, "resolutions is {0.5: 0.6, 1: 0.4}"),
        ({"noise_std": 0.0}, "noise_std is 0.0"),
        ({"noise_std": float("inf")}, "noise_std is inf"),
        ({"teacher_statistics": -0.5}, "teacher_statistics is -0.5"),
        ({"adam_beta1": float("nan")}, "adam_beta1 is nan"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0"),
        ({"eval_noise_batches": 0}, "eval_noise_batches is 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs is inf"),
        ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha is 1.0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"max_steps": 2**23 + 1}, "max_steps is 8388609"),
        ({"input_size": [32, 32]}, r"input_size is \[32, 32\]"),
    ],
)
def test_refuses_options_out_of_range(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        NoiseKDConfig(tmp_path / "new", **option)
    assert not (tmp_path / "new").exists()


def test_every_option_of_its_own_has_a_help_text():
    for field in ClassifierConfig.__dataclass_fields__.keys() | NoiseKDConfig.__dataclass_fields__.keys():
        assert NoiseKDConfig.__dataclass_fields__[field].metadata.get("help") or field in dir(TrainingArguments)


@pytest.mark.parametrize(
    ("kind", "options"), [("polynomial", {}), ("cosine_with_min_lr", {"min_lr": 1e-5}), ("constant_with_warmup", {})]
)
def test_schedules_are_built_before_the_learning_rate_is_known(tmp_path, kind, options):
    check_trainer_arguments(NoiseKDConfig(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=options))
