"""APL, adaptive pseudo-label learning: the settings, the three stages and Eq. (12).

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
import argparse
import copy
import fcntl
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# torch reads it when it is imported. On a machine with other work, threads that spin while they
# wait make a step 10 times slower; on a quiet one this costs nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
from data import (
    BadInput,
    column,
    from_stage_2,
    from_stage_3,
    of_run,
    process_count,
    rows,
    say,
    setting,
    several,
    short,
)
from icd import REFINEMENTS, SCORES

STAGES = ("pretrain", "supervised", "joint")
AFTER = ("none", "labelled", "labelled+unlabelled")  # the rows of Tab. S4
KINDS = ("labelled", "unlabelled")  # of the two losses of Eq. (12)
LABELLED, UNLABELLED = range(2)
SEED_OF_STAGE = 10  # added to a stage's number in its epochs' seeds: 0 and 1 are of toy and split


# ---- The losses of the points -------------------------------------------------------------------

def point_losses(outputs, instances, num_classes, s):
    """The sums over the points of a batch, of all processes: what alqa.alqa_losses() gives.

    The points inside a rejected segment are neither action nor background, unless they are
    positive for another.
    instances  B records {"segments", "labels", "rejected"}"""
    segments = [r["segments"] for r in instances]
    labels = [r["labels"] for r in instances]
    cls_target, offset_target = model.assign_targets(
        outputs.points, segments, labels, num_classes, s.radius)
    time = outputs.points.time
    unsure = torch.stack([acp.covers(r["rejected"], time).any(1) for r in instances])  # (B, P)
    use = outputs.mask & (cls_target.any(-1) | ~unsure)
    losses_of = alqa.plain_losses if s.alqa == "none" else alqa.alqa_losses
    losses = losses_of(outputs, cls_target, offset_target, use, s)
    return {key: data.sum_of_all(value) for key, value in losses.items()}


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
    beta: float = from_stage_2(
        2.0, "focusing exponent of Eq. (5), whose gradient is infinite below 1 [J]", "at least 1")
    label_smoothing: float = from_stage_2(
        0.0, "of the targets of the focal loss without quality branches; those of Eq. (5) are soft "
        "already [A]", "a share")
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
        "rerank by the spread of overlapping boundaries, reconstructed from NPL [53] (Table 1) [J]")
    # ICD
    icd: str = from_stage_3(
        "eap+mpp",
        "drop ambiguous positives (eap), mine potential ones (mpp) [S]", REFINEMENTS)
    icd_score: str = from_stage_2(
        "absolute",
        "similarity to the class [S]; relative: less that to the next best, for thresholds around "
        "0 (-0.2 and 0.2) [J]", SCORES)
    theta_drop: float = from_stage_3(
        0.3, "positives of a smaller similarity are dropped [S]", "from -1 to 1")
    theta_mine: float = from_stage_3(
        0.7, "candidates of a larger similarity are mined [S]", "from -1 to 1")
    icd_pairs: int = from_stage_2(
        10, "instances of the same class and of others, Eq. (7) [S]", "from 1 to 8192")
    icd_pool: str = from_stage_2("max", "pooling over time [S: max]", ("max", "mean"))
    icd_hidden: int = setting(128, "hidden width of Eq. (9) [S, by Tab. S6]", "from 1 to 8192")
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
    acp_steps: int = setting(40, "steps m drawn from a video [J]", "from 1 to 8192")
    acp_clusters: int = setting(
        4, "clusters of the fine contrast in a batch [S: 4 THUMOS14, 2 ActivityNet]",
        "from 1 to 8192")
    acp_restarts: int = setting(10, "restarts of K-means [J]", "from 1 to 8192")
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
        "MixUp of a batch's labelled videos (Table 1): alpha of Beta(alpha, alpha) [J]; 0: none")
    # training
    lr: float = setting(1e-4, "learning rate of AdamW, cosine decay [S]", "positive")
    weight_decay: float = setting(1e-4, "of the matrices [S]")
    warmup: float = setting(
        0.14, "linear warm-up, as a share of a stage: 5 of 35 epochs [J]", "a share")
    clip: float = setting(1.0, "gradient norm [J]", "positive")
    pretrain_epochs: int = setting(15, "stage 1 [S]", "from 0 to a million")
    supervised_epochs: int = from_stage_2(
        35, "stage 2, warm-up included [J]", "from 1 to a million")
    supervised_steps: int = from_stage_2(
        1500, "stage 2 has at least as many steps [J]", "from 0 to a million")
    joint_epochs: int = from_stage_3(
        40, "stage 3 [S: 40 THUMOS14, 15 ActivityNet]", "from 0 to a million")
    refresh: int = from_stage_3(
        0,
        "epochs after which pseudo labels are made anew; 0: once, after stage 2 [J]")
    pseudo_weights: str = from_stage_3(
        "raw", "weights that make the pseudo labels [J]", ("raw", "ema"))
    ema: float = setting(
        0.999, "decay of the averaged weights, at most (1 + t) / (10 + t) [J]", "a share")
    # run
    out: str = of_run(
        "", "folder of all that the run writes; none: runs/<dataset>, or the next free number")
    overwrite: bool = of_run(False, "begin anew in a folder that holds a run")
    check: bool = of_run(False, "report on the data and stop")
    stage: str = of_run(
        "all", "last stage; supervised: ActF* of Table 1 with --alqa none --acp none",
        ("all", *STAGES[:2]))
    start: str = of_run(
        "", "checkpoint of another run to go on from; --lr, --warmup and --clip may differ")
    init: str = of_run(
        "", "checkpoint to take fitting weights from: a public ActionFormer's, or of another run")
    resume: str = of_run("", "folder of a run to go on with, with its settings")
    log_every: int = of_run(20, "steps between two rows of log.jsonl", "positive")
    page: bool = of_run(True, "write page.html at the end, the run to look at in a browser")

    def __post_init__(self):
        super().__post_init__()
        if self.mixup and self.acp != "none" and self.acp_after != "none":
            raise BadInput("setting mixup leaves no video whose steps have one class each: "
                           "it needs acp or acp_after none")
        if self.mixup and self.batch % 2:
            raise BadInput("setting mixup pairs the videos of a batch: "
                           f"setting batch must be even, but is {self.batch}")
        if self.icd_score == "absolute" and self.theta_drop < 0:
            raise BadInput(f"setting theta_drop, {self.theta_drop:g}, drops nothing of absolute "
                           "similarities, which are not negative: the paper has --theta-drop 0.3 "
                           "--theta-mine 0.7")
        if self.rerank and self.repeat == 1:
            raise BadInput("setting rerank looks at detections whose tIoU is over the setting "
                           "repeat, which must be below 1")

    TRAIN, EVALUATE = "python train.py", "python evaluate.py"  # this detector's commands

    @classmethod
    def preset(cls, dataset):
        """What --dataset changes."""
        return PRESETS.get(dataset, OWN)

    def losses(self, outputs, instances, num_classes):
        """The losses of a batch's points."""
        return point_losses(outputs, instances, num_classes, self)

    def can_learn(self, detector, video, num_classes):
        """Whether a point of the detector is positive for an instance of a LabelledVideo."""
        points = detector.points(video.steps)
        segments, labels = video.segments.to(self.device), video.labels.to(self.device)
        return model.assign_targets(
            points, [segments], [labels], num_classes, self.radius)[0].any()


