"""The detector of APL (Sec. 3): ActionFormer [62] with the tIoU and tND branches, channels-last.

Input   feats (B, T, D), mask (B, T), any T >= 1; True = valid in every mask of the project.
Output  raw predictions at P points over all pyramid levels; targets, losses and decoding are functions of them.
Holds   Eq. (2), the predicted tIoU and tND; the geometry of segments; target assignment; decoding; Soft-NMS.

Legend, the same letters in every file:
    B videos, T feature steps, D input channels, C channels, K classes, N segments of a video (padded in a batch),
    P points over all levels, H heads, L levels, G groups of detections, M detections of the largest group.
    Segments are (..., 2), start and end, in feature-grid units: step t of a feature sequence lies at t.
    An instances record is a dict of tensors {"segments": (N, 2), "labels": (N,), ...}: ground truth has these two,
    detections and pseudo labels add "scores" (joint) and more, each (N,).

`python model.py` prints the complexity table (Tab. S6).
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

BRANCHES = ("none", "tiou", "diou", "tiou+tnd")  # the localization quality branches of Tab. 3(b); none = plain ActionFormer


# ---- Segments: one tIoU and one tND for all -------------------------------------------------------------------------

def tiou(a, b, eps=1e-8):
    """Temporal IoU of segments a (..., 2) and b (..., 2), broadcast; an empty union gives 0. Returns (...) in [0, 1].

    Tensors or, in the loops of Soft-NMS and mAP, whose steps are too small for torch to be fast, NumPy arrays."""
    lib = np if isinstance(a, np.ndarray) else torch
    inter = (lib.minimum(a[..., 1], b[..., 1]) - lib.maximum(a[..., 0], b[..., 0])).clip(min=0)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inter
    return inter / union.clip(min=eps)


def tnd(a, b, eps=1e-8):
    """Temporal normalized distance d^2 / c^2 (Sec. 3.1) of segments (..., 2), broadcast: d between the centres, c the
    length of the smallest enclosing segment. Returns (...) in [0, 1]; at most 1/4 where the segments share a point."""
    d = (a.sum(-1) - b.sum(-1)) / 2
    c = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return (d / c.clamp(min=eps)) ** 2


# ---- Layers ---------------------------------------------------------------------------------------------------------

class Taps(torch.autograd.Function):
    """y_t = mask_t * (W_0 x_{t-1} + W_1 x_t + W_2 x_{t+1}): x (N, in), W (3, out, in), mask (N,) -> (N, out).

    Written out because autograd would hold three results, or three copies of x: here each matrix product adds to the sum itself."""

    @staticmethod
    def forward(ctx, x, W, mask):
        ctx.save_for_backward(x, W, mask)
        y = x @ W[1].T
        y[1:].addmm_(x[:-1], W[0].T)
        y[:-1].addmm_(x[1:], W[2].T)
        return y.mul_(mask[:, None])

    @staticmethod
    def backward(ctx, gradient):
        x, W, mask = ctx.saved_tensors
        g, dx = gradient * mask[:, None], None
        if ctx.needs_input_grad[0]:
            dx = g @ W[1]
            dx[:-1].addmm_(g[1:], W[0])
            dx[1:].addmm_(g[:-1], W[2])
        return dx, torch.stack([g[1:].T @ x[:-1], g.T @ x, g[:-1].T @ x[1:]]), None


class Conv(nn.Module):
    """Masked convolution, k = 3: x (B, T, in), mask (B, T) -> (B, T, out), 0 where the mask is.

    The videos of a batch are convolved as one sequence. A gap, a step at which x is 0 and the mask False, must open each of them (and
    each level, where the levels follow one another): nothing lies before it."""

    def __init__(self, dim_in, dim_out, bias=True):
        super().__init__()
        bound = 1 / math.sqrt(3 * dim_in)
        self.weight = nn.Parameter(torch.empty(3, dim_out, dim_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(dim_out)) if bias else None

    def forward(self, x, mask):
        kind = x.device.type  # autocast does not look into Taps
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = Taps.apply(x.to(dtype).flatten(0, 1), self.weight.to(dtype), mask.flatten()).unflatten(0, mask.shape)
        return y if self.bias is None else y + self.bias * mask[..., None]


class Trunk(nn.Module):
    """Two convolutions with LayerNorm and ReLU, which embed the features and open each head: x (B, T, in), mask (B, T) -> (B, T, out).
    The steps `gaps` stay 0, as a convolution wants them."""

    def __init__(self, dim_in, dim):
        super().__init__()
        self.convs = nn.ModuleList([Conv(dim_in, dim, bias=False), Conv(dim, dim, bias=False)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.convs)

    def forward(self, x, mask, gaps):
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x, mask)).index_fill_(1, gaps, 0), inplace=True)
        return x


def shifted(x, stride=1):
    """The steps t-1, t and t+1 of x (B, T, C) for every stride-th t; outside the sequence lies `0`."""
    T = x.shape[1]
    padded = F.pad(x, (0, 0, 1, 1))
    return [padded[:, i:i + T:stride] for i in range(3)]


class DepthwiseConv(nn.Module):
    """Depth-wise convolution, k = 3, of the shifted copies of an input: 3 x (B, T, C) -> (B, T, C)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, dim).uniform_(-1 / math.sqrt(3), 1 / math.sqrt(3)))

    def forward(self, taps):
        before, at, after = taps
        w = self.weight.to(at.dtype)
        return (at * w[1]).addcmul_(before, w[0]).addcmul_(after, w[2])


