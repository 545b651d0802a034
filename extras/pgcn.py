"""APL on a detector that judges another's proposals, P-GCN (Zeng et al. 2019): Table S8.

    python -m extras.pgcn --proposals FILE --dataset my.json --features DIR ...   as train.py
    python -m extras.pgcn --resume runs/my
    python -m extras.pgcn --checkpoint runs/my --features video.npy --proposals FILE   a new video

A proposal is a node of a graph of its video, joined with proposals that overlap it and with near
ones that do not. One graph network sees what happens inside a proposal and names the class
(activity), another sees what is before and after it too and says for each class whether the
proposal is a whole action (completeness) and how to move its ends (regression). The joint score of
Eq. (4) is

    softmax(activity) * sigmoid(completeness) * max(P_tiou - P_tnd, eps)

with P_tiou and P_tnd of Eq. (2) beside the regression. Pseudo labels are instances of an
unlabelled video, by which the kinds of its proposals are told anew. ALQA's selection and ICD are
those of the method's files; ACP contrasts the first layer of single steps.

Of APL: activity and completeness keep P-GCN's losses, without Eq. (5) and its soft label; P_tiou
and P_tnd learn from actions and parts, since actions alone have a tIoU over 0.7; --acp is none
unless given.

The proposals, of labelled, unlabelled and test videos, are those of a detector of the same labelled
videos, as `python -m extras.bmn --export-proposals FILE --checkpoint runs/bmn` writes them: one
that has seen more labels brings them in. But a detector knows its own labelled videos by heart.
There, where P-GCN learns what a whole action is, its proposals are better and few are wrong, so
that completeness and P_tiou come out too sure.

Other than in the public code
- input: there is one stream of features; lengths are continuous, not of inclusive frames; a segment
  is pooled over the steps inside it;
- graph: a feature of zeros has a cosine of 0; in detection the neighbours are those TAKEN;
- training: the ground truth is no proposal; an action drawn in the place of a missing part counts
  as whole; the offsets have a mean of 0 and SPREAD, not measured ones; AdamW, cosine decay;
- detection: completeness goes through a sigmoid, not exp; a proposal is regressed, as an action of
  its best class, before suppression, which is soft.

The numbers below are those for THUMOS14. The method ends with the losses; what follows them is
warnings and settings.

Letters as in model.py, P being the proposals of a video, each the root of its own graph. [P] is
the public P-GCN's, [J] neither that nor the paper's.
"""
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import acp
import alqa
import data
import icd
import model
from extras import bmn
from plumbing import checks, forms, settings
from plumbing.files import read_json
from plumbing.processes import draws_of_batch, own_draws, sum_of_all
from plumbing.settings import OneOf, ShareBelow1, Text, Width
from plumbing.words import BadInput, refuse, several, short

CONTEXT = 0.5  # what is seen on either side, as a share of the proposal [P]
IS_OVERLAPPING = 0.7  # tIoU over which two proposals are neighbours that overlap [P]
OVERLAPPING, APART = 8, 2  # candidates of either kind that a node draws its neighbours from [P]
NEIGHBOURS = 4  # of a node [P]
TAKEN = (0, 1, 2, OVERLAPPING)  # places of detection's among them: three overlap, one is apart [J]
SPREAD = (0.1, 0.2)  # unit of the offsets of the centre and of the log length [J; P: measured]
MOST_LONGER = 3.0  # log of how many times longer or shorter regression makes a proposal [J]

IS_ACTION = 0.7  # tIoU over which a proposal is an action [P]
IS_PART, LEAST_INSIDE = 0.3, 0.01  # tIoU below and share inside over which it is a part of one [P]
IS_BACKGROUND, SHORTEST = 0.01, 0.02  # tIoU below and share of the crop over which it is none [P]
IS_REJECTED = 0.5  # share inside a rejected segment over which it is neither of the two [J]
ROOTS = (1, 6, 1)  # actions, parts and background of a set of roots [P]
HARDEST = 0.17  # share of the parts of a set that teaches completeness [P]
OF_COMPLETENESS, OF_REGRESSION = 0.5, 0.5  # weights of these losses [P]


# ---- Proposals ----------------------------------------------------------------------------------

