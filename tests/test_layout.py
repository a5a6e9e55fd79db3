"""The house rules of docs/architecture.md, read off the source."""

import ast
import fnmatch
import functools
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = {"nodes", "live", "host", "compiled", "schedules", "engine", "kernels", "demo",
         "trust"}  # fmt: skip
FREE = {"schedules", "compiled", "engine", "kernels", "trust"}
# who may import whom; a room may always import itself
ARROWS = {
    "nodes": {"live", "host", "compiled", "schedules", "engine", "demo", "trust"},
    "live": {"host", "engine", "trust"},
    "host": {"compiled", "engine", "kernels", "trust"},
    "compiled": {"engine", "kernels", "trust"},
    "schedules": {"engine", "trust"},
    "engine": {"kernels"},
    "kernels": set(),
    "demo": set(),
    "trust": set(),
}
# comfy and what else belongs to a running ComfyUI
COMFY = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "execution"}
SERVER = {"server", "aiohttp"}
MAY_COMFY = {"nodes", "live", "host", "demo"}
MAY_SERVER = {"nodes", "live"}
PURE = {"torch", "numpy", *sys.stdlib_module_names}
STDLIB = {"trust"}  # reads what strangers send, with nothing but Python's own
# scipy is ComfyUI's own; these are imported where they are used
LATE = {"triton", "tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "openvino", "segno"}
OPTIONAL = {*LATE, "scipy"}
# sources, sinks and what keeps them safe; imported when a node asks for one of them
ENDS = {"aiortc", "NDIlib", "pyvirtualcam", "SpoutGL", "syphon", "cryptography", "trustme"}
# modules that import one of them at their top: nobody else may import these at the top
LATE_MODULES = ("kernels/triton_*.py", "live/webrtc/arrival.py", "live/webrtc/coder.py",
                "live/webrtc/peers.py", "live/webrtc/track.py")  # fmt: skip
# who copies what by Python's copy, one level deep; compiled/copies.py alone copies networks
COPIES = {
    "host/frames/compiled_vae.py": "a VAE around its network",
    "host/frames/vae.py": "a VAE around its network",
    "host/models/time_shift.py": "the model's sampling, whose tables it shares",
    "host/sampling/rows.py": "rows of a batch",
    "host/sampling/sampler.py": "a guider around its model",
}
COPIER = "compiled/copies.py"
# names by which a module is made anew from another, or from what was written of it
DEEP = {
    "deepcopy", "__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__new__",
    "deepclone_multigpu", "force_deepcopy", "get_non_dynamic_delegate",
}
# words that the registry's scanner flags, wherever they stand
FLAGGED = ("sub" + "process", r"os\.sys" + "tem", "pick" + "le", r"__imp" + "ort__", "ctyp" + "es",
           r"\bev" + r"al\(", r"\bex" + r"ec\(")  # fmt: skip


def files(pattern: str = "*") -> list[pathlib.Path]:
    """What git holds or would take, as paths below the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    paths = [pathlib.Path(p) for p in sorted(set(listed))]
    return [p for p in paths if p.match(pattern) and (ROOT / p).is_file()]


def ignored(path: pathlib.Path) -> bool:
    """Whether .comfyignore keeps the file out of the published pack."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    for line in (entry.strip() for entry in lines):
        if not line or line.startswith("#"):
            continue
        if line.endswith("/"):
            if path.as_posix().startswith(line):
                return True
        elif fnmatch.fnmatch(path.as_posix(), line):
            return True
    return False


PYTHON = files("*.py")
PUBLISHED = [p for p in files() if not ignored(p)]
PACK = [p for p in PYTHON if p.parts[0] in ROOMS]


def tree(path: pathlib.Path) -> ast.Module:
    return _parsed((ROOT / path).read_text(encoding="utf-8"), str(path))


@functools.cache
def _parsed(text: str, name: str) -> ast.Module:
    return ast.parse(text, name)


def imports(path: pathlib.Path) -> tuple[set[str], set[tuple[str, ...]]]:
    """Top-level names of absolute imports, and the targets of relative ones from the root."""
    absolute, relative = set(), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = path.parts[:-1][: len(path.parts) - node.level]
            target = (*base, *(node.module or "").split("."))
            names = [alias.name for alias in node.names]
            # `from .. import room` names the room in what it imports
            rooms = [(*base, name) for name in names] if not node.module else [target]
            relative |= {tuple(part for part in room if part) for room in rooms}
    return absolute, relative


def test_the_source_was_found():
    """The other tests are about these files: none of them is empty by accident."""
    assert {p.parts[0] for p in PACK} >= {"nodes", "host", "engine", "schedules", "demo"}
    assert pathlib.Path("nodes/extension.py") in PUBLISHED
    assert any(p.suffix == ".safetensors" for p in PUBLISHED)
    assert pathlib.Path("locales/ja/nodeDefs.json") in PUBLISHED
    assert pathlib.Path("run.py") not in PUBLISHED
    demo = {p.name for p in PUBLISHED if p.parts[0] == "demo" and p.suffix == ".py"}
    assert demo == {"__init__.py", "loader.py", "network.py"}


@pytest.mark.parametrize("path", PACK, ids=str)
def test_imports_point_downwards(path):
    absolute, relative = imports(path)
    room = path.parts[0]
    for target in relative:
        assert target[0] == room or target[0] in ARROWS[room], f"{room} imports {target}"
    assert not absolute & {"livediffusion", *ROOMS}, "only relative imports inside the pack"
    if room not in MAY_COMFY:
        assert not absolute & COMFY, f"{room} knows nothing of ComfyUI"
    if room not in MAY_SERVER and path.name not in ("clip.py", "live.py"):
        assert not absolute & SERVER, f"{room} knows nothing of the server"
    if room in FREE:
        assert absolute <= PURE | OPTIONAL, f"{room} is torch and numpy only"
    if room in STDLIB:
        assert absolute <= set(sys.stdlib_module_names), f"{room} is the standard library only"


@pytest.mark.parametrize("path", [p for p in PACK if p.match("live/media/*.py")], ids=str)
def test_the_reader_of_files_needs_neither_comfyui_nor_torch(path):
    """The clients of run.py load it without them; PyAV when a film is opened."""
    absolute, relative = imports(path)
    assert absolute <= {"PIL", "av", "numpy", *sys.stdlib_module_names}
    assert all(target[:2] in {("live", "media"), ("trust",)} for target in relative)
    assert not any(
        alias.name == "av"
        for node in tree(path).body
        if isinstance(node, ast.Import)
        for alias in node.names
    )


def copiers(path: pathlib.Path) -> tuple[bool, set[str]]:
    """Whether a file takes Python's copy, and the names of deeper ones that it says."""
    said: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            said |= {node.attr}
        elif isinstance(node, ast.Name):
            said |= {node.id}
        elif isinstance(node, ast.ImportFrom):
            said |= {alias.name for alias in node.names}
        elif isinstance(node, ast.keyword) and node.arg:
            said |= {node.arg}
        elif isinstance(node, ast.FunctionDef):
            said |= {node.name}
    return "copy" in imports(path)[0], said & DEEP


@pytest.mark.parametrize("path", [p for p in PACK if not ignored(p)], ids=str)
def test_networks_are_copied_in_one_place(path):
    """ComfyUI's dynamic VRAM lays on a network what owns memory: a copy of that owns it, too, and
    frees it under the network (compiled/copies.py, tests/host/test_copies.py)."""
    shallow, deep = copiers(path)
    assert shallow == (path.as_posix() in COPIES), f"{path}: list what it copies, one level deep"
    assert deep == ({"__new__"} if path.as_posix() == COPIER else set()), f"{path}: use {COPIER}"


def test_a_second_copier_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for i, (line, shallow, deep) in enumerate((
        ("import copy\ncopy.deepcopy(m)\n", True, {"deepcopy"}),
        ("import copy as c\nc.copy(m)\n", True, set()),
        ("from copy import deepcopy as d\nd(m)\n", True, {"deepcopy"}),
        ("type(m).__new__(type(m))\n", False, {"__new__"}),
        ("p.clone(force_deepcopy=True)\n", False, {"force_deepcopy"}),
    )):  # fmt: skip
        (tmp_path / f"{i}.py").write_text(line, encoding="utf-8")
        assert copiers(pathlib.Path(f"{i}.py")) == (shallow, deep)


def at_load(path: pathlib.Path) -> tuple[set[str], set[pathlib.Path]]:
    """What a module imports when it is imported itself, not in functions or for type checkers.

    Returns:
        packages, modules of the pack as paths below the root (which need not be there).
    """
    packages, modules = set(), set()
    rest: list[ast.AST] = [tree(path)]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            home = pathlib.Path(*path.parts[:-1][: len(path.parts) - node.level])
            home = home.joinpath(*(node.module or "").split("."))
            modules |= {home / f"{alias.name}.py" for alias in node.names}
            modules |= {home.with_suffix(".py")} if node.module else set()
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            rest += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            rest += ast.iter_child_nodes(node)
    return packages, modules


def late(path: pathlib.Path) -> bool:
    return any(path.match(one) for one in LATE_MODULES)


@pytest.mark.parametrize("path", PACK, ids=str)
def test_optional_packages_are_imported_late(path):
    """Inside functions only, or in modules that are imported inside functions only."""
    packages, modules = at_load(path)
    if late(path):
        assert packages & (OPTIONAL | ENDS), f"{path} may be imported early: take it off the list"
        return
    assert not packages & (OPTIONAL | ENDS)
    assert not [str(module) for module in modules if late(module)]


@pytest.mark.parametrize("line", [
    "import aiortc\n", "import aiortc.rtp as r\n", "from aiortc.sdp import x\n", "import NDIlib\n",
    "try:\n    import pyvirtualcam\nexcept ImportError:\n    pass\n",
    "class A:\n    from cryptography.hazmat import x\n", "if x:\n    import SpoutGL\n",
    "if TYPE_CHECKING:\n    pass\nelse:\n    import syphon.utils\n",
    "from .webrtc import loop, peers\n", "from .webrtc.peers import Peer\n",
    "from ..live.webrtc import coder\n", "from ..kernels.triton_norm import norm\n",
])  # fmt: skip
def test_an_early_import_would_be_seen(tmp_path, monkeypatch, line):
    (tmp_path / "live").mkdir()
    path = pathlib.Path("live/x.py")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / path).write_text(line, encoding="utf-8")
    with pytest.raises(AssertionError):
        test_optional_packages_are_imported_late(path)
    lines = line.replace("\n", "\n    ").rstrip()
    for head in ("def f():", "async def f():", "if TYPE_CHECKING:"):
        (tmp_path / path).write_text(f"{head}\n    {lines}\n", encoding="utf-8")
        test_optional_packages_are_imported_late(path)