class DropPath(nn.Module):
    """Residual branch: skip + scale * x, the scale learned per channel from 1e-4, with stochastic depth (one draw a video)."""

    def __init__(self, dim, rate):
        super().__init__()
        self.rate = rate
        self.share = (0, 1)  # this process and their number: a batch gets the same draws, however many share it
        self.scale = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, skip, x):
        if not self.training or self.rate == 0:
            return torch.addcmul(skip, x, self.scale)
        rank, number = self.share
        keep = torch.rand(len(x) * number, 1, 1, device=x.device)[rank::number] >= self.rate
        return torch.addcmul(skip, x, self.scale * keep / (1 - self.rate))


def local_attention(q, k, v, mask, heads, half):
    """Softmax attention of every step over the valid steps within `half` on either side; O(T * half) time and memory.

    q, k, v (B, T, C), mask (B, T) -> (B, T, C). Queries are cut into blocks, each with its keys and a margin on both sides.
    A step always sees itself, so the rows of padding stay finite; they are masked by the caller."""
    B, T, C = q.shape
    margin = max(min(half, T), 8)  # a block is two margins long: enough for matrix products, half of its keys are needed
    size = 2 * margin
    rest, blocks = -T % size, -(-T // size)

    def windows(x):  # the keys of every block: (B, T, ...) -> (B * blocks, 2 * size, ...)
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (margin, margin + rest)).unflatten(1, (blocks + 1, size))
        return torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1)
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B * blocks, steps, C) -> (B * blocks, H, steps, C / H)
    gap = torch.arange(2 * size, device=q.device) - margin - torch.arange(size, device=q.device)[:, None]  # key - query
    seen = (gap.abs() <= half) & windows(mask)[:, None] | (gap == 0)  # (B * blocks, size, 2 * size)
    q = F.pad(q, (0, 0, 0, rest)).view(B * blocks, size, C)
    out = F.scaled_dot_product_attention(split(q), split(windows(k)), split(windows(v)), attn_mask=seen[:, None])
    return out.transpose(1, 2).reshape(B, T + rest, C)[:, :T]


