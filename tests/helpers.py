"""What the test files share: settings, a user's data set, a small detector, records, refusals."""
import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import model
import train
from plumbing import arguments

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=(
    "the reference outputs and the real data lie in ../shared, which is absent"))
TINY = (  # a run of seconds: a small network, few steps
    "--channels", 16, "--heads", 2, "--stem", 1, "--windows", 5, "--ranges", "0:8,8:16,16:inf",
    "--pretrain-epochs", 2, "--supervised-epochs", 2, "--supervised-steps", 4,
    "--joint-epochs", 2, "--max-steps", 96, "--acp-steps", 10, "--log-every", 5, "--device", "cpu",
    "--precision", "float32", "--no-page", "--acp", "coarse+fine", "--input-dropout", 0,
    "--input-jitter", 0, "--passes", 0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(*argv):
    return arguments.settings_of([str(word) for word in argv], train.Settings)


def small_detector(classes=3, dim=6, **changes):
    """A small Detector, not training."""
    shape = {"channels": 16, "heads": 2, "windows": "5,5,0", "ranges": "0:4,4:8,8:inf"}
    return model.Detector(dim, classes, model.DetectorSettings(**shape | changes)).eval()


@torch.no_grad()
def assert_padding_changes_nothing(detector, s):
    """That a video of 4 channels has the same detections alone and beside one of 40 steps."""
    for T in (9, 12, 15, 18, 19, 24, 27):
        x = torch.randn(1, 40, 4)
        alone = evaluate.suppress(detector(x[:, :T], torch.ones(1, T).bool()), s)[0]
        beside = evaluate.suppress(detector(x, (torch.arange(40) < T)[None]), s)[0]
        assert len(alone["scores"])
        for key, value in alone.items():
            assert torch.allclose(value.double(), beside[key].double(), atol=1e-5), T
        assert alone["segments"].max() <= T - 0.5


def record(segments, labels, status):
    """Pseudo labels as icd.refine() gives them, all with a score of 1."""
    n = len(segments)
    return {"segments": torch.tensor(segments, dtype=torch.float32).reshape(n, 2),
            "labels": torch.tensor(labels, dtype=torch.long),
            "status": torch.tensor(status, dtype=torch.long), "scores": torch.ones(n)}


def detections(*scores, labels=None):
    """A record of detections, of class 0 where no labels are given."""
    return {"scores": torch.tensor(scores),
            "labels": torch.tensor(labels or [0] * len(scores), dtype=torch.long)}


def write_own(folder):
    """10 training and 4 test videos of 64 steps, 2 steps a second, 5 channels, 2 classes."""
    rng, database = np.random.default_rng(0), {}
    (folder / "features").mkdir()
    for i in range(14):
        x = rng.normal(size=(64, 5)).astype(np.float32)
        annotations = []
        for k, (start, end) in enumerate([(2.0, 8.0), (12.0, 20.0), (24.0, 28.0)]):
            c = (i + k) % 2
            x[int(2 * start):int(2 * end), c] += 3
            annotations.append({"segment": [start, end], "label": "AB"[c]})
        np.save(folder / f"features/v{i}.npy", x)
        database[f"v{i}"] = {"subset": "Training" if i < 10 else "validation", "duration": 32.5,
                             "fps": 50, "annotations": annotations}
    (folder / "own.json").write_text(json.dumps({"database": database}))


def own_argv(own, *more):
    """The command line of train.py for the user's data set."""
    return [str(word) for word in (
        "--dataset", own / "own.json", "--features", own / "features", "--stride", 25,
        "--frames", 50, "--ratio", 0.3, "--out", own / "run", *TINY, *more)]


def edit(own, change):
    """Change the user's annotation file in place."""
    content = json.loads((own / "own.json").read_text())
    change(content["database"])
    (own / "own.json").write_text(json.dumps(content))


def evaluated(*argv):
    return evaluate.main([str(word) for word in argv])


def refused(argv, capsys, *words):
    """train.py, or evaluate.py after "evaluate", exits with 2 and one line of the words -> it."""
    argv = [str(word) for word in argv]
    code = evaluate.main(argv[1:]) if argv[:1] == ["evaluate"] else train.main(argv)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    text = "".join(line for line in lines if "without effect: --acp" not in line)  # TINY has some
    assert code == 2, f"exit code {code}"
    assert text.startswith("error: ") and text.count("\n") == 1, text
    for word in words:
        assert str(word) in text, text
    return text


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_result(path):
    return json.loads(path.read_text())


def weights(folder):
    """All weights of a run's checkpoint by name."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    parts = {f"{part}.{name}": value for part in ("detector", "ema", "icd")
             for name, value in content[part].items()}
    return {"t_plus": content["t_plus"], **parts}


def same(a, b):
    """Whether two dicts of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def finished(tmp_path_factory, main, argv_of, *more):
    """The folder of a user's data set with a finished run of main(argv_of()), and its "stdout"."""
    folder = tmp_path_factory.mktemp("finished")
    write_own(folder)
    with (pytest.MonkeyPatch.context() as patch,
          open(folder / "stdout", "w", encoding="utf-8") as file,
          contextlib.redirect_stdout(file)):
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert main(argv_of(folder, *more)) == 0
    return folder
