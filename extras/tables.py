"""The paper's tables and figures as commands: rows of settings of train.py, printed as Markdown.

    python -m extras.tables 3a                                              on toy
    python -m extras.tables 1 --dataset thumos --ratio 0.1 --seeds 3
    python -m extras.tables 5a --dataset my.json --features DIR --seeds 2 --splits a.json b.json
    python -m extras.tables S8 --proposals runs/bmn/{seed}.json    proposals of each seed's split
    python -m extras.tables causes              why APL does what it does: pseudo labels by class
    python -m extras.tables ceiling             what it would with perfectly chosen pseudo labels
    python -m extras.tables S6                  parameters and multiply-accumulates, no training

Each row is trained for every seed; what follows the names is passed to train.py for every row.
Finished rows are kept, and stages that rows share (the same settings, split and seed) are trained
once: they lie in --runs, each in a folder named by its last stage and its settings, and a killed
command goes on where it was. mAP is that of the last epoch on the test videos; ± is the standard
deviation over the seeds, (a to b) the 95 % interval of a mean over seeds and test videos.
"""
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu, spearmanr
from torch import nn

import acp
import data
import evaluate
import icd
import model
import train
from extras import bmn, mean_teacher, pgcn, spot
from extras.intervals import interval, resampled, resampled_difference
from plumbing import checkpoints, sources
from plumbing.arguments import settings_of
from plumbing.files import files_in, read_json, read_rows, write_json
from plumbing.runs import guard
from plumbing.settings import Parser, settings_of_stages
from plumbing.words import BadInput, say, several, warn

# ---- The rows -----------------------------------------------------------------------------------

PLAIN = "--alqa none --acp none"
NO_ACP = "--acp none"
WITH_ACP = "--acp coarse+fine"
NO_ICD = "--icd none"
FIXED = "--icd none --threshold fixed"

# The paper's own choices, where toy and own data have others.
ABSOLUTE = "--icd eap+mpp --icd-score absolute --theta-drop 0.3 --theta-mine 0.7"
AS_PUBLISHED = "--paper"
BARE = "--repeat 1 --no-exclusive --rejected background"  # no repeat removed, nothing masked

# What the paper leaves open: settings, one row each.
OPEN = (
    "--icd eap+mpp",
    "--rejected background",
    "--threshold mean+std",
    "--threshold mean",
    "--threshold mean-std",
    "--scope video",
    "--scope dataset",
    "--scope class",
    "--no-exclusive",
    "--repeat 1",
    "--refresh 5",
    f"--refresh 5 {NO_ICD}",
    f"--refresh 5 {FIXED}",
    "--passes 0",
    "--passes 32",
    "--lambda-u 1",
    "--icd-pool max",
    "--icd-pool mean",
    ABSOLUTE,
    "--input-dropout 0",
    "--input-dropout 0.1",
    "--input-dropout 0.5",
    "--soft-label predicted",
    "--beta 1",
    WITH_ACP,
    f"{WITH_ACP} --acp-tau 0.05",
    f"{WITH_ACP} --acp-tau 0.2",
    f"{WITH_ACP} --acp-steps 20",
    f"{WITH_ACP} --acp-steps 80",
)

