"""Figures of several results: what is drawn where, the files, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection

from evaluation import plots
from evaluation.plots import DPI, comparison_figure, figure_pixels, gate_figure, order_figure
from evaluation.results import Results, read_metrics, write_results
from tests.conftest import Call, process, score
from tests.tools.test_ledger import write_accuracies
from tools import plot_results
from tools.analyze_representation import activations_figure
from tools.plot_results import bars_figure, training_figure


@pytest.fixture(autouse=True)
def two_accuracies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What figures show here, whatever other measures there are."""
    for module in (plots, plot_results):
        monkeypatch.setattr(module, "accuracies", lambda: ["test", "train"])


def summary(values: dict[int, float], reach: float | None = 0.05) -> list[dict[str, Any]]:
    """Test accuracies, and train accuracies 0.1 above, with intervals of `reach` to either side."""
    found = []
    for classes, test in values.items():
        line: dict[str, Any] = {"classes": classes, "test": test, "train": test + 0.1}
        for name in ("test", "train") if reach else ():
            line |= {f"{name}_low": line[name] - reach, f"{name}_high": line[name] + reach}
            line |= {f"{name}_interval": "Student's t over runs"}
        found.append(line)
    return found


def lines(axes: Axes) -> dict[str, list[list[float]]]:
    return {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}


def spreads(axes: Axes) -> list[list[float]]:
    """The ends of all intervals that are drawn as lines."""
    drawn = [c for c in axes.collections if isinstance(c, LineCollection)]
    return [np.round(np.ravel(s), 6).tolist() for c in drawn for s in c.get_segments() if len(s)]


def test_curves_are_in_their_panels() -> None:
    curves = {"A": summary({100: 0.5, 10: 0.8}), "B": summary({10: 0.25})}
    published = [{"classes": 10, "test": 0.7, "test_low": 0.67, "test_high": 0.73, "train": 0.9}]
    figure = comparison_figure(curves, {"published": [*published, {"classes": 100, "test": 0.6}]})
    test, train = figure.axes
    np.testing.assert_allclose(lines(test)["A"], [[10, 80], [100, 50]])
    np.testing.assert_allclose(lines(train)["A"], [[10, 90], [100, 60]])
    np.testing.assert_allclose(lines(train)["B"], [[10, 35]])
    np.testing.assert_allclose(lines(test)["chance"][-1], [100, 1])
    np.testing.assert_allclose(lines(test)["published"], [[10, 70], [100, 60]])
    np.testing.assert_allclose(lines(train)["published"], np.array([[10, 90], [100, np.nan]]))
    assert [10, 67, 10, 73] in spreads(test)
    (points,) = (line for line in test.get_lines() if line.get_label() == "published")
    assert (points.get_linestyle(), points.get_markerfacecolor()) == ("None", "none")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["A", "B", "published", "chance"]
    # In black and white, line style and marker tell the curves apart.
    assert len({(line.get_linestyle(), line.get_marker()) for line in test.get_lines()[:2]}) == 2


