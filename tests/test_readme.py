"""The README and the pages of docs/ say what is true: their Python runs, their commands and links exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import datasets
import pytest
from conftest import ROOT, load_tiny
from transformers import DataCollatorForSeq2Seq, Trainer

from gere import GeReConfig
from gere.cli.main import make_parser
from gere.config import CONFIG_FIELDS, TRAINER_FIELDS
from gere.integrations.axolotl import GeRePlugin

PATHS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").iterdir()),
]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in PATHS if path.suffix == ".md"}
README = PAGES["README.md"]
# Each block of Python by a part of it. Those of the other pages are run where their subject is tested.
BLOCKS = {
    "README.md": ["trainer.save_model", "GeneralAbilityCallback"],
    "method.md": ["threshold_margin", "metric_for_best_model"],
    "trainers.md": ["eval_dataset=dev", "facts = ", "gere_trainer(MyTrainer)", "HfArgumentParser"],
    "anchor.md": ["anchor="],
    "distributed.md": ["destroy_process_group"],
    "texts.md": ["replay_dataset="],
}
ELSEWHERE = {"ability.md", "kif.md", "llamafactory.md", "trl.md"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def fenced(page: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], flags=re.S | re.M)
    return [content for name, content in found if name == language]


def block(page: str, mark: str) -> str:
    (found,) = [block for block in fenced(page, "python") if mark in block]
    return found


def table(page: str, head: str) -> list[list[str]]:
    """Cells of the rows of the table that begins with a head."""
    lines = PAGES[page].partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_python_block_is_run():
    for page in PAGES.keys() - ELSEWHERE:
        marks, found = BLOCKS.get(page, []), fenced(page, "python")
        assert len(found) == len(marks) and all(mark in code for mark, code in zip(marks, found, strict=True)), page


@pytest.fixture
def clone(monkeypatch, tmp_path):
    """The reader's clone: the folders that the code reads, and nothing else."""
    for name in ("base_llms", "examples"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quickstart(clone):
    """As it stands but for the device, with the callback where the README says. The log is the one that it shows."""
    train, names = "trainer.train()\n", {}
    question = {"question": "What do plants need?", "choices": ["light", "noise"], "gold": 0}
    (clone / "questions.jsonl").write_text(json.dumps(question))
    code = block("README.md", "trainer.save_model").replace(train, block("README.md", "Ability") + train)
    exec(code.replace('"report_to": "none"', '"report_to": "none", "use_cpu": True'), names)
    trainer = names["trainer"]
    history = trainer.state.log_history
    logs = [log for log in history if "loss" in log]
    (said,) = [part for part in fenced("README.md", "") if "gere/ce" in part]
    opening, *lines, answer = said.splitlines()
    shown = [dict(re.findall(r"'([\w/]+)': '([^']+)'", line)) for line in lines]
    assert len(shown) == len(logs) == 3
    first = {key: float(value) for key, value in shown[0].items()}
    assert {key: logs[0][key] for key in first} == pytest.approx(first, rel=0.05, abs=1e-5)
    assert all(line.keys() == first.keys() for line in shown)
    keys = {key for log in logs for key in log if key.startswith("gere/")}
    keys |= {key for log in history for key in log if key in ("general/loss", "general/change")}
    of_replay = {key for key in keys if key.startswith("gere/")}
    assert of_replay == {cells[0].strip("`") for cells in table("method.md", "| key | meaning |")}
    assert keys > {cells[0].strip("`") for cells in table("README.md", "| key | meaning |")}
    assert [log["general/change"] < 0 for log in history if "general/change" in log] == [True]
    assert [log["step"] for log in history if "general/questions" in log] == [0, 40]
    assert f"gere: {trainer.replay.summary()}".startswith(answer) and "questions" in trainer.replay.summary()
    assert trainer.replay.anchor.key in opening
    for folder in ("out", "out/final"):
        assert (clone / folder / "gere_anchor.json").is_file()
    assert len(list((clone / "gere_saving").glob("anchor-*"))) == 1


def test_usage_with_the_default_replay_set(monkeypatch, tmp_path, arguments, task, general, tokenizer, capsys):
    """The hub is replaced by a function; what it gave is kept, so that the second start does not ask it."""
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return ({"text": f"{general[row % len(general)]} This is text {row}."} for row in range(2000))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    for _ in range(2):
        names = {"model": load_tiny(), "args": arguments(eval_strategy="steps", eval_steps=2), "train": task}
        names |= {"dev": task[:4], "collator": DataCollatorForSeq2Seq(tokenizer), "tokenizer": tokenizer}
        exec(block("trainers.md", "eval_dataset=dev"), names)
        logs = names["trainer"].state.log_history
        assert logs[0]["gere/tm"] == 0.0 and any("eval_loss" in log for log in logs)
    assert asked == [("DKYoon/SlimPajama-6B", "train", True)]
    (anchor,) = (tmp_path / "gere_saving").glob("anchor-*")
    exec(block("trainers.md", "facts = "), names)
    shown = capsys.readouterr().out.splitlines()[-4:-1]
    folder = anchor.relative_to(tmp_path)
    assert shown == ["True gere_saving 4", "936", f"{anchor.name.removeprefix('anchor-')} {folder}"]


class MyTrainer(Trainer):
    """Stands for the reader's own class."""


def run_recipe(mark, monkeypatch, tmp_path, **names):
    monkeypatch.chdir(tmp_path)
    exec(block("trainers.md", mark), names)
    logs = names["trainer"].state.log_history
    assert logs[0]["gere/tm"] == 0.0 and len(logs) > 2
    return names["trainer"]


def test_recipe_of_a_trainer_of_ones_own(monkeypatch, tmp_path, arguments, task, tokenizer, general):
    texts = [{"text": f"{general[0]} {number}"} for number in range(1000)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: texts)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    names = {"MyTrainer": MyTrainer, "model": load_tiny(), "args": arguments(), "train": task, "tokenizer": tokenizer}
    trainer = run_recipe(
        "gere_trainer(MyTrainer)", monkeypatch, tmp_path, collator=DataCollatorForSeq2Seq(tokenizer), **names
    )
    assert type(trainer).__name__ == "GeReMyTrainer"


def test_recipe_of_hf_argument_parser(monkeypatch, tmp_path, task, tokenizer, general):
    (tmp_path / "general.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in general))
    command = (
        "train.py --output_dir out --max_steps 3 --logging_steps 1 --use_cpu True --report_to none --save_strategy no"
    )
    replay = "--gere_num_interpolate_per_batch 4 --gere_w_strategy dy --gere_replay_dataset general.jsonl"
    monkeypatch.setattr(sys, "argv", f"{command} {replay}".split())
    names = {"model": load_tiny(), "train": task, "tokenizer": tokenizer}
    run_recipe("HfArgumentParser", monkeypatch, tmp_path, collator=DataCollatorForSeq2Seq(tokenizer), **names)


def test_code_that_trains_nothing():
    names = {}
    exec(block("method.md", "threshold_margin"), names)
    exec(block("method.md", "metric_for_best_model"), {})
    assert names["margin"].tolist() == [0.5]
    exec(block("anchor.md", "anchor="), names)
    assert re.fullmatch("[0-9a-f]{32}", names["config"].anchor)
    exec(block("distributed.md", "destroy_process_group"), names)
    config = eval(block("texts.md", "replay_dataset=").split("import GeReConfig")[1].strip(), names)
    assert config == GeReConfig(replay_dataset="general.jsonl"), "shows the defaults"


@pytest.mark.slow
def test_run_multi_gpu_on_two_processes_of_a_cpu(tmp_path):
    command = ["bash", str(ROOT / "run_multi_gpu.sh"), "--nproc", "2", "--cpu", "--", "--out", str(tmp_path / "out")]
    small = ["--steps=6", "--warm-up-steps=0", "--task-rows=40", "--task-dev-rows=8", "--replay-rows=20"]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es)" in done.stdout and done.stdout.count("GeReTrainer replays") == 1
    assert list((tmp_path / "out" / "gere_saving").glob("anchor-*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strategy", "zero4"], "none of ddp, zero2, zero3, fsdp2"),
        (["--strategy", "fsdp2", "--cpu"], "fsdp2 needs GPUs"),
        (["--nproc", "0"], "not a number of processes"),
        (["--nproc"], "needs a value"),
        (["--steps", "6"], "come after --"),
        (["--script", "nothing.py"], "no script nothing.py"),
    ],
)
def test_run_multi_gpu_says_what_is_wrong(options, said):
    both = options if "--nproc" in options else ["--nproc", "2", *options]
    env = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "run_multi_gpu.sh"), *both]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 2 and said in done.stderr


