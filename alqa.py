"""Adaptive Label Quality Assessment, ALQA (Sec. 3.1): Eq. (1) and (3)-(6); Eq. (2) is in model.py.

Input   the detector's raw outputs at the points and their targets; detections of whole videos.
Output  the classification, regression and quality losses; the joint score; the detections parted
        into positives and candidates.
Below the paper's equations stand what they are compared with, our own rules, the losses of a batch,
and select(), the box ALQA of Fig. 1.
"""
import torch
import torch.nn.functional as F

from data import gather, take
from model import assign_targets, steps_inside, tiou, tnd
from plumbing.processes import sum_of_all

# theta_h of Eq. (6), by the sign of the std; fixed: the paper's baseline, frequency: NPL's.
SIGN_OF_STD = {"mean+std": 1, "mean": 0, "mean-std": -1}
THRESHOLDS = (*SIGN_OF_STD, "fixed", "frequency")
# What the mean and std of theta_h are taken over.
SCOPES = ("video", "dataset", "class")
# Whose tIoU and tND the soft label takes: the regressed segments', or the two branches'.
SOFT_LABELS = ("computed", "predicted")


def tiou_and_tnd(offsets, offset_target):
    """tIoU and tND of regressed segments with their ground truth, seen from a shared point.

    both  (..., 2), offsets >= 0 to start and end, in one unit
    ->    two (...)"""
    sign = offsets.new_tensor([-1, 1])
    regressed, truth = offsets * sign, offset_target * sign
    return tiou(regressed, truth), tnd(regressed, truth)


def diou_loss(offsets, offset_target):
    """Eq. (1): L_diou = 1 - tIoU + tND, tND = d^2 / c^2.

    both  (..., 2), offsets from a shared point
    ->    (...), each in [0, 1.25]"""
    tIoU, tND = tiou_and_tnd(offsets, offset_target)
    L_diou = 1 - tIoU + tND
    return L_diou


def bce(p, y, eps=1e-6):
    """Binary cross-entropy of probabilities p (N,) with targets y (N,), both clamped -> (N,)."""
    return F.binary_cross_entropy(p.clamp(eps, 1 - eps), y.clamp(0, 1), reduction="none")


def kl(p, y, eps=1e-6):
    """KL(P || Y) of probabilities p (N,) and targets y (N,) -> (N,).

    With fixed targets KL(Y || P) has the gradient of BCE, so this is the only KL that is another
    loss (not given in the paper)."""
    p = p.clamp(eps, 1 - eps)
    y = y.clamp(eps, 1 - eps)
    return p * (p / y).log() + (1 - p) * ((1 - p) / (1 - y)).log()


def quality_loss(p_tiou, p_tnd, tIoU, tND, branches, form):
    """Eq. (3): L_quality = BCE(P_tiou, tIoU) + BCE(P_tnd, tND).

    All (N,), of the positive points; the targets are those of the regressed segments, detached.
    branches  one of model.BRANCHES but "none": "tiou" and "diou" are the single ones of Tab. 3(b),
              "diou" with the target max(tIoU - tND, 0)
    form      "bce", or "kl" (Tab. S1)
    ->        (N,)"""
    distance = {"bce": bce, "kl": kl}[form]
    if branches == "tiou":
        return distance(p_tiou, tIoU)
    if branches == "diou":
        return distance(p_tiou, (tIoU - tND).clamp(min=0))
    return distance(p_tiou, tIoU) + distance(p_tnd, tND)


def joint_score(p_cls, p_tiou, p_tnd, eps):
    """Eq. (4): P = P_cls * max(P_tiou - P_tnd, eps).

    It ranks everything: Soft-NMS, selection, test mAP. eps is not given in the paper.
    p_cls          (..., K)
    p_tiou, p_tnd  (...)
    ->             (..., K) in [0, 1]"""
    reliability = (p_tiou - p_tnd).clamp(min=eps)[..., None]
    P = p_cls * reliability
    return P


def soft_label(onehot, tIoU, tND, branches, eps):
    """The DIoU-based soft label of Sec. 3.1, Y = onehot * max(tIoU - tND, eps).

    The paper's "predicted" tIoU and tND are the regressed segments' or the branches', as
    alqa_losses() gives them by the setting soft_label. A tIoU branch alone has onehot * tIoU.
    onehot     (..., K)
    tIoU, tND  (...), detached
    ->         (..., K)"""
    reliability = tIoU if branches == "tiou" else tIoU - tND
    Y = onehot * reliability.clamp(min=eps)[..., None]
    return Y


