"""Measuring: benchmarks, what responses look at, curves of runs, and the speed of a training step.

    python evaluate.py score --model M --data test.json --video_root videos --output scores/m    accuracy by task
    python evaluate.py compare scores/a scores/b                    is the difference more than chance?
    python evaluate.py attention --model A --model2 B --data test.json --sample 3 --output map.png
    python evaluate.py curves runs/* --output curves.png            accuracy, reward, entropy, ... of training runs
    python evaluate.py focus --model M --data test.json             Tab. A: frames of right and of wrong responses
    python evaluate.py decouple --perception M --reasoning T        T answers from M's description alone
    python evaluate.py throughput --against_plain                   Tab. F, and the usual way beside it

score, attention, focus and decouple take appo.py's options by the same names (--max_frames, --seed, --k2, ...), and the
built-in task is their default. Letters in shapes as in model_utils.
"""
import argparse
import copy
import csv
import json
import os
import re
import resource
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

import appo
import data
import model_utils


# ---------------------------------------------------------------------------------------------------- benchmarks

# Where MVBench keeps the videos of its 20 tasks; two tasks may hold different videos of one name.
MVBENCH_FOLDERS = {
    "clevrer/video_validation": "object_existence moving_direction moving_count moving_attribute counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction", "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action", "FunQA_test/test": "unexpected_action",
    "sta/sta_video": "action_localization", "scene_qa/video": "scene_transition", "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation", "tvqa/frames_fps3_hq": "episodic_reasoning"}

# mark: the field that gives a benchmark's records away. options, answer, video, group: its own fields, where data.py
# does not read it already; counted: the answer is an index from 0. prompt: stands before the instruction to think and
# answer, which is the training's for all. overall: mean over "questions", or over "tasks" as VSI-Bench reports it.
BENCHMARKS = {
    "video_r1": dict(mark="problem"),
    "next_gqa": dict(mark="time_clues"),
    "seed_bench_r1": dict(mark="current_observation_basename"),
    "perception_test": dict(mark="answer_id", options="options", answer="answer_id", counted=True, group="area",
                            video="{video_name}.mp4"),
    "next_qa": dict(mark="a0", options="a0 a1 a2 a3 a4", answer="answer", counted=True, group="type", video="{video}.mp4"),
    "mvbench": dict(mark="candidates", options="candidates", answer="answer", group="task", video="video/{folder}/{video}",
                    prompt="Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
                    "movement of objects, and the action and pose of persons. Based on your observations, select the best "
                    "option that accurately addresses the question.\nQuestion: {question}"),
    "vsi_bench": dict(mark="scene_name", options="options", answer="ground_truth", group="question_type", overall="tasks",
                      video="{dataset}/{scene_name}.mp4", prompt="These are frames of a video.\n{question}"),
}


def read_records(path: Path) -> list[dict]:
    """The records of a .json, .jsonl or .csv file (NExT-QA), or of Perception Test's {video: {"mc_question": [..]}}."""
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".json" and (content := json.loads(path.read_text(encoding="utf-8-sig"))) and type(content) is dict:
            return [{"video_name": video} | record for video, entry in content.items() for record in entry["mc_question"]]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        pass  # the reader below names what is wrong
    return data._records(path)


def read_own(path: Path, name: str, records: list[dict], form: dict, video_root: str | None) -> list[data.Sample]:
    """Samples of a benchmark that data.py does not read, by the fields of its entry in BENCHMARKS."""
    samples, finder = [], data._Finder(video_root, path.parent)
    task = re.sub(r"_[0-9]+$", "", path.stem)
    folder = next((place for place, tasks in MVBENCH_FOLDERS.items() if task in tasks.split()), "")
    for number, fields in enumerate(records):
        record = data._Record(f"{name}, record {number}", fields := {"task": task, "folder": folder} | fields)
        names, kind = form["options"].split(), "choice"
        if len(names) > 1:
            options = record.options([record.text(field) for field in names], names[0])
        elif fields.get(names[0]) is None:  # a question about a number
            options, kind = [], "number"
        else:
            options = record.options(record.texts(names[0]), names[0])
        answer = record.text(form["answer"], str(fields.get(form["answer"], "")))
        if kind == "number":
            if data._number(answer) is None:
                raise record.error(form["answer"], f"{answer[:60]!r} is no number")
        elif form.get("counted"):
            if not re.fullmatch("[0-9]{1,2}", answer) or int(answer) >= len(options):
                raise record.error(form["answer"], f"{answer[:60]!r} is not among the {len(options)} options; count from 0")
            answer = chr(65 + int(answer))
        else:  # the words as they stand, else a letter
            answer = chr(65 + options.index(answer)) if answer in options else record.answer(form["answer"], options)
        try:
            video = form["video"].format_map(fields)
        except KeyError as error:
            raise record.error(error.args[0], "missing; it names the video") from None
        if ".." in video.split("/"):
            raise record.error("video", "leaves the video folder; drop the '..'")
        bounds = record.number("start"), record.number("end")
        found = finder.find(video)
        samples.append(data.Sample(
            f"{name}:{number}", record.text("question"), options, answer, kind, found, missing=[] if found else [video],
            group=str(fields.get(form["group"], "")), bounds=None if None in bounds else bounds))
    return samples


def load_benchmark(paths: str, video_root: str | None, benchmark: str | None = None, seed: int = 0):
    """(samples, how the overall mean is taken) of annotation files a,b; each file's benchmark is told by its fields.

    Raises data.DataError, one line, on the first bad record.
    """
    files, samples, overall = [Path(part.strip()) for part in paths.split(",") if part.strip()], [], set()
    for path in files:
        records = read_records(path)
        first = records[0] if records and isinstance(records[0], dict) else {}
        chosen = benchmark or next((name for name, form in BENCHMARKS.items() if form["mark"] in first), None)
        form = BENCHMARKS.get(chosen, {})
        overall.add(form.get("overall", "questions"))
        name = path.name if sum(other.name == path.name for other in files) == 1 else str(path)  # ids stay unique
        if form.get("mark") in first and "answer" in form:
            loaded = read_own(path, name, records, form, video_root)
        else:
            loaded = [replace(sample, id=f"{name}:{sample.id.rpartition(':')[2]}")
                      for sample in data.load_samples(path, video_root, seed=seed)]
        level = re.search("L[123]", path.stem) if chosen == "seed_bench_r1" else None
        for sample in loaded:
            sample.question = form.get("prompt", "{question}").replace("{question}", sample.question)
            sample.group = level[0] if level else sample.group
        samples += loaded
    return samples, overall.pop() if len(overall) == 1 else "questions"


