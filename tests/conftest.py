"""Makes the pack importable as `livediffusion`, and ComfyUI as ComfyUI makes itself."""

import collections
import importlib.util
import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALIAS = "livediffusion"
CACHE = pathlib.Path.home() / ".cache" / "livediffusion" / "comfyui"
PRIMARY = "0.33.0"
# files and folders that take long: begun first, those of few and long tests before the others, so
# that at the end no core waits for one of them
LONG = [
    "server",
    "test_onnx", "test_rows", "test_graph", "test_learning", "test_engines", "test_tensorrt",
    "test_flow", "test_pictures", "test_demo_stream", "test_benchmarks", "test_weights_moving",
    "test_demo_model", "test_looks", "test_memory", "test_optimized", "test_triton",
    "test_training", "test_nothing_installed", "test_faults", "test_guard", "test_openvino",
    "test_inductor", "test_rtx", "test_registry", "test_equivalence", "test_habits", "test_live",
    "test_paths", "test_counts", "test_learning_nodes", "test_clients", "test_limits", "test_run",
    "test_stages", "test_layout",
]  # fmt: skip
# folders whose tests look at the clock, and how they run
CLOCKS = {"live": pytest.mark.clocked, "browser": pytest.mark.alone}
SERVERS = "tests/server"
CUDA = "LIVEDIFFUSION_CUDA"  # set by benchmarks/gpu.py: the tests marked cuda, on the GPU
PAGED = "LIVEDIFFUSION_DYNAMIC_VRAM"  # set there, too: with ComfyUI's dynamic VRAM
ONCE = "LIVEDIFFUSION_ONCE"  # set by run.py on older ComfyUIs: every test once
# files about what differs from one ComfyUI to another: there every value of a parameter once
VARIED = {"test_registry", "test_paths", "test_control", "test_live", "test_odd_graphs"}


def comfyui_path() -> pathlib.Path | None:
    """The ComfyUI the suite runs on: COMFYUI_PATH, else the primary version in the cache."""
    named = os.environ.get("COMFYUI_PATH")
    path = pathlib.Path(named) if named else CACHE / PRIMARY
    return path if (path / "comfy" / "samplers.py").is_file() else None


def _import_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        ALIAS, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[ALIAS] = module
    spec.loader.exec_module(module)


def _page_weights() -> bool:
    """Dynamic VRAM as ComfyUI's main.py sets it up on CUDA; False where it cannot."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    if not comfy_aimdo.control.init_devices([torch.cuda.current_device()]):
        return False
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True


# the tests' models are tiny: a second thread only waits for the first
torch.set_num_threads(1)

if ALIAS not in sys.modules:
    _import_pack()

COMFYUI = comfyui_path()
sys.path.insert(0, str(ROOT / "tests"))
import chromium  # noqa: E402
import limits  # noqa: E402

if COMFYUI is not None and str(COMFYUI) not in sys.path:
    sys.path.insert(0, str(COMFYUI))
    # ComfyUI reads its options when first imported: keep it off pytest's own arguments
    argv, sys.argv = sys.argv, sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    # before comfy/ comes first on the path, where another `utils` is; as in ComfyUI's main.py
    import utils.install_util  # noqa: F401

    sys.argv = argv
    comfy.cli_args.args.cpu = os.environ.get(CUDA) != "cuda"
    if PAGED in os.environ and not comfy.cli_args.args.cpu and not _page_weights():
        raise RuntimeError("comfy-aimdo does not work here, so there is no dynamic VRAM to test")


def pytest_configure(config):
    config.pluginmanager.register(limits)
    # xdist's own order begins with the files of most tests, and ends with the longest ones
    config.option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """By file, and all that needs servers in one process, so that each is started once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return SERVERS if file.startswith(f"{SERVERS}/") else file

    return Scheduling(config, log)


def pytest_ignore_collect(collection_path, config):
    """Of the tests that look at the clock only the files that have any are read: the rest takes
    longer."""
    wanted = config.getoption("markexpr", "")
    if wanted in ("alone", "clocked") and collection_path.suffix == ".py":
        folder = CLOCKS.get(collection_path.parent.name)
        if folder is None or folder.name != wanted:
            return f"mark.{wanted}" not in collection_path.read_text(encoding="utf-8") or None
    return None


def once(items):
    """Of a test's parametrisations the first; of VARIED files those that have a value of some
    parameter for the first time."""
    seen, few = set(), []
    for item in items:
        varied = item.path.stem in VARIED and hasattr(item, "callspec")
        given = item.callspec.params if varied else {"": None}
        test = item.nodeid.partition("[")[0]
        own = {(test, name, repr(value)) for name, value in given.items()}
        if not own <= seen:
            few.append(item)
        seen |= own
    return few


def pytest_collection_modifyitems(config, items):
    if ONCE in os.environ and "LIVEDIFFUSION_LONG" not in os.environ:
        few = once(items)
        config.hook.pytest_deselected(items=[i for i in items if i not in set(few)])
        items[:] = few
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(LONG)}
        items.sort(
            key=lambda i: min(order.get(n, len(LONG)) for n in (i.path.stem, i.path.parent.name))
        )
    # Playwright keeps an event loop in this thread until the end of the session
    items.sort(key=lambda item: "playwright" in item.fixturenames)
    for item in items:
        if item.path.parent.name in CLOCKS and not item.get_closest_marker("timeless"):
            item.add_marker(CLOCKS[item.path.parent.name])
        if item.get_closest_marker("cuda") and CUDA not in os.environ:
            item.add_marker(pytest.mark.skip(reason="for a GPU: benchmarks/gpu.py"))
        if item.get_closest_marker("comfy") and COMFYUI is None:
            item.add_marker(pytest.mark.skip(reason="no ComfyUI here (COMFYUI_PATH)"))


def pytest_terminal_summary(terminalreporter):
    def count(kind):
        reports = terminalreporter.stats.get(kind, [])
        return sum("comfy" in getattr(r, "keywords", ()) for r in reports)

    passed, failed, skipped = count("passed"), count("failed"), count("skipped")
    where = COMFYUI or "no ComfyUI"
    terminalreporter.write_line(
        f"tests against the real ComfyUI ({where}): "
        f"{passed} passed, {failed} failed, {skipped} skipped"
    )
    walked = [
        value
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, [])
        for name, value in getattr(report, "user_properties", ())
        if name == "walked"
    ]
    if walked:
        roads = collections.Counter()
        for _, outcomes in walked:
            roads.update(outcomes)
        told = ", ".join(f"{road}: {count}" for road, count in sorted(roads.items()))
        nodes = len({name for name, _ in walked})
        terminalreporter.write_line(
            f"the node registry: {nodes} nodes; equal to each frame alone by road, or refused: "
            f"{told}"
        )


@pytest.fixture(scope="session")
def comfyui() -> pathlib.Path:
    """The folder of the ComfyUI under test."""
    if COMFYUI is None:
        pytest.skip("no ComfyUI here (COMFYUI_PATH)")
    return COMFYUI


@pytest.fixture(scope="session")
def playwright():
    """Once it runs, no other test may run an event loop: tests that use it come last."""
    with chromium.driving() as running:
        yield running
