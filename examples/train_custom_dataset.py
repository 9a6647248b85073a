# SPDX-License-Identifier: Apache-2.0
"""Train on your own dataset, then generate clips: examples/train_custom_dataset.py [STEPS] [RUN_DIR]."""

import sys

import numpy as np
import torch

import latte


class MovingSquares(torch.utils.data.Dataset):
    """Clips uint8 (frames, height, width, 3) of a square that moves left (class 0) or right (class 1)."""

    classes = ("left", "right")

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label = index % 2
        row = index // 2 % 24
        video = np.zeros((8, 32, 32, 3), np.uint8)
        for frame in range(8):
            column = 12 + 2 * (2 * label - 1) * (frame - 4)
            video[frame, row : row + 8, column : column + 8] = (255, 200, 0)
        return video, label


if __name__ == "__main__":
    steps, run_dir = (*sys.argv[1:], *("400", "runs/squares")[len(sys.argv) - 1 :])
    codec = latte.build_codec(latte.CodecConfig(name="builtin"))
    config = latte.TrainConfig(steps=int(steps), global_batch=16, lr=1e-3, ema_decay=0.98, clip_norm=1.0)
    sizes = {"num_frames": 8, "latent_size": 4, "latent_channels": codec.channels}  # of 32 x 32 pixels
    model = latte.Latte(latte.ModelConfig(depth=4, width=96, heads=4, num_classes=2, **sizes))
    latte.train(model=model, dataset=MovingSquares(), codec=codec, config=config, run_dir=run_dir)
    pipe = latte.VideoPipeline.from_pretrained(run_dir)
    videos = pipe(class_labels=["left", "right"], num_inference_steps=50, seed=0, output_type="uint8").frames
    latte.export_to_video(videos[0], f"{run_dir}/left.mp4", fps=8)
    print(f"{videos.dtype} {videos.shape}")
