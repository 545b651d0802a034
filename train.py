"""APL, adaptive pseudo-label learning: the settings, the three stages and Eq. (12).

    python train.py                                       toy data, all stages, a table of mAP
    python train.py --dataset thumos --ratio 0.1
    python train.py --dataset my.json --features DIR --stride 25 --frames 50 --out runs/my
    torchrun --nproc_per_node=4 train.py ...              one process a device: 4 * --batch videos

Stage 1 pre-trains the backbone with ACP on all training videos, no labels read. Stage 2 trains the
detector and ICD on the labelled videos. Stage 3 makes pseudo labels (ALQA selects, ICD refines)
and trains on labelled and unlabelled videos: joint() is Fig. 1.
"""
import argparse
import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import acp
import alqa
import data
import evaluate
import icd
import model
from acp import ACP
from alqa import SCOPES, SOFT_LABELS, THRESHOLDS
from data import BadInput, column, from_stage_2, from_stage_3, of_run, process_count, rows, setting
from icd import REFINEMENTS

STAGES = ("pretrain", "supervised", "joint")
AFTER = ("none", "labelled", "labelled+unlabelled")  # the rows of Tab. S4
BRANCHES = ("labelled", "unlabelled")  # of Eq. (12)
LABELLED, UNLABELLED = range(2)