def padded(rows):
    """Rows of videos, B x (N, F), as one tensor (B, P, F), P >= 1, and its mask (B, P)."""
    one = rows[0].new_zeros(1, rows[0].shape[1])  # one more video, so that P >= 1; left out again
    x = pad_sequence([*rows, one], batch_first=True)[:-1]
    count = torch.tensor([len(part) for part in rows], device=x.device)
    return x, torch.arange(x.shape[1], device=x.device) < count[:, None]


def pooled(feats, segments, pool):
    """The features (T, C) of segments (N, 2) before, inside and after each: (N, 3 * C).

    pool  as icd.pool_instances() takes it"""
    start, end = segments.T
    around = CONTEXT * (end - start)
    parts = ((start - around, start), (start, end), (end, end + around))
    return torch.cat([icd.pool_instances(feats, torch.stack(part, 1), pool) for part in parts], 1)


# ---- The graph ----------------------------------------------------------------------------------

def best_others(value, allowed, number):
    """The `number` best of the allowed others of each node, over and over where there are fewer.

    A node without any has itself.
    value, allowed  (B, P, P), of a node's others
    ->              (B, P, number) nodes"""
    order = torch.where(allowed, value, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    count = allowed.sum(-1, keepdim=True)
    turn = torch.arange(number, device=value.device) % count.clamp(1, number)  # 0, 1, ..., 0, ...
    itself = torch.arange(len(value[0]), device=value.device)[:, None]
    return torch.where(count > 0, order.gather(-1, turn), itself)


def candidates(proposals, mask):
    """What nodes draw their neighbours from: those that overlap most, and the nearest that do not.

    -> (B, P, OVERLAPPING + APART) nodes"""
    one, other = proposals[:, :, None], proposals[:, None]
    # Nearness is by tND, the square of the public code's distance.
    tIoU, tND = model.tiou(one, other), model.tnd(one, other)  # (B, P, P)
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    others = mask[:, None] & ~itself
    overlapping = best_others(tIoU, others & (tIoU > IS_OVERLAPPING), OVERLAPPING)
    apart = best_others(-tND, others & (tIoU <= 0) & (tND > 0), APART)
    return torch.cat([overlapping, apart], -1)


def trees(choices, training, most):
    """The nodes that each root sees, (B, P, 5, 5): row 0 is the root and its neighbours, row i its
    i-th neighbour and that one's own.

    In training the neighbours of each row are drawn, in detection they are those TAKEN.
    choices  (B, P, number), as candidates() has them
    most     how many draws each video gets, at least P: the same ones whatever P is"""
    B, P, number = choices.shape
    if training:
        draws = draws_of_batch((B, most, NEIGHBOURS + 1, number), choices.device)[:, :P]
        places = draws.argsort(-1)[..., :NEIGHBOURS]  # among the choices, (B, P, 5, 4)
    else:
        places = choices.new_tensor(TAKEN).expand(B, P, NEIGHBOURS + 1, NEIGHBOURS)
    itself = torch.arange(P, device=choices.device).expand(B, P)[..., None]
    firsts = torch.cat([itself, choices.gather(2, places[:, :, 0])], 2)  # of the rows, (B, P, 5)
    of_firsts = acp.rows_at(choices, firsts.flatten(1)).unflatten(1, (P, NEIGHBOURS + 1))
    return torch.cat([firsts[..., None], of_firsts.gather(3, places)], 3)


def edges(x, nodes):
    """Rows of the adjacency: the weight of each of nodes (B, P, 5, 5) for the first of its row.

    1 for the first itself, relu(cosine) / 4 for its neighbours.
    x   (B, P, C)
    ->  (B, P, 5, 5)"""
    x = F.normalize(x, dim=-1)
    cosine = F.relu(x @ x.transpose(1, 2)).flatten(1)  # (B, P * P)
    pairs = nodes[..., :1] * x.shape[1] + nodes  # of (first of a row, node), among the P * P
    weight = cosine.gather(1, pairs.flatten(1)).view_as(nodes) / NEIGHBOURS
    return torch.cat([torch.ones_like(weight[..., :1]), weight[..., 1:]], -1)


class Layer(nn.Module):
    """Weights of a layer of the graph, (in, out), with the public P-GCN's start."""

    def __init__(self, dim_in, dim):
        super().__init__()
        bound = dim ** -0.5
        self.weight = nn.Parameter(torch.empty(dim_in, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))


class Graph(nn.Module):
    """Two layers over the graph, of which only what a root sees is computed.

    x      (B, P, in), pooled features
    nodes  (B, P, 5, 5), as trees() has them
    ->     (B, P, 2 * in): what the graph gives for the root, and its own features"""

    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.gc1 = Layer(dim, hidden)
        self.gc2 = Layer(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def single(self, x):
        """The first layer of single rows, without neighbours."""
        return F.relu(x @ self.gc1.weight + self.gc1.bias)

    def forward(self, x, nodes):
        B, P, _ = x.shape
        weight = edges(x, nodes)
        rows = (x @ self.gc1.weight).flatten(0, 1)  # of all videos: those of a video begin at b * P
        index = nodes + P * torch.arange(B, device=x.device)[:, None, None, None]
        # A x W1: each bag adds up the five nodes of a row.
        sums = F.embedding_bag(index.flatten(0, 2), rows, mode="sum",
                               per_sample_weights=weight.flatten(0, 2))
        h = F.relu(sums + self.gc1.bias).view(B, P, NEIGHBOURS + 1, -1)
        # A h W2, of which the root's row alone is needed.
        h = (weight[:, :, 0, :, None] * self.dropout(h)).sum(2)
        return torch.cat([h @ self.gc2.weight + self.gc2.bias, x], -1)


# ---- The network --------------------------------------------------------------------------------

def regressed(proposals, offsets):
    """Proposals (..., 2) moved and stretched by offsets (..., 2) -> (..., 2).

    offsets  of the centre, in lengths, and of the log of the length"""
    middle = proposals.mean(-1)
    length = proposals[..., 1] - proposals[..., 0]
    middle = middle + length * offsets[..., 0]
    half = length * offsets[..., 1].clamp(-MOST_LONGER, MOST_LONGER).exp() / 2
    return torch.stack([middle - half, middle + half], -1)


class Outputs(NamedTuple):
    """Raw predictions of the proposals of a batch."""
    activity: torch.Tensor  # (B, P, K + 1), logits, background first
    completeness: torch.Tensor  # (B, P, K): a part is to be below -1, a whole over 1
    offsets: torch.Tensor  # (B, P, K, 2), as regressed() takes them
    p_tiou: torch.Tensor  # (B, P)
    p_tnd: torch.Tensor  # (B, P)
    mask: torch.Tensor  # (B, P)
    proposals: torch.Tensor  # (B, P, 2), in grid steps
    levels: list  # [(B, T, C)], of the steps, for ACP alone
    masks: list  # [(B, T)]

    def predictions(self):
        """What the heads give."""
        return self.activity, self.completeness, self.offsets, self.p_tiou, self.p_tnd

    def p_cls(self):
        """All of the joint score but ALQA's reliability: (B, P, K)."""
        p = self.activity.softmax(-1)[..., 1:]
        return p * torch.sigmoid(self.completeness)

    def segments(self):
        """The proposals (B, P, 2), regressed as actions of their best class."""
        best = self.p_cls().argmax(-1)
        offsets = torch.take_along_dim(self.offsets, best[..., None, None], 2)[:, :, 0]
        return regressed(self.proposals, offsets)

    def sizes(self):
        """How many proposals there are, of one level."""
        return [self.mask.shape[1]]


class Detector(nn.Module):
    """P-GCN as Settings `s` describe it; its parameters have the public P-GCN's names."""

    def __init__(self, dim_in, num_classes, s):
        super().__init__()
        self.most = s.most
        self.pool = s.pool
        self.Act_GCN = Graph(dim_in, s.hidden, s.graph_dropout)
        self.Comp_GCN = Graph(3 * dim_in, s.hidden, s.graph_dropout)
        self.dropout = nn.Dropout(s.activity_dropout)
        self.activity_fc = nn.Linear(2 * dim_in, num_classes + 1)
        self.completeness_fc = nn.Linear(6 * dim_in, num_classes)
        self.regressor_fc = nn.Linear(6 * dim_in, 2 * num_classes)
        self.tiou = nn.Linear(6 * dim_in, 1) if s.alqa != "none" else None
        self.tnd = nn.Linear(6 * dim_in, 1) if s.alqa == "tiou+tnd" else None
        for head in self.children():
            if isinstance(head, nn.Linear):
                nn.init.normal_(head.weight, std=0.001)
                nn.init.zeros_(head.bias)
        if self.tnd:
            nn.init.constant_(self.tnd.bias, s.tnd_bias)

    def pyramid(self, feats, mask, proposals=()):
        """The first layer of single steps, the one level that ACP contrasts: [(B, T, C)], [(B, T)].

        proposals  not used: Settings.apply() gives them to the whole network and to this alike"""
        return [self.Act_GCN.single(feats) * mask[..., None]], [mask]

    def quality(self, h):
        """What model.QualityBranches has: h (B, P, C) -> P_tiou, P_tnd, two (B, P)."""
        P_tiou = torch.sigmoid(self.tiou(h)[..., 0]) if self.tiou else torch.ones_like(h[..., 0])
        P_tnd = torch.sigmoid(self.tnd(h)[..., 0]) if self.tnd else torch.zeros_like(h[..., 0])
        return P_tiou, P_tnd

    def heads(self, h_activity, h):
        """The predictions of what the two graphs give, (B, P, 2 * D) and (B, P, 6 * D)."""
        spread = h.new_tensor(SPREAD)
        offsets = self.regressor_fc(h).unflatten(-1, (-1, 2)) * spread
        activity = self.activity_fc(self.dropout(h_activity))
        return activity, self.completeness_fc(h), offsets, *self.quality(self.dropout(h))

    def forward(self, feats, mask, proposals):
        """feats (B, T, D), mask (B, T), proposals B x (N, 2) in grid steps -> Outputs; in float32.
        """
        lengths = mask.sum(1).tolist()
        parts = zip(feats, lengths, proposals)
        seen = [pooled(x[:length], segments, self.pool) for x, length, segments in parts]
        around, valid = padded(seen)  # (B, P, 3 * D)
        inside = around.chunk(3, -1)[1]
        segments, _ = padded(proposals)
        nodes = trees(candidates(segments, valid), self.training, self.most)
        with torch.autocast(feats.device.type, enabled=False), own_draws(self.training):
            predicted = self.heads(self.Act_GCN(inside, nodes), self.Comp_GCN(around, nodes))
            levels, masks = self.pyramid(feats, mask)
        return Outputs(*predicted, valid, segments, levels, masks)


# ---- Targets ------------------------------------------------------------------------------------

def share_inside(proposals, segments):
    """Which share of proposals (..., 2) lies inside segments (..., 2), broadcast -> (...)."""
    first = torch.maximum(proposals[..., 0], segments[..., 0])
    last = torch.minimum(proposals[..., 1], segments[..., 1])
    length = (proposals[..., 1] - proposals[..., 0]).clamp(min=1e-8)
    return (last - first).clamp(min=0) / length


def targets(proposals, mask, record, steps):
    """What the proposals (P, 2) of a video of `steps` steps are, by the instances of its record.

    -> "truth" (P, 2) and "label" (P,), of the instance of the largest tIoU, the first where none
       overlaps, 0 in a video without any; and
       "kinds" (3, P) bool: which are actions, parts of one, background"""
    segments = record["segments"].float()
    # One instance more, with a tIoU of 0, for a video without any.
    tIoU, best = F.pad(model.tiou(proposals[:, None], segments), (0, 1)).max(1)
    truth = F.pad(segments, (0, 0, 0, 1))[best]
    rejected = share_inside(proposals[:, None], record["rejected"]) > IS_REJECTED
    sure = mask & ~rejected.any(1)
    action = mask & (tIoU > IS_ACTION)
    part = sure & (tIoU < IS_PART) & (share_inside(proposals, truth) > LEAST_INSIDE)
    length = proposals[:, 1] - proposals[:, 0]
    background = sure & ~part & (tIoU < IS_BACKGROUND) & (length > SHORTEST * steps)
    return {
        "truth": truth,
        "label": F.pad(record["labels"], (0, 1))[best],
        "kinds": torch.stack([action, part, background]),
    }


def drawn(members, draws):
    """Members of each row, drawn with replacement: (B, P) bool, draws (B, n) in [0, 1) -> (B, n)"""
    order = members.int().argsort(dim=1, descending=True, stable=True)  # members first
    place = (draws * members.sum(1, keepdim=True)).long()
    return order.gather(1, place)


def draw_roots(kinds, sets):
    """Sets of roots of videos: (B, 3, P) -> (B, sets, 8), which of the P.

    A set has ROOTS of each kind, in their order; an action stands for a kind that is not there.
    A video without an action gets the first proposal, which teaches nothing."""
    action = kinds[:, 0]
    draws = draws_of_batch((len(kinds), sets, sum(ROOTS)), kinds.device)
    roots = []
    for of_kind, draw in zip(kinds.unbind(1), draws.split(ROOTS, 2)):
        members = torch.where(of_kind.any(1, keepdim=True), of_kind, action)
        roots.append(drawn(members, draw.flatten(1)).view(draw.shape))
    return torch.cat(roots, 2)


# ---- Losses -------------------------------------------------------------------------------------

def completeness_loss(scores, whole):
    """The hinge loss of completeness, of the whole actions and the hardest parts of each set.

    scores, whole  (sets, n): of the class of each; whether it is a whole action
    ->             scalar"""
    of_whole = F.relu(1 - scores[whole]).sum()
    of_part = torch.where(whole, 0, F.relu(1 + scores))
    hardest = of_part.topk(int(ROOTS[1] * HARDEST), 1).values.sum()  # 1 of the 6 of each set
    # As the public code, which counts the hardest over all sets at once.
    parts = max(int(HARDEST * int((~whole).sum())), 1)
    return (of_whole + hardest) / (whole.sum() + parts)


def offset_target(proposals, truth):
    """The offsets (N, 2) by which regressed() makes proposals (N, 2) the truth (N, 2)."""
    length = proposals.diff()[:, 0]
    centre = (truth.mean(1) - proposals.mean(1)) / length
    return torch.stack([centre, torch.log(truth.diff()[:, 0] / length)], 1)


def regression_loss(offsets, target):
    """Smooth L1 in units of SPREAD, summed over both offsets (N, 2), their mean -> scalar."""
    return F.smooth_l1_loss(offsets, target, reduction="none").sum(1).mean()


def root_losses(outputs, of, video, roots, s):
    """The losses of drawn roots: "cls", of activity and completeness, "reg", "quality", scalars.

    of     "truth" (B, P, 2), "label" (B, P) and "kinds" (B, 3, P), as targets() has them
    video  (n, 1, 1), the videos of the batch that teach
    roots  (n, sets, 8), drawn for them: x[video, roots] is (n, sets, 8, ...) of x (B, P, ...)"""
    label, truth = of["label"][video, roots], of["truth"][video, roots]
    action, part, background = (kind[video, roots] for kind in of["kinds"].unbind(1))
    # Activity, of actions and background.
    of_activity = action | background
    class_or_none = torch.where(action, label + 1, 0)
    L_activity = F.cross_entropy(
        outputs.activity[video, roots][of_activity], class_or_none[of_activity])
    # Completeness, of all but the background, at the class of the instance.
    scores = outputs.completeness[video, roots, label]
    first = ROOTS[0] + ROOTS[1]
    L_completeness = completeness_loss(
        scores[..., :first].flatten(0, 1), action[..., :first].flatten(0, 1))
    # Regression, of actions.
    offsets = outputs.offsets[video, roots, label]
    proposals = outputs.proposals[video, roots]
    spread = offsets.new_tensor(SPREAD)
    goal = offset_target(proposals[action], truth[action])
    L_reg = regression_loss(offsets[action] / spread, goal / spread)
    # Quality, of actions and parts.
    L_quality = L_reg.new_zeros(())
    if s.alqa != "none":
        of_quality = action | part
        moved = regressed(proposals, offsets.detach())[of_quality]
        tIoU, tND = model.tiou(moved, truth[of_quality]), model.tnd(moved, truth[of_quality])
        p_tiou, p_tnd = (p[video, roots][of_quality] for p in (outputs.p_tiou, outputs.p_tnd))
        L_quality = alqa.quality_loss(p_tiou, p_tnd, tIoU, tND, s.alqa, s.quality_form).mean()
    L_cls = L_activity + OF_COMPLETENESS * L_completeness
    return {"cls": L_cls, "reg": OF_REGRESSION * L_reg, "quality": L_quality}


def batch_losses(outputs, instances, s):
    """The losses of a batch, means over its videos that have a proposal that is an action.

    instances  B records {"segments", "labels", "rejected"}
    ->         {"cls", "reg", "quality", "positives"}, scalars that are finite without a positive"""
    steps = outputs.masks[0].sum(1)
    each = [targets(*parts) for parts in zip(outputs.proposals, outputs.mask, instances, steps)]
    of = {key: torch.stack([target[key] for target in each]) for key in each[0]}
    roots = draw_roots(of["kinds"], s.sets)  # of all videos: the draws are those of the batch
    teach = of["kinds"][:, 0].any(1)
    if teach.any():
        parts = root_losses(outputs, of, teach.nonzero()[..., None], roots[teach], s)
    else:  # each head has a gradient in every process, whose gradients are added up
        nothing = sum(part.sum() for part in outputs.predictions()) * 0
        parts = dict.fromkeys(("cls", "reg", "quality"), nothing)
    share = teach.sum() / sum_of_all(teach.sum()).clamp(min=1)  # of the videos of all processes
    losses = {key: sum_of_all(share * part) for key, part in parts.items()}
    return losses | {"positives": sum_of_all(of["kinds"][:, 0].sum())}


# ---- A look at the proposals of a run -----------------------------------------------------------

def odd_proposals(found, dataset, s):
    """Yield warnings about the proposals {id: (N, 2)} of a Dataset; raises BadInput where no
    labelled instance has a good one."""
    where = f"prediction file {short(s.proposals, 150)}:"
    empty = [name for name, segments in found.items() if len(segments) == 0]
    if empty:
        yield f"{where} {len(empty)} videos have no proposal that can be used: {several(empty)}"
    others = [name for name in s.found if not {name, name.removeprefix("v_")} & found.keys()]
    if others:
        yield f"{where} {len(others)} videos are none of this run: {several(others, 2)}"
    seen = read_json(s.proposals, "prediction file").get("labelled", [])
    if not isinstance(seen, list):
        raise BadInput(f"{where} labelled is {short(seen)}, must be a list of videos")
    seen = {str(name).removeprefix("v_") for name in seen}
    more = [video.id for video in dataset.unlabelled + dataset.test
            if video.id.removeprefix("v_") in seen]
    if more:
        yield (f"{where} the detector that made them has seen the labels of {len(more)} videos "
               f"that are not labelled here: {several(more)}")
    best = [F.pad(model.tiou(video.segments[:, None], found[video.id]), (0, 1)).amax(1)
            for video in dataset.labelled]
    bad = torch.cat(best) <= IS_ACTION
    told = (f"{where} {int(bad.sum())} of {len(bad)} labelled instances have no proposal of a tIoU "
            f"over {IS_ACTION}")
    if bad.all():
        raise BadInput(f"{told}: there is nothing to learn from them")
    if bad.any():
        yield told


# ---- Settings -----------------------------------------------------------------------------------

PRESET = {  # beside those of data.PRESETS
    "acp": "none",
    "acp_after": "none",
    "vote": 0.0,
    "lr": 1e-3,  # of AdamW [J]
    "lambda_reg": 1.0,
    "t_plus": 1.0,  # the losses are means already
    "t_plus_momentum": 1.0,
}
OWN = {  # a user's own data: few labelled videos, a hundred proposals each
    "theta_l": 0.1,  # a product of three numbers below 1 is small
    "hidden": 128,
    "pool": "mean",  # where standardised features have signs
    "sets": 8,
    "graph_dropout": 0.5,
    "activity_dropout": 0.5,
}


@dataclass(frozen=True)
class ProposalSettings(settings.CheckedSettings):
    """Where the proposals lie, which is no part of what a run is: their numbers are.

    So a resumed run may be given a file that was moved; look() sees to it that it holds the same.
    """
    since = "run"
    heading = "this detector's own"
    proposals: Text(
        "proposals of all videos, as extras.bmn --export-proposals writes them, in ActivityNet's "
        "form, of a detector of the same labelled videos") = ""


@dataclass(frozen=True)
class Settings(bmn.OtherSettings, ProposalSettings):
    """train.py's settings and P-GCN's; the defaults are the public P-GCN's, but those of [J].

    plumbing/settings.py says what FIRST, GIVEN and UNUSED are."""
    since = "pretrain"
    heading = "this detector's own"
    hidden: Width("hidden width of a graph") = 512
    pool: OneOf(("max", "mean"), "pooling of a proposal's features over time") = "max"
    graph_dropout: ShareBelow1("dropout of the hidden layer of a graph") = 0.7
    activity_dropout: ShareBelow1("dropout before the class of a proposal; its quality [J]") = 0.8
    most: Width("proposals of a video, the best first [J]") = 300
    sets: Width("sets of 8 proposals that a video draws a step") = 1

    # Published data take PRESET alone, other data OWN too.
    PRESET, OWN, PRESETS = PRESET, OWN, dict.fromkeys(bmn.PUBLISHED, {})
    TRAIN = EVALUATE = "python -m extras.pgcn"
    FIRST = ("proposals", *bmn.OtherSettings.FIRST)
    GIVEN = ("proposals",)
    UNUSED = (*bmn.OtherSettings.UNUSED, "position", "input_dropout", "input_jitter", "input_view")

    def __post_init__(self):
        super().__post_init__()
        if not self.proposals:
            raise BadInput("setting proposals is needed: a file that python -m extras.bmn "
                           "--export-proposals has written, or another in ActivityNet's form")
        if self.mixup:
            raise BadInput("setting mixup mixes the features of two videos, whose proposals lie "
                           "elsewhere: it must be 0")

    @cached_property
    def found(self):
        """{id: (N, 2)}, all proposals of the file, in seconds."""
        return bmn.read_proposals(self.proposals)

    def proposals_of(self, video):
        """The best proposals (N, 2) of a Video, in grid steps; raises BadInput."""
        where = f"prediction file {short(self.proposals, 150)}, video {short(video.id)}:"
        found = self.found.get(video.id, self.found.get(f"v_{video.id}"))
        if found is None:
            raise BadInput(f"{where} it has no proposals; --proposals FILE names another file")
        annotation = replace(forms.unknown_video(None, None), segments=found)
        if self.bad_segments == "error":
            checks.check_segments(annotation, video, where)
        found = found[forms.good_segments(annotation, video.duration)].clip(0, video.duration)
        return torch.from_numpy(video.grid.to_grid(found[:self.most])).float()

    def apply(self, network, batch):
        """The network's output for a batch, whose crops have proposals too."""
        seen = []
        for video, start, mask in zip(batch["video"], batch["start"], batch["mask"]):
            segments, inside = data.crop_segments(
                self.proposals_of(video), video, start, int(mask.sum()), self.crop_keep)
            seen.append(segments[inside].to(self.device))
        return network(batch["feats"].to(self.device), batch["mask"].to(self.device), seen)

    def look(self, dataset):
        """Yield warnings about the proposals of a Dataset, whose fingerprint gets their numbers;
        raises BadInput where a video has none, or no labelled one a good one."""
        if not self.found:
            raise BadInput(f"prediction file {short(self.proposals, 150)} has no proposals")
        found = {}
        faults = {}
        for video in dataset.labelled + dataset.unlabelled + dataset.test:
            try:
                found[video.id] = self.proposals_of(video)
            except BadInput as fault:
                faults[video.id] = fault
        refuse(faults)
        for name, numbers in dataset.fingerprint.items():
            numbers += [len(found[name]), float(found[name].sum())]
        yield from odd_proposals(found, dataset, self)

    def look_at(self, video):
        """Raise BadInput for a new video without proposals."""
        self.proposals_of(video)

    def build(self, dim, num_classes):
        """The detector of these settings."""
        return Detector(dim, num_classes, self)

    def losses(self, outputs, instances, num_classes):
        """The losses of a batch: what alqa.alqa_losses() gives, but means."""
        return batch_losses(outputs, instances, self)


# ---- The command line ---------------------------------------------------------------------------

def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    return bmn.train_or_evaluate(argv, Settings)


if __name__ == "__main__":
    sys.exit(main())
