"""The triton kernels of the margin without a GPU: in triton's interpreter against the plain version, and compiled.

Skipped where triton is not installed; on Linux it comes with torch for CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

FOLDER = Path(__file__).parent


def run(function, **environment):
    """Run a function of this file in a process of its own: triton reads its settings when it is imported."""
    script = f"import test_margin_kernels; test_margin_kernels.{function}()"
    paths = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_the_interpreter():
    assert run("interpret", TRITON_INTERPRET="1").startswith("66 cases")


@pytest.mark.parametrize("architecture", [80, 90])
def test_compiled_without_a_gpu(architecture):
    assert run(f"compile_{architecture}", TRITON_INTERPRET="0").startswith("9 kernels")


def interpret():
    import torch
    from test_margin import DTYPES, SHAPES, assert_same, both, case

    from gere.margin import kernels, plain, sums
    from gere.margin.operands import Operands

    fused = []
    sums._backend = lambda *parts: kernels if fused.append(1) is None else None
    number = 0
    shapes = (*SHAPES, (2, 70, 132), (1, 3, 600), (2, 2, 129 * 4))
    for dtype in DTYPES[:3]:
        for shape in shapes:
            for share in (0.0, 0.3):
                state, codes, lower, upper, mask, tolerance = case(number, shape, dtype, share)
                mask[-1, shape[1] // 2 :] = False
                assert_same(*both(state, codes, lower, upper, mask, tolerance))
                number += 1
        for order in ((0, 2, 1), (1, 0, 2)):  # another stride of the elements; of the rows
            state, codes, *bands, mask, tolerance = case(number, (2, 9, 22), dtype)
            back = [order.index(axis) for axis in range(3)]
            layered = torch.stack([codes.flip(0), codes], dim=2)[:, :, 1]
            own = Operands(state.permute(order).contiguous().permute(back), layered, *bands, tolerance, mask)
            done, wanted = kernels.sums(own, True), plain.sums(own, True)
            assert torch.equal(done.signs, wanted.signs) and kernels.sums(own, False).signs is None
            assert torch.equal(kernels.sums(own, False).total, done.total)
            number += 1
        state, *others = case(0, (2, 5, 9), dtype)
        others[3] = torch.zeros_like(others[3])
        for factor in (None, torch.tensor(torch.inf), torch.tensor(1e30)):
            assert_same(*both(state, *others, factor=factor))
        others[3][1] = True
        assert_same(*both(state, *others, factor=torch.tensor([1.0, 1e6])))
        number += 4
    assert fused
    sys.stdout.write(f"{number} cases\n")


def compile_80():
    compile_for(80)


def compile_90():
    compile_for(90)


def compile_for(architecture):
    """What the interpreter lets pass, the compiler may refuse."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gere.margin.kernels import expand_kernel, sums_kernel

    pointers = {"codes": "*u8", "mask": "*u8", "signs": "*u8", "counts": "*i32"}
    pointers |= dict.fromkeys(("lower", "upper", "tolerance", "totals", "grads"), "*fp32")
    number = 0
    for dtype in ("*fp32", "*bf16", "*fp16"):
        pointers |= {"state": dtype, "gradient": dtype}
        for kernel, settings in (
            (sums_kernel, {"keep": True}), (sums_kernel, {"keep": False, "state_dim": 1}), (expand_kernel, {}),
        ):  # fmt: skip
            constants = {"tokens": 16, "size": 128, **settings}
            names = kernel.arg_names
            signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
            values = {(names.index(name),): value for name, value in constants.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=values)
            built = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            assert f".target sm_{architecture}" in built.asm["ptx"] and built.asm["cubin"]
            number += 1
    sys.stdout.write(f"{number} kernels\n")
