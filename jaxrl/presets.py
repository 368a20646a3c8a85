"""Named configurations of the paper, each with its command, its run time and what to expect.

A preset is where the command line starts from: every option may still be changed, as in
`jaxrl train --preset atari-c51-sn --game Breakout --num-envs 16`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxrl.config import AgentConfig, AtariConfig, Exploration, MinAtarConfig

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

# What distinguishes the variants of one agent that the paper compares.
_SN = {"spectral": ("-2",)}
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


def presets() -> dict[str, Preset]:
    """Returns all presets by name.

    >>> presets()["atari-c51-sn"].config.agent.spectral
    ('-2',)
    """
    median = "paper, median human-normalised score of 54 games"
    curves = "the paper prints curves only; compare with RESULTS.md"
    return {
        "atari-dqn": Preset(_ATARI_DQN, "DQN with Adam, the paper's baseline"),
        "atari-dqn-nature": Preset(_ATARI_DQN_NATURE, "Mnih et al. 2015: Pong 18.9"),
        "atari-c51": Preset(_ATARI_C51, "Bellemare et al. 2017: Pong 20.9, Breakout 748"),
        "atari-c51-sn": Preset(_with(_ATARI_C51, _SN), f"{median}: 248.45 % (Rainbow: 227.05 %)"),
        "atari-c51-divgrad": Preset(_with(_ATARI_C51, _DIV_GRAD), "paper: nearly as C51-SN"),
        "atari-c51-muleps": Preset(_with(_ATARI_C51, _MUL_EPS), "paper: nearly as C51-SN"),
        "minatar-dqn": Preset(_MINATAR_DQN, curves),
        "minatar-dqn-sn": Preset(_with(_MINATAR_DQN, _SN), curves),
        "minatar-c51": Preset(_MINATAR_C51, curves),
        "minatar-c51-sn": Preset(_with(_MINATAR_C51, _SN), curves),
        "minatar-c51-divgrad": Preset(_with(_MINATAR_C51, _DIV_GRAD), curves),
        "minatar-c51-muleps": Preset(_with(_MINATAR_C51, _MUL_EPS), curves),
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
