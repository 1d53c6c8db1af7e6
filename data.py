"""A sample from its annotation to tensors, and how a response to it is scored.

Top to bottom: annotation -> Sample -> decoded frames and their times -> patches -> Visual (read in processes of their
own, by VideoReader) -> Prompt; then the rewards; then the built-in task. Nothing here knows the model: what leaves this
file are tensors and small dataclasses. Paper and supplement: arXiv 2602.23823.
"""
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import chain, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Callable, Iterable, Iterator, Optional

import decord
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class DataError(ValueError):
    """A bad annotation: one line with file, record number, field and the mend."""


class VideoError(RuntimeError):
    """A video or picture that cannot be read: one line with the reason."""


# --------------------------------------------------------------------------------------------------------- annotations

@dataclass
class Sample:
    """One question. Times are in seconds."""
    id: str  # "train.json:12", records counted from 0
    question: str
    options: list[str]  # words without letters; [] if there is no choice
    answer: str  # "A".. for choice and grounding, a number as text for number
    kind: str  # "choice", "number", "grounding" (a choice with time spans) or "description" (not scored)
    video: Optional[str] = None
    image: Optional[str] = None
    missing: list[str] = field(default_factory=list)  # paths that were not found; video or image is then None
    duration: Optional[float] = None  # as annotated
    spans: list[tuple[float, float]] = field(default_factory=list)  # where the clues to the answer are
    group: str = ""  # for tables by task
    crucial_step: Optional[int] = None  # built-in task: the visual step of 2 s that shows the answer
    bounds: Optional[tuple[float, float]] = None  # the part of the video that is asked about


class Record:
    """The fields of one annotation record, each checked when it is taken."""

    def __init__(self, where: str, fields: dict):
        self.where, self.fields = where, fields

    def error(self, name: str, mend: str) -> DataError:
        return DataError(f"{self.where}, field '{name}': {mend}")

    def check(self, right, name: str, mend: str) -> None:
        if not right:
            raise self.error(name, mend)

    def text(self, name: str, value=...) -> str:
        value = self.fields.get(name) if value is ... else value
        valid = isinstance(value, str) and value.strip() and not re.search("[\ud800-\udfff]", value)
        self.check(valid, name, "missing or no text; write a non-empty string of valid Unicode")
        return value.strip()

    def texts(self, name: str) -> list[str]:
        values = self.fields.get(name)
        self.check(isinstance(values, list), name, "missing or no list; write a list of strings")
        return [" ".join(self.text(name, value).split()) for value in values]  # one line each

    def number(self, name: str, value=...) -> Optional[float]:
        value = self.fields.get(name) if value is ... else value
        finite = type(value) in (int, float) and abs(value) < 1e9
        self.check(value is None or finite, name, "not a finite number; write seconds or a count")
        return None if value is None else float(value)

    def options(self, words: list[str], name: str = "options") -> list[str]:
        self.check(2 <= len(words) <= 26, name, f"{len(words)} options; a choice needs 2 to 26")
        # "A. a book", "A) a book", "A: a book" or "(A) a book"; if all have their letters, those are no words
        lettered = [re.fullmatch(rf"(?s)(?:\({c}\)|{c}[.):])\s*(.*)", w) for c, w in zip(LETTERS, words)]
        return [match[1] for match in lettered] if all(lettered) else words

    def label(self, name: str) -> str:
        text = self.text(name)
        return (element_text(text, "answer") or "") if "<answer>" in text else text

    def answer(self, name: str, options: list[str]) -> str:
        text, choice = self.text(name), match_choice(self.label(name), options)
        self.check(choice is not None, name, f"{text[:60]!r} is not among the {len(options)} options; name a letter")
        return LETTERS[choice]


# The readers of the formats: a Sample's fields from a record; None if no rule can score a response to it.
def _read_video_r1(record: Record, seed: list[int]) -> Optional[dict]:
    problem_type, step = record.text("problem_type"), record.fields.get("crucial_step")
    if problem_type in ("OCR", "free-form"):
        return None
    if problem_type in ("numerical", "regression"):
        kind, options, answer = "number", [], record.label("solution")
        if parse_number(answer) is None or re.search(r"\s\d", answer):  # "1/2", "1 1/2", "3 x 10^5"
            return None
    else:
        record.check(problem_type == "multiple choice", "problem_type", f"{problem_type[:60]!r} is unknown; use "
                     "multiple choice, numerical, regression, OCR or free-form")
        kind, options = "choice", record.options(record.texts("options"))
        answer = record.answer("solution", options)
    medium = record.text("data_type")
    record.check(medium in ("video", "image"), "data_type", "write video or image")
    record.check(step is None or type(step) is int and step >= 0, "crucial_step", "write an integer, counted from 0")
    group = record.text("data_source") if record.fields.get("data_source") else problem_type
    return {"question": record.text("problem"), "options": options, "answer": answer, "kind": kind, "group": group,
            "duration": record.number("duration"), "crucial_step": step, medium: record.text("path")}


def _read_next_gqa(record: Record, seed: list[int]) -> dict:
    options, answer = record.options(record.texts("options")), record.fields.get("answer")
    if re.fullmatch("[0-9]{1,2}", str(answer)):
        record.check(int(answer) < len(options), "answer", f"not among the {len(options)} options; count from 0")
        answer = LETTERS[int(answer)]
    else:
        answer = record.answer("answer", options)
    spans, duration = record.fields.get("time_clues"), record.number("duration")
    pairs = isinstance(spans, list) and spans and all(isinstance(s, list) and len(s) == 2 for s in spans)
    record.check(pairs, "time_clues", "write a list of [start, end] in seconds")
    spans = [tuple(record.number("time_clues", time) for time in span) for span in spans]
    ordered = all(None not in span and span[0] <= span[1] for span in spans)
    record.check(ordered, "time_clues", "a span ends before it starts; write [start, end]")
    record.check(duration and duration > 0, "duration", "missing or not above 0; write the seconds of the video")
    return dict(question=record.text("question"), options=options, answer=answer, kind="grounding", spans=spans,
                duration=duration, group=str(record.fields.get("qtype", "")), video=record.text("video_path"))


