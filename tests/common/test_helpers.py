"""The rule itself can fail."""

import pytest
import torch

from tests.helpers import assert_within_rule, check


def test_rule_accepts_rounding_and_rejects_more() -> None:
    exact = torch.randn(100, dtype=torch.float64)
    plain = exact.float()
    assert_within_rule(plain, plain, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_within_rule(plain * (1 + 1e-5), plain, exact)
    with pytest.raises(AssertionError):
        assert_within_rule(torch.full_like(plain, float("nan")), plain, exact)


def test_check_sees_a_wrong_gradient() -> None:
    x = torch.randn(5, requires_grad=True)
    check(lambda x: x * 2, lambda x: x + x, [x])
    with pytest.raises(AssertionError):
        check(lambda x: x.detach() + x, lambda x: x + x, [x])
