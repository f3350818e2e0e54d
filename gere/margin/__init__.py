"""The margin of stored regions in one pass: chunks of torch operations on a CPU, a pair of kernels on a GPU."""

from gere.margin.sums import fused_margin_sums

__all__ = ["fused_margin_sums"]
