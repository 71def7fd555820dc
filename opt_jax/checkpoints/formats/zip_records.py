"""Finds the records of a zip file as torch.save writes it: uncompressed, and without overlaps.

Python's zipfile accepts nearly any file, and trusts the central directory. Here the central directory and a record's
own header must agree, so that no record can pass for another one or overlap it.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16.
"""

import mmap
import struct
from typing import NamedTuple

_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s4xHH4xIIIHHHH6xI")
_LOCAL = struct.Struct("<4s2xHH8xIIHH")
# Flags. With the latter, the local header may have sizes of 0, and a descriptor after the data has them.
_ENCRYPTED, _SIZES_FOLLOW = 1, 8


class Record(NamedTuple):
    """The place of a record's bytes in the file, and their CRC-32 (torch may write 0)."""

    start: int
    length: int
    crc: int


class _Entry(NamedTuple):
    """A record's entry in the central directory."""

    name: bytes
    offset: int
    size: int
    flags: int
    crc: int


def find_records(mapped: mmap.mmap) -> dict[str, Record]:
    """Name -> record.

    Raises:
      ValueError: the file is not one complete zip file, or has records that torch.save does not write.
    """
    position, count, end = _find_directory(mapped)
    records, spans, limit = {}, [], position
    for _ in range(count):
        entry, position = _read_entry(mapped, position, end)
        name = entry.name.decode("utf-8", "backslashreplace")
        if name in records:
            raise ValueError(f"record {name} is there twice")
        start = _start(mapped, entry, name)
        records[name] = Record(start, entry.size, entry.crc)
        spans.append((entry.offset, start + entry.size, name))
    if position != end:
        raise ValueError("the zip directory is damaged")
    position = 0
    for start, stop, name in sorted(spans):
        if start < position or stop > limit:
            raise ValueError(f"record {name} overlaps another")
        position = stop
    return records


def _find_directory(mapped: mmap.mmap) -> tuple[int, int, int]:
    """(start of the central directory, number of its entries, its end)."""
    at = len(mapped) - _END.size
    if at < 0 or mapped[at : at + 4] != b"PK\5\6":
        raise ValueError("it does not end as a zip file does")
    _, *disks, count_here, count, size, offset, comment = _END.unpack_from(mapped, at)
    locator = at - _LOCATOR64.size
    if locator >= 0 and mapped[locator : locator + 4] == b"PK\6\7":
        _, disk, at, _ = _LOCATOR64.unpack_from(mapped, locator)
        if disk or at != locator - _END64.size or mapped[at : at + 4] != b"PK\6\6":
            raise ValueError("the zip directory is damaged")
        _, _, _, _, *disks, count_here, count, size, offset = _END64.unpack_from(mapped, at)
    if any(disks) or comment or count_here != count or offset + size != at:
        raise ValueError("the zip directory is damaged")
    return offset, count, at


def _read_entry(mapped: mmap.mmap, at: int, end: int) -> tuple[_Entry, int]:
    """The entry of the central directory at `at`, and where the next one starts."""
    if at + _ENTRY.size > end or mapped[at : at + 4] != b"PK\1\2":
        raise ValueError("the zip directory is damaged")
    _, flags, method, crc, packed, size, *lengths, disk, offset = _ENTRY.unpack_from(mapped, at)
    name_length, extra_length, comment_length = lengths
    name_end = at + _ENTRY.size + name_length
    extra_end = name_end + extra_length
    if extra_end + comment_length > end:
        raise ValueError("the zip directory is damaged")
    name = mapped[at + _ENTRY.size : name_end]
    large = [n for n in (size, packed, offset) if n == 0xFFFFFFFF]
    if large:  # the numbers that do not fit are in an extra field, in this order
        numbers = iter(_zip64_numbers(mapped[name_end:extra_end], len(large)))
        size, packed, offset = (next(numbers) if n == 0xFFFFFFFF else n for n in (size, packed, offset))
    if method or flags & _ENCRYPTED or packed != size or disk:
        shown = name.decode("utf-8", "backslashreplace")
        raise ValueError(f"record {shown} is compressed, encrypted or in another file, which torch.save never does")
    return _Entry(name, offset, size, flags, crc), extra_end + comment_length


def _zip64_numbers(extra: bytes, count: int) -> tuple[int, ...]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and length >= 8 * count and at + 4 + length <= len(extra):
            return struct.unpack_from(f"<{count}Q", extra, at + 4)
        at += 4 + length
    raise ValueError("the zip directory is damaged")


def _start(mapped: mmap.mmap, entry: _Entry, name: str) -> int:
    """Where a record's data start: after its local header, whose padding the central directory does not contain."""
    at = entry.offset
    if at + _LOCAL.size > len(mapped) or mapped[at : at + 4] != b"PK\3\4":
        raise ValueError(f"record {name} has a damaged header")
    _, flags, method, packed, size, name_length, extra_length = _LOCAL.unpack_from(mapped, at)
    known = packed == size in (entry.size, 0xFFFFFFFF, 0 if flags & _SIZES_FOLLOW else entry.size)
    if not known or flags != entry.flags or method:
        raise ValueError(f"record {name} has a header that contradicts the zip directory")
    if mapped[at + _LOCAL.size : at + _LOCAL.size + name_length] != entry.name:
        raise ValueError(f"record {name} has another name in its own header")
    start = at + _LOCAL.size + name_length + extra_length
    if start + entry.size > len(mapped):
        raise ValueError(f"record {name} is truncated")
    return start
