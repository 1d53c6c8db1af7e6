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
import sys
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterator, Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

import data
import model_utils
from model_utils import EncodedPrompt, HeadLogits, Policy, Rollout


@dataclass
class Settings:
    """Train Qwen2.5-VL with APPO or one of its baselines. Without --model and --data: the built-in task."""
    model: Optional[str] = HfArg(default=None, help="model folder or hub name; default: the tiny built-in model")
    data: Optional[str] = HfArg(default=None, help="annotation files a.json,b.jsonl; default: the built-in videos")
    video_root: Optional[str] = HfArg(default=None, help="folder under which the annotations' paths are looked up")
    skip_missing: bool = HfArg(default=False, help="train without the samples whose files are missing")
    toy_folder: str = HfArg(default="runs/toy", help="where the built-in videos and model are made")
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
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass: less memory")
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
    seed: int = HfArg(default=0, help="of data order, sampling and masks")


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
            updates_per_batch=2, learning_rate=3e-4, warmup_steps=5, beta2=0.95)


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

    Args: frame_attention [G, R, F]; logits [G, R, V] of the distribution each token was sampled from (-inf: excluded),
        or anything that gives [n, V] for `logits[rows, tokens]`; response_mask bool [G, R]; crucial bool [F].
    Returns: float32 [G, R] in [1, 1 + alpha]; 1 in the padding and where no frame chose.
    Example: two one-frame responses of two tokens that differ at the second alone: D = [0, D_2] -> W = [1, 1 + alpha].
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
        present = (part < length)[..., None]  # [U, G, 1]
        log_p = logits[rows.expand(part.shape), part.clamp(max=length - 1)].float().log_softmax(-1)  # [U, G, V]
        p = log_p.exp().where(present, 0.0)
        mean = p.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
        divergence.append((p * (log_p - mean.log())).where((p > 0) & (mean > 0), 0.0)  # 0 log 0 = 0
                          .sum((1, 2)).clamp(min=0))
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

ORDER, ROLLOUT, MASK, HELD_OUT = range(4)  # what randomness is drawn for; with the seed and a position it names a draw


@dataclass
class Group:
    """A prompt, the responses to it, and what the update needs of them. G responses, R tokens, F visual steps."""
    position: int  # in the endless stream of prompts: step * prompts_per_step + slot
    prompt: data.Prompt
    rollout: Rollout
    texts: list[str]
    scores: dict[str, Tensor]  # reward, accuracy, format: [G] each
    advantages: Tensor  # [G]
    crucial: Tensor  # bool [F]
    masked_prompt: EncodedPrompt | None = None  # PAPO: the prompt with a masked video
    # constants of the loss, from before the first optimizer step on the batch
    old_log_probs: Tensor | None = None  # [G, R]
    token_weights: Tensor | None = None
    ref_log_probs: Tensor | None = None
    masked_log_probs: Tensor | None = None


def weigh_tokens(group: Group, logits: HeadLogits, settings: Settings) -> Tensor | None:
    """The token weights of APPO. A study of other weightings hands its own function to `train`."""
    if settings.alpha == 0:
        return None
    return perception_token_weights(group.rollout.frame_attention, logits, group.rollout.response_mask, group.crucial,
                                    k3=settings.k3, alpha=settings.alpha)


@dataclass
class Run:
    """What stays the same from step to step."""
    settings: Settings
    model: torch.nn.Module  # the rollout model
    tokenizer: object
    policy: Policy
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    rank: int
    world: int
    weigh: Callable

    def __post_init__(self):
        self.seconds, self.last = Counter(), time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last call on a phase."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now

    def gather(self, thing) -> list:
        """The thing of every process, in the order of the ranks."""
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things


def draw_batches(run: Run, samples: list, reader: data.VideoReader, position: int) -> Iterator[dict[int, tuple]]:
    """Endless batches {position: (sample, its video to come)}, this process's share of each. The data are read in a new
    order every epoch, a batch may straddle two, and the next batch is being decoded while one is at work."""
    s, orders = run.settings, {}

    def request(start: int) -> dict[int, tuple[data.Sample, Future]]:
        batch = {}
        for place in range(start + run.rank, start + s.prompts_per_step, run.world):
            epoch, index = divmod(place, len(samples))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((s.seed, ORDER, epoch)).permutation(len(samples))
            sample = samples[orders[epoch][index]]
            batch[place] = sample, reader.submit(sample, (s.seed, MASK, place) if s.gamma else None)
        return batch

    upcoming = request(position)
    while True:
        current, position = upcoming, position + s.prompts_per_step
        upcoming = request(position)
        yield current


