"""What the commands in `benchmarks` share."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "base_llms" / "llama-tiny-random"
DATA = ROOT / "examples" / "data"
