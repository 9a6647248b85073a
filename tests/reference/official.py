# SPDX-License-Identifier: Apache-2.0
"""The released Latte in plain float64, from a state dict with its names and stored tables.

Written from the description of the layout; shares no code with the package.
"""

import math

import torch


def linear(w, name, x):
    return x @ w[f"{name}.weight"].double().T + w[f"{name}.bias"].double()


def normed(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(x):
    return x * torch.sigmoid(x)


def block(w, name, x, c, heads):
    """x (s l d): a DiT block over l; c (s d)."""
    shift, scale, gate, shift2, scale2, gate2 = linear(w, f"{name}.adaLN_modulation.1", silu(c))[
        :, None
    ].chunk(6, dim=-1)
    s, l, d = x.shape
    qkv = linear(w, f"{name}.attn.qkv", normed(x) * (1 + scale) + shift).reshape(s, l, 3, heads, d // heads)
    q, k, v = (qkv[:, :, part].transpose(1, 2) for part in range(3))
    y = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d // heads), -1) @ v
    x = x + gate * linear(w, f"{name}.attn.proj", y.transpose(1, 2).reshape(s, l, d))
    y = linear(w, f"{name}.mlp.fc1", normed(x) * (1 + scale2) + shift2)
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return x + gate2 * linear(w, f"{name}.mlp.fc2", y)


def released_latte(w, z, t, heads, label=None, picture=False):
    """z (b f c h w), t (b,), label (b,) -> (b f o h w), float64; ``picture``: a DiT."""
    b, f, _, height, width = z.shape
    d, _, p, _ = w["x_embedder.proj.weight"].shape
    patches = torch.nn.functional.unfold(z.double().flatten(0, 1), p, stride=p).transpose(1, 2)  # (bf n cpp)
    x = (
        patches @ w["x_embedder.proj.weight"].double().flatten(1).T
        + w["x_embedder.proj.bias"].double()
        + w["pos_embed"].double()
    )
    angle = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    c = linear(
        w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1)))
    )
    if label is not None:
        c = c + w["y_embedder.embedding_table.weight"].double()[label]
    n, depth = x.shape[1], len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    for k in range(depth):
        if k % 2 == 0 or picture:
            x = block(w, f"blocks.{k}", x, c.repeat_interleave(f, 0), heads)
        else:
            x = x.reshape(b, f, n, d).transpose(1, 2).reshape(b * n, f, d)
            x = x + w["temp_embed"].double() if k == 1 else x
            x = block(w, f"blocks.{k}", x, c.repeat_interleave(n, 0), heads)
            x = x.reshape(b, n, f, d).transpose(1, 2).reshape(b * f, n, d)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(c.repeat_interleave(f, 0)))[
        :, None
    ].chunk(2, dim=-1)
    x = linear(w, "final_layer.linear", normed(x) * (1 + scale) + shift)
    rows, columns = height // p, width // p
    x = x.reshape(b, f, rows, columns, p, p, -1).permute(0, 1, 6, 2, 4, 3, 5)
    return x.reshape(b, f, -1, height, width)


def sincos(positions, width):
    angle = positions[:, None] / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angle.sin(), angle.cos()], 1)


def released_state(
    depth=4, width=32, side=8, frames=4, channels=4, patch=2, classes=None, sigma=True, seed=0
):
    """A state dict in the released layout with random weights.

    ``classes`` adds a label table with a null class.
    """
    draw = torch.Generator().manual_seed(seed)

    def pair(name, rows, columns):
        return {
            f"{name}.weight": 0.1 * torch.randn(rows, columns, generator=draw),
            f"{name}.bias": 0.1 * torch.randn(rows, generator=draw),
        }

    grid = torch.arange(side // patch, dtype=torch.float64)
    rows, columns = grid.repeat_interleave(len(grid)), grid.repeat(len(grid))
    state = {
        "pos_embed": torch.cat([sincos(columns, width // 2), sincos(rows, width // 2)], 1)[None].float(),
        "temp_embed": sincos(torch.arange(frames, dtype=torch.float64), width)[None].float(),
    }
    state |= pair("x_embedder.proj", width, channels * patch * patch)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].reshape(width, channels, patch, patch)
    state |= pair("t_embedder.mlp.0", width, 256) | pair("t_embedder.mlp.2", width, width)
    if classes is not None:
        state["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=draw)
    for k in range(depth):
        sizes = {
            "attn.qkv": (3, 1),
            "attn.proj": (1, 1),
            "mlp.fc1": (4, 1),
            "mlp.fc2": (1, 4),
            "adaLN_modulation.1": (6, 1),
        }
        for part, (out, into) in sizes.items():
            state |= pair(f"blocks.{k}.{part}", out * width, into * width)
    state |= pair("final_layer.linear", patch * patch * channels * (2 if sigma else 1), width)
    return state | pair("final_layer.adaLN_modulation.1", 2 * width, width)


def dit_state(**sizes):
    """A state dict in DiT's layout: one picture, a label table of 1000 classes and the null one."""
    state = released_state(**{"classes": 1000, **sizes})
    del state["temp_embed"]
    return state
