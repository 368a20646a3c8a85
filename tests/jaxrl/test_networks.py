"""Networks: convolutions against brute force, hooks against materialised weights, `u` in time."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import networks, spectral
from jaxrl.networks import ConvNet, conv2d

METHODS = get_args(networks.ConvMethod)
OBS = (2, 12, 11, 3)  # odd width; the second stride divides neither side


def small_net(num_atoms=5, **options):
    return ConvNet(3, num_atoms, ((4, 4, 2), (6, 2, 3)), (8,), 1 / 255, **options)


def observations(seed=0, shape=OBS):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@functools.cache
def init(net, seed=0, shape=OBS):
    # Eager: compiling all of the random draws together takes longer.
    return net.init(jax.random.key(seed), jnp.zeros(shape, jnp.uint8), train=True)


def evaluate(net, variables, obs):
    """A forward in evaluation mode."""
    return jax.jit(lambda v, x: net.apply(v, x, train=False))(variables, obs)


def train(net, variables, obs):
    """A forward in training mode: outputs, and the variables with their hooks advanced."""
    y, mutated = jax.jit(lambda v, x: net.apply(v, x, train=True, mutable=["spectral"]))(
        variables, obs
    )
    return y, {**variables, **mutated}


def with_biases(variables, seed=1):
    """The same variables with biases other than the initial zeros."""
    rng = np.random.default_rng(seed)
    params = {
        name: {**layer, "bias": jnp.asarray(rng.normal(size=layer["bias"].shape), jnp.float32)}
        for name, layer in variables["params"].items()
    }
    return {**variables, "params": params}


def assert_identical(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# --- float64 oracles --------------------------------------------------------------------------


def conv_oracle(x, kernel, stride):
    """An unpadded convolution, one output position after the other, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    size = kernel.shape[0]
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.einsum("bhwc,hwco->bo", patch, kernel)
    return y


def conv_gradients_oracle(x, kernel, stride, g):
    """Gradients of `sum(g * conv(x, kernel))` in x and kernel, in float64."""
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    size = kernel.shape[0]
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for i in range(g.shape[1]):
        for j in range(g.shape[2]):
            rows = slice(i * stride, i * stride + size)
            cols = slice(j * stride, j * stride + size)
            dx[:, rows, cols] += np.einsum("bo,hwco->bhwc", g[:, i, j], kernel)
            dkernel += np.einsum("bhwc,bo->hwco", x[:, rows, cols], g[:, i, j])
    return dx, dkernel


def operator_matrix(kernel, stride, input_shape):
    """The matrix of a convolution, by its action on every unit vector."""
    units = np.eye(int(np.prod(input_shape))).reshape(-1, *input_shape)
    return conv_oracle(units, kernel, stride).reshape(len(units), -1)


def net_oracle(net, variables, obs, modes, bound=None):
    """A training forward in float64 with materialised weights: outputs and new (sigma, u, v)."""
    x = np.asarray(obs, np.float64) * net.input_scale
    fresh = {}

    def effective(name, matrix, kernel):
        """Divides the kernel where hooked, after one step of power iteration on `matrix`."""
        if name not in modes:
            return kernel
        u = np.asarray(variables["spectral"][name]["u"], np.float64)
        v = matrix @ u.ravel()
        v /= np.linalg.norm(v)
        image = v @ matrix
        sigma = np.linalg.norm(image)
        fresh[name] = (sigma, image / sigma, v)
        if modes[name] == "log":
            return kernel
        return kernel / (sigma if bound is None else max(sigma / bound, 1))

    for name in net.layer_names:
        kernel = np.asarray(variables["params"][name]["kernel"], np.float64)
        bias = np.asarray(variables["params"][name]["bias"], np.float64)
        if name.startswith("conv"):
            stride = net.convs[int(name[4:]) - 1][2]
            matrix = operator_matrix(kernel, stride, x.shape[1:]) if name in modes else None
            x = conv_oracle(x, effective(name, matrix, kernel), stride) + bias
        else:
            x = x.reshape(len(x), -1) @ effective(name, kernel, kernel) + bias
        x = x if name == "head" else np.maximum(x, 0)
    atoms = () if net.num_atoms is None else (net.num_atoms,)
    return x.reshape(len(x), net.num_actions, *atoms), fresh


