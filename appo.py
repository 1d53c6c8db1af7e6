"""APPO: Attention-guided Perception Policy Optimization (Du et al. 2026, arXiv 2602.23823).

APPO trains a video-language model to look at the right frames. Correct responses tend to attend to
the frames that matter; APPO gives the tokens that attend to those frames a larger weight in the
policy gradient. Everything else is DAPO: groups of responses to the same prompt, advantages
relative to the group, and a clipped surrogate loss averaged over a group's tokens. DAPO's dynamic
sampling and overlong penalty are options, off by default: the paper's runs do not use them.

One training step:
  1. read     the prompts of the batch (other processes decode the videos ahead of time)
  2. sample   G responses to each prompt, and read how much every token attends to every frame
  3. score    the responses: rewards (for multiple choice 0.9 * accuracy + 0.1 * format, for others
              see `data.task_reward`), and advantages relative to the group
  4. frames   find the crucial frames: those that the correct responses attend to most
  5. weights  in every response, correct or not, the tokens that attend most to a crucial frame
              weigh 1 + alpha * D; D, 0 to 1, is how much the responses' next-token distributions
              differ there
  6. update   clipped policy gradient, with weight * advantage in place of the advantage

First come steps 3 to 6 as functions of tensors, then the settings (skip them at first), then
`training_step` and what it calls, then the loop.

Shapes: G responses to a prompt (a group), R response tokens, F frames, C of them crucial, V entries
of the vocabulary. Responses are padded to R; response_mask is true on real tokens, the end token
included.

A frame is a visual time step: Qwen2.5-VL merges two sampled frames into one, so 16 sampled frames
make F = 8. frame_attention (G, R, F) says how much a response token attends to a frame: the softmax
weight from the position that predicts the token (the one before it) to a visual token of the frame,
averaged over the frame's visual tokens, over all heads and over the last `attention_layers` layers.

Up to three copies of the language model exist. The *model* samples; it is not sharded, and in bf16
on a GPU. The *policy* is trained; its weights are fp32, but on a GPU it also computes in bf16. It
is split over the processes, and copied into the model after each step. The *reference* is the start
model, not split; only a KL term needs it. The vision tower is frozen, as in the paper, so the
model's serves all three. No loss acts on the attention itself: it only decides which tokens weigh
more. With several processes, each takes a share of a batch's prompts, and all update the same
policy.

The baselines are included. GRPO adds beta * KL(policy || reference) to the loss, and PAPO (arXiv
2507.06448) adds -gamma * KL(policy || policy given a masked video) + eta * entropy to the loss of
GRPO or DAPO. Their functions follow the loop.

    torchrun appo.py                                        # the built-in task, minutes on a CPU
    torchrun appo.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.json --video_root videos
"""
import copy
import inspect
import json
import math
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Callable, Iterator, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.hf_argparser import HfArgumentParser

import data
import model_utils
from model_utils import Policy, Rollout, RunError


# ------------------------------------------------------------------- step 3: rewards to advantages

