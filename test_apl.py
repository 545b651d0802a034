"""Tests of APL: invariants, brute-force oracles, the reference outputs of the public tools, and the empty case.

Tests against ../shared (annotations, a real data set, reference outputs) are skipped where it is absent.
"""
import ast
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import acp
import alqa
import data
import evaluate
import icd
import model
import train

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the reference outputs and the real data lie in ../shared, which is absent")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Reference outputs of the public tools --------------------------------------------------------------------------

def public_weights(state):
    """The public ActionFormer's state dict under this project's names and shapes."""
    names = [(r"backbone\.embd\.(\d)\.conv", r"backbone.embed.\1"), (r"backbone\.embd_norm", "backbone.embed_norms"), (r"\.ln(\d)\.", r".norm\1."),
             (r"attn\.(query|key|value)_conv\.conv", r"attn.convs.\1"), (r"attn\.(query|key|value)_norm", r"attn.norms.\1"),
             (r"attn\.(query|key|value)\.", r"attn.linears.\1."), (r"mlp\.3", "mlp.2"), (r"drop_path_attn", "drop1"), (r"drop_path_mlp", "drop2"),
             (r"neck\.fpn_norms", "backbone.neck"), (r"cls_head\.cls_head\.conv", "cls_out"), (r"reg_head\.offset_head\.conv", "reg_out"),
             (r"(cls|reg)_head\.head\.(\d)\.conv", r"\1_trunk.convs.\2"), (r"(cls|reg)_head\.norm", r"\1_trunk.norms"),
             (r"query", "0"), (r"key", "1"), (r"value", "2")]
    out, scales = {}, []
    for key, value in state.items():
        if "reg_head.scale" in key:
            scales.append(value)
            continue
        for old, new in names:
            key = re.sub(old, new, key)
        if key.endswith("weight") and value.ndim == 3 and value.shape[1:] == (1, 3):
            value = value[:, 0].T  # depth-wise
        elif key.endswith("weight") and value.ndim == 3 and value.shape[2] == 3:
            value = value.permute(0, 2, 1).flatten(1)  # taps side by side
        elif value.ndim == 3:
            value = value.squeeze(-1) if value.shape[0] > 1 else value.flatten()
        out[key] = value
    return out | {"scales": torch.stack(scales).flatten()}


@pytest.fixture
def tiny():
    """The public tiny ActionFormer, loaded: (detector, its settings, its reference arrays)."""
    if not SHARED.exists():
        pytest.skip("the reference outputs lie in ../shared, which is absent")
    config = json.loads((SHARED / "reference/actionformer_tiny.json").read_text())
    state = torch.load(SHARED / "reference/actionformer_tiny.pth.tar", weights_only=True)["state_dict"]
    detector = model.Detector(config["input_dim"], config["num_classes"], config["embd_dim"], config["n_head"],
                              [config["n_mha_win_size"]] * 4, ranges=config["regression_range"], branches="none").eval()
    detector.load_state_dict(public_weights(state))
    return detector, config, np.load(SHARED / "reference/actionformer_tiny.npz")


def test_public_checkpoint_gives_the_public_outputs(tiny):
    detector, config, ref = tiny
    out = detector(torch.from_numpy(ref["x"]).transpose(1, 2), torch.from_numpy(ref["mask"])[:, 0])
    start = 0
    for level in range(4):
        T = ref[f"mask_{level}"].shape[-1]
        mask = torch.from_numpy(ref[f"mask_{level}"])[:, 0]
        assert torch.equal(out.masks[level], mask)
        for name, mine in (("fpn", out.levels[level]), ("cls_logits", out.cls_logits[:, start:start + T]), ("offsets", out.offsets[:, start:start + T])):
            theirs = torch.from_numpy(ref[f"{name}_{level}"]).transpose(1, 2)
            assert torch.allclose(mine[mask], theirs[mask], atol=1e-5), (name, level)
        points = torch.stack([out.points.time, out.points.low, out.points.high, out.points.stride], 1)[start:start + T]
        assert torch.equal(points, torch.from_numpy(ref[f"points_{level}"]))
        start += T


