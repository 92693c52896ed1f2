"""The stochastic bottleneck of a variational autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._errors import check_sizes, check_type
from ...functional import gaussian_rsample_kl


class GaussianLatent(nn.Module):
    r"""The stochastic bottleneck of a VAE: two linear heads, a draw, and the KL divergence to the prior.

    .. math::
        \mu = x W_\mu^\top + b_\mu, \quad v = x W_v^\top + b_v, \quad z = \mu + e^{v/2} \odot \varepsilon

    Args:
        in_features: size of the encoder's output.
        latent_features: size of the code.
        bias: whether the heads have biases.
        num_samples, free_bits, logvar_range, reduction: as in
            :func:`lect11ext.functional.gaussian_rsample_kl`.

    Shape: ``[*, in_features]`` in; ``(z, kl)`` out, z ``[*, latent_features]`` (``[K, *, latent_features]`` with
    ``num_samples=K``) and kl ``[*]`` with the default reduction.

    Parameters: ``mean.weight``, ``mean.bias``, ``logvar.weight``, ``logvar.bias``, initialised as torch.nn.Linear's.

    In ``eval()`` it draws too; ``module.mean(x)`` is the code without noise.

    Source: Kingma & Welling 2014.

    Example::

        >>> import torch, lect11ext
        >>> latent = lect11ext.nn.GaussianLatent(16, 2)
        >>> z, kl = latent(torch.randn(8, 16))
        >>> z.shape, kl.shape
        (torch.Size([8, 2]), torch.Size([8]))
    """

    def __init__(
        self,
        in_features: int,
        latent_features: int,
        bias: bool = True,
        *,
        num_samples: int | None = None,
        free_bits: float = 0.0,
        logvar_range: tuple[float, float] | None = None,
        reduction: str = "sum_latent",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_features=in_features, latent_features=latent_features)
        super().__init__()
        check_type("bias", bias, (bool,))
        self.mean = nn.Linear(in_features, latent_features, bias, device, dtype)
        self.logvar = nn.Linear(in_features, latent_features, bias, device, dtype)
        self.num_samples = num_samples
        self.free_bits = free_bits
        self.logvar_range = logvar_range
        self.reduction = reduction
        self._draw(
            *[torch.zeros(0, 1, device="cpu")] * 2, key=torch.zeros(2, dtype=torch.int64, device="cpu")
        )  # checks

    def forward(
        self,
        input: Tensor,
        prior_mean: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns ``(z, kl)``; the prior, ``generator`` and ``key`` go to the function as they are."""
        return self._draw(
            self.mean(input),
            self.logvar(input),
            prior_mean=prior_mean,
            prior_logvar=prior_logvar,
            generator=generator,
            key=key,
        )

    def _draw(self, mean: Tensor, logvar: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return gaussian_rsample_kl(
            mean,
            logvar,
            num_samples=self.num_samples,
            free_bits=self.free_bits,
            logvar_range=self.logvar_range,
            reduction=self.reduction,
            **options,
        )

    def extra_repr(self) -> str:
        return (
            f"num_samples={self.num_samples}, free_bits={self.free_bits}, "
            f"logvar_range={self.logvar_range}, reduction={self.reduction!r}"
        )


class ConditionalGaussianLatent(GaussianLatent):
    r"""The stochastic bottleneck of a conditional VAE: posterior and prior both see a condition y.

    .. math::
        z \sim q(z \mid x, y) = N(\mu, e^v), \qquad
        \mathrm{KL}\left( q(z \mid x, y) \,\|\, N(\mu_p(y), e^{v_p(y)}) \right)

    with all four of them linear, the posterior's in ``[x, y]``, the prior's in y.

    Args:
        in_features: size of the encoder's output.
        condition_features: size of the condition.
        latent_features: size of the code.
        bias, num_samples, free_bits, logvar_range, reduction: as for :class:`GaussianLatent`.

    Shape: ``[*, in_features]`` and ``[*, condition_features]`` in; ``(z, kl)`` out.

    Parameters: those of :class:`GaussianLatent`, and ``prior_mean`` and ``prior_logvar``, linear layers too. To
    generate, :meth:`sample_prior` draws z from the condition alone.

    Source: Sohn, Lee & Yan 2015.

    Example::

        >>> import torch, lect11ext
        >>> latent = lect11ext.nn.ConditionalGaussianLatent(16, 10, 2)
        >>> y = torch.nn.functional.one_hot(torch.arange(8), 10).float()
        >>> z, kl = latent(torch.randn(8, 16), y)
        >>> z.shape, kl.shape, latent.sample_prior(y).shape
        (torch.Size([8, 2]), torch.Size([8]), torch.Size([8, 2]))
    """

    def __init__(
        self,
        in_features: int,
        condition_features: int,
        latent_features: int,
        bias: bool = True,
        *,
        num_samples: int | None = None,
        free_bits: float = 0.0,
        logvar_range: tuple[float, float] | None = None,
        reduction: str = "sum_latent",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_features=in_features, condition_features=condition_features)
        super().__init__(
            in_features + condition_features, latent_features, bias, num_samples=num_samples, free_bits=free_bits,
            logvar_range=logvar_range, reduction=reduction, device=device, dtype=dtype,
        )  # fmt: skip
        self.prior_mean = nn.Linear(condition_features, latent_features, bias, device, dtype)
        self.prior_logvar = nn.Linear(condition_features, latent_features, bias, device, dtype)

    def forward(  # type: ignore[override]
        self, input: Tensor, condition: Tensor, *, generator: torch.Generator | None = None, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns ``(z, kl)``; ``generator`` and ``key`` go to the function as they are."""
        both = torch.cat([input, condition], -1)
        prior = {"prior_mean": self.prior_mean(condition), "prior_logvar": self.prior_logvar(condition)}
        return self._draw(self.mean(both), self.logvar(both), **prior, generator=generator, key=key)

    def sample_prior(
        self, condition: Tensor, *, generator: torch.Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """z of the prior, for what is to be generated; ``num_samples`` of them where the module has it."""
        mean, logvar = self.prior_mean(condition), self.prior_logvar(condition)
        return self._draw(mean, logvar, generator=generator, key=key)[0]