def _read_seed_bench_r1(record: Record, seed: list[int]) -> dict:
    if record.fields.get("golden_choice_idx") is not None:
        options = record.options([record.text(f"choice_{c}") for c in "abcd"], "choice_a")
        answer = record.answer("golden_choice_idx", options)
    else:  # training records name wrong answers: three of them, shuffled alike in every run
        right, rng = " ".join(record.text("answer").split()), np.random.default_rng(seed)
        wrong = [w for w in dict.fromkeys(record.texts("negative_answers")) if _plain(w) != _plain(right)]
        record.check(len(wrong) >= 3, "negative_answers", f"{len(wrong)} wrong answers; write at least 3")
        options = [wrong[i] for i in rng.choice(len(wrong), 3, replace=False)]
        answer = LETTERS[rng.integers(4)]
        options.insert(LETTERS.index(answer), right)
    source, progress = record.text("video_source"), record.fields.get("task_progress_metadata")
    record.check(isinstance(progress, list), "task_progress_metadata", "no list; an empty list means no video")
    return dict(question=record.text("question"), options=options, answer=answer, kind="choice", group=source,
                duration=record.number("duration") or None,
                video=f"videos/{source}/{record.text('video_basename')}" if progress else None,
                image=f"images/{source}/{record.text('current_observation_basename')}")


# by the field that gives the format away: Video-R1 (Perception Test, the built-in task), NExT-GQA, SEED-Bench-R1
_READERS = {"problem": _read_video_r1, "time_clues": _read_next_gqa,
            "current_observation_basename": _read_seed_bench_r1}


def json_records(path: Path) -> list[dict]:
    records = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            for line in filter(str.strip, text.split("\n")):  # not splitlines: a string may hold U+2028
                records.append(json.loads(line))
        else:
            records = json.loads(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give an annotation, .json or .jsonl") from None
    except (ValueError, RecursionError) as error:
        at = f", record {len(records)}" if path.suffix == ".jsonl" else ""
        raise DataError(f"{path}{at}: no JSON in UTF-8 ({error}); is the file complete?") from None
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: not a list of records; write [{{...}}, ...], or one record a line in .jsonl")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {number}: not a record; write {{\"problem\": ..., ...}}")
    return records


class Finder:
    """Looks paths up, on their text alone: data sets may contain symbolic links."""

    def __init__(self, root: Optional[str], folder: Path):
        self.root, self.folder = root, folder

    @cached_property
    def by_name(self) -> dict[str, list[str]]:  # walks the whole tree, once, if something is not found without
        names = defaultdict(list)
        for folder, _, files in os.walk(self.root):
            for name in files:
                names[name].append(os.path.join(folder, name))
        return names

    def find(self, path: str) -> Optional[str]:
        if self.root is None:
            place = os.path.join(self.folder, path)
            return place if os.path.exists(place) else None
        parts = [part for part in path.split("/") if part not in ("", ".")]
        places = [os.path.join(self.root, *parts[i:]) for i in range(len(parts))]  # as given, then ever shorter tails
        found = next(filter(os.path.exists, places), None)
        same = [found] if found else self.by_name[os.path.basename(path)]
        return same[0] if len(same) == 1 else None  # of two alike, none: a guess may be another video