def settings_until(stage, kind=Settings):
    """The names of the settings that the stages up to this one depend on."""
    until = STAGES[:STAGES.index(stage) + 1]
    return [f.name for f in fields(kind) if f.metadata["stage"] in until]


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
    "crop_keep": 0.3,
    "supervised_epochs": 21,
    "warmup": 0.238,  # 5 of 21 epochs
}
OWN = {  # a user's own data
    "channels": 128,
    "windows": "9",
    "lr": 1e-3,
    "supervised_steps": 400,
    "joint_epochs": 10,
    "input_dropout": 0.3,
    "acp": "none",  # its gain goes from 5 points up to 5 down
    "icd_pool": "mean",
    "icd_score": "relative",
    "theta_drop": -0.2,
    "theta_mine": 0.2,
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
        "acp": "coarse+fine",  # all three stages
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
        "vote": 0.9,
        "min_length": 0.001,
        "label_smoothing": 0.1,
        "supervised_epochs": 15,
        "warmup": 1 / 3,
        "max_detections": 100,
        "batch": 16,
        "lr": 1e-3,
        "acp_clusters": 2,
        "joint_epochs": 15,
        "scope": "dataset",
        "tiou": "0.5:0.95:0.05",
    },
    "epic-verb": EPIC,
    "epic-noun": EPIC | {
        "label_smoothing": 0.1,
    },
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


# ---- Signals ------------------------------------------------------------------------------------

@dataclass
class Stop:
    """Whether Ctrl-C or SIGTERM has asked a run to stop."""
    signal: int = 0  # which did; 0: none
    gently: bool = False  # whether a step is under way, which is finished and saved first


class Stopped(Exception):
    """A signal has stopped the run."""


class Diverged(BadInput):
    """The loss or a gradient is no number any more."""


def on_signals(stop):
    """Let Ctrl-C and SIGTERM fill a Stop -> what they did before, {signal: handler}.

    Raises Stopped where no step is under way, and at the second signal. What the shell ignores,
    as under nohup, stays ignored."""
    def handle(number, frame):
        again = stop.signal
        stop.signal = number
        if again or not stop.gently:
            raise Stopped
    heard = [number for number in (signal.SIGINT, signal.SIGTERM)
             if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in heard}


# ---- The run ------------------------------------------------------------------------------------

@dataclass
class Run:
    """A run: what it reads, and everything that training changes."""
    s: Settings
    data: data.Dataset
    out: Path
    detector: model.Detector  # or what else the settings build
    ema: model.Detector  # its averaged weights
    discriminator: icd.Discriminator
    discriminator_optimizer: torch.optim.Optimizer
    bank: dict  # the labelled instances, as icd.bank_of() has them
    t_plus: torch.Tensor  # (2,), the running mean T+ of each branch
    stage: str  # one of STAGES
    taken: str = ""  # what --init gave, in words
    epoch: int = 0  # of the stage, done so far
    step: int = 0  # of the stage, done so far
    total: int = 0  # steps of the stage
    ema_step: int = 0  # steps of all stages, done so far
    optimizer: torch.optim.Optimizer = None  # of the stage
    generator: torch.Generator = None  # of the epoch
    done: int = 0  # steps of the epoch, done so far
    rng: dict = None  # the states of the generators in the midst of an epoch
    pseudo: dict = None  # {id: record}, the pseudo labels
    theta_h: float = None  # its mean when they were made
    supervised_mAP: float = None  # the average at the end of stage 2
    clock: tuple = None  # (step, time) when the stage began or went on
    losses: list = field(default_factory=list)  # of the epoch's steps
    parts: list = field(default_factory=list)  # of the epoch's losses, a dict a step
    rows: list = field(default_factory=list)  # of the log, until the folder is this run's
    saved: bool = False  # whether the files in the folder are this run's
    lock: object = None  # the open file that keeps other runs out of the folder
    stop: Stop = field(default_factory=Stop)  # what the signals have asked for


def begin(s, dataset):
    """A new Run."""
    torch.manual_seed(s.seed)
    detector = s.build(dataset.dim, len(dataset.classes)).to(s.device)
    taken = evaluate.take_weights(detector, s.init) if s.init else ""
    ema = copy.deepcopy(detector).requires_grad_(False)
    discriminator = icd.Discriminator(dataset.dim, s.icd_hidden, s.icd_dropout).to(s.device)
    adam = torch.optim.Adam(discriminator.parameters(), lr=s.icd_lr)
    labelled = (data.load_item(video, dataset, s) for video in dataset.labelled)
    bank = icd.bank_of(labelled, s.icd_pool, s.icd_score)
    bank["feats"] = bank["feats"].to(s.device)
    t_plus = torch.full((2,), s.t_plus, device=s.device)
    stage = "pretrain" if s.acp != "none" else "supervised"
    return Run(
        s, dataset, Path(s.out), detector, ema, discriminator, adam, bank, t_plus, stage,
        taken=taken)


def make_optimizer(detector, s):
    """AdamW; weight decay for the matrices only, as ActionFormer has it."""
    matrices = [p for p in detector.parameters() if p.ndim > 1]
    rest = [p for p in detector.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)


