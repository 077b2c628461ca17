"""The protocol of an evaluation: treatments, several models, kills and what is resumed, tracking."""

import csv
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate_classification
from evaluation.results import Key, append, known_scores, read_results, write_table
from model import scores
from model.meta_test import MetaTest
from model.modelfactory import build
from model.scores import ACCURACY, CHANGE, CLASSES, MEASURES, RUNS, TENTH, TENTHS, Score
from model.treatments import TABLE
from tests.conftest import Call, Evaluate, curve, shown, windows
from tests.conftest import score as scored
from tests.forks import Forks
from utils.files import Checkpoint, load_checkpoint

TINY = (
    "--dataset glyphs --test_classes 10 --train_images 5 --test_images 4 --threads 1 --name e --backend plain"
)
SHORT = "--schedule 2 --runs 1 --lr 0.001"


@pytest.fixture
def refused(evaluate: Evaluate, call: Call, cache: Path) -> Callable[[str], str]:
    """The one line that an evaluation with these flags ends with."""

    def start(flags: str) -> str:
        done = call(evaluate_classification, *flags.split(), f"--cache_dir={cache}")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        return done.stderr

    return start


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(folder: Path) -> tuple[list[dict[str, Any]], Any, Any]:
    """What an evaluation found, without what tells one run folder from another."""
    results = json.loads((folder / "results.json").read_text())
    return read_results(folder).rows, results["summary"], results["search"]


@pytest.mark.parametrize("name", [*(n for n in TABLE if not TABLE[n].iid), "ANML-Oracle", "Scratch-Oracle"])
def test_each_treatment_runs_and_is_recorded(name: str, evaluate: Evaluate) -> None:
    row = TABLE[name]
    file = "Pretrain.net" if row.weights == "pretrained" else f"{row.network}.net"
    # Scratch needs no model, but takes the shape of one, here a small one.
    model = "--model ANML.net" if row.scratch else f"--model {file}"
    folder = evaluate(f"{TINY} {SHORT} {model} --treatment-preset {name}")
    results = read_results(folder)
    assert (results.about["treatment"], results.about["rln"]) == (name, row.rln)
    assert results.about["models"][0]["weights"] == row.weights
    assert [line["model"] for line in results.rows] == ["scratch" if row.scratch else file]


def test_without_a_preset_the_name_is_found(evaluate: Evaluate) -> None:
    folder = evaluate(f"{TINY} {SHORT} --model ANML.net --rln 6 --iid --epoch 2")
    name = "ANML-FT:PLN+NM-out-Oracle, 2 epochs"
    assert read_results(folder).about["treatment"] == name
    assert f"treatment {name}: --rln" in (folder / "log.txt").read_text()