def read_prompts(batch: dict, tokenizer, max_prompt_tokens: int) -> tuple[dict[int, data.Prompt], list[dict]]:
    """1. The prompts of a batch, and a record of every sample that is left out, with the reason."""
    prompts, skipped = {}, []
    for position, (sample, future) in batch.items():
        try:
            prompt = data.build_prompt(sample, future.result(), tokenizer)
            if len(prompt.input_ids) <= max_prompt_tokens:
                prompts[position] = prompt
                continue
            reason, unreadable = f"prompt of {len(prompt.input_ids)} tokens, over --max_prompt_tokens", False
        except data.VideoError as error:
            reason, unreadable = str(error), True
        skipped.append({"position": position, "id": sample.id, "video": sample.video, "reason": reason,
                        "unreadable": unreadable})
    return prompts, skipped


def roll_out(run: Run, prompts: dict[int, data.Prompt]) -> list[Group]:
    """2. to 5. Embed, sample, score, find the crucial frames; `rollout_groups` prompts at a time."""
    s, groups, positions = run.settings, [], list(prompts)
    for first in range(0, len(positions), s.rollout_groups):
        part = positions[first:first + s.rollout_groups]
        encoded = [model_utils.encode_prompt(run.model, prompts[p]) for p in part]
        run.lap("embed")
        uniforms = np.stack([np.random.default_rng((s.seed, ROLLOUT, p)).random((s.group_size, s.max_new_tokens))
                             for p in part])
        rollouts = model_utils.rollout(run.model, encoded, torch.from_numpy(uniforms), temperature=s.temperature,
                                       attention_layers=s.attention_layers if s.alpha else 0)
        run.lap("rollout")
        for position, rollout in zip(part, rollouts):
            prompt, mask = prompts[position], rollout.response_mask
            texts = [run.tokenizer.decode(ids[real], skip_special_tokens=True)
                     for ids, real in zip(rollout.response_ids, mask)]
            scores = [data.task_reward(text, prompt.sample) for text in texts]
            scores = dict(zip(("reward", "accuracy", "format"), torch.tensor(scores, device=mask.device).T))
            penalty = overlong_penalty(mask.sum(1), s.max_new_tokens, s.overlong_buffer)
            crucial = torch.zeros(prompt.num_steps, dtype=torch.bool, device=mask.device)
            if s.alpha:
                crucial = crucial_frames(rollout.frame_attention, mask, scores["accuracy"], k1=s.k1, k2=s.k2,
                                         threshold=s.threshold, strategy=s.strategy)
            masked = model_utils.encode_prompt(run.model, prompt, prompt.masked_patches) if s.gamma else None
            scores["reward"] = scores["reward"] + penalty
            groups.append(Group(position, prompt, rollout, texts, scores, group_advantages(scores["reward"]), crucial,
                                masked))
        run.lap("score")
    return groups


