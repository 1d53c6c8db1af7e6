"""What the algorithm needs of Qwen2.5-VL: loading, one visual embedding, grouped rollout with attention readout,
log-probabilities of a packed group, sharding, and the tiny built-in model.

Two copies of the weights are at work. The *rollout model* is an ordinary Hugging Face model in the compute type
(bf16 on a GPU, fp32 on a CPU): it embeds videos, decodes and is what a checkpoint holds. The *policy* is the trainable
fp32 master copy of its language model, sharded over the processes; after each optimizer step the rollout model is
refreshed from it. The vision tower is frozen, so one copy serves both.

Letters in shapes: P prompt tokens, G responses of a prompt (a group), R response tokens, F visual time steps,
V vocabulary entries, H hidden size, N prompts that decode together, B = N * G rows.
"""
import copy
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, DynamicCache, GenerationConfig, Qwen2_5_VLConfig
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import cached_file


class RunError(RuntimeError):
    """A model, setting or folder that cannot be used, or a run that cannot go on: one line that names it and the mend."""


# ------------------------------------------------------------------------------------------------- load and save

def load_model(name: str, device: torch.device):
    """(model, tokenizer) of a Qwen2.5-VL folder or hub name; a model of another type or with holes is a RunError."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise RunError(f"{name}: no such folder; give a folder with config.json, tokenizer and weights, or a hub name")
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "qwen2_5_vl":
            raise OSError(f"it is of type {config.model_type}, and APPO reads the attention of Qwen2.5-VL")
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name, dtype=compute_type(device), attn_implementation="grouped_decoding", output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:  # what transformers raises for absent or broken files
        raise RunError(f"{name}: no usable model ({str(error).splitlines()[0]}); give a hub name or a folder with the "
                         "configuration, tokenizer and weights of a model of type qwen2_5_vl") from error
    if holes := sorted(loaded["missing_keys"]):
        raise RunError(f"{name}: the weights lack {len(holes)} tensors, the first {holes[0]}; get the whole checkpoint")
    if getattr(config, "appo_built_in", False):
        torch.set_num_threads(1)  # for operations this small, threads mostly wait for each other
    model = model.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        multiply_patches(model)
    return model, tokenizer


def multiply_patches(model) -> None:
    """Embed patches by one matrix product. It is a convolution whose kernel covers a whole patch, and some GPUs and
    versions of torch are reported to take thousands of times as long for that in bf16 (transformers issue 45750)."""
    weight = model.model.visual.patch_embed.proj.weight
    model.model.visual.patch_embed.forward = lambda patches: nn.functional.linear(patches, weight.flatten(1))


def compute_type(device: torch.device) -> torch.dtype:
    """In which type models compute; the policy's own weights are fp32 everywhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def save_checkpoint(folder: Path, model, tokenizer, source: str | None, policy=None, optimizer=None, state=None) -> None:
    """Write an ordinary Hugging Face folder, the first process alone; with a policy, all processes together also what a
    run resumes from.

    It is written beside and moved into place when it is whole. The image settings are those of the `source` model.
    """
    partial, main = Path(f"{folder}.partial"), not dist.is_initialized() or dist.get_rank() == 0
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if source is None:
                (partial / "preprocessor_config.json").write_text(json.dumps(TINY_IMAGES, indent=1))
            elif settings := cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False):
                shutil.copyfile(settings, partial / "preprocessor_config.json")
        if policy is not None:
            checkpoints.save(training_state(policy, optimizer), checkpoint_id=partial / "training")
        if main:
            if state is not None:
                (partial / "state.json").write_text(json.dumps(state))
            if Path(folder).exists():
                shutil.rmtree(folder)
            partial.rename(folder)
    except (OSError, SafetensorError, checkpoints.CheckpointException) as error:
        raise RunError(f"{folder}: cannot be written ({' '.join(str(error).split())[:300]}); make room on the disk. "
                         "The last whole checkpoint stands, go on from it with --resume") from error


