import copy
import json
import pickle
import re

import pytest
import timm
import torch
from conftest import snapshot
from torch import nn
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer, evaluate, recalibrate_batch_norm, shrink
from hf_noisekd.batches import PixelsDataset
from hf_noisekd.calibration.given_images import given_images
from hf_noisekd.cli.distill import _quality_text
from hf_noisekd.models.cost import count_macs
from hf_noisekd.models.loading import load_student, load_teacher
from hf_noisekd.models.preprocessing import input_size_of, preprocessing_of
from hf_noisekd.models.saving import save_model
from hf_noisekd.record.schema import Provenance
from hf_noisekd.training.plan import initial_student
from hf_noisekd.training.teacher import Teacher
from hf_noisekd.workflows.inputs import check_same_kind

KIN = {"width": 4, "stem_stride": 2}  # of the digits teacher, half as wide


def config(folder, **options):
    shared = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "disable_tqdm": True}
    return NoiseKDConfig(str(folder), **shared | {"num_calibration_images": 0} | options)


def start(teacher, tmp_path, student="resnet10_cifar", **options):
    return initial_student(student, Teacher(teacher), config(tmp_path, **options))


def test_a_student_given_by_name_begins_as_its_teacher(digits_teacher, tmp_path):
    model, begun = start(digits_teacher, tmp_path, model_init_kwargs=KIN)
    assert begun.facts.from_teacher == begun.facts.tensors > begun.facts.cut > 0
    assert 0.2 < begun.facts.macs < 0.4
    assert all(torch.equal(tensor, begun.state[name]) for name, tensor in model.state_dict().items())
    rows = digits_teacher.conv1.weight.flatten(1)
    assert all((row == rows).all(1).any() for row in model.conv1.weight.flatten(1))


def test_a_student_that_begins_at_random_and_one_that_is_trained_already(digits_teacher, tmp_path):
    assert start(digits_teacher, tmp_path, model_init_kwargs=KIN, init_student="random")[1] is None
    assert start(digits_teacher, tmp_path, student="mobilenetv2_050")[1] is None
    trained = timm.create_model("resnet10_cifar", in_chans=1, **KIN)
    before = snapshot(trained)
    for source in (trained, tmp_path / "trained"):
        save_model(trained, tmp_path / "trained")
        model, begun = start(digits_teacher, tmp_path, student=source)
        assert begun is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("test_resnet", {"act_layer": "silu", "drop_path_rate": 0.5}),
        ("test_resnet", {"channels": [40, 56, 56, 104], "act_layer": "silu", "output_stride": 16}),
        ("test_vit", {"num_heads": 4, "act_layer": "relu"}),
        ("resnet10_cifar", {"stem_stride": 2}),
    ],
)
def test_a_student_given_by_name_computes_as_its_teacher_does(name, model_args, tmp_path, caplog):
    torch.manual_seed(0)
    teacher = load_student(name, num_classes=3, model_args=model_args).eval()
    save_model(teacher, tmp_path / "teacher")
    model, begun = start(load_teacher(tmp_path / "teacher").eval(), tmp_path, name)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert bool(begun.facts.cut) == ("channels" in model_args)
    if not begun.facts.cut:
        assert begun.facts.from_teacher == begun.facts.tensors
        save_model(model, tmp_path / "student", teacher_model=teacher)
        pixels = torch.randn(2, *input_size_of(teacher))
        for each in (model, load_teacher(tmp_path / "student")):
            torch.testing.assert_close(each.eval()(pixels), teacher(pixels))
    assert model.model_args.items() >= {key: model_args[key] for key in ("act_layer",) if key in model_args}.items()
    assert not {"channels", "drop_path_rate"} & model.model_args.keys()


def test_arguments_of_the_teacher_are_those_of_a_student_of_its_kind_where_nobody_gave_others(tmp_path, caplog):
    teacher = timm.create_model("test_resnet", num_classes=3, act_layer="silu").eval()
    model, _ = start(teacher, tmp_path, "test_resnet", model_init_kwargs={"act_layer": "relu"})
    assert isinstance(model.layer1[0].act1, nn.ReLU)
    assert "other logits" in caplog.text
    model, _ = start(teacher, tmp_path, "test_resnet", init_student="random")
    assert isinstance(model.layer1[0].act1, nn.ReLU)
    model, begun = start(teacher, tmp_path, "resnet26")  # of that class, and otherwise another network
    assert begun is None
    assert isinstance(model.layer1[0].act1, nn.ReLU)


