"""What a training evaluates, and what it leaves: the best student, its statistics, its files."""

import copy
import logging
import os
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import TinyCNN, config, images, student
from torch.utils.data import TensorDataset
from transformers import EarlyStoppingCallback

from hf_noisekd import NoiseDataset, NoiseKDTrainer, evaluate, export
from hf_noisekd.calibration.calibration_images import calibration_images
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.record.schema import Provenance


def test_evaluates_every_n_steps_and_loads_the_best_model(tiny_cnn, tmp_path):
    args = config(
        tmp_path,
        max_steps=12,
        learning_rate=2e-2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="batch_accuracy",
        save_total_limit=1,
    )
    trainer = NoiseKDTrainer(student(), tiny_cnn, args, eval_dataset=images(30))
    trainer.train()
    scores = [e["eval_batch_accuracy"] for e in trainer.state.log_history if "eval_batch_accuracy" in e]
    assert len(scores) == 4
    assert trainer.state.best_metric == max(scores)
    assert trainer.evaluate()["eval_batch_accuracy"] == pytest.approx(max(scores))


def test_early_stopping(tiny_cnn, tmp_path):
    args = config(
        tmp_path,
        max_steps=50,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer = NoiseKDTrainer(student(), tiny_cnn, args, callbacks=[EarlyStoppingCallback(2)])
    trainer.train()
    assert trainer.state.global_step == 6


def test_several_evaluation_sets_and_prediction(tiny_cnn, tmp_path):
    noise = NoiseDataset((1, 8, 8), 16, 2, held_out=True)
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path), eval_dataset={"real": images(), "noise": noise})
    metrics = trainer.evaluate()
    assert {"eval_real_batch_accuracy", "eval_real_running_agreement", "eval_noise_batch_kl"} <= set(metrics)
    assert "eval_noise_batch_accuracy" not in metrics
    predictions = trainer.predict(images())
    assert predictions.predictions.shape == (12, 3)
    assert predictions.label_ids.tolist() == images().tensors[1].tolist()
    assert "forward" not in vars(trainer.model)


def test_evaluates_on_the_trainers_noise_outside_of_it(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, bf16=True))
    trainer.train()
    scores = evaluate(trainer.model, trainer.eval_dataset, teacher_model=tiny_cnn)
    assert scores["batch"]["kl"] == pytest.approx(trainer.evaluate()["eval_batch_kl"], rel=0.1, abs=1e-3)


def test_a_collator_of_the_users_reads_images_of_the_users(tiny_cnn, tmp_path):
    data = [{"picture": torch.randn(1, 8, 8), "class": index % 3} for index in range(20)]

    def collate(samples):
        return {
            "pixel_values": torch.stack([sample["picture"] for sample in samples]),
            "labels": torch.tensor([sample["class"] for sample in samples]),
        }

    args = config(tmp_path, input_size=None)
    trainer = NoiseKDTrainer(student(), tiny_cnn, args, data_collator=collate, train_dataset=data, eval_dataset=data)
    assert trainer.train().global_step == 6
    assert "eval_batch_accuracy" in trainer.evaluate()


def test_saves_the_image_processor_with_the_student(tiny_cnn, tmp_path):
    class Processor:
        def save_pretrained(self, folder):
            (Path(folder) / "preprocessor_config.json").write_text("{}")

    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path), processing_class=Processor())
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(("teacher_statistics", "metric"), [(0.0, "running_agreement"), (0.5, "batch_agreement")])
def test_the_best_student_is_chosen_by_the_statistics_it_will_be_read_with(tmp_path, teacher_statistics, metric):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    options = best | {"save_steps": 5, "teacher_statistics": teacher_statistics}
    assert NoiseKDTrainer(student(), TinyCNN(), config(tmp_path, **options)).args.metric_for_best_model == metric
    options["metric_for_best_model"] = "batch_agreement"
    trainer = NoiseKDTrainer(student(), TinyCNN(), config(tmp_path, **options))
    assert trainer.args.metric_for_best_model == "batch_agreement"


def test_a_plain_module_is_saved_with_a_warning(tiny_cnn, tmp_path, caplog):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path))
    with caplog.at_level(logging.WARNING):
        trainer.save_model(str(tmp_path / "saved"))
    assert "without a config.json" in caplog.text
    assert os.listdir(tmp_path / "saved") == ["model.safetensors"]


# The statistics that a student of noise is left with.


