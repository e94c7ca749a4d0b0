"""The training itself: its loss, its precision, its seed, and its end where it diverges."""

import copy
import re

import pytest
import torch
from conftest import config, digest, images, student
from torch import nn
from transformers import TrainerCallback

from hf_noisekd import NoiseDataset, NoiseKDTrainer, batch_statistics


class Recorder(TrainerCallback):
    """Keeps what the teacher and the student were fed, and the log."""

    def __init__(self):
        self.log = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.log.append(dict(logs))


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
    assert re.search("float32: .*layer 4 .*1x16x16", caplog.text)
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


def test_another_loss_trains(tiny_cnn, tmp_path):
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


DIVERGING = {"learning_rate": 1e20, "max_grad_norm": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant"}


def test_training_ends_at_the_first_loss_that_is_not_finite(tiny_cnn, tmp_path):
    options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 1}

    class Diverge(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 5:
                optimizer.param_groups[0]["lr"] = float("inf")

    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, **options), callbacks=[Diverge()])
    with pytest.raises(FloatingPointError, match=r"step 6\b.*learning rate.*checkpoint-5\b"):
        trainer.train()
    assert not (tmp_path / "out" / "checkpoint-6").exists()
    recorder = Recorder()
    args = config(tmp_path / "new", max_steps=40, logging_steps=5, **DIVERGING)
    with pytest.raises(FloatingPointError, match=r"(nan|inf) .*step 5\b.*1e\+20.*no whole checkpoint"):
        NoiseKDTrainer(student(), tiny_cnn, args, callbacks=[recorder]).train()
    assert recorder.log == []


@pytest.mark.parametrize("options", [{"logging_strategy": "no"}, {"logging_nan_inf_filter": True}])
def test_a_student_that_is_not_finite_is_not_returned_where_nothing_is_logged(tiny_cnn, tmp_path, options):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, **options, **DIVERGING))
    with pytest.raises(FloatingPointError, match="step 6"):
        trainer.train()
    with pytest.raises(FloatingPointError):
        trainer.save_model()
    assert list((tmp_path / "out").iterdir()) == []


def test_training_data_that_are_not_finite_are_told_from_a_student_that_diverges(tiny_cnn, tmp_path):
    noise = NoiseDataset((1, 8, 8), 16, 4, distribution=lambda generator, shape: torch.full(shape, float("nan")))
    with pytest.raises(FloatingPointError, match=r"teacher.* finite"):
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


def test_teacher_on_running_statistics_where_the_fraction_is_zero(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path, batch_norm_fraction=0.0, bf16=False))
    noise = trainer.train_dataset.draw(0)
    answers = trainer.reference_logits(trainer.eval_dataset)
    torch.testing.assert_close(answers(noise), tiny_cnn(noise))


def test_the_teacher_is_used_for_noise_as_in_training_and_for_images_as_it_is_deployed(tiny_cnn, tmp_path):
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


def test_distils_on_real_images_too(tiny_cnn, tmp_path):
    trainer = NoiseKDTrainer(student(), tiny_cnn, config(tmp_path), train_dataset=images(64), eval_dataset=images())
    assert trainer.train().global_step == 6


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