# --- convolutions -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("height", "width", "channels", "size", "stride", "features"),
    [
        (12, 12, 2, 4, 4, 3),
        (11, 13, 3, 4, 2, 2),  # odd maps
        (15, 10, 1, 4, 4, 5),  # the stride divides neither side: a rim is never read
        (9, 8, 2, 3, 2, 2),  # nor does it divide the kernel: no blocks to be had
        (7, 7, 2, 2, 3, 2),  # gaps between the windows
        (5, 6, 3, 3, 1, 4),
        (4, 4, 2, 4, 2, 3),  # one output position
    ],
)
def test_convolutions_against_brute_force(method, height, width, channels, size, stride, features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(size, size, channels, features)).astype(np.float32)
    expected = conv_oracle(x, kernel, stride)
    g = rng.normal(size=expected.shape).astype(np.float32)

    def forward_and_backward(x, kernel, g):
        y, pull = jax.vjp(lambda x, kernel: conv2d(x, kernel, stride, method), x, kernel)
        return y, *pull(g)

    y, dx, dkernel = jax.jit(forward_and_backward)(x, kernel, g)
    expected_dx, expected_dkernel = conv_gradients_oracle(x, kernel, stride, g)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dkernel, expected_dkernel, rtol=1e-5, atol=3e-5)
    np.testing.assert_allclose(conv2d(x, kernel, stride, method), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_under_vmap_over_kernels(method):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 2, 9, 9, 2)).astype(np.float32)
    kernels = rng.normal(size=(3, 4, 4, 2, 3)).astype(np.float32)
    got = jax.vmap(lambda x, kernel: conv2d(x, kernel, 2, method))(x, kernels)
    for y, one, kernel in zip(got, x, kernels, strict=True):
        np.testing.assert_allclose(y, conv_oracle(one, kernel, 2), rtol=1e-5, atol=1e-5)


def test_convolution_errors_name_what_is_allowed():
    x, kernel = jnp.zeros((1, 5, 3, 2)), jnp.zeros((4, 4, 2, 3))
    with pytest.raises(ValueError, match=r"a map of \(5, 3\) is smaller than the kernel \(4, 4\)"):
        conv2d(x, kernel, 1, "direct")
    with pytest.raises(ValueError, match="direct.*space_to_depth.*im2col.*found 'fft'"):
        conv2d(jnp.zeros((1, 5, 5, 2)), kernel, 1, "fft")


def test_a_network_is_the_same_under_every_method():
    obs, variables = observations(), with_biases(init(small_net(spectral=("all",))))
    expected = evaluate(small_net(spectral=("all",)), variables, obs)
    for method in METHODS[1:]:
        got = evaluate(small_net(spectral=("all",), conv_method=method), variables, obs)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# --- shapes and parameters --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "obs_shape", "outputs", "kernels"),
    [
        (
            networks.nature_net(6),
            (84, 84, 4),
            (6, 51),
            {
                "conv1": (8, 8, 4, 32),
                "conv2": (4, 4, 32, 64),
                "conv3": (3, 3, 64, 64),
                "fc": (3136, 512),
                "head": (512, 306),
            },
        ),
        (
            networks.nature_net(18, None, spectral=("-2",)),
            (84, 84, 4),
            (18,),
            {
                "conv1": (8, 8, 4, 32),
                "conv2": (4, 4, 32, 64),
                "conv3": (3, 3, 64, 64),
                "fc": (3136, 512),
                "head": (512, 18),
            },
        ),
        (
            networks.minatar_net(),
            (10, 10, 4),
            (6, 51),
            {"conv1": (3, 3, 4, 16), "fc": (1024, 128), "head": (128, 306)},
        ),
        (
            networks.minatar_net(4, None, convs=(24, 32), hidden=(256, 64)),
            (10, 10, 7),
            (4,),
            {
                "conv1": (3, 3, 7, 24),
                "conv2": (3, 3, 24, 32),
                "fc1": (1152, 256),
                "fc2": (256, 64),
                "head": (64, 4),
            },
        ),
    ],
)
def test_shapes(net, obs_shape, outputs, kernels):
    obs = jax.ShapeDtypeStruct((5, *obs_shape), jnp.uint8)
    variables = jax.eval_shape(lambda obs: net.init(jax.random.key(0), obs, train=True), obs)
    got = {name: layer["kernel"].shape for name, layer in variables["params"].items()}
    assert got == kernels and tuple(kernels) == net.layer_names
    for layer in variables["params"].values():
        assert layer["bias"].shape == layer["kernel"].shape[-1:]
    y = jax.eval_shape(
        lambda variables, obs: net.apply(variables, obs, train=False), variables, obs
    )
    assert y.shape == (5, *outputs) and y.dtype == jnp.float32


