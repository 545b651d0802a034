"""Detection with the joint score, and mAP exactly as the ActivityNet toolkit computes it.

    python evaluate.py --checkpoint runs/my                        mAP on its test videos
    python evaluate.py --checkpoint runs/my --features new.npy     what happens in a new video
    python evaluate.py --pred pred.json --gt gt.json --subset test --tiou 0.3:0.7:0.1

Evaluating changes nothing: no checkpoint is written, no epoch is chosen. Only detections of equal
score may be ranked otherwise than in the toolkit, whose sort is not stable.
"""
import argparse
import csv
import io
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from alqa import joint_score
from data import (
    LAYOUTS,
    MILLION,
    PLACES,
    READERS,
    BadInput,
    DataSettings,
    ahead,
    collate,
    column,
    complain,
    dict_of_all,
    from_stage_2,
    load_dataset,
    load_item,
    load_torch,
    of_run,
    place_video,
    read_annotations,
    read_predictions,
    read_video_scores,
    rows,
    say,
    setting,
    several,
    share_of,
    short,
    shown,
    subsets_of,
    sum_features,
    unknown_video,
    warn,
    without_labels,
    write_json,
    write_text,
)
from model import Detector, DetectorSettings, soft_nms, tiou, vote

# ---- Settings -----------------------------------------------------------------------------------

def parse_tious(text):
    """"0.3:0.7:0.1" (both ends included) or "0.3,0.5" -> thresholds; raises BadInput."""
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            steps = (last - first) / step
            if abs(steps - round(steps)) > 1e-6 or not 0 <= steps < 1000:
                raise BadInput(f"--tiou {short(text)}: the step does not divide the range")
            values = np.linspace(first, last, round(steps) + 1)
        else:
            values = np.array(text.split(","), dtype=np.float64)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise BadInput(
            f"--tiou must be start:end:step or a list with commas, not {shown(text)}") from None
    if not len(values) or not ((values > 0) & (values <= 1)).all():
        raise BadInput(f"--tiou {shown(text)} gives thresholds outside (0, 1]")
    return values


@dataclass(frozen=True)
class DetectionSettings(DetectorSettings, DataSettings):
    """All that evaluation needs of a detector. [S] the paper, [A] ActionFormer, [J] neither."""
    eps: float = from_stage_2(1e-6, "least reliability P_tiou - P_tnd in Eq. (4) and (5) [J]")
    pre_nms: int = from_stage_2(
        2000, "(point, class) pairs of a level before Soft-NMS [A]", "from 1 to a million")
    min_score: float = from_stage_2(0.001, "least joint score, before and in Soft-NMS [A]")
    min_length: float = from_stage_2(0.05, "least length of a segment, in steps [A]")
    nms_sigma: float = from_stage_2(0.5, "sigma of Soft-NMS [A]", "positive")
    nms_agnostic: bool = from_stage_2(False, "Soft-NMS over all classes at once [A: ActivityNet]")
    vote: float = from_stage_2(
        0.0, "tIoU from which class-agnostic Soft-NMS averages a segment with its neighbours; 0: "
        "none [A: 0.9 ActivityNet]", "a share")
    max_detections: int = from_stage_2(
        200, "detections kept a video [A]", "from 1 to a million")
    tiou: str = from_stage_2("0.3:0.7:0.1", "thresholds of mAP [S]")
    weights: str = of_run("ema", "weights that are reported first [J]", ("ema", "raw"))
    precision: str = setting(
        "auto",
        "auto: bfloat16 where the hardware multiplies it fast", ("auto", "float32", "bfloat16"))
    device: str = of_run("auto", "auto, cpu, cuda, ...")

    def __post_init__(self):
        super().__post_init__()
        parse_tious(self.tiou)

    def build(self, dim, num_classes):
        """The detector that these settings are of."""
        return Detector(dim, num_classes, self)


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names that torch is giving up
            torch.zeros(1, device=name).item()
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