def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) over the group, std with n - 1.  rewards (G,) -> (G,)

    Exactly 0 if all rewards are equal. Example: [1, 0, 0, 1] -> [0.866, -0.866, -0.866, 0.866].
    """
    if not rewards.is_floating_point():
        rewards = rewards.float()
    if (rewards == rewards[0]).all():
        # Otherwise the rounding error of the mean, divided by eps, would look like an advantage.
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + eps)


# -------------------------------------------------------------------------- step 4: crucial frames

def focused_frames(frame_attention: Tensor, response_mask: Tensor, *, k1: int = 15,
                   k2: int = 3) -> Tensor:
    """The K2 frames that each response attends to most: psi(i) in the supplement, A.1.

    A response's attention to a frame is the mean over its K1 tokens that attend to it most.
    frame_attention (G, R, F), response_mask bool (G, R) -> bool (G, F)
    """
    G, _, F = frame_attention.shape
    focused = torch.zeros(G, F, dtype=torch.bool, device=frame_attention.device)
    for i in range(G):
        attention = frame_attention[i, response_mask[i]]                        # (tokens, F)
        if len(attention) > 0:      # a response without tokens (never ours) focuses on nothing
            highest = attention.topk(min(k1, len(attention)), dim=0).values     # (K1, F)
            focused[i, highest.mean(0).topk(min(k2, F)).indices] = True
    return focused


def crucial_frames(frame_attention: Tensor, response_mask: Tensor, accuracy: Tensor, *,
                   k1: int = 15, k2: int = 3, threshold: float = 0.5,
                   strategy: str = "soft") -> Tensor:
    """The frames that decide which tokens weigh more: psi' in the paper, section 3.2.

    soft: the frames that any correct response focuses on. hard: of those, the ones that no
    incorrect response focuses on. all: the frames that any response focuses on. A response is
    correct if its accuracy is at least the threshold; if none is, soft and hard find no frame.
    Soft unites up to G * K2 = 24 picks. With the default F <= 8 it can be every frame, and then
    this step excludes nothing.

    frame_attention (G, R, F), response_mask bool (G, R), accuracy (G,) -> bool (F,)
    """
    focused = focused_frames(frame_attention, response_mask, k1=k1, k2=k2)
    by_correct = focused[accuracy >= threshold].any(0)
    by_incorrect = focused[accuracy < threshold].any(0)
    if strategy == "soft":
        return by_correct
    if strategy == "hard":
        return by_correct & ~by_incorrect
    if strategy == "all":
        return by_correct | by_incorrect
    raise ValueError(f"strategy {strategy!r}: choose soft, hard or all")


# --------------------------------------------------------------------------- step 5: token weights

@torch.no_grad()
def perception_token_weights(frame_attention: Tensor, logits: Tensor, response_mask: Tensor,
                             crucial: Tensor, *, k3: int = 64, alpha: float = 1.7) -> Tensor:
    """W = 1 + alpha * D, the weight of each response token (supplement, A.2 and Eq. 1).

    For every crucial frame:
      pick     in each response the K3 tokens that attend to the frame most, in reading order
      compare  the j-th picks of the G responses: how far the distributions that they were sampled
               from diverge (see `group_divergence`)
      scale    the divergences over j, so that the smallest is 0 and the largest 1 (all are 0 if
               they are equal)
    The D of a token is the mean of its scaled divergences, over the frames it was picked for.

    The idea: where responses look at the same frame and yet predict differently, they perceive it
    differently, which is what training should fix. Caveat: reading order is the paper's way to pair
    tokens. The j-th picks follow different prefixes and need not correspond, so part of D is not
    about perception.

    frame_attention (G, R, F), response_mask bool (G, R), crucial bool (F,),
    logits (G, R, V) of the distributions the tokens were sampled from: divided by the temperature,
    -inf for tokens that are never sampled (the placeholders of visual tokens)
    -> float32 (G, R) between 1 and 1 + alpha; 1 in the padding and for tokens never picked

    Example: one crucial frame and two responses of two tokens, both picked (K3 = 2). The first
    tokens were sampled from equal distributions: divergence 0. The second ones were sampled from
    (0.9, 0.1) and (0.1, 0.9): divergence 0.736. Scaled: 0 and 1, so W = [1, 2.7] in both responses.
    """
    if not crucial.any():
        return torch.ones(response_mask.shape, device=response_mask.device)
    attention = frame_attention[:, :, crucial].permute(2, 0, 1)                 # (C, G, R)
    picked = most_attentive_tokens(attention, response_mask, k3)                # bool (C, G, R)
    # Only for speed, frames with the same picks share one comparison: while no response is longer
    # than K3, every frame picks all tokens. which (C,): the index of each frame's picks.
    distinct, which = picked.unique(dim=0, return_inverse=True)
    # (C, G, R), 0 where a frame did not pick
    scaled = torch.stack([scaled_divergence(logits, picks) for picks in distinct])[which]
    # A token's mean over the frames it was picked for.
    return 1 + alpha * scaled.sum(0) / picked.sum(0).clamp(min=1)               # (G, R)


def most_attentive_tokens(attention: Tensor, response_mask: Tensor, k: int) -> Tensor:
    """The k tokens of each response with the highest attention.  (C, G, R) -> bool (C, G, R)"""
    attention = attention.masked_fill(~response_mask, -torch.inf)
    highest = attention.topk(min(k, attention.shape[-1]), dim=-1).indices
    picked = torch.zeros_like(attention, dtype=torch.bool).scatter(-1, highest, True)
    return picked & response_mask       # a response may have fewer than k tokens


def scaled_divergence(logits: Tensor, picked: Tensor) -> Tensor:
    """The scaled divergence of each token that was picked for a frame; 0 for the others.

    logits (G, R, V), picked bool (G, R) -> (G, R)
    """
    places = [row.nonzero().flatten() for row in picked]        # of each response, in reading order
    divergence = group_divergence(logits, pad_sequence(places, padding_value=-1))   # (J,)
    lowest, highest = divergence.aminmax()
    scaled = (divergence - lowest) / (highest - lowest)
    if highest - lowest < 1e-4:                                 # equal up to rounding
        scaled = torch.zeros_like(scaled)
    j = (picked.cumsum(1) - 1).clamp(min=0)     # a token's index among its response's picks
    return scaled[j].where(picked, 0.0)


def group_divergence(logits: Tensor, places: Tensor) -> Tensor:
    """How much the group disagrees: sum_i KL(p_i || mean of all p_i)  (supplement, Eq. 1).

    logits (G, R, V); places int (J, G): in each row, one place in R per response, -1: none
    -> (J,), each between 0 and G ln G

    A response without a place is left out of the row, so the sum tends to be smaller for rows in
    which few have one. With only one it is 0: a pick that no other response matches gets D = 0.
    """
    responses = torch.arange(places.shape[1], device=places.device)             # (G,)
    results = []
    for part in places.split(16):               # bounds the memory: (16, G, V)
        present = (part >= 0)[:, :, None]                                       # (16, G, 1)
        log_p = logits[responses, part.clamp(min=0)].float().log_softmax(-1)    # (16, G, V)
        p = log_p.exp().where(present, 0.0)     # a response without a place adds nothing
        mean = p.sum(1, keepdim=True) / present.sum(1, keepdim=True)            # (16, 1, V)
        # 0 * log 0 counts as 0, and so does a p too small for an exact logarithm.
        kl = (p * (log_p - mean.log())).where(p > 1e-30, 0.0)
        results.append(kl.sum((1, 2)).clamp(min=0))
    return torch.cat(results)


# ---------------------------------------------------------------------------- step 6: the objective

def masked_mean(values: Tensor, response_mask: Tensor, average: str = "tokens") -> Tensor:
    """(G, R) -> scalar. "tokens": the mean over all tokens of the group (DAPO, APPO).
    "responses": the mean over the responses of the mean over their tokens (GRPO)."""
    values = values.where(response_mask, 0.0)       # not values * mask: 0 * nan is nan
    lengths = response_mask.sum(1)                                              # (G,)
    if average == "tokens":
        return values.sum() / lengths.sum().clamp(min=1)
    if average == "responses":
        return (values.sum(1) / lengths.clamp(min=1)).mean()
    raise ValueError(f"average {average!r}: choose tokens or responses")


def clipped_surrogate_loss(
        log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor, *,
        token_weights: Tensor | None = None, clip_low: float = 0.2, clip_high: float = 0.28,
        ref_log_probs: Tensor | None = None, kl_coef: float = 0.0, average: str = "tokens",
) -> tuple[Tensor, dict[str, Tensor]]:
    """-mean of min(rho W A, clip(rho, 1 - clip_low, 1 + clip_high) W A), plus kl_coef * KL.

    rho is the ratio of new to old probability. In a batch's first update it is 1 (the old one is
    the policy's own) and nothing is clipped: the value is the mean of -W A, and only its gradient
    matters.

    log_probs, old_log_probs, ref_log_probs, token_weights (G, R); advantages (G,);
    response_mask bool (G, R). All but log_probs are constants: give them without gradient.
    Returns (scalar, {approx_kl: mean of rho - 1 - log rho, clip_fraction: share of tokens}).
    Example: rho = [1.5, 1], A = 2, W = 1 -> -(min(3, 2.56) + min(2, 2)) / 2 = -2.28.
    """
    # The padding of other codebases may hold nan: clamp keeps it from the gradient, and masked_mean
    # from the means.
    log_ratio = (log_probs - old_log_probs).clamp(-20, 20)
    ratio = log_ratio.exp()                                                     # rho (G, R)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    advantages = advantages[:, None]                                            # (G, 1)
    if token_weights is not None:
        advantages = advantages * token_weights                                 # (G, R)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -masked_mean(objective, response_mask, average)
    if kl_coef:
        if ref_log_probs is None:
            raise ValueError("kl_coef needs ref_log_probs")
        kl = kl_estimate(ref_log_probs - log_probs)
        loss = loss + kl_coef * masked_mean(kl, response_mask, average)
    with torch.no_grad():
        is_clipped = (clipped - ratio) * advantages < 0     # the clipped term is the minimum
        metrics = {"approx_kl": masked_mean(kl_estimate(log_ratio), response_mask),
                   "clip_fraction": masked_mean(is_clipped.to(ratio.dtype), response_mask)}
    return loss, metrics


# ---------------------------------------------------------------------------------------- settings

# What defines the algorithms: DAPO's settings, and what the others change in them. PAPO's gamma and
# eta are those of its 3B models.
DAPO = dict(alpha=0.0, clip_high=0.28, average="tokens", kl_coef=0.0, gamma=0.0, eta=0.0)
GRPO = DAPO | dict(clip_high=0.2, average="responses", kl_coef=0.01)
PRESETS = {"appo": DAPO | dict(alpha=1.7), "dapo": DAPO, "grpo": GRPO,
           "papo_g": GRPO | dict(gamma=0.02), "papo_d": DAPO | dict(gamma=0.01, eta=0.03)}
# Other defaults for the built-in model, which is tiny: its responses have 33 tokens, F = 8.
TINY = dict(k1=4, k2=2, k3=6, attention_layers=2, max_new_tokens=36, min_pixels=3136,
            max_pixels=3136, steps=70, prompts_per_step=4, learning_rate=6e-4, warmup_steps=5,
            beta2=0.95, gradient_checkpointing=False)


@dataclass
class Settings:
    """Train Qwen2.5-VL with APPO or a baseline. Without --model and --data: the built-in task.

    Defaults are the paper's values. Those that PRESETS lists take the algorithm's value if None.
    """
    model: str | None = None        # model folder or hub name; default: the built-in model
    data: str | None = None         # annotation files a.json,b.jsonl; default: built-in videos
    video_root: str | None = None   # folder that the annotations' paths are relative to
    skip_missing: bool = False      # train without the samples whose files are missing
    toy_folder: str = "runs/toy"    # where the built-in videos and model are made, and reused
    output: str | None = None       # run folder, default runs/ALGORITHM; a run in it is moved aside
    algorithm: Literal["appo", "dapo", "grpo", "papo_g", "papo_d"] = "appo"     # see PRESETS

    # crucial frames and token weights (paper, section 3.2; supplement, A.1 and A.2)
    strategy: Literal["soft", "hard", "all"] = "soft"   # crucial frames: see `crucial_frames`
    threshold: float = 0.5          # tau: a response with at least this accuracy counts as correct
    k1: int = 15                    # K1: tokens averaged for a response's attention to a frame
    k2: int = 3                     # K2: frames that a response focuses on
    k3: int = 64                    # K3: tokens that a response picks for each crucial frame
    alpha: float | None = None      # alpha: weights are 1 + alpha * D; 0 turns them off
    attention_layers: int = 3       # how many of the last layers' attention is read

    # objective
    clip_low: float = 0.2           # epsilon_low
    clip_high: float | None = None  # epsilon_high: DAPO's clip-higher
    average: Literal["tokens", "responses"] | None = None   # of the loss: see masked_mean
    kl_coef: float | None = None    # beta: weight of the KL to the frozen start model
    gamma: float | None = None      # gamma: weight of PAPO's perception loss
    eta: float | None = None        # eta: weight of PAPO's entropy loss

    # sampling and update
    group_size: int = 8             # G: responses per prompt
    prompts_per_step: int = 16      # prompts per training step, over all processes
    rollout_groups: int = 16        # groups that are sampled together on one device
    max_new_tokens: int = 512       # L_max: longest response
    max_prompt_tokens: int = 8192   # longer prompts are dropped and counted, never truncated
    temperature: float = 1.0        # of sampling, and of the probabilities in the loss
    updates_per_batch: int = 1      # optimizer steps on each batch of rollouts
    dynamic_sampling: bool = False  # DAPO: replace groups whose responses all have one accuracy
    max_resamples: int = 4          # most extra batches per step for dynamic sampling
    overlong_buffer: int = 0        # L_c: DAPO's penalty on the last L_c tokens before L_max
    steps: int = 0                  # training steps; 0: as many as --epochs needs
    epochs: float = 1.0             # passes over the data (NExT-GQA: 2)
    learning_rate: float = 1e-6     # of AdamW, without weight decay
    lr_schedule: Literal["constant", "linear"] = "constant"     # linear: decays towards 0
    warmup_steps: int = 0           # steps over which the learning rate rises to its value
    beta2: float = 0.999            # second beta of AdamW
    max_grad_norm: float = 1.0      # gradient clipping
    gradient_checkpointing: bool = True     # recompute activations, for much less memory
    cpu_offload: bool = False       # trained weights, gradients and moments stay in host memory
    cuda_graph: bool = False        # sample tokens by replaying a recorded CUDA graph

    # video
    fps: float = 1.0                # sampled frames per second
    max_frames: int = 16            # most sampled frames (paper: 16 for 7B, 30: 3B, 100: grounding)
    min_pixels: int = 50176         # fewest pixels per frame; 50,176 are 64 visual tokens
    max_pixels: int = 50176         # most pixels per frame
    readers: int = 2                # video decoding processes beside each training process
    decode_timeout: float = 60.0    # seconds after which a video counts as unreadable

    # bookkeeping
    eval_data: str | None = None    # held-out annotations, scored before and after
    eval_every: int = 0             # also score them every so many steps; 0: never
    save_every: int = 100           # steps between checkpoints to resume from; 0: none
    keep: int = 2                   # how many of those to keep
    resume: bool = False            # continue from the newest checkpoint in --output
    seed: int = 0                   # of the data order, sampling and masks
    rollout_seed: int | None = None     # of sampling, for the noise between runs; default: seed

    def __post_init__(self):
        for name, value in PRESETS[self.algorithm].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.rollout_seed is None:
            self.rollout_seed = self.seed

    @classmethod
    def of(cls, algorithm: str, **changes) -> "Settings":
        """A short form: Settings.of("grpo", steps=10)."""
        return cls(algorithm=algorithm, **changes)

    @property
    def masked_video(self) -> bool:
        """Whether PAPO's loss, which needs a masked video, is on."""
        return self.gamma > 0 or self.eta > 0


