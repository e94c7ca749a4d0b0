import json
import pickle

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import TinyCNN, pictures, upright_rgb
from PIL import Image
from timm.data import create_transform, resolve_data_config
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_noisekd import evaluate
from hf_noisekd.image_datasets import load_images
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.models.saving import save_model

BLACK = Image.new("RGB", (16, 16))


@pytest.fixture
def model():
    cfg = {"input_size": (3, 16, 16), "crop_pct": 0.8, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)}
    return timm.create_model("resnet10_cifar", width=4, num_classes=3, pretrained_cfg_overlay=cfg)


@pytest.fixture
def numbered(tmp_path):
    """A parquet folder of ten black images in two classes, numbered by their brightness."""

    def write(folder="numbered", split="test", labels=(0, 1) * 5, names="ab", images=None):
        images = images or [Image.new("RGB", (16, 16), (index,) * 3) for index in range(10)]
        features = datasets.Features({"picture": datasets.Image(), "class": datasets.ClassLabel(names=list(names))})
        data = datasets.Dataset.from_dict({"picture": images, "class": list(labels)}, features=features)
        data.to_parquet(tmp_path / folder / f"{split}.parquet")
        return str(tmp_path / folder)

    return write


def brightness(data, model) -> list[int]:
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return [round((255 * (sample["pixel_values"] * std + mean)).mean().item()) for sample in data]


@pytest.mark.filterwarnings("error:Palette images")
@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_images_are_those_of_timms_own_evaluation(kind, model, tmp_path):
    found = pictures(tmp_path / "pets" / "test")
    source = tmp_path / "pets"
    if kind == "parquet":
        split = datasets.load_dataset(str(source), split="test")
        source = tmp_path / "pets.parquet"
        split.to_parquet(source)
    data = load_images(str(source), model)
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    assert len(data) == len(found) == 6
    for sample, (name, picture) in zip(data, found.items(), strict=True):
        assert torch.equal(sample["pixel_values"], transform(upright_rgb(picture))), name
        assert "ab"[sample["labels"]] == ("a" if name in ("cmyk.jpg", "palette.png", "rgba.png") else "b")
    assert data.name == source.name


def test_images_are_gray_for_a_model_of_one_channel(tmp_path):
    found = pictures(tmp_path / "pets" / "test")
    cfg = {"input_size": (1, 16, 16), "mean": (0.4,), "std": (0.2,), "num_classes": 2}
    model = timm.create_model("resnet10_cifar", width=4, in_chans=1, pretrained_cfg_overlay=cfg)
    data = load_images(str(tmp_path / "pets"), model)
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    for sample, (name, picture) in zip(data, found.items(), strict=True):
        assert torch.equal(sample["pixel_values"], transform(upright_rgb(picture).convert("L"))), name


def test_images_for_a_timm_model_in_transformers(tmp_path):
    pictures(tmp_path / "pets" / "test")
    wrapper = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="resnet10_cifar", model_args={"width": 4}, num_labels=2)
    )
    bare = timm.create_model("resnet10_cifar", width=4, num_classes=2)
    data, expected = (load_images(str(tmp_path / "pets"), each) for each in (wrapper, bare))
    assert torch.equal(data[0]["pixel_values"], expected[0]["pixel_values"])
    # A checkpoint's own preprocessing, which the timm model inside does not know.
    cfg = {"input_size": (1, 16, 16), "mean": (0.4,), "std": (0.2,), "num_classes": 2}
    bare = timm.create_model("resnet10_cifar", width=4, in_chans=1, pretrained_cfg_overlay=cfg)
    save_model(bare, tmp_path / "model")
    wrapper = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    data, expected = (load_images(str(tmp_path / "pets"), each) for each in (wrapper, bare))
    assert torch.equal(data[0]["pixel_values"], expected[0]["pixel_values"])
    with pytest.raises(ValueError, match=r"2 classes.* 1\b"):
        load_images(str(tmp_path / "pets"), timm.create_model("resnet10_cifar", width=4, num_classes=1))


