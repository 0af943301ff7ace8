"""Features against the plain slow way: loops over tokens, and autograd through whole tiny models."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, PreTrainedModel

from massdpo.model.features import head_kernel, last_features, mean_features, projected_gradients

VOCABULARY, HIDDEN = 37, 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def soft_cap(logits: Tensor) -> Tensor:
    return 2.0 * torch.tanh(logits / 2.0)  # strong, so that its derivative matters at these small logits


FAMILIES: dict[str, tuple[Callable[[bool], PreTrainedModel], Callable[[Tensor], Tensor] | None]] = {
    "llama": (lambda tied: build(LlamaConfig(**SIZES, tie_word_embeddings=tied)), None),
    "gemma2": (
        lambda tied: build(Gemma2Config(**SIZES, tie_word_embeddings=tied, final_logit_softcapping=2.0)),
        soft_cap,
    ),
    "granite": (
        lambda tied: build(GraniteConfig(**SIZES, tie_word_embeddings=tied, logits_scaling=3.0)),
        lambda logits: logits / 3.0,
    ),
}


def build(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the near-uniform distributions of a fresh model
            parameter.mul_(3.0)
    return model


def responses() -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts of 4 tokens with 5 responses of 1 to 3 tokens, one absent: sequences, targets, mask."""
    noise = torch.Generator().manual_seed(1)
    ids_BCL = torch.randint(1, VOCABULARY, (2, 5, 7), generator=noise)
    ids_BCL[:, :, :4] = ids_BCL[:, :1, :4]
    length_BC = torch.tensor([[3, 1, 2, 3, 2], [2, 3, 1, 1, 0]])
    mask_BCT = torch.arange(3) < length_BC[..., None]
    ids_BCL[0, 1, 4] = ids_BCL[0, 0, 4]  # one token in common
    return ids_BCL, ids_BCL[:, :, 4:], mask_BCT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_head_kernel_equals_explicit_gradients(family: str, tied: bool) -> None:
    """Autograd at the output use of the matrix: an untied copy with the same weights has no other use."""
    make, transform = FAMILIES[family]
    model, untied = make(tied), make(False)
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.get_output_embeddings().weight})
    ids_BCL, targets_BCT, mask_BCT = responses()
    with torch.no_grad():
        states = model.model(input_ids=ids_BCL.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 5))
    hidden_BCTD = states[:, :, 3:6]  # those that predict tokens 4, 5 and 6
    weight_VD = model.get_output_embeddings().weight
    for chunk in (8, 10_000):
        kernel_BCC = head_kernel(hidden_BCTD, mask_BCT, targets_BCT, weight_VD, transform=transform, chunk=chunk)
        for prompt in range(2):
            gradients = []
            for candidate in range(5):
                logits_LV = untied(input_ids=ids_BCL[prompt, candidate][None]).logits[0, 3:6]
                token_logp_T = logits_LV.log_softmax(-1).gather(1, targets_BCT[prompt, candidate][:, None])[:, 0]
                logp = (token_logp_T * mask_BCT[prompt, candidate]).sum()
                (gradient_VD,) = torch.autograd.grad(logp, untied.lm_head.weight)
                gradients.append(gradient_VD.flatten())
            explicit_CC = torch.stack(gradients) @ torch.stack(gradients).T
            # float32 inside: 1e-5 of the largest entry
            torch.testing.assert_close(kernel_BCC[prompt], explicit_CC, rtol=1e-5, atol=1e-5 * float(explicit_CC.max()))


def test_head_kernel_with_a_bias() -> None:
    noise = torch.Generator().manual_seed(2)
    hidden_BCTD = torch.randn(1, 3, 2, 4, generator=noise)
    weight_VD = torch.randn(9, 4, generator=noise, requires_grad=True)
    bias_V = torch.randn(9, generator=noise)
    targets_BCT = torch.randint(9, (1, 3, 2), generator=noise)
    kernel_BCC = head_kernel(hidden_BCTD, torch.ones(1, 3, 2, dtype=torch.bool), targets_BCT, weight_VD, bias_V)
    logp_CTV = torch.nn.functional.linear(hidden_BCTD[0], weight_VD, bias_V).log_softmax(-1)
    logp_C = logp_CTV.gather(-1, targets_BCT[0][..., None]).sum((1, 2))
    rows = torch.stack([torch.autograd.grad(logp, weight_VD, retain_graph=True)[0].flatten() for logp in logp_C])
    torch.testing.assert_close(kernel_BCC[0].float(), rows @ rows.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_and_last_against_a_loop(dtype: torch.dtype) -> None:
    noise = torch.Generator().manual_seed(3)
    hidden_BCTD = torch.randn(2, 3, 4, 5, generator=noise).to(dtype)
    length_BC = torch.tensor([[4, 1, 0], [2, 3, 4]])
    mask_BCT = torch.arange(4) < length_BC[..., None]
    mean_BCD, last_BCD = mean_features(hidden_BCTD, mask_BCT), last_features(hidden_BCTD, mask_BCT)
    assert mean_BCD.dtype == last_BCD.dtype == torch.float32
    for prompt in range(2):
        for candidate in range(3):
            states = hidden_BCTD[prompt, candidate, : int(length_BC[prompt, candidate])].float()
            expected = (states.mean(0), states[-1]) if len(states) else (torch.zeros(5), torch.zeros(5))
            torch.testing.assert_close(mean_BCD[prompt, candidate], expected[0])
            torch.testing.assert_close(last_BCD[prompt, candidate], expected[1])


def test_projected_gradients_keep_inner_products() -> None:
    """A count sketch is linear and nearly an isometry: inner products within 5 / sqrt(size) of the norms (5 sigma)."""
    noise = torch.Generator().manual_seed(4)
    weight_a = torch.randn(40, 30, generator=noise, requires_grad=True)
    weight_b = torch.rand(30, generator=noise, requires_grad=True)
    unused = torch.randn(7, generator=noise, requires_grad=True)
    inputs_CD = torch.rand(6, 40, generator=noise)  # gradients that point the same way: without signs they add up
    logp_C = torch.tanh(inputs_CD @ weight_a) @ weight_b
    size = 4_096
    sketch_CS = projected_gradients(logp_C, [weight_a, weight_b, unused], size, seed=0)
    rows = []
    for logp in logp_C:
        parts = torch.autograd.grad(logp, [weight_a, weight_b], retain_graph=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    exact_CC = torch.stack(rows) @ torch.stack(rows).T
    norm_C = exact_CC.diagonal().sqrt()
    assert bool(((sketch_CS @ sketch_CS.T - exact_CC).abs() <= 5 / size**0.5 * norm_C[:, None] * norm_C).all())
    again_CS = projected_gradients(logp_C, [weight_a, weight_b, unused], size, seed=0)
    assert torch.equal(sketch_CS, again_CS)
    assert not torch.equal(sketch_CS, projected_gradients(logp_C, [weight_a, weight_b, unused], size, seed=1))
