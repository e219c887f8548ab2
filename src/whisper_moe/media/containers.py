"""Which containers and codecs are opened at all, and how many bytes a file says it has.

The allow-lists are FFmpeg's own names, so FFmpeg itself refuses everything else *before* it reads a header: playlists
(HLS, ffconcat, DASH, SDP) that would open further files, device inputs, text and image formats. The format is always
sniffed from the content; file names are never shown to FFmpeg.

FFmpeg ends quietly where a truncated file ends, and passes over an Ogg page whose checksum is wrong. What is missing
is noticed here: :func:`missing_bytes` reads what the file's framing promises, :func:`ogg_is_damaged` checks the pages.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

CONTAINERS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"
"""Demuxers that may be used (``format_whitelist``): containers of sound or of film with sound."""

CODECS = frozenset((
    "aac", "aac_latm", "ac3", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_swf", "alac", "amrnb", "amrwb",
    "ape", "eac3", "flac", "g722", "g726", "g726le", "gsm", "gsm_ms", "mp1", "mp1float", "mp2", "mp2float", "mp3",
    "mp3float", "nellymoser", "opus", "pcm_alaw", "pcm_bluray", "pcm_dvd", "pcm_f32be", "pcm_f32le", "pcm_f64be",
    "pcm_f64le", "pcm_mulaw", "pcm_s16be", "pcm_s16be_planar", "pcm_s16le", "pcm_s16le_planar", "pcm_s24be",
    "pcm_s24le", "pcm_s24le_planar", "pcm_s32be", "pcm_s32le", "pcm_s32le_planar", "pcm_s8", "pcm_s8_planar",
    "pcm_u16be", "pcm_u16le", "pcm_u24be", "pcm_u24le", "pcm_u32be", "pcm_u32le", "pcm_u8", "qcelp", "qdm2", "qdmc",
    "speex", "tta", "vorbis", "wavpack", "wmalossless", "wmapro", "wmav1", "wmav2", "wmavoice",
))  # fmt: skip
"""Decoders that may be used (``codec_whitelist``): sound only, so a film's pictures are never decoded."""

CHECKSUMMED = frozenset({"flac", "tta", "wavpack"})
"""Codecs whose packets carry a checksum; FFmpeg is told to compare it and to stop where it is wrong."""

COUNTED = frozenset({"aiff", "flac", "tta", "wv"})
"""Containers whose header states the exact number of samples, where it states one at all."""

STREAMS = frozenset({"aac", "ac3", "amr", "eac3", "mp3", "mpeg", "mpegts"})
"""Bare streams without a table of contents: made to be cut and joined at any byte, so that tags and seams lie between
their frames."""

CLOCKED = frozenset({"asf", "flv", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "mpeg", "mpegts"})
"""Containers that give every packet its time. The others say when a track starts, if that, and count from there."""

_SLACK_BYTES = 1_024
"""Writers of RIFF and AIFF are sloppy about their size fields by a header or a padding byte (32 ms at 16 kHz)."""
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255
"""The largest page that Ogg allows (RFC 3533, section 6)."""
_CAF_CHUNKS = frozenset((
    b"desc", b"data", b"pakt", b"chan", b"kuki", b"info", b"strg", b"mark", b"regn", b"inst", b"midi", b"ovvw", b"peak",
    b"edct", b"umid", b"uuid", b"free", b"cnfo",
))  # fmt: skip
_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_MAX_CHUNKS = 100_000
"""Half a second of walking; 14 hours of one-second MP4 fragments."""
_XING_OFFSETS = (13, 21, 36)
"""Where the tag stands in an MP3 frame: four bytes of header and the side information (MPEG-2 mono … MPEG-1 stereo)."""
_MP4_BOXES = frozenset((
    b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"mfra", b"pdin", b"pnot", b"meta",
    b"uuid", b"udta",
))  # fmt: skip


LATE_TRACK = "a track begins in the middle of it, as in a damaged file"
"""The cause of an ``IndexError``: PyAV knows the tracks that were there when the file was opened."""


class Damage(Exception):
    """Why decoding cannot go on; its text becomes the cause of a :class:`MediaError`."""


def causes() -> tuple[type[Exception], ...]:
    """What opening and decoding raise; PyAV's own mistakes with hostile input come as built-in exceptions."""
    from av.error import FFmpegError

    return (Damage, FFmpegError, OSError, ValueError, ArithmeticError, LookupError, RuntimeError, MemoryError)


def film_tracks(container: InputContainer) -> list[VideoStream]:
    """The tracks that are film; a cover picture is none."""
    from av.stream import Disposition

    return [track for track in container.streams.video if not track.disposition & Disposition.attached_pic]


def missing_bytes(file: BinaryIO) -> int:
    """How much shorter the file is than its own framing says; 0 where it is whole, or where the format does not say.

    ``file`` is seekable; its position is kept, because FFmpeg may be reading from it.
    """
    position = file.tell()
    try:
        return max(0, _stated_bytes(file) - file.seek(0, 2))
    finally:
        file.seek(position)


def _stated_bytes(file: BinaryIO) -> int:
    head = _read(file, 0, 12)
    if head[:4] in (b"RIFF", b"FORM"):
        return _iff(head)
    if head[:4] == b"\x1aE\xdf\xa3":
        return _matroska(file)
    if head[:4] == b"OggS":
        return _ogg(file)
    if head[:4] == b"caff":
        return _caf(file)
    if head[4:8] in _MP4_BOXES:
        return max((end for _, end in _boxes(file)), default=0)
    return _xing(file)


