"""The detector of APL (Sec. 3): ActionFormer [62] with the tIoU and tND branches, channels-last.

Input   feats (B, T, D), mask (B, T), any T >= 1; True = valid in every mask of the project.
Output  raw predictions at P points over all pyramid levels; targets and decoding are functions
        here, the losses are in alqa.py.
Holds   the geometry of segments; the layers, with Eq. (2), the predicted tIoU and tND; target
        assignment; decoding; Soft-NMS.

Legend, the same letters in every file where no equation uses the letter:
    B videos, T feature steps, D input channels, C channels, K classes, H heads, L levels,
    N segments of a video (padded in a batch), P points over all levels, G groups of detections,
    M detections of the largest group.
    Segments are (..., 2), start and end, in feature-grid units: step t of a sequence lies at t.
    s are the settings, but in an equation the scores. A record is a dict of tensors about the same
    N segments: ground truth has "segments" (N, 2) and "labels" (N,), detections and pseudo labels
    add "scores" (joint) and more; what teaches a batch has other segments too, "rejected" (R, 2).
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from plumbing import settings
from plumbing.inputs import VIEWS, Input
from plumbing.processes import draws_of_batch, length_unit
from plumbing.settings import (
    Blocks,
    Finite,
    Flag,
    NotNegative,
    OneOf,
    ShareBelow1,
    Text,
    Width,
)
from plumbing.words import BadInput

# The localization quality branches of Tab. 3(b); none = plain ActionFormer.
BRANCHES = ("none", "tiou", "diou", "tiou+tnd")


# ---- Settings -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class DetectorSettings(settings.CheckedSettings):
    """The network's shape and start. [S] the paper, [A] the public ActionFormer, [J] neither."""
    since = "pretrain"
    heading = "the detector"
    channels: Width("width C [A]") = 512
    heads: Width("attention heads H [A]") = 4
    windows: Text(
        "attention window of all levels, or one a level with commas; 0: the "
        "whole sequence [A]") = "19"
    ranges: Text(
        "offsets that each level regresses, in grid steps [A]") = "0:4,4:8,8:16,16:32,32:64,64:inf"
    stem: Blocks("transformer blocks at full length [A]") = 2
    drop_path: ShareBelow1("stochastic depth [A]") = 0.1
    position: Flag("add the absolute position [A: ActivityNet]") = False
    input_dropout: ShareBelow1(
        "share of the input's numbers that training sets to 0, against memorising the few "
        "labelled videos [J]") = 0.0
    input_jitter: NotNegative(
        "training scales and shifts each channel of a video at random, by at most so many of its "
        "standard deviations, as other people and sensors do [J]") = 0.0
    input_view: OneOf(
        VIEWS, "features as they are standardised over all videos; over their own alone, where "
        "people or sensors differ in level and strength; both side by side [J]") = "all"
    offset_bias: Finite(
        "start of the offsets, in strides: from 0 those of one side may die in the ReLU [J; A: "
        "0]") = 1.0
    alqa: OneOf(BRANCHES, "quality branches [S]; none: plain ActionFormer") = "tiou+tnd"
    tnd_bias: Finite(
        "start of the tND branch's bias, which parts it from the tIoU branch [J]") = -2.0
    precision: OneOf(
        ("auto", "float32", "bfloat16"),
        "auto: bfloat16 where the hardware multiplies it fast") = "auto"

    def __post_init__(self):
        super().__post_init__()
        self.levels()
        if self.channels % self.heads:
            raise BadInput(
                f"setting channels, {self.channels}, is no multiple of heads, {self.heads}")

    def levels(self):
        """The attention windows [int] and regression ranges [(low, high)], one of each a level."""
        return settings.levels_of(self.windows, self.ranges)

    def apply(self, network, batch):
        """The network's output for a batch; here, so that another detector may be given more."""
        return network(batch["feats"].to(self.device), batch["mask"].to(self.device))


# ---- Segments: one tIoU and one tND for all -----------------------------------------------------

