"""Checkpoints of a training, and what resumes it."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TinyCNN, config, digest, images, student
from torch import nn
from transformers import TrainerCallback

from hf_noisekd import NoiseDataset, NoiseKDTrainer
from hf_noisekd.models.loading import load_teacher


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


def test_resuming_with_another_length_is_refused_where_the_noise_has_several_sizes(tiny_cnn, tmp_path):
    def train(max_steps, resolutions, **resume):
        options = {"max_steps": max_steps, "resolutions": resolutions, "save_strategy": "steps", "save_steps": 2}
        args = config(tmp_path, input_size=[1, 32, 32], **options)
        trainer = NoiseKDTrainer(student(), tiny_cnn, args)
        trainer.train(**resume)
        return trainer.state.global_step

    assert train(4, "0.5:1,1:1") == 4
    resume = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-4")}
    with pytest.raises(ValueError, match=r"max_steps=4.*resolutions='1'"):
        train(6, "0.5:1,1:1", **resume)
    assert train(6, "1", **resume) == 6


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
        with pytest.raises(OSError, match=r"(large|device) while writing .*checkpoint-4: .* is .*checkpoint-2\.$"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


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
    with pytest.raises(ValueError, match="nowhere"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    wide = TinyCNN()
    wide.conv1 = nn.Conv2d(1, 8, 5, padding=2, bias=False)
    NoiseKDTrainer(wide, tiny_cnn, config(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)).train()
    with pytest.raises(ValueError, match=r"another model.* 'conv1\.weight'"):
        trainer.train(resume_from_checkpoint=True)


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
    passed_over = [record.getMessage() for record in caplog.records if "checkpoint-" in record.getMessage()]
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
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (output_dir / "checkpoint-2" / "optimizer.pt").unlink()  # as where models alone are kept
    (output_dir / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="delete"):
        again.train(resume_from_checkpoint=True)
