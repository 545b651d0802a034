"""How fast every part is at several sizes, against a matrix product of the same minute.

    python -m extras.bench                                        all parts, as a table
    python -m extras.bench step nms --precision float32 --json bench.json
    python -m extras.bench epoch detection --lengths i3d_feature_lengths.json
    python -m extras.bench map --detections detections.npz --gt thumos14.json
    python -m extras.bench ops                  how many operations a step starts, by part

Times are medians of --repeat runs; whole epochs and detections run once. "share" is the rate of
the part's matrix products, counted by torch (on CPUs without those within attention), over the
rate of a 2048 x 2048 x 2048 product run right before and after. "peak" is what the process grew
by. Random features throughout; lengths and detections of THUMOS14 are read where a file is given,
else drawn to its numbers.
"""
import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import acp
import data
import evaluate
import model
import train
from extras import bmn
from plumbing.arguments import settings_of
from plumbing.files import Reading, sum_features, write_json
from plumbing.forms import Annotation, in_subset, read_annotations
from plumbing.processes import pick_device

GROWTH = (1024, 4096, 16384, 65536)  # steps of the parts that should be linear in T


# ---- Measuring ----------------------------------------------------------------------------------

def wait(device):
    """Wait until the kernels on a GPU have ended."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clock(work, device):
    """Seconds that work() takes, kernels on a GPU included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def addmm_flops(y, a, b, **_):
    """FLOPs of an in-place addmm_ of these shapes, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def count_flops():
    """torch's counter of the FLOPs of matrix products, in-place ones included."""
    mapping = {torch.ops.aten.addmm_: addmm_flops}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def product_rate(device, precision, seconds=0.5):
    """FLOP/s of a 2048 x 2048 x 2048 matrix product, run for so long.

    Ten between two looks at the clock."""
    a = torch.randn(2048, 2048, device=device, dtype=getattr(torch, precision))

    def ten():
        for _ in range(10):
            torch.mm(a, a)

    count = 0
    spent = 0.0
    while spent < seconds:
        spent += clock(ten, device)
        count += 10
    return 2 * 2048 ** 3 * count / spent


def median_time(work, device, repeat):
    """Median seconds of `repeat` runs after one that does not count."""
    work()
    return statistics.median(clock(work, device) for _ in range(repeat))


def against_product(work, device, precision, repeat):
    """Medians of `repeat` runs, each compared with the products before and after it.

    -> {"seconds", "share", "rate" (FLOP/s), "product" (FLOP/s)}"""
    with count_flops() as counter:
        work()
    flops = counter.get_total_flops()
    columns = {"seconds": [], "share": [], "rate": [], "product": []}
    before = product_rate(device, precision)
    for _ in range(repeat):
        seconds = clock(work, device)
        after = product_rate(device, precision)
        columns["seconds"].append(seconds)
        columns["share"].append(flops / seconds / ((before + after) / 2))
        columns["rate"].append(flops / seconds)
        columns["product"].append(after)
        before = after
    return {key: statistics.median(values) for key, values in columns.items()}


def memory(device):
    """The most memory that was ever in use, in MB, of the GPU or of this process.

    None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource  # Unix alone has it
    except ImportError:
        return None
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def with_memory(work, device, arguments, threads):
    """The row work(device, *arguments), with the memory it added as "peak_MB"."""
    torch.set_num_threads(threads)
    before = memory(device)
    row = work(device, *arguments)
    row["peak_MB"] = None if before is None else memory(device) - before
    return row


def in_child(work, device, *arguments):
    """with_memory() in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        threads = torch.get_num_threads()
        return pool.submit(with_memory, work, device, arguments, threads).result()


# ---- THUMOS14 in size ---------------------------------------------------------------------------

def true_lengths(path, subset, count):
    """Feature lengths of THUMOS14's videos of a subset.

    path   a file {id: {"feature_length"}}; None: `count` are drawn to THUMOS14's mean, 1550"""
    if path is None:
        drawn = np.random.default_rng(0).lognormal(6.96, 0.9, count)
        return drawn.astype(int).clip(50, 13000)
    videos = json.loads(Path(path).read_text(encoding="utf-8"))
    lengths = [video["feature_length"] for name, video in videos.items() if subset in name]
    return np.array(lengths)


