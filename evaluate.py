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
import io
import itertools
import json
import math
import os
import re
import shutil
import textwrap
import threading
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import appo
import data
import model_utils
from model_utils import RunError, explained, printable

# ------------------------------------------------------------------------------ greedy responses

# supplement, Tab. B
DECODING = dict(temperature=0.1, top_p=0.001, top_k=1, repetition_penalty=1.05)


def usable(name: str):
    return explained(f"{name}: no usable model; give a model folder")


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
    return s, samples


def read_prompts(samples: list[data.Sample], tokenizer, s: appo.Settings):
    """Yields (prompts by number of the sample, records of skipped ones), `rollout_groups` each."""
    batches = list(data.in_batches(dict(enumerate(samples)), s.rollout_groups))
    with appo.open_reader(s) as reader:
        yield from tqdm(data.read_prompts(reader, batches, tokenizer, s.max_prompt_tokens),
                        total=len(batches))


def evaluation_decoding(encoded: list[model_utils.EncodedPrompt], vocabulary: int,
                        penalty: float = DECODING["repetition_penalty"]) -> Callable:
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
    """{number: greedy response} to prompts by number, by evaluation decoding."""
    if not prompts:
        return {}
    encoded = model_utils.encode_prompts(model, list(prompts.values()))
    choose = evaluation_decoding(encoded, model.config.text_config.vocab_size)
    uniforms = torch.zeros(len(prompts), 1, s.max_new_tokens)   # `choose` needs no random numbers
    rollouts = model_utils.rollout(model, encoded, uniforms, attention_layers=0, choose=choose,
                                   cuda_graph=s.cuda_graph)
    responses = {}
    for number, rollout in zip(prompts, rollouts):
        if not rollout.log_probs.isfinite().all():
            raise RunError(f"{s.model}: its logits are not finite; its weights are damaged")
        ids = rollout.response_ids[rollout.response_mask]
        responses[number] = tokenizer.decode(ids, skip_special_tokens=True)
    return responses


# ------------------------------------------------------------------------------- benchmark scores

COLUMNS = {"accuracy": "accuracy (greedy)", "format": "format", "iou": "mIoU", "iop": "mIoP",
           "acc_gqa": "Acc@GQA"}
# What responses depend on; on the seed only because it makes the built-in model. A stopped run
# continues only if these are unchanged.
FIXED = ("model", "data", "fps", "max_frames", "min_pixels", "max_pixels", "max_new_tokens",
         "max_prompt_tokens", "seed")


def means(records: list[dict]) -> dict:
    """{n, and the mean of every score over the records that have it}."""
    row = {"n": len(records)}
    for name in COLUMNS:
        values = [record[name] for record in records if name in record]
        if values:
            row[name] = float(np.mean(values))
    return row


def means_by_group(records: list[dict]) -> dict[str, dict]:
    groups = defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    return {group: means(groups[group]) for group in sorted(groups)}


def mean_over_tasks(table: dict[str, dict]) -> dict:
    """VSI-Bench's overall number: the mean over the tasks, after the three levels of
    object_rel_direction are averaged to a single task.

    Example: means 0.2, 0.4, 0.9 of the three levels, 0.7 of another task -> (0.5 + 0.7) / 2 = 0.6.
    """
    tasks = [row | {"group": re.sub("^(object_rel_direction)_.*", r"\1", group)}
             for group, row in table.items()]
    return means(list(means_by_group(tasks).values()))


def print_table(rows: list[list]) -> None:
    """Columns side by side; floats with three decimals."""
    cells = []
    for row in rows:
        cells.append([f"{x:.3f}" if isinstance(x, float) else printable(str(x)) for x in row])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print(*map(str.ljust, row, widths), sep="  ")


def open_scores(output: Path, settings: dict) -> list[dict]:
    """Prepare score's folder; returns the records that a stopped run has written there. Samples
    that it could not read are tried again."""
    output.mkdir(parents=True, exist_ok=True)
    summary, responses = output / "summary.json", output / "responses.jsonl"
    # Responses without a summary have unknown settings, and are refused below.
    earlier = {} if responses.exists() else settings
    with explained(f"{output}: cannot be continued; give another --output"):
        if summary.exists():
            earlier = json.loads(summary.read_text())["settings"]
        records = [record for record in model_utils.read_log(responses) if "skipped" not in record]
    for name in settings:
        if earlier.get(name) != settings[name]:
            raise RunError(f"{output}: holds responses with other {name}; give another --output")
    data.write_whole(summary, json.dumps({"settings": settings}, indent=1).encode())
    lines = [json.dumps(record) + "\n" for record in records]
    data.write_whole(responses, "".join(lines).encode())
    return records


def score(options) -> None:
    """Benchmark scores of greedy responses, by appo.py's options.

    The options of the video must be those of the training: above all --max_frames, then --fps,
    --min_pixels and --max_pixels. Every response is written as it comes; the same command
    continues a run that was stopped.
    """
    s, samples = read_task(options.rest, options.benchmark)
    model, tokenizer = load_model(s.model)
    questions = json.dumps([(x.id, x.question, x.options, x.answer) for x in samples])
    # A model that is trained again may lie in the same folder.
    sums = [weight.view(torch.int16).sum(dtype=torch.int64).item() for weight in model.parameters()]
    settings = {"benchmark": options.benchmark, "decoding": DECODING,
                "questions": zlib.crc32(questions.encode()),
                "weights": zlib.crc32(repr(sums).encode())}
    settings |= {name: getattr(s, name) for name in FIXED}
    output = Path(options.output)
    records = open_scores(output, settings)
    done = {record["id"] for record in records}
    to_do = [sample for sample in samples if sample.id not in done]
    with open(output / "responses.jsonl", "a") as file:
        for prompts, skipped in read_prompts(to_do, tokenizer, s):
            new = [{"id": record["id"], "skipped": record["reason"]} for record in skipped]
            started = time.perf_counter()
            responses = respond(model, tokenizer, prompts, s)
            seconds = time.perf_counter() - started
            for number, response in responses.items():
                sample = prompts[number].sample
                record = {"id": sample.id, "group": sample.group, "question": sample.question,
                          "answer": sample.answer, "response": response,
                          "prompt": data.prompt_text(sample, prompts[number]),
                          "seconds": round(seconds / len(responses), 4)}
                new.append(record | data.score_response(response, sample))
            for record in new:
                print(json.dumps(record), file=file, flush=True)
            records += new
    over_tasks = all(sample.overall == "tasks" for sample in samples)
    report_scores(output, settings, records, over_tasks)


