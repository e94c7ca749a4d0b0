import copy
import logging

import pytest
import timm
import torch
from conftest import snapshot
from timm.layers import freeze_batch_norm_2d

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.calibration.calibration_images import calibration_images
from hf_noisekd.calibration.given_images import given_images
from hf_noisekd.models.batch_norm import stored_statistics
from hf_noisekd.models.loading import load_teacher
from hf_noisekd.record.schema import Evaluation, Provenance, StartFacts
from hf_noisekd.shrinking.cutting import shrink
from hf_noisekd.shrinking.repair import Cut
from hf_noisekd.training import ending as ending_module
from hf_noisekd.training.ending import Candidate, end_without_data
from hf_noisekd.training.plan import InitialWeights
from hf_noisekd.training.teacher import Teacher


@pytest.fixture(scope="module")
def teacher(digits_teacher):
    return Teacher(digits_teacher)


@pytest.fixture
def cut(digits_teacher):
    """A teacher cut down, and one that training has spoilt."""
    torch.manual_seed(0)
    student, _ = shrink(digits_teacher, 0.7)
    spoilt = copy.deepcopy(student)
    torch.nn.init.normal_(spoilt.fc.weight)
    return student, spoilt


def begun(student):
    facts = StartFacts(removed_blocks=[], tensors=1, from_teacher=1, cut=0, macs=0.7)
    return InitialWeights(facts, Cut([], {}), snapshot(student))


def end(student, teacher, initial):
    images = None
    if stored_statistics(teacher.model):
        images = calibration_images(teacher.model, 64, steps=30, max_steps=30, show_progress=False)
    return end_without_data(student, teacher, images, initial=initial, num_noise=64, seed=0, step=1)


def test_a_student_that_training_spoilt_becomes_the_cut_again(cut, teacher, caplog):
    student, spoilt = cut
    with caplog.at_level(logging.WARNING):
        ending = end(spoilt, teacher, begun(student))
    assert not ending.is_trained
    assert "Training did not help" in caplog.text
    weights = dict(student.named_parameters())  # the statistics may be those of calibration images
    assert all(torch.equal(tensor, weights[name]) for name, tensor in spoilt.named_parameters())


def test_a_student_that_training_helped_keeps_its_weights(cut, teacher):
    student, spoilt = cut
    weight = student.fc.weight.detach().clone()
    ending = end(student, teacher, begun(spoilt))
    assert ending.is_trained
    assert torch.equal(student.fc.weight, weight)
    assert ending.agreement.running["agreement"] > 50


@pytest.mark.parametrize("helped", [True, False])
def test_images_that_are_no_good_for_statistics_still_tell_whether_training_helped(
    cut, teacher, helped, monkeypatch, caplog
):
    monkeypatch.setattr("hf_noisekd.calibration.calibration_images.MIN_SELF_AGREEMENT", 101)
    trained, start = cut if helped else cut[::-1]
    trained, before = copy.deepcopy(trained), snapshot(trained)
    ending = end(trained, teacher, begun(start))
    if helped:  # it is read by the statistics of the batch
        assert ending is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    else:
        assert (ending.is_trained, ending.images) == (False, None)
        assert "64 or more" in caplog.text
        assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize(("weight", "worse", "keeps"), [(0.5, "new", True), (0.5, "old", False), (1.0, "new", False)])
def test_statistics_of_training_may_hold_where_the_teacher_used_its_own(
    digits_teacher, weight, worse, keeps, monkeypatch
):
    def spoil(model, images=None):
        torch.nn.init.normal_(model.layer4[0].bn1.running_mean, std=10)

    monkeypatch.setattr("hf_noisekd.calibration.calibration_images.MIN_SELF_AGREEMENT", 0)
    student = copy.deepcopy(digits_teacher)
    spoil(student) if worse == "old" else monkeypatch.setattr(ending_module, "store_statistics", spoil)
    mean = student.layer4[0].bn1.running_mean.clone()
    ending = end(student, Teacher(digits_teacher, statistics=weight), None)
    assert (ending.images is None) == keeps
    assert torch.equal(student.layer4[0].bn1.running_mean, mean) == keeps