# ---- Settings -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings(evaluate.DetectionSettings):
    """All settings. [S] the paper states it, [A] the public ActionFormer has it, [J] neither.

    What the data, the detector and detection depend on is inherited from their files."""
    # ALQA
    quality_form: str = from_stage_2("bce", "loss of Eq. (3) [S]", ("bce", "kl"))
    soft_label: str = from_stage_2(
        "computed",
        "tIoU and tND of the soft label Y: of the regressed segments, or the branches' [J]",
        SOFT_LABELS)
    beta: float = from_stage_2(2.0, "focusing exponent of Eq. (5) [J]")
    focal_alpha: float = from_stage_2(0.25, "focal loss without quality branches [A]")
    focal_gamma: float = from_stage_2(2.0, "focal loss without quality branches [A]")
    theta_l: float = from_stage_3(0.15, "joint scores below are dropped, Eq. (6) [S]", "a share")
    threshold: str = from_stage_3(
        "mean+std", "theta_h of Eq. (6) [J]; fixed: the paper's baseline", THRESHOLDS)
    theta_fixed: float = from_stage_3(0.3, "theta_h of the fixed threshold [S]", "a share")
    scope: str = from_stage_3("video", "what theta_h's statistics are over [J]", SCOPES)
    repeat: float = from_stage_3(
        0.5,
        "tIoU with a better pseudo label of the class, over which one is a repeat and removed; "
        "1: none [J]", "a share")
    exclusive: bool = from_stage_3(
        False,
        "one of another class is a repeat too, if no labelled instances of two classes overlap "
        "so [J]")
    rerank: bool = from_stage_3(
        False,
        "rerank by the spread of overlapping boundaries, as NPL [53] does, reconstructed (Table 1)")
    # ICD
    icd: str = from_stage_3(
        "eap+mpp",
        "drop ambiguous positives (eap), mine potential ones (mpp) [S]", REFINEMENTS)
    theta_drop: float = from_stage_3(
        0.3, "positives of a smaller similarity are dropped [S]", "a share")
    theta_mine: float = from_stage_3(
        0.7, "candidates of a larger similarity are mined [S]", "a share")
    icd_pairs: int = from_stage_2(
        10, "instances of the same class and of others, Eq. (7) [S]", "positive")
    icd_pool: str = from_stage_2("max", "pooling over time [S: max]", ("max", "mean"))
    icd_hidden: int = setting(128, "hidden width of Eq. (9) [S, by Tab. S6]", "positive")
    icd_dropout: float = setting(0.5, "dropout of Eq. (9) [J]", "a share")
    icd_lr: float = setting(1e-3, "learning rate of ICD's Adam [J]", "positive")
    icd_steps: int = from_stage_2(
        0,
        "steps that ICD trains, from the start of stage 2; 0: all of them [J]")
    # ACP
    acp: str = setting("coarse+fine", "contrasts of Eq. (11) [S]; none leaves stage 1 out", ACP)
    acp_after: str = from_stage_2(
        "labelled+unlabelled",
        "where L_acp goes on after pre-training (Tab. S4) [S]", AFTER)
    acp_steps: int = setting(40, "steps m drawn from a video [J]", "positive")
    acp_clusters: int = setting(
        4, "clusters of the fine contrast in a batch [S: 4 THUMOS14, 2 ActivityNet]", "positive")
    acp_restarts: int = setting(10, "restarts of K-means [J]", "positive")
    acp_tau: float = setting(0.1, "temperature tau [J]", "positive")
    # loss, Eq. (12)
    lambda_u: float = from_stage_3(2.0, "weight of L_unsup [S]")
    lambda_reg: float = from_stage_2(
        1.0, "weight of L_diou [S: 1 THUMOS14, 2 ActivityNet, as [62]]")
    lambda_quality: float = from_stage_2(0.1, "weight of L_quality [S]")
    lambda_acp: float = from_stage_2(0.1, "weight of L_acp [S]")
    radius: float = from_stage_2(1.5, "centre sampling, in strides [A]", "positive")
    t_plus: float = setting(100.0, "start of the running mean T+ [A]", "positive")
    t_plus_momentum: float = from_stage_2(0.9, "momentum of T+ [A]", "a share")
    rejected: str = from_stage_3(
        "masked",
        "detected and rejected instances in stage 3 [J]", ("masked", "background"))
    mixup: float = from_stage_2(
        0.0,
        "MixUp of the labelled videos of a batch (Table 1): alpha of Beta(alpha, alpha); 0: none")
    # training
    lr: float = setting(1e-4, "learning rate of AdamW, cosine decay [S]", "positive")
    weight_decay: float = setting(1e-4, "of the matrices [S]")
    warmup: float = setting(
        0.14, "linear warm-up, as a share of a stage: 5 of 35 epochs [J]", "a share")
    clip: float = setting(1.0, "gradient norm [J]", "positive")
    pretrain_epochs: int = setting(15, "stage 1 [S]")
    supervised_epochs: int = from_stage_2(35, "stage 2, warm-up included [J]", "positive")
    supervised_steps: int = from_stage_2(1500, "stage 2 has at least as many steps [J]")
    joint_epochs: int = from_stage_3(40, "stage 3 [S: 40 THUMOS14, 15 ActivityNet]")
    refresh: int = from_stage_3(
        0,
        "epochs after which pseudo labels are made anew; 0: once, after stage 2 [J]")
    pseudo_weights: str = from_stage_3(
        "raw", "weights that make the pseudo labels [J]", ("raw", "ema"))
    ema: float = setting(
        0.999, "decay of the averaged weights, at most (1 + t) / (10 + t) [J]", "a share")
    # run
    out: str = of_run("", "folder of everything that the run writes (default runs/<dataset>)")
    stage: str = of_run(
        "all", "last stage; supervised: ActF* of Table 1 with --alqa none --acp none",
        ("all", *STAGES[:2]))
    start: str = of_run("", "checkpoint of a finished stage 1 or 2 to go on from")
    resume: bool = of_run(False, "go on from the checkpoint in --out, if there is one")
    log_every: int = of_run(20, "steps between two log lines", "positive")

    def __post_init__(self):
        super().__post_init__()
        if self.mixup and self.acp != "none" and self.acp_after != "none":
            raise BadInput("setting mixup leaves no video whose steps have one class each: "
                           "it needs acp or acp_after none")
        if self.mixup and self.batch % 2:
            raise BadInput("setting mixup pairs the videos of a batch: "
                           f"setting batch must be even, but is {self.batch}")
        if self.rerank and self.repeat == 1:
            raise BadInput("setting rerank looks at detections whose tIoU is over the setting "
                           "repeat, which must be below 1")


def settings_until(stage):
    """The names of the settings that the stages up to this one depend on."""
    until = STAGES[:STAGES.index(stage) + 1]
    return [f.name for f in fields(Settings) if f.metadata["stage"] in until]


