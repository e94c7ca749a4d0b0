import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import digest, write_images
from harness.equal_seconds import distill_twice, step_cost
from harness.experiment import Experiment, experiment_parser, run_table
from harness.presets import CIFAR10, DISTILL_DEFAULTS
from safetensors.torch import save_file
from timm.models._registry import _model_pretrained_cfgs
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

from hf_noisekd import NoiseKDConfig
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.models.saving import save_model

PRESET = CIFAR10["cpu"] | {"model_args": {"width": 8, "stem_stride": 2}}


@pytest.fixture
def experiment(cifar10, small_teacher, tmp_path):
    def build(*options, preset=PRESET) -> Experiment:
        parser = experiment_parser("doc", "tiny", {"cpu": preset}, resumes=True)
        options = ("--dataset", str(cifar10), "--output-dir", str(tmp_path), "--max-steps", "2", *options)
        return Experiment("tiny", parser.parse_args([*map(str, options)]), preset)

    return build


def test_a_trained_teacher_is_saved_and_can_be_given_to_another_recipe(experiment, tmp_path):
    first = experiment()
    teacher = first.prepare_teacher()
    assert first.results.record["runs"][0]["steps"] == 2
    second = experiment("--teacher", tmp_path / "teacher", "--output-dir", tmp_path / "second")
    assert digest(second.prepare_teacher()) == digest(teacher)
    assert second.results.record["runs"][0]["steps"] == 0
    assert second.results.record["configuration"]["teacher"] == "teacher"
    running = [results.record["runs"][0]["evaluations"][0]["running"] for results in (first.results, second.results)]
    assert running[0] == pytest.approx(running[1], abs=0.01)


def test_students_see_the_images_as_the_given_teacher_does(experiment, tmp_path):
    cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    save_model(timm.create_model("resnet10_cifar", width=4, pretrained_cfg_overlay=cfg), tmp_path / "other")
    other = experiment("--teacher", tmp_path / "other")
    student = other.build("resnet10_cifar")
    for described in (student.pretrained_cfg, other.train_dataset.pretrained_cfg, other.test_dataset.pretrained_cfg):
        assert tuple(described["mean"]) == cfg["mean"]
        assert tuple(described["std"]) == cfg["std"]


def test_networks_have_random_weights_of_the_seed_and_the_presets_size(experiment):
    first, again = (experiment().build("resnet10_cifar") for _ in range(2))
    assert digest(first) == digest(again) != digest(experiment("--seed", 1).build("resnet10_cifar"))
    assert first.conv1.out_channels == 8
    assert experiment().build("mobilenetv2_cifar").num_classes == 10


def test_the_cost_of_a_step_is_relative_to_the_first_row(experiment):
    tiny = experiment()
    tiny.prepare_teacher()
    rows = {"white": {"noise": "white"}, "costly": {"noise": "white", "per_device_train_batch_size": 1024}}
    costs = step_cost(tiny, rows)
    assert costs["white"] == 1.0
    assert costs["costly"] > 2
    assert [run["name"] for run in tiny.results.record["runs"]] == ["teacher"]


def test_a_slow_minute_does_not_move_the_cost_of_a_step(experiment, monkeypatch):
    class Trainer:
        calls = 0

        def __init__(self, name):
            self.cost = {"first": 1.0, "second": 1.2, "third": 1.5}[name]

        def train(self):
            Trainer.calls += 1
            slow = self.cost > 1 and 2 < Trainer.calls <= 9
            return SimpleNamespace(metrics={"train_runtime": self.cost * (3 if slow else 1)})

    tiny = experiment()
    tiny.options.max_steps = None
    monkeypatch.setattr(tiny, "distillation_trainer", lambda name, **_: Trainer(name))
    assert step_cost(tiny, {"first": {}, "second": {}, "third": {}}) == {"first": 1.0, "second": 1.2, "third": 1.5}


def test_equal_steps_and_equal_seconds_are_one_run_where_they_are_the_same(experiment):
    tiny = experiment("--max-steps", 100)
    tiny.teacher = tiny.build("resnet10_cifar").eval()
    tiny.preset = tiny.preset | {"distillation": {"max_steps": 100, "per_device_train_batch_size": 4}}
    same = distill_twice(tiny, "same", 100, 99, noise="white")
    assert (same["steps, equal steps"], same["steps, equal seconds"]) == (100, 100)
    other = distill_twice(tiny, "other", 4, 3, noise="white")
    assert (other["steps, equal steps"], other["steps, equal seconds"]) == (4, 3)
    runs = tiny.results.record["runs"]
    assert [run["name"] for run in runs] == ["same, equal steps", "other, equal steps", "other, equal seconds"]
    assert other["accuracy, equal seconds"] == runs[-1]["evaluations"][0]["batch"]["accuracy"]


