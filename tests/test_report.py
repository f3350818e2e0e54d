"""`gere report`: one page that loads nothing, figures as computed by hand, and a named error for what is damaged."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from gere.cli.main import main
from gere.errors import ConfigError, RunFolderError
from gere.report import make_report
from gere.report.axes import axis_of
from gere.report.figures import MEANINGS, ability, figures, group
from gere.report.markdown import markdown_table
from gere.report.plots import _points
from gere.report.reading import labels_of, read_runs
from gere.report.run import Run
from gere.report.style import STYLE
from gere.report.svg import HEIGHT, LEFT, MOST_POINTS, WIDTH, Line, Point, line_plot, point_plot, reach, thinned

TASKS = ["agnews", "yelp"]
ACCURACY = [[0.9, 0.2], [0.5, 0.7]]
GENERAL = [
    {"general/loss": 3.0, "general/sciq": 0.75, "general/sciq_se": 0.01},
    {"general/loss": 3.5, "general/sciq": 0.7, "general/sciq_se": 0.01},
    {"general/loss": 4.0, "general/sciq": 0.6, "general/sciq_se": 0.01},
]
VOID = {"meta", "br"}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path.parent


def sequence(folder, *, name="tm", seed=0, rows=2, tasks=TASKS, accuracy=ACCURACY, settings=None, **matrix):
    write_json(
        folder / "sequence.json", {"format": 1, "name": name, "seed": seed, "tasks": tasks, "settings": settings or {}}
    )
    held = {
        "format": 1,
        "tasks": tasks,
        "accuracy": accuracy[:rows],
        "invalid": [[0.25] * len(tasks) for _ in accuracy[:rows]],
        "before": [0.1] * len(tasks),
        "general": GENERAL[: rows + 1],
    }
    logs = [
        {"task": task, "step": step, "gere/ce": 3.0 + task + step / 10, "gere/weight": 10.0, "loss": 1.0}
        for task in range(rows)
        for step in (5, 10)
    ]
    (folder / "logs.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs), encoding="utf-8")
    return write_json(folder / "matrix.json", held | matrix)


def training(folder, *, steps=20, last=20, logs=None):
    first = {"step": 0, "general/loss": 3.0, "general/sciq": 0.75}
    second = {"step": steps, "general/loss": 3.25, "general/loss_change": 0.25, "general/sciq": 0.7, "gere/ce": 3.0}
    return write_json(
        folder / "trainer_state.json",
        {"global_step": steps, "max_steps": last, "log_history": [first, second] if logs is None else logs},
    )


class Page(HTMLParser):
    """Text and tags of a page; fails where tags do not close in turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def pictures(text):
    return [ElementTree.fromstring(picture) for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def rows_of(markdown):
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in markdown.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines}


def test_figures_by_hand(tmp_path):
    (run,) = read_runs([sequence(tmp_path / "run")])
    found = figures(run)
    assert found == pytest.approx(
        {
            "AP": 0.6,
            "F1 Avg": 0.6,
            "OP": 0.75,
            "BWT": -0.4,
            "FWT": 0.1,
            "forgetting": 0.4,
            "invalid": 0.25,
            "general loss": 4.0,
            "change": 1.0,
            "sciq": 0.6,
        }
    )
    assert run.curves["general/loss"] == {0: 3.0, 10: 3.5, 20: 4.0}
    assert run.curves["gere/ce"] == {5: 3.5, 10: 4.0, 15: 4.5, 20: 5.0}
    assert set(run.curves) == {"general/loss", "general/sciq", "gere/ce", "gere/weight"}


def test_means_over_seeds_with_their_intervals(tmp_path):
    last = [0.5, 0.53, 0.59]
    runs = [
        sequence(tmp_path / str(seed), seed=seed, accuracy=[[0.9, 0.2], [score, score]])
        for seed, score in enumerate(last)
    ]
    half = sequence(tmp_path / "half", seed=7, rows=1)
    found = rows_of(make_report([*runs, half]).markdown)
    width = 4.302653 * statistics.stdev(last) / math.sqrt(3)
    assert found["tm"]["AP"] == f"{statistics.fmean(last):.3f} ± {width:.3f}"
    assert found["tm"]["general loss"] == "4.000 ± 0.000"
    assert found["tm"]["seeds"] == "0, 1, 2; not counted: 7: 1 of 2 tasks"
    assert found["before training"]["AP"] == "0.100" and found["before training"]["general loss"] == "3.000"


