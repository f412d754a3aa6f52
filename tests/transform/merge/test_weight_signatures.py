import copy

import families
import pytest
import torch
from torch import nn

from interlayer.core.example import perturbed
from interlayer.transform.merge.weight_signatures import Patched, Signature, WeightSignatures, extract


def nets(count=3, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 3)
    )
    made = [net, *(perturbed(net)[0] for _ in range(count - 1))]
    for other in made[1:]:
        other[1].running_mean.normal_()
    return made


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def test_figures_of_the_authors_code():
    """``get_projection`` of VITA-Group/Robust_Weight_Signatures, on two steps at once, in float64."""
    start, clean, corrupted = (nn.Linear(3, 2, bias=False).double() for _ in range(3))
    with torch.no_grad():
        start.weight.zero_()
        clean.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.5]]))
        corrupted.weight.copy_(torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.25, -0.75]]))
    found = extract(start, clean, corrupted).deltas["weight"]
    wanted = torch.tensor([[0.643939, 0.712121, -0.928030], [2.0, 0.681818, -0.534091]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_mean_of_several_is_put_on_and_batch_norms_take_the_twins_numbers():
    start, clean, *twins = nets(4)
    new = WeightSignatures(scale=0.6).plan(clean, others=(start, clean, *twins)).apply()
    parts = [extract(start, clean, twin) for twin in twins]
    torch.testing.assert_close(
        new[0].weight, clean[0].weight + 0.3 * (parts[0].deltas["0.weight"] + parts[1].deltas["0.weight"])
    )
    mean = (twins[0][1].running_mean + twins[1][1].running_mean) / 2
    torch.testing.assert_close(new[1].running_mean, torch.lerp(clean[1].running_mean, mean, 0.6))
    assert torch.equal(new[1].num_batches_tracked, clean[1].num_batches_tracked)


def test_only_the_first_layers_are_touched():
    start, clean, twin = nets()
    plan = WeightSignatures(first=1).plan(clean, others=(start, clean, twin))
    new = plan.apply()
    assert not torch.equal(new[0].weight, clean[0].weight)
    assert torch.equal(new[3].weight, clean[3].weight) and torch.equal(new[5].bias, clean[5].bias)
    assert [r.name for r in plan.skipped] == ["3", "5"] and "lies behind the first 1 layers" in plan.skipped[0].why
    other = copy.deepcopy(clean)  # for another task, with a head of its own
    other[5] = nn.Linear(32, 7)
    patched = Patched(other)
    patched.put("noise", extract(start, clean, twin, first=2))
    with pytest.raises(ValueError, match=r"5.weight of signature 'all' is \(3, 32\), the model has \(7, 32\)"):
        patched.put("all", extract(start, clean, twin))


def test_signatures_come_and_go_to_the_last_bit():
    start, clean, noise, blur = nets(4)
    before, one, two = state_of(clean), *(extract(start, clean, t) for t in (noise, blur))
    patched = Patched(clean)
    patched.put("noise", one)
    patched.put("blur", two, 0.5)
    both = state_of(clean)
    torch.testing.assert_close(
        both["3.weight"], before["3.weight"] + one.deltas["3.weight"] + 0.5 * two.deltas["3.weight"]
    )
    torch.testing.assert_close(both["1.weight"], (noise[1].weight + 0.5 * blur[1].weight) / 1.5)
    patched.put("blur", scale=0.0)
    patched.take_off("noise")
    assert same(before, clean.state_dict()) and list(patched.held) == ["blur"]
    patched.take_off("blur")
    assert same(before, clean.state_dict())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_rounded_signature_is_small_on_disk_and_comes_back(tmp_path, bits):
    torch.manual_seed(0)
    start, clean, twin = (nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(64, 33)) for _ in range(3))
    whole = extract(start, clean, twin)
    small = whole.rounded(bits)
    sizes = [s.save(tmp_path / f"{n}.safetensors").stat().st_size for n, s in enumerate((whole, small))]
    assert sizes[1] < {3: 0.25, 4: 0.25, 8: 0.36}[bits] * sizes[0]
    again = Signature.load(tmp_path / "1.safetensors")
    assert again.deltas.keys() == small.deltas.keys() and same(again.deltas, small.deltas)
    assert same(Signature.load(tmp_path / "0.safetensors").deltas, whole.deltas)
    gap = (small.deltas["0.weight"] - whole.deltas["0.weight"]).norm() / whole.deltas["0.weight"].norm()
    assert 0 < gap < {3: 0.3, 4: 0.15, 8: 0.01}[bits]
    new = WeightSignatures(bits=bits).plan(clean, others=(start, clean, twin)).apply()
    torch.testing.assert_close(new[0].weight, clean[0].weight + small.deltas["0.weight"])


@pytest.mark.parametrize("name", families.NAMES)
def test_families(name):
    model = families.model(name)
    others = tuple(perturbed(model)[0] for _ in range(3))
    before = state_of(model)
    new = WeightSignatures(first=2).plan(model, others=others).apply()
    assert same(before, model.state_dict()) and not same(before, new.state_dict())
    assert families.output(new, families.batch(name)).isfinite().all()


def test_what_cannot_be_done_is_refused(tmp_path):
    start, clean, twin = nets()
    with pytest.raises(ValueError, match="weight-signatures: 2 other models; expected 3 or more"):
        WeightSignatures().plan(clean, others=(start, clean))
    with pytest.raises(ValueError, match="the models differ at"):
        WeightSignatures().plan(clean, others=(start, nn.Linear(2, 2), twin))
    for options, said in (({"first": 0}, "first 0"), ({"bits": 1}, "bits 1"), ({"scale": float("inf")}, "scale inf")):
        with pytest.raises(ValueError, match=said):
            WeightSignatures(**options)
    with pytest.raises(ValueError, match="no signature 'fog' to take off; there are none"):
        Patched(clean).take_off("fog")
    with pytest.raises(ValueError, match="no signature 'fog' to rescale"):
        Patched(clean).put("fog")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no signature"):
        Signature.load(tmp_path / "other.safetensors")
