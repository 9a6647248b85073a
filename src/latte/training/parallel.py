# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run share its model: the forward pass that trains, and how gradients are summed."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from latte.model.denoiser import Denoiser
from latte.training.distributed import Group

BUCKET_MIB = 25  # gradients that are summed in one operation


class Replicated:
    """Every process holds the whole model (DistributedDataParallel).

    Gradients are summed over the processes in buckets of BUCKET_MIB while the backward pass computes the
    others. ``forward`` is what stands for the model in a training step; inside ``accumulate()`` its backward
    pass only adds to this process's gradients. With one process, ``forward`` is the model itself.
    """

    def __init__(self, model: Denoiser, group: Group):
        self.forward: Callable[..., Tensor] = model
        self.accumulate: Callable[[], AbstractContextManager[Any]] = nullcontext
        if group.size == 1:
            return
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, which 2.11 needs
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                model,
                broadcast_buffers=False,
                init_sync=False,  # the values are broadcast before
                bucket_cap_mb=BUCKET_MIB,
                gradient_as_bucket_view=True,  # no second copy of the gradients
            )
        wrapped.register_comm_hook(None, sum_bucket)
        self.forward = wrapped
        self.accumulate = wrapped.no_sync


def sum_bucket(
    state: None,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[torch.Tensor]:
    """Start the sum of a bucket over the processes; DistributedDataParallel's own hook returns the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
