"""APPO, Attention-guided Perception Policy Optimization (arXiv 2602.23823): reinforcement learning that improves what a
video-language model sees, by giving more weight to the response tokens that look at the frames right answers look at.

APPO is DAPO's token-level clipped policy gradient plus the steps 5 and 6. One training step, numbered as in the README:
  1. read the prompts of the batch (decoded ahead, in other processes)
  2. embed each video once
  3. rollout: sample a group of G responses a prompt, noting how much each token attends to each visual step
  4. score them: rewards, and advantages relative to the group
  5. find the crucial frames: those that the right responses attend to most
  6. weigh the tokens that attend to crucial frames by how much the group's predictions differ there
  7. update the policy: clipped surrogate loss with the advantage of each token multiplied by its weight

    torchrun appo.py                                         the built-in task, minutes on a laptop
    torchrun appo.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.json --video_root videos
"""
import json
import math
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

import data
import model_utils
from model_utils import EncodedPrompt, Policy, Rollout, RunError


@dataclass
class Settings:
    """Train Qwen2.5-VL with APPO or one of its baselines. Without --model and --data: the built-in task."""
    model: Optional[str] = HfArg(default=None, help="model folder or hub name; default: the tiny built-in model")
    data: Optional[str] = HfArg(default=None, help="annotation files a.json,b.jsonl; default: the built-in videos")
    video_root: Optional[str] = HfArg(default=None, help="folder under which the annotations' paths are looked up")
    skip_missing: bool = HfArg(default=False, help="train without the samples whose files are missing")
    toy_folder: str = HfArg(default="runs/toy", help="where the built-in videos and model are made; what an earlier run "
                            "made there is used again, also with another --seed")
    output: Optional[str] = HfArg(default=None, help="run folder; default runs/ALGORITHM. An earlier run is moved aside")
    algorithm: Literal["appo", "dapo", "grpo", "papo_g", "papo_d"] = HfArg(
        default="appo", help="preset of the hyperparameters below, see PRESETS; each of them can be overridden")
    # frame selection and token weights (paper, section 3.2; supplement, A.1 and A.2)
    strategy: Literal["soft", "hard", "all"] = HfArg(default="soft", help="crucial frames psi': of right responses, of "
                                                     "right but not wrong ones, of all responses (Tab. D)")
    threshold: float = HfArg(default=0.5, help="tau: accuracy from which a response counts as right")
    k1: int = HfArg(default=15, help="K1: a response's attention to a frame is the mean over its K1 highest tokens")
    k2: int = HfArg(default=3, help="K2: frames a response focuses on")
    k3: int = HfArg(default=64, help="K3: perception tokens of a response for each crucial frame")
    alpha: float = HfArg(default=1.7, help="alpha: W = 1 + alpha D; 0: no token weights")
    attention_layers: int = HfArg(default=3, help="last layers whose attention is read")
    # objective
    clip_low: float = HfArg(default=0.2, help="epsilon_low")
    clip_high: float = HfArg(default=0.28, help="epsilon_high, the clip-higher of DAPO")
    average: Literal["tokens", "responses"] = HfArg(default="tokens", help="mean over a group's tokens, or over "
                                                    "responses of the means over their tokens")
    kl_coef: float = HfArg(default=0.0, help="beta: weight of the KL to the frozen start model")
    gamma: float = HfArg(default=0.0, help="gamma: weight of PAPO's perception loss")
    eta: float = HfArg(default=0.0, help="eta_1, eta_2: weight of PAPO's double entropy loss")
    # rollout and update
    group_size: int = HfArg(default=8, help="G: responses a prompt")
    prompts_per_step: int = HfArg(default=16, help="prompts a training step, over all processes")
    rollout_groups: int = HfArg(default=16, help="groups that decode together on one device")
    max_new_tokens: int = HfArg(default=512, help="L_max: tokens of a response")
    max_prompt_tokens: int = HfArg(default=8192, help="longer prompts are left out and counted, never cut")
    temperature: float = HfArg(default=1.0, help="of sampling, and of the probabilities in the loss")
    updates_per_batch: int = HfArg(default=1, help="passes over the rollouts of a step")
    minibatch_prompts: int = HfArg(default=0, help="prompts an optimizer step; 0: all of the batch")
    dynamic_sampling: bool = HfArg(default=False, help="DAPO: replace groups whose responses are all right or all wrong")
    max_resamples: int = HfArg(default=4, help="further batches that dynamic sampling may draw in a step")
    overlong_buffer: int = HfArg(default=0, help="L_c: DAPO's soft penalty on the last L_c tokens before L_max; 0: none")
    steps: int = HfArg(default=0, help="training steps; 0: as many as --epochs needs")
    epochs: float = HfArg(default=1.0, help="passes over the data (NExT-GQA: 2)")
    learning_rate: float = HfArg(default=1e-6, help="of AdamW, without weight decay")
    warmup_steps: int = HfArg(default=0, help="steps over which the learning rate rises to its value")
    beta2: float = HfArg(default=0.999, help="second beta of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping")
    cuda_graph: bool = HfArg(default=True, help="whether a GPU records a decoding step's kernels and replays them")
    gradient_checkpointing: bool = HfArg(default=True, help="whether layers are computed again in the backward pass, for "
                                         "much less memory")
    # video
    fps: float = HfArg(default=1.0, help="frames a second")
    max_frames: int = HfArg(default=16, help="frames a video (paper: 16 for 7B, 30 for 3B, 100 for grounding)")
    min_pixels: int = HfArg(default=50176, help="pixels a frame at least; 50,176 are 64 visual tokens")
    max_pixels: int = HfArg(default=50176, help="pixels a frame at most")
    readers: int = HfArg(default=2, help="decoding processes beside each training process")
    decode_timeout: float = HfArg(default=60.0, help="seconds after which a video counts as unreadable")
    # what one sees
    eval_data: Optional[str] = HfArg(default=None, help="held-out annotation files, scored before and after")
    eval_every: int = HfArg(default=0, help="score the held-out samples every so many steps too")
    save_every: int = HfArg(default=100, help="steps between checkpoints that a run can resume from; 0: none")
    keep: int = HfArg(default=2, help="how many of them stay")
    resume: bool = HfArg(default=False, help="go on from the newest checkpoint of --output")
    seed: int = HfArg(default=0, help="of data order, sampling and masks")
    rollout_seed: Optional[int] = HfArg(default=None, help="of the sampling in training alone; default --seed. Two runs "
                                        "that differ in it show what chance does")

    def __post_init__(self):
        self.rollout_seed = self.seed if self.rollout_seed is None else self.rollout_seed

    @property
    def masked_video(self) -> bool:
        """Does the loss compare with a masked video (PAPO)?"""
        return self.gamma > 0 or self.eta > 0