# ---- Checkpoints --------------------------------------------------------------------------------

# What a checkpoint holds: by its key, the field of the run.
MODULES = {
    "detector": "detector",
    "ema": "ema",
    "icd": "discriminator",
    "icd_optimizer": "discriminator_optimizer",
    "optimizer": "optimizer",
}
COUNTS = ("epoch", "step", "ema_step", "done")
NUMBERS = ("stage", *COUNTS, "t_plus", "pseudo", "theta_h", "rng", "supervised_mAP")
PARTS = {*MODULES, *NUMBERS, "processes", "labelled", "fingerprint", "instances"}
TUNED = ("lr", "warmup", "clip")  # what may differ from those of --start
RESULTS = ("metrics.json", "predictions.json", "pseudo_labels.json", "detector.pt", "page.html")


def instances_of(videos):
    """{id: [[start, end, label]]} of LabelledVideos."""
    found = {}
    for video in videos:
        both = torch.cat([video.segments, video.labels[:, None]], 1)
        found[video.id] = both.tolist()
    return found


def states_of_generators(run):
    """The states of the generators that an epoch draws from."""
    states = {"torch": torch.get_rng_state(), "run": run.generator.get_state()}
    if run.s.device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(run.s.device)
    return states


def set_generators(run):
    """Go on in the midst of an epoch: set the generators to the states that were saved."""
    torch.set_rng_state(run.rng["torch"])
    run.generator.set_state(run.rng["run"])
    if "cuda" in run.rng and run.s.device.startswith("cuda"):
        torch.cuda.set_rng_state(run.rng["cuda"], run.s.device)


def listed(segments, labels):
    """Instances as ActivityNet's annotation files have them."""
    return [{"segment": segment, "label": label} for segment, label in zip(segments, labels)]


def videos_of(dataset):
    """What a run knows of its videos: {id: {"part", "duration", "annotations"}}.

    Annotations in seconds; None where there are none, or where they are hidden from the run."""
    found = {}
    for part in ("labelled", "unlabelled", "test"):
        for video in getattr(dataset, part):
            found[video.id] = {"part": part, "duration": video.duration, "annotations": None}
    for video in dataset.labelled:
        names = [dataset.classes[label] for label in video.labels]
        found[video.id]["annotations"] = listed(video.in_seconds(video.segments).tolist(), names)
    for name, a in dataset.ground_truth.items():
        found[name]["annotations"] = listed(a.segments.tolist(), a.labels)
    return found


def write_configuration(run):
    """What the run does, in config.json, and with which videos, in split.json and videos.json."""
    dataset = run.data
    split = {
        "labelled": [video.id for video in dataset.labelled],
        "unlabelled": [video.id for video in dataset.unlabelled],
        "missing_classes": dataset.missing,
    }
    data.write_json(run.out / "config.json", asdict(run.s), indent=1)
    data.write_json(run.out / "split.json", split, indent=1)
    data.write_json(run.out / "videos.json", videos_of(dataset))


def shape_of(run):
    """What evaluation needs of a run beside the weights."""
    videos = run.data.labelled + run.data.unlabelled
    return {
        "settings": asdict(run.s),
        "classes": run.data.classes,
        "mean": run.data.mean,
        "std": run.data.std,
        "fps": float(np.median([video.grid.fps for video in videos])),
    }


def save_detector(run):
    """The reported weights alone, enough for detection on new videos."""
    part = evaluate.WEIGHTS[run.s.weights]
    content = shape_of(run) | {part: getattr(run, part).state_dict()}
    data.write_atomically(run.out / "detector.pt", lambda file: torch.save(content, file))


def save(run):
    """The whole run as one file, written by the first process.

    At the first of a new run the results that another left in the folder go."""
    if not data.is_first():
        return
    run.rng = states_of_generators(run) if run.done else None
    content = shape_of(run)
    content |= {key: getattr(run, name).state_dict() for key, name in MODULES.items()}
    content |= {name: getattr(run, name) for name in NUMBERS}
    content |= {
        "processes": process_count(),
        "labelled": [video.id for video in run.data.labelled],
        "fingerprint": run.data.fingerprint,
        "instances": instances_of(run.data.labelled),
    }
    path = run.out / "checkpoint.pt"
    data.write_atomically(path, lambda file: torch.save(content, file))
    if not run.saved:
        for name in RESULTS:
            (run.out / name).unlink(missing_ok=True)
        write_configuration(run)
        data.write_rows(run.out / "log.jsonl", run.rows)
        run.saved = True


def check_optimizer(found, optimizer, where):
    """Raise BadInput unless an optimizer's saved state fits its parameters: torch would crash."""
    expected = optimizer.state_dict()["param_groups"]
    groups = found.get("param_groups") if isinstance(found, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise BadInput(f"{where} is not of this version: its optimizer has no groups")
    for group in groups:
        if any(isinstance(value, torch.Tensor) for value in group.values()):
            raise BadInput(f"{where} is not of this version: its optimizer has other groups")
        rate = group.get("lr")
        if not isinstance(rate, float) or not 0 <= rate <= 1e12:
            raise BadInput(f"{where} is not usable: its optimizer's lr is {data.shown(rate)}")
    if [group | {"lr": 0} for group in groups] != [group | {"lr": 0} for group in expected]:
        raise BadInput(f"{where} is not of this version: its optimizer has other groups")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = found.get("state")
    if not isinstance(states, dict) or not states.keys() <= set(range(len(params))):
        raise BadInput(f"{where} is not of this version: its optimizer has other parameters")
    for i, state in states.items():
        shapes = {"step": torch.zeros(()), "exp_avg": params[i], "exp_avg_sq": params[i]}
        evaluate.check_weights(state, shapes, f"{where}, optimizer, parameter {i}")


def check_pseudo_labels(records, run, where):
    """Raise BadInput unless saved pseudo labels are those of the run's unlabelled videos."""
    if records is None:
        return
    ids = {video.id for video in run.data.unlabelled}
    if not isinstance(records, dict) or records.keys() != ids:
        raise BadInput(f"{where} is of other data: its pseudo labels are of other videos")
    for name, record in records.items():
        fault = f"{where} is not usable: the pseudo labels of {short(name)}"
        try:
            n = len(record["labels"])
            sane = record["segments"].shape == (n, 2) and record["segments"].isfinite().all()
            for key, least, most in (("labels", 0, len(run.data.classes)),
                                     ("status", 0, len(icd.STATUS)), ("scores", 0.0, 1e12)):
                x = record[key]
                sane = sane and x.shape == (n,) and ((x >= least) & (x < most)).all()
                sane = sane and x.is_floating_point() == isinstance(least, float)
            sane = sane and all(len(x) == n for x in record.values())
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError):
            sane = False
        if not sane:
            raise BadInput(f"{fault} are damaged")


