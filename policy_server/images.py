"""Frames on their way to the policy: the one resize everybody uses, and JPEG. RGB, uint8, [h, w, 3]."""

import cv2
import numpy as np

from config.embodiment import Crop

_SOS = 0xDA  # start of scan


def cut(rgb: np.ndarray, crop: Crop | None) -> np.ndarray:
    """The part `crop` of pictures [..., h, w, 3], as a view; all of them without one.

    Readers of recordings and the robot's side both cut here, before anything else happens to a picture.
    """
    if crop is None:
        return rgb
    rows, columns = crop.of(*rgb.shape[-3:-1])
    return rgb[..., rows, columns, :]


def fit(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize [h0, w0, 3] to `size` (h, w), area-averaged.

    ViPRA scales the longest side to the model's size and then squashes the other; both together are this one
    resize. A frame that fits already is returned as it is.
    """
    if rgb.shape[:2] == tuple(size):
        return rgb
    return cv2.resize(rgb, (size[1], size[0]), interpolation=cv2.INTER_AREA)


def encode_jpeg(rgb: np.ndarray, quality: int = 90) -> bytes:
    """JPEG of [h, w, 3]; `quality` 1 to 100. Raises ValueError if it cannot be encoded."""
    good, data = cv2.imencode(
        ".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    if not good:
        raise ValueError(f"an image of shape {rgb.shape} and dtype {rgb.dtype} cannot be encoded as JPEG")
    return data.tobytes()


def decode_jpeg(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """[h, w, 3] of a JPEG that must have `size` (h, w).

    Raises ValueError. The size is read from the header first, so a small file cannot ask for a huge picture.
    """
    found = _jpeg_size(data)
    if found != tuple(size):
        raise ValueError(f"JPEG of {found[0]}x{found[1]} px, expected {size[0]}x{size[1]}")
    # a camera's orientation tag must not turn the picture under the policy
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if bgr is None or bgr.shape != (*size, 3):
        raise ValueError("JPEG cannot be decoded")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(h, w) from the frame header (ITU-T T.81 B.2.2). Raises ValueError where there is none.

    Sequential and in one scan, as cameras and encoders write them: each scan of a progressive file may make a
    decoder go through the whole picture, and a few bytes make one.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        raise ValueError("not a complete JPEG")
    at, size = 2, None
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SOS:
            if size is None or data.find(bytes((0xFF, _SOS)), at + 2) >= 0:
                break
            return size
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF0..15 without DHT, JPG, DAC
            if marker > 0xC1:
                raise ValueError("JPEG is not sequential: encode it as baseline")
            size = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + max(length, 2)
    raise ValueError("JPEG without a frame header, or with more than one scan")