# How the five algorithms differ. PAPO's values are those of its 3B models.
PRESETS = {
    "appo":   dict(alpha=1.7, clip_high=0.28, average="tokens",    kl_coef=0.00, gamma=0.00, eta=0.00),
    "dapo":   dict(alpha=0.0, clip_high=0.28, average="tokens",    kl_coef=0.00, gamma=0.00, eta=0.00),
    "grpo":   dict(alpha=0.0, clip_high=0.20, average="responses", kl_coef=0.01, gamma=0.00, eta=0.00),
    "papo_g": dict(alpha=0.0, clip_high=0.20, average="responses", kl_coef=0.01, gamma=0.02, eta=0.00),
    "papo_d": dict(alpha=0.0, clip_high=0.28, average="tokens",    kl_coef=0.00, gamma=0.01, eta=0.03),
}
# What suits the tiny built-in model: a short task, small pictures and 8 visual steps.
TINY = dict(k1=4, k2=2, k3=6, attention_layers=2, max_new_tokens=18, min_pixels=3136, max_pixels=3136, steps=100,
            updates_per_batch=2, learning_rate=3e-4, warmup_steps=5, beta2=0.95, gradient_checkpointing=False)


# ------------------------------------------------------------------------------- the algorithm, as pure functions

def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Advantages relative to the group: (r - mean) / (std + eps), std with n - 1 (method, section 1).

    rewards [G] -> [G]; exactly 0 where all rewards are equal. Example: [1, 0, 0, 1] -> [0.866, -0.866, -0.866, 0.866].
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if (rewards == rewards[0]).all():  # the rounding of the mean, over eps, would be an advantage
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + eps)


def focused_frames(frame_attention: Tensor, response_mask: Tensor, *, k1: int = 15, k2: int = 3) -> Tensor:
    """psi(i), the K2 visual steps that each response attends to most (supplement, A.1).

    A response's attention to a step is the mean over its K1 tokens with the highest attention to that step.
    frame_attention [G, R, F], response_mask bool [G, R] -> bool [G, F].
    """
    focused = torch.zeros(frame_attention.shape[0], frame_attention.shape[2], dtype=torch.bool,
                          device=frame_attention.device)
    for i, (attention, real) in enumerate(zip(frame_attention, response_mask)):
        attention = attention[real]  # [tokens of the response, F]
        if attention.numel():
            response_attention = attention.topk(min(k1, len(attention)), dim=0).values.mean(0)  # [F]
            focused[i, response_attention.topk(min(k2, len(response_attention))).indices] = True
    return focused


def crucial_frames(frame_attention: Tensor, response_mask: Tensor, accuracy: Tensor, *, k1: int = 15, k2: int = 3,
                   threshold: float = 0.5, strategy: str = "soft") -> Tensor:
    """psi', the visual steps whose perception is trained (paper, section 3.2; supplement, Tab. D).

    S1 are the responses with accuracy >= threshold, S2 the others; soft = psi(S1), hard = psi(S1) minus psi(S2),
    all = their union. No right response: nothing is crucial (soft, hard).
    frame_attention [G, R, F], response_mask bool [G, R], accuracy [G] -> bool [F].
    """
    focused = focused_frames(frame_attention, response_mask, k1=k1, k2=k2)
    right = focused[accuracy >= threshold].any(0)
    wrong = focused[accuracy < threshold].any(0)
    return {"soft": right, "hard": right & ~wrong, "all": right | wrong}[strategy]