# ------------------------------------------------------------------------------- one training step

@dataclass
class Group:
    """A prompt, G responses to it, and what stays fixed during the updates on them."""
    position: int                           # in the endless shuffled stream of prompts
    prompt: data.Prompt | None              # None only in a dummy (see plan_passes)
    rollout: Rollout                        # response_ids, response_mask, frame_attention,
                                            # log_probs and entropy (0 in the padding); encoded is
                                            # the prompt with its embedded video
    loss_scale: float = 1.0                 # 0 in a dummy
    # step 3
    texts: list[str] | None = None
    reward: Tensor | None = None            # (G,), as are the next three
    accuracy: Tensor | None = None          # of the answers, 0 to 1
    format: Tensor | None = None            # 1 where the response has the required form
    advantages: Tensor | None = None
    # step 4
    crucial: Tensor | None = None           # bool (F,)
    # step 5
    token_weights: Tensor | None = None     # (G, R); None in groups that are not computed, since
                                            # all their advantages are 0 (see plan_passes)
    # fixed before the first update
    old_log_probs: Tensor | None = None     # (G, R), as are the next two; of the policy's first
                                            # pass, not of the model that sampled
    ref_log_probs: Tensor | None = None     # of the reference, with kl_coef
    masked_log_probs: Tensor | None = None  # of the policy under the masked video, for PAPO
    updates: list[dict[str, float]] = field(default_factory=list)   # metrics of each update


