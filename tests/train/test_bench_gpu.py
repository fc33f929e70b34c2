"""What `foveate bench train` offers on a GPU. Imports no more than that command, for machines that have little."""

import pytest
import torch

from foveate.train.bench import IMAGE_ID, SHAPES, TrainBench, bench_train
from foveate.vlm.config import FoveateConfig
from foveate.vlm.model import FoveateForConditionalGeneration

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_attention_keeps_packed_documents_apart(attention: str) -> None:
    """The second of two documents in a row is what it is alone, and so are its gradients."""
    torch.manual_seed(0)
    config = FoveateConfig(**SHAPES["tiny"], image_token_id=IMAGE_ID, video_token_id=2)
    settings = {"vision_config": "sdpa", "text_config": attention}
    model = FoveateForConditionalGeneration._from_config(config, attn_implementation=settings).cuda()
    embeds = torch.randn(1, 300, 64, device="cuda", requires_grad=True)
    positions = torch.cat([torch.arange(170), torch.arange(130)])[None].cuda()

    def decoded(part: slice) -> torch.Tensor:
        return model.get_decoder()(
            inputs_embeds=embeds[:, part], position_ids=positions[:, part], use_cache=False
        ).last_hidden_state

    both, alone = decoded(slice(0, 300))[:, 170:], decoded(slice(170, 300))
    assert torch.allclose(both, alone, atol=1e-3)
    grads = [torch.autograd.grad(out.square().sum(), embeds)[0] for out in (both, alone)]
    assert grads[0][:, :170].abs().max() == 0
    assert torch.allclose(grads[0], grads[1], atol=1e-2, rtol=1e-2)


def test_steps_are_measured_with_their_memory() -> None:
    results = {entry["name"]: entry for entry in bench_train(TrainBench(tokens=512, steps=2))}
    assert results["train_peak_memory"]["value"] > 0
    assert results["step_memory_fused_loss"]["ratio"] < 1