# Name, the paper's average mAP with 10 % of THUMOS14's labels (None: not in the paper), settings.
ROWS = {
    "1": [
        ("ActF*, supervised only", 15.6, f"--stage supervised {PLAIN}"),
        ("ActF + MixUp", 16.7, f"--stage supervised {PLAIN} --mixup 0.4"),
        ("NPL, reconstructed", 20.3, f"{PLAIN} --icd none --threshold frequency --rerank"),
        ("class score >= 0.3", 17.0, f"{PLAIN} {FIXED}"),
        ("supervised only, ALQA and ACP", None, f"--stage supervised {WITH_ACP}"),
        ("joint score >= 0.3, ALQA and ACP", None, f"{FIXED} {WITH_ACP}"),
        ("APL", 24.5, WITH_ACP),
        ("APL without ACP", None, NO_ACP),
        ("supervised only, all labels", None,
         f"--stage supervised {PLAIN} --split uniform --ratio 1"),
    ],
    "1-bmn": [
        ("BMN*, supervised only", None, f"--stage supervised {PLAIN}"),
        ("NPL (BMN), reconstructed", 32.4,
         f"{PLAIN} {NO_ICD} --threshold frequency --rerank"),
        ("APL (BMN)", 33.3, WITH_ACP),
    ],
    "1-teacher": [
        ("SSP (BMN), reconstructed", 25.8, f"{PLAIN} --teacher ssp"),
        ("SSTAP (BMN), reconstructed", 27.0, f"{PLAIN} --teacher sstap"),
    ],
    "S8": [
        ("P-GCN, supervised only", 11.2, f"--stage supervised {PLAIN}"),
        ("APL (P-GCN)", 16.6, NO_ACP),
    ],
    "3a": [
        ("baseline", 17.0, f"{PLAIN} {FIXED}"),
        ("+ ALQA", 21.3, f"{NO_ACP} {NO_ICD}"),
        ("+ ICD", 23.3, NO_ACP),
        ("+ ACP", 24.5, WITH_ACP),
        ("baseline, no repeat removed, nothing masked", None, f"{PLAIN} {FIXED} {BARE}"),
        ("supervised only, ALQA", None, f"--stage supervised {NO_ACP}"),
    ],
    "3a-paper": [
        ("baseline", 17.0, f"{AS_PUBLISHED} {PLAIN} {FIXED}"),
        ("+ ALQA", 21.3, f"{AS_PUBLISHED} {NO_ACP} {NO_ICD}"),
        ("+ ICD", 23.3, f"{AS_PUBLISHED} {NO_ACP}"),
        ("+ ACP", 24.5, AS_PUBLISHED),
    ],
    "3b": [
        ("no branch", None, f"{PLAIN} {NO_ICD}"),
        ("tIoU (1b)", 19.4, f"{NO_ACP} {NO_ICD} --alqa tiou"),
        ("DIoU (1b)", 20.0, f"{NO_ACP} {NO_ICD} --alqa diou"),
        ("tIoU + tND (2b)", 21.3, f"{NO_ACP} {NO_ICD}"),
    ],
    "5a": [
        ("no ICD", 21.3, f"{NO_ACP} {NO_ICD}"),
        ("EAP", 22.1, f"{NO_ACP} --icd eap"),
        ("MPP", 22.5, f"{NO_ACP} --icd mpp"),
        ("EAP + MPP", 23.3, f"{NO_ACP} --icd eap+mpp"),
    ],
    "5b": [
        ("no ACP", 23.3, NO_ACP),
        ("coarse", 24.1, "--acp coarse"),
        ("fine", 23.8, "--acp fine"),
        ("coarse + fine", 24.5, "--acp coarse+fine"),
    ],
    "S1": [
        ("KL", 20.8, f"{NO_ACP} {NO_ICD} --quality-form kl"),
        ("BCE", 21.3, f"{NO_ACP} {NO_ICD}"),
    ],
    "S4": [
        ("pre-training alone", 23.6, f"{WITH_ACP} --acp-after none"),
        ("labelled", 24.1, f"{WITH_ACP} --acp-after labelled"),
        ("labelled + unlabelled", 24.5, f"{WITH_ACP} --acp-after labelled+unlabelled"),
    ],
    "S3-bmn": [  # the paper's are of ActivityNet
        ("BMN, without pre-training", 25.8, f"--stage supervised {PLAIN}"),
        ("BMN, with ACP", 27.3, f"--stage supervised --alqa none {WITH_ACP}"),
    ],
    "S3-spot": [  # the paper's are of ActivityNet
        ("SPOT, supervised only", None, f"--stage supervised {NO_ACP}"),
        ("SPOT, without pre-training", 30.5, NO_ACP),
        ("SPOT, with its own pretext", 32.1, "--acp pretext"),
        ("SPOT, with ACP", 31.9, WITH_ACP),
        ("SPOT, pseudo labels of train.py", None, f"{NO_ACP} --pseudo labels"),
    ],
    "fig3a": [(f"drop below {theta}", None, f"{ABSOLUTE} --theta-drop {theta}")
              for theta in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)],
    "fig3b": [(f"mine above {theta}", None, f"{ABSOLUTE} --theta-mine {theta}")
              for theta in (0.5, 0.6, 0.7, 0.8, 0.9)],
    "fig3c": [
        ("fixed", None, FIXED),
        ("dynamic", None, NO_ICD),
        ("EAP", None, "--icd eap"),
        ("MPP", None, "--icd mpp"),
        ("EAP + MPP", None, "--icd eap+mpp"),
    ],
    "choose": [  # what own data have by default was chosen among these
        ("class score >= 0.3", None, f"{PLAIN} {FIXED}"),
        ("APL without ACP", None, NO_ACP),
        ("with MPP", None, f"{NO_ACP} --icd eap+mpp"),
        ("without ALQA, fixed 0.3", None, f"{PLAIN} --threshold fixed"),
        ("fixed 0.4", None, f"{NO_ACP} --threshold fixed --theta-fixed 0.4"),
        ("one look", None, f"{NO_ACP} --passes 0"),
        ("drop below -0.4", None, f"{NO_ACP} --theta-drop -0.4"),
        ("made anew once", None, f"{NO_ACP} --refresh 5"),
        ("stage 3 twice as long", None, f"{NO_ACP} --joint-epochs 20"),
    ],
    "open": [("the defaults", None, ""), *((option, None, option) for option in OPEN)],
}

# What a perfect choice of pseudo labels would give: name, whether classes are corrected, settings.
CEILINGS = {
    "ceiling": [
        ("the defaults", None, ""),
        ("right ones alone, by the hidden labels", False, ""),
        ("classes corrected before, by the hidden labels", True, ""),
    ],
}

