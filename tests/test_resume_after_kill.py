"""A training process that is killed, again and again, and resumed ends where an undisturbed one does."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyCNN, digest
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer


def train(folder: str, kill_at: str, number: int) -> None:
    """The program that is killed, by itself at a step or at a change of a file: 40 steps, a checkpoint every 4."""
    resume = Path(folder).exists() and any(Path(folder).iterdir())
    torch.manual_seed(0)
    teacher = TinyCNN().eval()
    model = TinyCNN()
    args = NoiseKDConfig(
        folder,
        max_steps=40,
        steps_per_epoch=12,
        per_device_train_batch_size=16,
        input_size=[1, 8, 8],
        num_calibration_images=0,
        save_steps=4,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = NoiseKDTrainer(model, teacher, args)
    if kill_at == "step":
        trainer.add_callback(KillAtStep(number))
    elif kill_at == "change":
        kill_at_change(Path(folder).resolve(), number)
    trainer.train(resume_from_checkpoint=resume or None)
    print("digest", digest(model), flush=True)


class KillAtStep(TrainerCallback):
    def __init__(self, steps: int):
        self.left = steps

    def on_substep_end(self, *args, **kwargs):
        self.on_step_end()

    def on_step_end(self, *args, **kwargs):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_change(folder: Path, changes: int) -> None:
    """Kill this process when something in a folder is about to be opened, made, renamed or removed, so many times."""
    left = changes

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree") and isinstance(args[0], str | Path):
            left -= str(args[0]).startswith(str(folder))
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(folder: Path, kill_at: str = "never", number: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-u", __file__, str(folder), kill_at, str(number)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def digest_of(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.split("digest ")[1].split()[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    return digest_of(run(folder)), load_file(folder / "checkpoint-40" / "model.safetensors")


def assert_ends_alike(folder: Path, undisturbed) -> None:
    expected, checkpoint = undisturbed
    assert digest_of(run(folder)) == expected
    found = load_file(folder / "checkpoint-40" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in checkpoint.items())


def test_sigkill_and_resume_is_bit_equal(tmp_path, undisturbed):
    assert run(tmp_path / "out", "step", 26).returncode == -signal.SIGKILL
    assert "checkpoint-24" in {path.name for path in (tmp_path / "out").iterdir()}
    assert_ends_alike(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_ten_sigkills_half_of_them_in_saves(tmp_path, undisturbed, seed):
    chance = random.Random(seed)
    moments = [("change", chance.randint(1, 12)), *(("change", chance.randint(1, 40)) for _ in range(4))]
    moments += [("step", chance.randint(1, 8)) for _ in range(5)]
    for kill_at, number in [moments[0], *chance.sample(moments[1:], k=9)]:  # the first in the first checkpoint
        done = run(tmp_path / "out", kill_at, number)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    assert_ends_alike(tmp_path / "out", undisturbed)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]))
