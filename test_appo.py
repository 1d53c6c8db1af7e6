"""Every formula against a hand-worked table and a slow oracle; the model against transformers' own
forward pass; training with real files, processes and signals. Small models, one thread, no network.
"""
import os

# No test touches a GPU or the network; torch and transformers read these when they are imported.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import copy
import inspect
import itertools
import json
import math
import multiprocessing
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import (
    AutoConfig, Qwen2_5_VLForConditionalGeneration, get_linear_schedule_with_warmup)

import appo
import data
import evaluate
import model_utils
from data import DataError, Sample, VideoError

torch.set_num_threads(1)    # the models are too small for more
SHARED = Path(os.environ.get("APPO_SHARED", Path(__file__).resolve().parent.parent / "shared"))
INF, NAN, LN2 = math.inf, math.nan, math.log(2)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual, expected, rtol=1e-9, atol=1e-9):
    actual, expected = [torch.as_tensor(values, dtype=torch.float64).detach()
                        for values in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------- the pure functions

@pytest.mark.parametrize("rewards, eps, expected", [
    ([1, 0, 0, 1], 1e-4, [0.865875, -0.865875, -0.865875, 0.865875]),   # .5 / (.57735 + .0001)
    ([0.0, 1.0, 2.0], 1.0, [-0.5, 0.0, 0.5]),                           # n - 1: std = 1
    ([0.7], 1e-4, [0.0]),
    ([0.1] * 7, 1e-4, [0.0] * 7)])      # although the mean of equal numbers is rounded
def test_group_advantages(rewards, eps, expected):
    assert_close(appo.group_advantages(torch.tensor(rewards), eps), expected, atol=1e-6)


@pytest.mark.parametrize("buffer, expected", [
    (20, [0, 0, -0.05, -0.5, -1]), (0, [0] * 5)])
def test_overlong_penalty(buffer, expected):
    penalty = appo.overlong_penalty(torch.tensor([1, 80, 81, 90, 100]), 100, buffer)
    assert_close(penalty, expected, atol=1e-7)


def random_mask(seed):
    """Which tokens are real, (G, R), in groups of all sizes. Some responses are empty."""
    torch.manual_seed(seed)
    G, R = 1 + seed % 8, 1 + 7 * seed % 20
    lengths = torch.randint(R + 1, (G, 1))
    lengths[0] = R
    return torch.arange(R) < lengths


def padded(mask, *more):
    """Random numbers (G, R, *more), with rubbish in the padding, which must not matter."""
    values = torch.randn(*mask.shape, *more, dtype=torch.float64)
    values[~mask] = NAN
    return values


def highest(values, k):
    """Indices of the k highest values, in reading order."""
    return sorted(torch.as_tensor(values).argsort(descending=True)[:k].tolist())


# Two responses, of three and two tokens, and two frames. With K1 = K2 = 1 the first one focuses on
# frame 0, .9 > .6, and the second one on frame 1, .3 < .4.
ATTENTION = torch.tensor([[[.9, .1], [.1, .6], [.1, .6]], [[.3, .4], [.2, .05], [NAN, NAN]]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize("accuracy, k2, soft, hard, union", [
    ([0.5, 0.49], 1, [1, 0], [1, 0], [1, 1]),       # an accuracy of exactly tau is correct
    ([0.0, 0.0], 1, [0, 0], [0, 0], [1, 1]),        # no correct response: no crucial frame
    ([0.0, 1.0], 2, [1, 1], [0, 0], [1, 1])])       # both responses focus on both frames
def test_crucial_frames(accuracy, k2, soft, hard, union):
    for strategy, expected in ("soft", soft), ("hard", hard), ("all", union):
        crucial = appo.crucial_frames(ATTENTION, MASK, torch.tensor(accuracy), k1=1, k2=k2,
                                      strategy=strategy)
        assert crucial.dtype == torch.bool and crucial.int().tolist() == expected


@pytest.mark.parametrize("seed", range(40))
def test_random_crucial_frames(seed):
    mask = random_mask(seed)
    attention, accuracy = padded(mask, 5), torch.randint(3, (len(mask),)) / 2
    k1, k2 = 1 + seed % 11, 1 + seed % 7
    correct, incorrect = set(), set()
    for row, real, score in zip(attention, mask, accuracy):
        if real.any():
            most = row[real].sort(dim=0, descending=True).values[:k1]           # (K1, F)
            frames = correct if score >= 0.75 else incorrect
            frames.update(highest(most.mean(0), k2))
    for strategy, expected in (("soft", correct), ("hard", correct - incorrect),
                               ("all", correct | incorrect)):
        crucial = appo.crucial_frames(attention, mask, accuracy, k1=k1, k2=k2, threshold=0.75,
                                      strategy=strategy)
        assert set(crucial.nonzero().flatten().tolist()) == expected


# Distributions 1:0, 0:1, 1:1, 3:1 and 1:3 as logits, in two responses of four tokens.
A, B, H, C, E = [0.0, -INF], [-INF, 0.0], [0.5, 0.5], [math.log(3), 0.0], [0.0, math.log(3)]
WEIGHT_LOGITS = torch.tensor([[A, H, C, H], [B, H, E, H]])
WEIGHT_ATTENTION = torch.tensor([[[.2, .1], [.9, .2], [.5, .9], [.1, .3]],
                                 [[.9, .05], [.3, .7], [.6, .2], [.1, .4]]])


@pytest.mark.parametrize("lengths, crucial, k3, expected", [
    # Frame 0 picks tokens 0, 1, 2 of both: D = 2 ln 2; 0; 2 (.75 ln 1.5 + .25 ln .5) = .261624,
    # scaled 1, 0, .188722. Frame 1 picks tokens 1, 2, 3: D = 0, .261624, 0, scaled 0, 1, 0.
    # Token 2 receives both, on average .594361.
    ([4, 4], [1, 1], 3, [[2.7, 1, 2.010414, 1]] * 2),
    # In reading order, frame 0 picks tokens 1, 2 of the first and 0, 2 of the second:
    # D_1 = H against B = .431523, D_2 = C against E = .261624, scaled 1, 0.
    ([4, 4], [1, 0], 2, [[1, 2.7, 1, 1], [2.7, 1, 1, 1]]),
    # The second response has two tokens. Frame 0: the third picks have one member, D_3 = 0.
    # Frame 1, H C H against B H: D = .431523; .75 ln 1.2 + .25 ln (2/3) + .5 ln .8 + .5 ln (4/3)
    # = .067645; 0, scaled 1, .156759, 0. Tokens receive the averages over frames.
    ([4, 2], [1, 1], 3, [[2.7, 1.85, 1.133245, 1], [2.7, 1.133245, 1, 1]])])
def test_token_weights(lengths, crucial, k3, expected):
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    crucial = torch.tensor(crucial, dtype=torch.bool)
    weights = appo.perception_token_weights(WEIGHT_ATTENTION, WEIGHT_LOGITS, mask, crucial, k3=k3)
    assert weights.dtype == torch.float32
    assert_close(weights, expected, rtol=0, atol=2e-6)


def oracle_divergence(rows):
    """sum_i KL(p_i || mean of all p), of lists of logits."""
    p = torch.stack(rows).double().softmax(-1)
    return (p * (p / p.mean(0)).log())[p > 1e-300].sum().item()     # 0 * log 0 counts as 0


def oracle_weights(attention, logits, lengths, crucial, k3, alpha):
    received = defaultdict(list)
    for frame in crucial.nonzero().flatten():
        picks = [highest(row[:length, frame], k3) for row, length in zip(attention, lengths)]
        divergences = []
        for jth_picks in itertools.zip_longest(*picks):
            divergences.append(oracle_divergence(
                [row[token] for row, token in zip(logits, jth_picks) if token is not None]))
        low, span = min(divergences), max(divergences) - min(divergences)
        for i, tokens in enumerate(picks):
            for token, divergence in zip(tokens, divergences):
                scaled = 0.0 if span < 1e-4 else (divergence - low) / span
                received[i, token].append(scaled)
    weights = torch.ones(logits.shape[:2])
    for place, values in received.items():
        weights[place] = 1 + alpha * statistics.mean(values)
    return weights


@pytest.mark.parametrize("seed", range(40))
def test_random_token_weights(seed):
    mask = random_mask(seed)
    attention, crucial = padded(mask, 3), torch.rand(3) < 0.7
    # nearly equal, ordinary, with probabilities below the least number of fp32, and one-hot
    scale = [0.02, 1, 40, 1000][seed // 8 % 4]
    logits = padded(mask, 20) * scale
    if scale >= 1:
        logits[..., 1:][torch.rand(*mask.shape, 19) < 0.3] = -INF
    logits = logits.to([torch.float32, torch.bfloat16][seed % 2]).requires_grad_()
    k3 = 1 + seed % 23
    weights = appo.perception_token_weights(attention, logits, mask, crucial, k3=k3, alpha=0.7)
    expected = oracle_weights(attention, logits, mask.sum(1), crucial, k3, 0.7)
    assert not weights.requires_grad
    assert_close(weights, expected, rtol=0, atol=5e-4)
    assert torch.equal(weights == 1, expected == 1)     # exactly, where nothing differs


# Ratios 1.5, 1, .5 with A = 1, and 1.5, .5 with A = -1 and padding. Clipped at .8 and 1.28, the
# terms are 1.28, 1, .5 and -1.5, -.8.
RATIOS = tensor([[1.5, 1.0, 0.5], [1.5, 0.5, NAN]])


@pytest.mark.parametrize("options, expected", [
    ({}, -0.096),                                       # -(2.78 - 2.3) / 5
    # -(2 * 1.28 + 1 + 3 * .5 - 1.5 - 2.5 * .8) / 5
    (dict(token_weights=tensor([[2, 1, 3], [1, 2.5, 7]])), -0.312),
    # -(2.78 / 3 - 2.3 / 2) / 2. The reference differs by ln 2 at one token of the second response:
    # 2 - ln 2 - 1 = .306853, times .01 / (2 * 2).
    (dict(kl_coef=0.01, average="responses"), 0.112433799)])
def test_surrogate_loss(options, expected):
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    new = old + RATIOS.log()
    reference = new + tensor([[0, 0, 0], [LN2, 0, 5]])
    loss, metrics = appo.clipped_surrogate_loss(new, old, tensor([1, -1]), MASK,
                                                ref_log_probs=reference, **options)
    assert_close(loss, expected)
    # rho - 1 - ln rho = .094535 twice, .193147 twice and 0, over 5 tokens, of which 2 are clipped
    assert_close([metrics["approx_kl"], metrics["clip_fraction"]], [0.115072829, 0.4])


def test_perception_loss():
    new, masked = tensor([[-1, -2, -3], [-6, 8, 8]]), tensor([[LN2 - 1, -2, -3 - LN2], [-1, 9, 4]])
    loss, metrics = appo.perception_loss(new.requires_grad_(), masked.requires_grad_(), new < 0,
                                         gamma=0.02, eta=0.03, average="responses")
    # d = ln 2, 0, -ln 2 and 5: exp(d) - d - 1 = 1 - ln 2, 0, ln 2 - .5 (together .5), and
    # exp(5) - 6, clamped to 10. -log pi = 1, 2, 3 and 6.
    kl, entropy = (0.5 / 3 + 10) / 2, (2 + 6) / 2
    assert_close([loss.detach(), metrics["perception_kl"]], [0.03 * entropy - 0.02 * kl, kl])
    loss.backward()
    assert new.grad.any() and masked.grad is None


@pytest.mark.parametrize("average", ["tokens", "responses"])
@pytest.mark.parametrize("seed", range(40))
def test_random_losses(seed, average):
    """Their sum and its gradient, computed from the real tokens only."""
    mask = random_mask(seed)
    new, old, other = [padded(mask) * [0.1, 1, 15][seed % 3] for _ in range(3)]
    weights, advantages = 1 + padded(mask).abs(), torch.randn(len(mask)).double()
    new.requires_grad_()
    loss, metrics = appo.clipped_surrogate_loss(
        new, old, advantages, mask, token_weights=weights, clip_low=0.1, clip_high=0.2,
        ref_log_probs=other, kl_coef=0.4, average=average)
    more, _ = appo.perception_loss(new, other, mask, gamma=0.3, eta=0.2, average=average)

    log_ratio, difference = [x[mask].clamp(-20, 20) for x in (new - old, other - new)]
    ratio, scale = log_ratio.exp(), (advantages[:, None] * weights)[mask]
    clipped = torch.where(scale > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.9))
    kl = difference.exp() - difference - 1
    terms = 0.4 * kl - clipped * scale - 0.3 * kl.clamp(max=10) - 0.2 * new[mask]
    expected = terms.mean()
    if average == "responses":      # one without tokens counts as 0
        responses = terms.split(mask.sum(1).tolist())
        expected = sum(x.mean() for x in responses if len(x)) / len(responses)
    assert_close(loss + more, expected)
    assert_close(metrics["clip_fraction"], (clipped != ratio).double().mean())
    assert_close(*[torch.autograd.grad(total, new)[0] for total in (loss + more, expected)])


def test_masked_mean():
    values, nothing = tensor([[NAN]]), torch.tensor([[False]])
    assert appo.masked_mean(values, nothing) == appo.masked_mean(values, nothing, "responses") == 0
    with pytest.raises(ValueError, match="sequences"):
        appo.masked_mean(values, nothing, "sequences")


@pytest.mark.parametrize("algorithm, values", [
    ("appo", (1.7, 0.28, "tokens", 0.0, 0.0, 0.0)), ("dapo", (0.0, 0.28, "tokens", 0.0, 0.0, 0.0)),
    ("grpo", (0.0, 0.2, "responses", 0.01, 0.0, 0.0)),
    ("papo_g", (0.0, 0.2, "responses", 0.01, 0.02, 0.0)),
    ("papo_d", (0.0, 0.28, "tokens", 0.0, 0.01, 0.03))])
def test_presets(algorithm, values):
    s = appo.Settings.of(algorithm)
    assert (s.alpha, s.clip_high, s.average, s.kl_coef, s.gamma, s.eta) == values
    assert appo.Settings.of(algorithm, alpha=0.3).alpha == 0.3


def test_defaults_are_the_papers():
    s = appo.Settings()
    assert (s.k1, s.k2, s.k3, s.threshold, s.clip_low, s.strategy) == (15, 3, 64, 0.5, 0.2, "soft")
    assert (s.algorithm, s.learning_rate, s.group_size) == ("appo", 1e-6, 8)
    for function in (appo.crucial_frames, appo.perception_token_weights,
                     appo.clipped_surrogate_loss):
        parameters = inspect.signature(function).parameters
        for name in parameters.keys() & asdict(s).keys():
            assert parameters[name].default == getattr(s, name)


# --------------------------------------------------------------------------------------- the model

VIDEO, IMAGE, WORD = 6, 5, 9    # ids of the tiny model


@pytest.fixture(scope="module")
def tiny():
    """(model, twin, prompts): the tiny model with random weights, transformers' own eager form of
    it, and prompts of several lengths and grids, the fourth with a picture as well, the last one
    without a video. Of the model's 20 tokens two end a response."""
    torch.manual_seed(0)
    model, tokenizer = model_utils.tiny_model([f"w{number}" for number in range(12)], seed=1)
    for block in model.model.visual.blocks:
        block.attn.qkv.weight.data *= 8     # otherwise it would attend evenly
    prompts = []
    for words, videos, images in ((5, [(3, 4, 4)], []), (12, [(1, 4, 8)], []),
                                  (2, [(4, 12, 20)], []), (7, [(2, 4, 4)], [(1, 6, 4)]),
                                  (9, [], [])):
        patches = torch.randn(sum(map(math.prod, videos + images)), 1176)
        visual = data.Visual(patches, videos, images, [1.25] * len(videos), None, 0)
        sample = Sample("", tokenizer.decode(random_words(words)), [], "", "description")
        prompts.append(data.build_prompt(sample, visual, tokenizer))
    return model, plain_twin(model, "eager"), prompts


def plain_twin(model, attention):
    config = copy.deepcopy(model.config)
    twin = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def random_words(*shape):
    return torch.randint(8, 20, shape)


@pytest.mark.parametrize("ids, videos, images, seconds, expected, following", [
    # 22 s in 16 sampled frames: 2.75 s a frame, at 2 positions a second. The text goes on after
    # the last frame, not after height and width.
    ([WORD] + [VIDEO] * 3 + [WORD], [(3, 2, 2)], [], [2.75],
     "0 1 6 12 13 | 0 1 1 1 13 | 0 1 1 1 13", 14),
    ([VIDEO, WORD] + [IMAGE] * 6 + [WORD], [(1, 2, 2)], [(1, 4, 6)], [0.3],
     "0 1 2 2 2 2 2 2 5 | 0 1 2 2 2 3 3 3 5 | 0 1 2 3 4 2 3 4 5", 6)])
def test_positions(tiny, ids, videos, images, seconds, expected, following):
    config, ids = tiny[0].config, torch.tensor(ids)
    positions, start = model_utils.mrope_positions(ids, videos, images, seconds, config)
    assert " | ".join(" ".join(map(str, row)) for row in positions.tolist()) == expected
    assert start == following
    for grids in [*videos, (1, 2, 2)], [(9, 2, 2)], []:
        with pytest.raises(ValueError, match="grids"):
            model_utils.mrope_positions(ids, grids, images, [1.0] * len(grids), config)


def plain_forward(twin, prompt, encoded, response, temperature):
    """transformers' own eager forward pass over prompt and response, at our positions.

    -> (log-probabilities (R,), logits (R, V), attention of two layers to the frames (R, F))
    """
    def some(values):
        return torch.as_tensor(values) if len(values) else None

    P, count = len(prompt.input_ids), sum(map(math.prod, prompt.video_grids))
    after = (encoded.next_position + torch.arange(len(response))).expand(3, -1)
    output = twin(
        input_ids=torch.cat([prompt.input_ids, response])[None], use_cache=False,
        position_ids=torch.cat([encoded.positions, after], 1)[:, None], output_attentions=True,
        pixel_values_videos=some(prompt.patches[:count]), pixel_values=some(prompt.patches[count:]),
        video_grid_thw=some(prompt.video_grids), image_grid_thw=some(prompt.image_grids))
    logits = output.logits[0, P - 1:-1] / temperature
    logits[:, 3:7] = -INF                                   # the visual tokens
    log_probs = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
    attention = torch.stack(output.attentions[-2:]).mean((0, 1, 2))[P - 1:-1, :P]       # (R, P)
    frames = torch.zeros(len(response), prompt.num_frames)
    for frame in range(prompt.num_frames):
        frames[:, frame] = attention[:, prompt.frame_of_token == frame].mean(1)
    return log_probs, logits, frames


@pytest.mark.parametrize("lengths, recompute", [((7, 1, 4, 6), True), ((290, 250), False)])
def test_policy_equals_the_plain_forward_pass(tiny, lengths, recompute):
    """All of a packed group, its gradients too, is that of its sequences; there are words in the
    padding. The videos are embedded together."""
    model, twin, prompts = tiny
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids, slopes = random_words(*mask.shape), torch.randn(mask.shape)
    for prompt, encoded in zip(prompts, model_utils.encode_prompts(model, prompts)):
        policy = model_utils.Policy(model, temperature=0.8)
        if recompute:
            model_utils.recompute_activations(policy.language_model)
        log_probs, logits = policy(encoded, ids, mask, keep_logits=True)
        attention = model_utils.frame_attention(policy, encoded, ids, mask, layers=2)
        (log_probs * slopes).sum().backward()
        twin.zero_grad()
        for g, real in enumerate(mask):
            expected, *others = plain_forward(twin, prompt, encoded, ids[g, real], 0.8)
            (expected * slopes[g, real]).sum().backward()
            assert_close(log_probs[g, real], expected, atol=1e-5)
            assert_close(logits[g, real], others[0], atol=1e-5)
            assert_close(attention[g, real], others[1], atol=1e-7)
        assert not log_probs[~mask].any() and not attention[~mask].any()
        # the head is the embedding, in both
        for weight, expected in zip(policy.parameters(), twin.model.language_model.parameters(),
                                    strict=True):
            scale = float(expected.grad.abs().max())
            assert_close(weight.grad, expected.grad, atol=1e-5 * scale + 1e-7, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_equals_the_policy(tiny, monkeypatch, temperature):
    """Sampled token by token, padded and together, separately, or all at once: the same.

    The keys that decoding reads grow twice. Both never sample the visual tokens."""
    monkeypatch.setattr(model_utils, "BLOCK", 5)
    model, _, prompts = tiny
    options = dict(temperature=temperature, attention_layers=2)
    policy = model_utils.Policy(model, temperature, trainable=False)
    assert policy.lm_head.weight is model.lm_head.weight
    encoded = model_utils.encode_prompts(model, prompts)
    numbers = torch.rand(5, 3, 12, dtype=torch.float64)
    for i, rollout in enumerate(model_utils.rollout(model, encoded, numbers, **options)):
        separate, = model_utils.rollout(model, encoded[i:i + 1], numbers[i:i + 1], **options)
        ids, mask = rollout.response_ids, rollout.response_mask
        with torch.no_grad():
            log_probs, logits = policy(encoded[i], ids, mask, keep_logits=True)
        attention = model_utils.frame_attention(policy, encoded[i], ids, mask, layers=2)
        assert torch.equal(separate.response_ids, ids)
        for result in rollout, separate:
            assert_close(result.log_probs, log_probs, atol=1e-5)
            assert_close(result.frame_attention, attention, atol=1e-7)
        assert (logits[mask][:, 3:7] == -INF).all()
        probs = logits[mask].double().softmax(-1)
        assert_close(rollout.entropy[mask], torch.special.entr(probs).sum(-1), atol=1e-5)
        # sampled: the token at which the cumulative distribution passes the random number
        passed = probs.cumsum(-1) > numbers[i, :, :mask.shape[1]][mask][:, None]
        assert torch.equal(passed.int().argmax(-1), ids[mask])
        # A response ends with token 0 or 2, or has 12; 0 is also the padding.
        ends = torch.isin(ids, torch.tensor([0, 2])).long()
        assert torch.equal(mask, ends.cumsum(1) - ends == 0)
        assert (ends.any(1) | (mask.sum(1) == 12)).all() and mask.any(0).all()
        assert not ids[~mask].any()


def test_attention_of_given_responses_equals_that_of_generate(tiny):
    model, twin, (_, _, prompt, *_) = tiny
    encoded, = model_utils.encode_prompts(model, [prompt])
    output = generate(twin, prompt, encoded, 3, do_sample=True, max_new_tokens=9,
                      output_attentions=True)
    responses = output.sequences[:, len(prompt.input_ids):]
    mask = (responses != 0).cummin(1).values      # 0 is the padding
    for layers in 1, 5:
        frames = model_utils.frame_attention(model_utils.Policy(model), encoded, responses, mask,
                                             layers)
        pooled = model_utils.pool_attention(output.attentions, prompt.frame_of_token, layers)
        assert_close(frames, pooled * mask[:, :, None], atol=1e-6)
    assert frames.max() > 1e-3


def test_a_prepared_model_computes_as_before(tiny):
    """Windows of several lengths in one call; the padding of a batch stays hidden."""
    grids = torch.tensor([(4, 12, 20), (2, 16, 16), (1, 10, 14)])
    patches = torch.randn(int(grids.prod(1).sum()), 1176)
    ids, mask = random_words(3, 11), torch.arange(11) >= torch.tensor([[0], [4], [9]])
    for compute in (lambda model: model.model.visual(patches, grid_thw=grids).pooler_output,
                    lambda model: model(input_ids=ids, attention_mask=mask.long()).logits[mask]):
        ours, theirs = map(compute, tiny[:2])
        assert_close(ours, theirs, atol=1e-5)


# ------------------------------------------------------------------------- training, step by step

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with few videos of the built-in task, and its warmed-up model in "model"."""
    folder = tmp_path_factory.mktemp("toy")
    data.make_toy_data(folder, videos=(24, 6))
    model_utils.init_processes()
    appo.make_built_in_model(appo.Settings(toy_folder=str(folder), model=str(folder / "model"),
                                           **appo.TINY))
    return folder


def built_in_prompts(tokenizer, positions, questions=48):
    """{position: prompt of the built-in task}"""
    prompts = {}
    for position in positions:
        number = position % questions
        prompts[position], _ = data.toy_prompt(np.random.default_rng(number), tokenizer, number % 8)
    return prompts


def settings_of(toy, algorithm="appo", **changes):
    small = dict(model=str(toy / "model"), data=str(toy / "train.json"), readers=1,
                 prompts_per_step=4, group_size=4, updates_per_batch=2, warmup_steps=0)
    return appo.Settings.of(algorithm, **appo.TINY | small | changes)


def learn(toy, algorithm="appo", steps=2, questions=48, reward=data.task_reward,
          weigh=appo.weigh_tokens, **changes):
    """Training steps without files -> (run, metrics of each step, groups of all steps)."""
    s = settings_of(toy, algorithm, **changes)
    model, tokenizer = model_utils.load_model(s.model, torch.device("cpu"))
    run = appo.set_up(s, model, tokenizer, reward, weigh)
    size, all_metrics, all_groups = s.prompts_per_step, [], []
    batches = ((built_in_prompts(tokenizer, range(start, start + size), questions), [])
               for start in itertools.count(0, size))
    for _ in range(steps):
        metrics, groups, _ = appo.training_step(run, batches)
        all_metrics.append(metrics)
        all_groups += groups
    return run, all_metrics, all_groups


def weights_of(run):
    return torch.cat([weight.flatten() for weight in run.model.parameters()])


def test_appo_without_token_weights_is_dapo(toy):
    dapo, expected, _ = learn(toy, "dapo", steps=1)

    def no_weights(group, logits, s):
        ids, mask = group.rollout.response_ids, group.rollout.response_mask
        log_probs = logits.log_softmax(-1).gather(-1, ids[:, :, None])[:, :, 0] * mask
        assert_close(log_probs, group.rollout.log_probs, atol=1e-5)     # as sampled
        return torch.ones_like(log_probs)

    for same, changes in ((True, dict(alpha=0)), (True, dict(weigh=no_weights)),
                          (False, dict(rollout_seed=1)), (False, dict())):
        run, (metrics,), _ = learn(toy, steps=1, **changes)
        assert torch.equal(weights_of(run), weights_of(dapo)) == same
        # neither reading the attention nor the weights change the first samples
        assert (metrics["entropy"] == expected[0]["entropy"]) == ("rollout_seed" not in changes)
    assert metrics["token_weight_max"] > 1.5 and metrics["crucial_frames"] > 0


def test_the_constants_of_a_group(toy):
    """They are those of the policy that sampled, and stay through all updates on the batch."""
    run, _, groups = learn(toy, overlong_buffer=16, rollout_groups=3, kl_coef=0.01, gamma=0.01)
    model, tokenizer = model_utils.load_model(run.settings.model, torch.device("cpu"))
    policy = model_utils.Policy(model)
    for group in groups:
        rollout, mask = group.rollout, group.rollout.response_mask
        text = tokenizer.decode(rollout.response_ids[1, mask[1]], skip_special_tokens=True)
        reward, accuracy, _ = data.task_reward(text, group.prompt.sample)
        reward += appo.overlong_penalty(mask.sum(1), 36, 16)[1]
        assert group.texts[1] == text and group.accuracy[1] == accuracy
        assert_close(group.reward[1], reward, atol=1e-6)
        assert torch.equal(group.advantages, appo.group_advantages(group.reward))
        crucial = appo.crucial_frames(rollout.frame_attention, mask, group.accuracy, k1=4, k2=2)
        assert torch.equal(group.crucial, crucial)
        responses = rollout.encoded, rollout.response_ids, mask
        start, logits = policy(*responses, keep_logits=True)
        assert_close(group.ref_log_probs, start, atol=1e-5)
        assert (group.masked_log_probs - group.old_log_probs).abs().max() > 0.01
        first, second = group.updates
        assert first["approx_kl"] == first["clip_fraction"] == 0 < second["approx_kl"]
        if group.position < 4:      # the policy has not changed yet
            weights = appo.perception_token_weights(rollout.frame_attention, logits, mask, crucial,
                                                    k3=6)
            assert_close(group.old_log_probs, start, atol=1e-5)
            frames = model_utils.frame_attention(policy, *responses, layers=2)
            assert_close(rollout.frame_attention, frames, atol=1e-6)
            assert_close(group.token_weights, weights, atol=1e-3)
    groups[0].rollout.log_probs[0, 0] = NAN     # responses sampled from NaN make no update
    assert not math.isfinite(appo.update(run, groups)[0])


def test_the_loss_of_a_group(toy):
    """Every term has its coefficient, and the objective is the mean over the groups."""
    run, (metrics,), groups = learn(
        toy, steps=1, learning_rate=0.0, updates_per_batch=1, average="responses", clip_low=0.1,
        clip_high=0.3, kl_coef=0.3, gamma=0.2, eta=0.1)
    torch.manual_seed(0)
    for group in groups:
        mask = group.rollout.response_mask
        log_probs, _ = run.policy(group.rollout.encoded, group.rollout.response_ids, mask)
        loss, _ = appo.group_loss(run, group, log_probs)
        (loss / len(groups)).backward()
        new = log_probs.detach() + 0.5 * torch.randn(mask.shape)
        ratio = (new - group.old_log_probs).exp()
        weighted = group.advantages[:, None] * group.token_weights
        terms = -torch.minimum(ratio * weighted, ratio.clamp(0.9, 1.3) * weighted) - 0.1 * new
        for other, weight in ((group.ref_log_probs, 0.3), (group.masked_log_probs, -0.2)):
            terms += weight * ((other - new).exp() - (other - new) - 1).clamp(max=10)
        expected = torch.stack([row[real].mean() for row, real in zip(terms, mask)]).mean()
        assert_close(appo.group_loss(run, group, new)[0], expected, atol=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), 1.0).full_tensor()
    assert norm.item() == pytest.approx(metrics["grad_norm"], rel=1e-4)
    assert run.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("algorithm", list(appo.PRESETS))
def test_every_algorithm_learns(toy, algorithm):
    """On the same four questions at every step."""
    _, metrics, _ = learn(toy, algorithm, steps=6, questions=4, group_size=8, learning_rate=1e-3)
    first, *_, before, last = [record["accuracy"] for record in metrics]
    assert (before + last) / 2 > first + 0.1


def test_groups_without_a_gradient_are_not_computed(toy):
    """All rewards are equal in half of the first batch, and in the second batch."""
    weights, computed = [], []
    for kl_coef in 0, 1e-30:        # with a KL term every group is computed; this one rounds to 0
        rewards = iter([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0] * 2 + [1.0] * 16)
        run, metrics, groups = learn(toy, kl_coef=kl_coef,
                                     reward=lambda text, sample: (next(rewards), 1.0, 1.0))
        weights.append(weights_of(run))
        computed.append(sum(len(group.updates) == 2 for group in groups))
        assert [record["zero_variance_groups"] for record in metrics] == [0.5, 1]
    assert torch.equal(*weights) and computed == [2, 8]


def test_gradients_that_are_not_finite_are_not_applied(toy):
    def weigh(group, logits, s):
        return torch.full_like(group.rollout.log_probs, INF)

    run, (metrics,), _ = learn(toy, steps=1, weigh=weigh)
    before, _, _ = learn(toy, steps=0)
    assert not math.isfinite(metrics["grad_norm"])
    assert torch.equal(weights_of(run), weights_of(before))


def test_dynamic_sampling(toy):
    scores = itertools.cycle([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0])     # 3 of 4 groups differ
    options = dict(algorithm="dapo", group_size=2, dynamic_sampling=True,
                   reward=lambda text, sample: (1.0, next(scores), 1.0))
    run, _, groups = learn(toy, **options)
    assert [group.position for group in groups] == [0, 1, 2, 4, 8, 9, 10, 12]
    assert run.position == 16
    _, metrics, _ = learn(toy, max_resamples=0, **options)
    assert [record["groups"] for record in metrics] == [3, 3]
    options |= dict(max_resamples=0, reward=lambda *_: (1.0, 1.0, 1.0))
    _, metrics, _ = learn(toy, steps=1, **options)
    assert metrics[0]["groups"] == metrics[0]["grad_norm"] == 0     # no group is left


def test_the_stream_of_prompts():
    """Three processes share batches of 4; each epoch has another order."""
    s = appo.Settings(prompts_per_step=4)
    shares = [appo.prompt_stream(s, list("abcdef"), 4, rank, 3) for rank in range(3)]
    stream, positions = {}, []
    for share in shares * 5:
        batch = next(share)
        stream |= batch
        positions += batch
    epochs = ["".join(stream[n] for n in range(start, start + 6)) for start in (6, 12, 18)]
    assert sorted(positions) == list(range(4, 24)) and len(set(epochs)) == 3
    assert all(sorted(epoch) == list("abcdef") for epoch in epochs)


@pytest.mark.parametrize("schedule, warmup_steps", [
    ("constant", 2), *[("linear", steps) for steps in (0, 1, 3, 7, 9)]])
def test_learning_rate(schedule, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1)])
    s = appo.Settings(learning_rate=3e-4, warmup_steps=warmup_steps, lr_schedule=schedule)
    run = appo.Run(s, None, None, optimizer=optimizer)
    theirs, = get_linear_schedule_with_warmup(optimizer, warmup_steps, 7).lr_lambdas
    for step in range(1, 8):
        factor = theirs(step - 1) if schedule == "linear" else [0.5, 1][step > 1]
        rate = appo.set_learning_rate(run, step, 7)
        assert rate == optimizer.param_groups[0]["lr"] == 3e-4 * factor
    # a linear schedule depends on the number of steps, so a resumed run must have the same
    assert ("steps" in appo.may_differ(s)) == (schedule == "constant")


# ----------------------------------------------------- training, with files, processes and signals

@pytest.fixture(scope="session")
def whole(toy, tmp_path_factory):
    """Settings of an uninterrupted run. Of its 20 samples one is damaged and one is missing."""
    folder = tmp_path_factory.mktemp("whole")
    records = json.loads((toy / "train.json").read_text())[:20]
    for record in records:
        record["path"] = str(toy / record["path"])
    (folder / "damaged.avi").write_bytes(Path(records[3]["path"]).read_bytes()[:700])
    records[3]["path"], records[5]["path"] = "damaged.avi", "nowhere.avi"
    (folder / "data.json").write_text(json.dumps(records))
    few_questions(toy, folder / "test.json", 6)
    s = settings_of(toy, data=str(folder / "data.json"), skip_missing=True, prompts_per_step=5,
                    steps=4, save_every=2, eval_data=str(folder / "test.json"), kl_coef=0.01,
                    gamma=0.01, output=str(folder / "run"))
    appo.train(s)
    return s


def log_of(s, name="metrics"):
    """A run's log, without times."""
    records = model_utils.read_log(Path(s.output) / f"{name}.jsonl")
    for record in records:
        for time_name in "seconds", "samples_per_second", "tokens_per_second":
            record.pop(time_name, None)
    return records


def assert_same_run(s, expected, rtol=0.0, atol=0.0):
    """Their metrics and their final weights."""
    for name in "metrics", "held_out":
        for ours, theirs in zip(log_of(s, name), log_of(expected, name), strict=True):
            assert ours == pytest.approx(theirs, rel=rtol, abs=atol)
    torch.testing.assert_close(checkpoint_of(s), checkpoint_of(expected), rtol=0, atol=atol)


def checkpoint_of(s):
    return load_file(Path(s.output) / "checkpoint" / "model.safetensors")


def folders_of(s):
    return sorted(path.name for path in Path(s.output).glob("step-*"))


def assert_ordinary(folder, source, count):
    """A complete Hugging Face folder; all but the weights are the files of its source."""
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, theirs = [{path.name: path.read_bytes() for path in Path(x).iterdir()
                     if path.name != "model.safetensors"} for x in (folder, source)]
    assert ours == theirs and len(ours) == count


def stop_signal(text, sample, number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    return data.task_reward(text, sample)


def test_the_folder_of_a_run(toy, whole):
    def columns(log, *names):
        return [tuple(record[name] for name in names) for record in log_of(whole, log)]

    metrics, output = log_of(whole), Path(whole.output)
    assert {"loss", "entropy", "token_weight_mean", "clip_fraction"} <= metrics[0].keys()
    # what is sampled next is sampled from the policy that was updated
    assert all(record["rollout_logprob_gap"] < 1e-4 < record["grad_norm"] for record in metrics)
    steps, groups = zip(*columns("metrics", "step", "groups"))
    assert steps == (1, 2, 3, 4) and sum(groups) == 19
    assert columns("skipped", "id") == [("data.json:3",)]
    assert columns("held_out", "step", "samples", "skipped") == [(0, 6, 0), (4, 6, 0)]
    response = log_of(whole, "samples")[0]["responses"][0]
    assert len(response["tokens"]) == len(response["weights"])
    state = json.loads((output / "step-000004" / "state.json").read_text())
    assert state == {"step": 4, "position": 20, "unreadable": 1}
    config = json.loads((output / "config.json").read_text())
    assert config["settings"]["samples"] == 19              # a resumed run must have as many
    assert_ordinary(output / "checkpoint", toy / "model", 6)
    with pytest.raises(data.DataError, match="1 files are missing.*nowhere.avi"):
        appo.train(replace(whole, skip_missing=False))


def in_processes(world, function, *arguments, join=True):
    """Call the function in several processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload([__name__])      # so that each starts fast
    return torch.multiprocessing.start_processes(
        one_process, (world, port, function, arguments), world, join, start_method="forkserver")


def one_process(rank, world, port, function, arguments):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(*arguments)


def test_an_interrupted_run_ends_with_the_same_numbers(whole, tmp_path):
    """Stopped by SIGTERM after step 1, killed while it saves step 3, stopped by SIGHUP after a step
    3 with its weights in host memory, and resumed: the same, bit for bit."""
    s = replace(whole, output=str(tmp_path / "run"), save_every=1)
    resumed = replace(s, resume=True)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(model_utils.RunError, match="--resume"):
        appo.train(s, reward=stop_signal)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert folders_of(s) == ["step-000001"]
    process, = in_processes(1, appo.train, resumed, join=False).processes
    while process.is_alive() and not list(tmp_path.glob("run/step-000003*")):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for step in 1, 4:
        (tmp_path / "run" / f"step-00000{step}.partial").mkdir(exist_ok=True)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "los')
    with pytest.raises(model_utils.RunError, match="^alpha is 1.0 and was 1.7 in "):
        appo.train(replace(resumed, alpha=1.0))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)       # nohup has it ignored
    with pytest.raises(model_utils.RunError, match="after step 3"):
        appo.train(replace(resumed, cpu_offload=True),
                   reward=partial(stop_signal, number=signal.SIGHUP))
    signal.signal(signal.SIGHUP, before)
    appo.train(resumed, reward=stop_signal)     # a signal in the last step does not make it fail
    assert_same_run(s, whole)
    for name in "samples", "skipped":
        assert log_of(s, name) == log_of(whole, name)
    last = Path("step-000004", "state.json")
    assert Path(s.output, last).read_text() == Path(whole.output, last).read_text()
    assert not list(tmp_path.glob("run/*.partial"))


def test_processes_do_not_change_the_numbers(whole, tmp_path):
    """5 prompts over 2 processes, which cannot have the same number."""
    s = replace(whole, output=str(tmp_path / "run"))
    in_processes(2, appo.train, s)
    assert_same_run(s, whole, rtol=1e-4, atol=1e-5)
    assert len(log_of(s, "samples")) == 4


def test_a_full_disk_leaves_the_last_checkpoint_intact(whole, tmp_path):
    """Files may not grow over 1 MB, less than a checkpoint has."""
    s = replace(whole, output=str(tmp_path / "run"), steps=5, save_every=1, resume=True)
    shutil.copytree(whole.output, s.output)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(model_utils.RunError, match="make room on the disk.*continue from them"):
            appo.train(s)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folders_of(s)[:2] == ["step-000002", "step-000004"]


def test_a_run_stops_if_the_gradient_is_never_finite(toy, tmp_path):
    with pytest.raises(model_utils.RunError, match="not finite in 3 steps.*train.json:"):
        appo.train(settings_of(toy, prompts_per_step=2, output=str(tmp_path / "run")),
                   reward=lambda text, sample: (NAN, 1.0, 1.0))
    folder = model_utils.RunFolder(str(tmp_path), {"resume": False, "model": "m"}, set())
    for grad_norm in NAN, INF, 1.0, NAN, NAN:       # never three in a row
        folder.stop_if_failing(grad_norm, ["a"], [{"unreadable": True}])
    with pytest.raises(model_utils.RunError, match="over 5%"):
        folder.stop_if_failing(1.0, ["a"], [{"unreadable": True}])        # 6 of at least 100


def test_a_run_writes_into_a_folder_of_its_own(tmp_path, monkeypatch):
    model_utils.init_processes()
    monkeypatch.chdir(tmp_path)
    folder = model_utils.RunFolder("Qwen", {"resume": False, "model": "Qwen/of-the-hub"}, set())
    Path("Qwen/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(model_utils.RunError, match="Qwen: cannot be written"):
        folder.log("metrics", {"step": 1})
    for name, value in ("model", "Qwen"), ("data", "x.json, Qwen/metrics.jsonl"):
        with pytest.raises(model_utils.RunError, match=f"holds --{name} Qwen"):
            model_utils.RunFolder("Qwen", {"resume": False, name: value}, set())


def test_checkpoints_keep_the_kind_of_optimizer_and_need_their_source(tmp_path):
    """AdamW is fused or not as this run wants it, whatever the run before had."""
    model_utils.init_processes()
    model, tokenizer = model_utils.tiny_model(data.toy_vocabulary())
    policy = model_utils.shard(model_utils.Policy(model), torch.device("cpu"))
    optimizers = [torch.optim.AdamW(policy.parameters(), fused=fused) for fused in (True, False)]
    for before, now in optimizers, optimizers[::-1]:
        fused = now.param_groups[0]["fused"]
        model_utils.save_checkpoint(tmp_path / "x", model, tokenizer, policy, before, {})
        model_utils.load_training_state(tmp_path / "x" / "training", policy, now)
        assert now.param_groups[0]["fused"] == fused
    with pytest.raises(model_utils.RunError, match="its files are gone"):
        model_utils.save_checkpoint(tmp_path / "y", model, str(tmp_path / "gone"))


@pytest.mark.parametrize("arguments", [
    "--colour red", "--k3 0", "--clip_low -0.1", "--clip_low 1.5", "--beta2 1",
    "--learning_rate nan", "--strategy medium", "--algorithm ppo", "--k1 many",
    "--min_pixels 4000", "--overlong_buffer 600", "--group_size 1", "--data nowhere.json",
    "--video_root nowhere", "--model ./nowhere", "--output nowhere --resume"])
def test_a_mistake_gets_one_line(toy, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    files = ["--model", str(toy / "model"), "--data", str(toy / "train.json")]
    with pytest.raises(SystemExit) as stopped:
        appo.main(files + arguments.split())
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    assert arguments.split()[1] in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize("file, pattern, text", [
    ("config.json", '"intermediate_size": 256', '"intermediate_size": 300'),
    ("config.json", "qwen2_5_vl", "qwen2_vl"), ("config.json", "[{]", ""),
    ("tokenizer.json", "(?s).*", "{}"), ("chat_template.jinja", "(?s).*", ""),
    ("model.safetensors", "embed_tokens", "embed_tokenz"), ("model.safetensors", "(?s).{99}$", "")])
def test_a_damaged_model_gets_one_line(toy, tmp_path, file, pattern, text):
    folder = shutil.copytree(toy / "model", tmp_path / "model")
    content = (folder / file).read_text(encoding="latin-1")
    damaged, changes = re.subn(pattern, text, content, count=1)
    (folder / file).write_text(damaged, encoding="latin-1")
    with pytest.raises(model_utils.RunError) as error:
        model_utils.load_model(str(folder), torch.device("cpu"))
    message = str(error.value)
    assert changes and message.startswith(f"{folder}: ") and "\n" not in message


def test_settings_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = appo.parse_settings(["--model", "Qwen/Qwen2.5-VL-3B-Instruct"])
    assert (real.k3, real.alpha, real.output) == (64, 1.7, "runs/appo")
    tiny = appo.parse_settings(["--algorithm", "grpo", "--kl_coef", "0.5", "--k2", "4"])
    assert (tiny.k3, tiny.k2, tiny.average, tiny.kl_coef) == (6, 4, "responses", 0.5)
    assert (tiny.model, tiny.eval_data) == ("runs/toy/model", "runs/toy/test.json")


needs_shared = pytest.mark.skipif(not (SHARED / "videos").is_dir(),
                                  reason=f"no clips in {SHARED}; set APPO_SHARED")


# ------------------------------------------------------------------------------------------ data.py

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
READING = dict(fps=1, max_frames=16, min_pixels=3136, max_pixels=50176)
CHOICE = Sample("a:0", "which ?", ["A book", "A pan", "A guitar", "An umbrella"], "C", "choice")
NUMBER = Sample("a:1", "how many ?", [], "100", "number")
GROUND = replace(CHOICE, kind="grounding", duration=20.0, spans=[(4.0, 10.0)])
RECORDS = json.loads("""{
    "R1": {"problem": "What?", "data_type": "video", "problem_type": "multiple choice",
           "path": "a.avi", "options": ["A. one", "B. two"], "solution": "<answer>B</answer>",
           "duration": 3.0},
    "GQA": {"question": "when", "video_path": "/n/a.avi", "options": ["v", "w", "x", "y", "z"],
            "answer": "3", "qtype": "TC", "duration": 10, "time_clues": [[8.7, 10.3], [0, 1]]},
    "SEED": {"question": "next?", "answer": "toss", "negative_answers": ["a", "b", "c", "d"],
             "duration": 0.0, "video_source": "s", "video_basename": "a.avi",
             "task_progress_metadata": [{}], "current_observation_basename": "p.png"},
    "GOLDEN": {"question": "next?", "golden_choice_idx": "B", "choice_a": "do a",
               "choice_b": "do b", "choice_c": "do c", "choice_d": "do d", "duration": 0.0,
               "video_source": "s", "video_basename": "b.avi", "task_progress_metadata": [],
               "current_observation_basename": "p.png"},
    "PERCEPTION": {"question": "What?", "options": ["a", "b", "c"], "answer_id": 1,
                   "area": "Memory", "video_name": "v7"},
    "NEXT_QA": {"video": "41", "question": "how", "answer": 3, "type": "CH", "a0": "v", "a1": "w",
                "a2": "x", "a3": "y", "a4": "z"},
    "MVBENCH": {"video": "v.mp4", "question": "How many?", "candidates": ["3", "4", "A"],
                "answer": "4"},
    "VSI": {"dataset": "scannet", "scene_name": "s1", "question": "How {many}?", "options": null,
            "question_type": "counting", "ground_truth": "4"}}""")
R1 = RECORDS["R1"]


def rows(table, arrow=" -> "):
    """The (text, value) of each line "text -> JSON value"; "\\n" in the text is a line end."""
    pairs = [line.split(arrow) for line in table.strip().split("\n")]
    return [(text.strip().replace("\\n", "\n"), json.loads(value)) for text, value in pairs]


def load(folder, *records, name="x.json", root=None, benchmark=None):
    (folder / name).write_text(json.dumps(records))
    return data.load_samples(folder / name, root, benchmark)


def data_error(*words):
    """A DataError of one line with all the words in it."""
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(DataError, match=rf"\A{pattern}.{{1,900}}\Z")


def touch(folder, *names, content=""):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("case, expected", rows("""
    R1 x {} -> {"options": ["one", "two"], "answer": "B", "kind": "choice", "duration": null}
    R1 x {} -> {"group": "multiple choice", "video": "a.avi", "image": null, "missing": []}
    R1 x {} -> {"question": "What?", "overall": "questions", "bounds": null, "spans": []}
    R1 x {"problem_type": "numerical", "solution": "<answer>1,200.5</answer>"} -> {"kind": "number"}
    R1 x {"problem_type": "numerical", "solution": "<answer>7.5</answer>"} -> {"answer": "7.5"}
    R1 x {"problem_type": "regression", "solution": "7%"} -> {"answer": "7%", "options": []}
    R1 x {"data_type": "image"} -> {"image": "a.avi", "video": null}
    R1 x {"solution": "two"} -> {"answer": "B"}
    R1 x {"problem": " a\\ud800b "} -> {"question": "ab"}
    R1 x {"data_source": "STAR", "crucial_frame": 3} -> {"group": "STAR", "crucial_frame": 3}
    R1 x {"options": ["A) x", "(B) y"]} -> {"options": ["x", "y"]}
    R1 x {"options": ["A. x", "y"]} -> {"options": ["A. x", "y"]}
    R1 x {"options": ["B. x", "A. y"]} -> {"options": ["B. x", "A. y"]}
    R1 x {"options": ["A", "B"]} -> {"options": ["A", "B"]}
    GQA x {} -> {"answer": "D", "kind": "grounding", "group": "TC", "video": "a.avi"}
    GQA x {} -> {"spans": [[8.7, 10.3], [0.0, 1.0]], "duration": 10.0, "question": "when"}
    GQA x {"answer": 3} -> {"answer": "D"}
    GQA x {"answer": "y"} -> {"answer": "D"}
    GQA x {"answer": "D"} -> {"answer": "D"}
    GOLDEN validation_L2 {} -> {"answer": "B", "options": ["do a", "do b", "do c", "do d"]}
    GOLDEN validation_L2 {} -> {"group": "L2", "duration": null, "image": "images/s/p.png"}
    GOLDEN x {"task_progress_metadata": [{}]} -> {"missing": ["videos/s/b.avi"], "group": "s"}
    PERCEPTION mc {} -> {"answer": "B", "group": "Memory", "video": "v7.mp4"}
    PERCEPTION mc {"answer_id": "1"} -> {"answer": "B"}
    NEXT_QA val {} -> {"answer": "D", "group": "CH", "video": "p/41.mp4"}
    MVBENCH action_count {} -> {"answer": "B", "video": "video/perception/videos/v.mp4"}
    MVBENCH moving_count {"answer": "A"} -> {"answer": "C", "group": "moving_count"}
    MVBENCH moving_count {} -> {"video": "video/clevrer/video_validation/v.mp4", "bounds": null}
    MVBENCH episodic_reasoning {"video": "s1"} -> {"video": "video/tvqa/frames_fps3_hq/s1"}
    MVBENCH x {"start": 1.5, "end": 8, "task": "moving_count"} -> {"bounds": [1.5, 8.0]}
    VSI test {} -> {"answer": "4", "kind": "number", "group": "counting", "overall": "tasks"}
    VSI test {} -> {"video": "scannet/s1.mp4"}
    VSI test {"ground_truth": 1.5} -> {"answer": "1.5", "kind": "number"}
    VSI test {} -> {"question": "These are frames of a video.\\nHow {many}?"}
    VSI test {"options": ["A. x", "B. y"], "ground_truth": "B"} -> {"kind": "choice", "answer": "B"}
    VSI test {"options": ["A. x", "B. y"], "ground_truth": "B"} -> {"options": ["x", "y"]}"""))
def test_records_become_samples(tmp_path, case, expected):
    touch(tmp_path, "a.avi", "images/s/p.png", "v7.mp4", "p/41.mp4", "scannet/s1.mp4",
          "video/clevrer/video_validation/v.mp4", "video/perception/videos/v.mp4",
          "video/tvqa/frames_fps3_hq/s1/1.jpg")
    name, file, change = case.split(" ", 2)
    record = RECORDS[name] | json.loads(change)
    sample, = load(tmp_path, record, name=f"{file}.json", root=tmp_path)
    fields = json.loads(json.dumps(asdict(sample)).replace(f"{tmp_path}/", ""))
    assert sample.id == f"{file}.json:0" and fields == fields | expected
    if name == "MVBENCH":
        assert re.fullmatch("Carefully watch the video and .*\nQuestion: How many[?]",
                            sample.question)


def test_records_that_no_rule_scores_are_left_out(tmp_path, caplog):
    kinds = ["free-form", "OCR"] + ["regression"] * 5
    labels = ["x", "x", "many", "1 1/2", "3 x 10^5", "1e999", "<answer>x</answer>"]
    records = [R1 | dict(problem_type=kind, solution=text) for kind, text in zip(kinds, labels)]
    assert len(load(tmp_path, R1, *records)) == 1
    counts = "{'free-form': 1, 'OCR': 1, 'regression': 5}"
    assert f"7 records left out, no rule can score them: {counts}" in caplog.text
    with data_error("no record that can be scored"):
        load(tmp_path, *records)


@pytest.mark.parametrize("names, values", rows("""
    R1 solution -> [null, "E", 7, "<answer>A</answer><answer>B</answer>"]
    R1 options -> [null, ["A. one"], "A", ["A. x", 3]]
    R1 path -> [null, ["a"]]
    R1 data_type -> ["audio", null]
    R1 problem -> ["", {}, "\\ud800"]
    R1 problem_type -> ["song", null]
    R1 crucial_frame -> ["x", true, -1, 2.5]
    GQA answer -> ["5", null, "E. x"]
    GQA time_clues -> [[], [[1]], [[1, null]], [[5, 1]], 3, [[1, 1e999]], ["12"]]
    GQA duration -> [null, 0, -3, NaN, 1e999, true, "x"]
    SEED negative_answers -> [["a", "b", "Toss."], null]
    SEED task_progress_metadata -> [null]
    GOLDEN choice_c -> [null]
    PERCEPTION answer_id -> [3, null, -1, true]
    PERCEPTION video_name -> [null]
    NEXT_QA a4 -> [null, ""]
    NEXT_QA answer -> [5]
    MVBENCH answer -> ["z", null]
    MVBENCH start -> ["x", 1e999, true]
    VSI ground_truth -> ["many"]
    VSI dataset -> [null]"""))
def test_fields_that_cannot_be_used_are_named_in_one_line(tmp_path, names, values):
    format_name, name = names.split()
    record = RECORDS[format_name]
    for value in values:
        with data_error("record x.json:1", repr(name)):
            load(tmp_path, record, record | {name: value}, root=tmp_path)
    with data_error("27 options"):
        load(tmp_path, R1 | {"options": ["a"] * 27})


@pytest.mark.parametrize("content, word", [
    *rows("""[{"problem": -> "JSON"
        {} -> "no record"
        null -> "list"
        [] -> "no record"
        [3] -> "record 0"
        [{"a": 1}] -> "'time_clues'"
        {"v": 1} -> "JSON"
        {"v": {}} -> "JSON"
        {"v": {"mc_question": [1]}} -> "JSON"
        [GOOD, null] -> "record 1"
        [GOOD -> "JSON"
        [GOOD,] -> "JSON"
        [GOOD] x -> "JSON\""""),
    ("", "JSON"), ("[" * 100_000, "JSON"), (f"[{'9' * 5000}]", "JSON"), ("\u00ff", "UTF-8")])
def test_files_that_cannot_be_used_are_named_in_one_line(tmp_path, content, word):
    content = content.replace("GOOD", json.dumps(R1)).encode("latin-1")
    (tmp_path / "x.json").write_bytes(content)
    with data_error("x.json", word):
        data.load_samples(tmp_path / "x.json")


def test_paths_and_benchmarks_that_do_not_exist(tmp_path):
    for path in (tmp_path / "none.json", tmp_path, ""):
        with data_error("give"):
            data.load_samples(path)
    for more in (dict(root=tmp_path / "none"), dict(benchmark="mmlu"), dict(benchmark="mvbench")):
        with data_error():
            load(tmp_path, R1, **more)


def test_forms_of_files(tmp_path):
    def read(*names):
        return data.load_samples(" , ".join(str(tmp_path / name) for name in names))

    first = json.dumps(R1)
    second = json.dumps(R1 | {"problem": "b\u2028c"}, ensure_ascii=False)
    touch(tmp_path, "a.jsonl", content=f"\ufeff{first}\n\n{second}\n\n")
    touch(tmp_path, "sub/a.jsonl", content=first)
    touch(tmp_path, "val.csv", content="video,question,answer,type,a0,a1,a2,a3,a4\n"
                                       '41,how,3,CH,one,two,"three, or so",four,five\n')
    question = RECORDS["PERCEPTION"] | {"video_name": "v1"}
    videos = {"v1": {"mc_question": [question] * 2}, "v2": {"mc_question": []}}
    touch(tmp_path, "mc.json", content=json.dumps(videos))
    assert [s.id for s in read("a.jsonl")] == ["a.jsonl:0", "a.jsonl:1"]
    ids = [f"{tmp_path}/{name}" for name in ("a.jsonl:0", "a.jsonl:1", "sub/a.jsonl:0")]
    assert [s.id for s in read("a.jsonl", "sub/a.jsonl", "a.jsonl")] == ids
    sample, = read("val.csv")
    assert (sample.options[2], sample.answer, sample.missing) == ("three, or so", "D", ["41.mp4"])
    assert [s.missing for s in read("mc.json")] == [["v1.mp4"]] * 2


def test_paths_are_looked_up_as_written_then_by_tail_then_by_name(tmp_path, caplog):
    root = tmp_path / "root"
    touch(root, "d/set/v.avi", "set/v.avi", "deep/er/only.avi", "1/twin.avi", "2/twin.avi", "v.avi",
          "clevrer/video_validation/w.mp4", "w.mp4")
    touch(tmp_path, "outside.avi", "elsewhere/linked.avi")
    for name, target in (("broken.avi", "gone.avi"), ("link.avi", "v.avi"),
                         ("folder", "../elsewhere"), ("above", ".")):
        (root / name).symlink_to(target)
    places = dict(rows("""
        /d/set/v.avi -> "d/set/v.avi"
        /x/set/v.avi -> "set/v.avi"
        ./v.avi -> "v.avi"
        /x/y/v.avi -> "v.avi"
        /gone/only.avi -> "deep/er/only.avi"
        linked.avi -> "folder/linked.avi"
        /gone/er/ -> "deep/er"
        /gone/twin.avi -> null
        /gone/outside.avi -> null
        ../outside.avi -> null
        broken.avi -> null
        .. -> null
        link.avi -> "link.avi\""""))
    samples = load(tmp_path, *[R1 | {"path": path} for path in places], root=root)
    for sample, (path, place) in zip(samples, places.items(), strict=True):
        assert sample.video == (place and str(root / place))
        assert sample.missing == ([] if place else [path])
    assert re.search("3 files were found by their name only.*v.avi' for '/x/y/v.avi'",
                     caplog.text)
    for task, missing in (("moving_count", False), ("object_shuffle", True)):
        record = RECORDS["MVBENCH"] | {"video": "w.mp4"}    # tasks may share a video's name
        sample, = load(tmp_path, record, name=f"{task}.json", root=str(root))
        assert bool(sample.missing) == missing
    paths = [str(tmp_path / "outside.avi"), "root/v.avi", "v.avi", "root/broken.avi"]
    samples = load(tmp_path, *[R1 | {"path": path} for path in paths])
    assert [s.video for s in samples] == [paths[0], str(root / "v.avi"), None, None]


def test_missing_files_are_listed_and_are_an_error(tmp_path, capsys):
    touch(tmp_path, "a.avi")
    samples = load(tmp_path, R1, *[R1 | {"path": f"gone\x1b{i}.avi"} for i in range(12)])
    assert data.with_files(samples, "x", True) == samples[:1]
    listed = capsys.readouterr().err
    assert "12 files" in listed and r"gone\x1b9.avi" in listed and "gone\\x1b10" not in listed
    for subset, skip in ((samples, False), (samples[1:], True)):
        with data_error("--video_root"):
            data.with_files(subset, "x", skip, announce=False)
    assert capsys.readouterr().err == ""


def test_seed_bench_r1_options_depend_on_the_record_only(tmp_path):
    records = [RECORDS["SEED"] | {"question": f"{i}?"} for i in range(40)]
    samples = load(tmp_path, *records)
    again = load(tmp_path, *records[::-1], name="y.json", benchmark="seed_bench_r1")[::-1]
    assert {s.answer for s in samples} == set("ABCD")
    for sample, other in zip(samples, again, strict=True):
        assert sample.options.index("toss") == "ABCD".index(sample.answer)
        assert len(set(sample.options)) == 4 and set(sample.options) < {"toss", *"abcd"}
        assert sample.missing == ["videos/s/a.avi", "images/s/p.png"]
        assert replace(other, id=sample.id) == sample


@needs_shared
@pytest.mark.parametrize("name, count", [("video_r1", 9), ("perception_test", 4), ("next_gqa", 2),
                                         ("seed_bench_r1", 2)])
def test_shared_records_are_read(name, count):
    path = SHARED / f"data/clips_{name}.json"
    samples = data.load_samples(path, SHARED / "videos")
    assert samples == data.load_samples(path, SHARED / "videos", name) and len(samples) == count
    for sample in samples:
        visual = data.read_visual(sample, **READING | {"max_frames": 4})
        assert len(visual.video_grids) == (sample.video is not None)
        assert len(visual.image_grids) == (sample.image is not None)


def test_fuzzed_records_load_or_are_refused(tmp_path):
    rng, loaded = random.Random(0), 0
    junk = json.loads(r"""[null, "", "x", 3, -1, 1e300, NaN, true, [], {}, [[]], [null], "\ud800",
        ["A. a", "B. b"], "\u0000", "/", "<answer>", 1e400, [["a"]], [[1, "2"]], "²"]""")
    for _ in range(400):
        record = dict(rng.choice(list(RECORDS.values())))
        for name in rng.sample(sorted(record), rng.randrange(3)):
            record[name] = rng.choice([*junk, 10 ** 400, "1" * 50])
        try:
            sample, = load(tmp_path, record, root=rng.choice([tmp_path, None]))
            data.prompt_text(sample, visual_of([(1, 2, 2)])).encode()
            data.task_reward("<answer>A</answer><time>1 to 2</time>", sample)
            loaded += 1
        except DataError as error:
            assert "x.json" in str(error) and "\n" not in str(error)
    assert 100 < loaded < 350


# ---- frames and times

@pytest.mark.parametrize("video, expected", rows("""
    [660, 30, 1, 16] -> [0, 659, 16, 22]
    [1, 25, 1, 16] -> [0, 0, 2, 0.04]
    [3, 25, 1, 16] -> [0, 2, 2, 0.12]
    [50, 25, 1, 16] -> [0, 49, 4, 2]
    [175, 25, 2, 16] -> [0, 174, 14, 7]
    [1000, 10, 1, 7] -> [0, 999, 6, 100]
    [100, 10, 1, 16, [2.0, 6.9]] -> [20, 69, 4, 5]
    [100, 10, 1, 16, [-5, 99]] -> [0, 99, 10, 10]"""))
def test_frames_and_time_rule(video, expected):
    first, last, n, duration = expected
    indices, seconds = data.frame_indices(*json.loads(video))
    assert seconds == pytest.approx(duration)
    assert indices == [round(first + i * (last - first) / (n - 1)) for i in range(n)]
    with pytest.raises(ValueError, match="outside"):
        data.frame_indices(100, 10, 1, 16, (50, 60))


def noise(*shape):
    numbers = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(numbers)


def clip(path, shape=(6, 3, 30, 41)):
    data.write_y4m(path, noise(*shape), 2)
    return noise(*shape)


def frames_of(path, *limits):
    frames, duration = data.sample_frames(str(path), *limits)
    return torch.stack(list(frames)).int(), duration


def test_y4m_round_trip(tmp_path):
    for width in (41, 42):
        frames = clip(tmp_path / "a.y4m", (8, 3, 30, width))
        read, duration = frames_of(tmp_path / "a.y4m", 100, 100)
        assert duration == 4.0 and (read - frames.int()).abs().max() <= 2
    assert os.listdir(tmp_path) == ["a.y4m"]    # no unfinished file is left


def test_folder_of_pictures(tmp_path):
    from PIL import Image
    for i in range(12):
        Image.new("RGB", (20, 10), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
    touch(tmp_path, "notes.txt", "._3.png")                 # the second as macOS makes them
    frames, duration = frames_of(tmp_path, 1, 16)
    assert frames.shape == (4, 3, 10, 20) and duration == 4.0
    assert (frames[:, 0, 0, 0] // 20).tolist() == [0, 4, 7, 11]
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "0.png")        # transparent black
    assert (data.read_picture(str(tmp_path / "0.png")) == 255).all()


@needs_shared
@pytest.mark.parametrize("name, n, duration", [
    ("mma_test.avi", 6, 164 / 25), ("frog.webm", 8, 248 / 30), ("pancake_h264.mkv", 10, 31 / 3)])
def test_sampled_frames_are_those_of_a_decoder_that_reads_on(name, n, duration):
    path = str(SHARED / "videos" / name)
    frames, covered = frames_of(path, 1, 16)
    assert (len(frames), covered) == pytest.approx((n, duration))
    video = data.decord.VideoReader(path, num_threads=1)
    decoded = [torch.from_numpy(video.next().asnumpy()) for _ in range(len(video))]
    for i, frame in enumerate(frames):
        expected = decoded[round(i * (len(decoded) - 1) / (n - 1))]
        assert torch.equal(frame.permute(1, 2, 0), expected.int())


def test_formats_without_times_are_read_without_seeking(tmp_path, monkeypatch):
    """The decoder is told what a file is by its content, and we by its name."""
    monkeypatch.delattr(data.decord.VideoReader, "seek_accurate")
    for name, expected in (("a.AVI", [0, 3, 5, 8]), ("one.mpeg", [0, 0]), ("b.wmv", [0, 3, 5, 8])):
        frames = clip(tmp_path / name, (expected[-1] + 1, 3, 64, 64))
        read, _ = frames_of(tmp_path / name, 0.1, 4)
        assert (read - frames[expected].int()).abs().max() <= 2
    with pytest.raises(ValueError, match="convert it"):
        data.sample_frames("a.TS", 1, 4)


# ---- patches

def slow_patches(frames):
    """Qwen's order, number by number, for frames whose sides are multiples of 28."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    count, _, height, width = frames.shape
    steps, values = (count + 1) // 2, []
    for t, row, column, y, x, c, f, j, i in np.ndindex(steps, height // 28, width // 28, 2, 2, 3, 2,
                                                       14, 14):
        frame = frames[min(2 * t + f, count - 1)]
        pixel = frame[c, 28 * row + 14 * y + j, 28 * column + 14 * x + i]
        values.append((float(pixel) / 255 - mean[c]) / std[c])
    return torch.tensor(values).view(-1, 1176), (steps, height // 14, width // 14)


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (2, 3, 28, 56), (3, 3, 56, 84)])
def test_patches_equal_the_slow_oracle_and_have_an_inverse(shape):
    frames = noise(*shape)
    patches, grid = data.frames_to_patches(frames, 784, 10 ** 6)
    expected, expected_grid = slow_patches(frames)
    assert grid == expected_grid and patches.dtype == torch.float32
    assert (patches - expected).abs().max() < 1e-6
    inverse = data.patches_to_frames(patches, grid)
    assert torch.equal(inverse[:len(frames)], frames) and torch.equal(inverse[-1], frames[-1])


@pytest.mark.parametrize("arguments, expected", rows("""
    [240, 426, 50176, 50176] -> [168, 280]
    [20, 20, 3136, 50176] -> [56, 56]
    [10, 2000, 784, 50176] -> [28, 420]
    [42, 42, 784, 1000000] -> [56, 56]
    [100, 100, 12000, 1000000] -> [112, 112]"""))
def test_smart_resize_by_hand(arguments, expected):
    assert data.resized_size(*json.loads(arguments)) == tuple(expected)
    with pytest.raises(ValueError, match="200 times"):
        data.resized_size(2, 402, 784, 50176)


def test_patches_equal_transformers():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    from PIL import Image
    processor = module.Qwen2VLImageProcessorPil(size=dict(shortest_edge=3136, longest_edge=50176))
    smooth = noise(24, 42, 3).repeat_interleave(10, 0).repeat_interleave(10, 1)
    expected = processor(Image.fromarray(smooth.numpy()), return_tensors="pt")
    patches, grid = data.frames_to_patches(smooth.permute(2, 0, 1)[None], 3136, 50176)
    difference = (patches - expected["pixel_values"]).abs()
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    # Pillow rounds between its two passes.
    assert difference.max() < 2.1 / 255 / 0.26 and difference.mean() < 2e-3


def test_masked_patches():
    grids = [(3, 10, 20), (1, 30, 4)]
    patches = torch.randn(720, 1176)
    masked, again = [data.mask_patches(patches, grids, np.random.default_rng(0)) for _ in "12"]
    black, _ = data.frames_to_patches(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), 784, 784)
    dark = (masked == black[0]).all(1)
    video, image = dark[:600].view(3, 200), dark[600:]
    assert torch.equal(masked, again) and torch.equal(masked[~dark], patches[~dark])
    assert (video == video[0]).all() and 0.52 < video[0].float().mean() < 0.68
    assert 0.4 < image.float().mean() < 0.8


# ---- the reader, with real processes

def children(process):
    """The decoding processes of a process."""
    lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    numbers = [int(child) for child in " ".join(lists).split()]
    return [number for number in numbers
            if data.__file__.encode() in Path(f"/proc/{number}/cmdline").read_bytes()]


def is_running(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and ") Z " not in stat.read_text()


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")


@needs_proc
def test_a_fault_costs_one_sample(tmp_path, monkeypatch):
    def read(sample):
        return reader.submit(sample).result(60)

    def begin_hanging():
        future = reader.submit(hanging)
        time.sleep(0.3)
        return future

    def send_stop_signals():
        for number in STOP_SIGNALS:     # are the parent's to answer
            os.kill(children(os.getpid())[0], number)

    clip(tmp_path / "good.avi")
    (tmp_path / "cut.avi").write_bytes((tmp_path / "good.avi").read_bytes()[:100])
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    touch(tmp_path, "empty.avi", "folder/notes.txt")
    os.mkfifo(tmp_path / "pipe.avi")
    good, hanging, *faults = [replace(CHOICE, video=str(tmp_path / name)) for name in (
        "good.avi", "pipe.avi", "empty.avi", "cut.avi", "folder", "none.avi")]
    faults += [replace(CHOICE, missing=["x\ny.avi"]), replace(good, bounds=(100.0, 200.0)),
               replace(good, image=str(tmp_path / "bad.png"))]
    with data.VideoReader(1, timeout=2, **READING) as reader:
        visual, expected = vars(read(good)), vars(data.read_visual(good, **READING))
        assert torch.equal(visual.pop("patches"), expected.pop("patches")) and visual == expected
        process = children(os.getpid())
        for sample in faults:
            with pytest.raises(VideoError, match=r"\A.+(cannot be read \(|not found).*\Z"):
                read(sample)
        send_stop_signals()
        read(good)
        assert children(os.getpid()) == process and len(process) == 1
        with pytest.raises(VideoError, match="pipe.avi.*not decoded within 2 s"):
            read(hanging)
        assert not is_running(*process)
        read(good)
        future = begin_hanging()
        os.kill(*children(os.getpid()), signal.SIGKILL)
        with pytest.raises(VideoError, match="pipe.avi.*process died"):
            future.result(60)
        future = reader.submit(good)
        while not children(os.getpid()):
            time.sleep(0.01)
        send_stop_signals()             # before it has even started
        future.result(60)
        future, begin = begin_hanging(), time.monotonic()
    assert time.monotonic() - begin < 1.2 and isinstance(future.exception(), VideoError)
    assert children(os.getpid()) == []
    with pytest.raises(RuntimeError):
        reader.submit(good)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with data.VideoReader(1, **READING) as reader, data_error("did not start", "status 1"):
        read(good)


@needs_proc
def test_a_hanging_decoder_ends_soon_after_its_parent(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    script = (f"import data, time; reader = data.VideoReader(1, timeout=0.5, **{READING})\n"
              "def read(name): return reader.submit(data.Sample('', '', [], '', '', image=name))\n"
              "read('none.png').exception(); read('pipe.png'); print(flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)})
    parent.stdout.readline()
    process, = children(parent.pid)
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 6
    while is_running(process):
        assert time.monotonic() < end, "the decoding process outlives its parent"


@needs_shared
def test_the_damaged_clip_is_refused():
    sample = replace(CHOICE, video=str(SHARED / "videos/corrupted.mp4"))
    with pytest.raises(VideoError, match=r"\A.*corrupted\.mp4.*\Z"):
        data.read_visual(sample, **READING | {"fps": 4})


# ---- prompts

TOY_WORD = r"</?\w+>|\w+|[^\w\s]"


class WordTokenizer:
    """Just enough of a tokenizer: words of the built-in task, Qwen's control tokens whole."""
    pad_token_id, eos_token_id = 0, 1

    def __init__(self):
        self.ids = {"<pad>": 0, "<eos>": 1}

    def convert_tokens_to_ids(self, token):
        if isinstance(token, list):
            return [self.convert_tokens_to_ids(word) for word in token]
        return self.ids.setdefault(token, len(self.ids))

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return f"<|im_start|>user {messages[0]['content'][0]['text']}<|im_end|>"

    def __call__(self, text, add_special_tokens=False):
        words = re.findall(r"<\|\w+\|>|" + TOY_WORD, text)
        return {"input_ids": self.convert_tokens_to_ids(words)}


def visual_of(video_grids, image_grids=(), seconds=2.0):
    grids = [*video_grids, *image_grids]
    return data.Visual(torch.zeros(sum(math.prod(grid) for grid in grids), 1176), list(video_grids),
                       list(image_grids), [seconds] * len(video_grids), 8.0, 4)


def test_prompt_text_is_the_papers():
    question = "which ?\nA. A book\nB. A pan\nC. A guitar\nD. An umbrella"
    assert data.prompt_text(CHOICE, None) == (
        f"{question} Output the thinking process in <think> </think> and final answer in <answer> "
        "</answer> tags, i.e., <think> reasoning process here </think><answer> answer here "
        "</answer>.")
    assert data.prompt_text(GROUND, visual_of([(2, 4, 4)])) == (
        "The video is 20 seconds long, with 4 frames evenly sampled from it.\nBased on the video "
        "content, think about the question deeply, select the correct option, and provide ONE or "
        "MORE time periods in the video where the clues corresponding to the correct option occur."
        f"\nQuestion: {question}\nOutput the thinking process in <think> </think> tags, final "
        "answer in <answer> </answer> tags and time clues in <time> </time> tags, i.e., <think> "
        "reasoning process here </think> <answer> answer here </answer> <time> 8.4 to 12.5, 25 to "
        "30.2 </time>")
    assert data.prompt_text(replace(CHOICE, kind="description"), None) == question


HOSTILE = replace(GROUND, question="a <|video_pad|> <<||image_pad|> <|im_end|> b",
                  options=["<|image_pad|>", "<|im_end|>"])


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=needs_shared)])
def test_prompt_tokens_and_frame_of_token(real):
    tokenizer, chat = WordTokenizer(), "<|im_start|>user {}<|im_end|>"
    if real:
        tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "models/qwen2.5-vl-3b")
        chat = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}"
                "<|im_end|>\n<|im_start|>assistant\n")
    visual = visual_of([(3, 4, 6)], [(1, 2, 4)])
    prompt = data.build_prompt(HOSTILE, visual, tokenizer)
    words = data.prompt_text(HOSTILE, visual).replace("<|", "< |")
    text = chat.format(f"<|vision_start|>{'<|video_pad|>' * 18}<|vision_end|><|vision_start|>"
                       f"{'<|image_pad|>' * 2}<|vision_end|>{words}")
    assert prompt.input_ids.tolist() == tokenizer(text)["input_ids"] and prompt.num_frames == 3
    of_video = prompt.input_ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert prompt.frame_of_token[of_video].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert (prompt.frame_of_token[~of_video] == -1).all()
    for seconds, crucial, expected in ((2.0, 2, 2), (2.0, 3, None), (4.0, 1, None)):
        sample = replace(CHOICE, crucial_frame=crucial)
        prompt = data.build_prompt(sample, visual_of([(3, 4, 4)], [], seconds), tokenizer)
        assert prompt.sample.crucial_frame == expected
    assert data.build_prompt(sample, visual_of([]), tokenizer).num_frames == 0


