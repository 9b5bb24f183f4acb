"""NV-Embed as published: names and shapes of its head, and the formulas written without looking at the module."""

import math

import torch

# The published model's table, without the prefix `latent_attention_model.`
NV_EMBED = {
    "latents": [512, 4096],
    "cross_attend_blocks.0.fn.to_q.weight": [32768, 4096],
    "cross_attend_blocks.0.fn.to_kv.weight": [65536, 4096],
    "cross_attend_blocks.0.fn.to_out.weight": [4096, 32768],
    "cross_attend_blocks.0.norm.weight": [4096],
    "cross_attend_blocks.0.norm.bias": [4096],
    "cross_attend_blocks.0.norm_context.weight": [4096],
    "cross_attend_blocks.0.norm_context.bias": [4096],
    "cross_attend_blocks.1.fn.net.0.weight": [32768, 4096],
    "cross_attend_blocks.1.fn.net.0.bias": [32768],
    "cross_attend_blocks.1.fn.net.2.weight": [4096, 16384],
    "cross_attend_blocks.1.fn.net.2.bias": [4096],
    "cross_attend_blocks.1.norm.weight": [4096],
    "cross_attend_blocks.1.norm.bias": [4096],
}


def transcription(weights, heads, states):
    """NV-Embed's formulas token by token, written without looking at the module: softmax attention over latents."""

    def layer_norm(x, name):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    attend, forward = "cross_attend_blocks.0", "cross_attend_blocks.1"
    out = torch.empty_like(states)
    context = layer_norm(weights["latents"], f"{attend}.norm_context")
    keys_values = context @ weights[f"{attend}.fn.to_kv.weight"].T
    inner = keys_values.shape[1] // 2
    keys, values = keys_values[:, :inner], keys_values[:, inner:]
    width = inner // heads
    for n, text in enumerate(states):
        for t, token in enumerate(text):
            query = weights[f"{attend}.fn.to_q.weight"] @ layer_norm(token, f"{attend}.norm")
            mixed = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                scores = keys[:, part] @ query[part] / math.sqrt(width)
                share = torch.exp(scores - scores.max())
                mixed.append((share / share.sum()) @ values[:, part])
            token = token + weights[f"{attend}.fn.to_out.weight"] @ torch.cat(mixed)
            wide = weights[f"{forward}.fn.net.0.weight"] @ layer_norm(token, f"{forward}.norm")
            wide = wide + weights[f"{forward}.fn.net.0.bias"]
            value, gate = wide.chunk(2)
            gated = value * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
            out[n, t] = token + weights[f"{forward}.fn.net.2.weight"] @ gated + weights[f"{forward}.fn.net.2.bias"]
    return out
