"""APL, adaptive pseudo-label learning: the settings, the three stages and Eq. (12).

    python train.py                                       toy data, all three stages, a table of mAP
    python train.py --dataset thumos --ratio 0.1
    python train.py --dataset my.json --features DIR --stride 25 --frames 50 --out runs/my
    torchrun --nproc_per_node=4 train.py ...              one process a device: a batch of 4 * --batch videos

Stage 1 pre-trains the backbone with ACP on all training videos, no labels read. Stage 2 trains the detector and ICD on the
labelled videos. Stage 3 makes pseudo labels (ALQA selects, ICD refines) and trains on labelled and unlabelled videos.
"""
import argparse
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import acp
import alqa
import evaluate
import icd
import model
from acp import ACP
from alqa import SCOPES, SOFT_LABELS, THRESHOLDS
from data import BadInput, ahead, blind, crop_segments, load_dataset, load_item, training_batches
from icd import BOUNDS, REFINEMENTS
from model import BRANCHES

STAGES = ("pretrain", "supervised", "joint")
AFTER = ("none", "labelled", "labelled+unlabelled")  # the rows of Tab. S4


# ---- Settings -------------------------------------------------------------------------------------------------------

RANGES = {"positive": (1e-12, 1e12), "not negative": (0, 1e12), "a share": (0, 1), "a share below 1": (0, 0.999), "finite": (-1e12, 1e12)}


def of(default, comment, allowed="not negative"):
    """A setting: its default, its comment (also the command line's help), and what it may be: one of RANGES, or a tuple of names."""
    return field(default=default, metadata={"comment": comment, "allowed": allowed})


