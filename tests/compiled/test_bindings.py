"""NVIDIA's own TensorRT bindings, without a GPU: what is used of them is there.

The bindings of four versions (run.py brings the wheels) are imported against three empty libraries,
each in a process of its own, and tell the parameters of their functions in their docstrings;
TensorRT for RTX is there as a whole. The double that the other tests use is held to the same.
"""

import importlib.util
import inspect
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import pytest
import tensorrt_double
from livediffusion.compiled.trt import api

RTX = "RTX"
VERSIONS = ("10.0.1", "10.13.3.9", "10.16.1.11", "11.4.0.106", RTX)
WHEELS = pathlib.Path.home() / ".cache" / "livediffusion" / "tensorrt_bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getPluginRegistry",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
    "getInferLibVersion", "getLogger",
)  # fmt: skip
READER = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[2])
def found(path):
    at = trt
    for part in path.split("."):
        at = getattr(at, part, None)
        if at is None:
            return None
    return at
told = {"__version__": trt.__version__}
for path in json.loads(sys.argv[1]):
    thing = found(path)
    if isinstance(thing, type):
        doc = getattr(thing.__init__, "__doc__", None)
    else:
        doc = getattr(thing, "__doc__", None)
    told[path] = None if thing is None else doc or ""
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Empty libraries under the names that the bindings ask for, by major version."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("needs gcc on Linux x86-64: the bindings are for that")
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for major in (10, 11):
        (folder / str(major)).mkdir()
        for name in LIBRARIES:
            file = f"lib{name}.so.{major}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", str(source)]
            subprocess.run([*command, "-o", str(folder / str(major) / file)], check=True)
    return folder


def read(version, libraries, paths):
    """Docstrings of names in the real bindings; None for what is not there."""
    surroundings, name = dict(os.environ), "tensorrt_bindings"
    if version == RTX:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            pytest.skip("no tensorrt_rtx: python run.py test brings it")
        name, version = "tensorrt_rtx", "1."
    else:
        place = WHEELS / version
        if not place.is_dir():
            pytest.skip(f"no bindings {version} in {WHEELS}: python run.py test brings them")
        surroundings["LD_LIBRARY_PATH"] = str(libraries / version.split(".")[0])
        surroundings["PYTHONPATH"] = str(place)
    command = [sys.executable, "-c", READER, json.dumps(paths), name]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("__version__").startswith(version)
    return told


def signatures(doc):
    """The parameters of each overload that a pybind docstring tells."""
    out = []
    for line in re.findall(r"^(?:\d+\. )?\w+\((.*)\) ->", doc, re.M):
        names = re.findall(r"(?:^|, )\*?\*?(\w+)(?=:)", line)
        out.append(tuple(name for name in names if name != "self"))
    return out


def called(version):
    """What is called of a version."""
    return api.CALLED | (api.CALLED_RTX if version == RTX else api.CALLED_TIMING)


def double(version):
    if version == RTX:
        return tensorrt_double.make("1.7.1.116", gpu="", rtx=True)
    return tensorrt_double.make(version)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_function_that_is_called_is_there(version, libraries):
    told = read(version, libraries, list(called(version)))
    assert [name for name, doc in told.items() if doc is None] == []
    for name, wanted in called(version).items():
        known = signatures(told[name])
        assert any(given[: len(wanted)] == wanted for given in known), (name, wanted, known)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_attribute_that_is_read_is_there(version, libraries):
    told = read(version, libraries, [*api.READ, *(api.READ_RTX if version == RTX else ())])
    assert [name for name, doc in told.items() if doc is None] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_detected_comes_and_goes(version, libraries):
    """The double has each of these in the same versions as the real ones."""
    told = read(version, libraries, list(api.DETECTED))
    for name, doc in told.items():
        at = double(version)
        for part in name.split("."):
            at = getattr(at, part, None)
        if name.startswith("ICudaEngine."):
            continue  # attributes of the double's instances
        assert (at is None) == (doc is None), name


@pytest.mark.parametrize("version", VERSIONS)
def test_the_double_takes_the_same_parameters(version):
    module = double(version)
    for name, wanted in called(version).items():
        at = module
        for part in name.split("."):
            at = getattr(at, part)
        parameters = [p for p in inspect.signature(at).parameters if p != "self"]
        assert tuple(parameters[: len(wanted)]) == wanted, name


def test_a_name_that_is_missing_would_be_seen(libraries):
    told = read("11.4.0.106", libraries, ["Builder.create_everything", "BuilderFlag.FP16"])
    assert set(told.values()) == {None}
    assert signatures("f(self: x.Y, a: int, b: str = 'c') -> bool") == [("a", "b")]
