"""From an annotation record to tensors, and how a response to it is scored.

Top to bottom: annotation -> Sample -> decoded frames and their times -> patches -> Visual (read in
processes of their own, by VideoReader) -> Prompt; then the rewards; then the built-in videos.
Nothing here knows the model: what leaves this file are tensors and small dataclasses.
Section names refer to the paper's supplement (arXiv 2602.23823).
"""
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Iterable, Iterator, Optional

import decord
import numpy as np
import torch
import torch.nn.functional as F


class DataError(ValueError):
    """A bad annotation: one line with file, record number, field and the mend."""


class VideoError(RuntimeError):
    """A video or picture that cannot be read: one line with the reason."""


# ---------------------------------------------------------------- annotations
@dataclass
class Sample:
    """One question. Times are seconds; a path that was not found is None and listed in `missing`."""
    id: str                              # "train.json:12", records counted from 0
    question: str
    options: list[str]                   # words without letters; [] if there is no choice
    answer: str                          # "A".. for choice and grounding, a number as text for number
    kind: str                            # "choice" | "number" | "grounding" (a choice with time spans)
    video: Optional[str] = None
    image: Optional[str] = None
    missing: list[str] = field(default_factory=list)
    duration: Optional[float] = None     # as annotated
    spans: list[tuple[float, float]] = field(default_factory=list)
    group: str = ""                      # for tables by task
    crucial_step: Optional[int] = None   # built-in task: the visual step that shows the answer
    bounds: Optional[tuple[float, float]] = None  # the part of the video that is asked about


class _Record:
    """The fields of one annotation record, each checked when it is taken."""

    def __init__(self, where: str, fields: dict):
        self.where, self.fields = where, fields

    def error(self, name: str, mend: str) -> DataError:
        return DataError(f"{self.where}, field '{name}': {mend}")

    def text(self, name: str, value=None) -> str:
        value = self.fields.get(name) if value is None else value
        if not isinstance(value, str) or not value.strip():
            raise self.error(name, "missing or no text; write a non-empty string")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise self.error(name, "half of a surrogate pair is no character; write valid Unicode")
        return value.strip()

    def texts(self, name: str) -> list[str]:
        values = self.fields.get(name)
        if not isinstance(values, list):
            raise self.error(name, "missing or no list; write a list of strings")
        return [" ".join(self.text(name, "" if v is None else v).split()) for v in values]  # one line each

    def number(self, name: str, value=None) -> Optional[float]:
        value = self.fields.get(name) if value is None else value
        if value is None:
            return None
        if type(value) not in (int, float) or not abs(value) < 1e9:  # NaN and infinity fail as well
            raise self.error(name, "not a finite number; write seconds or a count")
        return float(value)

    def options(self, words: list[str], name: str = "options") -> list[str]:
        if not 2 <= len(words) <= 26:
            raise self.error(name, f"{len(words)} options; a choice needs 2 to 26")
        marks = [[f"{c}.", f"{c})", f"{c}:", f"({c})"] for c in map(chr, range(65, 65 + len(words)))]
        marked = [next((m for m in ms if w.startswith(m)), None) for ms, w in zip(marks, words)]
        return words if None in marked else [w[len(m):].strip() for m, w in zip(marked, words)]

    def answer(self, name: str, options: list[str]) -> str:
        text = self.text(name)
        if "<answer>" in text:
            text = _element(text, "answer") or ""
        choice = match_choice(text, options)
        if choice is None:
            raise self.error(name, f"{text[:60]!r} is not among the {len(options)} options; name a letter")
        return chr(65 + choice)


_UNSCORED = {"OCR", "free-form"}  # no rule decides these: left out and counted


def _read_video_r1(record: _Record, seed: list[int]) -> Optional[dict]:
    kind = record.text("problem_type")
    if kind in _UNSCORED:
        return None
    if kind == "multiple choice":
        options = record.options(record.texts("options"))
        answer, kind = record.answer("solution", options), "choice"
    elif kind in ("numerical", "regression"):
        options, kind, answer = [], "number", record.text("solution")
        answer = (_element(answer, "answer") or "") if "<answer>" in answer else answer
        if _number(answer) is None:
            raise record.error("solution", f"{answer[:60]!r} is no number; or set problem_type to free-form")
    else:
        raise record.error("problem_type", f"{kind[:60]!r} is unknown; use multiple choice, numerical, "
                                           "regression, OCR or free-form")
    medium = record.text("data_type")
    if medium not in ("video", "image"):
        raise record.error("data_type", "write video or image")
    step = record.number("crucial_step")
    group = record.text("data_source") if record.fields.get("data_source") else record.text("problem_type")
    return dict(question=record.text("problem"), options=options, answer=answer.strip(), kind=kind, group=group,
                duration=record.number("duration"), crucial_step=None if step is None else int(step),
                **{medium: record.text("path")})


