"""Action-aware Contrastive Pre-training, ACP (Sec. 3.3): Eq. (11); acp_loss() is Fig. S1.

Input   the detector's pyramid and input features of a batch; after pre-training also
        segments and labels.
Output  L_acp = L_coarse + L_fine, a scalar with gradient into the backbone and neck; no
        projection head.
"""
import torch
import torch.nn.functional as F

from model import steps_inside
from plumbing.processes import draws_of_batch, rows_of_all

ACP = ("none", "coarse", "fine", "coarse+fine")


def sample_steps(lengths, m, generator):
    """Cut each video's valid steps into m equal parts and draw one step from each.

    A video of fewer than m steps gives some of them more than once.
    lengths  (B,) integers, on the CPU
    ->       (B, m) integers"""
    draws = draws_of_batch((len(lengths), m), generator=generator).double()
    return (lengths[:, None] * (torch.arange(m) + draws) / m).long()


def rows_at(x, steps):
    """The rows of x (B, T, C) at steps (B, m) -> (B, m, C)."""
    return torch.take_along_dim(x, steps[..., None], 1)


def representation(levels, masks, steps):
    """The pyramid, every level upsampled (linear) to T and concatenated, read at `steps` only.

    Interpolation stops at a video's last valid step, so padding does not enter.
    levels  [(B, T_l, C)], masks [(B, T_l)]
    steps   (B, m)
    ->      (B, m, L * C)"""
    parts = []
    for level, (x, mask) in enumerate(zip(levels, masks)):
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
        position = torch.minimum(steps / 2 ** level, last)  # where the level's points lie
        before = position.long()
        after = torch.minimum(before + 1, last)
        weight = (position - before)[..., None]
        parts.append(torch.lerp(rows_at(x, before).float(), rows_at(x, after).float(), weight))
    return torch.cat(parts, -1)


def squared_distance(x, centres):
    """x (N, D), centres (R, k, D) -> (R, N, k)."""
    x_square = (x ** 2).sum(-1)[:, None]
    c_square = (centres ** 2).sum(-1)[..., None, :]
    return (x_square - 2 * x @ centres.transpose(-1, -2) + c_square).clamp(min=0)


def kmeans_plus_plus(x, k, generator, restarts):
    """Starting centres of K-means++, R = restarts side by side: x (N, D) -> (R, k, D)."""
    N = len(x)
    first = (torch.rand(restarts, generator=generator).to(x.device) * N).long()
    centres = x[first][:, None]
    for _ in range(k - 1):
        chance = squared_distance(x, centres).amin(-1).cumsum(-1)  # (R, N)
        draw = torch.rand(restarts, 1, generator=generator).to(x.device) * chance[:, -1:]
        row = torch.searchsorted(chance, draw, right=True).clamp(max=N - 1)  # (R, 1)
        centres = torch.cat([centres, x[row]], 1)
    return centres


@torch.no_grad()
def kmeans(x, k, generator, restarts, iterations=100):
    """K-means from K-means++ starts: the best of `restarts` runs, which go side by side.

    Centred first: squared distances of rows far from 0 would cancel.
    A cluster that loses its last row restarts at the row farthest from its centre; fewer than k
    distinct rows leave clusters empty.
    x   (N, D)
    ->  the cluster of each row (N,)"""
    x = x.float()
    if len(x) == 0:
        return x.new_zeros(0).long()
    x = x - x.mean(0)
    centres = kmeans_plus_plus(x, k, generator, restarts)  # (R, k, D)
    cluster = None
    for _ in range(iterations):
        gap, nearest = squared_distance(x, centres).min(-1)  # (R, N)
        if cluster is not None and torch.equal(nearest, cluster):
            break
        cluster = nearest
        member = F.one_hot(cluster, k).float()  # (R, N, k)
        count = member.sum(1)[..., None]  # (R, k, 1)
        mean = (member.transpose(1, 2) @ x) / count.clamp(min=1)
        farthest = x[gap.argmax(-1)][:, None]  # (R, 1, D)
        centres = torch.where(count > 0, mean, farthest)
    return cluster[gap.sum(-1).argmin()]


