"""A file of sound or film, opened and decoded by FFmpeg (PyAV): what is read at all, and how damage shows.

The allow-lists are FFmpeg's own names, so FFmpeg itself refuses everything else *before* it reads a header: playlists
(HLS, ffconcat, DASH, SDP) that would open further files, device inputs, text and image formats. The format is always
sniffed from the content; file names are never shown to FFmpeg.

A file that is cut off or damaged ends in an error after everything before the damage has been handed out. FFmpeg alone
ends quietly where a truncated file ends, and passes over an Ogg page whose checksum is wrong: :func:`missing_bytes`
reads what the file's framing promises, :func:`ogg_is_damaged` checks the pages. Bare streams (MP3, ADTS, MPEG-TS …) are
made to be cut and joined anywhere: up to :data:`SEAM_SECONDS` of tags and seams between their frames are passed over.
Damage that leaves no trace cannot be seen: a changed bit in raw PCM, or in the framing of a Matroska block.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from tempfile import SpooledTemporaryFile
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeAlias, cast

import av
from av import AudioStream, Packet, VideoStream
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError, InvalidDataError
from av.error import EOFError as EndOfFileError
from av.stream import Discard, Disposition

CONTAINERS = "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,tta,w64,wav,wv"
"""Demuxers that may be used (``format_whitelist``): containers of sound or of film with sound."""
SOUND_CODECS = frozenset(
    """aac aac_latm ac3 adpcm_ima_qt adpcm_ima_wav adpcm_ms adpcm_swf alac amrnb amrwb ape eac3 flac g722 g726 g726le gsm
    gsm_ms mp1 mp1float mp2 mp2float mp3 mp3float nellymoser opus pcm_alaw pcm_bluray pcm_dvd pcm_f32be pcm_f32le pcm_f64be
    pcm_f64le pcm_mulaw pcm_s16be pcm_s16be_planar pcm_s16le pcm_s16le_planar pcm_s24be pcm_s24le pcm_s24le_planar
    pcm_s32be pcm_s32le pcm_s32le_planar pcm_s8 pcm_s8_planar pcm_u16be pcm_u16le pcm_u24be pcm_u24le pcm_u32be pcm_u32le
    pcm_u8 qcelp qdm2 qdmc speex tta vorbis wavpack wmalossless wmapro wmav1 wmav2 wmavoice""".split()
)
"""Decoders that may be used (``codec_whitelist``) where sound is wanted: a film's pictures are never decoded."""
FILM_CODECS = frozenset(
    """av1 cinepak dnxhd dvvideo ffv1 flv h263 h264 hevc huffyuv libdav1d mjpeg mpeg1video mpeg2video mpeg4 msmpeg4
    msmpeg4v2 png prores qtrle rawvideo theora vc1 vp6f vp8 vp9 wmv1 wmv2 wmv3""".split()
)
CHECKSUMMED = frozenset({"flac", "tta", "wavpack"})
"""Codecs whose packets carry a checksum; FFmpeg is told to compare it and to stop where it is wrong."""
STREAMS = frozenset({"aac", "ac3", "amr", "eac3", "mp3", "mpeg", "mpegts"})
"""Bare streams without a table of contents: tags and seams lie between their frames."""
SEAM_SECONDS = 0.25
"""Undecodable packets of a bare stream that are passed over, in seconds altogether: about ten MP3 frames."""
PROBE = {"probesize": str(64 << 20), "analyzeduration": "3600000000"}
"""How far into an MPEG program stream without sound so far FFmpeg looks for it: that has no list of its tracks."""
SPOOL_BYTES = 16 << 20
"""What is kept of a pipe in memory; the rest of it goes to a temporary file."""
MICROSECONDS = 1_000_000
"""FFmpeg's units of a container's times in a second."""

File: TypeAlias = "str | os.PathLike[str] | BinaryIO"
"""A path (never a URL), or an open binary stream."""


