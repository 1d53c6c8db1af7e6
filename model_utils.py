"""What the algorithm needs of Qwen2.5-VL, and of the machine.

From top to bottom: processes; loading; the prompt and its video, embedded once; attention of a
group; rollout; log-probabilities of a group and its attention to the frames; sharding; the run
folder; the tiny built-in model.

Two copies of the weights are at work. The *rollout model* is an ordinary Hugging Face model in the
compute type (bf16 on a GPU, fp32 on a CPU): it embeds videos, decodes, and is what a checkpoint
holds. The *policy* is the trained fp32 copy of its language model, sharded over the processes.
After each training step the rollout model is refreshed from the policy. The vision tower is
frozen, so one copy serves both.

Letters in shapes: P prompt tokens, G responses to a prompt (a group), R response tokens, T response
tokens of a group without padding, F frames, V vocabulary entries, H hidden size, D head size,
N prompts that decode together, B = N * G rows. A frame is a visual time step: Qwen2.5-VL merges two
sampled frames into one.
"""
import copy
import json
import os
import re
import shutil
import signal
import sys
import time
import types
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.utils import cached_file


class RunError(RuntimeError):
    """An error that the user can fix. The message is one line: what is wrong and how to fix it."""


def printable(text: str) -> str:
    """Text that is safe to print: names and responses may hold control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# -------------------------------------------------------------------------------------- processes

def init_processes() -> tuple[int, int, torch.device]:
    """(rank, world size, device). Without torchrun: a process group of one, so there is one path.

    Raises RunError if there is a GPU that torch cannot use: fp32 on the CPU would look hung.
    """
    cuda = torch.cuda.is_available()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if not cuda and not hidden and torch.version.cuda and Path("/dev/nvidiactl").exists():
        raise RunError(f"torch {torch.__version__} cannot use this machine's GPU; update its "
                       "driver, install a matching torch, or hide the GPU by "
                       'CUDA_VISIBLE_DEVICES=""')
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuDNN's backward pass of masked attention is reported to give NaN at some lengths
        # (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and Version(torch.__version__) < Version("2.9"):
        raise RunError(f"torch {torch.__version__} sums the gradients of several processes where "
                       "it should average them; install torch 2.9 or newer")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def gather(thing) -> list:
    """The thing of every process, in the order of the ranks. A collective call."""
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def compute_type(device: torch.device) -> torch.dtype:
    """In which type models compute. The policy's own weights are fp32 everywhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---------------------------------------------------------------------------------------- loading

def load_model(name: str, device: torch.device):
    """(model, tokenizer) of a Qwen2.5-VL folder or hub name.

    Raises RunError if it is of another type or lacks files or weights.
    """
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise RunError(f"{name}: no such folder; give a folder with config.json, tokenizer and "
                       "weights, or a hub name")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type != "qwen2_5_vl":
            raise OSError(f"it is of type {config.model_type}, and APPO needs Qwen2.5-VL")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        source_files(name, local_files_only=False)  # a checkpoint copies them
        model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name, dtype=compute_type(device), output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{name}: no usable model ({reason}); give a hub name or a folder with the "
                       "configuration, tokenizer and weights of a qwen2_5_vl model") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise RunError(f"{name}: the weights lack {len(missing)} tensors, the first {missing[0]}; "
                       "get the complete checkpoint")
    if getattr(config, "appo_built_in", False):
        torch.set_num_threads(1)    # operations this small mostly wait for other threads
    model = model.to(device).eval().requires_grad_(False)
    return prepare_model(model), tokenizer


def prepare_model(model):
    """Give a Qwen2.5-VL model the attention of this file, and make its vision tower faster.

    Outside of `rollout` and `Policy` it computes the same as before.
    """
    use_group_attention(model)
    for block in model.model.visual.blocks:
        block.attn.forward = types.MethodType(attend_in_windows, block.attn)
    if model.device.type == "cuda":
        # The patch embedding is a convolution whose kernel covers a whole patch. In bf16 some GPUs
        # take very long for it (transformers issue 45750), so it is a matrix product here.
        embed = model.model.visual.patch_embed
        embed.forward = lambda patches: F.linear(patches, embed.proj.weight.flatten(1))
    return model


