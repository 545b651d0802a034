"""Detection with the joint score, and mAP exactly as the ActivityNet toolkit computes it.

    python evaluate.py --checkpoint runs/hapt/checkpoint.pt
    python evaluate.py --pred pred.json --gt gt.json --subset test --tiou 0.3:0.7:0.1

Evaluating changes nothing: no checkpoint is written, no epoch is chosen.
"""
import argparse
import math
import os
import pickle
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from alqa import joint_score
from data import (
    BadInput,
    DataSettings,
    ahead,
    collate,
    column,
    dict_of_all,
    from_stage_2,
    in_subset,
    load_dataset,
    load_item,
    of_run,
    read_annotations,
    read_predictions,
    rows,
    setting,
    share_of,
    write_json,
)
from model import Detector, DetectorSettings, decode, soft_nms, tiou

# ---- Settings -----------------------------------------------------------------------------------

def parse_tious(text):
    """"0.3:0.7:0.1" (both ends included) or "0.3,0.5" -> thresholds; raises BadInput."""
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            values = np.linspace(first, last, round((last - first) / step) + 1)
        else:
            values = np.array(text.split(","), dtype=np.float64)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise BadInput(
            f"--tiou must be start:end:step or a list with commas, not {text!r}") from None
    if not len(values) or not ((values > 0) & (values <= 1)).all():
        raise BadInput(f"--tiou {text!r} gives thresholds outside (0, 1]")
    return values


@dataclass(frozen=True)
class DetectionSettings(DetectorSettings, DataSettings):
    """All that evaluation needs of a detector. [S] the paper, [A] ActionFormer, [J] neither."""
    eps: float = from_stage_2(1e-6, "least reliability P_tiou - P_tnd in Eq. (4) and (5) [J]")
    pre_nms: int = from_stage_2(2000, "(point, class) pairs before Soft-NMS [A]", "positive")
    min_score: float = from_stage_2(0.001, "least joint score, before and in Soft-NMS [A]")
    min_length: float = from_stage_2(0.05, "least length of a segment, in steps [A]")
    nms_sigma: float = from_stage_2(0.5, "sigma of Soft-NMS [A]", "positive")
    nms_agnostic: bool = from_stage_2(False, "Soft-NMS over all classes at once [A: ActivityNet]")
    max_detections: int = from_stage_2(200, "detections kept a video [A]", "positive")
    tiou: str = from_stage_2("0.3:0.7:0.1", "thresholds of mAP [S]")
    weights: str = of_run("ema", "weights that are reported first [J]", ("ema", "raw"))
    precision: str = setting(
        "auto",
        "auto: bfloat16 where the hardware multiplies it fast", ("auto", "float32", "bfloat16"))
    device: str = of_run("auto", "auto, cpu, cuda, ...")

    def __post_init__(self):
        super().__post_init__()
        parse_tious(self.tiou)