class MediaError(ValueError):
    """A file that cannot be read, or not to its end: ``name``, ``cause``, and the ``seconds`` decoded before."""

    def __init__(self, name: str, cause: str, seconds: float = 0.0) -> None:
        super().__init__(name, cause, seconds)
        self.name, self.cause, self.seconds = name, cause, seconds

    def __str__(self) -> str:
        stopped = f" (decoding stopped after {self.seconds:.2f} s)" if self.seconds else ""
        return f"{self.name}: {self.cause}{stopped}"


class Damage(Exception):
    """Why decoding cannot go on; its text becomes the cause of a :class:`MediaError`."""


CAUSES = (Damage, FFmpegError, OSError, ValueError, ArithmeticError, LookupError, RuntimeError, MemoryError)
"""What opening and decoding raise; PyAV's own mistakes with hostile input come as built-in exceptions."""


def _cause(error: Exception) -> str:
    """One clause of English; the operating system's own words where the fault is its."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, FFmpegError):
        return f"FFmpeg cannot read it: {error.strerror}"
    if isinstance(error, IndexError):  # PyAV knows the tracks that were there when the file was opened
        return "a track begins in the middle of it, as in a damaged file"
    return str(error) or type(error).__name__


def name_of(source: File) -> str:
    """What messages call a file."""
    return str(getattr(source, "name", "<stream>") if hasattr(source, "read") else source)


@contextmanager
def opened(source: File, name: str | None, codecs: Collection[str]) -> Iterator[Reader]:
    """A file as a :class:`Reader`; whatever goes wrong with it is a :class:`MediaError`.

    A stream is read from its start and stays open; one that cannot seek is spooled first.
    """
    reader = None
    try:
        with ExitStack() as stack:
            file: Any = source if hasattr(source, "read") else stack.enter_context(open(cast(str, source), "rb"))
            if not file.seekable():
                shutil.copyfileobj(file, spool := stack.enter_context(SpooledTemporaryFile(max_size=SPOOL_BYTES)))
                file = spool
            reader = Reader(file, stack.enter_context(_container(file, codecs)))
            yield reader
    except CAUSES as error:
        raise MediaError(name or name_of(source), _cause(error), reader.seconds if reader else 0.0) from error


def _container(file: BinaryIO, codecs: Collection[str]) -> InputContainer:
    """Let FFmpeg sniff the format and read the header."""
    options = {"format_whitelist": CONTAINERS, "codec_whitelist": ",".join(codecs), "protocol_whitelist": "file"}
    if file.seek(0, os.SEEK_END) == 0:
        raise Damage("the file is empty")
    # By a name FFmpeg would guess the format.
    nameless = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    try:
        for probe in ({}, PROBE):
            file.seek(0)
            container = av.open(nameless, "r", options=options | probe, metadata_errors="ignore")
            if container.format.name != "mpeg" or container.streams.audio or probe:
                return container
            container.close()
    except ArgumentError:
        raise Damage("a playlist, or another format that is not opened as sound or film") from None
    except (InvalidDataError, EndOfFileError):
        if lacks_index(file):
            raise Damage("its index (moov) is missing: the recording was cut off before it was finished") from None
    raise Damage("not sound or film in a format that can be read, or its header is damaged")


def codec_of(track: AudioStream | VideoStream) -> str:
    """FFmpeg's name of its decoder."""
    return track.codec_context.name if track.codec_context else "unknown"


