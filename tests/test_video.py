"""video.py: the frames that the reference samples, decoded exactly, and files that mean harm."""

import fractions
import io
import json
import os
import pathlib
import sys
import tempfile

import numpy as np
import pytest

from internvl_rt import video
from internvl_rt.video import frame_indices, load_video

av = pytest.importorskip("av")
GOLDEN = pathlib.Path(__file__).parent / "golden" / "video" / "golden.json"
ROWS = json.loads(GOLDEN.read_text())["rows"]


def clip(
    frames=40, *, kind="mp4", codec="mpeg4", rate=25, size=(64, 48), gop=8, b_frames=0, audio=False
):
    """A short film whose frames all differ."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        if audio:
            sound = container.add_stream("pcm_s16le" if kind == "avi" else "aac", rate=16000)
        if frames:
            stream = container.add_stream(codec, rate=fractions.Fraction(rate))
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.gop_size = gop
            stream.max_b_frames = b_frames
        y, x = np.mgrid[: size[1], : size[0]]
        for i in range(frames):
            picture = np.stack([x * 4 + i * 5, y * 5 + i, x + y + i * 3], -1) % 256
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        if frames:
            container.mux(stream.encode())
        if audio:
            tone = np.zeros((1, 1024 * 10), np.int16)
            frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return buffer.getvalue()


def all_frames(data):
    with av.open(io.BytesIO(data)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


# ---- sampling ------------------------------------------------------------------------------------


def test_every_sampling_of_the_reference():
    refused = 0
    for row in ROWS:
        arguments = {
            "fps": row["fps"],
            "num_frames": row["num_segments"],
            "bound": row["bound"],
        }
        if row.get("out_of_range"):
            refused += 1
            with pytest.raises(ValueError, match=r"bound is .* seconds, but the video has"):
                frame_indices(row["n_frames"], **arguments)
        else:
            assert frame_indices(row["n_frames"], **arguments) == row["indices"], row
    assert 0 < refused < len(ROWS) / 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_frames": 0}, ValueError, "n_frames is 0"),
        ({"n_frames": 2.5}, TypeError, "n_frames is 2.5"),
        ({"num_frames": 0}, ValueError, "num_frames is 0, allowed: 1 to 1024"),
        ({"num_frames": True}, TypeError, "num_frames is True"),
        ({"fps": 0}, ValueError, "fps is 0"),
        ({"fps": float("nan")}, ValueError, "fps is nan"),
        ({"fps": None}, ValueError, "fps is None"),
        ({"bound": (2, 1)}, ValueError, r"bound is \(2, 1\), expected"),
        ({"bound": (-1, 1)}, ValueError, "bound is"),
        ({"bound": (0, float("inf"))}, ValueError, "bound is"),
        ({"bound": 3}, ValueError, "bound is 3"),
        ({"bound": (1, 2, 3)}, ValueError, "bound is"),
    ],
)
def test_wrong_sampling_arguments(change, error, words):
    arguments = {"n_frames": 10, "fps": 25.0, "num_frames": 4, "bound": None} | change
    with pytest.raises(error, match=words):
        frame_indices(arguments.pop("n_frames"), **arguments)


# ---- decoding ------------------------------------------------------------------------------------

CLIPS = {
    "mp4": {},
    "mp4_one_key_frame": {"gop": 1000},
    "mp4_b_frames": {"b_frames": 2, "gop": 12},
    "mp4_long": {"frames": 300, "gop": 20, "size": (32, 16)},
    "mp4_long_b_frames": {"frames": 300, "gop": 20, "b_frames": 2, "size": (32, 16)},
    "mp4_one_frame": {"frames": 1},
    "mp4_with_sound": {"audio": True},
    "mp4_ntsc": {"rate": "30000/1001"},
    "mov": {"kind": "mov"},
    "mkv": {"kind": "matroska"},
    "avi": {"kind": "avi"},
    "avi_mjpeg": {"kind": "avi", "codec": "mjpeg"},
    "mpegts": {"kind": "mpegts", "codec": "mpeg2video"},
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("num_frames", [1, 3, 8])
def test_frames_equal_a_full_decode(name, num_frames, tmp_path):
    options = CLIPS[name]
    data = clip(**options)
    every = all_frames(data)
    assert len(every) == options.get("frames", 40)
    path = tmp_path / "film"
    path.write_bytes(data)
    fps = float(fractions.Fraction(options.get("rate", 25)))
    for bound in (None, (0, 0.7)) if len(every) > 1 else (None,):
        wanted = frame_indices(len(every), fps=fps, num_frames=num_frames, bound=bound)
        for source in (path, data):
            got = load_video(source, num_frames, bound)
            assert len(got) == num_frames
            for frame, i in zip(got, wanted, strict=True):
                assert frame.dtype == np.uint8
                assert np.array_equal(frame, every[i])


def test_far_frames_are_reached_by_a_key_frame(monkeypatch):
    data = clip(frames=300, gop=20, size=(32, 16))
    runs = []
    plan = video._plan

    def spy(*arguments):
        runs.extend(plan(*arguments))
        return runs

    monkeypatch.setattr(video, "_plan", spy)
    load_video(data, 3)
    assert len(runs) == 3
    assert sum(len(steps) for _, steps in runs) < 100


# ---- broken and hostile files --------------------------------------------------------------------


def truncated_after_index():
    """Index first, most of the pictures gone."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "film.mp4"
        with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            rng = np.random.default_rng(0)
            for _ in range(30):
                noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            container.mux(stream.encode())
        data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    return data[: len(data) // 2]


HOSTILE = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"this is no film", "no video format that is known"),
    "playlist": (lambda: b"#EXTM3U\nfile:///etc/passwd\n", "no video format that is known"),
    "concat_script": (lambda: b"ffconcat version 1.0\nfile x\n", "no video format"),
    "half": (lambda: (d := clip())[: len(d) // 2], "truncated or corrupt"),
    "half_after_index": (truncated_after_index, r"is truncated: \d+ of 30 frames are there"),
    "header_only": (lambda: clip()[:40], "truncated or corrupt"),
    "audio_only": (lambda: clip(0, audio=True), "has no video stream, only audio"),
    "zeros": (lambda: b"\0\0\0\x18ftyp" + b"\0" * 5000, "video of|video '"),
    "matroska_noise": (lambda: b"\x1a\x45\xdf\xa3" + bytes(range(256)) * 20, "truncated|no video"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_broken_files_are_refused_in_one_line(kind, tmp_path):
    build, words = HOSTILE[kind]
    data = build()
    path = tmp_path / "film.mp4"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ValueError, match=words) as caught:
            load_video(source, 4)
        assert str(caught.value).startswith("video ")
        assert "\n" not in str(caught.value)


def test_every_cut_and_flip_is_sound_or_refused():
    rng = np.random.default_rng(3)
    for options in ({}, {"kind": "matroska"}, {"kind": "avi"}):
        data = clip(12, **options)
        for _ in range(25):
            at = int(rng.integers(0, len(data)))
            bad = bytearray(data)
            bad[at] ^= 0x55
            for source in (bytes(bad), data[:at]):
                try:
                    assert len(load_video(source, 3)) == 3
                except ValueError as error:
                    one_line = "\n" not in str(error)
                    if not one_line:
                        raise


def test_limits_on_work(monkeypatch):
    data = clip()
    with pytest.raises(ValueError, match=r"bound is .* but the video has 40 frames"):
        load_video(data, 4, (100, 200))
    for limit, value, words in (
        ("MAX_FRAMES", 39, "allowed: at most 39"),
        ("MAX_PIXELS", 64 * 48 - 1, "has frames of 64 x 48 pixels"),
        ("MAX_RETURNED_BYTES", 1000, "frames of 64 x 48 are more than 1000 bytes"),
        ("MAX_DECODED_PIXELS", 64 * 48 * 3, "would have to be decoded"),
        ("MAX_BYTES", 100, "allowed: at most 100"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(video, limit, value)
            with pytest.raises(ValueError, match=words):
                load_video(data, 4)


def test_sources_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_video(tmp_path / "missing.mp4")
    with pytest.raises(OSError, match="is a directory, expected a file"):
        load_video(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        load_video(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a usable path"):
        load_video("a\0b")
    with pytest.raises(TypeError, match="video is int, expected a path or bytes"):
        load_video(3)
    with pytest.raises(ValueError, match="num_frames is 0"):
        load_video(tmp_path, 0)


def test_without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install internvl-rt\[video\]"):
        load_video(b"x")
