"""Debian's Chromium, with a camera that plays a file, as tests drive it."""

import contextlib
import os
import shutil

import pytest

CHROMIUM = os.environ.get("LIVEDIFFUSION_CHROMIUM") or shutil.which("chromium")


@contextlib.contextmanager
def driving():
    """Playwright; skips the test where it or Chromium is not there."""
    pytest.importorskip("playwright", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (LIVEDIFFUSION_CHROMIUM)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        yield running


def browsers():
    """The processes of all browsers that there are, one for each."""
    import psutil

    drivers = psutil.Process().children()
    return {p for driver in drivers for p in driver.children() if "chrom" in p.name().lower()}


def launch(playwright, camera_file=None):
    """Chromium with a camera that plays a file, or with one that has several modes; its process."""
    before = browsers()
    film = [f"--use-file-for-fake-video-capture={camera_file}"] if camera_file else []
    running = playwright.chromium.launch(
        executable_path=CHROMIUM,
        args=["--no-sandbox", "--disable-gpu", "--use-fake-ui-for-media-stream",
              "--use-fake-device-for-media-stream", *film],
    )  # fmt: skip
    (process,) = browsers() - before
    return running, process