def weigh_tokens(group: Group, logits: Tensor | None, s: Settings) -> Tensor:
    """Step 5. The weights of APPO (G, R), from logits (G, R, V). With alpha 0 there are no logits
    and no crucial frames, and all weights are 1. To replace it: train(weigh=...)."""
    return perception_token_weights(group.rollout.frame_attention, logits,
                                    group.rollout.response_mask, group.crucial, k3=s.k3,
                                    alpha=s.alpha)


@dataclass
class Run:
    """What lasts from step to step."""
    settings: Settings
    model: torch.nn.Module                  # samples
    tokenizer: object
    policy: Policy | None = None            # is trained
    reference: Policy | None = None         # the frozen start model, with kl_coef
    optimizer: torch.optim.Optimizer | None = None
    reward: Callable = data.task_reward     # (response, sample) -> (reward, accuracy, format)
    weigh: Callable = weigh_tokens          # (group, logits, settings) -> (G, R)
    position: int = 0                       # prompts that all processes took from the stream
    seconds: Counter = field(default_factory=Counter)       # of the phases of a step
    last_lap: float = 0.0

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as that of a phase."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        before, self.last_lap = self.last_lap, time.perf_counter()
        self.seconds[phase] += self.last_lap - before


# This process's part of a batch: prompts by position in the stream, and records of the samples that
# cannot be used.
Batch = tuple[dict[int, data.Prompt], list[dict]]

ORDER, ROLLOUT, MASK, HELD_OUT = range(4)       # what `random_numbers` are for


def sample_groups(run: Run, prompts: dict[int, data.Prompt],
                  purpose: int = ROLLOUT) -> list[Group]:
    """Step 2. Embed each video once, then sample G responses to each prompt."""
    s, groups = run.settings, []
    for part in data.in_batches(prompts, s.rollout_groups):
        encoded = model_utils.encode_prompts(run.model, list(part.values()))
        run.lap("embed")
        # One uniform number per token, seeded by the prompt's place in the stream: what is sampled
        # does not depend on how the prompts are batched.
        uniforms = [random_numbers(s.rollout_seed, purpose, position)
                    .random((s.group_size, s.max_new_tokens)) for position in part]
        rollouts = model_utils.rollout(
            run.model, encoded, torch.tensor(np.stack(uniforms)), temperature=s.temperature,
            attention_layers=s.attention_layers if s.alpha else 0, cuda_graph=s.cuda_graph)
        for (position, prompt), rollout in zip(part.items(), rollouts):
            groups.append(Group(position, prompt, rollout))
        run.lap("rollout")
    return groups


def score_group(run: Run, group: Group) -> None:
    """Steps 3 and 4. Rewards, advantages and crucial frames of a group."""
    s, rollout = run.settings, group.rollout
    mask = rollout.response_mask                                                # (G, R)
    group.texts = [run.tokenizer.decode(ids[real], skip_special_tokens=True)
                   for ids, real in zip(rollout.response_ids, mask)]
    scores = [run.reward(text, group.prompt.sample) for text in group.texts]
    scores = torch.tensor(scores, dtype=torch.float32, device=mask.device)      # (G, 3)
    reward, group.accuracy, group.format = scores.T
    group.reward = reward + overlong_penalty(mask.sum(1), s.max_new_tokens, s.overlong_buffer)
    group.advantages = group_advantages(group.reward)
    # None at alpha 0: the attention is not read then, but 0.
    group.crucial = torch.zeros(rollout.encoded.num_frames, dtype=torch.bool, device=mask.device)
    if s.alpha:
        group.crucial = crucial_frames(rollout.frame_attention, mask, group.accuracy, k1=s.k1,
                                       k2=s.k2, threshold=s.threshold, strategy=s.strategy)


