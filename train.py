"""APL, adaptive pseudo-label learning: the settings, Eq. (12), one step, the three stages.

    python train.py                                       toy data, all stages, a table of mAP
    python train.py --dataset thumos --ratio 0.1
    python train.py --dataset my.json --features DIR --stride 25 --frames 50 --out runs/my
    python train.py --dataset my.json --features DIR --check      a report on the data, no training
    python train.py --resume runs/my                      go on after a kill
    torchrun --nproc_per_node=4 train.py ...              one process a device: 4 * --batch videos

Stage 1 pre-trains the backbone with ACP on all training videos, no labels read. Stage 2 trains the
detector and ICD on the labelled videos. Stage 3 makes pseudo labels (ALQA selects, ICD refines)
and trains on labelled and unlabelled videos: joint() is Fig. 1.
"""
import copy
import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# torch reads it at its import: on a busy machine threads that spin make a step 10 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import acp
import alqa
import data
import evaluate
import icd
import model
from acp import ACP
from alqa import SCOPES, SOFT_LABELS, THRESHOLDS
from icd import REFINEMENTS, SCORES
from plumbing import checkpoints, checks, files, journal, processes, public, resume, runs, settings
from plumbing.arguments import settings_of, words_of
from plumbing.inputs import Passes
from plumbing.listing import SAME
from plumbing.settings import (
    AtLeast1,
    Count,
    CountOrNone,
    Flag,
    NotNegative,
    OneOf,
    Positive,
    Share,
    Similarity,
    Width,
)
from plumbing.words import BadInput, is_first, say, warn

STAGES = ("pretrain", "supervised", "joint")
SEED_OF_STAGE = 10  # added to a stage's number in its epochs' seeds: 0 and 1 are of toy and split


# ---- Settings -----------------------------------------------------------------------------------
# [S] the paper states it, [A] the public ActionFormer has it, [J] neither. `since`: the stage from
# which settings matter. The defaults are THUMOS14's; PRESETS, OWN and PAPER in data.py change them.
# Those of data, detector and detection are in their files.

@dataclass(frozen=True)
class PretrainSettings(evaluate.DetectionSettings):
    """ACP, the optimisers, and what all stages share."""
    since = "pretrain"
    heading = "ACP and the optimisers"
    acp: OneOf(ACP, "contrasts of Eq. (11) [S]; none leaves stage 1 out") = "coarse+fine"
    acp_steps: Width("steps m drawn from a video [J]") = 40
    acp_clusters: Width("fine clusters of a batch [S: 4 THUMOS14, 2 ActivityNet]") = 4
    acp_restarts: Width("restarts of K-means [J]") = 10
    acp_tau: Positive("temperature tau [J]") = 0.1
    pretrain_epochs: CountOrNone("stage 1 [S]") = 15
    lr: Positive("learning rate, cosine decay [S], of AdamW [A]") = 1e-4
    weight_decay: NotNegative("of the matrices [S]") = 1e-4
    warmup: Share("linear warm-up, as a share of a stage: 5 of 35 epochs [A]") = 0.14
    clip: Positive("gradient norm [A]") = 1.0
    ema: Share("decay of the averaged weights [A], at most (1 + t) / (10 + t) [J]") = 0.999
    t_plus: Positive("start of the running mean T+ [A]") = 100.0
    icd_hidden: Width("hidden width of Eq. (9) [S, by Tab. S6]") = 128
    icd_dropout: Share("dropout of Eq. (9) [J]") = 0.5
    icd_lr: Positive("learning rate of ICD's Adam [J]") = 1e-3