def pick_device(name):
    """The device of that name, "auto" being cuda where there is one, else cpu.

    Under torchrun "cuda" is a device of its own for each process. Raises BadInput if the device
    cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rank = int(os.environ["LOCAL_RANK"])
        if name != "cuda" or rank >= torch.cuda.device_count():
            raise BadInput(f"--device {name} under torchrun: each process needs a device of its "
                           f"own, cuda, and {torch.cuda.device_count()} are here")
        torch.cuda.set_device(rank)
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name} cannot be used here: {reason}") from None
    return name


def pick_precision(device):
    """"bfloat16" where the hardware multiplies it fast, else "float32".

    CUDA from Ampere on, CPUs with AMX or AVX512-BF16."""
    fast = False
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu" and torch.backends.mkldnn.is_available():
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


# ---- Detection ----------------------------------------------------------------------------------

def forward(network, batch, s):
    """The network's output for a batch, on the device and in the precision of the settings.

    network: a Detector, or its method pyramid() where the heads are not needed."""
    kind = torch.device(s.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=s.precision == "bfloat16"):
        return network(batch["feats"].to(s.device), batch["mask"].to(s.device))


def suppress(outputs, s):
    """Outputs of a batch -> B records, as detect() has them: the best pairs, then Soft-NMS."""
    p_cls = torch.sigmoid(outputs.cls_logits)
    joint = joint_score(p_cls, outputs.p_tiou, outputs.p_tnd, s.eps)  # (B, P, K)
    segments = decode(outputs.points, outputs.offsets)
    records = []
    for b, scores in enumerate(joint * outputs.mask[..., None]):
        best, index = scores.flatten().topk(min(s.pre_nms, scores.numel()))
        point, label = torch.unravel_index(index, scores.shape)
        record = {
            "segments": segments[b, point],
            "labels": label,
            "scores": best,
            "p_cls": p_cls[b, point, label],
            "p_tiou": outputs.p_tiou[b, point],
            "p_tnd": outputs.p_tnd[b, point],
        }
        start, end = record["segments"].T
        record = rows(record, (best > s.min_score) & (end - start > s.min_length))
        group = record["labels"] * (not s.nms_agnostic)
        chosen, decayed = soft_nms(record["segments"], record["scores"], group, s.nms_sigma,
                                   s.min_score, s.max_detections)
        record = rows(record, chosen) | {"scores": decayed}
        records.append(rows(record, slice(s.max_detections)))
    return records


@torch.no_grad()
def detect(detector, videos, data, s):
    """Detections of whole videos {id: record}, best joint score first, on the CPU.

    O(T) memory, whatever the length of a video. Of many processes each takes its share of the
    videos, and all get all detections. Keeps joint scores over s.min_score, the best s.pre_nms
    (point, class) pairs, segments longer than s.min_length, and after Soft-NMS s.max_detections.
    A record: "segments" (N, 2) in grid steps, "labels", "scores" (joint, after Soft-NMS), "p_cls",
    "p_tiou", "p_tnd"."""
    detector.eval()
    order = sorted(videos, key=lambda video: video.steps)  # videos of like length share a batch
    firsts = share_of(range(0, len(order), s.batch))

    def load(first):
        return collate([load_item(video, data, s) for video in order[first:first + s.batch]])

    found = {}
    for batch in ahead(load, firsts):
        records = suppress(forward(detector, batch, s), s)
        for video, record in zip(batch["videos"], records):
            found[video.id] = {key: value.cpu() for key, value in record.items()}
    found = dict_of_all(found)
    return {video.id: found[video.id] for video in videos}


def by_row(columns):
    """{key: list} -> [{key: value}]."""
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def export(videos, detections, classes):
    """Detections {id: record} in ActivityNet's result format.

    -> {"version", "results": {id: [{"label", "score", "segment"}]}, "external_data"}"""
    results = {}
    for video in videos:
        record = detections[video.id]
        results[video.id] = by_row({
            "label": [classes[label] for label in record["labels"]],
            "score": record["scores"].tolist(),
            "segment": video.in_seconds(record["segments"]).tolist(),
        })
    return {"version": "VERSION 1.3", "results": results, "external_data": {}}


def export_pseudo_labels(videos, records, classes, status):
    """Pseudo labels {id: record of icd.refine()} in seconds.

    -> {id: [{"label", "segment", "score", "class_score", "tIoU", "tND", "similarity", "status"}]};
       a similarity without labelled instances is None; `status` names the states"""
    found = {}
    for video in videos:
        record = records[video.id]
        similarity = record["similarity"].tolist()
        found[video.id] = by_row({
            "label": [classes[label] for label in record["labels"]],
            "segment": video.in_seconds(record["segments"]).tolist(),
            "score": record["scores"].tolist(),
            "class_score": record["p_cls"].tolist(),
            "tIoU": record["p_tiou"].tolist(),
            "tND": record["p_tnd"].tolist(),
            "similarity": [None if math.isnan(s) else s for s in similarity],
            "status": [status[state] for state in record["status"]],
        })
    return found


# ---- mAP ----------------------------------------------------------------------------------------

def interpolated_ap(tp, positives):
    """Interpolated average precision of detections in descending order of score.

    tp         (M,) bool, which are true positives
    positives  > 0, the number of instances"""
    precision = np.cumsum(tp) / np.arange(1, len(tp) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a larger one
    return float(highest[tp].sum() / positives)  # each true positive is a step of 1 / positives


def match(segments, truth, tious):
    """Which detections of a class in a video are true positives, at each threshold.

    Each detection, best score first, takes the free instance of largest tIoU, if that reaches the
    threshold.
    segments  (M, 2), best score first
    truth     (N, 2)
    ->        (thresholds, M) bool"""
    overlap = tiou(segments[:, None], truth)  # (M, N)
    free = np.ones((len(tious), len(truth)), dtype=bool)
    tp = np.zeros((len(tious), len(segments)), dtype=bool)
    reaching = overlap.max(1, initial=0) >= tious.min()  # few do, and only these need the loop
    for i in np.nonzero(reaching)[0]:
        open_to = free & (overlap[i] >= tious[:, None])  # (thresholds, N)
        best = np.where(open_to, overlap[i], -1).argmax(1)
        tp[:, i] = open_to.any(1)
        free[tp[:, i], best[tp[:, i]]] = False
    return tp


def average_precision(truth, found, tious):
    """AP of one class at each threshold.

    truth  {video: N segments}, one instance or more
    found  [(video, score, segment)], in any order"""
    found = sorted(found[::-1], key=lambda detection: -detection[1])  # ties: the last comes first
    rows_of = {video: [] for video in truth}
    for row, (video, _, _) in enumerate(found):
        if video in truth:
            rows_of[video].append(row)
    segments = np.array([segment for _, _, segment in found], dtype=np.float64).reshape(-1, 2)
    tp = np.zeros((len(tious), len(found)), dtype=bool)
    for video, mine in rows_of.items():
        tp[:, mine] = match(segments[mine], np.array(truth[video]), tious)
    instances = sum(map(len, truth.values()))
    return [interpolated_ap(hits, instances) for hits in tp]


def mean_average_precision(truth, predictions, tious):
    """mAP as the ActivityNet toolkit computes it, over the classes of the ground truth.

    A detection in a video without ground truth is a false positive, one of a class without ground
    truth counts nowhere.
    truth        {id: Annotation}, one instance or more
    predictions  {id: [{"label", "score", "segment"}]}, times in seconds as those of the truth
    ->           the content of metrics.json, as fractions"""
    tious = np.asarray(tious, dtype=np.float64)
    instances = {}  # {class: {video: [segment]}}
    for video, a in truth.items():
        for label, segment in zip(a.labels, a.segments):
            instances.setdefault(label, {}).setdefault(video, []).append(segment)
    found = {}  # {class: [(video, score, segment)]}
    for video, detections in predictions.items():
        for d in detections:
            found.setdefault(d["label"], []).append((video, d["score"], d["segment"]))
    ap = {}
    for label, segments in instances.items():
        ap[label] = average_precision(segments, found.get(label, []), tious)
    mAP = np.mean(list(ap.values()), axis=0)
    return {
        "tiou": tious.tolist(),
        "mAP": mAP.tolist(),
        "average_mAP": float(mAP.mean()),
        "ap": ap,
        "videos": len(truth),
        "instances": sum(len(a.labels) for a in truth.values()),
    }


def evaluate_detector(detector, data, s):
    """(metrics, predictions) of a detector on the test videos."""
    detections = detect(detector, data.test, data, s)
    predictions = export(data.test, detections, data.classes)
    tious = parse_tious(s.tiou)
    return mean_average_precision(data.ground_truth, predictions["results"], tious), predictions


def table(metrics, title):
    """A table of mAP in percent, with the number of videos, instances and classes."""
    head = "".join(f"{threshold:8.2f}" for threshold in metrics["tiou"])
    body = "".join(f"{100 * value:8.2f}" for value in metrics["mAP"])
    return (f"{title}: {metrics['videos']} videos, {metrics['instances']} instances, "
            f"{len(metrics['ap'])} classes\n"
            f"tIoU  {head}    Avg.\n"
            f"mAP % {body}{100 * metrics['average_mAP']:8.2f}")


# ---- The audit of pseudo labels -----------------------------------------------------------------

def matched(record, video):
    """Which pseudo labels of a record match an instance of their class in a LabelledVideo.

    At tIoU 0.5, one to one, the best score first.
    -> (N,) bool"""
    right = torch.zeros(len(record["labels"])).bool()
    order = torch.argsort(record["scores"], descending=True, stable=True)
    for c in video.labels.unique():
        mine = order[record["labels"][order] == c]
        segments = record["segments"][mine].double().numpy()
        truth = video.segments[video.labels == c].double().numpy()
        right[mine] = torch.from_numpy(match(segments, truth, np.array([0.5]))[0])
    return right


def pseudo_label_quality(records, hidden):
    """Quality of pseudo labels against labels that training never sees, as Fig. 3(c) has it.

    records  {id: record}, hidden {id: LabelledVideo}
    ->       class accuracy (of the instance that overlaps most), mean tIoU with it, positive
             accuracy (its class, and tIoU over 0.5), precision and recall of one-to-one matches
             of the class at tIoU 0.5"""
    judged = {}
    for name, record in records.items():
        video = hidden[name]
        overlap = tiou(record["segments"][:, None], video.segments)  # (M, N)
        best, nearest = F.pad(overlap, (0, 1)).max(1)  # one more: 0 without an instance
        labels = F.pad(video.labels, (0, 1), value=-1)
        right = (labels[nearest] == record["labels"]) & (best > 0)
        judged[name] = {"best": best, "right": right, "hit": matched(record, video)}
    best, right, hit = (column(judged, key).double() for key in ("best", "right", "hit"))
    found = max(len(hit), 1)
    instances = sum(len(hidden[name].labels) for name in records)
    return {
        "class_accuracy": float(right.sum()) / found,
        "mean_tIoU": float(best.sum()) / found,
        "positive_accuracy": float(right[best > 0.5].sum()) / found,
        "precision": float(hit.sum()) / found,
        "recall": float(hit.sum()) / max(instances, 1),
    }


# ---- Checkpoints and the command line -----------------------------------------------------------

CHECKPOINT = {
    "settings", "classes", "mean", "std", "labelled", "detector", "ema", "stage", "epoch"}


def read_checkpoint(path):
    """A checkpoint of train.py on the CPU, read without executing anything.

    Raises BadInput if it is missing or no such file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not CHECKPOINT <= set(checkpoint):
            raise ValueError("it is not a checkpoint of train.py")
        return checkpoint
    except FileNotFoundError:
        raise BadInput(f"checkpoint not found: {path}") from None
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError,
            pickle.UnpicklingError) as error:
        # torch.load raises all of these for a file that is cut short, pickled or foreign
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"checkpoint {path} cannot be read: {reason}") from None