def cluster_labels(x, s, generator):
    """Labels of pre-training: clusters of input features, 2 a video and s.acp_clusters a batch.

    x   (B, m, D)
    ->  coarse, fine, each (B, m), or None where the settings do not ask for it"""
    coarse = fine = None
    if "coarse" in s.acp:
        coarse = torch.stack([kmeans(x_b, 2, generator, s.acp_restarts) for x_b in x])
    if "fine" in s.acp:
        fine = kmeans(x.flatten(0, 1), s.acp_clusters, generator, s.acp_restarts)
    return coarse, fine


def step_classes(steps, segments, labels, rejected, num_classes):
    """The class of each step (m,) -> (m,): of the shortest segment (N, 2) that covers it (ours).

    Else -1, unknown, inside a rejected segment; else background, num_classes."""
    classes = torch.where(steps_inside(rejected, steps).any(1), -1, num_classes)
    if len(segments) == 0:
        return classes
    length = segments[:, 1] - segments[:, 0]
    shortest, index = torch.where(steps_inside(segments, steps), length, torch.inf).min(1)
    return torch.where(shortest < torch.inf, labels[index], classes)


def action_labels(steps, instances, num_classes):
    """Labels after pre-training, from B records {"segments", "labels", "rejected"}.

    Coarse is inside (1) or outside (0) an action, fine the class with background as one more; -1
    leaves out a step inside what was detected and rejected.
    steps  (B, m)
    ->     coarse, fine, each (B, m)"""
    fine = torch.stack([
        step_classes(steps_b, r["segments"], r["labels"], r["rejected"], num_classes)
        for steps_b, r in zip(steps, instances)])
    coarse = torch.where(fine < 0, fine, (fine < num_classes).long())
    return coarse, fine


def info_nce(z, labels, tau):
    """Eq. (11): L = -mean_i mean_{p in P_i} log[ e(i, p) / (e(i, p) + sum_{n in N_i} e(i, n)) ].

    e(i, j) = exp(z_i.z_j / tau), P_i shares i's label (without i), N_i does not. Anchors without a
    positive or a negative are skipped; with none left the loss is 0 (not given in the paper).
    z       (..., n, C), normalised here
    labels  (..., n); a step of label -1 is left out
    ->      (...)"""
    z = F.normalize(z.float(), dim=-1)
    sim = z @ z.mT / tau  # (..., n, n)
    known = labels >= 0
    known = known[..., None] & known[..., None, :]
    same = labels[..., None] == labels[..., None, :]
    itself = torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
    P = known & same & ~itself
    N = known & ~same
    anchors = P.any(-1) & N.any(-1)
    log_negatives = sim.masked_fill(~N, -torch.inf).logsumexp(-1, keepdim=True)
    log_ratio = sim - torch.logaddexp(sim, log_negatives)
    L_i = -(log_ratio * P).sum(-1) / P.sum(-1).clamp(min=1)
    return (L_i * anchors).sum(-1) / anchors.sum(-1).clamp(min=1)


def acp_loss(pyramid, feats, instances, num_classes, s, generator):
    """L_acp = L_coarse + L_fine of a batch, the boxes of Fig. S1.

    The steps are drawn first, so that the pyramid is upsampled only there.
    Coarse contrasts the steps within each video, fine those of all videos. Where many processes
    share a batch (rows_of_all), each computes the same loss, with gradient into its own videos.
    pyramid    (levels, masks), as model.Detector has them
    feats      (B, T, D), the input features
    instances  None in pre-training, else B records, ground truth or pseudo labels
    s          the settings
    ->         scalar"""
    levels, masks = pyramid
    # 1) A step from each part of each video.
    lengths = masks[0].sum(1).cpu()
    steps = sample_steps(lengths, s.acp_steps, generator).to(feats.device)
    # 2) The representation there.
    z = rows_of_all(representation(levels, masks, steps))  # (B, m, L * C)
    # 3) Coarse and fine labels: clusters of the input features, or the instances' classes.
    if instances is None:
        coarse, fine = cluster_labels(rows_of_all(rows_at(feats, steps)), s, generator)
    else:
        coarse, fine = map(rows_of_all, action_labels(steps, instances, num_classes))
    # 4) The contrasts.
    L_coarse = L_fine = 0
    if "coarse" in s.acp:
        L_coarse = info_nce(z, coarse, s.acp_tau).mean()
    if "fine" in s.acp:
        L_fine = info_nce(z.flatten(0, 1), fine.flatten(), s.acp_tau)
    L_acp = L_coarse + L_fine
    return L_acp
