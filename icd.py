"""Instance-level Consistency Discriminator, ICD (Sec. 3.2): Eq. (7)-(10).

Input   the detector's input features of labelled instances and of detections, pooled over time.
Output  for each detection its mean similarity to the labelled instances of its class, and what
        becomes of it: ambiguous positives are dropped (EAP), potential positives mined from the
        candidates (MPP).
Detection on test videos does not use the discriminator.
"""
import torch
import torch.nn.functional as F
from torch import nn

# What became of a detection: a positive that stays, one that EAP dropped, a candidate that MPP
# mined, one that stays out.
STATUS = ("kept", "dropped", "mined", "candidate")
KEPT, DROPPED, MINED, CANDIDATE = range(4)
REFINEMENTS = ("none", "eap", "mpp", "eap+mpp")
SCORES = ("absolute", "relative")  # Eq. (10), or own_minus_other()


def mean_of_steps(feats, first, count):
    """The mean of `count` rows of feats (T, D) from row `first` on: two (N,) -> (N, D)."""
    begins = count.cumsum(0) - count  # where all segments stand one behind the other
    segment = torch.repeat_interleave(count)  # 0, 0 .. 1, 1
    steps = torch.arange(len(segment), device=feats.device) + (first - begins)[segment]
    return F.embedding_bag(steps, feats, begins, mode="mean")


def max_of_steps(feats, first, count):
    """The maximum of `count` rows of feats (T, D) from row `first` on: two (N,) -> (N, D).

    Two blocks of 2^k rows cover a segment; all blocks of a size come from those of half of it."""
    pooled = feats[first]
    blocks, size = feats, 1  # blocks[t] is the maximum of the rows t .. t + size - 1
    while size <= len(feats):
        i = ((count >= size) & (count < 2 * size)).nonzero()[:, 0]
        last = first[i] + count[i] - size
        pooled[i] = torch.maximum(blocks[first[i]], blocks[last])
        blocks, size = torch.maximum(blocks[:-size], blocks[size:]), 2 * size
    return pooled


def pool_instances(feats, segments, pool):
    """Input features of segments, pooled over the steps inside each.

    A segment that holds no step takes the nearest one (not given in the paper).
    feats     (T, D)
    segments  (N, 2) in grid steps of feats
    pool      "max" (the paper's) or "mean" (better where standardised features have signs)
    ->        (N, D)"""
    start, end = segments.double().unbind(1)
    final = len(feats) - 1
    first = start.ceil().clamp(min=0)
    count = end.floor().clamp(max=final) - first + 1
    nearest = ((start + end) / 2).round().clamp(0, final)
    first = torch.where(count > 0, first, nearest).long().to(feats.device)
    count = count.clamp(min=1).long().to(feats.device)
    pool_steps = max_of_steps if pool == "max" else mean_of_steps
    return pool_steps(feats, first, count)


def features_of(feats, segments, pool, score):
    """pool_instances(), for relative similarities of features standardised over the video."""
    if score == "relative":
        feats = (feats - feats.mean(0)) / feats.std(0, correction=0).clamp(min=1e-6)
    return pool_instances(feats, segments, pool)


def bank_of(videos, pool, score):
    """The labelled instances of an iterable of {"id", "feats", "segments", "labels"} as one record.

    Instances of one video with identical boundaries share a key, which Eq. (7) reads (THUMOS14
    labels a cliff dive twice, as Diving and as CliffDiving).
    -> {"feats" (N, D), "labels" (N,), "keys" (N,), "videos" N ids}"""
    feats = []
    labels = []
    boundaries = []
    for video in videos:
        feats.append(features_of(video["feats"], video["segments"], pool, score))
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
    """`number` of the columns where a row of `members` (n, N) is True, drawn for each row.

    Where there are fewer each comes again and again.
    -> (n, number), -1 in a row without any"""
    order = torch.rand(members.shape, generator=generator)
    order = order.masked_fill(~members, torch.inf).argsort(1)  # a row's members come first
    count = members.sum(1, keepdim=True)
    again = torch.arange(number) % count.clamp(min=1)  # (n, number)
    return order.gather(1, again).masked_fill(count == 0, -1)


def sample_sets(bank, i, number, generator):
    """Eq. (7): F_i+ = {f_j : c_j = c_i, j != i}, F_i- = {f_j : c_j != c_i}, `number` of each.

    Both are drawn from all labelled instances; "within a mini-batch" may mean fewer. An instance
    with the same boundaries in the same video is in neither set (not given in the paper).
    i    (n,) indices of instances
    ->   two (n, number) of indices j, rows of -1 for an empty set"""
    same_class = bank["labels"][i, None] == bank["labels"]
    other_segment = bank["keys"][i, None] != bank["keys"]
    F_pos = draw(same_class & other_segment, number, generator)
    F_neg = draw(~same_class & other_segment, number, generator)
    return F_pos, F_neg