def random_video(name, feats, rng):
    """A LabelledVideo of features (T, 2048), with 15 random segments of 20 classes."""
    T = len(feats)
    start = rng.uniform(0, 0.9 * T, 15)
    end = np.minimum(start + rng.uniform(2, 60, 15), T - 0.5)
    return data.LabelledVideo(
        id=name,
        source=feats,
        reading=Reading(),
        grid=data.Grid(fps=30, stride=4, frames=16),
        steps=T,
        duration=T * 4 / 30,
        source_steps=T,
        segments=torch.tensor(np.stack([start, end], 1), dtype=torch.float32),
        labels=torch.from_numpy(rng.integers(20, size=15)),
    )


def random_dataset(lengths, test_lengths=()):
    """A Dataset of random features, its videos views of one array."""
    rng = np.random.default_rng(0)
    longest = max([*lengths, *test_lengths])
    base = rng.standard_normal((longest, 2048), dtype=np.float32)
    labelled = [random_video(f"train_{i}", base[:T], rng) for i, T in enumerate(lengths)]
    test = [random_video(f"test_{i}", base[:T], rng) for i, T in enumerate(test_lengths)]
    return data.Dataset(
        classes=[str(number) for number in range(20)],
        labelled=labelled,
        test=[data.blind(video) for video in test],
        truth={},
        mean=torch.zeros(2048),
        std=torch.ones(2048),
    )


def new_run(dataset, device, precision, out, *options):
    """A Run of train.py with the THUMOS14 preset, at the start of its only epoch of stage 2."""
    fixed = [
        "--dataset", "thumos",
        "--out", str(out),
        "--device", device,
        "--precision", precision,
        "--stage", "supervised",
        "--supervised-epochs", "1",
        "--supervised-steps", "0",
        "--log-every", "1000000",
    ]
    return train.begin(settings_of([*fixed, *options], train.Settings), dataset)


def detect(run):
    """Detect on the run's test videos."""
    return evaluate.detect(run.detector, run.data.test, run.data, run.s)


def whole_videos(videos, run):
    """A batch of videos, not cropped."""
    return data.collate([data.load_item(video, run.data, run.s) for video in videos])


# ---- Steps and the forward pass -----------------------------------------------------------------

def first_batch(run):
    """Begin stage 2, whose only epoch never ends -> its first batch, of two videos."""
    run.plan["supervised"] = (1, 10 ** 6, 1)
    train.begin_stage(run, "supervised")
    rng = train.begin_epoch(run)
    return next(data.training_batches(run.data.labelled, run.data, run.s, 1, rng))


def stage_2(run):
    """A step of stage 2 as a function: losses, ICD, backward, AdamW, averaged weights."""
    batch = first_batch(run)

    def one_step():
        sup = train.batch_losses(run, batch, data.ground_truth(batch), "labelled")
        train.train_icd(run, batch)
        train.advance(run, train.objective(sup, None, run.s), {}, batch["ids"])

    return one_step


def stage_3(run):
    """A step of stage 3 as a function; the pseudo labels are the labelled videos' own."""
    batch = first_batch(run)

    def one_step():
        truth = data.ground_truth(batch)
        sup = train.batch_losses(run, batch, truth, "labelled")
        unsup = train.batch_losses(run, batch, truth, "unlabelled")
        train.advance(run, train.objective(sup, unsup, run.s), {}, batch["ids"])

    return one_step


def step_row(device, precision, T, repeat):
    """A training step at THUMOS14 size: forward, losses, backward, ICD, AdamW, averaged weights."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([T, T]), device, precision, out, "--crop-min", "1")
        found = against_product(stage_2(run), device, precision, repeat)
    return {"part": "step", "size": f"2 x {T}, {precision}"} | found


def forward_row(device, precision, T, repeat):
    """The forward pass of training (2 videos, with gradients recorded) and of detection (without).

    Beside the latter decoding and Soft-NMS."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([T, T]), device, precision, out)
        batch = whole_videos(run.data.labelled, run)

        def forward():
            return evaluate.forward(run.detector, batch, run.s)

        run.detector.train()
        training = against_product(forward, device, precision, repeat)
        run.detector.eval()
        with torch.no_grad():
            found = against_product(forward, device, precision, repeat)
            outputs = forward()
            suppress = median_time(lambda: evaluate.suppress(outputs, run.s), device, repeat)
    return {
        "part": "forward",
        "size": f"2 x {T}, {precision}",
        "training_share": training["share"],
        "suppress_seconds": suppress,
        "suppress_part": suppress / found["seconds"],
    } | found