def test_a_figure_that_a_seed_lacks_has_no_mean(tmp_path):
    one = sequence(tmp_path / "0")
    other = sequence(tmp_path / "1", seed=1, general=[])
    found = rows_of(make_report([one, other]).markdown)["tm"]
    assert found["AP"] == "0.600 ± 0.000" and "general loss" not in found


def test_tasks_trained_at_once(tmp_path):
    joint = sequence(tmp_path / "joint", name="joint", rows=1, accuracy=[[0.8, 0.6]], settings={"mode": "multitask"})
    (run,) = read_runs([joint])
    found = figures(run)
    assert run.state == "" and found["AP"] == pytest.approx(0.7) and found["invalid"] == 0.25
    assert all(math.isnan(found[name]) for name in ("OP", "BWT", "FWT", "forgetting"))
    assert "after all tasks" in make_report([joint]).html
    begun = sequence(tmp_path / "begun", rows=0, settings={"mode": "multitask"})
    assert read_runs([begun])[0].state == "in training"


def test_a_sequence_before_its_first_task(tmp_path):
    folder = write_json(tmp_path / "run" / "sequence.json", {"format": 1, "name": "a", "seed": 0, "tasks": TASKS})
    report = make_report([folder])
    assert report.html.count("not there yet") == 2 and "0 of 2 tasks" in report.html
    assert rows_of(report.markdown)["a"]["seeds"] == "not counted: 0: 0 of 2 tasks"


def test_plain_trainings_alone(tmp_path):
    done, half = training(tmp_path / "done"), training(tmp_path / "half", steps=5)
    report = make_report([done, half])
    found = rows_of(report.markdown)
    assert (found["done"]["general loss"], found["done"]["change"], found["done"]["sciq"]) == (
        "3.250",
        "+0.250",
        "0.700",
    )
    assert found["half"]["seeds"] == "not counted: 5 of 20 steps" and found["half"]["sciq"] == "-"
    assert found["before training"]["general loss"] == "3.000" and "AP" not in found["done"]
    assert "Accuracy after each task" not in report.html and "Task score against" not in report.html


def test_the_newest_state_of_a_training(tmp_path):
    folder = tmp_path / "run"
    for step in (5, 10, 20):
        training(folder / f"checkpoint-{step}", steps=step)
    (folder / "checkpoint-30").mkdir()
    assert read_runs([folder])[0].state == "" and 20 in read_runs([folder])[0].curves["general/loss"]
    training(folder, steps=15)
    assert 20 in read_runs([folder])[0].curves["general/loss"]
    training(folder, steps=25, last=40, logs=[{"step": 25, "train_runtime": 1.0}])
    assert read_runs([folder])[0].state == "", "stopped early"


def test_the_state_of_a_real_trainer(make_trainer, arguments, tmp_path):
    trainer = make_trainer(args=arguments(save_strategy="steps", save_steps=2))
    trainer.train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    report = make_report([tmp_path / "out"])
    assert "gere/violations over optimizer steps" in report.html and "2 of 3 steps" in report.html
    assert "No run has logged general/loss" in report.html
    trainer.save_state()
    (run,) = read_runs([tmp_path / "out"])
    logged = {log["step"]: log["gere/ce"] for log in trainer.state.log_history if "gere/ce" in log}
    assert run.state == "" and run.curves["gere/ce"] == logged and len(logged) == 3


@pytest.fixture
def mixed(tmp_path):
    hostile = '<script>alert("1")</script> | *x* `y` & \\'
    folders = [sequence(tmp_path / f"tm-{seed}", seed=seed, name=hostile) for seed in range(2)]
    folders.append(sequence(tmp_path / "half", name="ce", rows=1, tasks=["<i>", "b&c"]))
    folders.append(training(tmp_path / "<plain>"))
    return folders


def test_page_is_whole_and_loads_nothing(mixed):
    text = make_report(mixed).html
    page = Page(text)
    assert {"script", "link", "img", "iframe", "base", "i"} & set(page.tags) <= {"i"} and page.tags.count("svg") >= 6
    assert not {"src", "href", "onload", "onclick", "xlink:href"} & {name for name, _ in page.attributes}
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    assert "<script" not in text and '<script>alert("1")</script> | *x* `y` & \\, seed 1' in page.texts
    assert "after b&c" in page.texts and "<i>" in page.texts
    assert ("name", "viewport") in page.attributes and "prefers-color-scheme:dark" in text
    assert any("default-src 'none'" in str(value) for _, value in page.attributes)


