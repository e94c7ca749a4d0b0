"""Students go to a Hub, a real one as far as the client can tell, and come back; nothing is lost when it fails."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch.utils.data import TensorDataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer
from hf_noisekd.cli.__main__ import main
from hf_noisekd.models.loading import load_student, load_teacher, model_folder
from hf_noisekd.models.saving import save_model
from hf_noisekd.record.plain import from_dict
from hf_noisekd.record.schema import Record, read_record
from hf_noisekd.release.hub import HubError, check_hub_access
from hf_noisekd.release.push import push_model
from hf_noisekd.training.classifier_trainer import ClassifierTrainer
from hf_noisekd.training.config import ClassifierConfig

FILES = {"config.json", "model.safetensors", "README.md", "noisekd.json", "curves.png", "class_balance.png"}


def teacher(in_chans=3):
    torch.manual_seed(0)
    cfg = {
        "input_size": (in_chans, 32, 32),
        "mean": (0.4,) * in_chans,
        "std": (0.3,) * in_chans,
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "num_classes": 10,
        "label_names": [f"class {index}" for index in range(10)],
    }
    model = timm.create_model("resnet10_cifar", width=8, in_chans=in_chans, pretrained_cfg_overlay=cfg)
    model.origin = {"license": "mit"}
    return model


def images(in_chans=3, count=4):
    """PIL images, of another size than the models'."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 48, in_chans), dtype=np.uint8)
    return [Image.fromarray(array.squeeze()) for array in pixels]


def trainer(folder, student="resnet10_cifar", in_chans=3, **options):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "num_calibration_images": 0,
        "disable_tqdm": True,
        "bf16": False,
    }
    args = NoiseKDConfig(str(folder / "student"), **defaults | options)
    data = TensorDataset(torch.randn(16, in_chans, 32, 32), torch.arange(16) % 10)
    if student == "resnet10_cifar":
        student = timm.create_model(
            student, width=8, in_chans=in_chans, pretrained_cfg_overlay={"input_size": (in_chans, 32, 32)}
        )
    return NoiseKDTrainer(student, teacher(in_chans), args, eval_dataset=data)


@pytest.mark.parametrize(
    ("student", "in_chans"),
    [("resnet10_cifar", 3), ("resnet10_cifar", 1), ("resnet18", 3), ("mobilenetv3_small_100", 3)],
)
def test_what_is_pushed_is_pulled_by_timm_and_transformers(hub, tmp_path, student, in_chans):
    run = trainer(tmp_path, student, in_chans, push_to_hub=True, hub_model_id="alice/student", hub_strategy="end")
    run.train()
    run.push_to_hub()
    assert set(hub.repo("alice/student").head["files"]) == FILES | {".gitattributes"}
    # The trainer's memory format rounds otherwise than that of a model that was just loaded.
    model = run.model.eval().to(memory_format=torch.contiguous_format)

    from_timm = timm.create_model("hf-hub:alice/student", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=from_timm))
    inputs = torch.stack([transform(image) for image in images(in_chans)])
    with torch.no_grad():
        expected = model(inputs)
        assert torch.equal(from_timm(inputs), expected)
        assert torch.equal(load_teacher("alice/student").eval()(inputs), expected)
    # The teacher's preprocessing, not the architecture's.
    assert from_timm.pretrained_cfg["license"] == "mit"
    assert from_timm.pretrained_cfg["mean"] == [0.4] * in_chans
    assert (from_timm.pretrained_cfg["crop_pct"], from_timm.pretrained_cfg["interpolation"]) == (0.9, "bilinear")

    processor = AutoImageProcessor.from_pretrained("alice/student")
    # A copy: transformers leaves the weights in the mapped file, where they begin at other addresses, and on one thread
    # the kernels for those round otherwise.
    from_transformers = copy.deepcopy(AutoModelForImageClassification.from_pretrained("alice/student").eval())
    processed = processor(images(in_chans), return_tensors="pt")
    assert torch.equal(processed["pixel_values"], inputs)
    with torch.no_grad():
        assert torch.equal(from_transformers(**processed).logits, expected)
    assert from_transformers.config.id2label[3] == "class 3"

    if in_chans == 1:  # a pipeline makes all images RGB; the card says what to do
        from torchvision.transforms import Grayscale

        processor.val_transforms.transforms.insert(0, Grayscale())
    classify = pipeline("image-classification", model="alice/student", image_processor=processor, top_k=10)
    for answer, logits in zip(classify(images(in_chans)), expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        probs = logits.softmax(-1)
        assert [scores[f"class {index}"] for index in range(10)] == pytest.approx(probs.tolist(), abs=1e-6)


def test_the_pushed_card_names_the_repository_and_passes_the_hubs_checks(hub, tmp_path):
    run = trainer(tmp_path, hub_model_id="alice/student")
    run.train()
    run.push_to_hub(tags="digits")
    card = ModelCard.load("alice/student", ignore_metadata_errors=False)
    pushed = json.loads(hub.repo("alice/student").read("noisekd.json"))
    assert read_record(model_folder("alice/student")[0]) == from_dict(Record, pushed)
    assert ("POST", "/api/validate-yaml") in hub.requests
    assert "hf-hub:alice/student" in card.text
    probs = []
    for block in re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL):
        namespace = {"images": images()}
        exec(compile(block, "README.md", "exec"), namespace)
        probs += [namespace["probs"]] if "probs" in namespace else []
    torch.testing.assert_close(*probs, rtol=0, atol=1e-6)
    assert card.data.license == "mit"
    assert "digits" in card.data.tags
    assert len(card.data.eval_results) == 2
    assert card.data.model_name == "student"