def test_images_for_a_transformers_model_come_from_its_image_processor(numbered, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2, layer_type="basic")
    with pytest.raises(ValueError, match=r"ResNetForImageClassification .*pretrained_cfg"):
        load_images(numbered(), ResNetForImageClassification(config))
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    model = ResNetForImageClassification.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="image processor"):
        load_images(numbered(), model)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    size = {"height": 8, "width": 8}
    BitImageProcessor(size=size, crop_size=size, image_mean=mean, image_std=std).save_pretrained(tmp_path / "model")
    data = load_images(numbered(), model)
    expected = (torch.full((3, 8, 8), 7 / 255) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(data[7]["pixel_values"], expected, atol=1e-6)
    assert evaluate(model, data, batch_size=4)["running"]["accuracy"] >= 0


def test_a_broken_image_is_named_by_its_place_in_the_data_set(model, numbered, tmp_path):
    pictures(tmp_path / "pets" / "test")
    path = tmp_path / "pets" / "test" / "b" / "turned.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = load_images(str(tmp_path / "pets"), model)
    assert data[4]["labels"] == 1
    with pytest.raises(ValueError, match="Image 5 of pets"):
        data[5]
    with pytest.raises(ValueError, match="Image 5 of pets"):
        evaluate(model, data, num_workers=1)
    # The place counts in the whole data set, not in the subset.
    part = load_images(str(tmp_path / "pets"), model, num_images=5, seed=3)
    assert part.indices[-1] == 5
    with pytest.raises(ValueError, match="Image 5 of pets"):
        part[4]
    sixteen_bits = [Image.fromarray(np.full((16, 16), 60000, dtype=np.uint16)), None]
    data = load_images(numbered(labels=(0, 1), images=sixteen_bits), model)
    with pytest.raises(ValueError, match=r"Image 0 of numbered .*I;16"):
        data[0]
    with pytest.raises(ValueError, match=r"Image 1 of numbered .*none"):
        data[1]


def test_serves_a_random_part_in_order(model, numbered):
    source = numbered()
    assert brightness(load_images(source, model), model) == list(range(10))
    part = load_images(source, model, num_images=4, seed=1)
    drawn = brightness(part, model)
    assert drawn == sorted(set(drawn)) == list(part.indices)
    assert [sample["labels"] for sample in part] == [index % 2 for index in drawn]
    assert drawn == brightness(load_images(source, model, num_images=4, seed=1), model)
    assert drawn != brightness(load_images(source, model, num_images=4, seed=2), model)
    assert set(drawn) < set(brightness(load_images(source, model, num_images=7, seed=1), model))
    for wrong in (0, 11):
        with pytest.raises(ValueError, match=rf"num_images .*\[1, 10\].* {wrong}\b"):
            load_images(source, model, num_images=wrong)


def test_images_go_through_workers_into_an_evaluation(model, numbered):
    data = load_images(numbered(), model)
    assert evaluate(model, data, batch_size=4, num_workers=2) == evaluate(model, data, batch_size=4)
    # Where workers are started by "spawn", the data set is pickled.
    for sample, expected in zip(pickle.loads(pickle.dumps(data)), data, strict=True):
        assert torch.equal(sample["pixel_values"], expected["pixel_values"])


def named(*names: str):
    cfg = {"input_size": (3, 16, 16), "label_names": names}
    return timm.create_model("resnet10_cifar", width=4, num_classes=len(names), pretrained_cfg_overlay=cfg)


def test_classes_are_joined_by_name(numbered, caplog, tmp_path):
    twelve = [str(index) for index in range(12)]
    folders = numbered("text order", labels=(0, 1, 2, 3, 4, 11) * 2, names=sorted(twelve), images=[BLACK] * 12)
    for model in (named(*twelve), timm.create_model("resnet10_cifar", width=4, num_classes=12)):
        assert load_images(folders, model).labels == [0, 1, 10, 11, 2, 9] * 2
    assert load_images(numbered("subset"), named("x", "b", "y", "a")).labels == [3, 1] * 5
    save_model(named("x", "b", "y", "a"), tmp_path / "model")
    wrapper = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert load_images(numbered("subset"), wrapper).labels == [3, 1] * 5
    assert not caplog.records


def test_classes_are_joined_by_their_descriptions_if_not_by_name(numbered, caplog, tmp_path):
    """As in timm's files of ImageNet: WordNet's numbers are the names. A mapping of both for the names is read, too."""
    teacher, described = named("n1", "n2", "n3", "n4"), {"n1": "x", "n2": "b", "n3": "y", "n4": "a"}
    teacher.pretrained_cfg["label_descriptions"] = described
    save_model(timm.create_model("resnet10_cifar", width=4, num_classes=4), tmp_path, teacher_model=teacher)
    student, path = load_teacher(tmp_path), tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"label_names": described, "label_descriptions": None}))
    for model in (teacher, student, load_teacher(tmp_path)):
        assert load_images(numbered("numbers", names=("n4", "n2")), model).labels == [3, 1] * 5
        assert load_images(numbered("descriptions"), model).labels == [3, 1] * 5
    assert not caplog.records
    teacher.pretrained_cfg["label_descriptions"] = described | {"n1": "a"}  # which of the two is not known
    assert load_images(numbered(), teacher).labels == [0, 1] * 5
    assert "same order" in caplog.text


