"""The input of a detector: standardised over each video too, with noise in training, or looked at
many times with noise."""
import torch
from torch import nn

from plumbing.processes import draws_of_batch, forked, own_draws

# What features are standardised over: all videos, their own alone, or both side by side.
VIEWS = ("all", "own", "both")


def jittered(x, most):
    """Features (B, T, D) as another person or sensor might give them.

    Each channel of a video is multiplied by 1 + a and moved by b, two draws from [-most, most),
    the same at all of its steps."""
    draws = draws_of_batch((len(x), 2, 1, x.shape[2]), x.device)
    a, b = (2 * most * draws - most).unbind(1)
    return x * (1 + a) + b


def over_itself(x, mask, least=0.1):
    """Features (B, T, D) standardised over the valid steps, mask (B, T), of their own video.

    least  a channel's std counts as this or more: what hardly moves is not blown up"""
    share = (mask / mask.sum(1, keepdim=True))[..., None]  # of a step in the mean
    mean = (x * share).sum(1, keepdim=True)
    variance = ((x - mean) ** 2 * share).sum(1, keepdim=True)
    return (x - mean) / variance.sqrt().clamp(min=least)


class Input(nn.Module):
    """What a detector sees of its features, in training with noise.

    dim  D
    s    has input_view, one of VIEWS, input_jitter and input_dropout; model.py says what they are

    x     (B, T, D), mask (B, T)
    ->    (B, T, width)"""

    def __init__(self, dim, s):
        super().__init__()
        self.s = s
        self.width = 2 * dim if s.input_view == "both" else dim
        self.dropout = nn.Dropout(s.input_dropout)

    def is_noisy(self):
        """Whether training sees noise."""
        return self.s.input_jitter > 0 or self.s.input_dropout > 0

    def forward(self, x, mask):
        if self.training and self.s.input_jitter:
            x = jittered(x, self.s.input_jitter)
        if self.s.input_view == "own":
            x = over_itself(x, mask)
        if self.s.input_view == "both":
            x = torch.cat([x, over_itself(x, mask)], 2)
        with own_draws(self.training and self.s.input_dropout):
            return self.dropout(x)


class Passes(nn.Module):
    """A detector whose predictions are the means of many passes with its input's noise.

    What it predicts whatever person or sensor gave the features is surer than one look. The random
    numbers of training stay those of training: each batch is seen with the same ones.
    network  a Detector of model.py, whose outputs hold their predictions first
    count    how many passes; 0: one without noise, of any detector"""

    def __init__(self, network, count):
        super().__init__()
        self.network = network
        self.count = count
        self.training = network.training

    def forward(self, *batch):
        if not self.count or not self.network.input.is_noisy():
            return self.network(*batch)
        self.network.input.train()
        with forked():
            each = [self.network(*batch) for _ in range(self.count)]
        self.network.input.train(self.training)
        means = [torch.stack(parts).mean(0) for parts in zip(*(o.predictions() for o in each))]
        return type(each[0])(*means, *each[0][len(means):])
