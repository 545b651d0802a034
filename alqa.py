"""Adaptive Label Quality Assessment, ALQA (Sec. 3.1): Eq. (1) and (3)-(6); Eq. (2), the branches, is in model.py.

Input   the detector's raw outputs at the points, and their targets.
Output  the classification, regression and quality losses; the joint score; positives and candidates among detections.
"""
import torch
import torch.nn.functional as F

from model import tiou, tnd

THRESHOLDS = ("mean+std", "mean", "mean-std", "fixed", "frequency")  # theta_h of Eq. (6); fixed: the paper's baseline, frequency: NPL's
SCOPES = ("video", "dataset", "class")  # what the mean and std of theta_h are taken over
SOFT_LABELS = ("computed", "predicted")  # the tIoU and tND of the soft label: of the regressed segments, or of the two branches


def overlap(offsets, offset_target):
    """tIoU and tND of regressed segments with their ground truth, seen from a shared point: both (..., 2) offsets to start
    and end, >= 0, in one unit -> two (...)."""
    sign = offsets.new_tensor([-1, 1])
    return tiou(offsets * sign, offset_target * sign), tnd(offsets * sign, offset_target * sign)


def diou_loss(offsets, offset_target):
    """Eq. (1): L_diou = 1 - tIoU + tND, tND = d^2 / c^2.

    offsets and offset_target (..., 2) from a shared point -> (...), each in [0, 1.25]."""
    tIoU, tND = overlap(offsets, offset_target)
    return 1 - tIoU + tND


def quality_loss(p_tiou, p_tnd, tiou_target, tnd_target, branches, form, eps=1e-6):
    """Eq. (3): L_quality = BCE(P_tiou, tIoU) + BCE(P_tnd, tND).

    All (N,), of the positive points; the targets are those of the regressed segments, detached -> (N,). `branches` "tiou"
    and "diou" are the single branches of Tab. 3(b), "diou" with target max(tIoU - tND, 0); "none" gives 0. `form` "bce", or
    "kl" (Tab. S1). With fixed targets KL(Y || P) has BCE's gradient, so "kl" is KL(P || Y), the only KL that is another loss
    (not given in the paper)."""
    def distance(p, y):
        p, y = p.clamp(eps, 1 - eps), y.clamp(0, 1)
        if form == "bce":
            return F.binary_cross_entropy(p, y, reduction="none")
        y = y.clamp(eps, 1 - eps)
        return p * (p / y).log() + (1 - p) * ((1 - p) / (1 - y)).log()
    if branches == "none":
        return torch.zeros_like(p_tiou)
    if branches != "tiou+tnd":
        return distance(p_tiou, tiou_target if branches == "tiou" else tiou_target - tnd_target)
    return distance(p_tiou, tiou_target) + distance(p_tnd, tnd_target)


def joint_score(p_cls, p_tiou, p_tnd, eps=1e-6):
    """Eq. (4): P = P_cls * max(P_tiou - P_tnd, eps).

    p_cls (..., K), p_tiou and p_tnd (...) -> (..., K) in [0, 1]. It ranks everything: Soft-NMS, selection, test mAP. eps is
    not given in the paper."""
    P = p_cls * (p_tiou - p_tnd).clamp(min=eps)[..., None]
    return P


def soft_label(onehot, tIoU, tND, branches, eps=1e-6):
    """The DIoU-based soft label Y = onehot * max(tIoU - tND, eps), from detached overlaps (Sec. 3.1).

    The Y of Eq. (5). onehot (..., K), overlaps (...) -> (..., K). A tIoU branch alone predicts tIoU: its label is onehot * tIoU."""
    reliability = tIoU if branches == "tiou" else tIoU - tND
    return onehot * reliability.clamp(min=eps)[..., None]


