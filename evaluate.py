"""Measuring: benchmarks, what responses attend to, the study of the algorithms, and speed.

    python evaluate.py score --model M --data test.json --video_root videos --output scores/m
    python evaluate.py compare scores/a scores/b        is the difference more than chance?
    python evaluate.py attention --model A --model2 B --data test.json --sample 3 --output map.png
    python evaluate.py curves runs/* --output curves.png         training runs, seeds averaged
    python evaluate.py focus --model M --data test.json          Tab. A: which frames responses use
    python evaluate.py decouple --perception M --reasoning T     T answers from M's description
    python evaluate.py study                             the algorithms on the built-in task
    python evaluate.py throughput --against_plain        Tab. F, and the plain way beside it

score, attention, focus, decouple and study also take appo.py's options (--max_frames, --seed, ...);
their default is the built-in task. Tables and figures are the paper's supplement's (2602.23823).
"Accuracy" is that of greedy responses in score, compare and decouple, as the paper evaluates, and
that of responses sampled at --temperature, as in training, everywhere else.
"""
import argparse
import functools
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import threading
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import appo
import data
import model_utils
from model_utils import RunError, explained, printable

# How the command line reads a parameter, as its annotation.

def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError("give a whole number above 0")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(number) for number in text.split(",")]


# ------------------------------------------------------------------------------ greedy responses

# supplement, Tab. B
DECODING = dict(temperature=0.1, top_p=0.001, top_k=1, repetition_penalty=1.05)


def usable(name: str):
    return explained(f"{name}: no usable model; give a model folder")


def write_json(path, content: dict) -> None:
    text = json.dumps(content, indent=1, default=np.ndarray.tolist)
    data.write_whole(Path(path), text.encode())


def process_device() -> torch.device:
    _, _, device = model_utils.init_processes()
    return device


def load_model(name: str):
    return model_utils.load_model(name, process_device())


def read_task(arguments: list[str], benchmark: str | None = None):
    """(settings, samples) by appo.py's options; without --data the built-in task's held-out
    questions. Missing videos are listed, and are an error unless --skip_missing: then they count as
    videos that cannot be read."""
    s = appo.parse_settings(arguments, "evaluate.py")
    appo.make_built_in_data(s)
    s.data = s.eval_data or s.data
    samples = data.load_samples(s.data, s.video_root, benchmark)
    data.with_files(samples, s.data, s.skip_missing)
    appo.make_built_in_model(s)     # errors in the data come first
    s.alpha = 1.0                   # at 0 attention is not read
    return s, samples


def read_prompts(samples: list[data.Sample], tokenizer, s: appo.Settings):
    """Yields (prompts by number of the sample, records of skipped ones), `rollout_groups` each."""
    batches = data.in_batches(dict(enumerate(samples)), s.rollout_groups)
    with appo.open_reader(s) as reader:
        decoded = data.decode_ahead(reader, batches)
        yield from tqdm(data.build_prompts(decoded, tokenizer, s.max_prompt_tokens),
                        total=len(batches))


def evaluation_decoding(encoded: list[model_utils.EncodedPrompt], vocabulary: int,
                        penalty: float = DECODING["repetition_penalty"]):
    """The paper's evaluation decoding (supplement, Tab. B), as `choose` of model_utils.rollout.

    With a single candidate (top-k 1) temperature and top-p change nothing: the choice is the argmax
    of the penalised logits. The penalty divides the positive and multiplies the negative logits of
    every token that occurs in the prompt or in the response so far.
    Returns choose(logits (B, V), ids (B, 1 + R)) -> ids (B,); as in `rollout`, places of `ids` that
    are still to come repeat the last prompt token.
    """
    device = encoded[0].input_ids.device
    in_prompt = torch.zeros(len(encoded), vocabulary, dtype=torch.bool, device=device)
    for row, prompt in zip(in_prompt, encoded):
        row[prompt.input_ids] = True

    def choose(logits: Tensor, ids: Tensor) -> Tensor:
        group_size = len(logits) // len(in_prompt)
        seen = in_prompt.repeat_interleave(group_size, 0).scatter(1, ids, True)         # (B, V)
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        return penalised.where(seen, logits).argmax(-1)

    return choose


def respond(model, tokenizer, prompts: dict[int, data.Prompt], s: appo.Settings):
    """Greedy responses to prompts by number, by evaluation decoding."""
    if not prompts:
        return []
    encoded = model_utils.encode_prompts(model, list(prompts.values()))
    choose = evaluation_decoding(encoded, model.config.text_config.vocab_size)
    uniforms = torch.zeros(len(prompts), 1, s.max_new_tokens)   # `choose` needs no random numbers
    rollouts = model_utils.rollout(model, encoded, uniforms, attention_layers=0, choose=choose,
                                   cuda_graph=s.cuda_graph)
    responses = []
    for rollout in rollouts:
        if not rollout.log_probs.isfinite().all():
            raise RunError(f"{s.model}: its logits are not finite; its weights are damaged")
        ids = rollout.response_ids[rollout.response_mask]
        responses.append(tokenizer.decode(ids, skip_special_tokens=True))
    return responses


# ------------------------------------------------------------------------------- benchmark scores

SCORES = ("accuracy", "format", "iou", "iop", "acc_gqa")


def means(records: list[dict]) -> dict:
    """{n, and the mean of every score over the records that have it}."""
    row = {"n": len(records)}
    for name in SCORES:
        values = [record[name] for record in records if name in record]
        if values:
            row[name] = float(np.mean(values))
    return row


def means_by_group(records: list[dict]) -> dict[str, dict]:
    table = {}
    for group in sorted({record["group"] for record in records}):
        table[group] = means([record for record in records if record["group"] == group])
    return table


def mean_over_tasks(table: dict[str, dict]) -> dict:
    """VSI-Bench's overall number: the mean over the tasks, after the three levels of
    object_rel_direction are averaged to a single task.

    Example: means 0.2, 0.4, 0.9 of the three levels, 0.7 of another task -> (0.5 + 0.7) / 2 = 0.6.
    """
    tasks = [row | {"group": re.sub("^(object_rel_direction)_.*", r"\1", group)}
             for group, row in table.items()]
    return means(list(means_by_group(tasks).values()))


