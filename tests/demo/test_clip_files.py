"""demo/clip.py without a server: the videos it reads, the videos and sheets it writes."""

import pytest

pytestmark = pytest.mark.comfy


@pytest.fixture
def clip(comfyui):
    from livediffusion.demo import clip

    return clip


@pytest.fixture
def pictures():
    from PIL import Image

    return [Image.new("RGB", (64, 48), (20 * i, 0, 255 - 20 * i)) for i in range(10)]


def test_reads_what_it_wrote(clip, pictures, tmp_path):
    clip.write_video(pictures, 12.0, tmp_path / "a.mp4")
    frames, times = clip.read(tmp_path / "a.mp4", 6, 32)
    assert (len(frames), frames[0].size) == (6, (32, 32))
    assert times == pytest.approx([i / 12 for i in range(7)], abs=1e-3)
    reds = [frame.getpixel((16, 16))[0] for frame in frames]
    assert all(abs(red - 20 * i) < 12 for i, red in enumerate(reds)), reds


def test_reads_animations(clip, pictures, tmp_path):
    for name in ("a.webp", "a.gif"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=50)
        frames, times = clip.read(tmp_path / name, 100, 32)
        assert len(frames) == 10
        assert times == pytest.approx([i / 20 for i in range(11)], abs=1e-3)


def test_crops_the_middle(clip):
    from PIL import Image

    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    assert set(clip.square(wide, 30).getdata()) == {(0, 0, 255)}


def test_takes_one_of_comfyuis_own_previews(clip):
    from livediffusion.demo import client

    path = client.bundled_clip()
    read = clip.read(path, 24, 32)
    frames = read.frames
    assert len(frames) == 24
    assert 5 <= read.rate <= 60
    # it moves
    assert frames[0].tobytes() != frames[-1].tobytes()


def test_the_sheet_has_input_above_output(clip, pictures, tmp_path):
    from PIL import Image

    after = [Image.new("RGB", (64, 48), "green")] * 10
    clip.contact_sheet(pictures, after, tmp_path / "sheet.png", columns=5)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (5 * 64, 16 + 2 * 48)
        for column in range(5):
            at = (column * 64 + 30, 16 + 24)
            assert sheet.getpixel(at) == pictures[2 * column].getpixel((0, 0))
            assert sheet.getpixel((at[0], at[1] + 48)) == (0, 128, 0)
