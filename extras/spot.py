"""SPOT (Nag et al. 2022) as the detector: Table S3's SPOT rows, and its own semi-supervised way.

    python -m extras.spot --dataset my.json --features DIR ...       as train.py, all three stages
    python -m extras.spot --resume runs/my
    python -m extras.spot --checkpoint runs/my --features video.npy  as evaluate.py

SPOT makes no proposals to be scored: attention over a window embeds its steps, a classifier gives
each step a class or background, and a mask head gives each step i a row, how much each step of the
window is of the action that step i is in. A detection is a run of steps over which a row, or the
scores of a class, stay above a level. There is no P_tiou and no P_tnd.

Stages 2 and 3 add up four losses: of the classes (focal), of the masks (cross-entropy and dice), of
the embedding's distance from its input, and a contrast of the steps near a boundary. Stage 1 is ACP
on the embedding, or SPOT's own pretext (--acp pretext): the mask of two spans of a video whose
other steps are erased, whether its halves are swapped, and the distance; own data have none unless
asked. In stage 3 an unlabelled video teaches by the classes and masks that the detector gives it in
the same step of training (--pseudo maps), or by the pseudo labels of train.py (--pseudo labels).

Here, and in the public code [P]:
- all instances of a video teach, by every step inside [the last one, without its first and last];
- a pseudo map teaches by its sure steps [by all], and does reach the gradient [it does not];
- every step has runs, of any length [the ten best steps, runs over 0.02 of the window];
- a detection is one run, of any class [from the first to the last, of the video's class];
- its score is the mean of its class, less that around it if the setting around says so, times the
  mean of its row [the maximum of its class times the mean of the row without its ends];
- steps are contrasted, hard near a boundary of the targets [channels, hard by a morphology];
- AdamW with cosine decay, dropout of the input, the core's Soft-NMS [Adam in steps, its own NMS].

A video longer than a window is seen in half-overlapping windows. Letters as in model.py, and n
windows of W steps of a video, P detections before suppression. [P] is the public SPOT's, [J]
neither that nor the paper's.
"""
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import data
import evaluate
import train
from acp import ACP, rows_at, step_classes
from extras import bmn
from model import sinusoid, steps_inside
from plumbing.processes import draws_of_batch, means_of_all, own_draws
from plumbing.settings import Blocks, OneOf, Share, Width
from plumbing.words import BadInput

HEADS = 4  # of the attention, each as wide as the input [P]
DROP_ATTENTION = 0.1  # share of the attention weights that training sets to 0 [P]
DROP_EMBEDDING = 0.3  # share of the attention's output [P]
DROP_ORDER = 0.5  # share of the order head's numbers [P]
OF_CLASS = 0.5  # weight of the class loss [P]
OF_BCE, OF_DICE = 0.4, 0.6  # weights of the two mask losses [P]
MORE_PAIRS = 10  # of steps, added to either kind in the weights of the mask loss [P]
TAU = 0.07  # temperature of the contrast of snippets [P]
HARD = 2  # steps to either side of a boundary that are hard to tell [J; P: by a morphology]
# Over which a run of a mask's row is a detection (0: all of the window), and a run of a class [P].
MASK_LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8)
CLASS_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


# ---- Detections from classes and masks ----------------------------------------------------------

def runs(over):
    """The run of steps around step i for which row i holds.

    over  (..., W, W) bool
    ->    its first step and that after its last, two (..., W); end < first where row i lacks i"""
    W = over.shape[-1]
    step = torch.arange(W, device=over.device)
    before = step <= step[:, None]  # [i, j]: j <= i
    first = torch.where(~over & before, step, -1).amax(-1) + 1
    end = torch.where(~over & before.T, step, W).amin(-1)
    return first, end


def covering(first, end, W):
    """Which of W steps the runs first .. end - 1 cover: (..., n) -> (..., n, W), 0 or 1."""
    step = torch.arange(W, device=first.device)
    return ((step >= first[..., None]) & (step < end[..., None])).float()


def smoothed(x, inside, reach):
    """x (..., W) with each step the mean of those at most `reach` away that are the video's.

    inside  (..., W), which are; 0 elsewhere"""
    def means(y):
        rows = y.reshape(1, -1, y.shape[-1])
        return F.avg_pool1d(rows, 2 * reach + 1, 1, reach).reshape(y.shape)

    return means(x * inside) / means(inside.float()).clamp(min=1e-6) * inside


