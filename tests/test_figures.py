import pytest
import torch
from conftest import made_by_noise
from harness.figures import Panel, plot_accuracy, plot_contact_sheet, plot_embeddings, plot_panels
from matplotlib.image import imread

from hf_noisekd.record.schema import Evaluation, ModelFacts, Record
from hf_noisekd.release.figures import curve_points

POINTS = [(4, 50.0), (1, 20.0), (16, 80.0)]


def drawn(axis) -> list[list[tuple[float, float]]]:
    """The points of each line of an axis."""
    return [[tuple(point) for point in container.lines[0].get_xydata()] for container in axis.containers]


def test_a_dozen_lines_have_colors_of_their_own(tmp_path):
    lines = {f"line {number}": [(1, number), (2, number)] for number in range(12)}
    figure = plot_panels([Panel(lines, "title", "x", "y")], tmp_path / "many.png")
    assert len({line.get_color() for line in figure.axes[0].lines if len(line.get_xdata()) == 2}) == 12


def test_panels_show_their_lines_and_errors(tmp_path):
    second = Panel({"two": [(x, y / 2, 3.0) for x, y in POINTS], "one": POINTS, "none": []}, log_x=True, log_y=True)
    figure = plot_panels([Panel({"one": POINTS}, "title", "x", "y"), second], tmp_path / "two.png", share_y=True)
    first, second = figure.axes
    assert drawn(first) == [sorted(POINTS)]
    assert drawn(second) == [[(1, 10), (4, 25), (16, 40)], sorted(POINTS)]
    assert (first.get_title(), first.get_xlabel(), first.get_ylabel()) == ("title", "x", "y")
    assert (second.get_xscale(), second.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in second.get_xticklabels()] == ["1", "4", "16"]
    with_error, without = second.containers
    assert with_error.has_yerr
    assert not without.has_yerr
    segments = with_error.lines[2][0].get_segments()
    assert [tuple(end[1] for end in segment) for segment in segments] == [(7, 13), (22, 28), (37, 43)]
    # A name has one colour in all panels.
    assert without.lines[0].get_color() == first.containers[0].lines[0].get_color() != with_error.lines[0].get_color()
    assert [text.get_text() for text in figure.legends[0].texts] == ["one", "two"]
    height, width, _ = imread(tmp_path / "two.png").shape
    assert width > 1.5 * height


def test_accuracy_is_drawn_for_students_only(tmp_path):
    def run(accuracy, provenance=None):
        scores = {"running": {"accuracy": accuracy / 2}, "batch": {"accuracy": accuracy}}
        model = ModelFacts(architecture="resnet", library="timm", parameters=1)
        measured = Evaluation(dataset="d", images=9, batch_size=9, step=1, precision="float32", **scores)
        return Record(model=model, steps=1, evaluations=[measured], noisekd=provenance)

    runs = [run(90.0), *(run(accuracy, made_by_noise(temperature=t)) for t, accuracy in ((0.1, 20.0), (1.0, 80.0)))]
    (axis,) = plot_accuracy(runs, tmp_path / "accuracy.png", "temperature", "temperature of the softmax").axes
    assert drawn(axis) == [[(0.1, 10), (1, 40)], [(0.1, 20), (1, 80)]]
    assert axis.get_xlabel() == "temperature of the softmax"
    assert (tmp_path / "accuracy.png").is_file()


def test_a_curve_has_what_was_logged_and_the_last_evaluation():
    scores = {"running": {"accuracy": 50.0}, "batch": {"accuracy": 60.0}}
    measured = Evaluation(
        dataset="d", images=9, batch_size=9, step=8, precision="float32", log_prefix="eval_d", **scores
    )
    model = ModelFacts(architecture="resnet", library="timm", parameters=1)
    curve = [{"step": 4, "eval_d_batch_accuracy": 20.0}, {"step": 6, "loss": 1.0}]
    run = Record(model=model, steps=8, evaluations=[measured], curve=curve)
    assert curve_points(run, measured, "batch", "accuracy") == [(4, 20.0), (8, 60.0)]


@pytest.mark.parametrize("classes", [1, 3])
def test_embeddings_have_a_panel_for_each_input(tmp_path, classes):
    points = torch.randn(50, 2).numpy()
    answers = (torch.arange(50) % classes).numpy()
    path = tmp_path / "embeddings.png"
    axes = plot_embeddings({"data": (points, answers), "noise": (points + 1, answers)}, path).axes
    assert [axis.get_title() for axis in axes] == ["data", "noise"]
    for axis, expected in zip(axes, (points, points + 1), strict=True):
        offsets = [collection.get_offsets() for collection in axis.collections]
        assert [len(part) for part in offsets] == [int((answers == index).sum()) for index in range(classes)]
        assert offsets[0][0].tolist() == pytest.approx(expected[0].tolist())
    assert path.is_file()


def test_a_contact_sheet_shows_images_of_each_kind_in_a_row(tmp_path):
    images = {
        "color": torch.zeros(20, 3, 8, 8),
        "gray": torch.full((5, 1, 4, 4), 1.0),
        "bright": torch.full((4, 2, 4, 4), 9.0),
    }
    images["color"][15] = 1.0
    figure = plot_contact_sheet(images, tmp_path / "sheet.png", columns=4)
    assert len(figure.axes) == 12
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert [picture.shape for picture in shown[::4]] == [(8, 8, 3), (4, 4), (4, 4)]
    assert [float(picture.mean()) for picture in shown[:4]] == [0.5, 0.5, 0.5, 0.75]
    assert (shown[4] == 0.75).all()
    assert (shown[8] == 1).all()
    assert [axis.get_ylabel() for axis in figure.axes[::4]] == ["color", "gray", "bright"]
    assert imread(tmp_path / "sheet.png").shape[2] == 4
