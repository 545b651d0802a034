"""The paper's tables and figures as commands: each row a list of settings of train.py, trained for every seed, one Markdown table.

    python tables.py 3a                                                  on toy
    python tables.py 1 --dataset thumos --ratio 0.1 --seeds 3
    python tables.py 5a --dataset my.json --features DIR --stride 25 --frames 50 --seeds 3 --splits a.json b.json c.json
    python tables.py causes                                              why APL does what it does: its pseudo labels, class by class

What follows the names is passed to train.py for every row. Finished rows are kept, and stages that rows share (the same settings,
split and seed) are trained once: they lie in --runs, each in a folder named by its last stage and its settings, and a killed command
goes on where it was. mAP is that of the last epoch on the test videos; +- is the standard deviation over the seeds.
"""
import hashlib
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from scipy.stats import mannwhitneyu, spearmanr

import acp
import data
import evaluate
import icd
import model
import train

PLAIN, NO_ACP, NO_ICD, FIXED = "--alqa none --acp none", "--acp none", "--icd none", "--icd none --threshold fixed"

# Rows: name, the paper's average mAP with 10 % of THUMOS14's labels (None: not in the paper), settings.
ROWS = {
    "1": [("ActF*, supervised only", 15.6, f"--stage supervised {PLAIN}"),
          ("ActF + MixUp", 16.7, f"--stage supervised {PLAIN} --mixup 0.4"),
          ("NPL, reconstructed", 20.3, f"{PLAIN} --icd none --threshold frequency --rerank"),
          ("class score >= 0.3", 17.0, f"{PLAIN} {FIXED}"),
          ("supervised only, ALQA and ACP", None, "--stage supervised"),
          ("joint score >= 0.3, ALQA and ACP", None, FIXED),
          ("APL", 24.5, "")],
    "3a": [("baseline", 17.0, f"{PLAIN} {FIXED}"), ("+ ALQA", 21.3, f"{NO_ACP} {NO_ICD}"), ("+ ICD", 23.3, NO_ACP), ("+ ACP", 24.5, "")],
    "3b": [("no branch", None, f"{PLAIN} {NO_ICD}"), ("tIoU (1b)", 19.4, f"{NO_ACP} {NO_ICD} --alqa tiou"),
           ("DIoU (1b)", 20.0, f"{NO_ACP} {NO_ICD} --alqa diou"), ("tIoU + tND (2b)", 21.3, f"{NO_ACP} {NO_ICD}")],
    "5a": [("no ICD", 21.3, f"{NO_ACP} {NO_ICD}"), ("EAP", 22.1, f"{NO_ACP} --icd eap"), ("MPP", 22.5, f"{NO_ACP} --icd mpp"),
           ("EAP + MPP", 23.3, NO_ACP), ("EAP + MPP, adaptive thresholds", None, f"{NO_ACP} --icd-bounds adaptive")],
    "5b": [("no ACP", 23.3, NO_ACP), ("coarse", 24.1, "--acp coarse"), ("fine", 23.8, "--acp fine"),
           ("coarse + fine", 24.5, "--acp coarse+fine")],
    "S1": [("KL", 20.8, f"{NO_ACP} {NO_ICD} --quality-form kl"), ("BCE", 21.3, f"{NO_ACP} {NO_ICD}")],
    "S4": [("pre-training alone", 23.6, "--acp-after none"), ("labelled", 24.1, "--acp-after labelled"),
           ("labelled + unlabelled", 24.5, "--acp-after labelled+unlabelled")],
    "fig3a": [(f"drop below {t}", None, f"--theta-drop {t}") for t in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)],
    "fig3b": [(f"mine above {t}", None, f"--theta-mine {t}") for t in (0.5, 0.6, 0.7, 0.8, 0.9)],
    "fig3c": [("fixed", None, FIXED), ("dynamic", None, NO_ICD), ("EAP", None, "--icd eap"), ("MPP", None, "--icd mpp"),
              ("EAP + MPP", None, "")],
}
# Rows of the linear probe: name, the paper's accuracy and recall (THUMOS14), what is probed, settings of stage 1.
PROBES = {
    "S2": [("input features", (72.1, 66.3), "input", ""), ("untrained network", None, "untrained", ""),
           ("learned features with ACP", (76.2, 73.0), "trained", "")],
    "S5": [(f"batch {b}, {k} clusters", paper, "trained", f"--batch {b} --acp-clusters {k}")
           for b, k, paper in ((2, 2, (71.0, 70.1)), (2, 3, (72.8, 73.5)), (2, 4, (76.2, 73.0)),
                               (4, 4, (72.4, 72.3)), (4, 5, (73.9, 74.4)), (4, 8, (75.0, 73.8)))],
}
# What the paper leaves open: settings, one row each.
OPEN = ("--rejected background", "--threshold mean+std", "--threshold mean", "--threshold mean-std", "--scope video", "--scope dataset",
        "--scope class", "--no-exclusive", "--repeat 1", "--refresh 4", f"--refresh 4 {NO_ICD}", f"--refresh 4 {FIXED}",
        "--pseudo-weights ema", "--lambda-u 1", "--icd-pool max", "--icd-pool mean", "--icd-steps 200", "--soft-label predicted",
        "--beta 1", "--acp-tau 0.05", "--acp-tau 0.2", "--acp-steps 20", "--acp-steps 80")
