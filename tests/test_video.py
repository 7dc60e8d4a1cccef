"""Decoding of videos and of sound in their containers: every format, exact frames, limits, damage."""

import io
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tars
from videos import box, numbers, picture, rotated, video

from mmbeam.clean.where import compile_where, rejecting_expression
from mmbeam.config import Cleaning, Limits, Reading, Windows
from mmbeam.decode import decode_sample
from mmbeam.decode.audio import audio_seconds, decode_audio
from mmbeam.decode.common import LargeValueError
from mmbeam.decode.video import decode_video, has_sound, video_header
from mmbeam.errors import DecodeError, LimitError, SampleError
from mmbeam.readers.listing import list_shards
from mmbeam.readers.units import plan_units
from mmbeam.readers.windows import read_batches
from mmbeam.report.gallery import load_media
from mmbeam.types import Needs, RawSample

LIMITS = Limits()
GOP = (("g", "12"), ("bf", "2"))
OPEN_GOP = (("x264-params", "open-gop=1:keyint=8:min-keyint=4:bframes=3:scenecut=0"),)
FORMATS = {
    "h264 in mp4": lambda: video(options=GOP),
    "h264 in mov": lambda: video("mov"),
    "h264 in fragments": lambda: video(muxer=(("movflags", "frag_keyframe+empty_moov"),), options=GOP),
    "h264 of open groups in mkv": lambda: video("matroska", options=OPEN_GOP),
    "vp9 in webm": lambda: video("webm", "libvpx-vp9"),
    "vp8 in webm": lambda: video("webm", "libvpx"),
    "ffv1 in mkv": lambda: video("matroska", "ffv1"),
    "mpeg4 in avi": lambda: video("avi", "mpeg4"),
    "mjpeg in avi": lambda: video("avi", "mjpeg", pixels="yuvj420p"),
    "odd sizes": lambda: video("matroska", "ffv1", size=(37, 23), pixels="yuv444p"),
    "10 bit": lambda: video("matroska", "ffv1", pixels="yuv420p10le"),
}


