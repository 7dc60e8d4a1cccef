"""The procedural corpus: it is reproducible, and images and audio match the captions."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmbeam.corpus.render import render_audio, render_image
from mmbeam.corpus.scene import (
    COLOURS,
    FORMS,
    KINDS,
    LOUDNESSES,
    PITCHES,
    POSITIONS,
    SIZES,
    TEMPI,
    VOCABULARY,
    Scene,
    Shape,
    Sound,
    generate_scenes,
    tag,
)
from mmbeam.errors import UsageError
from mmbeam.names import FUSION_MODALITIES, Modality

KEYS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
GOLDEN = Scene(
    seed=2026,
    index=8,
    shapes=(
        Shape(form="cross", colour="orange", size="small", position="on the left"),
        Shape(form="ring", colour="green", size="small", position="at the bottom right"),
    ),
    sound=Sound(kind="noise", pitch="high", tempo="slow", loudness="loud"),
    place="theatre",
    time="night",
)
GOLDEN_PIXELS = [
    [98.1, 91.6, 86.6, 84.1, 79.4, 76.9, 74.2, 70.6],
    [92.5, 87.7, 83.8, 81.3, 76.3, 73.5, 70.0, 65.4],
    [88.3, 86.5, 82.4, 79.0, 73.6, 70.8, 66.6, 61.1],
    [87.7, 120.5, 106.9, 76.1, 70.4, 67.5, 63.1, 57.6],
    [81.6, 113.8, 100.6, 69.9, 63.4, 60.2, 56.1, 50.8],
    [74.7, 72.5, 70.2, 67.0, 60.3, 81.8, 82.9, 50.4],
    [73.4, 69.0, 66.1, 63.2, 57.7, 82.1, 81.8, 47.9],
    [71.8, 65.4, 60.3, 58.4, 54.8, 53.5, 49.0, 38.8],
]
GOLDEN_WAVE = [-0.0002, 0.0255, 0.1697, 0.1608, 0.0011, -0.0009, -0.0565, 0.2269, -0.0002, 0.0014]
SUBSETS = [subset for size in range(1, 4) for subset in combinations(FUSION_MODALITIES, size)]


def one_shape(form: str = "circle", colour: str = "red", size: str = "large", position: str = "in the middle") -> Scene:
    return replace(Scene.draw(0, 0), shapes=(Shape(form, colour, size, position),))


def one_sound(kind: str, pitch: str = "medium", tempo: str = "steady", loudness: str = "loud", index: int = 0) -> Scene:
    return replace(Scene.draw(0, index), sound=Sound(kind, pitch, tempo, loudness))


def words(caption: str) -> list[str]:
    return caption.replace(",", " ,").replace(".", " .").split()


# --- scenes


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert Scene.draw(2026, 8) == GOLDEN
    assert tag(GOLDEN) == "PLACE: THEATRE; TIME: NIGHT"
    assert GOLDEN.caption() == (
        "a small orange cross on the left and a small green ring at the bottom right, "
        "with a loud slow high noise, in the theatre at night."
    )


def test_adjacent_seeds_differ() -> None:
    large = 2**64 - 1
    drawn = [Scene.draw(large, 0), Scene.draw(large - 1, 0), Scene.draw(0, large), Scene.draw(0, large - 1)]
    assert len({scene.caption() for scene in drawn}) == 4
    with pytest.raises(OverflowError):
        Scene.draw(0, 2**64)


def test_generate_scenes_starts_at_start() -> None:
    assert list(generate_scenes(3, start=5, count=2)) == [Scene.draw(3, 5), Scene.draw(3, 6)]
    assert len({scene.caption() for scene in generate_scenes(3, count=200)}) == 200


@pytest.mark.parametrize("subset", SUBSETS)
def test_caption_of_a_subset_of_modalities(subset: tuple[Modality, ...]) -> None:
    for scene in generate_scenes(11, count=50):
        caption = scene.caption(subset)
        assert caption == ", ".join(scene.clauses()[modality] for modality in subset) + "."
        for modality in set(FUSION_MODALITIES) - set(subset):
            assert scene.clauses()[modality] not in caption


def test_vocabulary_equals_the_words_of_captions() -> None:
    used = Counter(word for scene in generate_scenes(1, count=3000) for word in words(scene.caption()))
    assert set(used) == set(VOCABULARY)
    assert min(used.values()) > 30
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


@given(KEYS)
def test_shapes_are_in_reading_order_and_tag_matches_the_text_clause(key: tuple[int, int]) -> None:
    scene = Scene.draw(*key)
    places = [POSITIONS.index(shape.position) for shape in scene.shapes]
    assert places == sorted(set(places))
    assert {scene.place, scene.time} <= set(
        tag(scene).lower().replace("#", " ").replace(",", " ").replace(";", " ").split()
    )


def test_attributes_are_uniform() -> None:
    scenes = list(generate_scenes(5, count=4000))
    assert 0.45 < sum(len(scene.shapes) == 2 for scene in scenes) / len(scenes) < 0.55
    for values, options in (
        ([shape.form for scene in scenes for shape in scene.shapes], FORMS),
        ([shape.colour for scene in scenes for shape in scene.shapes], COLOURS),
        ([shape.size for scene in scenes for shape in scene.shapes], SIZES),
        ([scene.sound.kind for scene in scenes], KINDS),
        ([scene.sound.tempo for scene in scenes], TEMPI),
    ):
        counts = Counter(values)
        assert set(counts) == set(options)
        assert min(counts.values()) > 0.8 * len(values) / len(options)


# --- pixels


def test_golden_pixels() -> None:
    """Means over 8 x 8 cells of one image, which do not depend on the rounding of sines."""
    image = render_image(GOLDEN)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    means = image.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3, 4))
    np.testing.assert_allclose(means, GOLDEN_PIXELS, atol=0.6)


def test_image_does_not_depend_on_resolution() -> None:
    for scene in generate_scenes(4, count=20):
        small = render_image(scene, 64).astype(float)
        large = render_image(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(small - large).mean() < 4


def test_two_shapes_never_touch() -> None:
    """Each shape, painted alone, changes pixels that the other does not change."""
    pairs = [scene for scene in generate_scenes(6, count=300) if len(scene.shapes) == 2]
    for scene in pairs:
        ground = render_image(replace(scene, shapes=())).astype(int)
        first = render_image(replace(scene, shapes=scene.shapes[:1])).astype(int)
        both = render_image(scene).astype(int)
        touched_first, touched_second = ((a != b).any(axis=2) for a, b in ((ground, first), (first, both)))
        assert not (touched_first & touched_second).any(), scene.caption()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_shape_has_its_size_and_position(form: str, size: str) -> None:
    reach = {"small": (7.0, 10.5), "large": (10.0, 15.5)}[size]
    for cell, position in enumerate(POSITIONS):
        scene = one_shape(form, "white", size, position)
        ys, xs = np.nonzero(render_image(scene)[:, :, 1] > 180)
        centre = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
        assert centre == pytest.approx((15 + 17 * (cell // 3), 15 + 17 * (cell % 3)), abs=3)
        assert reach[0] <= (xs.max() - xs.min() + 1) / 2 <= reach[1]
        assert reach[0] <= (ys.max() - ys.min() + 1) / 2 <= reach[1]


def test_forms_and_colours_look_different() -> None:
    """At 64 pixels, small forms differ in at least 40 pixels, and colours by at least 60 levels."""
    forms = [render_image(one_shape(form, "white", "small")).mean(axis=2) > 150 for form in FORMS]
    assert min((a != b).sum() for a, b in combinations(forms, 2)) >= 40
    colours = [render_image(one_shape(colour=colour))[32, 32].astype(float) for colour in COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) >= 60


def test_shapes_contrast_with_the_background() -> None:
    for scene in generate_scenes(8, count=200):
        image = render_image(scene).astype(float)
        ground = render_image(replace(scene, shapes=())).astype(float)
        changed = np.linalg.norm(image - ground, axis=2)
        assert (changed > 60).sum() >= 60 * len(scene.shapes), scene.caption()


# --- audio


def test_golden_audio() -> None:
    wave = render_audio(GOLDEN)
    assert wave.shape == (8000,)
    assert wave.dtype == np.float32
    np.testing.assert_allclose(wave[400:8000:800], GOLDEN_WAVE, atol=1e-4)


def test_audio_does_not_depend_on_the_rate() -> None:
    for scene in generate_scenes(4, count=20):
        assert np.abs(render_audio(scene, 16000)[::2] - render_audio(scene, 8000)).max() < 0.005


def test_audio_never_clips_and_loudness_is_right() -> None:
    levels: dict[str, list[float]] = {name: [] for name in LOUDNESSES}
    for scene in generate_scenes(9, count=1000):
        wave = render_audio(scene)
        assert np.abs(wave).max() < 1
        levels[scene.sound.loudness].append(float(np.sqrt(np.square(wave).mean())))
    assert min(levels["loud"]) > 3 * max(levels["quiet"])


@pytest.mark.parametrize("kind", KINDS)
def test_pitches_do_not_overlap(kind: str) -> None:
    """Check the mean frequency in the middle, where a chirp crosses its pitch."""
    spans = {}
    for pitch in PITCHES:
        centroids = []
        for index in range(20):
            power = np.abs(np.fft.rfft(render_audio(one_sound(kind, pitch, index=index))[3000:5000])) ** 2
            centroids.append((power * np.arange(len(power)) * 4).sum() / power.sum())
        spans[pitch] = min(centroids), max(centroids)
    assert spans["low"][1] * 1.4 < spans["medium"][0]
    assert spans["medium"][1] * 1.4 < spans["high"][0]


def test_chirps_rise_and_fall() -> None:
    for pitch in PITCHES:
        for kind, sign in {"rising chirp": 1, "falling chirp": -1, "tone": 0}.items():
            wave = render_audio(one_sound(kind, pitch))
            crossings = [np.diff(np.signbit(part)).sum() for part in (wave[:2000], wave[-2000:])]
            assert np.sign(round((crossings[1] - crossings[0]) / crossings[0], 1)) == sign


@pytest.mark.parametrize(("tempo", "pulses"), [("steady", {0, 1}), ("slow", {2, 3}), ("fast", {6, 7, 8, 9})])
@pytest.mark.parametrize("kind", KINDS)
def test_tempo_is_the_number_of_pulses(kind: str, tempo: str, pulses: set[int]) -> None:
    for index in range(20):
        power = np.square(render_audio(one_sound(kind, "medium", tempo, index=index)))
        level = power.reshape(50, 160).mean(axis=1)  # every 20 ms
        open_now = np.concatenate([[False], level > level.max() / 50])
        assert (np.diff(open_now.astype(int)) == 1).sum() in pulses


def test_small_images_and_low_rates_are_rejected() -> None:
    with pytest.raises(UsageError, match="expected at least 32"):
        render_image(Scene.draw(0, 0), 16)
    with pytest.raises(UsageError, match="expected at least 8000"):
        render_audio(Scene.draw(0, 0), 4000)


@given(KEYS, st.sampled_from([32, 33, 64, 96]), st.sampled_from([8000, 11025, 16000]))
def test_any_scene_renders(key: tuple[int, int], side: int, rate: int) -> None:
    scene = Scene.draw(*key)
    image, wave = render_image(scene, side), render_audio(scene, rate)
    assert image.shape == (side, side, 3)
    assert wave.shape == (rate,)
    assert np.isfinite(wave).all()
    np.testing.assert_array_equal(image, render_image(scene, side))
    np.testing.assert_array_equal(wave, render_audio(scene, rate))
