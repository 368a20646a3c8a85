"""Dopamine 4.1.2's C51 agent on Pong: agent steps per second with training. The peer of our loop.

Dopamine does not import under today's JAX, so it gets an environment of its own:

    python benchmarks/peers/dopamine_c51.py --install            # once; Python 3.11 or 3.12, 2 GB
    python benchmarks/peers/dopamine_c51.py                      # measures, prints one JSON line

The environment is made in `$FOURFOLD_PEERS/dopamine`, or `.peers/dopamine` in this repository. It
holds exactly what `dopamine_requirements.txt` lists; Atari's ROMs come inside `ale-py`.
`baselines`, which Dopamine imports but uses for PPO only, is replaced by an empty package.

What is measured: Dopamine's own `JaxRainbowAgent` under its own `c51.gin` settings (uniform replay,
batch 32, one update per 4 agent steps, Adam 2.5e-4) and its own Atari preprocessing with sticky
actions, driven as its runner does. Only `min_replay_history` is smaller, so that training starts at
once: its replay keeps whole stacks in a dictionary, so a sample costs much the same however full it
is. Timing starts after `--warmup` steps with training.

Its network pads its convolutions ("SAME"), so it is larger than the Nature CNN: 7744 features go
into the dense layer instead of 3136. `--padding VALID` measures the agent with the Nature CNN.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).with_name("dopamine_requirements.txt")


def environment() -> Path:
    """Where Dopamine's environment is, or would be: `$FOURFOLD_PEERS/dopamine`."""
    repository = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("FOURFOLD_PEERS", repository / ".peers")) / "dopamine"


def interpreter() -> Path:
    """The Python of Dopamine's environment."""
    return environment() / "bin" / "python"


def install() -> None:
    """Creates the environment; a finished one is left as it is.

    Raises:
      SystemExit: this Python is too new or too old for JAX 0.4.35 and TensorFlow 2.18.
      subprocess.CalledProcessError: the installer failed; its own message is above.
    """
    folder, done = environment(), environment() / "installed"
    if done.exists() and done.read_text() == REQUIREMENTS.read_text():
        print(f"Dopamine is installed in {folder}")
        return
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise SystemExit(
            "JAX 0.4.35 with TensorFlow 2.18 needs Python 3.11 or 3.12; "
            f"this is {sys.version_info.major}.{sys.version_info.minor}"
        )
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    pip = [str(interpreter()), "-m", "pip", "install", "--quiet"]
    installer = [uv, "pip", "install", "--quiet", "--python", str(interpreter())] if uv else pip
    subprocess.run([*installer, "--no-deps", "-r", str(REQUIREMENTS)], check=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    stub = site / "baselines" / "common"
    stub.mkdir(parents=True)
    for name in (stub.parent / "__init__.py", stub / "__init__.py", stub / "atari_wrappers.py"):
        name.touch()
    done.write_text(REQUIREMENTS.read_text())
    print(f"Dopamine is installed in {folder}")


def _nature_network(num_actions: int, num_atoms: int) -> Any:
    """The Nature CNN behind the interface of Dopamine's `RainbowNetwork`: unpadded."""
    import flax.linen as nn
    import jax.numpy as jnp
    from dopamine.discrete_domains import atari_lib

    class NatureC51(nn.Module):
        num_actions: int
        num_atoms: int

        @nn.compact
        def __call__(self, x: Any, support: Any) -> Any:
            x = x.astype(jnp.float32) / 255.0
            for features, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
                x = nn.Conv(features, (size, size), (stride, stride), padding="VALID")(x)
                x = nn.relu(x)
            x = nn.relu(nn.Dense(512)(x.reshape(-1)))
            logits = nn.Dense(self.num_actions * self.num_atoms)(x)
            logits = logits.reshape(self.num_actions, self.num_atoms)
            probabilities = nn.softmax(logits)
            q_values = jnp.sum(support * probabilities, axis=1)
            return atari_lib.RainbowNetworkType(q_values, logits, probabilities)

    return NatureC51(num_actions, num_atoms)


def measure(
    game: str, min_replay: int, warmup: int, seconds: float, padding: str, seed: int
) -> dict[str, Any]:
    """Runs agent and emulator; returns steps per second. Only inside Dopamine's environment."""
    import gin
    import jax
    from dopamine.discrete_domains import atari_lib
    from dopamine.jax.agents.rainbow import rainbow_agent

    gin.parse_config(
        """
        create_optimizer.learning_rate = 0.00025
        create_optimizer.eps = 0.0003125
        ReplayBuffer.max_capacity = 1_000_000
        ReplayBuffer.batch_size = 32
        PrioritizedSamplingDistribution.max_capacity = 1_000_000
        """
    )
    env = atari_lib.create_atari_environment(game)
    network = {} if padding == "SAME" else {"network": _nature_network}
    agent = rainbow_agent.JaxRainbowAgent(
        num_actions=env.action_space.n,
        num_atoms=51,
        vmax=10.0,
        gamma=0.99,
        update_horizon=1,
        min_replay_history=min_replay,
        update_period=4,
        target_update_period=8000,
        epsilon_train=0.01,
        epsilon_decay_period=250_000,
        replay_scheme="uniform",
        seed=seed,
        **network,
    )
    agent.eval_mode = False
    steps, start, start_step = 0, None, min_replay + warmup
    while True:  # as Runner._run_one_episode of dopamine.discrete_domains.run_experiment
        action = agent.begin_episode(env.reset())
        terminal, length = False, 0
        while not terminal and length < 27_000:
            observation, reward, terminal, _ = env.step(action)
            reward = max(-1.0, min(1.0, reward))
            if terminal:
                agent.end_episode(reward, terminal)
            else:
                action = agent.step(reward, observation)
            steps, length = steps + 1, length + 1
            if steps == start_step:
                jax.block_until_ready(agent.online_params)
                start = time.perf_counter()
            elif start is not None and time.perf_counter() - start >= seconds:
                jax.block_until_ready(agent.online_params)
                rate = (steps - start_step) / (time.perf_counter() - start)
                return {
                    "name": f"dopamine C51 {game} {padding}",
                    "agent_steps_per_second": round(rate, 2),
                    "agent_steps": steps - start_step,
                    "unit": "agent steps/s",
                    "dopamine": "4.1.2",
                    "jax": jax.__version__,
                }


def main() -> None:
    """Installs, or measures in Dopamine's environment, whichever Python this is run by."""
    parser = argparse.ArgumentParser(description="Dopamine 4.1.2 C51, agent steps per second")
    parser.add_argument("--install", action="store_true", help="create the environment and stop")
    parser.add_argument("--game", default="Pong", help="game, in ALE's spelling")
    parser.add_argument("--min-replay", type=int, default=500, help="agent steps before training")
    parser.add_argument("--warmup", type=int, default=200, help="training steps before timing")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of timing")
    parser.add_argument("--padding", choices=("SAME", "VALID"), default="SAME")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.install:
        install()
        return
    if Path(sys.prefix).resolve() != environment().resolve():
        if not interpreter().exists():
            raise SystemExit(f"Dopamine isn't installed in {environment()}: run with --install")
        env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        argv = [str(interpreter()), "-W", "ignore", __file__, *sys.argv[1:]]
        raise SystemExit(subprocess.run(argv, env=env, check=False).returncode)
    line = measure(args.game, args.min_replay, args.warmup, args.seconds, args.padding, args.seed)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
