"""Read Zstandard files, and tell one that was cut off, which other readers take for one that ends
there."""

from __future__ import annotations

from pathlib import Path

_SKIPPABLE = range(0x184D2A50, 0x184D2A60)  # first numbers of frames that hold no content
_LONGEST_HEADER = 18
_REPEATED = 1  # kind of a block that holds one byte, and how often it comes
_CHECKSUM = 4


def read_frames(path: str | Path, most: int) -> bytes:
    """Return the content of a file, this many bytes at most.

    Raises:
        ValueError: it is no Zstandard file, or its end is missing.
    """
    import zstandard

    try:
        if is_cut_off(path):
            raise ValueError("not compressed as its name says: its end is missing")
        with open(path, "rb") as file:
            decompressor = zstandard.ZstdDecompressor()
            return decompressor.stream_reader(file, read_across_frames=True).read(most)
    except zstandard.ZstdError as error:
        raise ValueError(f"not compressed as its name says: {error}") from None


def is_cut_off(path: str | Path) -> bool:
    """Return whether a file ends within a frame, by the lengths in front of its blocks; a few bytes
    of each block (128 KiB of text) are read.

    Raises:
        zstandard.ZstdError: it is no Zstandard file.
    """
    import zstandard

    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        place = 0
        while place < size:
            file.seek(place)
            head = file.read(_LONGEST_HEADER)
            if int.from_bytes(head[:4], "little") in _SKIPPABLE:
                place += 8 + int.from_bytes(head[4:8], "little")
                continue
            has_checksum = zstandard.get_frame_parameters(head).has_checksum
            place += zstandard.frame_header_size(head)

            # Three bytes in front of each block: 21 bits of length, 2 of its kind, 1 for the last.
            is_last = False
            while not is_last:
                file.seek(place)
                header = file.read(3)
                if len(header) < 3:
                    return True
                number = int.from_bytes(header, "little")
                is_last, kind, length = bool(number & 1), number >> 1 & 3, number >> 3
                place += 3 + (1 if kind == _REPEATED else length)
            place += _CHECKSUM * has_checksum
    return place > size
