import json
import re
from pathlib import Path

import pytest
from harness.page import copy_results, main, render_page

RECIPES = Path(__file__).parents[1] / "recipes"


def run(name, accuracy, architecture="big", noise=True, fraction=1.0):
    scores = {"running": {"accuracy": accuracy - 20.0}, "batch": {"accuracy": accuracy}}
    taught = {"noisekd": {"noise": {}} if noise else {}}
    model = {"architecture": architecture, "parameters": 1_234_567}
    return {"name": name, "model": model, "steps": 1500, "evaluations": [scores]} | taught


def record(seed, *runs, preset="cpu", measurements=None):
    machine = {"processor": "a processor", "cores": 2, "accelerator": "H100" if preset == "paper" else None}
    facts = {
        "configuration": {},
        "recipe": "one",
        "preset": preset,
        "seed": seed,
        "commit": f"commit{seed}",
        "machine": machine,
    }
    return facts | {"runs": list(runs), "measurements": measurements or {}}


@pytest.fixture
def recipes(tmp_path):
    paper = {
        "one": {"what": "Table 9", "accuracy": {"noise": {"big": 80.0, "bigger": 85.0}, "images": {"big": 90.0}}},
        "two": {"what": "Fig. 9"},
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "paper.json").write_text(json.dumps(paper))
    for name in paper:
        (tmp_path / f"{name}.py").write_text(f'"""What {name} does.\n\n    python {name}.py\n\nAnd how.\n"""\n')
    return tmp_path


def write(recipes, name, content):
    (recipes / "results" / f"{name}.json").write_text(json.dumps(content))


def test_what_was_not_run_says_so_beside_the_papers_value(recipes):
    page = render_page(recipes)
    assert "## Table 9: `one.py`\n\nWhat one does.\n\n    python one.py" in page
    assert page.count("`cpu`: not yet run.") == 2
    assert "| noise | bigger | not yet run | 85.00 |" in page
    assert "`paper`: not yet run." in page  # of the figure


def test_the_papers_value_stands_beside_ours(recipes):
    runs = run("noise", 50.0), run("noise", 40.0, "small"), run("images", 70, noise=False)
    write(recipes, "one_paper", record(0, *runs, preset="paper"))
    page = render_page(recipes)
    assert "| noise | big, 1.23 M | 1,500 | 1 | 30.00 | 50.00 | 80.00 | -30.00 |" in page
    assert "| noise | small, 1.23 M | 1,500 | 1 | 20.00 | 40.00 | 80.00 (big) | -40.00 |" in page
    # Images: read with running statistics.
    assert "| images | big, 1.23 M | 1,500 | 1 | 50.00 | 70.00 | 90.00 | -40.00 |" in page
    # What the paper has beside.
    assert "| noise | bigger | not yet run | 85.00 |" in page
    assert page.count("not yet run | ") == 1


def test_networks_of_the_small_preset_are_never_taken_for_the_papers(recipes):
    write(recipes, "one_cpu", record(0, run("noise", 50.0)))
    page = render_page(recipes)
    assert "| noise | big, 1.23 M | 1,500 | 1 | 30.00 | 50.00 | 80.00 (big) | -30.00 |" in page
    assert "`cpu`, on 2 cores of a processor: [seed 0](results/one_cpu.json) at `commit0`." in page


def test_seeds_are_averaged_with_their_spread(recipes):
    write(recipes, "one_paper", record(0, run("noise", 81.0), preset="paper"))
    write(recipes, "one_paper_seed1", record(1, run("noise", 83.0) | {"steps": 1490}, preset="paper"))
    page = render_page(recipes)
    assert "| noise | big, 1.23 M | 1,490 to 1,500 | 2 | 62.00 ± 1.41 | 82.00 ± 1.41 | 80.00 | +2.00 |" in page
    assert "`paper`, on H100" in page
    assert "not yet run | 80.00" not in page


def test_a_teacher_that_all_seeds_were_given_counts_once(recipes):
    for seed in (0, 1):
        runs = (run("given", 81.0) | {"steps": 0}, run("other", 81.0 + seed) | {"steps": 0}, run("trained", 81.0))
        write(recipes, f"one_cpu_seed{seed}", record(seed, *runs))
    page = render_page(recipes)
    assert "| given | big, 1.23 M | 0 | 1 | 61.00 | 81.00 |" in page
    assert "| other | big, 1.23 M | 0 | 2 | 61.50 ± 0.71 | 81.50 ± 0.71 |" in page
    assert "| trained | big, 1.23 M | 1,500 | 2 | 61.00 ± 0.00 | 81.00 ± 0.00 |" in page