def test_public_checkpoint_gives_the_public_targets_and_losses(tiny):
    detector, config, ref = tiny
    out = detector(torch.from_numpy(ref["x"]).transpose(1, 2), torch.from_numpy(ref["mask"])[:, 0])
    segments, labels = [torch.tensor(s) for s in config["segments"]], [torch.tensor(l) for l in config["labels"]]
    cls_target, offset_target = model.assign_targets(out.points, segments, labels, config["num_classes"])
    positive = torch.from_numpy(ref["gt_cls"]).any(-1)
    assert torch.equal(cls_target, torch.from_numpy(ref["gt_cls"]))
    assert torch.allclose(offset_target[positive], torch.from_numpy(ref["gt_offsets"])[positive], atol=1e-5)
    losses = alqa.detection_losses(out, cls_target, offset_target, out.mask, "none", "bce")
    t_plus = 0.9 * float(ref["init_loss_norm"]) + 0.1 * max(int(losses["positives"]), 1)
    assert float(losses["cls"].detach()) / t_plus == pytest.approx(float(ref["cls_loss"]), abs=1e-5)
    assert float(losses["reg"].detach()) / t_plus == pytest.approx(float(ref["reg_loss"]), abs=1e-5)


@needs_shared
def test_diou_and_focal_loss_match_the_public_ones():
    ref = {k: torch.from_numpy(v) for k, v in np.load(SHARED / "reference/losses.npz").items()}
    assert torch.allclose(alqa.diou_loss(ref["pred_offsets"], ref["gt_offsets"]), ref["diou_loss"], atol=1e-6)
    assert torch.allclose(alqa.focal_loss(ref["logits"], ref["targets"]), ref["focal"], atol=1e-6)


@needs_shared
@pytest.mark.parametrize("case", range(6))
def test_soft_nms_matches_the_public_one(case):
    ref = {k[2:]: v for k, v in np.load(SHARED / "reference/soft_nms.npz").items() if k.startswith(f"{case}_")}
    segments, scores, labels = (torch.from_numpy(ref[k]) for k in ("segments", "scores", "labels"))
    index, decayed = model.soft_nms(segments, scores, labels, float(ref["sigma"]), float(ref["min_score"]), int(ref["max_num"]))
    index, decayed = index[:int(ref["max_num"])], decayed[:int(ref["max_num"])]
    assert torch.equal(labels[index], torch.from_numpy(ref["out_labels"]))
    assert torch.allclose(segments[index], torch.from_numpy(ref["out_segments"]), atol=1e-5)
    assert torch.allclose(decayed, torch.from_numpy(ref["out_scores"]), atol=1e-5)


def thumos_predictions():
    z = np.load(SHARED / "reference/actionformer_thumos14_detections.npz")
    found = {}
    for video, label, start, end, score in zip(*(z[k].tolist() for k in ("video_id", "label", "start", "end", "score"))):
        found.setdefault(video, []).append({"label": label, "score": score, "segment": [start, end]})
    return found


@needs_shared
@pytest.mark.parametrize("name", ["actionformer_thumos14", "map_thumos14"])
def test_map_matches_the_activitynet_toolkit(name):
    expected = json.loads((SHARED / f"reference/{name}_expected.json").read_text())
    truth = {n: a for n, a in data.read_annotations(SHARED / "data/thumos14/thumos14.json").items() if a.subset == "Test"}
    found = thumos_predictions() if name == "actionformer_thumos14" else evaluate.read_predictions(SHARED / "reference/map_thumos14_predictions.json")
    metrics = evaluate.mean_average_precision(truth, found, expected["tious"])
    mine = np.array([metrics["ap"][label] for label in expected["labels"]]).T
    assert np.abs(mine - np.array(expected["ap"])).max() < 1e-9
    assert metrics["average_mAP"] == pytest.approx(expected["average_mAP"], abs=1e-9)
    assert (metrics["videos"], metrics["instances"]) == (212, 3358)