ROWS["open"] = [("the defaults", None, ""), *((option, None, option) for option in OPEN)]
QUALITY = ("positive_accuracy", "class_accuracy", "mean_tIoU", "precision", "recall")
PROBE_FRAMES = 30_000  # steps that fit, and that test, the probe, drawn at random where there are more
OURS = ("--seed", "--out", "--stage", "--start", "--resume", "--audit")  # what rows set themselves


def minutes_of(folder):
    """The minutes that a finished run took, its earlier stages included; None if it was killed on the way."""
    return json.loads((folder / "finished.json").read_text(encoding="utf-8"))["minutes"]


def reach(options, stage, runs):
    """The folder of a run with these options that has ended its `stage`, trained now where it has not been before.

    Its name says what the stage depends on, so rows share it. Leaves "finished.json", {"minutes"} of this and the earlier stages, last."""
    argv = [*options, "--stage", stage]
    depends = {k: v for k, v in asdict(train.parse_settings(argv)).items() if k not in (train.RUN - {"weights"}) | train.LATER[stage]}
    if stage == "pretrain" and depends["acp"] == "none":
        raise data.BadInput("a row needs stage 1, which --acp none leaves out")
    files = [Path(depends[k]) for k in ("dataset", "annotations", "split")]
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode() + b"".join(f.read_bytes() for f in files if f.is_file()))
    folder = runs / f"{stage}-{digest.hexdigest()[:12]}"
    if (folder / "finished.json").exists() and (folder / "checkpoint.pt").exists():
        return folder
    before = {"all": "supervised", "supervised": "pretrain" if depends["acp"] != "none" else None, "pretrain": None}[stage]
    start, minutes = [], 0.0
    if before:
        shared = reach(options, before, runs)
        start, minutes = ["--start", str(shared / "checkpoint.pt")], minutes_of(shared)
    began, killed = time.time(), (folder / "log.jsonl").exists()
    if code := train.main([*argv, *start, "--out", str(folder), "--resume", "--audit"]):
        raise SystemExit(code)
    evaluate.write_json(folder / "finished.json", {"minutes": None if killed or minutes is None else minutes + (time.time() - began) / 60})
    return folder


def saved(path, make):
    """The JSON file at `path`, made by make() where it is absent."""
    if not path.exists():
        evaluate.write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def read_run(folder):
    """A finished run of train.py: (its settings, its data with hidden labels, its detector), the weights that it reports."""
    content = evaluate.read_checkpoint(folder / "checkpoint.pt")
    s = train.Settings(**content["settings"] | {"audit": True})
    d = data.load_dataset(s)
    detector = evaluate.build_detector(s, d.dim, len(d.classes))
    detector.load_state_dict(content["ema" if s.weights == "ema" else "detector"])
    return s, d, detector.to(s.device).eval()


