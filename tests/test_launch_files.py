"""The files of `examples/accelerate` say what they are named after; tests/test_readme.py starts one of them."""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"), ("fsdp2", "FSDP"), ("cpu2", "MULTI_GPU")],
)
def test_accelerate_reads_its_files(name, kind):
    """Each names what is spread over the processes, and leaves the precision to the script."""
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 2 and config.mixed_precision == "no"
    stages = {"zero2": 2, "zero3": 3}
    assert config.deepspeed_config.get("zero_stage") == stages.get(name)
    assert config.fsdp_config.get("fsdp_version") == {"fsdp2": 2}.get(name)