def test_without_a_student_the_teacher_is_cut(digits_teacher, tmp_path):
    model, begun = start(digits_teacher, tmp_path, student=None, keep=0.5)
    size = (1, 32, 32)
    assert count_macs(model, size)[""] <= 0.5 * count_macs(digits_teacher, size)[""]
    assert begun.facts.from_teacher == begun.facts.tensors


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (None, {}, "There is no student"),
        (None, {"keep": 0.5, "model_init_kwargs": {"width": 4}}, "model_init_kwargs"),
        ("resnet10_cifar", {"keep": 0.5}, "There is a student, and keep to cut the teacher"),
        ("resnet10_cifar", {"model_init_kwargs": {"wdith": 4}}, "'resnet10_cifar' .*wdith=4"),
        (nn.Linear(2, 2), {"model_init_kwargs": {"width": 4}}, "already built"),
    ],
)
def test_what_does_not_go_together(digits_teacher, tmp_path, student, options, message):
    with pytest.raises(ValueError, match=message):
        start(digits_teacher, tmp_path, student, **options)


def test_the_learning_rate_follows_the_start(digits_teacher, tmp_path):
    rates = [
        NoiseKDTrainer(
            "resnet10_cifar", digits_teacher, config(tmp_path, model_init_kwargs=KIN, **options)
        ).args.learning_rate
        for options in ({}, {"init_student": "random"}, {"learning_rate": 5e-4})
    ]
    assert rates == [3e-3, 1e-2, 5e-4]


@pytest.mark.parametrize("fit", [True, False])
def test_a_student_that_is_trained_already_is_not_trained_as_one_with_random_weights(
    digits_teacher, given, tmp_path, monkeypatch, fit
):
    monkeypatch.setattr("hf_noisekd.calibration.calibration_images.MIN_SELF_AGREEMENT", 0 if fit else 101)
    student = copy.deepcopy(digits_teacher)
    trainer = NoiseKDTrainer(student, digits_teacher, config(tmp_path / "out"), images=given)
    assert (trainer.args.learning_rate, trainer.args.resolutions) == (3e-3 if fit else 3e-4, "1")
    trainer.train()
    if not fit:
        assert torch.equal(student.bn1.running_mean, digits_teacher.bn1.running_mean)
    fresh = timm.create_model("resnet10_cifar", in_chans=1, **KIN)
    fresh.train()(torch.randn(2, 1, 32, 32))  # which changes its running statistics alone
    assert NoiseKDTrainer(fresh, digits_teacher, config(tmp_path / "fresh"), images=given).args.learning_rate == 1e-2


def test_a_student_has_its_teachers_preprocessing_before_it_is_saved(digits_teacher, tmp_path):
    student = timm.create_model("resnet10_cifar", in_chans=1, num_classes=10, **KIN)
    NoiseKDTrainer(student, digits_teacher, config(tmp_path))
    assert preprocessing_of(student) == preprocessing_of(digits_teacher)