def class_scores(p, first, end, around, inside):
    """The mean of each class in runs, less that around them; not below 0.

    p           (..., W, K), the class scores of the steps
    first, end  (..., n), the runs first .. end - 1
    around      what is before and after a run, as a share of it; 0: nothing is taken off
    inside      (..., W), which steps are the video's
    ->          (..., n, K)"""
    def means(cover):
        return cover @ p / cover.sum(-1, keepdim=True).clamp(min=1)

    W = p.shape[-2]
    run = covering(first, end, W)
    margin = (around * (end - first)).ceil().clamp(min=0)
    beside = covering(first - margin, end + margin, W) * inside[..., None, :] - run
    return (means(run) - means(beside)).clamp(min=0)


class Found(NamedTuple):
    """What is found before suppression."""
    segments: torch.Tensor  # (B, P, 2) in grid steps, from the first step's begin to the last's end
    scores: torch.Tensor  # (B, P, K)
    mask: torch.Tensor  # (B, P)


def cut_off(first, end, begin, inside):
    """Which runs first .. end - 1, (B, n, W), touch a border of their window and are short.

    All steps of one shorter than half a window lie in the window before or behind as well, which
    sees beyond them: that window's runs count.
    begin, inside  as find() has them"""
    W = inside.shape[2]
    goes_on = F.pad(inside.any(2)[:, 1:], (0, 1))[..., None]  # (B, n, 1), into the next window
    at_border = (first == 0) & (begin > 0)[:, None] | (end == W) & goes_on
    return at_border & (end - first < W // 2)


def find(p, maps, inside, begin, s):
    """What windows hold: around each step the runs of its mask's row and of its best class.

    A run's score of a class is class_scores() times the mean over the run of the step's row.
    p       (B, n, W, K), the class scores of the steps; maps (B, n, W, W), row i the mask of step i
    inside  (B, n, W), which steps are the video's
    begin   (n,), where the windows begin
    ->      Found, the runs of a window together"""
    by_class = smoothed(p.transpose(2, 3), inside[:, :, None], s.smooth)  # (B, n, K, W)
    maps = smoothed(maps, inside[:, :, None], s.smooth)
    # Row i: the scores of the best class of step i.
    best_rows = torch.take_along_dim(by_class, by_class.argmax(2)[..., None], 2)  # (B, n, W, W)
    p = by_class.transpose(2, 3)
    parts = []
    for rows, levels in ((maps, MASK_LEVELS), (best_rows, CLASS_LEVELS)):
        for level in levels:
            first, end = runs(rows > level)
            run = covering(first, end, inside.shape[2])
            mask_mean = (run * maps).sum(3) / run.sum(3).clamp(min=1)  # (B, n, W)
            scores = class_scores(p, first, end, s.around, inside) * mask_mean[..., None]
            segments = torch.stack([first, end], -1) - 0.5 + begin[:, None, None]
            parts.append((segments, scores, (first < end) & ~cut_off(first, end, begin, inside)))
    # Each (B, n, levels, W, ...) -> (B, P, ...).
    return Found(*(torch.stack(part, 2).flatten(1, 3) for part in zip(*parts)))


# ---- The network --------------------------------------------------------------------------------

class Outputs(NamedTuple):
    """Raw predictions of the windows of videos, and what they were made from."""
    logits: torch.Tensor  # (B, n, W, K + 1), of the classes of the steps; the last is background
    maps: torch.Tensor  # (B, n, W, W), row i the mask of step i; 0 outside the video
    steps: torch.Tensor  # (B, n, W), which steps of the windows are the video's
    inputs: torch.Tensor  # (B, W, D), the input of the first window, in training the only one
    levels: list  # [(B, W, C)], its embedding
    masks: list  # [(B, W)]
    found: Found  # None in training

    def predictions(self):
        """What the heads give."""
        return self.logits, self.maps

    def p_cls(self):
        """The joint scores (B, P, K): the class in a run, times the mean of the mask's row."""
        return self.found.scores

    def segments(self):
        """The segments (B, P, 2) in grid steps."""
        return self.found.segments

    @property
    def mask(self):
        """Which of the P are detections (B, P)."""
        return self.found.mask

    @property
    def p_tiou(self):
        """1 (B, P): there is no quality branch."""
        return torch.ones_like(self.found.scores[..., 0])

    @property
    def p_tnd(self):
        """0 (B, P)."""
        return torch.zeros_like(self.found.scores[..., 0])

    def sizes(self):
        """How many of the P each window has."""
        n = self.logits.shape[1]
        return [self.mask.shape[1] // n] * n


class Embedding(nn.Module):
    """One layer of attention over all valid steps, with a residual and LayerNorm.

    x     (B, T, D), mask (B, T)
    ->    (B, T, D), 0 where the mask is False"""

    def __init__(self, dim):
        super().__init__()
        self.w_qs = nn.Linear(dim, HEADS * dim, bias=False)
        self.w_ks = nn.Linear(dim, HEADS * dim, bias=False)
        self.w_vs = nn.Linear(dim, HEADS * dim, bias=False)
        self.fc = nn.Linear(HEADS * dim, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x, mask):
        T = mask.shape[1]
        itself = torch.eye(T, dtype=torch.bool, device=x.device)  # so an empty window is finite
        seen = mask[:, None, None] | itself  # (B, 1, T, T)
        linears = (self.w_qs, self.w_ks, self.w_vs)
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in linears)
        drop = DROP_ATTENTION if self.training else 0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=drop)
        out = self.fc(out.transpose(1, 2).flatten(2))
        out = F.dropout(out, DROP_EMBEDDING, self.training)
        return self.layer_norm(x + out) * mask[..., None]


