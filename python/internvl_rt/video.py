"""Videos to frames: which frames InternVL looks at, and those frames as RGB.

Decoding goes through PyAV (the extra `video`). Files may come from strangers: the container is
recognised by its first bytes and opened as that and nothing else (no playlists, no URLs), sizes and
the work to come are checked before a frame is decoded, and whatever is broken raises one line.
"""

from __future__ import annotations

import bisect
import io
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

MAX_SAMPLES = 1024  # frames that one call may return
MAX_BYTES = 4 << 30
MAX_FRAMES = 500_000
MAX_PIXELS = 8192 * 4320
MAX_RETURNED_BYTES = 4 << 30
# Pixels that may be decoded on the way to the frames: some 16 000 frames of 1920 x 1080.
MAX_DECODED_PIXELS = 1 << 35
# Frames that are rather decoded than jumped over.
_WORTH_SEEKING = 32

_FORMATS = "AVI, Matroska/WebM, MP4/MOV, MPEG-TS"


def frame_indices(
    n_frames: int, *, fps: float, num_frames: int, bound: Sequence[float] | None = None
) -> list[int]:
    """The frames of a video that stand for it: the middles of num_frames equal segments.

    n_frames: frames in the video. fps: average frames per second. bound: (start, end) in seconds;
        an end past the video is cut off. Frames repeat where there are fewer than num_frames.
    Source: InternVL's get_index. Raises ValueError for numbers out of range and for a bound that
    leaves no frame, TypeError for other types.
    """
    _integer("n_frames", n_frames, MAX_FRAMES)
    _integer("num_frames", num_frames, MAX_SAMPLES)
    if not _finite(fps) or fps <= 0:
        raise ValueError(f"fps is {fps!r}, expected a positive number")
    first, last = 0, n_frames - 1
    if bound is not None:
        start, end = check_bound(bound)
        first = max(0, round(start * fps))
        last = min(round(end * fps), last)
    segment = (last - first) / num_frames
    indices = [int(first + segment / 2 + round(segment * k)) for k in range(num_frames)]
    if max(indices) >= n_frames or min(indices) < 0:
        raise ValueError(
            f"bound is {bound!r} seconds, but the video has {n_frames} frames at {float(fps):g} "
            f"per second and ends at {n_frames / fps:.3f}"
        )
    return indices


def _integer(name: str, value: Any, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}, expected an integer from 1 to {high}")
    if not 1 <= value <= high:
        raise ValueError(f"{name} is {value}, allowed: 1 to {high}")


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def check_num_frames(num_frames: Any) -> None:
    """Raises ValueError or TypeError for a number of frames that `load_video` refuses."""
    _integer("num_frames", num_frames, MAX_SAMPLES)


def check_bound(bound: Any) -> tuple[float, float]:
    """(start, end) in seconds; ValueError for what `load_video` refuses."""
    pair = tuple(bound) if isinstance(bound, list | tuple) else ()
    if len(pair) != 2 or not all(map(_finite, pair)) or not 0 <= pair[0] <= pair[1] <= 1e7:
        raise ValueError(
            f"bound is {bound!r}, expected (start, end) in seconds with 0 <= start <= end"
        )
    return pair


def load_video(
    source: Any, num_frames: int = 8, bound: Sequence[float] | None = None
) -> list[np.ndarray]:
    """num_frames frames of a video, each RGB uint8 [H, W, 3], as `frame_indices` picks them.

    source: a path, or the bytes of an AVI, Matroska/WebM, MP4/MOV or MPEG-TS file; its first video
        stream is taken. No rotation is applied.
    Raises ImportError without PyAV, OSError for a file that cannot be read, ValueError for one that
    is broken, too large, of another format or without video, TypeError for any other object.
    """
    check_num_frames(num_frames)
    if bound is not None:
        check_bound(bound)
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "load_video needs PyAV, which is not installed: pip install internvl-rt[video]"
        ) from error
    file, name = _open(source)
    with file:
        demuxer = _demuxer(file, name)
        try:
            with av.open(file, mode="r", format=demuxer) as container:
                wanted, plan, index = _survey(container, num_frames, bound, demuxer)
            file.seek(0)  # opened anew: not every container can be rewound exactly
            with av.open(file, mode="r", format=demuxer) as container:
                return _decode(container, wanted, plan, index)
        except (_UnfitError, MemoryError) as error:
            what = str(error) or "does not fit in memory"
            raise ValueError(f"{name}: {what}") from None
        except (av.FFmpegError, EOFError, OSError):
            raise ValueError(f"{name}: is truncated or corrupt, expected {_FORMATS}") from None