@dataclass(frozen=True)
class Settings:
    """Every number that the method depends on. [S] the paper states it, [J] not given in the paper, [A] ActionFormer's."""
    # data
    dataset: str = of("toy", "toy, thumos, activitynet, epic-verb, epic-noun, or the path of an annotation JSON")
    root: str = of("", "folder of a published dataset, in ActionFormer's layout (default data/thumos and so on)")
    annotations: str = of("", "annotation file, in place of the layout's")
    features: str = of("", "feature folder, in place of the layout's (a JSON's default: the folder features beside it)")
    prefix: str = of("", "what stands before a video's id in its feature file's name")
    extension: str = of(".npy", "what stands after it")
    feature_key: str = of("feats", "name of the array in .npz files")
    stride: float = of(1.0, "frames between two features", "positive")
    frames: float = of(1.0, "frames that a feature sees")
    fps: float = of(0.0, "frames a second; 0: from the annotation")
    train_subset: str = of("training", "subset of the training videos, in any letter case")
    test_subset: str = of("validation", "subset of the test videos")
    bad_segments: str = of("error", "what a segment that is empty or outside its video does", ("error", "skip"))
    resize: int = of(0, "resize every video to this number of steps; 0: keep its length")
    standardize: bool = of(True, "standardise the input over all training videos [J]")
    ratio: float = of(0.1, "share of labelled training videos [S: 0.1, 0.2, 0.4, 0.6]", "a share")
    split: str = of("uniform", "uniform, stratified, or a file of labelled ids")
    seed: int = of(0, "seed of everything: split, weights, batches, toy data")
    max_steps: int = of(2304, "longest crop in training, in steps [A]", "positive")
    crop_min: float = of(0.9, "shortest crop, as a share of the video [A]", "a share")
    crop_keep: float = of(0.5, "share of a segment that a crop must hold to keep it [A]", "a share")
    crop_tries: int = of(10, "windows tried for one that holds an action of a labelled video [J]", "positive")
    # detector
    channels: int = of(512, "width C [A]", "positive")
    heads: int = of(4, "attention heads H [A]", "positive")
    windows: str = of("19", "attention window of all levels, or one a level with commas; 0: the whole sequence [A]")
    ranges: str = of("0:4,4:8,8:16,16:32,32:64,64:inf", "offsets that each level regresses, in grid steps [A]")
    stem: int = of(2, "transformer blocks at full length [A]")
    drop_path: float = of(0.1, "stochastic depth [A]", "a share below 1")
    position: bool = of(False, "add the absolute position [A: ActivityNet]")
    radius: float = of(1.5, "centre sampling, in strides [A]", "positive")
    offset_bias: float = of(1.0, "start of the offsets, in strides: from 0 those of one side may die in the ReLU [J; A: 0]", "finite")
    # ALQA
    alqa: str = of("tiou+tnd", "quality branches [S]; none: plain ActionFormer", BRANCHES)
    tnd_bias: float = of(-2.0, "start of the tND branch's bias, which parts it from the tIoU branch [J]", "finite")
    quality_form: str = of("bce", "loss of Eq. (3) [S]", ("bce", "kl"))
    soft_label: str = of("computed", "tIoU and tND of the soft label Y: of the regressed segments, or the branches' [J]", SOFT_LABELS)
    eps: float = of(1e-6, "least reliability P_tiou - P_tnd in Eq. (4) and (5) [J]")
    beta: float = of(2.0, "focusing exponent of Eq. (5) [J]")
    focal_alpha: float = of(0.25, "focal loss without quality branches [A]")
    focal_gamma: float = of(2.0, "focal loss without quality branches [A]")
    theta_l: float = of(0.15, "joint scores below are dropped, Eq. (6) [S]", "a share")
    threshold: str = of("mean+std", "theta_h of Eq. (6) [J]; fixed: the paper's baseline", THRESHOLDS)
    theta_fixed: float = of(0.3, "theta_h of the fixed threshold [S]", "a share")
    repeat: float = of(0.5, "tIoU with a better pseudo label of the class, over which one is a repeat and removed; 1: none [J]", "a share")
    exclusive: bool = of(False, "one of another class is a repeat too, if no labelled instances of two classes overlap so [J]")
    rerank: bool = of(False, "rerank by the spread of overlapping boundaries, as NPL [53] does, reconstructed (Table 1)")
    scope: str = of("video", "what theta_h's statistics are over [J]", SCOPES)
    # ICD
    icd: str = of("eap+mpp", "drop ambiguous positives (eap), mine potential ones (mpp) [S]", REFINEMENTS)
    theta_drop: float = of(0.3, "positives of a smaller similarity are dropped [S]", "a share")
    theta_mine: float = of(0.7, "candidates of a larger similarity are mined [S]", "a share")
    icd_bounds: str = of("fixed", "adaptive: thresholds of each class from its similarities, beyond the paper", BOUNDS)
    icd_pairs: int = of(10, "instances of the same class and of others, Eq. (7) [S]", "positive")
    icd_pool: str = of("max", "pooling over time [S: max]", ("max", "mean"))
    icd_hidden: int = of(128, "hidden width of Eq. (9) [S, by Tab. S6]", "positive")
    icd_dropout: float = of(0.5, "dropout of Eq. (9) [J]", "a share")
    icd_lr: float = of(1e-3, "learning rate of ICD's Adam [J]", "positive")
    icd_steps: int = of(0, "steps that ICD trains, from the start of stage 2; 0: all of them [J]")
    # ACP
    acp: str = of("coarse+fine", "contrasts of Eq. (11) [S]; none leaves stage 1 out", ACP)
    acp_after: str = of("labelled+unlabelled", "where L_acp goes on after pre-training (Tab. S4) [S]", AFTER)
    acp_steps: int = of(40, "steps m drawn from a video [J]", "positive")
    acp_clusters: int = of(4, "clusters of the fine contrast in a batch [S: 4 THUMOS14, 2 ActivityNet]", "positive")
    acp_restarts: int = of(10, "restarts of K-means [J]", "positive")
    acp_tau: float = of(0.1, "temperature tau [J]", "positive")
    # loss, Eq. (12)
    lambda_u: float = of(2.0, "weight of L_unsup [S]")
    lambda_reg: float = of(1.0, "weight of L_diou [S: 1 THUMOS14, 2 ActivityNet, as [62]]")
    lambda_quality: float = of(0.1, "weight of L_quality [S]")
    lambda_acp: float = of(0.1, "weight of L_acp [S]")
    t_plus: float = of(100.0, "start of the running mean T+ [A]", "positive")
    t_plus_momentum: float = of(0.9, "momentum of T+ [A]", "a share")
    rejected: str = of("masked", "detected and rejected instances in stage 3 [J]", ("masked", "background"))
    # training
    mixup: float = of(0.0, "MixUp of the labelled videos of a batch (Table 1): alpha of Beta(alpha, alpha); 0: none")
    batch: int = of(2, "videos a step and process; in stage 3 as many labelled and as many unlabelled [S]", "positive")
    length_noise: float = of(0.3, "spread of the noise on log length by which videos are sorted into batches [J]")
    lr: float = of(1e-4, "learning rate of AdamW, cosine decay [S]", "positive")
    weight_decay: float = of(1e-4, "[S]")
    warmup: float = of(0.14, "linear warm-up, as a share of a stage: 5 of 35 epochs [J]", "a share")
    clip: float = of(1.0, "gradient norm [J]", "positive")
    pretrain_epochs: int = of(15, "stage 1 [S]")
    supervised_epochs: int = of(35, "stage 2, warm-up included [J]", "positive")
    supervised_steps: int = of(1500, "stage 2 has at least as many steps [J]")
    joint_epochs: int = of(40, "stage 3 [S: 40 THUMOS14, 15 ActivityNet]")
    refresh: int = of(0, "epochs after which pseudo labels are made anew; 0: once, after stage 2 [J]")
    pseudo_weights: str = of("raw", "weights that make the pseudo labels [J]", ("raw", "ema"))
    ema: float = of(0.999, "decay of the averaged weights, at most (1 + t) / (10 + t) [J]", "a share")
    # detection
    pre_nms: int = of(2000, "(point, class) pairs before Soft-NMS [A]", "positive")
    min_score: float = of(0.001, "least joint score, before and in Soft-NMS [A]")
    min_length: float = of(0.05, "least length of a segment, in steps [A]")
    nms_sigma: float = of(0.5, "sigma of Soft-NMS [A]", "positive")
    nms_agnostic: bool = of(False, "Soft-NMS over all classes at once [A: ActivityNet]")
    max_detections: int = of(200, "detections kept a video [A]", "positive")
    tiou: str = of("0.3:0.7:0.1", "thresholds of mAP [S]")
    weights: str = of("ema", "weights that are reported first [J]", ("ema", "raw"))
    # run
    out: str = of("", "folder of everything that the run writes (default runs/<dataset>)")
    stage: str = of("all", "last stage; supervised: ActF* of Table 1 with --alqa none --acp none", ("all", *STAGES[:2]))
    start: str = of("", "checkpoint of a finished stage 1 or 2 to go on from")
    resume: bool = of(False, "go on from the checkpoint in --out, if there is one")
    audit: bool = of(False, "report the pseudo labels' quality; reads hidden labels for this only")
    precision: str = of("auto", "auto: bfloat16 where the hardware multiplies it fast", ("auto", "float32", "bfloat16"))
    device: str = of("auto", "auto, cpu, cuda, ...")
    log_every: int = of(20, "steps between two log lines", "positive")

    def __post_init__(self):
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if isinstance(allowed, tuple) and value not in allowed:
                raise BadInput(f"setting {f.name} must be one of {', '.join(allowed)}, not {value!r}")
            if f.type in (int, float) and not RANGES[allowed][0] <= value <= RANGES[allowed][1]:
                raise BadInput(f"setting {f.name} must be {allowed}, but is {value}")
        if self.mixup and self.acp != "none" and self.acp_after != "none":
            raise BadInput("setting mixup leaves no video whose steps have one class each: it needs acp or acp_after none")
        if self.mixup and self.batch % 2:
            raise BadInput(f"setting mixup pairs the videos of a batch: setting batch must be even, but is {self.batch}")
        if self.rerank and self.repeat == 1:
            raise BadInput("setting rerank looks at detections whose tIoU is over the setting repeat, which must be below 1")
        evaluate.parse_tious(self.tiou)