# The linear probe: name, the paper's accuracy and recall (THUMOS14), what is probed, settings.
PROBES = {
    "S2": [
        ("input features", (72.1, 66.3), "input", WITH_ACP),
        ("untrained network", None, "untrained", WITH_ACP),
        ("learned features with ACP", (76.2, 73.0), "trained", WITH_ACP),
    ],
    "S5": [
        ("batch 2, 2 clusters", (71.0, 70.1), "trained", f"{WITH_ACP} --batch 2 --acp-clusters 2"),
        ("batch 2, 3 clusters", (72.8, 73.5), "trained", f"{WITH_ACP} --batch 2 --acp-clusters 3"),
        ("batch 2, 4 clusters", (76.2, 73.0), "trained", f"{WITH_ACP} --batch 2 --acp-clusters 4"),
        ("batch 4, 4 clusters", (72.4, 72.3), "trained", f"{WITH_ACP} --batch 4 --acp-clusters 4"),
        ("batch 4, 5 clusters", (73.9, 74.4), "trained", f"{WITH_ACP} --batch 4 --acp-clusters 5"),
        ("batch 4, 8 clusters", (75.0, 73.8), "trained", f"{WITH_ACP} --batch 4 --acp-clusters 8"),
    ],
}

TABLES = ROWS | PROBES | CEILINGS  # settings stand last in each row

# Columns from the log of a run: the quality of its pseudo labels. fig3c has all, the others two.
MATCHES = ("precision", "recall")
QUALITY = ("positive_accuracy", "class_accuracy", "mean_tIoU", *MATCHES)
# What pseudo labels that teach are, against the hidden labels, and what `causes` counts.
FAULTS = ("right", "wrong class", "boundary", "background")
COUNTS = ("labelled", "hidden", *icd.STATUS[:icd.CANDIDATE], *FAULTS, "missed")
PROBE_STEPS = 30_000  # that fit, and that test, the probe, drawn at random where there are more
OF_DATA = (*sources.PLACES, "prefix", "extension", "feature_key", "skip_columns", "fill_gaps",
           "missing", "test_subset")
# What rows set themselves.
OURS = ("--seed", "--out", "--overwrite", "--stage", "--start", "--resume", "--audit", "--check")


# ---- Runs ---------------------------------------------------------------------------------------

def minutes_of(folder):
    """The minutes that a finished run took, its earlier stages included.

    None if it was killed on the way."""
    return read_json(folder / "finished.json", "end of a run")["minutes"]


def code_of():
    """A sum of the code that trains."""
    home = Path(train.__file__).parent
    digest = hashlib.sha256()
    for folder in (home, home / "plumbing", home / "extras"):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def old_runs(runs):
    """Yield a warning about finished runs in a folder that other code has trained."""
    code = code_of()
    found = sorted(runs.glob("*/finished.json"))
    other = [path.parent.name for path in found
             if read_json(path, "end of a run").get("code") != code]
    if other:
        yield (f"{runs} holds {len(other)} runs that other code has trained, and rows take them as "
               f"they are: {several(other)}; another --runs trains them anew")


def kind_of(table):
    """The class of the settings of a table's rows, which build their detector."""
    detectors = {"bmn": bmn.Settings, "S8": pgcn.Settings, "spot": spot.Settings,
                 "teacher": mean_teacher.Settings}
    return detectors.get(table.rpartition("-")[2], train.Settings)


def folder_of(s, stage, runs):
    """The folder of a run that ends with `stage`: its name says what the stage depends on."""
    count = train.STAGES.index("joint" if stage == "all" else stage) + 1
    until = settings_of_stages(type(s), train.STAGES[:count])
    names = [*until, "weights", *OF_DATA]
    depends = {name: getattr(s, name) for name in names if hasattr(s, name)}
    if type(s) is not train.Settings:
        depends["kind"] = type(s).__module__
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode())
    if s.dataset != "toy":
        for folder in filter(os.path.isdir, (sources.locate(s)[1], s.unlabelled_features)):
            for place, file in files_in(folder):
                state = os.stat(file)
                digest.update(f"{place} {state.st_size} {state.st_mtime_ns}".encode())
    init = s.init and checkpoints.file_of(s.init)
    for path in (s.dataset, s.annotations, s.split, s.ext_scores, init,
                 depends.get("proposals", "")):
        files = [path]
        if path and Path(path).is_dir():  # of label tracks
            files = [file for _, file in files_in(path) if file.suffix.lower() == ".txt"]
        for file in filter(os.path.isfile, files):
            digest.update(Path(file).read_bytes())
    return runs / f"{stage}-{digest.hexdigest()[:12]}"


def stage_before(stage, s):
    """The stage that one begins from, None for the first."""
    if stage == "all":
        return "supervised"
    if stage == "supervised" and s.acp != "none":
        return "pretrain"
    return None


def finish_run(argv, folder, start, minutes, kind):
    """Train in a folder, or go on in it; leaves, last of all, "finished.json".

    start    the checkpoint to begin at, None for none
    minutes  that its earlier stages took"""
    if (folder / "log.jsonl").exists():
        minutes = None
    began = time.time()
    where = ["--out", str(folder), "--overwrite"]
    if start:
        where += ["--start", str(start), "--init", ""]
    if (folder / "checkpoint.pt").exists():
        argv = [word for word in argv if word != "--paper"]  # the run knows its settings
        where = ["--resume", str(folder), *(["--init", ""] if start else [])]
    code = train.main([*argv, *where, "--audit", "--no-page"], kind)
    if code:
        raise SystemExit(code)
    if minutes is not None:
        minutes += (time.time() - began) / 60
    write_json(folder / "finished.json", {"minutes": minutes, "code": code_of()})