class Detector(nn.Module):
    """SPOT as Settings `s` describe it; its parameters have the public SPOT's names."""

    def __init__(self, dim_in, num_classes, s):
        super().__init__()
        self.s = s
        self.window = s.window()
        self.embedding = Embedding(dim_in)
        self.classifier = nn.Sequential(nn.Conv1d(dim_in, num_classes + 1, 1))
        self.global_mask = nn.Sequential(
            nn.Conv1d(dim_in, s.mask_hidden, 3, padding=1), nn.ReLU(),
            nn.Conv1d(s.mask_hidden, self.window, 1, bias=False))
        if s.acp == "pretext":
            self.clip_order = nn.Sequential(nn.Conv1d(dim_in, 1, 3, padding=1), nn.ReLU())
            self.clip_order_linear = nn.Linear(self.window, 2)

    def embed(self, x, mask):
        """The embedding of steps: x (B, T, D), mask (B, T) -> (B, T, D)."""
        with own_draws(self.training):
            x = F.dropout(x, self.s.input_dropout, self.training) * mask[..., None]
            if self.s.position:
                x = x + sinusoid(x.shape[1], x.shape[2], x.device)
            return self.embedding(x, mask)

    def pyramid(self, feats, mask):
        """The embedding, the one level that ACP contrasts: [(B, T, D)], [(B, T)]."""
        return [self.embed(feats, mask)], [mask]

    def order(self, feats, mask):
        """Whether the halves of videos of at most W steps are swapped: two logits, "swapped" first.

        -> (B, 2), and the embedding (B, T, D)"""
        x = self.embed(feats, mask)
        h = self.clip_order(x.transpose(1, 2))[:, 0] * mask
        h = F.dropout(F.pad(h, (0, self.window - h.shape[1])), DROP_ORDER, self.training)
        return self.clip_order_linear(h).float(), x

    def forward(self, feats, mask):
        """feats (B, T, D), mask (B, T), any T >= 1 -> Outputs."""
        windows, steps, begin = bmn.windows_of(feats, mask, self.window)  # (B, n, W, D), (B, n, W)
        B, n, W = steps.shape
        x = self.embed(windows.flatten(0, 1), steps.flatten(0, 1))
        columns = x.transpose(1, 2)  # (B * n, D, W)
        logits = self.classifier(columns).transpose(1, 2).float().unflatten(0, (B, n))
        # Row i is output channel i over the steps [P].
        maps = torch.sigmoid(self.global_mask(columns).float()).unflatten(0, (B, n))
        maps = maps * (steps[..., None] & steps[..., None, :])
        found = None
        if not self.training:
            with torch.autocast(x.device.type, enabled=False):
                found = find(torch.softmax(logits, -1)[..., :-1], maps, steps, begin, self.s)
        embedded = x.unflatten(0, (B, n))[:, 0]
        return Outputs(logits, maps, steps, windows[:, 0], [embedded], [steps[:, 0]], found)


# ---- Targets and losses -------------------------------------------------------------------------

