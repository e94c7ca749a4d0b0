import io

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import DEVICES, pictures, upright_rgb
from harness.datasets import ImageDataset, channel_statistics, load_image_datasets, load_photo_datasets
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader

from hf_noisekd.batches import collate_images
from hf_noisekd.image_datasets import load_images


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (20, 3, 8, 8), generator=generator).to(torch.uint8)


def dataset(images, **kwargs):
    mean, std = channel_statistics(images)
    labels = torch.arange(len(images)) % 4
    return ImageDataset(images, labels, mean=mean, std=std, label_names=list("abcd"), **kwargs)


def test_images_come_standardised(images):
    batch = dataset(images).__getitems__(range(20))
    assert batch["pixel_values"].mean((0, 2, 3)).abs().max() < 1e-2
    assert (batch["pixel_values"].std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert batch["labels"].tolist() == [0, 1, 2, 3] * 5


def test_batches_of_a_loader_and_single_images_agree(images):
    data = dataset(images)
    batch = next(iter(DataLoader(data, batch_size=4, collate_fn=collate_images)))
    assert torch.equal(batch["pixel_values"][2], data[2]["pixel_values"])
    assert batch["labels"][2] == data[2]["labels"]


@pytest.mark.parametrize("device", DEVICES)
def test_augmentation_is_a_crop_of_the_reflected_image_or_its_mirror(images, device):
    plain = dataset(images).to(device)[3]["pixel_values"]
    padded = torch.nn.functional.pad(plain[None], (2,) * 4, mode="reflect")[0]
    crops = [padded[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    mirrored = torch.nn.functional.pad(plain.flip(-1)[None], (2,) * 4, mode="reflect")[0]
    crops += [mirrored[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    augmented = dataset(images, crop_padding=2, flip=True).to(device)
    torch.manual_seed(0)
    seen = set()
    for _ in range(200):
        image = augmented[3]["pixel_values"]
        matches = [index for index, crop in enumerate(crops) if torch.equal(crop, image)]
        assert matches
        seen.update(matches)
    assert len(seen) > 40


def test_loads_a_local_folder_in_the_hubs_schema(images, tmp_path):
    for split in ("train", "test"):
        rows = {
            "picture": [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images],
            "class": [index % 4 for index in range(20)],
        }
        features = datasets.Features({"picture": datasets.Image(), "class": datasets.ClassLabel(names=list("abcd"))})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    train, test = load_image_datasets(str(tmp_path / "data"))
    assert torch.equal(train.images, images)
    assert test.labels.tolist() == [0, 1, 2, 3] * 5
    assert train.label_names == list("abcd")
    assert train.name == test.name == "data"
    assert train.crop_padding
    assert not test.crop_padding
    assert not test.flip


def test_names_what_is_missing_in_a_data_set(tmp_path):
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "one" / "train.parquet")
    with pytest.raises(ValueError, match=r"validation .*train"):
        load_image_datasets(str(tmp_path / "one"))
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "two" / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"type Image.* none"):
        load_image_datasets(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"train\.parquet .*validation"):
        load_image_datasets(str(tmp_path / "two" / "train.parquet"))


def write_rows(folder, features, **splits):
    for split, rows in splits.items():
        data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        data.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def squares(*modes) -> list[Image.Image]:
    return [Image.new(mode, (8, 8), color=1).convert(mode) for mode in modes]


CLASSES = {"fine": datasets.ClassLabel(names=list("abcd")), "coarse": datasets.ClassLabel(names=list("xy"))}


def test_columns_can_be_named(tmp_path):
    rows = {"left": squares("RGB") * 4, "right": [Image.new("RGB", (8, 8), "red")] * 4}
    rows |= {"fine": [0, 1, 2, 3], "coarse": [0, 0, 1, 1]}
    features = {"left": datasets.Image(), "right": datasets.Image()} | CLASSES
    source = write_rows(tmp_path / "data", features, train=rows, validation=rows)
    train, test = load_image_datasets(source, image_column="right", label_column="coarse")
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.label_names == ["x", "y"]
    assert train.images[0, :, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match=r"type Image.* left, right.*image_column"):
        load_image_datasets(source, label_column="fine")
    with pytest.raises(ValueError, match=r"ClassLabel.* fine, coarse.*label_column"):
        load_image_datasets(source, image_column="left")
    model = timm.create_model("resnet10_cifar", width=4, num_classes=2)
    data = load_images(source, model, split="validation", image_column="right", label_column="coarse")
    assert [sample["labels"] for sample in data] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"'right' .*ClassLabel.* fine, coarse"):
        load_image_datasets(source, image_column="left", label_column="right")


def test_small_images_of_any_kind_become_rgb(tmp_path):
    modes = ("L", "P", "RGBA", "CMYK", "1", "LA")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("ab"))}
    images = squares(*modes)
    rows = {"image": images, "label": [0, 1] * 3}
    train, _ = load_image_datasets(write_rows(tmp_path / "data", features, train=rows, test=rows))
    assert train.images.shape == (6, 3, 8, 8)
    for index, image in enumerate(images):
        expected = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB").getpixel((0, 0))
        assert tuple(train.images[index, :, 0, 0].tolist()) == expected, image.mode