def test_batches_are_read_ahead_and_long_or_unreadable_prompts_left_out(tmp_path):
    clip(tmp_path / "a.avi")
    good, bad = [replace(CHOICE, video=str(tmp_path / name)) for name in ("a.avi", "b.avi")]
    taken = []

    def batches():
        for position in (7, 3):
            taken.append(position)
            yield {position: good, position + 1: bad}

    with data.VideoReader(1, **READING) as reader:
        def read(batches, limit):
            decoded = data.decode_ahead(reader, batches)
            return data.build_prompts(decoded, WordTokenizer(), limit)

        ahead = read(batches(), 10 ** 6)
        assert taken == [7]  # the first batch is being decoded already
        prompts, (skipped,) = next(ahead)
        assert taken == [7, 3]  # the second batch is under way
        assert [list(prompts) for prompts, _ in ahead] == [[3]]
        assert list(prompts) == [7] and prompts[7].sample == good
        assert "cannot be read" in skipped.pop("reason")
        assert skipped == dict(position=8, id="a:0", path=bad.video, unreadable=True)
        limit = len(prompts[7].input_ids)
        (prompts, _), = read([{7: good}], limit)
        (no_prompts, (skipped,)), = read([{7: good}], limit - 1)
        assert len(prompts) == 1 and not no_prompts and not skipped["unreadable"]
        assert skipped["reason"].endswith(f"over the limit of {limit - 1}")
        assert list(read([], 1)) == []
    parts = data.in_batches(dict(enumerate("abcde")), 2)
    assert parts == [{0: "a", 1: "b"}, {2: "c", 3: "d"}, {4: "e"}]


