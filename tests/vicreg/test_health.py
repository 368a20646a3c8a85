"""When a run is called sick, and in what words."""

import math

import pytest

from vicreg.health import CollapseError, Health, NonFiniteError

WELL = {"loss": 20.0, "grad_norm": 3.0, "std": 0.9, "rankme": 40.0, "nonfinite": 0.0, "lr": 0.1}
FLAT = {**WELL, "std": 0.0123}
LINE = {**WELL, "rankme": 1.25}
LOSSES = ("vicreg", "simclr", "barlow_twins", "supervised")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_may_be_well(loss):
    health = Health(loss)
    for _ in range(3):
        assert health.check(WELL) is None and not health.suspect
    # At the bounds, too.
    for _ in range(3):
        assert health.check({**WELL, "std": 0.1, "rankme": 1.5}) is None and not health.suspect


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss", math.nan, "^loss is nan$"),
        ("loss", -math.inf, "^loss is -inf$"),
        ("grad_norm", math.inf, "^grad_norm is inf$"),
        ("nonfinite", 3.0, "^3 embeddings are not finite$"),
        ("nonfinite", math.nan, "embeddings are not finite"),
    ],
)
def test_numbers_that_are_not_finite_are_named_at_once(loss, name, value, message):
    with pytest.raises(NonFiniteError, match=message):
        Health(loss).check({**WELL, name: value})


def test_embeddings_are_named_before_what_they_lead_to():
    with pytest.raises(NonFiniteError, match="64 embeddings"):
        Health("vicreg").check(dict.fromkeys(WELL, math.nan) | {"nonfinite": 64.0})


def test_a_collapse_takes_two_checks_in_a_row():
    health = Health("vicreg")
    found = [health.check(metrics) for metrics in (FLAT, WELL, FLAT, FLAT, FLAT, WELL, FLAT)]
    said = "the embeddings have collapsed: their mean standard deviation is 0.0123"
    assert found == [None, None, None, said, said, None, None]


def test_a_first_sign_makes_the_state_suspect():
    health = Health("vicreg")
    assert not health.suspect
    for metrics, suspect in ((FLAT, True), (WELL, False), (LINE, True), (FLAT, True)):
        health.check(metrics)
        assert health.suspect == suspect


@pytest.mark.parametrize(
    ("loss", "metrics", "words"),
    [
        ("vicreg", FLAT, "their mean standard deviation is 0.0123"),
        ("vicreg", LINE, "their effective rank is 1.25"),
        (
            "vicreg",
            FLAT | {"rankme": 1.0},
            "their mean standard deviation is 0.0123 and their effective rank is 1",
        ),
        ("simclr", FLAT, None),
        ("simclr", LINE, "their effective rank is 1.25"),
        ("barlow_twins", FLAT, None),
        ("barlow_twins", LINE, "their effective rank is 1.25"),
        ("supervised", FLAT, None),
        ("supervised", LINE, None),
        # The singular values of what overflows.
        ("vicreg", WELL | {"rankme": math.nan}, "their effective rank is nan"),
    ],
)
def test_what_a_collapse_is_depends_on_the_loss(loss, metrics, words):
    health = Health(loss)
    assert health.check(metrics) is None
    assert health.check(metrics) == (words and f"the embeddings have collapsed: {words}")


def test_both_errors_end_a_run_and_are_no_bad_input():
    for error in (NonFiniteError, CollapseError):
        assert issubclass(error, RuntimeError) and not issubclass(error, ValueError)