def classification_loss(cls_logits, p_tiou, p_tnd, Y, beta=2.0, eps=1e-6):
    """Eq. (5): L_cls = sum_k |Y - P|^beta * BCE(P, Y).

    cls_logits and Y (..., K), p_tiou and p_tnd (...) -> (...); P is the joint score of Eq. (4). The paper says focal loss with
    soft labels; this form, the quality focal loss [24], is not given there but has its minimum at P = Y, which focal loss with
    soft targets has not, and Eq. (6) needs a calibrated P. In logs, since P_cls starts at 0.01."""
    log_p = F.logsigmoid(cls_logits) + (p_tiou - p_tnd).clamp(min=eps).log()[..., None]
    P = log_p.exp()
    log_1_minus_p = torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))
    return ((Y - P).abs() ** beta * -(Y * log_p + (1 - Y) * log_1_minus_p)).sum(-1)


def focal_loss(cls_logits, onehot, alpha=0.25, gamma=2.0):
    """Sigmoid focal loss (Lin et al. 2017) of plain ActionFormer: (..., K) -> (..., K). The baseline without ALQA uses it."""
    p = torch.sigmoid(cls_logits)
    p_t = p * onehot + (1 - p) * (1 - onehot)
    alpha_t = alpha * onehot + (1 - alpha) * (1 - onehot)
    return alpha_t * (1 - p_t) ** gamma * F.binary_cross_entropy_with_logits(cls_logits, onehot, reduction="none")


def detection_losses(outputs, cls_target, offset_target, use, branches, form, source="computed", eps=1e-6, beta=2.0, alpha=0.25,
                     gamma=2.0):
    """Sec. 3.1 at once: the three losses summed over the points `use` (B, P) bool, and the positives T+ among them.

    Returns {"cls", "reg", "quality"} scalars (finite without positives) and "positives" (scalar tensor). Without ALQA
    (`branches` "none") the classification loss is focal loss on the one-hot target. `source`, one of SOFT_LABELS, says whose overlaps
    the soft label takes: the paper says "predicted" and does not say by what; both are detached."""
    positive = (cls_target.sum(-1) > 0) & use
    regressed, target = outputs.offsets[positive], offset_target[positive]  # (T+, 2)
    tiou_target, tnd_target = overlap(regressed.detach(), target)  # no gradient: they are targets
    if branches == "none":
        cls = focal_loss(outputs.cls_logits[use], cls_target[use], alpha, gamma).sum()
    else:
        Y = torch.zeros_like(cls_target)
        overlaps = (tiou_target, tnd_target) if source == "computed" else (x[positive].detach() for x in (outputs.p_tiou, outputs.p_tnd))
        Y[positive] = soft_label(cls_target[positive], *overlaps, branches, eps)
        cls = classification_loss(outputs.cls_logits[use], outputs.p_tiou[use], outputs.p_tnd[use], Y[use], beta, eps).sum()
    quality = quality_loss(outputs.p_tiou[positive], outputs.p_tnd[positive], tiou_target, tnd_target, branches, form)
    return {"cls": cls, "reg": diou_loss(regressed, target).sum(), "quality": quality.sum(), "positives": positive.sum()}


@torch.no_grad()
def without_repeats(detections, overlap, exclusive):
    """A video's detections without those whose tIoU with a better one of their class (`exclusive`: of any) is over `overlap` (1:
    all stay), the best first.

    Not given in the paper. Soft-NMS leaves repeats of an instance with a lower score: they would come back as candidates, be
    mined as second pseudo labels of what is labelled already, and mask the background around it. Where no two classes share a
    segment, at most one of two classes for a segment is right: the better score decides."""
    order = torch.argsort(detections["scores"], descending=True, stable=True)
    d = {key: value[order] for key, value in detections.items()}
    repeats = torch.triu(tiou(d["segments"][:, None], d["segments"]) > overlap, 1)
    repeats &= (d["labels"][:, None] == d["labels"]) | exclusive
    keep = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if keep[i]:
            keep &= ~repeats[i]
    return {key: value[keep] for key, value in d.items()}


