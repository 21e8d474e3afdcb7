"""The noise levels that a rectified flow is trained at, and the loss at each of them."""

import math
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .losses import Loss


# Intervals of equal width from 0 to 1 over which the loss is logged.
NUM_BINS = 10


@dataclass(frozen=True)
class NoiseLevels:
    """A distribution of noise levels in (0, 1), moved towards noise by a shift that may depend on the sample's length.

    A level s becomes shift s / (1 + (shift - 1) s), as in `FlowMatchEulerDiscreteScheduler`. A longer sample says more
    about itself through the same noise, so that it needs more noise to be as hard.

    Attributes:
        sampling: "logit_normal" (arXiv 2403.03206, section 3.1; mean 0, deviation 1) or "uniform".
        shift: The shift; with another scaling than "constant", that of a sample of `base_tokens` tokens.
        scaling: "constant"; "sqrt", with the root of the number of tokens (arXiv 2403.03206, equation 23, as Stable
            Diffusion 3); or "exponential", by which the logarithm of the shift is linear in the number of tokens (as
            Flux).
        base_tokens: Tokens of a sample that has `shift`.
        max_shift: With "exponential", shift of a sample of `max_tokens` tokens.
        max_tokens: See `max_shift`.
    """

    sampling: str
    shift: float
    scaling: str = "constant"
    base_tokens: int = 1
    max_shift: float = 1.0
    max_tokens: int = 2

    def shifts(self, num_tokens: Tensor) -> Tensor:
        """Returns the shift of samples of so many tokens, `[B]` float32."""
        tokens = num_tokens.float()
        if self.scaling == "constant":
            return torch.full_like(tokens, self.shift)
        if self.scaling == "sqrt":
            return self.shift * (tokens / self.base_tokens).sqrt()
        slope = math.log(self.max_shift / self.shift) / (self.max_tokens - self.base_tokens)
        return torch.exp(math.log(self.shift) + slope * (tokens - self.base_tokens))

    def at(self, quantiles: Tensor, num_tokens: Tensor) -> Tensor:
        """Returns the noise levels of samples, `[B]` float32.

        Args:
            quantiles: Where the levels are in the distribution before the shift, `[B]` in (0, 1).
            num_tokens: Tokens of the samples, `[B]`.
        """
        levels = torch.special.ndtri(quantiles).sigmoid() if self.sampling == "logit_normal" else quantiles
        shifts = self.shifts(num_tokens)
        return shifts * levels / (1 + (shifts - 1) * levels)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Returns the scheduler that samples with the same shift.

        With "exponential" it shifts by the number of tokens, too. There is none that does so with "sqrt": it has the
        shift of `base_tokens` tokens for all samples, as Stable Diffusion 3 has one shift in sampling.
        """
        if self.scaling != "exponential":
            return FlowMatchEulerDiscreteScheduler(shift=self.shift)
        return FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=math.log(self.shift),
            max_shift=math.log(self.max_shift),
            base_image_seq_len=self.base_tokens,
            max_image_seq_len=self.max_tokens,
            time_shift_type="exponential",
        )


def losses_by_level(errors: Tensor, levels: Tensor) -> dict[str, Loss]:
    """Returns the loss in each interval of noise levels, as "sigma/0.3" for levels from 0.3 to 0.4.

    Args:
        errors: Error of each token, `[N]`.
        levels: Its noise level, `[N]`.
    """
    bins = (levels * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    members = bins[:, None] == torch.arange(NUM_BINS, device=bins.device)
    totals, numbers = (errors.detach()[:, None] * members).sum(0), members.sum(0)
    return {f"sigma/{place / NUM_BINS:.1f}": Loss(totals[place], numbers[place]) for place in range(NUM_BINS)}