def ogg_is_damaged(file: BinaryIO) -> bool:
    """Whether an Ogg page fails its checksum, or is not where the one before ends. A tag after the last page is allowed.

    Reads the whole file, faster than it decodes; keeps the position.
    """
    position, start = file.tell(), 0
    try:
        while page := _ogg_page(file, start):
            if page[22:26] != _ogg_checksum(page):
                return True
            start += len(page)
        return b"OggS" in _read(file, start, _OGG_PAGE_BYTES)
    finally:
        file.seek(position)


def lacks_index(file: BinaryIO) -> bool:
    """Whether this is an MP4 or QuickTime file without ``moov``: a recording stopped before it was finished."""
    boxes = {kind for kind, _ in _boxes(file)}
    return b"mdat" in boxes and b"moov" not in boxes


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    """Bytes from there; none from beyond the end, where hostile sizes point (seeking there fails on some disks)."""
    if start >= file.seek(0, 2):
        return b""
    file.seek(start)
    return file.read(length)


def _iff(head: bytes) -> int:
    """RIFF (WAV, AVI) and FORM (AIFF): one size for the whole file, after the first four bytes."""
    size = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
    return 0 if _unknown(size) else size + 8 - _SLACK_BYTES


def _unknown(size: int) -> bool:
    """What is written to a pipe for a length not yet known: 0, about 2 GiB (arecord, sox) or about 4 GiB (ffmpeg)."""
    return size == 0 or 0x7FFF_0000 <= size <= 0x8001_0000 or size >= 0xFFFF_0000


def _vint(raw: bytes) -> tuple[int, int]:
    """An EBML size (RFC 8794, section 4): its value, -1 for *unknown*, and its length in bytes."""
    length = 9 - raw[0].bit_length() if raw and raw[0] else 9
    if len(raw) < length:
        return -1, length
    mask = (1 << 7 * length) - 1
    value = int.from_bytes(raw[:length], "big") & mask
    return (-1 if value == mask else value), length


def _matroska(file: BinaryIO) -> int:
    """Matroska and WebM: the EBML header, then one Segment with its size."""
    size, length = _vint(_read(file, 4, 8))
    segment = 4 + length + size
    raw = _read(file, segment, 12) if size >= 0 else b""
    if raw[:4] != b"\x18\x53\x80\x67":
        return 0
    size, length = _vint(raw[4:])
    return 0 if size < 0 else segment + 4 + length + size


def _ogg(file: BinaryIO) -> int:
    """Ogg: where the last page ends, by its table of segments."""
    end = file.seek(0, 2)
    start = max(0, end - _OGG_PAGE_BYTES)
    tail = _read(file, start, _OGG_PAGE_BYTES)
    page = tail.rfind(b"OggS")
    if page < 0:
        return 0
    table = tail[page + 27 : page + 27 + tail[page + 26]] if len(tail) > page + 26 else b""
    if len(tail) <= page + 26 or len(table) < tail[page + 26]:
        return end + 1
    return start + page + 27 + len(table) + sum(table)


def _ogg_page(file: BinaryIO, start: int) -> bytes:
    """The page that begins there, as long as its table of segments says; none where none begins."""
    head = _read(file, start, 27 + 255)
    if len(head) < 27 or head[:4] != b"OggS":
        return b""
    return _read(file, start, 27 + head[26] + sum(head[27 : 27 + head[26]]))


def _ogg_checksum(page: bytes) -> bytes:
    """RFC 3533's CRC: zlib's polynomial with the bits of every byte, and of the result, the other way round."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_MIRROR)
    crc = zlib.crc32(mirrored, 0xFFFF_FFFF) ^ 0xFFFF_FFFF  # zlib inverts before and after; Ogg does not
    return crc.to_bytes(4, "big").translate(_MIRROR)


def _caf(file: BinaryIO) -> int:
    """Core Audio Format: chunks after an eight-byte header; a size of -1 means *to the end*. Stops at what is no chunk."""
    position = 8
    for _ in range(_MAX_CHUNKS):
        head = _read(file, position, 12)
        size = int.from_bytes(head[4:], "big", signed=True)
        if head[:4] not in _CAF_CHUNKS or size < 0:
            break
        position += 12 + size
    return position


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """MP4 and QuickTime: the top-level boxes, each with the position where it ends. Stops at what is no box (a tag)."""
    position = 0
    for _ in range(_MAX_CHUNKS):
        head = _read(file, position, 16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if head[4:8] not in _MP4_BOXES or size < 8:
            break
        position += size
        yield head[4:8], position


def _xing(file: BinaryIO) -> int:
    """MP3: the length in the first frame's Xing or Info tag, less 1 % (encoders count tags that editors remove)."""
    head = _read(file, 0, 10)
    id3 = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
    frame = _read(file, id3 if head[:3] == b"ID3" else 0, 64)
    tag = next((at for at in _XING_OFFSETS if frame[at : at + 4] in (b"Xing", b"Info")), None)
    if tag is None or len(frame) < 64 or frame[0] != 0xFF or not frame[tag + 7] & 2:
        return 0
    after_count = tag + 8 + 4 * (frame[tag + 7] & 1)
    return int.from_bytes(frame[after_count : after_count + 4], "big") * 99 // 100