@dataclass(frozen=True)
class SupervisedSettings(settings.CheckedSettings):
    """The losses of the points, ICD's training, and the length of stage 2."""
    since = "supervised"
    heading = "the losses, stage 2"
    quality_form: OneOf(("bce", "kl"), "loss of Eq. (3) [S]") = "bce"
    soft_label: OneOf(
        SOFT_LABELS, "tIoU, tND of Y: of the regressed segments, or the branches' [J]") = "computed"
    beta: AtLeast1("focusing exponent of Eq. (5), whose gradient is infinite below 1 [J]") = 2.0
    label_smoothing: Share("focal loss without quality branches; Eq. (5) is soft [A]") = 0.0
    focal_alpha: NotNegative("focal loss without quality branches [A]") = 0.25
    focal_gamma: NotNegative("focal loss without quality branches [A]") = 2.0
    lambda_reg: NotNegative("weight of L_diou [S: 1 THUMOS14, 2 ActivityNet, as [62]]") = 1.0
    lambda_quality: NotNegative("weight of L_quality [S]") = 0.1
    lambda_acp: NotNegative("weight of L_acp [S]") = 0.1
    radius: Positive("centre sampling, in strides [A]") = 1.5
    t_plus_momentum: Share("momentum of T+ [A]") = 0.9
    mixup: NotNegative("MixUp's alpha, of labelled videos (Table 1); 0: none [J]") = 0.0
    acp_after: OneOf(("none", "labelled", "labelled+unlabelled"),
                     "where L_acp goes on after stage 1 (Tab. S4) [S]") = "labelled+unlabelled"
    icd_score: OneOf(SCORES, "similarity to the class [S]; relative: less that to the next best, "
                     "for thresholds around 0 (-0.2 and 0.2) [J]") = "absolute"
    icd_pairs: Width("instances of the same class and of others, Eq. (7) [S]") = 10
    icd_pool: OneOf(("max", "mean"), "pooling over time [S: max]") = "max"
    supervised_epochs: Count("stage 2, warm-up included [A]") = 35
    supervised_steps: CountOrNone("stage 2 has at least as many steps [J]") = 1500


@dataclass(frozen=True)
class JointSettings(settings.CheckedSettings):
    """Pseudo labels and stage 3.

    README.md has the rows of Table 3 as settings."""
    since = "joint"
    heading = "pseudo labels, stage 3"
    theta_l: Share("joint scores below are dropped, Eq. (6) [S]") = 0.15
    threshold: OneOf(THRESHOLDS, "theta_h of Eq. (6) [J]; fixed: the paper's baseline") = "mean+std"
    theta_fixed: Share("theta_h of the fixed threshold [S]") = 0.3
    scope: OneOf(SCOPES, "what theta_h's statistics are over [J]") = "video"
    repeat: Share(
        "a detection is removed whose tIoU with a better one of its class is over this; 1: "
        "none [J]") = 0.5
    exclusive: Flag(
        "the same with a better one of any class, if repeat is below 1 and no labelled instances "
        "of two classes overlap so [J]") = False
    rerank: Flag(
        "rerank by how far boundaries scatter, reconstructed from NPL [53] (Table 1) [J]") = False
    icd: OneOf(REFINEMENTS, "eap: drop ambiguous positives, mpp: mine candidates [S]") = "eap+mpp"
    theta_drop: Similarity("positives of a smaller similarity are dropped [S]") = 0.3
    theta_mine: Similarity("candidates of a larger similarity are mined [S]") = 0.7
    rejected: OneOf(
        ("masked", "background"),
        "what ALQA or ICD rejects is left out of the loss, or is background [J]") = "masked"
    lambda_u: NotNegative("weight of L_unsup [S]") = 2.0
    joint_epochs: CountOrNone("stage 3 [S: 40 THUMOS14, 15 ActivityNet]") = 40
    refresh: CountOrNone("epochs between new pseudo labels; 0: made once [J]") = 0
    passes: CountOrNone("looks with the input's training noise, whose means make pseudo labels; "
                        "0: one without noise [J]") = 0


