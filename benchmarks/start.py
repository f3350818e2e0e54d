"""Measure a start: importing gere, and opening an existing anchor of the size of an 8B model's.

    python -m benchmarks.start

Every measurement runs in a fresh process. The anchor is made of random codes, in shards as a build makes them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from benchmarks.lib.timing import Spread, interleaved, spread, table
from gere._files import sha256
from gere.cache.plan import PART_BYTES
from gere.cache.store import MANIFEST, ROWS, manifest_bytes, shard_name
from gere.losses.codes import PER_BYTE

CPU_SECONDS = "import json, resource, sys, time\nspent = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])\n"
IMPORT = CPU_SECONDS + "from transformers import Trainer\nbefore = spent()\n{}\nprint(json.dumps(spent() - before))\n"
LINES = {"import gere": "import gere", "from gere import GeReTrainer": "from gere import GeReTrainer"}
PROBE = (
    CPU_SECONDS
    + """
from pathlib import Path
from gere.cache import Anchor
from torch.nn.utils.rnn import pad_sequence
from gere._files import file_sha256

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

folder, batch = Path(sys.argv[1]), 4
files = sorted(folder.iterdir())
size = sum(path.stat().st_size for path in files)
began = spent()
for path in files:
    file_sha256(path)
hashing, held = spent() - began, resident()
began, clock = spent(), time.perf_counter()
anchor = Anchor(folder)
opening, waiting, opened = spent() - began, time.perf_counter() - clock, resident()
clock = time.perf_counter()
steps = anchor.rows // batch
for step in range(steps):
    stored = [anchor.targets(row) for row in range(batch * step, batch * step + batch)]
    {name: pad_sequence([row[name] for row in stored], batch_first=True) for name in stored[0]}
reading = (time.perf_counter() - clock) / steps
print(json.dumps([size, hashing, opening, waiting, opened - held, resident() - opened, reading]))
"""
)


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="replay rows")
    parser.add_argument("--length", type=int, default=563, help="tokens of each")
    parser.add_argument("--dim", type=int, default=4096, help="size of the state")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def make_anchor(folder: Path, rows: int, length: int, dim: int) -> None:
    """Write an anchor of random codes."""
    files = {}

    def write(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        files[name] = sha256(content)

    shard_rows = max(1, PART_BYTES // (4 * dim) // length)
    number = torch.arange(rows)
    codes = torch.randint(0, 256, (shard_rows * length, -(-dim // PER_BYTE)), dtype=torch.uint8)
    for shard in range(-(-rows // shard_rows)):
        here = min(shard_rows, rows - shard * shard_rows)
        write(shard_name("regions", shard), save({"codes": codes[: here * length] ^ shard % 256}))
    bands = {name: torch.full((dim,), value) for name, value in (("lower", -1.0), ("upper", 1.0), ("tolerance", 0.0))}
    write("bands.safetensors", save(bands))
    index = {
        "tokens": torch.full((rows,), length, dtype=torch.int32),
        "base_ce": torch.ones(rows),
        "shard": (number // shard_rows).to(torch.int32),
        "start": number % shard_rows * length,
    }
    write(ROWS, save(index))
    shape = {"rows": rows, "tokens": rows * length, "dim": dim}
    (folder / MANIFEST).write_bytes(manifest_bytes({"dtype": "torch.bfloat16"}, files, shape))


def run(script: str, *words: str) -> list[float]:
    """Run a script in a fresh Python, and give the numbers that it prints."""
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    found = json.loads(done.stdout)
    return found if isinstance(found, list) else [found]


def imports(repeats: int) -> dict[str, Spread]:
    """Seconds of CPU time of an import after that of transformers' Trainer."""
    sides = [lambda line=line: run(IMPORT.format(line))[0] for line in LINES.values()]
    return dict(zip(LINES, map(spread, interleaved(sides, repeats)), strict=True))


def ready_anchor(arguments: argparse.Namespace) -> dict[str, Spread]:
    """Figures of an anchor that is there."""
    with tempfile.TemporaryDirectory() as name:
        make_anchor(Path(name), arguments.rows, arguments.length, arguments.dim)
        runs = [run(PROBE, name) for _ in range(arguments.repeats + 1)][1:]
    size, hashing, opening, waiting, resident, touched, reading = (list(column) for column in zip(*runs, strict=True))
    beyond = [opened - hashed for opened, hashed in zip(opening, hashing, strict=True)]
    return {
        "size, GB": spread([value / 1e9 for value in size]),
        "read and hash every file, CPU s": spread(hashing),
        "rate of that, GB/s": spread([count / 1e9 / seconds for count, seconds in zip(size, hashing, strict=True)]),
        "open and verify, CPU s": spread(opening),
        "open and verify beyond hashing, CPU s": spread(beyond),
        "open and verify, s": spread(waiting),
        "resident memory of the open anchor, MB": spread([value / 1e6 for value in resident]),
        "further after every row was read, MB": spread([value / 1e6 for value in touched]),
        "batch of 4 replay rows, ms": spread([1e3 * seconds for seconds in reading]),
    }


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    rows = [[f"`{line}`", found.show(1, 1e3)] for line, found in imports(arguments.repeats).items()]
    sys.stdout.write(table(("after `from transformers import Trainer`", "CPU ms"), rows) + "\n")
    rows = [[name, found.show()] for name, found in ready_anchor(arguments).items()]
    sys.stdout.write(table(("ready anchor", "median (least to most)"), rows))


if __name__ == "__main__":
    main()
