"""Instance-level Consistency Discriminator, ICD (Sec. 3.2): Eq. (7)-(10).

Input   the detector's input features of labelled instances and of detections, pooled over time.
Output  for each detection its mean similarity to the labelled instances of its class, and what
        becomes of it: ambiguous positives are dropped (EAP), potential positives mined from the
        candidates (MPP).
Detection on test videos does not use the discriminator.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# What became of a detection: a positive that stays, one that EAP dropped, a candidate that MPP
# mined, one that stays out.
STATUS = ("kept", "dropped", "mined", "candidate")
KEPT, DROPPED, MINED, CANDIDATE = range(4)
REFINEMENTS = ("none", "eap", "mpp", "eap+mpp")
SCORES = ("absolute", "relative")  # Eq. (10), or own_minus_other()


def pool_instances(feats, segments, pool):
    """Input features of segments, pooled over the steps inside each.

    A segment that holds no step takes the nearest one (not given in the paper).
    feats     (T, D)
    segments  (N, 2) in grid steps of feats
    pool      "max" (the paper's) or "mean" (better where standardised features have signs)
    ->        (N, D)"""
    pooled = feats.new_zeros(len(segments), feats.shape[1])
    for i, (start, end) in enumerate(segments.tolist()):
        first = max(math.ceil(start), 0)
        last = min(math.floor(end), len(feats) - 1)
        if first > last:
            middle = round((start + end) / 2)
            first = last = min(max(middle, 0), len(feats) - 1)
        inside = feats[first:last + 1]
        pooled[i] = inside.amax(0) if pool == "max" else inside.mean(0)
    return pooled


def standardised(feats):
    """The features (T, D) of a video, standardised over the video: for relative similarities."""
    return (feats - feats.mean(0)) / feats.std(0, correction=0).clamp(min=1e-6)


def bank_of(videos, pool, score):
    """The labelled instances of an iterable of {"id", "feats", "segments", "labels"} as one record.

    Instances of one video with identical boundaries share a key, which Eq. (7) reads (THUMOS14
    labels a cliff dive twice, as Diving and as CliffDiving).
    -> {"feats" (N, D), "labels" (N,), "keys" (N,), "videos" N ids}"""
    feats = []
    labels = []
    boundaries = []
    for video in videos:
        x = standardised(video["feats"]) if score == "relative" else video["feats"]
        feats.append(pool_instances(x, video["segments"], pool))
        labels.append(video["labels"])
        boundaries += [(video["id"], *segment) for segment in video["segments"].tolist()]
    key_of = {}
    keys = [key_of.setdefault(boundary, len(key_of)) for boundary in boundaries]
    return {
        "feats": torch.cat(feats),
        "labels": torch.cat(labels),
        "keys": torch.tensor(keys, dtype=torch.long),
        "videos": [name for name, *_ in boundaries],
    }


def draw(members, number, generator):
    """`number` of the rows where `members` (N,) is True, with replacement where there are fewer.

    -> their indices; empty where there is none"""
    j = members.nonzero()[:, 0]
    if 0 < len(j) < number:
        j = j[torch.randint(len(j), (number,), generator=generator)]
    return j[torch.randperm(len(j), generator=generator)[:number]]


def sample_sets(bank, i, number, generator):
    """Eq. (7): F_i+ = {f_j : c_j = c_i, j != i}, F_i- = {f_j : c_j != c_i}, `number` of each.

    Both are drawn from all labelled instances. An instance with the same boundaries in the same
    video is in neither set.
    -> two index tensors, `number` long or empty"""
    same_class = bank["labels"] == bank["labels"][i]
    other_segment = bank["keys"] != bank["keys"][i]
    F_pos = draw(same_class & other_segment, number, generator)
    F_neg = draw(~same_class & other_segment, number, generator)
    return F_pos, F_neg


class Discriminator(nn.Module):
    """Eq. (9): D(a, b) = sigmoid(W_2 relu(W_1 [a; b])), from 2D to 128 to 1.

    Dropout and Xavier initialisation are not given in the paper.
    a, b  (N, D), pooled features
    ->    (N,), the logit of D, without the sigmoid"""

    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.W_1 = nn.Linear(2 * dim, hidden)
        self.W_2 = nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.W_1, self.W_2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, a, b):
        pair = torch.cat([a, b], -1)
        hidden = self.dropout(F.relu(self.W_1(pair)))
        return self.W_2(hidden)[..., 0]


def pair_loss(D, f, sets, target):
    """E BCE(D(f_i, f_j), target) over {i: indices j} -> scalar; 0 without a pair."""
    pairs = [(i, j) for i, F_i in sets.items() for j in F_i.tolist()]
    if not pairs:
        return sum(p.sum() for p in D.parameters()) * 0
    i, j = torch.tensor(pairs).T
    logit = D(f[i], f[j])
    return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target))


def icd_loss(D, bank, batch, number, generator):
    """Eq. (8): L_icd = E_{i, j in F_i+} BCE(D(f_i, f_j), 1) + E_{i, j in F_i-} BCE(D(f_i, f_j), 0).

    batch   the indices into the bank of the mini-batch's instances i
    number  of instances j of either kind that Eq. (7) draws for each
    ->      scalar"""
    f = bank["feats"]
    F_pos = {}
    F_neg = {}
    for i in batch:
        F_pos[i], F_neg[i] = sample_sets(bank, i, number, generator)
    L_icd = pair_loss(D, f, F_pos, 1.0) + pair_loss(D, f, F_neg, 0.0)
    return L_icd


@torch.no_grad()
def with_side(D, bank):
    """The bank with its instances times their half of the discriminator's W_1, for many videos."""
    _, W_right = D.W_1.weight.chunk(2, 1)
    return bank | {"side": bank["feats"] @ W_right.T}  # (N, hidden)


def sides(D, feats, bank):
    """The two sides of the discriminator's W_1, that of pooled features and that of the bank.

    Each instance is multiplied once, not once a pair; the bank's side may be there already.
    feats  (N, D)
    ->     (N, hidden), (M, hidden)"""
    W_left, _ = D.W_1.weight.chunk(2, 1)
    if "side" not in bank:
        bank = with_side(D, bank)
    return feats @ W_left.T + D.W_1.bias, bank["side"]


def mean_D(D, left, right):
    """The mean of D over the pairs of each row of `left` with all of `right` -> (N,); NaN of none.

    left, right  (N, hidden), (M, hidden), as sides() gives them"""
    means = []
    for part in left.split(64):  # of none: one empty part
        D_ij = torch.sigmoid(D.W_2(F.relu(part[:, None] + right)))  # (64, M, 1)
        means.append(D_ij.mean((1, 2)))
    return torch.cat(means)


@torch.no_grad()
def similarity(D, feats, labels, bank):
    """Eq. (10): s_i = 1 / |F_c| * sum_{f_j in F_c} D(f_i, f_j).

    F_c are all labelled instances of the predicted class c. D is in eval mode.
    feats   (N, D), pooled
    labels  (N,)
    bank    may have been through with_side()
    ->      (N,); NaN where the class has no labelled instance"""
    f, F_all = sides(D, feats, bank)
    s = feats.new_zeros(len(feats))
    for c in labels.unique():
        i = labels == c
        F_c = F_all[bank["labels"] == c]
        s[i] = mean_D(D, f[i], F_c)
    return s


# ---- Not in the paper ---------------------------------------------------------------------------

@torch.no_grad()
def own_minus_other(D, feats, labels, bank):
    """The similarity to the predicted class less the largest to another, in [-1, 1].

    An answer to the paper's future work (Sec. 5): 0 is the middle of every class, so that two
    numbers serve them all. What similarity() takes and gives; 0 is taken off where there is no
    other class."""
    f, F_all = sides(D, feats, bank)
    own = feats.new_full((len(feats),), torch.nan)
    other = feats.new_zeros(len(feats))
    for c in bank["labels"].unique():
        s_c = mean_D(D, f, F_all[bank["labels"] == c])
        i = labels == c
        own[i] = s_c[i]
        other[~i] = torch.maximum(other[~i], s_c[~i])
    return own - other


# ---- The box ICD of Fig. 1 ----------------------------------------------------------------------

def compare(record, D, bank, feats, pool, score):
    """A video's detections with their "similarity" (N,), D in eval mode.

    feats  (T, D), the video's input features
    score  one of SCORES"""
    if score == "relative":
        feats = standardised(feats)
    pooled = pool_instances(feats, record["segments"], pool)
    similarity_of = own_minus_other if score == "relative" else similarity
    return record | {"similarity": similarity_of(D, pooled, record["labels"], bank).cpu()}


def refine(record, theta_drop, theta_mine, switches):
    """What becomes of a video's detections that ALQA selected and compare() compared (Sec. 3.2).

    EAP drops the ambiguous positives, s < theta_drop; MPP mines the potential positives,
    candidates with s > theta_mine. Where s is NaN positives stay and none is mined.
    switches  one of REFINEMENTS
    ->        the record with "status" (N,), an index into STATUS, in the place of "positive\""""
    s = record["similarity"].double()
    positive = record["positive"]
    status = torch.where(positive, KEPT, CANDIDATE)
    if "eap" in switches:
        status[positive & (s < theta_drop)] = DROPPED
    if "mpp" in switches:
        status[~positive & (s > theta_mine)] = MINED
    return {key: value for key, value in record.items() if key != "positive"} | {"status": status}