# What a dataset changes in the settings (as the public ActionFormer has it); the command line changes these in turn.
PUBLISHED = {"bad_segments": "skip", "standardize": False}
EPIC = PUBLISHED | {
    "root": "data/epic_kitchens", "extension": ".npz", "stride": 16.0, "frames": 32.0, "fps": 30.0, "windows": "9",
    "ranges": "0:4,2:8,4:16,8:32,16:64,32:inf", "t_plus": 250.0, "nms_sigma": 0.4, "pre_nms": 5000, "max_detections": 2000,
    "tiou": "0.1:0.5:0.1"}
SMALL = {"channels": 128, "windows": "9", "lr": 1e-3, "supervised_steps": 400, "joint_epochs": 10, "icd_pool": "mean",
         "threshold": "mean-std", "scope": "class", "exclusive": True, "acp_after": "none",
         "precision": "float32"}  # narrow layers: bfloat16 saves nothing
OWN = SMALL  # a user's own data
PRESETS = {
    "toy": SMALL | {"channels": 64, "joint_epochs": 20},
    "thumos": PUBLISHED | {"root": "data/thumos", "stride": 4.0, "frames": 16.0, "train_subset": "validation", "test_subset": "test"},
    "activitynet": PUBLISHED | {
        "root": "data/anet_1.3", "prefix": "v_", "stride": 16.0, "frames": 16.0, "fps": 25.0, "resize": 192, "channels": 256,
        "windows": "7,7,7,7,7,0", "position": True, "t_plus": 200.0, "lambda_reg": 2.0, "nms_sigma": 0.75, "nms_agnostic": True,
        "max_detections": 100, "batch": 16, "lr": 1e-3, "acp_clusters": 2, "joint_epochs": 15, "scope": "dataset",
        "tiou": "0.5:0.95:0.05"},
    "epic-verb": EPIC,
    "epic-noun": EPIC,
}