def report_scores(output: Path, settings: dict, records: list[dict], over_tasks: bool) -> None:
    """Write summary.json and print the table."""
    scored = [record for record in records if "skipped" not in record]
    skipped = [record for record in records if "skipped" in record]
    if not scored:
        raise RunError(f"no sample could be read, the first: {skipped[0]['skipped']}")
    table = means_by_group(scored)
    overall = mean_over_tasks(table) if over_tasks else means(scored)
    table["all"] = overall | {"n": len(scored)}
    summary = {"settings": settings, "results": table, "skipped": skipped,
               "overall": "mean over tasks" if over_tasks else "mean over questions",
               "prompt": scored[0]["prompt"], "torch": torch.__version__,
               "seconds": sum(record["seconds"] for record in scored)}
    data.write_whole(output / "summary.json", json.dumps(summary, indent=1).encode())
    names = ["n", *(name for name in COLUMNS if name in overall)]
    rows = [["group", *(COLUMNS.get(name, name) for name in names)]]
    for group, row in table.items():
        rows.append([group or "-", *(row.get(name, "") for name in names)])
    print_table(rows)
    print(f"skipped {len(skipped)} of {len(records)}")
    for record in skipped[:10]:
        print(printable(f"  {record['id']}: {record['skipped']}"))
    print(f"responses, settings and results: {output}")


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of paired differences (n,): percentiles of resampled means."""
    rng, n = np.random.default_rng(0), len(differences)
    resampled = [differences[rng.integers(n, size=n)].mean() for _ in range(10_000)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def read_accuracy(folder: str) -> dict[tuple, float]:
    """{(id, question): accuracy} of the responses that `score` has written."""
    path = Path(folder) / "responses.jsonl"
    if not path.is_file():
        raise RunError(f"{path}: no such file; give a folder written by `evaluate.py score`")
    with explained(f"{path}: damaged; score again"):
        return {(record["id"], record["question"]): record["accuracy"]
                for record in model_utils.read_log(path) if "accuracy" in record}


def compare(options) -> None:
    """Greedy accuracy of B minus that of A, over the questions that both have answered."""
    of_first, of_second = read_accuracy(options.first), read_accuracy(options.second)
    common = [key for key in of_first if key in of_second]
    if not common:
        raise RunError("the folders have no question in common; score the same --data")
    a = np.array([of_first[key] for key in common])
    b = np.array([of_second[key] for key in common])
    low, high = bootstrap_interval(b - a)
    print(f"{COLUMNS['accuracy']}: A {a.mean():.3f}, B {b.mean():.3f}")
    print(f"difference {(b - a).mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f} (paired "
          f"bootstrap over {len(common)} common questions)")


# ----------------------------------------------------------------------------------- attention maps

def save_figure(figure, output: str) -> None:
    figure.savefig(output, dpi=120)
    print(f"drawn: {output}")


def scored_groups(run: appo.Run, prompts: dict[int, data.Prompt]) -> list[appo.Group]:
    """Groups of G responses by the training's own rollout, scored, with crucial frames."""
    run = replace(run, settings=replace(run.settings, alpha=1.0))   # at 0 attention is not read
    groups = appo.sample_groups(run, prompts)
    for group in groups:
        appo.score_group(run, group)
    return groups


def attention(options) -> None:
    """What each token of a sampled response attends to, and the crucial frames of its group."""
    s, samples = read_task(options.rest)
    with_video = [sample for sample in samples if sample.video]
    # an id is "test.json:3"
    matching = [sample for sample in with_video if f":{sample.id}".endswith(f":{options.sample}")]
    if not matching:
        raise RunError(f"--sample {options.sample}: {s.data} has no such record with a video; "
                       "count from 0")
    sample, panels = matching[0], []
    for name in [s.model, *options.model2]:
        model, tokenizer = load_model(name)
        with appo.open_reader(s) as reader:
            prompt = data.build_prompt(sample, reader.submit(sample).result(), tokenizer)
        group, = scored_groups(appo.Run(s, model, tokenizer), {0: prompt})
        shown = int(group.accuracy.argmax())                # the first of the best responses
        real = group.rollout.response_mask[shown]
        ids = group.rollout.response_ids[shown, real].tolist()
        words = [printable(tokenizer.decode([token])) for token in ids]
        question = printable(textwrap.shorten(sample.question, 90))
        title = (f"{name}\n{question}\nanswer {sample.answer}; accuracy (sampled): this response "
                 f"{group.accuracy[shown]:.2f}, its group {group.accuracy.mean():.2f}")
        values = group.rollout.frame_attention[shown, real].cpu().numpy()              # (R, F)
        panels.append((title, words, values, group))
    draw_attention(panels, options.output)