def classification_loss(cls_logits, p_tiou, p_tnd, Y, beta, eps):
    """Eq. (5): L_cls = sum_k |Y - P|^beta * BCE(P, Y).

    P is the joint score of Eq. (4), in logs, so that one near 0 keeps its gradient. The paper says
    focal loss with soft labels; this form, the quality focal loss [24], is not given there but has
    its minimum at P = Y, which focal loss with soft targets has not. Y is soft_label()'s.
    cls_logits, Y  (..., K)
    p_tiou, p_tnd  (...)
    ->             (...)"""
    reliability = (p_tiou - p_tnd).clamp(min=eps)[..., None]
    log_P = F.logsigmoid(cls_logits) + reliability.log()  # Eq. (4)
    log_1_minus_P = torch.log(-torch.expm1(log_P.clamp(max=-1e-7)))  # P = 1 would give log 0
    P = log_P.exp()
    BCE = -(Y * log_P + (1 - Y) * log_1_minus_P)
    L_cls = ((Y - P).abs() ** beta * BCE).sum(-1)
    return L_cls


def alqa_losses(outputs, cls_target, offset_target, valid, s):
    """The three losses of Sec. 3.1, each summed over the points.

    outputs        model.Outputs
    cls_target     (B, P, K), offset_target (B, P, 2), as assign_targets() gives them
    valid          (B, P) bool, the points that count
    s              the settings
    ->             {"cls", "reg", "quality"}, scalars, finite without positives, and "positives",
                   their number"""
    positive = cls_target.any(-1) & valid
    regressed, target = outputs.offsets[positive], offset_target[positive]  # (N, 2)
    p_tiou, p_tnd = outputs.p_tiou[positive], outputs.p_tnd[positive]  # (N,)
    tIoU, tND = tiou_and_tnd(regressed.detach(), target)  # no gradient: they are targets
    label_tiou, label_tnd = tIoU, tND
    if s.soft_label == "predicted":
        label_tiou, label_tnd = p_tiou.detach(), p_tnd.detach()
    Y = torch.zeros_like(cls_target)
    Y[positive] = soft_label(cls_target[positive], label_tiou, label_tnd, s.alqa, s.eps)
    L_cls = classification_loss(
        outputs.cls_logits[valid], outputs.p_tiou[valid], outputs.p_tnd[valid], Y[valid],
        s.beta, s.eps)
    L_diou = diou_loss(regressed, target)
    L_quality = quality_loss(p_tiou, p_tnd, tIoU, tND, s.alqa, s.quality_form)
    return {"cls": L_cls.sum(), "reg": L_diou.sum(), "quality": L_quality.sum(),
            "positives": positive.sum()}


def theta_h(s, sign):
    """Eq. (6): theta_h = mean(s) + std(s), which parts U+ = {s_i >= theta_h} from U_can.

    U_can = {theta_l < s_i < theta_h} are the candidates; select() puts both sets on the records.
    The form of the sum, the population std and >= are not given in the paper: with two instances
    the unbiased std never selects one.
    s       (N,), the joint scores over theta_l of a video, class or data set
    sign    of the std: 1; 0 leaves it out, -1 takes it off (not in the paper; -1 for own data)
    ->      scalar"""
    theta_h = s.mean() + sign * s.std(correction=0)
    return theta_h


# ---- Not in the paper ---------------------------------------------------------------------------

def focal_loss(cls_logits, onehot, alpha, gamma):
    """Sigmoid focal loss (Lin et al. 2017): (..., K) -> (..., K)."""
    p = torch.sigmoid(cls_logits)
    p_t = p * onehot + (1 - p) * (1 - onehot)
    alpha_t = alpha * onehot + (1 - alpha) * (1 - onehot)
    BCE = F.binary_cross_entropy_with_logits(cls_logits, onehot, reduction="none")
    return alpha_t * (1 - p_t) ** gamma * BCE


def plain_losses(outputs, cls_target, offset_target, valid, s):
    """The losses of plain ActionFormer [62], the baseline: what alqa_losses() takes and gives."""
    positive = cls_target.any(-1) & valid
    K = cls_target.shape[-1]
    smooth = cls_target[valid] * (1 - s.label_smoothing) + s.label_smoothing / (K + 1)
    L_cls = focal_loss(outputs.cls_logits[valid], smooth, s.focal_alpha, s.focal_gamma)
    L_diou = diou_loss(outputs.offsets[positive], offset_target[positive])
    return {"cls": L_cls.sum(), "reg": L_diou.sum(), "quality": L_cls.new_zeros(()),
            "positives": positive.sum()}


def overlapping(segments, overlap):
    """Which of the segments (N, 2) have a tIoU over `overlap` with which -> (N, N) bool."""
    return tiou(segments[:, None], segments) > overlap


def without_repeats(record, overlap, exclusive):
    """A video's detections without those that repeat a better one, best score first.

    Soft-NMS leaves repeats of an instance with a lower score: they would come back as candidates,
    be mined as second pseudo labels of what is labelled already, and mask the background around
    it. Where no two classes share a segment, at most one of two classes for a segment is right:
    the better score decides.
    overlap    a repeat's tIoU with a better one of its class is larger (1: all stay)
    exclusive  ... with a better one of any class"""
    record = take(record, torch.argsort(record["scores"], descending=True, stable=True))
    labels = record["labels"]
    same = (labels[:, None] == labels) | exclusive
    near = overlapping(record["segments"], overlap)
    repeats = torch.triu(near & same, 1)  # (N, N), [i, j]: j repeats i
    keep = torch.ones(len(labels)).bool()
    for i, repeats_i in enumerate(repeats):
        if keep[i]:
            keep &= ~repeats_i
    return take(record, keep)


