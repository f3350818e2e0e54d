"""`gere report`: one page that loads nothing, figures as computed by hand, and a named error for what is damaged."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gere.cli.main import main
from gere.errors import ConfigError, MissingPackageError, RunFolderError
from gere.report import make_report
from gere.report.figures import MEANINGS, figures
from gere.report.plots import CURVES
from gere.report.reading import read_runs

TASKS = ["agnews", "yelp"]
ACCURACY = [[0.9, 0.2], [0.5, 0.7]]
GENERAL = [
    {"general/loss": 3.0, "general/sciq": 0.75, "general/sciq_se": 0.01},
    {"general/loss": 3.5, "general/sciq": 0.7, "general/sciq_se": 0.01},
    {"general/loss": 4.0, "general/sciq": 0.6, "general/sciq_se": 0.01},
]
VOID = {"meta", "br"}
SVG, HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
HOSTILE = "<script>alert(\"1\")</script> | *x* `y` & \\ 'z' $x_{1$"


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
    """Pictures of a page by what is read out in place of them."""
    found = re.findall(r'<div role="img" aria-label="(.*?)">(<svg.*?</svg>)</div>', text, re.DOTALL)
    return {html.unescape(title): ElementTree.fromstring(svg) for title, svg in found}


def drawn(picture):
    """What is in the axes of a picture: dots as (colour, across, up), bars as two ends, curves and their styles."""
    paths = {path.get("id"): path.get("d") for path in picture.iter(f"{SVG}path")}
    found = {"dots": [], "caps": [], "bars": [], "curves": [], "styles": []}
    for part in picture.find(f"{SVG}g/{SVG}g[2]"):
        kind = part.get("id").partition("-")[2].partition("_")[0]
        if kind not in ("line2d", "LineCollection"):
            continue
        for use in part.iter(f"{SVG}use"):
            place = value_at(picture, "x", use.get("x")), value_at(picture, "y", use.get("y"))
            colour = re.search(r"--c\d", use.get("style"))[0]
            found["dots" if "z" in paths[use.get(HREF)[1:]] else "caps"].append((colour, *place))
        for path in part.findall(f"{SVG}path"):
            points = re.findall(r"[ML] (\S+) (\S+)", path.get("d"))
            places = [(value_at(picture, "x", x), value_at(picture, "y", y)) for x, y in points]
            found["bars" if kind == "LineCollection" else "curves"].append(places)
            found["styles"] += [path.get("style")] if kind == "line2d" else []
    return found


def value_at(picture, axis, place):
    """The value at a place of a picture, by the text of its ticks."""
    values, places = [], []
    for tick in picture.iter(f"{SVG}g"):
        if re.search(rf"-{axis}tick_\d+$", tick.get("id", "")):
            values.append(float("".join(tick.itertext()).strip().replace("\u2212", "-").replace(",", "")))
            places.append(float(next(tick.iter(f"{SVG}use")).get(axis)))
    return float(np.polyval(np.polyfit(places, values, 1), float(place)))


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
            "general accuracy": 0.6,
            "general change": 1.0,
            "eval loss": math.nan,
            "sciq": 0.6,
        },
        nan_ok=True,
    )
    assert run.curves["general/loss"] == {0: 3.0, 10: 3.5, 20: 4.0}
    assert run.curves["gere/ce"] == {5: 3.5, 10: 4.0, 15: 4.5, 20: 5.0}
    assert run.curves["general/change"] == {0: 0.0, 10: 0.5, 20: 1.0}
    assert set(run.curves) == {"general/loss", "general/change", "general/sciq", "gere/ce", "gere/weight"}


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
    assert (found["done"]["general loss"], found["done"]["general change"], found["done"]["sciq"]) == (
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
    folders = [sequence(tmp_path / f"tm-{seed}", seed=seed, name=HOSTILE) for seed in range(2)]
    folders.append(sequence(tmp_path / "half", name="ce", rows=1, tasks=["<i>", "b&c"]))
    logs = [{"step": 1, 'gere/"><img src="x">': 1.0, "general/$\\frac{<b>\ud800": 0.5}]
    return [*folders, training(tmp_path / "<plain>"), training(tmp_path / "keys", logs=logs)]


def test_page_is_whole_and_loads_nothing(mixed):
    text = make_report(mixed).html
    page = Page(text)
    assert not {"script", "link", "img", "image", "iframe", "base", "object", "a"} & set(page.tags)
    assert page.tags.count("svg") >= 8
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in page.attributes}
    assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert text.count("url(") == text.count("url(#") > 0
    assert "@import" not in text and "http" not in re.sub(r'http-equiv|xmlns(:xlink)?="[^"]*"', "", text)
    assert ("name", "viewport") in page.attributes and "prefers-color-scheme:dark" in text
    assert ("content", "default-src 'none';style-src 'unsafe-inline'") in page.attributes


def test_names_are_text_wherever_they_stand(mixed):
    text = make_report(mixed).html
    page = Page(text)
    assert not {"i", "b"} & set(page.tags)
    assert {HOSTILE, f"{HOSTILE}, seed 1", "after b&c", "<i>"} <= {part.strip() for part in page.texts}
    labels = {value for name, value in page.attributes if name == "aria-label"}
    assert {'gere/"><img src="x"> over optimizer steps', "general/$\\frac{<b>? over optimizer steps"} <= labels
    assert "<script" not in text and str(mixed[3]) in page.texts


def test_a_picture_takes_ids_and_colours_from_nowhere_else(mixed):
    text = make_report(mixed).html
    every = [value for name, value in Page(text).attributes if name == "id"]
    assert len(every) == len(set(every)) > 100
    found = pictures(text)
    assert len(found) == text.count('role="img"') >= 8
    for picture in found.values():
        svg = ElementTree.tostring(picture, encoding="unicode")
        own = {part.get("id") for part in picture.iter()}
        used = re.findall(r"url\((.*?)\)", svg) + [use.get(HREF) for use in picture.iter(f"{SVG}use")]
        assert used and {reference[1:] for reference in used} <= own and {name[0] for name in used} == {"#"}
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {"none", *re.findall(r"var\(--\w+\)", svg)}
        assert all(text.count(f"{name}:") == 2 for name in re.findall(r"var\((--\w+)\)", svg)), "light and dark"
        assert picture.get("viewBox") and "svg{display:block;width:100%;height:auto}" in text


def test_what_is_drawn(mixed):
    assert list(pictures(make_report(mixed).html))[:3] == [
        "AP over general accuracy",
        "AP over general loss",
        "general/loss over optimizer steps",
    ]


def test_same_bytes_for_the_same_files(mixed, tmp_path):
    """Whatever the order of Python's sets is, and whatever a user has set for matplotlib."""
    for seed in ("1", "2"):
        words = [sys.executable, "-m", "gere", "report", *mixed, "--out", tmp_path / f"{seed}.html"]
        words += ["--markdown", tmp_path / f"{seed}.md"]
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "matplotlibrc").write_text(f"font.size: 1{seed}\nlines.linewidth: {seed}\n")
        env = {**os.environ, "PYTHONHASHSEED": seed, "MATPLOTLIBRC": str(tmp_path / seed)}
        subprocess.run(words, env=env, check=True, timeout=60, capture_output=True)
    for end in ("html", "md"):
        assert (tmp_path / f"1.{end}").read_bytes() == (tmp_path / f"2.{end}").read_bytes()


