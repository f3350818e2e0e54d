"""Bad input gets a named error with the way on, before any training step."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import T5Config, T5ForConditionalGeneration, Trainer

from gere import GeReConfig, GeReError, GeReTrainer, general_loss, gere_trainer
from gere._compat import parallel_sizes
from gere.config import parse_replay_per_batch, parse_weight
from gere.errors import (
    CacheCorruptError,
    CacheFolderError,
    CacheMismatchError,
    CacheMissingError,
    ConfigError,
    ReplayDownloadError,
    ReplaySetError,
    TokenizerError,
    UnsupportedModelError,
    UnsupportedSettingError,
)
from gere.model.states import is_reentrant
from gere.replay.kept import write_records
from gere.replay.rows import load_replay_set
from gere.replay.texts import load_texts
from gere.sampler import BatchInsertionSampler

TEXTS = ["One text of several words.", "Another text, a little longer than the first."]


def refused(trainer, error, match):
    """Training must end in the named error, with a way on, before any step."""
    with pytest.raises(error, match=match) as caught:
        trainer.train()
    assert trainer.state.global_step == 0 and "next:" in str(caught.value)
    return caught.value


def unusable(config, tokenizer, error, match):
    """Reading the replay set must end in the named error, with a way on."""
    with pytest.raises(error, match=match) as caught:
        load_replay_set(GeReConfig(**config), tokenizer, Path("unused"))
    assert "next:" in str(caught.value) and not Path("unused").exists()


@pytest.mark.parametrize("value", ["abc", "", None, True, -1, "-3", float("nan"), "inf", "DY", [1]])
def test_weight_that_is_neither_number_nor_dy(value):
    with pytest.raises(ConfigError, match=r"w_strategy[\s\S]*next:"):
        parse_weight(value)


def test_weights_that_can_be_read():
    assert parse_weight("100") == 100.0 and parse_weight(0) == 0.0 and parse_weight("1e2") == 100.0
    assert parse_weight("dy") == "dy" and parse_replay_per_batch(None) == 0


@pytest.mark.parametrize("value", [-1, 1.5, "many", True])
def test_replay_rows_that_are_no_number(value):
    with pytest.raises(ConfigError, match=r"num_interpolate_per_batch[\s\S]*next:"):
        parse_replay_per_batch(value)


def test_as_many_replay_rows_as_the_batch(make_trainer):
    expected = "from 0 to 7, since an optimizer step has 8 rows"
    refused(make_trainer(replay=8), ConfigError, expected)
    for rows in (8, 9, 100):
        with pytest.raises(ConfigError, match=expected):
            BatchInsertionSampler(48, 24, batch_size=8, replay_per_batch=rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("replay_strategy", "kl2"), ("normalization", "rows"), ("max_length", 1), ("max_length", "563"),
        ("self_prompt", "user"), ("self_temperature", 0), ("self_top_p", 1.5), ("self_top_p", 0), ("self_seed", -1),
        ("self_batch_size", 0), ("self_batch_size", None), ("max_length", True), ("max_length", 48.0),
        ("band_width", 0), ("band_width", "1"), ("std_floor", -1.0), ("replay_size", 0), ("add_bos", "yes"),
        ("anchor", ""), ("replay_column", 5), ("replay_split", ""), ("anchor_batch_tokens", 0),
        ("replay_mode", "insert"), ("bands", None), ("kl_top_k", 1025), ("kl_temperature", float("inf")),
        ("lower_quantile", 0.9), ("layers", "every"), ("layers", []), ("layers", [0]), ("layers", "1.5"),
    ],
)  # fmt: skip
def test_config_names_the_field(field, value):
    with pytest.raises(ConfigError, match=f"gere_config.{field}[\\s\\S]*found:"):
        GeReConfig(**{field: value})


@pytest.mark.parametrize(
    ("source", "changes", "match"),
    [
        ([], {}, "empty"),
        (TEXTS, {"replay_size": 3}, "shorter than asked"),
        ([None, "  ", {"text": None}], {}, "empty"),
        ([*TEXTS, 5], {}, "item 2[\\s\\S]*type int"),
        ([*TEXTS, {"text": 5}], {}, "item 2[\\s\\S]*type int"),
        (Dataset.from_dict({"body": TEXTS}), {}, "row 0[\\s\\S]*replay_column[\\s\\S]*'body'"),
        (5, {}, "cannot be read from this"),
        ([{"body": "a b c"}], {}, "item 0[\\s\\S]*replay_column"),
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), {}, "one split"),
        (Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), {}, "not streamed"),
    ],
)
def test_replay_sets_that_cannot_be_used(tokenizer, source, changes, match):
    unusable({"replay_dataset": source, **changes}, tokenizer, ReplaySetError, match)


def test_training_reads_the_replay_set_before_any_step(make_trainer):
    refused(make_trainer(config={"replay_dataset": []}), ReplaySetError, "empty")
    refused(make_trainer(config={"replay_dataset": "missing.jsonl"}), ReplaySetError, "FileNotFoundError")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.jsonl", "", "empty"),
        ("broken.jsonl", '{"text": "a b"}\n{"text"', "line 2 of the file"),
        ("column.jsonl", '\n{"body": "a b c"}\n', "line 2[\\s\\S]*'body'"),
        ("object.json", '{"data": [{"text": "a b c"}]}', "line 1[\\s\\S]*'data'"),
        ("blank.txt", "\n\n", "empty"),
        ("latin.txt", b"caf\xe9 au lait\n", "UnicodeDecodeError"),
        ("broken.parquet", "no parquet", "cannot be read"),
        ("missing.jsonl", None, "FileNotFoundError"),
        ("torn.json", '[{"text": "a b"},\n{"text": "c d"}', "line 2[\\s\\S]*does not end"),
        ("more.json", '[{"text": "a b"}]\n[{"text": "c d"}]', "line 2[\\s\\S]*more behind the list"),
        ("broken.json", '[{"text": "a b"},\n\n{"text": c}]', "line 3 of the file"),
        ("commas.csv", "text\na b\na b, c\n", "line 3[\\s\\S]*more cells"),
        ("torn.jsonl.gz", gzip.compress(b'{"text": "a b c"}' * 99, mtime=0)[:-20], "EOFError"),
        ("table.xlsx", "", r"a file of kind '.xlsx'"),
    ],
)
def test_replay_files_that_cannot_be_used(tokenizer, tmp_path, name, content, match):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    unusable({"replay_dataset": path}, tokenizer, ReplaySetError, match)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gere_config", {"max_length": 5}),
        ("gere_config", GeReConfig),
        ("reuse_gere_hidden_state", "False"),
        ("gere_hidden_state_saving_dir", None),
        ("num_interpolate_per_batch", -1),
        ("w_strategy", "abc"),
    ],
)
def test_arguments_that_the_trainer_refuses(make_trainer, name, value):
    with pytest.raises(ConfigError, match=f"{name}[\\s\\S]*next:"):
        make_trainer(**{name: value})


@pytest.mark.parametrize("base", [dict, "Trainer", 5])
def test_gere_trainer_of_something_else(base):
    with pytest.raises(ConfigError, match="a subclass of Trainer"):
        gere_trainer(base)
    assert gere_trainer(GeReTrainer) is GeReTrainer


def test_own_data_loader_gets_added_rows_or_is_refused(make_trainer):
    class Own(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.rows, batch_size=4, collate_fn=self.own_collator)

    class Before(Own, GeReTrainer):
        pass

    class Behind(gere_trainer(Own), GeReTrainer):
        pass

    def make(cls, **changes):
        trainer = make_trainer(cls, **changes)
        trainer.rows, trainer.own_collator = trainer.train_dataset, trainer.data_collator
        return trainer

    for cls in (Before, Behind):
        match = r"replay_mode[\s\S]*makes its own data loader"
        refused(make(cls, config={"replay_mode": "replace"}), UnsupportedSettingError, match)
        refused(make(cls, replay=0), ConfigError, r"num_interpolate_per_batch[\s\S]*at least 1")
    trainer = make(Before)
    trainer.train()
    assert trainer.state.log_history[0]["gere/tm"] == 0.0, "the rows are added"


def test_texts_that_general_loss_cannot_use(model, tokenizer):
    for texts in ("one string", [], ["", ""]):
        with pytest.raises(ReplaySetError, match=r"no general text|is empty"):
            general_loss(model, tokenizer, texts)


def test_rows_of_one_token(tokenizer, caplog):
    config = {"replay_dataset": [*TEXTS, "a"], "add_bos": False}
    assert len(load_replay_set(GeReConfig(**config), tokenizer, Path("unused")).rows) == len(TEXTS)
    assert "1 of 3 texts have fewer than two tokens" in caplog.text
    unusable({"replay_dataset": ["a"], "add_bos": False}, tokenizer, ReplaySetError, "at least 2 tokens")


def test_no_network_names_the_ways_on(tokenizer):
    unusable({}, tokenizer, ReplayDownloadError, r"SlimPajama-6B[\s\S]*\.jsonl[\s\S]*list of strings")


def test_tokenizers_that_lack_something(make_trainer, tokenizer):
    trainer = make_trainer()
    trainer.processing_class = None
    refused(trainer, TokenizerError, "processing_class=tokenizer")
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    unusable({"replay_dataset": TEXTS}, bare, TokenizerError, "tokenizer.pad_token = tokenizer.eos_token")
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    unusable({"replay_dataset": TEXTS, "add_bos": True}, bare, TokenizerError, "add_bos")


def test_encoder_decoder_model(make_trainer):
    config = T5Config(vocab_size=768, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration[\s\S]*next:"):
        make_trainer(model=T5ForConditionalGeneration(config))


def test_cache_folder_that_is_a_file(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    refused(make_trainer(gere_hidden_state_saving_dir=tmp_path / "file"), CacheFolderError, "is a file")
    refused(make_trainer(gere_hidden_state_saving_dir=tmp_path / "file" / "below"), CacheFolderError, "written")


def test_cache_folder_that_cannot_be_written(make_trainer):
    if not Path("/proc/self").exists():
        pytest.skip("needs a file system that nobody may write to")
    refused(make_trainer(gere_hidden_state_saving_dir="/proc/gere"), CacheFolderError, "cannot be written")


def test_full_disk(make_trainer, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    trainer = make_trainer()
    monkeypatch.setattr("gere._files.os.fsync", full)
    refused(trainer, CacheFolderError, "full[\\s\\S]*No space left")


def changed_weights():
    from conftest import load_tiny

    model = load_tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-4
    return model


def test_another_precision_than_that_of_a_named_anchor_is_refused(make_trainer, arguments):
    first = make_trainer()
    first.train()
    named = {"anchor": first.replay.anchor.key}
    refused(make_trainer(args=arguments(bf16=True), config=named), CacheMismatchError, "dtype")


def test_each_field_that_differs_from_a_named_anchor_is_refused_by_name(make_trainer, general, tokenizer, tmp_path):
    first = make_trainer()
    first.train()
    named = {"anchor": first.replay.anchor.key}
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    cases = {
        ("texts", "input_ids"): {"config": {"replay_dataset": [general[-1], *general[:-1]]}},
        ("tokenizer",): {"processing_class": other},
        ("max_length", "input_ids"): {"config": {"max_length": 47}},
        ("bands",): {"config": {"band_width": 1.5}},
        ("strategy",): {"config": {"replay_strategy": "ce"}},
    }
    for fields, changes in cases.items():
        changes["config"] = {**named, **changes.get("config", {})}
        assert set(fields) <= {*refused(make_trainer(**changes), CacheMismatchError, fields[0]).fields}
    assert refused(make_trainer(model=changed_weights()), CacheMismatchError, "weights").fields == ("weights",)
    assert len(list((tmp_path / "gere_saving").glob("anchor-*"))) == 1, "nothing was rebuilt"


def test_reuse_off_builds_a_second_anchor(make_trainer, tmp_path):
    make_trainer().train()
    make_trainer(model=changed_weights(), reuse_gere_hidden_state=False).train()
    assert len(list((tmp_path / "gere_saving").glob("anchor-*"))) == 2
    make_trainer().train()


def test_damaged_anchor_is_refused(make_trainer, tmp_path):
    make_trainer().train()
    path = next((tmp_path / "gere_saving").glob("anchor-*/regions-*"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    refused(make_trainer(), CacheCorruptError, path.name)


def test_anchor_that_is_not_there(make_trainer):
    refused(make_trainer(config={"anchor": "0" * 32}), CacheMissingError, "anchor-000")


def test_rows_that_the_model_has_no_embedding_for(make_trainer, tokenizer, general):
    wide = copy.deepcopy(tokenizer)
    wide.add_tokens(["dough"])
    texts = [*general, "The dough is here."]
    refused(make_trainer(processing_class=wide, config={"replay_dataset": texts}), ReplaySetError, "token ids")
    long = {"replay_dataset": [*general, "word " * 2000], "max_length": 1500}
    refused(make_trainer(config=long), ReplaySetError, "max_length to 1024")


def test_split_batches_is_refused(make_trainer, arguments):
    split = arguments(accelerator_config={"split_batches": True})
    refused(make_trainer(args=split), UnsupportedSettingError, "split_batches")


def sizes(**changes):
    return SimpleNamespace(**{"cp_size": 1, "sp_size": 1, "tp_size": 1, **changes})


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        ("args._n_gpu", 2, r"DataParallel[\s\S]*torchrun"),
        ("accelerator.state.distributed_type", "DistributedType.MEGATRON_LM", "found: +MEGATRON_LM"),
        ("accelerator.state.fsdp_plugin", SimpleNamespace(fsdp_version=1), r'fsdp_config=\{"fsdp_version": 2\}'),
        ("is_model_parallel", True, "device_map"),
        ("accelerator.state.parallelism_config", sizes(cp_size=2), "cp_size 2"),
        ("accelerator.state.parallelism_config", sizes(sp_size=4), "sp_size 4"),
        ("accelerator.state.parallelism_config", sizes(tp_size=2), "tp_size 2"),
    ],
)
def test_settings_that_do_not_go_together(make_trainer, monkeypatch, place, value, match):
    """Settings that one process on a CPU cannot have, put where accelerate keeps them."""
    trainer = make_trainer()
    *path, last = place.split(".")
    holder = trainer
    for part in path:
        holder = getattr(holder, part)
    monkeypatch.setattr(holder, last, value, raising=False)
    with pytest.raises(UnsupportedSettingError, match=match):
        trainer.get_train_dataloader()


def test_sequence_parallelism_of_deepspeed_is_seen():
    plugin = SimpleNamespace(deepspeed_config={"sequence_parallel_size": 2})
    state = SimpleNamespace(deepspeed_plugin=plugin)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(parallelism_config=None, state=state))
    assert parallel_sizes(trainer) == {"sequence_parallel_size": 2}


def test_reentrant_checkpointing_with_mixed_steps_of_several_processes(make_trainer, arguments, monkeypatch):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    make_trainer(args=arguments(**settings), replay=3).train()
    trainer = make_trainer(args=arguments(**settings), replay=3)
    monkeypatch.setattr("gere.session.policy.is_wrapped", lambda trainer: True)
    refused(trainer, UnsupportedSettingError, r"use_reentrant[\s\S]*use_reentrant_gc: false[\s\S]*a multiple of 4")
    make_trainer(args=arguments(**settings), replay=4).train()
    plain = {**settings, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    make_trainer(args=arguments(**plain), replay=3).train()
    added = make_trainer(args=arguments(**settings), replay=4, config={"replay_mode": "add"})
    refused(added, UnsupportedSettingError, "use_reentrant")


def test_reentrant_checkpointing_is_seen_through_wrappers(model):
    def own(function, *args):
        return function(*args)

    def around(inner):
        return functools.wraps(inner, assigned=())(lambda *args: inner(*args))

    partial = functools.partial(own, use_reentrant=False)
    layer = model.model.layers[0]
    layer._gradient_checkpointing_func, layer.gradient_checkpointing = own, False
    assert not is_reentrant(model)
    layer.gradient_checkpointing = True
    assert is_reentrant(model), "a function that does not say"
    for function, reentrant in ((partial, False), (around(partial), False), (around(own), True)):
        layer._gradient_checkpointing_func = function
        assert is_reentrant(model) == reentrant
    layer._gradient_checkpointing_func = functools.partial(own, use_reentrant=True)
    assert is_reentrant(model)


def test_rows_that_cannot_be_added_or_replaced(make_trainer, task):
    stream = Dataset.from_list(task).to_iterable_dataset()
    trainer = make_trainer(train_dataset=stream, config={"replay_mode": "replace"})
    refused(trainer, UnsupportedSettingError, r"replay_mode[\s\S]*IterableDataset")
    refused(make_trainer(train_dataset=stream, replay=0), ConfigError, r"num_interpolate_per_batch[\s\S]*at least 1")


def test_errors_survive_a_worker():
    error = ConfigError("What.", where="there", expected=1, found=2, fix="so")
    copy_ = pickle.loads(pickle.dumps(error))
    assert type(copy_) is ConfigError and str(copy_) == str(error) and isinstance(error, GeReError)


def test_every_source_of_texts_gives_the_same(tmp_path):
    records = [{"text": text, "n": 1} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text(json.dumps(TEXTS))
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    sources = [
        *sorted(tmp_path.glob("*.*")),
        str(tmp_path / "a.jsonl"),
        TEXTS,
        tuple(TEXTS),
        Dataset.from_list(records),
    ]
    assert len(sources) == 9
    for source in sources:
        assert load_texts(GeReConfig(replay_dataset=source), tmp_path) == TEXTS
    assert load_texts(GeReConfig(replay_dataset=TEXTS, replay_size=1), tmp_path) == TEXTS[:1]
    rows = Dataset.from_dict({"body": TEXTS})
    assert load_texts(GeReConfig(replay_dataset=rows, replay_column="body"), tmp_path) == TEXTS


def test_a_parquet_file_without_the_column(tokenizer, tmp_path):
    Dataset.from_dict({"body": TEXTS}).to_parquet(tmp_path / "a.parquet")
    unusable({"replay_dataset": tmp_path / "a.parquet"}, tokenizer, ReplaySetError, "row 0[\\s\\S]*'body'")


def test_half_of_a_surrogate_pair_is_read_as_no_character(tmp_path, caplog):
    write_records(tmp_path / "a.jsonl", [{"text": "half \ud83d of a pair"}])
    assert load_texts(GeReConfig(replay_dataset=tmp_path / "a.jsonl"), tmp_path) == ["half \ufffd of a pair"]
    assert "a.jsonl, line 1" in caplog.text


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set, which is a local folder in the hub's format; `hub.clear()` cuts the network."""
    folder = tmp_path / "on_the_hub"
    folder.mkdir()
    shelf = {"someone/general": folder}
    real = datasets.load_dataset

    def load(name, **keywords):
        if name in shelf:
            return real(str(shelf[name]), **keywords)
        if Path(name).is_dir():
            return real(name, **keywords)
        raise ConnectionError(name)

    def dataset_info(self, name, timeout):
        if name not in shelf:
            raise ConnectionError(name)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return shelf


