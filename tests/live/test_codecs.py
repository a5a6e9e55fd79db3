"""What is decoded, and that nothing waits for it."""

import io
import subprocess
import sys
import time

import numpy as np
import pytest
from livediffusion.live.codecs import JPEG, MOST_SCANS, bare
from livediffusion.live.wire import NotTaken
from livediffusion.live.workers import Workers
from PIL import Image, ImageCms

PICTURE = Image.merge("RGB", [Image.radial_gradient("L").resize((70, 50)).rotate(a)
                              for a in (0, 90, 180)])  # fmt: skip


def coded(mode="RGB", **how):
    out = io.BytesIO()
    PICTURE.convert(mode).save(out, "JPEG", **how)
    return out.getvalue()


def exif():
    tags = Image.Exif()
    tags[0x0112] = 1
    tags[0x010E] = "x" * 30_000
    return tags


@pytest.mark.parametrize("data", [
    coded(), coded(quality=30, subsampling=2), coded(progressive=True), coded("L"), coded("CMYK"),
    coded(exif=exif()), coded(comment=b"x" * 1000), coded(optimize=True, restart_marker_blocks=1),
    coded(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    coded() + b"trailing",
], ids=len)  # fmt: skip
def test_the_picture_stays_and_the_rest_goes(data):
    with Image.open(io.BytesIO(data)) as picture:
        assert np.array_equal(JPEG.decode(data), np.asarray(picture.convert("RGB")))
    assert b"x" * 100 not in bare(data) and b"ICC_PROFILE" not in bare(data)


def test_scans_are_counted():
    data = coded(progressive=True)
    last, end = data[data.rindex(b"\xff\xda") : -2], data[-2:]
    scans = data.count(b"\xff\xda")
    most = data[:-2] + last * (MOST_SCANS - scans) + end
    assert JPEG.decode(most).shape == (50, 70, 3)
    with pytest.raises(NotTaken, match=f"{MOST_SCANS + 1} scans are more than {MOST_SCANS}"):
        JPEG.decode(most[:-2] + last + end)


def test_workers_work_and_end():
    pool = Workers(3, "test")
    done = [pool.submit(pow, 2, i) for i in range(100)]
    assert [future.result(10) for future in done] == [2**i for i in range(100)]
    assert isinstance(pool.submit(int, "x").exception(10), ValueError)
    assert 1 <= len(pool._threads) <= 3
    slow = [pool.submit(time.sleep, 0.2) for _ in range(3)]
    waiting = pool.submit(pow, 2, 3)
    pool.shutdown(cancel_futures=True)
    assert all(future.done() for future in slow) and waiting.cancelled()
    assert not any(thread.is_alive() for thread in pool._threads)
    with pytest.raises(RuntimeError):
        pool.submit(pow, 1, 1)


def test_a_process_ends_while_its_workers_are_busy():
    script = (
        "import runpy, sys, time\nworkers = runpy.run_path(sys.argv[1])\n"
        "pool = workers['Workers'](3, 'test')\n"
        "[pool.submit(time.sleep, float(sys.argv[2])) for _ in range(6)]\ntime.sleep(0.1)\n"
    )
    took = []
    for seconds in ("0", "600"):
        began = time.monotonic()
        file = sys.modules[Workers.__module__].__file__
        subprocess.run([sys.executable, "-c", script, file, seconds], check=True, timeout=300)
        took.append(time.monotonic() - began)
    # the grace that work in hand is given, beside a few times what the start took
    assert took[1] < 5 * took[0] + 3
