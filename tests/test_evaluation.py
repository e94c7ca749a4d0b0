import copy

import pytest
import torch
from conftest import TinyCNN
from torch.utils.data import IterableDataset, TensorDataset

from hf_noisekd import NoiseDataset, batch_statistics, evaluate
from hf_noisekd.training.evaluation import counts_of, evaluate_loader, evaluation_loader


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        2 + torch.randn(50, 1, 8, 8, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    )


def test_running_statistics_are_plain_evaluation(tiny_cnn, images):
    scores = evaluate(tiny_cnn, images, batch_size=16)["running"]
    with torch.no_grad():
        logits = tiny_cnn(images.tensors[0])
    labels = images.tensors[1]
    assert scores["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert "top5_accuracy" not in scores
    assert "agreement" not in scores


def test_batch_statistics_fill_the_last_batch_from_the_start(tiny_cnn, images):
    pixels, labels = images.tensors
    logits = []
    with torch.no_grad(), batch_statistics(tiny_cnn):
        for chunk in torch.cat([pixels, pixels[:14]]).split(16):
            logits.append(tiny_cnn(chunk))
    logits = torch.cat(logits)[:50]
    scores = evaluate(tiny_cnn, images, batch_size=16)["batch"]
    assert scores["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_data_set_below_the_batch_size_is_one_batch(tiny_cnn, images):
    assert evaluate(tiny_cnn, images, batch_size=1000) == evaluate(tiny_cnn, images, batch_size=50)


def test_order_matters_only_through_the_batches(tiny_cnn, images):
    order = torch.randperm(50)
    shuffled = TensorDataset(*(tensor[order] for tensor in images.tensors))
    first, second = evaluate(tiny_cnn, images, batch_size=16), evaluate(tiny_cnn, shuffled, batch_size=16)
    assert first["running"] == pytest.approx(second["running"], rel=1e-5)
    whole = evaluate(tiny_cnn, images, batch_size=50), evaluate(tiny_cnn, shuffled, batch_size=50)
    assert whole[0]["batch"] == pytest.approx(whole[1]["batch"], rel=1e-4)


@pytest.mark.parametrize("whose", ["images", "model", "teacher"])
def test_what_is_not_finite_is_not_measured(tiny_cnn, images, whose):
    """The largest of answers that are NaN is the first, so that each accuracy would be the share of class 0."""
    teacher = copy.deepcopy(tiny_cnn)
    broken = {"images": images.tensors[0], "model": tiny_cnn.fc.bias, "teacher": teacher.fc.bias}[whose]
    with torch.no_grad():
        broken[-1] = float("nan" if whose == "images" else "inf")
    with pytest.raises(ValueError, match=f"(?i){whose}.* NaN"):
        evaluate(tiny_cnn, images, teacher_model=teacher, batch_size=16)


def test_changes_neither_model(tiny_cnn, images):
    torch.manual_seed(1)
    teacher = TinyCNN().train()
    tiny_cnn.train()
    before = [copy.deepcopy(model.state_dict()) for model in (tiny_cnn, teacher)]
    evaluate(tiny_cnn, images, teacher_model=teacher, batch_size=16)
    evaluate(tiny_cnn, NoiseDataset((1, 8, 8), 16, 2), teacher_model=teacher)
    for model, state in zip((tiny_cnn, teacher), before, strict=True):
        assert all(module.training for module in model.modules())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_agreement_with_itself_is_complete(tiny_cnn, images):
    scores = evaluate(tiny_cnn, images, teacher_model=copy.deepcopy(tiny_cnn), batch_size=16)
    assert scores["running"]["agreement"] == 100
    assert scores["running"]["kl"] == pytest.approx(0, abs=1e-6)
    assert scores["batch"]["agreement"] < 100
    noise = NoiseDataset((1, 8, 8), 32, 3, held_out=True)
    scores = evaluate(tiny_cnn, noise, teacher_model=copy.deepcopy(tiny_cnn))
    # The teacher answers noise with batch statistics.
    assert scores["batch"] == {"agreement": 100, "kl": pytest.approx(0, abs=1e-6)}
    assert scores["running"]["kl"] > 1e-3


def test_model_and_teacher_may_be_in_different_precision(tiny_cnn, images):
    teacher = copy.deepcopy(tiny_cnn).bfloat16()
    assert evaluate(tiny_cnn, images, teacher_model=teacher, batch_size=8)["running"]["agreement"] > 80
    assert evaluate(teacher, images, teacher_model=tiny_cnn, batch_size=8)["running"]["agreement"] > 80


def test_top5_accuracy_where_there_are_more_than_five_classes():
    model = TinyCNN(num_classes=8).eval()
    labels = torch.arange(24) % 8
    scores = evaluate(model, TensorDataset(torch.randn(24, 1, 8, 8), labels))
    for statistics in ("running", "batch"):
        assert scores[statistics]["accuracy"] <= scores[statistics]["top5_accuracy"] <= 100


def test_each_rank_takes_whole_batches_and_each_image_counts_once(tiny_cnn, images):
    alone = evaluate(tiny_cnn, images, batch_size=16)
    loaders = [evaluation_loader(images, 16, rank=rank, world_size=3) for rank in range(3)]
    assert sum(sum(counts_of(loader)) for loader in loaders) == 50
    tables = []
    for loader in loaders:
        evaluate_loader(tiny_cnn, loader, reduce=lambda table: tables.append(table) or table)
    together = evaluate_loader(tiny_cnn, loaders[0], reduce=lambda _: sum(tables))
    for statistics in alone:
        assert together[statistics] == pytest.approx(alone[statistics], rel=1e-6)


def test_a_rank_without_a_batch_reports_nothing_of_its_own(tiny_cnn, images):
    loader = evaluation_loader(images, 50, rank=1, world_size=2)
    assert len(loader) == 0
    assert evaluate_loader(tiny_cnn, loader) == {"running": {}, "batch": {}}


def test_a_model_without_batch_norm_reads_the_same_both_ways(images):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    scores = evaluate(model, images)
    assert scores["running"] == scores["batch"]


def test_refuses_what_it_cannot_evaluate(tiny_cnn, images):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(images)

    with pytest.raises(ValueError, match="0 images"):
        evaluate(tiny_cnn, TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)))
    with pytest.raises(ValueError, match=r"1 image\b"):
        evaluate(tiny_cnn, TensorDataset(torch.zeros(1, 1, 8, 8), torch.zeros(1)))
    with pytest.raises(ValueError, match="Stream"):
        evaluate(tiny_cnn, Stream())
    with pytest.raises(ValueError, match="num_steps"):
        evaluate(tiny_cnn, NoiseDataset((1, 8, 8), 4), teacher_model=tiny_cnn)
    with pytest.raises(ValueError, match=r"label 3.* 3 classes"):
        evaluate(tiny_cnn, TensorDataset(torch.zeros(4, 1, 8, 8), torch.tensor([0, 3, 1, 2])))
    with pytest.raises(ValueError, match="label -1"):
        evaluate(tiny_cnn, TensorDataset(torch.zeros(2, 1, 8, 8), torch.tensor([0, -1])))
    with pytest.raises(ValueError, match=r"labels .*teacher_model"):
        evaluate(tiny_cnn, NoiseDataset((1, 8, 8), 4, 1))


@pytest.mark.parametrize(("mean", "fits"), [([0.0], False), ([0.504], True)])
def test_a_teacher_that_takes_other_pixels_is_refused(tiny_cnn, mean, fits):
    student = copy.deepcopy(tiny_cnn)
    student.pretrained_cfg, tiny_cnn.pretrained_cfg = ({"mean": one, "std": [0.5]} for one in ([0.5], mean))
    message = "input channels" if fits else r"pixels of mean \[0.5\] and the teacher of \[0.0\]"
    with pytest.raises(ValueError, match=message):
        evaluate(student, "/nowhere/images", teacher_model=tiny_cnn)
