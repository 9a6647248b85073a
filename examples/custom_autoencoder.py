# SPDX-License-Identifier: Apache-2.0
"""Train on the latents of your own autoencoder: examples/custom_autoencoder.py [STEPS] [RUN_DIR]."""

import sys

from torch import nn
from torch.nn import functional

import latte
from latte.autoencoder.base import Compression, FrameCodec
from latte.autoencoder.codec import CODECS
from latte.build import build


class ShuffleCodec(FrameCodec):
    """Squares of 4 x 4 pixels as 48 channels: lossless, and nothing to learn."""

    name = "shuffle"
    compression = Compression(channels=48, spatial_factor=4)

    @classmethod
    def load(cls, path, chunk, device):
        return cls(nn.Identity(), chunk, device)  # here a network with its weights from ``path``

    skeleton = classmethod(lambda cls, path: nn.Identity())  # the network without its weights

    def encode_frames(self, frames, noise):  # (n 3 H W) in [-1, 1] -> (n 48 H/4 W/4), about unit variance
        return 2 * functional.pixel_unshuffle(frames, 4)

    def decode_frames(self, latent):  # (n 48 h w) -> (n 3 4h 4w)
        return functional.pixel_shuffle(latent / 2, 4)


if __name__ == "__main__":
    steps, run_dir = (*sys.argv[1:], *("400", "runs/shuffle")[len(sys.argv) - 1 :])
    CODECS["shuffle"] = ShuffleCodec  # from here on codec.name=shuffle is valid everywhere
    settings = ["codec.name=shuffle", "train.decay_steps=0", f"train.steps={steps}", f"run.dir={run_dir}"]
    build(latte.load_run("shapes-tiny", settings)[0]).train()
    pipe = latte.VideoPipeline.from_pretrained(run_dir)
    print(pipe(class_labels=["up"], seed=0).frames.shape)