def step(args):
    """Training steps at THUMOS14 size, and the forward passes of training and of detection."""
    for precision in args.precision:
        yield in_child(step_row, args.device, precision, 2304, args.repeat)
        yield in_child(step_row, args.device, precision, 1024, args.repeat)
        yield in_child(forward_row, args.device, precision, 2304, args.repeat)


# ---- How many operations a step starts ----------------------------------------------------------

# (all, more than a view) of a step at 9f6f4d6, where the heads ran level by level.
OPERATIONS_BEFORE = {"plain": (5873, 3491), "stage 2": (7220, 4366), "joint": (12763, 7732)}


class Operations(TorchDispatchMode):
    """Counts the operations that torch starts within it, by the part of a step.

    An operation belongs to the innermost of these functions that it is called in; those of the
    backward pass, which a GPU runs in a thread of its own, to none."""

    def __init__(self):
        super().__init__()
        self.part_of = {
            model.forward.__code__: "forward",
            train.batch_losses.__code__: "losses",
            train.train_icd.__code__: "ICD",
            acp.acp_loss.__code__: "ACP",
            train.average_weights.__code__: "averages",
        }
        self.all = Counter()
        self.no_views = Counter()

    def part(self):
        """The part of the step that is running."""
        frame = sys._getframe(2)
        while frame:
            if frame.f_code in self.part_of:
                return self.part_of[frame.f_code]
            frame = frame.f_back
        return "backward and AdamW"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        part = self.part()
        self.all[part] += 1
        self.no_views[part] += not func.is_view
        return func(*args, **(kwargs or {}))


def operations_row(device, name):
    """The operations of a step of two videos with 64 channels, by part."""
    options = ["--alqa", "none", "--acp", "none"] if name == "plain" else []
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([256, 256]), device, "float32", out,
                      "--channels", "64", "--crop-min", "1", *options)
        one_step = stage_3(run) if name == "joint" else stage_2(run)
        one_step()
        with Operations() as counted:
            one_step()
    whole, no_views = OPERATIONS_BEFORE[name]
    row = {"part": "ops", "size": name, "operations": counted.all.total(),
           "no_views": counted.no_views.total(), "before": whole, "no_views_before": no_views}
    for part in counted.all:
        row[part] = counted.no_views[part]
    return row


def operations(args):
    """Operations of a step: plain ActionFormer, APL's stage 2 and stage 3."""
    for name in OPERATIONS_BEFORE:
        yield in_child(operations_row, args.device, name)


# ---- Whole epochs and detections ----------------------------------------------------------------

def computed_per_true_step(run):
    """How many steps the epoch of stage 2 computes for one that is no padding."""
    s, videos = run.s, run.data.labelled
    seeds = np.random.SeedSequence([s.seed, train.STAGES.index("supervised"), 0])
    steps = math.ceil(len(videos) / s.batch)
    plans = data.plan_batches(videos, s, steps, s.batch, np.random.default_rng(seeds))
    kind = torch.device(s.device).type
    true = 0
    computed = 0
    for plan in plans:
        lengths = []
        for i, seed in plan:
            item = data.load_item(videos[i], run.data, s, np.random.default_rng(seed))
            lengths.append(len(item["feats"]))
        true += sum(lengths)
        with torch.autocast(kind, torch.bfloat16, enabled=s.precision == "bfloat16"):
            computed += len(plan) * run.detector.padded(max(lengths))
    return computed / true


def supervised_epoch(run):
    """The epoch of stage 2, and the checkpoint at its end."""
    train.begin_stage(run, "supervised")
    train.supervised(run, train.begin_epoch(run))
    train.end_epoch(run)


def epoch_row(device, precision, lengths):
    """One epoch of stage 2: loading, steps, the checkpoint."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset(lengths), device, precision, out)
        padding = computed_per_true_step(run)
        seconds = clock(lambda: supervised_epoch(run), device)
    return {
        "part": "epoch",
        "size": f"{len(lengths)} videos, {precision}",
        "seconds": seconds,
        "videos_a_second": len(lengths) / seconds,
        "computed_per_true_step": padding,
    }


def epoch(args):
    """An epoch over videos of THUMOS14's lengths."""
    lengths = true_lengths(args.lengths, "validation", 200)
    for precision in args.precision:
        yield in_child(epoch_row, args.device, precision, lengths)


