"""What APPO (Attention-guided Perception Policy Optimization, arXiv 2602.23823) needs of Qwen2.5-VL
and of the machine.

From top to bottom: processes; loading; the prompt and its video, embedded once; attention of a
group; rollout; log-probabilities of a group and its attention to the frames; sharding; the run
folder; the tiny built-in model.

Two copies of the weights are in use. The *rollout model* is an ordinary Hugging Face model in the
compute type (bf16 on a GPU, fp32 on a CPU): it embeds videos, decodes, and is what a checkpoint
holds. The *policy* is the trained fp32 copy of its language model, sharded over the processes.
After each training step the rollout model is refreshed from the policy. The vision tower is
frozen, so one copy serves both.

Letters in shapes: P prompt tokens, G responses to a prompt (a group), R response tokens, T response
tokens of a group without padding, F frames (in code, F is torch.nn.functional), V vocabulary
entries, H hidden size, D head size, L tokens of any sequence, Q queries and K keys, N prompts that
decode together, B = N * G rows, kv key heads and s query heads for each of them. A frame is a
visual time step: Qwen2.5-VL merges two sampled frames into one.
"""
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class RunError(Exception):
    """An error that the user can fix. The message is one line: what is wrong and how to fix it."""


def printable(text: str) -> str:
    """Text that is safe to print: names and responses may hold control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def explained(message: str) -> Iterator[None]:
    """Turns the errors that reading and writing files raise into a RunError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{message} ({reason})") from error


# -------------------------------------------------------------------------------------- processes

def init_processes() -> tuple[int, int, torch.device]:
    """(rank, world size, device). Without torchrun it makes a process group of one, so that all
    code may call collectives.

    Raises RunError if there is a GPU that torch cannot use: a run on the CPU would look hung.
    """
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        # cuDNN's backward pass of masked attention is reported to give NaN at some lengths
        # (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif (torch.version.cuda and Path("/dev/nvidiactl").exists()
          and os.environ.get("CUDA_VISIBLE_DEVICES") != ""):
        raise RunError(f"torch {torch.__version__} cannot use this machine's GPU; update its "
                       "driver, install a matching torch, or hide the GPU by "
                       'CUDA_VISIBLE_DEVICES=""')
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend, **alone)
    return dist.get_rank(), dist.get_world_size(), device


def all_gather(thing) -> list:
    """The thing of every process, in the order of the ranks. A collective call."""
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def gather_lists(items: list) -> list:
    """The items of all processes, in the order of the ranks. A collective call."""
    return sum(all_gather(items), [])


def compute_type(device: torch.device) -> torch.dtype:
    """The type that models compute in. The policy's own weights are fp32 everywhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---------------------------------------------------------------------------------------- loading

def load_model(name: str, device: torch.device):
    """(model, tokenizer) of a Qwen2.5-VL folder or hub name.

    Raises RunError if it is of another type or lacks files or weights.
    """
    with explained(f"{name}: no usable model; give a hub name or a folder with the configuration, "
                   "tokenizer and weights of a qwen2_5_vl model"):
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type != "qwen2_5_vl":
            raise RunError(f"{name}: it is of type {config.model_type}; give a Qwen2.5-VL model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if not tokenizer.chat_template:
            raise RunError(f"{name}: its tokenizer has no chat template; copy chat_template.jinja "
                           "from Qwen2.5-VL")
        source_folder(name)     # fetched now, since checkpoints copy it
        model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name, dtype=compute_type(device), output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise RunError(f"{name}: the weights lack {len(missing)} tensors, the first {missing[0]}; "
                       "get the complete checkpoint")
    if getattr(config, "appo_built_in", False):     # a `tiny_model`
        torch.set_num_threads(1)    # operations this small mostly wait for other threads
    return prepare_model(model.to(device).eval().requires_grad_(False)), tokenizer


def prepare_model(model):
    """Give a Qwen2.5-VL model the attention of this file, and make its vision tower faster.

    Outside of `rollout` and `Policy` it computes the same as before.
    """
    from transformers.masking_utils import sdpa_mask
    transformers.AttentionInterface.register("group_attention", group_attention)
    transformers.AttentionMaskInterface.register("group_attention", sdpa_mask)
    model.set_attn_implementation("group_attention")
    for block in model.model.visual.blocks:
        block.attn.forward = partial(attend_in_windows, block.attn)
    if model.device.type == "cuda":
        # The patch embedding is a convolution whose kernel covers a whole patch. In bf16 some GPUs
        # take very long for it (transformers issue 45750), so it is a matrix product here.
        embed = model.model.visual.patch_embed
        embed.forward = lambda patches: F.linear(patches, embed.proj.weight.flatten(1))
    return model


def attend_in_windows(attention, hidden_states, cu_seqlens, position_embeddings, **kwargs):
    """Attention of a vision block, all windows of one length in one call.

    transformers calls the attention once per window: hundreds of times per video and block.
    The names are those of its call. hidden_states (L, H); cu_seqlens, where each window starts and
    the last one ends -> (L, H)
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
    qkv = attention.qkv(hidden_states).unflatten(1, (3, attention.num_heads, -1))
    query, key, value = qkv.unbind(1)                                           # (L, heads, D)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    lengths = cu_seqlens.diff()
    output = torch.empty_like(value)
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]                             # (windows,)
        tokens = starts[:, None] + torch.arange(length, device=starts.device)   # (windows, length)
        windows = [x[tokens].transpose(1, 2) for x in (query, key, value)]
        output[tokens] = F.scaled_dot_product_attention(*windows).transpose(1, 2)
    return attention.proj(output.flatten(1))


# ------------------------------------------------------------------------ the prompt and its video