class Reader:
    """An open file, of which one track is decoded."""

    def __init__(self, file: BinaryIO, container: InputContainer) -> None:
        self.file, self.container, self.format = file, container, container.format.name
        self.start = (container.start_time or 0) / MICROSECONDS
        """When the recording begins, by its timestamps; sure once the first frame is there."""
        self.seconds = 0.0
        """What has been handed out, for the message of an error."""
        self.skipped = 0.0
        """Seconds of packets between the frames of a bare stream."""

    @property
    def films(self) -> list[VideoStream]:
        """The tracks that are film; a cover picture is none."""
        return [track for track in self.container.streams.video if not track.disposition & Disposition.attached_pic]

    def frames(self, track: AudioStream | VideoStream) -> Iterator[Any]:
        """The track's frames, decoded, up to the end of the file, or an error that tells why there are no more."""
        count, kind = 0, "sound" if track.type == "audio" else "film"
        try:
            for packet in self._packets(track):
                frames = self._decoded(packet, kind)
                count += len(frames)
                yield from frames
        except CAUSES as error:
            self.check_whole()
            raise Damage(f"the {kind} is damaged") if isinstance(error, InvalidDataError) else error from None
        self.check_whole()
        if self.format == "ogg" and ogg_is_damaged(self.file):
            raise Damage(f"the {kind} is damaged: an Ogg page fails its checksum")
        if self.skipped and not count:
            raise Damage(f"nothing in it decodes as {kind}")

    def _packets(self, track: AudioStream | VideoStream) -> Iterator[Packet]:
        """Before sound also the start of the film: FFmpeg, which decodes no film then, does not always know it."""
        films: Sequence[VideoStream] = self.films if track.type == "audio" else []
        for other in self.container.streams:
            other.discard = Discard.default if other is track or other in films else Discard.all
        for packet in self.container.demux():
            if packet.stream is track:
                for film in films:
                    film.discard = Discard.all
                films = []
                yield packet
            elif films and packet.pts is not None and not packet.is_discard:
                self.start = min(self.start, float(packet.pts * packet.time_base))

    def _decoded(self, packet: Packet, kind: str) -> Sequence[Any]:
        """The packet's frames; none for what lies between the frames of a bare stream."""
        try:
            frames = packet.decode()
            if kind == "sound" or not any(frame.is_corrupt for frame in frames):  # pyright: ignore[reportAttributeAccessIssue]
                return frames
        except FFmpegError:
            self.skipped += float((packet.duration or 0) * packet.time_base)
            if kind == "sound" and self.format in STREAMS and self.skipped <= SEAM_SECONDS:
                return []
        raise Damage(f"the {kind} is damaged")

    def check_whole(self) -> None:
        """Raises :class:`Damage` for a file that is shorter than it says."""
        if missing := missing_bytes(self.file):
            raise Damage(f"the file is cut off: at least {missing:,} bytes that it announces are missing")


# What a file's own framing promises, against what is there. Each format is a row of chunks that state their sizes.

_SLACK_BYTES = 1_024
"""Writers of RIFF and AIFF are sloppy about their size fields by a header or a padding byte (32 ms at 16 kHz)."""
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255
"""The largest page that Ogg allows (RFC 3533, section 6)."""
_HEAD_BYTES = 27 + 255
"""As much of a chunk as states its size: an Ogg page's table is the longest."""
_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_MAX_CHUNKS = 100_000
"""Half a second of walking; 14 hours of one-second MP4 fragments."""
_XING_OFFSETS = (13, 21, 36)
"""Where the tag stands in an MP3 frame: four bytes of header and the side information (MPEG-2 mono … MPEG-1 stereo)."""
_CAF_CHUNKS = frozenset(
    b"desc data pakt chan kuki info strg mark regn inst midi ovvw peak edct umid uuid free cnfo".split()
)
_MP4_BOXES = frozenset(b"ftyp styp moov moof mdat free skip wide sidx mfra pdin pnot meta uuid udta".split())


def missing_bytes(file: BinaryIO) -> int:
    """How much shorter the file is than its own framing says; 0 where it is whole, or where the format does not say."""
    formats = (_riff_size, _ebml_size, _ogg_size, _caf_size, _box_size)
    ends = (end for size_of in formats for _, end in islice(_chunks(file, size_of), _MAX_CHUNKS))
    stated = max(ends, default=0) or _xing(file)
    return max(0, stated - file.seek(0, os.SEEK_END))