def test_a_wrong_arrow_would_be_seen(tmp_path, monkeypatch):
    """The reader of imports sees every form of them."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "x.py").write_text(
        "import comfy.samplers\nfrom aiohttp import web\nfrom ..host import space\n"
        "from .. import nodes\nfrom . import ring\ndef f():\n    from ..host.vae import encode\n",
        encoding="utf-8",
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    absolute, relative = imports(pathlib.Path("engine/x.py"))
    assert absolute == {"comfy", "aiohttp"}
    assert relative == {("host",), ("nodes",), ("engine", "ring"), ("host", "vae")}


def circle(paths: list[pathlib.Path]) -> list[str]:
    """Modules that import each other in a circle, first and last the same; [] where none do.

    Every relative import counts: for type checkers and inside functions, too.
    """
    modules = {path.with_suffix("").parts for path in paths}
    graph: dict[str, set[str]] = {}
    for path in paths:
        here = graph.setdefault(path.with_suffix("").as_posix(), set())
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = path.parts[:-1][: len(path.parts) - node.level]
            base += tuple((node.module or "").split(".")) if node.module else ()
            for name in (alias.name for alias in node.names):
                homes = ((*base, name), base, (*base, name, "__init__"), (*base, "__init__"))
                here |= {"/".join(next(home for home in homes if home in modules))}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


SERVE = [p for p in PYTHON if p.parts[0] == "serve"]
BESIDE = {"serve", "tests", "benchmarks"}  # who may know of serve/
DECIDES = {"admission", "scaling", "capacity", "tickets", "arrivals", "simulation", "plan"}


def test_serve_stands_beside_the_pack():
    """The pack never imports Ray or the house, and the house reaches the pack as a page does."""
    for path in PYTHON:
        absolute, relative = imports(path)
        if path.parts[0] not in BESIDE:
            assert not absolute & {"serve", "ray"}, path
            assert not any(target[0] == "serve" for target in relative), path
        elif path.parts[0] == "serve":
            assert not absolute & (ROOMS - {"trust"}), f"{path}: only trust/ and launch/ are shared"
            assert all(target[0] == "serve" for target in relative), path
            if path.stem in DECIDES:
                assert absolute <= set(sys.stdlib_module_names), f"{path} decides, without Ray"


def test_no_module_of_serve_imports_itself_by_others():
    assert len(SERVE) > 30 and circle(SERVE) == []


def test_no_module_imports_itself_by_others():
    """Layers, inside a room as between rooms: what is below can be read without what is above."""
    assert circle([*PACK, pathlib.Path("__init__.py")]) == []


@pytest.mark.parametrize(
    "line",
    [
        "from .ring import Ring\n",
        "from . import ring\n",
        "from . import other, ring as r\n",
        "from ..engine.ring import Ring\n",
        "from .. import live\n",
        "from .parts import part\n",
        "from .parts.part import thing\n",
        "def f():\n    from .ring import Ring\n",
        "if TYPE_CHECKING:\n    from .ring import Ring\n",
    ],
)
def test_a_circle_would_be_seen(tmp_path, monkeypatch, line):
    sources = {
        "engine/__init__.py": "", "engine/plan.py": line, "engine/fold.py": "from . import plan\n",
        "engine/ring.py": "from .fold import fold\n", "engine/other.py": "import torch\n",
        "engine/parts/__init__.py": "", "engine/parts/part.py": "from ..ring import Ring\n",
        "live/__init__.py": "from ..engine.ring import Ring\n",
    }  # fmt: skip
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    paths = [pathlib.Path(name) for name in sources]
    assert {"engine/plan", "engine/fold", "engine/ring"} <= set(circle(paths))
    (tmp_path / "engine" / "plan.py").write_text("from .other import other\n", encoding="utf-8")
    assert circle(paths) == []


def test_the_root_imports_nothing_at_load():
    top = [n for n in tree(pathlib.Path("__init__.py")).body if isinstance(n, ast.ImportFrom)]
    assert top == []


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_nodes_are_defined_in_nodes_only(path):
    """Static readers of the registry need a literal base and a literal id."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ClassDef):
            continue
        bases = [ast.unparse(base) for base in node.bases]
        if not any(base.split(".")[-1] == "ComfyNode" for base in bases):
            continue
        assert path.parts[0] == "nodes", f"{node.name} in {path}"
        assert bases == ["io.ComfyNode"], f"{node.name}: {bases}"
        ids = [
            keyword.value.value
            for call in ast.walk(node)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema"
            for keyword in call.keywords
            if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
        ]
        assert ids == [node.name]


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_python_is_ascii_and_short(path):
    text = (ROOT / path).read_bytes()
    assert text.isascii()
    assert len(text.splitlines()) <= 500


