"""How much sound a file has by its header: libsndfile reads a file that was cut off without an
error.

A file is anything that can seek and read; I/O errors are raised unchanged. Headers that make no
sense are left to libsndfile, which refuses them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

STREAMED = 0x7FFF0000
"""Sizes of a RIFF chunk from here on mean that the writer, into a pipe, did not know it
(0xFFFFFFFF; sox: 0x7FFFF000).
"""
CHUNKS = 4096
"""Most chunks before the samples; a damaged file of zeros would have millions."""
MP3_KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""kbit/s and samples a second of layer III by the version's two bits: MPEG 1, 2 and 2.5 (ISO/IEC
11172-3, section 2.4.2.3; 13818-3).
"""
MP3_BLOCK = 1 << 20
"""Bytes that are read at a time to step from frame to frame."""


def length_ratio(file: Any) -> float:
    """Return the length by the header, divided by the length of the sound in the file; at least 1.

    For WAV, AIFF, W64, CAF, AU and uncompressed NIST SPHERE. Infinite for an OGG file without its
    end; 1 where the header does not say.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(40)
    find = {
        b"RIFF": _riff,
        b"RF64": _riff,
        b"FORM": _in_chunks,
        b"riff": _in_chunks,
        b"caff": _in_chunks,
        b".snd": _au,
        b"dns.": _au,
        b"NIST": _sphere,
    }.get(start[:4])
    if find is not None:
        size_in_header, at = find(file, size, start)
        return max(1.0, size_in_header / max(1, size - at))
    return float("inf") if start[:4] == b"OggS" and not _ends_whole(file, size) else 1.0


def _chunks(
    file: Any, size: int, at: int, form: str, name: int = 4, even: int = 1
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (first four bytes of its name, start of its content, header as a number) of each
    chunk.
    """
    head = name + struct.calcsize(form)
    for _ in range(CHUNKS):
        if at + head > size:
            return
        file.seek(at)
        data = file.read(head)
        length = struct.unpack(form, data[name:])[0]
        yield data[:4], at + head, length
        length -= head if name == 16 else 0  # W64 counts the chunk's header
        if length < 0:
            return
        at += head + -(-length // even) * even


def _riff(file: Any, size: int, start: bytes) -> tuple[int, int]:
    """Return (bytes of samples, where they start) by the header; (0, 0) where it does not say.

    The functions below return the same.
    """
    wide = 0
    for name, at, length in _chunks(file, size, 12, "<I", even=2):
        if name == b"ds64":  # EBU Tech 3306: RF64's sizes of 64 bits
            file.seek(at)
            wide = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))[1]
        elif name == b"data":
            return wide or (length if length < STREAMED else 0), at
    return 0, 0


def _in_chunks(file: Any, size: int, start: bytes) -> tuple[int, int]:
    """Read AIFF, W64 or CAF (Apple, "Core Audio Format Specification"; length -1: unknown)."""
    is_aiff, is_w64 = start[:4] == b"FORM", start[:4] == b"riff"
    if is_aiff:
        chunks = _chunks(file, size, 12, ">I", even=2)
    elif is_w64:
        chunks = _chunks(file, size, 40, "<Q", 16, 8)
    else:
        chunks = _chunks(file, size, 8, ">q")
    for name, at, length in chunks:
        if name == (b"SSND" if is_aiff else b"data"):
            unknown = is_aiff and length >= STREAMED
            return 0 if unknown else length - (24 if is_w64 else 0), at
    return 0, 0


def _au(file: Any, size: int, start: bytes) -> tuple[int, int]:
    if len(start) < 12:
        return 0, 0
    at, size_in_header = struct.unpack(">II" if start[:1] == b"." else "<II", start[4:12])
    return (0, 0) if size_in_header == 0xFFFFFFFF or at > size else (size_in_header, at)


def _sphere(file: Any, size: int, start: bytes) -> tuple[int, int]:
    try:
        at = int(start[8:16])
        file.seek(0)
        fields = dict(
            (words[0], words[2])
            for line in file.read(min(max(at, 0), 1 << 16)).split(b"\n")
            if len(words := line.split(None, 2)) == 3
        )
        if b"shorten" in fields.get(b"sample_coding", b""):
            return 0, 0
        size_in_header = (
            int(fields[b"sample_count"])
            * int(fields.get(b"channel_count", 1))
            * int(fields[b"sample_n_bytes"])
        )
        return (size_in_header, at) if 0 < at <= size else (0, 0)
    except (ValueError, KeyError):
        return 0, 0