def test_pictures_have_names_and_scale(mixed):
    found = pictures(make_report(mixed).html)
    for picture in found:
        assert picture.get("role") == "img" and picture.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
        assert picture[0].tag == "title" and picture[0].text
        assert "width" not in picture.attrib
    names = [picture[0].text for picture in found]
    assert names[:3] == ["AP over general accuracy", "AP over general loss", "general/loss over optimizer steps"]
    classes = {name for picture in found for part in picture.iter() for name in part.get("class", "").split()}
    assert classes and all(f".{name}" in STYLE for name in classes)


def test_same_bytes_for_the_same_files(mixed, tmp_path):
    for seed in ("1", "2"):
        words = [sys.executable, "-m", "gere.cli", "report", *mixed, "--out", tmp_path / f"{seed}.html"]
        words += ["--markdown", tmp_path / f"{seed}.md"]
        subprocess.run(words, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, timeout=60, capture_output=True)
    for end in ("html", "md"):
        assert (tmp_path / f"1.{end}").read_bytes() == (tmp_path / f"2.{end}").read_bytes()


def test_heat_map(tmp_path):
    text = make_report([sequence(tmp_path / "run", accuracy=[[0.9, None], [0.5, 0.7]])]).html
    table = ElementTree.fromstring(re.search(r'<table class="heat wide">.*?</table>', text)[0])
    cells = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
    assert cells == [
        ["accuracy on", *TASKS],
        ["before training", "0.100", "0.100"],
        ["after agnews", "0.9000.25", "-0.25"],
        ["after yelp", "0.5000.25", "0.7000.25"],
    ]
    shades = [
        float(cell.get("style").rpartition(",")[2].rstrip(")")) for cell in table.iter("td") if cell.get("style")
    ]
    assert shades == pytest.approx([0.06, 0.06, 0.54, 0.3, 0.42])


def test_values_that_are_not_finite_are_named(tmp_path):
    logs = [{"step": 1, "gere/ce": math.nan, "gere/tm": 10**400}, {"step": 2, "gere/ce": 3.0, "gere/weight": True}]
    text = make_report([training(tmp_path / "run", logs=logs)]).html
    assert text.count("Values that are not finite are left out: run (1).") == 2
    assert "gere/weight" not in text
    Page(text)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = sequence(tmp_path / "run")
    with (folder / "logs.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"task": 1, "st')
    assert max(read_runs([folder])[0].curves["gere/ce"]) == 20


def test_logs_of_a_task_that_is_not_evaluated_yet(tmp_path):
    folder = sequence(tmp_path / "run", rows=2, accuracy=ACCURACY)
    sequence(tmp_path / "short", rows=1)
    (folder / "matrix.json").write_bytes((tmp_path / "short" / "matrix.json").read_bytes())
    (run,) = read_runs([folder])
    assert run.curves["general/loss"] == {0: 3.0, 10: 3.5} and max(run.curves["gere/ce"]) == 20 and run.ends == [10]


DAMAGE = {
    "sequence.json cut": ("sequence.json", '{"format": 1, "na', "sequence.json"),
    "sequence.json list": ("sequence.json", "[]", "a JSON object"),
    "sequence.json format": ("sequence.json", '{"format": 2}', "format"),
    "no tasks": ("sequence.json", '{"format": 1, "name": "a", "seed": 0, "tasks": []}', "tasks"),
    "no name": ("sequence.json", '{"format": 1, "seed": 0, "tasks": ["agnews", "yelp"]}', "name"),
    "no seed": ("sequence.json", '{"format": 1, "name": "a", "seed": "0", "tasks": ["agnews", "yelp"]}', "seed"),
    "not UTF-8": ("matrix.json", b"\xff\xfe", "UTF-8"),
    "other tasks": ("matrix.json", '{"format": 1, "tasks": ["x"], "accuracy": [], "invalid": []}', "those of"),
    "short row": ("matrix.json", {"accuracy": [[0.5]], "invalid": [[0, 0]]}, "a list of 2"),
    "text": ("matrix.json", {"accuracy": [["a", 1]], "invalid": [[0, 0]]}, "from 0 to 1"),
    "percent": ("matrix.json", {"accuracy": [[60.5, 1]], "invalid": [[0, 0]]}, "from 0 to 1"),
    "too many rows": ("matrix.json", {"accuracy": [[0, 0]] * 3, "invalid": []}, "at most 2 rows"),
    "other shape": ("matrix.json", {"accuracy": [[0, 0]], "invalid": []}, "1 rows"),
    "before": ("matrix.json", {"accuracy": [], "invalid": [], "before": 3}, "before"),
    "general": ("matrix.json", {"accuracy": [], "invalid": [], "general": [{}, {}]}, "at most 1 objects"),
    "line": ("logs.jsonl", '{"task": 0, "step": 1}\n{"task": 0, \n', "line 2"),
    "no step": ("logs.jsonl", '{"task": 0}\n', "line 1"),
    "no task": ("logs.jsonl", '{"step": 0}\n', "index of a task"),
    "deep": ("logs.jsonl", "[" * 100_000 + "\n", "line 1"),
}


@pytest.mark.parametrize(("name", "content", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_sequences(tmp_path, name, content, says):
    folder = sequence(tmp_path / "run")
    if isinstance(content, dict):
        content = json.dumps({"format": 1, "tasks": TASKS, **content})
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunFolderError, match=re.escape(says)) as caught:
        make_report([folder])
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"log_history": [1]}', '{"log_history": [{"loss": 1}]}', '{"log_history": [{"step": NaN}]}'],
)
def test_damaged_trainings(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"trainer_state\.json"):
        make_report([tmp_path])


