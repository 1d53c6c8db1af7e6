"""Every formula against a slow oracle, every equality that the README claims, every fault with real files and processes.

Small real models on the CPU, deterministic, no network. Tests on real clips and the real tokenizer look for them under
APPO_SHARED or ../shared and say so when they skip.
"""
import copy
import dataclasses
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

import appo
import data
import evaluate
import model_utils
from appo import (clipped_surrogate_loss, crucial_frames, group_advantages, perception_loss, perception_token_weights)
from data import DataError, Sample, VideoError

torch.set_num_threads(1)  # these models are too small for more
SHARED = Path(os.environ.get("APPO_SHARED", Path(__file__).resolve().parent.parent / "shared"))
needs_shared = pytest.mark.skipif(not (SHARED / "videos").is_dir(), reason=f"no clips in {SHARED}; set APPO_SHARED")


# ============================================================================ the pure functions of appo.py

LN2, INF, NAN = math.log(2), math.inf, math.nan


# ---------------------------------------------------------------- oracles

def oracle_advantages(rewards, eps=1e-4):
    n, mean = len(rewards), sum(rewards) / len(rewards)
    if n == 1:
        return [0.0]
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1))
    return [(r - mean) / (std + eps) for r in rewards]


def top(values, k):
    """Indices of the k highest values, in the order of their positions."""
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:k])


def oracle_crucial(attention, lengths, accuracy, k1=15, k2=3, threshold=0.5, strategy="soft"):
    frames = len(attention[0][0])
    right, wrong = set(), set()                                             # psi(S1), psi(S2)
    for i, length in enumerate(lengths):
        score = []                                                          # Attn(o_i, f)
        for f in range(frames):
            best = sorted((attention[i][t][f] for t in range(length)), reverse=True)[:k1]
            score.append(sum(best) / len(best))
        (right if accuracy[i] >= threshold else wrong).update(top(score, k2))
    chosen = {"soft": right, "hard": right - wrong, "all": right | wrong}[strategy]
    return [f in chosen for f in range(frames)]


def softmax(row):
    exps = [math.exp(x - max(row)) for x in row]
    return [e / sum(exps) for e in exps]


def divergence(rows):
    """D = sum_i KL(p_i || mean_i p_i)."""
    mean = [sum(column) / len(rows) for column in zip(*rows)]
    return sum(p * math.log(p / m) for row in rows for p, m in zip(row, mean) if p > 0)


def oracle_weights(attention, logits, lengths, crucial, k3=64, alpha=1.7):
    """Returns the weights and the raw divergences D_j of all frames."""
    group, width = len(logits), len(logits[0])
    probs = [[softmax(logits[i][t]) for t in range(lengths[i])] for i in range(group)]
    received = [[[] for _ in range(width)] for _ in range(group)]
    raw = []
    for f, is_crucial in enumerate(crucial):
        if not is_crucial:
            continue
        chosen = [top([attention[i][t][f] for t in range(lengths[i])], k3) for i in range(group)]
        d = []
        for j in range(max(map(len, chosen))):
            d.append(divergence([probs[i][c[j]] for i, c in enumerate(chosen) if j < len(c)]))
        raw += d
        span = max(d) - min(d)
        for i, c in enumerate(chosen):
            for j, t in enumerate(c):
                received[i][t].append(0.0 if span < 1e-4 else (d[j] - min(d)) / span)
    return [[1 + alpha * sum(x) / len(x) if x else 1.0 for x in row] for row in received], raw


def average_of(values, average):
    """values: one list of token values per response."""
    if average == "tokens":
        return sum(sum(row) for row in values) / sum(len(row) for row in values)
    return sum(sum(row) / len(row) for row in values) / len(values)


def bounded(x, low, high):
    """Clamp of a scalar tensor; a constant (no gradient) outside."""
    return x if low <= x.item() <= high else torch.tensor(min(max(x.item(), low), high), dtype=x.dtype)


def oracle_surrogate(new, old, advantages, lengths, weights=None, clip_low=0.2, clip_high=0.28, ref=None,
                     kl_coef=0.0, average="tokens"):
    gains, kls, moved, clipped = [], [], [], []
    for i, length in enumerate(lengths):
        gains.append([]), kls.append([]), moved.append([]), clipped.append([])
        for t in range(length):
            log_ratio = bounded(new[i, t] - old[i, t], -20, 20)
            rho, a = torch.exp(log_ratio), float(advantages[i])
            wa = a * (1.0 if weights is None else float(weights[i, t]))
            plain, limited = rho * wa, bounded(rho, 1 - clip_low, 1 + clip_high) * wa
            gains[i].append(plain if plain <= limited else limited)
            if ref is not None:
                d = bounded(ref[i, t] - new[i, t], -20, 20)
                kls[i].append(torch.exp(d) - d - 1)
            moved[i].append((rho - 1 - log_ratio).item())
            clipped[i].append(float(rho > 1 + clip_high if a > 0 else rho < 1 - clip_low) if a else 0.0)
    loss = -average_of(gains, average)
    if ref is not None:
        loss = loss + kl_coef * average_of(kls, average)
    return loss, average_of(moved, "tokens"), average_of(clipped, "tokens")


def oracle_perception(new, masked, lengths, gamma, eta=0.0, masked_eta=0.0, average="tokens"):
    k3, entropy, masked_entropy = [], [], []
    for i, length in enumerate(lengths):
        d = [bounded(masked[i, t].detach() - new[i, t], -20, 20) for t in range(length)]
        k3.append([bounded(torch.exp(x) - x - 1, -10, 10) for x in d])
        entropy.append([-new[i, t] for t in range(length)])
        masked_entropy.append([-masked[i, t].detach() for t in range(length)])
    return (-gamma * average_of(k3, average) + eta * average_of(entropy, average)
            + masked_eta * average_of(masked_entropy, average))


# ---------------------------------------------------------------- random groups

class Group:
    """A random group; the padding holds large rubbish."""

    def __init__(self, seed, group=None, width=None, lengths=None):
        self.g = g = torch.Generator().manual_seed(seed)
        self.G, self.R = group or self.int(1, 8), width or self.int(1, 20)
        self.F, self.V = self.int(1, 10), self.int(2, 30)
        size = (self.G, self.R)
        kind = seed % 4                                       # any lengths, one token each, full, first one short
        self.lengths = lengths or [1 if kind == 1 or (kind == 3 and i == 0) else self.R if kind == 2 else
                                   self.int(1, self.R) for i in range(self.G)]
        self.mask = torch.arange(self.R) < torch.tensor(self.lengths)[:, None]
        self.attention = self.dirty(torch.rand(*size, self.F, generator=g) ** 3)
        logits = torch.randn(*size, self.V, generator=g) * (1e4 if seed % 5 == 4 else 2)
        excluded = torch.rand(*size, self.V, generator=g) < 0.25
        excluded[..., 0] = False
        self.logits = self.dirty(logits.masked_fill(excluded, -INF) if seed % 3 else logits)
        self.accuracy = [torch.randint(0, 2, (self.G,), generator=g).float(), torch.ones(self.G),
                         torch.zeros(self.G), torch.rand(self.G, generator=g)][seed // 4 % 4]
        self.crucial = torch.rand(self.F, generator=g) < 0.7
        self.advantages = torch.randn(self.G, generator=g).double()
        self.old = -2 * torch.rand(size, generator=g).double()
        self.new, self.ref, self.masked = (
            self.dirty(self.old + spread * torch.randn(size, generator=g).double()) for spread in (0.4, 0.5, 2.0))
        self.old = self.dirty(self.old)
        self.weights = self.dirty(1 + 1.7 * torch.rand(size, generator=g).double())

    def int(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.g))

    def dirty(self, x, rubbish=None):
        noise = 1e6 * torch.randn(x.shape, generator=self.g).to(x) if rubbish is None else torch.full_like(x, rubbish)
        return torch.where(self.mask.view(self.mask.shape + (1,) * (x.dim() - 2)), x, noise)


def close(a, b, rtol=1e-9, atol=1e-11):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- advantages

@pytest.mark.parametrize("rewards, expected", [
    ([0.0, 2e-4], [1 - 2 ** 0.5, 2 ** 0.5 - 1]),              # mean 1e-4, std sqrt(2)e-4: 1e-4 / (1 + sqrt 2)e-4
    ([0.0, 1.0, 2.0], [-1 / 1.0001, 0.0, 1 / 1.0001]),        # n - 1: std = sqrt(2 / 2) = 1
    ([0.7], [0.0])])
def test_advantages_by_hand(rewards, expected):
    close(group_advantages(torch.tensor(rewards)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_advantages(seed):
    c = Group(seed)
    rewards = torch.rand(c.G, generator=c.g).double()
    got = group_advantages(rewards)
    close(got, oracle_advantages(rewards.tolist()))
    close(group_advantages(rewards, eps=0.3), oracle_advantages(rewards.tolist(), 0.3))
    assert got.shape == (c.G,) and abs(float(got.sum())) < 1e-9
    order = torch.randperm(c.G, generator=c.g)
    close(group_advantages(rewards[order]), got[order])
    close(group_advantages(1000 * rewards, eps=0.1), got)                  # scaling acts through eps alone
    close(group_advantages(rewards + 5), got, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.9, 1.0, 1.1])
def test_equal_rewards_have_no_advantage(value):
    for size in range(1, 17):
        got = group_advantages(torch.full((size,), value))
        assert got.dtype == torch.float32 and torch.equal(got, torch.zeros(size))


# ---------------------------------------------------------------- crucial frames

# Two responses, three tokens, two frames; the last token of the second is padding.
HAND_ATTENTION = torch.tensor([[[.9, .1], [.1, .6], [.1, .6]], [[.3, .4], [.2, .05], [.9, .1]]])
HAND_MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize("accuracy, k1, k2, soft, hard, every", [
    # k1 = 1: o_1 has .9 > .6, psi = {0}; o_2 has .3 < .4, psi = {1}
    ([1., 0.], 1, 1, [1, 0], [1, 0], [1, 1]),
    # k1 = 2: o_1 has (.9 + .1) / 2 = .5 < .6, psi = {1}; o_2 has .25 > .225, psi = {0}
    ([1., 0.], 2, 1, [0, 1], [0, 1], [1, 1]),
    # k1 = 9, all there is: o_1 has 1.1 / 3 < 1.3 / 3; o_2 as before
    ([.5, .49], 9, 1, [0, 1], [0, 1], [1, 1]),                # an accuracy of exactly tau counts as right
    ([.5, .5], 1, 1, [1, 1], [1, 1], [1, 1]),                 # all right: S2 is empty
    ([0., 0.], 1, 1, [0, 0], [0, 0], [1, 1]),                 # all wrong: S1 is empty
    ([0., 1.], 1, 1, [0, 1], [0, 1], [1, 1]),
    ([1., 0.], 1, 2, [1, 1], [0, 0], [1, 1]),                 # every frame in both sets
    ([1., 0.], 1, 7, [1, 1], [0, 0], [1, 1])])                # k2 > F
def test_crucial_by_hand(accuracy, k1, k2, soft, hard, every):
    for strategy, expected in ("soft", soft), ("hard", hard), ("all", every):
        got = crucial_frames(HAND_ATTENTION, HAND_MASK, torch.tensor(accuracy), k1=k1, k2=k2, strategy=strategy)
        assert got.dtype == torch.bool and got.tolist() == [bool(x) for x in expected]


@pytest.mark.parametrize("strategy", ["soft", "hard", "all"])
@pytest.mark.parametrize("seed", range(48))
def test_crucial(seed, strategy):
    c = Group(seed)
    options = dict(k1=c.int(1, c.R + 3), k2=c.int(1, c.F + 2), threshold=c.int(1, 9) / 10, strategy=strategy)
    before = c.attention.clone()
    got = crucial_frames(c.attention, c.mask, c.accuracy, **options)
    assert got.tolist() == oracle_crucial(c.attention.tolist(), c.lengths, c.accuracy.tolist(), **options)
    assert torch.equal(before, c.attention)
    order = torch.randperm(c.G, generator=c.g)
    assert torch.equal(got, crucial_frames(c.attention[order], c.mask[order], c.accuracy[order], **options))
    for rubbish in -1e6, 1e6, NAN, INF:
        assert torch.equal(got, crucial_frames(c.dirty(c.attention, rubbish), c.mask, c.accuracy, **options))


@pytest.mark.parametrize("name, default, others", [
    ("k1", 15, [14, 16]), ("k2", 3, [2, 4]), ("threshold", 0.5, [0.4, 0.6]), ("strategy", "soft", ["hard", "all"])])
def test_crucial_defaults(name, default, others):
    told = set()
    for seed in range(40):
        c = Group(seed, group=3, width=20, lengths=[20, 18, 19])
        c.accuracy = torch.rand(3, generator=c.g)
        values = c.attention.tolist(), c.lengths, c.accuracy.tolist()
        got = crucial_frames(c.attention, c.mask, c.accuracy).tolist()
        assert got == oracle_crucial(*values, **{name: default})
        told |= {other for other in others if oracle_crucial(*values, **{name: other}) != got}
    assert told == set(others)                                # the groups do tell the default from its neighbours


# ---------------------------------------------------------------- token weights

A, B, H, C, E = [0., -INF], [-INF, 0.], [.5, .5], [math.log(.75), math.log(.25)], [math.log(.25), math.log(.75)]
WEIGHT_LOGITS = torch.tensor([[A, H, C, H], [B, H, E, H]])    # probabilities 1:0 0:1 .5:.5 .75:.25 .25:.75
WEIGHT_ATTENTION = torch.tensor([[[.2, .1], [.9, .2], [.5, .9], [.1, .3]], [[.9, .05], [.3, .7], [.6, .2], [.1, .4]]])


@pytest.mark.parametrize("lengths, crucial, expected", [
    # Frame 0 chooses tokens 0, 1, 2 of both: D = 2 ln 2 = 1.386294; 0; 2 (.75 ln 1.5 + .25 ln .5) = .261624;
    # normalised 1, 0, .188722; W = 1 + 1.7 * that.
    ([4, 4], [1, 0], [[2.7, 1, 1.320827, 1], [2.7, 1, 1.320827, 1]]),
    # Frame 1 chooses tokens 1, 2, 3: D = 0, .261624, 0; normalised 0, 1, 0.
    ([4, 4], [0, 1], [[1, 1, 2.7, 1], [1, 1, 2.7, 1]]),
    # Both: token 2 received .188722 and 1, average .594361; token 0 only ever 1.
    ([4, 4], [1, 1], [[2.7, 1, 2.010414, 1], [2.7, 1, 2.010414, 1]]),
    # The second response has two tokens: frame 0: D_3 has one member, so 0; frame 1: H C H against B H:
    # D_1 = H against B: mean (.25, .75): .5 ln 2 + .5 ln(2/3) + ln(4/3) = .431523,
    # D_2 = C against H: mean (.625, .375): .75 ln 1.2 + .25 ln(2/3) + .5 ln .8 + .5 ln(4/3) = .067645, D_3 = 0;
    # normalised 1, .156759, 0. o_1: token 1 (0 + 1) / 2, token 2 (0 + .156759) / 2; o_2: token 0 (1 + 1) / 2,
    # token 1 (0 + .156759) / 2.
    ([4, 2], [1, 1], [[2.7, 1.85, 1.133245, 1], [2.7, 1.133245, 1, 1]]),
    ([4, 4], [0, 0], [[1, 1, 1, 1], [1, 1, 1, 1]])])
def test_weights_by_hand(lengths, crucial, expected):
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    crucial = torch.tensor(crucial, dtype=torch.bool)
    got = perception_token_weights(WEIGHT_ATTENTION, WEIGHT_LOGITS, mask, crucial, k3=3)
    close(got, expected, rtol=0, atol=2e-6)
    assert torch.equal(got == 1, torch.tensor(expected) == 1)


@pytest.mark.parametrize("seed", range(60))
def test_weights(seed):
    c = Group(seed)
    k3, alpha = c.int(1, c.R + 3), c.int(1, 30) / 10
    kept = c.attention.clone(), c.logits.clone(), c.mask.clone(), c.crucial.clone()
    inputs = c.attention, c.logits.clone().requires_grad_(), c.mask, c.crucial
    got = perception_token_weights(*inputs, k3=k3, alpha=alpha)
    expected, raw = oracle_weights(c.attention.tolist(), c.logits.tolist(), c.lengths, c.crucial.tolist(), k3, alpha)
    assert got.dtype == torch.float32 and got.shape == (c.G, c.R) and not got.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs))            # nothing is changed in place
    close(got, expected, rtol=0, atol=1e-4)
    assert all(-1e-12 <= d <= c.G * math.log(c.G) + 1e-12 for d in raw)
    assert (got >= 1).all() and (got <= 1 + alpha * (1 + 1e-6)).all() and (got[~c.mask] == 1).all()
    chosen = torch.zeros(c.G, c.R, dtype=torch.bool)
    for i, length in enumerate(c.lengths):
        for f in c.crucial.nonzero().flatten().tolist():
            chosen[i, top(c.attention[i, :length, f].tolist(), k3)] = True
    assert (got[~chosen] == 1).all()                                       # exactly, where no frame chose
    order = torch.randperm(c.G, generator=c.g)
    close(perception_token_weights(*(x[order] for x in inputs[:3]), c.crucial, k3=k3, alpha=alpha), got[order],
          rtol=0, atol=1e-4)
    for rubbish in -1e6, 1e6, NAN, -INF, INF:
        other = c.dirty(c.attention, rubbish), c.dirty(c.logits, rubbish), c.mask, c.crucial
        assert torch.equal(got, perception_token_weights(*other, k3=k3, alpha=alpha))


@pytest.mark.parametrize("seed", range(12))
def test_weights_of_exactly_one(seed):
    c = Group(seed)
    ones = torch.ones(c.G, c.R)
    every = torch.ones(c.F, dtype=torch.bool)
    assert torch.equal(perception_token_weights(c.attention, c.logits, c.mask, ~every), ones)
    assert torch.equal(perception_token_weights(c.attention, c.logits, c.mask, every, alpha=0.0), ones)
    same = c.logits[:1, :1].expand(c.G, c.R, c.V)                          # identical distributions
    assert torch.equal(perception_token_weights(c.attention, same, c.mask, every), ones)
    by_column = c.logits[:1].expand(c.G, c.R, c.V)                         # alone in its group: D is 0
    assert torch.equal(perception_token_weights(c.attention[:1], by_column[:1], c.mask[:1], every), ones[:1])
    flat = torch.full_like(c.attention, 0.25)                              # ties: anything but NaN
    assert perception_token_weights(flat, c.logits, c.mask, every, k3=2).isfinite().all()
    assert crucial_frames(flat, c.mask, torch.ones(c.G)).sum() >= min(3, c.F)
    # attention of 0 is still a real token's: with k3 >= R all real tokens are chosen, whatever the ties
    expected, _ = oracle_weights((0 * flat).tolist(), c.logits.tolist(), c.lengths, every.tolist(), c.R)
    close(perception_token_weights(0 * flat, c.logits, c.mask, every, k3=c.R), expected, rtol=0, atol=1e-4)


def test_weights_defaults_and_precision():
    c = Group(8, group=3, width=70, lengths=[70, 66, 68])
    c.crucial[:] = True
    for logits in c.logits, c.logits.bfloat16(), c.logits.double():        # the KL is computed in fp32
        values = c.attention.tolist(), logits.tolist(), c.lengths, c.crucial.tolist()
        got = perception_token_weights(c.attention, logits, c.mask, c.crucial)
        assert got.dtype == torch.float32
        close(got, oracle_weights(*values)[0], rtol=0, atol=1e-4)
        for k3 in 63, 65:
            assert (got - torch.tensor(oracle_weights(*values, k3=k3)[0])).abs().max() > 0.01


