"""The pages' modules in Node.js, which needs no browser and waits for no clock."""

import json
import pathlib
import shutil
import subprocess

import pytest

_HERE = pathlib.Path(__file__).resolve()
ROOT = _HERE.parents[1]

# a camera of the page, and the devices that it is of
CAMERA = """
  const { Camera } = await load('web/live/camera.mjs')
  browser.page()
  browser.put('isSecureContext', true)
  const devices = (navigator.mediaDevices = new browser.Devices())
  const camera = new Camera((key) => key)
"""


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
