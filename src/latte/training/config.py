# SPDX-License-Identifier: Apache-2.0
"""How a model is trained: the settings, and the learning rate and time gate that follow from them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from latte.checks import InputError, check, check_name
from latte.diffusion.config import TIMES
from latte.interop.config import MAPPINGS, Start
from latte.runtime import DEFAULT_TIMEOUT, FASTEST
from latte.tables import Later, Table

if TYPE_CHECKING:
    from latte.training.optim import OptimizerKind
    from latte.training.parallel import Parallelism
    from latte.training.trackers import Writer

CHECKPOINTING = (False, True, "pairs")
# fp16 gradients underflow without loss scaling, so fp16 is not among them.
TRAINING_DTYPES = ("auto", FASTEST, "fp32", "bf16")
OPTIMIZERS: Table[str, "OptimizerKind"] = Table(
    {
        "adamw": Later("latte.training.optim:ADAMW", "AdamW, as in the paper"),
        "adafactor": Later("latte.training.optim:ADAFACTOR", "Adafactor: almost no optimizer state"),
        "muon": Later("latte.training.optim:MUON", "Muon on matrices of blocks, AdamW on the rest"),
        "muon_no_adaln": Later(
            "latte.training.optim:MUON_NO_ADALN", "Muon, with modulation layers left to AdamW: shorter steps"
        ),
    }
)
PARALLELISMS: Table[str, type["Parallelism"]] = Table(
    {
        "ddp": Later("latte.training.parallel:Replicated", "every process has a whole copy"),
        "fsdp": Later("latte.training.sharded:Sharded", "weights and states split over all processes"),
        "hsdp": Later("latte.training.sharded:HybridSharded", "split within a machine, copied across"),
    }
)
TRACKERS: Table[str, type["Writer"]] = Table(
    {
        "tensorboard": Later(
            "latte.training.trackers:TensorBoard", "event files in tensorboard/ of the run folder"
        ),
        "wandb": Later("latte.training.trackers:WeightsAndBiases", "Weights & Biases"),
        "trackio": Later("latte.training.trackers:Trackio", "Trackio, stored on this machine"),
    }
)

MAX_LAYER_SYNC = 10.0  # and of the alignment with the codec
MAX_ROUTE = 0.9
BETWEEN_BLOCKS = ("layer_sync", "codec_align", "route")
SMALLEST_WIDTH = 0.001  # of EMA weights, relative to the steps of training
LARGEST_WIDTH = 0.28

# Settings that may change when a run is resumed, with a notice.
CHANGEABLE = (
    "lr",
    "weight_decay",
    "warmup_steps",
    "decay_steps",
    "ema_decay",
    "ema_warmup",
    "clip_norm",
    "clip_start",
)

BEST_BY = {"loss": "validate_every", "score": "score_every"}  # value of keep_best -> what measures it
# Those that a checkpoint only records when they are not at their default, which versions without them had.
RECORDED_IF_CHANGED = (*BETWEEN_BLOCKS, "timesteps", "timestep_shift", "frame_noise")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; InputError on construction for a value out of range.

    A resumed run must keep ``global_batch`` and ``optimizer``. The settings in CHANGEABLE,
    RECORDED_IF_CHANGED and ``gate_steps`` may change, with a notice; everything else is free.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    steps: int = 150_000  # optimizer steps; at 150000 the paper's curves end
    global_batch: int = 8  # clips per step, over all processes
    micro_batch: int | None = None  # clips per forward pass in one process; null: its whole share
    optimizer: str = "adamw"  # adamw, adafactor, muon or muon_no_adaln
    lr: float = 1e-4  # peak learning rate, constant between warm-up and decay
    weight_decay: float = 0.0  # decoupled, as in AdamW
    warmup_steps: int = 0  # first steps, over which the learning rate rises from 0
    decay_steps: int = 0  # the last steps, over which the learning rate falls to 0; the paper's is constant
    ema_decay: float = 0.9999  # decay of the EMA weights per step, in [0, 1)
    ema_widths: tuple[float, ...] = ()  # more EMA weights, by relative width (EDM2), for latte sample --ema
    ema_warmup: bool = False  # a smaller decay first, so that early samples do not come from initial weights
    clip_norm: float | None = 0.1  # largest norm of the gradients; null: it is only measured
    clip_start: int = 0  # steps before clipping begins
    gate_steps: int = 1000  # with text.gated_time: the step at which the position table has full effect
    num_images: int = 0  # images behind every clip (joint training, Sec. 3.3.4)
    layer_sync: float = 0.0  # weight of LayerSync: an early block's tokens follow a deeper one's; 0: off
    codec_align: float = 0.0  # weight of the alignment of early tokens with the clean latent (SRA 2); 0: off
    route: float = 0.0  # share of a frame's tokens that pass by the middle half of the blocks (TREAD); 0: off
    timesteps: str = "uniform"  # distribution of the noise level in training: uniform or logit_normal
    timestep_shift: float = 1.0  # above 1: more noise, for clips of many tokens (Esser et al. 2024, eq. 23)
    frame_noise: float = 0.0  # share of the clips whose frames have one of two noise levels each
    dtype: str = "auto"  # precision; auto: bf16 on a GPU that has it, else fp32; fastest: measured
    compile: bool = False  # torch.compile every block
    recompute: bool = False  # recompute norms, modulation, GELU and gates in backward: half the activations
    gradient_checkpointing: bool | str = (
        False  # keep only the inputs of blocks (true) or of pairs of blocks (pairs), recompute the rest
    )
    init: str | None = None  # pretrained weights (file, folder, hub id, run or builtin) of a fresh run
    init_mapping: str = "all"  # for a DiT: which of our blocks its blocks initialise
    init_gaps: tuple[str, ...] = ()  # patterns of our names that may be missing in init or have another shape
    checkpoint_every: int = 10_000  # steps between checkpoints; the last step always has one
    keep_last: int = 3  # checkpoints kept, the newest ones
    async_save: bool = False  # write checkpoints while training goes on, from a copy in main memory
    mirror: str | None = (
        None  # URL of a remote folder to which checkpoints are copied, and from which to resume
    )
    sample_every: int = 0  # steps between samples during training; 0: none
    validate_every: int = 0  # steps between measurements of the loss on clips of data.hold_out; 0: none
    validate_clips: int = 64  # held-out clips that it is measured on, at most
    score_every: int = 0  # steps between scores of generated clips; 0: none
    score_protocol: str = "builtin"  # protocol of these scores, see latte config list protocols
    score_clips: int | None = None  # clips per side; null: as many as the protocol takes
    keep_best: str | None = None  # loss or score: by which the best checkpoint is kept beside the newest
    log_every: int = 50  # steps between lines of metrics.jsonl and of the log
    trackers: tuple[str, ...] = ()  # tensorboard, wandb or trackio, which get metrics and samples
    report: bool = True  # write report.html into the run folder as the run goes
    parallel: str = "ddp"  # how processes share the model: ddp copies it, fsdp and hsdp split it
    shard_size: int | None = None  # with hsdp: processes that share one copy; null: those of a machine
    sequence_parallel: int = 1  # processes that share the frames and tokens of each clip
    cpu_offload: bool = False  # with fsdp or hsdp: keep weights and optimizer state in main memory
    timeout: float = DEFAULT_TIMEOUT  # seconds to wait for another process, checkpoints and samples excluded

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "global_batch",
            "gate_steps",
            "checkpoint_every",
            "keep_last",
            "validate_clips",
            "log_every",
            "sequence_parallel",
        ):
            value = getattr(self, name)
            check(value >= 1, f"train.{name} is {value}, but it must be at least 1")
        for name in (
            "weight_decay",
            "warmup_steps",
            "decay_steps",
            "clip_start",
            "num_images",
            "sample_every",
            "validate_every",
            "score_every",
        ):
            value = getattr(self, name)
            check(value >= 0, f"train.{name} is {value}, but it must be at least 0")
        check(
            self.micro_batch is None or self.micro_batch >= 1,
            f"train.micro_batch is {self.micro_batch}, but it must be at least 1, or null for the whole "
            "batch at once",
        )
        check(
            0 < self.lr < float("inf"),
            f"train.lr is {self.lr}, but it must be positive and finite; give a learning rate such as 1e-4",
        )
        check(
            0 <= self.ema_decay < 1,
            f"train.ema_decay is {self.ema_decay}, but it must be in [0, 1); give a decay such as 0.9999",
        )
        check(
            self.clip_norm is None or self.clip_norm > 0,
            f"train.clip_norm is {self.clip_norm}, but it must be positive, or null for no clipping",
        )
        check(
            self.init != "",
            "train.init is '', but it must name weights: a file, a folder or a hub id, or null",
        )
        self._check_best()
        self._check_options()
        check_name("train.timesteps", self.timesteps, TIMES)
        check_name("train.optimizer", self.optimizer, OPTIMIZERS)
        check_name("train.dtype", self.dtype, TRAINING_DTYPES)
        check_name("train.init_mapping", self.init_mapping, MAPPINGS)
        for name in self.trackers:
            check_name("train.trackers", name, TRACKERS)
        for name in ("init_gaps", "trackers", "ema_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON and YAML have lists

    def _check_best(self) -> None:
        """InputError for a best checkpoint by something that is not measured."""
        if self.keep_best is None:
            return
        check_name("train.keep_best", self.keep_best, BEST_BY)
        every = BEST_BY[self.keep_best]
        check(
            getattr(self, every) > 0,
            f"train.keep_best is {self.keep_best}, which is never measured; set "
            f"train.{every}, or leave it out",
        )

    def _check_options(self) -> None:
        """InputError for values of noise levels, LayerSync and checkpointing that are out of range or exclude
        each other.
        """
        check_name("train.gradient_checkpointing", self.gradient_checkpointing, CHECKPOINTING)
        self._check_parallel()
        self._check_between_blocks()
        for width in self.ema_widths:
            check(
                SMALLEST_WIDTH <= width <= LARGEST_WIDTH and self.ema_widths.count(width) == 1,
                f"train.ema_widths is {', '.join(map(str, self.ema_widths))}, but each must be in "
                f"[{SMALLEST_WIDTH}, {LARGEST_WIDTH}] and stand once; give e.g. 0.05,0.1",
            )
        check(
            0 < self.timestep_shift < float("inf"),
            f"train.timestep_shift is {self.timestep_shift}, but it must be positive and finite; 1 shifts "
            "nothing",
        )
        check(
            0 <= self.frame_noise <= 1,
            f"train.frame_noise is {self.frame_noise}, a fraction of the clips, but it must be in [0, 1]",
        )
        check(
            not (self.frame_noise and self.num_images),
            f"train.frame_noise is {self.frame_noise} and train.num_images is {self.num_images}, but images "
            "have the noise level of their clip; set one of both to 0",
        )

    def _check_between_blocks(self) -> None:
        """InputError for values out of range of what acts between blocks, and what excludes it."""
        for name in ("layer_sync", "codec_align"):
            value = getattr(self, name)
            check(
                0 <= value <= MAX_LAYER_SYNC,
                f"train.{name} is {value}, but it must be in [0, {MAX_LAYER_SYNC:g}]; give a "
                "weight such as 0.2, or 0 for none",
            )
        check(
            0 <= self.route <= MAX_ROUTE,
            f"train.route is {self.route}, a fraction of the tokens, but it must be in [0, {MAX_ROUTE}]",
        )
        chosen = [name for name in BETWEEN_BLOCKS if getattr(self, name)]
        check(
            not (chosen and self.compile),
            f"train.{' and train.'.join(chosen)} needs the tokens between blocks, which train.compile hides; "
            "turn one off",
        )
        if self.route:
            with_it = {"gradient_checkpointing": self.gradient_checkpointing, "num_images": self.num_images}
            with_it |= {name: getattr(self, name) for name in ("layer_sync", "codec_align")}
            for name, value in with_it.items():
                check(
                    not value,
                    f"train.route takes tokens around blocks, which does not go with train.{name}={value}; "
                    "turn one off",
                )

    def _check_parallel(self) -> None:
        """InputError for settings of a parallelism that is not chosen."""
        check(
            self.mirror is None or "://" in self.mirror,
            f"train.mirror is {self.mirror!r}, but it must be a URL such as s3://bucket/runs/name, or null",
        )
        check(
            0 < self.timeout < float("inf"),
            f"train.timeout is {self.timeout}, but it must be a positive number of seconds, such as 300",
        )
        check_name("train.parallel", self.parallel, PARALLELISMS)
        size = self.shard_size
        check(
            size is None or (size >= 1 and self.parallel == "hsdp"),
            f"train.shard_size is {size} and train.parallel is {self.parallel}, but it must be at least 1, "
            "for hsdp only; leave it out",
        )
        check(
            not (self.cpu_offload and self.parallel == "ddp"),
            "train.cpu_offload is for train.parallel=fsdp or hsdp; leave it out, or give one of them",
        )
        hidden = [f"train.{name}" for name in (*BETWEEN_BLOCKS, "compile") if getattr(self, name)]
        check(
            self.sequence_parallel == 1 or not hidden,
            f"train.sequence_parallel is {self.sequence_parallel}: no process has all tokens of a clip, "
            f"which {' and '.join(hidden)} does not support; turn one off",
        )

    def shares(self, processes: int) -> int:
        """Return in how many shares ``processes`` divide a batch; InputError when clips cannot be shared."""
        size = self.sequence_parallel
        check(
            processes % size == 0,
            f"train.sequence_parallel is {size}, but the number of processes is {processes}; start a "
            f"multiple of {size}, or give another number",
        )
        return processes // size

    def changeable(self) -> dict[str, Any]:
        """Return the settings that a checkpoint records and that may change when the run is resumed."""
        found = {name: getattr(self, name) for name in CHANGEABLE}
        for name in RECORDED_IF_CHANGED:
            value = getattr(self, name)
            if value != getattr(TrainConfig, name):
                found[name] = value
        return found

    @property
    def depends_on_network(self) -> bool:
        """Whether a setting needs a check against the model."""
        return any(getattr(self, name) for name in (*BETWEEN_BLOCKS, "frame_noise"))

    @property
    def start(self) -> Start | None:
        """The pretrained weights that a fresh run starts from; None for random weights."""
        if self.init is None:
            return None
        return Start(self.init, self.init_mapping, self.init_gaps)


def learning_rate(step: int, lr: float, warmup_steps: int, decay_steps: int = 0, steps: int = 0) -> float:
    """Return the learning rate of step 1, 2, ... of ``steps``: linear warm-up to ``lr``, constant, linear
    decay.

    The last step has lr / (decay_steps + 1), the one after it would have 0 (the trapezoid of Haegele et al.
    2024). The paper uses neither warm-up nor decay.
    """
    warmup = step / max(warmup_steps, 1)
    decay = (steps + 1 - step) / (decay_steps + 1) if decay_steps else 1.0
    return lr * min(1.0, warmup, decay)


def gate_opening(step: int, initial: float, gate_steps: int) -> float:
    """Return how far a text model's time gate is open after step 1, 2, ...: linear to 1 at ``gate_steps``.

    Never less than ``initial``: weights whose gate is open keep it open, whatever the settings of the new
    run.
    """
    return min(1.0, max(initial, step / gate_steps))


def check_schedule(config: TrainConfig, gated: bool) -> list[str]:
    """Check a fresh run's settings against its number of steps; return notices about those without full
    effect.

    A decay of the learning rate that does not fit is refused (InputError with the largest value that does):
    it starts below ``train.lr``, and unlike the others it depends on ``train.steps``, so that training
    longer later does not repair it. The others give a notice; the paper's own recipes have one (clipping
    starts after the last step). ``gated``: the model has a time gate.
    """
    check_decay(config)
    steps = config.steps
    notices = []
    if config.warmup_steps > steps:
        notices.append(
            f"train.warmup_steps is {config.warmup_steps}, but train.steps is {steps}: the learning rate "
            "ends at "
            f"{steps / config.warmup_steps:.0%} of train.lr; set train.warmup_steps={steps} or less to "
            "reach it"
        )
    if config.clip_norm is not None and config.clip_start >= steps:
        notices.append(
            f"train.clip_start is {config.clip_start}, but train.steps is {steps}: gradients are never "
            "clipped"
        )
    if gated and config.gate_steps > steps:
        notices.append(
            f"train.gate_steps is {config.gate_steps}, but train.steps is {steps}: the time gate ends "
            f"{steps / config.gate_steps:.0%} open; set train.gate_steps={steps} or less to open it fully"
        )
    if config.checkpoint_every > steps:
        notices.append(
            f"train.checkpoint_every is {config.checkpoint_every}, but train.steps is {steps}: "
            "the only checkpoint is that of the last step"
        )
    initial_share = 0.0 if config.ema_warmup else config.ema_decay**steps
    if initial_share > 0.5:
        notices.append(
            f"train.ema_decay is {config.ema_decay}: after {steps} steps the EMA weights, which samples "
            "use, are still "
            f"{initial_share:.0%} initial weights; set train.ema_warmup=true, or train longer"
        )
    return notices


def check_decay(config: TrainConfig) -> None:
    """InputError, with a value that fits, for a decay that begins before the run or before the end of warm-
    up.
    """
    steps = config.steps
    warmup = config.warmup_steps
    decay = config.decay_steps
    if decay == 0 or warmup + decay <= steps:
        return
    peak = max(learning_rate(step, 1.0, warmup, decay, steps) for step in range(1, steps + 1))
    raise InputError(
        f"train.decay_steps is {decay}, but train.steps is {steps} and train.warmup_steps is {warmup}: the "
        "learning "
        f"rate would reach only {peak:.0%} of train.lr={config.lr:g}; "
        f"give train.decay_steps={max(steps - warmup, 0)} or less, or more train.steps"
    )
