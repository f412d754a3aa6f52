import copy

import families
import pytest
import torch
from torch import nn

from interlayer.core import weights
from interlayer.core.delivery import guard


@pytest.mark.parametrize("name", ["gpt2", "dit"])
def test_a_guarded_model_refuses_with_the_way_out(name, tmp_path):
    model = guard(families.model(name), "a block that runs twice")
    with pytest.raises(
        ValueError, match=r"has a block that runs twice, which from_pretrained would lose. Save all of it"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_masked_model_saves_again_once_it_is_plain(tmp_path):
    model = families.model("gpt2")
    weights.mask(model.transformer.h[0].mlp.c_fc, "weight", torch.rand(16, 64) > 0.5)
    twin = copy.deepcopy(guard(model))
    with pytest.raises(ValueError, match=r"masked weights.*weights.bake\(model\) first, or save"):
        twin.save_pretrained(tmp_path)
    weights.strip(twin)
    twin.save_pretrained(tmp_path)  # the copy is asked about itself
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
    with pytest.raises(ValueError, match="masked weights"):
        model.save_pretrained(tmp_path)


def test_other_models_are_left_alone():
    model = nn.Linear(2, 1)
    assert guard(model, "anything") is model and not hasattr(model, "save_pretrained")