def mrope_positions(input_ids: Tensor, video_grids, image_grids, seconds_per_grid,
                    config) -> tuple[Tensor, int]:
    """Positions of a prompt in Qwen2.5-VL's three-dimensional rotary embedding.

    Text advances by 1 in all three rows (time, height, width). The token of a video that starts
    at position s, at frame t, row y and column x, has the position
    (s + floor(t * seconds * tokens_per_second), s + y, s + x); in an image t is 0. The text after
    it goes on at the largest position + 1, as the model was trained.

    input_ids (P,); video_grids, image_grids: a (t, h, w) in patches for each video and image, in
    the order of the prompt; seconds_per_grid: seconds between two frames of each video;
    config: the model's configuration -> (positions (3, P), position of the first response token)
    Raises ValueError if the visual tokens of the prompt do not match the grids.

    Example: 2 text tokens, a video of grid (2, 2, 4) at 1.5 s a frame, 1 text token:
        time 0 1 | 2 2 5 5 | 6,  height 0 1 | 2 2 2 2 | 6,  width 0 1 | 2 3 2 3 | 6;  next is 7.
    """
    merge = config.vision_config.spatial_merge_size
    tokens_per_second = config.vision_config.tokens_per_second
    grids = {config.video_token_id: list(zip(video_grids, seconds_per_grid, strict=True)),
             config.image_token_id: [(grid, 0.0) for grid in image_grids]}
    spans, position = [], 0
    # A run is text, or one video or image: marks stand between two of these.
    for left, run in groupby(input_ids.tolist(), grids.get):
        count = len(list(run))
        if left is None:
            span = torch.arange(count).expand(3, -1)
        elif not left:
            raise ValueError("the prompt has more videos or images than grids")
        else:
            (t, h, w), seconds = left.pop(0)
            times = (torch.arange(t, dtype=torch.float64) * seconds * tokens_per_second).long()
            rows, columns = torch.arange(h // merge), torch.arange(w // merge)
            span = torch.cartesian_prod(times, rows, columns).T
        if span.shape[1] != count:
            raise ValueError("the prompt's visual tokens do not match its grids")
        spans.append(position + span)
        position += int(span.max()) + 1
    if any(grids.values()):
        raise ValueError("the prompt has fewer videos or images than grids")
    return torch.cat(spans, dim=1), position


@dataclass
class EncodedPrompt:
    """A prompt as the language model takes it. Rollout and update share its embedded video."""
    input_ids: Tensor           # (P,)
    positions: Tensor           # (3, P)
    next_position: int          # of the first response token
    visual_mask: Tensor         # bool (P,), the places of the visual embeddings
    visual_embeds: Tensor       # (visual tokens, H)
    frame_of_token: Tensor      # (P,), the frame of a video token, -1 elsewhere
    num_frames: int             # F


def embed_visuals(model, prompts: list) -> Tensor:
    """(visual tokens, H): the videos and images of all prompts, in one call of the vision tower."""
    grids = [grid for prompt in prompts for grid in prompt.video_grids + prompt.image_grids]
    if not grids:
        return torch.empty(0, device=model.device)
    patches = torch.cat([prompt.patches for prompt in prompts]).to(model.device, model.dtype)
    output = model.model.visual(patches, grid_thw=torch.tensor(grids, device=model.device))
    return output.pooler_output


@torch.no_grad()
def encode_prompts(model, prompts: list) -> list[EncodedPrompt]:
    """Embed the videos and images of all prompts in one call of the vision tower.

    prompts: data.Prompt or anything with its fields. In `patches` and in `input_ids` (on the CPU),
        videos stand before images.
    """
    device, config = model.device, model.config
    visual_ids = torch.tensor([config.video_token_id, config.image_token_id])
    visual_masks = [torch.isin(prompt.input_ids, visual_ids) for prompt in prompts]
    counts = [int(mask.sum()) for mask in visual_masks]
    of_prompts = embed_visuals(model, prompts).split(counts)
    encoded = []
    for prompt, visual_mask, visual_embeds in zip(prompts, visual_masks, of_prompts):
        positions, next_position = mrope_positions(
            prompt.input_ids, prompt.video_grids, prompt.image_grids, prompt.seconds_per_grid,
            config)
        encoded.append(EncodedPrompt(
            prompt.input_ids.to(device), positions.to(device), next_position,
            visual_mask.to(device), visual_embeds, prompt.frame_of_token.to(device),
            prompt.num_frames))
    return encoded


def prompt_embeds(language_model, prompt: EncodedPrompt) -> Tensor:
    """(P, H): word embeddings, with the visual embeddings in their places."""
    embeds = language_model.embed_tokens(prompt.input_ids)
    visual = prompt.visual_embeds.to(embeds.dtype)
    return embeds.masked_scatter(prompt.visual_mask[:, None], visual)


def frame_pooling(frame_of_token: Tensor, num_frames: int) -> Tensor:
    """frame_of_token (..., P) -> (..., P, F): column f averages over the tokens of frame f."""
    frames = torch.arange(num_frames, device=frame_of_token.device)
    belongs = frame_of_token[..., None] == frames
    return F.normalize(belongs.float(), p=1, dim=-2)        # 0 for a frame without tokens


def end_token_ids(model) -> Tensor:
    """Ids that end a response (Qwen: <|im_end|> and <|endoftext|>)."""
    # One id or several.
    return torch.tensor(model.generation_config.eos_token_id, device=model.device).flatten()


def excluded_token_ids(model) -> Tensor:
    """Ids that are never sampled: visual tokens, for which a forward pass would need a video."""
    config = model.config
    return torch.tensor([config.video_token_id, config.image_token_id,
                         config.vision_start_token_id, config.vision_end_token_id],
                        device=model.device)


def sampling_logits(logits: Tensor, excluded: Tensor, temperature: float) -> Tensor:
    """fp32 logits (..., V) of the distribution that tokens are sampled from.

    Rollout and update use the same: divided by the temperature, and -inf for the excluded ids. The
    given logits may be overwritten: they are large, and a copy is worth avoiding.
    """
    return logits.float().div_(temperature).index_fill_(-1, excluded, -torch.inf)


# -------------------------------------------------------------------------- attention of a group

def hidden_states(language_model, embeds: Tensor, positions: Tensor, attend: Callable) -> Tensor:
    """The last hidden states of the language model, whose layers attend by `attend`.

    embeds (B, L, H), positions (3, B, L); attend(layer, query (B, heads, L, D),
    key (B, kv_heads, L, D), value) -> (B, L, heads, D), with any number of axes: transformers
    reshapes it
    -> (B, L, H)
    """
    return language_model(
        inputs_embeds=embeds, position_ids=positions, use_cache=False, attend=attend,
        attention_mask={"full_attention": None},    # so none is built: `attend` masks
    ).last_hidden_state


def group_attention(module, query, key, value, attention_mask, attend: Callable | None = None,
                    **kwargs):
    """An attention function for transformers, which passes unknown keyword arguments of the model
    on to it: `attend` is that of `hidden_states`. Without it, this is transformers' own SDPA."""
    if attend is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attend(module.layer_idx, query, key, value), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (B, heads, Q, D), key and value (B, kv_heads, K, D) -> (B, Q, heads, D)

    K >= Q, and the last query sees all keys. On a GPU this is flash attention, whose memory does
    not grow with Q * K.
    """
    from torch.nn.attention.bias import causal_lower_right      # slow to import
    mask = causal_lower_right(query.shape[2], key.shape[2])
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return output.transpose(1, 2)


def attention_scores(query: Tensor, keys: Tensor) -> Tensor:
    """query (..., Q, D) and keys (..., K, D) -> fp32 (..., Q, K).

    Qwen's scores are often in the thousands: in bf16 they would lose the differences that the
    softmax depends on. The fused kernels keep them in fp32, too.
    """
    if keys.dtype == torch.float32:
        return query @ keys.mT
    scores = torch.bmm(query.flatten(0, -3), keys.flatten(0, -3).mT, out_dtype=torch.float32)
    return scores.unflatten(0, query.shape[:-2])


class PackedGroup:
    """Attention over a prompt and all its responses in one sequence.

    The sequence is [prompt | response 1 | ... | response G] without padding, for all that works on
    single tokens. Only attention takes it apart: the prompt attends to itself, and the responses
    are G rows whose keys are [prompt | the response itself]. Both are causal. The result is that of
    G sequences [prompt | response], and the prompt is computed once.

    The layers of `read_layers` also note how much the responses attend to the frames: see
    `frame_attention`.
    """

    def __init__(self, prompt: EncodedPrompt, response_mask: Tensor, read_layers=()):
        P = len(prompt.input_ids)
        self.prompt, self.prompt_length, self.read_layers = prompt, P, read_layers
        self.response_mask = response_mask                                      # (G, R)
        self.row, self.column = response_mask.nonzero(as_tuple=True)            # (T,) each
        # Where the query stands that predicts each response token: directly before the token, which
        # for the first one of a response is the end of the prompt.
        places = P - 1 + torch.arange(len(self.row), device=self.row.device)
        self.query_places = places.where(self.column > 0, P - 1)                # (T,)
        self.readings = []      # frame attention (G, R, F) of each layer that is read

    def unpack(self, values: Tensor) -> Tensor:
        """Values of the response tokens (T, ...) -> (G, R, ...), 0 in the padding."""
        rows = values.new_zeros(*self.response_mask.shape, *values.shape[1:])
        rows[self.row, self.column] = values
        return rows

    def after_prompt(self, sequence: Tensor) -> Tensor:
        """(P + T, heads, D) -> the responses, each after the prompt, (G, heads, P + R, D)"""
        P, G = self.prompt_length, len(self.response_mask)
        prompts = sequence[:P].expand(G, -1, -1, -1)
        return torch.cat([prompts, self.unpack(sequence[P:])], dim=1).transpose(1, 2)

    def attend(self, layer, query, key, value) -> Tensor:
        """`attend` of `hidden_states`, for one sequence (B = 1) of L = P + T tokens."""
        P = self.prompt_length
        prompt_output = causal_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P])
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, D)
        keys, values = self.after_prompt(key), self.after_prompt(value)
        output = causal_attention(self.unpack(query[P:]).transpose(1, 2), keys, values)
        if layer in self.read_layers:
            self.read_frames(query, keys)
        return torch.cat([prompt_output[0], output[self.row, self.column]])

    def read_frames(self, query: Tensor, keys: Tensor) -> None:
        """Note a layer's attention to the frames, of the query that predicted each token.

        query (P + T, heads, D), keys (G, kv_heads, P + R, D)
        """
        query = self.unpack(query[self.query_places]).transpose(1, 2)           # (G, heads, R, D)
        # The query that predicts response token r stands at P + r - 1: none sees the last key.
        keys = keys[:, :, :-1]
        # Attention is an average of values. Where the value of a key says which frame it shows, and
        # is 0 for a response, the average is the attention to each frame.
        pooling = frame_pooling(self.prompt.frame_of_token, self.prompt.num_frames)     # (P, F)
        values = F.pad(pooling, (0, 0, 0, keys.shape[2] - len(pooling)))
        values = values.expand(*keys.shape[:2], -1, -1)
        to_frames = causal_attention(query.float(), keys.float(), values)       # (G, R, heads, F)
        self.readings.append(to_frames.mean(2))


class DecodingCache:
    """Keys and values of N prompts and of the G responses to each, which decode together.

    A prompt is stored and read once, not once per response: the queries of its G rows stand side by
    side in one matrix product with the prompt's keys. Shorter prompts are padded and masked. All
    responses advance together: response key t belongs to the token that is fed at decoding position
    t, so key 0 belongs to the last prompt token. In the last layers the attention to the frames is
    added to `frame_attention`; no other attention weights outlive their layer.

    All that changes from token to token is written in place, `t` too, so that a CUDA graph can
    replay it.
    """

    def __init__(self, language_model, prompts: list[EncodedPrompt], group_size: int,
                 max_new_tokens: int, attention_layers: int):
        attention, num_layers = language_model.layers[0].self_attn, len(language_model.layers)
        kv_heads, head_dim = attention.num_key_value_heads, attention.head_dim
        zeros = language_model.embed_tokens.weight.new_zeros    # of the model's type and device
        # The last prompt token is the first one to be decoded, as its logits are needed. P is here
        # the length without it, padded, as GPUs like rows of whole 16 bytes.
        lengths = [len(prompt.input_ids) - 1 for prompt in prompts]
        P = math.ceil(max(lengths) / 8) * 8
        N, num_frames = len(prompts), max(prompt.num_frames for prompt in prompts)
        self.read_layers = range(max(num_layers - attention_layers, 0), num_layers)
        self.t = zeros(1, dtype=torch.long)     # the decoding position
        # The response keys that attention reads, at least t + 1. `rollout` raises the number once
        # per BLOCK, since a CUDA graph needs fixed shapes.
        self.keys_read = max_new_tokens
        self.prompt_kv = zeros(num_layers, 2, N, kv_heads, P, head_dim)
        self.response_kv = zeros(num_layers, 2, N, kv_heads, group_size, max_new_tokens, head_dim)
        # The keys that are padding or still to come: at first all.
        self.unseen = ~zeros(N, 1, 1, 1, P + max_new_tokens, dtype=torch.bool)
        frame_of_token = zeros(N, P, dtype=torch.long) - 1
        self.frame_attention = zeros(N, group_size, max_new_tokens, num_frames, dtype=torch.float)
        for number, (prompt, length) in enumerate(zip(prompts, lengths)):
            self.unseen[number, ..., :length] = False
            frame_of_token[number, :length] = prompt.frame_of_token[:-1]
            embeds = prompt_embeds(language_model, prompt)[None, :-1]
            hidden_states(language_model, embeds, prompt.positions[:, None, :-1],
                          partial(self.prefill, number))
        self.pooling = frame_pooling(frame_of_token, num_frames)                # (N, P, F)

    def prefill(self, number, layer, query, key, value) -> Tensor:
        """Attention of prompt `number` to itself; its keys and values are stored."""
        stored = self.prompt_kv[layer, :, number, :, :key.shape[2]]
        stored.copy_(torch.cat([key, value]))       # (2, kv, this prompt's tokens - 1, D)
        return causal_attention(query, key, value)

    def decode(self, layer, query, key, value) -> Tensor:
        """Attention of one new token per row, computed eagerly so that its weights can be read."""
        N, kv_heads, G, _, head_dim = self.response_kv[layer, 0].shape
        query, key, value = (x.view(N, G, kv_heads, -1, head_dim).transpose(1, 2)
                             for x in (query, key, value))      # (N, kv, G, s or 1, D)
        prompt_keys, prompt_values = self.prompt_kv[layer]                      # (N, kv, P, D)
        self.response_kv[layer].index_copy_(4, self.t, torch.stack([key, value]))
        keys, values = self.response_kv[layer, ..., :self.keys_read, :]
        P = prompt_keys.shape[2]
        self.unseen.index_fill_(-1, P + self.t, False)
        prompt_scores = attention_scores(query.flatten(2, 3), prompt_keys).unflatten(2, (G, -1))
        scores = torch.cat([prompt_scores, attention_scores(query, keys)], dim=-1)
        unseen = self.unseen[..., :P + self.keys_read]
        weights = (scores.masked_fill(unseen, -torch.inf) * head_dim ** -0.5).softmax(-1)
        # (N, kv, G, s, P) and (N, kv, G, s, keys_read)
        to_prompt, to_response = weights[..., :P], weights[..., P:]
        if layer in self.read_layers:
            of_heads = to_prompt.transpose(1, 2).flatten(2, 3)                  # (N, G, heads, P)
            to_frames = of_heads.mean(2) @ self.pooling                         # (N, G, F)
            self.frame_attention.index_add_(2, self.t, to_frames[:, :, None],
                                            alpha=1 / len(self.read_layers))
        prompt_output = to_prompt.to(values.dtype).flatten(2, 3) @ prompt_values
        output = prompt_output.unflatten(2, (G, -1)) + to_response.to(values.dtype) @ values
        return output.transpose(1, 2)                                           # (N, G, kv, s, D)


# ---------------------------------------------------------------------------------------- rollout

@dataclass
class Rollout:
    """G responses to one prompt."""
    encoded: EncodedPrompt      # the prompt
    response_ids: Tensor        # (G, R)
    response_mask: Tensor       # bool (G, R), true up to the end token and on it
    log_probs: Tensor           # (G, R), as sampled
    entropy: Tensor             # (G, R), of the distributions sampled from
    frame_attention: Tensor     # (G, R, F), see the function of that name; 0 if no layer is read


# Tokens per block. At its start, attention begins to read BLOCK more response keys, the CUDA graph
# of the block before is freed, and the next one is recorded. A multiple of 8: every 8 tokens the
# host waits for the GPU, so no replay is under way then. Only one graph lives at a time, because to
# free one while another shares its cuBLAS workspace is an error (pytorch issue 193402).
BLOCK = 128


@torch.no_grad()
def rollout(model, prompts: list[EncodedPrompt], uniforms: Tensor, *, temperature: float = 1.0,
            attention_layers: int = 3, choose: Callable | None = None,
            cuda_graph: bool = False) -> list[Rollout]:
    """Sample G responses to each of N prompts, all N * G rows decoding together.

    uniforms: float64 (N, G, max_new_tokens) in [0, 1), the only source of randomness: token t is
        the one at which the cumulative distribution passes uniforms[..., t].
    attention_layers: how many of the last layers' attention to the frames is read.
    choose(logits (B, V), ids (B, 1 + max_new_tokens)) -> ids (B,): replaces sampling. `ids` are the
        last prompt token and the response; places still to come repeat the last prompt token.
    cuda_graph: record decoding on a GPU and replay it, `choose` with it.
    """
    N, G, max_new_tokens = uniforms.shape
    device, language_model = model.device, model.model.language_model
    ends, excluded = end_token_ids(model), excluded_token_ids(model)
    cache = DecodingCache(language_model, prompts, G, max_new_tokens, attention_layers)
    t = cache.t
    uniforms = uniforms.to(device).flatten(0, 1)                                # (B, R)
    log_probs, entropy = torch.zeros(2, *uniforms.shape, device=device)         # (B, R) each
    # The tokens that are fed are the last one of the prompt and those of the response.
    ids = torch.cat([prompt.input_ids[-1].expand(G, 1 + max_new_tokens) for prompt in prompts])
    # A prompt ends with text, so from there on all three rows of positions advance by 1.
    last = [prompt.next_position - 1 for prompt in prompts for _ in range(G)]
    last_positions = torch.tensor(last, device=device)[:, None]                 # (B, 1)

    def next_token() -> None:
        """Feed the last token of every row and sample the next one. All stays on the device, and
        what outlives the call is written in place: so a CUDA graph can replay it."""
        embeds = language_model.embed_tokens(ids.index_select(1, t))            # (B, 1, H)
        positions = (last_positions + t).expand(3, -1, -1)                      # (3, B, 1)
        hidden = hidden_states(language_model, embeds, positions, cache.decode)
        logits = sampling_logits(model.lm_head(hidden[:, 0]), excluded, temperature)    # (B, V)
        new_log_probs = logits.log_softmax(-1)
        probs = new_log_probs.exp()
        if choose is None:
            cumulative = probs.cumsum(-1, dtype=torch.float64)
            threshold = uniforms.index_select(1, t) * cumulative[:, -1:]
            sampled = torch.searchsorted(cumulative, threshold, right=True)     # (B, 1)
            sampled = sampled.clamp(max=logits.shape[-1] - 1)       # nan would give V
        else:
            sampled = choose(logits, ids)[:, None]
        ids.index_copy_(1, t + 1, sampled)
        log_probs.index_copy_(1, t, new_log_probs.gather(-1, sampled))
        entropy.index_copy_(1, t, torch.special.entr(probs).sum(-1, keepdim=True))
        t.add_(1)

    on_gpu = device.type == "cuda"
    for count in range(max_new_tokens):     # tokens of each response before this pass
        if count % BLOCK == 0:
            run = next_token        # the first token of a block runs eagerly
            cache.keys_read = count + BLOCK     # the last block reads fewer, all there are
        elif count % BLOCK == 1 and cuda_graph and on_gpu:
            # That was the warm-up, with as many keys. Recording computes nothing; the replays
            # compute this token and the rest of the block.
            run = recorded(next_token)
        run()
        # Asking a GPU makes the host wait for it, so it is not asked after every token.
        if count % 8 == 7 or not on_gpu:
            if torch.isin(ids[:, 1:count + 2], ends).any(1).all():
                break
    is_end = torch.isin(ids[:, 1:], ends)
    masks = is_end.cumsum(1) <= is_end      # no end token stands before it
    rollouts = []
    for i, prompt in enumerate(prompts):        # cut to the longest response of each group
        rows = slice(i * G, (i + 1) * G)
        R = int(masks[rows].sum(1).max())
        mask = masks[rows, :R]
        attention = cache.frame_attention[i, :, :R, :prompt.num_frames] * mask[:, :, None]
        rollouts.append(Rollout(
            prompt, ids[rows, 1:R + 1].where(mask, 0), mask, log_probs[rows, :R].where(mask, 0),
            entropy[rows, :R].where(mask, 0), attention))
    return rollouts


def recorded(function: Callable) -> Callable:
    """Record the kernels of a function as a CUDA graph: launching them one by one takes longer than
    they run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):    # others may use CUDA
        function()
    return graph.replay