def attend_in_windows(attention, hidden_states, cu_seqlens, position_embeddings, **kwargs):
    """Attention of a vision block, all windows of one length in one call.

    transformers calls the attention once per window: hundreds of times per video and block.
    hidden_states (L, H); cu_seqlens, where each window starts and the last one ends -> (L, H)
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
        attended = F.scaled_dot_product_attention(*windows, scale=attention.scaling)
        output = output.index_put((tokens,), attended.transpose(1, 2))
    return attention.proj(output.flatten(1))


# ------------------------------------------------------------------------ the prompt and its video

def mrope_positions(input_ids: Tensor, video_grids, image_grids, seconds_per_grid,
                    config) -> tuple[Tensor, int]:
    """Positions of a prompt in Qwen2.5-VL's three-dimensional rotary embedding.

    Text counts on by 1 in all three rows (time, height, width). The token of a video that starts
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
    for token, tokens in groupby(input_ids.tolist(), lambda id: id if id in grids else None):
        count = len(list(tokens))
        span = torch.arange(count).expand(3, -1)
        if token is not None and grids[token]:
            (t, h, w), seconds = grids[token].pop(0)
            time = (torch.arange(t, dtype=torch.float64) * seconds * tokens_per_second).long()
            rows, columns = torch.arange(h // merge), torch.arange(w // merge)
            span = torch.stack(torch.meshgrid(time, rows, columns, indexing="ij")).flatten(1)
        elif token is not None:
            count = -1      # more videos or images than grids
        if span.shape[1] != count:
            raise ValueError("the prompt's visual tokens do not match its grids")
        spans.append(position + span)
        position += int(span.max()) + 1
    if any(grids.values()):
        raise ValueError("the prompt has fewer videos or images than grids")
    return torch.cat(spans, dim=1).to(input_ids.device), position


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

    def frame_pooling(self) -> Tensor:
        """(P, F): column f averages over the visual tokens of frame f."""
        frames = torch.arange(self.num_frames, device=self.frame_of_token.device)
        belongs = self.frame_of_token[:, None] == frames
        return belongs / belongs.sum(0).clamp(min=1)


@torch.no_grad()
def encode_prompts(model, prompts: list,
                   patches: list[Tensor] | None = None) -> list[EncodedPrompt]:
    """Embed the videos and images of all prompts in one call of the vision tower.

    prompts: data.Prompt or anything with its fields, videos before images; patches: other patches
    of the same shapes, to take their place (the masked video of PAPO).
    """
    device, config = model.device, model.config
    visual_ids = torch.tensor([config.video_token_id, config.image_token_id])
    visual_masks = [torch.isin(prompt.input_ids, visual_ids) for prompt in prompts]
    grids = [grid for prompt in prompts for grid in prompt.video_grids + prompt.image_grids]
    embeds = torch.empty(0, config.text_config.hidden_size, device=device, dtype=model.dtype)
    if grids:
        if patches is None:
            patches = [prompt.patches for prompt in prompts]
        embeds = model.model.visual(torch.cat(patches).to(device, model.dtype),
                                    grid_thw=torch.tensor(grids, device=device)).pooler_output
    encoded = []
    of_prompts = embeds.split([int(mask.sum()) for mask in visual_masks])
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


def end_token_ids(model) -> Tensor:
    """Ids that end a response (Qwen: <|im_end|> and <|endoftext|>)."""
    ids = model.generation_config.eos_token_id
    return torch.tensor(ids if isinstance(ids, list) else [ids], device=model.device)


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
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return logits.index_fill_(-1, excluded, -torch.inf)


# -------------------------------------------------------------------------- attention of a group

def group_attention(module, query, key, value, attention_mask, scaling,
                    attend: Callable | None = None, **kwargs):
    """An attention function for transformers. A caller of the language model hands in `attend`,
    which knows which tokens form a group; transformers passes unknown keyword arguments on to the
    attention function. Without `attend`, this is transformers' own SDPA. Callers with `attend` give
    the dict {"full_attention": None} as attention_mask: then transformers builds no mask.

    attend(layer, query (B, heads, L, D), key (B, kv_heads, L, D), value, scaling)
        -> (B, L, heads, D)
    """
    if attend is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **kwargs)
    return attend(module.layer_idx, query, key, value, scaling), None