def present(samples: list[data.Sample], s: appo.Settings) -> list[data.Sample]:
    """The samples whose files are there; missing ones are listed, and an error unless --skip_missing."""
    missing = [name for sample in samples for name in sample.missing]
    if missing:
        print(f"{len(missing)} of {len(samples)} samples lack a file:", *map(escaped, missing[:10]), sep="\n  ", file=sys.stderr)
    samples = [sample for sample in samples if not sample.missing]
    if missing and not s.skip_missing or not samples:
        raise appo.RunError(f"{s.data}: {len(missing)} files are missing; mend --video_root or go on without by --skip_missing")
    return samples


# --------------------------------------------------------------------------------------------- decoding and scores

DECODING = dict(temperature=0.1, top_p=0.001, top_k=1, repetition_penalty=1.05)  # supplement, Tab. B


def evaluation_decoding(prompts: list, vocabulary: int, penalty: float = DECODING["repetition_penalty"]) -> Callable:
    """choose(logits [B, V], response_ids [B, t]) -> ids [B]: the supplement's evaluation decoding, for `rollout`.

    Of one candidate (top-k 1) temperature and top-p change nothing: it is the argmax of the penalised logits. The
    penalty divides positive and multiplies negative logits of every token that is in the prompt or the response so far.
    """
    device = prompts[0].input_ids.device
    in_prompt = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)
    for row, prompt in zip(in_prompt, prompts):
        row[prompt.input_ids] = True

    def choose(logits: Tensor, response_ids: Tensor) -> Tensor:
        seen = in_prompt.repeat_interleave(len(logits) // len(in_prompt), 0).scatter(1, response_ids, True)  # [B, V]
        return logits.where(~seen, torch.where(logits > 0, logits / penalty, logits * penalty)).argmax(-1)

    return choose


def respond(model, tokenizer, prompts: list[data.Prompt], max_new_tokens: int) -> list[str]:
    """One response to each prompt, by evaluation decoding."""
    encoded = [model_utils.encode_prompt(model, prompt) for prompt in prompts]
    nothing_random = torch.zeros(len(prompts), 1, max_new_tokens, dtype=torch.float64)
    rollouts = model_utils.rollout(model, encoded, nothing_random, attention_layers=0,
                                   choose=evaluation_decoding(encoded, model.config.text_config.vocab_size))
    return [tokenizer.decode(r.response_ids[0][r.response_mask[0]], skip_special_tokens=True) for r in rollouts]


def score_response(response: str, sample: data.Sample) -> dict[str, float]:
    """accuracy (numbers: mean relative accuracy) and format; for grounding iou, iop and acc_gqa (right and iop >= 0.5)."""
    scores = {"accuracy": data.accuracy_reward(response, sample), "format": data.format_reward(response, sample)}
    if sample.kind == "grounding":
        spans = data.parse_spans(data._element(response, "time") or "")
        scores["iou"], scores["iop"] = data.temporal_iou(spans, sample.spans, sample.duration)
        scores["acc_gqa"] = float(scores["accuracy"] == 1 and scores["iop"] >= 0.5)
    return scores


def summarise(records: list[dict], overall: str = "questions") -> dict[str, dict]:
    """{group: {n, accuracy, ...}, ..., "all": ...}: means over questions. overall="tasks" (VSI-Bench): "all" is the mean
    over the tasks, the three levels of object_rel_direction averaged first.

    Example: means 0.2, 0.4, 0.9 of the three levels and 0.7 of another task -> (0.5 + 0.7) / 2 = 0.6.
    """
    def means(part: list[dict]) -> dict:
        names = [name for name in ("accuracy", "format", "iou", "iop", "acc_gqa") if any(name in r for r in part)]
        return {"n": len(part)} | {name: float(np.mean([r[name] for r in part if name in r])) for name in names}

    table = {group: means([r for r in records if r["group"] == group]) for group in sorted({r["group"] for r in records})}
    total = means(records)
    if overall == "tasks":
        for name in total.keys() - {"n"}:
            tasks: dict[str, list[float]] = {}
            for group, row in table.items():
                tasks.setdefault(re.sub("^(object_rel_direction)_.*", r"\1", group), []).append(row[name])
            total[name] = float(np.mean([np.mean(levels) for levels in tasks.values()]))
    return table | {"all": total}


def escaped(text: str) -> str:
    """For the terminal: what is no printable character, as a response may hold, becomes its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_table(rows: list[list]) -> None:
    cells = [[f"{c:.3f}" if isinstance(c, float) else escaped(str(c)) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]))


def read_responses(folder: str) -> list[dict]:
    """The records of FOLDER/responses.jsonl; half a last line, of a run that was killed, does not count."""
    path = Path(folder) / "responses.jsonl"
    if not path.is_file():
        raise appo.RunError(f"{path}: no such file; give a folder that `evaluate.py score` has written")
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def batches_of(samples: list[data.Sample], size: int) -> Iterator[dict]:
    return ({n: (samples[n], None) for n in range(i, min(i + size, len(samples)))} for i in range(0, len(samples), size))


def reader_for(s: appo.Settings) -> data.VideoReader:
    return data.VideoReader(s.readers, s.decode_timeout, fps=s.fps, max_frames=s.max_frames, min_pixels=s.min_pixels,
                            max_pixels=s.max_pixels)


def load_model(name: str):
    _, _, device = model_utils.init_processes()
    return model_utils.load_model(name, torch.bfloat16 if device.type == "cuda" else torch.float32, device)


def score(options, s: appo.Settings) -> None:
    """Every response is written as it comes; a run that was stopped goes on where it was."""
    samples, overall = load_benchmark(s.data, s.video_root, options.benchmark, s.seed)
    samples, output = present(samples, s), Path(options.output)
    settings = {name: getattr(s, name) for name in ("model", "data", "fps", "max_frames", "min_pixels", "max_pixels",
                                                    "max_new_tokens", "max_prompt_tokens", "seed")}
    settings |= {"benchmark": options.benchmark, "decoding": DECODING, "prompt": data.prompt_text(samples[0], data.Visual(
        torch.empty(0), None, [], [], [], None, s.max_frames))}
    output.mkdir(parents=True, exist_ok=True)
    place, responses = output / "summary.json", output / "responses.jsonl"
    earlier = json.loads(place.read_text()).get("settings") if place.exists() else settings
    if differing := [name for name in settings if earlier.get(name) != settings[name]]:
        raise appo.RunError(f"{output}: holds responses of another {differing[0]}; give another --output")
    place.write_text(json.dumps({"settings": settings}, indent=1))
    responses.touch()
    records = read_responses(options.output)
    os.truncate(responses, responses.read_bytes().rfind(b"\n") + 1)
    done = {record["id"] for record in records}
    todo = [sample for sample in samples if sample.id not in done]
    model, tokenizer = load_model(s.model)
    with reader_for(s) as reader, open(responses, "a") as file, tqdm(total=len(samples), initial=len(done)) as bar:
        for batch in data.read_ahead(reader, batches_of(todo, s.rollout_groups)):
            started = time.perf_counter()
            prompts, skipped = data.build_prompts(batch, tokenizer, s.max_prompt_tokens)
            fresh = [{"id": skip["id"], "skipped": skip["reason"]} for skip in skipped]
            texts = respond(model, tokenizer, list(prompts.values()), s.max_new_tokens) if prompts else []
            for prompt, text in zip(prompts.values(), texts):
                one = prompt.sample
                fresh.append({"id": one.id, "group": one.group, "question": one.question, "answer": one.answer,
                              "response": text, **score_response(text, one),
                              "seconds": round((time.perf_counter() - started) / len(texts), 4)})
            file.writelines(json.dumps(record) + "\n" for record in fresh)
            file.flush()
            records += fresh
            bar.update(len(fresh))
            if scored := [record["accuracy"] for record in records if "accuracy" in record]:
                bar.set_postfix(accuracy=f"{np.mean(scored):.3f}")
    scored, skipped = ([r for r in records if ("skipped" in r) == kind] for kind in (False, True))
    if not scored:
        raise appo.RunError(f"{s.data}: no sample could be read, the first: {escaped(skipped[0]['skipped'])}")
    table = summarise(scored, overall)
    place.write_text(json.dumps({
        "settings": settings, "overall": f"mean over {overall}", "results": table, "skipped": skipped, "torch": torch.__version__,
        "seconds": sum(record["seconds"] for record in scored)}, indent=1))
    names = [name for name in ("n", "accuracy", "format", "iou", "iop", "acc_gqa") if name in table["all"]]
    titles = {"iou": "mIoU", "iop": "mIoP", "acc_gqa": "Acc@GQA"}
    print_table([["group", *(titles.get(name, name) for name in names)],
                 *([group or "-", *(row.get(name, "") for name in names)] for group, row in table.items())])
    print(f"skipped {len(skipped)} of {len(records)}", *(f"{r['id']}: {r['skipped']}" for r in map(
        lambda r: {k: escaped(v) for k, v in r.items()}, skipped[:10])), sep="\n  ")
    print(f"first response: {escaped(scored[0]['response'][:400])}\nall responses: {responses}; settings and results: {place}")


def bootstrap_interval(differences: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% interval of the mean of paired differences [n]: the percentiles of `draws` means of n drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(differences)
    means = [differences[rng.integers(n, size=n)].mean() for _ in range(draws)]
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def compare(options, _) -> None:
    """B minus A, over the questions that both have answered."""
    first, second = ({(r["id"], r["question"]): r["accuracy"] for r in read_responses(folder) if "accuracy" in r}
                     for folder in (options.first, options.second))
    common = sorted(first.keys() & second.keys())
    if not common:
        raise appo.RunError(f"{options.first} and {options.second} have no question in common; score the same --data")
    a, b = (np.array([scores[key] for key in common]) for scores in (first, second))
    low, high = bootstrap_interval(b - a, options.seed)
    print_table([["", "n", "accuracy"], [options.first, len(a), a.mean().item()], [options.second, len(b), b.mean().item()]])
    print(f"difference {(b - a).mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f} (paired bootstrap, {len(common)} common "
          f"questions; {len(first) + len(second) - 2 * len(common)} in one alone)")


# ------------------------------------------------------------------------------------------------------- pictures

def save_figure(figure, output: str) -> None:
    if Path(output).suffix not in (".png", ".pdf"):
        raise appo.RunError(f"{output}: give --output a name that ends in .png or .pdf")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token in a script that the font lacks shows as a box
        figure.savefig(output, dpi=120, bbox_inches="tight")
    print(f"drawn: {output}")


def thumbnails(prompt: data.Prompt) -> np.ndarray:
    """uint8 [F, h, w, 3]: the first frame of each visual step as the vision tower sees it, from the patches."""
    t, h, w = prompt.video_grids[0]
    x = prompt.patches[:t * h * w].view(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, :, 0]
    x = x.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(t, h * 14, w * 14, 3)  # [F, h*14, w*14, 3]
    return ((x * data._STD.view(3) + data._MEAN.view(3)) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def sample_group(model, tokenizer, prompts: dict[int, data.Prompt], s: appo.Settings) -> list[appo.Group]:
    """Groups of G sampled responses with scores and crucial frames, by the training's own rollout."""
    run = appo.Run(settings=s, model=model, tokenizer=tokenizer, policy=None, reference=None, optimizer=None, rank=0, world=1,
                   weigh=None)
    return appo.roll_out(run, prompts)


def draw_attention(panels: list[tuple[str, appo.Group, list[str], int]], output: str) -> None:
    """Fig. A, C, F: for each (title, group, words of the shown response, its number), frames across, tokens down."""
    from matplotlib.figure import Figure
    steps, tokens = panels[0][1].rollout.prompt.num_steps, max(len(words) for _, _, words, _ in panels)
    width, height = max(4.5, 0.55 * steps), 0.17 * tokens + 0.4
    figure = Figure(figsize=((width + 1.6) * len(panels), height + 2))
    grid = figure.add_gridspec(2, len(panels), height_ratios=[min(0.9, width / steps), height], wspace=0.35, hspace=0.04)
    for column, (title, group, words, shown) in enumerate(panels):
        attention = group.rollout.frame_attention[shown, :len(words)].float().cpu().numpy()  # [R, F]
        top, below = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        frames = thumbnails(group.prompt)
        for step, frame in enumerate(frames):
            top.imshow(frame, extent=(step - 0.46, step + 0.46, 0, 1), aspect="auto")
            if group.crucial[step]:
                top.add_patch(__import__("matplotlib.patches").patches.Rectangle(
                    (step - 0.46, 0), 0.92, 1, fill=False, edgecolor="tab:red", linewidth=2.5))
                below.axvspan(step - 0.5, step + 0.5, fill=False, edgecolor="tab:red", linewidth=1)
        top.set(xlim=(-0.5, steps - 0.5), ylim=(-0.03, 1.03))
        top.axis("off")
        top.set_title(title, fontsize=8, parse_math=False)
        image = below.imshow(attention, aspect="auto", cmap="Blues", vmin=0)
        seconds = group.prompt.seconds_per_grid[0]
        below.set_xticks(range(0, steps, stride := -(-steps // 16)), [f"{f * seconds:.3g}" for f in range(0, steps, stride)],
                         fontsize=7)
        below.set_yticks(range(len(words)), words, fontsize=7, parse_math=False)
        below.set_xlabel(f"seconds; red: crucial frames of {len(group.texts)} responses", fontsize=8)
        figure.colorbar(image, ax=below, fraction=0.03, pad=0.01).ax.tick_params(labelsize=6)
    save_figure(figure, output)


def attention(options, s: appo.Settings) -> None:
    samples, _ = load_benchmark(s.data, s.video_root, None, s.seed)
    wanted = [sample for sample in samples if options.sample in (sample.id, sample.id.rpartition(":")[2])]
    if not wanted:
        raise appo.RunError(f"--sample {options.sample}: {s.data} has no such record; count from 0")
    panels = []
    with reader_for(s) as reader:
        visual = reader.submit(wanted[0]).result()
    if not visual.video_grids:
        raise appo.RunError(f"{wanted[0].id}: has no video; choose another --sample")
    for name in [s.model, *options.model2]:
        model, tokenizer = load_model(name)
        own = settings_of([*options.rest, "--model", name])
        group, = sample_group(model, tokenizer, {0: data.build_prompt(wanted[0], visual, tokenizer)}, own)
        accuracy = group.scores["accuracy"]
        shown = int((accuracy >= own.threshold).int().argmax())  # the first right response, else the first
        ids = group.rollout.response_ids[shown][group.rollout.response_mask[shown]]
        words = [escaped(tokenizer.decode([i])) for i in ids.tolist()]
        question = wanted[0].question if len(wanted[0].question) < 90 else wanted[0].question[:87] + "..."
        panels.append((f"{name}\n{escaped(question)}\nanswer {wanted[0].answer}; this response scores {accuracy[shown]:.2f}, "
                       f"the group {accuracy.mean():.2f}", group, words, shown))
    draw_attention(panels, options.output)


CURVES = ("accuracy", "reward", "entropy", "grad_norm", "response_length")


def read_run(folder: str) -> tuple[str, dict[str, np.ndarray]]:
    """(what the run is, {metric: [steps]}) of a run folder; steps without a metric are nan."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        lines = (Path(folder) / "metrics.jsonl").read_text().split("\n")[:-1]  # the last line may be half
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise appo.RunError(f"{folder}: no run of appo.py (config.json and metrics.jsonl); give run folders") from None
    label = config["algorithm"] + (f", {config['strategy']}, alpha {config['alpha']:g}" if config["alpha"] else "")
    return label, {name: np.array([record.get(name, np.nan) for record in records]) for name in CURVES}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` steps, fewer at the start."""
    return np.array([values[max(0, i - window + 1):i + 1].mean() for i in range(len(values))])


def curves(options, _) -> None:
    """Runs alike in algorithm, strategy and alpha are seeds of one: their mean, and a band of one standard deviation."""
    from matplotlib.figure import Figure
    runs: dict[str, list[dict]] = {}
    for folder in options.runs:
        if len(options.runs) > 1 and not (Path(folder) / "metrics.jsonl").exists():
            continue  # runs/* also holds the built-in task
        label, run = read_run(folder)
        if len(run["accuracy"]):
            runs.setdefault(label, []).append(run)
    if not runs:
        raise appo.RunError("no run with a finished step; give run folders of appo.py")
    figure = Figure(figsize=(15, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CURVES)), CURVES):
        for label, seeds in runs.items():
            steps = min(len(seed[name]) for seed in seeds)
            lines = np.stack([smooth(seed[name][:steps], options.smooth) for seed in seeds])  # [seeds, steps]
            mean, spread, x = lines.mean(0), lines.std(0), np.arange(1, steps + 1)
            line, = axes.plot(x, mean, label=f"{label} ({len(seeds)} run{'s' * (len(seeds) > 1)})", linewidth=1.2)
            if len(seeds) > 1:
                axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, options.output)


# ---------------------------------------------------------------------------------- the observations of the paper

TAB_A = {"0 s": 20.1, "0 to 3 s": 23.5, "3 to 6 s": 17.0, "6 to 9 s": 12.6, "9 to 12 s": 7.8, "12 to 15 s": 6.2,
         "over 15 s": 12.8}  # percent of the samples of NExT-GQA's test set


def focus_difference(focused: Tensor, right: Tensor, seconds: float) -> tuple[str, float]:
    """(bin of Tab. A, seconds): how far apart right and wrong responses of a sample look.

    A response's focus time is the mean time of its K2 steps; the difference is that of the means over the right and over
    the wrong responses. "0 s" where psi(S1) = psi(S2). focused bool [G, F], right bool [G]; seconds per visual step.
    Example: steps of 2 s, right {0, 1}, wrong {3, 4}: |1 - 7| = 6 s, bin "6 to 9 s".
    """
    times = (focused.double() * torch.arange(focused.shape[1])).sum(1) / focused.sum(1) * seconds  # [G]
    if torch.equal(focused[right].any(0), focused[~right].any(0)):
        return "0 s", 0.0
    difference = abs(times[right].mean() - times[~right].mean()).item()
    return list(TAB_A)[1 + min(int(difference / 3), 5)], difference


def focus(options, s: appo.Settings) -> None:
    samples, (model, tokenizer) = present(load_benchmark(s.data, s.video_root, None, s.seed)[0], s), load_model(s.model)
    bins, uniform, unreadable = Counter(), 0, 0
    with reader_for(s) as reader, tqdm(total=len(samples)) as bar:
        for batch in data.read_ahead(reader, batches_of(samples, s.rollout_groups)):
            prompts, skipped = data.build_prompts(batch, tokenizer, s.max_prompt_tokens)
            prompts = {n: prompt for n, prompt in prompts.items() if prompt.num_steps}
            for group in sample_group(model, tokenizer, prompts, s) if prompts else []:
                right, rollout = group.scores["accuracy"] >= s.threshold, group.rollout
                if right.all() or not right.any():
                    uniform += 1
                    continue
                focused = appo.focused_frames(rollout.frame_attention, rollout.response_mask, k1=s.k1, k2=s.k2)
                bins[focus_difference(focused.cpu(), right.cpu(), group.prompt.seconds_per_grid[0])[0]] += 1
            unreadable += len(skipped)
            bar.update(len(batch))
    total = sum(bins.values())
    if not total:
        raise appo.RunError("no sample has right and wrong responses; take more samples or a larger --group_size")
    shares = {name: 100 * bins[name] / total for name in TAB_A}
    print_table([["difference", "samples", "percent", "paper"],
                 *([name, bins[name], f"{shares[name]:.1f}", f"{TAB_A[name]:.1f}"] for name in TAB_A)])
    print(f"{total} samples with right and wrong responses; {uniform} with one kind alone, {unreadable} skipped")
    if options.output:
        Path(options.output).write_text(json.dumps({"model": s.model, "data": s.data, "samples": bins, "percent": shares,
                                                    "one_kind_alone": uniform, "skipped": unreadable}, indent=1))


DESCRIBE = ("Describe this video in detail, in the order in which things happen: who and what is seen, what they do, colours, "
            "numbers, places, positions and written words.")


def load_text_model(name: str):
    """(model, tokenizer) of an ordinary language model with a chat template."""
    _, _, device = model_utils.init_processes()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (OSError, ValueError) as error:
        raise appo.RunError(f"{name}: no usable text model ({str(error).splitlines()[0]})") from None
    if tokenizer.chat_template is None:
        raise appo.RunError(f"{name}: its tokenizer has no chat template; take an instruction-tuned model")
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def answer_from_text(model, tokenizer, sample: data.Sample, description: str, max_new_tokens: int) -> str:
    """A text model's answer to a question about a video of which it knows the description alone."""
    kind = "choice" if sample.kind == "grounding" else sample.kind
    told = replace(sample, kind=kind, question=f"A video is described as follows.\n{description}\n\n{sample.question}")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": data.prompt_text(told, None).replace("<|", "< |")}],
                                         add_generation_prompt=True, tokenize=False)
    ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    decoding = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                                eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
                                repetition_penalty=DECODING["repetition_penalty"])  # greedy is top-k 1
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=decoding)
    return tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)