def is_finished(folder):
    """Whether a run has ended, and is still there."""
    return (folder / "finished.json").exists() and (folder / "checkpoint.pt").exists()


def reach(options, stage, runs, kind=train.Settings):
    """The folder of a run with these options that has ended its `stage` ("all" for stage 3).

    Trained now where it has not been before; rows share it."""
    argv = [*options, "--stage", stage]
    s = settings_of(argv, kind)
    before = stage_before(stage, s)
    folder = folder_of(s, stage, runs)
    if is_finished(folder):
        return folder
    start = None
    minutes = 0.0
    if before:
        shared = reach(options, before, runs, kind)
        start = shared / "checkpoint.pt"
        minutes = minutes_of(shared)
    finish_run(argv, folder, start, minutes, kind)
    return folder


def reach_all(commands, more, stage, runs, kind=train.Settings):
    """The folders of a row's runs: the options of each seed in `commands`, then the row's."""
    return [reach([*options, *more], stage, runs, kind) for options in commands]


def saved(path, make, *arguments):
    """The JSON file at `path`, made by make(*arguments) where it is absent."""
    if not path.exists():
        write_json(path, make(*arguments))
    return read_json(path, "result")


def read_checkpoint(folder):
    """The checkpoint of a finished run, its settings and its Dataset, hidden labels included."""
    checkpoint = checkpoints.load(folder / "checkpoint.pt", train.Settings)
    s = train.Settings(**checkpoint["settings"] | {"audit": True})
    return checkpoint, s, data.training_data(s)


def read_run(folder, part=None):
    """The settings, the Dataset and the Detector of a finished run, hidden labels included.

    part  which of the checkpoint's weights; None: those that the run reports"""
    checkpoint, s, d = read_checkpoint(folder)
    detector = s.build(d.dim, len(d.classes)).to(s.device)
    detector.load_state_dict(checkpoint[part or checkpoints.WEIGHTS[s.weights]])
    return s, d, detector.eval()


# ---- Calibration --------------------------------------------------------------------------------

def calibration(folder):
    """How the scores of a run's detections rank with their true tIoU (Spearman).

    On held-out labelled videos, the training videos whose labels it never saw; so `folder` is of
    stage 2: stage 3 trains on them. The score is that after Soft-NMS, without quality branches the
    class score. The true tIoU is that with the best instance of the detection's class. Of each
    video the best detections, twice as many as it has instances; one that repeats a better one has
    its tIoU all the same.
    -> {"rank_correlation"}"""
    s, d, detector = read_run(folder)
    detections = evaluate.detect(detector, d.unlabelled, d, s)
    scores = []
    truth = []
    for name, record in detections.items():
        hidden = d.hidden[name]
        n = 2 * len(hidden.labels)
        if n == 0:
            continue
        best = data.take(record, slice(n))
        same = best["labels"][:, None] == hidden.labels
        overlap = model.tiou(best["segments"][:, None], hidden.segments) * same
        scores.append(best["scores"])
        truth.append(overlap.amax(1))
    result = spearmanr(torch.cat(scores), torch.cat(truth))
    return {"rank_correlation": float(result.statistic)}


# ---- Causes -------------------------------------------------------------------------------------

def auc(values, right):
    """The chance that a right one's value is over a wrong one's, ties half.

    values  (N,)
    right   (N,) bool
    ->      None without either kind"""
    of_right, of_wrong = values[right], values[~right]
    pairs = len(of_right) * len(of_wrong)
    if pairs == 0:
        return None
    return float(mannwhitneyu(of_right, of_wrong).statistic) / pairs


def faults_of(record, video, right):
    """What is wrong with the pseudo labels of a record -> (N,) indices into FAULTS.

    An instance of another class from tIoU 0.5 on: its class; else one of its own from 0.1 on: its
    boundaries, or it is there a second time; else it lies on the background.
    video  a LabelledVideo
    right  (N,) bool, which match an instance"""
    overlap = F.pad(model.tiou(record["segments"][:, None], video.segments), (0, 1))
    own = record["labels"][:, None] == F.pad(video.labels, (0, 1), value=-1)
    fault = torch.full_like(record["labels"], FAULTS.index("background"))
    fault[(overlap * own).amax(1) >= 0.1] = FAULTS.index("boundary")
    fault[(overlap * ~own).amax(1) >= 0.5] = FAULTS.index("wrong class")
    fault[right] = FAULTS.index("right")
    return fault


def judge(pseudo, d, states):
    """The pseudo labels {id: record} of these states as one record.

    -> {"labels", "scores", "similarity", "status", "right", "fault"}, "right" being a match with a
    hidden instance, "fault" as faults_of() has it"""
    states = torch.tensor(states)
    chosen = {}
    for video in d.unlabelled:
        record = pseudo[video.id]
        record = data.take(record, torch.isin(record["status"], states))
        hidden = d.hidden[video.id]
        right = evaluate.matched(record, hidden)
        fault = faults_of(record, hidden, right)
        chosen[video.id] = record | {"right": right, "fault": fault}
    keys = ("labels", "scores", "similarity", "status", "right", "fault")
    return {key: data.gather(chosen, key) for key in keys}