def check_progress(content, run, where):
    """Raise BadInput unless a checkpoint says in a sane way how far its run is."""
    for name in COUNTS:
        if type(content[name]) is not int or content[name] < 0:
            raise BadInput(f"{where} is not usable: its {name} is {data.shown(content[name])}")
    if content["stage"] not in STAGES:
        raise BadInput(f"{where} is not usable: its stage is {data.shown(content['stage'])}")
    evaluate.check_weights({"t_plus": content["t_plus"]}, {"t_plus": run.t_plus}, where)
    for name in ("theta_h", "supervised_mAP"):
        value = content[name]
        if value is not None and not (isinstance(value, float) and math.isfinite(value)):
            raise BadInput(f"{where} is not usable: its {name} is {data.shown(value)}")
    states = content["rng"]
    if content["done"]:
        own = {"torch": torch.get_rng_state(), "run": torch.Generator().get_state()}
        kept = {key: states.get(key) for key in own} if isinstance(states, dict) else None
        evaluate.check_weights(kept, own, where)
        try:
            for state in kept.values():
                torch.Generator().set_state(state)
        except RuntimeError:
            raise BadInput(f"{where} is not usable: its random state is damaged") from None
    check_pseudo_labels(content["pseudo"], run, where)


def alike(theirs, mine):
    """Whether two lists of numbers are equal to rounding, whatever machine added them up."""
    try:
        a, b = np.array(theirs, dtype=np.float64), np.array(mine, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6)


def check_data(content, run, where):
    """Raise BadInput where features or labels are not those that a checkpoint was trained on."""
    dataset = run.data
    theirs, mine = content["fingerprint"], dataset.fingerprint
    instances = instances_of(dataset.labelled)
    if not isinstance(theirs, dict) or not isinstance(content["instances"], dict):
        raise BadInput(f"{where} is not of this version: it does not say what data it is of")
    if theirs.keys() != mine.keys():
        other = sorted(map(str, theirs.keys() ^ mine.keys()))
        raise BadInput(f"{where} is of other data: {len(other)} training videos are new or gone: "
                       f"{several(other)}")
    changed = [name for name in mine if not alike(theirs[name], mine[name])]
    if changed:
        raise BadInput(f"{where} is of other data: {len(changed)} videos have other features now: "
                       f"{several(changed)}")
    labelled = [video.id for video in dataset.labelled]
    if content["labelled"] != labelled or content["classes"] != dataset.classes:
        raise BadInput(f"{where} is of other data: its labelled videos or classes are not those "
                       f"of {short(run.s.dataset, 150)}")
    changed = [name for name in labelled
               if not alike(content["instances"].get(name), instances[name])]
    if changed:
        raise BadInput(f"{where} is of other data: {len(changed)} videos have other labels now: "
                       f"{several(changed)}")


def check_checkpoint(run, content, path):
    """Raise BadInput for a checkpoint that this run cannot go on from.

    What read_checkpoint() has not checked: all that training needs beside the detector."""
    where = f"checkpoint {path}"
    mine, theirs = asdict(run.s), content["settings"]
    if not PARTS <= set(content) or set(mine) != set(theirs):
        raise BadInput(f"{where} is not of this version: it lacks or adds settings or parts")
    evaluate.check_settings(theirs, type(run.s), where)
    check_progress(content, run, where)
    processes = content["processes"]
    as_many = type(processes) is int and processes == process_count()
    if not as_many and (content["done"] or not run.s.start):
        raise BadInput(
            f"{where} is of {data.shown(processes)} process(es), not {process_count()}")
    for name in settings_until(content["stage"], type(run.s)):
        if mine[name] != theirs[name] and not (run.s.start and name in TUNED):
            raise BadInput(f"{where} is of another configuration: its {name} is "
                           f"{data.shown(theirs[name])}, not {data.shown(mine[name])}")
    check_data(content, run, where)
    evaluate.check_weights(content["icd"], run.discriminator.state_dict(), where)
    for key in ("optimizer", "icd_optimizer"):
        check_optimizer(content[key], getattr(run, MODULES[key]), where)


def restore(run, path):
    """Load a checkpoint, the run's own or that of --start, into a run; raises BadInput."""
    content = evaluate.read_checkpoint(path, type(run.s))
    run.optimizer = make_optimizer(run.detector, run.s)
    check_checkpoint(run, content, path)
    for key, name in MODULES.items():
        getattr(run, name).load_state_dict(content[key])
    for name in NUMBERS:
        setattr(run, name, content[name])
    run.t_plus = run.t_plus.to(run.s.device)


# ---- The folder of a run ------------------------------------------------------------------------

def holds_run(folder):
    """Whether a folder holds a run that a new one would destroy."""
    return any((Path(folder) / name).exists() for name in ("checkpoint.pt", *RESULTS))


def free_folder(folder):
    """The folder, or that with the next number, which holds no run."""
    number = 1
    name = folder
    while holds_run(name):
        number += 1
        name = f"{folder}-{number}"
    return name


def keep_others_out(folder):
    """The open file that keeps other runs out of a folder until it is closed; raises BadInput."""
    file = open(folder / ".lock", "a")  # noqa: SIM115, open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BadInput(f"another run is writing to {folder}; give another --out") from None
    for left in folder.glob("*.tmp"):  # of a run that was killed while it wrote
        if re.fullmatch(r".+\.\d+\.tmp", left.name):
            left.unlink()
    return file


def log(run, **row):
    """A row of log.jsonl, by the first process."""
    if not data.is_first():
        return
    row = {"stage": run.stage, "epoch": run.epoch + 1} | row
    if run.saved:
        data.append_row(run.out / "log.jsonl", row)
    else:  # what lies in the folder goes when there is something better
        run.rows.append(row)