def test_arguments_of_the_student_are_saved_with_it(digits_teacher, tmp_path):
    args = config(tmp_path / "out", model_init_kwargs=KIN | {"drop_path_rate": 0.1})
    trainer = NoiseKDTrainer("resnet10_cifar", digits_teacher, args)
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    assert (saved["width"], saved["drop_path_rate"]) == (4, 0.1)
    save_model(load_teacher(tmp_path / "out"), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["model_args"]
    assert again == saved


@pytest.fixture
def given(digits):
    return [{"pixel_values": digits[0][index]["pixel_values"]} for index in range(64)]


def test_a_cut_is_repaired_on_images_before_the_training(digits_teacher, digits, given, tmp_path):
    cut, _ = start(digits_teacher, tmp_path, student=None, keep=0.5)
    trainer = NoiseKDTrainer(None, digits_teacher, config(tmp_path / "given", keep=0.5), images=given)
    assert trainer.start.facts.recalibrated
    assert not trainer.provenance().is_data_free
    with_images, without = (evaluate(model, digits[1])["running"]["accuracy"] for model in (trainer.model, cut))
    assert with_images > without


@pytest.mark.parametrize("are_good", [True, False])
def test_without_images_a_cut_is_repaired_on_calibration_images(
    digits_teacher, digits, tmp_path, monkeypatch, are_good
):
    monkeypatch.setattr("hf_noisekd.calibration.calibration_images.MIN_SELF_AGREEMENT", 80 if are_good else 101)
    cut, _ = start(digits_teacher, tmp_path, student=None, keep=0.5)
    args = config(tmp_path / "made", keep=0.5, num_calibration_images=128)
    trainer = NoiseKDTrainer(None, digits_teacher, args)
    assert trainer.start.facts.recalibrated == are_good
    assert trainer.provenance().is_data_free
    if are_good:
        repaired, plain = (evaluate(model, digits[1])["running"]["accuracy"] for model in (trainer.model, cut))
        assert repaired > plain


def test_a_student_that_does_not_fit_is_refused_before_images_are_made(digits_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_noisekd.training.plan.made_before_training", lambda *_: pytest.fail("images were made"))
    student = timm.create_model("resnet10_cifar", num_classes=3, in_chans=1)
    with pytest.raises(ValueError, match="num_classes=10"):
        NoiseKDTrainer(student, digits_teacher, config(tmp_path, num_calibration_images=64))


@pytest.mark.parametrize(
    ("classes", "dtype", "message"), [(1, torch.float32, "one class"), (3, torch.float16, r"teacher.float\(\)")]
)
def test_a_teacher_that_cannot_teach_is_refused_before_images_are_made(classes, dtype, message, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_noisekd.training.plan.made_before_training", lambda *_: pytest.fail("images were made"))
    teacher = timm.create_model("resnet18_cifar", width=4, num_classes=classes, in_chans=1).to(dtype)
    with pytest.raises(ValueError, match=message):
        NoiseKDTrainer("resnet10_cifar", teacher, config(tmp_path, input_size=[1, 32, 32], num_calibration_images=64))


def test_a_teacher_of_probabilities_is_refused(digits_teacher, tmp_path):
    teacher = nn.Sequential(digits_teacher, nn.Softmax(-1))
    with pytest.raises(ValueError, match="take off its softmax"):
        NoiseKDTrainer("resnet10_cifar", teacher, config(tmp_path, input_size=[1, 32, 32]))


def test_images_that_do_not_fit_are_refused(digits_teacher, given, tmp_path):
    small = [{"pixel_values": one["pixel_values"][:, :16, :16]} for one in given]
    for images, message in ((given[:15], "at least 16"), (small, "1x16x16.*1x32x32")):
        with pytest.raises(ValueError, match=message):
            NoiseKDTrainer(None, digits_teacher, config(tmp_path, keep=0.5), images=images)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda pixels: pixels * 127.5 + 127.5, "of -0.947 to 2.15: normalise them"),
        (lambda pixels: (pixels * 127.5 + 127.5).byte(), "torch.uint8: preprocess them"),
        (
            lambda pixels: pixels.where(torch.arange(len(pixels))[:, None, None, None] != 5, torch.nan),
            "Image 5 has a NaN",
        ),
    ],
    ids=["of 255", "bytes", "NaN"],
)
def test_pixels_that_no_preprocessing_gives_are_refused(digits_teacher, given, tmp_path, changed, message):
    pixels = changed(torch.stack([one["pixel_values"] for one in given]))
    with pytest.raises(ValueError, match=message):
        NoiseKDTrainer(None, digits_teacher, config(tmp_path, keep=0.5), images=PixelsDataset(pixels))
    with pytest.raises(ValueError, match=message):
        shrink(digits_teacher, 0.5, images=pixels)


def test_images_of_a_forgotten_normalisation_or_of_one_class_are_warned_of(digits_teacher, given, caplog):
    pixels = torch.stack([one["pixel_values"] for one in given])
    for images, message in (
        (pixels, ""),
        (pixels / 2 + 0.5, "of -0.947 to 2.15. Are they normalised"),
        (pixels[:1] + 1e-3 * pixels, "one class for all held-out ones.* stored statistics stay"),
    ):
        caplog.clear()
        shrink(digits_teacher, 0.5, images=images)
        assert re.search(message, caplog.text) if message else not caplog.text


def test_the_order_of_given_images_does_not_say_which_are_held_out(digits_teacher):
    pixels = 0.01 * torch.rand(64, 1, 32, 32)
    pixels[3::4] += 1
    given = given_images(digits_teacher, pixels)
    assert [len(given.pixel_values), len(given.held_out)] == [48, 16]
    assert 0.1 < given.held_out.mean() < 0.9
    assert 0.1 < given.pixel_values.mean() < 0.9


@pytest.mark.parametrize(
    "images",
    [
        [{"pixel_values": torch.zeros(1, 32, 32)}] * 16,
        [torch.zeros(16, 3, 32, 32)],
        {"pixel_values": torch.zeros(8, 1, 32, 32)},
        [],
    ],
)
def test_what_are_no_batches_of_images_for_a_cut_is_refused(digits_teacher, images):
    with pytest.raises(ValueError, match=r"give batches \('B', 1, 32, 32\)|at least 16"):
        shrink(digits_teacher, 0.5, images=images)