def test_heat_map(tmp_path):
    text = make_report([sequence(tmp_path / "run", accuracy=[[0.9, None], [0.5, 0.7]])]).html
    table = ElementTree.fromstring(re.search(r'<table class="heat few">.*?</table>', text, re.DOTALL)[0])
    cells = [["".join(cell.itertext()).strip() for cell in row] for row in table.iter("tr")]
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


def test_runs_that_differ_in_seed_and_folder_are_one_group(tmp_path):
    """Of sequences without a name of their own, and of trainings whose folder names the seed."""
    made = {"model": "m", "trainer": "gere", "training": {"learning_rate": 1e-4, "data_seed": 1}}
    other = {**made, "training": {"learning_rate": 1e-3, "data_seed": 1}}
    folders = [
        sequence(tmp_path / f"gere-{seed}", name=None, seed=seed, settings={**made, "seed": seed}) for seed in (9, 10)
    ]
    folders.append(sequence(tmp_path / "gere-fast", name=None, settings={**other, "seed": 0}))
    folders.append(sequence(tmp_path / "mine", name="mine", settings={**made, "seed": 0}))
    folders += [training(tmp_path / f"sft-seed-{seed}") for seed in (0, 1)]
    report = make_report(folders)
    found = rows_of(report.markdown)
    assert [(name, found[name]["seeds"]) for name in list(found)[-4:]] == [
        ("gere", "9, 10"),
        ("gere-fast", "0"),
        ("mine", "0"),
        ("sft", "0, 1"),
    ]
    assert found["gere"]["AP"] == "0.600 ± 0.000" and found["mine"]["AP"] == "0.600"
    legend = re.findall(r"</svg>(.*?)</li>", report.html)
    assert legend[:4] == ["gere", "gere-fast", "mine", "sft"]