def training_state(policy, optimizer) -> dict:
    weights, moments = get_state_dict(policy, optimizer)
    return {"policy": weights, "optimizer": moments}


def load_checkpoint(folder: Path, model, policy, optimizer) -> None:
    """Load what `save_checkpoint` wrote, on any number of processes."""
    loaded = training_state(policy, optimizer)
    checkpoints.load(loaded, checkpoint_id=Path(folder) / "training")
    set_state_dict(policy, optimizer, model_state_dict=loaded["policy"], optim_state_dict=loaded["optimizer"])
    refresh(model, policy)


def open_run_folder(output: Path, settings: dict, free: tuple[str, ...]) -> dict:
    """Prepare a run's folder, all processes together. A new run moves an earlier one aside: nothing is lost.

    With settings["resume"] the logs are cut back to the newest whole checkpoint, and its state is returned with its path
    as "checkpoint"; {} if there is none yet. All settings but the `free` ones must be those of the run.
    """
    config, state, main = output / "config.json", {}, dist.get_rank() == 0
    if settings["resume"]:
        if not config.exists():
            raise RunError(f"{output}: no run to resume; leave --resume away or mend --output")
        for name, was in json.loads(config.read_text())["settings"].items():
            if settings.get(name) != was and name not in ("resume", *free):
                raise RunError(f"--{name} is {settings.get(name)} and was {was} in {output}; resume with the same settings")
        whole = sorted(folder for folder in output.glob("step-??????") if (folder / "state.json").exists())
        if whole:
            state = json.loads((whole[-1] / "state.json").read_text()) | {"checkpoint": whole[-1]}
        dist.barrier()
        for log in output.glob("*.jsonl") if main else ():
            lines = [line for line in log.read_text().splitlines(keepends=True)  # the last may be half a line
                     if line.endswith("\n") and json.loads(line)["step"] <= state.get("step", 0)]
            log.with_suffix(".cut").write_text("".join(lines))
            log.with_suffix(".cut").replace(log)
    elif main:
        if config.exists():
            number = next(n for n in range(1, 1 << 20) if not output.with_name(f"{output.name}.{n}").exists())
            output.rename(output.with_name(f"{output.name}.{number}"))
            print(f"the earlier run is now {output}.{number}", file=sys.stderr)
        output.mkdir(parents=True, exist_ok=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "processes": dist.get_world_size()}
        config.write_text(json.dumps({"settings": settings} | versions, indent=1))
    dist.barrier()
    return state