def test_hub_texts_are_streamed_once_and_kept(tmp_path, hub):
    cache, many = tmp_path / "cache", [f"Text number {index} of the set." for index in range(1200)]
    Dataset.from_dict({"text": many}).to_parquet(hub["someone/general"] / "train-00000-of-00001.parquet")
    config = GeReConfig(replay_dataset="someone/general")
    assert load_texts(config, cache) == many[:1000]
    assert len(list(cache.glob("replay-*.jsonl"))) == 1
    hub.clear()
    assert load_texts(config, cache) == many[:1000], "the second start needs no network"
    kept = next(cache.glob("replay-*.jsonl"))
    kept.write_text(kept.read_text()[:-20])
    with pytest.raises(CacheCorruptError, match=kept.name):
        load_texts(config, cache)
    whole = [{"text": text} for text in many[:1000]]
    for records in (whole, [{**whole[0], "sha256": "0"}, *whole[1:]]):
        write_records(kept, records)
        if "sha256" not in records[0]:
            assert load_texts(config, cache) == many[:1000], "files of an earlier version have no digest"
    with pytest.raises(CacheCorruptError, match="SHA-256"):
        load_texts(config, cache)
    with pytest.raises(ReplayDownloadError, match="someone/general"):
        load_texts(GeReConfig(replay_dataset="someone/general", replay_size=5), cache)