def test_a_student_of_noise_ends_with_statistics_that_its_teacher_vouches_for(digits_teacher, digits, tmp_path):
    options = {"input_size": None, "max_steps": 40, "per_device_train_batch_size": 64, "learning_rate": 1e-2}
    torch.manual_seed(0)
    small = timm.create_model("resnet10_cifar", width=8, stem_stride=2, in_chans=1)
    kept, changed = (
        NoiseKDTrainer(
            copy.deepcopy(small),
            digits_teacher,
            config(tmp_path / str(number), **options, num_calibration_images=number),
            eval_dataset=digits[1],
        )
        for number in (0, 64)
    )
    for trainer in (kept, changed):
        trainer.train()
        trainer.evaluate()
    for name, tensor in kept.model.state_dict().items():
        assert torch.equal(tensor, changed.model.state_dict()[name]) == ("running_" not in name), name
    before, after = (trainer.record().evaluations[0].running["accuracy"] for trainer in (kept, changed))
    assert after > before
    made, facts = changed.record().noisekd, changed.calibration_images.facts
    assert (made.batch_norm, made.calibration) == ("running", facts)
    assert (facts.images, facts.held_out) == (64, 32)
    assert (kept.calibration_images, kept.record().noisekd.calibration) == (None, None)
    last = changed.record().evaluations[-1]
    assert (last.dataset, last.images, last.batch_size) == ("held-out calibration images", 32, 32)
    assert 0 <= last.running["agreement"] <= 100
    changed.save_model()
    assert Provenance.of(load_teacher(changed.args.output_dir)).calibration == facts


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory left"), KeyboardInterrupt()])
def test_a_student_is_not_lost_to_what_comes_after(error, tiny_cnn, tmp_path, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_noisekd.training.ending.measured", fail)
    with caplog.at_level(logging.WARNING):
        trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, num_calibration_images=8))
        trainer.train()
    reason = f"{type(error).__name__}: {error}"
    assert reason in caplog.text
    assert trainer.record().noisekd.batch_norm == "batch"


def test_only_a_student_of_noise_alone_is_recalibrated(tiny_cnn, tmp_path):
    args = config(tmp_path, num_calibration_images=8)
    trainer = NoiseKDTrainer(
        student(), tiny_cnn, args, train_dataset=TensorDataset(torch.randn(64, 1, 8, 8), torch.zeros(64))
    )
    trainer.train()
    assert trainer.calibration_images is None


SMALL = {"width": 4, "stem_stride": 2}


@pytest.mark.parametrize(
    ("ending", "needed", "options"),
    [
        ("statistics of calibration images", 0, {"model_init_kwargs": SMALL, "init_student": "random"}),
        ("the initial weights", 0, {"keep": 0.7, "learning_rate": 100.0}),
        ("the initial weights and the teacher's statistics", 101, {"keep": 0.7, "learning_rate": 100.0}),
        (
            "statistics of the training",
            101,
            {"model_init_kwargs": SMALL, "init_student": "random", "teacher_statistics": 0.0},
        ),
        ("no BatchNorm", 101, {"model_init_kwargs": SMALL | {"norm_groups": 2}}),
        ("statistics of noise", 101, {"model_init_kwargs": SMALL, "init_student": "random"}),
    ],
)
def test_a_student_is_exported_straight_after_each_ending(
    digits_teacher, tmp_path, monkeypatch, ending, needed, options
):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("hf_noisekd.calibration.calibration_images.MIN_SELF_AGREEMENT", needed)
    few_steps = partial(calibration_images, max_steps=10)
    monkeypatch.setattr("hf_noisekd.training.training_data.calibration_images", few_steps)
    args = config(tmp_path, input_size=None, num_calibration_images=64, max_steps=3, **options)
    trainer = NoiseKDTrainer(None if "keep" in options else "resnet10_cifar", digits_teacher, args)
    trainer.train()
    made = Provenance.of(trainer.model)
    assert made == Provenance.of(load_teacher(args.output_dir))
    assert made.batch_norm == ("batch" if ending == "statistics of noise" else "running")
    assert bool(made.calibration) == (made.start.recalibrated if "initial" in ending else needed == 0)
    assert (made.start is None or made.start.training_helped) == ("initial" not in ending)
    if made.batch_norm == "running":
        assert export(trainer.model, tmp_path / "student.onnx").megabytes > 0
    else:
        with pytest.raises(ValueError, match="recalibrate"):
            export(trainer.model, tmp_path / "student.onnx")
