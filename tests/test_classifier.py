import pytest
import timm
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_noisekd.models.classifier import (
    class_names,
    compute_logits,
    declared_input_size,
    evaluation_mode,
    nonfinite_tensor,
)


def test_logits_of_both_kinds_of_model(tiny_cnn):
    pixels = torch.randn(2, 1, 8, 8)
    assert compute_logits(tiny_cnn, pixels).shape == (2, 3)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4, layer_type="basic")
    assert compute_logits(ResNetForImageClassification(config), torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_declared_input_sizes(tiny_cnn):
    assert declared_input_size(timm.create_model("resnet10_cifar", width=4)) == (3, 32, 32)
    assert declared_input_size(timm.create_model("resnet10_cifar", width=4, in_chans=1)) == (1, 32, 32)
    assert declared_input_size(tiny_cnn) is None
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=48)
    assert declared_input_size(ViTForImageClassification(vit)) == (3, 48, 48)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    assert declared_input_size(ResNetForImageClassification(config)) is None


FISH = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}


@pytest.mark.parametrize(
    ("label_names", "expected"),
    [
        (["a", "b", "c"], ["a", "b", "c"]),
        ({"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]),
        ({0: "a", 2: "c"}, ["a", "1", "c"]),  # as timm allows
        (FISH, [*FISH]),
        *((other, ["0", "1", "2"]) for other in (["a"], {"0": "a", "3": "d"}, {}, {"a": "b"}, "abc", 5, None)),
    ],
)
def test_names_of_classes(label_names, expected):
    model = timm.create_model("resnet10_cifar", width=4, pretrained_cfg_overlay={"label_names": label_names})
    assert class_names(model, 3) == expected


def test_finds_the_first_tensor_that_is_not_finite(tiny_cnn):
    assert nonfinite_tensor(tiny_cnn) is None
    tiny_cnn.bn2.running_var[3] = float("inf")
    assert nonfinite_tensor(tiny_cnn) == "bn2.running_var"


def test_evaluation_mode_gives_each_module_its_mode_back(tiny_cnn):
    tiny_cnn.train()
    tiny_cnn.bn2.eval()
    modes = [module.training for module in tiny_cnn.modules()]
    with evaluation_mode(tiny_cnn):
        assert not any(module.training for module in tiny_cnn.modules())
    assert [module.training for module in tiny_cnn.modules()] == modes
    with pytest.raises(KeyError), evaluation_mode(tiny_cnn):
        raise KeyError
    assert [module.training for module in tiny_cnn.modules()] == modes