def use_group_attention(model) -> None:
    """Let a Hugging Face model call `group_attention`; its masks stay those of SDPA."""
    from transformers.masking_utils import sdpa_mask
    transformers.AttentionInterface.register("group_attention", group_attention)
    transformers.AttentionMaskInterface.register("group_attention", sdpa_mask)
    model.set_attn_implementation("group_attention")


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(B, heads, Q, D) queries over K >= Q keys; the last query sees all keys.

    Fused kernels, whose memory does not grow with Q * K; on a GPU flash attention.
    """
    from torch.nn.attention.bias import causal_lower_right      # slow to import
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                          enable_gqa=True)


def attention_scores(query: Tensor, keys: Tensor) -> Tensor:
    """query (X, Y, Q, D) and keys (X, Y, K, D) -> fp32 (X, Y, Q, K).

    The scores of Qwen often are in the thousands: in bf16 they would lose what the softmax depends
    on. The fused kernels keep them in fp32, too.
    """
    if keys.dtype == torch.float32:
        return query @ keys.mT
    scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)
    return scores.unflatten(0, keys.shape[:2])


class PackedGroup:
    """Attention over a prompt and all its responses in one sequence.

    The sequence is [prompt | response 1 | ... | response G] without padding, for all that works on
    single tokens. Only attention takes it apart: the prompt attends to itself, and the responses
    are G rows whose keys are [prompt | the response itself]. Both are causal. The result is that of
    G sequences [prompt | response], and the prompt is computed once.

    With read_layers, the last of the model's layers also note how much the responses attend to the
    frames: see `frame_attention`.
    """

    def __init__(self, prompt: EncodedPrompt, response_mask: Tensor, num_layers: int = 0,
                 read_layers: int = 0):
        self.prompt_length = len(prompt.input_ids)
        self.response_mask = response_mask                                      # (G, R)
        self.first_read_layer = num_layers - read_layers if read_layers else None
        self.pooling = prompt.frame_pooling()                                   # (P, F)
        self.frame_attention: list[Tensor] = []        # (G, R, F) of each layer that is read

    def to_rows(self, packed: Tensor) -> Tensor:
        """Response tokens (heads, T, D) -> (G, heads, R, D), zeros in the padding."""
        heads, _, head_dim = packed.shape
        rows = packed.new_zeros(*self.response_mask.shape, heads, head_dim)     # (G, R, heads, D)
        rows = rows.masked_scatter(self.response_mask[..., None, None], packed.transpose(0, 1))
        return rows.transpose(1, 2)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor,
               scaling: float) -> Tensor:
        """query (1, heads, P + T, D), key and value (1, kv_heads, P + T, D)
        -> (1, P + T, heads, D)"""
        P, G = self.prompt_length, len(self.response_mask)
        prompt_query, prompt_key, prompt_value = (x[:, :, :P] for x in (query, key, value))
        prompt_output = causal_attention(prompt_query, prompt_key, prompt_value, scaling)
        row_query, row_key, row_value = (self.to_rows(x[0, :, P:]) for x in (query, key, value))
        keys = torch.cat([prompt_key.expand(G, -1, -1, -1), row_key], dim=2)    # (G, kv, P + R, D)
        values = torch.cat([prompt_value.expand(G, -1, -1, -1), row_value], dim=2)
        row_output = causal_attention(row_query, keys, values, scaling)         # (G, heads, R, D)
        if self.first_read_layer is not None and layer >= self.first_read_layer:
            self.read_frames(prompt_query, row_query, keys, scaling)
        prompt_output = prompt_output[0].transpose(0, 1)                        # (P, heads, D)
        row_output = row_output.transpose(1, 2)[self.response_mask]             # (T, heads, D)
        return torch.cat([prompt_output, row_output])[None]

    def read_frames(self, prompt_query: Tensor, row_query: Tensor, keys: Tensor,
                    scaling: float) -> None:
        """Note a layer's attention to the frames, of the query that generated each token: the one
        before it, and the prompt's last for the first."""
        G, kv_heads, length, _ = keys.shape
        R = row_query.shape[2]
        first = prompt_query[:, :, -1:].expand(G, -1, -1, -1)
        query = torch.cat([first, row_query[:, :, :-1]], dim=2)                 # (G, heads, R, D)
        query = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)                # (G, kv, s * R, D)
        scores = attention_scores(query, keys) * scaling
        scores = scores.unflatten(2, (-1, R))                           # (G, kv, s, R, P + R)
        visible = torch.ones(R, length, dtype=torch.bool, device=keys.device)
        visible = visible.tril(self.prompt_length - 1)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        to_prompt = weights[..., :self.prompt_length].mean((1, 2))              # (G, R, P)
        self.frame_attention.append(to_prompt @ self.pooling)


class DecodingCache:
    """Keys and values of N prompts and of the B = N * G responses that decode together.

    A group's prompt is stored and read once, not once per response: the queries of its G rows stand
    side by side in one matrix product with the prompt's keys. Shorter prompts are padded and
    masked. All responses advance together: column t of the response keys belongs to the token that
    is fed at decoding position t, and column 0 to the last prompt token. In the last layers the
    attention to the frames is added to `frame_attention`; no other attention weights outlive their
    layer.

    All that changes from token to token is written in place, `column` too, so that a CUDA graph can
    replay it. `width` columns are read, those after `column` masked.
    """

    def __init__(self, language_model, prompts: list[EncodedPrompt], group_size: int,
                 max_new_tokens: int, attention_layers: int):
        attention = language_model.layers[0].self_attn
        head_dim = attention.head_dim
        kv_heads = attention.k_proj.out_features // head_dim
        num_layers, device = len(language_model.layers), prompts[0].input_ids.device
        # The last prompt token is left to the first decoding position, which has its logits.
        self.lengths = [len(prompt.input_ids) - 1 for prompt in prompts]
        longest = max(self.lengths) + -max(self.lengths) % 8    # GPUs like rows of whole 16 bytes
        N, num_frames = len(prompts), max(prompt.num_frames for prompt in prompts)
        self.group_size, self.width = group_size, max_new_tokens
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.columns = torch.arange(max_new_tokens, device=device)
        self.attention_layers = min(attention_layers, num_layers)
        self.first_read_layer = num_layers - self.attention_layers
        zeros = partial(torch.zeros, dtype=language_model.dtype, device=device)
        self.prompt = zeros(num_layers, 2, N, kv_heads, longest, head_dim)
        self.response = zeros(num_layers, 2, N * group_size, kv_heads, max_new_tokens, head_dim)
        self.padding = torch.ones(N, 1, 1, longest, dtype=torch.bool, device=device)
        self.pooling = torch.zeros(N, longest, num_frames, device=device)
        for i, (prompt, length) in enumerate(zip(prompts, self.lengths)):
            self.padding[i, ..., :length] = False
            self.pooling[i, :length, :prompt.num_frames] = prompt.frame_pooling()[:length]
        self.frame_attention = torch.zeros(N, group_size, max_new_tokens, num_frames, device=device)

    def prefill(self, number: int, layer: int, query: Tensor, key: Tensor, value: Tensor,
                scaling: float) -> Tensor:
        """Attention of prompt `number` to itself; its keys and values are stored."""
        stored = self.prompt[layer, :, number, :, :self.lengths[number]]        # (2, kv, P - 1, D)
        stored[0], stored[1] = key[0], value[0]
        return causal_attention(query, key, value, scaling).transpose(1, 2)

    def decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor,
               scaling: float) -> Tensor:
        """Attention of one new token per row, computed eagerly so that its weights can be read.

        query (B, heads, 1, D), key and value (B, kv_heads, 1, D) -> (B, 1, heads, D)
        """
        rows, heads, _, head_dim = query.shape
        self.response[layer, 0].index_copy_(2, self.column, key)
        self.response[layer, 1].index_copy_(2, self.column, value)
        prompt_keys, prompt_values = self.prompt[layer]                         # (N, kv, P, D)
        keys, values = self.response[layer, :, :, :, :self.width]               # (B, kv, width, D)
        query = query.view(rows, keys.shape[1], -1, head_dim)                   # (B, kv, s, D)
        prompt_scores = attention_scores(self.to_groups(query), prompt_keys)
        prompt_scores = self.to_rows(prompt_scores.masked_fill(self.padding, -torch.inf))
        ahead = self.columns[:self.width] > self.column
        response_scores = attention_scores(query, keys).masked_fill(ahead, -torch.inf)
        scores = torch.cat([prompt_scores, response_scores], dim=-1) * scaling
        weights = scores.softmax(-1)                                    # (B, kv, s, P + width)
        to_prompt, to_response = weights.split([prompt_keys.shape[2], self.width], dim=-1)
        if layer >= self.first_read_layer:
            mean = to_prompt.mean((1, 2)).unflatten(0, (-1, self.group_size))   # (N, G, P)
            to_frames = (mean @ self.pooling)[:, :, None]                       # (N, G, 1, F)
            self.frame_attention.index_add_(2, self.column, to_frames,
                                            alpha=1 / self.attention_layers)
        prompt_output = self.to_groups(to_prompt.to(values.dtype)) @ prompt_values
        output = self.to_rows(prompt_output) + to_response.to(values.dtype) @ values
        return output.reshape(rows, 1, heads, head_dim)

    def to_groups(self, x: Tensor) -> Tensor:
        """(B, kv_heads, s, X) -> (N, kv_heads, G * s, X), s query heads that share a key head."""
        return x.unflatten(0, (-1, self.group_size)).transpose(1, 2).flatten(2, 3)

    def to_rows(self, x: Tensor) -> Tensor:
        """(N, kv_heads, G * s, X) -> (B, kv_heads, s, X)"""
        return x.unflatten(2, (self.group_size, -1)).transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------------------------------- rollout