def _read_next_gqa(record: _Record, seed: list[int]) -> dict:
    options, answer = record.options(record.texts("options")), record.fields.get("answer")
    if type(answer) is int or isinstance(answer, str) and re.fullmatch("[0-9]{1,2}", answer):  # counted from 0
        if not 0 <= int(answer) < len(options):
            raise record.error("answer", f"{answer} is not among the {len(options)} options; count from 0")
        answer = chr(65 + int(answer))
    else:
        answer = record.answer("answer", options)
    spans, duration = record.fields.get("time_clues"), record.number("duration")
    if not isinstance(spans, list) or not spans or any(not isinstance(s, list) or len(s) != 2 for s in spans):
        raise record.error("time_clues", "write a list of [start, end] in seconds")
    spans = [tuple(record.number("time_clues", "" if t is None else t) for t in span) for span in spans]
    if any(start > end for start, end in spans):
        raise record.error("time_clues", "a span ends before it starts; write [start, end]")
    if duration is None or duration <= 0:
        raise record.error("duration", "missing or not above 0; write the seconds of the video")
    return dict(question=record.text("question"), options=options, answer=answer, kind="grounding", spans=spans,
                duration=duration, group=str(record.fields.get("qtype", "")), video=record.text("video_path"))


def _read_seed_bench_r1(record: _Record, seed: list[int]) -> dict:
    if record.fields.get("golden_choice_idx") is not None:
        options = record.options([record.text(f"choice_{c}") for c in "abcd"], "choice_a")
        answer = record.answer("golden_choice_idx", options)
    else:  # training records name wrong answers: three of them, shuffled alike in every run
        right, rng = " ".join(record.text("answer").split()), np.random.default_rng(seed)
        wrong = [w for w in dict.fromkeys(record.texts("negative_answers")) if _plain(w) != _plain(right)]
        if len(wrong) < 3:
            raise record.error("negative_answers", f"{len(wrong)} wrong answers; write at least 3")
        options = [wrong[i] for i in rng.choice(len(wrong), 3, replace=False)]
        place = int(rng.integers(4))
        options.insert(place, right)
        answer = chr(65 + place)
    source, progress = record.text("video_source"), record.fields.get("task_progress_metadata")
    if not isinstance(progress, list):
        raise record.error("task_progress_metadata", "missing or no list; an empty list means no video")
    video = f"videos/{source}/{record.text('video_basename')}" if progress else None
    return dict(question=record.text("question"), options=options, answer=answer, kind="choice", group=source,
                duration=record.number("duration") or None, video=video,
                image=f"images/{source}/{record.text('current_observation_basename')}")


# name, the field that gives the format away, reader (None: the record cannot be scored by rule)
_FORMATS = (("Video-R1, Perception Test, built-in", "problem", _read_video_r1),
            ("NExT-GQA", "time_clues", _read_next_gqa),
            ("SEED-Bench-R1", "current_observation_basename", _read_seed_bench_r1))


def _records(path: Path) -> list:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of an annotation (.json or .jsonl)") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    number, records = 0, []
    try:
        if path.suffix != ".jsonl":
            records = json.loads(text)
        else:  # not splitlines: a JSON string may hold U+2028
            for number, line in enumerate(line for line in text.split("\n") if line.strip()):
                records.append(json.loads(line))
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError and integers without end
        at = f", record {number}" if path.suffix == ".jsonl" else ""
        raise DataError(f"{path}{at}: not valid JSON ({error}); is the file complete?") from None
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: not a list of records; write [{{...}}, ...], or one record a line in .jsonl")
    return records


class _Finder:
    """Looks paths up, on their text alone: data sets may contain symbolic links."""

    def __init__(self, root: Optional[str], folder: Path):
        self.root, self.folder, self.names = root, folder, None

    def find(self, path: str) -> Optional[str]:
        if self.root is None:
            whole = os.path.join(self.folder, path)
            return whole if os.path.exists(whole) else None
        parts = [p for p in path.split("/") if p not in ("", ".")]
        for i in range(len(parts)):  # as given, then ever shorter tails
            whole = os.path.join(self.root, *parts[i:])
            if os.path.exists(whole):
                return whole
        if self.names is None:  # the whole tree, once, and only if something was not found above
            self.names = {}
            for folder, _, files in os.walk(self.root):
                for name in files:
                    self.names.setdefault(name, []).append(os.path.join(folder, name))
        places = self.names.get(parts[-1], []) if parts else []
        return places[0] if len(places) == 1 else None  # of two alike, none: a guess may be another video


