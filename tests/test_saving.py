import copy
import json
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerImageProcessor,
    TextNetImageProcessor,
    TimmWrapperForImageClassification,
    TvpImageProcessor,
    ViTImageProcessorPil,
    pipeline,
)

from hf_noisekd import convert
from hf_noisekd.models.classifier import class_names, teacher_identity
from hf_noisekd.models.loading import load_student, load_teacher
from hf_noisekd.models.preprocessing import input_size_of, unknown_preprocessing
from hf_noisekd.models.saving import check_can_be_saved, save_model
from hf_noisekd.noise.dataset import NoiseDataset


def test_timm_reads_what_was_saved(digits_teacher, saved):
    again = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    for name, tensor in digits_teacher.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert tuple(again.pretrained_cfg["input_size"]) == (1, 32, 32)


def test_transformers_reads_what_was_saved(digits_teacher, saved):
    again = AutoModelForImageClassification.from_pretrained(saved).eval()
    pixels = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, digits_teacher(pixels), rtol=1e-5, atol=1e-5)
    assert again.config.id2label == {index: str(index) for index in range(10)}
    assert "num_classes" not in json.loads((saved / "config.json").read_text())["model_args"]
    assert AutoImageProcessor.from_pretrained(saved) is not None


def test_a_student_takes_preprocessing_and_class_names_from_its_teacher(digits, digits_teacher, tmp_path):
    names = [f"digit {index}" for index in range(10)]
    teacher = timm.create_model(
        "resnet10_cifar",
        width=4,
        in_chans=1,
        pretrained_cfg_overlay=digits[0].pretrained_cfg | {"label_names": names},
    )
    save_model(load_student("resnet10_cifar", num_classes=10, input_size=(1, 32, 32)), tmp_path, teacher_model=teacher)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == names
    assert config["pretrained_cfg"]["mean"] == list(digits[0].mean)


def test_saves_modules_that_share_a_weight(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_model(model, tmp_path)
    again = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again[1].weight, model[0].weight)


def test_class_names_are_never_guessed():
    assert class_names(timm.create_model("resnet10_cifar", width=4), 10) == [str(index) for index in range(10)]


SMALL = {"num_labels": 4, "image_size": 32}
FAMILIES = [
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=4)),
    RegNetForImageClassification(
        RegNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], groups_width=8, num_labels=4)
    ),
    MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, **SMALL)),
    EfficientNetForImageClassification(
        EfficientNetConfig(width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256, **SMALL)
    ),
]


@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: type(model).__name__)
def test_transformers_families_keep_their_logits_and_say_how_they_were_made(model, tmp_path):
    model.noisekd = {"batch_norm": "batch"}
    save_model(model.eval(), tmp_path / "model")
    again = load_teacher(tmp_path / "model").eval()
    assert type(again) is type(model)
    assert again.noisekd == {"batch_norm": "batch"}
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_weights_in_half_precision_are_read_in_float32(tmp_path):
    save_model(copy.deepcopy(FAMILIES[0]).bfloat16(), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["classifier.1.weight"].dtype == torch.bfloat16
    assert {parameter.dtype for parameter in load_teacher(tmp_path).parameters()} == {torch.float32}


def test_a_card_that_cannot_be_read_is_no_obstacle(tmp_path):
    save_model(FAMILIES[0], tmp_path)
    (tmp_path / "README.md").write_text("---\ntitle: a: b\n---\n")
    assert load_teacher(tmp_path).origin == {"license": None}


def test_transformers_weights_that_are_missing_are_not_made_up(tmp_path):
    save_model(FAMILIES[0], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier\.1\.weight"):
        load_teacher(tmp_path)


def test_a_wrapped_timm_model_is_saved_as_timms(saved, digits_teacher, tmp_path):
    wrapped = AutoModelForImageClassification.from_pretrained(saved)
    assert isinstance(wrapped, TimmWrapperForImageClassification)
    save_model(wrapped, tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    assert teacher_identity(again)["sha256"] == teacher_identity(digits_teacher)["sha256"]
    assert again.pretrained_cfg["mean"] == list(digits_teacher.pretrained_cfg["mean"])


def test_a_transformers_student_gets_the_preprocessing_of_a_timm_teacher(tmp_path):
    cfg = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8}
    teacher = timm.create_model("resnet10_cifar", width=4, num_classes=4, pretrained_cfg_overlay=cfg)
    save_model(FAMILIES[0], tmp_path, teacher_model=teacher)
    image = Image.fromarray(torch.randint(0, 256, (50, 60, 3), dtype=torch.uint8).numpy())
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    expected = timm.data.create_transform(**timm.data.resolve_data_config({}, model=teacher))(image)
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().mean() < 0.02  # they resize by different libraries


def photos(*sizes):
    generator = np.random.default_rng(0)
    for height, width in sizes:
        yield Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), 3)