def tiou(a, b, eps=1e-8):
    """Temporal IoU of segments, broadcast; an empty union gives 0.

    a, b  (..., 2); tensors, or NumPy arrays in the loops of Soft-NMS and mAP, whose steps are too
          small for torch to be fast
    ->    (...) in [0, 1]"""
    lib = np if isinstance(a, np.ndarray) else torch
    first_end = lib.minimum(a[..., 1], b[..., 1])
    last_start = lib.maximum(a[..., 0], b[..., 0])
    inter = (first_end - last_start).clip(min=0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inter
    return inter / union.clip(min=eps)


def tnd(a, b, eps=1e-8):
    """Temporal normalized distance tND = d^2 / c^2 of segments, broadcast (Sec. 3.1).

    d is the distance of the centres, c the length of the smallest enclosing segment.
    a, b  (..., 2)
    ->    (...) in [0, 1]; at most 1/4 where the segments share a point"""
    d = (a.sum(-1) - b.sum(-1)) / 2
    c = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return (d / c.clamp(min=eps)) ** 2


def steps_inside(segments, steps):
    """Which steps (m,) lie in which segments (N, 2) -> (m, N) bool."""
    return (steps[:, None] >= segments[:, 0]) & (steps[:, None] <= segments[:, 1])


# ---- Layers -------------------------------------------------------------------------------------

def later(x):
    """The steps of x (B, T, C) one step later; the first is 0."""
    return F.pad(x, (0, 0, 1, -1))


def earlier(x):
    """The steps of x (B, T, C) one step earlier; the last is 0."""
    return F.pad(x, (0, 0, -1, 1))


class Conv(nn.Module):
    """Masked convolution, k = 3, stride 1.

    A step sees the one before it only if that is valid: then sequences, each of which ends in
    padding, may stand one behind the other.
    x     (B, T, in), mask (B, T)
    ->    (B, T, out), 0 where the mask is False"""

    def __init__(self, dim_in, dim_out, bias=True):
        super().__init__()
        bound = 1 / math.sqrt(3 * dim_in)
        self.weight = nn.Parameter(torch.empty(3, dim_out, dim_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim_out)) if bias else None

    def forward(self, x, mask):
        valid = mask[..., None]
        # One product gives what each step adds to the one after it, to itself, to the one before.
        y = F.linear(x, self.weight.flatten(0, 1))  # (B, T, 3 * out)
        after, here, before = y.chunk(3, -1)
        y = here + later(after * valid) + earlier(before)
        if self.bias is not None:
            y = y + self.bias
        return y * valid


class Trunk(nn.Module):
    """Two convolutions with LayerNorm and ReLU: they embed the features and open each head.

    x     (B, T, in), mask (B, T)
    ->    (B, T, out)"""

    def __init__(self, dim_in, dim):
        super().__init__()
        self.convs = nn.ModuleList([Conv(dim_in, dim, bias=False), Conv(dim, dim, bias=False)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.convs)

    def forward(self, x, mask):
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x, mask)), inplace=True)
        return x


def shifted(x, stride, outside=0.0):
    """The steps t-1, t and t+1 of x for every stride-th t.

    x     (B, T, C), before and after which lies `outside`
    ->    (3, B, T / stride, C)"""
    T = x.shape[1]
    padded = F.pad(x, (0, 0, 1, 1), value=outside)
    return torch.stack([padded[:, i:i + T:stride] for i in range(3)])


class DepthwiseConv(nn.Module):
    """Depth-wise convolution, k = 3, of the shifted copies of an input.

    taps  (3, B, T, C), as shifted() gives them
    ->    (B, T, C)"""

    def __init__(self, dim):
        super().__init__()
        bound = 1 / math.sqrt(3)
        self.weight = nn.Parameter(torch.empty(3, dim).uniform_(-bound, bound))

    def forward(self, taps):
        weight = self.weight.to(taps.dtype)[:, None, None]
        return (taps * weight).sum(0)


class DropPath(nn.Module):
    """Residual branch with stochastic depth: skip + scale * x, one draw a video.

    The scale is learned per channel, from 1e-4."""

    def __init__(self, dim, rate):
        super().__init__()
        self.rate = rate
        self.scale = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, skip, x):
        scale = self.scale
        if self.training and self.rate > 0:
            kept = draws_of_batch((len(x), 1, 1), x.device) >= self.rate
            scale = scale * kept / (1 - self.rate)
        return skip + scale * x


