import pytest
import timm
import torch
from conftest import TinyCNN, digest
from torch import nn

from hf_noisekd import recalibrate_batch_norm
from hf_noisekd.models.classifier import count_parameters
from hf_noisekd.models.cost import count_macs
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.shrinking.cutting import Budget, _narrowed, shrink
from hf_noisekd.shrinking.ranking import Comparison

SIZE = (3, 32, 32)
IMAGES = [torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(0))]


def build(name="resnet18_cifar", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs).eval()


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_a_share_of_the_multiply_adds_is_kept(keep):
    teacher = build(width=32, stem_stride=2)
    before = digest(teacher)
    student, start = shrink(teacher, keep, images=IMAGES)
    share = count_macs(student, SIZE)[""] / count_macs(teacher, SIZE)[""]
    assert keep * 0.75 < share <= keep
    assert start.macs == share
    assert digest(teacher) == before
    assert not student.training
    assert all(conv.out_channels % 8 == 0 for conv in student.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6, 0.5])
@pytest.mark.parametrize("kwargs", [{"width": 16}, {"width": 16, "norm_groups": 4}])
def test_what_is_left_of_the_budget_goes_to_single_layers(keep, kwargs):
    teacher = build("resnet10_cifar", stem_stride=2, **kwargs)
    macs, params = count_macs(teacher, SIZE)[""], count_parameters(teacher)
    names = {name: name for name, _ in teacher.named_modules()}
    narrow, _ = _narrowed(teacher, Budget(macs=keep * macs), SIZE, Comparison.on(IMAGES), set(), names)
    assert keep - 0.03 < count_macs(narrow, SIZE)[""] / macs <= keep
    narrow, _ = _narrowed(teacher, Budget(params=keep * params), SIZE, Comparison.on(IMAGES), set(), names)
    assert keep - 0.05 < count_parameters(narrow) / params <= keep


def test_a_network_far_below_what_was_asked_for_says_so():
    teacher = build("resnet18_cifar", width=8, stem_stride=2)
    for stage in (teacher.layer1, teacher.layer2, teacher.layer3, teacher.layer4):
        for block in [*stage][1:]:
            nn.init.zeros_(block.bn2.weight)
            nn.init.zeros_(block.bn2.bias)
    _, start = shrink(teacher, 0.95, images=IMAGES)
    assert (len(start.removed_blocks), start.cut) == (1, 0)
    assert start.macs < 0.92
    assert start.allowed_macs == pytest.approx(0.95)
    assert "95%" in str(start)
    _, start = shrink(build("resnet10_cifar", width=16, stem_stride=2), 0.75, images=IMAGES)
    assert start.allowed_macs is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_of_another_type_is_cut_in_float32(dtype):
    teacher = build("resnet10_cifar", width=16, stem_stride=2).to(dtype)
    for images in (None, IMAGES, [IMAGES[0].to(dtype)]):
        student, start = shrink(teacher, 0.5, images=images)
        assert {tensor.dtype for tensor in student.state_dict().values() if tensor.is_floating_point()} == {
            torch.float32
        }
        assert 0.45 < start.macs <= 0.5
    assert teacher.conv1.weight.dtype == dtype
    expected, _ = shrink(teacher.float(), 0.5, images=IMAGES)
    torch.testing.assert_close(student(IMAGES[0].to(dtype).float()), expected(IMAGES[0]), atol=0.05, rtol=0.05)


def test_limits_on_parameters_and_on_multiply_adds():
    teacher = build(width=32, stem_stride=2)
    student, _ = shrink(teacher, max_params=1_000_000, images=IMAGES)
    assert 700_000 < count_parameters(student) <= 1_000_000
    student, _ = shrink(teacher, max_macs=10**7, max_params=300_000, images=IMAGES)
    assert count_macs(student, SIZE)[""] <= 10**7
    assert count_parameters(student) <= 300_000


def test_below_1_a_limit_is_a_share_of_the_teacher():
    teacher = build(width=32, stem_stride=2)
    budget = Budget.of(teacher, SIZE, max_params=0.5, max_macs=0.25)
    assert budget.params == count_parameters(teacher) / 2
    assert budget.macs == count_macs(teacher, SIZE)[""] / 4


def test_blocks_that_do_nothing_are_what_goes():
    teacher = build("resnet34_cifar", width=16)
    idle = ["layer2.3", "layer3.2", "layer3.4", "layer4.1", "layer4.2"]
    for name in idle:
        norm = teacher.get_submodule(name).bn2
        norm.weight.data.zero_()
        norm.bias.data.zero_()
    student, start = shrink(teacher, 0.75, images=IMAGES)
    assert sorted(start.removed_blocks) <= idle
    assert start.cut == 0
    torch.testing.assert_close(student(IMAGES[0]), teacher(IMAGES[0]))