@pytest.mark.parametrize("fit", [True, False])
def test_given_images_are_trained_on(digits_teacher, given, tmp_path, monkeypatch, fit):
    monkeypatch.setattr("hf_noisekd.calibration.calibration_images.MIN_SELF_AGREEMENT", 0 if fit else 101)
    args = config(tmp_path / "out", keep=0.5, learning_rate=1e-4, max_steps=4)
    trainer = NoiseKDTrainer(None, digits_teacher, args, images=given)
    before = snapshot(trainer.model)
    assert trainer.train_dataset.share == (0.5 * 48 / 256 if fit else 1)
    trainer.train()
    made = Provenance.of(load_teacher(args.output_dir))
    assert made.real_images.images == 48  # the others are compared on
    assert (made.noise is not None) == fit
    assert (made.teacher_statistics, made.batch_norm) == (float(fit), "running")
    trainer.evaluate()
    trainer.create_model_card()
    assert [entry.dataset for entry in trainer.record().evaluations] == ["held-out given images"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("Some steps use" if fit else "Each step uses") + " a batch from 48 real images" in card
    pickle.dumps((trainer.model, digits_teacher))  # nothing of the training is left in them
    if not fit:  # the statistics of its teacher are the right ones
        assert torch.equal(trainer.model.bn1.running_mean, before["bn1.running_mean"])


def test_beside_a_few_given_images_others_are_made(digits_teacher, given, tmp_path):
    options = {"keep": 0.5, "num_calibration_images": 64, "max_steps": 100, "learning_rate": 1e-5}
    trainer = NoiseKDTrainer(None, digits_teacher, config(tmp_path / "out", **options), images=given[:32])
    assert len(trainer.images) > 24 == len(trainer.images.pixel_values)
    trainer.args.max_steps = 2
    trainer.train()
    made = Provenance.of(load_teacher(tmp_path / "out"))
    assert (made.given_images.images, made.real_images.images, made.recalibration.images) == (32, 24, 24)
    assert made.calibration.images == len(trainer.images) - 24
    compared = trainer.record().evaluations[-1]
    assert (compared.dataset, compared.images) == (
        "held-out given and calibration images",
        8 + made.calibration.held_out,
    )
    assert not made.is_data_free
    # With enough of them, or a teacher that they spoil, none are made.
    assert (
        NoiseKDTrainer(
            None, digits_teacher, config(tmp_path / "b", **options | {"num_calibration_images": 32}), images=given
        ).images.made
        is None
    )
    noise = [{"pixel_values": 9 * torch.rand(1, 32, 32)} for _ in range(32)]
    assert NoiseKDTrainer(None, digits_teacher, config(tmp_path / "c", **options), images=noise).images.made is None


@pytest.mark.parametrize(
    ("options", "mixes"), [({"keep": 0.5}, True), ({"init_student": "random", "model_init_kwargs": KIN}, False)]
)
def test_what_was_cut_from_its_teacher_is_trained_on_calibration_images_too(
    digits_teacher, tmp_path, monkeypatch, options, mixes
):
    monkeypatch.setattr("hf_noisekd.calibration.calibration_images.MIN_SELF_AGREEMENT", 0)
    args = config(tmp_path, num_calibration_images=64, max_steps=8, **options)
    trainer = NoiseKDTrainer(None if "keep" in options else "resnet10_cifar", digits_teacher, args)
    assert getattr(trainer.train_dataset, "share", 0.0) == (0.25 * 64 / 256 if mixes else 0.0)
    trainer.train()
    made = Provenance.of(load_teacher(tmp_path))
    assert made.is_data_free
    assert (made.made_images, made.compares_features) == ((64, True) if mixes else (0, False))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert ("a batch from 64 calibration images" in card, "features at the ends" in card) == (mixes, mixes)
    assert made.calibration.images == 64


def test_blocks_are_trained_alone_only_before_a_short_training(given, tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher = timm.create_model("resnet18_cifar", width=8, stem_stride=2, in_chans=1, num_classes=10).eval()
    trained = []
    monkeypatch.setattr("hf_noisekd.shrinking.repair.Reconstruction", lambda pair: trained.append(pair))
    for options, trains in (({"max_steps": 2000}, False), ({"max_steps": -1, "max_hours": 1}, False), ({}, True)):
        NoiseKDTrainer(None, teacher, config(tmp_path, keep=0.5, **options), images=given)
        assert bool(trained) == trains


def test_features_are_compared_unless_that_is_turned_off(digits_teacher, tmp_path):
    losses = {}
    for matches in (True, False):
        args = config(tmp_path / str(matches), keep=0.5, match_features=matches, logging_steps=1, max_steps=1)
        trainer = NoiseKDTrainer(None, digits_teacher, args)
        trainer.train()
        losses[matches] = trainer.state.log_history[0]["loss"]
    assert losses[True] > 0.1 * losses[False] > 0
    assert losses[True] != pytest.approx(losses[False])


def test_given_images_and_training_images_of_the_users_own(digits_teacher, given, tmp_path):
    args = config(tmp_path, keep=0.5, input_size=[1, 32, 32])
    trainer = NoiseKDTrainer(None, digits_teacher, args, train_dataset=given, images=given)
    trainer.train()
    made = Provenance.of(load_teacher(tmp_path))
    assert (made.noise, made.given_images.images) == (None, 64)


def test_images_are_shifted_and_mirrored_but_not_those_to_compare_on():
    pixels = torch.rand(2, 1, 16, 16)
    assert torch.equal(PixelsDataset(pixels)[1]["pixel_values"], pixels[1])
    shifted = PixelsDataset(pixels, augments=True)
    several = [shifted[0]["pixel_values"] for _ in range(20)]
    assert {one.shape for one in several} == {(1, 16, 16)}
    assert len({one.sum().item() for one in several}) > 5
    assert all(set(one.flatten().tolist()) <= set(pixels[0].flatten().tolist()) for one in several)


def test_an_input_size_that_is_given_is_the_students_from_then_on(tmp_path):
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=3).eval()
    args = {"input_size": [3, 32, 48], "resolutions": "1"}
    for name, student in (
        ("cut", None),
        ("named", "test_resnet"),
        ("given", timm.create_model("test_resnet", num_classes=3)),
    ):
        options = args | ({"keep": 0.5} if student is None else {})
        trainer = NoiseKDTrainer(student, teacher, config(tmp_path / name, **options))
        trainer.train()
        assert input_size_of(trainer.model) == (3, 32, 48)
        assert trainer.record().model.input_size == [3, 32, 48]
        assert input_size_of(load_teacher(tmp_path / name)) == (3, 32, 48)
    assert input_size_of(teacher) == (3, 160, 160)  # the teacher stays as it is


def test_an_input_size_of_a_transformers_teacher(tmp_path):
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 3}
    teacher = ResNetForImageClassification(ResNetConfig(**shape)).eval()
    trainer = NoiseKDTrainer("resnet10_cifar", teacher, config(tmp_path / "out", input_size=[3, 24, 24]))
    trainer.train()
    assert input_size_of(load_teacher(tmp_path / "out")) == (3, 24, 24)
    teacher.save_pretrained(tmp_path / "teacher")
    size = {"height": 32, "width": 32}
    BitImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"3x24x24.* image processor makes 3x32x32"):
        NoiseKDTrainer("resnet10_cifar", tmp_path / "teacher", config(tmp_path / "other", input_size=[3, 24, 24]))