def take_up_log(run):
    """Of the log of a resumed run keep the rows up to its checkpoint."""
    path = run.out / "log.jsonl"
    kept = []
    reached = STAGES.index(run.stage), run.epoch
    for row in data.read_rows(path):
        whole = (STAGES.index(row["stage"]), row["epoch"]) <= reached
        begun = run.done and row["stage"] == run.stage and row.get("step", 0) <= run.step
        if whole or begun:
            kept.append(row)
    data.write_rows(path, kept)
    run.saved = True


def note(run, text):
    """A warning now, and again at the end of the run."""
    run.data.warnings.append(text)
    data.warn([text])


# ---- The console --------------------------------------------------------------------------------

COST = {"pretrain": 1, "supervised": 1, "joint": 2}  # of a step: stage 3 has two batches


def steps_of(run, videos):
    """The steps of an epoch over so many videos."""
    return math.ceil(len(videos) / (run.s.batch * process_count()))


def plan_of(run):
    """(epochs, steps of an epoch) of each stage."""
    s = run.s
    labelled, unlabelled = run.data.labelled, run.data.unlabelled
    least = math.ceil(s.supervised_steps / s.supervised_epochs)
    return {
        "pretrain": (s.pretrain_epochs, steps_of(run, labelled + unlabelled)),
        "supervised": (s.supervised_epochs, max(steps_of(run, labelled), least)),
        "joint": (s.joint_epochs, steps_of(run, unlabelled)),
    }


def time_left(run):
    """How long the whole run still takes at the pace of the present stage, in words."""
    first, since = run.clock
    pace = (time.time() - since) / max(run.step - first, 1) / COST[run.stage]
    last = {"pretrain": 0, "supervised": 1, "all": 2}[run.s.stage]
    work = COST[run.stage] * (run.total - run.step)
    for stage in STAGES[STAGES.index(run.stage) + 1:last + 1]:
        count, steps = plan_of(run)[stage]
        work += COST[stage] * count * steps
    minutes, seconds = divmod(round(pace * work), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left"


def is_terminal():
    """Whether somebody watches."""
    return data.is_first() and sys.stdout is not None and sys.stdout.isatty()


def show_progress(run):
    """A bar of the epoch's steps, where a terminal shows it."""
    if is_terminal():
        _, steps = plan_of(run)[run.stage]
        filled = 30 * run.done // steps
        bar = "#" * filled + "." * (30 - filled)
        sys.stdout.write(f"\r{run.stage:<10} [{bar}] {run.done}/{steps}  {time_left(run)} ")
        sys.stdout.flush()


def show_epoch(run, count):
    """A line of at most 100 columns about the epoch that has ended, by the first process."""
    if not data.is_first() or not run.losses:
        return
    words = [f"{run.stage:<10} {run.epoch:>3}/{count}  loss {np.mean(run.losses):.3f}"]
    for prefix, kind in (("", ""), ("unsup_", "pseudo: ")):
        steps = [part for part in run.parts if prefix + "t_plus" in part]
        shown = []
        for key in ("cls", "reg") if steps else ():
            each = [part[prefix + key] / part[prefix + "t_plus"] for part in steps]
            shown.append(f"{key} {torch.stack(each).mean():.3f}")
        if shown:
            words.append(kind + " ".join(shown))
    line = "  ".join([*words, time_left(run)])
    if is_terminal():  # over the bar
        sys.stdout.write("\r")
        line = f"{line:<80}"
    say(line)


# ---- Epochs -------------------------------------------------------------------------------------

def is_stopped(run):
    """Whether a signal has reached this process, or another that shares the batch."""
    if process_count() == 1:
        return run.stop.signal > 0
    asked = data.sum_of_all(torch.tensor(float(run.stop.signal > 0), device=run.s.device))
    return bool(asked > 0)


def epochs(run, stage, count, steps):
    """The epochs of a stage that are still to do; saves the whole run at the end of each.

    Every epoch draws from generators seeded by (seed, stage, epoch) alone, so a resumed run goes
    on exactly as it would have; run.done of its steps may be done already.
    -> yields each epoch's numpy generator"""
    number = STAGES.index(stage)
    if number < STAGES.index(run.stage):
        return
    if stage != run.stage or run.optimizer is None:
        run.stage, run.epoch, run.step, run.done = stage, 0, 0, 0
        run.optimizer = make_optimizer(run.detector, run.s)
    run.total = count * steps
    run.clock = (run.step, time.time())
    if count == 0:
        save(run)
    while run.epoch < count:
        seeds = np.random.SeedSequence([run.s.seed, SEED_OF_STAGE + number, run.epoch])
        of_network, of_run = (int(word) for word in seeds.generate_state(2))
        torch.manual_seed(of_network)
        run.generator = torch.Generator().manual_seed(of_run)
        if run.done:
            set_generators(run)
        run.detector.train()
        run.discriminator.train()
        run.stop.gently = True
        run.losses, run.parts = [], []
        yield np.random.default_rng(seeds)
        run.epoch += 1
        run.done = 0
        save(run)
        show_epoch(run, count)
        run.stop.gently = False
        if is_stopped(run):
            raise Stopped


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


def check_finite(run, what, value, ids):
    """Raise Diverged where the output, loss or gradient of a step is NaN or infinite."""
    if math.isfinite(value):
        return
    path = run.out / "checkpoint.pt"
    advice = "lower --lr"
    if run.saved:
        advice = f"go on from what is good by --start {path} --lr {run.s.lr / 10:g} --out ANOTHER"
    raise Diverged(f"training diverged: the {what} is {value} at step {run.step + 1} of stage "
                   f"{run.stage} (videos {several(ids)}); {advice}")


def advance(run, loss, parts, ids):
    """One optimiser step on `loss`, and a log line with its `parts` every s.log_every steps.

    ids: of the videos of the step. Raises Stopped, with the run saved, if a signal came."""
    s = run.s
    value = loss.item()
    check_finite(run, "loss", value, ids)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(s, run.step, run.total)
    run.optimizer.zero_grad()
    loss.backward()
    sum_gradients(run.detector)
    norm = torch.nn.utils.clip_grad_norm_(run.detector.parameters(), s.clip)
    check_finite(run, "gradient", norm.item(), ids)
    run.optimizer.step()
    average_weights(run)
    run.step += 1
    run.done += 1
    run.ema_step += 1
    run.losses.append(value)
    parts = {key: torch.as_tensor(value).detach() for key, value in parts.items()}
    run.parts.append(parts)
    show_progress(run)
    if run.step % s.log_every == 0 or run.step == run.total:
        first, since = run.clock
        rate = (run.step - first) / max(time.time() - since, 1e-9)
        parts = {key: float(value) for key, value in parts.items()}
        log(run, step=run.step, of=run.total, steps_a_second=rate,
            seconds_left=(run.total - run.step) / rate, loss=value, **parts)
    if is_stopped(run):
        save(run)
        raise Stopped


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
            record["segments"], video, start, int(mask.sum()), run.s.crop_keep)
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


