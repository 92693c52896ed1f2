"""Fixtures of attention's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads gain nothing with the tests' small tensors, and on busy cores wait for each other most of the time.
    What they compute has tests of its own: the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
