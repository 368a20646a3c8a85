"""Configurations: frozen dataclasses, from which the command line makes its options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

_HOOKS = "give spectral, such as '-2', or a scheduler with hooked layers"


def positive(config: object, *names: str) -> None:
    """Raises ValueError where one of the fields is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, found {getattr(config, name)}")


def non_negative(config: object, *names: str) -> None:
    """Raises ValueError where one of the fields is below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must be at least 0, found {getattr(config, name)}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 31:
        raise ValueError(f"seed must be in [0, 2147483648), found {seed}")


@dataclass(frozen=True)
class AgentConfig:
    """A value-based agent: its head, its loss, its optimiser and its spectral hooks."""

    loss: Literal["c51", "double_c51", "dqn", "double_dqn"] = "c51"
    """Categorical cross-entropy (Bellemare et al. 2017) or TD error, plain or double."""
    td_error: Literal["huber", "mse"] = "huber"
    """Of the DQN losses; `mse` is the squared error without the factor 1/2, as in PyTorch."""
    num_atoms: int = 51
    """Atoms of the C51 support."""
    v_min: float = -10.0
    """Value of the first atom, in discounted clipped reward."""
    v_max: float = 10.0
    """Value of the last atom."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Adam, or the centred RMSprop of Mnih et al. 2015 (decay 0.95)."""
    learning_rate: float = 2.5e-4
    """Constant step size."""
    eps: float = 3.125e-4
    """The optimiser's epsilon, outside of the square root; 0.01/32 in the paper."""
    spectral: tuple[str, ...] = ()
    """Hooked layers: indices from the end ("-2"), names ("fc") or "all"; a suffix L ("-2L") only
    logs. The paper's is "-2"."""
    bound: float | None = None
    """Unset: W/σ. A number k: W/max(σ/k, 1); the paper tried 1, 2 and 10."""
    scheduler: Literal["none", "div_grad", "mul_eps", "div_out"] = "none"
    """What the hooked layers' σ acts on, in place of the weights: their gradients, their Adam eps,
    or the network's output. The layers of the first two must be log-only (suffix L)."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number or a combination makes no sense."""
        positive(self, "learning_rate", "eps")
        if self.num_atoms < 2:
            raise ValueError(f"num_atoms must be at least 2, found {self.num_atoms}")
        if not self.v_min < self.v_max:
            raise ValueError(f"v_min must be below v_max, found {self.v_min} and {self.v_max}")
        if self.bound is not None:
            positive(self, "bound")
            if not self.uses_norms:
                raise ValueError(f"bound {self.bound} acts on nothing: {_HOOKS}")
        if self.scheduler != "none" and not self.spectral:
            raise ValueError(
                f"scheduler {self.scheduler!r} needs hooked layers; give spectral, such as '-2L'"
            )
        if self.scheduler in ("div_grad", "mul_eps"):
            active = [name for name in self.spectral if not name.endswith("L")]
            if active:
                raise ValueError(
                    f"scheduler {self.scheduler!r} acts on layers that are only logged (suffix L); "
                    f"found {active}, allowed {[name + 'L' for name in active]}"
                )
        if self.scheduler == "mul_eps" and self.optimizer != "adam":
            raise ValueError(f"mul_eps is a form of Adam, found optimizer {self.optimizer!r}")

    @property
    def uses_norms(self) -> bool:
        """Whether a spectral norm acts on anything, beside being logged."""
        return self.scheduler != "none" or any(not name.endswith("L") for name in self.spectral)