def test_names_are_unlike(tmp_path):
    """Of groups of one name by their folder, of runs of a group by their seed, and where that is the same by both."""
    folders = [sequence(tmp_path / "a", seed=0)]
    folders += [sequence(tmp_path / name, seed=1) for name in "bc"]
    folders.append(sequence(tmp_path / "d", settings={"rows": 5}))
    report = make_report(folders)
    name, other = f"tm ({folders[0]})", f"tm ({folders[3]})"
    assert list(rows_of(report.markdown))[-2:] == [name, other]
    labels = re.findall(r"<caption>(.*?)</caption>", report.html)
    assert labels == [f"{name}, seed 0", f"{name} ({folders[1]})", f"{name} ({folders[2]})", other]


def test_the_page_begins_with_the_result(tmp_path):
    last = {"gere": (0.7, 3.1), "plain": (0.5, 4.5)}
    folders = [
        sequence(
            tmp_path / f"{name}-{seed}",
            seed=seed,
            name=name,
            accuracy=[[0.9, 0.2], [score, score]],
            general=[*GENERAL[:2], {"general/loss": loss + seed / 100}],
        )
        for name, (score, loss) in last.items()
        for seed in (0, 1)
    ]
    text = make_report(folders).html
    begin = html.unescape(re.sub(r"<[^>]*>", " ", text[text.index("<body>") : text.index("Task score against")]))
    says = "The highest task score is that of gere, 0.700 ± 0.000. "
    says += "The lowest general change is that of gere, +0.105 ± 0.064 nats a token."
    assert " ".join(begin.split()).startswith(f"Training report {says} group task score (AP) general change seeds")
    table = rows_of("".join(f"| {' | '.join(row)} |\n" for row in cells_of(text)[0]))
    assert table["plain"] == {
        "group": "plain",
        "task score (AP)": "0.500 ± 0.000",
        "general change": "+1.505 ± 0.064",
        "seeds": "0, 1",
    }
    figures = {row[0]: row[1:] for row in cells_of(text)[1]}
    assert figures["group"] == ["before training", "gere", "plain", ""]
    assert figures["AP"] == ["0.100", "0.700 ± 0.000", "0.500 ± 0.000", MEANINGS["AP"]]
    (one,) = re.findall(r'<p class="result">(.*?)</p>', make_report(folders[:1]).html)
    assert one == "gere has a task score of 0.700 and a general change of +0.100 nats a token."
    other = sequence(tmp_path / "other", name="other", accuracy=[[0.9, 0.2], [0.7, 0.7]])
    assert "The highest task score is that of gere and other, 0.700." in make_report([folders[0], other]).html
    elsewhere = sequence(tmp_path / "elsewhere", name="elsewhere", tasks=["x", "y"])
    assert "gere has a task score of 0.700 and" in make_report([folders[0], elsewhere]).html, "not to be compared"
    begun = make_report([sequence(tmp_path / "begun", rows=1)]).html
    assert "There is no result yet" in begun


def cells_of(text):
    """Rows of the tables of a page."""
    tables = re.findall(r'<table class="(?:few|many|cards)">.*?</table>', text, re.DOTALL)
    return [
        [
            ["".join(cell.itertext()).replace("\u00a0", " ") for cell in row]
            for row in ElementTree.fromstring(table).iter("tr")
        ]
        for table in tables
    ]


