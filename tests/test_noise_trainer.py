import copy
import logging
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from conftest import TinyCNN, digest
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torch.fx import symbolic_trace
from torch.utils.data import IterableDataset, TensorDataset
from transformers import EarlyStoppingCallback, ResNetConfig, ResNetForImageClassification, TrainerCallback

from hf_noisekd import NoiseDataset, NoiseKDConfig, NoiseKDTrainer, batch_statistics, evaluate
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.record.schema import Provenance
from hf_noisekd.training.teacher import Teacher


def config(tmp_path, **options):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 16,
        "steps_per_epoch": 4,
        "eval_noise_batches": 2,
        "num_calibration_images": 0,
        "logging_steps": 2,
        "input_size": [1, 8, 8],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return NoiseKDConfig(str(tmp_path / "out"), **defaults | options)


def student(seed=1, **kwargs):
    torch.manual_seed(seed)
    return TinyCNN(**kwargs)


def images(count=12, num_classes=3):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % num_classes)


class Recorder(TrainerCallback):
    """Keeps what the teacher and the student were fed, and the log."""

    def __init__(self):
        self.log = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.log.append(dict(logs))


class SizeRecorder:
    """Keeps the widths of the images that a model was fed."""

    def __init__(self, model):
        self.sizes = []
        model.register_forward_pre_hook(lambda module, inputs: self.sizes.append(inputs[0].shape[-1]))


def test_trains_without_images_or_labels_and_leaves_the_teacher_alone(tiny_cnn, tmp_path):
    before = digest(tiny_cnn)
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, max_steps=60, learning_rate=1e-2))
    start = trainer.evaluate()
    assert set(start) >= {f"eval_{s}_{m}" for s in ("running", "batch") for m in ("agreement", "kl")}
    trainer.train()
    end = trainer.evaluate()
    assert end["eval_batch_kl"] < start["eval_batch_kl"] / 2
    assert digest(tiny_cnn) == before
    assert not any(module.training for module in tiny_cnn.modules())
    assert all(parameter.grad is None for parameter in tiny_cnn.parameters())
    # Nor is it a part of what is trained or saved.
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.parameters()}


def test_step_is_algorithm_1(tiny_cnn, tmp_path):
    """One SGD step equals the one written out by hand."""
    by_hand, model = student().train(), student()
    by_hand.drop.p = model.drop.p = 0.0
    noise = NoiseDataset((1, 8, 8), 16, seed=3).draw(0)
    with torch.no_grad(), batch_statistics(tiny_cnn):
        teacher_probs = tiny_cnn(noise).softmax(1)
    loss = -(teacher_probs * by_hand(noise).log_softmax(1)).sum(1).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= 0.1 * parameter.grad

    args = config(
        tmp_path,
        noise="white",
        loss_type="soft_cross_entropy",
        temperature=1.0,
        max_steps=1,
        seed=3,
        bf16=False,
        learning_rate=0.1,
        warmup_steps=0,
        max_grad_norm=0,
        logging_steps=1,
    )
    recorder = Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    NoiseKDTrainer(model, tiny_cnn, args, optimizers=(optimizer, None), callbacks=[recorder]).train()
    assert recorder.log[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for trained, expected in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_a_student_that_a_cpu_trains_wrongly_in_bfloat16_is_trained_in_float32(tiny_cnn, tmp_path, caplog):
    def shrinking():
        torch.manual_seed(1)
        convolutions = [nn.Conv2d(c, 16, 3, stride=2, padding=1) for c in (1, 16, 16, 16, 16)]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 3))

    students = []
    for bf16 in (True, False):
        args = config(tmp_path, bf16=bf16, use_cpu=True, input_size=[1, 32, 32], resolutions="0.5:0.5,1:0.5")
        trainer = NoiseKDTrainer(shrinking(), tiny_cnn, args)
        trainer.train()
        assert args.bf16 is bf16  # the caller's
        students.append(digest(trainer.model))
    assert students[0] == students[1]
    assert "trained in float32: its layer 4 gets maps so small from images of 1x16x16" in caplog.text
    at_full_size = config(tmp_path, bf16=True, use_cpu=True, input_size=[1, 32, 32], resolutions="1")
    assert NoiseKDTrainer(shrinking(), tiny_cnn, at_full_size).accelerator.mixed_precision == "bf16"


def test_the_student_computes_in_float32_after_training(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, bf16=True))
    pixels = torch.randn(4, 1, 8, 8)
    for _ in range(2):  # a second call trains on, with autocast again
        trainer.train()
        again = student()
        again.load_state_dict(trainer.model.state_dict())
        again.to(memory_format=trainer.memory_format)
        with torch.no_grad():
            assert torch.equal(trainer.model.eval()(pixels), again.eval()(pixels))