@dataclass
class Rollout:
    """G responses to one prompt."""
    prompt: EncodedPrompt
    response_ids: Tensor        # (G, R)
    response_mask: Tensor       # bool (G, R), true up to the end token and on it
    log_probs: Tensor           # (G, R), as sampled
    entropy: Tensor             # (G, R), of the distributions sampled from
    frame_attention: Tensor     # (G, R, F), see the function of that name; 0 if no layer is read


# By how many response columns the keys that decoding reads grow at a time, and how many tokens
# share a CUDA graph. A multiple of 8, since a GPU is asked every 8 tokens whether all rows have
# ended. Only one graph lives at a time: to free one while another shares its cuBLAS workspace is an
# error (pytorch issue 193402).
BLOCK = 128


@torch.no_grad()
def rollout(model, prompts: list[EncodedPrompt], uniforms: Tensor, *, temperature: float = 1.0,
            attention_layers: int = 3, choose: Callable | None = None,
            cuda_graph: bool = False) -> list[Rollout]:
    """Sample G responses to each of N prompts, all N * G rows decoding together.

    uniforms: float64 (N, G, max_new_tokens) in [0, 1), the only source of randomness: token t is
        the one at which the cumulative distribution passes uniforms[..., t].
    attention_layers: how many of the last layers' attention to the frames is read.
    choose(logits (B, V), ids (B, max_new_tokens)) -> ids (B,): replaces sampling. Places of `ids`
        that are still to come repeat the last prompt token.
    cuda_graph: record decoding on a GPU and replay it, `choose` with it.
    """
    decoder = Decoder(model, prompts, uniforms, temperature, attention_layers, choose)
    max_new_tokens = uniforms.shape[-1]
    on_gpu = model.device.type == "cuda"
    for t in range(max_new_tokens):
        if t % BLOCK == 0:
            next_token = decoder.next_token
            decoder.cache.width = min(t + BLOCK, max_new_tokens)
        elif t % BLOCK == 1 and cuda_graph and on_gpu:
            # The token before it ran eagerly at this width, which was the warm-up. Recording
            # computes nothing; the replays compute this token and the rest of the block.
            next_token = recorded(decoder.next_token)
        next_token()
        # Asking a GPU makes the host wait for it, so it is not asked after every token.
        if (t % 8 == 7 or not on_gpu) and decoder.all_ended():
            break
    return decoder.rollouts()