class Attention(nn.Module):
    """Multi-head self-attention in a local window, with depth-wise convolutions before q, k and v, which may halve T:
    x (B, T, C), mask (B, T / stride) -> (B, T / stride, C). Padding is not attended to; its own rows are masked by the caller."""

    def __init__(self, dim, heads, window, stride):
        super().__init__()
        self.heads, self.stride, self.half = heads, stride, window // 2 if window > 0 else 10 ** 9  # 0: the whole sequence
        self.convs = nn.ModuleList(DepthwiseConv(dim) for _ in "qkv")
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in "qkv")
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in "qkv")
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask):
        taps = shifted(x, self.stride)
        q, k, v = (linear(norm(conv(taps))) for conv, norm, linear in zip(self.convs, self.norms, self.linears))
        return self.proj(local_attention(q, k, v, mask, self.heads, self.half))


class Block(nn.Module):
    """Pre-LN transformer block; stride 2 halves T, the skip path by max pooling (k = 3)."""

    def __init__(self, dim, heads, window, stride, drop_path):
        super().__init__()
        self.stride = stride
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, window, stride)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop1, self.drop2 = DropPath(dim, drop_path), DropPath(dim, drop_path)

    def forward(self, x, mask):
        """x (B, T, C), mask (B, T) -> x (B, T / stride, C), mask (B, T / stride)."""
        mask, skip = mask[:, ::self.stride], x
        if self.stride > 1:  # nothing lies before the first step; after the last valid step lies padding, 0
            before, at, after = shifted(x, self.stride)
            before = torch.cat([at[:, :1], before[:, 1:]], 1)
            skip = torch.maximum(torch.maximum(before, at), after)
        x = self.drop1(skip, self.attn(self.norm1(x), mask)).mul_(mask[..., None])
        return self.drop2(x, self.mlp(self.norm2(x))).mul_(mask[..., None]), mask


def sinusoid(T, C, device):
    """Sinusoidal absolute position (T, C), divided by sqrt(C) as ActionFormer does."""
    angle = torch.arange(T, device=device)[:, None] / 10000 ** (torch.arange(0, C, 2, device=device) / C)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :C] / math.sqrt(C)


class Backbone(nn.Module):
    """Two embedding convolutions, stem blocks at full length, then one halving block for each further level, and the
    neck's LayerNorm: (B, 1 + T, D), of which the first step is a gap -> [(B, T / 2^l, C)], [(B, T / 2^l)]."""

    def __init__(self, dim_in, dim, heads, windows, stem, drop_path, position):
        super().__init__()
        self.position = position
        self.embed = Trunk(dim_in, dim)
        self.stem = nn.ModuleList(Block(dim, heads, windows[0], 1, drop_path) for _ in range(stem))
        self.branch = nn.ModuleList(Block(dim, heads, w, 2, drop_path) for w in windows[1:])
        self.neck = nn.ModuleList(nn.LayerNorm(dim) for _ in windows)

    def forward(self, x, mask):
        x, mask = self.embed(x, mask, torch.tensor([0], device=x.device))[:, 1:], mask[:, 1:]
        if self.position:
            x = x + sinusoid(x.shape[1], x.shape[2], x.device) * mask[..., None]
        for block in self.stem:
            x, mask = block(x, mask)
        levels, masks = [x], [mask]
        for block in self.branch:
            x, mask = block(x, mask)
            levels.append(x), masks.append(mask)
        return [norm(x) for norm, x in zip(self.neck, levels)], masks


class QualityBranches(nn.Module):
    """Eq. (2): P_tiou = sigmoid(conv(h)), P_tnd = sigmoid(conv(h)).

    h (B, T, C) is the last hidden layer of the regression head (the branches share all but the final convolution);
    returns two (B, T) in [0, 1]. One branch (Tab. 3(b)) learns tIoU or DIoU alone and leaves P_tnd = 0; no branch leaves
    P_tiou = 1 and P_tnd = 0, with which the joint score is the class score. tnd_bias, -2, starts the tND branch (not given in
    the paper): from equal biases P_tiou - P_tnd would start at 0, where it is clamped and passes no gradient."""

    def __init__(self, dim, branches, tnd_bias):
        super().__init__()
        self.tiou = Conv(dim, 1) if branches != "none" else None
        self.tnd = Conv(dim, 1) if branches == "tiou+tnd" else None
        if self.tnd is not None:
            nn.init.constant_(self.tnd.bias, tnd_bias)

    def forward(self, h, mask):
        P_tiou, P_tnd = torch.ones(mask.shape, device=h.device), torch.zeros(mask.shape, device=h.device)
        if self.tiou is not None:
            P_tiou = torch.sigmoid(self.tiou(h, mask)[..., 0].float())
        if self.tnd is not None:
            P_tnd = torch.sigmoid(self.tnd(h, mask)[..., 0].float())
        return P_tiou, P_tnd