def in_order(data: bytes) -> tuple[list[np.ndarray], list[float]]:
    """Return every frame of a video, decoded by PyAV alone and in order, and the time of each from the first on."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time - frames[0].time for frame in frames]


@pytest.mark.parametrize("name", FORMATS)
def test_a_frame_equals_the_frame_shown_at_its_time(name: str) -> None:
    data = FORMATS[name]()
    frames, times = in_order(data)
    for count in (1, 3, 8, 30, 41):
        result = decode_video(data, LIMITS, count)
        assert len(result.frames) == len(result.times) == count
        assert result.seconds == pytest.approx(3.0, abs=0.15)
        for index, (frame, time) in enumerate(zip(result.frames, result.times, strict=True)):
            target = (index + 0.5) * result.seconds / count
            shown = max(number for number, begin in enumerate(times) if begin <= target + 1e-9)
            assert time == pytest.approx(times[shown])
            np.testing.assert_array_equal(frame, frames[shown])
    everything = decode_video(data, LIMITS, fps=10.0)
    assert len(everything.frames) in (30, 31)
    assert numbers(everything.frames)[:28] == pytest.approx(list(range(28)), abs=1)
    assert video_header(data, LIMITS) == replace(result, frames=(), times=())
    width, height = result.size
    assert result.frames[0].shape == (height, width, 3)
    assert result.frames[0].flags.c_contiguous


def test_a_variable_rate_is_sampled_in_time() -> None:
    times = (0, 100, 200, 300, 2000, 3900)  # the fourth frame is shown for 1.7 seconds, the fifth for 1.9
    data = video("matroska", "ffv1", count=6, times=times)
    result = decode_video(data, LIMITS, 4)
    assert numbers(result.frames) == [3, 3, 4, 4]
    assert result.times == pytest.approx((0.3, 0.3, 2.0, 2.0))
    assert result.nbytes == 2 * 64 * 48 * 3
    assert numbers(decode_video(data, LIMITS, fps=0.5).frames) == [0, 4]


# The matrix of ISO 14496-12 maps a point (x, y) to (a x + c y, b x + d y).
@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a phone held upright: shown turned clockwise
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
    ],
)
def test_the_rotation_is_applied(matrix: tuple[int, ...], turn: Callable[[np.ndarray], np.ndarray]) -> None:
    data = rotated(video(count=4), matrix)
    result, [plain, *_] = decode_video(data, LIMITS, 1), decode_video(video(count=4), LIMITS, 1).frames
    np.testing.assert_array_equal(result.frames[0], turn(plain))
    height, width = turn(plain).shape[:2]
    assert result.size == video_header(data, LIMITS).size == (width, height)


@pytest.mark.parametrize(
    ("fmt", "sound"), [("mp4", "aac"), ("adts", "aac"), ("ipod", "alac"), ("webm", "libopus"), ("avi", "mp3")]
)
def test_sound_is_decoded_from_its_container(fmt: str, sound: str) -> None:
    is_video = fmt in ("webm", "avi", "mp4")
    codec = "libvpx" if fmt == "webm" else "mpeg4"
    data = video(fmt, codec, count=20 if is_video else 0, sound=sound, seconds=2.0)
    audio = decode_audio(data, LIMITS, frozenset({16_000, 48_000}))
    assert audio.seconds == pytest.approx(2.0, abs=0.06)
    assert audio_seconds(data, LIMITS) == pytest.approx(audio.seconds, abs=0.1)
    for rate, wave in audio.waves.items():
        assert len(wave) == pytest.approx(audio.seconds * rate, abs=2)
        middle = wave[rate // 2 : rate // 2 + rate]
        spectrum = np.abs(np.fft.rfft(middle))
        assert int(spectrum.argmax()) == 440
        assert np.abs(middle).max() == pytest.approx(0.3, abs=0.03)
    assert set(decode_audio(data, LIMITS, frozenset()).waves) == {48_000}


def raw(**members: bytes) -> RawSample:
    return RawSample(key="a", shard="s.tar", offset=0, members=members, fields=tuple(members))


def test_the_sound_track_is_the_audio_of_a_sample_without_an_audio_field() -> None:
    needs = Needs(modalities=frozenset({"audio", "video"}), sampling_rates=frozenset({16_000}))
    loud, silent = video(sound="aac", count=10), video(count=10)
    sample, failures = decode_sample(raw(mp4=loud), Reading(), needs)
    assert (sample.present, failures) == (frozenset({"video", "audio"}), ())
    assert sample.audio is not None
    assert sample.audio.seconds == pytest.approx(1.0, abs=0.05)
    sample, failures = decode_sample(raw(mp4=silent), Reading(), needs)
    assert (sample.present, failures, sample.audio) == (frozenset({"video"}), (), None)
    other = video("adts", count=0, sound="aac", seconds=0.5)
    sample, failures = decode_sample(raw(mp4=loud, aac=other), Reading(), needs)
    assert sample.audio is not None
    assert sample.audio.seconds == pytest.approx(0.5, abs=0.06)
    sample, failures = decode_sample(raw(mp4=loud), Reading(), Needs(modalities=frozenset({"audio"})))
    assert (sample.video, failures) == (None, ())
    assert sample.audio is not None
    sample, failures = decode_sample(raw(mp4=loud[:-100]), Reading(), needs)
    assert sample.present == {"video"}  # whether it has a sound is unknown
    assert [(failure.modality, failure.error) for failure in failures] == [("video", "DecodeError")]
    sample, failures = decode_sample(raw(mp4=loud[:-100]), Reading(), Needs(modalities=frozenset({"audio"})))
    assert sample.present == {"video", "audio"}
    assert [(failure.modality, failure.error) for failure in failures] == [("audio", "DecodeError")]
    sample, failures = decode_sample(raw(mp4=loud[:-100]), Reading(), Needs(modalities=frozenset({"image"})))
    assert failures == ()


def test_frames_by_the_option_then_the_model_then_8() -> None:
    data = video(count=10)

    def count(needed: int | None = None, **options: float) -> int:
        needs = Needs(modalities=frozenset({"video"}), frames=frozenset({needed} - {None}))
        sample, failures = decode_sample(raw(mp4=data), Reading(**options), needs)
        assert failures == ()
        assert sample.video is not None
        return len(sample.video.frames)

    assert (count(), count(16), count(16, frames=3), count(fps=5.0)) == (8, 16, 3, 5)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(pixels=64 * 48 - 1), r"64 x 48 pixels, at most 3,071 are decoded \(--max-pixels\)"),
        (Limits(seconds=2.9), r"3.0 seconds, at most 2.9 are decoded \(--max-seconds\)"),
        (Limits(frames=29), r"more than 29 frames \(--max-frames\)"),
        (Limits(streams=1), r"more than 1 streams.*\(--max-streams\)"),
        (Limits(decode_bytes=100_000), r"takes 0 MB to decode.*\(--max-decode-bytes\)"),
    ],
)
def test_limits(limits: Limits, message: str) -> None:
    with pytest.raises(LimitError, match=message):
        decode_video(video(sound="aac"), limits, 8)


def test_large_videos_wait_for_memory() -> None:
    with pytest.raises(LargeValueError) as caught:
        decode_video(video(), LIMITS, 8, max_bytes=1000)
    assert caught.value.nbytes < 1_000_000


@pytest.mark.parametrize("name", [*FORMATS, "aac"])
def test_a_truncated_file_is_an_error(name: str) -> None:
    data = video("adts", count=0, sound="aac", seconds=1.0) if name == "aac" else FORMATS[name]()
    decode = (lambda part: decode_audio(part, LIMITS, frozenset())) if name == "aac" else decode_it
    for size in (0, 3, 11, 40, len(data) // 3, len(data) // 2, len(data) - 9, len(data) - 1):
        with pytest.raises(DecodeError):
            decode(data[:size])


def decode_it(data: bytes) -> object:
    return decode_video(data, LIMITS, 8)


def test_damage_is_an_error_or_changes_no_frame() -> None:
    """Of any damaged byte the result is a failure or a video, never another exception."""
    rng = np.random.default_rng(0)
    failures = 0
    for data in (video(options=GOP), video("webm", "libvpx-vp9"), video("avi", "mpeg4")):
        for index, position in enumerate(rng.integers(0, len(data) - 4, 40).tolist()):
            damaged = bytearray(data)
            if index % 2:
                damaged[position] ^= 0xFF
            else:  # a size of 2 GiB, which FFmpeg reports as a lack of memory
                position = len(data) - 600 + position % 590
                damaged[position : position + 4] = b"\x7f\xff\xff\xff"
            for read in (decode_it, lambda value: video_header(value, LIMITS), lambda value: has_sound(value, LIMITS)):
                try:
                    read(bytes(damaged))
                except SampleError:
                    failures += 1
    assert failures > 20


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (PLAYLIST, "not a video of a known format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video of a known format"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomavc1" + b"\0\0\0\x20moov" + bytes(24), "MP4"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomavc1", "no index"),
        (b"\0\0\0\x04ftypisom", "a box of 4 bytes"),
        (b"\x1a\x45\xdf\xa3\x80" + PLAYLIST, "Matroska"),
        (b"\x1a\x45\xdf\xa3" + b"\xff" * 100, "Matroska"),
        (b"RIFF\x10\0\0\0AVI LIST" + bytes(12), "AVI"),
        (b"\0\0\0\x08free" * 100_001, "more than 100,000 boxes"),
    ],
)
def test_hostile_containers_are_failures(data: bytes, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        decode_video(data, LIMITS, 8)


def test_a_sound_is_not_a_video_and_a_silent_video_not_a_sound() -> None:
    with pytest.raises(DecodeError, match="MP4 without a video stream"):
        decode_video(video(count=0, sound="aac", seconds=1.0), LIMITS, 8)
    with pytest.raises(DecodeError, match="MP4 without a sound track"):
        decode_audio(video(count=4), LIMITS, frozenset())
    cover = io.BytesIO()
    with av.open(cover, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=48_000, layout="mono")
        art = container.add_stream("mjpeg", rate=1)
        art.width, art.height, art.pix_fmt, art.disposition = 64, 48, "yuvj420p", av.stream.Disposition.attached_pic
        container.mux(art.encode(av.VideoFrame.from_ndarray(picture(0), format="rgb24")))
        container.mux(art.encode())
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 48_000
        container.mux(track.encode(samples))
        container.mux(track.encode())
    with pytest.raises(DecodeError, match="without a video stream"):
        decode_video(cover.getvalue(), LIMITS, 8)
    assert decode_audio(cover.getvalue(), LIMITS, frozenset()).seconds > 0


def test_a_header_of_absurd_size_is_a_failure_or_ignored() -> None:
    data = bytearray(video(codec="mpeg4", count=4))
    entry = box(bytes(data), [b"stsd", b"mp4v"])
    struct.pack_into(">HH", data, entry + 8 + 24, 60_000, 60_000)
    try:
        result = decode_video(bytes(data), LIMITS, 2)
    except SampleError:
        return
    assert result.size == (64, 48)


def test_other_files_are_not_opened(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A data reference of an MP4 that names another file has no frames."""
    data = video(count=4, options=GOP)
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(data)
    at = box(data, [b"dref", b"url "])
    outside = data[:at] + b"\0\0\0\x0curl \0\0\0\0" + data[at + 12 :]  # flags 0: not in this file
    try:
        frames = decode_video(outside, LIMITS, 2).frames
    except DecodeError:
        return
    np.testing.assert_array_equal(frames[0], decode_video(data, LIMITS, 2).frames[0])