def read_log(log: Path) -> list[dict]:
    """The records of a .jsonl file, none if it is not there."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def end_token_ids(model) -> Tensor:
    """Ids that end a response, from the generation configuration (Qwen: <|im_end|> and <|endoftext|>)."""
    ids = model.generation_config.eos_token_id
    return torch.tensor(ids if isinstance(ids, list) else [ids], device=model.device)


# ------------------------------------------------------------------------------- the prompt: positions and the video

def mrope_positions(input_ids: Tensor, video_grids, image_grids, seconds_per_grid, config) -> tuple[Tensor, int]:
    """Positions of a prompt in Qwen2.5-VL's three-dimensional rotary embedding (time, height, width).

    Args: input_ids [P]; video_grids and image_grids, lists of (t, h, w) in patches, in the order of the prompt;
        seconds_per_grid, seconds between two visual steps for each video; config, the model's configuration.
    Returns: (positions [3, P], next_position): text counts on in all three rows; a visual token at step t, row y,
        column x that starts at s has (s + floor(t * seconds * tokens_per_second), s + y, s + x), an image t = 0; the
        text after it resumes at the largest position + 1, as the model was trained.
    Raises: ValueError if the visual tokens of the prompt are not those of the grids.

    Example: 2 text tokens, a video of grid (2, 2, 4) at 1.5 s a step (2 tokens a second), 1 text token:
        time 0 1 | 2 2 5 5 | 6,  height 0 1 | 2 2 2 2 | 6,  width 0 1 | 2 3 2 3 | 6;  next_position 7.
    """
    merge = config.vision_config.spatial_merge_size
    videos, images = iter(zip(video_grids, seconds_per_grid, strict=True)), iter(image_grids)
    video, image = config.video_token_id, config.image_token_id
    ids, spans, start, index = input_ids.tolist(), [], 0, 0
    try:
        while index < len(ids):
            if ids[index] not in (video, image):
                count = next((i for i, one in enumerate(ids[index:]) if one in (video, image)), len(ids) - index)
                spans.append(torch.arange(start, start + count).expand(3, -1))
                start, index = start + count, index + count
                continue
            (t, h, w), seconds = next(videos) if ids[index] == video else (next(images), 0.0)
            time = (torch.arange(t, dtype=torch.float64) * seconds * config.vision_config.tokens_per_second).long()
            grid = torch.meshgrid(time, torch.arange(h // merge), torch.arange(w // merge), indexing="ij")
            span = start + torch.stack(grid).flatten(1)  # [3, t * h/2 * w/2]
            if ids[index:index + span.shape[1]] != [ids[index]] * span.shape[1]:
                raise StopIteration
            spans.append(span)
            start, index = int(span.max()) + 1, index + span.shape[1]
        if next(videos, None) or next(images, None):
            raise StopIteration
    except StopIteration:
        raise ValueError("the prompt's visual tokens are not those of its grids; build ids and grids together") from None
    return torch.cat(spans, dim=1).to(input_ids.device), start


@dataclass
class EncodedPrompt:
    """A prompt as the language model takes it: its video is embedded, once, for rollout and update."""
    input_ids: Tensor  # [P]
    positions: Tensor  # [3, P]
    next_position: int  # the position of the first response token
    visual_mask: Tensor  # bool [P]
    visual_embeds: Tensor  # [visual tokens, H]
    frame_of_token: Tensor  # [P], visual step of a video token, -1 elsewhere
    num_steps: int  # F

    def frame_pooling(self) -> Tensor:
        """[P, F], column f averages over the visual tokens of step f."""
        pooling = self.frame_of_token[:, None] == torch.arange(self.num_steps, device=self.frame_of_token.device)
        return pooling / pooling.sum(0).clamp(min=1)


@torch.no_grad()
def encode_prompts(model, prompts: list, patches: list[Tensor] | None = None) -> list[EncodedPrompt]:
    """Embed the videos and images of prompts in one call of the vision tower. A prompt has input_ids [P], patches,
    video_grids, image_grids, seconds_per_grid, frame_of_token [P] and num_steps; other `patches` of the same shapes may
    stand in (masked video)."""
    device, config = model.device, model.config
    grids = [[*prompt.video_grids, *prompt.image_grids] for prompt in prompts]
    counts = [sum(t * h * w for t, h, w in own) // config.vision_config.spatial_merge_size ** 2 for own in grids]
    embeds = torch.empty(0, config.text_config.hidden_size, device=device, dtype=model.dtype)
    if sum(counts):
        patches = [prompt.patches for prompt in prompts] if patches is None else patches
        embeds = model.model.visual(torch.cat(patches).to(device, model.dtype),
                                    grid_thw=torch.tensor(sum(grids, []), device=device)).pooler_output
    kinds = torch.tensor([config.video_token_id, config.image_token_id])
    encoded = []
    for prompt, own in zip(prompts, embeds.split(counts)):
        positions, next_position = mrope_positions(prompt.input_ids, prompt.video_grids, prompt.image_grids,
                                                   prompt.seconds_per_grid, config)
        visual = torch.isin(prompt.input_ids, kinds)
        encoded.append(EncodedPrompt(prompt.input_ids.to(device), positions.to(device), next_position, visual.to(device),
                                     own, prompt.frame_of_token.to(device), prompt.num_steps))
    return encoded


def prompt_embeds(language_model, prompt: EncodedPrompt) -> Tensor:
    """[P, H]: word embeddings, with the visual embeddings in the prompt's own places."""
    embeds = language_model.embed_tokens(prompt.input_ids)
    return embeds.masked_scatter(prompt.visual_mask[:, None], prompt.visual_embeds.to(embeds.dtype))


