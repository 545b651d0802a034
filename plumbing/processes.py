"""Processes that share a batch, as torchrun starts them; the device and precision of each."""
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from plumbing.words import BadInput, process_rank


def process_count():
    """How many processes torchrun started; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share_of(items):
    """This process's share of the items: every process_count()-th, from its rank."""
    return items[process_rank()::process_count()]


def is_one_of_many():
    """Whether torchrun has started several processes, joined yet or not."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join_processes(device):
    """Join the processes that torchrun started; without torchrun nothing happens."""
    if is_one_of_many() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def leave_processes():
    """Leave them again, where all went well: after an error others may wait for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_of_all(x):
    """The sum of a tensor over all processes.

    Its gradient is that of this process's part, so that gradients can be summed."""
    if process_count() == 1:
        return x
    whole = x.detach().clone()
    dist.all_reduce(whole)
    return x + (whole - x.detach())


def means_of_all(parts):
    """The mean of each of {key: scalar} over all processes, whose gradients can be summed."""
    return {key: sum_of_all(part / process_count()) for key, part in parts.items()}


def rows_of_all(x):
    """The rows (b, ...) of all processes in the order of the whole batch, (b * number, ...).

    Gradients reach this process's rows."""
    if process_count() == 1:
        return x
    mine = x.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(process_count())]
    dist.all_gather(parts, mine)
    parts[process_rank()] = x
    return torch.stack(parts, 1).flatten(0, 1)


def dict_of_all(part):
    """The dicts of all processes as one dict."""
    if process_count() == 1:
        return part
    parts = [None] * process_count()
    dist.all_gather_object(parts, part)
    whole = {}
    for part in parts:
        whole |= part
    return whole


def draws_of_batch(shape, device="cpu", generator=None):
    """Random numbers in [0, 1) for this process's videos, the first of the dimensions.

    Of many processes that share a batch each takes its own videos' draws, so that a batch gets the
    same draws however many share it."""
    size, *rest = shape
    draws = torch.rand(size * process_count(), *rest, device=device, generator=generator)
    return share_of(draws)


def forked():
    """torch's fork_rng(), of the generators that a process draws from: the CPU's, its device's."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


@contextmanager
def one_draw(generator=None, apart=False):
    """However many numbers torch draws within, one is drawn of `generator`, which seeds them.

    So processes stay in step that draw for videos of other lengths.
    generator  None: torch's own
    apart      each process gets its own numbers within, not the same ones"""
    seed = int(torch.randint(2 ** 62, (), generator=generator))
    with forked():
        torch.manual_seed(seed + apart * process_rank())
        yield


def own_draws(drawing):
    """one_draw() with each process's own numbers, if any are drawn; else nothing."""
    return one_draw(apart=True) if drawing else nullcontext()


def sum_gradients(network):
    """Sum the gradients of all processes: the loss is that of the whole batch, each process has
    the gradient of its own videos."""
    if process_count() == 1:
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = parameters_to_vector(gradients)  # one message in the place of hundreds
    dist.all_reduce(flat)
    vector_to_parameters(flat, gradients)


def pick_device(name):
    """The device of that name, "auto" being cuda where there is one, else cpu.

    Under torchrun "cuda" is a device of its own for each process. Raises BadInput if the device
    cannot be used."""
    name = "auto" if name is None else str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and is_one_of_many():
        rank = int(os.environ["LOCAL_RANK"])
        if name != "cuda" or rank >= torch.cuda.device_count():
            raise BadInput(f"--device {name} under torchrun: each process needs a device of its "
                           f"own, cuda, and {torch.cuda.device_count()} are here")
        torch.cuda.set_device(rank)
    try:
        with warnings.catch_warnings(action="ignore"):  # about names that torch is giving up
            torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # two dozen kinds
            reason = "there is no such kind; there are auto, cpu, cuda, mps and others of torch"
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


def length_unit(T, device):
    """Of what a sequence of T steps should be a multiple, so that few lengths occur.

    Up to an eighth of T for bfloat16 on a CPU, which prepares its products anew for every shape;
    else 1."""
    bfloat16 = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return 2 ** max(T.bit_length() - 4, 0) if bfloat16 else 1


def prefetch(load, plans):
    """load(plan) of every plan in turn; a thread loads the next two while the caller works."""
    with ThreadPoolExecutor(1) as thread:
        waiting = []
        for plan in plans:
            waiting.append(thread.submit(load, plan))
            if len(waiting) > 2:
                yield waiting.pop(0).result()
        for last in waiting:
            yield last.result()
