import torch
from conftest import TinyCNN
from torch.utils.data import TensorDataset

from hf_noisekd import NoiseDataset, NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.record import command_line, evaluations_in, machine, versions


def test_machine_and_versions_are_named():
    assert machine()["processor"]
    assert machine()["cores"] >= 1
    assert {"python", "torch", "timm", "transformers"} <= set(versions())


def test_a_command_is_fit_to_be_published(tmp_path):
    (tmp_path / "teacher").mkdir()
    secret = "hf_" + "a" * 30
    argv = ["/home/mia/bin/noisekd", "distill", "--teacher", str(tmp_path / "teacher"), f"--hub-token={secret}"]
    assert command_line(argv) == "noisekd distill --teacher teacher --hub-token=***"
    assert command_line(["/x/hf_noisekd/cli.py", "push", "--hub-token", "abc"]) == "noisekd push --hub-token ***"
    assert command_line(["recipes/digits.py", "--seed", "1", secret]) == "python digits.py --seed 1 ***"
    assert command_line(["/home/mia/train.py", "--output-dir=/home/mia/my runs/a b"]) == (
        "python train.py '--output-dir=a b'"
    )
    assert (
        command_line(["train.py", "--teacher", "org/name", "~/x", "../y/z"]) == "python train.py --teacher org/name x z"
    )
    for script in ("/usr/lib/ipykernel_launcher.py", "-c", "/usr/lib/pytest/__main__.py", ""):
        assert command_line([script, "-f", "/home/mia/kernel.json"]) is None


def entry(step, **metrics):
    return {"step": step, "eval_runtime": 1.0} | {f"eval_{name}": value for name, value in metrics.items()}


def test_the_evaluation_that_counts_is_the_one_of_the_weights_as_they_are():
    data = TensorDataset(torch.zeros(20, 1, 8, 8))
    history = [entry(5, batch_accuracy=50.0), entry(10, batch_accuracy=40.0), {"step": 10, "train_runtime": 3.0}]
    assert evaluations_in(history, data, 16, None)[0]["batch"] == {"accuracy": 40.0}
    # The best weights were loaded at the end of the training.
    best = evaluations_in(history, data, 16, 5)[0]
    assert (best["batch"], best["step"], best["images"], best["batch_size"]) == ({"accuracy": 50.0}, 5, 20, 16)
    history.append(entry(10, batch_accuracy=51.0))
    assert evaluations_in(history, data, 16, 5)[0]["batch"] == {"accuracy": 51.0}
    assert evaluations_in([], data, 16, None) == []


def test_evaluations_of_several_data_sets_are_told_apart():
    data = {"a": TensorDataset(torch.zeros(20, 1, 8, 8)), "b": NoiseDataset((1, 8, 8), 4, 3)}
    history = [
        {"step": 5, "eval_a_runtime": 1.0, "eval_a_running_accuracy": 1.0},
        {"step": 5, "eval_b_runtime": 1.0, "eval_b_running_agreement": 2.0},
    ]
    first, second = evaluations_in(history, data, 16, None)
    assert (first["dataset"], first["running"]) == ("a", {"accuracy": 1.0})
    assert (second["dataset"], second["images"], second["batch_size"]) == ("held-out noise", 12, 4)


def test_a_record_is_of_this_run(tiny_cnn, tmp_path):
    def trainer(max_steps):
        args = NoiseKDConfig(
            str(tmp_path / "out"),
            max_steps=max_steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            input_size=[1, 8, 8],
            eval_noise_batches=1,
            save_steps=2,
            seed=3,
            logging_steps=1,
            disable_tqdm=True,
        )
        return NoiseKDTrainer(TinyCNN(), tiny_cnn, args)

    run = trainer(2)
    run.train()
    record = run.record()
    assert (record["steps"], record["noisekd"]["batch_size"], record["noisekd"]["seed"]) == (2, 16, 3)
    assert record["seconds"] > 0
    assert record["evaluations"] == []
    again = trainer(4)
    again.train(resume_from_checkpoint=True)
    assert "seconds" not in again.record(), "they are those of the last part only"
    assert again.record()["noisekd"]["teacher"] == record["noisekd"]["teacher"]
