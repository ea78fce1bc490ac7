"""Bytes of a file, local or remote, decompressed and bounded in memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
import zstandard

BLOCK_BYTES = 1 << 20
# A compressed block can expand a thousandfold, and zstd's decompressor gives all of it at once.
ZSTD_BLOCK_BYTES = 1 << 16


class DamagedFileError(Exception):
    """The contents of a file are not what its name says, or end too early."""


def read_blocks(path: str) -> Iterator[bytes]:
    """The bytes of a file in blocks; .gz and .zst are decompressed, with all their members or frames.

    Raises:
        DamagedFileError: the compressed data is damaged or cut off; all that stands before is yielded.
    """
    with fsspec.open(path, "rb") as file:
        if path.lower().endswith(".gz"):
            yield from _gzip_blocks(file)  # pyright: ignore[reportArgumentType]
        elif path.lower().endswith(".zst"):
            yield from _zstd_blocks(file)  # pyright: ignore[reportArgumentType]
        else:
            yield from iter(lambda: file.read(BLOCK_BYTES), b"")  # pyright: ignore[reportAttributeAccessIssue]


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file, without their line ends; a byte order mark is left out.

    Raises:
        DamagedFileError: as `read_blocks`; a line that is cut off is not yielded.
    """
    pending: list[bytes] = []
    is_first = True
    for block in read_blocks(path):
        if is_first:
            block, is_first = block.removeprefix(b"\xef\xbb\xbf"), False
        head, *lines = block.split(b"\n")
        pending.append(head)
        for line in lines:
            yield b"".join(pending)
            pending = [line]
    last = b"".join(pending)
    if last:
        yield last


def _gzip_blocks(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as stream:
        while True:
            try:
                block = stream.read1(BLOCK_BYTES)  # unlike read, gives what stands before the damage
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DamagedFileError(f"damaged gzip data ({error})") from error
            if not block:
                return
            yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: zstandard's own stream reader ends a truncated frame without a word."""
    frame = None
    while data := file.read(ZSTD_BLOCK_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                block = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DamagedFileError(f"damaged zstd data ({error})") from error
            if block:
                yield block
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise DamagedFileError("damaged zstd data (it ends in the middle of a frame)")