@torch.no_grad()
def batch_costs(run, videos, device):
    """FLOPs and seconds of the forward pass, and seconds of Soft-NMS, of a batch of videos."""
    batch = whole_videos(videos, run)

    def forward():
        return evaluate.forward(run.detector, batch, run.s)

    with count_flops() as counter:
        outputs = forward()
    seconds = clock(forward, device)
    suppress = clock(lambda: evaluate.suppress(outputs, run.s), device)
    return counter.get_total_flops(), seconds, suppress


def detection_row(device, precision, lengths):
    """Detection of whole videos: loading, forward, decoding, Soft-NMS.

    And the share that the last two take."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([64, 64], lengths), device, precision, out)
        run.detector.eval()
        whole = clock(lambda: detect(run), device)
        order = sorted(run.data.test, key=lambda video: video.steps)
        ideal = forward = suppress = 0.0
        before = product_rate(device, precision)
        for first in range(0, len(order), run.s.batch):
            videos = order[first:first + run.s.batch]
            flops, forward_seconds, suppress_seconds = batch_costs(run, videos, device)
            after = product_rate(device, precision, 0.1)
            ideal += flops / ((before + after) / 2)
            forward += forward_seconds
            suppress += suppress_seconds
            before = after
    return {
        "part": "detection",
        "size": f"{len(lengths)} videos, {precision}",
        "seconds": whole,
        "videos_a_second": len(lengths) / whole,
        "share": ideal / forward,
        "suppress_part": suppress / forward,
    }


def detection(args):
    """Detection of the test videos' lengths."""
    lengths = true_lengths(args.lengths, "test", 212)
    for precision in args.precision:
        yield in_child(detection_row, args.device, precision, lengths)


def growth_row(part, size, seconds, T):
    """A row of a part that should grow in proportion to its T steps."""
    cost = 1e6 * seconds / T
    return {"part": part, "size": size, "seconds": seconds, "microseconds_a_step": cost}


def long_row(device, precision, T):
    """Detection of one video of T steps at THUMOS14 size, once."""
    with tempfile.TemporaryDirectory() as out:
        run = new_run(random_dataset([64, 64], [T]), device, precision, out)
        seconds = clock(lambda: detect(run), device)
    return growth_row("long", f"{T} steps, {precision}", seconds, T)


def long(args):
    """Growth of detection with T: time and memory."""
    for T in GROWTH:
        yield in_child(long_row, args.device, args.precision[-1], T)


# ---- Single parts -------------------------------------------------------------------------------

def attention_row(device, T, repeat):
    """Local attention, window 19, 512 channels, 4 heads, forward and backward."""
    q, k, v = torch.randn(3, 1, T, 512, device=device).unbind(0)
    q.requires_grad_()
    mask = torch.ones(1, T, dtype=torch.bool, device=device)

    def both_ways():
        out = model.local_attention(q, k, v, mask, heads=4, half=9)
        out.sum().backward()

    seconds = median_time(both_ways, device, repeat)
    return growth_row("attention", f"{T} steps", seconds, T)


def attention(args):
    """Growth of local attention with T."""
    for T in GROWTH:
        yield in_child(attention_row, args.device, T, args.repeat)


def nms_row(device, count, classes, repeat):
    """Soft-NMS of random candidates of a video, 200 kept a class."""
    generator = torch.Generator().manual_seed(0)
    start, length, scores = torch.rand(3, count, generator=generator).unbind(0)
    segments = torch.stack([2300 * start, 2300 * start + 60 * length], -1).to(device)
    labels = torch.randint(classes, (count,), generator=generator).to(device)
    scores = scores.to(device)

    def suppress():
        model.soft_nms(segments, scores, labels, sigma=0.5, min_score=0.001, max_num=200)

    seconds = median_time(suppress, device, repeat)
    return {"part": "nms", "size": f"{count} candidates, {classes} classes", "seconds": seconds}


def nms(args):
    """Soft-NMS by class, and class-agnostic."""
    for count, classes in ((500, 20), (2000, 20), (8000, 20), (2000, 1)):
        yield in_child(nms_row, args.device, count, classes, 3 * args.repeat)


