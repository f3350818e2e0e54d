"""`gere cache`: an anchor built ahead of training is the training's own; what is shown, verified and cleaned up."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, load_tiny
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from processes import finish, free_port
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from gere import GeReConfig
from gere.cache.base_model import BaseModel
from gere.cache.fingerprint import text_digest
from gere.cache.store import manifest_bytes
from gere.cli.main import main, make_parser
from gere.cli.settings import read_kwargs
from gere.session.checkpoint import keys_in_runs

HEAVY = "print('heavy:', *sorted({'torch', 'transformers', 'datasets', 'yaml'} & set(sys.modules)))"
KEYS = [letter * 32 for letter in "abcdef"]


@pytest.fixture
def texts_file(tmp_path, general):
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in general), encoding="utf-8")
    return path


@pytest.fixture
def build(tmp_path, texts_file):
    """`gere cache build` with the settings of `measuring_trainer`."""

    def run(*words, folder="built"):
        known = ["--model", str(TINY), "--replay-dataset", str(texts_file), "--set", "max_length=48"]
        return main(["cache", "build", str(tmp_path / folder), *known, "--device", "cpu", *words])

    return run


@pytest.fixture
def calls(monkeypatch):
    """Rows that the base model was run on."""
    seen, original = [], BaseModel.__call__

    def watched(self, rows):
        seen.extend(rows)
        return original(self, rows)

    monkeypatch.setattr(BaseModel, "__call__", watched)
    return seen


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def anchors(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in content(folder).items() if name.startswith("anchor-")}


def run(words: str, capsys) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(words.split())
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def with_lora():
    return get_peft_model(load_tiny(), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


CASES = {
    "float32": ([], {}, {}),
    "bf16": (["--precision", "bf16"], {"bf16": True}, {}),
    "bands": (["--set", "band_width=1.5", "--set", "std_floor=1e-2"], {}, {"band_width": 1.5, "std_floor": 1e-2}),
    "ce": (["--set", "replay_strategy=ce", "--set", "add_bos=true"], {}, {"replay_strategy": "ce", "add_bos": True}),
    "kl": (["--precision", "bf16", "--set", "replay_strategy=kl"], {"bf16": True}, {"replay_strategy": "kl"}),
    "layers": (["--set", "layers=1,2", "--set", "bands=quantile"], {}, {"layers": [1, 2], "bands": "quantile"}),
    "small batches": (["--set", "anchor_batch_tokens=100"], {}, {"anchor_batch_tokens": 100}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrap", [load_tiny, with_lora], ids=["full", "lora"])
def test_bytes_and_key_are_those_of_the_training(case, wrap, build, measuring_trainer, arguments, tmp_path):
    words, precision, config = CASES[case]
    assert build("--dtype", "float32", *words) == 0
    measuring_trainer(model=wrap(), args=arguments(max_steps=1, **precision), config=config).train()
    made = anchors(tmp_path / "gere_saving")
    assert anchors(tmp_path / "built") == made and len(made) > 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_opens_what_was_built_and_runs_the_base_model_on_no_row(
    precision, build, measuring_trainer, arguments, tmp_path, calls
):
    assert build("--precision", precision, folder="gere_saving") == 0
    assert calls
    calls.clear()
    before = anchors(tmp_path / "gere_saving")
    trainer = measuring_trainer(args=arguments(bf16=precision == "bf16"))
    trainer.train()
    assert len(calls) == 2, "the held-out texts, at the end"
    assert anchors(tmp_path / "gere_saving") == before
    assert trainer.state.log_history[0]["gere/tm"] == 0.0


def test_a_model_that_was_saved_quantized(build, measuring_trainer, tmp_path):
    pytest.importorskip("bitsandbytes")
    from test_qlora import quantized

    quantized().save_pretrained(tmp_path / "nf4")
    assert build("--model", str(tmp_path / "nf4"), "--tokenizer", str(TINY), "--dtype", "float32") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    measuring_trainer(model=get_peft_model(loaded, lora)).train()
    assert anchors(tmp_path / "built") == anchors(tmp_path / "gere_saving")


@pytest.mark.parametrize("name", ["image:llava", "image:mllama", "llama"])
def test_a_model_is_loaded_by_the_class_that_it_was_saved_from(name, build, measuring_trainer, tmp_path):
    from test_models import build as tiny

    folder = tmp_path / "saved"
    tiny(name).save_pretrained(folder)
    assert build("--model", str(folder), "--tokenizer", str(TINY), "--dtype", "float32") == 0
    auto = AutoModelForImageTextToText if name.startswith("image") else AutoModelForCausalLM
    measuring_trainer(model=auto.from_pretrained(folder, dtype=torch.float32)).train()
    assert anchors(tmp_path / "gere_saving") == anchors(tmp_path / "built")


def test_a_padding_token_that_the_script_sets(build, measuring_trainer, tmp_path, tokenizer):
    assert build("--pad-token", tokenizer.eos_token) == 0
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    measuring_trainer(processing_class=own).train()
    assert anchors(tmp_path / "built") == anchors(tmp_path / "gere_saving")


def test_second_build_opens_and_says_so(build, tmp_path, capsys, calls):
    assert build() == 0
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "built").glob("anchor-*")
    assert said.startswith(f"Built: {folder}") and "22 rows, 2 held out" in said and "mixed precision no" in said
    calls.clear()
    assert build() == 0
    assert capsys.readouterr().out.startswith(f"There already: {folder}") and not calls


def test_other_settings_are_built_beside(build, tmp_path, capsys):
    assert build() == 0
    assert build("--set", "band_width=2") == 0
    assert len(list((tmp_path / "built").glob("anchor-*"))) == 2


@pytest.mark.parametrize("name", ["train.yaml", "gere.yml", "gere.json"])
def test_settings_of_a_config_file(name, build, tmp_path):
    settings = {"max_length": 40, "band_width": 1.25, "w_strategy": "dy", "num_interpolate_per_batch": 4}
    whole = {"learning_rate": 1e-4, "gere": settings} if name == "train.yaml" else settings
    (tmp_path / name).write_text(json.dumps(whole), encoding="utf-8")  # JSON is YAML, too
    assert build("--config", str(tmp_path / name)) == 0
    assert build("--set", "band_width=1.25", folder="again") == 0
    assert anchors(tmp_path / "built") == anchors(tmp_path / "again"), "the command line comes after the file"


def test_values_have_the_types_of_their_settings():
    words = ["add_bos=None", "replay_size=12", "std_floor=1e-4", "replay_dataset=12", "w_strategy=50", "anchor=1e5"]
    kwargs = read_kwargs(None, words)
    config = kwargs["gere_config"]
    assert (config.add_bos, config.replay_size, config.std_floor) == (None, 12, 1e-4)
    assert (config.replay_dataset, config.anchor, kwargs["w_strategy"]) == ("12", "1e5", "50")
    assert read_kwargs(None, ["add_bos=True"])["gere_config"].add_bos is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "max_lenght=3"], r"'max_lenght'\n.*Did you mean max_length"),
        (["--set", "max_length"], r"where: +--set\n +expected: name=value[\s\S]*'max_length'"),
        (["--set", "max_length=long"], "gere_config.max_length"),
        (["--set", "replay_strategy=none"], "a strategy with an anchor"),
        (["--set", "reuse_gere_hidden_state=maybe"], "reuse_gere_hidden_state"),
        (["--set", "gere_hidden_state_saving_dir=elsewhere"], "expected: FOLDER"),
        (["--config", "nothing.yaml"], "The config file cannot be read"),
        (["--replay-dataset", "nothing.jsonl"], "ReplaySetError"),
        (["--model", "nothing"], r"The model cannot be loaded[\s\S]*where: +--model"),
        (["--tokenizer", "nothing"], r"The tokenizer cannot be loaded[\s\S]*where: +--tokenizer"),
        (["--tokenizer", str(TINY), "--model", "nothing"], "The model cannot be loaded"),
        (["--pad-token", "<nothing>"], "The padding token is not in the vocabulary"),
        (["--tf32"], "This machine cannot compute in the precision"),
    ],
)
def test_what_is_wrong_with_a_build_has_a_name(words, said, build, tmp_path, capsys):
    assert build(*words) == 1
    shown = capsys.readouterr().err
    assert re.search(said, shown) and "  where: " in shown and "Traceback" not in shown
    assert not list(tmp_path.glob("built/anchor-*"))


def test_a_launcher_that_shards_is_refused(build, capsys, monkeypatch):
    from accelerate.utils import DistributedType

    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.FSDP)
    assert build() == 1
    assert "UnsupportedSettingError" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_of_torchrun_build_the_same_bytes(build, texts_file, tmp_path):
    assert build(folder="alone") == 0
    known = ["--model", TINY, "--replay-dataset", texts_file, "--set", "max_length=48", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "gere", "cache", "build", tmp_path / "built", *known]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Built: ") == 1
    assert anchors(tmp_path / "built") == anchors(tmp_path / "alone")


@pytest.mark.slow
def test_processes_with_other_texts_are_refused(texts_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(texts_file.read_text(encoding="utf-8").replace("the", "a"), encoding="utf-8")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    running = []
    for rank, texts in enumerate((texts_file, other)):
        known = ["--model", TINY, "--replay-dataset", texts, "--set", "max_length=48", "--device", "cpu"]
        command = [sys.executable, "-m", "gere", "cache", "build", tmp_path / "built", *known]
        env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen([*map(str, command)], env=env, **pipes))
    codes, output = finish(running, 100)
    assert codes == [1, 1] and "The processes do not have the same replay set" in output, output
    assert not list(tmp_path.glob("built/anchor-*"))


@pytest.mark.parametrize("words", [["--help"], ["cache", "build", "--help"], ["cache", "gc", "--help"]])
def test_help_imports_nothing_heavy(words):
    script = f"import sys\nfrom gere.cli.main import main\ntry:\n    main({words})\nexcept SystemExit:\n    {HEAVY}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:" and "usage: gere" in done.stdout


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["cache", "build", "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {field.name} " in shown for field in dataclasses.fields(GeReConfig))


@pytest.fixture
def cache(tmp_path):
    """A cache folder with three anchors, made of small files with true hashes, and all that kills leave."""
    from gere._files import sha256

    root = tmp_path / "saving"
    keys = []
    for number in range(3):
        texts = [f"text {number} {row}" for row in range(4)]
        fields = {"weights": "w" * 64, "texts": text_digest(texts), "dtype": f"case {number}"}
        files = {name: f"{name} {number}".encode() * 30 for name in ("rows.safetensors", "bands.safetensors")}
        files |= {f"regions-{part:05d}.safetensors": bytes(100 + part) for part in range(2)}
        shape = {"rows": 4, "tokens": 40, "dim": 8}
        manifest = manifest_bytes(fields, {name: sha256(raw) for name, raw in files.items()}, shape)
        keys.append(json.loads(manifest)["key"])
        folder = root / f"anchor-{keys[-1]}"
        folder.mkdir(parents=True)
        for name, raw in {**files, "manifest.json": manifest}.items():
            (folder / name).write_bytes(raw)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"replay-{number}.jsonl").write_text(lines, encoding="utf-8")
        os.utime(root / f"replay-{number}.jsonl", (0, time.time() - 7200))
    (root / f"anchor-{KEYS[0]}.partial").mkdir()
    (root / f"anchor-{KEYS[0]}.partial" / "part-00000.safetensors").write_bytes(part_of_rows(5))
    (root / f"anchor-{KEYS[0]}.partial" / "part-00002.safetensors").write_bytes(part_of_rows(2))
    (root / f"anchor-{keys[0]}.retired").mkdir()
    (root / f"anchor-{keys[0]}.retired" / "rows.safetensors").write_bytes(b"old")
    for name in (".manifest.json.0.tmp", f"anchor-{keys[0]}/.rows.safetensors.1.tmp"):
        (root / name).write_bytes(b"half")
        os.utime(root / name, (0, time.time() - 7200))
    (root / ".replay-3.jsonl.2.tmp").write_bytes(b"being written just now")
    (root / ".lock").touch()
    return root, keys


def part_of_rows(count: int) -> bytes:
    header = json.dumps({"row": {"dtype": "I64", "shape": [count], "data_offsets": [0, 0]}}).encode()
    return len(header).to_bytes(8, "little") + header


def test_info_of_a_folder(cache, capsys):
    root, keys = cache
    status, shown, _ = run(f"cache info {root}", capsys)
    assert status == 0
    for key in keys:
        assert f"anchor {key}\n  4 rows, 40 tokens, dim 8\n" in shown
    assert "texts         " + text_digest([f"text 1 {row}" for row in range(4)])[:12] + "\n" in shown
    assert f"unfinished {KEYS[0]}: 7 rows in 2 parts" in shown
    assert "kept texts replay-2.jsonl" in shown and f"leftover anchor-{keys[0]}.retired, 0.0 kB" in shown


def test_info_as_json(cache, capsys):
    root, keys = cache
    status, shown, _ = run(f"cache info {root} --json", capsys)
    held = json.loads(shown)
    assert status == 0 and [anchor["key"] for anchor in held["anchors"]] == sorted(keys)
    for anchor in held["anchors"]:
        manifest = json.loads((root / f"anchor-{anchor['key']}" / "manifest.json").read_text())
        assert anchor["fields"] == manifest["fields"]
        assert (anchor["rows"], anchor["tokens"], anchor["dim"]) == (4, 40, 8)
        assert anchor["bytes"]["regions"] == 201 and anchor["bytes"]["total"] == sum(
            path.stat().st_size for path in Path(anchor["folder"]).iterdir()
        )
    (unfinished,) = held["unfinished"]
    assert (unfinished["parts"], unfinished["rows"], unfinished["all_evaluated"]) == (2, 7, False)
    assert len(held["replay_files"]) == 3 and len(held["leftovers"]) == 4


def test_info_tells_how_far_a_killed_build_is_and_build_goes_on(build, tmp_path, capsys, monkeypatch):
    original, batches = BaseModel.__call__, itertools.count()

    def killed(self, rows):
        if next(batches) == 9:
            raise KeyboardInterrupt
        return original(self, rows)

    small = ["--set", "anchor_batch_tokens=100"]
    with monkeypatch.context() as patch:
        patch.setattr(BaseModel, "__call__", killed)
        assert build(*small) == 130
    held = json.loads(run(f"cache info {tmp_path / 'built'} --json", capsys)[1])
    (unfinished,) = held["unfinished"]
    assert not held["anchors"] and 0 < unfinished["rows"] < 24 and unfinished["parts"] > 0
    assert build(*small) == 0 and build(*small, folder="at once") == 0
    assert anchors(tmp_path / "built") == anchors(tmp_path / "at once")


def test_info_of_one_anchor_and_of_a_damaged_one(cache, capsys, monkeypatch):
    root, keys = cache
    folder = root / f"anchor-{keys[1]}"
    monkeypatch.chdir(folder)
    assert run("cache info . --json", capsys)[1].count('"key"') == 1
    assert run("cache verify .", capsys)[:2] == (0, f"OK       {folder.name}  2.1 kB\n")
    (folder / "manifest.json").write_bytes(b"{")
    status, shown, _ = run(f"cache info {root}", capsys)
    assert status == 1 and "CacheCorruptError" not in shown and "a JSON object" in shown
    assert shown.count("4 rows") == 2, "the others are shown all the same"


def test_verify_names_a_flipped_byte_in_every_kind_of_file_and_goes_on(build, tmp_path, capsys):
    assert build() == 0
    assert build("--set", "replay_strategy=ce", "--set", "reuse_gere_hidden_state=false") == 0
    root = tmp_path / "built"
    assert run(f"cache verify {root}", capsys)[0] == 0
    first, second = sorted(root.glob("anchor-*"))
    kinds = set()
    for folder, other in ((first, second), (second, first)):
        for path in sorted(folder.iterdir()):
            raw = path.read_bytes()
            path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
            status, shown, _ = run(f"cache verify {root}", capsys)
            assert status == 1 and f"DAMAGED  {folder.name}\n" in shown and f"where:    {path}\n" in shown
            assert f"OK       {other.name}" in shown
            assert run(f"cache verify {root} {other.name.removeprefix('anchor-')}", capsys)[0] == 0
            path.write_bytes(raw)
            kinds.add(path.stem.split("-")[0])
    assert kinds == {"bands", "heldout", "manifest", "regions", "rows", "sample"}
    for folder in (first, second):
        (folder / "rows.safetensors").unlink()
    assert run(f"cache verify {root}", capsys)[1].count("DAMAGED") == 2


def test_verify_knows_a_lost_manifest_and_another_name(cache, capsys):
    root, keys = cache
    (root / f"anchor-{keys[0]}" / "manifest.json").unlink()
    (root / f"anchor-{keys[1]}").rename(root / f"anchor-{KEYS[5]}")
    status, shown, _ = run(f"cache verify {root}", capsys)
    assert status == 1 and shown.count("DAMAGED") == 2 and shown.count("OK") == 1
    assert "name of another" in shown


@pytest.mark.parametrize("command", ["info", "verify", "gc"])
def test_what_is_no_cache_folder(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "file", "empty"):
        status, shown, error = run(f"cache {command} {tmp_path / name}", capsys)
        assert status == 1 and not shown and "CacheMissingError: This is not a folder of anchors" in error
    assert not list((tmp_path / "empty").iterdir())


def test_unknown_keys(cache, capsys):
    root, keys = cache
    before = content(root)
    for words in (f"verify {root} {KEYS[1]}", f"gc {root} --keep {KEYS[1]} --yes", f"gc {root} --keep {keys[0][:9]}"):
        status, _, error = run(f"cache {words}", capsys)
        assert status == 1 and "There is no anchor with this key" in error and keys[0] in error
    assert content(root) == before


def name_anchor(folder: Path, key: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gere_anchor.json").write_text(json.dumps({"anchor": key, "format_version": 1}))


LEFT = {".manifest.json.0.tmp", ".rows.safetensors.1.tmp"}


def listed(shown: str) -> set[str]:
    return {line.split("  (")[0].split()[-1].split("/")[-1] for line in shown.splitlines() if "  (" in line}


def test_gc_lists_without_removing_and_removes_what_it_listed(cache, tmp_path, capsys):
    root, keys = cache
    name_anchor(tmp_path / "out" / "run" / "checkpoint-3", keys[0])
    before = content(root)
    words = f"cache gc {root} --runs {tmp_path / 'out'} --keep {keys[1]}"
    status, shown, _ = run(words, capsys)
    expected = {f"anchor-{keys[2]}", f"anchor-{KEYS[0]}.partial", f"anchor-{keys[0]}.retired", "replay-2.jsonl", *LEFT}
    assert status == 0 and listed(shown) == expected and content(root) == before
    status, again, _ = run(f"{words} --yes", capsys)
    assert status == 0 and listed(again) == expected
    gone = {name for name in before if any(item in expected for item in Path(name).parts)}
    assert content(root) == {name: raw for name, raw in before.items() if name not in gone}
    assert not [path for path in root.rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert "Nothing to remove" in run(f"{words} --yes", capsys)[1]


def test_gc_without_runs_leaves_finished_anchors(cache, capsys):
    root, keys = cache
    status, shown, _ = run(f"cache gc {root} --yes", capsys)
    assert status == 0 and "Finished anchors stay" in shown
    assert listed(shown) == {f"anchor-{KEYS[0]}.partial", f"anchor-{keys[0]}.retired", *LEFT}
    assert len(list(root.glob("anchor-*"))) == 3 == len(list(root.glob("replay-*")))


def test_gc_keeps_a_build_that_a_run_or_the_next_start_goes_on_from(cache, tmp_path, capsys):
    root, keys = cache
    for number, suffix in ((0, ".partial"), (1, ".partial"), (2, ".retired")):
        source = root / f"anchor-{keys[number]}"
        shutil.rmtree(root / f"anchor-{keys[number]}{suffix}", ignore_errors=True)
        source.rename(root / f"anchor-{keys[number]}{suffix}")
    name_anchor(tmp_path / "out", keys[0])
    name_anchor(tmp_path / "out" / "later", keys[2])
    name_anchor(tmp_path / "out" / "later" / "still", KEYS[0])
    assert not any(keys[1] in item for item in listed(run(f"cache gc {root}", capsys)[1])), "it lacks but its name"
    shown = listed(run(f"cache gc {root} --runs {tmp_path / 'out'} --yes", capsys)[1])
    assert shown == {f"anchor-{keys[1]}.partial", ".manifest.json.0.tmp"}
    assert (root / f"anchor-{keys[0]}.partial").exists() and (root / f"anchor-{keys[2]}.retired").exists()
    assert (root / f"anchor-{KEYS[0]}.partial").exists()


def test_gc_finds_runs_through_links(cache, tmp_path, capsys):
    root, keys = cache
    for number, key in enumerate(keys):
        name_anchor(tmp_path / "disk" / str(number), key)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "linked").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "out", target_is_directory=True)
    shown = run(f"cache gc {root} --runs {tmp_path / 'out'}", capsys)[1]
    assert [len(holders) for holders in keys_in_runs([tmp_path / "out"]).values()] == [1, 1, 1], "each is seen once"
    assert "Runs name 3 anchors" in shown and not any(f"anchor-{key}" in listed(shown) for key in keys)


@pytest.mark.parametrize("damage", ["{", '{"anchor": "x"}', '{"anchor": null}', "[]", "link"])
def test_gc_removes_nothing_if_a_run_cannot_say_what_it_needs(damage, cache, tmp_path, capsys):
    root, keys = cache
    name_anchor(tmp_path / "out" / "good", keys[0])
    path = tmp_path / "out" / "checkpoint-1" / "gere_anchor.json"
    path.parent.mkdir()
    if damage == "link":
        path.symlink_to("nowhere")
    else:
        path.write_text(damage)
    before = content(root)
    status, shown, error = run(f"cache gc {root} --runs {tmp_path / 'out'} --yes", capsys)
    assert status == 1 and not shown and "CacheCorruptError" in error and str(path) in error
    assert content(root) == before
    status, _, error = run(f"cache gc {root} --runs {tmp_path / 'typo'} --yes", capsys)
    assert status == 1 and "An output folder is not there" in error and content(root) == before


def test_gc_refuses_a_folder_in_which_an_anchor_is_built(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gere.cache.resolve.LOCK_SECONDS", 0.1)
    root, _ = cache
    before = content(root)
    with FileLock(root / ".lock"):
        status, shown, error = run(f"cache gc {root} --yes", capsys)
    assert status == 1 and not shown and "Another run builds an anchor in this folder" in error
    assert content(root) == before
    assert run(f"cache gc {root} --yes", capsys)[0] == 0


def test_gc_killed_halfway_leaves_no_half_of_an_anchor(cache, capsys, tmp_path, monkeypatch):
    root, keys = cache
    (tmp_path / "out").mkdir()
    rmtree = shutil.rmtree

    def killed(path, **settings):
        if path.name.startswith(f"anchor-{keys[1]}") and not settings:
            next(path.glob("regions-*")).unlink()
            raise KeyboardInterrupt
        rmtree(path, **settings)

    words = f"cache gc {root} --runs {tmp_path / 'out'} --yes"
    with monkeypatch.context() as patch:
        patch.setattr("gere.cache.gc.shutil.rmtree", killed)
        assert run(words, capsys)[0] == 130
    assert not (root / f"anchor-{keys[1]}").exists() and (root / f"anchor-{keys[1]}.retired").exists()
    assert run(f"cache verify {root}", capsys)[0] == 0
    assert run(words, capsys)[0] == 0
    assert not list(root.glob("anchor-*"))


def test_gc_of_damaged_things(cache, tmp_path, capsys):
    root, keys = cache
    name_anchor(tmp_path / "out", keys[0])
    (root / "replay-1.jsonl").write_bytes(b"{")
    os.utime(root / "replay-1.jsonl", (0, 0))
    shown = listed(run(f"cache gc {root} --runs {tmp_path / 'out'}", capsys)[1])
    assert "replay-2.jsonl" in shown and "replay-1.jsonl" not in shown, "what cannot be read stays"
    (root / f"anchor-{keys[0]}" / "manifest.json").write_bytes(b"{")
    (root / f"anchor-{keys[1]}" / "manifest.json").write_bytes(b"{")
    shown = listed(run(f"cache gc {root} --runs {tmp_path / 'out'}", capsys)[1])
    assert f"anchor-{keys[1]}" in shown and f"anchor-{keys[0]}" not in shown
    assert not any(name.startswith("replay") for name in shown), "nobody knows what the kept anchor was made from"
    status, _, error = run(f"cache gc {root / f'anchor-{keys[2]}'}", capsys)
    assert status == 1 and "This is the folder of one anchor" in error


def test_gc_keeps_what_the_checkpoint_of_a_training_names(build, measuring_trainer, arguments, tmp_path, capsys):
    assert build("--set", "band_width=2", folder="gere_saving") == 0
    trainer = measuring_trainer(args=arguments(save_strategy="steps", save_steps=2), reuse_gere_hidden_state=False)
    trainer.train()
    root = tmp_path / "gere_saving"
    status, shown, _ = run(f"cache gc {root} --runs {tmp_path / 'out'} --yes", capsys)
    assert status == 0 and "Runs name 1 anchors" in shown
    assert [path.name for path in root.glob("anchor-*")] == [f"anchor-{trainer.replay.anchor.key}"]
    resumed = measuring_trainer(args=arguments(save_strategy="steps", save_steps=2, max_steps=4))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_commands_of_the_page(tmp_path, capsys, monkeypatch):
    page = (ROOT / "docs" / "anchor.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```bash\n(.*?)```", page, flags=re.S) if "gere cache build" in block)
    monkeypatch.chdir(tmp_path)
    for name in ("base_llms", "examples"):
        Path(name).symlink_to(ROOT / name, target_is_directory=True)
    Path("out").mkdir()
    commands = [line.split("#")[0].split() for line in block.replace("\\\n", " ").splitlines()]
    assert [words[2] for words in commands] == ["build", "info", "verify", "gc"]
    for words in commands:
        status, _, error = run(" ".join(words[1:]), capsys)
        assert (words[0], status) == ("gere", 0), error
    assert len(list(Path("gere_saving").glob("anchor-*"))) == 1


def test_gc_keeps_texts_of_which_some_are_held_out(measuring_trainer, arguments, tmp_path, capsys):
    trainer = measuring_trainer(args=arguments(max_steps=2), config={"replay_dataset": "self", "replay_size": 40})
    trainer.train()
    assert trainer.replay.heldout
    (kept,) = trainer.replay.folder.glob("replay-*.jsonl")
    os.utime(kept, (0, 0))
    words = f"cache gc {trainer.replay.folder} --runs {trainer.args.output_dir} --yes"
    assert run(words, capsys)[0] == 0 and kept.is_file()
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:30]))
    os.utime(kept, (0, 0))
    assert run(words, capsys)[0] == 0 and not kept.exists(), "no anchor is made from these"
