"""How fast: every part of the project at several sizes, against a matrix product measured in the same minute.

    python bench.py                                        all parts, as a table
    python bench.py step nms --precision float32 --json bench.json
    python bench.py epoch detection --lengths i3d_feature_lengths.json
    python bench.py map --detections detections.npz --gt thumos14.json

Times are medians of --repeat runs; whole epochs and detections run once. "share" is the rate of the part's matrix products, counted by
torch (on CPUs without those within attention), over the rate of a 2048 x 2048 x 2048 product run right before and after. "peak" is
what the process grew by. Random features throughout; lengths and detections of THUMOS14 are read where a file is given, else drawn to
its numbers.
"""
import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import acp
import data
import evaluate
import model
import train

# ---- Measuring ------------------------------------------------------------------------------------------------------

def clock(work, device):
    """Seconds that work() takes, kernels on a GPU included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def product_rate(device, precision, seconds=0.5):
    """FLOP/s of a 2048 x 2048 x 2048 matrix product, run for so long, ten between two looks at the clock."""
    a = torch.randn(2048, 2048, device=device, dtype=getattr(torch, precision))
    count, spent = 0, 0.0
    while spent < seconds:
        spent += clock(lambda: [a @ a for _ in range(10)], device)
        count += 10
    return 2 * 2048 ** 3 * count / spent


def median_time(work, device, repeat):
    """Median seconds of `repeat` runs after one that does not count."""
    work()
    return statistics.median(clock(work, device) for _ in range(repeat))


def count_flops():
    """torch's counter of the FLOPs of matrix products, in-place ones included."""
    flops = lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]  # of their shapes
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops})


def against_product(work, device, precision, repeat):
    """{"seconds", "share", "rate", "product"}: medians, each run compared with the products before and after it; FLOP/s."""
    with count_flops() as counter:
        work()
    flops, rows, before = counter.get_total_flops(), [], product_rate(device, precision)
    for _ in range(repeat):
        seconds = clock(work, device)
        after = product_rate(device, precision)
        rows.append((seconds, flops / seconds / ((before + after) / 2), flops / seconds, after))
        before = after
    return dict(zip(("seconds", "share", "rate", "product"), (statistics.median(column) for column in zip(*rows))))


def memory(device):
    """The most memory that was ever in use, in MB: of the GPU, or of this process (None where the system does not tell)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource  # Unix alone has it
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def _with_memory(work, args, threads):
    torch.set_num_threads(threads)
    before = memory(args[0])
    row = work(*args)
    return row | {"peak_MB": None if before is None else memory(args[0]) - before}


def in_child(work, *args):
    """work(*args), a row, run in a fresh process, with the memory it added as "peak_MB"."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_memory, work, args, torch.get_num_threads()).result()


# ---- THUMOS14 in size -----------------------------------------------------------------------------------------------

def true_lengths(path, subset, count):
    """Feature lengths of THUMOS14's videos of a subset, of a file {id: {"feature_length"}}, or `count` drawn to its mean, 1550."""
    if path is None:
        return np.random.default_rng(0).lognormal(6.96, 0.9, count).astype(int).clip(50, 13000)
    return np.array([v["feature_length"] for name, v in json.loads(Path(path).read_text(encoding="utf-8")).items() if subset in name])


