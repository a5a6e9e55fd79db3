"""What ComfyUI 0.38 and later have no more, or have in another form: nothing here builds on it.

Read in its source: torchaudio has left requirements.txt, and PromptServer is made with an asset
manager besides its loop. tests/compiled/test_compiler.py has its compiler of allocations.
"""

import ast
import pathlib
import re
import subprocess

import pytest
from serving import launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
GONE = {"torchaudio", "PromptServer"}


def built_on(source: str) -> set[str]:
    """torchaudio, where it is imported; PromptServer, where one is made."""
    found = set()
    if not GONE & set(re.findall(r"\w+", source)):
        return found
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func).split(".")[-1])
    return found & GONE


def test_nothing_is_built_on_what_is_gone():
    assert len(FILES) > 100
    found = {name: built_on((ROOT / name).read_text(encoding="utf-8")) for name in FILES}
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    "line", ["import torchaudio", "from torchaudio.io import x", "server.PromptServer(loop)",
             "def f():\n    import torchaudio.functional", "PromptServer(loop, assets)"],
)  # fmt: skip
def test_it_would_be_seen(line):
    assert built_on(line)


@pytest.mark.parametrize(
    ("requirements", "wanted"),
    [
        ("torch\ntorchsde\ntorchvision\ntorchaudio\nnumpy>=1.25.0\n", True),
        ("torch\ntorchaudio>=2.0 # sound\n", True),
        ("torch\ntorchsde\ntorchvision\nnumpy>=1.25.0\n", False),
        ("torch\n# torchaudio\n", False),
    ],
)
def test_torchaudio_is_installed_for_a_comfyui_that_asks_for_it(requirements, wanted):
    needs = launch("setup").beside(requirements)
    assert any(need.startswith("torchaudio==") for need in needs) is wanted
    assert [n.split("==")[0] for n in needs if "audio" not in n] == [
        "torch", "torchvision", "requests"]  # fmt: skip