def test_hub_set_shorter_than_asked_is_not_kept(tmp_path, hub):
    rows = Dataset.from_dict({"text": ["", *TEXTS, None]})
    rows.to_parquet(hub["someone/general"] / "train-00000-of-00001.parquet")
    with pytest.raises(ReplaySetError, match=r"1000 texts[\s\S]*2 texts"):
        load_texts(GeReConfig(replay_dataset="someone/general"), tmp_path / "cache")
    assert not list(tmp_path.rglob("replay-*"))
    assert load_texts(GeReConfig(replay_dataset="someone/general", replay_size=2), tmp_path / "cache") == TEXTS


def test_a_local_folder_is_read_anew_each_time(tmp_path, hub):
    folder = hub["someone/general"]
    for texts in (TEXTS, TEXTS[::-1]):
        (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        assert load_texts(GeReConfig(replay_dataset=str(folder)), tmp_path / "cache") == texts
    assert not list(tmp_path.rglob("replay-*"))
    with pytest.raises(ReplaySetError, match=r"^The folder[\s\S]*replay_split"):
        load_texts(GeReConfig(replay_dataset=str(folder), replay_split="val"), tmp_path / "cache")


def test_rows_are_cut_and_begin_as_the_tokenizer_says(tokenizer):
    bos = tokenizer.bos_token_id
    for add_bos, first in ((None, True), (True, True), (False, False)):
        config = GeReConfig(replay_dataset=TEXTS, max_length=6, add_bos=add_bos)
        rows = load_replay_set(config, tokenizer, Path("unused")).rows
        assert all(len(row) == 6 and (row[0] == bos) == first and bos not in row[1:] for row in rows)
