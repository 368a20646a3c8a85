"""How many MinAtar steps a second does training make, by the number of seeds trained at once?

    python benchmarks/jaxrl_minatar.py [--quick] [--game GAME]

Everything is inside: game, acting, replay, and a C51 update of batch 32 every 4 steps, with the
paper's network and spectral normalisation of the second-to-last layer. Ours trains all seeds in
one program, split over the devices (on a CPU: one device a core). The peer is the same program
for one seed, run for one seed after the other, which makes as many steps a second as for one.
Without `--quick` it also compares a replay of 10,000 steps with one of 1,000,000: where a buffer
is copied instead of written in place, the larger one is slower.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
from _bench import alternate, figure, median, show

from fourfold.runtime import mesh as meshes
from jaxrl import fused, train_minatar
from jaxrl.config import AgentConfig, Exploration, MinAtarConfig

SEEDS = (1, 4, 8, 16)


def trainer(game: str, seeds: int, steps: int, capacity: int) -> Callable[[], jax.Array]:
    """Returns a function that trains all seeds for so many more steps, past the warm-up."""
    config = MinAtarConfig(
        game=game,  # pyright: ignore[reportArgumentType]
        agent=AgentConfig(spectral=("-2",)),
        exploration=Exploration(warmup=steps, end_step=10 * steps),
        num_seeds=seeds,
        replay_capacity=capacity,
        log_every=steps,
        checkpoint_every=steps,
    )
    mesh = meshes.make_mesh(train_minatar.most_devices(seeds))
    (keys, hypers), hyper = fused.agents_of(config), fused.hyper_of(config)
    functions = train_minatar.compile_functions(config, mesh, seeds, hyper)
    keys, hypers = functions.place((keys, hypers))
    carry = functions.init(keys, hypers)
    carry, _ = functions.interval(carry, hypers)  # the warm-up

    def run() -> jax.Array:
        nonlocal carry
        carry, row = functions.interval(carry, hypers)
        return row["loss"]

    return run


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps, no large replay")
    parser.add_argument("--game", default="breakout", help="which game (breakout)")
    arguments = parser.parse_args()
    meshes.one_cpu_device_per_core()
    steps, repeats = (200, 3) if arguments.quick else (1_000, 7)

    trainers = {seeds: trainer(arguments.game, seeds, steps, 10_000) for seeds in SEEDS}
    seconds = alternate({str(n): run for n, run in trainers.items()}, repeats, warmup=1)
    rates = {n: n * steps / median(seconds[str(n)]) for n in SEEDS}
    for n, rate in rates.items():
        figure(
            f"{n} seeds at once / one after the other ({jax.default_backend()})",
            rate,
            rates[1],
            "steps/s",
            rate / rates[1],
            better="higher",
        )
    if not arguments.quick:
        sizes = {
            "large": trainer(arguments.game, 8, steps, 1_000_000),
            "small": trainers[8],
        }
        times = {name: median(x) for name, x in alternate(sizes, repeats, warmup=1).items()}
        ratio = times["large"] / times["small"]
        name = "8 seeds, a replay of 1,000,000 / of 10,000 steps"
        figure(name, 8 * steps / times["large"], 8 * steps / times["small"], "steps/s", ratio, 1.1)
    show()


if __name__ == "__main__":
    main()