def test_other_losses_train(tiny_cnn, tmp_path):
    args = config(tmp_path, loss_type="kl", temperature=4.0, max_steps=40, learning_rate=1e-2)
    trainer = NoiseKDTrainer(student(), tiny_cnn, args)
    start = trainer.evaluate()["eval_batch_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_batch_kl"] < start


def test_gradient_accumulation_keeps_the_scale_of_the_loss(tiny_cnn, tmp_path):
    """With a constant student, 4 accumulated batches log the mean loss of 4 single ones, and give their gradient."""
    logs, gradients = {}, {}
    for accumulation in (1, 4):
        model = student(seed=1)
        model.drop.p = 0.0
        recorder = Recorder()

        class Grab(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                gradients.setdefault(args.gradient_accumulation_steps, []).append(model.fc.weight.grad.clone())

        args = config(
            tmp_path,
            max_steps=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            bf16=False,
            max_grad_norm=0,
            logging_steps=4 // accumulation,
            learning_rate=0.0,
        )
        NoiseKDTrainer(
            model,
            tiny_cnn,
            args,
            callbacks=[recorder, Grab()],
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.0), None),
        ).train()
        logs[accumulation] = recorder.log[0]["loss"]
    assert logs[4] == pytest.approx(logs[1], rel=1e-5)
    torch.testing.assert_close(gradients[4][0], torch.stack(gradients[1]).mean(0), rtol=1e-4, atol=1e-6)


def test_noise_is_drawn_in_the_precision_of_the_training(tiny_cnn, tmp_path):
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        noise = NoiseDataset((1, 8, 8), 16, num_steps=2, dtype=torch.float64)
        trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, bf16=bf16, max_steps=1), train_dataset=noise)
        assert trainer.train_dataset.draw(0).dtype == dtype
        trainer.train()


DIVERGING = {"learning_rate": 1e20, "max_grad_norm": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant"}


def test_training_ends_at_the_first_loss_that_is_not_finite(tiny_cnn, tmp_path):
    options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 1}

    class Diverge(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 5:
                optimizer.param_groups[0]["lr"] = float("inf")

    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, **options), callbacks=[Diverge()])
    with pytest.raises(FloatingPointError, match=r"at step 6\. .*learning rate.* checkpoint .*checkpoint-5\."):
        trainer.train()
    assert not (tmp_path / "out" / "checkpoint-6").exists()
    recorder = Recorder()
    args = config(tmp_path / "new", max_steps=40, logging_steps=5, **DIVERGING)
    with pytest.raises(
        FloatingPointError, match=r"loss is (nan|inf) at step 5\. .*max_grad_norm=1.*no whole checkpoint"
    ):
        NoiseKDTrainer(student(), tiny_cnn, args, callbacks=[recorder]).train()
    assert recorder.log == []


@pytest.mark.parametrize("options", [{"logging_strategy": "no"}, {"logging_nan_inf_filter": True}])
def test_a_student_that_is_not_finite_is_not_returned_where_nothing_is_logged(tiny_cnn, tmp_path, options):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, **options, **DIVERGING))
    with pytest.raises(FloatingPointError, match="at step 6"):
        trainer.train()
    with pytest.raises(FloatingPointError):
        trainer.save_model()
    assert list((tmp_path / "out").iterdir()) == []


def test_training_data_that_are_not_finite_are_told_from_a_student_that_diverges(tiny_cnn, tmp_path):
    noise = NoiseDataset((1, 8, 8), 16, 4, distribution=lambda generator, shape: torch.full(shape, float("nan")))
    with pytest.raises(FloatingPointError, match="teacher's answers were not finite"):
        NoiseKDTrainer(student(), tiny_cnn, config(tmp_path), train_dataset=noise, eval_dataset=images()).train()