def recorded(function: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of a function as a CUDA graph: launching them one by one takes longer than
    they run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


class Decoder:
    """The state of a rollout. Everything stays on the device and at its address."""

    def __init__(self, model, prompts, uniforms, temperature, attention_layers, choose):
        N, G, max_new_tokens = uniforms.shape
        device = model.device
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.prompts, self.temperature, self.choose = prompts, temperature, choose
        self.uniforms = uniforms.to(device).flatten(0, 1)                       # (B, R)
        self.ends, self.excluded = end_token_ids(model), excluded_token_ids(model)
        self.cache = DecodingCache(self.language_model, prompts, G, max_new_tokens,
                                   attention_layers)
        for number, prompt in enumerate(prompts):       # once per group, without its last token
            self.language_model(
                inputs_embeds=prompt_embeds(self.language_model, prompt)[None, :-1],
                position_ids=prompt.positions[:, None, :-1], use_cache=False,
                attention_mask={"full_attention": None},
                attend=partial(self.cache.prefill, number))

        def per_row(values: list[Tensor]) -> Tensor:
            return torch.stack(values, dim=-1).repeat_interleave(G, dim=-1)

        self.token = per_row([prompt.input_ids[-1] for prompt in prompts])      # (B,), fed next
        self.last_position = per_row([prompt.positions[:, -1] for prompt in prompts])   # (3, B)
        starts = [torch.tensor(prompt.next_position, device=device) for prompt in prompts]
        self.next_position = per_row(starts)                                    # (B,)
        self.ids = self.token[:, None].repeat(1, max_new_tokens)                # (B, R)
        self.lengths = torch.full_like(self.token, max_new_tokens)              # (B,)
        self.log_probs = torch.zeros(self.uniforms.shape, device=device)        # (B, R)
        self.entropy = torch.zeros_like(self.log_probs)

    def next_token(self) -> None:
        """Feed the last token of every row and sample the next one."""
        column = self.cache.column
        position = torch.where(column == 0, self.last_position, self.next_position + column - 1)
        hidden = self.language_model(
            inputs_embeds=self.language_model.embed_tokens(self.token)[:, None],
            position_ids=position[:, :, None], attention_mask={"full_attention": None},
            use_cache=False, attend=self.cache.decode).last_hidden_state[:, 0]  # (B, H)
        logits = sampling_logits(self.lm_head(hidden), self.excluded, self.temperature)
        log_probs = logits.log_softmax(-1)                                      # (B, V)
        probs = log_probs.exp()
        if self.choose is None:
            cumulative = probs.cumsum(-1, dtype=torch.float64)
            threshold = self.uniforms.index_select(1, column) * cumulative[:, -1:]
            sampled = torch.searchsorted(cumulative, threshold, right=True)     # (B, 1)
            sampled = sampled.clamp(max=logits.shape[-1] - 1)
        else:
            sampled = self.choose(logits, self.ids)[:, None]
        self.ids.index_copy_(1, column, sampled)
        self.log_probs.index_copy_(1, column, log_probs.gather(-1, sampled))
        entropy = torch.special.entr(probs).sum(-1, keepdim=True)
        self.entropy.index_copy_(1, column, entropy)
        column.add_(1)
        self.token.copy_(sampled[:, 0])
        running = self.lengths == self.ids.shape[1]
        ends_here = (sampled == self.ends).any(-1) & running
        self.lengths.copy_(torch.where(ends_here, column, self.lengths))

    def all_ended(self) -> bool:
        return bool((self.lengths <= self.cache.column).all())

    def rollouts(self) -> list[Rollout]:
        """The responses of each prompt, cut to the longest of its group."""
        rollouts, G = [], self.cache.group_size
        for i, prompt in enumerate(self.prompts):
            rows = slice(i * G, (i + 1) * G)
            lengths = self.lengths[rows]
            R = int(lengths.max())
            mask = torch.arange(R, device=lengths.device) < lengths[:, None]    # (G, R)
            ids, log_probs, entropy = (x[rows, :R].where(mask, 0)
                                       for x in (self.ids, self.log_probs, self.entropy))
            attention = self.cache.frame_attention[i, :, :R, :prompt.num_frames] * mask[:, :, None]
            rollouts.append(Rollout(prompt, ids, mask, log_probs, entropy, attention))
        return rollouts


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
        self.register_buffer("excluded", excluded_token_ids(model), persistent=False)
        if trainable:
            self.float().requires_grad_(True).train()

    def forward(self, prompt: EncodedPrompt, response_ids: Tensor, response_mask: Tensor,
                keep_logits: bool = False, group: PackedGroup | None = None):
        """response_ids (G, R), response_mask bool (G, R)
        -> (log_probs (G, R), 0 in the padding; logits (G, R, V) in the compute type, or None)

        The logits, without gradient, are those of the distributions the tokens were sampled from.
        """
        group = group or PackedGroup(prompt, response_mask)
        row, column = response_mask.nonzero(as_tuple=True)                      # (T,) each
        P, T = len(prompt.input_ids), len(row)
        targets = response_ids[response_mask]                                   # (T,)
        embeds = torch.cat([prompt_embeds(self.language_model, prompt),
                            self.language_model.embed_tokens(targets)])         # (P + T, H)
        response_positions = (prompt.next_position + column).expand(3, -1)
        positions = torch.cat([prompt.positions, response_positions], dim=1)    # (3, P + T)
        hidden = self.language_model(
            inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False,
            attention_mask={"full_attention": None}, attend=group.attend).last_hidden_state[0]
        # The distribution of a token comes from the place before it: in the packed sequence, and
        # for the first token of a response at the end of the prompt.
        before = torch.arange(P - 1, P + T - 1, device=row.device)
        hidden = hidden[before.where(column > 0, P - 1)]                        # (T, H)
        logits = hidden.new_empty(0)
        if keep_logits:
            logits = hidden.new_zeros(*response_ids.shape, self.lm_head.out_features)
        chunks = []
        # In checkpointed chunks: the fp32 logits (T, V) of a 3B model would be the largest tensor
        # of the whole update.
        for start in range(0, T, 512):
            chunk = slice(start, start + 512)
            log_probs, chunk_logits = checkpoint(self.head, hidden[chunk], targets[chunk],
                                                 use_reentrant=False)
            chunks.append(log_probs)
            if keep_logits:
                logits[row[chunk], column[chunk]] = chunk_logits.detach().to(logits.dtype)
            del chunk_logits    # before the next chunk's
        result = hidden.new_zeros(response_mask.shape, dtype=torch.float32)     # (G, R)
        result = result.masked_scatter(response_mask, torch.cat(chunks))
        return result, logits if keep_logits else None

    def head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (T, H), targets (T,) -> log-probabilities (T,), logits (T, V)"""
        logits = sampling_logits(self.lm_head(hidden), self.excluded, self.temperature)
        log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return log_probs, logits


@torch.no_grad()
def frame_attention(policy: Policy, prompt: EncodedPrompt, response_ids: Tensor,
                    response_mask: Tensor, layers: int = 3) -> Tensor:
    """How much each token of given responses attends to each frame, whoever sampled them.

    The query is the one that generated the token: the token before it, and the prompt's last for
    the first. Its attention weights are averaged over the visual tokens of a frame, over all heads
    and over the last layers (paper, section 3.2). `rollout` reads the same while it decodes.
    A token that attends evenly to a prompt of P tokens has 1 / P for every frame.

    response_ids (G, R), response_mask bool (G, R) -> fp32 (G, R, F), 0 in the padding
    """
    num_layers = len(policy.language_model.layers)
    group = PackedGroup(prompt, response_mask, num_layers, min(layers, num_layers))
    policy(prompt, response_ids, response_mask, group=group)
    return torch.stack(group.frame_attention).mean(0) * response_mask[..., None]


def pool_attention(attentions: tuple, frame_of_token: Tensor, layers: int = 3) -> Tensor:
    """The same as `frame_attention`, from what transformers' `generate` returns.

    attentions: of generate(..., output_attentions=True, return_dict_in_generate=True): for each
        new token, for each layer, (G, heads, queries, keys); frame_of_token (P,), the frame of a
        video token, -1 elsewhere -> fp32 (G, R, F). Padding is not masked.
    """
    P = len(frame_of_token)
    num_frames = int(frame_of_token.max()) + 1
    frames = torch.arange(num_frames, device=frame_of_token.device)
    pooling = (frame_of_token[:, None] == frames).float()                       # (P, F)
    pooling = pooling / pooling.sum(0).clamp(min=1)
    tokens = []
    for of_layers in attentions:
        read = [weights[:, :, -1, :P].float().mean(1) for weights in of_layers[-layers:]]   # (G, P)
        tokens.append(torch.stack(read).mean(0) @ pooling)                      # (G, F)
    return torch.stack(tokens, dim=1)


def dummy_rollout(model) -> Rollout:
    """The smallest group that a policy can take: one prompt token, one response of one token."""
    ids = end_token_ids(model)[:1]                                              # (1,)
    no_visual = torch.zeros(0, model.config.text_config.hidden_size, device=model.device)
    prompt = EncodedPrompt(input_ids=ids, positions=ids.new_zeros(3, 1), next_position=1,
                           visual_mask=ids < 0, visual_embeds=no_visual,
                           frame_of_token=ids.new_full((1,), -1), num_frames=0)
    zeros = torch.zeros(1, 1, device=model.device)
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
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy()
    if device.type == "cuda":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # Gathered weights stay from the forward to the backward pass, unless memory is short.
    options = dict(mesh=mesh, mp_policy=precision, reshard_after_forward=cpu_offload)
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for layer in policy.language_model.layers:
        fully_shard(layer, **options)
    return fully_shard(policy, **options)


@torch.no_grad()
def refresh(model, policy: Policy) -> None:
    """Copy the policy's weights into the rollout model. A collective call."""
    targets = nn.ModuleList([model.model.language_model, model.lm_head]).parameters()
    for target, source in zip(targets, policy.parameters(), strict=True):
        source = source.to(target.device, target.dtype)     # before it is gathered: half the bytes
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)


