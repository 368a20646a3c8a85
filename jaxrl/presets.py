"""Named configurations of the paper, each with its command, its run time and what to expect.

A preset is where the command line starts from: every option may still be changed, as in
`jaxrl train --preset atari-c51-sn --game Breakout --num-envs 64`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxrl.config import AgentConfig, AtariConfig, Exploration, MinAtarConfig, Sweep

_ATARI_C51 = AtariConfig()
_ATARI_DQN = AtariConfig(
    agent=AgentConfig(loss="dqn"),
    exploration=Exploration(warmup=20_000, end_step=250_000),
    target_period=8_000,
)
_ATARI_DQN_NATURE = AtariConfig(
    agent=AgentConfig(loss="dqn", optimizer="rmsprop", eps=0.01),
    exploration=Exploration(end=0.1),
    evaluate_epsilon=0.05,
)
_MINATAR_C51 = MinAtarConfig()
_MINATAR_DQN = MinAtarConfig(agent=AgentConfig(loss="dqn", td_error="mse"))
# The authors' values; their smallest network of six, which the sweep runs on.
_SWEEP = Sweep(
    learning_rate=(1e-5, 2.15e-5, 4.64e-5, 1e-4, 2.154e-4, 4.642e-4, 1e-3, 2.1544e-3),
    eps=(1e-4, 3.2e-4, 1e-3, 3.16e-3, 1e-2),
)

# What distinguishes the variants of one agent that the paper compares.
_SN = {"spectral": ("-2",)}
_SN2 = {"spectral": ("-2", "-3")}
_DIV_GRAD = {"spectral": ("-2L",), "scheduler": "div_grad"}
_MUL_EPS = {"spectral": ("-2L",), "scheduler": "mul_eps"}


@dataclasses.dataclass(frozen=True)
class Preset:
    """A configuration and what is known of it.

    Attributes:
      config: the configuration.
      expect: published or measured score, with its source.
    """

    config: AtariConfig | MinAtarConfig
    expect: str

    @property
    def run_time(self) -> str:
        """How long it takes on hardware on which it was measured."""
        if isinstance(self.config, AtariConfig):
            return "3.6 days a game on 2 CPU cores (160 agent steps/s); not yet measured on a GPU"
        if self.config.sweep != Sweep():
            sweep = self.config.sweep
            agents = len(sweep.learning_rate) * len(sweep.eps) * self.config.num_seeds
            return (
                f"{agents} agents; 3,700 steps/s over all of them on 2 CPU cores: meant for a GPU"
            )
        return "50 minutes a seed on 2 CPU cores (1,700 steps/s; 4,000 over 4 seeds)"

    def command(self, name: str) -> str:
        """Returns the command that runs it under its name."""
        return f"jaxrl train --preset {name} --game {self.config.game}"


def presets() -> dict[str, Preset]:
    """Returns all presets by name.

    >>> presets()["atari-c51-sn"].config.agent.spectral
    ('-2',)
    """
    median = "paper, median human-normalised score of 54 games"
    curves = "the paper prints curves only; compare with RESULTS.md"
    heat = "a heat map of returns over learning rate and eps, the paper's sweep; it prints no table"
    c51 = f"{curves}; periods as in its DQN sweeps, where the authors' C51 has 1 and 1,000"
    # Lines of the log are frequent, because a stop is heeded at one.
    dqn_sweep = dataclasses.replace(
        _MINATAR_DQN, sweep=_SWEEP, num_seeds=2, convs=(24,), log_every=2_000
    )
    return {
        "atari-dqn": Preset(_ATARI_DQN, "DQN with Adam, the paper's baseline"),
        "atari-dqn-nature": Preset(_ATARI_DQN_NATURE, "Mnih et al. 2015: Pong 18.9"),
        "atari-c51": Preset(_ATARI_C51, "Bellemare et al. 2017: Pong 20.9, Breakout 748"),
        "atari-c51-sn": Preset(_with(_ATARI_C51, _SN), f"{median}: 248.45 % (Rainbow: 227.05 %)"),
        "atari-c51-divgrad": Preset(_with(_ATARI_C51, _DIV_GRAD), "paper: nearly as C51-SN"),
        "atari-c51-muleps": Preset(_with(_ATARI_C51, _MUL_EPS), "paper: nearly as C51-SN"),
        "minatar-dqn": Preset(_MINATAR_DQN, curves),
        "minatar-dqn-sn": Preset(_with(_MINATAR_DQN, _SN), curves),
        "minatar-dqn-sweep": Preset(dqn_sweep, heat),
        "minatar-dqn-sn-sweep": Preset(_with(dqn_sweep, _SN), heat),
        "minatar-dqn-sn2-sweep": Preset(_with(dqn_sweep, _SN2), heat),
        "minatar-c51": Preset(_MINATAR_C51, c51),
        "minatar-c51-sn": Preset(_with(_MINATAR_C51, _SN), c51),
        "minatar-c51-divgrad": Preset(_with(_MINATAR_C51, _DIV_GRAD), c51),
        "minatar-c51-muleps": Preset(_with(_MINATAR_C51, _MUL_EPS), c51),
    }


def get(name: str) -> Preset:
    """Returns a preset.

    Raises:
      ValueError: an unknown name; the message lists those there are.
    """
    found = presets()
    if name not in found:
        raise ValueError(f"unknown preset {name!r}; allowed: {', '.join(found)}")
    return found[name]


def _with(
    config: AtariConfig | MinAtarConfig, changes: Mapping[str, object]
) -> AtariConfig | MinAtarConfig:
    agent = dataclasses.replace(config.agent, **changes)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(config, agent=agent)