# ---- rewards

@pytest.mark.parametrize("case, reward", rows("""
    CHOICE: C | C. | (C) | C. A guitar | a guitar |  C \\n | (C) A guitar. | C: A guitar -> 1
    CHOICE: B |  | C. A book | C A guitar | CC | A, C | c | (C | guitar | E | . | C or D -> 0
    CHOICE: () | \uff23 | \ud800 | <b>C</b> -> 0
    NUMBER: 100 | 100.0 | 1e2 | +100 meters | 95 | 100. | 100% | 100 or 7 -> 1
    NUMBER: about 100 |  | nan | inf | 1e999 | \u0661\u0660\u0660 | 1_00 | 0x64 | 10,0 | . -> 0
    NUMBER: --100 | 100- -> 0"""))
def test_answers(case, reward):
    sample, answers = case.split(": ", 1)
    for answer in answers.split("|"):
        response = f"<think>x</think><answer>{answer}</answer>"
        assert data.accuracy_reward(response, globals()[sample]) == reward, answer
    assert data.match_choice("red", ["Red.", "red"]) is None        # which of the two?


@pytest.mark.parametrize("response, scores", rows("""
    <think>x</think><answer>C</answer> -> [1, 1]
    \\n<think>\\nx\\n</think>\\n \\n<answer> C </answer>\\n -> [1, 1]
    <think></think><answer></answer> -> [0, 1]
    x <think>x</think><answer>C</answer> -> [1, 0]
    <think>x</think><answer>C</answer>. -> [1, 0]
    <think>x</think> so <answer>C</answer> -> [1, 0]
    <answer>C</answer><think>x</think> -> [1, 0]
    <think><answer>C</answer></think> -> [1, 0]
    <think>a</think>b</think><answer>C</answer> -> [1, 0]
    <answer>C</answer> -> [1, 0]
    <think>x</think><answer>C</answer><answer>C</answer> -> [0, 0]
    <think>x</think><answer><answer>C</answer></answer> -> [0, 0]
    <think>x</think><ANSWER>C</ANSWER> -> [0, 0]
    <think>x</think><answer>C -> [0, 0]
    <think></answer></think><answer>C -> [0, 0]
    </answer>C<answer> -> [0, 0]
    C -> [0, 0]"""))