class _UnfitError(Exception):
    """What is wrong with a video, in the words of the message."""


def _open(source: Any) -> tuple[BinaryIO, str]:
    if isinstance(source, bytes | bytearray | memoryview):
        name = f"video of {memoryview(source).nbytes} bytes"
        _check_bytes(memoryview(source).nbytes, name)
        return io.BytesIO(source), name
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"video is {type(source).__name__}, expected a path or bytes")
    path = os.fspath(source)
    text = repr(path)
    name = f"video {text if len(text) <= 200 else text[:100] + '...' + text[-90:]}"
    try:
        status = os.stat(path)
        file = open(path, "rb") if stat.S_ISREG(status.st_mode) else None  # noqa: SIM115
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except OSError as error:
        raise OSError(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"{name}: is not a usable path") from None
    if file is None:
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise OSError(f"{name}: is {kind}, expected a file")
    try:
        _check_bytes(status.st_size, name)
    except ValueError:
        file.close()
        raise
    return file, name


def _check_bytes(n: int, name: str) -> None:
    if n == 0:
        raise ValueError(f"{name}: is empty, expected {_FORMATS}")
    if n > MAX_BYTES:
        raise ValueError(f"{name}: has {n} bytes, allowed: at most {MAX_BYTES}")


def _demuxer(file: BinaryIO, name: str) -> str:
    head = file.read(377)
    file.seek(0)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if head[:1] == b"G" and head[188:189] == b"G" and head[376:377] in (b"G", b""):
        return "mpegts"
    raise ValueError(f"{name}: is no video format that is known, allowed: {_FORMATS}")


@dataclass(frozen=True)
class _Index:
    """What the container says of a stream's frames, in the order in which they are shown."""

    times: list[int]  # presentation times, ascending; empty where they do not tell frames apart
    keys: list[int]  # of these, the ones that decoding can start at
    count: int


_Plan = list[tuple[int | None, range]]


def _survey(
    container: Any, num_frames: int, bound: Sequence[float] | None, demuxer: str
) -> tuple[list[int], _Plan, _Index]:
    """The frames to return and the way to them, checked against the limits."""
    stream = _video_stream(container)
    width, height = stream.codec_context.width, stream.codec_context.height
    _check_frame(width, height)
    if num_frames * width * height * 3 > MAX_RETURNED_BYTES:
        raise _UnfitError(
            f"{num_frames} frames of {width} x {height} are more than {MAX_RETURNED_BYTES} bytes"
        )
    # A transport stream has no index; a seek lands near its target, not on it.
    index = _index(container, stream, seekable=demuxer != "mpegts")
    fps = stream.average_rate or stream.guessed_rate
    if not fps or fps <= 0:
        raise _UnfitError("has no frame rate")
    try:
        wanted = frame_indices(index.count, fps=float(fps), num_frames=num_frames, bound=bound)
    except ValueError as error:
        raise _UnfitError(str(error)) from None
    plan = _plan(index, sorted(set(wanted)))
    work = sum(len(steps) for _, steps in plan)
    if work * width * height > MAX_DECODED_PIXELS:
        raise _UnfitError(
            f"{work} frames of {width} x {height} would have to be decoded, allowed: "
            f"{MAX_DECODED_PIXELS} pixels; choose a shorter bound"
        )
    return wanted, plan, index


