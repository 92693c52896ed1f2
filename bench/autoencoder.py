"""gaussian_rsample_kl against the eager idiom, torch.distributions, and torch.compile with both of its generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lect11ext.functional import gaussian_rsample_kl

from .common import Call, Workload, call_of, parametrize, run_turn

LATENT = 64
ELEMENTS = [2**14, 2**16, 2**18, 2**20, 2**22]


def _idiom(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """What everybody writes."""
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    return z, -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(-1)


def _distributions(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    posterior = Normal(mean, torch.exp(0.5 * logvar), validate_args=False)
    prior = Normal(torch.zeros(()), torch.ones(()), validate_args=False)
    return posterior.rsample(), kl_divergence(posterior, prior).sum(-1)


def _sampling(elements: int, train: bool) -> Workload:
    def make() -> dict[str, Call]:
        mean = torch.randn(elements // LATENT, LATENT, requires_grad=train)
        logvar = torch.randn(elements // LATENT, LATENT, requires_grad=train)
        args, grads = [mean, logvar], [torch.randn_like(mean), torch.randn(elements // LATENT)]

        def call(function: Any) -> Call:
            return call_of(function, args, args, grads if train else None)

        # The implementations draw different noise, so what is compared is what they agree on: the KL.
        _, ours = gaussian_rsample_kl(mean.detach(), logvar.detach())
        torch.testing.assert_close(ours, _idiom(mean.detach(), logvar.detach())[1], rtol=1e-4, atol=1e-3)
        return {
            "lect11ext": call(gaussian_rsample_kl),
            "eager": call(_idiom),
            "distributions": call(_distributions),
            "compile": call(torch.compile(_idiom)),
            "fallback_random": call(torch.compile(_idiom, options={"fallback_random": True})),
        }

    return Workload(
        f"gaussian_rsample_kl/{'train' if train else 'forward'}/float32/{elements}",
        make,
        ("lect11ext", "eager", "distributions", "compile", "fallback_random"),
        work={"copy": (12.0 + (20.0 if train else 0.0)) * elements},
        check=False,
    )


WORKLOADS = [_sampling(elements, train) for train in (False, True) for elements in ELEMENTS]


@parametrize(WORKLOADS)
def test_sampling(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