def draw_attention(panels: list[tuple], output: str) -> None:
    """Figs. A, C and F. Each panel is (title, words, attention (R, F), group): a row for each token
    and a column for each frame."""
    from matplotlib.figure import Figure
    prompt = panels[0][-1].prompt
    F, R = prompt.num_frames, max(len(words) for _, words, *_ in panels)
    # the first of the two sampled frames that the vision tower merges stands for both
    patches = prompt.patches[:math.prod(prompt.video_grids[0])]     # those of a picture come after
    frames = data.patches_to_frames(patches, prompt.video_grids[0])[::2]           # (F, 3, h, w)
    strip = frames.permute(2, 0, 3, 1).flatten(1, 2).numpy()                       # (h, F * w, 3)
    width = max(4.5, 0.55 * F)                                                     # inches
    heights = [width * strip.shape[0] / strip.shape[1], 0.17 * R + 0.4]
    figure = Figure((len(panels) * (width + 1), sum(heights) + 1), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, height_ratios=heights)
    for (title, words, values, group), (above, below) in zip(panels, axes.T):
        above.imshow(strip, extent=(-0.5, F - 0.5, 0, 1), aspect="auto")
        above.axis("off")
        above.set_title(title, fontsize=8, parse_math=False)
        image = below.imshow(values, aspect="auto", cmap="Blues", vmin=0)
        for f in group.crucial.nonzero().flatten().tolist():
            for axis in (above, below):
                axis.axvspan(f - 0.48, f + 0.48, fill=False, edgecolor="tab:red", linewidth=2)
        below.set_yticks(range(len(words)), words, fontsize=7, parse_math=False)
        below.set_xlabel(f"frame, {group.prompt.seconds_per_grid[0]:.3g} s each; red: crucial")
        figure.colorbar(image, ax=below)
    save_figure(figure, output)


# ------------------------------------------------------------------------------ curves of training

CURVES = {"accuracy": "accuracy (sampled)", "reward": "reward", "entropy": "entropy",
          "grad_norm": "gradient norm", "response_length": "response length"}
FREE = {"seed", "rollout_seed", "output", "toy_folder", "resume"}    # may differ among seeds


def read_run(folder: Path) -> tuple[dict, dict]:
    """(settings, {metric: (steps,)}) of a run folder; nan at steps without the metric."""
    with explained(f"{folder}: no run of appo.py; give run folders"):
        settings = json.loads((folder / "config.json").read_text())["settings"]
        records = model_utils.read_log(folder / "metrics.jsonl")
    return settings, {name: np.array([record.get(name, np.nan) for record in records])
                      for name in CURVES}


def short_name(value) -> str:
    """A setting's short form: the last part of a path; for a checkpoint, its run's name."""
    paths = [Path(path) for path in str(value).split(",")]
    return ",".join(path.parent.name if path.name == "checkpoint" else path.name for path in paths)