def test_measurements_are_tables_unless_they_are_long(recipes):
    short = [{"images": 1024, "how": "so", "accuracy": 12.3456, "histogram": [1, 2]}]
    write(recipes, "one_cpu", record(0, measurements={"short": short, "long": short * 50}))
    page = render_page(recipes)
    assert "Short:\n\n| images | how | accuracy |\n|---:|---|---:|\n| 1,024 | so | 12.35 |" in page
    assert "Long:" not in page


def test_bars_in_names_and_small_numbers_can_be_read(recipes):
    rows = [{"noise": "a|b:0.5", "share": 0.25, "distance": 0.0096}]
    write(recipes, "one_cpu", record(0, run("a|b:0.5", 12.3), measurements={"m": rows}))
    page = render_page(recipes)
    assert "| a\\|b:0.5 | 0.25 | 0.0096 |" in page
    assert "| a\\|b:0.5 | big, 1.23 M | 1,500 | 1 |" in page


def test_measurements_of_several_seeds_are_averaged_row_by_row(recipes):
    def rows(*accuracies):
        return [{"noise": name, "images": 256, "accuracy": accuracy} for name, accuracy in accuracies]

    rows_of_seed_0 = rows(("a", 10.0), ("b", 20.0), ("b", 30.0), ("c", 1.0), ("f", None))
    write(recipes, "one_cpu", record(0, measurements={"m": rows_of_seed_0}))
    other = {"m": rows(("d", 5.0), ("b", 22.0), ("b", 31.0), ("a", 10.0), ("f", 6.0)), "another": rows(("e", 7.0))}
    write(recipes, "one_cpu_seed1", record(1, measurements=other))
    page = render_page(recipes)
    lines = ["a | 256 | 10.00", "b | 256 | 21.00 ± 1.41", "b | 256 | 30.50 ± 0.71", "c | 256 | 1.00", "f | 256 | 6.00"]
    lines.append("d | 256 | 5.00")
    assert "\n".join(f"| {line} |" for line in lines) in page
    assert "Another:\n\n| noise | images | accuracy |\n|---|---:|---:|\n| e | 256 | 7.00 |\n" in page


def test_what_was_tried_and_removed_is_said_to_be_so(recipes, monkeypatch):
    monkeypatch.setattr("harness.page.REMOVED", {"one": {"dropped": "abc123", "never run": "def456"}})
    write(recipes, "one_cpu", record(0, run("dropped, equal steps", 12.3), run("kept", 45.6)))
    page = render_page(recipes)
    assert "| dropped, equal steps | big, 1.23 M | 1,500 | 1 |" in page
    assert 'Rows "dropped ...": tried and removed, the code is at commit `abc123`' in page
    assert "never run" not in page


def test_runs_are_copied_by_recipe_preset_and_seed(recipes, tmp_path, monkeypatch):
    for seed in (0, 3):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(record(seed, run("noise", 50.0))))
        (folder / "curves.png").write_bytes(b"figure")
    main([str(tmp_path / "run0"), str(tmp_path / "run3"), "--recipes", str(recipes)])
    assert {path.name for path in (recipes / "results").iterdir()} == {
        "one_cpu.json", "one_cpu_seed3.json", "one_cpu_curves.png"
    }  # fmt: skip
    page = (recipes / "README.md").read_text()
    assert page.count("![") == 1
    assert "![one cpu curves](results/one_cpu_curves.png)" in page
    with pytest.raises(ValueError, match=r"results\.json.*--output-dir"):
        copy_results(tmp_path / "nothing", recipes / "results")
    other = record(0, run("noise", 60.0, "small"))
    (tmp_path / "run0" / "results.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="noise of big"):
        copy_results(tmp_path / "run0", recipes / "results")
    (tmp_path / "run0" / "results.json").write_text(json.dumps(other | {"configuration": {"max_steps": 3}}))
    with pytest.raises(ValueError, match="--max-steps"):
        copy_results(tmp_path / "run0", recipes / "results")


def test_the_page_in_the_repository_is_up_to_date():
    assert (RECIPES / "README.md").read_text() == render_page(RECIPES), "stale: run `make tables`"


def test_every_result_and_figure_is_shown_and_of_a_clean_commit():
    page = (RECIPES / "README.md").read_text()
    for path in (RECIPES / "results").iterdir():
        if not path.name.startswith("benchmark"):
            assert f"(results/{path.name})" in page
    for path in (RECIPES / "results").glob("*.json"):
        assert not json.loads(path.read_text())["commit"].endswith("-dirty"), path.name


def test_every_recipe_is_on_the_page():
    recipes = {path.stem for path in RECIPES.glob("*.py")} - {"benchmark_step_time"}
    assert set(re.findall(r"^## .*: `(\w+)\.py`$", (RECIPES / "README.md").read_text(), flags=re.MULTILINE)) == recipes