# ---------------------------------------------------------------- OGG


def is_joined(file: Any) -> bool:
    """Tell whether an OGG file ends with other streams than it begins with.

    Such chained files (RFC 3533, section 4) hold several recordings, of which libsndfile reads the
    first.
    """
    file.seek(0)
    start, at, serials = file.read(1 << 12), 0, set()
    # the first pages of multiplexed streams come before all other pages
    while start[at : at + 4] == b"OggS" and len(start) >= at + 27 and start[at + 5] & 2:
        serials.add(start[at + 14 : at + 18])
        num_segments = start[at + 26]
        segment_bytes = start[at + 27 : at + 27 + num_segments]
        at += 27 + num_segments + sum(segment_bytes)
    last = _last_page(file, file.seek(0, io.SEEK_END)) if serials else b""
    return len(last) >= 18 and last[14:18] not in serials


def _ends_whole(file: Any, size: int) -> bool:
    """Tell whether the last page of an OGG file is complete and marked as last (RFC 3533, section
    6).
    """
    page = _last_page(file, size)
    return (
        len(page) >= 27
        and len(page) >= 27 + page[26]
        and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
        and bool(page[5] & 4)
    )


def _last_page(file: Any, size: int) -> bytes:
    """Return an OGG file from its last page on; empty where there is none in its last 64 KiB.

    No page is longer.
    """
    file.seek(max(0, size - (1 << 16) - 512))
    tail = file.read()
    at = tail.rfind(b"OggS")
    return tail[at:] if at >= 0 else b""


# ---------------------------------------------------------------- MP3


def has_unknown_length(file: Any) -> bool:
    """Tell whether an MP3 has several bit rates and no table of its frames (Xing, Info, VBRI).

    Its length is then guessed from the bit rate of its first frame. Reads frame headers until two
    differ: 0.05 s for an hour of a constant rate.
    """
    at, kbits, known = _after_id3(file), 0, {}
    file.seek(at)
    if not _frame(file.read(3))[0]:
        return False
    block, base = b"", at
    while True:
        if at + 4 > base + len(block):
            file.seek(at)
            base, block = at, file.read(MP3_BLOCK)
        head = block[at - base : at - base + 3]
        if head not in known:
            known[head] = _frame(head)
        length, now = known[head]
        if not length or (kbits and now != kbits):
            return bool(length)
        if not kbits and _has_table(block[at - base : at - base + length]):
            return False
        at, kbits = at + length, now


def _after_id3(file: Any) -> int:
    at = 0
    while True:
        file.seek(at)
        head = file.read(10)
        if head[:3] != b"ID3" or len(head) < 10:
            return at
        at += (
            10
            + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
            + (10 if head[5] & 16 else 0)
        )


def _frame(head: bytes) -> tuple[int, int]:
    """Return (bytes, kbit/s) of the layer III frame that starts with three bytes.

    (0, 0) for none, and for one of a free bit rate.
    """
    bits = int.from_bytes(head, "big")
    version, kbits, rate = bits >> 11 & 3, bits >> 4 & 15, bits >> 2 & 3
    if (
        len(head) < 3
        or bits >> 13 != 0x7FF
        or bits >> 9 & 3 != 1
        or version == 1
        or kbits in (0, 15)
        or rate == 3
    ):
        return 0, 0
    kbits_listed = MP3_KBITS[3 if version == 3 else 2][kbits]
    return (144 if version == 3 else 72) * kbits_listed * 1000 // MP3_RATES[version][rate] + (
        bits >> 1 & 1
    ), kbits_listed


def _has_table(frame: bytes) -> bool:
    """Tell whether the first frame holds the number of frames."""
    at = max(frame[:64].find(b"Xing"), frame[:64].find(b"Info"))
    if frame[36:40] == b"VBRI":
        return True
    has_flags = at >= 0 and len(frame) >= at + 8
    return has_flags and bool(frame[at + 7] & 1)