# ------------------------------------------------------------------- the run folder, and stopping

def read_log(log: Path) -> list[dict]:
    """The records of a .jsonl file; none if it does not exist."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines()]


class RunFolder:
    """A run's folder: config.json, logs, checkpoints to resume from, and the final checkpoint.

    All processes make the same calls; the first one writes. A new run moves an earlier one in the
    same folder aside, so nothing is lost. A resumed run cuts the logs back to its checkpoint; all
    its settings must be those of the run before, except those that `may_differ`.
    """

    def __init__(self, path: str, settings: dict, may_differ: tuple[str, ...]):
        self.path, self.settings = Path(path), settings
        self.writes = dist.get_rank() == 0
        self.step = 0           # training steps done
        self.position = 0       # prompts taken from the stream
        self.unreadable = 0     # samples that could not be read
        self.not_finite: list[list[str]] = []   # samples of the last steps with a bad gradient
        self.checkpoint: Path | None = None     # to resume from
        if settings["resume"]:
            self.find_checkpoint(may_differ)
        model = Path(settings.get("model") or "").resolve()
        if not settings["resume"] and self.path.resolve() in (model, *model.parents):
            raise RunError(f"--output {self.path} holds the model {settings['model']}, and a new "
                           "run moves it aside; give another --output")

    def start_or_resume(self, model, policy, optimizer) -> None:
        """Prepare the folder and load the checkpoint, if there is one; the number of processes may
        have changed."""
        dist.barrier()      # all have looked for the checkpoint before the logs change
        if self.writes and self.settings["resume"]:
            self.cut_logs()
        elif self.writes:
            self.start()
        dist.barrier()
        if self.checkpoint is not None:
            load_training_state(self.checkpoint / "training", policy, optimizer)
            refresh(model, policy)

    def start(self) -> None:
        if (self.path / "config.json").exists():
            number = 1
            while self.path.with_name(f"{self.path.name}.{number}").exists():
                number += 1
            aside = self.path.with_name(f"{self.path.name}.{number}")
            self.path.rename(aside)
            print(f"the earlier run is now {aside}", file=sys.stderr)
        self.path.mkdir(parents=True, exist_ok=True)
        config = {"settings": self.settings, "torch": torch.__version__,
                  "transformers": transformers.__version__, "processes": dist.get_world_size()}
        (self.path / "config.json").write_text(json.dumps(config, indent=1))

    def find_checkpoint(self, may_differ: tuple[str, ...]) -> None:
        config = self.path / "config.json"
        if not config.exists():
            raise RunError(f"{self.path}: no run to resume; leave out --resume or fix --output")
        for name, before in json.loads(config.read_text())["settings"].items():
            now = self.settings.get(name)
            if name not in (*may_differ, "resume") and now != before:
                raise RunError(f"--{name} is {now} and was {before} in {self.path}; resume with "
                               "the same settings")
        complete = [state.parent for state in sorted(self.path.glob("step-??????/state.json"))]
        if not complete and (self.path / "checkpoint").exists():
            raise RunError(f"{self.path}: the run has finished, and has no checkpoint to resume "
                           "from; leave out --resume")
        if complete:
            self.checkpoint = complete[-1]
            state = json.loads((self.checkpoint / "state.json").read_text())
            self.step, self.position = state["step"], state["position"]
            self.unreadable = state["unreadable"]

    def cut_logs(self) -> None:
        """Drop what was logged after the checkpoint; a killed run may end in half a line."""
        for name in ("metrics", "samples", "skipped", "held_out"):
            log = self.path / f"{name}.jsonl"
            if not log.exists():
                continue
            lines = log.read_text().splitlines(keepends=True)
            complete = [line for line in lines if line.endswith("\n")]
            before = []
            if self.checkpoint is not None:
                before = [line for line in complete if json.loads(line)["step"] <= self.step]
            cut = log.with_suffix(".cut")
            cut.write_text("".join(before))
            cut.replace(log)

    def log(self, name: str, *records: dict) -> None:
        if self.writes:
            with open(self.path / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def stop_if_failing(self, grad_norm: float, sample_ids: list[str],
                        skipped: list[dict]) -> None:
        """Raise RunError if too many samples are unreadable or too many steps were not finite."""
        self.unreadable += sum(record["unreadable"] for record in skipped)
        if self.unreadable > 0.05 * max(100, self.position):
            raise RunError(f"{self.unreadable} of {self.position} samples could not be read, over "
                           f"5%; fix the videos listed in {self.path / 'skipped.jsonl'}")
        self.not_finite.append(sample_ids)
        if torch.tensor(grad_norm).isfinite():
            self.not_finite.clear()
        if len(self.not_finite) == 3:
            raise RunError("the gradient was not finite in 3 steps in a row; look at the samples "
                           f"{self.not_finite}, or lower the learning rate")

    def save(self, model, tokenizer, source: str, policy, optimizer) -> None:
        """A checkpoint of all that a resumed run needs."""
        state = {"step": self.step, "position": self.position, "unreadable": self.unreadable}
        save_checkpoint(self.path / f"step-{self.step:06d}", model, tokenizer, source, policy,
                        optimizer, state)
        if self.writes:
            for old in sorted(self.path.glob("step-??????"))[:-self.settings["keep"]]:
                shutil.rmtree(old)
        dist.barrier()      # no process ends while another one writes

    def finish(self, model, tokenizer, source: str) -> None:
        """The final checkpoint."""
        save_checkpoint(self.path / "checkpoint", model, tokenizer, source)
        dist.barrier()


def save_training_state(folder: Path, policy, optimizer) -> None:
    """The policy's weights and the optimizer's moments, by all processes together."""
    import torch.distributed.checkpoint as checkpoints                      # slow to import
    from torch.distributed.checkpoint.state_dict import get_state_dict
    try:
        weights, moments = get_state_dict(policy, optimizer)
        checkpoints.save({"policy": weights, "optimizer": moments}, checkpoint_id=folder)
    except checkpoints.CheckpointException as error:
        raise OSError(str(error)) from error


def load_training_state(folder: Path, policy, optimizer) -> None:
    import torch.distributed.checkpoint as checkpoints
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    weights, moments = get_state_dict(policy, optimizer)
    checkpoints.load({"policy": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)


# All that a Hugging Face folder of Qwen2.5-VL may hold beside the weights.
SOURCE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json")


def save_checkpoint(folder: Path, model, tokenizer, source: str | None, policy=None,
                    optimizer=None, state: dict | None = None) -> None:
    """Write an ordinary Hugging Face folder; with a policy, also what a run resumes from.

    The files beside the weights are those of the `source` model, unchanged, so whatever loads the
    source loads the checkpoint. All is written to a folder beside, which is renamed when complete.
    """
    folder = Path(folder)
    partial_folder = Path(f"{folder}.partial")
    writes = not dist.is_initialized() or dist.get_rank() == 0
    try:
        if writes:
            shutil.rmtree(partial_folder, ignore_errors=True)
            model.save_pretrained(partial_folder)
            if source is None:
                tokenizer.save_pretrained(partial_folder)
            else:
                copy_source_files(source, partial_folder)
        if policy is not None:
            save_training_state(partial_folder / "training", policy, optimizer)
        if writes:
            if state is not None:
                (partial_folder / "state.json").write_text(json.dumps(state))
            if folder.exists():
                shutil.rmtree(folder)
            partial_folder.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[-300:]    # the cause comes last
        raise RunError(f"{folder}: cannot be written ({reason}); make room on the disk. The last "
                       "complete checkpoint is intact, continue with --resume") from error


def source_files(source: str, local_files_only: bool) -> dict[str, str]:
    """The path of each file beside the weights; files of the hub are fetched into its cache."""
    paths = {}
    for name in SOURCE_FILES:
        path = cached_file(source, name, local_files_only=local_files_only,
                           _raise_exceptions_for_missing_entries=False)
        if path is not None:
            paths[name] = path
    return paths


def copy_source_files(source: str, folder: Path) -> None:
    for written in [*folder.glob("config.json"), *folder.glob("generation_config.json")]:
        written.unlink()
    files = source_files(source, local_files_only=True)
    if "config.json" not in files:
        raise RunError(f"{source}: its files are gone, and a checkpoint copies them; put them back "
                       "and continue with --resume")
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


class StopRequest:
    """Whether a signal requested a stop."""

    def __init__(self):
        self.requested, self.at = False, 0.0

    def on_signal(self, number: int, _) -> None:
        """First signal: stop after this training step. Another one, more than 5 s later: exit at
        once. A job manager and torchrun may both send the first one."""
        if self.requested and time.monotonic() > self.at + 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.requested:
            self.requested, self.at = True, time.monotonic()


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM request a stop; afterwards the handlers are as before."""
    request, before = StopRequest(), {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, request.on_signal)
    try:
        yield request
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
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]))
    vision_config = dict(
        depth=2, hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=128,
        fullatt_block_indexes=[1], tokens_per_second=2)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config, vision_config=vision_config, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        appo_built_in=True)     # its own settings go with it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"])
    return prepare_model(model.eval()), tokenizer