def test_format_and_the_only_answer(response, scores):
    accuracy, form = scores
    assert data.score_response(response, CHOICE) == {"accuracy": accuracy, "format": form}
    assert data.task_reward(response, CHOICE) == (0.9 * accuracy + 0.1 * form, accuracy, form)
    assert data.format_reward(response, CHOICE) == form


def test_ambiguous_words_and_letters_as_options():
    for text, options, letter in (
            ("same", ["same", "Same.", "x"], None), ("(A) x", ["x", "y"], "A"),
            ("A", ["B", "A"], "A"),     # a letter is a letter first
            ("(B) x", ["x", "y"], None)):
        assert data.match_choice(text, options) == letter


@pytest.mark.parametrize("pred, expected", rows("""
    100 -> 1
    95 -> 1
    94.9 -> 0.9
    105 -> 1
    150 -> 0.1
    150.1 -> 0
    75 -> 0.6
    -100 -> 0"""))
def test_mean_relative_accuracy(pred, expected):
    assert data.mean_relative_accuracy(float(pred), 100) == pytest.approx(expected)
    assert data.mean_relative_accuracy(0, 0) == 1 and data.mean_relative_accuracy(0.1, 0) == 0
    assert data.mean_relative_accuracy(-1.05, -1) == 1  # an error of 0.05 + 4e-17