def teacher_with(processor, folder):
    """A transformers teacher beside which an image processor lies."""
    save_model(FAMILIES[0], folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return load_teacher(folder)


OTHERS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
RAW = {"do_normalize": False}
SIZE = {"height": 32, "width": 32}
SHORTEST = {"size": {"shortest_edge": 40}, "crop_size": SIZE}


@pytest.mark.parametrize(
    ("processor", "noise"),
    [
        (BitImageProcessor(**SHORTEST, **OTHERS, resample=2), None),
        (BitImageProcessor(**SHORTEST, **RAW), (0.5, 0.25)),
        (BitImageProcessor(**SHORTEST, **RAW, rescale_factor=1 / 127.5), (1, 0.5)),
        (BitImageProcessor(**SHORTEST, **RAW, do_rescale=False), (127.5, 63.75)),
        (BitImageProcessor(**SHORTEST, do_rescale=False, image_mean=[120] * 3, image_std=[60] * 3), (0, 1)),
        (BitImageProcessor(size={"height": 36, "width": 72}, crop_size={"height": 32, "width": 64}), (0, 1)),
        (EfficientNetImageProcessor(size=SIZE, include_top=True), (0, 1)),
        (EfficientNetImageProcessor(size=SIZE, include_top=False, image_std=[0.25] * 3), (0, 1)),
        (EfficientNetImageProcessor(size=SIZE, **RAW, rescale_offset=True, rescale_factor=1 / 127.5), None),
        (ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8), (0, 1)),
        (LevitImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE), (0, 1)),
        (ConvNextImageProcessor(size={"shortest_edge": 384}), (0, 1)),
        (PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, crop_size=SIZE), (0, 1)),
        (MobileNetV2ImageProcessor(**SHORTEST), (0, 1)),
        (MobileViTImageProcessor(**SHORTEST, **OTHERS, do_normalize=True, do_flip_channel_order=False), (0.5, 0.25)),
        (SegformerImageProcessor(size=SIZE, do_center_crop=True, crop_size={"height": 24, "width": 24}), (0, 1)),
        (ViTImageProcessorPil(size=SIZE), (0, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_timm_student_gets_the_preprocessing_of_a_transformers_teacher(processor, noise, tmp_path):
    teacher = teacher_with(processor, tmp_path / "teacher")
    assert unknown_preprocessing(teacher) == ""
    student = load_student("resnet10_cifar", num_classes=4, input_size=(3, 32, 32))
    save_model(student, tmp_path / "student", teacher_model=teacher)
    again = load_teacher(tmp_path / "student")
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=again))
    # Sizes for which both libraries cut out the same middle: it is a pixel to the side where what is left over is odd.
    for image in photos((50, 75), (90, 40), (64, 64), (33, 97), (150, 151)):
        expected = processor(image, return_tensors="pt")["pixel_values"][0].float()
        found = transform(image)
        assert found.shape == expected.shape
        assert (found - expected).abs().mean() < 0.01 * expected.std(), image.size
    if noise is not None:
        for model in (teacher, again):
            dataset = NoiseDataset.for_model(model, input_size=(3, 32, 32))
            assert (dataset.mean, dataset.std) == pytest.approx(noise, rel=1e-4)


