"""What README and docs show is so: their Python runs as it stands, their tables are those of the results files."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
from harness.summary import TABLES, draw_speed, fill

from hf_noisekd.cli.__main__ import parse_args
from hf_noisekd.models.saving import save_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.name for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run_as_they_stand(page, tmp_path, monkeypatch):
    """From the first to the last of a page, where `make demo` has left a teacher; in fewer steps."""
    monkeypatch.chdir(tmp_path)
    # A teacher with random weights agrees with itself on nothing; and few steps are enough to run.
    monkeypatch.setattr(
        "hf_noisekd.calibration.calibration_images.CalibrationImages.measure_self_agreement", lambda *_: 100.0
    )
    monkeypatch.setattr("hf_noisekd.calibration.calibration_images._rounds", lambda *_: [2])
    cfg = {"input_size": (1, 8, 8)}
    teacher = timm.create_model("resnet10_cifar", width=16, in_chans=1, pretrained_cfg_overlay=cfg)
    save_model(teacher, "runs/digits/teacher")
    namespace = {}
    for block in blocks(page, "python"):
        exec(compile(block.replace("max_steps=100", "max_steps=3"), page.name, "exec"), namespace)
        if ".train()" in block or "distill(" in block:
            assert (tmp_path / "student" / "config.json").is_file()


def test_commands_are_known():
    """Every line of a shell block that starts with noisekd has options that there are."""
    commands = [
        line.partition("#")[0].strip()
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("noisekd ")
    ]
    assert len(commands) >= 3
    for command in commands:
        assert parse_args(shlex.split(command)[1:]).run


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_tables_are_those_of_the_results_files(page):
    assert page.read_text() == fill(page.read_text(), RESULTS), "stale: run `make tables`"


def test_every_table_is_shown_and_comes_from_clean_commits():
    shown = re.findall(r"<!-- table: ([\w-]+) -->", "".join(page.read_text() for page in PAGES))
    assert sorted(shown) == sorted(TABLES)
    for path in RESULTS.glob("*.json"):
        assert not json.loads(path.read_text())["commit"].endswith("-dirty"), path.name


def test_a_table_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"'spede'.* deployed"):
        fill("<!-- table: spede -->\n<!-- end of table -->", RESULTS)


def test_the_figure_is_drawn(tmp_path):
    draw_speed(RESULTS, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs" / "speed.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path = target.partition("#")[0]
        assert path.startswith("http") or (page.parent / path).exists(), target


def test_commands_are_make_targets():
    targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    targets = {target for line in targets for target in line.split()}
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"`make ([a-z-]+)`", page.read_text())) <= targets


def test_the_readme_is_for_someone_who_has_ten_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert len(text.split()) <= 1100