@pytest.mark.parametrize("text, number", rows("""
    1,200.5 m -> 1200.5
    -.5, -> -0.5
    12,345,678% -> 12345678
    1,20 -> null
    1e400 -> null"""))
def test_numbers(text, number):
    assert data.parse_number(text) == number


@pytest.mark.parametrize("pred, expected", rows("""
    [[2, 6]] -> [0.25, 0.5]
    [[6, 2]] -> [0, 0]
    [[4, 6], [5, 8], [7, 10]] -> [1, 1]
    [[0, 99]] -> [0.3, 0.3]"""))
def test_temporal_iou_by_hand(pred, expected):
    assert data.temporal_iou(json.loads(pred), [[4, 10]], 20) == tuple(expected)


def test_temporal_iou_equals_a_slow_count():
    rng = random.Random(0)

    def random_spans():
        starts = [rng.randint(-5, 30) for _ in range(rng.randint(0, 4))]
        return [(start, start + rng.randint(0, 9)) for start in starts]

    def seconds(spans):
        return {t for t in range(25) for start, end in spans if start <= t < end}

    for _ in range(200):
        pred, label = random_spans(), random_spans()
        P, T = seconds(pred), seconds(label)
        expected = (len(P & T) / len(P | T), len(P & T) / len(P)) if P else (0, 0)
        assert data.temporal_iou(pred, label, 25) == pytest.approx(expected)


@pytest.mark.parametrize("text, spans", rows("""
    8.4 to 12.5, 25 to 30.2 -> [[8.4, 12.5], [25, 30.2]]
    8.4s to 12.5s -> [[8.4, 12.5]]
    from 8.4 seconds to 12.5 seconds. -> [[8.4, 12.5]]
    8.4-12.5 -> [[8.4, 12.5]]
    8.4 \u2013 12.5 -> [[8.4, 12.5]]
    [8.4 to 12.5]; (25 TO 30) -> [[8.4, 12.5], [25, 30]]
    1 to 2 and 3 to 4\\n5 to 6 -> [[1, 2], [3, 4], [5, 6]]
    -2 to 3, x -> [[-2, 3]]
    .5 to 1. -> [[0.5, 1]]
    12.5 to 8.4, 3 to 3, 0 to inf, \u0668 to \u0669, 8.4 to, 8.4, 1 to 2 to 3, 1e3 to 2e3 -> []"""))
def test_span_shapes(text, spans):
    assert data.parse_spans(text) == [tuple(span) for span in spans]