def test_no_run(tmp_path):
    for folder, found in ((tmp_path, "a folder without them"), (tmp_path / "nothing", "no folder")):
        with pytest.raises(RunFolderError, match=found):
            make_report([folder])
    training(tmp_path / "a")
    with pytest.raises(ConfigError, match="named twice"):
        make_report([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_labels_are_unlike():
    runs = [Run(Path("a"), "tm", 0), Run(Path("b"), "tm", 1), Run(Path("c"), "tm", 1), Run(Path("d"), "ce", 0)]
    assert labels_of(runs) == ["tm, seed 0", "tm, seed 1 (b)", "tm, seed 1 (c)", "ce"]


def test_axes():
    axis = axis_of([0, 10])
    assert axis.place(axis.low) == 0 and axis.place(axis.high) == 1 and axis.place(5) == pytest.approx(0.5)
    assert axis.ticks() == [0, 5, 10]
    assert axis_of([3.3851, 3.4129]).ticks() == pytest.approx([3.39, 3.4, 3.41])
    wide = axis_of([1e-4, 10.0], wide=True)
    assert wide.logarithmic and wide.ticks() == pytest.approx([1e-4, 1e-2, 1])
    assert not axis_of([0.0, 1e9], wide=True).logarithmic and not axis_of([1e-4, 10.0]).logarithmic
    for same in (0.0, 7.0, -2.0):
        assert axis_of([same]).place(same) == pytest.approx(0.5)
    for low, high in [(-1e300, 1e300), (0, 5e-324), (1e16, 1e16 + 2), (-3, 1e-9)]:
        assert 1 <= len(axis_of([low, high]).ticks()) <= 8


def test_points_lie_where_their_values_are():
    picture = ElementTree.fromstring(line_plot("t", "x", "y", [Line("a", 0, [(0, 0), (10, 5), (20, 10)])]))
    places = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in picture.iter("circle")]
    texts = [(text.get("text-anchor"), text.text, text) for text in picture.iter("text")]
    across = {text: float(at.get("x")) for anchor, text, at in texts if anchor == "middle"}
    up = {text: float(at.get("y")) for anchor, text, at in texts if anchor == "end"}
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2, abs=0.1)
    assert [x for x, _ in places] == pytest.approx([across["0"], across["10"], across["20"]], abs=0.1)
    assert places[0][1] > places[1][1] > places[2][1] and all(LEFT <= x <= WIDTH for x, _ in places)
    assert [y + 4 for _, y in places] == pytest.approx([up["0"], up["5"], up["10"]], abs=0.1)


def drawn(points):
    """Dots of a plot by their label, ends of its bars, and the value at each place by what the ticks say."""
    picture = ElementTree.fromstring(point_plot("t", "x", "y", points))
    dots = {dot[0].text: (float(dot.get("cx")), float(dot.get("cy"))) for dot in picture.iter("circle")}
    bars = [path.get("d") for path in picture.iter("path") if "bar" in path.get("class").split()]
    return dots, bars, [part.tag for part in picture if "bar" in part.get("class", "") or part.tag == "circle"]


