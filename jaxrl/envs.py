"""Atari 2600 games through envpool, under one of two named protocols.

`classic` is that of the paper (Gogianu et al. 2021, after Mnih et al. 2015): no sticky actions, a
random number of no-ops before each game, a lost life ends the *training* episode, full games in
evaluation. `modern` is that of Machado et al. (2018) and Dopamine: sticky actions with probability
0.25, no life-loss signal, no no-ops. Both: four emulator frames an action, maximum over the last
two, 84x84 grey by area interpolation, minimal action set, games cut at 108,000 emulator frames
(27,000 agent steps), rewards never clipped here.

What envpool (tested: 1.2.5 and 1.2.7) does otherwise, and what becomes of it here:

* After the last frame of a game it spends one step on the reset and ignores that step's action
  (autoreset "next step"). Such a row says `valid=False`, so a replay never learns from it.
* A game over on the very step of the cap is reported as a truncation: here it is terminal.
* Its `episodic_life` runs the whole random no-op count after each lost life, where the authors run
  one no-op. It is off; we watch the lives, and force one no-op whose row says `valid=False`.
* Environment i of seed s is environment i - 1 of seed s + 1. Streams are spawned apart instead.
* It pushes a button at the reset, and accepts actions that do not exist: off, and refused.

What remains different from the authors' emulator loop, because envpool offers no way around it:

* The number of no-op emulator frames is uniform on 1..30 in `classic` (theirs: 0..29) and always 1
  in `modern` (0): envpool executes at least one, which shifts a game's start by 1/60 s.
* The no-op after a lost life lasts one agent step of four frames (theirs: a single frame).
* The cap counts agent steps after the no-ops and truncates (theirs: all frames; terminates).
* The maximum of two frames is taken before they are resized (theirs: after).
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import numpy as np

from jaxrl.types import TimeStep

FRAME_SHAPE = (84, 84)
FRAME_SKIP = 4
MAX_STEPS = 108_000 // FRAME_SKIP


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How games start, how actions are heeded and what counts as an end.

    Attributes:
      noop_max: no-op emulator frames before a game are uniform on 1..noop_max.
      sticky: probability that an emulator frame repeats the previous action.
      life_loss_terminal: whether losing a life is terminal while training.
    """

    noop_max: int
    sticky: float
    life_loss_terminal: bool


PROTOCOLS = {
    "classic": Protocol(noop_max=30, sticky=0.0, life_loss_terminal=True),
    "modern": Protocol(noop_max=1, sticky=0.25, life_loss_terminal=False),
}


def list_games() -> tuple[str, ...]:
    """Names of the games that `make_atari` knows, such as `SpaceInvaders`.

    Raises:
      ImportError: envpool is not installed.
    """
    specs = _import_envpool().registration.registry.specs
    atari = (name for name, (path, *_) in specs.items() if path == "envpool.atari")
    return tuple(sorted(name.removesuffix("-v5") for name in atari))


