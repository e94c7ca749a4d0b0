import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import TinyCNN, made_by_noise
from harness.cards import read_runs
from torch.utils.data import TensorDataset

from hf_noisekd import NoiseDataset, NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.record.environment import Machine
from hf_noisekd.record.plain import to_dict
from hf_noisekd.record.schema import (
    Evaluation,
    ImagesFacts,
    ModelFacts,
    NoiseFacts,
    Provenance,
    Record,
    better_statistics,
    current_evaluations,
    read_record,
    write_record,
)


def config(tmp_path, **options):
    shared = {"per_device_train_batch_size": 8, "input_size": [1, 8, 8], "disable_tqdm": True}
    shared |= {"num_calibration_images": 0}
    return NoiseKDConfig(str(tmp_path / "out"), **shared | options)


def evaluation(dataset="a", step=10, batch=50.0, running=50.0, **facts) -> Evaluation:
    scores = {"running": {"accuracy": running}, "batch": {"accuracy": batch}}
    return Evaluation(
        **{"dataset": dataset, "step": step, "images": 9, "batch_size": 9, "precision": "float32"} | scores | facts
    )


def made(dataset, step, accuracy, in_training=True):
    return evaluation(dataset, step, accuracy), in_training


def record(**facts) -> Record:
    model = ModelFacts(architecture="resnet", library="timm", parameters=3, input_size=[1, 8, 8])
    return Record(**{"model": model, "steps": 10, "noisekd": made_by_noise()} | facts)


def test_a_record_is_read_as_it_was_written(tmp_path):
    noise = NoiseFacts(
        distribution="white", mean=0.0, std=1.0, input_size=[1, 8, 8], image_sizes=[[[8, 8], 1.0]], seed=0
    )
    whole = record(
        noisekd=made_by_noise(noise=noise, real_images=ImagesFacts(images=5, dataset="d"), versions={"torch": "2"}),
        evaluations=[evaluation(split="test"), evaluation("b", log_prefix="eval")],
        curve=[{"loss": 1.0, "step": 5}, {"loss": 0.5, "step": 10}],
        machine=Machine(processor="P", cores=2),
        class_frequencies=[0.25, 0.75],
    )
    write_record(whole, tmp_path)
    assert read_record(tmp_path) == whole
    text = (tmp_path / "noisekd.json").read_text()
    assert json.loads(text)["noisekd"]["teacher"] == {"architecture": "resnet", "parameters": 12}
    assert "null" not in text