def test_model_settings_and_date_are_named(tmp_path):
    both = {"model": "tiny", "training": {"max_steps": 3}, "lora": None, "seed": 0, "tasks": ["agnews", "yelp"]}
    folders = [sequence(tmp_path / name, name=None, settings={**both, "trainer": name}) for name in ("gere", "plain")]
    for day, folder in enumerate(folders):
        os.utime(folder / "matrix.json", (86400 * day, 86400 * day))
    text = make_report(folders).html
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)[:3] == [
        ("all runs", "model tiny; training.max_steps 3"),
        ("gere", "trainer gere"),
        ("plain", "trainer plain"),
    ]
    assert "2 runs of 2 groups,\n1970-01-01 to 1970-01-02." in text
    assert [row[2] for row in cells_of(text)[-1]] == ["date", "1970-01-01", "1970-01-02"]
    plain = training(tmp_path / "run" / "checkpoint-20").parent
    write_json(plain / "checkpoint-20" / "config.json", {"architectures": ["LlamaForCausalLM"]})
    assert "<dd>model LlamaForCausalLM; max_steps 20</dd>" in make_report([plain]).html


def test_old_and_new_names_of_a_key_are_one_curve(tmp_path):
    """The new one counts, wherever it stands; the old one is drawn under the new name."""
    old = {"general/loss": 3.5, "general/loss_change": 0.9, "gere/forgetting": 0.7}
    new = {"general/change": 0.5, "general/change_interval": 0.125, "gere/replay_change": 0.2}
    begin = {"step": 0, "general/loss": 3.0}
    for name, logs, change, replayed in (
        ("both", [{"step": 5, **new}, {"step": 5, **old}], 0.5, 0.2),
        ("one", [{"step": 5, **old, **new}], 0.5, 0.2),
        ("old", [{"step": 5, **old}], 0.9, 0.7),
    ):
        folder = training(tmp_path / name, steps=5, last=5, logs=[begin, *logs])
        (run,) = read_runs([folder])
        assert run.curves["general/change"] == {5: change} and run.curves["gere/replay_change"] == {5: replayed}
        text = make_report([folder]).html
        titles = [title.partition(" ")[0] for title in pictures(text)]
        assert titles == ["general/loss", "general/change", "gere/replay_change"]
        interval = " ± 0.125" if name != "old" else ""
        assert rows_of(make_report([folder]).markdown)[name]["general change"] == f"+{change:.3f}{interval}"


def test_the_loss_of_a_training_is_its_task_score(tmp_path):
    logs = [{"step": 5, "eval_loss": 2.5}, {"step": 20, "eval_loss": 1.25}]
    report = make_report([training(tmp_path / "run", logs=logs)])
    assert "run has a loss on the task of 1.250." in report.html
    assert rows_of(report.markdown)["run"]["eval loss"] == "1.250"