def load_samples(path, video_root=None, *, seed: int = 0) -> list[Sample]:
    """Reads annotations: Video-R1, Perception Test, NExT-GQA, SEED-Bench-R1, built-in, told by their fields.

    path: one .json or .jsonl, or several joined by commas. video_root: a video is looked up there as given,
    then by its longest existing tail, then by its name; None: as given, from the annotation's folder. Videos
    not found are listed in `Sample.missing`. Records that no rule can score (OCR, free-form) are left out;
    their number is logged. seed: shuffles the options of SEED-Bench-R1 training records.
    Raises DataError, one line, on the first bad record.
    """
    paths = [Path(p.strip()) for p in str(path).split(",") if p.strip()]
    root = None if video_root is None else str(video_root)
    if not paths:
        raise DataError("no annotation; give the path of a .json or .jsonl file")
    if root is not None and not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; give the folder of the videos")
    samples, left_out = [], {}
    for file_number, path in enumerate(paths):
        name = path.name if sum(p.name == path.name for p in paths) == 1 else str(path)  # ids stay unique
        finder = _Finder(root, path.parent)
        for number, fields in enumerate(_records(path)):
            record = _Record(f"{name}, record {number}", fields)
            if not isinstance(fields, dict):
                raise DataError(f"{record.where}: not a record; write {{\"problem\": ..., ...}}")
            reader = next((read for _, mark, read in _FORMATS if mark in fields), None)
            if reader is None:
                known = "; ".join(f"{format} (has '{mark}')" for format, mark, _ in _FORMATS)
                raise DataError(f"{record.where}: fields {sorted(fields)[:8]!r} are of no known format: {known}")
            values = reader(record, [seed, file_number, number])
            if values is None:
                left_out[fields["problem_type"]] = left_out.get(fields["problem_type"], 0) + 1
                continue
            sample = Sample(id=f"{name}:{number}", **values)
            for medium in ("video", "image"):
                given = getattr(sample, medium)
                if given is None:
                    continue
                if root is not None and ".." in given.split("/"):
                    raise DataError(f"{record.where}, {medium} {given[:200]!r}: leaves the video folder; drop the '..'")
                setattr(sample, medium, finder.find(given))
                if getattr(sample, medium) is None:
                    sample.missing.append(given)
            samples.append(sample)
    if left_out:
        logging.getLogger("appo").warning("%d records left out, no rule can score them: %s", sum(left_out.values()),
                                          ", ".join(f"{n} {kind}" for kind, n in sorted(left_out.items())))
    if not samples:
        raise DataError(f"{paths[0]}: no record that a rule can score; add multiple choice or numerical ones")
    return samples


# ---------------------------------------------------------------- frames and their times
_FOLDER_RATE = 3.0  # frames a second in a folder of pictures, as MVBench cut them
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def frame_indices(count: int, rate: float, fps: float, max_frames: int, bounds=None) -> tuple[np.ndarray, float]:
    """Which frames are taken of a video of `count` frames at `rate` a second -> (indices [n], seconds covered).

    n = the largest even number not above min(max(D * fps, 4), max_frames, count), at least 2, as Qwen's own
    utility: 22 s at fps 1 and max_frames 16 -> 16 frames, 8 visual steps of 2 * 22 / 16 = 2.75 s.
    bounds (start, end) in seconds narrow the video first. Raises ValueError outside the video.
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


def _picture(path: str) -> torch.Tensor:
    """uint8 [3, H, W]. Pillow is needed for pictures only."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))                                   # [H, W, 3]
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error, IndexError,
            Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
        raise VideoError(f"{path!r}: the picture cannot be read ({_reason(error)})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)                                   # [3, H, W]


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\[[0-9:]+\] [^ ]+ ", "", text)[:200]  # decord's time stamps and source lines


def _frames(path: str, fps: float, max_frames: int, bounds=None) -> tuple[Iterator[torch.Tensor], int, float]:
    """(iterator over n uint8 [3, H, W], n, seconds covered): one full-size frame in memory at a time."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            names = [n for n in os.listdir(path) if n.lower().endswith(_PICTURES)]
            names.sort(key=lambda n: ([int(digits) for digits in re.findall("[0-9]{1,18}", n)], n))  # 9 before 10
            count, rate = len(names), _FOLDER_RATE
            if not names:
                raise VideoError(f"{path!r}: a folder without pictures")
        elif not stat.S_ISREG(mode):  # opening a named pipe would wait for its writer
            raise VideoError(f"{path!r}: not a regular file")
        elif not os.access(path, os.R_OK):
            raise VideoError(f"{path!r}: no permission to read it")
        else:
            video = decord.VideoReader(path, num_threads=1)
            count, rate = len(video), float(video.get_avg_fps())
        if not (math.isfinite(rate) and rate > 0):
            raise VideoError(f"{path!r}: the file names no frame rate")
        indices, duration = frame_indices(count, rate, fps, max_frames, bounds)
    except (OSError, ValueError, AssertionError, decord.DECORDError) as error:
        raise VideoError(f"{path!r}: cannot be opened ({_reason(error)})") from None
    except RuntimeError as error:  # decord's word for "no video in it"; ours pass unchanged
        raise error if isinstance(error, VideoError) else VideoError(f"{path!r}: not a video") from None

    def decode():
        for index in indices.tolist():
            if stat.S_ISDIR(mode):
                yield _picture(os.path.join(path, names[index]))
                continue
            try:  # exact: decodes on from the last frame or from the key frame before
                video.seek_accurate(index)
                frame = video.next().asnumpy()                                        # [H, W, 3]
            except (decord.DECORDError, RuntimeError, StopIteration) as error:
                raise VideoError(f"{path!r}: frame {index} of {count} cannot be decoded ({_reason(error)})") from None
            yield torch.from_numpy(frame).permute(2, 0, 1)                             # [3, H, W]

    return decode(), len(indices), duration


def sample_frames(path: str, fps: float, max_frames: int, bounds=None) -> tuple[torch.Tensor, float, float]:
    """Evenly spaced frames: (uint8 [n, 3, H, W], seconds per visual step = 2 * D / n, D seconds).

    path: a video, or a folder of pictures (taken as 3 a second). Rule: `frame_indices`. Raises VideoError.
    """
    frames, n, duration = _frames(path, fps, max_frames, bounds)
    return _stack(path, list(frames)), 2 * duration / n, duration


def _stack(path: str, frames: list[torch.Tensor]) -> torch.Tensor:
    if any(frame.shape != frames[0].shape for frame in frames):
        raise VideoError(f"{path!r}: its pictures differ in size")
    return torch.stack(frames)                                                         # [n, 3, H, W]


# ---------------------------------------------------------------- patches
_PATCH, _MERGE = 14, 2
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def resized_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen's smart resize: multiples of 28 nearest to the size, brought between the pixel limits.

    240 x 426 with both limits 50,176 -> 168 x 280, 6 x 10 = 60 tokens: the nearest, 252 x 420, is too large.
    Raises ValueError if one side is over 200 times the other.
    """
    unit = _PATCH * _MERGE
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


def _resize(frames: torch.Tensor, min_pixels: int, max_pixels: int) -> torch.Tensor:
    size = resized_size(*frames.shape[-2:], min_pixels, max_pixels)
    # uint8 in and out: a float resize differs by 0.15 after normalisation
    return frames if size == tuple(frames.shape[-2:]) else F.interpolate(
        frames, size=size, mode="bicubic", antialias=True)                             # uint8 [T, 3, h, w]


def _patchify(frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])  # a visual step is two frames
    x = (frames.float() / 255 - _MEAN) / _STD                                          # [T, 3, h*14, w*14]
    t, h, w = len(x) // 2, x.shape[2] // _PATCH, x.shape[3] // _PATCH
    x = x.view(t, 2, 3, h // 2, 2, _PATCH, w // 2, 2, _PATCH)
    # the four patches of a merged token stand together: [t, h/2, w/2, 2, 2, channel, 2 frames, 14, 14]
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, 3 * 2 * _PATCH * _PATCH), (t, h, w)                     # [t*h*w, 1176]