@torch.no_grad()
def perception_token_weights(frame_attention: Tensor, logits: Tensor, response_mask: Tensor, crucial: Tensor, *,
                             k3: int = 64, alpha: float = 1.7) -> Tensor:
    """W = 1 + alpha * D: weights of the tokens that perceive crucial frames (supplement, A.2 and Eq. 1).

    For each crucial frame a response contributes its K3 tokens with the highest attention to the frame, in the order of
    their positions. The j-th tokens of the responses are compared, D_j = sum_i KL(p_ij || mean_i p_ij), over the
    responses that have a j-th token; D is min-max normalised over j; a token gets the mean over the frames that chose it.

    Args: frame_attention [G, R, F]; logits [G, R, V] of the distribution each token was sampled from (-inf: excluded);
        response_mask bool [G, R]; crucial bool [F].
    Returns: float32 [G, R] in [1, 1 + alpha]; 1 in the padding and where no frame chose.
    Example: one crucial frame, two responses of two tokens that differ at the second alone: D = [0, D_2] -> W = [1, 1 + alpha].
    """
    group_size, length, _ = frame_attention.shape
    weights = torch.ones(group_size, length, device=frame_attention.device)
    if not crucial.any():
        return weights
    k3 = min(k3, length)
    attention = frame_attention[:, :, crucial].permute(2, 0, 1)  # [K, G, R], K crucial frames
    attention = attention.masked_fill(~response_mask, -torch.inf)
    highest = attention.topk(k3, dim=-1).indices
    chosen = torch.zeros_like(attention, dtype=torch.bool).scatter(-1, highest, True) & response_mask  # [K, G, R]
    position = torch.arange(length, device=weights.device)
    order = position.where(chosen, length).sort(-1).values[..., :k3]  # [K, G, k3], positions in order; `length`: none
    # what is compared is a tuple of one token a response; frames often choose the same, so compare each tuple once
    tuples, which = order.transpose(1, 2).flatten(0, 1).unique(dim=0, return_inverse=True)  # [U, G], [K * k3]
    rows = torch.arange(group_size, device=weights.device)
    divergence = []
    for part in tuples.split(16):  # so many tuples at once: [16, G, V] is the largest tensor here
        absent = (part == length)[..., None]  # [U, G, 1]
        log_p = logits[rows.expand(part.shape), part.clamp(max=length - 1)].float().log_softmax(-1)  # [U, G, V]
        p = log_p.masked_fill_(absent, -torch.inf).exp()
        log_mean = (p.sum(1, keepdim=True) / (~absent).sum(1, keepdim=True).clamp(min=1)).log()  # [U, 1, V]
        # 0 log 0 = 0: -inf becomes a number of which exp is 0, too; in place, for the tensors are large
        log_ratio = log_p.clamp_(min=-1e4).sub_(log_mean.clamp_(min=-1e4))
        divergence.append(torch.linalg.vecdot(p.flatten(1), log_ratio.flatten(1)).clamp(min=0))
    divergence = torch.cat(divergence)[which].view(len(order), k3)  # [K, k3], D_j of each frame
    exists = (order < length).any(1)  # [K, k3]: some response has a j-th token
    low = divergence.where(exists, torch.inf).amin(1, keepdim=True)
    span = divergence.where(exists, -torch.inf).amax(1, keepdim=True) - low
    divergence = ((divergence - low) / span).where(span >= 1e-4, 0.0)  # below: rounding noise, all equal
    # hand D_j to its tokens; column `length` collects what nobody has
    given = order.new_zeros(len(order), group_size, length + 1, dtype=torch.float32)
    given = given.scatter(-1, order, divergence[:, None].expand(order.shape))[..., :length].where(chosen, 0.0)
    return weights + alpha * given.sum(0) / chosen.sum(0).clamp(min=1)


def group_mean(values: Tensor, response_mask: Tensor, average: str) -> Tensor:
    """Mean over the group's tokens ("tokens"), or over its responses of the means over their tokens ("responses")."""
    values, tokens = values.where(response_mask, 0.0), response_mask.sum(1)  # not a product: 0 * nan is nan
    if average not in ("tokens", "responses"):
        raise ValueError(f"average {average!r}: choose tokens or responses")
    return values.sum() / tokens.sum() if average == "tokens" else (values.sum(1) / tokens.clamp(min=1)).mean()


def k3_estimate(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """The k3 estimate of KL(pi || other) at each token: exp(d) - d - 1 with d = log other - log pi, clamped."""
    d = (other_log_probs - log_probs).clamp(-20, 20)
    return d.exp() - d - 1


def clipped_surrogate_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor, *,
                           token_weights: Tensor | None = None, clip_low: float = 0.2, clip_high: float = 0.28,
                           ref_log_probs: Tensor | None = None, kl_coef: float = 0.0,
                           average: str = "tokens") -> tuple[Tensor, dict[str, Tensor]]:
    """L = -mean min(rho W A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) W A) + kl_coef * k3 (method, section 4).

    Args: log_probs, old_log_probs, ref_log_probs and token_weights [G, R]; advantages [G]; response_mask bool [G, R];
        average "tokens" (DAPO, APPO) or "responses" (GRPO). Gradient flows through log_probs alone.
    Returns: (scalar, {approx_kl: mean of rho - 1 - log rho, clip_fraction: share of tokens where the clip acts}).
    Example: rho = [1.5, 1] with A = 2, W = 1: min(3, 2.56) and min(2, 2), the loss is -2.28, clip_fraction 0.5.
    """
    log_probs = log_probs.where(response_mask, 0.0)
    log_ratio = (log_probs - old_log_probs.where(response_mask, 0.0)).clamp(-20, 20)
    ratio = log_ratio.exp()
    advantages = advantages[:, None] if token_weights is None else advantages[:, None] * token_weights
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = group_mean(-torch.minimum(ratio * advantages, clipped * advantages), response_mask, average)
    if kl_coef:
        if ref_log_probs is None:
            raise ValueError("kl_coef needs ref_log_probs")
        kl = k3_estimate(log_probs, ref_log_probs.where(response_mask, 0.0))
        loss = loss + kl_coef * group_mean(kl, response_mask, average)
    with torch.no_grad():
        acts = (clipped - ratio) * advantages < 0  # the clipped term is the smaller one
        metrics = {"approx_kl": group_mean(ratio - 1 - log_ratio, response_mask, "tokens"),
                   "clip_fraction": group_mean(acts.to(ratio.dtype), response_mask, "tokens")}
    return loss, metrics