@dataclass(frozen=True)
class Settings(PretrainSettings, SupervisedSettings, JointSettings, settings.RunSettings):
    """All settings."""
    since = "run"
    heading = "the run"
    stage: OneOf(("all", "pretrain", "supervised"), "the last [supervised: ActF* of Table 1 with "
                 "--alqa none --acp none]") = "all"

    preset = staticmethod(data.preset)  # what --dataset and --paper change
    TRAIN, EVALUATE = "python train.py", "python evaluate.py"  # this detector's commands
    READ_WITH = {
        "alqa none": "label_smoothing focal_alpha focal_gamma",
        "alqa tiou diou tiou+tnd": "quality_form soft_label beta lambda_quality eps",
        "acp coarse fine coarse+fine":
            "acp_steps acp_clusters acp_restarts acp_tau acp_after pretrain_epochs",
        "acp_after labelled labelled+unlabelled": "lambda_acp",
        "threshold fixed frequency": "theta_fixed",
        "threshold mean+std mean mean-std": "scope",
        "icd eap eap+mpp": "theta_drop",
        "icd mpp eap+mpp": "theta_mine",
        "nms_agnostic True": "vote",
    }
    FIRST = ("dataset", "features", "unlabelled_features", "stride", "frames", "fps", "ratio",
             "split", "seed", "channels", "stage", "out", "resume", "check")

    def __post_init__(self):
        super().__post_init__()
        if self.mixup and (self.batch % 2 or "none" not in (self.acp, self.acp_after)):
            raise BadInput("setting mixup pairs the videos of a batch, whose steps have two "
                           "classes then: batch must be even, acp or acp_after none")
        if self.icd_score == "absolute" and self.theta_drop < 0:
            raise BadInput(f"setting theta_drop, {self.theta_drop:g}, drops nothing of absolute "
                           "similarities, which are not negative (the paper has --theta-drop 0.3 "
                           "and --theta-mine 0.7)")
        if self.stage == "pretrain" and self.acp == "none":
            raise BadInput("setting stage pretrain trains nothing where the setting acp is none")
        if self.rerank and self.repeat == 1:
            raise BadInput("setting rerank looks at detections whose tIoU is over the setting "
                           "repeat, which must be below 1")

    def epochs(self):
        """{stage: what does an epoch of it} where another detector has its own way."""
        return {}

    def losses(self, outputs, instances, num_classes):
        """The losses of a batch's points; here, so that another detector may have others."""
        return alqa.point_losses(outputs, instances, num_classes, self)

    def can_learn(self, detector, video, num_classes):
        """Whether a point of the detector is positive for an instance of a LabelledVideo."""
        points = detector.points(video.steps)
        segments, labels = video.segments.to(self.device), video.labels.to(self.device)
        return model.assign_targets(
            points, [segments], [labels], num_classes, self.radius)[0].any()


# ---- Eq. (12) -----------------------------------------------------------------------------------

def objective(sup, unsup, s):
    """Eq. (12): L = L_sup + lambda_u * L_unsup.

    L_x = 1 / T+ * sum_t [ L_cls + 1(t positive) * (lambda_reg * L_diou + lambda_quality *
    L_quality) ] + lambda_acp * L_acp.
    T+ is a running mean, begun at s.t_plus, of the number of positive points (the paper: of frames
    inside actions), much as in ActionFormer (a batch without any leaves it as it is);
    batch_losses() keeps one for each kind of videos.
    sup, unsup  {"cls", "reg", "quality" (sums over points, the last two over positive ones),
                "t_plus", "acp"}; unsup is None in stage 2, and where no video has a pseudo label
    ->          scalar"""
    def L(x):
        sum_t = x["cls"] + s.lambda_reg * x["reg"] + s.lambda_quality * x["quality"]
        return sum_t / x["t_plus"] + s.lambda_acp * x["acp"]

    if unsup is None:
        return L(sup)
    return L(sup) + s.lambda_u * L(unsup)


def teaches(record):
    """Which pseudo labels of a record teach the detector: kept or mined, (N,) bool."""
    return (record["status"] == icd.KEPT) | (record["status"] == icd.MINED)