def warm_up(new_model: Callable, stages: list[tuple], measure: Callable):
    """A tiny model that has learned the built-in task by supervision, as far as reinforcement
    learning needs.

    new_model(attempt): a model with other random weights for each attempt.
    stages: (lessons, learning rate, steps between measurements, good_enough) of each.
        A lesson has a `prompt` up to the end of its video; token_words (visual tokens, 2), the two
        words that name what a visual token shows, the padding id where it shows nothing;
        response_ids, response_mask and target_mask (questions, R), the rest of the prompts with the
        responses, and which of those tokens to learn.
    measure(model): what good_enough takes.
    Raises RunError if no attempt learns it.
    """
    for attempt in range(5):    # some initialisations learn to answer without looking
        model = new_model(attempt)
        align_vision(model, stages[0][0])
        if all(learn_answers(model, *stage, measure) for stage in stages):
            return model
    raise RunError("the built-in model did not learn its task; try another --seed")


def batches_of(count: int, size: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randperm(count, generator=generator)[:size].tolist()


def align_vision(model, lessons: list, steps: int = 60) -> None:
    """The vision tower learns to say what each visual token shows. Without it, nothing is
    learned."""
    embed_tokens = model.model.language_model.embed_tokens
    parameters = [*model.model.visual.parameters(), *embed_tokens.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    batches = batches_of(len(lessons), 16)
    for _ in tqdm(range(steps), desc="warm-up: vision"):
        batch = [lessons[number] for number in next(batches)]
        grids = torch.tensor([grid for lesson in batch for grid in lesson.prompt.video_grids])
        patches = torch.cat([lesson.prompt.patches for lesson in batch])
        embeds = model.model.visual(patches, grid_thw=grids).pooler_output
        words = torch.cat([lesson.token_words for lesson in batch])     # (visual tokens, 2)
        log_probs = (embeds @ embed_tokens.weight.mT).log_softmax(-1).gather(-1, words)
        empty = words == model.generation_config.pad_token_id
        weights = torch.where(empty, 0.3, 1.0)      # three of four cells are empty
        loss = -(log_probs * weights).sum() / weights.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


def learn_answers(model, lessons: list, learning_rate: float, check_every: int,
                  good_enough: Callable, measure: Callable, max_steps: int = 240) -> bool:
    """The language model learns to answer until it is good enough; False if it fails."""
    encoded = []
    for start in range(0, len(lessons), 64):
        encoded += encode_prompts(model, [lesson.prompt for lesson in lessons[start:start + 64]])
    policy = Policy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, betas=(0.9, 0.98),
                                  weight_decay=0.01)
    batches = batches_of(len(lessons), 4)
    for step in tqdm(range(1, max_steps + 1), desc="warm-up: answers"):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, step / 20)
        batch = next(batches)
        for number in batch:
            lesson = lessons[number]
            log_probs, _ = policy(encoded[number], lesson.response_ids, lesson.response_mask)
            loss = -log_probs[lesson.target_mask].mean()
            (loss / len(batch)).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % check_every == 0:
            refresh(model, policy)
            if good_enough(*measure(model)):
                return True
    return False