def test_a_recipe_goes_on_with_what_is_finished(experiment, tmp_path, monkeypatch):
    options = ("--output-dir", tmp_path / "run")
    tiny = experiment(*options)
    tiny.teacher = tiny.build("resnet10_cifar").eval()
    tiny.preset = tiny.preset | {"distillation": {"max_steps": 2, "per_device_train_batch_size": 4}}
    costs = step_cost(tiny, {"white": {"noise": "white"}, "fractal": {"noise": "fractal"}})
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step_costs"] == costs
    first = tiny.distilled("white", noise="white")
    again = experiment(*options, "--resume")
    monkeypatch.setattr(again, "distill", None)
    assert step_cost(again, {}) == costs
    found = again.distilled("white", noise="white")
    assert (found.steps, found.seconds, found.evaluations) == (first.steps, first.seconds, first.evaluations)
    assert again.results.find("fractal") is None
    again.results.record["runs"].append(again.results.record["runs"][0] | {"name": "teacher"})
    again.teacher = first_teacher = tiny.teacher
    assert again.prepare_teacher() is first_teacher
    again.teacher = again.build("resnet18_cifar").eval()
    with pytest.raises(ValueError, match=r"'white' .*teacher.*--output-dir"):
        again.prepare_teacher()
    with pytest.raises(ValueError, match=r"seed is 0.* 1.*--output-dir"):
        experiment(*options, "--resume", "--seed", 1)
    with pytest.raises(ValueError, match=r"configuration is .*max_steps"):
        experiment(*options, "--resume", "--max-steps", 3)
    with pytest.raises(ValueError, match=r"results\.json.*--resume"):
        experiment("--output-dir", tmp_path / "other", "--resume")


def test_recalibration_leaves_the_student_as_it_is(experiment, small_teacher):
    student = load_teacher(str(small_teacher))
    before = digest(student)
    subject = experiment()
    first, second = (subject.recalibrated_accuracy(student, subject.real_images(20, seed)) for seed in (0, 0))
    assert first == second
    assert digest(student) == before


def test_arguments_of_a_run_go_before_those_of_the_preset(experiment, small_teacher):
    subject = experiment("--teacher", small_teacher)
    trainer = subject.distill("student", learning_rate=0.5, eval_strategy="no")
    assert trainer.args.learning_rate == 0.5
    assert trainer.args.max_steps == 2
    assert trainer.args.lr_scheduler_type == "cosine"
    assert [run["name"] for run in subject.results.record["runs"]] == ["student"]


def test_the_configuration_is_what_was_run(experiment, small_teacher, cifar10):
    preset = PRESET | {"dataset_config": "of_the_hub", "flip": False}
    subject = experiment("--label-column", "label", "--teacher", small_teacher, preset=preset)
    configuration = subject.results.record["configuration"]
    assert not subject.train_dataset.flip
    assert configuration["dataset"] == cifar10.name
    assert configuration["dataset_config"] is None
    assert configuration["label_column"] == "label"
    assert configuration["supervised"] == {
        "learning_rate": 3e-3, "weight_decay": 0.05, "lr_scheduler_type": "linear", "warmup_steps": 0.2,
        "num_train_epochs": 10,
    }  # fmt: skip


def test_max_steps_makes_no_training_longer(experiment):
    subject = experiment("--max-steps", 100_000, preset=PRESET | {"supervised": {"num_train_epochs": 3}})
    subject.prepare_teacher()
    assert subject.results.record["runs"][0]["steps"] == 3


def test_what_cannot_work_is_found_before_anything_is_trained(experiment, small_teacher, cifar10, tmp_path):
    with pytest.raises(ValueError, match=r"'resnet18_cifra'.*resnet18_cifar"):
        experiment(preset=PRESET | {"students": ["resnet10_cifar", "resnet18_cifra"]})
    save_model(timm.create_model("resnet10_cifar", width=4, num_classes=3), tmp_path / "three")
    with pytest.raises(ValueError, match=f"three .*3 classes .*{cifar10.name} 10"):
        experiment("--teacher", tmp_path / "three")


def test_a_teacher_may_be_a_file_of_weights(experiment, tmp_path):
    teacher = timm.create_model("resnet10_cifar").eval()
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    given = experiment("--teacher", "resnet10_cifar", "--teacher-checkpoint", tmp_path / "teacher.pth").teacher
    assert digest(given) == digest(teacher)