def targets(record, W, num_classes):
    """The classes and masks of the W steps of a video, by the instances of its record.

    A step is in an instance if it lies inside, of several in the shortest.
    -> the class of each step (W,), background num_classes, unknown inside a rejected segment -1;
       and the map (W, W) bool: row i holds for the steps of the instance that step i is in"""
    segments = record["segments"]
    step = torch.arange(W, device=segments.device)
    classes = step_classes(step, segments, record["labels"], record["rejected"], num_classes)
    # One column more, inside nothing, so that there is a minimum without an instance.
    inside = F.pad(steps_inside(segments, step), (0, 1))  # (W, N + 1)
    length = F.pad(segments[:, 1] - segments[:, 0], (0, 1), value=torch.inf)
    shortest = torch.where(inside, length, torch.inf).min(1).indices
    return classes, inside.T[shortest] & inside.any(1, keepdim=True)


def pseudo_maps(logits, maps, theta_class, theta_mask):
    """What the detector itself says of unlabelled videos: classes, -1 where unsure, and maps.

    One does not ask the other [P]: unlike in targets(), background may have a row.
    logits  (..., W, K + 1), maps (..., W, W)"""
    p, classes = torch.softmax(logits.detach(), -1).max(-1)
    return torch.where(p >= theta_class, classes, -1), maps.detach() >= theta_mask


def focal(L_ce):
    """The focal form of a cross-entropy loss, with SPOT's weight."""
    return OF_CLASS * (1 - torch.exp(-L_ce)) ** 2 * L_ce


def class_loss(logits, classes):
    """Focal loss, step by step, of the classes (N,), logits (N, K + 1) -> scalar, 0 without any.

    The public code has the focal form of the mean cross-entropy of a batch, which is blind to how
    easy a step is."""
    each = focal(F.cross_entropy(logits, classes, reduction="none"))
    return each.sum() / max(len(classes), 1)


def mask_loss(maps, truth, use, eps=1e-6):
    """Weighted binary cross-entropy and dice loss of the maps -> scalar.

    Dice is without the factor 2 of its name [P]: where both agree it is about 0.5, 0 of nothing.
    maps   (B, W, W) in [0, 1]
    truth  (B, W, W) bool
    use    (B, W, W), the pairs of steps that count"""
    truth = truth & use
    positives = MORE_PAIRS + truth.sum()
    whole = MORE_PAIRS + positives + (use & ~truth).sum()
    ratio = whole / positives
    of_positive = 0.5 * ratio * torch.log(maps + eps)
    of_negative = 0.5 * ratio / (ratio - 1) * torch.log(1 - maps + eps)
    L_bce = -(torch.where(truth, of_positive, of_negative) * use).sum() / whole
    maps = maps * use
    common = (maps * truth).sum((1, 2))
    sizes = (maps ** 2).sum((1, 2)) + truth.sum((1, 2))
    L_dice = 1 - (common + 1) / (sizes + 1)
    return OF_BCE * L_bce + OF_DICE * L_dice.mean()


def feature_loss(x, inputs, mask):
    """The mean squared difference of the embedding and its input (B, T, D) -> scalar."""
    return F.mse_loss(x[mask].float(), inputs[mask])


def nce(hard, easy, other):
    """InfoNCE of one query, the mean of the hard steps, and one key, that of the easy ones.

    hard, easy  (N, D) each, steps of one kind
    other       (N, D), the easy steps of the other kind: the negatives
    ->          scalar"""
    query, key = F.normalize(hard.mean(0), dim=-1), F.normalize(easy.mean(0), dim=-1)
    keys = torch.cat([key[None], F.normalize(other, dim=-1)])
    return -torch.log_softmax(keys @ query / TAU, 0)[0]  # the key is the first


def near(steps):
    """The steps at most HARD from one of the steps (W,) bool -> (W,) bool."""
    return F.max_pool1d(steps[None].float(), 2 * HARD + 1, 1, HARD)[0] > 0


def contrast(x, action, background):
    """SPOT's contrast of snippets in a video: those near a boundary with the clear ones.

    x                   (W, D), the embedding
    action, background  (W,) bool
    ->                  scalar; 0 where a kind is missing"""
    hard_action, hard_background = action & near(background), background & near(action)
    kinds = (hard_action, action & ~hard_action, hard_background, background & ~hard_background)
    if not all(kind.any() for kind in kinds):
        return x.sum() * 0
    HA, EA, HB, EB = (x[kind].float() for kind in kinds)
    return nce(HA, EA, EB) + nce(HB, EB, EA)


