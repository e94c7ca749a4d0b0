import pytest
import torch
from matplotlib.image import imread

from hf_noisekd.figures import Panel, plot_accuracy, plot_embeddings, plot_panels


def colored(path) -> int:
    """Number of pixels that are neither gray nor white: of lines and points."""
    pixels = imread(path)[..., :3]
    return int((pixels.max(-1) - pixels.min(-1) > 0.3).sum())


def test_panels_show_all_their_lines(tmp_path):
    points = [(1, 20.0), (4, 50.0), (16, 80.0)]
    plot_panels([Panel({"one": points}), Panel({"one": points})], tmp_path / "one.png")
    second = Panel({"one": points, "two": [(x, y / 2, 3.0) for x, y in points]}, log_x=True, log_y=True)
    plot_panels([Panel({"one": points}), second], tmp_path / "two.png", share_y=True)
    assert colored(tmp_path / "two.png") > 1.3 * colored(tmp_path / "one.png") > 0
    height, width, _ = imread(tmp_path / "one.png").shape
    assert width > 2 * height


def test_accuracy_is_drawn_for_students_only(tmp_path):
    def run(fraction, accuracy):
        scores = {"running": {"accuracy": accuracy / 2}, "batch": {"accuracy": accuracy}}
        return {"noisekd": {"share": fraction}, "evaluations": [scores]}

    teacher = {"evaluations": [{"running": {"accuracy": 90.0}, "batch": {"accuracy": 90.0}}]}
    plot_accuracy([teacher, run(0.1, 20), run(1.0, 80)], tmp_path / "accuracy.png", "share", "share of layers")
    assert colored(tmp_path / "accuracy.png") > 500


@pytest.mark.parametrize("classes", [1, 3])
def test_embeddings_have_a_panel_for_each_input(tmp_path, classes):
    points = torch.randn(50, 2).numpy()
    answers = (torch.arange(50) % classes).numpy()
    plot_embeddings({"data": (points, answers), "noise": (points, answers)}, tmp_path / "embeddings.png")
    assert colored(tmp_path / "embeddings.png") > 500
