import io
import pickle

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import TinyCNN
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_noisekd import evaluate
from hf_noisekd.images import (
    ImageDataset,
    channel_statistics,
    load_image_datasets,
    load_images,
    load_photo_datasets,
)
from hf_noisekd.models.hub import save_model
from hf_noisekd.training.evaluation import collate_images


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


def test_augmentation_is_a_crop_of_the_reflected_image_or_its_mirror(images):
    plain = dataset(images)[3]["pixel_values"]
    padded = torch.nn.functional.pad(plain[None], (2,) * 4, mode="reflect")[0]
    crops = [padded[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    mirrored = torch.nn.functional.pad(plain.flip(-1)[None], (2,) * 4, mode="reflect")[0]
    crops += [mirrored[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    augmented = dataset(images, crop_padding=2, flip=True)
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
    with pytest.raises(ValueError, match="has no test and no validation split, only train"):
        load_image_datasets(str(tmp_path / "one"))
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "two" / f"{split}.parquet")
    with pytest.raises(ValueError, match="exactly one column of type Image, found none"):
        load_image_datasets(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"train\.parquet has no test and no validation split"):
        load_image_datasets(str(tmp_path / "two" / "train.parquet"))


def pictures(folder) -> dict[str, Image.Image]:
    """Write a picture of each kind, 40x30 pixels, to `folder/<class>/`; return them as Pillow opens them."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4)).astype(np.uint8)
    rgb = Image.fromarray(pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    kinds = {
        "rgb.png": (rgb, {}),
        "rgba.png": (Image.fromarray(pixels), {}),
        "gray.png": (rgb.convert("L"), {}),
        "palette.png": (rgb.quantize(16), {"transparency": bytes([0, 128] + [255] * 14)}),
        "cmyk.jpg": (Image.fromarray(pixels, "CMYK"), {}),
        "turned.jpg": (rgb, {"exif": exif}),
    }
    for index, (name, (image, options)) in enumerate(sorted(kinds.items())):
        path = folder / "ab"[index % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    return {path.name: Image.open(path) for path in sorted(folder.glob("*/*"))}


def upright_rgb(picture: Image.Image) -> Image.Image:
    picture = picture.transpose(Image.Transpose.ROTATE_270) if picture.getexif().get(0x0112) == 6 else picture
    return picture.convert("RGBA").convert("RGB") if picture.mode == "P" else picture.convert("RGB")


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
    with pytest.raises(ValueError, match=r"of type Image, found left, right: name the one to use \(image_column\)"):
        load_image_datasets(source, label_column="fine")
    with pytest.raises(ValueError, match=r"ClassLabel, found fine, coarse: name the one to use \(label_column\)"):
        load_image_datasets(source, image_column="left")
    model = timm.create_model("resnet10_cifar", width=4, num_classes=2)
    data = load_images(source, model, split="validation", image_column="right", label_column="coarse")
    assert [sample["labels"] for sample in data] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"has no column 'right' of type ClassLabel; found \['fine', 'coarse'\]"):
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
        ("broken", {"bytes": buffer.getvalue()[:40], "path": None}, "Image 2 of the test split of .* cannot be read"),
        ("missing", None, "Image 2 of the test split of .* cannot be read: there is none"),
        ("larger", Image.new("RGB", (10, 8)), "Image 2 of the test split of .* has 8x10 pixels and the first 8x8"),
    ):
        rows = good | {"image": [*good["image"][:2], image, good["image"][0]]}
        source = write_rows(tmp_path / name, features, train=good, test=rows)
        with pytest.raises(ValueError, match=message):
            load_image_datasets(source)
    unlabelled = write_rows(tmp_path / "unlabelled", features, train=good, test=good | {"label": [0, 1, -1, 0]})
    with pytest.raises(ValueError, match=r"Image 2 of the test split of .* has no label"):
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
    with pytest.raises(ValueError, match=r"num_images must lie in \[1, 20\]"):
        data.subset(21)


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
    with pytest.raises(ValueError, match="has 2 classes, and the model only 1:"):
        load_images(str(tmp_path / "pets"), timm.create_model("resnet10_cifar", width=4, num_classes=1))


def test_images_for_a_transformers_model_come_from_its_image_processor(numbered, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2, layer_type="basic")
    with pytest.raises(ValueError, match="ResNetForImageClassification does not say how it wants its images"):
        load_images(numbered(), ResNetForImageClassification(config))
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    model = ResNetForImageClassification.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="save an image processor"):
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
    with pytest.raises(ValueError, match=r"Image 5 of pets cannot be read: .*truncated"):
        data[5]
    with pytest.raises(ValueError, match="Image 5 of pets cannot be read"):
        evaluate(model, data, num_workers=1)
    # The place counts in the whole data set, not in the subset.
    part = load_images(str(tmp_path / "pets"), model, num_images=5, seed=3)
    assert part.indices[-1] == 5
    with pytest.raises(ValueError, match="Image 5 of pets"):
        part[4]
    sixteen_bits = [Image.fromarray(np.full((16, 16), 60000, dtype=np.uint16)), None]
    data = load_images(numbered(labels=(0, 1), images=sixteen_bits), model)
    with pytest.raises(ValueError, match="Image 0 of numbered cannot be read: its mode is I;16"):
        data[0]
    with pytest.raises(ValueError, match="Image 1 of numbered cannot be read: there is none"):
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
        with pytest.raises(ValueError, match=rf"num_images must lie in \[1, 10\].*got {wrong}"):
            load_images(source, model, num_images=wrong)


def test_images_go_through_workers_into_an_evaluation(model, numbered):
    data = load_images(numbered(), model)
    assert evaluate(model, data, batch_size=4, num_workers=2) == evaluate(model, data, batch_size=4)
    # Where workers are started by "spawn", the data set is pickled.
    for sample, expected in zip(pickle.loads(pickle.dumps(data)), data, strict=True):
        assert torch.equal(sample["pixel_values"], expected["pixel_values"])


def test_says_why_images_cannot_be_loaded(model, numbered, tmp_path):
    source = numbered(split="validation")
    with pytest.raises(ValueError, match="has no test split, only validation"):
        load_images(source, model)
    with pytest.raises(ValueError, match=r"data set .*nowhere' cannot be loaded"):
        load_images(str(tmp_path / "nowhere"), model)
    with pytest.raises(ValueError, match="has 4 classes, and the model only 3"):
        load_images(numbered("four", names="abcd"), model)
    with pytest.raises(ValueError, match=r"Image 1 of the test split of .* has no label"):
        load_images(numbered("unlabelled", labels=(0, -1) * 5), model)
    with pytest.raises(ValueError, match="TinyCNN does not say how it wants its images"):
        load_images(source, TinyCNN())
    with pytest.raises(ValueError, match=r"takes 1 channel and its pretrained_cfg gives mean for 3.*overlay"):
        load_images(source, timm.create_model("resnet10_cifar", width=4, in_chans=1))
    cfg = {"mean": (0.5,) * 4, "std": (0.5,) * 4}
    four_channels = timm.create_model("resnet10_cifar", width=4, in_chans=4, pretrained_cfg_overlay=cfg)
    with pytest.raises(ValueError, match="takes 4 channels; images can be read for 1"):
        load_images(source, four_channels)
