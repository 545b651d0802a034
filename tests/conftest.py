"""Fixtures of all tests; test_apl.py, one folder up, takes what it needs from here."""
import re

import numpy as np
import pytest
import torch

import data
import model
import train
from tests.helpers import SHARED, generator, own_argv, read_result, settings, write_own


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def own(tmp_path):
    """The folder of a user's own small data set: helpers.write_own()."""
    write_own(tmp_path)
    return tmp_path


@pytest.fixture
def run(own):
    """A train.Run of the user's data set, at the start of stage 3."""
    s = settings(*own_argv(own))
    run = train.begin(s, data.load_dataset(s))
    run.out.mkdir()
    run.generator = generator()
    run.stage = "joint"
    return run


# ---- The public ActionFormer --------------------------------------------------------------------

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
            scales.append(value)
            continue
        for old, new in RENAMED:
            key = re.sub(old, new, key)
        found[key] = reshaped(key, value)
    return found | {"scales": torch.stack(scales).flatten()}


@pytest.fixture
def tiny():
    """The public tiny ActionFormer: its outputs here, its settings, its reference arrays."""
    if not SHARED.exists():
        pytest.skip("the reference outputs lie in ../shared, which is absent")
    config = read_result(SHARED / "reference/actionformer_tiny.json")
    s = model.DetectorSettings(
        channels=config["embd_dim"], heads=config["n_head"], windows=str(config["n_mha_win_size"]),
        ranges=",".join(f"{low}:{high}" for low, high in config["regression_range"]), alqa="none")
    detector = model.Detector(config["input_dim"], config["num_classes"], s).eval()
    saved = torch.load(SHARED / "reference/actionformer_tiny.pth.tar", weights_only=True)
    detector.load_state_dict(public_weights(saved["state_dict"]))
    reference = np.load(SHARED / "reference/actionformer_tiny.npz")
    ref = {name: torch.from_numpy(reference[name]) for name in reference.files}
    outputs = detector(ref["x"].transpose(1, 2), ref["mask"][:, 0])
    return outputs, config, ref
