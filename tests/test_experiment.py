import sys

import pytest
import timm
from conftest import digest, write_images
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

from hf_noisekd.experiment import CIFAR10, Experiment, experiment_parser, run_table
from hf_noisekd.hub import load_teacher, save_model

PRESET = CIFAR10["cpu"] | {"model_args": {"width": 8, "stem_stride": 2}}


@pytest.fixture
def experiment(cifar10, small_teacher, tmp_path):
    def build(*options, preset=PRESET) -> Experiment:
        parser = experiment_parser("doc", "tiny", {"cpu": preset})
        options = ("--dataset", str(cifar10), "--output-dir", str(tmp_path), "--max-steps", "2", *options)
        return Experiment("tiny", parser.parse_args([*map(str, options)]), preset)

    return build


def test_a_trained_teacher_is_saved_and_can_be_given_to_another_recipe(experiment, tmp_path):
    first = experiment()
    teacher = first.prepare_teacher()
    assert first.results.record["runs"][0]["steps"] == 2
    second = experiment("--teacher", tmp_path / "teacher")
    assert digest(second.prepare_teacher()) == digest(teacher)
    assert second.results.record["runs"][0]["steps"] == 0
    assert second.results.record["configuration"]["trained_teacher"]
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


def test_recalibration_leaves_the_student_as_it_is(experiment, small_teacher):
    student = load_teacher(str(small_teacher))
    before = digest(student)
    first, second = (experiment().recalibrated_accuracy(student, 20, seed) for seed in (0, 0))
    assert first == second
    assert digest(student) == before


def test_arguments_of_a_run_go_before_those_of_the_preset(experiment, small_teacher):
    subject = experiment("--teacher", small_teacher)
    trainer = subject.distil("student", learning_rate=0.5, eval_strategy="no")
    assert trainer.args.learning_rate == 0.5
    assert trainer.args.max_steps == 2
    assert trainer.args.lr_scheduler_type == "cosine"
    assert [run["name"] for run in subject.results.record["runs"]] == ["student"]


def test_only_a_student_that_noise_taught_is_pushed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--push-to", "alice/student", "--rows", "supervised"])
    with pytest.raises(SystemExit):
        run_table("tiny", "doc", {"cpu": PRESET})
    assert "--push-to pushes the first student of the row noise-batch: add it to --rows." in capsys.readouterr().err


def test_photos_are_those_that_the_given_teacher_wants(tmp_path):
    preset = {"photos": True, "teacher": "resnet18", "cfg": {"input_size": (3, 40, 40)}, "dataset": "nowhere"}
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
    assert images("--teacher", str(tmp_path / "transformers"))[1] == mean