def test_logs_agreement_and_class_balance(tiny_cnn, tmp_path):
    recorder = Recorder()
    NoiseKDTrainer(student(), tiny_cnn, config(tmp_path), callbacks=[recorder]).train()
    entries = [entry for entry in recorder.log if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert 0 <= entry["agreement"] <= 100
        assert 0 < entry["class_balance"] <= 1


def test_one_class_answers_show_in_the_class_balance(tiny_cnn, tmp_path):
    with torch.no_grad():
        tiny_cnn.fc.bias[1] += 50
    recorder = Recorder()
    NoiseKDTrainer(student(), tiny_cnn, config(tmp_path), callbacks=[recorder]).train()
    assert recorder.log[0]["class_balance"] < 1e-3


def answers_to_noise(teacher, count=512):
    """Share of each class among the answers to white noise, under running and under batch statistics."""
    noise = NoiseDataset.for_model(teacher, batch_size=count, held_out=True).draw(0)
    with torch.no_grad():
        running = teacher(noise)
        with batch_statistics(teacher):
            batch = teacher(noise)
    return [logits.argmax(1).bincount(minlength=logits.shape[1]) / count for logits in (running, batch)]


def test_running_statistics_collapse_on_noise_and_batch_statistics_do_not(digits_teacher, digits):
    """The finding that the method rests on, on a teacher trained on real digits for a few seconds."""
    assert evaluate(digits_teacher, digits[1])["running"]["accuracy"] > 90
    running, batch = answers_to_noise(digits_teacher)
    assert running.topk(2).values.sum() > 0.9
    assert (running > 0.02).sum() <= 4
    assert batch.max() < 0.25
    assert (batch > 0.02).sum() == 10


@pytest.mark.slow
def test_running_statistics_collapse_on_noise_at_imagenet_size():
    folder = Path(__file__).parents[2] / "shared" / "models" / "tf_efficientnet_lite0"
    if not folder.is_dir():
        pytest.skip(f"needs the trained teacher in {folder}")
    running, batch = answers_to_noise(load_teacher(str(folder)).eval(), count=256)
    assert running.max() == 1.0
    assert (batch > 0).sum() > 100


def test_teacher_on_running_statistics_where_the_fraction_is_zero(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, batch_norm_fraction=0.0, bf16=False))
    noise = trainer.train_dataset.draw(0)
    answers = trainer.reference_logits(trainer.eval_dataset)
    torch.testing.assert_close(answers(noise), tiny_cnn(noise))


def test_the_teacher_logits_of_noise_as_in_training_and_images_as_it_is_deployed(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, bf16=False))
    noise = trainer.train_dataset.draw(0)
    torch.testing.assert_close(trainer.reference_logits(images())(noise), tiny_cnn(noise))
    with batch_statistics(tiny_cnn):
        expected = tiny_cnn(noise)
    torch.testing.assert_close(trainer.reference_logits(trainer.eval_dataset)(noise), expected)


def test_same_seed_same_student_and_another_seed_another(tiny_cnn, tmp_path):
    digests = []
    for seed in (0, 0, 1):
        model = student()
        NoiseKDTrainer(model, tiny_cnn, config(tmp_path, seed=seed)).train()
        digests.append(digest(model))
    assert digests[0] == digests[1] != digests[2]


def test_a_student_given_by_name_gets_its_weights_from_the_seed(digits_teacher, tmp_path):
    digests = []
    for seed in (0, 0, 1):
        digests.append(
            digest(NoiseKDTrainer("resnet10_cifar", digits_teacher, config(tmp_path, input_size=None, seed=seed)).model)
        )
    assert digests[0] == digests[1] != digests[2]


def test_resuming_at_an_epoch_with_evaluation_is_exact_for_drop_out_too(tiny_cnn, tmp_path):
    options = {"max_steps": 8, "steps_per_epoch": 4, "save_strategy": "epoch", "eval_strategy": "epoch"}
    whole, resumed = student(), student(seed=99)
    NoiseKDTrainer(whole, tiny_cnn, config(tmp_path, **options)).train()
    trainer = NoiseKDTrainer(resumed, tiny_cnn, config(tmp_path, **options))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert digest(resumed) == digest(whole)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_is_exact_and_draws_no_noise_twice(tiny_cnn, tmp_path, accumulation, monkeypatch):
    options = {
        "max_steps": 11,
        "save_strategy": "steps",
        "save_steps": 5,
        "gradient_accumulation_steps": accumulation,
        "steps_per_epoch": 3 * accumulation,
    }
    whole = student()
    NoiseKDTrainer(whole, tiny_cnn, config(tmp_path, **options)).train()

    drawn = []
    draw = NoiseDataset.draw
    monkeypatch.setattr(NoiseDataset, "draw", lambda self, step: drawn.append(step) or draw(self, step))
    resumed = student(seed=99)
    trainer = NoiseKDTrainer(resumed, tiny_cnn, config(tmp_path, **options))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert drawn == list(range(5 * accumulation, 11 * accumulation))
    assert digest(resumed) == digest(whole)


def test_a_finished_training_is_resumed_without_another_step(tiny_cnn, tmp_path):
    options = {"max_steps": 6, "steps_per_epoch": 4, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = (NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, **options)) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert digest(resumed.model) == digest(whole.model)