def excluded_token_ids(model) -> Tensor:
    """Ids that are never sampled: the visual tokens, which a forward pass could not place."""
    config = model.config
    return torch.tensor([config.video_token_id, config.image_token_id, config.vision_start_token_id,
                         config.vision_end_token_id], device=model.device)


def sampling_logits(logits: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    """fp32 logits [..., V] of the distribution that tokens are sampled from, in rollout and update alike: divided by the
    temperature, and -inf for the `excluded` ids."""
    return (logits.float() / temperature).index_fill_(-1, excluded, -torch.inf)


# ------------------------------------------------------------------------------------------------- grouped rollout

class GroupedCache:
    """Keys and values while N groups of G responses decode together, and the attention over them.

    A group's prompt is stored and read once, not once per response: the queries of its G rows stand side by side in one
    matrix product with the prompt's keys. Prompts of different lengths are padded behind and masked; the responses
    advance in step. Column t of the response cache belongs to the token that is fed at step t, and column 0 to the last
    prompt token. In the last `attention_layers` layers a step adds its attention to the visual steps to
    `frame_attention`; nothing of size heads x keys outlives a layer.

    All that changes from step to step is written in place, `step` too, so that a CUDA graph can replay a step. `width`
    columns are read, those after `step` masked.
    """

    def __init__(self, prompts: list[EncodedPrompt], caches: list[DynamicCache], group_size: int, max_new_tokens: int,
                 attention_layers: int):
        n, device = len(prompts), prompts[0].input_ids.device
        lengths = [len(prompt.input_ids) - 1 for prompt in prompts]  # the last token is the first decoding step's
        longest = max(lengths) + -max(lengths) % 8  # rows of whole 16 bytes suit a GPU
        num_layers, first = len(caches[0].layers), caches[0].layers[0].keys  # [1, kv_heads, P - 1, D]
        heads, head_dim = first.shape[1], first.shape[3]
        self.group_size, self.width = group_size, max_new_tokens
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.columns = torch.arange(max_new_tokens, device=device)
        attention_layers = min(attention_layers, num_layers)
        self.first_read_layer, self.attention_layers = num_layers - attention_layers, attention_layers
        self.prompt = first.new_zeros(num_layers, 2, n, heads, longest, head_dim)
        self.response = first.new_zeros(num_layers, 2, n * group_size, heads, max_new_tokens, head_dim)
        self.prompt_padding = torch.ones(n, 1, 1, longest, dtype=torch.bool, device=device)
        self.pooling = torch.zeros(n, longest, max(p.num_steps for p in prompts), device=device)
        for i, (prompt, cache, length) in enumerate(zip(prompts, caches, lengths)):
            for layer, kept in enumerate(cache.layers):
                self.prompt[layer, 0, i, :, :length], self.prompt[layer, 1, i, :, :length] = kept.keys[0], kept.values[0]
            self.prompt_padding[i, ..., :length] = False
            self.pooling[i, :length, :prompt.num_steps] = prompt.frame_pooling()[:length]
        self.frame_attention = torch.zeros(n, group_size, max_new_tokens, self.pooling.shape[2], device=device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [B, heads, 1, D], key and value [B, kv_heads, 1, D] of this step -> [B, 1, heads, D]."""
        prompt_keys, prompt_values = self.prompt[layer]  # [N, kv_heads, P, D]
        for kept, new in zip(self.response[layer], (key, value)):
            kept.index_copy_(2, self.step, new)
        keys, values = self.response[layer, :, :, :, :self.width]  # [B, kv_heads, width, D]
        ahead = self.columns[:self.width] > self.step
        (rows, heads, _, dim), (n, kv_heads, prompt_length, _) = query.shape, prompt_keys.shape
        share = heads // kv_heads  # query heads that share a key head (grouped-query attention)

        def by_group(x):  # [B, kv_heads, share, X] -> [N, kv_heads, G * share, X]
            return x.reshape(n, -1, kv_heads, share, x.shape[-1]).transpose(1, 2).flatten(2, 3)

        def by_row(x):  # and back
            return x.view(n, kv_heads, -1, share, x.shape[-1]).transpose(1, 2).reshape(rows, kv_heads, share, -1)

        query = query.reshape(rows, kv_heads, share, dim)
        scores = torch.cat([
            by_row(dot(by_group(query), prompt_keys).masked_fill(self.prompt_padding, -torch.inf)),
            dot(query, keys).masked_fill(ahead, -torch.inf)], dim=-1)  # [B, kv_heads, share, P + width]
        weights = (scores * scaling).softmax(-1)
        to_prompt, to_response = weights.split([prompt_length, self.width], dim=-1)
        if layer >= self.first_read_layer:
            read = to_prompt.mean((1, 2)).view(n, self.group_size, prompt_length)  # mean over heads
            self.frame_attention.index_add_(2, self.step, (read @ self.pooling)[:, :, None], alpha=1 / self.attention_layers)
        output = by_row(by_group(to_prompt.to(value.dtype)) @ prompt_values) + to_response.to(value.dtype) @ values
        return output.reshape(rows, 1, heads, dim)


def dot(query: Tensor, keys: Tensor) -> Tensor:
    """query [X, Y, Q, D] and keys [X, Y, K, D] -> fp32 [X, Y, Q, K]. In bf16 the scores of Qwen, often in the thousands,
    would lose what the softmax depends on; this is what the fused attention of prefill and policy does inside, too."""
    if keys.dtype == torch.float32:
        return query @ keys.mT
    scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)  # on a GPU alone
    return scores.unflatten(0, keys.shape[:2])


def grouped_decoding(module, query, key, value, attention_mask, scaling, cache: GroupedCache | None = None, **kwargs):
    """transformers' attention interface: a decoding step attends through its GroupedCache, all else is plain SDPA."""
    if cache is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return cache.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("grouped_decoding", grouped_decoding)


@dataclass
class Rollout:
    """G responses of one prompt."""
    prompt: EncodedPrompt
    response_ids: Tensor  # [G, R]
    response_mask: Tensor  # bool [G, R], true up to and with the end token
    log_probs: Tensor  # [G, R], while sampling
    entropy: Tensor  # [G, R], of the distributions sampled from
    frame_attention: Tensor  # [G, R, F], of the step that generates the token; 0 if no layer is read


BLOCK = 128  # response columns that the attention of a decoding step is widened by, and steps that share a CUDA graph


@torch.no_grad()
def rollout(model, prompts: list[EncodedPrompt], uniforms: Tensor, *, temperature: float = 1.0, attention_layers: int = 3,
            choose: Callable | None = None, cuda_graph: bool = True) -> list[Rollout]:
    """Sample G responses to each of N prompts, all N * G rows decoding together.

    Args: uniforms float64 [N, G, max_new_tokens] in [0, 1), the only source of randomness: token t is the one at which
        the cumulative distribution passes uniforms[..., t]; attention_layers, how many last layers are read;
        choose(logits [B, V], ids [B, max_new_tokens]) -> ids [B] replaces the sampling (evaluation); the places of `ids`
        that are still to come repeat the last prompt token; cuda_graph, record decoding steps on a GPU, `choose` with
        them: it must consist of operations on the device.
    """
    n, group_size, max_new_tokens = uniforms.shape
    uniforms = uniforms.to(model.device).view(n * group_size, max_new_tokens)
    text, ends, excluded = model.model.language_model, end_token_ids(model), excluded_token_ids(model)
    caches = [DynamicCache() for _ in prompts]
    for prompt, cache in zip(prompts, caches):  # the prompt once per group, without its last token
        text(inputs_embeds=prompt_embeds(text, prompt)[None, :-1], position_ids=prompt.positions[:, None, :-1],
             attention_mask={"full_attention": None}, past_key_values=cache)
    cache = GroupedCache(prompts, caches, group_size, max_new_tokens, attention_layers)
    del caches
    token = torch.stack([prompt.input_ids[-1] for prompt in prompts]).repeat_interleave(group_size)  # [B]
    first = torch.stack([prompt.positions[:, -1] for prompt in prompts], 1).repeat_interleave(group_size, 1)  # [3, B]
    start = torch.tensor([prompt.next_position for prompt in prompts], device=model.device).repeat_interleave(group_size)
    ids, lengths = token[:, None].repeat(1, max_new_tokens), torch.full_like(token, max_new_tokens)
    log_probs, entropy = uniforms.new_zeros(2, *uniforms.shape, dtype=torch.float32)

    def decode_step() -> None:
        """Feed `token`, draw the next. Everything stays on the device and at its address: see GroupedCache."""
        position = torch.where(cache.step == 0, first, start + cache.step - 1)  # [3, B]
        hidden = text(inputs_embeds=text.embed_tokens(token)[:, None], position_ids=position[:, :, None], cache=cache,
                      attention_mask={"full_attention": None}, use_cache=False).last_hidden_state[:, 0]
        logits = sampling_logits(model.lm_head(hidden), excluded, temperature)  # [B, V]
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        if choose is None:
            cumulative = p.cumsum(-1, dtype=torch.float64)
            threshold = uniforms.index_select(1, cache.step) * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)  # [B, 1]
        else:
            drawn = choose(logits, ids)[:, None]
        ids.index_copy_(1, cache.step, drawn)
        log_probs.index_copy_(1, cache.step, log_p.gather(-1, drawn))
        entropy.index_copy_(1, cache.step, torch.special.entr(p).sum(-1, keepdim=True))
        cache.step.add_(1)
        token.copy_(drawn[:, 0])
        lengths.copy_(torch.where((drawn == ends).any(-1) & (lengths == max_new_tokens), cache.step, lengths))

    for t in range(max_new_tokens):
        if t % BLOCK == 0:
            step, cache.width = decode_step, min(t + BLOCK, max_new_tokens)
        elif t % BLOCK == 1 and cuda_graph and model.device.type == "cuda":
            # launching a step's kernels one by one takes longer than they run; the step before this one warmed up
            step = torch.cuda.CUDAGraph()
            with torch.cuda.graph(step, capture_error_mode="thread_local"):
                decode_step()
            step = step.replay
        step()
        # asking the GPU whether every row has ended makes the host wait: ask now and then
        if (model.device.type == "cpu" or t % 8 == 7) and bool((lengths <= t + 1).all()):
            break
    grouped = [x.view(n, group_size, -1) for x in (ids, log_probs, entropy)]
    rollouts = []
    for i, prompt in enumerate(prompts):
        own = lengths.view(n, group_size)[i]
        length = int(own.max())
        mask = torch.arange(length, device=model.device) < own[:, None]
        parts = [x[i, :, :length].where(mask, 0) for x in grouped]
        attention = cache.frame_attention[i, :, :length, :prompt.num_steps] * mask[:, :, None]
        rollouts.append(Rollout(prompt, parts[0], mask, parts[1], parts[2], attention))
    return rollouts


# --------------------------------------------------------------------------------------- the policy: packed groups

class Policy(nn.Module):
    """The trainable language model, in fp32; its forward pass gives the log-probabilities of a group.

    The group is one packed sequence, [prompt | response 1 | ... | response G]: every response sees the prompt and
    itself and counts its positions on from the prompt, so prompt and video are computed once.
    """

    def __init__(self, model, temperature: float = 1.0):
        super().__init__()
        self.language_model, self.lm_head = copy.deepcopy((model.model.language_model, model.lm_head))
        self.temperature = temperature
        self.register_buffer("excluded", excluded_token_ids(model), persistent=False)
        self.float().requires_grad_(True).train()

    def forward(self, prompt: EncodedPrompt, response_ids: Tensor, response_mask: Tensor, keep_logits: bool = False):
        """response_ids [G, R] and response_mask bool [G, R] -> log_probs [G, R], 0 in the padding, and with keep_logits the
        logits [G, R, V] of the distributions the tokens were sampled from, in the compute type, no gradient; else None."""
        row, column = response_mask.nonzero(as_tuple=True)  # [T] each: the real tokens, response after response
        prompt_length, total = len(prompt.input_ids), len(row)
        owner = torch.cat([row.new_full((prompt_length,), -1), row])  # -1: the prompt, else the response
        order = torch.arange(prompt_length + total, device=row.device)
        mask = (order <= order[:, None]) & ((owner == -1) | (owner == owner[:, None]))  # [query, key]
        embeds = torch.cat([prompt_embeds(self.language_model, prompt),
                            self.language_model.embed_tokens(response_ids[response_mask])])
        positions = torch.cat([prompt.positions, (prompt.next_position + column).expand(3, -1)], dim=1)
        hidden = self.language_model(inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False,
                                     attention_mask={"full_attention": mask[None, None]}).last_hidden_state[0]
        # a token's distribution comes from the place before it; a first token's from the end of the prompt
        source = torch.where(column == 0, prompt_length - 1, order[prompt_length:] - 1)
        hidden, targets = hidden[source], response_ids[response_mask]  # [T, H], [T]
        log_probs, kept = [], hidden.new_zeros(*response_ids.shape, len(self.lm_head.weight)) if keep_logits else None
        # checkpointed chunks: the fp32 logits [T, V] of a 3B model would be the largest tensor of the whole update
        for h, y, i, j in zip(*(x.split(512) for x in (hidden, targets, row, column))):
            part, logits = checkpoint(self.head, h, y, use_reentrant=False)
            log_probs.append(part)
            if keep_logits:
                kept[i, j] = logits.detach().to(kept.dtype)
            del logits  # before the next chunk's
        log_probs = torch.cat(log_probs)
        return log_probs.new_zeros(response_mask.shape).masked_scatter(response_mask, log_probs), kept

    def head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, H], targets [T] -> log-probabilities [T], logits [T, V]."""
        logits = sampling_logits(self.lm_head(hidden), self.excluded, self.temperature)
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], logits


def recompute_activations(language_model) -> None:
    """Gradient checkpointing of the layers: about a third more time for the update, much less memory."""
    name = "activation_checkpointing_enable"  # transformers renamed it after 5.17
    getattr(language_model, name if hasattr(language_model, name) else "gradient_checkpointing_enable")()


def frozen_policy(model, temperature: float) -> Policy:
    """A copy of the model in its own type, the reference of a KL term. Its buffers stay fp32: rotary frequencies in bf16
    would turn distant tokens by radians."""
    policy = Policy(model, temperature).requires_grad_(False)
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(model.dtype)
    return policy


def dummy_group(model) -> tuple[EncodedPrompt, Tensor, Tensor]:
    """The smallest group that a policy can take: one prompt token, one response token."""
    one = end_token_ids(model)[:1]
    prompt = EncodedPrompt(one, one.new_zeros(3, 1), 1, one < 0, torch.empty(0, model.config.text_config.hidden_size,
                           device=model.device), one.new_full((1,), -1), 0)
    return prompt, one[None], torch.ones(1, 1, dtype=torch.bool, device=model.device)


# --------------------------------------------------------------------------------------- processes and precision

def init_processes() -> tuple[int, int, torch.device]:
    """(rank, world size, device), under torchrun or alone; one process is a process group of one, so there is one path."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # its backward pass of masked attention is reported to give NaN at some lengths (pytorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **alone)
    return dist.get_rank(), dist.get_world_size(), device


