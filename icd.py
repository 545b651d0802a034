"""Instance-level Consistency Discriminator, ICD (Sec. 3.2): Eq. (7)-(10).

Input   the raw input features of labelled instances and of pseudo labels, pooled over time: (N, D).
Output  for each pseudo label, its mean similarity to the labelled instances of its class, and what becomes of it: ambiguous
        positives are dropped (EAP), potential positives mined from the candidates (MPP).
The discriminator is thrown away after training.
"""
import torch
import torch.nn.functional as F
from torch import nn

# What became of a pseudo label: a positive that stays, a positive that EAP dropped, a candidate that MPP mined, a candidate
# that stays out.
STATUS = ("kept", "dropped", "mined", "candidate")
KEPT, DROPPED, MINED, CANDIDATE = range(4)
REFINEMENTS = ("none", "eap", "mpp", "eap+mpp")


def pool_instances(feats, segments, pool):
    """Pooled input features of segments: feats (T, D), segments (N, 2) in grid steps of feats -> (N, D).

    Steps inside the segment; a segment that holds none takes the nearest step (not given in the paper). `pool` is "max"
    (the paper's) or "mean" (better where standardised features have signs). An unknown pool raises KeyError."""
    reduce = {"max": lambda x: x.amax(0), "mean": lambda x: x.mean(0)}[pool]
    rows = []
    for start, end in segments.tolist():
        middle = min(max(round((start + end) / 2), 0), len(feats) - 1)
        first, last = max(-int(-start // 1), 0), min(int(end // 1), len(feats) - 1)  # ceil(start), floor(end)
        rows.append(reduce(feats[first:last + 1] if first <= last else feats[middle:middle + 1]))
    return torch.stack(rows) if rows else feats.new_zeros(0, feats.shape[1])


def bank_of(videos, pool):
    """The labelled instances as one record: {"feats": (N, D), "labels": (N,), "keys": (N,), "videos": N ids}.

    videos: an iterable of {"id", "feats", "segments", "labels"}, one or more; instances of one video with identical boundaries
    share a key, which Eq. (7) reads (THUMOS14 labels a cliff dive twice, as Diving and as CliffDiving)."""
    feats, labels, keys, names, seen = [], [], [], [], {}
    for video in videos:
        feats.append(pool_instances(video["feats"], video["segments"], pool))
        labels.append(video["labels"])
        names += [video["id"]] * len(video["labels"])
        keys += [seen.setdefault((video["id"], *segment), len(seen)) for segment in video["segments"].tolist()]
    return {"feats": torch.cat(feats), "labels": torch.cat(labels), "keys": torch.tensor(keys, dtype=torch.long), "videos": names}


def sample_sets(bank, i, number, generator):
    """Eq. (7): F_i+ = {f_j : c_j = c_i, j != i}, F_i- = {f_j : c_j != c_i}, `number` of each, drawn from all labelled instances.

    Returns two index tensors, `number` long (with replacement when there are fewer) or empty. An instance with the same
    boundaries in the same video is in neither set."""
    same_class, other_segment = bank["labels"] == bank["labels"][i], bank["keys"] != bank["keys"][i]
    sets = []
    for members in (same_class & other_segment, ~same_class & other_segment):
        j = members.nonzero()[:, 0]
        if 0 < len(j) < number:
            j = j[torch.randint(len(j), (number,), generator=generator)]
        sets.append(j[torch.randperm(len(j), generator=generator)[:number]])
    F_pos, F_neg = sets
    return F_pos, F_neg


class Discriminator(nn.Module):
    """Eq. (9): D(a, b) = sigmoid(W_2 relu(W_1 [a; b])), from 2D to 128 to 1; a and b (N, D) pooled features -> (N,).

    Returned as the logit of D. Dropout and Xavier initialisation are not given in the paper."""

    def __init__(self, dim, hidden=128, dropout=0.5):
        super().__init__()
        self.W_1, self.W_2 = nn.Linear(2 * dim, hidden), nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.W_1, self.W_2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, a, b):
        return self.W_2(self.dropout(F.relu(self.W_1(torch.cat([a, b], -1)))))[..., 0]


def icd_loss(D, bank, batch, number, generator):
    """Eq. (8): L_icd = E_{i, j in F_i+} BCE(D(f_i, f_j), 1) + E_{i, j in F_i-} BCE(D(f_i, f_j), 0).

    `batch` holds the indices into the bank of the mini-batch's instances i; Eq. (7) draws `number` j of either kind for each.
    Returns a scalar; a kind without a pair counts 0."""
    sets = [(i, *sample_sets(bank, i, number, generator)) for i in batch]
    f, L_icd = bank["feats"], sum(p.sum() for p in D.parameters()) * 0
    for kind, target in ((1, 1.0), (2, 0.0)):
        i = torch.tensor([pair[0] for pair in sets for _ in pair[kind]], dtype=torch.long)
        if len(i):
            logit = D(f[i], f[torch.cat([pair[kind] for pair in sets])])
            L_icd = L_icd + F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target))
    return L_icd


@torch.no_grad()
def similarity(D, feats, labels, bank):
    """Eq. (10): s_i = 1 / |F_c| * sum_{f_j in F_c} D(f_i, f_j), F_c = all labelled instances of the predicted class c.

    feats (N, D) pooled, labels (N,) -> (N,); NaN where the class has no labelled instance."""
    s = torch.full((len(feats),), torch.nan, device=feats.device)
    for c in labels.unique().tolist():
        F_c, predicted = bank["feats"][(bank["labels"] == c).to(feats.device)], labels == c
        if len(F_c):
            f = feats[predicted]
            s[predicted] = torch.stack([torch.sigmoid(D(f_i.expand_as(F_c), F_c)).mean() for f_i in f])
    return s


@torch.no_grad()
def refine_pseudo_labels(record, D, bank, feats, pool, theta_drop, theta_mine, switches):
    """Sec. 3.2: what becomes of a video's detections that ALQA selected. feats (T, D) are the video's raw input features.

    1) Score: "similarity" (N,) of each to the labelled instances of its class, NaN where there are none. 2) EAP drops the
    ambiguous positives, s < theta_drop. 3) MPP mines the potential positives, candidates with s > theta_mine. Where s is NaN
    positives stay and none is mined. `switches` is one of REFINEMENTS. Adds "similarity" and "status" (N,), an index into
    STATUS, to the record in the place of "positive"."""
    s = similarity(D, pool_instances(feats, record["segments"], pool), record["labels"], bank).cpu()
    positive = record.pop("positive")
    status = torch.where(positive, KEPT, CANDIDATE)
    if "eap" in switches:
        status[positive & (s < theta_drop)] = DROPPED
    if "mpp" in switches:
        status[~positive & (s > theta_mine)] = MINED
    record |= {"similarity": s, "status": status}