def test_resuming_is_exact_across_a_switch_of_the_resolution(tiny_cnn, tmp_path):
    """The switch is at noise batch 8 of 12; the checkpoints at 6 and 10 lie on both sides of it."""
    sizes = []

    def spy(generator, shape):
        sizes.append(shape[-1])
        return torch.randn(shape, generator=generator)

    def train(model, max_steps, **resume):
        noise = NoiseDataset((1, 32, 32), 16, 4, distribution=spy, resolutions={0.5: 2, 1: 1}, total_steps=12)
        args = config(tmp_path, max_steps=max_steps, input_size=None, save_strategy="steps", save_steps=1)
        args.lr_scheduler_type = "constant"
        NoiseKDTrainer(model, tiny_cnn, args, train_dataset=noise, eval_dataset=images()).train(**resume)
        return digest(model)

    whole = train(student(), 12)
    assert sizes == [16] * 8 + [32] * 4
    for step in (6, 10):
        sizes.clear()
        assert train(student(seed=9), 12, resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}")) == whole
        assert sizes == ([16] * 8 + [32] * 4)[step:]


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"max_steps": 10}, 10),
        ({"max_steps": 5, "gradient_accumulation_steps": 2}, 10),
        ({"max_steps": -1, "num_train_epochs": 2.5}, 10),
        # The last update of an epoch of 4 batches has one batch.
        ({"max_steps": 5, "gradient_accumulation_steps": 3}, 11),
    ],
)
def test_resolutions_are_shares_of_the_whole_training(tiny_cnn, tmp_path, options, batches):
    args = config(tmp_path, **{"input_size": [1, 32, 32], "noise": "white", "resolutions": "0.5:3,1:2"} | options)
    recorder = SizeRecorder(tiny_cnn)
    NoiseKDTrainer(student(), tiny_cnn, args).train()
    small = math.ceil(0.6 * batches)
    assert recorder.sizes[-batches:] == [16] * small + [32] * (batches - small)


def test_resolutions_follow_a_length_that_is_changed_before_training(tiny_cnn, tmp_path):
    args = config(tmp_path, input_size=[1, 32, 32], noise="white", resolutions="0.5:1,1:1")
    recorder = SizeRecorder(tiny_cnn)
    trainer = NoiseKDTrainer(student(), tiny_cnn, args)
    recorder.sizes.clear()
    trainer.args.max_steps = 8
    trainer.train()
    assert recorder.sizes == [16] * 4 + [32] * 4


def test_resuming_with_another_length_is_refused_where_the_noise_has_several_sizes(tiny_cnn, tmp_path):
    def train(max_steps, resolutions, **resume):
        options = {"max_steps": max_steps, "resolutions": resolutions, "save_strategy": "steps", "save_steps": 2}
        args = config(tmp_path, input_size=[1, 32, 32], **options)
        trainer = NoiseKDTrainer(student(), tiny_cnn, args)
        trainer.train(**resume)
        return trainer.state.global_step

    assert train(4, "0.5:1,1:1") == 4
    resume = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-4")}
    with pytest.raises(ValueError, match=r"of 4 steps, and this one has 6: .*max_steps=4, or .*resolutions='1'"):
        train(6, "0.5:1,1:1", **resume)
    assert train(6, "1", **resume) == 6


def test_structured_noise_is_the_default_and_begins_small(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, input_size=[1, 32, 32], max_steps=20))
    assert trainer.train_dataset.distribution.name == "structured"
    assert trainer.train_dataset.image_size(0) == (16, 16)
    assert trainer.train_dataset.image_size(19) == (32, 32)
    assert trainer.eval_dataset.image_sizes() == [((32, 32), 1.0)]
    noise = trainer.provenance().noise
    assert noise.distribution.startswith("structured (")
    assert noise.image_sizes == [((16, 16), 0.6), ((24, 24), 0.25), ((32, 32), 0.15)]


def test_held_out_noise_is_of_the_kind_of_the_training_noise(tiny_cnn, tmp_path):
    noise = NoiseDataset((1, 8, 8), 16, 4, distribution="fractal", mean=0.5, std=2.0)
    held_out = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, input_size=None), train_dataset=noise).eval_dataset
    assert (held_out.distribution.name, held_out.mean, held_out.std) == ("fractal", 0.5, 2.0)
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, noise_std=0.5))
    assert (trainer.train_dataset.std, trainer.eval_dataset.std) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("multiple", "sides"), [(1, [16, 30, 40]), (8, [16, 32, 40]), (10, [40]), (32, [32, 40]), (40, [40])]
)
def test_small_noise_comes_in_sizes_that_the_models_take(tmp_path, multiple, sides):
    class Picky(TinyCNN):
        def forward(self, x):
            if x.shape[-1] % multiple and x.shape[-1] != 40:
                raise ValueError("other sizes")
            return super().forward(x)

    args = config(tmp_path, input_size=[1, 40, 40], resolutions="0.3:1,0.74:1,1:1")
    trainer = NoiseKDTrainer(Picky(), TinyCNN().eval(), args)
    assert [size for size, _ in trainer.train_dataset.image_sizes()] == [(side, side) for side in sides]