# What a dataset changes in the settings (as the public ActionFormer has it); the command line
# changes these in turn.
PUBLISHED = {
    "bad_segments": "skip",
    "standardize": False,
}
EPIC = PUBLISHED | {
    "root": "data/epic_kitchens",
    "extension": ".npz",
    "stride": 16.0,
    "frames": 32.0,
    "fps": 30.0,
    "windows": "9",
    "ranges": "0:4,2:8,4:16,8:32,16:64,32:inf",
    "t_plus": 250.0,
    "nms_sigma": 0.4,
    "pre_nms": 5000,
    "max_detections": 2000,
    "tiou": "0.1:0.5:0.1",
}
OWN = {  # a user's own data
    "channels": 128,
    "windows": "9",
    "lr": 1e-3,
    "supervised_steps": 400,
    "joint_epochs": 10,
    "icd_pool": "mean",
    "threshold": "mean-std",
    "scope": "class",
    "exclusive": True,
    "acp_after": "none",
    "precision": "float32",  # narrow layers: bfloat16 saves nothing
}
PRESETS = {
    "toy": OWN | {
        "channels": 64,
        "joint_epochs": 20,
    },
    "thumos": PUBLISHED | {
        "root": "data/thumos",
        "stride": 4.0,
        "frames": 16.0,
        "train_subset": "validation",
        "test_subset": "test",
    },
    "activitynet": PUBLISHED | {
        "root": "data/anet_1.3",
        "prefix": "v_",
        "stride": 16.0,
        "frames": 16.0,
        "fps": 25.0,
        "resize": 192,
        "channels": 256,
        "windows": "7,7,7,7,7,0",
        "position": True,
        "t_plus": 200.0,
        "lambda_reg": 2.0,
        "nms_sigma": 0.75,
        "nms_agnostic": True,
        "max_detections": 100,
        "batch": 16,
        "lr": 1e-3,
        "acp_clusters": 2,
        "joint_epochs": 15,
        "scope": "dataset",
        "tiou": "0.5:0.95:0.05",
    },
    "epic-verb": EPIC,
    "epic-noun": EPIC,
}


# ---- Eq. (12) -----------------------------------------------------------------------------------

def objective(sup, unsup, s):
    """Eq. (12): L = L_sup + lambda_u * L_unsup.

    L_x = 1 / T+ * sum_t [ L_cls + 1(t positive) * (lambda_reg * L_diou + lambda_quality *
    L_quality) ] + lambda_acp * L_acp.
    T+ is the running mean of the number of positive points, as ActionFormer has it.
    sup, unsup  {"cls", "reg", "quality" (sums over points), "t_plus", "acp"}; unsup is None in
                stage 2, and where no video has a pseudo label
    ->          scalar"""
    def L(x):
        points = x["cls"] + s.lambda_reg * x["reg"] + s.lambda_quality * x["quality"]
        return points / x["t_plus"] + s.lambda_acp * x["acp"]

    if unsup is None:
        return L(sup)
    return L(sup) + s.lambda_u * L(unsup)


# ---- The run ------------------------------------------------------------------------------------

@dataclass
class Run:
    """A run: what it reads, and everything that training changes."""
    s: Settings
    data: data.Dataset
    out: Path
    detector: model.Detector
    ema: model.Detector  # its averaged weights
    discriminator: icd.Discriminator
    discriminator_optimizer: torch.optim.Optimizer
    bank: dict  # the labelled instances, as icd.bank_of() has them
    t_plus: torch.Tensor  # (2,), the running mean T+ of each branch
    stage: str  # one of STAGES
    epoch: int = 0  # of the stage, done so far
    step: int = 0  # of the stage, done so far
    total: int = 0  # steps of the stage
    ema_step: int = 0  # steps of all stages, done so far
    optimizer: torch.optim.Optimizer = None  # of the stage
    generator: torch.Generator = None  # of the epoch
    pseudo: dict = None  # {id: record}, the pseudo labels
    theta_h: float = None  # its mean when they were made
    clock: tuple = None  # (step, time) when the stage began or went on


def begin(s, dataset):
    """A new Run."""
    torch.manual_seed(s.seed)
    detector = model.Detector(dataset.dim, len(dataset.classes), s).to(s.device)
    ema = copy.deepcopy(detector).requires_grad_(False)
    discriminator = icd.Discriminator(dataset.dim, s.icd_hidden, s.icd_dropout).to(s.device)
    adam = torch.optim.Adam(discriminator.parameters(), lr=s.icd_lr)
    labelled = (data.load_item(video, dataset, s) for video in dataset.labelled)
    bank = icd.bank_of(labelled, s.icd_pool)
    bank["feats"] = bank["feats"].to(s.device)
    t_plus = torch.full((2,), s.t_plus, device=s.device)
    stage = "pretrain" if s.acp != "none" else "supervised"
    return Run(
        s, dataset, Path(s.out), detector, ema, discriminator, adam, bank, t_plus, stage)


