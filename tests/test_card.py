"""Cards say what is known, load what they describe, and pass the Hub's own checks."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TinyCNN
from harness.cards import RELEASED, write_card
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.testing.compare import compare_images
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.models.classifier import class_names
from hf_noisekd.record.schema import read_record
from hf_noisekd.release.card import render_model_card, write_model_card
from hf_noisekd.release.figures import plot_class_balance
from hf_noisekd.training.provenance import describe_model


def run(folder, student, in_chans=3, eval_dataset="labels", **options):
    torch.manual_seed(0)
    cfg = {"input_size": (in_chans, 32, 32), "mean": (0.4,) * in_chans, "std": (0.3,) * in_chans}
    teacher = timm.create_model("resnet10_cifar", width=8, in_chans=in_chans, pretrained_cfg_overlay=cfg)
    data = TensorDataset(torch.randn(16, in_chans, 32, 32), torch.arange(16) % 10)
    args = NoiseKDConfig(
        str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "eval_noise_batches": 1,
            "num_calibration_images": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        | options,
    )
    trainer = NoiseKDTrainer(student, teacher, args, eval_dataset=data if eval_dataset == "labels" else None)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "student"
    run(folder, "resnet10_cifar")
    return folder


def python_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def execute(card, in_chans):
    images = [
        Image.fromarray(pixels.squeeze())
        for pixels in np.random.default_rng(0).integers(0, 256, (4, 40, 48, in_chans), dtype=np.uint8)
    ]
    results = []
    for block in python_blocks(card):
        namespace = {"images": images}
        exec(compile(block, "README.md", "exec"), namespace)
        results.append(namespace)
    return results


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("student", ["resnet10_cifar", "resnet18"])
def test_the_code_of_a_card_runs_in_the_students_folder(tmp_path, monkeypatch, student, in_chans):
    run(tmp_path / "student", student, in_chans)
    record = read_record(tmp_path / "student")
    monkeypatch.chdir(tmp_path / "student")
    probs = {}
    for statistics in ("batch", "running"):
        record.noisekd.batch_norm = statistics
        card = write_model_card(record, ".").read_text()
        by_timm, by_transformers, *by_pipeline = execute(card, in_chans)
        torch.testing.assert_close(by_timm["probs"], by_transformers["probs"], rtol=0, atol=1e-6)
        probs[statistics] = by_timm["probs"]
        assert ("hf_noisekd" in "".join(python_blocks(card))) == (statistics == "batch" or student == "resnet10_cifar")
    assert probs["running"].shape == (4, 10)
    assert not torch.allclose(probs["running"], probs["batch"])
    labels = [prediction[0]["label"] for prediction in by_pipeline[0]["predictions"]]
    assert labels == [str(index) for index in probs["running"].argmax(-1).tolist()]


def test_a_card_of_a_student_without_batch_norm_has_no_choice_of_statistics(folder):
    record = read_record(folder)
    before = str(render_model_card(record))
    record.model.has_batch_norm = describe_model(nn.Sequential(nn.Flatten(), nn.LayerNorm(4))).has_batch_norm
    card = str(render_model_card(record))
    assert before.count("evaluation images (16 images)") == 2 * card.count("evaluation images (16 images)") == 2
    assert before.count("type: accuracy") == 2 * card.count("type: accuracy") > 0
    assert "statistics to use" in before
    assert "statistics" not in card.split("## How to use")[0]


def test_a_card_has_the_facts(folder):
    record = read_record(folder)
    record.noisekd.batch_norm = "batch"
    card = write_model_card(record, folder).read_text()
    for text in (
        "library_name: timm",
        "pipeline_tag: image-classification",
        "model-index",
        "no image and no label was used",
        "| evaluation images (16 images) | batch statistics, batches of 8 |",
        "2 steps of 8 images",
        "noisekd recalibrate",
        "not mean private",
        "@inproceedings",
        "(curves.png)",
        "(class_balance.png)",
        record.noisekd.teacher.sha256[:16],
    ):
        assert text in card, text
    assert f"{record.evaluations[0].batch['accuracy']:.2f}" in card
    assert not re.search(r"\bnone\b|\bnull\b|\bnan\b|\{\{|\}\}|undefined", card, flags=re.IGNORECASE)
    assert not re.search(r"^#[^\n]*\n+#", card, flags=re.MULTILINE), "an empty section"
    assert str(folder.parent) not in card
    for name in ("curves.png", "class_balance.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert sum(record.class_frequencies) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("statistics", "fraction", "said"),
    [
        (0.0, 1.0, "in evaluation mode"),
        (0.5, 1.0, "all its BatchNorm layers .* 50% batch statistics"),
        (1.0, 0.5, "50% of its BatchNorm layers on the statistics of the batch"),
    ],
)
def test_a_card_has_the_statistics_of_the_teacher(folder, tmp_path, statistics, fraction, said):
    record = read_record(folder)
    record.noisekd.teacher_statistics, record.noisekd.teacher_batch_norm_fraction = statistics, fraction
    assert re.search(f"Teacher: .*{said}", write_model_card(record, tmp_path).read_text())


def test_the_hubs_parser_accepts_the_card(folder):
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    data = card.data
    assert isinstance(data, ModelCardData)
    assert [result.metric_name for result in data.eval_results] == [
        "Accuracy, running statistics", "Accuracy, batch statistics, batches of 8"
    ]  # fmt: skip
    assert all(0 <= result.metric_value <= 1 for result in data.eval_results)
    assert data.get("license") is None
    assert data.get("base_model") is None
    assert "license" not in card.content.split("---")[1]


def test_without_images_the_card_reports_agreement_on_noise_and_says_so(tmp_path):
    run(tmp_path / "student", "resnet10_cifar", eval_dataset=None)
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert "| held-out noise (8 images) | batch statistics, batches of 8 |" in card.text
    assert "not been evaluated on labelled images" in card.text
    assert card.data.eval_results is None
    assert "accuracy (%)" not in card.text


def test_what_is_not_known_is_left_out(folder):
    record = read_record(folder)
    for name in ("seconds", "images_per_second", "machine", "command", "class_frequencies"):
        setattr(record, name, None)
    record.evaluations = []
    record.noisekd.batch_norm = "batch"
    card = render_model_card(record).content
    for text in ("## Results", "(evaluated with", "Device:", "Command:", "class_balance.png", "curves.png"):
        assert text not in card
    assert not re.search(r"^#.*\n+#", card, flags=re.MULTILINE)


def test_a_card_is_made_again_from_the_folder(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").unlink()
    path = write_model_card(copy)
    assert path.read_text() == (folder / "README.md").read_text()
    write_model_card(copy, repo_id="alice/student")
    assert 'timm.create_model("hf-hub:alice/student"' in path.read_text()
    assert read_record(copy).repo_id == "alice/student"
    elsewhere = write_model_card(copy, tmp_path / "elsewhere")
    assert elsewhere.read_text() == path.read_text()


def test_students_of_other_libraries_get_code_that_fits(tmp_path, monkeypatch):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=10)
    run(tmp_path / "transformers", ResNetForImageClassification(config), input_size=[3, 32, 32])
    card = (tmp_path / "transformers" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "timm.create_model" not in card
    monkeypatch.chdir(tmp_path / "transformers")
    assert execute(card, 3)[0]["probs"].shape == (4, 10)

    run(tmp_path / "torch", TinyCNN(num_classes=10, in_chans=3))
    card = (tmp_path / "torch" / "README.md").read_text()
    assert 'load_model(model, "model.safetensors")' in card
    assert "timm.create_model" not in card


def test_other_sources_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"noisekd\.json"):
        write_model_card(tmp_path)
    (tmp_path / "noisekd.json").write_text("{}")
    with pytest.raises(ValueError, match=r"noisekd\.json"):
        write_model_card(tmp_path)
    (tmp_path / "noisekd.json").write_text("[")
    with pytest.raises(ValueError, match=r"noisekd\.json is damaged"):
        write_model_card(tmp_path)
    with pytest.raises(ValueError, match="output_dir"):
        write_model_card(read_record(folder))


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_class_balance_is_drawn_for_any_number_of_classes(tmp_path, num_classes):
    frequencies = torch.rand(num_classes).softmax(0).tolist()
    plot_class_balance(frequencies, tmp_path / "balance.png", [f"a rather long name {i}" for i in range(num_classes)])
    assert (tmp_path / "balance.png").stat().st_size > 5000


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", RELEASED)
def test_released_cards_are_those_of_the_results_files(tmp_path, name):
    results, run = RELEASED[name]
    card = write_card(ROOT / "recipes" / "results" / f"{results}.json", run, tmp_path / name)
    released = ROOT / "model_cards" / name
    assert (released / "README.md").read_text() == card.read_text(), "stale: run `make cards`"
    assert {file.name for file in released.iterdir()} == {file.name for file in card.parent.iterdir()}
    for figure in released.glob("*.png"):
        again = card.parent / figure.name
        with Image.open(figure) as one, Image.open(again) as other:
            if one.text == other.text:  # of the same version of matplotlib; others draw a little differently
                assert compare_images(str(figure), str(again), tol=20) is None, "stale: run `make cards`"
    assert ModelCard.load(released / "README.md", ignore_metadata_errors=False).data.eval_results


def test_no_other_card_is_kept():
    assert {folder.name for folder in (ROOT / "model_cards").iterdir()} == RELEASED.keys()


@pytest.mark.parametrize("training_helped", [True, False])
def test_the_card_of_a_student_initialised_from_its_teacher(tmp_path, training_helped):
    trainer = run(tmp_path, None, keep=0.5)
    record = trainer.record()
    record.noisekd.start.training_helped = training_helped
    record.model.architecture = "shrunk"
    card = str(render_model_card(record))
    share = f"{record.noisekd.start.macs:.0%}"
    assert f"# resnet10_cifar cut to {share}, distilled from" in card
    assert f"initialised from its teacher, cut down to {share[:-1]} % of the multiply-adds" in card
    assert "- Initialised from the teacher: " in card
    assert "needs the package hf_noisekd" in card
    assert ("did not help" in card) != training_helped


NASTY = "a|b `c` <img src=x onerror=alert(1)> $x^{2$ [l](javascript:1) **z**\n# y"


def test_names_from_outside_are_shown_as_they_are(folder, tmp_path):
    record = read_record(folder)
    made = record.noisekd
    made.batch_norm = "batch"
    record.title = record.evaluations[0].dataset = made.teacher.architecture = made.teacher.id = NASTY
    record.model.architecture, record.model.library = NASTY, "torch"
    record.command = "noisekd `rm` \n x"
    record.model.label_names = [NASTY] * 10
    card = write_model_card(record, tmp_path)
    body = card.read_text().split("---", 2)[2]
    for markup in ("<img", "[l](", "**z**", "\n# y", "`c`", "(https://huggingface.co/a"):
        assert markup not in body, markup
    assert {line.count("|") - line.count("\\|") for line in body.splitlines() if line.startswith("| a")} == {6}
    assert ModelCard.load(card, ignore_metadata_errors=False).data.get("base_model") is None
    compile(python_blocks(card.read_text())[0], "README.md", "exec")


@pytest.mark.parametrize("repo_id", ['a/b"); import os #', "a/b/c", "a b", "", "-a/b", "a/b\n"])
def test_the_id_of_a_card_must_be_one(folder, tmp_path, repo_id):
    record = read_record(folder)
    with pytest.raises(ValueError, match="repository"):
        write_model_card(record, tmp_path / "new", repo_id=repo_id)
    assert not (tmp_path / "new").exists()


def test_classes_that_are_numbers(tmp_path):
    run(tmp_path / "student", "resnet10_cifar")
    record = read_record(tmp_path / "student")
    text = json.loads((tmp_path / "student" / "noisekd.json").read_text())
    text["model"]["label_names"] = list(range(1, 11))
    (tmp_path / "student" / "noisekd.json").write_text(json.dumps(text))
    write_model_card(tmp_path / "student")
    for names in (list(range(1, 11)), {str(index): 1.5 for index in range(10)}):
        teacher = timm.create_model("resnet10_cifar", width=4, pretrained_cfg_overlay={"label_names": names})
        record.model.label_names = class_names(teacher, 10)
        assert record.model.label_names[9] in ("10", "1.5")
        write_model_card(record, tmp_path / "student")
