"""Measuring: benchmarks, what responses look at, curves of runs, and the speed of a training step.

    python evaluate.py score --model M --data test.json --video_root videos --output scores/m    accuracy by task
    python evaluate.py compare scores/a scores/b                     is the difference more than chance?
    python evaluate.py attention --model A --model2 B --data test.json --sample 3 --output map.png
    python evaluate.py curves runs/* --output curves.png             accuracy, reward, entropy, ... of training runs
    python evaluate.py focus --model M --data test.json              Tab. A: frames of right and of wrong responses
    python evaluate.py decouple --perception M --reasoning T         T answers from M's description alone
    python evaluate.py study                                         the algorithms on the built-in task, over seeds
    python evaluate.py throughput --against_plain                    Tab. F, and the usual way beside it

score, attention, focus, decouple and study take appo.py's options by the same names (--max_frames, --seed, --k2, ...); the
built-in task is their default. Tables and figures are the supplement's; letters in shapes as in model_utils.
"""
import argparse
import copy
import csv
import io
import json
import os
import re
import resource
import shutil
import sys
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration

import appo
import data
import model_utils
from model_utils import RunError

# ---------------------------------------------------------------------------------------------------- benchmarks

# Where MVBench keeps the videos of its 20 tasks; two tasks may hold different videos of one name.
MVBENCH_FOLDERS = {
    "clevrer/video_validation":
        "object_existence moving_direction moving_count moving_attribute counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction", "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action", "FunQA_test/test": "unexpected_action",
    "sta/sta_video": "action_localization", "scene_qa/video": "scene_transition", "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation", "tvqa/frames_fps3_hq": "episodic_reasoning"}

# mark: the field that gives a benchmark's records away. options, answer, group, video: its own fields, where data.py
# does not read it already; counted: the answer is an index from 0. prompt: the benchmark's own words; the instruction
# to think and answer, on which models were trained, follows. overall: mean over "questions" or "tasks" (VSI-Bench).
BENCHMARKS = {
    "video_r1": dict(mark="problem"),
    "next_gqa": dict(mark="time_clues"),
    "seed_bench_r1": dict(mark="current_observation_basename"),  # grouped by the L1, L2 or L3 in the file's name
    "perception_test": dict(mark="answer_id", options="options", answer="answer_id", counted=True, group="area",
                            video="{video_name}.mp4"),
    "next_qa": dict(mark="a0", options="a0 a1 a2 a3 a4", answer="answer", counted=True, group="type",
                    video="{video}.mp4"),
    "mvbench": dict(mark="candidates", options="candidates", answer="answer", group="task",
                    video="video/{folder}/{video}",
                    prompt="Carefully watch the video and pay attention to the cause and sequence of events, the "
                    "detail and movement of objects, and the action and pose of persons. Based on your observations, "
                    "select the best option that accurately addresses the question.\nQuestion: {question}"),
    "vsi_bench": dict(mark="scene_name", options="options", answer="ground_truth", group="question_type",
                      video="{dataset}/{scene_name}.mp4", overall="tasks",
                      prompt="These are frames of a video.\n{question}"),
}


def read_records(path: Path) -> list[dict]:
    """The records of a .json, .jsonl or .csv file (NExT-QA), or of Perception Test's {video: {"mc_question": [..]}}."""
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".json" and type(content := json.loads(path.read_text(encoding="utf-8-sig"))) is dict:
            return [{"video_name": name} | record for name, video in content.items() for record in video["mc_question"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error):
        pass  # the reader below names what is wrong
    return data.json_records(path)


def read_own(path: Path, name: str, records: list[dict], form: dict, video_root: str | None) -> list[data.Sample]:
    """Samples of a benchmark that data.py does not read, by the fields of its entry in BENCHMARKS."""
    samples, finder, task = [], data.Finder(video_root, path.parent), re.sub(r"_[0-9]+$", "", path.stem)
    folder = next((folder for folder, tasks in MVBENCH_FOLDERS.items() if task in tasks.split()), "")
    first, *more = form["options"].split()
    for number, fields in enumerate(records):
        fields = {"task": task, "folder": folder} | fields | {form["answer"]: str(fields.get(form["answer"], ""))}
        record = data.Record(f"{name}, record {number}", fields)
        answer, kind, options = record.text(form["answer"]), "choice", []
        if fields.get(first) is None and not more:
            kind = "number"
            record.check(data.parse_number(answer) is not None, form["answer"], f"{answer[:60]!r} is no number; write one")
        else:
            words = [record.text(field) for field in (first, *more)] if more else record.texts(first)
            options = record.options(words, first)
            index = options.index(answer) if answer in options else None  # the words as they stand, else a letter
            if form.get("counted"):
                index = int(answer) if re.fullmatch("[0-9]{1,2}", answer) else len(options)
                record.check(index < len(options), form["answer"], f"not one of {len(options)} options; count from 0")
            answer = record.answer(form["answer"], options) if index is None else data.LETTERS[index]
        for field in re.findall("{(.*?)}", form["video"]):
            record.check(isinstance(fields.get(field), str), field, "missing or no text; it names the video")
        video = form["video"].format_map(fields)
        record.check(".." not in video.split("/"), "video", "leaves the video folder; drop the '..'")
        found, bounds = finder.find(video), (record.number("start"), record.number("end"))
        samples.append(data.Sample(f"{name}:{number}", record.text("question"), options, answer, kind, found,
                                   missing=[] if found else [video], group=str(fields.get(form["group"], "")),
                                   bounds=None if None in bounds else bounds))
    return samples


def load_benchmark(s: appo.Settings, benchmark: str | None = None) -> tuple[list[data.Sample], str]:
    """(samples, "questions" or "tasks": what the overall mean is over) of the files --data a,b; a file's benchmark is
    told by its fields. Missing videos are listed, an error unless --skip_missing. DataError on the first bad record.
    """
    files, samples, overall = [Path(part.strip()) for part in s.data.split(",") if part.strip()], [], set()
    for path in files:
        records = read_records(path)
        name = path.name if sum(other.name == path.name for other in files) == 1 else str(path)  # ids stay unique
        fields = records[0] if records else {}
        chosen = benchmark or next((key for key, form in BENCHMARKS.items() if form["mark"] in fields), "video_r1")
        form = BENCHMARKS[chosen]
        overall.add(form.get("overall", "questions"))
        if "answer" in form and form["mark"] in fields:
            loaded = read_own(path, name, records, form, s.video_root)
        else:
            loaded = data.load_samples(path, s.video_root, seed=s.seed)
        level = re.search("L[123]", path.stem) if chosen == "seed_bench_r1" else None
        for sample in loaded:
            sample.id = f"{name}:{sample.id.rpartition(':')[2]}"
            sample.question = form.get("prompt", "{question}").replace("{question}", sample.question)
            sample.group = level[0] if level else sample.group
        samples += loaded
    samples = data.with_files(samples, s.data, s.skip_missing)
    return samples, overall.pop() if len(overall) == 1 else "questions"


def read_prompts(samples: list[data.Sample], tokenizer, s: appo.Settings, bar: tqdm) -> Iterator[tuple[dict, list]]:
    """(prompts by number of the sample, records of what is left out) of `rollout_groups` samples at a time."""
    numbered = [(n, (sample, None)) for n, sample in enumerate(samples)]
    batches = (dict(numbered[i:i + s.rollout_groups]) for i in range(0, len(samples), s.rollout_groups))
    with appo.open_reader(s) as reader:
        for batch in data.read_ahead(reader, batches):
            yield data.build_prompts(batch, tokenizer, s.max_prompt_tokens)
            bar.update(len(batch))


# --------------------------------------------------------------------------------------------- decoding and scores

DECODING = dict(temperature=0.1, top_p=0.001, top_k=1, repetition_penalty=1.05)  # supplement, Tab. B


def place() -> tuple[torch.device, torch.dtype]:
    """Where and in which type models run."""
    device = model_utils.init_processes()[2]
    return device, model_utils.compute_type(device)


def load_model(name: str):
    return model_utils.load_model(name, place()[0])


def evaluation_decoding(prompts: list, vocabulary: int, penalty: float = DECODING["repetition_penalty"]) -> Callable:
    """choose(logits [B, V], ids [B, R]) -> ids [B]: the supplement's evaluation decoding, for `rollout`.

    Of one candidate (top-k 1) temperature and top-p change nothing: it is the argmax of the penalised logits. The
    penalty divides the positive and multiplies the negative logits of every token in the prompt or the response so far.
    """
    in_prompt = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=prompts[0].input_ids.device)
    for row, prompt in zip(in_prompt, prompts):
        row[prompt.input_ids] = True

    def choose(logits: Tensor, ids: Tensor) -> Tensor:
        seen = in_prompt.repeat_interleave(len(logits) // len(in_prompt), 0).scatter(1, ids, True)  # [B, V]
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits).argmax(-1)

    return choose