def test_videos_are_read_from_every_kind_of_input(tmp_path: Path) -> None:
    """Tars, zip archives, folders and tables yield the same frames; the frames of each are those of its file."""
    clips = {"a.mp4": video(count=10), "b.webm": video("webm", "libvpx", count=10, first_red=80)}
    (tmp_path / "t.tar").write_bytes(tars.write([*clips.items(), ("c.xyz", b"?")]))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name, data in clips.items():
            archive.writestr(name, data)
    folder, table = tmp_path / "folder", tmp_path / "table"
    folder.mkdir()
    table.mkdir()
    for name, data in clips.items():
        (folder / name).write_bytes(data)
        (table / name).write_bytes(data)
    (table / "rows.csv").write_text("key,video_path\n" + "".join(f"{name[0]},{name}\n" for name in clips))
    pq.write_table(pa.table({"key": ["a", "b"], "video": list(clips.values())}), tmp_path / "p.parquet")
    expected = {name[0]: decode_video(data, LIMITS, 3) for name, data in clips.items()}
    needs = Needs(modalities=frozenset({"video"}))
    for place in ("t.tar", "z.zip", "folder", "table/rows.csv", "p.parquet"):
        [unit] = plan_units(list_shards([str(tmp_path / place)]), [])
        batches = list(read_batches(unit, Reading(frames=3), needs, Windows()))
        assert not [failure for batch in batches for failure in batch.failures], place
        samples = {sample.key: sample for batch in batches for sample in batch.samples if sample.video is not None}
        assert samples.keys() == expected.keys(), place
        for key, sample in samples.items():
            assert sample.video is not None
            assert sample.video.times == expected[key].times
            np.testing.assert_array_equal(sample.video.frames, expected[key].frames)
        members = sum((Counter(batch.tally.members) for batch in batches), Counter())
        assert members == ({".xyz": 1} if place == "t.tar" else {})