def perception_loss(log_probs: Tensor, masked_log_probs: Tensor, response_mask: Tensor, *, gamma: float,
                    eta: float = 0.0, masked_eta: float = 0.0, average: str = "tokens") -> tuple[Tensor, dict]:
    """PAPO's implicit perception loss and double entropy loss (arXiv 2507.06448), to be added to the surrogate loss.

    -gamma * mean k3 + eta * mean(-log pi) + masked_eta * mean(-log pi_mask), where pi_mask sees the masked video and
    k3 = clamp(exp(d) - d - 1, -10, 10), d = log pi_mask - log pi. masked_log_probs are constants, as in the authors'
    code, so that masked_eta moves the loss but no weight. All tensors [G, R] -> (scalar, {perception_kl}).
    """
    log_probs, masked = log_probs.where(response_mask, 0.0), masked_log_probs.detach().where(response_mask, 0.0)
    kl = group_mean(k3_estimate(log_probs, masked).clamp(-10, 10), response_mask, average)
    loss = -gamma * kl - eta * group_mean(log_probs, response_mask, average)
    return loss - masked_eta * group_mean(masked, response_mask, average), {"perception_kl": kl.detach()}


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment: 0 up to L_max - L_c tokens, then linearly down to -1 at L_max. lengths [G] -> [G]."""
    return (max_new_tokens - buffer - lengths).clamp(-buffer, 0) / buffer if buffer else torch.zeros_like(lengths)


# ------------------------------------------------------------------------------------------------ one training step

ORDER, ROLLOUT, MASK, HELD_OUT = range(4)  # what a random draw is for: with the seed and a position it names the draw


@dataclass
class Group:
    """A prompt, the G responses to it, and the constants of the loss from before the first update on the batch."""
    position: int  # in the endless stream of prompts
    prompt: data.Prompt
    rollout: Rollout
    texts: list[str]
    scores: dict[str, Tensor]  # reward, accuracy, format: [G] each
    advantages: Tensor  # [G]
    crucial: Tensor  # bool [F]
    masked_prompt: EncodedPrompt | None = None  # PAPO: the prompt with a masked video
    old_log_probs: Tensor | None = None  # [G, R], as the three below
    token_weights: Tensor | None = None
    ref_log_probs: Tensor | None = None
    masked_log_probs: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    updates: list[dict[str, float]] = field(default_factory=list)  # metrics of each pass of the update


def weigh_tokens(group: Group, logits: Tensor | None, s: Settings) -> Tensor | None:
    """The token weights of APPO [G, R]; None: none. A study of other weightings hands its own function to `train`."""
    if s.alpha == 0:
        return None
    return perception_token_weights(group.rollout.frame_attention, logits, group.rollout.response_mask, group.crucial,
                                    k3=s.k3, alpha=s.alpha)


@dataclass
class Run:
    """What lasts from step to step."""
    settings: Settings
    model: torch.nn.Module  # the rollout model
    tokenizer: object
    policy: Policy
    reference: Policy | None  # the frozen start model
    optimizer: torch.optim.Optimizer
    rank: int
    world: int
    weigh: Callable = weigh_tokens
    position: int = 0  # prompts drawn so far, over all processes
    asked: float = 0.0  # when a signal first asked this process to stop; 0: not yet
    stop: bool = False  # some process was asked; they agree on it once a step
    seconds: Counter = field(default_factory=Counter)
    last: float = 0.0

    def lap(self, phase: str) -> None:
        """Book the time since the last call on a phase."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.last, before = time.perf_counter(), self.last
        self.seconds[phase] += self.last - before

    def gather(self, thing) -> list:
        """The thing of every process, in the order of the ranks."""
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things


def prompt_stream(run: Run, samples: list[data.Sample]) -> Iterator[dict]:
    """Endless batches {position: (sample, seed of its mask)}, this process's share of each. The samples come in a new
    order every epoch, and a batch may straddle two."""
    s, position, epoch = run.settings, run.position, -1
    while True:
        batch = {}
        for place in range(position + run.rank, position + s.prompts_per_step, run.world):
            if place // len(samples) != epoch:
                epoch = place // len(samples)
                order = np.random.default_rng((s.seed, ORDER, epoch)).permutation(len(samples))
            batch[place] = samples[order[place % len(samples)]], (s.seed, MASK, place) if s.masked_video else None
        yield batch
        position += s.prompts_per_step


def roll_out(run: Run, prompts: dict[int, data.Prompt]) -> list[Group]:
    """2. to 5. of the README's step; `rollout_groups` prompts at a time."""
    s, groups, positions, ends = run.settings, [], list(prompts), model_utils.end_token_ids(run.model)
    for first in range(0, len(positions), s.rollout_groups):
        part = positions[first:first + s.rollout_groups]
        own = [prompts[position] for position in part]
        # 2. embed
        encoded, masked = model_utils.encode_prompts(run.model, own), [None] * len(own)
        if s.masked_video:
            masked = model_utils.encode_prompts(run.model, own, [prompt.masked_patches for prompt in own])
        run.lap("embed")
        # 3. rollout
        uniforms = np.stack([np.random.default_rng((s.rollout_seed, ROLLOUT, position)).random(
            (s.group_size, s.max_new_tokens)) for position in part])
        rollouts = model_utils.rollout(run.model, encoded, torch.from_numpy(uniforms), temperature=s.temperature,
                                       attention_layers=s.attention_layers if s.alpha else 0,
                                       cuda_graph=s.cuda_graph)
        run.lap("rollout")
        for position, rollout, masked_prompt in zip(part, rollouts, masked):
            prompt, mask = prompts[position], rollout.response_mask
            # 4. score
            texts = [run.tokenizer.decode(ids[real], skip_special_tokens=True)
                     for ids, real in zip(rollout.response_ids, mask)]
            scores = torch.tensor([data.task_reward(text, prompt.sample) for text in texts], device=mask.device)  # [G, 3]
            scores = dict(zip(("reward", "accuracy", "format"), scores.T))
            scores["reward"] = scores["reward"] + overlong_penalty(mask.sum(1), s.max_new_tokens, s.overlong_buffer)
            # 5. crucial frames
            crucial = torch.zeros(prompt.num_steps, dtype=torch.bool, device=mask.device)
            if s.alpha:
                crucial = crucial_frames(rollout.frame_attention, mask, scores["accuracy"], k1=s.k1, k2=s.k2,
                                         threshold=s.threshold, strategy=s.strategy)
            group = Group(position, prompt, rollout, texts, scores, group_advantages(scores["reward"]), crucial,
                          masked_prompt)
            ended = torch.isin(rollout.response_ids, ends) & mask
            group.metrics = {name: score.mean().item() for name, score in scores.items()} | {
                "entropy": group_mean(rollout.entropy, mask, "tokens").item(),
                "response_length": mask.sum(1).float().mean().item(), "truncated": 1 - ended.any(1).float().mean().item(),
                "zero_variance_groups": float((scores["reward"] == scores["reward"][0]).all()),
                "crucial_frames": crucial.sum().item(),
                "loss": 0.0}  # until an update
            groups.append(group)
        run.lap("score")
    return groups


