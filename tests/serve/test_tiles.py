"""Moving tiles are JPEGs that everybody reads."""

import io

import numpy as np
import pytest
from PIL import Image
from serving import served

tiles = served("comfyui.tiles")


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (7, 9), (64, 64), (65, 200), (512, 288)])
def test_each_is_a_picture_of_its_size_and_unlike_the_one_before(size):
    frames = tiles.frames(*size, count=4)
    pictures = []
    for frame in frames:
        with Image.open(io.BytesIO(frame)) as picture:
            picture.load()  # all of it: nothing is cut
            assert picture.size == size and picture.mode == "RGB"
            pictures.append(np.asarray(picture, np.float32))
    for one, other in zip(pictures, pictures[1:] + pictures[:1], strict=True):
        assert np.abs(one - other).mean() > 10
    if min(size) >= 64:
        assert all(picture.std() > 20 for picture in pictures)
