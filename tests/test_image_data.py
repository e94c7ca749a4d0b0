import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_noisekd.evaluation import collate_images
from hf_noisekd.image_data import ImageDataset, channel_statistics, load_image_datasets


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
    assert train.crop_padding
    assert not test.crop_padding
    assert not test.flip


def test_names_what_is_missing_in_a_data_set(tmp_path):
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "one" / "train.parquet")
    with pytest.raises(ValueError, match="has no test split, only train"):
        load_image_datasets(str(tmp_path / "one"))
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "two" / f"{split}.parquet")
    with pytest.raises(ValueError, match="exactly one column of type Image, found none"):
        load_image_datasets(str(tmp_path / "two"))