def test_checkpoints_are_whole_models_that_timm_reads(digits_teacher, tmp_path):
    args = config(tmp_path, input_size=None, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = NoiseKDTrainer("resnet10_cifar", digits_teacher, args)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-2"
    assert not any(path.suffix in (".bin", ".pkl") for path in folder.iterdir())
    loaded = load_teacher(str(folder)).eval().to(memory_format=trainer.memory_format)
    pixels = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), trainer.model.eval()(pixels))
    assert tuple(loaded.pretrained_cfg["mean"]) == digits_teacher.pretrained_cfg["mean"]


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


def test_held_out_noise_is_apart_from_training_noise(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path))
    held_out = next(iter(trainer.get_eval_dataloader()))["pixel_values"]
    assert not any(torch.equal(held_out, trainer.train_dataset.draw(step)) for step in range(50))


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


def test_distils_on_real_images_too(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path), train_dataset=images(64), eval_dataset=images())
    assert trainer.train().global_step == 6


def test_takes_a_noise_data_set_of_the_users(tiny_cnn, tmp_path):
    mine = NoiseDataset((1, 8, 8), 16, seed=11, std=2.0)
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, bf16=False, input_size=None), train_dataset=mine)
    assert torch.equal(trainer.train_dataset.draw(3), mine.draw(3))
    assert trainer.train().global_step == 6


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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(tiny_cnn, tmp_path, backend):
    before = digest(tiny_cnn)
    plain, compiled = student(), student()
    plain.drop.p = compiled.drop.p = 0.0
    NoiseKDTrainer(plain, tiny_cnn, config(tmp_path, bf16=False)).train()
    args = config(tmp_path, bf16=False, torch_compile=True, torch_compile_backend=backend)
    trainer = NoiseKDTrainer(compiled, tiny_cnn, args)
    trainer.train()
    assert trainer.model is compiled
    assert digest(tiny_cnn) == before
    for expected, tensor in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-4)