def best_pairs(scores, sizes, most):
    """The best (point, class) pairs of each level: scores (P, K) -> points (N,), labels (N,).

    sizes  how many points each level has
    most   pairs of a level"""
    points = []
    labels = []
    first = 0
    for level in scores.split(sizes):
        _, index = level.flatten().topk(min(most, level.numel()))
        point, label = torch.unravel_index(index, level.shape)
        points.append(first + point)
        labels.append(label)
        first += len(level)
    return torch.cat(points), torch.cat(labels)


def suppress(outputs, s):
    """Outputs of a batch -> B records, as detect() has them: the best pairs, then Soft-NMS."""
    p_cls = outputs.p_cls()
    joint = joint_score(p_cls, outputs.p_tiou, outputs.p_tnd, s.eps)  # (B, P, K)
    segments = outputs.segments()
    records = []
    for b, scores in enumerate(joint * outputs.mask[..., None]):
        point, label = best_pairs(scores, outputs.sizes(), s.pre_nms)
        record = {
            "segments": segments[b, point],
            "labels": label,
            "scores": scores[point, label],
            "p_cls": p_cls[b, point, label],
            "p_tiou": outputs.p_tiou[b, point],
            "p_tnd": outputs.p_tnd[b, point],
        }
        start, end = record["segments"].T
        scored = record["scores"] > s.min_score
        record = rows(record, scored & (end - start > s.min_length))
        group = record["labels"] * (not s.nms_agnostic)
        chosen, decayed = soft_nms(record["segments"], record["scores"], group, s.nms_sigma,
                                   s.min_score, s.max_detections)
        kept = rows(record, chosen) | {"scores": decayed}
        if s.vote and s.nms_agnostic:
            kept["segments"] = vote(kept["segments"], record["segments"], record["scores"], s.vote)
        records.append(rows(kept, slice(s.max_detections)))
    return records


def check_outputs(outputs, videos):
    """Raise BadInput for NaN or infinity in the outputs of a batch."""
    for x in outputs.predictions():
        if not x.isfinite().all():
            raise BadInput(f"the detector gives NaN or infinity for the videos "
                           f"{several([video.id for video in videos])}: their features, "
                           "standardised, or its weights are too large")


@torch.no_grad()
def detect(detector, videos, data, s):
    """Detections of whole videos {id: record}, best joint score first, on the CPU.

    O(T) memory, whatever the length of a video. Of many processes each takes its share of the
    videos, and all get all detections. Keeps joint scores over s.min_score, the best s.pre_nms
    (point, class) pairs of each level, segments longer than s.min_length, and after Soft-NMS
    s.max_detections.
    A record: "segments" (N, 2) in grid steps, "labels", "scores" (joint, after Soft-NMS), "p_cls",
    "p_tiou", "p_tnd"."""
    detector.eval()
    order = sorted(videos, key=lambda video: video.steps)  # videos of like length share a batch
    firsts = share_of(range(0, len(order), s.batch))

    def load(first):
        return collate([load_item(video, data, s) for video in order[first:first + s.batch]])

    found = {}
    for batch in ahead(load, firsts):
        outputs = forward(detector, batch, s)
        check_outputs(outputs, batch["videos"])
        records = suppress(outputs, s)
        for video, record in zip(batch["videos"], records):
            found[video.id] = {key: value.cpu() for key, value in record.items()}
    found = dict_of_all(found)
    return {video.id: found[video.id] for video in videos}


def with_seconds(record, video):
    """A record with its segments in seconds, within the video, and without those of no length."""
    segments = video.in_seconds(record["segments"])
    return rows(record | {"segments": segments}, segments[:, 1] > segments[:, 0])


def by_row(columns):
    """{key: list} -> [{key: value}]."""
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def export(videos, detections, classes):
    """Detections {id: record} in ActivityNet's result format.

    -> {"version", "results": {id: [{"label", "score", "segment"}]}, "external_data"}"""
    results = {}
    for video in videos:
        record = with_seconds(detections[video.id], video)
        results[video.id] = by_row({
            "label": [classes[label] for label in record["labels"]],
            "score": record["scores"].tolist(),
            "segment": record["segments"].tolist(),
        })
    return {"version": "VERSION 1.3", "results": results, "external_data": {}}