@pytest.mark.parametrize("shift, stretched", [(0.0095, False), (0.0105, True)])
def test_span_below_threshold_counts_as_equal(shift, stretched):
    # p = (.5 + e, .5 - e), q = (.5 - e, .5 + e), e = shift / 2: D = 4 e^2 = shift^2 (+ O(e^4)) = .90e-4 or 1.10e-4,
    # beside a second pair with D = 0.
    p = torch.tensor([[.5 + shift / 2, .5 - shift / 2], [.5 - shift / 2, .5 + shift / 2]]).log()
    logits = torch.stack([p, torch.zeros(2, 2)], 1)
    every = torch.ones(2, 2, dtype=torch.bool)
    got = perception_token_weights(torch.rand(2, 2, 1), logits, every, every[0, :1])
    close(got, [[2.7, 1.0], [2.7, 1.0]] if stretched else [[1.0, 1.0], [1.0, 1.0]], rtol=0, atol=1e-6)


def test_vanishing_probabilities():
    # exp(-103) is the least number of fp32: a mean over the group must not round to 0 and its logarithm to -inf
    for group in 2, 8:
        for tenth in range(860, 1060, 2):
            logits = torch.zeros(group, 2, 2)
            logits[1:, 0, 1], logits[0, 0, 1] = -INF, -tenth / 10          # D_1 is next to 0, as D_2
            got = perception_token_weights(torch.rand(group, 2, 1), logits, torch.ones(group, 2, dtype=torch.bool),
                                           torch.tensor([True]))
            assert torch.equal(got, torch.ones(group, 2)), (group, tenth)


# ---------------------------------------------------------------- clipped surrogate loss

# Ratios 1.5, 1, .5 with A = 1 and 1.5, .5 with A = -1 (and padding), clip .2 / .28: gains 1.28 1 .5 and -1.5 -.8.
RATIOS = torch.tensor([[1.5, 1.0, 0.5], [1.5, 0.5, 9.0]], dtype=torch.float64)
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize("options, expected", [
    ({}, -0.096),                                             # -(2.78 - 2.3) / 5
    (dict(average="responses"), 0.111666667),                 # -(2.78 / 3 - 2.3 / 2) / 2
    (dict(clip_high=0.2), -0.08),                             # -(2.70 - 2.3) / 5
    (dict(clip_low=0.3), -0.116),                             # -(2.78 - 2.2) / 5
    (dict(weights=[[2., 1., 3.], [1., 2.5, 7.]]), -0.312),    # -(2.56 + 1 + 1.5 - 1.5 - 2) / 5
    # d = ln 2 at one token of the second response: k3 = 2 - ln 2 - 1 = .306853; .01 * k3 / 5, .01 * k3 / (2 * 2)
    (dict(kl_coef=0.01), -0.095386294),
    (dict(kl_coef=0.01, average="responses"), 0.112433799),
    (dict(kl_coef=0.0), -0.096)])
def test_surrogate_by_hand(options, expected):
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    new = old + RATIOS.log()
    if "kl_coef" in options:
        options = options | dict(ref_log_probs=new + torch.tensor([[0, 0, 0], [LN2, 0, 5]]))
    if "weights" in options:
        options = dict(token_weights=torch.tensor(options["weights"]))
    loss, metrics = clipped_surrogate_loss(new, old, SIGNS, HAND_MASK, **options)
    assert loss.shape == () and float(loss) == pytest.approx(expected, abs=1e-9)
    if not {"clip_low", "clip_high"} & set(options):          # A > 0 and 1.5 > 1.28, A < 0 and .5 < .8: 2 of 5
        assert float(metrics["clip_fraction"]) == pytest.approx(0.4)
    # (rho - 1) - ln rho: .5 - ln 1.5 = .094535; 0; -.5 + ln 2 = .193147; twice each but the 0, over 5 tokens
    assert float(metrics["approx_kl"]) == pytest.approx(0.115072829, abs=1e-8)


def test_clip_fraction_edges():
    def share(ratio, advantage, **clip):
        new = torch.tensor([[float(ratio)]], dtype=torch.float64).log()
        return float(clipped_surrogate_loss(new, torch.zeros_like(new), torch.tensor([advantage]).double(),
                                            torch.ones(1, 1, dtype=torch.bool), **clip)[1]["clip_fraction"])
    assert share(1.29, 1.0) == share(0.79, -1.0) == 1
    assert share(1.27, 1.0) == share(0.81, -1.0) == share(0.1, 1.0) == share(9.0, -1.0) == 0
    assert share(9.0, 0.0) == share(0.1, 0.0) == 0                         # no advantage, nothing clipped
    assert share(1.0, 1.0, clip_low=0.0, clip_high=0.0) == share(1.0, -1.0, clip_low=0.0, clip_high=0.0) == 0


@pytest.mark.parametrize("difference, advantage, loss, kl", [
    (30.0, -1.0, 485165195.409790, 485165174.409790),         # exp(20); exp(20) - 1 - 20
    (-30.0, 1.0, -2.06115362243856e-09, 19.0000000020612),    # -exp(-20); exp(-20) - 1 + 20
    (19.0, -1.0, 178482300.963187, 178482280.963187),
    (-19.0, 1.0, -5.60279643753727e-09, 18.0000000056028)])
def test_log_ratios_are_clamped(difference, advantage, loss, kl):
    new, zero = torch.tensor([[difference]], dtype=torch.float64, requires_grad=True), torch.zeros(1, 1).double()
    mask = torch.ones(1, 1, dtype=torch.bool)
    got, metrics = clipped_surrogate_loss(new, zero, torch.tensor([advantage]).double(), mask)
    assert got.item() == pytest.approx(loss, rel=1e-9) and float(metrics["approx_kl"]) == pytest.approx(kl, rel=1e-9)
    got.backward()
    assert float(new.grad) == pytest.approx(0.0 if abs(difference) > 20 else loss, rel=1e-9)
    # the reference model's: d = -difference, A = 0, so the loss is kl_coef * k3(d) alone
    d = max(-20.0, min(20.0, -difference))
    got, _ = clipped_surrogate_loss(new, new.detach(), zero[0], mask, ref_log_probs=zero, kl_coef=1.0)
    assert got.item() == pytest.approx(math.exp(d) - d - 1, rel=1e-9)