def make_optimizer(detector, s):
    """AdamW; weight decay for the matrices only, as ActionFormer has it."""
    matrices = [p for p in detector.parameters() if p.ndim > 1]
    rest = [p for p in detector.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)


# What a checkpoint holds: by its key, the field of the run.
MODULES = {
    "detector": "detector",
    "ema": "ema",
    "icd": "discriminator",
    "icd_optimizer": "discriminator_optimizer",
    "optimizer": "optimizer",
}
NUMBERS = ("stage", "epoch", "step", "ema_step", "t_plus", "pseudo", "theta_h")


def save(run):
    """The whole run as one file, written by the first process."""
    if not data.is_first():
        return
    content = {key: getattr(run, name).state_dict() for key, name in MODULES.items()}
    content |= {name: getattr(run, name) for name in NUMBERS}
    content |= {
        "processes": process_count(),
        "settings": asdict(run.s),
        "classes": run.data.classes,
        "mean": run.data.mean,
        "std": run.data.std,
        "labelled": [video.id for video in run.data.labelled],
    }
    path = run.out / "checkpoint.pt"
    data.write_atomically(path, lambda temporary: torch.save(content, temporary))


def check_checkpoint(run, content, path):
    """Raise BadInput for a checkpoint that this run cannot go on from."""
    mine, theirs = asdict(run.s), content["settings"]
    if not {*MODULES, *NUMBERS} <= set(content) or set(mine) != set(theirs):
        raise BadInput(
            f"checkpoint {path} is not of this version: it lacks or adds settings or parts")
    stage, epoch = content["stage"], content["epoch"]
    processes = content.get("processes")
    if path == run.s.start:
        if stage not in STAGES[:2] or epoch != theirs[f"{stage}_epochs"]:
            raise BadInput(f"checkpoint {path} is in stage {stage}, epoch {epoch}, not at the end "
                           "of stage 1 or 2")
    elif processes != process_count():
        raise BadInput(
            f"checkpoint {path} is of {processes} process(es), not {process_count()}")
    for name in settings_until(stage):
        if mine[name] != theirs[name]:
            raise BadInput(f"checkpoint {path} is of another configuration: its {name} is "
                           f"{theirs[name]!r}, not {mine[name]!r}")
    labelled = [video.id for video in run.data.labelled]
    if content["labelled"] != labelled or content["classes"] != run.data.classes:
        raise BadInput(f"checkpoint {path} is of other data: its labelled videos or classes are "
                       f"not those of {run.s.dataset}")


def restore(run, path):
    """Load a checkpoint, the run's own or that of --start, into a run; raises BadInput."""
    content = evaluate.read_checkpoint(path)
    check_checkpoint(run, content, path)
    run.optimizer = make_optimizer(run.detector, run.s)
    for key, name in MODULES.items():
        getattr(run, name).load_state_dict(content[key])
    for name in NUMBERS:
        setattr(run, name, content[name])
    run.t_plus = run.t_plus.to(run.s.device)


def log(run, **row):
    """One line to the screen and to log.jsonl, by the first process."""
    if not data.is_first():
        return
    row = {"stage": run.stage, "epoch": run.epoch + 1} | row
    words = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
             for key, value in row.items()]
    print("  ".join(words), flush=True)
    data.append_row(run.out / "log.jsonl", row)


def clear(run, resumed):
    """Remove the results that an earlier run left in --out.

    A resumed run keeps the log's rows up to its checkpoint."""
    path = run.out / "log.jsonl"
    done = STAGES.index(run.stage), run.epoch
    logged = data.read_rows(path) if resumed else []
    kept = [row for row in logged if (STAGES.index(row["stage"]), row["epoch"]) <= done]
    data.write_rows(path, kept)
    for name in ("metrics.json", "predictions.json", "pseudo_labels.json"):
        (run.out / name).unlink(missing_ok=True)