@pytest.mark.parametrize("ending, scores", rows("""
    <answer>C</answer><time>2 to 6</time> -> [1, 1, 0.25, 0.5, 1]
    <answer>B</answer><time>2 to 6</time> -> [0, 1, 0.25, 0.5, 0]
    <answer>C</answer><time>1 to 6</time> -> [1, 1, 0.222222222, 0.4, 0]
    <answer>C</answer><time>2.9 to 5.1</time> -> [1, 1, 0.154929577, 0.5, 1]
    <answer>C</answer> -> [1, 0, 0, 0, 0]
    <time>2 to 6</time><answer>C</answer> -> [1, 0, 0.25, 0.5, 1]
    <answer>C</answer><time>4 to 9</time><time>4 to 9</time> -> [1, 0, 0, 0, 0]"""))
def test_grounding_scores(ending, scores):
    response = "<think>x</think>" + ending
    accuracy, form, iou, _, _ = scores
    names = ["accuracy", "format", "iou", "iop", "acc_gqa"]
    assert data.score_response(response, GROUND) == pytest.approx(dict(zip(names, scores)))
    assert data.temporal_iou_reward(response, GROUND) == pytest.approx(iou)
    reward = accuracy + 0.1 * form + iou
    assert data.task_reward(response, GROUND) == pytest.approx((reward, accuracy, form))


def test_hostile_responses_take_linear_time():
    n = 100_000         # in quadratic time this would take minutes
    texts = [" " * n, "9" * n, "C." * n, "1," * n, "(" * n, "<answer>" * n, "</time>" * n, "\n" * n,
             "1 to 2," * n, "1" * n + "to", "and " * n, "1 to 2" + " " * n + "s"]
    for response in [f"<{tag}>{text}</{tag}>" for text in texts for tag in ("answer", "time")]:
        for sample in (CHOICE, NUMBER, GROUND):
            begin = time.process_time()
            assert 0 <= data.task_reward(response, sample)[0] <= 2.1
            assert time.process_time() - begin < 2


# ---- the built-in task

