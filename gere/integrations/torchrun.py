"""How LLaMA-Factory's environment variables start `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Mapping


def enabled(name: str, default: str = "0") -> bool:
    """Whether an environment variable is on, by the words that LLaMA-Factory takes for it."""
    return os.environ.get(name, default).lower() in {"true", "y", "1"}


def is_worker() -> bool:
    """Whether this process was started by `torchrun` or another launcher of ranks."""
    return "LOCAL_RANK" in os.environ


def torchrun_options(environ: Mapping[str, str], devices: int, free_port: int) -> list[str]:
    """Options of `torchrun`.

    Args:
        environ: `NNODES`, `NODE_RANK`, `NPROC_PER_NODE`, `MASTER_ADDR`, `MASTER_PORT`; for an elastic start also
            `RDZV_ID`, `MIN_NNODES`, `MAX_NNODES`, `MAX_RESTARTS`.
        devices: Accelerators of this machine.
        free_port: Port to use if none is named.

    Returns:
        Words of a command line.
    """
    address, port = environ.get("MASTER_ADDR", "127.0.0.1"), environ.get("MASTER_PORT", str(free_port))
    options = {"nproc_per_node": environ.get("NPROC_PER_NODE", str(max(1, devices)))}
    options["nnodes"] = environ.get("NNODES", "1")
    if "RDZV_ID" in environ:
        if "MIN_NNODES" in environ and "MAX_NNODES" in environ:
            options["nnodes"] = f"{environ['MIN_NNODES']}:{environ['MAX_NNODES']}"
        options |= {"rdzv_backend": "c10d", "rdzv_id": environ["RDZV_ID"], "rdzv_endpoint": f"{address}:{port}"}
        options["max_restarts"] = environ.get("MAX_RESTARTS", "0")
    else:
        options |= {"master_addr": address, "master_port": port, "node_rank": environ.get("NODE_RANK", "0")}
    return [f"--{name}={value}" for name, value in options.items()]


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the workers; LLaMA-Factory sets two variables for them unless `OPTIM_TORCH` is off."""
    tuned = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}
    return {**environ, **(tuned if enabled("OPTIM_TORCH", "1") else {})}