def respond(model, tokenizer, prompts: list[data.Prompt], max_new_tokens: int) -> list[str]:
    """One response to each prompt, by evaluation decoding."""
    if not prompts:
        return []
    encoded = model_utils.encode_prompts(model, prompts)
    nothing_random = torch.zeros(len(prompts), 1, max_new_tokens, dtype=torch.float64)
    rollouts = model_utils.rollout(model, encoded, nothing_random, attention_layers=0,
                                   choose=evaluation_decoding(encoded, model.config.text_config.vocab_size))
    return [tokenizer.decode(r.response_ids[0][r.response_mask[0]], skip_special_tokens=True) for r in rollouts]


def score_response(response: str, sample: data.Sample) -> dict[str, float]:
    """accuracy (numbers: mean relative accuracy), format; grounding: also iou, iop, acc_gqa (right, and IoP >= 0.5)."""
    scores = {"accuracy": data.accuracy_reward(response, sample), "format": data.format_reward(response, sample)}
    if sample.kind == "grounding":
        spans = data.parse_spans(data.element_text(response, "time") or "")
        scores["iou"], scores["iop"] = data.temporal_iou(spans, sample.spans, sample.duration)
        scores["acc_gqa"] = float(scores["accuracy"] == 1 and scores["iop"] >= 0.5)
    return scores


COLUMNS = {"accuracy": "accuracy", "format": "format", "iou": "mIoU", "iop": "mIoP", "acc_gqa": "Acc@GQA"}


def summarise(records: list[dict], overall: str = "questions") -> dict[str, dict]:
    """{group: {n, accuracy, ...}, ..., "all": ...}: means over questions. overall="tasks" (VSI-Bench): "all" is the
    mean over the tasks, the three levels of object_rel_direction averaged first.

    Example: means 0.2, 0.4, 0.9 of the three levels and 0.7 of another task -> (0.5 + 0.7) / 2 = 0.6.
    """
    def means(part: list[dict]) -> dict:
        return {"n": len(part)} | {name: float(np.mean([r[name] for r in part if name in r])) for name in COLUMNS
                                   if any(name in r for r in part)}

    groups = defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    table, total = {group: means(part) for group, part in sorted(groups.items())}, means(records)
    for name in total.keys() - {"n"} if overall == "tasks" else ():
        tasks = defaultdict(list)
        for group, row in table.items():
            tasks[re.sub("^(object_rel_direction)_.*", r"\1", group)].append(row[name])
        total[name] = float(np.mean([np.mean(levels) for levels in tasks.values()]))
    return table | {"all": total}


def print_table(rows: list[list]) -> None:
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else data.escaped(str(cell)) for cell in row] for row in rows]
    first, *widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths))]))


def read_responses(folder: str) -> list[dict]:
    """The records of FOLDER/responses.jsonl; half a last line, of a run that was killed, does not count."""
    path = Path(folder) / "responses.jsonl"
    if not path.is_file():
        raise RunError(f"{path}: no such file; give a folder that `evaluate.py score` has written")
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def score(options) -> None:
    """Benchmark scores. Every response is written as it comes; a run that was stopped goes on where it was."""
    s = settings_of(options.rest)
    samples, overall = load_benchmark(s, options.benchmark)
    (model, tokenizer), output = load_model(s.model), Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    summary, responses = output / "summary.json", output / "responses.jsonl"
    settings = {"benchmark": options.benchmark, "decoding": DECODING} | {
        name: getattr(s, name) for name in ("model", "data", "fps", "max_frames", "min_pixels", "max_pixels",
                                            "max_new_tokens", "max_prompt_tokens", "seed")}
    earlier = json.loads(summary.read_text())["settings"] if summary.exists() else settings
    if differing := [name for name in settings if earlier.get(name) != settings[name]]:
        raise RunError(f"{output}: holds responses with another {differing[0]}; give another --output")
    summary.write_text(json.dumps({"settings": settings}, indent=1))
    responses.touch()
    records = read_responses(options.output)
    os.truncate(responses, responses.read_bytes().rfind(b"\n") + 1)
    done = {record["id"] for record in records}
    todo = [sample for sample in samples if sample.id not in done]
    with open(responses, "a") as file, tqdm(total=len(samples), initial=len(done), desc="score") as bar:
        for prompts, skipped in read_prompts(todo, tokenizer, s, bar):
            started = time.perf_counter()
            texts = respond(model, tokenizer, list(prompts.values()), s.max_new_tokens)
            seconds = (time.perf_counter() - started) / max(len(texts), 1)
            fresh = [{"id": skip["id"], "skipped": skip["reason"]} for skip in skipped]
            for prompt, text in zip(prompts.values(), texts):
                known = {name: getattr(prompt.sample, name) for name in ("id", "group", "question", "answer")}
                fresh.append(known | {"prompt": data.prompt_text(prompt.sample, prompt), "response": text,
                                      "seconds": round(seconds, 4)} | score_response(text, prompt.sample))
            file.writelines(json.dumps(record) + "\n" for record in fresh)
            file.flush()
            records += fresh
            if scored := [record["accuracy"] for record in records if "accuracy" in record]:
                bar.set_postfix(accuracy=f"{np.mean(scored):.3f}")
    scored, skipped = ([record for record in records if ("skipped" in record) == kind] for kind in (False, True))
    if not scored:
        raise RunError(f"{s.data}: no sample could be read, the first: {skipped[0]['skipped']}")
    table = summarise(scored, overall)
    summary.write_text(json.dumps({
        "settings": settings, "overall": f"mean over {overall}", "results": table, "skipped": skipped,
        "prompt": scored[0]["prompt"], "seconds": sum(record["seconds"] for record in scored),
        "torch": torch.__version__}, indent=1))
    names = [name for name in COLUMNS if name in table["all"]]
    print_table([["group", "n", *(COLUMNS[name] for name in names)],
                 *([group or "-", row["n"], *(row.get(name, "") for name in names)] for group, row in table.items())])
    print(f"skipped {len(skipped)} of {len(records)}",
          *(data.escaped(f"{record['id']}: {record['skipped']}") for record in skipped[:10]), sep="\n  ")
    print(f"first response: {data.escaped(scored[0]['response'][:400])}")
    print(f"responses: {responses}; settings and results: {summary}")