def test_a_configuration_of_a_local_data_set_can_be_named(experiment, tmp_path):
    for name, classes in (("digits", 4), ("letters", 6)):
        write_images(tmp_path / "data" / name, ["image", ("label", classes)], copies=2)
    files = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/data/train*\n  - split: test\n"
        f"    path: {name}/data/test*\n"
        for name in ("digits", "letters")
    )
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    subject = experiment("--dataset", tmp_path / "data", "--dataset-config", "letters")
    assert subject.train_dataset.pretrained_cfg["num_classes"] == 6
    with pytest.raises(ValueError, match=str(tmp_path / "data")):
        experiment("--dataset", tmp_path / "data")


def test_a_teacher_starts_from_timms_weights_with_a_head_of_its_own(tmp_path, monkeypatch):
    published = timm.create_model("resnet10t")
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    cfg = dataclasses.replace(timm.get_pretrained_cfg("resnet10t"), file=str(tmp_path / "model.safetensors"))
    monkeypatch.setitem(_model_pretrained_cfgs, "resnet10t", cfg)
    data = write_images(tmp_path / "photos", ["image", ("label", 3)], photos=True, copies=2)
    preset = {"photos": True, "teacher": "resnet10t", "students": [], "dataset": str(data), "pretrained": True}
    parser = experiment_parser("doc", "tiny", {"cpu": preset})
    experiment = Experiment("tiny", parser.parse_args(["--output-dir", str(tmp_path / "run")]), preset)
    teacher = experiment.build("resnet10t", pretrained=True)
    assert torch.equal(teacher.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
    assert teacher.fc.out_features == 3
    save_model(teacher, tmp_path / "saved")
    assert load_teacher(str(tmp_path / "saved")).pretrained_cfg["label_names"] == ["0", "1", "2"]


def test_only_a_student_that_noise_taught_is_pushed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--push-to", "alice/student", "--rows", "supervised"])
    with pytest.raises(SystemExit):
        run_table("tiny", "doc", {"cpu": PRESET})
    assert re.search("--push-to .*noise-batch.*--rows", capsys.readouterr().err)


def test_photos_are_those_that_the_given_teacher_wants(tmp_path):
    preset = {"photos": True, "teacher": "resnet18", "students": [], "dataset": "nowhere"}
    preset["cfg"] = {"input_size": (3, 40, 40)}
    data = write_images(tmp_path / "photos", ["image", ("label", 3)], photos=True, copies=2)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "transformers")
    size, mean, std = {"height": 24, "width": 24}, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    processor = BitImageProcessor(size={"shortest_edge": 24}, crop_size=size, image_mean=mean, image_std=std)
    processor.save_pretrained(tmp_path / "transformers")
    cfg = {"input_size": (3, 24, 24), "mean": mean, "std": std, "num_classes": 3}
    save_model(timm.create_model("resnet10t", pretrained_cfg_overlay=cfg), tmp_path / "timm")

    def images(*options) -> tuple:
        parser = experiment_parser("doc", "tiny", {"cpu": preset})
        options = parser.parse_args(["--dataset", str(data), "--output-dir", str(tmp_path / "run"), *options])
        experiment = Experiment("tiny", options, preset)
        cfg = experiment.train_dataset.pretrained_cfg
        assert experiment.test_dataset[0]["pixel_values"].shape == cfg["input_size"]
        return cfg["input_size"], list(cfg["mean"])

    assert images() == ((3, 40, 40), [0.485, 0.456, 0.406])
    assert images("--teacher", str(tmp_path / "timm")) == ((3, 24, 24), mean)
    # transformers' ResNet does not say its size outside the image processor.
    assert images("--teacher", str(tmp_path / "transformers")) == ((3, 24, 24), mean)
    (tmp_path / "transformers" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"transformers .*image processor"):
        images("--teacher", str(tmp_path / "transformers"))


def test_the_defaults_of_distillation_are_all_that_differs_from_the_paper(tmp_path):
    default, recipe = NoiseKDConfig(str(tmp_path)), NoiseKDConfig.paper(str(tmp_path), **DISTILL_DEFAULTS)
    # A recipe builds its students, and says itself which statistics it compares.
    ignored = {"optim", "output_dir", "init_student", "num_calibration_images"}
    different = {
        field.name
        for field in dataclasses.fields(default)
        if getattr(default, field.name) != getattr(recipe, field.name)
    }
    assert different <= ignored, different