def pseudo_truth(run, batch):
    """The instances of an unlabelled batch: its pseudo labels within the crops.

    What was detected and rejected (dropped positives, candidates not mined) is masked out of the
    loss (not given in the paper), or background if the setting says so. A crop without a pseudo
    label leaves L_unsup either way: it is masked as a whole.
    -> B records {"segments", "labels", "rejected"}"""
    instances = []
    for video, start, mask in zip(batch["video"], batch["start"], batch["mask"]):
        record = run.pseudo[video.id]
        segments, inside = data.crop_segments(
            record["segments"], video, start, int(mask.sum()), run.s.crop_keep)
        used = teaches(record) & inside
        masked = ~teaches(record) & (run.s.rejected == "masked")
        rejected = record["segments"][masked] - start
        if not used.any():
            rejected = torch.tensor([[-math.inf, math.inf]])
        instances.append({
            "segments": segments[used], "labels": record["labels"][used], "rejected": rejected})
    return instances


def batch_losses(run, batch, instances, kind):
    """The terms of L_x of a batch: what objective() takes, and "positives", how many points are.

    instances  B records {"segments", "labels", "rejected"}, ground truth or pseudo labels
    kind       "labelled" or "unlabelled", each with its own running mean T+"""
    s, K = run.s, len(run.data.classes)
    lam = 1.0
    if s.mixup and kind == "labelled":
        batch, lam = data.mixed(batch, s.mixup)
    outputs = model.forward(run.detector, batch, s)
    total = sum(x.detach().sum() for x in outputs.predictions())
    journal.check_finite(run, "output", total, batch["id"])
    instances = [{key: value.to(s.device) for key, value in r.items()} for r in instances]
    losses = s.losses(outputs, instances, K)  # of alqa.point_losses()
    if lam < 1:  # MixUp, Table 1
        opposite = s.losses(outputs, instances[::-1], K)
        losses = {key: lam * losses[key] + (1 - lam) * opposite[key] for key in losses}
    positives, t_plus = losses["positives"], run.t_plus[kind]
    moved = s.t_plus_momentum * t_plus + (1 - s.t_plus_momentum) * positives
    run.t_plus[kind] = torch.where(positives > 0, moved, t_plus)
    L_acp = torch.zeros((), device=s.device)
    if s.acp != "none" and kind in s.acp_after.split("+"):  # Tab. S4
        L_acp = acp.acp_loss((outputs.levels, outputs.masks), batch["feats"].to(s.device),
                             instances, K, s, run.generator)
    return losses | {"t_plus": run.t_plus[kind], "acp": L_acp}


# ---- The run ------------------------------------------------------------------------------------

@dataclass
class Run:
    """A run: what it reads, and everything that training changes."""
    s: Settings
    data: data.Dataset
    detector: model.Detector  # or what else the settings build
    ema: model.Detector  # its averaged weights
    discriminator: icd.Discriminator
    icd_optimizer: torch.optim.Optimizer
    bank: dict  # the labelled instances, as icd.bank_of() has them
    t_plus: dict  # the running mean T+ of each kind of videos
    plan: dict  # {stage: (epochs, steps of an epoch, cost of a step)}
    at: runs.Progress
    folder: runs.Folder
    optimizer: torch.optim.Optimizer  # of the stage
    generator: torch.Generator = None  # of the epoch
    rng: dict = None  # the states of the generators in the midst of an epoch, when resumed
    pseudo: dict = None  # {id: record}, the pseudo labels
    theta_h: float = None  # its mean when they were made
    supervised_mAP: float = None  # the average at the end of stage 2
    trust: dict = None  # how far to trust a list of new actions, at the run's end
    pace: runs.Pace = None  # of the stage
    steps: list = None  # the losses of the epoch's steps, a dict each

    def __post_init__(self):
        # Listed once: to walk through the modules takes a twentieth of a small detector's step.
        self.weights = list(self.detector.parameters())
        self.averages = list(self.ema.parameters())

    def parts(self):
        """What has a state of its own: by its key in a checkpoint."""
        return {"detector": self.detector, "ema": self.ema, "icd": self.discriminator,
                "optimizer": self.optimizer, "icd_optimizer": self.icd_optimizer}