# ---- Calibration ----------------------------------------------------------------------------------------------------

def calibration(folder):
    """Rank correlation (Spearman) of the score after Soft-NMS with the true tIoU, of a run's detections on held-out labelled videos:
    the training videos whose labels it never saw -> {"rank_correlation"}. `folder` is of stage 2: stage 3 trains on them.

    Without quality branches the score is the class score. The true tIoU is that with the best instance of the detection's class. Of
    each video the best detections, twice as many as it has instances; one that repeats a better one has its tIoU all the same."""
    s, d, detector = read_run(folder)
    scores, truth = [], []
    for video, r in zip(d.unlabelled, evaluate.detect(detector, d.unlabelled, d, s, torch.device(s.device))):
        hidden, n = d.hidden[video.id], 2 * len(d.hidden[video.id].labels)
        same = r["labels"][:n, None] == hidden.labels
        overlap = model.tiou(r["segments"][:n, None], hidden.segments) * same
        scores.append(r["scores"][:n]), truth.append(overlap.amax(1) if n else torch.zeros(0))
    return {"rank_correlation": float(spearmanr(torch.cat(scores), torch.cat(truth)).statistic)}


# ---- Causes ---------------------------------------------------------------------------------------------------------

def auc(values, right):
    """The chance that a right one's value is over a wrong one's, ties half: values (N,), right (N,) bool; None without either kind."""
    right, wrong = values[right], values[~right]
    return float(mannwhitneyu(right, wrong).statistic) / (len(right) * len(wrong)) if len(right) and len(wrong) else None


def causes(folder):
    """A run's last pseudo labels against the labels that it never saw: a row {"class", what: a number, or None where nothing is
    counted} a class, and one of all classes.

    Precision and recall at tIoU 0.5 of what ALQA selects and of what ICD leaves, and how well the joint score and ICD's similarity
    tell right from wrong (area under the ROC curve) among all detections that were selected from, repeats left out, whose class
    has labelled instances."""
    content = evaluate.read_checkpoint(folder / "checkpoint.pt")
    d = data.load_dataset(train.Settings(**content["settings"] | {"audit": True}))
    if content["pseudo"] is None:
        raise data.BadInput(f"the run in {folder} made no pseudo labels")
    hidden = [d.hidden[video.id] for video in d.unlabelled]

    def picked(*states):
        found = []
        for video, h in zip(d.unlabelled, hidden):
            r = content["pseudo"][video.id]
            r = {key: value[torch.isin(r["status"], torch.tensor(states))] for key, value in r.items()}
            found.append({key: r[key] for key in ("labels", "scores", "similarity")} | {"right": evaluate.matched(r, h)})
        return {key: torch.cat([r[key] for r in found]) for key in found[0]}
    parts = {"ALQA": picked(icd.KEPT, icd.DROPPED), "ICD": picked(icd.KEPT, icd.MINED)}
    detected = picked(*range(len(icd.STATUS)))
    labelled, truth = (torch.cat([v.labels for v in videos]) for videos in (d.labelled, hidden))
    rows = []
    for c, name in enumerate([*d.classes, "all classes"]):
        of_class = lambda labels, c=c: (labels == c) | (c == len(d.classes))
        row = {"class": name, "labelled": int(of_class(labelled).sum()), "hidden": int(of_class(truth).sum())}
        for part, r in parts.items():
            chosen, right = int(of_class(r["labels"]).sum()), int((of_class(r["labels"]) & r["right"]).sum())
            row |= {f"{part} precision": right / chosen if chosen else None,
                    f"{part} recall": right / row["hidden"] if row["hidden"] else None}
        known = of_class(detected["labels"]) & ~detected["similarity"].isnan()
        scores, similarity, right = (detected[key][known] for key in ("scores", "similarity", "right"))
        rows.append(row | {"AUC score": auc(scores, right), "AUC similarity": auc(similarity, right)})
    return rows


# ---- The linear probe -----------------------------------------------------------------------------------------------