def random_truth(rng, videos=212, instances=3358):
    """Annotations {id: Annotation} with so many instances of 20 classes."""
    segments = {f"video_{i}": [] for i in range(videos)}
    labels = {name: [] for name in segments}
    for i in range(instances):
        name = f"video_{i % videos}"
        start = rng.uniform(0, 190)
        segments[name].append([start, start + rng.uniform(1, 10)])
        labels[name].append(f"class {rng.integers(20)}")
    return {name: Annotation("test", 200.0, 30.0, np.array(segments[name]), labels[name])
            for name in segments}


def random_detections(count):
    """`count` detections in 212 videos: (truth, predictions) as evaluate.py takes them."""
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    start = rng.uniform(0, 190, count)
    end = start + rng.uniform(1, 10, count)
    scores = rng.random(count)
    labels = rng.integers(20, size=count)
    columns = zip(start.tolist(), end.tolist(), scores.tolist(), labels.tolist())
    found = [{"segment": [a, b], "score": score, "label": f"class {label}"}
             for a, b, score, label in columns]
    bounds = [count * i // len(truth) for i in range(len(truth) + 1)]
    predictions = {f"video_{i}": found[bounds[i]:bounds[i + 1]] for i in range(len(truth))}
    return truth, predictions


def given_detections(detections, gt):
    """(truth, predictions) of an .npz of detections and an annotation file's test videos."""
    truth = in_subset(read_annotations(gt), "test")
    arrays = np.load(detections, allow_pickle=False)
    keys = ("video_id", "label", "start", "end", "score")
    predictions = {}
    for video, label, start, end, score in zip(*(arrays[key].tolist() for key in keys)):
        found = {"label": label, "segment": [start, end], "score": score}
        predictions.setdefault(video, []).append(found)
    return truth, predictions


def map_row(device, name, make, arguments, repeat):
    """mAP at five thresholds, from detections in memory."""
    truth, predictions = make(*arguments)
    count = sum(len(found) for found in predictions.values())
    tious = np.linspace(0.3, 0.7, 5)
    metrics = {}

    def measure():
        metrics.update(evaluate.mean_average_precision(truth, predictions, tious))

    seconds = median_time(measure, device, repeat)
    return {
        "part": "map",
        "size": f"{count} {name} detections",
        "seconds": seconds,
        "microseconds_a_detection": 1e6 * seconds / count,
        "average_mAP": metrics["average_mAP"],
    }


def mean_ap(args):
    """mAP of the given detections, and its growth with the number of random ones."""
    if args.detections and args.gt:
        files = (args.detections, args.gt)
        yield in_child(map_row, "cpu", "given", given_detections, files, args.repeat)
    for count in (42_400, 424_000, 2_000_000):
        repeat = min(args.repeat, 3)
        yield in_child(map_row, "cpu", "random", random_detections, (count,), repeat)


def kmeans_row(device, rows, repeat):
    """K-means of rows of 2048 numbers, 10 restarts."""
    x = torch.randn(rows, 2048, device=device)

    def cluster():
        acp.kmeans(x, 4, torch.Generator().manual_seed(0), restarts=10)

    seconds = median_time(cluster, device, repeat)
    return {"part": "kmeans", "size": f"{rows} rows, 4 clusters", "seconds": seconds}


def kmeans(args):
    """A batch of 2, 10 and 40 videos of 40 steps."""
    for rows in (80, 400, 1600):
        yield in_child(kmeans_row, args.device, rows, args.repeat)


def loading_row(device, T, repeat):
    """A crop of 2304 steps from a memory-mapped file, and the first check of the file."""
    s = settings_of(["--dataset", "thumos"], train.Settings)
    note = Annotation("validation", None, 30.0, np.zeros((0, 2)), [])
    dataset = random_dataset([64])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.npy"
        rng = np.random.default_rng(0)
        np.save(path, rng.standard_normal((T, 2048), dtype=np.float32))

        def check():
            sum_features(path, s.reading(), "video")

        video = data.place_video("video", note, path, T, s)

        def crop():
            data.load_item(video, dataset, s, np.random.default_rng(0))

        return {
            "part": "loading",
            "size": f"{T} steps",
            "seconds": median_time(crop, device, repeat),
            "check_seconds": median_time(check, device, repeat),
        }


def loading(args):
    """Reading features from a file that the system has just seen."""
    for T in (2304, 16384, 65536):
        yield in_child(loading_row, "cpu", T, args.repeat)


# ---- BMN ----------------------------------------------------------------------------------------

class DenseMatching(torch.nn.Module):
    """extras.bmn's boundary-matching layer as a product with the whole mask (W, N * W * W)."""

    def __init__(self, s):
        super().__init__()
        W, N = s.window(), s.samples
        first, last = bmn.pairs_of(W)
        mask = torch.zeros(W, N, W, W)
        each = bmn.sampling(W, s).to_dense().float().reshape(-1, N, W)
        mask[:, :, first, last] = each.permute(2, 1, 0)
        self.register_buffer("mask", mask.reshape(W, -1), persistent=False)
        self.pairs = first, last

    def forward(self, x, weight):
        """x (B, W, C), weight (wide, C, N, 1, 1) -> (P, B, wide)."""
        B, W, C = x.shape
        sampled = (x.transpose(1, 2) @ self.mask).reshape(B, C, -1, W, W)
        y = torch.nn.functional.conv3d(sampled, weight)[:, :, 0]  # (B, wide, W, W)
        return y[..., self.pairs[0], self.pairs[1]].permute(2, 0, 1)


def bmn_row(device, dense, batch, repeat):
    """A training step of BMN at ActivityNet's size: forward, losses, backward."""
    s = bmn.Settings(resize=100, max_steps=100, alqa="none")
    detector = s.build(400, 200).to(device)
    if dense:
        detector.matching = DenseMatching(s).to(device)
    feats = torch.randn(batch, 100, 400, device=device)
    mask = torch.ones(batch, 100, device=device).bool()
    action = {"segments": torch.tensor([[20.0, 60.0]], device=device),
              "labels": torch.zeros(1, device=device).long(),
              "rejected": torch.zeros(0, 2, device=device)}

    def one_step():
        parts = s.losses(detector(feats, mask), [action] * batch, 200)
        (parts["cls"] + parts["reg"]).backward()

    return {
        "part": "bmn",
        "size": f"{batch} x 100, {'dense' if dense else 'sparse'}",
        "seconds": median_time(one_step, device, repeat),
    }


def bmn_step(args):
    """BMN's step with the sparse product and with the published dense mask."""
    for dense in (False, True):
        yield in_child(bmn_row, args.device, dense, 16, min(args.repeat, 2))


# ---- The command line ---------------------------------------------------------------------------

# Each yields rows {"part", "size", what: number}.
PARTS = {
    "step": step,
    "ops": operations,
    "epoch": epoch,
    "detection": detection,
    "long": long,
    "attention": attention,
    "nms": nms,
    "map": mean_ap,
    "kmeans": kmeans,
    "loading": loading,
    "bmn": bmn_step,
}
UNITS = {
    "seconds": ("s", 1),
    "suppress_seconds": ("s", 1),
    "check_seconds": ("s", 1),
    "rate": ("GFLOP/s", 1e-9),
    "product": ("GFLOP/s", 1e-9),
}


def show(row):
    """Print a row as a line."""
    words = []
    for key, value in row.items():
        if isinstance(value, int):
            words.append(f"{key} {value}")
        if isinstance(value, float):
            unit, factor = UNITS.get(key, ("", 1))
            words.append(f"{key} {value * factor:.4g} {unit}".rstrip())
    print(f"{row['part']:10} {row['size']:32} {', '.join(words)}", flush=True)


def parse(argv):
    """The arguments of the command line."""
    precisions = ["bfloat16", "float32"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "parts", nargs="*", help=f"what to measure (default: all): {', '.join(PARTS)}")
    parser.add_argument("--precision", nargs="+", default=precisions, choices=precisions)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=7, help="runs whose median is taken")
    parser.add_argument(
        "--lengths",
        help='a JSON file {video: {"feature_length": T}} with "validation" or "test" in the names')
    parser.add_argument(
        "--detections", help="an .npz of detections: video_id, label, start, end, score")
    parser.add_argument("--gt", help="their ground truth, in ActivityNet's annotation format")
    parser.add_argument("--json", help="write the rows here")
    return parser.parse_args(argv)


def main(argv=None):
    """The command line."""
    args = parse(argv)
    args.device = pick_device(args.device)
    threads = torch.get_num_threads()
    print(f"{args.device}, {threads} threads, torch {torch.__version__}", flush=True)
    rows = []
    for name in args.parts or PARTS:
        for row in PARTS[name](args):
            show(row)
            rows.append(row)
    if args.json:
        write_json(args.json, rows, indent=1)


if __name__ == "__main__":
    main()