def make_optimizer(detector, s):
    """AdamW; weight decay for the matrices only, as ActionFormer has it."""
    matrices = [p for p in detector.parameters() if p.ndim > 1]
    rest = [p for p in detector.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)


def plan_of(s, dataset):
    """{stage: (epochs, steps of an epoch, cost of a step)} of the stages that are asked for."""
    labelled, unlabelled = len(dataset.labelled), len(dataset.unlabelled)
    batch = s.batch * processes.process_count()
    least = math.ceil(s.supervised_steps / s.supervised_epochs)
    plan = {
        "pretrain": (s.pretrain_epochs, math.ceil((labelled + unlabelled) / batch), 1),
        "supervised": (s.supervised_epochs, max(math.ceil(labelled / batch), least), 1),
        "joint": (s.joint_epochs, math.ceil(unlabelled / batch), 2),  # a batch of either kind
    }
    first = int(s.acp == "none")
    last = {"pretrain": 1, "supervised": 2, "all": 3 if unlabelled else 2}[s.stage]
    return {stage: plan[stage] for stage in STAGES[first:last]}


def begin(s, dataset):
    """A new Run."""
    torch.manual_seed(s.seed)
    detector = s.build(dataset.dim, len(dataset.classes)).to(s.device)
    if s.init and not s.resume:
        say(public.take_weights(detector, s.init, dataset.classes))
    discriminator = icd.Discriminator(dataset.dim, s.icd_hidden, s.icd_dropout).to(s.device)
    labelled = (data.load_item(video, dataset, s) for video in dataset.labelled)
    bank = icd.bank_of(labelled, s.icd_pool, s.icd_score)
    bank["feats"] = bank["feats"].to(s.device)
    return Run(
        s, dataset, detector, copy.deepcopy(detector).requires_grad_(False), discriminator,
        torch.optim.Adam(discriminator.parameters(), lr=s.icd_lr, fused=True), bank,
        t_plus=dict.fromkeys(("labelled", "unlabelled"), torch.tensor(s.t_plus, device=s.device)),
        plan=plan_of(s, dataset),
        at=runs.Progress("pretrain" if s.acp != "none" else "supervised"),
        folder=runs.Folder(Path(s.out)),
        optimizer=make_optimizer(detector, s))


# ---- One step -----------------------------------------------------------------------------------

