"""The Triton kernels without a GPU: interpreted, and compiled for GPUs that are not here."""

import concurrent.futures
import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from livediffusion.kernels import (
    group_norm_silu,
    likeness,
    picture_in,
    picture_out,
    stream_enter,
    stream_step,
)

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = (75, 80, 89, 90, 120)
# a kernel is compiled for two of them, a neighbour for other two; with all for each of them
PER_KERNEL = len(TARGETS) if os.environ.get("LIVEDIFFUSION_TARGETS") == "all" else 2
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def interpreter(tmp_path_factory):
    """The tests of interpreted.py, running beside those here."""
    there = pathlib.Path(__file__).with_name("interpreted.py")
    plain = {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "PYTHONWARNINGS": "ignore",
    }
    cache = str(tmp_path_factory.mktemp("triton"))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", there],
        env=os.environ | plain | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": cache},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


class Recorder:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def launches(op, *arguments):
    """The kernels that an op launches: [(kernel, args, kwargs)]."""
    calls = []
    names = vars(sys.modules[op.launch.__module__])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(names.items()):
            if isinstance(value, triton.JITFunction):
                patch.setitem(names, name, Recorder(value, calls))
        op.launch(*arguments)
    assert calls
    return calls


def compiled(kernel, args, kwargs, target):
    """One launch as Triton compiles it for a GPU, given its specialisation of the arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value = values.pop(param.name)
        whole = isinstance(value, int) and not param.do_not_specialize
        if param.is_constexpr or (whole and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        tensor = isinstance(value, torch.Tensor)
        kinds = {float: "fp32", int: "i32"}
        signature[param.name] = POINTERS[value.dtype] if tensor else kinds[type(value)]
        if tensor or (whole and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=values)


def cases():
    """What is launched, and the widest accesses that the larger sides of it must have."""
    half = torch.float16
    picture = torch.empty(512, 512, 3, dtype=torch.uint8)
    norm = torch.empty(1, 1280, 16, 16, dtype=half).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(1280, dtype=half)
    wide = {"ld": "v4.b32", "st": "v4.b32"}
    place = ("crop", False, half)
    image = torch.empty(1, 512, 512, 3, dtype=half)
    made = [
        ("in, copied", picture_in, (picture, 512, 512, *place, "BHWC", 1.0, 0.0), [wide]),
        ("in, gathered", picture_in, (picture, 512, 512, *place, "NCHW", 1.0, 0.0),
         [{"st": "v4.b32"}]),
        ("in, resized", picture_in, (picture, 256, 256, *place, "NCHW", 1.0, 0.0),
         [{"st": "v2.b32"}]),
        ("out, copied", picture_out, (image, "BHWC", 255.0, 0.0), [wide]),
        ("out, gathered", picture_out, (image.movedim(-1, 1).contiguous(), "NCHW", 255.0, 0.0),
         [{"st": "v4.b32"}]),
        ("likeness", likeness, (picture, picture), [{"ld": "v4.b32"}, {}]),
        ("norm", group_norm_silu, (norm, 32, weight, weight, 1e-5, True), [{"ld": "v4.b32"}, wide]),
        *ticks(wide),
    ]  # fmt: skip
    for name, op, arguments, widths in made:
        for call, width in zip(launches(op, *arguments), widths, strict=True):
            yield f"{name}: {call[0].__name__}", call, width


def ticks(wide):
    """The ends of a tick of four slots, with the longest history."""
    half, shape, at = torch.float16, (4, 64, 64), torch.tensor([2])
    state, row = torch.empty(2, 4, *shape), torch.empty(4, *shape)
    bad, dropped = torch.empty(4, dtype=torch.int32), torch.empty(1, dtype=torch.int64)
    gain, source = torch.empty(3, 4, 1, 1, 1), torch.empty(1, *shape)
    entry, base = torch.empty(2, 1, *shape), torch.empty(3, 4, *shape)
    enter = (state, source, entry, at, gain, base, gain, bad, dropped, True, half)
    yield "entering", stream_enter, enter, [wide]
    for second, rows in (("negative", 8), ("reference", 5)):
        out, own = torch.empty(rows, *shape, dtype=half), torch.empty(2, 1)
        given = row if second == "reference" else None, [row] * 3, gain
        last = own if second == "reference" else None, at, bad
        yield f"step, {second}", stream_step, (state, row, out, gain, second, *given, *last), [wide]


def usage(cubin, path):
    """Registers, stack and local memory of a kernel, as ptxas laid it out."""
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    out = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", out.stdout)}


def test_compiled_kernels_move_16_bytes_and_spill_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    used = {}
    # compiled by one thread, because ast.parse is not for several; looked at by another
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for i, j in itertools.product(range(len(kernels := list(cases()))), range(PER_KERNEL)):
            (name, call, widths), target = kernels[i], TARGETS[(i + 2 * j) % len(TARGETS)]
            built = compiled(*call, target)
            ptx, key = built.asm["ptx"], (name, target)
            file = tmp_path / f"{len(used)}.cubin"
            used[key] = pool.submit(usage, built.asm["cubin"], file)
            assert f".target sm_{target}" in ptx
            for way, width in widths.items():
                assert re.search(rf"\b{way}\.global\S*\.{width}", ptx), (key, way)
            if "copied" in name:
                # nothing is left over that moves single values
                assert not re.search(r"\b(ld|st)\.global(?!\S*\.v4\.b32)", ptx), key
    assert len(used) == 12 * PER_KERNEL and {target for _, target in used} == {*TARGETS}
    for key, result in used.items():
        assert result.result()["STACK"] == 0 and result.result()["LOCAL"] == 0, key


def test_a_side_of_one_compiles(tmp_path, monkeypatch):
    """Triton makes constants of arguments that are 1, which have no type."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    one, level = torch.ones(1), torch.ones(1, 1, 3, dtype=torch.uint8)
    calls = [
        *launches(picture_in, level, 2, 1, "pad", True, torch.float32, "NCHW", 1.0, 0.0),
        *launches(picture_out, torch.ones(1, 1, 1, 1), "BHWC", 255.0, 0.0),
        *launches(likeness, level, level),
        *launches(group_norm_silu, torch.ones(1, 1, 1, 1), 1, one, one, 1e-5, True),
    ]
    assert all(compiled(*call, 90).asm["cubin"] for call in calls)


def test_interpreted_kernels_are_their_references(interpreter):
    printed, _ = interpreter.communicate(timeout=300)
    assert interpreter.returncode == 0, printed[-8000:]
    assert re.search(r"\d+ passed", printed) and "skipped" not in printed
