import pytest
import torch
from conftest import TinyCNN
from torch.utils.data import TensorDataset

from hf_noisekd import NoiseDataset, NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.release.record import current_evaluations


def config(tmp_path, **options):
    shared = {"per_device_train_batch_size": 8, "input_size": [1, 8, 8], "disable_tqdm": True}
    return NoiseKDConfig(str(tmp_path / "out"), **shared | options)


def made(dataset, step, accuracy, in_training=True):
    return {"dataset": dataset, "step": step, "batch": {"accuracy": accuracy}, "in_training": in_training}


def test_the_evaluation_that_counts_is_the_one_of_the_weights_as_they_are():
    def accuracies(evaluations, step=10):
        return {entry["dataset"]: entry["batch"]["accuracy"] for entry in current_evaluations(evaluations, step)}

    history = [made("a", 5, 50.0), made("b", 5, 20.0), made("a", 10, 40.0), made("b", 10, 30.0)]
    assert accuracies(history) == {"a": 40.0, "b": 30.0}
    assert accuracies(history, step=5) == {"a": 50.0, "b": 20.0}, "the best weights were loaded at the end"
    history.append(made("a", 5, 51.0, in_training=False))
    assert accuracies(history, step=5) == {"a": 51.0, "b": 20.0}
    assert accuracies([]) == {}


def test_evaluations_tell_what_they_are_of(tiny_cnn, tmp_path):
    images = TensorDataset(torch.randn(20, 1, 8, 8), torch.arange(20) % 3)
    args = config(
        tmp_path,
        max_steps=4,
        per_device_eval_batch_size=16,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_images_batch_accuracy",
        bf16=True,
    )
    datasets = {"noise": NoiseDataset((1, 8, 8), 4, 3, held_out=True), "images": images}
    trainer = NoiseKDTrainer(TinyCNN(), tiny_cnn, args, eval_dataset=datasets)
    trainer.train()
    record = trainer.record()
    noise, labelled = record["evaluations"]
    assert (noise["dataset"], noise["images"], noise["batch_size"]) == ("noise", 12, 4)
    assert (labelled["dataset"], labelled["images"], labelled["batch_size"]) == ("images", 20, 16)
    assert noise["batch"].keys() == {"agreement", "kl"}
    assert labelled["precision"] == "bfloat16"
    assert labelled["step"] == record["steps"] == record["noisekd"]["steps"] == trainer.state.best_global_step
    entry = next(e for e in record["curve"] if "eval_images_batch_accuracy" in e and e["step"] == labelled["step"])
    assert entry["eval_images_batch_accuracy"] == pytest.approx(labelled["batch"]["accuracy"], abs=1e-3)
    metrics = trainer.evaluate("images")
    again = trainer.record()["evaluations"][1]
    assert (again["precision"], again["log_prefix"], again["step"]) == ("float32", "eval", record["steps"])
    assert again["batch"]["accuracy"] == pytest.approx(metrics["eval_batch_accuracy"], abs=1e-3)
    trainer.create_model_card()
    assert "Accuracy on images against" in (tmp_path / "out" / "README.md").read_text()


def test_a_record_is_of_the_weights_that_were_loaded_as_the_best(tiny_cnn, tmp_path):
    args = config(
        tmp_path,
        max_steps=6,
        per_device_eval_batch_size=8,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=4,
        load_best_model_at_end=True,
    )
    trainer = NoiseKDTrainer(TinyCNN(), tiny_cnn, args)
    # The best of the saved ones is at step 4, and a better one, at step 5, is not saved.
    agreements = iter([10.0, 20.0, 30.0, 40.0, 50.0, 20.0])
    evaluate = trainer.evaluation_loop

    def evaluation_loop(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_batch_agreement"] = next(agreements, 0.0)
        return output

    trainer.evaluation_loop = evaluation_loop
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    record = trainer.record()
    assert [record["steps"], record["evaluations"][0]["step"], trainer.model.noisekd["steps"]] == [4, 4, 4]
    trainer.evaluate()
    assert trainer.record()["evaluations"][0]["step"] == 4


def test_a_record_is_of_this_run(tiny_cnn, tmp_path):
    def trainer(max_steps):
        args = config(
            tmp_path,
            max_steps=max_steps,
            gradient_accumulation_steps=2,
            eval_noise_batches=1,
            save_steps=2,
            seed=3,
            logging_steps=1,
        )
        return NoiseKDTrainer(TinyCNN(), tiny_cnn, args)

    run = trainer(2)
    run.train()
    record = run.record()
    assert (record["steps"], record["noisekd"]["batch_size"], record["noisekd"]["seed"]) == (2, 16, 3)
    assert record["seconds"] >= 0
    assert record["images_per_second"] > 0
    assert record["evaluations"] == []
    again = trainer(4)
    again.train(resume_from_checkpoint=True)
    assert "seconds" not in again.record(), "they are those of the last part only"
    assert again.record()["noisekd"]["teacher"] == record["noisekd"]["teacher"]