def with_video_scores(results, scores_of):
    """Detections of one class -> of the two classes that score best for their whole video.

    The score is the geometric mean of both, as the public ActionFormer has it. A video without
    scores of its own has no detection.
    results  {id: [{"label", "score", "segment"}]}, scores_of {id: {label: score}}"""
    found = {}
    for video, detections in results.items():
        scores = scores_of.get(video) or scores_of.get(f"v_{video}", {})
        best = sorted(scores, key=scores.get, reverse=True)[:2]
        found[video] = [d | {"label": label, "score": math.sqrt(d["score"] * max(scores[label], 0))}
                        for d in detections for label in best]
        found[video].sort(key=lambda d: -d["score"])
    return found


def export_pseudo_labels(videos, records, classes, status):
    """Pseudo labels {id: record of icd.refine()} in seconds.

    -> {id: [{"label", "segment", "score", "class_score", "tIoU", "tND", "similarity", "status"}]};
       a similarity without labelled instances is None; `status` names the states"""
    found = {}
    for video in videos:
        record = with_seconds(records[video.id], video)
        similarity = record["similarity"].tolist()
        found[video.id] = by_row({
            "label": [classes[label] for label in record["labels"]],
            "segment": record["segments"].tolist(),
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
    # Without a floor under the union, as the toolkit: where neither has a length, 0 / 0 is a hit.
    with np.errstate(invalid="ignore"):
        overlap = tiou(segments[:, None], truth, eps=-np.inf)  # (M, N)
    overlap = np.where(np.isnan(overlap), np.inf, overlap)
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
    """(metrics, predictions) of a detector on the test videos; metrics None without annotations."""
    detections = detect(detector, data.test, data, s)
    predictions = export(data.test, detections, data.classes)
    if s.ext_scores:
        results = with_video_scores(predictions["results"], read_video_scores(s.ext_scores))
        predictions |= {"results": results, "external_data": {"used": True}}
    if not data.ground_truth:
        return None, predictions
    judged = {name: predictions["results"][name] for name in data.ground_truth}
    metrics = mean_average_precision(data.ground_truth, judged, parse_tious(s.tiou))
    return metrics | {"external_scores": s.ext_scores}, predictions


def table(metrics, title):
    """A table of mAP in percent, with the number of videos, instances and classes."""
    head = "".join(f"{threshold:8.2f}" for threshold in metrics["tiou"])
    body = "".join(f"{100 * value:8.2f}" for value in metrics["mAP"])
    if metrics.get("external_scores"):
        title += " with external video-level scores"
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


# ---- Checkpoints --------------------------------------------------------------------------------

def check_weights(found, expected, where):
    """Raise BadInput unless `found` has the names, shapes and dtypes of `expected`, and is finite.

    found  a state dict from a file, expected {name: tensor}"""
    if not isinstance(found, dict) or found.keys() != expected.keys():
        other = found.keys() ^ expected.keys() if isinstance(found, dict) else []
        raise BadInput(f"{where} is not of this version: it lacks or adds {several(other)}")
    for name, value in expected.items():
        x = found[name]
        if not isinstance(x, torch.Tensor) or (x.layout, x.device.type) != (torch.strided, "cpu"):
            raise BadInput(f"{where} is not of this version: {name} is no tensor")
        if (x.shape, x.dtype) != (value.shape, value.dtype):
            raise BadInput(f"{where} is not of this version: {name} is {x.dtype} "
                           f"{list(x.shape)}, not {value.dtype} {list(value.shape)}")
        if not x.isfinite().all():
            raise BadInput(f"{where} is not usable: {name} holds NaN or infinity")


def check_settings(found, kind, where):
    """The settings of a class that a checkpoint holds; raises BadInput where they are others."""
    if not isinstance(found, dict):
        raise BadInput(f"{where} is not of this version: its settings are none")
    lacking = [f.name for f in fields(kind) if f.name not in found]
    if lacking:
        raise BadInput(f"{where} is not of this version: it lacks the settings {several(lacking)}")
    try:
        return kind(**{f.name: found[f.name] for f in fields(kind)})
    except BadInput as error:
        raise BadInput(f"{where} is not of this version: {error}") from None


def is_names(value):
    """Whether a value is a list of different texts."""
    return (isinstance(value, list) and all(isinstance(name, str) for name in value)
            and len(set(value)) == len(value))


def check_standard(content, where):
    """Raise BadInput unless a checkpoint's mean and std can standardise the input."""
    for name in ("mean", "std"):
        x = content[name]
        good = isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 1
        if not good or not 0 < len(x) < MILLION or not x.isfinite().all():
            raise BadInput(f"{where} is not usable: its {name} is no row of finite numbers")
    if content["mean"].shape != content["std"].shape or not (content["std"] > 0).all():
        raise BadInput(f"{where} is not usable: its std is 0 somewhere, or its mean of another "
                       "width")


CHECKPOINT = {"settings", "classes", "mean", "std", "fps"}  # and the weights, raw, averaged or both
WEIGHTS = {"raw": "detector", "ema": "ema"}


def read_checkpoint(path, kind=DetectionSettings):
    """A checkpoint of train.py on the CPU, with which a detector can be built.

    Read without executing anything, and checked before anything is built from it: the archive's
    checksums, the settings' types and ranges, the weights' names, shapes, dtypes and numbers.
    path  the file, checkpoint.pt or detector.pt, or the folder of its run
    kind  the class of its settings, which build its detector
    Raises BadInput."""
    path = Path(path)
    if path.is_dir():
        whole, small = path / "checkpoint.pt", path / "detector.pt"
        path = small if small.exists() and not whole.exists() else whole
    where = f"checkpoint {path}"
    content = load_torch(path, "checkpoint")
    if not isinstance(content, dict) or not CHECKPOINT <= set(content):
        raise BadInput(f"{where} cannot be read: it is not of train.py, or of another version")
    s = check_settings(content["settings"], kind, where)
    if not is_names(content["classes"]):
        raise BadInput(f"{where} is not usable: its classes are no list of names")
    fps = content["fps"]
    if fps is not None and not (isinstance(fps, float) and 0 < fps < MILLION):
        raise BadInput(f"{where} is not usable: its fps is {shown(fps)}")
    check_standard(content, where)
    with torch.device("meta"):  # the shapes, without the memory
        shape = s.build(len(content["mean"]), len(content["classes"])).state_dict()
    parts = [part for part in WEIGHTS.values() if part in content]
    if not parts:
        raise BadInput(f"{where} is not of this version: it has no weights")
    for part in parts:
        check_weights(content[part], shape, where)
    return content


def load_detector(content, s):
    """The Detector of a checkpoint that read_checkpoint() has read, on the settings' device.

    s: its settings, whose `weights` choose the raw or the averaged ones. Raises BadInput where the
    checkpoint has the others alone."""
    part = WEIGHTS[s.weights]
    if part not in content:
        raise BadInput(f"the checkpoint has no {s.weights} weights")
    detector = s.build(len(content["mean"]), len(content["classes"]))
    detector.load_state_dict(content[part])
    return detector.to(s.device)


# ---- Weights from elsewhere ---------------------------------------------------------------------

# Names of the public ActionFormer and of this project.
RENAMED = (
    (r"backbone\.embd\.(\d)\.conv", r"backbone.embed.convs.\1"),
    (r"backbone\.embd_norm", "backbone.embed.norms"),
    (r"\.ln(\d)\.", r".norm\1."),
    (r"attn\.(query|key|value)_conv\.conv", r"attn.convs.\1"),
    (r"attn\.(query|key|value)_norm", r"attn.norms.\1"),
    (r"attn\.(query|key|value)\.", r"attn.linears.\1."),
    (r"mlp\.3", "mlp.2"),
    (r"drop_path_attn", "drop1"),
    (r"drop_path_mlp", "drop2"),
    (r"neck\.fpn_norms", "backbone.neck"),
    (r"cls_head\.cls_head\.conv", "cls_out"),
    (r"reg_head\.offset_head\.conv", "reg_out"),
    (r"(cls|reg)_head\.head\.(\d)\.conv", r"\1_trunk.convs.\2"),
    (r"(cls|reg)_head\.norm", r"\1_trunk.norms"),
    (r"query", "0"),
    (r"key", "1"),
    (r"value", "2"),
)


def reshaped(key, value):
    """A weight of the public ActionFormer in this project's shape."""
    if value.ndim < 3:
        return value
    if key.endswith("weight") and value.shape[1:] == (1, 3):
        return value[:, 0].T  # depth-wise
    if key.endswith("weight") and value.shape[2] == 3:
        return value.permute(2, 0, 1)  # (out, in, 3) -> (3, out, in)
    return value.squeeze(-1) if value.shape[0] > 1 else value.flatten()


def public_weights(state):
    """The public ActionFormer's state dict under this project's names and shapes."""
    found = {}
    scales = []
    for key, value in state.items():
        if "reg_head.scale" in key:
            scales.append(value.flatten())
            continue
        for old, new in RENAMED:
            key = re.sub(old, new, key)
        found[key] = reshaped(key, value)
    return found | ({"scales": torch.cat(scales)} if scales else {})


def read_weights(path):
    """{name: tensor} of a checkpoint, ours or the public ActionFormer's; averaged ones if it can.

    Raises BadInput."""
    content = load_torch(path, "checkpoint")
    try:
        parts = ("state_dict_ema", "state_dict", "ema", "detector")
        state = next((content[part] for part in parts if part in content), content)
        state = {key.removeprefix("module."): value for key, value in state.items()
                 if isinstance(value, torch.Tensor) and value.isfinite().all()}
    except (TypeError, AttributeError, RuntimeError):
        raise BadInput(f"checkpoint {path} cannot be read: it holds no weights") from None
    return public_weights(state) if any("backbone.embd." in key for key in state) else state


def take_weights(detector, path):
    """Load what fits of a checkpoint into a Detector -> what does not fit, in words.

    Raises BadInput where nothing does."""
    found, mine = read_weights(path), detector.state_dict()
    fitting = {name: value for name, value in found.items()
               if name in mine and value.shape == mine[name].shape}
    if not fitting:
        raise BadInput(f"checkpoint {path} has no weight of a name and shape that fits")
    detector.load_state_dict(mine | fitting)
    new = [name for name in mine if name not in fitting]
    unused = [name for name in found if name not in fitting]
    return (f"{len(fitting)} of {len(mine)} weights are those of {path}; new: "
            f"{several(new, 8) or 'none'}; not used: {several(unused, 8) or 'none'}")


# ---- New videos ---------------------------------------------------------------------------------

class Localizer:
    """A trained detector that says what happens from when to when in a new video.

        localize = Localizer("runs/my")
        segments, labels, scores = localize(np.load("video.npy"))

    path     a run's folder, its checkpoint.pt, or its small detector.pt
    kind     the class of its settings
    changes  settings that differ from the training's, above all fps, stride and frames
    Raises BadInput."""

    def __init__(self, path, kind=DetectionSettings, **changes):
        content = read_checkpoint(path, kind)
        s = check_settings(content["settings"], kind, f"checkpoint {path}")
        changes = {"device": "auto"} | changes
        changes["device"] = pick_device(changes["device"])
        self.s = replace(s, **changes)
        self.fps = self.s.fps or content["fps"]  # of the training videos
        self.classes = content["classes"]
        self.mean, self.std = content["mean"], content["std"]
        self.detector = load_detector(content, self.s)

    def __call__(self, feats, duration=None, name="the video"):
        """Find the actions of a video, best joint score first.

        feats     (T, D), an array or a feature file, not standardised
        duration  seconds; without it the features' span
        ->        segments (N, 2) in seconds, N labels, scores (N,)
        Raises BadInput for another D."""
        if not isinstance(feats, (str, Path)):
            feats = np.asarray(feats)
        steps, mean, _ = sum_features(feats, self.s.feature_key, name)
        if len(mean) != len(self.mean):
            raise BadInput(f"{name} has features of {len(mean)} channels, the training had "
                           f"{len(self.mean)}")
        if duration is not None and not 0 < duration < MILLION:
            raise BadInput(f"{name}: a duration must be positive, not {duration}")
        if self.s.stride == 0 and not duration:
            raise BadInput(f"{name}: give its duration in seconds, which --stride 0 needs")
        video = place_video(name, unknown_video("", duration, self.fps), feats, steps, self.s)
        record = detect(self.detector, [video], self, self.s)[name]
        record = with_seconds(record, video)
        labels = [self.classes[label] for label in record["labels"]]
        return record["segments"].numpy(), labels, record["scores"].numpy()


def feature_files(path):
    """{name: file} of a feature file, or of all in a folder; raises BadInput if there is none."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file == path or file.suffix in READERS]
    folder = path if path.is_dir() else path.parent
    found = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    if len(found) < len(files) or not files:
        raise BadInput(f"{path} must hold one feature file a video ({', '.join(READERS)})")
    return found


def clock(seconds, mark="."):
    """Seconds as m:ss.s; with the mark "," as a subtitle has it, hh:mm:ss,mmm."""
    if mark == ",":
        whole = round(1000 * seconds)
        hours, rest = divmod(whole, 3_600_000)
        minutes, rest = divmod(rest, 60_000)
        return f"{hours:02}:{minutes:02}:{rest // 1000:02},{rest % 1000:03}"
    minutes, rest = divmod(round(10 * seconds), 600)
    return f"{minutes}:{rest / 10:04.1f}"


def subtitles(actions):
    """The text of an .srt file of a video's actions, in their order in time."""
    parts = []
    for number, a in enumerate(sorted(actions, key=lambda a: a["segment"]), 1):
        start, end = (clock(t, ",") for t in a["segment"])
        parts.append(f"{number}\n{start} --> {end}\n{a['label']} {a['score']:.2f}\n")
    return "\n".join(parts)


def csv_table(found):
    """The text of a .csv file of the actions of videos."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["video", "start", "end", "label", "score"])
    for video, actions in found.items():
        writer.writerows([video, *a["segment"], a["label"], a["score"]] for a in actions)
    return text.getvalue()


def check_ending(path, videos):
    """Raise BadInput for an ending that write_found() does not know, or not for several videos."""
    ending = Path(path).suffix
    if ending not in (".json", ".csv", ".srt") or ending == ".srt" and videos > 1:
        raise BadInput(f"--out {path} must end in .json, .csv or, for one video, .srt")


def write_found(path, found):
    """Write {video: [{"segment", "label", "score"}]}: JSON, CSV or SRT, as the ending says."""
    ending = Path(path).suffix
    if ending == ".json":
        content = {"version": "VERSION 1.3", "results": found, "external_data": {}}
        write_json(path, content, indent=1)
    elif ending == ".csv":
        write_text(path, csv_table(found))
    else:
        write_text(path, subtitles(*found.values()))


def find_actions(args, kind):
    """Print, and write to --out, what happens in the feature files of --features."""
    changes = {name: value for name, value in vars(args).items()
               if name in LOCALIZER and value is not None}
    localize = Localizer(args.checkpoint, kind, **changes)
    least = 0.3 if args.min_score is None else args.min_score
    files = feature_files(args.features)
    if args.out:
        check_ending(args.out, len(files))
    found = {}
    for name, file in files.items():
        segments, labels, scores = localize(file, args.duration, name)
        found[name] = [
            {"segment": [round(t, 2) for t in segment], "label": label, "score": round(score, 2)}
            for segment, label, score in zip(segments.tolist(), labels, scores.tolist())
            if score >= least]
        say(f"{short(name)}: {len(found[name])} actions of a score of at least {least:g}")
        for a in found[name]:
            start, end = a["segment"]
            say(f"{clock(start):>9} - {clock(end):>8}  {a['score']:.2f}  {short(a['label'])}")
    if args.out:
        write_found(args.out, found)


# ---- The command line ---------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message):
        """Raises BadInput."""
        raise BadInput(f"{message}; --help lists every setting")


def evaluate_checkpoint(args, kind):
    """(metrics, title) of --checkpoint: detect on its test videos; raises BadInput."""
    content = read_checkpoint(args.checkpoint, kind)
    s = check_settings(content["settings"], kind, f"checkpoint {args.checkpoint}")
    places = {name: value if value in LAYOUTS else os.path.abspath(value)
              for name, value in vars(args).items() if name in PLACES and value}
    s = replace(
        s,
        **places,
        missing=args.missing or s.missing,
        tiou=args.tiou or s.tiou,
        weights=args.weights or s.weights,
        test_subset=args.subset or s.test_subset,
        device=pick_device(args.device or "auto"))
    if s.test_subset == "none":
        raise BadInput("the run was trained without a test set: name one by --subset")
    data = load_dataset(s, content)
    seen = [video.id for video in data.test if video.id in content.get("fingerprint", ())]
    if seen:
        data.warnings.append(f"{len(seen)} of {len(data.test)} test videos were training videos: "
                             f"{several(seen, 3)}")
    warn(data.warnings)
    detector = load_detector(content, s)
    metrics, _ = evaluate_detector(detector, data, s)
    if metrics is None:
        raise BadInput(f"no test video of {s.annotations or s.dataset} has annotations: there is "
                       "no mAP")
    return metrics, f"{args.checkpoint} ({s.weights} weights)"


def truth_for(predictions, annotations, args):
    """(ground truth {id: Annotation}, its name): of --subset, or of the predictions' subsets.

    Raises BadInput where they have nothing in common."""
    names = {a.subset.lower() for video, a in annotations.items() if video in predictions}
    if args.subset:
        names = {args.subset.lower()}
    elif not predictions:
        names = {a.subset.lower() for a in annotations.values()}
    truth = {video: a for video, a in annotations.items()
             if a.annotated and a.subset.lower() in names}
    if predictions and not annotations.keys() & predictions.keys():
        mine, theirs = next(iter(predictions)), next(iter(annotations), "")
        raise BadInput(f"none of the {len(predictions)} predicted videos, like {short(mine)}, is "
                       f"in the ground truth {args.gt}, which has videos like {short(theirs)}")
    if not any(a.labels for a in truth.values()):
        raise BadInput(f"ground truth {args.gt} has no instance in the subset "
                       f"{shown(args.subset or ', '.join(names))}, only subsets "
                       f"{subsets_of(annotations)}")
    return truth, ", ".join(sorted(names)) or "none"


def odd_predictions(predictions, truth, known):
    """Warnings about predictions that no instance can match."""
    found = []
    stray = [video for video in predictions if video not in truth]
    silent = [video for video in truth if video not in predictions]
    if stray or silent:
        found.append(f"{len(stray)} of {len(predictions)} predicted videos are not in the ground "
                     f"truth: {several(stray, 2) or '-'}; {len(silent)} of its {len(truth)} videos "
                     f"have no prediction: {several(silent, 2) or '-'}")
    labels = [d["label"] for detections in predictions.values() for d in detections]
    unknown = [label for label in labels if label not in known]
    if unknown:
        found.append(f"{len(unknown)} of {len(labels)} predictions are left out: their labels are "
                     f"unknown to the ground truth: {several(sorted(set(unknown)), 3)}")
    return found


def evaluate_predictions(args):
    """(metrics, title) of --pred against --gt; raises BadInput."""
    annotations = without_labels(read_annotations(args.gt), args.ignore_labels or "")
    predictions = read_predictions(args.pred)
    truth, subset = truth_for(predictions, annotations, args)
    known = {label for a in annotations.values() for label in a.labels}
    warn(odd_predictions(predictions, truth, known))
    tious = parse_tious(args.tiou or "0.3:0.7:0.1")
    return mean_average_precision(truth, predictions, tious), f"{args.pred}, subset {subset}"


ARGUMENTS = {
    "--checkpoint": "a run's folder, its checkpoint.pt or detector.pt",
    "--features": "a new video's feature file, or a folder of them: print what happens there",
    "--out": "... and write it here: .json, .csv, or for one video .srt",
    "--feature-key": "name of the array in .npz and .pt files of new videos",
    "--dataset": "evaluate on its test videos: the annotation file, where it has moved; with it "
                 "--features is the feature folder",
    "--root": "the folder of a published dataset, where it has moved",
    "--annotations": "the annotation file of a published dataset, where it has moved",
    "--missing": "skip: leave out test videos without a feature file, also of the mAP",
    "--device": "where to detect: auto (the default), cpu, cuda, ...",
    "--pred": "predictions in ActivityNet's result format",
    "--gt": "ground truth in ActivityNet's annotation format",
    "--ext-scores": "with a detector of --one-class: JSON of video-level scores from elsewhere",
    "--subset": "the test subset, in any letter case (default: the predictions', the run's)",
    "--ignore-labels": "labels of --gt that do not count, with commas",
    "--tiou": "thresholds, start:end:step (default: the checkpoint's, or 0.3:0.7:0.1)",
    "--json": "write the metrics here as well",
}
NUMBERS = {
    "--fps": "frames a second of new videos (default: the training's)",
    "--stride": "frames between two features of new videos (default: the training's)",
    "--frames": "frames that a feature sees, of new videos (default: the training's)",
    "--duration": "seconds of a new video (default: what its features span)",
    "--min-score": "least score of new videos' actions (default: 0.3)",
}


# Settings of new videos, and the arguments of each mode.
LOCALIZER = {"fps", "stride", "frames", "weights", "device", "feature_key"}
MODES = {
    "new": LOCALIZER | {"checkpoint", "features", "out", "duration", "min_score"},
    "test": {"checkpoint", "dataset", "root", "annotations", "features", "missing", "device",
             "ext_scores", "subset", "tiou", "json", "weights"},
    "predictions": {"pred", "gt", "subset", "ignore_labels", "tiou", "json"},
}


def mode_of(args):
    """Which of MODES a command line asks for."""
    if args.pred:
        return "predictions"
    moved = args.dataset or args.annotations or args.root
    return "new" if args.features and not moved else "test"


def parse(argv):
    """The command line; raises BadInput."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for flag, comment in ARGUMENTS.items():
        parser.add_argument(flag, help=comment)
    for flag, comment in NUMBERS.items():
        parser.add_argument(flag, type=float, help=comment)
    parser.add_argument(
        "--weights", choices=("ema", "raw"),
        help="which weights of the checkpoint (default: as it was trained)")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.pred) or bool(args.pred) != bool(args.gt):
        parser.error("give either --checkpoint, or --pred and --gt")
    given = {name for name, value in vars(args).items() if value is not None}
    other = given - MODES[mode_of(args)]
    if other:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(other))
        parser.error(f"{flags} cannot go with what else is given")
    if args.min_score is not None and not 0 <= args.min_score <= 1:
        parser.error(f"--min-score must be from 0 to 1, not {args.min_score}")
    return args


def main(argv=None, kind=DetectionSettings):
    """The command line; returns the exit code, 2 for bad input.

    kind: the class of a checkpoint's settings."""
    try:
        args = parse(argv)
        mode = mode_of(args)
        if mode == "new":
            find_actions(args, kind)
            return 0
        if mode == "test":
            metrics, title = evaluate_checkpoint(args, kind)
        else:
            metrics, title = evaluate_predictions(args)
        if args.json:
            write_json(args.json, metrics)
        say(table(metrics, title))
    except (BadInput, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