def learning_rate(s, step, total):
    """The learning rate at a step of a stage of `total`: linear warm-up, then cosine decay."""
    warm = max(s.warmup * total, 1)
    linear = (step + 1) / warm  # over 1 after the warm-up
    done = max(step - warm, 0) / max(total - warm, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return s.lr * min(linear, cosine)


def average_weights(run):
    """Move the averaged weights towards the detector's, fast at first."""
    decay = min(run.s.ema, (1 + run.at.ema_step) / (10 + run.at.ema_step))
    get_ema_multi_avg_fn(decay)(run.averages, run.weights, None)


def reported(run):
    """The detector with the weights that the run reports, and that make its pseudo labels.

    The paper has no averaged weights."""
    return run.ema if run.s.weights == "ema" else run.detector


def advance(run, loss, parts, ids):
    """One optimiser step on `loss`; raises Stopped, with the run saved, if a signal came.

    parts  what the log shows of the loss
    ids    of the step's videos"""
    s, at = run.s, run.at
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(s, at.step, run.pace.total)
    run.optimizer.zero_grad()
    loss.backward()
    processes.sum_gradients(run.detector)
    norm = torch.nn.utils.clip_grad_norm_(run.weights, s.clip)
    # One look at numbers that a GPU may still be computing.
    for what, value in zip(("loss", "gradient"), torch.stack([loss.detach(), norm]).tolist()):
        journal.check_finite(run, what, value, ids)
    run.optimizer.step()
    average_weights(run)
    at.count_step()
    journal.show_step(run, {"loss": loss} | parts)
    if runs.asked_to_stop(run.folder.stop, s.device):
        resume.save(run)
        raise runs.Stopped


# ---- Stages 1 and 2 -----------------------------------------------------------------------------

def batches_of(run, videos, rng):
    """The batches of an epoch that are still to do, of some videos; without any, None each."""
    if not videos:
        return itertools.repeat(None)
    steps = run.plan[run.at.stage][1]
    return data.training_batches(videos, run.data, run.s, steps, rng, run.at.done)


def pretrain(run, rng):
    """An epoch of stage 1, ACP: contrast the steps of all training videos; no label is read."""
    s = run.s
    videos = [data.blind(video) for video in run.data.labelled + run.data.unlabelled]
    for batch in batches_of(run, videos, rng):
        pyramid = model.forward(run.detector.pyramid, batch, s)
        feats = batch["feats"].to(s.device)
        L_acp = acp.acp_loss(pyramid, feats, None, len(run.data.classes), s, run.generator)
        advance(run, L_acp, {}, batch["ids"])


def train_icd(run, batch):
    """One step of ICD's own optimiser on all instances of a batch's videos; returns the loss.

    Every process does it all; with --icd none its similarities only stand in pseudo_labels.json."""
    mine = [i for i, name in enumerate(run.bank["videos"]) if name in batch["ids"]]
    with processes.one_draw(run.generator):
        L_icd = icd.icd_loss(run.discriminator, run.bank, mine, run.s.icd_pairs, run.generator)
    run.icd_optimizer.zero_grad()
    L_icd.backward()
    run.icd_optimizer.step()
    return L_icd


def supervised(run, rng):
    """An epoch of stage 2: the detector on labelled videos, ICD beside it."""
    for batch in batches_of(run, run.data.labelled, rng):
        sup = batch_losses(run, batch, data.ground_truth(batch), "labelled")
        L_icd = train_icd(run, batch)
        advance(run, objective(sup, None, run.s), sup | {"icd": L_icd}, batch["ids"])


# ---- Stage 3 ------------------------------------------------------------------------------------

def detect_unlabelled(run):
    """Detections of the unlabelled videos {id: record}, without repeats (not in the paper)."""
    s = run.s
    detections = evaluate.detect(
        Passes(reported(run), s.passes), run.data.unlabelled, run.data, s)
    exclusive = s.exclusive and not alqa.classes_share_segments(run.data.labelled, s.repeat)
    for name, record in detections.items():
        if s.rerank:
            record = alqa.rerank(record, s.repeat)
        detections[name] = alqa.without_repeats(record, s.repeat, exclusive)
    return detections


def compare_with_labelled(run, selected):
    """ICD compares detections {id: record} with the labelled instances of the classes."""
    s = run.s
    run.discriminator.eval()
    bank = run.bank | {"W_b": icd.W_b_of(run.discriminator, run.bank)}
    compared = {}
    for video in processes.share_of(run.data.unlabelled):
        feats = data.load_item(video, run.data, s)["feats"].to(s.device)
        compared[video.id] = icd.compare(
            selected[video.id], run.discriminator, bank, feats, s.icd_pool, s.icd_score)
    return processes.dict_of_all(compared)


def report_pseudo_labels(run, best=None):
    """Log how many pseudo labels of each kind there are, and with --audit how good those that
    teach; print it where they are new, and warn where none teaches.

    best  the best score of what they were made of; None: they are not new"""
    status = data.gather(run.pseudo, "status").long()
    kept, dropped, mined, candidates = counts = status.bincount(minlength=len(icd.STATUS)).tolist()
    taught = {name: data.take(record, teaches(record)) for name, record in run.pseudo.items()}
    quality = evaluate.pseudo_label_quality(taught, run.data.hidden) if run.data.hidden else {}
    run.folder.log(
        run.at, positives=kept + dropped, candidates=mined + candidates, dropped=dropped,
        mined=mined, theta_h=run.theta_h, **quality)
    if best is None:
        return
    theta_h = "-" if run.theta_h is None else f"{run.theta_h:.3f}"
    if not kept + mined:
        journal.note(run, f"no pseudo label: the best score is {best:.3f}, theta_l {run.s.theta_l},"
                     f" theta_h {theta_h}; stage 3 learns from the labelled videos alone")
    states = ", ".join(map("{} {}".format, counts, icd.STATUS))
    say(f"pseudo labels: {states}; theta_h {theta_h} on average")


def joint(run, rng):
    """An epoch of stage 3, Fig. 1: detect on unlabelled videos, ALQA selects, ICD compares and
    refines; labelled videos and pseudo labels teach, videos without one do not (not in the paper).
    Pseudo labels are made as the first epoch begins, and anew after every s.refresh epochs."""
    s, at, best = run.s, run.at, None  # best stays None where pseudo labels are not new
    fresh = not at.done  # an epoch from its start, not resumed amid it
    due = run.pseudo is None or (s.refresh and at.epoch % s.refresh == 0)
    if fresh and due:
        detections = detect_unlabelled(run)
        selected, thetas = alqa.select(
            detections, s.theta_l, s.threshold, s.theta_fixed, s.scope)
        compared = compare_with_labelled(run, selected)
        run.pseudo = {name: icd.refine(record, s.theta_drop, s.theta_mine, s.icd)
                      for name, record in compared.items()}
        run.theta_h = float(np.mean(thetas)) if thetas else None
        best = max(data.gather(detections, "scores").tolist(), default=0)
    if fresh:
        report_pseudo_labels(run, best)
    teaching = [video for video in run.data.unlabelled if teaches(run.pseudo[video.id]).any()]
    batches = batches_of(run, run.data.labelled, rng)
    for batch, pseudo_batch in zip(batches, batches_of(run, teaching, rng)):
        sup = batch_losses(run, batch, data.ground_truth(batch), "labelled")
        unsup, parts, ids = None, sup, batch["ids"]
        if pseudo_batch:
            truth = pseudo_truth(run, pseudo_batch)
            unsup = batch_losses(run, pseudo_batch, truth, "unlabelled")
            parts = sup | {f"unsup_{key}": value for key, value in unsup.items()}
            ids = ids + pseudo_batch["ids"]
        advance(run, objective(sup, unsup, s), parts, ids)


# ---- The stages, one after the other ------------------------------------------------------------

def begin_stage(run, stage):
    """Begin a stage, unless the run is in it already; without an epoch to do, save.

    Each has an optimiser, a warm-up and a decay of its own (not given in the paper)."""
    if stage != run.at.stage:
        run.at = runs.Progress(stage, ema_step=run.at.ema_step)
        run.optimizer = make_optimizer(run.detector, run.s)
    run.pace = runs.Pace(run.plan, stage, run.at.step)
    if run.at.epoch >= run.plan[stage][0]:
        resume.save(run)


def begin_epoch(run):
    """Begin an epoch -> its numpy generator.

    Seeded by (seed, stage, epoch) alone: a resumed run goes on exactly as it would have."""
    at = run.at
    seeds = np.random.SeedSequence(
        [run.s.seed, SEED_OF_STAGE + STAGES.index(at.stage), at.epoch])
    of_network, of_run = map(int, seeds.generate_state(2))
    torch.manual_seed(of_network)
    run.generator = torch.Generator().manual_seed(of_run)
    if at.done:
        checkpoints.set_generators(run.rng, run.generator, run.s.device)
    run.detector.train()
    run.discriminator.train()
    run.steps = []
    run.folder.stop.gently = True
    return np.random.default_rng(seeds)


def end_epoch(run):
    """End an epoch: save the whole run, print a line; raises Stopped if a signal came."""
    run.at.epoch += 1
    run.at.done = 0
    resume.save(run)
    journal.show_epoch(run)
    run.folder.stop.gently = False
    if runs.asked_to_stop(run.folder.stop, run.s.device):
        raise runs.Stopped


def end_stage(run):
    """What follows a stage: Fig. 4's points after the first, mAP after the second if not last."""
    s = run.s
    if run.at.stage == "pretrain" and s.page:
        journal.run_extra(run, "fig4")
    if run.at.stage == "supervised" and "joint" in run.plan and run.data.truth:
        metrics, _ = evaluate.evaluate_detector(reported(run), run.data, s)
        run.supervised_mAP = metrics["average_mAP"]


PSEUDO_LABEL = {  # what pseudo_labels.json says of each: by key, the column of icd.refine()
    "label": "labels", "segment": "segments", "score": "scores", "class_score": "p_cls",
    "tIoU": "p_tiou", "tND": "p_tnd", "similarity": "similarity", "status": "status",
}


def finish(run):
    """Detect on the test videos with the weights of the last epoch; what a run leaves."""
    s, d = run.s, run.data
    run.trust = {"exclusive": not alqa.classes_share_segments(d.labelled, SAME)}
    if d.test:
        journal.report(run, {
            "raw": evaluate.evaluate_detector(run.detector, d, s),
            "ema": evaluate.evaluate_detector(run.ema, d, s)}, evaluate.mean_average_precision)
    if not is_first():
        return
    names = {"labels": d.classes, "status": icd.STATUS}
    pseudo = evaluate.export(d.unlabelled, run.pseudo, PSEUDO_LABEL, names)
    files.write_json(run.folder.path / "pseudo_labels.json", pseudo, indent=1)
    resume.save_detector(run)
    journal.farewell(run)


def train(run):
    """The stages that the settings ask for, one after the other, and the report."""
    epoch_of = {"pretrain": pretrain, "supervised": supervised, "joint": joint} | run.s.epochs()
    begun = STAGES.index(run.at.stage)
    for stage in run.plan:
        if STAGES.index(stage) < begun:
            continue
        begin_stage(run, stage)
        while run.at.epoch < run.plan[stage][0]:
            rng = begin_epoch(run)
            epoch_of[stage](run, rng)
            end_epoch(run)
        end_stage(run)
    if run.s.stage != "pretrain":
        finish(run)


# ---- The command line ---------------------------------------------------------------------------

def launch(s):
    """The Run that the settings ask for, new, resumed or begun at another's; raises BadInput."""
    runs.check_folder(s)
    dataset = data.training_data(s)
    say(checks.describe(dataset, s))
    warn(dataset.warnings)
    run = begin(s, dataset)
    checks.check_positives(run.detector, dataset, s)
    # What a restored pseudo label may hold: whole numbers below a limit; None: real ones.
    limits = dict.fromkeys(PSEUDO_LABEL.values()) | {
        "labels": len(dataset.classes), "status": len(icd.STATUS)}
    resume.restore(run, STAGES, limits)
    return run


def carry_out(argv, kind, guard):
    """Do what a command line asks for, in a guard of runs -> its Stop; kind builds all."""
    with guard("; nothing was saved yet") as stop:
        s = settings_of(argv, kind)
        processes.join_processes(s.device)
        run = launch(s)
        if not s.check:
            resume.take_folder(run, stop, STAGES)
            train(run)
    return stop


def fit(*, kind=Settings, **given):
    """From Python: settings as of the command line, fit(dataset="my.json", stride=25, ...).

    -> the content of metrics.json, or None, and a Localizer; with check=True twice None. Raises
    BadInput; after a signal KeyboardInterrupt, when the step under way is saved."""
    folder = carry_out(words_of(given, kind), kind, runs.watch).folder
    if not folder:
        return None, None
    localize = evaluate.Localizer(folder, kind, device=given.get("device") or "auto")
    return journal.metrics_of(folder), localize


def main(argv=None, kind=Settings):
    """The command line -> the exit code; kind: the class of the settings."""
    return carry_out(argv, kind, runs.guard).code


if __name__ == "__main__":
    sys.exit(main())