def classes_share_segments(videos, overlap):
    """Whether two instances of different classes of a labelled video have a tIoU over `overlap`."""
    return any(((tiou(v.segments[:, None], v.segments) > overlap) & (v.labels[:, None] != v.labels)).any() for v in videos)


@torch.no_grad()
def rerank(detections, overlap):
    """A video's detections with class scores reranked as NPL [53] does, the comparator of Table 1: reconstructed from a sentence of
    the paper, no code being public.

    A detection's "scores" is multiplied by exp(-d / length), d the standard deviation of the starts and ends of the detections of
    its class whose tIoU with it is over `overlap`, weighted by their scores."""
    segments, labels, scores = (detections[key] for key in ("segments", "labels", "scores"))
    near = (tiou(segments[:, None], segments) > overlap) & (labels[:, None] == labels)
    weight = near * scores + 1e-12 * torch.eye(len(scores))
    weight = weight / weight.sum(1, keepdim=True)
    apart = segments - segments[:, None]  # (N, N, 2)
    mean = (weight[..., None] * apart).sum(1, keepdim=True)
    d = (weight[..., None] * (apart - mean) ** 2).sum((1, 2)).sqrt()
    return detections | {"scores": scores * torch.exp(-d / (segments[:, 1] - segments[:, 0]).clamp(min=1e-6))}


@torch.no_grad()
def select(detections, theta_l, threshold, theta_fixed, scope):
    """Eq. (6): U+ = {s_i >= theta_h}, U_can = {theta_l < s_i < theta_h}, theta_h = mean(s) + std(s) over s > theta_l.

    detections: a list, one instances record a video, after Soft-NMS, with joint "scores". Returns the records without what
    theta_l drops, with "positive" (N,) bool added, and the list of theta_h (one a video; one a class if
    `scope` is "class" or `threshold` "frequency").
    The form of the sum, the population std and >= are not given in the paper: with two instances the unbiased std never
    selects one. `scope` says what the statistics are over: each video, the dataset, each class of it. `threshold` "mean"
    leaves the std out, "mean-std" takes it off, "fixed" sets theta_h = theta_fixed: the fixed case of Fig. 3(c), and without quality
    branches, where the joint score is the class score, the baseline of Tab. 3(a). "frequency", for NPL, lowers theta_fixed for rare
    classes as FlexMatch does (Zhang et al. 2021): theta_fixed * f / (2 - f), f the number of a class's detections over theta_fixed as
    a share of the largest class's; where that is below theta_l, theta_l decides."""
    records = [{key: value[d["scores"] > theta_l] for key, value in d.items()} for d in detections]

    def theta(s):
        if threshold == "fixed" or len(s) == 0:
            return theta_fixed if threshold == "fixed" else 1.0
        if threshold == "frequency":
            sure = scores >= theta_fixed
            f = int((s >= theta_fixed).sum()) / max(int(labels[sure].bincount(minlength=1).max()), 1)
            return theta_fixed * f / (2 - f)
        return float(s.double().mean() + {"mean+std": 1, "mean": 0, "mean-std": -1}[threshold] * s.double().std(correction=0))

    scores, labels = (torch.cat([r[key] for r in records]) if records else torch.zeros(0) for key in ("scores", "labels"))
    scope = "class" if threshold == "frequency" else scope
    theta_h = {"video": lambda: [theta(r["scores"]) for r in records], "dataset": lambda: [theta(scores)] * len(records),
               "class": lambda: {c: theta(scores[labels == c]) for c in labels.unique().tolist()}}[scope]()
    for number, r in enumerate(records):
        bound = [theta_h[c] for c in r["labels"].tolist()] if scope == "class" else theta_h[number]
        r["positive"] = r["scores"].double() >= torch.as_tensor(bound, dtype=torch.float64)
    return records, list(theta_h.values()) if scope == "class" else theta_h
