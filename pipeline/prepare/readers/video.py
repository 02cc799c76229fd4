"""Frames of a video at given times, as JPEG. Needs the extra `robotics` (PyAV)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np

from pipeline.config import extras
from pipeline.io import storage
from pipeline.prepare.engine.episodes import UnusableError
from pipeline.prepare.readers.picture_check import encode_jpeg, shrunk_size


def import_pyav() -> Any:
    """Return PyAV. Raises ValueError naming the extra if it is not installed."""
    try:
        import av
    except ImportError:
        raise ValueError(
            f"videos are decoded with PyAV, which is not installed: {extras.install('robotics')}"
        ) from None
    return av


def frames_at(
    uri: str,
    times: np.ndarray,
    tolerance: float,
    resize: int | None = None,
    quality: int | None = None,
) -> list[bytes]:
    """Return the frame nearest to each time, encoded as JPEG.

    The video is decoded once, from the key frame before the first time; only encoded frames are
    held.

    Args:
        uri: the video.
        times: (n,) seconds, ascending.
        tolerance: largest distance of a frame from its time, in seconds.
        resize: shorter side in pixels, only downwards.
        quality: of JPEG.

    Raises:
        UnusableError: the video cannot be decoded, or has no frame near one of the times.
        StorageError: it cannot be read.
    """
    av = import_pyav()
    name = uri.rpartition("/")[2]
    out: list[bytes] = []
    try:
        with closing(_decoded(av, uri, float(times[0]) - tolerance)) as decoded:
            held = next(decoded, None)
            following = next(decoded, None)
            encoded = b""
            for time in times.tolist():
                while held and following and abs(following[0] - time) < abs(held[0] - time):
                    held, following, encoded = following, next(decoded, None), b""
                if not held or abs(held[0] - time) > tolerance:
                    found = f"the nearest is at {held[0]:.3f} s" if held else "it has none"
                    raise UnusableError(
                        f"{name}: no frame within {tolerance:.3g} s of {time:.3f} s; {found}"
                    )
                encoded = encoded or _jpeg(held[1], resize, quality)
                out.append(encoded)
    except (av.FFmpegError, IndexError) as error:
        raise UnusableError(f"{name}: cannot be decoded ({error})") from None
    return out


def _decoded(
    av: Any,
    uri: str,
    start: float,
) -> Generator[tuple[float, Any], None, None]:
    """Yield (seconds, frame) in order, from the last key frame before `start`."""
    with storage.open_read(uri) as handle, av.open(handle) as container:
        stream = container.streams.video[0]
        if start > 0:
            container.seek(
                int(start / stream.time_base), stream=stream, backward=True, any_frame=False
            )
        for frame in container.decode(stream):
            if frame.pts is not None:
                yield float(frame.pts * stream.time_base), frame


def _jpeg(frame: Any, resize: int | None, quality: int | None) -> bytes:
    image = frame.to_image()
    size = shrunk_size(image.size, resize)
    image = image.resize(size, reducing_gap=3.0) if size != image.size else image
    return encode_jpeg(image, quality)