class Points(NamedTuple):
    """The P points of the pyramid, each (P,): time and stride in grid steps, the range of offsets it may regress."""
    time: torch.Tensor
    stride: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


class Outputs(NamedTuple):
    """Raw predictions: cls_logits (B, P, K); offsets (B, P, 2) >= 0 to start and end, in strides; p_tiou, p_tnd (B, P);
    mask (B, P); points; levels, the pyramid [(B, T_l, C)]; masks [(B, T_l)]."""
    cls_logits: torch.Tensor
    offsets: torch.Tensor
    p_tiou: torch.Tensor
    p_tnd: torch.Tensor
    mask: torch.Tensor
    points: Points
    levels: list
    masks: list


class Detector(nn.Module):
    """ActionFormer with quality branches. `windows` and `ranges` give one entry a level (window 0: the whole sequence)."""

    def __init__(self, dim_in, num_classes, channels=512, heads=4, windows=(19,) * 6, stem=2, drop_path=0.1,
                 ranges=((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, math.inf)), branches="tiou+tnd", tnd_bias=-2.0, position=False,
                 offset_bias=1.0):
        super().__init__()
        if len(windows) != len(ranges):
            raise ValueError(f"{len(windows)} windows for {len(ranges)} regression ranges: each level needs one of both")
        self.backbone = Backbone(dim_in, channels, heads, windows, stem, drop_path, position)
        self.cls_trunk, self.reg_trunk = Trunk(channels, channels), Trunk(channels, channels)
        self.cls_out, self.reg_out = Conv(channels, num_classes), Conv(channels, 2)
        self.quality = QualityBranches(channels, branches, tnd_bias)
        self.scales = nn.Parameter(torch.ones(len(windows)))
        self.register_buffer("ranges", torch.tensor(ranges, dtype=torch.float32), persistent=False)
        nn.init.constant_(self.cls_out.bias, -math.log(99))  # every class starts at a probability of 0.01
        nn.init.constant_(self.reg_out.bias, offset_bias)  # offsets that are all negative get no gradient through the ReLU
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def points(self, T):
        """The points of a sequence of T steps; level l has ceil(T / 2^l) of them, 2^l steps apart."""
        rows = [torch.stack(torch.broadcast_tensors(torch.arange(0.0, T, 2 ** l, device=low.device),
                                                    torch.full_like(low, 2 ** l), low, high)) for l, (low, high) in enumerate(self.ranges)]
        return Points(*torch.cat(rows, 1))

    def padded(self, T, coarse=False):
        """The steps computed for T. The LayerNorms' biases let the last valid step see that padding follows it (as in the public
        ActionFormer), so a step of padding must always follow, on every level. `coarse`: up to an eighth more, so that few lengths
        occur: CPUs prepare their bfloat16 products anew for every shape."""
        unit = max(2 ** (len(self.scales) - 1), 2 ** (T.bit_length() - 4) if coarse else 1)
        return T + -T % unit + 1

    def forward(self, feats, mask):
        """feats (B, T, D), mask (B, T), any T >= 1 -> Outputs. Padding changes no valid output."""
        T = feats.shape[1]
        rest = self.padded(T, feats.device.type == "cpu" and torch.is_autocast_enabled("cpu")) - T
        mask = F.pad(mask, (1, rest))
        feats = F.pad(feats, (0, 0, 1, rest)).mul_(mask[..., None])
        levels, masks = self.backbone(feats, mask)
        # The heads see all levels as one sequence, with a gap before each level.
        x, mask = (torch.cat([F.pad(l, (0,) * (2 * l.ndim - 4) + (1, 0)) for l in parts], 1) for parts in (levels, masks))
        sizes, lengths = ([-(-n // 2 ** l) for l in range(len(levels))] for n in (T + rest, T))
        gaps = [sum(sizes[:l]) + l for l in range(len(levels))]
        at = torch.cat([torch.arange(g + 1, g + 1 + n) for g, n in zip(gaps, lengths)]).to(x.device)  # (P,)
        gaps = torch.tensor(gaps, device=x.device)
        h = self.reg_trunk(x, mask, gaps)
        cls_logits, offsets = self.cls_out(self.cls_trunk(x, mask, gaps), mask)[:, at].float(), self.reg_out(h, mask)[:, at].float()
        scales = self.scales.repeat_interleave(torch.tensor(lengths, device=x.device))
        p_tiou, p_tnd = (p[:, at] for p in self.quality(h, mask))
        return Outputs(cls_logits, F.relu(offsets * scales[:, None]), p_tiou, p_tnd, mask[:, at], self.points(T),
                       [x[:, :n] for x, n in zip(levels, lengths)], [m[:, :n] for m, n in zip(masks, lengths)])


# ---- Targets, decoding, suppression ---------------------------------------------------------------------------------

def assign_targets(points, segments, labels, num_classes, radius=1.5):
    """Target assignment of ActionFormer, for ground truth and pseudo labels alike.

    segments B x (N, 2) in grid steps, labels B x (N,) -> cls_target (B, P, K) in {0, 1}, offset_target (B, P, 2) in strides.
    A point is positive if it lies within `radius` strides of a segment's middle and inside the segment, and the larger
    offset lies in its level's range (both ends included). The shortest such segment wins; segments as short to 1e-3 all mark
    the class target."""
    device = points.time.device
    seg = pad_sequence([s.reshape(-1, 2).float() for s in segments], batch_first=True)  # (B, N, 2)
    B, N = seg.shape[:2]
    counts = torch.tensor([len(s) for s in segments], device=device)
    P = len(points.time)
    if N == 0:
        return torch.zeros(B, P, num_classes, device=device), torch.zeros(B, P, 2, device=device)
    onehot = F.one_hot(pad_sequence([l.reshape(-1) for l in labels], batch_first=True).long(), num_classes).float()
    time, stride = points.time[:, None], points.stride[:, None]  # (P, 1), against (B, 1, N)
    start, end = seg[:, None, :, 0], seg[:, None, :, 1]
    offsets = torch.stack([time - start, end - time], -1)  # (B, P, N, 2)
    middle, reach = (start + end) / 2, offsets.amax(-1)
    near = torch.minimum(time - torch.maximum(middle - radius * stride, start),
                         torch.minimum(middle + radius * stride, end) - time) > 0
    real = torch.arange(N, device=device) < counts[:, None, None]
    covers = near & (reach >= points.low[:, None]) & (reach <= points.high[:, None]) & real
    length = torch.where(covers, end - start, math.inf)
    shortest, index = length.min(-1)  # (B, P)
    chosen = (length <= shortest[..., None] + 1e-3) & covers
    cls_target = (chosen.float() @ onehot).clamp(max=1)
    offset_target = offsets.gather(2, index[..., None, None].expand(-1, -1, 1, 2))[:, :, 0] / points.stride[:, None]
    return cls_target, offset_target


def decode(points, offsets):
    """Segments (B, P, 2) in grid steps of offsets (B, P, 2) in strides."""
    return points.time[:, None] + offsets * points.stride[:, None] * offsets.new_tensor([-1, 1])


def soft_nms(segments, scores, groups, sigma, min_score, max_num):
    """Gaussian Soft-NMS (Bodla et al. 2017), all groups (a class, or a video's class) at once.

    segments (N, 2), scores (N,), groups (N,) integers -> index (M,) into the input and decayed scores (M,), in descending
    order of score. In each group the best detection is taken and every other one's score multiplied by
    exp(-tIoU^2 / sigma), until all are below min_score or max_num are taken."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    counts = torch.unique_consecutive(groups[order], return_counts=True)[1]
    parts = sorted(order.split(counts.tolist()), key=len, reverse=True)  # the groups still active at any rank are the first ones
    index = pad_sequence(parts or [order], batch_first=True, padding_value=-1)  # (G, M)
    left, boxes = (x.cpu().numpy() for x in (torch.where(index >= 0, scores[index], 0), segments[index]))
    kept, row, counts = [], np.arange(len(index)), -np.sort(-counts.cpu().numpy())
    for rank in range(min(max_num, index.shape[1])):
        G = int((counts > rank).sum())
        at = left[:G].argmax(1)
        best = left[row[:G], at]
        if best.max() < min_score:
            break
        kept.append((row[:G], at, best))
        left[:G] *= np.exp(-tiou(boxes[row[:G], at][:, None], boxes[:G]) ** 2 / sigma)
        left[row[:G], at] = 0
    if not kept:
        return order[:0], scores[:0]
    row, at, best = (torch.from_numpy(np.concatenate(x)).to(scores.device) for x in zip(*kept))
    enough = (best >= min_score) & (best > 0)  # 0 marks what is taken
    best, order = best[enough].sort(descending=True, stable=True)
    return index[row, at][enough][order], best


# ---- Complexity -----------------------------------------------------------------------------------------------------

def complexity(modules, run):
    """Parameters and multiply-accumulates of `modules` while `run()` executes: (int, int).

    Counted as Tab. S6 does: weights with biases of convolutions and linear layers at valid steps; no LayerNorm, no scales,
    no attention products."""
    kinds = (Conv, DepthwiseConv, nn.Linear)
    layers = {layer for module in modules for layer in module.modules() if isinstance(layer, kinds)}
    inside = {layer for module in modules for block in module.modules() if isinstance(block, Block) for layer in block.modules()}
    macs = []

    def count(module, inputs, output):  # a block's layers all work at its output's steps
        mask = output[1] if isinstance(module, Block) else inputs[1] if isinstance(module, Conv) else output[..., 0] == output[..., 0]
        macs.append(int(mask.sum()) * sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, kinds)))

    counted = [m for module in modules for m in module.modules() if isinstance(m, Block) or (m in layers and m not in inside)]
    hooks = [module.register_forward_hook(count) for module in counted]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return sum(p.numel() for layer in layers for p in layer.parameters()), sum(macs)


def main():
    """Print Tab. S6 (THUMOS14: D = 2048, T = 2304, 20 classes) beside the paper's figures."""
    from icd import Discriminator  # the table alone needs it; the detector does not
    detector, icd = Detector(2048, 20).eval(), Discriminator(2048).eval()
    feats, mask, pair = torch.zeros(1, 2304, 2048), torch.ones(1, 2304, dtype=torch.bool), torch.zeros(10, 2048)
    heads = [detector.cls_trunk, detector.cls_out, detector.reg_trunk, detector.reg_out]
    rows = [("main (backbone + neck)", [detector.backbone], lambda: detector(feats, mask), "26.017 M, 30.608 G"),
            ("two heads", heads, lambda: detector(feats, mask), "3.179 M, 14.422 G"),
            ("heads + tIoU and tND", [*heads, detector.quality], lambda: detector(feats, mask), "3.182 M, 14.436 G"),
            ("ICD, 10 pairs", [icd], lambda: icd(pair, pair), "+0.5 M, +0.005 G")]
    print(f"{'part':24}{'parameters':>12}{'GMACs':>10}   the paper (Tab. S6)")
    for name, modules, run, paper in rows:
        parameters, macs = complexity(modules, run)
        print(f"{name:24}{parameters:12,}{macs / 1e9:10.3f}   {paper}")


if __name__ == "__main__":
    main()