def random_dataset(lengths, test_lengths=()):
    """A Dataset of random features (T, 2048), 20 classes and 15 segments a video, its videos views of one array."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((max([*lengths, *test_lengths]), 2048), dtype=np.float32)

    def video(name, T):
        start = rng.uniform(0, 0.9 * T, 15)
        segments = np.stack([start, np.minimum(start + rng.uniform(2, 60, 15), T - 0.5)], 1)
        return data.LabelledVideo(name, base[:T], "", data.Grid(30, 4, 16), int(T), T * 4 / 30, False,
                                  torch.tensor(segments, dtype=torch.float32), torch.from_numpy(rng.integers(20, size=15)))
    labelled = [video(f"train_{i}", T) for i, T in enumerate(lengths)]
    test = [data.blind(video(f"test_{i}", T)) for i, T in enumerate(test_lengths)]
    return data.Dataset([str(i) for i in range(20)], labelled, [], test, {}, {}, 2048, torch.zeros(2048), torch.ones(2048), [])


def new_run(dataset, device, precision, out, *options):
    """A run of train.py with the THUMOS14 preset on such a dataset, at the beginning of its only epoch of stage 2."""
    options = ["--dataset", "thumos", "--out", str(out), "--device", device, "--precision", precision, "--stage", "supervised",
               "--supervised-epochs", "1", "--supervised-steps", "0", "--log-every", "1000000", *options]
    return train.begin(train.parse_settings(options), dataset)


# ---- The parts: each yields rows ------------------------------------------------------------------------------------

def step_row(device, precision, T, repeat):
    """One training step at THUMOS14 size: forward, losses, backward, ICD, clipping, AdamW, averaged weights."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([T, T]), device, precision, out, "--crop-min", "1")
        rng = next(train.epochs(run, "supervised", 1, 10 ** 6))
        batch = next(data.training_batches(run.data.labelled, run.data, run.s, 1, rng))

        def one_step():
            sup = train.batch_losses(run, batch, train.ground_truth(batch), 0)
            train.train_icd(run, batch)
            train.advance(run, train.objective(sup, None, run.s), {})
        return {"part": "step", "size": f"2 x {T}, {precision}"} | against_product(one_step, device, precision, repeat)


