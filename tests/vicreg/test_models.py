"""Backbones against torchvision's and NumPy's, sharded against whole, and weights in and out."""

import dataclasses
import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vicreg import models, torch_weights
from vicreg.config import ModelConfig

CONVNET = ModelConfig("convnet", width=8, expander=(16, 12))
NARROW = ModelConfig("resnet18", stem="cifar", width=8)


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shapes_of(module, *shape):
    """The variables' shapes, which cost no compilation."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)


def random_variables(config, shape, seed=0):
    """Variables of a backbone in which no BatchNorm is at its start."""
    return randomised(shapes_of(models.make_backbone(config), *shape), seed)


def randomised(variables, seed=0):
    """Random variables of the same shapes; scales and variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = leaf.size // leaf.shape[-1]
            return rng.normal(size=leaf.shape).astype(np.float32) * np.float32(fan_in**-0.5)
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(size=leaf.shape).astype(np.float32) * np.float32(0.2)

    return jax.tree.map_with_path(draw, variables)


def relative(got, want):
    """Largest error in units of the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)


def assert_trees_close(got, want, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < tolerance, jax.tree_util.keystr(path)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Sizes and initial values.


@pytest.mark.parametrize(
    ("name", "parameters", "features"),
    [("resnet18", 11_176_512, 512), ("resnet34", 21_284_672, 512), ("resnet50", 23_508_032, 2048)],
)
def test_a_resnet_has_torchvisions_parameters(name, parameters, features):
    config = ModelConfig(name)
    backbone = models.make_backbone(config)
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    y, variables = jax.eval_shape(lambda x: backbone.init_with_output(KEY(), x, train=False), x)
    assert count(variables["params"]) == parameters
    assert y.shape == (2, features) and y.dtype == jnp.float32
    assert models.feature_dim(config) == features


def KEY():
    return jax.random.key(0)


def test_the_expander_has_the_papers_parameters():
    config = ModelConfig("resnet50", expander=(8192, 8192, 8192))
    expander = models.make_expander(config)
    h = jax.ShapeDtypeStruct((2, 2048), jnp.float32)
    z, variables = jax.eval_shape(lambda h: expander.init_with_output(KEY(), h, train=False), h)
    assert count(variables["params"]) == 151_044_096
    assert z.shape == (2, 8192)
    assert set(variables["params"]) == {"dense1", "bn1", "dense2", "bn2", "dense3"}
    assert set(variables["params"]["dense3"]) == {"kernel"}


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (3, 27, 30, 5), (1, 4, 1, 2)])
def test_any_size_and_number_of_channels(shape):
    for config in (CONVNET, NARROW, ModelConfig("resnet50", width=2)):
        backbone = models.make_backbone(config)
        y = jax.eval_shape(
            lambda x, b=backbone: b.init_with_output(KEY(), x, train=True)[0],
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
        assert y.shape == (shape[0], models.feature_dim(config))


@pytest.mark.parametrize("bottleneck", [False, True])
def test_initial_values_of_a_block(bottleneck):
    block, x = models.Block(64, 2, bottleneck, jnp.float32), jnp.asarray(images(1, 2, 2, 32))
    variables = jax.jit(functools.partial(block.init, train=True))(KEY(), x)
    params, stats = variables["params"], variables["batch_stats"]
    layers = "123" if bottleneck else "12"
    for i in layers:
        start = 0 if i == layers[-1] else 1  # so that a block begins as its shortcut
        assert (params[f"bn{i}"]["scale"] == start).all() and not params[f"bn{i}"]["bias"].any()
        assert not stats[f"bn{i}"]["mean"].any() and (stats[f"bn{i}"]["var"] == 1).all()
    assert (params["downsample_1"]["scale"] == 1).all()
    kernel = params["conv2"]["kernel"]  # (3, 3, 64, 64)
    assert float(kernel.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    kernel = params["downsample_0"]["kernel"]  # the fan-out counts
    assert float(kernel.std()) == pytest.approx((2 / kernel.shape[-1]) ** 0.5, rel=0.05)
    assert params["conv1"]["kernel"].shape[:2] == ((1, 1) if bottleneck else (3, 3))


def test_initial_values_of_the_expander():
    expander = models.make_expander(CONVNET)
    dense = expander.init(KEY(), jnp.zeros((2, 64)), train=True)["params"]["dense1"]
    assert 0.11 < float(jnp.abs(dense["kernel"]).max()) <= 0.125  # U(-1/√64, 1/√64)
    assert not dense["bias"].any()


def test_initialising_over_seeds_at_once():
    # With an axis, which init has no need of.
    expander = models.make_expander(CONVNET, axis_name="data")
    h, keys = images(4, 10), jax.random.split(KEY(), 3)
    variables = jax.vmap(lambda key: expander.init(key, h, train=True))(keys)
    assert variables["params"]["dense1"]["kernel"].shape == (3, 10, 16)
    one = jax.tree.map(lambda leaf: leaf[1], variables)
    assert_trees_close(one, expander.init(keys[1], h, train=False), 1e-6)
    backbone = models.make_backbone(NARROW, axis_name="data")
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    init = jax.vmap(lambda key, x: backbone.init(key, x, train=True), in_axes=(0, None))
    shapes = jax.eval_shape(init, keys, x)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(shapes)} == {3}


def apply_all(module, variables, x):
    y, changed = module.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, changed["batch_stats"]


# Against NumPy in float64.


def np_conv(x, kernel, stride):
    size, half = kernel.shape[0], kernel.shape[0] // 2
    x = np.pad(np.float64(x), ((0, 0), (half, half), (half, half), (0, 0)))
    rows, cols = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, cols, kernel.shape[3]))
    for r in range(rows):
        for c in range(cols):
            patch = x[:, r * stride : r * stride + size, c * stride : c * stride + size]
            y[:, r, c] = np.einsum("bijc,ijco->bo", patch, np.float64(kernel))
    return y


def np_batch_norm(x, params, stats, train):
    x = np.float64(x)
    flat = x.reshape(-1, x.shape[-1])
    mean, var = (flat.mean(0), flat.var(0)) if train else (stats["mean"], stats["var"])
    new = {
        "mean": 0.9 * stats["mean"] + 0.1 * flat.mean(0),
        "var": 0.9 * stats["var"] + 0.1 * flat.var(0, ddof=1),
    }
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"], new


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [(6, 28, 28, 1), (5, 13, 10, 3)])
def test_convnet_is_numpys(train, shape):
    variables = random_variables(CONVNET, shape)
    x = want = images(*shape)
    stats = {}
    for i in "123":
        want = np_conv(want, variables["params"][f"conv{i}"]["kernel"], 2)
        bn = f"bn{i}"
        want, stats[bn] = np_batch_norm(
            want, variables["params"][bn], variables["batch_stats"][bn], train
        )
        want = np.maximum(want, 0)
    backbone = models.make_backbone(CONVNET)
    if train:
        got, changed = jax.jit(functools.partial(apply_all, backbone))(variables, x)
        assert_trees_close(changed, stats, 1e-5)
    else:
        got = jax.jit(functools.partial(backbone.apply, train=False))(variables, x)
    assert got.dtype == jnp.float32
    assert relative(got, want.mean((1, 2))) < 1e-5


@pytest.mark.parametrize("train", [False, True])
def test_expander_is_numpys(train):
    expander = models.make_expander(CONVNET)
    h = images(7, 10)
    variables = randomised(expander.init(KEY(), h, train=False))
    params, stats = variables["params"], variables["batch_stats"]
    want = np.float64(h) @ params["dense1"]["kernel"] + params["dense1"]["bias"]
    want, new = np_batch_norm(want, params["bn1"], stats["bn1"], train)
    want = np.maximum(want, 0) @ params["dense2"]["kernel"]
    if train:
        got, changed = apply_all(expander, variables, h)
        assert_trees_close(changed, {"bn1": new}, 1e-5)
    else:
        got = expander.apply(variables, h, train=False)
    assert relative(got, want) < 1e-5


def test_an_expander_of_one_layer_is_linear():
    expander = models.make_expander(ModelConfig(expander=(5,)))
    variables = expander.init(KEY(), jnp.ones((1, 3)), train=False)
    assert set(variables) == {"params"}
    h = images(4, 3)
    z, changed = expander.apply(variables, h, train=True, mutable=["batch_stats"])
    assert relative(z, h @ np.asarray(variables["params"]["dense1"]["kernel"])) < 1e-5
    assert not changed


def batch_norm(**options):
    return models.BatchNorm(jnp.float32, **options)


def test_batch_norm_where_the_mean_is_large():
    x = images(64, 4, 4, 3) * np.float32(0.985) + np.float32(1e3)
    variables = batch_norm().init(KEY(), x, False)
    y, changed = apply_batch_norm(variables, x)
    flat = np.float64(x).reshape(-1, 3)
    want = 0.9 + 0.1 * flat.var(0, ddof=1)
    np.testing.assert_allclose(changed["batch_stats"]["var"], want, rtol=1e-6)
    normalised = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    assert relative(y, normalised.reshape(x.shape)) < 1e-4
    linen = nn.BatchNorm(use_running_average=False, momentum=0.9)
    _, changed = linen.apply(linen.init(KEY(), x), x, mutable=["batch_stats"])
    assert np.abs(changed["batch_stats"]["var"] - want).max() > 1e-3, "or Linen's would do"


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_batch_norms_gradient_is_the_formulas(shift):
    x, dy = images(5, 3, 2, 4) + np.float32(shift), images(5, 3, 2, 4, seed=1)
    variables = randomised(batch_norm().init(KEY(), x, False))

    def objective(params, x):
        y, _ = batch_norm().apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.sum(y * dy)

    grads, dx = jax.grad(objective, argnums=(0, 1))(variables["params"], x)
    flat, dflat = np.float64(x).reshape(-1, 4), np.float64(dy).reshape(-1, 4)
    inv = 1 / np.sqrt(flat.var(0) + 1e-5)
    normal = (flat - flat.mean(0)) * inv
    want = {"bias": dflat.sum(0), "scale": (dflat * normal).sum(0)}
    assert_trees_close(grads, want, 1e-5)
    want = dflat - dflat.mean(0) - normal * (dflat * normal).mean(0)
    want = (variables["params"]["scale"] * inv * want).reshape(x.shape)
    assert relative(dx, want) < 2e-5


def test_statistics_are_kept_only_on_demand():
    x = images(6, 3)
    fresh = batch_norm().init(KEY(), x, True)
    assert not fresh["batch_stats"]["mean"].any() and (fresh["batch_stats"]["var"] == 1).all()
    variables = randomised(fresh)
    y = batch_norm().apply(variables, x, True)
    assert relative(y, apply_batch_norm(variables, x)[0]) < 1e-6
    _, changed = batch_norm().apply(variables, x, False, mutable=["batch_stats"])
    assert_trees_close(changed["batch_stats"], variables["batch_stats"], 1e-12)


def apply_batch_norm(variables, x):
    return batch_norm().apply(variables, x, True, mutable=["batch_stats"])


# Sharded: the same features, statistics and gradients as of the whole batch on one device.


def small_resnet(axis_name=None, dtype=jnp.float32):
    """A block with and one without a strided shortcut: what the large ones repeat."""
    return models.ResNet((1, 1), False, False, 8, dtype, axis_name)


convnet = functools.partial(models.make_backbone, CONVNET)


def gradient(make, axis_name=None):
    """`(variables, x, cotangents) -> (features, batch_stats, gradients)`, the last two averaged."""
    backbone = make(axis_name)

    def run(variables, x, cotangents):
        def objective(params):
            y, stats = apply_all(backbone, {**variables, "params": params}, x)
            loss = jnp.sum(y * cotangents)
            return (loss if axis_name is None else lax.psum(loss, axis_name)), (y, stats)

        grads, (y, stats) = jax.grad(objective, has_aux=True)(variables["params"])
        return y, stats, grads if axis_name is None else lax.pmean(grads, axis_name)

    return run


def sharded_case(make, shape, features):
    variables = randomised(shapes_of(make(), *shape))
    # A mean of its own for each example, so that no device's statistics are the batch's.
    x = images(*shape) + np.arange(shape[0], dtype=np.float32)[:, None, None, None]
    return variables, x, images(shape[0], features, seed=1)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def whole():
    @functools.cache
    def run(make, *case):
        args = sharded_case(make, *case)
        return args, jax.jit(gradient(make))(*args)

    return run


CONVNET_CASE = (convnet, (16, 12, 12, 2), 32)
CASES = [
    *((CONVNET_CASE, devices) for devices in (1, 2, 4, 8)),
    ((small_resnet, (8, 8, 9, 3), 16), 4),
]


@pytest.mark.parametrize(("case", "devices"), CASES)
def test_a_sharded_batch_under_jit(whole, case, devices):
    args, want = whole(*case)
    mesh = mesh_of(devices)
    on_all, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    args = [jax.device_put(a, s) for a, s in zip(args, (on_all, rows, rows), strict=True)]
    got = jax.jit(gradient(case[0]), out_shardings=(rows, on_all, on_all))(*args)
    assert_trees_close(got, want, 1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("case", "devices"), CASES)
def test_a_sharded_batch_under_shard_map(whole, case, devices, check_vma):
    args, want = whole(*case)
    run = jax.shard_map(
        gradient(case[0], "data"),
        mesh=mesh_of(devices),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), P(), P()),
        check_vma=check_vma,
    )
    assert_trees_close(jax.jit(run)(*args), want, 1e-4)


@pytest.mark.parametrize("mapped", [jax.pmap, jax.vmap])
def test_a_split_batch_under_other_maps(whole, mapped):
    (variables, x, cotangents), (y, stats, grads) = whole(*CONVNET_CASE)
    run = mapped(gradient(convnet, "data"), axis_name="data", in_axes=(None, 0, 0))
    run = run if mapped is jax.pmap else jax.jit(run)
    got = run(variables, x.reshape(4, 4, *x.shape[1:]), cotangents.reshape(4, 4, -1))
    assert relative(got[0].reshape(y.shape), y) < 1e-4
    for device in range(4):
        replica = jax.tree.map(lambda leaf, device=device: leaf[device], got[1:])
        assert_trees_close(replica, (stats, grads), 1e-4)


def test_seeds_of_a_sharded_batch():
    shape = (8, 8, 8, 1)
    seeds = [random_variables(CONVNET, shape, seed) for seed in range(2)]
    _, x, cotangents = sharded_case(convnet, shape, 32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)
    run = jax.shard_map(
        jax.vmap(gradient(convnet, "data"), in_axes=(0, None, None)),
        mesh=mesh_of(2),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(None, "data"), P(), P()),
    )
    got = jax.jit(run)(stacked, x, cotangents)
    one = jax.jit(gradient(convnet))
    for i, variables in enumerate(seeds):
        want = one(variables, x, cotangents)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], got), want, 1e-4)


# bfloat16.


def test_bfloat16_is_the_computations():
    for config in (CONVNET, NARROW):
        config = dataclasses.replace(config, dtype="bfloat16")
        for module, shape in (
            (models.make_backbone(config), (8, 16, 16, 3)),
            (models.make_expander(config), (8, 10)),
        ):
            init = functools.partial(module.init_with_output, train=True)
            x = jax.ShapeDtypeStruct(shape, jnp.float32)
            everything = jax.eval_shape(lambda x, init=init: init(KEY(), x), x)
            assert {leaf.dtype for leaf in jax.tree.leaves(everything)} == {jnp.dtype("float32")}
            text = str(jax.make_jaxpr(lambda x, init=init: init(KEY(), x))(jnp.zeros(shape)))
            products = [
                line for line in text.splitlines() if "= conv_g" in line or "= dot_" in line
            ]
            assert products and all(":bf16[" in line for line in products)


def test_bfloat16_is_close():
    variables = randomised(shapes_of(small_resnet(), 8, 16, 16, 3))
    x = jnp.asarray(images(8, 16, 16, 3))
    want, want_stats = jax.jit(functools.partial(apply_all, small_resnet()))(variables, x)
    run = jax.jit(functools.partial(apply_all, small_resnet(dtype=jnp.bfloat16)))
    for dtype in (jnp.float32, jnp.bfloat16):  # of the images
        got, stats = run(variables, x.astype(dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves((got, stats))} == {jnp.dtype("float32")}
        assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.02
        assert_trees_close(stats, want_stats, 0.05)


# Bad input.


@pytest.mark.parametrize("config", [CONVNET, NARROW])
@pytest.mark.parametrize("train", [False, True])
def test_bad_images(config, train):
    variables, backbone = random_variables(config, (1, 8, 8, 3)), models.make_backbone(config)
    with pytest.raises(ValueError, match=r"images must have shape \(B, H, W, C\), found \(8, 8"):
        backbone.apply(variables, np.zeros((8, 8, 3), np.float32), train=train)
    with pytest.raises(ValueError, match="images must be of a floating type, found uint8"):
        backbone.apply(variables, np.zeros((1, 8, 8, 3), np.uint8), train=train)


def test_bad_features():
    expander = models.make_expander(CONVNET)
    with pytest.raises(ValueError, match=r"features must have shape \(B, F\), found \(2, 3, 4\)"):
        expander.init(KEY(), jnp.zeros((2, 3, 4)), train=False)
    with pytest.raises(ValueError, match="features must be of a floating type, found int32"):
        expander.init(KEY(), jnp.zeros((2, 3), jnp.int32), train=False)


# Weights in and out.

STATE_CONFIGS = [
    CONVNET,
    NARROW,
    ModelConfig("resnet34", width=4),
    ModelConfig("resnet50", width=4),
]


def state_dict(config, channels=3):
    """A state dict of random numbers, in torchvision's names."""
    return torch_weights.to_torch(random_variables(config, (1, 8, 8, channels)), config)