def batch_losses(run, batch, instances, branch):
    """The terms of L_x of a batch: what objective() takes, and "positives", their number.

    instances  B records {"segments", "labels", "rejected"}, ground truth or pseudo labels
    branch     LABELLED or UNLABELLED, each with its own running mean T+"""
    s = run.s
    lam = 1.0
    if s.mixup and branch == LABELLED:
        batch, lam = mix(batch, s.mixup)
    outputs = evaluate.forward(run.detector, batch, s)
    ids = [video.id for video in batch["videos"]]
    total = sum(x.detach().sum() for x in outputs.predictions())
    check_finite(run, "output", total.item(), ids)
    instances = [{key: value.to(s.device) for key, value in r.items()} for r in instances]
    K = len(run.data.classes)
    losses = s.losses(outputs, instances, K)
    if lam < 1:
        opposite = s.losses(outputs, instances[::-1], K)
        losses = {key: lam * losses[key] + (1 - lam) * opposite[key] for key in losses}
    positives = losses["positives"].float().clamp(min=1)
    momentum = s.t_plus_momentum
    run.t_plus[branch] = momentum * run.t_plus[branch] + (1 - momentum) * positives
    L_acp = torch.zeros((), device=s.device)
    if s.acp != "none" and KINDS[branch] in s.acp_after.split("+"):  # Tab. S4
        feats = batch["feats"].to(s.device)
        L_acp = acp.acp_loss(
            (outputs.levels, outputs.masks), feats, instances, K, s, run.generator)
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
    bank = icd.with_side(run.discriminator, run.bank)
    compared = {}
    for video in data.share_of(run.data.unlabelled):
        feats = data.load_item(video, run.data, s)["feats"].to(s.device)
        compared[video.id] = icd.compare(
            selected[video.id], run.discriminator, bank, feats, s.icd_pool, s.icd_score)
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
    theta_h = float(np.mean(theta_h)) if theta_h else None
    if not any(is_taught(record).any() for record in refined.values()):
        best = max(column(detections, "scores").tolist(), default=0)
        note(run, f"no pseudo label: the best score is {best:.3f}, theta_l {s.theta_l}, "
                  f"theta_h {theta_h}; stage 3 learns from the labelled videos alone")
    return refined, theta_h


def count_pseudo_labels(run):
    """How many pseudo labels of each status of icd.STATUS there are."""
    return column(run.pseudo, "status").long().bincount(minlength=len(icd.STATUS)).tolist()


def show_pseudo_labels(run):
    """A line about the pseudo labels that were made, by the first process."""
    if data.is_first():
        counts = [f"{n} {state}" for n, state in zip(count_pseudo_labels(run), icd.STATUS)]
        theta_h = "-" if run.theta_h is None else f"{run.theta_h:.3f}"
        say(f"pseudo labels: {', '.join(counts)}; theta_h {theta_h} on average")


def log_pseudo_labels(run):
    """How many pseudo labels of each kind there are, and with --audit how good those that teach."""
    taught = {name: rows(record, is_taught(record)) for name, record in run.pseudo.items()}
    kept, dropped, mined, candidates = count_pseudo_labels(run)
    judged = {name: taught[name] for name in run.data.hidden}
    quality = evaluate.pseudo_label_quality(judged, run.data.hidden) if run.s.audit else {}
    log(run, positives=kept + dropped, candidates=mined + candidates, dropped=dropped, mined=mined,
        theta_h=run.theta_h, silent=sum(len(r["labels"]) == 0 for r in taught.values()), **quality)


def refresh_pseudo_labels(run):
    """Make the pseudo labels before the first epoch, or every s.refresh epochs, and log them."""
    if run.done:  # in the midst of an epoch that was stopped
        return
    if run.pseudo is None or run.s.refresh and run.epoch % run.s.refresh == 0:
        run.pseudo, run.theta_h = make_pseudo_labels(run)
        run.detector.train()
        show_pseudo_labels(run)
    log_pseudo_labels(run)


# ---- The three stages ---------------------------------------------------------------------------

def pretrain(run):
    """Stage 1, ACP: contrast the steps of all training videos; no label is read (Sec. 3.3)."""
    s = run.s
    videos = [data.blind(video) for video in run.data.labelled + run.data.unlabelled]
    count, steps = plan_of(run)["pretrain"]
    for rng in epochs(run, "pretrain", count, steps):
        for batch in data.training_batches(videos, run.data, s, steps, rng, run.done):
            pyramid = evaluate.forward(run.detector.pyramid, batch, s)
            feats = batch["feats"].to(s.device)
            L_acp = acp.acp_loss(pyramid, feats, None, len(run.data.classes), s, run.generator)
            advance(run, L_acp, {}, batch["ids"])


def supervised(run):
    """Stage 2: the detector on labelled videos, and ICD beside it with its own optimiser."""
    s, videos = run.s, run.data.labelled
    count, steps = plan_of(run)["supervised"]
    for rng in epochs(run, "supervised", count, steps):
        for batch in data.training_batches(videos, run.data, s, steps, rng, run.done):
            sup = batch_losses(run, batch, ground_truth(batch), LABELLED)
            L_icd = 0.0
            if not s.icd_steps or run.step < s.icd_steps:
                L_icd = train_icd(run, batch)
            advance(run, objective(sup, None, s), sup | {"icd": L_icd}, batch["ids"])