def test_conditions_on_a_video_read_its_header() -> None:
    data = video(count=10)
    reading = Reading(cleaning=Cleaning(where=("video_seconds < 2", "video_width == 64")))
    sample, failures = decode_sample(raw(mp4=data), reading, Needs())
    assert failures == ()
    assert sample.video == video_header(data, LIMITS)
    wheres = [(text, compile_where(text)) for text in reading.cleaning.where]
    assert rejecting_expression(sample, wheres) is None


def test_the_report_shows_a_strip_of_frames_and_plays_the_sound(tmp_path: Path) -> None:
    tar = tmp_path / "t.tar"
    tar.write_bytes(tars.write([("a.mp4", video(sound="aac")), ("b.mp4", video()), ("c.mp4", video()[:-9])]))
    [unit] = plan_units(list_shards([str(tar)]), [])
    [source] = unit.inputs
    [batch] = read_batches(unit, Reading(), Needs(), Windows())
    keys = {sample.id: sample.key for sample in batch.samples}
    media = {keys[sample]: item for sample, item in load_media(keys, {str(tar): [source]}, Reading()).items()}
    assert media["a"].image_size == media["b"].image_size == (8 * 64, 48)
    assert media["a"].audio is not None
    assert (media["b"].audio, media["b"].notes) == (None, [])
    assert media["c"].image is None
    assert len(media["c"].notes) == 1