def forward_row(device, precision, T, repeat):
    """The forward pass of training (2 videos, with gradients recorded) and of detection (without), decoding and Soft-NMS."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([T, T]), device, precision, out)
        batch = data.collate([data.load_item(v, run.data, run.s) for v in run.data.labelled])
        forward = lambda: evaluate.forward(run.detector.train(), batch, run.s, run.device)
        train_row = against_product(forward, device, precision, repeat)
        with torch.no_grad():
            detect_row = against_product(lambda: evaluate.forward(run.detector.eval(), batch, run.s, run.device), device, precision, repeat)
            outputs = evaluate.forward(run.detector, batch, run.s, run.device)
            suppress = median_time(lambda: evaluate.suppress(outputs, run.s), device, repeat)
    return {"part": "forward", "size": f"2 x {T}, {precision}", "training_share": train_row["share"], "suppress_seconds": suppress,
            "suppress_part": suppress / detect_row["seconds"]} | detect_row


def step(args):
    """Training steps at THUMOS14 size, and the forward pass of training beside that of detection."""
    for precision in args.precision:
        yield in_child(step_row, args.device, precision, 2304, args.repeat)
        yield in_child(step_row, args.device, precision, 1024, args.repeat)
        yield in_child(forward_row, args.device, precision, 2304, args.repeat)


def epoch_row(device, precision, lengths):
    """One epoch of stage 2: loading, steps, the checkpoint; how many steps are computed for one true step."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset(lengths), device, precision, out)
        seeds = np.random.SeedSequence([run.s.seed, train.STAGES.index("supervised"), 0])
        plan = data.plan_batches(run.data.labelled, run.s, -(-len(lengths) // run.s.batch), run.s.batch, np.random.default_rng(seeds))
        true, computed, coarse = 0, 0, device == "cpu" and precision == "bfloat16"
        for batch in plan:
            items = [data.load_item(run.data.labelled[i], run.data, run.s, np.random.default_rng(seed)) for i, seed in batch]
            cropped = [len(item["feats"]) for item in items]
            true, computed = true + sum(cropped), computed + len(batch) * run.detector.padded(max(cropped), coarse)
        seconds = clock(lambda: train.supervised(run), device)
    return {"part": "epoch", "size": f"{len(lengths)} videos, {precision}", "seconds": seconds, "videos_a_second": len(lengths) / seconds,
            "computed_per_true_step": computed / true}


def epoch(args):
    """An epoch over videos of THUMOS14's lengths."""
    for precision in args.precision:
        yield in_child(epoch_row, args.device, precision, true_lengths(args.lengths, "validation", 200))


def detection_row(device, precision, lengths):
    """Detection of whole videos: loading, forward, decoding, Soft-NMS; the share that the last two take."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([64, 64], lengths), device, precision, out)
        order = sorted(run.data.test, key=lambda v: v.steps)
        whole = clock(lambda: evaluate.detect(run.detector, run.data.test, run.data, run.s, run.device), device)
        ideal, spent, suppress, before = 0.0, 0.0, 0.0, product_rate(device, precision)
        for at in range(0, len(order), run.s.batch):
            batch, result = data.collate([data.load_item(v, run.data, run.s) for v in order[at:at + run.s.batch]]), []
            forward = lambda b=batch, r=result: r.append(evaluate.forward(run.detector, b, run.s, run.device))
            with torch.no_grad():
                with count_flops() as counter:
                    forward()
                spent += clock(forward, device)
                suppress += clock(lambda r=result: evaluate.suppress(r[0], run.s), device)
            after = product_rate(device, precision, 0.1)
            ideal += counter.get_total_flops() / ((before + after) / 2)
            before = after
    return {"part": "detection", "size": f"{len(lengths)} videos, {precision}", "seconds": whole, "videos_a_second": len(lengths) / whole,
            "share": ideal / spent, "suppress_part": suppress / spent}


def detection(args):
    """Detection of the test videos' lengths."""
    for precision in args.precision:
        yield in_child(detection_row, args.device, precision, true_lengths(args.lengths, "test", 212))


def long_row(device, precision, T):
    """Detection of one video of T steps at THUMOS14 size, once."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([64, 64], [T]), device, precision, out)
        seconds = clock(lambda: evaluate.detect(run.detector, run.data.test, run.data, run.s, run.device), device)
    return {"part": "long", "size": f"{T} steps, {precision}", "seconds": seconds, "microseconds_a_step": 1e6 * seconds / T}


def long(args):
    """Growth of detection with T: time and memory."""
    for T in (1024, 4096, 16384, 65536):
        yield in_child(long_row, args.device, args.precision[-1], T)


def attention_row(device, T, repeat):
    """Local attention, window 19, 512 channels, 4 heads, forward and backward."""
    q, k, v = torch.randn(3, 1, T, 512, device=device).unbind(0)
    q.requires_grad_()
    mask = torch.ones(1, T, dtype=torch.bool, device=device)
    seconds = median_time(lambda: model.local_attention(q, k, v, mask, 4, 9).sum().backward(), device, repeat)
    return {"part": "attention", "size": f"{T} steps", "seconds": seconds, "microseconds_a_step": 1e6 * seconds / T}


def attention(args):
    """Growth of local attention with T."""
    for T in (1024, 4096, 16384, 65536):
        yield in_child(attention_row, args.device, T, args.repeat)


def nms_row(device, count, classes, repeat):
    """Soft-NMS of random candidates of a video, 200 kept a class."""
    generator = torch.Generator().manual_seed(0)
    start, length, scores = torch.rand(3, count, generator=generator).unbind(0)
    segments = torch.stack([2300 * start, 2300 * start + 60 * length], -1).to(device)
    labels, scores = torch.randint(classes, (count,), generator=generator).to(device), scores.to(device)
    seconds = median_time(lambda: model.soft_nms(segments, scores, labels, 0.5, 0.001, 200), device, repeat)
    return {"part": "nms", "size": f"{count} candidates, {classes} classes", "seconds": seconds}


def nms(args):
    """Soft-NMS by class, and class-agnostic."""
    for count, classes in ((500, 20), (2000, 20), (8000, 20), (2000, 1)):
        yield in_child(nms_row, args.device, count, classes, 3 * args.repeat)


def random_detections(count):
    """`count` detections in 212 videos with 3358 instances of 20 classes: (truth, predictions) as evaluate.py takes them."""
    rng = np.random.default_rng(0)
    truth = {f"video_{i}": data.Annotation("test", 200.0, 30.0, np.zeros((0, 2)), []) for i in range(212)}
    for i in range(3358):
        a, start = truth[f"video_{i % 212}"], rng.uniform(0, 190)
        a.segments, a.labels = np.concatenate([a.segments, [[start, start + rng.uniform(1, 10)]]]), [*a.labels, f"class {rng.integers(20)}"]
    start, length, score, label = rng.uniform(0, 190, count), rng.uniform(1, 10, count), rng.random(count), rng.integers(20, size=count)
    found = [{"segment": [a, a + b], "score": c, "label": f"class {k}"}
             for a, b, c, k in zip(start.tolist(), length.tolist(), score.tolist(), label.tolist())]
    return truth, {f"video_{i}": found[count * i // 212:count * (i + 1) // 212] for i in range(212)}


def given_detections(detections, gt):
    """(truth, predictions) of an .npz of detections and an annotation file's test videos."""
    truth = {n: a for n, a in data.read_annotations(gt).items() if a.subset.lower() == "test"}
    arrays, predictions = np.load(detections, allow_pickle=False), {}
    for video, label, *row in zip(*(arrays[key].tolist() for key in ("video_id", "label", "start", "end", "score"))):
        predictions.setdefault(video, []).append({"label": label, "segment": row[:2], "score": row[2]})
    return truth, predictions


def map_row(device, name, make, arguments, repeat):
    """mAP at five thresholds, from detections in memory."""
    truth, predictions = make(*arguments)
    count, tious, found = sum(len(p) for p in predictions.values()), np.linspace(0.3, 0.7, 5), []
    seconds = median_time(lambda: found.append(evaluate.mean_average_precision(truth, predictions, tious)), "cpu", repeat)
    return {"part": "map", "size": f"{count} {name} detections", "seconds": seconds, "microseconds_a_detection": 1e6 * seconds / count,
            "average_mAP": found[0]["average_mAP"]}


def map(args):
    """mAP of the given detections, and its growth with the number of random ones."""
    if args.detections and args.gt:
        yield in_child(map_row, "cpu", "given", given_detections, (args.detections, args.gt), args.repeat)
    for count in (42_400, 424_000, 2_000_000):
        yield in_child(map_row, "cpu", "random", random_detections, (count,), min(args.repeat, 3))


def kmeans_row(device, rows, repeat):
    """K-means of rows of 2048 numbers, 10 restarts."""
    x = torch.randn(rows, 2048, device=device)
    seconds = median_time(lambda: acp.kmeans(x, 4, torch.Generator().manual_seed(0)), device, repeat)
    return {"part": "kmeans", "size": f"{rows} rows, 4 clusters", "seconds": seconds}


def kmeans(args):
    """A batch of 2, 10 and 40 videos of 40 steps."""
    for rows in (80, 400, 1600):
        yield in_child(kmeans_row, args.device, rows, args.repeat)


def loading_row(device, T, repeat):
    """A crop of 2304 steps from a memory-mapped file, and the check of the whole file when a run begins."""
    s = train.parse_settings(["--dataset", "thumos"])
    with tempfile.TemporaryDirectory() as folder:
        path, note = Path(folder) / "video.npy", data.Annotation("validation", None, 30.0, np.zeros((0, 2)), [])
        np.save(path, np.random.default_rng(0).standard_normal((T, 2048), dtype=np.float32))
        check = lambda: data.open_video("video", note, path, s, {}, "annotations", False)[0]
        dataset, video = random_dataset([64]), check()
        crop = lambda: data.load_item(video, dataset, s, np.random.default_rng(0))
        return {"part": "loading", "size": f"{T} steps", "seconds": median_time(crop, "cpu", repeat),
                "check_seconds": median_time(check, "cpu", repeat)}


def loading(args):
    """Reading features from a file that the system has just seen."""
    for T in (2304, 16384, 65536):
        yield in_child(loading_row, "cpu", T, args.repeat)


PARTS = {f.__name__: f for f in (step, epoch, detection, long, attention, nms, map, kmeans, loading)}


def show(row):
    """A row as a line."""
    units = dict.fromkeys(("seconds", "suppress_seconds", "check_seconds"), ("s", 1))
    units |= dict.fromkeys(("rate", "product"), ("GFLOP/s", 1e-9))
    words = []
    for key, value in row.items():
        if isinstance(value, float):
            unit, factor = units.get(key, ("", 1))
            words.append(f"{key} {value * factor:.4g} {unit}".rstrip())
    print(f"{row['part']:10} {row['size']:32} {', '.join(words)}", flush=True)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="*", help=f"what to measure (default: all): {', '.join(PARTS)}")
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=7, help="runs whose median is taken")
    parser.add_argument("--lengths", help="a JSON file {video: {\"feature_length\": T}} with \"validation\" or \"test\" in the names")
    parser.add_argument("--detections", help="an .npz of detections: video_id, label, start, end, score")
    parser.add_argument("--gt", help="their ground truth, in ActivityNet's annotation format")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    args.device = evaluate.pick_device(args.device)
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    rows = []
    for name in args.parts or PARTS:
        for row in PARTS[name](args):
            show(row)
            rows.append(row)
    if args.json:
        evaluate.write_json(args.json, rows, indent=1)


if __name__ == "__main__":
    main()
