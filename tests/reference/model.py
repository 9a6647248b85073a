# SPDX-License-Identifier: Apache-2.0
"""Latte in slow, obvious float64 loops: one frame, one position, one head, one patch at a time.

It reads the weights by name and shares no code with the package.
"""

import math

import torch

BRANCHES = {1: None, 2: None, 3: ("space", "time", "mlp"), 4: ("both", "mlp"), "joint": ("joint", "mlp")}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return y * w[f"{name}.weight"] + w[f"{name}.bias"] if f"{name}.weight" in w else y


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sincos(position, width):
    out = torch.zeros(width, dtype=torch.float64)
    for i in range(width // 2):
        angle = position / 10000 ** (i / (width / 2))
        out[i], out[width // 2 + i] = math.sin(angle), math.cos(angle)
    return out


def rotate(x, position):
    """One head vector, channel j turned with channel j + k/2."""
    k, y = len(x), x.clone()
    for j in range(k // 2):
        angle = position / 10000 ** (2 * j / k)
        y[j] = x[j] * math.cos(angle) - x[j + k // 2] * math.sin(angle)
        y[j + k // 2] = x[j + k // 2] * math.cos(angle) + x[j] * math.sin(angle)
    return y


def attention(w, name, x, heads, positions=None):
    """x (l, d): self-attention over l; ``positions`` turn queries and keys when given."""
    l, d = x.shape
    k = d // heads
    qkv = linear(w, f"{name}.qkv", x)
    out = torch.zeros_like(x)
    for h in range(heads):
        q, key, v = (qkv[:, part * d + h * k : part * d + (h + 1) * k] for part in range(3))
        if positions is not None:
            q = torch.stack([rotate(row, p) for row, p in zip(q, positions, strict=True)])
            key = torch.stack([rotate(row, p) for row, p in zip(key, positions, strict=True)])
        for i in range(l):
            score = torch.exp(torch.stack([(q[i] * key[j]).sum() for j in range(l)]) / math.sqrt(k))
            out[i, h * k : (h + 1) * k] = sum(score[j] / score.sum() * v[j] for j in range(l))
    return linear(w, f"{name}.proj", out)


def over_space(w, name, x, heads):
    return torch.stack([attention(w, name, frame, heads) for frame in x])


def over_time(w, name, x, heads, rotary):
    positions = range(x.shape[0]) if rotary else None
    return torch.stack([attention(w, name, x[:, n], heads, positions) for n in range(x.shape[1])], dim=1)


def branch(w, name, kind, x, frames, heads, rotary):
    """x (f+i n d) -> the branch's output; for time, images get nothing."""
    if kind == "mlp":
        return linear(w, f"{name}.fc2", gelu(linear(w, f"{name}.fc1", x)))
    if kind == "space":
        return over_space(w, name, x, heads)
    out = torch.zeros_like(x)
    if kind == "time":
        out[:frames] = over_time(w, name, x[:frames], heads, rotary)
    elif kind == "both":
        out = over_space(w, f"{name}.space", x, heads // 2)
        out[:frames] = out[:frames] + over_time(w, f"{name}.time", x[:frames], heads // 2, rotary)
    else:
        n = x.shape[1]
        flat = x[:frames].reshape(frames * n, -1)
        positions = [f for f in range(frames) for _ in range(n)] if rotary else None
        out[:frames] = attention(w, name, flat, heads, positions).reshape(frames, n, -1)
        out[frames:] = over_space(w, name, x[frames:], heads) if len(x) > frames else 0
    return out


def block(w, index, kinds, x, c, frames, heads, rotary, video_only):
    """c: one condition vector for every frame of x."""
    base = f"blocks.{index}"
    active = frames if video_only else len(x)
    x = x.clone()
    plain = f"{base}.modulation.linear.weight" not in w
    six = (
        None if plain else torch.stack([linear(w, f"{base}.modulation.linear", silu(v)) for v in c[:active]])
    )
    d = x.shape[-1]
    for kind in kinds:
        reach = frames if kind == "time" else active
        y = norm(w, f"{base}.norms.{kind}", x[:active])
        start = 3 * d if kind == "mlp" else 0
        if not plain:
            shift, scale, gate = (
                six[:, None, start + part * d : start + (part + 1) * d] for part in range(3)
            )
            y = y * (1 + scale) + shift
        out = branch(w, f"{base}.branches.{kind}", kind, y, frames, heads, rotary)
        out = out if plain else gate * out
        x[:reach] = x[:reach] + out[:reach]
    return x


def latte(config, weights, z, t, labels, num_images=0):
    """z (f+i c h w), t a number, labels a list of 1 + i (or None) -> (f+i o h w), float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    depth, d, heads = config.dimensions
    p, s = config.patch_size, config.tube if config.patch == "compression" else 1
    rows, columns = z.shape[2] // p, z.shape[3] // p
    frames = z.shape[1 - 1] - num_images
    tubes = [z[i * s : (i + 1) * s] for i in range(frames // s)] + [
        z[frames + i].expand(s, -1, -1, -1) for i in range(num_images)
    ]
    kernel = w["patch.proj.weight"].reshape(d, config.latent_channels, s, p, p)
    x = torch.zeros(len(tubes), rows * columns, d, dtype=torch.float64)
    for f, tube in enumerate(tubes):
        for r in range(rows):
            for q in range(columns):
                patch = tube[:, :, r * p : (r + 1) * p, q * p : (q + 1) * p].transpose(0, 1)
                place = torch.cat([sincos(q, d // 2), sincos(r, d // 2)])
                x[f, r * columns + q] = (kernel * patch).sum((1, 2, 3, 4)) + w["patch.proj.bias"] + place
    frames //= s
    angles = [t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    features = torch.tensor([g(angle) for g in (math.cos, math.sin) for angle in angles], dtype=torch.float64)
    base = linear(w, "time_embedding.fc2", silu(linear(w, "time_embedding.fc1", features)))
    table = w.get("label_embedding.table.weight")
    rows_of_c = [base if table is None else base + table[label] for label in (labels or [None])]
    c = [rows_of_c[0]] * frames + [
        rows_of_c[1 + i] if len(rows_of_c) > 1 else rows_of_c[0] for i in range(num_images)
    ]
    if config.conditioning == "all_tokens":
        x = torch.cat([x, torch.stack(c)[:, None]], dim=1)
    rotary = config.temporal_position == "rotary"
    enters = {1: 1, 2: depth // 2}.get(config.variant, 0)
    for index in range(depth):
        if index == enters and not rotary:
            for f in range(frames):
                x[f] = x[f] + sincos(f, d)
        spatial = {1: index % 2 == 0, 2: index < depth // 2}.get(config.variant)
        kinds = BRANCHES[config.variant] or (("space", "mlp") if spatial else ("time", "mlp"))
        x = block(w, index, kinds, x, c, frames, heads, rotary, video_only=spatial is False)
    x = norm(w, "final_norm", x[:, : rows * columns])
    if "final_modulation.linear.weight" in w:
        two = torch.stack([linear(w, "final_modulation.linear", silu(v)) for v in c])[:, None]
        x = x * (1 + two[..., d:]) + two[..., :d]
    x = linear(w, "final_linear", x)
    o = config.latent_channels * (2 if config.learn_sigma else 1)
    image = torch.zeros(len(x), o, rows * p, columns * p, dtype=torch.float64)
    for r in range(rows):
        for q in range(columns):
            image[:, :, r * p : (r + 1) * p, q * p : (q + 1) * p] = (
                x[:, r * columns + q].reshape(-1, p, p, o).permute(0, 3, 1, 2)
            )
    if s == 1:
        return image
    expanded = [
        torch.einsum("ihw,io->ohw", one, w["patch.expand.weight"][:, :, k, 0, 0])
        + w["patch.expand.bias"][:, None, None]
        for one in image
        for k in range(s)
    ]
    images = [
        torch.stack(expanded[(frames + i) * s : (frames + i + 1) * s]).mean(0) for i in range(num_images)
    ]
    return torch.stack(expanded[: frames * s] + images)