# What may differ between a checkpoint and the run that goes on from it: where and how loud, and with --start the later stages.
RUN = {"out", "stage", "start", "resume", "audit", "device", "log_every", "weights"}
JOINT = {"theta_l", "threshold", "theta_fixed", "repeat", "exclusive", "scope", "icd", "theta_drop", "theta_mine", "rejected",
         "joint_epochs", "refresh", "pseudo_weights", "lambda_u", "rerank", "icd_bounds"}
SUPERVISED = {"quality_form", "soft_label", "eps", "beta", "focal_alpha", "focal_gamma", "icd_pool", "icd_pairs", "icd_steps", "acp_after",
              "lambda_reg", "lambda_quality", "lambda_acp", "mixup", "supervised_epochs", "supervised_steps"}
LATER = {"pretrain": SUPERVISED | JOINT, "supervised": JOINT, "all": set()}  # what a run that ends after a stage does not depend on


# ---- Eq. (12) and one step ------------------------------------------------------------------------------------------

def objective(sup, unsup, s):
    """Eq. (12): L = L_sup + lambda_u * L_unsup,
    L_x = 1 / T+ * sum_t [ L_cls + 1(t positive) * (lambda_reg * L_diou + lambda_quality * L_quality) ] + lambda_acp * L_acp.

    sup, unsup: {"cls", "reg", "quality" (sums over points), "t_plus", "acp"}; unsup is None in stage 2 -> scalar."""
    def L_x(x):
        return (x["cls"] + s.lambda_reg * x["reg"] + s.lambda_quality * x["quality"]) / x["t_plus"] + s.lambda_acp * x["acp"]
    if unsup is None:
        return L_x(sup)
    return L_x(sup) + s.lambda_u * L_x(unsup)


def contrast(run, batch, outputs, instances):
    """L_acp of a batch, with the labels of `instances`, or K-means clusters where that is None."""
    s = run.s
    return acp.acp_loss(outputs.levels, outputs.masks, batch["feats"].to(run.device), instances, len(run.data.classes), s.acp,
                        s.acp_steps, s.acp_clusters, s.acp_tau, run.generator, s.acp_restarts, evaluate.gather, *evaluate.place())


def mix(batch, alpha):
    """MixUp (Zhang et al. 2017) of each video with the one opposite in the batch: lam * x + (1 - lam) * x', lam ~ Beta(alpha, alpha)
    -> (the batch, lam). The losses are mixed alike, which for cross-entropy is to mix the targets. Under torchrun partners come from
    the process's own share of the batch."""
    lam = float(torch.distributions.Beta(alpha, alpha).sample())
    feats, mask = batch["feats"], batch["mask"]
    return batch | {"feats": lam * feats + (1 - lam) * feats.flip(0), "mask": mask | mask.flip(0)}, lam


def point_losses(run, outputs, instances, branch):
    """alqa.detection_losses() of all processes, of the instances that batch_losses() takes."""
    s, K = run.s, len(run.data.classes)
    segments, labels, rejected = ([r[key] for r in instances] for key in ("segments", "labels", "rejected"))
    cls_target, offset_target = model.assign_targets(outputs.points, segments, labels, K, s.radius)
    time, positive = outputs.points.time[:, None], cls_target.any(-1)
    unsure = torch.stack([((time >= r[:, 0]) & (time <= r[:, 1])).any(1) for r in rejected])  # (B, P)
    use = outputs.mask & (positive | ~unsure)
    if branch == 1:  # a video without a pseudo label leaves L_unsup
        use = use & torch.tensor([len(l) > 0 for l in labels], device=run.device)[:, None]
    losses = alqa.detection_losses(outputs, cls_target, offset_target, use, s.alqa, s.quality_form, s.soft_label, s.eps, s.beta,
                                   s.focal_alpha, s.focal_gamma)
    return {key: evaluate.total(value) for key, value in losses.items()}


def batch_losses(run, batch, instances, branch):
    """The terms of L_x of a batch. branch 0 is labelled, 1 unlabelled, each with its own running mean T+.

    instances: B records {"segments", "labels", "rejected"}, ground truth or pseudo labels; the points inside a rejected segment
    are neither action nor background, unless they are positive for another. Returns what objective() takes, and "positives"."""
    s, lam = run.s, 1.0
    if s.mixup and branch == 0:
        batch, lam = mix(batch, s.mixup)
    outputs = evaluate.forward(run.detector, batch, s, run.device)
    instances = [{key: r[key].to(run.device) for key in ("segments", "labels", "rejected")} for r in instances]
    losses = point_losses(run, outputs, instances, branch)
    if lam < 1:
        opposite = point_losses(run, outputs, instances[::-1], branch)
        losses = {key: lam * value + (1 - lam) * opposite[key] for key, value in losses.items()}
    positives = losses["positives"].float().clamp(min=1)
    run.t_plus[branch] = s.t_plus_momentum * run.t_plus[branch] + (1 - s.t_plus_momentum) * positives
    L_acp = torch.zeros((), device=run.device)
    if s.acp != "none" and branch < AFTER.index(s.acp_after):
        L_acp = contrast(run, batch, outputs, instances)
    return losses | {"t_plus": run.t_plus[branch].clone(), "acp": L_acp}