@pytest.mark.parametrize("batch_is_better", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_without_good_images_a_student_at_random_is_read_as_it_is_better(
    digits_teacher, weight, batch_is_better, monkeypatch, caplog
):
    monkeypatch.setattr("hf_noisekd.calibration.calibration_images.MIN_SELF_AGREEMENT", 101)
    student = copy.deepcopy(digits_teacher)
    if batch_is_better:
        torch.nn.init.normal_(student.layer4[0].bn1.running_mean, std=10)
    before = snapshot(student)
    ending = end(student, Teacher(digits_teacher, statistics=weight), None)
    by_batch = weight > 0 and (batch_is_better or weight == 1)
    assert (ending is None) == by_batch
    assert ("running statistics of its training noise" in caplog.text) == by_batch
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_the_trainer_tells_that_its_training_did_not_help(digits_teacher, tmp_path):
    args = NoiseKDConfig(
        str(tmp_path),
        keep=0.7,
        learning_rate=100.0,
        max_steps=5,
        per_device_train_batch_size=8,
        num_calibration_images=64,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = NoiseKDTrainer(None, digits_teacher, args)
    before = snapshot(trainer.model)
    trainer.train()
    trainer.save_model()
    assert torch.equal(trainer.model.conv1.weight, before["conv1.weight"])
    made = Provenance.of(load_teacher(tmp_path))
    assert (made.start.training_helped, made.batch_norm) == (False, "running")
    assert trainer.record().evaluations[-1].running["agreement"] > 20


def test_a_network_without_batch_norm_is_compared_too(digits_teacher):
    torch.manual_seed(0)
    student = timm.create_model("resnet10_cifar", width=4, stem_stride=2, in_chans=1, num_classes=10)
    for name, module in list(student.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            parent = student.get_submodule(name.rpartition(".")[0]) if "." in name else student
            setattr(parent, name.rpartition(".")[2], torch.nn.GroupNorm(2, module.num_features))
    ending = end(student, Teacher(digits_teacher), begun(student))
    assert ending.is_trained  # the trained one, where both are the same
    ending = end(student, Teacher(student), begun(student))
    assert (ending.is_trained, ending.agreement.dataset) == (True, "held-out noise images")


def test_given_images_give_statistics_also_where_the_teacher_stores_none(digits_teacher, digits):
    frozen = freeze_batch_norm_2d(copy.deepcopy(digits_teacher))
    student = copy.deepcopy(digits_teacher)
    student.bn1.running_mean.add_(3.0)
    pixels = torch.stack([digits[0][index]["pixel_values"] for index in range(128)])
    options = {"initial": None, "num_noise": 64, "seed": 0, "step": 1}
    images = given_images(frozen, pixels)
    ending = end_without_data(student, Teacher(frozen), images, **options)
    assert ending.images is images
    assert ending.agreement.running["agreement"] > 80


@pytest.mark.parametrize(
    ("initial", "helped"), [((90.0, 0.5), True), ((70.0, 0.1), True), ((90.0, 0.1), False), ((80.0, 0.1), False)]
)
def test_initial_weights_are_taken_where_agreement_and_divergence_are_better(initial, helped):
    tried = [candidate(True, 80.0, 0.2), candidate(True, 90.0, 0.3), candidate(False, *initial)]
    best = ending_module._best(tried)
    assert best is (tried[0] if helped else tried[2])


@pytest.mark.parametrize(
    ("initial", "helped"), [((90.0, 0.5), False), ((70.0, 0.1), False), ((90.0, 0.1), False), ((70.0, 0.5), True)]
)
def test_a_student_for_batches_alone_has_to_be_better_than_the_cut_by_both(initial, helped):
    tried = [candidate(True, 80.0, 0.2, "batch"), candidate(False, *initial)]
    assert ending_module._best(tried) is tried[0 if helped else 1]


def candidate(is_trained, agreement, kl, statistics="running"):
    scores = {"running": {}, "batch": {}, "precision": "float32"} | {statistics: {"agreement": agreement, "kl": kl}}
    measured = Evaluation(dataset="images", images=40, batch_size=40, step=1, **scores)
    return Candidate({}, is_trained, statistics=statistics, agreement=measured)