def test_initial_parameters_are_xavier_uniform_with_zero_biases():
    params = init(networks.minatar_net(), shape=(1, 10, 10, 4))["params"]
    for layer in params.values():
        kernel = np.asarray(layer["kernel"])
        area = np.prod(kernel.shape[:-2])
        limit = np.sqrt(6 / (area * (kernel.shape[-2] + kernel.shape[-1])))
        assert 0.97 * limit < np.abs(kernel).max() <= limit
        assert abs(kernel.std() - limit / np.sqrt(3)) < 0.05 * limit
        assert not np.asarray(layer["bias"]).any()


@pytest.mark.parametrize("spec", [("-2",), ("all",), ("allL",), ("conv1", "headL")])
def test_hooks_leave_the_initial_parameters_unchanged(spec):
    plain = init(small_net())
    assert "spectral" not in plain
    hooked = init(small_net(spectral=spec))
    assert_identical(hooked["params"], plain["params"])


def test_initial_vectors():
    hooks = init(small_net(spectral=("all",)))["spectral"]
    shapes = {name: (hook["u"].shape, hook["v"].shape) for name, hook in hooks.items()}
    assert shapes == {
        "conv1": ((5, 4, 4), (12, 11, 3)),
        "conv2": ((2, 1, 6), (5, 4, 4)),
        "fc": ((8,), (12,)),
        "head": ((15,), (8,)),
    }
    for hook in hooks.values():
        np.testing.assert_allclose(np.linalg.norm(np.ravel(hook["u"])), 1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(np.ravel(hook["v"])), 1, rtol=1e-5)
        assert hook["sigma"].shape == () and hook["sigma"] > 0


# --- hooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "spec", "modes"),
    [
        (networks.nature_net(6), ("-2",), {"fc": "normalise"}),
        (networks.minatar_net(), ("-2",), {"fc": "normalise"}),
        (networks.minatar_net(hidden=(9, 8)), ("-2", "-3L"), {"fc1": "log", "fc2": "normalise"}),
        (networks.minatar_net(hidden=()), ("-2",), {"conv1": "normalise"}),
        (networks.nature_net(6), ("-1L",), {"head": "log"}),
        (networks.nature_net(6, div_out=True), ("-2", "-3"), {"conv3": "log", "fc": "log"}),
    ],
)
def test_which_layers_are_hooked(net, spec, modes):
    assert net.clone(spectral=spec).hooks() == modes


def test_an_unknown_layer_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="no layer '-5'.*'-1'.*'conv1'.*'fc'.*'head'"):
        init(small_net(spectral=("-5",)))


def test_observations_need_a_batch_axis():
    with pytest.raises(ValueError, match=r"\(B, H, W, C\), found \(12, 11, 3\)"):
        init(small_net(), shape=OBS[1:])


