"""From a sample's annotation to its tensors, and how a response to it is scored.

Top to bottom: annotation record -> Sample -> sampled frames and their times -> patches -> Visual,
read in separate processes by VideoReader -> Prompt; then the rewards; then the built-in task.
Of Qwen2.5-VL this file only knows how frames become patches and where visual tokens go in a prompt.
It needs neither the model's weights nor transformers: a tokenizer is handed in. Two sampled frames
make one visual frame, the model's unit of time. Paper and supplement: arXiv 2602.23823.
"""
import copy
import csv
import gc
import json
import logging
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Callable, Iterable, Iterator

import decord
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]  # (t, h, w): visual frames, rows and columns of patches
Span = tuple[float, float]  # (start, end) in seconds


class DataError(ValueError):
    """Data that cannot be used. The message is one line; for annotations it names file, record,
    field and fix."""


class VideoError(RuntimeError):
    """A video or picture that cannot be read: one line with the reason."""


# ------------------------------------------------------------------------------------ annotations

@dataclass(slots=True)  # slots: data sets have some 100,000 of these
class Sample:
    """One question. Times are in seconds."""
    id: str  # "train.json:12", records counted from 0
    question: str
    options: list[str]  # words without letters; [] if there is no choice
    answer: str  # "A".. for choice and grounding, a number as text for number
    kind: str  # "choice", "number", "grounding" (choice with time spans) or "description"
    video: str | None = None
    image: str | None = None
    missing: list[str] = field(default_factory=list)  # paths not found; video or image is None
    duration: float | None = None  # as annotated, for grounding
    spans: list[Span] = field(default_factory=list)  # where clues to the answer are
    group: str = ""  # for tables by task
    crucial_frame: int | None = None  # built-in task: the visual frame that shows the answer
    bounds: Span | None = None  # the stretch of the video that is asked about
    by_name: bool = True  # whether a file that is not at its path may be looked up by its name
    overall: str = "questions"  # what a benchmark's overall mean is over: "questions" or "tasks"


def clean(value) -> str:
    """The text without spaces at its ends and without lone surrogates; "" if it is no text."""
    if not isinstance(value, str):
        return ""
    return (value if value.isascii() else value.encode(errors="ignore").decode()).strip()


