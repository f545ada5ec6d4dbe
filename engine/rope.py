"""Rotary position embedding: cosine and sine of every position, for each way of stretching the frequencies.

The half-rotated convention of the Hugging Face checkpoints: dimension i turns with dimension i + head_dim/2.
Types: default (Su et al., arXiv:2104.09864), linear (kaiokendev), llama3 (Llama 3.1's published code), yarn
(Peng et al., arXiv:2309.00071), dynamic.

Dynamic NTK stretches the frequencies with the length of the whole sequence, so that a token's key would
depend on tokens after it. That contradicts the numeric contract (design.md §3.7) and makes a cached prefix
wrong for every longer sequence. Up to `max_position_embeddings` tokens it stretches nothing;
`ModelConfig.max_context` ends there, and within it dynamic is the default type.
"""

from __future__ import annotations

import math

import torch

from engine.models.config import ModelConfig
from engine.models.rope_config import RopeConfig, RopeType


def rope_tables(config: ModelConfig, max_context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0 … max_context - 1, times the type's attention scaling.

    Returns:
        Two [max_context, head_dim] float32 tensors whose second half repeats the first. An entry is a
        function of its position and of the config alone, not of `max_context`.

    Raises:
        ValueError: `max_context` is less than 1 or above `config.max_context`.
    """
    if not 1 <= max_context <= config.max_context:
        raise ValueError(
            f"a context of {max_context} tokens; the model's positions are good for 1 … {config.max_context}"
        )
    cos, sin = angle_tables(config.rope, config.head_dim, max_context)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def angle_tables(rope: RopeConfig, rotated_dim: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each position's angles, one for each pair of `rotated_dim` dimensions, times the type's
    attention scaling: [num_positions, rotated_dim / 2] float32 each."""
    # The angle is rounded to float32, as where the models were trained. Its cosine is taken in float64:
    # float32 kernels differ between a vector's body and its tail, so that an entry would depend on where it
    # lies in the table.
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, rotated_dim)).double()
    scaling = attention_scaling(rope)
    return angles.cos().float() * scaling, angles.sin().float() * scaling


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions: [head_dim / 2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = rope.theta**exponents
    match rope.type:
        case RopeType.DEFAULT | RopeType.DYNAMIC:
            return 1.0 / periods
        case RopeType.LINEAR:
            return 1.0 / periods / rope.factor
        case RopeType.LLAMA3:
            return _llama3(1.0 / periods, rope)
        case RopeType.YARN:
            return _yarn(periods, rope)


def attention_scaling(rope: RopeConfig) -> float:
    """What YaRN multiplies cosines and sines by; 1 for the other types."""
    if rope.type is not RopeType.YARN:
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """What YaRN multiplies attention by where it stretches positions by `factor` (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long wavelengths divided by the factor, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    original = rope.original_max_position_embeddings
    kept = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept) * frequencies / rope.factor + kept * frequencies
    is_long = wavelengths > original / rope.low_freq_factor
    is_short = wavelengths < original / rope.high_freq_factor
    return torch.where(is_long, frequencies / rope.factor, torch.where(is_short, frequencies, blended))


def _yarn(periods: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Dimensions that turn often within the original length keep their frequency, slow ones are stretched
    ("by parts")."""
    head_dim = 2 * len(periods)

    def dimension_of(num_turns: float) -> float:
        ratio = rope.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in the paper's code: a step instead of a ramp without width
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * periods) * stretched + 1.0 / periods * (1 - stretched)
