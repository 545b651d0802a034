"""APL on a two-stage detector, BMN (Lin et al. 2019): Table 1's TSN rows and Table S3.

    python -m extras.bmn --dataset my.json --features DIR ...       as train.py, all three stages
    python -m extras.bmn --resume runs/my
    python -m extras.bmn --checkpoint runs/my --features video.npy  as evaluate.py
    python -m extras.bmn --proposals runs/my/predictions.json --gt my.json      AR@AN and its area
    python -m extras.bmn --export-proposals FILE --checkpoint runs/my      of all videos of its run
    python -m extras.bmn --export-proposals FILE --checkpoint runs/my --features video.npy

BMN scores every pair of a start step s and an end step e: the boundary probabilities start(s) and
end(e), and a map of two numbers, how much the pair overlaps an action (regression) and whether it
is one (classification). The regression is P_tiou of Eq. (2); a third map is P_tnd. A classifier of
segments, trained on the labelled videos alone, names the class. The joint score of Eq. (4) is

    start * end * classification * class score * max(P_tiou - P_tnd, eps).

The three stages, ALQA's selection, ICD and ACP are those of the method's files. A video longer
than a window is seen in half-overlapping windows. Letters as in model.py, and W steps of a window,
P pairs (s, e) of a window, s <= e, N samples of a pair. [B] is the public BMN's, [J] neither that
nor the paper's.
"""
import sys
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import alqa
import data
import evaluate
import model
import train
from plumbing import checkpoints, forms, tables
from plumbing.arguments import ARGUMENTS, add_truth
from plumbing.files import check_replaced, write_json
from plumbing.inputs import Input
from plumbing.listing import videos_of
from plumbing.processes import means_of_all
from plumbing.runs import guard
from plumbing.settings import Nothing, NotNegative, Parser, Width, parser_of
from plumbing.sources import whole_paths
from plumbing.words import BadInput, say, several, warn

GROUPS = 4  # of the grouped convolutions [B]
MOST_STEPS = 512  # of a window: a map has as many rows and columns
MARGIN_OF_BOUNDARY = 1.5  # steps to either side of a start or end that are its region [B]
IS_BOUNDARY = 0.5  # share of a step in such a region from which it is positive [B]
IS_ACTION = 0.9  # tIoU from which a pair is positive in the classification map [B]
HIGH, LOW = 0.7, 0.3  # tIoU of the pairs of which the regression draws equal numbers [B]
IS_OF_CLASS = 0.5  # tIoU from which a pair teaches the classifier [J]
OF_REGRESSION = 10.0  # weight of the regression loss [B]
OF_MAXIMUM = 0.5  # share of the largest boundary probability that is a boundary too [B]
AT_ONCE = 8  # windows that are seen at once in detection


# ---- The boundary-matching layer ----------------------------------------------------------------

def pairs_of(W):
    """The pairs of a window, s <= e: the steps s and e, (2, P)."""
    return torch.triu_indices(W, W)


def sampling(W, s):
    """How the boundary-matching layer samples a window: a sparse (P * N, W), float64.

    Row p * N + n weighs the W steps for sample n of pair p: the mean of s.points points, linearly
    interpolated, 0 outside the window. The samples span the pair and, on either side, the margin
    times the pair's length and one more step. Between steps -1 and 0 the first step counts whole,
    as in the public BMN, which rounds towards 0."""
    start, end = pairs_of(W).double()
    more = s.margin * (end + 2 - start)
    first, last = start - more, end + 1 + more
    every = s.samples * s.points
    share = torch.arange(every).double() / max(every - 1, 1)
    position = first[:, None] + (last - first)[:, None] * share  # (P, N * points)
    below, above = position.trunc(), position.ceil()
    part = position - below
    row = torch.arange(position.numel()) // s.points
    indices = []
    weights = []
    for step, weight in ((below, 1 - part), (above, part)):
        inside = ((step >= 0) & (step < W)).flatten()
        indices.append(torch.stack([row, step.flatten().long()])[:, inside])
        weights.append(weight.flatten()[inside] / s.points)
    size = (len(start) * s.samples, W)
    return torch.sparse_coo_tensor(
        torch.cat(indices, 1), torch.cat(weights), size, check_invariants=True).coalesce()