def update(run: Run, groups: dict[int, Group], roster: list[tuple[int, int]]) -> tuple[dict[int, dict], list[float]]:
    """6. and 7. Weigh the tokens, then one or several optimizer steps on the batch.

    roster: (position, rank) of every group of the batch, in order. All processes make the same number of passes, some
    perhaps with a dummy of weight 0, because every pass of a sharded model is a collective call.
    Returns: statistics of this process's groups by position, and the gradient norms of the optimizer steps.
    """
    s, device = run.settings, run.model.device
    end = model_utils.end_token_ids(run.model)[:1]
    dummy = (EncodedPrompt(end, torch.zeros(3, 1, dtype=torch.long, device=device), 1, end < 0,
                           torch.empty(0, run.model.config.text_config.hidden_size, device=device), end - end - 1, 0),
             end[None], torch.ones(1, 1, dtype=torch.bool, device=device))
    stats, norms = {}, []

    def passes(part: list[tuple[int, int]], masked: bool = False):
        mine = [groups[position] for position, rank in part if rank == run.rank]
        for group in mine:
            rollout = group.rollout
            prompt = group.masked_prompt if masked else rollout.prompt
            yield group, *run.policy(prompt, rollout.response_ids, rollout.response_mask)
        for _ in range(max(Counter(rank for _, rank in part).values(), default=0) - len(mine)):
            yield None, *run.policy(*dummy)

    @torch.no_grad()
    def record(group: Group, log_probs: Tensor, entropy: Tensor, hidden: Tensor) -> None:
        mask = group.rollout.response_mask
        group.old_log_probs = log_probs.detach()
        run.lap("update")
        group.token_weights = run.weigh(group, HeadLogits(run.model, hidden, s.temperature), s)
        run.lap("weights")
        if run.reference is not None:
            group.ref_log_probs = run.reference(group.rollout.prompt, group.rollout.response_ids, mask)[0]
        weights = torch.ones_like(log_probs) if group.token_weights is None else group.token_weights
        stats[group.position] = {
            "entropy": group_mean(entropy, mask, "tokens").item(),
            "token_weight_mean": group_mean(weights, mask, "tokens").item(),
            "token_weight_max": weights.max().item(),
            "rollout_logprob_gap": (log_probs - group.rollout.log_probs).abs().max().item(), "passes": []}

    size = s.minibatch_prompts or s.prompts_per_step
    minibatches = [roster[i:i + size] for i in range(0, len(roster), size)]
    with torch.no_grad():
        if s.gamma:
            for group, log_probs, _, _ in passes(roster, masked=True):
                if group is not None:
                    group.masked_log_probs = log_probs
        if len(minibatches) > 1:  # else the first pass below records: the policy has not changed yet
            for group, *outputs in passes(roster):
                if group is not None:
                    record(group, *outputs)
    for _ in range(s.updates_per_batch):
        for part in minibatches:
            for group, log_probs, *outputs in passes(part):
                if group is None:
                    (log_probs.sum() * 0).backward()
                    continue
                if group.old_log_probs is None:
                    record(group, log_probs, *outputs)
                mask = group.rollout.response_mask
                loss, metrics = clipped_surrogate_loss(
                    log_probs, group.old_log_probs, group.advantages, mask, token_weights=group.token_weights,
                    clip_low=s.clip_low, clip_high=s.clip_high, ref_log_probs=group.ref_log_probs, kl_coef=s.kl_coef,
                    average=s.average)
                if group.masked_log_probs is not None:
                    perception, more = perception_loss(log_probs, group.masked_log_probs, mask, gamma=s.gamma, eta=s.eta,
                                                       masked_eta=s.eta, average=s.average)
                    loss, metrics = loss + perception, metrics | more
                (loss * run.world / len(part)).backward()  # FSDP averages over the processes; we want the groups' mean
                stats[group.position]["passes"].append({k: v.item() for k, v in {"loss": loss, **metrics}.items()})
            norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), s.max_grad_norm).full_tensor().item()
            norms.append(norm)
            if np.isfinite(norm):  # the norm is global, so all processes decide alike
                run.optimizer.step()
            run.optimizer.zero_grad()
    model_utils.refresh(run.model, run.policy)
    run.lap("update")
    return stats, norms


def training_step(run: Run, draws: Iterator, step: int) -> tuple[dict, list[dict], list[Group]]:
    """One training step: (metrics over the whole batch, skipped samples, this process's groups)."""
    s, groups, skipped, started = run.settings, {}, [], time.perf_counter()
    run.seconds.clear()
    for draw in range(1 + s.max_resamples * s.dynamic_sampling):
        prompts, left_out = read_prompts(next(draws), run.tokenizer, s.max_prompt_tokens)
        run.lap("wait")
        fresh = roll_out(run, prompts)
        if s.dynamic_sampling:
            fresh = [group for group in fresh if group.scores["accuracy"].unique().numel() > 1]
        groups |= {group.position: group for group in fresh}
        gathered = run.gather((sorted(groups), left_out))
        skipped += [record for _, records in gathered for record in records]
        roster = sorted((position, rank) for rank, (positions, _) in enumerate(gathered) for position in positions)
        if len(roster) >= s.prompts_per_step:
            break
    roster = roster[:s.prompts_per_step]
    for group in run.optimizer.param_groups:
        group["lr"] = s.learning_rate * min(1, (step + 1) / max(s.warmup_steps, 1))
    stats, norms = update(run, groups, roster) if roster else ({}, [])

    for position, own in stats.items():
        group, mask = groups[position], groups[position].rollout.response_mask
        ended = torch.isin(group.rollout.response_ids, model_utils.end_token_ids(run.model)) & mask
        own |= {name: score.mean().item() for name, score in group.scores.items()}
        own |= {name: float(np.mean([one[name] for one in own["passes"]])) for name in own["passes"][0]}
        own |= {"response_length": mask.sum(1).float().mean().item(), "tokens": mask.sum().item(),
                "truncated": 1 - ended.any(1).float().mean().item(),
                "zero_variance_groups": float(group.scores["reward"].unique().numel() == 1),
                "crucial_frames": group.crucial.sum().item()}
    everyone = [own for _, own in sorted((p, own) for part in run.gather(stats) for p, own in part.items())]
    metrics = {name: float(np.mean([own[name] for own in everyone])) for name in (everyone or [{}])[0] if name != "passes"}
    for name in ("token_weight_max", "rollout_logprob_gap"):
        metrics[name] = max((own[name] for own in everyone), default=0.0)
    elapsed = time.perf_counter() - started
    metrics |= {"grad_norm": float(np.mean(norms)) if norms else 0.0,
                "samples_per_second": len(everyone) / elapsed, "tokens_per_second": metrics.pop("tokens", 0) * len(everyone) / elapsed,
                "seconds": {phase: round(value, 4) for phase, value in run.seconds.items()}, "skipped": len(skipped)}
    return {"step": step + 1} | metrics, skipped, [groups[p] for p, rank in roster if rank == run.rank]


