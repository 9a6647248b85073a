# SPDX-License-Identifier: Apache-2.0
"""I3D written plainly, one module per layer, with the public (capitalised) layer names.

Reference for the values and the speed of ``latte.evaluation.networks.i3d``. Shares no code with it.
Axes: b clip, c channels, t frames, h w size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def pad_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Zeros around t, h, w as TensorFlow's SAME has them: the odd one at the end."""
    amounts = []
    for axis in (2, 1, 0):
        n, k, s = x.shape[2 + axis], kernel[axis], stride[axis]
        outputs = -(-n // s)
        total = max((outputs - 1) * s + k - n, 0)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts)


class Unit(nn.Module):
    """Convolution without bias, norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel, self.stride))))


class Pool(nn.Module):
    """Maximum over a window, zeros outside."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, c: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int):
        super().__init__()
        self.b0 = Unit(c, b0, 1)
        self.b1a, self.b1b = Unit(c, b1a, 1), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(c, b2a, 1), Unit(b2a, b2b, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(c, b3b, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class Logits(nn.Module):
    """The last convolution, the only one with a bias."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv3d = nn.Conv3d(1024, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class PlainI3D(nn.Module):
    """(b 3 t h w) in [-1, 1] -> logits (b classes)."""

    def __init__(self, classes: int = 400):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.MaxPool3d_2a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1, self.Conv3d_2c_3x3 = Unit(64, 64, 1), Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        for name in ("Mixed_3b", "Mixed_3c"):
            self.add_module(name, Mixed(*MIXED[name]))
        self.MaxPool3d_4a_3x3 = Pool((3, 3, 3), (2, 2, 2))
        for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"):
            self.add_module(name, Mixed(*MIXED[name]))
        self.MaxPool3d_5a_2x2 = Pool((2, 2, 2), (2, 2, 2))
        for name in ("Mixed_5b", "Mixed_5c"):
            self.add_module(name, Mixed(*MIXED[name]))
        self.logits = Logits(classes)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            if name != "logits":
                x = layer(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits(x)[..., 0, 0].mean(2)


def wake_norms(network: nn.Module, seed: int) -> nn.Module:
    """Return ``network`` with weights that keep signals' size and norms that reveal a wrong eps."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=draw) * (high - low) + low)

    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1:
                reach = (3 * 2 / tensor[0].numel()) ** 0.5
                uniform(tensor, -reach, reach)
            elif name.endswith("running_var"):
                uniform(tensor, 0.02, 0.2)
            elif name.endswith((".bn.weight", ".batch3d.weight")):
                uniform(tensor, 0.2, 0.4)
            elif tensor.is_floating_point():
                uniform(tensor, -0.1, 0.1)
    return network.eval()


def names_of_hassony2(classes: int = 400) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the other public naming, which the TorchScript file has.

    Branches with their number inside.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def unit(name: str, c_in: int, c_out: int, kernel: int) -> None:
        shapes[f"{name}.conv3d.weight"] = (c_out, c_in, kernel, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.batch3d.{part}"] = (c_out,)
        shapes[f"{name}.batch3d.num_batches_tracked"] = ()

    unit("conv3d_1a_7x7", 3, 64, 7)
    unit("conv3d_2b_1x1", 64, 64, 1)
    unit("conv3d_2c_3x3", 64, 192, 3)
    for name, (c, b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
        unit(f"{name.lower()}.branch_0", c, b0, 1)
        unit(f"{name.lower()}.branch_1.0", c, b1a, 1)
        unit(f"{name.lower()}.branch_1.1", b1a, b1b, 3)
        unit(f"{name.lower()}.branch_2.0", c, b2a, 1)
        unit(f"{name.lower()}.branch_2.1", b2a, b2b, 3)
        unit(f"{name.lower()}.branch_3.1", c, b3b, 1)
    return shapes | {
        "conv3d_0c_1x1.conv3d.weight": (classes, 1024, 1, 1, 1),
        "conv3d_0c_1x1.conv3d.bias": (classes,),
    }


def tensorflow_variables(network: PlainI3D) -> dict[str, Tensor]:
    """The same weights as the TF-Hub graph stores them.

    Kernels (t h w in out), norm vectors (1 1 1 1 c), no gains.
    """
    variables: dict[str, Tensor] = {}
    branches = {
        "b0": "Branch_0/Conv3d_0a_1x1",
        "b1a": "Branch_1/Conv3d_0a_1x1",
        "b1b": "Branch_1/Conv3d_0b_3x3",
    }
    branches |= {
        "b2a": "Branch_2/Conv3d_0a_1x1",
        "b2b": "Branch_2/Conv3d_0b_3x3",
        "b3b": "Branch_3/Conv3d_0b_1x1",
    }
    for name, module in network.named_modules():
        if not isinstance(module, Unit):
            continue
        layer, _, branch = name.partition(".")
        path = f"{layer}/{branches[branch]}" if branch else layer
        if (layer, branch) == ("Mixed_5b", "b2b"):
            path = "Mixed_5b/Branch_2/Conv3d_0a_3x3"
        start = f"RGB/inception_i3d/{path}"
        variables[f"{start}/conv_3d/w:0"] = module.conv3d.weight.detach().permute(2, 3, 4, 1, 0)
        for tf, tensor in (
            ("beta", module.bn.bias),
            ("moving_mean", module.bn.running_mean),
            ("moving_variance", module.bn.running_var),
        ):
            variables[f"{start}/batch_norm/{tf}:0"] = tensor.detach().reshape(1, 1, 1, 1, -1)
    last = "RGB/inception_i3d/Logits/Conv3d_0c_1x1/conv_3d"
    variables[f"{last}/w:0"] = network.logits.conv3d.weight.detach().permute(2, 3, 4, 1, 0)
    variables[f"{last}/b:0"] = network.logits.conv3d.bias.detach()
    return variables
