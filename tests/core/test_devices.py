import pytest
import torch

from interlayer.core.faults import draw_devices, read_naive


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_reading_equals_the_sum_cell_by_cell(bits):
    cells = draw_devices((5, 4), bits, stuck=0.2, spread=0.3, seed=bits)
    codes = torch.randint(2**bits, (5, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    torch.testing.assert_close(cells.read(codes), read_naive(cells, codes))
    read, kept = cells.table()
    for code in range(2**bits):
        same = torch.full((5, 4), code, dtype=torch.uint8)
        torch.testing.assert_close(read[code], read_naive(cells, same).flatten(), atol=1e-5, rtol=1e-5)
        assert torch.equal(kept[code], cells.keeps(same).flatten())
    assert torch.equal(cells.table(slice(3, 7))[0], read[:, 3:7])


def test_ideal_cells_read_what_was_written_and_stuck_ones_what_they_hold():
    codes = torch.arange(16, dtype=torch.uint8)
    torch.testing.assert_close(draw_devices((16,), 4).read(codes), codes.float(), atol=2e-5, rtol=0)
    cells = draw_devices((16,), 4, stuck=0.5, seed=3)
    read = cells.read(codes).round().to(torch.uint8)
    assert cells.exact and not draw_devices((16,), 4, spread=0.1).exact
    assert bool(cells.keeps(read).all())  # what is read could have been written
    assert torch.equal(cells.keeps(codes), read == codes)
    for at, value in (("zero", 0), ("one", 15)):
        all_stuck = draw_devices((16,), 4, stuck=1.0, at=at)
        assert all_stuck.read(codes).round().unique().tolist() == [value]
    assert draw_devices((1000, 10), 4, stuck=0.1).held.ge(0).float().mean() == pytest.approx(0.1, abs=0.01)
    held = draw_devices((1000, 10), 4, stuck=1.0).held.float()
    assert held.mean() == pytest.approx(0.5, abs=0.01)


def test_resistances_are_normal_and_never_negative():
    cells = draw_devices((20000,), 2, spread=0.4)
    resistance = cells.one.reciprocal()
    assert bool((resistance > 0).all()) and resistance.std() == pytest.approx(0.395, abs=0.01)
    assert float(cells.zero.max()) < 0.1 < float(cells.one.min())
    assert torch.equal(draw_devices((9,), 2, spread=0.4, seed=1).one, draw_devices((9,), 2, spread=0.4, seed=1).one)
    assert not torch.equal(draw_devices((9,), 2, spread=0.4, seed=1).one, draw_devices((9,), 2, spread=0.4, seed=2).one)
    wide = cells.to(torch.zeros(1, dtype=torch.float64))
    assert wide.one.dtype == torch.float64 and wide.held.dtype == torch.int8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 9}, "bits 9"),
        ({"bits": 4, "at": "two"}, "stuck at 'two'"),
        ({"bits": 4, "spread": 1.5}, "spread 1.5"),
        ({"bits": 4, "stuck": 2}, "rate 2"),
    ],
)
def test_clear_errors(options, says):
    with pytest.raises(ValueError, match=says):
        draw_devices((2,), **options)