@torch.no_grad()
def frames(detector, videos, d, s):
    """(x (N, F), y (N,)) of the steps of labelled videos, about PROBE_FRAMES at most: the learned representation (detector None: the
    input features), and the class of the shortest instance that the step lies in, background as one more."""
    rows, classes, generator = [], [], torch.Generator().manual_seed(0)
    share = PROBE_FRAMES / sum(video.steps for video in videos)
    for video in videos:
        item = data.load_item(video, d, s)
        step = torch.arange(video.steps)[torch.rand(video.steps, generator=generator) < share]
        x = item["feats"][step]
        if detector is not None:
            outputs = evaluate.forward(detector, data.collate([item]), s, torch.device(s.device))
            x = acp.representation(outputs.levels, outputs.masks, step[None].to(s.device))[0].cpu()
        y = torch.full((len(step),), len(d.classes))
        for i in torch.argsort(item["segments"][:, 0] - item["segments"][:, 1]):  # the longest first
            y[(step >= item["segments"][i, 0]) & (step <= item["segments"][i, 1])] = item["labels"][i]
        rows.append(x), classes.append(y)
    return torch.cat(rows), torch.cat(classes)


def logistic_regression(x, y, classes, decay=1e-4, iterations=100):
    """Weights (F + 1, classes) of multinomial logistic regression, by L-BFGS: x (N, F), y (N,)."""
    W = torch.zeros(x.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(torch.addmm(W[-1], x, W[:-1]), y) + decay * W[:-1].square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return W.detach()


def probe(folder, what):
    """A linear classifier of the frames' classes: {"accuracy", "recall"} on the test videos, recall averaged over the classes there.

    Not given in the paper: it is fitted on all training videos with all their labels, which stage 1 never saw, on standardised
    columns. `what`: "trained", the raw weights of the end of stage 1, "untrained", those it began with, or "input", the features."""
    s, d, detector = read_run(folder)
    if what == "trained":
        detector.load_state_dict(evaluate.read_checkpoint(folder / "checkpoint.pt")["detector"])
    elif what == "untrained":
        detector = train.begin(s, d).detector.eval()
    detector, index = None if what == "input" else detector, {label: i for i, label in enumerate(d.classes)}
    test = [data.LabelledVideo(**vars(v), segments=v.grid.to_grid(torch.tensor(d.ground_truth[v.id].segments)).float(),
                               labels=torch.tensor([index[label] for label in d.ground_truth[v.id].labels])) for v in d.test]
    x, y = frames(detector, [*d.labelled, *d.hidden.values()], d, s)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    W = logistic_regression((x - mean) / std, y, len(d.classes) + 1)
    x, y = frames(detector, test, d, s)
    predicted = torch.addmm(W[-1], (x - mean) / std, W[:-1]).argmax(1)
    recall = [float((predicted[y == c] == c).float().mean()) for c in y.unique()]
    return {"accuracy": float((predicted == y).float().mean()), "recall": statistics.mean(recall)}


# ---- Tables ---------------------------------------------------------------------------------------------------------

def spread(values):
    """"mean +- standard deviation" in percent."""
    return f"{100 * statistics.mean(values):.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def detection_row(runs, table):
    """The cells of a row from the folders of its runs, one a seed: (cells by column, average mAP a seed)."""
    metrics = [json.loads((f / "metrics.json").read_text(encoding="utf-8")) for f in runs]
    tious = metrics[0]["tiou"]
    cells = {f"mAP@{tious[i]:g}": spread([m["mAP"][i] for m in metrics]) for i in (0, len(tious) // 2, -1)}
    average = [m["average_mAP"] for m in metrics]
    cells |= {"average": spread(average), "of each seed": ", ".join(f"{100 * m:.1f}" for m in average)}
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text(encoding="utf-8").splitlines()] for f in runs]
    last = [[row for row in log if "theta_h" in row][-1:] for log in logs]  # the pulse of the last epoch
    for key in QUALITY if table == "fig3c" else QUALITY[-2:]:
        cells[key.replace("_", " ")] = spread([row[0][key] for row in last]) if all(last) else "-"
    minutes = [minutes_of(f) for f in runs]
    cells["minutes"] = "-" if None in minutes else f"{statistics.mean(minutes):.1f}"
    return cells, average


def rows_of(table, options, splits, seeds, runs):
    """Train and measure every row of a table: yields {column: cell}."""
    of_seed = lambda seed: [*options, "--seed", str(seed), *(["--split", splits[seed]] if seed < len(splits) else [])]
    if table in PROBES:
        for name, paper, what, more in PROBES[table]:
            folders = [reach([*of_seed(seed), *more.split()], "pretrain", runs) for seed in seeds]
            found = [saved(f / f"probe-{what}.json", lambda f=f, what=what: probe(f, what)) for f in folders]
            yield {"row": name, "paper: accuracy, recall": "-" if paper is None else "{:.1f}, {:.1f}".format(*paper)} | {
                key: spread([row[key] for row in found]) for key in ("accuracy", "recall")}
        return
    if table == "causes":
        for rows in zip(*(causes(reach(of_seed(seed), "all", runs)) for seed in seeds)):
            known = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0] if key != "class"}
            yield {"class": rows[0]["class"]} | {
                key: "-" if not x else f"{statistics.mean(x):.1f}" if key in ("labelled", "hidden") else f"{statistics.mean(x):.2f}"
                for key, x in known.items()}
        return
    first = None
    for name, paper, more in ROWS[table]:
        argv, stage = more.split(), "all"
        if "--stage" in argv:
            stage = argv.pop(argv.index("--stage") + 1)
            argv.remove("--stage")
        cells, average = detection_row([reach([*of_seed(seed), *argv], stage, runs) for seed in seeds], table)
        if table == "3b":
            folders = [reach([*of_seed(seed), *argv], "supervised", runs) for seed in seeds]
            rank = [saved(f / "calibration.json", lambda f=f: calibration(f))["rank_correlation"] for f in folders]
            cells["after stage 2: score against true tIoU"] = f"{statistics.mean(rank):.2f}"
        first = first or average
        paired = spread([a - b for a, b in zip(average, first)])
        yield {"row": name, "paper, THUMOS14 10 %": "-" if paper is None else f"{paper}"} | cells | {"minus the first row": paired}


