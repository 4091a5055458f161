"""Frames: one resize for everybody, and JPEG that cannot surprise."""

import cv2
import numpy as np
import pytest

from policy_server import images


def picture(h: int = 60, w: int = 80) -> np.ndarray:
    """Smooth colours, each channel different."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    return np.stack([255 * x / w, 255 * y / h, 128 + 0 * x], -1).astype(np.uint8)


def test_fit_squashes_to_the_size_and_keeps_the_mean_colour():
    small = images.fit(picture(), (32, 32))
    assert small.shape == (32, 32, 3) and small.dtype == np.uint8
    np.testing.assert_allclose(small.mean((0, 1)), picture().mean((0, 1)), atol=1.5)


def test_fit_leaves_a_frame_that_fits():
    frame = picture(32, 48)
    assert images.fit(frame, (32, 48)) is frame


def test_jpeg_keeps_colours_in_rgb_order():
    again = images.decode_jpeg(images.encode_jpeg(picture(), 95), (60, 80))
    assert np.abs(again.astype(int) - picture().astype(int)).mean() < 3


def test_jpeg_of_another_size_is_refused():
    with pytest.raises(ValueError, match="60x80"):
        images.decode_jpeg(images.encode_jpeg(picture()), (32, 32))


def test_a_header_that_asks_for_a_huge_picture_is_refused_without_decoding(monkeypatch):
    data = bytearray(images.encode_jpeg(picture()))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="65535x65535"):
        images.decode_jpeg(bytes(data), (60, 80))


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n", bytes(100), b"\xff\xd8" + b"\xff" * 50]
)
def test_what_is_no_jpeg_is_refused(data):
    with pytest.raises(ValueError):
        images.decode_jpeg(data, (60, 80))


def test_a_jpeg_that_makes_a_decoder_work_long_is_refused_without_decoding(monkeypatch):
    """Each empty scan of a progressive file costs a pass over the picture."""
    good = picture()
    progressive = cv2.imencode(".jpg", good, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    once = images.encode_jpeg(good)
    at = once.index(b"\xff\xda")
    header = once[at : at + 2 + int.from_bytes(once[at + 2 : at + 4], "big")]
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="not sequential: encode it as baseline"):
        images.decode_jpeg(progressive, (60, 80))
    with pytest.raises(ValueError, match="more than one scan"):
        images.decode_jpeg(once[:-2] + 1000 * header + once[-2:], (60, 80))


def test_a_truncated_jpeg_is_refused():
    with pytest.raises(ValueError, match="complete"):
        images.decode_jpeg(images.encode_jpeg(picture())[:-10], (60, 80))