# ------------------------------------------------- log-probabilities of a group, and its attention

class Policy(nn.Module):
    """The language model as a policy: log-probabilities of a group's responses.

    trainable: an fp32 copy of the model's weights; otherwise the model's own weights, as they are.
    """

    def __init__(self, model, temperature: float = 1.0, trainable: bool = True):
        super().__init__()
        modules = model.model.language_model, model.lm_head
        if trainable:
            modules = copy.deepcopy(modules)    # in one call: the two may share a weight
        self.language_model, self.lm_head = modules
        self.temperature = temperature
        self.excluded = excluded_token_ids(model)
        if trainable:
            self.float().requires_grad_(True).train()

    def forward(self, prompt: EncodedPrompt, response_ids: Tensor, response_mask: Tensor,
                keep_logits: bool = False, group: PackedGroup | None = None):
        """response_ids (G, R), response_mask bool (G, R)
        -> (log_probs (G, R), 0 in the padding; logits (G, R, V) in the compute type, or None)

        The logits, without gradient, are those of `sampling_logits`. group: made of the same prompt
        and mask, where the caller wants to read its attention.
        """
        group = group or PackedGroup(prompt, response_mask)
        targets = response_ids[response_mask]                                   # (T,)
        embeds = torch.cat([prompt_embeds(self.language_model, prompt),
                            self.language_model.embed_tokens(targets)])         # (P + T, H)
        response_positions = (prompt.next_position + group.column).expand(3, -1)
        positions = torch.cat([prompt.positions, response_positions], dim=1)    # (3, P + T)
        hidden = hidden_states(self.language_model, embeds[None], positions[:, None],
                               group.attend)
        hidden = hidden[0, group.query_places]                                  # (T, H)
        logits = None
        if keep_logits:
            logits = hidden.new_zeros(*response_ids.shape, self.lm_head.out_features)
        log_probs = []
        # In checkpointed chunks: the fp32 logits (T, V) of a 3B model would be the largest tensor
        # of the whole update.
        for start in range(0, len(targets), 512):
            chunk = slice(start, start + 512)
            chunk_log_probs, chunk_logits = checkpoint(self.head, hidden[chunk], targets[chunk],
                                                       use_reentrant=False)
            log_probs.append(chunk_log_probs)
            if keep_logits:
                places = group.row[chunk], group.column[chunk]
                logits[places] = chunk_logits.detach().to(logits.dtype)
            del chunk_logits    # before the next chunk's
        return group.unpack(torch.cat(log_probs)), logits

    def head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (T, H), targets (T,) -> log-probabilities (T,), logits (T, V)"""
        logits = sampling_logits(self.lm_head(hidden), self.excluded, self.temperature)
        return -F.cross_entropy(logits, targets, reduction="none"), logits


@torch.no_grad()
def frame_attention(policy: Policy, prompt: EncodedPrompt, response_ids: Tensor,
                    response_mask: Tensor, layers: int = 3) -> Tensor:
    """How much each token of given responses attends to each frame, whoever sampled them.

    The query is the one that predicted the token: the token before it, and the prompt's last for
    the first. Its attention weights are averaged over the visual tokens of a frame, over all heads
    and over the last layers (paper, section 3.2). `rollout` reads the same while it decodes.
    A token that attends evenly to the P tokens of a prompt, and to no other, has 1 / P for every
    frame.

    layers: how many of the last layers are read, at least 1
    response_ids (G, R), response_mask bool (G, R) -> fp32 (G, R, F), 0 in the padding
    """
    last_layers = range(len(policy.language_model.layers))[-layers:]
    group = PackedGroup(prompt, response_mask, last_layers)
    policy(prompt, response_ids, response_mask, group=group)    # FSDP gathers weights in forward
    return torch.stack(group.readings).mean(0) * response_mask[..., None]


def pool_attention(attentions: tuple, frame_of_token: Tensor, layers: int = 3) -> Tensor:
    """The same as `frame_attention`, from what transformers' `generate` returns.

    attentions: of generate(..., output_attentions=True, return_dict_in_generate=True): for each
        new token, for each layer, (G, heads, queries, keys); frame_of_token (P,), the frame of a
        video token, -1 elsewhere; layers: at least 1 -> fp32 (G, R, F). Padding is not masked.
    """
    P = len(frame_of_token)
    pooling = frame_pooling(frame_of_token, int(frame_of_token.max()) + 1)      # (P, F)
    tokens = []
    for of_layers in attentions:
        read = [weights[:, :, -1, :P].float().mean(1) for weights in of_layers[-layers:]]   # (G, P)
        tokens.append(torch.stack(read).mean(0) @ pooling)                      # (G, F)
    return torch.stack(tokens, dim=1)


def dummy_rollout(model) -> Rollout:
    """The smallest group that a policy can take, one prompt token and one response of one token:
    for a process that has none of its own while the others compute theirs together."""
    ids = end_token_ids(model)[:1]                                              # (1,)
    zeros = torch.zeros(1, 1, device=model.device)
    no_frame = torch.full_like(ids, -1)
    prompt = EncodedPrompt(ids, ids.new_zeros(3, 1), 1, ids < 0, zeros[:0], no_frame, 0)
    return Rollout(prompt, ids[None], zeros == 0, zeros, zeros, zeros.new_zeros(1, 1, 0))


def recompute_activations(language_model) -> None:
    """Gradient checkpointing of the layers: about a third more time for the update, much less
    memory."""
    if hasattr(language_model, "activation_checkpointing_enable"):
        language_model.activation_checkpointing_enable()    # transformers renamed it after 5.17
    else:
        language_model.gradient_checkpointing_enable()


# --------------------------------------------------------------------------------------- sharding

def shard(policy: Policy, device: torch.device, cpu_offload: bool = False) -> Policy:
    """FSDP2: parameters, gradients and optimizer states are split over the processes.

    On a GPU, computation is in bf16 and gradients are reduced in fp32. cpu_offload: what is split
    lies in host memory, and a layer's weights are on the GPU only while they are needed.
    """
    # Gathered weights stay from the forward to the backward pass, unless memory is short.
    options = dict(mesh=dist.init_device_mesh(device.type, (dist.get_world_size(),)),
                   mp_policy=MixedPrecisionPolicy(compute_type(device), torch.float32),
                   reshard_after_forward=cpu_offload)
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in (*policy.language_model.layers, policy):
        fully_shard(module, **options)
    return policy


@torch.no_grad()
def refresh(model, policy: Policy) -> None:
    """Copy the policy's weights into the rollout model. A collective call."""
    # The two are the same modules in the same order, so their parameters correspond. A weight that
    # the embedding and the head share is one parameter in both, and comes once.
    targets = Policy(model, trainable=False).parameters()
    for target, source in zip(targets, policy.parameters(), strict=True):
        source = source.to(target.device, target.dtype)     # before it is gathered: half the bytes
        target.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)