@pytest.mark.parametrize(
    ("spec", "bound", "num_atoms"),
    [
        ((), None, None),
        (("-2",), None, 5),
        (("-2",), 0.5, None),
        (("-2",), 10.0, 5),
        (("all",), None, None),
        (("all",), 0.5, 5),
        (("-2", "conv2L"), None, 5),
        (("conv1",), None, 5),
    ],
)
def test_forward_is_that_of_materialised_weights(spec, bound, num_atoms):
    net = small_net(num_atoms, spectral=spec, bound=bound)
    obs, variables = observations(), with_biases(init(net))
    y, after = train(net, variables, obs)
    expected, fresh = net_oracle(net, variables, obs, net.hooks(), bound)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert set(after.get("spectral", {})) == set(fresh)
    for name, (sigma, u, v) in fresh.items():
        hook = after["spectral"][name]
        np.testing.assert_allclose(hook["sigma"], sigma, rtol=1e-5)
        np.testing.assert_allclose(np.ravel(hook["u"]), u, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.ravel(hook["v"]), v, rtol=1e-4, atol=1e-5)
    # Evaluation with the new vectors: the same function of the input.
    np.testing.assert_allclose(evaluate(net, after, obs), expected, rtol=1e-4, atol=1e-5)


def test_bounds_may_be_traced_and_vmapped():
    obs, variables = observations(), with_biases(init(small_net(spectral=("all",))))

    def forward(bound):
        return small_net(spectral=("all",), bound=bound).apply(variables, obs, train=False)

    got = jax.jit(jax.vmap(forward))(jnp.array([0.3, 2.0]))
    np.testing.assert_allclose(got[0], forward(0.3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], forward(2.0), rtol=1e-5, atol=1e-6)
    assert np.abs(got[0] - got[1]).max() > 1e-2


@pytest.mark.parametrize("spec", [("-2L",), ("allL",)])
def test_logging_changes_nothing_bit_for_bit(spec):
    obs, variables = observations(), with_biases(init(small_net(spectral=spec)))

    @jax.jit
    def plain(params):
        return jax.value_and_grad(
            lambda p: jnp.square(small_net().apply({"params": p}, obs, train=True)).sum()
        )(params)

    @jax.jit
    def logged(params):
        def loss(p):
            y, mutated = small_net(spectral=spec).apply(
                {**variables, "params": p}, obs, train=True, mutable=["spectral"]
            )
            return jnp.square(y).sum(), mutated

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, mutated), gradients = logged(variables["params"])
    assert_identical((value, gradients), plain(variables["params"]))
    moved = mutated["spectral"]["fc"]["u"] - variables["spectral"]["fc"]["u"]
    assert np.abs(moved).max() > 1e-3


@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("spec", [("-2",), ("-1", "-2L"), ("all",)])
def test_div_out_divides_by_the_norms(spec, bound):
    obs = observations()
    net = small_net(spectral=spec, div_out=True, bound=bound)
    variables = with_biases(init(net))
    y, after = train(net, variables, obs)
    sigmas = np.array([hook["sigma"] for hook in after["spectral"].values()])
    factor = np.prod(sigmas if bound is None else np.maximum(sigmas / bound, 1))
    plain = evaluate(small_net(), {"params": variables["params"]}, obs)
    np.testing.assert_allclose(y, np.asarray(plain) / factor, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(evaluate(net, after, obs), y, rtol=1e-5, atol=1e-6)


def test_div_out_on_every_layer_without_biases_is_the_normalised_network():
    obs, variables = observations(), init(small_net(spectral=("all",)))
    divided, _ = train(small_net(spectral=("all",), div_out=True), variables, obs)
    normalised, _ = train(small_net(spectral=("all",)), variables, obs)
    np.testing.assert_allclose(divided, normalised, rtol=1e-4, atol=1e-6)


# --- when u advances --------------------------------------------------------------------------


def test_vectors_advance_once_per_training_forward_and_never_in_evaluation():
    net, obs = small_net(spectral=("-2", "conv2", "headL")), observations()
    variables = init(net)

    @jax.jit
    def hold(variables):
        return net.apply(variables, obs, train=False, mutable=["spectral"])

    for _ in range(3):
        before = variables["spectral"]
        for _ in range(2):
            y, held = hold(variables)
            assert np.isfinite(y).all()
            assert_identical(held.get("spectral", before), before)
        _, variables_after = train(net, variables, obs)
        after = variables_after["spectral"]
        for name in ("fc", "head"):
            kernel = variables["params"][name]["kernel"]
            sigma, u, v = spectral.power_iteration_dense(kernel, before[name]["u"])
            expected = {"sigma": sigma, "u": u, "v": v}
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                after[name],
                expected,
            )
        assert np.abs(after["conv2"]["u"] - before["conv2"]["u"]).max() > 1e-4
        variables = variables_after