def score_prompts(model, tokenizer, prompts: list[data.Prompt], indices: list[int], s: Settings) -> list[dict]:
    """One sampled response to each prompt: its accuracy, and whether the frame that shows the answer, if it is known, is
    the one (top1) or among the K2 (topk) that the response attends to most."""
    encoded = [model_utils.encode_prompt(model, prompt) for prompt in prompts]
    uniforms = np.stack([np.random.default_rng((s.seed, HELD_OUT, i)).random((1, s.max_new_tokens)) for i in indices])
    rollouts = model_utils.rollout(model, encoded, torch.from_numpy(uniforms), temperature=s.temperature,
                                   attention_layers=s.attention_layers)
    scores = []
    for prompt, rollout in zip(prompts, rollouts):
        text = tokenizer.decode(rollout.response_ids[0][rollout.response_mask[0]], skip_special_tokens=True)
        scores.append({"accuracy": data.accuracy_reward(text, prompt.sample)})
        if (shown := prompt.sample.crucial_step) is not None:
            for name, k2 in (("top1", 1), ("topk", s.k2)):
                focused = focused_frames(rollout.frame_attention, rollout.response_mask, k1=s.k1, k2=k2)
                scores[-1][name] = float(focused[0, shown])
    return scores


def score_held_out(run: Run, samples: list, reader: data.VideoReader) -> dict[str, float]:
    """Means over the held-out samples, shared out over the processes; the same random numbers each time."""
    s, scores, mine = run.settings, [], list(enumerate(samples))[run.rank::run.world]
    parts = [mine[i:i + s.rollout_groups] for i in range(0, len(mine), s.rollout_groups)]
    ahead = [{i: (sample, reader.submit(sample)) for i, sample in part} for part in parts[:1]]
    for n in range(len(parts)):
        ahead += [{i: (sample, reader.submit(sample)) for i, sample in part} for part in parts[n + 1:n + 2]]
        prompts, _ = read_prompts(ahead.pop(0), run.tokenizer, s.max_prompt_tokens)
        if prompts:
            scores += score_prompts(run.model, run.tokenizer, list(prompts.values()), list(prompts), s)
    scores = [score for part in run.gather(scores) for score in part]
    return {name: float(np.mean([score[name] for score in scores])) for name in (scores or [{}])[0]}


# -------------------------------------------------------------------------------------------------------- the run

class SettingsError(ValueError):
    """A setting that cannot be; the message is one line that names it and the mend."""