def collect_groups(run: Run, batches: Iterator[Batch]) -> tuple[list[Group], list[dict]]:
    """Steps 1 to 4: (this process's groups, records of all processes' skipped samples).

    DAPO's dynamic sampling, an option, replaces groups whose responses all have the same accuracy
    by those of further batches. If there are too few of them, the step has fewer groups.
    """
    s, groups, skipped = run.settings, [], []
    for _ in range(1 + s.max_resamples):        # once if not dynamic_sampling
        prompts, skipped_here = next(batches)                                   # step 1
        run.position += s.prompts_per_step
        run.lap("wait")
        new_groups = sample_groups(run, prompts)                                # step 2
        for group in new_groups:
            score_group(run, group)                                             # steps 3 and 4
        run.lap("score")
        if s.dynamic_sampling:
            new_groups = [g for g in new_groups if (g.accuracy != g.accuracy[0]).any()]
        groups += new_groups
        skipped += model_utils.gather_lists(skipped_here)
        positions = model_utils.gather_lists([group.position for group in groups])
        if not s.dynamic_sampling or len(positions) >= s.prompts_per_step:
            break
    # If there are too many, all processes keep those that come first in the stream.
    chosen = sorted(positions)[:s.prompts_per_step]
    return [group for group in groups if group.position in chosen], skipped


def fix_constants(run: Run, group: Group, log_probs: Tensor, logits: Tensor | None) -> None:
    """Step 5, from the policy's pass before its first update: the old log-probabilities and the
    token weights, which stay the same in all updates on a group.

    The old log-probabilities are the policy's own. Those of the model that sampled differ by
    rounding: this is logged (rollout_logprob_gap), not corrected.
    """
    run.lap("update")       # the time up to here, so that step 5 is timed by itself
    group.old_log_probs = log_probs.detach()
    if group.loss_scale:    # a dummy has no frames
        group.token_weights = run.weigh(group, logits, run.settings)
    run.lap("weights")