def learns(group: Group, s: Settings) -> bool:
    """Has the group's loss a gradient? Equal rewards give advantages of 0, and if there is no other term, none."""
    return bool(s.kl_coef or s.masked_video or group.advantages.any())


def update(run: Run, groups: dict[int, Group], roster: list[tuple[int, int, bool]]) -> list[float]:
    """6. and 7. Weigh the tokens, then one or several optimizer steps on the batch; returns the gradient norms.

    groups: this process's, by position; roster: (position, rank, `learns`) of every group of the batch, in order. A group
    without a gradient counts in the mean over groups and is not computed: late in training that is most of the batch (on
    many processes less is saved: the one with most to do sets the pace).
    All processes make the same number of passes, some perhaps with a dummy of weight 0: a pass of a sharded model is a
    collective call.
    """
    s, norms = run.settings, []

    def passes(part: list[tuple[int, int, bool]], masked: bool = False):
        """(group, log_probs, logits) of this process's groups that learn, then (None, ...) for its dummies."""
        mine = [groups[position] for position, rank, learning in part if learning and rank == run.rank]
        for group in mine:
            prompt = group.masked_prompt if masked else group.rollout.prompt
            weighs = s.alpha > 0 and group.old_log_probs is None and not masked
            yield group, *run.policy(prompt, group.rollout.response_ids, group.rollout.response_mask, keep_logits=weighs)
        most = max(Counter(rank for _, rank, learning in part if learning).values(), default=1)
        for _ in range(most - len(mine)):
            yield None, *run.policy(*model_utils.dummy_group(run.model))

    @torch.no_grad()
    def record(group: Group, log_probs: Tensor, logits: Tensor | None) -> None:
        """The constants of the loss, and what is logged with them."""
        mask = group.rollout.response_mask
        group.old_log_probs = log_probs.detach()
        run.lap("update")
        # 6. token weights
        group.token_weights = run.weigh(group, logits, s)
        run.lap("weights")
        if run.reference is not None:
            group.ref_log_probs = run.reference(group.rollout.prompt, group.rollout.response_ids, mask)[0]
        weights = torch.ones_like(log_probs) if group.token_weights is None else group.token_weights
        group.metrics |= {"token_weight_max": weights.max().item(),
                          "token_weight_mean": group_mean(weights, mask, "tokens").item(),
                          "rollout_logprob_gap": (log_probs - group.rollout.log_probs).abs().max().item()}

    size = s.minibatch_prompts or s.prompts_per_step
    minibatches = [roster[i:i + size] for i in range(0, len(roster), size)]
    with torch.no_grad():
        for group, log_probs, _ in passes(roster, masked=True) if s.masked_video else ():
            if group is not None:
                group.masked_log_probs = log_probs
        # with one minibatch, the first pass of the update records: the policy has not changed before it
        for group, log_probs, logits in passes(roster) if len(minibatches) > 1 else ():
            if group is not None:
                record(group, log_probs, logits)
            del logits  # large
    for part in minibatches * s.updates_per_batch:
        for group, log_probs, logits in passes(part):
            if group is None:
                (log_probs.sum() * 0).backward()
                continue
            if group.old_log_probs is None:
                record(group, log_probs, logits)
            del logits
            # 7. update
            loss, metrics = clipped_surrogate_loss(
                log_probs, group.old_log_probs, group.advantages, group.rollout.response_mask, average=s.average,
                token_weights=group.token_weights, clip_low=s.clip_low, clip_high=s.clip_high,
                ref_log_probs=group.ref_log_probs, kl_coef=s.kl_coef)
            if s.masked_video:
                perception, more = perception_loss(log_probs, group.masked_log_probs, group.rollout.response_mask,
                                                   gamma=s.gamma, eta=s.eta, masked_eta=s.eta, average=s.average)
                loss, metrics = loss + perception, metrics | more
            (loss * run.world / len(part)).backward()  # FSDP averages over the processes; we want the mean of the groups
            group.updates.append({name: value.item() for name, value in {"loss": loss, **metrics}.items()})
        norms.append(torch.nn.utils.clip_grad_norm_(run.policy.parameters(), s.max_grad_norm).full_tensor().item())
        if math.isfinite(norms[-1]):  # the norm is over all processes, so they decide alike
            run.optimizer.step()
        run.optimizer.zero_grad()
    model_utils.refresh(run.model, run.policy)
    run.lap("update")
    return norms


