"""The library as others import it: `massdpo.select` and the lazily imported names."""

import itertools
import re
import subprocess
import sys

import pytest
import torch

import massdpo
from tests.conftest import ROOT


def example(batch: int = 3, negatives: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logp_BC = -5 * torch.rand(batch, 1 + negatives, generator=generator)
    features_BCD = torch.randn(batch, 1 + negatives, width, generator=generator)
    return logp_BC, logp_BC + torch.randn(logp_BC.shape, generator=generator), features_BCD


def information_gain(
    logp_C: torch.Tensor, ref_C: torch.Tensor, features_CD: torch.Tensor, subset: tuple[int, ...]
) -> float:
    """log det H(S) - log det H(empty) by the definition: D x D matrices in float64, unit features, relative ridge."""
    score_N = 0.1 * ((logp_C - ref_C)[1:] - (logp_C - ref_C)[0]).double()
    p_N = score_N.softmax(-1)
    phi_ND = features_CD[1:].double()
    centred_ND = phi_ND - p_N @ phi_ND
    v_ND = p_N.sqrt()[:, None] * centred_ND / centred_ND.norm(dim=-1, keepdim=True)
    ridge = v_ND.square().sum(-1).mean()
    identity_DD = torch.eye(v_ND.shape[1], dtype=torch.float64)
    chosen_KD = v_ND[list(subset)]
    return float(torch.linalg.slogdet(identity_DD + chosen_KD.T @ chosen_KD / ridge).logabsdet)


def test_select_is_the_greedy_choice_of_the_definition() -> None:
    logp_BC, ref_BC, features_BCD = example()
    found = massdpo.select(logp_BC, ref_BC, features_BCD, k=3, beta=0.1)
    assert found.gains_BK is not None and found.certificate_B is not None
    for row in range(len(logp_BC)):
        of_row = logp_BC[row], ref_BC[row], features_BCD[row]
        taken: tuple[int, ...] = ()
        for pick, gain in zip(found.indices_BK[row].tolist(), found.gains_BK[row].tolist(), strict=True):
            values = {n: information_gain(*of_row, (*taken, n)) for n in range(6) if n not in taken}
            assert pick == max(values, key=lambda n: values[n])
            before = information_gain(*of_row, taken) if taken else 0.0
            assert gain == pytest.approx(values[pick] - before, rel=1e-2)  # log-probs are read to 1e-3 nats
            taken = (*taken, pick)
        best = max(information_gain(*of_row, subset) for subset in itertools.combinations(range(6), 3))
        assert 0 < float(found.certificate_B[row]) <= information_gain(*of_row, taken) / best + 1e-2


def test_select_takes_masks_other_selectors_and_options() -> None:
    logp_BC, ref_BC, features_BCD = example()
    mask_BC = torch.ones_like(logp_BC, dtype=torch.bool)
    mask_BC[0, 4:] = False
    picked = massdpo.select(logp_BC, ref_BC, features_BCD, k=2, mask_BC=mask_BC, solver="exact")
    assert picked.indices_BK[0].max() < 3 and picked.mask_BK.all()
    hardest = massdpo.select(logp_BC, ref_BC, features_BCD, k=2, selector="hardest")
    assert hardest.indices_BK.tolist() == (logp_BC - ref_BC)[:, 1:].topk(2).indices.tolist()
    assert hardest.gains_BK is None and hardest.certificate_B is None
    assert massdpo.select(logp_BC, ref_BC, features_BCD, selector="full").mask_BK.all()
    with pytest.raises(massdpo.UserError, match="unknown selector 'masss'"):
        massdpo.select(logp_BC, ref_BC, features_BCD, selector="masss")
    with pytest.raises(massdpo.UserError, match="nosuch"):
        massdpo.select(logp_BC, ref_BC, features_BCD, nosuch=1)
    with pytest.raises(massdpo.UserError, match="features=head"):
        massdpo.select(logp_BC, ref_BC, features_BCD, features="head")
    with pytest.raises(massdpo.UserError, match="fewer than k=9"):
        massdpo.select(logp_BC, ref_BC, features_BCD, k=9)


def test_what_dir_lists_is_there_and_importing_massdpo_is_quick() -> None:
    assert {"select", "PreferenceScorer", "losses", "metrics"} <= set(dir(massdpo))
    for name in dir(massdpo):
        assert getattr(massdpo, name) is not None
    with pytest.raises(AttributeError):
        massdpo.nosuch  # noqa: B018
    code = "import massdpo, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "torch takes seconds to import"


def test_the_example_runs() -> None:
    script = ROOT / "examples" / "select_negatives.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all("of the best log det" in line for line in lines)


def test_the_readmes_lines_run_as_they_stand() -> None:
    (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    logp_BC, ref_logp_BC, features_BCD = example()
    names = {"logp": logp_BC, "ref_logp": ref_logp_BC, "features": features_BCD}
    exec(code, names)
    assert names["picked"].indices_BK.shape == (3, 4)  # type: ignore[attr-defined]