def test_run_multi_gpu_names_the_interpreter_that_lacks_torch(tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    command = ["bash", str(ROOT / "run_multi_gpu.sh"), "--nproc", "2", "--cpu"]
    env = {**os.environ, "PYTHON": str(bare)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 2 and "set PYTHON" in done.stderr


def test_settings_of_the_readme_are_the_defaults():
    rows = table("README.md", "| setting | default | meaning |")
    assert len(rows) == 5
    known = {**TRAINER_FIELDS, **CONFIG_FIELDS}
    for name, default, _ in rows:
        assert eval(default.strip("`")) == known[name.strip("`")].default
    of_config = [number for number, row in enumerate(rows, 1) if row[0].strip("`") in CONFIG_FIELDS]
    assert of_config == [2, 4] and "The second and the fourth belong to `gere_config" in README


def test_result_of_the_readme_is_that_of_the_results():
    for row in table("README.md", "| | general loss, lower is better |"):
        for cell in row[1:]:
            assert cell.strip("*") in PAGES["results.md"]


def test_the_readme_is_read_in_five_minutes():
    assert len(re.sub(r"```.*?```", "", README, flags=re.S).split()) < 1000


def test_other_ways_to_train_are_those_of_their_pages():
    """The pages' own tests run their commands and sections."""
    plugin = f"{GeRePlugin.__module__}.{GeRePlugin.__qualname__}"
    for words, page in (("gere-llamafactory train config.yaml", "llamafactory.md"), (plugin, "axolotl.md")):
        assert f"`{words}`" in README and words in PAGES[page]


def commands() -> list[list[str]]:
    """Words of each command of the shell in all pages, without comments and variables."""
    found = []
    for page in PAGES:
        for part in fenced(page, "bash"):
            for line in part.replace("\\\n", " ").splitlines():
                for command in " ".join(shlex.split(line, comments=True)).split(" && "):
                    words = command.split()
                    while words and re.match("[A-Z_]+=", words[0]):
                        words.pop(0)
                    found += [words] if words else []
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist(words):
    """Those that can run at once are run by tests of their parts; here each name and option is one that there is."""
    program, *rest = words
    if program == "gere":
        assert make_parser().parse_args(rest).command == rest[0]
    elif program == "make":
        assert rest[0] in re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    elif program == "python":
        path = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        assert (ROOT / path).is_file()
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
    elif program == "pip":
        extras = re.search(r"\[(.*)\]", rest[1])
        assert not extras or set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    else:
        assert program in PROJECT["scripts"]


def test_the_map_names_files_and_names_that_exist():
    """The file that a new distance gets does not exist yet."""
    files = [path for path in (ROOT / "gere").rglob("*") if path.suffix in (".py", ".j2")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    rows = table("CONTRIBUTING.md", "| you want |")
    assert len(rows) == 14
    for name in {name for _, edit in rows for name in re.findall(r"`([^`]+)`", edit)} - {"gere/losses/cosine.py"}:
        if "/" in name:
            assert (ROOT / name).exists(), name
        elif name.endswith(".py"):
            assert name in {path.name for path in files}, name
        else:
            last = name.split("(")[0].split(".")[-1]
            assert re.search(rf"\b{last}\b", code), name
    parts = [cell for cell, _ in table("CONTRIBUTING.md", "| part | owns |")]
    assert len(parts) > 15 and all((ROOT / part).exists() for part in re.findall(r"`([^`]+)`", " ".join(parts)))


def slugs(page: str) -> set[str]:
    """Sections of a page as links name them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


LINKS = [
    (path.relative_to(ROOT).as_posix(), link)
    for path in PATHS
    if path.suffix == ".md"
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[path.name])
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_somewhere(page, link):
    if link.startswith("https://arxiv.org/"):
        return
    file, _, section = link.partition("#")
    target = (ROOT / page).parent / file if file else ROOT / page
    assert target.exists()
    assert not section or section in slugs(target.name)
