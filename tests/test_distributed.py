"""Two real processes over gloo: each draws its own noise, both hold one student, one writes, images count once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyCNN, digest
from torch.utils.data import TensorDataset

from hf_noisekd import NoiseDataset, NoiseKDConfig, NoiseKDTrainer, evaluate
from hf_noisekd.calibration import calibration_images as calibration
from hf_noisekd.record.schema import ImagesFacts
from hf_noisekd.training import ending
from hf_noisekd.training.training_data import of_first_process

STEPS = 5


def models():
    torch.manual_seed(0)
    return TinyCNN(), TinyCNN().eval()


def images():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(50, 1, 8, 8, generator=generator), torch.arange(50) % 3)


def config(folder) -> NoiseKDConfig:
    return NoiseKDConfig(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        input_size=[1, 8, 8],
        num_calibration_images=0,
        save_steps=STEPS,
        logging_steps=2,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )


def run(folder: Path) -> None:
    """What each process does; it reports into a file of its own."""
    drawn, written = [], []
    draw = NoiseDataset.draw

    def record_draw(self, step):
        batch = draw(self, step)
        drawn.append((self.rank, step, round(batch.double().sum().item(), 6)))
        return batch

    NoiseDataset.draw = record_draw
    student, teacher = models()
    before = digest(teacher)
    trainer = NoiseKDTrainer(student, teacher, config(folder / "out"), eval_dataset=images())
    save = trainer._save
    trainer._save = lambda *args, **kwargs: (written.append(trainer.args.should_save), save(*args, **kwargs))
    trainer.train()
    metrics = trainer.evaluate()
    rank = trainer.args.process_index
    report = {
        "world_size": trainer.args.world_size,
        "drawn": [*drawn],
        "parameters": [parameter.double().sum().item() for parameter in student.parameters()],
        "digest": digest(student),
        "teacher_unchanged": digest(teacher) == before,
        "teacher_wrapped": type(trainer.teacher_model).__name__ != "TinyCNN",
        "written": written,
        "metrics": metrics,
        "samples": round(metrics["eval_samples_per_second"] * metrics["eval_runtime"]),
        "log": trainer.state.log_history,
        "recalibrated": recalibrated(trainer),
        "images": images_of_first(trainer),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()  # its threads would rarely abort a process that ends before the other


def recalibrated(trainer) -> list[str]:
    """Return the student's digests after a recalibration, and after one that fails on the second rank."""
    digests = []
    calibration.CalibrationImages.measure_self_agreement = lambda *_: (
        100.0
    )  # a teacher with random weights vouches for nothing
    trainer.args.num_calibration_images = 16
    options = {"input_size": (1, 8, 8), "steps": 2, "max_steps": 2}
    for seed in (0, 1):
        if seed and trainer.args.process_index == 1:
            ending.measured = None
        trainer.images = calibration.calibration_images(trainer.teacher_model, 16, seed=seed, **options)
        trainer._end()
        digests.append(digest(trainer.model))
    return digests


def images_of_first(trainer) -> list[float]:
    """Return what each process has of images that were made otherwise in each."""
    pixels = torch.full((2, 1, 8, 8), float(trainer.args.process_index + 5))
    made = calibration.CalibrationImages(pixels, pixels, 2)
    given = calibration.CalibrationImages(pixels, pixels, 2, given=ImagesFacts(images=4), made=made)
    return [batch.mean().item() for batch in of_first_process(given, trainer.args)]


@pytest.fixture(scope="module", params=["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def reports(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    launcher = {
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }[request.param]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-m", *launcher, __file__, str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_there_are_two_processes(reports):
    assert [report["world_size"] for report in reports[1]] == [2, 2]


def test_each_rank_draws_its_own_noise_and_only_its_own(reports):
    _, (first, second) = reports
    assert [draw[:2] for draw in first["drawn"]] == [[0, step] for step in range(STEPS)]
    assert [draw[:2] for draw in second["drawn"]] == [[1, step] for step in range(STEPS)]
    assert not {draw[2] for draw in first["drawn"]} & {draw[2] for draw in second["drawn"]}
    alone = NoiseDataset((1, 8, 8), 16, rank=1, seed=config(reports[0]).seed, distribution="structured").draw(3)
    # The processes have one thread each, so the sums in the noise may be rounded otherwise.
    assert second["drawn"][3][2] == pytest.approx(alone.double().sum().item(), abs=1e-3)


def test_both_ranks_hold_the_same_student_and_an_untouched_teacher(reports):
    _, (first, second) = reports
    assert first["parameters"] == second["parameters"]
    assert first["digest"] == second["digest"]
    for report in (first, second):
        assert report["teacher_unchanged"]
        assert not report["teacher_wrapped"]


def test_ranks_recalibrate_alike_or_not_at_all(reports):
    _, (first, second) = reports
    assert first["recalibrated"] == second["recalibrated"]
    assert first["digest"] not in first["recalibrated"]
    assert first["recalibrated"][0] == first["recalibrated"][1]


def test_both_ranks_have_the_images_of_the_first(reports):
    assert [report["images"] for report in reports[1]] == [[5.0, 5.0]] * 2


def test_gradients_are_means_over_both_ranks(reports):
    """Training alone on the same noise as rank 0 ends elsewhere; the second rank took part."""
    student, teacher = models()
    NoiseKDTrainer(student, teacher, config(reports[0] / "alone")).train()
    assert [p.double().sum().item() for p in student.parameters()] != reports[1][0]["parameters"]


def test_only_rank_0_writes(reports):
    folder, (first, second) = reports
    assert any(first["written"])
    assert not any(second["written"])
    assert {path.name for path in (folder / "out").iterdir()} == {f"checkpoint-{STEPS}", "model.safetensors"}


def test_evaluation_counts_each_image_once_and_agrees_with_one_process(reports):
    folder, (first, second) = reports
    assert first["samples"] == 50
    student = TinyCNN()
    from safetensors.torch import load_file

    student.load_state_dict(load_file(folder / "out" / f"checkpoint-{STEPS}" / "model.safetensors"))
    alone = evaluate(student.eval(), images(), teacher_model=models()[1], batch_size=16)
    for statistics, scores in alone.items():
        for name, value in scores.items():
            for report in (first, second):
                assert report["metrics"][f"eval_{statistics}_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_both_ranks_log_the_same_means(reports):
    _, (first, second) = reports
    entries = [[entry for entry in report["log"] if "agreement" in entry] for report in (first, second)]
    assert entries[0]
    for one, other in zip(*entries, strict=True):
        assert one["agreement"] == other["agreement"]
        assert one["class_balance"] == other["class_balance"]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
