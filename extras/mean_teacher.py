"""The mean teachers of Table 1 on BMN: SSP (Ji et al. 2019) and SSTAP (Wang et al. 2021).

    python -m extras.mean_teacher --teacher sstap --dataset my.json --features DIR ... as extras.bmn
    python -m extras.mean_teacher --resume runs/my
    python -m extras.mean_teacher --checkpoint runs/my --features video.npy

They stand in the place of APL's stage 3 and make no pseudo label. A teacher, whose weights are the
averaged ones, sees an unlabelled video as it is; the student sees it disturbed, with training's
noise on its input too, and learns to predict the same, beside what the labelled videos teach:

    SSP    steps are set to 0 (masking)
    SSTAP  channels are a step late or early (shift); and the video runs backwards (flip), for which
           the teacher's predictions are turned round [T leaves starts as starts]

Reconstructed. Left out are SSP's time warping; SSTAP's two tasks without labels (features restored,
clips put in order), its dropout of channels, its consistency and disturbances of labelled videos,
its choice of sure teachers and the rounding of what they say. A map's difference is a mean over the
pairs inside the video [T: over the whole map]. Stage 3 begins at a detector that stage 2 has
trained. The classes are taught by labelled videos alone.

Letters as in extras/bmn.py. [T] is the public SSTAP's, [J] neither that nor the paper's.
"""
import math
import sys
from dataclasses import dataclass

import torch

import acp
import data
import evaluate
import train
from extras import bmn
from model import earlier, later
from plumbing.processes import draws_of_batch, means_of_all
from plumbing.settings import NotNegative, OneOf

MASKED = 0.2  # share of the steps that SSP leaves out [J]
SHIFTED = 1 / 8  # share of the channels that are a step late, and as many early [J; T: 1/64]
OF_FLIP = 0.1  # weight of the flip beside the shift [T]
RAMP = 5  # epochs until consistency has its whole weight [T]


# ---- What the student sees ----------------------------------------------------------------------

def masked(batch, most):
    """A batch with random steps of its videos set to 0.

    most  how many draws each video gets, at least T: the same ones whatever T is"""
    kept = draws_of_batch((len(batch["mask"]), most)) >= MASKED
    kept = kept[:, :batch["mask"].shape[1]]
    return batch | {"feats": batch["feats"] * kept[..., None]}


def shifted(batch):
    """A batch with random channels of each video a step late, and others a step early."""
    feats = batch["feats"]
    draw = draws_of_batch((len(feats), 1, feats.shape[2]))
    feats = torch.where(draw < SHIFTED, later(feats), feats)
    feats = torch.where(draw >= 1 - SHIFTED, earlier(feats), feats)
    return batch | {"feats": feats * batch["mask"][..., None]}


def backwards(mask):
    """Where each step of a video lies when the video runs backwards; padding stays.

    mask  (B, T) -> (B, T)"""
    step = torch.arange(mask.shape[1], device=mask.device)
    last = mask.sum(1, keepdim=True) - 1
    return torch.where(mask, last - step, step)


def flipped(batch):
    """A batch of videos that run backwards."""
    return batch | {"feats": acp.rows_at(batch["feats"], backwards(batch["mask"]))}


# ---- What the teacher says ----------------------------------------------------------------------

def said(outputs):
    """What is to be the same of the Outputs of videos of one window: start and end (B, W), the
    classification and the regression map (B, P)."""
    return outputs.start[:, 0], outputs.end[:, 0], outputs.action, outputs.p_tiou


def turned(predictions, steps):
    """said() of the videos that run backwards: a start is an end, (s, e) the pair (e, s) from
    the end.

    steps  (B, W), which of the window's steps are the video's"""
    start, end, action, regression = predictions
    order = backwards(steps)
    W = steps.shape[1]
    s, e = bmn.pairs_of(W).to(steps.device)
    first, last = order[:, e], order[:, s]
    pair = first * (2 * W - 1 - first) // 2 + last  # its place among bmn.pairs_of(W), (B, P)
    return end.gather(1, order), start.gather(1, order), action.gather(1, pair), \
        regression.gather(1, pair)


def consistency(student, teacher, steps):
    """The mean squared differences of two said(), added up -> scalar.

    steps  (B, W), which of the window's steps are the video's"""
    of_start, of_end = bmn.at_pairs(steps[:, None], steps[:, None])
    pairs = of_start & of_end  # (B, P)
    parts = zip(student, teacher, (steps, steps, pairs, pairs))
    return sum((a - b)[use].square().mean() for a, b, use in parts)


def teacher_loss(run, batch):
    """The consistency of the student with the teacher on a batch without labels -> scalar."""
    with torch.no_grad():
        outputs = evaluate.forward(run.ema, batch, run.s)
    teacher, steps = said(outputs), outputs.steps[:, 0]

    def student(seen):
        return said(evaluate.forward(run.detector, seen, run.s))

    if run.s.teacher == "ssp":
        return consistency(student(masked(batch, run.s.window())), teacher, steps)
    L_shift = consistency(student(shifted(batch)), teacher, steps)
    L_flip = consistency(student(flipped(batch)), turned(teacher, steps), steps)
    return L_shift + OF_FLIP * L_flip


def learn_from_teacher(run, rng):
    """An epoch of stage 3: labelled videos as in stage 2, unlabelled ones by the teacher."""
    run.ema.eval()  # the teacher sees no noise
    ramp = math.exp(-5 * (1 - min(run.at.epoch / RAMP, 1)) ** 2)
    labelled = train.batches_of(run, run.data.labelled, rng)
    for batch, other in zip(labelled, train.batches_of(run, run.data.unlabelled, rng)):
        sup = train.batch_losses(run, batch, data.ground_truth(batch), "labelled")
        unsup = means_of_all({"consistency": teacher_loss(run, other)})
        loss = train.objective(sup, None, run.s) + run.s.consistency * ramp * unsup["consistency"]
        train.advance(run, loss, sup | unsup, batch["ids"] + other["ids"])


# ---- Settings -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings(bmn.Settings):
    """BMN's settings and the teacher's."""
    since = "joint"
    heading = "the mean teacher"
    teacher: OneOf(("ssp", "sstap"), "whose disturbances") = "sstap"
    consistency: NotNegative("weight of being consistent with the teacher [T]") = 6.0

    PRESET = bmn.Settings.PRESET | {"alqa": "none", "acp": "none", "acp_after": "none"}
    TRAIN = EVALUATE = "python -m extras.mean_teacher"
    UNUSED = (*bmn.Settings.UNUSED, "theta_l", "threshold", "theta_fixed", "scope", "repeat",
              "exclusive", "rerank", "icd", "icd_hidden", "icd_dropout", "icd_lr", "icd_score",
              "icd_pairs", "icd_pool", "theta_drop", "theta_mine", "rejected", "lambda_u",
              "refresh")

    def epochs(self):
        """Stage 3 is the teacher's."""
        return {"joint": learn_from_teacher}


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    return bmn.train_or_evaluate(argv, Settings)


if __name__ == "__main__":
    sys.exit(main())