def test_several_models_share_a_rate_and_have_draws_of_their_own(
    evaluate: Evaluate, refused: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each counts once by its weights, whatever else its file says."""
    saved = load_checkpoint(Path("ANML.net"))
    model = saved.network, saved.widths, saved.state_dict
    Checkpoint(*model, {"steps": 7}, 7).save(Path("ANML_7.net"))
    Path("copy.net").write_bytes(Path("ANML.net").read_bytes())
    search = "--schedule 2 --runs 2 --lrs 0.01 0.001 --lr_search_runs 1"
    together = evaluate(f"{TINY} {search} --model ANML.net ANML_7.net ANML1.net copy.net")
    out = capsys.readouterr().out
    for name in ("ANML_7.net", "copy.net"):
        assert f"warning: {name} holds the same weights as ANML.net: it is left out" in out
    rows, (line,), trials = numbers(together)
    assert [(row["model"], row["run"]) for row in rows] == [
        *(("ANML.net", 0), ("ANML.net", 1), ("ANML1.net", 0), ("ANML1.net", 1)),
    ]
    assert (line["models"], line["runs"], line["test_interval"]) == (2, 4, "Student's t over models")
    assert len({row["lr"] for row in rows}) == 1
    assert line["test"] == pytest.approx(sum(row["test"] for row in rows) / 4)
    assert sorted({trial["model"] for trial in trials}) == ["ANML.net", "ANML1.net"]
    chosen = read_results(together).about["lr_chosen"]
    assert "for each of 2 models" in chosen
    assert chosen in (together / "log.txt").read_text()
    assert read_results(together).about["models"][0]["name"] == "ANML.net"
    # The first model's first run is that of the model alone.
    alone = numbers(evaluate(f"{TINY} --schedule 2 --runs 2 --model ANML.net --lr {rows[0]['lr']}"))[0]
    assert alone[0] == rows[0]
    assert alone[1] != rows[1]
    evaluate(f"--resume {together} --runs 3")
    assert [row for row in numbers(together)[0] if row["run"] < 2] == rows
    again = f"--resume {together} --model ANML_7.net ANML.net ANML1.net copy.net"
    assert "other files" in refused(again)


def test_a_diverged_run_says_so(evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{TINY} --model OML.net --rln 0 --schedule 10 --runs 2"  # class 0 is among the 10
    folder = evaluate(f"{flags} --lr 1e12 --track_every 10")
    out = capsys.readouterr().out
    warning = "10 classes: 2 of 2 runs diverged at the learning rate 1e+12: weights or logits are not finite"
    assert f"warning: {warning}" in out
    assert warning in (folder / "log.txt").read_text()
    found = out[out.index("meta-test test %") :].splitlines()[1].split()
    shown = {ACCURACY: "diverged", CLASSES: "-", RUNS: "2", CHANGE: "diverged", TENTH: ""}
    shown_of = [shown[measure.kind] for measure in MEASURES.values()]
    assert found == ["10", "1e+12", "2", *filter(None, shown_of)]
    rows, (line,), _ = numbers(folder)
    assert [(row["lr"], row["test"], row["train"], row["diverged"]) for row in rows] == [(1e12, 0, 0, 1)] * 2
    assert (line["test"], line["test_low"], line["above_chance"], line["diverged"]) == (None, None, None, 2)
    with (folder / "forgetting_10.csv").open() as file:
        assert {row["test"] for row in csv.DictReader(file)} == {"0.0"}
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    # In a search it loses, even to a rate that learns nothing.
    searched = evaluate(f"{flags} --lrs 1e12 1e-12 --lr_search_runs 2")
    assert {row["lr"] for row in numbers(searched)[0]} == {1e-12}
    out = capsys.readouterr().out
    assert "10 classes: 2 of 2 tries diverged at the learning rate 1e+12" in out
    assert "runs diverged" not in out


SEARCH = "--schedule 2 3 --runs 2 --lrs 0.01 0.003 0.001 --lr_search_runs 3 --model ANML.net ANML1.net"


def test_a_killed_evaluation_goes_on_to_the_same_numbers(
    evaluate: Evaluate, forks: Forks, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(f"{TINY} {SEARCH} --track_every 1")
    killed = Path("runs/e_1")
    flags = f"{TINY} {SEARCH} --track_every 1".split()

    def measured(lines: int) -> bool:
        return (killed / "scores.csv").exists() and len(table(killed)) >= lines

    for lines in (5, 21):  # within the first search, and within the second
        child = forks.start(Path.cwd(), "evaluate_classification", *flags, f"--cache_dir={cache}")
        forks.kill_when(partial(measured, lines), child)
        flags = ["--resume", str(killed)]
    known = table(killed)
    assert lines <= len(known) < len(table(whole))
    with (killed / "scores.csv").open("a") as file:
        file.write("search,ANML.net,3,0,0.")  # as a full disk would tear a line

    made: list[tuple[Any, ...]] = []
    original = MetaTest.walk

    def counted(self: MetaTest, *arguments: Any, drawn: int) -> Any:
        made.append(arguments)
        return original(self, *arguments, drawn=drawn)

    monkeypatch.setattr(MetaTest, "walk", counted)
    evaluate(f"--resume {killed}")
    assert numbers(killed) == numbers(whole)
    assert table(killed) == table(whole)
    assert len(made) == len(table(whole)) - len(known)
    for name in ("results.csv", "forgetting_2.csv", "forgetting_3.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    config = json.loads((killed / "config.json").read_text())
    assert (len(config["resumed"]), config["arguments"]["schedule"]) == (2, [2, 3])
    assert config["plan"]["schedule"] == [2, 3]
    assert not list(killed.glob("metrics.csv"))
    for tag in ("meta_test/accuracy_test", "meta_test/lr"):  # each point once
        assert curve(killed, tag) == curve(whole, tag)
        assert [step for step, _ in curve(killed, tag)] == [2, 3]

    # Once more, and nothing is left to do; more runs and class counts add to what there is.
    made.clear()
    evaluate(f"--resume {killed} --rln 13")  # which it does anyway
    assert not made
    evaluate(f"--resume {killed} --runs 3 --schedule 2 --model {Path.cwd()}/ANML.net ANML1.net")
    assert len(made) == 2
    assert json.loads((killed / "config.json").read_text())["plan"]["schedule"] == [2]
    rows = read_results(killed).rows
    assert [row for row in rows if row["run"] < 2] == [
        row for row in numbers(whole)[0] if row["classes"] == 2
    ]


def test_what_would_change_numbers_is_refused_by_name(
    evaluate: Evaluate, models: Path, refused: Callable[[str], str]
) -> None:
    folder = evaluate(f"{TINY} --schedule 2 --runs 1 --lr_search_runs 1 --lrs 0.1 --model ANML.net")
    for flags, message in (
        ("--rln 7", "its treatment was ANML, and is now ANML-FT:PLN"),
        ("--test_classes 11", "its test_classes was 10, and is now 11"),
        ("--seed 1", "--seed is 1 and was 222"),
        ("--lrs 0.1 0.2", "--lrs is [0.1, 0.2] and was [0.1]"),
        ("--lr 0.1", "--lr is 0.1 and was None"),
        *((flag, flag.split()[0]) for flag in ("--iid", "--epoch 2", "--nested", "--test", "--glyph_seed 1")),
        ("--model ANML1.net", "it tests ANML.net; --model ANML1.net are other files"),
        ("--model ANML.net ANML1.net", "it tests ANML.net; --model ANML.net ANML1.net are other"),
    ):
        line = refused(f"--resume {folder} {flags}")
        assert message in line
        assert "--resume" in line
    Path("ANML.net").write_bytes((models / "ANML1.net").read_bytes())
    assert "have changed since" in refused(f"--resume {folder}")
    Path("ANML.net").write_bytes((models / "ANML.net").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for damage, message in (
        ({"data_hash": "0" * 64}, "data_hash"),
        ({"models": None}, "--model"),
        ({"models": [5]}, "--model"),
        ({"arguments": {"steps": 5}}, "unknown key 'steps'"),
        ({"arguments": []}, "config.json"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **damage}))
        assert message in refused(f"--resume {folder}")
    # Evaluations of commit d362890 have no data hash, no volatility and no position in the order.
    data_hash = config.pop("data_hash")
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{k: v for k, v in line.items() if k not in (*TENTHS, "volatility")} for line in table(folder)]
    write_table(folder / "scores.csv", lines)
    evaluate(f"--resume {folder} --runs 2")
    assert json.loads((folder / "config.json").read_text())["data_hash"] == data_hash
    assert table(folder)[: len(lines)] == lines
    assert len(table(folder)) == len(lines) + 1
    assert len(read_results(folder).rows) == 2


def test_more_classes_than_the_head_has_outputs(
    evaluate: Evaluate, refused: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    widths = {"nm_channels": 4, "pln_channels": 4, "num_classes": 5}
    net = build("ANML", widths, torch.Generator().manual_seed(0))
    Checkpoint("ANML", widths, net.state_dict(), {}, 0).save(Path("few.net"))
    flags = f"{TINY} --model few.net --runs 1 --schedule"
    folder = evaluate(f"{flags} 3 7 --lr 0.01")
    line = "the head has 7 new outputs, one for each class, in place of its 5\n"
    assert line in capsys.readouterr().out
    assert line in (folder / "log.txt").read_text()
    assert [row["classes"] for row in read_results(folder).rows] == [3, 7]
    assert read_results(folder).about["outputs"] == 7
    assert "its outputs was 7, and is now 9" in refused(f"--resume {folder} --schedule 3 9")
    for kept in (f"{flags} 3 5 --lr 0.01", f"{flags} 3 7 --learner ncm"):
        assert read_results(evaluate(kept)).about["outputs"] == 5
        assert "new outputs" not in capsys.readouterr().out


def test_models_that_were_moved(
    evaluate: Evaluate, refused: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = evaluate(f"{TINY} {SHORT} --model ANML.net ANML1.net").resolve()
    Path("sub/runs/other_0").mkdir(parents=True)
    monkeypatch.chdir("sub")
    evaluate_again = f"--resume {folder} --runs 2"
    evaluate(evaluate_again)
    assert len(read_results(folder).rows) == 4
    assert {row["model"] for row in read_results(folder).rows} == {"ANML.net", "ANML1.net"}
    Path("../ANML1.net").rename("ANML1.net")
    assert f"cannot read the model {Path.cwd().parent}/ANML1.net" in refused(evaluate_again)
    evaluate(f"--resume {folder} --runs 3 --model ../ANML.net ANML1.net")
    assert len(read_results(folder).rows) == 6
    assert {path.name for path in Path().rglob("*")} == {"runs", "other_0", "ANML1.net"}


def test_the_journal_keeps_whole_lines_only(tmp_path: Path) -> None:
    path, key = tmp_path / "s.csv", Key("search", "a, b.net", 10, 3, 0.00085)
    score = scored(test=1 / 3, train=0.1 + 0.2, above_chance=7)
    nothing = scored(diverged=1)

    def add(key: Key, score: Score) -> None:
        append(path, [*key, *score.values()])

    assert known_scores(path) == {}
    add(key, score)
    whole = path.read_bytes()
    heading = whole.index(b"\n") + 1
    for torn in (0, 1, heading - 1, heading, heading + 1, len(whole) - 1):
        path.write_bytes(whole[:torn])
        assert known_scores(path) == {}
        add(key, score)
        assert path.read_bytes() == whole
    other = key._replace(lr=0.0009)
    add(other, nothing)
    for edit in (path.read_bytes(), b"\xef\xbb\xbf" + path.read_bytes(), windows(path.read_bytes())):
        path.write_bytes(edit)
        assert known_scores(path) == {key: score, other: nothing}


def test_one_more_measure_is_one_more_line(
    evaluate: Evaluate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measure of the user's own reaches every file, the table and the curves."""
    (measure,) = eval(shown("extending.md", "measure"), vars(scores))  # noqa: S307 (ours)
    with monkeypatch.context() as patched:
        patched.setitem(MEASURES, "mine", measure._replace(name="mine"))
        search = "--schedule 2 --lrs 0.01 0.001 --lr_search_runs 2"
        folder = evaluate(f"{TINY} {search} --model ANML.net --runs 2")
        assert "meta-test mine %" in capsys.readouterr().out
        assert all(0 <= float(row["mine"]) <= float(row["test"]) for row in table(folder))
        rows, (line,), trials = numbers(folder)
        assert line["mine"] == pytest.approx(sum(row["mine"] for row in rows) / 2)
        assert line["mine_low"] <= line["mine"] <= line["mine_high"]
        assert [trial["mine"] for trial in trials] == [float(row["mine"]) for row in table(folder)[:4]]
        assert [step for step, _ in curve(folder, "meta_test/accuracy_mine")] == [2]
    # Without the measure its column is kept, and named in one line; the runs to come leave it empty.
    before = table(folder)
    evaluate(f"--resume {folder} --runs 3")
    said = [line for line in capsys.readouterr().out.splitlines() if "mine" in line]
    assert said == [f"warning: {folder}/scores.csv: mine is no measure here: kept as it is"]
    assert table(folder)[: len(before)] == before
    assert [row["mine"] for row in read_results(folder).rows] == [*(str(row["mine"]) for row in rows), ""]


NESTED = "--nested --lrs 0.01 0.003 0.0001 --lr_search_runs 2 --runs 2 --model ANML.net ANML1.net"


def fixed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the measure that depends on which stop is the one before."""
    return [row | {"volatility": None} for row in rows]


def test_a_nested_evaluation(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its points are those of runs that stop there; what is known is not done again; tracked and resumed."""
    passes: list[tuple[tuple[int, ...], str]] = []
    original = MetaTest.walk

    def spied(self: MetaTest, stops: Any, lr: Any, purpose: Any, draw: int, *, drawn: int) -> Any:
        passes.append((tuple(stops), purpose))
        return original(self, stops, lr, purpose, draw, drawn=drawn)

    monkeypatch.setattr(MetaTest, "walk", spied)
    whole = evaluate(f"{TINY} {NESTED} --schedule 7 2 4 --full_search --track_every 3")
    rows, summary, tries = numbers(whole)
    assert [line["classes"] for line in summary] == [2, 4, 7]
    assert len(tries) == 3 * 3 * 2 * 2
    assert passes.count(((2, 4, 7), "search")) == 3 * 2 * 2
    best = {row["classes"]: row["lr"] for row in rows}
    assert len({(row["classes"], row["lr"]) for row in rows}) == 3
    longest = {max(n for n in best if best[n] == lr) for lr in best.values()}
    assert {stops[-1] for stops, purpose in passes if purpose == "report"} == longest
    results = read_results(whole)
    assert "not independent" in results.about["points"]
    for n in (2, 7):
        alone = evaluate(f"{TINY} {NESTED} --schedule {n} --track_every 3")
        assert fixed(numbers(alone)[0]) == fixed(row for row in rows if row["classes"] == n)
        assert (alone / f"forgetting_{n}.csv").read_bytes() == (whole / f"forgetting_{n}.csv").read_bytes()
        assert all(trial in fixed(tries) for trial in fixed(numbers(alone)[2]))
    # A pass that was killed while its lines were written.
    lines = (whole / "scores.csv").read_text().splitlines(keepends=True)
    (whole / "scores.csv").write_text("".join(lines[:6]))
    passes.clear()
    evaluate(f"--resume {whole}")
    assert numbers(whole) == (rows, summary, tries)
    assert (whole / "scores.csv").read_text() == "".join(lines)
    assert passes[0] == ((2, 4, 7), "search")  # for 7 alone, whose volatility is that since 4
    # Counts added afterwards. They do not change the volatility of later ones, which is not measured again.
    part = evaluate(f"{TINY} {NESTED} --schedule 2 7 --full_search --track_every 3")
    passes.clear()
    evaluate(f"--resume {part} --schedule 2 4 7")
    assert {stops for stops, purpose in passes if purpose == "search"} == {(2, 4)}
    added = read_results(part).rows
    assert [row for row in added if row["classes"] < 7] == [row for row in rows if row["classes"] < 7]
    assert fixed(added) == fixed(rows)


def test_a_tracked_evaluation_leaves_table_and_picture(evaluate: Evaluate) -> None:
    flags = f"{TINY} --schedule 2 5 --runs 2 --lr 0.01 --model ANML.net"
    plain, tracked = evaluate(flags), evaluate(f"{flags} --track_every 2")
    assert read_results(plain).rows == read_results(tracked).rows
    assert not list(plain.glob("forgetting*"))
    with (tracked / "forgetting_5.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["seen", "position", "class", "train", "test"]
    assert len(rows) == 2 + 4 + 5
    first = read_results(tracked).rows[2]
    assert sum(float(row["test"]) for row in rows[-5:]) / 5 == pytest.approx(first["test"])
    assert (tracked / "forgetting_5.png").read_bytes().startswith(b"\x89PNG")
    config = (tracked / "config.json").read_text()
    assert '"lrs": null' in config  # an earlier commit recorded flags that mean nothing with --lr
    (tracked / "config.json").write_text(config.replace('"lrs": null', '"lrs": [0.1]'))
    evaluate(f"--resume {tracked} --runs 3")
    for n in (2, 5):  # once, and not lost with the points of the first process
        assert [step for step, _ in curve(tracked, f"meta_test/forgetting_{n}")] == [n]
    for tag, steps in (("accuracy_test", [2, 5]), ("accuracy", [5])):
        assert [step for step, _ in curve(tracked, f"meta_test/{tag}")] == steps
