"""Start real processes, wait for them, and show the stack of one that hangs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Done(NamedTuple):
    codes: list[int]
    output: str
    results: list[dict]

    @property
    def logs(self) -> list[dict]:
        return self.results[0]["logs"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(root: Path, ranks: int, job: dict, limit: int) -> list[subprocess.Popen]:
    script = HERE / job.get("script", "job.py")
    command = [sys.executable, str(script), str(root), json.dumps({"limit": limit, **job})]
    distributed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        scripts = Path(sys.executable).parent  # DeepSpeed asks for ninja by name
        path = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
        if ranks > 1 or job.get("strategy", "").startswith("zero"):
            env |= {**distributed, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"LOCAL_WORLD_SIZE": str(ranks)}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=env, **pipe))
    return processes


def finish(processes: list[subprocess.Popen], limit: float) -> tuple[list[int], str]:
    """Wait for processes; give their exit codes and all that they wrote."""
    try:
        outputs = [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(outputs)


def run(root: Path, ranks: int, *, limit: int = 120, succeed: bool = True, **job) -> Done:
    """Run a job on so many ranks; a rank that is still there after `limit` seconds prints its stack and ends."""
    root.mkdir(parents=True, exist_ok=True)
    codes, output = finish(start(root, ranks, job, limit), limit + 30)
    if succeed:
        assert not any(codes), f"{codes}\n{output}"
    paths = [root / f"result-{rank}.json" for rank in range(ranks)]
    results = [json.loads(path.read_text()) for path in paths] if succeed else []
    return Done(codes, output, results)
