"""The two ways to make an anchor that `benchmarks.anchor` compares, and what each of them computes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.lib.memory import process_bytes
from gere import GeReConfig
from gere._files import make_folder
from gere.cache import build_anchor
from gere.cache.base_model import BaseModel
from gere.cache.build import partial_folder
from gere.cache.distil import measure_noise
from gere.losses.margin import Margin
from gere.model.probe import find_layout
from gere.ranks import ALONE, Ranks
from gere.replay import ReplaySet
from gere.session.anchor import ReadyModel, build_plan

Rows = list[list[int]]


class Setup(NamedTuple):
    """Lets a process make the model and its rows itself.

    Attributes:
        model: Folder or name; empty for a random Llama.
        texts: Records of `text`; `None` for random tokens.
        max_length: Longest row in tokens.
        dtype: Of the weights.
        device: Such as `"cpu"`.
        clock: `"wall"`, or `"cpu"` for the time that all threads of a process had on the cores.
        vocabulary: Of a random Llama.
    """

    model: str
    texts: Path | None
    max_length: int
    dtype: str
    device: str
    clock: str = "wall"
    vocabulary: int = 2048

    def load(self) -> Any:
        """Load the model, or make it."""
        dtype = getattr(torch, self.dtype)
        if self.model:
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        else:
            torch.manual_seed(0)
            sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=self.vocabulary, **sizes)).to(dtype)
        return model.to(self.device).eval()

    def rows(self, count: int) -> Rows:
        """Token ids of `count` texts, evenly spread over the file; a short file is repeated."""
        if self.texts is None or not self.model:
            generator = torch.Generator().manual_seed(0)
            lengths = torch.randint(self.max_length // 8, self.max_length + 1, (count,), generator=generator)
            return [torch.randint(3, self.vocabulary, (int(n),), generator=generator).tolist() for n in lengths]
        texts = [json.loads(line)["text"] for line in self.texts.read_text(encoding="utf-8").splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        chosen = [
            texts[(place * len(texts) // count if count < len(texts) else place) % len(texts)]
            for place in range(count)
        ]
        return [tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"] for text in chosen]


class Made(NamedTuple):
    """One making of an anchor.

    Attributes:
        seconds: By the clock of the setup.
        size: Bytes that are left on the disk.
        work: What was computed, by name.
        fixed: Seconds of it that the measurement of the noise took, once for any number of texts.
    """

    seconds: float
    size: int
    work: Counter[str]
    fixed: float = 0.0


def build(model: nn.Module, rows: Rows, folder: Path, clock: str, ranks: Ranks = ALONE) -> Made:
    """Make an anchor as gere does: regions of the last layer and the loss of every row."""
    device = next(model.parameters()).device
    ready = ReadyModel(model, device, torch.no_grad, "mixed precision no", ranks)
    layout = find_layout(model, rows, device)
    strategy = Margin(depth=layout.depth)
    fields = {"benchmark": "anchor"}
    plan = build_plan(GeReConfig().anchor_batch_tokens, strategy, ready, ReplaySet(rows, [], 0, {}), fields)
    base = BaseModel(model, 0, device, strategy, layout)
    partial, leads = partial_folder(folder), ranks.index == 0

    def noise() -> None:
        ranks.together(lambda: make_folder(partial))
        measure_noise(partial, plan, base, ranks)

    fixed = _measured(model, partial, clock, noise)
    made = _measured(
        model, folder, clock, lambda: build_anchor(folder, plan, base, ranks=ranks, leads=leads, progress=False)
    )
    return Made(fixed.seconds + made.seconds, made.size, fixed.work + made.work, fixed.seconds)


@torch.no_grad()
def naive(model: Any, rows: Rows, folder: Path, clock: str) -> Made:
    """Take the plainest way: a text at a time, all states and all logits, the last state in float32 by pickle."""
    folder.mkdir(parents=True)

    def make() -> None:
        for number, row in enumerate(rows):
            outputs = model(input_ids=torch.tensor([row], device=model.device), output_hidden_states=True)
            torch.save(outputs.hidden_states[-1][0].float().cpu(), folder / f"{number}.pt")

    return _measured(model, folder, clock, make)


@torch.no_grad()
def bare(model: Any, rows: Rows, folder: Path, clock: str) -> Made:
    """Run the forward passes alone, which no way of making an anchor can leave out."""

    def make() -> None:
        for row in rows:
            model(input_ids=torch.tensor([row], device=model.device), use_cache=False)

    return _measured(model, folder, clock, make)


def _measured(model: nn.Module, folder: Path, clock: str, make: Callable[[], None]) -> Made:
    now = time.perf_counter if clock == "wall" else time.process_time
    with counted(model) as work:
        _wait(model)
        begin = now()
        make()
        _wait(model)
        seconds = now() - begin
    return Made(seconds, sum(path.stat().st_size for path in folder.glob("*")), work)


def _wait(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """Count forward passes, the tokens of them with their padding, and tokens whose logits are computed.

    Args:
        model: A causal language model.
    """
    work: Counter[str] = Counter()

    def of_model(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        work.update(forwards=1, tokens=kwargs["input_ids"].numel())

    def of_head(module: nn.Module, inputs: Any, output: Any) -> None:
        work.update(logits=output.shape[:-1].numel())

    hooks = [
        model.register_forward_hook(of_model, with_kwargs=True),
        model.get_output_embeddings().register_forward_hook(of_head),
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


class Share(NamedTuple):
    """Report of one of several processes: our making, and the plain one of all texts."""

    ours: Made
    plain: Made


def on_ranks(setup: Setup, texts: int, threads: int, folder: Path, count: int) -> list[Share]:
    """Both ways on several processes, each with its share of the threads."""
    store = f"file://{folder / f'meeting-{count}'}"
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_rank, setup, texts, max(1, threads // count), folder / f"{count}", store, rank, count)
            for rank in range(count)
        ]
        return [job.result() for job in jobs]


def _rank(setup: Setup, texts: int, threads: int, folder: Path, store: str, rank: int, count: int) -> Share:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(minutes=10))

    def gather(item: Any) -> list[Any]:
        found: list[Any] = [None] * count
        dist.all_gather_object(found, item)
        return found

    try:
        model, rows = setup.load(), setup.rows(texts)
        folder.mkdir(parents=True, exist_ok=True)
        gather(None)
        ours = build(model, rows, folder / "anchor", setup.clock, Ranks(rank, count, rank == 0, gather=gather))
        gather(None)
        return Share(ours, naive(model, rows, folder / f"plain-{rank}", setup.clock))
    finally:
        dist.destroy_process_group()


def peak_bytes(setup: Setup, texts: int, threads: int, folder: Path) -> tuple[int, int]:
    """Peak memory of a process, or of its GPU, that builds an anchor of `texts` texts, and what it held before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, setup, texts, threads, folder).result()


def _peak(setup: Setup, texts: int, threads: int, folder: Path) -> tuple[int, int]:
    torch.set_num_threads(threads)
    model, rows = setup.load(), setup.rows(texts)
    on_gpu = setup.device.startswith("cuda")
    before = torch.cuda.memory_allocated() if on_gpu else process_bytes("VmRSS")
    build(model, rows, folder / f"peak-{texts}", setup.clock)
    return (torch.cuda.max_memory_allocated() if on_gpu else process_bytes("VmHWM")), before
