"""POSE_KEYPOINT from anywhere, malformed and extreme: it is drawn and aligned, or refused in one sentence."""

import json
import random
import re

import numpy as np
import pytest
import torch

PARTS = ("pose_keypoints_2d", "foot_keypoints_2d", "face_keypoints_2d", "hand_left_keypoints_2d",
         "hand_right_keypoints_2d")
NUMBERS = (0, -1, -1e9, 1e9, 1e-300, 1e300, 10 ** 400, float("nan"), float("inf"), -float("inf"), None, True, "7", "x",
           [], [1, 2], {}, 0.5, 1.5, np.float32(3), np.zeros(2))
THINGS = (None, 0, 1.5, float("nan"), True, "", "text", b"bytes", [], {}, [[]], [None], [{}], ["text"], {"a": 1},
          object(), np.zeros(0), np.ones((3, 4)), torch.ones(54), (1, 2, 3))
SIDES = (0, 1, 64, 0.5, 640.7, -480, 16385, 10 ** 9, 1e300, 10 ** 400, float("nan"), float("inf"), None, True,
         "512", "x", [], {}, np.int64(512), np.ones(2))
INPUTS = ("keypoints", "reference", "width", "height", "colors", "stick_width")


def some_part(frames: list, draw: random.Random) -> tuple[dict, str]:
    """A person that is there, and a part of it that is."""
    people = [person for frame in frames if isinstance(frame, dict) for person in some_list(frame.get("people"))
              if isinstance(person, dict) and any(isinstance(person.get(part), list) for part in PARTS)]
    person = draw.choice(people or [{PARTS[0]: [0.0] * 54}])
    return person, draw.choice([part for part in PARTS if isinstance(person.get(part), list)])


def some_list(value) -> list:
    return value if isinstance(value, list) else []


def some_frame(frames: list, draw: random.Random) -> dict:
    return draw.choice([frame for frame in frames if isinstance(frame, dict)] or [{}])


def a_number_is_another(frames, draw):
    person, part = some_part(frames, draw)
    for _ in range(draw.choice((1, 5))):
        if person[part]:
            person[part][draw.randrange(len(person[part]))] = draw.choice(NUMBERS)


def all_coordinates_are_one(frames, draw):
    person, part = some_part(frames, draw)
    person[part] = [draw.choice(NUMBERS)] * len(person[part])


def it_is_scaled(frames, draw):
    person, part = some_part(frames, draw)
    factor = draw.choice((0, -1, 1e-9, 1e3, 1e9, 1e200))
    person[part] = [number * factor for number in person[part] if isinstance(number, float)]


def a_part_has_another_count(frames, draw):
    person, part = some_part(frames, draw)
    person[part] = [draw.uniform(0, 500) for _ in range(draw.choice((1, 2, 3, 51, 53, 54, 75, 204, 399)))]


def a_part_is_something_else(frames, draw):
    person, part = some_part(frames, draw)
    person[part] = draw.choice((*THINGS, np.asarray(person[part], object), [person[part]]))


def a_part_is_missing(frames, draw):
    person, part = some_part(frames, draw)
    del person[part]


def a_person_is_something_else(frames, draw):
    some_frame(frames, draw)["people"] = [draw.choice(THINGS) for _ in range(draw.choice((1, 2)))]


def people_are_something_else(frames, draw):
    some_frame(frames, draw)["people"] = draw.choice(THINGS)


def there_are_12_people(frames, draw):
    frame = some_frame(frames, draw)
    frame["people"] = some_list(frame.get("people"))[:1] * 12


def there_is_nobody(frames, draw):
    for frame in frames:
        if isinstance(frame, dict):
            frame["people"] = []


def the_canvas_is_another(frames, draw):
    for frame in draw.choice((frames, frames[:1])):
        if isinstance(frame, dict):
            frame[draw.choice(("canvas_width", "canvas_height"))] = draw.choice(SIDES)


def the_canvas_is_missing(frames, draw):
    for frame in draw.choice((frames, frames[:1])):
        if isinstance(frame, dict):
            frame.pop("canvas_width", None)


def a_frame_is_something_else(frames, draw):
    frames[draw.randrange(len(frames))] = draw.choice(THINGS)


def these_are_fractions(frames, draw):
    for frame in frames:
        for person in some_list(frame.get("people")) if isinstance(frame, dict) else []:
            for part in PARTS if isinstance(person, dict) else ():
                person[part] = [number / 640 if isinstance(number, float) else number
                                for number in some_list(person.get(part))]