def test_names_and_layouts_are_torchvisions():
    state = state_dict(ModelConfig("resnet18", width=4))
    assert len(state) == 20 + 4 * 20
    assert state["conv1.weight"].shape == (4, 3, 7, 7)
    assert state["bn1.running_mean"].shape == (4,)
    assert state["layer2.0.conv1.weight"].shape == (8, 4, 3, 3)
    assert state["layer4.0.downsample.0.weight"].shape == (32, 16, 1, 1)
    assert state["layer4.0.downsample.1.running_var"].shape == (32,)
    config = ModelConfig("resnet18", width=4)
    variables = torch_weights.from_torch(state, config)
    kernel = variables["params"]["layer2_0"]["conv1"]["kernel"]
    assert kernel[0, 2, 1, 5] == state["layer2.0.conv1.weight"][5, 1, 0, 2]
    scale = variables["params"]["layer4_0"]["downsample_1"]["scale"]
    np.testing.assert_array_equal(scale, state["layer4.0.downsample.1.weight"])
    state = state_dict(ModelConfig("resnet50", width=4))
    assert len(state) == 53 + 4 * 53
    assert state["layer1.0.conv3.weight"].shape == (16, 4, 1, 1)


@pytest.mark.parametrize("config", STATE_CONFIGS, ids=lambda config: config.backbone)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_round_trip(config, channels, prefix):
    state = state_dict(config, channels)
    extra = {
        "fc.weight": np.zeros((10, 3), np.float32),
        "bn1.num_batches_tracked": np.asarray(7),
    }
    given = {prefix + name: array for name, array in {**state, **extra}.items()}
    if prefix:
        given["module.projector.0.weight"] = np.zeros((4, 4), np.float32)
    variables = torch_weights.from_torch(given, config)
    fresh = shapes_of(models.make_backbone(config), 1, 8, 8, channels)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), variables) == jax.tree.map(
        lambda a: (a.shape, a.dtype), fresh
    )
    back = torch_weights.to_torch(variables, config)
    assert list(back) == list(state)
    for name, array in state.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_weights_of_another_architecture():
    state = state_dict(NARROW)
    with pytest.raises(ValueError, match=r"not of a resnet18 of width 16 .* of another shape: "):
        torch_weights.from_torch(state, ModelConfig("resnet18", "cifar", 16))
    message = r"165 missing: layer1.0.bn3.running_mean, .*, …; 23 of another shape: .*, …$"
    with pytest.raises(ValueError, match=message):
        torch_weights.from_torch(state, ModelConfig("resnet50", "cifar", 8))
    message = r"1 of another shape: conv1.weight \(expected \(8, 3, 7, 7\), found \(8, 3, 3, 3\)\)"
    with pytest.raises(ValueError, match=message):
        torch_weights.from_torch(state, ModelConfig("resnet18", "imagenet", 8))
    with pytest.raises(ValueError, match="1 unexpected: projector.0.weight"):
        torch_weights.from_torch({**state, "projector.0.weight": np.zeros(3)}, NARROW)
    del state["layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match="1 missing: layer1.0.conv1.weight$"):
        torch_weights.from_torch(state, NARROW)
    with pytest.raises(ValueError, match="100 missing"):
        torch_weights.from_torch({}, NARROW)


def test_two_backbones_in_one_state_dict():
    state = state_dict(CONVNET)
    both = {f"{prefix}.{name}": a for name, a in state.items() for prefix in ("backbone", "model")}
    with pytest.raises(ValueError, match=r"several backbones, under \['backbone.', 'model.'\]"):
        torch_weights.from_torch(both, CONVNET)


def test_variables_of_another_architecture():
    variables = random_variables(NARROW, (1, 8, 8, 3))
    with pytest.raises(ValueError, match="not of a convnet of width 8"):
        torch_weights.to_torch(variables, CONVNET)
    with pytest.raises(ValueError, match="missing: batch_stats.bn1.mean"):
        torch_weights.to_torch({"params": variables["params"]}, NARROW)


# Against torchvision.


@pytest.fixture(scope="module")
def resnet():
    """`(name, width, stem) -> torchvision's ResNet` of any width, its statistics randomised."""
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision isn't installed")
    try:
        import torchvision.models.resnet as torchvision
    except RuntimeError:
        # Its compiled operators are of another build of torch. The models use none of them, but
        # importing it describes the outputs of two, which must then exist.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models.resnet as torchvision

    def make(name, width=64, stem="imagenet"):
        torch.manual_seed(0)
        model = getattr(torchvision, name)()
        if (width, stem) != (64, "imagenet"):
            block, counts = type(model.layer1[0]), [len(getattr(model, f"layer{i}")) for i in LAYER]
            size, stride = (7, 2) if stem == "imagenet" else (3, 1)
            model.conv1 = torch.nn.Conv2d(3, width, size, stride, size // 2, bias=False)
            model.bn1, model.inplanes = torch.nn.BatchNorm2d(width), width
            if stem == "cifar":
                model.maxpool = torch.nn.Identity()
            for i, blocks in zip(LAYER, counts, strict=True):
                w, stride = width * 2 ** (i - 1), 1 if i == 1 else 2
                setattr(model, f"layer{i}", model._make_layer(block, w, blocks, stride=stride))
        model.fc = torch.nn.Identity()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, std=0.2)
                torch.nn.init.normal_(module.running_mean, std=0.2)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model

    return make


LAYER = (1, 2, 3, 4)


def numpy_state(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def to_tensor(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


@pytest.mark.parametrize(
    ("name", "width", "stem", "size"),
    [
        ("resnet18", 64, "imagenet", (64, 64)),
        ("resnet18", 8, "imagenet", (57, 65)),
        ("resnet18", 8, "cifar", (33, 32)),
        ("resnet34", 8, "imagenet", (64, 64)),
        ("resnet50", 64, "imagenet", (57, 65)),
    ],
)
def test_evaluation_is_torchvisions(resnet, name, width, stem, size):
    import torch

    model = resnet(name, width, stem).eval()
    config = ModelConfig(name, stem, width)
    x = images(2, *size, 3)
    variables = torch_weights.from_torch(numpy_state(model), config)
    with torch.no_grad():
        want = model(to_tensor(x)).numpy()
    backbone = models.make_backbone(config)
    got = jax.jit(functools.partial(backbone.apply, train=False))(variables, x)
    assert relative(got, want) < 1e-4


def test_weights_go_back_into_torchvision(resnet):
    model = resnet("resnet18", 8)
    state, config = numpy_state(model), ModelConfig("resnet18", width=8)
    back = torch_weights.to_torch(torch_weights.from_torch(state, config), config)
    assert set(state) - set(back) == {name for name in state if "num_batches_tracked" in name}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])


def test_training_is_torchvisions(resnet):
    """Features, running statistics and gradients of one training step, in float64 over there."""
    config, shape = NARROW, (8, 15, 16, 3)
    model = resnet("resnet18", 8, "cifar").double().train()
    variables = torch_weights.from_torch(numpy_state(model), config)
    x, cotangents = images(*shape), images(8, 64, seed=1)
    got, stats, grads = jax.jit(gradient(lambda _: models.make_backbone(config)))(
        variables, x, cotangents
    )
    want = model(to_tensor(np.float64(x)))
    (want * to_tensor(np.float64(cotangents))).sum().backward()
    assert relative(got, want.detach().numpy()) < 1e-4
    after = torch_weights.from_torch(numpy_state(model), config)
    assert_trees_close(stats, after["batch_stats"], 1e-5)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    ours = torch_weights.to_torch({"params": grads, "batch_stats": stats}, config)
    assert len(theirs) == 60
    for name, grad in theirs.items():
        assert relative(ours[name], grad) < 1e-3, name
