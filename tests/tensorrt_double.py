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
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT64": np.int64}
WIDE, NARROW = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
SM = {"NONE": 0, "CURRENT": 1, "SM75": 75, "SM80": 80, "SM86": 86, "SM89": 89, "SM120": 120,
      "SM121": 121}  # fmt: skip


def widened(model):
    """A bfloat16 model in float32, its weights' values kept: ONNX Runtime has no bfloat16."""
    model = onnx.ModelProto.FromString(model.SerializeToString())

    def wide(tensor):
        if tensor.data_type == NARROW:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    graph = model.graph
    for tensor in graph.initializer:
        wide(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == NARROW:
            value.type.tensor_type.elem_type = WIDE
    for node in graph.node:
        for attribute in node.attribute:
            wide(attribute.t)
            if node.op_type == "Cast" and attribute.i == NARROW:
                attribute.i = WIDE
    return model


def plan(model, **head):
    """An engine of the double: version, gpu, profile, targets, refit, then the ONNX file."""
    told = json.dumps(head).encode()
    return MAGIC + len(told).to_bytes(4, "big") + told + model.SerializeToString()


def make(version="10.16.1.11", gpu="Double GPU", rtx=False):
    """A module that stands for tensorrt, or for tensorrt_rtx on a GPU of capability `here`.

    Its `trouble` may hold "parse", "build", "deserialize", "context", "address", "execute" to make
    that fail, and "raise" to make a build raise; `built` counts builds, `flags` keeps those of the
    last one, `steps` is how many steps a build reports.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    trt = types.ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    trt.__version__, trt.trouble, trt.built, trt.flags, trt.steps = version, set(), 0, set(), 8
    trt.loaded = 0
    trt.timing = []  # of each build: the bytes of the timing cache that it started with
    trt.here, trt.targets, trt.configs = "8.9", [], []
    if rtx:  # in most things it is as TensorRT 11
        major, minor = 11, 4

    class ILogger:
        def __init__(self):
            pass

        def log(self, severity, msg):
            raise NotImplementedError

    class Logger(ILogger):
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def __init__(self, min_severity=WARNING):
            pass

    class TensorIOMode(enum.Enum):
        NONE = 0
        INPUT = 1
        OUTPUT = 2

    class DataType(enum.Enum):
        FLOAT = 0
        HALF = 1
        BF16 = 2
        INT64 = 3

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
            assert not rtx, "a timing cache does nothing there, and asks for a GPU"
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
            trt.timing.append(config.cache and config.cache.data)
            trt.targets.append(getattr(config, "capabilities", None))
            model = onnx.load(str(network.path))
            shapes = config.profiles[0].shapes if config.profiles else {}
            return plan(
                model, version=version, gpu=gpu, profile=shapes, targets=trt.targets[-1],
                refit=sorted(network.refittable),
            )  # fmt: skip

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
            if name == "out":
                return self.shapes["x"]
            return self.shapes[name] if name in self.shapes else self.engine.given(self, name)

        def set_tensor_address(self, name, memory):
            if "address" in trt.trouble:
                return False
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            if "execute" in trt.trouble or self.infer_shapes():
                return False
            fed = {name: self.array(name).copy() for name in self.engine.inputs}
            for name, array in fed.items():
                if self.engine.kinds[name] == "BF16":
                    fed[name] = (array.astype(np.uint32) << 16).view(np.float32)
            names = [end.name for end in self.engine.session.get_outputs()]
            for name, out in zip(names, self.engine.session.run(None, fed), strict=True):
                if self.engine.kinds[name] == "BF16":
                    bits = out.view(np.uint32)
                    out = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
                self.array(name)[:] = out
            return True

        def array(self, name):
            shape, kind = self.get_tensor_shape(name), NUMPY[self.engine.kinds[name]]
            size = math.prod(shape) * np.dtype(kind).itemsize
            held = (ctypes.c_char * size).from_address(self.addresses[name])
            return np.frombuffer(held, kind).reshape(shape)

    class ICudaEngine:
        def __init__(self, head, model):
            self.head, self.model, self.found = head, model, {}
            self.refittable = bool(head["refit"])
            self.start()
            self.num_io_tensors = len(self.kinds)
            setattr(self, "device_memory_size" if major < 10 else "device_memory_size_v2", 1 << 20)

        def start(self):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(
                widened(self.model).SerializeToString(), options,
                providers=["CPUExecutionProvider"],
            )  # fmt: skip
            self.inputs = {i.name: i.shape for i in self.session.get_inputs()}
            graph, number = self.model.graph, onnx.TensorProto.DataType.Name
            self.kinds = {
                end.name: {"FLOAT16": "HALF", "BFLOAT16": "BF16", "INT64": "INT64"}.get(
                    number(end.type.tensor_type.elem_type), "FLOAT"
                )
                for end in (*graph.input, *graph.output)
            }

        def given(self, context, name):
            """The shape of an output besides the picture: that of what the layer remembers."""
            static = {end.name: end.shape for end in self.session.get_outputs()}[name]
            if all(isinstance(side, int) for side in static):
                return tuple(static)
            at = tuple(sorted(context.shapes.items()))
            if at not in self.found:
                kinds = {**NUMPY, "BF16": np.float32}
                fed = {n: np.zeros(s, kinds[self.kinds[n]]) for n, s in context.shapes.items()}
                names = [end.name for end in self.session.get_outputs()]
                outs = self.session.run(None, fed)
                self.found[at] = {n: out.shape for n, out in zip(names, outs, strict=True)}
            return self.found[at][name]

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
            if rtx and f"SM{trt.here.replace('.', '')}" not in head["targets"]:
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
        ILogger, Logger, TensorIOMode, DataType, BuilderFlag, NetworkDefinitionCreationFlag,
        Builder, INetworkDefinition, IOptimizationProfile, ITimingCache, IBuilderConfig, OnnxParser,
        IExecutionContext, ICudaEngine, Runtime, Weights, Refitter,
    ):  # fmt: skip
        setattr(trt, thing.__name__, thing)
    trt.IHostMemory = bytes
    if rtx:
        compiling(trt)
    if major >= 10:
        trt.IProgressMonitor = IProgressMonitor
    return trt


def compiling(trt):
    """Give the double what TensorRT for RTX alone has: several GPUs, kernels compiled late."""
    trt.ComputeCapability = enum.IntEnum("ComputeCapability", SM)
    trt.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
    trt.DynamicShapesKernelSpecializationStrategy = enum.Enum(
        "DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"]
    )

    class IRuntimeCache:
        def __init__(self):
            self.kernels = set()

        def deserialize(self, blob):
            told = json.loads(bytes(blob))
            fits = (told["version"], told["gpu"]) == (trt.__version__, trt.here)
            self.kernels |= set(told["kernels"]) if fits else set()
            return fits

        def serialize(self):
            told = {"version": trt.__version__, "gpu": trt.here, "kernels": sorted(self.kernels)}
            return json.dumps(told).encode()

    class IRuntimeConfig:
        cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        dynamic_shapes_kernel_specialization_strategy = None
        cache = None

        def create_runtime_cache(self):
            return IRuntimeCache()

        def set_runtime_cache(self, cache):
            self.cache = cache
            return True

    class IBuilderConfig(trt.IBuilderConfig):
        def __init__(self):
            super().__init__()
            self.capabilities = []

        @property
        def num_compute_capabilities(self):
            return len(self.capabilities)

        @num_compute_capabilities.setter
        def num_compute_capabilities(self, number):
            self.capabilities = ["CURRENT"] * number

        def set_compute_capability(self, compute_capability, index):
            fits = 0 <= index < len(self.capabilities) and compute_capability > 1
            if fits:
                self.capabilities[index] = compute_capability.name
            return fits

    class Builder(trt.Builder):
        def create_builder_config(self):
            return IBuilderConfig()

    class IExecutionContext(trt.IExecutionContext):
        cache = None

        def execute_async_v3(self, stream_handle):
            done = super().execute_async_v3(stream_handle)
            if done and self.cache is not None:
                kernel = f"unet for {self.shapes['x']}"
                trt.compiled += kernel not in self.cache.kernels
                self.cache.kernels.add(kernel)
            return done

    class ICudaEngine(trt.ICudaEngine):
        def create_runtime_config(self):
            return IRuntimeConfig()

        def create_execution_context(self, runtime_config=None):
            if "context" in trt.trouble:
                return None
            context = IExecutionContext(self)
            if runtime_config is not None:
                trt.configs.append(runtime_config)
                context.cache = runtime_config.cache
            return context

    class Runtime(trt.Runtime):
        def deserialize_cuda_engine(self, serialized_engine):
            engine = super().deserialize_cuda_engine(serialized_engine)
            if engine is not None:
                engine.__class__ = ICudaEngine
            return engine

    trt.compiled = 0  # kernels that no runtime cache had
    for thing in (
        IRuntimeCache, IRuntimeConfig, IBuilderConfig, Builder, IExecutionContext, ICudaEngine,
        Runtime,
    ):  # fmt: skip
        setattr(trt, thing.__name__, thing)