def log(run, **row):
    """One line to the screen and to log.jsonl, by the first process."""
    if evaluate.place()[0] > 0:
        return
    row = {"stage": run.stage, "epoch": run.epoch + 1} | row
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    with open(run.out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def advance(run, loss, parts):
    """One optimiser step on `loss`: schedule, clipping, averaged weights, and a log line every s.log_every steps. The gradients
    of many processes are summed: `loss` is that of the whole batch, the gradient that of a process's own videos."""
    s = run.s
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} at step {run.step} of stage {run.stage}")
    warm = max(s.warmup * run.total, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * max(run.step - warm, 0) / max(run.total - warm, 1)))
    for group in run.optimizer.param_groups:
        group["lr"] = s.lr * min((run.step + 1) / warm, cosine)
    run.optimizer.zero_grad()
    loss.backward()
    if evaluate.place()[1] > 1:
        gradients = [p.grad for p in run.detector.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(summed.view_as(g))
    torch.nn.utils.clip_grad_norm_(run.detector.parameters(), s.clip)
    run.optimizer.step()
    decay = min(s.ema, (1 + run.ema_step) / (10 + run.ema_step))
    with torch.no_grad():
        for average, value in zip(run.ema.parameters(), run.detector.parameters()):
            average.lerp_(value, 1 - decay)
    run.step, run.ema_step = run.step + 1, run.ema_step + 1
    if run.step % s.log_every == 0 or run.step == run.total:
        rate = (run.step - run.clock[0]) / max(time.time() - run.clock[1], 1e-9)
        parts = {key: float(torch.as_tensor(value).detach()) for key, value in parts.items()}
        log(run, step=run.step, of=run.total, steps_a_second=rate, seconds_left=(run.total - run.step) / rate, loss=loss.item(), **parts)


# ---- The run: begin, save, resume -----------------------------------------------------------------------------------

MODULES = ("detector", "ema", "icd", "icd_optimizer", "optimizer")
NUMBERS = ("stage", "step", "ema_step", "t_plus", "pseudo", "theta_h")


def make_optimizer(detector, s):
    """AdamW; weight decay for the matrices only, as ActionFormer has it."""
    matrices = [p for p in detector.parameters() if p.ndim > 1]
    rest = [p for p in detector.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, fused=True)


def begin(s, data):
    """A new run: everything that training changes, as plain fields."""
    device = torch.device(s.device)
    torch.manual_seed(s.seed)
    detector = evaluate.build_detector(s, data.dim, len(data.classes)).to(device)
    for module in detector.modules():
        if isinstance(module, model.DropPath):
            module.share = evaluate.place()
    discriminator = icd.Discriminator(data.dim, s.icd_hidden, s.icd_dropout).to(device)
    bank = icd.bank_of((load_item(v, data, s) for v in data.labelled), s.icd_pool)
    bank["feats"] = bank["feats"].to(device)
    return SimpleNamespace(
        s=s, data=data, device=device, out=Path(s.out), detector=detector, ema=copy.deepcopy(detector).requires_grad_(False),
        icd=discriminator, icd_optimizer=torch.optim.Adam(discriminator.parameters(), lr=s.icd_lr), bank=bank, optimizer=None,
        pseudo=None, theta_h=None, t_plus=torch.full((2,), s.t_plus, device=device), stage=STAGES[0] if s.acp != "none" else STAGES[1],
        epoch=0, step=0, ema_step=0, total=0, generator=None, clock=None)


def save(run, epoch):
    """The whole run as one file, written atomically by the first process, with `epoch` epochs of its stage done."""
    if evaluate.place()[0] > 0:
        return
    content = {name: getattr(run, name).state_dict() for name in MODULES} | {name: getattr(run, name) for name in NUMBERS}
    content |= {"epoch": epoch, "processes": evaluate.place()[1], "settings": asdict(run.s), "classes": run.data.classes,
                "mean": run.data.mean, "std": run.data.std, "labelled": [v.id for v in run.data.labelled]}
    evaluate.write_atomically(run.out / "checkpoint.pt", lambda path: torch.save(content, path))


def restore(run, path):
    """Load a checkpoint, the run's own or that of --start, into a run; raises BadInput for one of another configuration."""
    content, mine = evaluate.read_checkpoint(path), asdict(run.s)
    if not {*MODULES, *NUMBERS} <= set(content) or set(mine) != set(content["settings"]):
        raise BadInput(f"checkpoint {path} is not of this version: it lacks or adds settings or parts")
    if path == run.s.start:
        stage = content["stage"]
        if stage not in LATER or content["epoch"] != content["settings"][f"{stage}_epochs"]:
            raise BadInput(f"checkpoint {path} is in stage {stage}, epoch {content['epoch']}, not at the end of stage 1 or 2")
    elif content.get("processes") != evaluate.place()[1]:
        raise BadInput(f"checkpoint {path} is of {content.get('processes')} process(es), not {evaluate.place()[1]}")
    free = RUN | LATER.get(content["stage"], set())  # what stage 1, say, does not depend on may change after it
    other = [k for k in mine if k not in free and mine[k] != content["settings"][k]]
    if other:
        raise BadInput(f"checkpoint {path} is of another configuration: its {other[0]} is {content['settings'][other[0]]!r}, "
                       f"not {mine[other[0]]!r}")
    if content["labelled"] != [v.id for v in run.data.labelled] or content["classes"] != run.data.classes:
        raise BadInput(f"checkpoint {path} is of other data: its labelled videos or classes are not those of {run.s.dataset}")
    run.optimizer = make_optimizer(run.detector, run.s)
    for name in MODULES:
        getattr(run, name).load_state_dict(content[name])
    for name in NUMBERS + ("epoch",):
        setattr(run, name, content[name])
    run.t_plus = run.t_plus.to(run.device)


def clear(run, resumed):
    """Remove the results that an earlier run left in --out; a resumed run keeps the log's rows up to its checkpoint."""
    rows = (run.out / "log.jsonl").read_text(encoding="utf-8").splitlines() if (run.out / "log.jsonl").exists() else []
    for name in ("log.jsonl", "metrics.json", "predictions.json", "pseudo_labels.json"):
        (run.out / name).unlink(missing_ok=True)
    if resumed:
        at = lambda row: (STAGES.index(row["stage"]), row["epoch"])
        whole = [row for row in rows if row.endswith("}")]  # the last one may have been cut short
        kept = [row for row in whole if at(json.loads(row)) <= (STAGES.index(run.stage), run.epoch)]
        (run.out / "log.jsonl").write_text("".join(row + "\n" for row in kept), encoding="utf-8")


def epochs(run, stage, count, steps):
    """The epochs of a stage that are still to do: yields each epoch's numpy generator, and saves the whole run at its end.

    Every epoch draws from generators seeded by (seed, stage, epoch) alone, so a resumed run goes on exactly as it would have."""
    if STAGES.index(stage) < STAGES.index(run.stage):
        return
    if stage != run.stage or run.optimizer is None:
        run.stage, run.epoch, run.step = stage, 0, 0
        run.optimizer = make_optimizer(run.detector, run.s)
    run.total = count * steps
    run.clock = (run.step, time.time())
    if count == 0:
        save(run, 0)
    for epoch in range(run.epoch, count):
        run.epoch = epoch
        seeds = np.random.SeedSequence([run.s.seed, STAGES.index(stage), run.epoch])
        seed = int(seeds.generate_state(1)[0])
        torch.manual_seed(seed)
        run.generator = torch.Generator().manual_seed(seed)
        run.detector.train(), run.icd.train()
        yield np.random.default_rng(seeds)
        save(run, run.epoch + 1)


# ---- What teaches the detector --------------------------------------------------------------------------------------

def ground_truth(batch):
    """The instances of a labelled batch."""
    return [{"segments": g, "labels": l, "rejected": g.new_zeros(0, 2)} for g, l in zip(batch["segments"], batch["labels"])]


def teaches(record):
    """Which pseudo labels of a record teach: kept or mined, (N,) bool."""
    return (record["status"] == icd.KEPT) | (record["status"] == icd.MINED)


def pseudo_truth(run, batch):
    """The instances of an unlabelled batch: its pseudo labels within the crops; what was detected and rejected is masked out of
    the loss, or background if the setting says so."""
    instances = []
    for video, start, mask in zip(batch["videos"], batch["starts"], batch["mask"]):
        r = run.pseudo[video.id]
        segments, inside = crop_segments(r["segments"], start, int(mask.sum()), run.s.crop_keep)
        teach, left_out = teaches(r) & inside, ~teaches(r) & (run.s.rejected == "masked")
        instances.append({"segments": segments[teach], "labels": r["labels"][teach], "rejected": r["segments"][left_out] - start})
    return instances


def train_icd(run, batch):
    """One step of ICD's own optimiser on the instances of a labelled batch; returns the loss. Small: every process does it all."""
    ids = set(batch["ids"])
    mine = [i for i, name in enumerate(run.bank["videos"]) if name in ids]
    loss = icd.icd_loss(run.icd, run.bank, mine, run.s.icd_pairs, run.generator)
    run.icd_optimizer.zero_grad()
    loss.backward()
    run.icd_optimizer.step()
    return loss.item()


@torch.no_grad()
def make_pseudo_labels(run):
    """Pseudo labels of the unlabelled videos: {id: record of detect() with "similarity" and "status"}.

    1) Detect, 2) ALQA selects positives and candidates, 3) ICD scores each, drops ambiguous positives, mines potential ones."""
    s, videos = run.s, run.data.unlabelled
    run.icd.eval()
    records = evaluate.detect(run.ema if s.pseudo_weights == "ema" else run.detector, videos, run.data, s, run.device)
    exclusive = s.exclusive and not alqa.classes_share_segments(run.data.labelled, s.repeat)
    records = [alqa.without_repeats(alqa.rerank(r, s.repeat) if s.rerank else r, s.repeat, exclusive) for r in records]
    records, theta_h = alqa.select(records, s.theta_l, s.threshold, s.theta_fixed, s.scope)
    rank, number = evaluate.place()
    mine = list(zip(videos, records))[rank::number]
    for feats, (_, r) in zip(ahead(lambda pair: load_item(pair[0], run.data, s)["feats"], mine), mine):
        icd.compare(r, run.icd, run.bank, feats.to(run.device), s.icd_pool)
    run.theta_h = float(np.mean(theta_h or [1.0]))
    found = evaluate.unite({v.id: r for v, r in mine})
    records = [found[v.id] for v in videos]
    icd.refine_pseudo_labels(records, s.theta_drop, s.theta_mine, s.icd, s.icd_bounds)
    return dict(zip((v.id for v in videos), records))


def pulse(run):
    """The method's pulse: how many pseudo labels of each kind there are, and with --audit how good those are that teach."""
    records = [run.pseudo[v.id] for v in run.data.unlabelled]
    count = torch.cat([r["status"] for r in records]).bincount(minlength=len(icd.STATUS)).tolist()
    teaching = [{key: value[teaches(r)] for key, value in r.items()} for r in records]
    quality = {}
    if run.s.audit:
        quality = evaluate.pseudo_label_quality(teaching, [run.data.hidden[v.id] for v in run.data.unlabelled])
    log(run, positives=count[icd.KEPT] + count[icd.DROPPED], candidates=count[icd.MINED] + count[icd.CANDIDATE],
        dropped=count[icd.DROPPED], mined=count[icd.MINED], theta_h=run.theta_h, silent=sum(len(r["labels"]) == 0 for r in teaching),
        **quality)


# ---- The three stages -----------------------------------------------------------------------------------------------

def pretrain(run):
    """Stage 1, ACP: contrast the steps of labelled and unlabelled videos; no label is read (Sec. 3.3)."""
    s, videos = run.s, [blind(v) for v in run.data.labelled + run.data.unlabelled]
    rank, number = evaluate.place()
    steps = math.ceil(len(videos) / (s.batch * number))
    for rng in epochs(run, "pretrain", s.pretrain_epochs, steps):
        for batch in training_batches(videos, run.data, s, steps, rng, rank, number):
            outputs = evaluate.forward(run.detector, batch, s, run.device)
            advance(run, contrast(run, batch, outputs, None), {})


def supervised(run):
    """Stage 2: the detector on labelled videos, and ICD beside it with its own optimiser (Sec. 3.1, 3.2)."""
    s, (rank, number) = run.s, evaluate.place()
    steps = max(math.ceil(len(run.data.labelled) / (s.batch * number)), math.ceil(s.supervised_steps / s.supervised_epochs))
    for rng in epochs(run, "supervised", s.supervised_epochs, steps):
        for batch in training_batches(run.data.labelled, run.data, s, steps, rng, rank, number):
            sup = batch_losses(run, batch, ground_truth(batch), 0)
            L_icd = train_icd(run, batch) if not s.icd_steps or run.step < s.icd_steps else 0.0
            advance(run, objective(sup, None, s), sup | {"icd": L_icd})


def joint(run):
    """Stage 3, Fig. 1: detect on unlabelled videos, ALQA selects, ICD refines, the detector learns from both kinds."""
    s, unlabelled, (rank, number) = run.s, {v.id: v for v in run.data.unlabelled}, evaluate.place()
    steps = math.ceil(len(unlabelled) / (s.batch * number))
    for rng in epochs(run, "joint", s.joint_epochs, steps):
        if run.pseudo is None or (s.refresh and run.epoch and run.epoch % s.refresh == 0):
            run.pseudo = make_pseudo_labels(run)
            run.detector.train()
        pulse(run)
        taught = [unlabelled[n] for n, r in run.pseudo.items() if teaches(r).any()]
        labelled_batches = training_batches(run.data.labelled, run.data, s, steps, rng, rank, number)
        unlabelled_batches = training_batches(taught, run.data, s, steps, rng, rank, number) if taught else [None] * steps
        for labelled_batch, unlabelled_batch in zip(labelled_batches, unlabelled_batches):
            sup, unsup = batch_losses(run, labelled_batch, ground_truth(labelled_batch), 0), None
            if unlabelled_batch:
                unsup = batch_losses(run, unlabelled_batch, pseudo_truth(run, unlabelled_batch), 1)
            advance(run, objective(sup, unsup, s), sup | {f"unsup_{key}": value for key, value in (unsup or {}).items()})


# ---- The report and the command line --------------------------------------------------------------------------------

def report(run):
    """Detect on the test videos with raw and averaged weights of the last epoch; the first process writes what --out receives and
    prints the table."""
    s, data, other = run.s, run.data, "raw" if run.s.weights == "ema" else "ema"
    results = {name: evaluate.evaluate_detector(detector, data, s, run.device)
               for name, detector in (("raw", run.detector), ("ema", run.ema))}
    (metrics, predictions), other_average = results[s.weights], results[other][0]["average_mAP"]
    if evaluate.place()[0] > 0:
        return
    pseudo = evaluate.export_pseudo_labels(data.unlabelled, run.pseudo, data.classes, icd.STATUS) if run.pseudo else {}
    evaluate.write_json(run.out / "predictions.json", predictions)
    evaluate.write_json(run.out / "pseudo_labels.json", pseudo, indent=1)
    evaluate.write_json(run.out / "metrics.json", metrics | {"weights": s.weights, f"average_mAP_{other}": other_average}, indent=1)
    print(evaluate.table(metrics, f"{run.out} ({s.weights} weights)"))
    print(f"average with the {other} weights: {100 * other_average:.2f}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message):
        """Raises BadInput."""
        raise BadInput(f"{message}; --help lists every setting")


def parse_settings(argv):
    """The Settings of a command line: the defaults, changed by the dataset's preset, changed by the arguments."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    epilog="The defaults are those of the paper; --dataset changes some (PRESETS in train.py).")
    for f in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), help=f"{f.metadata['comment']} (default {f.default})", **kind)
    given = vars(parser.parse_args(argv))
    dataset = given.get("dataset", "toy")
    if dataset not in PRESETS and not dataset.endswith(".json"):
        raise BadInput(f"--dataset must be an annotation file *.json or one of {', '.join(PRESETS)}, not {dataset!r}")
    given = {"out": f"runs/{Path(dataset).stem}"} | PRESETS.get(dataset, OWN) | given
    for name in ("dataset", "root", "annotations", "features", "split"):  # so that the checkpoint finds them from anywhere
        if given.get(name) and given[name] not in (*PRESETS, "uniform", "stratified"):
            given[name] = str(Path(given[name]).resolve())
    given["device"] = evaluate.pick_device(given.get("device", "auto"))
    if given.get("precision", "auto") == "auto":
        given["precision"] = evaluate.pick_precision(torch.device(given["device"]))
    return Settings(**given)


def launch(s):
    """The run that the settings ask for, new, resumed or begun at stage 2 or 3, with its folder made; raises BadInput."""
    data = load_dataset(s)
    if s.stage == "all" and not data.unlabelled:
        raise BadInput(f"--ratio {s.ratio} leaves no unlabelled video for stage 3; --stage supervised needs none")
    run = begin(s, data)
    resumed = s.resume and (run.out / "checkpoint.pt").exists()
    if resumed:
        restore(run, run.out / "checkpoint.pt")
    elif s.start:
        restore(run, s.start)
    if evaluate.place()[0] > 0:
        return run
    run.out.mkdir(parents=True, exist_ok=True)
    clear(run, resumed)
    evaluate.write_json(run.out / "config.json", asdict(s), indent=1)
    evaluate.write_json(run.out / "split.json", {"labelled": [v.id for v in data.labelled], "unlabelled": [v.id for v in data.unlabelled],
                                                 "missing_classes": data.missing}, indent=1)
    print(f"{len(data.labelled)} labelled, {len(data.unlabelled)} unlabelled, {len(data.test)} test videos; {len(data.classes)} classes, "
          f"{len(data.missing)} without a labelled instance: {', '.join(data.missing) or '-'}; {s.device}, {s.precision}, "
          f"{evaluate.place()[1]} process(es)")
    return run


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    try:
        s = parse_settings(argv)
        evaluate.join(s.device)
        run = launch(s)
        pretrain(run)
        if run.s.stage != "pretrain":
            supervised(run)
            if run.s.stage == "all":
                joint(run)
            report(run)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if dist.is_initialized():  # not after an error: other processes may be waiting for this one, and torchrun ends them
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