def of_class(records, c):
    """What is of class c in each of the records {name: record}."""
    return {name: data.take(r, r["labels"] == c) for name, r in records.items()}


def cause_row(name, records):
    """A row of causes(), from what of its records is of the row's class."""
    hidden = len(records["hidden"]["labels"])
    row = {"class": name, "labelled": len(records["labelled"]["labels"]), "hidden": hidden}
    for part in ("ALQA", "ICD"):
        right = records[part]["right"]
        hits = int(right.sum())
        row[f"{part} precision"] = hits / len(right) if len(right) else None
        row[f"{part} recall"] = hits / hidden if hidden else None
    detected = records["detected"]
    status = detected["status"].long()
    counts = status.bincount(minlength=len(icd.STATUS)).tolist()
    row |= dict(zip(icd.STATUS[:icd.CANDIDATE], counts))
    faults = records["ICD"]["fault"].long().bincount(minlength=len(FAULTS)).tolist()
    row |= dict(zip(FAULTS, faults))
    row["missed"] = hidden - row["right"]
    known = data.take(detected, ~detected["similarity"].isnan())
    row["AUC score"] = auc(known["scores"], known["right"])
    row["AUC similarity"] = auc(known["similarity"], known["right"])
    return row


def causes(folder):
    """A run's last pseudo labels against the labels that it never saw, class by class.

    Precision and recall at tIoU 0.5 of what ALQA selects and of what ICD leaves; how many are kept,
    dropped and mined, what is right and wrong with what teaches, what is missed; how well the joint
    score and ICD's similarity tell right from wrong (area under the ROC curve) among all
    detections that were selected from, repeats left out, whose class has labelled instances.
    -> a row {"class", what: a number, or None where nothing is counted} a class, and one of all"""
    checkpoint, _, d = read_checkpoint(folder)
    pseudo = checkpoint["pseudo"]
    if pseudo is None:
        raise BadInput(f"the run in {folder} made no pseudo labels")
    hidden = [d.hidden[video.id] for video in d.unlabelled]
    records = {
        "labelled": {"labels": torch.cat([video.labels for video in d.labelled])},
        "hidden": {"labels": torch.cat([video.labels for video in hidden])},
        "ALQA": judge(pseudo, d, [icd.KEPT, icd.DROPPED]),
        "ICD": judge(pseudo, d, [icd.KEPT, icd.MINED]),
        "detected": judge(pseudo, d, list(range(len(icd.STATUS)))),
    }
    rows = [cause_row(name, of_class(records, c)) for c, name in enumerate(d.classes)]
    return [*rows, cause_row("all classes", records)]


# ---- The ceiling --------------------------------------------------------------------------------

def chosen_by_truth(record, video, corrected):
    """A video's pseudo labels, of all that was detected: what matches a hidden instance is kept,
    all else dropped.

    corrected  each first takes the class of the hidden instance that overlaps it from tIoU 0.5 on
    ->         the record with another "status", of `corrected` with other "labels"."""
    labels = record["labels"]
    if corrected and len(video.labels):
        overlap, nearest = model.tiou(record["segments"][:, None], video.segments).max(1)
        labels = torch.where(overlap >= 0.5, video.labels[nearest], labels)
    record = record | {"labels": labels}
    right = evaluate.matched(record, video)
    return record | {"status": torch.where(right, icd.KEPT, icd.DROPPED)}


def reach_ceiling(options, corrected, runs):
    """The folder of a run of stage 3 whose pseudo labels the hidden labels chose, of those that
    APL's run with the same options detected."""
    apl = reach(options, "all", runs)
    folder = apl.with_name(f"{apl.name}-{'corrected' if corrected else 'right'}")
    if is_finished(folder):
        return folder
    before = reach(options, "supervised", runs)
    found, _, d = read_checkpoint(apl)
    pseudo = dict(found["pseudo"])
    for name, video in d.hidden.items():
        pseudo[name] = chosen_by_truth(pseudo[name], video, corrected)
    stage_2 = checkpoints.load(before / "checkpoint.pt", train.Settings)
    start = apl / "start.pt"
    torch.save(stage_2 | {"pseudo": pseudo}, start)
    finish_run([*options, "--refresh", "0"], folder, start, minutes_of(before), train.Settings)
    start.unlink()
    return folder


# ---- The linear probe ---------------------------------------------------------------------------

@torch.no_grad()
def learned(detector, item, steps, s):
    """The learned representation of an item at `steps` (N,) -> (N, L * C)."""
    levels, masks = evaluate.forward(detector.pyramid, data.collate([item]), s)
    return acp.representation(levels, masks, steps[None].to(s.device))[0].cpu()