# ------------------------------------------------------------------- the run folder, and stopping

def read_log(log: Path) -> list[dict]:
    """The records of a .jsonl file; none if it does not exist. An unfinished last line, left by a
    killed run, is ignored."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]]


COMPLETE = "step-??????/state.json"     # in a run folder, of each checkpoint to resume from


class RunFolder:
    """A run's folder: config.json, logs, checkpoints to resume from, and the final checkpoint.

    All processes make the same calls; the first one writes. A new run moves an earlier one in the
    same folder aside, so nothing is lost. A resumed run cuts the logs back to its checkpoint; all
    its settings must be those of the run before, except those that `may_differ`.
    """

    def __init__(self, path: str, settings: dict, may_differ: set[str]):
        self.path, self.settings = Path(path), settings
        self.writes = dist.get_rank() == 0
        self.step = 0           # training steps done
        self.position = 0       # prompts taken from the stream
        self.unreadable = 0     # samples that could not be read
        self.not_finite: list[list[str]] = []   # samples of the last steps with a bad gradient
        if settings["resume"]:
            self.find_checkpoint(may_differ)
        else:
            self.check_place()

    def check_place(self) -> None:
        """The folder must not hold what the run needs, since the next run would move it aside."""
        for name in ("model", "data", "eval_data", "video_root"):
            for path in map(str.strip, str(self.settings.get(name) or "").split(",")):
                within = Path(path).resolve().is_relative_to(self.path.resolve())
                if os.path.exists(path) and within:
                    raise RunError(f"--output {self.path} holds --{name} {path}, and the next run "
                                   "would move it aside; give another --output")

    def find_checkpoint(self, may_differ: set[str]) -> None:
        config = self.path / "config.json"
        if not config.exists():
            raise RunError(f"{self.path}: no run to resume; leave out --resume or fix --output")
        for name, before in json.loads(config.read_text())["settings"].items():
            now = self.settings.get(name)
            if name not in may_differ and now != before:
                raise RunError(f"{name} is {now} and was {before} in {self.path}; resume with the "
                               "same settings")
        states = sorted(self.path.glob(COMPLETE))
        if states:
            # Its keys are the names of the attributes, as `save` writes them.
            vars(self).update(json.loads(states[-1].read_text()))
        elif (self.path / "checkpoint").exists():
            raise RunError(f"{self.path}: the run has finished, and has no checkpoint to resume "
                           "from; leave out --resume")

    @property
    def checkpoint(self) -> Path:
        """Of this step, to resume from."""
        return self.path / f"step-{self.step:06d}"

    def start_or_resume(self, model, policy, optimizer) -> None:
        """Prepare the folder and load the checkpoint, if there is one; the number of processes may
        have changed."""
        dist.barrier()      # all have looked for the checkpoint before the logs change
        if self.writes:
            with self.writing():
                if self.settings["resume"]:
                    self.clean_up()
                else:
                    self.start()
        dist.barrier()
        if self.step > 0:
            load_training_state(self.checkpoint / "training", policy, optimizer)
            refresh(model, policy)

    def start(self) -> None:
        if (self.path / "config.json").exists():
            aside, number = self.path, 0
            while aside.exists():
                number += 1
                aside = self.path.with_name(f"{self.path.name}.{number}")
            self.path.rename(aside)
            print(f"the earlier run is now {aside}", file=sys.stderr)
        self.path.mkdir(parents=True, exist_ok=True)
        config = {"settings": self.settings, "torch": torch.__version__,
                  "transformers": transformers.__version__, "processes": dist.get_world_size()}
        (self.path / "config.json").write_text(json.dumps(config, indent=1))

    def clean_up(self) -> None:
        """Drop what was logged after the checkpoint, and checkpoints that are not complete."""
        for unfinished in self.path.glob("*.partial"):
            shutil.rmtree(unfinished)
        last_step = self.step or -1     # without a checkpoint, what was logged at step 0 goes, too
        for log in self.path.glob("*.jsonl"):
            shortened = log.with_suffix(".cut")
            shortened.write_text("".join(json.dumps(record) + "\n" for record in read_log(log)
                                         if record["step"] <= last_step))
            shortened.replace(log)

    def log(self, name: str, *records: dict) -> None:
        if self.writes:
            with self.writing(), open(self.path / f"{name}.jsonl", "a") as file:
                for record in records:
                    print(json.dumps({"step": self.step} | record), file=file)

    def writing(self):
        return explained(f"{self.path}: cannot be written; make room on the disk, or give another "
                         "--output")

    def stop_if_failing(self, grad_norm: float, sample_ids: list[str],
                        skipped: list[dict]) -> None:
        """Raise RunError if too many samples are unreadable or too many steps were not finite."""
        self.unreadable += sum(record["unreadable"] for record in skipped)
        if self.unreadable > 0.05 * max(100, self.position):    # the first five never stop a run
            raise RunError(f"{self.unreadable} of {self.position} samples could not be read, over "
                           f"5%; fix the videos listed in {self.path / 'skipped.jsonl'}")
        self.not_finite = [] if math.isfinite(grad_norm) else [*self.not_finite, sample_ids]
        if len(self.not_finite) == 3:
            raise RunError("the gradient was not finite in 3 steps in a row; look at the samples "
                           f"{self.not_finite}, or lower the learning rate")

    def save(self, model, policy, optimizer) -> None:
        """A checkpoint of all that a resumed run needs."""
        state = {"step": self.step, "position": self.position, "unreadable": self.unreadable}
        save_checkpoint(self.checkpoint, model, self.settings["model"], policy, optimizer, state)
        if self.writes:
            for old in sorted(self.path.glob("step-??????"))[:-self.settings["keep"]]:
                shutil.rmtree(old)
        dist.barrier()      # no process ends while another one writes

    def finish(self, model) -> None:
        """The final checkpoint."""
        save_checkpoint(self.path / "checkpoint", model, self.settings["model"])
        dist.barrier()


# All that a Hugging Face folder of Qwen2.5-VL may hold beside the weights.
SOURCE_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json"]


def source_folder(source: str, local_files_only: bool = False) -> Path:
    """The folder of a model's files; all but its weights are fetched from the hub."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, allow_patterns=SOURCE_FILES,
                                  local_files_only=local_files_only))