def batch_losses(outputs, instances, num_classes, s):
    """The losses of a batch: of the classes, of the masks, of the embedding.

    instances  B records {"segments", "labels", "rejected"}, or B empty dicts, for which
               pseudo_maps() makes the targets
    ->         named as train.objective() has them: "cls"; "reg", of the masks; "quality", of the
               embedding and the contrast; "positives", the number of steps in actions; scalars
               that are finite without an instance"""
    logits, maps, inside = outputs.logits[:, 0], outputs.maps[:, 0], outputs.steps[:, 0]
    if instances[0]:
        each = [targets(record, inside.shape[1], num_classes) for record in instances]
        classes, truth = (torch.stack(part) for part in zip(*each))
    else:
        classes, truth = pseudo_maps(logits, maps, s.theta_class, s.theta_mask)
    known = inside & (classes >= 0)
    action = known & (classes < num_classes)
    x, = outputs.levels
    L_contrast = sum(map(contrast, x, action, known & ~action)) / len(x)
    parts = {
        "cls": class_loss(logits[known], classes[known]),
        "reg": mask_loss(maps, truth, known[..., None] & known[:, None]),
        "quality": feature_loss(x, outputs.inputs, inside) + L_contrast,
        "positives": action.sum(),
    }
    return means_of_all(parts)


# ---- Stage 1, SPOT's own pretext ----------------------------------------------------------------

def random_spans(mask, generator):
    """Two random spans of each video, in order, which share a step at most, as B records.

    mask  (B, T)"""
    draws = draws_of_batch((len(mask), 4), generator=generator).sort(1).values
    times = (draws.to(mask.device) * mask.sum(1, keepdim=True)).floor()
    labels = torch.arange(2, device=mask.device)
    return [{"segments": row.reshape(2, 2), "labels": labels, "rejected": row.new_zeros(0, 2)}
            for row in times]