@dataclass(frozen=True)
class Exploration:
    """ε-greedy acting: 1 during warm-up, then linear to its end value."""

    warmup: int = 50_000
    """Agent steps of uniformly random acting, without updates."""
    end_step: int = 1_000_000
    """Agent step, counted from the first, at which ε reaches its end value."""
    end: float = 0.01
    """ε from then on, in [0, 1]."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if not 0 <= self.end <= 1:
            raise ValueError(f"epsilon must be in [0, 1], found {self.end}")
        if not 0 < self.warmup <= self.end_step:
            raise ValueError(
                f"need 0 < warmup <= end_step, found warmup {self.warmup}, end_step {self.end_step}"
            )


@dataclass(frozen=True)
class AtariConfig:
    """Training on one Atari game; steps are agent steps of four emulator frames each."""

    game: str = "Pong"
    """Name as in `jaxrl games`; case and underscores do not matter."""
    protocol: Literal["classic", "modern"] = "classic"
    """classic: the paper's (no-op starts, life loss terminal). modern: sticky actions 0.25 only."""
    agent: AgentConfig = AgentConfig()
    exploration: Exploration = Exploration()
    steps: int = 50_000_000
    """Agent steps in all; the paper's 200M frames are 50M."""
    num_envs: int = 32
    """Games played at once; the replay ratio stays the same for any number."""
    update_period: int = 4
    """Agent steps per update: with batches of 32, 8 samples per agent step as in the paper."""
    batch_size: int = 32
    """Transitions per update, over all devices."""
    target_period: int = 10_000
    """Agent steps between copies of the online network to the target network."""
    discount: float = 0.99
    """γ per agent step."""
    n_step: int = 1
    """Rewards summed before bootstrapping."""
    replay_capacity: int = 1_000_000
    """Agent steps kept; a million takes 7.06 GB."""
    replay: Literal["host", "device"] = "host"
    """Where the replay lives: main memory, or the accelerator's."""
    evaluate_every: int = 250_000
    """Agent steps between evaluations; 0 for none."""
    evaluate_steps: int = 125_000
    """Agent steps of an evaluation."""
    evaluate_epsilon: float = 0.001
    """ε while evaluating."""
    checkpoint_every: int = 250_000
    """Agent steps between checkpoints."""
    log_every: int = 1_000
    """Agent steps between lines of metrics."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        positive(self, "steps", "num_envs", "update_period", "batch_size", "target_period")
        positive(self, "n_step", "replay_capacity", "checkpoint_every", "log_every")
        non_negative(self, "evaluate_every", "evaluate_steps")
        _check_seed(self.seed)
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must be in [0, 1], found {self.discount}")
        if not 0 <= self.evaluate_epsilon <= 1:
            raise ValueError(f"epsilon must be in [0, 1], found {self.evaluate_epsilon}")
        if self.target_period % self.update_period:
            raise ValueError(
                f"target_period must be a multiple of update_period {self.update_period}, "
                f"found {self.target_period}"
            )


@dataclass(frozen=True)
class Sweep:
    """Hyper-parameters to train side by side: every combination, each with all seeds."""

    learning_rate: tuple[float, ...] = ()
    """Step sizes; unset: the agent's own. The authors swept from 1e-5 to 2.15e-3."""
    eps: tuple[float, ...] = ()
    """The optimiser's epsilons; unset: the agent's own. The authors swept from 1e-4 to 1e-2."""
    bound: tuple[float, ...] = ()
    """k of W/max(σ/k, 1); unset: the agent's own."""

    def __post_init__(self) -> None:
        """Raises ValueError where a value is not above 0, or is there twice."""
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if any(not value > 0 for value in values) or len(set(values)) < len(values):
                raise ValueError(
                    f"sweep.{field.name} must be different values above 0, found {values}"
                )


@dataclass(frozen=True)
class MinAtarConfig:
    """Training on a MinAtar game, wholly on the device and vmapped over seeds."""

    game: Literal["asterix", "breakout", "freeway", "seaquest", "space_invaders"] = "breakout"
    """The paper uses all but freeway."""
    agent: AgentConfig = AgentConfig()
    exploration: Exploration = Exploration(warmup=5_000, end_step=250_000)
    steps: int = 5_000_000
    """Agent steps (here: frames) in all, per seed."""
    num_seeds: int = 1
    """Independent agents trained at once, in one program."""
    sweep: Sweep = Sweep()
    """Hyper-parameters trained at once, in the same program."""
    convs: tuple[int, ...] = (16,)
    """Channels of each 3×3 convolution."""
    hidden: tuple[int, ...] = (128,)
    """Widths of the dense layers."""
    update_period: int = 4
    """Agent steps per update."""
    batch_size: int = 32
    """Transitions per update."""
    target_period: int = 4_000
    """Agent steps between copies of the online network to the target network."""
    discount: float = 0.99
    """γ per agent step."""
    n_step: int = 1
    """Rewards summed before bootstrapping."""
    replay_capacity: int = 100_000
    """Agent steps kept, per seed."""
    log_every: int = 10_000
    """Agent steps between lines of metrics; a multiple of update_period."""
    checkpoint_every: int = 100_000
    """Agent steps between checkpoints; a multiple of log_every."""
    seed: int = 0
    """Of everything; seed s of several is independent of how many there are."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        positive(self, "steps", "num_seeds", "update_period", "batch_size", "target_period")
        positive(self, "n_step", "replay_capacity", "log_every", "checkpoint_every")
        _check_seed(self.seed)
        for name in ("convs", "hidden"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name} must be one or more sizes of at least 1, found {sizes}")
        if self.sweep.bound and not self.agent.uses_norms:
            raise ValueError(f"sweep.bound {self.sweep.bound} acts on nothing: {_HOOKS}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must be in [0, 1], found {self.discount}")
        for name, unit in (
            ("target_period", "update_period"),
            ("log_every", "update_period"),
            ("checkpoint_every", "log_every"),
        ):
            if getattr(self, name) % getattr(self, unit):
                raise ValueError(
                    f"{name} must be a multiple of {unit} {getattr(self, unit)}, "
                    f"found {getattr(self, name)}"
                )