def local_attention(q, k, v, mask, heads, half):
    """Softmax attention of every step over the valid steps within `half` on either side.

    Queries are cut into blocks, each with its keys and a margin on both sides: O(T * half) time
    and memory. A step always sees itself, so that rows of padding, which the caller masks, are
    finite.
    q, k, v  (B, T, C), mask (B, T)
    ->       (B, T, C)"""
    B, T, C = q.shape
    margin = max(min(half, T), 8)  # enough for matrix products
    size = 2 * margin  # queries a block; it has twice as many keys
    rest = -T % size
    blocks = (T + rest) // size

    def with_margins(x):
        """(B, T, ...) -> (B * blocks, 2 * size, ...)."""
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (margin, margin + rest))
        x = x.unflatten(1, (blocks + 1, size))
        return torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1)

    def by_head(x):
        """(B * blocks, steps, C) -> (B * blocks, H, steps, C / H)."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    query = torch.arange(size, device=q.device)[:, None]
    key = torch.arange(2 * size, device=q.device) - margin
    near = (key - query).abs() <= half
    seen = near & with_margins(mask)[:, None] | (key == query)  # (B * blocks, size, 2 * size)
    q = F.pad(q, (0, 0, 0, rest)).view(B * blocks, size, C)
    q, k, v = by_head(q), by_head(with_margins(k)), by_head(with_margins(v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    return out.transpose(1, 2).reshape(B, T + rest, C)[:, :T]


class Attention(nn.Module):
    """Multi-head self-attention in a local window; its depth-wise convolutions may halve T.

    x     (B, T, C), mask (B, T / stride); padding is not attended to
    ->    (B, T / stride, C), rows of padding not masked"""

    def __init__(self, dim, heads, window, stride):
        super().__init__()
        self.heads = heads
        self.stride = stride
        self.half = window // 2 if window > 0 else 10 ** 9  # 0: the whole sequence
        self.convs = nn.ModuleList(DepthwiseConv(dim) for _ in "qkv")
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in "qkv")
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in "qkv")
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask):
        taps = shifted(x, self.stride)
        layers = zip(self.convs, self.norms, self.linears)
        q, k, v = (linear(norm(conv(taps))) for conv, norm, linear in layers)
        return self.proj(local_attention(q, k, v, mask, self.heads, self.half))


class Block(nn.Module):
    """Pre-LN transformer block; stride 2 halves T, the skip path by max pooling.

    x     (B, T, C), mask (B, T)
    ->    (B, T / stride, C), (B, T / stride)"""

    def __init__(self, dim, heads, window, stride, drop_path):
        super().__init__()
        self.stride = stride
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, window, stride)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop1 = DropPath(dim, drop_path)
        self.drop2 = DropPath(dim, drop_path)

    def forward(self, x, mask):
        mask = mask[:, ::self.stride]
        # The largest of three steps; torch's own pooling cannot be exported at a free length.
        skip = shifted(x, 2, -math.inf).amax(0) if self.stride > 1 else x
        x = self.drop1(skip, self.attn(self.norm1(x), mask))
        x = self.drop2(x, self.mlp(self.norm2(x)))
        return x * mask[..., None], mask


def sinusoid(T, C, device):
    """Sinusoidal absolute position (T, C), divided by sqrt(C) as ActionFormer does."""
    wavelength = 10000 ** (torch.arange(0, C, 2, device=device) / C)
    angle = torch.arange(T, device=device)[:, None] / wavelength
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :C] / math.sqrt(C)


class Backbone(nn.Module):
    """Embedding convolutions, stem blocks at full length, a halving block a further level, neck.

    x     (B, T, D), mask (B, T)
    ->    [(B, T / 2^l, C)], [(B, T / 2^l)], one of each a level"""

    def __init__(self, dim_in, s):
        super().__init__()
        C = s.channels
        windows, _ = s.levels()
        self.position = s.position
        self.embed = Trunk(dim_in, C)
        self.stem = nn.ModuleList(
            Block(C, s.heads, windows[0], 1, s.drop_path) for _ in range(s.stem))
        self.branch = nn.ModuleList(
            Block(C, s.heads, window, 2, s.drop_path) for window in windows[1:])
        self.neck = nn.ModuleList(nn.LayerNorm(C) for _ in windows)

    def forward(self, x, mask):
        x = self.embed(x, mask)
        if self.position:
            x = x + sinusoid(x.shape[1], x.shape[2], x.device) * mask[..., None]
        for block in self.stem:
            x, mask = block(x, mask)
        levels = [(x, mask)]
        for block in self.branch:
            levels.append(block(*levels[-1]))
        levels, masks = zip(*levels)
        return [norm(x) for norm, x in zip(self.neck, levels)], masks


class QualityBranches(nn.Module):
    """Eq. (2): P_tiou = sigmoid(conv(h)), P_tnd = sigmoid(conv(h)).

    The branches share all but the final convolution with the regression head. One branch
    (Tab. 3(b)) learns tIoU or DIoU alone and leaves P_tnd = 0; no branch leaves P_tiou = 1 and
    P_tnd = 0, with which the joint score is the class score.
    h         (B, T, C), the last hidden layer of the regression head; mask (B, T)
    ->        P_tiou, P_tnd, two (B, T) in [0, 1]
    tnd_bias  starts the tND branch (not given in the paper): from equal biases P_tiou - P_tnd
              would start at 0, where it is clamped and passes no gradient"""

    def __init__(self, dim, branches, tnd_bias):
        super().__init__()
        self.tiou = Conv(dim, 1) if branches != "none" else None
        self.tnd = Conv(dim, 1) if branches == "tiou+tnd" else None
        if self.tnd:
            nn.init.constant_(self.tnd.bias, tnd_bias)

    def forward(self, h, mask):
        P_tiou = torch.ones_like(h[..., 0]).float()
        P_tnd = torch.zeros_like(P_tiou)
        if self.tiou:
            P_tiou = torch.sigmoid(self.tiou(h, mask)[..., 0].float())
        if self.tnd:
            P_tnd = torch.sigmoid(self.tnd(h, mask)[..., 0].float())
        return P_tiou, P_tnd


class Points(NamedTuple):
    """The P points of the pyramid, each (P,)."""
    time: torch.Tensor  # in grid steps
    stride: torch.Tensor  # in grid steps
    low: torch.Tensor  # the least and the largest offset that it may regress, in grid steps
    high: torch.Tensor


def decode(points, offsets):
    """Segments (B, P, 2) in grid steps of offsets (B, P, 2) in strides."""
    sign = offsets.new_tensor([-1, 1])
    return points.time[:, None] + offsets * points.stride[:, None] * sign


class Outputs(NamedTuple):
    """Raw predictions at the points, and the pyramid that they were made from."""
    cls_logits: torch.Tensor  # (B, P, K)
    offsets: torch.Tensor  # (B, P, 2) >= 0, to start and end, in strides
    p_tiou: torch.Tensor  # (B, P)
    p_tnd: torch.Tensor  # (B, P)
    mask: torch.Tensor  # (B, P)
    points: Points
    levels: list  # [(B, T_l, C)]
    masks: list  # [(B, T_l)]

    def predictions(self):
        """What the heads give."""
        return self.cls_logits, self.offsets, self.p_tiou, self.p_tnd

    def p_cls(self):
        """The class scores (B, P, K)."""
        return torch.sigmoid(self.cls_logits)

    def segments(self):
        """The segments (B, P, 2) in grid steps."""
        return decode(self.points, self.offsets)

    def sizes(self):
        """How many points each level has."""
        return [mask.shape[1] for mask in self.masks]


def point_grid(T, levels):
    """The time, in steps, and the level of each of the P points of T steps, two (P,) on the CPU.

    Level l has ceil(T / 2^l) points, 2^l steps apart."""
    times = [torch.arange(0, T, 2 ** level) for level in range(levels)]
    level = torch.repeat_interleave(torch.tensor([len(time) for time in times]))  # 0, 0 .. 1
    return torch.cat(times), level


class Detector(nn.Module):
    """ActionFormer with quality branches, as DetectorSettings `s` describe it."""

    def __init__(self, dim_in, num_classes, s):
        super().__init__()
        C = s.channels
        _, ranges = s.levels()
        self.input = Input(dim_in, s)
        self.backbone = Backbone(self.input.width, s)
        self.cls_trunk = Trunk(C, C)
        self.reg_trunk = Trunk(C, C)
        self.cls_out = Conv(C, num_classes)
        self.reg_out = Conv(C, 2)
        self.quality = QualityBranches(C, s.alqa, s.tnd_bias)
        self.scales = nn.Parameter(torch.ones(len(ranges)))
        self.register_buffer("ranges", torch.tensor(ranges), persistent=False)
        # Every class starts at a probability of 0.01. Offsets that are all negative would get no
        # gradient through the ReLU.
        nn.init.constant_(self.cls_out.bias, -math.log(99))
        nn.init.constant_(self.reg_out.bias, s.offset_bias)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def points(self, T):
        """The Points of a sequence of T steps."""
        time, level = (x.to(self.ranges.device) for x in point_grid(T, len(self.ranges)))
        return Points(time.float(), 2.0 ** level, *self.ranges[level].T)

    def padded(self, T):
        """The steps computed for T: a multiple of the largest stride, plus one.

        Every level must end in a step of padding, which the last valid step sees through the
        convolutions (as in the public ActionFormer: the LayerNorms have biases)."""
        unit = max(2 ** (len(self.scales) - 1), length_unit(T, self.scales.device))
        return T + -T % unit + 1

    def pyramid(self, feats, mask):
        """The neck's output, padded(T) steps long: [(B, T_l, C)], [(B, T_l)]."""
        T = feats.shape[1]
        rest = self.padded(T) - T
        feats = self.input(feats, mask)
        mask = F.pad(mask, (0, rest))
        feats = F.pad(feats, (0, 0, 0, rest)).mul_(mask[..., None])
        return self.backbone(feats, mask)

    def heads(self, x, mask, scale):
        """The predictions at points: cls_logits, offsets, p_tiou, p_tnd.

        x (B, P, C), mask (B, P), scale (P, 1) of the offsets."""
        cls_logits = self.cls_out(self.cls_trunk(x, mask), mask).float()
        h = self.reg_trunk(x, mask)
        offsets = F.relu(self.reg_out(h, mask).float() * scale)
        return cls_logits, offsets, *self.quality(h, mask)

    def forward(self, feats, mask):
        """feats (B, T, D), mask (B, T), any T >= 1 -> Outputs. Padding changes no valid output.

        In the heads, which run once, the levels stand one behind the other. Each ends in padding,
        so that none sees the one before it (Conv)."""
        T = feats.shape[1]
        levels, masks = self.pyramid(feats, mask)
        time, level = point_grid(masks[0].shape[1], len(levels))
        scale = self.scales[level.to(feats.device)][:, None]
        predicted = self.heads(torch.cat(levels, 1), torch.cat(masks, 1), scale)
        # Without the padding that pyramid() adds.
        kept = (time < T).nonzero()[:, 0].to(feats.device)
        predicted = [x.index_select(1, kept) for x in predicted]
        sizes = level[time < T].bincount().tolist()
        levels = [x[:, :size] for x, size in zip(levels, sizes)]
        masks = [x[:, :size] for x, size in zip(masks, sizes)]
        return Outputs(*predicted, torch.cat(masks, 1), self.points(T), levels, masks)