def test_torch_compile_makes_one_graph_for_each_resolution(tiny_cnn, tmp_path):
    """And none for sizes in general, which is slower."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    args = config(
        tmp_path,
        input_size=[1, 64, 64],
        noise="white",
        resolutions="0.25:1,0.5:1,1:1",
        torch_compile=True,
        torch_compile_backend="eager",
    )
    NoiseKDTrainer(student(), tiny_cnn, args).train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu(digits_teacher, tmp_path):
    teacher = copy.deepcopy(digits_teacher)
    trainer = NoiseKDTrainer("resnet10_cifar", teacher, config(tmp_path, input_size=None))
    assert trainer.train().global_step == 6
    assert trainer.train_dataset.draw(0).is_cuda


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
def test_a_teacher_logits_of_noise_by_the_statistics_asked_for(make, options, expected, tmp_path, caplog):
    torch.manual_seed(0)
    teacher = make().eval()
    for name, buffer in teacher.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    before = digest(teacher)
    trainer = NoiseKDTrainer(student(), teacher, config(tmp_path, noise="white", bf16=False, **options))
    assert ("White noise tells a student little" in caplog.text) == (expected == 0)
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


@pytest.mark.parametrize(("teacher_statistics", "metric"), [(0.0, "running_agreement"), (0.5, "batch_agreement")])
def test_the_best_student_is_chosen_by_the_statistics_it_will_be_read_with(tmp_path, teacher_statistics, metric):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    options = best | {"save_steps": 5, "teacher_statistics": teacher_statistics}
    assert NoiseKDTrainer(student(), TinyCNN(), config(tmp_path, **options)).args.metric_for_best_model == metric
    options["metric_for_best_model"] = "batch_agreement"
    trainer = NoiseKDTrainer(student(), TinyCNN(), config(tmp_path, **options))
    assert trainer.args.metric_for_best_model == "batch_agreement"


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_a_traced_teacher_as_it_is(tmp_path):
    teacher = torch.jit.trace(TinyCNN().eval(), torch.randn(2, 1, 8, 8))
    options = {"teacher_statistics": 0.0, "input_size": [1, 32, 32], "student_args": {"width": 4}, "max_steps": 1}
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
    assert not caplog.text


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


class TupleInTraining(TinyCNN):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class SizedStream(IterableDataset):
    def __iter__(self):
        return iter(images())

    def __len__(self):
        return 12


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
    with pytest.raises(ValueError, match=r"shares '.*' with the teacher.*deepcopy"):
        NoiseKDTrainer(model, tiny_cnn, config(tmp_path))
    with pytest.raises(ValueError, match=r"shares 'conv1\.weight'"):
        NoiseKDTrainer(tiny_cnn, tiny_cnn, config(tmp_path))
    NoiseKDTrainer(copy.deepcopy(tiny_cnn), tiny_cnn, config(tmp_path))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_sync_batch_norm_is_refused_where_there_are_several_processes(tiny_cnn, tmp_path, monkeypatch, which):
    monkeypatch.setattr(NoiseKDConfig, "world_size", property(lambda self: 2))
    models = {"student": student(), "teacher": tiny_cnn}
    models[which] = nn.SyncBatchNorm.convert_sync_batchnorm(models[which])
    with pytest.raises(ValueError, match=r"TinyCNN has SyncBatchNorm layers, .* over all 2 processes"):
        NoiseKDTrainer(*models.values(), config(tmp_path))


@pytest.mark.parametrize(
    ("kwargs", "options", "message"),
    [
        (
            {"teacher_model": NoBatchNorm()},
            {"teacher_statistics": 0.5},
            "NoBatchNorm has no BatchNorm layer that can.*leave teacher_statistics out",
        ),
        (
            {"teacher_model": NoBatchNorm()},
            {"batch_norm_fraction": 0.5},
            "NoBatchNorm has no BatchNorm layer that can.*leave teacher_statistics out",
        ),
        ({"teacher_model": frozen()}, {}, "TinyCNN has 2 frozen BatchNorm.*replace them .*teacher_statistics=0"),
        ({"teacher_model": frozen()}, {"teacher_statistics": 0.5}, "no BatchNorm layer .*: set teacher_statistics=0"),
        ({"model": TinyCNN(num_classes=4)}, {}, "teacher has 3 classes and the student 4.*num_classes=3"),
        ({"model": TinyCNN(in_chans=3)}, {}, "student does not take images of 1x8x8"),
        ({"model": timm_model()}, {}, "student takes 3 input channels and the noise has 1: build .*in_chans=1"),
        ({}, {"input_size": [3, 8, 8]}, "teacher does not take images of 3x8x8"),
        ({}, {"input_size": None}, "does not say what input size"),
        (
            {"teacher_model": timm_model(), "model": timm_model(input_size=(3, 64, 64))},
            {"input_size": None},
            "student takes images of 3x64x64 and the noise has 3x32x32",
        ),
        ({"model": "resnet19_cifar"}, {}, "Unknown model 'resnet19_cifar'.*Did you mean .*resnet18_cifar"),
        ({"teacher_model": "resnet19"}, {}, "Unknown model 'resnet19'"),
        ({"teacher_model": "/no/such/folder"}, {}, "no folder"),
        ({"teacher_model": 3}, {}, "a name, a folder or an nn.Module, got int"),
        ({"teacher_model": nan_teacher()}, {}, "teacher's 'conv2.weight' holds a NaN"),
        ({"model": nan_teacher()}, {}, "student's 'conv2.weight' holds a NaN"),
        ({"teacher_model": NoLogits()}, {}, r"teacher must map images to logits .*\[2, 8, 8, 8\]"),
        (
            {"train_dataset": NoiseDataset((1, 8, 8), 1)},
            {},
            "has 1 and the argument per_device_train_batch_size says 16",
        ),
        ({"train_dataset": NoiseDataset((1, 8, 8), 16)}, {"noise": "fractal"}, "has white and the argument noise says"),
        ({"train_dataset": NoiseDataset((1, 8, 8), 16)}, {"noise_std": 2.0}, "has 1.0 and the argument noise_std"),
        ({"train_dataset": NoiseDataset((1, 8, 8), 16)}, {"resolutions": "0.5"}, "the argument resolutions says"),
        (
            {"train_dataset": NoiseDataset((1, 8, 8), 16, resolutions={0.5: 0.6, 1: 0.4})},
            {"resolutions": "1:0.4,0.5:0.6"},
            "has 0.5:0.6,1:0.4 and the argument resolutions says 1:0.4,0.5:0.6",
        ),
        ({"train_dataset": NoiseDataset((1, 9, 9), 16)}, {}, "images of 1x9x9 and the arguments say 1x8x8"),
        (
            {"eval_dataset": NoiseDataset((1, 32, 32), 16, 2, distribution="structured")},
            {"input_size": [1, 32, 32]},
            "pass total_steps, or resolutions",
        ),
        ({"eval_dataset": NoiseDataset((3, 8, 8), 16, 2)}, {}, "have 3 channels"),
        ({"train_dataset": SizedStream()}, {"input_size": None}, "does not say what input size"),
        ({"teacher_model": TinyCNN().half()}, {}, r"teacher's weights are of type torch.float16: .*teacher.float\(\)"),
        ({"teacher_model": TinyCNN(num_classes=1), "model": TinyCNN(num_classes=1)}, {}, "teacher has one class"),
        (
            {"teacher_model": timm_model(), "model": with_another_head()},
            {"input_size": None},
            "answers with 10 classes and says that it has 100.*build it with num_classes=10",
        ),
        (
            {"teacher_model": timm_model(), "model": timm.create_model("resnet18", num_classes=10, act_layer=nn.SiLU)},
            {"input_size": [3, 32, 32]},
            "student could not be saved: .*act_layer.* arguments that a config.json can hold",
        ),
        ({"teacher_model": NanAnswers()}, {}, "teacher answers blank images with a NaN"),
        ({"model": NanAnswers()}, {}, "student answers blank images with a NaN"),
        ({"teacher_model": traced()}, {}, "2 of 3 normalisations use stored ones"),
        ({}, {"gradient_checkpointing": True}, "gradient_checkpointing is True, and TinyCNN has none"),
        ({}, {"metric_for_best_model": "loss"}, "is 'loss', .* use one of running_agreement, running_kl, batch_"),
        ({"eval_dataset": images()}, {"metric_for_best_model": "batch_top5_accuracy"}, "use one of running_accuracy, "),
        (
            {"eval_dataset": {"a": images(), "b": images()}},
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
            "is 'batch_agreement', .* use one of a_running_accuracy, .*b_batch_kl",
        ),
        ({"train_dataset": images(33)}, {}, "last batch of an epoch has one image.*dataloader_drop_last=True"),
        ({"train_dataset": images(1)}, {}, "last batch of an epoch has one image"),
        ({"train_dataset": images(9)}, {"dataloader_drop_last": True}, "9 training images, less than a batch"),
        ({"model": TupleInTraining()}, {}, "In training mode TupleInTraining gives a tuple"),
        ({"model": torch.compile(TinyCNN())}, {}, "student is wrapped in OptimizedModule.*torch_compile=True"),
        ({"model": nn.DataParallel(TinyCNN())}, {}, "student is wrapped in DataParallel"),
        ({"teacher_model": torch.compile(TinyCNN().eval())}, {}, "teacher is wrapped in OptimizedModule"),
        ({"model": TinyCNN().requires_grad_(False)}, {}, "no weight to train"),
        ({"eval_dataset": images(0)}, {}, "0 images"),
        ({"eval_dataset": {}}, {}, "empty mapping"),
        ({"eval_dataset": TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())}, {}, "have 3 channels"),
        ({"eval_dataset": {"a": images(), "b": images(1)}}, {}, "1 image"),
        ({"eval_dataset": images(12, num_classes=5)}, {}, "label 3, but the model has 3 classes"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tiny_cnn, tmp_path, kwargs, options, message):
    with pytest.raises(ValueError, match=message):
        NoiseKDTrainer(**{"model": TinyCNN(), "teacher_model": tiny_cnn, "args": config(tmp_path, **options)} | kwargs)
    assert not (tmp_path / "out").exists()


def test_checking_a_student_in_training_mode_does_not_change_it(tiny_cnn, tmp_path):
    model = student()
    before = digest(model)
    trainer = NoiseKDTrainer(model, tiny_cnn, config(tmp_path), train_dataset=images(32))
    assert digest(trainer.model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("limit", [1000, 8000])  # less than the weights, and than the state of the optimizer
def test_a_full_disk_is_named_with_the_last_whole_checkpoint(tiny_cnn, tmp_path, limit):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        """Lets files be no larger, which torch and safetensors are told like a full disk."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    args = config(tmp_path, save_strategy="steps", save_steps=2, logging_strategy="no")
    trainer = NoiseKDTrainer(student(), tiny_cnn, args, callbacks=[FillDisk()])
    try:
        with pytest.raises(OSError, match=r"(large|device) while writing .*checkpoint-4\. .* is .*checkpoint-2\.$"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


def test_a_stream_that_is_resumed_is_said_to_begin_anew(tiny_cnn, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    for resume in ({}, {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}):
        trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, **options), train_dataset=SizedStream())
        trainer.train(**resume)
        assert ("exact only if" in caplog.text) == bool(resume)


