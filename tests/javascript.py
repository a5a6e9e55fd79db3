"""The pages' modules in Node.js, which needs no browser and waits for no clock."""

import json
import pathlib
import shutil
import subprocess

import pytest

_HERE = pathlib.Path(__file__).resolve()
ROOT = _HERE.parents[1]


def told(*parts: str):
    """What a script hands to `tell`.

    Args:
        parts: of the script, a module; it has javascript.mjs as `browser`, and
            load("web/live/x.mjs").
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js to run the pages' modules")
    start = f"""
      const browser = await import({json.dumps(_HERE.with_suffix(".mjs").as_uri())})
      const load = (path) => import(new URL(path, {json.dumps(ROOT.as_uri() + "/")}))
      const tell = (value) => console.log(JSON.stringify(value))
    """
    call = [node, "--input-type=module", "-e", "\n".join((start, *parts))]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