def ogg_is_damaged(file: BinaryIO) -> bool:
    """Whether an Ogg page fails its checksum, or is not where the one before ends. A tag after the last page is allowed.

    Reads the whole file, faster than it decodes.
    """
    start = 0
    for _, end in _chunks(file, _ogg_size):
        page = _read(file, start, end - start)
        if page[22:26] != _ogg_checksum(page):
            return True
        start = end
    return b"OggS" in _read(file, start, _OGG_PAGE_BYTES)


def lacks_index(file: BinaryIO) -> bool:
    """Whether this is an MP4 or QuickTime file without ``moov``: a recording stopped before it was finished."""
    boxes = {head[4:8] for head, _ in islice(_chunks(file, _box_size), _MAX_CHUNKS)}
    return b"mdat" in boxes and b"moov" not in boxes


def _chunks(file: BinaryIO, size_of: Callable[[bytes], int]) -> Iterator[tuple[bytes, int]]:
    """The chunks one behind the other: how each begins, and where it ends. Stops at what is none (a tag)."""
    end = 0
    while size := size_of(head := _read(file, end, _HEAD_BYTES)):
        end += size
        yield head, end


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    """Bytes from there; none from beyond the end, where hostile sizes point (seeking there fails on some disks)."""
    if start >= file.seek(0, os.SEEK_END):
        return b""
    file.seek(start)
    return file.read(length)


def _riff_size(head: bytes) -> int:
    """RIFF (WAV, AVI) and FORM (AIFF): one size for the whole file, after the first four bytes.

    A pipe is given 0, about 2 GiB (arecord, sox) or about 4 GiB (ffmpeg) for a length that is not yet known.
    """
    size = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
    unknown = 0x7FFF_0000 <= size <= 0x8001_0000 or size >= 0xFFFF_0000
    return 0 if head[:4] not in (b"RIFF", b"FORM") or unknown else max(0, size + 8 - _SLACK_BYTES)


def _ebml_size(head: bytes) -> int:
    """Matroska and WebM: the EBML header, then one Segment. A size (RFC 8794, section 4) of ones only is unknown."""
    if head[:4] not in (b"\x1aE\xdf\xa3", b"\x18\x53\x80\x67"):
        return 0
    length = 9 - head[4].bit_length() if len(head) > 4 else 9
    mask = (1 << 7 * length) - 1
    size = int.from_bytes(head[4 : 4 + length], "big") & mask
    return 0 if length > 8 or size == mask else 4 + length + size


def _ogg_size(head: bytes) -> int:
    """An Ogg page is as long as its table of segments says; one that is cut off before that, longer than what is there."""
    if head[:4] != b"OggS":
        return 0
    table = head[27 : 27 + head[26]] if len(head) > 26 else b""
    return 27 + len(table) + sum(table) if len(head) > 26 and len(table) == head[26] else len(head) + 1


def _ogg_checksum(page: bytes) -> bytes:
    """RFC 3533's CRC: zlib's polynomial with the bits of every byte, and of the result, the other way round."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_MIRROR)
    crc = zlib.crc32(mirrored, 0xFFFF_FFFF) ^ 0xFFFF_FFFF  # zlib inverts before and after; Ogg does not
    return crc.to_bytes(4, "big").translate(_MIRROR)


def _caf_size(head: bytes) -> int:
    """Core Audio Format: chunks after an eight-byte header; a size of -1 means *to the end*."""
    size = int.from_bytes(head[4:12], "big", signed=True)
    return 8 if head[:4] == b"caff" else 12 + size if head[:4] in _CAF_CHUNKS and size >= 0 else 0


def _box_size(head: bytes) -> int:
    """MP4 and QuickTime: the top-level boxes."""
    size = int.from_bytes(head[:4], "big")
    if size == 1:
        size = int.from_bytes(head[8:16], "big")
    return size if head[4:8] in _MP4_BOXES and size >= 8 else 0


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