def joint(run):
    """Stage 3, Fig. 1: detect on unlabelled videos, ALQA selects, ICD refines, both kinds teach."""
    s = run.s
    labelled, unlabelled = run.data.labelled, run.data.unlabelled
    count, steps = plan_of(run)["joint"]
    for rng in epochs(run, "joint", count, steps):  # saves after each
        refresh_pseudo_labels(run)
        done = run.done
        taught = [video for video in unlabelled if is_taught(run.pseudo[video.id]).any()]
        labelled_batches = data.training_batches(labelled, run.data, s, steps, rng, done)
        unlabelled_batches = [None] * (steps - done)
        if taught:
            unlabelled_batches = data.training_batches(taught, run.data, s, steps, rng, done)
        for batch, pseudo_batch in zip(labelled_batches, unlabelled_batches):
            sup = batch_losses(run, batch, ground_truth(batch), LABELLED)
            unsup = None
            parts = sup
            ids = batch["ids"]
            if pseudo_batch:
                truth = pseudo_truth(run, pseudo_batch)
                unsup = batch_losses(run, pseudo_batch, truth, UNLABELLED)
                parts = sup | {f"unsup_{key}": value for key, value in unsup.items()}
                ids = ids + pseudo_batch["ids"]
            advance(run, objective(sup, unsup, s), parts, ids)


# ---- The report ---------------------------------------------------------------------------------

def in_two_dimensions(parts):
    """The two principal components of the rows of tensors (m, C), normalised: pairs of numbers."""
    z = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
    z = (z - z.mean(0)).double().cpu()
    _, _, axes = torch.linalg.svd(z, full_matrices=False)
    return (z @ axes[:2].T).tolist()


@torch.no_grad()
def write_representation(run):
    """Fig. 4: steps of labelled videos before and after ACP, in two dimensions by PCA."""
    s, dataset = run.s, run.data
    detectors = {"before": begin(s, dataset).detector.eval(), "after": run.detector.eval()}
    found = {"before": [], "after": []}
    labels = []
    for video in dataset.labelled[:25]:
        steps = torch.linspace(0, video.steps - 1, s.acp_steps).round().long()
        classes = acp.step_classes(
            steps, video.segments, video.labels, video.segments[:0], len(dataset.classes))
        labels += classes.tolist()
        batch = data.collate([data.load_item(video, dataset, s)])
        for key, detector in detectors.items():
            levels, masks = evaluate.forward(detector.pyramid, batch, s)
            z = acp.representation(levels, masks, steps[None].to(s.device))
            found[key].append(z[0])
    points = {key: in_two_dimensions(parts) for key, parts in found.items()}
    classes = [*dataset.classes, "background"]
    data.write_json(
        run.out / "representation.json", {"classes": classes, "label": labels} | points)


def write_page(run):
    """Let extras/viewer.py make page.html: as a command, since the method imports no extra."""
    command = [sys.executable, "-m", "extras.viewer", str(run.out.resolve())]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=False)
    if done.returncode:
        note(run, "page.html could not be written: python -m extras.viewer says why")


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
    data.write_json(run.out / "predictions.json", predictions)
    if metrics is None:
        return
    other_average = other_metrics["average_mAP"]
    whole = metrics | {"weights": s.weights, f"average_mAP_{other}": other_average}
    if run.supervised_mAP is not None:
        whole["supervised_mAP"] = run.supervised_mAP
    data.write_json(run.out / "metrics.json", whole, indent=1)
    say(evaluate.table(metrics, f"{run.out} ({s.weights} weights)"))
    say(f"average with the {other} weights: {100 * other_average:.2f}")
    if run.supervised_mAP is not None:
        say(f"supervised {100 * run.supervised_mAP:.2f} -> APL {100 * metrics['average_mAP']:.2f}")


def finish(run):
    """What a run leaves beside the checkpoint, and what to do next, by the first process."""
    if not data.is_first():
        return
    pseudo = run.pseudo and evaluate.export_pseudo_labels(
        run.data.unlabelled, run.pseudo, run.data.classes, icd.STATUS)
    data.write_json(run.out / "pseudo_labels.json", pseudo or {}, indent=1)
    save_detector(run)
    if run.s.page:
        write_page(run)
    say(f"to look at: {run.out}/page.html" if run.s.page else f"results: {run.out}")
    say(f"a new video: {run.s.EVALUATE} --checkpoint {run.out} --features video.npy")
    data.warn(run.data.warnings)


# ---- The command line ---------------------------------------------------------------------------

# The settings that --help lists first.
FIRST = ("dataset", "features", "unlabelled_features", "stride", "frames", "fps", "ratio", "split",
         "seed", "channels", "stage", "out", "resume", "check")
ROOMS = {
    "files, splits, crops and batches": data.DataSettings,
    "the detector": model.DetectorSettings,
    "detection and mAP": evaluate.DetectionSettings,
    "ALQA, ICD, ACP, the loss, training, the run": Settings,
}


def room_of(name):
    """The heading under which --help lists a setting."""
    if name in FIRST:
        return "what matters first"
    rooms = (room for room, kind in ROOMS.items() if name in kind.__annotations__)
    return next(rooms, "this detector's own")


def help_of(f, preset):
    """The help of a setting: what it is, its choices, the default in force."""
    default = preset.get(f.name, f.default)
    default = "not set" if default == "" else default
    allowed = f.metadata["allowed"]
    choices = f"; one of {', '.join(allowed)}" if isinstance(allowed, tuple) else ""
    return f"{f.metadata['comment']}{choices} (default {default})".replace("%", "%%")


def read_arguments(argv, kind):
    """{name of a setting: value} of a command line, of a class of settings."""
    legend = "[S] the paper states it, [A] the public ActionFormer has it, [J] neither."
    flags = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    first = evaluate.Parser(add_help=False, **flags)
    first.add_argument("--dataset", default="toy")
    dataset = first.parse_known_args(argv)[0].dataset
    parser = evaluate.Parser(
        description=__doc__.split("\n")[0],
        usage=f"{kind.TRAIN} [--setting value ...]",
        epilog=f"{legend} The defaults are those in force for --dataset {short(dataset)}.", **flags)
    groups = {room: parser.add_argument_group(room) for room in
              dict.fromkeys(room_of(name) for name in (*FIRST, *kind.__dataclass_fields__))}
    order = {name: number for number, name in enumerate(FIRST)}
    preset = kind.preset(dataset)
    for f in sorted(fields(kind), key=lambda f: order.get(f.name, len(order))):
        value = {"action": argparse.BooleanOptionalAction}
        if f.type is not bool:
            value = {"type": f.type, "metavar": f.type.__name__}
        groups[room_of(f.name)].add_argument(
            "--" + f.name.replace("_", "-"), help=help_of(f, preset), **value)
    return vars(parser.parse_args(argv))