def training_step(run: Run, draws: Iterator[dict], step: int) -> tuple[dict, list[dict], list[Group]]:
    """One training step: (metrics of the whole batch, records of what was skipped, this process's groups)."""
    s, groups, skipped = run.settings, {}, []
    run.seconds.clear()
    started = run.last = time.perf_counter()
    for _ in range(1 + s.max_resamples * s.dynamic_sampling):
        # 1. read
        batch = next(draws)
        wait([visual for _, visual in batch.values()])
        run.lap("wait")
        prompts, left_out = data.build_prompts(batch, run.tokenizer, s.max_prompt_tokens)
        run.position += s.prompts_per_step
        run.lap("prompts")
        groups |= {group.position: group for group in roll_out(run, prompts) if not s.dynamic_sampling
                   or (group.scores["accuracy"] != group.scores["accuracy"][0]).any()}
        gathered = run.gather(({p: learns(group, s) for p, group in groups.items()}, left_out, run.asked))
        skipped += [record for _, records, _ in gathered for record in records]
        run.stop = any(asked for _, _, asked in gathered)
        roster = sorted((position, rank, learning) for rank, (own, _, _) in enumerate(gathered)
                        for position, learning in own.items())
        if len(roster) >= s.prompts_per_step:
            break
    roster = roster[:s.prompts_per_step]
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = s.learning_rate * min(1, (step + 1) / max(s.warmup_steps, 1))
    norms = update(run, groups, roster) if roster else []

    mine = {position: groups[position] for position, rank, _ in roster if rank == run.rank}
    for group in mine.values():
        if group.updates:
            group.metrics |= {name: float(np.mean([one[name] for one in group.updates])) for name in group.updates[0]}
    everyone = {position: metrics for part in run.gather({p: g.metrics for p, g in mine.items()})
                for position, metrics in part.items()}
    # in the order of the stream, so that the figures are the same for any number of processes
    names = dict.fromkeys(name for own in everyone.values() for name in own)  # some exist for groups that learn alone
    table = {name: [everyone[position][name] for position, *_ in roster if name in everyone[position]] for name in names}
    metrics = dict(loss=0.0, approx_kl=0.0, clip_fraction=0.0, rollout_logprob_gap=0.0, token_weight_mean=1.0,
                   token_weight_max=1.0)  # where none learns
    metrics |= {name: max(values) if name in ("token_weight_max", "rollout_logprob_gap") else float(np.mean(values))
                for name, values in table.items()}
    elapsed = time.perf_counter() - started
    metrics |= {"grad_norm": float(np.mean(norms or [0.0])), "samples_per_second": len(roster) / elapsed,
                "tokens_per_second": sum(table.get("response_length", ())) * s.group_size / elapsed,
                "seconds": {phase: round(seconds, 4) for phase, seconds in run.seconds.items()}, "groups": len(roster),
                "skipped": len(skipped)}
    return {"step": step + 1} | metrics, skipped, list(mine.values())


# ------------------------------------------------------------------------------------------------ held-out samples

def score_prompts(model, tokenizer, prompts: dict[int, data.Prompt], encoded: list[EncodedPrompt],
                  s: Settings) -> list[dict[str, float]]:
    """One sampled response to each prompt: its accuracy, and whether the frame that shows the answer, if it is known, is
    the one (top1) or among the K2 (topk) that the response attends to most."""
    uniforms = np.stack([np.random.default_rng((s.seed, HELD_OUT, i)).random((1, s.max_new_tokens)) for i in prompts])
    rollouts = model_utils.rollout(model, encoded, torch.from_numpy(uniforms), temperature=s.temperature,
                                   attention_layers=s.attention_layers)
    scores = []
    for prompt, rollout in zip(prompts.values(), rollouts):
        text = tokenizer.decode(rollout.response_ids[0][rollout.response_mask[0]], skip_special_tokens=True)
        scores.append({"accuracy": data.accuracy_reward(text, prompt.sample)})
        if (shown := prompt.sample.crucial_step) is not None:
            for name, k2 in (("top1", 1), ("topk", s.k2)):
                focused = focused_frames(rollout.frame_attention, rollout.response_mask, k1=s.k1, k2=k2)
                scores[-1][name] = float(focused[0, shown])
    return scores


def score_held_out(run: Run, samples: list[data.Sample], reader: data.VideoReader) -> dict[str, float]:
    """Means over the held-out samples, shared out over the processes; the same random numbers each time."""
    s, scores, mine = run.settings, [], [(i, (sample, None)) for i, sample in enumerate(samples)][run.rank::run.world]
    for batch in data.read_ahead(reader, (dict(mine[i:i + s.rollout_groups]) for i in range(0, len(mine), s.rollout_groups))):
        prompts, _ = data.build_prompts(batch, run.tokenizer, s.max_prompt_tokens)
        encoded = model_utils.encode_prompts(run.model, list(prompts.values()))
        scores += score_prompts(run.model, run.tokenizer, prompts, encoded, s) if prompts else []
    scores = [score for part in run.gather(scores) for score in part]
    names = dict.fromkeys(name for score in scores for name in score)
    return {"samples": len(scores)} | {
        name: float(np.mean([score[name] for score in scores if name in score])) for name in names}


# -------------------------------------------------------------------------------------------------------- the run

def set_up(s: Settings, model, tokenizer, weigh: Callable = weigh_tokens) -> Run:
    """Sharded policy, reference and optimizer beside the rollout model."""
    rank, world, device = model_utils.init_processes()
    reference = model_utils.frozen_policy(model, s.temperature) if s.kl_coef else None
    policy = Policy(model, s.temperature)
    if s.gradient_checkpointing:
        model_utils.recompute_activations(policy.language_model)
    policy = model_utils.shard(policy, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.learning_rate, betas=(0.9, s.beta2), weight_decay=0.0,
                                  fused=device.type == "cuda")  # else a step makes a copy of the second moments
    return Run(s, model, tokenizer, policy, reference, optimizer, rank, world, weigh)


