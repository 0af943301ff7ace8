"""Pick the 4 of 20 rejected answers that are worth training on, from log-probs and embeddings of your own."""

import torch

import massdpo

prompts, negatives, width = 8, 20, 384
generator = torch.Generator().manual_seed(0)
logp_BC = -20 * torch.rand(prompts, 1 + negatives, generator=generator)  # the policy's, nats; the chosen answer first
ref_logp_BC = -20 * torch.rand(prompts, 1 + negatives, generator=generator)  # the reference's
embeddings_BCD = torch.randn(prompts, 1 + negatives, width, generator=generator)  # from any encoder

picked = massdpo.select(logp_BC, ref_logp_BC, embeddings_BCD, k=4, beta=0.1)
for row in range(prompts):
    share = f"at least {picked.certificate_B[row]:.0%} of the best log det"
    print(f"prompt {row}: rejected answers {picked.indices_BK[row].tolist()}, {share}")