def epochs(run, stage, count, steps):
    """The epochs of a stage that are still to do; saves the whole run at the end of each.

    Every epoch draws from generators seeded by (seed, stage, epoch) alone, so a resumed run goes
    on exactly as it would have.
    -> yields each epoch's numpy generator"""
    number = STAGES.index(stage)
    if number < STAGES.index(run.stage):
        return
    if stage != run.stage or run.optimizer is None:
        run.stage, run.epoch, run.step = stage, 0, 0
        run.optimizer = make_optimizer(run.detector, run.s)
    run.total = count * steps
    run.clock = (run.step, time.time())
    if count == 0:
        save(run)
    while run.epoch < count:
        seeds = np.random.SeedSequence([run.s.seed, number, run.epoch])
        seed = int(seeds.generate_state(1)[0])
        torch.manual_seed(seed)
        run.generator = torch.Generator().manual_seed(seed)
        run.detector.train()
        run.discriminator.train()
        yield np.random.default_rng(seeds)
        run.epoch += 1
        save(run)


# ---- One step -----------------------------------------------------------------------------------

def learning_rate(s, step, total):
    """The learning rate at a step of a stage of `total` steps."""
    warm = max(s.warmup * total, 1)
    # 1) linear warm-up
    linear = (step + 1) / warm
    # 2) cosine decay to 0 after it
    done = max(step - warm, 0) / max(total - warm, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return s.lr * min(linear, cosine)


def sum_gradients(detector):
    """Sum the gradients of all processes: the loss is that of the whole batch, each process has
    the gradient of its own videos."""
    if process_count() == 1:
        return
    gradients = [p.grad for p in detector.parameters() if p.grad is not None]
    flat = parameters_to_vector(gradients)  # one message in the place of hundreds
    dist.all_reduce(flat)
    vector_to_parameters(flat, gradients)


@torch.no_grad()
def average_weights(run):
    """Move the averaged weights towards the detector's, fast at first."""
    decay = min(run.s.ema, (1 + run.ema_step) / (10 + run.ema_step))
    for average, value in zip(run.ema.parameters(), run.detector.parameters()):
        average.lerp_(value, 1 - decay)


def advance(run, loss, parts):
    """One optimiser step on `loss`, and a log line with its `parts` every s.log_every steps."""
    s = run.s
    if not math.isfinite(loss.item()):
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {run.step} of stage {run.stage}")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(s, run.step, run.total)
    run.optimizer.zero_grad()
    loss.backward()
    sum_gradients(run.detector)
    torch.nn.utils.clip_grad_norm_(run.detector.parameters(), s.clip)
    run.optimizer.step()
    average_weights(run)
    run.step += 1
    run.ema_step += 1
    if run.step % s.log_every == 0 or run.step == run.total:
        first, since = run.clock
        rate = (run.step - first) / max(time.time() - since, 1e-9)
        parts = {key: float(torch.as_tensor(value).detach()) for key, value in parts.items()}
        log(run, step=run.step, of=run.total, steps_a_second=rate,
            seconds_left=(run.total - run.step) / rate, loss=loss.item(), **parts)


# ---- The losses of a batch ----------------------------------------------------------------------

def ground_truth(batch):
    """The instances of a labelled batch, B records {"segments", "labels", "rejected"}."""
    return [{"segments": segments, "labels": labels, "rejected": segments[:0]}
            for segments, labels in zip(batch["segments"], batch["labels"])]


def is_taught(record):
    """Which pseudo labels of a record teach the detector: kept or mined, (N,) bool."""
    return (record["status"] == icd.KEPT) | (record["status"] == icd.MINED)


def pseudo_truth(run, batch):
    """The instances of an unlabelled batch: its pseudo labels within the crops.

    What was detected and rejected (dropped positives, candidates not mined) is masked out of the
    loss, or background if the setting says so. A crop without a pseudo label leaves L_unsup: it
    is rejected as a whole.
    -> B records {"segments", "labels", "rejected"}"""
    instances = []
    for video, start, mask in zip(batch["videos"], batch["starts"], batch["mask"]):
        record = run.pseudo[video.id]
        segments, inside = data.crop_segments(
            record["segments"], start, int(mask.sum()), run.s.crop_keep)
        taught = is_taught(record)
        masked = ~taught & (run.s.rejected == "masked")
        rejected = record["segments"][masked] - start
        if not (taught & inside).any():
            rejected = torch.tensor([[-math.inf, math.inf]])
        instances.append({
            "segments": segments[taught & inside],
            "labels": record["labels"][taught & inside],
            "rejected": rejected,
        })
    return instances


def mix(batch, alpha):
    """MixUp (Zhang et al. 2017) of each video with the one opposite in the batch, for Table 1.

    lam * x + (1 - lam) * x', lam ~ Beta(alpha, alpha). The losses are mixed alike, which for
    cross-entropy is to mix the targets. Under torchrun partners come from the process's own share
    of the batch.
    -> the batch, lam"""
    lam = float(torch.distributions.Beta(alpha, alpha).sample())
    feats, mask = batch["feats"], batch["mask"]
    feats = lam * feats + (1 - lam) * feats.flip(0)
    return batch | {"feats": feats, "mask": mask | mask.flip(0)}, lam


def point_losses(run, outputs, instances):
    """The sums over the points of a batch, of all processes: what alqa.alqa_losses() gives.

    The points inside a rejected segment are neither action nor background, unless they are
    positive for another."""
    s = run.s
    segments = [r["segments"] for r in instances]
    labels = [r["labels"] for r in instances]
    cls_target, offset_target = model.assign_targets(
        outputs.points, segments, labels, len(run.data.classes), s.radius)
    time = outputs.points.time
    unsure = torch.stack([acp.covers(r["rejected"], time).any(1) for r in instances])  # (B, P)
    use = outputs.mask & (cls_target.any(-1) | ~unsure)
    losses_of = alqa.plain_losses if s.alqa == "none" else alqa.alqa_losses
    losses = losses_of(outputs, cls_target, offset_target, use, s)
    return {key: data.sum_of_all(value) for key, value in losses.items()}


def batch_losses(run, batch, instances, branch):
    """The terms of L_x of a batch: what objective() takes, and "positives", their number.

    instances  B records {"segments", "labels", "rejected"}, ground truth or pseudo labels
    branch     LABELLED or UNLABELLED, each with its own running mean T+"""
    s = run.s
    lam = 1.0
    if s.mixup and branch == LABELLED:
        batch, lam = mix(batch, s.mixup)
    outputs = evaluate.forward(run.detector, batch, s)
    instances = [{key: value.to(s.device) for key, value in r.items()} for r in instances]
    losses = point_losses(run, outputs, instances)
    if lam < 1:
        opposite = point_losses(run, outputs, instances[::-1])
        losses = {key: lam * losses[key] + (1 - lam) * opposite[key] for key in losses}
    positives = losses["positives"].float().clamp(min=1)
    momentum = s.t_plus_momentum
    run.t_plus[branch] = momentum * run.t_plus[branch] + (1 - momentum) * positives
    L_acp = torch.zeros((), device=s.device)
    if s.acp != "none" and BRANCHES[branch] in s.acp_after.split("+"):  # Tab. S4
        feats = batch["feats"].to(s.device)
        L_acp = acp.acp_loss((outputs.levels, outputs.masks), feats, instances,
                             len(run.data.classes), s, run.generator)
    return losses | {"t_plus": run.t_plus[branch].clone(), "acp": L_acp}


def train_icd(run, batch):
    """One step of ICD's own optimiser on all instances of a batch's videos; returns the loss.

    Crops do not matter here. Small: every process does it all."""
    ids = set(batch["ids"])
    mine = [i for i, name in enumerate(run.bank["videos"]) if name in ids]
    L_icd = icd.icd_loss(run.discriminator, run.bank, mine, run.s.icd_pairs, run.generator)
    run.discriminator_optimizer.zero_grad()
    L_icd.backward()
    run.discriminator_optimizer.step()
    return L_icd.item()


# ---- Pseudo labels ------------------------------------------------------------------------------

def detect_unlabelled(run):
    """Detections of the unlabelled videos {id: record}, without repeats (not in the paper)."""
    s = run.s
    detector = run.ema if s.pseudo_weights == "ema" else run.detector
    detections = evaluate.detect(detector, run.data.unlabelled, run.data, s)
    exclusive = s.exclusive and not alqa.classes_share_segments(run.data.labelled, s.repeat)
    for name, record in detections.items():
        if s.rerank:
            record = alqa.rerank(record, s.repeat)
        detections[name] = alqa.without_repeats(record, s.repeat, exclusive)
    return detections


def compare_all(run, selected):
    """ICD compares the detections {id: record} with the labelled instances of their class."""
    s = run.s
    run.discriminator.eval()
    compared = {}
    for video in data.share_of(run.data.unlabelled):
        feats = data.load_item(video, run.data, s)["feats"].to(s.device)
        compared[video.id] = icd.compare(
            selected[video.id], run.discriminator, run.bank, feats, s.icd_pool)
    compared = data.dict_of_all(compared)
    return {name: compared[name] for name in selected}


def make_pseudo_labels(run):
    """Fig. 1 up to the pseudo labels: detect, ALQA selects, ICD compares and refines.

    -> {id: record} of the unlabelled videos, and the mean of theta_h (None without detections)"""
    s = run.s
    detections = detect_unlabelled(run)
    selected, theta_h = alqa.select(
        detections, s.theta_l, s.threshold, s.theta_fixed, s.scope)
    compared = compare_all(run, selected)
    refined = {name: icd.refine(record, s.theta_drop, s.theta_mine, s.icd)
               for name, record in compared.items()}
    return refined, float(np.mean(theta_h)) if theta_h else None


def log_pseudo_labels(run):
    """How many pseudo labels of each kind there are, and with --audit how good those that teach."""
    taught = {name: rows(record, is_taught(record)) for name, record in run.pseudo.items()}
    status = column(run.pseudo, "status").long()
    kept, dropped, mined, candidates = status.bincount(minlength=len(icd.STATUS)).tolist()
    quality = evaluate.pseudo_label_quality(taught, run.data.hidden) if run.s.audit else {}
    log(run, positives=kept + dropped, candidates=mined + candidates, dropped=dropped, mined=mined,
        theta_h=run.theta_h, silent=sum(len(r["labels"]) == 0 for r in taught.values()), **quality)


# ---- The three stages ---------------------------------------------------------------------------

def steps_of(run, videos):
    """The steps of an epoch over so many videos."""
    return math.ceil(len(videos) / (run.s.batch * process_count()))


def pretrain(run):
    """Stage 1, ACP: contrast the steps of all training videos; no label is read (Sec. 3.3)."""
    s = run.s
    videos = [data.blind(video) for video in run.data.labelled + run.data.unlabelled]
    steps = steps_of(run, videos)
    for rng in epochs(run, "pretrain", s.pretrain_epochs, steps):
        for batch in data.training_batches(videos, run.data, s, steps, rng):
            pyramid = evaluate.forward(run.detector.pyramid, batch, s)
            feats = batch["feats"].to(s.device)
            L_acp = acp.acp_loss(pyramid, feats, None, len(run.data.classes), s, run.generator)
            advance(run, L_acp, {})


def supervised(run):
    """Stage 2: the detector on labelled videos, and ICD beside it with its own optimiser."""
    s, videos = run.s, run.data.labelled
    steps = max(steps_of(run, videos), math.ceil(s.supervised_steps / s.supervised_epochs))
    for rng in epochs(run, "supervised", s.supervised_epochs, steps):
        for batch in data.training_batches(videos, run.data, s, steps, rng):
            sup = batch_losses(run, batch, ground_truth(batch), LABELLED)
            L_icd = 0.0
            if not s.icd_steps or run.step < s.icd_steps:
                L_icd = train_icd(run, batch)
            advance(run, objective(sup, None, s), sup | {"icd": L_icd})


def joint(run):
    """Stage 3, Fig. 1: detect on unlabelled videos, ALQA selects, ICD refines, both kinds teach."""
    s = run.s
    labelled, unlabelled = run.data.labelled, run.data.unlabelled
    steps = steps_of(run, unlabelled)
    for rng in epochs(run, "joint", s.joint_epochs, steps):  # saves after each
        if run.pseudo is None or s.refresh and run.epoch % s.refresh == 0:
            run.pseudo, run.theta_h = make_pseudo_labels(run)
            run.detector.train()
        log_pseudo_labels(run)

        taught = [video for video in unlabelled if is_taught(run.pseudo[video.id]).any()]
        labelled_batches = data.training_batches(labelled, run.data, s, steps, rng)
        unlabelled_batches = [None] * steps
        if taught:
            unlabelled_batches = data.training_batches(taught, run.data, s, steps, rng)
        for batch, pseudo_batch in zip(labelled_batches, unlabelled_batches):
            sup = batch_losses(run, batch, ground_truth(batch), LABELLED)
            unsup = None
            parts = sup
            if pseudo_batch:
                truth = pseudo_truth(run, pseudo_batch)
                unsup = batch_losses(run, pseudo_batch, truth, UNLABELLED)
                parts = sup | {f"unsup_{key}": value for key, value in unsup.items()}
            advance(run, objective(sup, unsup, s), parts)


# ---- The report and the command line ------------------------------------------------------------

def report(run):
    """Detect on the test videos with raw and averaged weights of the last epoch.

    The first process writes what --out receives and prints the table."""
    s, dataset = run.s, run.data
    results = {"raw": evaluate.evaluate_detector(run.detector, dataset, s),
               "ema": evaluate.evaluate_detector(run.ema, dataset, s)}
    if not data.is_first():
        return
    metrics, predictions = results.pop(s.weights)
    other, (other_metrics, _) = results.popitem()
    other_average = other_metrics["average_mAP"]
    pseudo = run.pseudo and evaluate.export_pseudo_labels(
        dataset.unlabelled, run.pseudo, dataset.classes, icd.STATUS)
    whole = metrics | {"weights": s.weights, f"average_mAP_{other}": other_average}
    data.write_json(run.out / "predictions.json", predictions)
    data.write_json(run.out / "pseudo_labels.json", pseudo or {}, indent=1)
    data.write_json(run.out / "metrics.json", whole, indent=1)
    print(evaluate.table(metrics, f"{run.out} ({s.weights} weights)"))
    print(f"average with the {other} weights: {100 * other_average:.2f}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message):
        """Raises BadInput."""
        raise BadInput(f"{message}; --help lists every setting")


def parse_settings(argv):
    """The Settings of a command line: defaults, changed by the preset, changed by the arguments."""
    parser = Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS,
        epilog="The defaults are those of the paper; --dataset changes some (PRESETS in train.py).")
    for f in fields(Settings):
        flag = "--" + f.name.replace("_", "-")
        comment = f"{f.metadata['comment']} (default {f.default})"
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(flag, help=comment, **kind)
    given = vars(parser.parse_args(argv))
    dataset = given.get("dataset", "toy")
    if dataset not in PRESETS and not dataset.endswith(".json"):
        raise BadInput("--dataset must be an annotation file *.json or one of "
                       f"{', '.join(PRESETS)}, not {dataset!r}")
    given = {"out": f"runs/{Path(dataset).stem}"} | PRESETS.get(dataset, OWN) | given
    # Whole paths, so that the checkpoint finds the files from anywhere.
    for name in ("dataset", "root", "annotations", "features", "split"):
        if given.get(name) and given[name] not in (*PRESETS, "uniform", "stratified"):
            given[name] = str(Path(given[name]).resolve())
    given["device"] = evaluate.pick_device(given.get("device", "auto"))
    if given.get("precision", "auto") == "auto":
        given["precision"] = evaluate.pick_precision(given["device"])
    return Settings(**given)


def describe(run):
    """Print what the run is about to do, and write its configuration and split."""
    s, dataset = run.s, run.data
    labelled = [video.id for video in dataset.labelled]
    unlabelled = [video.id for video in dataset.unlabelled]
    split = {"labelled": labelled, "unlabelled": unlabelled, "missing_classes": dataset.missing}
    data.write_json(run.out / "config.json", asdict(s), indent=1)
    data.write_json(run.out / "split.json", split, indent=1)
    missing = ", ".join(dataset.missing) or "-"
    print(f"{len(labelled)} labelled, {len(unlabelled)} unlabelled, {len(dataset.test)} test "
          f"videos; {len(dataset.classes)} classes, {len(dataset.missing)} without a labelled "
          f"instance: {missing}; {s.device}, {s.precision}, {process_count()} process(es)")


def launch(s):
    """The Run that the settings ask for: new, resumed, or begun at stage 2 or 3; raises BadInput.

    The first process makes its folder."""
    dataset = data.load_dataset(s)
    if s.stage == "all" and not dataset.unlabelled:
        raise BadInput(f"--ratio {s.ratio} leaves no unlabelled video for stage 3; "
                       "--stage supervised needs none")
    run = begin(s, dataset)
    path = run.out / "checkpoint.pt"
    resumed = s.resume and path.exists()
    if resumed:
        restore(run, path)
    elif s.start:
        restore(run, s.start)
    if data.is_first():
        run.out.mkdir(parents=True, exist_ok=True)
        clear(run, resumed)
        describe(run)
    return run


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    try:
        s = parse_settings(argv)
        data.join_processes(s.device)
        run = launch(s)
        pretrain(run)
        if s.stage != "pretrain":
            supervised(run)
            if s.stage == "all":
                joint(run)
            report(run)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Not after an error: other processes may be waiting for this one, and torchrun ends them.
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