def points_are_entries(frames, draw):
    person, part = some_part(frames, draw)
    numbers = person[part]
    person[part] = [draw.choice((numbers[i:i + 3], numbers[i:i + 3], None, [])) for i in range(0, len(numbers), 3)]


def entries(value) -> list[tuple]:
    """(holder, key) of all that a nested value holds."""
    keys = {dict: list, list: lambda items: range(len(items))}.get(type(value), lambda _: ())(value)
    return [found for key in keys for found in ((value, key), *entries(value[key]))]


def an_entry_is_something_else(frames, draw):
    holder, key = draw.choice(entries(frames))
    fate = draw.choice(("gone", "renamed", "cut", "other"))
    if fate == "other" or not isinstance(holder[key], list):
        holder[key] = draw.choice(THINGS)
    elif fate == "cut":
        del holder[key][draw.randrange(len(holder[key]) + 1):]
    else:
        value = holder.pop(key)
        if fate == "renamed" and isinstance(holder, dict):
            holder[draw.choice((*PARTS, "animals", "people", "x"))] = value


FAULTS = (a_number_is_another, all_coordinates_are_one, it_is_scaled, a_part_has_another_count,
          a_part_is_something_else, a_part_is_missing, a_person_is_something_else, people_are_something_else,
          there_are_12_people, there_is_nobody, the_canvas_is_another, the_canvas_is_missing,
          a_frame_is_something_else, these_are_fractions, points_are_entries, an_entry_is_something_else)


@pytest.fixture(scope="module")
def forms(goldens) -> list[list]:
    """Two frames of a person as SDPose, DWPose and OpenPose nodes give them."""
    (frame,) = json.loads((goldens.folder / "pose" / "one_person_576x1024.json").read_text(), parse_int=float)
    scored = {part: np.reshape(numbers, (-1, 3)) for part, numbers in frame["people"][0].items()}
    found = {part: points[:, 2:] >= 0.3 for part, points in scored.items()}
    sure = {part: found[part] * (points * (1, 1, 0) + (0, 0, 1)) for part, points in scored.items()}
    fractions = {part: points / (576, 1024, 1) for part, points in sure.items()}

    body, _, face, *hands = PARTS
    sure[face] = sure[face][:0]
    fractions[face] = fractions[face][found[face][:, 0]]
    for hand in hands:
        fractions[hand][~found[hand][:, 0]] = -1 / 576, -1 / 1024, 1
    people = [{part: points.ravel().tolist() for part, points in parts.items()} for parts in (scored, sure, fractions)]
    return [[{**frame, "people": [person]}] * 2 for person in people]


def malformed(forms: list[list], draw: random.Random):
    """The frames of one form with a fault or two; every tenth is something else altogether."""
    if draw.random() < 0.1:
        return draw.choice(THINGS)
    frames = json.loads(json.dumps(draw.choice(forms)))
    for fault in draw.choices(FAULTS, k=draw.choice((1, 1, 1, 2))):
        fault(frames, draw)
    return draw.choice((frames, frames, frames, tuple(frames), frames[0]))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("seed", range(100))
def test_malformed_keypoints_are_drawn_and_aligned_or_refused_in_one_sentence(run, forms, seed):
    draw = random.Random(seed)
    keypoints, whole = malformed(forms, draw), forms[0][:1]
    width, height = draw.choice(((0, 0), (64, 48), (1, 4096), (320, 0)))
    settings = {"width": width, "height": height, "colors": draw.choice(("controlnext", "openpose", "openpose"))}
    if draw.random() < 0.2:
        settings[draw.choice(INPUTS[2:])] = draw.choice(SIDES)
    jobs = {"keypoints": lambda: [run("ControlNeXtDrawPose", keypoints=keypoints, **settings)]}
    for name, inputs in (("keypoints", (keypoints, whole)), ("reference", (whole, keypoints))):
        def align(inputs=inputs):
            aligned = run("ControlNeXtAlignPose", keypoints=inputs[0], reference=inputs[1])
            return [run("ControlNeXtDrawPose", keypoints=aligned, width=64, height=64, colors="openpose")]
        jobs[f"{name} aligned"] = align
    for job in jobs.values():
        try:
            (images,) = job()
        except ValueError as error:
            assert re.fullmatch(rf"({'|'.join(INPUTS)})[ ,:].{{10,250}}\.", str(error)), repr(error)
            continue
        assert images.ndim == 4 and ((images >= 0) & (images <= 1)).all()