def forward(network, batch, s):
    """The network's output for a batch, on the device and in the precision of the settings.

    network: a Detector, or its method pyramid() where the heads are not needed."""
    kind = torch.device(s.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=s.precision == "bfloat16"):
        return s.apply(network, batch)


# ---- Targets, decoding, suppression -------------------------------------------------------------

def assign_targets(points, segments, labels, num_classes, radius):
    """Target assignment of ActionFormer, for ground truth and pseudo labels alike.

    A point is positive if it lies within `radius` strides of a segment's middle and inside the
    segment, and the larger offset lies in its level's range (both ends included). The shortest
    such segment wins; segments as short to 1e-3 all mark the class target.
    segments  B x (N, 2) in grid steps, labels B x (N,)
    ->        cls_target (B, P, K) in {0, 1}, offset_target (B, P, 2) in strides"""
    # Padding is an empty segment, which holds no point. One more video, with such a segment, so
    # that N >= 1; it is left out again.
    empty = points.time.new_zeros(1, 2)
    segments = pad_sequence([*segments, empty], batch_first=True)[:-1]
    labels = pad_sequence([*labels, empty[:, 0].long()], batch_first=True)[:-1]  # (B, N)
    start, end = segments[:, None].float().unbind(-1)  # (B, 1, N)
    time, stride, low, high = (part[:, None] for part in points)  # (P, 1)

    middle = (start + end) / 2
    first = torch.maximum(middle - radius * stride, start)
    last = torch.minimum(middle + radius * stride, end)
    central = (time > first) & (time < last)
    offsets = torch.stack([time - start, end - time], -1)  # (B, P, N, 2)
    larger = offsets.amax(-1)
    positive = central & (larger >= low) & (larger <= high)  # (B, P, N)

    length = torch.where(positive, end - start, math.inf)
    shortest, winner = length.min(-1)  # (B, P)
    chosen = positive & (length <= shortest[..., None] + 1e-3)
    onehot = torch.eye(num_classes, device=labels.device)[labels.long()]
    cls_target = (chosen.float() @ onehot).clamp(max=1)
    offset_target = torch.take_along_dim(offsets, winner[..., None, None], 2)[:, :, 0] / stride
    return cls_target, offset_target * cls_target.any(-1, keepdim=True)


