"""The agent against float64 transcriptions of its update, and when its vectors advance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import agent as agents
from jaxrl import networks, spectral
from jaxrl.config import AgentConfig
from jaxrl.types import Transition

OBS = (9, 8, 2)
ACTIONS, ATOMS = 3, 7
B1, B2 = 0.9, 0.999


def small_net(categorical=True, actions=ACTIONS):
    return networks.ConvNet(
        actions, ATOMS if categorical else None, ((3, 3, 2), (4, 2, 1)), (5,), 1 / 255
    )


def make(loss="c51", **changes):
    return _make(AgentConfig(loss=loss, num_atoms=ATOMS, v_min=-2.0, v_max=2.0, **changes))


@functools.cache
def _make(config):
    # The same agent for the same configuration, so that its update compiles once.
    return agents.make(config, small_net(config.loss.endswith("c51")))


@functools.cache
def _initial(network, seed):
    return network.init(jax.random.key(seed), jnp.zeros((1, *OBS), jnp.uint8), train=True)


def start(agent, seed=0):
    """A state whose target network is another one than the online network."""
    online, target = _initial(agent.network, seed), _initial(agent.network, seed + 1)
    return agents.AgentState(
        params=online["params"],
        spectral=online.get("spectral", {}),
        target_params=target["params"],
        target_spectral=target.get("spectral", {}),
        opt_state=agent.optimizer.init(online["params"]),
        updates=jnp.zeros((), jnp.int32),
    )


def batch(seed=0, size=6):
    """Transitions; a third of them terminal, some with returns beyond the support."""
    rng = np.random.default_rng(seed)
    return Transition(
        s_tm1=rng.integers(0, 256, (size, *OBS)).astype(np.uint8),
        a_tm1=rng.integers(0, ACTIONS, size).astype(np.int32),
        r_t=rng.choice([-1.0, 0.0, 0.3, 3.0], size).astype(np.float32),
        discount_t=np.where(rng.random(size) < 0.33, 0.0, 0.97).astype(np.float32),
        s_t=rng.integers(0, 256, (size, *OBS)).astype(np.uint8),
    )


@functools.cache
def compiled_update(agent):
    return jax.jit(lambda state, batch: agents.update(agent, state, batch))


def updates_on(agent, state, *batches):
    metrics = {}
    for data in batches:
        state, metrics = compiled_update(agent)(state, data)
    return state, metrics


def assert_close(got, expected, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def assert_identical(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def differs(a, b):
    return any(
        np.any(np.asarray(x) != np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- the C51 update in float64 ------------------------------------------------------------------


class Reference:
    """The update of C51 with a normalised `fc` and Adam, in NumPy float64, loops and all."""

    def __init__(self, agent, state):
        def to64(tree):
            return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

        self.config, self.strides = agent.config, [c[2] for c in agent.network.convs]
        self.params, self.target = to64(state.params), to64(state.target_params)
        self.u = to64(state.spectral["fc"]["u"])
        self.target_u = to64(state.target_spectral["fc"]["u"])
        self.m = jax.tree.map(np.zeros_like, self.params)
        self.n = jax.tree.map(np.zeros_like, self.params)
        self.count = 0

    def forward(self, params, u, obs):
        """Logits, the new u, and what the backward pass needs."""
        x, saved = np.asarray(obs, np.float64) / 255, []
        for name, stride in zip(("conv1", "conv2"), self.strides, strict=True):
            kernel, bias = params[name]["kernel"], params[name]["bias"]
            size = kernel.shape[0]
            shape = [(n - size) // stride + 1 for n in x.shape[1:3]]
            y = np.zeros((len(x), *shape, kernel.shape[3])) + bias
            for i, j in np.ndindex(*shape):
                rows = slice(i * stride, i * stride + size), slice(j * stride, j * stride + size)
                y[:, i, j] += np.einsum("bhwc,hwco->bo", x[:, *rows], kernel)
            saved.append((x, y))
            x = np.maximum(y, 0)
        x = x.reshape(len(x), -1)
        kernel = params["fc"]["kernel"]
        v = kernel @ u / np.linalg.norm(kernel @ u)
        u = v @ kernel / np.linalg.norm(v @ kernel)
        sigma = v @ kernel @ u
        y = x @ (kernel / sigma) + params["fc"]["bias"]
        saved.append((x, y, u, v, sigma))
        x = np.maximum(y, 0)
        saved.append(x)
        logits = x @ params["head"]["kernel"] + params["head"]["bias"]
        return logits.reshape(len(x), ACTIONS, ATOMS), u, saved

    def backward(self, params, saved, g):
        (x1, y1), (x2, y2), (x3, y3, u, v, sigma), x4 = saved
        g = g.reshape(len(g), -1)
        grads = {"head": {"kernel": x4.T @ g, "bias": g.sum(0)}}
        g = (g @ params["head"]["kernel"].T) * (y3 > 0)
        kernel = params["fc"]["kernel"]
        divided = x3.T @ g  # gradient in kernel / sigma
        through_sigma = -np.sum(divided * kernel) / sigma**2 * np.outer(v, u)
        grads["fc"] = {"kernel": divided / sigma + through_sigma, "bias": g.sum(0)}
        g = (g @ kernel.T / sigma).reshape(y2.shape)
        for name, stride, x, y in (
            ("conv2", self.strides[1], x2, y2),
            ("conv1", self.strides[0], x1, y1),
        ):
            g = g * (y > 0)
            kernel = params[name]["kernel"]
            size, dx, dkernel = kernel.shape[0], np.zeros_like(x), np.zeros_like(kernel)
            for i, j in np.ndindex(*y.shape[1:3]):
                rows = slice(i * stride, i * stride + size), slice(j * stride, j * stride + size)
                dx[:, *rows] += np.einsum("bo,hwco->bhwc", g[:, i, j], kernel)
                dkernel += np.einsum("bhwc,bo->hwco", x[:, *rows], g[:, i, j])
            grads[name] = {"kernel": dkernel, "bias": g.sum((0, 1, 2))}
            g = dx
        return grads

    def update(self, batch):
        """One update; returns the loss and the mean value of the actions taken."""
        logits, self.u, saved = self.forward(self.params, self.u, batch.s_tm1)
        target, self.target_u, _ = self.forward(self.target, self.target_u, batch.s_t)
        atoms = np.linspace(self.config.v_min, self.config.v_max, ATOMS)
        g, loss, taken = np.zeros_like(logits), 0.0, 0.0
        for i, a in enumerate(batch.a_tm1):
            best = np.argmax(softmax(target[i]) @ atoms)
            goal = np.zeros(ATOMS)
            for p, z in zip(softmax(target[i, best]), atoms, strict=True):
                z = np.clip(
                    np.float64(batch.r_t[i]) + np.float64(batch.discount_t[i]) * z,
                    atoms[0],
                    atoms[-1],
                )
                goal += p * np.clip(1 - np.abs(z - atoms) / (atoms[1] - atoms[0]), 0, 1)
            probs = softmax(logits[i, a])
            loss -= goal @ np.log(probs) / len(logits)
            taken += probs @ atoms / len(logits)
            g[i, a] = (probs - goal) / len(logits)
        grads = self.backward(self.params, saved, g)
        self.count += 1
        self.m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, self.m, grads)
        self.n = jax.tree.map(lambda n, g: B2 * n + (1 - B2) * g**2, self.n, grads)

        def step(p, m, n):
            m, n = m / (1 - B1**self.count), n / (1 - B2**self.count)
            return p - self.config.learning_rate * m / (np.sqrt(n) + self.config.eps)

        self.params = jax.tree.map(step, self.params, self.m, self.n)
        return loss, taken


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_c51_with_a_normalised_layer_against_float64():
    agent = make(spectral=("-2",), learning_rate=1e-2)
    state = start(agent)
    reference, before = Reference(agent, state), state.params
    for seed in range(6):
        state, metrics = updates_on(agent, state, batch(seed))
        loss, taken = reference.update(batch(seed))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["q"], taken, rtol=1e-4, atol=1e-6)
        if seed == 2:
            state = agents.sync_target(state)
            reference.target = jax.tree.map(np.copy, reference.params)
            reference.target_u = reference.u
    assert_close(state.params, reference.params, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(state.spectral["fc"]["u"], reference.u, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        state.target_spectral["fc"]["u"], reference.target_u, rtol=1e-4, atol=1e-5
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, before)
    assert min(jax.tree.leaves(moved)) > 1e-3  # a hundred times what is tolerated
    assert int(state.updates) == 6


# --- every combination --------------------------------------------------------------------------

SCHEDULERS = {
    "none": {"spectral": ("-2", "conv1L")},
    "div_grad": {"scheduler": "div_grad", "spectral": ("-2L", "conv1L")},
    "mul_eps": {"scheduler": "mul_eps", "spectral": ("-2L", "conv1L"), "bound": 1.0},
    "div_out": {"scheduler": "div_out", "spectral": ("-2",)},
}


LOSSES = ("c51", "double_c51", "dqn", "double_dqn")


def combinations():
    """Every loss with every scheduler, and each of both with every optimiser that it allows."""
    for i, loss in enumerate(LOSSES):
        for j, scheduler in enumerate(SCHEDULERS):
            adam = scheduler == "mul_eps" or (i + j) % 2
            yield loss, "adam" if adam else "rmsprop", scheduler


@pytest.mark.parametrize(("loss", "optimizer", "scheduler"), list(combinations()))
def test_every_combination_learns(loss, optimizer, scheduler):
    agent = make(loss, optimizer=optimizer, learning_rate=3e-3, eps=1e-3, **SCHEDULERS[scheduler])
    state, first = updates_on(agent, start(agent), batch())
    hooked = set(agent.network.hooks())
    assert set(first) == {"loss", "q"} | {f"sigma/{layer}" for layer in hooked}
    for layer in hooked:
        assert float(first[f"sigma/{layer}"]) == float(state.spectral[layer]["sigma"])
    state, metrics = updates_on(agent, state, *[batch()] * 15)
    assert all(value.shape == () and np.isfinite(value) for value in metrics.values())
    # The same batch again and again, against a target network that stands still.
    assert metrics["loss"] < first["loss"]
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), state.params))


def test_huber_and_squared_errors_differ():
    huber, mse = make("dqn"), make("dqn", td_error="mse")
    huber, mse = (updates_on(agent, start(agent), batch())[1] for agent in (huber, mse))
    assert float(mse["loss"]) > float(huber["loss"]) > 0


@pytest.mark.parametrize("loss", ["dqn", "double_dqn"])
def test_dqn_targets_and_gradient_against_numpy(loss):
    agent = make(loss, td_error="mse")
    state, data = start(agent), batch(3)

    def values(params, obs):
        return np.asarray(agent.network.apply({"params": params}, obs, train=False), np.float64)

    rows = np.arange(len(data.a_tm1))
    online, target = values(state.params, data.s_t), values(state.target_params, data.s_t)
    best = (online if loss == "double_dqn" else target).argmax(-1)
    taken = values(state.params, data.s_tm1)[rows, data.a_tm1]
    error = data.r_t + data.discount_t * target[rows, best] - taken
    new, metrics = updates_on(agent, state, data)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["q"], taken.mean(), rtol=1e-4, atol=1e-6)
    # The head's bias sees the error alone.
    expected = np.array([-2 * error[data.a_tm1 == a].sum() / len(error) for a in range(ACTIONS)])
    mu = optax.tree.get(new.opt_state, "mu")["head"]["bias"]
    np.testing.assert_allclose(mu / (1 - B1), expected, rtol=1e-4, atol=1e-6)


# --- spectral schedulers ------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [None, 0.7])
def test_div_grad_and_mul_eps_act_on_the_hooked_kernel_alone(bound):
    agent_of = functools.partial(make, spectral=("-2L",), bound=bound)
    data = batch()
    logging = make(spectral=("-2L",))
    plain, _ = updates_on(logging, start(logging), data)
    sigma = float(plain.spectral["fc"]["sigma"])
    factor = sigma if bound is None else max(sigma / bound, 1)
    assert abs(factor - 1) > 0.05
    gradient = jax.tree.map(lambda mu: mu / (1 - B1), optax.tree.get(plain.opt_state, "mu"))

    divided_agent = agent_of(scheduler="div_grad")
    divided, _ = updates_on(divided_agent, start(divided_agent), data)
    seen = jax.tree.map(lambda mu: mu / (1 - B1), optax.tree.get(divided.opt_state, "mu"))
    expected = {**gradient, "fc": {**gradient["fc"], "kernel": gradient["fc"]["kernel"] / factor}}
    assert_close(seen, expected, rtol=1e-5, atol=1e-9)

    # Adam's first step is -lr g / (|g| + eps); dividing g by σ multiplies eps by it.
    multiplied_agent = agent_of(scheduler="mul_eps")
    multiplied, _ = updates_on(multiplied_agent, start(multiplied_agent), data)
    config = multiplied_agent.config
    before = start(multiplied_agent).params["fc"]["kernel"]
    g = np.asarray(gradient["fc"]["kernel"], np.float64)
    step = -config.learning_rate * g / (np.abs(g) + config.eps * factor)
    got = np.asarray(multiplied.params["fc"]["kernel"], np.float64) - before
    np.testing.assert_allclose(got, step, rtol=1e-3, atol=1e-7)
    assert_close(multiplied.params, divided.params, rtol=0, atol=1e-7)
    unhooked = [{k: v for k, v in s.params.items() if k != "fc"} for s in (plain, multiplied)]
    assert_close(*unhooked, rtol=0, atol=1e-7)
    assert differs(plain.params["fc"]["kernel"], multiplied.params["fc"]["kernel"])


def test_schedulers_leave_the_loss_alone_but_div_out_does_not():
    data, losses = batch(), {}
    for name in ("none", "div_grad", "mul_eps", "div_out"):
        spec = ("-2",) if name == "div_out" else ("-2L",)
        agent = make(spectral=spec, scheduler=name)
        losses[name] = float(updates_on(agent, start(agent), data)[1]["loss"])
    assert losses["none"] == losses["div_grad"] == losses["mul_eps"] != losses["div_out"]


def test_traced_hyper_parameters_are_vmapped():
    config = AgentConfig(num_atoms=ATOMS, spectral=("-2L",), scheduler="div_grad", bound=1.0)

    state = start(agents.make(config, small_net()))

    def one(learning_rate, eps, bound):
        agent = agents.make(config, small_net(), learning_rate=learning_rate, eps=eps, bound=bound)
        return agents.update(agent, state, batch())[0].params

    grid = [jnp.array(x, jnp.float32) for x in ([1e-2, 1e-3], [1e-4, 1e-2], [0.2, 0.9])]
    got = jax.jit(jax.vmap(one))(*grid)
    for i in range(2):
        lr, eps, bound = (float(x[i]) for x in grid)
        changed = dataclasses.replace(config, learning_rate=lr, eps=eps, bound=bound)
        agent = agents.make(changed, small_net())
        expected = updates_on(agent, state, batch())[0].params
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), expected, rtol=1e-4, atol=1e-6)


# --- RMSprop ------------------------------------------------------------------------------------


def rmsprop_gradients(agent, state, count):
    """Gradients of `count` updates, read off the running mean, and the last state."""
    gradients = []
    for seed in range(count):
        old = optax.tree.get(state.opt_state, "mu")
        state, _ = updates_on(agent, state, batch(seed))
        new = optax.tree.get(state.opt_state, "mu")
        gradients.append(
            jax.tree.map(lambda a, b: (np.float64(b) - 0.95 * np.float64(a)) / 0.05, old, new)
        )
    return gradients, state


def test_rmsprop_is_that_of_pytorch():
    agent = make("dqn", optimizer="rmsprop", eps=0.01, learning_rate=2.5e-3)
    before = start(agent).params
    gradients, state = rmsprop_gradients(agent, start(agent), 6)
    # torch.optim.RMSprop(centered=True, alpha=0.95, eps=0.01): eps is added to the root.
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), before)
    square, mean = jax.tree.map(np.zeros_like, params), jax.tree.map(np.zeros_like, params)
    for g in gradients:
        square = jax.tree.map(lambda s, g: 0.95 * s + 0.05 * g * g, square, g)
        mean = jax.tree.map(lambda m, g: 0.95 * m + 0.05 * g, mean, g)
        params = jax.tree.map(
            lambda p, g, s, m: p - 2.5e-3 * g / (np.sqrt(s - m * m) + 0.01),
            params,
            g,
            square,
            mean,
        )
    assert_close(state.params, params, rtol=1e-4, atol=1e-6)
    assert differs(before, state.params)

    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(np.asarray(x, np.float64)) for x in jax.tree.leaves(before)]
    for leaf in leaves:
        leaf.requires_grad_(True)
    optimizer = torch.optim.RMSprop(leaves, 2.5e-3, alpha=0.95, eps=0.01, centered=True)
    for g in gradients:
        for leaf, value in zip(leaves, jax.tree.leaves(g), strict=True):
            leaf.grad = torch.tensor(value)
        optimizer.step()
    expected = [leaf.detach().numpy() for leaf in leaves]
    assert_close(jax.tree.leaves(state.params), expected, rtol=1e-4, atol=1e-6)


# --- when u advances ----------------------------------------------------------------------------


def advanced(params, hooks, layer="fc"):
    sigma, u, v = spectral.power_iteration_dense(params[layer]["kernel"], hooks[layer]["u"])
    return {"sigma": sigma, "u": u, "v": v}


@pytest.mark.parametrize("loss", ["c51", "double_dqn"])
def test_an_update_advances_both_networks_once_each(loss):
    agent = make(loss, spectral=("-2",))
    state = start(agent)
    for seed in range(3):
        new, _ = updates_on(agent, state, batch(seed))
        assert_close(new.spectral["fc"], advanced(state.params, state.spectral), atol=1e-6)
        target = advanced(state.target_params, state.target_spectral)
        assert_close(new.target_spectral["fc"], target, atol=1e-6)
        assert differs(new.spectral, new.target_spectral)
        assert_identical(new.target_params, state.target_params)
        state = new


def test_a_sync_copies_weights_and_vectors_and_a_new_agent_starts_in_sync():
    agent = make(spectral=("-2", "conv1"))
    state, _ = updates_on(agent, start(agent), batch(0), batch(1))
    synced = jax.jit(agents.sync_target)(state)
    assert_identical(synced.target_params, state.params)
    assert_identical(synced.target_spectral, state.spectral)
    assert differs(state.target_spectral, state.spectral)
    for name in ("params", "spectral", "opt_state", "updates"):
        assert_identical(getattr(synced, name), getattr(state, name))

    fresh = agents.init(agent, jax.random.key(0), OBS)
    assert_identical(fresh.target_params, fresh.params)
    assert_identical(fresh.target_spectral, fresh.spectral)
    assert int(fresh.updates) == 0
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(fresh)]
    assert len(set(buffers)) == len(buffers)  # or donating the state would fail


def test_acting_advances_u_only_if_an_action_was_greedy():
    agent = make(spectral=("-2",))
    state, obs = start(agent), batch(size=4).s_tm1
    act = jax.jit(lambda state, epsilon, key: agents.act(agent, state, obs, epsilon, key))
    key = jax.random.key(0)
    actions, greedy = act(state, 0.0, key)
    assert_close(greedy.spectral["fc"], advanced(state.params, state.spectral), atol=1e-6)
    assert actions.dtype == jnp.int32 and actions.shape == (4,)
    _, explored = act(state, 1.0, key)
    assert_identical(explored.spectral, state.spectral)
    for name in ("params", "target_params", "target_spectral", "opt_state", "updates"):
        assert_identical(getattr(greedy, name), getattr(state, name))


def test_one_environment_advances_u_exactly_when_it_acts_greedily():
    # Forty actions, of which one is much the best: another action was a random one.
    config = AgentConfig(loss="dqn", spectral=("-2",))
    agent = agents.make(config, small_net(categorical=False, actions=40))
    state, obs = agents.init(agent, jax.random.key(0), OBS), batch(size=1).s_tm1
    bias = jnp.zeros(40).at[17].set(1e3)
    params = {**state.params, "head": {**state.params["head"], "bias": bias}}
    state = dataclasses.replace(state, params=params)

    @jax.jit
    @jax.vmap
    def act(key):
        actions, new = agents.act(agent, state, obs, 0.5, key)
        return actions[0], new.spectral["fc"]["u"]

    actions, us = act(jax.random.split(jax.random.key(1), 400))
    moved = np.abs(us - state.spectral["fc"]["u"][None]).max(-1) > 0
    assert (np.asarray(actions)[moved] == 17).all()
    assert 0.4 < moved.mean() < 0.6
    explored = np.asarray(actions)[~moved]
    assert (explored == 17).mean() < 0.1 and len(set(explored.tolist())) > 30


def test_evaluation_advances_nothing_and_is_finite_before_any_training_forward():
    agent = make(spectral=("all",))
    state, obs = agents.init(agent, jax.random.key(0), OBS), batch(size=50).s_tm1
    outputs = jax.jit(lambda state: agents.outputs_evaluation(agent, state, obs))(state)
    assert outputs.shape == (50, ACTIONS, ATOMS) and np.isfinite(outputs).all()
    act = jax.jit(lambda state, eps, key: agents.act_evaluation(agent, state, obs, eps, key))
    atoms = np.linspace(-2, 2, ATOMS)
    greedy = np.argmax(softmax(np.asarray(outputs, np.float64)) @ atoms, -1)
    for key in jax.random.split(jax.random.key(0), 3):
        np.testing.assert_array_equal(act(state, 0.0, key), greedy)
    random = np.asarray(act(state, 1.0, jax.random.key(0)))
    assert set(random.tolist()) == set(range(ACTIONS)) and (random != greedy).any()


# --- the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "end_step", "end"), [(50_000, 1_000_000, 0.01), (20_000, 250_000, 0.1), (5, 9, 0.0)]
)
def test_epsilon_is_one_in_the_warmup_and_linear_to_its_end(warmup, end_step, end):
    schedule = jax.jit(lambda step: agents.epsilon_at(step, warmup, end_step, end))
    for step in (0, 1, warmup - 1, warmup):
        assert float(schedule(jnp.int32(step))) == 1.0
    for step in (warmup + 1, (warmup + end_step) // 2, end_step - 1, end_step):
        expected = 1 + (end - 1) * (step - warmup) / (end_step - warmup)
        np.testing.assert_allclose(schedule(jnp.int32(step)), expected, rtol=1e-5, atol=1e-7)
    for step in (end_step, end_step + 1, 10 * end_step, 50_000_000, 2**31 - 1):
        got = schedule(jnp.int32(step))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, end, rtol=1e-5, atol=1e-9)


def test_a_warmup_that_ends_with_the_schedule_is_a_step():
    assert float(agents.epsilon_at(100, 100, 100, 0.05)) == 1.0
    np.testing.assert_allclose(agents.epsilon_at(101, 100, 100, 0.05), 0.05, rtol=1e-5)


def test_make_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="loss 'c51' needs num_atoms 51, found 7"):
        agents.make(AgentConfig(), small_net())
    with pytest.raises(ValueError, match="loss 'dqn' needs num_atoms None, found 7"):
        agents.make(AgentConfig(loss="dqn"), small_net())
    with pytest.raises(ValueError, match="no layer '-7'; allowed are 'all', '-4'"):
        make(spectral=("-7",))