class Fixed(nn.Module):
    """A network whose first layer must have 16 channels, which no dependency of layers tells."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 64, 1), nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).view(len(x), 16, *x.shape[2:])).mean((2, 3)))


def test_layers_that_do_not_bear_it_stay_as_they_are():
    fixed: set[str] = set()
    whole = Fixed()
    names = {name: name for name, _ in whole.named_modules()}
    budget = Budget(macs=0.6 * count_macs(whole, SIZE)[""])
    narrow, kept = _narrowed(whole, budget, SIZE, Comparison.on(IMAGES), fixed, names)
    assert fixed == {"conv1"}
    assert {name: len(outputs) for name, outputs in kept.items()} == {"conv2": 32}
    assert (narrow.conv1.out_channels, narrow.conv2.out_channels) == (16, 32)
    assert _narrowed(whole, Budget(macs=1), SIZE, Comparison.on(IMAGES), fixed, names) == (None, {})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "max_macs or max_params"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"max_params": 10**9}, "max_params is 1,000,000,000"),
        ({"max_macs": 100}, "100 multiply-adds"),
    ],
)
def test_budgets_that_cannot_be_met(kwargs, message):
    with pytest.raises(ValueError, match=message):
        shrink(build(width=8), **kwargs)


def test_without_images_predictions_for_noise_are_compared():
    _, start = shrink(build(width=8, stem_stride=2), 0.5)
    assert start.macs <= 0.5


def test_a_teacher_that_could_not_be_built_again_is_refused():
    with pytest.raises(ValueError, match=r"TinyCNN .*timm"):
        shrink(TinyCNN(in_chans=3), 0.5, input_size=SIZE)


@pytest.fixture
def of_64_pixels():
    """A network and images that it classifies the same if they are smaller: they have no detail."""
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet10_cifar", width=8, num_classes=4, pretrained_cfg_overlay={"input_size": (3, 64, 64)}
    )
    smooth = torch.nn.functional.interpolate(torch.randn(32, 3, 2, 2), 64, mode="bicubic")
    recalibrate_batch_norm(model, [smooth])
    return model.eval(), smooth


def test_smaller_images_are_taken_where_they_change_less(of_64_pixels):
    model, images = of_64_pixels
    student, facts = shrink(model, 0.8, images=[images], min_side=0.75)
    assert input_size_of(student) == (3, 56, 56)
    assert (facts.removed_blocks, facts.cut, facts.teacher_input_size) == ([], 0, [3, 64, 64])
    assert facts.macs == pytest.approx((56 / 64) ** 2, rel=0.01)
    assert facts.size_agreement > 80
    assert "64x64" in str(facts)
    with torch.no_grad():
        torch.testing.assert_close(student(images), model(images))
    for kwargs in ({}, {"min_side": 0.95}, {"min_side": 0.75, "images": None}):
        student, facts = shrink(model, 0.8, **{"images": [images]} | kwargs)
        assert (input_size_of(student), facts.teacher_input_size) == ((3, 64, 64), None)


def test_what_does_not_suffice_in_size_is_cut(of_64_pixels):
    model, images = of_64_pixels
    student, facts = shrink(model, 0.4, images=[images], min_side=0.75)
    assert input_size_of(student) == (3, 48, 48)
    assert facts.cut > 0
    assert count_macs(student, (3, 48, 48))[""] <= 0.4 * count_macs(model, (3, 64, 64))[""]


@pytest.mark.parametrize("change", ["activation", "eps"])
def test_a_teacher_of_another_function_than_timm_builds_is_refused(change):
    teacher = build("resnet10_cifar", width=8, stem_stride=2)
    for module in teacher.modules():
        if change == "eps" and isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5
        if change == "activation" and hasattr(module, "act1"):
            module.act1 = nn.Hardtanh()
    with pytest.raises(ValueError, match=r"resnet10_cifar .*changed by hand"):
        shrink(teacher, 0.5, images=IMAGES)


@pytest.mark.parametrize("max_params", [0.6, 0.3])
def test_parameters_behind_concatenations_are_counted(max_params):
    teacher = timm.create_model("densenet121", growth_rate=16, block_config=(4, 4), num_classes=10)
    student, _ = shrink(teacher, max_params=max_params, input_size=(3, 32, 32))
    share = count_parameters(student) / count_parameters(teacher)
    assert max_params - 0.05 < share <= max_params


def test_a_cut_within_inference_mode_is_the_same():
    teacher = timm.create_model("resnet10_cifar", width=8).eval()
    generator = torch.Generator().manual_seed(0)
    expected = shrink(teacher, 0.6, images=[torch.randn(32, 3, 32, 32, generator=generator)])[0]
    with torch.inference_mode():
        images = [torch.randn(32, 3, 32, 32, generator=generator.manual_seed(0))]
        student, _ = shrink(teacher, 0.6, images=images)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in student.state_dict().items())