def classes_share_segments(videos, overlap):
    """Whether two instances of different classes of a video have a tIoU over `overlap`."""
    def shares(video):
        differ = video.labels[:, None] != video.labels
        return (overlapping(video.segments, overlap) & differ).any()

    return any(map(shares, videos))


def rerank(record, overlap):
    """A video's detections, reranked as NPL [53] does: reconstructed from a sentence of the paper.

    A score is multiplied by exp(-d / length), d the standard deviation of the starts and ends of
    the detections of its class whose tIoU with it is over `overlap`, weighted by their scores."""
    segments, labels, scores = record["segments"], record["labels"], record["scores"]
    near = overlapping(segments, overlap) & (labels[:, None] == labels)
    weight = (near * scores + 1e-12 * torch.eye(len(scores))).double()
    weight = weight / weight.sum(1, keepdim=True)  # (N, N)
    x = segments.double()
    variance = weight @ x ** 2 - (weight @ x) ** 2  # (N, 2)
    d = variance.sum(1).clamp(min=0).sqrt().float()
    length = (segments[:, 1] - segments[:, 0]).clamp(min=1e-6)
    return record | {"scores": scores * torch.exp(-d / length)}


def frequency_thresholds(scores_of, theta_fixed):
    """A lower threshold for a rare class, for NPL, as FlexMatch has it (Zhang et al. 2021).

    theta_fixed * f / (2 - f), f the number of a class's scores over theta_fixed, as a share of
    the most frequent class's; theta_fixed for all where no score is over it.
    scores_of  the scores (N,) of each class
    ->         a number a class"""
    sure = [int((scores >= theta_fixed).sum()) for scores in scores_of]
    most = max(sure, default=0)
    shares = [count / most if most else 1 for count in sure]
    return [theta_fixed * f / (2 - f) for f in shares]


# ---- The losses of a batch ----------------------------------------------------------------------

def point_losses(outputs, instances, num_classes, s):
    """The sums over the points of a batch, of all processes: what alqa_losses() gives.

    The points inside a rejected segment are neither action nor background, unless they are
    positive for another.
    instances  B records {"segments", "labels", "rejected"}"""
    cls_target, offset_target = assign_targets(
        outputs.points, [r["segments"] for r in instances], [r["labels"] for r in instances],
        num_classes, s.radius)
    unsure = torch.stack([
        steps_inside(r["rejected"], outputs.points.time).any(1) for r in instances])
    valid = outputs.mask & (cls_target.any(-1) | ~unsure)  # (B, P)
    losses_of = plain_losses if s.alqa == "none" else alqa_losses
    losses = losses_of(outputs, cls_target, offset_target, valid, s)
    return {key: sum_of_all(value) for key, value in losses.items()}


# ---- The box ALQA of Fig. 1 ---------------------------------------------------------------------

def group_of(records, scope):
    """What each detection shares theta_h with: {id: record} -> (N,) numbers 0, 1, ..."""
    shared = gather(records, "labels")  # of the scope "class"
    if scope == "video":
        counts = torch.tensor([len(r["labels"]) for r in records.values()]).long()
        shared = torch.repeat_interleave(counts)  # 0, 0, ... 1, 1, ...
    if scope == "dataset":
        shared = torch.zeros_like(shared)
    return shared.unique(return_inverse=True)[1]


@torch.no_grad()
def select(detections, theta_l, threshold, theta_fixed, scope):
    """Part each video's detections into positives and candidates.

    1) theta_l drops, 2) Eq. (6) gives theta_h for what is left of a video, class or data set,
    3) positive is s >= theta_h, a candidate the rest.
    detections   {id: record} after Soft-NMS, which lowers the joint "scores", and without_repeats()
    threshold    one of THRESHOLDS; "fixed": theta_fixed is theta_h, the fixed case of Fig. 3(c),
                 and without quality branches the baseline of Tab. 3(a)
    scope        one of SCOPES; "frequency" goes by class
    ->           {id: record} without what theta_l drops, with "positive" (N,) bool, and a list of
                 theta_h, one for each video, class or data set that has a detection left"""
    left = {name: take(r, r["scores"] > theta_l) for name, r in detections.items()}
    scores = gather(left, "scores").double()
    group = group_of(left, "class" if threshold == "frequency" else scope)
    scores_of = [scores[group == number] for number in group.unique()]
    if threshold == "fixed":
        thetas = [theta_fixed] * len(scores_of)
    elif threshold == "frequency":
        thetas = frequency_thresholds(scores_of, theta_fixed)
    else:
        thetas = [float(theta_h(s, SIGN_OF_STD[threshold])) for s in scores_of]
    positive = scores >= torch.tensor(thetas, dtype=torch.double)[group]
    by_video = positive.split([len(r["scores"]) for r in left.values()])
    selected = {name: left[name] | {"positive": part} for name, part in zip(left, by_video)}
    return selected, thetas