def rows_by_group(scores, groups):
    """The rows of each group, best score first: scores (N,), groups (N,) integers -> (G, M).

    The largest group comes first; -1 follows the last row of a smaller one."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    _, counts = torch.unique_consecutive(groups[order], return_counts=True)
    parts = sorted(order.split(counts.tolist()), key=len, reverse=True)
    return pad_sequence(parts or [order], batch_first=True, padding_value=-1)


def soft_nms(segments, scores, groups, sigma, min_score, max_num):
    """Gaussian Soft-NMS (Bodla et al. 2017), all groups at once.

    In each group the best detection is taken and every other one's score multiplied by
    exp(-tIoU^2 / sigma), until all are below min_score or max_num are taken. One rank of all
    groups a step: group by group is five times slower.
    segments  (N, 2), scores (N,)
    groups    (N,) integers: a class, or a video's class
    ->        index (M,) into the input and decayed scores (M,), best score first"""
    index = rows_by_group(scores, groups)  # (G, M)
    sizes = (index >= 0).sum(1).cpu().numpy()
    left = torch.where(index >= 0, scores[index], 0).cpu().numpy()
    boxes = segments[index].cpu().numpy()
    taken = []
    for rank in range(min(max_num, index.shape[1])):
        row = np.arange((sizes > rank).sum())  # the groups that have so many, which come first
        left, boxes = left[:len(row)], boxes[:len(row)]
        best = left.argmax(1)
        score = left[row, best]
        if score.max() < min_score:
            break
        taken.append((row, best, score))
        left *= np.exp(-tiou(boxes[row, best][:, None], boxes) ** 2 / sigma)
        left[row, best] = 0
    if not taken:
        return index.new_zeros(0), scores[:0]
    row, best, score = (np.concatenate(column) for column in zip(*taken))
    kept = (score >= min_score) & (score > 0)  # 0 marks what is taken
    score = torch.from_numpy(score[kept]).to(scores.device)
    score, order = score.sort(descending=True, stable=True)
    return index[row[kept], best[kept]][order], score


def vote(kept, segments, scores, overlap):
    """Segment voting of ActionFormer: each kept segment becomes the mean of its neighbours.

    The mean is over all segments whose tIoU with it is at least `overlap`, itself among them, each
    with the weight score * tIoU.
    kept      (M, 2), some of the segments (N, 2), scores (N,)
    ->        (M, 2)"""
    near = tiou(kept[:, None], segments)  # (M, N)
    weight = torch.where(near >= overlap, near * scores, 0)
    return weight @ segments / weight.sum(1, keepdim=True).clamp(min=1e-12)