def test_what_the_schema_does_not_know_is_kept_and_what_it_needs_is_missed(tmp_path):
    data = to_dict(record()) | {"of_a_later_version": 1}
    data["noisekd"] |= {"adversarial_steps": 0}
    (tmp_path / "noisekd.json").write_text(json.dumps(data))
    known = read_record(tmp_path)
    assert (known.steps, known.noisekd.teacher) == (record().steps, record().noisekd.teacher)
    write_record(known, tmp_path)
    assert json.loads((tmp_path / "noisekd.json").read_text()) == data, "a fact was lost"
    for name, part, missing in (
        ("noisekd", "teacher", "Provenance .*'teacher'"),
        ("model", "library", "'library'"),
    ):
        broken = data | {name: {key: value for key, value in data[name].items() if key != part}}
        (tmp_path / "noisekd.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=f"noisekd.json is damaged: .*{missing}"):
            read_record(tmp_path)
    (tmp_path / "noisekd.json").write_text(json.dumps(data | {"model": 3}))
    with pytest.raises(ValueError, match=r"ModelFacts .*int"):
        read_record(tmp_path)


@pytest.mark.parametrize("damage", [{"steps": "many"}, {"evaluations": 3}, {"machine": []}, {"command": {}}])
def test_a_damaged_record_is_refused(tmp_path, damage):
    (tmp_path / "noisekd.json").write_text(json.dumps(to_dict(record()) | damage))
    with pytest.raises(ValueError, match=f"noisekd.json is damaged: .*({next(iter(damage))}|Machine) must be"):
        read_record(tmp_path)


def test_each_run_of_a_results_file_has_what_they_share(tmp_path):
    shared = {"commit": "abc", "versions": {"torch": "2"}, "machine": {"processor": "P", "cores": 1}, "seed": 3}
    runs = [to_dict(record(name="a")), to_dict(record(name="b", noisekd=None))]
    (tmp_path / "results.json").write_text(json.dumps(shared | {"runs": runs}))
    first, second = read_runs(tmp_path / "results.json")
    assert first == record(name="a", commit="abc", versions={"torch": "2"}, machine=Machine(processor="P", cores=1))
    assert (second.name, second.noisekd) == ("b", None)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_model_says_how_it_was_made_until_it_is_told_not_to(tiny_cnn, library):
    if library == "transformers":
        tiny_cnn.config = SimpleNamespace(noisekd=to_dict(made_by_noise(seed=7)))
        assert Provenance.of(tiny_cnn).seed == 7
    made_by_noise(seed=5).attach(tiny_cnn)
    assert Provenance.of(tiny_cnn) == made_by_noise(seed=5)
    Provenance.detach(tiny_cnn)
    assert Provenance.of(tiny_cnn) is None


def test_the_better_statistics_are_those_of_the_last_labelled_images():
    on_noise = Evaluation(
        dataset="noise", images=9, batch_size=9, step=1, precision="float32", running={"kl": 1.0}, batch={"kl": 0.1}
    )
    better = partial(better_statistics, taught_on_batch=True)
    assert better([]) == better([on_noise]) == "batch"
    assert better_statistics([], taught_on_batch=False) == "running"
    assert better([evaluation(batch=51.1), on_noise]) == "batch"
    assert better([evaluation(batch=51.0)]) == "running", "a point is not enough"
    assert better([evaluation(batch=90.0), evaluation(batch=10.0)]) == "running"
    assert better_statistics([evaluation(batch=90.0)], taught_on_batch=False) == "batch"


def test_a_measurement_takes_the_place_of_that_of_the_same_images():
    trained = evaluation("d", log_prefix="eval")
    other, new = evaluation("d", split="train"), evaluation("d", split="test", batch=70.0)
    measured = record(evaluations=[trained, other]).measured(new)
    assert measured.evaluations == [other, evaluation("d", split="test", batch=70.0, log_prefix="eval")]


def test_nothing_that_was_measured_holds_for_other_running_statistics():
    known = {"evaluations": [evaluation()], "curve": [{"step": 1}], "repo_id": "a/b", "command": "noisekd"}
    new = made_by_noise(batch_norm="running")
    assert record(**known).recalibrated(new) == record(noisekd=new, command="noisekd")


def test_the_evaluation_that_counts_is_the_one_of_the_weights_as_they_are():
    def accuracies(evaluations, step=10):
        return {entry.dataset: entry.batch["accuracy"] for entry in current_evaluations(evaluations, step)}

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
    known = trainer.record()
    noise, labelled = known.evaluations
    assert (noise.dataset, noise.images, noise.batch_size) == ("noise", 12, 4)
    assert (labelled.dataset, labelled.images, labelled.batch_size) == ("images", 20, 16)
    assert noise.batch.keys() == {"agreement", "kl"}
    assert labelled.precision == "bfloat16"
    assert labelled.step == known.steps == known.noisekd.steps == trainer.state.best_global_step
    entry = next(e for e in known.curve if "eval_images_batch_accuracy" in e and e["step"] == labelled.step)
    assert entry["eval_images_batch_accuracy"] == pytest.approx(labelled.batch["accuracy"], abs=1e-3)
    metrics = trainer.evaluate("images")
    again = trainer.record().evaluations[1]
    assert (again.precision, again.log_prefix, again.step) == ("float32", "eval", known.steps)
    assert again.batch["accuracy"] == pytest.approx(metrics["eval_batch_accuracy"], abs=1e-3)
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
    known = trainer.record()
    assert [known.steps, known.evaluations[0].step, Provenance.of(trainer.model).steps] == [4, 4, 4]
    trainer.evaluate()
    assert trainer.record().evaluations[0].step == 4


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
    known = run.record()
    assert (known.steps, known.noisekd.batch_size, known.noisekd.seed) == (2, 16, 3)
    assert known.seconds >= 0
    assert known.images_per_second > 0
    assert known.evaluations == []
    again = trainer(4)
    again.train(resume_from_checkpoint=True)
    assert again.record().seconds is None, "they are those of the last part only"
    assert again.record().noisekd.teacher == known.noisekd.teacher