def make_atari(
    game: str,
    num_envs: int,
    *,
    protocol: str = "classic",
    training: bool = True,
    seed: int = 0,
    num_threads: int | None = None,
    max_steps: int = MAX_STEPS,
) -> AtariEnv:
    """Opens `num_envs` copies of a game that step together.

    Args:
      game: name from `list_games()`; case, spaces and underscores do not matter.
      num_envs: number of copies, N.
      protocol: `classic` or `modern`; see the module's docstring.
      training: False plays full games, without life-loss terminals, under either protocol.
      seed: non-negative; every environment gets an independent stream spawned from it. The same
        seed and the same actions give the same frames, whatever the number of threads.
      num_threads: emulator threads; None takes one a core, N at most.
      max_steps: cap of a game in agent steps.

    Returns:
      The environments; call `reset()` first.

    Raises:
      ImportError: envpool is not installed.
      ValueError: an unknown game or protocol, or a number out of range.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; allowed: {', '.join(PROTOCOLS)}")
    for name, value, least in (
        ("num_envs", num_envs, 1),
        ("seed", seed, 0),
        ("max_steps", max_steps, 1),
        ("num_threads", 1 if num_threads is None else num_threads, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    task = _resolve(game)
    rules = PROTOCOLS[protocol]
    # envpool wants int32 seeds; given a single one it would use seed + i for environment i.
    seeds = np.random.SeedSequence(seed).generate_state(num_envs) >> 1
    pool = _import_envpool().make(
        f"{task}-v5",
        env_type="gymnasium",
        num_envs=num_envs,
        num_threads=num_threads or 0,
        seed=[int(s) for s in seeds],
        max_episode_steps=max_steps,
        noop_max=rules.noop_max,
        repeat_action_probability=rules.sticky,
        frame_skip=FRAME_SKIP,
        img_height=FRAME_SHAPE[0],
        img_width=FRAME_SHAPE[1],
        stack_num=1,
        gray_scale=True,
        use_inter_area_resize=True,
        full_action_space=False,
        episodic_life=False,
        use_fire_reset=False,
        reward_clip=False,
        render_mode="rgb_array",
    )
    return AtariEnv(pool, task, life_loss_terminal=training and rules.life_loss_terminal)


class AtariEnv:
    """N copies of one Atari game that step together; made by `make_atari`.

    `step` is `send` followed by `recv`; between the two the emulators run on threads of their own
    and the caller is free to learn. Frames are fresh arrays, never overwritten by a later step.

    Attributes:
      game: envpool's name of the game.
      num_envs: N.
      num_actions: size of the game's minimal action set.
    """

    def __init__(self, pool: Any, game: str, *, life_loss_terminal: bool):
        self.game = game
        self.num_envs: int = pool.num_envs
        self.num_actions = int(pool.action_space.n)
        self._pool: Any = pool
        self._life_loss_terminal = life_loss_terminal
        self._lives = np.zeros(self.num_envs, np.int32)
        self._forced = np.zeros(self.num_envs, bool)
        self._returns = np.zeros(self.num_envs, np.float32)
        self._state = "unstarted"

    def reset(self) -> TimeStep:
        """Starts a new game in every environment.

        Returns:
          The first frames: `first` and `valid` everywhere, reward 0.

        Raises:
          RuntimeError: a step is under way, or the environments are closed.
        """
        self._expect("reset", "unstarted", "idle")
        frames, info = self._pool.reset()
        self._state = "idle"
        nothing = np.zeros(self.num_envs, bool)
        return self._time_step(frames, np.zeros(self.num_envs, np.float32), nothing, info)

    def step(self, actions: np.ndarray) -> TimeStep:
        """Sends `actions` (see `send`) and waits for the outcome (see `recv`)."""
        self.send(actions)
        return self.recv()

    def send(self, actions: np.ndarray) -> None:
        """Starts one agent step everywhere and returns at once.

        Args:
          actions: integers `(N,)` below `num_actions`. Ignored where the last time step said
            `valid=False`.

        Raises:
          ValueError: wrong shape, dtype or range.
          RuntimeError: `reset` was not called, or the last step was not yet received.
        """
        self._expect("send", "idle")
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions must be integers of shape ({self.num_envs},), "
                f"found {actions.dtype} of shape {actions.shape}"
            )
        # envpool would index out of its action table without a word.
        low, high = actions.min(), actions.max()
        if low < 0 or high >= self.num_actions:
            raise ValueError(f"actions must be in 0..{self.num_actions - 1}, found {low}..{high}")
        # Action 0 is the no-op in every game that has lives.
        self._pool.send(np.where(self._forced, 0, actions).astype(np.int32))
        self._state = "stepping"

    def recv(self) -> TimeStep:
        """Waits for the step that `send` started.

        Returns:
          Its outcome, environments in order.

        Raises:
          RuntimeError: nothing was sent.
        """
        self._expect("recv", "stepping")
        frames, reward, terminated, truncated, info = self._pool.recv()
        self._state = "idle"
        return self._time_step(frames, reward, terminated | truncated, info)

    def render(self) -> np.ndarray:
        """The screen of environment 0 in colour, uint8 `(210, 160, 3)` for most games.

        It is the emulator's last frame: neither resized nor a maximum of two. Takes 0.1 ms.

        Raises:
          RuntimeError: before `reset`, while a step is under way, or after `close`.
        """
        self._expect("render", "idle")
        return self._pool.render(env_ids=0)[0]

    def close(self) -> None:
        """Waits for a step under way and lets the emulators go; may be called twice."""
        if self._state == "stepping":
            self._pool.recv()
        self._pool, self._state = None, "closed"

    def _expect(self, call: str, *states: str) -> None:
        if self._state not in states:
            allowed = " or ".join(states)
            raise RuntimeError(f"{call}() needs {allowed} environments, found {self._state} ones")

    def _time_step(
        self, frames: np.ndarray, reward: np.ndarray, over: np.ndarray, info: dict[str, Any]
    ) -> TimeStep:
        first = info["elapsed_step"] == 0
        lives = info["lives"]
        # Lives of 0 in a game that goes on (Q*bert shows them for a moment) are no lost life, as in
        # the authors' code; nor is one lost in the forced no-op, which nobody learns from.
        life_lost = (0 < lives) & (lives < self._lives) & ~first & ~self._forced
        if not self._life_loss_terminal:
            life_lost = np.zeros(self.num_envs, bool)
        terminal = life_lost | (over & (info["terminated"] != 0))
        self._lives = lives.copy()
        self._forced = life_lost & ~over
        self._returns = np.where(first, np.float32(0), self._returns) + reward
        return TimeStep(
            frame=frames[:, 0],
            reward=reward,
            terminal=terminal,
            truncated=over & ~terminal,
            first=first,
            valid=~(over | self._forced),
            episode_over=over,
            episode_return=self._returns.copy(),
        )


def _import_envpool() -> Any:
    try:
        import envpool
    except ImportError as error:
        raise ImportError("Atari needs envpool: pip install 'fourfold[rl]'") from error
    return envpool


def _resolve(game: str) -> str:
    """Finds envpool's spelling of a game, or says what comes close."""
    names, wanted = {_plain(name): name for name in list_games()}, _plain(game)
    if wanted in names:
        return names[wanted]
    close = [names[k] for k in names if k in wanted]  # PongNoFrameskip-v4
    close += [names[k] for k in difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)]
    close = list(dict.fromkeys(close))
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise ValueError(f"unknown game {game!r}: {hint}jaxrl.envs.list_games() lists all")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