def read_settings(checkpoint, path):
    """The DetectionSettings of a checkpoint; raises BadInput where they lack or break one."""
    found = checkpoint["settings"]
    try:
        return DetectionSettings(**{f.name: found[f.name] for f in fields(DetectionSettings)})
    except KeyError as name:
        raise BadInput(
            f"checkpoint {path} is not of this version: it lacks the setting {name}") from None
    except BadInput as error:
        raise BadInput(f"checkpoint {path} is not of this version: {error}") from None


def load_detector(checkpoint, path, s, dim):
    """The Detector of a checkpoint, with the weights that the settings name; raises BadInput."""
    detector = Detector(dim, len(checkpoint["classes"]), s)
    try:
        detector.load_state_dict(checkpoint["ema" if s.weights == "ema" else "detector"])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"checkpoint {path} is not of this version: {reason}") from None
    return detector


def evaluate_checkpoint(args):
    """(metrics, title) of --checkpoint: detect on its test videos; raises BadInput."""
    checkpoint = read_checkpoint(args.checkpoint)
    s = read_settings(checkpoint, args.checkpoint)
    s = replace(s, tiou=args.tiou or s.tiou, weights=args.weights or s.weights,
                device=pick_device(args.device or "auto"))
    data = load_dataset(s, checkpoint)
    detector = load_detector(checkpoint, args.checkpoint, s, data.dim).to(s.device)
    metrics, _ = evaluate_detector(detector, data, s)
    return metrics, f"{args.checkpoint} ({s.weights} weights)"