def decouple(options, s: appo.Settings) -> None:
    """Accuracy of every pair of a perception model, which describes the video without knowing the question, and a
    reasoning model, which answers from the description: does seeing or thinking limit the accuracy?"""
    samples = present(load_benchmark(s.data, s.video_root, None, s.seed)[0], s)
    output, table = Path(options.output), [["accuracy", *options.reasoning.split(",")]]
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w") as file:
        for perception in options.perception.split(","):
            model, tokenizer = load_model(perception)
            described, own = {}, settings_of([*options.rest, "--model", perception])
            with reader_for(own) as reader, tqdm(total=len(samples), desc="describe") as bar:
                asked = [replace(sample, question=DESCRIBE, options=[], kind="description") for sample in samples]
                for batch in data.read_ahead(reader, batches_of(asked, own.rollout_groups)):
                    prompts, _ = data.build_prompts(batch, tokenizer, own.max_prompt_tokens)
                    texts = respond(model, tokenizer, list(prompts.values()), own.max_new_tokens) if prompts else []
                    described |= dict(zip(prompts, texts))
                    bar.update(len(batch))
            del model
            table.append([f"{perception} ({len(described)} of {len(samples)} videos read)"])
            for reasoning in options.reasoning.split(","):
                model, tokenizer = load_text_model(reasoning)
                right = []
                for n, description in tqdm(described.items(), desc="answer"):
                    response = answer_from_text(model, tokenizer, samples[n], description, own.max_new_tokens)
                    right.append(data.accuracy_reward(response, samples[n]))
                    file.write(json.dumps({"id": samples[n].id, "perception": perception, "reasoning": reasoning,
                                           "description": description, "response": response, "accuracy": right[-1]}) + "\n")
                table[-1].append(float(np.mean(right)) if right else "-")
    print_table(table)