def frames_to_patches(frames: torch.Tensor, min_pixels: int, max_pixels: int):
    """Frames as Qwen2.5-VL's vision tower takes them.

    frames: uint8 [T, 3, H, W], RGB; T = 1 for a picture; an odd T repeats the last frame.
    min_pixels, max_pixels: limits of ONE frame's area. Returns (patches float32 [t*h*w, 1176], (t, h, w)) with
    t = ceil(T / 2), h and w in patches of 14 pixels: 16 frames of 224 x 224 -> [2048, 1176], (8, 16, 16), which
    become 8 * 16 * 16 / 4 = 512 tokens. Raises ValueError if one side is over 200 times the other.
    """
    return _patchify(_resize(frames, min_pixels, max_pixels))


@dataclass
class Visual:
    """What the vision tower gets for one sample, the video before the picture."""
    patches: torch.Tensor                    # float32 [N, 1176]
    masked_patches: Optional[torch.Tensor]   # the same with cells blackened, if asked for
    video_grids: list[tuple[int, int, int]]  # (t, h, w) in patches
    image_grids: list[tuple[int, int, int]]
    seconds_per_grid: list[float]            # seconds per visual step of each video
    duration: Optional[float]                # seconds of the video that the frames cover
    num_frames: int                          # sampled frames


def read_visual(sample: Sample, *, fps: float, max_frames: int, min_pixels: int, max_pixels: int,
                mask_seed=None) -> Visual:
    """Decodes a sample's video and picture into patches, one full-size frame in memory at a time.

    mask_seed: ints (seed, step, slot); each 14 x 14 cell of the decoded frames is blackened with probability
    0.6 before resizing, alike in all frames of the video (PAPO, arXiv 2507.06448). Raises VideoError.
    """
    if sample.missing:  # never go on without the video that the question is about
        raise VideoError(f"{sample.missing[0]!r}: not found")
    rng = None if mask_seed is None else np.random.default_rng(list(mask_seed))
    visual = Visual(torch.empty(0, 1176), None, [], [], [], None, 0)
    plain, masked = [visual.patches], [visual.patches]
    for path, grids in ((sample.video, visual.video_grids), (sample.image, visual.image_grids)):
        if path is None:
            continue
        if grids is visual.video_grids:
            frames, visual.num_frames, visual.duration = _frames(path, fps, max_frames, sample.bounds)
            visual.seconds_per_grid.append(2 * visual.duration / visual.num_frames)
        else:
            frames = iter([_picture(path)])
        small, dark, keep = [], [], None
        for frame in frames:                                                           # [3, H, W]
            try:
                small.append(_resize(frame[None], min_pixels, max_pixels)[0])
            except ValueError as error:
                raise VideoError(f"{path!r}: {error}") from None
            if rng is not None:
                if keep is None or keep.shape != frame.shape[1:]:
                    keep = _mask(rng, *frame.shape[1:])
                dark.append(_resize((frame * keep)[None], min_pixels, max_pixels)[0])
        patches, grid = _patchify(_stack(path, small))
        plain.append(patches)
        grids.append(grid)
        if rng is not None:
            masked.append(_patchify(torch.stack(dark))[0])
    visual.patches = torch.cat(plain)                                                  # [N, 1176]
    visual.masked_patches = None if rng is None else torch.cat(masked)
    return visual