def escaped(text: str) -> str:
    """For the terminal: what is no printable character, as names and responses may hold, becomes its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def with_files(samples: list[Sample], source: str, skip_missing: bool, announce: bool = True) -> list[Sample]:
    """The samples whose files are there. Missing files are listed, and are an error if they may not be skipped."""
    missing = list(dict.fromkeys(name for sample in samples for name in sample.missing))
    if missing and announce:
        print(f"{source}: {len(missing)} files are missing:", *map(escaped, missing[:10]), sep="\n  ", file=sys.stderr)
    if missing and not skip_missing:
        raise DataError(f"{source}: {len(missing)} files are missing, the first {missing[0]}; mend --video_root, or leave "
                        "these samples out by --skip_missing")
    present = [sample for sample in samples if not sample.missing]
    if not present:
        raise DataError(f"{source}: no sample is left; mend --video_root")
    return present


def load_samples(path, video_root=None, *, seed: int = 0) -> list[Sample]:
    """Reads annotations: Video-R1, Perception Test, NExT-GQA, SEED-Bench-R1, built-in, told by their fields.

    path: one .json or .jsonl, or several joined by commas. video_root: a video is looked up there as given, then by its
    longest existing tail, then by its name; None: as given, from the annotation's folder. Videos not found are listed
    in `Sample.missing`. Records that no rule can score (OCR, free-form, numerical without a number) are left out; their
    number is logged. seed: shuffles the options of SEED-Bench-R1 training records.
    Raises DataError, one line, on the first bad record.
    """
    if video_root is not None and not os.path.isdir(video_root):
        raise DataError(f"{video_root}: no such folder; give the folder of the videos")
    paths = [Path(part.strip()) for part in str(path).split(",") if part.strip()]
    samples, left_out = [], Counter()
    for file_number, path in enumerate(paths):
        name = path.name if sum(p.name == path.name for p in paths) == 1 else str(path)  # ids stay unique
        finder = Finder(video_root, path.parent)
        for number, fields in enumerate(json_records(path)):
            record = Record(f"{name}, record {number}", fields)
            reader = next((reader for mark, reader in _READERS.items() if mark in fields), None)
            if reader is None:
                raise DataError(f"{record.where}: fields {sorted(fields)[:8]!r} are of no known format; Video-R1 has "
                                "'problem', NExT-GQA 'time_clues', SEED-Bench-R1 'current_observation_basename'")
            values = reader(record, [seed, file_number, number])
            if values is None:
                left_out[fields["problem_type"]] += 1
                continue
            given = {medium: values[medium] for medium in ("video", "image") if values.get(medium)}
            if video_root is not None and any(".." in place.split("/") for place in given.values()):
                raise DataError(f"{record.where}: {str(given)[:200]} leaves the video folder; drop the '..'")
            found = {medium: finder.find(place) for medium, place in given.items()}
            missing = [given[medium] for medium in given if found[medium] is None]
            samples.append(Sample(f"{name}:{number}", **values | found, missing=missing))
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        logging.getLogger("appo").warning("%d records left out, no rule can score them: %s", left_out.total(), kinds)
    if not samples:
        raise DataError(f"{path}: no record that a rule can score; add multiple choice or numerical ones")
    return samples


# ---------------------------------------------------------------------------------------------- frames and their times

def frame_indices(count: int, rate: float, fps: float, max_frames: int, bounds=None) -> tuple[np.ndarray, float]:
    """Which frames are taken of a video of `count` frames at `rate` a second -> (indices [n], seconds covered).

    n = the largest even number not above min(max(D * fps, 4), max_frames, count), at least 2, as Qwen's own utility:
    22 s at fps 1 and max_frames 16 -> 16 frames, 8 visual steps of 2 * 22 / 16 = 2.75 s. bounds: (start, end) in
    seconds narrow the video first; raises ValueError if they lie outside.
    """
    first, last = 0, count - 1
    if bounds is not None:
        first, last = max(0, round(bounds[0] * rate)), min(last, round(bounds[1] * rate))
        if first > last:
            raise ValueError(f"its bounds {bounds[0]:g} to {bounds[1]:g} s lie outside the video")
    count = last - first + 1
    duration = count / rate
    n = max(2, int(min(max(duration * fps, 4), max_frames, count)) // 2 * 2)
    return np.linspace(first, last, n).round().astype(np.int64), duration


def read_picture(path: str) -> Tensor:
    """uint8 [3, H, W]; raises what Pillow raises."""
    from PIL import Image  # for pictures only
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def sample_frames(path: str, fps: float, max_frames: int, bounds=None,
                  each: Callable[[Tensor], Tensor] = lambda frame: frame) -> tuple[Tensor, float, float]:
    """Evenly spaced frames: (uint8 [n, 3, H, W], seconds per visual step = 2 * D / n, D seconds), by `frame_indices`.

    path: a video, or a folder of pictures (3 a second). each: applied to every frame [3, H, W] before the next is read,
    so that one full-size frame is in memory at a time. Raises ValueError, and what decord, Pillow and torch raise.
    """
    if os.path.isdir(path):
        names = [name for name in os.listdir(path) if name.lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".webp"))]
        names.sort(key=lambda name: ([int(digits) for digits in re.findall("[0-9]{1,18}", name)], name))  # 9 before 10
        count, rate = len(names), 3.0  # as MVBench cut them
    elif os.path.isfile(path):  # a named pipe is none: opening it would wait for its writer
        video, names = decord.VideoReader(path, num_threads=1), None
        count, rate = len(video), float(video.get_avg_fps())
    else:
        raise ValueError("neither a file nor a folder")
    if not (count > 0 and 0 < rate < math.inf):
        raise ValueError(f"{count} frames at {rate} a second")
    indices, duration = frame_indices(count, rate, fps, max_frames, bounds)
    frames = []
    for index in indices.tolist():
        if names:
            frame = read_picture(os.path.join(path, names[index]))
        else:
            video.seek_accurate(index)  # exact: decodes on from the last frame or from the key frame before
            frame = torch.from_numpy(video.next().asnumpy()).permute(2, 0, 1)  # [3, H, W]
        frames.append(each(frame))
    return torch.stack(frames), 2 * duration / len(frames), duration


# ------------------------------------------------------------------------------------------------------------- patches

PATCH, MERGE = 14, 2  # pixels of a patch's side; patches of a merged token's side
PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def resized_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen's smart resize: multiples of 28 nearest to the size, brought between the pixel limits. Example: 240 x 426
    with both limits 50,176 -> 168 x 280, 60 tokens. Raises ValueError if one side is over 200 times the other."""
    unit = PATCH * MERGE
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is over 200 times the other")
    new = [round(side / unit) * unit for side in (height, width)]
    if new[0] * new[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new = [max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)]
    elif new[0] * new[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new = [math.ceil(side * grow / unit) * unit for side in (height, width)]
    return new[0], new[1]


def _resize(frames: Tensor, min_pixels: int, max_pixels: int) -> Tensor:
    size = resized_size(*frames.shape[-2:], min_pixels, max_pixels)
    if size == tuple(frames.shape[-2:]):
        return frames
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True)  # uint8: float would differ by 0.15