def test_bars_show_means_intervals_and_published_numbers() -> None:
    final = {"A": summary({600: 0.6})[0], "B": summary({600: 0.2})[0]}
    (axes,) = bars_figure(final, [("B", {"test": 0.3}), ("B", {"train": 0.4})]).axes
    assert [text.get_text() for text in axes.texts] == ["60.0", "20.0", "70.0", "30.0"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["A", "B"]
    published = [np.asarray(line.get_xydata()) for line in axes.get_lines() if line.get_marker() == "D"]
    np.testing.assert_allclose(np.stack(published), [[[30, 0.8], [np.nan, 0.8]], [[np.nan, 1.2], [40, 1.2]]])
    assert [55, -0.2, 65, -0.2] in spreads(axes)
    assert "600 classes" in axes.get_xlabel()


@pytest.mark.parametrize("reach", [None, 0.05])
def test_one_run_has_no_band(reach: float | None) -> None:
    rows = summary({10: 0.5, 600: 0.5}, reach)
    axes = comparison_figure({"A": rows}).axes[0]
    band = next(c for c in axes.collections if isinstance(c, PolyCollection))
    assert len(band.get_paths()) == bool(reach)
    assert axes.get_ylabel().endswith("95% interval over runs") == bool(reach)
    np.testing.assert_allclose(lines(axes)["A"], [[10, 50], [600, 50]])
    assert bool(spreads(bars_figure({"A": rows[0]}).axes[0])) == bool(reach)


def test_rounding_beside_a_mean_is_drawn() -> None:
    """Ends of the interval of equal values, of which rounding puts one beyond the mean."""
    (axes,) = bars_figure({"A": summary({10: 0.5}, -1e-15)[0]}).axes
    assert [(x, end) for x, _, end, _ in spreads(axes)] == [(50, 50), (60, 60)]


def test_what_happens_to_classes() -> None:
    """A panel of tenths, of all counts of one curve or of the last of several, and a panel of volatility."""
    tenths = {f"tenth_{k}": k / 10 for k in range(1, 11)}
    rows: list[dict[str, Any]] = [
        {"classes": 5},
        {"classes": 600, "volatility": 0.25, **tenths, "tenth_1_low": 0.05},
    ]
    for names, labels in (
        ("A", ["A, 5 classes", "A, 600 classes"]),
        ("AB", ["A, 600 classes", "B, 600 classes"]),
    ):
        order, change = order_figure(dict.fromkeys(names, rows)).axes
        found = lines(order)
        assert [*found] == labels
        np.testing.assert_allclose(found["A, 600 classes"], [[k, 10 * k] for k in np.arange(1.0, 11)])
        np.testing.assert_allclose(lines(change)["A"], [[5.0, np.nan], [600.0, 25.0]])
    last = list(range(33, 41))  # as many as there are styles
    many = lines(order_figure({"A": [{"classes": k, **tenths} for k in range(1, 41)]}).axes[0])
    assert [*many] == [f"A, {k} classes" for k in last]


def test_activations_are_squares() -> None:
    rows = {"gate": np.eye(10)[:2], "after": np.zeros((2, 10))}
    figure = activations_figure(np.zeros((2, 28, 28, 1), np.uint8), rows, ["A/character01", "A/character02"])
    pictures = [image.get_array() for axes in figure.axes for image in axes.images]
    shown = [np.ma.filled(picture, np.nan) for picture in pictures if picture is not None]
    assert [image.shape for image in shown[:4]] == [(28, 28)] * 2 + [(4, 4)] * 2
    np.testing.assert_array_equal(shown[3].ravel()[:10], np.eye(10)[1])
    assert np.isnan(shown[3].ravel()[10:]).all()
    assert figure_pixels(figure).ndim == 3


def test_neighbouring_gates_share_a_label() -> None:
    axes = gate_figure(np.array([[0.1, 0.4], [0.2, 0.5], [0.0, 0.3]]), ["A", "A", "B"]).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.4, 0.1], [0.5, 0.2], [0.3, 0.0]])
    assert [(*label.get_position(), label.get_text()) for label in axes.get_yticklabels()] == [
        (0, 0.5, "A"),
        (0, 2, "B"),
    ]


def test_accuracy_on_the_way(call: Call) -> None:
    rows = [
        {"model": f"{step}.net", "classes": classes, "run": run, "lr": 0.001}
        | score(test=test + shift, train=test + 0.1, above_chance=1)
        for step, accuracies in ((1000, (0.5, 0.3)), (200, (0.4, 0.1)))
        for classes, test in zip((10, 50), accuracies, strict=True)
        for run, shift in enumerate((-0.01, 0.01))
    ]
    about = {"models": [{"name": "1000.net", "step": 1000}, {"name": "200.net", "step": 200}]}
    test, train = comparison_figure(plot_results.on_the_way({"run_0": Results(rows, about)})).axes
    np.testing.assert_allclose(lines(test)["10 classes"], [[200, 40], [1000, 50]])
    np.testing.assert_allclose(lines(train)["50 classes"], [[200, 20], [1000, 40]])
    write_results(Path(), rows, about)
    done = call(plot_results, ".", "again=.", "--against=steps", "--out=figures")
    assert done.stdout.split() == ["figures/results_steps.png", "figures/results_steps.pdf"], done.stderr