def _video_stream(container: Any) -> Any:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # a sound file's cover is no video
            if stream.codec_context is None:
                raise _UnfitError("has a video codec that is not known")
            return stream
    kinds = sorted({s.type for s in container.streams}) or ["nothing"]
    raise _UnfitError(f"has no video stream, only {', '.join(kinds)}")


def _check_frame(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise _UnfitError(f"has frames of {width} x {height} pixels, expected at least 1 x 1")
    if width * height > MAX_PIXELS:
        raise _UnfitError(
            f"has frames of {width} x {height} pixels, allowed: at most {MAX_PIXELS} in all"
        )


def _index(container: Any, stream: Any, *, seekable: bool) -> _Index:
    if stream.frames > MAX_FRAMES:
        raise _UnfitError(f"has {stream.frames} frames, allowed: at most {MAX_FRAMES}")
    times: list[int | None] = []
    keys = []
    packets = 0
    for packet in container.demux(stream):
        if packet.size == 0:  # the end
            continue
        packets += 1
        if packets > MAX_FRAMES:
            raise _UnfitError(f"has more than {MAX_FRAMES} frames")
        if packet.is_discard:  # cut away by an edit list
            continue
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
        times.append(packet.pts)
    if packets < stream.frames:
        raise _UnfitError(f"is truncated: {packets} of {stream.frames} frames are there")
    if not times:
        raise _UnfitError("has 0 frames")
    known = sorted(t for t in times if t is not None)
    distinct = len(set(known)) == len(times)
    if not distinct:
        return _Index([], [], len(times))
    return _Index(known, sorted(keys) if seekable else [], len(times))


def _plan(index: _Index, wanted: list[int]) -> _Plan:
    """Runs of frames to decode: the key frame's time to seek to (None: the start), the frames."""
    runs: _Plan = []
    for frame in wanted:
        start, steps = runs[-1] if runs else (None, range(0))
        key = None
        if index.keys:
            at = bisect.bisect_right(index.keys, index.times[frame]) - 1
            key = index.keys[at] if at >= 0 else None
        begin = bisect.bisect_left(index.times, key) if key is not None else 0
        if begin > steps.stop + _WORTH_SEEKING:
            runs.append((key, range(begin, frame + 1)))
        elif runs:
            runs[-1] = (start, range(steps.start, frame + 1))
        else:
            runs.append((None, range(0, frame + 1)))
    return runs


def _decode(container: Any, wanted: list[int], plan: _Plan, index: _Index) -> list[np.ndarray]:
    stream = _video_stream(container)
    shots: dict[int, np.ndarray] = {}
    for start, steps in plan:
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        _decode_run(container, stream, steps, set(wanted), index, shots)
    missing = sorted(set(wanted) - set(shots))
    if missing:
        raise _UnfitError(f"is truncated or corrupt: frame {missing[0]} of {index.count} is lost")
    return [shots[i] for i in wanted]


def _decode_run(
    container: Any,
    stream: Any,
    steps: range,
    wanted: set[int],
    index: _Index,
    shots: dict[int, np.ndarray],
) -> None:
    """Decodes one run and keeps the wanted frames of it."""
    left = {i for i in wanted if i in steps}
    limit = len(steps) + 4 * _WORTH_SEEKING  # a seek may land on an earlier key frame
    for count, frame in enumerate(container.decode(stream)):
        i = count
        if index.times:
            at = bisect.bisect_left(index.times, frame.pts) if frame.pts is not None else -1
            i = at if 0 <= at < index.count and index.times[at] == frame.pts else -1
        if i in left:
            if frame.is_corrupt:
                raise _UnfitError(f"is corrupt at frame {i} of {index.count}")
            _check_frame(frame.width, frame.height)
            shots[i] = frame.to_ndarray(format="rgb24")
            left.remove(i)
        if not left or count > limit:
            return