def bootstrap_interval(differences: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% interval of the mean of paired differences [n]: percentiles of `draws` means of n drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(differences)
    means = [differences[rng.integers(n, size=n)].mean() for _ in range(draws)]
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def compare(options) -> None:
    """Accuracy of B minus accuracy of A, over the questions that both have answered."""
    first, second = ({(r["id"], r["question"]): r["accuracy"] for r in read_responses(folder) if "accuracy" in r}
                     for folder in (options.first, options.second))
    if not (common := sorted(first.keys() & second.keys())):
        raise RunError(f"{options.first} and {options.second} have no question in common; score the same --data")
    a, b = (np.array([scores[key] for key in common]) for scores in (first, second))
    low, high = bootstrap_interval(b - a, options.seed)
    print_table([["", "n", "accuracy"], *([folder, len(one), one.mean().item()] for folder, one in (
        (options.first, a), (options.second, b)))])
    print(f"difference {(b - a).mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f} (paired bootstrap over "
          f"{len(common)} common questions; {len(first) + len(second) - 2 * len(common)} are in one alone)")


# ------------------------------------------------------------------------------------------------------- pictures

def save_figure(figure, output: str) -> None:
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token in a script that the font lacks shows as a box
        figure.savefig(output, dpi=120, bbox_inches="tight")
    print(f"drawn: {output}")


def thumbnails(prompt: data.Prompt) -> np.ndarray:
    """uint8 [F, h, w, 3]: the first frame of each visual step as the vision tower sees it, from the patches."""
    t, h, w = prompt.video_grids[0]
    x = prompt.patches[:t * h * w].view(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, :, 0]
    x = x.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(t, h * 14, w * 14, 3)  # [F, h * 14, w * 14, 3]
    return ((x * data.PIXEL_STD.view(3) + data.PIXEL_MEAN.view(3)) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def sample_groups(model, tokenizer, prompts: dict[int, data.Prompt], s: appo.Settings) -> list[appo.Group]:
    """Groups of G sampled responses with scores and crucial frames, by the training's own rollout."""
    return appo.roll_out(appo.Run(settings=s, model=model, tokenizer=tokenizer, policy=None, reference=None,
                                  optimizer=None, rank=0, world=1), prompts)


def draw_attention(panels: list[tuple[str, appo.Group, int, list[str]]], output: str) -> None:
    """Fig. A, C, F. Of each (title, group, number of the shown response, its words): frames across, tokens down."""
    from matplotlib.figure import Figure
    steps, tokens = panels[0][1].prompt.num_steps, max(len(words) for *_, words in panels)
    width, height = max(4.5, 0.55 * steps), 0.17 * tokens + 0.4
    frames = thumbnails(panels[0][1].prompt)  # [F, h, w, 3]
    strip = width / steps * frames.shape[1] / frames.shape[2]  # inches: the frames keep their shape
    figure = Figure(figsize=((width + 1.6) * len(panels), strip + height + 1))
    grid = figure.add_gridspec(2, len(panels), height_ratios=[strip, height], wspace=0.35,
                               hspace=0.08 / (strip + height))
    for column, (title, group, shown, words) in enumerate(panels):
        top, below = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        read = group.rollout.frame_attention[shown, :len(words)].float().cpu().numpy()  # [R, F]
        image = below.imshow(read, aspect="auto", cmap="Blues", vmin=0)
        for step, frame in enumerate(frames):
            top.imshow(frame, extent=(step - 0.46, step + 0.46, 0, 1), aspect="auto")
            if group.crucial[step]:
                top.axvspan(step - 0.47, step + 0.47, fill=False, edgecolor="tab:red", linewidth=2.5)
                below.axvspan(step - 0.5, step + 0.5, fill=False, edgecolor="tab:red", linewidth=1)
        top.set(xlim=(-0.5, steps - 0.5), ylim=(-0.03, 1.03))
        top.axis("off")
        top.set_title(title, fontsize=8, parse_math=False)
        ticks, seconds = range(0, steps, -(-steps // 16)), group.prompt.seconds_per_grid[0]
        below.set_xticks(ticks, [f"{step * seconds:.3g}" for step in ticks], fontsize=7)
        below.set_yticks(range(len(words)), words, fontsize=7, parse_math=False)
        below.set_xlabel(f"seconds; red: crucial frames of {len(group.texts)} responses", fontsize=8)
        figure.colorbar(image, ax=[top, below], fraction=0.03, pad=0.02).ax.tick_params(labelsize=6)
    save_figure(figure, output)


def attention(options) -> None:
    """What each token of a response attends to, and the crucial frames of its group; several models side by side."""
    s = settings_of(options.rest)
    samples, panels = load_benchmark(s)[0], []
    sample = next((one for one in samples if options.sample in (one.id, one.id.rpartition(":")[2])), None)
    if sample is None or sample.video is None:
        raise RunError(f"--sample {options.sample}: {s.data} has no such record with a video; count from 0")
    for name in [s.model, *options.model2]:
        own, (model, tokenizer) = settings_of([*options.rest, "--model", name]), load_model(name)
        with appo.open_reader(own) as reader:
            prompt = data.build_prompt(sample, reader.submit(sample).result(), tokenizer)
        group, = sample_groups(model, tokenizer, {0: prompt}, own)
        accuracy = group.scores["accuracy"]
        shown = int((accuracy >= own.threshold).int().argmax())  # the first right response, else the first
        ids = group.rollout.response_ids[shown][group.rollout.response_mask[shown]]
        question = data.escaped(sample.question if len(sample.question) < 90 else sample.question[:87] + "...")
        title = (f"{name}\n{question}\nanswer {sample.answer}; this response scores {accuracy[shown]:.2f}, its group "
                 f"{accuracy.mean():.2f}")
        panels.append((title, group, shown, [data.escaped(tokenizer.decode([i])) for i in ids.tolist()]))
    draw_attention(panels, options.output)


CURVES = ("accuracy", "reward", "entropy", "grad_norm", "response_length")


def read_run(folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """(what the run is, {metric: [steps]}) of a run folder; nan at steps without a metric."""
    try:
        config = json.loads((folder / "config.json").read_text())["settings"]
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # the last line may be half
        records = [json.loads(line) for line in lines]
        label = config["algorithm"] + (f", {config['strategy']}, alpha {config['alpha']:g}" if config["alpha"] else "")
    except (OSError, ValueError, KeyError):
        raise RunError(f"{folder}: no run of appo.py (config.json and metrics.jsonl); give run folders") from None
    return label, {name: np.array([record.get(name, np.nan) for record in records]) for name in CURVES}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` steps, fewer at the start."""
    return np.array([values[max(0, i - window + 1):i + 1].mean() for i in range(len(values))])


def curves(options) -> None:
    """Runs alike in algorithm, strategy and alpha are seeds of one: their mean, and a band of a standard deviation."""
    runs = defaultdict(list)
    for folder in map(Path, options.runs):
        if len(options.runs) == 1 or (folder / "metrics.jsonl").exists():  # runs/* also holds the built-in task
            label, run = read_run(folder)
            runs[label].append(run)
    if not any(len(run["accuracy"]) for seeds in runs.values() for run in seeds):
        raise RunError("no run with a finished step; give run folders of appo.py")
    draw_curves(runs, options.smooth, options.output)


def draw_curves(runs: dict[str, list[dict]], window: int, output: str) -> None:
    """runs: {label: [{metric: [steps]} of each seed]}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CURVES)), CURVES):
        for label, seeds in runs.items():
            steps = min(len(run[name]) for run in seeds)
            lines = np.stack([smooth(run[name][:steps], window) for run in seeds])  # [seeds, steps]
            mean, spread, x = lines.mean(0), lines.std(0), np.arange(1, steps + 1)
            line, = axes.plot(x, mean, label=f"{label} ({len(seeds)} run{'s' * (len(seeds) > 1)})", linewidth=1.2)
            axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, output)


# ---------------------------------------------------------------------------------- the observations of the paper

TAB_A = {"0 s": 20.1, "0 to 3 s": 23.5, "3 to 6 s": 17.0, "6 to 9 s": 12.6, "9 to 12 s": 7.8, "12 to 15 s": 6.2,
         "over 15 s": 12.8}  # percent of the samples of NExT-GQA's test set


def focus_difference(focused: Tensor, right: Tensor, seconds: float) -> tuple[str, float]:
    """(bin of Tab. A, seconds): how far apart right and wrong responses of a sample look.

    A response's focus time is the mean time of its K2 steps; the difference is that of the means over the right and
    over the wrong responses. "0 s" where psi(S1) = psi(S2). focused bool [G, F], right bool [G]; seconds of a step.
    Example: steps of 2 s, right {0, 1}, wrong {3, 4}: |1 - 7| = 6 s, bin "6 to 9 s".
    """
    if torch.equal(focused[right].any(0), focused[~right].any(0)):
        return "0 s", 0.0
    times = (focused.double() * torch.arange(focused.shape[1])).sum(1) / focused.sum(1) * seconds  # [G]
    difference = (times[right].mean() - times[~right].mean()).abs().item()
    return list(TAB_A)[1 + min(int(difference / 3), 5)], difference


def focus(options) -> None:
    """Tab. A: differences in focused frames between the right and the wrong responses of a sample."""
    s = settings_of(options.rest)
    samples, (model, tokenizer) = load_benchmark(s)[0], load_model(s.model)
    bins, left_out = Counter(), Counter({"one kind of response alone": 0, "unreadable or too long": 0, "no video": 0})
    with tqdm(total=len(samples), desc="focus") as bar:
        for prompts, skipped in read_prompts(samples, tokenizer, s, bar):
            left_out["unreadable or too long"] += len(skipped)
            left_out["no video"] += sum(not prompt.num_steps for prompt in prompts.values())
            for group in sample_groups(model, tokenizer, {n: p for n, p in prompts.items() if p.num_steps}, s):
                right, rollout = group.scores["accuracy"] >= s.threshold, group.rollout
                if right.all() or not right.any():
                    left_out["one kind of response alone"] += 1
                    continue
                focused = appo.focused_frames(rollout.frame_attention, rollout.response_mask, k1=s.k1, k2=s.k2)
                bins[focus_difference(focused.cpu(), right.cpu(), group.prompt.seconds_per_grid[0])[0]] += 1
    if not (total := bins.total()):
        raise RunError(f"no sample has right and wrong responses ({dict(left_out)}); raise --group_size, or take more")
    shares = {name: 100 * bins[name] / total for name in TAB_A}
    print_table([["difference", "samples", "percent", "paper"],
                 *([name, bins[name], f"{shares[name]:.1f}", f"{TAB_A[name]:.1f}"] for name in TAB_A)])
    print(f"{total} samples; left out:", ", ".join(f"{number} {reason}" for reason, number in left_out.items()))
    if options.output:
        Path(options.output).write_text(json.dumps({"model": s.model, "data": s.data, "samples": bins,
                                                    "percent": shares, "left_out": left_out}, indent=1))


DESCRIBE = ("Describe this video in detail, in the order in which things happen: who and what is seen, what they do, "
            "colours, numbers, places, positions and written words.")


def load_text_model(name: str):
    """(model, tokenizer) of an ordinary language model with a chat template."""
    device, dtype = place()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise RunError(f"{name}: no usable text model ({str(error).splitlines()[0]}); give a model folder") from None
    if tokenizer.chat_template is None:
        raise RunError(f"{name}: its tokenizer has no chat template; take an instruction-tuned model")
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def answer_from_text(model, tokenizer, sample: data.Sample, description: str, max_new_tokens: int) -> str:
    """A text model's answer to a question about a video of which it knows the description alone."""
    told = replace(sample, kind="choice" if sample.kind == "grounding" else sample.kind,
                   question=f"A video is described as follows.\n{description}\n\n{sample.question}")
    words = data.prompt_text(told, None).replace("<|", "< |")  # control tokens stay words, as in data.build_prompt
    turns = [{"role": "user", "content": words}]
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    decoding = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends,  # greedy: top-k 1
                                pad_token_id=tokenizer.pad_token_id, repetition_penalty=DECODING["repetition_penalty"])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=decoding)
    return tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)


def decouple(options) -> None:
    """Accuracy of every pair of a perception model, which describes the video without knowing the question, and a
    reasoning model, which answers from the description: is it seeing or thinking that limits the accuracy?"""
    s = settings_of([*options.rest, "--model", options.perception.split(",")[0]])
    samples, reasoners = load_benchmark(s)[0], options.reasoning.split(",")
    asked = [replace(sample, question=DESCRIBE, options=[], kind="description") for sample in samples]
    table = [["perception / reasoning", "videos", *reasoners]]
    with open(options.output, "w") as file:
        for perception in options.perception.split(","):
            own, (model, tokenizer) = settings_of([*options.rest, "--model", perception]), load_model(perception)
            descriptions = {}
            with tqdm(total=len(samples), desc="describe") as bar:
                for prompts, _ in read_prompts(asked, tokenizer, own, bar):
                    descriptions |= zip(prompts, respond(model, tokenizer, list(prompts.values()), own.max_new_tokens))
            table.append([perception, f"{len(descriptions)} of {len(samples)}"])
            for reasoning in reasoners:
                (model, tokenizer), right = load_text_model(reasoning), []
                for n, description in tqdm(descriptions.items(), desc="answer"):
                    response = answer_from_text(model, tokenizer, samples[n], description, own.max_new_tokens)
                    right.append(data.accuracy_reward(response, samples[n]))
                    file.write(json.dumps({
                        "id": samples[n].id, "perception": perception, "reasoning": reasoning,
                        "description": description, "response": response, "accuracy": right[-1]}) + "\n")
                table[-1].append(float(np.mean(right)) if right else "-")
    print_table(table)


# ---------------------------------------------------------------------------------------------------------- study

# What is compared: an algorithm, with options of appo.py after colons, or one of these words: again, with other random
# numbers in the rollouts (the null: what chance does), and the controls below.
ARMS = ("dapo,dapo:again,grpo,papo_d,appo,appo:strategy=hard,appo:strategy=all,appo:alpha=0.7,appo:shuffled,"
        "appo:mean_one,appo:oracle")


def shuffled(group: appo.Group, logits, s: appo.Settings, tokenizer) -> Tensor:
    """Control: the weights of each response, on tokens drawn by lot. Is it where they stand that matters?"""
    weights, rng = appo.weigh_tokens(group, logits, s), np.random.default_rng((s.seed, group.position))
    for row, real in zip(weights, group.rollout.response_mask):
        row[real] = row[real][torch.from_numpy(rng.permutation(int(real.sum()))).to(row.device)]
    return weights


def mean_one(group: appo.Group, logits, s: appo.Settings, tokenizer) -> Tensor:
    """Control: the weights over their mean. Is it that they are above 1, and a step so much larger?"""
    weights = appo.weigh_tokens(group, logits, s)
    return weights / appo.group_mean(weights, group.rollout.response_mask, "tokens")


def oracle(group: appo.Group, logits, s: appo.Settings, tokenizer) -> Tensor:
    """Control: 1 + alpha on the tokens that name a colour, which is what the crucial frame is looked at for."""
    colours = torch.tensor(tokenizer.convert_tokens_to_ids(list(data.TOY_COLOURS)), device=group.advantages.device)
    return 1 + s.alpha * torch.isin(group.rollout.response_ids, colours).float()


CONTROLS = {control.__name__: control for control in (shuffled, mean_one, oracle)}


def arm_settings(folder: Path, seed: int, arm: str, rest: list[str]) -> tuple[appo.Settings, Callable]:
    """The settings of an arm of the study, and the function that weighs its tokens."""
    algorithm, *words = arm.split(":")
    home, weigh, arguments = folder / f"seed-{seed}", appo.weigh_tokens, []
    for word in words:
        if word in CONTROLS:
            weigh = CONTROLS[word]
        else:
            name, _, value = word.partition("=")
            arguments += ["--rollout_seed", str(1000 + seed)] if word == "again" else [f"--{name}", value]
    s = appo.parse_settings(appo.Parser(appo.Settings, prog="evaluate.py", allow_abbrev=False), [
        "--save_every", "0", "--readers", "1", *rest, *arguments, "--algorithm", algorithm, "--seed", str(seed),
        "--toy_folder", str(home), "--data", str(folder / "train.json"), "--eval_data", str(folder / "test.json"),
        "--output", str(home / re.sub(r"[^\w.]+", "-", arm))])
    if weigh in (shuffled, mean_one) and not s.alpha:
        raise RunError(f"{arm}: has no token weights that could be {weigh.__name__}; use it with appo")
    return s, weigh


def train_arm(folder: Path, seed: int, arm: str | None, rest: list[str]) -> None:
    """In a process of its own: train an arm, or without one warm up the seed's model; what is there already stays."""
    s, weigh = arm_settings(folder, seed, arm or "appo", rest)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # one bar is enough
            if arm is None:
                appo.prepare_built_in(s)
            elif not (Path(s.output) / "checkpoint").exists():
                shutil.rmtree(s.output, ignore_errors=True)  # stopped half-way
                if weigh is not appo.weigh_tokens:
                    weigh = partial(weigh, tokenizer=AutoTokenizer.from_pretrained(s.model))
                appo.train(s, weigh)
    except RunError as error:
        raise RunError(f"seed {seed}, {arm or 'warm-up'}: {error}") from None


def mean_weights(output: Path) -> dict[str, float]:
    """Mean weight of all tokens, of the words that name a colour, and of the responses' first tokens, in samples.jsonl."""
    found = {"all tokens": [], "colour words": [], "first tokens": []}
    for group in model_utils.read_log(output / "samples.jsonl"):
        for response in group["responses"]:
            weights = response["weights"] or []  # none: the group did not learn, or the arm has no weights
            found["all tokens"] += weights
            found["colour words"] += [w for token, w in zip(response["tokens"], weights) if token in data.TOY_COLOURS]
            found["first tokens"] += weights[:1]
    return {name: float(np.mean(weights or [1.0])) for name, weights in found.items()}


def study(options) -> None:
    """The built-in task, trained from one warmed-up model a seed and on the same prompts in every arm."""
    folder, arms = Path(options.output), options.arms.split(",")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    settings = {(seed, arm): arm_settings(folder, seed, arm, options.rest)[0] for seed in seeds for arm in arms}
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "study.json"
    if config.exists() and json.loads(config.read_text())["options"] != options.rest:
        raise RunError(f"{folder}: holds a study with other options; give another --output")
    if not config.exists():
        config.write_text(json.dumps({"options": options.rest}))
    data.make_toy_data(folder)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for name, jobs in ("warm-ups", [(seed, None) for seed in seeds]), ("arms", list(settings)):
            futures = [pool.submit(train_arm, folder, *job, options.rest) for job in jobs]
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc=name):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # else all that is queued would still run
                raise
    figures, runs = {}, defaultdict(list)  # {arm: {figure: [seeds]}}
    for arm in arms:
        own = [Path(settings[seed, arm].output) for seed in seeds]
        runs[arm] = [read_run(output)[1] for output in own]
        held_out = [model_utils.read_log(output / "held_out.jsonl") for output in own]
        figures[arm] = {"training": np.array([np.nanmean(run["accuracy"]) for run in runs[arm]])} | {
            f"{name}, {when}": np.array([log[entry][key] for log in held_out])
            for name, key in (("accuracy", "accuracy"), ("recall", "topk")) for when, entry in (("before", 0), ("after", -1))}
        weights = [mean_weights(output) for output in own]
        figures[arm] |= {f"weight, {name}": np.array([one[name] for one in weights]) for name in weights[0]}

    def cell(values: np.ndarray, sign: str = "") -> str:
        low, high = bootstrap_interval(values)
        return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    null = [arm for arm in ("dapo", "dapo:again") if arm in arms]
    names = ("accuracy, before", "accuracy, after", "training", "recall, before", "recall, after")
    table = [["arm", *names, *(["after - mean of dapo", "training - mean of dapo"] if null else [])]]
    for arm in arms:
        table.append([arm] + [cell(figures[arm][name]) for name in names])
        for name in ("accuracy, after", "training") if null else ():
            of_null = np.mean([figures[one][name] for one in null], axis=0)
            table[-1].append("-" if arm in null else cell(figures[arm][name] - of_null, "+"))
    print(f"{len(seeds)} seeds from {options.first_seed}; mean (95% interval, bootstrap over seeds)")
    if len(null) == 2:
        print("the null, dapo:again - dapo:", *(f"{name} {cell(figures[null[1]][name] - figures[null[0]][name], '+')}"
                                                for name in ("accuracy, after", "training")))
    print_table(table)
    weighing = [name for name in figures[arms[0]] if name.startswith("weight")]
    print_table([["arm", *weighing]] + [[arm] + [cell(own[name]) for name in weighing] for arm, own in figures.items()
                                        if any((own[name] != 1).any() for name in weighing)])
    config.write_text(json.dumps({"options": options.rest, "seeds": list(seeds), "arms": {
        arm: {name: values.tolist() for name, values in own.items()} for arm, own in figures.items()}}, indent=1))
    draw_curves(runs, 10, str(folder / "curves.png"))
    print(f"every figure: {config}; curves: {folder / 'curves.png'}")


# ----------------------------------------------------------------------------------------------------- throughput

PHASES = ("embed", "prefill", "decode", "score", "weights", "update")
USUAL = "usual way"


def from_config(config, **more):
    """A model with random weights, where and in the type in which models run."""
    device, dtype = place()
    with device:
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, **more)
    if device.type == "cuda":
        model_utils.multiply_patches(model)  # as load_model does
    return model.eval()


def random_model(folder: str | None):
    """(model, tokenizer) with random weights: of a configuration folder, or of 12 layers and 512 wide."""
    if folder is None:
        small, tokenizer = model_utils.tiny_model([f"w{i}" for i in range(32_760)])
        config = small.config.to_dict()
        config["text_config"] |= dict(
            hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=1408, layer_types=None,
            max_window_layers=12, initializer_range=0.02,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]))
        config["vision_config"] |= dict(depth=8, hidden_size=256, num_heads=4, intermediate_size=704,
                                        out_hidden_size=512, fullatt_block_indexes=[3, 7])
        config = Qwen2_5_VLConfig(**config)
    else:
        try:
            config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            if config.model_type != "qwen2_5_vl":
                raise ValueError(f"it is of type {config.model_type}, not qwen2_5_vl")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{folder}: no usable configuration ({reason}); give a model folder") from None
    torch.manual_seed(0)
    model = from_config(config, attn_implementation="grouped_decoding").requires_grad_(False)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def noise_prompts(tokenizer, count: int, frames: int) -> dict[int, data.Prompt]:
    """Prompts about noise: 64 visual tokens a step of two frames, as 50,176 pixels a frame give."""
    sample, steps = data.Sample("", "what happens ?", ["one", "two", "three", "four"], "A", "choice"), -(-frames // 2)
    prompts = {}
    for n in range(count):
        patches = torch.randn(steps * 256, 1176, generator=torch.Generator().manual_seed(n))
        visual = data.Visual(patches, None, [(steps, 16, 16)], [], [2.0], float(frames), frames)
        prompts[n] = data.build_prompt(sample, visual, tokenizer)
    return prompts


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def inner_phases(model) -> Iterator[Counter]:
    """Seconds inside the vision tower ("embed") and inside the language model's calls of several tokens ("prefill")."""
    seconds, started, hooks = Counter(), [], []

    def time_calls(module, phase: str, counts: Callable) -> None:
        def before(_, args, inputs):
            if counts(inputs):
                started.append(clock(model.device))

        def after(_, args, inputs, output):
            if counts(inputs):
                seconds[phase] += clock(model.device) - started.pop()

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))

    time_calls(model.model.visual, "embed", lambda inputs: True)
    time_calls(model.model.language_model, "prefill", lambda inputs: inputs["inputs_embeds"].shape[1] > 1)
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def training_work(run: appo.Run, prompts: dict[int, data.Prompt]) -> tuple[dict[str, float], dict[int, appo.Group]]:
    """The work of one training step, by the training's own functions: (seconds of each phase, the groups)."""
    s, device = run.settings, run.model.device
    run.seconds.clear()
    run.last = clock(device)
    with inner_phases(run.model) as inner:
        groups = {group.position: group for group in appo.roll_out(run, prompts)}
    for group in groups.values():  # nobody answers noise: let half of each group be right, so that there is work
        half, rollout = torch.arange(s.group_size, device=device) % 2 * 1.0, group.rollout
        group.advantages = appo.group_advantages(half)
        group.crucial = appo.crucial_frames(rollout.frame_attention, rollout.response_mask, half, k1=s.k1, k2=s.k2)
    run.last = clock(device)
    appo.update(run, groups, [(position, 0, True) for position in groups])
    seconds = run.seconds
    return {"embed": seconds["embed"], "prefill": inner["prefill"], "decode": seconds["rollout"] - inner["prefill"],
            "score": seconds["score"], "weights": seconds["weights"], "update": seconds["update"]}, groups


def usual_work(plain, optimizer, groups: dict[int, appo.Group], s: appo.Settings) -> tuple[dict, float, float]:
    """The same step in the usual way, on the same prompts and responses: prompt and video repeated G times, `generate`
    with eager attention and all attention weights kept, G full sequences in the update. Kinder to it than the released
    code: SDPA in vision tower and update, logits of the responses alone. It is given our positions: transformers' own
    restart too early after a video.
    Returns (seconds of each phase, largest difference of log-probabilities, of frame attention).
    """
    device, seconds, log_prob_gap, attention_gap = plain.device, Counter(), 0.0, 0.0
    last, excluded = clock(device), model_utils.excluded_token_ids(plain)

    def lap(phase: str) -> None:
        nonlocal last
        last, before = clock(device), last
        seconds[phase] += last - before

    for prompt, rollout, group in ((group.prompt, group.rollout, group) for group in groups.values()):
        encoded, (group_size, length) = rollout.prompt, rollout.response_ids.shape
        start, ids = len(encoded.input_ids), encoded.input_ids.expand(group_size, -1)
        positions = encoded.positions[:, None].expand(3, group_size, -1)
        video = dict(pixel_values_videos=prompt.patches.to(device, plain.dtype).repeat(group_size, 1),
                     video_grid_thw=torch.tensor(prompt.video_grids, device=device).repeat(group_size, 1))

        def same_response(input_ids: Tensor, scores: Tensor) -> Tensor:
            chosen = rollout.response_ids[:, input_ids.shape[1] - start, None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

        plain.eval().set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
        lap("setup")
        with torch.no_grad(), inner_phases(plain) as inner:
            output = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, **video,
                                    max_new_tokens=length, do_sample=False, logits_processor=[same_response],
                                    output_attentions=bool(s.alpha), return_dict_in_generate=True)
        lap("decode")
        seconds += inner
        seconds["decode"] -= inner.total()
        frame_attention = rollout.frame_attention
        if s.alpha:  # of each step: the last layers, the last query, mean over heads, pooled over the prompt's steps
            read = [[layer[:, :, -1, :start].float().mean(1) for layer in step[-s.attention_layers:]]
                    for step in output.attentions]
            read = torch.stack([torch.stack(step).mean(0) for step in read], 1)  # [G, R, P]
            frame_attention = read @ encoded.frame_pooling()  # [G, R, F]
            attention_gap = max(attention_gap, (frame_attention - rollout.frame_attention).abs().max().item())
            del read
        del output
        lap("weights")
        plain.set_attn_implementation("sdpa")
        plain.model.language_model.train()  # layers are computed again in training mode alone
        after = (encoded.next_position + torch.arange(length, device=device)).expand(3, group_size, -1)
        sequences = torch.cat([ids, rollout.response_ids], 1)
        logits = plain(input_ids=sequences, attention_mask=torch.ones_like(sequences), **video, use_cache=False,
                       position_ids=torch.cat([positions, after], 2), logits_to_keep=length + 1).logits[:, :-1]
        logits = model_utils.sampling_logits(logits, excluded, s.temperature)  # [G, R, V]
        log_probs = logits.log_softmax(-1).gather(-1, rollout.response_ids[..., None])[..., 0]
        log_prob_gap = max(log_prob_gap, (log_probs - group.old_log_probs).abs().max().item())
        lap("update")
        weights = appo.perception_token_weights(frame_attention, logits.detach(), rollout.response_mask, group.crucial,
                                                k3=s.k3, alpha=s.alpha) if s.alpha else None
        lap("weights")
        loss, _ = appo.clipped_surrogate_loss(
            log_probs, log_probs.detach(), group.advantages, rollout.response_mask, token_weights=weights,
            clip_low=s.clip_low, clip_high=s.clip_high, average=s.average)
        (loss / len(groups)).backward()
        lap("update")
    torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], s.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    lap("update")
    return {phase: seconds[phase] for phase in PHASES}, log_prob_gap, attention_gap


def fastest_decoding(model, groups: dict[int, appo.Group]) -> float:
    """Seconds that decoding takes if a step reads weights and cache once, at the measured bandwidth of a copy."""
    block, copies = torch.ones(1 << 28, dtype=torch.uint8, device=model.device), []
    for _ in range(5):
        started = clock(model.device)
        block.clone()  # reads and writes
        copies.append(clock(model.device) - started)
    config, rollouts = model.config.text_config, [group.rollout for group in groups.values()]
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters()) + model.lm_head.weight.numel()
    tokens = sum(len(r.prompt.input_ids) + r.response_ids.numel() / 2 for r in rollouts)  # half full on average
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    step = (weights + 2 * config.num_hidden_layers * width * tokens) * model.dtype.itemsize  # bytes
    return rollouts[0].response_ids.shape[1] * step * min(copies[1:]) / (2 * block.numel())


def peak_memory(device: torch.device) -> float:
    """GB: on a GPU of the allocator since the last reset, else of the process since its start."""
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def throughput(options) -> None:
    """Tab. F: the work of training steps with responses of fixed length. Every round runs each algorithm once, and
    ratios are medians of the rounds' ratios, so that what else the machine does touches all alike. A round goes before,
    to warm up; in it the usual way has the same weights, so its numbers must agree with ours."""
    algorithms, (device, dtype) = options.algorithms.split(","), place()
    if wrong := set(algorithms) - {"appo", "dapo", "grpo"}:
        raise RunError(f"--algorithms {wrong.pop()}: choose among appo, dapo and grpo")
    if options.random_weights or not options.model:
        model, tokenizer = random_model(options.model)
    else:
        model, tokenizer = load_model(options.model)
    model.generation_config.eos_token_id = model.config.vision_start_token_id  # never sampled: no response ends
    if options.against_plain:  # a twin
        plain = from_config(copy.deepcopy(model.config))
        plain.load_state_dict(model.state_dict())
        plain.generation_config = copy.deepcopy(model.generation_config)
        plain.model.visual.requires_grad_(False)
        plain_parameters = [p for p in plain.parameters() if p.requires_grad]
        plain_optimizer = torch.optim.AdamW(plain_parameters, lr=1e-6, weight_decay=0.0, fused=device.type == "cuda")
        if options.gradient_checkpointing:
            model_utils.recompute_activations(plain.model.language_model)
    common = dict(
        prompts_per_step=options.prompts, group_size=options.group, rollout_groups=options.rollout_groups,
        max_new_tokens=options.new_tokens, seed=options.seed, gradient_checkpointing=options.gradient_checkpointing,
        attention_layers=min(3, model.config.text_config.num_hidden_layers))
    shared, runs = appo.set_up(appo.Settings(**common), model, tokenizer), {}  # one policy for all algorithms
    for name in algorithms:
        s = appo.Settings(algorithm=name, **appo.PRESETS[name], **common)
        runs[name] = replace(shared, settings=s, reference=model_utils.frozen_policy(model, 1.0) if s.kl_coef else None)
    first, prompts = runs[algorithms[0]], noise_prompts(tokenizer, options.prompts, options.frames)
    rounds, memory, gaps, groups = [], {}, None, {}
    for number in range(1 + options.repetitions):
        rounds.append({})
        for name, run in list(runs.items())[::(-1) ** number]:  # in turns: what goes first finds the memory cold
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rounds[-1][name], made = training_work(run, prompts)
            memory[name] = peak_memory(device)
            if run is first:
                groups = made
        if options.against_plain:
            rounds[-1][USUAL], *differences = usual_work(plain, plain_optimizer, groups, first.settings)
            memory[USUAL], gaps = peak_memory(device), gaps or differences
        print(f"round {number} of {options.repetitions}:", ", ".join(
            f"{name} {sum(phases.values()):.2f} s" for name, phases in rounds[-1].items()), file=sys.stderr)
    for one in rounds:
        for phases in one.values():
            phases["step"] = sum(phases.values())
    rounds, rows = rounds[1:], ("step", *PHASES)

    def ratio(above: str, below: str, phase: str = "step") -> float | None:
        """Median of the rounds' ratios of seconds; None where a phase does not occur."""
        pairs = [(one[above][phase], one[below][phase]) for one in rounds]
        return float(np.median([a / b for a, b in pairs])) if all(a and b for a, b in pairs) else None

    responses = options.prompts * options.group
    per_step = {"samples_per_second": options.prompts, "tokens_per_second": responses * options.new_tokens}
    gpu = device.type == "cuda"
    result = {"device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
              "torch": torch.__version__, "options": {k: v for k, v in vars(options).items() if not callable(v)},
              "prompt_tokens": len(prompts[0].input_ids), "algorithms": {}}
    for name in (*runs, *([USUAL] if options.against_plain else [])):
        seconds = {phase: [one[name][phase] for one in rounds] for phase in rows}
        spread = {phase: {"median": float(np.median(s)), "low": min(s), "high": max(s)} for phase, s in seconds.items()}
        result["algorithms"][name] = {"seconds": spread, "peak_memory_gb": memory[name]} | {
            rate: amount / spread["step"]["median"] for rate, amount in per_step.items()}
    columns = result["algorithms"].values()
    print(f"{result['device']}, torch {torch.__version__}, {result['prompt_tokens']} prompt tokens; "
          "seconds: median (low to high)")
    print_table([["", *result["algorithms"]]] + [
        [phase] + ["{median:.3f} ({low:.3f} to {high:.3f})".format(**column["seconds"][phase]) for column in columns]
        for phase in rows] + [[rate] + [column[rate] for column in columns] for rate in (*per_step, "peak_memory_gb")])
    for name in set(runs) - {"dapo"} if "dapo" in runs else ():
        result[f"{name}_over_dapo"] = ratio("dapo", name)  # of the speeds
        paper = "; paper: 0.81 (3B, 30 frames), 0.93 (7B, 16 frames)" if name == "appo" else ""
        print(f"{name} / dapo, samples per second: {result[f'{name}_over_dapo']:.3f}{paper}")
    share = fastest_decoding(model, groups) / result["algorithms"][algorithms[0]]["seconds"]["decode"]["median"]
    result["decoding_share_of_bandwidth"] = share
    print(f"decoding: {share:.2f} of the speed that reading weights and cache once a step allows")
    if options.against_plain:
        result["plain_over_ours"] = {phase: ratio(USUAL, algorithms[0], phase) for phase in rows}
        result["largest_difference"] = dict(zip(("log_probs", "frame_attention"), gaps))
        print(f"{USUAL} / {algorithms[0]}, seconds:", ", ".join(
            f"{phase} {value:.2f}" for phase, value in result["plain_over_ours"].items() if value is not None))
        print(f"largest difference: log-probabilities {gaps[0]:.1e}, frame attention {gaps[1]:.1e}")
    if options.sweep:
        sizes = [(group, options.frames) for group in (2, 4, 8, 16)]
        sizes += [(options.group, frames) for frames in (8, 16, 32, 64)]
        settings, result["growth"] = first.settings, []
        for group, frames in sizes:
            first.settings = replace(settings, group_size=group)
            prompts = noise_prompts(tokenizer, options.prompts, frames)
            work = [training_work(first, prompts)[0] for _ in range(1 + options.repetitions)][1:]
            seconds = {phase: float(np.median([one[phase] for one in work])) for phase in PHASES}
            result["growth"].append({"group": group, "frames": frames, "step": sum(seconds.values())} | seconds)
        print_table([list(result["growth"][0]), *(list(row.values()) for row in result["growth"])])
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1))
    if gaps and not max(gaps) < (1e-3 if dtype == torch.float32 else 1.0):  # bf16 rounds
        raise RunError("the usual way does not compute the same numbers; the ratios mean nothing")


# ----------------------------------------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    error = appo.Parser.error  # one line


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError("give a whole number above 0")
    return int(text)


def picture(text: str) -> str:
    if Path(text).suffix not in (".png", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text}: give a name that ends in .png or .pdf")
    return text


def settings_of(arguments: list[str]) -> appo.Settings:
    """appo.py's options, by its rules; without --data the built-in task's test questions."""
    s = appo.parse_settings(appo.Parser(appo.Settings, prog="evaluate.py", allow_abbrev=False), arguments)
    appo.prepare_built_in(s)
    s.data = s.eval_data or s.data
    return s


def command_line() -> argparse.ArgumentParser:
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def add(function: Callable, takes_rest: bool, **options: dict) -> None:
        command = commands.add_parser(function.__name__, allow_abbrev=False, description=function.__doc__,
                                      epilog="The options of appo.py may follow." if takes_rest else None)
        command.set_defaults(function=function, takes_rest=takes_rest)
        for name, keywords in options.items():
            keywords["help"] += f" (default: {keywords['default']})" if keywords.get("default") else ""
            command.add_argument(name if keywords.pop("positional", False) else f"--{name}", **keywords)

    add(score, True, benchmark=dict(choices=list(BENCHMARKS), help="whose records; default: told by their fields"),
        output=dict(default="scores", help="folder for responses.jsonl and summary.json; a stopped run goes on there"))
    add(compare, False, first=dict(positional=True, help="folder A"), second=dict(positional=True, help="folder B"),
        seed=dict(type=int, default=0, help="of the bootstrap"))
    add(attention, True, model2=dict(nargs="+", default=[], help="further models, drawn beside --model"),
        sample=dict(default="0", help="number or id of the record"),
        output=dict(type=picture, default="attention.png", help=".png or .pdf"))
    add(curves, False, runs=dict(positional=True, nargs="+", help="run folders of appo.py"),
        smooth=dict(type=positive, default=5, help="steps to average over"),
        output=dict(type=picture, default="curves.png", help=".png or .pdf"))
    add(focus, True, output=dict(help="write the table to this .json, too"))
    add(decouple, True, perception=dict(required=True, help="video models M,M2"),
        reasoning=dict(required=True, help="text models T,T2"),
        output=dict(default="decouple.jsonl", help="every description and answer"))
    add(study, True, arms=dict(default=ARMS, help="ALGORITHM[:OPTION=VALUE][:again|shuffled|mean_one|oracle], ..."),
        seeds=dict(type=positive, default=10, help="how many"), first_seed=dict(type=int, default=0, help="the first"),
        processes=dict(type=positive, default=2, help="arms at a time, a core each"),
        output=dict(default="runs/study", help="folder; arms that have finished there stay"))
    add(throughput, False, model=dict(help="model folder; default: a random model of 12 layers and 512 wide"),
        random_weights=dict(action="store_true", help="take configuration and tokenizer of --model, no weights"),
        algorithms=dict(default="appo,dapo,grpo", help="the first is compared with the usual way and swept"),
        against_plain=dict(action="store_true", help="run the usual way on the same prompts and responses"),
        sweep=dict(action="store_true", help="growth with the group size and with the frames"),
        gradient_checkpointing=dict(action="store_true", help="compute layers again in the backward pass"),
        frames=dict(type=positive, default=30, help="frames a video"), group=dict(type=positive, default=8, help="G"),
        new_tokens=dict(type=positive, default=48, help="tokens of every response"),
        prompts=dict(type=positive, default=1, help="groups a step"),
        rollout_groups=dict(type=positive, default=16, help="groups that decode together"),
        repetitions=dict(type=positive, default=3, help="rounds after the warm-up"),
        seed=dict(type=int, default=0, help="of the sampling"), output=dict(help="write every figure to this .json"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options, rest = parser.parse_known_args(arguments)
    transformers.utils.logging.disable_progress_bar()  # one bar at a time
    try:
        if rest and not options.takes_rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.rest = rest
        options.function(options)
    except (RunError, data.DataError, data.VideoError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