@dataclass(slots=True)
class Record:
    """The fields of one annotation record. Each is checked when it is read."""
    id: str  # "train.json:12"
    stem: str  # of the file's name, "train"
    fields: dict

    def check(self, condition, name: str, fix: str) -> None:
        if not condition:
            raise DataError(f"record {self.id}, field {name!r}: {fix}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.fields.get(name)
        text = clean(str(value) if type(value) in (int, float) else value) or default
        self.check(text is not None, name, "missing or no text; write a non-empty string")
        return text

    __getitem__ = text

    def number(self, name: str) -> float:
        value = parse_number(self[name])
        self.check(value is not None, name, "write a number")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings, each made one line."""
        values = self.fields.get(name)
        self.check(isinstance(values, list), name, "missing or no list; write a list of strings")
        texts = [" ".join(clean(value).split()) for value in values]
        self.check(all(texts), name, "has an entry that is no text; write non-empty strings")
        return texts

    def options(self, name: str) -> list[str]:
        """The options' words. Letters before them are dropped if every option has its own."""
        texts = self.texts(name)
        count = len(texts)
        self.check(2 <= count <= 26, name, f"{count} options; a choice needs 2 to 26")
        words = []
        for own_letter, text in zip(LETTERS, texts):
            letter, rest = split_letter(text)
            if letter != own_letter or not rest:
                return texts
            words.append(rest)
        return words

    def answer(self, name: str) -> str:
        """The text, or what stands in its <answer> element."""
        text = self.text(name)
        return element_text(text, "answer") or text

    def letter(self, name: str, options: list[str], counted: bool = False) -> str:
        """The letter of the option that the field names: by letter, by words or, if counted, by
        index from 0."""
        answer = self.answer(name)
        if counted and answer in list("0123456789")[:len(options)]:
            return LETTERS[int(answer)]
        letter = match_choice(answer, options)
        self.check(letter, name, f"{answer[:60]!r} names none of the {len(options)} options; write "
                   "a letter")
        return letter


# The readers of the formats: record -> Sample, or None if no rule can score a response to it.
# Sample.video and Sample.image are the record's paths; load_samples looks the files up.

def read_video_r1(record: Record) -> Sample | None:
    """Video-R1, Perception Test as released in the same form, and the built-in task."""
    problem_type = record["problem_type"]
    if problem_type in ("OCR", "free-form"):
        return None
    if problem_type == "multiple choice":
        kind, options = "choice", record.options("options")
        answer = record.letter("solution", options)
    else:
        record.check(problem_type in ("numerical", "regression"), "problem_type",
                     "use multiple choice, numerical, regression, OCR or free-form")
        kind, options = "number", []
        answer = record.answer("solution")
        if parse_number(answer) is None or re.search(r"\s\d", answer):  # "1 1/2", "3 x 10^5"
            return None
    medium = record["data_type"]
    record.check(medium in ("video", "image"), "data_type", "write video or image")
    crucial = record.fields.get("crucial_frame")
    counted = crucial is None or type(crucial) is int and crucial >= 0
    record.check(counted, "crucial_frame", "write an integer, counted from 0")
    return Sample(record.id, record["problem"], options, answer, kind, crucial_frame=crucial,
                  group=record.text("data_source", problem_type), **{medium: record["path"]})


def counted_choice(record: Record, options: list[str], answer_field: str, group_field: str,
                   kind: str = "choice", **fields) -> Sample:
    """A choice whose answer is the option's index from 0."""
    return Sample(record.id, record["question"], options,
                  record.letter(answer_field, options, counted=True), kind,
                  group=record.text(group_field, ""), **fields)


def read_next_gqa(record: Record) -> Sample:
    options = record.options("options")
    try:
        # A sum is a float, and a TypeError for text.
        spans = [(0.0 + start, 0.0 + end) for start, end in record.fields.get("time_clues")]
    except (TypeError, ValueError, OverflowError):
        spans = []
    ordered = spans and all(start <= end < 1e9 for start, end in spans)
    record.check(ordered, "time_clues", "write [[start, end], ...] in seconds, start first")
    duration = record.number("duration")
    record.check(duration > 0, "duration", "write the video's seconds, above 0")
    return counted_choice(record, options, "answer", "qtype", kind="grounding",
                          video=record["video_path"], duration=duration, spans=spans)


def read_seed_bench_r1(record: Record) -> Sample:
    if record.fields.get("golden_choice_idx"):
        options = [record[f"choice_{letter}"] for letter in "abcd"]
        answer = record.letter("golden_choice_idx", options)
    else:
        options, answer = shuffled_options(record)
    source = record["video_source"]
    progress = record.fields.get("task_progress_metadata")
    record.check(isinstance(progress, list), "task_progress_metadata", "no list; write one")
    # At the start of a task there is a picture only.
    video = f"videos/{source}/{record['video_basename']}" if progress else None
    level = re.search("L[123]", record.stem)
    return Sample(record.id, record["question"], options, answer, "choice", video=video,
                  image=f"images/{source}/{record['current_observation_basename']}",
                  group=level[0] if level else source)


def shuffled_options(record: Record) -> tuple[list[str], str]:
    """(options, answer) of a SEED-Bench-R1 training record, which lists incorrect answers only.

    The shuffle follows from the record's own content, so it is the same in every run and file.
    """
    correct = " ".join(record["answer"].split())
    incorrect = [words for words in dict.fromkeys(record.texts("negative_answers"))
                 if plain_words(words) != plain_words(correct)]
    count = len(incorrect)
    record.check(count >= 3, "negative_answers", f"{count} incorrect answers; write at least 3")
    rng = random.Random(f"{record['question']}\n{correct}")
    options = [correct, *rng.sample(incorrect, 3)]
    rng.shuffle(options)
    return options, LETTERS[options.index(correct)]


def read_perception_test(record: Record) -> Sample | None:
    if "problem" in record.fields:  # in Video-R1's form; here only with benchmark="perception_test"
        return read_video_r1(record)
    return counted_choice(record, record.options("options"), "answer_id", "area",
                          video=f"{record['video_name']}.mp4")


def read_next_qa(record: Record) -> Sample:
    options = [record[f"a{i}"] for i in range(5)]
    return counted_choice(record, options, "answer", "type", video=f"{record['video']}.mp4")


# Where MVBench keeps the videos of its 20 tasks. Two tasks may hold different videos of one name.
MVBENCH_FOLDERS = {
    "clevrer/video_validation": "object_existence moving_direction moving_count moving_attribute "
                                "counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "ssv2_video": "action_antonym", "Moments_in_Time_Raw/videos": "fine_grained_action",
    "FunQA_test/test": "unexpected_action", "sta/sta_video": "action_localization",
    "scene_qa/video": "scene_transition", "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation", "tvqa/frames_fps3_hq": "episodic_reasoning"}
MVBENCH_PROMPT = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\nQuestion: ")


def read_mvbench(record: Record) -> Sample:
    options = record.options("candidates")
    words = " ".join(record["answer"].split())  # no letter, though "A" may be an option's words
    record.check(words in options, "answer", f"{words[:60]!r} is none of the candidates")
    task = record.text("task", record.stem)
    folders = [folder for folder, tasks in MVBENCH_FOLDERS.items() if task in tasks.split()]
    bounds = None
    if record.fields.get("start") is not None:
        bounds = record.number("start"), record.number("end")
    return Sample(record.id, MVBENCH_PROMPT + record["question"], options,
                  LETTERS[options.index(words)], "choice", group=task, by_name=False,
                  video=f"video/{'/'.join(folders)}/{record['video']}", bounds=bounds)


def read_vsi_bench(record: Record) -> Sample:
    if record.fields.get("options"):
        kind, options = "choice", record.options("options")
        answer = record.letter("ground_truth", options)
    else:
        kind, options = "number", []
        answer = record["ground_truth"]
        record.number("ground_truth")  # checks that it is one
    return Sample(record.id, f"These are frames of a video.\n{record['question']}", options,
                  answer, kind, video=f"{record['dataset']}/{record['scene_name']}.mp4",
                  group=record.text("question_type", ""), overall="tasks")


FORMATS = {  # name: (a field that only this format has, its reader)
    "video_r1": ("problem", read_video_r1),
    "next_gqa": ("time_clues", read_next_gqa),
    "seed_bench_r1": ("current_observation_basename", read_seed_bench_r1),
    "perception_test": ("answer_id", read_perception_test),
    "next_qa": ("a0", read_next_qa),
    "mvbench": ("candidates", read_mvbench),
    "vsi_bench": ("scene_name", read_vsi_bench),
}


def read_sample(record: Record, benchmark: str | None) -> Sample | None:
    """By the benchmark's reader, or by that of the format which the record's fields tell."""
    for name, (mark, reader) in FORMATS.items():
        if name == benchmark or benchmark is None and mark in record.fields:
            return reader(record)
    marks = ", ".join(repr(mark) for mark, _ in FORMATS.values())
    raise DataError(f"record {record.id}: no known format; those have one of the fields {marks}")


def read_records(path: Path) -> Iterator[dict]:
    """The records of a .json, .jsonl or .csv file. Raises DataError."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                records = csv.DictReader(file)
            elif path.suffix == ".json":
                records = json.load(file)
            else:
                records = map(json.loads, filter(str.strip, file))
            if isinstance(records, dict):  # Perception Test: {video: {"mc_question": [..]}, ...}
                records = ({"video_name": name, **question} for name, video in records.items()
                           for question in video["mc_question"])
            for fields in records:
                yield {**fields}  # a TypeError unless it is a record
                number += 1
    except Exception as error:  # of the file system, the encoding, JSON, CSV or the structure
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read from record {number} on ({cause}); give a list of "
                        "records in UTF-8: a complete JSON (.json), one JSON per line (.jsonl) or "
                        "a .csv") from None


class FileFinder:
    """Finds the files of a data set, which may be or lie behind symbolic links."""

    def __init__(self, root):
        self.root = root and str(Path(root))
        self.found_by_name = {}  # path as annotated -> place

    @cached_property
    def path_of_name(self) -> dict[str, str | None]:
        """Name -> path for the whole tree, walked once, when a file is first not at its path."""
        paths, walked = {}, set()
        for folder, folders, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in walked:  # by a link, perhaps to a folder above
                folders.clear()
                continue
            walked.add(real)
            for name in folders + files:
                place = os.path.join(folder, name)
                if os.path.exists(place):  # not of a broken link
                    # Neither of two files with one name: they may be different videos.
                    paths[name] = None if name in paths else place
        return paths

    def find(self, path: str, folder: str, by_name: bool) -> str | None:
        """The longest tail of the path that exists below the root, or else the only file there that
        has its name. Without a root: from the annotation's folder, as written."""
        if self.root is None:
            place = os.path.join(folder, path)
            return place if os.path.exists(place) else None
        names = [name for name in path.split("/") if name not in ("", ".", "..")]
        for start in range(len(names) - (not by_name)):  # the last tail is the name alone
            place = f"{self.root}/{'/'.join(names[start:])}"
            if os.path.exists(place):
                break
        else:
            place = self.path_of_name.get(names[-1]) if by_name and names else None
        if place and not place.endswith(f"/{'/'.join(names[-2:])}"):
            self.found_by_name[path] = place  # in a folder of another name
        return place

    def locate(self, sample: Sample, folder: str) -> None:
        """Replaces the sample's paths by those of its files; what is not found is missing."""
        for medium in ("video", "image"):
            path = getattr(sample, medium)
            if path is not None:
                place = self.find(path, folder, sample.by_name)
                setattr(sample, medium, place)
                if place is None:
                    sample.missing.append(path)


def load_samples(path, video_root=None, benchmark: str | None = None) -> list[Sample]:
    """Reads annotations of the formats in FORMATS, for training and benchmarks.

    path: one .json, .jsonl or .csv (NExT-QA) file, or several joined by commas.
    video_root: a video is looked up there as written, then by its longest existing tail, then by
        its name. None: as written, from the annotation's folder. Files that are not found are
        listed in `Sample.missing`.
    benchmark: a key of FORMATS. None: the fields of each record tell the format.
    Records that no rule can score (OCR, free-form, numerical without a number) are left out, and
    their number is logged. Raises DataError, one line, on the first record that cannot be used.
    """
    if video_root is not None and not os.path.isdir(video_root):
        raise DataError(f"{video_root}: no such folder; give the folder of the videos")
    files = dict.fromkeys(Path(name.strip()) for name in str(path).split(","))
    finder = FileFinder(video_root)
    samples = []
    left_out = Counter()
    gc.disable()  # it would go through all the samples again and again, a quarter of the time
    try:
        for file in files:
            name = file.name if len(files) == 1 else str(file)  # ids stay unique
            folder = str(file.parent)
            for number, fields in enumerate(read_records(file)):
                sample = read_sample(Record(f"{name}:{number}", file.stem, fields), benchmark)
                if sample is None:  # from read_video_r1 only
                    left_out[fields["problem_type"]] += 1
                    continue
                finder.locate(sample, folder)
                samples.append(sample)
    finally:
        gc.enable()
    warning = logging.getLogger("appo").warning
    if left_out:
        warning(f"{left_out.total()} records left out, no rule can score them: {dict(left_out)}")
    if finder.found_by_name:
        wanted, place = next(iter(finder.found_by_name.items()))
        warning(f"{len(finder.found_by_name)} files were found by their name only, the first "
                f"{place!r} for {wanted!r}; are they the same?")
    if not samples:
        raise DataError(f"{path}: no record that can be scored; give multiple choice or numbers")
    return samples


def with_files(samples: list[Sample], source: str, skip_missing: bool,
               announce: bool = True) -> list[Sample]:
    """The samples whose files are there. Missing files are listed, and without skip_missing they
    are a DataError."""
    missing = list(dict.fromkeys(path for sample in samples for path in sample.missing))
    present = [sample for sample in samples if not sample.missing]
    title = f"{source}: {len(missing)} files are missing"
    if missing and announce:
        print(f"{title}:", *map(repr, missing[:10]), sep="\n  ", file=sys.stderr)
    if missing and not (skip_missing and present):
        raise DataError(f"{title}, the first {missing[0]!r}; fix --video_root, or leave some "
                        "samples out with --skip_missing")
    return present


# ------------------------------------------------------------------- sampled frames and their times

def frame_indices(count: int, rate: float, fps: float, max_frames: int,
                  bounds: Span | None = None) -> tuple[list[int], float]:
    """The frames to sample of a video of `count` frames at `rate` per second
    -> (n indices, seconds covered).

    n = the largest even number not above min(max(D * fps, 4), max_frames, count), at least 2, as
    in Qwen's own utility: 22 s at fps 1 and max_frames 16 -> 16 sampled frames, 8 visual frames of
    2 * 22 / 16 = 2.75 s. bounds: (start, end) in seconds narrow the video first. Raises ValueError
    if they lie outside, and for a video without frames or a usable rate.
    """
    if not (count > 0 and 0 < rate < math.inf):
        raise ValueError(f"{count} frames at {rate} per second")
    first, last = 0, count - 1
    if bounds is not None:
        first = max(0, round(bounds[0] * rate))
        last = min(last, round(bounds[1] * rate))
        if first > last:
            raise ValueError(f"bounds {bounds[0]:g} to {bounds[1]:g} s lie outside the video")
    count = last - first + 1
    duration = count / rate
    limit = int(min(max(duration * fps, 4), max_frames, count))
    n = max(2, limit // 2 * 2)
    return np.linspace(first, last, n).round().astype(int).tolist(), duration


def read_picture(path: str) -> Tensor:
    """uint8 (3, H, W). Raises what Pillow raises."""
    from PIL import Image  # for pictures only
    with Image.open(path) as image:
        if image.has_transparency_data:  # on white, as Qwen's own utility
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def pictures_in(folder: str) -> list[str]:
    endings = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
    paths = [os.path.join(folder, name) for name in os.listdir(folder)
             if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(paths, key=lambda path: (len(path), path))  # 9.png comes before 10.png


def decoded_frames(video: decord.VideoReader, indices: list[int],
                   seekable: bool) -> Iterator[Tensor]:
    """Frames uint8 (3, H, W) at ascending indices."""
    position = 0  # of the next frame that is decoded
    for index in indices:
        if seekable and index > position:
            video.seek_accurate(index)  # decodes on from here, or from the key frame before
            position = index
        while position <= index:
            frame = video.next().asnumpy()
            position += 1
        yield torch.from_numpy(frame).permute(2, 0, 1)


def sample_frames(path: str, fps: float, max_frames: int,
                  bounds: Span | None = None) -> tuple[Iterator[Tensor], float]:
    """Evenly spaced frames by `frame_indices`, from a video or from a folder of pictures, which
    count as 3 per second -> (frames uint8 (3, H, W), D seconds).

    The frames are decoded one by one, so that only one full-size frame need be in memory. Raises
    ValueError, and what decord, Pillow and torch raise.
    """
    if os.path.isdir(path):
        pictures = pictures_in(path)
        indices, duration = frame_indices(len(pictures), 3.0, fps, max_frames, bounds)
        return (read_picture(pictures[index]) for index in indices), duration
    if path.lower().endswith((".ts", ".mts", ".m2ts")):
        raise ValueError("decord reads wrong frames of MPEG-TS; convert it to mp4")
    video = decord.VideoReader(path, num_threads=1)
    rate = video.get_avg_fps()
    indices, duration = frame_indices(len(video), rate, fps, max_frames, bounds)
    # Other formats may lack the times by which decord seeks: it would go to a wrong place.
    seekable = path.lower().endswith((".mp4", ".m4v", ".mov", ".mkv", ".webm"))
    return decoded_frames(video, indices, seekable), duration


# ---------------------------------------------------------------------------------------- patches

PATCH = 14  # pixels of a patch's side
MERGE = 2  # patches of a visual token's side
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_OF_CHANNEL = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
STD_OF_CHANNEL = torch.tensor(PIXEL_STD).view(3, 1, 1)


def picture_settings(min_pixels: int, max_pixels: int) -> dict:
    """How this file makes patches, as a preprocessor_config.json tells other tools."""
    return {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": min_pixels,
            "max_pixels": max_pixels, "patch_size": PATCH, "merge_size": MERGE,
            "temporal_patch_size": 2, "image_mean": list(PIXEL_MEAN),
            "image_std": list(PIXEL_STD)}


def resized_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen's smart resize: the nearest multiples of 28, scaled down to at most max_pixels or up to
    at least min_pixels.

    Example: 240 x 426 with both limits 50,176 -> 168 x 280, 60 tokens. (Scaled down, it may end
    below the minimum.) Raises ValueError if one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is over 200 times the other")
    unit = PATCH * MERGE
    sides = np.array([height, width])
    area = height * width
    rounded = np.round(sides / unit) * unit
    if rounded.prod() > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        rounded = np.maximum(np.floor(sides / shrink / unit), 1) * unit
    elif rounded.prod() < min_pixels:
        grow = math.sqrt(min_pixels / area)
        rounded = np.ceil(sides * grow / unit) * unit
    return int(rounded[0]), int(rounded[1])


def frames_to_patches(frames: Iterable[Tensor], min_pixels: int,
                      max_pixels: int) -> tuple[Tensor, Grid]:
    """Frames as the vision tower of Qwen2.5-VL takes them.

    frames: uint8 (T, 3, H, W), RGB, or an iterable of T frames, so that only one full-size frame
    need be in memory; an odd T repeats the last frame. min_pixels, max_pixels: limits of ONE
    frame's area -> (patches float32 (t*h*w, 1176), (t, h, w)) with t = ceil(T / 2), h and w in
    patches of 14 pixels: 16 frames of 224 x 224 -> (2048, 1176), (8, 16, 16), 512 tokens. Raises
    ValueError if one side is over 200 times the other.
    """
    resized = []
    for frame in frames:
        size = resized_size(*frame.shape[1:], min_pixels, max_pixels)
        # On uint8, as Qwen's processor: on floats it would differ by up to 0.15 in the patches.
        resized.append(F.interpolate(frame[None], size=size, mode="bicubic", antialias=True))
    if len(resized) % 2:
        resized.append(resized[-1])  # a visual frame is two sampled frames
    x = (torch.cat(resized).float() / 255 - MEAN_OF_CHANNEL) / STD_OF_CHANNEL  # (2t, 3, 14h, 14w)
    t, h, w = len(x) // 2, x.shape[2] // PATCH, x.shape[3] // PATCH
    x = x.reshape(t, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    # The 4 patches of a visual token come together: (t, h/2, w/2, 2, 2, 3, 2 frames, 14, 14).
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, 3 * 2 * PATCH * PATCH), (t, h, w)  # (t*h*w, 1176)


def patches_to_frames(patches: Tensor, grid: Grid) -> Tensor:
    """The inverse of `frames_to_patches`, apart from resizing: (t*h*w, 1176), (t, h, w) -> uint8
    (2t, 3, 14h, 14w)."""
    t, h, w = grid
    x = patches.reshape(t, h // MERGE, w // MERGE, MERGE, MERGE, 3, 2, PATCH, PATCH)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)  # (t, 2 frames, 3, h/2, 2, 14, w/2, 2, 14)
    x = x.reshape(2 * t, 3, h * PATCH, w * PATCH)
    x = (x * STD_OF_CHANNEL + MEAN_OF_CHANNEL) * 255
    return x.round().clamp(0, 255).to(torch.uint8)


def mask_patches(patches: Tensor, grids: list[Grid],
                 rng: np.random.Generator) -> Tensor:
    """PAPO's mask (arXiv 2507.06448): a copy with each 14 x 14 patch black with probability 0.6.

    patches: (sum of t*h*w, 1176) of the grids (t, h, w), one after the other. The same positions
    are black in all frames of a video: with (2, 2, 2), patches 1 and 5 share their fate.
    """
    black = -MEAN_OF_CHANNEL / STD_OF_CHANNEL  # pixel value 0
    black = black.expand(3, 2 * PATCH, PATCH).flatten()  # (1176,)
    blackened = [torch.from_numpy(rng.random(h * w) < 0.6).repeat(t) for t, h, w in grids]
    return torch.where(torch.cat(blackened)[:, None], black, patches)


@dataclass
class Visual:
    """What the vision tower gets for one sample, the video before the picture."""
    patches: Tensor  # float32 (N, 1176)
    video_grids: list[Grid]  # (t, h, w) in patches
    image_grids: list[Grid]
    seconds_per_grid: list[float]  # seconds per visual frame of each video
    duration: float | None  # seconds of the video that the frames cover
    sampled_frames: int


def read_visual(sample: Sample, *, fps: float, max_frames: int, min_pixels: int,
                max_pixels: int) -> Visual:
    """Decodes a sample's video and picture into patches, with one full-size frame in memory at a
    time. Raises VideoError."""
    if sample.missing:  # never go on without the video that the question is about
        raise VideoError(f"{sample.missing[0]!r}: not found")
    visual = Visual(torch.empty(0, 3 * 2 * PATCH * PATCH), [], [], [], None, 0)
    path = sample.video
    try:
        if path is not None:
            frames, duration = sample_frames(path, fps, max_frames, sample.bounds)
            patches, grid = frames_to_patches(frames, min_pixels, max_pixels)
            t = grid[0]
            visual = Visual(patches, [grid], [], [duration / t], duration, 2 * t)
        path = sample.image
        if path is not None:
            patches, grid = frames_to_patches([read_picture(path)], min_pixels, max_pixels)
            visual.patches = torch.cat([visual.patches, patches])
            visual.image_grids = [grid]
    except Exception as error:  # damaged files raise some twenty kinds in decord, Pillow and torch
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        # Without "[12:34:56] /x/y.cc:42: ": a resumed run logs the same.
        reason = re.sub(r"\[[0-9:]+\] \S+ ", "", reason)[:200]
        raise VideoError(f"{path!r}: cannot be read ({reason})") from None
    return visual


# ----------------------------------------------------------------------------- decoding processes

def serve_decoder() -> None:
    """The life of a decoding process: samples in, visuals out, until the parent is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the codecs' chatter
    import resource  # on Unix only, so not at the top
    with suppress(ValueError, OSError):  # there is a stricter limit
        # 4 GiB: a 16K frame fits, a decompression bomb does not.
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
    with suppress(Exception):  # no more requests, or no memory for a reply
        while True:
            sample, settings, timeout = pickle.load(sys.stdin.buffer)
            # Ends this process if the decoder hangs, also when the parent is gone.
            signal.setitimer(signal.ITIMER_REAL, timeout)
            try:
                reply = read_visual(sample, **settings)
            except VideoError as error:
                reply = error
            signal.setitimer(signal.ITIMER_REAL, 0)
            pickle.dump(reply, sys.stdout.buffer)
            sys.stdout.buffer.flush()


class VideoReader:
    """Reads samples in long-lived processes that are timed out, ended and restarted one by one.

    with VideoReader(2, timeout=60, fps=1, max_frames=16, min_pixels=50176,
                     max_pixels=50176) as reader:
        visual = reader.submit(sample).result()

    Each thread talks to one process, so a video that hangs or crashes its decoder costs that sample
    only.
    """

    def __init__(self, processes: int = 2, timeout: float = 60.0, **settings):
        """settings: what `read_visual` takes."""
        self.timeout = timeout
        self.settings = settings
        # Signals to stop are often sent to all processes, and the parent decides: the decoders
        # inherit from their threads that these are blocked, so they act in none, nor at its start.
        stopping = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        self._threads = ThreadPoolExecutor(processes, "decode", signal.pthread_sigmask,
                                           (signal.SIG_BLOCK, stopping))
        self._decoders = {}  # thread -> its process
        self._closed = False

    def submit(self, sample: Sample) -> Future:
        """Future of Visual, or of VideoError: cannot be read, time-out, crash of the decoder. A
        DataError means that no decoding process can be started at all."""
        return self._threads.submit(self._read, sample)

    def _read(self, sample: Sample) -> Visual:
        """Reads in this thread's process, which is started if there is none or if it died."""
        thread = threading.get_ident()
        decoder = self._decoders.get(thread)
        if decoder is None or decoder.poll() is not None:
            decoder = self._decoders[thread] = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if self._closed:  # close() may have missed a new process
            decoder.kill()
        try:
            pickle.dump((sample, self.settings, self.timeout), decoder.stdin)
            decoder.stdin.flush()
            reply = pickle.load(decoder.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            decoder.communicate()  # to its end; to kill it now could change its exit status
            status = decoder.returncode
            if status > 0:  # Python's own, for an error while it starts
                raise DataError(f"a decoding process did not start (exit status {status}); see "
                                "its message above, or lower --readers") from None
            cause = "its decoding process died"
            if status == -signal.SIGALRM:
                cause = f"not decoded within {self.timeout:g} s"
            reply = VideoError(f"{sample.video or sample.image!r}: {cause}")
        if isinstance(reply, VideoError):
            raise reply
        return reply

    def close(self, *_) -> None:
        """Ends the processes at once. Reads under way fail, reads not begun are cancelled."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in list(self._decoders.values()):
            decoder.kill()  # a thread that waits for its reply sees the end of its output
            decoder.wait()
        self._threads.shutdown()

    def __enter__(self):
        return self

    __exit__ = close


# ---------------------------------------------------------------------------------------- prompts

@dataclass(kw_only=True)
class Prompt(Visual):
    """A sample as the model takes it: P tokens, N patches, F visual frames."""
    sample: Sample
    input_ids: Tensor  # int64 (P,)
    frame_of_token: Tensor  # int64 (P,): visual frame of a video token, -1 elsewhere
    num_frames: int  # F; 0 without a video


def prompt_text(sample: Sample, visual: Visual | None) -> str:
    """The user's words: question, options on lines of their own, instruction (supplement, Fig. E;
    Fig. D for grounding; none for a description)."""
    options = [f"{letter}. {words}" for letter, words in zip(LETTERS, sample.options)]
    question = "\n".join([sample.question, *options])
    if sample.kind == "description":
        return question
    if sample.kind != "grounding":
        return (f"{question} Output the thinking process in <think> </think> and final answer in "
                "<answer> </answer> tags, i.e., <think> reasoning process here </think><answer> "
                "answer here </answer>.")
    return (f"The video is {sample.duration:g} seconds long, with {visual.sampled_frames} frames "
            "evenly sampled from it.\n"
            "Based on the video content, think about the question deeply, select the correct "
            "option, and provide ONE or MORE time periods in the video where the clues "
            "corresponding to the correct option occur.\n"
            f"Question: {question}\n"
            "Output the thinking process in <think> </think> tags, final answer in <answer> "
            "</answer> tags and time clues in <time> </time> tags, i.e., <think> reasoning process "
            "here </think> <answer> answer here </answer> <time> 8.4 to 12.5, 25 to 30.2 </time>")


def build_prompt(sample: Sample, visual: Visual, tokenizer) -> Prompt:
    """The tokens of the chat. A grid (t, h, w) takes t * h * w / 4 of them: (2, 4, 4) takes 8, with
    frame_of_token 0 0 0 0 1 1 1 1."""
    text = ""
    for medium, grids in (("video", visual.video_grids), ("image", visual.image_grids)):
        for grid in grids:
            pads = f"<|{medium}_pad|>" * (math.prod(grid) // MERGE ** 2)
            text += f"<|vision_start|>{pads}<|vision_end|>"
    # "<|im_end|>" in a question must stay words, not end the turn: control tokens start with "<|".
    text += prompt_text(sample, visual).replace("<|", "< |")
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    input_ids = torch.tensor(tokenizer(chat, add_special_tokens=False)["input_ids"])
    of_video = input_ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    frame_of_token = torch.full_like(input_ids, -1)
    num_frames = 0
    for num_frames, h, w in visual.video_grids:  # at most one
        frames = torch.arange(num_frames)
        frame_of_token[of_video] = frames.repeat_interleave(h * w // MERGE ** 2)
    crucial = sample.crucial_frame
    if crucial is not None and (visual.seconds_per_grid != [2.0] or crucial >= num_frames):
        sample = replace(sample, crucial_frame=None)  # it counts visual frames of 2 s
    return Prompt(**vars(visual), sample=sample, input_ids=input_ids,
                  frame_of_token=frame_of_token, num_frames=num_frames)


def in_batches(by_position: dict, size: int) -> list[dict]:
    """A dictionary in parts of `size` entries, the last one perhaps smaller."""
    items = iter(by_position.items())
    return [dict(islice(items, size)) for _ in range(0, len(by_position), size)]


def decode_ahead(reader: VideoReader, batches: Iterable[dict[int, Sample]]) -> Iterator[list]:
    """Batches {position: sample} -> lists of (position, sample, its Visual to come).

    A batch is decoded while the caller works on the one before, the first one from this call on.
    The position is the caller's name for the sample's place.
    """
    submitted = ([(position, sample, reader.submit(sample)) for position, sample in batch.items()]
                 for batch in batches)
    first = list(islice(submitted, 1))  # now, not when the caller asks for it
    # pairwise fetches batch k + 1, which submits it, before it hands out (k, k + 1). None comes
    # after the last one.
    return (batch for batch, _ in pairwise(chain(first, submitted, [None])))


def build_prompts(decoded: Iterable[list], tokenizer,
                  max_tokens: int) -> Iterator[tuple[dict[int, Prompt], list[dict]]]:
    """For each batch of `decode_ahead`: (prompts by position, records of samples left out).

    A sample that cannot be read is `unreadable`; a prompt of more than max_tokens tokens is left
    out, never cut.
    """
    for batch in decoded:
        prompts, skipped = {}, []
        for position, sample, visual in batch:
            try:
                prompt = build_prompt(sample, visual.result(), tokenizer)
                count, unreadable = len(prompt.input_ids), False
                if count <= max_tokens:
                    prompts[position] = prompt
                    continue
                reason = f"prompt of {count} tokens, over the limit of {max_tokens}"
            except VideoError as error:
                reason, unreadable = str(error), True
            skipped.append(dict(position=position, id=sample.id, path=sample.video or sample.image,
                                reason=reason, unreadable=unreadable))
        yield prompts, skipped


# ------------------------------------------------- rewards, in linear time whatever the response is

def element_text(text: str, tag: str) -> str | None:
    """The text of the only <tag> element; None if there is none, several, or one left unclosed."""
    pieces = re.split(f"(</?{tag}>)", text)  # text, tag, text, ...
    return pieces[2].strip() if pieces[1::2] == [f"<{tag}>", f"</{tag}>"] else None


def plain_words(text: str) -> str:
    """For comparisons: ignores case, full stops at the end and repeated spaces."""
    return " ".join(text.split()).rstrip(" .").casefold()


CHOICE = re.compile(r"\(([A-Z])\)|([A-Z])[.):]|([A-Z])(?=[\s.]*$)")  # "(C)", "C." or only "C"


def split_letter(text: str) -> tuple[str, str]:
    """("C", "the words") of "C. the words" or "(C) the words"; ("", text) if there is no letter."""
    match = CHOICE.match(text)
    if match is None:
        return "", text
    return match[match.lastindex], text[match.end():].strip()


def match_choice(text: str, options: list[str]) -> str | None:
    """Letter of the option that a text names: "C", "C.", "(C)", "C. the words" or only the words.
    None if it names no option, or words that two options share."""
    choices = dict(zip(LETTERS, options))
    letter, rest = split_letter(text.strip())
    if letter in choices and plain_words(rest) in ("", plain_words(choices[letter])):
        return letter
    same = [letter for letter, words in choices.items() if plain_words(words) == plain_words(text)]
    return same[0] if len(same) == 1 else None


# at least one digit, perhaps with thousands' commas, a fraction and an exponent; then the end of
# the text or another word
NUMBER = re.compile(r"([+-]?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?"
                    r"(?:[eE][+-]?[0-9]{1,3})?)[.,;%]*(?!\S)")


def parse_number(text: str) -> float | None:
    """The number that a text starts with, in ASCII digits and finite; other words may follow it
    ("12.5 meters")."""
    match = NUMBER.match(text.strip())
    value = float(match[1].replace(",", "")) if match else math.inf
    return value if math.isfinite(value) else None


def mean_relative_accuracy(pred: float, target: float) -> float:
    """Mean over theta in {0.50, 0.55, .., 0.95} of [|pred - target| / |target| <= 1 - theta]
    (VSI-Bench). Examples: 95 for 100 -> 1.0; 150 for 100 -> 0.1; target 0 -> 1.0 for 0, else 0.0.
    """
    error = abs(pred - target) / abs(target) if target else float(pred != 0)
    return sum(error <= 0.05 * k + 1e-9 for k in range(1, 11)) / 10  # 0.05 is not exact in binary


def accuracy_reward(response: str, sample: Sample) -> float:
    """1.0 if the only <answer> element names the correct option, else 0.0. Numbers: mean relative
    accuracy."""
    answer = element_text(response, "answer") or ""
    if sample.kind == "number":
        pred = parse_number(answer)
        if pred is None:
            return 0.0
        return mean_relative_accuracy(pred, parse_number(sample.answer))
    return float(match_choice(answer, sample.options) == sample.answer)


def format_reward(response: str, sample: Sample) -> float:
    """1.0 for <think>..</think><answer>..</answer> (grounding: then <time>..</time>), each tag once
    and nothing but space between and around the elements, else 0.0."""
    names = ["think", "answer"]
    if sample.kind == "grounding":
        names.append("time")
    # space, opening tag, content, closing tag, space, ...
    pieces = re.split(f"(</?(?:{'|'.join(names)})>)", response)
    expected = "".join(f"<{name}></{name}>" for name in names)
    return float("".join(pieces[1::2]) == expected and not "".join(pieces[::4]).strip())


SECONDS = r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)) ?(?:s|secs?|seconds?)?"
SPAN = re.compile(rf"(?:from )?{SECONDS} ?(?:to|-|\u2013|\u2014) ?{SECONDS}")


def parse_spans(text: str) -> list[Span]:
    """"8.4 to 12.5, 25s - 30.2s" -> [(8.4, 12.5), (25.0, 30.2)]. Pieces that are no span, or end
    before they start, drop out."""
    spans = []
    for piece in re.split(r"[,;\n]|\band\b", text.lower()):
        match = SPAN.fullmatch(" ".join(piece.split()).lstrip(" [({").rstrip(" ])}."))
        if match:
            start, end = float(match[1]), float(match[2])
            if start < end:
                spans.append((start, end))
    return spans


def union_length(spans: list[Span], duration: float) -> float:
    """Length of the part between 0 and the duration."""
    length = end_so_far = 0.0
    for start, end in sorted(spans):
        end = min(end, duration)
        length += max(0.0, end - max(start, end_so_far))
        end_so_far = max(end, end_so_far)
    return length


def temporal_iou(pred_spans, label_spans, duration: float) -> tuple[float, float]:
    """(IoU, IoP) of two unions of (start, end) spans in seconds, clipped to [0, duration]
    (NExT-GQA).

    IoU = |P and T| / |P or T|, IoP = |P and T| / |P|; 0 for an empty P. P = 2 to 6, T = 4 to 10
    -> (0.25, 0.5).
    """
    pred = union_length(pred_spans, duration)
    if pred == 0:
        return 0.0, 0.0
    label = union_length(label_spans, duration)
    either = union_length([*pred_spans, *label_spans], duration)
    both = min(pred, max(0.0, pred + label - either))
    return both / either, both / pred


def score_response(response: str, sample: Sample) -> dict[str, float]:
    """accuracy (numbers: mean relative accuracy) and format. Grounding: also iou and iop of the
    spans in the only <time> element with the labelled ones, and acc_gqa, which is 1 for a correct
    answer with an IoP of at least 0.5."""
    accuracy = accuracy_reward(response, sample)
    scores = {"accuracy": accuracy, "format": format_reward(response, sample)}
    if sample.kind == "grounding":
        spans = parse_spans(element_text(response, "time") or "")
        iou, iop = temporal_iou(spans, sample.spans, sample.duration)
        scores |= {"iou": iou, "iop": iop, "acc_gqa": float(accuracy == 1 and iop > 0.5 - 1e-9)}
    return scores


def temporal_iou_reward(response: str, sample: Sample) -> float:
    """IoU of the spans in the only <time> element with the labelled ones; 0.0 without spans, and
    for questions without grounding."""
    return score_response(response, sample).get("iou", 0.0)


def task_reward(response: str, sample: Sample) -> tuple[float, float, float]:
    """(reward, accuracy, format): 0.9 x accuracy + 0.1 x format; grounding: accuracy + 0.1 x format
    + IoU."""
    scores = score_response(response, sample)
    accuracy, formatted = scores["accuracy"], scores["format"]
    weight = 1.0 if sample.kind == "grounding" else 0.9
    return weight * accuracy + 0.1 * formatted + scores.get("iou", 0.0), accuracy, formatted


# ------------------------------------------------------------------------------ the built-in task

def outlines() -> dict[str, np.ndarray]:
    """bool (28, 28): what each shape fills of its quarter of the picture."""
    y, x = np.mgrid[:28, :28] / 13.5 - 1  # y down, x to the right, from -1 to 1
    radius = np.hypot(x, y)
    # A star has five points: its radius falls and rises within each fifth of the circle.
    fifth = (np.arctan2(x, -y) * 2.5 / np.pi + 0.5) % 1  # from 0 to 1
    return {"star": radius < 0.4 + 0.6 * (1 - 2 * abs(fifth - 0.5)) ** 2,
            "circle": radius < 0.7,
            "square": np.maximum(abs(x), abs(y)) < 0.9,
            "triangle": (abs(x) < (y + 0.95) / 2) & (y < 0.9),
            "cross": np.minimum(abs(x), abs(y)) < 0.25,
            "ring": abs(radius - 0.75) < 0.2,
            "moon": (radius < 0.95) & (np.hypot(x - 0.5, y) > 0.7),
            "hourglass": (abs(x) < abs(y)) & (abs(y) < 0.9)}


OUTLINES = outlines()
RGB = {"red": (220, 50, 50), "green": (50, 190, 70), "blue": (60, 90, 230),
       "yellow": (230, 210, 60)}
TOY_SHAPES, TOY_COLOURS = tuple(OUTLINES), tuple(RGB)
# What a model says before it comes to the point: one of four words at each of 24 places. No reward
# depends on them, so they are noise in the gradient, like much of a real model's reasoning. Here a
# weighting of tokens can show what it is worth.
TOY_FILLER = [words.split("/") for words in (
    "okay/so/well/now i/we/you/one should/must/can/will carefully/slowly/patiently/calmly "
    "watch/view/study/check this/that/our/your short/brief/little/small video/clip/film/movie "
    "and/then/also/plus go/look/move/step through/over/across/along every/each/any/another "
    "frame/picture/image/scene until/because/where/since something/things/details/much "
    "looks/seems/appears/feels just/quite/rather/very right/clear/good/useful for/to/with/about "
    "answering/solving/settling/deciding whatever/everything/anything/questions was/got/gets/were "
    "asked/wanted/requested/required here/today/below/above").split()]
TOY_PIXELS = 56 * 56


Plan = list[tuple[str, str, int]]  # (shape, colour, cell) of each visual frame


def toy_plan(rng: np.random.Generator) -> Plan:
    """What a video shows: each shape once, and each colour twice, so that no colour is the better
    guess."""
    shapes = rng.permutation(TOY_SHAPES).tolist()
    colours = rng.permutation(TOY_COLOURS * 2).tolist()
    cells = rng.integers(4, size=8).tolist()
    return list(zip(shapes, colours, cells))


def toy_video(rng: np.random.Generator) -> tuple[Tensor, Plan]:
    """One built-in video: (sampled frames uint8 (16, 3, 56, 56), its `toy_plan`).

    Entry f of the plan is visual frame f: sampled frames 2f and 2f + 1, equal but for noise with a
    standard deviation of 20 grey levels. It shows one shape, in cell c at row c // 2, column c % 2,
    which is visual token 4 * f + c of the video.
    """
    plan = toy_plan(rng)
    pictures = np.full((8, 2, 28, 2, 28, 3), 60.0)  # (frame, row, y, column, x, RGB)
    for picture, (shape, colour, cell) in zip(pictures, plan):
        picture[cell // 2, :, cell % 2][OUTLINES[shape]] = RGB[colour]
    frames = pictures.reshape(8, 1, 56, 56, 3) + 20 * rng.standard_normal((8, 2, 56, 56, 3))
    frames = frames.reshape(16, 56, 56, 3).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), plan


def toy_sample(shape: str, colour: str, frame: int | None = None) -> Sample:
    return Sample("built-in", f"what colour is the {shape} ?", list(TOY_COLOURS),
                  LETTERS[TOY_COLOURS.index(colour)], "choice", crucial_frame=frame)


def toy_response(shape: str, colour: str, rng: np.random.Generator, filler: bool = True,
                 correct: float = 1.0) -> str:
    """Filler words, then the shape and directly after it its colour. With probability 1 - correct
    it names another colour, and answers accordingly."""
    if rng.random() >= correct:
        colour = [other for other in TOY_COLOURS if other != colour][rng.integers(3)]
    words = [alternatives[rng.integers(4)] for alternatives in TOY_FILLER] if filler else []
    description = " ".join([*words, shape, colour])
    answer = toy_sample(shape, colour).answer
    return f"<think> {description} </think> <answer> {answer} </answer>"


def toy_vocabulary() -> list[str]:
    """Texts with every word of the built-in prompts and responses."""
    prompts = [prompt_text(toy_sample(shape, "red"), None) for shape in TOY_SHAPES]
    return [*prompts, *(" ".join(words) for words in TOY_FILLER)]


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that an interrupted run leaves all of it or nothing."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def write_y4m(path, frames: Tensor, fps: int) -> None:
    """Writes uint8 RGB (T, 3, H, W) as YUV4MPEG2, a video format that needs no encoder. Reading it
    back gives the same within 2 grey levels."""
    height, width = frames.shape[2:]
    header = f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C444\n"
    red, green, blue = frames.double().unbind(1)                                # (T, H, W)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue                           # BT.601
    planes = [luma * 219 / 255 + 16, (blue - luma) / 1.772 * 224 / 255 + 128,
              (red - luma) / 1.402 * 224 / 255 + 128]
    planes = torch.stack(planes, 1).round().to(torch.uint8).numpy()             # (T, 3, H, W)
    pictures = b"".join(b"FRAME\n" + picture.tobytes() for picture in planes)
    write_whole(Path(path), header.encode() + pictures)


def make_toy_data(folder, videos: tuple[int, int] = (128, 32)) -> None:
    """Makes folder/train.json, folder/test.json (Video-R1's form) and folder/videos/*.y4m, 16 s at
    1 frame per second.

    videos: how many to train and to test on, with four questions each. They are the same in every
    call, and whole ones of an earlier call are kept.
    """
    folder = Path(folder)
    options = [f"{letter}. {colour}" for letter, colour in zip(LETTERS, TOY_COLOURS)]
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for split, (name, count) in enumerate(zip(("train", "test"), videos)):
        records = []
        for number in range(count):
            key = [0, split, number]
            path = f"videos/{name}_0_{number:05d}.y4m"
            if not (folder / path).exists():
                write_y4m(folder / path, toy_video(np.random.default_rng(key))[0], 1)
            plan = toy_plan(np.random.default_rng(key))  # as in toy_video
            for frame in np.random.default_rng([*key, 1]).permutation(8)[:4].tolist():
                shape, colour, _ = plan[frame]
                sample = toy_sample(shape, colour)
                records.append(dict(
                    problem_id=len(records), problem=sample.question, data_type="video",
                    problem_type="multiple choice", path=path, data_source="built-in",
                    duration=16.0, crucial_frame=frame, options=options,
                    solution=f"<answer>{sample.answer}</answer>"))
        write_whole(folder / f"{name}.json", json.dumps(records, indent=1).encode())


@dataclass
class Lesson:
    """Supervision for the built-in model: a video, and for each of its 8 visual frames a row, the
    question about it and the response."""
    prompt: Prompt  # up to the end of the video
    token_words: Tensor  # int64 (visual tokens, 2): shape and colour that a token shows, or padding
    row_ids: Tensor  # int64 (8, R): the rest of the prompt, then the response
    row_mask: Tensor  # bool (8, R)
    target_mask: Tensor  # bool (8, R): the response only


def toy_visual(rng: np.random.Generator) -> tuple[Visual, Plan]:
    """(visual, plan) of a built-in video that is in no file."""
    frames, plan = toy_video(rng)
    patches, grid = frames_to_patches(frames, TOY_PIXELS, TOY_PIXELS)
    return Visual(patches, [grid], [], [2.0], 16.0, 16), plan


def toy_prompt(rng: np.random.Generator, tokenizer,
               true_frame: int = 0) -> tuple[Prompt, Plan]:
    """(prompt, plan): a built-in video that is in no file, and the question about one of its visual
    frames."""
    visual, plan = toy_visual(rng)
    shape, colour, _ = plan[true_frame]
    return build_prompt(toy_sample(shape, colour, true_frame), visual, tokenizer), plan


def toy_lesson(prompts: list[Prompt], plan: Plan, rng: np.random.Generator, tokenizer,
               **wording) -> Lesson:
    """A lesson about a built-in video. prompts: about its 8 visual frames; rng and wording: see
    `toy_response`."""
    token_words = torch.full((8, 4, 2), tokenizer.pad_token_id)  # (frame, cell, 2)
    rows = []
    for frame, (prompt, (shape, colour, cell)) in enumerate(zip(prompts, plan)):
        words = tokenizer.convert_tokens_to_ids([shape, colour])
        token_words[frame, cell] = torch.tensor(words)
        response = tokenizer(toy_response(shape, colour, rng, **wording))["input_ids"]
        rows.append([*prompt.input_ids.tolist(), *response, tokenizer.eos_token_id])
    shared = int((prompt.frame_of_token >= 0).nonzero().max()) + 2  # through the end mark
    row_ids = torch.tensor(rows)[:, shared:]  # (8, R): all are equally long
    target_mask = torch.ones_like(row_ids, dtype=torch.bool)
    target_mask[:, :len(prompt.input_ids) - shared] = False
    prompt = replace(prompt, input_ids=prompt.input_ids[:shared],
                     frame_of_token=prompt.frame_of_token[:shared])
    return Lesson(prompt, token_words.flatten(0, 1), row_ids,
                  torch.ones_like(target_mask), target_mask)


@dataclass
class Stage:
    """Supervised training of the built-in model on lessons, until it is finished."""
    lessons: list[Lesson]
    learning_rate: float
    check_every: int  # steps between two measurements
    finished: Callable[[float, float], bool]  # (accuracy, share that looks at the true frame)


def toy_stages(tokenizer, seed: int) -> list[Stage]:
    """The model learns to look and to answer; to talk before it answers; and, from lessons that are
    mostly incorrect, to doubt what it sees, so that reinforcement learning has something to teach.
    All stages are about the same videos, which are in neither train.json nor test.json.
    """
    videos = []
    for number in range(256):
        rng = np.random.default_rng([seed, 2, number])
        visual, plan = toy_visual(rng)
        prompts = [build_prompt(toy_sample(shape, colour), visual, tokenizer)
                   for shape, colour, _ in plan]
        videos.append((prompts, plan, rng))

    def lessons(count: int, **wording) -> list[Lesson]:
        return [toy_lesson(prompts, plan, copy.deepcopy(rng), tokenizer, **wording)
                for prompts, plan, rng in videos[:count]]

    return [Stage(lessons(256, filler=False), 3e-3, 40,
                  lambda accuracy, top1: accuracy >= 0.5 and top1 >= 0.3),
            Stage(lessons(256), 2e-3, 20,
                  lambda accuracy, top1: accuracy >= 0.85 and top1 >= 0.45),
            Stage(lessons(128, correct=0.4), 4e-4, 5, lambda accuracy, top1: accuracy <= 0.43)]


if __name__ == "__main__":  # started by VideoReader
    import data  # so that samples and visuals have the same classes here and there
    data.serve_decoder()