@pytest.mark.parametrize("average", ["tokens", "responses"])
@pytest.mark.parametrize("seed", range(24))
def test_surrogate(seed, average):
    c = Group(seed)
    clip = dict(clip_low=c.int(0, 5) / 10, clip_high=c.int(0, 5) / 10)
    weights = c.weights if seed % 2 else None
    ref, kl_coef = (c.ref, c.int(1, 9) / 10) if seed % 3 else (None, 0.0)
    more = dict(token_weights=weights, ref_log_probs=ref, kl_coef=kl_coef, average=average, **clip)
    got_at, true_at = (c.new.clone().requires_grad_() for _ in "ab")
    got, metrics = clipped_surrogate_loss(got_at, c.old, c.advantages, c.mask, **more)
    true, kl, share = oracle_surrogate(true_at, c.old, c.advantages, c.lengths, weights, ref=ref, kl_coef=kl_coef,
                                       average=average, **clip)
    close(got, true), close(metrics["approx_kl"], kl), close(metrics["clip_fraction"], share)
    got.backward(), true.backward()
    close(got_at.grad, true_at.grad)
    assert (got_at.grad[~c.mask] == 0).all()

    def again(new, order=slice(None), mend=lambda x: x):
        options = {k: mend(v)[order] if torch.is_tensor(v) else v for k, v in more.items()}
        return clipped_surrogate_loss(mend(new)[order], mend(c.old)[order], c.advantages[order], c.mask[order],
                                      **options)
    close(again(c.new, torch.randperm(c.G, generator=c.g))[0], got)
    for rubbish in 0.0, -1e6, 1e6, NAN, INF:
        assert torch.equal(again(c.new, mend=lambda x: c.dirty(x, rubbish))[0], got)
        other = c.dirty(c.new, rubbish).requires_grad_()                   # the padding of log_probs alone
        loss, numbers = again(other)
        loss.backward()
        assert torch.equal(loss, got) and torch.equal(other.grad, got_at.grad)
        assert float(numbers["approx_kl"]) == float(metrics["approx_kl"])
    short = [x.float() if torch.is_tensor(x) else x for x in (c.new, c.old, c.advantages, c.mask)]
    close(clipped_surrogate_loss(*short[:3], c.mask, **more)[0], got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_identities(seed):
    c = Group(seed)
    inputs = c.new, c.old, c.advantages, c.mask
    ones = perception_token_weights(c.attention, c.logits, c.mask, c.crucial, alpha=0.0)
    plain = clipped_surrogate_loss(*inputs)[0]
    assert torch.equal(clipped_surrogate_loss(*inputs, token_weights=ones)[0], plain)        # APPO, alpha = 0: DAPO
    assert torch.equal(clipped_surrogate_loss(*inputs, ref_log_probs=c.ref)[0], plain)       # kl_coef is 0
    assert float(clipped_surrogate_loss(c.new, c.old, 0 * c.advantages, c.mask)[0]) == 0     # equal rewards
    e = Group(seed, lengths=[3] * 5, group=5, width=6)                     # equal lengths: GRPO = DAPO, equal clips
    inputs, clip = (e.new, e.old, e.advantages, e.mask), dict(clip_low=0.2, clip_high=0.2)
    close(clipped_surrogate_loss(*inputs, **clip, average="responses")[0], clipped_surrogate_loss(*inputs, **clip)[0])
    first = clipped_surrogate_loss(e.old, e.old, e.advantages, e.mask)     # rho = 1: minus the mean advantage
    close(first[0], -e.advantages.mean())
    assert float(first[1]["approx_kl"]) == float(first[1]["clip_fraction"]) == 0


def test_response_without_tokens():
    # Not in the paper: it takes no part, and counts as 0 in a mean over responses.
    mask, zero = torch.tensor([[True, True], [False, False]]), torch.zeros(2, 2, requires_grad=True)
    assert not crucial_frames(torch.rand(2, 2, 3), mask, torch.tensor([0.0, 1.0])).any()
    every = torch.ones(3, dtype=torch.bool)
    assert torch.equal(perception_token_weights(torch.rand(2, 2, 3), torch.randn(2, 2, 4), mask, every), torch.ones(2, 2))
    for average, expected in ("tokens", -1.0), ("responses", -0.5):
        loss, _ = clipped_surrogate_loss(zero, zero.detach(), torch.tensor([1.0, -1.0]), mask, average=average)
        loss.backward()
        assert loss.item() == expected and zero.grad.isfinite().all()


# ---------------------------------------------------------------- perception loss

@pytest.mark.parametrize("average, expected", [
    ("tokens", [-0.0525, 0.09, 0.0875]), ("responses", [-0.101666667, 0.12, 0.075])])
def test_perception_by_hand(average, expected):
    # d = ln 2, 0, -ln 2 and 5: k3 = 1 - ln 2, 0, ln 2 - .5 (sum .5) and exp(5) - 6 > 10, so 10. gamma .02:
    # tokens .02 * 10.5 / 4, responses .02 * (.5 / 3 + 10) / 2. -log pi: 12 / 4, (2 + 6) / 2, times eta .03;
    # -log pi_mask: (.306853 + 2 + 3.693147 + 1) / 4 = 7 / 4, (2 + 1) / 2, times .05.
    new = torch.tensor([[-1.0, -2, -3], [-6, 8, 8]], dtype=torch.float64)
    masked = torch.tensor([[-1 + LN2, -2, -3 - LN2], [-1, -9, 4]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    for gamma, eta, masked_eta in (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0):
        got, _ = perception_loss(new, masked, mask, gamma=0.02 * gamma, eta=0.03 * eta, masked_eta=0.05 * masked_eta,
                                 average=average)
        true = gamma * expected[0] + eta * expected[1] + masked_eta * expected[2]
        assert got.shape == () and float(got) == pytest.approx(true, abs=1e-9)
    if average == "tokens":                                                # the defaults
        assert float(perception_loss(new, masked, mask, gamma=0.02)[0]) == pytest.approx(expected[0], abs=1e-9)


@pytest.mark.parametrize("average", ["tokens", "responses"])
@pytest.mark.parametrize("seed", range(24))
def test_perception(seed, average):
    c = Group(seed)
    more = dict(gamma=c.int(0, 9) / 10, eta=c.int(0, 9) / 10, masked_eta=c.int(0, 9) / 10, average=average)
    got_at, true_at = (c.new.clone().requires_grad_() for _ in "ab")
    masked = c.masked.clone().requires_grad_()
    got, _ = perception_loss(got_at, masked, c.mask, **more)
    true = oracle_perception(true_at, c.masked, c.lengths, **more)
    close(got, true)
    got.backward(), true.backward()
    close(got_at.grad, true_at.grad)
    assert (got_at.grad[~c.mask] == 0).all()
    assert masked.grad is None or (masked.grad == 0).all()
    order = torch.randperm(c.G, generator=c.g)
    close(perception_loss(c.new[order], c.masked[order], c.mask[order], **more)[0], got)
    for rubbish in 0.0, -1e6, 1e6, NAN, INF:
        other = c.dirty(c.new, rubbish).requires_grad_()
        loss, _ = perception_loss(other, c.masked, c.mask, **more)
        loss.backward()
        assert torch.equal(loss, got) and torch.equal(other.grad, got_at.grad)
        assert torch.equal(perception_loss(c.new, c.dirty(c.masked, rubbish), c.mask, **more)[0], got)


@pytest.mark.parametrize("d, k3, slope", [
    (1000.0, 10, 0), (-1000.0, 10, 0), (19.5, 10, 0), (-19.5, 10, 0), (-11.5, 10, 0), (2.62, 10, 0),
    (2.6, 9.86373804, 12.46373804), (-10.9, 9.90001846, -0.99998154)])     # exp(d) - d - 1 and exp(d) - 1
def test_perception_clamps(d, k3, slope):
    new = torch.tensor([[-2000.0]], dtype=torch.float64, requires_grad=True)
    loss, _ = perception_loss(new, new.detach() + d, torch.ones(1, 1, dtype=torch.bool), gamma=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(-k3, rel=1e-7) and float(new.grad) == pytest.approx(slope, rel=1e-7)


# ---------------------------------------------------------------- the whole objective, by finite differences

@pytest.mark.parametrize("name, average, clip_high, kl_coef, weighted, perception", [
    ("appo", "tokens", 0.28, 0.0, True, None),
    ("dapo", "tokens", 0.28, 0.0, False, None),
    ("grpo", "responses", 0.2, 0.01, False, None),
    ("papo_g", "responses", 0.2, 0.01, False, dict(gamma=0.02)),
    ("papo_d", "tokens", 0.28, 0.0, False, dict(gamma=0.01, eta=0.03, masked_eta=0.03))])
def test_gradient_of_the_objective(name, average, clip_high, kl_coef, weighted, perception):
    g = torch.Generator().manual_seed(5)
    lengths, (G, R, V, F) = [4, 2, 1], (3, 4, 5, 3)
    mask = torch.arange(R) < torch.tensor(lengths)[:, None]
    theta = torch.randn(G, R, V, generator=g).double()
    tokens = torch.randint(0, V, (G, R, 1), generator=g)
    policy = lambda logits: logits.log_softmax(-1).gather(-1, tokens)[..., 0]
    old, ref, masked = (policy(theta + 0.5 * torch.randn(G, R, V, generator=g)) for _ in range(3))
    attention = torch.rand(G, R, F, generator=g)
    crucial = crucial_frames(attention, mask, torch.tensor([1.0, 0.0, 1.0]), k1=2, k2=2)
    weights = perception_token_weights(attention, theta.float(), mask, crucial, k3=2) if weighted else None
    assert not weighted or (weights.max() > 2 and weights.min() == 1)
    advantages = group_advantages(torch.tensor([1.0, 0.1, 0.9])).double()

    def objective(logits):
        loss, metrics = clipped_surrogate_loss(
            policy(logits), old, advantages, mask, token_weights=weights, clip_low=0.2, clip_high=clip_high,
            ref_log_probs=ref if kl_coef else None, kl_coef=kl_coef, average=average)
        assert 0 < float(metrics["clip_fraction"]) < 1                     # clip acts, and not everywhere
        if perception:
            loss = loss + perception_loss(policy(logits), masked, mask, average=average, **perception)[0]
        return loss

    at = theta.clone().requires_grad_()
    objective(at).backward()
    numeric, step = torch.zeros_like(theta), 1e-5
    for n in range(theta.numel()):
        shift = torch.zeros(theta.numel(), dtype=torch.float64)
        shift[n] = step
        shift = shift.view_as(theta)
        numeric.view(-1)[n] = (objective(theta + shift) - objective(theta - shift)) / (2 * step)
    close(at.grad, numeric, rtol=1e-6, atol=1e-9)
    assert at.grad.abs().max() > 1e-3 and (at.grad[~mask] == 0).all()


def test_focused_frames_are_the_k2_highest_of_the_k1_mean():
    attention = torch.rand(3, 20, 6, generator=torch.Generator().manual_seed(0)).pow(4)
    mask = torch.arange(20) < torch.tensor([[20], [9], [17]])
    for k1, k2, focused in ((15, 3, appo.focused_frames(attention, mask)),
                            (4, 2, appo.focused_frames(attention, mask, k1=4, k2=2))):
        for i, length in enumerate((20, 9, 17)):
            score = [sum(sorted(attention[i, :length, f].tolist())[-k1:]) for f in range(6)]
            assert focused[i].nonzero().flatten().tolist() == top(score, k2)


def test_the_papers_k1_is_the_default():
    attention = torch.zeros(1, 20, 3)  # means over the highest 14, 15, 16 tokens: frame 0 wins at 15 alone
    attention[0, :15, 0], attention[0, :, 1], attention[0, :14, 2] = 1.0, 0.97, 1.05
    mask = torch.ones(1, 20, dtype=torch.bool)
    assert appo.focused_frames(attention, mask, k2=1).tolist() == [[True, False, False]]
    assert appo.focused_frames(attention, mask, k1=14, k2=1).tolist() == [[False, False, True]]
    assert appo.focused_frames(attention, mask, k1=16, k2=1).tolist() == [[False, True, False]]


def test_whole_numbers_are_rewards_too():
    half = 0.5 / (1 / math.sqrt(3) + 1e-4)
    assert group_advantages(torch.tensor([1, 0, 0, 1])).tolist() == pytest.approx([half, -half, -half, half])


def test_perception_metric_is_a_number_without_gradient():
    new = torch.log(torch.tensor([[0.5, 0.2]])).requires_grad_()
    loss, metrics = perception_loss(new, torch.log(torch.tensor([[0.25, 0.2]])), torch.ones(1, 2, dtype=torch.bool), gamma=1.0)
    assert float(metrics["perception_kl"]) == pytest.approx((0.5 + math.log(2) - 1) / 2, rel=1e-5)
    assert loss.requires_grad and not metrics["perception_kl"].requires_grad
    assert appo.group_mean(torch.tensor([[1.0, 5.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]), "tokens") == 3
    assert appo.group_mean(torch.tensor([[1.0, 5.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]), "responses") == 3
    with pytest.raises(ValueError, match="token"):
        appo.group_mean(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "token")
    with pytest.raises(ValueError, match="ref_log_probs"):
        clipped_surrogate_loss(new, new, torch.ones(1), torch.ones(1, 2, dtype=torch.bool), kl_coef=0.1)


# ============================================================================ data.py

READING = dict(fps=1, max_frames=16, min_pixels=3136, max_pixels=50176)
CHOICE = Sample("a:0", "which ?", ["A book", "A pan", "A guitar", "An umbrella"], "C", "choice")
NUMBER = Sample("a:1", "how many ?", [], "100", "number")
GROUND = dataclasses.replace(CHOICE, kind="grounding", duration=20.0, spans=[(4.0, 10.0)])


def record(**changes):
    fields = dict(problem_id=0, problem="What?", data_type="video", problem_type="multiple choice",
                  options=["A. one", "B. two"], solution="<answer>B</answer>", path="a.avi", duration=3.0)
    fields.update(changes)
    return {k: v for k, v in fields.items() if v is not ...}


def write_records(folder, *records, name="x.json"):
    path = folder / name
    path.write_text(json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records)))
    return path


def clip(folder, count=6, height=30, width=41, fps=2, name="a.avi", seed=0):
    frames = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8))
    data.write_avi(folder / name, frames, fps)
    return frames


def one_line(error, *words):
    assert "\n" not in str(error) and len(str(error)) < 1000, error
    for word in words:
        assert word in str(error), (word, str(error))


# ------------------------------------------------------------------ annotations
def test_video_r1_records_become_samples(tmp_path):
    clip(tmp_path)
    path = write_records(tmp_path, record(), record(problem_type="numerical", options=[], solution="<answer>1,200.5</answer>"),
                         record(problem_type="free-form"), record(problem_type="OCR"), record(data_type="image", solution="two"))
    choice, number, image = data.load_samples(path, None)
    assert (choice.id, choice.options, choice.answer, choice.kind) == ("x.json:0", ["one", "two"], "B", "choice")
    assert choice.video == str(tmp_path / "a.avi") and choice.image is None and choice.missing == []
    assert (number.id, number.kind, number.answer) == ("x.json:1", "number", "1,200.5")
    assert data.accuracy_reward("<answer>1200.5</answer>", number) == 1.0
    assert image.image and image.video is None and image.answer == "B"


def test_left_out_records_are_counted(tmp_path, caplog):
    path = write_records(tmp_path, record(), record(problem_type="free-form"), record(problem_type="OCR"))
    with caplog.at_level("WARNING", logger="appo"):
        assert len(data.load_samples(path)) == 1
    assert "2 records left out" in caplog.text and "1 OCR, 1 free-form" in caplog.text
    labels = ["many", "1/2", "1 1/2", "3 x 10^5", "1e999", "<answer>x</answer>", "<answer>1</answer><answer>2</answer>", "12 cm", "7%"]
    path = write_records(tmp_path, *[record(problem_type="numerical", solution=label) for label in labels])
    with caplog.at_level("WARNING", logger="appo"):
        assert [s.answer for s in data.load_samples(path)] == ["12 cm", "7%"]
    assert "7 records left out, no rule can score them: 7 numerical" in caplog.text


def test_durations_are_numbers_or_missing(tmp_path):
    path = write_records(tmp_path, record(duration=3), record(duration=2.5), record(duration=None), record(duration=...))
    assert [s.duration for s in data.load_samples(path)] == [3.0, 2.5, None, None]


@pytest.mark.parametrize("change, field", [
    (dict(solution=...), "solution"), (dict(solution="<answer>E</answer>"), "solution"), (dict(solution=7), "solution"),
    (dict(solution="<answer>A</answer><answer>B</answer>"), "solution"), (dict(options=...), "options"),
    (dict(options=["A. one"]), "options"), (dict(options="A"), "options"), (dict(options=["A. x", 3]), "options"),
    (dict(options=[None, "b"]), "options"), (dict(path=...), "path"), (dict(path=["a"]), "path"),
    (dict(problem=""), "problem"), (dict(problem={}), "problem"), (dict(problem="\ud800"), "problem"),
    (dict(problem_type="song"), "problem_type"), (dict(data_type="audio"), "data_type"), (dict(duration="3"), "duration"),
    (dict(duration=float("nan")), "duration"), (dict(duration=10 ** 400), "duration"), (dict(duration=True), "duration"),
    (dict(problem_type="numerical", solution=...), "solution"), (dict(problem_type="numerical", solution=3), "solution"),
    (dict(crucial_step="x"), "crucial_step"), (dict(crucial_step=True), "crucial_step"), (dict(crucial_step=-1), "crucial_step"),
    (dict(crucial_step=2.5), "crucial_step"), (dict(path="../a.avi"), "..")])
def test_bad_fields_are_named_in_one_line(tmp_path, change, field):
    path = write_records(tmp_path, record(), record(**change))
    with pytest.raises(DataError) as error:
        data.load_samples(path, tmp_path)
    one_line(error.value, "x.json", "record 1", field)


@pytest.mark.parametrize("content, word", [
    (b"[{\"problem\": ", "JSON"), (b"\xff\xfe[", "UTF-8"), (b"{}", "list"), (b"[]", "list"), (b"[3]", "record 0"),
    (b"[" * 100_000, "JSON"), (b"[" + b"9" * 5000 + b"]", "JSON"), (b'[{"a": 1}]', "NExT-GQA"), (b"", "JSON"), (b"null", "list")])
def test_bad_files_are_named_in_one_line(tmp_path, content, word):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        data.load_samples(tmp_path / "x.json")
    one_line(error.value, "x.json", word)


def test_missing_annotation_folder_and_root(tmp_path):
    for path, root in ((tmp_path / "none.json", None), (tmp_path, None), ("", None),
                       (write_records(tmp_path, record()), tmp_path / "none")):
        with pytest.raises(DataError) as error:
            data.load_samples(path, root)
        one_line(error.value)


def test_jsonl_and_joined_files(tmp_path):
    a = write_records(tmp_path, record(), record(problem="b\u2028c"), name="a.jsonl")
    (tmp_path / "sub").mkdir()
    b = write_records(tmp_path / "sub", record(), name="a.jsonl")
    assert [s.id.rsplit(":")[-1] for s in data.load_samples(a)] == ["0", "1"]
    ids = [s.id for s in data.load_samples(f"{a},{b}")]
    assert len(ids) == len(set(ids)) == 3  # two files of one name


def test_paths_are_looked_up_as_given_then_by_tail_then_by_name(tmp_path):
    root = tmp_path / "root"
    for place in ("data/set/v.avi", "set/v.avi", "deep/er/only.avi", "one/twin.avi", "two/twin.avi", "v.avi"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(b"x")
    (tmp_path / "outside.avi").write_bytes(b"x")
    given = ["data/set/v.avi", "/data/set/v.avi", "/x/set/v.avi", "/x/y/v.avi", "./v.avi", "/gone/only.avi", "/gone/twin.avi",
             str(tmp_path / "outside.avi"), str(root / "set/v.avi"), "v\0.avi", "x" * 300]
    samples = data.load_samples(write_records(tmp_path, *[record(path=p) for p in given]), root)
    found = [s.video and str(Path(s.video).relative_to(root)) for s in samples]
    assert found == ["data/set/v.avi", "data/set/v.avi", "set/v.avi", "v.avi", "v.avi", "deep/er/only.avi", None, None,
                     "set/v.avi", None, None]
    assert samples[6].missing == ["/gone/twin.avi"] and samples[0].missing == []
    plain = data.load_samples(write_records(tmp_path, record(path=str(tmp_path / "outside.avi")), record(path="root/v.avi")))
    assert [s.video for s in plain] == [str(tmp_path / "outside.avi"), str(tmp_path / "root/v.avi")]


@pytest.mark.parametrize("path", ["../outside.avi", "a/../../outside.avi", "/../outside.avi", "a/.."])
def test_a_path_cannot_leave_the_root(tmp_path, path):
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match=r"record 0.*'\.\.'"):
        data.load_samples(write_records(tmp_path, record(path=path)), tmp_path / "root")


def test_next_gqa_record(tmp_path):
    fields = dict(question="when", video_path="/n/a.avi", options=list("vwxyz"), answer="3", qtype="TC", duration=10,
                  time_clues=[[8.7, 10.3], [0, 1]])
    for answer in ("3", 3, "y", "D"):
        sample, = data.load_samples(write_records(tmp_path, {**fields, "answer": answer}))
        assert (sample.answer, sample.kind, sample.group, sample.duration) == ("D", "grounding", "TC", 10.0)
        assert sample.spans == [(8.7, 10.3), (0.0, 1.0)]
    for bad, name in ((dict(answer="5"), "answer"), (dict(answer=None), "answer"), (dict(time_clues=[]), "time_clues"),
                      (dict(time_clues=[[1]]), "time_clues"), (dict(time_clues=[[1, None]]), "time_clues"),
                      (dict(time_clues=[[5, 1]]), "time_clues"), (dict(duration=None), "duration"), (dict(duration=0), "duration")):
        with pytest.raises(DataError) as error:
            data.load_samples(write_records(tmp_path, {**fields, **bad}))
        one_line(error.value, "x.json, record 0", name)


def test_seed_bench_r1_record(tmp_path):
    fields = dict(question="next?", answer="toss", negative_answers=["a", "b", "c", "d"], video_source="s", video_basename="a.avi",
                  task_progress_metadata=[{}], current_observation_basename="p.png", duration=0.0)
    path = write_records(tmp_path, *[fields] * 40)
    samples = data.load_samples(path)
    assert samples == data.load_samples(path) != data.load_samples(path, seed=1)
    assert {s.answer for s in samples} == set("ABCD")
    for s in samples:
        assert len(s.options) == 4 and len(set(s.options)) == 4 and s.options[ord(s.answer) - 65] == "toss"
        assert s.missing == ["videos/s/a.avi", "images/s/p.png"]
    chosen = {**fields, "golden_choice_idx": "B", "task_progress_metadata": [], "video_basename": "",
              **{f"choice_{c}": f"do {c}" for c in "abcd"}}
    sample, = data.load_samples(write_records(tmp_path, chosen))
    assert (sample.answer, sample.options[1], sample.video, sample.missing) == ("B", "do b", None, ["images/s/p.png"])


@needs_shared
@pytest.mark.parametrize("name, count, kind", [("video_r1", 9, "choice"), ("perception_test", 4, "choice"),
                                               ("next_gqa", 2, "grounding"), ("seed_bench_r1", 2, "choice")])
def test_every_shared_format_is_found_and_read(name, count, kind):
    samples = data.load_samples(SHARED / f"data/clips_{name}.json", SHARED / "videos")
    assert len(samples) == count and {s.kind for s in samples} == {kind} and not any(s.missing for s in samples)
    for sample in samples:
        visual = data.read_visual(sample, **READING)
        assert len(visual.patches) == sum(t * h * w for t, h, w in visual.video_grids + visual.image_grids)
        assert len(visual.video_grids) == (sample.video is not None) and len(visual.image_grids) == (sample.image is not None)


# ------------------------------------------------------------------ frames and times
@pytest.mark.parametrize("count, rate, fps, most, n, duration", [
    (22, 1, 1, 16, 16, 22), (660, 30, 1, 16, 16, 22), (5, 1, 1, 16, 4, 5), (1, 25, 1, 16, 2, 0.04), (2, 25, 1, 16, 2, 0.08),
    (3, 25, 1, 16, 2, 0.12), (50, 25, 1, 16, 4, 2), (175, 25, 1, 16, 6, 7), (175, 25, 2, 16, 14, 7), (1000, 10, 1, 1, 2, 100),
    (1000, 10, 1, 7, 6, 100)])
def test_frames_and_time_rule(count, rate, fps, most, n, duration):
    indices, seconds = data.frame_indices(count, rate, fps, most)
    assert len(indices) == n and seconds == pytest.approx(duration)
    assert indices.tolist() == [round(i * (count - 1) / (n - 1)) for i in range(n)]


def test_bounds_narrow_the_video():
    indices, seconds = data.frame_indices(100, 10, 1, 16, (2.0, 6.9))
    assert (indices[0], indices[-1], len(indices), seconds) == (20, 69, 4, 5.0)
    assert data.frame_indices(100, 10, 1, 16, (-5, 99))[0].tolist() == data.frame_indices(100, 10, 1, 16)[0].tolist()
    with pytest.raises(ValueError):
        data.frame_indices(100, 10, 1, 16, (50, 60))


def test_avi_round_trip_is_exact(tmp_path):
    for width in (41, 42, 43, 44):
        frames = clip(tmp_path, 8, 30, width, 2)
        read, seconds, duration = data.sample_frames(str(tmp_path / "a.avi"), 100, 100)
        assert torch.equal(read, frames) and duration == 4.0 and seconds == 1.0
    data.write_avi(tmp_path / "b.avi", frames, 29.97)
    assert data.sample_frames(str(tmp_path / "b.avi"), 1, 16)[2] == pytest.approx(8 / 29.97)


def test_folder_of_frames(tmp_path):
    from PIL import Image
    (tmp_path / "f").mkdir()
    for i in range(12):
        Image.new("RGB", (20, 10), (i * 20, 0, 0)).save(tmp_path / "f" / f"{i}.png")
    (tmp_path / "f" / "notes.txt").write_text("x")
    frames, seconds, duration = data.sample_frames(str(tmp_path / "f"), 1, 16)
    assert (frames[:, 0, 0, 0] // 20).tolist() == [0, 4, 7, 11] and (seconds, duration) == (2.0, 4.0)
    assert frames.shape == (4, 3, 10, 20)


@needs_shared
@pytest.mark.parametrize("name, n, duration", [("mma_test.avi", 6, 164 / 25), ("frog.webm", 8, 248 / 30),
                                               ("mma_demo.mp4", 10, 10.0), ("nasa.mp4", 12, 390 / 29.97003), ("pancake_h264.mkv", 10, 310 / 30)])
def test_sampled_frames_are_those_of_a_decoder_that_reads_on(name, n, duration):
    import decord
    path = str(SHARED / "videos" / name)
    frames, seconds, read_duration = data.sample_frames(path, 1, 16)
    assert len(frames) == n and read_duration == pytest.approx(duration, rel=1e-6) and seconds == pytest.approx(2 * duration / n)
    video, taken = decord.VideoReader(path, num_threads=1), data.frame_indices(round(duration * decord.VideoReader(path).get_avg_fps()),
                                                                               decord.VideoReader(path).get_avg_fps(), 1, 16)[0].tolist()
    for index in range(len(video)):
        frame = video.next().asnumpy()
        if index in taken:
            assert np.array_equal(frames[taken.index(index)].permute(1, 2, 0).numpy(), frame), index


# ------------------------------------------------------------------ patches
def slow_patches(frames):
    """Loops over Qwen's order, float64, for frames whose sides are multiples of 28."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    frames = frames.double().tolist()
    frames += [frames[-1]] * (len(frames) % 2)
    height, width, out = len(frames[0][0]), len(frames[0][0][0]), []
    for t in range(0, len(frames), 2):
        for top in range(0, height, 28):
            for left in range(0, width, 28):
                for y in (top, top + 14):
                    for x in (left, left + 14):
                        out.append([(frames[t + f][c][y + i][x + j] / 255 - mean[c]) / std[c]
                                    for c in range(3) for f in range(2) for i in range(14) for j in range(14)])
    return torch.tensor(out, dtype=torch.float64), (len(frames) // 2, height // 14, width // 14)


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (2, 3, 28, 56), (3, 3, 56, 84), (4, 3, 84, 28)])
def test_patches_equal_the_slow_oracle(shape):
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    patches, grid = data.frames_to_patches(frames, 784, 10 ** 6)
    want, want_grid = slow_patches(frames)
    assert grid == want_grid and patches.dtype == torch.float32 and patches.shape == want.shape
    assert (patches - want).abs().max() < 1e-6


def test_patches_by_hand():
    frames = torch.zeros(2, 3, 28, 56, dtype=torch.uint8)
    frames[1, 2, 15, 29] = 255  # second frame, blue, row 15, column 29: third patch of the second merged token
    patches, grid = data.frames_to_patches(frames, 784, 10 ** 6)
    assert grid == (1, 2, 4)
    black, white = -0.40821073 / 0.27577711, (1 - 0.40821073) / 0.27577711
    at = 4 + 2, (2 * 2 + 1) * 196 + 1 * 14 + 1
    assert patches[at] == pytest.approx(white, abs=1e-6)
    patches[at] = black
    assert torch.allclose(patches.view(8, 3, 2, 196)[:, 2], torch.tensor(black))


@pytest.mark.parametrize("size, low, high, want", [
    ((240, 426), 50176, 50176, (168, 280)), ((240, 320), 50176, 50176, (168, 252)), ((720, 1280), 12544, 25088, (112, 196)),
    ((20, 20), 3136, 50176, (56, 56)), ((224, 224), 50176, 50176, (224, 224)), ((56, 56), 3136, 50176, (56, 56)),
    ((10, 2000), 784, 50176, (28, 420)), ((42, 42), 784, 10 ** 6, (56, 56)), ((14, 14), 1, 10 ** 6, (28, 28))])
def test_smart_resize_by_hand(size, low, high, want):
    assert data.resized_size(*size, low, high) == want


def test_patches_equal_transformers(tmp_path):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    from PIL import Image
    rng = np.random.default_rng(0)
    for height, width in ((100, 150), (240, 426), (60, 40)):
        smooth = np.kron(rng.integers(0, 256, (height // 10, width // 10, 3)), np.ones((10, 10, 1))).astype(np.uint8)
        processor = module.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 50176})
        want = processor(Image.fromarray(smooth), return_tensors="pt")
        patches, grid = data.frames_to_patches(torch.from_numpy(smooth).permute(2, 0, 1)[None], 3136, 50176)
        assert list(grid) == want["image_grid_thw"][0].tolist()
        difference = (patches - want["pixel_values"]).abs()
        assert difference.max() < 2.1 / 255 / 0.26 and difference.mean() < 2e-3  # Pillow rounds between its two passes


def test_memory_layout_does_not_change_the_resize():
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 90, 130, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    a = data.frames_to_patches(frames, 3136, 6272)[0]
    assert torch.equal(a, data.frames_to_patches(frames.contiguous(), 3136, 6272)[0])
    single = [data._resize(f[None], 3136, 6272) for f in frames]
    assert torch.equal(a, data._patchify(torch.cat(single))[0])


def test_extremely_wide_frames_are_refused(tmp_path):
    with pytest.raises(ValueError, match="200 times"):
        data.frames_to_patches(torch.zeros(2, 3, 2, 402, dtype=torch.uint8), 3136, 50176)
    clip(tmp_path, 4, 2, 402)
    with pytest.raises(VideoError, match="200 times"):
        data.read_visual(dataclasses.replace(CHOICE, video=str(tmp_path / "a.avi")), **READING)


def test_masked_cells(tmp_path):
    data.write_avi(tmp_path / "a.avi", torch.full((6, 3, 140, 280), 200, dtype=torch.uint8), 1)
    sample = dataclasses.replace(CHOICE, video=str(tmp_path / "a.avi"))
    setting = dict(READING, min_pixels=784)
    a, b = data.read_visual(sample, **setting, mask_seed=(0, 1, 2)), data.read_visual(sample, **setting, mask_seed=(0, 1, 2))
    other, plain = data.read_visual(sample, **setting, mask_seed=(0, 1, 3)), data.read_visual(sample, **setting)
    assert torch.equal(a.masked_patches, b.masked_patches) and not torch.equal(a.masked_patches, other.masked_patches)
    assert plain.masked_patches is None and torch.equal(a.patches, plain.patches) and a.video_grids == [(3, 10, 20)]
    black = data._patchify(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))[0][0]
    dark = (a.masked_patches == black).all(1)                      # no resize here: a cell is a patch
    assert torch.equal(a.masked_patches[~dark], a.patches[~dark]) and 0.5 < dark.float().mean() < 0.7
    assert torch.equal(*dark.view(3, 200)[:2]) and torch.equal(*dark.view(3, 200)[1:])  # one mask for all frames
    keep = data._mask(np.random.default_rng(0), 30, 45)
    assert keep.shape == (30, 45) and all(len(keep[y:y + 14, x:x + 14].unique()) == 1 for y in (0, 14, 28) for x in (0, 14, 28, 42))


# ------------------------------------------------------------------ the reader, with real processes
def make_faults(folder):
    clip(folder, name="good.avi")
    whole = (folder / "good.avi").read_bytes()
    (folder / "empty.avi").write_bytes(b"")
    (folder / "cut.avi").write_bytes(whole[:100])
    (folder / "text.mp4").write_text("no video")
    wave = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8) + b"data" + struct.pack("<I", 8000) + bytes(8000)
    (folder / "sound.wav").write_bytes(b"RIFF" + struct.pack("<I", len(wave)) + wave)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe.avi")
    (folder / "link.avi").symlink_to(folder / "gone.avi")
    clip(folder, 4, 2, 402, name="wide.avi")
    (folder / "huge.avi").write_bytes(whole.replace(struct.pack("<ii", 41, 30), struct.pack("<ii", 2 ** 30, 2 ** 30)))
    (folder / "late.avi").write_bytes(whole[:len(whole) // 2])
    return ["empty.avi", "cut.avi", "text.mp4", "sound.wav", "folder", "pipe.avi", "link.avi", "wide.avi"]


def test_reader_faults_end_in_one_line_and_the_next_sample_is_read(tmp_path):
    bad = make_faults(tmp_path)
    clip(tmp_path, 1, name="single.avi")
    ask = lambda name, **more: dataclasses.replace(CHOICE, video=str(tmp_path / name), **more)
    (tmp_path / "closed.avi").write_bytes((tmp_path / "good.avi").read_bytes())
    (tmp_path / "closed.avi").chmod(0)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with data.VideoReader(2, timeout=20, **READING) as reader:
        futures = {name: reader.submit(ask(name)) for name in bad}
        futures["missing"] = reader.submit(dataclasses.replace(CHOICE, missing=["x\ny.avi"]))
        futures["bad.png"] = reader.submit(dataclasses.replace(CHOICE, image=str(tmp_path / "bad.png")))
        futures["bounds"] = reader.submit(ask("good.avi", bounds=(100.0, 200.0)))
        if os.geteuid() != 0:  # root may read everything
            futures["closed.avi"] = reader.submit(ask("closed.avi"))
        for name, future in futures.items():
            with pytest.raises(VideoError) as error:
                future.result(60)
            one_line(error.value)
            assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
        for name in ("huge.avi", "late.avi"):  # frames or the documented error
            error = reader.submit(ask(name)).exception(60)
            assert error is None or isinstance(error, VideoError)
        one = reader.submit(ask("single.avi")).result(60)
        assert (one.num_frames, one.video_grids, one.duration, one.seconds_per_grid) == (2, [(1, 4, 6)], 0.5, [0.5])
        good = reader.submit(ask("good.avi"), mask_seed=(1, 2, 3)).result(60)
        here = data.read_visual(ask("good.avi"), **READING, mask_seed=(1, 2, 3))
        for name, value in vars(here).items():
            same = torch.equal(value, getattr(good, name)) if isinstance(value, torch.Tensor) else value == getattr(good, name)
            assert same, name


def test_hanging_and_crashing_decoders_cost_one_sample_each(tmp_path):
    clip(tmp_path)
    sample = dataclasses.replace(CHOICE, video=str(tmp_path / "a.avi"))
    reader = data.VideoReader(1, timeout=1, **READING)
    try:
        assert reader.submit(sample).result(60).num_frames == 4
        (first, _), = reader._decoders.values()
        os.kill(first.pid, signal.SIGSTOP)                 # hangs
        with pytest.raises(VideoError, match="not decoded within 1 s"):
            reader.submit(sample).result(30)
        assert first.poll() == -signal.SIGKILL
        assert reader.submit(sample).result(60).num_frames == 4
        (second, _), = reader._decoders.values()
        os.kill(second.pid, signal.SIGSTOP)
        future = reader.submit(sample)
        time.sleep(0.3)
        os.kill(second.pid, signal.SIGKILL)                # crashes with a sample in hand
        with pytest.raises(VideoError, match="process died"):
            future.result(30)
        reader.submit(sample).result(60)
        (third, _), = reader._decoders.values()
        os.kill(third.pid, signal.SIGINT)                  # Ctrl-C is the parent's to answer
        os.kill(third.pid, signal.SIGTERM)
        assert reader.submit(sample).result(60).num_frames == 4 and reader._decoders[next(iter(reader._decoders))][0] is third
        os.kill(third.pid, signal.SIGKILL)                 # crashes idle: no sample is lost
        third.wait()
        assert reader.submit(sample).result(60).num_frames == 4
        (fourth, _), = reader._decoders.values()
        os.kill(fourth.pid, signal.SIGSTOP)
        waiting = reader.submit(sample)
        time.sleep(0.2)
    finally:
        begin = time.monotonic()
        reader.close()
        reader.close()
    assert time.monotonic() - begin < 0.9 and isinstance(waiting.exception(), VideoError)
    assert fourth.poll() is not None
    with pytest.raises(RuntimeError):
        reader.submit(sample)


def test_a_hanging_decoder_ends_soon_after_its_parent(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    script = ("import data, sys, time; reader = data.VideoReader(1, timeout=1.5, fps=1, max_frames=4, min_pixels=3136, max_pixels=3136); "
              "ask = lambda name: reader.submit(data.Sample('', '', [], 'A', 'choice', image=name)); "
              "ask('none.png').exception(); print(next(iter(reader._decoders.values()))[0].pid, flush=True); ask(sys.argv[1]); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "pipe.png")], stdout=subprocess.PIPE, cwd=Path(data.__file__).parent)
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    os.kill(child, 0)  # it hangs in opening the pipe
    for _ in range(60):
        time.sleep(0.1)
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
    raise AssertionError("the decoding process outlives its parent")


@needs_shared
def test_the_damaged_clip_gives_frames_or_the_error():
    sample = dataclasses.replace(CHOICE, video=str(SHARED / "videos/corrupted.mp4"))
    with data.VideoReader(1, timeout=30, **dict(READING, fps=4)) as reader:
        with pytest.raises(VideoError) as error:
            reader.submit(sample).result(60)
        one_line(error.value, "corrupted.mp4")


# ------------------------------------------------------------------ prompts
class WordTokenizer:
    """Just enough of a tokenizer: TOY_TOKEN words, Qwen's control tokens whole."""

    def __init__(self):
        self.ids = {}

    def convert_tokens_to_ids(self, token):
        return self.ids.setdefault(token, len(self.ids))

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        parts = {"video": "<|vision_start|><|video_pad|><|vision_end|>", "image": "<|vision_start|><|image_pad|><|vision_end|>"}
        return "<|im_start|>user " + "".join(parts.get(c["type"]) or c["text"] for c in messages[0]["content"]) + "<|im_end|>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.convert_tokens_to_ids(w) for w in data.re.findall(r"<\|\w+\|>|" + data.TOY_TOKEN, text)]}


def visual_of(video_grids, image_grids=()):
    n = sum(t * h * w for t, h, w in [*video_grids, *image_grids])
    return data.Visual(torch.zeros(n, 1176), None, list(video_grids), list(image_grids), [1.0] * len(video_grids), 8.0, 4)


def test_prompt_text_is_the_papers():
    assert data.prompt_text(CHOICE, None) == (
        "which ?\nA. A book\nB. A pan\nC. A guitar\nD. An umbrella\nOutput the thinking process in <think> </think> and final "
        "answer in <answer> </answer> tags, i.e., <think> reasoning process here </think><answer> answer here </answer>.")
    text = data.prompt_text(GROUND, visual_of([(2, 4, 4)]))
    assert text.startswith("The video is 20 seconds long, with 4 frames evenly sampled from it.\nBased on")
    assert text.endswith("<time> 8.4 to 12.5, 25 to 30.2 </time>") and "Question: which ?\nA. A book" in text


def test_prompt_tokens_and_frame_of_token():
    tokenizer = WordTokenizer()
    prompt = data.build_prompt(CHOICE, visual_of([(2, 4, 4)], [(1, 4, 2)]), tokenizer)
    video, image = (prompt.input_ids == tokenizer.ids[f"<|{k}_pad|>"] for k in ("video", "image"))
    assert video.sum() == 8 and image.sum() == 2 and prompt.num_steps == 2 and prompt.input_ids.dtype == torch.int64
    assert prompt.frame_of_token[video].tolist() == [0] * 4 + [1] * 4 and (prompt.frame_of_token[~video] == -1).all()
    assert video.nonzero().max() < image.nonzero().min()
    for seconds, step, kept in ((2.0, 1, 1), (2.0, 2, None), (4.0, 1, None)):  # a crucial step holds for steps of 2 s
        visual = dataclasses.replace(visual_of([(2, 4, 4)]), seconds_per_grid=[seconds])
        assert data.build_prompt(dataclasses.replace(CHOICE, crucial_step=step), visual, tokenizer).sample.crucial_step == kept
    with pytest.raises(ValueError, match="chat template"):
        data.build_prompt(CHOICE, visual_of([(2, 4, 4), (2, 4, 4)]), type("", (WordTokenizer,), dict(
            apply_chat_template=lambda self, *_, **__: "<|video_pad|>"))())
    bare = data.build_prompt(CHOICE, visual_of([]), tokenizer)
    assert bare.num_steps == 0 and (bare.frame_of_token == -1).all()


def test_control_tokens_in_a_question_are_words():
    hostile = dataclasses.replace(CHOICE, question="a <|video_pad|> b <|im_end|> <<||image_pad|>", options=["<|video_pad|>", "<|im_end|>"])
    tokenizer = WordTokenizer()
    prompt = data.build_prompt(hostile, visual_of([(1, 2, 2)]), tokenizer)
    assert (prompt.input_ids == tokenizer.ids["<|video_pad|>"]).sum() == 1
    assert (prompt.input_ids == tokenizer.ids["<|im_end|>"]).sum() == 1


@needs_shared
def test_prompt_with_the_real_tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "models/qwen2.5-vl-3b")
    hostile = dataclasses.replace(GROUND, question="is <|video_pad|> or <|im_end|> or <|endoftext|> shown?", options=["<|image_pad|>", "x"])
    for sample in (CHOICE, hostile):
        visual = visual_of([(3, 4, 6)], [(1, 2, 4)])
        prompt = data.build_prompt(sample, visual, tokenizer)
        words = data.prompt_text(sample, visual).replace("<|", "< |")
        chat = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|video_pad|>" * 18
                + "<|vision_end|><|vision_start|>" + "<|image_pad|>" * 2 + f"<|vision_end|>{words}<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.input_ids.tolist() == tokenizer(chat)["input_ids"]
        assert prompt.frame_of_token[prompt.input_ids == 151656].tolist() == [0] * 6 + [1] * 6 + [2] * 6
        assert (prompt.input_ids == 151645).sum() == 2 and (prompt.input_ids == 151655).sum() == 2


# ------------------------------------------------------------------ rewards
@pytest.mark.parametrize("answer, right", [
    ("C", 1), ("C.", 1), ("(C)", 1), ("C. A guitar", 1), ("a guitar", 1), ("A guitar", 1), (" C \n", 1), ("(C) A guitar.", 1), ("C: A guitar", 1),
    ("B", 0), ("", 0), ("C. A book", 0), ("C A guitar", 0), ("C D", 0), ("CC", 0), ("A, C", 0), ("c", 0), ("(C", 0), ("Ｃ", 0), ("guitar", 0),
    ("E", 0), ("C or D", 0), ("<b>C</b>", 0), (".", 0), ("()", 0), ("\ud800", 0)])
def test_choice_answers(answer, right):
    assert data.accuracy_reward(f"<think>x</think><answer>{answer}</answer>", CHOICE) == right


@pytest.mark.parametrize("response, accuracy, form", [
    ("<think>x</think><answer>C</answer>", 1, 1), ("  <think>\nx\n</think>\n\n<answer> C </answer>\n", 1, 1), ("<answer>C</answer>", 1, 0),
    ("<think></think><answer></answer>", 0, 1), ("x <think>x</think><answer>C</answer>", 1, 0), ("<think>x</think><answer>C</answer>.", 1, 0),
    ("<think>x</think> so <answer>C</answer>", 1, 0), ("<answer>C</answer><think>x</think>", 1, 0),
    ("<think>x</think><answer>C</answer><answer>C</answer>", 0, 0), ("<think>x</think><answer>C", 0, 0), ("C", 0, 0), ("", 0, 0),
    ("<think>a</think>b</think><answer>C</answer>", 1, 0), ("<think>x</think><answer><answer>C</answer></answer>", 0, 0),
    ("<think><answer>C</answer></think>", 1, 0), ("</answer>C<answer>", 0, 0), ("<think></answer></think><answer>C", 0, 0),
    ("<think><think>x</think><answer>C</answer>", 1, 0), ("<THINK>x</THINK><ANSWER>C</ANSWER>", 0, 0),
    ("<think>x</think><answer>C</answer><time>1 to 2</time>", 1, 0)])
def test_format_and_single_answer(response, accuracy, form):
    assert (data.accuracy_reward(response, CHOICE), data.format_reward(response, CHOICE)) == (accuracy, form)
    assert data.task_reward(response, CHOICE) == (0.9 * accuracy + 0.1 * form, accuracy, form)


def test_ambiguous_words_and_letters_as_options():
    assert data.match_choice("same", ["same", "Same.", "x"]) is None
    assert data.match_choice("A", ["B", "A"]) == 0  # a letter is a letter first
    assert data.match_choice("(A) x", ["x", "y"]) == 0 and data.match_choice("(B) x", ["x", "y"]) is None


def test_mean_relative_accuracy_by_hand():
    for pred, want in ((100, 1), (95, 1), (94.9, 0.9), (105, 1), (150, 0.1), (150.1, 0), (75, 0.6), (-100, 0), (0, 0)):
        assert data.mean_relative_accuracy(pred, 100) == pytest.approx(want), pred
    assert [data.mean_relative_accuracy(p, 0) for p in (0, 0.1)] == [1, 0] and data.mean_relative_accuracy(-95, -100) == 1


@pytest.mark.parametrize("answer, want", [
    ("100", 1), ("100.0", 1), ("1e2", 1), ("+100 meters", 1), ("95", 1), ("100.", 1), ("100%", 1), ("about 100", 0), ("", 0), ("nan", 0), ("inf", 0),
    ("1e999", 0), ("٠١٠٠", 0), ("1_00", 0), ("0x64", 0), ("10,0", 0), ("--100", 0), (".", 0), ("9" * 100000, 0), ("100 or 7", 1)])
def test_number_answers(answer, want):
    assert data.accuracy_reward(f"<answer>{answer}</answer>", NUMBER) == want


def test_temporal_iou_by_hand():
    assert data.temporal_iou([(2, 6)], [(4, 10)], 20) == (0.25, 0.5)
    assert data.temporal_iou([(6, 2)], [(4, 10)], 20) == data.temporal_iou([], [(4, 10)], 20) == (0.0, 0.0)
    assert data.temporal_iou([(4, 6), (5, 8), (7, 10)], [(4, 10)], 20) == (1.0, 1.0)
    assert data.temporal_iou([(0, 99)], [(4, 10)], 20) == (6 / 20, 6 / 20)
    assert data.temporal_iou([(30, 40)], [(4, 10)], 20) == (0.0, 0.0)
    assert data.temporal_iou([(0, 2), (8, 12)], [(1, 3), (9, 10)], 20) == (pytest.approx(2 / 7), pytest.approx(1 / 3))
    assert data.temporal_iou([(float("nan"), 5), (1, float("inf"))], [(0, 5)], 5) == (0.8, 1.0)


def test_temporal_iou_equals_a_slow_count():
    rng = random.Random(0)
    for _ in range(200):
        spans = [[(a, a + rng.randint(0, 9)) for a in (rng.randint(-5, 30) for _ in range(rng.randint(0, 4)))] for _ in range(2)]
        cells = [{s for a, b in part for s in range(max(a, 0), min(b, 25))} for part in spans]
        both, either = len(cells[0] & cells[1]), len(cells[0] | cells[1])
        want = (both / either, both / len(cells[0])) if cells[0] else (0, 0)
        assert data.temporal_iou(*spans, 25) == pytest.approx(want)


@pytest.mark.parametrize("text, spans", [
    ("8.4 to 12.5, 25 to 30.2", [(8.4, 12.5), (25, 30.2)]), ("8.4s to 12.5s", [(8.4, 12.5)]), ("from 8.4 seconds to 12.5 seconds.", [(8.4, 12.5)]),
    ("8.4-12.5", [(8.4, 12.5)]), ("8.4 – 12.5", [(8.4, 12.5)]), ("[8.4 to 12.5]; (25 TO 30)", [(8.4, 12.5), (25, 30)]),
    ("1 to 2 and 3 to 4\n5 to 6", [(1, 2), (3, 4), (5, 6)]), ("12.5 to 8.4", []), ("inf to nan", []), ("0 to inf", []), ("٨ to ٩", []),
    ("8.4 to", []), ("8.4", []), ("1 to 2 to 3", []), ("1e3 to 2e3", []), ("", []), ("3 to 3", []), ("-2 to 3", [(-2, 3)]), ("1 to 2, x", [(1, 2)]),
    ("9" * 1000 + " to 5", []), (".5 to 1.", [(0.5, 1)])])
def test_span_shapes(text, spans):
    assert data.parse_spans(text) == spans


def test_a_span_is_at_most_60_characters_long():
    for length, found in ((60, [(1.0, 2.0)]), (61, [])):
        text = "1 to 2." + "0" * (length - len("1 to 2."))
        assert len(text) == length and data.parse_spans(text) == found


def test_grounding_rewards():
    full = "<think>x</think><answer>C</answer><time>2 to 6</time>"
    assert data.temporal_iou_reward(full, GROUND) == 0.25 and data.format_reward(full, GROUND) == 1
    assert data.task_reward(full, GROUND) == (pytest.approx(1.35), 1, 1)
    for response, form in (("<think>x</think><answer>C</answer>", 0), ("<think>x</think><time>2 to 6</time><answer>C</answer>", 0),
                           ("<think>x</think><answer>C</answer><time></time>", 1), ("<think>x</think><answer>C</answer><time>1 to 2</time>x", 0)):
        assert data.format_reward(response, GROUND) == form
    assert data.temporal_iou_reward(full + "<time>4 to 10</time>", GROUND) == 0


def test_hostile_responses_take_linear_time():
    n = 10 ** 6
    texts = ["<answer>" * (n // 8), "<answer>" + " " * n + "</answer>", "<answer>" + "9" * n + "</answer>", "<think>" * n, "<answer>" + "C." * n + "</answer>",
             "<time>" + "1 to 2," * (n // 7) + "</time>", "<time>" + " " * n + "</time>", "<time>" + "1" * n + "to" + "</time>", "(" * n, "</answer>" * n,
             "<answer>" + "1," * n + "</answer>", "<time>" + "and " * (n // 4) + "</time>", "<time>" + "1 to 2" + " " * n + "s</time>", "<think>" + "\n" * n]
    for text in texts:
        for sample in (CHOICE, NUMBER, GROUND):
            begin = time.monotonic()
            reward, *_ = data.task_reward(text, sample)
            assert 0 <= reward <= 2.1 and time.monotonic() - begin < 2


def fuzz_responses(count, seed=0):
    rng, pieces = random.Random(seed), ["<think>", "</think>", "<answer>", "</answer>", "<time>", "</time>", "C", "A guitar", "1 to 2", "100", "inf",
                                        "-", ",", " ", "\n", "(", ")", ".", "٣", "\0", "\ud800", "<|im_end|>", "nan", "1e999", "and", "9" * 50]
    for _ in range(count):
        response = "".join(rng.choice(pieces) if rng.random() < 0.9 else chr(rng.randrange(0x110000)) for _ in range(rng.randrange(25)))
        for sample in (CHOICE, NUMBER, GROUND, dataclasses.replace(CHOICE, options=[rng.choice(pieces) for _ in range(4)])):
            reward, accuracy, form = data.task_reward(response, sample)
            assert 0 <= accuracy <= 1 and form in (0, 1) and 0 <= reward <= 2.1


def test_fuzzed_responses():
    fuzz_responses(500)


def fuzz_records(folder, count, seed=0):
    rng = random.Random(seed)
    bases = [record(), record(problem_type="numerical", solution="3"),
             dict(question="q", video_path="a", options=list("abc"), answer="1", qtype="T", duration=5, time_clues=[[1, 2]]),
             dict(question="q", answer="x", negative_answers=list("abc"), video_source="s", video_basename="v", task_progress_metadata=[1],
                  current_observation_basename="i", duration=1.0),
             dict(question="q", answer="x", golden_choice_idx="A", choice_a="1", choice_b="2", choice_c="3", choice_d="4", video_source="s",
                  video_basename="v", task_progress_metadata=[], current_observation_basename="i")]
    junk = [None, "", "x", 3, -1, 1e300, float("nan"), True, [], {}, [[]], [None], ["A. a", "B. b"], "\ud800", "\0", "../x", "/", "A", "<answer>A</answer>",
            "<answer>", 10 ** 400, [[1, "2"]], [["a"]], "a" * 5000, ["", ""], "..", [1e9], [[float("inf"), 1]], "😀", "²", "1" * 50]
    loaded = 0
    for _ in range(count):
        fields = dict(rng.choice(bases))
        for _ in range(rng.randrange(4)):
            name = rng.choice([*fields, "crucial_step", "golden_choice_idx", "time_clues", "problem"])
            if rng.random() < 0.2:
                fields.pop(name, None)
            else:
                fields[name] = rng.choice(junk)
        text = json.dumps([fields])
        if rng.random() < 0.2:
            cut = rng.randrange(len(text))
            text = text[:cut] + (rng.choice("[]{},:\"0") + text[cut + 1:] if rng.random() < 0.5 else "")
        (folder / "f.json").write_text(text)
        try:
            for sample in data.load_samples(folder / "f.json", folder if rng.random() < 0.5 else None):
                data.prompt_text(sample, visual_of([(1, 2, 2)])).encode()
                data.task_reward("<think></think><answer>A</answer><time>1 to 2</time>", sample)
            loaded += 1
        except DataError as error:
            one_line(error, "f.json")
    return loaded


def test_fuzzed_records(tmp_path):
    assert 50 < fuzz_records(tmp_path, 500) < 450


# ------------------------------------------------------------------ the built-in task
def test_toy_video_shows_what_it_says():
    drawn = {shape: draw(*np.mgrid[:28, :28][::-1] / 13.5 - 1) for shape, draw in data._DRAW.items()}
    assert len(data.TOY_SHAPES) == 8 and data.TOY_COLOURS == ("red", "green", "blue", "yellow")
    for a in drawn:
        assert drawn[a].sum() > 200 and all((drawn[a] & drawn[b]).sum() < 0.6 * (drawn[a] | drawn[b]).sum() for b in drawn if b != a)
    for seed in range(5):
        frames, shapes, colours, cells = data.toy_video(np.random.default_rng(seed))
        assert frames.shape == (16, 3, 56, 56) and frames.dtype == torch.uint8
        assert sorted(shapes) == sorted(data.TOY_SHAPES) and sorted(colours) == sorted(data.TOY_COLOURS * 2)
        for step in range(8):
            difference = frames[2 * step].float() - frames[2 * step + 1].float()
            assert 24 < difference.std() < 29  # sqrt(2) x 20 grey levels
            top, left = 28 * (cells[step] // 2), 28 * (cells[step] % 2)
            cell = frames[2 * step, :, top:top + 28, left:left + 28].float().permute(1, 2, 0)
            shown = cell[torch.from_numpy(drawn[shapes[step]])].mean(0)
            assert (shown - torch.tensor(data._PAINT[colours[step]])).abs().max() < 12


def test_toy_data_is_deterministic_whole_and_found_both_ways(tmp_path):
    data.make_toy_data(tmp_path / "a", (3, 2), 4, seed=5)
    data.make_toy_data(tmp_path / "b", (3, 2), 4, seed=5)
    names = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*"))
    assert len(names) == 8 and names == sorted(str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*"))
    for name in names:
        if not (tmp_path / "a" / name).is_dir():
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.*")}
    data.make_toy_data(tmp_path / "a", (3, 2), 4, seed=5)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.*")}
    train = data.load_samples(tmp_path / "a/train.json")
    assert len(train) == 12 and len(data.load_samples(tmp_path / "a/test.json")) == 8
    for root in (tmp_path / "a", tmp_path / "a/videos"):
        assert [s.video for s in data.load_samples(tmp_path / "a/train.json", root)] == [s.video for s in train]
    for sample in train[::4]:
        frames, shapes, colours, _ = data.toy_video(np.random.default_rng([5, 0, train.index(sample) // 4]))
        read, seconds, duration = data.sample_frames(sample.video, 1, 16)
        assert torch.equal(read, frames) and (seconds, duration) == (2.0, 16.0)
    for i, sample in enumerate(train):
        _, shapes, colours, _ = data.toy_video(np.random.default_rng([5, 0, i // 4]))
        assert sample.question == f"what colour is the {shapes[sample.crucial_step]} ?"
        assert sample.options[ord(sample.answer) - 65] == colours[sample.crucial_step]


def test_toy_words_and_responses(tmp_path):
    words, rng, seen = set(data.toy_vocabulary()), np.random.default_rng(0), set()
    assert len(words) == len(data.toy_vocabulary()) < 100
    for shape in data.TOY_SHAPES:
        for colour in data.TOY_COLOURS:
            response = data.toy_response(shape, colour, rng)
            tokens = data.re.findall(data.TOY_TOKEN, response)
            assert set(tokens) <= words and response.split() == tokens and 8 <= len(tokens) <= 13
            assert tokens[tokens.index(colour) - 1] == shape
            seen.add(" ".join(tokens[1:tokens.index(shape)]))
            sample = Sample("", "", list(data.TOY_COLOURS), "ABCD"[data.TOY_COLOURS.index(colour)], "choice")
            assert data.task_reward(response, sample) == (1.0, 1, 1)
            prompt = data.prompt_text(dataclasses.replace(sample, question=f"what colour is the {shape} ?"), None)
            assert set(data.re.findall(data.TOY_TOKEN, prompt)) <= words
    assert seen == {"the", "i see a", "there is a", "look at the video : a"}


# ============================================================================ model_utils.py

WORDS = "the a star red blue A B C D <think> </think> <answer> </answer> ? : .".split() + [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def tiny():
    """(model, plain, tokenizer): the tiny model with random weights, and transformers' own eager twin of it."""
    model, tokenizer = model_utils.tiny_model(WORDS, seed=1)
    plain = Qwen2_5_VLForConditionalGeneration._from_config(copy.deepcopy(model.config), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    return model, plain.eval(), tokenizer


def make_prompt(config, grids, text_length, seed, image_grids=()):
    """A prompt of random words around videos of the given grids (t, h, w), then images."""
    rng = torch.Generator().manual_seed(seed)
    ids, steps = [1, 9, 3], [-1] * 3
    for token, group in ((config.video_token_id, grids), (config.image_token_id, image_grids)):
        for t, h, w in group:
            n = h * w // 4
            ids += [config.vision_start_token_id] + [token] * (t * n) + [config.vision_end_token_id]
            steps += [-1] + ([s for s in range(t) for _ in range(n)] if token == config.video_token_id else [-1] * n) + [-1]
    words = torch.randint(8, len(WORDS), (text_length,), generator=rng).tolist()
    patches = torch.randn(sum(t * h * w for t, h, w in [*grids, *image_grids]), 1176, generator=rng)
    return SimpleNamespace(input_ids=torch.tensor(ids + words), patches=patches, masked_patches=None,
                           video_grids=list(grids), image_grids=list(image_grids), seconds_per_grid=[1.25] * len(grids),
                           frame_of_token=torch.tensor(steps + [-1] * text_length), num_steps=sum(g[0] for g in grids))


def prompts_of(config):
    """Different lengths, grids and frame counts; the last but one has a picture as well, the last no video at all."""
    return [make_prompt(config, [(3, 4, 4)], 5, 0), make_prompt(config, [(1, 4, 8)], 12, 1),
            make_prompt(config, [(4, 8, 12)], 2, 2), make_prompt(config, [(2, 4, 4)], 7, 3, [(1, 6, 4)]),
            make_prompt(config, [], 9, 4)]


def uniforms(prompts, group_size, length, seed=0):
    return torch.rand(len(prompts), group_size, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_forward(plain, prompt, response, temperature, layers=2):
    """transformers' own full forward over prompt + response, with our positions: log-probabilities [R] of the sampling
    distribution, its logits [R, V], and the attention to visual steps [R, F] from a full eager pass."""
    config, P = plain.config, len(prompt.input_ids)
    positions, start = model_utils.mrope_positions(prompt.input_ids, prompt.video_grids, prompt.image_grids,
                                                   prompt.seconds_per_grid, config)
    after = (start + torch.arange(len(response))).expand(3, -1)
    split = sum(t * h * w for t, h, w in prompt.video_grids)
    visual = {}
    if prompt.video_grids:
        visual |= dict(pixel_values_videos=prompt.patches[:split], video_grid_thw=torch.tensor(prompt.video_grids))
    if prompt.image_grids:
        visual |= dict(pixel_values=prompt.patches[split:], image_grid_thw=torch.tensor(prompt.image_grids))
    output = plain(input_ids=torch.cat([prompt.input_ids, response])[None], output_attentions=True, use_cache=False,
                   position_ids=torch.cat([positions, after], 1)[:, None], **visual)
    logits = output.logits[0, P - 1:-1] / temperature
    logits[:, [config.video_token_id, config.image_token_id, config.vision_start_token_id, config.vision_end_token_id]] = -torch.inf
    attention = torch.stack([a[0].mean(0)[P - 1:-1] for a in output.attentions[-layers:]]).mean(0)  # [R, P + R]
    steps = torch.stack([attention[:, :P][:, prompt.frame_of_token == f].mean(1) for f in range(prompt.num_steps)], 1) \
        if prompt.num_steps else torch.zeros(len(response), 0)
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0], logits, steps


def test_positions_by_hand(tiny):
    config = tiny[0].config
    v, i, t = config.video_token_id, config.image_token_id, 9
    def check(ids, videos, images, seconds, expected, following):
        positions, start = model_utils.mrope_positions(torch.tensor(ids), videos, images, seconds, config)
        assert positions.tolist() == expected and start == following
    check([t, t] + [v] * 4 + [t], [(2, 2, 4)], [], [1.5],
          [[0, 1, 2, 2, 5, 5, 6], [0, 1, 2, 2, 2, 2, 6], [0, 1, 2, 3, 2, 3, 6]], 7)
    # 22 s at 16 frames: steps of 2.75 s at 2 tokens a second; the text goes on after the last step, not after h and w
    check([t] + [v] * 3 + [t], [(3, 2, 2)], [], [2.75], [[0, 1, 6, 12, 13], [0, 1, 1, 1, 13], [0, 1, 1, 1, 13]], 14)
    check([t] + [i] * 6 + [t], [], [(1, 4, 6)], [], [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]], 5)
    check([t, v, t, i, i, t], [(1, 2, 2)], [(1, 2, 4)], [0.3], [[0, 1, 2, 3, 3, 5], [0, 1, 2, 3, 3, 5], [0, 1, 2, 3, 4, 5]], 6)
    check([t, t], [], [], [], [[0, 1]] * 3, 2)
    for ids, videos, seconds in (([t, v], [(2, 2, 2)], [1.0]), ([t], [(1, 2, 2)], [1.0]), ([v, v], [(1, 2, 2)], [1.0])):
        with pytest.raises(ValueError, match="grids"):
            model_utils.mrope_positions(torch.tensor(ids), videos, [], seconds, config)


def test_positions_start_the_text_where_the_model_was_trained(tiny):
    """transformers' get_rope_index agrees up to the end of the video; after it, we resume at the largest position + 1."""
    model, prompt = tiny[0], make_prompt(tiny[0].config, [(3, 4, 4)], 5, 0)
    kinds = (prompt.input_ids == model.config.video_token_id).int() * 2
    theirs, _ = model.model.get_rope_index(prompt.input_ids[None], kinds[None], video_grid_thw=torch.tensor([(3, 4, 4)]),
                                           second_per_grid_ts=torch.tensor([2.0]))
    ours, _ = model_utils.mrope_positions(prompt.input_ids, [(3, 4, 4)], [], [2.0], model.config)
    end = kinds.nonzero().max() + 1
    assert torch.equal(theirs[:, 0, :end], ours[:, :end])
    assert ours[0, end] == ours[:, :end].max() + 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_equals_plain_eager_forward(tiny, temperature):
    """Decoded = teacher-forced, padded = unpadded, together = alone, frame attention = full eager attention."""
    model, plain, _ = tiny
    prompts = prompts_of(model.config)
    encoded, numbers = model_utils.encode_prompts(model, prompts), uniforms(prompts, 3, 12)
    together = model_utils.rollout(model, encoded, numbers, temperature=temperature, attention_layers=2)
    for i, (prompt, group) in enumerate(zip(prompts, together)):
        alone, = model_utils.rollout(model, encoded[i:i + 1], numbers[i:i + 1], temperature=temperature, attention_layers=2)
        assert torch.equal(alone.response_ids, group.response_ids) and torch.equal(alone.response_mask, group.response_mask)
        torch.testing.assert_close(alone.log_probs, group.log_probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.frame_attention, group.frame_attention, rtol=0, atol=1e-7)
        assert group.frame_attention.shape == (3, group.response_ids.shape[1], prompt.num_steps)
        for g in range(3):
            real = group.response_mask[g]
            response = group.response_ids[g][real]
            with torch.no_grad():
                log_probs, logits, attention = plain_forward(plain, prompt, response, temperature)
            torch.testing.assert_close(group.log_probs[g][real], log_probs, rtol=0, atol=1e-5)
            p = logits.softmax(-1).double()
            torch.testing.assert_close(group.entropy[g][real].double(), -(p * p.clamp(min=1e-300).log()).sum(-1), rtol=0, atol=1e-5)
            torch.testing.assert_close(group.frame_attention[g][real], attention, rtol=0, atol=1e-7)
            cumulative = logits.double().softmax(-1).cumsum(-1)  # the token at which the distribution passes the number
            chosen = (cumulative > numbers[i, g, :len(response), None]).int().argmax(-1)
            assert torch.equal(chosen, response)
            assert (group.log_probs[g][~real] == 0).all() and (group.frame_attention[g][~real] == 0).all()


def test_reading_attention_does_not_change_the_samples(tiny):
    model, prompts = tiny[0], prompts_of(tiny[0].config)[:2]
    encoded, numbers = model_utils.encode_prompts(model, prompts), uniforms(prompts, 2, 8)
    for read, unread in zip(*(model_utils.rollout(model, encoded, numbers, attention_layers=n) for n in (2, 0))):
        assert torch.equal(read.response_ids, unread.response_ids) and torch.equal(read.log_probs, unread.log_probs)
        assert (unread.frame_attention == 0).all() and (read.frame_attention[read.response_mask] > 0).any()


def test_blocks_of_columns_change_nothing(tiny, monkeypatch):
    model, prompts = tiny[0], prompts_of(tiny[0].config)
    encoded, numbers = model_utils.encode_prompts(model, prompts), uniforms(prompts, 3, 12)
    whole = model_utils.rollout(model, encoded, numbers, attention_layers=2)
    monkeypatch.setattr(model_utils, "BLOCK", 5)
    for a, b in zip(whole, model_utils.rollout(model, encoded, numbers, attention_layers=2)):
        assert torch.equal(a.response_ids, b.response_ids)
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.frame_attention, b.frame_attention, rtol=0, atol=1e-7)


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_decoding_step_can_be_recorded(tiny, evaluating):
    """What a CUDA graph forbids: no step reads a value back to the host (the loop alone does, once a step on a CPU),
    makes a constant from Python numbers or lets a shape depend on values; the operations of all steps are the same."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    model, prompts = tiny[0], prompts_of(tiny[0].config)[:2]
    encoded, calls = model_utils.encode_prompts(model, prompts), []
    choose = evaluate.evaluation_decoding(encoded, model.config.text_config.vocab_size) if evaluating else None
    numbers = torch.full((2, 2, 10), 0.5, dtype=torch.float64)
    for length in 3, 6, 9:
        with Count() as count:
            rollouts = model_utils.rollout(model, encoded, numbers[:, :, :length], attention_layers=2, choose=choose)
        assert max(r.response_ids.shape[1] for r in rollouts) == length  # else there were fewer steps
        calls.append(count.calls)
    three = calls[1] - calls[0]
    assert three == calls[2] - calls[1] and three["aten::index_copy_"] > 3 * 5
    for name in "lift_fresh", "nonzero", "_unique2", "masked_select", "scalar_tensor", "full":
        assert three[f"aten::{name}"] == 0, name
    assert three["aten::_local_scalar_dense"] == 3


def test_decoding_in_bf16_away_from_the_cpu(tiny):
    """On the meta device, which computes shapes and types alone, the GPU's branches run without a value read back in any
    step and without a tensor that was left on the CPU; only the lengths at the end are asked for."""
    model, prompts = copy.deepcopy(tiny[0]), prompts_of(tiny[0].config)[:2]
    encoded = model_utils.encode_prompts(model, prompts)
    model.to("meta", torch.bfloat16)
    encoded = [dataclasses.replace(e, **{name: x.to("meta") for name, x in vars(e).items() if torch.is_tensor(x)}) for e in encoded]
    with pytest.raises(RuntimeError, match="meta") as caught:
        model_utils.rollout(model, encoded, torch.zeros(2, 2, 6, dtype=torch.float64), attention_layers=2)
    assert any("length = int(own.max())" in str(entry.statement) for entry in caught.traceback)


def test_rows_stop_at_their_own_end_token(tiny):
    """The end token stays in the mask; what a row decodes after it does not."""
    model, prompts = tiny[0], prompts_of(tiny[0].config)[:2]
    ends = model_utils.end_token_ids(model)
    assert len(ends) == 2
    script, steps = {(0, 2): ends[0], (1, 0): ends[1], (3, 4): ends[0]}, iter(range(6))  # row 2 never ends
    def choose(logits, ids):
        step = next(steps)
        return torch.tensor([script.get((row, step), torch.tensor(20)) for row in range(4)])
    first, second = model_utils.rollout(model, model_utils.encode_prompts(model, prompts),
                                        uniforms(prompts, 2, 6), choose=choose)
    assert first.response_mask.tolist() == [[True] * 3, [True, False, False]]
    assert second.response_mask.tolist() == [[True] * 6, [True] * 5 + [False]]
    assert first.response_ids.tolist() == [[20, 20, ends[0]], [ends[1], 0, 0]]


def test_packed_equals_plain_forward_and_gradient(tiny):
    """Log-probabilities and gradients of one packed sequence = those of G full sequences."""
    model, plain, _ = tiny
    plain = copy.deepcopy(plain).requires_grad_(True)
    plain.model.visual.requires_grad_(False)
    for n, prompt in enumerate(prompts_of(model.config)):
        policy = model_utils.Policy(model, temperature=0.8)
        ids = torch.randint(8, 40, (4, 7), generator=torch.Generator().manual_seed(n))
        mask = torch.arange(7) < torch.tensor([7, 1, 4, 6])[:, None]
        upstream = torch.randn(4, 7, generator=torch.Generator().manual_seed(n))
        encoded = model_utils.encode_prompts(model, [prompt])[0]
        log_probs, kept = policy(encoded, ids, mask, keep_logits=True)
        (log_probs * upstream).sum().backward()
        plain.zero_grad()
        for g in range(4):
            expected, logits, _ = plain_forward(plain, prompt, ids[g][mask[g]], 0.8)
            (expected * upstream[g][mask[g]]).sum().backward()
            torch.testing.assert_close(log_probs[g][mask[g]], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(kept[g][mask[g]], logits, rtol=0, atol=1e-5)
        assert (log_probs[~mask] == 0).all()
        theirs = dict(plain.named_parameters())
        for name, parameter in policy.named_parameters():
            other = theirs["lm_head.weight" if name == "lm_head.weight" else "model." + name].grad
            scale = other.abs().max().clamp(min=1e-3)
            assert (parameter.grad - other).abs().max() <= 1e-5 * scale, name


def test_patches_by_a_matrix_product(tiny):
    """What replaces the convolution on a GPU."""
    model, prompts = tiny[0], prompts_of(tiny[0].config)
    twin = copy.deepcopy(model)
    model_utils.multiply_patches(twin)
    for ours, theirs in zip(model_utils.encode_prompts(twin, prompts), model_utils.encode_prompts(model, prompts)):
        torch.testing.assert_close(ours.visual_embeds, theirs.visual_embeds, rtol=0, atol=1e-5)


def test_padding_has_no_gradient_and_changes_nothing(tiny):
    model, prompt = tiny[0], prompts_of(tiny[0].config)[0]
    policy, encoded = model_utils.Policy(model), model_utils.encode_prompts(model, [prompt])[0]
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    ids = torch.randint(8, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    other = torch.where(mask, ids, 50)  # word 50 stands in the padding alone
    assert torch.equal(policy(encoded, ids, mask)[0], policy(encoded, other, mask)[0])
    before = policy(encoded, other, mask)[0].sum()
    before.backward()
    wider = policy(encoded, torch.cat([other, torch.full((2, 3), 50)], 1), torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1))[0]
    torch.testing.assert_close(wider.sum(), before)


def test_a_wish_for_visual_tokens_does_not_break_training(tiny):
    """A model that would say nothing but <|video_pad|> never does, and its update stays finite."""
    model = copy.deepcopy(tiny[0])
    prompt = prompts_of(model.config)[0]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied: the input stays as it is
    with torch.no_grad():
        model.lm_head.weight[model.config.video_token_id] *= 1e4
        model.lm_head.weight[model.config.image_token_id] *= -1e4
    encoded = model_utils.encode_prompts(model, [prompt])[0]
    group, = model_utils.rollout(model, [encoded], uniforms([prompt], 4, 8))
    visual = torch.tensor([model.config.video_token_id, model.config.image_token_id])
    assert not torch.isin(group.response_ids, visual).any() and group.log_probs.isfinite().all()
    policy = model_utils.Policy(model)
    log_probs, _ = policy(encoded, group.response_ids, group.response_mask)
    log_probs.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())
    torch.testing.assert_close(log_probs, group.log_probs, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(tiny):
    model, prompt = tiny[0], prompts_of(tiny[0].config)[0]
    ids, mask = torch.randint(8, 40, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    gradients = []
    for checkpointing in (False, True):
        policy = model_utils.Policy(model)
        if checkpointing:
            model_utils.recompute_activations(policy.language_model)
        policy(model_utils.encode_prompts(model, [prompt])[0], ids, mask)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_checkpoint_is_an_ordinary_folder(tiny, tmp_path):
    model, _, tokenizer = tiny
    model_utils.save_checkpoint(tmp_path / "model", model, tokenizer, None)
    loaded, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert AutoConfig.from_pretrained(tmp_path / "model").model_type == "qwen2_5_vl"
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.chat_template == tokenizer.chat_template and again("the star red ?").input_ids == tokenizer("the star red ?").input_ids
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())["patch_size"] == 14


def test_a_model_that_cannot_be_used_gets_one_line(tiny, tmp_path):
    model, _, tokenizer = tiny
    cpu = torch.device("cpu")
    with pytest.raises(model_utils.RunError, match="no such folder"):
        model_utils.load_model(str(tmp_path / "nothing"), cpu)
    model_utils.save_checkpoint(tmp_path / "model", model, tokenizer, None)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(model_utils.RunError, match="type gpt2"):
        model_utils.load_model(str(tmp_path / "gpt2"), cpu)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(model_utils.RunError, match="lack 1 tensors"):
        model_utils.load_model(str(tmp_path / "model"), cpu)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(model_utils.RunError) as caught:
        model_utils.load_model(str(tmp_path / "model"), cpu)
    assert "\n" not in str(caught.value)


# ============================================================================ training

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The built-in task with few videos, and its warmed-up model: with random weights every reward would be 0."""
    folder = tmp_path_factory.mktemp("toy")
    data.make_toy_data(folder, videos=(24, 6))
    appo.prepare_built_in(appo.Settings(toy_folder=str(folder), model=str(folder / "model"), data="none", **appo.TINY))
    return folder


def options(toy, output, **more):
    base = dict(model=toy / "model", data=toy / "train.json", output=output, readers=1, prompts_per_step=4, group_size=4,
                rollout_groups=1, steps=3)
    return [word for name, value in (base | more).items() for word in
            ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def train(toy, output, weigh=appo.weigh_tokens, **more):
    settings = appo.parse_settings(appo.Parser(appo.Settings, allow_abbrev=False), options(toy, output, **more))
    appo.train(settings, weigh)
    return metrics_of(output)


def metrics_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def command(arguments, processes=0, **more):
    start = [sys.executable] + ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] * bool(processes)
    return dict(args=start + [str(Path(appo.__file__))] + arguments, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)


TIMES = {"seconds", "samples_per_second", "tokens_per_second"}


def same(a, b, rtol=0.0, ignore=()):
    """The same metrics, times and speeds aside; the gap of two roundings has no relative meaning."""
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert one.keys() == other.keys()
        for name in one.keys() - TIMES - set(ignore):
            assert one[name] == pytest.approx(other[name], rel=rtol, abs=rtol * 1e-2), (one["step"], name)


def weights_of(output):
    return load_file(output / "checkpoint" / "model.safetensors")


def same_weights(a, b, atol=0.0):
    for name, weight in weights_of(a).items():
        torch.testing.assert_close(weight, weights_of(b)[name], rtol=0, atol=atol)


def test_first_command_in_miniature(toy, tmp_path):
    """`torchrun appo.py` on an existing built-in folder: the run, its last lines, its files, an ordinary checkpoint."""
    for name in ("train.json", "test.json", "videos", "model"):
        (tmp_path / "toy").mkdir(exist_ok=True)
        (tmp_path / "toy" / name).symlink_to(toy / name)
    arguments = ["--toy_folder", "toy", "--data", "toy/train.json", "--eval_data", "toy/test.json", "--steps", "2",
                 "--prompts_per_step", "4", "--eval_every", "1", "--save_every", "1", "--keep", "1"]
    done = subprocess.run(**command(arguments, processes=1, cwd=tmp_path))
    assert done.returncode == 0, done.stdout
    for words in ("held-out accuracy", "true frame among a response's top 2", "samples per second", "checkpoint", "next"):
        assert words in done.stdout
    output = tmp_path / "runs" / "appo"
    metrics = metrics_of(output)
    assert [line["step"] for line in metrics] == [1, 2]
    assert {"loss", "reward", "accuracy", "format", "response_length", "truncated", "zero_variance_groups", "crucial_frames",
            "token_weight_mean", "token_weight_max", "entropy", "approx_kl", "clip_fraction", "grad_norm",
            "rollout_logprob_gap", "samples_per_second", "tokens_per_second", "seconds", "skipped"} <= metrics[0].keys()
    assert all(line["rollout_logprob_gap"] < 1e-4 and line["grad_norm"] > 0 for line in metrics)
    settings = json.loads((output / "config.json").read_text())["settings"]
    assert settings["k1"] == 4 and settings["alpha"] == 1.7 and settings["learning_rate"] == 3e-4
    assert [json.loads(line)["step"] for line in open(output / "held_out.jsonl")] == [0, 1, 2]
    assert [path.name for path in output.glob("step-*")] == ["step-000002"]
    group = json.loads((output / "samples.jsonl").read_text().splitlines()[0])
    assert len(group["responses"]) == 8 and len(group["responses"][0]["tokens"]) == len(group["responses"][0]["weights"])
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(output / "checkpoint", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_same_seed_same_numbers_and_an_earlier_run_is_kept(toy, tmp_path):
    first = train(toy, tmp_path / "run")
    second = train(toy, tmp_path / "run")
    other = train(toy, tmp_path / "other", seed=1)
    same(first, second)
    same(first, metrics_of(tmp_path / "run.1"))
    same_weights(tmp_path / "run", tmp_path / "run.1")
    assert first[0]["loss"] != other[0]["loss"]


def test_alpha_zero_is_dapo(toy, tmp_path):
    appo_run, dapo_run = train(toy, tmp_path / "a", alpha=0), train(toy, tmp_path / "d", algorithm="dapo")
    same(appo_run, dapo_run)
    same_weights(tmp_path / "a", tmp_path / "d")
    weighted = train(toy, tmp_path / "w")
    assert weighted[0]["token_weight_max"] > 1.5 and weighted[0]["crucial_frames"] > 0
    # the first rollout is the same: reading attention changes no sample
    assert weighted[0]["reward"] == dapo_run[0]["reward"] and weighted[0]["entropy"] == dapo_run[0]["entropy"]


def test_what_is_not_computed_has_no_gradient(toy, tmp_path, monkeypatch):
    """Groups whose responses are all right or all wrong: left out of the passes, the same weights come out, bit for bit."""
    less = train(toy, tmp_path / "less", updates_per_batch=2, prompts_per_step=8)
    assert 0 < less[0]["zero_variance_groups"] < 1
    monkeypatch.setattr(appo, "learns", lambda group, s: True)
    all_of_them = train(toy, tmp_path / "all", updates_per_batch=2, prompts_per_step=8)
    same_weights(tmp_path / "less", tmp_path / "all")
    same(less, all_of_them, ignore=["approx_kl", "clip_fraction", "rollout_logprob_gap", "token_weight_mean", "token_weight_max"])


def test_a_batch_without_a_gradient_keeps_the_momentum(toy, tmp_path, monkeypatch):
    """The optimizer steps with a gradient of 0, as if the groups had been computed."""
    reward = iter([1.0, 0.0] * 8 + [1.0] * 1000)  # right and wrong in the first step alone
    monkeypatch.setattr(data, "task_reward", lambda text, sample: (next(reward), 1.0, 1.0))
    one = train(toy, tmp_path / "less")
    assert [line["zero_variance_groups"] for line in one] == [0, 1, 1] and one[1]["grad_norm"] == 0 == one[1]["loss"]
    reward = iter([1.0, 0.0] * 8 + [1.0] * 1000)
    monkeypatch.setattr(appo, "learns", lambda group, s: True)
    train(toy, tmp_path / "all")
    same_weights(tmp_path / "less", tmp_path / "all")


@pytest.mark.parametrize("algorithm", list(appo.PRESETS))
def test_every_algorithm_rises(toy, tmp_path, algorithm):
    accuracy = [line["accuracy"] for line in train(toy, tmp_path / "run", algorithm=algorithm, steps=14, prompts_per_step=8,
                                                   group_size=8, rollout_groups=8)]
    assert sum(accuracy[-5:]) / 5 > sum(accuracy[:5]) / 5 + 0.03


def test_grouped_decoding_changes_only_rounding(toy, tmp_path):
    same(train(toy, tmp_path / "one", steps=1), train(toy, tmp_path / "four", steps=1, rollout_groups=4), rtol=1e-4,
         ignore=["rollout_logprob_gap"])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_do_not_change_the_numbers(toy, tmp_path, processes):
    """6 prompts over 2 or 4 processes (uneven: dummies), an unreadable video, dynamic groups of every size."""
    broken_data(toy, tmp_path, broken=1)
    more = dict(steps=3, prompts_per_step=6, data=tmp_path / "broken.json", algorithm="appo",
                minibatch_prompts=3, updates_per_batch=1, eval_data=toy / "test.json")
    done = subprocess.run(**command(options(toy, tmp_path / "many", **more), processes))
    assert done.returncode == 0, done.stdout
    one = train(toy, tmp_path / "one", **more)
    same(one, metrics_of(tmp_path / "many"), rtol=1e-4, ignore=["rollout_logprob_gap"])
    same_weights(tmp_path / "one", tmp_path / "many", atol=1e-5)
    assert sum(line["skipped"] for line in one) > 0
    for name in ("samples.jsonl", "held_out.jsonl"):
        assert len((tmp_path / "one" / name).read_text().splitlines()) == len((tmp_path / "many" / name).read_text().splitlines())


def broken_data(toy, folder, broken):
    """An annotation of 12 samples, the videos of the first `broken` damaged."""
    records = json.loads((toy / "train.json").read_text())[::4][:12]
    (folder / "videos").mkdir(exist_ok=True)
    for number, record in enumerate(records):
        whole = (toy / record["path"]).read_bytes()
        (folder / record["path"]).write_bytes(whole[:700] if number < broken else whole)
    (folder / "broken.json").write_text(json.dumps(records))


def test_unreadable_videos_are_left_out_and_listed(toy, tmp_path):
    broken_data(toy, tmp_path, broken=1)
    metrics = train(toy, tmp_path / "run", data=tmp_path / "broken.json", eval_data=tmp_path / "broken.json", steps=6)
    count = len(json.loads((tmp_path / "broken.json").read_text()))
    assert [log["samples"] for log in model_utils.read_log(tmp_path / "run" / "held_out.jsonl")] == [count - 1] * 2
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sum(line["skipped"] for line in metrics) == len(skipped) == 2  # two epochs
    assert {record["id"] for record in skipped} == {"broken.json:0"} and all(record["unreadable"] for record in skipped)
    assert all(line["groups"] + line["skipped"] == 4 for line in metrics)
    broken_data(toy, tmp_path, broken=6)
    with pytest.raises(model_utils.RunError, match="over 5%"):
        train(toy, tmp_path / "worse", data=tmp_path / "broken.json", steps=6)


def test_long_prompts_are_dropped_and_counted(toy, tmp_path):
    metrics = train(toy, tmp_path / "run", steps=1, max_prompt_tokens=20)
    assert metrics[0]["skipped"] == 4 and metrics[0]["groups"] == 0 and metrics[0]["grad_norm"] == 0


def test_missing_videos_stop_the_run_before_it_starts(toy, tmp_path, capsys):
    records = json.loads((toy / "train.json").read_text())[:16]
    records[3]["path"] = "videos/nowhere.avi"
    (tmp_path / "missing.json").write_text(json.dumps(records))
    more = dict(data=tmp_path / "missing.json", video_root=toy, steps=1)
    with pytest.raises(data.DataError, match="1 files are missing"):
        train(toy, tmp_path / "run", **more)
    assert "nowhere.avi" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert train(toy, tmp_path / "run", skip_missing=True, **more)[0]["groups"] == 4


def test_gradients_that_are_not_finite_are_not_applied(toy, tmp_path):
    """Weights that are not a number in the first two steps: nothing changes; in three steps in a row: the run stops."""
    def poison(group, logits, s):
        return torch.full(group.rollout.response_mask.shape, torch.nan) if group.position < 8 else None
    metrics = train(toy, tmp_path / "run", weigh=poison, warmup_steps=0)
    assert [math.isfinite(line["grad_norm"]) for line in metrics] == [False, False, True]
    clean = train(toy, tmp_path / "clean", weigh=lambda *_: None, warmup_steps=0)
    assert metrics[1]["entropy"] != clean[1]["entropy"] and all(w.isfinite().all() for w in weights_of(tmp_path / "run").values())
    with pytest.raises(model_utils.RunError, match="3 steps in a row, with samples.*train.json:"):
        train(toy, tmp_path / "stop", weigh=lambda group, *_: torch.full(group.rollout.response_mask.shape, torch.nan))


def test_minibatches_keep_the_old_policy_of_the_batch(toy, tmp_path):
    """Several optimizer steps on a batch: ratio and clip act, but the old log-probabilities are those of sampling."""
    more = dict(steps=2, prompts_per_step=4, learning_rate=3e-3, warmup_steps=0)
    whole = train(toy, tmp_path / "whole", updates_per_batch=1, **more)
    parts = train(toy, tmp_path / "parts", updates_per_batch=2, minibatch_prompts=1, **more)
    assert whole[0]["approx_kl"] == whole[0]["clip_fraction"] == 0
    assert parts[0]["approx_kl"] > 1e-4 and parts[0]["clip_fraction"] > 0
    assert parts[0]["rollout_logprob_gap"] < 1e-5 and parts[1]["rollout_logprob_gap"] < 1e-5


def test_dynamic_sampling_fills_the_batch(toy, tmp_path):
    plain = train(toy, tmp_path / "plain", algorithm="dapo")
    filled = train(toy, tmp_path / "filled", algorithm="dapo", dynamic_sampling=True, max_resamples=6)
    assert any(line["zero_variance_groups"] > 0 for line in plain)
    assert all(line["groups"] == 4 and 0 < line["accuracy"] < 1 for line in filled)
    for group in map(json.loads, (tmp_path / "filled" / "samples.jsonl").read_text().splitlines()):
        assert len({response["accuracy"] for response in group["responses"]}) == 2
    starved = train(toy, tmp_path / "starved", algorithm="dapo", dynamic_sampling=True, max_resamples=0, group_size=2)
    assert any(line["groups"] < 4 for line in starved)


def test_overlong_penalty():
    lengths = torch.tensor([1, 80, 81, 90, 100])
    assert appo.overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.05, -0.5, -1])
    assert appo.overlong_penalty(lengths, 100, 0).tolist() == [0] * 5


@pytest.mark.parametrize("algorithm", list(appo.PRESETS))
def test_gradient_of_the_objective_by_finite_differences(tiny, algorithm):
    """The whole objective through the tiny model, all constants of the loss held fixed: slope along a direction."""
    model, s = tiny[0], appo.Settings(**appo.PRESETS[algorithm])
    prompt = prompts_of(model.config)[0]
    encoded = model_utils.encode_prompts(model, [prompt])[0]
    masked = model_utils.encode_prompts(model, [prompt], [prompt.patches * 0])[0]
    group, = model_utils.rollout(model, [encoded], uniforms([prompt], 4, 6), attention_layers=2)
    policy = model_utils.Policy(model)
    mask, ids = group.response_mask, group.response_ids
    with torch.no_grad():
        start, logits = policy(encoded, ids, mask, keep_logits=True)
        old, ref = start + 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0)), start - 0.3
        masked_log_probs = policy(masked, ids, mask)[0]
        weights = appo.perception_token_weights(group.frame_attention, logits, mask, torch.tensor([True, False, True]), alpha=s.alpha)
    advantages = torch.tensor([1.0, -0.5, 0.25, -0.75])

    def objective():
        log_probs = policy(encoded, ids, mask)[0]
        loss, _ = appo.clipped_surrogate_loss(log_probs, old, advantages, mask, token_weights=weights, clip_high=s.clip_high,
                                              ref_log_probs=ref, kl_coef=s.kl_coef, average=s.average)
        return loss + appo.perception_loss(log_probs, masked_log_probs, mask, gamma=s.gamma, eta=s.eta, average=s.average)[0]

    objective().backward()
    generator = torch.Generator().manual_seed(1)
    direction = [p.grad / p.grad.norm() + 0.1 * torch.randn(p.shape, generator=generator) / p.numel() ** 0.5
                 for p in policy.parameters()]
    slope = sum((p.grad * d).sum().item() for p, d in zip(policy.parameters(), direction))
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(policy.parameters(), direction):
                p += sign * 1e-3 * d
            values.append(objective().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)


@pytest.mark.parametrize("arguments, words", [
    (["--colour", "red"], "--colour"),
    (["--k3", "0"], "--k3 0"),
    (["--clip_low", "-0.1"], "--clip_low -0.1"),
    (["--clip_low", "1.5"], "--clip_low 1.5"),
    (["--beta2", "1"], "--beta2 1"),
    (["--learning_rate", "nan"], "--learning_rate nan"),
    (["--strategy", "medium"], "medium"),
    (["--algorithm", "ppo"], "ppo"),
    (["--k1", "many"], "--k1"),
    (["--min_pixels", "50000", "--max_pixels", "4000"], "--min_pixels"),
    (["--overlong_buffer", "600"], "--overlong_buffer 600"),
    (["--minibatch_prompts", "5"], "--minibatch_prompts 5"),
    (["--data", "nowhere.json"], "nowhere.json"),
    (["--video_root", "nowhere"], "nowhere"),
    (["--model", "./nowhere"], "nowhere"),
    (["--resume", "--output", "nowhere"], "nowhere"),
])
def test_a_mistake_gets_one_line_and_exit_code_2(toy, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    given = dict(zip(arguments[::2], arguments[1::2]))
    base = {"--model": str(toy / "model"), "--data": str(toy / "train.json"), "--output": "run"}
    with pytest.raises(SystemExit) as stopped:
        appo.main([word for pair in base.items() if pair[0] not in given for word in pair] + arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and words in message and "Traceback" not in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_help_and_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        appo.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in dataclasses.fields(appo.Settings):
        assert f"--{field.name}" in text
    parser = lambda: appo.Parser(appo.Settings, allow_abbrev=False)
    settings = appo.parse_settings(parser(), ["--model", "Qwen/Qwen2.5-VL-3B-Instruct"])
    paper = appo.Settings()
    for name in ("k1", "k2", "k3", "alpha", "clip_high", "learning_rate", "max_new_tokens", "max_pixels", "updates_per_batch"):
        assert getattr(settings, name) == getattr(paper, name)
    assert settings.data == "runs/toy/train.json" and settings.eval_data == "runs/toy/test.json"
    tiny = appo.parse_settings(parser(), ["--algorithm", "grpo", "--kl_coef", "0.5"])
    assert (tiny.k3, tiny.average, tiny.clip_high, tiny.kl_coef, tiny.alpha) == (6, "responses", 0.2, 0.5, 0.0)
    assert tiny.model == "runs/toy/model" and tiny.output == "runs/grpo"


def test_resume_equals_an_uninterrupted_run(toy, tmp_path):
    """Killed by SIGKILL at several moments, saving included, and resumed: the same logs and weights, bit for bit."""
    more = dict(steps=5, save_every=1, eval_data=toy / "test.json")
    whole = subprocess.run(**command(options(toy, tmp_path / "whole", **more)))
    assert whole.returncode == 0, whole.stdout
    kills, arguments = 0, options(toy, tmp_path / "killed", **more)
    for moment in ("step-000001.partial", "step-000003.partial/training"):
        process = subprocess.Popen(**command(arguments + ["--resume"] * (kills > 0)))
        while process.poll() is None and not (tmp_path / "killed" / moment).exists():
            time.sleep(0.002)
        assert process.poll() is None, process.stdout.read()
        process.kill()
        process.communicate()
        kills += 1
    done = subprocess.run(**command(arguments + ["--resume"]))
    assert done.returncode == 0, done.stdout
    same(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "killed"))
    same_weights(tmp_path / "whole", tmp_path / "killed")
    for name in ("samples.jsonl", "held_out.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "killed" / name).read_text()
    # on another number of processes, from the checkpoint before the last
    shutil.rmtree(tmp_path / "killed" / "step-000005")
    done = subprocess.run(**command(arguments + ["--resume"], processes=2))
    assert done.returncode == 0, done.stdout
    same(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "killed"), rtol=1e-4, ignore=["rollout_logprob_gap"])
    with pytest.raises(model_utils.RunError, match="--alpha is 1.0 and was 1.7"):
        train(toy, tmp_path / "killed", **more, resume=True, alpha=1.0)


def test_a_signal_saves_and_says_how_to_go_on(toy, tmp_path):
    arguments = options(toy, tmp_path / "run", steps=2000, save_every=0)
    process = subprocess.Popen(**command(arguments))
    while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # so soon, it is part of the same wish
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "--resume" in said
    step = len(metrics_of(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == [f"step-{step:06d}"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process to kill in /proc")
def test_a_lost_process_stops_the_others(toy, tmp_path):
    process = subprocess.Popen(**command(options(toy, tmp_path / "run", steps=2000, save_every=1), processes=2))
    while process.poll() is None and not (tmp_path / "run" / "step-000001").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(child for child in children if "appo.py" in Path(f"/proc/{child}/cmdline").read_text())
    os.kill(int(victim), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "rank" in said.lower()
    assert (tmp_path / "run" / "step-000001" / "state.json").exists()


# ------------------------------------------------------------------------- a small model with the real tokenizer

@pytest.fixture(scope="module")
def real_model(tmp_path_factory):
    """Qwen2.5-VL-3B's tokenizer, chat template and image settings, with few random weights."""
    source, folder = SHARED / "models" / "qwen2.5-vl-3b", tmp_path_factory.mktemp("real") / "model"
    if not source.exists():
        pytest.skip("needs the files of the real model: set APPO_SHARED")
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                   torch_dtype="float32", rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    config["vision_config"] |= dict(depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=64,
                                    fullatt_block_indexes=[1])
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("own_data", [True, False])
def test_a_real_model_trains_and_saves(toy, real_model, tmp_path, own_data):
    """Real clips (MKV, MP4, AVI, WebM), or the built-in videos at the real model's picture size."""
    more = dict(data=SHARED / "data" / "clips_video_r1.json", video_root=SHARED / "videos") if own_data else {}
    metrics = train(toy, tmp_path / "run", model=real_model, max_new_tokens=6, steps=2, prompts_per_step=3, group_size=2,
                    max_frames=4, gamma=0.01, strategy="all", **more)  # all rewards are 0: the perception loss makes work
    assert all(line["grad_norm"] > 0 for line in metrics)
    assert len(metrics) == 2 and all(line["groups"] == 3 and line["skipped"] == 0 for line in metrics)
    assert all(line["rollout_logprob_gap"] < 1e-4 and line["entropy"] > 11 for line in metrics)
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved, source = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "run" / "checkpoint", real_model))
    assert saved.chat_template == source.chat_template and saved("A<|im_end|>é").input_ids == source("A<|im_end|>é").input_ids
    assert (tmp_path / "run" / "checkpoint" / "preprocessor_config.json").read_text() == (real_model / "preprocessor_config.json").read_text()


def test_a_full_disk_leaves_the_last_checkpoint_whole(toy, tmp_path):
    """Files may grow to 1 MB alone, less than a checkpoint: one line, and the run can go on from the one before."""
    train(toy, tmp_path / "run", steps=2, save_every=1)
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    arguments = options(toy, tmp_path / "run", steps=4, save_every=1, resume=True)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    done = subprocess.run(**command(arguments, preexec_fn=limit))
    assert done.returncode == 2 and "make room on the disk" in done.stdout and "Traceback" not in done.stdout, done.stdout
    assert [path.name for path in sorted((tmp_path / "run").glob("step-??????"))] == ["step-000001", "step-000002"]
    done = subprocess.run(**command(arguments))
    assert done.returncode == 0 and [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_two_processes_make_the_built_in_task(tmp_path):
    """The first process alone makes videos and model (its warm-up is cut out here), and the others come after it."""
    (tmp_path / "first.py").write_text("""if True:
        from functools import partial
        import appo, data, model_utils
        model_utils.warm_up = lambda model, lessons, good_enough: None
        data.toy_lessons, data.make_toy_data = (lambda *all: []), partial(data.make_toy_data, videos=(8, 2))
        appo.main(["--steps", "1", "--prompts_per_step", "2", "--output", "run"])
    """)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "first.py"]
    more = command([], cwd=tmp_path) | {"args": launch, "env": os.environ | {"PYTHONPATH": str(Path(appo.__file__).parent)}}
    done = subprocess.run(timeout=120, **more)
    assert done.returncode == 0 and (tmp_path / "run" / "checkpoint" / "config.json").exists(), done.stdout


def test_the_reference_model_keeps_its_rotary_frequencies(tiny):
    model = copy.deepcopy(tiny[0])
    model.to(torch.bfloat16)
    model.model.language_model.rotary_emb.inv_freq = tiny[0].model.language_model.rotary_emb.inv_freq  # as loading leaves it
    frozen = model_utils.frozen_policy(model, 1.0)
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16} and not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(frozen.language_model.rotary_emb.inv_freq, tiny[0].model.language_model.rotary_emb.inv_freq)


def test_memory_is_split_over_the_processes(tmp_path):
    """16 bytes a parameter (weights, gradients and two moments in fp32), shared out: the figure of the README."""
    (tmp_path / "held.py").write_text("""if True:
        import torch, model_utils
        rank, world, device = model_utils.init_processes()
        model, _ = model_utils.tiny_model(["a", "b"])
        total = sum(p.numel() for p in model_utils.Policy(model).parameters())
        policy = model_utils.shard(model_utils.Policy(model), device)
        optimizer = torch.optim.AdamW(policy.parameters())
        policy(*model_utils.dummy_group(model))[0].sum().backward()
        optimizer.step()
        held = [t for p in policy.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.ndim]
        print(rank, sum(t.to_local().nbytes for t in held) / (16 * total / world))
    """)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "held.py")]
    more = command([]) | {"args": launch, "env": os.environ | {"PYTHONPATH": str(Path(appo.__file__).parent)}}
    done = subprocess.run(**more)
    shares = dict(line.split() for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    assert set(shares) == {"0", "1"} and all(0.9 < float(share) < 1.1 for share in shares.values()), done.stdout


# ============================================================================ evaluate.py


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A built-in folder: 6 videos of 2 questions, a random tiny model, and a random text model with its tokenizer."""
    folder = tmp_path_factory.mktemp("bench")
    data.make_toy_data(folder, (4, 2), questions=2)
    model, tokenizer = model_utils.tiny_model(data.toy_vocabulary(), seed=3)
    model_utils.save_checkpoint(folder / "model", model, tokenizer, None)
    torch.manual_seed(0)
    text = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=1, intermediate_size=32, eos_token_id=tokenizer.eos_token_id))
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return folder


def measure(capsys, *arguments):
    """What a command prints; it must end well."""
    evaluate.main([str(a) for a in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line of a refused command."""
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(a) for a in arguments])
    error = capsys.readouterr().err
    last = error.splitlines()[-1]  # before it, at most a progress bar and the list of missing files
    assert caught.value.code == 2 and last.startswith("evaluate.py") and "Traceback" not in error
    return last


# ---- decoding

@pytest.mark.parametrize("penalty", [1.05, 1.5])
def test_evaluation_decoding_equals_generate(tiny, penalty):
    """Token by token transformers' generate with the supplement's settings and our positions, at different lengths together."""
    model, plain, _ = tiny
    config, length, without_penalty = model.config, 20, 0
    visual = [config.video_token_id, config.image_token_id, config.vision_start_token_id, config.vision_end_token_id]
    prompts = prompts_of(config)
    encoded = model_utils.encode_prompts(model, prompts)
    zeros = torch.zeros(len(prompts), 1, length, dtype=torch.float64)
    ours, free = (model_utils.rollout(model, encoded, zeros, attention_layers=0, choose=evaluate.evaluation_decoding(
        encoded, config.text_config.vocab_size, p)) for p in (penalty, 1.0))
    for prompt, one, group, unpenalised in zip(prompts, encoded, ours, free):
        split, pixels = sum(t * h * w for t, h, w in prompt.video_grids), {}
        if prompt.video_grids:
            pixels |= dict(pixel_values_videos=prompt.patches[:split], video_grid_thw=torch.tensor(prompt.video_grids))
        if prompt.image_grids:
            pixels |= dict(pixel_values=prompt.patches[split:], image_grid_thw=torch.tensor(prompt.image_grids))
        ids = prompt.input_ids[None]
        plain.generation_config = copy.deepcopy(model.generation_config)
        theirs = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=one.positions[:, None], **pixels,
                                max_new_tokens=length, do_sample=True, temperature=0.1, top_p=0.001, top_k=1,
                                repetition_penalty=penalty, suppress_tokens=visual)[0, ids.shape[1]:]
        assert group.response_ids[0][group.response_mask[0]].tolist() == theirs.tolist()
        without_penalty += unpenalised.response_ids.tolist() == group.response_ids.tolist()
    assert without_penalty < len(prompts)  # the penalty did something


def test_penalty_by_hand():
    """Ids of the prompt and of the response count; 2 / 2 < 1.5 and -1 * 2 < -1.5; one row's ids are not the other's."""
    prompts = [dataclasses.make_dataclass("P", ["input_ids"])(torch.tensor([0, 3]))] * 2
    choose = evaluate.evaluation_decoding(prompts, 4, penalty=2.0)
    logits = torch.tensor([[2.0, 1.5, 0.0, 0.0], [-1.0, -1.5, -9.0, -torch.inf]])
    assert choose(logits, torch.empty(2, 0, dtype=torch.long)).tolist() == [1, 1]
    assert choose(logits, torch.tensor([[1], [2]])).tolist() == [0, 1]


# ---- metrics by hand

def test_grounding_scores_by_hand():
    sample = data.Sample("x", "q", ["a", "b"], "B", "grounding", spans=[(4.0, 10.0)], duration=20.0)
    form = "<think> t </think> <answer> {} </answer> <time> {} </time>"
    def check(letter, time, **expected):
        assert evaluate.score_response(form.format(letter, time), sample) == pytest.approx(expected | {"format": 1.0})
    check("B", "2 to 6", accuracy=1, iou=2 / 8, iop=2 / 4, acc_gqa=1)
    check("B", "0 to 6", accuracy=1, iou=2 / 10, iop=2 / 6, acc_gqa=0)
    check("A", "4 to 10", accuracy=0, iou=1, iop=1, acc_gqa=0)
    check("B", "never", accuracy=1, iou=0, iop=0, acc_gqa=0)


def test_tables_by_hand():
    """Means by group; the three mIoU, mIoP, Acc@GQA of two questions; a table without a metric has no such column."""
    records = [dict(group="TC", accuracy=1.0, format=1.0, iou=0.25, iop=0.5, acc_gqa=1.0),
               dict(group="TC", accuracy=0.0, format=1.0, iou=1.0, iop=1.0, acc_gqa=0.0),
               dict(group="CW", accuracy=1.0, format=0.0, iou=0.1, iop=0.3, acc_gqa=0.0)]
    table = evaluate.summarise(records)
    assert list(table) == ["CW", "TC", "all"]
    assert table["TC"] == pytest.approx(dict(n=2, accuracy=0.5, format=1, iou=0.625, iop=0.75, acc_gqa=0.5))
    assert table["all"] == pytest.approx(dict(n=3, accuracy=2 / 3, format=2 / 3, iou=1.35 / 3, iop=0.6, acc_gqa=1 / 3))
    assert set(evaluate.summarise([dict(group="", accuracy=1.0)])["all"]) == {"n", "accuracy"}


def test_vsi_bench_overall_by_hand():
    """Directions 0.2, 0.4, 0.9 make one task of 0.5, whatever their numbers of questions; with 0.7 the mean is 0.6."""
    def questions(group, right, wrong):
        return [dict(group=group, accuracy=1.0)] * right + [dict(group=group, accuracy=0.0)] * wrong
    records = (questions("object_rel_direction_easy", 1, 4) + questions("object_rel_direction_medium", 4, 6)
               + questions("object_rel_direction_hard", 9, 1) + questions("route_planning", 7, 3))
    assert evaluate.summarise(records, "tasks")["all"]["accuracy"] == pytest.approx(0.6)
    assert evaluate.summarise(records)["all"]["accuracy"] == pytest.approx(21 / 35)
    number = data.Sample("x", "how many ?", [], "20", "number")  # 19 is 5% off: right at all ten; 11 is 45% off: at 0.50, 0.55
    assert [evaluate.score_response(f"<answer>{n}</answer>", number)["accuracy"] for n in ("19", "11", "?")] == [1.0, 0.2, 0.0]


def test_bootstrap_interval():
    assert evaluate.bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 1.0], size=400, p=[0.1, 0.6, 0.3])
    half = 1.96 * differences.std() / 20  # the normal approximation
    assert evaluate.bootstrap_interval(differences) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.01)
    assert evaluate.bootstrap_interval(differences) == evaluate.bootstrap_interval(differences)


def test_focus_difference_by_hand():
    def check(rows, right, seconds, expected):
        name, value = evaluate.focus_difference(torch.tensor(rows).bool(), torch.tensor(right), seconds)
        assert (name, pytest.approx(value)) == expected
    check([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]], [True, False], 2.0, ("6 to 9 s", 6.0))
    check([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]], [True, False], 0.5, ("0 to 3 s", 1.5))
    check([[1, 0, 0, 0, 1], [1, 0, 0, 0, 1]], [True, False], 2.0, ("0 s", 0.0))
    check([[1, 0, 0, 0, 1], [0, 1, 0, 1, 0]], [True, False], 2.0, ("0 to 3 s", 0.0))  # other frames, the same mean
    check([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]], [True, True, False, False], 10.0, ("3 to 6 s", 5.0))  # 10 and 15 s
    check([[1, 0, 0], [0, 0, 1]], [True, False], 10.0, ("over 15 s", 20.0))
    assert sum(evaluate.TAB_A.values()) == pytest.approx(100.0)


def test_terminal_text_is_escaped():
    assert data.escaped("a\x1b[31m\n\u202eb\x9b\ud800 \u00e9") == "a\\x1b[31m\\n\\u202eb\\x9b\\ud800 \u00e9"


# ---- the benchmarks' own records

def loaded(folder, name, content, benchmark=None, **more):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    s = appo.Settings(data=str(path), video_root=str(folder), skip_missing=True, **more)
    return evaluate.load_benchmark(s, benchmark)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_perception_test_records(tmp_path):
    touch(tmp_path, "videos/video_7.mp4")
    question = dict(id=0, question="What is held?", options=["a book", "a pan", "a key"], answer_id=1, area="Memory", tag=["x"])
    official = {"video_7": {"metadata": {"split": "valid"}, "mc_question": [question]}}
    flat = [dict(video_name="video_7", question_id="3") | question | {"answer_id": "1"}]
    for name, content in (("mc.json", official), ("mc.jsonl", json.dumps(flat[0]))):
        (sample,), overall = loaded(tmp_path, name, content)
        assert (sample.question, sample.options, sample.answer, sample.group, sample.kind, overall) == (
            "What is held?", ["a book", "a pan", "a key"], "B", "Memory", "choice", "questions")
        assert sample.video.endswith("videos/video_7.mp4") and sample.id == f"{name}:0"


def test_next_qa_records(tmp_path):
    touch(tmp_path, "1150/4010069381.mp4")
    csv = ("video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
           '4010069381,369,640,480,"how do they dance, then",3,6,CH,one,two,"three, or so",four,five\n')
    (sample,), _ = loaded(tmp_path, "val.csv", csv)
    assert (sample.question, sample.options[2], sample.answer, sample.group) == ("how do they dance, then", "three, or so", "D", "CH")
    assert sample.video.endswith("1150/4010069381.mp4")


def test_mvbench_records(tmp_path):
    """20 tasks; bounds; frame folders; the folder of the task decides between two videos of one name; the words, not a
    letter, are the answer."""
    tasks = " ".join(evaluate.MVBENCH_FOLDERS.values()).split()
    assert len(tasks) == len(set(tasks)) == 20
    touch(tmp_path, "video/clevrer/video_validation/v.mp4", "video/perception/videos/v.mp4", "video/tvqa/frames_fps3_hq/s01/00001.jpg")
    record = dict(video="v.mp4", question="How many?", candidates=["3", "4", "A"], answer="4")
    (count,), _ = loaded(tmp_path, "action_count.json", [record])
    (moving,), _ = loaded(tmp_path, "moving_count.json", [record | {"answer": "A"}])
    (episode,), _ = loaded(tmp_path, "episodic_reasoning.json", [record | dict(video="s01", start=1.5, end=8, fps=3)])
    assert "perception" in count.video and "clevrer" in moving.video and (count.answer, moving.answer) == ("B", "C")
    assert count.group == "action_count" and count.bounds is None
    assert episode.bounds == (1.5, 8.0) and episode.video.endswith("frames_fps3_hq/s01")
    assert count.question.startswith("Carefully watch the video") and count.question.endswith("Question: How many?")


def test_vsi_bench_records(tmp_path):
    touch(tmp_path, "scannet/scene1.mp4")
    shared = dict(dataset="scannet", scene_name="scene1", question="How {many}?")
    records = [shared | dict(id=0, question_type="object_counting", ground_truth="4", options=None),
               shared | dict(id=1, question_type="object_rel_direction_hard", ground_truth="B", options=["A. left", "B. right"])]
    (number, choice), overall = loaded(tmp_path, "test.jsonl", "\n".join(map(json.dumps, records)))
    assert (number.kind, number.answer, number.options, number.group) == ("number", "4", [], "object_counting")
    assert (choice.kind, choice.answer, choice.options, overall) == ("choice", "B", ["left", "right"], "tasks")
    assert number.question == "These are frames of a video.\nHow {many}?"


def test_seed_bench_r1_levels_and_joined_files(tmp_path):
    touch(tmp_path, "images/Ego4D/o.jpg", "scannet/scene1.mp4")
    record = dict(question="q", choice_a="w", choice_b="x", choice_c="y", choice_d="z", golden_choice_idx="C", video_source="Ego4D",
                  task_progress_metadata=[], video_basename="", current_observation_basename="o.jpg")
    for level in ("L1", "L3"):
        (sample,), overall = loaded(tmp_path, f"validation_{level}.jsonl", json.dumps(record))
        assert (sample.group, sample.answer, overall) == (level, "C", "questions")
    (sample,), _ = loaded(tmp_path, "test_L2.json", [record], "video_r1")  # a wrong name changes nothing but the grouping
    assert sample.group == "Ego4D"
    both = appo.Settings(data=f"{tmp_path}/validation_L1.jsonl,{tmp_path}/validation_L3.jsonl", video_root=str(tmp_path))
    assert [sample.id for sample in evaluate.load_benchmark(both)[0]] == ["validation_L1.jsonl:0", "validation_L3.jsonl:0"]


@pytest.mark.parametrize("name, record, word", [
    ("a.json", dict(scene_name="s", dataset="d", question="q", question_type="t", ground_truth="many", options=None), "ground_truth"),
    ("a.json", dict(scene_name="s", question="q", question_type="t", ground_truth="1", options=None), "dataset"),
    ("a.json", dict(scene_name="s", dataset="d/..", question="q", question_type="t", ground_truth="1", options=None), "video folder"),
    ("a.json", dict(candidates=["x", "y"], video="v", question="q", answer="z"), "answer"),
    ("a.json", dict(candidates=["x", "y"], video="v", question="q"), "answer"),
    ("a.json", dict(candidates=["x", "y"], video="v", question="q", answer="x", start="1", end=2), "start"),
    ("a.json", dict(answer_id=3, options=["x", "y", "z"], video_name="v", question="q"), "answer_id"),
    ("a.json", dict(a0="x", a1="y", a2="z", a3="w", answer=1, video="v", question="q"), "a4"),
    ("a.json", dict(other=1), "no known format"), ("a.csv", dict(other=1), "no known format")])
def test_bad_records_are_named_in_one_line(tmp_path, name, record, word):
    with pytest.raises(data.DataError) as caught:
        loaded(tmp_path, name, [record])
    assert word in str(caught.value) and "a." in str(caught.value) and "\n" not in str(caught.value)


# ---- commands

def test_score_goes_on_where_it_stopped(bench, tmp_path, capsys):
    (tmp_path / "broken.avi").write_bytes(b"no video")
    records = json.loads((bench / "train.json").read_text())
    for record in records:
        record["path"] = str(bench / record["path"])
    records[3]["path"] = str(tmp_path / "broken.avi")
    (tmp_path / "some.json").write_text(json.dumps(records))
    common = ["score", "--model", bench / "model", "--data", tmp_path / "some.json", "--rollout_groups", 2, "--readers", 1]
    text = measure(capsys, *common, "--output", tmp_path / "a")
    whole = (tmp_path / "a" / "responses.jsonl").read_bytes()
    one = [json.loads(line) for line in whole.splitlines()]
    assert sorted(r["id"] for r in one) == sorted(f"some.json:{n}" for n in range(8)) and [r["id"] for r in one if "skipped" in r] == ["some.json:3"]
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["results"]["all"]["n"] == 7 and summary["skipped"][0]["id"] == "some.json:3" and "broken.avi" in text
    assert summary["settings"]["max_new_tokens"] == 18 and summary["settings"]["decoding"]["repetition_penalty"] == 1.05
    assert "skipped 1 of 8" in text and summary["prompt"].startswith("what colour")
    lines = whole.splitlines(keepends=True)
    (tmp_path / "a" / "responses.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])  # killed while writing
    measure(capsys, *common, "--output", tmp_path / "a")
    again = [json.loads(line) for line in (tmp_path / "a" / "responses.jsonl").read_text().splitlines()]
    key = lambda r: {k: v for k, v in r.items() if k != "seconds"}
    assert sorted(map(str, map(key, again))) == sorted(map(str, map(key, one)))
    assert "another max_frames" in refused(capsys, *common, "--output", tmp_path / "a", "--max_frames", 8)
    measure(capsys, *common, "--output", tmp_path / "b")
    text = measure(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert "difference +0.000, 95% interval +0.000 to +0.000" in text and "7 common" in text


def test_commands_refuse_in_one_line(bench, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "responses.jsonl").write_text('{"id": "x", "question": "q", "accuracy": 1.0}\n')
    toy = ["--model", bench / "model", "--data", bench / "test.json"]
    for arguments, word in (
            ([], "required"), (["nothing"], "invalid choice"), (["score", *toy, "--model", tmp_path / "none"], "no such folder"),
            (["score", *toy, "--colour", "red"], "--colour"), (["score", *toy, "--max_frames", "0"], "--max_frames"),
            (["score", "--model", bench / "model", "--data", tmp_path / "none.json"], "cannot be read"),
            (["compare", tmp_path / "a", tmp_path / "b"], "no such file"), (["compare", tmp_path / "b"], "required"),
            (["curves", tmp_path], "no run"), (["curves", tmp_path, "--output", "x.gif"], ".png or .pdf"),
            (["attention", *toy, "--sample", "99"], "no such record"), (["throughput", "--group", "0"], "above 0"),
            (["throughput", "--algorithms", "ppo"], "ppo"), (["throughput", "--max_frames", "3"], "unrecognized"),
            (["throughput", "--random_weights", "--model", tmp_path / "b"], "no usable configuration"),
            (["decouple", *toy, "--perception", bench / "model", "--reasoning", tmp_path / "b", "--output", tmp_path / "d"], "no usable text")):
        assert word in refused(capsys, *arguments), arguments


def test_missing_videos_are_listed(bench, tmp_path, capsys):
    records = json.loads((bench / "test.json").read_text())
    records[0]["path"] = "gone\x1b.avi"
    (tmp_path / "x.json").write_text(json.dumps(records))
    common = ["score", "--model", bench / "model", "--data", tmp_path / "x.json", "--video_root", bench, "--output", tmp_path / "o"]
    with pytest.raises(SystemExit):
        evaluate.main([str(a) for a in common])
    error = capsys.readouterr().err
    assert "gone\\x1b.avi" in error and "--skip_missing" in error and "\x1b" not in error
    assert "all 3" in re.sub(" +", " ", measure(capsys, *common, "--skip_missing"))


def graded(monkeypatch):
    """A random model is never right: let the number of letters decide."""
    monkeypatch.setattr(data, "task_reward", lambda text, sample: (float(len(text) % 2),) * 3)


def test_attention_picture(bench, tmp_path, capsys, monkeypatch):
    graded(monkeypatch)
    common = ["attention", "--model", bench / "model", "--data", bench / "test.json", "--sample", "1"]
    assert "drawn" in measure(capsys, *common, "--model2", bench / "model", "--output", tmp_path / "x" / "a.png")
    measure(capsys, *common, "--output", tmp_path / "a.pdf")
    assert (tmp_path / "x" / "a.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "a.pdf").read_bytes()[:4] == b"%PDF"


def test_thumbnails_are_the_first_frames_of_the_steps(bench):
    frames, seconds, duration = data.sample_frames(str(bench / "videos" / "test_0_00000.avi"), 1.0, 16)
    patches, grid = data.frames_to_patches(frames, 3136, 3136)
    prompt = dataclasses.make_dataclass("P", ["patches", "video_grids"])(patches, [grid])
    assert np.array_equal(evaluate.thumbnails(prompt), frames[::2].permute(0, 2, 3, 1).numpy())


def test_curves(tmp_path, capsys):
    for n, (algorithm, steps) in enumerate((("appo", 4), ("appo", 3), ("dapo", 5))):
        (tmp_path / f"r{n}").mkdir()
        settings = dict(algorithm=algorithm, strategy="soft", alpha=1.7 * (algorithm == "appo"))
        (tmp_path / f"r{n}" / "config.json").write_text(json.dumps({"settings": settings}))
        lines = [json.dumps({name: float(n + step) for name in evaluate.CURVES[step == 2:]}) for step in range(steps)]
        (tmp_path / f"r{n}" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "acc')  # half a last line
    (tmp_path / "toy").mkdir()
    label, run = evaluate.read_run(tmp_path / "r0")
    assert label == "appo, soft, alpha 1.7" and run["reward"].tolist() == [0, 1, 2, 3] and math.isnan(run["accuracy"][2])
    assert evaluate.read_run(tmp_path / "r2")[0] == "dapo"
    assert evaluate.smooth(np.array([1.0, 3.0, 5.0, 9.0]), 2).tolist() == [1.0, 2.0, 4.0, 7.0]
    folders = sorted(tmp_path.glob("*"))
    assert "drawn" in measure(capsys, "curves", *folders, "--output", tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_focus_command(bench, tmp_path, capsys, monkeypatch):
    common = ["focus", "--model", bench / "model", "--data", bench / "train.json", "--output", tmp_path / "f.json"]
    assert "no sample has right and wrong" in refused(capsys, *common)
    graded(monkeypatch)
    text, table = measure(capsys, *common), json.loads((tmp_path / "f.json").read_text())
    assert "20.1" in text and sum(table["percent"].values()) == pytest.approx(100)
    assert sum(table["samples"].values()) + table["left_out"]["one kind of response alone"] == 8


def test_decouple_command(bench, tmp_path, capsys):
    text = measure(capsys, "decouple", "--model", bench / "model", "--data", bench / "test.json", "--perception",
                   f"{bench / 'model'},{bench / 'model'}", "--reasoning", f"{bench / 'text'}", "--output", tmp_path / "d.jsonl",
                   "--max_new_tokens", 8)
    records = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 4 and text.count("4 of 4") == 2
    assert records[0]["description"] == records[4]["description"]
    assert records[0]["response"] == records[4]["response"]


def test_the_describer_does_not_know_the_question():
    asked = data.Sample("x", evaluate.DESCRIBE, [], "A", "description")
    assert data.prompt_text(asked, None) == evaluate.DESCRIBE


def test_controls_by_hand(tiny):
    """What the study's controls do to APPO's weights."""
    tokenizer, mask = tiny[2], torch.tensor([[True, True, True], [True, True, False]])
    red, blue, other = tokenizer.convert_tokens_to_ids(["red", "blue", "the"])
    ids = torch.tensor([[other, red, other], [blue, other, 0]])
    attention = torch.tensor([[[0.9], [0.5], [0.1]], [[0.2], [0.8], [0.0]]])
    group = SimpleNamespace(rollout=SimpleNamespace(response_ids=ids, response_mask=mask, frame_attention=attention),
                            crucial=torch.tensor([True]), advantages=torch.zeros(2), position=3)
    logits, s = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), appo.Settings(k3=3)
    weights = appo.weigh_tokens(group, logits, s)
    controls = {name: control(group, logits, s, tokenizer) for name, control in evaluate.CONTROLS.items()}
    assert controls["oracle"][mask].tolist() == pytest.approx([1, 2.7, 1, 2.7, 1])
    assert controls["mean_one"][mask].mean().item() == pytest.approx(1)
    torch.testing.assert_close(controls["mean_one"] * weights[mask].mean(), weights)
    for row, before, real in zip(controls["shuffled"], weights, mask):
        assert sorted(row[real].tolist()) == sorted(before[real].tolist()) and (row[~real] == 1).all()
    assert len({tuple(evaluate.shuffled(SimpleNamespace(**vars(group) | {"position": n}), logits, s, None)[0].tolist())
                for n in range(9)}) > 1


def test_study_command(toy, tmp_path, capsys, monkeypatch):
    """Arms share model and prompts, DAPO again draws other responses, what has finished stays, the table is the logs'."""
    folder = tmp_path / "study"
    for seed in 0, 1:
        (folder / f"seed-{seed}").mkdir(parents=True)
        (folder / f"seed-{seed}" / "model").symlink_to(toy / "model")
    (folder / "videos").symlink_to(toy / "videos")
    monkeypatch.setattr(data, "make_toy_data", partial(data.make_toy_data, videos=(24, 6)))
    arms = "dapo,dapo:again,appo:k1=2,appo:shuffled"
    common = ["study", "--arms", arms, "--output", folder, "--steps", 2, "--prompts_per_step", 4]
    assert "--k9" in refused(capsys, "study", "--arms", "appo:k9=2", "--output", folder)
    assert "dapo:shuffled" in refused(capsys, "study", "--arms", "dapo:shuffled", "--output", folder)
    text = measure(capsys, *common, "--seeds", 1)
    assert "the null, dapo:again - dapo" in text and (folder / "curves.png").stat().st_size > 10_000
    home = folder / "seed-0"
    logs = {name: metrics_of(home / name) for name in ("dapo", "dapo-again", "appo-k1-2", "appo-shuffled")}
    assert logs["dapo"][0]["accuracy"] == logs["appo-k1-2"][0]["accuracy"]  # the same prompts and random numbers
    assert logs["dapo"][0]["entropy"] == logs["appo-shuffled"][0]["entropy"] != logs["dapo-again"][0]["entropy"]
    assert logs["appo-k1-2"][0]["token_weight_mean"] > 1
    held_out = [model_utils.read_log(home / name / "held_out.jsonl") for name in logs]
    assert len({log[0]["accuracy"] for log in held_out}) == 1  # the same start
    figures = json.loads((folder / "study.json").read_text())["arms"]
    assert figures["dapo:again"]["accuracy, after"] == [held_out[1][-1]["accuracy"]]
    assert figures["appo:k1=2"]["training"] == [pytest.approx(sum(line["accuracy"] for line in logs["appo-k1-2"]) / 2)]
    times = {path: path.stat().st_mtime_ns for path in home.glob("*/metrics.jsonl")}
    shutil.rmtree(home / "dapo" / "checkpoint")  # as if stopped half-way
    measure(capsys, *common, "--seeds", 2)
    assert [path.parent.name for path, before in times.items() if path.stat().st_mtime_ns != before] == ["dapo"]
    same(logs["dapo"], metrics_of(home / "dapo"))
    assert len(json.loads((folder / "study.json").read_text())["arms"]["dapo"]["training"]) == 2
    assert "other options" in refused(capsys, *common, "--group_size", 4)


def test_throughput_command(bench, tmp_path, capsys):
    """Both ways compute the same; every figure is in the file; times themselves are not judged."""
    text = measure(capsys, "throughput", "--model", bench / "model", "--random_weights", "--frames", 4, "--group", 4, "--new_tokens", 5,
                   "--prompts", 2, "--repetitions", 1, "--against_plain", "--output", tmp_path / "t.json")
    result = json.loads((tmp_path / "t.json").read_text())
    assert result["largest_difference"]["log_probs"] < 1e-5 and 0 <= result["largest_difference"]["frame_attention"] < 1e-7
    assert list(result["algorithms"]) == ["appo", "dapo", "grpo", "usual way"] and "0.81" in text
    for column in result["algorithms"].values():
        assert set(column["seconds"]) == {"step", *evaluate.PHASES} and column["peak_memory_gb"] > 0
        assert column["seconds"]["step"]["median"] == pytest.approx(sum(column["seconds"][p]["median"] for p in evaluate.PHASES))
        assert column["samples_per_second"] == pytest.approx(2 / column["seconds"]["step"]["median"])
        assert column["tokens_per_second"] == pytest.approx(20 * column["samples_per_second"])
        assert all(column["seconds"][phase]["median"] > 0 for phase in ("embed", "prefill", "decode", "update"))
    assert result["algorithms"]["appo"]["seconds"]["weights"]["median"] > 10 * result["algorithms"]["dapo"]["seconds"]["weights"]["median"]
    assert result["appo_over_dapo"] > 0 and set(result["plain_over_ours"]) == {"step", *evaluate.PHASES}


def test_throughput_growth(bench, tmp_path, capsys):
    measure(capsys, "throughput", "--model", bench / "model", "--random_weights", "--frames", 2, "--group", 2, "--new_tokens", 2,
            "--repetitions", 1, "--algorithms", "dapo", "--sweep", "--gradient_checkpointing", "--against_plain",
            "--output", tmp_path / "t.json")
    result = json.loads((tmp_path / "t.json").read_text())
    assert result["largest_difference"]["log_probs"] < 1e-5
    growth = result["growth"]
    assert [(row["group"], row["frames"]) for row in growth] == [(2, 2), (4, 2), (8, 2), (16, 2), (2, 8), (2, 16), (2, 32), (2, 64)]
    assert growth[-1]["prefill"] > growth[-4]["prefill"]  # 64 frames, 8 frames


# ---- real clips, the real tokenizer

@needs_shared
def test_real_clips(tmp_path, capsys, monkeypatch):
    """All that needs a model runs through on real videos and pictures, a damaged one among them."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/qwen2.5-vl-3b")
    config = json.loads((SHARED / "models/qwen2.5-vl-3b/config.json").read_text())
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=151936, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=64, tie_word_embeddings=True, rope_parameters=dict(
                             rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6])),
        vision_config=dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=64,
                           fullatt_block_indexes=[1], tokens_per_second=2),
        tie_word_embeddings=True, **{name: value for name, value in config.items() if name.endswith("_token_id") and "vision_token" not in name})
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [151645, 151643]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    graded(monkeypatch)
    clips = SHARED / "data"
    records = json.loads((clips / "clips_video_r1.json").read_text())
    damaged = records[0] | {"path": "corrupted.mp4"}
    (tmp_path / "clips.json").write_text(json.dumps([*records[:2], damaged]))
    (tmp_path / "mvbench").mkdir()
    bounded = dict(video="nasa.mp4", question="q", candidates=["x", "y"], answer="y", start=1.0, end=4.0)
    (tmp_path / "mvbench" / "action_sequence.json").write_text(json.dumps([bounded]))
    files = f"{tmp_path / 'clips.json'},{clips / 'clips_next_gqa.json'},{tmp_path / 'mvbench' / 'action_sequence.json'}"
    root = tmp_path / "root"
    (root / "videos").mkdir(parents=True)
    for clip in (SHARED / "videos").iterdir():
        (root / clip.name).symlink_to(clip)
    common = ["--model", tmp_path / "model", "--video_root", root, "--max_new_tokens", 6, "--max_frames", 4, "--readers", 1,
              "--group_size", 2, "--min_pixels", 12544, "--max_pixels", 12544]
    text = measure(capsys, "score", *common, "--data", files, "--output", tmp_path / "s")
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert summary["results"]["all"]["n"] + len(summary["skipped"]) == 6 and "Acc@GQA" in text
    measure(capsys, "attention", *common, "--data", files, "--output", tmp_path / "a.png")
    measure(capsys, "focus", *common, "--data", files, "--group_size", 8)
