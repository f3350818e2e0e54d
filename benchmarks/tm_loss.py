"""Time and memory of the TM loss with its gradient: fused over plain, and the fused one over a copy of as many bytes.

    python -m benchmarks.tm_loss

One line for each size of the state and type of number. Both versions and the copy run in turn; a ratio is the median
of the repeats, with the smallest and the largest. On a GPU the times are those of the device: launches wait behind a
kernel that sleeps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import ratios, spread
from gere.cache import pack, regions
from gere.losses.codes import PER_BYTE
from gere.margin import chunks, fused_margin_sums

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}  # read and written; more than the caches hold
SLEEP_CYCLES = 50_000_000
HEAD = """\
| d | type | plain | fused | fused / plain | most memory, plain | fused | bytes moved | share of copy bandwidth |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


class Measured(NamedTuple):
    """Seconds of each repeat, and the largest memory of one, in bytes, the gradient included."""

    plain: list[float]
    fused: list[float]
    copy: list[float]
    plain_memory: int
    fused_memory: int


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--dims", type=int, nargs="+", default=(576, 2048, 4096))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=("bf16", "fp32"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--copy-bytes", type=int, help="read and written by the copy")
    parser.add_argument("--device", choices=COPY_BYTES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunks", type=int, nargs="*", default=(), help="sizes to compare instead, on a CPU")
    return parser.parse_args()


def moved_bytes(elements: int, codes: int, item: int) -> int:
    """What one pass there and one back have to move: state and codes, signs twice, gradient."""
    forward = elements * item + codes + codes
    backward = codes + elements * item
    return forward + backward


def make_run(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Callable[[bool], None]:
    """The loss of random states near random base states, with its gradient; `True` for the plain version."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    state = (base + 0.1 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
    lower, upper, tolerance = (torch.full(shape[-1:], value) for value in (-1.0, 1.0, 1e-3))
    constants = [pack(regions(base, lower, upper)), lower, upper, torch.ones(shape[:2]), tolerance]
    codes, lower, upper, mask, tolerance = (values.to(device) for values in constants)

    def run(plain: bool) -> None:
        sums = fused_margin_sums(state, codes, lower, upper, mask, tolerance, plain=plain)
        sums.total.sum().backward()
        state.grad = None

    return run


def seconds(device: str, run: Callable[[], object]) -> float:
    """Time of one run; on a GPU, of the device alone."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def most_memory(device: str, run: Callable[[], object]) -> int:
    """Most bytes that a run holds beyond what was there; on a CPU by the log of torch's allocator."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run()
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(device: str, run: Callable[[bool], None], repeats: int, copy_bytes: int) -> Measured:
    """Time all in turn, after one run of each; then their memory."""
    source = torch.ones(copy_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    versions = (lambda: run(True), lambda: run(False), lambda: target.copy_(source))
    for version in versions:
        version()
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(repeats):
        for kept, version in zip(times, versions, strict=True):
            kept.append(seconds(device, version))
    memory = [most_memory(device, version) for version in versions[:2]]
    return Measured(*times, *memory)


def line(shape: tuple[int, int, int], name: str, found: Measured, copy_bytes: int) -> str:
    """One line of the table."""
    elements = shape[0] * shape[1] * shape[2]
    codes = shape[0] * shape[1] * -(-shape[2] // PER_BYTE)
    moved = moved_bytes(elements, codes, DTYPES[name].itemsize)
    shares = [moved / fused * copy / copy_bytes for fused, copy in zip(found.fused, found.copy, strict=True)]
    cells = [str(shape[2]), name]
    cells += [f"{1000 * statistics.median(times):.3f} ms" for times in (found.plain, found.fused)]
    cells += [
        ratios(found.fused, found.plain).show(),
        f"{found.plain_memory / 1e6:.1f} MB",
        f"{found.fused_memory / 1e6:.1f} MB",
    ]
    return f"| {' | '.join([*cells, f'{moved / 1e6:.1f} MB', spread(shares).show(2)])} |"


def compare_chunks(shape: tuple[int, int, int], name: str, sizes: Sequence[int], repeats: int) -> str:
    """Milliseconds of the fused version on a CPU by elements of a chunk."""
    run, times = make_run(shape, DTYPES[name], "cpu"), {size: [] for size in sizes}  # type: dict[int, list[float]]
    kept = chunks.CHUNK
    try:
        for _ in range(repeats):
            for size in sizes:
                chunks.CHUNK = size
                times[size].append(1000 * seconds("cpu", lambda: run(False)))
    finally:
        chunks.CHUNK = kept
    return f"| {shape[2]} | {name} | {' | '.join(spread(times[size]).show(2) for size in sizes)} |"


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    device, copy_bytes = options.device, options.copy_bytes or COPY_BYTES[options.device]
    on = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    shapes = [(options.rows, options.tokens, dim) for dim in options.dims]
    sys.stdout.write(f"{on}, torch {torch.__version__}, {options.rows} rows of {options.tokens} tokens\n\n")
    if options.chunks:
        names = " | ".join(f"{size} elements, ms" for size in options.chunks)
        sys.stdout.write(f"| d | type | {names} |\n| --- | --- |{' --- |' * len(options.chunks)}\n")
    else:
        sys.stdout.write(f"{HEAD}\n")
    for shape in shapes:
        for name in options.dtypes:
            if options.chunks:
                text = compare_chunks(shape, name, options.chunks, options.repeats)
            else:
                run = make_run(shape, DTYPES[name], device)
                text = line(shape, name, measure(device, run, options.repeats, copy_bytes), copy_bytes)
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