def train(s: Settings, weigh: Callable = weigh_tokens) -> None:
    """The training loop: steps, logs, checkpoints. Randomness derives from (seed or rollout_seed, position in the stream)
    alone, so no random state is kept, and a resumed run and one over more processes give the same numbers."""
    rank, _, device = model_utils.init_processes()
    if rank == 0:
        prepare_built_in(s)
    dist.barrier()
    samples, held_out = (data.with_files(data.load_samples(path, s.video_root), path, s.skip_missing, rank == 0)
                         if path else [] for path in (s.data, s.eval_data))
    # after the data: a mistake in them shows before a large model is loaded
    run = set_up(s, *model_utils.load_model(s.model, device), weigh)
    output, steps = Path(s.output), s.steps or math.ceil(s.epochs * len(samples) / s.prompts_per_step)
    done = model_utils.open_run_folder(output, asdict(s), free=(  # what may differ from the run that is resumed
        "output", "steps", "epochs", "save_every", "keep", "eval_every", "readers", "decode_timeout", "rollout_groups",
        "gradient_checkpointing", "cuda_graph"))
    if done.get("checkpoint"):
        model_utils.load_checkpoint(done["checkpoint"], run.model, run.policy, run.optimizer)
        run.position = done["position"]

    def on_signal(number: int, _) -> None:
        """Stop after this step, with a checkpoint; asked again later, end at once. Within 5 s it is the same wish: a job
        manager signals every process, and torchrun passes its own signal on."""
        if run.asked and time.monotonic() > run.asked + 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        run.asked = run.asked or time.monotonic()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def log(name: str, *records: dict) -> None:
        if run.rank == 0:
            with open(output / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def measure(step: int, reader: data.VideoReader) -> dict[str, float]:
        scores = score_held_out(run, held_out, reader) if held_out else {}
        log("held_out.jsonl", *[{"step": step} | scores] * bool(scores))
        return scores

    def save(step: int, unreadable: int) -> None:
        state = {"step": step, "position": run.position, "unreadable": unreadable}
        model_utils.save_checkpoint(output / f"step-{step:06d}", run.model, run.tokenizer, s.model, run.policy,
                                    run.optimizer, state)
        for old in sorted(output.glob("step-??????"))[:-s.keep] if run.rank == 0 else ():
            shutil.rmtree(old)
        dist.barrier()  # no process ends while another writes

    with open_reader(s) as reader:
        unreadable, not_finite, rates = done.get("unreadable", 0), [], []
        measured = model_utils.read_log(output / "held_out.jsonl") or [measure(0, reader)]
        draws = data.read_ahead(reader, prompt_stream(run, samples))
        bar = tqdm(range(done.get("step", 0), steps), desc=s.algorithm, disable=run.rank > 0, initial=done.get("step", 0),
                   total=steps)
        for step in bar:
            metrics, skipped, groups = training_step(run, draws, step)
            log("metrics.jsonl", metrics)
            log("skipped.jsonl", *({"step": step + 1} | record for record in skipped))
            log("samples.jsonl", *(describe(group, run.tokenizer, step + 1)
                                    for group in sorted(groups, key=lambda group: not learns(group, s))[:1]))
            bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("accuracy", "reward", "response_length")
                             if name in metrics})
            if s.dynamic_sampling and metrics["groups"] < s.prompts_per_step and run.rank == 0:
                bar.write(f"step {step + 1}: only {metrics['groups']} groups with right and wrong responses were found")
            rates.append(metrics["samples_per_second"])
            unreadable += sum(record["unreadable"] for record in skipped)
            if unreadable > 0.05 * max(100, run.position):
                raise RunError(f"{unreadable} of {run.position} samples could not be read, over 5%; mend the videos that "
                               f"{output / 'skipped.jsonl'} lists")
            not_finite = [] if math.isfinite(metrics["grad_norm"]) else not_finite + [[g.prompt.sample.id for g in groups]]
            if len(not_finite) == 3:
                raise RunError(f"the gradient was not finite in 3 steps in a row, with samples {not_finite}")
            if step + 1 == steps or s.eval_every and (step + 1) % s.eval_every == 0:
                measured.append(measure(step + 1, reader))
            if run.stop or s.save_every and (step + 1) % s.save_every == 0:
                save(step + 1, unreadable)
            if run.stop:
                raise RunError(f"stopped by a signal after step {step + 1}; go on with the same command and --resume")
    model_utils.save_checkpoint(output / "checkpoint", run.model, run.tokenizer, s.model)
    dist.barrier()
    if run.rank == 0:
        for name, label in (("accuracy", "held-out accuracy"), ("topk", f"true frame among a response's top {s.k2}")):
            if name in measured[0]:
                print(f"{label:40s} {measured[0][name]:.3f} -> {measured[-1][name]:.3f}   "
                      f"({measured[-1]['samples']} samples)")
        print(f"{'samples per second (median)':40s} {np.median(rates or [0]):.2f}")
        print(f"{'checkpoint':40s} {output / 'checkpoint'}")
        print(f"{'next':40s} --algorithm dapo to compare, --model and --data for your own; log: {output / 'metrics.jsonl'}")


def open_reader(s: Settings) -> data.VideoReader:
    """The decoding processes."""
    return data.VideoReader(s.readers, s.decode_timeout, fps=s.fps, max_frames=s.max_frames, min_pixels=s.min_pixels,
                            max_pixels=s.max_pixels)


