"""Hostile images: each is an image of the validation archive, and is then read as training reads it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from cases import Case, image, run_stages
from PIL import Image
from sample_images import encoded
from tar_cases import tar

from hpc_imagenet.data.images import image_header, jpeg_header
from hpc_imagenet.training.loading.decode import EncodedImage

_JPEG = encoded(size=(64, 48), quality=50)
_PNG = encoded("PNG", size=(64, 48))
_FRAME = _JPEG.find(b"\xff\xc0")


def sized(width: int, height: int) -> bytes:
    """Return a JPEG whose header has another size."""
    new = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return _JPEG[: _FRAME + 5] + new + _JPEG[_FRAME + 9 :]


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """Return a PNG made of its parts."""
    size = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(bitmap: Image.Image, kind: str, **options: object) -> bytes:
    """Return a bitmap in a format."""
    buffer = io.BytesIO()
    bitmap.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_cuts() -> Iterator[tuple[str, bytes]]:
    """Yield the JPEG cut before each of its markers, and inside its scan."""
    for marker, begin, end in jpeg_header.segments(_JPEG):
        yield f"JPEG cut before marker {marker:02X} at byte {begin}", _JPEG[:begin]
        yield f"JPEG cut inside marker {marker:02X} at byte {(begin + end) // 2}", _JPEG[: (begin + end) // 2]
    yield "JPEG cut inside its scan", _JPEG[: len(_JPEG) * 3 // 4]


def png_cuts() -> Iterator[tuple[str, bytes]]:
    """Yield the PNG cut inside each of its chunks."""
    at = 8
    while at < len(_PNG) - 12:
        length, kind = struct.unpack(">I4s", _PNG[at : at + 8])
        yield f"PNG cut inside {kind.decode()}", _PNG[: at + 8 + length // 2]
        at += 12 + length


_GREY16 = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
_ZEROS = zlib.compress(bytes(1 << 20))
_FRAMES = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
_EXIF = b"\xff\xe1" + (0x4000).to_bytes(2, "big") + b"Exif\0\0" + bytes(0x4000 - 8)
_RGB = png(64, 48, zlib.compress(bytes(48 * (1 + 3 * 64))))
_CORRUPT = "b.JPEG cannot be decoded; set process.on_corrupt=skip"

_INPUTS: list[tuple[str, bytes, str]] = [
    ("no byte of an image", b"x", _CORRUPT),
    ("zeros", bytes(5000), _CORRUPT),
    ("HTML page", b"<!DOCTYPE html><html>" + b" " * 999, _CORRUPT),
    ("JPEG header of 65,500 x 65,500 px", sized(65_500, 65_500), _CORRUPT),
    ("JPEG header of 65,535 x 65,535 px", sized(65_535, 65_535), _CORRUPT),
    ("JPEG header of 65,500 x 2,800 px", sized(65_500, 2_800), _CORRUPT),
    ("JPEG header of 0 x 48 px", sized(0, 48), _CORRUPT),
    ("JPEG header of 64 x 0 px", sized(64, 0), _CORRUPT),
    ("JPEG header of 64 x 65,535 px", sized(64, 65_535), "ok: header, "),
    ("PNG header of 2^31 - 1 px", png((1 << 31) - 1, (1 << 31) - 1, b""), _CORRUPT),
    ("PNG header of 20,000 x 20,000 px", png(20_000, 20_000, _ZEROS), _CORRUPT),
    ("PNG header of 2^32 - 1 x 1 px", png((1 << 32) - 1, 1, b""), _CORRUPT),
    ("PNG of 1 MB of zeros for 64 x 48 px", png(64, 48, _ZEROS), "ok: header, 64 x 48 px"),
    (
        "PNG with text of 100 MB",
        png(64, 48, b"", extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "ok: h",
    ),
    (
        "PNG with a profile of 100 MB",
        png(64, 48, b"", extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "ok: h",
    ),
    ("PNG with a wrong checksum", _PNG[:30] + b"\xff\xff" + _PNG[32:], "ok: header, "),
    ("PNG without a chunk of pixels", _PNG[:40] + b"\xff\xff" + _PNG[42:], _CORRUPT),
    (
        "PNG of 48 bits",
        png(64, 48, zlib.compress(bytes(48 * (1 + 6 * 64))), 16),
        "ok: header, 64 x 48 px: read",
    ),
    ("PNG of 1 bit", png(64, 48, zlib.compress(bytes(48 * 9)), 1, 0), "ok: header, 64 x 48 px: read"),
    ("PNG with a palette", saved(_FRAMES[0].quantize(4), "PNG"), "ok: header, 64 x 48 px: read"),
    ("PNG with a palette and transparency", saved(_FRAMES[0].quantize(4), "PNG", transparency=0), "px: read"),
    ("PNG with a palette that is missing", png(64, 48, zlib.compress(bytes(48 * 65)), 8, 3), "ok: header"),
    ("PNG of 16 bits, grey", saved(Image.fromarray(_GREY16), "PNG"), "ok: header, 64 x 48 px: read"),
    ("PNG with an unknown colour type", png(64, 48, b"", 8, 7), "ok: header"),
    (
        "PNG animation",
        saved(_FRAMES[0], "PNG", save_all=True, append_images=_FRAMES[1:]),
        "ok: header, 64 x 48 px: read",
    ),
    ("PNG named JPEG", _PNG, "ok: header, 64 x 48 px: read"),
    ("two PNGs in one file", _PNG + _PNG, "ok: header, 64 x 48 px: read"),
    (
        "GIF animation",
        saved(_FRAMES[0], "GIF", save_all=True, append_images=_FRAMES[1:]),
        "ok: header, 64 x 48 px: read",
    ),
    ("GIF header of 65,535 x 65,535 px", b"GIF89a\xff\xff\xff\xff\0\0\0;", _CORRUPT),
    (
        "BMP header of 2^31 - 1 px",
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
        _CORRUPT,
    ),
    ("PPM header of 10^9 x 10^9 px", b"P6 1000000000 1000000000 255\n", _CORRUPT),
    ("PPM header of 5,000 digits", b"P6 " + b"9" * 5000 + b" 1 255\n", _CORRUPT),
    ("TIFF of 32 bits", saved(Image.new("F", (64, 48)), "TIFF"), _CORRUPT),
    ("TIFF with a directory that repeats", b"II*\0\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0", _CORRUPT),
    (
        "EPS, which would start a program",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n",
        _CORRUPT,
    ),
    (
        "SVG with an entity of a file",
        b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY y SYSTEM 'file:///etc/passwd'>]><svg/>",
        _CORRUPT,
    ),
    ("JPEG in CMYK", encoded("JPEG", "CMYK", (64, 48)), "ok: header, 64 x 48 px: read"),
    ("JPEG in grey", encoded("JPEG", "L", (64, 48)), "ok: header, 64 x 48 px: read"),
    ("JPEG progressive", encoded("JPEG", size=(64, 48), progressive=True), "ok: header, 64 x 48 px: read"),
    ("JPEG of 12 bits", _JPEG[: _FRAME + 4] + b"\x0c" + _JPEG[_FRAME + 5 :], "ok: header"),
    ("JPEG with 5 components", _JPEG[: _FRAME + 9] + b"\x05" + _JPEG[_FRAME + 10 :], "ok: header"),
    ("JPEG with arithmetic coding", _JPEG[: _FRAME + 1] + b"\xc9" + _JPEG[_FRAME + 2 :], "ok: header"),
    ("JPEG with sampling factors of 0", _JPEG[: _FRAME + 11] + b"\x00" + _JPEG[_FRAME + 12 :], "ok: header"),
    ("JPEG with an Exif segment of zeros", _JPEG[:2] + _EXIF + _JPEG[2:], "ok: header, 64 x 48 px: read"),
    ("JPEG with a segment of length 0", _JPEG[:2] + b"\xff\xfe\0\0" + _JPEG[2:], "ok: header, 64 x 48 px"),
    (
        "JPEG with 100,000 fill bytes",
        _JPEG[:2] + b"\xff" * 100_000 + _JPEG[2:],
        "ok: header, 64 x 48 px: read",
    ),
    (
        "JPEG with 1,000 segments",
        _JPEG[:2] + b"\xff\xfe\0\x03x" * 1000 + _JPEG[2:],
        "ok: header, 64 x 48 px: read",
    ),
    ("JPEG with a scan of noise", _JPEG[:-200] + b"\x55" * 198 + _JPEG[-2:], "ok: header, 64 x 48 px"),
    (
        "JPEG without tables",
        _JPEG.replace(b"\xff\xdb", b"\xff\xfe").replace(b"\xff\xc4", b"\xff\xfe"),
        "ok: header",
    ),
    ("JPEG with a web page after it", _JPEG + b"<html>" * 100, "ok: header, 64 x 48 px: read"),
    ("two JPEGs in one file", _JPEG + _JPEG, "ok: header, 64 x 48 px: read"),
    ("RGB with zeros", _RGB, "ok: header, 64 x 48 px: read"),
    ("JPEG without its end marker, which Pillow reads", _JPEG[:-2], "ok: header, 64 x 48 px: read"),
    ("PNG without its last bytes, which Pillow reads", _PNG[:-6], "ok: header, 64 x 48 px: read"),
    *((name, data, _CORRUPT) for name, data in jpeg_cuts()),
    *((name, data, _CORRUPT) for name, data in png_cuts()),
]


def _run(data: bytes) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        run_stages(folder, {"val": tar(("a.JPEG", image(3)), ("b.JPEG", data))})
        info = image_header.inspect(data)
        read = "read"
        try:
            bitmap = EncodedImage(data)
            pixels = bitmap.pixels((0, 0, min(bitmap.width, 32), min(bitmap.height, 32)))
            assert pixels.shape[2] == 3
        except ValueError as error:  # documented; loader.on_corrupt decides about it
            read = f"not read ({error})"
        return f"header, {info.width} x {info.height} px: {read}"

    return run


CASES = [Case("image", name, _run(data), expected) for name, data, expected in _INPUTS]
