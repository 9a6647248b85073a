# SPDX-License-Identifier: Apache-2.0
"""A class-conditional Latte organised as the released code is, with the weights of one of ours.

What differs from the package: the condition is repeated and modulated for every frame and every position;
tokens are rearranged between spatial and temporal blocks; attention is written out with its matrix; norm,
modulation and gate are operations of their own. It computes the same function, variant 1 alone.
Axes: b clips, f frames, n tokens of a frame, s sequences, l their length, d width, h heads, k head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.model.latte import Latte
from latte.model.positions import spatial_table, temporal_table


class PlainBlock(nn.Module):
    """A DiT block over sequences; the weights are those of one of our blocks."""

    def __init__(self, block: nn.Module, heads: int):
        super().__init__()
        branches: Any = block.branches
        attention, mlp = branches.values()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2
        modulation: Any = block.modulation
        self.modulation = modulation.linear
        self.norm1 = nn.LayerNorm(self.proj.out_features, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(self.proj.out_features, eps=1e-6, elementwise_affine=False)
        self.heads = heads

    def attention(self, x: Tensor) -> Tensor:
        """Return (s l d) of (s l d)."""
        s, length, d = x.shape
        qkv = self.qkv(x).reshape(s, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (s h l k)
        scores = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5
        y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(s, length, d)
        return self.proj(y)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return tokens (s l d) of tokens (s l d) and a condition for each sequence (s d)."""
        chunks = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = chunks  # each (s 1 d)
        x = x + gate * self.attention(self.norm1(x) * (1 + scale) + shift)
        y = self.fc1(self.norm2(x) * (1 + mlp_scale) + mlp_shift)
        return x + mlp_gate * self.fc2(F.gelu(y, approximate="tanh"))


class PlainLatte(nn.Module):
    """``PlainLatte(model)(z, t, label)`` is ``model(z, t, label)`` to rounding."""

    def __init__(self, model: Latte):
        super().__init__()
        config = model.config
        assert config.variant in (1, "1", "interleaved")
        assert config.conditioning == "s_adaln"
        self.model = model
        self.blocks = nn.ModuleList(PlainBlock(block, config.dimensions[2]) for block in model.blocks)

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return (b f o h w) of noisy latents (b f c h w), timesteps (b,) and labels (b,)."""
        ours: Any = self.model
        b, f, _, h, w = z.shape
        p = ours.config.patch_size
        x = ours.patch.proj(z.flatten(0, 1)).flatten(2).transpose(1, 2)  # (bf n d)
        n, d = x.shape[1:]
        x = x + spatial_table(h // p, w // p, d).to(x)
        c = ours.time_embedding(t) + ours.label_embedding(label)  # (b d)
        frames_c = c.repeat_interleave(f, dim=0)  # (bf d)
        positions_c = c.repeat_interleave(n, dim=0)  # (bn d)
        for index, block in enumerate(self.blocks):
            if index % 2 == 0:
                x = block(x, frames_c)
                continue
            x = x.reshape(b, f, n, d).permute(0, 2, 1, 3).reshape(b * n, f, d)  # (bn f d)
            if index == 1:
                x = x + temporal_table(f, d).to(x)
            x = block(x, positions_c)
            x = x.reshape(b, n, f, d).permute(0, 2, 1, 3).reshape(b * f, n, d)  # (bf n d)
        shift, scale = ours.final_modulation.linear(F.silu(frames_c)).unsqueeze(1).chunk(2, dim=-1)
        x = ours.final_linear(ours.final_norm(x) * (1 + scale) + shift)  # (bf n ppo)
        x = x.reshape(b * f, h // p, w // p, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(b, f, -1, h, w)