@pytest.mark.parametrize(
    ("processor", "scale_is_known"),
    [
        (None, False),
        (BitImageProcessor(do_resize=False, do_center_crop=False, **OTHERS), True),
        (BitImageProcessor(do_resize=False, crop_size=SIZE, **OTHERS), True),
        (BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 64}, **OTHERS), True),
        (BitImageProcessor(size={"shortest_edge": 40, "longest_edge": 64}, crop_size=SIZE, **OTHERS), True),
        (BitImageProcessor(size={"shortest_edge": 24}, crop_size=SIZE, **OTHERS), True),
        (BitImageProcessor(**SHORTEST, **OTHERS, do_pad=True, pad_size={"height": 50, "width": 50}), True),
        (TextNetImageProcessor(**SHORTEST, **OTHERS, do_center_crop=True), True),
        (TvpImageProcessor(**OTHERS), False),
        (MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size=SIZE, do_flip_channel_order=True), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_said_of_preprocessing_is_said_aloud(processor, scale_is_known, tmp_path, caplog):
    teacher = teacher_with(processor, tmp_path / "teacher")
    student = load_student("resnet10_cifar", num_classes=4, input_size=(3, 32, 32))
    check_can_be_saved(student, (3, 32, 32), teacher_model=teacher)
    assert "pretrained_cfg" in caplog.text
    save_model(student, tmp_path / "student", teacher_model=teacher)
    cfg = json.loads((tmp_path / "student" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == (tuple(OTHERS.values()) if scale_is_known else (None, None))
    assert cfg["crop_mode"] is cfg["interpolation"] is None
    again = load_teacher(tmp_path / "student")
    assert bool(unknown_preprocessing(again)) != scale_is_known
    save_model(again, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["pretrained_cfg"]["mean"] == cfg["mean"]
    timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    AutoModelForImageClassification.from_pretrained(tmp_path / "student")


def test_a_plain_teacher_hands_on_what_its_cfg_says(tmp_path, caplog):
    teacher = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    student = load_student("resnet10_cifar", num_classes=4, input_size=(3, 32, 32))
    given = {"mean": OTHERS["image_mean"], "std": OTHERS["image_std"]}
    for cfg, mean in (({}, None), ({"input_size": (3, 32, 32)}, None), (given, given["mean"])):
        caplog.clear()
        teacher.pretrained_cfg = cfg
        check_can_be_saved(student, (3, 32, 32), teacher_model=teacher)
        assert bool(caplog.records) == (mean is None)
        save_model(student, tmp_path / "student", teacher_model=teacher)
        found = json.loads((tmp_path / "student" / "config.json").read_text())["pretrained_cfg"]["mean"]
        assert found == mean
        save_model(copy.deepcopy(FAMILIES[0]), tmp_path / "other", teacher_model=teacher)


@pytest.mark.parametrize(
    "cfg",
    [
        {"input_size": (3, 32, 64), "crop_pct": 1.0},
        {"input_size": (3, 64, 32), "crop_pct": 0.8, "interpolation": "bilinear"},
        {"input_size": (3, 32, 32), "crop_pct": 0.8, "crop_mode": "border"},
        {"input_size": (3, 32, 48), "crop_pct": 0.9, "crop_mode": "squash"},
        {"input_size": (3, 32, 32), "crop_pct": 0.875},
    ],
    ids=str,
)
def test_a_transformers_student_crops_as_its_timm_teacher(cfg, tmp_path):
    teacher = timm.create_model("resnet10_cifar", width=4, num_classes=4, pretrained_cfg_overlay=cfg)
    save_model(copy.deepcopy(FAMILIES[0]), tmp_path / "student", teacher_model=teacher)
    save_model(load_teacher(tmp_path / "student"), tmp_path / "again")  # as after a recalibration
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=teacher))
    for folder in ("student", "again"):
        processor = AutoImageProcessor.from_pretrained(tmp_path / folder)
        for image in (*photos((50, 60), (90, 40), (64, 64)), Image.new("RGB", (70, 70), "white")):
            assert torch.equal(processor(image, return_tensors="pt")["pixel_values"][0], transform(image))
        assert isinstance(load_teacher(tmp_path / folder), ResNetForImageClassification)
    classify = pipeline("image-classification", model=str(tmp_path / "student"))
    assert len(classify(image)) == 4


def by_hand(change, model="resnet10_cifar"):
    """A model that somebody changed after it was built."""
    model = timm.create_model(model, num_classes=4) if isinstance(model, str) else copy.deepcopy(model)
    change(model)
    return model


@pytest.mark.parametrize(
    "model",
    [
        by_hand(lambda model: setattr(model, "fc", torch.nn.Sequential(torch.nn.Dropout(), model.fc))),
        by_hand(lambda model: setattr(model, "act1", torch.nn.SiLU())),
        by_hand(lambda model: setattr(model.conv1, "padding_mode", "circular")),
        by_hand(lambda model: model.layer1.append(copy.deepcopy(model.layer1[0]))),
        by_hand(lambda model: setattr(model, "classifier", torch.nn.Sequential(model.classifier)), FAMILIES[0]),
        by_hand(lambda model: setattr(model.resnet, "pooler", torch.nn.AdaptiveMaxPool2d(1)), FAMILIES[0]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_that_was_changed_by_hand_is_found_before_it_is_trained(model):
    with pytest.raises(ValueError, match="by hand"):
        check_can_be_saved(model, (3, 32, 32))


@pytest.mark.parametrize(
    "model",
    [
        *FAMILIES,
        timm.create_model("resnet10_cifar", width=4, drop_rate=0.5, act_layer="silu"),
        timm.create_model("efficientnet_lite0", num_classes=4, drop_path_rate=0.2),
        torch.nn.Linear(1, 1),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_that_can_be_loaded_again_costs_no_random_number(model):
    torch.manual_seed(0)
    check_can_be_saved(model, (3, 32, 32))
    found = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(2))


def test_a_student_claims_nothing_of_published_weights(digits_teacher, tmp_path):
    save_model(timm.create_model("resnet18", in_chans=1, num_classes=10), tmp_path, teacher_model=digits_teacher)
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert not {"license", "tag", "origin_url", "test_input_size", "hf_hub_id"} & set(cfg)


def test_files_can_be_read_by_others(saved):
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in saved.iterdir()} == {0o666 & ~umask}


def test_a_transformers_teacher_that_declares_no_size_gives_its_processor_on(tmp_path):
    save_model(FAMILIES[0], tmp_path / "teacher")
    BitImageProcessor(size={"shortest_edge": 40}, crop_size=32, image_mean=[0.1] * 3).save_pretrained(
        tmp_path / "teacher"
    )
    save_model(FAMILIES[1], tmp_path / "student", teacher_model=load_teacher(tmp_path / "teacher"))
    save_model(load_teacher(tmp_path / "student"), tmp_path / "again")  # as after a recalibration
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "again").image_mean) == [0.1] * 3


def test_the_input_size_is_known_from_what_a_student_was_trained_with(tmp_path):
    student = copy.deepcopy(FAMILIES[0])
    with pytest.raises(ValueError, match="input_size"):
        input_size_of(student)
    assert input_size_of(student, [3, 8, 8]) == (3, 8, 8)
    student.noisekd = {"noise": {"input_size": [3, 24, 32]}}
    save_model(student, tmp_path)
    assert input_size_of(load_teacher(tmp_path)) == (3, 24, 32)
    BitImageProcessor(**SHORTEST).save_pretrained(tmp_path)
    assert input_size_of(load_teacher(tmp_path)) == (3, 32, 32)


def test_two_input_sizes_are_both_told(tmp_path, caplog):
    config = ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1], patch_size=2, image_size=24)
    save_model(ConvNextForImageClassification(config), tmp_path)
    BitImageProcessor(**SHORTEST).save_pretrained(tmp_path)
    assert input_size_of(load_teacher(tmp_path)) == (3, 24, 24)
    assert "3x24x24" in caplog.text
    assert "3x32x32" in caplog.text


def test_a_folder_keeps_the_licence_of_what_it_was_converted_from(saved, tmp_path):
    (saved / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    convert(saved, tmp_path / "new")
    assert load_teacher(tmp_path / "new").origin["license"] == "cc-by-nc-4.0"