def test_a_training_forward_without_a_mutable_collection_keeps_it():
    net, obs = small_net(spectral=("all",)), observations()
    variables = init(net)
    kept = jax.jit(lambda v: net.apply(v, obs, train=True))(variables)
    changed, _ = train(net, variables, obs)
    np.testing.assert_allclose(kept, changed, rtol=1e-6, atol=1e-6)


def test_the_first_training_forward_starts_from_the_vector_as_drawn():
    net = small_net(spectral=("-2",))
    variables = init(net)
    # v and sigma are filled in, u is not advanced: it is no image of the kernel yet.
    hook, kernel = variables["spectral"]["fc"], variables["params"]["fc"]["kernel"]
    sigma, u, v = spectral.power_iteration_dense(kernel, hook["u"])
    np.testing.assert_allclose(hook["v"], v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hook["sigma"], sigma, rtol=1e-5)
    assert np.abs(u - hook["u"]).max() > 1e-2


def test_evaluation_measures_the_current_kernel_with_the_stored_vectors():
    net, obs = small_net(spectral=("-2",)), observations()
    variables = with_biases(init(net))
    _, after = train(net, variables, obs)
    rng = np.random.default_rng(2)
    kernel = np.asarray(variables["params"]["fc"]["kernel"])
    kernel = kernel + rng.normal(size=kernel.shape).astype(np.float32) * 0.1
    params = {**variables["params"], "fc": {**variables["params"]["fc"], "kernel": kernel}}
    got = evaluate(net, {**after, "params": params}, obs)
    hook = jax.tree.map(lambda x: np.asarray(x, np.float64), after["spectral"]["fc"])
    sigma = hook["v"] @ kernel.astype(np.float64) @ hook["u"]
    assert abs(sigma - hook["sigma"]) > 1e-3
    materialised = {**params, "fc": {**params["fc"], "kernel": kernel / sigma}}
    expected, _ = net_oracle(net, {"params": materialised}, obs, {})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# --- the paper's network ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["direct", "space_to_depth"])
def test_nature_network_follows_torch(method):
    torch = pytest.importorskip("torch")
    net = networks.nature_net(6, conv_method=method)
    obs = observations(shape=(2, 84, 84, 4))
    variables = with_biases(init(net, shape=(1, 84, 84, 4)))
    got = evaluate(net, variables, obs)

    def tensor(array):
        return torch.from_numpy(np.array(array))

    params = variables["params"]
    x = tensor(obs).float().permute(0, 3, 1, 2) / 255
    for name, stride in (("conv1", 4), ("conv2", 2), ("conv3", 1)):
        weight = tensor(params[name]["kernel"]).permute(3, 2, 0, 1)
        x = torch.conv2d(x, weight, tensor(params[name]["bias"]), stride=stride).relu()
    x = x.permute(0, 2, 3, 1).flatten(1)  # our dense layer reads channels last
    x = (x @ tensor(params["fc"]["kernel"]) + tensor(params["fc"]["bias"])).relu()
    x = x @ tensor(params["head"]["kernel"]) + tensor(params["head"]["bias"])
    np.testing.assert_allclose(got, x.reshape(2, 6, 51).numpy(), rtol=1e-4, atol=1e-4)
