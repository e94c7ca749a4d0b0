import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from hf_noisekd.files import check_output_file, json_text, naming_full_disk, read_json, replacing_files
from hf_noisekd.models.loading import load_teacher


def test_json_can_be_compared_line_by_line():
    value = {"a": 1, "b": None, "sizes": [0.1, 1e-5], "curve": [{"step": 1, "loss": 0.5}], "none": {}, "é": "\n"}
    text = json_text(value)
    assert json.loads(text) == value
    assert list(json.loads(text)) == list(value)
    assert text.splitlines()[:4] == ["{", ' "a": 1,', ' "b": null,', ' "sizes": [']


def test_json_has_null_in_place_of_what_is_no_number(tmp_path):
    value = {"loss": float("nan"), "sizes": [1.5, -float("inf")], "curve": [{"grad_norm": float("inf"), "step": 1}]}
    expected = {"loss": None, "sizes": [1.5, None], "curve": [{"grad_norm": None, "step": 1}]}
    assert json.loads(json_text(value), parse_constant=pytest.fail) == expected
    (tmp_path / "old.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "old.json") == expected


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail(folder):
        with replacing_files(folder) as staging:
            (staging / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "a" / "model")
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "old"]


def test_what_is_no_matter_of_the_disk_is_raised_as_it_is(tmp_path):
    def fail(error):
        with replacing_files(tmp_path / "model"):
            raise error

    for error in (RuntimeError("serializing: I/O error: x (os error 13)"), OSError(13, "no matter")):
        with pytest.raises(type(error)) as raised:
            fail(error)
        assert raised.value is error


@pytest.mark.parametrize("error", [OSError(28, "no space"), RuntimeError("serializing: I/O error: x (os error 28)")])
def test_a_full_disk_is_named(tmp_path, error):
    with (
        pytest.raises(OSError, match=rf"(?i)no space left on device while writing {tmp_path / 'model'}"),
        replacing_files(tmp_path / "model"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 10_000])  # less and more than a buffer
def test_a_full_disk_is_named_though_torch_does_not(tmp_path, size):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="No space left on device while"), naming_full_disk(tmp_path):
            torch.save(torch.zeros(size), tmp_path / "tensor.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_another_process_makes_meanwhile_is_filled(tmp_path):
    """As with the checkpoint of several processes, of which each writes a file of its own."""
    with replacing_files(tmp_path / "checkpoint-1") as staging:
        (staging / "model.safetensors").write_text("weights")
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "rng_state_1.pth").write_text("rank 1")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-1", "model.safetensors", "rng_state_1.pth"]


SAVES = """
import sys, timm, torch, hf_noisekd
from hf_noisekd.models.saving import save_model
model = timm.create_model("resnet18", num_classes=10)
for number in range(1_000_000):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(number % 100)
    save_model(model, sys.argv[1])
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path):
    """All tensors of a version are equal, so a mixture would show."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SAVES, str(tmp_path / "model")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            process.stdout.readline()
        time.sleep(random.random() / 5)
        process.send_signal(signal.SIGKILL)
    values = {tensor.flatten()[0].item() for tensor in load_teacher(tmp_path / "model").state_dict().values()}
    assert len(values) == 1


def test_only_an_ordinary_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(ValueError, match=f"{path} .*file"):
            check_output_file(path)
    check_output_file(tmp_path / "new.onnx")
