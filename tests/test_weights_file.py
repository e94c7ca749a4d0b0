"""What a file of weights says beside the weights, and which of the weights in it are meant."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from conftest import digest

from hf_noisekd.models.loading import load_teacher
from hf_noisekd.models.preprocessing import input_size_of
from hf_noisekd.models.saving import save_model

SIZES = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
# As of timm's script: what is not given is None, or an empty text for the interpolation.
NOTHING = {"img_size": None, "input_size": None, "mean": None, "std": None, "interpolation": "", "crop_pct": None}


def trained(name="resnet18", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 7} | kwargs)
    for tensor in model.buffers():  # statistics that matter
        if tensor.is_floating_point():
            tensor.copy_(1 + torch.rand_like(tensor))
    return model.eval()


def saved(path, state_dict, arch="resnet18", **args):
    """A file as timm's training script writes it."""
    given = argparse.Namespace(**{"model": arch, "drop": 0.1, "gp": None, "model_kwargs": {}} | NOTHING | args)
    torch.save({"epoch": 3, "arch": arch, "state_dict": state_dict, "version": 2, "args": given}, path)
    return path


@torch.no_grad()
def assert_alike(model, other, size):
    pixels = torch.randn(2, *size)
    torch.testing.assert_close(model(pixels.clone()), other.eval()(pixels))


def test_the_arguments_of_a_training_build_the_model_and_its_preprocessing(tmp_path):
    model_kwargs = SIZES | {"act_layer": "silu", "drop_path_rate": 0.1}
    model = trained(**model_kwargs, global_pool="max", in_chans=1)
    args = {"img_size": 32, "in_chans": 1, "mean": [0.3], "std": [0.4], "interpolation": "bilinear", "crop_pct": 1.0}
    file = saved(tmp_path / "w.pth.tar", model.state_dict(), gp="max", model_kwargs=model_kwargs, **args)
    again = load_teacher("resnet18", checkpoint=file)
    save_model(again, tmp_path / "folder")
    for each in (again, load_teacher(tmp_path / "folder")):
        assert_alike(model, each, (1, 32, 32))
        cfg = each.pretrained_cfg
        assert (input_size_of(each), tuple(cfg["mean"]), tuple(cfg["std"])) == ((1, 32, 32), (0.3,), (0.4,))
        assert (cfg["interpolation"], cfg["crop_pct"]) == ("bilinear", 1.0)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["model_args"]["act_layer"] == "silu"
    assert "drop_path_rate" not in config["model_args"]
    # These are of the weights that timm publishes under the name.
    assert not {"tag", "license", "test_input_size"} & config["pretrained_cfg"].keys()
    assert input_size_of(load_teacher("resnet18", checkpoint=file, input_size=(1, 64, 64))) == (1, 64, 64)


MEAN = (0.485, 0.456, 0.406)
ARCHITECTURE = ((3, 224, 224), MEAN, (0.229, 0.224, 0.225), "bicubic", 0.95)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("resnet18", {}, ARCHITECTURE),
        ("resnet18", {"arch": "resnet18.tv_in1k"}, (*ARCHITECTURE[:3], "bilinear", 0.875)),
        ("resnet18.a1_in1k", {"arch": "resnet18.tv_in1k"}, ARCHITECTURE),
        ("resnet18", {"arch": "hf-hub:timm/resnet18.tv_in1k"}, (*ARCHITECTURE[:3], "bilinear", 0.875)),
        # DeiT's script and others have one number.
        ("resnet18", {"input_size": 64, "mean": 0.5}, ((3, 64, 64), (0.5,) * 3, *ARCHITECTURE[2:])),
        ("resnet18", {"input_size": [3, 40, 48], "std": (1, 2, 3)}, ((3, 40, 48), MEAN, (1, 2, 3), "bicubic", 0.95)),
        ("resnet18", {"img_size": np.int64(64), "mean": np.full(3, 0.5)}, ((3, 64, 64), (0.5,) * 3, *ARCHITECTURE[2:])),
        ("resnet18", {"mean": [0.0], "crop_pct": 0.5}, (ARCHITECTURE[0], (0.0,) * 3, *ARCHITECTURE[2:4], 0.5)),
    ],
)  # fmt: skip
def test_what_is_not_given_is_that_of_the_architecture(tmp_path, name, args, expected):
    file = saved(tmp_path / "w.pth", trained(**SIZES).state_dict(), model_kwargs=SIZES, **args)
    cfg = load_teacher(name, checkpoint=file).pretrained_cfg
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    assert tuple(cfg[key] if isinstance(cfg[key], str | float) else tuple(cfg[key]) for key in keys) == expected


def test_gray_images_are_normalised_by_the_mean_of_the_means_as_by_timm(tmp_path):
    file = saved(tmp_path / "w.pth", trained(**SIZES, in_chans=1).state_dict(), model_kwargs=SIZES, img_size=32)
    cfg = load_teacher("resnet18", checkpoint=file).pretrained_cfg
    assert cfg["mean"] == pytest.approx([0.449], abs=1e-6)
    assert cfg["std"] == pytest.approx([0.226], abs=1e-6)


def test_a_network_of_one_size_is_built_for_that_of_its_training(tmp_path):
    model = trained("test_vit", img_size=64)
    file = saved(tmp_path / "w.pth", model.state_dict(), "test_vit", img_size=64)
    again = load_teacher("test_vit", checkpoint=file)
    save_model(again, tmp_path / "folder")
    for each in (again, load_teacher(tmp_path / "folder")):
        assert input_size_of(each) == (3, 64, 64)
        assert_alike(model, each, (3, 64, 64))


