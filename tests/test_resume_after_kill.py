"""A training process that is killed between two checkpoints, and resumed, ends where an undisturbed one does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from conftest import TinyCNN, digest
from safetensors.torch import load_file

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer


def train(folder: str, resume: bool) -> None:
    """The program that is killed: 40 steps, a checkpoint every 10."""
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
        save_steps=10,
        logging_steps=1,
        disable_tqdm=True,
    )
    NoiseKDTrainer(model, teacher, args).train(resume_from_checkpoint=resume or None)
    print("digest", digest(model), flush=True)


def start(folder: Path, resume: bool = False) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-u", __file__, str(folder), *(["--resume"] if resume else [])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def last_digest(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.split("digest ")[1].split()[0]


def test_sigkill_and_resume_is_bit_equal(tmp_path):
    whole = start(tmp_path / "whole")

    killed = start(tmp_path / "killed")
    steps = 0
    for line in killed.stdout:
        steps += "'loss'" in line
        if steps == 26:
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait(timeout=60) == -signal.SIGKILL
    killed.stdout.close()
    checkpoints = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert "checkpoint-20" in checkpoints
    assert "checkpoint-40" not in checkpoints

    resumed = start(tmp_path / "killed", resume=True)
    assert last_digest(resumed) == last_digest(whole)
    first, second = (load_file(tmp_path / run / "checkpoint-40" / "model.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":
    train(sys.argv[1], resume="--resume" in sys.argv)