# ----------------------------------------------------------------------------------------------------- throughput

PHASES = ("embed", "prefill", "decode", "score", "weights", "update")


def random_model(folder: str | None, dtype: torch.dtype, device: torch.device):
    """(model, tokenizer) with random weights, of a configuration folder, or of 12 layers and 512 wide (57M parameters)."""
    if folder is None:
        small, tokenizer = model_utils.tiny_model([f"w{i}" for i in range(32_760)])
        config = small.config.to_dict()
        config["text_config"] |= dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=1408,
                                      layer_types=None, max_window_layers=12, initializer_range=0.02, rope_parameters=dict(
                                          rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]))
        config["vision_config"] |= dict(depth=8, hidden_size=256, num_heads=4, intermediate_size=704, out_hidden_size=512,
                                        fullatt_block_indexes=[3, 7])
        config, generation = Qwen2_5_VLConfig(**config), small.generation_config
    else:
        try:
            config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            if config.model_type != "qwen2_5_vl":
                raise OSError(f"it is of type {config.model_type}, not qwen2_5_vl")
        except (OSError, ValueError) as error:
            raise appo.RunError(f"{folder}: no usable configuration ({str(error).splitlines()[0]})") from None
        generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    with device:
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="grouped_decoding")
    model.generation_config = generation
    return model.eval().requires_grad_(False), tokenizer


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def inner_phases(model) -> Iterator[Counter]:
    """Seconds inside the vision tower ("embed") and inside the language model's calls of several tokens ("prefill")."""
    seconds, started = Counter(), {}

    def phase(module, inputs: dict) -> str | None:
        if module is model.model.visual:
            return "embed"
        return "prefill" if inputs["inputs_embeds"].shape[1] > 1 else None  # a decoding step must not wait for a clock

    def before(module, args, inputs):
        if name := phase(module, inputs):
            started[name] = clock(model.device)

    def after(module, args, inputs, output):
        if name := phase(module, inputs):
            seconds[name] += clock(model.device) - started[name]

    hooks = [hook for module in (model.model.visual, model.model.language_model) for hook in (
        module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after, with_kwargs=True))]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def training_work(run: appo.Run, prompts: dict[int, data.Prompt]) -> tuple[dict[str, float], dict[int, appo.Group]]:
    """The work of one training step, by the training's own functions: (seconds of each phase, the groups)."""
    run.seconds.clear()
    run.last = clock(run.model.device)
    with inner_phases(run.model) as inner:
        groups = {group.position: group for group in appo.roll_out(run, prompts)}
    for group in groups.values():  # a random model is never right: let half of each group be, so that there is work to do
        half = (torch.arange(len(group.texts), device=run.model.device) % 2).float()
        group.scores["accuracy"], group.advantages = half, appo.group_advantages(half)
        if run.settings.alpha:
            s, rollout = run.settings, group.rollout
            group.crucial = appo.crucial_frames(rollout.frame_attention, rollout.response_mask, half, k1=s.k1, k2=s.k2)
    run.last = clock(run.model.device)
    appo.update(run, groups, [(position, 0) for position in groups])
    return {"embed": run.seconds["embed"], "prefill": inner["prefill"], "decode": run.seconds["rollout"] - inner["prefill"],
            **{phase: run.seconds[phase] for phase in ("score", "weights", "update")}}, groups