def test_weights_of_another_architecture_are_refused(tmp_path):
    state_dict = trained("test_efficientnet").state_dict()
    file = saved(tmp_path / "w.pth", state_dict, "test_efficientnet_ln")
    with pytest.raises(ValueError, match=r"test_efficientnet_ln.*test_efficientnet"):
        load_teacher("test_efficientnet", checkpoint=file)
    for arch in ("efficientnet", "test_efficientnet.r160_in1k", 3, None):  # timm writes the class for want of a name
        torch.save({"state_dict": state_dict, "arch": arch}, file)
        assert load_teacher("test_efficientnet", checkpoint=file).num_classes == 7


def test_an_architecture_may_have_got_another_name(tmp_path):
    saved(tmp_path / "w.pth", trained("resnet18", **SIZES).state_dict(), "swsl_resnet18", model_kwargs=SIZES)
    assert load_teacher("resnet18", checkpoint=tmp_path / "w.pth").pretrained_cfg["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"mean": [0.1, 0.2]}, r"mean=\[0\.1, 0\.2\].*1 or 3"),
        ({"std": "wide"}, "std='wide'"),
        ({"img_size": "large"}, "img_size='large'"),
        ({"img_size": -32}, "img_size=-32"),
        ({"model_kwargs": {"act_layr": "silu"}}, "resnet18.*act_layr"),
        ({"model_kwargs": {"act_layer": "swoosh"}}, "resnet18.*act_layer=swoosh"),
        ({"model_kwargs": 5}, "model_kwargs=5"),
    ],
)
def test_arguments_that_cannot_be_meant(tmp_path, args, message):
    file = saved(tmp_path / "w.pth", trained(**SIZES).state_dict(), **{"model_kwargs": SIZES} | args)
    with pytest.raises(ValueError, match=message):
        load_teacher("resnet18", checkpoint=file)


def test_only_a_model_that_is_built_by_name_takes_a_file_of_weights(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "w.pth")
    save_model(trained("test_resnet"), tmp_path / "folder")
    for model in (trained("test_resnet"), tmp_path / "folder", "hf-hub:timm/resnet18"):
        with pytest.raises(ValueError, match=r"timm name"):
            load_teacher(model, checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda raw, ema: raw("model.") | ema("ema_model."),
        lambda raw, ema: raw("") | ema("ema."),
        lambda raw, ema: {"state_dict": raw("model.") | ema("model_ema.module.") | {"loss.weight": torch.ones(3)}},
        lambda raw, ema: {"state_dict": raw("net.online.") | ema("net.ema.") | {"n_averaged": torch.tensor(3)}},
        lambda raw, ema: {"model": raw(""), "model_ema": ema("module.")},
        lambda raw, ema: {"state_dict": ema(""), "current_model_state": raw("")},  # lightning's callback
    ],
)
def test_averaged_weights_are_taken_before_others(tmp_path, wrapped):
    model = trained("test_resnet")

    def ema(prefix):
        return {prefix + name: tensor for name, tensor in model.state_dict().items()}

    def raw(prefix):
        return {name: torch.zeros_like(tensor) for name, tensor in ema(prefix).items()}

    torch.save(wrapped(raw, ema), tmp_path / "w.pth")
    assert digest(load_teacher("test_resnet", checkpoint=tmp_path / "w.pth")) == digest(model)


def test_averages_of_the_parameters_alone_are_not_all_weights(tmp_path):
    model = trained("test_resnet")
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    weights |= {f"ema.{name}": torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    torch.save(weights, tmp_path / "w.pth")
    assert digest(load_teacher("test_resnet", checkpoint=tmp_path / "w.pth")) == digest(model)


NUMPY = {
    "best": np.float64(99.5),
    "epoch": np.int32(3),
    "amp": np.bool_(True),
    "curve": np.arange(3.0),
    "rng": np.random.get_state(),
    "names": np.array(["a", "bc"]),
    "dtype": np.dtype("float32"),
}


@pytest.mark.parametrize("old", [False, True])
def test_numbers_of_numpy_are_no_damage(tmp_path, monkeypatch, old):
    model = trained("test_resnet")
    for build in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]) if old else ():  # as numpy 1 has them
        monkeypatch.setattr(build, "__module__", "numpy.core.multiarray")
    torch.save({"model": model.state_dict(), **NUMPY}, tmp_path / "w.pth")
    assert digest(load_teacher("test_resnet", checkpoint=tmp_path / "w.pth")) == digest(model)


@pytest.mark.parametrize("harmful", [np.array([print], dtype=object), {"a": print}])
def test_what_may_hold_code_is_named(tmp_path, harmful):
    torch.save({"model": trained("test_resnet").state_dict(), "a": harmful}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"cannot be loaded.*builtins.print"):
        load_teacher("test_resnet", checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("levit_128s", 224, {}),
        ("deit_tiny_distilled_patch16_224", 224, {}),
        ("tresnet_m", 64, {"width_factor": 0.25}),
        ("crossvit_9_dagger_240", 240, {}),
    ],
)
def test_heads_and_first_layers_of_all_kinds_say_the_classes_and_the_channels(tmp_path, name, size, kwargs):
    """Two heads, two first convolutions, and one that sees each image as a smaller one of more channels."""
    model = trained(name, in_chans=1, **kwargs)
    file = saved(tmp_path / "w.pth", model.state_dict(), name, model_kwargs=kwargs)
    again = load_teacher(name, checkpoint=file)
    assert (again.num_classes, again.in_chans) == (7, 1)
    save_model(again, tmp_path / "folder")
    for each in (again, load_teacher(tmp_path / "folder")):
        assert_alike(model, each, (1, size, size))
