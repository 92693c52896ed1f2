"""The compiled module, csrc/python.cpp. All arguments are positional; what they mean: lect11ext.functional."""

from typing import TypedDict

from torch import Generator, Tensor

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    cpu_builds: str
    cuda: bool
    cuda_architectures: str

def gaussian_rsample_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    num_samples: int | None,
    free_bits: float,
    logvar_min: float | None,
    logvar_max: float | None,
    reduction: str,
    generator: Generator | None,
    key: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def corrupt(
    input: Tensor,
    kind: str,
    amount: float,
    low: float,
    high: float,
    return_mask: bool,
    generator: Generator | None,
    key: Tensor | None,
    /,
) -> tuple[Tensor, Tensor | None]: ...
def penalized_activation(
    input: Tensor, scale: Tensor | None, activation: str, penalty: str, /
) -> tuple[Tensor, Tensor]: ...
def topk_code(input: Tensor, k: int, activation: str, /) -> tuple[Tensor, Tensor]: ...
def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor: ...
def sparse_dots(dense: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor: ...
def reconstruction_loss(
    input: Tensor, target: Tensor, logvar: Tensor | None, weight: Tensor | None, likelihood: str, reduction: str, /
) -> Tensor: ...
def philox_key(like: Tensor, numel: int, generator: Generator | None, /) -> Tensor: ...
def lstm_cell(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    candidate: str,
    grad_clip: float | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def lstm_cell_packed(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    packed_ih: Tensor,
    packed_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    candidate: str,
    /,
) -> tuple[Tensor, Tensor]: ...
def gru_cell(
    input: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reset_after: bool,
    grad_clip: float | None,
    /,
) -> Tensor: ...
def gru_cell_packed(
    input: Tensor,
    h: Tensor,
    packed_ih: Tensor,
    packed_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reset_after: bool,
    /,
) -> Tensor: ...
def lstm_layer(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    weight_peephole: Tensor | None,
    layer_norm: Tensor | None,
    hidden_mask: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    candidate: str,
    zoneout_rate_h: float,
    zoneout_rate_c: float,
    grad_clip: float | None,
    truncate: int,
    recompute: int,
    reverse: bool,
    batch_first: bool,
    save: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...
def gru_layer(
    input: Tensor,
    h: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    layer_norm: Tensor | None,
    hidden_mask: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    zoneout_h: Tensor | None,
    reset_after: bool,
    zoneout_rate_h: float,
    grad_clip: float | None,
    truncate: int,
    recompute: int,
    reverse: bool,
    batch_first: bool,
    /,
) -> tuple[Tensor, Tensor]: ...
def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, attn_mask: Tensor | None, /
) -> Tensor: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    bottom_right: bool,
    softcap: float | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    bottom_right: bool,
    softcap: float | None,
    average_heads: bool,
    /,
) -> Tensor: ...
def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_key: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    bottom_right: bool,
    softcap: float | None,
    average_heads: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def binarize(input: Tensor, threshold: float, /) -> Tensor: ...
def pack_bits(input: Tensor, threshold: float, /) -> Tensor: ...
def hamming_distance(a: Tensor, b: Tensor, /) -> Tensor: ...
def hamming_topk(query: Tensor, codes: Tensor, k: int, /) -> tuple[Tensor, Tensor]: ...
def hamming_radius(query: Tensor, codes: Tensor, radius: int, /) -> tuple[Tensor, Tensor, Tensor]: ...
def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def best_cpu_capability() -> str: ...
def set_cpu_capability(name: str, /) -> None: ...