def damage(name, size):
    def apply(folder):
        with open(folder / name, "r+b") as file:
            file.truncate(size)

    return apply


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (damage("model.safetensors", 100), "not whole: model.safetensors cut off"),
        (damage("optimizer.pt", 100), "not whole: optimizer.pt cut off"),
        (damage("scheduler.pt", 100), "not whole: scheduler.pt cut off"),
        (damage("rng_state.pth", 1000), "not whole: rng_state.pth cut off"),
        (damage("trainer_state.json", 10), "not whole: trainer_state.json cut off"),
        (lambda folder: os.remove(folder / "optimizer.pt"), "not whole: optimizer.pt missing"),
        (lambda folder: os.remove(folder / "model.safetensors"), "not whole: model.safetensors missing"),
    ],
)
def test_damaged_checkpoints_are_refused(tiny_cnn, tmp_path, break_it, message):
    NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)).train()
    folder = tmp_path / "out" / "checkpoint-2"
    break_it(folder)
    model = student(seed=5)
    before = digest(model)
    trainer = NoiseKDTrainer(model, tiny_cnn, config(tmp_path))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder))
    assert digest(model) == before


def test_missing_and_foreign_checkpoints_are_refused(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
    wide = TinyCNN()
    wide.conv1 = nn.Conv2d(1, 8, 5, padding=2, bias=False)
    NoiseKDTrainer(wide, tiny_cnn, config(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)).train()
    with pytest.raises(ValueError, match=r"of another model: 1 tensors differ, first 'conv1\.weight'"):
        trainer.train(resume_from_checkpoint=True)


def test_a_plain_module_is_saved_with_a_warning(tiny_cnn, tmp_path, caplog):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path))
    with caplog.at_level(logging.WARNING):
        trainer.save_model(str(tmp_path / "saved"))
    assert "without a config.json" in caplog.text
    assert os.listdir(tmp_path / "saved") == ["model.safetensors"]


