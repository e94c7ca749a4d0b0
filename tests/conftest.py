"""Small models and data that several test files share. Nothing here or in the default tests reaches the network."""

import gc
import hashlib
import io
import os
from types import SimpleNamespace

from hf_noisekd.record.schema import Provenance, TeacherFacts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compare what is on the CPU; those marked `gpu` are run with their devices named, as `make test-gpu` does.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import datasets
import numpy as np
import pytest
import timm
import torch
from harness.datasets import ImageDataset, channel_statistics
from hub_server import HubServer
from hypothesis import HealthCheck, settings
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from hf_noisekd import NoiseKDConfig  # which registers the CIFAR-size models, too
from hf_noisekd.models.saving import save_model
from hf_noisekd.release.hub import _api
from hf_noisekd.shrinking import reconstruction
from hf_noisekd.training.classifier_trainer import ClassifierTrainer
from hf_noisekd.training.config import ClassifierConfig

# The same examples in each run; the models and folders of fixtures are left as they were by each.
settings.register_profile(
    "same",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("same")

reconstruction.STEPS = 10  # of each block of each cut; what more of them do is tested with them

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


class TinyCNN(nn.Module):
    """A plain module from `[B, 1, 8, 8]` to three logits, with BatchNorm in 1d and 2d, drop-out, and no `config`."""

    def __init__(self, num_classes: int = 3, in_chans: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.bn3 = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(self.drop(self.bn3(x.mean((2, 3)))))


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


class SizedStream(IterableDataset):
    def __iter__(self):
        return iter(images())

    def __len__(self):
        return 12


def made_by_noise(**facts) -> Provenance:
    """How a student was made, but for `facts`."""
    teacher = TeacherFacts(architecture="resnet", parameters=12)
    shared = {"method": "distillation with noise", "batch_norm": "batch", "teacher_batch_norm_fraction": 1.0}
    shared |= {"loss_type": "kl", "temperature": 4.0, "steps": 3, "batch_size": 8, "seed": 0, "teacher": teacher}
    return Provenance(**shared | facts)


def modes(model):
    return [
        (module.training, getattr(module, "track_running_stats", None), len(module._buffers))
        for module in model.modules()
    ]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def digest(model: nn.Module) -> str:
    """A hash of every name and bit of a model's state."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return state.hexdigest()


def write_images(folder, columns, *, test_split="test", photos=False, copies=13):
    """Write a data set of random images in the schema of one on the Hub: parquet files of JPEG images."""
    generator = np.random.default_rng(0)
    image_column, *label_columns = columns

    def image() -> dict:
        height, width = generator.integers(40, 90, 2) if photos else (32, 32)
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "JPEG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = {image_column: datasets.Image()}
    features |= {name: datasets.ClassLabel(num_classes=count) for name, count in label_columns}
    size = max(count for _, count in label_columns) * copies
    for split in ("train", test_split):
        rows = {image_column: [image() for _ in range(size)]}
        rows |= {name: [index % count for index in range(size)] for name, count in label_columns}
        data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


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


def pytest_collection_finish():
    """Keep what was imported out of garbage collections: each training makes a full one, of half a second otherwise."""
    gc.freeze()


@pytest.fixture
def tiny_cnn():
    """A `TinyCNN` whose running statistics are not those of a new model."""
    torch.manual_seed(0)
    model = TinyCNN()
    with torch.no_grad():
        for _ in range(5):
            model(1 + 2 * torch.randn(16, 1, 8, 8))
    return model.eval()


@pytest.fixture(scope="session")
def digits() -> tuple[ImageDataset, ImageDataset]:
    """scikit-learn's digits enlarged to 32x32, the first 1,297 to train on and the other 500 to test on."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.nn.functional.interpolate(torch.from_numpy(bunch.images)[:, None], size=(32, 32), mode="bilinear")
    images, labels = (images * (255 / 16)).round().to(torch.uint8), torch.from_numpy(bunch.target).long()
    mean, std = channel_statistics(images[:1297])
    shared = {"mean": mean, "std": std, "label_names": [str(digit) for digit in range(10)]}
    return ImageDataset(images[:1297], labels[:1297], **shared), ImageDataset(images[1297:], labels[1297:], **shared)


@pytest.fixture(scope="session")
def digits_teacher(digits, tmp_path_factory):
    """A ResNet trained on the digits for a few seconds, above 90 %. Tests must not change it."""
    torch.manual_seed(0)
    train, _ = digits
    model = timm.create_model(
        "resnet10_cifar", width=8, stem_stride=2, in_chans=1, pretrained_cfg_overlay=train.pretrained_cfg
    )
    args = ClassifierConfig(
        tmp_path_factory.mktemp("teacher"), max_steps=100, learning_rate=1e-2, save_strategy="no", disable_tqdm=True
    )
    ClassifierTrainer(model, args, train_dataset=train).train()
    return model.eval()


@pytest.fixture
def saved(digits_teacher, tmp_path):
    """The digits teacher's folder, as ``save_model`` writes it."""
    save_model(digits_teacher, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("cifar10"), ["img", ("label", 10)])


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory):
    """What the `cpu` preset would have trained, at a quarter of its width."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    save_model(timm.create_model("resnet10_cifar", width=8, stem_stride=2), folder)
    return folder


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(hub_server, tmp_path, monkeypatch):
    """A Hub on this machine that the client of this process talks to, with a token that can write, for `alice`."""
    hub_server.reset()
    hub_server.patch_client(monkeypatch, tmp_path / "home")
    _api.cache_clear()
    yield hub_server
    _api.cache_clear()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the Hub's client would have waited before it repeated a request; it does not wait now."""
    waits = []
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=waits.append))
    return waits
