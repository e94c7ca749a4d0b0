import torch

from hf_noisekd.record.environment import Machine, command_line, usable_cores, versions


def test_machine_and_versions_are_named():
    here = Machine.of(torch.device("cpu"))
    assert here.processor
    assert here.cores == usable_cores() >= 1
    assert here.accelerator is None
    assert Machine.of(torch.device("mps")).accelerator == "mps"
    assert str(Machine(processor="P", cores=2)) == "2 cores of P"
    assert str(Machine(processor="P", cores=1)) == "1 core of P"
    assert str(Machine(processor="P", cores=1, accelerator="H100")) == "H100"
    assert str(Machine()) == ""
    assert {"python", "torch", "timm", "transformers"} <= set(versions())


def test_a_command_is_fit_to_be_published(tmp_path):
    (tmp_path / "teacher").mkdir()
    secret = "hf_" + "a" * 30
    argv = ["/home/mia/bin/noisekd", "distill", "--teacher", str(tmp_path / "teacher"), f"--hub-token={secret}"]
    assert command_line(argv) == "noisekd distill --teacher teacher --hub-token=REDACTED"
    assert (
        command_line(["/x/hf_noisekd/cli/__main__.py", "push", "--hub-token", "abc"])
        == "noisekd push --hub-token REDACTED"
    )
    assert command_line(["recipes/digits.py", "--seed", "1", secret]) == "python recipes/digits.py --seed 1 REDACTED"
    assert command_line(["/home/mia/train.py", "--output-dir=/home/mia/my runs/a b"]) == (
        "python train.py '--output-dir=a b'"
    )
    assert (
        command_line(["train.py", "--teacher", "org/name", "~/x", "../y/z"]) == "python train.py --teacher org/name x z"
    )
    assert command_line(["noisekd", "info", "--teacher", "local-dir:/home/mia/t"]) == "noisekd info --teacher t"
    for script in ("/usr/lib/ipykernel_launcher.py", "-c", "/usr/lib/pytest/__main__.py", ""):
        assert command_line([script, "-f", "/home/mia/kernel.json"]) is None