def print_table(rows: list[dict]) -> None:
    """Rows below their keys; floats with three decimals. The last row has all columns."""
    cells = [list(rows[-1])]
    for row in rows:
        values = [row.get(name, "") for name in rows[-1]]
        cells.append([f"{x:.3f}" if isinstance(x, float) else printable(str(x)) for x in values])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print(*map(str.ljust, row, widths), sep="  ")


def with_interval(values: np.ndarray, sign: str = "") -> str:
    """Mean and 95% interval of values (seeds, runs): bootstrap over seeds, and over the runs of
    each."""
    rng, (S, N) = np.random.default_rng(0), values.shape
    seeds, runs = rng.integers(S, size=(10_000, S, 1)), rng.integers(N, size=(10_000, S, N))
    low, high = np.percentile(values[seeds, runs].mean((1, 2)), [2.5, 97.5])
    return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def open_scores(folder: Path, settings: dict) -> list[dict]:
    """Prepare score's folder; returns the records that a stopped run has written there."""
    folder.mkdir(exist_ok=True)
    summary, responses = folder / "summary.json", folder / "responses.jsonl"
    with explained(f"{folder}: cannot be continued; give another --output"):
        records = model_utils.read_log(responses)
        earlier = json.loads(summary.read_text())["settings"] if records else settings
    for name in settings:
        if settings[name] != earlier.get(name):
            raise RunError(f"{folder}: holds responses with other {name}; give another --output")
    write_json(summary, {"settings": settings})
    lines = [json.dumps(record) + "\n" for record in records]      # without an unfinished one
    data.write_whole(responses, "".join(lines).encode())
    return records


def score(rest, benchmark=None, output="scores"):
    """Benchmark scores of greedy responses, by appo.py's options.

    The options of the video must be those of the training: above all --max_frames, then --fps,
    --min_pixels and --max_pixels. Every response is written as it comes; the same command
    continues a run that was stopped.

    benchmark: the annotations' format; default: told by the records' fields
    output: folder of responses.jsonl and summary.json
    """
    s, samples = read_task(rest, benchmark)
    model, tokenizer = load_model(s.model)
    questions = repr([(x.id, x.question, x.options, x.answer) for x in samples])
    # A model that is trained again may lie in the same folder.
    weights = sum(weight.view(torch.int16).sum(dtype=torch.int64).item()
                  for weight in model.parameters())
    may_differ = appo.may_differ(s)
    settings = {name: value for name, value in vars(s).items() if name not in may_differ}
    settings |= {"benchmark": benchmark, "decoding": DECODING,
                 "questions": zlib.crc32(questions.encode()), "weights": weights}
    folder = Path(output)
    records, skipped = open_scores(folder, settings), []
    done = {record["id"] for record in records}
    to_do = [sample for sample in samples if sample.id not in done]
    with open(folder / "responses.jsonl", "a") as file:
        for prompts, unusable in read_prompts(to_do, tokenizer, s):
            skipped += [{"id": record["id"], "skipped": record["reason"]} for record in unusable]
            started = time.perf_counter()
            responses = respond(model, tokenizer, prompts, s)
            seconds = time.perf_counter() - started
            for prompt, response in zip(prompts.values(), responses):
                sample = prompt.sample
                record = {"id": sample.id, "group": sample.group, "question": sample.question,
                          "answer": sample.answer, "response": response,
                          "prompt": data.prompt_text(sample, prompt),
                          "seconds": round(seconds / len(responses), 4)}
                records.append(record | data.score_response(response, sample))
                print(json.dumps(records[-1]), file=file, flush=True)
    over_tasks = all(sample.overall == "tasks" for sample in samples)
    report_scores(folder, settings, records, skipped, over_tasks)


def report_scores(folder: Path, settings: dict, records: list[dict], skipped: list[dict],
                  over_tasks: bool) -> None:
    """Write summary.json and print the table."""
    if not records:
        raise RunError(f"no sample could be read, the first: {skipped[0]['skipped']}")
    table = means_by_group(records)
    overall = mean_over_tasks(table) if over_tasks else means(records)
    table["all"] = overall | {"n": len(records)}
    summary = {"settings": settings, "results": table, "skipped": skipped,
               "overall": "mean over tasks" if over_tasks else "mean over questions",
               "prompt": records[0]["prompt"], "torch": torch.__version__,
               "seconds": sum(record["seconds"] for record in records)}
    write_json(folder / "summary.json", summary)
    print_table([{"group": group or "-"} | row for group, row in table.items()])
    print(f"accuracy of greedy responses; skipped {len(skipped)} of {len(records) + len(skipped)}")
    if skipped:
        print_table(skipped[:10])
    print(f"responses, settings and results: {folder}")


def read_accuracy(folder: str):
    """{(id, question): accuracy} of the responses that `score` has written."""
    path = Path(folder) / "responses.jsonl"
    if not path.is_file():
        raise RunError(f"{path}: no such file; give a folder written by `evaluate.py score`")
    with explained(f"{path}: damaged; score again"):
        return {(record["id"], record["question"]): record["accuracy"]
                for record in model_utils.read_log(path)}