def train(s: Settings, weigh: Callable = weigh_tokens) -> None:
    """The training loop: read, roll out, update, log, and at the end a checkpoint in Hugging Face format."""
    rank, world, device = model_utils.init_processes()
    if rank == 0:
        prepare_built_in(s)
    dist.barrier()
    samples = load_data(s.data, s, announce=rank == 0)
    held_out = load_data(s.eval_data, s, announce=rank == 0) if s.eval_data else []
    model, tokenizer = model_utils.load_model(s.model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    policy = Policy(model, s.temperature)
    if s.gradient_checkpointing:
        policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = model_utils.shard(policy, device)
    reference = Policy(model, s.temperature).to(model.dtype).requires_grad_(False) if s.kl_coef else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.learning_rate, betas=(0.9, s.beta2), weight_decay=0.0)
    run = Run(s, model, tokenizer, policy, reference, optimizer, rank, world, weigh)
    output, steps = Path(s.output), s.steps or int(np.ceil(s.epochs * len(samples) / s.prompts_per_step))
    if rank == 0:
        move_aside(output)
        (output / "config.json").write_text(json.dumps(asdict(s) | {"processes": world, "torch": torch.__version__}, indent=1))

    def log(name: str, *records: dict) -> None:
        if rank == 0:
            with open(output / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def held_out_scores(step: int) -> dict[str, float]:
        scores = score_held_out(run, held_out, reader) if held_out else {}
        if scores:
            log("held_out.jsonl", {"step": step} | scores)
        return scores

    reading = dict(fps=s.fps, max_frames=s.max_frames, min_pixels=s.min_pixels, max_pixels=s.max_pixels)
    with data.VideoReader(s.readers, s.decode_timeout, **reading) as reader:
        before = after = held_out_scores(0)
        draws, unreadable, not_finite, rates = draw_batches(run, samples, reader, 0), 0, [], []
        bar = tqdm(range(steps), desc=s.algorithm, disable=rank > 0)
        for step in bar:
            metrics, skipped, groups = training_step(run, draws, step)
            log("metrics.jsonl", metrics)
            log("skipped.jsonl", *({"step": step + 1} | record for record in skipped))
            log("samples.jsonl", *(describe(group, tokenizer, step + 1) for group in groups[:1]))
            rates.append(metrics["samples_per_second"])
            bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("accuracy", "reward", "response_length")
                             if name in metrics})
            unreadable += sum(record["unreadable"] for record in skipped)
            if unreadable > 0.05 * max(100, (step + 1) * s.prompts_per_step):
                raise data.DataError(f"{unreadable} samples could not be read, over 5%; see {output / 'skipped.jsonl'}")
            not_finite = [] if np.isfinite(metrics["grad_norm"]) else not_finite + [g.prompt.sample.id for g in groups]
            if len(not_finite) >= 3 * len(groups) > 0:
                raise SettingsError(f"gradients not finite in 3 steps in a row, with samples {', '.join(not_finite)}")
            if s.eval_every and (step + 1) % s.eval_every == 0 and step + 1 < steps:
                held_out_scores(step + 1)
        if steps:
            after = held_out_scores(steps)
    if rank == 0:
        model_utils.save_model(model, tokenizer, s.model, output / "checkpoint")
        for name, label in (("accuracy", "held-out accuracy"), ("topk", f"true frame among a response's top {s.k2}")):
            if name in before:
                print(f"{label:42s} {before[name]:.3f} -> {after[name]:.3f}   ({len(held_out)} samples)")
        print(f"{'samples per second (median)':42s} {np.median(rates or [0]):.2f}")
        print(f"{'checkpoint':42s} {output / 'checkpoint'}")
        print(f"{'next':42s} torchrun appo.py --algorithm dapo, or your own --model and --data; log: {output / 'metrics.jsonl'}")
    dist.barrier()


def describe(group: Group, tokenizer, step: int) -> dict:
    """What samples.jsonl keeps of a group: its responses, their scores, and each token with its weight."""
    mask, weights = group.rollout.response_mask, group.token_weights
    return {"step": step, "id": group.prompt.sample.id, "question": group.prompt.sample.question,
            "answer": group.prompt.sample.answer, "crucial_frames": group.crucial.nonzero().flatten().tolist(),
            "responses": [{"text": text, **{name: score[i].item() for name, score in group.scores.items()},
                           "advantage": round(group.advantages[i].item(), 4),
                           "tokens": tokenizer.convert_ids_to_tokens(group.rollout.response_ids[i][mask[i]].tolist()),
                           "weights": None if weights is None else [round(w, 3) for w in weights[i][mask[i]].tolist()]}
                          for i, text in enumerate(group.texts)]}


def load_data(path: str, s: Settings, announce: bool) -> list:
    """The samples of the annotation files; missing videos are listed, and stop the run unless --skip_missing."""
    samples = data.load_samples(path, s.video_root)
    missing = [name for sample in samples for name in sample.missing]
    if missing and announce:
        print(f"{path}: {len(missing)} of {len(samples)} samples lack a file:", *missing[:10], sep="\n  ", file=sys.stderr)
    if missing and not s.skip_missing:
        raise data.DataError(f"{path}: {len(missing)} files are missing, the first {missing[0]}; mend --video_root or "
                             "train without them by --skip_missing")
    samples = [sample for sample in samples if not sample.missing]
    if not samples:
        raise data.DataError(f"{path}: no sample to train on")
    return samples