def test_toy_videos_show_what_they_say():
    names = {"r": "red", "g": "green", "b": "blue", "rg": "yellow"}
    for seed in range(5):
        frames, plan = data.toy_video(np.random.default_rng(seed))
        shapes, colours, _ = zip(*plan)
        assert frames.shape == (16, 3, 56, 56) and frames.dtype == torch.uint8
        assert sorted(shapes) == sorted(data.TOY_SHAPES)
        assert sorted(colours) == sorted([*names.values()] * 2)
        for (_, colour, cell), pair in zip(plan, frames.float().view(8, 2, 3, 56, 56)):
            assert 24 < (pair[0] - pair[1]).std() < 29  # sqrt(2) x 20 grey levels
            is_light = (pair.mean(0) - 60).amax(0) > 65
            of_cell = is_light.view(2, 28, 2, 28)[cell // 2, :, cell % 2]
            assert of_cell.sum() > 0.9 * is_light.sum() > 100
            mean = pair.mean(0)[:, is_light].mean(1)
            assert names["".join(c for c, level in zip("rgb", mean) if level > 130)] == colour


def test_toy_data_is_deterministic_whole_and_found_both_ways(tmp_path):
    def files_of(folder):
        data.make_toy_data(folder, (3, 2))
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}

    folder = tmp_path / "a"
    files = files_of(folder)
    assert len(files) == 7 and files == files_of(tmp_path / "b")
    stamps = [path.stat().st_mtime_ns for path in folder.rglob("*.y4m")]
    assert files == files_of(folder)        # whole videos are kept
    assert stamps == [path.stat().st_mtime_ns for path in folder.rglob("*.y4m")]
    train = data.load_samples(folder / "train.json")
    assert len(train) == 12 and len(data.load_samples(folder / "test.json")) == 8
    assert data.load_samples(folder / "train.json", folder / "videos") == train
    for i, sample in enumerate(train):
        frames, plan = data.toy_video(np.random.default_rng([0, 0, i // 4]))
        shape, colour, _ = plan[sample.crucial_frame]
        assert sample.question == f"what colour is the {shape} ?"
        assert sample.options["ABCD".index(sample.answer)] == colour
        read, duration = frames_of(sample.video, 1, 16)
        assert (read - frames.int()).abs().max() <= 2 and duration == 16.0


def test_toy_responses_are_correct_and_use_the_vocabulary():
    rng = np.random.default_rng(0)
    words = set(re.findall(TOY_WORD, " ".join(data.toy_vocabulary())))
    spoken = [set() for _ in data.TOY_FILLER]
    assert len(words) < 150
    for shape, colour in itertools.product(data.TOY_SHAPES * 3, data.TOY_COLOURS):
        sample = data.toy_sample(shape, colour)
        letter = "ABCD"[sample.options.index(colour)]
        plain = data.toy_response(shape, colour, rng, filler=False)
        assert plain == f"<think> {shape} {colour} </think> <answer> {letter} </answer>"
        response = data.toy_response(shape, colour, rng)
        assert data.task_reward(response, sample) == (1.0, 1, 1)
        tokens = re.findall(TOY_WORD, response)
        assert response.split() == tokens and tokens[25:27] == [shape, colour]
        assert words.issuperset(tokens + re.findall(TOY_WORD, data.prompt_text(sample, None)))
        for place, word in zip(spoken, tokens[1:25], strict=True):
            place.add(word)
        wrong = data.toy_response(shape, colour, rng, correct=0)
        assert data.task_reward(wrong, sample) == (pytest.approx(0.1), 0, 1)
    assert spoken == [set(alternatives) for alternatives in data.TOY_FILLER]
    assert [len(place) for place in spoken] == [4] * 24
    responses = [data.toy_response("star", "red", rng, False, 0.4) for _ in range(1000)]
    assert 360 < sum("star red" in response for response in responses) < 440


def test_toy_lessons_teach_the_responses_and_the_tokens():
    tokenizer = WordTokenizer()

    def lesson_about(number):
        rng = np.random.default_rng([3, 2, number])
        visual, plan = data.toy_visual(rng)
        prompts = [data.build_prompt(data.toy_sample(shape, colour), visual, tokenizer)
                   for shape, colour, _ in plan]
        return data.toy_lesson(prompts, plan, rng, tokenizer)

    lesson, other = lesson_about(0), lesson_about(1)
    words = list(tokenizer.ids)             # in the order of their numbers
    assert not torch.equal(lesson.prompt.patches, other.prompt.patches)
    _, plan = data.toy_video(np.random.default_rng([3, 2, 0]))
    visual = data.Visual(lesson.prompt.patches, [(8, 4, 4)], [], [2.0], 16.0, 16)
    for i, (shape, colour, cell) in enumerate(plan):
        assert [words[n] for n in lesson.token_words[4 * i + cell]] == [shape, colour]
        ids, real, target = lesson.row_ids[i], lesson.row_mask[i], lesson.target_mask[i]
        response = " ".join(words[n] for n in ids[target])
        assert re.fullmatch(f"<think> .* {shape} {colour} </think> .* </answer> <eos>", response)
        prompt = torch.cat([lesson.prompt.input_ids, ids[real & ~target]])
        expected = data.build_prompt(data.toy_sample(shape, colour), visual, tokenizer)
        assert torch.equal(prompt, expected.input_ids)
    assert (lesson.token_words == tokenizer.pad_token_id).all(1).sum() == 24


# ================================================================================== evaluate.py


def measure(capsys, command: str) -> str:
    """What a command prints; it must end well."""
    evaluate.main(command.split())
    return capsys.readouterr().out


def refusal(capsys, command: str) -> str:
    """The last line of a refused command; before it, at most a bar and a list of files."""
    with pytest.raises(SystemExit) as caught:
        evaluate.main(command.split())
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert caught.value.code == 2 and last.startswith("evaluate.py")
    assert "Traceback" not in error and "\x1b" not in error
    return last


def few_questions(toy, path: Path, count: int) -> list[dict]:
    """Write an annotation file with the first questions of the built-in task."""
    records = json.loads((toy / "test.json").read_text())[:count]
    for record in records:
        record["path"] = str(toy / record["path"])
    path.write_text(json.dumps(records))
    return records


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def toy_prompts(toy, tokenizer, numbers) -> list[data.Prompt]:
    samples, prompts = data.load_samples(toy / "test.json"), []
    for number in numbers:
        visual = data.read_visual(samples[number], fps=1, max_frames=16 - 4 * number,
                                  min_pixels=3136, max_pixels=3136)
        prompts.append(data.build_prompt(samples[number], visual, tokenizer))
    return prompts


# ---- decoding and tables

def test_evaluation_decoding_by_hand():
    """Tokens of the prompt and of the response count, for each row only its own."""
    prompts = [model_utils.EncodedPrompt(torch.tensor(ids), None, 0, None, None, None, 0)
               for ids in ([0, 3], [0, 1])]
    choose = evaluate.evaluation_decoding(prompts, 4, penalty=2.0)
    logits = torch.tensor([[2.0, 1.5, 0.0, 0.0], [-1.0, -1.5, -1.9, -INF]])
    # 2 / 2 < 1.5 and -1 * 2 < -1.9; with the responses 1.5 / 2 < 2 / 2 and -1.9 * 2 < -1 * 2
    assert choose(logits, torch.empty(2, 0, dtype=torch.long)).tolist() == [1, 2]
    assert choose(logits, torch.tensor([[1], [2]])).tolist() == [0, 0]


@pytest.mark.parametrize("penalty", [1.05, 1.5])
def test_evaluation_decoding_equals_generate(toy, penalty):
    """With the settings of the supplement; prompts of several lengths decode together."""
    model, tokenizer = evaluate.load_model(str(toy / "model"))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(toy / "model").eval()
    prompts = toy_prompts(toy, tokenizer, range(3))
    encoded = model_utils.encode_prompts(model, prompts)
    choose = evaluate.evaluation_decoding(encoded, len(tokenizer), penalty)
    rollouts = model_utils.rollout(model, encoded, torch.zeros(3, 1, 20), attention_layers=0,
                                   choose=choose)
    decoding = evaluate.DECODING | {"repetition_penalty": penalty, "do_sample": True}
    for prompt, rollout in zip(prompts, rollouts):
        expected = generate(plain, prompt, rollout.encoded, max_new_tokens=20, **decoding)
        response = expected.sequences[0, len(prompt.input_ids):]
        assert rollout.response_ids[rollout.response_mask].equal(response)


def test_tables_by_hand(tmp_path):
    """Means by group, of the records that have a score; VSI-Bench's overall mean."""
    def results(scores, over_tasks=False):
        records = [score | dict(prompt="", seconds=0.0) for score in scores]
        evaluate.report_scores(tmp_path, {}, records, [], over_tasks)
        return json.loads((tmp_path / "summary.json").read_text())["results"]

    table = results([dict(group="TC", accuracy=1.0, iou=0.25), dict(group="CW", accuracy=1.0),
                     dict(group="TC", accuracy=0.0, iou=1.0)])
    assert table == {"CW": dict(n=1, accuracy=1.0), "TC": dict(n=2, accuracy=0.5, iou=0.625),
                     "all": dict(n=3, accuracy=pytest.approx(2 / 3), iou=0.625)}
    # directions 0.2, 0.4, 0.9 are one task of 0.5, whatever their numbers; another has 0.7
    scores = []
    for group, correct, count in (("object_rel_direction_easy", 1, 5), ("route_planning", 14, 20),
                                  ("object_rel_direction_medium", 4, 10),
                                  ("object_rel_direction_hard", 9, 10)):
        scores += [dict(group=group, accuracy=float(i < correct)) for i in range(count)]
    assert results(scores, over_tasks=True)["all"] == pytest.approx(dict(n=45, accuracy=0.6))
    assert results(scores)["all"] == pytest.approx(dict(n=45, accuracy=28 / 45))


def bounds(values) -> list[float]:
    """(mean, low, high) as printed."""
    return [float(x) for x in re.findall(r"[-+][0-9.]+", evaluate.with_interval(values, "+"))]


def test_intervals_are_over_seeds_and_their_runs():
    """Near the normal approximation. Of 4 seeds with 9 runs where only the seeds differ, or only
    the runs, the resampled mean is a mean of 4, or of 36, independent draws."""
    assert bounds(np.full((7, 1), 0.25)) == [0.25, 0.25, 0.25]
    rng = np.random.default_rng(0)
    values = rng.choice([-1.0, 0.0, 1.0], size=(400, 1), p=[0.1, 0.6, 0.3])
    of_seeds = np.repeat(rng.permutation([-1.0, -1.0, 1.0, 1.0])[:, None], 9, axis=1)
    assert bounds(of_seeds) == [0, -1, 1]           # 1 of 16 means of 4 signs is below -0.5
    of_runs = rng.permuted([[-1.0] * 18 + [1.0] * 18], axis=1).reshape(4, 9)
    of_runs -= of_runs.mean(1, keepdims=True)
    for sample, draws in ((values, 400), (of_runs, 36)):
        mean, low, high = bounds(sample)
        deviation = 1.96 * sample.std() / draws ** 0.5
        assert mean == pytest.approx(sample.mean(), abs=1e-3)
        assert (low - mean, high - mean) == pytest.approx((-deviation, deviation), rel=0.1)
        assert bounds(sample) == [mean, low, high]


def test_focus_difference():
    """The docstring's example, each bin, and an oracle."""
    def difference(frames, seconds=2.0, correct=1):
        """Of the frames of each response, of which the first ones are correct."""
        focused = torch.zeros(len(frames), 8, dtype=torch.bool)
        for row, places in zip(focused, frames):
            row[list(places)] = True
        return evaluate.focus_difference(focused, torch.arange(len(frames)) < correct, seconds)

    for seconds, name in zip((0.9, 1.9, 2, 3.9, 4.1, 9), list(evaluate.TAB_A)[1:]):
        assert difference([(0, 1), (3, 4)], seconds) == (name, pytest.approx(3 * seconds))
    assert name == "over 15 s" and difference([(0, 2), (0, 2)]) == ("0 s", 0.0)
    assert difference([(0, 2), (1,)]) == ("0 to 3 s", 0.0)
    frames = np.random.default_rng(0).permuted([range(8)] * 6, axis=1)[:, :3]
    times = 1.5 * frames.mean(1)
    _, result = difference(frames, 1.5, correct=2)
    assert result == pytest.approx(abs(times[:2].mean() - times[2:].mean()))


def test_curves(tmp_path, monkeypatch):
    """Over the last steps; folders with the same settings, and the same name but for the number,
    are seeds of a run, and one that was stopped counts as far as it went."""
    assert evaluate.smooth(np.array([1.0, 3.0, 5.0, 9.0]), 2).tolist() == [1, 2, 4, 7]
    smoothed = evaluate.smooth(np.array([NAN, 1.0, NAN, 3.0, 5.0, NAN, NAN]), 2)
    np.testing.assert_array_equal(smoothed, [NAN, 1, 1, 3, 4, 5, NAN])
    figures = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, output: figures.append(figure))
    folders = [tmp_path / name for name in ("appo-0", "appo-1", "appo-2", "appo.k1-0", "toy")]
    for seed, (folder, values) in enumerate(zip(folders, ([1, 1, 1, 5], [3], [9], [7], []))):
        folder.mkdir()
        settings = {"seed": seed, "k1": 5 if seed == 2 else 4}
        (folder / "config.json").write_text(json.dumps({"settings": settings}))
        lines = [json.dumps({"accuracy": value}) + "\n" for value in values]
        (folder / "metrics.jsonl").write_text("".join(lines) + '{"accu')    # killed while writing
    evaluate.curves(folders, smooth=1)
    axes, *_ = figures[0].axes
    curves = [(line.get_label(), line.get_ydata().tolist()) for line in axes.lines]
    assert curves == [("appo (n = 2)", [2, 1, 1, 5]), ("appo (n = 1)", [9]),
                      ("appo.k1 (n = 1)", [7])]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    for edge in (2 - 0.5 ** 0.5, 2 + 0.5 ** 0.5):       # the standard error of 1 and 3
        assert np.isclose(band, edge).any()
    (folders[0] / "config.json").write_text("{}")
    with pytest.raises(model_utils.RunError, match="no run of appo.py"):
        evaluate.curves(folders, smooth=1)


# ---- study

def test_controls(toy):
    """What the study's weightings make of APPO's, on a random group."""
    _, tokenizer = evaluate.load_model(str(toy / "model"))
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    red, blue, other = tokenizer.convert_tokens_to_ids(["red", "blue", "the"])
    ids = torch.full((2, 9), other)
    ids[0, 4], ids[1, 2] = red, blue
    uncertainty = torch.rand(2, 9, generator=rng).where(mask, 0.0)
    attention = torch.rand(2, 9, 3, generator=rng)
    rollout = model_utils.Rollout(None, ids, mask, None, uncertainty, attention)
    prompt = SimpleNamespace(sample=SimpleNamespace(crucial_frame=1, id="x:1"))
    group = appo.Group(3, prompt, rollout, crucial=tensor([1, 0, 1]) == 1)
    true, none = [replace(group, crucial=tensor(frames) == 1) for frames in ([0, 1, 0], [0] * 3)]
    logits = torch.randn(2, 9, 5, generator=rng)
    s = appo.Settings.of("appo", k3=4, model=str(toy / "model"))

    def weigh(control, group=group):
        return control(group, logits, s)

    def equal_weights(frames):
        """2.7 on the 4 tokens of a response that attend most to each of the frames."""
        weights = torch.ones(2, 9)
        for i, frame in itertools.product(range(2), frames):
            weights[i, highest(attention[i, mask[i], frame].tolist(), 4)] = 2.7
        return weights

    weights, equal = weigh(appo.weigh_tokens), equal_weights([0, 2])
    most = uncertainty[equal > 1].max()
    for control, expected in (
            (evaluate.oracle, torch.where(ids == other, 1.0, 2.7)),
            (evaluate.mean_one, weights / weights[mask].mean()), (evaluate.equal, equal),
            (evaluate.entropy, 1 + (equal - 1) * uncertainty / most),
            (partial(evaluate.true_frame, evaluate.equal), equal_weights([1])),
            (partial(evaluate.true_frame, appo.weigh_tokens), weigh(appo.weigh_tokens, true))):
        torch.testing.assert_close(weigh(control), expected)
    for control in evaluate.equal, evaluate.entropy:
        assert (weigh(control, none) == 1).all()
    shuffled = weigh(evaluate.shuffled)
    assert (shuffled[~mask] == 1).all() and not shuffled.equal(weights)
    assert shuffled.sort(1).values.equal(weights.sort(1).values)
    assert not weigh(evaluate.shuffled, replace(group, position=4)).equal(shuffled)
    prompt.sample.crucial_frame = None
    with pytest.raises(model_utils.RunError, match="x:1: lacks"):
        weigh(partial(evaluate.true_frame, evaluate.equal))


def test_study_table_by_hand():
    """To the mean of both runs of the first arm; the row of the second is the null."""
    figures = {arm: {name: np.full((3, 2), value) for name in ("accuracy, after", "training")}
               for arm, value in (("dapo", 0.5), ("dapo:again", 0.7), ("appo", 0.9))}
    rows = evaluate.study_table(figures)
    assert list(rows[0]) == ["arm", "accuracy, after", "training", "training - dapo",
                             "accuracy, after - dapo"]
    assert [row["training - dapo"][:6] for row in rows] == ["+0.000", "+0.200", "+0.300"]
    assert rows[2]["training"] == rows[2]["accuracy, after"] == "0.900 (0.900 to 0.900)"
    row, = evaluate.study_table({"appo": figures["appo"]})
    assert row["training - appo"].startswith("+0.000")


def test_signal_to_noise_of_a_model_with_two_parameters():
    """Two coins, each with one logit; the first is rewarded. At logit 0 the gradient of a group is
    1/2 for the first, however it falls, and 1/2 or -1/2 for the second: noise. So |mean|^2 = 1/4,
    the variances sum up to 1/4, and a weight of w on the first coin makes the ratio w^2."""
    arms = []
    for weight in (1.0, 2.7):
        gradients = []
        for first, second in itertools.product((1.0, -1.0), repeat=2):      # which side is up
            logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            log_p = torch.nn.functional.logsigmoid(logits * tensor([first, second]))
            objective = (first * tensor([weight, 1.0]) * log_p).sum()
            gradients += torch.autograd.grad(objective, logits)
        arms.append(torch.stack(gradients * 5000))
    gradients = torch.stack(arms, 1)                                        # (groups, arms, 2)
    few = gradients[:5]
    # The estimate of |mean|^2 is the mean over all pairs of different groups.
    signal = sum((a * b).sum(1) for a, b in itertools.permutations(few, 2)) / 20
    for g, expected in ((gradients, tensor([1.0, 2.7 ** 2])),
                        (few, signal / (few.square().sum((0, 2)) / 5 - signal))):
        ratio = evaluate.signal_to_noise(g.sum(0), g.square().sum(0), len(g))
        assert_close(ratio, expected, rtol=1e-3)


def test_study_and_curves_commands(toy, tmp_path, capsys):
    """Arms share model and prompts, runs and dapo:again sample anew, what has finished stays."""
    few_questions(toy, tmp_path / "test.json", 8)
    folder, oracle = tmp_path / "study", "appo:k1=2:oracle"
    rest = (f"--steps 2 --prompts_per_step 2 --learning_rate 1e-2 --model {toy}/model "
            f"--data {toy}/train.json --eval_data {tmp_path}/test.json").split()
    command = f"study --output {folder} --processes 1 --seeds 1 {' '.join(rest)} --arms"
    assert "--k9" in refusal(capsys, f"{command} appo:k9=2")
    assert "dapo:oracle" in refusal(capsys, f"{command} dapo:oracle")
    text = measure(capsys, f"{command} dapo,dapo:again,{oracle} --rollout_seeds 2")
    figures = json.loads((folder / "study.json").read_text())["arms"]
    homes = {(arm, n): folder / "seed-0" / f"{arm}-{n}" for arm in figures for n in range(2)}
    logs = {run: json_lines(home / "metrics.jsonl") for run, home in homes.items()}
    first = {run: log[0]["entropy"] for run, log in logs.items()}
    assert [first[oracle, n] for n in range(2)] == [first["dapo", n] for n in range(2)]
    assert len(set(first.values())) == 4                                   # of dapo and its again
    held_out = {run: json_lines(home / "held_out.jsonl") for run, home in homes.items()}
    assert len({log[0]["accuracy"] for log in held_out.values()}) == 1     # the same start
    assert len({log[-1]["topk"] for log in held_out.values()}) > 1         # learned differently
    for (arm, n), log in logs.items():
        before, *_, after = held_out[arm, n]
        expected = {"training": np.mean([step["accuracy"] for step in log]),
                    "accuracy, before": before["accuracy"], "accuracy, after": after["accuracy"],
                    "topk, before": before["topk"], "topk, after": after["topk"],
                    "W, colour": 2.7 if arm == oracle else 1.0, "W, rest": 1.0}
        of_run = {name: values[0][n] for name, values in figures[arm].items()}
        found = of_run.pop("true frame crucial")
        assert of_run == pytest.approx(expected) and arm in text
        assert arm == oracle or found == 0                                 # DAPO has no frames
    home = homes[oracle, 1]
    true = {sample.id: sample.crucial_frame for sample in data.load_samples(toy / "train.json")}
    hits = [true[group["id"]] in group["crucial_frames"]
            for group in json_lines(home / "samples.jsonl")]
    assert found == np.mean(hits)
    settings = json.loads((home / "config.json").read_text())["settings"]
    assert (settings["k1"], settings["alpha"], settings["seed"]) == (2, 1.7, 0)

    def train_again(*changes):
        """The runs that are trained again."""
        def times():
            return {run: (home / "metrics.jsonl").stat().st_mtime_ns
                    for run, home in homes.items()}

        before = times()
        for arm, n in homes:
            evaluate.train_arm(*evaluate.arm_settings(arm, 0, n, str(folder), [*rest, *changes]))
        return [run for run, time in times().items() if time != before[run]]

    with pytest.raises(model_utils.RunError, match="other options"):
        train_again("--group_size=4")
    shutil.rmtree(homes["dapo", 0] / "checkpoint")                         # as if it was stopped
    assert train_again() == [("dapo", 0)]
    again = json_lines(homes["dapo", 0] / "metrics.jsonl")
    assert [step["loss"] for step in again] == [step["loss"] for step in logs["dapo", 0]]
    runs = " ".join(map(str, homes.values()))
    assert "drawn" in measure(capsys, f"curves {runs} {toy} --output {tmp_path}/new/c.png")
    assert "give a name" in refusal(capsys, f"curves {runs} --output {tmp_path}/x.doc")
    for picture in (tmp_path / "new/c.png", folder / "study.png"):
        assert picture.stat().st_size > 10_000


def test_signal_to_noise_command(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    arms = ["dapo", "appo:alpha=1e-9", "appo", "grpo", "papo_d"]
    command = f"study --output {tmp_path} --seeds 1 --snr 6 --model {toy}/model --group_size 4"
    text = measure(capsys, f"{command} --data {toy}/train.json --arms {','.join(arms)}")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[-len(arms):]}
    assert list(rows) == arms
    assert rows["dapo"] == "1.000 (1.000 to 1.000) 1.000 (1.000 to 1.000)".split()
    assert rows["appo:alpha=1e-9"] == rows["dapo"]      # its weights are 1
    assert rows["appo"] != rows["dapo"]
    assert not list(tmp_path.glob("seed-*/*/metrics.jsonl"))               # nothing is trained
    few_questions(toy, tmp_path / "few.json", 2)
    line = refusal(capsys, f"{command} --data {tmp_path}/few.json")
    assert "few.json" in line and "lower --snr" in line


# ---- the other commands

def test_score_continues_where_it_stopped(toy, tmp_path, capsys):
    """The same records as without the stop; broken and missing videos are left out and named."""
    annotation, a, b, broken = [tmp_path / name for name in ("some.json", "a", "b", "broken.avi")]
    records = few_questions(toy, annotation, 6)
    broken.write_bytes(b"no video")
    records[3]["path"], records[5]["path"] = str(broken), "missing.avi"
    annotation.write_text(json.dumps(records))
    model = shutil.copytree(toy / "model", tmp_path / "model")
    command = (f"score --model {model} --data {annotation} --readers 1 --rollout_groups 2 "
               f"--output {a} --skip_missing")
    text = measure(capsys, command)
    assert "broken.avi" in text and "missing.avi" in text and "skipped 2 of 6" in text
    responses, summary = a / "responses.jsonl", json.loads((a / "summary.json").read_text())
    whole, lines = json_lines(responses), responses.read_text()
    samples = {sample.id: sample for sample in data.load_samples(annotation)}
    assert samples.keys() - {record["id"] for record in whole} == {"some.json:3", "some.json:5"}
    assert {record["id"] for record in summary["skipped"]} == {"some.json:3", "some.json:5"}
    for record in whole:
        expected = data.score_response(record["response"], samples[record["id"]])
        assert expected.items() <= record.items()
    accuracy = np.array([record["accuracy"] for record in whole])
    assert summary["results"]["all"].items() >= dict(n=4, accuracy=accuracy.mean()).items()
    assert summary["prompt"] == whole[0]["prompt"] and summary["overall"] == "mean over questions"
    assert accuracy.any() and summary["seconds"] > 0
    assert summary["settings"]["decoding"] == evaluate.DECODING
    end = lines.index("\n", lines.index("\n") + 1)
    responses.write_text(lines[:end + 20])                          # killed while writing
    measure(capsys, command)
    for record, again in zip(whole, json_lines(responses), strict=True):
        assert record | {"seconds": 0} == again | {"seconds": 0}
    assert "other max_frames" in refusal(capsys, f"{command} --max_frames 8")
    shutil.copy(records[0]["path"], broken)                         # is tried again
    assert "skipped 1 of 6" in measure(capsys, f"{command} --rollout_groups 3")
    weights = load_file(model / "model.safetensors")                # trained anew
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "other weights" in refusal(capsys, command)
    annotation.write_text(json.dumps(records[:5]))
    assert "other questions" in refusal(capsys, command)
    (a / "summary.json").unlink()                   # nothing tells what the responses are to
    assert "cannot be continued" in refusal(capsys, command)
    b.mkdir()
    reversed_lines = [json.dumps(record | {"accuracy": 0.5}) + "\n" for record in whole[::-1]]
    (b / "responses.jsonl").write_text("".join(reversed_lines))
    text = measure(capsys, f"compare {a} {b}")
    accuracy = np.array([record["accuracy"] for record in json_lines(responses)[:4]])
    resampled = [np.mean(draws) for draws in itertools.product(0.5 - accuracy, repeat=4)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    expected = f"difference {0.5 - accuracy.mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f}"
    assert expected in text
    assert f"A {accuracy.mean():.3f}, B 0.500" in text and "4 common" in text


def test_commands_refuse_in_one_line(toy, tmp_path, capsys, monkeypatch):
    missing = tmp_path / "x.json"
    records = few_questions(toy, missing, 2)
    records[0]["path"] = "gone\x1b.avi"
    missing.write_text(json.dumps(records))
    for name, line in (("b", '{"id": "x", "question": "q", "accuracy": 1}'),
                       ("c", '{"accuracy": 1}'), ("d", '["accuracy"]')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "responses.jsonl").write_text(f"{line}\n")
    questions = f"--model {toy}/model --data {toy}/test.json"
    monkeypatch.chdir(tmp_path)
    table = f"""
         -> required
        nothing -> invalid choice
        score {questions} --model none -> no usable model
        score {questions} --colour red -> --colour
        score {questions} --max_frames 0 -> --max_frames
        score {questions} --data none.json -> cannot be read
        score --data none.json --toy_folder toy -> cannot be read
        score {questions} --data x.json -> --skip_missing
        compare c b -> damaged
        compare b d -> damaged
        compare a b -> no such file
        compare b -> required
        curves b -> no run
        curves b --smooth 0 -> above 0
        attention {questions} --sample 999 -> no such record
        throughput --new_tokens 8,0 -> above 0
        study --snr 1 -> above 1
        throughput --algorithms ppo -> ppo
        throughput --max_frames 3 -> unrecognized
        decouple {questions} -> --perception
        decouple {questions} --perception {toy}/model --reasoning b -> give a model folder"""
    for line in table.strip("\n").split("\n"):
        command, word = line.split(" -> ")
        assert word in refusal(capsys, command), command
    assert not (tmp_path / "toy").exists()              # the data are looked at before a model
    with pytest.raises(model_utils.RunError, match="give a model folder"):
        evaluate.random_model("b")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refusal(capsys, f"score {questions}")


def test_attention_and_focus_commands(toy, tmp_path, capsys):
    """The picture marks crucial frames, whatever the algorithm; the table adds up."""
    few_questions(toy, tmp_path / "x.json", 8)
    common = f"--model {toy}/model --data {tmp_path}/x.json --readers 1"
    measure(capsys, f"attention {common} --sample 1 --model2 {toy}/model --algorithm dapo "
                    f"--output {tmp_path}/a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255
    assert ((pixels.round() == [214, 39, 40]).all(-1)).sum() > 100         # the colour tab:red
    text = measure(capsys, f"focus {common} --output {tmp_path}/f.json")
    table = json.loads((tmp_path / "f.json").read_text())
    count = sum(table["samples"].values())
    assert count > 0 and count + table["left_out"] == 8 and f"{count} of 8" in text
    assert sum(table["percent"].values()) == pytest.approx(100) and "20.1" in text
    # all are correct
    assert "--group_size" in refusal(capsys, f"focus {common} --threshold 0 --max_new_tokens 1")


def test_decouple_command(toy, tmp_path, capsys):
    """The describer does not know the question; the text model does not see the video."""
    records = few_questions(toy, tmp_path / "x.json", 3)
    text_model = tmp_path / "text"
    _, tokenizer = evaluate.load_model(str(toy / "model"))
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, initializer_range=1.0,
        eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(text_model)
    tokenizer.save_pretrained(text_model)
    describe = data.Sample("", evaluate.DESCRIBE, [], "A", "description")
    assert data.prompt_text(describe, None) == evaluate.DESCRIBE
    text = measure(capsys, f"decouple --data {tmp_path}/x.json --readers 1 --max_new_tokens 8 "
                           f"--perception {toy}/model --reasoning {text_model},{text_model} "
                           f"--output {tmp_path}/d.jsonl")
    lines = json_lines(tmp_path / "d.jsonl")
    assert len(lines) == 2 * len(records) and "3 of 3" in text
    assert lines[:3] == lines[3:]
    # the questions about a video differ, its description does not
    assert records[0]["path"] == records[1]["path"] and records[0] != records[1]
    assert lines[0]["description"] == lines[1]["description"]
    assert len({line["response"] for line in lines}) > 1


# ---- the plain way

def generate(plain, prompt, encoded, group_size=1, **options):
    """transformers' own `generate`, with our positions."""
    ids = prompt.input_ids.expand(group_size, -1)
    return plain.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
        pixel_values_videos=prompt.patches.repeat(group_size, 1),
        video_grid_thw=torch.tensor(prompt.video_grids * group_size),
        position_ids=encoded.positions[:, None].expand(3, *ids.shape), **options)


def test_plain_way_gives_our_numbers(toy):
    """Log-probabilities, frame attention and gradients of APPO, against transformers only."""
    model, tokenizer = evaluate.load_model(str(toy / "model"))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(toy / "model")
    outcomes = itertools.cycle([(1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
    s = appo.Settings.of("appo", k1=4, k2=2, k3=6, group_size=4, max_new_tokens=36, seed=1,
                         prompts_per_step=2, max_grad_norm=1e9, gradient_checkpointing=False)
    run = appo.set_up(s, model, tokenizer, reward=lambda response, sample: next(outcomes))
    run.optimizer = torch.optim.SGD(run.policy.parameters(), lr=1.0)       # step = -gradient
    groups = appo.sample_groups(run, dict(enumerate(toy_prompts(toy, tokenizer, range(2)))))
    for group in groups:
        appo.score_group(run, group)
    before = [p.full_tensor().clone() for p in run.policy.parameters()]
    appo.update(run, groups)
    plain_run = appo.Run(s, plain, tokenizer)
    for group in groups:
        log_probs, frame_attention = evaluate.plain_step(plain_run, group, scale=0.5)
        assert (group.token_weights > 1).any()
        assert_close(log_probs, group.old_log_probs, rtol=0, atol=1e-5)
        assert_close(frame_attention, group.rollout.frame_attention, rtol=0, atol=1e-6)
    gradients = [p.grad for p in plain.model.language_model.parameters()]
    largest = max(gradient.abs().max() for gradient in gradients)
    for p, old, gradient in zip(run.policy.parameters(), before, gradients, strict=True):
        assert_close((old - p.full_tensor()).detach(), gradient, rtol=0, atol=3e-5 * largest)


def test_readme_snippet_gives_our_weights(toy):
    """Responses of transformers' `generate`: W of the README's code for other trainers equals W of
    the attention and the logits that `generate` returned."""
    text = Path(evaluate.__file__).with_name("README.md").read_text()
    snippet, = re.findall(r"```python\n(# appo in another trainer\n.*?)```", text, re.DOTALL)
    model, tokenizer = evaluate.load_model(str(toy / "model"))
    plain = plain_twin(model, "eager")
    prompt, = toy_prompts(toy, tokenizer, [0])
    encoded, = model_utils.encode_prompts(model, [prompt])
    excluded = model_utils.excluded_token_ids(model)
    torch.manual_seed(0)
    output = generate(
        plain, prompt, encoded, group_size=8, max_new_tokens=36, do_sample=True, top_k=0,
        eos_token_id=tokenizer.eos_token_id, suppress_tokens=excluded.tolist(),
        output_attentions=True, output_logits=True)
    ids = output.sequences[:, len(prompt.input_ids):]                           # (G, R)
    ends = ids == tokenizer.eos_token_id
    mask = ends.cumsum(1) - ends.long() == 0                                    # the end token too
    responses = [row[real].tolist() for row, real in zip(ids, mask)]
    visual = data.read_visual(prompt.sample, fps=1, max_frames=16, min_pixels=3136, max_pixels=3136)
    names = dict(sample=prompt.sample, visual=visual, tokenizer=tokenizer, responses=responses,
                 model=plain_twin(model, "sdpa"))
    exec(snippet, names)

    attention = model_utils.pool_attention(output.attentions, prompt.frame_of_token)    # (G, R, F)
    logits = torch.stack(output.logits, 1).index_fill(-1, excluded, -INF)               # (G, R, V)
    texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    accuracy = torch.tensor([data.accuracy_reward(text, prompt.sample) for text in texts])
    crucial = appo.crucial_frames(attention, mask, accuracy)
    weights = appo.perception_token_weights(attention, logits, mask, crucial)
    assert 0 < accuracy.sum() < 8 and weights.max() > 1.5 and len(set(texts)) > 2
    assert_close(names["attention"], attention * mask[:, :, None], rtol=0, atol=1e-6)
    assert names["crucial"].equal(crucial)
    assert_close(names["weights"], weights, rtol=0, atol=1e-5)
    assert names["token_advantages"].shape == ids.shape


def test_throughput_command(toy, tmp_path, capsys):
    """Every figure is in the file and adds up; times themselves are not judged."""
    ballast = np.ones(2 ** 27)          # 1 GB, which must not count as the steps' memory
    text = measure(capsys, f"throughput --model {toy}/model --frames 4 --group 4 --new_tokens 5 "
                           "--prompts 2 --repetitions 2 --algorithms appo --against_plain "
                           f"--gradient_checkpointing --output {tmp_path}/t.json")
    ours, plain = json.loads((tmp_path / "t.json").read_text())["5 tokens"].values()
    assert max(plain["difference"]) < 1e-5
    for figures in ours, plain:
        phases = np.sum([figures[phase] for phase in evaluate.PHASES], axis=0)
        assert figures["step"] == pytest.approx(phases) and len(phases) == 2
        assert min(figures["rollout"] + figures["weights"] + figures["update"]) > 0
        if Path("/proc/self/status").exists():
            assert 0.1 < figures["GB"][0] < 1 < ballast.nbytes / 1e9
    for values in plain["step"], np.divide(ours["step"], plain["step"]):
        assert f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" in text
    for difference in 2.0, NAN:
        plain["difference"][0] = difference
        with pytest.raises(model_utils.RunError, match="more than rounding"):
            evaluate.print_throughput("5 tokens", {"appo": ours, evaluate.PLAIN: plain})


DECORD2 = os.environ.get("APPO_DECORD2")


# ------------------------------------------------------------------------------------ checkpoints

def shrunk_model(folder, name, prefixes):
    """A released model's files with fewer and smaller layers, and random weights, whose names begin
    as given -> the weights."""
    shutil.copytree(SHARED / "models" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    small = dict(hidden_size=64, intermediate_size=96)
    config["vision_config"] |= small | dict(depth=2, num_heads=2, out_hidden_size=64,
                                            fullatt_block_indexes=[1])
    # Newer configurations repeat the language model's settings in a part for it.
    for part in config, config.get("text_config", {}):
        part |= small | dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                             layer_types=["full_attention"] * 4)
        part.setdefault("rope_scaling", {})["mrope_section"] = [2, 3, 3]
    (folder / "config.json").unlink()   # the copy may be read-only
    (folder / "config.json").write_text(json.dumps(config))
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).float()
    weights = {}
    for weight_name, weight in model.state_dict().items():
        for prefix, released in prefixes.items():
            weight_name = weight_name.replace(prefix, released)
        weights[weight_name] = weight
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@needs_shared
@pytest.mark.parametrize("name, prefixes", [
    ("qwen2.5-vl-3b", {"model.language_model.": "model.", "model.visual.": "visual."}),
    ("qwen2.5-vl-7b", {})])
def test_a_checkpoint_has_the_files_and_names_of_its_source(toy, tmp_path, name, prefixes):
    """A step on real clips, with the real tokenizer. All rewards are 0, so only the perception loss
    has a gradient."""
    source = tmp_path / "source"
    weights = shrunk_model(source, name, prefixes)
    s = settings_of(toy, model=str(source), data=str(SHARED / "data" / "clips_video_r1.json"),
                    video_root=str(SHARED / "videos"), output=str(tmp_path / "run"), steps=1,
                    max_new_tokens=6, max_frames=4, prompts_per_step=3, gamma=0.01)
    appo.train(s)
    record, = log_of(s)
    assert record["entropy"] > 11 and record["rollout_logprob_gap"] < 1e-4 < record["grad_norm"]
    output = tmp_path / "run" / "checkpoint"
    assert_ordinary(output, source, 8)
    trained = checkpoint_of(s)
    assert trained.keys() == weights.keys()
    changed = {name for name in weights if not torch.equal(weights[name], trained[name])}
    assert changed and not any("visual" in name for name in changed)


# --------------------------------------------------------------------------------- other machines

READ_CLIPS = """
import sys, zlib, decord, torch, data
for path in sys.argv[1:]:
    frames, *_ = data.sample_frames(path, 1, 8)
    print(zlib.crc32(torch.stack(list(frames)).numpy()))
print(decord.__file__)
"""


@needs_shared
@pytest.mark.skipif(not DECORD2, reason="set APPO_DECORD2 to a folder that was made by "
                                        "pip install --no-deps --target FOLDER decord2")
def test_decord2_reads_the_same_frames():
    """In processes of their own: both are called decord."""
    names = ["frog.webm", "mma_demo.mp4", "mma_test.avi", "nasa.mp4", "pancake_h264.mkv"]
    clips, frames = [str(SHARED / "videos" / name) for name in names], []
    for folder in "", DECORD2:
        path = os.pathsep.join([folder, str(Path(data.__file__).parent)])
        output = subprocess.check_output([sys.executable, "-c", READ_CLIPS, *clips], text=True,
                                         env=os.environ | {"PYTHONPATH": path})
        *checksums, module = output.split()
        assert module.startswith(folder)
        frames.append(checksums)
    assert frames[0] == frames[1]


# =============================================================== the path of a GPU, without a GPU

CUDA = torch.device("cuda", 0)
# For these, and to index by a bool tensor, the host waits for a GPU, so a graph cannot hold them.
WAITS = ["item", "tolist", "nonzero", "unique", "equal", "masked_select", "__bool__", "__int__"]


class GPUTensor(Tensor):
    """A tensor that computes on the CPU and says it is on a GPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)

    def __deepcopy__(self, memo):
        new = torch.nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo.setdefault(id(self), new)

    def full_tensor(self):
        return self         # as if it was sharded


def tensors_of(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def bmm_in_fp32(a, b):
    """A CPU has no kernel for a product that is not rounded to bf16."""
    return torch.bmm(a.float(), b.float())


class PretendGPU(TorchFunctionMode):
    """What is made on a GPU or computed from it is a GPUTensor. Mixed devices are an error, and so
    is what makes the host wait while a graph is recorded."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        name, options, moves = function.__name__, dict(options or {}), False
        inputs = tensors_of((arguments, options))
        on_gpu = any(type(x) is GPUTensor for x in inputs)
        indexing, recording = name in ("__getitem__", "__setitem__"), PretendGraph.recording
        mixed = on_gpu and any(type(x) is not GPUTensor and x.dim() > 0 for x in inputs)
        if indexing and type(arguments[0]) is GPUTensor and not recording:
            mixed = False       # indices may come from the host
        if mixed and name != "_has_compatible_shallow_copy_type":       # which moves a module
            raise RuntimeError(f"{name}: all tensors must be on the same device")
        if name == "cpu":
            name, function, arguments = "to", Tensor.to, (*arguments, "cpu")
        if name == "to":
            x = arguments[0]
            device, dtype, *_ = torch._C._nn._parse_to(*arguments[1:], **options)
            moves = device not in (None, x.device)
            on_gpu = on_gpu != moves
            x = (x.detach().clone() if moves else x).as_subclass(Tensor)
            arguments, options = (x, dtype or x.dtype), {}
        elif options.pop("device", None) == CUDA:
            on_gpu, moves = True, name in ("tensor", "as_tensor")
        if options.pop("out_dtype", None):
            function = bmm_in_fp32
        by_mask = indexing and any(x.dtype == torch.bool for x in tensors_of(arguments[1]))
        if recording and (moves or by_mask or name in WAITS):
            raise RuntimeError(f"{name}: not permitted while a graph is recorded")
        call = partial(function, *arguments, **options)
        result = call()
        if on_gpu:
            result = tree_map_only(
                Tensor, lambda x: x if type(x) is GPUTensor else x.as_subclass(GPUTensor), result)
        if recording:
            recording.calls.append((call, result))
        return result


class PretendGraph:
    """A CUDA graph: it replays the recorded calls at their addresses.

    Recording computes already, and the first replay nothing; on a GPU it is the other way round.
    """
    recording = None
    recorded = 0

    def __init__(self):
        self.calls, self.replays = [], 0

    @contextmanager
    def record(self, capture_error_mode):
        PretendGraph.recording = self
        PretendGraph.recorded += 1
        yield
        PretendGraph.recording = None

    def replay(self):
        self.replays += 1
        with torch._C.DisableTorchFunction():
            for call, outputs in self.calls if self.replays > 1 else []:
                for output, result in zip(tensors_of(outputs), tensors_of(call())):
                    if output.data_ptr() != result.data_ptr():
                        output.copy_(result)


@pytest.fixture()
def gpu(monkeypatch):
    """(the tiny model in bf16 on the pretended GPU, its tokenizer)"""
    model_utils.init_processes()
    for name, replacement in {
            "torch.__future__._swap_module_params_on_conversion": True,
            "torch.cuda.CUDAGraph": PretendGraph, "torch.cuda.graph": PretendGraph.record,
            "torch.cuda.synchronize": lambda: None, "model_utils.BLOCK": 8,
            # FSDP wants true devices; it computes in bf16, too.
            "model_utils.shard": lambda policy, *_: policy.bfloat16(),
            # torch makes its own mask on a true device
            "torch.nn.attention.bias.causal_lower_right": lambda Q, K: torch.ones(
                Q, K, dtype=torch.bool).tril(K - Q).as_subclass(GPUTensor)}.items():
        monkeypatch.setattr(name, replacement)
    # The mode is off while checkpoints are recomputed.
    monkeypatch.setitem(torch.utils.checkpoint._allowed_determinism_checks_to_fns, "default",
                        torch.numel)
    monkeypatch.setattr(PretendGraph, "recording", None)
    monkeypatch.setattr(PretendGraph, "recorded", 0)
    model, tokenizer = model_utils.tiny_model(data.toy_vocabulary())
    with PretendGPU():
        model = model.requires_grad_(False).bfloat16().to(CUDA)
        yield model_utils.prepare_model(model), tokenizer


def either(text, sample):
    """(reward, accuracy, format) of a response that is correct or not by its check sum."""
    correct = float(zlib.crc32(text.encode()) % 2)
    return 0.9 * correct + 0.1, correct, 1.0


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_graph_replays_what_eager_decoding_computes(gpu, evaluating):
    """Recording finds what a graph cannot hold, replaying what changes its address."""
    model, tokenizer = gpu
    prompts = built_in_prompts(tokenizer, range(3))
    encoded = model_utils.encode_prompts(model, list(prompts.values()))
    vocabulary = model.config.text_config.vocab_size
    choose = evaluate.evaluation_decoding(encoded, vocabulary) if evaluating else None
    uniforms = torch.rand(3, 4, 18, dtype=torch.float64)
    eager, replayed = [
        model_utils.rollout(model, encoded, uniforms, attention_layers=2, choose=choose,
                            cuda_graph=cuda_graph) for cuda_graph in (False, True)]
    assert PretendGraph.recorded == 3       # of blocks of 8, 8 and 2 tokens
    for expected, rollout in zip(eager, replayed, strict=True):
        for name in "response_ids", "response_mask", "log_probs", "entropy", "frame_attention":
            assert torch.equal(getattr(rollout, name), getattr(expected, name)), name


@pytest.mark.parametrize("algorithm", list(appo.PRESETS))
def test_a_training_step_on_a_gpu(gpu, algorithm):
    model, tokenizer = gpu
    options = dict(prompts_per_step=2, group_size=4, max_new_tokens=8, updates_per_batch=1,
                   learning_rate=1e-4, gradient_checkpointing=True, cuda_graph=True)
    s = appo.Settings.of(algorithm, **appo.TINY | options)
    run = appo.set_up(s, model, tokenizer, reward=either)
    before = model.lm_head.weight.clone()
    prompts = built_in_prompts(tokenizer, range(2))
    metrics, groups, _ = appo.training_step(run, iter([(prompts, [])]))
    assert 0 < metrics["grad_norm"] < 100 and metrics["rollout_logprob_gap"] < 0.1
    assert PretendGraph.recorded > 0 and not torch.equal(model.lm_head.weight, before)
    for rollout in [group.rollout for group in groups]:
        attention = model_utils.frame_attention(
            run.policy, rollout.encoded, rollout.response_ids, rollout.response_mask, layers=2)
        difference = attention - rollout.frame_attention        # which is read for APPO only
        assert attention.device == CUDA
        assert not s.alpha or difference.abs().max() < 0.05 * attention.max()
    dummy = model_utils.dummy_rollout(model)
    log_probs, _ = run.policy(dummy.encoded, dummy.response_ids, dummy.response_mask)
    assert log_probs.isfinite().all()


def sharded_step():
    """A training step in each of several processes, with a GPU's precision, optimizer and
    clipping."""
    rank, *_ = model_utils.init_processes()
    model_utils.compute_type = lambda device: torch.bfloat16
    clip, adamw = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW
    torch.nn.utils.clip_grad_norm_ = partial(clip, foreach=True)
    torch.optim.AdamW = lambda *weights, **options: adamw(*weights, **options | {"fused": True})
    model, tokenizer = model_utils.tiny_model(data.toy_vocabulary())
    s = appo.Settings.of("appo", **appo.TINY | dict(prompts_per_step=2, max_new_tokens=6))
    run = appo.set_up(s, model.requires_grad_(False), tokenizer, reward=either)
    before = weights_of(run)
    metrics, *_ = appo.training_step(run, iter([(built_in_prompts(tokenizer, [rank]), [])]))
    assert 0 < metrics["grad_norm"] < 100 and metrics["rollout_logprob_gap"] < 0.1
    assert not torch.equal(weights_of(run), before)
    results = metrics["grad_norm"], zlib.crc32(weights_of(run).numpy())
    first, second = model_utils.all_gather(results)
    assert first == second


def test_sharding_with_the_precision_of_a_gpu():
    in_processes(2, sharded_step)