def copy_source_files(source: str, folder: Path) -> None:
    with explained(f"{source}: its files are gone, and a checkpoint copies them; put them back and "
                   "continue with --resume"):
        files = source_folder(source, local_files_only=True)
    for name in SOURCE_FILES:
        (folder / name).unlink(missing_ok=True)     # transformers has rewritten some of them
        if (files / name).exists():
            shutil.copyfile(files / name, folder / name)


def save_checkpoint(folder: Path, model, source, policy=None, optimizer=None,
                    state: dict | None = None) -> None:
    """Write an ordinary Hugging Face folder; with a policy, also what a run resumes from: the
    policy's weights and the optimizer's moments, by all processes together, and the state.

    source: the name of the model whose files beside the weights are copied unchanged, so whatever
    loads the source loads the checkpoint; for a new model, its tokenizer. All is written to a
    sibling folder, which is renamed when complete.
    """
    partial_folder = folder.with_name(f"{folder.name}.partial")
    writes = not dist.is_initialized() or dist.get_rank() == 0
    with explained(f"{folder}: cannot be written; make room on the disk. Checkpoints in step-* are "
                   "complete, continue from them with --resume"):
        if writes:
            shutil.rmtree(partial_folder, ignore_errors=True)
            model.save_pretrained(partial_folder)
            if isinstance(source, str):
                copy_source_files(source, partial_folder)
            else:
                source.save_pretrained(partial_folder)
        if policy is not None:
            weights, moments = get_state_dict(policy, optimizer)
            try:
                checkpoints.save({"policy": weights, "optimizer": moments},
                                 checkpoint_id=partial_folder / "training")
            except checkpoints.CheckpointException as error:    # not an Exception
                raise OSError(str(error)[-200:]) from None      # the cause comes last
        if writes:
            if state is not None:
                (partial_folder / "state.json").write_text(json.dumps(state))
            shutil.rmtree(folder, ignore_errors=True)
            partial_folder.rename(folder)