def test_the_matrix_of_a_sequence_goes_before_the_logs(tmp_path):
    """The trainer measures other texts than the sequence does."""
    folder = sequence(tmp_path / "run")
    logs = [
        {"task": task, "step": step, "general/loss": 9.0, "general/change": 6.0} for task in (0, 1) for step in (5, 10)
    ]
    (folder / "logs.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    (run,) = read_runs([folder])
    assert run.curves["general/loss"] == {0: 3.0, 10: 3.5, 20: 4.0} and run.general_now["change"] == 1.0


def test_every_curve_is_explained(tmp_path):
    keys = ["general/loss", "general/change", "general/sciq", *(key for key in CURVES if key.startswith("gere/"))]
    text = make_report(
        [training(tmp_path / "run", logs=[{"step": step, **dict.fromkeys(keys, 1.0)} for step in (0, 20)])]
    ).html
    sentences = re.findall(r"</svg></div>\s*<p class=\"note\">(.*?)</p>", text)
    assert len(sentences) == len(pictures(text)) == len(keys) == len({*sentences}) and all(sentences)


WIDTHS = (320, 390, 700, 1280)
FRAME = '<iframe src="{page}" width="{width}" height="800"></iframe>'
MEASURE = """<script>
window.onload = () => {
  document.title = [...document.querySelectorAll("iframe")].map(frame => {
    const inside = frame.contentDocument, width = inside.documentElement.clientWidth
    const over = [...inside.querySelectorAll("body *")].filter(part => part.getBoundingClientRect().right > width + 1)
    const hidden = [...inside.querySelectorAll("td")].filter(cell => !cell.getClientRects().length)
    return [width, inside.documentElement.scrollWidth, over.length, hidden.length].join(" ")
  }).join(", ")
}</script>"""
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
TASKS_15 = [f"a-task-of-a-long-name-{index}" for index in range(15)]


@pytest.fixture
def wide(tmp_path):
    """A page with tables that are wider than any telephone."""
    row = [0.5] * 15
    folders = [sequence(tmp_path / f"long-name-of-a-folder-{seed}", seed=seed, name=None) for seed in range(3)]
    folders.append(
        sequence(tmp_path / "fifteen", tasks=TASKS_15, rows=15, accuracy=[row] * 15, before=row, general=[])
    )
    file = tmp_path / "page.html"
    file.write_text(make_report(folders).html, encoding="utf-8")
    return file


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_no_sideways_scroll_on_a_telephone(wide, tmp_path):
    """In a browser: no part is wider than the window, and every cell is there."""
    frames = [FRAME.format(page=wide.as_uri(), width=width) for width in WIDTHS]
    (tmp_path / "frames.html").write_text("".join(frames) + MEASURE)
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,900"]
    words += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--allow-file-access-from-files",
        "--virtual-time-budget=3000",
    ]
    words += ["--dump-dom", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    found = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    assert found == ", ".join(f"{width} {width} 0 0" for width in WIDTHS)


def test_tables_are_cards_where_they_are_narrow_and_the_page_prints_whole(wide):
    """What a browser needs for it: see `test_no_sideways_scroll_on_a_telephone`."""
    text = wide.read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    tables = re.findall(r'<div class="fit(?: full)?"><table class="([a-z ]+)">(.*?)</table></div>', text, re.DOTALL)
    assert len(tables) == text.count("<table") == 7
    for kind, content in tables:
        width = kind.rpartition(" ")[2]
        cards = style[style.index(f".{width} tr{{display:grid") :]
        assert f".{width} td::before{{content:attr(data-label)" in cards
        assert content.count("<td data-label=") + content.count("<td colspan=") == content.count("<td")
    assert ".fit{container-type:inline-size}" in style and "overflow-x" not in style and "nowrap" not in style
    assert (
        "@media print" in style and "break-inside:avoid" in style and "screen and (prefers-color-scheme:dark)" in style
    )
    assert "<details" not in text, "what is folded is not printed"


def curve_of(tmp_path, values, key="gere/x"):
    logs = [{"step": step, key: value} for step, value in values]
    return drawn(pictures(make_report([training(tmp_path / "curve", logs=logs)]).html)[f"{key} over optimizer steps"])


def test_points_lie_where_their_values_are(tmp_path):
    values = [(0, 0.0), (1000, 5.0), (2000, 10.0), (3000, -2.5)]
    found = curve_of(tmp_path, values)
    assert [place for _, *place in found["dots"]] == [pytest.approx(point, abs=0.01) for point in values]
    assert found["curves"] == [[pytest.approx(point, abs=0.01) for point in values]]


def test_an_axis_of_many_decades_is_logarithmic(tmp_path):
    """Equal ratios are equal distances, from a factor of 1,000 on and above 0."""
    for values, logarithmic in (((1e-4, 1e-2, 1.0), True), ((0.0, 1e-2, 1.0), False), ((1e-2, 0.1, 1.0), False)):
        logs = [{"step": step, "gere/x": value} for step, value in enumerate(values)]
        picture = pictures(make_report([training(tmp_path / "run", logs=logs)]).html)["gere/x over optimizer steps"]
        heights = [float(use.get("y")) for use in picture.find(f"{SVG}g/{SVG}g[2]").iter(f"{SVG}use")][-3:]
        assert (heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.01)) == logarithmic


