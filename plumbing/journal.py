"""The journal: what a run writes and prints about itself. `run` is a train.Run."""
import math
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from plumbing import files, forms, listing, runs
from plumbing.words import is_first, say, several, warn


def note(run, text):
    """A warning now, and again at the end of the run."""
    run.data.warnings.append(text)
    warn([text])


def write_configuration(run):
    """What the run does, in config.json, and with which videos, in split.json and videos.json.

    videos.json has the annotations that the run may know, in seconds."""
    d, out = run.data, run.folder.path
    split = {"labelled": [video.id for video in d.labelled],
             "unlabelled": [video.id for video in d.unlabelled], "missing_classes": d.missing}
    known = {name: forms.listed(a.segments.tolist(), a.labels) for name, a in d.truth.items()}
    for video in d.labelled:
        names = [d.classes[label] for label in video.labels]
        known[video.id] = forms.listed(video.in_seconds(video.segments).tolist(), names)
    entries = {}
    for part in ("labelled", "unlabelled", "test"):
        for video in getattr(d, part):
            entries[video.id] = {"part": part, "duration": video.duration,
                                 "annotations": known.get(video.id)}
    files.write_json(out / "config.json", asdict(run.s), indent=1)
    files.write_json(out / "split.json", split, indent=1)
    files.write_json(out / "videos.json", entries)


def check_finite(run, what, value, ids):
    """Raise Diverged where the output, loss or gradient of a step is NaN or infinite.

    ids  of the step's videos"""
    if math.isfinite(value):
        return
    at, folder = run.at, run.folder
    advice = "lower --lr"
    if folder.saved:
        advice = (f"go on from what is good by --start {folder.path}/checkpoint.pt "
                  f"--lr {run.s.lr / 10:g} --out ANOTHER")
    raise runs.Diverged(f"training diverged: the {what} is {float(value)} at step {at.step + 1} of "
                        f"stage {at.stage} (videos {several(ids)}); {advice}")


def is_terminal():
    """Whether somebody watches."""
    return is_first() and sys.stdout is not None and sys.stdout.isatty()


def show_step(run, parts):
    """A step on the console, and every s.log_every steps in log.jsonl; parts: of its loss."""
    at, pace = run.at, run.pace
    run.steps.append({key: torch.as_tensor(value).detach() for key, value in parts.items()})
    if is_terminal():
        _, steps, _ = run.plan[at.stage]
        bar = ("#" * (30 * at.done // steps)).ljust(30, ".")
        left = pace.time_left(at.step)
        print(f"\r{at.stage:<10} [{bar}] {at.done}/{steps}  {left} ", end="", flush=True)
    if at.step % run.s.log_every == 0 or at.step == pace.total:
        values = {key: float(value) for key, value in run.steps[-1].items()}
        run.folder.log(at, **pace.row(at.step), **values)


def show_epoch(run):
    """A line of at most 100 columns about the epoch that has ended, where it had a step."""
    if not run.steps:
        return
    at = run.at
    line = f"{at.stage:<10} {at.epoch:>3}/{run.plan[at.stage][0]}"
    line += f"  loss {np.mean([float(step['loss']) for step in run.steps]):.3f}"
    for prefix, kind in (("", " "), ("unsup_", "  pseudo:")):
        mine = [step for step in run.steps if prefix + "t_plus" in step]
        line += kind if mine else ""
        for key in ("cls", "reg") if mine else ():
            each = [float(step[prefix + key] / step[prefix + "t_plus"]) for step in mine]
            line += f" {key} {np.mean(each):.3f}"
    line += f"  {run.pace.time_left(at.step)}"
    if is_terminal():  # over the bar
        sys.stdout.write("\r")
        line = f"{line:<80}"
    say(line)


def run_extra(run, name):
    """Let an extra write what it makes of the run: as a command, since nothing imports it."""
    if not is_first():
        return
    folder = run.folder.path
    command = [sys.executable, "-m", f"extras.{name}", str(folder.resolve())]
    root = Path(__file__).parent.parent
    if subprocess.run(command, cwd=root, capture_output=True, check=False).returncode:
        note(run, f"python -m extras.{name} {folder} failed; it says why")


def report(run, results, judge):
    """Write predictions.json and metrics.json, and print the table; the first process does.

    results  {"raw": (metrics, predictions), "ema": ...}; metrics are None without annotations
    judge    evaluate.mean_average_precision()"""
    s, out = run.s, run.folder.path
    metrics, predictions = results.pop(s.weights)
    if metrics:
        listed = {name: predictions["results"][name] for name in run.data.truth}
        if run.trust["exclusive"]:  # as a list of new videos is
            listed = {name: listing.once(found) for name, found in listed.items()}
        trust = judge(run.data.truth, listed, np.array([listing.TIOU]))["trust"]
        best = {key: trust[key] for key in ("score", "precision", "recall")}
        if not s.ext_scores:  # which a list of new videos is without
            run.trust |= best | {"videos": metrics["videos"]}
    if not is_first():
        return
    other, (other_metrics, _) = results.popitem()
    files.write_json(out / "predictions.json", predictions)
    if metrics is None:
        return
    average, other_average = metrics["average_mAP"], other_metrics["average_mAP"]
    whole = metrics | {"weights": s.weights, f"average_mAP_{other}": other_average}
    say(forms.table(metrics, f"{out} ({s.weights} weights)"))
    say(f"average with the {other} weights: {100 * other_average:.2f}")
    say(f"listed from a score of {best['score']:.3g} on: {100 * best['precision']:.0f} % right, "
        f"{100 * best['recall']:.0f} % of what happens found (at tIoU {trust['tiou']})")
    if run.supervised_mAP is not None:
        whole["supervised_mAP"] = run.supervised_mAP
        say(f"supervised {100 * run.supervised_mAP:.2f} -> APL {100 * average:.2f}")
    files.write_json(out / "metrics.json", whole, indent=1)


def metrics_of(folder):
    """The content of a run's metrics.json, None where it has none; raises BadInput."""
    path = folder / "metrics.json"
    return files.read_json(path, "metrics") if path.exists() else None


def farewell(run):
    """What to do next, and the run's warnings once more; its page before, where it has one.

    Results of another end, which this one does not have, go."""
    s, out = run.s, run.folder.path
    made = {"predictions.json": run.data.test, "metrics.json": run.data.truth, "page.html": s.page}
    for name in made:
        if not made[name]:
            (out / name).unlink(missing_ok=True)
    if s.page:
        run_extra(run, "viewer")
    say(f"to look at: {out}/page.html" if s.page else f"results: {out}")
    say(f"a new video: {s.EVALUATE} --checkpoint {shlex.quote(str(out))} "
        "--features video.npy")
    if run.data.warnings:
        say(f"{len(run.data.warnings)} warning(s) stand above")