class Discriminator(nn.Module):
    """Eq. (9): D(a, b) = sigmoid(W_2 relu(W_1 [a; b])), from 2D to 128 to 1.

    W_1 [a; b] = W_a a + W_b b: what is compared with many is multiplied once, not once a pair.
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

    def W_a(self, a):
        """W_a a with the bias: (N, D) -> (N, hidden)."""
        return F.linear(a, self.W_1.weight.chunk(2, 1)[0], self.W_1.bias)

    def W_b(self, b):
        """W_b b: (M, D) -> (M, hidden)."""
        return F.linear(b, self.W_1.weight.chunk(2, 1)[1])

    def logit(self, W_a_a, W_b_b):
        """The logit of D of products that are broadcast, (..., hidden) -> (...)."""
        hidden = self.dropout(F.relu(W_a_a + W_b_b, inplace=True))
        return self.W_2(hidden)[..., 0]

    def forward(self, a, b):
        return self.logit(self.W_a(a), self.W_b(b))

    def mean(self, W_a_a, W_b_b):
        """mean_j D(a_i, b_j) of W_a a (N, hidden) and W_b b (M, hidden) -> (N,); NaN if M is 0."""
        parts = W_a_a.split(16)  # few of the N * M pairs at once, which stay in a CPU's cache
        return torch.cat([self.logit(x[:, None], W_b_b).sigmoid().mean(1) for x in parts])


@torch.no_grad()
def W_b_of(D, bank):
    """W_b b of the labelled instances; train.py computes it once and puts it into the bank."""
    return bank["W_b"] if "W_b" in bank else D.W_b(bank["feats"])


def icd_loss(D, bank, batch, number, generator):
    """Eq. (8): L_icd = E_{i, j in F_i+} BCE(D(f_i, f_j), 1) + E_{i, j in F_i-} BCE(D(f_i, f_j), 0).

    batch   the indices into the bank of the mini-batch's instances i
    number  of instances j of either kind that Eq. (7) draws for each
    ->      scalar"""
    f = bank["feats"]
    i = torch.tensor(batch, dtype=torch.long)
    j = torch.stack(sample_sets(bank, i, number, generator))  # of F_i+ and F_i- (2, n, number)
    drawn, row = j.unique(return_inverse=True)  # each is multiplied once
    logit = D.logit(D.W_a(f[i])[:, None], D.W_b(f[drawn])[row])  # (2, n, number)
    BCE = torch.stack([F.softplus(-logit[0]), F.softplus(logit[1])])  # BCE(D, 1), BCE(D, 0)
    pairs = (j >= 0).to(f.device)
    E_pos, E_neg = (BCE * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
    L_icd = E_pos + E_neg
    return L_icd


@torch.no_grad()
def similarity(D, f, labels, bank):
    """Eq. (10): s_i = 1 / |F_c| * sum_{f_j in F_c} D(f_i, f_j).

    F_c are all labelled instances of the predicted class c. D is in eval mode.
    f       (N, D), pooled features of detections
    labels  (N,)
    ->      (N,); NaN (not given in the paper) where fewer than two instances of the class are
            labelled, or none of another: of such a class D has seen pairs of one kind alone"""
    s = torch.full_like(f[:, 0], torch.nan)
    W_a_f, W_b_bank = D.W_a(f), W_b_of(D, bank)
    for c in labels.unique():
        j = bank["labels"] == c  # f_j in F_c
        if len(bank["keys"][j].unique()) > 1 and not j.all():
            i = labels == c
            s[i] = D.mean(W_a_f[i], W_b_bank[j])
    return s


# ---- Not in the paper ---------------------------------------------------------------------------

@torch.no_grad()
def own_minus_other(D, f, labels, bank):
    """The similarity to the predicted class less the largest to another, in [-1, 1].

    An answer to the paper's future work (Sec. 5): below 0 another class is more alike, whatever
    the class, so that two thresholds serve all. What similarity() takes and gives, but of a class
    with one labelled instance too: its detections are like no class, and mostly stay."""
    own = torch.full_like(f[:, 0], torch.nan)
    other = own.clone()
    W_a_f, W_b_bank = D.W_a(f), W_b_of(D, bank)
    for c in bank["labels"].unique():
        s_c = D.mean(W_a_f, W_b_bank[bank["labels"] == c])
        i = labels == c
        own[i] = s_c[i]
        other[~i] = torch.fmax(other[~i], s_c[~i])
    return own - other


# ---- The box ICD of Fig. 1 ----------------------------------------------------------------------

def compare(record, D, bank, feats, pool, score):
    """A video's detections with their "similarity" (N,), D in eval mode.

    feats  (T, D), the video's input features
    score  one of SCORES"""
    f = features_of(feats, record["segments"], pool, score)
    similarity_of = own_minus_other if score == "relative" else similarity
    return record | {"similarity": similarity_of(D, f, record["labels"], bank).cpu()}


def refine(record, theta_drop, theta_mine, switches):
    """What becomes of a video's detections that ALQA selected and compare() compared (Sec. 3.2).

    EAP drops the ambiguous positives, s < theta_drop; MPP mines the potential positives,
    candidates with s > theta_mine. Where s is NaN positives stay and none is mined.
    switches  one of REFINEMENTS
    ->        the record with "status" (N,) in the place of "positive": an index into STATUS"""
    s = record["similarity"].double()
    positive = record["positive"]
    status = torch.where(positive, KEPT, CANDIDATE)
    if "eap" in switches:
        status[positive & (s < theta_drop)] = DROPPED
    if "mpp" in switches:
        status[~positive & (s > theta_mine)] = MINED
    return {key: value for key, value in record.items() if key != "positive"} | {"status": status}
