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
BOUNDS = ("fixed", "adaptive")


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


def split_in_three(s):
    """The two bounds that cut similarities s (N,) into three groups of least squared error (Otsu 1979 with three classes).

    Returns (lower, upper), each midway between two neighbours; (0, 1), which drop and mine nothing, where s has fewer than three
    distinct values."""
    x = s.double().sort().values
    N, total = len(x), F.pad(x.cumsum(0), (1, 0))  # of the first n
    if len(x.unique()) < 3:
        return 0.0, 1.0
    best = (-torch.inf, 0, 0)
    for first in range(1, N - 1):  # where the second group begins, then the third
        last = torch.arange(first + 1, N)
        parts = ((first, total[first]), (last - first, total[last] - total[first]), (N - last, total[-1] - total[last]))
        explained, at = sum(sums ** 2 / sizes for sizes, sums in parts).max(0)
        best = max(best, (float(explained), first, int(last[at])))
    return tuple(float(x[i - 1:i + 1].mean()) for i in best[1:])


@torch.no_grad()
def compare(record, D, bank, feats, pool):
    """Add the "similarity" (N,) to a video's detections, NaN for a class without labelled instances; feats (T, D) are the video's raw
    input features."""
    record["similarity"] = similarity(D, pool_instances(feats, record["segments"], pool), record["labels"], bank).cpu()


def refine_pseudo_labels(records, theta_drop, theta_mine, switches, bounds):
    """Sec. 3.2: what becomes of the detections of all videos that ALQA selected and compare() compared.

    EAP drops the ambiguous positives, s < theta_drop; MPP mines the potential positives, candidates with s > theta_mine. Where s
    is NaN positives stay and none is mined. `switches` is one of REFINEMENTS. `bounds` "adaptive" answers the paper's future work
    (Sec. 5): each class has its own two thresholds, where split_in_three() cuts its similarities. Puts "status" (N,), an index
    into STATUS, in the place of "positive"."""
    labels, s = (torch.cat([r[key] for r in records]) if records else torch.zeros(0) for key in ("labels", "similarity"))
    split = {c: split_in_three(s[(labels == c) & ~s.isnan()]) for c in labels.unique().tolist()} if bounds == "adaptive" else {}
    for r in records:
        pair = torch.tensor([split.get(c, (theta_drop, theta_mine)) for c in r["labels"].tolist()], dtype=torch.float64).reshape(-1, 2)
        positive = r.pop("positive")
        r["status"] = torch.where(positive, KEPT, CANDIDATE)
        if "eap" in switches:
            r["status"][positive & (r["similarity"].double() < pair[:, 0])] = DROPPED
        if "mpp" in switches:
            r["status"][~positive & (r["similarity"].double() > pair[:, 1])] = MINED
