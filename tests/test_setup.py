"""run.py's environment and the GPU: which PyTorch it is for, and what is said where it is not."""

import os
import pathlib
import re
import stat
import sys

import pytest
from serving import launch

SETUP, SERVER = launch("setup"), launch("server")
POSIX = pytest.mark.skipif(os.name == "nt", reason="stands in with scripts")
NVIDIA, AMD = "GPU 0: NVIDIA H200 (UUID: GPU-1)", "  Device Type:             GPU"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Says for which environment an index is taken."""
    monkeypatch.setattr(SETUP, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(SETUP.venv, "create", lambda home, with_pip: home.mkdir(parents=True))
    monkeypatch.setattr(SETUP, "watched", lambda *_, **__: None)
    (tmp_path / "requirements.txt").write_text("torch\n", encoding="utf-8")

    def home(**env):
        for name in SETUP.INDEXES:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return SETUP.environment(tmp_path, test=False)

    return home


def test_the_pytorch_of_another_index_is_another_environment(home):
    plain = home()
    assert home(PIP_INDEX_URL="", PIP_EXTRA_INDEX_URL=" ") == plain
    others = [
        home(**{name: f"https://{place}.example/"})
        for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL") for place in ("one", "two")
    ]  # fmt: skip
    assert len({plain, *others}) == 5
    assert home(PIP_INDEX_URL="https://one.example/") == others[0]
    assert home() == plain


@pytest.fixture
def computer(tmp_path, monkeypatch):
    """One with these tools of drivers, and a PyTorch that sees a GPU or does not."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in SERVER.HIDING:
        monkeypatch.delenv(name, raising=False)

    def script(place, text):
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")
        place.chmod(place.stat().st_mode | stat.S_IXUSR)
        return place

    def computer(sees, **tools):
        for name, said in tools.items():
            script(tmp_path / "bin" / name.replace("_", "-"), f"#!/bin/sh\necho '{said}'\n")
        return script(tmp_path / "python", f"#!/bin/sh\necho 2.14.1+cpu\nexit {int(not sees)}\n")

    return computer


@POSIX
@pytest.mark.parametrize("maker,tools", [
    ("NVIDIA", {"nvidia_smi": NVIDIA}), ("AMD", {"rocminfo": AMD}),
    ("AMD", {"nvidia_smi": "No devices were found", "rocminfo": AMD}),
])  # fmt: skip
def test_a_gpu_that_pytorch_does_not_see_is_said_with_what_to_set(computer, capsys, maker, tools):
    assert SERVER.has_gpu(computer(False, **tools)) is False
    said = " ".join(capsys.readouterr().out.split())
    assert f"has an {maker} GPU, but PyTorch 2.14.1+cpu" in said and "the CPU is used" in said
    assert "Set PIP_EXTRA_INDEX_URL" in said and "pytorch.org/get-started" in said


@POSIX
def test_nothing_is_said_where_there_is_none_or_it_is_used_or_hidden(computer, capsys, monkeypatch):
    assert SERVER.has_gpu(computer(False)) is False
    none = {"nvidia_smi": "NVIDIA-SMI has failed", "rocminfo": "  Device Type:     CPU"}
    assert SERVER.has_gpu(computer(False, **none)) is False
    assert SERVER.has_gpu(computer(True, nvidia_smi=NVIDIA)) is True
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert SERVER.has_gpu(computer(False, nvidia_smi=NVIDIA)) is False
    assert capsys.readouterr().out == ""


def test_the_probe_is_python_that_runs(tmp_path, monkeypatch):
    """With what stands for PyTorch, as the environment's own Python asks it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, types\n__version__ = '1'\nbackends = types.SimpleNamespace()\n"
        "cuda = types.SimpleNamespace(is_available=lambda: bool(os.environ.get('SEES')))\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(SERVER, "TOOLS", {})
    for sees in ("", "1"):
        monkeypatch.setenv("SEES", sees)
        assert SERVER.has_gpu(pathlib.Path(sys.executable)) is bool(sees)


def test_the_readme_says_it_and_no_index_is_ours():
    root = pathlib.Path(__file__).resolve().parents[1]
    assert "PIP_EXTRA_INDEX_URL" in (root / "README.md").read_text(encoding="utf-8")
    for path in (root / "README.md", root / "run.py", *(root / "launch").glob("*.py")):
        assert not re.search(r"download\.pytorch|/whl/", path.read_text(encoding="utf-8"))