def test_long_curves_are_means_of_neighbours(tmp_path):
    (line,) = curve_of(tmp_path, [(step, step % 2) for step in range(4000)])["curves"]
    assert (line[0][0], line[-1][0]) == (pytest.approx(4.5, abs=0.1), pytest.approx(3994.5, abs=0.1))
    assert {round(y, 6) for _, y in line} == {0.5}
    (line,) = curve_of(tmp_path, [(step, step % 2) for step in range(400)])["curves"]
    assert {round(y, 3) for _, y in line} == {0, 1}


def test_dotted_lines_where_tasks_end(tmp_path):
    one, other = sequence(tmp_path / "one"), sequence(tmp_path / "other", seed=1)
    title = "gere/ce over optimizer steps"

    def ends():
        found = drawn(pictures(make_report([one, other]).html)[title])
        dotted = ["--faint" in style for style in found["styles"]]
        return [line[0][0] for line, mark in zip(found["curves"], dotted, strict=True) if mark]

    assert ends() == [pytest.approx(10, abs=0.01), pytest.approx(20, abs=0.01)]
    (other / "logs.jsonl").write_text('{"task": 0, "step": 7, "gere/ce": 3.0}\n')
    assert ends() == [], "the runs do not agree"


def test_groups_are_told_apart_without_colour(tmp_path):
    """By marker and dashes, in the pictures as in the legend."""
    folders = [training(tmp_path / f"run{index:02}") for index in range(16)]
    text = make_report(folders).html
    curves = pictures(text)["general/loss over optimizer steps"]
    paths = {path.get("id"): path.get("d") for path in curves.iter(f"{SVG}path")}
    looks = []
    for line in curves.find(f"{SVG}g/{SVG}g[2]"):
        if line.get("id").partition("-")[2].startswith("line2d"):
            marker = paths[next(line.iter(f"{SVG}use")).get(HREF)[1:]]
            dashes = re.search(r"stroke-dasharray: ([^;]*)", line.find(f"{SVG}path").get("style"))
            # In units of the line's width, as in the legend.
            widths = [float(width) / 1.5 for width in dashes[1].split(",")] if dashes else []
            looks.append((marker, tuple(round(width, 3) for width in widths)))
    assert len(looks) == len(set(looks)) == 16
    legend = re.findall(r'dasharray="(.*?)"/><path d="(.*?)"/></svg>(run\d\d)</li>', text)[:16]
    assert len({one[:2] for one in legend}) == 16
    for (dashes, outline, _), (_, widths) in zip(legend, looks, strict=True):
        assert tuple(map(float, dashes.split())) == widths and outline
    assert len({outline for _, outline, _ in legend}) == len({marker for marker, _ in looks})


def test_the_trade_off_has_the_intervals_of_the_table(tmp_path):
    last = [0.5, 0.53, 0.59]
    folders = [
        sequence(tmp_path / str(seed), seed=seed, accuracy=[[0.9, 0.2], [score, score]], general=[*GENERAL[:2], entry])
        for seed, score in enumerate(last)
        for entry in [{"general/loss": 4 + score, "general/sciq": score}]
    ]
    folders.append(sequence(tmp_path / "single", name="single"))
    found = drawn(pictures(make_report(folders).html)["AP over general accuracy"])
    mean, half = statistics.fmean(last), 4.302653 * statistics.stdev(last) / math.sqrt(3)
    near = {"abs": 1e-4}
    assert found["bars"] == [
        [pytest.approx((mean - half, mean), **near), pytest.approx((mean + half, mean), **near)],
        [pytest.approx((mean, mean - half), **near), pytest.approx((mean, mean + half), **near)],
    ], "a single run has no interval"
    assert len(found["caps"]) == 4
    assert [(round(x, 3), round(y, 3)) for _, x, y in found["dots"][-2:]] == [(0.54, 0.54), (0.6, 0.6)], "means on top"
    dots = {(colour, round(x, 3), round(y, 3)) for colour, x, y in found["dots"]}
    before = {("--c0", 0.75, 0.1), ("--c1", 0.75, 0.1)}
    assert dots == before | {("--c0", score, score) for score in last} | {("--c0", 0.54, 0.54), ("--c1", 0.6, 0.6)}