def usual_work(plain, optimizer, groups: dict[int, appo.Group], s: appo.Settings):
    """The same step in the usual way, on the same prompts and responses: prompt and video repeated G times, `generate` with
    eager attention and all attention weights kept, G full sequences in the update. It is given our positions, because
    transformers' own restart too early after a video, SDPA in vision tower and update, and logits of the responses alone.

    Returns (seconds of each phase, largest difference to the groups' log-probabilities, to their frame attention).
    """
    seconds, log_prob_gap, attention_gap = Counter(), 0.0, 0.0
    for group in groups.values():
        prompt, rollout = group.prompt, group.rollout
        encoded, (group_size, length) = rollout.prompt, rollout.response_ids.shape
        prompt_length, device = len(encoded.input_ids), plain.device
        ids = encoded.input_ids.expand(group_size, -1)
        video = dict(pixel_values_videos=prompt.patches.to(device, plain.dtype).repeat(group_size, 1),
                     video_grid_thw=torch.tensor(prompt.video_grids, device=device).repeat(group_size, 1))

        def same_response(input_ids: Tensor, scores: Tensor) -> Tensor:
            chosen = rollout.response_ids[:, input_ids.shape[1] - prompt_length, None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

        plain.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
        started = clock(device)
        with torch.no_grad(), inner_phases(plain) as inner:
            output = plain.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=encoded.positions[:, None].expand(
                    3, group_size, -1), **video, max_new_tokens=length, do_sample=False, logits_processor=[same_response],
                output_attentions=bool(s.alpha), return_dict_in_generate=True)
        generated = clock(device)
        assert torch.equal(output.sequences[:, prompt_length:], rollout.response_ids)
        seconds += Counter(embed=inner["embed"], prefill=inner["prefill"],
                           decode=generated - started - inner["embed"] - inner["prefill"])
        frame_attention = rollout.frame_attention
        if s.alpha:
            pooling = encoded.frame_pooling()
            frame_attention = torch.stack([  # of each step the last layers, the last query, its prompt keys: [G, R, F]
                torch.stack([a[:, :, -1, :prompt_length].float().mean(1) for a in layers[-s.attention_layers:]]).mean(0) @ pooling
                for layers in output.attentions], dim=1)
            attention_gap = max(attention_gap, (frame_attention - rollout.frame_attention).abs().max().item())
        del output
        weighed = clock(device)
        plain.set_attn_implementation("sdpa")
        after = (encoded.next_position + torch.arange(length, device=device)).expand(3, -1)
        positions = torch.cat([encoded.positions, after], 1)[:, None].expand(3, group_size, -1)
        sequence = torch.cat([ids, rollout.response_ids], 1)
        logits = plain(input_ids=sequence, attention_mask=torch.ones_like(sequence), position_ids=positions, **video,
                       use_cache=False, logits_to_keep=length + 1).logits[:, :-1]  # [G, R, V]
        logits = model_utils.sampling_logits(logits, plain.config, s.temperature)
        log_probs = logits.log_softmax(-1).gather(-1, rollout.response_ids[..., None])[..., 0]
        forward = clock(device)
        weights = None if s.alpha == 0 else appo.perception_token_weights(
            frame_attention, logits.detach(), rollout.response_mask, group.crucial, k3=s.k3, alpha=s.alpha)
        counted = clock(device)
        loss, _ = appo.clipped_surrogate_loss(
            log_probs, log_probs.detach(), group.advantages, rollout.response_mask, token_weights=weights,
            clip_low=s.clip_low, clip_high=s.clip_high, average=s.average)
        (loss / len(groups)).backward()
        log_prob_gap = max(log_prob_gap, (log_probs - group.old_log_probs).abs().max().item())
        seconds += Counter(weights=weighed - generated + counted - forward, update=forward - weighed + clock(device) - counted)
    started = clock(device)
    torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], s.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    seconds["update"] += clock(device) - started
    return {phase: seconds[phase] for phase in PHASES}, log_prob_gap, attention_gap