def _patchify(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])  # a visual step is two frames
    x = (frames.float() / 255 - PIXEL_MEAN) / PIXEL_STD  # [T, 3, h*14, w*14]
    t, h, w = len(x) // 2, x.shape[2] // PATCH, x.shape[3] // PATCH
    x = x.reshape(t, 2, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # [t, h/2, w/2, 2, 2, channel, 2 frames, 14, 14]: merged tokens together
    return x.reshape(t * h * w, 3 * 2 * PATCH * PATCH), (t, h, w)  # [t*h*w, 1176]


def frames_to_patches(frames: Tensor, min_pixels: int, max_pixels: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames as Qwen2.5-VL's vision tower takes them.

    frames: uint8 [T, 3, H, W], RGB; an odd T repeats the last frame; min_pixels, max_pixels: limits of ONE frame's area
    -> (patches float32 [t*h*w, 1176], (t, h, w)) with t = ceil(T / 2), h and w in patches of 14 pixels: 16 frames of
    224 x 224 -> [2048, 1176], (8, 16, 16), 512 tokens. Raises ValueError if one side is over 200 times the other.
    """
    return _patchify(_resize(frames, min_pixels, max_pixels))


@dataclass
class Visual:
    """What the vision tower gets for one sample, the video before the picture."""
    patches: Tensor  # float32 [N, 1176]
    masked_patches: Optional[Tensor]  # the same with cells blackened, if asked for
    video_grids: list[tuple[int, int, int]]  # (t, h, w) in patches
    image_grids: list[tuple[int, int, int]]
    seconds_per_grid: list[float]  # seconds per visual step of each video
    duration: Optional[float]  # seconds of the video that the frames cover
    num_frames: int  # sampled frames


def _mask(seed, height: int, width: int) -> Tensor:
    """bool [H, W]: False in the 14 x 14 cells to blacken, each with probability 0.6."""
    keep = np.random.default_rng(seed).random((-(-height // PATCH), -(-width // PATCH))) >= 0.6
    return torch.from_numpy(keep.repeat(PATCH, 0).repeat(PATCH, 1)[:height, :width])


def read_visual(sample: Sample, *, fps: float, max_frames: int, min_pixels: int, max_pixels: int,
                mask_seed=None) -> Visual:
    """Decodes a sample's video and picture into patches, one full-size frame in memory at a time.

    mask_seed: ints; each 14 x 14 cell of the decoded frames is blackened with probability 0.6 before
    resizing, alike in all frames of the sample (PAPO, arXiv 2507.06448). Raises VideoError.
    """
    if sample.missing:  # never go on without the video that the question is about
        raise VideoError(f"{sample.missing[0]!r}: not found")

    def shrink(frame: Tensor) -> Tensor:  # [3, H, W] -> [1, 3, h, w], with the masked one [2, 3, h, w]
        versions = [frame] if mask_seed is None else [frame, frame * _mask(mask_seed, *frame.shape[1:])]
        return _resize(torch.stack(versions), min_pixels, max_pixels)

    visual = Visual(torch.empty(0, 1176), None, [], [], [], None, 0)
    parts = [torch.empty(1 if mask_seed is None else 2, 0, 1176)]
    for path, grids in ((sample.video, visual.video_grids), (sample.image, visual.image_grids)):
        if path is None:
            continue
        try:
            if grids is visual.video_grids:
                frames, seconds, visual.duration = sample_frames(path, fps, max_frames, sample.bounds, shrink)
                visual.seconds_per_grid, visual.num_frames = [seconds], len(frames)  # [n, 1 or 2, 3, h, w]
            else:
                frames = shrink(read_picture(path))[None]
        except Exception as error:  # decord, Pillow and torch raise some twenty kinds for damaged files
            reason = re.sub(r"\[[0-9:]+\] \S+ ", "", " ".join(str(error).split()))[:200]  # no decord source lines
            raise VideoError(f"{path!r}: cannot be read ({type(error).__name__}: {reason})") from None
        patches, (grid, *_) = zip(*map(_patchify, frames.unbind(1)))
        parts.append(torch.stack(patches))  # [1 or 2, t*h*w, 1176]
        grids.append(grid)
    visual.patches, *masked = torch.cat(parts, dim=1)  # [N, 1176] each
    visual.masked_patches = masked[0] if masked else None
    return visual


# -------------------------------------------------------------------------------------------------- decoding processes

def _serve(fd: int) -> None:
    """The life of a decoding process: requests in, patches out, until the other side is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides when we go
        signal.signal(number, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the codecs' chatter
    torch.set_num_threads(1)
    with suppress(ValueError):  # 4 GiB: a 16K frame fits, a bomb does not. ValueError: there is a stricter limit
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    connection = Connection(fd)
    with suppress(EOFError, ConnectionError):
        connection.send("ready")
        while True:
            fields, settings, seconds = connection.recv()
            signal.alarm(seconds)  # ends us, out of a decoder that hangs too, should the parent be gone
            try:
                visual = vars(read_visual(Sample(**fields), **settings))
                reply = {name: v.numpy() if isinstance(v, Tensor) else v for name, v in visual.items()}, None
            except VideoError as error:
                reply = None, str(error)
            signal.alarm(0)
            connection.send(reply)


class VideoReader:
    """Reads samples in long-lived processes that are timed out, ended and restarted one by one.

    with VideoReader(2, timeout=60, fps=1, max_frames=16, min_pixels=50176, max_pixels=50176) as reader:
        visual = reader.submit(sample).result()

    Each thread owns a process: a video that hangs or crashes its decoder costs that sample alone.
    """

    def __init__(self, processes: int = 2, timeout: float = 60.0, *, fps: float, max_frames: int, min_pixels: int,
                 max_pixels: int):
        self.timeout, self.settings = timeout, dict(fps=fps, max_frames=max_frames, min_pixels=min_pixels,
                                                    max_pixels=max_pixels)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decode")
        self._decoders: dict[int, tuple[subprocess.Popen, Connection]] = {}  # by thread
        self._lock, self._closed = threading.Lock(), False

    def submit(self, sample: Sample, mask_seed=None) -> Future:
        """Future of Visual, or of VideoError: cannot be read, time-out, crash of the decoder. A RuntimeError that is no
        VideoError means that no decoding process can be started at all."""
        return self._threads.submit(self._read, sample, mask_seed)

    def _decoder(self) -> tuple[subprocess.Popen, Connection]:
        """This thread's process, started if there is none or if it died."""
        with self._lock:
            if self._closed:
                raise VideoError("the reader was closed")
            process, connection = self._decoders.get(threading.get_ident(), (None, None))
            if process is not None and process.poll() is None:
                return process, connection
            connection, theirs = multiprocessing.Pipe()
            with theirs:
                command = [sys.executable, os.path.abspath(__file__), str(theirs.fileno())]
                process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            self._decoders[threading.get_ident()] = process, connection
        with suppress(EOFError, OSError):
            if connection.poll(300) and connection.recv() == "ready":  # importing torch from a cold network disk
                return process, connection
        process.kill()
        raise RuntimeError(f"a decoding process did not start (exit status {process.wait()})")

    def _read(self, sample: Sample, mask_seed) -> Visual:
        process, connection = self._decoder()
        try:
            connection.send((vars(sample), self.settings | {"mask_seed": mask_seed}, math.ceil(self.timeout) + 1))
            if connection.poll(self.timeout):
                fields, reason = connection.recv()
                if reason is not None:
                    raise VideoError(reason)
                return Visual(**{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()})
            reason = f"not decoded within {self.timeout:g} s"
        except (EOFError, OSError):
            reason = "its decoding process died"
        process.kill()
        process.wait()
        raise VideoError(f"{sample.video or sample.image!r}: {reason}")

    def close(self, *_) -> None:
        """Ends the processes at once; reads under way fail, reads not begun are cancelled."""
        with self._lock:
            self._closed = True
            for process, _ in self._decoders.values():
                process.kill()  # its thread, if it waits, sees the end of the connection
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process, connection in self._decoders.values():
            process.wait()
            connection.close()

    def __enter__(self):
        return self

    __exit__ = close


# ------------------------------------------------------------------------------------------------------------- prompts

@dataclass(kw_only=True)
class Prompt(Visual):
    """A sample as the model takes it: P tokens, N patches, F visual steps."""
    sample: Sample
    input_ids: Tensor  # int64 [P]
    frame_of_token: Tensor  # int64 [P]: visual step of a video token, -1 elsewhere
    num_steps: int  # F; 0 without a video


def prompt_text(sample: Sample, visual: Optional[Visual]) -> str:
    """The user's words: question, options a line each, instruction (Fig. E; Fig. D for grounding; none for a description)."""
    question = "\n".join([sample.question] + [f"{letter}. {words}" for letter, words in zip(LETTERS, sample.options)])
    if sample.kind == "description":
        return question
    if sample.kind != "grounding":
        return (f"{question}\nOutput the thinking process in <think> </think> and final answer in <answer> </answer> "
                "tags, i.e., <think> reasoning process here </think><answer> answer here </answer>.")
    return (f"The video is {sample.duration:g} seconds long, with {visual.num_frames} frames evenly sampled from it.\n"
            "Based on the video content, think about the question deeply, select the correct option, and provide ONE "
            "or MORE time periods in the video where the clues corresponding to the correct option occur.\n"
            f"Question: {question}\n"
            "Output the thinking process in <think> </think> tags, final answer in <answer> </answer> tags and time "
            "clues in <time> </time> tags, i.e., <think> reasoning process here </think> <answer> answer here "
            "</answer> <time> 8.4 to 12.5, 25 to 30.2 </time>")


def build_prompt(sample: Sample, visual: Visual, tokenizer) -> Prompt:
    """Tokenises the chat and widens each picture token to the tokens of its grid.

    A grid (t, h, w) takes t * h * w / 4 tokens: (2, 4, 4) becomes 8, with frame_of_token 0 0 0 0 1 1 1 1.
    Raises ValueError if the tokenizer's chat template does not place the video and the picture.
    """
    # "<|im_end|>" in a question must stay four words, not end the turn: every control token starts with "<|"
    words = prompt_text(sample, visual).replace("<|", "< |")
    content = [{"type": "video"}] * len(visual.video_grids) + [{"type": "image"}] * len(visual.image_grids)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": content + [{"type": "text", "text": words}]}],
                                         add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(chat, add_special_tokens=False)["input_ids"]
    video, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<|video_pad|>", "<|image_pad|>"))
    grids = {video: list(visual.video_grids), image: list(visual.image_grids)}
    if any(tokens.count(token) != len(grids[token]) for token in grids):
        raise ValueError("the chat template does not place each video and picture once; is it Qwen2.5-VL's?")
    ids, steps = [], []
    for token in tokens:
        t, h, w = grids[token].pop(0) if token in grids else (1, 2, 2)  # a word takes one token
        ids += [token] * (t * h * w // 4)
        steps += [step if token == video else -1 for step in range(t) for _ in range(h * w // 4)]
    num_steps, crucial = sum(t for t, _, _ in visual.video_grids), sample.crucial_step
    if crucial is not None and (visual.seconds_per_grid != [2.0] or crucial >= num_steps):
        sample = replace(sample, crucial_step=None)  # other frames make other steps
    return Prompt(**vars(visual), sample=sample, input_ids=torch.tensor(ids), frame_of_token=torch.tensor(steps),
                  num_steps=num_steps)


def read_ahead(reader: VideoReader, batches: Iterable[dict]) -> Iterator[dict[int, tuple[Sample, Future]]]:
    """Batches {position: (sample, mask_seed or None)} -> {position: (sample, its Visual to come)}, each being decoded
    while the one before it is at work. The position is the caller's and names the sample's place."""
    coming = ({position: (sample, reader.submit(sample, mask)) for position, (sample, mask) in batch.items()}
              for batch in batches)
    for batch, _ in pairwise(chain(coming, [None])):  # the next batch is submitted before this one is handed out
        yield batch


def build_prompts(batch: dict[int, tuple[Sample, Future]], tokenizer, max_tokens: int):
    """(prompts by position, a record of every sample that is left out with the reason): what cannot be read is
    `unreadable`; prompts of more than `max_tokens` tokens are never cut."""
    prompts, skipped = {}, []
    for position, (sample, visual) in batch.items():
        try:
            prompt, unreadable = build_prompt(sample, visual.result(), tokenizer), False
            if len(prompt.input_ids) <= max_tokens:
                prompts[position] = prompt
                continue
            reason = f"prompt of {len(prompt.input_ids)} tokens, over the limit of {max_tokens}"
        except VideoError as error:
            reason, unreadable = str(error), True
        path = sample.video or sample.image
        skipped.append(dict(position=position, id=sample.id, path=path, reason=reason, unreadable=unreadable))
    return prompts, skipped


# --------------------------------------------------------------------------------- rewards, in linear time on any text

def element_text(text: str, tag: str) -> Optional[str]:
    """What stands in the only <tag> element; None if there are none or several, or it is not closed."""
    if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
        return None
    match = re.search(f"<{tag}>(.*)</{tag}>", text, re.DOTALL)
    return match[1].strip() if match else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(" .").casefold()


def match_choice(text: str, options: list[str]) -> Optional[int]:
    """Index of the option that a text names: "C", "C.", "(C)", "C. the words" or the words alone; else None."""
    match = re.match(r"\(([A-Z])\)|([A-Z])[.):]|([A-Z])(?=[\s.]*$)", text.strip())
    if match:
        index, rest = LETTERS.index(match[match.lastindex]), _plain(text.strip()[match.end():])
        if index < len(options) and rest in ("", _plain(options[index])):
            return index
    same = [i for i, words in enumerate(options) if _plain(words) == _plain(text) != ""]
    return same[0] if len(same) == 1 else None  # words that two options share name neither


_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?")


def parse_number(text: str) -> Optional[float]:
    """The number that a text starts with; a unit may follow ("12.5 meters"). ASCII digits only, finite."""
    word = (text.split(None, 1) or [""])[0].rstrip(".%")
    if len(word) > 40 or not _NUMBER.fullmatch(word):
        return None
    value = float(word.replace(",", ""))
    return value if math.isfinite(value) else None


def mean_relative_accuracy(pred: float, target: float) -> float:
    """Mean over theta in {0.50, 0.55, .., 0.95} of [|pred - target| / |target| <= 1 - theta] (VSI-Bench).
    Examples: 95 for 100 -> 1.0; 150 for 100 -> 0.1; target 0 -> 1.0 for 0, else 0.0."""
    error = abs(pred - target) / abs(target) if target else float(pred != 0)
    return sum(error <= 0.05 * k + 1e-9 for k in range(1, 11)) / 10  # 1e-9: 0.05 is not exact in binary


def accuracy_reward(response: str, sample: Sample) -> float:
    """1.0 if the single <answer> element names the right option, else 0.0; numbers: mean relative accuracy."""
    answer = element_text(response, "answer") or ""
    if sample.kind == "number":
        pred = parse_number(answer)
        return 0.0 if pred is None else mean_relative_accuracy(pred, parse_number(sample.answer))
    choice = match_choice(answer, sample.options)
    return float(choice is not None and LETTERS[choice] == sample.answer)


def format_reward(response: str, sample: Sample) -> float:
    """1.0 for <think>..</think><answer>..</answer> (grounding: then <time>..</time>) and nothing else but space."""
    tags = ("think", "answer", "time") if sample.kind == "grounding" else ("think", "answer")
    if any(response.count(mark) != 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>")):
        return 0.0
    elements = r"\s*".join(f"<{tag}>.*</{tag}>" for tag in tags)
    return float(re.fullmatch(rf"\s*{elements}\s*", response, re.DOTALL) is not None)


_SECONDS = r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)) ?(?:s|secs?|seconds?)?"
_SPAN = re.compile(rf"(?:from )?{_SECONDS} ?(?:to|-|\u2013|\u2014) ?{_SECONDS}")


def parse_spans(text: str) -> list[tuple[float, float]]:
    """"8.4 to 12.5, 25s - 30.2s" -> [(8.4, 12.5), (25.0, 30.2)]; pieces that are no span, or end first, drop out."""
    spans = []
    for piece in re.split(r"[,;\n]|\band\b", text.lower()):
        piece = " ".join(piece.split()).lstrip(" [({").rstrip(" ])}.")
        match = _SPAN.fullmatch(piece) if len(piece) <= 60 else None  # a short piece has a bounded cost
        if match and float(match[1]) < float(match[2]):
            spans.append((float(match[1]), float(match[2])))
    return spans


def temporal_iou(pred_spans, label_spans, duration: float) -> tuple[float, float]:
    """(IoU, IoP) of two unions of (start, end) spans in seconds, clipped to [0, duration] (NExT-GQA).

    IoU = |P and T| / |P or T|, IoP = |P and T| / |P|; 0 for an empty P. P = 2 to 6, T = 4 to 10 -> (0.25, 0.5).
    """
    unions = [np.array(spans, dtype=float).reshape(-1, 2).clip(0, duration) for spans in (pred_spans, label_spans)]
    unions = [spans[spans[:, 0] < spans[:, 1]] for spans in unions]
    edges = np.unique(np.concatenate(unions))  # they cut the time into pieces, each inside or outside of a union
    inside = []  # bool [pieces] each: up to the piece's start more spans have begun than ended
    for spans in unions:
        begun, ended = (np.searchsorted(np.sort(times), edges[:-1], side="right") for times in spans.T)
        inside.append(begun > ended)
    (pred, label), lengths = inside, np.diff(edges)
    both, either, own = (float(lengths[pieces].sum()) for pieces in (pred & label, pred | label, pred))
    return (both / either, both / own) if own > 0 else (0.0, 0.0)


def temporal_iou_reward(response: str, sample: Sample) -> float:
    """IoU of the spans in the single <time> element with the labelled ones; 0.0 where there are none."""
    return temporal_iou(parse_spans(element_text(response, "time") or ""), sample.spans, sample.duration)[0]


def task_reward(response: str, sample: Sample) -> tuple[float, float, float]:
    """(reward, accuracy, format): 0.9 x accuracy + 0.1 x format; grounding: accuracy + 0.1 x format + IoU."""
    accuracy, form = accuracy_reward(response, sample), format_reward(response, sample)
    if sample.kind == "grounding":
        return accuracy + 0.1 * form + temporal_iou_reward(response, sample), accuracy, form
    return 0.9 * accuracy + 0.1 * form, accuracy, form


# --------------------------------------------------------------------------------------------------- the built-in task

_DRAW = {  # x to the right, y down, -1 to 1 over a cell
    "star": lambda x, y: np.hypot(x, y) < 0.4 + 0.6 * (1 - 2 * np.abs(
        (np.arctan2(x, -y) * 2.5 / np.pi + 0.5) % 1 - 0.5)) ** 2,
    "circle": lambda x, y: np.hypot(x, y) < 0.7,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.9,
    "triangle": lambda x, y: (np.abs(x) < (y + 0.95) / 2) & (y < 0.9),
    "cross": lambda x, y: np.minimum(np.abs(x), np.abs(y)) < 0.25,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) < 0.2,
    "moon": lambda x, y: (np.hypot(x, y) < 0.95) & (np.hypot(x - 0.5, y) > 0.7),
    "hourglass": lambda x, y: (np.abs(x) < np.abs(y)) & (np.abs(y) < 0.9),
}
_PAINT = {"red": (220, 50, 50), "green": (50, 190, 70), "blue": (60, 90, 230), "yellow": (230, 210, 60)}
TOY_SHAPES, TOY_COLOURS = tuple(_DRAW), tuple(_PAINT)
TOY_TOKEN = r"</?[a-z]+>|\w+|[^\w\s]"  # what counts as one word for the built-in task's tokenizer
_TOY_LEADS = ("the", "i see a", "there is a", "look at the video : a")


def _toy_plan(rng: np.random.Generator) -> tuple[list[str], list[str], list[int]]:
    """What the 8 steps show: each shape once, and each colour twice, so that no colour is the better guess."""
    shapes = [TOY_SHAPES[i] for i in rng.permutation(8)]
    colours = [TOY_COLOURS[i % 4] for i in rng.permutation(8)]
    return shapes, colours, rng.integers(4, size=8).tolist()


def toy_video(rng: np.random.Generator) -> tuple[Tensor, list[str], list[str], list[int]]:
    """One built-in video: (frames uint8 [16, 3, 56, 56], shapes [8], colours [8], cells [8]).

    Entry s of the lists is visual step s (frames 2s and 2s + 1, equal but for noise of 20 grey levels): one shape, in
    cell c at row c // 2, column c % 2, which is merged token 4 * s + c of the video.
    """
    shapes, colours, cells = _toy_plan(rng)
    frames = np.full((8, 1, 56, 56, 3), 60.0)
    y, x = np.mgrid[:28, :28] / 13.5 - 1
    for step, (shape, colour, cell) in enumerate(zip(shapes, colours, cells)):
        top, left = 28 * (cell // 2), 28 * (cell % 2)
        frames[step, 0, top:top + 28, left:left + 28][_DRAW[shape](x, y)] = _PAINT[colour]
    frames = frames + 20 * rng.standard_normal((8, 2, 56, 56, 3))
    frames = frames.reshape(16, 56, 56, 3).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), shapes, colours, cells


def _toy_sample(shape: str, colour: str, step: Optional[int] = None) -> Sample:
    return Sample("built-in", f"what colour is the {shape} ?", list(TOY_COLOURS), LETTERS[TOY_COLOURS.index(colour)],
                  "choice", crucial_step=step)


def toy_response(shape: str, colour: str, rng: np.random.Generator) -> str:
    """A right answer in one of four wordings; the shape stands directly before the colour."""
    answer = _toy_sample(shape, colour).answer
    return f"<think> {_TOY_LEADS[rng.integers(4)]} {shape} {colour} </think> <answer> {answer} </answer>"


def toy_vocabulary() -> list[str]:
    """Every word (TOY_TOKEN) of the built-in prompts and responses, each once."""
    asked = [prompt_text(_toy_sample(shape, "red"), None) for shape in TOY_SHAPES]
    return list(dict.fromkeys(re.findall(TOY_TOKEN, " ".join([*asked, *_TOY_LEADS, *TOY_COLOURS]))))


def _write_whole(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)  # an interrupted run leaves the whole file or none


def write_avi(path, frames: Tensor, fps: float) -> None:
    """Writes uint8 [T, 3, H, W] as uncompressed 24-bit AVI, the one kind of video that needs no encoder."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    count, _, height, width = frames.shape
    rows = frames.permute(0, 2, 3, 1).flip(1, 3).reshape(count, height, width * 3)  # bottom row first, BGR
    rows = F.pad(rows, (0, -width * 3 % 4)).contiguous().numpy()  # rows of whole 4 bytes
    size, rate = rows[0].nbytes, Fraction(fps).limit_denominator(1001)
    header = struct.pack("<10I16x", round(1e6 / rate), int(size * rate), 0, 0x10, count, 0, 1, size, width, height)
    stream = struct.pack("<4s4sIHHIIIIIIII4H", b"vids", b"DIB ", 0, 0, 0, 0, rate.denominator, rate.numerator, 0, count,
                         size, 0xFFFFFFFF, 0, 0, 0, width, height)
    pixels = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, size, 0, 0, 0, 0)
    lists = chunk(b"LIST", b"hdrl" + chunk(b"avih", header) + chunk(
        b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", pixels)))
    movie = b"movi" + b"".join(chunk(b"00db", frame.tobytes()) for frame in rows)
    index = b"".join(struct.pack("<4sIII", b"00db", 0x10, 4 + i * (8 + size), size) for i in range(count))  # all key
    _write_whole(Path(path), chunk(b"RIFF", b"AVI " + lists + chunk(b"LIST", movie) + chunk(b"idx1", index)))


def make_toy_data(folder, videos: tuple[int, int] = (512, 128), questions: int = 4, seed: int = 0) -> None:
    """Makes folder/train.json, folder/test.json (Video-R1 format) and folder/videos/*.avi, 16 s at 1 frame a second.

    videos: how many to train and to test on; questions: about each. All follows from the seed, and whole files of an
    earlier call are kept.
    """
    folder, options = Path(folder), [f"{letter}. {colour}" for letter, colour in zip(LETTERS, TOY_COLOURS)]
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for split, (name, count) in enumerate(zip(("train", "test"), videos)):
        records = []
        for number in range(count):
            path = f"videos/{name}_{seed}_{number:05d}.avi"
            shapes, colours, _ = _toy_plan(np.random.default_rng([seed, split, number]))
            if not (folder / path).exists():
                write_avi(folder / path, toy_video(np.random.default_rng([seed, split, number]))[0], 1)
            for step in np.random.default_rng([seed, split, number, 1]).permutation(8)[:questions].tolist():
                sample = _toy_sample(shapes[step], colours[step])
                records.append(dict(
                    problem_id=len(records), problem=sample.question, data_type="video", problem_type="multiple choice",
                    path=path, data_source="built-in", duration=16.0, crucial_step=step, options=options,
                    solution=f"<answer>{sample.answer}</answer>"))
        text, file = json.dumps(records, indent=1).encode(), folder / f"{name}.json"
        if not file.exists() or file.read_bytes() != text:
            _write_whole(file, text)


@dataclass
class Lesson:
    """Supervision for the tiny model: a built-in video, a question about each of its 8 steps, and the answers."""
    prompt: Prompt  # up to the end of the video
    token_words: Tensor  # [visual tokens, 2]: ids of the shape and the colour that a token shows; padding: empty
    response_ids: Tensor  # [8, R]: the rest of the prompts, then the responses
    response_mask: Tensor  # bool [8, R]
    target_mask: Tensor  # bool [8, R]: the responses alone


def toy_prompt(rng: np.random.Generator, tokenizer, step: int = 0) -> tuple[Prompt, list[str], list[str], list[int]]:
    """(prompt, shapes, colours, cells): a built-in video that is in no file, and the question about one step."""
    frames, shapes, colours, cells = toy_video(rng)
    patches, grid = frames_to_patches(frames, 3136, 3136)
    sample, visual = _toy_sample(shapes[step], colours[step], step), Visual(patches, None, [grid], [], [2.0], 16.0, 16)
    return build_prompt(sample, visual, tokenizer), shapes, colours, cells


def toy_lessons(tokenizer, count: int, seed: int) -> list[Lesson]:
    """Lessons about `count` videos that are in neither train.json nor test.json."""
    ends, lessons = {}, []
    for step in range(8):  # after the video, all prompts about a shape are alike
        prompt, shapes, _, _ = toy_prompt(np.random.default_rng(0), tokenizer, step)
        shared = int((prompt.frame_of_token >= 0).nonzero().max()) + 2  # through the video and its end mark
        ends[shapes[step]] = prompt.input_ids[shared:].tolist()
    for number in range(count):
        rng = np.random.default_rng([seed, 2, number])
        prompt, shapes, colours, cells = toy_prompt(rng, tokenizer)
        prompt = replace(prompt, input_ids=prompt.input_ids[:shared], frame_of_token=prompt.frame_of_token[:shared])
        words = torch.full((8, 4, 2), tokenizer.pad_token_id)
        pairs = [tokenizer.convert_tokens_to_ids([shape, colour]) for shape, colour in zip(shapes, colours)]
        words[range(8), cells] = torch.tensor(pairs)
        rows = [ends[shape] + tokenizer(toy_response(shape, colour, rng)).input_ids + [tokenizer.eos_token_id]
                for shape, colour in zip(shapes, colours)]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # [8, R]
        place = torch.arange(ids.shape[1])
        real = place < torch.tensor([[len(row)] for row in rows])
        target = real & (place >= torch.tensor([[len(ends[shape])] for shape in shapes]))
        lessons.append(Lesson(prompt, words.flatten(0, 1), ids, real, target))
    return lessons


if __name__ == "__main__":  # started by VideoReader
    _serve(int(sys.argv[1]))