def test_a_bar_that_is_too_long_is_cut_and_leaves_the_points_their_room(tmp_path):
    """Of two seeds, the interval is 12.7 times the deviation of the mean."""
    folders = [
        sequence(tmp_path / str(seed), seed=seed, accuracy=[[0.9, 0.2], [0.5, 0.7]], general=[GENERAL[1], {}, entry])
        for seed, entry in enumerate([{"general/loss": 3.0}, {"general/loss": 4.0}])
    ]
    picture = pictures(make_report(folders).html)["AP over general loss"]
    found, frame = drawn(picture), picture.find(f".//{SVG}clipPath/{SVG}rect")
    left = float(frame.get("x"))
    low, high = value_at(picture, "x", left), value_at(picture, "x", left + float(frame.get("width")))
    (start, _), (end, _) = found["bars"][0]
    assert start < low < 3.0 and 4.0 < high < end, "from edge to edge, without caps"
    assert (high - low) < 3.5


def test_markdown_shows_cells_as_they_are(tmp_path):
    name = "a|b <b>\n`*\\[x]"
    table = make_report([sequence(tmp_path / "run", name=name)]).markdown
    assert table.splitlines()[-1].startswith("| a\\|b &lt;b&gt; \\`\\*\\\\\\[x\\] | 0.600 |")
    assert table.splitlines()[1].startswith("| --- | --- |")


NUMBERS = st.floats() | st.integers() | st.none() | st.booleans()


@settings(max_examples=20, deadline=None)
@given(st.text(), st.dictionaries(st.text(), st.lists(NUMBERS, max_size=4), max_size=2))
def test_any_log_gives_a_page(name, logged):
    logs = [
        {"step": 7 * step, f"gere/{key}": value} for key, line in logged.items() for step, value in enumerate(line)
    ]
    with tempfile.TemporaryDirectory() as folder:
        about = {"format": 1, "name": name, "seed": 0, "tasks": [name]}
        runs = [write_json(Path(folder) / "a" / "sequence.json", about), training(Path(folder) / "b", logs=logs)]
        text = make_report(runs).html
    page = Page(text)
    assert page.tags.count("h1") == 1 and "script" not in page.tags
    assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r' (?:d|x|y)="(.*?)"', text, re.DOTALL)))


def test_command(tmp_path, capsys):
    folder = sequence(tmp_path / "run", name="half \ud800")
    out = tmp_path / "new" / "page.html"
    words = ["report", str(folder), "--out", str(out), "--markdown", str(tmp_path / "table.md")]
    assert main(words) == 0 and out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| half ? | 0.600 |" in table
    assert main(["report", str(folder), "--out", "page.txt"]) == 1
    assert main(["report", str(folder), "--out", str(out), "--markdown", "README"]) == 1
    assert main(["report", str(tmp_path), "--out", str(out)]) == 1
    assert main(["report", str(folder), "--out", str(out / "below.html")]) == 1
    assert "The report cannot be written" in capsys.readouterr().err


def test_matplotlib_is_needed_for_pictures_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    begun = write_json(tmp_path / "begun" / "sequence.json", {"format": 1, "name": "a", "seed": 0, "tasks": TASKS})
    assert "<svg" not in make_report([begun]).html
    folder = sequence(tmp_path / "run")
    with pytest.raises(MissingPackageError, match=r'pip install "gere\[report\]"'):
        make_report([folder])
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 1
    assert "package matplotlib" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_command_imports_nothing_heavy(tmp_path):
    """And changes nothing of matplotlib for the rest of the process."""
    folder = sequence(tmp_path / "run")
    script = (
        "import sys\nfrom gere.cli.main import main\nimport gere.report\n"
        "early = {'matplotlib'} & set(sys.modules)\nimport matplotlib\nbefore = matplotlib.rcParams.copy()\n"
        f"main(['report', {str(folder)!r}, '--out', {str(tmp_path / 'a.html')!r}])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.stderr.write(' '.join(early | heavy) + 'changed' * (matplotlib.rcParams != before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("| group | AP | general change |")


def test_document_names_every_figure():
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in MEANINGS)