def decoding_share(model, groups: dict[int, appo.Group], decode: float) -> float:
    """Share of the decoding speed that reading weights and cache once a step allows, by the measured copy bandwidth."""
    block = torch.empty(1 << 28, dtype=torch.uint8, device=model.device)
    copies = []
    for _ in range(5):
        started = clock(model.device)
        block.clone()
        copies.append(clock(model.device) - started)
    config, one = model.config.text_config, next(iter(groups.values())).rollout
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters()) + model.lm_head.weight.numel()
    head_dim = config.hidden_size // config.num_attention_heads
    tokens = sum(len(g.rollout.prompt.input_ids) + g.rollout.response_ids.numel() / 2 for g in groups.values())  # on average
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * tokens
    step = (weights + cache) * next(model.parameters()).element_size() / (2 * block.numel() / min(copies[1:]))
    return step * one.response_ids.shape[1] / decode


def peak_memory(device: torch.device) -> float:
    """GB: of the allocator on a GPU, else of the process since its start."""
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}


def throughput(options, _) -> None:
    """Tab. F. Rounds are interleaved: each runs every algorithm once, and ratios are medians of a round's ratios, so that
    what else happens on the machine touches all alike. The first round warms up and checks that the numbers agree."""
    algorithms, (_, _, device) = options.algorithms.split(","), model_utils.init_processes()
    if wrong := set(algorithms) - {"appo", "dapo", "grpo"}:
        raise appo.RunError(f"--algorithms {wrong.pop()}: choose among appo, dapo and grpo")
    if min(options.frames, options.group, options.new_tokens, options.prompts, options.repetitions) < 1 or options.group < 2:
        raise appo.RunError("--frames, --new_tokens, --prompts and --repetitions start at 1, --group at 2")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.model and not options.random_weights:
        model, tokenizer = model_utils.load_model(options.model, dtype, device)
    else:
        model, tokenizer = random_model(options.model, dtype, device)
    model.generation_config.eos_token_id = model.config.vision_start_token_id  # never sampled: all responses are full
    plain, settings = None, {}
    if options.against_plain:  # a twin with the same weights
        plain = Qwen2_5_VLForConditionalGeneration._from_config(copy.deepcopy(model.config), dtype=dtype, attn_implementation="eager")
        plain.load_state_dict(model.state_dict())
        plain.to(device).eval().generation_config = copy.deepcopy(model.generation_config)
        trained = [*plain.model.language_model.parameters(), *plain.lm_head.parameters()]
        if options.gradient_checkpointing:
            plain.gradient_checkpointing_enable({"use_reentrant": False})
        plain_optimizer = torch.optim.AdamW({id(p): p for p in trained}.values(), lr=1e-6, weight_decay=0.0)
    for name in algorithms:
        settings[name] = appo.Settings(algorithm=name, **appo.PRESETS[name], prompts_per_step=options.prompts, seed=options.seed,
                                       rollout_groups=options.rollout_groups, group_size=options.group,
                                       max_new_tokens=options.new_tokens)
    policy = model_utils.Policy(model)
    if options.gradient_checkpointing:
        policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = model_utils.shard(policy, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    reference = model_utils.Policy(model).to(dtype).requires_grad_(False) if "grpo" in algorithms else None
    runs = {name: appo.Run(settings=s, model=model, tokenizer=tokenizer, policy=policy, optimizer=optimizer, rank=0, world=1,
                           reference=reference if s.kl_coef else None, weigh=appo.weigh_tokens) for name, s in settings.items()}

    def prompts_of(frames: int) -> dict[int, data.Prompt]:
        grid, made = (-(-frames // 2), 16, 16), {}  # 64 visual tokens a step, 2 frames of 50,176 pixels
        sample = data.Sample("", "w1 w2 w3 what happens here ?", ["one", "two", "three", "four"], "A", "choice")
        for n in range(options.prompts):
            noise = torch.randn(grid[0] * 256, 1176, generator=torch.Generator().manual_seed(n))
            visual = data.Visual(noise, None, [grid], [], [2.0], float(frames), frames)
            made[n] = data.build_prompt(sample, visual, tokenizer)
        return made

    prompts, rounds, memory, gaps, groups = prompts_of(options.frames), [], {}, (), {}
    for repetition in range(1 + options.repetitions):
        rounds.append({})
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rounds[-1][name], groups[name] = training_work(run, prompts)
            memory[name] = peak_memory(device)
            if plain is not None and name == algorithms[0]:
                rounds[-1]["usual way"], *now = usual_work(plain, plain_optimizer, groups[name], settings[name])
                gaps = gaps or now  # of the first round, when the weights are the same
        print(f"round {repetition} of {options.repetitions}: " + ", ".join(
            f"{name} {sum(phases.values()):.2f} s" for name, phases in rounds[-1].items()), file=sys.stderr)
    rounds = rounds[1:]
    tokens = options.prompts * options.group * options.new_tokens
    result = {"device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
              "torch": torch.__version__, "options": {k: v for k, v in vars(options).items() if not callable(v)},
              "prompt_tokens": len(prompts[0].input_ids), "algorithms": {}}
    for name in rounds[0]:
        totals = [sum(one[name].values()) for one in rounds]
        result["algorithms"][name] = {"step": spread(totals)} | {
            phase: spread([one[name][phase] for one in rounds]) for phase in PHASES} | {
            "samples_per_second": spread([options.prompts / total for total in totals]),
            "tokens_per_second": spread([tokens / total for total in totals]),
            "peak_memory_gb": memory.get(name, peak_memory(device))}

    def ratio(above: str, below: str, phase: str | None = None) -> float | None:
        """Median of the rounds' ratios of seconds; None where the phase takes no time."""
        seconds = [[one[name][phase] if phase else sum(one[name].values()) for name in (above, below)] for one in rounds]
        return float(np.median([a / b for a, b in seconds])) if all(b > 0 for _, b in seconds) else None

    print_table([["median seconds (lowest to highest)", *result["algorithms"]], *(
        [phase] + [f"{r[phase]['median']:.3f} ({r[phase]['low']:.3f} to {r[phase]['high']:.3f})"
                   for r in result["algorithms"].values()] for phase in ("step", *PHASES)), *(
        [rate.replace("_", " ")] + [f"{r[rate]['median']:.3f}" for r in result["algorithms"].values()]
        for rate in ("samples_per_second", "tokens_per_second")),
        ["peak memory, GB" + ("" if device.type == "cuda" else " (process)")] + [
            f"{r['peak_memory_gb']:.2f}" for r in result["algorithms"].values()]])
    for name in algorithms:
        if "dapo" in runs and name != "dapo":
            result[f"{name}_over_dapo"] = ratio("dapo", name)  # of the speed: DAPO's seconds over its own
            paper = ", paper: 0.81 (3B, 30 frames), 0.93 (7B, 16 frames)" if name == "appo" else ""
            print(f"{name} / dapo, samples per second: {result[f'{name}_over_dapo']:.3f}{paper}")
    first = result["algorithms"][algorithms[0]]
    result["decoding_share_of_bandwidth"] = decoding_share(model, groups[algorithms[0]], first["decode"]["median"])
    print(f"decoding: {result['decoding_share_of_bandwidth']:.2f} of the speed that reading weights and cache once a step allows")
    if plain is not None:
        result["plain_over_ours"] = {phase or "step": ratio("usual way", algorithms[0], phase) for phase in (None, *PHASES)}
        result["largest_difference"] = dict(zip(("log_probs", "frame_attention"), gaps))
        print(f"usual way / {algorithms[0]}, seconds:", ", ".join(
            f"{phase} {value:.2f}" for phase, value in result["plain_over_ours"].items() if value))
        print(f"largest difference: log-probabilities {gaps[0]:.1e}, frame attention {gaps[1]:.1e}")
        if not max(gaps) < (1e-3 if dtype == torch.float32 else 1.0):
            raise appo.RunError("the two ways do not compute the same numbers; the ratios above mean nothing")
    if options.sweep:
        result["growth"], run = [], runs[algorithms[0]]
        for group_size, frames in [(g, options.frames) for g in (2, 4, 8, 16)] + [(options.group, f) for f in (8, 16, 32, 64)]:
            run.settings = replace(settings[algorithms[0]], group_size=group_size)
            work = [training_work(run, prompts_of(frames))[0] for _ in range(1 + options.repetitions)][1:]
            result["growth"].append({"group": group_size, "frames": frames, "step": float(np.median([sum(w.values()) for w in work]))}
                                    | {phase: float(np.median([w[phase] for w in work])) for phase in PHASES})
        print_table([list(result["growth"][0]), *(list(row.values()) for row in result["growth"])])
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1))


# ----------------------------------------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    error = appo.Parser.error  # one line


def settings_of(arguments: list[str]) -> appo.Settings:
    """appo.py's options by appo.py's rules; without --data the built-in task's test questions."""
    s = appo.parse_settings(appo.Parser(appo.Settings, prog="evaluate.py", allow_abbrev=False), arguments)
    appo.prepare_built_in(s)
    s.data = s.eval_data or s.data
    return s


def command_line() -> argparse.ArgumentParser:
    parser = Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def add(function: Callable, *options: tuple, runs_model: bool = False) -> None:
        command = commands.add_parser(function.__name__, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                      description=function.__doc__, epilog="And the options of appo.py." if runs_model else None)
        command.set_defaults(function=function, runs_model=runs_model)
        for *names, keywords in options:
            command.add_argument(*names, **keywords)

    def output(name: str | None, what: str) -> tuple:
        return "--output", dict(default=name, help=what)

    add(score, ("--benchmark", dict(choices=list(BENCHMARKS), help="whose records these are; default: told by their fields")),
        output("scores", "folder for responses.jsonl and summary.json; a stopped run goes on there"), runs_model=True)
    add(compare, ("first", dict(help="folder A")), ("second", dict(help="folder B")), ("--seed", dict(type=int, default=0, help="of "
        "the bootstrap")))
    add(attention, ("--model2", dict(nargs="+", default=[], help="further models, drawn beside the first")),
        ("--sample", dict(default="0", help="number or id of the record")), output("attention.png", ".png or .pdf"), runs_model=True)
    add(curves, ("runs", dict(nargs="+", help="run folders")), ("--smooth", dict(type=int, default=5, help="steps to average over")),
        output("curves.png", ".png or .pdf"))
    add(focus, output(None, "write the table to this .json, too"), runs_model=True)
    add(decouple, ("--perception", dict(required=True, help="video models M,M2")), ("--reasoning", dict(required=True, help="text "
        "models T,T2")), output("decouple.jsonl", "every description and answer"), runs_model=True)
    add(throughput, ("--model", dict(help="folder; default: a model of 12 layers and 512 wide")),
        ("--random_weights", dict(action="store_true", help="the folder's configuration and tokenizer, no weights")),
        ("--algorithms", dict(default="appo,dapo,grpo", help="the first is compared with the usual way and swept")),
        ("--against_plain", dict(action="store_true", help="the usual way on the same prompts and responses")),
        ("--sweep", dict(action="store_true", help="growth with the group size and the frames")),
        ("--gradient_checkpointing", dict(action="store_true", help="as in appo.py")),
        output(None, "write every figure to this .json"),
        *((f"--{name}", dict(type=int, default=value, help=what)) for name, value, what in (
            ("frames", 30, "frames a video"), ("group", 8, "G"), ("new_tokens", 48, "tokens of every response"),
            ("prompts", 1, "groups a step"), ("rollout_groups", 16, "groups that decode together"),
            ("repetitions", 3, "rounds after the warm-up"), ("seed", 0, "of the sampling"))))
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options, options.rest = (known := parser.parse_known_args(arguments))[0], known[1]
    transformers_logging.disable_progress_bar()  # one bar at a time
    try:
        if options.rest and not options.runs_model:
            parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
        options.function(options, settings_of(options.rest) if options.runs_model else None)
    except (appo.RunError, data.DataError, data.VideoError, model_utils.ModelError, OSError) as error:
        parser.error(escaped(" ".join(str(error).split())))


if __name__ == "__main__":
    main()
