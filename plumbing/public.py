"""Weights from elsewhere: a public ActionFormer's checkpoint, or another run's, where they fit."""
import re

import torch

from plumbing.checkpoints import file_of
from plumbing.files import load_torch, reading
from plumbing.words import BadInput, several

# Names of the public ActionFormer, as patterns, and of this project; they are replaced in turn.
RENAMED = r"""
    backbone\.embd\.(\d)\.conv               backbone.embed.convs.\1
    backbone\.embd_norm                      backbone.embed.norms
    \.ln(\d)\.                               .norm\1.
    attn\.(query|key|value)_conv\.conv       attn.convs.\1
    attn\.(query|key|value)_norm             attn.norms.\1
    attn\.(query|key|value)\.                attn.linears.\1.
    mlp\.3                                   mlp.2
    drop_path_attn                           drop1
    drop_path_mlp                            drop2
    neck\.fpn_norms                          backbone.neck
    cls_head\.cls_head\.conv                 cls_out
    reg_head\.offset_head\.conv              reg_out
    (cls|reg)_head\.head\.(\d)\.conv         \1_trunk.convs.\2
    (cls|reg)_head\.norm                     \1_trunk.norms
    query                                    0
    key                                      1
    value                                    2
"""

CLASS_LAYERS = (  # how the names of weights begin that are of one class each
    "cls_out", "classes.", "activity_fc", "completeness_fc", "regressor_fc")


def reshaped(value):
    """A weight of the public ActionFormer in this project's shape."""
    if value.ndim < 3:
        return value
    if value.shape[1:] == (1, 3):
        return value[:, 0].T  # depth-wise
    if value.shape[2] == 3:
        return value.permute(2, 0, 1)  # (out, in, 3) -> (3, out, in)
    return value.squeeze(-1) if value.shape[0] > 1 else value.flatten()


def public_weights(state):
    """The public ActionFormer's state dict under this project's names and shapes."""
    rules = [line.split() for line in RENAMED.strip().splitlines()]
    found = {}
    scales = []
    for key, value in state.items():
        for old, new in rules:
            key = re.sub(old, new, key)
        if "reg_head.scale" in key:
            scales.append(value.flatten())
            found["scales"] = torch.cat(scales)
        else:
            found[key] = reshaped(value)
    return found


def read_weights(path, classes):
    """{name: tensor} of a checkpoint, ours or the public ActionFormer's; averaged ones if it can.

    Of a run of ours with other `classes` those of a class are left out. Raises BadInput."""
    content = load_torch(path, "checkpoint")
    with reading("checkpoint", path, "it holds no weights"):
        parts = ("state_dict_ema", "state_dict", "ema", "detector")
        state = next((content[part] for part in parts if part in content), content)
        other = CLASS_LAYERS if content.get("classes", classes) != classes else ()
        state = {key.removeprefix("module."): value for key, value in state.items()
                 if isinstance(value, torch.Tensor) and value.isfinite().all()
                 and not key.startswith(other)}
    return public_weights(state) if any("backbone.embd." in key for key in state) else state


def take_weights(detector, path, classes=None):
    """Load what fits of a checkpoint into a Detector -> what does not fit, in words.

    path     a file, or the folder of a run
    classes  the names of the detector's, where they are known
    Raises BadInput where nothing fits."""
    path = file_of(path)
    found, mine = read_weights(path, classes), detector.state_dict()
    fitting = {name: value for name, value in found.items()
               if name in mine and value.shape == mine[name].shape}
    if not fitting:
        raise BadInput(f"checkpoint {path} has no weight of a name and shape that fits")
    detector.load_state_dict(mine | fitting)
    new = [name for name in mine if name not in fitting]
    unused = [name for name in found if name not in fitting]
    return (f"{len(fitting)} of {len(mine)} weights are those of {path}; new: "
            f"{several(new, 8) or 'none'}; not used: {several(unused, 8) or 'none'}")