def compare(first, second):
    """Greedy accuracy of B minus that of A, over the questions that both have answered.

    first: folder A of score
    second: folder B of score
    """
    of_first, of_second = read_accuracy(first), read_accuracy(second)
    common = [key for key in of_first if key in of_second]
    if not common:
        raise RunError("the folders have no question in common; score the same --data")
    a, b = np.array([(of_first[key], of_second[key]) for key in common]).T
    print(f"accuracy (greedy): A {a.mean():.3f}, B {b.mean():.3f}")
    # One by one: benchmarks are too large for `with_interval`, which holds all resamples.
    rng, differences = np.random.default_rng(0), b - a
    resampled = [rng.choice(differences, len(common)).mean() for _ in range(10_000)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    print(f"difference {differences.mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f} (paired "
          f"bootstrap over {len(common)} common questions)")


# ----------------------------------------------------------------------------------- attention maps

def save_figure(figure, output: str) -> None:
    with explained(f"{output}: give a name that ends in .png or .pdf"):
        figure.savefig(output, dpi=120)
    print(f"drawn: {output}")


def sampled_groups(run: appo.Run, samples: list[data.Sample]):
    """Yields the group of each sample: G responses by the training's own rollout, scored, with
    crucial frames."""
    for prompts, _ in read_prompts(samples, run.tokenizer, run.settings):
        for group in appo.sample_groups(run, prompts):
            appo.score_group(run, group)
            yield group


def attention(rest, model2: list = (), sample="0", output="attention.png"):
    """What each token of a sampled response attends to, and the crucial frames of its group.

    model2: further models, drawn beside --model
    sample: number or id of the record, whose id is for instance "test.json:3"
    output: .png or .pdf
    """
    s, samples = read_task(rest)
    matching = [x for x in samples if x.video and f":{x.id}".endswith(f":{sample}")]
    panels = []
    for name in [s.model, *model2]:
        run = appo.Run(replace(s, model=name), *load_model(name))
        for group in sampled_groups(run, matching[:1]):
            panels.append((run, group))
    if not panels:
        raise RunError(f"--sample {sample}: {s.data} has no such record with a video that can be "
                       "read; count from 0")
    draw_attention(panels, output)


def draw_attention(panels, output: str) -> None:
    """Figs. A, C and F. Each panel is (run, group): a row for each token of the first of the best
    responses below the frames, and a column for each frame."""
    from matplotlib.figure import Figure
    prompt = panels[0][1].prompt
    F, R = prompt.num_frames, max(group.rollout.response_mask.shape[1] for _, group in panels)
    # the first of the two sampled frames that the vision tower merges stands for both
    patches = prompt.patches[:math.prod(prompt.video_grids[0])]     # those of a picture come after
    frames = data.patches_to_frames(patches, prompt.video_grids[0])[::2]           # (F, 3, h, w)
    strip = frames.permute(2, 0, 3, 1).flatten(1, 2).numpy()                       # (h, F * w, 3)
    above = 3.2 * frames.shape[2] / frames.shape[3]     # height of a frame in rows: they are 0.17
    size = len(panels) * (0.55 * F + 2), 0.17 * (R + above) + 1.4       # inches; columns are 0.55
    figure = Figure(size, layout="constrained")
    question = printable(textwrap.shorten(prompt.sample.question, 90))
    figure.suptitle(f"{question}\nanswer {prompt.sample.answer}", fontsize=8, parse_math=False)
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (run, group) in zip(columns, panels):
        shown = int(group.accuracy.argmax())
        real = group.rollout.response_mask[shown]
        ids = group.rollout.response_ids[shown, real]
        words = [printable(word) for word in run.tokenizer.batch_decode(ids[:, None])]
        values = group.rollout.frame_attention[shown, real].cpu().numpy()              # (R, F)
        image = axes.imshow(values, cmap="Blues", vmin=0)
        axes.imshow(strip, extent=(-0.5, F - 0.5, -0.5, -0.5 - above))
        axes.set(aspect="auto", ylim=(len(words) - 0.5, -0.5 - above),
                 xlabel=f"frame, {prompt.seconds_per_grid[0]:.3g} s each; red: crucial")
        axes.set_title(f"{run.settings.model}\naccuracy (sampled): this response "
                       f"{group.accuracy[shown]:.2f}, its group {group.accuracy.mean():.2f}",
                       fontsize=8, parse_math=False)
        axes.set_yticks(range(len(words)), words, fontsize=7, parse_math=False)
        figure.colorbar(image, ax=axes)
        for f in group.crucial.nonzero().flatten().tolist():
            axes.axvspan(f - 0.48, f + 0.48, fill=False, edgecolor="tab:red", linewidth=2)
    save_figure(figure, output)


# ------------------------------------------------------------------------------ curves of training

CURVES = ("accuracy", "reward", "entropy", "grad_norm", "response_length")
# Settings that may differ among the seeds of a run.
MAY_DIFFER = {"seed", "rollout_seed", "output", "resume", "toy_folder", "model", "data",
              "eval_data"}


def read_settings(folder):
    with explained(f"{folder}: no run of appo.py; give run folders"):
        return json.loads(Path(folder, "config.json").read_text())["settings"]


def read_metrics(folder):
    """{metric: (steps,)} of a run folder; nan at steps without the metric."""
    with explained(f"{folder}: no run of appo.py; give run folders"):
        records = model_utils.read_log(Path(folder, "metrics.jsonl"))
    return {name: np.array([record.get(name, np.nan) for record in records]) for name in CURVES}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` steps, fewer at the start; of those that have the metric."""
    windows = [values[max(end - window, 0):end] for end in range(1, len(values) + 1)]
    counts = np.array([np.isfinite(values).sum() for values in windows])
    sums = np.array([np.nansum(values) for values in windows])
    return sums / np.where(counts, counts, np.nan)


def curves(runs: list, smooth: positive = 5, output="curves.png"):
    """Metrics over the training steps; of the seeds of a run, the mean and its standard error.

    Folders count as seeds of a run if their names agree but for a number at the end (appo-0,
    appo-1), and their settings but for seeds and places.

    runs: run folders of appo.py
    smooth: steps to average over
    output: .png or .pdf
    """
    seeds = defaultdict(list)
    for folder in map(Path, runs):
        metrics = read_metrics(folder)
        if len(metrics["accuracy"]):                # runs/* also holds the built-in task
            same = json.dumps(read_settings(folder) | dict.fromkeys(MAY_DIFFER), sort_keys=True)
            key = re.sub(r"-\d+$", "", folder.name), same
            seeds[key].append(metrics)
    if not seeds:
        raise RunError(f"{', '.join(runs)}: no run with a finished step; give run folders of "
                       "appo.py")
    draw_curves([(name, seeds[name, same]) for name, same in seeds], smooth, output)


def draw_curves(runs, window: int, output: str, names=CURVES) -> None:
    """runs: (label, [{metric: (steps,)} of each seed]). The band is the standard error of the
    seeds' mean."""
    from matplotlib.figure import Figure
    figure = Figure((max(8, 3 * len(names)), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for label, seeds in runs:
            lines = [smooth(metrics[name], window) for metrics in seeds]
            # A run that was stopped counts as far as it went.
            by_step = [*itertools.zip_longest(*lines, fillvalue=np.nan)]
            by_step = np.ma.masked_invalid(by_step)                             # (steps, seeds)
            steps = range(1, len(by_step) + 1)
            mean, spread = by_step.mean(1), by_step.std(1) / by_step.count(1) ** 0.5
            axes.plot(steps, mean, label=f"{label} (n = {len(seeds)})")
            axes.fill_between(steps, mean - spread, mean + spread, alpha=0.2)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, output)


# ---------------------------------------------------------------------- the paper's observations

# Tab. A: percent of the samples of NExT-GQA's test set
TAB_A = {"0 s": 20.1, "0 to 3 s": 23.5, "3 to 6 s": 17.0, "6 to 9 s": 12.6, "9 to 12 s": 7.8,
         "12 to 15 s": 6.2, "over 15 s": 12.8}


def focus_difference(focused: Tensor, correct: Tensor, seconds: float):
    """How far apart in time correct and incorrect responses look: (bin of Tab. A, seconds).

    A response's focus time is the mean time of its K2 frames. The difference is that between the
    means over the correct and over the incorrect responses; bin "0 s" where both sets of responses
    focus on the same frames.
    focused bool (G, F), correct bool (G,); seconds from a frame to the next.
    Example: 2 s per frame, correct {0, 1}, incorrect {3, 4}: |1 - 7| = 6 s, bin "6 to 9 s".
    """
    if torch.equal(focused[correct].any(0), focused[~correct].any(0)):
        return "0 s", 0.0
    frames = torch.arange(focused.shape[1])
    times = (focused.double() * frames).sum(1) / focused.sum(1) * seconds                # (G,)
    difference = (times[correct].mean() - times[~correct].mean()).abs().item()
    return list(TAB_A)[1 + min(int(difference / 3), 5)], difference


def focus(rest, output=None):
    """Tab. A: differences in focused frames between correct and incorrect sampled responses.

    output: also write the table to this .json
    """
    s, samples = read_task(rest)
    run, bins = appo.Run(s, *load_model(s.model)), Counter()
    for group in sampled_groups(run, [sample for sample in samples if sample.video]):
        correct = (group.accuracy >= s.threshold).cpu()         # as in training             # (G,)
        if correct.all() or not correct.any():
            continue
        focused = appo.focused_frames(group.rollout.frame_attention, group.rollout.response_mask,
                                      k1=s.k1, k2=s.k2)
        name, _ = focus_difference(focused.cpu(), correct, group.prompt.seconds_per_grid[0])
        bins[name] += 1
    total = bins.total()
    if not total:
        raise RunError(f"none of {len(samples)} samples has correct and incorrect responses; "
                       "raise --group_size or take more samples")
    shares = {name: 100 * bins[name] / total for name in TAB_A}
    print_table([{"difference": name, "samples": bins[name], "percent": shares[name],
                  "paper": TAB_A[name]} for name in TAB_A])
    print(f"{total} of {len(samples)} samples; the others cannot be read, have no video, or have "
          "only correct or only incorrect responses")
    if output:
        write_json(output, {"model": s.model, "data": s.data, "samples": bins, "percent": shares,
                            "left_out": len(samples) - total})


DESCRIBE = ("Describe this video in detail, in the order in which things happen: who and what is "
            "seen, what they do, colours, numbers, places, positions and written words.")


def answers(reasoning: str, described: list[tuple], max_new_tokens: int):
    """Yields (sample, description, a text model's greedy answer to the question about a video that
    it knows by description). The model is freed at the end, so that only one is in memory."""
    device = process_device()
    with usable(reasoning):
        pipeline = transformers.pipeline("text-generation", reasoning, device=device,
                                         dtype=model_utils.compute_type(device))
        for sample, description in tqdm(described, "answer"):
            # The prompt of grounding asks for times, and needs a video.
            kind = "choice" if sample.kind == "grounding" else sample.kind
            question = f"A video is described as follows.\n{description}\n\n{sample.question}"
            text = data.prompt_text(replace(sample, kind=kind, question=question), visual=None)
            text = text.replace("<|", "< |")    # control tokens stay words, as in build_prompt
            output = pipeline([{"role": "user", "content": text}], max_new_tokens=max_new_tokens,
                              do_sample=False, return_full_text=False,
                              repetition_penalty=DECODING["repetition_penalty"])
            yield sample, description, output[0]["generated_text"]


def describe(samples: list[data.Sample], s: appo.Settings) -> list[tuple]:
    """(sample, description of its video) for each video that can be read."""
    model, tokenizer = load_model(s.model)
    to_describe = [replace(sample, question=DESCRIBE, options=[], kind="description")
                   for sample in samples]
    described = []
    for prompts, _ in read_prompts(to_describe, tokenizer, s):
        for n, description in zip(prompts, respond(model, tokenizer, prompts, s)):
            described.append((samples[n], description))
    return described


def decouple(rest, perception=None, reasoning=None, output="decouple.jsonl"):
    """Is it seeing or thinking that limits the accuracy?

    Greedy accuracy of a reasoning model, which answers from a description of the video that a
    perception model gives without knowing the question.

    perception: a video model
    reasoning: text models T,T2
    output: every description and answer
    """
    if perception is None or reasoning is None:
        raise RunError("give --perception and --reasoning")
    reasoners, row = reasoning.split(","), {"perception / reasoning": perception}
    s, samples = read_task([*rest, "--model", perception])
    for name in [perception, *reasoners]:           # not after hours of describing
        with usable(name):
            transformers.AutoConfig.from_pretrained(name)
    described = describe(samples, s)
    row["samples"] = f"{len(described)} of {len(samples)}"
    with open(output, "w") as file:
        for name in reasoners:
            accuracies = []
            for sample, description, response in answers(name, described, s.max_new_tokens):
                accuracies.append(data.accuracy_reward(response, sample))
                record = {"id": sample.id, "perception": perception, "reasoning": name,
                          "description": description, "response": response,
                          "accuracy": accuracies[-1]}
                print(json.dumps(record), file=file, flush=True)
            row[name] = np.mean(accuracies or [np.nan])
    print_table([row])


# ------------------------------------------------------------------------------------------ study

# A weighting takes (group, logits, settings), and gives the weights of the group's tokens (G, R).
# An arm is an algorithm and, after colons, changes: settings of appo.py; "again", other random
# numbers in the rollouts (the null: what chance does); one of CONTROLS, another weighting of
# tokens; and "true_frame", which tells the weighting the frame that shows the answer.
ARMS = ("dapo,dapo:again,grpo,papo_d,appo,appo:strategy=hard,appo:strategy=all,appo:shuffled,"
        "appo:mean_one,appo:oracle")
FIGURE_ARMS = ("dapo", "appo", "appo:shuffled", "appo:oracle")


def shuffled(group, logits, s) -> Tensor:
    """APPO's weights of each response, on its tokens in random order: does the place matter?"""
    weights = appo.weigh_tokens(group, logits, s).clone()                               # (G, R)
    rng = np.random.default_rng((s.seed, group.position))
    for row, real in zip(weights, group.rollout.response_mask):
        row[real] = row[real][rng.permutation(int(real.sum()))]
    return weights


def mean_one(group, logits, s) -> Tensor:
    """APPO's weights over their mean: is it only that weights above 1 make a larger step?"""
    weights = appo.weigh_tokens(group, logits, s)                                       # (G, R)
    return weights / appo.masked_mean(weights, group.rollout.response_mask)


tokenizer_of = functools.lru_cache(transformers.AutoTokenizer.from_pretrained)


def oracle(group, logits, s) -> Tensor:
    """1 + alpha on the tokens that name a colour, for which the crucial frame is looked at."""
    ids = group.rollout.response_ids                                                     # (G, R)
    colours = tokenizer_of(s.model).convert_tokens_to_ids(list(data.TOY_COLOURS))
    colours = torch.tensor(colours, device=ids.device)
    return 1 + s.alpha * torch.isin(ids, colours).float()


def equal(group, logits, s) -> Tensor:
    """1 + alpha on all tokens that a crucial frame picks, without D."""
    attention = group.rollout.frame_attention[:, :, group.crucial].permute(2, 0, 1)  # (C, G, R)
    picked = appo.most_attentive_tokens(attention, group.rollout.response_mask, s.k3)
    return 1 + s.alpha * picked.any(0).float()


def entropy(group, logits, s) -> Tensor:
    """The entropy of a picked token's distribution in place of D: how much responses that share its
    prefix would differ. The largest counts as 1."""
    uncertainty = group.rollout.entropy * (equal(group, logits, s) > 1)                 # (G, R)
    return 1 + s.alpha * uncertainty / uncertainty.max().clamp(min=1e-4)


def true_frame(weigh, group, logits, s) -> Tensor:
    """A weighting for which the true frame is the only crucial one."""
    frame = group.prompt.sample.crucial_frame
    if frame is None:
        raise RunError(f"{group.prompt.sample.id}: lacks a crucial_frame, which true_frame needs")
    true = torch.zeros_like(group.crucial)
    true[frame] = True
    return weigh(replace(group, crucial=true), logits, s)


CONTROLS = {"shuffled": shuffled, "mean_one": mean_one, "oracle": oracle, "equal": equal,
            "entropy": entropy}


def arm_settings(arm: str, seed: int, number: int, folder: str, rest: list[str]):
    """(settings, weighting of tokens) of an arm; number: which run of the seed's model; rest: the
    study's options of appo.py."""
    algorithm, *changes = arm.split(":")
    home, weigh, arguments = f"{folder}/seed-{seed}", appo.weigh_tokens, [*rest]
    rollout_seed = seed + 1000 * number         # with "again" 500 more
    for change in changes:
        if change in CONTROLS:
            weigh = CONTROLS[change]
        elif change == "again":
            rollout_seed += 500
        elif change != "true_frame":
            arguments.append(f"--{change}")
    if "true_frame" in changes:
        weigh = functools.partial(true_frame, weigh)
    s = appo.parse_settings([
        "--save_every=0", "--readers=1", *arguments, f"--algorithm={algorithm}", f"--seed={seed}",
        f"--rollout_seed={rollout_seed}", f"--toy_folder={home}",
        f"--output={home}/{arm}-{number}"], "evaluate.py")
    if weigh is not appo.weigh_tokens and not s.alpha:
        raise RunError(f"{arm}: at alpha 0 there are no token weights; use the control with appo")
    return s, weigh


def start_worker() -> None:
    """A study's process prints nothing, as one bar is enough. It ends when its parent dies, so that
    none writes beside the next study."""
    sys.stdout = sys.stderr = open(os.devnull, "w")

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_arm(s: appo.Settings, weigh) -> None:
    """Train an arm, unless it has finished."""
    folder = Path(s.output)
    if (folder / "checkpoint").exists():
        if not vars(s).items() <= read_settings(folder).items():
            raise RunError(f"{folder}: holds a run with other options; give another --output")
        return
    shutil.rmtree(folder, ignore_errors=True)                                  # stopped half-way
    try:
        appo.train(s, weigh=weigh)
    except RunError as error:
        raise RunError(f"{folder}: {error}") from None


def run_figures(s: appo.Settings, frames: dict[str, int | None]) -> dict[str, float]:
    """What the study reports of a run. Accuracy is that of sampled responses. frames: those that
    show the answers, by the samples' ids."""
    folder = Path(s.output)
    figures = {"training": np.nanmean(read_metrics(folder)["accuracy"])}
    held_out = model_utils.read_log(folder / "held_out.jsonl") or [{}]
    for name in ("accuracy", "topk"):
        figures[f"{name}, before"] = held_out[0].get(name, np.nan)
        figures[f"{name}, after"] = held_out[-1].get(name, np.nan)
    weights, found = defaultdict(list), []
    for group in model_utils.read_log(folder / "samples.jsonl"):
        frame = frames[group["id"]]
        found.append(np.nan if frame is None else frame in group["crucial_frames"])
        for response in group["responses"]:
            for token, weight in zip(response["tokens"], response["weights"] or []):
                weights[token in data.TOY_COLOURS].append(weight)
    return figures | {"W, colour": np.mean(weights[True] or [1.0]),
                      "W, rest": np.mean(weights[False] or [1.0]),
                      "true frame crucial": np.mean(found)}


def study_table(figures: dict[str, dict]) -> list[dict]:
    """Rows for {arm: {figure: (seeds, runs)}}, with paired differences to the first arm, or to the
    mean of it and its ":again".

    The difference of ":again" itself to the first arm is the null, which shows what chance does.
    """
    first, *_ = figures
    null = (first, f"{first}:again")
    bases, rows = [figures[arm] for arm in null if arm in figures], []
    for arm, values in figures.items():
        row = {"arm": arm} | {name: with_interval(x) for name, x in values.items()}
        of_arm = bases[:1] if arm in null else bases
        for name in ("training", "accuracy, after"):
            difference = values[name] - np.mean([base[name] for base in of_arm], axis=0)
            row[f"{name} - {first}"] = with_interval(difference, "+")
        rows.append(row)
    return rows


def study(rest, arms=ARMS, seeds: positive = 10, first_seed: int = 0,
          rollout_seeds: positive = 3, snr: positive = None, processes: positive = 2,
          output="runs/study"):
    """The algorithms on the built-in task, or on --data; all arms of a seed start from one model.

    They see the same prompts and, but for "again", the same random numbers. Differences are to the
    first arm. With --snr nothing is trained: see signal_to_noise.

    arms: ALGORITHM[:OPTION=VALUE][:again|shuffled|...],...
    seeds: how many models
    first_seed: the first
    rollout_seeds: runs from each model
    snr: train nothing; signal to noise over so many groups
    processes: runs at a time, a core each
    output: folder; runs that have finished there stay
    """
    if snr == 1:
        raise RunError("--snr 1: give a whole number above 1")
    shape, runs = (seeds, rollout_seeds), {}
    for arm in arms.split(","):
        runs[arm] = [arm_settings(arm, first_seed + seed, number, output, rest)
                     for seed, number in np.ndindex(shape)]
    rounds = list(zip(*runs.values()))      # all arms of a model's first run, of its second, ...
    models = rounds[::rollout_seeds]
    with ProcessPoolExecutor(processes, get_context("forkserver"), start_worker) as pool:
        for make in (appo.make_built_in_data, appo.make_built_in_model):
            list(pool.map(make, [s for (s, _), *_ in models]))
        if snr:
            return print_snr(list(runs), list(pool.map(snr_figures, models, [snr] * seeds)))
        jobs = sum(rounds, ())
        # after an error it starts no further arm
        list(tqdm(pool.map(train_arm, *zip(*jobs)), "runs", len(jobs)))
    any_settings, _ = models[0][0]      # all runs are on the same data
    frames = {sample.id: sample.crucial_frame for sample in data.load_samples(any_settings.data)}
    figures, drawn = {}, []
    for arm, of_arm in runs.items():
        columns = [run_figures(s, frames) for s, _ in of_arm]
        figures[arm] = {name: np.reshape([column[name] for column in columns], shape)
                        for name in columns[0]}
        if arm in FIGURE_ARMS:
            lines = [read_metrics(s.output)["accuracy"] for s, _ in of_arm]
            of_models = np.reshape(lines, (*shape, -1)).mean(1)                # (seeds, steps)
            drawn.append((arm, [{"accuracy": line} for line in of_models]))
    print(f"{seeds} seeds from {first_seed}, {rollout_seeds} runs of each; mean (95% interval, "
          "bootstrap over seeds and runs); accuracy is that of sampled responses")
    print_table(study_table(figures))
    write_json(f"{output}/study.json", {
        "options": rest, "seeds": [first_seed + n for n in range(seeds)], "arms": figures})
    if drawn:
        draw_curves(drawn, 10, f"{output}/study.png", ["accuracy"])
    print(f"every figure: {output}/study.json")


def signal_to_noise(total: Tensor, squares: Tensor, n: int) -> Tensor:
    """|mean gradient|^2 / sum of the parameters' variances, over n groups, for each arm.

    total, squares (arms, K): the sums of the groups' gradients g_i and of g_i^2. The squared length
    of the mean is estimated without bias by (|sum g_i|^2 - sum |g_i|^2) / (n (n - 1)); the
    variances sum up to the mean of |g_i|^2 minus that.
    """
    signal = (total.square().sum(1) - squares.sum(1)) / (n * (n - 1))
    return signal / (squares.sum(1) / n - signal)


def group_gradients(run: appo.Run, group: appo.Group, arms: list[tuple]) -> Tensor:
    """The gradient of a group's loss in each arm, (arms, K), at the start of training."""
    rollout = group.rollout
    log_probs, logits = run.policy(rollout.encoded, rollout.response_ids, rollout.response_mask,
                                   keep_logits=True)
    appo.add_baseline_log_probs(run, group)
    gradients = []
    for s, weigh in arms:
        of_arm = replace(run, settings=s, weigh=weigh)
        appo.score_group(of_arm, group)                                  # with its crucial frames
        appo.fix_constants(of_arm, group, log_probs, logits)
        loss, _ = appo.group_loss(of_arm, group, log_probs)
        parts = torch.autograd.grad(loss, list(run.policy.parameters()), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(gradients)


def snr_figures(arms: list[tuple], count: int) -> Tensor:
    """signal_to_noise of each arm, (arms, 2): of the gradients, and after Adam's scaling, which
    divides each parameter's gradients by the root of their mean square."""
    # alpha and gamma above 0: attention is read and videos are masked, for the arms that need it
    s = replace(arms[0][0], alpha=1.0, gamma=1.0)
    model, tokenizer = load_model(s.model)
    policy = model_utils.Policy(model, s.temperature)
    run = appo.Run(s, model, tokenizer, policy, reference=policy)
    total, squares, n = 0.0, 0.0, 0
    groups = sampled_groups(run, appo.load_samples(s, s.data))
    with_gradient = (group for group in groups if group.advantages.any())
    for group in itertools.islice(with_gradient, count):
        gradients = group_gradients(run, group, arms)
        total, squares, n = total + gradients, squares + gradients.square(), n + 1
    if n < count:
        raise RunError(f"{s.data}: only {n} of its groups have a gradient; lower --snr")
    scale = (squares / n).sqrt().clamp(min=1e-12)
    return torch.stack([signal_to_noise(total, squares, n),
                        signal_to_noise(total / scale, squares / scale.square(), n)], 1)


def print_snr(arms: list[str], figures: list[Tensor]) -> None:
    """The ratio to the first arm; median over the seeds (low to high)."""
    ratios = torch.stack([of_seed / of_seed[:1] for of_seed in figures], 2)    # (arms, 2, seeds)
    print_table([{f"signal to noise / {arms[0]}": arm, "gradient": with_range(gradient),
                  "after Adam's scaling": with_range(scaled)}
                 for arm, (gradient, scaled) in zip(arms, ratios.tolist())])


# ------------------------------------------------------------------------------------- throughput

PHASES = ("embed", "rollout", "score", "weights", "update")
PLAIN = "plain way"


def random_model(folder: str | None):
    """(model, tokenizer) with random weights: of a folder's configuration, or 12 layers, 512 wide.
    """
    device = process_device()
    if folder is None:
        small, tokenizer = model_utils.tiny_model([f"w{i}" for i in range(32_760)])
        config = small.config
        config.text_config.update(dict(
            hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=1408,
            layer_types=["full_attention"] * 12, initializer_range=0.02,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12])))
        config.vision_config.update(dict(
            depth=8, hidden_size=256, num_heads=4, intermediate_size=704, out_hidden_size=512,
            fullatt_block_indexes=[3, 7]))
    else:
        with usable(folder):
            config = transformers.AutoConfig.from_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if config.model_type != "qwen2_5_vl":
        raise RunError(f"{folder}: of type {config.model_type}; give a folder of type qwen2_5_vl")
    torch.manual_seed(0)
    with device:
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=model_utils.compute_type(device))
    return model_utils.prepare_model(model.eval().requires_grad_(False)), tokenizer


def noise_prompts(tokenizer, prompts: int, sampled_frames: int) -> dict[int, data.Prompt]:
    """Questions about one video of noise, with 64 visual tokens per frame."""
    sample = data.Sample("", "what happens ?", ["one", "two", "three", "four"], "A", "choice")
    F = math.ceil(sampled_frames / 2)
    patches = torch.randn(F * 256, 1176, generator=torch.Generator().manual_seed(0))
    visual = data.Visual(patches, [(F, 16, 16)], [], [2.0], 2.0 * F, sampled_frames)
    return dict.fromkeys(range(prompts), data.build_prompt(sample, visual, tokenizer))


def plain_step(run: appo.Run, group: appo.Group, scale: float = 1.0):
    """The plain way of APPO's work on a group, with ordinary transformers calls only.

    Usual code repeats prompt and video G times, decodes by `generate` in eager attention, keeps all
    attention weights, and trains on G whole sequences. To give the numbers of our path, the
    responses of the group are forced, and the positions are ours: transformers' own restart too
    early after a video. Kinder than usual code: SDPA in the vision tower and in the update, logits
    of the responses only. Adds the gradient of scale * loss to run.model.
    Returns (log_probs (G, R), frame_attention (G, R, F)).
    """
    s, model, prompt = run.settings, run.model, group.rollout.encoded
    ids, mask = group.rollout.response_ids, group.rollout.response_mask                  # (G, R)
    (G, R), P, device = ids.shape, len(prompt.input_ids), model.device
    prompt_ids = prompt.input_ids.expand(G, P)
    sequences = torch.cat([prompt_ids, ids], 1)                                      # (G, P + R)
    after = prompt.next_position + torch.arange(R, device=device).expand(3, R)
    positions = torch.cat([prompt.positions, after], 1)[:, None].expand(3, G, P + R)
    video = {"pixel_values_videos": group.prompt.patches.to(device, model.dtype).repeat(G, 1),
             "video_grid_thw": torch.tensor(group.prompt.video_grids * G, device=device)}
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    output = model.generate(
        input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), **video,
        position_ids=positions[:, :, :P], max_new_tokens=R, do_sample=False,
        output_attentions=True, return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda row, before: [sequences[row, len(before)].item()])
    frame_attention = model_utils.pool_attention(output.attentions, prompt.frame_of_token,
                                                 s.attention_layers) * mask[:, :, None]
    del output
    run.lap("rollout")
    model.set_attn_implementation("sdpa")
    model.requires_grad_(True).train()               # it recomputes activations in this mode only
    model.model.visual.requires_grad_(False)
    logits = model(input_ids=sequences, position_ids=positions, **video, use_cache=False,
                   logits_to_keep=R + 1).logits[:, :-1]                                  # (G, R, V)
    excluded = model_utils.excluded_token_ids(model)
    logits = model_utils.sampling_logits(logits, excluded, s.temperature)
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, :, None])[:, :, 0].where(mask, 0.0)
    run.lap("update")
    weights = appo.perception_token_weights(frame_attention, logits.detach(), mask, group.crucial,
                                            k3=s.k3, alpha=s.alpha)
    run.lap("weights")
    # In the first update on a batch the ratio is 1, and the loss has the gradient of this.
    loss = -appo.masked_mean(log_probs * weights * group.advantages[:, None], mask)
    (scale * loss).backward()
    model.eval().requires_grad_(False).set_attn_implementation("group_attention")
    run.lap("update")
    return log_probs.detach(), frame_attention


def plain_training_step(run: appo.Run, groups: list[appo.Group]) -> float:
    """A step in the plain way, up to the gradient: AdamW's moments would need memory.

    Returns the largest difference between its numbers and those of our rollout.
    """
    run.seconds.clear()
    run.last_lap, differences = time.perf_counter(), []
    for group in groups:
        log_probs, frame_attention = plain_step(run, group, 1 / len(groups))
        differences += [(log_probs - group.rollout.log_probs).abs().max(),
                        (frame_attention - group.rollout.frame_attention).abs().max()]
    run.model.zero_grad()
    return torch.stack(differences).max().item()        # nan, if one is nan


def measure(model: str | None, settings: dict[str, appo.Settings], frames: int, rounds: int):
    """{column: {figure: [its value in each round]}}, after a round to warm up.

    The columns take turns within a round, so background load affects all of them equally. They
    share model, policy and optimizer: at learning rate 0 a step does all its work and changes no
    weight, so all start from the same.
    """
    model, tokenizer = random_model(model)
    # responses end by a token that is never sampled, so none ends
    model.generation_config.eos_token_id = model.config.vision_start_token_id
    s = max(settings.values(), key=lambda s: s.kl_coef)     # with a reference if a column needs one
    if s.gradient_checkpointing:
        model_utils.recompute_activations(model.model.language_model)
    # nobody answers noise correctly, so every other response counts as correct
    outcomes = itertools.cycle([(1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
    set_up = appo.Run if [*settings] == [PLAIN] else appo.set_up    # the plain way needs no policy
    shared = set_up(s, model, tokenizer, reward=lambda *_: next(outcomes))
    batches = itertools.repeat((noise_prompts(tokenizer, s.prompts_per_step, frames), []))
    runs, figures = {}, {column: defaultdict(list) for column in settings}
    for column, s in settings.items():
        reference = shared.reference if s.kl_coef else None
        runs[column] = replace(shared, settings=s, reference=reference)
        if column == PLAIN:
            groups, _ = appo.collect_groups(runs[column], batches)
    for number in tqdm(range(1 + rounds), f"{s.max_new_tokens} tokens"):
        for column, run in runs.items():
            if column == PLAIN:
                figures[column]["difference"].append(plain_training_step(run, groups))
            else:
                appo.training_step(run, batches)
            if number == 0:
                continue
            seconds = {phase: run.seconds[phase] for phase in PHASES}
            seconds["step"] = sum(seconds.values())
            for name, value in seconds.items():
                figures[column][name].append(value)
    return figures


def peak_memory(*arguments) -> float:
    """GB that a column takes: on a GPU the most that torch held. On a CPU the most that the process
    held, Python and torch included, which only Linux tells: `resource` would count what its parent
    held."""
    measure(*arguments, rounds=0)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    kilobytes = re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]
    return int(kilobytes) * 1024 / 1e9


def with_range(values) -> str:
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def throughput(model=None, algorithms="dapo,appo", against_plain: bool = False,
               gradient_checkpointing: bool = False, cuda_graph: bool = False,
               frames: positive = 30, group: positive = 8, new_tokens: positives = (48,),
               prompts: positive = 1, repetitions: positive = 3, output=None):
    """Tab. F: training steps on noise, with responses of fixed length.

    Figures are medians over the rounds (low to high), and ratios are taken within a round. Peak
    memory is that of a process of its own.

    model: whose configuration to take, with random weights; default: 12 layers, 512 wide
    algorithms: rows of the table; speeds are relative to the first
    against_plain: add the plain way
    gradient_checkpointing: recompute activations
    cuda_graph: replay decoding on a GPU as a CUDA graph
    frames: sampled frames of a video
    group: G
    new_tokens: lengths of responses, 48,512
    prompts: groups per step
    repetitions: rounds after the warm-up
    output: also write every figure to this .json
    """
    names = algorithms.split(",")
    for name in names:
        if name not in appo.PRESETS:
            raise RunError(f"--algorithms {name}: choose among {', '.join(appo.PRESETS)}")
    if against_plain:
        names.append(PLAIN)
    device = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    result = {"device": device, "torch": torch.__version__}
    print(f"{result}; the plain way's rollout includes embed, and it has no optimizer")
    # A process of its own for each measurement, so that the memory of one is not counted in others.
    with ProcessPoolExecutor(1, get_context("forkserver"), max_tasks_per_child=1) as pool:
        for length in new_tokens:
            settings = {}
            for name in names:
                settings[name] = appo.Settings.of(
                    "appo" if name == PLAIN else name, prompts_per_step=prompts, group_size=group,
                    max_new_tokens=length, learning_rate=0.0, cuda_graph=cuda_graph,
                    gradient_checkpointing=gradient_checkpointing)
            steps = pool.submit(measure, model, settings, frames, repetitions).result()
            for name, s in settings.items():
                gigabytes = pool.submit(peak_memory, model, {name: s}, frames).result()
                steps[name]["GB"] = [gigabytes]
            result[f"{length} tokens"] = steps
            if output:
                write_json(output, result)
            print_throughput(f"{length} tokens", steps)
    print("paper: appo / dapo 0.81 (3B, 30 sampled frames), 0.93 (7B, 16 sampled frames)")


def print_throughput(title: str, steps: dict[str, dict]) -> None:
    """A row for each column of figures, and its speed relative to the first."""
    first, *_ = steps
    table = []
    for column, figures in steps.items():
        speeds = np.divide(steps[first]["step"], figures["step"])
        row = {title: column, "step, seconds": with_range(figures["step"]),
               f"speed / {first}": with_range(speeds)}
        table.append(row | {name: np.median(figures[name]) for name in (*PHASES, "GB")})
    print_table(table)
    if PLAIN in steps:
        difference = np.max(steps[PLAIN]["difference"])
        rounding = 1 if torch.cuda.is_available() else 1e-3
        print(f"largest difference between the plain way and ours: {difference:.1e}")
        if not difference < rounding:       # or nan
            raise RunError(f"this is more than rounding, which stays below {rounding:.0e}")


# ------------------------------------------------------------------------------- the command line

def add_command(commands, function) -> None:
    """Each parameter in the docstring's list is an option, and without default an argument. Its
    annotation says how it is read."""
    about, *table = re.split(r"^    (\w+): ", function.__doc__, flags=re.MULTILINE)
    command = commands.add_parser(function.__name__, description=about, allow_abbrev=False)
    command.set_defaults(function=function)
    readers = {bool: {"action": "store_true"}, list: {"nargs": "+"}}
    for name, help in zip(table[::2], table[1::2]):
        kind = function.__annotations__.get(name)
        reader = readers.get(kind, {"type": kind})
        default = inspect.signature(function).parameters[name].default
        flag = name if default is inspect.Parameter.empty else f"--{name}"
        command.add_argument(flag, default=default, help=help, **reader)


def main(arguments: list[str] | None = None) -> None:
    parser = appo.Parser(prog="evaluate.py", description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (score, compare, attention, curves, focus, decouple, study, throughput):
        add_command(commands, function)
    options, rest = parser.parse_known_args(arguments)
    options = vars(options)
    function = options.pop("function")
    transformers.utils.logging.disable_progress_bar()          # one bar at a time
    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RunError("runs in one process; start it by python, not by torchrun")
        if "rest" in inspect.signature(function).parameters:
            options["rest"] = rest
        elif rest:
            raise RunError(f"unrecognized arguments: {' '.join(rest)}")
        if options.get("output"):                   # not only after hours of work
            Path(options["output"]).parent.mkdir(parents=True, exist_ok=True)
        function(**options)
    except (RunError, data.DataError, data.VideoError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