def test_classes_that_the_model_does_not_know(numbered, caplog):
    with pytest.raises(ValueError, match="'b'"):
        load_images(numbered(), named("a", "c"))
    with pytest.raises(ValueError, match="'c'"):
        load_images(numbered("more", names="abc"), named("a", "b"))
    with pytest.raises(ValueError, match=r"'a'.* two"):
        load_images(numbered(), named("a", "b", "a"))
    assert load_images(numbered("same", names="ab"), named("a", "b")).labels == [0, 1] * 5
    assert not caplog.records
    assert load_images(numbered(), named("cat", "dog", "hen")).labels == [0, 1] * 5
    assert "2 classes" in caplog.text
    assert "'a'" in caplog.text


def test_says_why_images_cannot_be_loaded(model, numbered, tmp_path):
    source = numbered(split="validation")
    with pytest.raises(ValueError, match=r"test .*validation"):
        load_images(source, model)
    with pytest.raises(ValueError, match="nowhere'"):
        load_images(str(tmp_path / "nowhere"), model)
    with pytest.raises(ValueError, match=r"4 classes.* 3\b"):
        load_images(numbered("four", names="abcd"), model)
    with pytest.raises(ValueError, match=r"Image 1 of the test .*label"):
        load_images(numbered("unlabelled", labels=(0, -1) * 5), model)
    with pytest.raises(ValueError, match=r"TinyCNN .*pretrained_cfg"):
        load_images(source, TinyCNN())
    with pytest.raises(ValueError, match=r"channels is 1.*pretrained_cfg_overlay"):
        load_images(source, timm.create_model("resnet10_cifar", width=4, in_chans=1))
    cfg = {"mean": (0.5,) * 4, "std": (0.5,) * 4}
    four_channels = timm.create_model("resnet10_cifar", width=4, in_chans=4, pretrained_cfg_overlay=cfg)
    with pytest.raises(ValueError, match="4 input channels"):
        load_images(source, four_channels)


def test_files_that_a_folder_does_not_serve_are_counted(model, tmp_path, caplog, monkeypatch):
    for name in ("car/0", "car/1", "train/0", "bus/0", "bus/.hidden/0"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        BLACK.save(tmp_path / "classes" / f"{name}.png")
    assert len(load_images(tmp_path / "classes", model, split="train", labels=False)) == 1
    assert "serves 1 of its 4 image files" in caplog.text
    caplog.clear()
    (tmp_path / "classes" / "train").rename(tmp_path / "classes" / "lorry")
    monkeypatch.chdir(tmp_path / "classes")
    assert len(load_images(".", model, split="train", labels=False)) == 4
    assert not caplog.text