def test_only_what_belongs_to_the_student_is_pushed(hub, tmp_path):
    run = trainer(tmp_path, hub_model_id="alice/student", hub_token="hf_write", save_strategy="steps", save_steps=1)
    run.train()
    for name in ("patients.csv", "training_args.bin"):
        Path(run.args.output_dir, name).write_text("private")
    run.push_to_hub()
    assert set(hub.repo("alice/student").head["files"]) == FILES | {".gitattributes"}
    pushed = b"".join(hub.repo("alice/student").read(name) for name in FILES)
    assert b"hf_write" not in pushed
    assert str(tmp_path).encode() not in pushed


def test_a_student_is_pushed_at_the_end(hub, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, push_to_hub=True, hub_model_id="student", hub_private_repo=True, **saving)
    run.train()
    repo = hub.repo("alice/student")
    assert repo.private
    assert "config.json" not in repo.head["files"]
    assert run.push_to_hub(blocking=False).result()
    assert repo.commits[-1]["title"] == "End of training"
    assert set(repo.head["files"]) >= FILES
    with pytest.raises(ValueError, match="hub_strategy"):
        trainer(tmp_path, push_to_hub=True, hub_strategy="every_save")


FAILURES = [
    (401, "hf auth login"),
    (403, "write access to this organisation"),
    (409, "at the same time"),
    (429, "too many requests"),
    (500, "later"),
    ("cut", "connection"),
]


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(("failure", "message"), FAILURES)
def test_a_failing_push_at_the_end_loses_nothing_and_says_how_to_push_again(hub, tmp_path, failure, message):
    run = trainer(tmp_path, hub_model_id="alice/student")
    run.train()
    hub.fail(failure, path_pattern="/commit/", times=None)
    with pytest.raises(HubError, match=message) as raised:
        run.push_to_hub()
    command = re.search(r"noisekd push --model (\S+) --repo-id (\S+)`", str(raised.value))
    assert command, raised.value
    hub.clear_failures()
    assert "config.json" not in hub.repo("alice/student").head["files"]
    push_model(*command.groups())
    inputs = torch.randn(2, 3, 32, 32)
    again = load_teacher("alice/student").eval()
    with torch.no_grad():
        assert torch.equal(again(inputs), load_teacher(run.args.output_dir).eval()(inputs))
        torch.testing.assert_close(again(inputs), run.model.eval()(inputs), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student in a folder, with its card."""
    run = trainer(tmp_path_factory.mktemp("run"), max_steps=1, eval_strategy="no")
    run.train()
    run.create_model_card()
    return Path(run.args.output_dir)


# What another model has in a repository: that which a loader would take for the student's, or a reader would miss.
OF_ANOTHER = [
    {"README.md": b"# Written by hand\n"},
    {"README.md": b"---\nlicense: mit\ntags: [vision]\n---\n# Written by hand\n"},
    {"config.json": b'{"model_type": "resnet"}'},
    {"config.json": b"[]"},
    {"README.md": b"by hand", "config.json": b"{}", "pytorch_model.bin": b"1", "preprocessor_config.json": b"{}"},
    {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"1", "tf_model.h5": b"1"},
    {"flax_model.msgpack": b"1", "adapter_config.json": b"{}"},
]


@pytest.mark.parametrize("files", OF_ANOTHER)
def test_another_model_is_replaced_whole_and_only_if_that_is_wanted(hub, student, files, capsys):
    kept = {"LICENSE": b"mit", "onnx/model.onnx": b"1", "notes.txt": b"1"}
    before = hub.create_repo("alice/there", files=files | kept).head
    command = ["push", "--model", str(student), "--repo-id", "alice/there"]
    assert main(command) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(name in line for name in files), line
    assert " --overwrite" in line
    assert "hub_overwrite" not in line
    assert hub.repo("alice/there").head == before
    assert main([*command, "--overwrite"]) == 0
    assert len(hub.repo("alice/there").commits) == 2, "what is added and what is removed are one commit"
    assert set(hub.repo("alice/there").head["files"]) == {*(FILES - {"curves.png"}), ".gitattributes", *kept}
    assert load_teacher("alice/there").noisekd


def test_an_earlier_student_is_replaced_whole_without_more_words(hub, student, caplog):
    push_model(student, "alice/student")
    earlier = dict(hub.repo("alice/student").head["files"])
    shards = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"1"}
    # As a student of transformers leaves them.
    hub.create_repo("alice/student", files=earlier | shards | {"preprocessor_config.json": b"{}", "curves.png": b"1"})
    push_model(student, "alice/student")
    assert set(hub.repo("alice/student").head["files"]) == {*(FILES - {"curves.png"}), ".gitattributes"}
    for name in (*shards, "preprocessor_config.json", "curves.png"):
        assert name in caplog.text
    hub.create_repo("alice/student", files=earlier | {"pytorch_model.bin": b"1"})  # that no push of ours left there
    with pytest.raises(HubError, match=r"pytorch_model\.bin.*overwrite"):
        push_model(student, "alice/student")


def test_a_training_refuses_another_model_before_its_first_step_and_after_its_last(hub, tmp_path):
    hub.create_repo("alice/there", files={"README.md": b"by hand"})
    pushing = {"push_to_hub": True, "hub_model_id": "alice/there"}
    with pytest.raises(HubError, match=r"README\.md.*hub_overwrite"):
        trainer(tmp_path, **pushing)
    assert not (tmp_path / "student").exists()
    run = trainer(tmp_path, **pushing, hub_overwrite=True)
    run.train()
    run.push_to_hub()
    assert b"noisekd" in hub.repo("alice/there").read("README.md")
    hub.create_repo("alice/there", files={"README.md": b"written while it trained"})
    run.args.hub_overwrite = False
    with pytest.raises(HubError, match=r"noisekd push --model \S+ --repo-id alice/there.*--overwrite"):
        run.push_to_hub()
    assert hub.repo("alice/there").read("README.md") == b"written while it trained"


def test_a_supervised_trainer_does_not_push_its_arguments(tmp_path):
    args = ClassifierConfig(str(tmp_path), push_to_hub=True, hub_token="hf_write")
    with pytest.raises(ValueError, match="noisekd push --model"):
        ClassifierTrainer(teacher(), args)


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(("failure", "message"), [*FAILURES[:2], *FAILURES[3:]])
def test_the_hub_is_asked_before_the_first_step(hub, tmp_path, failure, message):
    hub.fail(failure, path_pattern="repos/create", times=None)
    with pytest.raises(HubError, match=message):
        trainer(tmp_path, push_to_hub=True, hub_model_id="alice/student")
    assert not (tmp_path / "student").exists()


def test_bad_ids_and_tokens_are_refused(hub, tmp_path, monkeypatch):
    for repo_id in ("a/b/c", "alice/white space", "-alice/x", "alice/x.git"):
        with pytest.raises(HubError, match="form organisation/name"):
            check_hub_access(repo_id)
    with pytest.raises(HubError, match="HF_TOKEN"):
        check_hub_access("alice/student", token="hf_unknown")
    with pytest.raises(HubError, match=r"token .*organisation"):
        check_hub_access("somebody/student")
    # A token that can only read, and a repository that is there: creating it "again" would go unnoticed.
    hub.create_repo("alice/there")
    for repo_id in ("alice/there", "alice/new"):
        with pytest.raises(HubError, match=r"token .*organisation"):
            check_hub_access(repo_id, token="hf_read")
    assert check_hub_access("there") == "alice/there"
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="HF_TOKEN"):
        check_hub_access("alice/student")


def test_pushes_a_folder(hub, tmp_path):
    save_model(teacher(), tmp_path / "model")
    url = push_model(tmp_path / "model", "alice/model", private=True, commit_message="First")
    assert "alice/model" in url
    assert hub.repo("alice/model").private
    assert hub.repo("alice/model").head["title"] == "First"
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="folder"):
            push_model(folder, "alice/other")


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("mobileone-license", ("other", "mobileone-license")),
        ("CC BY-NC 4.0", ("other", "cc-by-nc-4.0")),
        ("Apache-2.0", ("apache-2.0", None)),
        (["mit", "bsd"], ("other", "mit-bsd")),
        (7, ("other", "7")),
    ],
)
def test_a_licence_that_the_hub_does_not_list_has_a_name(hub, tmp_path, license, expected):
    save_model(teacher(), tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["pretrained_cfg"]["license"] = license
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    args = NoiseKDConfig(str(tmp_path / "student"), max_steps=1, per_device_train_batch_size=4, disable_tqdm=True)
    args.num_calibration_images = 0
    run = NoiseKDTrainer("resnet10_cifar", str(tmp_path / "teacher"), args)
    run.train()
    run.create_model_card()
    push_model(tmp_path / "student", "alice/student")
    data = ModelCard.load("alice/student", ignore_metadata_errors=False).data
    assert (data.license, data.get("license_name")) == expected


def test_teachers_come_from_the_hub_with_their_revision_and_licence(hub, tmp_path):
    save_model(teacher(), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Teacher\n")
    push_model(tmp_path / "model", "alice/teacher")
    first = hub.repo("alice/teacher").head["oid"]
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    push_model(tmp_path / "model", "alice/teacher", hub_overwrite=True)
    assert load_teacher(f"hf-hub:alice/teacher@{first}").origin["revision"] == first
    args = NoiseKDConfig(
        str(tmp_path / "student"),
        max_steps=1,
        per_device_train_batch_size=4,
        num_calibration_images=0,
        disable_tqdm=True,
    )
    run = NoiseKDTrainer("resnet10_cifar", "alice/teacher", args)
    run.train()
    run.save_model()
    run.create_model_card()
    section = json.loads((tmp_path / "student" / "config.json").read_text())["noisekd"]
    assert section["teacher"]["id"] == "alice/teacher"
    assert section["teacher"]["revision"] == hub.repo("alice/teacher").head["oid"]
    assert "sha256" not in section["teacher"]
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.base_model == "alice/teacher"
    assert load_student(str(tmp_path / "student")).noisekd == section


def test_offline_makes_no_request_and_says_what_is_missing(hub, tmp_path, monkeypatch):
    save_model(teacher(), tmp_path / "model")
    push_model(tmp_path / "model", "alice/teacher")
    load_teacher("alice/teacher")
    requests = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_teacher("alice/teacher")  # from the cache
    for source in ("alice/other", "resnet10t.c3_in1k"):
        with pytest.raises(ValueError, match=r"local cache.*HF_HUB_OFFLINE=1"):
            load_teacher(source)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE=1"):
        check_hub_access("alice/student")
    assert len(hub.requests) == requests