def describe(group: Group, tokenizer, step: int) -> dict:
    """What samples.jsonl keeps of a group: its responses with their scores, and each token with its weight."""
    sample, mask, weights = group.prompt.sample, group.rollout.response_mask, group.token_weights
    return {"step": step, "id": sample.id, "question": sample.question, "answer": sample.answer,
            "crucial_frames": group.crucial.nonzero().flatten().tolist(),
            "responses": [{"text": text, **{name: score[i].item() for name, score in group.scores.items()},
                           "advantage": group.advantages[i].item(),
                           "tokens": tokenizer.convert_ids_to_tokens(group.rollout.response_ids[i][mask[i]].tolist()),
                           "weights": None if weights is None else [round(w, 4) for w in weights[i][mask[i]].tolist()]}
                          for i, text in enumerate(group.texts)]}


def prepare_built_in(s: Settings) -> None:
    """Make what is missing of the built-in task: videos with annotations, and the tiny model, warmed up."""
    folder = Path(s.toy_folder)
    if s.data == str(folder / "train.json"):
        data.make_toy_data(folder)
    if s.model != str(folder / "model") or (folder / "model" / "config.json").exists():
        return
    torch.set_num_threads(1)  # as in load_model
    _, tokenizer = model_utils.tiny_model(data.toy_vocabulary())  # it is the same for every start
    test = {n: data.toy_prompt(np.random.default_rng((s.seed, 3, n)), tokenizer, n % 8)[0] for n in range(128)}
    lessons, encoded = data.toy_lessons(tokenizer, 1024, s.seed), []

    def good_enough(model) -> bool:
        """Half of the answers right, and the model looks: else reinforcement learning has little to start from."""
        if not encoded:  # the vision tower does not change any more
            encoded.extend(model_utils.encode_prompts(model, list(test.values())))
        scores = score_prompts(model, tokenizer, test, encoded, Settings(**TINY))
        accuracy, top1 = (np.mean([score[name] for score in scores]) for name in ("accuracy", "top1"))
        if accuracy > 0.75:  # without looking: a model that looks would have stopped at 0.5
            raise RunError("the built-in model learned to answer before it looked at the frames; try another --seed")
        return accuracy >= 0.5 and top1 >= 0.3

    for attempt in range(5):  # some random starts answer from what the question's tokens have seen, and do not look
        model, _ = model_utils.tiny_model(data.toy_vocabulary(), s.seed + 1000 * attempt)
        encoded.clear()
        try:
            model_utils.warm_up(model, lessons, good_enough)
            break
        except RunError:
            if attempt == 4:
                raise
    model_utils.save_checkpoint(folder / "model", model, tokenizer, None)


# ------------------------------------------------------------------------------------------------- the command line

class Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {data.escaped(' '.join(message.split()))}\n")


def is_tiny(model: str | None, toy_folder: str) -> bool:
    """Is this the built-in model, or trained from it? Its settings go with it."""
    config = Path(model or f"{toy_folder}/model") / "config.json"
    return model is None or config.is_file() and '"appo_built_in": true' in config.read_text(errors="replace")


def parse_settings(parser: Parser, arguments: list[str] | None = None) -> Settings:
    """Defaults of the paper, then those of the tiny model, then the algorithm's preset, then what the user says."""
    first = parser.parse_args(arguments)
    parser.set_defaults(**(TINY if is_tiny(first.model, first.toy_folder) else {}) | PRESETS[first.algorithm])
    s = Settings(**vars(parser.parse_args(arguments)))
    s.model = s.model or str(Path(s.toy_folder) / "model")
    if s.data is None:
        s.data, s.eval_data = str(Path(s.toy_folder) / "train.json"), s.eval_data or str(Path(s.toy_folder) / "test.json")
    s.output = s.output or f"runs/{s.algorithm}"
    may_be_zero = {"threshold", "alpha", "clip_low", "clip_high", "kl_coef", "gamma", "eta", "minibatch_prompts", "steps",
                   "max_resamples", "overlong_buffer", "warmup_steps", "save_every", "eval_every", "seed", "rollout_seed"}
    for name, value in asdict(s).items():
        if isinstance(value, (int, float)) and not (0 < value < math.inf or value == 0 and
                                                    (name in may_be_zero or isinstance(value, bool))):
            raise RunError(f"--{name} {value}: give a number {'of at least' if name in may_be_zero else 'above'} 0")
    for wrong, message in (
            (s.min_pixels > s.max_pixels, f"--min_pixels {s.min_pixels} is above --max_pixels {s.max_pixels}: lower it"),
            (s.clip_low >= 1, f"--clip_low {s.clip_low}: give a number below 1"),
            (s.beta2 >= 1, f"--beta2 {s.beta2}: give a number below 1"),
            (s.overlong_buffer > s.max_new_tokens, f"--overlong_buffer {s.overlong_buffer} is longer than "
             f"--max_new_tokens {s.max_new_tokens}: shorten it"),
            (s.minibatch_prompts and s.prompts_per_step % s.minibatch_prompts, f"--minibatch_prompts "
             f"{s.minibatch_prompts} does not divide --prompts_per_step {s.prompts_per_step}: choose a divisor")):
        if wrong:
            raise RunError(message)
    return s


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(Settings, description=Settings.__doc__, allow_abbrev=False)
    transformers.utils.logging.disable_progress_bar()  # one bar at a time
    try:
        train(parse_settings(parser, arguments))
    except (RunError, data.DataError) as error:
        rank = f"rank {dist.get_rank()}: " if dist.is_initialized() and dist.get_world_size() > 1 else ""
        parser.error(rank + str(error))


if __name__ == "__main__":
    main()
