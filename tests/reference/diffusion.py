# SPDX-License-Identifier: Apache-2.0
"""The diffusion written once more, slow and obvious.

Plain Python floats, one element at a time, no tables, nothing of ours imported.
"""

import math


def betas(schedule, num_steps):
    """The noise of each step, from the published formulas."""
    if schedule == "linear":
        first, last = 0.1 / num_steps, 20 / num_steps
        return [first + (last - first) * i / (num_steps - 1) for i in range(num_steps)]

    def level(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - level((i + 1) / num_steps) / level(i / num_steps), 0.999) for i in range(num_steps)]


def remaining(betas, t):
    """alphas_cumprod at t; before the first step, 1."""
    product = 1.0
    for beta in betas[: t + 1]:
        product *= 1 - beta
    return product


def bayes(betas, t, z0, zt, points=4001, width=12.0):
    """Mean and variance of q(z_t-1 | z_t, z_0): prior times likelihood, summed over a fine grid of z_t-1."""
    before = remaining(betas, t - 1)
    centre, spread = math.sqrt(before) * z0, math.sqrt(1 - before)
    mass = first = second = 0.0
    for i in range(points):
        z = centre + spread * width * (2 * i / (points - 1) - 1)
        prior = -((z - centre) ** 2) / (2 * spread**2)
        likelihood = -((zt - math.sqrt(1 - betas[t]) * z) ** 2) / (2 * betas[t])
        weight = math.exp(prior + likelihood)
        mass, first, second = mass + weight, first + weight * z, second + weight * z * z
    mean = first / mass
    return mean, second / mass - mean * mean


def _cdf(x):
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _bits_first(z0, mean, log_variance):
    """Bits of a bin of half-width 1/255 at z0 under N(mean, exp log_variance), open beyond 0.999."""
    deviation = math.exp(log_variance / 2)
    high, low = _cdf((z0 + 1 / 255 - mean) / deviation), _cdf((z0 - 1 / 255 - mean) / deviation)
    if z0 < -0.999:
        mass = high
    elif z0 > 0.999:
        mass = 1 - low
    else:
        mass = high - low
    return -math.log2(max(mass, 1e-12))


def _bits(mean, log_variance, model_mean, model_log_variance):
    """KL of two normals in bits."""
    ratio = math.exp(log_variance - model_log_variance)
    gap = (mean - model_mean) ** 2 / math.exp(model_log_variance)
    return 0.5 * (model_log_variance - log_variance - 1 + ratio + gap) / math.log(2)


def clip_loss(objective, betas, t, z0, eps, output, variance):
    """(total, mse, vlb) of one clip; output(zt) maps list to list; variance: list or None."""
    count = len(z0)
    level = remaining(betas, t)
    if objective == "rectified_flow":
        s = (t + 1) / len(betas)
        answer = output([(1 - s) * z0[i] + s * eps[i] for i in range(count)])
        mse = sum((answer[i] - (eps[i] - z0[i])) ** 2 for i in range(count)) / count
        return mse, mse, 0.0
    zt = [math.sqrt(level) * z0[i] + math.sqrt(1 - level) * eps[i] for i in range(count)]
    answer = output(zt)
    squares = bits = 0.0
    for i in range(count):
        if objective in ("v", "v_min_snr"):
            target = math.sqrt(level) * eps[i] - math.sqrt(1 - level) * z0[i]
            guess = math.sqrt(level) * zt[i] - math.sqrt(1 - level) * answer[i]
        elif objective == "z0":
            target = z0[i]
            guess = answer[i]
        else:
            target = eps[i]
            guess = (zt[i] - math.sqrt(1 - level) * answer[i]) / math.sqrt(level)
        squares += (answer[i] - target) ** 2
        if variance is not None:
            bits += _bound(betas, t, z0[i], zt[i], guess, variance[i])
    mse, vlb = squares / count, bits / count
    snr = level / (1 - level)
    weights = {
        "min_snr": min(snr, 5) / snr,
        "v_min_snr": min(snr, 5) / (snr + 1),
        "z0": 1 / max(math.sqrt(1 - level), 0.05) ** 2,
    }
    weight = weights.get(objective, 1.0)
    return weight * mse + vlb, mse, vlb


def _bound(betas, t, z0, zt, guess, v):
    before, level, beta = remaining(betas, t - 1), remaining(betas, t), betas[t]

    def small(k):
        return betas[k] * (1 - remaining(betas, k - 1)) / (1 - remaining(betas, k))

    def mean(z):
        return (math.sqrt(before) * beta * z + math.sqrt(1 - beta) * (1 - before) * zt) / (1 - level)

    low = math.log(small(max(t, 1)))
    model = low + (math.log(beta) - low) * (v + 1) / 2
    if t == 0:
        return _bits_first(z0, mean(guess), model)
    return _bits(mean(z0), low, mean(guess), model)