def shard(policy: Policy, device: torch.device) -> Policy:
    """FSDP2: parameters, gradients and optimizer states are split over the processes; bf16 compute on a GPU."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for layer in policy.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    return fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


@torch.no_grad()
def refresh(model, policy: Policy) -> None:
    """Copy the policy's weights into the rollout model, in place."""
    targets = nn.ModuleList([model.model.language_model, model.lm_head]).parameters()
    for target, source in zip(targets, policy.parameters(), strict=True):
        source = source.to(target.dtype)  # before the gather: half the bytes
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)


# ----------------------------------------------------------------------------------------- the tiny built-in model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


TINY_IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 3136, "patch_size": 14,
               "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
               "image_std": [0.26862954, 0.26130258, 0.27577711]}


def tiny_model(words: list[str], seed: int = 0):
    """(model, tokenizer): a Qwen2.5-VL of 0.57M parameters with random weights, and a word-level tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>", "<|unknown|>"]
    ids = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    core = Tokenizer(models.WordLevel(ids, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"</?\w+>|\w+|[^\w\s]"), "isolated")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        unk_token="<|unknown|>", additional_special_tokens=special[1:7],
                                        chat_template=CHAT_TEMPLATE)
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(ids), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=256, initializer_range=0.06, rms_norm_eps=1e-6,
                         max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
                         rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])),
        appo_built_in=True,  # its own settings go with it
        vision_config=dict(depth=2, hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=128,
                           fullatt_block_indexes=[1], tokens_per_second=2),
        tie_word_embeddings=True, **{f"{name}_token_id": ids[f"<|{token}|>"] for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="grouped_decoding")
    model.generation_config = GenerationConfig(eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
                                               pad_token_id=ids["<|endoftext|>"])
    return model.eval(), tokenizer


def warm_up(model, lessons: list, good_enough: Callable[[nn.Module], bool], *, batch_size: int = 16,
            align_steps: int = 100, max_steps: int = 300, seed: int = 0) -> None:
    """Teach a tiny model the built-in task with supervision, until `good_enough(model)`, checked every 5 steps.

    A lesson has a `prompt` (up to the end of its video), token_words [visual tokens, 2] (the two words that name what a
    token shows, the padding id where it is empty), response_ids, response_mask and target_mask [questions, R]: the rest
    of the prompts and the responses after it, and which of those tokens to learn. Two stages: the vision tower learns
    to say what each token shows, without which nothing is learned; then, frozen, the language model learns to answer.
    Raises RunError if the model never is good enough.
    """
    order = torch.Generator().manual_seed(seed)
    bar = tqdm(total=align_steps + max_steps, desc="warm-up")

    def batch() -> list:
        bar.update()
        return [lessons[i] for i in torch.randperm(len(lessons), generator=order)[:batch_size]]

    text, empty = model.model.language_model, model.generation_config.pad_token_id
    parameters = [*model.model.visual.parameters(), *text.embed_tokens.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(align_steps):
        part = batch()
        grids = torch.tensor([grid for lesson in part for grid in lesson.prompt.video_grids])
        embeds = model.model.visual(torch.cat([lesson.prompt.patches for lesson in part]), grid_thw=grids).pooler_output
        words = torch.cat([lesson.token_words for lesson in part])  # [visual tokens, 2]
        log_probs = (embeds @ text.embed_tokens.weight.mT).log_softmax(-1).gather(-1, words)
        weight = torch.where(words == empty, 0.3, 1.0)  # three of four cells are empty
        (-(log_probs * weight).sum() / weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)

    encoded = {}
    for first in range(0, len(lessons), 64):
        part = lessons[first:first + 64]
        encoded |= zip(map(id, part), encode_prompts(model, [lesson.prompt for lesson in part]))
    policy = Policy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(max_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20)
        for lesson in batch():
            log_probs = policy(encoded[id(lesson)], lesson.response_ids, lesson.response_mask)[0]
            (-log_probs[lesson.target_mask].mean() / batch_size).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            refresh(model, policy)
            if good_enough(model):
                return
    raise RunError(f"the built-in model did not learn its task in {max_steps} steps; try another --seed")