def group_loss(run: Run, group: Group, log_probs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Step 6. (loss of a group, metrics).  log_probs (G, R) of the policy"""
    s, mask = run.settings, group.rollout.response_mask
    loss, metrics = clipped_surrogate_loss(
        log_probs, group.old_log_probs, group.advantages, mask, token_weights=group.token_weights,
        clip_low=s.clip_low, clip_high=s.clip_high, ref_log_probs=group.ref_log_probs,
        kl_coef=s.kl_coef, average=s.average)
    if s.masked_video:
        perception, perception_metrics = perception_loss(
            log_probs, group.masked_log_probs, mask, gamma=s.gamma, eta=s.eta, average=s.average)
        loss, metrics = loss + perception, metrics | perception_metrics
    return loss, {"loss": loss.detach()} | metrics


def update(run: Run, groups: list[Group]) -> list[float]:
    """Steps 5 and 6. Optimizer steps on the groups of all processes; returns the gradient norms.

    Every update passes over the whole batch, and its objective is the mean over the groups of all
    processes. The first update's pass also gives what step 5 needs, without an extra pass.
    """
    s = run.settings
    computed, total, finite = plan_passes(run, groups)      # without groups that have no gradient
    if total == 0:              # no sample was usable, or dynamic sampling kept no group
        return []
    if not finite:              # no update
        return [math.nan]
    for group in computed:
        add_baseline_log_probs(run, group)     # baselines only
    norms = []
    for number in range(s.updates_per_batch):
        for group in computed:
            log_probs, logits = run.policy(     # both at the temperature of sampling
                group.rollout.encoded, group.rollout.response_ids, group.rollout.response_mask,
                keep_logits=number == 0 and s.alpha > 0)
            if number == 0:
                fix_constants(run, group, log_probs, logits)                    # step 5
            del logits      # large
            loss, metrics = group_loss(run, group, log_probs)                   # step 6
            # FSDP averages over the processes; what we want is the mean over all groups.
            (loss * group.loss_scale * dist.get_world_size() / total).backward()
            group.updates.append({name: value.item() for name, value in metrics.items()})
        norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), s.max_grad_norm)
        norms.append(norm.full_tensor().item())     # FSDP2 gives a DTensor
        if math.isfinite(norms[-1]):        # the same on all processes
            run.optimizer.step()
        run.optimizer.zero_grad()
    model_utils.refresh(run.model, run.policy)      # the next batch is sampled from the new policy
    run.lap("update")
    return norms


def training_step(run: Run, batches: Iterator[Batch]
                  ) -> tuple[dict, list[Group], list[dict]]:
    """One training step: (metrics over all processes, this process's groups, skipped samples)."""
    run.seconds.clear()
    started = run.last_lap = time.perf_counter()
    groups, skipped = collect_groups(run, batches)                              # steps 1 to 4
    norms = update(run, groups)                                                 # steps 5 and 6
    metrics = batch_metrics(run, groups, time.perf_counter() - started)
    metrics |= {"grad_norm": float(np.mean(norms or [0.0])), "skipped": len(skipped),
                "seconds": {phase: round(seconds, 4) for phase, seconds in run.seconds.items()}}
    return metrics, groups, skipped


# ---------------------------------------------------------------------------------------- the loop

def train(s: Settings, reward: Callable = data.task_reward,
          weigh: Callable = weigh_tokens) -> None:
    """The training loop.

    reward(response, sample) -> (reward, accuracy, format); weigh: see `weigh_tokens`.
    """
    rank, world, device = model_utils.init_processes()
    if rank == 0:
        make_built_in_data(s)       # does nothing if the user gave --data
    dist.barrier()
    # The data come before the model, so that errors in them surface early.
    samples, held_out = load_samples(s, s.data), load_samples(s, s.eval_data)
    if rank == 0:
        make_built_in_model(s)      # does nothing if the user gave --model
    dist.barrier()
    steps = s.steps or math.ceil(s.epochs * len(samples) / s.prompts_per_step)
    # All processes call the folder's methods; the first one writes. With --resume, folder.step and
    # folder.position are those of the newest checkpoint. The number of samples must be the same
    # then, as it sets the order of the prompts.
    folder = model_utils.RunFolder(s.output, vars(s) | {"samples": len(samples)}, may_differ(s))
    with open_reader(s) as reader, model_utils.stop_signals() as stop_requests:
        stream = prompt_stream(s, samples, folder.position, rank, world)
        decoded = data.decode_ahead(reader, stream)     # begins before the model is loaded
        model, tokenizer = model_utils.load_model(s.model, device)
        batches = data.build_prompts(decoded, tokenizer, s.max_prompt_tokens)
        run = set_up(s, model, tokenizer, reward, weigh)
        run.position = folder.position
        folder.start_or_resume(model, run.policy, run.optimizer)
        if held_out and folder.step == 0:
            folder.log("held_out", score_held_out(run, held_out, reader))
        if rank == 0:
            print(f"training on {world} x {device.type}")
        bar = tqdm(range(folder.step + 1, steps + 1), s.algorithm, steps, initial=folder.step,
                   disable=rank > 0)
        for step in bar:
            rate = set_learning_rate(run, step, steps)
            metrics, groups, skipped = training_step(run, batches)
            folder.step, folder.position = step, run.position
            folder.log("metrics", metrics | {"learning_rate": rate})
            folder.log("skipped", *skipped)
            if groups:
                folder.log("samples", describe(groups, tokenizer))
            bar.set_postfix(accuracy=metrics.get("accuracy"), reward=metrics.get("reward"))
            # Raises an error after three steps in a row without a finite gradient, or if over 5% of
            # the samples cannot be read.
            folder.stop_if_failing(metrics["grad_norm"], [g.prompt.sample.id for g in groups],
                                   skipped)
            last = step == steps
            if held_out and (last or (s.eval_every and step % s.eval_every == 0)):
                folder.log("held_out", score_held_out(run, held_out, reader))
            stopping = any(model_utils.all_gather(bool(stop_requests))) and not last
            if stopping or (s.save_every and step % s.save_every == 0):
                folder.save(model, run.policy, run.optimizer)
            if stopping:
                raise RunError(f"stopped after step {step}; to continue, add --resume to the "
                               "command")
    folder.finish(model)
    if rank == 0:
        print_summary(folder, s)


# ------------------------------------------------------------- what options and baselines add

def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment, to be added to the reward.  lengths (G,) -> float (G,)

    0 up to max_new_tokens - buffer tokens, then linearly down to -1 at max_new_tokens.
    """
    return (max_new_tokens - buffer - lengths).clamp(-buffer, 0) / max(buffer, 1)


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Schulman's low-variance estimate of KL(pi || other) at each sampled token, from log other -
    log pi; known as "k3", which has nothing to do with APPO's K3."""
    log_ratio = log_ratio.clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def perception_loss(log_probs: Tensor, masked_log_probs: Tensor, response_mask: Tensor, *,
                    gamma: float, eta: float = 0.0,
                    average: str = "tokens") -> tuple[Tensor, dict[str, Tensor]]:
    """PAPO (arXiv 2507.06448): -gamma * KL(pi || pi under a masked video) + eta * entropy.

    masked_log_probs carry no gradient, and entropy is the mean of -log pi over the sampled tokens,
    as in the authors' code. Their second entropy term, on the masked video, changes no parameter
    then and is left out.
    log_probs, masked_log_probs (G, R), response_mask bool (G, R) -> (scalar, {perception_kl})
    """
    kl = kl_estimate(masked_log_probs.detach() - log_probs).clamp(max=10)   # as in their code
    kl = masked_mean(kl, response_mask, average)
    entropy = -masked_mean(log_probs, response_mask, average)
    return -gamma * kl + eta * entropy, {"perception_kl": kl.detach()}


@torch.no_grad()
def add_baseline_log_probs(run: Run, group: Group) -> None:
    """The log-probabilities that the KL terms of GRPO and PAPO compare with."""
    prompt, rollout = group.prompt, group.rollout
    if run.reference is not None:
        group.ref_log_probs, _ = run.reference(rollout.encoded, rollout.response_ids,
                                               rollout.response_mask)
    if run.settings.masked_video:
        masked = rollout.encoded
        if group.loss_scale:    # a dummy has no video
            # Blackens a random share of the patches (the video's come first, then the image's).
            patches = data.mask_patches(prompt.patches, prompt.video_grids + prompt.image_grids,
                                        random_numbers(run.settings.seed, MASK, group.position))
            masked, = model_utils.encode_prompts(run.model, [replace(prompt, patches=patches)])
        group.masked_log_probs, _ = run.policy(masked, rollout.response_ids, rollout.response_mask)


# ------------------------------------------------------------------------------------- the plumbing

def set_up(s: Settings, model, tokenizer, reward: Callable = data.task_reward,
           weigh: Callable = weigh_tokens) -> Run:
    """The sharded policy, its optimizer and the reference, beside the model that samples."""
    reference = None
    if s.kl_coef:
        # trainable=False shares the model's weights, which `refresh` overwrites: hence the copy.
        reference = copy.deepcopy(Policy(model, s.temperature, trainable=False))
    policy = Policy(model, s.temperature)       # which copies the weights, to fp32
    if s.gradient_checkpointing:
        model_utils.recompute_activations(policy.language_model)
    policy = model_utils.shard(policy, model.device, s.cpu_offload)
    # On a GPU, unfused AdamW would copy the second moments at every step.
    fused = model.device.type == "cuda" and not s.cpu_offload
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.learning_rate, betas=(0.9, s.beta2),
                                  weight_decay=0.0, fused=fused)
    return Run(s, model, tokenizer, policy, reference, optimizer, reward=reward, weigh=weigh)


def plan_passes(run: Run, groups: list[Group]) -> tuple[list[Group], int, bool]:
    """(this process's groups to compute, number of groups of all processes, whether all sampled
    log-probabilities are finite).

    A group with equal rewards has advantages of 0 and, unless there is a KL or perception term, no
    gradient: it counts in the mean over groups, but is not computed.

    A pass through a sharded model is a collective call, so every process must make the same number:
    one with fewer groups adds dummies, whose gradients are 0. If no group is active anywhere, one
    dummy gives gradients of 0, so that AdamW still takes its momentum step.
    """
    s = run.settings
    active = [g for g in groups if s.kl_coef or s.masked_video or g.advantages.any()]
    # nan where weights or activations have overflowed
    finite = all(g.rollout.log_probs.isfinite().all() for g in groups)
    of_processes = model_utils.all_gather((len(active), len(groups), finite))
    active_counts, group_counts, all_finite = zip(*of_processes)
    # One response of one token. Several passes may take the same one.
    dummy = Group(-1, None, model_utils.dummy_rollout(run.model), loss_scale=0.0,
                  advantages=torch.zeros(1, device=run.model.device))
    dummies = [dummy] * (max(1, *active_counts) - len(active))
    return active + dummies, sum(group_counts), all(all_finite)


def set_learning_rate(run: Run, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 1. The linear one is transformers' schedule to the
    digit, so its first warm-up step has rate 0."""
    s = run.settings
    if s.lr_schedule == "constant":
        factor = min(1.0, step / max(s.warmup_steps, 1))
    elif step <= s.warmup_steps:
        factor = (step - 1) / s.warmup_steps
    else:
        factor = (steps - step + 1) / (steps - s.warmup_steps)
    rate = s.learning_rate * factor
    run.optimizer.param_groups[0]["lr"] = rate
    return rate


def load_samples(s: Settings, path: str | None) -> list[data.Sample]:
    if not path:
        return []
    samples = data.load_samples(path, s.video_root)
    return data.with_files(samples, path, s.skip_missing, announce=dist.get_rank() == 0)


def random_numbers(seed: int, purpose: int, position: int) -> np.random.Generator:
    """Randomness depends on these three only: any number of processes and a resumed run draw the
    same, and no random state is saved."""
    return np.random.default_rng((seed, purpose, position))


def prompt_stream(s: Settings, samples: list[data.Sample], start: int, rank: int,
                  world: int) -> Iterator[dict[int, data.Sample]]:
    """This process's share of endless batches, by position; reshuffled every epoch."""
    def shuffled() -> Iterator[data.Sample]:
        for epoch in count():
            for index in random_numbers(s.seed, ORDER, epoch).permutation(len(samples)):
                yield samples[index]

    stream = islice(enumerate(shuffled()), start, None)     # by position, from the start on
    while True:
        batch = list(islice(stream, s.prompts_per_step))    # of all processes
        yield dict(batch[rank::world])


def open_reader(s: Settings) -> data.VideoReader:
    """Start the processes that decode videos."""
    return data.VideoReader(s.readers, s.decode_timeout, fps=s.fps, max_frames=s.max_frames,
                            min_pixels=s.min_pixels, max_pixels=s.max_pixels)


def may_differ(s: Settings) -> set[str]:
    """Settings that may change when a run is resumed."""
    names = ("output resume video_root save_every keep eval_every readers decode_timeout "
             "rollout_groups gradient_checkpointing cpu_offload cuda_graph")
    if s.lr_schedule == "constant":
        names += " steps epochs"
    return set(names.split())


def means(records: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the records that have it."""
    columns = defaultdict(list)
    for record in records:
        for name, value in record.items():
            columns[name].append(value)
    return {name: float(np.mean(values)) for name, values in columns.items()}


def group_metrics(run: Run, group: Group) -> dict[str, float]:
    """For metrics.jsonl. A group that was not computed has loss 0 and no other loss metrics."""
    rollout, mask = group.rollout, group.rollout.response_mask
    ended = torch.isin(rollout.response_ids, model_utils.end_token_ids(run.model)) & mask
    metrics = {
        "reward": group.reward.mean(), "accuracy": group.accuracy.mean(),
        "format": group.format.mean(), "entropy": masked_mean(rollout.entropy, mask),
        "response_length": mask.sum(1).float().mean(),
        "truncated": 1 - ended.any(1).float().mean(),
        "zero_variance_groups": not group.advantages.any(),
        "crucial_frames": group.crucial.sum(), "loss": 0.0}
    if group.updates:
        gap = group.old_log_probs - rollout.log_probs   # policy against model; 0 in the padding
        outside = ((gap.exp() - 1).abs() > 0.1).float()         # ratios outside 0.9 to 1.1
        metrics |= {"token_weight_mean": masked_mean(group.token_weights, mask),
                    "token_weight_max": group.token_weights.max(),
                    "rollout_logprob_gap": gap.abs().max(),
                    "rollout_logprob_gap_mean": masked_mean(gap.abs(), mask),
                    "rollout_ratio_outside": masked_mean(outside, mask)}
        metrics |= means(group.updates)
    return {name: float(value) for name, value in metrics.items()}


def batch_metrics(run: Run, groups: list[Group], seconds: float) -> dict[str, float]:
    """The mean of each metric over the groups that have it; of two metrics, the maximum."""
    gathered = model_utils.gather_lists([(g.position, group_metrics(run, g)) for g in groups])
    # In the order of the stream, so that the sums are the same for any number of processes.
    records = [record for _, record in sorted(gathered)]    # positions are unique
    metrics = means(records)
    for name in ("token_weight_max", "rollout_logprob_gap"):
        metrics[name] = max((r[name] for r in records if name in r), default=0.0)
    rate, tokens = len(records) / seconds, metrics.get("response_length", 0.0)
    return metrics | {"groups": len(records), "samples_per_second": rate,
                      "tokens_per_second": rate * tokens * run.settings.group_size}


def describe(groups: list[Group], tokenizer) -> dict:
    """For samples.jsonl: one group with its token weights, if possible one that was computed."""
    group = max(groups, key=lambda group: len(group.updates))
    sample, responses = group.prompt.sample, []
    for i, real in enumerate(group.rollout.response_mask):
        ids = group.rollout.response_ids[i, real].tolist()
        responses.append({
            "text": group.texts[i], "tokens": tokenizer.convert_ids_to_tokens(ids),
            "reward": group.reward[i].item(), "accuracy": group.accuracy[i].item(),
            "format": group.format[i].item(), "advantage": group.advantages[i].item(),
            "weights": group.token_weights[i, real].tolist() if group.updates else None})
    return {"id": sample.id, "question": sample.question, "answer": sample.answer,
            "crucial_frames": group.crucial.nonzero().flatten().tolist(), "responses": responses}


def print_summary(folder: model_utils.RunFolder, s: Settings) -> None:
    held_out = model_utils.read_log(folder.path / "held_out.jsonl")
    for name, label in (("accuracy", "held-out accuracy of sampled responses"),
                        ("topk", f"true frame among a response's top {s.k2}")):
        if held_out and name in held_out[0]:
            print(f"{label:40s} {held_out[0][name]:.3f} -> {held_out[-1][name]:.3f}")
    other = "dapo" if s.algorithm == "appo" else "appo"
    print(f"log and checkpoint are in {folder.path}; next: --algorithm {other} to compare, or "
          "--model and --data for your own")


# -------------------------------------------------------------------------------- held-out samples

def score_prompts(run: Run, prompts: dict[int, data.Prompt]) -> list[dict[str, float]]:
    """One sampled response to each prompt: its accuracy, and if the frame that shows the answer is
    known, whether the response attends to it most (top1) or among its K2 frames (topk)."""
    # An alpha above 0 so that attention is read. All runs of a seed get the same random numbers.
    s = replace(run.settings, group_size=1, rollout_seed=run.settings.seed, alpha=1.0)
    run = replace(run, settings=s)
    scores = []
    for group in sample_groups(run, prompts, HELD_OUT):
        score_group(run, group)
        score = {"accuracy": group.accuracy.item()}
        true_frame = group.prompt.sample.crucial_frame
        if true_frame is not None:
            for name, k2 in (("top1", 1), ("topk", s.k2)):
                focused = focused_frames(group.rollout.frame_attention,
                                         group.rollout.response_mask, k1=s.k1, k2=k2)
                score[name] = float(focused[0, true_frame])
        scores.append(score)
    return scores


def score_held_out(run: Run, samples: list[data.Sample], reader: data.VideoReader) -> dict:
    """Means over the held-out samples of all processes. Each call uses the same random numbers."""
    s, scores = run.settings, []
    share = dict(list(enumerate(samples))[dist.get_rank()::dist.get_world_size()])
    decoded = data.decode_ahead(reader, data.in_batches(share, s.rollout_groups))
    for prompts, _ in data.build_prompts(decoded, run.tokenizer, s.max_prompt_tokens):
        scores += score_prompts(run, prompts)
    scores = model_utils.gather_lists(scores)
    return {"samples": len(scores), "skipped": len(samples) - len(scores)} | means(scores)


def make_built_in_data(s: Settings) -> None:
    """The videos and annotations of the built-in task, if they are missing and used."""
    folder = Path(s.toy_folder)
    if s.data == str(folder / "train.json"):
        data.make_toy_data(folder)


def make_built_in_model(s: Settings) -> None:
    """The tiny model, if it is missing and used. With random weights every reward would be 0, so it
    is first trained with supervision, until about two in five of its answers are correct."""
    folder = Path(s.toy_folder) / "model"
    if s.model != str(folder) or (folder / "config.json").exists():
        return
    torch.set_num_threads(1)    # operations this small mostly wait for other threads
    texts = data.toy_vocabulary()
    _, tokenizer = model_utils.tiny_model(texts)
    prompts = {}
    for n in range(128):
        rng = random_numbers(s.seed, HELD_OUT, n)       # `measure` samples by the same numbers
        prompts[n], _ = data.toy_prompt(rng, tokenizer, true_frame=n % 8)

    def measure(model) -> tuple[float, float]:
        """(accuracy, share of responses that attend most to the true frame)"""
        scores = means(score_prompts(Run(Settings(**TINY), model, tokenizer), prompts))
        return scores["accuracy"], scores["top1"]

    model = model_utils.warm_up(
        # New random weights in each attempt, since some do not learn.
        lambda attempt: model_utils.tiny_model(texts, s.seed + 1000 * attempt)[0],
        data.toy_stages(tokenizer, s.seed), measure)
    model_utils.save_checkpoint(folder, model, tokenizer)
    # Other tools read the picture settings from this file.
    pictures = data.picture_settings(TINY["min_pixels"], TINY["max_pixels"])
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=1))


# -------------------------------------------------------------------------------- the command line

class Parser(HfArgumentParser):
    """Options named and explained as the fields of Settings and the comments beside them."""
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)", inspect.getsource(Settings), re.M))

    def add_argument(self, name: str, *more, **options):
        options.setdefault("help", self.comments.get(name.lstrip("-")))
        return super().add_argument(name, *more, **options)

    def error(self, message: str) -> None:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: {model_utils.printable(line)}\n")


def is_tiny(model: str | None) -> bool:
    """Whether this is the built-in model, which is the default, or was trained from it."""
    if model is None:
        return True
    config = Path(model, "config.json")
    return config.is_file() and '"appo_built_in": true' in config.read_text(errors="replace")


def parse_settings(arguments: list[str] | None = None, prog: str | None = None) -> Settings:
    """Settings from the command line. Raises RunError for invalid values."""
    parser = Parser(Settings, prog=prog, description=Settings.__doc__, allow_abbrev=False)
    # Some options decide the defaults of others, so the arguments are read twice.
    first = parser.parse_args(arguments)
    folder = Path(first.toy_folder)
    parser.set_defaults(model=str(folder / "model"), output=f"runs/{first.algorithm}")
    if first.data is None:
        parser.set_defaults(data=str(folder / "train.json"), eval_data=str(folder / "test.json"))
    if is_tiny(first.model):
        parser.set_defaults(**TINY)
    s = Settings(**vars(parser.parse_args(arguments)))
    check_settings(s)
    return s


MAY_BE_ZERO = {"threshold", "alpha", "clip_low", "clip_high", "kl_coef", "gamma", "eta", "steps",
               "max_resamples", "overlong_buffer", "warmup_steps", "save_every", "eval_every",
               "seed", "rollout_seed"}


def check_settings(s: Settings) -> None:
    def check(condition: bool, name: str, fix: str) -> None:
        if not condition:
            raise RunError(f"--{name} {getattr(s, name)}: {fix}")

    for name, value in vars(s).items():
        if type(value) in (int, float):
            if name in MAY_BE_ZERO:
                check(0 <= value < math.inf, name, "give a number of at least 0")
            else:
                check(0 < value < math.inf, name, "give a number above 0")
    check(s.min_pixels <= s.max_pixels, "min_pixels", f"above --max_pixels {s.max_pixels}; lower "
          "--min_pixels")
    for name in ("clip_low", "beta2"):
        check(getattr(s, name) < 1, name, "give a number below 1")
    check(s.group_size > 1, "group_size", "give at least 2; advantages compare a group's responses")
    check(s.overlong_buffer <= s.max_new_tokens, "overlong_buffer",
          f"longer than --max_new_tokens {s.max_new_tokens}; shorten it")


def main(arguments: list[str] | None = None) -> None:
    try:
        train(parse_settings(arguments))
    except (RunError, data.DataError) as error:
        several = dist.is_initialized() and dist.get_world_size() > 1
        rank = f"rank {dist.get_rank()}: " if several else ""
        Parser(Settings).error(rank + str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
