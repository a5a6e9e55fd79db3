"""Triton kernels of compare.py: sums for each block of both pictures, then one small program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch

BLOCK = 4096  # levels for each program; 32768 squares at most fit into 32 bits
WARPS = 8
SUMS = 5  # of a * b, a * a, b * b, a, b


@triton.jit
def _sum_kernel(a, b, sums, total, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(a + at, mask=at < total, other=0).to(tl.int32)
    y = tl.load(b + at, mask=at < total, other=0).to(tl.int32)
    sums += program
    tl.store(sums, tl.sum(x * y))
    tl.store(sums + programs, tl.sum(x * x))
    tl.store(sums + 2 * programs, tl.sum(y * y))
    tl.store(sums + 3 * programs, tl.sum(x))
    tl.store(sums + 4 * programs, tl.sum(y))


@triton.jit
def _collected(sums, programs, BLOCK: tl.constexpr):
    """The sum of one row of partial sums, in 64 bits."""
    result = tl.zeros([BLOCK], tl.int64)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        result += tl.load(sums + at, mask=at < programs, other=0).to(tl.int64)
    return tl.sum(result)


@triton.jit(do_not_specialize=["total", "programs"])
def _finish_kernel(sums, result, total, programs, BLOCK: tl.constexpr):
    ab = _collected(sums, programs, BLOCK)
    aa = _collected(sums + programs, programs, BLOCK)
    bb = _collected(sums + 2 * programs, programs, BLOCK)
    a = _collected(sums + 3 * programs, programs, BLOCK)
    b = _collected(sums + 4 * programs, programs, BLOCK)
    n = total.to(tl.int64)
    # of 2 a - 255 and 2 b - 255, which are never 0
    xy = (4 * ab - 510 * (a + b) + 65025 * n).to(tl.float64)
    xx = (4 * aa - 1020 * a + 65025 * n).to(tl.float64)
    yy = (4 * bb - 1020 * b + 65025 * n).to(tl.float64)
    tl.store(result, (xy / tl.sqrt(xx * yy)).to(tl.float32))
    # less the mean's nearest integer in integers, and less the rest as numbers: that is half of
    # what is left at most, so nothing cancels
    count = n.to(tl.float64)
    share = 1.0 / count
    a_mean, b_mean = a.to(tl.float64) / count, b.to(tl.float64) / count
    p, q = (a_mean + 0.5).to(tl.int64), (b_mean + 0.5).to(tl.int64)
    e, f = (a - n * p).to(tl.float64), (b - n * q).to(tl.float64)
    xy = (ab - q * a - p * b + n * p * q).to(tl.float64) - e * f * share
    xx = (aa - 2 * p * a + n * p * p).to(tl.float64) - e * e * share
    yy = (bb - 2 * q * b + n * q * q).to(tl.float64) - f * f * share
    product = xx * yy
    flat = tl.where(xx == yy, 1.0, 0.0)
    correlation = tl.where(product > 0, xy / tl.sqrt(tl.where(product > 0, product, 1.0)), flat)
    tl.store(result + 1, correlation.to(tl.float32))
    tl.store(result + 2, (a_mean / 255).to(tl.float32))
    tl.store(result + 3, (b_mean / 255).to(tl.float32))


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """compare.likeness, by the kernels."""
    total = a.numel()
    programs = triton.cdiv(total, BLOCK)
    sums = torch.empty(SUMS, programs, dtype=torch.int32, device=a.device)
    result = torch.empty(4, dtype=torch.float32, device=a.device)
    launch(_sum_kernel, (programs,), a, b, sums, total, BLOCK=BLOCK, num_warps=WARPS)
    launch(_finish_kernel, (1,), sums, result, total, programs, BLOCK=256, num_warps=WARPS)
    return result