def load_training_state(folder: Path, policy, optimizer) -> None:
    weights, moments = get_state_dict(policy, optimizer)
    # Not the options of the optimizer: they are this run's, as --cpu_offload may differ.
    checkpoints.load({"policy": weights, "optimizer": {"state": moments["state"]}},
                     checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)


@contextmanager
def stop_signals() -> Iterator[list[float]]:
    """Inside, SIGINT, SIGTERM and SIGHUP request a stop after this training step. Another one, more
    than 5 s later, exits at once: a job manager and torchrun may both send the first one. Yields
    the list of the times at which they came."""
    times = []

    def on_signal(number: int, _) -> None:
        times.append(time.monotonic())
        if times[-1] > times[0] + 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    # What is ignored stays so: under nohup a run outlives its terminal.
    before = {number: signal.signal(number, on_signal)
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield times
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------ the tiny built-in model

# Qwen's, but without the instruction about the format ("Output the thinking process ..."): the tiny
# model learns the format in its warm-up, and short prompts train twice as fast.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text.split(' Output the')[0] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|unknown|>")


def tiny_model(texts: list[str], seed: int = 0):
    """(model, tokenizer): a Qwen2.5-VL of 0.57M parameters with random weights, and a tokenizer
    whose entries are the words and marks of the texts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    words = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(Regex(r"</?\w+>|\w+|[^\w\s]"), "isolated")])
    vocabulary = list(SPECIAL_TOKENS)
    for text in texts:
        vocabulary += [word for word, _ in words.pre_tokenize_str(text)]
    ids = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    core = Tokenizer(models.WordLevel(ids, unk_token="<|unknown|>"))
    core.pre_tokenizer = words
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="<|unknown|>", additional_special_tokens=list(SPECIAL_TOKENS[1:7]),
        chat_template=CHAT_TEMPLATE)
    text_config = dict(
        vocab_size=len(ids), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=256, initializer_range=0.06, rms_norm_eps=1e-6,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]))
    vision_config = dict(
        depth=2, hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=128,
        fullatt_block_indexes=[1], tokens_per_second=2)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config, vision_config=vision_config, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        appo_built_in=True)     # for load_model, and the defaults of a tiny model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id)
    return prepare_model(model.eval()), tokenizer


def warm_up(new_model: Callable, stages: list, measure: Callable):
    """A tiny model that has learned the built-in task by supervision, as far as reinforcement
    learning needs.

    new_model(attempt): a model with new random weights for each attempt. stages: data.Stage, whose
    lessons are data.Lesson. measure(model): what `finished` of a stage takes.
    Raises RunError if no attempt learns it.
    """
    for attempt in range(5):    # some initialisations learn to answer without looking
        model = new_model(attempt)
        align_vision(model, stages[0].lessons)
        prompts = [lesson.prompt for lesson in stages[0].lessons]   # the same in all stages
        encoded = [prompt for start in range(0, len(prompts), 64)
                   for prompt in encode_prompts(model, prompts[start:start + 64])]
        if all(learn_answers(model, stage, encoded, measure) for stage in stages):
            return model
    raise RunError("the built-in model did not learn its task; try another --seed")


def batches_of(examples: list, size: int) -> Iterator[list]:
    """Endless batches of the examples, each drawn anew."""
    generator = torch.Generator().manual_seed(0)
    while True:
        numbers = torch.randperm(len(examples), generator=generator)[:size]
        yield [examples[number] for number in numbers]


def align_vision(model, lessons: list) -> None:
    """The vision tower learns to say what each visual token shows. Without this, the language model
    learns nothing."""
    embed_tokens = model.model.language_model.embed_tokens
    learning = nn.ModuleList([model.model.visual, embed_tokens]).requires_grad_(True)
    optimizer = torch.optim.AdamW(learning.parameters(), lr=2e-3)
    progress = tqdm(range(60), desc="warm-up: vision")
    for _, batch in zip(progress, batches_of(lessons, 16)):
        embeds = embed_visuals(model, [lesson.prompt for lesson in batch])
        # The shape and the colour that each visual token shows, or padding.
        words = torch.cat([lesson.token_words for lesson in batch])     # (visual tokens, 2)
        log_probs = (embeds @ embed_tokens.weight.mT).log_softmax(-1).gather(-1, words)
        # Three of four visual tokens show nothing.
        weights = torch.where(words == model.generation_config.pad_token_id, 0.3, 1.0)
        loss = -(log_probs * weights).sum() / weights.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


def learn_answers(model, stage, encoded: list[EncodedPrompt], measure: Callable) -> bool:
    """The language model learns to answer until the stage is finished; False if it never is."""
    policy = Policy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    batches = batches_of(list(zip(stage.lessons, encoded)), 4)
    for step, batch in zip(tqdm(range(1, 241), desc="warm-up: answers"), batches):
        optimizer.param_groups[0]["lr"] = stage.learning_rate * min(1, step / 20)
        for lesson, prompt in batch:
            log_probs, _ = policy(prompt, lesson.row_ids, lesson.row_mask)
            (-log_probs[lesson.target_mask].mean() / len(batch)).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % stage.check_every == 0:
            refresh(model, policy)
            if stage.finished(*measure(model)):
                return True
    return False