def swap_halves(x, mask, swapped):
    """x (B, T, D) with the halves of the videos swapped for which `swapped` (B,) holds."""
    T = mask.shape[1]
    length = mask.sum(1, keepdim=True)
    step = torch.arange(T, device=x.device)
    moved = (step + length // 2) % length
    return rows_at(x, torch.where(swapped[:, None] & mask, moved, step))


def pretext_losses(detector, batch, s, generator):
    """The losses of SPOT's pretext of a batch, which reads no label: {"mask", "order", "feature"}.

    In the public code the mask loss is of the prediction of the whole video, not of the erased one,
    spans pile up over a batch, the feature loss counts twice, and what is erased gets the least of
    the input: here 0, the mean if s.standardize."""
    mask = batch["mask"].to(s.device)
    feats = batch["feats"].to(s.device)
    spans = random_spans(mask, generator)
    W = detector.window
    truth = torch.stack([targets(record, W, 2)[1] for record in spans])  # (B, W, W)
    kept = truth.any(2)[:, :mask.shape[1]]
    cropped = batch | {"feats": feats * kept[..., None]}
    outputs = evaluate.forward(detector, cropped, s)
    inside = outputs.steps[:, 0]
    swapped = draws_of_batch((len(mask),), generator=generator).to(s.device) < 0.5
    turned = swap_halves(feats, mask, swapped)
    logits, x = evaluate.forward(detector.order, batch | {"feats": turned}, s)
    parts = {
        "mask": mask_loss(outputs.maps[:, 0], truth, inside[..., None] & inside[:, None]),
        "order": F.cross_entropy(logits, (~swapped).long()),
        "feature": feature_loss(x, turned, mask),
    }
    return means_of_all(parts)


def pretext(run, rng):
    """An epoch of SPOT's pretext on all training videos, in the place of ACP."""
    videos = [data.blind(video) for video in run.data.labelled + run.data.unlabelled]
    for batch in train.batches_of(run, videos, rng):
        parts = pretext_losses(run.detector, batch, run.s, run.generator)
        train.advance(run, sum(parts.values()), parts, batch["ids"])


# ---- Stage 3, SPOT's own ------------------------------------------------------------------------

def learn_from_maps(run, rng):
    """An epoch of SPOT's stage 3: labelled videos, and unlabelled ones by their pseudo maps."""
    labelled = train.batches_of(run, run.data.labelled, rng)
    for batch, other in zip(labelled, train.batches_of(run, run.data.unlabelled, rng)):
        sup = train.batch_losses(run, batch, data.ground_truth(batch), "labelled")
        unsup = train.batch_losses(run, other, [{} for _ in other["id"]], "unlabelled")
        parts = sup | {f"unsup_{key}": value for key, value in unsup.items()}
        loss = train.objective(sup, unsup, run.s)
        train.advance(run, loss, parts, batch["ids"] + other["ids"])


# ---- Settings -----------------------------------------------------------------------------------

PRESET = {  # beside those of data.PRESETS
    "acp_after": "none",  # with --paper too: ACP takes the place of the pretext alone
    "min_score": 1e-4,
    "nms_sigma": 0.4,
    "vote": 0.0,
    "lr": 1e-3,
    "lambda_reg": 1.0,
    "lambda_quality": 1.0,
    "lambda_u": 1.0,
    "t_plus": 1.0,  # the losses are means already
    "t_plus_momentum": 1.0,
}
OWN = {  # a user's own data, with many actions a video
    "smooth": 1,
    "around": 0.25,
    "max_steps": 128,
    "supervised_steps": 800,
}
PRESETS = bmn.PRESETS | {
    "activitynet": bmn.PRESETS["activitynet"] | {"position": False},  # [P]
}


@dataclass(frozen=True)
class Settings(bmn.OtherSettings):
    """train.py's settings and SPOT's."""
    since = "pretrain"
    heading = "this detector's own"
    acp: OneOf((*ACP, "pretext"), "contrasts of Eq. (11) in stage 1, or SPOT's own pretext; none "
               "leaves stage 1 out [S]") = "coarse+fine"
    acp_after: OneOf(("none", "labelled", "labelled+unlabelled"), "where L_acp goes on after stage "
                     "1 [S: none]") = "none"
    alqa: OneOf(("none",), "SPOT has no quality branches") = "none"
    mask_hidden: Width("hidden width of the mask head [P]") = 256
    pseudo: OneOf(("maps", "labels"), "what unlabelled videos teach by in stage 3: what the "
                  "detector says of them, or the pseudo labels of train.py [P]") = "maps"
    theta_class: Share("class score from which a step of a pseudo map teaches [P; there unused: it "
                       "takes every step]") = 0.95
    theta_mask: Share("number from which a pair of a pseudo map is of one action [P]") = 0.7
    smooth: Blocks("steps to either side that detection averages classes and masks over [P: 0]") = 0
    around: Share("what is around a run and taken off its score, as a share of it [P: 0]") = 0.0

    PRESET, OWN, PRESETS = PRESET, OWN, PRESETS
    TRAIN = EVALUATE = "python -m extras.spot"
    UNUSED = (*bmn.OtherSettings.UNUSED, "input_jitter", "input_view", "tnd_bias", "eps",
              "quality_form")
    READ_WITH = bmn.OtherSettings.READ_WITH | {
        "acp coarse fine coarse+fine": "acp_steps acp_clusters acp_restarts acp_tau acp_after",
        "acp coarse fine coarse+fine pretext": "pretrain_epochs",
        "pseudo labels": "theta_l threshold theta_fixed scope repeat exclusive rerank icd "
                         "theta_drop theta_mine rejected refresh",
        "pseudo maps": "theta_class theta_mask",
    }

    def __post_init__(self):
        super().__post_init__()
        self.check_window()
        if self.acp == "pretext" and self.acp_after != "none":
            raise BadInput("setting acp_after: L_acp does not go on after another pretext than ACP")
        if self.pseudo == "maps" and "unlabelled" in self.acp_after.split("+"):
            raise BadInput("setting acp_after: L_acp of unlabelled videos needs instances, and "
                           "pseudo maps are none: --acp-after labelled, or --pseudo labels")

    def build(self, dim, num_classes):
        """The detector of these settings."""
        return Detector(dim, num_classes, self)

    def epochs(self):
        """What does an epoch of each stage that is not done in train.py's way."""
        own = {"pretrain": pretext} if self.acp == "pretext" else {}
        return own | ({"joint": learn_from_maps} if self.pseudo == "maps" else {})

    def losses(self, outputs, instances, num_classes):
        """The losses of a batch: what alqa.alqa_losses() gives, but means."""
        return batch_losses(outputs, instances, num_classes, self)

    def can_learn(self, detector, video, num_classes):
        """Whether a step of a LabelledVideo is in an action."""
        return bool(video.on_a_step().any())


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    return bmn.train_or_evaluate(argv, Settings)


if __name__ == "__main__":
    sys.exit(main())