def labelled_steps(detector, videos, d, s):
    """Steps of labelled videos, about PROBE_STEPS at most.

    detector  None: the input features instead of the learned representation
    ->        x (N, F), y (N,): the class of the shortest instance that the step lies in,
              background as one more"""
    generator = torch.Generator().manual_seed(0)
    share = PROBE_STEPS / sum(video.steps for video in videos)
    x = []
    y = []
    for video in videos:
        item = data.load_item(video, d, s)
        drawn = torch.rand(video.steps, generator=generator) < share
        steps = drawn.nonzero()[:, 0]
        if detector is None:
            x.append(item["feats"][steps])
        else:
            x.append(learned(detector, item, steps, s))
        segments = item["segments"]
        y.append(acp.step_classes(steps, segments, item["labels"], segments[:0], len(d.classes)))
    return torch.cat(x), torch.cat(y)


def logistic_regression(x, y, classes, decay=1e-4, iterations=100):
    """Multinomial logistic regression by L-BFGS.

    x   (N, F), y (N,)
    ->  W (F + 1, classes), the last row the bias"""
    W = torch.zeros(x.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = torch.addmm(W[-1], x, W[:-1])
        value = F.cross_entropy(logits, y) + decay * W[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return W.detach()


def probed_network(folder, what):
    """The settings and Dataset of a run of stage 1, and the network that a probe looks into."""
    s, d, detector = read_run(folder, "detector")
    if what == "input":
        return s, d, None
    if what == "untrained":
        return s, d, train.begin(s, d).detector.eval()
    return s, d, detector


def probe(folder, what):
    """How well a linear classifier tells the classes of the test videos' steps.

    Not given in the paper: it is fitted on all training videos with all their labels, which
    stage 1 never saw, on standardised columns.
    what  "trained", the raw weights of the end of stage 1, "untrained", those it began with, or
          "input", the features
    ->    {"accuracy", "recall"}, recall averaged over the classes that are there"""
    s, d, detector = probed_network(folder, what)
    test = [data.label_video(video, d.truth[video.id], d.classes) for video in d.test
            if video.id in d.truth]
    x, y = labelled_steps(detector, [*d.labelled, *d.hidden.values()], d, s)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    W = logistic_regression((x - mean) / std, y, len(d.classes) + 1)
    x, y = labelled_steps(detector, test, d, s)
    logits = torch.addmm(W[-1], (x - mean) / std, W[:-1])
    right = (logits.argmax(1) == y).float()
    recall = [float(right[y == c].mean()) for c in y.unique()]
    return {"accuracy": float(right.mean()), "recall": statistics.mean(recall)}


# ---- Complexity ---------------------------------------------------------------------------------

def weighted_layers(module):
    """The layers of a module that Tab. S6 counts, itself included: no LayerNorm, no scales."""
    kinds = (model.Conv, model.DepthwiseConv, nn.Linear)
    return [layer for layer in module.modules() if isinstance(layer, kinds)]


def valid_steps(module, inputs, output):
    """The valid steps that a Block or a Conv works at, or the pairs of a Discriminator."""
    if isinstance(module, icd.Discriminator):
        return len(output)
    _, mask = output if isinstance(module, model.Block) else inputs
    return int(mask.sum())


def complexity(modules, run):
    """Parameters and multiply-accumulates of `modules` while run() executes: (int, int).

    Counted as Tab. S6 does: weights with biases of convolutions and linear layers at valid steps;
    no attention products. A Block's layers all work at its output's steps, a Discriminator's at
    its pairs."""
    whole = nn.ModuleList(modules)
    layers = weighted_layers(whole)
    kinds = (model.Block, icd.Discriminator)
    blocks = [module for module in whole.modules() if isinstance(module, kinds)]
    inside = set(weighted_layers(nn.ModuleList(blocks)))
    macs = []

    def count(module, inputs, output):
        weights = sum(layer.weight.numel() for layer in weighted_layers(module))
        macs.append(weights * valid_steps(module, inputs, output))

    counted = [*blocks, *(layer for layer in layers if layer not in inside)]
    hooks = [module.register_forward_hook(count) for module in counted]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    parameters = sum(p.numel() for layer in layers for p in layer.parameters())
    return parameters, sum(macs)


def complexity_table():
    """Print Tab. S6 (THUMOS14: D = 2048, T = 2304, 20 classes) beside the paper's figures."""
    s = train.Settings()
    detector = model.Detector(2048, 20, s).eval()
    discriminator = icd.Discriminator(2048, s.icd_hidden, s.icd_dropout).eval()
    feats = torch.zeros(1, 2304, 2048)
    mask = torch.ones(1, 2304, dtype=torch.bool)
    pairs = torch.zeros(10, 2048)

    def detect():
        detector(feats, mask)

    def discriminate():
        discriminator(pairs, pairs)

    heads = [detector.cls_trunk, detector.cls_out, detector.reg_trunk, detector.reg_out]
    rows = [
        ("main (backbone + neck)", [detector.backbone], detect, "26.017 M, 30.608 G"),
        ("two heads", heads, detect, "3.179 M, 14.422 G"),
        ("heads + tIoU and tND", [*heads, detector.quality], detect, "3.182 M, 14.436 G"),
        ("ICD, 10 pairs", [discriminator], discriminate, "+0.5 M, +0.005 G"),
    ]
    print(f"{'part':24}{'parameters':>12}{'GMACs':>10}   the paper (Tab. S6)")
    for name, modules, run, paper in rows:
        parameters, macs = complexity(modules, run)
        print(f"{name:24}{parameters:12,}{macs / 1e9:10.3f}   {paper}")


# ---- Tables -------------------------------------------------------------------------------------

def spread(values):
    """"mean ± standard deviation" in percent."""
    text = f"{100 * statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {100 * statistics.stdev(values):.1f}"
    return text


def last_pulse(folder):
    """The row of a run's log about its pseudo labels in the last epoch; None without."""
    pulses = [row for row in read_rows(folder / "log.jsonl")[0] if "theta_h" in row]
    return pulses[-1] if pulses else None


def detection_cells(folders, metrics, quality):
    """The cells {column: text} that the finished runs of a row give.

    folders, metrics  one a seed; metrics are the contents of metrics.json
    quality           the columns taken from their logs"""
    tious = metrics[0]["tiou"]
    averages = [m["average_mAP"] for m in metrics]
    cells = {}
    for i in (0, len(tious) // 2, len(tious) - 1):
        cells[f"mAP@{tious[i]:g}"] = spread([m["mAP"][i] for m in metrics])
    cells["average"] = spread(averages)
    cells["of each seed"] = ", ".join(f"{100 * average:.1f}" for average in averages)
    pulses = [last_pulse(folder) for folder in folders]
    for key in quality:
        name = key.replace("_", " ")
        known = all(pulse and key in pulse for pulse in pulses)
        cells[name] = spread([pulse[key] for pulse in pulses]) if known else "-"
    minutes = [minutes_of(folder) for folder in folders]
    cells["minutes"] = "-" if None in minutes else f"{statistics.mean(minutes):.1f}"
    return cells


def difference_cell(measured, first):
    """By how much runs are better than others of the same seeds: "mean ± deviation (a to b)".

    measured, first  (folders, averages, (S, R) of resampled()) of a row's runs"""
    (folders, averages, samples), (others, of_others, samples_of_others) = measured, first
    if folders == others:
        return "-"
    differences = [one - other for one, other in zip(averages, of_others)]
    low, high = interval(resampled_difference(samples, samples_of_others))
    return f"{spread(differences)} ({100 * low:.1f} to {100 * high:.1f})"


def split_stage(options):
    """A row's options as arguments without --stage, and the last stage that they name."""
    argv = options.split()
    if "--stage" not in argv:
        return argv, "all"
    at = argv.index("--stage")
    return argv[:at] + argv[at + 2:], argv[at + 1]


def row_of_metrics(name, paper, folders, quality, first):
    """A row {column: cell} of finished runs, one a seed, and what the next take for `first`.

    first  the table's first row, as difference_cell() takes it; None: this is it"""
    metrics = [read_json(folder / "metrics.json", "metrics") for folder in folders]
    row = {"row": name, "paper, THUMOS14 10 %": "-" if paper is None else f"{paper}"}
    row |= detection_cells(folders, metrics, quality)
    measured = folders, [m["average_mAP"] for m in metrics], resampled(folders)
    first = first or measured
    row["minus the first row"] = difference_cell(measured, first)
    return row, first


def ceiling_rows(table, commands, runs):
    """Train and evaluate the rows of one of CEILINGS: yields {column: cell}."""
    first = None
    for name, corrected, _ in CEILINGS[table]:
        if corrected is None:
            folders = reach_all(commands, [], "all", runs)
        else:
            folders = [reach_ceiling(options, corrected, runs) for options in commands]
        row, first = row_of_metrics(name, None, folders, MATCHES, first)
        yield row


def detection_rows(table, commands, runs):
    """Train and evaluate the rows of one of ROWS: yields {column: cell}."""
    quality = QUALITY if table == "fig3c" else MATCHES
    first = None
    for name, paper, options in ROWS[table]:
        more, stage = split_stage(options)
        folders = reach_all(commands, more, stage, runs, kind_of(table))
        row, first = row_of_metrics(name, paper, folders, quality, first)
        if table == "3b":
            folders = reach_all(commands, more, "supervised", runs)
            found = [saved(f / "calibration.json", calibration, f) for f in folders]
            mean = statistics.mean(result["rank_correlation"] for result in found)
            row["after stage 2: score against true tIoU"] = f"{mean:.2f}"
        yield row


def probe_rows(table, commands, runs):
    """Train and probe the rows of one of PROBES: yields {column: cell}."""
    for name, paper, what, options in PROBES[table]:
        folders = reach_all(commands, options.split(), "pretrain", runs)
        found = [saved(folder / f"probe-{what}.json", probe, folder, what) for folder in folders]
        yield {
            "row": name,
            "paper: accuracy, recall": "-" if paper is None else "{:.1f}, {:.1f}".format(*paper),
            "accuracy": spread([result["accuracy"] for result in found]),
            "recall": spread([result["recall"] for result in found]),
        }


def cause_cell(key, values):
    """The mean of what is known of one number of causes(), as text."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = 1 if key in COUNTS else 2
    return f"{statistics.mean(known):.{digits}f}"


def cause_rows(commands, runs):
    """Train APL and tell by class what became of its pseudo labels: yields {column: cell}."""
    found = [causes(folder) for folder in reach_all(commands, [], "all", runs)]
    for of_seeds in zip(*found):
        row = {"class": of_seeds[0]["class"]}
        for key in of_seeds[0]:
            if key != "class":
                row[key] = cause_cell(key, [result[key] for result in of_seeds])
        yield row


def table_rows(table, commands, runs):
    """Train and measure every row of a table: yields {column: cell}."""
    if table in PROBES:
        return probe_rows(table, commands, runs)
    if table in CEILINGS:
        return ceiling_rows(table, commands, runs)
    if table == "causes":
        return cause_rows(commands, runs)
    return detection_rows(table, commands, runs)


def markdown(rows):
    """Rows of one set of columns as a Markdown table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---- The command line ---------------------------------------------------------------------------

def parse_seeds(text):
    """"3" -> 0, 1, 2; "0,5," -> 0, 5; raises BadInput for anything else."""
    try:
        if "," in text:
            seeds = [int(number) for number in text.split(",") if number]
        else:
            seeds = list(range(int(text)))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise BadInput("--seeds must be how many, or a list with commas, each once, not "
                       f"{text!r}")
    return seeds


def command_of(options, seed, splits):
    """The options of every row for a seed, whose number stands in the place of {seed}."""
    options = [option.replace("{seed}", str(seed)) for option in options]
    split = ["--ratio", "0", "--split", splits[seed]] if seed < len(splits) else []
    return [*options, "--seed", str(seed), *split]


def check_data(args, options):
    """Raise BadInput where the data has no videos to judge a row by; options: of the first seed."""
    first = next(table for table in args.tables if table != "S6")
    d = data.training_data(settings_of([*options, "--audit"], kind_of(first)))
    if not d.truth:
        raise BadInput("a table needs test videos with annotations: without them there is no mAP")
    bare = [video.id for video in d.unlabelled if video.id not in d.hidden]
    judging = [table for table in args.tables if table in ("3b", "causes", "ceiling")]
    if judging and (bare or not d.unlabelled):
        raise BadInput(f"table {judging[0]} judges by the labels of the unlabelled videos, which "
                       f"must have some: {several(bare) or 'there are no such videos'}")


def parse(argv):
    """The arguments of the command line, and what is passed on to train.py; raises BadInput."""
    parser = Parser(__name__)
    parser.add_argument(
        "tables", nargs="+", choices=[*TABLES, "S6", "causes"],
        help="of the paper; open: what it leaves open; causes: pseudo labels by class; ceiling: "
             "with pseudo labels that the hidden labels chose")
    parser.add_argument(
        "--seeds", default="3", help="how many seeds (from 0), or a list with commas")
    parser.add_argument(
        "--splits", nargs="+", default=[],
        help="files of labelled ids for seeds 0, 1, ...; the others draw theirs")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/tables"), help="folder of the runs")
    args, options = parser.parse_known_args(argv)
    args.seeds = parse_seeds(args.seeds)
    idle = [name for seed, name in enumerate(args.splits) if seed not in args.seeds]
    if idle:
        raise BadInput(f"--splits are of seeds 0, 1, ...: {' '.join(idle)} would not be used with "
                       f"--seeds {','.join(map(str, args.seeds))}")
    for option in options:
        if option.split("=")[0] in OURS:
            raise BadInput(f"{option} is set by each row")
    for table in args.tables:  # before hours of training
        for *_, more in TABLES.get(table, ()):
            s = settings_of([*options, *more.split()], kind_of(table))
            if s.test_subset == "none":
                raise BadInput("a table needs test videos: --test-subset none has no mAP")
    if set(args.tables) == {"S6"}:
        if options:
            raise BadInput(f"table S6 trains nothing: {' '.join(options)} would not be used")
    else:
        check_data(args, command_of(options, args.seeds[0], args.splits))
    return args, options


def with_progress(table, rows):
    """The rows of a table as they come, each with a line about how far it is."""
    count = len(TABLES.get(table, ()))
    began = time.time()
    for done, row in enumerate(rows, 1):
        if count:
            minutes = (time.time() - began) / 60 / done * (count - done)
            say(f"table {table}: row {done} of {count} is there, about {minutes:.0f} min left")
        yield row


def make_tables(args, options):
    """Train what the tables need and print them."""
    commands = [command_of(options, seed, args.splits) for seed in args.seeds]
    seeds = ", ".join(map(str, args.seeds))
    report = []
    warn(old_runs(args.runs))
    for table in args.tables:
        if table == "S6":
            complexity_table()
            continue
        rows = list(with_progress(table, table_rows(table, commands, args.runs)))
        report.append(f"Table {table}, seeds {seeds}\n\n{markdown(rows)}\n")
    print("\n".join(report))


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    try:
        with guard() as stop:
            make_tables(*parse(argv))
    except SystemExit as ended:  # a run that has said why
        return ended.code
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