def move_aside(output: Path) -> None:
    """An earlier run's folder is kept under another name: nothing is lost."""
    if (output / "config.json").exists():
        number = next(n for n in range(1, 1 << 20) if not output.with_name(f"{output.name}.{n}").exists())
        output.rename(output.with_name(f"{output.name}.{number}"))
        print(f"the earlier run is now {output.with_name(f'{output.name}.{number}')}")
    output.mkdir(parents=True, exist_ok=True)


def prepare_built_in(s: Settings) -> None:
    """Make what is missing of the built-in task: videos with annotations, and the tiny model, warmed up."""
    folder = Path(s.toy_folder)
    if s.data == str(folder / "train.json"):
        data.make_toy_data(folder)
    if s.model != str(folder / "model") or (folder / "model" / "config.json").exists():
        return
    model, tokenizer = model_utils.tiny_model(data.toy_vocabulary(), s.seed)
    test = [data.toy_prompt(np.random.default_rng((s.seed, 3, n)), tokenizer, n % 8)[0] for n in range(128)]

    def good_enough(model) -> bool:
        """Half of the answers right, and the model looks: else reinforcement learning has little to start from."""
        scores = score_prompts(model, tokenizer, test, list(range(len(test))), Settings(**TINY))
        return all(np.mean([score[name] for score in scores]) >= least for name, least in (("accuracy", .5), ("top1", .3)))

    model_utils.warm_up(model, data.toy_lessons(tokenizer, 1024, s.seed), good_enough)
    model_utils.save_model(model, tokenizer, None, folder / "model")


# ------------------------------------------------------------------------------------------------- the command line

class Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"appo.py: {message}\n")


def is_tiny(model: str | None, toy_folder: str) -> bool:
    """Is this the built-in model, or trained from it? Its settings go with it."""
    config = Path(model or toy_folder + "/model") / "config.json"
    return model is None or config.is_file() and json.loads(config.read_text()).get("appo_built_in", False)


def parse_settings(arguments: list[str], parser: Parser) -> Settings:
    """Defaults of the paper, then those of the tiny model, then the algorithm's preset, then what the user says."""
    first = parser.parse_args(arguments)
    parser.set_defaults(**(TINY if is_tiny(first.model, first.toy_folder) else {}) | PRESETS[first.algorithm])
    s = Settings(**vars(parser.parse_args(arguments)))
    s.model = s.model or str(Path(s.toy_folder) / "model")
    if s.data is None:
        s.data, s.eval_data = str(Path(s.toy_folder) / "train.json"), s.eval_data or str(Path(s.toy_folder) / "test.json")
    s.output = s.output or f"runs/{s.algorithm}"
    for name in ("k1", "k2", "k3", "attention_layers", "group_size", "prompts_per_step", "rollout_groups", "max_new_tokens",
                 "max_prompt_tokens", "temperature", "updates_per_batch", "epochs", "learning_rate", "fps", "max_frames",
                 "min_pixels", "readers", "decode_timeout", "max_grad_norm"):
        if not getattr(s, name) > 0:
            raise SettingsError(f"--{name} {getattr(s, name)}: give a number above 0")
    for name in ("alpha", "clip_low", "clip_high", "kl_coef", "gamma", "eta", "steps", "minibatch_prompts", "overlong_buffer",
                 "max_resamples", "warmup_steps", "eval_every", "seed"):
        if not getattr(s, name) >= 0:
            raise SettingsError(f"--{name} {getattr(s, name)}: give a number of at least 0")
    for wrong, message in (
            (s.min_pixels > s.max_pixels, f"--min_pixels {s.min_pixels} is above --max_pixels {s.max_pixels}"),
            (s.clip_low >= 1, f"--clip_low {s.clip_low}: give a number below 1"),
            (s.overlong_buffer > s.max_new_tokens, f"--overlong_buffer {s.overlong_buffer} is above --max_new_tokens "
             f"{s.max_new_tokens}: make it shorter"),
            (s.minibatch_prompts and s.prompts_per_step % s.minibatch_prompts, f"--minibatch_prompts {s.minibatch_prompts} "
             f"does not divide --prompts_per_step {s.prompts_per_step}")):
        if wrong:
            raise SettingsError(message)
    return s


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(Settings, description=__doc__, formatter_class=None or __import__("argparse").RawDescriptionHelpFormatter, allow_abbrev=False)
    try:
        train(parse_settings(sys.argv[1:] if arguments is None else arguments, parser))
    except (SettingsError, data.DataError, model_utils.ModelError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
