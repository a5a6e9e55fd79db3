"""TensorRT's bindings without a GPU: the same names and parameters, run by ONNX Runtime.

An engine is the ONNX file with a header. Addresses are real: the context reads its inputs from
memory and writes its output there, as TensorRT does. test_bindings.py compares the parameters with
those of NVIDIA's own bindings.
"""

import ctypes
import enum
import json
import math
import pathlib
import types

import numpy as np
import onnx
import onnxruntime

MAGIC = b"double"
KINDS = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16}


def make(version="10.16.1.11", gpu="Double GPU"):
    """A module that stands for tensorrt.

    Its `trouble` may hold "parse", "build", "deserialize", "context", "address", "execute" to make
    that fail, and "raise" to make a build raise; `built` counts builds, `flags` keeps those of the
    last one, `steps` is how many steps a build reports.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    trt = types.ModuleType("tensorrt")
    trt.__version__, trt.trouble, trt.built, trt.flags, trt.steps = version, set(), 0, set(), 8
    trt.loaded = 0
    trt.timing = []  # of each build: the bytes of the timing cache that it started with

    class Logger:
        WARNING = 2

        def __init__(self, min_severity=2):
            pass

    class TensorIOMode(enum.Enum):
        NONE = 0
        INPUT = 1
        OUTPUT = 2

    class DataType(enum.Enum):
        FLOAT = 0
        HALF = 1
        BF16 = 2

    strong = {"STRONGLY_TYPED": 0} if major >= 11 else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    network_flags = {"EXPLICIT_BATCH": 0} if major < 9 else strong
    names = ["REFIT"] + (["FP16", "BF16"] if major < 11 else [])
    individual = (major, minor) >= (10, 1)
    names += ["REFIT_INDIVIDUAL"] if individual else []
    BuilderFlag = enum.Enum("BuilderFlag", names)
    NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", network_flags)

    class INetworkDefinition:
        def __init__(self):
            self.path, self.refittable = None, set()

    if individual:
        INetworkDefinition.mark_weights_refittable = lambda self, name: (
            self.refittable.add(name) or True
        )

    class IOptimizationProfile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, input, min, opt, max):
            assert len(min) == len(opt) == len(max)
            self.shapes[input] = [list(min), list(opt), list(max)]

    class ITimingCache:
        def __init__(self, data):
            self.data = data

        def serialize(self):
            return f"timing {version} {gpu}".encode()

    class IBuilderConfig:
        def __init__(self):
            self.flags, self.profiles, self.cache, self.progress_monitor = set(), [], None, None

        def set_flag(self, flag):
            self.flags.add(flag.name)

        def add_optimization_profile(self, profile):
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, serialized_timing_cache):
            return ITimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache, ignore_mismatch):
            fits = cache.data in (b"", f"timing {version} {gpu}".encode())
            if fits or ignore_mismatch:
                self.cache = cache
            return fits or ignore_mismatch

        def get_timing_cache(self):
            return self.cache

    class IProgressMonitor:
        def __init__(self):
            pass

    class Builder:
        def __init__(self, logger):
            pass

        def create_network(self, flags=0):
            network = INetworkDefinition()
            network.flags = {f.name for f in NetworkDefinitionCreationFlag if flags & (1 << f)}
            return network

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            if "raise" in trt.trouble:
                raise RuntimeError("the builder has crashed")
            monitor = config.progress_monitor
            if monitor is not None:
                monitor.phase_start("tactics", None, trt.steps)
                for step in range(trt.steps):
                    if not monitor.step_complete("tactics", step):
                        return None
                monitor.phase_finish("tactics")
            if "build" in trt.trouble:
                return None
            trt.built += 1
            trt.flags = network.flags | config.flags
            trt.timing.append(config.cache.data)
            model = onnx.load(str(network.path))
            shapes = config.profiles[0].shapes if config.profiles else {}
            head = {
                "version": version, "gpu": gpu, "profile": shapes,
                "refit": sorted(network.refittable),
            }  # fmt: skip
            head = json.dumps(head).encode()
            return MAGIC + len(head).to_bytes(4, "big") + head + model.SerializeToString()

    class OnnxParser:
        def __init__(self, network, logger):
            self.network, self.num_errors = network, 0

        def parse_from_file(self, model):
            if "parse" in trt.trouble or not pathlib.Path(model).is_file():
                self.num_errors = 1
                return False
            self.network.path = model
            return True

        def get_error(self, index):
            return "In node 7: no importer for Frobnicate"

    class IExecutionContext:
        def __init__(self, engine):
            self.engine, self.shapes, self.addresses = engine, {}, {}

        def set_input_shape(self, name, shape):
            low, _, high = self.engine.span(name)
            fits = len(shape) == len(low) and all(
                a <= s <= b for a, s, b in zip(low, shape, high, strict=True)
            )
            if fits:
                self.shapes[name] = tuple(shape)
            return fits

        def infer_shapes(self):
            return [name for name in self.engine.inputs if name not in self.shapes]

        def get_tensor_shape(self, name):
            return self.shapes["x"] if name == "out" else self.shapes[name]

        def set_tensor_address(self, name, memory):
            if "address" in trt.trouble:
                return False
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            if "execute" in trt.trouble or self.infer_shapes():
                return False
            fed = {name: self.array(name).copy() for name in self.engine.inputs}
            self.array("out")[:] = self.engine.session.run(None, fed)[0]
            return True

        def array(self, name):
            shape, kind = self.get_tensor_shape(name), NUMPY[self.engine.kinds[name]]
            size = math.prod(shape) * np.dtype(kind).itemsize
            held = (ctypes.c_char * size).from_address(self.addresses[name])
            return np.frombuffer(held, kind).reshape(shape)

    class ICudaEngine:
        def __init__(self, head, model):
            self.head, self.model = head, model
            self.refittable = bool(head["refit"])
            self.start()
            self.num_io_tensors = len(self.kinds)
            setattr(self, "device_memory_size" if major < 10 else "device_memory_size_v2", 1 << 20)

        def start(self):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(
                self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            self.inputs = {i.name: i.shape for i in self.session.get_inputs()}
            ends = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.kinds = {end.name: KINDS[end.type] for end in ends}

        def span(self, name):
            static = self.inputs[name]
            return self.head["profile"].get(name) or [static, static, static]

        def get_tensor_name(self, index):
            return list(self.kinds)[::-1][index]  # in no order that one may rely on

        def get_tensor_mode(self, name):
            return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return DataType[self.kinds[name]]

        def create_execution_context(self):
            return None if "context" in trt.trouble else IExecutionContext(self)

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, serialized_engine):
            data = bytes(serialized_engine)
            if "deserialize" in trt.trouble or not data.startswith(MAGIC):
                return None
            at = len(MAGIC) + 4
            size = int.from_bytes(data[len(MAGIC) : at], "big")
            head = json.loads(data[at : at + size])
            if (head["version"], head["gpu"]) != (version, gpu):
                return None
            trt.loaded += 1
            return ICudaEngine(head, onnx.load_from_string(data[at + size :]))

    class Weights:
        def __init__(self, a):
            self.array = a

    class Refitter:
        def __init__(self, engine, logger):
            self.engine, self.new = engine, {}

        def get_all_weights(self):
            return list(self.engine.head["refit"])

        def set_named_weights(self, name, weights):
            known = {i.name: i for i in self.engine.model.graph.initializer}
            old = onnx.numpy_helper.to_array(known[name])
            if (old.size, old.dtype) != (weights.array.size, weights.array.dtype):
                return False
            self.new[name] = weights
            return True

        def refit_cuda_engine(self):
            for i in self.engine.model.graph.initializer:
                if i.name in self.new:
                    array = self.new[i.name].array.reshape(tuple(i.dims))
                    i.CopyFrom(onnx.numpy_helper.from_array(array, i.name))
            self.engine.start()
            return True

    for thing in (
        Logger, TensorIOMode, DataType, BuilderFlag, NetworkDefinitionCreationFlag, Builder,
        INetworkDefinition, IOptimizationProfile, ITimingCache, IBuilderConfig, OnnxParser,
        IExecutionContext, ICudaEngine, Runtime, Weights, Refitter,
    ):  # fmt: skip
        setattr(trt, thing.__name__, thing)
    trt.IHostMemory = bytes
    if major >= 10:
        trt.IProgressMonitor = IProgressMonitor
    return trt