def _mask(rng: np.random.Generator, height: int, width: int) -> torch.Tensor:
    """uint8 [H, W]: 0 in the cells to blacken, 1 elsewhere."""
    keep = rng.random((-(-height // _PATCH), -(-width // _PATCH))) >= 0.6
    return torch.from_numpy(keep.astype(np.uint8).repeat(_PATCH, 0).repeat(_PATCH, 1)[:height, :width].copy())


# ---------------------------------------------------------------- decoding processes
_START_SECONDS = 300        # importing torch from a cold network disk
_MEMORY_BYTES = 4 << 30     # beyond what the libraries map: a 16K frame fits, a bomb does not


def _serve(fd: int, parent: int):
    """The life of a decoding process: requests in, patches out, until the other side is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides when we go
        signal.signal(number, signal.SIG_IGN)

    def leave_with_parent(gone=threading.Event()):
        while os.getppid() == parent:
            gone.wait(1)
        os._exit(1)  # also out of a decoder that hangs

    threading.Thread(target=leave_with_parent, daemon=True).start()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # our tracebacks stay, the codecs' chatter goes
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    torch.set_num_threads(1)
    decord.logging.set_level(decord.logging.QUIET)
    if os.path.exists("/proc/self/statm"):
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or hard > mapped + _MEMORY_BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY_BYTES, hard))
    connection = Connection(fd)
    try:
        connection.send("ready")
        while True:
            fields, settings = connection.recv()
            try:
                visual = vars(read_visual(Sample(**fields), **settings))
                reply = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in visual.items()}, None
            except VideoError as error:
                reply = None, str(error)
            except MemoryError:
                reply = None, f"{fields['video'] or fields['image']!r}: needs more memory than a decoder may take"
            connection.send(reply)
    except (EOFError, ConnectionError):
        return


class _Decoder:
    """One decoding process, seen from the main one."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, os.path.abspath(__file__), str(theirs.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.connection = Connection(ours.detach())
        self.lock = threading.Lock()

    def wait_ready(self):
        try:
            started = self.connection.poll(_START_SECONDS) and self.connection.recv() == "ready"
        except (EOFError, OSError):
            started = False
        if not started:
            self.end()
            raise RuntimeError(f"a decoding process did not start (exit status {self.process.returncode})")

    def end(self):
        with self.lock:  # close() and the owning thread may both come here
            self.process.kill()
            self.process.wait()
            self.connection.close()


class VideoReader:
    """Reads samples in long-lived processes that are timed out, ended and restarted one by one.

    with VideoReader(2, timeout=60, fps=1, max_frames=16, min_pixels=50176, max_pixels=50176) as reader:
        visual = reader.submit(sample).result()

    A thread owns a process: one video that hangs or crashes its decoder costs that sample alone.
    """

    def __init__(self, processes: int = 2, timeout: float = 60.0, *, fps: float, max_frames: int, min_pixels: int,
                 max_pixels: int):
        self.timeout = timeout
        self.settings = dict(fps=fps, max_frames=max_frames, min_pixels=min_pixels, max_pixels=max_pixels)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decode")
        self._mine, self._lock, self._decoders, self._closed = threading.local(), threading.Lock(), set(), False

    def submit(self, sample: Sample, mask_seed=None) -> Future:
        """Future of Visual, or of VideoError: cannot be read, time-out, crash of the decoder.

        A RuntimeError that is no VideoError means that no decoding process can be started at all.
        """
        return self._threads.submit(self._read, sample, mask_seed)

    def _read(self, sample: Sample, mask_seed) -> Visual:
        decoder = getattr(self._mine, "decoder", None)
        if decoder is None or decoder.process.poll() is not None:  # died idle: not this sample's fault
            decoder = self._mine.decoder = self._restart(decoder)
        path = sample.video or sample.image
        try:
            decoder.connection.send((vars(sample), {**self.settings, "mask_seed": mask_seed}))
            if decoder.connection.poll(self.timeout):
                fields, reason = decoder.connection.recv()
                if reason is not None:
                    raise VideoError(reason)
                return Visual(**{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()})
            reason = f"not decoded within {self.timeout:g} s"
        except (EOFError, OSError):
            reason = "its decoding process died"
        decoder.end()
        raise VideoError(f"{path!r}: {'the reader was closed' if self._closed else reason}")

    def _restart(self, dead: Optional[_Decoder]) -> _Decoder:
        if dead is not None:
            dead.end()
        with self._lock:
            if self._closed:
                raise VideoError("the reader was closed")
            self._decoders.discard(dead)
            decoder = _Decoder()
            self._decoders.add(decoder)
        decoder.wait_ready()  # outside the time limit of a video
        return decoder

    def close(self):
        """Ends the processes at once; reads under way fail, reads not begun are cancelled."""
        with self._lock:
            self._closed = True
            for decoder in self._decoders:
                decoder.process.kill()  # its thread, if it waits, sees the end of the connection
        self._threads.shutdown(wait=True, cancel_futures=True)
        for decoder in self._decoders:
            decoder.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# ---------------------------------------------------------------- prompts
@dataclass
class Prompt:
    """A sample as the model takes it: P tokens, N patches, F visual steps."""
    sample: Sample
    input_ids: torch.Tensor                  # int64 [P]
    patches: torch.Tensor                    # float32 [N, 1176]
    masked_patches: Optional[torch.Tensor]
    video_grids: list[tuple[int, int, int]]
    image_grids: list[tuple[int, int, int]]
    seconds_per_grid: list[float]
    frame_of_token: torch.Tensor             # int64 [P]: visual step of a video token, -1 elsewhere
    num_steps: int                           # F; 0 without a video


def prompt_text(sample: Sample, visual: Optional[Visual]) -> str:
    """The user's words: question, options a line each, instruction (Fig. E; Fig. D for grounding)."""
    question = "\n".join([sample.question] + [f"{chr(65 + i)}. {words}" for i, words in enumerate(sample.options)])
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
    ids, steps = [], []
    video, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<|video_pad|>", "<|image_pad|>"))
    grids = {video: list(visual.video_grids), image: list(visual.image_grids)}
    for token in tokenizer(chat, add_special_tokens=False)["input_ids"]:
        if token not in grids:
            ids.append(token)
            steps.append(-1)
            continue
        if not grids[token]:
            raise ValueError("the chat template places more videos or pictures than the sample has")
        t, h, w = grids[token].pop(0)
        ids += [token] * (t * h * w // 4)
        steps += np.repeat(np.arange(t), h * w // 4).tolist() if token == video else [-1] * (t * h * w // 4)
    if grids[video] or grids[image]:
        raise ValueError("the chat template does not place the sample's video or picture; is it Qwen2.5-VL's?")
    return Prompt(sample, torch.tensor(ids), visual.patches, visual.masked_patches, visual.video_grids,
                  visual.image_grids, visual.seconds_per_grid, torch.tensor(steps),
                  sum(t for t, _, _ in visual.video_grids))


# ---------------------------------------------------------------- batches
def read_ahead(reader: VideoReader, batches: Iterable[dict]) -> Iterator[dict[int, tuple[Sample, Future]]]:
    """Batches {position: (sample, its Visual to come)}, each being decoded while the one before it is at work.

    batches: dicts {position: (sample, mask_seed or None)}; the position is the caller's and names the sample's place.
    """
    ahead = None
    for batch in batches:
        coming = {position: (sample, reader.submit(sample, mask)) for position, (sample, mask) in batch.items()}
        if ahead is not None:
            yield ahead
        ahead = coming
    if ahead is not None:
        yield ahead


def build_prompts(batch: dict[int, tuple[Sample, Future]], tokenizer, max_tokens: int) -> tuple[dict[int, Prompt], list[dict]]:
    """The prompts of a batch by position, and a record of every sample that is left out, with the reason: what cannot
    be read (`unreadable`), and prompts of more than `max_tokens` tokens, which are never cut."""
    prompts, skipped = {}, []
    for position, (sample, visual) in batch.items():
        try:
            prompt, reason = build_prompt(sample, visual.result(), tokenizer), None
            if len(prompt.input_ids) <= max_tokens:
                prompts[position] = prompt
            else:
                reason = f"prompt of {len(prompt.input_ids)} tokens, over the limit of {max_tokens}"
            unreadable = False
        except VideoError as error:
            reason, unreadable = str(error), True
        if reason:
            skipped.append(dict(position=position, id=sample.id, path=sample.video or sample.image, reason=reason,
                                unreadable=unreadable))
    return prompts, skipped


# ---------------------------------------------------------------- rewards (linear time on any text)
def _element(text: str, tag: str) -> Optional[str]:
    """What stands in the only <tag> element; None if there are none or several, or it is not closed."""
    opened, closed = f"<{tag}>", f"</{tag}>"
    if text.count(opened) != 1 or text.count(closed) != 1:
        return None
    start, end = text.find(opened) + len(opened), text.find(closed)
    return text[start:end].strip() if start <= end else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(" .").casefold()


def match_choice(text: str, options: list[str]) -> Optional[int]:
    """Index of the option that a text names: "C", "C.", "(C)", "C. the words" or the words alone; else None."""
    text = text.strip()
    bracketed = text[:1] == "(" and text[2:3] == ")"
    letter, rest = (text[1], text[3:]) if bracketed else (text[:1], text[1:])
    marked = bracketed or rest[:1] in (".", ")", ":")
    rest = _plain(rest[1:] if marked and not bracketed else rest)
    index = ord(letter) - 65 if letter else -1
    if 0 <= index < len(options) and (not rest or marked and rest == _plain(options[index])):
        return index
    same = [i for i, words in enumerate(options) if _plain(words) == _plain(text) != ""]
    return same[0] if len(same) == 1 else None  # words that two options share name neither


_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?")


def _number(text: str) -> Optional[float]:
    """The number that a text starts with; a unit may follow ("12.5 meters"). ASCII digits only, finite."""
    word = (text.split(None, 1) or [""])[0].rstrip(".%")
    if len(word) > 40 or not _NUMBER.fullmatch(word):
        return None
    value = float(word.replace(",", ""))
    return value if math.isfinite(value) else None


def mean_relative_accuracy(pred: float, target: float) -> float:
    """Mean over theta in {0.50, 0.55, .., 0.95} of [|pred - target| / |target| <= 1 - theta] (VSI-Bench).

    95 for 100 -> 1.0; 150 for 100 -> 0.1; target 0 -> 1.0 for 0, else 0.0.
    """
    if target == 0:
        return float(pred == 0)
    error = abs(pred - target) / abs(target)
    return sum(error <= 0.05 * k + 1e-9 for k in range(1, 11)) / 10  # 1e-9: 0.05 is not exact in binary


def accuracy_reward(response: str, sample: Sample) -> float:
    """1.0 if the single <answer> element names the right option, else 0.0; numbers: mean relative accuracy."""
    answer = _element(response, "answer")
    if answer is None:
        return 0.0
    if sample.kind == "number":
        pred = _number(answer)
        return 0.0 if pred is None else mean_relative_accuracy(pred, _number(sample.answer))
    choice = match_choice(answer, sample.options)
    return float(choice is not None and chr(65 + choice) == sample.answer)


def format_reward(response: str, sample: Sample) -> float:
    """1.0 for <think>..</think><answer>..</answer> (grounding: then <time>..</time>) and nothing else but space."""
    rest = response
    for tag in ("think", "answer", "time")[:3 if sample.kind == "grounding" else 2]:
        opened, closed, rest = f"<{tag}>", f"</{tag}>", rest.lstrip()
        if response.count(opened) != 1 or response.count(closed) != 1 or not rest.startswith(opened):
            return 0.0
        _, found, rest = rest.partition(closed)
        if not found:
            return 0.0
    return float(not rest.strip())


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
    def union(spans):
        merged = []
        for start, end in sorted((min(max(s, 0.0), duration), min(max(e, 0.0), duration)) for s, e in spans):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            elif start < end:
                merged.append([start, end])
        return merged

    pred, label = union(pred_spans), union(label_spans)
    size = [sum(end - start for start, end in spans) for spans in (pred, label)]
    both, i, j = 0.0, 0, 0
    while i < len(pred) and j < len(label):
        both += max(0.0, min(pred[i][1], label[j][1]) - max(pred[i][0], label[j][0]))
        i, j = (i + 1, j) if pred[i][1] < label[j][1] else (i, j + 1)
    return (both / (size[0] + size[1] - both), both / size[0]) if size[0] > 0 else (0.0, 0.0)


def temporal_iou_reward(response: str, sample: Sample) -> float:
    """IoU of the spans in the single <time> element with the labelled ones; 0.0 where there are none."""
    time = _element(response, "time")
    return 0.0 if time is None else temporal_iou(parse_spans(time), sample.spans, sample.duration)[0]


def task_reward(response: str, sample: Sample) -> tuple[float, float, float]:
    """(reward, accuracy, format): 0.9 x accuracy + 0.1 x format; grounding: accuracy + 0.1 x format + IoU."""
    accuracy, form = accuracy_reward(response, sample), format_reward(response, sample)
    if sample.kind == "grounding":
        return accuracy + 0.1 * form + temporal_iou_reward(response, sample), accuracy, form
    return 0.9 * accuracy + 0.1 * form, accuracy, form


# ---------------------------------------------------------------- the built-in task
# 16 frames of 56 x 56, two a visual step: each step shows one of 8 shapes in one of 4 cells, each colour comes twice.
def _star(x, y):
    to_tip = np.abs((np.arctan2(x, -y) * 2.5 / np.pi + 0.5) % 1 - 0.5) * 2  # 0 towards a tip, 1 between two
    return np.hypot(x, y) < 0.4 + 0.6 * (1 - to_tip) ** 2


_DRAW = {  # x to the right, y down, -1 to 1 over a cell
    "star": _star,
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
    # each colour exactly twice: with colours drawn freely a model learns to guess the majority
    shapes = [TOY_SHAPES[i] for i in rng.permutation(8)]
    colours = [TOY_COLOURS[i % 4] for i in rng.permutation(8)]
    return shapes, colours, rng.integers(4, size=8).tolist()


def toy_video(rng: np.random.Generator) -> tuple[torch.Tensor, list[str], list[str], list[int]]:
    """One built-in video: (frames uint8 [16, 3, 56, 56], shapes [8], colours [8], cells [8]).

    Entry s of the lists is visual step s (frames 2s and 2s + 1, equal but for noise); cell c is row c // 2, column
    c % 2, so merged token 4 * s + c of the video holds the shape. Noise: 20 grey levels, 0.3 after normalisation.
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


def toy_response(shape: str, colour: str, rng: np.random.Generator) -> str:
    """A right answer in one of four wordings; the shape stands directly before the colour."""
    lead, letter = _TOY_LEADS[rng.integers(len(_TOY_LEADS))], chr(65 + TOY_COLOURS.index(colour))
    return f"<think> {lead} {shape} {colour} </think> <answer> {letter} </answer>"


def _toy_question(shape: str) -> str:
    return f"what colour is the {shape} ?"


def toy_vocabulary() -> list[str]:
    """Every word (TOY_TOKEN) of the built-in prompts and responses, each once."""
    asked = [prompt_text(Sample("", _toy_question(s), list(TOY_COLOURS), "A", "choice"), None) for s in TOY_SHAPES]
    return list(dict.fromkeys(re.findall(TOY_TOKEN, " ".join([*asked, *_TOY_LEADS, *TOY_COLOURS]))))


def write_avi(path, frames: torch.Tensor, fps: float) -> None:
    """Writes uint8 [T, 3, H, W] as uncompressed 24-bit AVI, the one kind of video that needs no encoder."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    count, _, height, width = frames.shape
    rows = frames.permute(0, 2, 3, 1).flip(1, 3).reshape(count, height, width * 3)        # bottom row first, BGR
    rows = F.pad(rows, (0, -width * 3 % 4)).contiguous().numpy()                         # rows of whole 4 bytes
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


def _write_whole(path: Path, data: bytes) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    os.replace(beside, path)  # an interrupted run leaves the whole file or none


def make_toy_data(folder, videos: tuple[int, int] = (512, 128), questions: int = 4, seed: int = 0) -> None:
    """Makes folder/train.json, folder/test.json (Video-R1 format) and folder/videos/*.avi, 16 s at 1 frame a second.

    videos: how many to train and to test on; questions: about each. All follows from the seed, and whole files of
    an earlier call are kept.
    """
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for split, (name, count) in enumerate(zip(("train", "test"), videos)):
        records = []
        for number in range(count):
            path = f"videos/{name}_{seed}_{number:05d}.avi"
            shapes, colours, _ = _toy_plan(np.random.default_rng([seed, split, number]))
            if not (folder / path).exists():
                write_avi(folder / path, toy_video(np.random.default_rng([seed, split, number]))[0], 1)
            for step in np.random.default_rng([seed, split, number, 1]).permutation(8)[:questions].tolist():
                records.append(dict(
                    problem_id=len(records), problem=_toy_question(shapes[step]), data_type="video",
                    problem_type="multiple choice", path=path, data_source="built-in", duration=16.0, crucial_step=step,
                    options=[f"{chr(65 + i)}. {colour}" for i, colour in enumerate(TOY_COLOURS)],
                    solution=f"<answer>{chr(65 + TOY_COLOURS.index(colours[step]))}</answer>"))
        text = json.dumps(records, indent=1).encode()
        if not (folder / f"{name}.json").exists() or (folder / f"{name}.json").read_bytes() != text:
            _write_whole(folder / f"{name}.json", text)


@dataclass
class Lesson:
    """Supervision for the tiny model: a built-in video, a question about each of its 8 steps, and the answers."""
    prompt: Prompt               # up to the end of the video
    token_words: torch.Tensor    # [visual tokens, 2]: ids of the shape and the colour that a token shows; padding: empty
    response_ids: torch.Tensor   # [8, R]: the rest of the prompts, then the responses
    response_mask: torch.Tensor  # bool [8, R]
    target_mask: torch.Tensor    # bool [8, R]: the responses alone


def toy_prompt(rng: np.random.Generator, tokenizer, step: int = 0) -> tuple[Prompt, list[str], list[str], list[int]]:
    """A built-in video that is in no file, and the question about one of its steps: (prompt, shapes, colours, cells)."""
    frames, shapes, colours, cells = toy_video(rng)
    patches, grid = frames_to_patches(frames, 3136, 3136)
    answer = chr(65 + TOY_COLOURS.index(colours[step]))
    sample = Sample("built-in", _toy_question(shapes[step]), list(TOY_COLOURS), answer, "choice", crucial_step=step)
    return build_prompt(sample, Visual(patches, None, [grid], [], [2.0], 16.0, 16), tokenizer), shapes, colours, cells


def toy_lessons(tokenizer, count: int, seed: int) -> list[Lesson]:
    """Lessons about `count` videos that are in neither train.json nor test.json."""
    lessons, ends = [], {}
    for number in range(count):
        rng = np.random.default_rng([seed, 2, number])
        prompt, shapes, colours, cells = toy_prompt(rng, tokenizer)
        shared = int((prompt.frame_of_token >= 0).nonzero().max()) + 2  # through the video and its end mark
        words, rows = torch.full((8, 4, 2), tokenizer.pad_token_id), []
        for step, (shape, colour, cell) in enumerate(zip(shapes, colours, cells)):
            words[step, cell] = torch.tensor(tokenizer.convert_tokens_to_ids([shape, colour]))
            if shape not in ends:  # the prompts about a shape are alike after the video
                asked = replace(prompt.sample, question=_toy_question(shape))
                visual = Visual(prompt.patches, None, prompt.video_grids, [], [2.0], 16.0, 16)
                ends[shape] = build_prompt(asked, visual, tokenizer).input_ids[shared:].tolist()
            response = tokenizer(toy_response(shape, colour, rng)).input_ids + [tokenizer.eos_token_id]
            rows.append((ends[shape], response))
        length = max(len(end) + len(response) for end, response in rows)
        ids, real, target = torch.zeros(8, length, dtype=torch.long), *torch.zeros(2, 8, length, dtype=torch.bool)
        for row, (end, response) in enumerate(rows):
            ids[row, :len(end) + len(response)] = torch.tensor(end + response)
            real[row, :len(end) + len(response)] = True
            target[row, len(end):len(end) + len(response)] = True
        beginning = replace(prompt, input_ids=prompt.input_ids[:shared], frame_of_token=prompt.frame_of_token[:shared])
        lessons.append(Lesson(beginning, words.flatten(0, 1), ids, real, target))
    return lessons


if __name__ == "__main__":  # started by VideoReader: socket and parent's process id
    _serve(int(sys.argv[1]), int(sys.argv[2]))
