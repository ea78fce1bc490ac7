"""Lines of files, however they are compressed, divided and cut."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.text import byte_stream
from retro_ray.text.byte_stream import DamagedFileError, read_blocks, read_lines

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: zstandard.ZstdCompressor().compress(content),
}
lines = st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b" ")), max_size=12)


@given(lines, st.sampled_from(list(COMPRESS)), st.integers(1, 4), st.integers(1, 50), st.booleans())
def test_lines_do_not_depend_on_blocks_members_and_compression(
    written: list[bytes], extension: str, num_members: int, block_bytes: int, ends: bool
) -> None:
    content = b"\n".join(written) + (b"\n" if ends else b"")
    step = len(content) // num_members + 1
    members = [COMPRESS[extension](content[at : at + step]) for at in range(0, len(content), step)]
    expected = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_stream, "BLOCK_BYTES", block_bytes)
        patch.setattr(byte_stream, "ZSTD_BLOCK_BYTES", block_bytes)
        path = Path(folder) / f"a.jsonl{extension}"
        path.write_bytes(b"".join(members))
        assert b"".join(read_blocks(str(path))) == content
        if not content.startswith(b"\xef"):  # a mark that blocks of a byte or two cut is not looked for
            assert list(read_lines(str(path))) == (expected if expected[-1] else expected[:-1])


@given(st.binary(min_size=1, max_size=3000), st.sampled_from([".gz", ".zst"]), st.data())
def test_cut_off_data_is_never_taken_for_the_whole(content: bytes, extension: str, data: st.DataObject) -> None:
    whole = COMPRESS[extension](content)
    kept = data.draw(st.integers(1, len(whole) - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.txt{extension}"
        path.write_bytes(whole[:kept])
        blocks: list[bytes] = []
        with pytest.raises(DamagedFileError, match="damaged"):
            blocks.extend(read_blocks(str(path)))
        assert content.startswith(b"".join(blocks))


def test_frames_that_hold_no_data_are_passed_over(tmp_path: Path) -> None:
    """As parallel compressors write them: a skippable frame in front of each frame, and empty frames."""
    skippable = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"size"
    frame = zstandard.ZstdCompressor().compress
    path = tmp_path / "a.txt.zst"
    path.write_bytes(skippable + frame(b"one\n") + frame(b"") + skippable + frame(b"two\n") + skippable)
    assert list(read_lines(str(path))) == [b"one", b"two"]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"") + gzip.compress(b"two\n") + bytes(100))
    assert list(read_lines(str(path))) == [b"one", b"two"]