def test_small_images_that_do_not_fit_are_named(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("ab"))}
    good = {"image": squares("RGB") * 4, "label": [0, 1] * 2}
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for name, image, message in (
        ("broken", {"bytes": buffer.getvalue()[:40], "path": None}, "Image 2 of the test .*broken"),
        ("missing", None, "Image 2 of the test .*missing.* none"),
        ("larger", Image.new("RGB", (10, 8)), "Image 2 of the test .*8x10 .*8x8"),
    ):
        rows = good | {"image": [*good["image"][:2], image, good["image"][0]]}
        source = write_rows(tmp_path / name, features, train=good, test=rows)
        with pytest.raises(ValueError, match=message):
            load_image_datasets(source)
    unlabelled = write_rows(tmp_path / "unlabelled", features, train=good, test=good | {"label": [0, 1, -1, 0]})
    with pytest.raises(ValueError, match=r"Image 2 of the test .*label"):
        load_image_datasets(unlabelled)


def test_photos_are_augmented_for_training_and_preprocessed_for_the_test(tmp_path):
    for split in ("train", "validation"):
        pictures(tmp_path / "pets" / split)
    cfg = {"input_size": (3, 16, 16), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8}
    train, test = load_photo_datasets(str(tmp_path / "pets"), cfg)
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg))
    for sample, picture in zip(test, pictures(tmp_path / "again").values(), strict=True):
        assert torch.equal(sample["pixel_values"], transform(upright_rgb(picture)))
    assert train[1]["pixel_values"].shape == (3, 16, 16)
    assert not torch.equal(train[1]["pixel_values"], train[1]["pixel_values"])
    assert train.pretrained_cfg["label_names"] == ["a", "b"]
    assert test.pretrained_cfg["num_classes"] == 2
    model = timm.create_model("resnet10_cifar", width=4, num_classes=2, pretrained_cfg_overlay=train.pretrained_cfg)
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert not (tmp_path / "pets" / "test").exists()


def test_a_subset_is_part_of_a_larger_one(images):
    data = dataset(images, crop_padding=2, flip=True)
    small, large = (data.subset(count, seed=1) for count in (4, 9))
    assert len(small) == 4
    flat = [image.flatten().tolist() for image in large.images]
    assert all(image.flatten().tolist() in flat for image in small.images)
    assert torch.equal(small[0]["pixel_values"], small[0]["pixel_values"])
    assert data.subset(4, augmented=True).crop_padding == 2
    assert data.crop_padding == 2
    assert data.flip
    with pytest.raises(ValueError, match=r"num_images .*\[1, 20\]"):
        data.subset(21)