def parse_seeds(text):
    """"3" -> 0, 1, 2; "0,5," -> 0, 5; raises BadInput for anything else."""
    try:
        seeds = [int(n) for n in text.split(",") if n] if "," in text else list(range(int(text)))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise data.BadInput(f"--seeds must be how many, or a list with commas, not {text!r}")
    return seeds


def markdown(rows):
    """Rows of one set of columns as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv=None):
    """The command line; returns the exit code, 2 for bad input."""
    names = [*ROWS, *PROBES, "S6", "causes"]
    parser = train.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("tables", nargs="+", choices=names, help="of the paper; open: what it leaves open; causes: pseudo labels by class")
    parser.add_argument("--seeds", default="3", help="how many seeds (from 0), or a list with commas")
    parser.add_argument("--splits", nargs="+", default=[], help="files of labelled ids for seeds 0, 1, ...; the others draw theirs")
    parser.add_argument("--runs", type=Path, default=Path("runs/tables"), help="folder of the runs")
    try:
        args, options = parser.parse_known_args(argv)
        seeds, report = parse_seeds(args.seeds), []
        for option in options:
            if option.split("=")[0] in OURS:
                raise data.BadInput(f"{option} is set by each row")
        for row in [row for table in args.tables for row in ROWS.get(table, PROBES.get(table, ()))]:
            train.parse_settings([*options, *row[-1].split()])  # before hours of training
        for table in args.tables:
            if table == "S6":
                model.main()
                continue
            rows = list(rows_of(table, options, args.splits, seeds, args.runs))
            report.append(f"Table {table}, seeds {', '.join(map(str, seeds))}\n\n{markdown(rows)}\n")
        print("\n".join(report))
    except (data.BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # a run that has said why
        return stop.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