@pytest.mark.parametrize("word", FLAGGED)
def test_published_pack_holds_no_flagged_word(word):
    found = []
    for path in PUBLISHED:
        if path.suffix in (".py", ".js", ".mjs", ".toml", ".json", ".md", ".txt"):
            text = (ROOT / path).read_text(encoding="utf-8")
            found += [str(path)] if re.search(word, text) else []
    assert found == []


def test_published_code_needs_nothing_that_is_left_out():
    """Every relative import of a published file ends at a published file."""
    for path in PUBLISHED:
        if path.suffix != ".py":
            continue
        for target in imports(path)[1]:
            place = pathlib.Path(*target)
            homes = (place.with_suffix(".py"), place / "__init__.py", place.parent / "__init__.py")
            assert any(home in PUBLISHED for home in homes), f"{path} needs {place}"
            left_out = place.with_suffix(".py")
            assert not ((ROOT / left_out).is_file() and ignored(left_out)), f"{path}: {place}"


def test_no_machine_is_named():
    """Nothing of the machines that this is made on."""
    pattern = re.compile(r"(?<![\w.])/(?:" + "wor" + "k|ro" + r"ot|home/\w+)/")
    found = []
    for path in files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path}: {line.strip()[:80]}" for line in text.splitlines()
                  if pattern.search(line)]  # fmt: skip
    assert found == []


def test_every_node_has_a_help_page():
    listed = (ROOT / "nodes" / "extension.py").read_text(encoding="utf-8")
    nodes = set(re.findall(r"^ +(Live\w+),$", listed, re.M))
    assert nodes
    assert {p.stem for p in (ROOT / "web" / "docs").glob("Live*.md")} == nodes


def test_every_workflow_has_its_picture():
    stems = {p.stem for p in (ROOT / "workflows").glob("*.json")}
    assert stems == {p.stem for p in (ROOT / "workflows").glob("*.jpg")}
    assert stems


def test_links_between_pages_lead_somewhere():
    links = []
    for path in files("*.md"):
        text = (ROOT / path).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in target and not target.startswith("#"):
                links.append((str(path), target, (ROOT / path).parent / target.split("#")[0]))
    assert links
    assert [(page, target) for page, target, file in links if not file.exists()] == []