class SparseProduct(torch.autograd.Function):
    """S @ y for a sparse S whose transpose is at hand: torch's own backward makes it anew."""

    @staticmethod
    def forward(ctx, S, S_T, y):
        ctx.transpose = S_T
        return S @ y

    @staticmethod
    def backward(ctx, gradient):
        return None, None, ctx.transpose @ gradient.contiguous()


class Matching(nn.Module):
    """The boundary-matching layer and the convolution over its samples, as one sparse product.

    The weights of a sample are applied to every step first: a pair then only adds up N times a
    few rows, and the (W, N, W, W) mask of the public code is never multiplied.
    x   (B, W, C)
    ->  (P, B, wide)"""

    def __init__(self, s):
        super().__init__()
        self.s = s
        self.products = None  # S and its transpose, made when they are first needed

    def make(self, device):
        """The sparse product S (P, N * W) and its transpose: a pair's samples in one row."""
        W, N = self.s.window(), self.s.samples
        S = sampling(W, self.s)
        row, step = S.indices()
        index = torch.stack([row // N, row % N * W + step])
        size = (len(S) // N, N * W)
        weights = S.values().float()
        forth = torch.sparse_coo_tensor(index, weights, size, check_invariants=True)
        both = forth, forth.transpose(0, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this form a beta
            return [part.coalesce().to_sparse_csr().to(device) for part in both]

    def forward(self, x, weight):
        """weight (wide, C, N, 1, 1), of the convolution."""
        B, W, _ = x.shape
        wide, C, N = weight.shape[:3]
        self.products = self.products or self.make(x.device)
        by_sample = weight[..., 0, 0].permute(1, 2, 0).reshape(C, N * wide)
        y = (x @ by_sample).reshape(B, W, N, wide)
        y = y.permute(2, 1, 0, 3).reshape(N * W, B * wide)
        return SparseProduct.apply(*self.products, y).reshape(-1, B, wide)


# ---- The network --------------------------------------------------------------------------------

def windows_of(x, mask, W):
    """Sequences x (B, T, C), mask (B, T), cut into half-overlapping windows of W steps.

    A video's windows are the same beside a longer one: each begins half a window after the last,
    until one holds the video's end; zeros follow, and windows without a step.
    ->  (B, n, W, C), which of its steps are the video's (B, n, W), where windows begin (n,)"""
    T, half = x.shape[1], max(W // 2, 1)
    first = range(0, max(T - W, 0) + half, half)
    more = first[-1] + W - T
    x, mask = F.pad(x, (0, 0, 0, more)), F.pad(mask, (0, more))
    windows, steps = (torch.stack([part[:, i:i + W] for i in first], 1) for part in (x, mask))
    begin = torch.tensor(first, device=x.device)
    needed = (begin == 0) | (begin + W - half < mask.sum(1, keepdim=True))  # (B, n)
    return windows, steps & needed[..., None], begin


def at_pairs(start, end):
    """Numbers at the steps of the windows, two (B, n, W), at the pairs: two (B, n * P)."""
    s, e = pairs_of(start.shape[2]).to(start.device)
    return start[..., s].flatten(1), end[..., e].flatten(1)


class Outputs(NamedTuple):
    """Raw predictions at the pairs of all windows, and the base that they were made from."""
    cls_logits: torch.Tensor  # (B, P, K), of the classifier of segments
    start: torch.Tensor  # (B, n, W), boundary probabilities of the n windows
    end: torch.Tensor
    action: torch.Tensor  # (B, P), the classification map
    p_tiou: torch.Tensor  # (B, P), the regression map
    p_tnd: torch.Tensor  # (B, P)
    mask: torch.Tensor  # (B, P), the pairs that are proposals; in training all inside the video
    steps: torch.Tensor  # (B, n, W), which steps of the windows are the video's
    first: torch.Tensor  # (n,), where the windows begin
    levels: list  # [(B, T, C)]
    masks: list  # [(B, T)]

    def predictions(self):
        """What the heads give."""
        return self.cls_logits, self.start, self.end, self.action, self.p_tiou, self.p_tnd

    def p_cls(self):
        """All of the joint score but ALQA's reliability: (B, P, K)."""
        start, end = at_pairs(self.start, self.end)
        proposal = start * end * self.action
        return torch.sigmoid(self.cls_logits) * proposal[..., None]

    def segments(self):
        """The pairs as segments (B, P, 2) in grid steps: from the first step's begin to the
        last one's end."""
        s, e = pairs_of(self.start.shape[2]).to(self.first.device)
        pairs = torch.stack([s - 0.5, e + 0.5], -1)  # (P, 2)
        segments = (self.first[:, None, None] + pairs).flatten(0, 1)
        return segments.expand(len(self.mask), -1, -1)

    def sizes(self):
        """How many pairs each window has."""
        n = len(self.first)
        return [self.mask.shape[1] // n] * n


def peaks(p, inside):
    """Which steps (B, n, W) are boundaries: local peaks, or over half of the largest."""
    p = torch.where(inside, p, 0)
    around = F.pad(p, (1, 1))
    peak = (p > around[..., :-2]) & (p > around[..., 2:])
    high = p > OF_MAXIMUM * p.amax(-1, keepdim=True)
    return (peak | high) & inside


class Segmentwise(nn.Module):
    """The classifier of segments: linear in the means of the base before, inside and after a pair.

    Half the pair's length is before, and as much after it.
    x   (B, W, C)
    ->  (B, P, K)"""

    def __init__(self, dim, num_classes):
        super().__init__()
        self.before = nn.Linear(dim, num_classes, bias=False)
        self.inside = nn.Linear(dim, num_classes)
        self.after = nn.Linear(dim, num_classes, bias=False)
        nn.init.zeros_(self.inside.bias)

    def forward(self, x):
        W = x.shape[1]
        s, e = pairs_of(W).to(x.device)
        half = (e - s + 2) // 2
        ranges = (
            (self.before, (s - half).clamp(min=0), s),
            (self.inside, s, e + 1),
            (self.after, e + 1, (e + 1 + half).clamp(max=W)))
        logits = 0
        for layer, first, last in ranges:
            sums = F.pad(layer(x).float().cumsum(1), (0, 0, 1, 0))  # (B, W + 1, K)
            count = (last - first).clamp(min=1)[:, None]
            logits = logits + (sums[:, last] - sums[:, first]) / count
        return logits


class Detector(nn.Module):
    """BMN as Settings `s` describe it; its parameters have the public BMN's names."""

    def __init__(self, dim_in, num_classes, s):
        super().__init__()
        C = s.hidden
        self.input = Input(dim_in, s)
        self.window = s.window()

        def conv(dim, out, width, groups=1):
            return nn.Conv1d(dim, out, width, padding=width // 2, groups=groups)

        # The first convolution is in groups where the features can be.
        dim_in = self.input.width
        first = GROUPS if dim_in % GROUPS == 0 else 1
        self.x_1d_b = nn.Sequential(
            conv(dim_in, C, 3, first), nn.ReLU(), conv(C, C, 3, GROUPS), nn.ReLU())
        self.x_1d_s = nn.Sequential(conv(C, C, 3, GROUPS), nn.ReLU(), conv(C, 1, 1), nn.Sigmoid())
        self.x_1d_e = nn.Sequential(conv(C, C, 3, GROUPS), nn.ReLU(), conv(C, 1, 1), nn.Sigmoid())
        self.x_1d_p = nn.Sequential(conv(C, C, 3), nn.ReLU())
        self.matching = Matching(s)
        self.x_3d_p = nn.Sequential(
            nn.Conv3d(C, s.map_wide, (s.samples, 1, 1)), nn.ReLU())
        width = s.map_width
        self.x_2d_p = nn.Sequential(
            nn.Conv2d(s.map_wide, width, 1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2, 1), nn.Sigmoid())
        self.tnd = nn.Conv2d(width, 1, 1) if s.alqa == "tiou+tnd" else None
        if self.tnd:
            nn.init.constant_(self.tnd.bias, s.tnd_bias)
        self.classes = Segmentwise(C, num_classes)

    def pyramid(self, feats, mask):
        """The base, the one level that ACP contrasts: [(B, T, C)], [(B, T)]."""
        x = self.input(feats, mask) * mask[..., None]
        for i in (0, 2):
            x = F.relu(self.x_1d_b[i](x.transpose(1, 2)).transpose(1, 2)) * mask[..., None]
        return [x], [mask]

    def maps(self, x):
        """The map of a window: x (B, W, C) -> regression, classification, tND, each (B, P)."""
        B, W, _ = x.shape
        s, e = pairs_of(W).to(x.device)
        x = F.relu(self.x_1d_p[0](x.transpose(1, 2)).transpose(1, 2))
        wide, first = self.x_3d_p[0], self.x_2d_p[0]
        narrow = first.weight[..., 0, 0]

        def narrowed(h):
            return F.relu(F.linear(F.relu(h + wide.bias), narrow, first.bias))

        # Where e < s nothing is sampled: one number a channel.
        pairs = narrowed(self.matching(x, wide.weight))  # (P, B, width)
        nothing = narrowed(torch.zeros_like(wide.bias))
        whole = nothing.expand(W, W, B, -1).index_put((s, e), pairs)  # (W, W, B, width)
        h = self.x_2d_p[2:6](whole.permute(2, 3, 0, 1))  # (B, width, W, W)
        regression, classification = self.x_2d_p[6:](h)[..., s, e].unbind(1)
        if self.tnd:
            return regression, classification, torch.sigmoid(self.tnd(h))[:, 0, s, e]
        return regression, classification, torch.zeros_like(regression)

    def of_windows(self, x):
        """The predictions of windows x (B, W, C): start, end (B, W), the maps (B, P), (B, P, K)."""
        start, end = (head(x.transpose(1, 2))[:, 0] for head in (self.x_1d_s, self.x_1d_e))
        return start, end, *self.maps(x), self.classes(x)

    def forward(self, feats, mask):
        """feats (B, T, D), mask (B, T), any T >= 1 -> Outputs; the windows are seen in float32."""
        B = len(mask)
        (x,), masks = self.pyramid(feats, mask)
        windows, steps, first = windows_of(x, mask, self.window)  # (B, n, W, C), (B, n, W), (n,)
        windows = windows.float().flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            parts = [self.of_windows(part) for part in windows.split(AT_ONCE * B)]
        start, end, *maps, cls_logits = (torch.cat(part) for part in zip(*parts))
        start, end = (part.unflatten(0, steps.shape[:2]) * steps for part in (start, end))
        regression, action, p_tnd = (part.reshape(B, -1) for part in maps)
        boundaries = (steps, steps)
        if not self.training:
            boundaries = (peaks(start, steps), peaks(end, steps))
        of_start, of_end = at_pairs(*boundaries)
        return Outputs(
            cls_logits.reshape(B, -1, cls_logits.shape[-1]), start, end, action, regression, p_tnd,
            of_start & of_end, steps, first, [x], masks)


# ---- Targets and losses -------------------------------------------------------------------------

def boundary_target(times, W):
    """The share of each step of a window that lies in the region of a boundary -> (W,).

    times  (N,), starts or ends in grid steps"""
    step = torch.arange(W, device=times.device)[:, None]
    last = torch.minimum(step + 0.5, times + MARGIN_OF_BOUNDARY)
    first = torch.maximum(step - 0.5, times - MARGIN_OF_BOUNDARY)
    return F.pad((last - first).clamp(min=0), (0, 1)).amax(1)


def weighted_logistic(p, positive, use, eps=1e-6):
    """The weighted binary logistic loss of BMN -> scalar.

    Positives and negatives weigh the same as wholes; 0 where nothing is used.
    p, positive, use  of one shape: probabilities, bool, and which count"""
    p, positive = p[use], positive[use]
    if len(p) == 0:
        return p.sum()
    ratio = len(p) / positive.sum().clamp(min=1)
    of_positive = 0.5 * ratio * torch.log(p + eps)
    of_negative = 0.5 * ratio / (ratio - 1).clamp(min=eps) * torch.log(1 - p + eps)
    return -torch.where(positive, of_positive, of_negative).mean()


def drawn_pairs(tIoU, use):
    """The pairs that the regression learns from: all high ones, as many middle and low ones.

    tIoU, use  (B, P)
    ->         (B, P) bool, drawn at random"""
    high = use & (tIoU > HIGH)
    count = high.sum()
    chosen = high
    for kind in (use & (tIoU <= HIGH) & (tIoU > LOW), use & (tIoU <= LOW) & (tIoU > 0)):
        share = count / kind.sum().clamp(min=1)
        chosen = chosen | kind & (torch.rand_like(tIoU) < share)
    return chosen


def targets(outputs, b, record):
    """What the pairs (P) of a video's window are, by the instances of its record.

    -> "tIoU" and "tND" with the best instance and its "label", (P,), 0 without an instance; the
       shares "start" and "end" of the steps (W,); which pairs and steps are inside a "rejected"
       segment, "unsure" (P,) and "covered" (W,)"""
    W = outputs.start.shape[2]
    pairs = outputs.segments()[b]
    segments = record["segments"]
    tIoU, best = F.pad(model.tiou(pairs[:, None], segments), (0, 1)).max(1)  # one more: 0
    tND = F.pad(model.tnd(pairs[:, None], segments), (0, 1), value=1.0)
    covered = model.steps_inside(record["rejected"], torch.arange(W, device=pairs.device)).any(1)
    s, e = pairs_of(W).to(pairs.device)
    return {
        "tIoU": tIoU,
        "tND": tND.gather(1, best[:, None])[:, 0],
        "label": F.pad(record["labels"], (0, 1))[best],
        "start": boundary_target(segments[:, 0], W),
        "end": boundary_target(segments[:, 1], W),
        "covered": covered,
        "unsure": covered[s] & covered[e],
    }


def class_loss(cls_logits, labels):
    """Cross-entropy of each class with the labels (N,) of pairs of actions -> scalar."""
    if len(labels) == 0:
        return cls_logits.sum()
    onehot = F.one_hot(labels, cls_logits.shape[1]).float()
    L_class = F.binary_cross_entropy_with_logits(cls_logits, onehot, reduction="none")
    return L_class.sum(1).mean()


def batch_losses(outputs, instances, s):
    """The losses of a batch: BMN's, the classifier's and ALQA's of the tND map.

    instances  B records {"segments", "labels", "rejected"}
    ->         {"cls", "reg", "quality", "positives"}, scalars that are finite without a positive;
               "cls" is of the boundaries, the classification map and the classifier"""
    each = [targets(outputs, b, record) for b, record in enumerate(instances)]
    of = {key: torch.stack([target[key] for target in each]) for key in each[0]}
    inside = outputs.steps[:, 0]
    L_cls = 0
    for p, share in ((outputs.start, of["start"]), (outputs.end, of["end"])):
        positive = share > IS_BOUNDARY
        L_cls = L_cls + weighted_logistic(p[:, 0], positive, inside & (positive | ~of["covered"]))
    tIoU = of["tIoU"]
    of_class = outputs.mask & (tIoU > IS_OF_CLASS)
    use = outputs.mask & (of_class | ~of["unsure"])
    L_cls = L_cls + weighted_logistic(outputs.action, tIoU > IS_ACTION, use)
    L_cls = L_cls + class_loss(outputs.cls_logits[of_class], of["label"][of_class])
    chosen = drawn_pairs(tIoU, use)
    # Every branch has a gradient in every process, whose gradients are added up.
    L_reg, L_quality = outputs.p_tiou.sum() * 0, outputs.p_tnd.sum() * 0
    if chosen.any():
        L_reg = OF_REGRESSION * F.mse_loss(outputs.p_tiou[chosen], tIoU[chosen])
    if chosen.any() and s.alqa == "tiou+tnd":
        L_quality = alqa.bce(outputs.p_tnd[chosen], of["tND"][chosen]).mean()
    parts = {"cls": L_cls, "reg": L_reg, "quality": L_quality, "positives": chosen.sum()}
    return means_of_all(parts)


# ---- Settings -----------------------------------------------------------------------------------

PUBLISHED = tuple(name for name in data.PRESETS if name != "toy")


@dataclass(frozen=True)
class OtherSettings(train.Settings):
    """What the settings of the paper's other detectors share.

    PRESET is what they change for all data, PRESETS for published ones, OWN for all others."""
    since = "joint"
    heading = "this detector's own"
    passes: Nothing("pseudo labels are made of one look") = 0

    FIRST = tuple(name for name in train.Settings.FIRST if name != "channels")
    UNUSED = (  # of ActionFormer's network and of the losses of points
        "channels", "heads", "windows", "ranges", "stem", "drop_path", "offset_bias", "soft_label",
        "beta", "label_smoothing", "focal_alpha", "focal_gamma", "radius")

    @classmethod
    def preset(cls, dataset, paper=False):
        """What --dataset changes, and --paper."""
        usual = super().preset(dataset, paper) | {"passes": 0}
        return usual | cls.PRESET | cls.PRESETS.get(dataset, cls.OWN)

    def window(self):
        """The steps W of a window."""
        return self.resize or self.max_steps

    def check_window(self):
        """Raise BadInput where a window has too many steps."""
        if self.window() > MOST_STEPS:
            raise BadInput(f"a window of {self.window()} steps has too large a map: setting "
                           f"max_steps, or resize, must be at most {MOST_STEPS}")

    def can_learn(self, detector, video, num_classes):
        """Whether a LabelledVideo has an action."""
        return len(video.labels) > 0


PRESET = {  # beside those of data.PRESETS
    "theta_l": 0.02,  # a product of five numbers below 1 is small
    "min_score": 1e-4,
    "nms_sigma": 0.4,
    "vote": 0.0,
    "lr": 1e-3,
    "lambda_reg": 1.0,
    "t_plus": 1.0,  # the losses are means already
    "t_plus_momentum": 1.0,
}
OWN = {  # a user's own data: what two cores train in minutes
    "hidden": 128,
    "map_wide": 64,
    "map_width": 32,
    "samples": 16,
    "max_steps": 128,
    "supervised_steps": 800,
}
SHORTER = {"max_steps": 256}  # than ActionFormer's
PRESETS = {
    "thumos": SHORTER,
    "epic-verb": SHORTER,
    "epic-noun": SHORTER,
    "activitynet": {
        "extension": ".csv",
        "stride": 0.0,  # rows that lie over the whole video, as BSN has made them
        "resize": 100,
        "max_steps": 100,
        "crop_min": 1.0,
        "supervised_epochs": 9,
        "supervised_steps": 0,
    },
}


@dataclass(frozen=True)
class Settings(OtherSettings):
    """train.py's settings and BMN's; the defaults are the public BMN's."""
    since = "pretrain"
    heading = "this detector's own"
    hidden: Width("width C of the base") = 256
    map_wide: Width("width of a pair after the sampling layer") = 512
    map_width: Width("width of the map's convolutions") = 128
    samples: Width("samples N of a pair") = 32
    points: Width("interpolated points that a sample is the mean of") = 3
    margin: NotNegative("what is sampled on either side, as a share of the pair") = 0.5

    PRESET, OWN, PRESETS = PRESET, OWN, PRESETS
    TRAIN = EVALUATE = "python -m extras.bmn"
    UNUSED = (*OtherSettings.UNUSED, "position", "quality_form")

    def __post_init__(self):
        super().__post_init__()
        if self.hidden % GROUPS:
            raise BadInput(f"setting hidden, {self.hidden}, is no multiple of {GROUPS}")
        self.check_window()

    def build(self, dim, num_classes):
        """The detector of these settings."""
        return Detector(dim, num_classes, self)

    def losses(self, outputs, instances, num_classes):
        """The losses of a batch: what alqa.alqa_losses() gives, but means."""
        return batch_losses(outputs, instances, self)


# ---- Proposals ----------------------------------------------------------------------------------

TIOUS = np.linspace(0.5, 0.95, 10)
MOST_PROPOSALS = 100  # of a video, on average


def average_recall(truth, proposals):
    """Recall by the average number of proposals a video, AR@AN, as the ActivityNet toolkit has it.

    Each video gives the same share of its proposals, best score first.
    truth      {id: (N, 2)}, proposals {id: (M, 2), best score first}
    ->         {"recall" (10 thresholds, 100), "average_recall" (100,), "proposals" (100,), the
               average numbers of proposals, "area", that under the curve in percent}"""
    videos = len(truth)
    given = sum(len(proposals.get(name, ())) for name in truth)
    share = MOST_PROPOSALS * videos / max(given, 1)
    overlaps = []
    for name, segments in truth.items():
        found = np.asarray(proposals.get(name, ()), dtype=np.float64).reshape(-1, 2)
        found = found[:min(int(len(found) * share), len(found))]
        overlaps.append(model.tiou(np.asarray(segments)[:, None], found))  # (N, M)
    kept = sum(overlap.shape[1] for overlap in overlaps)
    shares = np.arange(1, 101) / 100 * (MOST_PROPOSALS * videos / max(kept, 1))
    hits = np.zeros((len(TIOUS), len(shares)))
    for overlap in overlaps:
        M = overlap.shape[1]
        best = np.maximum.accumulate(overlap, 1) if M else overlap
        best = np.pad(best, ((0, 0), (1, 0)), constant_values=-1)  # of the first 0, 1, ... M
        counts = np.minimum((M * shares).astype(int), M)
        hits += (best[None, :, counts] >= TIOUS[:, None, None]).sum(1)
    recall = hits / max(sum(map(len, truth.values())), 1)
    average = recall.mean(0)
    numbers = shares * kept / max(videos, 1)
    area = 100 * np.trapezoid(average, numbers) / max(numbers[-1], 1e-12)
    return {"recall": recall, "average_recall": average, "proposals": numbers, "area": float(area)}


def read_proposals(path):
    """{id: (M, 2), best score first} of a result file, which may leave the labels out."""
    def read(found, where):
        if isinstance(found, list) and all(isinstance(d, dict) for d in found):
            found = [{"label": "any"} | d for d in found]
        found = sorted(forms.read_detections(found, where), key=lambda d: -d["score"])
        segments = dict.fromkeys(tuple(d["segment"]) for d in found)  # once, whatever its classes
        return np.array(list(segments), dtype=np.float64).reshape(-1, 2)

    what = "prediction file"
    return forms.read_each(forms.read_results(path, what)["results"], read, f"{what} {path}")


def evaluate_proposals(args):
    """AR at 1, 5, 10, 50 and 100 and the area, of --proposals, in words; raises BadInput."""
    annotations = tables.read_any(args.gt, args.ignore_labels, args.fps)
    wanted = forms.in_subset(annotations, args.subset)
    truth = {name: a.segments for name, a in wanted.items() if a.annotated and len(a.labels)}
    if not truth:
        raise BadInput(f"annotation file {args.gt}: the subset {args.subset!r} holds no instance")
    proposals = read_proposals(args.proposals)
    without = [name for name in truth if name not in proposals]
    if without:
        told = f"{len(without)} of {len(truth)} test videos have no proposal: {several(without)}"
        if len(without) == len(truth):
            raise BadInput(f"prediction file {args.proposals}: {told}")
        warn([told])
    result = average_recall(truth, proposals)
    at = [f"AR@{n} {100 * result['average_recall'][n - 1]:.2f}" for n in (1, 5, 10, 50, 100)]
    return f"{'  '.join(at)}  area {result['area']:.2f}"


class Proposing(nn.Module):
    """A detector whose only class is that of its proposals."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, feats, mask):
        """The detector's Outputs, with a class score of 1."""
        outputs = self.detector(feats, mask)
        return outputs._replace(cls_logits=torch.full_like(outputs.cls_logits[..., :1], 20.0))


def proposals_of_run(trained):
    """({id: proposals}, labelled ids) of all videos of a run, best score first, in seconds.

    trained  an evaluate.Localizer of Proposing"""
    dataset = data.training_data(trained.s)
    warn(dataset.warnings)
    dataset = replace(dataset, mean=trained.mean, std=trained.std)  # of the run: files may be new
    labelled = [data.blind(video) for video in dataset.labelled]
    videos = labelled + dataset.unlabelled + dataset.test
    records = evaluate.detect(trained.detector, videos, dataset, trained.s)
    columns = {"score": "scores", "segment": "segments"}
    return evaluate.export(videos, records, columns, {}), [video.id for video in labelled]


def proposals_of_files(trained, args):
    """({id: proposals}, []) of a new video's feature file, or of a folder of them."""
    found = {}
    for name, video in videos_of(trained, args).items():
        segments, _, scores = trained.find(video)
        found[name] = [{"score": score, "segment": segment}
                       for score, segment in zip(scores.tolist(), segments.tolist())]
    return found, []


# ---- The command line ---------------------------------------------------------------------------

EXPORT = {
    "export_proposals": (str, "file that gets the proposals, in ActivityNet's form; the ids under "
                         "labelled are of the videos whose labels the detector has seen"),
    "checkpoint": (str, "a run's folder, its checkpoint.pt or detector.pt"),
    "features": (str, "new videos' feature file or folder, in place of the run's own videos; with "
                 "--dataset, where its features lie now"),
    "duration": ARGUMENTS["duration"],
}


def export_proposals(argv):
    """The command line with --export-proposals; returns the exit code, 2 for bad input."""
    moved = ("dataset", "root", "annotations")
    parser = parser_of((*EXPORT, *moved, "weights", "device"), Settings, EXPORT)
    with guard() as stop:
        args = parser.parse_args(argv)
        given = {name: value for name, value in vars(args).items() if value is not None}
        if "checkpoint" not in given:
            raise BadInput("--export-proposals needs the run of a detector: --checkpoint")
        check_replaced(args.export_proposals, '"external_data": {}, "labelled"',
                       "file of proposals")
        new = "features" in given and not given.keys() & {*moved}
        own = ("export_proposals", "checkpoint", *(["features", "duration"] if new else []))
        changes = {name: value for name, value in given.items() if name not in own}
        changes["min_score"] = 0.0  # what is no action is needed too
        trained = evaluate.Localizer(args.checkpoint, Settings, **whole_paths(changes))
        trained.detector = Proposing(trained.detector)
        found, labelled = (proposals_of_files(trained, args) if new
                           else proposals_of_run(trained))
        whole = checkpoints.load(args.checkpoint, Settings)  # the annotations may have grown
        labelled = whole.get("labelled", labelled)
        if not labelled:
            warn([f"{args.checkpoint} does not say which videos were labelled, and so neither does "
                  f"{args.export_proposals}: take the checkpoint of the whole run"])
        content = forms.result_format(found, {}) | {"labelled": labelled}
        write_json(args.export_proposals, content)
        say(f"{args.export_proposals}: {sum(map(len, found.values()))} proposals of {len(found)} "
            "videos")
    return stop.code


def show_proposals(argv):
    """The command line with --proposals; returns the exit code, 2 for bad input."""
    parser = Parser(__name__, prog=Settings.EVALUATE)
    parser.add_argument("--proposals", required=True, help="predictions.json of a run")
    add_truth(parser, required=True)
    parser.add_argument("--subset", default="validation", help="its test videos")
    with guard() as stop:
        say(evaluate_proposals(parser.parse_args(argv)))
    return stop.code


def flags_of(argv):
    """The flags of a command line, None being this process's own, however they are written."""
    words = sys.argv[1:] if argv is None else argv
    return {str(word).partition("=")[0].replace("_", "-") for word in words}


def train_or_evaluate(argv, kind):
    """The command line of a detector as train.py's, or with --checkpoint as evaluate.py's.

    kind  the class of its settings
    ->    the exit code, 2 for bad input"""
    program = evaluate if "--checkpoint" in flags_of(argv) else train
    return program.main(argv, kind)


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    if "--export-proposals" in flags_of(argv):
        return export_proposals(argv)
    if "--proposals" in flags_of(argv):
        return show_proposals(argv)
    return train_or_evaluate(argv, Settings)


if __name__ == "__main__":
    sys.exit(main())
