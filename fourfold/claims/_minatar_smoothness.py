"""How smooth a trained MinAtar agent's predictions are, measured in three ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.agent import Agent, AgentState
from jaxrl.fused import Carry

PAIRS = 1_024  # of observations to measure on


def successive_observations(carry: Carry) -> np.ndarray:
    """Returns `PAIRS` random pairs of successive observations from the agents' replays."""
    replay = carry.replay
    rng = np.random.default_rng(0)
    frames = np.asarray(replay.frames)[:, 0, : int(replay.size)]
    agents = rng.integers(frames.shape[0], size=PAIRS)
    rows = rng.integers(frames.shape[1] - 1, size=PAIRS)
    both = np.stack([frames[agents, rows], frames[agents, rows + 1]], axis=1)
    count = int(np.prod(replay.frame_shape))
    bits = np.unpackbits(both, axis=-1, count=count)
    return bits.reshape(PAIRS, 2, *replay.frame_shape).astype(bool)


def measure(agent: Agent, learner: AgentState, pairs: np.ndarray) -> dict[str, float]:
    """Measures how smooth one agent's predictions are.

    Args:
      agent: its static parts, hooked on the layer `fc` at least.
      learner: its arrays.
      pairs: bool `(P, 2, H, W, C)`.

    Returns:
      `norm`: largest singular value of the `fc` kernel as the forward pass uses it, by SVD.
      `layer`: largest ratio of the distances behind and before `fc`, over the pairs.
      `q_max`, `q_mean`: largest and mean ratio of the distances of the action values and of the
      observations. Distances are Euclidean; pairs of equal observations are left out.
    """
    distinct = (pairs[:, 0] != pairs[:, 1]).any(axis=(1, 2, 3))
    a, b = (jnp.asarray(pairs[distinct, i]) for i in (0, 1))
    (into_a, out_a, q_a), (into_b, out_b, q_b) = (_forward(agent, learner, x) for x in (a, b))
    kernel = np.asarray(learner.params["fc"]["kernel"], np.float64)
    norm = np.linalg.svd(kernel, compute_uv=False)[0]
    hook = learner.spectral["fc"]
    if agent.network.hooks()["fc"] == "normalise":
        norm = norm / float(hook["v"] @ kernel @ hook["u"])
    apart = _distances(into_a, into_b)
    layer = _distances(out_a, out_b)[apart > 0] / apart[apart > 0]
    q = _distances(q_a, q_b) / _distances(np.asarray(a), np.asarray(b))
    return {
        "norm": float(norm),
        "layer": float(layer.max()),
        "q_max": float(q.max()),
        "q_mean": float(q.mean()),
    }


def _forward(
    agent: Agent, learner: AgentState, obs: jax.Array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what enters `fc`, what leaves it (before the ReLU), and the action values."""
    variables = {"params": learner.params, "spectral": learner.spectral}
    logits, seen = agent.network.apply(
        variables, obs, train=False, capture_intermediates=True, mutable=["intermediates"]
    )
    layers = {
        name: np.asarray(x["__call__"][0])
        for name, x in seen["intermediates"].items()
        if name != "__call__"
    }
    last = max(name for name in layers if name.startswith("conv"))
    values = np.asarray(jax.nn.softmax(logits)) @ np.linspace(
        agent.config.v_min, agent.config.v_max, agent.config.num_atoms
    )
    return np.maximum(layers[last], 0), layers["fc"], values


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = a.astype(np.float64) - b.astype(np.float64)
    return np.linalg.norm(difference.reshape(len(a), -1), axis=1)