def test_bars_reach_as_far_as_their_intervals():
    """The ends lie where points at the ends of the intervals would lie."""
    mean = Point("mean", 0, 5.0, 0.5, "mean", (2.0, 0.1))
    corners = [Point("low", 1, 3.0, 0.4, "run"), Point("high", 1, 7.0, 0.6, "run")]
    dots, bars, order = drawn([mean, *corners])
    (left, low), (right, high), (x, y) = (dots[name] for name in ("low", "high", "mean"))
    assert bars == [
        f"M{left:.1f} {y:.1f}H{right:.1f}M{left:.1f} {y:.1f}m0 -4v8M{right:.1f} {y:.1f}m0 -4v8",
        f"M{x:.1f} {low:.1f}V{high:.1f}M{x:.1f} {low:.1f}m-4 0h8M{x:.1f} {high:.1f}m-4 0h8",
    ]
    assert order == ["path", "path", "circle", "circle", "circle"], "bars lie below the points"
    assert drawn(corners)[1] == [] and drawn([mean._replace(half=(math.nan, 0.1))])[1] != []


def test_a_bar_that_is_too_long_is_cut_and_leaves_the_points_their_room():
    others = [Point("a", 1, 0.0, 0.0, "run"), Point("b", 1, 1.0, 1.0, "run")]
    dots, bars, _ = drawn([Point("mean", 0, 0.5, 0.5, "mean", (1e9, 1.2)), *others])
    assert bars[0] == f"M{LEFT:.1f} {dots['mean'][1]}H{WIDTH - 12:.1f}", "from edge to edge, without caps"
    assert bars[1].count("m-4 0h8") == 2, "an end in the plot has its cap"
    assert dots["b"][0] - dots["a"][0] > (WIDTH - LEFT) / 4
    assert set(reach([1.0], [0.5])) == {0.5, 1.0, 1.5} and reach([1.0, 2.0], [math.nan] * 2) == [1.0, 2.0]


def test_the_trade_off_has_the_intervals_of_the_table(tmp_path):
    last = [0.5, 0.53, 0.59]
    folders = [
        sequence(tmp_path / str(seed), seed=seed, accuracy=[[0.9, 0.2], [score, score]], general=[*GENERAL[:2], entry])
        for seed, score in enumerate(last)
        for entry in [{"general/loss": 4 + score, "general/sciq": score}]
    ]
    folders.append(sequence(tmp_path / "single", name="single"))
    groups = group(read_runs(folders))
    points = [
        point
        for held in groups
        for point in _points(held, ability, {str(f): f.name for f in folders}, 0)
        if point.kind == "mean"
    ]
    width = 4.302653 * statistics.stdev(last) / math.sqrt(3)
    assert points[0].half == pytest.approx((width, width), rel=1e-5) and (points[0].x, points[0].y) == pytest.approx(
        (statistics.fmean(last), statistics.fmean(last))
    )
    assert all(map(math.isnan, points[1].half)), "a single run has no interval"
    assert len(re.findall(r'class="c0 bar"', make_report(folders).html)) == 4


def test_long_curves_are_means_of_neighbours():
    points = [(float(x), float(x % 2)) for x in range(4000)]
    thin = thinned(points)
    assert len(thin) == MOST_POINTS and thin[0] == (4.5, 0.5) and thin[-1] == (3994.5, 0.5)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS] and thinned([]) == []


def test_markdown_shows_cells_as_they_are():
    text = markdown_table([["a|b", "<b>"], ["x\ny", "`*\\"]])
    assert text == "| a\\|b | &lt;b&gt; |\n| --- | --- |\n| x y | \\`\\*\\\\ |\n"


def test_command(tmp_path, capsys):
    folder = sequence(tmp_path / "run", name="half \ud800")
    out = tmp_path / "new" / "page.html"
    words = ["report", str(folder), "--out", str(out), "--markdown", str(tmp_path / "table.md")]
    assert main(words) == 0 and out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| half ? | 0 | 0.600 |" in table
    assert main(["report", str(folder), "--out", "page.txt"]) == 1
    assert main(["report", str(folder), "--out", str(out), "--markdown", "README"]) == 1
    assert main(["report", str(tmp_path), "--out", str(out)]) == 1
    assert main(["report", str(folder), "--out", str(out / "below.html")]) == 1
    assert "The report cannot be written" in capsys.readouterr().err


def test_command_imports_nothing_heavy(tmp_path):
    folder = sequence(tmp_path / "run")
    script = (
        "import sys\nfrom gere.cli.main import main\n"
        f"main(['report', {str(folder)!r}, '--out', {str(tmp_path / 'a.html')!r}])\n"
        "sys.stderr.write(' '.join({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("| name | seeds | AP |")


def test_document_names_every_figure():
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in MEANINGS)