def label_runs(runs: list[dict]) -> list[str]:
    """A label for each run, from its settings; seeds of the same run share a label.

    Two runs count as seeds of one if their settings agree, except for FREE and the folders of
    files. A label has the algorithm, and what differs among the runs and is not its default.
    Example: appo, appo with k2 = 5 and dapo -> "appo", "appo, k2 5", "dapo".
    """
    labels = [run["algorithm"] for run in runs]
    for name in sorted(set().union(*runs) - FREE - {"algorithm"}):
        values = [short_name(run.get(name)) for run in runs]
        if len(set(values)) == 1:
            continue
        for i, run in enumerate(runs):
            default = getattr(appo.Settings.of(run["algorithm"]), name, None)
            if run.get(name) != default:
                labels[i] += f", {name} {values[i]}"
    return labels


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` steps, fewer at the start; of those that have the metric."""
    known = ~np.isnan(values)
    sums, counts = (np.convolve(x, np.ones(window))[:len(values)]
                    for x in (np.where(known, values, 0.0), known))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def curves(options) -> None:
    """Metrics over the training steps; of the seeds of a run, mean and standard deviation."""
    # runs/* also holds the built-in task
    runs = [read_run(folder) for folder in map(Path, options.runs)
            if (folder / "metrics.jsonl").exists()]
    labels = label_runs([settings for settings, _ in runs])
    seeds = defaultdict(list)
    for label, (_, metrics) in zip(labels, runs):
        if len(metrics["accuracy"]):
            seeds[label].append(metrics)
    if not seeds:
        raise RunError(f"{', '.join(options.runs)}: no run with a finished step; give run folders "
                       "of appo.py")
    draw_curves(seeds, options.smooth, options.output)


def draw_curves(runs: dict[str, list[dict]], window: int, output: str,
                names=tuple(CURVES), of_mean: bool = False) -> None:
    """runs: {label: [{metric: (steps,)} of each seed]}. The band is one standard deviation of the
    seeds, or of their mean."""
    from matplotlib.figure import Figure
    figure = Figure((max(8, 3 * len(names)), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for label, seeds in runs.items():
            # A run that was stopped counts as far as it went.
            steps = max(len(metrics[name]) for metrics in seeds)
            lines = np.full((len(seeds), steps), np.nan)
            for line, metrics in zip(lines, seeds):
                line[:len(metrics[name])] = smooth(metrics[name], window)
            lines = np.ma.masked_invalid(lines)
            mean, spread = lines.mean(0), lines.std(0) / (lines.count(0) ** 0.5 if of_mean else 1)
            axes.plot(range(1, steps + 1), mean, label=f"{label} (n = {len(seeds)})")
            axes.fill_between(range(1, steps + 1), mean - spread, mean + spread, alpha=0.2)
        axes.set(title=CURVES[name], xlabel="step")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, output)


# ---------------------------------------------------------------------- the paper's observations

# Tab. A: percent of the samples of NExT-GQA's test set
TAB_A = {"0 s": 20.1, "0 to 3 s": 23.5, "3 to 6 s": 17.0, "6 to 9 s": 12.6, "9 to 12 s": 7.8,
         "12 to 15 s": 6.2, "over 15 s": 12.8}


def focus_difference(focused: Tensor, correct: Tensor, seconds: float) -> tuple[str, float]:
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


def focus(options) -> None:
    """Tab. A: differences in focused frames between correct and incorrect sampled responses."""
    s, samples = read_task(options.rest)
    run, bins = appo.Run(s, *load_model(s.model)), Counter()
    for prompts, _ in read_prompts(samples, run.tokenizer, s):
        with_video = {n: prompt for n, prompt in prompts.items() if prompt.num_frames}
        for group in scored_groups(run, with_video):
            correct = (group.accuracy >= s.threshold).cpu()     # as in training         # (G,)
            if correct.all() or not correct.any():
                continue
            focused = appo.focused_frames(group.rollout.frame_attention,
                                          group.rollout.response_mask, k1=s.k1, k2=s.k2)
            name, _ = focus_difference(focused.cpu(), correct, group.prompt.seconds_per_grid[0])
            bins[name] += 1
    total = bins.total()
    if not total:
        raise RunError(f"none of {len(samples)} samples has correct and incorrect responses; "
                       "raise --group_size or take more samples")
    shares = {name: 100 * bins[name] / total for name in TAB_A}
    rows = [[name, bins[name], shares[name], TAB_A[name]] for name in TAB_A]
    print_table([["difference", "samples", "percent", "paper"], *rows])
    print(f"{total} of {len(samples)} samples; the others cannot be read, have no video, or have "
          "only correct or only incorrect responses")
    if options.output:
        Path(options.output).write_text(json.dumps({
            "model": s.model, "data": s.data, "samples": bins, "percent": shares,
            "left_out": len(samples) - total}, indent=1))


DESCRIBE = ("Describe this video in detail, in the order in which things happen: who and what is "
            "seen, what they do, colours, numbers, places, positions and written words.")


def load_text_model(name: str):
    """An ordinary language model with a chat template."""
    device = process_device()
    with usable(name):
        pipeline = transformers.pipeline("text-generation", name, device=device,
                                         dtype=model_utils.compute_type(device))
    if pipeline.tokenizer.chat_template is None:
        raise RunError(f"{name}: its tokenizer has no chat template; take an instruction-tuned "
                       "model")
    return pipeline


def answers(reasoning: str, samples: list[data.Sample], descriptions: dict[int, str],
            max_new_tokens: int):
    """Yields (number of the sample, a text model's greedy answer to the question about a video that
    it knows by description). The model is freed at the end, so that only one is in memory."""
    pipeline = load_text_model(reasoning)
    for n, description in tqdm(descriptions.items(), desc="answer"):
        sample = samples[n]
        # The prompt of grounding asks for times, and needs a video.
        kind = "choice" if sample.kind == "grounding" else sample.kind
        question = f"A video is described as follows.\n{description}\n\n{sample.question}"
        text = data.prompt_text(replace(sample, kind=kind, question=question), visual=None)
        text = text.replace("<|", "< |")        # control tokens stay words, as in data.build_prompt
        output = pipeline([{"role": "user", "content": text}], max_new_tokens=max_new_tokens,
                          do_sample=False, return_full_text=False,
                          repetition_penalty=DECODING["repetition_penalty"])
        yield n, output[0]["generated_text"]


def describe(samples: list[data.Sample], s: appo.Settings) -> dict[int, str]:
    """Descriptions of the videos that can be read, by number of the sample."""
    model, tokenizer = load_model(s.model)
    to_describe = [replace(sample, question=DESCRIBE, options=[], kind="description")
                   for sample in samples]
    descriptions = {}
    for prompts, _ in read_prompts(to_describe, tokenizer, s):
        descriptions |= respond(model, tokenizer, prompts, s)
    return descriptions


def decouple(options) -> None:
    """Is it seeing or thinking that limits the accuracy?

    Greedy accuracy of every pair of a perception model, which describes the video without knowing
    the question, and a reasoning model, which answers from the description.
    """
    perceivers, reasoners = options.perception.split(","), options.reasoning.split(",")
    # All is checked before --output is overwritten, and hours pass.
    tasks = [read_task([*options.rest, "--model", perception]) for perception in perceivers]
    for name in [*perceivers, *reasoners]:
        with usable(name):
            transformers.AutoConfig.from_pretrained(name)
    table = [["perception / reasoning", "samples", *reasoners]]
    with open(options.output, "w") as file:
        for perception, (s, samples) in zip(perceivers, tasks):
            descriptions = describe(samples, s)
            row = [perception, f"{len(descriptions)} of {len(samples)}"]
            for reasoning in reasoners:
                accuracies = []
                for n, response in answers(reasoning, samples, descriptions, s.max_new_tokens):
                    accuracy = data.accuracy_reward(response, samples[n])
                    accuracies.append(accuracy)
                    record = {"id": samples[n].id, "perception": perception,
                              "reasoning": reasoning, "description": descriptions[n],
                              "response": response, "accuracy": accuracy}
                    print(json.dumps(record), file=file, flush=True)
                row.append(np.mean(accuracies or [np.nan]))
            table.append(row)
    print_table(table)


# ------------------------------------------------------------------------------------------ study

# An arm is an algorithm and, after colons, changes: settings of appo.py; "again", other random
# numbers in the rollouts (the null: what chance does); one of CONTROLS, another weighting of
# tokens; and "true_frame", which tells the weighting the frame that shows the answer.
ARMS = ("dapo,dapo:again,grpo,papo_d,appo,appo:strategy=hard,appo:strategy=all,appo:shuffled,"
        "appo:mean_one,appo:oracle")
FIGURE_ARMS = ("dapo", "appo", "appo:shuffled", "appo:oracle")


def shuffled(group: appo.Group, logits: Tensor, s: appo.Settings) -> Tensor:
    """APPO's weights of each response, on its tokens in random order: does the place matter?"""
    weights = appo.weigh_tokens(group, logits, s).clone()                               # (G, R)
    rng = np.random.default_rng((s.seed, group.position))
    for row, real in zip(weights, group.rollout.response_mask):
        order = torch.from_numpy(rng.permutation(int(real.sum()))).to(row.device)
        row[real] = row[real][order]
    return weights


def mean_one(group: appo.Group, logits: Tensor, s: appo.Settings) -> Tensor:
    """APPO's weights over their mean: is it only that weights above 1 make a larger step?"""
    weights = appo.weigh_tokens(group, logits, s)                                       # (G, R)
    return weights / appo.masked_mean(weights, group.rollout.response_mask)


@functools.lru_cache
def answer_frames(path: str) -> dict[str, int | None]:
    """By the sample's id; read once for all runs on the data."""
    return {sample.id: sample.crucial_frame for sample in data.load_samples(path)}


@functools.lru_cache
def colour_ids(model: str) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return tokenizer.convert_tokens_to_ids(list(data.TOY_COLOURS))


def oracle(group: appo.Group, logits: Tensor, s: appo.Settings) -> Tensor:
    """1 + alpha on the tokens that name a colour, for which the crucial frame is looked at."""
    ids = group.rollout.response_ids                                                     # (G, R)
    colours = torch.tensor(colour_ids(s.model), device=ids.device)
    return 1 + s.alpha * torch.isin(ids, colours).float()


def equal(group: appo.Group, logits: Tensor, s: appo.Settings) -> Tensor:
    """1 + alpha on all tokens that a crucial frame picks, without D."""
    attention = group.rollout.frame_attention[:, :, group.crucial].permute(2, 0, 1)  # (C, G, R)
    picked = appo.most_attentive_tokens(attention, group.rollout.response_mask, s.k3)
    return 1 + s.alpha * picked.any(0).float()


def entropy(group: appo.Group, logits: Tensor, s: appo.Settings) -> Tensor:
    """The entropy of a picked token's distribution in place of D: how much responses that share its
    prefix would differ. The largest counts as 1."""
    uncertainty = group.rollout.entropy * (equal(group, logits, s) > 1)                 # (G, R)
    return 1 + s.alpha * uncertainty / uncertainty.max().clamp(min=1e-4)


def true_frame(weigh: Callable, group: appo.Group, logits: Tensor, s: appo.Settings) -> Tensor:
    """A weighting for which the true frame is the only crucial one."""
    frame = group.prompt.sample.crucial_frame
    if frame is None:
        raise RunError(f"{group.prompt.sample.id}: lacks a crucial_frame, which true_frame needs")
    true = torch.zeros_like(group.crucial)
    true[frame] = True
    return weigh(replace(group, crucial=true), logits, s)


CONTROLS = {"shuffled": shuffled, "mean_one": mean_one, "oracle": oracle, "equal": equal,
            "entropy": entropy}


def arm_settings(arm: str, seed: int, number: int, folder: Path,
                 rest: list[str]) -> tuple[appo.Settings, Callable]:
    """(settings, weighting of tokens) of an arm; number: which run of the seed's model; rest: the
    study's options of appo.py."""
    algorithm, *changes = arm.split(":")
    home, weigh, arguments = folder / f"seed-{seed}", appo.weigh_tokens, [*rest]
    if not any(argument.split("=")[0] == "--data" for argument in rest):
        arguments += ["--data", f"{folder}/train.json", "--eval_data", f"{folder}/test.json"]
    rollout_seed = seed + 1000 * number         # with "again" 500 more
    for change in changes:
        name, _, value = change.partition("=")
        if name in CONTROLS:
            weigh = CONTROLS[name]
        elif name == "again":
            rollout_seed += 500
        elif name != "true_frame":
            arguments += [f"--{name}", value]
    if "true_frame" in changes:
        weigh = functools.partial(true_frame, weigh)
    output = home / (re.sub(r"[^\w.]+", "-", arm) + f"-{number}")
    s = appo.parse_settings([
        "--save_every", "0", "--readers", "1", *arguments, "--algorithm", algorithm, "--seed",
        str(seed), "--rollout_seed", str(rollout_seed), "--toy_folder", str(home), "--output",
        str(output)], "evaluate.py")
    if weigh is not appo.weigh_tokens and not s.alpha:
        raise RunError(f"{arm}: at alpha 0 there are no token weights; use the control with appo")
    return s, weigh


def end_with_parent() -> None:
    """In a study's worker: it exits when its parent dies, so that none writes beside the next
    study."""
    def watch() -> None:
        wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_arm(*job) -> None:
    """In a process of its own: train an arm, unless it has finished."""
    s, weigh = arm_settings(*job)
    if (Path(s.output) / "checkpoint").exists():
        return
    shutil.rmtree(s.output, ignore_errors=True)                                # stopped half-way
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):   # one bar is enough
            appo.train(s, weigh=weigh)
    except RunError as error:
        raise RunError(f"{s.output}: {error}") from None


def run_figures(s: appo.Settings) -> dict[str, float]:
    """What the study reports of a run. Accuracy is that of sampled responses."""
    folder = Path(s.output)
    figures = {"training": np.nanmean(read_run(folder)[1]["accuracy"])}
    held_out = model_utils.read_log(folder / "held_out.jsonl") or [{}]
    for name in ("accuracy", "topk"):
        figures[f"{name}, before"] = held_out[0].get(name, np.nan)
        figures[f"{name}, after"] = held_out[-1].get(name, np.nan)
    weights, found = {True: [], False: []}, []
    for group in model_utils.read_log(folder / "samples.jsonl"):
        frame = answer_frames(s.data)[group["id"]]
        found.append(np.nan if frame is None else frame in group["crucial_frames"])
        for response in group["responses"]:
            for token, weight in zip(response["tokens"], response["weights"] or []):
                weights[token in data.TOY_COLOURS].append(weight)
    figures |= {"W, colour": np.mean(weights[True] or [1.0]),
                "W, rest": np.mean(weights[False] or [1.0]), "true frame crucial": np.mean(found)}
    return {name: float(value) for name, value in figures.items()}


def with_interval(values: np.ndarray, sign: str = "") -> str:
    """Mean and 95% interval of values (seeds, runs): bootstrap over seeds, and over the runs of
    each."""
    rng, (S, N) = np.random.default_rng(0), values.shape
    seeds, runs = rng.integers(S, size=(10_000, S, 1)), rng.integers(N, size=(10_000, S, N))
    low, high = np.percentile(values[seeds, runs].mean((1, 2)), [2.5, 97.5])
    return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def study_table(figures: dict[str, dict]) -> list[list[str]]:
    """Rows for {arm: {figure: (seeds, runs)}}, with paired differences to the first arm, or to the
    mean of it and its ":again".

    The difference of ":again" itself to the first arm is the null, which shows what chance does.
    """
    first, *_ = figures
    compared = ["training", "accuracy, after"]
    bases = [figures[arm] for arm in (first, f"{first}:again") if arm in figures]
    rows = [["arm", *figures[first], *(f"{name} - {first}" for name in compared)]]
    for arm, values in figures.items():
        row = [arm, *map(with_interval, values.values())]
        of_arm = bases[:1] if arm in (first, f"{first}:again") else bases
        for name in compared:
            difference = values[name] - np.mean([base[name] for base in of_arm], axis=0)
            row.append(with_interval(difference, "+"))
        rows.append(row)
    return rows


def study(options) -> None:
    """The algorithms on the built-in task, or on --data; all arms of a seed start from one model.

    They see the same prompts and, but for "again", the same random numbers. Differences are to the
    first arm. With --snr nothing is trained: see signal_to_noise.
    """
    folder, arms = Path(options.output), options.arms.split(",")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = list(itertools.product(seeds, range(options.rollout_seeds)))
    jobs = [(arm, *run, folder, options.rest) for run in runs for arm in arms]
    settings = {arm: [arm_settings(arm, *run, folder, options.rest)[0] for run in runs]
                for arm in arms}
    if len({s.output for of_arm in settings.values() for s in of_arm}) < len(jobs):
        raise RunError(f"--arms {options.arms}: two arms have one folder; give each arm once")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "study.json"
    if not config.exists():
        data.write_whole(config, json.dumps({"options": options.rest}).encode())
    if json.loads(config.read_text())["options"] != options.rest:
        raise RunError(f"{folder}: holds a study with other options; give another --output")
    of_seeds = settings[arms[0]][::options.rollout_seeds]           # the first run of each
    if of_seeds[0].data == f"{folder}/train.json":
        data.make_toy_data(folder)
    with ProcessPoolExecutor(options.processes, get_context("spawn"), end_with_parent) as pool:
        list(pool.map(appo.make_built_in_model, of_seeds))
        if options.snr:
            of_seed = functools.partial(snr_figures, arms, folder, options)
            return print_snr(arms, list(pool.map(of_seed, seeds)))
        # after an error it starts no further arm
        list(tqdm(pool.map(train_arm, *zip(*jobs)), "runs", len(jobs)))
    figures, drawn = {}, {}
    for arm, of_arm in settings.items():
        columns = [run_figures(s) for s in of_arm]
        figures[arm] = {name: np.reshape([column[name] for column in columns], (len(seeds), -1))
                        for name in columns[0]}
        if arm in FIGURE_ARMS:
            lines = [read_run(Path(s.output))[1]["accuracy"] for s in of_arm]
            of_models = np.reshape(lines, (len(seeds), options.rollout_seeds, -1)).mean(1)
            drawn[arm] = [{"accuracy": line} for line in of_models]
    print(f"{len(seeds)} seeds from {seeds[0]}, {options.rollout_seeds} runs of each; mean (95% "
          "interval, bootstrap over seeds and runs); accuracy is that of sampled responses")
    print_table(study_table(figures))
    results = {arm: {name: x.tolist() for name, x in figures[arm].items()} for arm in arms}
    results = {"options": options.rest, "seeds": list(seeds), "arms": results}
    data.write_whole(config, json.dumps(results).encode())
    if drawn:
        draw_curves(drawn, 10, f"{folder}/study.png", ["accuracy"], of_mean=True)
    print(f"every figure: {config}")


def signal_to_noise(total: Tensor, squares: Tensor, n: int) -> float:
    """|mean gradient|^2 / sum of the parameters' variances, over n groups.

    total, squares (K,): the sums of the groups' gradients g_i and of g_i^2. The squared length of
    the mean is estimated without bias by (|sum g_i|^2 - sum |g_i|^2) / (n (n - 1)); the variances
    sum up to the mean of |g_i|^2 minus that.
    """
    signal = (total.square().sum() - squares.sum()) / (n * (n - 1))
    return (signal / (squares.sum() / n - signal)).item()


def group_gradients(run: appo.Run, group: appo.Group, arms: list[tuple]) -> Tensor:
    """The gradient of a group's loss in each arm, (arms, K), at the start of training."""
    rollout = group.rollout
    log_probs, logits = run.policy(rollout.encoded, rollout.response_ids, rollout.response_mask,
                                   keep_logits=True)
    group.old_log_probs, gradients = log_probs.detach(), []
    appo.add_baseline_log_probs(run, group)
    for s, weigh in arms:
        of_arm = replace(run, settings=s)
        appo.score_group(of_arm, group)                                  # with its crucial frames
        group.token_weights = weigh(group, logits, s)
        loss, _ = appo.group_loss(of_arm, group, log_probs)
        parts = torch.autograd.grad(loss, list(run.policy.parameters()), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(gradients)


def snr_figures(arms: list[str], folder: Path, options, seed: int) -> Tensor:
    """signal_to_noise of each arm, (arms, 2): of the gradients, and after Adam's scaling, which
    divides each parameter's gradients by the root of their mean square."""
    pairs = [arm_settings(arm, seed, 0, folder, options.rest) for arm in arms]
    # alpha and gamma above 0: attention is read and videos are masked, for the arms that need it
    s = replace(pairs[0][0], alpha=1.0, gamma=1.0)
    model, tokenizer = load_model(s.model)
    policy = model_utils.Policy(model, s.temperature)
    run = appo.Run(s, model, tokenizer, policy, reference=policy)
    total, squares, n = 0.0, 0.0, 0
    for prompts, _ in read_prompts(appo.load_samples(s, s.data), tokenizer, s):
        for group in scored_groups(run, prompts):
            if group.advantages.any() and n < options.snr:
                gradients = group_gradients(run, group, pairs)
                total, squares, n = total + gradients, squares + gradients.square(), n + 1
        if n == options.snr:
            break
    if n < options.snr:
        raise RunError(f"{s.data}: only {n} of its groups have a gradient; lower --snr")
    scale = (squares / n).sqrt().clamp(min=1e-12)
    figures = [(signal_to_noise(a, b, n), signal_to_noise(a / c, b / c.square(), n))
               for a, b, c in zip(total, squares, scale)]
    return torch.tensor(figures)


def print_snr(arms: list[str], figures: list[Tensor]) -> None:
    """The ratio to the first arm; median over the seeds (low to high)."""
    ratios = torch.stack([of_seed / of_seed[:1] for of_seed in figures])       # (seeds, arms, 2)
    rows = [[arm, *map(with_range, ratios[:, i].T.tolist())] for i, arm in enumerate(arms)]
    print_table([[f"signal to noise / {arms[0]}", "gradient", "after Adam's scaling"], *rows])


# ------------------------------------------------------------------------------------- throughput

PHASES = ("embed", "rollout", "score", "weights", "update")
PLAIN = "plain way"


def random_model(folder: str | None):
    """(model, tokenizer) with random weights: of a configuration folder, or 12 layers, 512 wide."""
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


def plain_step(run: appo.Run, group: appo.Group, scale: float = 1.0) -> tuple[Tensor, Tensor]:
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

    def allowed_tokens(row: int, sequence: Tensor) -> list[int]:
        return [sequences[row, len(sequence)].item()]

    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    with torch.no_grad():
        output = model.generate(
            input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), **video,
            position_ids=positions[:, :, :P], max_new_tokens=R, do_sample=False,
            output_attentions=True, return_dict_in_generate=True,
            prefix_allowed_tokens_fn=allowed_tokens)
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
    """A step in the plain way; with SGD, as AdamW's moments need memory.

    Returns the largest difference between its numbers and those of our rollout.
    """
    run.seconds.clear()
    run.last_lap, differences = time.perf_counter(), []
    for group in groups:
        log_probs, frame_attention = plain_step(run, group, 1 / len(groups))
        differences += [(log_probs - group.rollout.log_probs).abs().max().item(),
                        (frame_attention - group.rollout.frame_attention).abs().max().item()]
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.max_grad_norm)
    torch.optim.SGD(run.model.parameters(), lr=0.0).step()
    run.model.zero_grad()
    run.lap("update")
    return float(np.max(differences))       # nan, if one is nan


def measure(options, new_tokens: int, columns: list[str], rounds: int) -> dict[str, dict]:
    """{column: {figure: [its value in each round]}}, after a round to warm up.

    The columns take turns within a round, so background load affects all of them equally. They
    share model, policy and optimizer: at learning rate 0 a step does all its work and changes no
    weight, so all start from the same.
    """
    transformers.utils.logging.disable_progress_bar()
    load = random_model if options.random_weights or not options.model else load_model
    model, tokenizer = load(options.model)
    # responses end by a token that is never sampled, so none ends
    model.generation_config.eos_token_id = model.config.vision_start_token_id
    if options.gradient_checkpointing:
        model_utils.recompute_activations(model.model.language_model)
    settings = {}
    for column in columns:
        settings[column] = appo.Settings.of(
            "appo" if column == PLAIN else column, prompts_per_step=options.prompts,
            group_size=options.group, max_new_tokens=new_tokens, learning_rate=0.0,
            cuda_graph=options.cuda_graph,
            gradient_checkpointing=options.gradient_checkpointing)
    with_reference = max(settings.values(), key=lambda s: s.kl_coef)    # if a column needs one
    # nobody answers noise correctly, so every other response counts as correct
    outcomes = itertools.cycle([(1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
    set_up = appo.Run if columns == [PLAIN] else appo.set_up     # the plain way needs no policy
    shared = set_up(with_reference, model, tokenizer, reward=lambda *_: next(outcomes))
    batches = itertools.repeat((noise_prompts(tokenizer, options.prompts, options.frames), []))
    steps, figures = {}, {column: defaultdict(list) for column in columns}
    for column, s in settings.items():
        run = replace(shared, settings=s, reference=shared.reference if s.kl_coef else None)
        steps[column] = functools.partial(appo.training_step, run, batches)
        if column == PLAIN:
            groups, _ = appo.collect_groups(run, batches)
            steps[column] = functools.partial(plain_training_step, run, groups)
    for number in tqdm(range(1 + rounds), f"{new_tokens} tokens"):
        for column, step in steps.items():
            result = step()
            if number == 0:
                continue
            seconds = {phase: shared.seconds[phase] for phase in PHASES}    # shared by all runs
            seconds["step"] = sum(seconds.values())
            if column == PLAIN:
                seconds["difference"] = result
            for name, value in seconds.items():
                figures[column][name].append(value)
    return figures


def peak_memory(options, new_tokens: int, column: str) -> float:
    """GB that a column takes: on a GPU the most that torch held. On a CPU the most that the process
    held, Python and torch included, which only Linux tells: `resource` would count what its parent
    held."""
    measure(options, new_tokens, [column], rounds=0)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    kilobytes = re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]
    return int(kilobytes) * 1024 / 1e9


def in_new_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def with_range(values) -> str:
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def throughput(options) -> None:
    """Tab. F: training steps on noise, with responses of fixed length.

    Figures are medians over the rounds (low to high), and ratios are taken within a round. Peak
    memory is that of a process of its own.
    """
    columns = options.algorithms.split(",")
    for name in columns:
        if name not in appo.PRESETS:
            raise RunError(f"--algorithms {name}: choose among {', '.join(appo.PRESETS)}")
    columns += [PLAIN] if options.against_plain else []
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": device, "torch": torch.__version__}
    print(f"{result}; the plain way's rollout includes embed, and its optimizer is SGD")
    for new_tokens in options.new_tokens:
        steps = in_new_process(measure, options, new_tokens, columns, options.repetitions)
        for column in columns:
            steps[column]["GB"] = [in_new_process(peak_memory, options, new_tokens, column)]
        result[f"{new_tokens} tokens"] = steps
        if options.output:
            Path(options.output).write_text(json.dumps(result, indent=1))
        print_throughput(f"{new_tokens} tokens", steps, options.prompts)
    print("paper: appo / dapo 0.81 (3B, 30 sampled frames), 0.93 (7B, 16 sampled frames)")


def print_throughput(title: str, steps: dict[str, dict], prompts: int) -> None:
    """A row for each column of figures, and its speed relative to the first."""
    first, *_ = steps
    table = [[title, "step, seconds", f"speed / {first}", "prompts / s", *PHASES, "peak GB"]]
    for column, figures in steps.items():
        speeds = np.divide(steps[first]["step"], figures["step"])
        medians = [np.median(figures[name]) for name in (*PHASES, "GB")]
        table.append([column, with_range(figures["step"]), with_range(speeds),
                      prompts / np.median(figures["step"]), *medians])
    print_table(table)
    if PLAIN in steps:
        difference = np.max(steps[PLAIN]["difference"])
        print(f"largest difference between the plain way and ours: {difference:.1e}")
        tolerance = 1.0 if torch.cuda.is_available() else 1e-3                    # bf16 rounds
        if not difference < tolerance:
            raise RunError("the plain way does not compute the same; its ratios mean nothing")


# ------------------------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    error = appo.Parser.error                           # one line


def positive(text: str, above: int = 0) -> int:
    if not text.isdecimal() or int(text) <= above:
        raise argparse.ArgumentTypeError(f"give a whole number above {above}")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(number) for number in text.split(",")]


def picture(text: str) -> str:
    if not text.endswith((".png", ".pdf")):
        raise argparse.ArgumentTypeError(f"{text}: give a name that ends in .png or .pdf")
    return text


def command_line() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(function: Callable) -> Callable:
        command = commands.add_parser(function.__name__, description=function.__doc__,
                                      allow_abbrev=False)
        command.set_defaults(function=function)

        def option(name: str, help: str, default=None, **more) -> None:
            if default is False:
                more["action"] = "store_true"
            elif isinstance(default, int):
                more.setdefault("type", positive)
            command.add_argument(name, help=help, default=default, **more)

        return option

    option = add(score)
    option("--benchmark", "default: told by the records' fields", choices=list(data.FORMATS))
    option("--output", "folder of responses.jsonl and summary.json", "scores")
    option = add(compare)
    option("first", "folder A of score")
    option("second", "folder B of score")
    option = add(attention)
    option("--model2", "further models, drawn beside --model", [], nargs="+")
    option("--sample", "number or id of the record", "0")
    option("--output", ".png or .pdf", "attention.png", type=picture)
    option = add(curves)
    option("runs", "run folders of appo.py", nargs="+")
    option("--smooth", "steps to average over", 5)
    option("--output", ".png or .pdf", "curves.png", type=picture)
    option = add(focus)
    option("--output", "also write the table to this .json")
    option = add(decouple)
    option("--perception", "video models M,M2", required=True)
    option("--reasoning", "text models T,T2", required=True)
    option("--output", "every description and answer", "decouple.jsonl")
    option = add(study)
    option("--arms", "ALGORITHM[:OPTION=VALUE][:again|shuffled|...],...", ARMS)
    option("--seeds", "how many models", 10)
    option("--first_seed", "the first", 0, type=int)
    option("--rollout_seeds", "runs from each model", 3)
    option("--snr", "train nothing; signal to noise over so many groups",
           type=functools.partial(positive, above=1))
    option("--processes", "runs at a time, a core each", 2)
    option("--output", "folder; runs that have finished there stay", "runs/study")
    option = add(throughput)
    option("--model", "model folder; default: a random model of 12 layers, 512 wide")
    option("--random_weights", "take only --model's configuration", False)
    option("--algorithms", "rows of the table; speeds are relative to the first", "dapo,appo")
    option("--against_plain", "add the plain way", False)
    option("--gradient_checkpointing", "recompute activations", False)
    option("--cuda_graph", "replay decoding on a GPU as a CUDA graph", False)
    option("--frames", "sampled frames of a video", 30)
    option("--group", "G", 8)
    option("--new_tokens", "lengths of responses, 48,512", [48], type=positives)
    option("--prompts", "groups per step", 1)
    option("--repetitions", "rounds after the warm-up", 3)
    option("--output", "also write every figure to this .json")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = command_line()
    options, options.rest = parser.parse_known_args(arguments)
    transformers.utils.logging.disable_progress_bar()          # one bar at a time
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise RunError("runs in one process; start it by python, not by torchrun")
        if options.rest and options.function in (compare, curves, throughput):
            raise RunError(f"unrecognized arguments: {' '.join(options.rest)}")
        if getattr(options, "output", None):        # not only after hours of work
            Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        options.function(options)
    except (RunError, data.DataError, data.VideoError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