def evaluate_predictions(args):
    """(metrics, title) of --pred against --gt.

    Raises BadInput, also for a label that --gt does not know in any subset."""
    annotations = read_annotations(args.gt)
    predictions = read_predictions(args.pred)
    truth = annotations if args.subset is None else in_subset(annotations, args.subset)
    if not any(a.labels for a in truth.values()):
        raise BadInput(f"ground truth {args.gt} has no instance in the subset {args.subset!r}")
    known = {label for a in annotations.values() for label in a.labels}
    for video, found in predictions.items():
        for d in found:
            if d["label"] not in known:
                raise BadInput(f"prediction file {args.pred}, video {video}: the label "
                               f"{d['label']!r} is unknown to {args.gt}")
    tious = parse_tious(args.tiou or "0.3:0.7:0.1")
    return mean_average_precision(truth, predictions, tious), args.pred


ARGUMENTS = {
    "--checkpoint": "a checkpoint of train.py: detect on its test videos and evaluate",
    "--device": "where to detect: auto (the default), cpu, cuda, ...",
    "--pred": "predictions in ActivityNet's result format",
    "--gt": "ground truth in ActivityNet's annotation format",
    "--subset": "the subset of --gt, in any letter case (default: every video)",
    "--tiou": "thresholds, start:end:step (default: the checkpoint's, or 0.3:0.7:0.1)",
    "--json": "write the metrics here as well",
}


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for flag, comment in ARGUMENTS.items():
        parser.add_argument(flag, help=comment)
    parser.add_argument(
        "--weights", choices=("ema", "raw"),
        help="which weights of the checkpoint (default: as it was trained)")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.pred) or bool(args.pred) != bool(args.gt):
        parser.error("give either --checkpoint, or --pred and --gt")
    try:
        evaluate = evaluate_checkpoint if args.checkpoint else evaluate_predictions
        metrics, title = evaluate(args)
        print(table(metrics, title))
        if args.json:
            write_json(args.json, metrics)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