def test_resuming_passes_over_a_checkpoint_that_a_kill_left_half_written(tiny_cnn, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path / "whole", **options))
    whole.train()
    killed = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path / "killed", **options))
    killed.train()
    output_dir = Path(killed.args.output_dir)
    (output_dir / "checkpoint-6" / "trainer_state.json").unlink()
    (output_dir / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK half")
    again = NoiseKDTrainer(student(seed=5), tiny_cnn, config(tmp_path / "killed", **options))
    again.train(resume_from_checkpoint=True)
    assert digest(again.model) == digest(whole.model)
    passed_over = [record.getMessage() for record in caplog.records if "Passing over" in record.getMessage()]
    assert ["checkpoint-6" in passed_over[0], "checkpoint-4" in passed_over[1], len(passed_over)] == [True, True, 2]
    (output_dir / "checkpoint-2" / "model.safetensors").unlink()
    (output_dir / "checkpoint-4" / "model.safetensors").unlink()
    (output_dir / "checkpoint-6" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors missing.*delete .*out"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("left", ["checkpoint-2/model.safetensors", "state", ".checkpoint-2.saving/model.safetensors"])
def test_a_training_that_a_kill_cut_off_in_its_first_checkpoint_begins_anew(tiny_cnn, tmp_path, left):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path / "whole", **options))
    whole.train()
    output_dir = tmp_path / "killed" / "out"
    if left == "state":
        shutil.copytree(Path(whole.args.output_dir) / "checkpoint-2", output_dir / "checkpoint-2")
        (output_dir / "checkpoint-2" / "trainer_state.json").write_text('{"global_st')
    else:
        (output_dir / left).parent.mkdir(parents=True)
        (output_dir / left).write_bytes(b"half")
    again = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path / "killed", **options))
    again.train(resume_from_checkpoint=True)
    assert digest(again.model) == digest(whole.model)
    assert sorted(path.name for path in output_dir.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    (output_dir / "checkpoint-2" / "optimizer.pt").unlink()  # as where models alone are kept
    (output_dir / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="delete"):
        again.train(resume_from_checkpoint=True)


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

    monkeypatch.setattr("hf_noisekd.training.ending.calibration_images", fail)
    with caplog.at_level(logging.WARNING):
        trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, num_calibration_images=8))
        trainer.train()
    reason = f"{type(error).__name__}: {error}"
    assert f"keeps the running statistics of its training noise. {reason}" in caplog.text
    assert trainer.record().noisekd.batch_norm == "batch"


def test_only_a_student_of_noise_alone_is_recalibrated(tiny_cnn, tmp_path):
    args = config(tmp_path, num_calibration_images=8)
    trainer = NoiseKDTrainer(
        student(), tiny_cnn, args, train_dataset=TensorDataset(torch.randn(64, 1, 8, 8), torch.zeros(64))
    )
    trainer.train()
    assert trainer.calibration_images is None