def test_a_student_may_take_smaller_images_than_its_teacher(tmp_path):
    torch.manual_seed(0)
    cfg = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    teacher = timm.create_model("resnet10_cifar", width=8, num_classes=4, pretrained_cfg_overlay=cfg)
    smooth = nn.functional.interpolate(torch.randn(32, 3, 2, 2), 64, mode="bicubic")
    recalibrate_batch_norm(teacher, [smooth])
    samples = [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(smooth)]
    for keep, steps in ((0.5, 2), (0.9, 1)):  # the whole teacher has nothing to learn
        folder = tmp_path / str(keep)
        trainer = NoiseKDTrainer(
            None, teacher, config(folder, keep=keep), eval_dataset={"test": samples}, images=samples
        )
        trainer.train()
        side = 48 if keep == 0.5 else 56
        assert (trainer.state.global_step, trainer.train_dataset.input_size) == (steps, (3, side, side))
        assert trainer.evaluate()["eval_test_running_agreement"] > 50
        assert input_size_of(load_teacher(folder)) == (3, side, side)
        assert Provenance.of(load_teacher(folder)).start.teacher_input_size == [3, 64, 64]
        trainer.create_model_card()
        assert "64x64" in (folder / "README.md").read_text()
        assert ("its whole teacher" in _quality_text(trainer, trainer.record())) == (steps == 1)
        check_same_kind(load_teacher(folder), teacher)
    assert input_size_of(teacher) == (3, 64, 64)
    trainer = NoiseKDTrainer(None, teacher, config(tmp_path / "off", keep=0.5, min_side=1.0), images=samples)
    assert input_size_of(trainer.model) == (3, 64, 64)
