"""Named configurations of the paper, each with its command, its run time and what to expect.

A preset is where the command line starts from: every option may still be changed.
"""

from __future__ import annotations

import dataclasses

from jaxrl.config import AgentConfig, AtariConfig, Exploration, MinAtarConfig

_SCHEDULED = AgentConfig(spectral=("-2L",))
# The variants of one agent that the paper compares; the suffix of the preset's name.
_VARIANTS = {
    "": {},
    "-sn": {"spectral": ("-2",)},
    "-divgrad": {"spectral": ("-2L",), "scheduler": "div_grad"},
    "-muleps": {"spectral": ("-2L",), "scheduler": "mul_eps"},
}

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
