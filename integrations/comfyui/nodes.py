# SPDX-License-Identifier: Apache-2.0
"""Load, sample and save: Latte's pipeline as three nodes.

Frames travel as ComfyUI's IMAGE, a float tensor (t h w c) in [0, 1], so that its own nodes work on them.
"""

from pathlib import Path

import numpy as np
import torch

import latte

QUALITIES = ("model", "fast", "high", "paper")
CATEGORY = "latte"


class LatteLoad:
    """Load a model of the package, a run folder, a weights folder or a hub id."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("LATTE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """Return the inputs that ComfyUI shows."""
        return {
            "required": {
                "model": ("STRING", {"default": "builtin"}),
                "device": (("auto", "cuda", "cpu", "mps"),),
                "dtype": (("auto", "fp32", "bf16", "fp16"),),
                "offload": ("BOOLEAN", {"default": False}),
            }
        }

    def load(self, model: str, device: str, dtype: str, offload: bool) -> tuple[latte.VideoPipeline]:
        """Return the pipeline."""
        return (latte.VideoPipeline.from_pretrained(model, device=device, dtype=dtype, offload=offload),)


class LatteSample:
    """Generate one clip from a sentence or a class name. ``steps`` and ``guidance`` 0 are the model's own."""

    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("frames", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """Return the inputs that ComfyUI shows."""
        return {
            "required": {
                "pipe": ("LATTE",),
                "text": ("STRING", {"multiline": True, "default": "a purple cube rotates left"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1}),
                "quality": (QUALITIES,),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 50.0, "step": 0.5}),
            },
            "optional": {
                "negative": ("STRING", {"multiline": True, "default": ""}),
                "first_frame": ("IMAGE",),
            },
        }

    def sample(
        self,
        pipe: latte.VideoPipeline,
        text: str,
        seed: int,
        quality: str,
        steps: int,
        guidance: float,
        negative: str = "",
        first_frame: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Return frames, float32 (t h w c) in [0, 1], and their rate."""
        options: dict = {"num_inference_steps": steps or None, "guidance_scale": guidance or None}
        if quality != "model":
            options["quality"] = quality
        if pipe.reader:
            options |= {"prompt": text, "negative_prompt": negative or None}
        elif text.strip():
            options["class_labels"] = text.strip()
        if first_frame is not None:
            options["image"] = to_uint8(first_frame)[0]
        frames = pipe(seed=seed, output_type="uint8", **options).frames[0]  # uint8 (t h w c)
        return torch.from_numpy(np.ascontiguousarray(frames)).float() / 255, float(pipe.sample.fps)


class LatteSave:
    """Write frames as an mp4 under ``path``, which gets a number: clip-0001.mp4."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """Return the inputs that ComfyUI shows."""
        return {
            "required": {
                "frames": ("IMAGE",),
                "fps": ("FLOAT", {"default": 8.0, "min": 1.0, "max": 240.0}),
                "path": ("STRING", {"default": "clip"}),
            }
        }

    def save(self, frames: torch.Tensor, fps: float, path: str) -> dict:
        """Write the file and return its name."""
        folder = output_folder().resolve()
        base = (folder / path).resolve()
        if not base.is_relative_to(folder) or base == folder:
            raise latte.InputError(f"path is {path!r}, which is not a name inside {folder}; give e.g. clip")
        taken = {file.name for file in base.parent.glob("*.mp4")}
        number = next(n for n in range(1, len(taken) + 2) if f"{base.name}-{n:04d}.mp4" not in taken)
        file = base.with_name(f"{base.name}-{number:04d}.mp4")
        latte.export_to_video(to_uint8(frames), str(file), fps=fps)
        return {"ui": {"text": [str(file)]}, "result": (str(file),)}


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Return float frames (t h w c) in [0, 1] as uint8."""
    return (frames.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def output_folder() -> Path:
    """Return ComfyUI's folder for outputs, or the current folder outside ComfyUI."""
    try:
        import folder_paths  # a module of ComfyUI
    except ImportError:
        return Path.cwd()
    return Path(folder_paths.get_output_directory())


NODE_CLASS_MAPPINGS = {"LatteLoad": LatteLoad, "LatteSample": LatteSample, "LatteSave": LatteSave}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LatteLoad": "Latte: load model",
    "LatteSample": "Latte: generate clip",
    "LatteSave": "Latte: save mp4",
}