def settings_of(folder, kind):
    """The settings {name: value} of the run in a folder, which goes on; raises BadInput."""
    content = evaluate.read_checkpoint(folder, kind)
    s = evaluate.check_settings(content["settings"], kind, f"checkpoint in {folder}")
    return asdict(s) | {"out": folder, "start": "", "init": "", "overwrite": False, "check": False}


def parse_settings(argv, kind=Settings):
    """The Settings, or those of another detector, of a command line.

    Defaults, changed by the preset, or those of the run to resume, changed by the arguments."""
    given = read_arguments(argv, kind)
    dataset = given.get("dataset", "toy")
    if dataset not in PRESETS and not dataset.endswith(".json"):
        raise BadInput("--dataset must be an annotation file *.json or one of "
                       f"{', '.join(PRESETS)}, not {data.shown(dataset)}")
    if given.get("resume"):
        elsewhere = Path(given.get("out", given["resume"])) != Path(given["resume"])
        if elsewhere or given.get("start") or given.get("overwrite"):
            raise BadInput("--resume goes on in its own folder: another --out, --start and "
                           "--overwrite do not go with it")
        base = settings_of(given["resume"], kind)
    else:
        folder = f"runs/{Path(dataset).stem}"
        if not given.get("overwrite"):
            folder = free_folder(folder)
        base = {"out": folder} | kind.preset(dataset)
    given = base | given
    # Whole paths, so that the checkpoint finds the files from anywhere.
    for name in data.PLACES:
        if given.get(name) and given[name] not in (*PRESETS, *data.SPLITS):
            given[name] = os.path.abspath(given[name])
    given["device"] = evaluate.pick_device(given.get("device", "auto"))
    if given.get("precision", "auto") == "auto":
        given["precision"] = evaluate.pick_precision(given["device"])
    return kind(**given)


def check_folder(s):
    """Raise BadInput where a new run would destroy one, or cannot have its folder."""
    if not s.resume and not s.overwrite and holds_run(s.out):
        raise BadInput(f"{s.out} holds a run: --resume {s.out} goes on with it, --overwrite begins "
                       "anew, another --out keeps it")
    if Path(s.out).exists() and not Path(s.out).is_dir():
        raise BadInput(f"--out {s.out} is no folder")


def check_positives(run):
    """Raise BadInput where no point is positive for any labelled instance."""
    s, K = run.s, len(run.data.classes)
    if any(s.can_learn(run.detector, video, K) for video in run.data.labelled):
        return
    raise BadInput(f"no point is positive for any labelled instance, so there is nothing to learn: "
                   f"--ranges {short(s.ranges)} or --radius {s.radius:g} do not fit their lengths")


def launch(s):
    """The Run that the settings ask for: new, resumed, or begun at stage 2 or 3; raises BadInput.

    The first process says what it has taken, and makes its folder."""
    if not s.check:
        check_folder(s)
    dataset = data.load_dataset(s)
    if data.is_first():
        lines = data.describe(dataset, s)
        lines.append(f"{s.device}, {s.precision}, {process_count()} process(es)")
        say("\n".join(lines))
    data.warn(dataset.warnings)
    if s.stage == "all" and not dataset.unlabelled:
        text = (f"all {len(dataset.labelled)} training videos are labelled (--ratio {s.ratio}), so "
                "there is no unlabelled video for stage 3; --stage supervised needs none, "
                "--unlabelled-features brings some")
        if not s.check:
            raise BadInput(text)
        data.warn([text])
    run = begin(s, dataset)
    check_positives(run)
    if run.taken and data.is_first():
        say(run.taken)
    if s.resume:
        restore(run, run.out / "checkpoint.pt")
    elif s.start:
        restore(run, s.start)
    if data.is_first() and not s.check:
        run.out.mkdir(parents=True, exist_ok=True)
        run.lock = keep_others_out(run.out)
        if s.resume:
            take_up_log(run)
            write_configuration(run)
    return run


def train(run):
    """The stages that the settings ask for, and the report."""
    s = run.s
    pretrain(run)
    if run.stage == "pretrain" and data.is_first():
        write_representation(run)
    if s.stage == "pretrain":
        return
    supervised(run)
    if s.stage == "all":
        if run.stage == "supervised" and run.data.ground_truth:
            detector = run.ema if s.weights == "ema" else run.detector
            metrics, _ = evaluate.evaluate_detector(detector, run.data, s)
            run.supervised_mAP = metrics["average_mAP"]
        joint(run)
    if run.data.test:
        report(run)
    finish(run)


def how_to_go_on(run):
    """What to do after an interruption, in words."""
    if run is None or not run.saved:
        return "nothing was saved yet"
    return f"{run.s.TRAIN} --resume {run.out} goes on"


def main(argv=None, kind=Settings):
    """The command line; returns the exit code.

    kind: the class of the settings, which build the detector.
    2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    stop = Stop()
    before = on_signals(stop)
    run = None
    try:
        s = parse_settings(argv, kind)
        data.join_processes(s.device)
        run = launch(s)
        run.stop = stop
        if not s.check:
            train(run)
    except Stopped:
        if data.is_first():
            name = signal.Signals(stop.signal).name
            data.complain(f"stopped by {name}; {how_to_go_on(run)}")
        return 128 + stop.signal
    except (BadInput, OSError) as error:
        if run and run.saved and not isinstance(error, Diverged):
            error = f"{error}; {how_to_go_on(run)}"
        data.complain(error)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        data.complain(f"the memory is too small: lower --batch or --max-steps; {how_to_go_on(run)}")
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if run and run.lock:
            run.lock.close()
    # Not after an error: other processes may be waiting for this one, and torchrun ends them.
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
