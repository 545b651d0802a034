"""Action-aware Contrastive Pre-training, ACP (Sec. 3.3): Eq. (11).

Input   the detector's pyramid and the raw input features of a batch; after pre-training also segments and labels.
Output  L_acp = L_coarse + L_fine, a scalar with gradient into the backbone and neck; no projection head.
"""
import torch
import torch.nn.functional as F

ACP = ("none", "coarse", "fine", "coarse+fine")


def sample_steps(lengths, m, generator):
    """Cut each video's valid steps into m equal parts and draw one step from each: lengths B -> (B, m) long.

    A video of fewer than m steps gives some of them more than once."""
    cuts = torch.tensor(lengths, dtype=torch.float64)[:, None] * (torch.arange(m) + torch.rand(len(lengths), m, generator=generator)) / m
    return torch.minimum(cuts.long(), torch.tensor(lengths)[:, None] - 1)


def representation(levels, masks, steps):
    """The pyramid at `steps`: every level upsampled (linear) to T and concatenated (Sec. 3.3), read at steps (B, m) only.

    levels [(B, T_l, C)], masks [(B, T_l)] -> (B, m, L * C). Interpolation stops at a video's last valid step, so padding does
    not enter."""
    columns = []
    for level, (x, mask) in enumerate(zip(levels, masks)):
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
        at = ((steps + 0.5) / 2 ** level - 0.5).clamp(min=0)
        before = torch.minimum(at.floor().long(), last)
        after = torch.minimum(before + 1, last)
        weight = (at - before).clamp(max=1)[..., None]
        pick = lambda i, x=x: x.float().gather(1, i[..., None].expand(-1, -1, x.shape[-1]))
        columns.append(torch.lerp(pick(before), pick(after), weight))
    return torch.cat(columns, -1)


@torch.no_grad()
def kmeans(x, k, generator, restarts=10, iterations=100):
    """K-means with k-means++ starts: x (N, D) -> cluster of each row (N,), of the best of `restarts` runs.

    Seeded by `generator`. All restarts run side by side. A cluster that loses its last row restarts at the row farthest from
    its centre; fewer than k distinct rows leave clusters empty."""
    x = x.float()
    N, R = len(x), restarts
    if N == 0:
        return torch.zeros(0, dtype=torch.long, device=x.device)
    draw = lambda *shape: torch.rand(*shape, generator=generator).to(x.device)
    square = (x ** 2).sum(-1)
    distance = lambda c: (square[:, None] - 2 * x @ c.transpose(-1, -2) + (c ** 2).sum(-1)[..., None, :]).clamp(min=0)  # (R, N, k)
    centres = x[(draw(R) * N).long()][:, None]  # (R, 1, D)
    for _ in range(k - 1):
        nearest = distance(centres).amin(-1).cumsum(-1)  # (R, N)
        row = torch.searchsorted(nearest, draw(R, 1) * nearest[:, -1:], right=True).clamp(max=N - 1)
        centres = torch.cat([centres, x[row]], 1)
    cluster = None
    for _ in range(iterations):
        gap, new = distance(centres).min(-1)  # (R, N)
        if cluster is not None and torch.equal(new, cluster):
            break
        cluster = new
        member = F.one_hot(cluster, k).float()  # (R, N, k)
        count = member.sum(1)  # (R, k)
        centres = (member.transpose(1, 2) @ x) / count.clamp(min=1)[..., None]
        farthest = x[gap.argmax(-1)][:, None].expand_as(centres)
        centres = torch.where(count[..., None] > 0, centres, farthest)
    return cluster[gap.sum(-1).argmin()]


def info_nce(z, labels, tau):
    """Eq. (11): L = -mean_i mean_{p in P_i} log[ exp(z_i.z_p / tau) / (exp(z_i.z_p / tau) + sum_{n in N_i} exp(z_i.z_n / tau)) ].

    z (N, C), normalised here, labels (N,): P_i shares i's label (without i), N_i does not -> scalar. Anchors without a
    positive or a negative are skipped; with none left the loss is 0."""
    z = F.normalize(z.float(), dim=-1)
    sim = z @ z.T / tau
    same = labels[:, None] == labels
    P = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    anchors = P.any(1) & ~same.all(1)
    if not anchors.any():
        return z.sum() * 0
    sim, P, same = sim[anchors], P[anchors], same[anchors]
    negatives = sim.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    log_ratio = sim - torch.logaddexp(sim, negatives)
    return -((log_ratio * P).sum(1) / P.sum(1)).mean()


def step_classes(steps, segments, labels, rejected, num_classes):
    """The class of each step (m,) -> (m,): of the shortest segment that covers it, else -1 (unknown) inside a rejected segment,
    else background = num_classes."""
    covers = lambda s: (steps[:, None] >= s[:, 0]) & (steps[:, None] <= s[:, 1])  # (m, N)
    classes = torch.where(covers(rejected).any(1), -1, num_classes)
    if len(segments) == 0:
        return classes
    length, index = torch.where(covers(segments), segments[:, 1] - segments[:, 0], torch.inf).min(1)
    return torch.where(length < torch.inf, labels[index], classes)


def acp_loss(levels, masks, feats, instances, num_classes, kinds, m, clusters, tau, generator, restarts=10, gather=lambda x: x,
             rank=0, number=1):
    """L_acp = L_coarse + L_fine of a batch -> scalar.

    feats (B, T, D) are the raw input features. Coarse contrasts the steps within each video, fine those of all videos.
    `instances` None (pre-training): the labels are K-means clusters of the raw features, 2 a video and `clusters` a batch.
    Otherwise B records {"segments", "labels", "rejected"} (ground truth or pseudo labels): coarse is inside or outside an action,
    fine the class with background as one more; steps inside what was detected and rejected are left out, and so is a video
    without an instance. `kinds` is one of ACP. Where `number` processes share a batch, this one, `rank`, having every number-th
    video, `gather` joins the rows of all: each computes the same loss, with gradient into its own videos."""
    lengths = gather(masks[0].sum(1)).tolist()
    steps = sample_steps(lengths, m, generator)[rank::number].to(feats.device)  # (b, m), b videos of B
    z, B = gather(representation(levels, masks, steps)), len(lengths)  # (B, m, L * C)
    if instances is None:
        x = gather(feats.gather(1, steps[..., None].expand(-1, -1, feats.shape[-1])))  # (B, m, D)
        coarse = [kmeans(x_b, 2, generator, restarts) for x_b in x] if "coarse" in kinds else None
        fine = kmeans(x.flatten(0, 1), clusters, generator, restarts) if "fine" in kinds else None
    else:
        fine = torch.stack([step_classes(s, r["segments"], r["labels"], r["rejected"], num_classes) for s, r in zip(steps, instances)])
        fine[[len(r["labels"]) == 0 for r in instances]] = -1
        fine = gather(fine)  # (B, m)
        coarse, fine = torch.where(fine < 0, fine, (fine < num_classes).long()), fine.flatten()
    L_acp = z.sum() * 0
    if "coarse" in kinds:
        L_acp = L_acp + sum(info_nce(z_b[c_b >= 0], c_b[c_b >= 0], tau) for z_b, c_b in zip(z, coarse)) / B
    if "fine" in kinds:
        L_acp = L_acp + info_nce(z.flatten(0, 1)[fine >= 0], fine[fine >= 0], tau)
    return L_acp