def test_what_trainings_measured(call: Call) -> None:
    values = np.random.default_rng(0).random((120, 3))
    rows = [f"{k + 1},{loss},{a},{b},0.1\n" for k, (loss, a, b) in enumerate(values.tolist())]
    for name, part in (("long", rows), ("short", rows[:3])):
        Path(name).mkdir()
        text = "step,loss,accuracy_trajectory,accuracy_remember,seconds\n" + "".join(part) + '9,"0.'
        Path(name, "metrics.csv").write_text(text)
    loss, accuracy = training_figure({name: read_metrics(Path(name)) for name in ("long", "short")}).axes
    np.testing.assert_allclose(lines(loss)["long"][-1], [95.5, values[70:, 0].mean()])
    np.testing.assert_allclose(lines(loss)["short"], [[2, values[:3, 0].mean()]])
    np.testing.assert_allclose(lines(accuracy)["trajectory, long"][0], [25.5, 100 * values[:50, 1].mean()])
    np.testing.assert_allclose(lines(accuracy)["remember, long"][0], [25.5, 100 * values[:50, 2].mean()])
    done = call(plot_results, "long", "b=short/metrics.csv", "--against=training", "--out=figures")
    assert done.stdout.split() == ["figures/results_training.png", "figures/results_training.pdf"], (
        done.stderr
    )


def test_script_writes_both_figures(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", DPI)
    write_accuracies(Path("run_0"), "results", {10: (0.8, 0.9), 600: (0.6, 0.9)})
    write_accuracies(Path("run=1"), "results", {10: (0.7, 0.9), 50: (0.6, 0.9)})
    flags = ("ANML=run_0", "run=1", "b=run_0/results.csv", "--out", "figures", "--name", "x")
    # Whatever matplotlib is told beside it: a backend that does not exist, settings of the user's.
    Path("matplotlibrc").write_text("font.size: 30\nsavefig.dpi: 10\ntext.usetex: True\naxes.grid: True\n")
    script = (sys.executable, "-m", "tools.plot_results")
    done = process(tmp_path, *script, *flags, MPLBACKEND="nonsense", DISPLAY=":77")
    assert done.returncode == 0, done.stderr
    names = [f"figures/x_{figure}.{suffix}" for figure in ("curves", "bars") for suffix in ("png", "pdf")]
    assert done.stdout.split() == names
    before = [Path(name).read_bytes() for name in names]
    assert [file[:4] for file in before] == [b"\x89PNG", b"%PDF"] * 2
    assert call(plot_results, *flags).stdout == done.stdout
    assert [Path(name).read_bytes() for name in names] == before
    for name in ("lr0.1_0", "lr0.2_0"):
        write_accuracies(Path(name), "results", {10: (0.8, 0.9)})
    dotted = call(plot_results, "lr0.1_0", "lr0.2_0", "a $b$ c=run_0", "--out=dots", "--no-published")
    assert (dotted.returncode, dotted.stderr) == (0, "")
    call(plot_results, *flags, "--no-published")
    assert all(Path(name).read_bytes() != old for name, old in zip(names, before, strict=True))


def test_published_numbers_are_those_of_the_treatment() -> None:
    # The label decides: results do not say how their model was trained.
    for label, treatment, named, shown in (
        ("mine", "OML-OLFT", ["OML-OLFT"], "OML-OLFT"),
        ("anml, first order", "ANML", ["ANML, first order"], "ANML, first order"),
        ("mine", "ANML --rln 9", [], "ANML"),
    ):
        treatments, found = plot_results.published({label: Results([], {"treatment": treatment})}, 600)
        assert [*treatments.values()] == named
        assert {line["treatment"] for of_source in found.values() for line in of_source} == {shown}
